"""Device-level privacy over the air, where the receiver's own noise hides the devices."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.channels import ConstantPower, GaussianMAC, PowerSchedule
from groundwire.plugins.edge.round import Round
from groundwire.plugins.edge.uplinks.base import Received, Uplink
from groundwire.plugins.edge.uplinks.device_privacy import DevicePrivacy
from groundwire.plugins.edge.uplinks.resources import PowerBudget
from groundwire.plugins.layout import ParameterLayout
from groundwire.plugins.ledger import Cost
from groundwire.plugins.privacy import Accounting, PrivacyStatement


class DPOverTheAir(Uplink):
    """Uncoded over-the-air aggregation whose channel noise is the noise of the Gaussian mechanism.

    Each device clips its update to ``clip_norm`` and sends ``a U_m`` over ``d`` real channel uses, all at once. The
    server hears ``y = a sum_m U_m + z`` with ``z ~ N(0, noise_var I)`` and estimates ``y / (a rate M)``. A device moves
    ``y`` by at most ``a clip_norm`` in the L2 norm, so one round is the Gaussian mechanism with noise multiplier
    ``sqrt(noise_var) / (a clip_norm)``, and a run its composition, amplified by the devices' coins: what
    :func:`~groundwire.plugins.privacy.spent_epsilon` counts. All devices use the amplitude
    ``a = min(sqrt(power), sqrt(noise_var) / noise_multiplier) / clip_norm``: up to the power at which the channel alone
    is noisy enough, privacy is free; above it, devices lower their power. More noise in the air than was asked for is
    accounted for as it is, if the power is constant.

    The theorem is that of the Poisson-subsampled Gaussian mechanism (Mironov et al. 2019). It assumes that the server
    learns nothing but ``y``; that ``noise_var`` is a lower bound on the variance of Gaussian noise that is fresh in every
    channel use and round, and that nobody can lower; that amplitudes are the same for all and do not depend on data; and
    that nobody else hears better.

    Args:
        clip_norm: Bound ``C`` on the L2 norm of a device's update.
        target_epsilon: Budget for the planned rounds.
        noise_multiplier: Least noise over ``clip_norm`` instead, or as well; see :class:`DevicePrivacy`. 0 asks for no
            more than what the channel adds at full power.
        target_delta: ``1 / (2 M^1.1)`` for ``M`` devices by default.
        power: Energy that a device may spend in one round (not per symbol), or a schedule of it.
        channel: The channel; its ``noise_var`` is per real channel use.
        average_power: If given, the schedule's average over the run may not exceed it.
        accountant: As in :func:`groundwire.plugins.privacy.spent_epsilon`.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: With another scheduler, or in a round that the budget does not pay for.

    Reference:
        Liu, Simeone, "Privacy for Free: Wireless Federated Learning via Uncoded Transmission with Adaptive Power
        Control", IEEE J. Sel. Areas Commun. 39, 2021. arXiv:2006.05459
        Seif, Tandon, Li, "Wireless Federated Learning with Local Differential Privacy", ISIT 2020. arXiv:2002.05151
        Mironov, Talwar, Zhang, "Renyi Differential Privacy of the Sampled Gaussian Mechanism", 2019. arXiv:1908.10530

    Example:
        >>> uplink = DPOverTheAir(clip_norm=1.0, target_epsilon=8.0, power=500.0)
    """

    superposes = True

    def __init__(
        self,
        clip_norm: float,
        target_epsilon: float | None = None,
        noise_multiplier: float | None = None,
        target_delta: float | None = None,
        power: float | PowerSchedule = 500.0,
        channel: GaussianMAC | None = None,
        average_power: float | None = None,
        accountant: Accounting = "prv",
    ) -> None:
        super().__init__()
        self.channel = channel or GaussianMAC()
        if self.channel.noise_var == 0:
            raise ValueError(
                "`channel` has noise_var 0, so nothing hides the devices. Give the receiver's noise, or use DPFedAvg, where "
                "the server or the devices add noise."
            )
        self.power = PowerBudget(power, average_power)
        self.device_privacy = DevicePrivacy(clip_norm, target_epsilon, noise_multiplier, target_delta, accountant)
        self._num_devices = 0

    @override
    def setup(self, *, layout: ParameterLayout, num_devices: int, seed: int) -> None:
        self._num_devices = num_devices
        always = self.power.schedule
        self.device_privacy.setup(
            num_devices,
            least_noise=math.sqrt(self.channel.noise_var / always(0, 1)) if isinstance(always, ConstantPower) else 0.0,
        )

    @override
    def forward(self, updates: Tensor, round: Round) -> Received:
        privacy, power = self.device_privacy, self.power.of(round)
        noise = privacy.begin_round(round)
        lowered = min(math.sqrt(power), math.sqrt(self.channel.noise_var) / noise if noise > 0 else math.inf)
        amplitude = lowered / privacy.clip_norm
        heard = self.channel(amplitude * privacy.clip(updates), round.key)
        privacy.end_round()
        estimate = heard.symbols / (amplitude * privacy.sample_rate * self._num_devices)
        one = torch.ones(1, dtype=round.weights.dtype, device=updates.device)
        return Received(
            rows=estimate.unsqueeze(0),
            weights=one,
            cost=Cost(channel_uses=heard.channel_uses, energy=heard.energy),
            metrics={"uplink/amplitude": amplitude},
        )

    @property
    @override
    def promises_privacy(self) -> bool:
        return True

    @override
    def privacy(self, *, rounds: int) -> PrivacyStatement:
        """The guarantee of the first ``rounds`` rounds."""
        air = (
            f"Noise of variance {self.channel.noise_var:.4g} a real channel use, Gaussian, fresh and not to be lowered, "
            "is all that anybody hears besides the devices' sum."
        )
        return self.device_privacy.statement(
            rounds,
            mechanism="Gaussian (the receiver's noise)",
            assumptions=(air,),
        )

    @override
    def is_spent(self, planned: int | None) -> bool:
        return self.device_privacy.is_spent(planned)
