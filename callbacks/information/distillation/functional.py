"""Distillation losses: from student and teacher logits ``(B, C)`` to a scalar, means over the batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from groundwire.callbacks.information.functional import log_probs

_CONSTANT = 1e-7  # probabilities that differ by less are equal up to rounding


def kd_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """``T^2 D(softmax(t/T) || softmax(s/T))``: the factor keeps the gradient's scale over temperatures.

    Args:
        student: Logits, shape ``(B, C)``.
        teacher: Logits, the same shape.
        temperature: ``T``.

    Returns:
        A scalar, nats times ``T^2``; 0 exactly if the logits differ by one constant in each row.

    Example:
        >>> kd_loss(torch.zeros(1, 2), torch.zeros(1, 2))
        tensor(0.)

    Reference:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015. arXiv:1503.02531
    """
    log_s, log_t = log_probs(student, 1 / temperature), log_probs(teacher, 1 / temperature)
    return temperature**2 * (log_t.exp() * (log_t - log_s)).sum(dim=-1).mean()


def dkd_terms(student: Tensor, teacher: Tensor, target: Tensor, temperature: float = 4.0) -> tuple[Tensor, Tensor]:
    """Decoupled distillation: the part about the target class, and the part about the others among themselves.

    Per sample, ``KD = TCKD + (1 - p_t[y]) NCKD``.

    Args:
        student: Logits, shape ``(B, C)``.
        teacher: Logits, the same shape.
        target: Labels, shape ``(B,)``.
        temperature: ``T``.

    Returns:
        TCKD and NCKD, scalars, times ``T^2``.

    Example:
        >>> dkd_terms(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([0]))
        (tensor(0.), tensor(0.))

    Reference:
        Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022. arXiv:2203.08679
    """
    is_target = target[:, None] == torch.arange(student.shape[-1], device=target.device)
    log_s, log_t = log_probs(student, 1 / temperature), log_probs(teacher, 1 / temperature)
    binary_s, others_s = _decoupled(log_s, is_target)
    binary_t, others_t = _decoupled(log_t, is_target)
    tckd = (binary_t.exp() * (binary_t - binary_s)).sum(dim=-1).mean()
    nckd = (others_t.exp() * (others_t - others_s)).sum(dim=-1).mean()
    return temperature**2 * tckd, temperature**2 * nckd


def dist_terms(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """One minus Pearson's correlation between the outputs of both, over the classes and over the batch.

    Args:
        student: Logits, shape ``(B, C)``.
        teacher: Logits, the same shape.
        temperature: Of both softmaxes.

    Returns:
        The inter-class term (a correlation in each row) and the intra-class term (in each column), scalars in [0, 2],
        times ``T^2``. A constant row or column has correlation 0.

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> [f"{float(term):.4f}" for term in dist_terms(z, z)]
        ['0.0000', '0.0000']

    Reference:
        Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022. arXiv:2205.10536
    """
    p_s, p_t = log_probs(student, 1 / temperature).exp(), log_probs(teacher, 1 / temperature).exp()
    inter = 1 - _pearson(p_s, p_t).mean()
    intra = 1 - _pearson(p_s.T, p_t.T).mean()
    return temperature**2 * inter, temperature**2 * intra


def ttm_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0, weighted: bool = False) -> Tensor:
    """Transformed teacher matching: ``D(p_t^(1/T) || p_s)``, no temperature on the student.

    Args:
        student: Logits, shape ``(B, C)``.
        teacher: Logits, the same shape.
        temperature: Of the teacher, ``T``.
        weighted: Weigh each sample by the power sum of the teacher's output (WTTM): smooth outputs count more.

    Returns:
        A scalar, nats.

    Example:
        >>> ttm_loss(torch.zeros(1, 2), torch.zeros(1, 2))
        tensor(0.)

    Reference:
        Zheng, Yang, "Knowledge Distillation Based on Transformed Teacher Matching", ICLR 2024. arXiv:2402.11148
    """
    log_s, log_t = log_probs(student), log_probs(teacher, 1 / temperature)
    per_sample = (log_t.exp() * (log_t - log_s)).sum(dim=-1)
    if weighted:
        per_sample = per_sample * (log_probs(teacher) / temperature).exp().sum(dim=-1)
    return per_sample.mean()


def _decoupled(log_p: Tensor, is_target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of (target, not target), and of the others renormalised (0 at the target)."""
    others = log_p.masked_fill(is_target, float("-inf"))
    log_rest = torch.logsumexp(others, dim=-1, keepdim=True)  # stable, where 1 - p_y is not
    log_target = log_p.masked_fill(~is_target, 0.0).sum(dim=-1, keepdim=True)
    # 0 at the target before anything is exponentiated: a confident output would overflow there, and its gradient be NaN
    return torch.cat([log_target, log_rest], dim=-1), (log_p - log_rest).masked_fill(is_target, 0.0)


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlation in each row; 0, and without a gradient, where one of them is constant."""
    a, b = a - a[..., :1], b - b[..., :1]  # a constant row is 0 exactly, not its mean's rounding error
    a, b = a - a.mean(dim=-1, keepdim=True), b - b.mean(dim=-1, keepdim=True)
    varies = torch.minimum(a.detach().abs().amax(dim=-1), b.detach().abs().amax(dim=-1)) > _CONSTANT
    rows = varies[..., None]
    correlation = F.cosine_similarity(torch.where(rows, a, 1.0), torch.where(rows, b, 1.0), dim=-1)
    return torch.where(varies, correlation, 0.0)
