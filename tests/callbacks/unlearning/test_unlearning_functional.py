"""The functions of unlearning against NumPy and SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor

from groundwire.callbacks.information.distillation.functional import kd_loss
from groundwire.callbacks.unlearning.functional import kl_to_teacher, npo_loss, record_nll, ssd_dampen, wrong_labels
from helpers.edge import generator


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


# ---------------------------------------------------------------- likelihood


def test_nll_of_a_sequence_is_the_sum_over_its_tokens() -> None:
    z = logits(5, 7, 4)
    y = torch.randint(0, 4, (5, 7), generator=generator(1))
    y[2, 3] = -100
    log_p = scipy.special.log_softmax(z.numpy(), axis=-1)
    expected = [-sum(log_p[b, t, y[b, t]] for t in range(7) if y[b, t] >= 0) for b in range(5)]
    np.testing.assert_allclose(record_nll(z, y), expected, rtol=1e-12)


def test_nll_of_a_label_in_half_precision_is_computed_in_single() -> None:
    z, y = logits(6, 4).bfloat16(), torch.tensor([0, 1, 2, 3, 0, 1])
    found = record_nll(z, y)
    assert found.dtype == torch.float32
    expected = -scipy.special.log_softmax(z.double().numpy(), axis=-1)[np.arange(6), y]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("labels", [torch.zeros(5), torch.zeros(4, dtype=torch.int64), torch.zeros(5, 4)])
def test_nll_refuses_what_are_no_indices(labels: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected class indices of shape \[5\] for logits \[5, 4\]"):
        record_nll(logits(5, 4), labels)


# ---------------------------------------------------------------- NPO


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 5.0])
def test_npo_is_its_formula_with_the_weight_of_its_gradient(beta: float) -> None:
    nll = torch.tensor([0.1, 1.0, 3.0, 8.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.2, 1.0, 1.0, 0.5], dtype=torch.float64)
    loss = npo_loss(nll, reference, beta)
    pi, pi_ref = np.exp(-nll.detach().numpy()) ** beta, np.exp(-reference.numpy()) ** beta
    assert float(loss) == pytest.approx(2 / beta * np.log1p(pi / pi_ref).mean(), rel=1e-12)
    loss.backward()
    weight = 2 * pi / (pi + pi_ref)  # of gradient ascent, whose loss is -nll
    np.testing.assert_allclose(nll.grad, -weight / 4, rtol=1e-12)
    assert weight[1] == 1.0
    assert weight[3] < weight[1] < weight[0]


def test_npo_at_the_reference_and_once_forgotten() -> None:
    same = torch.tensor([0.3, 2.0], dtype=torch.float64)
    assert float(npo_loss(same, same, 0.1)) == pytest.approx(20 * math.log(2), rel=1e-14)
    forgotten = torch.full((2,), 1e6, requires_grad=True)
    loss = npo_loss(forgotten, torch.zeros(2), 1.0)
    loss.backward()
    assert float(loss) == 0
    assert torch.equal(forgotten.grad, torch.zeros(2))
    assert math.isfinite(float(npo_loss(torch.zeros(2), torch.full((2,), 1e6), 1.0)))


def test_npo_becomes_gradient_ascent_for_small_beta() -> None:
    nll = torch.tensor([0.1, 1.0, 8.0], dtype=torch.float64, requires_grad=True)
    npo_loss(nll, torch.tensor([1.0, 0.1, 0.2], dtype=torch.float64), 1e-6).backward()
    np.testing.assert_allclose(nll.grad, -np.ones(3) / 3, rtol=1e-5)


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_npo_refuses_a_beta_that_is_not_positive(beta: float) -> None:
    with pytest.raises(ValueError, match="`beta` must be above 0"):
        npo_loss(torch.zeros(1), torch.zeros(1), beta)


# ---------------------------------------------------------------- divergence


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_divergence_is_scipys(temperature: float) -> None:
    student, teacher = logits(6, 5), logits(6, 5, seed=1)
    p = scipy.special.softmax(teacher.numpy() / temperature, axis=-1)
    q = scipy.special.softmax(student.numpy() / temperature, axis=-1)
    expected = temperature**2 * scipy.special.rel_entr(p, q).sum(axis=-1)
    found = kl_to_teacher(student, teacher, temperature)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    torch.testing.assert_close(found.mean(), kd_loss(student, teacher, temperature), rtol=1e-12, atol=0)


def test_divergence_of_sequences_is_the_mean_over_positions() -> None:
    student, teacher = logits(3, 4, 5), logits(3, 4, 5, seed=1)
    each = torch.stack([kl_to_teacher(student[:, t], teacher[:, t]) for t in range(4)])
    torch.testing.assert_close(kl_to_teacher(student, teacher), each.mean(dim=0))
    with pytest.raises(ValueError, match=r"must agree in shape, got \[3, 4, 5\], \[3, 5\]"):
        kl_to_teacher(student, teacher[:, 0])


def test_divergence_leaves_out_positions_without_a_label() -> None:
    student, teacher = logits(3, 4, 5), logits(3, 4, 5, seed=1)
    labels = torch.tensor([[1, 2, -100, -100], [-100] * 4, [0, 1, 2, 3]])
    student.requires_grad_(True)
    found = kl_to_teacher(student, teacher, 2.0, labels)
    expected = [kl_to_teacher(student[:1, :2], teacher[:1, :2], 2.0)[0], kl_to_teacher(student, teacher, 2.0)[2]]
    torch.testing.assert_close(found[[0, 2]], torch.stack(expected))
    assert found[1] == 0
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert bool((gradient[labels == -100] == 0).all())
    assert bool((gradient[labels != -100] != 0).any(dim=-1).all())
    with pytest.raises(ValueError, match=r"Labels \[3, 4\] belong to logits \[3, 4, 5\], got \[3\]"):
        kl_to_teacher(student, teacher, 2.0, labels[:, 0])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_divergence_where_both_rule_a_class_out_is_that_of_the_other_classes(temperature: float) -> None:
    student, teacher = logits(6, 5), logits(6, 5, seed=1)
    others = kl_to_teacher(student[:, 1:], teacher[:, 1:], temperature)
    student[:, 0] = teacher[:, 0] = -math.inf
    student.requires_grad_(True)
    found = kl_to_teacher(student, teacher, temperature)
    torch.testing.assert_close(found, others)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert bool(torch.isfinite(gradient).all())
    assert bool((gradient[:, 0] == 0).all())
    teacher[:, 0] = 0.0
    assert bool((kl_to_teacher(student, teacher) == math.inf).all()), "what the teacher does not rule out"


# ---------------------------------------------------------------- wrong labels


def test_wrong_labels_are_uniform_over_the_other_classes() -> None:
    n, classes = 40_000, 5
    labels = torch.arange(n) % classes
    uniforms = torch.rand(n, generator=generator(), dtype=torch.float64)
    found = wrong_labels(labels, classes, uniforms)
    assert found.dtype == torch.int64
    counts = np.zeros((classes, classes), dtype=int)
    np.add.at(counts, (labels.numpy(), found.numpy()), 1)
    assert (np.diag(counts) == 0).all()
    for label in range(classes):
        others = np.delete(counts[label], label)
        assert scipy.stats.chisquare(others).pvalue > 1e-3
    biased = np.bincount((labels + 1).numpy() % classes, minlength=classes)
    assert scipy.stats.chisquare(np.append(biased[:3], 0)).pvalue < 1e-3, "and a wrong distribution would be caught"


def test_wrong_labels_at_the_ends_of_the_interval_and_of_tokens() -> None:
    almost_one = torch.tensor(1.0 - 2**-53, dtype=torch.float64)
    for label in range(3):
        ends = [int(wrong_labels(torch.tensor(label), 3, u)) for u in (torch.zeros(()), almost_one)]
        assert ends == [min(set(range(3)) - {label}), max(set(range(3)) - {label})]
    tokens = torch.tensor([[0, 1, -100], [1, 1, 0]])
    assert wrong_labels(tokens, 2, torch.rand(2, 3, generator=generator())).tolist() == [[1, 0, -100], [0, 0, 1]]
    floats = torch.tensor([0.0, 1.0])
    assert torch.equal(wrong_labels(floats, 2, torch.zeros(2)), torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        wrong_labels(torch.tensor([0]), 1, torch.zeros(1))


# ---------------------------------------------------------------- dampening


@pytest.mark.parametrize(("alpha", "lam"), [(1.0, 1.0), (2.0, 0.5), (2.0, 10.0), (0.0, 0.0)])
def test_dampening_equals_a_loop(alpha: float, lam: float) -> None:
    theta = logits(200)
    everything, forget = logits(200, seed=1).square(), logits(200, seed=2).square()
    everything[:3] = 0
    forget[2:5] = 0
    expected = [
        t * min(1.0, lam * i / f) if f > alpha * i else t
        for t, i, f in zip(theta.tolist(), everything.tolist(), forget.tolist(), strict=True)
    ]
    found = ssd_dampen(theta, everything, forget, alpha, lam)
    np.testing.assert_allclose(found, expected, rtol=1e-14)
    assert bool((found.abs() <= theta.abs()).all()), "nothing grows"


def test_dampening_without_a_selection_changes_nothing() -> None:
    theta, importance = logits(50), logits(50, seed=1).square()
    importance[:5] = 0
    assert torch.equal(ssd_dampen(theta, importance, 100 * importance, alpha=math.inf), theta)
    assert torch.equal(ssd_dampen(theta, torch.zeros(50), importance, alpha=math.inf), theta)
    assert torch.equal(ssd_dampen(theta, importance, importance, alpha=1.0), theta)
