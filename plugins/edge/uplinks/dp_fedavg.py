"""DP-FedAvg: clipped updates, noise in their sum, a fixed divisor."""

from __future__ import annotations

import math
from typing import Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.compression import Identity, RandK
from groundwire.plugins.edge.round import Round
from groundwire.plugins.edge.uplinks.base import Received, Uplink
from groundwire.plugins.edge.uplinks.capacity_limited import CapacityLimited
from groundwire.plugins.edge.uplinks.device_privacy import DevicePrivacy
from groundwire.plugins.edge.uplinks.digital import Digital
from groundwire.plugins.edge.uplinks.error_free import ErrorFree
from groundwire.plugins.layout import ParameterLayout
from groundwire.plugins.ledger import Cost
from groundwire.plugins.privacy import Accounting, PrivacyStatement

_NEGLIGIBLE = 0.01  # part of delta
_SERVER = "The server is trusted: it sees the clipped updates, adds the noise, and publishes the sum alone."


class DPFedAvg(Uplink):
    """Protects all data of a device: what a device changes in the sum of updates is bounded, and hidden by noise.

    The server's estimate is ``(sum_m clip(U_m) + N(0, (noise_multiplier * clip_norm)^2 I)) / (rate * M)``: the divisor
    is the expected number of participants, and each device counts the same, whatever its number of samples. Devices
    have to take part by coins of their own (:class:`PoissonSample`) or all in every round.

    With ``noise="server"``, updates travel over ``uplink``, and are clipped when they have arrived, so that no compressor
    can make them longer. With ``noise="devices"``, each of the ``k`` participants clips its update and adds the share
    ``noise_multiplier * clip_norm / sqrt(k)`` before it is sent, and secure aggregation is assumed to hide all but the
    sum. Its noise then says nothing about ``k``. A round in which nobody takes part has no noise: refused, as are rates at
    which that is likely. Who knows who takes part, as a server of secure aggregation does, has less noise to see through:
    the statement has that epsilon, too.

    Every device's own training, and what it logs (the loss), is not private by itself.

    Args:
        clip_norm: Bound ``C`` on the L2 norm of a device's update.
        target_epsilon: Budget for the planned rounds.
        noise_multiplier: Noise over ``clip_norm`` instead, or as well; see :class:`DevicePrivacy`.
        target_delta: ``1 / (2 M^1.1)`` for ``M`` devices by default.
        noise: Who adds it.
        uplink: How updates travel; by default error-free. It must deliver each device's update by itself.
        accountant: As in :func:`groundwire.plugins.privacy.spent_epsilon`.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: Over :class:`CapacityLimited` or an uplink that superposes updates, or with
            ``noise="devices"`` over one that is not linear; with another scheduler; in a round that the budget does not
            pay for, or without participants if they are to add the noise.

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
        uplink: Uplink | None = None,
        accountant: Accounting = "prv",
    ) -> None:
        super().__init__()
        if noise not in ("server", "devices"):
            raise ValueError(f"`noise` must be 'server' or 'devices', got {noise!r}.")
        self.device_privacy = DevicePrivacy(clip_norm, target_epsilon, noise_multiplier, target_delta, accountant)
        self.noise = noise
        self.uplink = uplink or ErrorFree()
        self._refuse_what_clipping_does_not_bound()
        self._num_devices = 0

    def _refuse_what_clipping_does_not_bound(self) -> None:
        if isinstance(self.uplink, CapacityLimited):
            raise MisconfigurationException(
                "CapacityLimited divides its capacity among the participants, so a device changes what the others send, "
                "and clipping does not bound that. Use Digital(compressor)."
            )
        if self.noise == "server" or isinstance(self.uplink, ErrorFree):
            return
        if not (isinstance(self.uplink, Digital) and isinstance(self.uplink.compressor, Identity | RandK)):
            raise MisconfigurationException(
                f"With noise='devices', only the sum of the noisy updates is protected, and what arrives over {self.uplink!r} is "
                "no function of it. Use uplink=ErrorFree() or Digital(RandK(...)), which is linear; noise='server'; or "
                "EdgeStrategy(uplink=Digital(DistributedDiscreteGaussian(...))), whose integers add."
            )

    @override
    def setup(self, *, layout: ParameterLayout, num_devices: int, seed: int) -> None:
        self._num_devices = num_devices
        self.device_privacy.setup(num_devices)
        self.uplink.setup(layout=layout, num_devices=num_devices, seed=seed)

    @override
    def forward(self, updates: Tensor, round: Round) -> Received:
        privacy = self.device_privacy
        std = privacy.begin_round(round) * privacy.clip_norm
        if self.noise == "devices" and std > 0:
            self._refuse_empty_rounds(round)
        total, cost, metrics = updates.new_zeros(updates.shape[1]), Cost(), dict[str, Tensor | float]()
        if self.noise == "devices":
            total, cost, metrics = self._with_shares(updates, round, std)
        else:
            if not round.is_empty:  # nor does any device send what it remembers
                received = self._per_device(updates, round)
                total = privacy.clip(received.rows).sum(0)
                cost, metrics = received.cost, dict(received.metrics)
            if std > 0:
                generator = round.key.shared("privacy/noise", on=total.device)
                total += std * torch.randn(total.shape, generator=generator, dtype=total.dtype, device=total.device)
        privacy.end_round()
        estimate = total / (privacy.sample_rate * self._num_devices)
        one = torch.ones(1, dtype=round.weights.dtype, device=updates.device)
        return Received(rows=estimate.unsqueeze(0), weights=one, cost=cost, metrics=metrics)

    def _refuse_empty_rounds(self, round: Round) -> None:
        """A round in which nobody adds noise tells that a device is not in it, which delta has to cover."""
        rate = self.device_privacy.sample_rate
        chance = (round.num_rounds or 1) * rate * (1 - rate) ** (self._num_devices - 1) if rate < 1 else 0.0
        if chance > _NEGLIGIBLE * self.device_privacy.delta:
            raise MisconfigurationException(
                f"With {self._num_devices} devices at sample rate {rate:.4g}, a round in which nobody takes part and adds "
                f"noise has chance {chance:.2g} to give a device away, not negligible beside delta "
                f"{self.device_privacy.delta:.2g}. Raise the rate, or use noise='server'."
            )

    def _with_shares(self, updates: Tensor, round: Round, std: float) -> tuple[Tensor, Cost, dict[str, Tensor | float]]:
        if round.is_empty:
            raise MisconfigurationException(
                f"No device takes part in round {round.index}, so there is nobody to add the noise. Raise the scheduler's "
                "rate, or use noise='server'; the weights were not changed."
            )
        rows = self.device_privacy.clip(updates)
        if std > 0:
            share = std / math.sqrt(len(updates))
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
        privacy = self.device_privacy
        trust = [_SERVER]
        if self.noise == "devices":
            trust = [
                (
                    "Secure aggregation hides all but the sum, and all participants add their share of the noise; a fraction "
                    "f of them who do not lowers its variance to the part 1 - f."
                )
            ]
            if privacy.sample_rate < 1:
                trust.append(
                    f"Against a server that sees who takes part, epsilon is {privacy.epsilon(rounds, 1.0):.4g}."
                )
        return privacy.statement(rounds, mechanism="Gaussian", assumptions=tuple(trust))

    @override
    def is_spent(self, planned: int | None) -> bool:
        """Whether a further round would exceed the budget."""
        return self.device_privacy.is_spent(planned)
