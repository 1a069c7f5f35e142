"""What the methods of unlearning compute: plain functions on tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from groundwire.callbacks.information.functional import log_probs

IGNORED_LABEL = -100
"""The label that cross-entropy leaves out."""


def counted(labels: Tensor) -> Tensor:
    """Which labels count, and are not :data:`IGNORED_LABEL`.

    Args:
        labels: Class indices of any shape, or values, all of which count.

    Returns:
        Bool, the same shape.

    Example:
        >>> counted(torch.tensor([[3, -100]]))
        tensor([[ True, False]])
    """
    return torch.ones_like(labels, dtype=torch.bool) if labels.is_floating_point() else labels != IGNORED_LABEL


def counted_records(labels: Tensor) -> Tensor:
    """Which records have a label that counts, at one position at least.

    Args:
        labels: Shape ``(B, ...)``.

    Returns:
        Bool, shape ``(B,)``.

    Example:
        >>> counted_records(torch.tensor([[3, -100], [-100, -100]]))
        tensor([ True, False])
    """
    return counted(labels).reshape(len(labels), -1).any(dim=1)


def record_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each record's label, or of the whole label of a sequence.

    Args:
        logits: Shape ``(B, C)``, or ``(B, T, C)`` for sequences.
        labels: Class indices ``(B,)`` or ``(B, T)``, int64; those that are -100 do not count.

    Returns:
        Shape ``(B,)``, nats, at least float32; the sum over the positions of a sequence.

    Raises:
        ValueError: If the shapes do not fit, or labels are no indices.

    Example:
        >>> record_nll(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64))
        tensor([4.1589, 4.1589])
    """
    if labels.is_floating_point() or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"expected class indices of shape {list(logits.shape[:-1])} for logits {list(logits.shape)}, got shape "
            f"{list(labels.shape)} dtype {labels.dtype}."
        )
    each = F.nll_loss(log_probs(logits).flatten(0, -2), labels.flatten(), reduction="none")
    return each.reshape(len(labels), -1).sum(dim=1)


