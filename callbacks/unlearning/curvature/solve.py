"""The damped system without some records' curvature, solved by the Woodbury identity."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

SINGULAR = 1e-6  # distance of a leverage from 1 at which the system counts as singular


class SingularCurvatureError(MisconfigurationException):
    """Removing the forget set's curvature leaves a singular or indefinite system."""


@dataclass(frozen=True, kw_only=True)
class NewtonStep:
    """A solution of the damped system without the forget set's curvature.

    Args:
        delta: Shape ``(p,)``.
        max_leverage: The largest generalised leverage of the forget set: its share of the curvature in the direction in
            which that is largest. Below 1 where the forget set's curvature is part of the whole.
        num_high: Directions of a leverage of at least 0.95.
    """

    delta: Tensor
    max_leverage: float
    num_high: int


def solve_without(system: Tensor, rows: Tensor, rhs: Tensor, *, clip: float | None = None) -> NewtonStep:
    """``(B - U^T U)^{-1} b`` by the Woodbury identity, in the metric of ``B``.

    With ``B = L L^T`` and ``W = L^{-1} U^T``, the eigenvalues of ``W^T W`` are the generalised leverages of the rows; the
    identity needs the smaller one of ``W^T W`` and ``W W^T`` alone.

    Args:
        system: ``B``, symmetric and positive definite, shape ``(k, k)``.
        rows: ``U``, the columns to be removed, as rows: shape ``(s, k)``.
        rhs: ``b``, shape ``(k,)``.
        clip: Leverages above this are lowered to it; None to leave them.

    Returns:
        The solution and the leverages.

    Raises:
        SingularCurvatureError: If ``B`` is not positive definite, or a leverage is at least 1.
        RuntimeError: If something is not finite.

    Example:
        >>> step = solve_without(2 * torch.eye(2), torch.tensor([[1.0, 0.0]]), torch.tensor([1.0, 1.0]))
        >>> step.delta, round(step.max_leverage, 6)
        (tensor([1.0000, 0.5000]), 0.5)
    """
    refuse_nonfinite(system, rows, rhs)
    factor, info = torch.linalg.cholesky_ex(system)
    if int(info):
        raise SingularCurvatureError(
            "The curvature is not positive definite even with its damping: raise `damping` (tau)"
            f"{_enough_damping(system, rows)}."
        )
    whitened = torch.linalg.solve_triangular(factor, rows.T, upper=False)
    b = torch.linalg.solve_triangular(factor, rhs.unsqueeze(1), upper=False).squeeze(1)
    tall = whitened.shape[1] < whitened.shape[0]
    leverages, vectors = torch.linalg.eigh(whitened.T @ whitened if tall else whitened @ whitened.T)
    top = float(leverages[-1]) if len(leverages) else 0.0
    high = int((leverages >= 0.95).sum())
    if clip is None and top > 1 - SINGULAR:
        raise SingularCurvatureError(
            f"The forget set has leverage {top:.6g} on the curvature, at least 0.95 in {high} directions: what remains is "
            f"singular, indefinite or nearly so. Raise `damping` (tau){_enough_damping(system, rows)}, or bound leverages "
            "with clip_leverage=True."
        )
    bounded = leverages if clip is None else leverages.clamp_max(clip)
    if tall:  # (I - W W^T)^{-1} = I + W V (bounded / (1 - bounded) / leverages) V^T W^T
        gain = torch.where(bounded < leverages, bounded / leverages, 1.0) / (1 - bounded)
        b = b + whitened @ (vectors @ (gain * (vectors.T @ (whitened.T @ b))))
    else:
        b = vectors @ ((vectors.T @ b) / (1 - bounded))
    delta = torch.linalg.solve_triangular(factor.T, b.unsqueeze(1), upper=True).squeeze(1)
    return NewtonStep(delta=delta, max_leverage=top, num_high=high)


def refuse_nonfinite(*tensors: Tensor) -> None:
    """Refuse a curvature, what is removed from it, or a right-hand side with NaN or infinite values.

    Args:
        *tensors: The three, in this order.

    Raises:
        RuntimeError: If one has some.
    """
    for name, tensor in zip(
        ("recorded curvature", "forget set's curvature", "forget set's gradient"), tensors, strict=True
    ):
        if not bool(torch.isfinite(tensor).all()):
            raise RuntimeError(
                f"The {name} is not finite: there are NaN or infinite values in the weights, the data or the record. Nothing "
                "was changed; damping does not help. Check the trained model, and record its curvature again."
            )


def _enough_damping(system: Tensor, rows: Tensor) -> str:
    """Of what damping is known to be enough: with it, no leverage is above 0.9."""
    missing = float(torch.linalg.eigvalsh(rows.T @ rows / 0.9 - system)[-1])
    return f" by {missing:.2g} at least" if missing > 0 else ""
