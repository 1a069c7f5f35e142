"""The quantiser of D-DSGD."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.compression.base import Message, Payload, check_rows, log2_binomial
from groundwire.plugins.compression.functional import d_dsgd_quantize
from groundwire.plugins.compression.packing import (
    mask_bytes,
    pack_integers,
    pack_mask,
    packed_bytes,
    unpack_integers,
    unpack_mask,
    width_of,
)
from groundwire.plugins.compression.sparse import EntryLimited
from groundwire.plugins.random import Key


class DDSGDQuantizer(EntryLimited):
    """Sends the positions of at most ``num_entries`` entries of one sign, and the one value they all take.

    Of the ``q`` largest and the ``q`` smallest entries of a row, those of the sign whose mean magnitude is larger are
    set to that mean, all else to zero. A row with fewer than ``q`` entries of that sign sends fewer.

    Args:
        num_entries: ``q``; None if a budget of bits will say (then all entries count until it does).

    Raises:
        ValueError: If ``num_entries`` is below 1.

    Reference:
        Mohammadi Amiri, Gündüz, "Machine Learning at the Wireless Edge: Distributed Stochastic Gradient Descent
        Over-the-Air", IEEE Trans. Signal Process. 68, 2020, Section III. arXiv:1901.00844

    Example:
        >>> DDSGDQuantizer(num_entries=2).roundtrip(torch.tensor([[3.0, 1.0, -1.0, 0.5]]), Key(seed=0)).values
        tensor([[2., 2., 0., 0.]])
    """

    @override
    def entry_bits(self, numel: int, num_entries: int) -> float:
        return log2_binomial(numel, num_entries) + 33  # the paper's 32 for the magnitude and 1 for the sign

    @override
    def encode(self, x: Tensor, key: Key) -> Payload:
        check_rows(x, key)
        q = self._entries(x.shape[1])
        mask, value = d_dsgd_quantize(x, q)
        count = pack_integers(mask.sum(1, keepdim=True), width_of(q))
        parts = {"value": value.float(), "count": count, "support": pack_mask(mask, q)}
        ideal = x.shape[0] * self.entry_bits(x.shape[1], q)
        return Payload(parts=parts, numel=x.shape[1], dtype=x.dtype, bits_ideal=ideal, meta={"q": q})

    @override
    def decode(self, payload: Payload) -> Tensor:
        q = payload.meta["q"]
        assert isinstance(q, int)
        count = unpack_integers(payload.parts["count"], width_of(q), 1)
        mask = unpack_mask(payload.parts["support"], count, payload.numel, q)
        return torch.where(mask, payload.parts["value"], 0).to(payload.dtype)

    @override
    def roundtrip(self, x: Tensor, key: Key) -> Message:
        check_rows(x, key)
        rows, d = x.shape
        q = self._entries(d)
        mask, value = d_dsgd_quantize(x, q)
        size = 4 + packed_bytes(1, width_of(q)) + mask_bytes(d, q)
        values = torch.where(mask, value.float(), 0).to(x.dtype)
        return Message(values=values, bits_wire=8 * rows * size, bits_ideal=rows * self.entry_bits(d, q))
