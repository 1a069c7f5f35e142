"""Influence of training records on test records, from their (compressed) gradients: plain functions on tensors.

One sign everywhere: positive influence of record ``i`` on test record ``t`` means that removing ``i`` from the training
data raises the loss of ``t``, so that ``i`` helps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DEFAULT_DAMPING = 0.1
"""Of the mean of the curvature's diagonal."""


def default_damping(curvature: Tensor) -> float:
    """A tenth of the mean of the diagonal.

    Args:
        curvature: Shape ``(k, k)``.

    Returns:
        The damping, at least 0.

    Example:
        >>> default_damping(torch.diag(torch.tensor([1.0, 3.0])))
        0.2
    """
    return DEFAULT_DAMPING * float(curvature.diagonal().double().mean())


def damped_factor(curvature: Tensor, damping: float | None = None) -> Tensor:
    """Cholesky factor of ``curvature + damping I``.

    Args:
        curvature: ``G``, the mean over the records, symmetric and positive semidefinite, shape ``(k, k)``.
        damping: Added to its diagonal, at least 0; by default :func:`default_damping`.

    Returns:
        Lower triangle ``L`` with ``L L^T = G + damping I``, shape ``(k, k)``.

    Raises:
        ValueError: If the curvature is not square, ``damping`` is negative, or the sum is not positive definite.
    """
    if curvature.ndim != 2 or curvature.shape[0] != curvature.shape[1]:
        raise ValueError(f"`curvature` must be a square matrix (k, k), got shape {tuple(curvature.shape)}.")
    damping = default_damping(curvature) if damping is None else damping
    if not damping >= 0:
        raise ValueError(f"`damping` must be at least 0, got {damping}.")
    damped = curvature.clone()
    damped.diagonal().add_(damping)
    factor, info = torch.linalg.cholesky_ex(damped)
    if int(info) or not bool(torch.isfinite(factor.diagonal()).all()):
        raise ValueError(
            f"The curvature with damping={damping:.3g} is not positive definite (mean of its diagonal "
            f"{float(curvature.diagonal().mean()):.3g}): give a larger `damping`, or fewer coordinates."
        )
    found: Tensor = factor
    return found


def influence(test: Tensor, train: Tensor, curvature: Tensor, damping: float | None = None) -> Tensor:
    """Influence ``g_t^T (G + damping I)^{-1} g_i`` of each training record on each test record.

    It is ``n`` times the change of the test record's loss, to first order, when the training record is removed from the mean
    of ``n`` losses. Damping acts like a weight decay of that strength, and stands for it.

    Args:
        test: Gradients of the test records' losses, shape ``(T, k)``; other rows, such as gradients of an output, give the
            change of that.
        train: Gradients of the training records' losses, shape ``(n, k)``.
        curvature: ``G``, the mean over the training records, shape ``(k, k)``.
        damping: At least 0; by default a tenth of the mean of the curvature's diagonal.

    Returns:
        Shape ``(T, n)``.

    Raises:
        ValueError: If shapes do not fit, or the damped curvature is not positive definite.

    Reference:
        Koh, Liang, "Understanding Black-box Predictions via Influence Functions", ICML 2017. arXiv:1703.04730

    Example:
        >>> train = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> influence(torch.tensor([[2.0, 0.0]]), train, torch.eye(2), damping=1.0)
        tensor([[1., 0.]])
    """
    k = len(curvature)
    for name, rows in (("test", test), ("train", train)):
        if rows.ndim != 2 or rows.shape[1] != k:
            raise ValueError(f"`{name}` must be rows (n, {k}) like the curvature, got shape {tuple(rows.shape)}.")
    return solved(test, damped_factor(curvature, damping)) @ train.T


def solved(rows: Tensor, factor: Tensor) -> Tensor:
    """``rows (L L^T)^{-1}`` for rows ``(T, k)`` and a Cholesky factor ``(k, k)``."""
    return torch.cholesky_solve(rows.T, factor).T


def self_influence(train: Tensor, factor: Tensor) -> Tensor:
    """Influence of each training record on itself, ``g_i^T (L L^T)^{-1} g_i``.

    Args:
        train: Gradients, shape ``(n, k)``.
        factor: From :func:`damped_factor`, shape ``(k, k)``.

    Returns:
        Shape ``(n,)``, at least 0.
    """
    whitened: Tensor = torch.linalg.solve_triangular(factor, train.T, upper=False)
    return whitened.square().sum(dim=0)


