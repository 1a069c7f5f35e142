"""Logits of a step and of the original model, as the methods of unlearning need them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from groundwire.callbacks.logits import LogitsSource
from groundwire.callbacks.step import Step
from groundwire.callbacks.unlearning.functional import counted
from groundwire.callbacks.unlearning.records import evaluating


@dataclass(frozen=True)
class Reading:
    """What a step on one part of a batch computed.

    Args:
        output: What the step returned.
        logits: Shape ``(B, C)``, or ``(B, T, C)`` for sequences, with their graph.
        labels: Class indices, ``(B,)`` or ``(B, T)``.
        inputs: What the network saw.
    """

    output: Any
    logits: Tensor
    labels: Tensor
    inputs: Any


def read_step(step: Step, batch: Any, pl_module: pl.LightningModule, source: LogitsSource) -> Reading | None:
    """Run a step, and read its logits.

    Args:
        step: The rest of the step.
        batch: Of one part.
        pl_module: The module.
        source: Where logits and labels are.

    Returns:
        The reading; None if the step returned None.

    Raises:
        MisconfigurationException: If the logits or labels cannot be found.
        ValueError: If they do not fit together.
        RuntimeError: If a logit is not finite (looked for in the first batch).
    """
    with source.open(pl_module) as calls:
        output = step(batch)
    if output is None:
        return None
    batch_inputs, labels = source.inputs_and_labels(batch)
    logits, labels = _prepared(source, source.logits(calls), labels)
    return Reading(output, logits, labels, source.inputs(calls, batch_inputs))


@torch.no_grad()
def original_logits(original: nn.Module, reading: Reading, source: LogitsSource) -> Tensor:
    """The logits of the original model for what the network saw in a step.

    Args:
        original: In evaluation mode.
        reading: Of the step.
        source: Where logits are.

    Returns:
        The shape of ``reading.logits``, without a graph.
    """
    found = raw_logits(original, reading.inputs, source)
    return _prepared(source, found, reading.labels, check=False)[0]


def raw_logits(module: nn.Module, inputs: Any, source: LogitsSource) -> Tensor:
    """What a module's ``forward`` gives where ``source`` looks."""
    with source.open(module) as calls:  # type: ignore[arg-type]  # a tap opens on any module
        module(inputs)
    return source.logits(calls)


def num_classes_of(outputs: Tensor, source: LogitsSource) -> int:
    """The number of classes, by the outputs' shape."""
    if source.binary:
        return 2
    return outputs.shape[1 if source.flatten else -1]


def count_errors(trainer: pl.Trainer, module: nn.Module, batches: Iterable[Any], source: LogitsSource) -> Tensor:
    """Count wrong predictions, in evaluation mode; positions whose label is -100 are left out.

    Args:
        trainer: Moves the batches.
        module: Gives the logits.
        batches: Inputs with labels.
        source: Where logits and labels are.

    Returns:
        Wrong predictions and labels that count, shape ``(2,)``, float64.
    """
    counts = torch.zeros(2, dtype=torch.float64)
    with evaluating(module), torch.no_grad():
        for batch in batches:
            moved = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
            inputs, labels = source.inputs_and_labels(moved)
            with trainer.precision_plugin.forward_context():
                found = raw_logits(module, inputs, source)
            logits, labels = _prepared(source, found, labels, check=False)
            asked = counted(labels)
            wrong = (logits.argmax(dim=-1) != labels) & asked
            counts += torch.tensor([int(wrong.sum()), int(asked.sum())])
    return counts


def _prepared(source: LogitsSource, logits: Tensor, labels: Tensor, check: bool = True) -> tuple[Tensor, Tensor]:
    """As ``LogitsSource.prepare``, but logits of three dimensions are those of sequences."""
    if logits.ndim != 3 or source.flatten:
        return source.prepare(logits, labels, check=check)
    if source.from_probs or source.binary:
        raise MisconfigurationException(
            f"Outputs of shape {list(logits.shape)} are taken as logits of sequences, for which from_probs and binary are "
            "not supported: name the submodule that gives the logits, LogitsSource('model.head')."
        )
    if labels.is_floating_point() or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"expected class indices {list(logits.shape[:2])} for logits of sequences {list(logits.shape)}, got shape "
            f"{list(labels.shape)} dtype {labels.dtype}."
        )
    return logits, labels
