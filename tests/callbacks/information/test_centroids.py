"""Running centroids against hand-written loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from groundwire.callbacks.information.centroids import CentroidTable, summed_over_processes
from groundwire.callbacks.information.functional import class_counts, class_sums

CLASSES = 5


def batches(number: int = 6, n: int = 12, top: int = CLASSES, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Output distributions with labels below ``top``."""
    rng = np.random.default_rng(seed)
    return [
        (torch.tensor(rng.dirichlet(np.ones(CLASSES), n), dtype=torch.float32), torch.tensor(rng.integers(0, top, n)))
        for _ in range(number)
    ]


def by_hand(data: list[tuple[Tensor, Tensor]], mu: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Of each class: batch means ``m_1 .. m_t``, weighted ``mu^(t-i)``, in float64."""
    table = np.full((CLASSES, CLASSES), 1 / CLASSES)
    for c in range(CLASSES):
        means = [p.double().numpy()[y.numpy() == c].mean(0) for p, y in data if (y == c).any()]
        if means:
            weights = [mu ** (len(means) - 1 - i) for i in range(len(means))]
            table[c] = sum(w * m for w, m in zip(weights, means, strict=True)) / sum(weights)
    return table


class Processes:
    """The part of a strategy that is used: of this process and, if given, one that holds ``others``."""

    world_size = 2

    def __init__(self, others: list[tuple[Tensor, Tensor]] | None = None) -> None:
        self.others = others
        self.reductions = 0

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Tensor:
        assert reduce_op == "sum"
        assert tensor.shape == (CLASSES, CLASSES + 1)
        result: Tensor = tensor.clone()
        if self.others is not None:
            probs, target = self.others[self.reductions]
            ones = torch.ones(len(probs), 1, dtype=tensor.dtype)
            for row, label in zip(torch.cat([probs.to(tensor.dtype), ones], dim=1), target, strict=True):
                result[label] += row
        self.reductions += 1
        return result


@pytest.mark.parametrize("mu", [0.0, 0.9, 0.9999])
@pytest.mark.parametrize("n", [3, 12])
def test_it_is_a_bias_corrected_average_of_batch_means(mu: float, n: int) -> None:
    table, data = CentroidTable(CLASSES, mu), batches(n=n)
    for step, (probs, target) in enumerate(data, 1):
        table.update(probs, target)
        np.testing.assert_allclose(table.centroids.numpy(), by_hand(data[:step], mu), atol=2e-4 if mu > 0.99 else 1e-6)


def test_the_first_batch_counts_in_full() -> None:
    (probs, target), *_ = batches()
    table = CentroidTable(CLASSES, mu=0.99)
    table.update(probs, target)
    seen = int(target[0])
    torch.testing.assert_close(table.centroids[seen], probs[target == seen].mean(0))


def test_classes_that_were_not_seen_stay_uniform_or_as_they_were() -> None:
    table = CentroidTable(CLASSES, 0.5)
    for probs, target in batches(top=3):
        table.update(probs, target)
    assert torch.equal(table.centroids[3:], torch.full((2, CLASSES), 0.2))
    before = table.centroids.clone()
    table.update(torch.full((1, CLASSES), 0.2), torch.tensor([1]))
    assert torch.equal(table.centroids[[0, 2, 3, 4]], before[[0, 2, 3, 4]])
    assert not torch.equal(table.centroids[1], before[1])


def test_rows_stay_distributions_over_a_thousand_steps() -> None:
    table = CentroidTable(CLASSES, 0.99)
    for probs, target in batches(number=1000, n=4):
        table.update(probs, target)
    torch.testing.assert_close(table.centroids.sum(1), torch.ones(CLASSES), rtol=0, atol=1e-6)
    assert float(table.centroids.min()) > 0
    assert table.centroids.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_outputs_of_any_precision_keep_a_float32_table(dtype: torch.dtype) -> None:
    table, reference = CentroidTable(CLASSES, 0.9), CentroidTable(CLASSES, 0.9)
    for probs, target in batches():
        table.update(probs.to(dtype), target)
        reference.update(probs.to(dtype).float(), target)
    assert torch.equal(table.centroids, reference.centroids)


# ---------------------------------------------------------------- processes


def test_the_dense_path_of_processes_is_the_compact_one() -> None:
    alone, together = CentroidTable(CLASSES, 0.9), CentroidTable(CLASSES, 0.9)
    strategy: Any = Processes()
    for probs, target in batches(n=4):
        alone.update(probs, target)
        together.update(probs, target, strategy)
        torch.testing.assert_close(together.centroids, alone.centroids, rtol=0, atol=1e-6)
    assert strategy.reductions == 6


def test_two_processes_are_one_with_both_batches() -> None:
    mine, theirs = batches(n=4), batches(n=9, seed=1)
    both = [(torch.cat([p, q]), torch.cat([y, v])) for (p, y), (q, v) in zip(mine, theirs, strict=True)]
    table = CentroidTable(CLASSES, 0.9)
    strategy: Any = Processes(theirs)
    for probs, target in mine:
        table.update(probs, target, strategy)
    np.testing.assert_allclose(table.centroids.numpy(), by_hand(both, 0.9), atol=1e-6)


def test_sums_over_processes_are_sums_and_counts() -> None:
    (probs, target), (more, labels) = batches(2)
    strategy: Any = Processes([(more, labels)])
    sums, counts = summed_over_processes(probs, target, CLASSES, strategy)
    assert sums.dtype == torch.float64
    for c in range(CLASSES):
        expected = probs[target == c].double().sum(0) + more[labels == c].double().sum(0)
        torch.testing.assert_close(sums[c], expected)
        assert int(counts[c]) == int((target == c).sum() + (labels == c).sum())


# ---------------------------------------------------------------- exact means


def test_assigned_means_are_exact_and_the_start_of_what_follows() -> None:
    (probs, target), (more, labels) = batches(2, n=40, top=4)
    table = CentroidTable(CLASSES, 0.5)
    table.assign(class_sums(probs, target, CLASSES), class_counts(target, CLASSES))
    for c in range(4):
        torch.testing.assert_close(table.centroids[c], probs[target == c].mean(0))
    assert torch.equal(table.centroids[4], torch.full((CLASSES,), 0.2))
    table.update(more, labels)
    for c in range(4):  # an exact mean has full weight
        torch.testing.assert_close(table.centroids[c], (probs[target == c].mean(0) + more[labels == c].mean(0)) / 2)


# ---------------------------------------------------------------- state


def test_a_loaded_table_goes_on_bit_for_bit() -> None:
    data, table = batches(), CentroidTable(CLASSES, 0.9)
    for probs, target in data[:3]:
        table.update(probs, target)
    state = table.state_dict()
    other = CentroidTable.of_state(state, 0.9)
    assert torch.equal(other.centroids, table.centroids)
    for probs, target in data[3:]:
        table.update(probs, target)
        other.update(probs, target)
        assert torch.equal(other.centroids, table.centroids)
    third = CentroidTable.of_state(state, 0.9)  # the state is a copy, which later updates of neither table changed
    np.testing.assert_allclose(third.centroids.numpy(), by_hand(data[:3], 0.9), atol=1e-6)


def test_another_number_of_classes_is_refused() -> None:
    table = CentroidTable.of_state(CentroidTable(10).state_dict(), 0.9)
    with pytest.raises(
        MisconfigurationException, match=r"holds centroids for 10 classes, the module outputs 100\. Resume"
    ):
        table.fitting(torch.zeros(1, 100))


def test_moving_moves_everything() -> None:
    table = CentroidTable(3).fitting(torch.zeros(1, 3, device="meta"))
    assert {value.device.type for value in (table.centroids, table._mean)} == {"meta"}
    assert CentroidTable(3, device="meta").centroids.device.type == "meta"


@pytest.mark.parametrize("num_classes", [CLASSES, 100])
def test_a_class_with_outputs_that_are_not_finite_stays_as_it_is(num_classes: int) -> None:
    g = torch.Generator().manual_seed(0)
    probs, target = torch.rand(30, num_classes, generator=g).softmax(1), torch.arange(30) % 5
    table, clean = CentroidTable(num_classes, 0.9), CentroidTable(num_classes, 0.9)
    for one in (table, clean):
        one.update(probs, target)
    spoilt = probs.clone()
    spoilt[3] = torch.nan  # of class 3
    table.update(spoilt, target)
    clean.update(probs[target != 3], target[target != 3])
    assert torch.equal(table.centroids, clean.centroids)
    table.assign(*summed_over_processes(spoilt, target, num_classes, SingleDeviceStrategy()))
    assert torch.isfinite(table.centroids).all()
    assert torch.equal(table.centroids[3], clean.centroids[3])
