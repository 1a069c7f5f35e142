"""What a run could do, on purpose or not, to make its claim untrue; each is stopped, counted or said."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from hashlib import blake2b
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from scipy.stats import kstest
from torch import Tensor, nn

from groundwire.callbacks.privacy import DPSGD, PrivacyBudgetExhausted
from groundwire.callbacks.privacy.dp_sgd import _GaussianNoise
from groundwire.callbacks.privacy.sampling import PoissonSampler
from groundwire.plugins.errors import CheckpointMismatchError
from groundwire.plugins.privacy import spent_epsilon
from groundwire.plugins.random import secret_generator, stream
from helpers.callbacks import Evaluated
from helpers.edge import Classifier, fit, loader, mlp, trainer, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*[Gg][Dd][Pp]", "ignore:DPSGD with noise_multiplier=0"),
    pytest.mark.usefixtures("seed_of_the_run"),
]
DELTA = 1e-3


def dp(**options: Any) -> DPSGD:
    defaults = {
        "noise_multiplier": 1.0,
        "accountant": "rdp",
        "reproducible": True,
        "target_delta": DELTA,
        "probe": False,
    }
    return DPSGD(**(defaults | options))


def sgd() -> Classifier:
    return Classifier(mlp(), "SGD", 0.5)


def spent(steps: int, noise_multiplier: float = 1.0) -> float:
    return spent_epsilon(noise_multiplier, 0.25, steps, DELTA, "rdp")


# ---------------------------------------------------------------- steps that were made with other settings


class Growing(Classifier):
    """Has more records from an epoch on."""

    def train_dataloader(self) -> Any:
        return loader(samples=96 if self.current_epoch < 2 else 960)


def test_a_reloaded_train_loader_of_another_size_is_refused() -> None:
    callback, module = dp(), Growing(mlp(), "SGD", 0.5)
    t = trainer(steps=20, callbacks=[callback], reload_dataloaders_every_n_epochs=1)
    with pytest.raises(CheckpointMismatchError, match=r"steps so far.*num_records was 96 and is now 960"):
        t.fit(module)
    assert callback.steps == 8


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"samples": 960}, "num_records was 96 and is now 960"),
        ({"batch_size": 12}, "logical_batch was 24 and is now 12"),
    ],
)
def test_a_second_fit_on_other_data_is_refused(data: dict[str, int], named: str) -> None:
    callback, module = dp(), sgd()
    t = trainer(steps=4, callbacks=[callback])
    t.fit(module, loader())
    t.fit_loop.epoch_loop.max_steps = 8
    with pytest.raises(CheckpointMismatchError, match=named):
        t.fit(module, loader(**data))
    assert callback.steps == 4


class Quietens(pl.Callback):
    """Changes the noise of the second fit, after the train loader was taken."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step:
            trainer.callbacks[1].noise_multiplier = 2.0


@pytest.mark.parametrize("late", [True, False])
def test_settings_changed_between_two_fits_are_refused(late: bool) -> None:
    callback, module = dp(), sgd()
    t = trainer(steps=4, callbacks=[Quietens() if late else pl.Callback(), callback])
    t.fit(module, loader())
    t.fit_loop.epoch_loop.max_steps = 8
    if not late:
        callback.noise_multiplier = 2.0
    with pytest.raises(CheckpointMismatchError, match=r"noise_multiplier was 1\.0 and is now 2\.0"):
        t.fit(module, loader())
    assert callback.steps == 4


def test_a_fresh_trainer_may_have_other_data() -> None:
    callback = dp()
    fit("auto", sgd(), callbacks=[callback], steps=4)
    fit("auto", sgd(), loader(samples=960), callbacks=[callback], steps=4)
    assert callback.privacy_spent().epsilon == spent_epsilon(1.0, 0.025, 4, DELTA, "rdp")


# ---------------------------------------------------------------- a step that was given up


class GivesUp(Classifier):
    """Ends the first epoch in the middle of its second step."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if self.trainer.current_epoch == 0 and batch_idx == 3 else None


class Released(pl.Callback):
    def __init__(self) -> None:
        self.gradients: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]).clone())


@pytest.mark.parametrize("options", [{"noise_multiplier": 0.0}, {"noise_multiplier": 0.1, "clipping": "adaptive"}])
def test_records_of_a_step_that_was_given_up_are_not_released_twice(options: dict[str, Any]) -> None:
    whole, broken = Released(), Released()
    run: Any = {"steps": 4, "accumulate_grad_batches": 2}
    fit("auto", sgd(), loader(batch_size=12), callbacks=[dp(**options), whole], **run)
    callback = dp(**options)
    fit("auto", GivesUp(mlp(), "SGD", 0.5), loader(batch_size=12), callbacks=[callback, broken], **run)
    assert callback.steps == 4
    torch.testing.assert_close(broken.gradients, whole.gradients, rtol=0, atol=0)


# ---------------------------------------------------------------- beyond the plan


class Extends(pl.Callback):
    """Raises the number of epochs in the last one that was planned."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.fit_loop.max_epochs = self.epochs


