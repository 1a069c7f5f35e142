"""Distillation losses against numpy, SciPy and torch's own divergence."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr
from torch import Tensor

from groundwire.callbacks.information.distillation import DIST, DKD, KD, TTM, DistillationMethod
from groundwire.callbacks.information.distillation.functional import dist_terms, dkd_terms, kd_loss, ttm_loss

Array = np.ndarray[Any, np.dtype[Any]]


def pair(batch: int = 16, classes: int = 6, seed: int = 0, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of student and teacher, and labels."""
    rng = np.random.default_rng(seed)
    student, teacher = torch.tensor(scale * rng.standard_normal((2, batch, classes)))
    return student, teacher, torch.tensor(rng.integers(0, classes, batch))


def softmax(z: Tensor, temperature: float = 1.0) -> Array:
    scaled: Array = z.numpy() / temperature
    power = np.exp(scaled - scaled.max(1, keepdims=True))
    result: Array = power / power.sum(1, keepdims=True)
    return result


def kl(p: Array, q: Array) -> Array:
    divergence: Array = (p * np.log(p / q)).sum(-1)
    return divergence


def others(p: Array, target: Tensor) -> Array:
    """The distribution over the classes but the target, in each row."""
    rest = np.stack([np.delete(row, label) for row, label in zip(p, target.numpy(), strict=True)])
    result: Array = rest / rest.sum(1, keepdims=True)
    return result


# ---------------------------------------------------------------- KD


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_kd_is_torch_kl_div_times_the_square_of_the_temperature(temperature: float) -> None:
    student, teacher, _ = pair()
    reference = torch.nn.KLDivLoss(reduction="batchmean", log_target=True)
    expected = temperature**2 * reference(
        torch.log_softmax(student / temperature, 1), torch.log_softmax(teacher / temperature, 1)
    )
    assert float(kd_loss(student, teacher, temperature)) == pytest.approx(float(expected), rel=1e-12)
    assert float(kd_loss(teacher, student, temperature)) != pytest.approx(float(expected), rel=1e-3)


def test_kd_tends_to_the_squared_distance_of_centred_logits() -> None:
    student, teacher, _ = pair()
    difference = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    limit = float(difference.square().sum(1).mean() / (2 * 6))
    errors = [abs(float(kd_loss(student, teacher, t)) - limit) / limit for t in (10.0, 100.0, 1000.0)]
    assert errors[2] < 2e-3
    assert errors[0] > 5 * errors[1] > 25 * errors[2]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.5, 1.0, 4.0]), st.floats(0.01, 5.0))
def test_kd_is_zero_only_where_rows_differ_by_a_constant(seed: int, temperature: float, by: float) -> None:
    student, _, _ = pair(seed=seed, scale=1.0)
    teacher = student + torch.linspace(-9, 9, 16, dtype=torch.float64)[:, None]
    assert abs(float(kd_loss(student, teacher, temperature))) < 1e-12
    teacher[0, 0] += by
    assert float(kd_loss(student, teacher, temperature)) > 1e-9


# ---------------------------------------------------------------- DKD


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_dkd_is_a_computation_in_numpy(temperature: float, classes: int) -> None:
    student, teacher, target = pair(classes=classes)
    p_s, p_t = softmax(student, temperature), softmax(teacher, temperature)
    rows = np.arange(16)
    b_s, b_t = p_s[rows, target], p_t[rows, target]
    tckd = b_t * np.log(b_t / b_s) + (1 - b_t) * np.log((1 - b_t) / (1 - b_s))
    nckd = kl(others(p_t, target), others(p_s, target))
    found = dkd_terms(student, teacher, target, temperature)
    assert float(found[0]) == pytest.approx(temperature**2 * tckd.mean(), rel=1e-10)
    assert float(found[1]) == pytest.approx(temperature**2 * nckd.mean(), rel=1e-10, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1.0, 4.0]), st.sampled_from([0.1, 3.0, 10.0]))
