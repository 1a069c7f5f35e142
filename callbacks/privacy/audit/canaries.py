"""Canaries: records made up for an audit, and their way into the training data."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)
from typing_extensions import override

from groundwire.plugins.random import stream

_PROBED_RECORDS = 64


class RecordFormat(NamedTuple):
    """What a record's input looks like, as plain values that fit into a checkpoint.

    Args:
        shape: Of an input.
        dtype: Its name, for example ``"float32"``.
        low: Smallest number that was seen in some records.
        high: Largest.
    """

    shape: tuple[int, ...]
    dtype: str
    low: float
    high: float


class Canaries(NamedTuple):
    """Made-up records, and the coins that say which of them are trained on.

    Args:
        x: Inputs, ``(m, ...)``.
        y: Labels, ``(m,)`` int64.
        included: Which are trained on, ``(m,)`` bool.
    """

    x: Tensor
    y: Tensor
    included: Tensor


def draw_canaries(number: int, form: RecordFormat, num_classes: int, seed: int) -> Canaries:
    """Canaries with random inputs and labels, each included by its own fair coin.

    Inputs are uniform between the smallest and the largest number of real ones. Nothing but the seed and the arguments
    decides, so the same canaries can be drawn again.

    Args:
        number: Canaries, at least 1.
        form: Of the inputs.
        num_classes: Labels are uniform in ``[0, num_classes)``.
        seed: Keep it secret from training.

    Returns:
        The canaries, on the CPU.

    Raises:
        ValueError: If there are no canaries, or fewer than 2 classes.

    Example:
        >>> canaries = draw_canaries(100, RecordFormat((3,), "float32", 0.0, 1.0), num_classes=10, seed=0)
        >>> canaries.x.shape, bool(40 < canaries.included.sum() < 60)
        (torch.Size([100, 3]), True)
    """
    if number < 1:
        raise ValueError(f"There must be at least 1 canary, got {number}.")
    if num_classes < 2:
        raise ValueError(f"`num_classes` must be at least 2, got {num_classes}.")
    coins, inputs, labels = (stream(seed, purpose=f"audit/{what}") for what in ("coins", "inputs", "labels"))
    dtype: torch.dtype = getattr(torch, form.dtype)
    shape = (number, *form.shape)
    if dtype.is_floating_point:
        x = torch.rand(shape, generator=inputs, dtype=torch.float64)
        x = (form.low + (form.high - form.low) * x).to(dtype)
    else:
        x = torch.randint(int(form.low), int(form.high) + 1, shape, generator=inputs).to(dtype)
    return Canaries(
        x=x,
        y=torch.randint(num_classes, (number,), generator=labels),
        included=torch.rand(number, generator=coins) < 0.5,
    )


def record_format(loader: Any) -> RecordFormat:
    """What the inputs of a train loader look like, from its first records.

    Args:
        loader: A DataLoader of a dataset with a length, or a loader whose ``split`` is a pair of tensors.

    Returns:
        The format.

    Raises:
        MisconfigurationException: If the loader is neither, has no record, or its records are not (tensor, class index).
    """
    if _is_tensor_loader(loader):
        x, y = loader.split
        records = [(x[i], y[i]) for i in range(min(len(x), _PROBED_RECORDS))]
    else:
        dataset = _dataset_of(loader)
        with torch.random.fork_rng(devices=[]):  # an augmentation may draw
            records = [dataset[i] for i in range(min(len(dataset), _PROBED_RECORDS))]
    if not records:
        raise MisconfigurationException("PrivacyAudit found no record in the training data.")
    for record in records:
        _check_record(record)
    inputs = torch.stack([record[0].detach().cpu() for record in records])
    low, high = inputs.aminmax()
    return RecordFormat(tuple(inputs.shape[1:]), str(inputs.dtype).removeprefix("torch."), low.item(), high.item())


def add_records(loader: Any, x: Tensor, y: Tensor) -> Any:
    """A loader that also gives the records ``(x, y)``, and is the same in all else.

    Args:
        loader: A DataLoader with an ordinary sampler, or a loader whose ``split`` is a pair of tensors.
        x: Inputs, ``(n, ...)``, shaped like the loader's.
        y: Class indices ``(n,)``.

    Returns:
        A new loader; the given one and its data are left as they are.

    Raises:
        MisconfigurationException: If the loader's order of records cannot be extended.
    """
    if _is_tensor_loader(loader):
        longer = copy.copy(loader)
        old_x, old_y = loader.split
        longer.split = (torch.cat([old_x, x.to(old_x)]), torch.cat([old_y, y.to(old_y)]))
        if hasattr(longer, "_order"):  # a shuffled order that it keeps, of fewer records
            longer._order = None
        return longer
    dataset = _dataset_of(loader)
    with torch.random.fork_rng(devices=[]):
        first = dataset[0]
    longer_dataset: ConcatDataset[Any] = ConcatDataset([dataset, _Records(x, y, first)])
    options: dict[str, Any] = {
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "generator": loader.generator,
        "prefetch_factor": loader.prefetch_factor,
        "persistent_workers": loader.persistent_workers,
    }
    return DataLoader(
        longer_dataset,
        batch_size=loader.batch_size,
        sampler=_longer_sampler(loader, longer_dataset),
        drop_last=loader.drop_last,
        **options,
    )


class _Records(Dataset[Any]):
    """Records whose container and labels are of the kind that the user's are, so that they can be collated together."""

    def __init__(self, x: Tensor, y: Tensor, like: Any) -> None:
        self.data = TensorDataset(x, y)
        self.container: type[Any] = type(like) if type(like) in (tuple, list) else tuple
        self.like = like[1]

    def __len__(self) -> int:
        return len(self.data)

    @override
    def __getitem__(self, index: int) -> Any:
        x, y = self.data[index]
        label = y.to(self.like).reshape(self.like.shape) if isinstance(self.like, Tensor) else type(self.like)(int(y))
        return self.container((x, label))


