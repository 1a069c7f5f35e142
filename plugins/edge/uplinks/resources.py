"""What an uplink may spend: channel uses a round, and energy a round under an average."""

from __future__ import annotations

from groundwire.plugins.channels import ConstantPower, PowerSchedule
from groundwire.plugins.edge.round import Round


class PowerBudget:
    """Energy of one device in each round, held to an average over the run.

    Args:
        power: Energy of one device in one round (not per symbol), or a schedule of it.
        average: If given, what the schedule may average at most; then the run must have a planned end.

    Raises:
        ValueError: If ``power`` is not positive.
    """

    def __init__(self, power: float | PowerSchedule, average: float | None = None) -> None:
        self.schedule = power if isinstance(power, PowerSchedule) else ConstantPower(power)
        self.average = average
        self._checked_for: int | None = None

    def of(self, round: Round) -> float:
        """Energy that each device spends in ``round``.

        Args:
            round: The round.

        Returns:
            The energy.

        Raises:
            ValueError: If the schedule exceeds the average over the planned rounds, or needs their number and there is
                none.
        """
        rounds = round.num_rounds
        if rounds is None and (self.average is not None or not isinstance(self.schedule, ConstantPower)):
            raise ValueError(
                f"{self!r} needs a planned number of rounds: set the Trainer's `max_steps`, or `max_epochs` with a "
                "loader that has a length."
            )
        if self.average is not None and rounds is not None and rounds != self._checked_for:
            self.schedule.check_average(self.average, rounds)
            self._checked_for = rounds
        return self.schedule(round.index, rounds or 0)

    def __repr__(self) -> str:
        return f"{self.schedule!r}" + (f" averaging at most {self.average}" if self.average is not None else "")


def resolve_channel_uses(numel: int, *, bandwidth: float | None, channel_uses: int | None, least: int) -> int:
    """Channel uses ``s`` of one round, from a fraction of the model size or as they are.

    Args:
        numel: Model size ``d``.
        bandwidth: ``s / d``, in (0, 1]; rounded down.
        channel_uses: ``s`` itself; exactly one of the two must be given.
        least: The fewest that the scheme can work with.

    Returns:
        ``s``, with ``least <= s <= d``.

    Raises:
        ValueError: If not exactly one is given, or ``s`` is out of range.
    """
    if (bandwidth is None) == (channel_uses is None):
        raise ValueError(
            f"Give either `bandwidth` (channel uses per parameter) or `channel_uses`, got {bandwidth=}, {channel_uses=}."
        )
    if bandwidth is not None and not 0 < bandwidth <= 1:
        raise ValueError(f"`bandwidth` is channel uses per parameter and must be in (0, 1], got {bandwidth}.")
    uses = int(bandwidth * numel) if bandwidth is not None else channel_uses
    assert uses is not None  # exactly one was given
    if not least <= uses <= numel:
        given = f"bandwidth={bandwidth} of {numel} parameters is" if bandwidth is not None else "`channel_uses` is"
        raise ValueError(
            f"{given} {uses} channel uses a round, but this scheme needs {least} <= s <= {numel} "
            f"(the model has {numel} parameters)."
        )
    return uses


def entries_to_recover(uses: int, *, sparsity: float | None, num_entries: int | None) -> int:
    """Entries ``k`` that a device keeps of what is recovered from ``uses`` measurements.

    Args:
        uses: Channel uses ``s``.
        sparsity: ``k / s``; rounded down.
        num_entries: ``k`` itself, where ``sparsity`` is None.

    Returns:
        ``k``, with ``1 <= k < s``.

    Raises:
        ValueError: If it is out of range.
    """
    k = int(sparsity * uses) if sparsity is not None else num_entries
    assert k is not None  # one of the two is given
    if not 1 <= k < uses:
        raise ValueError(
            f"A device keeps k={k} entries for s={uses} real channel uses, but needs 1 <= k < s: sparse recovery cannot "
            "find more entries than it has measurements. Lower `sparsity` or `num_entries`, or raise the bandwidth."
        )
    return k
