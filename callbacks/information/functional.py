"""Conditional mutual information of a classifier's outputs: plain functions on tensors, in nats.

A classifier makes of label, input and prediction a Markov chain ``Y -> X -> Y_hat``: given ``x`` it draws ``Y_hat`` from
``p = softmax(logits)``. ``I(X; Y_hat | Y)`` says how far the outputs of a class scatter around their centroid, Gamma how
far the classes are apart. Neither looks at whether class ``c`` is predicted as ``c``: have accuracy beside them.

Everything here works in float32 or wider, differentiates, and runs under ``torch.func.vmap``.

Reference:
    Yang, Mohajer Hamidi, Ye, Tan, Yang, "Conditional Mutual Information Constrained Deep Learning for Classification",
    2023. arXiv:2309.09123
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from groundwire.callbacks.checks import check_logits, values_are_hidden

Q_MIN = 1e-12
"""Centroid entries are clamped here before their logarithm: they can underflow where ``p`` does."""

Separation = Literal["ce", "kl"]

_FEW = 64  # classes up to which, over devices at once, scattered additions of numbers beat those of rows


class NCMI(NamedTuple):
    """Concentration, separation and their ratio.

    Args:
        cmi: ``I(X; Y_hat | Y)``, nats.
        gamma: Mean cross entropy between outputs of different classes, nats.
        ncmi: ``cmi / gamma``; small is good.
    """

    cmi: Tensor
    gamma: Tensor
    ncmi: Tensor


def log_probs(logits: Tensor, alpha: float | Tensor = 1.0) -> Tensor:
    """Log-probabilities of the power transform ``p^alpha / sum(p^alpha)``, at least in float32.

    Args:
        logits: Shape ``(..., C)``, any floating dtype.
        alpha: Inverse temperature ``1 / T``; broadcasts against ``logits``.

    Returns:
        ``log_softmax(alpha * logits)``, float64 for float64 logits, else float32.

    Example:
        >>> log_probs(torch.zeros(1, 4)).exp()
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    return F.log_softmax(logits if isinstance(alpha, float) and alpha == 1.0 else alpha * logits, dim=-1)


def class_sums(values: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Sum of the rows of each class; no loop, no synchronisation.

    Args:
        values: Shape ``(B, D)``, float32 or float64.
        target: Class of each row, shape ``(B,)``, int64 in ``[0, num_classes)``.
        num_classes: Classes ``C``.

    Returns:
        Shape ``(C, D)``; zero for classes without a row.

    Example:
        >>> class_sums(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1, 0, 1]), 3).flatten()
        tensor([2., 5., 0.])
    """
    zeros = torch.zeros(num_classes, values.shape[-1], dtype=values.dtype, device=values.device)
    if num_classes <= _FEW and values_are_hidden(values):
        return zeros.scatter_add(0, target[:, None].expand_as(values), values)
    return zeros.index_add(0, target, values)


def class_counts(target: Tensor, num_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of each class, shape ``(C,)``."""
    zeros = torch.zeros(num_classes, dtype=dtype, device=target.device)
    return zeros.index_add(0, target, torch.ones_like(target, dtype=dtype))


