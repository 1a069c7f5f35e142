"""Records in batches, given to models."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from groundwire.callbacks.logits import LogitsSource, logits_in
from groundwire.callbacks.unlearning.functional import counted_records

Records = tuple[Any, Tensor]
"""Inputs and labels, both with the records in their first dimension."""


def records_in(batches: Iterable[Any], source: LogitsSource, batch_size: int) -> Iterator[Records]:
    """Inputs and labels of batches; those of more than ``batch_size`` records come in parts.

    Records without a label that counts (all are -100) have no loss, and are left out.
    """
    for batch in batches:
        inputs, labels = source.inputs_and_labels(batch)
        kept = counted_records(labels)
        if not bool(kept.all()):
            inputs, labels = rows_of((inputs, labels), kept)
        for start in range(0, len(labels), batch_size):
            yield rows_of((inputs, labels), slice(start, start + batch_size))


def rows_of(records: Records, rows: slice | Tensor) -> Records:
    """Some of the records."""
    return pytree.tree_map(lambda part: part[rows], records[0]), records[1][rows]


def joined(batches: list[Records], what: str) -> Records:
    """All records as one batch."""
    leaves, spec = zip(*(pytree.tree_flatten(batch) for batch in batches), strict=True)
    try:
        whole = [torch.cat(parts) for parts in zip(*leaves, strict=True)]
    except RuntimeError as error:
        raise ValueError(f"The {what} records differ in shape: pad them to the same length.") from error
    found: Records = pytree.tree_unflatten(whole, spec[0])
    return found


def outputs_of(module: nn.Module, inputs: Any, source: LogitsSource) -> Tensor:
    """What a module gives for inputs, which are brought to its device and floating dtype; logits, where it gives such."""
    parameter = next(module.parameters(), None)

    def moved(value: Tensor) -> Tensor:
        if parameter is None:
            return value
        return value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)

    inputs = apply_to_collection(inputs, Tensor, moved)
    if source.submodule:
        with source.open(module) as calls:  # type: ignore[arg-type]  # any module will do
            module(inputs)
        return source.as_logits(source.logits(calls))
    found = logits_in(module(inputs))
    if found is None:
        raise MisconfigurationException(
            f"{type(module).__name__}.forward gives no tensor and nothing with `logits`. Name the submodule that gives "
            "the outputs, e.g. LogitsSource('model.head')."
        )
    return source.as_logits(found)


def hashes_of(inputs: Any) -> list[bytes]:
    """One hash a record, by which inputs are found again."""
    leaves = [leaf.detach().cpu().contiguous() for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    found = []
    for row in range(len(leaves[0]) if leaves else 0):
        digest = hashlib.blake2b(digest_size=16)
        for leaf in leaves:
            digest.update(leaf[row].reshape(-1).view(torch.uint8).numpy().tobytes())
        found.append(digest.digest())
    return found
