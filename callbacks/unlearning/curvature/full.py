"""The Gauss-Newton matrix itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from groundwire.callbacks.unlearning.curvature.base import Curvature, Removal
from groundwire.callbacks.unlearning.curvature.solve import NewtonStep, solve_without
from groundwire.plugins.layout import ParameterLayout

MOST_FULL = 10_000  # parameters: 800 MB in float64


class FullCurvature(Curvature):
    """The matrix itself, in float64: exact, for up to 10,000 parameters.

    Args:
        layout: The parameters.

    Raises:
        ValueError: If there are more.
    """

    kind = "full"

    def __init__(self, layout: ParameterLayout) -> None:
        size = layout.numel
        check_size(size)
        self.matrix = torch.zeros(size, size, dtype=torch.float64)

    @override
    def observe(self, rows: Tensor, number: int) -> None:
        self.matrix = self.matrix.to(rows.device)
        rows = rows.double()
        self.matrix.addmm_(rows.T, rows)

    @override
    def _reduced(self, rows: Tensor) -> Tensor:
        return rows.double()

    @override
    def newton_step(self, removal: Removal, rhs: Tensor, ridge: Tensor, *, clip: float | None) -> NewtonStep:
        system = self.matrix.to(rhs.device) + torch.diag(ridge.double())
        return solve_without(system, removal.part, rhs.double(), clip=clip)

    @override
    def remove(self, removal: Removal) -> None:
        rows = removal.part
        self.matrix = self.matrix.to(rows.device).addmm(rows.T, rows, alpha=-1)

    @override
    def apply(self, vector: Tensor) -> Tensor:
        return self.matrix.to(vector.device) @ vector.double()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"matrix": self.matrix.cpu()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.matrix = state["matrix"]


def check_size(numel: int) -> None:
    """Refuse more parameters than a full matrix can be kept of.

    Args:
        numel: Parameters.

    Raises:
        ValueError: If there are too many.
    """
    if numel > MOST_FULL:
        raise ValueError(
            f"A full matrix for {numel:,} parameters takes {8 * numel**2 / 2**30:.1f} GiB and {numel**3 / 3e12:.1f} "
            f"TFLOP a step; the most is {MOST_FULL:,}. Use kind='ekfac' or kind='lowrank'."
        )
