"""The training samples of any datamodule, as tensors, in their order and without a loader's shuffling."""

from __future__ import annotations

from typing import Any, TypeGuard

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
    default_convert,
)

Split = tuple[Tensor, Tensor]


def refuse_hooks(datamodule: pl.LightningDataModule, who: str) -> None:
    """Refuse hooks for which Lightning would ask the datamodule around, so that what the user wrote would never run.

    Args:
        datamodule: The one within.
        who: Name of the one around, for the message.

    Raises:
        MisconfigurationException: If it has one.
    """
    for hook in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"):
        if is_overridden(hook, datamodule):
            raise MisconfigurationException(
                f"{who} does not call {type(datamodule).__name__}.{hook}. Move it to the LightningModule, or into "
                "the dataset."
            )


def training_tensors(datamodule: pl.LightningDataModule, who: str) -> Split:
    """All training samples as one pair of tensors, whatever the datamodule keeps them in.

    Args:
        datamodule: Has been set up; its ``train_data`` is taken, else each sample of its train loader's dataset, once.
        who: Name of the datamodule that asks, for messages.

    Returns:
        Inputs and labels, row by row.

    Raises:
        MisconfigurationException: If they cannot be had.
    """
    name, data = type(datamodule).__name__, getattr(datamodule, "train_data", None)
    if not _is_pair(data):
        data = _all_samples(datamodule.train_dataloader(), name, who)
    if not _is_pair(data):
        raise MisconfigurationException(f"{who} needs (input, label) pairs of tensors from {name}.")
    return data[0], data[1]


def _is_pair(data: object) -> TypeGuard[Split]:
    return isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)


def _all_samples(loader: Any, name: str, who: str) -> Any:
    dataset = getattr(loader, "dataset", None)
    if dataset is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise MisconfigurationException(
            f"{who} needs {name}.train_dataloader() to have a `dataset` with a length that gives (input, label) "
            "pairs, or the datamodule to have `train_data = (inputs, labels)`."
        )
    for kind, plain in (("sampler", (SequentialSampler, RandomSampler)), ("batch_sampler", (BatchSampler,))):
        sampler = getattr(loader, kind, None)
        if sampler is not None and type(sampler) not in plain:  # it may leave out what is held out for validation
            raise MisconfigurationException(
                f"{who} takes the whole dataset of {name}.train_dataloader(), but its {kind} is a "
                f"{type(sampler).__name__}, which may choose among the samples. Give the dataset as a "
                "`torch.utils.data.Subset` instead."
            )
    collate = getattr(loader, "collate_fn", default_collate)
    if collate is default_convert:  # of a loader that does not batch
        collate = default_collate
    if isinstance(dataset, TensorDataset) and collate is default_collate:
        return dataset.tensors
    return collate([dataset[i] for i in range(len(dataset))])  # once, not every step
