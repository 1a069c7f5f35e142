"""Privacy of whole devices: sums and noise against formulas written out here, epsilon against another accountant."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from groundwire.plugins.channels import GaussianMAC
from groundwire.plugins.compression import (
    QSGD,
    RQM,
    DistributedDiscreteGaussian,
    ErrorFeedback,
    Identity,
    PrivateSketch,
    RandK,
    SignSGD,
    TopK,
)
from groundwire.plugins.edge import (
    ADSGD,
    CapacityLimited,
    Digital,
    DPFedAvg,
    DPOverTheAir,
    ErrorFree,
    Received,
    Round,
    Uplink,
)
from groundwire.plugins.layout import ParameterLayout
from groundwire.plugins.privacy import UnreachableBudgetError
from helpers.privacy import gaussian_epsilon
from helpers.uplinks import check_uplink, plan, ready, updates

UPLINKS: dict[str, tuple[Any, dict[str, bool]]] = {
    "server": (lambda: DPFedAvg(1.0, noise_multiplier=0.1), {"noisy": True}),
    "devices": (lambda: DPFedAvg(1.0, noise_multiplier=0.1, noise="devices"), {"noisy": True}),
    "no_noise": (lambda: DPFedAvg(0.05, noise_multiplier=0.0), {}),
    "compressed": (
        lambda: DPFedAvg(1.0, noise_multiplier=0.1, uplink=Digital(ErrorFeedback(TopK(density=0.1)))),
        {"noisy": True, "stateful": True},
    ),
    "linear": (
        lambda: DPFedAvg(1.0, noise_multiplier=0.1, noise="devices", uplink=Digital(RandK(density=0.5))),
        {"noisy": True},
    ),
    "budget": (lambda: DPFedAvg(1.0, target_epsilon=50.0, target_delta=1e-3), {"noisy": True}),
    "over_the_air": (lambda: DPOverTheAir(1.0, noise_multiplier=0.1), {"noisy": True}),
    "over_the_air_lower_power": (
        lambda: DPOverTheAir(1.0, noise_multiplier=0.5, power=1e4, channel=GaussianMAC(0.5)),
        {"noisy": True},
    ),
    "rqm": (lambda: Digital(RQM(clip=1.0)), {"noisy": True, "equivariant": True}),
    "sketch": (lambda: Digital(PrivateSketch(clip_norm=1.0, noise_multiplier=0.1, density=0.5)), {"noisy": True}),
    "discrete_gaussian": (
        lambda: Digital(DistributedDiscreteGaussian(clip_norm=1.0, noise_multiplier=0.5, granularity=1e-3, bits=20)),
        {"noisy": True},
    ),
}


@pytest.mark.parametrize("name", UPLINKS)
def test_shared_checks(name: str) -> None:
    build, options = UPLINKS[name]
    check_uplink(build, **options)


# ---------------------------------------------------------------- the sum


def clipped(rows: Tensor, bound: float) -> Tensor:
    """Row by row, in float64, as McMahan et al. write it."""
    return torch.stack([row / max(1.0, float(row.norm()) / bound) for row in rows.double()])


@pytest.mark.parametrize("noise", ["server", "devices"])
@pytest.mark.parametrize(("rate", "population"), [(1.0, 5), (0.25, 40)])
def test_without_noise_it_is_the_sum_of_clipped_updates_over_the_expected_participants(
    noise: Any, rate: float, population: int
) -> None:
    x = updates(5, 300) * torch.tensor([[0.01], [1.0], [3.0], [100.0], [0.0]])
    uplink = ready(lambda: DPFedAvg(1.5, noise_multiplier=0.0, noise=noise), 300, population)
    weights = torch.tensor([1.0, 50.0, 2.0, 7.0, 1.0])  # a device with many samples counts like any other
    received = uplink(x, plan((3, 0, 4, 1, 2), weights=weights, sample_rate=rate))
    expected = clipped(x, 1.5).sum(0) / (rate * population)
    torch.testing.assert_close(received.rows, expected.float().unsqueeze(0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(received.weights, torch.ones(1))
    assert received.cost.bits == 32 * 300 * 5
    assert 0 < int((x.norm(dim=1) > 1.5).sum()) < 5


def test_updates_are_clipped_after_the_compressor_that_makes_them_longer() -> None:
    """RandK multiplies what it keeps by d / k."""
    x = updates(1, 400) / updates(1, 400).norm()
    build = lambda: DPFedAvg(1.0, noise_multiplier=0.0, uplink=Digital(RandK(density=0.1)))
    arrived = Digital(RandK(density=0.1))(x, plan(1)).rows
    assert float(arrived.norm()) > 1.5
    torch.testing.assert_close(ready(build, 400, 1)(x, plan(1)).rows, arrived / arrived.norm())


BOUNDED = {
    "error_free": lambda: DPFedAvg(0.7, noise_multiplier=0.0),
    "devices": lambda: DPFedAvg(0.7, noise_multiplier=0.0, noise="devices"),
    "qsgd": lambda: DPFedAvg(0.7, noise_multiplier=0.0, uplink=Digital(QSGD(num_levels=4))),
    "randk": lambda: DPFedAvg(0.7, noise_multiplier=0.0, uplink=Digital(RandK(density=0.3))),
    "ef_topk": lambda: DPFedAvg(0.7, noise_multiplier=0.0, uplink=Digital(ErrorFeedback(TopK(density=0.2)))),
    "over_the_air": lambda: DPOverTheAir(0.7, noise_multiplier=0.0, power=1.0, channel=GaussianMAC(1e-30)),
}


@pytest.mark.parametrize("name", BOUNDED)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), tail=st.integers(1, 9), log_scale=st.floats(-12, 12), leaves=st.integers(0, 5))
def test_a_device_changes_the_sum_by_no_more_than_the_bound(
    name: str, seed: int, tail: int, log_scale: float, leaves: int
) -> None:
    """With and without one of six devices, in two successive rounds: the second one has error memories."""
    g = torch.Generator().manual_seed(seed)
    whole, without = (ready(BOUNDED[name], 60, 6) for _ in range(2))
    stay = [m for m in range(6) if m != leaves]
    for t in range(2):
        x = 10**log_scale * torch.randn(6, 60, generator=g, dtype=torch.float64) ** tail
        round = {"index": t, "sample_rate": 0.5}  # so that the sum is 3 times the estimate
        total = 3 * whole(x, plan(6, **round)).rows
        rest = 3 * without(x[stay], plan(tuple(stay), **round)).rows
        assert float((total - rest).norm()) <= 0.7 * (1 + 1e-9)


@pytest.mark.parametrize("largest", [1e30, 3e38])
@pytest.mark.parametrize("bound", [1e-3, 1.0])
def test_enormous_float32_updates_do_not_exceed_the_bound(largest: float, bound: float) -> None:
    """Their scale is subnormal, so that multiplying with it would be off by some 0.1 %."""
    g = torch.Generator().manual_seed(0)
    x = (torch.rand(8, 1000, generator=g) - 0.5) * largest
    uplink = ready(lambda: DPFedAvg(bound, noise_multiplier=0.0), 1000, 1)
    for m in range(8):
        row = uplink(x[m : m + 1], plan((0,))).rows.double()
        assert float(row.norm()) <= bound * (1 + 1e-5)
        cosine = (row @ x[m].double()) / (row.norm() * x[m].double().norm())
        assert float(row.norm()) == 0 or float(cosine) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("noise", ["server", "devices", "air"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_counts_as_zeros(noise: Any, bad: float) -> None:
    build = (
        (lambda: DPOverTheAir(1.0, noise_multiplier=0.1))
        if noise == "air"
        else (lambda: DPFedAvg(1.0, noise_multiplier=0.1, noise=noise))
    )
    x = updates(4, 50)
    zeroed = x.clone()
    zeroed[2] = 0
    x[2, 17] = bad
    broken, clean = (ready(build, 50, 4)(rows, plan(4)).rows for rows in (x, zeroed))
    assert torch.isfinite(broken).all()
    assert torch.equal(broken, clean)


# ---------------------------------------------------------------- the noise

N = 200_000
BAND = 5 / math.sqrt(2 * N)  # five standard errors of a measured standard deviation: 0.8 %


class Spy(ErrorFree):
    """Keeps what it delivered."""

    def forward(self, updates: Tensor, round: Round) -> Received:
        self.rows = updates.clone()
        return super().forward(updates, round)


@pytest.mark.parametrize("noise", ["server", "devices"])
@pytest.mark.parametrize("participants", [1, 2, 7])
def test_noise_of_the_sum_is_the_same_for_any_number_of_participants(noise: Any, participants: int) -> None:
    sigma, bound, rate, population = 1.3, 0.4, 0.2, 300
    uplink = ready(lambda: DPFedAvg(bound, noise_multiplier=sigma, noise=noise), N, population)
    estimate = uplink(torch.zeros(participants, N), plan(participants, sample_rate=rate)).rows[0].double()
    expected = sigma * bound / (rate * population)
    assert float(estimate.std()) == pytest.approx(expected, rel=BAND)
    assert abs(float(estimate.mean())) < 5 * expected / math.sqrt(N)
    if participants > 1:  # not what a usual mistake gives
        assert float(estimate.std()) != pytest.approx(expected * math.sqrt(participants), rel=BAND)


def test_devices_add_equal_shares_that_are_independent() -> None:
    uplink = ready(lambda: DPFedAvg(0.5, noise_multiplier=2.0, noise="devices", uplink=Spy()), N, 200)
    x = torch.zeros(4, N)
    uplink(x, plan((3, 8, 9, 15), sample_rate=0.2))
    sent: Tensor = uplink.uplink.rows.double()
    covariance = sent @ sent.T / N
    share = (2.0 * 0.5) ** 2 / 4
    assert (covariance.diag() / share - 1).abs().max() < 2 * BAND
    assert (covariance - covariance.diag().diag()).abs().max() < 5 * share / math.sqrt(N)
    assert not x.any()


@pytest.mark.parametrize("noise", ["server", "devices"])
def test_noise_is_fresh_in_every_round_and_for_every_seed(noise: Any) -> None:
    uplink = ready(lambda: DPFedAvg(1.0, noise_multiplier=1.0, noise=noise), 20_000, 2)
    plans = [plan(2, index=0), plan(2, index=1), plan(2, index=0, seed=1)]
    drawn = torch.stack([uplink(torch.zeros(2, 20_000), p).rows[0] for p in plans])
    correlation = torch.corrcoef(drawn) - torch.eye(3)
    assert correlation.abs().max() < 5 / math.sqrt(20_000)


def test_noise_of_the_server_is_added_to_the_sum_and_hides_nothing_of_the_updates_rest() -> None:
    x = updates(3, 100)
    quiet, noisy, silent = (
        ready(lambda s=s: DPFedAvg(1.0, noise_multiplier=s), 100, 3)(rows, plan(3)).rows
        for s, rows in ((0.0, x), (0.5, x), (0.5, torch.zeros_like(x)))
    )
    torch.testing.assert_close(noisy, quiet + silent)


def test_an_empty_round_sends_nothing_and_has_the_servers_noise() -> None:
    """Not even the error memory of the device that stands in for the others in the computation."""
    memory = lambda: Digital(ErrorFeedback(TopK(density=0.01)))
    uplink = ready(lambda: DPFedAvg(1.0, noise_multiplier=0.0, uplink=memory()), 200, 5)
    uplink(updates(5, 200), plan(5, sample_rate=0.3))
    before = uplink.uplink.compressor.memory.residual("update").clone()
    empty = plan((0,), index=1, sample_rate=0.3, is_empty=True)
    received = uplink(torch.zeros(1, 200), empty)
    assert not received.rows.any()
    assert received.cost.bits == 0
    assert before.any()
    assert torch.equal(uplink.uplink.compressor.memory.residual("update"), before)
    noisy = ready(lambda: DPFedAvg(0.5, noise_multiplier=2.0), N, 10)(
        torch.zeros(1, N), plan((0,), sample_rate=0.1, is_empty=True)
    )
    assert float(noisy.rows.double().std()) == pytest.approx(1.0, rel=BAND)
    shared = lambda: DPFedAvg(1.0, noise_multiplier=1.0, noise="devices")
    with pytest.raises(MisconfigurationException, match=r"No device takes part in round 1.*use noise='server'"):
        ready(shared, 200, 200)(torch.zeros(1, 200), empty)


@pytest.mark.parametrize(("population", "allowed"), [(5, False), (60, False), (70, True)])
def test_rounds_without_the_devices_noise_have_to_be_negligible_beside_delta(population: int, allowed: bool) -> None:
    """20 rounds x 0.2 x 0.8^(M - 1) against a hundredth of 1e-4: the bound lies between M = 69 and 70."""
    build = lambda: DPFedAvg(1.0, noise_multiplier=1.0, noise="devices", target_delta=1e-4)
    uplink = ready(build, 8, population)
    if allowed:
        uplink(torch.zeros(2, 8), plan(2, sample_rate=0.2))
        return
    with pytest.raises(MisconfigurationException, match=r"nobody takes part and adds noise has chance.*noise='server'"):
        uplink(torch.zeros(2, 8), plan(2, sample_rate=0.2))


# ---------------------------------------------------------------- accounting


def spent(build: Any, rounds: int, rate: float = 1.0, devices: int = 50) -> float:
    """Epsilon that an uplink claims after it has seen how devices take part."""
    uplink = ready(build, 4, devices)
    uplink(torch.zeros(2, 4), plan(2, sample_rate=rate, num_rounds=rounds))
    statement = uplink.privacy(rounds=rounds)
    assert (statement.unit, statement.adjacency) == ("all data of one device", "add-remove")
    return float(statement.epsilon)


@pytest.mark.parametrize("kind", ["server", "devices", "air"])
@pytest.mark.parametrize(
    ("sigma", "rounds", "delta"), [(1.0, 1, 1e-5), (2.0, 10, 1e-3), (5.0, 100, 1e-6), (30.0, 200, 1e-5)]
)
def test_all_devices_in_all_rounds_are_one_gaussian(kind: str, sigma: float, rounds: int, delta: float) -> None:
    if kind == "air":
        build = lambda: DPOverTheAir(0.3, noise_multiplier=sigma, target_delta=delta)
    else:
        build = lambda: DPFedAvg(0.3, noise_multiplier=sigma, target_delta=delta, noise=kind)
    assert spent(build, rounds) == pytest.approx(gaussian_epsilon(sigma, rounds, delta), rel=1e-4)


# (noise multiplier, sample rate, rounds, delta): epsilon of dp-accounting 0.6.0's PLDAccountant for a
# SelfComposedDpEvent of PoissonSampledDpEvent(rate, GaussianDpEvent(noise multiplier)), with
# value_discretization_interval 1e-5 (1e-4 from 200 rounds on)
GOLDEN = [
    ((1.0, 0.05, 40, 1e-4), 1.9433),
    ((1.2, 0.1, 60, 1e-3), 2.5938),
    ((2.0, 0.2, 100, 1e-4), 4.3201),
    ((0.8, 0.1, 60, 1e-4), 7.2874),
    ((1.5, 0.5, 30, 1e-5), 10.4895),
    ((0.7, 0.01, 1000, 1e-5), 4.6183),
    ((2.0, 0.3, 200, 1e-6), 13.0909),
]


@pytest.mark.parametrize(("run", "exact"), GOLDEN)
@pytest.mark.parametrize("uplink", [DPFedAvg, DPOverTheAir])
def test_devices_that_toss_coins_are_accounted_for_as_by_another_library(
    uplink: Any, run: tuple[float, float, int, float], exact: float
) -> None:
    sigma, rate, rounds, delta = run
    claimed = spent(lambda: uplink(1.0, noise_multiplier=sigma, target_delta=delta), rounds, rate)
    assert 0.995 * exact <= claimed <= 1.01 * exact
    looser = spent(lambda: uplink(1.0, noise_multiplier=sigma, target_delta=delta, accountant="rdp"), rounds, rate)
    assert claimed < looser < 1.3 * exact


@pytest.mark.parametrize(("run", "exact"), [*GOLDEN[1:3], ((3.0, 1.0, 20, 1e-5), gaussian_epsilon(3.0, 20, 1e-5))])
def test_a_budget_becomes_the_noise_that_spends_it(run: tuple[float, float, int, float], exact: float) -> None:
    """The measured noise is the one for which another accountant's epsilon is the budget."""
    sigma, rate, rounds, delta = run
    uplink = ready(lambda: DPFedAvg(0.5, target_epsilon=exact, target_delta=delta), N, 10)
    estimate = uplink(torch.zeros(1, N), plan((0,), sample_rate=rate, num_rounds=rounds)).rows[0].double()
    assert float(estimate.std()) * rate * 10 / 0.5 == pytest.approx(sigma, rel=0.005 + BAND)
    claimed = uplink.privacy(rounds=rounds).epsilon
    assert 0.95 * exact <= claimed <= exact


