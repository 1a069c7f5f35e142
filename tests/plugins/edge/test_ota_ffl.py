"""OTA-FFL: weights, alignment and the estimate against closed forms, brute force and limits."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

from groundwire.plugins.channels import FadingMAC, NoFading, PathLoss, Rayleigh
from groundwire.plugins.channels.alignment import alignment_mse, minimum_mse, zero_forcing
from groundwire.plugins.edge import EdgeStrategy, Received, Round, Uplink
from groundwire.plugins.edge.fairness import box_weights, softmax_weights
from groundwire.plugins.edge.uplinks.ota_ffl import OTAFFL
from helpers.channels import build_from_yaml
from helpers.edge import check_strategy_part, fit
from helpers.uplinks import check_uplink, plan, ready, updates

BLOCK, M, D = Rayleigh(block=True), 6, 200


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_losses(devices: int, losses: Tensor | None = None, **options: Any) -> Round:
    return replace(plan(devices, **options), losses=torch.arange(1.0, devices + 1) if losses is None else losses)


def noiseless(**options: Any) -> Callable[[], OTAFFL]:
    return lambda: OTAFFL(channel=FadingMAC(BLOCK, noise_var=0.0), **options)


class Told(OTAFFL):
    """With losses that depend on device and round, for the tester, which knows of none."""

    def forward(self, updates: Tensor, round: Round) -> Received:
        if round.losses is None:
            told = torch.tensor([1.0 + (3 * m + 5 * round.index) % 7 for m in round.devices])
            round = replace(round, losses=told)
        return super().forward(updates, round)


# ---------------------------------------------------------------- shared checks


@pytest.mark.parametrize(
    "options",
    [{}, {"align": "mmse", "weights": "softmax"}, {"min_gain": 0.3, "centre": "samples", "power": 1e4}],
    ids=["zero_forcing", "mmse", "min_gain"],
)
@pytest.mark.filterwarnings("ignore:In round")
def test_shared_checks(options: dict[str, Any]) -> None:
    check_uplink(lambda: Told(**({"power": 500.0} | options)), noisy=True, stateful=True)


@pytest.mark.filterwarnings("ignore:In round")
def test_a_run_with_its_own_losses_resumes() -> None:
    check_strategy_part(lambda: EdgeStrategy(num_devices=4, uplink=OTAFFL(power=1e3, epsilon=0.2)))


def test_without_noise_and_with_epsilon_zero_a_run_is_federated_sgd() -> None:
    fair, _, _ = fit(EdgeStrategy(num_devices=4, uplink=noiseless(epsilon=0.0)()))
    plain, _, _ = fit(EdgeStrategy(num_devices=4))
    torch.testing.assert_close(fair, plain, rtol=1e-4, atol=1e-6)
    tilted, _, _ = fit(EdgeStrategy(num_devices=4, uplink=noiseless(epsilon=0.2)()))
    assert float((tilted - plain).abs().max()) > 1e-4


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("epsilon", "expected"),
    [
        (0.0, (0.25, 0.25, 0.25, 0.25)),
        (0.1, (0.15, 0.35, 0.35, 0.15)),
        (0.25, (0.0, 0.5, 0.5, 0.0)),
        (0.5, (0.0, 0.75, 0.25, 0.0)),
        (1.0, (0.0, 1.0, 0.0, 0.0)),
        (7.0, (0.0, 1.0, 0.0, 0.0)),
    ],
)
def test_box_weights_worked_out_by_hand(epsilon: float, expected: tuple[float, ...]) -> None:
    weights = box_weights(torch.tensor([1.0, 3.0, 2.0, 0.5]), epsilon)
    assert weights.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_box_weights_solve_their_linear_program(seed: int) -> None:
    g = generator(seed)
    losses = torch.rand(9, generator=g, dtype=torch.float64).round(decimals=1)  # with ties
    centre = torch.rand(9, generator=g, dtype=torch.float64)
    centre = centre / centre.sum() if seed % 2 else torch.full((9,), 1 / 9, dtype=torch.float64)
    epsilon = (0.03, 0.1, 0.3)[seed % 3]
    weights = box_weights(losses, epsilon, centre)
    bounds = [(max(0.0, c - epsilon), min(1.0, c + epsilon)) for c in centre.tolist()]
    best = scipy.optimize.linprog(-losses.numpy(), A_eq=np.ones((1, 9)), b_eq=[1.0], bounds=bounds)
    assert float(weights @ losses) == pytest.approx(-best.fun, rel=1e-9)
    assert float(weights.sum()) == pytest.approx(1.0, rel=1e-12)
    assert all(low - 1e-12 <= w <= high + 1e-12 for w, (low, high) in zip(weights.tolist(), bounds, strict=True))


def test_weights_grow_with_the_loss_and_depend_on_its_order_alone() -> None:
    losses = torch.rand(12, generator=generator(3), dtype=torch.float64)
    order = losses.argsort()
    for found in (box_weights(losses, 0.05), softmax_weights(losses, 0.3), softmax_weights(losses, 0.3, mix=0.5)):
        assert bool((found[order].diff() >= 0).all())
        assert bool((found >= 0).all())
        assert float(found.sum()) == pytest.approx(1.0)
    torch.testing.assert_close(box_weights(5 * losses + 2, 0.05), box_weights(losses, 0.05))
    torch.testing.assert_close(softmax_weights(losses + 2, 0.3), softmax_weights(losses, 0.3))
    shuffled = torch.randperm(12, generator=generator(4))
    tied = losses.round(decimals=1)
    assert len(tied.unique()) < 12
    torch.testing.assert_close(box_weights(tied[shuffled], 0.05), box_weights(tied, 0.05)[shuffled])


def test_softmax_weights_maximise_what_they_say_and_have_their_limits() -> None:
    losses, centre = torch.tensor([0.3, 1.0, 0.2]).double(), torch.tensor([0.5, 0.2, 0.3]).double()

    def objective(w: np.ndarray) -> float:
        return -float(w @ losses.numpy() - 0.4 * np.sum(w * np.log(w / centre.numpy())))

    best = scipy.optimize.minimize(
        objective,
        np.ones(3) / 3,
        bounds=[(1e-9, 1)] * 3,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        tol=1e-13,
    )
    np.testing.assert_allclose(softmax_weights(losses, 0.4, centre=centre), best.x, atol=1e-5)
    torch.testing.assert_close(softmax_weights(losses, 1e9, centre=centre), centre)
    torch.testing.assert_close(softmax_weights(losses, 0.4, mix=0.0, centre=centre), centre)
    assert softmax_weights(losses, 1e-3).tolist() == pytest.approx([0.0, 1.0, 0.0])


def test_weight_rules_refuse_bad_input() -> None:
    losses = torch.tensor([1.0, 2.0])
    for rule in (lambda f, c: box_weights(f, 0.1, c), lambda f, c: softmax_weights(f, 1.0, centre=c)):
        with pytest.raises(ValueError, match=r"Expected finite losses of M >= 1 devices, got \[1.0, nan\]"):
            rule(torch.tensor([1.0, math.nan]), None)
        with pytest.raises(ValueError, match="`centre` must be 2 weights >= 0 that sum to one"):
            rule(losses, torch.tensor([0.5, 0.6]))
    with pytest.raises(ValueError, match=r"`epsilon`.*must be finite and >= 0, got -0.1"):
        box_weights(losses, -0.1)
    with pytest.raises(ValueError, match="`temperature` must be finite and > 0, got 0"):
        softmax_weights(losses, 0.0)
    with pytest.raises(ValueError, match=r"`mix` must be in \[0, 1\], got 1.5"):
        softmax_weights(losses, 1.0, mix=1.5)


# ---------------------------------------------------------------- alignment


def problem(seed: int, devices: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Targets, gains and powers."""
    g = generator(seed)
    target = torch.rand(devices, generator=g, dtype=torch.float64)
    gains = torch.randn(devices, generator=g, dtype=torch.complex128)
    return target, gains, torch.rand(devices, generator=g, dtype=torch.float64) + 0.1


