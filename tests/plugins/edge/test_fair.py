"""AdaFed and q-FFL: closed forms against the published loops, the optimality conditions, and limits."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from groundwire.plugins.edge import ADSGD, Aggregator, EdgeStrategy, LocalSGD, Received, Round, WeightedMean
from groundwire.plugins.edge.fair import QFFL, AdaFed
from groundwire.plugins.edge.fairness import adafed_coefficients, minimum_norm_weights, q_ffl_coefficients
from groundwire.plugins.edge.uplinks.update_aware import UpdateAware
from groundwire.plugins.ledger import Cost
from helpers.channels import build_from_yaml
from helpers.edge import Classifier, Rounds, check_strategy_part, fit, loader, mlp
from helpers.uplinks import plan


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def told(
    rows: Tensor, losses: Tensor | None, weights: Tensor | None = None, devices: tuple[int, ...] | None = None
) -> tuple[Received, Round]:
    """What an error-free uplink hands to an aggregator."""
    round = plan(devices or len(rows), weights=weights)
    return Received(rows=rows, weights=round.weights, cost=Cost()), replace(round, losses=losses)


def published_adafed(g: np.ndarray, f: np.ndarray, gamma: float) -> np.ndarray:
    """The paper's loop: loss-scaled Gram-Schmidt, then the least-norm point of the hull of orthogonal vectors."""
    r = np.abs(f) ** gamma
    out: list[np.ndarray] = []
    for k in range(len(g)):
        c = [g[k] @ v / (v @ v) for v in out]
        out.append((g[k] - sum(ci * v for ci, v in zip(c, out, strict=True))) / (r[k] - sum(c)))
    inverse = np.array([1 / (v @ v) for v in out])
    return (inverse / inverse.sum()) @ np.stack(out)


def problem(seed: int, devices: int = 6, numel: int = 40) -> tuple[Tensor, Tensor]:
    g = generator(seed)
    rows = torch.randn(devices, numel, generator=g, dtype=torch.float64) + 0.5
    return rows, torch.rand(devices, generator=g, dtype=torch.float64) * 2 + 0.1


# ---------------------------------------------------------------- AdaFed


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(5))
def test_adafed_equals_the_published_loop(seed: int, gamma: float) -> None:
    rows, losses = problem(seed)
    found = AdaFed(gamma, ridge=0.0)(*told(rows, losses))
    expected = published_adafed(rows.numpy(), losses.numpy(), gamma)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_adafed_lets_losses_fall_in_proportion_to_their_powers(gamma: float) -> None:
    rows, losses = problem(1)
    v = AdaFed(gamma, ridge=0.0)(*told(rows, losses))
    torch.testing.assert_close(rows @ v / losses.pow(gamma), (v @ v).expand(6), rtol=1e-9, atol=0)
    order = torch.randperm(6, generator=generator(2))
    again = AdaFed(gamma, ridge=0.0)(*told(rows[order], losses[order]))
    torch.testing.assert_close(again, v, rtol=1e-9, atol=1e-12)


def test_adafed_of_one_device_and_of_orthogonal_updates() -> None:
    rows, losses = problem(3, devices=1)
    torch.testing.assert_close(AdaFed(1.0, ridge=0.0)(*told(rows, losses)), rows[0] / losses[0])
    rows = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
    losses = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    weights = losses.square() / rows.square().sum(1)
    expected = (weights / weights.sum() / losses) @ rows
    torch.testing.assert_close(AdaFed(1.0, ridge=0.0)(*told(rows, losses)), expected)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_adafed_scales_as_it_says(gamma: float) -> None:
    rows, losses = problem(4)
    for ridge in (0.0, 1e-2):
        v = AdaFed(gamma, ridge)(*told(rows, losses))
        torch.testing.assert_close(AdaFed(gamma, ridge)(*told(3 * rows, losses)), 3 * v, rtol=1e-9, atol=0)
        smaller = AdaFed(gamma, ridge)(*told(rows, 5 * losses))
        torch.testing.assert_close(smaller, 5**-gamma * v, rtol=1e-9, atol=0)
    scaled = AdaFed(gamma, loss_scale="mean")
    torch.testing.assert_close(scaled(*told(rows, 5 * losses)), scaled(*told(rows, losses)))
    unit = AdaFed(gamma)(*told(rows, losses / losses.mean()))
    torch.testing.assert_close(scaled(*told(rows, losses)), unit)