def test_a_budget_ends_by_rounds_and_a_new_run_has_its_own() -> None:
    assert gaussian_epsilon(2.0, 3, 1e-3) < 3.0 < gaussian_epsilon(2.0, 4, 1e-3)
    uplink = ready(lambda: DPFedAvg(1.0, target_epsilon=3.0, noise_multiplier=2.0, target_delta=1e-3), 10, 4)
    for _ in range(2):
        for t in range(3):
            uplink(updates(4, 10), plan(4, index=t))
            assert uplink.is_spent(20) == (t == 2)
        with pytest.raises(
            MisconfigurationException, match=r"pays for 3 rounds at noise multiplier 2 .* makes it 3.1\d+"
        ):
            uplink(updates(4, 10), plan(4, index=3))
        uplink.setup(layout=ParameterLayout.of_vector(10), num_devices=4, seed=0)


def test_delta_is_below_one_over_the_devices_by_default_and_warned_of_where_it_is_not() -> None:
    uplink = ready(lambda: DPFedAvg(1.0, noise_multiplier=1.0), 4, 1000)
    uplink(torch.zeros(1, 4), plan(1))
    assert uplink.privacy(rounds=1).delta == pytest.approx(0.5 * 1000**-1.1)
    for build in (DPFedAvg, DPOverTheAir):
        with pytest.warns(
            UserWarning, match=r"`target_delta` is 0.01, not below one over the number of devices \(0.01\)"
        ):
            ready(lambda build=build: build(1.0, noise_multiplier=1.0, target_delta=0.01), 4, 100)


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_small_delta_is_not_warned_of() -> None:
    ready(lambda: DPFedAvg(1.0, noise_multiplier=1.0, target_delta=0.0099), 4, 100)
    ready(lambda: DPFedAvg(1.0, noise_multiplier=1.0), 4, 1)


