"""DP-FedAvg: clipped updates, noise in their sum, a fixed divisor."""

from __future__ import annotations

import math
from typing import Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.edge.ledger import Cost
from groundwire.plugins.edge.round import Round
from groundwire.plugins.edge.uplinks.base import Received, Uplink
from groundwire.plugins.edge.uplinks.device_privacy import DevicePrivacy
from groundwire.plugins.edge.uplinks.error_free import ErrorFree
from groundwire.plugins.privacy import Accounting, PrivacyStatement

_SERVER = "The server is trusted: it sees the clipped updates, adds the noise, and publishes the sum alone."


class DPFedAvg(Uplink):
    """Protects all data of a device: what a device changes in the sum of updates is bounded, and hidden by noise.

    The server's estimate is ``(sum_m clip(U_m) + N(0, (noise_multiplier * clip_norm)^2 I)) / (rate * M)``: the divisor
    is the expected number of participants, and each device counts the same, whatever its number of samples. Devices
    have to take part by coins of their own (:class:`PoissonSample`) or all in every round.

    With ``noise="server"``, updates travel over ``uplink``, and are clipped when they have arrived, so that no compressor
    can make them longer. With ``noise="devices"``, each device clips its update and adds the share
    ``noise_multiplier * clip_norm / sqrt(min_devices)`` before it is sent, and secure aggregation is assumed to hide
    all but the sum: then a round needs ``min_devices`` participants.

    Every device's own training, and what it logs (the loss), is not private by itself.

    Args:
        clip_norm: Bound ``C`` on the L2 norm of a device's update.
        target_epsilon: Budget for the planned rounds.
        noise_multiplier: Noise over ``clip_norm`` instead, or as well; see :class:`DevicePrivacy`.
        target_delta: ``1 / (2 M^1.1)`` for ``M`` devices by default.
        noise: Who adds it.
        min_devices: With ``noise="devices"``, honest participants that a round has at least.
        uplink: How updates travel; by default error-free. It must deliver each device's update by itself.
        accountant: As in :func:`groundwire.plugins.privacy.spent_epsilon`.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: In a round with fewer than ``min_devices`` participants, with another scheduler, or
            over an uplink that superposes updates.

    Reference:
        McMahan, Ramage, Talwar, Zhang, "Learning Differentially Private Recurrent Language Models", ICLR 2018,
        Algorithm 1 (fixed divisor). arXiv:1710.06963

    Example:
        >>> from groundwire.plugins.edge import EdgeStrategy, PoissonSample
        >>> strategy = EdgeStrategy(100, scheduler=PoissonSample(0.2), uplink=DPFedAvg(1.0, target_epsilon=8.0))
    """

    def __init__(
        self,
        clip_norm: float,
        target_epsilon: float | None = None,
        noise_multiplier: float | None = None,
        target_delta: float | None = None,
        noise: Literal["server", "devices"] = "server",
        min_devices: int | None = None,
        uplink: Uplink | None = None,
        accountant: Accounting = "prv",
    ) -> None:
        super().__init__()
        if noise not in ("server", "devices"):
            raise ValueError(f"`noise` must be 'server' or 'devices', got {noise!r}.")
        if (noise == "devices") != (min_devices is not None):
            raise ValueError(
                f"`min_devices`, the participants who share the noise, goes with noise='devices', got {noise=}, "
                f"{min_devices=}."
            )
        if min_devices is not None and min_devices < 1:
            raise ValueError(f"`min_devices` must be at least 1, got {min_devices}.")
        self.device_privacy = DevicePrivacy(clip_norm, target_epsilon, noise_multiplier, target_delta, accountant)
        self.noise = noise
        self.min_devices = min_devices
        self.uplink = uplink or ErrorFree()
        self._num_devices = 0

    @override
    def setup(self, *, numel: int, num_devices: int, seed: int) -> None:
        self._num_devices = num_devices
        self.device_privacy.setup(num_devices)
        self.uplink.setup(numel=numel, num_devices=num_devices, seed=seed)

    @override
    def forward(self, updates: Tensor, round: Round) -> Received:
        privacy = self.device_privacy
        std = privacy.begin_round(round) * privacy.clip_norm
        if self.noise == "devices":
            total, cost, metrics = self._with_shares(updates, round, std)
        else:
            received = self._per_device(updates, round)
            total = privacy.clip(received.rows).sum(0)
            if std > 0:
                generator = round.key.shared("privacy/noise", on=total.device)
                total += std * torch.randn(total.shape, generator=generator, dtype=total.dtype, device=total.device)
            cost, metrics = received.cost, dict(received.metrics)
        privacy.end_round()
        estimate = total / (privacy.sample_rate * self._num_devices)
        one = torch.ones(1, dtype=round.weights.dtype, device=updates.device)
        return Received(rows=estimate.unsqueeze(0), weights=one, cost=cost, metrics=metrics)

    def _with_shares(self, updates: Tensor, round: Round, std: float) -> tuple[Tensor, Cost, dict[str, Tensor | float]]:
        assert self.min_devices is not None
        if len(updates) < self.min_devices:
            raise MisconfigurationException(
                f"{len(updates)} devices take part in round {round.index}, fewer than the {self.min_devices} whose shares "
                "of the noise make the guarantee. Lower `min_devices` or raise the scheduler's rate; the weights were "
                "not changed."
            )
        rows = self.device_privacy.clip(updates)
        if std > 0:
            share = std / math.sqrt(self.min_devices)
            rows = rows + share * round.key.rows(
                "privacy/noise",
                lambda g: torch.randn(rows.shape[1], generator=g, dtype=rows.dtype, device=rows.device),
                on=rows.device,
            )
        received = self._per_device(rows, round)
        return received.rows.sum(0), received.cost, dict(received.metrics)

    def _per_device(self, updates: Tensor, round: Round) -> Received:
        received: Received = self.uplink(updates, round)
        if len(received.rows) != len(updates):
            raise MisconfigurationException(
                f"{type(self.uplink).__name__} delivers {len(received.rows)} rows of {len(updates)} devices, and DPFedAvg "
                "clips each. Use a digital uplink; over the air, DPOverTheAir."
            )
        return received

    @property
    @override
    def promises_privacy(self) -> bool:
        return True

    @override
    def privacy(self, *, rounds: int) -> PrivacyStatement:
        """The guarantee of the first ``rounds`` rounds."""
        trust = _SERVER
        if self.noise == "devices":
            trust = (
                f"Secure aggregation hides all but the sum, and at least {self.min_devices} participants of every round "
                "add their share of the noise."
            )
        drawn = "Which devices take part is drawn by independent coins that stay secret."
        mechanism = "Poisson-subsampled Gaussian" if self.device_privacy.sample_rate < 1 else "Gaussian"
        return self.device_privacy.statement(rounds, mechanism=mechanism, assumptions=(trust, drawn))

    @override
    def is_spent(self, planned: int | None) -> bool:
        """Whether a further round would exceed the budget."""
        return self.device_privacy.is_spent(planned)
