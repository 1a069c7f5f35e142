"""Poisson batches: statistics of the draw, how it is cut into chunks, and which loaders it can replace."""

from __future__ import annotations

import math
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from scipy.stats import binom, chisquare
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from groundwire.callbacks.privacy.sampling import (
    PoissonSampler,
    batch_size_of,
    chunks_within,
    num_records_of,
    poisson_sample,
    read_records,
    with_sampler,
)
from groundwire.datamodules import Digits


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def sampler(records: int = 100, logical: int = 20, chunks: int = 2, **options: Any) -> PoissonSampler:
    settings = {"seed": 0, "next_batch": lambda: (0, 0)} | options
    return PoissonSampler(records, logical, chunks, **settings)


def epoch(batches: Any) -> list[Any]:
    """As many batches as there are said to be, which is where the Trainer stops."""
    return list(islice(batches, len(batches)))


# ---------------------------------------------------------------- the draw


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.95])
def test_records_join_at_the_rate_and_independently(rate: float) -> None:
    n, draws, g = 30, 6000, generator()
    joined = torch.zeros(draws, n, dtype=torch.float64)
    for row in joined:
        row[poisson_sample(n, rate, g)] = 1
    variance = rate * (1 - rate)
    assert (joined.mean(0) - rate).abs().max() < 5 * math.sqrt(variance / draws)  # the first and the last, too
    centred = joined - rate
    covariance = centred.T @ centred / draws
    assert (covariance - torch.diag(covariance.diag())).abs().max() < 5.5 * variance / math.sqrt(draws)
    pairs = (joined[:, 0] * joined[:, 1]).mean()
    assert abs(pairs - rate**2) < 5 * math.sqrt(rate**2 * (1 - rate**2) / draws)


@pytest.mark.parametrize(("records", "rate"), [(50, 0.1), (2000, 0.01), (40, 0.9)])
def test_the_size_of_a_draw_is_binomial(records: int, rate: float) -> None:
    draws, g = 4000, generator(1)
    sizes = np.array([len(poisson_sample(records, rate, g)) for _ in range(draws)])
    low, high = int(binom.ppf(0.005, records, rate)), int(binom.ppf(0.995, records, rate))
    inner = np.arange(low + 1, high)
    cells = [(sizes <= low).sum(), *((sizes == k).sum() for k in inner), (sizes >= high).sum()]
    expected = [binom.cdf(low, records, rate), *binom.pmf(inner, records, rate), binom.sf(high - 1, records, rate)]
    assert chisquare(cells, np.array(expected) * draws).pvalue > 1e-4  # a false alarm in 10,000 seeds
    error = math.sqrt(records * rate * (1 - rate) / draws)
    assert abs(sizes.mean() - records * rate) < 5 * error


@settings(max_examples=200, deadline=None)
@given(records=st.integers(1, 400), rate=st.floats(1e-12, 1.0), seed=st.integers(0, 2**40))
def test_draws_are_distinct_ascending_records(records: int, rate: float, seed: int) -> None:
    indices = poisson_sample(records, rate, generator(seed))
    assert indices.dtype == torch.int64
    assert all(0 <= a < b for a, b in pairwise([*indices.tolist(), records]))
    assert rate < 1 or len(indices) == records


def test_a_draw_from_many_records_costs_what_it_takes() -> None:
    indices = poisson_sample(10**12, 1e-10, generator())
    assert abs(len(indices) - 100) < 60
    assert int(indices.max()) > 10**11


# ---------------------------------------------------------------- chunks, ranks, steps


