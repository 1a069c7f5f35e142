"""What every part of a round is told."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from groundwire.plugins.random import Key


@dataclass(frozen=True, eq=False, kw_only=True)
class Round:
    """One communication round.

    Args:
        index: Round number, from 0.
        num_rounds: Rounds of the whole run, or None if it has no planned end.
        key: Names the round's random draws; ``key.devices`` are the ids of the devices that take part, one a row.
        weights: Weight of each of those devices in the aggregate, shape ``(M,)``, summing to one.
        sample_rate: Probability with which every device of the population takes part, if each does by a coin of its
            own; None where devices are chosen in another way.
        losses: Loss of each of those devices at the model it received, on its data of the round (of the first local step,
            where there are several), shape ``(M,)``; None before local work.
        is_empty: Whether nobody takes part: the only row is of zeros, and is not sent.
    """

    index: int
    num_rounds: int | None
    key: Key
    weights: Tensor
    sample_rate: float | None = None
    losses: Tensor | None = None
    is_empty: bool = False

    @property
    def devices(self) -> tuple[int, ...]:
        """Ids of the devices that take part, in the order of the rows."""
        return self.key.devices

    def select(self, rows: list[int]) -> Round:
        """The round of some of its devices, by their rows; their weights add up to one again."""
        weights = self.weights[rows]
        key = Key(seed=self.key.seed, round=self.key.round, devices=tuple(self.devices[row] for row in rows))
        losses = None if self.losses is None else self.losses[rows]
        return replace(self, key=key, weights=weights / weights.sum(), losses=losses)
