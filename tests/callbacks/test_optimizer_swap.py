"""OptimizerSwap: another optimizer under the same module, groups and schedule; saved and resumed as always."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from functools import partial, update_wrapper
from pathlib import Path
from types import MethodType
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import SGD, AdamW, Optimizer
from torch.optim import lr_scheduler as schedules

from groundwire.callbacks.optimizer_swap import OptimizerSwap
from groundwire.plugins.edge import EdgeStrategy
from groundwire.plugins.optimizers import CESGC, FRUGAL, MESGC
from helpers.callbacks import state_of
from helpers.ddp import fit_ddp
from helpers.edge import Classifier, fit, loader, mlp, trainer, weights

OLD_LR, NEW_LR = 0.02, 0.05

adamw = partial(AdamW, lr=NEW_LR, weight_decay=0.3)
frugal = partial(FRUGAL, lr=NEW_LR, density=0.34, update_gap=2)
mesgc = partial(MESGC, lr=NEW_LR, chunk_size=64, sparsity=4, subspace_dim=16)
cesgc = partial(CESGC, lr=NEW_LR, rank=4, chunk_size=64, sparsity=4, subspace_dim=16, update_gap=2)
NEW = {"adamw": adamw, "frugal": frugal, "mesgc": mesgc, "cesgc": cesgc}


class Configured(Classifier):
    """Its optimizer, and what else ``configure_optimizers`` returns, are given."""

    def __init__(self, optimizer: Callable[..., Optimizer], output: Callable[[Optimizer], Any] = lambda o: o) -> None:
        super().__init__(mlp())
        self.build, self.output = optimizer, output

    def configure_optimizers(self) -> Any:
        return self.output(self.build(self.parameters()))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))


def old(params: Any) -> Optimizer:
    return SGD(params, lr=OLD_LR, momentum=0.5)


def by_step(build: Callable[[Optimizer], Any]) -> Callable[[Optimizer], Any]:
    return lambda optimizer: {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": build(optimizer), "interval": "step"},
    }


class Rates(pl.Callback):
    """The learning rate and the momentum of each group at each step."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for config in trainer.lr_scheduler_configs:
            rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
            assert config.scheduler.get_last_lr() == pytest.approx(rates, rel=1e-12)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        self.seen.append([(g["lr"], g["betas"][0] if "betas" in g else g["momentum"]) for g in optimizer.param_groups])


@pytest.mark.parametrize("new", NEW.values(), ids=NEW)
def test_it_trains_as_if_the_module_had_configured_it(new: Any) -> None:
    swapped, t, _ = fit("auto", Configured(old), callbacks=[OptimizerSwap(new)])
    own, _, _ = fit("auto", Configured(new))
    assert torch.equal(swapped, own)
    assert type(t.optimizers[0]) is new.func
    unswapped, _, _ = fit("auto", Configured(old))
    assert not torch.equal(swapped, unswapped)


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "step": lambda o: schedules.StepLR(o, 2, gamma=0.5),
    "warm-up": lambda o: schedules.LinearLR(o, 0.1, total_iters=4),
    "lambda": lambda o: schedules.LambdaLR(o, lambda step: 1 / (1 + step)),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, 8),
    "one cycle": lambda o: schedules.OneCycleLR(o, max_lr=o.defaults["lr"], total_steps=12),
    "one cycle, momentum as it is": lambda o: schedules.OneCycleLR(
        o, max_lr=o.defaults["lr"], total_steps=12, cycle_momentum=False
    ),
    "cyclic": lambda o: schedules.CyclicLR(o, o.defaults["lr"] / 10, o.defaults["lr"], step_size_up=3),
    "sequence": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=3), schedules.ExponentialLR(o, 0.8)], [3]
    ),
    "chain": lambda o: schedules.ChainedScheduler(
        [schedules.ConstantLR(o, 0.5, total_iters=4), schedules.ExponentialLR(o, 0.9)], optimizer=o
    ),
}
OUTPUTS: dict[str, tuple[int, Callable[[Optimizer], Any]]] = {
    "an optimizer": (0, lambda o: o),
    "a list of one": (0, lambda o: [o]),
    "a dict": (0, lambda o: {"optimizer": o}),
    "a list of dicts": (0, lambda o: [{"optimizer": o}]),
    "two lists": (1, lambda o: ([o], [SCHEDULES["step"](o)])),
    "two lists, with a dict": (1, lambda o: ([o], [{"scheduler": SCHEDULES["step"](o), "interval": "step"}])),
    "a dict with a scheduler": (1, lambda o: {"optimizer": o, "lr_scheduler": SCHEDULES["step"](o)}),
    "a plateau": (
        1,
        lambda o: {
            "optimizer": o,
            "lr_scheduler": {"scheduler": schedules.ReduceLROnPlateau(o, patience=0), "monitor": "train/loss"},
        },
    ),
}