def leave_one_out_factor(columns: Tensor, curvature: Tensor, damping: float) -> Tensor:
    """What makes influence exact for ridge regression: ``1 / (1 - h_i)`` with the leverages ``h_i``.

    With one column ``u_i`` a record and ``G = (1/n) sum_i u_i u_i^T``, the leverage is ``u_i^T (G + damping I)^{-1} u_i / n``.
    For ridge regression (squared error / 2, and a regulariser whose total weight ``n damping`` stays when a record is
    removed), removing record ``i`` changes the parameters by exactly this factor times the influence step.

    Args:
        columns: ``u_i``, shape ``(n, k)``; the inputs, for ridge regression.
        curvature: ``G``, shape ``(k, k)``.
        damping: At least 0.

    Returns:
        Shape ``(n,)``, at least 1.

    Raises:
        ValueError: If the damped curvature is not positive definite, or a leverage is 1: without that record the minimum
            is not unique.

    Example:
        >>> leave_one_out_factor(torch.eye(2), torch.eye(2) / 2, damping=0.5)
        tensor([2., 2.])
    """
    leverage = self_influence(columns, damped_factor(curvature, damping)) / len(columns)
    if bool((leverage >= 1 - 16 * torch.finfo(leverage.dtype).eps).any()):
        raise ValueError("A record has leverage 1: without it the minimum is not unique. Give a larger `damping`.")
    return 1 / (1 - leverage)


def trac_in(test: Sequence[Tensor], train: Sequence[Tensor], lrs: Sequence[float]) -> Tensor:
    """TracIn over checkpoints: ``sum_c lr_c  g_t(theta_c)^T g_i(theta_c)``.

    Positive where steps on the training record lowered the test record's loss: the same sign as :func:`influence`, another
    scale.

    Args:
        test: At each checkpoint, gradients of the test records, shape ``(T, k)``.
        train: At each checkpoint, gradients of the training records, shape ``(n, k)``.
        lrs: The learning rate at each checkpoint.

    Returns:
        Shape ``(T, n)``.

    Raises:
        ValueError: If the three do not have one entry a checkpoint, or there is none.

    Reference:
        Pruthi et al., "Estimating Training Data Influence by Tracing Gradient Descent", NeurIPS 2020, Section 3.
        arXiv:2002.08484

    Example:
        >>> trac_in([torch.ones(1, 2)], [torch.eye(2)], [0.5])
        tensor([[0.5000, 0.5000]])
    """
    if not len(test) == len(train) == len(lrs) or not lrs:
        raise ValueError(
            f"One entry a checkpoint is needed, and at least one; got {len(test)}, {len(train)} and {len(lrs)}."
        )
    parts = [lr * (g_t @ g_i.T) for g_t, g_i, lr in zip(test, train, lrs, strict=True)]
    return torch.stack(parts).sum(dim=0)


def linear_datamodeling_score(scores: Tensor, subsets: Tensor, outputs: Tensor) -> Tensor:
    """How well sums of influences predict what models trained on subsets of the data do.

    For each test record: Spearman's rank correlation, over the subsets, between the sum of the influences of the records in
    the subset and the retrained model's output.

    Args:
        scores: Influence of each training record on each test record, shape ``(T, n)``.
        subsets: Which records each model was trained on, bool, shape ``(S, n)``.
        outputs: What the models give for the test records, larger where they do better (the negative loss), shape
            ``(S, T)``.

    Returns:
        Shape ``(T,)``, in [-1, 1].

    Raises:
        ValueError: If shapes do not fit, or there are fewer than three subsets.

    Reference:
        Park et al., "TRAK: Attributing Model Behavior at Scale", ICML 2023, Definition 2.4. arXiv:2303.14186

    Example:
        >>> subsets = torch.tensor([[1, 0], [0, 1], [1, 1]]).bool()
        >>> linear_datamodeling_score(torch.tensor([[1.0, 2.0]]), subsets, torch.tensor([[0.1], [0.2], [0.3]]))
        tensor([1.], dtype=torch.float64)
    """
    number, n = subsets.shape
    if scores.shape[1] != n or outputs.shape != (number, len(scores)) or number < 3:
        raise ValueError(
            f"expected scores (T, n), subsets (S, n) and outputs (S, T) with at least 3 subsets, got {tuple(scores.shape)}, "
            f"{tuple(subsets.shape)} and {tuple(outputs.shape)}."
        )
    predicted = subsets.to(scores.dtype) @ scores.T
    return rank_correlation(predicted.T, outputs.T)


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation of each row of ``a`` with the same row of ``b``.

    Args:
        a: Shape ``(..., n)``.
        b: The same shape.

    Returns:
        Shape ``(...)``, float64; NaN where all entries of a row are equal. Ties share the mean of their ranks.

    Example:
        >>> rank_correlation(torch.tensor([1.0, 5.0, 7.0]), torch.tensor([2.0, 9.0, 3.0]))
        tensor(0.5000, dtype=torch.float64)
    """
    x, y = (_ranks(rows) for rows in (a, b))
    x, y = (rows - rows.mean(dim=-1, keepdim=True) for rows in (x, y))
    return (x * y).sum(dim=-1) / (x.square().sum(dim=-1) * y.square().sum(dim=-1)).sqrt()


def _ranks(rows: Tensor) -> Tensor:
    ordered = rows.sort(dim=-1).values.contiguous()
    rows = rows.contiguous()
    below = torch.searchsorted(ordered, rows, right=False)
    upto = torch.searchsorted(ordered, rows, right=True)
    return (below + upto + 1).double() / 2
