"""CA-DSGD and ESA-DSGD against their formulas, limit cases, and the shared tester."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from groundwire.plugins.channels import (
    AMP,
    FadingMAC,
    LeastSquares,
    NoFading,
    PathLoss,
    Rayleigh,
    Rician,
    StepPower,
    pack_complex,
    unpack_complex,
)
from groundwire.plugins.edge import Uplink
from groundwire.plugins.edge.uplinks.ca_dsgd import CADSGD, ESADSGD, ChannelInversion
from helpers.uplinks import check_uplink, plan, ready, updates

UPLINKS: dict[str, tuple[Any, dict[str, bool]]] = {
    "ca_dsgd": (lambda: CADSGD(power=500.0, bandwidth=0.6, sparsity=0.3), {"noisy": True, "stateful": True}),
    "ca_dsgd_block_csi_ls": (
        lambda: CADSGD(
            channel=FadingMAC(Rician(2.0, block=True, path_loss=PathLoss()), csi_error_var=0.1),
            threshold=0.4,
            projection="gaussian",
            decoder=LeastSquares(),
            power=StepPower([50, 90]),
        ),
        {"noisy": True, "stateful": True},
    ),
    "ca_dsgd_erasures": (
        lambda: CADSGD(channel=FadingMAC(csi_error_var=0.2), threshold=2.0, csi_debias=True),
        {"noisy": True, "stateful": True},
    ),
    "esa_dsgd": (lambda: ESADSGD(bandwidth=0.3), {"noisy": True, "stateful": False}),
    "ecesa_dsgd": (lambda: ESADSGD(bandwidth=0.3, error_feedback=True), {"noisy": True, "stateful": True}),
}


@pytest.mark.parametrize("name", UPLINKS)
def test_shared_checks(name: str) -> None:
    build, options = UPLINKS[name]
    check_uplink(build, **options)


def symbols(devices: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(devices, n, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))


def inversion(threshold: float = 0.3, debias: bool = False, **channel: Any) -> ChannelInversion:
    return ChannelInversion(FadingMAC(**channel), threshold, debias, "the test")


# ---------------------------------------------------------------- truncated channel inversion


@pytest.mark.parametrize("error_var", [0.0, 0.2])
@pytest.mark.parametrize("debias", [False, True])
def test_inversion_is_the_papers_formulas(error_var: float, debias: bool) -> None:
    """Written out, a device and a channel use at a time, with SciPy's exponential integral."""
    m, n, power, threshold, variance = 3, 17, 40.0, 0.4, 1.5
    weights = torch.tensor([1.0, 5.0, 2.0])
    channel = FadingMAC(Rayleigh(variance), noise_var=0.7, csi_error_var=error_var)
    round = plan(m, weights=weights, index=4)
    c = symbols(m, n)
    arrived = ChannelInversion(channel, threshold, debias, "the test")(c, round, power)

    gains = channel.gains(round.key, n)
    known = channel.csi(gains, round.key, who="the test")
    h, g, z = (np.asarray(t, dtype=np.complex128) for t in (gains, known, channel.noise(round.key, n)))
    w = m * np.asarray(round.weights, dtype=np.float64)
    total = variance + error_var
    moment = scipy.special.exp1(threshold / total) / total
    gamma = math.sqrt(power / max((w[i] * np.linalg.norm(c[i])) ** 2 * moment for i in range(m)))
    beta = variance / total if debias else 1.0
    energy = np.zeros(m)
    for i in range(n):
        y, heard = z[i], 0.0
        for j in range(m):
            if abs(g[j, i]) ** 2 >= threshold:
                x = gamma * w[j] * complex(c[j, i]) * g[j, i].conjugate() / abs(g[j, i]) ** 2
                y += h[j, i] * x
                heard += w[j]
                energy[j] += abs(x) ** 2
                assert arrived.active[j, i]
            else:
                assert not arrived.active[j, i]
        assert bool(arrived.heard[i]) == (heard > 0)
        expected = y / (gamma * heard * beta) if heard else 0
        assert complex(arrived.mean[i]) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    np.testing.assert_allclose(arrived.energy, energy, rtol=1e-5)
    assert arrived.channel_uses == 2 * n


