"""Loaders that resume exactly, and datamodules that keep each split as one pair of tensors."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Generic, Literal, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.random import root_seed, stream

Batch = TypeVar("Batch")
Split = tuple[Tensor, Tensor]
"""Inputs ``(n, ...)`` and targets ``(n, ...)``; of classification, float32 and labels ``(n,)``, int64."""
OmitIn = Literal["train", "all"]
"""Which splits lack the classes of ``omit_classes``."""


class ResumableLoader(ABC, Generic[Batch]):
    """A loader whose batch depends only on the epoch and its number in it, so that a resumed run sees the same ones.

    It counts its epochs itself, one for each iteration begun: what Lightning tells a sampler after a resume counts an
    epoch twice if the checkpoint was written in its last step. What only the Trainer knows, it is told by the
    datamodule.
    """

    def __init__(self) -> None:
        self.limit: Callable[[], float] = lambda: math.inf  # batches of an epoch that are used
        self.unfinished: Callable[[], int] = lambda: 0  # batches given out whose step is not done
        self.repeats = False  # the same batches every epoch
        self._epoch, self._position = -1, 0  # the epoch begun last, and how many of its batches were given out
        self._resume: tuple[int, int] | None = None  # where the next iteration begins, if not with a new epoch

    @abstractmethod
    def __len__(self) -> int:
        """Batches an epoch."""

    @abstractmethod
    def batch(self, epoch: int, index: int) -> Batch:
        """Batch ``index`` of ``epoch``, both from 0."""

    def __iter__(self) -> Iterator[Batch]:
        (self._epoch, start), self._resume = self._resume or (self._epoch + 1, 0), None
        for index in range(start, len(self)):
            self._position = index + 1
            yield self.batch(0 if self.repeats else self._epoch, index)

    def state_dict(self) -> dict[str, int]:
        """Epoch and number of the first batch whose step is not done."""
        epoch, position = self._resume or (self._epoch, self._position - self.unfinished())
        if self._resume is None and (epoch < 0 or position >= min(len(self), self.limit())):
            epoch, position = epoch + 1, 0
        return {"epoch": epoch, "position": position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration go on from where another loader stopped."""
        self._resume = state["epoch"], state["position"]


class ResumableDataModule(pl.LightningDataModule):
    """A datamodule whose training data goes on where a checkpoint says, within an epoch or at its end.

    Subclasses write :meth:`make_train_loader`, and call ``super()`` where they extend the methods here.
    """

    def __init__(self) -> None:
        super().__init__()
        self._loader: ResumableLoader[Any] | None = None
        self._progress: dict[str, int] | None = None

    @abstractmethod
    def make_train_loader(self) -> ResumableLoader[Any]:
        """A fresh loader of the training data."""

    @override
    def setup(self, stage: str | None = None) -> None:
        if stage in (None, "fit"):  # a new run begins, unless a checkpoint is loaded now
            self._loader = self._progress = None

    @override
    def train_dataloader(self) -> ResumableLoader[Any]:
        loader = self.make_train_loader()
        if self.trainer is not None:
            trainer = self.trainer
            loader.limit = lambda: trainer.num_training_batches
            loader.unfinished = lambda: _unfinished_steps(trainer)
            loader.repeats = trainer.overfit_batches > 0  # type: ignore[attr-defined]
        progress = self._progress if self._loader is None else self._loader.state_dict()
        if progress is not None:
            loader.load_state_dict(progress)
        self._loader = loader
        return loader

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"progress": self._loader.state_dict() if self._loader is not None else self._progress}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._progress = state_dict["progress"]
        if self._loader is not None and self._progress is not None:
            self._loader.load_state_dict(self._progress)


def _unfinished_steps(trainer: pl.Trainer) -> int:
    """1 while a training step runs or after it failed, else 0."""
    current: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return int(current.ready - current.processed)