@settings(max_examples=60, deadline=None)
@given(
    records=st.integers(1, 40),
    logical=st.integers(1, 80),
    chunks=st.integers(1, 4),
    ranks=st.integers(1, 3),
    seed=st.integers(0, 2**30),
)
def test_chunks_of_all_ranks_are_the_draw_exactly(
    records: int, logical: int, chunks: int, ranks: int, seed: int
) -> None:
    everyone = [sampler(records, logical, chunks, seed=seed, rank=r, num_ranks=ranks) for r in range(ranks)]
    assert len({len(s) for s in everyone}) == 1
    batches = [epoch(s) for s in everyone]
    assert {len(b) for b in batches} == {len(everyone[0])}
    for step in range(everyone[0].steps_per_epoch):
        seen: list[int] = []
        sizes = []
        for rank, s in enumerate(everyone):
            for index in range(chunks):
                chunk, size = batches[rank][step * chunks + index], s._sizes[step, index]
                assert chunk == [0] if size == 0 else len(chunk) == size
                seen += chunk if size else []
                sizes.append(size)
        assert sorted(seen) == everyone[0].draw(step).tolist()
        assert max(sizes) - min(sizes) <= 1


def test_length_and_rate() -> None:
    s = sampler(1000, 64, 4)
    assert (s.sample_rate, s.steps_per_epoch, len(s)) == (0.064, 15, 60)
    assert len(list(s)) == 60
    assert len(list(sampler(1000, 64, 4, next_batch=lambda: (3, 2)))) <= 60
    all_of_them = sampler(10, 25, 3)
    assert (all_of_them.sample_rate, all_of_them.steps_per_epoch, len(all_of_them)) == (1.0, 1, 3)


def test_sample_rate_one_takes_every_record_every_step() -> None:
    s = sampler(11, 11, 3)
    assert [len(c) for c in epoch(s)] == [4, 4, 3]
    assert sorted(i for c in epoch(s) for i in c) == list(range(11))


def test_what_a_step_gets_depends_on_seed_and_step_alone() -> None:
    first = epoch(sampler(logical=10, chunks=1))
    torch.rand(5)
    assert epoch(sampler(logical=10, chunks=1)) == first
    assert epoch(sampler(logical=10, chunks=1, next_batch=lambda: (7, 0)))[:3] == first[7:]
    assert epoch(sampler(logical=10, chunks=1, seed=1)) != first
    assert len({tuple(c) for c in first}) == len(first)
    split = epoch(sampler(logical=10, chunks=2))
    assert [a + b for a, b in zip(split[::2], split[1::2], strict=True)] == first
    next_epoch = epoch(sampler(logical=10, chunks=1, next_batch=lambda: (10, 0)))
    assert not {tuple(c) for c in next_epoch} & {tuple(c) for c in first}


def test_resuming_within_a_step_goes_on_with_its_next_chunk() -> None:
    whole = epoch(sampler(chunks=3))
    resumed_sampler = sampler(chunks=3, next_batch=lambda: (2, 1))
    resumed = epoch(resumed_sampler)
    assert resumed[: len(whole) - 7] == whole[7:]
    assert resumed_sampler.size_of(2, 1) == len(whole[7])
    with pytest.raises(KeyError):
        resumed_sampler.size_of(2, 0)  # that one was not yielded here


def test_the_place_to_go_on_from_is_asked_when_an_iteration_begins() -> None:
    place = [0, 0]
    s = sampler(chunks=2, next_batch=lambda: (place[0], place[1]))
    iterator = iter(s)
    place[0] = 3
    assert next(iterator) == epoch(sampler(chunks=2))[6]


def test_empty_chunks_yield_a_placeholder_that_counts_as_nothing() -> None:
    s = sampler(20, 1, 3)
    batches = epoch(s)
    empty = 0
    for step in range(s.steps_per_epoch):
        drawn = len(s.draw(step))
        sizes = [s.size_of(step, index) for index in range(3)]
        assert sum(sizes) == drawn
        for index, size in enumerate(sizes):
            batch = batches[3 * step + index]
            assert batch == [0] if size == 0 else len(batch) == size
            empty += size == 0
    assert empty >= s.steps_per_epoch  # of three chunks for one record on average
    assert len(s._sizes) <= 3  # what was asked for is forgotten


@pytest.mark.parametrize("name", ["num_records", "logical_batch", "num_chunks"])
def test_arguments_below_one_are_refused(name: str) -> None:
    arguments = {"num_records": 10, "logical_batch": 2, "num_chunks": 1} | {name: 0}
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        PoissonSampler(**arguments, seed=0, next_batch=lambda: (0, 0))