@pytest.mark.parametrize(("count", "output"), OUTPUTS.values(), ids=OUTPUTS)
def test_all_that_a_module_may_return(count: int, output: Any) -> None:
    swapped, t, _ = fit("auto", Configured(old, output), callbacks=[OptimizerSwap(adamw)], steps=9)
    own, _, _ = fit("auto", Configured(adamw, output), steps=9)
    assert torch.equal(swapped, own)
    assert [config.scheduler.optimizer for config in t.lr_scheduler_configs] == t.optimizers * count


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_schedule_goes_on_at_the_new_optimizers_rates(schedule: Any) -> None:
    found, expected = Rates(), Rates()
    module = Configured(old, by_step(schedule))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", _no_warning_of_steps)
        swapped, t, _ = fit(module=module, callbacks=[OptimizerSwap(adamw), found], steps=9)
    own, _, _ = fit(module=Configured(adamw, by_step(schedule)), callbacks=[expected], steps=9)
    torch.testing.assert_close(torch.tensor(found.seen), torch.tensor(expected.seen), rtol=1e-12, atol=0)
    assert len({lr for ((lr, _),) in found.seen}) > 2, "there is a schedule"
    torch.testing.assert_close(swapped, own, rtol=1e-5, atol=1e-7)
    rates = t.lr_scheduler_configs[0].scheduler.get_last_lr()
    assert rates == [group["lr"] for group in t.optimizers[0].param_groups], "what is logged is what is used"


def _no_warning_of_steps(message: Any, *args: Any, **kwargs: Any) -> None:
    assert "lr_scheduler.step()" not in str(message)
    assert "overridden" not in str(message)


def test_momentum_is_cycled_as_the_new_optimizer_calls_it() -> None:
    for before, after in ((old, adamw), (partial(AdamW, lr=OLD_LR), partial(SGD, lr=NEW_LR, momentum=0.9))):
        found, expected = Rates(), Rates()
        one_cycle = by_step(SCHEDULES["one cycle"])
        fit(module=Configured(before, one_cycle), callbacks=[OptimizerSwap(after), found], steps=9)
        fit(module=Configured(after, one_cycle), callbacks=[expected], steps=9)
        torch.testing.assert_close(torch.tensor(found.seen), torch.tensor(expected.seen), rtol=1e-12, atol=0)
        assert len({momentum for ((_, momentum),) in found.seen}) > 2


def groups_of_two(params: Any, **settings: Any) -> Optimizer:
    params = list(params)
    biases = {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0, "lr": OLD_LR / 4}
    return AdamW(
        [{"params": [p for p in params if p.ndim > 1]}, biases], **{"lr": OLD_LR, "weight_decay": 0.3} | settings
    )


