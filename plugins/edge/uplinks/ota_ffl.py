"""OTA-FFL: fair weights from the devices' losses, and symbols that meet in the air with these weights."""

from __future__ import annotations

import math
from typing import Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.channels import FadingMAC, PowerSchedule, Rayleigh
from groundwire.plugins.channels.alignment import minimum_mse, zero_forcing
from groundwire.plugins.edge.fairness import box_weights, softmax_weights
from groundwire.plugins.edge.round import Round
from groundwire.plugins.edge.uplinks.base import Received, Uplink
from groundwire.plugins.edge.uplinks.resources import PowerBudget
from groundwire.plugins.layout import ParameterLayout
from groundwire.plugins.ledger import Cost


class OTAFFL(Uplink):
    """Over-the-air fair federated learning: devices of larger loss weigh more, and analog symbols add up by weight.

    In each round the devices tell the server their loss, and the mean and standard deviation of their update's entries (a
    control link, taken as free and exact). The server chooses weights ``w_m`` from the losses, a scale ``c`` for what it
    will receive and scalars ``b_m`` for what they send. A device sends its ``d`` entries, brought to mean 0 and variance 1,
    in ``d`` complex channel uses, ``|b_m|^2`` being their energy; the server takes the real part of ``c`` times what it
    receives and adds the means. With zero-forcing this is ``sum_m w_m g_m`` plus noise of variance ``c^2 noise_var / 2``,
    where ``c`` is decided by the device whose channel is worst for its weight, which spends all its power.

    Args:
        power: The largest energy of one device in one round (not per symbol), or a schedule of it: ``d`` times what
            ``|b_m|^2`` may be.
        channel: The channel, with block fading: a device has one gain in a round.
        weights: ``"box"`` gives the devices of largest loss as much weight as ``epsilon`` allows
            (:func:`~groundwire.plugins.edge.fairness.box_weights`), ``"softmax"`` is smooth
            (:func:`~groundwire.plugins.edge.fairness.softmax_weights`).
        epsilon: For ``"box"``: how far a weight may be from its centre; 0 gives the centre, 1 the worst device alone.
        temperature: For ``"softmax"``: the lower, the more the worst devices weigh.
        mix: For ``"softmax"``: share of the weight that follows the losses.
        centre: ``"uniform"``: all devices alike; ``"samples"``: by their numbers of samples.
        smoothing: Share of the earlier value in each device's running mean of its losses, from which weights are made; in
            [0, 1).
        align: ``"zero_forcing"`` is unbiased; ``"mmse"`` lets devices whose channel is too weak count for less than their
            weight if that lowers the mean square error.
        min_gain: Devices with ``|h|`` below it are silent in the round and have no weight.
        average_power: If given, the schedule's average over the run may not exceed it.

    Raises:
        ValueError: If an argument is out of range; in a round if a gain is exactly 0 and ``align`` is ``"zero_forcing"``.

    Example:
        >>> uplink = OTAFFL(power=500.0, epsilon=0.02, min_gain=0.1)

    Reference:
        Mohajer Hamidi, Bereyhi, Asaad, Poor, "Over-the-Air Fair Federated Learning via Multi-Objective Optimization",
        IEEE Commun. Lett., 2025. arXiv:2501.03392 (the rules for weights, smoothing, ``"mmse"`` and ``min_gain`` are ours)
    """

    superposes = True
    needs_losses = True
    smoothed_losses: Tensor

    def __init__(
        self,
        power: float | PowerSchedule = 500.0,
        channel: FadingMAC | None = None,
        weights: Literal["box", "softmax"] = "box",
        epsilon: float = 0.02,
        temperature: float = 1.0,
        mix: float = 1.0,
        centre: Literal["uniform", "samples"] = "uniform",
        smoothing: float = 0.9,
        align: Literal["zero_forcing", "mmse"] = "zero_forcing",
        min_gain: float = 0.0,
        average_power: float | None = None,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("weights", weights, ("box", "softmax")),
            ("centre", centre, ("uniform", "samples")),
            ("align", align, ("zero_forcing", "mmse")),
        ):
            if value not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
        if not 0 <= smoothing < 1:
            raise ValueError(f"`smoothing` must be in [0, 1), got {smoothing}.")
        if not 0 <= min_gain < math.inf:
            raise ValueError(f"`min_gain`, on |h|, must be finite and >= 0, got {min_gain}.")
        self.power = PowerBudget(power, average_power)
        self.channel = channel or FadingMAC(Rayleigh(block=True))
        self.channel.check_csi(type(self).__name__)
        if not self.channel.fading.block:
            raise ValueError(
                f"{type(self).__name__} scales a device's symbols by one number a round, so that its gain must not change "
                f"within it: use {type(self.channel.fading).__name__}(block=True)."
            )
        self.weights = weights
        self.epsilon = epsilon
        self.temperature = temperature
        self.mix = mix
        self.centre = centre
        self.smoothing = smoothing
        self.align = align
        self.min_gain = min_gain
        self.weigh(torch.ones(1), torch.ones(1))  # refuses what its function refuses
        self._warned = False

    @override
    def setup(self, *, layout: ParameterLayout, num_devices: int, seed: int) -> None:
        self.register_buffer("smoothed_losses", torch.full((num_devices,), math.nan))
        self._warned = False

    def weigh(self, losses: Tensor, shares: Tensor) -> Tensor:
        """The devices' weights.

        Args:
            losses: Of the devices, shape ``(M,)``.
            shares: Their shares of the samples, shape ``(M,)``.

        Returns:
            Weights that sum to one, float64, shape ``(M,)``.
        """
        centre = shares / shares.sum() if self.centre == "samples" else None
        if self.weights == "box":
            return box_weights(losses, self.epsilon, centre)
        return softmax_weights(losses, self.temperature, self.mix, centre)

    @override
    def forward(self, updates: Tensor, round: Round) -> Received:
        power = self.power.of(round) / updates.shape[1]  # of a symbol
        gains = self.channel.gains(round.key, 1)
        known = self.channel.csi(gains, round.key, who=type(self).__name__).flatten().to(torch.complex128)
        gains = gains.flatten().to(torch.complex128)
        losses = self._smooth(round).cpu()  # what there is one of for each device is worked out there
        weights = torch.zeros_like(losses)
        active = known.abs() >= self.min_gain
        if bool(active.any()):
            weights[active] = self.weigh(losses[active], round.weights.cpu()[active])

        variances, means = torch.stack(torch.var_mean(updates, dim=1, correction=0)).double().cpu()
        deviations = variances.sqrt()
        scale, transmit = self._aligned(weights * deviations, known, power, round)
        # c Re(h_m b_m) (g_m - mean_m) / deviation_m, without the matrix of symbols
        heard = torch.where(deviations > 0, scale * (gains * transmit).real / deviations, 0)
        noiseless = heard.to(updates) @ updates + ((weights - heard) @ means).to(updates)
        estimate = noiseless
        if bool(scale > 0) and self.channel.noise_var > 0:
            noise = self.channel.noise(round.key, updates.shape[1], on=updates.device).real
            estimate = noiseless + (float(scale) * noise).to(updates.dtype)
        target = weights.to(updates) @ updates
        wanted = target.square().sum()
        expected = scale.square() * self.channel.noise_var / 2 * updates.shape[1]
        reach = torch.where(weights * deviations > 0, known.abs() / (weights * deviations), math.inf)
        self._warn_of_noise(expected, wanted, scale, int(reach.argmin()), known.abs(), round)

        energy = torch.where(deviations > 0, transmit.abs().square() * updates.shape[1], 0)
        cost = Cost(channel_uses=2 * updates.shape[1] if bool(scale > 0) else 0, energy=energy)
        weakened = (scale * (known * transmit).real) < (1 - 1e-9) * weights * deviations
        metrics = {
            "uplink/silent": (~(scale > 0)).float(),
            "uplink/idle_devices": (~active).sum(),
            "uplink/weakened_devices": weakened.sum(),
            "uplink/largest_weight": weights.max(),
            "uplink/receive_scale": scale,
            "uplink/nmse": torch.where(wanted > 0, (estimate - target).square().sum() / wanted, 0),
        }
        one = torch.ones(1, dtype=round.weights.dtype, device=updates.device)
        return Received(rows=estimate.unsqueeze(0), weights=one, cost=cost, metrics=metrics)

    def _smooth(self, round: Round) -> Tensor:
        """The devices' running means of their losses, this round's included, float64."""
        if round.losses is None:
            raise ValueError(
                f"{type(self).__name__} needs the devices' losses, but the round has none: they are known after local work."
            )
        devices = torch.tensor(round.devices, device=self.smoothed_losses.device)
        now = round.losses.to(self.smoothed_losses)
        before = self.smoothed_losses[devices]
        mean = torch.where(before.isnan(), now, self.smoothing * before + (1 - self.smoothing) * now)
        self.smoothed_losses[devices] = mean
        return mean.double()

    def _aligned(self, target: Tensor, known: Tensor, power: float, round: Round) -> tuple[Tensor, Tensor]:
        if self.align == "mmse":
            return minimum_mse(target, known, power, self.channel.noise_var / 2)
        deaf = (known == 0) & (target > 0)
        if bool(deaf.any()):
            device = round.devices[int(deaf.nonzero()[0])]
            raise ValueError(
                f"In round {round.index} device {device} has gain 0 and cannot send with its weight. Raise `min_gain`, or use "
                "align='mmse'."
            )
        return zero_forcing(target, known, power)

    def _warn_of_noise(
        self, noise: Tensor, wanted: Tensor, scale: Tensor, worst: int, gains: Tensor, round: Round
    ) -> None:
        """Once a run; what comes later is in ``uplink/nmse``."""
        if self._warned or not bool(noise > wanted):
            return
        self._warned = True
        rank_zero_warn(
            f"In round {round.index} the noise has {float(noise / wanted):.2g} times the energy of the update: device "
            f"{round.devices[worst]} needs a receive scale of {float(scale):.2g} (|h| = {float(gains[worst]):.2g}). Raise "
            "`min_gain` or the power, lower `epsilon`, or use align='mmse'."
        )
