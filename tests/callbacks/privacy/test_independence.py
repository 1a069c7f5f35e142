"""Distance correlation and the private independence test."""

from __future__ import annotations

import copy
import math
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import Tensor

from groundwire.callbacks.privacy.independence import (
    DistanceCorrelation,
    PrivateIndependenceTest,
    distance_correlation,
    gaussian_mu,
    permutation_p_value,
    pi_test,
    release_sketch,
    squared_distances,
)
from groundwire.plugins.privacy import gaussian_delta, gaussian_epsilon


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def in_ball(n: int, seed: int) -> Tensor:
    """Rows in [-1, 1], of norm up to 1."""
    return torch.rand(n, 1, generator=generator(seed), dtype=torch.float64) * 2 - 1


def by_loops(x: np.ndarray, y: np.ndarray) -> float:
    """Distance correlation as its definition reads, entry by entry."""
    n = len(x)

    def centred(v: np.ndarray) -> np.ndarray:
        d = np.array([[math.dist(v[i], v[j]) for j in range(n)] for i in range(n)])
        return np.array([[d[i, j] - d[i].mean() - d[:, j].mean() + d.mean() for j in range(n)] for i in range(n)])

    a, b = centred(x), centred(y)
    return math.sqrt((a * b).mean() / math.sqrt((a * a).mean() * (b * b).mean()))


@pytest.mark.parametrize(("n", "d_x", "d_y"), [(2, 1, 1), (7, 3, 1), (25, 2, 5)])
def test_distance_correlation_matches_its_definition(n: int, d_x: int, d_y: int) -> None:
    x, y = normal(n, d_x), normal(n, d_y, seed=1)
    y[:, 0] += x[:, 0] ** 2
    assert float(distance_correlation(x, y)) == pytest.approx(by_loops(x.numpy(), y.numpy()), abs=1e-12)


def test_distance_correlation_of_known_cases() -> None:
    x = normal(60, 3)
    rotation = torch.linalg.qr(normal(3, 3, seed=2)).Q
    assert float(distance_correlation(x, 5 - 3 * x @ rotation)) == pytest.approx(1.0, abs=1e-12)
    assert float(distance_correlation(x[:, 0], torch.ones(60))) == 0.0
    # of n independent rows, n dCov^2 converges in distribution, so the estimate falls with the fourth root
    few, many = (float(distance_correlation(normal(n), normal(n, seed=1))) for n in (50, 2000))
    assert many < few < 0.4
    assert many < 0.08
    t = torch.linspace(-1, 1, 401, dtype=torch.float64)
    assert abs(np.corrcoef(t, t.square())[0, 1]) < 1e-12
    assert float(distance_correlation(t, t.square())) > 0.4


def test_distance_correlation_is_symmetric_and_takes_any_dtype() -> None:
    x, y = normal(30, 2), normal(30, 3, seed=1)
    assert torch.equal(distance_correlation(x, y), distance_correlation(y, x))
    assert torch.allclose(distance_correlation(x.float(), y.float()), distance_correlation(x, y), atol=1e-6)
    assert distance_correlation(torch.arange(9), torch.arange(9)).item() == pytest.approx(1.0)


