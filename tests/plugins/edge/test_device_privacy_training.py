"""Privacy of whole devices in EdgeStrategy: what is logged, empty rounds, budgets that end, and resuming."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from groundwire.plugins.channels import GaussianMAC
from groundwire.plugins.compression import Identity
from groundwire.plugins.edge import (
    CheckpointMismatchError,
    Digital,
    DPFedAvg,
    DPOverTheAir,
    EdgeStrategy,
    MajorityVote,
    PoissonSample,
    Scheduler,
    UniformSample,
)
from helpers.edge import (
    Classifier,
    Stateful,
    check_strategy_part,
    fit,
    loader,
    mlp,
    trainer,
    weights,
)
from helpers.privacy import gaussian_epsilon

DELTA = 1e-3


class Logged(pl.Callback):
    """What was logged at each step, by name."""

    def __init__(self, *names: str) -> None:
        self.values: dict[str, list[float]] = {name: [] for name in names}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        for name, values in self.values.items():
            values.append(float(trainer.callback_metrics[name]))


def private(uplink: Any, *, num_devices: int = 4, rate: float | None = None, **options: Any) -> EdgeStrategy:
    scheduler = PoissonSample(rate) if rate is not None else None
    return EdgeStrategy(num_devices, uplink=uplink, scheduler=scheduler, **options)


PARTS = {
    "server": lambda: private(DPFedAvg(1.0, noise_multiplier=4.0), rate=0.75),
    "devices": lambda: private(DPFedAvg(1.0, noise_multiplier=4.0, noise="devices"), num_devices=8, rate=0.75),
    "budget": lambda: private(DPFedAvg(1.0, target_epsilon=20.0, target_delta=DELTA)),
    "air": lambda: private(DPOverTheAir(1.0, noise_multiplier=4.0, power=10.0), rate=0.75),
    "air_budget": lambda: private(DPOverTheAir(1.0, target_epsilon=20.0, target_delta=DELTA)),
    "signs": lambda: private(DPFedAvg(1.0, noise_multiplier=0.5), aggregator=MajorityVote()),
}


@pytest.mark.parametrize("name", PARTS)
def test_part(name: str) -> None:
    """Equal settings give equal weights, and a run that was killed and resumed equals one that was not."""
    check_strategy_part(PARTS[name])


def test_without_noise_and_clipping_it_is_the_plain_mean() -> None:
    plain, _, _ = fit(EdgeStrategy(4), Classifier(mlp(), "SGD", lr=0.1))
    off, t, _ = fit(private(DPFedAvg(1e6, noise_multiplier=0.0)), Classifier(mlp(), "SGD", lr=0.1))
    torch.testing.assert_close(off, plain, rtol=1e-6, atol=1e-7)
    assert t.strategy.privacy_spent().epsilon == math.inf


# ---------------------------------------------------------------- what is logged


@pytest.mark.parametrize("build", [DPFedAvg, DPOverTheAir])
def test_epsilon_is_logged_in_every_round_and_is_what_was_spent(build: Any) -> None:
    logged = Logged("privacy/epsilon")
    strategy = private(build(1.0, noise_multiplier=3.0, target_delta=DELTA))
    fit(strategy, callbacks=[logged], log_every_n_steps=1)
    expected = [gaussian_epsilon(3.0, t, DELTA) for t in range(1, 7)]
    assert logged.values["privacy/epsilon"] == pytest.approx(expected, rel=1e-5)
    spent = strategy.privacy_spent()
    assert spent is not None
    assert spent.epsilon == logged.values["privacy/epsilon"][-1]
    assert spent.delta == DELTA
    earlier = strategy.privacy_spent(2)
    assert earlier is not None
    assert earlier.epsilon == pytest.approx(expected[1], rel=1e-5)


def test_coins_cost_less_and_epsilon_still_grows() -> None:
    logged = Logged("privacy/epsilon")
    fit(
        private(DPFedAvg(1.0, noise_multiplier=4.0, target_delta=DELTA), rate=0.75),
        callbacks=[logged],
        log_every_n_steps=1,
    )
    values = logged.values["privacy/epsilon"]
    assert all(a < b for a, b in pairwise(values))
    assert values[-1] < 0.9 * gaussian_epsilon(4.0, 6, DELTA)


def test_an_uplink_without_privacy_claims_none() -> None:
    _, t, _ = fit(private(Digital(Identity()), rate=0.8), log_every_n_steps=1)
    assert t.strategy.privacy_spent() is None
    assert "privacy/epsilon" not in t.callback_metrics


# ---------------------------------------------------------------- empty rounds


class Coins(Scheduler):
    """Rounds 1 and 2 are empty."""

    sample_rate = 0.1

    def forward(self, device_ids: Tensor, *, round_index: int, seed: int) -> Tensor:
        return torch.arange(0 if round_index in (1, 2) else 2)


class Weights(pl.Callback):
    """The weights after each step."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self.values.append(weights(module))