def test_adafed_with_the_norm_of_the_mean() -> None:
    rows, losses = problem(5)
    weights = torch.arange(1.0, 7.0, dtype=torch.float64)
    received, round = told(rows, losses, weights)
    v, plain = AdaFed(rescale="mean_norm")(received, round), AdaFed()(received, round)
    assert float(v.norm()) == pytest.approx(float((received.weights @ rows).norm()), rel=1e-6)
    assert float(torch.cosine_similarity(v, plain, dim=0)) == pytest.approx(1.0)


def test_adafed_lets_every_quadratic_loss_fall() -> None:
    """For steps below ``2 min_k r_k / L_k`` along ``v``, where ``f_k = L_k |x - c_k|^2 / 2``; and not far above."""
    g = generator(6)
    centres = torch.randn(5, 8, generator=g, dtype=torch.float64)
    curvature = torch.rand(5, generator=g, dtype=torch.float64) * 3 + 0.2
    x = torch.randn(8, generator=g, dtype=torch.float64) * 0.3

    def losses(x: Tensor) -> Tensor:
        return curvature * (x - centres).square().sum(1) / 2

    rows, before = curvature.unsqueeze(1) * (x - centres), losses(x)
    v = AdaFed(1.0, ridge=0.0)(*told(rows, before))
    limit = float((2 * before / curvature).min())
    assert bool((losses(x - 0.999 * limit * v) < before).all())
    assert not bool((losses(x - 1.001 * limit * v) < before).all())
    mean = WeightedMean()(*told(rows, before))
    assert not bool((rows @ mean > 0).all()), "the mean of these lets some loss rise: the comparison says something"