def test_kd_is_the_sum_of_its_decoupled_parts_in_each_sample(seed: int, temperature: float, scale: float) -> None:
    student, teacher, target = pair(8, seed=seed, scale=scale)
    log_p_t = torch.log_softmax(teacher / temperature, 1)
    for i in range(8):
        one = slice(i, i + 1)
        tckd, nckd = dkd_terms(student[one], teacher[one], target[one], temperature)
        rest = 1 - float(log_p_t[i, target[i]].exp())
        total = float(kd_loss(student[one], teacher[one], temperature))
        assert float(tckd) + rest * float(nckd) == pytest.approx(total, rel=1e-9, abs=1e-11)
        assert float(tckd) > -1e-12
        assert float(nckd) > -1e-12


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("sure", ["teacher", "student", "both"])
def test_dkd_survives_confident_outputs(sure: str, temperature: float, right: bool) -> None:
    """With logits of 1e3, ``1 - p_y`` underflows, and ``p_k / (1 - p_y)`` overflows at ``k = y``."""
    student, teacher, target = (x[:6] for x in pair(scale=1.0))
    peak = 1e3 * torch.eye(6)[target if right else (target + 1) % 6]
    inputs = [student.float(), teacher.float()]
    for i, name in enumerate(("student", "teacher")):
        if sure in (name, "both"):
            inputs[i] = inputs[i] + peak
    s = inputs[0].requires_grad_()
    tckd, nckd = dkd_terms(s, inputs[1], target, temperature)
    exact = dkd_terms(s.detach().double(), inputs[1].double(), target, temperature)
    assert tckd.item() == pytest.approx(float(exact[0]), rel=1e-3, abs=1e-3)
    assert nckd.item() == pytest.approx(float(exact[1]), rel=1e-3, abs=1e-3)
    (gradient,) = torch.autograd.grad(tckd + nckd, s)
    assert bool(torch.isfinite(gradient).all())
    if sure == "teacher":
        assert float(gradient.abs().max()) > 0
    if right:  # the rest does not see the peak: it is what it would be without
        expected = dkd_terms(student, teacher, target, temperature)[1]
        assert nckd.item() == pytest.approx(float(expected), rel=1e-3)


# ---------------------------------------------------------------- DIST


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist_is_one_minus_pearson_over_rows_and_over_columns(temperature: float) -> None:
    student, teacher, _ = pair(batch=11)
    p_s, p_t = softmax(student, temperature), softmax(teacher, temperature)
    rows = np.mean([pearsonr(p_s[i], p_t[i]).statistic for i in range(11)])
    columns = np.mean([pearsonr(p_s[:, k], p_t[:, k]).statistic for k in range(6)])
    inter, intra = dist_terms(student, teacher, temperature)
    assert float(inter) == pytest.approx(temperature**2 * (1 - rows), rel=1e-9)
    assert float(intra) == pytest.approx(temperature**2 * (1 - columns), rel=1e-9)
    assert rows != pytest.approx(columns, rel=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.05, 0.95))
def test_dist_does_not_see_positive_affine_maps(seed: int, slope: float) -> None:
    student, teacher, _ = pair(seed=seed)
    mapped = torch.tensor(slope * softmax(teacher) + (1 - slope) / 6).log()  # a distribution again
    assert [float(term) for term in dist_terms(mapped, teacher)] == pytest.approx([0, 0], abs=1e-9)
    for ours, theirs in zip(dist_terms(student, mapped), dist_terms(student, teacher), strict=True):
        assert float(ours) == pytest.approx(float(theirs), abs=1e-9)
        assert 0 <= float(ours) <= 2


def test_dist_of_opposite_outputs_is_two() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]], dtype=torch.float64)
    opposite = (2 / 3 - p).log()
    inter, _ = dist_terms(opposite, p.log())
    assert float(inter) == pytest.approx(2, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 2, 4, 7, 10, 48])
def test_dist_takes_constant_columns_as_uncorrelated(batch: int, dtype: torch.dtype) -> None:
    """All rows are the same: no column varies, up to the rounding of its mean."""
    student, teacher, _ = pair(1)
    s = student.to(dtype).repeat(batch, 1).requires_grad_()
    inter, intra = dist_terms(s, teacher.to(dtype).repeat(batch, 1))
    assert intra.item() == pytest.approx(1, abs=1e-3)
    expected = 1 - pearsonr(softmax(student)[0], softmax(teacher)[0]).statistic
    assert inter.item() == pytest.approx(expected, abs=1e-5)
    (gradient,) = torch.autograd.grad(inter + intra, s)
    assert bool(torch.isfinite(gradient).all())


