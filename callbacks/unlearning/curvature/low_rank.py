"""The leading eigenpairs of the Gauss-Newton matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from groundwire.callbacks.unlearning.curvature.base import Curvature, Removal
from groundwire.callbacks.unlearning.curvature.solve import NewtonStep, SingularCurvatureError, solve_without
from groundwire.plugins.layout import ParameterLayout
from groundwire.plugins.random import stream

EXTRA_COLUMNS = 10  # of the random start, beyond the rank


class LowRankCurvature(Curvature):
    """The leading eigenpairs, by randomised subspace iteration, and the mean of the other eigenvalues.

    The forget set's columns are projected to the eigenvectors before they are removed. Three passes over the data, and
    ``rank + 10`` vectors of the parameters' size in memory.

    Args:
        layout: The parameters.
        rank: Eigenpairs kept, at most the number of parameters.
        seed: Of the random start.

    Raises:
        ValueError: If ``rank`` is out of range.

    Reference:
        Halko, Martinsson, Tropp, "Finding Structure with Randomness", SIAM Review 2011, Algorithm 4.4. arXiv:0909.4061
    """

    kind = "lowrank"
    num_passes = 3

    def __init__(self, layout: ParameterLayout, rank: int = 200, seed: int = 0) -> None:
        if not 1 <= rank <= layout.numel:
            raise ValueError(f"`rank` must be in [1, {layout.numel}] for as many parameters, got {rank}.")
        self.rank = rank
        columns = min(rank + EXTRA_COLUMNS, layout.numel)
        start = torch.randn(
            layout.numel, columns, generator=stream(seed, purpose="unlearning/subspace"), dtype=layout.dtype
        )
        self.basis = torch.linalg.qr(start).Q
        self.values = torch.zeros(0)
        self.trace = 0.0
        self._sum: Tensor | None = None

    @override
    def observe(self, rows: Tensor, number: int) -> None:
        self.basis = self.basis.to(rows)
        inside = rows @ self.basis
        last = number == self.num_passes - 1
        if last:
            self.trace += float(rows.square().sum(dtype=torch.float64))
        found = inside.T @ inside if last else rows.T @ inside
        self._sum = found if self._sum is None else self._sum.add_(found)

    @override
    def end_pass(self, number: int) -> None:
        assert self._sum is not None
        if number < self.num_passes - 1:
            self.basis = torch.linalg.qr(self._sum).Q
        else:
            values, vectors = torch.linalg.eigh(self._sum.double())
            kept = slice(len(values) - self.rank, None)
            self.values = values[kept].clamp_min(0)
            self.basis = self.basis @ vectors[:, kept].to(self.basis)
        self._sum = None

    def _tail(self, removal: Removal | None = None) -> float:
        """Mean of the eigenvalues that are not kept, perhaps without what is removed."""
        others = self.basis.shape[0] - len(self.values)
        if not others:
            return 0.0
        left: float = self.trace - float(self.values.sum())
        if removal is not None:
            left -= removal.trace - removal.part.square().sum().item()
        mean: float = max(0.0, left) / others
        return mean

    @override
    def _reduced(self, rows: Tensor) -> Tensor:
        inside: Tensor = (rows @ self.basis.to(rows)).double()
        return inside

    @override
    def newton_step(self, removal: Removal, rhs: Tensor, ridge: Tensor, *, clip: float | None) -> NewtonStep:
        basis = self.basis.to(rhs.device).double()
        ridge, rhs = ridge.double(), rhs.double()
        system = torch.diag(self.values.to(rhs.device)) + basis.T @ (ridge.unsqueeze(1) * basis)
        inside = basis.T @ rhs
        step = solve_without(system, removal.part, inside, clip=clip)
        delta = basis @ step.delta
        if basis.shape[1] < basis.shape[0]:
            elsewhere = ridge + self._tail(removal)
            if not bool((elsewhere > 0).all()):
                raise SingularCurvatureError(
                    "Outside of the leading eigenvectors there is neither curvature nor damping: raise `damping` (tau), or "
                    "the `rank` of the recorded curvature."
                )
            delta = delta + (rhs - basis @ inside) / elsewhere
        return NewtonStep(delta=delta, max_leverage=step.max_leverage, num_high=step.num_high)

    @override
    def remove(self, removal: Removal) -> None:
        inside = removal.part
        values, vectors = torch.linalg.eigh(torch.diag(self.values.to(inside.device)) - inside.T @ inside)
        self.trace -= removal.trace
        self.values = values.clamp_min(0)
        self.basis = self.basis.to(inside.device) @ vectors.to(self.basis.dtype)

    @override
    def apply(self, vector: Tensor) -> Tensor:
        basis, vector = self.basis.to(vector.device).double(), vector.double()
        inside = basis.T @ vector
        tail = self._tail()
        result: Tensor = basis @ (self.values.to(vector.device) * inside) + tail * (vector - basis @ inside)
        return result

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"basis": self.basis.cpu(), "values": self.values.cpu(), "trace": self.trace, "rank": self.rank}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.basis, self.values = state["basis"], state["values"]
        self.trace, self.rank = state["trace"], state["rank"]
