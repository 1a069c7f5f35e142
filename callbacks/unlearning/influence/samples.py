"""The Trainer's data as samples by number: in the order of the data set, without shuffling or augmentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeGuard

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DistributedSampler, RandomSampler, SequentialSampler, default_collate, default_convert

from groundwire.callbacks.unlearning.data import ForgetRetainData, tells_what_to_forget

Pair = tuple[Tensor, Tensor]
_PROBED = 8  # samples that are read twice, to see whether they are the same
_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Samples by number.

    Args:
        number: How many.
        read: From positions, from 0, to a batch of the samples there.
        ids: Their rows in the data that they were taken from, shape ``(number,)``, int64; None for ``0, 1, 2, ...``.
    """

    number: int
    read: Callable[[Sequence[int]], Any]
    ids: Tensor | None = None

    def batches(self, batch_size: int) -> Iterator[Any]:
        """All of them in order."""
        for start in range(0, self.number, batch_size):
            yield self.read(range(start, min(start + batch_size, self.number)))


def samples_of(data: Any, name: str) -> Samples:
    """Samples of whatever holds some.

    Args:
        data: A pair of tensors ``(inputs, labels)``, a loader whose ``split`` is such a pair, a DataLoader, or a data set
            with a length.
        name: What it is, for messages.

    Returns:
        The samples.

    Raises:
        MisconfigurationException: If it is neither, its sampler may choose among the samples, or samples differ when they
            are read again.
    """
    pair = data if _is_pair(data) else getattr(data, "split", None)
    if _is_pair(pair):
        inputs, labels = pair
        return Samples(number=len(labels), read=lambda rows: (inputs[list(rows)], labels[list(rows)]))
    if isinstance(data, list | tuple | dict):
        raise MisconfigurationException(
            f"The {name} is a {type(data).__name__}, not one source of samples: say which are meant by "
            f"`{name.split()[0]}_data`, a pair of tensors or a data set."
        )
    dataset, collate = getattr(data, "dataset", data), getattr(data, "collate_fn", None) or default_collate
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise MisconfigurationException(
            f"The samples of the {name} cannot be read by number: it is a {type(data).__name__}. Give "
            f"`{name.split()[0]}_data`, a pair of tensors or a data set with a length."
        )
    sampler = getattr(data, "sampler", None)
    if sampler is not None and not isinstance(sampler, SequentialSampler | RandomSampler | DistributedSampler):
        raise MisconfigurationException(
            f"The {name} has a {type(sampler).__name__}, which may choose among the samples: give the data set as a "
            "`torch.utils.data.Subset` instead."
        )
    collate = default_collate if collate is default_convert else collate  # of a loader that does not batch
    samples = Samples(number=len(dataset), read=lambda rows: collate([dataset[i] for i in rows]))
    _refuse_augmentation(samples, name)
    return samples


def training_samples(trainer: pl.Trainer, given: Any = None) -> Samples:
    """What the Trainer trains on.

    Args:
        trainer: Has set up its data.
        given: Data to take instead.

    Returns:
        The datamodule's ``train_data``, where that is a pair of tensors, else the train loader's data set; of
        ``ForgetRetain`` the retained samples.

    Raises:
        MisconfigurationException: If they cannot be had in order, as the network sees them, or are retained data that is
            gone.
    """
    if given is not None:
        return samples_of(given, "train data")
    _refuse_hooks(trainer, "train_data")
    datamodule = getattr(trainer, "datamodule", None)
    if tells_what_to_forget(datamodule):
        return _retained(datamodule)
    data = getattr(datamodule, "train_data", None)
    if not _is_pair(data):
        data = trainer.train_dataloader
        if data is None:  # no step was to be taken
            source = trainer.fit_loop._data_source
            data = source.dataloader() if source.is_defined() else None
    return samples_of(data, "train loader")


def _retained(data: ForgetRetainData) -> Samples:
    """The retained samples, under their rows in the training data; they are read when the first is asked for."""
    ids = data.retain_indices  # raises where they must not be touched

    @cache
    def pair() -> Pair:
        inputs, labels = zip(*data.batches("retain"), strict=True)
        return torch.cat(inputs), torch.cat(labels)

    return Samples(number=len(ids), read=lambda rows: (pair()[0][list(rows)], pair()[1][list(rows)]), ids=ids)


def samples_to_explain(
    trainer: pl.Trainer, given: Any = None
) -> tuple[Samples, Literal["given", "test", "validation"]]:
    """What the Trainer would test on; the validation data where there is none.

    Args:
        trainer: Has set up its data.
        given: Data to take instead.

    Returns:
        The samples, and what they are.

    Raises:
        MisconfigurationException: If there are none, or they cannot be had in order, as the network sees them.
    """
    if given is not None:
        return samples_of(given, "test data"), "given"
    _refuse_hooks(trainer, "test_data")
    datamodule: Any = getattr(trainer, "datamodule", None)
    if _is_pair(data := getattr(datamodule, "test_data", None)):
        return samples_of(data, "test loader"), "test"
    if datamodule is not None and is_overridden("test_dataloader", datamodule):
        datamodule.setup("test")
        return samples_of(datamodule.test_dataloader(), "test loader"), "test"
    if is_overridden("test_dataloader", trainer.lightning_module):
        return samples_of(trainer.lightning_module.test_dataloader(), "test loader"), "test"
    loaders = trainer.val_dataloaders
    if loaders is None:  # not yet needed, or no validation was to be run
        source = trainer.fit_loop.epoch_loop.val_loop._data_source
        loaders = source.dataloader() if source.is_defined() else None
    if loaders is None or loaders == []:
        raise MisconfigurationException(
            "There are no test samples to explain: give `test_data`, a pair of tensors or a data set, or a validation "
            "loader."
        )
    first = loaders[0] if isinstance(loaders, list | tuple) and not _is_pair(loaders) else loaders
    return samples_of(first, "test loader"), "validation"


def _is_pair(data: object) -> TypeGuard[Pair]:
    return isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)


def _refuse_hooks(trainer: pl.Trainer, argument: str) -> None:
    for owner in (trainer.lightning_module, getattr(trainer, "datamodule", None)):
        for hook in _HOOKS:
            if owner is not None and is_overridden(hook, owner):
                raise MisconfigurationException(
                    f"{type(owner).__name__}.{hook} changes batches on their way to the network, perhaps at random, and "
                    f"samples are read without it here: give `{argument}` as the network sees it without augmentation."
                )


def _refuse_augmentation(samples: Samples, name: str) -> None:
    rows = range(min(_PROBED, samples.number))
    if not rows:
        return
    with torch.random.fork_rng(devices=[]):
        first, again = (pytree.tree_leaves(samples.read(rows)) for _ in range(2))
    same = all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else True
        for a, b in zip(first, again, strict=True)
    )
    if not same:
        raise MisconfigurationException(
            f"The samples of the {name} differ when they are read again: its data set draws an augmentation. Give "
            f"`{name.split()[0]}_data`, the same data set without it."
        )
