"""No compression: the off-switch."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from groundwire.plugins.compression.base import Compressor, Payload, check_rows
from groundwire.plugins.random import Key


class Identity(Compressor):
    """Sends every entry as it is."""

    unbiased = True
    linear = True

    @override
    def encode(self, x: Tensor, key: Key) -> Payload:
        check_rows(x, key)
        bits = 8 * x.element_size() * x.numel()
        return Payload(parts={"values": x}, numel=x.shape[1], dtype=x.dtype, bits_ideal=bits)

    @override
    def decode(self, payload: Payload) -> Tensor:
        return payload.parts["values"]

    @override
    def omega(self, numel: int) -> float:
        return 0.0

    @override
    def alpha(self, numel: int) -> float:
        return 1.0
