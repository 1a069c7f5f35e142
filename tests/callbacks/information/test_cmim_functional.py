"""CMI over temperatures, and its aggregates."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax
from torch import Tensor

from groundwire.callbacks.information.cmim import aggregate_cmi, cmi_over_temperatures
from groundwire.callbacks.information.functional import class_centroids, conditional_mutual_information, log_probs

ALPHAS = [0.05, 0.3, 1.0, 2.0]


def sample(n: int = 40, classes: int = 5, seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    target = rng.integers(0, classes, n)
    logits = scale * (rng.standard_normal((n, classes)) + np.eye(classes)[target])
    return torch.tensor(logits), torch.tensor(target)


def of(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def brute(logits: Tensor, target: Tensor, alpha: float) -> float:
    """Mean divergence of ``p^alpha``, renormalised, from the means of those: not the transform of the means."""
    log_p, y = log_softmax(alpha * logits.double().numpy(), axis=1), target.numpy()
    total = 0.0
    for i in range(len(y)):
        centroid = np.exp(log_p)[y == y[i]].mean(0)
        total += float((np.exp(log_p[i]) * (log_p[i] - np.log(centroid))).sum())
    return total / len(y)


def entropy_of_counts(counts: list[int]) -> float:
    return -sum(n / sum(counts) * math.log(n / sum(counts)) for n in counts if n)


@pytest.mark.parametrize(("n", "classes"), [(40, 5), (4, 12), (9, 90)])
def test_values_are_those_of_a_loop_over_temperatures(n: int, classes: int) -> None:
    logits, target = sample(n, classes)
    found = cmi_over_temperatures(logits, target, of(ALPHAS))
    expected = [brute(logits, target, alpha) for alpha in ALPHAS]
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-11)


def test_at_temperature_one_it_is_cmi() -> None:
    logits, target = sample()
    (found,) = cmi_over_temperatures(logits, target, of([1.0]))
    assert float(found) == pytest.approx(float(conditional_mutual_information(logits, target)), abs=1e-14)


def test_given_centroids_belong_to_their_temperature() -> None:
    logits, target = sample()
    tables = torch.tensor(np.random.default_rng(1).dirichlet(np.ones(5), (4, 5)))
    found = cmi_over_temperatures(logits, target, of(ALPHAS), tables)
    for k, alpha in enumerate(ALPHAS):
        log_p = log_softmax(alpha * logits.numpy(), axis=1)
        by_hand = np.mean(
            [(np.exp(log_p[i]) * (log_p[i] - np.log(tables[k, target[i]].numpy()))).sum() for i in range(40)]
        )
        assert float(found[k]) == pytest.approx(by_hand, abs=1e-13)
    exact = torch.stack([class_centroids(log_probs(logits, a).exp(), target, 5) for a in ALPHAS])
    tight = cmi_over_temperatures(logits, target, of(ALPHAS), exact)
    torch.testing.assert_close(tight, cmi_over_temperatures(logits, target, of(ALPHAS)))
    assert bool((tight < found).all())


@pytest.mark.parametrize(("n", "classes"), [(20, 5), (5, 12)])
def test_constant_centroids_do_not_change_the_gradient(n: int, classes: int) -> None:
    logits, target = sample(n, classes)
    logits.requires_grad_()
    for k, alpha in enumerate(ALPHAS):
        (detached,) = torch.autograd.grad(cmi_over_temperatures(logits, target, of(ALPHAS))[k], logits)
        flowing = conditional_mutual_information(logits, target, alpha=alpha)  # through its centroids, too
        (expected,) = torch.autograd.grad(flowing, logits)
        torch.testing.assert_close(detached, expected, rtol=0, atol=1e-15)
        assert float(expected.abs().max()) > 1e-5
    assert torch.autograd.gradcheck(lambda z: cmi_over_temperatures(z, target, of(ALPHAS)), logits)


def test_vmap_of_grad_is_a_loop() -> None:
    data = [sample(6, 8, seed) for seed in range(3)]
    logits, target = torch.stack([z for z, _ in data]), torch.stack([y for _, y in data])

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return cmi_over_temperatures(z, y, of(ALPHAS)).sum()

    together = torch.func.vmap(torch.func.grad(loss))(logits, target)
    for device in range(3):
        torch.testing.assert_close(together[device], torch.func.grad(loss)(logits[device], target[device]))


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_zero_at_alpha_zero(dtype: torch.dtype) -> None:
    logits, target = sample(scale=50.0)
    (found,) = cmi_over_temperatures(logits.to(dtype), target, torch.zeros(1, dtype=dtype))
    assert abs(float(found)) < (1e-6 if dtype == torch.float32 else 1e-14)


def test_at_low_temperatures_it_is_the_entropy_of_the_arg_max_within_the_classes() -> None:
    guesses = {0: [0, 0, 0, 1], 1: [1, 2, 0, 2, 2, 1]}  # of 3 columns
    target = torch.tensor([label for label, tops in guesses.items() for _ in tops])
    top = torch.tensor([t for tops in guesses.values() for t in tops])
    logits = torch.rand(10, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[torch.arange(10), top] += 2.0
    expected = 0.4 * entropy_of_counts([3, 1]) + 0.6 * entropy_of_counts([2, 1, 3])
    found = cmi_over_temperatures(logits, target, of([1.0, 100.0]))
    assert float(found[1]) == pytest.approx(expected, abs=1e-12)
    assert float(found[0]) < 0.9 * expected
    in_float32 = cmi_over_temperatures(logits.float(), target, torch.tensor([1e4]))
    assert float(in_float32) == pytest.approx(expected, abs=1e-6)


def test_at_high_temperatures_it_is_the_variance_of_centred_logits() -> None:
    logits, target = sample(200, 6)
    centred, y = (logits - logits.mean(1, keepdim=True)).numpy(), target.numpy()
    trace = sum((y == c).mean() * centred[y == c].var(axis=0).sum() for c in range(6))
    limit = trace / (2 * 6)
    ratios = cmi_over_temperatures(logits, target, of([0.1, 0.01, 0.001])).numpy() / limit
    ratios = ratios / np.array([0.1, 0.01, 0.001]) ** 2
    assert abs(ratios[2] - 1) < 1e-3
    assert abs(ratios[0] - 1) > 3 * abs(ratios[1] - 1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.1, 10.0))
def test_scaled_logits_are_scaled_alphas_and_shifts_do_not_matter(seed: int, scale: float) -> None:
    logits, target = sample(seed=seed)
    shift = torch.linspace(-5, 5, 40, dtype=torch.float64)[:, None]
    expected = cmi_over_temperatures(logits, target, scale * of(ALPHAS))
    torch.testing.assert_close(cmi_over_temperatures(scale * logits + shift, target, of(ALPHAS)), expected)
    assert bool((expected > 0).all())
    assert bool((expected < math.log(5)).all())


def test_collapse_at_one_temperature_is_collapse_at_all() -> None:
    _, target = sample()
    rows = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shift = torch.linspace(-5, 5, 40, dtype=torch.float64)[:, None]
    assert float(cmi_over_temperatures(rows[target] + shift, target, of(ALPHAS)).abs().max()) < 1e-14
    one_off = rows[target] + shift
    one_off[3, 2] += 0.1
    assert bool((cmi_over_temperatures(one_off, target, of(ALPHAS)) > 1e-8).all())


@pytest.mark.parametrize("scale", [160.0, 1e4])
def test_huge_logits_give_finite_values_and_gradients(scale: float) -> None:
    logits, target = sample(scale=scale)
    logits = logits.float().requires_grad_()
    values = cmi_over_temperatures(logits, target, torch.tensor(ALPHAS))
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    assert bool(values.isfinite().all())
    assert bool(gradient.isfinite().all())


def test_half_precision_logits_are_cast_up_first() -> None:
    logits, target = sample()
    for dtype in (torch.float16, torch.bfloat16):
        found = cmi_over_temperatures(logits.to(dtype), target, torch.tensor(ALPHAS))
        assert found.dtype == torch.float32
        exact = cmi_over_temperatures(logits.to(dtype).double(), target, of(ALPHAS))
        np.testing.assert_allclose(found.numpy(), exact.numpy(), rtol=0, atol=2e-6)


# ---------------------------------------------------------------- aggregates


def test_aggregates_by_hand() -> None:
    values = of([0.1, 0.7, 0.4])
    assert float(aggregate_cmi(values, "mean")) == pytest.approx(0.4)
    assert float(aggregate_cmi(values, "max")) == 0.7
    for kappa in (0.5, 10.0):
        smooth = math.log(sum(math.exp(kappa * v) for v in (0.1, 0.7, 0.4)) / 3) / kappa
        assert float(aggregate_cmi(values, "smoothmax", kappa)) == pytest.approx(smooth, abs=1e-14)
    assert float(aggregate_cmi(values, "smoothmax")) == pytest.approx(float(aggregate_cmi(values, "smoothmax", 10.0)))


def test_smoothmax_is_the_mean_for_small_and_the_maximum_for_large_kappa() -> None:
    values = of([0.1, 0.7, 0.4])
    found = [float(aggregate_cmi(values, "smoothmax", kappa)) for kappa in (0.0, 1e-4, 1.0, 10.0, 100.0, 1e5)]
    assert found == sorted(found)
    assert found[0] == pytest.approx(0.4, abs=1e-15)
    assert found[1] == pytest.approx(0.4, abs=1e-5)
    assert found[-1] == pytest.approx(0.7, abs=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 5), min_size=1, max_size=6), st.floats(0.01, 50))
def test_smoothmax_lies_between_mean_and_maximum(values: list[float], kappa: float) -> None:
    smooth: Any = aggregate_cmi(of(values), "smoothmax", kappa)
    assert float(np.mean(values)) - 1e-9 <= float(smooth) <= max(values) + 1e-9


@pytest.mark.parametrize("how", ["mean", "max", "smoothmax"])
def test_aggregates_differentiate_and_one_value_is_itself(how: Any) -> None:
    assert torch.autograd.gradcheck(lambda v: aggregate_cmi(v, how), of([0.1, 0.7, 0.4]).requires_grad_())
    assert float(aggregate_cmi(of([0.3]), how)) == pytest.approx(0.3, abs=1e-15)
