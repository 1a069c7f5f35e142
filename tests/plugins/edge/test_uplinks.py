"""Uplinks against the formulas of their papers, limit cases, and the shared tester."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from torch import Tensor

from groundwire.plugins.channels import AMP, ConstantPower, GaussianMAC, LeastSquares, PowerSchedule, StepPower
from groundwire.plugins.compression import QSGD, DDSGDQuantizer, ErrorFeedback, Identity, RandK, SignSGD, TopK
from groundwire.plugins.edge import ADSGD, CapacityLimited, Digital, ErrorFree, Round, Uplink
from groundwire.plugins.edge.uplinks.a_dsgd import demodulate, modulate
from helpers.uplinks import check_uplink, plan, ready, updates

UPLINKS: dict[str, tuple[Any, dict[str, bool]]] = {
    "error_free": (ErrorFree, {"changes": False}),
    "digital_identity": (lambda: Digital(Identity()), {"changes": False}),
    "digital_topk": (lambda: Digital(TopK(density=0.1)), {}),
    "digital_ef_topk": (lambda: Digital(ErrorFeedback(TopK(density=0.1))), {"stateful": True}),
    "digital_randk": (lambda: Digital(RandK(density=0.2)), {"noisy": True}),
    "digital_qsgd": (lambda: Digital(QSGD(num_levels=4)), {"noisy": True}),
    "a_dsgd": (lambda: ADSGD(power=500.0, bandwidth=0.6, sparsity=0.3), {"noisy": True, "stateful": True}),
    "a_dsgd_gaussian_ls": (
        lambda: ADSGD(projection="gaussian", decoder=LeastSquares(), mean_removal_rounds=1, power=StepPower([50, 90])),
        {"noisy": True, "stateful": True},
    ),
    "d_dsgd": (lambda: CapacityLimited(DDSGDQuantizer(), error_feedback=True, power=1e6), {"stateful": True}),
    "signsgd": (lambda: CapacityLimited(SignSGD(), power=1e6), {}),
    "qsgd": (lambda: CapacityLimited(QSGD(num_levels=4), power=1e6), {"noisy": True}),
}


@pytest.mark.parametrize("name", UPLINKS)
def test_shared_checks(name: str) -> None:
    build, options = UPLINKS[name]
    check_uplink(build, **options)


# ---------------------------------------------------------------- A-DSGD


@pytest.mark.parametrize("removes_mean", [False, True])
@pytest.mark.parametrize("pilot_gain", [1.0, 0.03])
def test_modulation_is_the_papers(removes_mean: bool, pilot_gain: float) -> None:
    """Against the paper's formulas for alpha, written out in float64."""
    g = (0.3 + updates(3, 40)).double()
    power = 7.0
    symbols, amplitude = modulate(g, power, pilot_gain=pilot_gain, removes_mean=removes_mean)
    for m in range(3):
        row = g[m].numpy()
        mu, n = row.mean(), len(row)
        if removes_mean:  # n = s - 2, so the paper's s - 3 is n - 1
            alpha = power / (np.sum(row**2) - (n - 1) * mu**2 + pilot_gain**2)
            expected = np.sqrt(alpha) * np.concatenate([row - mu, [mu, pilot_gain]])
        else:
            alpha = power / (np.sum(row**2) + pilot_gain**2)
            expected = np.sqrt(alpha) * np.concatenate([row, [pilot_gain]])
        np.testing.assert_allclose(symbols[m].numpy(), expected, rtol=1e-12)
        assert float(amplitude[m]) == pytest.approx(math.sqrt(alpha), rel=1e-12)
    np.testing.assert_allclose(symbols.square().sum(1), power, rtol=1e-12)
    measured, scale = demodulate(symbols.sum(0), pilot_gain=pilot_gain, removes_mean=removes_mean)
    torch.testing.assert_close(scale, amplitude.sum())
    torch.testing.assert_close(measured, (amplitude @ g) / amplitude.sum())


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(1e-6, 1e6), power=st.floats(1e-3, 1e6), index=st.integers(0, 30))
def test_a_dsgd_spends_exactly_its_power(scale: float, power: float, index: int) -> None:
    uplink = ready(lambda: ADSGD(power=power, bandwidth=0.5, mean_removal_rounds=10), 200, 4)
    received = uplink(scale * updates(4, 200), plan(4, index=index))
    assert received.cost.energy is not None
    np.testing.assert_allclose(received.cost.energy, power, rtol=1e-5)
    assert received.cost.channel_uses == 100
    assert received.cost.bits == 0