def test_distance_correlation_has_the_gradient_of_finite_differences() -> None:
    x, y = normal(6, 2).requires_grad_(), normal(6, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(distance_correlation, (x, y))
    distance_correlation(x, torch.ones(6)).backward()
    assert bool(x.grad.isfinite().all())


def test_clipping_bounds_what_one_row_can_do() -> None:
    x = normal(20, 4)
    x[3] *= 1e6
    u = release_sketch(x, clip_norm=0.7, noise_std=0.0, sketch_dim=3, projection=generator())
    assert u.shape == (20, 3)
    assert float(u.norm(dim=1).max()) <= 0.7 + 1e-12
    short = x * 1e-3
    short[3] = 0
    assert torch.equal(release_sketch(short, clip_norm=0.7, noise_std=0.0), short), "short rows are not changed"


def test_noise_has_the_power_that_is_asked_for() -> None:
    n, std = 50_000, 0.3
    u = release_sketch(torch.zeros(n, 2), clip_norm=1.0, noise_std=std, noise=generator())
    error = 5 * std**2 * math.sqrt(2 / (2 * n))
    assert abs(float(u.square().mean()) - std**2) < error
    assert (
        abs(float(u.square().mean()) - (2 * std) ** 2) > error
    )  # the sensitivity is 2 r, not r: a factor that is easy to lose
    apart = [release_sketch(torch.zeros(2, 2), clip_norm=1.0, noise_std=std) for _ in range(2)]
    assert not torch.equal(*apart), "without a seed, the noise is fresh"


def test_estimated_squared_distances_are_unbiased() -> None:
    x, std, k, trials = normal(3, 6) * 0.3, 0.4, 2, 4000
    draws = []
    for t in range(trials):
        u = release_sketch(
            x, clip_norm=9.0, noise_std=std, sketch_dim=k, projection=generator(t), noise=generator(-1 - t)
        )
        draws.append(squared_distances(u, noise_std=std, input_dim=6))
    found = torch.stack(draws)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        true = float((x[i] - x[j]).square().sum())
        assert abs(float(found[:, i, j].mean()) - true) < 4 * float(found[:, i, j].std()) / math.sqrt(trials)
        uncorrected = float(found[:, i, j].mean()) + 2 * 6 * std**2
        assert abs(uncorrected - true) > 4 * float(found[:, i, j].std()) / math.sqrt(trials)


@pytest.mark.parametrize("epsilon", [0.01, 1.0, 20.0, 500.0])
@pytest.mark.parametrize("delta", [1e-12, 1e-5, 0.3])
def test_calibration_is_tight_and_never_on_the_wrong_side(epsilon: float, delta: float) -> None:
    mu = gaussian_mu(epsilon, delta)
    assert gaussian_delta(epsilon, mu) <= delta < gaussian_delta(epsilon, 1.001 * mu)
    assert gaussian_epsilon(mu, delta) == pytest.approx(epsilon, rel=1e-4)


def test_the_p_value_is_the_share_of_all_shuffles() -> None:
    x, y = normal(5, 1), normal(5, 1, seed=1)
    d_x, d_y = (torch.cdist(v, v) for v in (x, y))

    def centred(d: np.ndarray) -> np.ndarray:
        return d - d.mean(0) - d.mean(1, keepdims=True) + d.mean()

    a, b = centred(d_x.numpy()), centred(d_y.numpy())
    everything = [float((a * b[np.ix_(p, p)]).sum()) for p in map(list, permutations(range(5)))]
    exact = np.mean(np.array(everything) >= everything[0] - 1e-12)
    found = permutation_p_value(d_x, d_y, 20_000, generator())
    assert abs(found - exact) < 5 * math.sqrt(exact * (1 - exact) / 20_000) + 1e-4


def test_chunks_of_shuffles_give_the_same_p_value(monkeypatch: pytest.MonkeyPatch) -> None:
    d_x, d_y = (torch.cdist(v, v) for v in (normal(25, 1), normal(25, 1, seed=1)))
    whole = permutation_p_value(d_x, d_y, 50, generator())
    monkeypatch.setattr("groundwire.callbacks.privacy.independence._CHUNK", 3 * 25**2)
    assert permutation_p_value(d_x, d_y, 50, generator()) == whole


def test_equal_pairings_count_as_ties() -> None:
    x = normal(30, 2)
    assert pi_test(x, torch.ones(30), epsilon=math.inf).p_value == 1.0
    two_values = torch.tensor([0.0] * 29 + [1.0])  # 30 pairings differ, and rounding must not tell the equal ones apart
    found = pi_test(x, two_values, epsilon=math.inf, num_permutations=599).p_value
    exact = sum(
        float(distance_correlation(x, two_values.roll(k))) >= float(distance_correlation(x, two_values)) - 1e-9
        for k in range(30)
    )
    assert abs(found - exact / 30) < 0.07


@pytest.mark.parametrize("noise", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("private_y", [False, True])
def test_the_level_holds_at_every_noise(noise: float, private_y: bool) -> None:
    trials, rejected, small = 500, 0, 0
    epsilon = gaussian_epsilon(2.0 / noise, 1e-5) if noise else math.inf
    for t in range(trials):
        result = pi_test(
            in_ball(24, 2 * t),
            in_ball(24, 2 * t + 1).square(),
            epsilon=epsilon,
            private_y=private_y,
            num_permutations=19,
            seed=t,
            noise_seed=t,
        )
        rejected += result.p_value <= 0.05
        small += result.p_value <= 0.25
    assert rejected <= binom.ppf(0.9999, trials, 0.05)
    low, high = binom.ppf([0.0001, 0.9999], trials, 0.25)  # exact, so not conservative either
    assert low <= small <= high


def test_power_falls_with_noise() -> None:
    trials, power = 25, []
    for mu in (math.inf, 7.0, 1.0):
        epsilon = gaussian_epsilon(mu, 1e-5)
        rejected = 0
        for t in range(trials):
            x = in_ball(60, t)
            y = x.square() + 0.05 * normal(60, 1, seed=1000 + t)
            rejected += pi_test(x, y, epsilon=epsilon, num_permutations=39, seed=t, noise_seed=t).p_value <= 0.05
        power.append(rejected / trials)
    assert power[0] == 1.0
    assert power[0] > power[1] > power[2]
    assert power[2] <= 0.2


def test_a_sketch_of_fewer_columns_still_finds_dependence() -> None:
    x = normal(100, 8) / 4
    found = pi_test(x, x @ normal(8, 2, seed=1), epsilon=math.inf, sketch_dim=4)
    assert found.p_value == 0.005
    assert found.num_samples == 100


def test_the_statement_says_what_was_done() -> None:
    x = normal(30, 2)
    result = pi_test(x, x, epsilon=3.0, delta=1e-4, clip_norm=2.0, noise_seed=0)
    assert result.noise_std == pytest.approx(
        4.0 / gaussian_mu(3.0, 1e-4)
    )  # a row in a ball of radius 2 moves by up to 4
    assert (result.privacy.epsilon, result.privacy.delta, result.privacy.adjacency) == (3.0, 1e-4, "replace-one")
    assert "not protected" in str(result.privacy)
    both = pi_test(x, x, epsilon=3.0, private_y=True).privacy
    assert both.unit.startswith("one row of either party")
    assert "row at both parties" in str(both)
    assert pi_test(x, x, epsilon=math.inf).privacy.epsilon == math.inf


def test_seeds_repeat_a_run_and_noise_is_fresh_without_one() -> None:
    x, y = in_ball(40, 0), in_ball(40, 1)
    first, again = (pi_test(x, y, epsilon=30.0, noise_seed=3) for _ in range(2))
    assert first == again
    a, b = (pi_test(x, y, epsilon=30.0).distance_correlation for _ in range(2))
    assert a != b
    same = pi_test(x, x, epsilon=30.0, private_y=True, noise_seed=3)
    assert same.distance_correlation < 0.999, "the two parties must not share their noise"


def test_large_data_is_subsampled_with_a_message(caplog: pytest.LogCaptureFixture) -> None:
    x = in_ball(200, 0)
    with caplog.at_level("INFO"):
        result = pi_test(x, x, epsilon=math.inf, max_samples=50)
    assert result.num_samples == 50
    assert "a random 50 of them" in caplog.text
    metric = DistanceCorrelation(max_samples=50)
    metric.update(x, x.square())
    assert 0.3 < float(metric.compute()) < 0.7


def test_metrics_in_batches_equal_the_functions() -> None:
    x, y = normal(90, 2) / 3, normal(90, 1, seed=1)
    correlation, test = DistanceCorrelation(), PrivateIndependenceTest(epsilon=math.inf, sketch_dim=1)
    for rows in (slice(0, 40), slice(40, 90)):
        correlation.update(x[rows], y[rows])
        test.update(x[rows], y[rows])
    assert torch.equal(correlation.compute(), distance_correlation(x, y))
    expected = pi_test(x, y, epsilon=math.inf, sketch_dim=1)
    found = test.compute()
    assert float(found["p_value"]) == expected.p_value
    assert float(found["distance_correlation"]) == pytest.approx(expected.distance_correlation, abs=1e-12)


def test_the_metric_keeps_sketches_and_releases_each_row_once() -> None:
    x, y = in_ball(40, 0), in_ball(40, 1)
    metric = PrivateIndependenceTest(epsilon=5.0, private_y=True)
    batch_value = metric(x, y)  # `forward`: the value of the batch, and an update
    assert len(metric.u) == 1
    assert all(torch.equal(batch_value[name], value) for name, value in metric.compute().items())
    twin = copy.deepcopy(metric)
    assert not (metric.u[0] == x).any()
    assert not (metric.v[0] == y).any()
    metric.reset()
    metric.update(x, y)
    assert not (metric.u[0] == twin.u[0]).any(), "another pass is another release, with other noise"
    assert metric.privacy.epsilon == 5.0


def test_bad_input_is_refused() -> None:
    x = normal(30, 2)
    nan = x.clone()
    nan[0, 0] = math.nan
    for bad, message in (
        (lambda: distance_correlation(x, x[:29]), "`x` has 30 rows and `y` 29"),
        (lambda: distance_correlation(x[:1], x[:1]), "at least 2 rows are needed, got 1"),
        (lambda: distance_correlation(x, nan), "`y` has values that are NaN or infinite"),
        (lambda: distance_correlation(x[None], x[None]), r"shape \(n, d\) or \(n,\), got \(1, 30, 2\)"),
        (lambda: distance_correlation(x + 1j, x), "complex"),
        (lambda: pi_test(x[:19], x[:19], epsilon=1.0), "at least 20 rows are needed, got 19"),
        (lambda: pi_test(nan, x, epsilon=1.0), "`x` has values that are NaN"),
        (lambda: pi_test(x, x, epsilon=0.0), "`epsilon` must be positive"),
        (lambda: pi_test(x, x, epsilon=1.0, delta=0.0), r"`delta` must be in \(0, 1\)"),
        (lambda: pi_test(x, x, epsilon=1.0, clip_norm=0.0), "`clip_norm` must be positive"),
        (lambda: pi_test(x, x, epsilon=1.0, sketch_dim=3), r"`sketch_dim` must be in \[1, 2\]"),
        (lambda: pi_test(x, x, epsilon=1.0, num_permutations=0), "`num_permutations` must be at least 1"),
        (lambda: release_sketch(x, clip_norm=1.0, noise_std=-1.0), "`noise_std` must be at least 0"),
        (lambda: permutation_p_value(x @ x.T, x), "two square matrices of one shape"),
        (lambda: PrivateIndependenceTest(epsilon=-1.0), "`epsilon` must be positive"),
        (lambda: PrivateIndependenceTest(epsilon=1.0, max_samples=5), "`max_samples` must be at least 20"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()
    metric = PrivateIndependenceTest(epsilon=1.0)
    metric.update(x[:10], x[:10])
    with pytest.raises(ValueError, match="at least 20 rows are needed, got 10"):
        metric.compute()
    with pytest.raises(ValueError, match=r"have \(1, 2\) entries, those before had \(2, 2\)"):
        metric.update(x[:, 0], x)
