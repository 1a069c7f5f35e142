"""How many entries a sparsifier keeps."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_DRAWN_FROM = 2**14
"""Positions from which a few are drawn by themselves, and not with a permutation of all."""
_WIDE = 2**62


def check_kept(density: float | None, k: int | None) -> None:
    """Refuse anything but exactly one of a density in (0, 1] and a count of at least 1.

    Args:
        density: Share of the entries to keep.
        k: Entries to keep.

    Raises:
        ValueError: If both or none are given, or the one given is out of range.
    """
    if (density is None) == (k is None):
        raise ValueError(f"Give either `density` (share of entries kept) or `k` (entries kept), got {density=}, {k=}.")
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"`density` must be in (0, 1], got {density}.")
    if k is not None and k < 1:
        raise ValueError(f"`k` must be at least 1, got {k}.")


def kept(numel: int, density: float | None, k: int | None) -> int:
    """Entries to keep of ``numel``: at least 1 and at most all."""
    wanted = round(density * numel) if density is not None else k
    assert wanted is not None  # check_kept saw to it
    return min(max(wanted, 1), numel)


def random_support(numel: int, k: int, generator: torch.Generator) -> Tensor:
    """``k`` of ``numel`` positions, every set of them equally likely: int64, ascending, shape ``(k,)``.

    Args:
        numel: Positions to choose from.
        k: How many, at most all.
        generator: Of the draws, on the CPU.

    Returns:
        On the CPU.
    """
    if 4 * k > numel or numel < _DRAWN_FROM:
        return torch.randperm(numel, generator=generator)[:k].sort().values
    drawn = np.empty(0, dtype=np.int64)
    while True:  # the first k distinct of independent draws; a permutation would take numel of them
        more = torch.randint(_WIDE, (k + k // 2 + 16,), generator=generator) % numel  # torch's own modulo is of 32 bits
        drawn = np.concatenate([drawn, more.numpy()])
        distinct, first = np.unique(drawn, return_index=True)
        if distinct.size >= k:
            last = np.partition(first, k - 1)[k - 1]
            return torch.from_numpy(distinct[first <= last])
