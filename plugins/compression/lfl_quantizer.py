"""LFL's quantiser: stochastic rounding to levels between the least and the largest magnitude."""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.compression.base import Message, Payload, check_rows, log2_binomial
from groundwire.plugins.compression.budget import largest_within
from groundwire.plugins.compression.packing import (
    pack_integers,
    pack_support,
    packed_bytes,
    support_bytes,
    unpack_integers,
    unpack_support,
    width_of,
)
from groundwire.plugins.compression.sparse import EntryLimited
from groundwire.plugins.random import Key

_MOST_LEVELS = 2**16 - 1
"""Levels that are still told apart, with room for the coin, in the arithmetic of float32."""


class LFLQuantizer(EntryLimited):
    """Rounds magnitudes stochastically to ``num_levels + 1`` values, evenly spaced from the least to the largest.

    An entry travels as its sign and its level, a row also as its least and largest magnitude, two float32 numbers:
    ``64 + d (1 + log2(num_levels + 1))`` bits. Both extremes arrive as they are, and so does a row whose magnitudes are
    all equal. Unbiased if all entries are sent. With ``num_entries``, only the entries of largest magnitude are sent,
    and ``log2 C(d, k)`` bits say which.

    Levels are relative to the largest entry: of a Gaussian row of thousands of entries, the mean squared error is above
    the row's square at ``num_levels=1``, and error feedback around it diverges.

    Args:
        num_levels: Intervals between the least and the largest magnitude, ``q``, from 1 to 65535.
        bits: Instead of ``num_levels``, bits of each entry, sign included, from 2 to 17: ``q = 2^(bits - 1) - 1``.
        num_entries: Entries sent; None for all.

    Raises:
        ValueError: If not exactly one of ``num_levels`` and ``bits`` is given, or one is out of range.

    Reference:
        Mohammadi Amiri, Gündüz, Kulkarni, Poor, "Federated Learning With Quantized Global Model Updates", 2020.
        arXiv:2006.10672; sending only some entries is ours.

    Example:
        >>> LFLQuantizer(num_levels=2).roundtrip(torch.tensor([[1.0, -3.0, 2.0]]), Key(seed=0)).values
        tensor([[ 1., -3.,  2.]])
        >>> LFLQuantizer(bits=4).num_levels, LFLQuantizer(num_levels=3).message_bits(1000)
        (7, 3064.0)
    """

    def __init__(self, num_levels: int | None = None, bits: int | None = None, num_entries: int | None = None) -> None:
        super().__init__(num_entries)
        if (num_levels is None) == (bits is None):
            raise ValueError(f"Give either `num_levels` (q) or `bits` (of each entry), got {num_levels=}, {bits=}.")
        if bits is not None and not 2 <= bits <= 17:
            raise ValueError(f"`bits` of an entry, one of them for its sign, must be in [2, 17], got {bits}.")
        levels = num_levels if num_levels is not None else 2 ** ((bits or 0) - 1) - 1
        if levels != int(levels) or not 1 <= levels <= _MOST_LEVELS:
            raise ValueError(f"`num_levels` must be an integer in [1, {_MOST_LEVELS}], got {num_levels}.")
        self.num_levels = int(levels)

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        """Whether all entries are sent."""
        return self.num_entries is None

    @override
    def entry_bits(self, numel: int, num_entries: int) -> float:
        return _bits(numel, num_entries, self.num_levels)

    @override
    def for_budget(self, numel: int, bits: float) -> Self | None:
        entries = _entries_within(numel, bits, self.num_levels)
        return None if entries == 0 else self._with(self.num_levels, entries, numel)

    def fitted(self, row: Tensor, bits: float) -> Self | None:
        """The levels and entries, within a budget of bits, that are expected to lose least of a row.

        Levels are 2 or ``2^n - 1``, and entries as many as the budget then allows. What is lost is foreseen as the
        square of what is not sent, and a sixth of a squared step for each entry that is, as if remainders were uniform.

        Args:
            row: What will be sent, shape ``(d,)``.
            bits: The budget.

        Returns:
            A quantiser of its own; None if the budget is too small for one entry.

        Example:
            >>> row = torch.tensor([3.0, 0.1, -0.1, 0.1, -2.0, 0.1, 0.1, 0.1])
            >>> LFLQuantizer(1).fitted(row, bits=76.0), LFLQuantizer(1).fitted(row, bits=64.0)
            (LFLQuantizer(num_levels=3, num_entries=2), None)
        """
        found = best_resolution(row, bits)
        return None if found is None else self._with(*found, row.numel())

    def _with(self, num_levels: int, num_entries: int, numel: int) -> Self:
        return type(self)(num_levels=num_levels, num_entries=None if num_entries == numel else num_entries)

    @property
    def _width(self) -> int:
        return 1 + width_of(self.num_levels)

    def _quantize(self, x: Tensor, key: Key) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Levels and signs ``(rows, q)``, least and largest magnitude ``(rows, 2)``, and positions if not all are sent."""
        check_rows(x, key)
        chosen, indices = self._choose(x.detach())
        chosen, q = chosen.to(torch.promote_types(x.dtype, torch.float32)), chosen.shape[1]
        uniform = key.rows(
            "lfl", lambda g: torch.rand(q, generator=g, dtype=chosen.dtype, device=x.device), on=x.device
        )
        size = chosen.abs()
        extremes = torch.stack(size.aminmax(dim=1) if q else [size.new_zeros(len(x))] * 2, dim=1).float()
        least, largest = extremes.to(size.dtype).unsqueeze(1).unbind(2)
        span = torch.where(largest > least, largest - least, 1)
        scaled = ((size - least) / span).clamp_(min=0).mul_(self.num_levels)
        level = scaled.add_(uniform).floor_().clamp_(max=self.num_levels)
        level = torch.where(largest > least, level, 0).nan_to_num_(
            0.0
        )  # extremes that are not finite travel and say it
        return level, chosen.signbit(), extremes, indices

    def _dequantize(self, level: Tensor, negative: Tensor, extremes: Tensor, dtype: torch.dtype) -> Tensor:
        """Values ``(rows, q)``; a mean of the extremes, so that both come back as they are."""
        least, largest = extremes.to(level.dtype).unsqueeze(1).unbind(2)
        share = level / self.num_levels
        size = least * (1 - share) + largest * share
        return torch.where(negative, -size, size).to(dtype)

    @override
    def encode(self, x: Tensor, key: Key) -> Payload:
        level, negative, extremes, indices = self._quantize(x, key)
        codes = (level.to(torch.int64) << 1) | negative
        parts = {"codes": pack_integers(codes, self._width), "extremes": extremes}
        if indices is not None:
            parts["support"] = pack_support(indices, x.shape[1])
        q = level.shape[1]
        ideal = x.shape[0] * self.entry_bits(x.shape[1], q)
        return Payload(parts=parts, numel=x.shape[1], dtype=x.dtype, bits_ideal=ideal, meta={"q": q})

    @override
    def decode(self, payload: Payload) -> Tensor:
        q = payload.meta["q"]
        assert isinstance(q, int)
        codes = unpack_integers(payload.parts["codes"], self._width, q)
        level = (codes >> 1).to(torch.promote_types(payload.dtype, torch.float32))
        support = payload.parts.get("support")
        indices = None if support is None else unpack_support(support, payload.numel, q)
        values = self._dequantize(level, (codes & 1).bool(), payload.parts["extremes"], payload.dtype)
        return self._place(values, indices, payload.numel)

    @override
    def roundtrip(self, x: Tensor, key: Key) -> Message:
        level, negative, extremes, indices = self._quantize(x, key)
        (rows, q), d = level.shape, x.shape[1]
        size = packed_bytes(q, self._width) + 8 + support_bytes(d, q)
        values = self._place(self._dequantize(level, negative, extremes, x.dtype), indices, d)
        return Message(values=values, bits_wire=8 * rows * size, bits_ideal=rows * self.entry_bits(d, q))

    @override
    def omega(self, numel: int) -> float | None:
        """Entries vary by at most a quarter of a squared step, and by a step times their size; the largest not at all."""
        if self.num_entries is not None:
            return None
        return min((numel - 1) / (4 * self.num_levels**2), math.sqrt(numel) / self.num_levels)

    @override
    def extra_repr(self) -> str:
        return f"num_levels={self.num_levels}, num_entries={self.num_entries}"


def best_resolution(row: Tensor, bits: float) -> tuple[int, int] | None:
    """Levels and entries of :meth:`LFLQuantizer.fitted`.

    Args:
        row: What will be sent, shape ``(d,)``.
        bits: The budget.

    Returns:
        ``(num_levels, num_entries)``; None if nothing fits.
    """
    options = []
    for levels in (1, 2, *(2**width - 1 for width in range(2, 17))):
        entries = _entries_within(row.numel(), bits, levels)
        if entries == 0:
            break  # finer ones cost more
        options.append((levels, entries))
    if not options:
        return None
    intervals, counts = torch.tensor(options, device=row.device).unbind(1)
    size = row.abs().sort(descending=True).values.double()
    unsent = torch.cat([size.square().flip(0).cumsum(0).flip(0), size.new_zeros(1)])  # by entries sent
    steps = (size[0] - size[counts - 1]) / intervals
    return options[int((unsent[counts] + counts * steps.square() / 6).argmin())]


def _bits(numel: int, entries: int, levels: int) -> float:
    return 64 + log2_binomial(numel, entries) + entries * (1 + math.log2(levels + 1))


def _entries_within(numel: int, bits: float, levels: int) -> int:
    """The most entries that fit; costs rise up to some number of them, and fall from there to that of all."""
    if _bits(numel, numel, levels) <= bits:
        return numel
    top = numel * 2 * (levels + 1) // (2 * levels + 3)
    return largest_within(lambda k: _bits(numel, k, levels), bits, max(top, 1))
