"""Membership inference: who was a network trained on?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from groundwire.callbacks.logits import logits_in
from groundwire.callbacks.privacy.audit.result import AttackResult, AuditReport, Bound
from groundwire.callbacks.privacy.audit.scores import (
    lira_offline,
    lira_online,
    loss_scores,
    losses_of,
    rmia_offline,
    true_class_logit,
)
from groundwire.plugins.random import stream

Attack = Literal["loss", "calibrated_loss", "lira_online", "lira_offline", "rmia"]
Records = tuple[Tensor, Tensor]
"""Inputs ``(n, ...)`` and class indices ``(n,)``."""


class ShadowStatistics(NamedTuple):
    """What shadow networks say of records: one number each, see :func:`true_class_logit`.

    Args:
        phi: Logit of the true class's probability, ``(K, n)``, float64.
        member: Which record was in which network's training data, ``(K, n)`` bool.
    """

    phi: Tensor
    member: Tensor


def record_statistics(network: nn.Module, records: Records, batch_size: int = 500) -> Tensor:
    """What a network says of each record, in evaluation mode: the logit of the true class's probability.

    Args:
        network: Gives logits ``(B, C)``, or an output that has them as ``logits``.
        records: Inputs ``(n, ...)`` and class indices ``(n,)``; they are moved to the network's device.
        batch_size: Records at once.

    Returns:
        Shape ``(n,)``, float64, on the CPU.

    Raises:
        TypeError: If the network gives no logits.

    Example:
        >>> record_statistics(nn.Identity(), (torch.tensor([[2.0, 0.0]]), torch.tensor([1])))
        tensor([-2.], dtype=torch.float64)
    """
    device = next((parameter.device for parameter in network.parameters()), records[0].device)
    modes = {part: part.training for part in network.modules()}
    network.eval()
    found = []
    try:
        with torch.no_grad():
            for x, y in zip(*(torch.split(part, batch_size) for part in records), strict=True):
                output = network(x.to(device))
                logits = logits_in(output)
                if logits is None:
                    raise TypeError(f"The network gives a {type(output).__name__} without `logits`.")
                found.append(true_class_logit(logits, y.to(device)).cpu())
    finally:
        for part, training in modes.items():
            part.training = training
    return torch.cat(found)


def shadow_statistics(
    fit: Callable[[Tensor, int], nn.Module],
    records: Records,
    num_models: int,
    *,
    population: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 500,
) -> ShadowStatistics:
    """Train shadow networks by the attacked network's recipe, each on half of the records, and keep what they say.

    Networks come in pairs that share out the records, so that every record is in the data of exactly half of them. The
    networks themselves are not kept.

    Args:
        fit: From indices of records ``(k,)``, int64 ascending, and a seed to a network that was trained on them, for
            example by ``Trainer.fit``.
        records: Inputs ``(n, ...)`` and class indices ``(n,)``.
        num_models: Networks K, even, at least 2. LiRA needs 4, and is good from 64 on; RMIA can do with 2.
        population: Records that no network is trained on, ``(n,)`` bool; RMIA compares with them. None for none.
        seed: Root seed of the halves, and of the seeds that ``fit`` gets.
        batch_size: Records that a network is asked about at once.

    Returns:
        The statistics of all n records.

    Raises:
        ValueError: If ``num_models`` is odd or below 2, or fewer than 2 records remain to train on.

    Example:
        >>> records = torch.eye(4), torch.tensor([0, 1, 0, 1])
        >>> shadows = shadow_statistics(lambda indices, seed: nn.Linear(4, 2), records, num_models=2)
        >>> shadows.phi.shape, shadows.member.sum(dim=0).tolist()
        (torch.Size([2, 4]), [1, 1, 1, 1])

    Reference:
        Carlini et al., "Membership Inference Attacks From First Principles", IEEE S&P 2022. arXiv:2112.03570
    """
    if num_models < 2 or num_models % 2:
        raise ValueError(f"`num_models` must be even and at least 2, got {num_models}.")
    number = len(records[1])
    candidates = torch.arange(number) if population is None else (~_checked(population, number)).nonzero()[:, 0]
    if len(candidates) < 2:
        raise ValueError(f"Shadow networks need at least 2 records to train on, got {len(candidates)}.")
    phi, member = [], torch.zeros(num_models, number, dtype=torch.bool)
    for k in range(num_models):
        order = torch.randperm(len(candidates), generator=stream(seed, purpose="audit/shadows", round=k // 2))
        half = len(candidates) // 2
        chosen = candidates[(order[:half] if k % 2 == 0 else order[half:]).sort().values]
        member[k, chosen] = True
        fit_seed = int(torch.randint(2**31, (), generator=stream(seed, purpose="audit/fits", round=k)))
        phi.append(record_statistics(fit(chosen, fit_seed), records, batch_size))
    return ShadowStatistics(torch.stack(phi), member)


def membership_audit(
    target: nn.Module | Tensor,
    member: Tensor,
    records: Records | None = None,
    *,
    shadows: ShadowStatistics | None = None,
    population: Tensor | None = None,
    attacks: Sequence[Attack] | None = None,
    claimed_epsilon: float | None = None,
    delta: float = 0.0,
    confidence: float = 0.95,
    bound: Bound = "roc",
) -> AuditReport:
    """Attack a trained network: how well are the records that it was trained on told from others?

    Args:
        target: The network, or what :func:`record_statistics` says of it, ``(n,)``.
        member: Which records it was trained on, ``(n,)`` bool.
        records: Inputs ``(n, ...)`` and class indices ``(n,)``; needed for a network.
        shadows: What shadow networks say of the same records; without, only the loss threshold is run.
        population: Records ``(n,)`` bool that neither the network nor a shadow was trained on: RMIA compares with them, and
            no attack is measured on them. None for none.
        attacks: Which attacks to run; by default all that the arguments allow: the loss threshold; with shadows the
            calibrated loss, and both kinds of LiRA if every record has two networks with and two without it; with a
            population RMIA.
        claimed_epsilon: In nats; None where nothing is claimed.
        delta: Of the claim and of the bounds, in [0, 1].
        confidence: Probability that all ``"one-run"`` bounds hold together; each is given the level that Bonferroni's
            correction leaves.
        bound: ``"one-run"`` if each record was included by its own fair coin. Else ``"roc"``, an estimate that refutes
            nothing: it takes members and others for alike but for the training, and their scores for independent.

    Returns:
        The report, one row an attack.

    Raises:
        ValueError: If shapes do not fit, one of the groups is empty, or an attack lacks what it needs.

    Example:
        >>> member = torch.arange(200) % 2 == 0
        >>> membership_audit(10.0 * member, member, claimed_epsilon=1.0, bound="one-run").refuted  # sure of what it has seen
        True

    Reference:
        Yeom et al., IEEE CSF 2018, arXiv:1709.01604. Carlini et al., IEEE S&P 2022, arXiv:2112.03570. Zarifzadeh, Liu,
        Shokri, ICML 2024, arXiv:2312.03262
    """
    if isinstance(target, nn.Module):
        if records is None:
            raise ValueError("`records` are needed to attack a network; or give `record_statistics` of it.")
        target = record_statistics(target, records)
    phi = target.detach().cpu().double()
    member = _checked(member, len(phi)).cpu()
    if shadows is not None and (shadows.phi.shape[1:] != phi.shape or shadows.member.shape != shadows.phi.shape):
        raise ValueError(f"Shadows must speak of the same {len(phi)} records, got shape {tuple(shadows.phi.shape)}.")
    common = torch.zeros_like(member) if population is None else _checked(population, len(phi)).cpu()
    if bool((common & member).any()):
        raise ValueError("Some of the population are members: RMIA needs records that the network was not trained on.")
    if shadows is not None and bool(shadows.member.cpu()[:, common].any()):
        raise ValueError("Some of the population were in a shadow network's training data: leave them out of it.")
    chosen = _possible(shadows, common) if attacks is None else list(attacks)
    level = (1 - confidence) / max(len(chosen), 1)
    kept = ~common
    return AuditReport(
        attacks=tuple(
            AttackResult.from_scores(
                name,
                _scores(name, phi, shadows, common),
                member[kept],
                delta=delta,
                confidence=1 - level,
                bound=bound,
            )
            for name in chosen
        ),
        claimed_epsilon=claimed_epsilon,
        claimed_delta=delta,
    )


def _possible(shadows: ShadowStatistics | None, common: Tensor) -> list[Attack]:
    if shadows is None:
        return ["loss"]
    inside = shadows.member.cpu()[:, ~common].sum(dim=0)
    outside = len(shadows.member) - inside
    names: list[Attack] = ["loss"]
    if int(outside.min()) >= 1:
        names.append("calibrated_loss")
    if int(outside.min()) >= 2:
        names += ["lira_online", "lira_offline"] if int(inside.min()) >= 2 else ["lira_offline"]
    if int(outside.min()) >= 1 and bool(common.any()):
        names.append("rmia")
    return names


def _scores(name: Attack, phi: Tensor, shadows: ShadowStatistics | None, common: Tensor) -> Tensor:
    """Scores of the records outside of the population."""
    kept = ~common
    if name == "loss":
        return loss_scores(losses_of(phi[kept]))
    if name not in ("calibrated_loss", "lira_online", "lira_offline", "rmia"):
        raise ValueError(f"There is no attack {name!r}.")
    if shadows is None:
        raise ValueError(f"The attack {name!r} needs `shadows`.")
    every, member = shadows.phi.cpu().double(), shadows.member.cpu()
    if name == "rmia":
        if not bool(common.any()):
            raise ValueError("The attack 'rmia' needs a `population`.")
        return rmia_offline(
            phi[kept].sigmoid(),
            every[:, kept].sigmoid(),
            member[:, kept],
            phi[common].sigmoid(),
            every[:, common].sigmoid(),
        )
    every, member = every[:, kept], member[:, kept]
    if name == "lira_online":
        return lira_online(phi[kept], every, member)
    if name == "lira_offline":
        return lira_offline(phi[kept], every, member)
    outside = ~member
    if bool((outside.sum(dim=0) == 0).any()):
        raise ValueError("The attack 'calibrated_loss' needs a shadow network trained without each record.")
    reference = torch.where(outside, losses_of(every), 0.0).sum(dim=0) / outside.sum(dim=0)
    return loss_scores(losses_of(phi[kept]), reference[None])


def _checked(mask: Tensor, number: int) -> Tensor:
    if mask.dtype != torch.bool or mask.shape != (number,):
        raise ValueError(
            f"A mask of records must be bool of shape ({number},), got {mask.dtype} of {tuple(mask.shape)}."
        )
    return mask