def steps_of(uplink: Any, module: nn.Module | None = None) -> tuple[list[Tensor], list[float], pl.Trainer]:
    """Change of the weights in each round (plain SGD, rate 1), and what ``round/empty`` says."""
    recorded, logged = Weights(), Logged("round/empty")
    strategy = EdgeStrategy(4, scheduler=Coins(), uplink=uplink)
    module = Classifier(mlp(), "SGD", lr=1.0) if module is None else module
    _, t, _ = fit(strategy, module, callbacks=[recorded, logged], steps=4, log_every_n_steps=1)
    points = [weights(module), *recorded.values]
    return [b - a for a, b in pairwise(points)], logged.values["round/empty"], t


@pytest.mark.parametrize("build", [DPFedAvg, DPOverTheAir])
def test_an_empty_round_is_a_step_of_noise(build: Any) -> None:
    steps, empty, t = steps_of(build(0.5, noise_multiplier=2.0, target_delta=DELTA))
    assert empty == [0.0, 1.0, 1.0, 0.0]
    std = 2.0 * 0.5 / (0.1 * 4)
    band = 5 / math.sqrt(2 * steps[1].numel())
    for step in steps[1:3]:
        assert float(step.std()) == pytest.approx(std, rel=band)
        assert abs(float(step.mean())) < 5 * std / math.sqrt(step.numel())
    assert not torch.equal(steps[1], steps[2])
    assert t.strategy.privacy_spent().epsilon > t.strategy.privacy_spent(3).epsilon  # empty rounds are counted too
    energy = t.strategy.ledger.energy_per_device
    assert not energy[2:].any()
    rounds_with_energy = 0 if build is DPFedAvg else 2
    assert (int((energy > 0).sum()), t.strategy.ledger.rounds) == (rounds_with_energy, 4)


def test_without_noise_an_empty_round_changes_nothing_and_sends_nothing() -> None:
    steps, _, t = steps_of(DPFedAvg(0.5, noise_multiplier=0.0))
    assert [bool(step.any()) for step in steps] == [True, False, False, True]
    assert t.strategy.ledger.totals["uplink/bits"] == 2 * 2 * 32 * t.strategy.layout.numel


