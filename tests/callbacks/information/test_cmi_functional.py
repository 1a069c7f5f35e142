"""CMI, Gamma and NCMI as functions, against loops over samples and pairs in numpy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax
from torch import Tensor

from groundwire.callbacks.information import functional
from groundwire.callbacks.information.functional import (
    Separation,
    batch_groups,
    brier_score,
    class_centroids,
    class_counts,
    class_sums,
    conditional_mutual_information,
    divergence_to_centroids,
    log_probs,
    normalized_cmi,
    separation,
    separation_of,
)

Array = np.ndarray[Any, np.dtype[Any]]
KINDS: tuple[Separation, ...] = ("ce", "kl")


def sample(
    n: int, classes: int, seed: int = 0, scale: float = 2.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Logits that lean to their label, and labels, of which at least two classes are present."""
    rng = np.random.default_rng(seed)
    target = rng.integers(0, classes, n)
    target[:2] = 0, 1
    logits = scale * (rng.standard_normal((n, classes)) + np.eye(classes)[target])
    return torch.tensor(logits, dtype=dtype), torch.tensor(target)


def entropy(p: Array) -> float:
    return -float(sum(value * math.log(value) for value in p if value > 0))


def brute_cmi(logits: Tensor, target: Tensor, alpha: float = 1.0) -> float:
    """Mean over the samples of D(p_i || centroid of its class), by loops."""
    log_p, y = log_softmax(alpha * logits.double().numpy(), axis=1), target.numpy()
    total = 0.0
    for i in range(len(y)):
        centroid = np.exp(log_p)[y == y[i]].mean(axis=0)
        for k in range(log_p.shape[1]):
            p = math.exp(log_p[i, k])
            if p > 0:
                total += p * (log_p[i, k] - math.log(centroid[k]))
    return total / len(y)


def brute_pairs(logits: Tensor, target: Tensor, kind: Separation = "ce") -> float:
    """Sum over pairs of different classes of H(p_j, p_k), or of D(p_j || p_k), by a double loop."""
    log_p, y = log_softmax(logits.double().numpy(), axis=1), target.numpy()
    total = 0.0
    for j, k in itertools.product(range(len(y)), repeat=2):
        if y[j] != y[k]:
            first = log_p[j] if kind == "kl" else 0.0
            total += float((np.exp(log_p[j]) * (first - log_p[k])).sum())
    return total


SHAPES = [(2, 2), (7, 3), (60, 7), (200, 7), (12, 40), (50, 70)]  # the last two have more classes than samples


# ---------------------------------------------------------------- against brute force


