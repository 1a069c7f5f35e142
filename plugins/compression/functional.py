"""The mathematics of compressors, as plain functions on rows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


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
    size = x.detach().abs().nan_to_num_(nan=torch.inf, posinf=torch.inf)
    on_cpu = size.device.type == "cpu"
    # torch.topk is up to 18 times as fast while k <= d / 64, and up to 1.6 times as slow beyond
    if on_cpu and size.dtype in (torch.float32, torch.float64) and k * 64 > d:
        ordered = np.partition(size.numpy(), d - k, axis=-1)[:, d - k, None]
        threshold = torch.from_numpy(np.ascontiguousarray(ordered))
    else:
        threshold = size.topk(k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    if on_cpu:  # no ties: the common case, and worth asking where that costs no synchronisation
        mask = size >= threshold
        if np.count_nonzero(mask.numpy()) == k * x.shape[0]:
            return mask
    above, tied = size > threshold, size == threshold
    return above | (tied & (tied.cumsum(-1) <= k - above.sum(-1, keepdim=True)))


def mask_to_indices(mask: Tensor, k: int) -> Tensor:
    """Positions of the true entries, ascending, shape ``(rows, k)``; every row must have ``k`` of them."""
    return mask.nonzero()[:, 1].view(mask.shape[0], k)


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
    scaled = x.abs() * (num_levels / torch.where(norm > 0, norm, 1))
    return torch.floor(scaled + uniform).clamp_(max=num_levels)


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
    masks, means = [], []
    for side in (wide.clamp_min(0), (-wide).clamp_min_(0)):
        mask = topk_mask(side, q) & (side != 0)
        masks.append(mask)
        means.append(torch.where(mask, side, 0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp_min(1))
    positive = means[0] > means[1]
    return torch.where(positive, masks[0], masks[1]), torch.where(positive, means[0], -means[1])