def test_what_the_stand_in_of_an_empty_round_computes_does_not_matter() -> None:
    """It may even be NaN; the same noise is added as if it were not."""

    class Breaks(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            return loss * float("nan") if batch_idx in (1, 2) else loss

    broken, _, _ = steps_of(DPFedAvg(0.5, noise_multiplier=2.0), Breaks(mlp(), "SGD", lr=1.0))
    fine, _, _ = steps_of(DPFedAvg(0.5, noise_multiplier=2.0))
    assert all(torch.equal(a, b) for a, b in zip(broken, fine, strict=True))


def test_without_participants_there_is_nobody_to_add_the_devices_noise() -> None:
    with pytest.raises(MisconfigurationException, match=r"nobody takes part and adds noise.*Raise the rate"):
        steps_of(DPFedAvg(0.5, noise_multiplier=2.0, noise="devices"))


def test_a_small_rate_runs_through_whatever_the_coins_say() -> None:
    logged = Logged("round/empty")
    uplink = DPOverTheAir(1.0, noise_multiplier=4.0)
    on, _, _ = fit(private(uplink, rate=0.1, seed=1), callbacks=[logged], log_every_n_steps=1)
    coins = [len(PoissonSample(0.1)(torch.arange(4), round_index=t, seed=1)) for t in range(6)]
    assert logged.values["round/empty"] == [float(k == 0) for k in coins]
    assert 0 < sum(logged.values["round/empty"]) < 6
    assert torch.isfinite(on).all()


# ---------------------------------------------------------------- budgets


@pytest.mark.parametrize(("build", "rate"), [(DPFedAvg, None), (DPOverTheAir, None), (DPFedAvg, 0.9)])
def test_a_planned_run_spends_its_budget(build: Any, rate: float | None) -> None:
    strategy = private(build(1.0, target_epsilon=3.0, target_delta=DELTA), rate=rate)
    _, t, _ = fit(strategy)
    assert t.global_step == 6
    assert 0.95 * 3.0 <= strategy.privacy_spent().epsilon <= 3.0


@pytest.mark.parametrize("build", [DPFedAvg, DPOverTheAir])
def test_training_stops_before_the_round_that_would_exceed_the_budget(build: Any) -> None:
    assert gaussian_epsilon(2.0, 3, DELTA) < 3.0 < gaussian_epsilon(2.0, 4, DELTA)
    strategy = private(build(1.0, target_epsilon=3.0, noise_multiplier=2.0, target_delta=DELTA))
    _, t, _ = fit(strategy)
    assert t.global_step == strategy.round_index == 3
    assert strategy.privacy_spent().epsilon == pytest.approx(gaussian_epsilon(2.0, 3, DELTA), rel=1e-5)


def test_a_trainer_that_does_not_stop_is_stopped() -> None:
    """Lightning goes on until min_steps, whatever should_stop says."""
    strategy = private(DPFedAvg(1.0, target_epsilon=3.0, noise_multiplier=2.0, target_delta=DELTA))
    with pytest.raises(
        MisconfigurationException, match=r"pays for 3 rounds .* makes it 3.1\d+, and was not made.*min_st"
    ):
        fit(strategy, min_steps=5)
    assert strategy.round_index == 3


def test_a_budget_below_one_round_is_refused_before_it() -> None:
    recorded = Weights()
    strategy = private(DPFedAvg(1.0, target_epsilon=1.0, noise_multiplier=0.5, target_delta=DELTA))
    with pytest.raises(
        MisconfigurationException, match=r"`target_epsilon` 1.0 pays for 0 rounds at noise multiplier 0.5"
    ):
        fit(strategy, callbacks=[recorded])
    assert strategy.round_index == 0
    assert not recorded.values


def test_a_second_fit_goes_on_with_the_account_of_the_first() -> None:
    strategy = private(DPFedAvg(1.0, target_epsilon=3.0, target_delta=DELTA))
    module = Classifier(mlp())
    t = trainer(strategy, steps=4)
    t.fit(module, loader())
    first = strategy.privacy_spent()
    t.fit_loop.epoch_loop.max_steps = 8
    with pytest.raises(MisconfigurationException, match=r"`target_epsilon` 3\.0 pays for 4 rounds"):
        t.fit(module, loader())
    assert strategy.privacy_spent() == first


# ---------------------------------------------------------------- refused


def test_schedulers_and_plans_without_an_account_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="devices that take part by coins of their own"):
        fit(EdgeStrategy(4, scheduler=UniformSample(2), uplink=DPFedAvg(1.0, noise_multiplier=1.0)))
    with pytest.raises(MisconfigurationException, match="depends on the number of rounds"):
        fit(private(DPFedAvg(1.0, target_epsilon=1.0)), steps=-1, max_epochs=-1)


def test_statistics_that_bypass_the_uplink_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"BatchNorm statistics.*Use layers without statistics"):
        fit(private(DPFedAvg(1.0, noise_multiplier=1.0), vectorize=False), Classifier(mlp(nn.BatchNorm1d(16))))


