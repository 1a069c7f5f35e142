from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from groundwire.callbacks.adversarial import PGD, AdversarialTraining, ThreatModel
from groundwire.callbacks.privacy import DPSGD
from groundwire.callbacks.privacy.sampling import PoissonSampler
from groundwire.plugins.errors import NonFiniteUpdateError
from groundwire.plugins.privacy import spent_epsilon
from helpers.callbacks import (
    Evaluated,
    Penalty,
    PenaltyWrittenIn,
    loader_of_dicts,
    returning_dicts,
    state_of,
    taking_dicts,
)
from helpers.edge import CLASSES, FEATURES, Classifier, fit, loader, mlp, trainer, weights

ENGINES = ["bookkeeping", "ghost", "hooks", "functorch"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*[Gg][Dd][Pp]", "ignore:DPSGD with noise_multiplier=0"),
    pytest.mark.usefixtures("seed_of_the_run"),
]

EXACT = {"rtol": 0.0, "atol": 1e-6}


def dp(**options: Any) -> DPSGD:
    """Draws that a test can repeat, and the one accountant that takes no time."""
    return DPSGD(**({"noise_multiplier": 1.0, "accountant": "gdp", "reproducible": True} | options))


def draws(steps: int, records: int = 96, batch: int = 24, seed: int = 0) -> list[Tensor]:
    """The records of each step."""
    sampler = PoissonSampler(records, batch, 1, seed=seed, next_batch=lambda: (0, 0))
    return [sampler.draw(step) for step in range(steps)]


class Gradients(pl.Callback):
    """Keeps the gradient that each step's optimizer is about to see, and the weights before it."""

    def __init__(self) -> None:
        self.raw: list[bool] = []
        self.before: list[Tensor] = []
        self.after: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.sizes: list[int] = []

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.raw.append(any(p.grad is not None for p in pl_module.parameters()))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.before.append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]).clone())
        self.weights.append(weights(pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.sizes.append(len(batch[0]))
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.after.append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]).clone())


def by_hand(
    module: Classifier,
    data: DataLoader[Any],
    steps: int,
    max_grad_norm: float,
    *,
    batch: int = 24,
    optimizer: Any = None,
) -> Tensor:
    """DP-SGD without noise, one record at a time; records whose gradient is not finite do not count."""
    module = copy.deepcopy(module)
    x, y = data.dataset.tensors
    x = x.to(next(module.parameters()).dtype)
    parameters = [p for p in module.parameters() if p.requires_grad]
    opt = (optimizer or partial(torch.optim.SGD, lr=0.5))(parameters)
    for drawn in draws(steps, len(x), batch):
        total = [torch.zeros_like(p) for p in parameters]
        for i in drawn:
            grads = torch.autograd.grad(F.cross_entropy(module(x[i : i + 1]), y[i : i + 1]), parameters)
            norm = torch.cat([g.flatten() for g in grads]).norm()
            if torch.isfinite(norm):
                for t, g in zip(total, grads, strict=True):
                    t += g * min(1.0, max_grad_norm / (float(norm) + 1e-6))
        for p, t in zip(parameters, total, strict=True):
            p.grad = t / batch
        opt.step()
    return weights(module)


def sgd(**options: Any) -> Classifier:
    return Classifier(mlp(), "SGD", **({"lr": 0.5} | options))