def test_the_statement_says_whom_to_trust() -> None:
    texts = {}
    for noise in ("server", "devices"):
        uplink = ready(lambda noise=noise: DPFedAvg(1.0, noise_multiplier=4.0, noise=noise, target_delta=1e-3), 4, 40)
        uplink(torch.zeros(2, 4), plan(2, sample_rate=0.75))
        texts[noise] = str(uplink.privacy(rounds=3))
    assert "server is trusted" in texts["server"]
    assert "Secure aggregation" in texts["devices"]
    unamplified = float(texts["devices"].split("sees who takes part, epsilon is ")[1].split()[0].rstrip("."))
    assert unamplified == pytest.approx(gaussian_epsilon(4.0, 3, 1e-3), rel=1e-3)
    assert all("Poisson-subsampled Gaussian" in text and "coins that stay secret" in text for text in texts.values())


@pytest.mark.parametrize("build", [UPLINKS["rqm"][0], UPLINKS["sketch"][0], UPLINKS["discrete_gaussian"][0]])
def test_private_compressors_speak_for_their_uplink(build: Any) -> None:
    uplink = ready(build, 16, 4)
    uplink(updates(4, 16), plan(4, sample_rate=0.5))
    assert uplink.promises_privacy
    expected = uplink.compressor.privacy(numel=16, rounds=3, sample_rate=0.5)
    assert uplink.privacy(rounds=3) == expected
    assert uplink.privacy(rounds=4).epsilon > expected.epsilon > 0
    memory = Digital(ErrorFeedback(uplink.compressor))
    assert not memory.promises_privacy
    assert memory.privacy(rounds=3) is None


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("build", [DPFedAvg, DPOverTheAir])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_epsilon": 0.0}, "`target_epsilon` must be a positive number, got 0.0"),
        ({"target_epsilon": -1.0}, "`target_epsilon` must be a positive number, got -1.0"),
        ({"target_epsilon": math.inf}, "`target_epsilon` must be a positive number, got inf"),
        ({}, "Give `target_epsilon` .* or `noise_multiplier`, or both; got neither"),
        ({"noise_multiplier": -0.1}, "`noise_multiplier` must be at least 0 and finite, got -0.1"),
        ({"noise_multiplier": math.nan}, "`noise_multiplier` must be at least 0 and finite, got nan"),
        ({"noise_multiplier": 0.0, "target_epsilon": 3.0}, "Without noise no `target_epsilon` can be kept"),
        ({"noise_multiplier": 1.0, "target_delta": 0.0}, r"must be in \(0, 1\), got 0.0"),
        ({"noise_multiplier": 1.0, "target_delta": 1.0}, r"must be in \(0, 1\), got 1.0"),
        ({"noise_multiplier": 1.0, "clip_norm": 0.0}, "`clip_norm` must be a positive number, got 0.0"),
        ({"noise_multiplier": 1.0, "clip_norm": math.inf}, "`clip_norm` must be a positive number, got inf"),
        ({"noise_multiplier": 1.0, "accountant": "moments"}, "must be one of prv, rdp, gdp, got 'moments'"),
    ],
)
def test_bad_arguments_by_message(build: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**({"clip_norm": 1.0} | arguments))


