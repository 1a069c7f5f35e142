"""TernGrad: stochastic ternary gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.compression.base import Compressor, Message, Payload, check_rows
from groundwire.plugins.random import Key

_TRITS = 5
"""Trits a byte: 3^5 = 243 of 256 values are used."""


def pack_trits(trits: Tensor) -> Tensor:
    """Pack five trits into a byte, ``sum_i t_i 3^i``; the last byte is padded with zeros.

    Args:
        trits: 0, 1 or 2, uint8, shape ``(rows, n)``.

    Returns:
        Bytes, uint8, shape ``(rows, ceil(n / 5))``.

    Example:
        >>> pack_trits(torch.tensor([[2, 0, 1]], dtype=torch.uint8))
        tensor([[11]], dtype=torch.uint8)
    """
    rows, n = trits.shape
    groups = torch.nn.functional.pad(trits, (0, -n % _TRITS)).view(rows, -(-n // _TRITS), _TRITS)
    packed = groups[..., -1].clone()
    for place in range(_TRITS - 2, -1, -1):
        packed.mul_(3).add_(groups[..., place])
    return packed


def unpack_trits(packed: Tensor, count: int) -> Tensor:
    """Undo :func:`pack_trits`.

    Args:
        packed: Bytes, shape ``(rows, ceil(count / 5))``.
        count: Trits a row.

    Returns:
        Trits, uint8, shape ``(rows, count)``.

    Raises:
        ValueError: If the bytes do not match ``count``, or on the CPU if one of them is no five trits.
    """
    rows, size = packed.shape
    if size != -(-count // _TRITS):
        raise ValueError(f"{size} bytes a row do not match {count} trits ({-(-count // _TRITS)} bytes).")
    if packed.device.type == "cpu" and packed.numel() and int(packed.max()) >= 3**_TRITS:  # elsewhere asking would wait
        raise ValueError(f"A byte of {int(packed.max())} is no {_TRITS} trits: they are below {3**_TRITS}.")
    powers = 3 ** torch.arange(_TRITS, device=packed.device)
    table = (torch.arange(256, device=packed.device)[:, None] // powers % 3).to(torch.uint8)
    return table.index_select(0, packed.flatten().int()).view(rows, size * _TRITS)[:, :count]


class TernGrad(Compressor):
    """Sends ``s * sign(x) * b`` with ``b`` Bernoulli of probability ``|x| / s``, where ``s`` is the row's largest magnitude.

    Entries are first clipped to ``clip_factor`` standard deviations of the row, since the variance grows with ``s``;
    the result is unbiased for what clipping leaves, and so for the row only if there is none. The deviation is taken
    about zero (the root mean square): about the mean, as in the paper, a constant row would be clipped to nothing, and
    the mean of a gradient is small beside it.

    A row travels as its scale ``s``, a float32, and five ternary codes a byte. What is not finite makes the scale, and
    so the whole row, not finite.

    Args:
        clip_factor: Standard deviations beyond which entries are clipped, positive; None for no clipping.

    Raises:
        ValueError: If ``clip_factor`` is not positive.

    Reference:
        Wen et al., "TernGrad: Ternary Gradients to Reduce Communication in Distributed Deep Learning", NeurIPS 2017.
        arXiv:1705.07878

    Example:
        >>> message = TernGrad().roundtrip(torch.tensor([[0.0, -2.0, 2.0]]), Key(seed=0))
        >>> message.values, message.bits_wire
        (tensor([[ 0., -2.,  2.]]), 40)
    """

    def __init__(self, clip_factor: float | None = 2.5) -> None:
        super().__init__()
        if clip_factor is not None and not clip_factor > 0:
            raise ValueError(f"`clip_factor` must be positive, or None for no clipping, got {clip_factor}.")
        self.clip_factor = clip_factor

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        """Whether nothing is clipped."""
        return self.clip_factor is None

    def _ternarize(self, x: Tensor, key: Key) -> tuple[Tensor, Tensor]:
        """Codes -1, 0 and 1, int8, shape ``(rows, d)``, and scales, float32, ``(rows, 1)``."""
        check_rows(x, key)
        rows, d = x.shape
        wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        size = wide.abs()
        scale = size.amax(1, keepdim=True) if d else size.new_zeros(rows, 1)
        if self.clip_factor is not None and d:
            norm = torch.linalg.vector_norm(wide, dim=1, keepdim=True, dtype=torch.float64)
            scale = torch.minimum(scale, self.clip_factor / math.sqrt(d) * norm)
        scale = scale.float()
        uniform = key.rows(
            "terngrad", lambda g: torch.rand(d, generator=g, dtype=wide.dtype, device=x.device), on=x.device
        )
        drawn = uniform < size.div_(scale)  # never where that is NaN, as in a row of zeros
        return drawn.view(torch.int8) * wide.sign().to(torch.int8), scale

    @override
    def encode(self, x: Tensor, key: Key) -> Payload:
        code, scale = self._ternarize(x, key)
        parts = {"scale": scale, "codes": pack_trits((code + 1).view(torch.uint8))}
        return Payload(parts=parts, numel=x.shape[1], dtype=x.dtype, bits_ideal=self._bits_ideal(x))

    @override
    def decode(self, payload: Payload) -> Tensor:
        code = unpack_trits(payload.parts["codes"], payload.numel).view(torch.int8) - 1
        return (code * payload.parts["scale"]).to(payload.dtype)

    @override
    def roundtrip(self, x: Tensor, key: Key) -> Message:
        code, scale = self._ternarize(x, key)
        bits = 8 * len(x) * (4 + -(-x.shape[1] // _TRITS))
        return Message(values=(code * scale).to(x.dtype), bits_wire=bits, bits_ideal=self._bits_ideal(x))

    @staticmethod
    def _bits_ideal(x: Tensor) -> float:
        return len(x) * (32 + x.shape[1] * math.log2(3))

    @override
    def omega(self, numel: int) -> float | None:
        """The worst case ``(sqrt(numel) - 1) / 2``; a row's own is ``s |x|_1 / |x|^2 - 1``."""
        return None if self.clip_factor is not None else (math.sqrt(numel) - 1) / 2

    @override
    def extra_repr(self) -> str:
        return f"clip_factor={self.clip_factor}"