@pytest.mark.parametrize("removal", [0, 5])
def test_a_dsgd_without_noise_and_with_a_square_projection_recovers_its_target(removal: int) -> None:
    """s - 1 >= d is out of reach with s <= d, so invert on the k entries' support by least squares instead."""
    numel, k = 60, 6
    uplink = ready(
        lambda: ADSGD(channel=GaussianMAC(0.0), bandwidth=1.0, num_entries=k, mean_removal_rounds=removal), numel, 3
    )
    x = updates(3, numel)
    received = uplink(x, plan(3))
    sparse = torch.stack([torch.where(row.abs() >= row.abs().topk(k).values[-1], row, 0.0) for row in x])
    projection = uplink._mean_removed if removal else uplink._plain
    alpha = 500.0 / (_projected_energy(projection, sparse, bool(removal)) + 1)
    target = (alpha.sqrt() @ sparse) / alpha.sqrt().sum()
    error = (received.rows[0] - target).norm() / target.norm()
    assert error < 0.05, "18 non-zeros from 58 noiseless measurements are within AMP's reach"
    assert float(received.metrics["uplink/nmse"]) == pytest.approx(float(error**2), rel=1e-2, abs=1e-8)


def _projected_energy(projection: Any, sparse: Tensor, removes_mean: bool) -> Tensor:
    projected = projection.mv(sparse)
    energy = projected.square().sum(1)
    if removes_mean:
        energy = energy - (projected.shape[1] - 1) * projected.mean(1).square()
    return energy


def test_a_dsgd_with_one_device_and_no_noise_does_not_depend_on_power() -> None:
    x = updates(1, 80)
    rows = [ready(lambda p=p: ADSGD(power=p, channel=GaussianMAC(0.0)), 80, 1)(x, plan(1)).rows for p in (1.0, 1e4)]
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-3, atol=1e-4)


def test_a_dsgd_error_memory_keeps_what_was_not_sent() -> None:
    uplink = ready(lambda: ADSGD(num_entries=5), 80, 4)
    x = updates(4, 80)
    uplink(x, plan(4))
    held = uplink.memory.residual("update")
    kept = x.abs().topk(5, dim=1).indices
    expected = x.scatter(1, kept, 0.0)
    torch.testing.assert_close(held[:4], expected)


def test_a_dsgd_unheard_pilot_gives_no_update_and_loses_nothing() -> None:
    uplink = ready(lambda: ADSGD(power=1e-6, channel=GaussianMAC(1.0)), 80, 4)
    x = updates(4, 80)
    received = uplink(x, plan(4))
    assert float(received.metrics["uplink/silent"]) == 1.0
    assert not received.rows.any()
    torch.testing.assert_close(uplink.memory.residual("update")[:4], x)


@pytest.mark.parametrize("norm", [0.01, 1.0, 100.0])
def test_a_dsgd_weights_devices_by_their_samples(norm: float) -> None:
    """Two devices whose updates have one entry each, at equal norm: what is decoded has the ratio of the samples."""
    x = torch.zeros(2, 80)
    x[0, 5] = x[1, 50] = norm
    uplink = ready(
        lambda: ADSGD(channel=GaussianMAC(0.0), num_entries=4, mean_removal_rounds=0, decoder=AMP(num_iterations=300)),
        80,
        2,
    )
    received = uplink(x, plan(2, weights=torch.tensor([9.0, 1.0])))
    _, amplitude = modulate(uplink._plain.mv(x), 500.0, share=torch.tensor([0.9, 0.1]))
    lengths = torch.linalg.vector_norm(uplink._plain.mv(x), dim=1).square() + 1
    assert float(amplitude[0] / amplitude[1]) == pytest.approx(9.0 * float(lengths[1] / lengths[0]) ** 0.5, rel=1e-5)
    assert float(received.rows[0, 5] / received.rows[0, 50]) == pytest.approx(9.0, rel=0.1)  # AMP, two projected norms
    assert float(received.rows[0, 5]) == pytest.approx(0.9 * norm, rel=0.02)
    np.testing.assert_allclose(received.cost.energy, [500.0, 500.0 / 81], rtol=1e-5)


