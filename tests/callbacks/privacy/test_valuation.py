"""Data valuation by diversity and relevance."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from groundwire.callbacks.privacy.independence import PrivateIndependenceTest, gaussian_mu, release_sketch
from groundwire.callbacks.privacy.valuation import (
    DataValuation,
    answer_query,
    answer_sensitivity,
    diversity_and_relevance,
    principal_query,
)
from groundwire.plugins.privacy import gaussian_epsilon
from helpers.ddp import run_ddp


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(n: int = 80, d: int = 5, seed: int = 0) -> Tensor:
    return normal(n, d, seed=seed) @ normal(d, d, seed=99) + 3.0


def valued(metric: DataValuation, *batches: Tensor) -> dict[str, float]:
    for batch in batches:
        metric.update(batch)
    return {name: float(value) for name, value in metric.compute().items()}


def value(buyer: Tensor, seller: Tensor, **options: float) -> dict[str, float]:
    return valued(DataValuation(buyer, **options), seller)


@pytest.mark.parametrize("standardize", [True, False])
def test_directions_and_answers_match_a_singular_value_decomposition(standardize: bool) -> None:
    buyer, seller = correlated(), correlated(30, seed=1)
    query = principal_query(buyer, num_directions=3, tol=1e-6, standardize=standardize)
    x, y = buyer.numpy(), seller.numpy()
    if standardize:
        x, y = (x - x.mean(0)) / x.std(0), (y - x.mean(0)) / x.std(0)
    _, singular, directions = np.linalg.svd(x, full_matrices=False)
    np.testing.assert_allclose(query.variances, singular[:3] ** 2 / len(x), rtol=1e-9)
    np.testing.assert_allclose(np.abs(query.directions.numpy() @ directions[:3].T), np.eye(3), atol=1e-8)
    covariance = y.T @ y / len(y)
    expected = [u @ covariance @ u for u in directions[:3]]
    np.testing.assert_allclose(answer_query(seller, query), expected, rtol=1e-9)


def test_directions_of_little_variance_are_left_out() -> None:
    buyer = normal(200, 4) * torch.tensor([10.0, 3.0, 0.5, 0.0])
    assert len(principal_query(buyer, standardize=False).variances) == 2
    assert len(principal_query(buyer, standardize=False, tol=1e-4).variances) == 3
    assert len(principal_query(buyer, standardize=False, num_directions=1).variances) == 1
    assert len(principal_query(buyer).variances) == 3  # a constant feature has no direction


def test_the_same_data_is_relevant_and_not_diverse() -> None:
    x = correlated()
    found = value(x, x)
    assert found["diversity"] == pytest.approx(0.0, abs=1e-12)
    assert found["relevance"] == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("factor", [1.5, 4.0])
def test_scaled_data_has_the_relevance_of_the_inverse_square(factor: float) -> None:
    x = correlated()
    for standardize, data in ((False, x), (True, x - x.mean(0))):
        buyer = DataValuation(data, standardize=standardize)
        found = valued(buyer, factor * data)
        assert found["relevance"] == pytest.approx(factor**-2, rel=1e-9)
        assert found["diversity"] == pytest.approx(1 - factor**-2, rel=1e-9)
    assert value(x, x / factor, standardize=False)["relevance"] == pytest.approx(factor**-2, rel=1e-9)


def test_another_mean_counts_as_diversity() -> None:
    x = correlated()
    assert value(x, x + 10.0)["diversity"] > value(x, correlated(seed=1))["diversity"]


@given(
    st.lists(
        st.tuples(st.floats(1e-30, 1e30), st.one_of(st.just(0.0), st.floats(-1e-3, 1e30))), min_size=1, max_size=40
    )
)
def test_diversity_and_relevance_share_one(pairs: list[tuple[float, float]]) -> None:
    buyer, seller = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    diversity, relevance = map(float, diversity_and_relevance(buyer, seller))
    assert 0 <= diversity <= 1
    assert 0 <= relevance <= 1
    assert diversity + relevance <= 1 + 1e-12


def test_many_directions_do_not_underflow() -> None:
    buyer = torch.ones(1000)
    diversity, relevance = diversity_and_relevance(buyer, 0.1 * buyer)  # a product of 1000 factors 0.1 is 0 in float64
    assert float(relevance) == pytest.approx(0.1, rel=1e-5)
    assert float(diversity) == pytest.approx(0.9, rel=1e-5)


def test_matches_the_products_as_written() -> None:
    buyer, seller = torch.tensor([3.0, 1.0, 0.5]), torch.tensor([1.0, 2.0, 0.4])
    diversity, relevance = diversity_and_relevance(buyer, seller)
    assert float(diversity) == pytest.approx((2 / 3 * 1 / 2 * 0.1 / 0.5) ** (1 / 3), rel=1e-6)
    assert float(relevance) == pytest.approx((1 / 3 * 1 / 2 * 0.4 / 0.5) ** (1 / 3), rel=1e-6)


def test_a_direction_that_the_seller_lacks_leaves_no_relevance() -> None:
    x = normal(100, 3)
    u = principal_query(x, standardize=False).directions[1]
    assert value(x, x - torch.outer(x @ u, u), standardize=False)["relevance"] < 1e-6
    diversity, relevance = diversity_and_relevance(torch.ones(2), torch.tensor([1.0, -0.1]))
    assert (float(diversity), float(relevance)) == (0.0, 0.0)


@given(st.integers(0, 2**31), st.integers(2, 6))
def test_order_duplicates_and_batches_do_not_matter(seed: int, parts: int) -> None:
    buyer, seller = correlated(), correlated(40, seed=seed % 1000 + 1)
    shuffled = seller[torch.randperm(40, generator=torch.Generator().manual_seed(seed))]
    expected = pytest.approx(value(buyer, seller), rel=1e-9)
    assert value(buyer, shuffled) == expected
    assert value(buyer, torch.cat([seller, seller])) == expected
    assert valued(DataValuation(buyer), *shuffled.chunk(parts)) == expected


def test_metrics_of_two_processes_merge() -> None:
    buyer, seller = correlated(), correlated(40, seed=1)
    first, second = DataValuation(buyer), DataValuation(buyer)
    first.update(seller[:13])
    second.update(seller[13:])
    first.merge_state(second)
    assert {k: float(v) for k, v in first.compute().items()} == pytest.approx(value(buyer, seller), rel=1e-12)


def measures_on_a_rank() -> tuple[dict[str, float], dict[str, float], dict[str, float], bool]:
    dist.init_process_group("gloo")
    try:
        mine = correlated(40, seed=1)[dist.get_rank() :: 2]
        plain = valued(DataValuation(correlated()), mine)
        private = valued(DataValuation(correlated(), clip_norm=2.0, epsilon=1.0), mine)
        test = PrivateIndependenceTest(epsilon=20.0, noise_seed=1)
        test.update(mine[:, 0], mine[:, 1])
        found = {name: float(value) for name, value in test.compute().items()}
        both: list[Tensor] = [torch.empty_like(test.u[0]) for _ in range(2)]
        dist.all_gather(both, test.u[0] - release_sketch(mine[:, :1], clip_norm=1.0, noise_std=0.0))
        return plain, private, found, torch.equal(*both)
    finally:
        dist.destroy_process_group()


def test_two_processes_measure_what_one_does_and_draw_one_noise_for_the_answers() -> None:
    first, second = run_ddp(measures_on_a_rank)
    assert first == second
    plain, private, _, shared_noise = first
    assert plain == pytest.approx(value(correlated(), correlated(40, seed=1)), rel=1e-9)
    assert private != pytest.approx(value(correlated(), correlated(40, seed=1), clip_norm=2.0), rel=1e-3)
    assert not shared_noise, "each process releases its own rows, with noise of its own also under one seed"


def test_images_and_float32_are_taken() -> None:
    images = normal(50, 1, 2, 3).float()
    found = value(images, images)
    assert found["relevance"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("k", [1, 3])
def test_one_row_moves_the_answers_by_no_more_than_the_sensitivity(k: int) -> None:
    clip, n = 1.5, 4
    query = principal_query(normal(50, 3), num_directions=k, tol=1e-6, standardize=False, clip_norm=clip)
    rest, largest = normal(n - 1, 3, seed=1), 0.0
    candidates = [torch.zeros(3).double(), *(100 * query.directions), *normal(200, 3, seed=2) * 3]
    answers = torch.stack([answer_query(torch.cat([rest, row[None]]), query) for row in candidates])
    largest = float(torch.cdist(answers, answers).max())
    bound = answer_sensitivity(clip, n, k)
    assert largest <= bound * (1 + 1e-12)
    assert largest == pytest.approx(bound, rel=1e-9), "and it is reached"


def test_private_answers_carry_the_noise_they_claim() -> None:
    buyer, seller = normal(100, 4), normal(400, 4, seed=1)
    options = {"clip_norm": 2.0, "tol": 1e-6}
    exact = answer_query(seller, principal_query(buyer, **options))
    draws = []
    for seed in range(300):
        metric = DataValuation(buyer, epsilon=1.0, delta=1e-5, noise_seed=seed, **options)
        metric.update(seller)
        draws.append(metric.squares / 400 + metric.noise_std(400) * torch.randn(4, generator=metric._noise()).double())
    std = math.sqrt(2) * 4 / 400 / gaussian_mu(1.0, 1e-5)
    noise = torch.stack(draws) - exact
    error = 5 * math.sqrt(2 / noise.numel())
    assert abs(float(noise.square().mean()) / std**2 - 1) < error
    assert abs(float(noise.square().mean()) / (std / math.sqrt(2)) ** 2 - 1) > error


def test_private_results_change_repeat_and_add_up() -> None:
    buyer, seller = normal(100, 4), normal(400, 4, seed=1)
    options = {"clip_norm": 2.0, "epsilon": 1.0}
    exact = value(buyer, seller, clip_norm=2.0)
    metric = DataValuation(buyer, **options)
    assert metric.privacy.epsilon == 0.0
    first = valued(metric, seller)
    assert first != exact
    metric._computed = None  # as after a synchronisation: the result is worked out again
    assert {k: float(v) for k, v in metric.compute().items()} == first, "no second noise on the same data"
    assert (metric.privacy.epsilon, metric.privacy.delta) == (1.0, 1e-5)
    assert valued(metric, seller) != first
    assert metric.privacy.epsilon == pytest.approx(gaussian_epsilon(math.sqrt(2) * gaussian_mu(1.0, 1e-5), 1e-5))
    assert valued(DataValuation(buyer, **options), seller) != first, "another metric has noise of its own"
    seeded = [value(buyer, seller, noise_seed=1, **options) for _ in range(2)]
    assert seeded[0] == seeded[1]


def test_the_noise_of_a_copy_is_not_that_of_the_original() -> None:
    buyer, seller = normal(100, 4), normal(400, 4, seed=1)
    metric = DataValuation(buyer, clip_norm=2.0, epsilon=1.0)
    twin = copy.deepcopy(metric)
    for _ in range(5):  # the sum of the draws goes round int64
        metric.update(seller)
        twin.update(seller)
    assert metric.compute() != twin.compute()
    alone, twice = DataValuation(buyer, clip_norm=2.0, epsilon=1.0), DataValuation(buyer, clip_norm=2.0, epsilon=1.0)
    alone.update(seller)
    twice.update(seller)
    before = int(alone.entropy)
    alone.merge_state(twice)
    assert int(alone.entropy) not in (before, int(twice.entropy)), "merged data has noise of its own"


def test_without_privacy_the_statement_says_so() -> None:
    x = correlated()
    metric = DataValuation(x)
    metric.update(x)
    assert metric.privacy.epsilon == math.inf


def test_bad_input_is_refused() -> None:
    x = correlated()
    nan = x.clone()
    nan[0, 0] = math.inf
    for bad, message in (
        (lambda: principal_query(x[0]), r"`buyer` must have shape \(n, d\)"),
        (lambda: principal_query(x[:1]), "at least 2 rows"),
        (lambda: principal_query(nan), "`buyer` has values that are NaN or infinite"),
        (lambda: principal_query(torch.ones(9, 3)), "`buyer` has no variance"),
        (lambda: principal_query(x, num_directions=6), r"`num_directions` must be in \[1, 5\]"),
        (lambda: principal_query(x, tol=0.0), r"`tol` must be in \(0, 1\]"),
        (lambda: principal_query(x, clip_norm=0.0), "`clip_norm` must be positive"),
        (lambda: answer_query(x[:, :4], principal_query(x)), "rows of 4 entries, the buyer's have 5"),
        (lambda: answer_query(x[:0], principal_query(x)), "`seller` has no row"),
        (lambda: diversity_and_relevance(torch.ones(2), torch.ones(3)), "two vectors of one length"),
        (lambda: diversity_and_relevance(torch.zeros(2), torch.ones(2)), "must be positive"),
        (lambda: DataValuation(x, epsilon=0.0), "`epsilon` must be positive"),
        (lambda: DataValuation(x, epsilon=1.0), "give `clip_norm`"),
        (lambda: DataValuation(x, epsilon=1.0, delta=1.0, clip_norm=1.0), r"`delta` must be in \(0, 1\)"),
        (lambda: DataValuation(x).update(nan), "`seller` has values that are NaN or infinite"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()
    metric = DataValuation(x)
    metric.update(x[:0])
    with pytest.raises(ValueError, match="There is no row of the seller"):
        metric.compute()