class Momentum(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


# ---------------------------------------------------------------- what a step is


@pytest.mark.parametrize(("optimizer", "atol"), [("SGD", 1e-6), ("Adam", 1e-5)])
def test_without_noise_and_clipping_full_batches_equal_the_plain_trainer(optimizer: str, atol: float) -> None:
    module = Classifier(mlp(), optimizer, lr=0.1)
    plain, _, losses = fit("auto", module, loader(batch_size=96), steps=10)
    private, _, private_losses = fit(
        "auto", module, loader(batch_size=96), steps=10, callbacks=[dp(noise_multiplier=0, max_grad_norm=1e9)]
    )
    torch.testing.assert_close(private, plain, rtol=0, atol=atol)
    assert private_losses == pytest.approx(losses, abs=1e-5)
    assert not torch.allclose(plain, weights(module), atol=1e-2)


@pytest.mark.parametrize("max_grad_norm", [0.3, 1.0, 30.0])
def test_equals_a_loop_over_single_records(max_grad_norm: float) -> None:
    module = Momentum(mlp()).double()
    private, _, _ = fit(
        "auto",
        module,
        steps=9,
        precision="64-true",
        callbacks=[dp(noise_multiplier=0, max_grad_norm=max_grad_norm)],
    )
    expected = by_hand(module, loader(), 9, max_grad_norm, optimizer=partial(torch.optim.SGD, lr=0.5, momentum=0.9))
    torch.testing.assert_close(private, expected, rtol=0, atol=1e-10)
    unclipped = by_hand(module, loader(), 9, 1e9, optimizer=partial(torch.optim.SGD, lr=0.5, momentum=0.9))
    assert torch.allclose(private, unclipped, atol=1e-6) == (max_grad_norm == 30.0)


@pytest.mark.parametrize("engine", ENGINES)
def test_frozen_parameters_do_not_count(engine: Any) -> None:
    module = sgd()
    module.network[0].bias.requires_grad_(False)
    module.network[2].weight.requires_grad_(False)
    end, _, _ = fit("auto", module, callbacks=[dp(noise_multiplier=0, max_grad_norm=0.1, engine=engine)])
    torch.testing.assert_close(end, by_hand(module, loader(), 6, 0.1), **EXACT)


@pytest.mark.parametrize("engine", ENGINES)
def test_recomputed_activations_change_nothing(engine: Any) -> None:
    class Checkpointed(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.network, x, use_reentrant=False)

    end, _, _ = fit("auto", Checkpointed(mlp(), "SGD", 0.5), callbacks=[dp(engine=engine)])
    expected, _, _ = fit("auto", sgd(), callbacks=[dp()])
    torch.testing.assert_close(end, expected, **EXACT)


def test_equals_opacus_by_hand() -> None:
    module, (x, y) = sgd(), loader().dataset.tensors
    private, _, _ = fit("auto", module, steps=9, callbacks=[dp(noise_multiplier=0, max_grad_norm=0.5)])
    theirs = copy.deepcopy(module)
    net = GradSampleModule(theirs.network)
    optimizer = DPOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.5), noise_multiplier=0.0, max_grad_norm=0.5, expected_batch_size=24
    )
    for drawn in draws(9):
        optimizer.zero_grad()
        F.cross_entropy(net(x[drawn]), y[drawn]).backward()
        optimizer.step()
    torch.testing.assert_close(private, weights(theirs), **EXACT)


@pytest.mark.parametrize("clipping", ["flat", "per_layer", "adaptive"])
def test_engines_agree_with_noise_on(clipping: Any) -> None:
    engines = ENGINES if clipping != "per_layer" else [e for e in ENGINES if e != "ghost"]
    ends = [fit("auto", sgd(), callbacks=[dp(engine=e, clipping=clipping, max_grad_norm=0.5)])[0] for e in engines]
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], **EXACT)
    other = fit("auto", sgd(), callbacks=[dp(clipping=clipping, max_grad_norm=0.5, noise_multiplier=0.9)])[0]
    assert not torch.allclose(other, ends[0], atol=1e-4)


@pytest.mark.parametrize("engine", ["auto", "ghost"])
def test_accumulated_batches_do_not_change_a_step(engine: Any) -> None:
    ends = []
    for k in (1, 2, 3, 4):
        callback = dp(engine=engine, max_grad_norm=0.5)
        end, t, _ = fit(
            "auto", sgd(), loader(batch_size=24 // k), callbacks=[callback], accumulate_grad_batches=k, steps=6
        )
        assert t.global_step == callback.steps == 6
        ends.append(end)
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], **EXACT)


