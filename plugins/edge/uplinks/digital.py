"""Digital links: every device's update arrives by itself, compressed."""

from __future__ import annotations

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.compression import Compressor, ErrorFeedback
from groundwire.plugins.edge.round import Round
from groundwire.plugins.edge.uplinks.base import Received, Uplink
from groundwire.plugins.ledger import Cost
from groundwire.plugins.privacy import PrivacyStatement
from groundwire.plugins.privacy.accounting import check_delta


class Digital(Uplink):
    """Error-free digital link without a rate limit: updates are compressed, and bits are counted.

    A compressor whose guarantee counts on secure aggregation (``num_shares > 1``) is summed as that would: the server gets
    nothing but the mean over the participants, each of which counts the same.

    Args:
        compressor: Any compressor; with error feedback, :class:`ErrorFeedback` around one.
        target_delta: Of what :meth:`privacy` says of a compressor that promises privacy.

    Raises:
        MisconfigurationException: In a round with fewer participants than the compressor's guarantee counts on.

    Example:
        >>> from groundwire.plugins.compression import TopK
        >>> uplink = Digital(ErrorFeedback(TopK(density=0.01)))
    """

    def __init__(self, compressor: Compressor | ErrorFeedback, target_delta: float = 1e-5) -> None:
        super().__init__()
        check_delta(target_delta)
        self.compressor = compressor
        self.target_delta = target_delta
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
        if isinstance(self.compressor, Compressor) and self.compressor.num_shares > 1:
            return self._summed(self.compressor, updates, round)
        if round.is_empty:
            return Received(rows=torch.zeros_like(updates), weights=round.weights, cost=Cost())
        send = self.compressor if isinstance(self.compressor, ErrorFeedback) else self.compressor.roundtrip
        message = send(updates, round.key)
        cost = Cost(bits=message.bits_wire, bits_ideal=message.bits_ideal)
        return Received(rows=message.values, weights=round.weights, cost=cost)

    def _summed(self, compressor: Compressor, updates: Tensor, round: Round) -> Received:
        participants = 0 if round.is_empty else len(updates)
        if participants < compressor.num_shares:
            raise MisconfigurationException(
                f"{participants} devices take part in round {round.index}, and the guarantee of {type(compressor).__name__} "
                f"counts on num_shares={compressor.num_shares}. Lower that, or raise the scheduler's rate; the weights were "
                "not changed."
            )
        payload = compressor.encode(updates, round.key)
        cost = Cost(bits=payload.bits_wire, bits_ideal=payload.bits_ideal)
        mean = compressor.decode_sum(payload) / participants
        return Received(rows=mean, weights=torch.ones_like(round.weights[:1]), cost=cost)

    @property
    @override
    def promises_privacy(self) -> bool:
        return not isinstance(self.compressor, ErrorFeedback) and self.compressor.promises_privacy

    @override
    def privacy(self, *, rounds: int) -> PrivacyStatement | None:
        """What a compressor with noise of its own guarantees."""
        if isinstance(self.compressor, ErrorFeedback):  # what was not sent comes again, which no statement covers
            return None
        return self.compressor.privacy(
            numel=self._numel, rounds=rounds, delta=self.target_delta, sample_rate=self._sample_rate
        )
