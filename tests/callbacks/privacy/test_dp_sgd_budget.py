from __future__ import annotations

import contextlib
import copy
import math
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from groundwire.callbacks.privacy import DPSGD, PrivacyBudgetExhausted
from groundwire.callbacks.reporting import ResumableCheckpoint
from groundwire.plugins.errors import CheckpointMismatchError
from groundwire.plugins.privacy import noise_multiplier_for, spent_epsilon
from groundwire.plugins.privacy.accounting import UnreachableBudgetError
from helpers.edge import Classifier, Killed, fit, loader, mlp, trainer, weights

pytestmark = [pytest.mark.filterwarnings("ignore:.*[Gg][Dd][Pp]"), pytest.mark.usefixtures("seed_of_the_run")]
DELTA = 1e-3


def dp(**options: Any) -> DPSGD:
    """Repeatable; the accountant that takes no time, where epsilon itself is not what is tested."""
    defaults = {"noise_multiplier": 1.0, "accountant": "gdp", "reproducible": True, "target_delta": DELTA}
    return DPSGD(**(defaults | options))


class Scheduled(Classifier):
    """Momentum and a learning rate that follows the steps: a resumed run has state to restore."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


# ---------------------------------------------------------------- the end of the budget


@pytest.mark.parametrize(("accountant", "accumulated"), [("rdp", 2), ("prv", 1)])
def test_stops_before_the_step_that_would_exceed_the_budget(accountant: Any, accumulated: int) -> None:
    target = 2.0
    callback = dp(target_epsilon=target, noise_multiplier=1.5, accountant=accountant)
    data = loader(batch_size=24 // accumulated)
    _, t, losses = fit(
        "auto", Scheduled(mlp()), data, callbacks=[callback], steps=20, accumulate_grad_batches=accumulated
    )
    steps = t.global_step
    assert 1 < steps < 20
    assert callback.steps == steps == len(losses) // accumulated
    after = [spent_epsilon(1.5, 0.25, n, DELTA, accountant) for n in (steps, steps + 1)]
    assert after[0] <= target < after[1]
    assert callback.privacy_spent().epsilon == pytest.approx(after[0])
    assert float(t.callback_metrics["privacy/epsilon"]) == pytest.approx(after[0], rel=1e-6)


def test_an_endless_run_stops_at_the_budget() -> None:
    callback = dp(target_epsilon=2.0, noise_multiplier=1.5, accountant="rdp")
    _, t, _ = fit("auto", Classifier(mlp()), callbacks=[callback], steps=-1, max_epochs=-1)
    assert spent_epsilon(1.5, 0.25, t.global_step, DELTA, "rdp") <= 2.0
    assert spent_epsilon(1.5, 0.25, t.global_step + 1, DELTA, "rdp") > 2.0


@pytest.mark.parametrize("options", [{"min_steps": 30}, {"min_epochs": 8}])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_raises_when_the_trainer_must_not_stop(options: dict[str, int], accumulated: int) -> None:
    data = loader(batch_size=24 // accumulated)
    allowed = dp(target_epsilon=2.0, noise_multiplier=1.5)
    expected, _, _ = fit(
        "auto", Scheduled(mlp()), data, callbacks=[allowed], steps=40, accumulate_grad_batches=accumulated
    )
    callback, module = dp(target_epsilon=2.0, noise_multiplier=1.5), Scheduled(mlp())
    t = trainer(steps=40, callbacks=[callback], accumulate_grad_batches=accumulated, **options)
    with pytest.raises(PrivacyBudgetExhausted, match=f"{allowed.steps} steps.*epsilon 2"):
        t.fit(module, data)
    assert torch.equal(weights(module), expected)
    assert callback.steps == allowed.steps < 30
    assert callback.privacy_spent().epsilon <= 2.0


@pytest.mark.parametrize("accountant", ["rdp", "gdp"])
def test_calibrated_noise_spends_the_budget_in_all_steps(accountant: Any) -> None:
    callback = dp(target_epsilon=1.0, noise_multiplier=None, accountant=accountant)
    _, t, _ = fit("auto", Classifier(mlp()), callbacks=[callback], steps=-1, max_epochs=3)
    assert callback.steps == t.global_step == 12
    assert 0.97 < spent_epsilon(callback.noise_multiplier, 0.25, 12, DELTA, accountant) <= 1.0
    assert callback.privacy_spent().epsilon <= 1.0
    assert callback.noise_multiplier == noise_multiplier_for(1.0, 0.25, 12, DELTA, accountant)
    assert float(t.callback_metrics["privacy/noise_multiplier"]) == pytest.approx(callback.noise_multiplier)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": -1, "max_epochs": 2},
        {"steps": 8, "max_epochs": 100},
        {"steps": 8, "max_epochs": -1},
        {"steps": -1, "max_epochs": 4, "limit_train_batches": 0.5},
    ],
)
@pytest.mark.parametrize("physical", [None, 7])
def test_noise_is_calibrated_for_the_steps_that_are_made(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], physical: int | None
) -> None:
    asked: list[tuple[Any, ...]] = []

    def noise(*arguments: Any) -> float:
        asked.append(arguments)
        return 5.0

    monkeypatch.setattr("groundwire.callbacks.privacy.dp_sgd.noise_multiplier_for", noise)
    monkeypatch.setattr("groundwire.callbacks.privacy.dp_sgd.steps_within", lambda *arguments: arguments[4])
    callback = dp(target_epsilon=1.0, noise_multiplier=None, max_physical_batch_size=physical)
    _, t, _ = fit("auto", Classifier(mlp()), callbacks=[callback], **options)
    assert t.global_step == 8
    assert asked == [(1.0, 0.25, 8, DELTA, "gdp")]
    assert callback.noise_multiplier == 5.0


def test_no_noise_can_be_chosen_for_an_endless_run() -> None:
    with pytest.raises(MisconfigurationException, match=r"without an end.*max_steps"):
        fit(
            "auto",
            Classifier(mlp()),
            callbacks=[dp(target_epsilon=1.0, noise_multiplier=None)],
            steps=-1,
            max_epochs=-1,
        )


def test_a_budget_that_does_not_pay_for_one_step() -> None:
    module = Classifier(mlp())
    before = weights(module)
    t = trainer(callbacks=[dp(target_epsilon=0.01)])
    with pytest.raises(MisconfigurationException, match=r"0\.01 does not pay for one step"):
        t.fit(module, loader())
    assert torch.equal(weights(module), before)


def test_unreachable_target() -> None:
    with pytest.raises((UnreachableBudgetError, MisconfigurationException), match="noise"):
        fit(
            "auto",
            Classifier(mlp()),
            callbacks=[dp(target_epsilon=1e-4, noise_multiplier=None, accountant="rdp", target_delta=1e-9)],
            steps=1000,
        )


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan])
def test_epsilon_must_be_positive(epsilon: float) -> None:
    with pytest.raises(ValueError, match="epsilon"):
        DPSGD(target_epsilon=epsilon)


def test_sample_rate_above_one() -> None:
    with pytest.raises(MisconfigurationException, match=r"97 records.*96 records"):
        fit("auto", Classifier(mlp()), loader(batch_size=97), callbacks=[dp(target_epsilon=1.0)])


def test_full_batches_are_accounted_for_exactly() -> None:
    """At a sample rate of 1 it is the plain Gaussian mechanism."""
    callback = dp(noise_multiplier=4.0, accountant="prv", target_delta=1e-6)
    fit("auto", Classifier(mlp()), loader(batch_size=96), callbacks=[callback], steps=50)
    assert callback.privacy_spent().epsilon == pytest.approx(9.482, abs=0.02)  # closed form (Balle and Wang 2018)


def test_epsilon_is_never_negative() -> None:
    """The conversion from Renyi divergences gives negative numbers where delta is large."""
    callback = dp(target_delta=0.5, accountant="rdp")
    with pytest.warns(UserWarning, match="target_delta"):
        fit("auto", Classifier(mlp()), callbacks=[callback], steps=1)
    assert callback.privacy_spent().epsilon == 0.0


def test_little_noise_of_the_gdp_accountant() -> None:
    callback = dp(noise_multiplier=20.0)
    fit("auto", Classifier(mlp()), callbacks=[callback], steps=1)
    assert 0.0 <= callback.privacy_spent().epsilon < 0.1


@pytest.mark.parametrize(("delta", "warned"), [(1 / 96, True), (0.05, True), (1e-3, False), (None, False)])
def test_a_delta_that_protects_nobody_is_warned_of(delta: float | None, warned: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit("auto", Classifier(mlp()), callbacks=[dp(target_delta=delta, accountant="rdp")], steps=1)
    messages = [str(w.message) for w in caught if "target_delta" in str(w.message)]
    assert bool(messages) == warned
    if warned:
        assert f"{delta:.3g}" in messages[0]
        assert f"{1 / 96:.3g}" in messages[0]


def test_noise_of_zero_costs_everything() -> None:
    callback = dp(noise_multiplier=0.0)
    with pytest.warns(UserWarning, match="promises nothing"):
        _, t, _ = fit("auto", Classifier(mlp()), callbacks=[callback], steps=2)
    assert callback.privacy_spent().epsilon == math.inf
    assert float(t.callback_metrics["privacy/epsilon"]) == math.inf


# ---------------------------------------------------------------- checkpoints


class Rates(pl.Callback):
    """The learning rate and the loss of each step."""

    def __init__(self) -> None:
        self.values: list[tuple[int, float, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.values.append((trainer.global_step, rate, float(outputs["loss"])))


def run(
    callback: DPSGD,
    saver: pl.Callback | None = None,
    *,
    steps: int = 9,
    stop: int | None = None,
    ckpt_path: Path | None = None,
    accumulated: int = 1,
    workers: int = 0,
    module: pl.LightningModule | None = None,
    **options: Any,
) -> tuple[Any, pl.Trainer, Rates]:
    """A run of two epochs and a step, perhaps killed, perhaps resumed."""
    rates = Rates()
    module = module if module is not None else Scheduled(mlp())
    callbacks = [
        rates,
        callback,
        *([saver] if saver is not None else []),
        *([Killed(stop)] if stop is not None else []),
    ]
    t = trainer(
        steps=steps,
        callbacks=callbacks,
        accumulate_grad_batches=accumulated,
        enable_checkpointing=isinstance(saver, Checkpoint),
        **options,
    )
    data = loader(batch_size=24 // accumulated)
    data = torch.utils.data.DataLoader(data.dataset, data.batch_size, num_workers=workers)
    with contextlib.suppress(Killed.Error):
        t.fit(module, data, ckpt_path=ckpt_path)
    return module, t, rates


def saved(folder: Path, kind: str, step: int, **options: Any) -> Path:
    """The checkpoint after ``step`` steps of a run that was killed a step later."""
    if kind == "resumable":
        saver: Any = ResumableCheckpoint(folder, every_n_steps=step)
        run(options.pop("callback", None) or dp(), saver, stop=step + 1, **options)
        return folder / "last.ckpt"
    saver = ModelCheckpoint(folder, every_n_train_steps=step, save_top_k=-1, filename="{step}")
    run(options.pop("callback", None) or dp(), saver, stop=step + 1, **options)
    return folder / f"step={step}.ckpt"


@pytest.mark.parametrize("kind", ["resumable", "model"])
@pytest.mark.parametrize("step", [2, 4, 5])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_resumed_equals_uninterrupted(tmp_path: Path, kind: str, step: int, accumulated: int) -> None:
    whole, t, rates = run(dp(), accumulated=accumulated)
    path = saved(tmp_path, kind, step, accumulated=accumulated)
    state = torch.load(path, weights_only=True)
    assert state["callbacks"]["DPSGD"]["steps"] == state["global_step"] == step
    callback = dp()
    module, resumed, resumed_rates = run(callback, ckpt_path=path, accumulated=accumulated)
    assert resumed_rates.values == rates.values[step * accumulated :]
    assert torch.equal(weights(module), weights(whole))
    assert callback.steps == resumed.global_step == t.global_step == 9
    assert callback.privacy_spent().epsilon == spent_epsilon(1.0, 0.25, 9, DELTA, "gdp")


@pytest.mark.parametrize(
    ("options", "run_options"),
    [
        ({"engine": "ghost"}, {}),
        ({"clipping": "adaptive"}, {}),
        ({"max_physical_batch_size": 7}, {}),
        ({}, {"workers": 1}),
        ({}, {"max_epochs": 3, "steps": -1}),
    ],
    ids=["ghost", "adaptive", "physical", "workers", "epochs"],
)
def test_resumed_equals_uninterrupted_with(
    tmp_path: Path, options: dict[str, Any], run_options: dict[str, Any]
) -> None:
    whole, t, _ = run(dp(**options), **run_options)
    path = saved(tmp_path, "model", 3, callback=dp(**options), **run_options)
    module, resumed, _ = run(dp(**options), ckpt_path=path, **run_options)
    assert resumed.global_step == t.global_step
    assert torch.equal(weights(module), weights(whole))
    if "clipping" in options:
        for name in ("privacy/max_grad_norm", "privacy/epsilon"):
            assert resumed.callback_metrics[name] == t.callback_metrics[name]


def test_a_checkpoint_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    """Lightning saves it in another place than within an epoch."""
    whole, _, _ = run(dp(), steps=-1, max_epochs=3)
    saver = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    run(dp(), saver, steps=-1, max_epochs=3, stop=10)
    for epoch, step in ((0, 4), (1, 8)):
        callback = dp()
        module, t, rates = run(callback, steps=-1, max_epochs=3, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert len(rates.values) == 12 - step
        assert callback.steps == t.global_step == 12
        assert torch.equal(weights(module), weights(whole))


def test_secret_noise_is_fresh_after_a_resume_and_still_counted(tmp_path: Path) -> None:
    path = saved(tmp_path, "model", 3, callback=dp(reproducible=False))
    assert "seed" not in torch.load(path, weights_only=True)["callbacks"]["DPSGD"]
    ends = []
    for _ in range(2):
        callback = dp(reproducible=False)
        module, _, rates = run(callback, ckpt_path=path)
        ends.append(weights(module))
        assert len(rates.values) == 6
        assert callback.privacy_spent().epsilon == spent_epsilon(1.0, 0.25, 9, DELTA, "gdp")
    assert not torch.allclose(ends[0], ends[1], atol=1e-3)


def test_the_seed_of_the_first_run_goes_on(tmp_path: Path, seeded: Any) -> None:
    seeded(5)
    whole, _, _ = run(dp())
    path = saved(tmp_path, "model", 3)
    seeded(6)
    module, _, _ = run(dp(), ckpt_path=path)
    assert torch.equal(weights(module), weights(whole))


def test_calibrated_noise_is_kept(tmp_path: Path) -> None:
    options: Any = {"target_epsilon": 1.0, "noise_multiplier": None, "accountant": "rdp"}
    first = dp(**options)
    whole, _, _ = run(first)
    path = saved(tmp_path, "model", 3, callback=dp(**options))
    callback = dp(**options)
    module, _, _ = run(callback, ckpt_path=path)
    assert callback.noise_multiplier == first.noise_multiplier
    assert torch.equal(weights(module), weights(whole))
    longer = dp(**options)
    _, t, _ = run(longer, ckpt_path=path, steps=12)  # the noise was for nine steps
    assert longer.noise_multiplier == first.noise_multiplier
    assert t.global_step == 9
    assert longer.privacy_spent().epsilon <= 1.0


def test_a_spent_budget_trains_no_step(tmp_path: Path) -> None:
    options: Any = {"target_epsilon": 1.5, "noise_multiplier": 1.5}
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    first = dp(**options)
    module, t, _ = run(first, saver, steps=40)
    assert t.global_step < 40
    path = tmp_path / f"step={t.global_step}.ckpt"
    for steps in (40, 400):
        callback = dp(**options)
        again, resumed, rates = run(callback, steps=steps, ckpt_path=path)
        assert rates.values == []
        assert resumed.global_step == callback.steps == first.steps
        assert torch.equal(weights(again), weights(module))
    with pytest.raises(PrivacyBudgetExhausted):
        run(dp(**options), steps=40, ckpt_path=path, min_steps=30)
    richer = dp(target_epsilon=2.0, noise_multiplier=1.5)
    _, resumed, _ = run(richer, steps=40, ckpt_path=path)
    assert resumed.global_step > first.steps
    assert spent_epsilon(1.5, 0.25, resumed.global_step, DELTA, "gdp") <= 2.0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"noise_multiplier": 2.0}, "noise_multiplier was 1.0 and is now 2.0"),
        ({"target_delta": 1e-4}, "target_delta was 0.001 and is now 0.0001"),
        ({"max_grad_norm": 2.0}, "max_grad_norm was 1.0 and is now 2.0"),
        ({"clipping": "per_layer"}, "clipping was 'flat' and is now 'per_layer'"),
        ({"accountant": "rdp"}, "accountant was 'gdp' and is now 'rdp'"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    path = saved(tmp_path, "model", 3)
    with pytest.raises(CheckpointMismatchError, match=named):
        run(dp(**options), ckpt_path=path)


def test_other_data_or_batches_are_refused_by_name(tmp_path: Path) -> None:
    path = saved(tmp_path, "model", 3)
    for data, named in (
        (loader(batch_size=12), "logical_batch was 24 and is now 12"),
        (loader(samples=120), "num_records was 96 and is now 120"),
    ):
        t = trainer(steps=9, callbacks=[dp()])
        with pytest.raises(CheckpointMismatchError, match=named):
            t.fit(Scheduled(mlp()), data, ckpt_path=path)
    several = dp(noise_multiplier=2.0, max_grad_norm=3.0)
    with pytest.raises(CheckpointMismatchError, match=r"noise_multiplier.*max_grad_norm"):
        run(several, ckpt_path=path)


def test_the_engine_may_change(tmp_path: Path) -> None:
    whole, _, _ = run(dp())
    path = saved(tmp_path, "model", 3)
    module, _, _ = run(dp(engine="hooks"), ckpt_path=path)
    torch.testing.assert_close(weights(module), weights(whole), rtol=0, atol=1e-5)


@pytest.mark.parametrize("step", [3, 4])
@pytest.mark.parametrize(("options", "accumulated"), [({"max_physical_batch_size": 7}, 1), ({}, 2)])
def test_other_physical_batches_change_nothing_or_are_refused(
    tmp_path: Path, options: dict[str, Any], accumulated: int, step: int
) -> None:
    """Lightning counts physical batches: a step must not be resumed in the middle because of that."""
    whole, _, _ = run(dp())
    path = saved(tmp_path, "model", step)
    callback = dp(**options)
    try:
        module, _, _ = run(callback, accumulated=accumulated, ckpt_path=path)
    except MisconfigurationException:
        return
    assert callback.steps == 9
    torch.testing.assert_close(weights(module), weights(whole), rtol=0, atol=1e-5)


def test_weights_that_were_trained_without_privacy_are_warned_of(tmp_path: Path) -> None:
    plain = trainer(steps=3)
    module = Scheduled(mlp())
    plain.fit(module, loader())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    callback = dp()
    with pytest.warns(UserWarning, match="3 steps without DPSGD"):
        _, t, _ = run(callback, ckpt_path=tmp_path / "plain.ckpt")
    assert (t.global_step, callback.steps) == (9, 6)
    assert callback.privacy_spent().epsilon == spent_epsilon(1.0, 0.25, 6, DELTA, "gdp")


def test_calibration_counts_private_steps_only(tmp_path: Path) -> None:
    plain = trainer(steps=3)
    plain.fit(Scheduled(mlp()), loader())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    callback = dp(target_epsilon=1.0, noise_multiplier=None, accountant="rdp")
    with pytest.warns(UserWarning, match="without DPSGD"):
        run(callback, ckpt_path=tmp_path / "plain.ckpt")
    assert callback.noise_multiplier == noise_multiplier_for(1.0, 0.25, 6, DELTA, "rdp")
    assert callback.steps == 6


def test_a_checkpoint_loads_without_the_callback(tmp_path: Path) -> None:
    path = saved(tmp_path, "model", 3)
    t = trainer(steps=9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        t.fit(Scheduled(mlp()), loader(), ckpt_path=path)
    assert t.global_step == 9
    state = torch.load(path, weights_only=True)
    fresh = copy.deepcopy(Scheduled(mlp()))
    fresh.load_state_dict(state["state_dict"])  # the names are those of the module alone


def test_a_checkpoint_after_the_fit_holds_what_was_spent(tmp_path: Path) -> None:
    callback = dp()
    _, t, _ = run(callback)
    t.save_checkpoint(tmp_path / "end.ckpt")
    state = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]["DPSGD"]
    assert state["steps"] == 9
    assert (state["noise_multiplier"], state["target_delta"], state["num_records"]) == (1.0, DELTA, 96)


def test_a_checkpoint_of_a_checkpoint_without_training(tmp_path: Path) -> None:
    """A run that is resumed and validated only must not forget what was spent."""
    path = saved(tmp_path, "model", 3)
    callback = dp()
    t = trainer(steps=3, callbacks=[callback])
    t.fit(Scheduled(mlp()), loader(), ckpt_path=path)  # nothing left to do
    t.save_checkpoint(tmp_path / "again.ckpt")
    assert torch.load(tmp_path / "again.ckpt", weights_only=True)["callbacks"]["DPSGD"]["steps"] == 3
