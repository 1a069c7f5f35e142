"""A digital downlink over fading channels, at the rate of the weakest device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.channels import PowerSchedule
from groundwire.plugins.channels.broadcast import Allocation, FadingBroadcast, common_rate
from groundwire.plugins.edge.downlink import Downlink
from groundwire.plugins.edge.downlinks.estimates import Estimates, Step, relative_error, send_within, server_key
from groundwire.plugins.edge.round import Round
from groundwire.plugins.edge.uplinks.resources import PowerBudget, resolve_channel_uses
from groundwire.plugins.ledger import Cost
from groundwire.plugins.random import Key


class DigitalDownlink(Downlink):
    """One quantised message to all devices over a fading broadcast channel, at a rate that the weakest can decode.

    What is quantised is the difference between the server's model and the estimate that all devices share, those that do
    not take part as well; what is not sent stays in it. Levels and entries are those, within the rate, that are expected
    to lose least. The rate bounds ideal bits, those that a coder of positions and levels would need; the packed message
    takes up to about twice as many, and is booked so (``downlink/bits``, beside ``downlink/bits_ideal``). The devices begin
    with the model of the first round, which a shared seed gives them.

    Args:
        power: Energy of the server in one round (not per symbol), or a schedule of it.
        channel: The channel; its noise must not be 0.
        bandwidth: Real channel uses per parameter, ``s / d``; ``s / 2`` complex ones. By default 1.
        channel_uses: ``s`` itself, instead of ``bandwidth``.
        allocation: ``"uniform"`` spreads power evenly over the channel uses; ``"maxmin"`` raises the common rate by
            sub-gradient steps, for fading that differs between them.

    Raises:
        ValueError: If an argument is out of range; at set-up if ``s`` does not fit the model.

    Reference:
        Mohammadi Amiri, Gündüz, Kulkarni, Poor, "Convergence of Federated Learning over a Noisy Downlink", IEEE Trans.
        Wireless Commun. 21(3), 2022. arXiv:2008.11141; how power, levels and entries are chosen is ours.

    Example:
        >>> downlink = DigitalDownlink(power=5000.0, bandwidth=1.0)
    """

    def __init__(
        self,
        power: float | PowerSchedule = 500.0,
        channel: FadingBroadcast | None = None,
        bandwidth: float | None = None,
        channel_uses: int | None = None,
        allocation: Allocation = "uniform",
    ) -> None:
        super().__init__()
        if allocation not in ("uniform", "maxmin"):
            raise ValueError(f"`allocation` must be 'uniform' or 'maxmin', got {allocation!r}.")
        self.power = PowerBudget(power)
        self.channel = needs_noise(channel or FadingBroadcast())
        self.bandwidth = 1.0 if bandwidth is None and channel_uses is None else bandwidth
        self.channel_uses = channel_uses
        self.allocation = allocation
        self.estimates = Estimates()
        self._uses = 0
        self._devices: tuple[int, ...] = ()
        self._cost = Cost()
        self._metrics: dict[str, Tensor | float] = {}

    @override
    def setup(self, *, numel: int, num_devices: int) -> None:
        self._uses = resolve_channel_uses(numel, bandwidth=self.bandwidth, channel_uses=self.channel_uses, least=2) // 2
        self._devices = tuple(range(num_devices))
        self.estimates.reset_state()

    @override
    def forward(self, model: Tensor, round: Round) -> Tensor:
        """What all devices hold, shape ``(d,)``."""
        power, held = self.power.of(round), self.estimates.of(model)
        budget = self._rate(round, power, model.device)
        step = send_within(budget, model, held, server_key(round))
        if step.is_silent:
            rank_zero_warn(
                "There are rounds in which the server sends nothing (`downlink/silent`): the weakest device can be sent fewer "
                "bits than the smallest message takes. Raise the power or the bandwidth."
            )
        held.copy_(step.held)
        self._cost = digital_cost([step], self._uses, power)
        self._metrics = {"downlink/bit_budget": budget, **metrics_of([step])}
        self._metrics["downlink/model_error"] = relative_error(held, model)
        return held

    def _rate(self, round: Round, power: float, on: torch.device) -> float:
        """Bits that all devices can decode."""
        key = Key(seed=round.key.seed, round=round.index, devices=self._devices)
        if self.allocation == "uniform" or self.channel.fading.block:
            return float(self.channel.bits(key, self._uses, power, on=on).min())
        return float(common_rate(self.channel.snr(key, self._uses, power, on=on))[1])

    @override
    def cost(self, numel: int, round: Round) -> Cost:
        """The message, and the energy of the server; nothing if it was silent."""
        return self._cost

    @override
    def metrics(self, round: Round) -> Mapping[str, Tensor | float]:
        """Bits that the rate allowed, levels and entries of the message, and how far off the devices' model is."""
        return self._metrics


def needs_noise(channel: FadingBroadcast) -> FadingBroadcast:
    """Refuse a noiseless channel.

    Args:
        channel: Of a digital link at its capacity.

    Returns:
        The channel.

    Raises:
        ValueError: If it is noiseless.
    """
    if channel.noise_var == 0:
        raise ValueError(
            "A digital link at the capacity of its channel needs noise, noise_var > 0, but FadingBroadcast(noise_var=0.0) has "
            "none: use PerfectDownlink."
        )
    return channel


def digital_cost(steps: list[Step], uses: int, power: float, shares: Tensor | None = None) -> Cost:
    """What messages cost.

    Args:
        steps: One a message.
        uses: Complex channel uses of the round, which they share.
        power: Energy of the round.
        shares: Of each message in the energy; by default even.

    Returns:
        Nothing, if there were none.
    """
    messages = [step.message for step in steps if step.message is not None]
    sent = torch.tensor([step.message is not None for step in steps], dtype=torch.float64)
    even = torch.full_like(sent, 1 / len(sent))
    energy = power * (sent * (even if shares is None else shares.to(sent))).sum()
    return Cost(
        bits=sum(message.bits_wire for message in messages),
        bits_ideal=sum(message.bits_ideal for message in messages),
        channel_uses=2 * uses if messages else 0,
        energy=energy.unsqueeze(0),
    )


def metrics_of(steps: list[Step]) -> dict[str, Tensor | float]:
    """Mean levels and entries of messages, and the share of those that the budget did not allow."""
    count = len(steps)
    return {
        "downlink/levels": sum(step.num_levels for step in steps) / count,
        "downlink/entries": sum(step.num_entries for step in steps) / count,
        "downlink/silent": sum(step.is_silent for step in steps) / count,
    }
