"""Top-k of rows so long that they are searched piece by piece."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from groundwire.plugins.compression.functional import topk_indices, topk_sparsify


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["heavy", "few values", "zeros", "sorted", "nan", "at the ends"])
def test_pieces_together_keep_what_a_stable_sort_keeps(dtype: torch.dtype, kind: str) -> None:
    d = 2**18 + 4321
    x = torch.randn(2, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    if kind == "few values":
        x = x.round().clamp(-2, 2)
    elif kind == "zeros":
        x[0] = 0
    elif kind == "sorted":
        x = x.sort(dim=1).values
    elif kind == "at the ends":  # of pieces, and of the row
        x[:, [0, 2**17 - 1, 2**17, 2**18 - 1, 2**18, d - 1]] *= 1e4
    x = x.to(dtype)
    if kind == "nan":
        x[0, 7::1000], x[1, 3::1001], x[1, 4::1001] = math.nan, math.inf, -math.inf
    sizes = np.where(np.isnan(x.double().numpy()), np.inf, np.abs(x.double().numpy()))
    for k in (1, 262, d // 100, d // 3):
        expected = np.sort(np.argsort(-sizes, axis=1, kind="stable")[:, :k], axis=1)
        np.testing.assert_array_equal(topk_indices(x, k).numpy(), expected)
        sparse = torch.zeros_like(x).scatter_(1, torch.from_numpy(expected), x.gather(1, torch.from_numpy(expected)))
        assert torch.equal(topk_sparsify(x, k).nan_to_num(), sparse.nan_to_num())


def test_rows_of_a_larger_matrix_are_left_as_they_are() -> None:
    matrix = torch.randn(3, 50_000, generator=torch.Generator().manual_seed(0))
    before, part = matrix.clone(), matrix[:, 5_000:45_000]
    assert torch.equal(topk_indices(part, 400), topk_indices(part.clone(), 400))
    assert torch.equal(matrix, before)