def npo_loss(nll: Tensor, reference_nll: Tensor, beta: float) -> Tensor:
    """Negative preference optimization: ``(2 / beta) mean log(1 + (pi / pi_ref)^beta)``, ``pi = exp(-nll)``.

    A record's gradient is that of gradient ascent times ``2 pi^beta / (pi^beta + pi_ref^beta)``: 1 at the reference,
    and 0 once the record is forgotten, so the loss is bounded from below by 0.

    Args:
        nll: Negative log-likelihoods of the forget records, shape ``(B,)``, nats.
        reference_nll: The same of the reference model.
        beta: Inverse temperature, above 0; towards 0 this becomes gradient ascent.

    Returns:
        A scalar; ``(2 / beta) log 2`` where both models agree.

    Raises:
        ValueError: If ``beta`` is not above 0.

    Reference:
        Zhang et al., "Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning", 2024,
        Section 3. arXiv:2404.05868

    Example:
        >>> npo_loss(torch.ones(4), torch.ones(4), beta=2.0)
        tensor(0.6931)
    """
    if not beta > 0:
        raise ValueError(f"`beta` must be above 0, got {beta}; gradient ascent is its limit at 0.")
    return -2 / beta * F.logsigmoid(beta * (nll - reference_nll)).mean()


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``D(p || q)`` at each position. A class of probability 0 under ``p`` adds nothing, whatever ``q`` says of it.

    Args:
        log_p: Log-probabilities, shape ``(..., C)``; ``-inf`` rules a class out.
        log_q: The same shape.

    Returns:
        Shape ``(...)``, nats; infinite where ``q`` rules out what ``p`` does not.

    Example:
        >>> divergence(torch.tensor([0.0, -torch.inf]), torch.tensor([0.5, 0.5]).log())
        tensor(0.6931)
    """
    p = log_p.exp()
    possible = p > 0
    difference = log_p.where(possible, 0.0) - log_q.where(possible, 0.0)  # else -inf minus -inf, and its gradient
    return (p * difference).sum(dim=-1)


def kl_to_teacher(student: Tensor, teacher: Tensor, temperature: float = 1.0, labels: Tensor | None = None) -> Tensor:
    """``T^2 D(softmax(teacher / T) || softmax(student / T))`` of each record.

    Args:
        student: Logits, shape ``(B, C)``, or ``(B, T, C)`` for sequences; ``-inf`` rules a class out.
        teacher: Logits, the same shape.
        temperature: ``T``.
        labels: Shape ``(B,)`` or ``(B, T)``; positions whose label is -100 are left out. None counts all.

    Returns:
        Shape ``(B,)``, nats times ``T^2``; the mean over the positions of a sequence that count, 0 where none does.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> kl_to_teacher(torch.zeros(1, 2), torch.tensor([[0.0, 100.0]]))
        tensor([0.6931])
    """
    if student.shape != teacher.shape:
        raise ValueError(f"Student and teacher must agree in shape, got {list(student.shape)}, {list(teacher.shape)}.")
    each = divergence(log_probs(teacher, 1 / temperature), log_probs(student, 1 / temperature))
    if labels is None:
        return temperature**2 * each.reshape(len(student), -1).mean(dim=1)
    if labels.shape != each.shape:
        raise ValueError(f"Labels {list(each.shape)} belong to logits {list(student.shape)}, got {list(labels.shape)}.")
    of_record = counted(labels).reshape(len(student), -1)
    total = each.reshape(len(student), -1).where(of_record, 0.0).sum(dim=1)
    return temperature**2 * total / of_record.sum(dim=1).clamp_min(1)


def wrong_labels(labels: Tensor, num_classes: int, uniforms: Tensor) -> Tensor:
    """A label for each, uniformly among the classes that it does not have.

    Args:
        labels: True labels in ``[0, num_classes)``, any shape; negative ones (ignored positions) are kept.
        num_classes: Classes ``C``.
        uniforms: Numbers in [0, 1), the same shape, which decide.

    Returns:
        Labels of the same shape and dtype, none equal to the true one.

    Raises:
        ValueError: If there are fewer than two classes.

    Example:
        >>> wrong_labels(torch.tensor([0, 1, 2]), 3, torch.tensor([0.2, 0.2, 0.9]))
        tensor([1, 0, 1])
    """
    if num_classes < 2:
        raise ValueError(f"A wrong label needs at least 2 classes, got {num_classes}.")
    among_others = (uniforms * (num_classes - 1)).floor().clamp_max(num_classes - 2).to(labels.dtype)
    return torch.where(labels < 0, labels, among_others + (among_others >= labels).to(labels.dtype))


def ssd_dampen(
    theta: Tensor, importance_all: Tensor, importance_forget: Tensor, alpha: float = 10.0, lam: float = 1.0
) -> Tensor:
    """Selective synaptic dampening: shrink the parameters that matter much more to the forget set than to all data.

    Where ``importance_forget > alpha importance_all``, a parameter is multiplied by
    ``min(1, lam importance_all / importance_forget)``; elsewhere it is kept.

    Args:
        theta: Parameters, any shape.
        importance_all: Mean squared gradients over all training data, the same shape, at least 0.
        importance_forget: Mean squared gradients over the forget set, the same shape.
        alpha: Selection threshold; ``inf`` keeps everything.
        lam: Dampening constant.

    Returns:
        New parameters, the same shape and dtype.

    Reference:
        Foster et al., "Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening", AAAI 2024,
        Section 4. arXiv:2308.07707

    Example:
        >>> ssd_dampen(torch.ones(3), torch.ones(3), torch.tensor([1.0, 20.0, 40.0]), alpha=10.0)
        tensor([1.0000, 0.0500, 0.0250])
    """
    selected = importance_forget > alpha * importance_all  # inf times 0 is NaN, which is not less
    factor = (lam * importance_all / importance_forget.where(selected, 1.0)).clamp_max(1.0)
    return theta.where(~selected, (theta * factor).to(theta.dtype))
