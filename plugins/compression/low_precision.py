"""Low precision: rows in 16 or 8 bits an entry."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.compression.base import Compressor, Payload, check_rows
from groundwire.plugins.random import Key

Format = Literal["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]


def round_stochastically(x: Tensor, dtype: torch.dtype, uniform: Tensor) -> Tensor:
    """Round to one of the two neighbours in ``dtype``, so that the expectation stays.

    Args:
        x: Values, float32.
        dtype: A floating dtype of fewer bits.
        uniform: Independent draws from ``[0, 1)``, float32, the shape of ``x``.

    Returns:
        Values of ``dtype``, still as float32, the shape of ``x``. Beyond the largest of ``dtype`` its grid goes on; what
        is not finite becomes NaN.

    Example:
        >>> round_stochastically(torch.full((2,), 1.3125), torch.float8_e5m2, torch.tensor([0.3, 0.2]))
        tensor([1.2500, 1.5000])
    """
    limits = torch.finfo(dtype)
    binade = (x.view(torch.int32) & (0xFF << 23)).view(torch.float32)  # the power of two at or below |x|
    step = binade.mul_(limits.eps).clamp_(min=limits.smallest_normal * limits.eps)
    steps = x / step
    below = steps.floor()
    return below.add_(steps.sub_(below).sub_(uniform).ceil_()).mul_(step)  # 1 more where the remainder is larger


class LowPrecision(Compressor):
    """Sends every entry in a smaller floating dtype: float16 or bfloat16 as they are, float8 with a scale a row.

    The 16-bit payloads add, so all-reduce serves; the sum is then rounded in that dtype, too. Nothing is scaled: float16
    makes ``|x| >= 65520`` infinite, and a sum that gets there (so send means), and loses precision below 6.1e-5.
    bfloat16 has the range of float32; float16 rows come back from it infinite from 65408 on.

    A float8 row sends the ratio of its largest magnitude to the largest value of the format (448 or 57344) as a float32,
    and its codes as bytes, since not every collective takes float8. If one entry is not finite, none of the row is.

    Rounding to nearest has a relative error of at most 2^-11, 2^-8, 2^-4 and 2^-3, in the order of the formats, in their
    normal range: from 6.1e-5 and 1.2e-38 on, and from 3.5e-5 and 1.1e-9 of the row's largest magnitude. Rows of float64
    are rounded to float32 first.

    Args:
        dtype: The format, by its name in torch.
        stochastic: Round up or down at random, so that it is unbiased up to the largest value of the format; else to
            nearest.

    Raises:
        ValueError: If ``dtype`` is none of the four.

    Reference:
        Micikevicius et al., "Mixed Precision Training", ICLR 2018. arXiv:1710.03740; "FP8 Formats for Deep Learning",
        2022. arXiv:2209.05433

    Example:
        >>> message = LowPrecision("float8_e4m3fn").roundtrip(torch.tensor([[448.0, 17.0, -19.0]]), Key(seed=0))
        >>> message.values, message.bits_wire
        (tensor([[448.,  16., -20.]]), 56)
    """

    def __init__(self, dtype: Format = "bfloat16", stochastic: bool = False) -> None:
        super().__init__()
        if dtype not in get_args(Format):
            raise ValueError(f"`dtype` must be one of {get_args(Format)}, got {dtype!r}.")
        self.dtype = dtype
        self.stochastic = stochastic

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        """Whether it rounds stochastically."""
        return self.stochastic

    @property
    def linear(self) -> bool:  # type: ignore[override]
        """Whether there is no scale."""
        return not self._scaled

    @property
    def _scaled(self) -> bool:
        return self.dtype.startswith("float8")

    @property
    def _torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @override
    def encode(self, x: Tensor, key: Key) -> Payload:
        check_rows(x, key)
        (rows, d), dtype = x.shape, self._torch_dtype
        values, parts = x.detach().float(), {}
        if self._scaled:
            largest = values.abs().amax(1, keepdim=True) if d else values.new_zeros(rows, 1)
            scale = (largest / torch.finfo(dtype).max).clamp_(min=torch.finfo(torch.float32).tiny)
            values, parts["scale"] = values / scale, scale
        if self.stochastic:
            uniform = key.rows("low_precision", lambda g: torch.rand(d, generator=g, device=x.device), on=x.device)
            values = round_stochastically(values, dtype, uniform)
        if self._scaled:
            top = torch.finfo(dtype).max  # which the division may have rounded beyond
            parts["codes"] = values.clamp(-top, top).to(dtype).view(torch.uint8)
        else:
            parts["values"] = values.to(dtype)
        bits = x.numel() * 8 * dtype.itemsize + 32 * rows * self._scaled
        return Payload(parts=parts, numel=d, dtype=x.dtype, bits_ideal=bits)

    @override
    def decode(self, payload: Payload) -> Tensor:
        if not self._scaled:
            return payload.parts["values"].to(payload.dtype)
        codes = payload.parts["codes"]
        table = torch.arange(256, dtype=torch.uint8, device=codes.device).view(self._torch_dtype).float()
        values = table.index_select(0, codes.flatten().int()).view_as(codes)  # the cast would be slow on the CPU
        return values.mul_(payload.parts["scale"]).to(payload.dtype)

    def _relative_error(self, numel: int) -> float | None:
        """Most of ``E|C(x) - x|^2 / |x|^2``, where bfloat16 is in its normal range and a float8 scale in that of float32."""
        if self.dtype == "float16":
            return None  # much of a gradient is below its normal range
        limits = torch.finfo(self._torch_dtype)
        small = limits.eps * limits.smallest_normal / limits.max if self._scaled else 0.0  # a step, over the largest
        return (limits.eps / 2) ** 2 + (numel - 1) * (small / 2) ** 2

    @override
    def omega(self, numel: int) -> float | None:
        return self._relative_error(numel) if self.stochastic else None

    @override
    def alpha(self, numel: int) -> float | None:
        error = self._relative_error(numel)
        return None if error is None or error >= 1 else 1 - error

    @override
    def extra_repr(self) -> str:
        return f"dtype={self.dtype!r}, stochastic={self.stochastic}"