def test_a_plan_that_grows_does_not_exceed_the_budget() -> None:
    callback = dp(target_epsilon=2.0, noise_multiplier=None)
    t = trainer(steps=-1, max_epochs=2, callbacks=[callback, Extends(20)])
    with pytest.raises(PrivacyBudgetExhausted, match="more epochs than were planned"):
        t.fit(sgd(), loader())
    assert callback.steps == t.global_step == 8
    assert 1.9 < callback.privacy_spent().epsilon <= 2.0


def test_a_plan_that_grows_within_the_budget_goes_on_to_its_end() -> None:
    callback = dp(target_epsilon=2.0, noise_multiplier=1.5)
    allowed = next(n for n in range(1, 99) if spent(n + 1, 1.5) > 2.0)
    assert 4 < allowed < 80
    _, t, _ = fit("auto", sgd(), steps=-1, max_epochs=1, callbacks=[callback, Extends(allowed)])
    assert callback.steps == t.global_step == allowed
    assert callback.privacy_spent().epsilon == pytest.approx(spent(allowed, 1.5))


# ---------------------------------------------------------------- noise that cannot be guessed


def test_noise_has_more_than_32_bits_of_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's generator of the CPU takes the low half of its seed: secrets that agree there gave the same noise."""
    monkeypatch.setattr(
        "groundwire.plugins.random.hashlib.blake2b", lambda text, digest_size: _Reads(text, digest_size)
    )
    low, high = (stream(s << 32, purpose="", round=0) for s in (3, 5))
    assert torch.equal(torch.randn(9, generator=low), torch.randn(9, generator=high))
    secrets = [7, 7 + (1 << 32), 7 + (1 << 64), 7 + (1 << 127)]
    noises = [_GaussianNoise(s, "gradient", 0)(torch.zeros(9)) for s in secrets]
    draws = [PoissonSampler(1000, 100, 1, seed=s, next_batch=lambda: (0, 0)).draw(0) for s in secrets]
    assert len({tuple(n.tolist()) for n in noises}) == len({tuple(d.tolist()) for d in draws}) == len(secrets)


class _Reads:
    """In place of a hash: the seed's own bits."""

    def __init__(self, text: bytes, digest_size: int) -> None:
        self.bits, self.size = int(text.split(b"/")[0]), digest_size

    def digest(self) -> bytes:
        return (self.bits % (1 << 8 * self.size)).to_bytes(self.size, "big")


def test_the_secret_has_128_bits() -> None:
    seeds = []
    for _ in range(6):
        callback = dp(reproducible=False)
        fit("auto", sgd(), callbacks=[callback], steps=1)
        seeds.append(callback._seed)
    assert 1 << 110 < max(seeds) < 1 << 128  # all six below has a chance of 2^-108
    assert len(set(seeds)) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_noise_is_normal_and_new_for_each_parameter_step_and_purpose(dtype: torch.dtype) -> None:
    def draw(purpose: str = "gradient", step: int = 0) -> list[Tensor]:
        noise = _GaussianNoise(11, purpose, step)
        return [noise(torch.zeros(shape, dtype=dtype)) for shape in ((100, 60), (), (0, 3), (100, 60))]

    first = draw()
    assert [x.dtype for x in first] == [dtype] * 4
    assert [tuple(x.shape) for x in first] == [(100, 60), (), (0, 3), (100, 60)]
    assert all(torch.equal(a, b) for a, b in zip(first, draw(), strict=True))
    others = [first[0], first[3], draw("other")[0], draw(step=1)[0]]
    for x in others:
        assert kstest(x.double().flatten().numpy(), "norm").pvalue > 1e-4 or dtype == torch.bfloat16
        assert abs(x.double().square().mean() - 1) < 5 * math.sqrt(2 / x.numel())
    correlations = np.corrcoef(torch.stack(others).double().view(4, -1).numpy()) - np.eye(4)
    assert abs(correlations).max() < 5 / math.sqrt(6000)


# ---------------------------------------------------------------- what the guarantee does not cover