class TensorLoader(ResumableLoader[Split]):
    """Batches of two tensors, taken by one indexing operation each: no work per sample.

    Args:
        split: Inputs and labels.
        batch_size: Samples a batch and process.
        shuffle: Draw a new order every epoch; it depends on the seed and the epoch alone.
        seed: Root seed of the order.
        drop_last: Leave out a last batch that is smaller.
        rank: Number of this process: it takes every ``num_ranks``-th sample of the order.
        num_ranks: Processes that share the data. With ``shuffle``, all get equally many samples.

    Raises:
        ValueError: If ``batch_size`` is below 1, or above the number of samples with ``drop_last``.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        super().__init__()
        samples = len(split[0])
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        if drop_last and batch_size * num_ranks > samples:
            raise ValueError(f"`batch_size` is {batch_size}, but there are only {samples // num_ranks} samples.")
        self.split = split
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.rank = rank
        self.num_ranks = num_ranks
        self._order: tuple[int, Tensor] | None = None

    @property
    def num_samples(self) -> int:
        """Samples of this process in an epoch."""
        samples = len(self.split[0])
        return samples // self.num_ranks if self.shuffle else len(range(self.rank, samples, self.num_ranks))

    @override
    def __len__(self) -> int:
        return self.num_samples // self.batch_size if self.drop_last else -(-self.num_samples // self.batch_size)

    @override
    def batch(self, epoch: int, index: int) -> Split:
        start, stop = index * self.batch_size, min((index + 1) * self.batch_size, self.num_samples)
        part = slice(start * self.num_ranks + self.rank, (stop - 1) * self.num_ranks + self.rank + 1, self.num_ranks)
        if not self.shuffle:
            return self.split[0][part], self.split[1][part]
        if self._order is None or self._order[0] != epoch:
            generator = stream(self.seed, purpose="data/order", round=epoch)
            self._order = (epoch, torch.randperm(len(self.split[0]), generator=generator))
        rows = self._order[1][part]
        return self.split[0][rows], self.split[1][rows]


class TensorDataModule(ResumableDataModule, ABC):
    """Data that fits into memory: each split is one pair of tensors.

    Subclasses write :meth:`load`. Training batches are shuffled by the seed and the epoch, so that a resumed run sees
    the order that an uninterrupted one does; a checkpoint of another seed brings its splits with it, unless this
    datamodule was given a seed.

    Args:
        batch_size: Samples a batch, in all splits.
        seed: Root seed of splits and order; by default that of ``seed_everything``, else 0.
        drop_last: Leave out a last training batch that is smaller, for strategies that split a batch evenly.

    Raises:
        ValueError: If ``batch_size`` is below 1.
    """

    def __init__(self, batch_size: int, seed: int | None, drop_last: bool) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        self.batch_size = batch_size
        self.seed = seed
        self.drop_last = drop_last
        self.train_data: Split
        self.val_data: Split
        self.test_data: Split
        self._is_ready = False
        self._loaded_seed = 0

    @abstractmethod
    def load(self, seed: int) -> tuple[Split, Split, Split]:
        """Training, validation and test data."""

    @override
    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        if not self._is_ready:
            self._load(root_seed(self.seed))

    def _load(self, seed: int) -> None:
        self.train_data, self.val_data, self.test_data = self._selected(self.load(seed), seed)
        self._loaded_seed = seed
        self._is_ready = True

    def _selected(self, splits: tuple[Split, Split, Split], seed: int) -> tuple[Split, Split, Split]:
        """What is used of the loaded data: all of it."""
        return splits

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"seed": self._loaded_seed if self._is_ready else None}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        seed = state_dict["seed"]
        if seed is None or not self._is_ready or seed == self._loaded_seed:
            return
        if self.seed is not None:
            raise MisconfigurationException(
                f"The checkpoint was written with {type(self).__name__}(seed={seed}), and this one has "
                f"seed={self.seed}: the splits would differ. Resume with the same seed."
            )
        self._load(seed)

    @override
    def make_train_loader(self) -> TensorLoader:
        return self._loader_of(self.train_data, shuffle=True, seed=self._loaded_seed, drop_last=self.drop_last)

    @override
    def val_dataloader(self) -> TensorLoader:
        return self._loader_of(self.val_data)

    @override
    def test_dataloader(self) -> TensorLoader:
        return self._loader_of(self.test_data)

    @override
    def predict_dataloader(self) -> TensorLoader:
        return self._loader_of(self.test_data)

    def _loader_of(
        self, split: Split, *, shuffle: bool = False, seed: int = 0, drop_last: bool = False
    ) -> TensorLoader:
        rank, num_ranks = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        return TensorLoader(
            split,
            self.batch_size,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
            rank=rank,
            num_ranks=num_ranks,
        )


class TensorClassification(TensorDataModule):
    """Classification data that fits into memory: each split is one pair of tensors.

    Subclasses write :meth:`load`, and set ``num_classes`` as a class attribute.

    The training split can be made few-shot or zero-shot; validation and test data keep all samples. The subset depends
    on the seed alone, keeps the order of the samples, and for one seed a smaller fraction is part of a larger one.

    Args:
        batch_size: Samples a batch, in all splits.
        seed: Root seed of splits and order; by default that of ``seed_everything``, else 0.
        drop_last: Leave out a last training batch that is smaller, for strategies that split a batch evenly.
        train_fraction: Share of the training samples of every class to keep, in (0, 1]; rounded, at least one a class.
        omit_classes: Classes without a training sample, each in ``[0, num_classes)``; None for no such class.
        omit_in: ``"train"`` leaves validation and test data as they are, ``"all"`` omits the classes there, too.

    Raises:
        ValueError: If ``batch_size`` is below 1, ``train_fraction`` or a class is out of range, or no class remains;
            at setup, if no training sample remains.
    """

    num_classes: int
    input_shape: tuple[int, ...]

    def __init__(
        self,
        batch_size: int,
        seed: int | None,
        drop_last: bool,
        train_fraction: float = 1.0,
        omit_classes: list[int] | None = None,
        omit_in: OmitIn = "train",
    ) -> None:
        super().__init__(batch_size, seed, drop_last)
        if not 0 < train_fraction <= 1:
            raise ValueError(
                f"`train_fraction` must be in (0, 1], got {train_fraction}: give the share of the training samples to "
                "keep, such as 0.1; 1.0 keeps all."
            )
        if omit_classes:
            self._check_omitted(omit_classes)
        if omit_in not in ("train", "all"):
            raise ValueError(f"`omit_in` must be 'train' or 'all', got {omit_in!r}.")
        self.train_fraction = train_fraction
        self.omit_classes = omit_classes
        self.omit_in = omit_in

    @override
    def _selected(self, splits: tuple[Split, Split, Split], seed: int) -> tuple[Split, Split, Split]:
        train, val, test = splits
        if self.omit_in == "all":
            val, test = self._without_omitted(val), self._without_omitted(test)
        return self._reduced(train, seed), val, test

    def _check_omitted(self, omitted: list[int]) -> None:
        wrong = sorted({label for label in omitted if not 0 <= label < self.num_classes})
        if wrong:
            raise ValueError(
                f"`omit_classes` must be in [0, {self.num_classes}), got {omitted}: leave out "
                f"{', '.join(map(str, wrong))}."
            )
        if len(set(omitted)) == self.num_classes:
            raise ValueError(
                f"`omit_classes` names all {self.num_classes} classes, got {omitted}: leave at least one to train on."
            )

    def _reduced(self, split: Split, seed: int) -> Split:
        """What ``train_fraction`` and ``omit_classes`` leave of the training data, in its order."""
        if self.train_fraction == 1 and not self.omit_classes:
            return split
        x, y = split
        keep = self._not_omitted(y)
        if self.train_fraction < 1:
            order = torch.randperm(len(y), generator=stream(seed, purpose="data/few_shot"))
            for label in range(self.num_classes):
                of_class = order[y[order] == label]
                keep[of_class[max(1, round(self.train_fraction * len(of_class))) :]] = False
        if not keep.any():
            raise ValueError(
                f"No training sample remains without the classes {self.omit_classes}: omit fewer of them, or load more "
                f"than {len(y)} samples."
            )
        return x[keep], y[keep]

    def _not_omitted(self, labels: Tensor) -> Tensor:
        return ~torch.isin(labels, torch.tensor(self.omit_classes or [], dtype=torch.int64))

    def _without_omitted(self, split: Split) -> Split:
        keep = self._not_omitted(split[1])
        return split[0][keep], split[1][keep]


def shuffled_split(x: Tensor, y: Tensor, held_out: int, seed: int, purpose: str) -> tuple[Split, Split]:
    """Two parts of the data, at random: what remains, and ``held_out`` samples.

    Args:
        x: Inputs, shape ``(n, ...)``.
        y: Labels, shape ``(n,)``.
        held_out: Samples of the second part.
        seed: Root seed.
        purpose: Names the draw.

    Returns:
        The two parts.

    Raises:
        ValueError: If nothing would remain.
    """
    if not 0 <= held_out < len(x):
        raise ValueError(f"Cannot hold out {held_out} of {len(x)} samples: at least one must remain.")
    order = torch.randperm(len(x), generator=stream(seed, purpose=purpose))
    rest, out = order[held_out:], order[:held_out]
    return (x[rest], y[rest]), (x[out], y[out])