@pytest.mark.parametrize("schedule", [None, "cosine"])
def test_what_sets_a_group_apart_is_kept(schedule: str | None) -> None:
    output = by_step(SCHEDULES[schedule]) if schedule else lambda o: o
    found = Rates()
    _, t, _ = fit(module=Configured(groups_of_two, output), callbacks=[OptimizerSwap(frugal), found])
    matrices, biases = t.optimizers[0].param_groups
    assert (matrices["weight_decay"], biases["weight_decay"]) == (0.0, 0.0)
    assert (matrices["density"], biases["density"]) == (0.34, 0.34)
    assert [p.ndim for p in biases["params"]] == [1, 1]
    assert matrices["param_names"] == ["network.0.weight", "network.2.weight"]
    for (rate, _), (quarter, _) in found.seen:
        assert quarter == pytest.approx(rate / 4)
    assert found.seen[0][0][0] == NEW_LR
    _, t, _ = fit(module=Configured(groups_of_two, output), callbacks=[OptimizerSwap(adamw)])
    assert [group["weight_decay"] for group in t.optimizers[0].param_groups] == [0.3, 0.0]


def test_what_the_new_optimizer_does_not_know_is_said() -> None:
    def build(params: Any) -> Optimizer:
        return SGD([{"params": list(params), "nesterov": True}], lr=OLD_LR, momentum=0.9)

    with pytest.warns(UserWarning, match="AdamW has no nesterov, which a parameter group set: this is left out"):
        fit(module=Configured(build), callbacks=[OptimizerSwap(adamw)])


def test_names_reach_the_new_optimizer() -> None:
    build = partial(FRUGAL, lr=NEW_LR, density=0.34, exclude=["2.weight"])
    _, t, _ = fit(module=Configured(old), callbacks=[OptimizerSwap(build)])
    shapes = [tuple(state["exp_avg"].shape) for state in t.optimizers[0].state.values()]
    assert sorted(shapes) == [(3,), (3, 16), (16,), (16, 4)]


def test_the_size_of_the_state_is_logged() -> None:
    _, t, _ = fit(module=Configured(old), callbacks=[OptimizerSwap(adamw)])
    numbers = sum(p.numel() for p in mlp().parameters())
    assert t.callback_metrics["optimizer/state_bytes"] == 4 * (2 * numbers + 4)


# Saving, resuming, and leaving no trace.


def checkpoint_of(
    folder: Path, steps: int, callbacks: list[pl.Callback], module: pl.LightningModule
) -> tuple[Any, Path]:
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=steps, save_top_k=-1)
    t = trainer(steps=steps, callbacks=[*callbacks, saving], enable_checkpointing=True)
    t.fit(module, loader())
    return weights(module), folder / f"step={steps}.ckpt"


@pytest.mark.parametrize("new", NEW.values(), ids=NEW)
def test_a_resumed_run_is_bit_identical(tmp_path: Path, new: Any) -> None:
    module = Configured(old, by_step(SCHEDULES["one cycle"]))
    whole, _ = checkpoint_of(tmp_path / "whole", 8, [OptimizerSwap(new)], copy.deepcopy(module))
    _, path = checkpoint_of(tmp_path / "first", 4, [OptimizerSwap(new)], copy.deepcopy(module))
    again = copy.deepcopy(module)
    trainer(steps=8, callbacks=[OptimizerSwap(new)]).fit(again, loader(), ckpt_path=path, weights_only=True)
    assert torch.equal(whole, weights(again))


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    module = Configured(old)
    _, plain = checkpoint_of(tmp_path / "plain", 2, [], copy.deepcopy(module))
    _, swapped = checkpoint_of(tmp_path / "swapped", 2, [OptimizerSwap(frugal)], copy.deepcopy(module))
    for path, name in ((plain, "the module's own optimizer"), (swapped, "FRUGAL")):
        fresh = copy.deepcopy(module)
        t = trainer(steps=4, callbacks=[OptimizerSwap(adamw)])
        with pytest.raises(MisconfigurationException, match=f"optimizer state is of {name}, not of AdamW. Resume with"):
            t.fit(fresh, loader(), ckpt_path=path)
        assert "configure_optimizers" not in fresh.__dict__
    t = trainer(steps=4, callbacks=[OptimizerSwap(adamw)])
    t.validate(copy.deepcopy(module), loader(), ckpt_path=plain, verbose=False)  # no optimizer is needed


