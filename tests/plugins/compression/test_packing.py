"""Wire formats: whatever goes in comes out, in the fewest whole bytes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundwire.plugins.compression.packing import (
    ENUMERATIVE_LIMIT,
    mask_bytes,
    pack_integers,
    pack_mask,
    pack_support,
    packed_bytes,
    rank_support,
    support_bytes,
    unpack_integers,
    unpack_mask,
    unpack_support,
    unrank_support,
    width_of,
)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), width=st.integers(1, 32), count=st.integers(0, 20), rows=st.integers(1, 3))
def test_integers_of_any_width_survive(data: st.DataObject, width: int, count: int, rows: int) -> None:
    values = data.draw(st.lists(st.integers(0, 2**width - 1), min_size=rows * count, max_size=rows * count))
    given_ = torch.tensor(values, dtype=torch.int64).view(rows, count)
    packed = pack_integers(given_, width)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, math.ceil(count * width / 8)) == (rows, packed_bytes(count, width))
    assert torch.equal(unpack_integers(packed, width, count), given_)
    for row, code in zip(given_.tolist(), packed.numpy(), strict=True):  # one long integer, least significant bit first
        assert int.from_bytes(code.tobytes(), "little") == sum(v << (i * width) for i, v in enumerate(row))


@pytest.mark.parametrize("numel", range(1, 9))
def test_enumerative_code_is_a_bijection_onto_the_smallest_range(numel: int) -> None:
    for k in range(numel + 1):
        supports = torch.tensor(list(itertools.combinations(range(numel), k)), dtype=torch.int64).view(
            math.comb(numel, k), k
        )
        code = rank_support(supports, numel)
        numbers = sorted(int.from_bytes(row.tobytes(), "little") for row in code.numpy())
        assert numbers == list(range(math.comb(numel, k)))
        assert torch.equal(unrank_support(code, numel, k), supports)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), numel=st.integers(1, 3000), share=st.floats(0, 1), rows=st.integers(1, 3))
def test_supports_and_masks_survive(seed: int, numel: int, share: float, rows: int) -> None:
    rng = np.random.default_rng(seed)
    k = int(share * numel)
    chosen = np.stack([np.sort(rng.choice(numel, k, replace=False)) for _ in range(rows)]).astype(np.int64)
    support = torch.from_numpy(chosen)
    packed = pack_support(support, numel)
    assert packed.shape == (rows, support_bytes(numel, k))
    assert torch.equal(unpack_support(packed, numel, k), support)
    assert packed.shape[1] <= packed_bytes(numel, 1) or k <= ENUMERATIVE_LIMIT

    mask = torch.zeros(rows, numel, dtype=torch.bool).scatter_(1, support, value=True)
    mask[0] &= torch.from_numpy(rng.random(numel) < 0.5)  # a row with fewer
    most = max(k, 1)
    packed = pack_mask(mask, most)
    assert packed.shape == (rows, mask_bytes(numel, most))
    assert torch.equal(unpack_mask(packed, mask.sum(1, keepdim=True), numel, most), mask)


def test_few_entries_cost_their_entropy_to_the_byte() -> None:
    assert support_bytes(7850, 12) == math.ceil(math.log2(math.comb(7850, 12)) / 8)
    assert support_bytes(7850, 1962) == math.ceil(7850 / 8)  # a bitmap: 13 bits an index would be three times that
    assert support_bytes(400_000, 400) == 400 * 19 // 8
    assert [width_of(n) for n in (0, 1, 2, 3, 4, 255, 256)] == [1, 1, 2, 2, 3, 8, 9]


def test_bad_input_by_message() -> None:
    with pytest.raises(ValueError, match=r"`width` must be in \[1, 32\] bits, got 33"):
        pack_integers(torch.zeros(1, 1, dtype=torch.int64), 33)
    with pytest.raises(ValueError, match=r"Integers must be in \[0, 4\) to take 2 bits, got 0 to 4"):
        pack_integers(torch.tensor([[0, 4]]), 2)
    with pytest.raises(ValueError, match="3 bytes a row do not match 4 integers of 3 bits"):
        unpack_integers(torch.zeros(1, 3, dtype=torch.uint8), 3, 4)