def class_centroids(probs: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Mean output distribution of each class.

    Args:
        probs: Output distributions, shape ``(B, C)``.
        target: Labels, shape ``(B,)``.
        num_classes: Rows of the result.

    Returns:
        Shape ``(num_classes, C)``; zero for classes without a sample.

    Example:
        >>> class_centroids(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([0, 0]), 2)
        tensor([[0.7500, 0.2500],
                [0.0000, 0.0000]])
    """
    return class_sums(probs, target, num_classes) / class_counts(target, num_classes, probs.dtype).clamp_min(1)[:, None]


def batch_groups(target: Tensor, num_classes: int) -> tuple[Tensor, int]:
    """Number the classes such that sums over a batch fit into few rows, without looking at values.

    Args:
        target: Labels, shape ``(B,)``.
        num_classes: Classes ``C``.

    Returns:
        A group of each sample, shape ``(B,)``, equal where the labels are equal, and a bound on the groups:
        ``min(B, C)``.

    Example:
        >>> batch_groups(torch.tensor([7, 3, 7]), 1000)
        (tensor([0, 1, 0]), 3)
    """
    if num_classes <= len(target):
        return target, num_classes
    return (target[:, None] == target).to(torch.int8).argmax(dim=1), len(target)  # the first sample of the same class


def divergence_to_centroids(log_p: Tensor, log_q: Tensor, p: Tensor | None = None) -> Tensor:
    """``D(p_i || q_i)`` of each row.

    Args:
        log_p: Log-probabilities, shape ``(..., C)``.
        log_q: Logarithms of the rows' centroids, the same shape.
        p: ``exp(log_p)``, if it is there already.

    Returns:
        Shape ``(...)``, nats.
    """
    return ((log_p.exp() if p is None else p) * (log_p - log_q)).sum(dim=-1)


def conditional_mutual_information(
    logits: Tensor,
    target: Tensor,
    centroids: Tensor | None = None,
    alpha: float | Tensor = 1.0,
    q_min: float = Q_MIN,
) -> Tensor:
    """``I(X; Y_hat | Y)``: mean divergence of the outputs from the centroid of their class.

    Args:
        logits: Shape ``(B, C)``.
        target: Labels, shape ``(B,)``, int64.
        centroids: Distributions ``Q``, shape ``(C, C)``; by default those of these samples, through which the gradient
            flows (it is the same as if they were constants: they minimise the value). With fixed ones the value is an
            upper bound, tight at the true centroids.
        alpha: Inverse temperature.
        q_min: Centroid entries are clamped at this.

    Returns:
        A scalar, nats; the plug-in estimate, which is biased low for few samples a class.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> conditional_mutual_information(torch.eye(2).repeat(2, 1), torch.tensor([0, 1, 0, 1]))
        tensor(0.)
    """
    num_classes = check_logits(logits, target)
    log_p = log_probs(logits, alpha)
    if centroids is not None:
        rows = centroids[target]
    else:
        groups, size = batch_groups(target, num_classes)
        rows = class_centroids(log_p.exp(), groups, size)[groups]
    return divergence_to_centroids(log_p, rows.clamp_min(q_min).log()).mean()


def separation(
    logits: Tensor,
    target: Tensor,
    kind: Separation = "ce",
    unbiased: bool = False,
    grad: Literal["both", "first"] = "both",
) -> Tensor:
    """Gamma: mean cross entropy (or divergence) between outputs of different classes, over all pairs of samples.

    No loop over pairs: it takes the sums of ``p`` and of ``log p`` of each class, ``O(B C)`` work.

    Args:
        logits: Shape ``(B, C)``.
        target: Labels, shape ``(B,)``, int64.
        kind: ``"ce"`` for ``H(p_j, p_k)``, ``"kl"`` for ``D(p_j || p_k)``.
        unbiased: Divide by ``B (B - 1)`` instead of ``B^2``: unbiased for batches drawn without replacement.
        grad: ``"first"`` takes ``log p_k`` as a constant.

    Returns:
        A scalar, nats, at least 0; 0 if there is one class only.

    Raises:
        ValueError: If the shapes do not fit, or ``unbiased`` with a single sample.

    Example:
        >>> separation(torch.zeros(4, 2), torch.tensor([0, 0, 1, 1]))  # half of the pairs, log 2 each
        tensor(0.3466)
    """
    num_classes = check_logits(logits, target)
    return separation_of(log_probs(logits), target, num_classes, kind=kind, unbiased=unbiased, grad=grad)


def separation_of(
    log_p: Tensor,
    target: Tensor,
    num_classes: int,
    kind: Separation = "ce",
    unbiased: bool = False,
    grad: Literal["both", "first"] = "both",
    p: Tensor | None = None,
) -> Tensor:
    """:func:`separation` of log-probabilities that are there already.

    Args:
        log_p: Log-probabilities, shape ``(B, C)``.
        target: Labels, shape ``(B,)``.
        num_classes: Classes ``C``.
        kind: As there.
        unbiased: As there.
        grad: As there.
        p: ``exp(log_p)``, if it is there already.

    Returns:
        A scalar, nats.

    Raises:
        ValueError: If ``unbiased`` with a single sample.
    """
    batch = len(target)
    if unbiased and batch < 2:
        raise ValueError("Gamma compares pairs of samples: `unbiased=True` needs at least 2 of them, got 1.")
    groups, size = batch_groups(target, num_classes)
    p, partner = log_p.exp() if p is None else p, log_p if grad == "both" else log_p.detach()
    p_sums, log_sums = class_sums(p, groups, size), class_sums(partner, groups, size)
    pairs = (p_sums * log_sums).sum() - p_sums.sum(dim=0) @ log_sums.sum(dim=0)
    if kind == "kl":
        others = batch - class_counts(groups, size, log_p.dtype)
        pairs = pairs + (others[groups] * (p * log_p).sum(dim=-1)).sum()
    return pairs / (batch * (batch - 1 if unbiased else batch))


def normalized_cmi(
    logits: Tensor, target: Tensor, centroids: Tensor | None = None, kind: Separation = "ce", q_min: float = Q_MIN
) -> NCMI:
    """CMI, Gamma and their ratio NCMI, with gradients.

    Args:
        logits: Shape ``(B, C)``.
        target: Labels, shape ``(B,)``, int64.
        centroids: Distributions ``Q``, shape ``(C, C)``; by default those of these samples.
        kind: Which separation.
        q_min: Centroid entries are clamped at this.

    Returns:
        The three scalars; CMI and Gamma in nats.

    Raises:
        ValueError: If the shapes do not fit, or there is a single class, for which NCMI is undefined.

    Example:
        >>> normalized_cmi(torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0, 1])).ncmi
        tensor(0.0167)
    """
    cmi = conditional_mutual_information(logits, target, centroids, q_min=q_min)
    gamma = separation(logits, target, kind)
    if not values_are_hidden(target) and bool((target == target[0]).all()):
        raise ValueError(f"NCMI needs at least two classes in the data, saw only {int(target[0])}.")
    return NCMI(cmi, gamma, cmi / gamma)


def brier_score(logits: Tensor, target: Tensor, reduction: Literal["sum_classes", "mean"] = "sum_classes") -> Tensor:
    """Squared error of the output distribution, mean over the samples.

    Args:
        logits: Shape ``(B, C)``.
        target: Labels ``(B,)``, int64, or distributions ``(B, C)``.
        reduction: ``"sum_classes"`` sums over the classes; ``"mean"`` averages over them, ``C`` times smaller.

    Returns:
        A scalar, in [0, 2] with ``"sum_classes"``.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> brier_score(torch.zeros(1, 2), torch.tensor([0]))
        tensor(0.5000)

    Reference:
        Mohajer Hamidi et al., "How to Train the Teacher Model for Effective Knowledge Distillation", ECCV 2024.
        arXiv:2407.18041
    """
    if target.ndim == logits.ndim and target.shape != logits.shape:
        raise ValueError(f"Soft labels must have the logits' shape {tuple(logits.shape)}, got {tuple(target.shape)}.")
    p = log_probs(logits).exp()
    wanted = target.to(p.dtype)
    if target.ndim < logits.ndim:
        num_classes = check_logits(logits, target)
        wanted = (target[:, None] == torch.arange(num_classes, device=target.device)).to(p.dtype)
    per_sample = (p - wanted).square().sum(dim=-1).mean()
    return per_sample if reduction == "sum_classes" else per_sample / logits.shape[-1]
