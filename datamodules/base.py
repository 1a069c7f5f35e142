"""Loaders that resume exactly, and datamodules that keep each split as one pair of tensors."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Generic, Self, TypeVar

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.random import stream

Batch = TypeVar("Batch")
Split = tuple[Tensor, Tensor]
"""Inputs ``(n, ...)``, float32, and labels ``(n,)``, int64."""


def root_seed(seed: int | None) -> int:
    """``seed``, or by default that of ``seed_everything``, else 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed


class ResumableLoader(ABC, Generic[Batch]):
    """A loader whose batch depends only on the epoch and its number in it, so that a resumed run sees the same ones.

    Lightning says which epoch it is through ``sampler.set_epoch``, and restores ``state_dict`` within an epoch.
    """

    batch_sampler = None
    """Lightning reads it of whatever has a ``sampler``."""

    def __init__(self) -> None:
        self.epoch = 0
        self._start = 0
        self._next = 0

    @abstractmethod
    def __len__(self) -> int:
        """Batches an epoch."""

    @abstractmethod
    def batch(self, epoch: int, index: int) -> Batch:
        """Batch ``index`` of ``epoch``, both from 0."""

    def __iter__(self) -> Iterator[Batch]:
        start, self._start = self._start, 0
        for index in range(start, len(self)):
            self._next = index + 1
            yield self.batch(self.epoch, index)

    @property
    def sampler(self) -> Self:
        """Itself: where Lightning looks for ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is."""
        self.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """How far the epoch has come."""
        return {"position": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on from where another loader stopped."""
        self._start = state["position"]


class TensorLoader(ResumableLoader[Split]):
    """Batches of two tensors, taken by one indexing operation each: no work per sample.

    Args:
        split: Inputs and labels.
        batch_size: Samples a batch.
        shuffle: Draw a new order every epoch; it depends on the seed and the epoch alone.
        seed: Root seed of the order.
        drop_last: Leave out a last batch that is smaller.

    Raises:
        ValueError: If ``batch_size`` is below 1, or above the number of samples with ``drop_last``.
    """

    def __init__(
        self, split: Split, batch_size: int, *, shuffle: bool = False, seed: int = 0, drop_last: bool = False
    ) -> None:
        super().__init__()
        samples = len(split[0])
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        if drop_last and batch_size > samples:
            raise ValueError(f"`batch_size` is {batch_size}, but there are only {samples} samples.")
        self.split = split
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self._order: tuple[int, Tensor] | None = None

    @override
    def __len__(self) -> int:
        samples = len(self.split[0])
        return samples // self.batch_size if self.drop_last else -(-samples // self.batch_size)

    @override
    def batch(self, epoch: int, index: int) -> Split:
        part = slice(index * self.batch_size, (index + 1) * self.batch_size)
        if not self.shuffle:
            return self.split[0][part], self.split[1][part]
        if self._order is None or self._order[0] != epoch:
            generator = stream(self.seed, purpose="data/order", round=epoch)
            self._order = (epoch, torch.randperm(len(self.split[0]), generator=generator))
        rows = self._order[1][part]
        return self.split[0][rows], self.split[1][rows]


class TensorClassification(pl.LightningDataModule, ABC):
    """Classification data that fits into memory: each split is one pair of tensors.

    Subclasses write :meth:`load`. Training batches are shuffled by the seed and the epoch, so that a resumed run sees
    the order that an uninterrupted one does.

    Args:
        batch_size: Samples a batch, in all splits.
        seed: Root seed of splits and order; by default that of ``seed_everything``, else 0.
        drop_last: Leave out a last training batch that is smaller, for strategies that split a batch evenly.

    Raises:
        ValueError: If ``batch_size`` is below 1.
    """

    num_classes: int
    input_shape: tuple[int, ...]

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

    @abstractmethod
    def load(self, seed: int) -> tuple[Split, Split, Split]:
        """Training, validation and test data."""

    @override
    def setup(self, stage: str | None = None) -> None:
        if not self._is_ready:
            self.train_data, self.val_data, self.test_data = self.load(root_seed(self.seed))
            self._is_ready = True

    @override
    def train_dataloader(self) -> TensorLoader:
        seed = root_seed(self.seed)
        return TensorLoader(self.train_data, self.batch_size, shuffle=True, seed=seed, drop_last=self.drop_last)

    @override
    def val_dataloader(self) -> TensorLoader:
        return TensorLoader(self.val_data, self.batch_size)

    @override
    def test_dataloader(self) -> TensorLoader:
        return TensorLoader(self.test_data, self.batch_size)

    @override
    def predict_dataloader(self) -> TensorLoader:
        return TensorLoader(self.test_data, self.batch_size)


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
