"""Digital links: every device's update arrives by itself, compressed."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from groundwire.plugins.compression import Compressor, ErrorFeedback
from groundwire.plugins.edge.ledger import Cost
from groundwire.plugins.edge.round import Round
from groundwire.plugins.edge.uplinks.base import Received, Uplink
from groundwire.plugins.privacy import PrivacyStatement


class Digital(Uplink):
    """Error-free digital link without a rate limit: updates are compressed, and bits are counted.

    Args:
        compressor: Any compressor; with error feedback, :class:`ErrorFeedback` around one.

    Example:
        >>> from groundwire.plugins.compression import TopK
        >>> uplink = Digital(ErrorFeedback(TopK(density=0.01)))
    """

    def __init__(self, compressor: Compressor | ErrorFeedback) -> None:
        super().__init__()
        self.compressor = compressor
        self._numel = 0
        self._sample_rate = 1.0

    @override
    def setup(self, *, numel: int, num_devices: int, seed: int) -> None:
        self._numel = numel
        if isinstance(self.compressor, ErrorFeedback):
            self.compressor.memory.reset_state()
            self.compressor.setup(num_devices)

    @override
    def forward(self, updates: Tensor, round: Round) -> Received:
        self._sample_rate = 1.0 if round.sample_rate is None else round.sample_rate
        send = self.compressor if isinstance(self.compressor, ErrorFeedback) else self.compressor.roundtrip
        message = send(updates, round.key)
        cost = Cost(bits=message.bits_wire, bits_ideal=message.bits_ideal)
        return Received(rows=message.values, weights=round.weights, cost=cost)

    @property
    @override
    def promises_privacy(self) -> bool:
        return not isinstance(self.compressor, ErrorFeedback) and self.compressor.promises_privacy

    @override
    def privacy(self, *, rounds: int) -> PrivacyStatement | None:
        """What a compressor with noise of its own guarantees, at delta 1e-5."""
        if isinstance(self.compressor, ErrorFeedback):  # what was not sent comes again, which no statement covers
            return None
        return self.compressor.privacy(numel=self._numel, rounds=rounds, sample_rate=self._sample_rate)