def _is_tensor_loader(loader: Any) -> bool:
    split = getattr(loader, "split", None)
    return isinstance(split, tuple) and len(split) == 2 and all(isinstance(part, Tensor) for part in split)


def _dataset_of(loader: Any) -> Any:
    """The map-style dataset of a DataLoader."""
    if type(loader) is not DataLoader:  # a subclass may do more than can be built again
        raise MisconfigurationException(
            f"PrivacyAudit cannot add canaries to a {type(loader).__name__}: give the Trainer a torch DataLoader, or a "
            "datamodule that keeps its data as two tensors. If another callback replaces the loader, list PrivacyAudit "
            "before it."
        )
    dataset = loader.dataset
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise MisconfigurationException(
            f"PrivacyAudit needs training data with a length, but {type(dataset).__name__} is a stream: use a map-style "
            "dataset (`__len__` and `__getitem__`)."
        )
    return dataset


def _check_record(record: Any) -> None:
    wanted = "PrivacyAudit needs records (x, y) of a tensor and a class index"
    if not isinstance(record, tuple | list) or len(record) != 2:
        what = f"a {type(record).__name__} of {len(record)}" if hasattr(record, "__len__") else type(record).__name__
        raise MisconfigurationException(f"{wanted}, got {what}.")
    x, y = record
    if not isinstance(x, Tensor):
        raise MisconfigurationException(f"{wanted}, but x is a {type(x).__name__}: convert it in the dataset.")
    if x.dtype == torch.bool or x.is_complex():
        raise MisconfigurationException(f"{wanted}, but x is {x.dtype}: convert it to floats or integers.")
    if isinstance(y, Tensor):
        is_index = y.numel() == 1 and not y.is_floating_point() and not y.is_complex()
    else:
        is_index = hasattr(y, "__index__")
    if not is_index:
        raise MisconfigurationException(
            f"{wanted}, but y is {y.dtype if isinstance(y, Tensor) else type(y).__name__}"
            f"{f' of shape {tuple(y.shape)}' if isinstance(y, Tensor) else ''}: only classification can be audited."
        )


def _longer_sampler(loader: DataLoader[Any], dataset: Dataset[Any]) -> Any:
    sampler: Any = loader.sampler
    if type(loader.batch_sampler) is BatchSampler:
        if type(sampler) is SequentialSampler:
            return SequentialSampler(dataset)  # type: ignore[arg-type]  # it has a length
        if type(sampler) is RandomSampler:
            return RandomSampler(
                dataset,  # type: ignore[arg-type]
                replacement=sampler.replacement,
                num_samples=None if sampler.num_samples == len(sampler.data_source) else sampler.num_samples,
                generator=sampler.generator,
            )
        if type(sampler) is DistributedSampler:
            return DistributedSampler(
                dataset,
                num_replicas=sampler.num_replicas,
                rank=sampler.rank,
                shuffle=sampler.shuffle,
                seed=sampler.seed,
                drop_last=sampler.drop_last,
            )
    raise MisconfigurationException(
        f"PrivacyAudit cannot tell how a {type(sampler).__name__} in a {type(loader.batch_sampler).__name__} would draw the "
        "canaries: use `shuffle` and `batch_size` of DataLoader instead."
    )
