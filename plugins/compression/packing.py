"""Wire formats: integers, signs and supports as bytes, and back; every function works on all rows at once."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

ENUMERATIVE_LIMIT = 64
"""Most entries of a support that is sent by its number among all supports; Python integers take over a millisecond beyond."""


def width_of(largest: int) -> int:
    """Bits that an integer in ``[0, largest]`` needs, at least 1."""
    return max(1, int(largest).bit_length())


def pack_integers(values: Tensor, width: int) -> Tensor:
    """Pack unsigned integers into a bit stream, least significant bit first.

    Args:
        values: Integers in ``[0, 2**width)``, shape ``(rows, n)``.
        width: Bits an integer, 1 to 32.

    Returns:
        Bytes, uint8, shape ``(rows, ceil(n * width / 8))``; the last byte is padded with zeros.

    Raises:
        ValueError: If ``width`` is out of range or a value does not fit.

    Example:
        >>> pack_integers(torch.tensor([[1, 2, 3]]), width=2)
        tensor([[57]], dtype=torch.uint8)
    """
    if not 1 <= width <= 32:
        raise ValueError(f"`width` must be in [1, 32] bits, got {width}.")
    host = values.detach().cpu().numpy()
    if host.size and (host.min() < 0 or host.max() >= 2**width):
        raise ValueError(f"Integers must be in [0, {2**width}) to take {width} bits, got {host.min()} to {host.max()}.")
    if width == 1:
        bits = host.astype(np.uint8, copy=False)
    else:
        wide, each = host.astype(np.int64, copy=False), np.empty((*host.shape, width), dtype=np.uint8)
        for bit in range(width):
            each[..., bit] = (wide >> bit) & 1
        bits = each.reshape(host.shape[0], host.shape[1] * width)
    return torch.from_numpy(np.packbits(bits, axis=1, bitorder="little")).to(values.device)


def unpack_integers(packed: Tensor, width: int, count: int) -> Tensor:
    """Undo :func:`pack_integers`.

    Args:
        packed: Bytes, shape ``(rows, ceil(count * width / 8))``.
        width: Bits an integer.
        count: Integers a row.

    Returns:
        Integers, int64, shape ``(rows, count)``.

    Raises:
        ValueError: If the bytes do not match ``count`` and ``width``.
    """
    if packed.shape[1] != packed_bytes(count, width):
        raise ValueError(
            f"{packed.shape[1]} bytes a row do not match {count} integers of {width} bits "
            f"({packed_bytes(count, width)} bytes)."
        )
    bits = np.unpackbits(packed.cpu().numpy(), axis=1, count=count * width, bitorder="little")
    if width == 1:
        return torch.from_numpy(bits.astype(np.int64)).to(packed.device)
    weights = np.int64(1) << np.arange(width, dtype=np.int64)
    values = bits.reshape(bits.shape[0], count, width).astype(np.int64) @ weights
    return torch.from_numpy(values).to(packed.device)


def packed_bytes(count: int, width: int) -> int:
    """Bytes of ``count`` integers of ``width`` bits."""
    return -(-count * width // 8)


def rank_support(indices: Tensor, numel: int) -> Tensor:
    """Number each row's support among all supports of its size: the enumerative code, the shortest there is.

    Args:
        indices: Distinct positions in ``[0, numel)``, ascending, shape ``(rows, k)``.
        numel: Positions to choose from.

    Returns:
        The number ``sum_i C(indices[i], i + 1)`` in little-endian bytes, uint8, shape
        ``(rows, enumerative_bytes(numel, k))``.
    """
    size = enumerative_bytes(numel, indices.shape[1])
    return _to_bytes([_rank(row) for row in indices.tolist()], size).to(indices.device)


def unrank_support(code: Tensor, numel: int, k: int) -> Tensor:
    """Undo :func:`rank_support`: positions, int64, ascending, shape ``(rows, k)``.

    Raises:
        ValueError: If the bytes are not the number of such a support.
    """
    if code.shape[1] != enumerative_bytes(numel, k):
        raise ValueError(
            f"{code.shape[1]} bytes a row do not match a support of {k} of {numel} entries "
            f"({enumerative_bytes(numel, k)} bytes)."
        )
    rows = [_unrank(int.from_bytes(row.tobytes(), "little"), numel, k) for row in code.cpu().numpy()]
    return torch.tensor(rows, dtype=torch.int64, device=code.device).view(len(rows), k)


def _rank(positions: list[int]) -> int:
    return sum(math.comb(position, i + 1) for i, position in enumerate(positions))


def _unrank(number: int, numel: int, k: int) -> list[int]:
    if number >= math.comb(numel, k):
        raise ValueError(f"The code is not the number of a support of {k} of {numel} entries.")
    positions, high = [], numel - 1
    for size in range(k, 0, -1):
        low = size - 1  # find the largest position with C(position, size) <= number
        while low < high:
            middle = (low + high + 1) // 2
            if math.comb(middle, size) <= number:
                low = middle
            else:
                high = middle - 1
        positions.append(low)
        number -= math.comb(low, size)
        high = low - 1
    return positions[::-1]


def _to_bytes(numbers: list[int], size: int) -> Tensor:
    code = np.frombuffer(b"".join(number.to_bytes(size, "little") for number in numbers), dtype=np.uint8)
    return torch.from_numpy(code.copy()).view(len(numbers), size)


def enumerative_bytes(numel: int, k: int) -> int:
    """Bytes that number every support of ``k`` of ``numel`` positions."""
    return -(-(math.comb(numel, k) - 1).bit_length() // 8)


def support_format(numel: int, k: int) -> str:
    """The cheapest format for ``k`` of ``numel`` positions: nothing for all, the number for few, else indices or a bitmap."""
    if k == numel:
        return "all"
    if k <= ENUMERATIVE_LIMIT:
        return "enumerative"
    return "indices" if packed_bytes(k, width_of(numel - 1)) <= packed_bytes(numel, 1) else "bitmap"


def support_bytes(numel: int, k: int) -> int:
    """Bytes a row that :func:`pack_support` makes."""
    form = support_format(numel, k)
    if form == "all":
        return 0
    if form == "enumerative":
        return enumerative_bytes(numel, k)
    return packed_bytes(k, width_of(numel - 1)) if form == "indices" else packed_bytes(numel, 1)


def pack_support(indices: Tensor, numel: int) -> Tensor:
    """Encode ascending positions ``(rows, k)`` in the cheapest format, which ``numel`` and ``k`` alone decide."""
    form = support_format(numel, indices.shape[1])
    if form == "all":
        return torch.empty(indices.shape[0], 0, dtype=torch.uint8, device=indices.device)
    if form == "enumerative":
        return rank_support(indices, numel)
    if form == "indices":
        return pack_integers(indices, width_of(numel - 1))
    mask = torch.zeros(indices.shape[0], numel, dtype=torch.uint8, device=indices.device).scatter_(1, indices, 1)
    return pack_integers(mask, 1)


def unpack_support(packed: Tensor, numel: int, k: int) -> Tensor:
    """Undo :func:`pack_support`: positions, int64, ascending, shape ``(rows, k)``."""
    form = support_format(numel, k)
    if form == "all":
        return torch.arange(numel, device=packed.device).expand(packed.shape[0], numel)
    if form == "enumerative":
        return unrank_support(packed, numel, k)
    if form == "indices":
        return unpack_integers(packed, width_of(numel - 1), k)
    mask = unpack_integers(packed, 1, numel)
    return mask.nonzero()[:, 1].view(packed.shape[0], k)


def mask_bytes(numel: int, most: int) -> int:
    """Bytes a row that :func:`pack_mask` makes."""
    if most <= ENUMERATIVE_LIMIT:
        return enumerative_bytes(numel, min(most, numel // 2))
    return min(packed_bytes(most, width_of(numel - 1)), packed_bytes(numel, 1))


def pack_mask(mask: Tensor, most: int) -> Tensor:
    """Encode rows that mark at most ``most`` positions each, in one size for all; the counts travel apart.

    Args:
        mask: Booleans, shape ``(rows, d)``.
        most: The most entries that a row may mark.

    Returns:
        Bytes, uint8, shape ``(rows, mask_bytes(d, most))``.
    """
    rows, numel = mask.shape
    if most > ENUMERATIVE_LIMIT and packed_bytes(most, width_of(numel - 1)) > packed_bytes(numel, 1):
        return pack_integers(mask.to(torch.uint8), 1)
    supports = [row.nonzero().flatten() for row in mask]
    if most <= ENUMERATIVE_LIMIT:
        return _to_bytes([_rank(s.tolist()) for s in supports], mask_bytes(numel, most)).to(mask.device)
    padded = torch.zeros(rows, most, dtype=torch.int64, device=mask.device)
    for row, support in enumerate(supports):
        padded[row, : len(support)] = support
    return pack_integers(padded, width_of(numel - 1))


def unpack_mask(packed: Tensor, counts: Tensor, numel: int, most: int) -> Tensor:
    """Undo :func:`pack_mask`.

    Args:
        packed: What it made.
        counts: Entries that each row marks, shape ``(rows, 1)``.
        numel: Entries ``d`` of a row.
        most: As given to :func:`pack_mask`.

    Returns:
        Booleans, shape ``(rows, d)``.
    """
    if most > ENUMERATIVE_LIMIT and packed_bytes(most, width_of(numel - 1)) > packed_bytes(numel, 1):
        return unpack_integers(packed, 1, numel).bool()
    mask = torch.zeros(packed.shape[0], numel, dtype=torch.bool, device=packed.device)
    padded = None if most <= ENUMERATIVE_LIMIT else unpack_integers(packed, width_of(numel - 1), most)
    for row, count in enumerate(counts.flatten().tolist()):
        if padded is not None:
            mask[row, padded[row, :count]] = True
        elif count:
            code = int.from_bytes(packed[row].cpu().numpy().tobytes(), "little")
            mask[row, _unrank(code, numel, count)] = True
    return mask
