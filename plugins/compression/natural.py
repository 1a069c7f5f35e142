"""Natural compression: stochastic rounding to powers of two."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.compression.base import Compressor, Message, Payload, check_rows
from groundwire.plugins.compression.packing import pack_integers, packed_bytes, unpack_integers
from groundwire.plugins.random import Key

_EXPONENT = 0xFF << 23  # its bits in a float32


def round_to_power_of_two(x: Tensor, noise: Tensor) -> Tensor:
    """Round every magnitude to the power of two below or above it, so that its expectation stays.

    The noise is added to the 23 fraction bits of the float32: their carry into the exponent is the rounding up. Where
    there is no power above, it rounds down: beyond 2^127, and in float16 rows beyond 2^15. Beneath 2^-126, the least
    power, zero is the one below.

    Args:
        x: Values, any real floating dtype; float64 is first rounded to float32.
        noise: Independent integers, uniform in ``[0, 2**23)``, int32, the shape of ``x``.

    Returns:
        Powers of two with the sign of ``x``, zeros, and NaN for what is not finite: float32, the shape of ``x``.

    Reference:
        Horváth et al., "Natural Compression for Distributed Deep Learning", 2019, Section 2. arXiv:1905.10988

    Example:
        >>> round_to_power_of_two(torch.tensor([1.0, 1.5, -1.5]), torch.tensor([0, 2**22 - 1, 2**22]).int())
        tensor([ 1.,  1., -2.])
    """
    wide = x.detach().float()
    size = wide.abs().view(torch.int32)
    size.clamp_(max=(142 if x.dtype == torch.float16 else 254) << 23)  # the largest power of two of the dtype
    size.add_(noise).bitwise_and_(_EXPONENT)
    return size.view(torch.float32).copysign_(wide).add_(wide - wide)  # which is NaN where the value is not finite


class NaturalCompression(Compressor):
    """Rounds every magnitude stochastically to a power of two; a sign and 8 bits of exponent travel.

    Unbiased up to 2^127 (float16 rows: 2^15), beyond which entries are rounded down. The relative variance of 1/8 holds
    from 2^-126 on; what is smaller becomes 0 or 2^-126, without bias. An entry that is not finite, or that float32
    cannot hold, arrives as NaN.

    Reference:
        Horváth, Ho, Horváth, Sahu, Canini, Richtárik, "Natural Compression for Distributed Deep Learning", 2019.
        arXiv:1905.10988

    Example:
        >>> message = NaturalCompression().roundtrip(torch.tensor([[0.25, -2.0, 0.0]]), Key(seed=0))
        >>> message.values, message.bits_wire
        (tensor([[ 0.2500, -2.0000,  0.0000]]), 32)
    """

    unbiased = True

    @staticmethod
    def _round(x: Tensor, key: Key) -> Tensor:
        check_rows(x, key)
        noise = key.rows(
            "natural",
            lambda g: torch.empty(x.shape[1], dtype=torch.int32, device=x.device).random_(2**23, generator=g),
            on=x.device,
        )
        return round_to_power_of_two(x, noise)

    @override
    def encode(self, x: Tensor, key: Key) -> Payload:
        bits = self._round(x, key).view(torch.int32)
        parts = {
            "signs": pack_integers((bits < 0).view(torch.uint8), 1),
            "exponents": ((bits >> 23) & 0xFF).to(torch.uint8),  # 255 is NaN, 0 is zero
        }
        return Payload(parts=parts, numel=x.shape[1], dtype=x.dtype, bits_ideal=9 * x.numel())

    @override
    def decode(self, payload: Payload) -> Tensor:
        size = (payload.parts["exponents"].int() << 23).view(torch.float32)
        signs = 1 - 2 * unpack_integers(payload.parts["signs"], 1, payload.numel).float()
        return size.mul_(signs).add_(size - size).to(payload.dtype)

    @override
    def roundtrip(self, x: Tensor, key: Key) -> Message:
        values = self._round(x, key).to(x.dtype)
        size = x.shape[1] + packed_bytes(x.shape[1], 1)
        return Message(values=values, bits_wire=8 * len(x) * size, bits_ideal=9 * x.numel())

    @override
    def omega(self, numel: int) -> float:
        return 1 / 8

    @override
    def alpha(self, numel: int) -> float:
        return 7 / 8
