"""Digital links: every device's update arrives by itself, compressed."""

from __future__ import annotations

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.compression import Compressor, Feedback, Granularity, Sender
from groundwire.plugins.edge.round import Round
from groundwire.plugins.edge.uplinks.base import Received, Uplink
from groundwire.plugins.layout import ParameterLayout
from groundwire.plugins.ledger import Cost
from groundwire.plugins.privacy import PrivacyStatement
from groundwire.plugins.privacy.accounting import check_delta


class Digital(Uplink):
    """Error-free digital link without a rate limit: updates are compressed, and bits are counted.

    :class:`groundwire.plugins.ddp.CompressedDDPStrategy` sends the same messages between processes: as many processes
    as there are devices get the same model.

    A compressor whose guarantee counts on secure aggregation (``num_shares > 1``) is summed as that would: the server gets
    nothing but the mean over the participants, each of which counts the same.

    Args:
        compressor: Any compressor, or error feedback around one: :class:`ErrorFeedback`, :class:`EF21`, ...
        granularity: ``"model"`` compresses the update as one vector, ``"layer"`` every parameter by itself; then those
            of fewer than two dimensions or fewer than ``min_numel`` entries, and those that would not become smaller,
            are sent as they are.
        min_numel: Fewest entries of a parameter that is compressed.
        warmup_rounds: Rounds at the beginning in which everything is sent as it is, and nothing remembered.
        target_delta: Of what :meth:`privacy` says of a compressor that promises privacy.

    Raises:
        ValueError: If an argument is out of range; at set-up if the compressor does not fit the model.
        MisconfigurationException: In a round with fewer participants than the compressor's guarantee counts on; at
            set-up if no parameter would be compressed.

    Example:
        >>> from groundwire.plugins.compression import ErrorFeedback, TopK
        >>> uplink = Digital(ErrorFeedback(TopK(density=0.01)))
    """

    def __init__(
        self,
        compressor: Compressor | Feedback,
        target_delta: float = 1e-5,
        granularity: Granularity = "model",
        min_numel: int = 1024,
        warmup_rounds: int = 0,
    ) -> None:
        super().__init__()
        check_delta(target_delta)
        self.sender = Sender(compressor, granularity, min_numel, warmup_rounds)
        self.target_delta = target_delta
        self._numel = 0
        self._sample_rate = 1.0

    @property
    def compressor(self) -> Compressor | Feedback:
        """What it was given."""
        return self.sender.given

    @override
    def setup(self, *, layout: ParameterLayout, num_devices: int, seed: int) -> None:
        self._numel = layout.numel
        self.sender.setup(layout, num_devices)

    @override
    def forward(self, updates: Tensor, round: Round) -> Received:
        self._sample_rate = 1.0 if round.sample_rate is None else round.sample_rate
        if isinstance(self.compressor, Compressor) and self.compressor.num_shares > 1:
            return self._summed(self.compressor, updates, round)
        if round.is_empty:
            return Received(rows=torch.zeros_like(updates), weights=round.weights, cost=Cost())
        message = self.sender(updates, round.key)
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
        return not isinstance(self.compressor, Feedback) and self.compressor.promises_privacy

    @override
    def privacy(self, *, rounds: int) -> PrivacyStatement | None:
        """What a compressor with noise of its own guarantees."""
        if isinstance(self.compressor, Feedback):  # what was not sent comes again, which no statement covers
            return None
        return self.compressor.privacy(
            numel=self._numel, rounds=rounds, delta=self.target_delta, sample_rate=self._sample_rate
        )