def test_a_dsgd_memory_does_not_depend_on_who_else_takes_part() -> None:
    x = updates(3, 80)
    alone, together = (ready(lambda: ADSGD(num_entries=5), 80, 3) for _ in range(2))
    alone(x[:1], plan((0,)))
    together(x, plan(3, weights=torch.tensor([1.0, 5.0, 9.0])))
    assert torch.equal(alone.memory.residual()[0], together.memory.residual()[0])


def test_a_dsgd_survives_an_enormous_finite_update() -> None:
    x = updates(3, 80)
    x[1] *= 1e22
    received = ready(lambda: ADSGD(), 80, 3)(x, plan(3))
    np.testing.assert_allclose(received.cost.energy, 500.0, rtol=1e-5)
    assert torch.isfinite(received.rows).all()


def test_a_weak_pilot_is_not_heard_even_if_the_updates_are() -> None:
    received = ready(lambda: ADSGD(power=500.0, pilot_gain=1e-4), 80, 4)(updates(4, 80), plan(4))
    assert float(received.metrics["uplink/silent"]) == 1.0


def test_a_planned_end_is_asked_for_where_the_power_needs_one() -> None:
    endless = Round(index=0, num_rounds=None, key=plan(2).key, weights=plan(2).weights)
    for build in (lambda: ADSGD(power=StepPower([1, 2])), lambda: ADSGD(average_power=600.0)):
        with pytest.raises(ValueError, match="needs a planned number of rounds"):
            ready(build, 100, 2)(updates(2, 100), endless)
    ready(lambda: ADSGD(), 100, 2)(updates(2, 100), endless)


def test_a_schedule_without_a_representation_of_its_own_can_be_compared() -> None:
    class Odd(PowerSchedule):
        def __init__(self, level: float) -> None:
            self.level = level

        def __call__(self, round: int, num_rounds: int) -> float:
            return self.level

    assert repr(ADSGD(power=Odd(2.0))) == repr(ADSGD(power=Odd(2.0))) != repr(ADSGD(power=Odd(3.0)))


# ---------------------------------------------------------------- capacity-limited digital


@pytest.mark.parametrize(
    ("devices", "uses", "power", "rate", "entries"),
    # wireless budget table, d = 7850: bits per device, and q of D-DSGD, SignSGD and QSGD
    [
        (25, 3925, 50.0, 31.31, (0, 2, 0)),
        (25, 3925, 200.0, 93.04, (5, 7, 4)),
        (25, 3925, 500.0, 162.11, (12, 14, 9)),
        (25, 2355, 500.0, 125.15, (8, 10, 6)),
        (10, 1962, 500.0, 179.25, (14, 16, 10)),
    ],
)
def test_capacity_decides_how_many_entries_are_sent(
    devices: int, uses: int, power: float, rate: float, entries: tuple[int, int, int]
) -> None:
    compressors = (DDSGDQuantizer(), SignSGD(), QSGD(num_levels=4))
    x = updates(devices, 7850)
    for compressor, expected in zip(compressors, entries, strict=True):
        uplink = ready(lambda c=compressor: CapacityLimited(c, power=power, channel_uses=uses), 7850, devices)
        if expected == 0:
            with pytest.warns(UserWarning, match="all devices are silent"):
                received = uplink(x, plan(devices))
        else:
            received = uplink(x, plan(devices))
        assert float(received.metrics["uplink/bit_budget_per_device"]) == pytest.approx(rate, abs=0.005)
        nonzero = (received.rows != 0).sum(1)
        assert int(nonzero.max()) <= expected
        assert received.cost.energy is not None
        if expected:
            assert received.cost.bits_ideal <= rate * devices + 1e-6
            assert float(received.cost.energy.sum()) == pytest.approx(power * devices)
            assert received.cost.channel_uses == uses
        else:
            assert float(received.cost.energy.sum()) == 0.0
            assert received.cost.bits == 0
        if isinstance(compressor, SignSGD):
            assert (nonzero == expected).all()


@pytest.mark.filterwarnings("ignore:There are rounds")
def test_d_dsgd_sent_plus_held_is_the_sum_of_updates() -> None:
    """Telescoping, also over rounds in which nothing can be sent (and a warning says so)."""
    uplink = ready(
        lambda: CapacityLimited(DDSGDQuantizer(), error_feedback=True, channel_uses=500, power=StepPower([40, 1, 4000])),
        1000, 4,
    )  # fmt: skip
    total, sent, silent = torch.zeros(4, 1000), torch.zeros(4, 1000), 0
    for t in range(20):
        x = updates(4, 1000, seed=t)
        received = uplink(x, plan(4, index=t))
        total, sent = total + x, sent + received.rows
        silent += int(float(received.metrics["uplink/silent"]))
    assert 0 < silent < 20
    torch.testing.assert_close(sent + uplink.feedback.memory.residual("update")[:4], total, rtol=1e-4, atol=1e-3)


