"""Top-k sparsification."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.compression.base import Compressor, Message, Payload, check_rows, log2_binomial
from groundwire.plugins.compression.functional import topk_indices, topk_sparsify
from groundwire.plugins.compression.packing import pack_support, support_bytes, unpack_support
from groundwire.plugins.compression.support import check_kept, kept
from groundwire.plugins.random import Key


class TopK(Compressor):
    """Keeps, in every row, the ``k`` entries of largest magnitude; ties go to the lowest index.

    Positions travel in the cheapest of three exact formats, values in the dtype of the rows. NaN counts as largest.

    Args:
        density: Share of the entries kept, ``k / d``, in (0, 1]; at least one entry is kept.
        k: Entries kept, instead of ``density``; at most all of them.

    Raises:
        ValueError: If not exactly one is given, or it is out of range.

    Reference:
        Stich et al., "Sparsified SGD with Memory", NeurIPS 2018. arXiv:1809.07599

    Example:
        >>> import torch
        >>> key = Key(seed=0)
        >>> TopK(k=1).roundtrip(torch.tensor([[3.0, -5.0, 1.0]]), key).values
        tensor([[ 0., -5.,  0.]])
    """

    def __init__(self, density: float | None = None, k: int | None = None) -> None:
        super().__init__()
        check_kept(density, k)
        self.density = density
        self.k = k

    @override
    def encode(self, x: Tensor, key: Key) -> Payload:
        check_rows(x, key)
        k = kept(x.shape[1], self.density, self.k)
        indices = topk_indices(x, k)
        parts = {"values": x.gather(1, indices), "support": pack_support(indices, x.shape[1])}
        return Payload(parts=parts, numel=x.shape[1], dtype=x.dtype, bits_ideal=self._bits(x, k)[1])

    @override
    def decode(self, payload: Payload) -> Tensor:
        values = payload.parts["values"]
        indices = unpack_support(payload.parts["support"], payload.numel, values.shape[1])
        return values.new_zeros(values.shape[0], payload.numel).scatter_(1, indices, values)

    @override
    def decode_sum(self, payload: Payload) -> Tensor:
        values = payload.parts["values"]
        indices = unpack_support(payload.parts["support"], payload.numel, values.shape[1])
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        total = values.new_zeros(payload.numel).index_add_(0, indices.flatten(), values.flatten())
        return total.unsqueeze(0)

    @override
    def subtract_(self, rows: Tensor, payload: Payload) -> Tensor:
        values = payload.parts["values"]
        indices = unpack_support(payload.parts["support"], payload.numel, values.shape[1])
        return rows.scatter_add_(1, indices, -values.to(rows.dtype))

    @override
    def roundtrip(self, x: Tensor, key: Key) -> Message:
        check_rows(x, key)
        k = kept(x.shape[1], self.density, self.k)
        wire, ideal = self._bits(x, k)
        return Message(values=topk_sparsify(x, k), bits_wire=wire, bits_ideal=ideal)

    @staticmethod
    def _bits(x: Tensor, k: int) -> tuple[int, float]:
        """On the wire and ideal, all rows together."""
        rows, d = x.shape
        wire = 8 * rows * (k * x.element_size() + support_bytes(d, k))
        ideal = rows * (8 * k * x.element_size() + log2_binomial(d, k))
        return wire, min(wire, ideal)  # the logarithm may be rounded up

    @override
    def alpha(self, numel: int) -> float:
        return kept(numel, self.density, self.k) / numel

    @override
    def extra_repr(self) -> str:
        return f"density={self.density}" if self.k is None else f"k={self.k}"
