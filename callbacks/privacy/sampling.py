"""Poisson sampling: every record joins every step by its own coin."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.combined_loader import _shutdown_workers_and_reset_iterator
from scipy.stats import binom
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from groundwire.plugins.random import secret_stream

_REPLACEABLE = (RandomSampler, SequentialSampler, DistributedSampler)  # samplers that only order a dataset


def poisson_sample(num_records: int, sample_rate: float, generator: np.random.Generator) -> Tensor:
    """A subset that each of ``num_records`` records joins independently with probability ``sample_rate``.

    Args:
        num_records: Records ``N``.
        sample_rate: Probability ``q`` in (0, 1].
        generator: Where the random numbers come from.

    Returns:
        Indices of the records that join, int64, ascending; there may be none. The work grows with ``q N``, not ``N``.

    Example:
        >>> len(poisson_sample(1000, 0.05, np.random.default_rng(0)))
        45
    """
    if sample_rate >= 1:
        return torch.arange(num_records)
    expected = sample_rate * num_records
    found, last = [], -1
    while last < num_records:  # jump from one that joins to the next: gaps between successes are geometric
        uniform = generator.random(int(expected + 6 * math.sqrt(expected)) + 8)
        gaps = np.floor(np.log1p(-uniform) / math.log1p(-sample_rate)) + 1
        joined = np.minimum(gaps, num_records + 1).astype(np.int64).cumsum() + last
        found.append(joined)
        last = int(joined[-1])
    indices = torch.from_numpy(np.concatenate(found))
    return indices[indices < num_records]


class PoissonSampler(Sampler[list[int]]):
    """Index lists of the physical batches of one process: each logical batch is one Poisson draw, cut into chunks.

    All processes make the same draw and share it out, so every process yields the same number of chunks. Which records
    a step gets depends on the seed and the step alone. A chunk without records yields record 0 in its place, which the
    step must not count: :meth:`size_of` tells.

    Args:
        num_records: Records ``N`` of the dataset.
        logical_batch: Expected records a step over all processes; the sample rate is ``logical_batch / N``.
        num_chunks: Physical batches a step and process, ``k``.
        seed: Root seed of the draws.
        next_batch: Tells, when an iteration begins, the step and the physical batch within it that come next.
        rank: Number of this process.
        num_ranks: Processes.

    Raises:
        ValueError: If an argument is below 1.

    Example:
        >>> sampler = PoissonSampler(1000, 50, 2, seed=0, next_batch=lambda: (0, 0))
        >>> len(sampler), sampler.sample_rate, [len(chunk) for chunk in sampler][:4]
        (40, 0.05, [26, 26, 23, 23])
    """

    def __init__(
        self,
        num_records: int,
        logical_batch: int,
        num_chunks: int,
        *,
        seed: int,
        next_batch: Callable[[], tuple[int, int]],
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        for name, value in {
            "num_records": num_records,
            "logical_batch": logical_batch,
            "num_chunks": num_chunks,
        }.items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        self.num_records = num_records
        self.logical_batch = min(logical_batch, num_records)
        self.num_chunks = num_chunks
        self.seed = seed
        self.next_batch = next_batch
        self.rank = rank
        self.num_ranks = num_ranks
        self._sizes: dict[tuple[int, int], int] = {}

    @property
    def sample_rate(self) -> float:
        """Probability that a record joins a step."""
        return self.logical_batch / self.num_records

    @property
    def steps_per_epoch(self) -> int:
        """Steps after which a record has joined once on average, rounded down."""
        return self.num_records // self.logical_batch

    def __len__(self) -> int:
        return self.steps_per_epoch * self.num_chunks

    def draw(self, step: int) -> Tensor:
        """Indices of the records of a step, over all processes."""
        return poisson_sample(
            self.num_records, self.sample_rate, secret_stream(self.seed, purpose="privacy/sampling", round=step)
        )

    def __iter__(self) -> Iterator[list[int]]:
        step, first = self.next_batch()
        for _ in range(self.steps_per_epoch):
            chunks = self.draw(step).tensor_split(self.num_chunks * self.num_ranks)
            for index in range(first, self.num_chunks):
                chunk = chunks[index * self.num_ranks + self.rank]
                self._sizes[step, index] = len(chunk)
                yield chunk.tolist() or [0]
            step, first = step + 1, 0

    def size_of(self, step: int, index: int) -> int:
        """Records of a physical batch that was yielded: 0 for a chunk without records."""
        for key in [key for key in self._sizes if key < (step, index)]:
            del self._sizes[key]
        return self._sizes[step, index]


def chunks_within(num_records: int, logical_batch: int, largest: int, num_ranks: int) -> int:
    """Chunks a step and process so that a chunk exceeds ``largest`` records with probability below 1e-12.

    Args:
        num_records: Records of the dataset.
        logical_batch: Expected records a step.
        largest: Records that a physical batch may have.
        num_ranks: Processes.

    Returns:
        The number of chunks, at least 1.
    """
    rate = min(1.0, logical_batch / num_records)
    draw = num_records if rate == 1 else int(binom.isf(1e-12, num_records, rate))
    return -(-draw // (largest * num_ranks))


def batch_size_of(loader: Any) -> int:
    """The batch size of a train loader that Poisson sampling can replace.

    Args:
        loader: A ``torch.utils.data.DataLoader``, or a loader of ``groundwire.datamodules``.

    Returns:
        Its batch size.

    Raises:
        MisconfigurationException: If records cannot be drawn one by one from it.
    """
    needs = "Poisson sampling needs a train loader over a dataset with a length, from which any record can be read"
    if _is_tensor_loader(loader):
        return int(loader.batch_size)
    if not isinstance(loader, DataLoader):
        raise MisconfigurationException(
            f"{needs}; got a {type(loader).__name__}. Return one torch.utils.data.DataLoader, or use "
            "groundwire.datamodules."
        )
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        raise MisconfigurationException(
            f"{needs}; got a {type(loader.dataset).__name__}. Use a map-style dataset, with `__len__` and `__getitem__`."
        )
    if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:
        raise MisconfigurationException(
            f"{needs}; got a batch sampler of its own, a {type(loader.batch_sampler).__name__}. Give `batch_size`."
        )
    chooses = getattr(loader.sampler, "replacement", False) or getattr(loader.sampler, "_num_samples", None) is not None
    if not isinstance(loader.sampler, _REPLACEABLE) or chooses:
        raise MisconfigurationException(
            f"{needs}; the sampler is a {type(loader.sampler).__name__}, whose choice among the records would be lost. "
            "Choose records by a torch.utils.data.Subset, and use shuffle=True."
        )
    return loader.batch_size


def num_records_of(loader: Any) -> int:
    """Records of a loader that :func:`batch_size_of` takes."""
    return len(loader.split[0]) if _is_tensor_loader(loader) else len(loader.dataset)


def read_records(loader: Any, indices: list[int]) -> Any:
    """A batch of chosen records of a loader that :func:`batch_size_of` takes."""
    if _is_tensor_loader(loader):
        return tuple(part[indices] for part in loader.split)
    return loader.collate_fn([loader.dataset[i] for i in indices])


def with_sampler(loader: Any, sampler: PoissonSampler) -> PoissonLoader:
    """The same data in the batches of a Poisson sampler.

    Args:
        loader: What :func:`batch_size_of` takes; its order is dropped, its dataset, collation and workers are kept.
        sampler: The sampler.

    Returns:
        A loader.
    """
    if _is_tensor_loader(loader):
        return PoissonLoader(_TensorBatches(loader.split, sampler), sampler)
    workers = loader.num_workers
    batches: DataLoader[Any] = DataLoader(
        loader.dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor if workers else None,
        persistent_workers=loader.persistent_workers,
    )
    return PoissonLoader(batches, sampler)


class PoissonLoader:
    """Batches of a Poisson sampler; nothing is drawn before the first one is asked for.

    Args:
        batches: What to iterate over, once an epoch.
        sampler: The sampler behind it.
    """

    def __init__(self, batches: Iterable[Any], sampler: PoissonSampler) -> None:
        self.batches = batches
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def shutdown(self) -> None:
        """End worker processes, as the Trainer does for a plain DataLoader."""
        if isinstance(self.batches, DataLoader):
            _shutdown_workers_and_reset_iterator(self.batches)

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches  # workers would draw when the Trainer makes an iterator, which is before it resumes


class _TensorBatches:
    """Batches of tensors, taken by one indexing operation each."""

    def __init__(self, split: tuple[Tensor, ...], sampler: PoissonSampler) -> None:
        self.split = split
        self.sampler = sampler

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for indices in self.sampler:
            yield tuple(part[indices] for part in self.split)


def _is_tensor_loader(loader: Any) -> bool:
    split = getattr(loader, "split", None)
    return isinstance(split, tuple) and all(isinstance(part, Tensor) for part in split)