def test_one_callback_serves_several_fits() -> None:
    swap = OptimizerSwap(adamw)
    first, _, _ = fit(module=Configured(old), callbacks=[swap])
    second, _, _ = fit(module=Configured(old), callbacks=[swap])
    assert torch.equal(first, second)


def test_a_hook_that_lightning_cli_has_put_in_is_found() -> None:
    """It is a partial, which has neither a name nor code of its own."""
    module = Configured(partial(SGD, lr=OLD_LR))
    hook = update_wrapper(partial(lambda _: SGD(module.parameters(), lr=OLD_LR)), module.configure_optimizers)
    module.configure_optimizers = MethodType(hook, module)  # type: ignore[method-assign]
    trainer(callbacks=[OptimizerSwap(adamw)]).fit(module, loader())  # not of a copy, to which the hook would not belong
    expected, _, _ = fit(module=Configured(adamw))
    assert torch.equal(weights(module), expected)


def test_it_leaves_no_trace() -> None:
    class Fails(pl.Callback):
        def setup(self, *args: Any, **kwargs: Any) -> None:
            raise ValueError("stop here")

    untouched = Configured(old)
    trainer(steps=2).fit(untouched, loader())
    module = Configured(old)
    trainer(steps=2, callbacks=[OptimizerSwap(adamw)]).fit(module, loader())
    assert state_of(module) == state_of(untouched)
    assert type(module.configure_optimizers()) is SGD
    module = Configured(old)
    module.configure_optimizers = lambda: SGD(module.parameters(), lr=1.0)  # type: ignore[method-assign]
    own = module.configure_optimizers
    with pytest.raises(ValueError, match="stop here"):
        trainer(steps=2, callbacks=[OptimizerSwap(adamw), Fails()]).fit(module, loader())
    assert module.configure_optimizers is own
    trainer(steps=2, callbacks=[OptimizerSwap(adamw)]).fit(module, loader())
    assert module.configure_optimizers is own


def test_a_copy_made_meanwhile_is_the_plain_module() -> None:
    class Copies(pl.Callback):
        def setup(self, t: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
            pl_module._trainer, own = None, pl_module._trainer
            self.copies = [copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))]
            pl_module._trainer = own

    copies = Copies()
    fit(module=Classifier(mlp(), "SGD"), callbacks=[OptimizerSwap(adamw), copies])
    for module in copies.copies:
        optimizer = module.configure_optimizers()
        assert type(optimizer) is SGD
        assert optimizer.param_groups[0]["params"][0] is next(module.parameters())


# With other strategies, and from YAML.


def swap_to_frugal() -> OptimizerSwap:
    return OptimizerSwap(frugal)


def test_ranks_of_ddp_hold_the_same_weights_and_train_as_one_process() -> None:
    ranks = fit_ddp(Classifier(mlp(), "SGD"), build=swap_to_frugal, precision="64-true")
    assert torch.equal(ranks[0].weights, ranks[1].weights)
    alone, _, _ = fit(module=Configured(frugal), precision="64-true")
    torch.testing.assert_close(ranks[0].weights, alone, rtol=1e-7, atol=1e-9)


def test_in_an_edge_strategy() -> None:
    for strategy in (EdgeStrategy(num_devices=2), EdgeStrategy(num_devices=4, vectorize=False)):
        swapped, _, _ = fit(copy.deepcopy(strategy), Configured(old), callbacks=[OptimizerSwap(frugal)])
        own, _, _ = fit(copy.deepcopy(strategy), Configured(frugal))
        assert torch.equal(swapped, own)


