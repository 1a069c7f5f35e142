from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor

from groundwire.callbacks.unlearning.influence import (
    damped_factor,
    default_damping,
    influence,
    leave_one_out_factor,
    linear_datamodeling_score,
    rank_correlation,
    self_influence,
    trac_in,
)
from helpers.edge import generator

N, D, TOTAL = 60, 7, 0.9  # records, inputs, weight of the regulariser that stays when a record is removed


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def ridge(x: Tensor, y: Tensor) -> Tensor:
    """The minimum of the sum of (x w - y)^2 / 2, plus TOTAL / 2 |w|^2."""
    return torch.linalg.solve(x.T @ x + TOTAL * torch.eye(D, dtype=x.dtype), x.T @ y)


def test_influence_on_a_prediction_is_exactly_leave_one_out_for_ridge_regression() -> None:
    x, y, xt = normal(N, D), normal(N, seed=1), normal(5, D, seed=2)
    w = ridge(x, y)
    gradients, curvature, damping = (x @ w - y)[:, None] * x, x.T @ x / N, TOTAL / N
    predicted = influence(xt, gradients, curvature, damping)
    without = [ridge(torch.cat([x[:i], x[i + 1 :]]), torch.cat([y[:i], y[i + 1 :]])) for i in range(N)]
    truth = N * torch.stack([xt @ (v - w) for v in without], dim=1)
    factor = leave_one_out_factor(x, curvature, damping)
    torch.testing.assert_close(predicted * factor, truth, rtol=1e-10, atol=1e-12)
    assert (predicted - truth).abs().max() > 1e-3, "without the factor it is not exact"
    assert (predicted * factor + truth).abs().max() > 1e-1, "and of the other sign it is wrong"


def test_positive_means_that_the_loss_rises_without_the_record() -> None:
    x, y = normal(N, D), normal(N, seed=1)
    w = ridge(x, y)
    gradients = (x @ w - y)[:, None] * x
    own = self_influence(gradients, damped_factor(x.T @ x / N, TOTAL / N))
    i = int(own.argmax())
    v = ridge(torch.cat([x[:i], x[i + 1 :]]), torch.cat([y[:i], y[i + 1 :]]))
    assert own[i] > 0
    assert (x[i] @ v - y[i]).square() > (x[i] @ w - y[i]).square()


def test_self_influence_is_the_diagonal_of_influence() -> None:
    rows = normal(N, D)
    curvature = rows.T @ rows / N
    expected = influence(rows, rows, curvature, 0.3).diagonal()
    torch.testing.assert_close(self_influence(rows, damped_factor(curvature, 0.3)), expected)


def test_damping_is_a_tenth_of_the_mean_diagonal_by_default() -> None:
    curvature = torch.diag(torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64))
    assert default_damping(curvature) == pytest.approx(0.3)
    found = influence(torch.eye(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64), curvature)
    torch.testing.assert_close(found.diagonal(), 1 / torch.tensor([1.3, 2.3, 6.3], dtype=torch.float64))


def test_trac_in_is_the_sum_over_checkpoints() -> None:
    test, train, lrs = [normal(2, D, seed=s) for s in (0, 1)], [normal(N, D, seed=s) for s in (2, 3)], [0.5, 0.1]
    found = trac_in(test, train, lrs)
    for t in range(2):
        for i in range(N):
            expected = sum(
                lr * float(sum(g_t[t, j] * g_i[i, j] for j in range(D)))
                for lr, g_t, g_i in zip(lrs, test, train, strict=True)
            )
            assert float(found[t, i]) == pytest.approx(expected)


def test_trac_in_predicts_what_a_small_step_does() -> None:
    """A step on one record changes the test record's loss by minus the score."""
    x, y, w = normal(1, D), normal(1, seed=1), normal(D, seed=2)
    xt, yt, lr = normal(1, D, seed=3), normal(1, seed=4), 1e-6
    g_i, g_t = (x @ w - y) * x, (xt @ w - yt) * xt
    stepped = w - lr * g_i[0]
    change = 0.5 * F.mse_loss(xt @ stepped, yt) - 0.5 * F.mse_loss(xt @ w, yt)
    assert float(trac_in([g_t], [g_i], [lr])) == pytest.approx(-float(change), rel=1e-4)


def test_rank_correlation_is_scipys_with_ties() -> None:
    a, b = normal(4, 50).round(decimals=1), normal(4, 50, seed=1).round()
    expected = [spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    torch.testing.assert_close(rank_correlation(a, b), torch.tensor(expected, dtype=torch.float64))


def test_linear_datamodels_that_are_right_score_one_and_of_the_other_sign_minus_one() -> None:
    scores, subsets = normal(3, 20), torch.rand(12, 20, generator=generator(1)) < 0.5
    outputs = (subsets.double() @ scores.T).exp()
    ones = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(linear_datamodeling_score(scores, subsets, outputs), ones)
    torch.testing.assert_close(linear_datamodeling_score(-scores, subsets, outputs), -ones)
    unrelated = linear_datamodeling_score(scores, subsets, normal(12, 3, seed=2))
    assert (unrelated.abs() < 0.9).all()


def test_bad_input_is_refused_with_what_to_change() -> None:
    eye = torch.eye(3)
    with pytest.raises(ValueError, match=r"`test` must be rows \(n, 3\)"):
        influence(torch.ones(2, 4), torch.ones(2, 3), eye)
    with pytest.raises(ValueError, match=r"`train` must be rows \(n, 3\)"):
        influence(torch.ones(2, 3), torch.ones(3), eye)
    with pytest.raises(ValueError, match="must be a square matrix"):
        damped_factor(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"`damping` must be at least 0, got -1"):
        damped_factor(eye, -1.0)
    with pytest.raises(ValueError, match=r"not positive definite.*larger `damping`"):
        damped_factor(torch.ones(3, 3), 0.0)
    with pytest.raises(ValueError, match="not positive definite"):
        damped_factor(torch.full((3, 3), float("nan")), 1.0)
    with pytest.raises(ValueError, match="leverage 1"):
        leave_one_out_factor(torch.eye(2), torch.eye(2) / 2, 0.0)
    with pytest.raises(ValueError, match=r"One entry a checkpoint.*got 1, 1 and 0"):
        trac_in([eye], [eye], [])
    with pytest.raises(ValueError, match="at least 3 subsets"):
        linear_datamodeling_score(torch.ones(1, 4), torch.ones(2, 4).bool(), torch.ones(2, 1))
