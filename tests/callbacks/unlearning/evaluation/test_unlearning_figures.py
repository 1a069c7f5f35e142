from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax
from scipy.stats import entropy
from torch import Tensor, nn

from groundwire.callbacks.unlearning.evaluation.functional import (
    disagreements,
    kl_divergences,
    mia_auc,
    mia_efficacy,
    output_distances,
    record_accuracies,
    record_losses,
    weight_distance,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- single records


def test_losses_and_accuracies_of_classes_are_those_of_numpy() -> None:
    z, y = draw(6, 4), torch.tensor([0, 1, 2, 3, 1, 0])
    expected = -log_softmax(z.numpy(), axis=1)[np.arange(6), y.numpy()]
    np.testing.assert_allclose(record_losses(z, y).numpy(), expected, rtol=1e-12)
    assert record_accuracies(z, y).tolist() == (z.numpy().argmax(1) == y.numpy()).astype(float).tolist()


def test_a_sequence_counts_its_tokens_but_not_those_that_are_masked() -> None:
    z, y = draw(3, 5, 7), torch.randint(7, (3, 5), generator=torch.Generator().manual_seed(1))
    y[0, 3:] = -100
    tokens = -np.take_along_axis(log_softmax(z.numpy(), axis=2), y.clamp_min(0).numpy()[..., None], 2)[..., 0]
    right = z.numpy().argmax(2) == y.numpy()
    losses = [tokens[0, :3].mean(), tokens[1].mean(), tokens[2].mean()]
    np.testing.assert_allclose(record_losses(z, y).numpy(), losses, rtol=1e-12)
    shares = [right[0, :3].mean(), right[1].mean(), right[2].mean()]
    np.testing.assert_allclose(record_accuracies(z, y).numpy(), shares, rtol=1e-12)


def test_values_have_a_squared_error_and_no_accuracy() -> None:
    outputs, values = draw(5, 2), draw(5, 2, seed=1)
    np.testing.assert_allclose(record_losses(outputs, values), ((outputs - values) ** 2).mean(1), rtol=1e-12)
    assert record_losses(outputs[:, :1].float(), values[:, 0]).shape == (5,)  # a column and a vector do not broadcast
    assert record_accuracies(outputs, values) is None


def test_the_loss_of_a_record_may_be_another() -> None:
    outputs, labels = draw(5, 3), torch.randint(2, (5, 3), generator=torch.Generator().manual_seed(1))

    def several_labels(z: Tensor, y: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(z, y.to(z.dtype))

    expected = nn.functional.binary_cross_entropy_with_logits(outputs, labels.double(), reduction="none").mean(1)
    torch.testing.assert_close(record_losses(outputs, labels, several_labels), expected)
    assert record_accuracies(outputs, labels) is None


@pytest.mark.parametrize(
    ("outputs", "labels"), [(torch.zeros(4), torch.zeros(4, dtype=torch.int64)), (torch.zeros(4, 2), torch.zeros(4))]
)
def test_shapes_that_do_not_fit_are_refused(outputs: Tensor, labels: Tensor) -> None:
    with pytest.raises(ValueError, match="do not fit: class indices have the shape"):
        record_losses(outputs, labels)


# ---------------------------------------------------------------- two models


def test_kl_is_that_of_scipy_and_zero_for_itself() -> None:
    p, q = draw(8, 5), draw(8, 5, seed=1)
    expected = entropy(p.softmax(1).numpy(), q.softmax(1).numpy(), axis=1)
    np.testing.assert_allclose(kl_divergences(p, q).numpy(), expected, rtol=1e-10)
    assert not np.allclose(kl_divergences(q, p).numpy(), expected), "the reference comes first"
    assert kl_divergences(p.float(), p.float()).tolist() == [0.0] * 8
    torch.testing.assert_close(kl_divergences(p, p + 3), torch.zeros(8, dtype=torch.float64), rtol=0, atol=1e-12)
    in_sequence = kl_divergences(p.reshape(2, 4, 5), q.reshape(2, 4, 5))
    np.testing.assert_allclose(in_sequence.numpy(), expected.reshape(2, 4).mean(1), rtol=1e-10)


def test_kl_where_a_class_is_ruled_out() -> None:
    no, yes = torch.tensor([[0.0, -math.inf]]), torch.zeros(1, 2)
    assert kl_divergences(no, yes).item() == pytest.approx(math.log(2))
    assert kl_divergences(yes, no).item() == math.inf


def test_positions_without_a_label_are_left_out_of_every_comparison() -> None:
    p, q = draw(3, 4, 5), draw(3, 4, 5, seed=1)
    labels = torch.randint(5, (3, 4), generator=torch.Generator().manual_seed(2))
    labels[0, 2:], labels[1] = -100, -100
    q[0, 0], q[0, 2:] = p[0, 0], -p[0, 2:]
    for figure in (kl_divergences, disagreements, output_distances):
        found = figure(p, q, labels=labels)
        torch.testing.assert_close(found[:1], figure(p[:1, :2], q[:1, :2]))
        assert found[0] != figure(p, q)[0]
        assert math.isnan(found[1])
        torch.testing.assert_close(found[2:], figure(p[2:], q[2:]))
    assert math.isnan(record_accuracies(p, labels)[1])


def test_disagreement_and_distance() -> None:
    p, q = draw(6, 4), draw(6, 4, seed=1)
    assert disagreements(p, q).tolist() == (p.numpy().argmax(1) != q.numpy().argmax(1)).astype(float).tolist()
    assert disagreements(p, p).sum() == 0
    apart = np.linalg.norm(p.softmax(1).numpy() - q.softmax(1).numpy(), axis=1)
    np.testing.assert_allclose(output_distances(p, q).numpy(), apart, rtol=1e-12)
    torch.testing.assert_close(output_distances(p, p + 5), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-12)
    values = output_distances(p, q, are_logits=False)
    np.testing.assert_allclose(values.numpy(), np.linalg.norm((p - q).numpy(), axis=1), rtol=1e-12)
    with pytest.raises(ValueError, match="outputs of shape"):
        kl_divergences(p, q[:, :3])


def test_weight_distance_refuses_another_architecture() -> None:
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    expected = math.sqrt(sum(float(((a - b) ** 2).sum()) for a, b in pairs))
    assert weight_distance(first, second) == pytest.approx(expected, rel=1e-6)
    assert weight_distance(first, first) == 0
    with pytest.raises(ValueError, match=r"another architecture.*`weight` \[2, 3\] and \[2, 4\]"):
        weight_distance(first, nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"`bias` .* and missing"):
        weight_distance(first, nn.Linear(3, 2, bias=False))


# ---------------------------------------------------------------- membership


def test_records_that_look_like_members_are_taken_for_such() -> None:
    members, others = draw(200).abs() * 0.1, 3 + draw(50, seed=1).abs()
    assert mia_efficacy(members, others, draw(40, seed=2).abs() * 0.1) == 0.0
    assert mia_efficacy(members, others, 3 + draw(40, seed=3).abs()) == 1.0
    assert mia_efficacy(1e-6 * members, 1e-6 * others, 1e-6 * others) == 1.0, "the unit of the loss does not matter"


def test_the_attack_is_a_logistic_regression_in_which_both_groups_weigh_the_same() -> None:
    members, others, asked = draw(300).exp(), draw(30, seed=1).exp() * 2, draw(500, seed=2).exp() * 1.5
    found = mia_efficacy(members, others, asked)
    members, others, asked = (torch.exp(-losses) for losses in (members, others, asked))
    x = np.concatenate([members, others])
    sign, scale = np.concatenate([np.ones(300), -np.ones(30)]), x.std(ddof=1)
    weight = np.concatenate([np.full(300, 330 / 600), np.full(30, 330 / 60)])
    scaled = (x - x.mean()) / scale

    def objective(w: Any) -> float:
        return float((weight * np.logaddexp(0, -sign * (w[0] * scaled + w[1]))).sum() + w[0] ** 2 / 2)

    w = minimize(objective, [0.0, 0.0], tol=1e-12).x
    unseen = w[0] * (asked.numpy() - x.mean()) / scale + w[1] < 0
    assert found == pytest.approx(unseen.mean(), abs=2 / 500)
    assert 0.1 < unseen.mean() < 0.9


@pytest.mark.parametrize("cross_entropy", [True, False])
def test_one_record_with_a_huge_loss_does_not_decide_the_attack(cross_entropy: bool) -> None:
    members, others, asked = draw(200).abs() * 0.1, 1 + draw(50, seed=1).abs(), torch.tensor([0.05, 0.1, 1.5, 2.0])
    assert mia_efficacy(members, others, asked, cross_entropy) == 0.5
    for part in (members, others):
        kept = part[0].clone()
        part[0] = 1e4
        assert mia_efficacy(members, others, asked, cross_entropy) == 0.5
        part[0] = kept


def test_losses_of_another_kind_may_be_negative_and_in_any_unit() -> None:
    members, others = -3 + draw(200).abs() * 0.1, draw(50, seed=1)
    asked = torch.cat([members[:30], others[:20]])
    found = mia_efficacy(members, others, asked, cross_entropy=False)
    assert found == pytest.approx(20 / 50, abs=2 / 50)
    for unit in (1e-6, 1e6):
        assert mia_efficacy(*(unit * x for x in (members, others, asked)), cross_entropy=False) == found
    same = torch.full((7,), -0.3)
    assert mia_efficacy(same, same[:3], same, cross_entropy=False) == 0.5
    assert mia_efficacy(same - 1, same[:3], same, cross_entropy=False) == 1.0, "test losses without a spread"


def test_an_attack_that_knows_nothing() -> None:
    same = torch.full((7,), 0.3)
    assert mia_auc(same, same[:3]) == 0.5
    assert mia_efficacy(same, same, same) == 0.5
    assert mia_efficacy(same, same, same + 1) == 0.5


def test_auc_counts_pairs() -> None:
    forget, test = draw(40).exp().round(decimals=1), draw(60, seed=1).exp().round(decimals=1)
    pairs = [1.0 if f < t else 0.5 if f == t else 0.0 for f in forget.tolist() for t in test.tolist()]
    assert mia_auc(forget, test) == pytest.approx(np.mean(pairs), abs=1e-12)


def test_bad_losses_are_refused() -> None:
    good = torch.ones(3)
    with pytest.raises(ValueError, match="`test_losses` must be a vector of at least one loss"):
        mia_efficacy(good, good[:0], good)
    with pytest.raises(ValueError, match="`forget_losses` has values that are not finite"):
        mia_auc(torch.tensor([math.nan]), good)