# ---------------------------------------------------------------- resuming


def resumed(folder: Path, first: Any, second: Any, *, steps: int = 6, stop: int = 3) -> tuple[Tensor, list[float], Any]:
    """Save after ``stop`` rounds of a run of six, and go on in a new Trainer: weights, epsilons logged, strategy."""
    t = trainer(first(), steps=6, log_every_n_steps=1, limit_train_batches=4)

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
            if trainer.global_step == stop:
                trainer.save_checkpoint(folder / "at.ckpt")
                trainer.should_stop = True

    t.callbacks.append(Save())
    module = Classifier(mlp())
    t.fit(module, Stateful(loader()))
    assert t.global_step == stop
    logged, strategy = Logged("privacy/epsilon"), second()
    t = trainer(strategy, steps=steps, callbacks=[logged], log_every_n_steps=1)
    fresh = Classifier(mlp())
    t.fit(fresh, Stateful(loader()), ckpt_path=str(folder / "at.ckpt"))
    return weights(fresh), logged.values["privacy/epsilon"], strategy


@pytest.mark.parametrize("name", ["server", "devices", "budget", "air", "air_budget"])
def test_a_resumed_run_claims_what_an_uninterrupted_one_does(name: str, tmp_path: Path) -> None:
    logged = Logged("privacy/epsilon")
    whole, t, _ = fit(PARTS[name](), callbacks=[logged], log_every_n_steps=1)
    parts, values, strategy = resumed(tmp_path, PARTS[name], PARTS[name])
    assert torch.equal(parts, whole)
    assert values == logged.values["privacy/epsilon"][3:]
    assert strategy.privacy_spent() == t.strategy.privacy_spent()


def test_a_longer_run_from_a_checkpoint_keeps_the_noise_and_the_budget(tmp_path: Path) -> None:
    """The noise was chosen for six rounds; six more were never paid for."""
    with pytest.raises(MisconfigurationException, match=r"`target_epsilon` 20\.0 pays for 6 rounds"):
        resumed(tmp_path, PARTS["budget"], PARTS["budget"], steps=12, stop=6)
    _, values, strategy = resumed(tmp_path, PARTS["budget"], PARTS["budget"], steps=12, stop=3)
    assert strategy.round_index == 6
    assert 0.95 * 20 <= values[-1] <= 20


FED = {"clip_norm": 1.0, "target_epsilon": 20.0, "target_delta": DELTA}


@pytest.mark.parametrize(
    "change",
    [
        {"clip_norm": 2.0},
        {"target_epsilon": 30.0},
        {"target_delta": 1e-4},
        {"noise_multiplier": 1.0},
        {"noise": "devices"},
        {"accountant": "rdp"},
    ],
)
def test_other_privacy_settings_do_not_go_on_from_a_checkpoint(change: dict[str, Any], tmp_path: Path) -> None:
    (name,) = change
    with pytest.raises(CheckpointMismatchError, match=f"uplink was .*{name}"):
        resumed(tmp_path, lambda: private(DPFedAvg(**FED)), lambda: private(DPFedAvg(**(FED | change))))


@pytest.mark.parametrize(
    ("change", "name"),
    [({"power": 20.0}, "power"), ({"channel": GaussianMAC(2.0)}, "noise_var"), ({"clip_norm": 2.0}, "clip_norm")],
)
def test_another_air_does_not_go_on_from_a_checkpoint(change: dict[str, Any], name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatchError, match=f"uplink was .*{name}"):
        resumed(tmp_path, lambda: private(DPOverTheAir(**FED)), lambda: private(DPOverTheAir(**(FED | change))))


def test_another_rate_does_not_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    build = lambda rate: private(DPFedAvg(1.0, noise_multiplier=4.0), rate=rate)
    with pytest.raises(CheckpointMismatchError, match=r"scheduler was 'PoissonSample\(sample_rate=0.75\)'"):
        resumed(tmp_path, lambda: build(0.75), lambda: build(0.8))
