"""Losses, directions and closed forms, against loops in numpy, finite differences, enumeration and linear programs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from scipy.special import log_softmax
from torch import Tensor

from groundwire.callbacks.adversarial import functional
from groundwire.callbacks.adversarial.functional import (
    AttackLoss,
    Distance,
    OutputMap,
    TeacherWeights,
    amalgamate,
    attack_loss,
    cross_entropy,
    dlr,
    input_gradient,
    kl_divergence,
    linear_worst_case_margin,
    margin,
    mart_terms,
    output_map,
    polytope_distance,
    svgd_direction,
    teacher_weights,
    thundernna_step,
    wilson_interval,
)
from groundwire.callbacks.adversarial.threat import Norm, ThreatModel
from helpers.edge import generator

Array = np.ndarray[Any, np.dtype[Any]]
NORMS: tuple[Norm, ...] = ("linf", "l2")
LOSSES: tuple[AttackLoss, ...] = get_args(AttackLoss)


def sample(n: int = 12, classes: int = 5, seed: int = 0, *before: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    return torch.tensor(3 * rng.standard_normal((*before, n, classes))), torch.tensor(rng.integers(0, classes, n))


def brute_margin(row: Array, label: int) -> float:
    return float(max(value for k, value in enumerate(row) if k != label) - row[label])


def brute_kl(row: Array, other: Array) -> float:
    p, q = log_softmax(row), log_softmax(other)
    return float(sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))


# ---------------------------------------------------------------- losses of attacks


def brute_loss(kind: AttackLoss, row: Array, label: int, clean: Array) -> float:
    if kind == "ce":
        return -float(log_softmax(row)[label])
    if kind == "margin":
        return brute_margin(row, label)
    if kind == "kl":
        return brute_kl(clean, row)
    ordered = sorted(row)
    return brute_margin(row, label) / (ordered[-1] - ordered[-3])


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("before", [(), (3,), (2, 3)])
def test_losses_are_those_of_loops(kind: AttackLoss, before: tuple[int, ...]) -> None:
    logits, target = sample(12, 5, 0, *before)
    clean, _ = sample(12, 5, 1)
    found = attack_loss(kind, logits, target, clean)
    assert found.shape == logits.shape[:-1]
    for index in np.ndindex(*found.shape):
        expected = brute_loss(kind, logits[index].numpy(), int(target[index[-1]]), clean[index[-1]].numpy())
        assert float(found[index]) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("kind", LOSSES)
def test_gradients_of_losses_are_finite_differences(kind: AttackLoss) -> None:
    logits, target = sample(6, 4)
    clean, _ = sample(6, 4, 1)
    gradient, value = input_gradient(lambda z: (attack_loss(kind, z, target, clean).sum(), z.sum()), logits)
    assert not gradient.requires_grad
    assert float(value.detach()) == pytest.approx(float(logits.sum()))
    for index in np.ndindex(*logits.shape):
        ends = []
        for sign in (1, -1):
            moved = logits.clone()
            moved[index] += sign * 1e-6
            ends.append(float(attack_loss(kind, moved, target, clean).sum()))
        assert float(gradient[index]) == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-6)


@pytest.mark.parametrize("kind", ["ce", "kl"])
def test_distributions_as_labels_give_their_mean_loss(kind: AttackLoss) -> None:
    logits, _ = sample(6, 4, 0, 2)
    soft = torch.softmax(sample(6, 4, 2)[0], -1)
    found = attack_loss(kind, logits, soft, logits[0])
    if kind == "ce":
        each = torch.stack([cross_entropy(logits, torch.full((6,), c)) for c in range(4)], -1)
        assert torch.allclose(found, (each * soft).sum(-1), atol=1e-12)


@pytest.mark.parametrize("kind", ["margin", "dlr"])
def test_losses_that_need_hard_labels_say_so(kind: AttackLoss) -> None:
    with pytest.raises(
        ValueError, match=rf"loss='{kind}' needs class indices \[B\], got labels \(3, 4\) torch.float32"
    ):
        attack_loss(kind, torch.zeros(3, 4), torch.full((3, 4), 0.25), None)


@settings(max_examples=80)
@given(st.integers(0, 2**31), st.integers(3, 8), st.floats(1e-2, 1e3), st.floats(-1e3, 1e3))
def test_dlr_is_free_of_scale_and_shift(seed: int, classes: int, scale: float, shift: float) -> None:
    logits, target = sample(5, classes, seed)
    np.testing.assert_allclose(
        dlr(scale * logits + shift, target).numpy(), dlr(logits, target).numpy(), rtol=1e-6, atol=1e-6
    )
    assert float(dlr(logits, target)[logits.argmax(1) == target].abs().sum()) <= len(target)  # in [-1, 0] where right


def test_dlr_needs_three_classes() -> None:
    with pytest.raises(ValueError, match="DLR loss needs at least 3 classes, got 2: use loss='margin'"):
        dlr(torch.zeros(1, 2), torch.tensor([0]))


@settings(max_examples=80)
@given(st.integers(0, 2**31), st.integers(2, 8), st.sampled_from([1e-3, 1.0, 50.0]))
def test_margin_is_positive_exactly_where_misclassified(seed: int, classes: int, scale: float) -> None:
    logits, target = sample(20, classes, seed)
    logits = logits * scale
    assert torch.equal(margin(logits, target) > 0, logits.argmax(1) != target)
    if classes > 2:
        assert torch.equal(dlr(logits, target) > 0, logits.argmax(1) != target)


def test_margin_of_ties_is_zero() -> None:
    assert margin(torch.tensor([[2.0, 2.0, 0.0]]), torch.tensor([1])).tolist() == [0]


@settings(max_examples=80)
@given(st.integers(0, 2**31), st.integers(2, 8), st.sampled_from([1e-3, 1.0, 100.0]))
def test_divergence_is_not_negative_and_zero_for_equal_outputs(seed: int, classes: int, scale: float) -> None:
    logits, _ = sample(10, classes, seed)
    other, _ = sample(10, classes, seed + 1)
    assert float(kl_divergence(scale * logits, scale * other).min()) > -1e-12
    np.testing.assert_allclose(kl_divergence(logits, logits + 5).numpy(), 0, atol=1e-12)


def test_divergence_of_hopeless_outputs_is_finite() -> None:
    logits, other = torch.tensor([[0.0, -1e4]]), torch.tensor([[-1e4, 0.0]])
    assert kl_divergence(logits, other).tolist() == [1e4]


def test_losses_run_under_vmap() -> None:
    logits, target = sample(4, 5, 0, 3)
    clean, _ = sample(4, 5, 1)
    for kind in LOSSES:
        mapped = torch.func.vmap(lambda z, kind=kind: attack_loss(kind, z, target, clean))(logits)
        assert torch.allclose(mapped, attack_loss(kind, logits, target, clean), atol=1e-14)


# ---------------------------------------------------------------- gradients


def test_input_gradient_leaves_no_trace() -> None:
    weight = torch.randn(3, requires_grad=True)
    weight.grad = torch.ones(3)
    x = torch.randn(2, 3, requires_grad=True)
    with torch.no_grad():
        gradient, aux = input_gradient(lambda u: ((u @ weight).sum(), {"a": [u.detach()]}), x)
    assert torch.equal(gradient, weight.detach().expand(2, 3))
    assert torch.equal(aux["a"][0], x)
    assert x.grad is None
    assert torch.equal(weight.grad, torch.ones(3))


def test_input_gradient_inside_of_transforms_is_the_same() -> None:
    weight, x = torch.randn(4, 3, generator=generator()), torch.randn(4, 2, 3, generator=generator(1))
    f = lambda w, u: input_gradient(lambda v: ((v @ w).tanh().sum(), v.detach()), u)[0]
    expected = torch.stack([f(w, u) for w, u in zip(weight, x, strict=True)])
    assert torch.allclose(torch.func.vmap(f)(weight, x), expected, atol=1e-7)
    through = torch.func.vmap(torch.func.grad(lambda w, u: (f(w, u) * w).sum()))(weight, x)
    assert torch.allclose(through, expected.sum(1), atol=1e-6)  # the gradient inside is a constant


# ---------------------------------------------------------------- particles


def brute_svgd(u: Tensor, g: Tensor, repulsion: float) -> Tensor:
    """Loops over samples and pairs, and autograd of the kernel."""
    number, batch = u.shape[:2]
    phi = torch.zeros_like(u)
    for b in range(batch):
        distances = [float(((u[i, b] - u[j, b]) ** 2).sum()) for i in range(number) for j in range(number)]
        width = max(float(np.median(distances)) / math.log(number + 1), 1e-8)
        for i, j in itertools.product(range(number), repeat=2):
            point = u[j, b].clone().requires_grad_()
            kernel = (-((point - u[i, b]) ** 2).sum() / width).exp()
            (push,) = torch.autograd.grad(kernel, point)
            unit = g[j, b] / g[j, b].norm() if float(g[j, b].norm()) > 0 else g[j, b]
            phi[i, b] += (kernel.detach() * unit + repulsion * push) / number
    return phi


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("repulsion", [0.0, 0.5, 3.0])
def test_svgd_is_that_of_a_double_loop(number: int, repulsion: float) -> None:
    u = torch.rand(number, 3, 2, 3, generator=generator(), dtype=torch.float64)
    g = 1e-3 * torch.randn(number, 3, 2, 3, generator=generator(1), dtype=torch.float64)
    np.testing.assert_allclose(svgd_direction(u, g, repulsion), brute_svgd(u, g, repulsion), atol=1e-10)


@pytest.mark.parametrize("number", [2, 3, 4, 6, 30])
def test_svgd_of_particles_that_meet_is_their_gradient(number: int) -> None:
    """In float32: the narrow kernel of points that coincide must not turn rounding errors into a push."""
    u = torch.rand(1, 2, 50, generator=generator()).expand(number, 2, 50)
    g = torch.randn(1, 2, 50, generator=generator(1)).expand(number, 2, 50)
    expected = g / g.norm(dim=-1, keepdim=True)
    np.testing.assert_allclose(svgd_direction(u, g, 0.5).numpy(), expected.numpy(), atol=1e-6)
    clustered = torch.cat([u, torch.rand(1, 2, 50, generator=generator(2))])
    gradients = torch.cat([g, g[:1]])
    found = svgd_direction(clustered, gradients, 0.5)
    assert torch.isfinite(found).all()
    for b in range(2):
        assert float(torch.cosine_similarity(found[0, b], g[0, b], dim=0)) > (0.99 if number > 3 else 0.5)


@pytest.mark.parametrize("number", [3, 7])
def test_svgd_does_not_depend_on_the_order_of_particles(number: int) -> None:
    u = torch.rand(number, 2, 6, generator=generator(), dtype=torch.float64)
    g = torch.randn(number, 2, 6, generator=generator(1), dtype=torch.float64)
    order = torch.randperm(number, generator=generator(2))
    np.testing.assert_allclose(
        svgd_direction(u[order], g[order], 0.5), svgd_direction(u, g, 0.5)[order].numpy(), atol=1e-12
    )


def test_samples_do_not_see_each_other_in_svgd() -> None:
    u = torch.rand(4, 3, 6, generator=generator(), dtype=torch.float64)
    g = torch.randn(4, 3, 6, generator=generator(1), dtype=torch.float64)
    g[:, 2] = 0  # of a sample without a gradient: only the push
    together = svgd_direction(u, g, 0.5)
    for b in range(3):
        alone = svgd_direction(u[:, b : b + 1], g[:, b : b + 1], 0.5)
        np.testing.assert_allclose(together[:, b : b + 1], alone.numpy(), atol=1e-12)
    assert torch.isfinite(together).all()


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e-30])
def test_svgd_of_one_particle_is_the_unit_gradient(scale: float) -> None:
    g = torch.randn(1, 5, 7, generator=generator())
    found = svgd_direction(torch.rand(1, 5, 7), g * scale, repulsion=0.5)
    np.testing.assert_allclose(found.numpy(), (g / g.norm(dim=-1, keepdim=True)).numpy(), atol=1e-6)


# ---------------------------------------------------------------- ThunderNNA's step


@st.composite
def gradients(draw: st.DrawFn) -> tuple[Tensor, float, float]:
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    g = rng.standard_normal(30) * 10 ** rng.uniform(-45, 3, 30)  # also denormal
    g[rng.random(30) < 0.2] = 0
    eps, scale = draw(st.sampled_from([1e-3, 0.1, 0.5, 10.0])), draw(st.sampled_from([0.0, 1e-4, 1.0, 30.0]))
    return torch.tensor(g, dtype=draw(st.sampled_from([torch.float32, torch.float64]))), eps, scale


@settings(max_examples=150)
@given(gradients(), st.sampled_from([0.0, 0.1]))
def test_the_step_of_thundernna(drawn: tuple[Tensor, float, float], at_zero: float) -> None:
    g, eps, scale = drawn
    step = thundernna_step(g, eps, 1.0 if scale == 1 else torch.tensor(scale, dtype=g.dtype), at_zero)
    assert torch.isfinite(step).all()
    for value, s in zip(g.tolist(), step.tolist(), strict=True):
        expected = at_zero if value == 0 else math.copysign(min(scale / abs(value), eps), value)
        assert s == pytest.approx(expected, rel=1e-6, abs=1e-40)
    small = (g != 0) & (g.double().abs() * eps <= scale * (1 - 1e-6))
    fgsm = eps * g.sign()
    assert torch.equal(step[small], fgsm[small])
    gain = float((g.double() * step.double()).sum())
    assert -1e-12 <= gain <= float(eps * g.double().abs().sum()) * (1 + 1e-6) + 1e-30  # Hoelder


def test_a_scale_for_each_sample() -> None:
    g = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    assert thundernna_step(g, 1.0, torch.tensor([[0.5], [2.0]])).tolist() == [[0.5, 0.25], [1.0, 1.0]]


# ---------------------------------------------------------------- closed forms


def linear(classes: int, d: int, n: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    weight, bias = torch.tensor(rng.standard_normal((classes, d))), torch.tensor(rng.standard_normal(classes))
    return weight, bias, torch.tensor(rng.random((n, d))), torch.tensor(rng.integers(0, classes, n))


def least(weight: Tensor, bias: Tensor, points: Tensor, label: int) -> float:
    """The smallest margin of the right class among points."""
    return min(-brute_margin(row, label) for row in (points @ weight.T + bias).numpy())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("classes", "d"), [(2, 3), (4, 20), (10, 64)])
def test_worst_margin_is_that_of_the_best_of_all_targeted_steps(norm: Norm, classes: int, d: int) -> None:
    weight, bias, x, target = linear(classes, d)
    found = linear_worst_case_margin(weight, bias, x, target, ThreatModel(0.2, norm))
    assert found.shape == target.shape
    for b, label in enumerate(target.tolist()):
        steps = []
        for k in range(classes):
            if k != label:
                w = weight[k] - weight[label]
                steps.append(0.2 * (w.sign() if norm == "linf" else w / w.norm()))
        assert float(found[b]) == pytest.approx(least(weight, bias, x[b] + torch.stack(steps), label), abs=1e-12)


def test_worst_margin_is_that_of_the_worst_corner_of_the_cube() -> None:
    weight, bias, x, target = linear(4, 7)
    corners = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=7)), dtype=torch.float64)
    found = linear_worst_case_margin(weight, bias, x, target, ThreatModel(0.3))
    for b, label in enumerate(target.tolist()):
        assert float(found[b]) == pytest.approx(least(weight, bias, x[b] + 0.3 * corners, label), abs=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_no_point_of_the_ball_has_a_smaller_margin(norm: Norm) -> None:
    weight, bias, x, target = linear(3, 4, n=3)
    threat = ThreatModel(0.25, norm, lo=-9, hi=9)
    found = linear_worst_case_margin(weight, bias, x, target, threat)
    for b, label in enumerate(target.tolist()):
        points = threat.uniform(x[b].expand(20_000, 4), generator())
        best = least(weight, bias, points, label)
        assert float(found[b]) - 1e-12 <= best <= float(found[b]) + 0.4


def test_worst_margin_is_the_linear_program() -> None:
    weight, bias, x, target = linear(5, 12)
    found = linear_worst_case_margin(weight, bias, x, target, ThreatModel(0.2))
    for b, label in enumerate(target.tolist()):
        w, c = (weight[label] - weight).numpy(), (bias[label] - bias).numpy()
        bounds = [(v - 0.2, v + 0.2) for v in x[b].tolist()]
        values = [optimize.linprog(w[k], bounds=bounds).fun + c[k] for k in range(5) if k != label]
        assert float(found[b]) == pytest.approx(min(values), abs=1e-9)


@settings(max_examples=100)
@given(st.integers(0, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_is_that_of_scipy(counts: tuple[int, int]) -> None:
    successes, trials = counts
    found = wilson_interval(successes, trials)
    if trials == 0:
        assert found == (0, 1)
        return
    expected = stats.binomtest(successes, trials).proportion_ci(method="wilson")
    assert found == pytest.approx((expected.low, expected.high), abs=1e-12)


# ---------------------------------------------------------------- losses of robust training


def test_mart_terms_are_those_of_loops() -> None:
    clean, target = sample(9, 4)
    adversarial, _ = sample(9, 4, 1)
    boosted = weighted = 0.0
    for b, label in enumerate(target.tolist()):
        p, q = np.exp(log_softmax(clean[b].numpy())), np.exp(log_softmax(adversarial[b].numpy()))
        wrong = max(q[k] for k in range(4) if k != label)
        boosted += (-math.log(q[label]) - math.log(1.0001 - wrong + 1e-12)) / 9
        weighted += brute_kl(clean[b].numpy(), adversarial[b].numpy()) * (1 - p[label]) / 9
    found = mart_terms(clean, adversarial, target)
    assert [float(value) for value in found] == pytest.approx([boosted, weighted], abs=1e-12)


def test_mart_terms_of_saturated_outputs_are_finite() -> None:
    logits = torch.tensor([[300.0, 0.0, -300.0]], requires_grad=True)
    terms = sum(mart_terms(logits, logits.flip(1), torch.tensor([0])))
    assert torch.isfinite(terms)
    assert torch.isfinite(torch.autograd.grad(terms, logits)[0]).all()


MAPS: dict[OutputMap, Callable[[Array], Array]] = {
    "logits": lambda z: z,
    "log_probs": log_softmax,
    "probs": lambda z: np.exp(log_softmax(z)),
}


@pytest.mark.parametrize("outputs", get_args(OutputMap))
@pytest.mark.parametrize("distance", get_args(Distance))
def test_polytope_distances_are_those_of_loops(distance: Distance, outputs: OutputMap) -> None:
    corners, _ = sample(6, 4, 0, 3)
    center, _ = sample(6, 4, 1)
    found = polytope_distance(corners, center, distance, outputs)
    assert found.shape == (3, 6)
    for n, b in np.ndindex(3, 6):
        a, c = corners[n, b].numpy(), center[b].numpy()
        np.testing.assert_allclose(output_map(corners[n, b], outputs), MAPS[outputs](a), atol=1e-12)
        difference = MAPS[outputs](a) - MAPS[outputs](c)
        expected = {
            "l2sq": float((difference**2).sum()),
            "l2": math.sqrt(float((difference**2).sum())),
            "linf": float(abs(difference).max()),
            "kl": brute_kl(c, a),
        }[distance]
        assert float(found[n, b]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("distance", get_args(Distance))
def test_distances_at_the_centre_have_finite_gradients(distance: Distance) -> None:
    corners = sample(6, 4)[0].requires_grad_()
    value = polytope_distance(corners, corners.detach(), distance).sum()
    assert float(value.detach()) == pytest.approx(0, abs=1e-5)
    assert torch.isfinite(torch.autograd.grad(value, corners)[0]).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("kind", get_args(TeacherWeights))
def test_teacher_weights_are_those_of_loops(kind: TeacherWeights, temperature: float) -> None:
    logits, target = sample(6, 4, 0, 3)
    found = teacher_weights(logits, target, kind, temperature)
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-12)
    for b, label in enumerate(target.tolist()):
        scores = []
        for m in range(3):
            row = logits[m, b].numpy()
            log_p = log_softmax(row)
            entropy = -float((np.exp(log_p) * log_p).sum())
            scores.append(
                {"loss": log_p[label], "margin": -brute_margin(row, label), "entropy": -entropy, "uniform": 0.0}[kind]
            )
        weights = np.exp(np.array(scores) / temperature)
        np.testing.assert_allclose(found[:, b], weights / weights.sum(), atol=1e-10)


@pytest.mark.parametrize("standardize", [False, True])
def test_the_amalgam_is_a_weighted_sum(standardize: bool) -> None:
    logits, target = sample(6, 4, 0, 3)
    weights = teacher_weights(logits, target, "loss")
    found = amalgamate(logits, weights, standardize)
    for b in range(6):
        rows = logits[:, b].numpy()
        if standardize:
            rows = stats.zscore(rows, axis=1)
        np.testing.assert_allclose(found[b], (weights[:, b, None].numpy() * rows).sum(0), atol=1e-9)


def test_amalgam_of_equal_teachers_is_each_of_them() -> None:
    logits, target = sample(6, 4)
    same = logits.expand(3, 6, 4)
    for kind in get_args(functional.TeacherWeights):
        np.testing.assert_allclose(amalgamate(same, teacher_weights(same, target, kind)), logits.numpy(), atol=1e-12)
