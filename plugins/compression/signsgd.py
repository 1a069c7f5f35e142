"""SignSGD: one bit an entry."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.compression.base import Message, Payload, check_rows, log2_binomial
from groundwire.plugins.compression.packing import (
    pack_integers,
    pack_support,
    packed_bytes,
    support_bytes,
    unpack_integers,
    unpack_support,
)
from groundwire.plugins.compression.sparse import EntryLimited
from groundwire.plugins.random import Key


class SignSGD(EntryLimited):
    """Sends the signs of all entries, or of the ``num_entries`` of largest magnitude; zero counts as positive.

    One bit cannot say NaN: without ``scaled`` it is sent as negative, with it the whole row becomes NaN.

    The server's majority vote is :class:`groundwire.plugins.edge.MajorityVote`; their mean, as in the comparison with
    A-DSGD, is the default aggregator.

    Args:
        num_entries: Entries whose signs are sent; None for all.
        scaled: Send one magnitude a row, too, the mean of ``|x|`` over the entries sent: then it is contractive.

    Raises:
        ValueError: If ``num_entries`` is below 1.

    Reference:
        Bernstein et al., "signSGD: Compressed Optimisation for Non-Convex Problems", ICML 2018. arXiv:1802.04434

    Example:
        >>> SignSGD().roundtrip(torch.tensor([[0.5, -2.0, 0.0]]), Key(seed=0)).values
        tensor([[ 1., -1.,  1.]])
    """

    def __init__(self, num_entries: int | None = None, scaled: bool = False) -> None:
        super().__init__(num_entries)
        self.scaled = scaled

    @property
    def carries_nan(self) -> bool:  # type: ignore[override]
        """Whether the scale travels."""
        return self.scaled

    @override
    def entry_bits(self, numel: int, num_entries: int) -> float:
        return log2_binomial(numel, num_entries) + num_entries + 32 * self.scaled

    @override
    def encode(self, x: Tensor, key: Key) -> Payload:
        check_rows(x, key)
        chosen, indices = self._choose(x)
        d, q = x.shape[1], chosen.shape[1]
        parts = {"signs": pack_integers((chosen >= 0).to(torch.uint8), 1)}
        if indices is not None:
            parts["support"] = pack_support(indices, d)
        if self.scaled:
            parts["scale"] = self._scale(chosen)
        ideal = x.shape[0] * self.entry_bits(d, q)
        return Payload(parts=parts, numel=d, dtype=x.dtype, bits_ideal=ideal, meta={"q": q})

    @override
    def decode(self, payload: Payload) -> Tensor:
        q = payload.meta["q"]
        assert isinstance(q, int)
        wide = torch.promote_types(payload.dtype, torch.float32)
        signs = unpack_integers(payload.parts["signs"], 1, q, torch.uint8).to(wide).mul_(2).sub_(1)
        if self.scaled:
            signs.mul_(payload.parts["scale"])
        signs = signs.to(payload.dtype)
        support = payload.parts.get("support")
        indices = None if support is None else unpack_support(support, payload.numel, q)
        return self._place(signs, indices, payload.numel)

    @override
    def roundtrip(self, x: Tensor, key: Key) -> Message:
        check_rows(x, key)
        chosen, indices = self._choose(x)
        (rows, d), q = x.shape, chosen.shape[1]
        signs = torch.where(chosen >= 0, 1.0, -1.0).to(x.dtype)
        if self.scaled:
            signs = (signs * self._scale(chosen)).to(x.dtype)
        size = packed_bytes(q, 1) + support_bytes(d, q) + 4 * self.scaled
        return Message(
            values=self._place(signs, indices, d), bits_wire=8 * rows * size, bits_ideal=rows * self.entry_bits(d, q)
        )

    @staticmethod
    def _scale(chosen: Tensor) -> Tensor:
        # summed in float64: a row alone must give the same float32 as in a matrix, however many threads share the sum
        total: Tensor = torch.linalg.vector_norm(chosen, ord=1, dim=1, keepdim=True, dtype=torch.float64)
        return (total / chosen.shape[1]).float()

    @override
    def alpha(self, numel: int) -> float | None:
        return 1 / numel if self.scaled else None

    @override
    def extra_repr(self) -> str:
        return f"num_entries={self.num_entries}, scaled={self.scaled}"