def test_average_power_limit_is_enforced() -> None:
    for build in (
        lambda: ADSGD(power=ConstantPower(300.0), average_power=200.0),
        lambda: CapacityLimited(DDSGDQuantizer(), power=300.0, average_power=200.0),
    ):
        with pytest.raises(ValueError, match=r"averages 300.0 over 20 rounds, above the limit 200.0"):
            ready(build, 100, 2)(updates(2, 100), plan(2))
    ready(lambda: ADSGD(power=StepPower([100, 300]), average_power=200.0), 100, 2)(updates(2, 100), plan(2))


# ---------------------------------------------------------------- building and bad input


def test_built_from_yaml() -> None:
    parser = ArgumentParser()
    parser.add_argument("--uplink", type=Uplink)
    config = """
    uplink:
      class_path: groundwire.plugins.edge.ADSGD
      init_args:
        power: {class_path: groundwire.plugins.channels.StepPower, init_args: {levels: [100, 200, 300]}}
        channel: {class_path: groundwire.plugins.channels.GaussianMAC, init_args: {noise_var: 0.5}}
        decoder: {class_path: groundwire.plugins.channels.AMP, init_args: {num_iterations: 7}}
        bandwidth: 0.3
    """
    uplink = parser.instantiate(parser.parse_string(config)).uplink
    assert isinstance(uplink, ADSGD)
    assert (uplink.channel.noise_var, uplink.bandwidth, uplink.power.of(plan(1, index=19))) == (0.5, 0.3, 300)
    config = """
    uplink:
      class_path: groundwire.plugins.edge.CapacityLimited
      init_args:
        compressor: {class_path: groundwire.plugins.compression.DDSGDQuantizer}
        error_feedback: true
        power: 200
    """
    uplink = parser.instantiate(parser.parse_string(config)).uplink
    assert isinstance(uplink, CapacityLimited)
    assert isinstance(uplink.feedback, ErrorFeedback)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ADSGD(power=0.0), "power_per_round must be > 0"),
        (lambda: ADSGD(power=-5.0), "power_per_round must be > 0"),
        (lambda: ADSGD(sparsity=1.0), r"`sparsity` .* must be in \(0, 1\), got 1.0"),
        (lambda: ADSGD(sparsity=0.5, num_entries=3), "Give either `sparsity`"),
        (lambda: ADSGD(mean_removal_rounds=-1), "`mean_removal_rounds` must be >= 0"),
        (lambda: ADSGD(pilot_gain=0.0), "`pilot_gain` must be > 0"),
        (lambda: ADSGD(channel=GaussianMAC(-1.0)), "must be finite and >= 0"),
        (lambda: ADSGD(bandwidth=0.5, channel_uses=10), "Give either `bandwidth`"),
        (lambda: ADSGD(bandwidth=1.5), r"must be in \(0, 1\], got 1.5"),
        (lambda: ADSGD(channel_uses=2), r"2 channel uses a round, but this scheme needs 3 <= s <= 100"),
        (lambda: ADSGD(channel_uses=1, mean_removal_rounds=0), "needs 2 <= s <= 100"),
        (lambda: ADSGD(channel_uses=101), "needs 3 <= s <= 100"),
        (lambda: ADSGD(channel_uses=50, num_entries=50), "keeps k=50 entries for s=50"),
        (lambda: ADSGD(channel_uses=3, sparsity=0.1), "keeps k=0 entries for s=3"),
        (lambda: CapacityLimited(SignSGD(), power=-1.0), "power_per_round must be > 0"),
        (lambda: CapacityLimited(SignSGD(), channel_uses=1), "needs 2 <= s <= 100"),
    ],
)
def test_bad_input_by_message(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ready(build, 100, 3)


def test_measured_quality_of_decoding_is_logged() -> None:
    received = ready(lambda: ADSGD(num_entries=10), 200, 4)(updates(4, 200), plan(4))
    assert set(received.metrics) == {
        "uplink/silent",
        "uplink/nmse",
        "uplink/decoder_iterations",
        "uplink/decoder_diverged",
    }