def test_ridge_goes_from_the_exact_direction_to_the_loss_weighted_mean() -> None:
    rows, losses = problem(7)
    gram = rows @ rows.T
    exact, far = adafed_coefficients(gram, losses), adafed_coefficients(gram, losses, ridge=1e9)
    torch.testing.assert_close(far, losses / losses.square().sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(adafed_coefficients(gram, torch.ones(6), ridge=1e9), torch.full((6,), 1 / 6).double())
    torch.testing.assert_close(adafed_coefficients(gram, losses, ridge=1e-14), exact, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("difference", [1e-3, 1e-4])
def test_nearly_parallel_float32_updates_still_let_every_loss_fall(seed: int, difference: float) -> None:
    """The hazard of the exact solution; the matrix of inner products is in double precision, and a ridge helps."""
    g = generator(seed)
    rows = torch.randn(300, generator=g) + difference * torch.randn(8, 300, generator=g)
    losses = torch.rand(8, generator=g) + 0.5
    mean = rows.mean(0).norm()
    norms = []
    for ridge in (1e-12, 1e-6, 0.1):
        v = AdaFed(1.0, ridge)(*told(rows, losses))
        assert bool((rows.double() @ v.double() > 0).all())
        norms.append(float(v.norm() / mean))
    assert norms[0] < 0.02, "the exact direction is almost orthogonal to the mean"
    assert norms[2] > 5 * norms[0]


def test_adafed_falls_back_to_the_hull_where_a_loss_would_not_fall() -> None:
    """With a large ridge it is a weighted mean, along which the loss of a device against the others rises."""
    rows = torch.tensor([[1.0, 0.2], [1.0, -0.2], [-0.3, 0.1]], dtype=torch.float64)
    losses = torch.tensor([1.0, 1.0, 0.2], dtype=torch.float64)
    aggregator = AdaFed(1.0, ridge=1e3)
    v = aggregator(*told(rows, losses))
    assert aggregator.metrics["adafed/fallback"] == 1.0
    assert bool((rows @ v >= v @ v - 1e-9).all())
    small = AdaFed(1.0)
    independent = torch.cat([rows, torch.eye(3, dtype=torch.float64)], dim=1)
    small(*told(independent, losses))
    assert small.metrics["adafed/fallback"] == 0.0
    assert float(small.metrics["adafed/least_slope"]) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("seed", range(6))
def test_minimum_norm_weights_against_a_general_solver(seed: int) -> None:
    g = generator(seed)
    rows = torch.randn(5, 3 if seed % 2 else 30, generator=g, dtype=torch.float64) + (seed // 2) * 0.5
    rows = rows * 10.0 ** (3 * (seed - 2))  # units do not matter
    gram = (rows @ rows.T).numpy()
    weights = minimum_norm_weights(rows @ rows.T).numpy()
    unit = gram / np.trace(gram)
    best = scipy.optimize.minimize(
        lambda w: w @ unit @ w,
        np.full(5, 0.2),
        jac=lambda w: 2 * unit @ w,
        bounds=[(0, 1)] * 5,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        tol=1e-15,
        options={"maxiter": 500},
    )
    assert weights.min() >= 0
    assert weights.sum() == pytest.approx(1.0)
    assert weights @ unit @ weights <= best.fun + 1e-9
    assert bool((unit @ weights >= weights @ unit @ weights - 1e-9).all())


def test_adafed_leaves_out_devices_that_stand_still() -> None:
    rows, losses = problem(8)
    rows = rows.clone()
    rows[2] = 0
    received, round = told(rows, losses, devices=(4, 9, 7, 1, 0, 2))
    with pytest.warns(UserWarning, match="leaves out devices whose update is zero"):
        v = AdaFed()(received, round)
    kept = [0, 1, 3, 4, 5]
    torch.testing.assert_close(v, AdaFed()(*told(rows[kept], losses[kept])))
    with pytest.warns(UserWarning, match="whose update is zero"):
        nothing = AdaFed(rescale="mean_norm")(*told(torch.zeros(3, 5), torch.ones(3)))
    assert torch.equal(nothing, torch.zeros(5))
    assert torch.equal(AdaFed(1.0)(*told(rows[kept], torch.zeros(5))), torch.zeros(40, dtype=torch.float64))


def test_dependent_updates_need_a_ridge() -> None:
    rows, losses = problem(9)
    twins = torch.cat([rows, rows[:1]]), torch.cat([losses, losses[:1] * 2])
    with pytest.raises(ValueError, match=r"The 7 updates depend linearly on each other.*give a `ridge` above 0"):
        AdaFed(ridge=0.0)(*told(*twins))
    many = torch.randn(9, 4, generator=generator(0)), torch.rand(9, generator=generator(1)) + 1
    with pytest.raises(ValueError, match="The 9 updates depend linearly"):
        AdaFed(ridge=0.0)(*told(*many))
    for case in (twins, many):
        assert torch.isfinite(AdaFed(ridge=1e-6)(*told(*case))).all()


# ---------------------------------------------------------------- q-FFL


def published_q_fedavg(rows: np.ndarray, f: np.ndarray, q: float, lr: float) -> np.ndarray:
    """Algorithm 2 of the paper, device by device."""
    lipschitz = 1 / lr
    deltas, hs = [], []
    for row, loss in zip(rows, f, strict=True):
        delta_w = lipschitz * row
        deltas.append(loss**q * delta_w)
        hs.append(q * loss ** (q - 1) * float(delta_w @ delta_w) + lipschitz * loss**q)
    return sum(deltas) / sum(hs)


@pytest.mark.parametrize("q", [0.0, 0.3, 1.0, 5.0])
def test_q_ffl_equals_the_published_algorithm(q: float) -> None:
    rows, losses = problem(10)
    found = QFFL(q, lr=0.2)(*told(rows, losses))
    np.testing.assert_allclose(found, published_q_fedavg(rows.numpy(), losses.numpy(), q, 0.2), rtol=1e-6)


def test_q_of_zero_is_fedavg() -> None:
    rows, losses = problem(11)
    for weights in (None, torch.arange(1.0, 7.0, dtype=torch.float64)):
        received, round = told(rows, losses, weights)
        torch.testing.assert_close(QFFL(0.0, lr=0.1)(received, round), WeightedMean()(received, round))
        torch.testing.assert_close(
            QFFL(0.0, lr=0.1)(received, replace(round, losses=0 * losses)), WeightedMean()(received, round)
        )


def test_a_large_q_follows_the_worst_device_alone() -> None:
    rows, losses = problem(12)
    v = QFFL(300.0, lr=0.1)(*told(rows, losses))
    worst = int(losses.argmax())
    assert float(torch.cosine_similarity(v, rows[worst], dim=0)) > 0.999
    assert torch.isfinite(QFFL(300.0, lr=0.1)(*told(rows, losses * 1e6))).all()
    assert float(v.norm()) < float(rows[worst].norm()), "and with a shorter step"


def test_weights_of_q_ffl_are_repetitions() -> None:
    """A device of weight 2 counts as two alike."""
    rows, losses = problem(13, devices=3)
    weighted = QFFL(2.0, 0.1)(*told(rows, losses, torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)))
    again = [0, 1, 1, 2]
    torch.testing.assert_close(weighted, QFFL(2.0, 0.1)(*told(rows[again], losses[again])), rtol=1e-6, atol=1e-9)


def test_losses_of_zero_are_clamped() -> None:
    norms, half = torch.tensor([1.0, 1.0]), torch.tensor([0.5, 0.5])
    for q in (0.1, 1.0, 3.0):
        found = q_ffl_coefficients(torch.tensor([0.0, 1.0]), norms, half, q, 0.1)
        assert bool(torch.isfinite(found).all())
        assert float(found[0]) <= float(found[1])


# ---------------------------------------------------------------- in a strategy


@pytest.mark.parametrize(
    ("aggregator", "options"),
    [
        (lambda: AdaFed(gamma=1.0), {}),
        (lambda: AdaFed(gamma=0.5, loss_scale="mean", rescale="mean_norm"), {}),
        (lambda: QFFL(q=1.0, lr=0.1), {"local": LocalSGD(lr=0.1, num_steps=2)}),
    ],
    ids=["adafed", "adafed_scaled", "q_ffl"],
)
def test_a_run_resumes(aggregator: Any, options: dict[str, Any]) -> None:
    check_strategy_part(lambda: EdgeStrategy(num_devices=4, aggregator=aggregator(), **options))


def test_a_run_with_q_of_zero_is_fedavg() -> None:
    local = LocalSGD(lr=0.1, num_steps=2)
    fair, _, _ = fit(EdgeStrategy(num_devices=4, local=local, aggregator=QFFL(q=0.0, lr=0.1)))
    plain, _, _ = fit(EdgeStrategy(num_devices=4, local=local))
    torch.testing.assert_close(fair, plain, rtol=1e-5, atol=1e-7)


def test_adafed_lowers_the_loss_of_every_device_in_every_round() -> None:
    """Four devices, the whole of their data in each round, small steps of SGD."""
    seen: list[Tensor] = []

    class Watching(AdaFed):
        def forward(self, received: Received, round: Round) -> Tensor:
            assert round.losses is not None
            seen.append(round.losses.clone())
            return super().forward(received, round)

    (batch,) = list(loader(batch_size=96))
    module = Classifier(mlp(), optimizer="SGD", lr=0.1)
    fit(EdgeStrategy(num_devices=4, aggregator=Watching()), module, Rounds(*[batch] * 8), steps=8)
    assert len(seen) == 8
    assert all(bool((after < before).all()) for before, after in itertools.pairwise(seen))


def test_what_superposes_in_the_air_has_no_rows() -> None:
    with pytest.raises(MisconfigurationException, match="AdaFed looks at each device's update, but ADSGD"):
        fit(EdgeStrategy(num_devices=4, uplink=ADSGD(), aggregator=AdaFed()))


@pytest.mark.parametrize("aggregator", [AdaFed(), QFFL(1.0, 0.1)])
def test_losses_are_those_of_the_devices_that_sent(aggregator: Aggregator) -> None:
    received, round = told(*problem(14, devices=4))
    assert round.losses is not None
    chosen = torch.tensor([2, 0])
    some = replace(received, rows=received.rows[chosen], weights=torch.full_like(received.weights[:2], 0.5))
    expected = aggregator(some, replace(round, losses=round.losses[chosen]))
    assert torch.equal(aggregator(replace(some, senders=chosen), round), expected)
    with pytest.raises(ValueError, match="needs a loss for each row, but 2 rows came from 4 devices"):
        aggregator(some, round)
    uplink = UpdateAware("bc", num_scheduled=2, bandwidth=50.0)
    fit(EdgeStrategy(num_devices=4, uplink=uplink, aggregator=aggregator), steps=2)


@pytest.mark.parametrize("aggregator", [AdaFed(), QFFL(1.0, 0.1)])
def test_refuses_losses_that_it_cannot_use(aggregator: Aggregator) -> None:
    rows, losses = problem(14, devices=3)
    name = type(aggregator).__name__
    with pytest.raises(ValueError, match=f"{name} needs the devices' losses, but the round has none"):
        aggregator(*told(rows, None))
    for wrong in (-0.12, math.nan, math.inf):
        bad = losses.clone()
        bad[1] = wrong
        with pytest.raises(
            ValueError, match=rf"{name}\(.*\) needs finite losses >= 0 of every device; device 7 has {wrong}"
        ):
            aggregator(*told(rows, bad, devices=(3, 7, 5)))
    assert torch.isfinite(AdaFed(gamma=0.0)(*told(rows, -losses))).all(), "with gamma 0 losses do not matter"


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: AdaFed(gamma=-1.0), "`gamma` must be finite and >= 0, got -1.0"),
        (lambda: AdaFed(ridge=-1.0), "`ridge` must be finite and >= 0, got -1.0"),
        (lambda: AdaFed(loss_scale="max"), "`loss_scale` must be 'none' or 'mean', got 'max'"),  # type: ignore[arg-type]
        (lambda: AdaFed(rescale="max"), "`rescale` must be 'none' or 'mean_norm', got 'max'"),  # type: ignore[arg-type]
        (lambda: QFFL(q=-1.0, lr=0.1), "`q` must be finite and >= 0, got -1.0"),
        (lambda: QFFL(q=1.0, lr=0.0), "`lr`, that of the devices' local steps, must be finite and > 0, got 0.0"),
    ],
)
def test_refuses_bad_settings(build: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()


def test_build_from_yaml_and_tell_their_settings() -> None:
    adafed = build_from_yaml(
        Aggregator, "class_path: groundwire.plugins.edge.fair.AdaFed\ninit_args: {gamma: 2, ridge: 0.01}"
    )
    qffl = build_from_yaml(Aggregator, "class_path: groundwire.plugins.edge.fair.QFFL\ninit_args: {q: 1, lr: 0.1}")
    assert repr(adafed) == "AdaFed(gamma=2.0, ridge=0.01, loss_scale='none', rescale='none')"
    assert repr(qffl) == "QFFL(q=1.0, lr=0.1)"
    adafed(*told(*problem(0)))
    assert repr(adafed) == "AdaFed(gamma=2.0, ridge=0.01, loss_scale='none', rescale='none')"
    assert isinstance(adafed, nn.Module)
    assert not adafed.state_dict()