@pytest.mark.parametrize(("n", "classes"), SHAPES)
def test_cmi_is_the_mean_divergence_from_the_centroids(n: int, classes: int) -> None:
    logits, target = sample(n, classes)
    assert float(conditional_mutual_information(logits, target)) == pytest.approx(brute_cmi(logits, target), abs=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize(("n", "classes"), SHAPES)
def test_gamma_is_the_mean_over_pairs(n: int, classes: int, unbiased: bool, kind: Separation) -> None:
    logits, target = sample(n, classes, seed=1)
    expected = brute_pairs(logits, target, kind) / (n * (n - 1 if unbiased else n))
    assert float(separation(logits, target, kind, unbiased)) == pytest.approx(expected, rel=1e-12, abs=1e-10)
    of_log_p = separation_of(torch.log_softmax(logits, 1), target, classes, kind, unbiased)
    assert float(of_log_p) == pytest.approx(expected, rel=1e-12, abs=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_within_2e5_of_brute_force_in_float64(kind: Separation) -> None:
    logits, target = sample(200, 7, dtype=torch.float32)
    result = normalized_cmi(logits, target, kind=kind)
    assert result.cmi.dtype == torch.float32
    cmi, gamma = brute_cmi(logits, target), brute_pairs(logits, target, kind) / 200**2
    assert float(result.cmi) == pytest.approx(cmi, abs=2e-5)
    assert float(result.gamma) == pytest.approx(gamma, abs=2e-5)
    assert float(result.ncmi) == pytest.approx(cmi / gamma, abs=2e-5)


def test_cmi_is_entropy_of_the_centroids_less_mean_entropy() -> None:  # (G2) of the specification
    logits, target = sample(80, 5)
    p, y = torch.softmax(logits, 1).numpy(), target.numpy()
    expected = sum((y == c).mean() * entropy(p[y == c].mean(0)) for c in range(5)) - np.mean(
        [entropy(row) for row in p]
    )
    assert float(conditional_mutual_information(logits, target)) == pytest.approx(expected, abs=1e-12)


def test_separation_by_divergence_is_that_by_cross_entropy_less_the_own_entropies() -> None:  # (G4)
    logits, target = sample(80, 5)
    p, y = torch.softmax(logits, 1).numpy(), target.numpy()
    own = sum(float((y != y[i]).sum()) * entropy(p[i]) for i in range(80)) / 80**2
    difference = separation(logits, target, "ce") - separation(logits, target, "kl")
    assert float(difference) == pytest.approx(own, abs=1e-12)
    assert own > 0.01


def test_two_classes_have_a_closed_form() -> None:
    a, b = 0.9, 0.3
    rows = [(a, 1 - a), (b, 1 - b)] * 3 + [(0.2, 0.8)] * 4
    logits, target = torch.tensor(rows, dtype=torch.float64).log(), torch.tensor([0] * 6 + [1] * 4)

    def h(x: float) -> float:
        return -x * math.log(x) - (1 - x) * math.log(1 - x)

    expected = 0.6 * (h((a + b) / 2) - h(a) / 2 - h(b) / 2)
    assert float(conditional_mutual_information(logits, target)) == pytest.approx(expected, abs=1e-14)

    def cross(p: float, q: float) -> float:
        return -p * math.log(q) - (1 - p) * math.log(1 - q)

    gamma = 0.6 * 0.4 * (cross(a, 0.2) + cross(b, 0.2) + cross(0.2, a) + cross(0.2, b)) / 2
    assert float(separation(logits, target)) == pytest.approx(gamma, abs=1e-14)
    assert float(normalized_cmi(logits, target).ncmi) == pytest.approx(expected / gamma, abs=1e-14)


# ---------------------------------------------------------------- bounds and invariances


def test_cmi_is_zero_exactly_when_the_outputs_of_a_class_are_equal() -> None:
    target = torch.arange(60) % 4
    rows = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = rows[target]
    shifts = torch.linspace(-5, 5, 60, dtype=torch.float64)[:, None]
    assert abs(float(conditional_mutual_information(logits + shifts, target))) < 1e-12
    logits[0, 0] += 1e-3
    assert float(conditional_mutual_information(logits + shifts, target)) > 1e-10


@st.composite
def data(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    n, classes = draw(st.integers(2, 30)), draw(st.integers(2, 12))
    seed, scale = draw(st.integers(0, 2**31)), draw(st.sampled_from([1e-3, 0.3, 3.0, 30.0, 1e3]))
    return sample(n, classes, seed, scale)


@settings(max_examples=60, deadline=None)
@given(data())
def test_bounds_hold_for_any_data(given_data: tuple[Tensor, Tensor]) -> None:
    logits, target = given_data
    p, y = torch.softmax(logits, 1).numpy(), target.numpy()
    cmi = float(conditional_mutual_information(logits, target, q_min=1e-300))
    conditional_entropy = sum((y == c).mean() * entropy(p[y == c].mean(0)) for c in set(y))
    assert -1e-12 <= cmi <= conditional_entropy + 1e-12
    assert conditional_entropy <= math.log(logits.shape[1]) + 1e-12
    marginal = entropy(p.mean(0)) - np.mean([entropy(row) for row in p])
    assert cmi <= marginal + 1e-12  # I(X; Y_hat | Y) <= I(X; Y_hat), since Y -> X -> Y_hat
    assert float(separation(logits, target)) > -1e-12  # 0 where all outputs are saturated at one column
    assert float(separation(logits, target, "kl")) > -1e-12


@settings(max_examples=40, deadline=None)
@given(data(), st.randoms(use_true_random=False))
def test_relabelling_order_columns_and_shifts_change_nothing(given_data: tuple[Tensor, Tensor], random: Any) -> None:
    logits, target = given_data
    expected = normalized_cmi(logits, target)
    columns, rows = list(range(logits.shape[1])), list(range(len(target)))
    random.shuffle(columns)
    random.shuffle(rows)
    new_name = torch.tensor(columns).argsort()  # column `columns[k]` moves to k
    shift = torch.linspace(-10, 10, len(target), dtype=torch.float64)[:, None]
    for changed, labels in (
        (logits[rows], target[rows]),
        (logits + shift, target),
        (logits[:, columns], new_name[target]),
        (logits[:, columns], target),  # the labels stay: they never look at whether c is predicted as c
        (logits.repeat(3, 1), target.repeat(3)),
    ):
        found = normalized_cmi(changed, labels)
        gamma = float(expected.gamma)  # may be tiny, and the ratio shows the rounding of CMI over it
        for name, tolerance in (("cmi", 1e-12), ("gamma", 1e-12), ("ncmi", 1e-12 / min(gamma, 1.0))):
            assert float(getattr(found, name)) == pytest.approx(float(getattr(expected, name)), rel=1e-8, abs=tolerance)


def test_a_wrong_classifier_can_have_the_cmi_of_a_right_one() -> None:
    logits, target = sample(200, 5)
    wrong = logits.roll(1, dims=1)
    right_accuracy = float((logits.argmax(1) == target).double().mean())
    assert float((wrong.argmax(1) == target).double().mean()) < right_accuracy - 0.2
    assert float(normalized_cmi(wrong, target).ncmi) == pytest.approx(float(normalized_cmi(logits, target).ncmi), 1e-12)


def test_overconfidence_alone_makes_ncmi_small() -> None:
    logits, target = sample(200, 5, scale=1.0)
    results = [normalized_cmi(scale * logits, target) for scale in (4.0, 16.0, 64.0)]
    ncmi = [float(result.ncmi) for result in results]
    assert ncmi[0] > 2 * ncmi[1] > 4 * ncmi[2]
    assert float(results[2].gamma / results[1].gamma) == pytest.approx(4, rel=0.1)  # Gamma is linear in the scale


@pytest.mark.parametrize("alpha", [0.1, 1.0, 3.0, torch.tensor(0.1, dtype=torch.float64)])
def test_alpha_is_an_inverse_temperature(alpha: float | Tensor) -> None:
    logits, target = sample(50, 4)
    found = float(conditional_mutual_information(logits, target, alpha=alpha))
    assert found == pytest.approx(brute_cmi(logits, target, float(alpha)), abs=1e-12)


def test_log_probs_are_those_of_the_power_transform() -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(5), 6)
    power = p**0.3 / (p**0.3).sum(1, keepdims=True)
    np.testing.assert_allclose(log_probs(torch.tensor(p).log(), 0.3).exp().numpy(), power, atol=1e-15)


# ---------------------------------------------------------------- numerics


@pytest.mark.parametrize("scale", [160.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_logits_give_finite_values_and_gradients(scale: float, dtype: torch.dtype) -> None:
    logits, target = sample(60, 6, scale=scale, dtype=dtype)
    logits.requires_grad_()
    result = normalized_cmi(logits, target)
    assert all(bool(torch.isfinite(value)) for value in result)
    if scale == 160.0:
        assert result.cmi.item() == pytest.approx(brute_cmi(logits.detach(), target), rel=2e-5)
    assert bool(torch.isfinite(gradient(result.cmi - 0.1 * result.gamma, logits)).all())


def test_an_output_that_underflows_in_all_of_a_class_is_no_nan() -> None:
    logits = torch.tensor([[0.0, -500.0], [0.0, -600.0], [-500.0, 0.0]])
    result = normalized_cmi(logits, torch.tensor([0, 0, 1]))
    assert float(result.cmi) == 0.0
    assert float(result.gamma) == pytest.approx((500 + 600 + 2 * 500) / 9, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_cast_up_first(dtype: torch.dtype) -> None:
    full, target = sample(60, 6, scale=4.0, dtype=torch.float32)
    half = full.to(dtype)
    for one in (log_probs(half), log_probs(half, 0.5), *normalized_cmi(half, target), brier_score(half, target)):
        assert one.dtype == torch.float32
    for ours, theirs in zip(normalized_cmi(half, target), normalized_cmi(half.float(), target), strict=True):
        assert float(ours) == float(theirs)
    assert float(log_probs(half, 0.5)[0, 0]) == pytest.approx(float(log_probs(half.double(), 0.5)[0, 0]), abs=2e-6)


@pytest.mark.parametrize("classes", [5, 64, 65, 300])
def test_class_sums_and_counts_are_those_of_a_loop(classes: int) -> None:
    rng = np.random.default_rng(0)
    values, target = torch.tensor(rng.standard_normal((40, 9))), torch.tensor(rng.integers(0, classes, 40))
    expected, counts = np.zeros((classes, 9)), np.zeros(classes)
    for row, label in zip(values.numpy(), target.numpy(), strict=True):
        expected[label] += row
        counts[label] += 1
    np.testing.assert_allclose(class_sums(values, target, classes).numpy(), expected, atol=1e-14)
    np.testing.assert_array_equal(class_counts(target, classes).numpy(), counts)
    np.testing.assert_allclose(
        class_centroids(values, target, classes).numpy(), expected / np.maximum(counts, 1)[:, None], atol=1e-14
    )


@pytest.mark.parametrize("few", [0, 10**6])
@pytest.mark.parametrize(("n", "classes"), [(30, 7), (9, 200)])
def test_both_ways_to_sum_over_devices_agree(monkeypatch: pytest.MonkeyPatch, few: int, n: int, classes: int) -> None:
    devices = [sample(n, classes, seed) for seed in range(3)]
    monkeypatch.setattr(functional, "_FEW", few)  # 0: additions of rows; large: of numbers
    logits, target = (torch.stack(parts) for parts in zip(*devices, strict=True))
    found = torch.func.vmap(lambda z, y: torch.stack(normalized_cmi(z, y)))(logits, target)
    for device, (z, y) in enumerate(devices):
        expected = brute_cmi(z, y), brute_pairs(z, y) / n**2
        assert found[device, :2].tolist() == pytest.approx(expected, abs=1e-11)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=30), st.integers(21, 50))
def test_groups_are_equal_where_labels_are(labels: list[int], classes: int) -> None:
    groups, size = batch_groups(torch.tensor(labels), classes)
    assert size == min(len(labels), classes)
    assert int(groups.min()) >= 0
    assert int(groups.max()) < size
    for i, j in itertools.combinations(range(len(labels)), 2):
        assert (labels[i] == labels[j]) == (int(groups[i]) == int(groups[j]))


# ---------------------------------------------------------------- bias of small samples


def population() -> tuple[Tensor, Tensor, float]:
    """Three classes of five possible outputs each; their CMI if all outputs of a class are equally likely."""
    logits, target = sample(15, 3, scale=0.7)[0], torch.arange(15) % 3
    return logits, target, brute_cmi(logits, target)


def test_gamma_over_pairs_without_replacement_is_unbiased() -> None:
    logits, target, _ = population()
    batches = list(itertools.combinations(range(9), 4))  # all of them: exact
    logits, target = logits[:9], target[:9]
    full = brute_pairs(logits, target) / (9 * 8)
    unbiased = np.mean([float(separation(logits[list(b)], target[list(b)], unbiased=True)) for b in batches])
    biased = np.mean([float(separation(logits[list(b)], target[list(b)])) for b in batches])
    assert unbiased == pytest.approx(full, abs=1e-12)
    assert biased == pytest.approx(full * 3 / 4, abs=1e-12)


def test_plugin_is_biased_low_and_bessel_less_so() -> None:
    logits, target, true = population()
    draws, m = 400, 4
    generator = torch.Generator().manual_seed(0)
    estimates = []
    for _ in range(draws):
        chosen = torch.cat(
            [(target == c).nonzero().flatten()[torch.randint(5, (m,), generator=generator)] for c in range(3)]
        )
        estimates.append(float(conditional_mutual_information(logits[chosen], target[chosen])))
    plugin, error = np.mean(estimates), np.std(estimates) / math.sqrt(draws)
    assert plugin < true - 5 * error
    assert abs(plugin * m / (m - 1) - true) < 0.5 * abs(plugin - true)  # to first order it removes the bias
    assert 0.6 * true < plugin < 0.85 * true  # (m - 1) / m to first order


@pytest.mark.parametrize("seed", [0, 1])
def test_a_fixed_table_gives_cmi_plus_the_divergence_of_the_centroids(seed: int) -> None:
    logits, target = sample(90, 6, seed)
    table = np.random.default_rng(seed).dirichlet(np.ones(6), 6)
    p, y = torch.softmax(logits, 1).numpy(), target.numpy()
    exact = np.stack([p[y == c].mean(0) for c in range(6)])
    gap = sum((y == c).mean() * float((exact[c] * np.log(exact[c] / table[c])).sum()) for c in range(6))
    found = float(conditional_mutual_information(logits, target, torch.tensor(table)))
    assert found == pytest.approx(brute_cmi(logits, target) + gap, abs=1e-12)
    assert gap > 0.1
    tight = float(conditional_mutual_information(logits, target, torch.tensor(exact)))
    assert tight == pytest.approx(brute_cmi(logits, target), abs=1e-12)
    assert float(normalized_cmi(logits, target, torch.tensor(table)).cmi) == found


def test_centroid_entries_are_clamped_at_q_min() -> None:
    log_p, target = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([0])
    table = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    for q_min in (1e-12, 1e-3):
        expected = -math.log(2) - 0.5 * math.log(q_min)
        assert float(conditional_mutual_information(log_p, target, table, q_min=q_min)) == pytest.approx(expected, 1e-6)


def test_divergence_keeps_leading_dimensions() -> None:
    log_p = torch.log_softmax(sample(12, 4)[0].reshape(3, 4, 4), -1)
    log_q = log_p.roll(1, 0)
    expected = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(divergence_to_centroids(log_p, log_q), expected)


# ---------------------------------------------------------------- gradients


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cmi": lambda z, y: conditional_mutual_information(z, y),
    "cmi at alpha": lambda z, y: conditional_mutual_information(z, y, alpha=0.3),
    "cmi with centroids": lambda z, y: conditional_mutual_information(z, y, torch.full((5, 5), 0.2, dtype=z.dtype)),
    "gamma": lambda z, y: separation(z, y),
    "gamma unbiased": lambda z, y: separation(z, y, unbiased=True),
    "gamma by divergence": lambda z, y: separation(z, y, "kl"),
    "ncmi": lambda z, y: normalized_cmi(z, y).ncmi,
    "brier": lambda z, y: brier_score(z, y),
    "brier mean": lambda z, y: brier_score(z, y, "mean"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("n", [4, 9])
def test_gradients_are_those_of_finite_differences(name: str, n: int) -> None:
    logits, target = sample(n, 5)
    assert torch.autograd.gradcheck(lambda z: FUNCTIONS[name](z, target), logits.requires_grad_())


def gradient(value: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(value, logits, retain_graph=True)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "classes"), [(20, 4), (6, 30)])
def test_grad_first_takes_the_partner_as_constant(kind: Separation, n: int, classes: int) -> None:
    logits, target = sample(n, classes)
    logits.requires_grad_()
    log_p = torch.log_softmax(logits, 1)
    by_hand = torch.zeros((), dtype=torch.float64)
    for j, k in itertools.product(range(n), repeat=2):
        if target[j] != target[k]:
            by_hand = by_hand + (log_p[j].exp() * ((log_p[j] if kind == "kl" else 0) - log_p[k].detach())).sum()
    expected = gradient(by_hand / n**2, logits)
    first = separation(logits, target, kind, grad="first")
    torch.testing.assert_close(gradient(first, logits), expected, rtol=0, atol=1e-12)
    both = separation(logits, target, kind, grad="both")
    assert both.item() == first.item()
    assert float((gradient(both, logits) - expected).abs().max()) > 1e-4


def test_exact_centroids_may_be_constants() -> None:  # the envelope theorem
    logits, target = sample(40, 5)
    logits.requires_grad_()
    flowing = gradient(conditional_mutual_information(logits, target), logits)
    centroids = class_centroids(torch.softmax(logits.detach(), 1), target, 5)
    constant = gradient(conditional_mutual_information(logits, target, centroids), logits)
    torch.testing.assert_close(flowing, constant, rtol=0, atol=1e-16)
    other = gradient(conditional_mutual_information(logits, target, centroids.roll(1, 0)), logits)
    assert float((flowing - other).abs().max()) > 1e-3


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("classes", [5, 70])
def test_vmap_of_grad_is_a_loop(name: str, classes: int) -> None:
    if name == "cmi with centroids" and classes != 5:
        pytest.skip("its table has five rows")
    devices = [sample(8, classes, seed) for seed in range(3)]
    logits, target = torch.stack([z for z, _ in devices]), torch.stack([y for _, y in devices])
    together = torch.func.vmap(torch.func.grad(FUNCTIONS[name]))(logits, target)
    for device in range(3):
        alone = logits[device].clone().requires_grad_()
        torch.testing.assert_close(together[device], gradient(FUNCTIONS[name](alone, target[device]), alone))


# ---------------------------------------------------------------- Brier


def test_brier_is_the_squared_distance_to_the_label() -> None:
    logits, target = sample(30, 4)
    p = torch.softmax(logits, 1).numpy()
    expected = np.mean([((p[i] - np.eye(4)[target[i]]) ** 2).sum() for i in range(30)])
    assert float(brier_score(logits, target)) == pytest.approx(expected, abs=1e-14)
    assert float(brier_score(logits, target, "mean")) == pytest.approx(expected / 4, abs=1e-14)
    assert float(brier_score(logits, torch.eye(4, dtype=torch.float64)[target])) == pytest.approx(expected, abs=1e-14)
    wrong_and_sure = torch.tensor([[50.0, 0.0, 0.0]])
    assert float(brier_score(wrong_and_sure, torch.tensor([1]))) == pytest.approx(2.0)


def test_brier_of_soft_labels_and_the_bayes_identity() -> None:
    """E_y|x ||p - e_y||^2 = ||p - p*||^2 + 1 - ||p*||^2: it is minimal at the true distribution p*."""
    logits, _ = sample(30, 4)
    p_star = np.random.default_rng(3).dirichlet(np.ones(4), 30)
    hard = [
        brier_score(logits[i : i + 1], torch.tensor([c])).item() * p_star[i, c] for i in range(30) for c in range(4)
    ]
    soft = float(brier_score(logits, torch.tensor(p_star)))
    p = torch.softmax(logits, 1).numpy()
    assert soft == pytest.approx(((p - p_star) ** 2).sum(1).mean(), abs=1e-14)
    assert sum(hard) / 30 == pytest.approx(soft + np.mean(1 - (p_star**2).sum(1)), abs=1e-13)
    assert torch.autograd.gradcheck(lambda z: brier_score(z, torch.tensor(p_star)), logits.requires_grad_())


def test_brier_of_one_sample_reduces_over_classes_only_on_request() -> None:
    assert float(brier_score(torch.zeros(1, 4), torch.tensor([0]))) == pytest.approx(0.75**2 + 3 * 0.25**2)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("function", [conditional_mutual_information, separation, normalized_cmi, brier_score])
@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        (torch.zeros(4), torch.tensor([0]), r"expected logits \[batch, classes\], got shape \(4,\)"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 1]), r"expected logits .* dtype torch.int64"),
        (torch.zeros(2, 1), torch.tensor([0, 1]), r"at least 2 classes; .* binary=True"),
        (torch.zeros(2, 3), torch.tensor([0.0, 1.0]), r"expected class indices \[2\].*mixup or soft labels"),
        (torch.zeros(2, 3), torch.tensor([0, 1, 2]), r"expected class indices \[2\], got shape \(3,\)"),
    ],
)
def test_bad_shapes_are_refused(function: Any, logits: Tensor, target: Tensor, message: str) -> None:
    if function is brier_score and logits.ndim == 1:
        pytest.skip("a vector with a vector of labels is read as soft labels")
    with pytest.raises(ValueError, match=message):
        function(logits, target)


def test_cmi_refuses_soft_labels_and_brier_ill_shaped_ones() -> None:
    logits = torch.zeros(2, 3)
    for function in (conditional_mutual_information, separation, normalized_cmi):
        with pytest.raises(ValueError, match="soft labels are not supported here"):
            function(logits, torch.full((2, 3), 1 / 3))
    with pytest.raises(ValueError, match=r"Soft labels must have the logits' shape \(2, 3\), got \(2, 4\)"):
        brier_score(logits, torch.full((2, 4), 0.25))


def test_a_single_class_has_no_ncmi() -> None:
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.tensor([2, 2, 2])
    assert float(separation(logits, target)) == pytest.approx(0.0, abs=1e-14)
    assert float(separation(logits, target, "kl")) == pytest.approx(0.0, abs=1e-14)
    with pytest.raises(ValueError, match="NCMI needs at least two classes in the data, saw only 2"):
        normalized_cmi(logits, target)


def test_unbiased_gamma_needs_a_pair() -> None:
    with pytest.raises(ValueError, match="at least 2 of them, got 1"):
        separation(torch.zeros(1, 3), torch.tensor([0]), unbiased=True)
