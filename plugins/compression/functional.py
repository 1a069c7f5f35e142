"""The mathematics of compressors, as plain functions on rows."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_SAMPLED_FROM = 2**14
"""Entries a row from which a sampled threshold pays on the CPU."""

_PIECE = 2**17
"""Entries that are compared with it at once."""


def topk_mask(x: Tensor, k: int) -> Tensor:
    """Mark, in every row, the ``k`` entries of largest magnitude; ties go to the lowest index.

    NaN counts as the largest magnitude, so that it is passed on and not hidden.

    Args:
        x: Rows, shape ``(rows, d)``.
        k: Entries to mark, ``0 <= k``; ``k >= d`` marks all.

    Returns:
        Booleans, shape ``(rows, d)``, with exactly ``min(k, d)`` true in every row.

    Raises:
        ValueError: If ``k`` is negative.

    Example:
        >>> topk_mask(torch.tensor([[1.0, -3.0, 3.0, 2.0]]), k=1)
        tensor([[False,  True, False, False]])
    """
    if k < 0:
        raise ValueError(f"`k` must be >= 0, got {k}.")
    d = x.shape[-1]
    if k == 0 or k >= d:
        return torch.full(x.shape, k >= d > 0, dtype=torch.bool, device=x.device)
    if x.device.type == "cpu" and d >= _SAMPLED_FROM:
        return torch.zeros(x.shape, dtype=torch.bool).scatter_(1, _topk_sampled(x, k), value=True)
    size = _magnitudes(x)
    on_cpu = size.device.type == "cpu"
    if on_cpu and k * 64 > d:  # torch.topk is faster while k <= d / 64, and up to twice as slow beyond
        threshold = torch.from_numpy(np.partition(size.numpy(), d - k, axis=-1)[:, d - k, None].copy())
    else:
        threshold = size.topk(k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    if on_cpu:  # no ties: the common case, and worth asking where that costs no synchronisation
        mask = size >= threshold
        if np.count_nonzero(mask.numpy()) == k * x.shape[0]:
            return mask
    above, tied = size > threshold, size == threshold
    return above | (tied & (tied.cumsum(-1) <= k - above.sum(-1, keepdim=True)))


def topk_indices(x: Tensor, k: int) -> Tensor:
    """Positions of what :func:`topk_mask` marks, for ``k <= d``: int64, ascending, shape ``(rows, k)``."""
    if x.device.type == "cpu" and x.shape[1] >= _SAMPLED_FROM and 0 < k < x.shape[1]:
        return _topk_sampled(x, k)
    return mask_to_indices(topk_mask(x, k), k)


def topk_sparsify(x: Tensor, k: int) -> Tensor:
    """The rows with zeros where :func:`topk_mask` marks nothing, for ``k <= d``: a new tensor of the shape of ``x``."""
    if x.device.type == "cpu" and x.shape[1] >= _SAMPLED_FROM and 0 < k < x.shape[1]:
        indices = _topk_sampled(x, k)
        return torch.zeros_like(x).scatter_(1, indices, x.gather(1, indices))
    return torch.where(topk_mask(x, k), x, 0)


def mask_to_indices(mask: Tensor, k: int) -> Tensor:
    """Positions of the true entries, ascending, shape ``(rows, k)``; every row must have ``k`` of them."""
    return mask.nonzero()[:, 1].view(mask.shape[0], k)


_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


def _magnitudes(x: Tensor) -> Tensor:
    """Integers in the order of ``|x|``, NaN last: its bits, which compare faster than floats and without exceptions."""
    return x.detach().abs().view(_BITS[x.dtype]).clamp_(max=_smallest_nan(x.dtype))  # one kind of NaN


@cache
def _smallest_nan(dtype: torch.dtype) -> int:
    return int(torch.tensor(torch.inf, dtype=dtype).view(_BITS[dtype])) + 1


def _topk_sampled(x: Tensor, k: int) -> Tensor:
    """Exact top-k on the CPU, row by row, so that a row stays in the cache.

    A strided sample gives a threshold that a little more than ``k`` entries should pass; only those are ordered. Where
    fewer pass, all are: the sample decides how long it takes, never what comes out.
    """
    rows, d = x.shape
    stride = max(1, min(d // 2048, int((d / (8 * k**0.5)) ** (2 / 3))) | 1)  # ordering it, or what passes in excess
    aim = int(k / stride + 4 * (k / stride) ** 0.5 + 4)  # four standard deviations above k
    bits = x.detach().contiguous().view(_BITS[x.dtype]).numpy()
    magnitude = torch.iinfo(_BITS[x.dtype]).max  # all but the sign
    nan = _smallest_nan(x.dtype)
    chosen = torch.empty(rows, k, dtype=torch.int64)
    out = chosen.numpy()
    for row in range(rows):
        sample = np.minimum(bits[row, ::stride] & magnitude, nan)
        passed = None
        if 10 * aim < 7 * sample.size:
            passed = _at_least(bits[row], magnitude, np.partition(sample, sample.size - aim)[sample.size - aim])
            if not k <= passed.size < d:
                passed = None
        some = np.minimum((bits[row] if passed is None else bits[row, passed]) & magnitude, nan)
        threshold = np.partition(some, some.size - k)[some.size - k]
        keep = some >= threshold
        surplus = int(np.count_nonzero(keep)) - k
        if surplus:  # ties go to the lowest index
            keep[np.flatnonzero(some == threshold)[-surplus:]] = False
        out[row] = np.flatnonzero(keep) if passed is None else passed[keep]
    return chosen


def _at_least(bits: npt.NDArray[Any], mask: int, threshold: np.integer[Any]) -> npt.NDArray[np.int64]:
    """Where ``bits & mask >= threshold``, ascending; piece by piece, so that what is in between stays in the cache."""
    found = []
    for start in range(0, bits.size, _PIECE):
        piece = np.flatnonzero((bits[start : start + _PIECE] & mask) >= threshold)
        piece += start
        found.append(piece)
    return np.concatenate(found)


def quantize_stochastically(x: Tensor, norm: Tensor, num_levels: int, uniform: Tensor) -> Tensor:
    """Round ``num_levels * |x| / norm`` up or down at random so that its expectation stays: integers in ``[0, L]``.

    Args:
        x: Values, shape ``(..., n)``.
        norm: What the levels are relative to, broadcastable to ``x``; zero gives level 0.
        num_levels: Levels above zero, ``L >= 1``.
        uniform: Independent draws from ``[0, 1)``, the shape of ``x``.

    Returns:
        Levels as floats, the shape of ``x``.
    """
    scaled = x.abs().mul_(num_levels / torch.where(norm > 0, norm, 1))
    return scaled.add_(uniform).floor_().clamp_(max=num_levels)


def d_dsgd_quantize(x: Tensor, q: int) -> tuple[Tensor, Tensor]:
    """D-DSGD's quantiser: one sign, one magnitude, at most ``q`` entries a row.

    Of the ``q`` largest and the ``q`` smallest entries, those of the sign whose mean magnitude is larger are set to
    that mean, and everything else to zero. Only entries above zero count as positive, below as negative; at equal
    means the negative ones are taken. NaN counts as the largest of both signs, and makes the value NaN.

    Args:
        x: Rows, shape ``(rows, d)``.
        q: Entries of each sign to consider, ``1 <= q <= d`` (0 for rows without entries).

    Returns:
        ``(mask, value)``: which entries are kept, shape ``(rows, d)``, and what each row sets them to, ``(rows, 1)``,
        in float32 at least.

    Raises:
        ValueError: If ``q`` is out of range.

    Reference:
        Mohammadi Amiri, Gündüz, arXiv:1901.00844, Section III.
    """
    if not min(1, x.shape[-1]) <= q <= x.shape[-1]:
        raise ValueError(f"`q` must be in [1, {x.shape[-1]}], got {q}.")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    chosen, kept, means = [], [], []
    for side in (wide.clamp_min(0), (-wide).clamp_min_(0)):
        indices = topk_indices(side, q)
        sizes = side.gather(1, indices)
        count = (sizes != 0).sum(-1, keepdim=True).clamp_min_(1)
        means.append(sizes.sum(-1, keepdim=True, dtype=torch.float64) / count)  # float64: rows alone sum alike
        chosen.append(indices)
        kept.append(sizes != 0)
    positive = means[0] > means[1]
    mask = torch.zeros(x.shape, dtype=torch.bool, device=x.device)
    mask.scatter_(1, torch.where(positive, chosen[0], chosen[1]), torch.where(positive, kept[0], kept[1]))
    return mask, torch.where(positive, means[0], -means[1]).to(wide.dtype)


def hadamard_transform(x: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of every row, in ``O(d log d)``; it is its own inverse.

    Args:
        x: Rows, shape ``(rows, d)``, floating; ``d`` a power of two (or 0).

    Returns:
        ``x H / sqrt(d)`` with Sylvester's ``H``, a new tensor of the shape and dtype of ``x``.

    Raises:
        ValueError: If ``d`` is no power of two.

    Reference:
        Fino, Algazi, "Unified Matrix Treatment of the Fast Walsh-Hadamard Transform", IEEE Trans. Computers 1976.

    Example:
        >>> hadamard_transform(torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
        tensor([[1., 0., 0., 1.]])
    """
    rows, d = x.shape
    if d & (d - 1):
        raise ValueError(f"`x` must have a power of two entries a row, got {d}; pad them with zeros.")
    if x.numel() == 0:
        return x.clone()
    outer = 1 << (d.bit_length() - 1) // 2  # a matrix a row: its columns first, then its rows as columns, is faster
    y = _butterflies(x.reshape(rows, outer, d // outer).clone())
    y = _butterflies(y.transpose(1, 2).contiguous())
    return y.transpose(1, 2).reshape(rows, d).mul_(d**-0.5)


def _butterflies(y: Tensor) -> Tensor:
    """The unnormalised transform along the second of three dimensions, in place."""
    rows, n, inner = y.shape
    half = n // 2
    while half:
        pairs = y.view(rows, n // (2 * half), 2, half, inner)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        total = first + second
        torch.sub(first, second, out=second)
        first.copy_(total)
        half //= 2
    return y


def next_power_of_two(numel: int) -> int:
    """The smallest power of two that is at least ``numel``; 0 for 0."""
    return 1 << (numel - 1).bit_length() if numel else 0
