"""Representations of the generalised Gauss-Newton matrix from which records can be removed again.

All are sums over records of outer products of the same columns (``Records.columns``). What is removed goes out of the same
representation into which it came: an exact removal from an approximate sum makes the remainder indefinite, and the
step explodes. A diagonal, and the empirical Fisher matrix, are left out on purpose: unlearning with them is worse than
not to unlearn.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from groundwire.callbacks.unlearning.curvature.solve import NewtonStep


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What some records take out of a curvature, in its own representation.

    Args:
        part: Their columns, whole or projected, or their diagonal.
        trace: The sum of the squares of their columns.
    """

    part: Tensor
    trace: float


class Curvature(ABC):
    """A sum of outer products of columns, in some representation.

    Attributes:
        kind: Its name in checkpoints.
        num_passes: How often the training data has to be gone through.
    """

    kind: ClassVar[str]
    num_passes: int = 1

    @abstractmethod
    def observe(self, rows: Tensor, number: int) -> None:
        """Add columns, given as rows ``(r, p)``, in pass ``number``."""

    def end_pass(self, number: int) -> None:  # noqa: B027  nothing to do for some
        """All records have been observed once more."""

    def has_enough(self, number: int) -> bool:
        """Whether pass ``number`` needs no more columns."""
        return False

    def removal(self, chunks: Iterable[Tensor]) -> Removal:
        """What columns, given as rows ``(r, p)`` in chunks, would take out."""
        parts, trace = [], 0.0
        for rows in chunks:
            parts.append(self._reduced(rows))
            trace += float(rows.square().sum(dtype=torch.float64))
        if not parts:
            raise ValueError("There is no record to remove.")
        return Removal(part=self._joined(parts), trace=trace)

    @abstractmethod
    def _reduced(self, rows: Tensor) -> Tensor:
        """Columns in this representation."""

    def _joined(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts)

    @abstractmethod
    def newton_step(self, removal: Removal, rhs: Tensor, ridge: Tensor, *, clip: float | None) -> NewtonStep:
        """Solve ``(H - U^T U + diag(ridge)) delta = rhs``.

        Args:
            removal: ``U``, the forget set's columns.
            rhs: Shape ``(p,)``.
            ridge: Shape ``(p,)``, positive.
            clip: As in :func:`solve_without`.

        Returns:
            The step.

        Raises:
            SingularCurvatureError: If the system is not positive definite.
        """

    @abstractmethod
    def remove(self, removal: Removal) -> None:
        """Take columns out again: afterwards it is the sum over the records that remain."""

    @abstractmethod
    def apply(self, vector: Tensor) -> Tensor:
        """``H v``, shape ``(p,)``."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
