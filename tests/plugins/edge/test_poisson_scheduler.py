"""PoissonSample: every device by a coin of its own."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import binom, chisquare
from torch import Tensor

from groundwire.plugins.edge import PoissonSample
from groundwire.plugins.edge.scheduler import AllDevices, UniformSample

M, ROUNDS = 40, 4000


def taken(rate: float, *, rounds: int = ROUNDS, devices: int = M, seed: int = 0) -> Tensor:
    """Who takes part, bool, shape ``(rounds, devices)``."""
    scheduler, ids = PoissonSample(rate), torch.arange(devices)
    out = torch.zeros(rounds, devices, dtype=torch.bool)
    for r in range(rounds):
        out[r, scheduler(ids, round_index=r, seed=seed)] = True
    return out


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_devices_take_part_at_the_rate_and_independently(rate: float) -> None:
    drawn = taken(rate).double()
    error = math.sqrt(rate * (1 - rate) / ROUNDS)
    assert (drawn.mean(0) - rate).abs().max() < 5 * error
    centred = drawn - rate
    covariance = centred.T @ centred / ROUNDS
    off_diagonal = covariance - torch.diag(covariance.diag())
    assert off_diagonal.abs().max() < 5.5 * rate * (1 - rate) / math.sqrt(ROUNDS)  # 780 pairs
    lagged = (centred[1:] * centred[:-1]).mean(0)  # a device's own coins of successive rounds
    assert lagged.abs().max() < 5 * rate * (1 - rate) / math.sqrt(ROUNDS - 1)


@pytest.mark.parametrize("rate", [0.05, 0.3])
def test_the_number_of_participants_is_binomial(rate: float) -> None:
    sizes = taken(rate).sum(1).numpy()
    low, high = int(binom.ppf(0.01, M, rate)), int(binom.ppf(0.99, M, rate))
    edges = np.arange(low, high + 1)
    cells = [(sizes <= low).sum(), *((sizes == k).sum() for k in edges[1:-1]), (sizes >= high).sum()]
    middle = binom.pmf(edges[1:-1], M, rate)
    expected = np.array([binom.cdf(low, M, rate), *middle, binom.sf(high - 1, M, rate)]) * ROUNDS
    assert chisquare(cells, expected).pvalue > 1e-4  # a false alarm in 10,000 seeds
    wrong = binom.pmf(np.arange(M + 1), M, rate * 1.1)
    assert abs((wrong * np.arange(M + 1)).sum() - sizes.mean()) > 5 * math.sqrt(M * rate * (1 - rate) / ROUNDS)


def test_rounds_may_be_empty() -> None:
    sizes = taken(0.05, devices=10).sum(1)
    empty, p = float((sizes == 0).double().mean()), 0.95**10
    assert abs(empty - p) < 5 * math.sqrt(p * (1 - p) / ROUNDS)
    rows = PoissonSample(1e-12)(torch.arange(5), round_index=0, seed=0)
    assert rows.shape == (0,)
    assert rows.dtype == torch.int64
    assert PoissonSample(0.5)(torch.arange(0), round_index=0, seed=0).shape == (0,)


def test_rows_are_distinct_ascending_int64_and_not_ids() -> None:
    for r in range(50):
        rows = PoissonSample(0.5)(torch.arange(100, 130), round_index=r, seed=3)
        assert rows.dtype == torch.int64
        assert all(a < b for a, b in pairwise(rows.tolist()))
        assert not len(rows) or (rows[0] >= 0 and rows[-1] < 30)


def test_rate_one_takes_all() -> None:
    ids = torch.arange(7)
    for r in range(20):
        assert torch.equal(PoissonSample(1.0)(ids, round_index=r, seed=0), torch.arange(7))
    assert torch.equal(AllDevices()(ids, round_index=0, seed=0), torch.arange(7))


def test_draws_depend_on_seed_and_round_alone() -> None:
    ids, scheduler = torch.arange(200), PoissonSample(0.4)
    first = scheduler(ids, round_index=3, seed=1)
    torch.rand(10)
    scheduler(ids, round_index=4, seed=1)
    assert torch.equal(scheduler(ids, round_index=3, seed=1), first)
    assert torch.equal(PoissonSample(0.4)(ids, round_index=3, seed=1), first)
    assert not torch.equal(scheduler(ids, round_index=4, seed=1), first)
    assert not torch.equal(scheduler(ids, round_index=3, seed=2), first)


def test_a_device_that_has_no_data_does_not_change_whether_a_device_before_it_takes_part() -> None:
    few = PoissonSample(0.4)(torch.arange(50), round_index=3, seed=1)
    many = PoissonSample(0.4)(torch.arange(80), round_index=3, seed=1)
    assert torch.equal(many[many < 50], few)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.0001, float("nan"), float("inf")])
def test_rates_that_are_no_probability_are_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=r"`sample_rate` is a probability in \(0, 1\], got"):
        PoissonSample(rate)


def test_schedulers_tell_the_rate_that_accountants_need() -> None:
    assert PoissonSample(0.3).sample_rate == 0.3
    assert AllDevices().sample_rate == 1.0
    assert UniformSample(3).sample_rate is None  # its participants depend on each other