# ---------------------------------------------------------------- physical batches


@settings(max_examples=60, deadline=None)
@given(records=st.integers(1, 5000), logical=st.integers(1, 5000), largest=st.integers(1, 600), ranks=st.integers(1, 4))
def test_chunks_within_by_the_binomial_tail(records: int, logical: int, largest: int, ranks: int) -> None:
    chunks, rate = chunks_within(records, logical, largest, ranks), min(1.0, logical / records)
    assert chunks >= 1
    holds = chunks * ranks * largest  # the largest draw that fits: chunks differ by one at most
    assert binom.sf(holds, records, rate) <= 1e-12
    if chunks > 1:
        assert binom.sf(holds - ranks * largest, records, rate) > 1e-12  # one chunk less is not enough


def test_chunks_within_of_full_batches() -> None:
    assert chunks_within(100, 100, 30, 1) == 4
    assert chunks_within(100, 100, 25, 2) == 2
    assert chunks_within(100, 100, 1000, 2) == 1


# ---------------------------------------------------------------- loaders


class Squares(Dataset[tuple[Tensor, int]]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.tensor([float(i), float(i * i)]), i


def stacked_backwards(records: list[tuple[Tensor, int]]) -> dict[str, Any]:
    return {"x": torch.stack([x.flip(0) for x, _ in records]), "ids": [i for _, i in records]}


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(10))


def loaded(loader: DataLoader[Any], **options: Any) -> list[Any]:
    return epoch(with_sampler(loader, sampler(num_records_of(loader), 8, 2, **options)))


def test_batches_are_the_records_of_the_sampler() -> None:
    batches, indices = loaded(DataLoader(Squares(), batch_size=4, shuffle=True)), epoch(sampler(40, 8, 2))
    assert len(batches) == 10
    for (x, y), ids in zip(batches, indices, strict=True):
        assert y.tolist() == ids
        assert torch.equal(x[:, 1], y.float() ** 2)


def test_workers_load_the_same_records_and_sizes() -> None:
    indices = epoch(sampler(40, 8, 2))
    loader = DataLoader(Squares(), batch_size=4, num_workers=2, persistent_workers=True)
    s = sampler(40, 8, 2)
    replaced = with_sampler(loader, s)
    assert len(replaced) == 10
    for _ in range(2):  # workers fetch ahead; sizes are asked for in order
        found = []
        for i, (_, y) in enumerate(epoch(replaced)):
            found.append(y.tolist())
            assert s.size_of(i // 2, i % 2) == len(indices[i]) or indices[i] == [0]
        assert found == indices
    assert replaced.batches.persistent_workers  # type: ignore[attr-defined]
    del replaced


def test_collate_fn_and_options_are_kept() -> None:
    def init(_: int) -> None:
        return None

    loader = DataLoader(
        Squares(),
        batch_size=4,
        collate_fn=stacked_backwards,
        num_workers=2,
        prefetch_factor=3,
        timeout=9,
        worker_init_fn=init,
    )
    inner: Any = with_sampler(loader, sampler(40, 8, 2)).batches
    kept = ("dataset", "collate_fn", "num_workers", "prefetch_factor", "timeout", "worker_init_fn", "pin_memory")
    for name in kept:
        assert getattr(inner, name) == getattr(loader, name), name
    first = loaded(DataLoader(Squares(), batch_size=4, collate_fn=stacked_backwards))[0]
    assert first["ids"] == epoch(sampler(40, 8, 2))[0]
    assert torch.equal(first["x"][:, 1], torch.tensor(first["ids"]).float())


def test_nothing_is_drawn_before_the_first_batch_is_asked_for() -> None:
    asked: list[int] = []

    def next_batch() -> tuple[int, int]:
        asked.append(1)
        return 0, 0

    for workers in (0, 2):
        asked.clear()
        loader = DataLoader(Squares(), batch_size=4, num_workers=workers)
        iterator = iter(with_sampler(loader, sampler(40, 8, 2, next_batch=next_batch)))
        assert asked == []
        next(iterator)
        assert asked == [1]
        del iterator


def test_tensor_loaders_of_our_datamodules() -> None:
    data = Digits(batch_size=50)
    data.setup("fit")
    loader = data.train_dataloader()
    x, y = loader.split
    assert batch_size_of(loader) == 50
    assert num_records_of(loader) == len(x)
    s = sampler(len(x), 50, 2)
    replaced = with_sampler(loader, s)
    assert len(replaced) == len(x) // 50 * 2
    for batch, ids in zip(epoch(replaced), epoch(sampler(len(x), 50, 2)), strict=True):
        assert torch.equal(batch[0], x[ids])
        assert torch.equal(batch[1], y[ids])
    pair = read_records(loader, [0, len(x) - 1])
    assert torch.equal(pair[0], x[[0, -1]])
    assert torch.equal(pair[1], y[[0, -1]])


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Squares(), batch_size=4),
        DataLoader(Squares(), batch_size=4, shuffle=True, drop_last=True),
        DataLoader(Squares(), batch_size=4, sampler=RandomSampler(Squares())),
        DataLoader(Squares(), batch_size=4, sampler=SequentialSampler(Squares())),
        DataLoader(Squares(), batch_size=4, sampler=DistributedSampler(Squares(), num_replicas=2, rank=1)),
        DataLoader(Subset(Squares(), range(40)), batch_size=4),
        DataLoader(TensorDataset(torch.zeros(40, 1)), batch_size=4),
    ],
)
def test_loaders_that_can_be_replaced(loader: DataLoader[Any]) -> None:
    assert batch_size_of(loader) == 4
    assert num_records_of(loader) == 40
    assert sum(len(b[0]) for b in loaded(loader)) == sum(len(c) for c in epoch(sampler(40, 8, 2)))


