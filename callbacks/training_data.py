"""The training samples of any datamodule by their rows, in their order and without a loader's shuffling."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import lightning.pytorch as pl
import torch
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
_CHUNK = 128  # items of a data set that are in memory at once, where they are only hashed


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


class TrainingSamples:
    """Training samples by their rows. Nothing is read but the rows that are asked for; see :func:`training_samples`.

    Args:
        data: Inputs and labels, or a data set with a length that gives its items by number.
        collate: Makes inputs and labels of a list of such items; not used for tensors.
        trained_on: Rows that a model is trained on, shape ``(k,)``, int64, ascending; None for all.
        refusal: What to say if the items are no pairs of tensors.

    Attributes:
        trained_on: The same; all rows if it was None.
        labels: Of all rows, where the data are tensors; None where samples would have to be read for them.

    Raises:
        MisconfigurationException: If there are not as many labels as inputs.

    Example:
        >>> samples = TrainingSamples((torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0, 1, 0])))
        >>> samples.fetch(torch.tensor([2, 0]))
        (tensor([[3.],
                [1.]]), tensor([0, 0]))
    """

    def __init__(
        self,
        data: Any,
        collate: Callable[[list[Any]], Any] = default_collate,
        trained_on: Tensor | None = None,
        refusal: str = "Training samples must be (input, label) pairs of tensors.",
    ) -> None:
        self._tensors: Split | None = (data[0], data[1]) if _is_pair(data) else None
        self._items = data
        self._collate = collate
        self._refusal = refusal
        if self._tensors is not None and len(data[0]) != len(data[1]):
            raise MisconfigurationException(f"{refusal} There are {len(data[0])} inputs and {len(data[1])} labels.")
        self.labels = None if self._tensors is None else self._tensors[1]
        self.trained_on = torch.arange(len(self)) if trained_on is None else trained_on

    def __len__(self) -> int:
        """Rows of the training data."""
        return len(self._items if self._tensors is None else self._tensors[1])

    def fetch(self, rows: Tensor) -> Split:
        """Inputs and labels of some rows, and of no others.

        Args:
            rows: Shape ``(k,)``, int64, each in ``[0, len(self))``, in any order; of a data set at least one.

        Returns:
            Inputs ``(k, ...)`` and labels ``(k, ...)``.

        Raises:
            ValueError: If no row of a data set is asked for: what its items are like cannot be told then.
            MisconfigurationException: If the items of the data set are no pairs of tensors.
        """
        if self._tensors is not None:
            return self._tensors[0][rows], self._tensors[1][rows]
        if not len(rows):
            raise ValueError("`rows` must name at least one sample of a data set, got none.")
        batch = self._collate([self._items[i] for i in rows.tolist()])
        if not _is_pair(batch) or not len(batch[0]) == len(batch[1]) == len(rows):
            raise MisconfigurationException(self._refusal)
        return batch[0], batch[1]

    def fetch_all(self) -> Split:
        """Inputs and labels of all rows, in their order; tensors are given as they are, without a copy."""
        return self._tensors if self._tensors is not None else self.fetch(torch.arange(len(self)))

    def row_digests(self, rows: Tensor) -> Tensor:
        """A hash of each sample, by which it is known again: BLAKE2b of its dtypes, shapes and bytes.

        An item of a data set is hashed as it is alone in a batch, so that padding to the others' length does not matter.

        Args:
            rows: Shape ``(k,)``, int64, each in ``[0, len(self))``, in any order.

        Returns:
            Shape ``(k, 16)``, uint8.
        """
        digests = [one for x, y in self._chunks(rows) for one in _digests(x, y)]
        return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(-1, 16) if digests else _NONE

    def digest(self) -> str:
        """SHA-256 of the hashes of all rows, in hexadecimal digits; all samples are read for it."""
        return hashlib.sha256(self.row_digests(torch.arange(len(self))).numpy().tobytes()).hexdigest()

    def _chunks(self, rows: Tensor) -> Iterator[Split]:
        alone = self._tensors is None and self._collate is not default_collate
        for some in torch.split(rows, 1 if alone else _CHUNK):
            if len(some):
                yield self.fetch(some)


_NONE = torch.empty(0, 16, dtype=torch.uint8)


def _digests(x: Tensor, y: Tensor) -> Iterator[bytes]:
    head = hashlib.blake2b(f"{x.dtype}{tuple(x.shape[1:])}{y.dtype}{tuple(y.shape[1:])}".encode(), digest_size=16)
    for sample, label in zip(_bytes(x), _bytes(y), strict=True):
        digest = head.copy()
        digest.update(sample)
        digest.update(label)
        yield digest.digest()


def _bytes(values: Tensor) -> list[memoryview]:
    """The bytes of each row."""
    flat = values.detach().cpu().contiguous().reshape(len(values), math.prod(values.shape[1:]))
    return [memoryview(row) for row in flat.view(torch.uint8).numpy()]


def training_samples(datamodule: Any, who: str) -> TrainingSamples:
    """The training samples by row, whatever keeps them; none is read yet.

    Args:
        datamodule: Has been set up, or anything with a ``train_dataloader()``, or a train loader. Its ``train_data``
            is taken, else the train loader's dataset. Of data that is split over devices (with ``datamodule`` and
            ``partition``, as ``Federated``) it is the data within, and the devices' samples are those trained on.
        who: Name of the one that asks, for messages.

    Returns:
        The samples.

    Raises:
        MisconfigurationException: If they cannot be had.
    """
    trained_on = None
    if hasattr(datamodule, "datamodule") and hasattr(datamodule, "partition"):
        trained_on = datamodule.partition.indices.sort().values
        datamodule = datamodule.datamodule
    name, data = type(datamodule).__name__, getattr(datamodule, "train_data", None)
    refusal = f"{who} needs (input, label) pairs of tensors from {name}."
    if _is_pair(data):
        return TrainingSamples(data, trained_on=trained_on, refusal=refusal)
    is_loader = not hasattr(datamodule, "train_dataloader")
    loader = datamodule if is_loader else datamodule.train_dataloader()
    dataset, collate = _dataset(loader, f"the {name}" if is_loader else f"{name}.train_dataloader()", who)
    if type(dataset) is TensorDataset and collate is default_collate:
        dataset = dataset.tensors
        if not _is_pair(dataset):
            raise MisconfigurationException(refusal)
    return TrainingSamples(dataset, collate, trained_on, refusal)


def training_tensors(datamodule: Any, who: str) -> Split:
    """All training samples as one pair of tensors: of :func:`training_samples`, which see.

    Args:
        datamodule: Has been set up.
        who: Name of the one that asks, for messages.

    Returns:
        Inputs and labels, row by row.
    """
    return training_samples(datamodule, who).fetch_all()


def _is_pair(data: object) -> TypeGuard[Split]:
    return isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)


def _dataset(loader: Any, name: str, who: str) -> tuple[Any, Callable[[list[Any]], Any]]:
    """The data set of a loader that serves all of it, and what makes a batch of its items."""
    dataset = getattr(loader, "dataset", None)
    if dataset is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise MisconfigurationException(
            f"{who} needs {name} to have a `dataset` with a length that gives (input, label) "
            "pairs, or the datamodule to have `train_data = (inputs, labels)`."
        )
    for kind, plain in (("sampler", (SequentialSampler, RandomSampler)), ("batch_sampler", (BatchSampler,))):
        sampler = getattr(loader, kind, None)
        if sampler is not None and type(sampler) not in plain:  # it may leave out what is held out for validation
            raise MisconfigurationException(
                f"{who} takes the whole dataset of {name}, but its {kind} is a "
                f"{type(sampler).__name__}, which may choose among the samples. Give the dataset as a "
                "`torch.utils.data.Subset` instead."
            )
    collate = getattr(loader, "collate_fn", default_collate)
    return dataset, default_collate if collate is default_convert else collate  # convert: a loader that does not batch
