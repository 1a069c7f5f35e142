"""D-DSGD and its digital rivals: each device sends what its share of the channel's capacity carries."""

from __future__ import annotations

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.channels import GaussianMAC, PowerSchedule
from groundwire.plugins.compression import ErrorFeedback, Message, RateAdaptive
from groundwire.plugins.edge.round import Round
from groundwire.plugins.edge.uplinks.base import Received, Uplink
from groundwire.plugins.edge.uplinks.resources import PowerBudget, resolve_channel_uses
from groundwire.plugins.layout import ParameterLayout
from groundwire.plugins.ledger import Cost


class CapacityLimited(Uplink):
    """Digital transmission over a Gaussian multiple-access channel at an equal share of its sum capacity.

    In a round in which ``M`` devices spend ``P_t`` each over ``s`` real channel uses, a device may send
    ``R_t = s / (2 M) log2(1 + M P_t / (s noise_var))`` bits. The compressor takes the largest resolution that fits;
    what it cannot send stays in the error memory, if there is one. When not even the smallest message fits, the
    devices are silent: the estimate is zero, nothing is spent, and ``uplink/silent`` is logged as 1.

    With :class:`DDSGDQuantizer` and ``error_feedback=True`` this is D-DSGD; with :class:`SignSGD` or :class:`QSGD` and
    no error feedback, the schemes that the paper compares it with. Capacity is an idealisation: coding is assumed to
    reach it, so messages arrive without error. So is the paper's count of bits that decides the resolution, which is
    fractional (``uplink/bits_ideal``): in whole bytes a message (``uplink/bits``) can exceed the capacity by a few
    per cent.

    Args:
        compressor: A compressor that adapts to a budget of bits.
        error_feedback: Whether devices keep what they could not send.
        power: Energy of one device in one round (not per symbol), or a schedule of it.
        channel: The channel; its ``noise_var`` is per real channel use.
        bandwidth: Channel uses per parameter, ``s / d``.
        channel_uses: ``s`` itself, instead of ``bandwidth``.
        average_power: If given, the schedule's average over the run may not exceed it.

    Raises:
        ValueError: If an argument is out of range; at set-up if ``s`` does not fit the model.

    Example:
        >>> from groundwire.plugins.compression import DDSGDQuantizer
        >>> uplink = CapacityLimited(DDSGDQuantizer(), error_feedback=True, power=500.0, bandwidth=0.5)

    Reference:
        Mohammadi Amiri, Gündüz, "Machine Learning at the Wireless Edge: Distributed Stochastic Gradient Descent
        Over-the-Air", IEEE Trans. Signal Process. 68, 2020, Section III. arXiv:1901.00844
    """

    def __init__(
        self,
        compressor: RateAdaptive,
        error_feedback: bool = False,
        power: float | PowerSchedule = 500.0,
        channel: GaussianMAC | None = None,
        bandwidth: float | None = None,
        channel_uses: int | None = None,
        average_power: float | None = None,
    ) -> None:
        super().__init__()
        self.compressor = compressor
        self.feedback = ErrorFeedback(compressor) if error_feedback else None
        self.power = PowerBudget(power, average_power)
        self.channel = channel or GaussianMAC()
        self.bandwidth = 0.5 if bandwidth is None and channel_uses is None else bandwidth
        self.channel_uses = channel_uses
        self._uses = 0

    @override
    def setup(self, *, layout: ParameterLayout, num_devices: int, seed: int) -> None:
        self._uses = resolve_channel_uses(
            layout.numel, bandwidth=self.bandwidth, channel_uses=self.channel_uses, least=2
        )
        if self.feedback is not None:
            self.feedback.memory.reset_state()
            self.feedback.setup(num_devices)

    @override
    def forward(self, updates: Tensor, round: Round) -> Received:
        power = self.power.of(round)
        num_devices, numel = updates.shape
        budget = self.channel.bits_per_device(self._uses, num_devices, power)
        compressor = self.compressor.for_budget(numel, budget)
        message = self._send(updates, round, compressor)
        silent = compressor is None
        if silent:
            rank_zero_warn(
                "There are rounds in which all devices are silent (`uplink/silent`): a device may send fewer bits than the "
                f"smallest message of {type(self.compressor).__name__} takes. Raise the power or the bandwidth."
            )
        energy = torch.full((num_devices,), 0.0 if silent else power, dtype=torch.float64, device=updates.device)
        cost = Cost(
            bits=message.bits_wire,
            bits_ideal=message.bits_ideal,
            channel_uses=0 if silent else self._uses,
            energy=energy,
        )
        metrics = {"uplink/bit_budget_per_device": budget, "uplink/silent": float(silent)}
        return Received(rows=message.values, weights=round.weights, cost=cost, metrics=metrics)

    def _send(self, updates: Tensor, round: Round, compressor: RateAdaptive | None) -> Message:
        if self.feedback is not None:
            return (
                self.feedback.hold(updates, round.key)
                if compressor is None
                else self.feedback(updates, round.key, compressor=compressor)
            )
        if compressor is None:
            return Message(values=torch.zeros_like(updates), bits_wire=0, bits_ideal=0.0)
        return compressor.roundtrip(updates, round.key)
