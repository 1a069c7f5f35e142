"""Downlinks: LFL and its baselines, noisy ones, and device selection."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor

from groundwire.plugins.channels import NoFading, PathLoss, Rayleigh
from groundwire.plugins.channels.broadcast import FadingBroadcast
from groundwire.plugins.compression import ErrorFeedback, TopK
from groundwire.plugins.compression.lfl_quantizer import LFLQuantizer
from groundwire.plugins.edge import (
    Digital,
    Downlink,
    EdgeStrategy,
    LocalSGD,
    PoissonSample,
    Received,
    Round,
    Scheduler,
    UniformSample,
    WeightedMean,
)
from groundwire.plugins.edge.downlinks import LFL, LGM, LTGM, AnalogDownlink, DigitalDownlink, DownlinkSelection
from groundwire.plugins.edge.downlinks.estimates import send_within
from groundwire.plugins.random import Key
from helpers.channels import build_from_yaml
from helpers.edge import Classifier, check_strategy_part, fit, mlp, weights
from helpers.uplinks import plan

Build = Callable[[], Downlink]
D = 61
BLOCK = Rayleigh(block=True)


def model(seed: int = 0, numel: int = D) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def ready(downlink: Any, devices: int = 5, numel: int = D) -> Any:
    downlink.setup(numel=numel, num_devices=devices)
    return downlink


def off(held: Tensor, sent: Tensor) -> float:
    return float(torch.linalg.vector_norm(held - sent) / torch.linalg.vector_norm(sent))


PARTS: dict[str, Build] = {
    "lfl": lambda: LFL(LFLQuantizer(4)),
    "lfl_model": lambda: LFL(LFLQuantizer(4), server_base="model"),
    "lfl_topk": lambda: LFL(TopK(density=0.5)),
    "lgm": lambda: LGM(LFLQuantizer(15)),
    "ltgm": lambda: LTGM(LFLQuantizer(15)),
    "digital": lambda: DigitalDownlink(power=500.0),
    "digital_maxmin": lambda: DigitalDownlink(power=500.0, allocation="maxmin"),
    "analog": lambda: AnalogDownlink(power=5000.0),
    "analog_delta": lambda: AnalogDownlink(power=5000.0, payload="delta"),
    "analog_floor": lambda: AnalogDownlink(power=5000.0, estimator="zf", floor=0.1),
    "selection": lambda: DownlinkSelection(2, power=5e4),
    "selection_half": lambda: DownlinkSelection(
        2, power=5e4, channel=FadingBroadcast(BLOCK), split="superposition", half_precision=True, tie_break="random"
    ),
}
REMEMBER = {"lfl", "lfl_model", "lfl_topk", "digital", "digital_maxmin", "analog_delta", "analog_floor"} | {
    "selection",
    "selection_half",
}


@pytest.mark.parametrize("name", ["lfl", "ltgm", "digital", "analog", "analog_delta", "selection", "selection_half"])
def test_trains_and_resumes_to_the_bit(name: str) -> None:
    check_strategy_part(
        lambda: EdgeStrategy(num_devices=4, local=LocalSGD(lr=0.1, num_steps=2), downlink=PARTS[name]()),
        module=Classifier(mlp(), "SGD", lr=1.0),
    )


@pytest.mark.parametrize("name", PARTS)
def test_state_draws_and_inputs(name: str) -> None:
    groups = [(0, 1, 2, 3, 4), (0, 2), (1, 3, 4), (2, 4), (0, 1, 2, 3, 4), (0, 4)]
    models = [model(t) for t in range(6)]
    if name.startswith("selection"):
        groups = [tuple(group[:2]) for group in groups]
    before = [one.clone() for one in models]

    def run(downlink: Any, rounds: range, seed: int = 0) -> list[Tensor]:
        return [downlink(models[t], plan(groups[t], index=t, seed=seed)).clone() for t in rounds]

    whole = run(ready(PARTS[name]()), range(6))
    assert all(torch.equal(one, old) for one, old in zip(models, before, strict=True)), "the model is not its to change"
    for held, group in zip(whole, groups, strict=True):
        assert held.shape in {(D,), (len(group), D)}
        assert held.isfinite().all()
    assert any(
        not torch.equal(a, b) for a, b in zip(run(ready(PARTS[name]()), range(6), seed=1), whole, strict=True)
    ) == (name != "lfl_topk")
    first = ready(PARTS[name]())
    run(first, range(3))
    state = copy.deepcopy(first.state_dict())
    second = ready(PARTS[name]())
    second.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(run(second, range(3, 6)), whole[3:], strict=True))
    forgetful = run(ready(PARTS[name]()), range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(forgetful, whole[3:], strict=True)) != (name in REMEMBER)
    again = ready(second)
    assert all(torch.equal(a, b) for a, b in zip(run(again, range(6)), whole, strict=True)), "set-up forgets"
    assert repr(ready(PARTS[name]())) == repr(second), "state is no setting"


@pytest.mark.parametrize("name", PARTS)
def test_keeps_float64(name: str) -> None:
    x = model().double()
    held = ready(PARTS[name]())(x, plan((0, 1)))
    assert held.dtype == torch.float64


def test_costs_are_logged_with_what_the_downlink_has_to_say() -> None:
    strategy = EdgeStrategy(num_devices=4, downlink=DigitalDownlink(power=500.0))
    _, t, _ = fit(strategy, steps=3)
    totals, logged = t.strategy.ledger.totals, t.callback_metrics
    assert totals["downlink/channel_uses"] == 2 * 2 * (t.strategy.layout.numel // 2)  # nothing to say in round 0
    assert float(totals["downlink/energy"]) == 2 * 500.0
    assert totals["downlink/bits"] >= totals["downlink/bits_ideal"] > 0
    assert float(logged["downlink/energy_cumulative"]) == 1000.0
    assert totals["downlink/bits_ideal"] <= 3 * float(logged["downlink/bit_budget"]) * 1.2
    assert {"downlink/levels", "downlink/entries", "downlink/silent", "downlink/model_error"} <= logged.keys()


# ---------------------------------------------------------------- LFL


@pytest.mark.parametrize("kind", [LFL, LGM, LTGM])
@pytest.mark.parametrize("base", ["estimate", "model"])
def test_without_a_quantiser_it_is_the_perfect_downlink_bit_for_bit(kind: Any, base: Any) -> None:
    plain, t, losses = fit(EdgeStrategy(num_devices=4))
    same, u, same_losses = fit(EdgeStrategy(num_devices=4, downlink=kind(None, server_base=base)))
    assert torch.equal(plain, same)
    assert losses == same_losses
    assert t.strategy.ledger.totals == u.strategy.ledger.totals


def fedavg(downlink: Downlink | None, levels: int | None = None, **options: Any) -> Any:
    uplink = None if levels is None else Digital(ErrorFeedback(LFLQuantizer(levels)))
    strategy = EdgeStrategy(
        num_devices=4, local=LocalSGD(lr=0.1, num_steps=2), downlink=downlink, uplink=uplink, **options
    )
    return fit(strategy, Classifier(mlp(), "SGD", lr=1.0))


@pytest.mark.parametrize("base", ["estimate", "model"])
def test_many_levels_are_fedavg(base: Any) -> None:
    exact, *_ = fedavg(None)
    start = weights(Classifier(mlp()))
    moved = float((exact - start).norm())
    distances = []
    for q in (3, 63, 65535):
        trained, *_ = fedavg(LFL(LFLQuantizer(q), server_base=base), levels=q)
        distances.append(float((trained - exact).norm()) / moved)
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 1e-2
    assert distances[-1] < 1e-4


@pytest.mark.parametrize("base", ["estimate", "model"])
def test_lfl_is_the_papers_recursion_written_out(base: Any) -> None:
    """Estimate plus quantised difference; the server's step from the estimate, or from its own model."""
    seen: list[Tensor] = []

    class Spy(WeightedMean):
        def forward(self, received: Received, round: Round) -> Tensor:
            seen.append(super().forward(received, round).clone())
            return seen[-1]

    module = Classifier(mlp(), "SGD", lr=1.0)
    quantizer = LFLQuantizer(3)
    strategy = EdgeStrategy(
        num_devices=4, local=LocalSGD(lr=0.1, num_steps=2), downlink=LFL(quantizer, server_base=base),
        aggregator=Spy(), seed=7,
    )  # fmt: skip
    trained, t, _ = fit(strategy, module, steps=4)
    theta = t.strategy.layout.flatten(dict(module.named_parameters()))
    estimate = theta.clone()
    for index, update in enumerate(seen):
        key = Key(seed=7, round=index, devices=(0,), name="downlink")
        estimate = estimate + quantizer.roundtrip((theta - estimate)[None], key).values[0]
        theta = (estimate if base == "estimate" else theta) - update
    torch.testing.assert_close(trained, theta.double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(t.strategy.downlink.estimates.of(theta), estimate, rtol=0, atol=1e-6)
    numel = t.strategy.layout.numel
    assert t.strategy.ledger.totals["downlink/bits"] == 4 * (64 + 8 * math.ceil(3 * numel / 8))


def test_all_devices_hold_what_the_server_remembers() -> None:
    """Whoever takes part: the model at which devices work is bit for bit the server's copy, in every round."""
    downlink = ready(LFL(LFLQuantizer(2)))
    for t, group in enumerate([(0, 1, 2, 3, 4), (1,), (0, 3)]):
        held = downlink(model(t), plan(group, index=t))
        assert held.shape == (D,)
        assert torch.equal(held, downlink.estimates.of(held))


def test_quantising_the_update_beats_quantising_the_model_once_it_moves_slowly() -> None:
    errors: dict[str, list[float]] = {}
    for kind in (LFL, LGM, LTGM):
        downlink, x = ready(kind(LFLQuantizer(2), server_base="model"), numel=500), model(0, 500)
        for t in range(40):
            x = x + 0.02 * model(100 + t, 500)
            errors.setdefault(kind.__name__, []).append(off(downlink(x, plan(5, index=t)), x))
    late = {name: sum(values[20:]) / 20 for name, values in errors.items()}
    assert 3 * late["LFL"] < min(late["LGM"], late["LTGM"])


def test_ltgm_spreads_an_outlier_that_costs_lgm_its_resolution() -> None:
    x = model(0, 1000)
    x[0] = 500.0
    small = [
        torch.stack([ready(kind(LFLQuantizer(7)), numel=1000)(x, plan(5, index=t)) for t in range(20)])
        for kind in (LGM, LTGM)
    ]
    lgm, ltgm = ((held - x).square().sum(1).mean() for held in small)
    assert ltgm < lgm / 10
    held = ready(LTGM(LFLQuantizer(65535)), numel=1000)(x, plan(5))
    assert off(held, x) < 1e-4, "the rotation is undone"
    assert abs(float((small[1] - x).mean())) < 5 * float((small[1] - x).std()) / math.sqrt(20_000)
    bits = ready(LTGM(LFLQuantizer(2)), numel=1000)
    bits(x, plan(5))
    assert bits.cost(1000, plan(5)).bits == 64 + 3 * 1024  # padded to a power of two


# ---------------------------------------------------------------- digital downlink


@pytest.mark.parametrize("build", [lambda **o: DigitalDownlink(**o), lambda **o: DownlinkSelection(4, **o)])
def test_without_noise_or_with_much_power_it_is_fedavg(build: Any) -> None:
    exact, *_ = fedavg(None)
    for options in ({"power": 1e150}, {"channel": FadingBroadcast(noise_var=1e-150)}):
        trained, t, _ = fedavg(build(**options))
        if isinstance(t.strategy.downlink, DigitalDownlink):
            assert torch.equal(trained, exact)
        torch.testing.assert_close(trained, exact, rtol=1e-5, atol=1e-6)  # a model each is another matrix product
        assert float(t.callback_metrics["downlink/model_error"]) == 0


def test_digital_error_falls_with_power_and_messages_keep_the_rate() -> None:
    errors = []
    for power in (1e2, 1e3, 1e4, 1e6, 1e9):
        downlink = ready(DigitalDownlink(power=power))
        start, target = model(0), model(1)
        downlink(start, plan(5))
        total = 0.0
        for t in range(1, 21):
            lonely = ready(DigitalDownlink(power=power))
            lonely(start, plan(5))
            total += off(lonely(target, plan(5, index=t)), target)
            cost, budget = lonely.cost(D, plan(5, index=t)), lonely.metrics(plan(5, index=t))["downlink/bit_budget"]
            assert cost.bits_ideal <= budget
            gains = FadingBroadcast().gains(plan(5, index=t).key, D // 2).abs().square().double()
            assert budget == pytest.approx(float(torch.log2(1 + gains * power / (D // 2)).sum(1).min()))
        errors.append(total / 20)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.5
    assert errors[-1] < 5e-3


def test_what_a_message_left_out_comes_with_the_next() -> None:
    downlink = ready(DigitalDownlink(power=1e4, channel=FadingBroadcast(NoFading())))
    downlink(model(0), plan(5))
    target = model(1)
    errors = [off(downlink(target, plan(5, index=t)).clone(), target) for t in range(1, 30)]
    assert errors[-1] < 1e-2 < errors[0]
    assert errors == sorted(errors, reverse=True)


def test_maxmin_carries_more_and_hears_the_same_fading() -> None:
    for t in range(5):
        budgets = []
        for allocation in ("uniform", "maxmin"):
            downlink = ready(DigitalDownlink(power=30.0, allocation=allocation))
            downlink(model(0), plan(5, index=t))
            budgets.append(downlink.metrics(plan(5))["downlink/bit_budget"])
        assert budgets[0] < budgets[1] < 2.5 * budgets[0]


@pytest.mark.parametrize("build", [lambda: DigitalDownlink(power=0.01), lambda: DownlinkSelection(2, power=0.01)])
def test_a_rate_too_small_for_anything_sends_nothing_and_says_so(build: Any) -> None:
    downlink, start = ready(build()), model(0)
    first = downlink(start, plan((0, 1))).clone()
    with pytest.warns(UserWarning, match="fewer bits than the smallest message takes"):
        held = downlink(model(1), plan((0, 1), index=1))
    assert torch.equal(held, first)
    cost = downlink.cost(D, plan((0, 1)))
    assert (cost.bits, cost.channel_uses, float(cost.energy)) == (0, 0, 0.0)
    assert downlink.metrics(plan((0, 1)))["downlink/silent"] == 1.0


# ---------------------------------------------------------------- analog downlink


@pytest.mark.parametrize("settings", [{"estimator": "zf"}, {"estimator": "lmmse"}, {"payload": "delta"}])
def test_analog_without_noise_is_fedavg(settings: dict[str, Any]) -> None:
    exact, *_ = fedavg(None)
    trained, *_ = fedavg(AnalogDownlink(channel=FadingBroadcast(noise_var=0.0), **settings))
    torch.testing.assert_close(trained, exact, rtol=1e-4, atol=1e-5)


def analog(x: Tensor, rounds: int = 1, devices: int = 4, **settings: Any) -> Tensor:
    """What is heard, shape (rounds, devices, d)."""
    downlink = ready(AnalogDownlink(**settings), devices, len(x))
    return torch.stack([downlink(x, plan(devices, index=t)).clone() for t in range(rounds)])


def test_zero_forcing_is_unbiased_with_the_variance_of_the_formula_and_errors_apart() -> None:
    x, power, noise_var = model(0, 1001), 3000.0, 2.0  # an odd length
    error = analog(x, 20, power=power, channel=FadingBroadcast(NoFading(), noise_var), estimator="zf") - x
    expected = noise_var * float(x.square().sum()) / (2 * power)
    count = error.numel()
    assert float(error.square().mean()) == pytest.approx(expected, rel=5 * math.sqrt(2 / count))
    assert abs(float(error.mean())) < 5 * math.sqrt(expected / count)
    mean_of_four = float(error.mean(1).square().mean())
    assert mean_of_four == pytest.approx(expected / 4, rel=5 * math.sqrt(8 / count))  # independent over devices
    fading = FadingBroadcast(Rayleigh(block=True), noise_var)
    error = analog(x, 20, power=power, channel=fading, estimator="zf") - x
    for t in range(20):  # given the gain
        squares = fading.gains(plan(4, index=t).key, 1).abs().square()[:, 0]
        assert (error[t].square().mean(1) * squares).tolist() == pytest.approx(
            [expected] * 4, rel=5 * math.sqrt(2 / 1001)
        )


def test_lmmse_is_closer_than_zero_forcing_on_the_same_draws() -> None:
    x = model(0, 1000)
    for power in (100.0, 1000.0, 10_000.0):
        lmmse, zf = (
            (analog(x, 5, power=power, estimator=e, channel=FadingBroadcast(BLOCK)) - x).square().sum(2)
            for e in ("lmmse", "zf")
        )
        assert float(lmmse.mean()) < float(zf.mean())
        assert float((lmmse < zf).float().mean()) > 0.7
        assert float(lmmse.mean()) < 1.1 * float(x.square().sum()), "at worst nothing is known"


def test_the_floor_keeps_what_was_held_where_the_gain_is_small() -> None:
    first, second = model(0, 1000), model(1, 1000)
    channel = FadingBroadcast(Rayleigh(), noise_var=0.0)
    downlink = ready(AnalogDownlink(channel=channel, estimator="zf", floor=0.5), 3, 1000)
    downlink(first, plan(3))
    held = downlink(second, plan(3, index=1))
    faint = channel.gains(plan(3, index=1).key, 500).abs().square().repeat(1, 2) < 0.5
    old = first.expand(3, -1)
    torch.testing.assert_close(held, torch.where(faint, old, second), rtol=1e-4, atol=1e-4)
    share = downlink.metrics(plan(3))["downlink/erased"]
    assert share == pytest.approx(float(faint.float().mean()))
    assert share == pytest.approx(1 - math.exp(-0.5), abs=5 * math.sqrt(0.24 / 900))


def test_errors_add_up_if_changes_are_sent_and_not_if_the_model_is() -> None:
    errors = {}
    for payload in ("model", "delta"):
        downlink = ready(AnalogDownlink(power=2000.0, payload=payload, channel=FadingBroadcast(NoFading())), 3, 500)
        x, errors[payload] = model(0, 500), []
        for t in range(60):
            x = x + 0.3 * model(100 + t, 500) - 0.04 * x
            errors[payload].append(float((downlink(x, plan(3, index=t)) - x).square().mean()))
    early, late = slice(1, 6), slice(50, 60)
    assert sum(errors["delta"][late]) / 10 > 5 * sum(errors["delta"][early]) / 5
    assert sum(errors["model"][late]) / 10 < 2 * sum(errors["model"][early]) / 5


def test_analog_energy_blocks_and_side_information() -> None:
    x = model(0, 1001)
    downlink = ready(AnalogDownlink(power=70.0, channel=FadingBroadcast(NoFading(), 0.0)), 3, 1001)
    downlink(x, plan(3))
    cost = downlink.cost(1001, plan(3))
    assert (cost.bits, cost.channel_uses, cost.energy.tolist()) == (32, 1002, [70.0])
    channel = FadingBroadcast(BLOCK, 0.0)
    several = ready(AnalogDownlink(channel=channel, channel_uses=400, blocks="multi"), 3, 1001)
    gains = several._gains(plan(3).key, 501, x.device)
    assert [len(row.abs().unique()) for row in gains] == [3, 3, 3]
    assert len(gains[0, :200].abs().unique()) == len(gains[0, 400:].abs().unique()) == 1
    torch.testing.assert_close(several(x, plan(3)), x.expand(3, -1), rtol=1e-4, atol=1e-4)
    assert several.cost(1001, plan(3)).channel_uses == 1002
    nothing = ready(AnalogDownlink(power=70.0), 3)
    assert not nothing(torch.zeros(D), plan(3)).any()
    assert nothing.cost(D, plan(3)).energy is None


def test_power_sent_is_exactly_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[float] = []
    forward = FadingBroadcast.forward

    def spy(self: Any, x: Tensor, key: Key, **options: Any) -> Tensor:
        sent.append(float(x.abs().double().square().sum()))
        return forward(self, x, key, **options)

    monkeypatch.setattr(FadingBroadcast, "forward", spy)
    for scale in (1e-6, 1.0, 1e6):
        analog(scale * model(), power=70.0)
    assert sent == pytest.approx([70.0] * 3, rel=1e-5)


def test_devices_hear_alike_whether_at_once_or_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = analog(model(), devices=5)
    monkeypatch.setattr("groundwire.plugins.edge.downlinks.analog._AT_ONCE", 62)
    torch.testing.assert_close(analog(model(), devices=5), whole, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- selection


def test_the_devices_with_the_largest_gains_are_chosen_whatever_their_order() -> None:
    for t in range(5):
        downlink = ready(DownlinkSelection(3, channel=FadingBroadcast(BLOCK)), 9)
        gains = FadingBroadcast(BLOCK).gains(plan(9, index=t).key, 1).abs()[:, 0]
        best = set(gains.argsort(descending=True)[:3].tolist())
        assert set(downlink.choose(plan(9, index=t)).tolist()) == best
        order = torch.randperm(9, generator=torch.Generator().manual_seed(t)).tolist()
        rows = downlink.choose(plan(tuple(order), index=t)).tolist()
        assert rows == sorted(rows)
        assert {order[row] for row in rows} == best


def test_equal_gains_go_to_the_lowest_id_or_to_anybody() -> None:
    lowest = ready(DownlinkSelection(2, channel=FadingBroadcast(NoFading())), 6)
    assert lowest.choose(plan((5, 3, 0, 4))).tolist() == [1, 2]
    anybody = ready(DownlinkSelection(2, channel=FadingBroadcast(NoFading()), tie_break="random"), 6)
    counts = torch.zeros(6)
    for t in range(600):
        rows = anybody.choose(plan(6, index=t))
        counts[rows] += 1
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3
    far = ready(DownlinkSelection(2, channel=FadingBroadcast(NoFading(path_loss=PathLoss())), tie_break="random"), 6)
    assert len({tuple(far.choose(plan(6, index=t)).tolist()) for t in range(9)}) == 1, "no ties there"


def test_with_alike_devices_each_is_chosen_as_often() -> None:
    downlink = ready(DownlinkSelection(3, channel=FadingBroadcast(BLOCK)), 10, numel=4)
    for t in range(300):
        chosen = tuple(downlink.choose(plan(10, index=t)).tolist())
        downlink(model(0, 4), plan(chosen, index=t))
    counts = downlink.times_selected
    assert int(counts.sum()) == 900
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3
    logged = downlink.metrics(plan(3))
    assert float(logged["downlink/least_selected"]) == float(counts.min()) / 90
    assert float(logged["downlink/most_selected"]) == float(counts.max()) / 90


def test_only_the_chosen_train_and_the_others_keep_old_models() -> None:
    seen: list[tuple[int, ...]] = []

    class Spy(WeightedMean):
        def forward(self, received: Received, round: Round) -> Tensor:
            seen.append(round.devices)
            assert float(round.weights.sum()) == pytest.approx(1.0)
            assert round.sample_rate is None
            assert received.rows.shape[0] == 2
            return super().forward(received, round)

    strategy = EdgeStrategy(num_devices=4, downlink=DownlinkSelection(2, power=1e4), aggregator=Spy(), seed=3)
    _, t, _ = fit(strategy, steps=5)
    channel, uses = FadingBroadcast(), t.strategy.layout.numel // 2
    for index, devices in enumerate(seen):
        bits = channel.bits(plan(4, index=index, seed=3).key, uses, power=1e4)
        assert devices == tuple(sorted(bits.argsort(descending=True)[:2].tolist()))
    assert t.strategy.downlink.times_selected.tolist() == [sum(m in devices for devices in seen) for m in range(4)]
    downlink = ready(DownlinkSelection(2, power=1e4))
    downlink(model(0), plan((0, 1)))
    held = downlink(model(1), plan((2, 3), index=1))
    assert torch.equal(downlink.estimates.of(model())[:2], model(0).expand(2, -1))
    assert off(held[0], model(1)) < off(model(0), model(1))


def test_all_devices_on_a_common_channel_are_lfl_at_their_share_of_the_rate() -> None:
    """Each device's message is fitted to R / M; the coins are its own."""
    channel, power = FadingBroadcast(NoFading()), 3e9
    downlink = ready(DownlinkSelection(5, power=power, channel=channel))
    start, target, uses = model(0), model(1), D // 2
    downlink(start, plan(5))
    held = downlink(target, plan(5, index=1))
    rate = uses * math.log2(1 + power / uses) / 5
    quantizer = LFLQuantizer(1).fitted(target - start, rate)
    assert quantizer is not None
    key = Key(seed=0, round=1, devices=tuple(range(5)), name="downlink")
    expected = start + quantizer.roundtrip((target - start).expand(5, -1), key).values
    torch.testing.assert_close(held, expected, rtol=1e-6, atol=1e-6)
    cost = downlink.cost(D, plan(5))
    assert float(cost.energy) == pytest.approx(power)
    assert cost.bits_ideal <= 5 * rate


def test_superposition_of_one_device_is_time_sharing_of_one() -> None:
    held = []
    for split in ("tdm", "superposition"):
        downlink = ready(DownlinkSelection(1, power=500.0, channel=FadingBroadcast(BLOCK), split=split))
        downlink(model(0), plan((2,)))
        held.append(downlink(model(1), plan((2,), index=1)).clone())
        budget = float(downlink.metrics(plan((2,)))["downlink/bit_budget"])
        gain = float(FadingBroadcast(BLOCK).gains(plan((2,), index=1).key, 1).abs().square())
        assert budget == pytest.approx(D // 2 * math.log2(1 + gain * 500.0 / (D // 2)), rel=1e-6)
    assert torch.equal(held[0], held[1])


def test_fedavg_with_partial_participation_when_rates_are_high() -> None:
    """The perfect downlink to the same devices, which a scheduler names."""
    channel, numel = FadingBroadcast(), sum(p.numel() for p in mlp().parameters())

    class Best(Scheduler):
        def forward(self, device_ids: Tensor, *, round_index: int, seed: int) -> Tensor:
            key = Key(seed=seed, round=round_index, devices=tuple(device_ids.tolist()))
            return channel.bits(key, numel // 2, power=1e150).argsort(descending=True)[:2].sort().values

    exact, *_ = fedavg(None, scheduler=Best())
    chosen, *_ = fedavg(DownlinkSelection(2, power=1e150))
    torch.testing.assert_close(chosen, exact, rtol=1e-5, atol=1e-6)


def test_selection_is_among_those_who_are_scheduled_and_empty_rounds_reach_nobody() -> None:
    _, t, _ = fedavg(DownlinkSelection(1, power=1e3), scheduler=UniformSample(2))
    assert int(t.strategy.downlink.times_selected.sum()) == 6
    _, t, _ = fedavg(DownlinkSelection(3, power=1e3), scheduler=UniformSample(2))
    assert int(t.strategy.downlink.times_selected.sum()) == 12, "all who are there, where there are fewer"
    downlink = ready(DownlinkSelection(1))
    downlink(model(0), plan((1,)))
    held = downlink(model(1), plan((0,), index=1, is_empty=True))
    assert torch.equal(held[0], model(0))
    assert downlink.times_selected.tolist() == [0, 1, 0, 0, 0]
    assert downlink.cost(D, plan(1)).energy is None
    _, t, _ = fedavg(DownlinkSelection(1, power=1e3), scheduler=PoissonSample(0.2))
    assert int(t.strategy.downlink.times_selected.sum()) < 6


def test_half_precision_keeps_float16_models_and_loses_little() -> None:
    downlink = ready(DownlinkSelection(2, power=1e150, half_precision=True))
    downlink(model(0), plan((0, 1)))
    held = downlink(model(1), plan((0, 1), index=1))
    assert downlink.estimates.of(model()).dtype == torch.float16
    assert held.dtype == torch.float32
    assert torch.equal(held, model(1).half().float().expand(2, -1))


def test_a_message_within_a_budget_by_itself() -> None:
    key = Key(seed=0, devices=(0,))
    start, target = model(0), model(1)
    whole = send_within(32 * D, target, start, key)
    assert torch.equal(whole.held, target)
    assert whole.message is not None
    assert whole.message.bits_wire == 32 * D
    assert send_within(1e9, start, start, key).message is None
    assert send_within(60.0, target, start, key).is_silent
    assert not send_within(60.0, start, start, key).is_silent
    assert torch.equal(start, model(0))


# ---------------------------------------------------------------- bad input and YAML


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LFL(None, server_base="both"), "`server_base` must be 'estimate' or 'model', got 'both'"),
        (lambda: DigitalDownlink(allocation="best"), "`allocation` must be 'uniform' or 'maxmin', got 'best'"),
        (lambda: DigitalDownlink(channel=FadingBroadcast(noise_var=0.0)), "needs noise.*use PerfectDownlink"),
        (lambda: DigitalDownlink(power=0.0), "power"),
        (lambda: ready(DigitalDownlink(channel_uses=1)), "needs 2 <= s <= 61"),
        (lambda: ready(DigitalDownlink(bandwidth=0.5, channel_uses=4)), "Give either `bandwidth`"),
        (lambda: DownlinkSelection(0), "`num_selected` must be at least 1, got 0"),
        (lambda: ready(DownlinkSelection(6)), r"`num_selected` must be in 1\.\.5, the number of devices; got 6"),
        (lambda: DownlinkSelection(1, split="fdm"), "`split` must be 'tdm' or 'superposition', got 'fdm'"),
        (lambda: DownlinkSelection(1, split="superposition"), "Give it block=True, or use split='tdm'"),
        (lambda: DownlinkSelection(1, tie_break="highest"), "`tie_break` must be 'lowest' or 'random'"),
        (lambda: DownlinkSelection(1, channel=FadingBroadcast(noise_var=0.0)), "needs noise"),
        (
            lambda: ready(DownlinkSelection(1, memory_limit_gib=1.0), 1000, 400_000),
            r"1000 devices with 400,000 parameters takes 1.49 GiB, more than `memory_limit_gib`=1.0.*half_precision=True",
        ),
        (
            lambda: ready(AnalogDownlink(payload="delta", memory_limit_gib=1.0), 1000, 400_000),
            r"takes 1.49 GiB.*payload='model' without `floor`",
        ),
        (lambda: AnalogDownlink(channel_uses=1), "at least 2, got 1"),
        (lambda: AnalogDownlink(blocks="many"), "`blocks` must be 'single' or 'multi', got 'many'"),
        (lambda: AnalogDownlink(estimator="ml"), "`estimator` must be 'lmmse' or 'zf', got 'ml'"),
        (lambda: AnalogDownlink(payload="update"), "`payload` must be 'model' or 'delta', got 'update'"),
        (lambda: AnalogDownlink(floor=0.1), "is for estimator='zf' with payload='model'"),
        (lambda: AnalogDownlink(floor=-0.1, estimator="zf"), "must be finite and >= 0"),
        (
            lambda: ready(AnalogDownlink(channel_uses=40)),
            r"61 parameters needs 31 complex symbols, but channel_uses=40 real ones make 20.*blocks='multi'",
        ),
    ],
)
def test_refuses_what_does_not_fit(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_half_the_memory_with_half_precision() -> None:
    DownlinkSelection(1, memory_limit_gib=1.0, half_precision=True).setup(numel=400_000, num_devices=1000)


@pytest.mark.parametrize(
    "yaml",
    [
        """
class_path: groundwire.plugins.edge.downlinks.LFL
init_args:
  compressor: {class_path: groundwire.plugins.compression.lfl_quantizer.LFLQuantizer, init_args: {bits: 3}}
  server_base: model
""",
        """
class_path: groundwire.plugins.edge.downlinks.DownlinkSelection
init_args:
  num_selected: 3
  split: superposition
  channel:
    class_path: groundwire.plugins.channels.broadcast.FadingBroadcast
    init_args: {fading: {class_path: groundwire.plugins.channels.Rayleigh, init_args: {block: true}}}
""",
        """
class_path: groundwire.plugins.edge.downlinks.AnalogDownlink
init_args: {estimator: zf, floor: 0.1, power: 100}
""",
        """
class_path: groundwire.plugins.edge.downlinks.DigitalDownlink
init_args: {allocation: maxmin, bandwidth: 0.5}
""",
    ],
)
def test_builds_from_yaml(yaml: str) -> None:
    assert ready(build_from_yaml(Downlink, yaml))(model(), plan(3)).isfinite().all()