@pytest.mark.parametrize("seed", range(5))
def test_zero_forcing_aligns_exactly_and_one_device_spends_all(seed: int) -> None:
    target, gains, power = problem(seed)
    scale, transmit = zero_forcing(target, gains, power)
    torch.testing.assert_close(scale * gains * transmit, target.to(torch.complex128), rtol=1e-12, atol=1e-15)
    share = transmit.abs().square() / power
    assert float(share.max()) == pytest.approx(1.0, rel=1e-12)
    double, _ = zero_forcing(target, gains, 2 * power)
    assert float(double.square() / scale.square()) == pytest.approx(0.5)  # of the noise
    turned, _ = zero_forcing(target, gains * cmath.exp(1.3j), power)
    torch.testing.assert_close(turned, scale, rtol=1e-12, atol=0)


@pytest.mark.parametrize("seed", range(8))
def test_minimum_mse_is_the_least_over_all_scales(seed: int) -> None:
    """Against a bounded search over the scale, with the best amplitudes for each; it is convex."""
    target, gains, power = problem(seed)
    noise_var = 10.0 ** (seed % 4 - 2)
    reach = (power.sqrt() * gains.abs()).numpy()

    def error(c: float) -> float:
        return float(np.square(np.minimum(c * reach, target.numpy()) - target.numpy()).sum() + c**2 * noise_var)

    forced = zero_forcing(target, gains, power)
    best = scipy.optimize.minimize_scalar(
        error, bounds=(0, float(forced[0])), method="bounded", options={"xatol": 1e-12}
    )
    scale, transmit = minimum_mse(target, gains, power, noise_var)
    found = float(alignment_mse(target, gains, scale, transmit, noise_var))
    assert found == pytest.approx(best.fun, rel=1e-9)
    assert found <= float(alignment_mse(target, gains, *forced, noise_var)) + 1e-12
    assert bool((transmit.abs().square() <= power * (1 + 1e-9)).all())
    assert float((gains * transmit).imag.abs().max()) < 1e-12


