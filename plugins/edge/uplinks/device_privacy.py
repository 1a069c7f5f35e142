"""What all uplinks share that protect whole devices: clipping, the choice of the noise, and the accountant."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from groundwire.plugins.edge.part import Part
from groundwire.plugins.edge.round import Round
from groundwire.plugins.privacy import Accounting, PrivacyStatement, noise_multiplier_for, spent_epsilon, steps_within
from groundwire.plugins.privacy.accounting import check_accounting, check_budget, warn_of_delta, warn_of_gdp


class DevicePrivacy(Part):
    """A budget for the data of one device, and what the rounds have used of it.

    Args:
        clip_norm: Bound ``C`` on the L2 norm of what a device adds to the sum.
        target_epsilon: Budget; the noise is chosen so that the planned rounds spend it.
        noise_multiplier: Standard deviation of the noise in the sum over ``clip_norm``; with ``target_epsilon`` too,
            training stops before the budget is exceeded.
        target_delta: Probability with which the guarantee may fail; ``1 / (2 M^1.1)`` for ``M`` devices by default.
        accountant: As in :func:`groundwire.plugins.privacy.spent_epsilon`.

    Raises:
        ValueError: If an argument is out of range, or neither budget nor noise is given.
    """

    def __init__(
        self,
        clip_norm: float,
        target_epsilon: float | None = None,
        noise_multiplier: float | None = None,
        target_delta: float | None = None,
        accountant: Accounting = "prv",
    ) -> None:
        super().__init__()
        if not (clip_norm > 0 and math.isfinite(clip_norm)):
            raise ValueError(f"`clip_norm` must be a positive number, got {clip_norm}.")
        check_budget(target_epsilon, noise_multiplier, target_delta)
        check_accounting(accountant)
        self.clip_norm = clip_norm
        self.target_epsilon = target_epsilon
        self.noise_multiplier = noise_multiplier
        self.target_delta = target_delta
        self.accountant = accountant
        self._num_devices = 0
        self._least_noise = 0.0
        self._sample_rate: float | None = None
        self._chosen_noise: float | None = None
        self._rounds = 0
        self._affordable: int | None = None

    def setup(self, num_devices: int, least_noise: float = 0.0) -> None:
        """Get ready for a population; round 0 forgets what was before.

        Args:
            num_devices: Devices ``M`` of the population.
            least_noise: Noise multiplier that is there in any case.
        """
        warn_of_gdp(self.accountant)
        self._num_devices, self._least_noise, self._affordable = num_devices, least_noise, None
        warn_of_delta(self.delta, num_devices, "devices")

    def clip(self, rows: Tensor) -> Tensor:
        """Rows ``(M, d)`` scaled down to norm ``clip_norm`` where they are longer; a row that is not finite becomes 0."""
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        excess = torch.where(norms > self.clip_norm, norms / self.clip_norm, 1.0)
        clipped = rows / excess.to(rows.dtype).unsqueeze(1)  # its inverse may be subnormal, and then imprecise
        broken = ~torch.isfinite(norms)
        return clipped.masked_fill(broken.unsqueeze(1), 0) if bool(broken.any()) else clipped

    def begin_round(self, round: Round) -> float:
        """Check that the round is as accounted for.

        Args:
            round: The round.

        Returns:
            The noise multiplier of its sum.

        Raises:
            MisconfigurationException: If devices are not drawn by coins of their own, the run has no planned end, or
                the budget does not pay for the round.
        """
        if round.index == 0:  # a new run; a second fit of the same Trainer goes on with the account of the first
            self._rounds = 0
            self._sample_rate = self._chosen_noise = self._affordable = None
        rate = round.sample_rate
        if rate is None:
            raise MisconfigurationException(
                "Device-level privacy is accounted for devices that take part by coins of their own. Use "
                "scheduler=PoissonSample(rate) or AllDevices(), with data that has all devices in every round "
                "(Federated(devices_per_round=None))."
            )
        if self._sample_rate is not None and rate != self._sample_rate:
            raise MisconfigurationException(
                f"The devices' sample rate was {self._sample_rate} and is now {rate}, which is not accounted for."
            )
        self._sample_rate = rate
        if self._chosen_noise is None:
            self._choose(round, rate)
        assert self._chosen_noise is not None
        if self.is_spent(round.num_rounds):
            self._refuse_to_exceed(self._chosen_noise, rate)
        return self._chosen_noise

    def _refuse_to_exceed(self, noise: float, rate: float) -> None:
        """Stop what the Trainer does not: ``min_steps``, a first round that is too dear, a spent run that goes on."""
        assert self.target_epsilon is not None
        epsilon = spent_epsilon(noise, rate, self._rounds + 1, self.delta, self.accountant)
        if epsilon > self.target_epsilon:
            raise MisconfigurationException(
                f"`target_epsilon` {self.target_epsilon} pays for {self._rounds} rounds at noise multiplier {noise:.4g} and "
                f"sample rate {rate:.4g}; a further one makes it {epsilon:.4g}, and was not made. Give more noise, raise "
                "the budget, or leave out the Trainer's min_steps and min_epochs."
            )

    def _choose(self, round: Round, rate: float) -> None:
        noise = self.noise_multiplier
        if noise is None:
            assert self.target_epsilon is not None
            if round.num_rounds is None:
                raise MisconfigurationException(
                    "The noise for `target_epsilon` depends on the number of rounds: set the Trainer's max_steps or "
                    "max_epochs, or give `noise_multiplier`."
                )
            noise = noise_multiplier_for(self.target_epsilon, rate, round.num_rounds, self.delta, self.accountant)
        noise = max(noise, self._least_noise)
        self._chosen_noise = noise
        rank_zero_info(
            f"Device-level privacy: noise multiplier {noise:.4g}, {self._num_devices} devices at sample rate {rate:.4g}, "
            f"clipping norm {self.clip_norm:.4g}, delta {self.delta:.3g}"
        )

    @property
    def delta(self) -> float:
        """Delta of the guarantee."""
        return self.target_delta if self.target_delta is not None else self._num_devices**-1.1 / 2

    @property
    def sample_rate(self) -> float:
        """Probability with which a device takes part in a round."""
        return 1.0 if self._sample_rate is None else self._sample_rate

    def end_round(self) -> None:
        """Account for a round."""
        self._rounds += 1

    def is_spent(self, planned: int | None) -> bool:
        """Whether a further round would exceed the budget."""
        if self.target_epsilon is None or self._chosen_noise is None:
            return False
        if self._affordable is None:
            limit = planned if planned is not None else 10**6
            self._affordable = steps_within(
                self.target_epsilon, self._chosen_noise, self.sample_rate, self.delta, limit, self.accountant
            )
        return self._rounds >= self._affordable

    def epsilon(self, rounds: int, sample_rate: float) -> float:
        """Of so many rounds, for those to whom devices seem to take part at that rate."""
        noise = self._chosen_noise if self._chosen_noise is not None else self.noise_multiplier
        return math.inf if noise is None else spent_epsilon(noise, sample_rate, rounds, self.delta, self.accountant)

    def statement(self, rounds: int, *, mechanism: str, assumptions: tuple[str, ...]) -> PrivacyStatement:
        """The guarantee of the first ``rounds`` rounds.

        Args:
            rounds: How many.
            mechanism: What gives it.
            assumptions: Without which it does not hold.

        Returns:
            The statement.
        """
        if self.sample_rate < 1:
            mechanism = f"Poisson-subsampled {mechanism}"
            assumptions = (*assumptions, "Which devices take part is drawn by independent coins that stay secret.")
        if self.accountant == "gdp":
            assumptions = (*assumptions, "The GDP accountant approximates; epsilon may be larger.")
        return PrivacyStatement(
            mechanism=mechanism,
            unit="all data of one device",
            adjacency="add-remove",
            epsilon=self.epsilon(rounds, self.sample_rate),
            delta=self.delta,
            assumptions=assumptions,
        )

    def get_extra_state(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        return {"rounds": self._rounds, "noise_multiplier": self._chosen_noise, "sample_rate": self._sample_rate}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on from another run's state."""
        self._rounds = state["rounds"]
        self._chosen_noise = state["noise_multiplier"]
        self._sample_rate = state["sample_rate"]
