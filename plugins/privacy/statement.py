"""What a private mechanism promises, in words and numbers that travel together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class PrivacyStatement:
    """An (epsilon, delta) guarantee with all that it depends on.

    Args:
        mechanism: What gives the guarantee, for example ``"Poisson-subsampled Gaussian"``.
        unit: Whose data is protected, for example ``"one record"`` or ``"one device's update"``.
        adjacency: Whether neighbouring data sets differ by one unit more or less, by another value of one, or by zeros in
            the place of what one sends (its noise stays).
        epsilon: Of the whole run, in nats.
        delta: Of the whole run, in [0, 1).
        assumptions: Without which the guarantee does not hold, each a sentence.

    Raises:
        ValueError: If ``epsilon`` or ``delta`` is out of range.

    Example:
        >>> print(PrivacyStatement(
        ...     mechanism="Gaussian", unit="one record", adjacency="add-remove", epsilon=3.0, delta=1e-5,
        ...     assumptions=("The server keeps the noise secret.",),
        ... ))
        (3, 1e-05)-DP for one record (add-remove), by the Gaussian mechanism. The server keeps the noise secret.
    """

    mechanism: str
    unit: str
    adjacency: Literal["add-remove", "replace-one", "zero-out"]
    epsilon: float
    delta: float
    assumptions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.epsilon >= 0:
            raise ValueError(f"`epsilon` must be at least 0, got {self.epsilon}.")
        if not 0 <= self.delta < 1:
            raise ValueError(f"`delta` must be in [0, 1), got {self.delta}.")

    def __str__(self) -> str:
        what = f"({_rounded_up(self.epsilon)}, {_rounded_up(self.delta)})-DP for {self.unit} ({self.adjacency}), by the {self.mechanism}"
        return " ".join([f"{what} mechanism.", *self.assumptions])


def _rounded_up(value: float) -> str:
    """Four significant digits that do not promise more than is known."""
    if value in (0, math.inf):
        return f"{value:.4g}"
    step = 10.0 ** (math.floor(math.log10(value)) - 3)
    shown = f"{value:.4g}"
    return shown if float(shown) >= value else f"{float(shown) + step:.4g}"
