"""Partitions: properties, closed forms, and the figures the field quotes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

from groundwire.datamodules.partition import Partition, PartitionError, by_label, dirichlet, iid, shards


def balanced(n: int, classes: int = 10) -> Tensor:
    return torch.arange(n) % classes


def distance_to_uniform(partition: Partition, labels: Tensor) -> float:
    histogram = partition.class_histogram(labels, 10).double()
    share = histogram / histogram.sum(1, keepdim=True)
    return float(0.5 * (share - 0.1).abs().sum(1).mean())


def classes_held(partition: Partition, labels: Tensor) -> Tensor:
    return (partition.class_histogram(labels, 10) > 0).sum(1)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 200),
    devices=st.integers(1, 12),
    classes=st.integers(1, 6),
    seed=st.integers(0, 99),
    kind=st.sampled_from(["iid", "skewed", "dirichlet", "shards", "by_label"]),
)
def test_every_sample_has_one_device(n: int, devices: int, classes: int, seed: int, kind: str) -> None:
    labels = torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(seed))
    make: dict[str, Any] = {
        "iid": lambda: iid(labels, devices, seed=seed),
        "skewed": lambda: iid(labels, devices, quantity_skew=1.0, seed=seed),
        "dirichlet": lambda: dirichlet(labels, devices, alpha=0.5, max_tries=3, seed=seed),
        "shards": lambda: shards(labels, devices, seed=seed),
        "by_label": lambda: by_label(labels, devices, classes_per_device=1, seed=seed),
    }
    try:
        partition = make[kind]()
    except PartitionError:
        assert devices > n or kind in {"dirichlet", "by_label"} or (kind == "shards" and 2 * devices > n)
        return
    assert len(partition) == devices
    assert int(partition.counts.min()) >= 1
    assert int(partition.counts.sum()) == len(partition.indices)
    held = [set(partition.device(m).tolist()) for m in range(devices)]
    assert sum(len(h) for h in held) == len(set().union(*held)) == len(partition.indices), "disjoint"
    if kind == "by_label":
        assert all(len(set(labels[partition.device(m)].tolist())) == 1 for m in range(devices))
        present = set(labels.tolist())
        if devices >= len(present):
            assert set().union(*held) == set(range(n)), "every class is held by someone"
    else:
        assert set().union(*held) == set(range(n)), "all of the data is used"
    if kind == "iid":
        assert int(partition.counts.max() - partition.counts.min()) <= 1
    again = make[kind]()
    assert torch.equal(again.indices, partition.indices)
    assert torch.equal(again.counts, partition.counts)


@settings(max_examples=60, deadline=None)
@given(
    devices=st.integers(1, 12),
    size=st.integers(1, 8),
    classes_per_device=st.integers(1, 3),
    spare=st.integers(0, 60),
    seed=st.integers(0, 99),
    kind=st.sampled_from(["iid", "shards", "by_label"]),
)
def test_sizes_that_are_asked_for(
    devices: int, size: int, classes_per_device: int, spare: int, seed: int, kind: str
) -> None:
    size *= classes_per_device
    n = devices * size + spare
    labels = torch.randint(0, 5, (n,), generator=torch.Generator().manual_seed(seed))
    try:
        if kind == "iid":
            partition = iid(labels, devices, samples_per_device=size, seed=seed)
        elif kind == "shards":
            partition = shards(labels, devices, shards_per_device=1, samples_per_device=size, seed=seed)
        else:
            partition = by_label(
                labels, devices, classes_per_device=classes_per_device, samples_per_device=size, seed=seed
            )
    except PartitionError:
        assert kind == "by_label"  # the classes may not have enough left
        return
    assert partition.counts.tolist() == [size] * devices
    assert len(partition.indices.unique()) == devices * size
    assert 0 <= int(partition.indices.min()) <= int(partition.indices.max()) < n
    if kind == "by_label":
        for m in range(devices):
            held = torch.bincount(labels[partition.device(m)])
            assert held[held > 0].tolist() == [size // classes_per_device] * classes_per_device


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 500), devices=st.integers(1, 30), skew=st.floats(0, 50), seed=st.integers(0, 99))
def test_skewed_sizes_sum_to_the_samples(n: int, devices: int, skew: float, seed: int) -> None:
    if devices > n:
        return
    counts = iid(torch.zeros(n, dtype=torch.int64), devices, quantity_skew=skew, seed=seed).counts
    assert int(counts.sum()) == n
    assert int(counts.min()) >= 1


@settings(max_examples=30, deadline=None)
@given(alpha=st.floats(0.3, 100), least=st.integers(1, 8), seed=st.integers(0, 99))
def test_dirichlet_keeps_its_promise_of_fewest_samples(alpha: float, least: int, seed: int) -> None:
    try:
        partition = dirichlet(balanced(400), 10, alpha=alpha, min_samples=least, seed=seed)
    except PartitionError:
        reject()  # hypothesis fails if this is the rule
    assert int(partition.counts.min()) >= least
    assert partition.indices.sort().values.tolist() == list(range(400))


@pytest.mark.parametrize("alpha", [1e-300, 1e-5, 1e5])
def test_dirichlet_at_the_ends(alpha: float) -> None:
    labels = balanced(1000)
    histogram = dirichlet(labels, 3, alpha=alpha, seed=1).class_histogram(labels, 10)
    if alpha < 1:
        assert sorted(histogram.flatten().unique().tolist()) == [0, 100], "each class has one holder"
    else:
        assert int((histogram.double() - 100 / 3).abs().max()) <= 2


def test_distance_falls_with_alpha() -> None:
    labels = balanced(60_000)
    distances = [
        distance_to_uniform(dirichlet(labels, 100, alpha=alpha, seed=0, max_tries=200), labels)
        for alpha in (0.05, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
    ]
    assert distances == sorted(distances, reverse=True)


def test_labels_that_nobody_has_are_no_class() -> None:
    labels = torch.tensor([2, 2, 2, 7, 7, 7])
    partition = by_label(labels, 2, classes_per_device=1, seed=0)
    assert sorted(labels[partition.device(m)].tolist() for m in range(2)) == [[2, 2, 2], [7, 7, 7]]


def test_histogram_counts_labels() -> None:
    labels = balanced(100)
    partition = iid(labels, 7, seed=1)
    histogram = partition.class_histogram(labels, 10)
    for m in range(7):
        assert histogram[m].tolist() == torch.bincount(labels[partition.device(m)], minlength=10).tolist()


@pytest.mark.parametrize(
    ("alpha", "classes", "distance"),
    # classes a device and mean total variation to uniform, of 60,000 balanced samples over 100 devices
    [(0.05, 3.3, 0.79), (0.1, 5.1, 0.70), (0.5, 9.4, 0.45), (1.0, 9.9, 0.34), (100.0, 10.0, 0.04)],
)
def test_dirichlet_against_measured_figures(alpha: float, classes: float, distance: float) -> None:
    labels = balanced(60_000)
    runs = [dirichlet(labels, 100, alpha=alpha, seed=s, max_tries=200) for s in range(3)]
    mean_classes = sum(float(classes_held(p, labels).double().mean()) for p in runs) / 3
    mean_distance = sum(distance_to_uniform(p, labels) for p in runs) / 3
    assert mean_classes == pytest.approx(classes, rel=0.1)
    assert mean_distance == pytest.approx(distance, rel=0.1, abs=0.01)


def test_shards_give_about_two_classes() -> None:
    labels = balanced(60_000)
    held = torch.cat([classes_held(shards(labels, 100, seed=s), labels) for s in range(5)])
    # two of 200 shards, 20 a class: the same class with probability 19/199
    assert float(held.double().mean()) == pytest.approx(2 - 19 / 199, abs=0.05)
    assert int(held.max()) <= 3
    some = shards(labels, 10, samples_per_device=100, seed=0)
    assert some.counts.tolist() == [100] * 10


def test_the_settings_of_the_a_dsgd_paper() -> None:
    labels = balanced(50_000)
    partition = by_label(labels, 25, samples_per_device=1000, seed=3)
    histogram = partition.class_histogram(labels, 10)
    assert partition.counts.tolist() == [1000] * 25
    assert all(sorted(row[row > 0].tolist()) == [500, 500] for row in histogram)
    pairs = {tuple(row.nonzero().flatten().tolist()) for row in histogram}
    assert len(pairs) > 10, "devices draw their own pair"
    assert len(partition.indices.unique()) == 25_000
    other = by_label(labels, 25, samples_per_device=1000, seed=4)
    assert not torch.equal(partition.indices, other.indices)


def test_quantity_skew_spreads_sizes_and_zero_does_not() -> None:
    labels = balanced(10_000)
    spread = iid(labels, 20, quantity_skew=1.0, seed=0).counts.double()
    assert float(spread.std() / spread.mean()) > 0.5
    even = iid(labels, 20, quantity_skew=0.0, seed=0).counts
    assert even.tolist() == [500] * 20


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda y: iid(y, 0), r"`num_devices` must be in \[1, 100\] for 100 samples, got 0"),
        (lambda y: iid(y, 101), r"`num_devices` must be in \[1, 100\] for 100 samples, got 101"),
        (lambda y: iid(y, 10, samples_per_device=11), "10 devices of 11 samples each need 110, but there are 100"),
        (lambda y: iid(y, 10, quantity_skew=-1.0), "`quantity_skew` must be >= 0"),
        (lambda y: iid(y, 10, quantity_skew=1.0, samples_per_device=2), "cannot go with `samples_per_device`"),
        (lambda y: dirichlet(y, 10, alpha=0.0), "dirichlet alpha must be > 0; got 0.0"),
        (lambda y: dirichlet(y, 10, alpha=float("inf")), "dirichlet alpha must be finite; got inf"),
        (lambda y: iid(y, 10, quantity_skew=float("inf")), "must be >= 0 and finite"),
        (lambda y: by_label(y - 1, 5), r"Labels must be int64, >= 0 and of shape \(n,\)"),
        (lambda y: iid(y.float(), 5), r"got torch.float32 \(100,\)"),
        (lambda y: shards(y.view(-1, 2), 5), r"got torch.int64 \(50, 2\)"),
        (lambda y: dirichlet(y, 10, alpha=1.0, min_samples=11), "10 devices of 11 samples each need 110"),
        (
            lambda y: dirichlet(y, 40, alpha=0.01, min_samples=2, max_tries=2),
            r"device \d+ got [01] samples \(min_samples=2\) after 2 tries; raise alpha",
        ),
        (lambda y: shards(y, 60), "60 devices with 2 shards each cannot share 100 samples"),
        (lambda y: shards(y, 10, shards_per_device=0), "cannot share"),
        (lambda y: by_label(y, 5, classes_per_device=11), r"`classes_per_device` must be in \[1, 10\], got 11"),
        (lambda y: by_label(y, 5, samples_per_device=5), "samples_per_device=5 cannot be taken evenly from 2 classes"),
        (lambda y: by_label(y, 8, samples_per_device=12), "device 5 finds only 0 classes with 6 samples left"),
    ],
)
def test_bad_input_by_message(make: Any, message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        make(balanced(100))