@pytest.mark.parametrize("build", [DPFedAvg, DPOverTheAir])
def test_rounds_that_cannot_be_accounted_for_by_message(build: Any) -> None:
    x = updates(3, 20)
    known = lambda **settings: ready(lambda: build(1.0, **settings), 20, 3)
    with pytest.raises(MisconfigurationException, match=r"coins of their own. Use scheduler=PoissonSample\(rate\)"):
        known(noise_multiplier=1.0)(x, plan(3, sample_rate=None))
    with pytest.raises(
        MisconfigurationException, match="set the Trainer's max_steps or max_epochs, or give `noise_mult"
    ):
        known(target_epsilon=1.0)(x, plan(3, num_rounds=None))
    with pytest.raises(
        UnreachableBudgetError, match=r"`target_epsilon` 0.0001 cannot be reached: with noise multiplier"
    ):
        known(target_epsilon=1e-4, target_delta=1e-6)(x, plan(3))
    with pytest.raises(ValueError, match=r"`sample_rate` is a probability in \(0, 1\], got 1.5"):
        known(target_epsilon=1.0)(x, plan(3, sample_rate=1.5))
    changing = known(noise_multiplier=1.0)
    changing(x, plan(3, sample_rate=0.5))
    with pytest.raises(MisconfigurationException, match=r"sample rate was 0.5 and is now 0.4"):
        changing(x, plan(3, index=1, sample_rate=0.4))