def caught(module: pl.LightningModule, *callbacks: pl.Callback, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fit("auto", module, callbacks=list(callbacks), **options)
    return [str(w.message) for w in found]


class OnPlateau(Evaluated):
    """The learning rate follows a metric."""

    monitor = "train/loss"

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": self.monitor}}


class WithVal(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader()


@pytest.mark.parametrize("monitor", ["train/loss", "val/loss"])
def test_a_learning_rate_that_follows_a_training_metric_is_warned_of(monitor: str) -> None:
    module = OnPlateau(mlp())
    module.monitor = monitor
    said = [m for m in caught(module, dp(), data=WithVal()) if "ReduceLROnPlateau monitors" in m]
    assert len(said) == (monitor == "train/loss")
    assert all("'train/loss'" in m for m in said)


@pytest.mark.parametrize("monitor", ["train/loss", "val/loss"])
def test_a_training_metric_that_ends_the_run_is_warned_of(monitor: str) -> None:
    messages = caught(Evaluated(mlp()), dp(), EarlyStopping(monitor), data=WithVal())
    said = [m for m in messages if "EarlyStopping monitors" in m]
    assert len(said) == (monitor == "train/loss")
    assert all("'train/loss'" in m for m in said)


def again(callback: DPSGD, module: pl.LightningModule, steps: int = 4, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer(steps=steps, callbacks=[callback]).fit(module, loader(), **options)
    return [str(w.message) for w in found if "before, for epsilon" in str(w.message)]


def test_a_module_that_is_trained_anew_keeps_what_it_knows_and_that_is_said() -> None:
    callback, module = dp(), sgd()
    assert again(callback, module) == []
    assert f"epsilon {spent(4):.4g}" in again(callback, module)[0]
    assert f"epsilon {2 * spent(4):.4g}" in again(callback, module, steps=8)[0]
    assert again(callback, copy.deepcopy(module)) == []
    assert callback.privacy_spent().epsilon == spent(4)


def test_a_failed_start_does_not_make_the_earlier_run_forgotten() -> None:
    callback, module = dp(), sgd()
    again(callback, module)
    with pytest.raises(MisconfigurationException, match="overfit_batches"):
        trainer(callbacks=[callback], overfit_batches=1).fit(module, loader())
    with pytest.raises(MisconfigurationException, match="sample rate"):
        trainer(callbacks=[callback]).fit(module, loader(batch_size=97))
    assert f"epsilon {spent(4):.4g}" in again(callback, module)[0]


def test_a_resumed_run_counts_its_checkpoint_and_says_nothing(tmp_path: Path) -> None:
    callback, module = dp(), sgd()
    t = trainer(steps=4, callbacks=[callback])
    t.fit(module, loader())
    t.save_checkpoint(tmp_path / "four.ckpt")
    assert again(callback, module, steps=6, ckpt_path=tmp_path / "four.ckpt") == []
    assert callback.privacy_spent().epsilon == spent(6)
    assert f"epsilon {spent(6):.4g}" in again(callback, module)[0]  # of which four were those of the checkpoint


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluating_an_older_checkpoint_takes_nothing_back(tmp_path: Path, stage: str) -> None:
    class Tested(Evaluated):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.validation_step(batch, batch_idx)

    callback, module = dp(), Tested(mlp(), "SGD", 0.5)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    t = trainer(steps=6, callbacks=[callback, saver], enable_checkpointing=True)
    t.fit(module, WithVal())
    getattr(t, stage)(module, loader(), ckpt_path=tmp_path / "step=2.ckpt")
    assert callback.privacy_spent().epsilon == spent(6)
    t.fit_loop.epoch_loop.max_steps = 8
    t.fit(module, WithVal())
    assert callback.steps == 8
    assert callback.privacy_spent().epsilon == spent(8)


def test_a_checkpoint_that_was_only_evaluated_is_saved_with_what_it_spent(tmp_path: Path) -> None:
    first = dp(target_epsilon=2.0, noise_multiplier=None)
    t = trainer(steps=4, callbacks=[first])
    t.fit(Evaluated(mlp(), "SGD", 0.5), loader())
    t.save_checkpoint(tmp_path / "a.ckpt")
    t = trainer(callbacks=[dp(target_epsilon=2.0, noise_multiplier=None)])
    t.validate(Evaluated(mlp(), "SGD", 0.5), loader(), ckpt_path=tmp_path / "a.ckpt")
    t.save_checkpoint(tmp_path / "b.ckpt")
    t = trainer(steps=4, callbacks=[dp(target_epsilon=2.0, noise_multiplier=None)])
    t.fit(sgd(), loader(), ckpt_path=tmp_path / "a.ckpt")  # nothing left to do
    t.save_checkpoint(tmp_path / "c.ckpt")
    a, b, c = (torch.load(tmp_path / f"{n}.ckpt", weights_only=True)["callbacks"]["DPSGD"] for n in "abc")
    assert a == b == c
    assert a["steps"] == 4


# ---------------------------------------------------------------- the last number


class Stops(pl.Callback):
    def __init__(self, where: str) -> None:
        self.where = where

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if self.where == "batch" and trainer.global_step == 57:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.where == "epoch" and trainer.global_step == 56:
            trainer.should_stop = True


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("where", "steps"), [("batch", 57), ("epoch", 56)])
def test_a_run_that_is_ended_early_logs_all_that_it_spent(tmp_path: Path, where: str, steps: int, first: bool) -> None:
    callback, logger = dp(), CSVLogger(tmp_path)
    callbacks = [Stops(where), callback] if first else [callback, Stops(where)]
    t = trainer(steps=2000, callbacks=callbacks, logger=logger, log_every_n_steps=1)
    t.fit(sgd(), loader())
    assert t.global_step == steps
    assert callback.epsilon == spent(steps)
    if where == "batch" and first:
        assert float(t.progress_bar_metrics["privacy/epsilon"]) == pytest.approx(spent(steps), rel=1e-6)
    assert float(t.callback_metrics["privacy/epsilon"]) == pytest.approx(spent(steps), rel=1e-6)
    rows = np.genfromtxt(Path(logger.log_dir) / "metrics.csv", delimiter=",", names=True, deletechars="")
    logged = rows["privacy/epsilon"]
    assert logged[~np.isnan(logged)][-1] == pytest.approx(spent(steps), rel=1e-6)


# ---------------------------------------------------------------- what is refused, and what is said


def test_reproducible_without_a_seed_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = sgd()
    t = trainer(steps=2, callbacks=[dp()])
    t.fit(module, loader())
    t.save_checkpoint(tmp_path / "two.ckpt")
    whole, _, _ = fit("auto", sgd(), callbacks=[dp()], steps=4)
    monkeypatch.delenv("PL_GLOBAL_SEED")
    before = weights(module)
    with pytest.raises(MisconfigurationException, match="seed_everything"):
        trainer(callbacks=[dp()]).fit(module, loader())
    assert torch.equal(weights(module), before)
    trainer(steps=4, callbacks=[dp()]).fit(module, loader(), ckpt_path=tmp_path / "two.ckpt")  # which has the seed
    assert torch.equal(weights(module), whole)
    fit("auto", sgd(), callbacks=[dp(reproducible=False)], steps=1)


@pytest.mark.parametrize("reproducible", [True, False])
def test_noise_that_is_no_secret_is_announced(reproducible: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit("auto", sgd(), callbacks=[dp(reproducible=reproducible)], steps=2)
    assert sum("is no secret" in r.getMessage() for r in caplog.records) == reproducible


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_ghost_clipping_in_half_precision_is_refused(precision: Any) -> None:
    with pytest.raises(MisconfigurationException, match=f"precision='{precision}' a record may exceed"):
        fit("auto", sgd(), callbacks=[dp(engine="ghost")], precision=precision)


class Swaps(pl.Callback):
    """Freezes one parameter and unfreezes another."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.network[0].weight.requires_grad_(trainer.global_step >= 2)
        pl_module.network[2].weight.requires_grad_(trainer.global_step < 2)


def test_a_parameter_that_takes_the_place_of_another_is_observed() -> None:
    seen: list[set[str]] = []

    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            names = dict(pl_module.named_parameters())
            assert callback._gradients is not None
            seen.append({n for n in names if n in callback._gradients.parameters})

    callback, module = dp(noise_multiplier=0), sgd()
    module.network[0].weight.requires_grad_(False)
    before = module.network[0].weight.clone()
    trainer(steps=4, callbacks=[Swaps(), callback, Looks()]).fit(module, loader())
    assert ["network.0.weight" in names for names in seen] == [False, False, True, True]
    assert ["network.2.weight" in names for names in seen] == [True, True, False, False]
    assert not torch.equal(module.network[0].weight, before)


class BackwardOfItsOwn(pl.Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.strategy.backward(nn.functional.cross_entropy(pl_module(batch[0]), batch[1]), None)


def test_a_backward_pass_outside_of_a_step_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"outside of a training step.*torch\.autograd\.grad"):
        fit("auto", sgd(), callbacks=[dp(), BackwardOfItsOwn()])


def test_all_words_of_the_noise_s_generator_come_from_128_bits() -> None:
    """Its numbers are those of NumPy's Mersenne Twister in the same state, which a seed of 32 bits would not reach."""
    digest = int.from_bytes(blake2b(f"{1 << 120}/noise/-1/3".encode(), digest_size=16).digest(), "big")
    raw = np.random.MT19937(np.random.SeedSequence(digest)).random_raw(1001)[1:]  # NumPy begins at the last word
    generator = secret_generator(1 << 120, purpose="noise", round=3)
    drawn = torch.empty(1000, dtype=torch.int32).random_(generator=generator)
    assert drawn.tolist() == [int(word) % (1 << 31) for word in raw]