def test_minimum_mse_without_noise_is_zero_forcing() -> None:
    target, gains, power = problem(0)
    exact, exact_transmit = zero_forcing(target, gains, power)
    for noise_var in (0.0, 1e-14):
        scale, transmit = minimum_mse(target, gains, power, noise_var)
        torch.testing.assert_close(scale, exact, rtol=1e-9, atol=0)
        torch.testing.assert_close(transmit, exact_transmit, rtol=1e-9, atol=1e-12)


def test_alignment_of_what_is_zero() -> None:
    gains = torch.tensor([1.0 + 1j, 0.0, 2.0])
    for align in (lambda t: zero_forcing(t, gains, 1.0), lambda t: minimum_mse(t, gains, 1.0, 0.5)):
        scale, transmit = align(torch.zeros(3))
        assert float(scale) == 0
        assert not transmit.any()
        scale, transmit = align(torch.tensor([1.0, 0.0, 0.0]))
        assert (transmit != 0).tolist() == [True, False, False]
    with pytest.raises(ValueError, match=r"The device of row 1 has gain 0 and cannot be aligned to its target 0.5"):
        zero_forcing(torch.tensor([0.5, 0.5, 0.0]), gains, 1.0)
    scale, transmit = minimum_mse(torch.tensor([0.5, 0.5, 0.0]), gains, 1.0, 0.1)
    assert torch.isfinite(scale)
    assert float(transmit[1].abs()) == 0