@pytest.mark.parametrize(
    ("class_path", "init_args"),
    [
        ("torch.optim.AdamW", {"lr": 0.3}),
        ("groundwire.plugins.optimizers.FRUGAL", {"lr": 0.3, "selection": "rows", "exclude": ["head"]}),
        (
            "groundwire.plugins.optimizers.MESGC",
            {"lr": 0.3, "chunk_size": None, "moment": "scalar", "subspace_dim": 32},
        ),
        ("groundwire.plugins.optimizers.CESGC", {"lr": 0.3, "rank": 2, "chunk_size": 64, "subspace_dim": 32}),
    ],
)
def test_it_is_built_from_yaml(class_path: str, init_args: dict[str, Any]) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(pl.Callback, "callback")
    swap = {"class_path": "groundwire.callbacks.optimizer_swap.OptimizerSwap"}
    config = {"callback": swap | {"init_args": {"optimizer": {"class_path": class_path, "init_args": init_args}}}}
    callback = parser.instantiate(parser.parse_object(config)).callback
    weight = torch.nn.Parameter(torch.zeros(16, 16))
    optimizer = callback.optimizer([{"params": [("body.weight", weight)]}])
    assert type(optimizer).__name__ == class_path.rpartition(".")[2]
    group = optimizer.param_groups[0]
    assert {name: group[name] for name in init_args} == init_args


def test_an_optimizer_of_another_library_takes_its_settings_from_yaml() -> None:
    pytest.importorskip("pytorch_optimizer")
    parser = ArgumentParser()
    parser.add_subclass_arguments(pl.Callback, "callback")
    settings = {"rank": 4, "update_proj_gap": 2, "scale": 1.0, "projection_type": "std"}
    galore = {"class_path": "pytorch_optimizer.GaLore", "init_args": {"lr": NEW_LR}, "dict_kwargs": settings}
    swap = {"class_path": "groundwire.callbacks.optimizer_swap.OptimizerSwap", "init_args": {"optimizer": galore}}
    callback = parser.instantiate(parser.parse_object({"callback": swap})).callback
    swapped, t, _ = fit(module=Configured(old, by_step(SCHEDULES["step"])), callbacks=[callback])
    assert torch.isfinite(swapped).all()
    (group,) = t.optimizers[0].param_groups
    assert group.items() >= settings.items()
    matrices = 4 * (2 * 4 * 16 + 4 * 12) + 4 * (
        2 * 3 * 16 + 3 * 3
    )  # of 16 x 12 and 3 x 16: their rank is 3 at the most
    assert t.callback_metrics["optimizer/state_bytes"] == matrices + 4 * 2 * (16 + 3)


# What cannot be right.


class Manual(Configured):
    def __init__(self) -> None:
        super().__init__(old)
        self.automatic_optimization = False


class Odd:
    """A scheduler as Lightning takes any: with a step and a state."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.held = optimizer

    def step(self) -> None: ...
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def two(optimizer: Optimizer) -> Any:
    return [optimizer, SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)]


def regrouped(groups: Any) -> Optimizer:
    return AdamW([p for group in groups for _, p in group["params"] if p.ndim > 1], lr=0.1)


@pytest.mark.parametrize(
    ("module", "new", "message"),
    [
        (Manual(), adamw, "but Manual sets `automatic_optimization = False`. Return the loss"),
        (Configured(old, two), adamw, "Configured.configure_optimizers returned 2. Let it return one"),
        (Configured(old, lambda o: None), adamw, "Configured.configure_optimizers returned none. Let it return one"),
        (Configured(old), regrouped, "AdamW was given the module's 1 parameter group(s) and has others"),
        (Configured(old), lambda groups: "adam", "must build a torch optimizer from parameter groups, got a str"),
        (Configured(old, by_step(Odd)), adamw, "Odd does not keep its optimizer as `optimizer`"),
        (
            Configured(old, by_step(SCHEDULES["one cycle"])),
            partial(torch.optim.Adagrad, lr=0.1),
            "OneCycleLR cycles the momentum, which Adagrad does not have. Set cycle_momentum=False",
        ),
        (
            Configured(partial(SGD, lr=0.0), by_step(SCHEDULES["step"])),
            adamw,
            "The learning rates of SGD (default 0.0) cannot be carried over to AdamW (default 0.05)",
        ),
    ],
)
def test_what_it_refuses_by_message(module: Any, new: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=re.escape(message)):
        fit(module=module, callbacks=[OptimizerSwap(new)])
