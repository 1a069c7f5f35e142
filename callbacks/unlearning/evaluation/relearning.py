"""The relearning attack: how soon is what was forgotten back?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from groundwire.callbacks.logits import LogitsSource
from groundwire.callbacks.unlearning.evaluation.batches import Records, joined, outputs_of, records_in, rows_of
from groundwire.callbacks.unlearning.evaluation.functional import record_accuracies, record_losses
from groundwire.callbacks.unlearning.records import OutputLoss, evaluating
from groundwire.callbacks.weights import copy_of
from groundwire.plugins.random import stream


@dataclass(frozen=True, kw_only=True)
class RelearningCurve:
    """What a model knows of the forget set while it is trained on it again.

    Args:
        losses: Mean loss on the forget set after 0, 1, 2, ... steps.
        accs: Its accuracy; None where labels are values.
        target_loss: At which, or below, the records count as known again; None for no such target.
        target_acc: At which, or above, they do; None for no such target.
        lr: Learning rate of Adam.

    Example:
        >>> curve = RelearningCurve(losses=(2.0, 0.9, 0.4), accs=(0.1, 0.8, 0.9), target_loss=0.5, target_acc=0.75)
        >>> curve.loss_steps, curve.acc_steps
        (2.0, 1.0)
    """

    losses: tuple[float, ...]
    accs: tuple[float, ...] | None
    target_loss: float | None = None
    target_acc: float | None = None
    lr: float = 1e-3

    @property
    def loss_steps(self) -> float | None:
        """Steps to the target loss; infinite if it was not reached, None if there is none."""
        if self.target_loss is None:
            return None
        return next((float(step) for step, loss in enumerate(self.losses) if loss <= self.target_loss), math.inf)

    @property
    def acc_steps(self) -> float | None:
        """Steps to the target accuracy; infinite if it was not reached, None if there is none."""
        if self.target_acc is None or self.accs is None:
            return None
        return next((float(step) for step, acc in enumerate(self.accs) if acc >= self.target_acc), math.inf)

    @property
    def is_over(self) -> bool:
        """Whether there is a target, and all that there are were reached."""
        steps = [steps for steps in (self.loss_steps, self.acc_steps) if steps is not None]
        return bool(steps) and max(steps) < math.inf


def relearning_curve(
    module: nn.Module,
    forget: Iterable[Any],
    *,
    target_loss: float | None = None,
    target_acc: float | None = None,
    data: Iterable[Any] | None = None,
    fraction: float = 1.0,
    num_steps: int = 60,
    lr: float = 1e-3,
    step_size: int | None = None,
    batch_size: int = 500,
    output_loss: OutputLoss | None = None,
    source: LogitsSource | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> RelearningCurve:
    """Train a copy of a model on the forget set with plain Adam, and see how soon it knows the set again.

    Far fewer steps than a model needs that was retrained without the set mean that knowledge was hidden, not removed; far
    more mean that the model was damaged. It ends when all targets that are given are reached.

    The copy stays in evaluation mode (no dropout, BatchNorm on its running statistics), so that nothing is random but
    what ``seed`` decides. Parameters that are frozen stay so, unless all of them are.

    Args:
        module: Attacked; it is not changed.
        forget: Batches of the forget set, on which the curve is measured.
        target_loss: At which, or below, mean forget loss the attack has succeeded. For any kind of records: the original
            model's forget loss.
        target_acc: At which, or above, forget accuracy it has. For a forgotten class: 0.9 of the original model's
            accuracy. Random records are mostly classified right even by a model that never saw them.
        data: What the attacker trains on; by default the forget set.
        fraction: Share of it that the attacker has, in (0, 1], chosen by ``seed``; at least one record.
        num_steps: Steps after which to give up.
        lr: Learning rate.
        step_size: Records a step, in an order that ``seed`` decides; None for all of them in every step.
        batch_size: Records given to the model at once, which changes rounding only.
        output_loss: Of one record; by default cross-entropy, or the squared error for labels that are values.
        source: Where inputs, labels and outputs are found.
        seed: Of the attacker's choices.
        progress: Called with the number of steps taken.

    Returns:
        Losses and accuracies, at least those of the model as it is.

    Raises:
        ValueError: If a number is out of range, or there is no record.

    Example:
        >>> batches = [(torch.eye(2), torch.tensor([0, 1]))]
        >>> curve = relearning_curve(nn.Linear(2, 2), batches, target_acc=1.0, lr=0.1)
        >>> curve.acc_steps < 60
        True

    Reference:
        Golatkar, Achille, Soatto, "Eternal Sunshine of the Spotless Net", CVPR 2020 (relearn time to the original's
        loss). arXiv:1911.04933. Tarun et al., "Fast Yet Effective Machine Unlearning", 2021 (to its accuracy, with a
        margin). arXiv:2111.08947
    """
    _check(fraction, num_steps, lr, step_size, batch_size)
    source = source or LogitsSource()
    known = _records(forget, source, batch_size, "forget")
    attack = known if data is None else _records(data, source, batch_size, "relearning")
    attack = _share_of(attack, fraction, seed)
    measured_in_step = data is None and fraction == 1 and step_size is None
    net = copy_of(module)
    if not any(p.requires_grad for p in net.parameters()):
        net.requires_grad_(True)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=lr)
    losses: list[float] = []
    accs: list[float] = []
    with torch.inference_mode(False), evaluating(net):
        for step in range(num_steps + 1):
            is_last = step == num_steps
            with torch.set_grad_enabled(measured_in_step and not is_last):
                optimizer.zero_grad()
                loss, acc = _pass(net, known, batch_size, output_loss, source)
            losses.append(loss)
            if acc is not None:
                accs.append(acc)
            curve = RelearningCurve(
                losses=tuple(losses),
                accs=tuple(accs) if accs else None,
                target_loss=target_loss,
                target_acc=target_acc,
                lr=lr,
            )
            if progress is not None:
                progress(step)
            if is_last or curve.is_over:
                break
            if not measured_in_step:
                with torch.enable_grad():
                    _pass(net, _of_step(attack, step_size, step, seed), batch_size, output_loss, source)
            optimizer.step()
    return curve


def _check(fraction: float, num_steps: int, lr: float, step_size: int | None, batch_size: int) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(f"`fraction` must be in (0, 1], got {fraction}.")
    if not lr > 0:
        raise ValueError(f"`lr` must be above 0, got {lr}.")
    for name, value, least in (("num_steps", num_steps, 0), ("step_size", step_size, 1), ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")


def _records(batches: Iterable[Any], source: LogitsSource, batch_size: int, what: str) -> Records:
    found = list(records_in(batches, source, batch_size))
    if not found:
        raise ValueError(f"There is no {what} record: give at least one batch.")
    return joined(found, what)


def _share_of(records: Records, fraction: float, seed: int) -> Records:
    number = len(records[1])
    if fraction == 1:
        return records
    order = torch.randperm(number, generator=stream(seed, purpose="unlearning/relearn/share"))
    rows = order[: max(1, round(fraction * number))].sort().values
    return rows_of(records, rows.to(records[1].device))


def _of_step(records: Records, step_size: int | None, step: int, seed: int) -> Records:
    """The records of a step: passes over all of them, each in an order of its own."""
    number = len(records[1])
    if step_size is None or step_size >= number:
        return records
    epoch, index = divmod(step, -(-number // step_size))
    order = torch.randperm(number, generator=stream(seed, purpose="unlearning/relearn/order", round=epoch))
    return rows_of(records, order[index * step_size : (index + 1) * step_size].to(records[1].device))


def _pass(
    net: nn.Module, records: Records, batch_size: int, output_loss: OutputLoss | None, source: LogitsSource
) -> tuple[float, float | None]:
    """Mean loss and accuracy; where gradients are enabled, that of the mean loss is added to the parameters' own."""
    number = len(records[1])
    total = 0.0
    right: list[Tensor] = []
    for start in range(0, number, batch_size):
        inputs, labels = rows_of(records, slice(start, start + batch_size))
        outputs = outputs_of(net, inputs, source)
        labels = labels.to(outputs.device)
        losses = record_losses(outputs, labels, output_loss)
        if torch.is_grad_enabled():
            (losses.sum() / number).backward()  # type: ignore[no-untyped-call]
        total += float(losses.detach().double().sum())
        accs = record_accuracies(outputs.detach(), labels)
        if accs is not None:
            right.append(accs)
    return total / number, float(torch.cat(right).mean()) if right else None