def test_alignment_refuses_bad_input() -> None:
    one = torch.ones(1)
    with pytest.raises(
        ValueError, match=r"a target and a gain for each of M >= 1 devices, got shapes \(1,\) and \(2,\)"
    ):
        zero_forcing(one, torch.ones(2), 1.0)
    with pytest.raises(ValueError, match=r"Targets must be finite and >= 0, got \[-1.0\]"):
        zero_forcing(-one, one, 1.0)
    with pytest.raises(ValueError, match="`power`, the energy of one symbol, must be finite and > 0, got 0"):
        zero_forcing(one, one, 0.0)
    with pytest.raises(ValueError, match="`noise_var` must be finite and >= 0, got -1"):
        minimum_mse(one, one, 1.0, -1.0)


# ---------------------------------------------------------------- the uplink


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("power", [1e-3, 1e6])
def test_without_noise_the_estimate_is_the_weighted_mean(power: float, dtype: torch.dtype) -> None:
    x = (updates(M, D) + 0.05).to(dtype)
    for epsilon in (0.0, 0.1, 1.0):
        received = ready(noiseless(power=power, epsilon=epsilon), D, M)(x, with_losses(M))
        weights = box_weights(torch.arange(1.0, M + 1), epsilon)
        torch.testing.assert_close(received.rows[0].double(), weights @ x.double(), rtol=1e-5, atol=1e-6)
        assert float(received.metrics["uplink/nmse"]) < 1e-9
    if power == 1e6:
        torch.testing.assert_close(ready(noiseless(epsilon=0.0), D, M)(x, with_losses(M)).rows[0], x.mean(0))