def test_dist_takes_uniform_rows_as_uncorrelated() -> None:
    _, teacher, _ = pair(5)
    s = torch.zeros(5, 6, dtype=torch.float64, requires_grad=True)
    terms = dist_terms(s, teacher)
    assert [term.item() for term in terms] == pytest.approx([1, 1], abs=1e-6)
    assert bool(torch.isfinite(torch.autograd.grad(sum(terms), s)[0]).all())  # type: ignore[arg-type]


# ---------------------------------------------------------------- TTM


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_ttm_is_a_computation_in_numpy(temperature: float) -> None:
    student, teacher, _ = pair()
    p_s, p_t = softmax(student), softmax(teacher)
    transformed = p_t ** (1 / temperature)
    power_sums = transformed.sum(1)
    divergence = kl(transformed / power_sums[:, None], p_s)
    assert float(ttm_loss(student, teacher, temperature)) == pytest.approx(divergence.mean(), rel=1e-11)
    weighted = (power_sums * divergence).mean()
    assert float(ttm_loss(student, teacher, temperature, weighted=True)) == pytest.approx(weighted, rel=1e-11)
    if temperature == 1.0:
        assert weighted == pytest.approx(divergence.mean())  # power sums are 1
        assert divergence.mean() == pytest.approx(float(kd_loss(student, teacher, 1.0)), rel=1e-12)


def test_ttm_is_kd_with_a_bonus_for_renyi_entropy() -> None:
    """``H(p_T, q_T) = a H(p_T, q) + (1 - a) H_a(q)`` with Renyi entropy of order ``a = 1 / T`` of the student."""
    student, teacher, _ = pair()
    temperature = 4.0
    alpha = 1 / temperature
    p_t, q = softmax(teacher, temperature), softmax(student)
    own = -(p_t * np.log(p_t)).sum(1)
    renyi = np.log((q**alpha).sum(1)) / (1 - alpha)
    kd = float(kd_loss(student, teacher, temperature)) / temperature**2 + own.mean()  # H(p_T, q_T)
    ttm = float(ttm_loss(student, teacher, temperature)) + own.mean()  # H(p_T, q)
    assert kd == pytest.approx(alpha * ttm + (1 - alpha) * renyi.mean(), abs=1e-12)


# ---------------------------------------------------------------- all


def losses(student: Tensor, teacher: Tensor, target: Tensor) -> dict[str, Tensor]:
    return {
        "kd": kd_loss(student, teacher, 3.0),
        "tckd": dkd_terms(student, teacher, target, 3.0)[0],
        "nckd": dkd_terms(student, teacher, target, 3.0)[1],
        "inter": dist_terms(student, teacher, 3.0)[0],
        "intra": dist_terms(student, teacher, 3.0)[1],
        "ttm": ttm_loss(student, teacher, 3.0),
        "wttm": ttm_loss(student, teacher, 3.0, weighted=True),
    }


