"""Wire formats: integers, signs and supports as bytes, and back; every function works on all rows at once."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
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
    values = values.detach()
    if values.numel():
        least, largest = (int(extreme) for extreme in values.aminmax())
        if least < 0 or largest >= 2**width:
            raise ValueError(f"Integers must be in [0, {2**width}) to take {width} bits, got {least} to {largest}.")
    host = values.cpu().numpy()
    if width == 1:
        packed = np.packbits(host.astype(np.uint8, copy=False), axis=1, bitorder="little")
    elif width in _WHOLE:
        packed = host.astype(_unsigned(width)).view(np.uint8)
    else:
        packed = _pack_groups(host, width)
    return torch.from_numpy(packed).to(values.device)


def unpack_integers(packed: Tensor, width: int, count: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Undo :func:`pack_integers`.

    Args:
        packed: Bytes, shape ``(rows, ceil(count * width / 8))``.
        width: Bits an integer.
        count: Integers a row.
        dtype: Of the result, one that holds them: int64 takes eight times the memory of uint8, and longer.

    Returns:
        Integers, shape ``(rows, count)``, memory of their own.

    Raises:
        ValueError: If the bytes do not match ``count`` and ``width``, or ``dtype`` cannot hold such integers.

    Example:
        >>> unpack_integers(torch.tensor([[57]], dtype=torch.uint8), width=2, count=3)
        tensor([[1, 2, 3]])
    """
    if width > torch.iinfo(dtype).max.bit_length():
        raise ValueError(f"{dtype} cannot hold integers of {width} bits; take torch.int64.")
    if packed.shape[1] != packed_bytes(count, width):
        raise ValueError(
            f"{packed.shape[1]} bytes a row do not match {count} integers of {width} bits "
            f"({packed_bytes(count, width)} bytes)."
        )
    host = np.ascontiguousarray(packed.cpu().numpy())
    if width == 1:
        values = np.unpackbits(host, axis=1, count=count, bitorder="little")
    elif width in _WHOLE:
        values = host.view(_unsigned(width))
    else:
        values = _unpack_groups(host, width, count)
    values = values.astype(str(dtype).removeprefix("torch."), copy=width in _WHOLE)  # those are views of `packed`
    return torch.from_numpy(values).to(packed.device)


_WHOLE = (8, 16, 32)
"""Widths of integers that the machine knows."""

_BLOCK = 2**13
"""Groups of eight integers that are packed at once, few enough to stay in the cache."""


def _unsigned(bits: int) -> np.dtype[np.unsignedinteger[Any]]:
    return np.dtype(f"<u{bits // 8}")


def _lane(width: int) -> int:
    """Bits of the smallest machine integer that holds one of ``width`` bits."""
    return next(bits for bits in _WHOLE if bits >= width)


@cache
def _ones(bits: int, period: int) -> np.uint64:
    """A word with the lowest ``bits`` of every ``period`` set."""
    return np.uint64(sum(((1 << bits) - 1) << start for start in range(0, 64, period)))


def _pack_groups(values: npt.NDArray[Any], width: int) -> npt.NDArray[np.uint8]:
    """Eight integers take ``width`` bytes: neighbours in a word of 64 bits are pushed together, then words."""
    (rows, n), lane = values.shape, _lane(width)
    groups = -(-n // 8)
    padded = np.zeros((rows, 8 * groups), _unsigned(lane))
    padded[:, :n] = values
    words = padded.reshape(rows * groups, 8).view(_unsigned(64))
    packed = np.empty((rows * groups, width), np.uint8)
    for start in range(0, len(words), _BLOCK):
        block = slice(start, start + _BLOCK)
        x, bits = words[block], width
        for half in _halves(lane):
            low = _ones(bits, 2 * half)
            x = (x & low) | ((x >> np.uint64(half - bits)) & (low << np.uint64(bits)))
            bits *= 2
        if x.shape[1] > 1:
            x = _join(x, bits)
        packed[block].view(f"V{width}")[:] = _first_bytes(x, width)
    return np.ascontiguousarray(packed.reshape(rows, groups * width)[:, : packed_bytes(n, width)])


def _unpack_groups(packed: npt.NDArray[np.uint8], width: int, count: int) -> npt.NDArray[Any]:
    """Undo :func:`_pack_groups`."""
    rows, lane = len(packed), _lane(width)
    groups = -(-count // 8)
    if packed.shape[1] < groups * width:
        padded = np.zeros((rows, groups * width), np.uint8)
        padded[:, : packed.shape[1]] = packed
        packed = padded
    packed = packed.reshape(rows * groups, width)
    words = np.empty((rows * groups, lane // 8), _unsigned(64))
    for start in range(0, len(words), _BLOCK):
        block = slice(start, start + _BLOCK)
        x, bits = np.zeros((len(words[block]), -(-width // 8)), _unsigned(64)), 8 * width // words.shape[1]
        _first_bytes(x, width)[:] = packed[block].view(f"V{width}")
        if words.shape[1] > 1:
            x = _part(x, bits, words.shape[1])
        for half in reversed(_halves(lane)):
            bits //= 2
            low = _ones(bits, 2 * half)
            x = (x & low) | ((x & (low << np.uint64(bits))) << np.uint64(half - bits))
        words[block] = x
    return words.view(_unsigned(lane)).reshape(rows, 8 * groups)[:, :count]


def _first_bytes(words: npt.NDArray[Any], size: int) -> npt.NDArray[np.void]:
    """The first bytes of each row as one item, which is copied in one go."""
    item = np.dtype({"names": ["first"], "formats": [f"V{size}"], "itemsize": 8 * words.shape[1]})
    first: npt.NDArray[np.void] = words.view(item)["first"]
    return first


def _halves(lane: int) -> list[int]:
    """Where the upper half of what is pushed together begins: from single integers to a whole word."""
    return [half for half in (8, 16, 32) if half >= lane]


def _join(x: npt.NDArray[Any], bits: int) -> npt.NDArray[Any]:
    """Words of 64 bits from groups of integers of ``bits`` bits, shape ``(groups, count)``."""
    joined = np.zeros((len(x), -(-x.shape[1] * bits // 64)), _unsigned(64))
    for i in range(x.shape[1]):
        word, shift = divmod(i * bits, 64)
        joined[:, word] |= x[:, i] << np.uint64(shift)
        if shift + bits > 64:
            joined[:, word + 1] = x[:, i] >> np.uint64(64 - shift)
    return joined


def _part(x: npt.NDArray[Any], bits: int, count: int) -> npt.NDArray[Any]:
    """Undo :func:`_join`; what lies above the integers stays."""
    parted = np.empty((len(x), count), _unsigned(64))
    for i in range(count):
        word, shift = divmod(i * bits, 64)
        parted[:, i] = x[:, word] >> np.uint64(shift)
        if shift + bits > 64:
            parted[:, i] |= x[:, word + 1] << np.uint64(64 - shift)
    return parted


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
    bits = np.unpackbits(packed.cpu().numpy(), axis=1, count=numel, bitorder="little")
    positions = np.flatnonzero(bits.view(np.bool_)).reshape(len(bits), k)  # much faster than torch's
    positions -= numel * np.arange(len(bits))[:, None]
    return torch.from_numpy(positions).to(packed.device)


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