def test_largest_physical_batch_is_kept_and_changes_nothing() -> None:
    free, bound, seen = dp(), dp(max_physical_batch_size=5), Gradients()
    expected, _, _ = fit("auto", sgd(), callbacks=[free], steps=9)
    end, t, _ = fit("auto", sgd(), callbacks=[bound, seen], steps=9)
    torch.testing.assert_close(end, expected, **EXACT)
    assert max(seen.sizes) <= 5
    assert sum(seen.sizes) == sum(len(drawn) for drawn in draws(9)) + seen.sizes.count(0)
    assert (t.global_step, t.accumulate_grad_batches) == (9, 1)
    assert bound.privacy_spent().epsilon == free.privacy_spent().epsilon


class NoGradient(Classifier):
    """All that the optimizer sees is noise."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(FEATURES, 50), "SGD", lr=0.0)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return 0.0 * self(batch[0]).mean()


@pytest.mark.parametrize("accumulated", [1, 2])
def test_noise_has_the_scale_that_the_accountant_counts_on(accumulated: int) -> None:
    seen, sigma, norm, steps = Gradients(), 2.0, 3.0, 200
    callback = dp(noise_multiplier=sigma, max_grad_norm=norm)
    data = loader(batch_size=24 // accumulated)
    fit("auto", NoGradient(), data, callbacks=[callback, seen], steps=steps, accumulate_grad_batches=accumulated)
    noise = torch.stack(seen.before).double() * 24 / (sigma * norm)
    n = noise.numel()
    assert noise.shape == (steps, 50 * FEATURES + 50)
    assert abs(noise.mean()) < 5 / math.sqrt(n)
    assert abs(noise.square().mean() - 1) < 5 * math.sqrt(2 / n)
    for wrong in (0.5, 2.0):  # a scale that is off by the square root of two
        assert abs(noise.square().mean() / wrong - 1) > 5 * math.sqrt(2 / n)
    # fresh in each step, and for each parameter
    assert abs((noise[1:] * noise[:-1]).mean()) < 5 / math.sqrt(n - noise.shape[1])
    assert abs((noise[:, 1:] * noise[:, :-1]).mean()) < 5 / math.sqrt(n - steps)
    assert abs((noise[:, :50] * noise[:, -50:]).mean()) < 5 / math.sqrt(50 * steps)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("accumulated", [1, 3])
def test_empty_draws_are_steps(engine: Any, accumulated: int) -> None:
    module, data = sgd().double(), loader(batch_size=1, samples=60 if accumulated == 3 else 20)
    batch, steps = accumulated, 25
    sizes = [len(drawn) for drawn in draws(steps, len(data.dataset), batch)]
    assert 0 in sizes or accumulated == 3
    assert min(sizes) < accumulated
    callback = dp(noise_multiplier=0, max_grad_norm=0.5, engine=engine)
    end, t, _ = fit(
        "auto",
        module,
        data,
        callbacks=[callback],
        steps=steps,
        precision="64-true",
        accumulate_grad_batches=accumulated,
    )
    assert t.global_step == callback.steps == steps
    torch.testing.assert_close(end, by_hand(module, data, steps, 0.5, batch=batch), rtol=0, atol=1e-9)


def test_empty_draws_get_noise() -> None:
    seen = Gradients()
    data = loader(batch_size=1, samples=20)
    fit("auto", sgd(), data, callbacks=[dp(max_grad_norm=0.5, accountant="rdp"), seen], steps=25)
    sizes = [len(drawn) for drawn in draws(25, 20, 1)]
    empty = torch.stack([g for g, size in zip(seen.before, sizes, strict=True) if size == 0]).double() / 0.5
    assert len(empty) >= 3
    assert abs(empty.square().mean() - 1) < 5 * math.sqrt(2 / empty.numel())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_record_without_a_finite_gradient_is_left_out(engine: Any, value: float) -> None:
    x, y = loader().dataset.tensors
    x = x.clone()
    x[5], x[50, 3] = value, value
    data = DataLoader(TensorDataset(x, y), batch_size=24)
    assert sum(5 in drawn for drawn in draws(6)) + sum(50 in drawn for drawn in draws(6)) >= 2
    callback = dp(noise_multiplier=0, max_grad_norm=0.5, engine=engine, probe=False)
    if engine == "ghost" and not math.isfinite(value):  # its second pass would meet them again
        with pytest.raises(NonFiniteUpdateError, match="weights were not changed"):
            fit("auto", sgd(), data, callbacks=[callback])
        return
    end, _, _ = fit("auto", sgd(), data, callbacks=[callback])
    torch.testing.assert_close(end, by_hand(sgd(), data, 6, 0.5), rtol=0, atol=1e-5)


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_one_record_moves_the_sum_by_the_bound_at_most(clipping: Any) -> None:
    x, y = loader().dataset.tensors
    outlier = x.clone()
    outlier[draws(1)[0][3]] *= 1e4
    first = []
    for inputs in (x, outlier):
        seen = Gradients()
        data = DataLoader(TensorDataset(inputs, y), batch_size=24)
        callback = dp(noise_multiplier=0, max_grad_norm=0.1, clipping=clipping, probe=False)
        fit("auto", sgd(), data, callbacks=[callback, seen], steps=1)
        first.append(seen.before[0] * 24)
    moved = float((first[0] - first[1]).norm())
    assert 0.01 < moved <= 0.2 * (1 + 1e-4)  # one record left, another one came


# ---------------------------------------------------------------- together with the rest of Lightning


class Scheduled(Classifier):
    def __init__(self, kind: str, optimizer: str = "SGD") -> None:
        super().__init__(mlp(), optimizer)
        self.kind = kind

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        if self.kind == "step":
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)]
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Rates(pl.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.values.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("kind", ["one cycle", "step"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_schedulers_see_the_steps_of_a_plain_run(kind: str, accumulated: int) -> None:
    plain, private, physical = Rates(), Rates(), Rates()
    options: Any = {"steps": -1, "max_epochs": 3, "accumulate_grad_batches": accumulated}
    data = loader(batch_size=24 // accumulated)
    fit("auto", Scheduled(kind), data, callbacks=[plain], **options)
    _, t, _ = fit("auto", Scheduled(kind), data, callbacks=[dp(), private], **options)
    fit("auto", Scheduled(kind), data, callbacks=[dp(max_physical_batch_size=7), physical], **options)
    assert private.values == physical.values == plain.values
    assert len(plain.values) == t.global_step == 12


def test_gradient_clip_val_acts_on_the_private_gradient() -> None:
    seen, seen_clipped = Gradients(), Gradients()
    fit("auto", sgd(), callbacks=[dp(), seen], steps=1)
    fit("auto", sgd(), callbacks=[dp(), seen_clipped], steps=1, gradient_clip_val=0.1)
    assert float(seen.before[0].norm()) > 0.3
    torch.testing.assert_close(seen_clipped.before, seen.before)
    torch.testing.assert_close(
        seen_clipped.after[0], seen.before[0] * 0.1 / seen.before[0].norm(), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("engine", ["bookkeeping", "hooks", "functorch"])
def test_other_callbacks_see_the_private_gradient_only(engine: Any) -> None:
    before, after = Gradients(), Gradients()
    _, _, _ = fit("auto", sgd(), callbacks=[before, dp(engine=engine), after], steps=4)
    assert not any(before.raw)  # not even a callback that comes first
    for a, b, c in zip(before.before, after.before, before.after, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    quiet = Gradients()
    fit("auto", sgd(), callbacks=[quiet, dp(noise_multiplier=0)], steps=1)
    assert float((before.before[0] - quiet.before[0]).norm()) > 0.1


def test_stops_early() -> None:
    callback = dp()
    stopper = EarlyStopping("val/loss", patience=1, min_delta=100.0)
    _, t, _ = fit(
        "auto",
        Evaluated(mlp()),
        WithVal(loader()),
        steps=-1,
        max_epochs=9,
        callbacks=[callback, stopper],
    )
    assert callback.steps == t.global_step == 8
    assert float(t.callback_metrics["privacy/epsilon"]) == pytest.approx(callback.privacy_spent().epsilon)


class WithVal(pl.LightningDataModule):
    def __init__(self, data: DataLoader[Any]) -> None:
        super().__init__()
        self.data = data

    def train_dataloader(self) -> Any:
        return self.data

    def val_dataloader(self) -> Any:
        return loader()


def test_checkpoints_every_n_steps(tmp_path: Any) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    callback = dp()
    fit(
        "auto",
        sgd(),
        loader(batch_size=12),
        callbacks=[callback, saver],
        enable_checkpointing=True,
        accumulate_grad_batches=2,
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step=2.ckpt", "step=4.ckpt", "step=6.ckpt"]
    for step in (2, 4, 6):
        state = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["callbacks"]["DPSGD"]
        assert state["steps"] == step


@pytest.mark.parametrize("first", [True, False])
def test_stochastic_weight_averaging_averages_private_weights(first: bool) -> None:
    class Ends(pl.Callback):
        def __init__(self) -> None:
            self.values: list[Tensor] = []

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.values.append(weights(pl_module))

    callback, ends = dp(), Ends()
    swa = StochasticWeightAveraging(swa_lrs=0.5, swa_epoch_start=2, annealing_epochs=1)
    callbacks = [callback, swa] if first else [swa, callback]
    end, _, _ = fit("auto", sgd(), steps=-1, max_epochs=3, callbacks=[*callbacks, ends])
    assert callback.steps == 12
    torch.testing.assert_close(end, torch.stack(ends.values[:2]).mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first", [True, False])
def test_exponential_moving_average(first: bool) -> None:
    seen, callback = Gradients(), dp()
    ema = EMAWeightAveraging(decay=0.5)
    callbacks = [callback, ema] if first else [ema, callback]
    end, _, _ = fit("auto", sgd(), callbacks=[*callbacks, seen])
    raw, _, _ = fit("auto", sgd(), callbacks=[dp()])
    average = seen.weights[1]  # the first update copies
    for w in [*seen.weights[2:], raw]:
        average = 0.5 * average + 0.5 * w
    torch.testing.assert_close(end, average, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(end, raw, atol=1e-3)


@pytest.mark.parametrize("limit", [4, 0.5])
def test_limited_epochs_are_continued(limit: float) -> None:
    """The draws go on from step to step, however many an epoch has."""
    whole, _, _ = fit("auto", sgd(), loader(batch_size=12), callbacks=[dp()], accumulate_grad_batches=2)
    end, t, _ = fit(
        "auto",
        sgd(),
        loader(batch_size=12),
        callbacks=[dp()],
        accumulate_grad_batches=2,
        limit_train_batches=limit,
    )
    assert (t.global_step, t.current_epoch) == (6, 3)
    assert torch.equal(end, whole)


@pytest.mark.parametrize(("limit", "named"), [(3, "2 or 4"), (5, "4 or 6")])
def test_limit_that_cuts_a_step_is_refused(limit: int, named: str) -> None:
    module = sgd()
    with pytest.raises(Exception, match=named):
        fit(
            "auto",
            module,
            loader(batch_size=12),
            callbacks=[dp()],
            accumulate_grad_batches=2,
            limit_train_batches=limit,
        )


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_that_are_made_anew_every_epoch(workers: int) -> None:
    whole, _, _ = fit("auto", sgd(), callbacks=[dp()], steps=9)
    data = loader()
    data = DataLoader(data.dataset, 24, num_workers=workers)
    end, _, _ = fit("auto", sgd(), data, callbacks=[dp()], steps=9, reload_dataloaders_every_n_epochs=1)
    assert torch.equal(end, whole)


def test_validation_within_an_epoch() -> None:
    class Count(pl.Callback):
        runs = 0

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            self.runs += not trainer.sanity_checking

    count = Count()
    module = Evaluated(mlp(), "SGD", 0.5)
    end, _, _ = fit("auto", module, WithVal(loader()), callbacks=[dp(), count], val_check_interval=2, steps=8)
    assert count.runs == 4
    expected, _, _ = fit("auto", sgd(), callbacks=[dp()], steps=8)
    assert torch.equal(end, expected)


def test_a_second_fit_goes_on() -> None:
    whole, _, _ = fit("auto", sgd(), callbacks=[dp()], steps=8)
    callback, module = dp(), sgd()
    t = trainer(steps=4, callbacks=[callback])
    t.fit(module, loader())
    assert callback.steps == 4
    t.fit_loop.epoch_loop.max_steps = 8
    t.fit(module, loader())
    assert callback.steps == t.global_step == 8
    assert torch.equal(weights(module), whole)
    assert callback.privacy_spent().epsilon == pytest.approx(spent_epsilon(1.0, 0.25, 8, 96**-1.1, "gdp"))


def test_a_fresh_trainer_starts_anew() -> None:
    callback = dp(target_epsilon=3.0, noise_multiplier=None, accountant="rdp")
    first, _, _ = fit("auto", sgd(), callbacks=[callback], steps=4)
    noise = callback.noise_multiplier
    again, _, _ = fit("auto", sgd(), callbacks=[callback], steps=4)
    assert callback.steps == 4
    assert callback.noise_multiplier == noise
    assert torch.equal(first, again)
    fit("auto", sgd(), callbacks=[callback], steps=8)
    assert callback.noise_multiplier > noise


class Breaks(Classifier):
    """Fails within a layer, in the third step."""

    def __init__(self, where: str) -> None:
        network = mlp()
        super().__init__(network, "SGD", lr=0.5)
        self.where = where
        self.at = -1

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == 2 and self.where == "forward":
            self.network[0](torch.ones(2, FEATURES + 1))
        if self.trainer.global_step == 2 and self.where == "step":
            raise ValueError("stop here")
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.trainer.global_step == 2 and self.where == "optimizer":
            raise ValueError("stop here")


@pytest.mark.parametrize("where", ["nowhere", "forward", "step", "optimizer", "ctrl-c"])
@pytest.mark.parametrize("engine", ["auto", "ghost", "functorch"])
def test_module_and_trainer_are_left_as_they_were(where: str, engine: Any) -> None:
    def look(t: pl.Trainer, module: nn.Module) -> dict[str, Any]:
        return state_of(module) | {
            "strategy": set(t.strategy.__dict__),
            "module attributes": {name: set(m.__dict__) for name, m in module.named_modules()},
            "requires_grad": [p.requires_grad for p in module.parameters()],
            "parameter attributes": [set(p.__dict__) for p in module.parameters()],
            "parameter hooks": [(p._backward_hooks, p._post_accumulate_grad_hooks) for p in module.parameters()],
            "accumulated": t.accumulate_grad_batches,
            "optimizer": type(t.optimizers[0]),
        }

    def run(callbacks: list[pl.Callback]) -> dict[str, Any]:
        module = Breaks(where)
        next(iter(module.network.children())).bias.requires_grad_(False)
        t = trainer(steps=4, callbacks=callbacks, accumulate_grad_batches=2)
        if where in ("nowhere", "ctrl-c"):
            t.fit(module, loader(batch_size=12))
        else:
            with pytest.raises((ValueError, RuntimeError), match=r"stop here|shapes"):
                t.fit(module, loader(batch_size=12))
        return look(t, module)

    assert run([dp(engine=engine, max_physical_batch_size=5)]) == run([])


def test_zero_grad_that_keeps_the_tensors() -> None:
    """Lightning's own example of an overridden ``optimizer_zero_grad``."""

    class Keeps(Classifier):
        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
            optimizer.zero_grad(set_to_none=False)

    end, _, _ = fit("auto", Keeps(mlp(), "SGD", 0.5), callbacks=[dp()])
    expected, _, _ = fit("auto", sgd(), callbacks=[dp()])
    torch.testing.assert_close(end, expected, **EXACT)


