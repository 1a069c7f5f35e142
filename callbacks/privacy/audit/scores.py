"""Attacks that infer membership: plain functions from what networks say of records to scores, higher for members."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_MODELS_FOR_OWN_SPREAD = 64  # below, a record's own variance is too rough an estimate (Carlini et al., Section VI)
_SMALLEST_SPREAD = 1e-12


def true_class_logit(logits: Tensor, target: Tensor) -> Tensor:
    """The logit of the true class's probability p: log(p / (1 - p)), without forming p.

    It is near Gaussian over training runs, which LiRA relies on. The loss is ``softplus`` of its negative, and p its
    ``sigmoid``: one number a record serves every attack.

    Args:
        logits: Shape ``(n, C)`` with C >= 2, floating point.
        target: Class indices ``(n,)``.

    Returns:
        Shape ``(n,)``, float64.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> true_class_logit(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor([2.], dtype=torch.float64)

    Reference:
        Carlini et al., "Membership Inference Attacks From First Principles", IEEE S&P 2022, Section V. arXiv:2112.03570
    """
    if logits.ndim != 2 or logits.shape[1] < 2 or target.shape != logits.shape[:1]:
        raise ValueError(
            f"Expected logits (n, C >= 2) and labels (n,), got {tuple(logits.shape)} and {tuple(target.shape)}."
        )
    logits = logits.double()
    own = target.long()[:, None]
    others = logits.scatter(1, own, -math.inf).logsumexp(dim=1)
    return logits.gather(1, own)[:, 0] - others


def loss_scores(losses: Tensor, reference_losses: Tensor | None = None) -> Tensor:
    """The loss threshold attack: members have a small loss, or one that is smaller than that of other networks.

    Args:
        losses: Of the attacked network, ``(n,)``.
        reference_losses: Of networks that were trained without the records, ``(K, n)``; their mean calibrates the loss to
            how hard the record is. None for no calibration.

    Returns:
        Shape ``(n,)``: minus the loss, plus the mean reference loss.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> loss_scores(torch.tensor([0.5, 2.0]))
        tensor([-0.5000, -2.0000])

    Reference:
        Yeom et al., "Privacy Risk in Machine Learning", IEEE CSF 2018. arXiv:1709.01604. Calibrated: Watson et al., "On
        the Importance of Difficulty Calibration in Membership Inference Attacks", ICLR 2022. arXiv:2111.08440
    """
    if losses.ndim != 1:
        raise ValueError(f"`losses` must be a vector, got shape {tuple(losses.shape)}.")
    if reference_losses is None:
        return -losses
    if reference_losses.ndim != 2 or reference_losses.shape[1:] != losses.shape:
        raise ValueError(f"`reference_losses` must have shape (K, {len(losses)}), got {tuple(reference_losses.shape)}.")
    return reference_losses.mean(dim=0) - losses


def lira_online(phi: Tensor, shadow_phi: Tensor, shadow_member: Tensor, own_spread: bool | None = None) -> Tensor:
    """The likelihood ratio attack, with networks trained with and without each record.

    The score is log N(phi; mean_in, std_in^2) - log N(phi; mean_out, std_out^2).

    Args:
        phi: :func:`true_class_logit` of the attacked network, ``(n,)``.
        shadow_phi: The same of K shadow networks, ``(K, n)``.
        shadow_member: Which record was in which network's training data, ``(K, n)`` bool; at least two networks with
            and two without each record.
        own_spread: Whether each record has a variance of its own, or all share the mean one; by default the former from
            64 networks on.

    Returns:
        Shape ``(n,)``, float64.

    Raises:
        ValueError: If the shapes do not fit, or a record has too few networks on a side.

    Example:
        >>> shadows = torch.tensor([[4.0, 1.0], [6.0, 3.0], [1.0, 4.0], [3.0, 6.0]])
        >>> inside = torch.tensor([[True, False], [True, False], [False, True], [False, True]])
        >>> lira_online(torch.tensor([5.0, 2.0]), shadows, inside)
        tensor([ 2.2500, -2.2500], dtype=torch.float64)

    Reference:
        Carlini et al., "Membership Inference Attacks From First Principles", IEEE S&P 2022, Algorithm 1. arXiv:2112.03570
    """
    mean_in, std_in = _mean_and_spread(phi, shadow_phi, shadow_member, own_spread, "with")
    mean_out, std_out = _mean_and_spread(phi, shadow_phi, ~shadow_member, own_spread, "without")
    phi = phi.double()
    return (
        ((phi - mean_out) / std_out).square() / 2
        + std_out.log()
        - ((phi - mean_in) / std_in).square() / 2
        - std_in.log()
    )


def lira_offline(phi: Tensor, shadow_phi: Tensor, shadow_member: Tensor, own_spread: bool | None = None) -> Tensor:
    """The likelihood ratio attack with networks trained without each record only.

    The paper's score is the probability that a network trained without the record is less sure of it. Its quantile,
    (phi - mean_out) / std_out, is returned instead: it ranks the records alike, and does not round to 1.

    Args:
        phi: :func:`true_class_logit` of the attacked network, ``(n,)``.
        shadow_phi: The same of K shadow networks, ``(K, n)``.
        shadow_member: Which record was in which network's training data, ``(K, n)`` bool; networks that saw a record
            do not count for it, and at least two must remain.
        own_spread: Whether each record has a variance of its own, or all share the mean one; by default the former from
            64 networks on.

    Returns:
        Shape ``(n,)``, float64, in standard deviations.

    Raises:
        ValueError: If the shapes do not fit, or a record has too few networks.

    Example:
        >>> shadows = torch.tensor([[1.0], [3.0]])
        >>> lira_offline(torch.tensor([5.0]), shadows, torch.zeros(2, 1, dtype=torch.bool))
        tensor([2.1213], dtype=torch.float64)

    Reference:
        Carlini et al., "Membership Inference Attacks From First Principles", IEEE S&P 2022, Section VI. arXiv:2112.03570
    """
    mean, std = _mean_and_spread(phi, shadow_phi, ~shadow_member, own_spread, "without")
    return (phi.double() - mean) / std


def rmia_offline(
    probability: Tensor,
    reference_probability: Tensor,
    reference_member: Tensor,
    population_probability: Tensor,
    population_reference_probability: Tensor,
    gamma: float = 1.0,
    offline_a: float = 0.3,
) -> Tensor:
    """The robust membership inference attack, with networks trained without each record only.

    A record's ratio is its true class's probability under the attacked network over the one to be expected of any
    network. The score is the share of the population whose ratio it exceeds by more than ``gamma``. One reference
    network is enough.

    Args:
        probability: Of the true class under the attacked network, ``(n,)``, in [0, 1].
        reference_probability: Under K reference networks, ``(K, n)``.
        reference_member: Which record was in which reference's training data, ``(K, n)`` bool; those do not count.
        population_probability: Of records that no network was trained on, under the attacked network, ``(p,)``.
        population_reference_probability: Under the references, ``(K, p)``.
        gamma: By how much a record must dominate, above 0.
        offline_a: How the probability under references without the record gives that under any network:
            ((1 + a) mean_out + 1 - a) / 2, in [0, 1]. Nearer to 1 where training on a record changes it little.

    Returns:
        Shape ``(n,)``, float64, in [0, 1].

    Raises:
        ValueError: If shapes do not fit, numbers are out of range, or every reference was trained on some record.

    Example:
        >>> rmia_offline(
        ...     torch.tensor([0.9, 0.5]), torch.tensor([[0.4, 0.5]]), torch.zeros(1, 2, dtype=torch.bool),
        ...     torch.tensor([0.3, 0.6]), torch.tensor([[0.3, 0.5]]),
        ... )
        tensor([1.0000, 0.5000], dtype=torch.float64)

    Reference:
        Zarifzadeh, Liu, Shokri, "Low-Cost High-Power Membership Inference Attacks", ICML 2024. arXiv:2312.03262
    """
    _check_shadows(probability, reference_probability, reference_member)
    if population_probability.ndim != 1 or not len(population_probability):
        raise ValueError(f"The population must be a vector of at least one, got {tuple(population_probability.shape)}.")
    if population_reference_probability.shape != (len(reference_probability), len(population_probability)):
        raise ValueError(
            f"`population_reference_probability` must have shape {(len(reference_probability), len(population_probability))}, "
            f"got {tuple(population_reference_probability.shape)}."
        )
    if not gamma > 0 or not 0 <= offline_a <= 1:
        raise ValueError(f"`gamma` must be above 0 and `offline_a` in [0, 1], got {gamma} and {offline_a}.")
    outside = ~reference_member
    count = outside.sum(dim=0)
    if bool((count == 0).any()):
        raise ValueError("Every reference network was trained on some record: RMIA needs one without it.")
    mean_out = torch.where(outside, reference_probability.double(), 0.0).sum(dim=0) / count
    expected = ((1 + offline_a) * mean_out + 1 - offline_a) / 2
    population_expected = ((1 + offline_a) * population_reference_probability.double().mean(dim=0) + 1 - offline_a) / 2
    # sorted once: n log p instead of n p comparisons
    ratios = (gamma * population_probability.double() / population_expected).sort().values
    return torch.searchsorted(ratios, probability.double() / expected).double() / len(ratios)


def losses_of(phi: Tensor) -> Tensor:
    """Cross entropies in nats from :func:`true_class_logit`, any shape."""
    return F.softplus(-phi)


def _check_shadows(phi: Tensor, shadow: Tensor, member: Tensor) -> None:
    if phi.ndim != 1 or shadow.ndim != 2 or shadow.shape[1:] != phi.shape or not len(shadow):
        raise ValueError(f"Expected shapes (n,) and (K, n), got {tuple(phi.shape)} and {tuple(shadow.shape)}.")
    if member.dtype != torch.bool or member.shape != shadow.shape:
        raise ValueError(
            f"The memberships must be bool of shape {tuple(shadow.shape)}, got {member.dtype} of {tuple(member.shape)}."
        )


def _mean_and_spread(
    phi: Tensor, shadow_phi: Tensor, chosen: Tensor, own_spread: bool | None, which: str
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each record over the chosen networks, ``(n,)`` each."""
    _check_shadows(phi, shadow_phi, chosen)
    count = chosen.sum(dim=0)
    if bool((count < 2).any()):
        raise ValueError(f"LiRA needs at least 2 shadow networks trained {which} each record, got {int(count.min())}.")
    shadow_phi = torch.where(
        chosen, shadow_phi.double(), 0.0
    )  # before the difference: what is not chosen may be infinite
    mean = shadow_phi.sum(dim=0) / count
    squares = torch.where(chosen, shadow_phi - mean, 0.0).square().sum(dim=0)
    if own_spread if own_spread is not None else len(shadow_phi) >= _MODELS_FOR_OWN_SPREAD:
        variance = squares / (count - 1)
    else:
        variance = (squares.sum() / (count - 1).sum()).expand_as(mean)
    return mean, variance.sqrt().clamp_min(_SMALLEST_SPREAD)
