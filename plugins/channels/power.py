"""How much energy a device spends in each round, under an average over the run.

"Power" here is the transmit **energy of one whole round** of one device, ``P_t = ||x_m(t)||^2``, in units of the noise
variance's scale: not the power per symbol. A budget of 500 over 3,925 symbols at noise variance 1 is -9 dB per symbol.
Use :func:`~groundwire.plugins.channels.functional.power_per_round` to come from a power per symbol.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

from typing_extensions import override


class PowerSchedule(ABC):
    """Energy of one device in each round; a subclass says it for one round.

    A schedule whose power changes is planned for ``num_rounds`` rounds and refuses later ones: going on would break
    the average it promised.
    """

    @abstractmethod
    def __call__(self, round: int, num_rounds: int) -> float:
        """Energy ``P_t`` of one device in ``round``, counted from 0, of a run of ``num_rounds`` rounds."""

    def __repr__(self) -> str:
        settings = ", ".join(f"{name.removeprefix('_')}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"

    def average(self, num_rounds: int) -> float:
        """Mean of the energy over a run of ``num_rounds`` rounds.

        Raises:
            ValueError: If ``num_rounds`` is below 1.
        """
        check_round(0, num_rounds)
        return math.fsum(self(round, num_rounds) for round in range(num_rounds)) / num_rounds

    def check_average(self, limit: float, num_rounds: int) -> None:
        """Refuse a schedule that spends more than ``limit`` on average (relative slack 1e-9 for rounding).

        Args:
            limit: Average energy of one round that the device may not exceed.
            num_rounds: Rounds of the run.

        Raises:
            ValueError: If the average is above the limit, or either argument is not positive.
        """
        check_power(limit)
        average = self.average(num_rounds)
        if average > limit * (1 + 1e-9):
            raise ValueError(
                f"power schedule averages {average} over {num_rounds} rounds, above the limit {limit}. "
                "Lower the schedule's powers or raise the limit (both are energies of one round, not per symbol)."
            )


class ConstantPower(PowerSchedule):
    """The same energy in every round, however many there are.

    Args:
        average: Energy of one round of one device, > 0.

    Raises:
        ValueError: If ``average`` is not positive and finite.

    Example:
        >>> ConstantPower(200.0)(7, num_rounds=300)
        200.0
    """

    def __init__(self, average: float) -> None:
        self._power = check_power(average)

    @override
    def __call__(self, round: int, num_rounds: int) -> float:
        if round < 0:
            raise ValueError(f"`round` counts from 0, got {round}.")
        return self._power


class LinearPower(PowerSchedule):
    """Energy that goes from ``low`` in the first round to ``high`` in the last, in equal increments.

    The average is ``(low + high) / 2`` for every number of rounds; a run of one round spends just that. The paper's
    stair "LH" with mean 200 over 300 rounds is ``LinearPower(100, 300)``.

    Args:
        low: Energy of the first round, > 0. It may be above ``high``: then the power falls.
        high: Energy of the last round, > 0.

    Raises:
        ValueError: If an energy is not positive and finite.

    Reference:
        Mohammadi Amiri, Gündüz, arXiv:1901.00844, experiments on power allocation.

    Example:
        >>> [LinearPower(100.0, 300.0)(t, num_rounds=3) for t in range(3)]
        [100.0, 200.0, 300.0]
    """

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = check_power(low), check_power(high)

    @override
    def __call__(self, round: int, num_rounds: int) -> float:
        check_round(round, num_rounds)
        if num_rounds == 1:
            return (self.low + self.high) / 2
        return self.low + (self.high - self.low) * (round / (num_rounds - 1))


class StepPower(PowerSchedule):
    """Energy levels held over equal blocks of rounds.

    Where the rounds do not divide evenly, blocks differ by one round and :meth:`average` tells the exact mean. The
    paper's "LH" and "HL" with mean 200 are ``StepPower([100, 200, 300])`` and ``StepPower([300, 200, 100])``.

    Args:
        levels: Energies of one round, > 0, in order; at most as many as there are rounds.

    Raises:
        ValueError: If there is no level, or one is not positive and finite.

    Reference:
        Mohammadi Amiri, Gündüz, arXiv:1901.00844, experiments on power allocation.

    Example:
        >>> [StepPower([100.0, 300.0])(t, num_rounds=4) for t in range(4)]
        [100.0, 100.0, 300.0, 300.0]
    """

    def __init__(self, levels: Sequence[float]) -> None:
        self.levels = tuple(check_power(level) for level in levels)
        if not self.levels:
            raise ValueError("`levels` needs at least one energy per round, got none.")

    @override
    def __call__(self, round: int, num_rounds: int) -> float:
        check_round(round, num_rounds)
        if num_rounds < len(self.levels):
            raise ValueError(
                f"`levels` has {len(self.levels)} energies, but the run has only {num_rounds} rounds; drop some levels."
            )
        return self.levels[round * len(self.levels) // num_rounds]


def check_power(power: float) -> float:
    """Return the energy of one round as a float, or refuse it.

    Raises:
        ValueError: If it is not positive and finite.
    """
    if not (power > 0 and math.isfinite(power)):
        raise ValueError(f"power_per_round must be > 0 and finite (energy of one round, not per symbol); got {power}.")
    return float(power)


def check_round(round: int, num_rounds: int) -> None:
    """Refuse a round that the schedule was not planned for.

    Raises:
        ValueError: If ``num_rounds < 1``, or ``round`` is outside ``[0, num_rounds)``.
    """
    if num_rounds < 1:
        raise ValueError(f"`num_rounds` must be at least 1, got {num_rounds}.")
    if not 0 <= round < num_rounds:
        raise ValueError(
            f"Round {round} is outside [0, {num_rounds}), the run that the power schedule was planned for; going on "
            "would break its average. Set the number of rounds to what will be trained, or use ConstantPower."
        )