def test_uplinks_whose_rows_are_not_the_devices_own_are_refused() -> None:
    for inner in (ADSGD(), DPOverTheAir(1.0, noise_multiplier=1.0)):
        uplink = ready(lambda inner=inner: DPFedAvg(1.0, noise_multiplier=1.0, uplink=inner), 100, 3)
        with pytest.raises(
            MisconfigurationException, match=r"delivers 1 rows of 3 devices.*over the air, DPOverTheAir"
        ):
            uplink(updates(3, 100), plan(3))
    with pytest.raises(MisconfigurationException, match="CapacityLimited divides its capacity among the participants"):
        DPFedAvg(1.0, noise_multiplier=1.0, uplink=CapacityLimited(SignSGD()))


@pytest.mark.parametrize(
    "inner", [Digital(SignSGD()), Digital(ErrorFeedback(RandK(density=0.5))), Digital(QSGD(num_levels=4)), ADSGD()]
)
def test_noise_of_the_devices_is_refused_where_what_arrives_is_no_function_of_the_sum(inner: Uplink) -> None:
    with pytest.raises(MisconfigurationException, match=r"noise='devices', only the sum .* is protected"):
        DPFedAvg(1.0, noise_multiplier=1.0, noise="devices", uplink=inner)


@pytest.mark.parametrize("inner", [Identity, lambda: RandK(density=0.25)])
def test_over_a_linear_compressor_the_sum_is_that_of_the_noisy_sum(inner: Any) -> None:
    x = updates(3, 64)
    build = lambda **options: ready(lambda: DPFedAvg(1.0, noise_multiplier=0.7, noise="devices", **options), 64, 3)
    total = build()(x, plan(3)).rows
    torch.testing.assert_close(build(uplink=Digital(inner()))(x, plan(3)).rows, Digital(inner())(total, plan(1)).rows)


def test_who_adds_the_noise_is_one_of_two() -> None:
    with pytest.raises(ValueError, match="`noise` must be 'server' or 'devices', got 'nobody'"):
        DPFedAvg(1.0, noise_multiplier=1.0, noise="nobody")  # type: ignore[arg-type]


def test_built_from_yaml() -> None:
    parser = ArgumentParser()
    parser.add_argument("--uplink", type=Uplink)
    config = """
    uplink:
      class_path: groundwire.plugins.edge.DPFedAvg
      init_args:
        clip_norm: 0.3
        target_epsilon: 8
        noise: devices
        uplink: {class_path: groundwire.plugins.edge.ErrorFree}
        accountant: rdp
    """
    uplink = parser.instantiate(parser.parse_string(config)).uplink
    assert isinstance(uplink, DPFedAvg)
    assert (uplink.noise, uplink.device_privacy.clip_norm, uplink.device_privacy.target_epsilon) == ("devices", 0.3, 8)
