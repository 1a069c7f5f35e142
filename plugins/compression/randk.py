"""Random-k sparsification with a support that all devices share."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.compression.base import Compressor, Payload, check_rows
from groundwire.plugins.compression.error_feedback import finite_rows
from groundwire.plugins.compression.support import check_kept, kept, random_support
from groundwire.plugins.random import Key


class RandK(Compressor):
    """Keeps ``k`` random entries, the same for all devices of a round, so that only values travel and payloads add.

    A row that is not finite is sent as NaN, wherever that entry lies.

    Args:
        density: Share of the entries kept, ``k / d``, in (0, 1]; at least one entry is kept.
        k: Entries kept, instead of ``density``; at most all of them.
        unbiased: Scale what is kept by ``d / k``, so that the expectation is the row; else it is sent as it is, which
            is what error feedback wants.

    Raises:
        ValueError: If not exactly one of ``density`` and ``k`` is given, or it is out of range.

    Reference:
        Stich et al., "Sparsified SGD with Memory", NeurIPS 2018. arXiv:1809.07599

    Example:
        >>> message = RandK(density=0.5).roundtrip(torch.ones(3, 4), Key(seed=0, devices=(0, 1, 2)))
        >>> message.values.sum(dim=1), message.bits_wire
        (tensor([4., 4., 4.]), 192)
    """

    linear = True

    def __init__(self, density: float | None = None, k: int | None = None, unbiased: bool = True) -> None:
        super().__init__()
        check_kept(density, k)
        self.density = density
        self.k = k
        self.unbiased = unbiased

    @override
    def encode(self, x: Tensor, key: Key) -> Payload:
        check_rows(x, key)
        d = x.shape[1]
        k = kept(d, self.density, self.k)
        support = random_support(d, k, key.shared("randk")).to(x.device)
        values = x.index_select(1, support)
        if self.unbiased and k < d:
            values = values * (d / k)
        values = values.masked_fill(~finite_rows(x).unsqueeze(1), torch.nan)
        return Payload(
            parts={"values": values},
            numel=d,
            dtype=x.dtype,
            bits_ideal=8 * values.numel() * values.element_size(),
            meta={"support": support},
        )

    @override
    def decode(self, payload: Payload) -> Tensor:
        values, support = payload.parts["values"], payload.meta["support"]
        assert isinstance(support, Tensor)
        return values.new_zeros(values.shape[0], payload.numel).index_copy_(1, support, values)

    @override
    def omega(self, numel: int) -> float | None:
        return numel / kept(numel, self.density, self.k) - 1 if self.unbiased else None

    @override
    def alpha(self, numel: int) -> float | None:
        return None if self.unbiased else kept(numel, self.density, self.k) / numel

    @override
    def extra_repr(self) -> str:
        return f"density={self.density}, k={self.k}, unbiased={self.unbiased}"