@pytest.mark.parametrize("name", ["kd", "tckd", "nckd", "inter", "intra", "ttm", "wttm"])
def test_losses_differentiate_and_ignore_shifts_of_logits(name: str) -> None:
    student, teacher, target = pair(4, 3, scale=1.0)
    assert torch.autograd.gradcheck(lambda z: losses(z, teacher, target)[name], student.clone().requires_grad_())
    shift = torch.tensor([[3.0], [-2.0], [0.5], [100.0]])
    expected = float(losses(student, teacher, target)[name])
    assert float(losses(student + shift, teacher - shift, target)[name]) == pytest.approx(expected, rel=1e-10)
    assert expected > 1e-3
    if "ttm" not in name:  # there, the student should be the transformed teacher
        assert float(losses(teacher, teacher, target)[name]) == pytest.approx(0, abs=1e-6)
    else:
        assert float(losses(teacher / 3, teacher, target)[name]) == pytest.approx(0, abs=1e-6)
    twice = float(losses(student.repeat(2, 1), teacher.repeat(2, 1), target.repeat(2))[name])
    assert twice == pytest.approx(expected, rel=1e-10)  # a mean over the batch, not a sum
    stacked = torch.stack([student, 2 * student])
    together = torch.func.vmap(torch.func.grad(lambda z: losses(z, teacher, target)[name]))(stacked)
    alone = torch.func.grad(lambda z: losses(z, teacher, target)[name])(2 * student)
    torch.testing.assert_close(together[1], alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_cast_up_first(dtype: torch.dtype) -> None:
    student, teacher, target = pair()
    student, teacher = student.to(dtype), teacher.to(dtype)
    exact = losses(student.double(), teacher.double(), target)
    for name, value in losses(student, teacher, target).items():
        assert value.dtype == torch.float32
        assert float(value) == pytest.approx(float(exact[name]), rel=1e-4), name


# ---------------------------------------------------------------- methods


def test_methods_give_their_terms_with_weights() -> None:
    student, teacher, target = pair()
    found = KD(temperature=2.0, kd_weight=0.7).terms(student, teacher, target, epoch=0)
    assert found == {"kd": (0.7, kd_loss(student, teacher, 2.0))}
    found = DIST(beta=2.0, gamma=3.0, temperature=4.0).terms(student, teacher, target, epoch=0)
    inter, intra = dist_terms(student, teacher, 4.0)
    assert found == {"inter": (2.0, inter), "intra": (3.0, intra)}
    for weighted in (False, True):
        found = TTM(temperature=2.0, weight=0.5, weighted=weighted).terms(student, teacher, target, epoch=0)
        assert found == {"ttm": (0.5, ttm_loss(student, teacher, 2.0, weighted))}


@pytest.mark.parametrize(
    ("warmup", "epoch", "ramp"), [(20, 0, 0.05), (20, 4, 0.25), (20, 19, 1.0), (20, 50, 1.0), (0, 0, 1.0), (0, 3, 1.0)]
)
def test_dkd_warms_up_by_epoch(warmup: int, epoch: int, ramp: float) -> None:
    student, teacher, target = pair()
    method = DKD(temperature=2.0, alpha=1.5, beta=6.0, warmup_epochs=warmup)
    tckd, nckd = dkd_terms(student, teacher, target, 2.0)
    found = method.terms(student, teacher, target, epoch)
    assert found == {"tckd": (1.5 * ramp, tckd), "nckd": (6.0 * ramp, nckd)}


def test_defaults_are_those_of_the_papers() -> None:
    kd, dkd, dist, ttm = KD(), DKD(), DIST(), TTM()
    assert (kd.temperature, kd.ce_weight, kd.kd_weight) == (4.0, 0.1, 0.9)
    assert (dkd.temperature, dkd.alpha, dkd.beta, dkd.ce_weight, dkd.warmup_epochs) == (4.0, 1.0, 8.0, 1.0, 20)
    assert (dist.beta, dist.gamma, dist.ce_weight) == (1.0, 1.0, 1.0)
    assert ttm.ce_weight == 1.0


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        (KD, ("ce_weight", "kd_weight")),
        (DKD, ("ce_weight", "alpha", "beta", "warmup_epochs")),
        (DIST, ("ce_weight", "beta", "gamma")),
        (TTM, ("ce_weight", "weight")),
    ],
)
def test_bad_arguments_are_refused(method: type[DistillationMethod], arguments: tuple[str, ...]) -> None:
    build: Any = method
    for name in arguments:
        build(**{name: 0})
        for bad in (-1, math.nan, math.inf):
            with pytest.raises(ValueError, match=f"`{name}` of {method.__name__} must be at least 0, got {bad}"):
                build(**{name: bad})
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"`temperature` of {method.__name__} must be above 0, got {bad}"):
            build(temperature=bad)


def test_dist_has_no_gradient_where_a_row_or_column_is_constant() -> None:
    student = torch.zeros(6, 4, requires_grad=True)
    teacher = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    inter, intra = dist_terms(student, teacher)
    assert (float(inter), float(intra)) == (1.0, 1.0)
    (gradient,) = torch.autograd.grad(inter + intra, student)
    assert float(gradient.abs().max()) == 0.0