@pytest.mark.parametrize("fading", [NoFading(), Rayleigh(), Rayleigh(0.5, block=True), Rician(3.0)])
def test_one_device_is_heard_as_it_spoke(fading: Any) -> None:
    """M = 1: ``c + z / gamma`` wherever it sends, and nothing elsewhere."""
    c, power, round = symbols(1, 200), 60.0, plan(1, index=2)
    channel = FadingMAC(fading, noise_var=0.5)
    inverting = ChannelInversion(channel, 0.3, False, "the test")
    arrived = inverting(c, round, power)
    gamma = math.sqrt(power / (float(c.abs().square().sum()) * inverting.cost(fading.variance)))
    expected = torch.where(arrived.heard, c[0] + channel.noise(round.key, 200) / gamma, 0)
    torch.testing.assert_close(arrived.mean, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(arrived.active.expand(-1, 200)[0], arrived.heard)


class Rotated(Rayleigh):
    """Rayleigh fading with the phase of one device turned."""

    def _draw(self, *args: Any) -> Tensor:
        gains = super()._draw(*args)
        gains[1] *= complex(math.cos(2.0), math.sin(2.0))
        return gains


def test_a_phase_that_devices_know_does_not_matter() -> None:
    c, round = symbols(3, 100), plan(3)
    straight = inversion(fading=Rayleigh())(c, round, 10.0)
    turned = inversion(fading=Rotated())(c, round, 10.0)
    torch.testing.assert_close(straight.mean, turned.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(straight.energy, turned.energy)
    plain = FadingMAC(Rayleigh())(c, round.key).symbols
    assert not torch.allclose(
        plain, FadingMAC(Rotated())(c, round.key).symbols, atol=0.1
    )  # it would, without inversion


@pytest.mark.parametrize("threshold", [1e-6, 1e-3])
def test_without_noise_and_truncation_the_mean_arrives(threshold: float) -> None:
    c = symbols(25, 400)
    weights = torch.rand(25, generator=torch.Generator().manual_seed(1)) + 0.5
    round = plan(25, weights=weights)
    arrived = inversion(threshold, noise_var=0.0)(c, round, 500.0)
    exact = round.weights.to(c.dtype) @ c
    everybody = arrived.active.all(0)
    torch.testing.assert_close(arrived.mean[everybody], exact[everybody], rtol=1e-3, atol=1e-4)
    missing = 1 - float(everybody.double().mean())
    assert missing <= 1 - (1 - threshold) ** 25 + 5 * math.sqrt(25 * threshold / 400)


@pytest.mark.parametrize("block", [False, True])
def test_noise_falls_with_power(block: bool) -> None:
    """Its variance is ``noise_var / (gamma sum of weights)^2``, so a hundredth of the power is ten times the noise."""
    c, round = symbols(10, 3000), plan(10)
    errors = []
    for power in (5.0, 500.0):
        arrived = inversion(fading=Rayleigh(block=block))(c, round, power)
        quiet = inversion(fading=Rayleigh(block=block), noise_var=0.0)(c, round, power)
        errors.append(arrived.mean - quiet.mean)
    torch.testing.assert_close(errors[0], 10 * errors[1], rtol=1e-2, atol=1e-3)
    assert float(errors[0].abs().max()) > 0


@pytest.mark.parametrize(
    ("fading", "error_var"),
    [
        (Rayleigh(), 0.0),
        (Rayleigh(2.0), 0.3),
        (Rayleigh(0.2), 1.0),  # mostly error: the moment of the gains themselves would miss the limit by far
        (Rayleigh(path_loss=PathLoss(2.0, 30.0, 100.0)), 0.2),
        (Rician(4.0), 0.1),
        (NoFading(), 0.4),
    ],
)
@pytest.mark.parametrize("threshold", [0.1, 0.7])
def test_activity_and_average_energy_are_what_the_law_says(fading: Any, error_var: float, threshold: float) -> None:
    m, n, rounds, power = 4, 30, 200, 50.0
    inverting = inversion(threshold, fading=fading, csi_error_var=error_var)
    weights = torch.tensor([1.0, 1.0, 3.0, 2.0])
    energy, active = [], []
    for t in range(rounds):
        arrived = inverting(symbols(m, n, seed=0), plan(m, index=t, weights=weights), power)
        energy.append(arrived.energy)
        active.append(arrived.active.double().mean(1))
    spent, rate = torch.stack(energy), torch.stack(active).mean(0)
    error = spent.std(0) / math.sqrt(rounds)
    assert (spent.mean(0) <= power + 5 * error + 1e-6).all(), "energy on average is never above the limit"
    assert float((spent.mean(0) + 5 * error).max()) >= power, "and the device that needs most spends it"
    assert float(spent.max()) > power, "single rounds exceed it"
    for i, variance in enumerate(fading.mean_squares(plan(m).key).tolist()):
        expected = fading.law(variance, error_var).activity(threshold)
        assert abs(float(rate[i]) - expected) < 5 * math.sqrt(expected * (1 - expected) / (rounds * n)) + 1e-9


def test_energy_under_block_fading_holds_on_average_too() -> None:
    rounds, power = 1000, 50.0
    spent = torch.stack(
        [
            inversion(0.2, fading=Rayleigh(block=True))(symbols(2, 3, seed=0), plan(2, index=t), power).energy
            for t in range(rounds)
        ]
    )
    error = spent.std(0) / math.sqrt(rounds)
    assert (spent.mean(0) <= power + 5 * error).all()
    assert float((spent.mean(0) + 5 * error).max()) >= power
    silent = float((spent == 0).all(1).double().mean())
    p = (1 - math.exp(-0.2)) ** 2
    assert abs(silent - p) < 5 * math.sqrt(p * (1 - p) / rounds)


@pytest.mark.parametrize("error_var", [0.1, 0.5])
@pytest.mark.parametrize("path_loss", [None, PathLoss(2.0, 40.0, 100.0)])
def test_imperfect_knowledge_takes_its_share_of_the_mean(error_var: float, path_loss: PathLoss | None) -> None:
    m, n, rounds = 20, 500, 20
    fading = Rayleigh(path_loss=path_loss)
    means, debiased = [], []
    for t in range(rounds):
        for debias, to in ((False, means), (True, debiased)):
            inverting = inversion(0.3, debias, fading=fading, csi_error_var=error_var, noise_var=0.0)
            to.append(inverting(torch.ones(m, n, dtype=torch.complex64), plan(m, index=t), 1.0).mean)
    found = torch.stack([torch.cat(means), torch.cat(debiased)]).to(torch.complex128)
    error = found.std(1) / math.sqrt(found.shape[1])
    if path_loss is None:
        beta = 1 / (1 + error_var)
        assert float((found[0].mean() - beta).abs()) < 5 * float(error[0])
    assert float((found[0].mean() - 1).abs()) > 20 * float(error[0])
    # the ratio of two sums has a bias of second order, where betas differ over devices
    assert float((found[1].mean() - 1).abs()) < 5 * float(error[1]) + (0.02 if path_loss else 0.0)


def test_scales_far_from_one_neither_overflow_nor_vanish() -> None:
    c = symbols(3, 40)
    usual = inversion(noise_var=0.0)(c, plan(3), 5.0)
    for scale in (1e-25, 1e-12, 1e12, 1e25):
        arrived = inversion(noise_var=0.0)(c * scale, plan(3), 5.0)
        torch.testing.assert_close(arrived.mean / scale, usual.mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(arrived.energy, usual.energy, rtol=1e-4, atol=0)
    for nothing in (0 * c, c * 1e-44):
        arrived = inversion()(nothing, plan(3), 5.0)
        assert not arrived.heard.any()
        assert not arrived.mean.any()
        assert not arrived.energy.any()


# ---------------------------------------------------------------- CA-DSGD


def test_without_fading_it_is_the_plain_mean_plus_noise() -> None:
    """As A-DSGD without its scaling symbol: the decoder is given ``A mean(g) + z / (gamma M)``."""
    m, numel, k, power = 4, 60, 6, 30.0
    channel = FadingMAC(NoFading(), noise_var=0.1)
    build = lambda: CADSGD(
        power=power, channel=channel, threshold=0.0, bandwidth=0.5, num_entries=k, decoder=LeastSquares()
    )
    uplink, x = ready(build, numel, m), updates(m, numel)
    received = uplink(x, plan(m))
    sparse = torch.stack([torch.where(row.abs() >= row.abs().topk(k).values[-1], row, 0.0) for row in x])
    projected = uplink._matrix.mv(sparse)
    gamma = math.sqrt(power / float(projected.square().sum(1).max()))
    noise = unpack_complex(channel.noise(plan(m).key, 15), 30)
    expected = uplink._matrix.least_squares(projected.mean(0) + noise / (gamma * m))
    torch.testing.assert_close(received.rows[0], expected, rtol=1e-4, atol=1e-5)
    assert received.cost.channel_uses == 30
    assert received.cost.energy is not None
    np.testing.assert_allclose(received.cost.energy, gamma**2 * projected.double().square().sum(1), rtol=1e-5)
    assert float(received.cost.energy.max()) == pytest.approx(power, rel=1e-5)


@pytest.mark.parametrize("numel", [60, 61])
@pytest.mark.parametrize("threshold", [1e-7, 0.05])
def test_noise_to_zero_and_threshold_to_zero_recovers_the_mean_of_the_sparse_updates(
    numel: int, threshold: float
) -> None:
    m, k = 3, 3
    x = updates(1, numel) + 0.1 * updates(m, numel, seed=1)
    build = lambda: CADSGD(
        channel=FadingMAC(noise_var=0.0),
        threshold=threshold,
        bandwidth=1.0,
        num_entries=k,
        decoder=AMP(num_iterations=200),
    )
    uplink = ready(build, numel, m)
    received = uplink(x, plan(m))
    sparse = torch.stack([torch.where(row.abs() >= row.abs().topk(k).values[-1], row, 0.0) for row in x])
    error = float((received.rows[0] - sparse.mean(0)).norm() / sparse.mean(0).norm())
    assert error < (0.02 if threshold < 1e-3 else 0.4)
    assert float(received.metrics["uplink/nmse"]) == pytest.approx(error**2, rel=1e-3, abs=1e-7)
    assert received.cost.channel_uses == 2 * math.ceil(numel / 2)  # an odd number is padded
    held = uplink.memory.residual("update")[:m]
    torch.testing.assert_close(held + sparse, x)


def test_what_nobody_sent_is_left_out_of_the_decoding() -> None:
    """Two devices and a high threshold: the rest decodes to the right scale, and zeros would not."""
    numel, x = 200, torch.zeros(2, 200)
    x[:, [3, 77, 150]] = torch.tensor([1.0, -2.0, 0.5])  # the same from both, so that truncation takes nothing
    for seed in range(3):
        uplink = ready(
            lambda: CADSGD(
                channel=FadingMAC(noise_var=0.0),
                threshold=1.0,
                bandwidth=0.8,
                num_entries=3,
                decoder=AMP(num_iterations=200),
            ),
            numel,
            2,
            seed,
        )
        received = uplink(x, plan(2, seed=seed))
        erased = float(received.metrics["uplink/erased"])
        assert abs(erased - (1 - math.exp(-1)) ** 2) < 5 * math.sqrt(0.24 / 80)
        torch.testing.assert_close(received.rows[0], x[0], rtol=0, atol=0.03)
    half = unpack_complex(pack_complex(uplink._matrix.mv(x[0])) * (torch.arange(80) % 5 < 3), 160)
    with_zeros = AMP(num_iterations=200)(half, uplink._matrix).x
    assert float((with_zeros - x[0]).norm() / x[0].norm()) > 0.2


def test_a_silent_device_remembers_all_and_a_silent_round_gives_no_update() -> None:
    fading = Rayleigh(block=True)
    build = lambda: CADSGD(channel=FadingMAC(fading), threshold=0.7, num_entries=5)
    uplink, total, seen = ready(build, 80, 3), torch.zeros(3, 80), set()
    for t in range(12):
        x = updates(3, 80, seed=t)
        before = total.clone()
        received = uplink(x, plan(3, index=t))
        active = (fading.gains(plan(3, index=t).key, 1).abs().square() >= 0.7).flatten()
        sent = before + x - uplink.memory.residual("update")[:3]
        for m in range(3):
            assert int((sent[m].abs() > 1e-6).sum()) == (5 if active[m] else 0)
        total = uplink.memory.residual("update")[:3].clone()
        seen.add(int(active.sum()))
        if not active.any():
            assert not received.rows.any()
            assert float(received.metrics["uplink/erased"]) == 1.0
            assert float(received.cost.energy.sum()) == 0.0
    assert {0, 1, 2} <= seen


def test_devices_count_by_their_weights() -> None:
    x = torch.zeros(2, 80)
    x[0, 5] = x[1, 50] = 1.0
    uplink = ready(
        lambda: CADSGD(
            channel=FadingMAC(NoFading(), noise_var=0.0), threshold=0.0, num_entries=4, decoder=AMP(num_iterations=300)
        ),
        80,
        2,
    )
    received = uplink(x, plan(2, weights=torch.tensor([9.0, 1.0])))
    assert float(received.rows[0, 5]) == pytest.approx(0.9, rel=0.02)
    assert float(received.rows[0, 50]) == pytest.approx(0.1, abs=0.02)


def test_all_methods_at_equal_seed_meet_the_same_channel() -> None:
    x, m = updates(3, 80), 3
    first = ready(lambda: CADSGD(bandwidth=0.5, threshold=0.5), 80, m)(x, plan(m))
    second = ready(lambda: ESADSGD(bandwidth=0.5, threshold=0.5), 80, m)(x, plan(m))
    assert float(first.metrics["uplink/activity"]) == float(second.metrics["uplink/activity"])
    other = ready(lambda: ESADSGD(bandwidth=0.5, threshold=0.5), 80, m)(x, plan(m, index=1))
    assert float(first.metrics["uplink/activity"]) != float(other.metrics["uplink/activity"])


# ---------------------------------------------------------------- ESA-DSGD


def test_entries_take_turns() -> None:
    numel, s, m = 11, 4, 3
    uplink = ready(
        lambda: ESADSGD(channel=FadingMAC(NoFading(), noise_var=0.0), threshold=0.0, channel_uses=s), numel, m
    )
    for t in range(12):
        x = updates(m, numel, seed=t)
        window = [(t * s + i) % numel for i in range(s)]
        expected = torch.zeros(numel)
        expected[window] = x[:, window].mean(0)
        received = uplink(x, plan(m, index=t))
        torch.testing.assert_close(received.rows[0], expected, rtol=1e-4, atol=1e-6)
        assert received.cost.channel_uses == s


@pytest.mark.parametrize("uses", [3, 4, 10, 11])
def test_sent_plus_held_is_the_sum_of_updates_with_error_feedback(uses: int) -> None:
    """One device and no noise: what was not sent, by its turn or by its channel, is all in the memory."""
    numel = 11
    uplink = ready(
        lambda: ESADSGD(channel=FadingMAC(noise_var=0.0), threshold=0.7, channel_uses=uses, error_feedback=True),
        numel,
        1,
    )
    total, sent = torch.zeros(numel), torch.zeros(numel)
    for t in range(15):
        x = updates(1, numel, seed=t)
        received = uplink(x, plan(1, index=t))
        total, sent = total + x[0], sent + received.rows[0]
        torch.testing.assert_close(sent + uplink.memory.residual("update")[0], total, rtol=1e-3, atol=1e-5)
    assert 0 < int((uplink.memory.residual("update")[0] == 0).sum()) < numel


def test_with_error_feedback_each_device_remembers_what_it_did_not_send() -> None:
    fading, m, numel = Rayleigh(), 4, 10
    uplink = ready(lambda: ESADSGD(threshold=0.7, channel_uses=6, error_feedback=True), numel, m)
    x = updates(m, numel)
    uplink(x, plan(m))
    active = fading.gains(plan(m).key, 3).abs().square() >= 0.7
    held = uplink.memory.residual("update")
    for i in range(m):
        for entry in range(numel):
            was_sent = entry < 6 and bool(active[i, entry % 3])
            assert held[i, entry] == (0 if was_sent else x[i, entry])


# ---------------------------------------------------------------- building and bad input


def test_built_from_yaml_and_says_its_settings() -> None:
    parser = ArgumentParser()
    parser.add_argument("--uplink", type=Uplink)
    config = """
    uplink:
      class_path: groundwire.plugins.edge.CADSGD
      init_args:
        power: {class_path: groundwire.plugins.channels.StepPower, init_args: {levels: [100, 200, 300]}}
        channel:
          class_path: groundwire.plugins.channels.FadingMAC
          init_args:
            fading: {class_path: groundwire.plugins.channels.Rayleigh, init_args: {block: true}}
            csi_error_var: 0.1
        threshold: 0.25
        bandwidth: 0.3
        csi_debias: true
    """
    uplink = parser.instantiate(parser.parse_string(config)).uplink
    assert isinstance(uplink, CADSGD)
    assert uplink.channel.fading.block
    for words in ("threshold=0.25, debias=True", "csi_error_var=0.1", "bandwidth=0.3", "levels=(100.0, 200.0, 300.0)"):
        assert words in repr(uplink)
    assert repr(ESADSGD(error_feedback=True)) != repr(ESADSGD())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: CADSGD(threshold=0.0),
            "`threshold` must be > 0 under Rayleigh fading with csi_error_var=0.0: .*infinite average",
        ),
        (lambda: CADSGD(threshold=0.0, channel=FadingMAC(Rician(9.0))), "infinite average power"),
        (lambda: CADSGD(threshold=0.0, channel=FadingMAC(NoFading(), csi_error_var=0.1)), "infinite average power"),
        (lambda: CADSGD(threshold=-0.1), r"`threshold`, on \|h\|\^2, must be finite and >= 0, got -0.1"),
        (lambda: ESADSGD(threshold=math.nan), "must be finite and >= 0, got nan"),
        (lambda: ESADSGD(threshold=1e4), "`threshold`=10000.0 is so far above .* no device ever sends"),
        (lambda: CADSGD(threshold=1.5, channel=FadingMAC(NoFading())), "no device ever sends"),
        (lambda: CADSGD(channel=FadingMAC(csi_error_var=None)), "CADSGD needs channel state information"),
        (lambda: ESADSGD(channel=FadingMAC(csi_error_var=None)), "ESADSGD needs channel state information"),
        (lambda: CADSGD(channel=FadingMAC(Rician(1.0)), csi_debias=True), "under Rayleigh fading only, got Rician"),
        (lambda: CADSGD(power=0.0), "power_per_round must be > 0"),
        (lambda: CADSGD(channel=FadingMAC(noise_var=-1.0)), "must be finite and >= 0"),
        (lambda: CADSGD(sparsity=1.0), r"`sparsity` .* must be in \(0, 1\), got 1.0"),
        (lambda: CADSGD(sparsity=0.5, num_entries=3), "Give either `sparsity`"),
        (lambda: CADSGD(bandwidth=0.5, channel_uses=10), "Give either `bandwidth`"),
        (lambda: CADSGD(channel_uses=1), "needs 2 <= s <= 100"),
        (lambda: CADSGD(channel_uses=50, num_entries=50), "keeps k=50 entries for s=50"),
        (lambda: CADSGD(channel_uses=3, sparsity=0.1), "keeps k=0 entries for s=3"),
        (lambda: ESADSGD(channel_uses=101), "needs 1 <= s <= 100"),
    ],
)
def test_bad_input_by_message(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ready(build, 100, 3)


def test_average_power_limit_is_enforced() -> None:
    for build in (lambda: CADSGD(power=300.0, average_power=200.0), lambda: ESADSGD(power=300.0, average_power=200.0)):
        with pytest.raises(ValueError, match=r"averages 300\.0 over 20 rounds, above the limit 200\.0"):
            ready(build, 100, 2)(updates(2, 100), plan(2))


def test_what_is_logged() -> None:
    logged = {"uplink/activity", "uplink/erased"}
    assert set(ready(ESADSGD, 100, 2)(updates(2, 100), plan(2)).metrics) == logged
    more = {"uplink/nmse", "uplink/decoder_iterations", "uplink/decoder_diverged"}
    assert set(ready(CADSGD, 100, 2)(updates(2, 100), plan(2)).metrics) == logged | more
