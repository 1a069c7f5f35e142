"""Random supports."""

from __future__ import annotations

import pytest
import torch

from groundwire.plugins.compression.support import random_support


@pytest.mark.parametrize(
    ("numel", "k"), [(1, 1), (9, 4), (20_000, 1), (20_000, 5_000), (20_000, 5_001), (20_000, 20_000)]
)
def test_supports_are_sets_of_their_size(numel: int, k: int) -> None:
    support = random_support(numel, k, torch.Generator().manual_seed(0))
    assert support.dtype == torch.int64
    assert support.shape == (k,)
    assert (support[1:] > support[:-1]).all()
    assert 0 <= support[0] <= support[-1] < numel


def test_positions_beyond_a_modulo_of_32_bits_are_no_rarer() -> None:
    numel, k = 3 * 2**30, 300_000  # of 2^32 draws modulo this, the first third would come twice as often
    support = random_support(numel, k, torch.Generator().manual_seed(0))
    for part in range(3):
        found = int(((support >= part * 2**30) & (support < (part + 1) * 2**30)).sum())
        assert abs(found - k / 3) < 5 * (k * 2 / 9) ** 0.5


def test_every_set_is_equally_likely() -> None:
    numel, k, draws = 2**14, 2**11, 400
    g = torch.Generator().manual_seed(0)
    counts, pairs = torch.zeros(numel, dtype=torch.float64), 0
    for _ in range(draws):
        marked = torch.zeros(numel, dtype=torch.float64)
        marked[random_support(numel, k, g)] = 1
        counts += marked
        pairs += int((marked[1:] * marked[:-1]).sum())
    p = k / numel
    chi2 = ((counts - draws * p) ** 2 / (draws * p * (1 - p))).sum().item()
    assert abs(chi2 - numel) < 5 * (2 * numel) ** 0.5
    both = (numel - 1) * draws * p * (k - 1) / (numel - 1)
    assert abs(pairs - both) < 5 * both**0.5  # neighbours are no likelier than any two
