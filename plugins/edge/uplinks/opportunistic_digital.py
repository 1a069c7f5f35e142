"""Digital DSGD over a fading channel: in each round, the device with the best channel sends."""

from __future__ import annotations

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.channels import FadingMAC, PowerSchedule, water_filling
from groundwire.plugins.compression import ErrorFeedback, Message, RateAdaptive
from groundwire.plugins.edge.round import Round
from groundwire.plugins.edge.uplinks.base import Received, Uplink
from groundwire.plugins.edge.uplinks.resources import PowerBudget, resolve_channel_uses
from groundwire.plugins.layout import ParameterLayout
from groundwire.plugins.ledger import Cost
from groundwire.plugins.random import Key


class OpportunisticDigital(Uplink):
    """Digital transmission over a fading multiple-access channel by the one device that can send the most bits.

    A device that fills its sub-channels with water may send ``sum_i log2(1 + p_i |h_i|^2 / noise_var)`` bits. The device
    with the most is scheduled; as each is in one of ``M`` rounds on average, it spends ``M`` times the average energy. The
    compressor takes the largest resolution that fits. When not even the smallest message fits, nobody sends. With
    :class:`DDSGDQuantizer` and ``error_feedback=True`` this is D-DSGD over fading channels; with :class:`SignSGD` or
    :class:`QSGD`, the schemes that the paper compares it with.

    The others' updates are lost, and the server takes the scheduled device's message ``M`` times its weight, the weighted
    mean on average over fading. With ``accumulate_when_idle`` they go into the error memories, and the server takes the
    message times the weight, so that what is received adds up to the weighted sum of all updates but for what the memories
    still hold. (Under an optimizer that normalises gradients, such as Adam, the factor makes no difference.) Devices and
    server know the gains.

    Args:
        compressor: A compressor that adapts to a budget of bits.
        error_feedback: Whether devices keep what they could not send.
        power: Average energy of one device in one round (not per symbol), or a schedule of it.
        channel: The fading channel; it must give perfect CSI.
        bandwidth: Real channel uses per parameter, ``s / d``; ``s / 2`` complex ones, rounded down.
        channel_uses: ``s`` itself, instead of ``bandwidth``.
        accumulate_when_idle: Whether devices that are not scheduled keep their updates in the error memory, if there is
            one. They are old when they are sent, which cost 16 points of accuracy where we measured it.
        boost: Whether the scheduled device spends ``M`` times the average energy. Not with path loss, which lets some
            devices send more often than others.
        average_power: If given, the schedule's average over the run may not exceed it.

    Raises:
        ValueError: If an argument is out of range; at set-up if ``s`` does not fit the model.

    Example:
        >>> from groundwire.plugins.compression import DDSGDQuantizer
        >>> uplink = OpportunisticDigital(DDSGDQuantizer(), error_feedback=True, power=500.0, bandwidth=0.5)

    Reference:
        Mohammadi Amiri, Gündüz, "Federated Learning over Wireless Fading Channels", IEEE Trans. Wireless Commun. 19(5),
        2020. arXiv:1907.09769
    """

    def __init__(
        self,
        compressor: RateAdaptive,
        error_feedback: bool = False,
        power: float | PowerSchedule = 500.0,
        channel: FadingMAC | None = None,
        bandwidth: float | None = None,
        channel_uses: int | None = None,
        accumulate_when_idle: bool = False,
        boost: bool = True,
        average_power: float | None = None,
    ) -> None:
        super().__init__()
        self.compressor = compressor
        self.feedback = ErrorFeedback(compressor) if error_feedback else None
        self.power = PowerBudget(power, average_power)
        self.channel = channel or FadingMAC()
        if self.channel.csi_error_var != 0 or self.channel.noise_var == 0:
            raise ValueError(
                "A digital link at the capacity of its channel needs perfect CSI (csi_error_var=0) and noise "
                f"(noise_var > 0), got {self.channel!r}."
            )
        if boost and self.channel.fading.path_loss is not None:
            raise ValueError(
                "Under path loss some devices are scheduled in more than one of M rounds, and M times the average energy "
                "would exceed their average. Set `boost=False`."
            )
        self.bandwidth = 0.5 if bandwidth is None and channel_uses is None else bandwidth
        self.channel_uses = channel_uses
        self.accumulate_when_idle = accumulate_when_idle
        self.boost = boost
        self._uses = 0

    @override
    def setup(self, *, layout: ParameterLayout, num_devices: int, seed: int) -> None:
        uses = resolve_channel_uses(layout.numel, bandwidth=self.bandwidth, channel_uses=self.channel_uses, least=2)
        self._uses = uses // 2
        if self.feedback is not None:
            self.feedback.memory.reset_state()
            self.feedback.setup(num_devices)

    @override
    def forward(self, updates: Tensor, round: Round) -> Received:
        num_devices, numel = updates.shape
        power = self.power.of(round) * (num_devices if self.boost else 1)
        gains = self.channel.gains(round.key, self._uses, on=updates.device).abs().square().double()
        gains = gains.expand(-1, self._uses)
        _, bits = water_filling(gains, power, self.channel.noise_var)
        best = (bits == bits.max()).nonzero().flatten().tolist()
        turn = torch.randint(len(best), (), generator=round.key.shared("uplink/tie")) if len(best) > 1 else 0
        chosen = best[int(turn)]  # without fading all are equal
        budget = float(bits[chosen])
        compressor = self.compressor.for_budget(numel, budget)
        if compressor is None:
            rank_zero_warn(
                "There are rounds in which nobody sends (`uplink/silent`): the best device may send fewer bits than the smallest "
                f"message of {type(self.compressor).__name__} takes. Raise the power or the bandwidth."
            )
        message = self._send(updates, chosen, round.key, compressor)
        energy = torch.zeros(num_devices, dtype=torch.float64, device=updates.device)
        energy[chosen] = power if compressor is not None else 0.0
        cost = Cost(
            bits=message.bits_wire,
            bits_ideal=message.bits_ideal,
            channel_uses=2 * self._uses if compressor is not None else 0,
            energy=energy,
        )
        metrics = {"uplink/bit_budget_per_device": budget, "uplink/silent": float(compressor is None)}
        one = torch.ones_like(round.weights[:1])
        accumulates = self.feedback is not None and self.accumulate_when_idle
        share = round.weights[chosen].to(message.values.dtype) * (1 if accumulates else num_devices)
        return Received(rows=message.values * share, weights=one, cost=cost, metrics=metrics)

    def _send(self, updates: Tensor, chosen: int, key: Key, compressor: RateAdaptive | None) -> Message:
        """The chosen device's message; the others, who are silent, remember theirs."""
        row, own = updates[chosen : chosen + 1], key.row(chosen)
        if self.feedback is None:
            nothing = Message(values=torch.zeros_like(row), bits_wire=0, bits_ideal=0.0)
            return nothing if compressor is None else compressor.roundtrip(row, own)
        if self.accumulate_when_idle:  # all remember, and the chosen one sends of what it remembers
            self.feedback.hold(updates, key)
            row = torch.zeros_like(row)
        return self.feedback.hold(row, own) if compressor is None else self.feedback(row, own, compressor=compressor)