def test_read_records_collates_as_the_loader_does() -> None:
    x, y = read_records(DataLoader(Squares(), batch_size=4), [3, 5])
    assert (x.tolist(), y.tolist()) == ([[3.0, 9.0], [5.0, 25.0]], [3, 5])
    batch = read_records(DataLoader(Squares(), batch_size=4, collate_fn=stacked_backwards), [3, 5])
    assert batch["ids"] == [3, 5]


REFUSED: dict[str, tuple[Any, str]] = {
    "iterable": (DataLoader(Stream(), batch_size=2), "got a Stream. Use a map-style dataset"),
    "batch sampler": (
        DataLoader(Squares(), batch_sampler=BatchSampler(RandomSampler(Squares()), 4, False)),
        "got a batch sampler of its own, a BatchSampler. Give `batch_size`",
    ),
    "no batches": (DataLoader(Squares(), batch_size=None), "Give `batch_size`"),
    "weighted": (
        DataLoader(Squares(), batch_size=4, sampler=WeightedRandomSampler([1.0] * 40, 40)),
        "the sampler is a WeightedRandomSampler, whose choice among the records would be lost",
    ),
    "replacement": (
        DataLoader(Squares(), batch_size=4, sampler=RandomSampler(Squares(), replacement=True)),
        "the sampler is a RandomSampler, whose choice",
    ),
    "subset by sampler": (
        DataLoader(Squares(), batch_size=4, sampler=SubsetRandomSampler(range(10))),
        "SubsetRandomSampler.*torch.utils.data.Subset",
    ),
    "some of the records": (
        DataLoader(Squares(), batch_size=4, sampler=RandomSampler(Squares(), num_samples=10)),
        "the sampler is a RandomSampler",
    ),
    "several loaders": (
        {"a": DataLoader(Squares(), batch_size=4)},
        "got a dict. Return one torch.utils.data.DataLoader",
    ),
    "a list": ([1, 2], "got a list"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_loaders_that_cannot_be_replaced_are_refused(name: str) -> None:
    loader, message = REFUSED[name]
    with pytest.raises(MisconfigurationException, match=message):
        batch_size_of(loader)
