"""QSGD: stochastic rounding to a few levels of the norm."""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.compression.base import Message, Payload, check_rows, log2_binomial
from groundwire.plugins.compression.functional import quantize_stochastically
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

_AT_ONCE = 2**20
"""Entries of short buckets that are made float64 at once; memory for all of them costs more than their norm."""


class QSGD(EntryLimited):
    """Rounds ``|x| / |x|_2`` stochastically to multiples of ``1 / num_levels``; unbiased if all entries are sent.

    A code is a sign and a level in ``[0, num_levels]``, in ``1 + ceil(log2(num_levels + 1))`` bits; each bucket sends
    its norm as a float32. With ``num_entries``, only the entries of largest magnitude are sent, and the norm is
    theirs; the paper that compares it with A-DSGD counts ``32 + log2 C(d, q) + (1 + log2 num_levels) q`` bits then,
    which leaves the top level without a code: :meth:`entry_bits` follows it, the wire does not.

    Args:
        num_levels: Levels above zero, at least 1.
        bucket_size: Entries that share a norm; None for the whole row. Not with ``num_entries``.
        num_entries: Entries sent; None for all.

    Raises:
        ValueError: If an argument is out of range, or a budget of bits is to choose entries of buckets.

    Reference:
        Alistarh et al., "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding", NeurIPS 2017.
        arXiv:1610.02132

    Example:
        >>> QSGD(num_levels=1).roundtrip(torch.tensor([[0.0, -2.0, 0.0]]), Key(seed=0)).values
        tensor([[ 0., -2.,  0.]])
    """

    def __init__(self, num_levels: int, bucket_size: int | None = None, num_entries: int | None = None) -> None:
        super().__init__(num_entries)
        if num_levels < 1:
            raise ValueError(f"`num_levels` must be at least 1, got {num_levels}.")
        if bucket_size is not None and bucket_size < 1:
            raise ValueError(f"`bucket_size` must be at least 1, got {bucket_size}.")
        if bucket_size is not None and num_entries is not None:
            raise ValueError(f"Give either `bucket_size` or `num_entries`, got {bucket_size=}, {num_entries=}.")
        self.num_levels = num_levels
        self.bucket_size = bucket_size

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        """Whether all entries are sent."""
        return self.num_entries is None

    @override
    def entry_bits(self, numel: int, num_entries: int) -> float:
        if self.num_entries is None and num_entries == numel:
            return 32 * self._buckets(numel) + numel * math.log2(2 * self.num_levels + 1)
        return 32 + log2_binomial(numel, num_entries) + (1 + math.log2(self.num_levels)) * num_entries

    @override
    def for_budget(self, numel: int, bits: float) -> Self | None:
        if self.bucket_size is not None:
            raise ValueError(
                f"A budget of bits chooses `num_entries`, which does not go with `bucket_size`, got {self.bucket_size}."
            )
        return super().for_budget(numel, bits)

    def _buckets(self, numel: int) -> int:
        return 1 if self.bucket_size is None else -(-numel // self.bucket_size)

    @property
    def _width(self) -> int:
        return 1 + width_of(self.num_levels)

    @property
    def _codes(self) -> torch.dtype:
        """Integers that hold a code; small ones are several times as fast."""
        return torch.uint8 if self._width <= 8 else torch.int64

    @property
    def _integers(self) -> torch.dtype:
        """Of the same size, with a sign."""
        return torch.int8 if self._width <= 8 else torch.int64

    def _quantize(self, x: Tensor, key: Key) -> tuple[Tensor, Tensor, Tensor | None]:
        """Signed levels ``(rows, q)``, norms ``(rows, buckets)``, and the positions ``(rows, q)`` if not all are sent."""
        check_rows(x, key)
        chosen, indices = self._choose(x)
        chosen, q = chosen.to(torch.promote_types(x.dtype, torch.float32)), chosen.shape[1]
        uniform = key.rows(
            "qsgd", lambda g: torch.rand(q, generator=g, dtype=chosen.dtype, device=x.device), on=x.device
        )
        buckets = self._in_buckets(chosen)
        norm = _norms(buckets).unsqueeze(2)
        level = quantize_stochastically(buckets, norm.to(chosen.dtype), self.num_levels, self._in_buckets(uniform))
        return level.flatten(1)[:, :q].copysign_(chosen), norm.squeeze(2), indices

    def _in_buckets(self, x: Tensor) -> Tensor:
        """Rows ``(rows, q)`` as ``(rows, buckets, size)``; zeros fill up the last bucket."""
        rows, q = x.shape
        count, size = self._buckets(q), self.bucket_size or max(q, 1)
        short = size * count - q
        return (torch.nn.functional.pad(x, (0, short)) if short else x).reshape(rows, count, size)

    def _dequantize(self, level: Tensor, norm: Tensor, dtype: torch.dtype) -> Tensor:
        """Values ``(rows, q)`` of signed levels."""
        step = norm.to(level.dtype) / self.num_levels
        return (self._in_buckets(level) * step.unsqueeze(2)).flatten(1)[:, : level.shape[1]].to(dtype)

    @override
    def encode(self, x: Tensor, key: Key) -> Payload:
        level, norm, indices = self._quantize(x, key)
        level = level.nan_to_num(0.0)  # a norm that is not finite, which travels, makes NaN of every level
        whole = level.to(self._integers)
        codes = (whole.abs() << 1) - (whole >> torch.iinfo(whole.dtype).bits - 1)  # the sign comes last
        parts = {"codes": pack_integers(codes.view(self._codes), self._width), "norm": norm}
        if indices is not None:
            parts["support"] = pack_support(indices, x.shape[1])
        return Payload(
            parts=parts,
            numel=x.shape[1],
            dtype=x.dtype,
            bits_ideal=x.shape[0] * self.entry_bits(x.shape[1], level.shape[1]),
            meta={"q": level.shape[1]},
        )

    @override
    def decode(self, payload: Payload) -> Tensor:
        q = payload.meta["q"]
        assert isinstance(q, int)
        codes = unpack_integers(payload.parts["codes"], self._width, q, self._codes)
        level = (codes >> 1).view(self._integers) * (1 - 2 * (codes & 1).view(self._integers))
        level = level.to(torch.promote_types(payload.dtype, torch.float32))
        support = payload.parts.get("support")
        indices = None if support is None else unpack_support(support, payload.numel, q)
        return self._place(self._dequantize(level, payload.parts["norm"], payload.dtype), indices, payload.numel)

    @override
    def roundtrip(self, x: Tensor, key: Key) -> Message:
        level, norm, indices = self._quantize(x, key)
        rows, q = level.shape
        size = packed_bytes(q, self._width) + 4 * norm.shape[1] + support_bytes(x.shape[1], q)
        return Message(
            values=self._place(self._dequantize(level, norm, x.dtype), indices, x.shape[1]),
            bits_wire=8 * rows * size,
            bits_ideal=rows * self.entry_bits(x.shape[1], q),
        )

    @override
    def omega(self, numel: int) -> float | None:
        if self.num_entries is not None:
            return None
        n = min(self.bucket_size or numel, numel)
        return min(n / self.num_levels**2, math.sqrt(n) / self.num_levels)

    @override
    def extra_repr(self) -> str:
        return f"num_levels={self.num_levels}, bucket_size={self.bucket_size}, num_entries={self.num_entries}"


def _norms(buckets: Tensor) -> Tensor:
    """Of buckets ``(rows, count, size)``, float32, in float64 until then: squares may leave float32."""
    count = max(1, _AT_ONCE // max(buckets.shape[0] * buckets.shape[2], 1))
    parts = torch.split(buckets, count, dim=1)
    return torch.cat([torch.linalg.vector_norm(part.double(), dim=2) for part in parts], dim=1).float()
