"""The largest entries, as many as a budget of bits allows."""

from __future__ import annotations

from typing import Self

from torch import Tensor
from typing_extensions import override

from groundwire.plugins.compression.base import Message, Payload, RateAdaptive, log2_binomial
from groundwire.plugins.compression.budget import largest_within
from groundwire.plugins.compression.topk import TopK
from groundwire.plugins.random import Key


class LargestEntries(RateAdaptive):
    """Top-k sparsification whose number of entries a budget of bits decides; the paper's count of 33 bits a value.

    Positions and values travel as in :class:`TopK`. A message of ``q`` entries counts as
    ``log2 C(d, q) + 33 q`` bits against a budget: 32 for the magnitude and one for the sign.

    Args:
        num_entries: ``q``; None if a budget will say (then all entries are sent until it does).

    Raises:
        ValueError: If ``num_entries`` is below 1.

    Example:
        >>> round(LargestEntries(num_entries=2).message_bits(7850), 1)
        90.9
        >>> LargestEntries().for_budget(7850, bits=1161.0).num_entries
        27

    Reference:
        Mohammadi Amiri, Gündüz, Kulkarni, Poor, "Convergence of Update Aware Device Scheduling for Federated Learning at
        the Wireless Edge", IEEE Trans. Wireless Commun. 20(6), 2021. arXiv:2001.10402
    """

    def __init__(self, num_entries: int | None = None) -> None:
        super().__init__()
        if num_entries is not None and num_entries < 1:
            raise ValueError(f"`num_entries` must be at least 1, got {num_entries}.")
        self.num_entries = num_entries

    @property
    def _topk(self) -> TopK:
        return TopK(density=1.0) if self.num_entries is None else TopK(k=self.num_entries)

    @override
    def message_bits(self, numel: int) -> float:
        q = numel if self.num_entries is None else min(self.num_entries, numel)
        return log2_binomial(numel, q) + 33 * q

    @override
    def for_budget(self, numel: int, bits: float) -> Self | None:
        q = largest_within(lambda n: log2_binomial(numel, n) + 33 * n, bits, numel)
        return type(self)(num_entries=q) if q else None

    @override
    def encode(self, x: Tensor, key: Key) -> Payload:
        return self._topk.encode(x, key)

    @override
    def decode(self, payload: Payload) -> Tensor:
        return self._topk.decode(payload)

    @override
    def roundtrip(self, x: Tensor, key: Key) -> Message:
        return self._topk.roundtrip(x, key)

    @override
    def extra_repr(self) -> str:
        return f"num_entries={self.num_entries}"