# ---------------------------------------------------------------- kinds of steps and batches


def test_steps_that_return_a_dict_and_batches_that_are_dicts() -> None:
    expected, _, _ = fit("auto", sgd(), callbacks=[dp()])
    assert torch.equal(fit("auto", returning_dicts(sgd()), callbacks=[dp()])[0], expected)
    assert torch.equal(fit("auto", taking_dicts(sgd()), loader_of_dicts(), callbacks=[dp()])[0], expected)


@pytest.mark.parametrize("first", [True, False])
def test_a_step_callback_takes_part(first: bool) -> None:
    pair = [dp(max_grad_norm=0.5), Penalty(0.1)]
    end, _, _ = fit("auto", sgd(), callbacks=pair if first else pair[::-1])
    expected, _, _ = fit("auto", PenaltyWrittenIn(mlp(), "SGD", 0.5), callbacks=[dp(max_grad_norm=0.5)])
    torch.testing.assert_close(end, expected, **EXACT)
    without, _, _ = fit("auto", sgd(), callbacks=[dp(max_grad_norm=0.5)])
    assert not torch.allclose(end, without, atol=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_adversarial_training_with_privacy(engine: Any) -> None:
    def attacked() -> AdversarialTraining:
        return AdversarialTraining(ThreatModel(eps=0.3, lo=-9.0, hi=9.0), PGD(2, track="last"))

    end, _, _ = fit("auto", sgd(), callbacks=[dp(engine=engine, max_grad_norm=0.5), attacked()])
    clean, _, _ = fit("auto", sgd(), callbacks=[dp(engine=engine, max_grad_norm=0.5)])
    expected, _, _ = fit("auto", sgd(), callbacks=[dp(engine="hooks", max_grad_norm=0.5), attacked()])
    assert not torch.allclose(end, clean, atol=1e-4)
    torch.testing.assert_close(end, expected, **EXACT)


@pytest.mark.parametrize("options", [{}, {"persistent_workers": True}])
def test_workers_change_nothing(options: dict[str, Any]) -> None:
    expected, _, _ = fit("auto", sgd(), loader(batch_size=6), callbacks=[dp()], accumulate_grad_batches=2, steps=9)
    data = DataLoader(loader().dataset, batch_size=6, num_workers=2, **options)
    end, _, _ = fit("auto", sgd(), data, callbacks=[dp()], accumulate_grad_batches=2, steps=9)
    assert torch.equal(end, expected)


# ---------------------------------------------------------------- the rest


def test_adaptive_clipping_finds_the_quantile() -> None:
    module = sgd(lr=0.0)
    x, y = loader().dataset.tensors
    norms = []
    for i in range(96):
        grads = torch.autograd.grad(F.cross_entropy(module(x[i : i + 1]), y[i : i + 1]), list(module.parameters()))
        norms.append(torch.cat([g.flatten() for g in grads]).norm())
    for start, quantile in ((50.0, 0.5), (0.05, 0.8)):
        callback = dp(clipping="adaptive", max_grad_norm=start, target_quantile=quantile)
        _, t, _ = fit("auto", module, loader(batch_size=48), callbacks=[callback], steps=90)
        bound = float(t.callback_metrics["privacy/max_grad_norm"])
        assert abs(float((torch.stack(norms) <= bound).float().mean()) - quantile) < 0.15
        assert callback.max_grad_norm == start  # the setting stays


def test_adaptive_clipping_costs_nothing_more() -> None:
    """Both releases together are one Gaussian of the noise that was asked for."""
    seen, sigma = Gradients(), 2.0
    callback = dp(noise_multiplier=sigma, clipping="adaptive", max_grad_norm=3.0)
    fit("auto", NoGradient(), loader(batch_size=48), callbacks=[callback, seen], steps=1)
    noise = seen.before[0].double() * 48 / 3.0
    expected = 1 / (sigma**-2 - (2 * 48 / 20) ** -2)
    assert abs(noise.square().mean() / expected - 1) < 5 * math.sqrt(2 / noise.numel())


def _anywhere(value: Any, needle: Any) -> bool:
    if isinstance(value, dict):
        return any(_anywhere(v, needle) or k == needle for k, v in value.items())
    if isinstance(value, list | tuple):
        return any(_anywhere(v, needle) for v in value)
    return not isinstance(value, Tensor) and value == needle


def test_by_default_nobody_can_repeat_the_noise(tmp_path: Any) -> None:
    callbacks = [dp(reproducible=False) for _ in range(2)]
    ends, t = [], None
    for callback in callbacks:
        end, t, _ = fit("auto", sgd(), callbacks=[callback])
        ends.append(end)
    assert not torch.allclose(ends[0], ends[1], atol=1e-3)
    assert t is not None
    t.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert saved["callbacks"]["DPSGD"]["steps"] == 6
    assert "seed" not in saved["callbacks"]["DPSGD"]
    assert not _anywhere(saved, callbacks[1]._seed)


def test_the_global_seed_does_not_give_the_noise_away(seeded: Any) -> None:
    ends = []
    for _ in range(2):
        seeded(3)
        ends.append(fit("auto", sgd(), callbacks=[dp(reproducible=False)])[0])
    assert not torch.allclose(ends[0], ends[1], atol=1e-3)
    repeated = []
    for seed in (3, 3, 4):
        seeded(seed)
        repeated.append(fit("auto", sgd(), callbacks=[dp()])[0])
    assert torch.equal(repeated[0], repeated[1])
    assert not torch.allclose(repeated[0], repeated[2], atol=1e-3)


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_epsilon_in_the_progress_bar_is_what_was_spent(accountant: Any) -> None:
    callback = dp(noise_multiplier=1.3, accountant=accountant, target_delta=1e-4)
    _, t, _ = fit("auto", sgd(), callbacks=[callback], steps=5)
    expected = spent_epsilon(1.3, 24 / 96, 5, 1e-4, accountant)
    assert float(t.callback_metrics["privacy/epsilon"]) == pytest.approx(expected, rel=1e-6)
    assert float(t.progress_bar_metrics["privacy/epsilon"]) == pytest.approx(expected, rel=1e-6)
    assert callback.epsilon == pytest.approx(expected)
    statement = callback.privacy_spent()
    assert (statement.epsilon, statement.delta) == (pytest.approx(expected), 1e-4)
    assert (statement.unit, statement.adjacency) == ("one record", "add-remove")
    assert "5 steps" in statement.mechanism
    assert "reproducible=True" in str(statement)
    assert float(t.callback_metrics["privacy/noise_multiplier"]) == pytest.approx(1.3)
    assert float(t.callback_metrics["privacy/sample_rate"]) == 0.25


def test_nothing_is_spent_before_training() -> None:
    with pytest.raises(RuntimeError, match=r"trainer\.fit"):
        dp().privacy_spent()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "target_epsilon.*noise_multiplier"),
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"noise_multiplier": math.inf}, "noise_multiplier"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"noise_multiplier": 0.0, "target_epsilon": 1.0}, "Without noise"),
        ({"noise_multiplier": 1.0, "target_delta": 0.0}, "delta"),
        ({"noise_multiplier": 1.0, "target_delta": 1.0}, "delta"),
        ({"noise_multiplier": 1.0, "max_grad_norm": 0.0}, "max_grad_norm"),
        ({"noise_multiplier": 1.0, "max_grad_norm": math.inf}, "max_grad_norm"),
        ({"noise_multiplier": 1.0, "max_physical_batch_size": 0}, "max_physical_batch_size"),
        ({"noise_multiplier": 1.0, "engine": "magic"}, "magic"),
        ({"noise_multiplier": 1.0, "clipping": "magic"}, "magic"),
        ({"noise_multiplier": 1.0, "accountant": "magic"}, "magic"),
        ({"noise_multiplier": 1.0, "engine": "ghost", "clipping": "per_layer"}, "bookkeeping"),
        ({"noise_multiplier": 1.0, "clipping": "adaptive", "target_quantile": 1.0}, "target_quantile"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DPSGD(**options)


def test_convolutions_and_embeddings() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(20, 8)
            self.convolution = nn.Conv1d(8, 4, 3)
            self.norm = nn.GroupNorm(2, 4)
            self.head = nn.Linear(4, CLASSES)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.norm(self.convolution(self.embedding(tokens).transpose(1, 2)).relu()).mean(-1))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Classifier(Tokens(), "SGD", lr=0.5)
    tokens = torch.randint(0, 20, (60, 6), generator=torch.Generator().manual_seed(1))
    data = DataLoader(TensorDataset(tokens, tokens[:, 0] % CLASSES), batch_size=20)
    ends = [fit("auto", module, data, callbacks=[dp(engine=engine, max_grad_norm=0.5)])[0] for engine in ENGINES]
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], **EXACT)