def test_the_estimate_is_what_comes_through_the_channel() -> None:
    """Symbol by symbol through FadingMAC, gains, noise and all."""
    x = updates(M, D) + 0.1
    channel = FadingMAC(BLOCK, noise_var=0.3, csi_error_var=0.05)
    for align in ("zero_forcing", "mmse"):
        round = with_losses(M)
        received = ready(lambda align=align: OTAFFL(power=900.0, channel=channel, epsilon=0.1, align=align), D, M)(
            x, round
        )
        weights = box_weights(torch.arange(1.0, M + 1), 0.1)
        mean, std = x.double().mean(1), x.double().std(1, correction=0)
        gains = channel.gains(round.key, 1)
        known = channel.csi(gains, round.key, who="test").flatten()
        scale, transmit = (
            zero_forcing(weights * std, known, 900.0 / D)
            if align == "zero_forcing"
            else minimum_mse(weights * std, known, 900.0 / D, 0.15)
        )
        symbols = transmit.unsqueeze(1) * ((x - mean[:, None]) / std[:, None])
        heard = channel(symbols, round.key, gains=gains)
        expected = (scale * heard.symbols).real + weights @ mean
        torch.testing.assert_close(received.rows[0].double(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(received.cost.energy, heard.energy, rtol=1e-6, atol=0)
        assert received.cost.channel_uses == heard.channel_uses == 2 * D


def test_power_is_met_with_equality_by_one_device() -> None:
    for t in range(10):
        x = updates(M, D, seed=t) * torch.logspace(-3, 3, M)[:, None]
        energy = ready(lambda: OTAFFL(power=70.0, epsilon=0.1), D, M)(x, with_losses(M, index=t)).cost.energy
        assert float(energy.max()) == pytest.approx(70.0, rel=1e-6)


def test_the_estimate_is_unbiased_with_the_noise_that_is_promised() -> None:
    """500 rounds of the same updates; and doubling the power halves the variance."""
    x, weights = updates(M, D), box_weights(torch.arange(1.0, M + 1), 0.1)
    channel = FadingMAC(NoFading(block=True), noise_var=0.5)
    target = weights @ x.double()
    std = x.double().std(1, correction=0)
    for power in (50.0, 100.0):
        uplink = ready(lambda power=power: OTAFFL(power=power, channel=channel, epsilon=0.1), D, M)
        errors = torch.stack([uplink(x, with_losses(M, index=t)).rows[0].double() - target for t in range(500)])
        scale = float((weights * std).max()) / math.sqrt(power / D)
        variance = scale**2 * 0.25
        assert float(errors.square().mean()) == pytest.approx(variance, rel=5 * math.sqrt(2 / errors.numel()))
        assert float(errors.mean(0).abs().max()) < 4.5 * math.sqrt(variance / 500)


def test_one_device_is_its_update_and_noise() -> None:
    x = updates(1, D)
    channel = FadingMAC(BLOCK, noise_var=0.5)
    round = with_losses(1)
    received = ready(lambda: OTAFFL(power=40.0, channel=channel), D, 1)(x, round)
    h = channel.gains(round.key, 1).abs().item()
    scale = float(x.std(correction=0)) / (math.sqrt(40.0 / D) * h)
    noise = channel.noise(round.key, D).real
    torch.testing.assert_close(received.rows[0], x[0] + scale * noise, rtol=1e-4, atol=1e-5)
    assert float(received.metrics["uplink/receive_scale"]) == pytest.approx(scale, rel=1e-5)


def test_constant_updates_and_devices_without_weight_are_silent() -> None:
    x = updates(M, D)
    x[2] = 0.25  # all of it is in its mean
    received = ready(noiseless(epsilon=0.1), D, M)(x, with_losses(M))
    assert float(received.cost.energy[2]) == 0
    torch.testing.assert_close(received.rows[0].double(), box_weights(torch.arange(1.0, M + 1), 0.1) @ x.double())
    worst = ready(noiseless(epsilon=1.0), D, M)(x, with_losses(M))
    assert (worst.cost.energy > 0).tolist() == [False] * (M - 1) + [True]
    torch.testing.assert_close(worst.rows[0], x[-1])
    nothing = ready(lambda: OTAFFL(), D, M)(torch.full((M, D), 0.5), with_losses(M))
    torch.testing.assert_close(nothing.rows[0], torch.full((D,), 0.5))
    assert float(nothing.metrics["uplink/silent"]) == 1
    assert nothing.cost.channel_uses == 0


def test_devices_below_the_least_gain_are_left_out() -> None:
    x, round = updates(M, D), with_losses(M, index=1)
    gains = BLOCK.gains(round.key, 1).abs().flatten()
    limit = float(gains.sort().values[2])
    received = ready(noiseless(epsilon=0.1, min_gain=limit), D, M)(x, round)
    active = gains >= limit
    weights = box_weights(torch.arange(1.0, M + 1)[active], 0.1)
    torch.testing.assert_close(received.rows[0].double(), weights @ x[active].double(), rtol=1e-5, atol=1e-6)
    assert int(received.metrics["uplink/idle_devices"]) == 2
    assert not received.cost.energy[~active].any()
    nobody = ready(noiseless(min_gain=1e6), D, M)(x, round)
    assert not nobody.rows.any()
    assert float(nobody.metrics["uplink/silent"]) == 1
    assert int(nobody.metrics["uplink/idle_devices"]) == M


def test_a_device_that_needs_too_much_is_named_once() -> None:
    place = PathLoss(exponent=8.0, inner_radius=1.0, outer_radius=100.0, reference=2.0)
    channel = FadingMAC(NoFading(block=True, path_loss=place))
    x, round = updates(M, D), with_losses(M, torch.ones(M))
    farthest = int((place(round.key).sqrt() / x.std(1)).argmin())
    uplink = ready(lambda: OTAFFL(channel=channel), D, M)
    with pytest.warns(
        UserWarning, match=f"device {farthest} needs a receive scale of .*Raise `min_gain` or the power"
    ) as seen:
        first, _ = (uplink(x, with_losses(M, torch.ones(M), index=t)) for t in range(2))
    assert len(seen) == 1
    assert float(first.metrics["uplink/nmse"]) > 1
    softer = ready(lambda: OTAFFL(channel=channel, align="mmse"), D, M)(x, round)
    assert float(softer.metrics["uplink/nmse"]) < 1
    assert int(softer.metrics["uplink/weakened_devices"]) >= 1


def test_losses_are_smoothed_by_device() -> None:
    """A running mean of rate 0.9 that begins with the first loss; devices that are away keep theirs."""
    uplink = ready(noiseless(smoothing=0.9, weights="softmax"), D, 3)
    x = updates(3, D)
    uplink(x, with_losses(3, torch.tensor([1.0, 2.0, 3.0])))
    uplink(x[:2], replace(plan((0, 2), index=1), losses=torch.tensor([2.0, 1.0])))
    received = uplink(x, with_losses(3, torch.tensor([1.0, 1.0, 1.0]), index=2))
    smoothed = torch.tensor([0.9 * (0.9 + 0.2) + 0.1, 0.9 * 2 + 0.1, 0.9 * (2.7 + 0.1) + 0.1])
    torch.testing.assert_close(uplink.smoothed_losses, smoothed)
    torch.testing.assert_close(
        received.rows[0].double(), softmax_weights(smoothed, 1.0) @ x.double(), rtol=1e-4, atol=1e-6
    )
    plain = ready(noiseless(smoothing=0.0), D, 3)
    for t in range(2):
        plain(x, with_losses(3, torch.tensor([3.0, 2.0, 1.0]) + t, index=t))
    assert plain.smoothed_losses.tolist() == [4.0, 3.0, 2.0]


def test_the_centre_may_be_the_samples() -> None:
    x, weights = updates(3, D), torch.tensor([1.0, 2.0, 5.0])
    received = ready(noiseless(epsilon=0.0, centre="samples"), D, 3)(x, with_losses(3, weights=weights))
    torch.testing.assert_close(received.rows[0], (weights / 8) @ x, rtol=1e-5, atol=1e-6)


def test_builds_from_yaml_and_tells_its_settings() -> None:
    yaml = """
class_path: groundwire.plugins.edge.uplinks.ota_ffl.OTAFFL
init_args:
  power: 1000.0
  epsilon: 0.02
  align: mmse
"""
    uplink = build_from_yaml(Uplink, yaml)
    assert isinstance(uplink, OTAFFL)
    for words in ("power=ConstantPower(power=1000.0)", "epsilon=0.02", "align='mmse'", "smoothing=0.9"):
        assert words in repr(uplink)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": "max"}, "`weights` must be one of 'box', 'softmax', got 'max'"),
        ({"centre": "median"}, "`centre` must be one of 'uniform', 'samples', got 'median'"),
        ({"align": "none"}, "`align` must be one of 'zero_forcing', 'mmse', got 'none'"),
        ({"epsilon": -1.0}, "`epsilon`.*>= 0, got -1.0"),
        ({"weights": "softmax", "temperature": 0.0}, "`temperature` must be finite and > 0, got 0.0"),
        ({"smoothing": 1.0}, r"`smoothing` must be in \[0, 1\), got 1.0"),
        ({"min_gain": -1.0}, r"`min_gain`, on \|h\|, must be finite and >= 0, got -1.0"),
        ({"power": 0.0}, "power_per_round must be > 0"),
        ({"channel": FadingMAC()}, r"gain must not change within it: use Rayleigh\(block=True\)"),
        ({"channel": FadingMAC(BLOCK, csi_error_var=None)}, "OTAFFL needs channel state information"),
    ],
)
def test_refuses_bad_settings(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        OTAFFL(**options)


def test_refuses_a_round_without_losses() -> None:
    with pytest.raises(ValueError, match="OTAFFL needs the devices' losses, but the round has none"):
        ready(OTAFFL, D, M)(updates(M, D), plan(M))
