"""The tester through which every StepCallback goes."""

from __future__ import annotations

import contextlib
import copy
import signal
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from groundwire.callbacks import StepCallback, Tap
from groundwire.callbacks.step import loss_of, with_loss
from groundwire.plugins.edge import EdgeStrategy
from helpers.edge import Classifier, fit, loader, mlp, trainer, weights


def check_step_callback(
    build: Callable[[], StepCallback],
    *,
    off: Callable[[], StepCallback] | None = None,
    changes: bool = True,
    module: pl.LightningModule | None = None,
    dict_batch: bool = True,
) -> None:
    """What every StepCallback must pass.

    Args:
        build: A fresh callback, switched on.
        off: The same switched off: must equal a Trainer without it, bit for bit.
        changes: Whether it is meant to change the trained weights.
        module: What to train; its step takes ``(x, y)``.
        dict_batch: Whether the callback must also take ``{"x": x, "y": y}``.
    """
    module = module if module is not None else Classifier(mlp())
    plain, _, _ = fit("auto", module)
    on, _, _ = fit("auto", module, callbacks=[build()])
    again, _, _ = fit("auto", module, callbacks=[build()])
    assert torch.equal(on, again)
    assert torch.equal(on, plain) != changes
    if off is not None:
        switched_off, _, _ = fit("auto", module, callbacks=[off()])
        assert torch.equal(switched_off, plain)
    one, _, _ = fit(EdgeStrategy(num_devices=1), module, callbacks=[build()])
    assert torch.equal(one, on), "inside EdgeStrategy with one device it must do the same"
    together, _, _ = fit(EdgeStrategy(num_devices=4, vectorize=True), module, callbacks=[build()])
    loop, _, _ = fit(EdgeStrategy(num_devices=4, vectorize=False), module, callbacks=[build()])
    torch.testing.assert_close(together, loop, rtol=1e-4, atol=1e-6)
    if dict_batch:
        of_dicts, _, _ = fit("auto", taking_dicts(module), loader_of_dicts(), callbacks=[build()])
        assert torch.equal(of_dicts, on), "with batches that are dicts it must do the same"
    _check_keeps_extras(build, module, on, together)
    _check_leaves_no_trace(build, module)


def taking_dicts(module: pl.LightningModule) -> pl.LightningModule:
    """A copy of a module whose training step takes ``(x, y)``, that takes ``{"x": x, "y": y}``."""

    own: Any = type(module)

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        return own.training_step(self, (batch["x"], batch["y"]), batch_idx)

    variant = type("TakingDicts", (own,), {"training_step": training_step})
    copied = copy.deepcopy(module)
    copied.__class__ = variant
    return copied


def returning_dicts(module: pl.LightningModule) -> pl.LightningModule:
    """A copy of a module whose training step takes ``(x, y)``, that returns a dict with the sum of each row of x."""

    own: Any = type(module)

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        output = own.training_step(self, batch, batch_idx)
        return {**(output if isinstance(output, dict) else {"loss": output}), "extra": batch[0].flatten(1).sum(1)}

    variant = type("ReturningDicts", (own,), {"training_step": training_step})
    copied = copy.deepcopy(module)
    copied.__class__ = variant
    return copied


def loader_of_dicts(**options: Any) -> DataLoader[Any]:
    """The data of ``loader()`` as dicts."""
    data = loader(**options)
    return DataLoader(data.dataset, data.batch_size, collate_fn=_dict_of)


def _dict_of(samples: Any) -> Any:
    x, y = torch.utils.data.default_collate(samples)
    return {"x": x, "y": y}


class Penalty(StepCallback):
    """Adds the mean square of the logits, read through a tap, to the loss."""

    def __init__(self, weight: float = 0.1, submodule: str = "") -> None:
        self.weight, self.tap = weight, Tap(submodule)
        self.seen: list[tuple[int, ...]] = []

    def around_step(self, step: Any, batch: Any) -> Any:
        with self.tap.open(self.module) as calls:
            output = step(batch)
        self.seen.append(tuple(calls[0].output.shape))
        if output is None:
            return None
        return with_loss(output, loss_of(output) + self.weight * calls[0].output.square().mean())

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.module = pl_module


class PenaltyWrittenIn(Classifier):
    """The module that a Classifier under a Penalty must equal."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        return F.cross_entropy(logits, batch[1]) + 0.1 * logits.square().mean()


class Notes(StepCallback):
    """Notes the inputs, their row sums and a scalar in each step; keeps what comes back."""

    def __init__(self, runs: int = 1) -> None:
        self.runs = runs
        self.back: list[dict[str, Tensor]] = []
        self.at: list[int] = []

    def around_step(self, step: Any, batch: Any) -> Any:
        for run in range(self.runs):
            x = (1 - 2 * run) * batch[0]
            output = step((x, *batch[1:]))
            self.note(x=x, total=x.flatten(1).sum(1), loss=loss_of(output))
        return output

    def after_step(self, trainer: Any, pl_module: Any, notes: Any) -> None:
        self.back.append(notes)
        self.at.append(trainer.global_step)


class Evaluated(Classifier):
    """A Classifier that can be validated and tested."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("val/loss", loss)
        return loss

    test_step = validation_step


class Outputs(pl.Callback):
    """Remembers what other callbacks see of each training step."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(copy.copy(outputs))


@contextlib.contextmanager
def keeping_ctrl_c() -> Iterator[None]:
    """Lightning ignores SIGINT from the first Ctrl-C on, for as long as the process lives."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def state_of(module: pl.LightningModule) -> dict[str, Any]:
    """What a callback must leave as it was: the attributes of a module and the hooks of all its submodules."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "attributes": set(module.__dict__),
        "steps": {name: value for name, value in module.__dict__.items() if name.endswith("_step")},
        "hooks": {(name, h): len(getattr(m, h)) for name, m in module.named_modules() for h in hooks},
    }


def _check_keeps_extras(
    build: Callable[[], StepCallback], module: pl.LightningModule, on: Tensor, together: Tensor
) -> None:
    """The module's own extras reach other callbacks, before and after it, and nothing else does."""
    variant = returning_dicts(module)
    for strategy in ("auto", EdgeStrategy(num_devices=4, vectorize=True), EdgeStrategy(num_devices=4, vectorize=False)):
        without, before, after = Outputs(), Outputs(), Outputs()
        fit(copy.deepcopy(strategy), variant, callbacks=[without])
        found, _, _ = fit(strategy, variant, callbacks=[before, build(), after])
        if strategy == "auto":
            assert torch.equal(found, on), "with a step that returns a dict it must do the same"
        else:
            torch.testing.assert_close(found, together, rtol=1e-4, atol=1e-6)
        for outputs in (before.seen, after.seen):
            assert [set(o) for o in outputs] == [set(o) for o in without.seen], "nothing may stay in the outputs"
            assert all(torch.equal(a["extra"], b["extra"]) for a, b in zip(outputs, without.seen, strict=True))


def _check_leaves_no_trace(build: Callable[[], StepCallback], module: pl.LightningModule) -> None:
    class Fails(pl.Callback):
        def __init__(self, error: BaseException) -> None:
            self.error = error

        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            raise self.error

    for error in (None, ValueError("stop here"), KeyboardInterrupt()):
        fresh, untouched = copy.deepcopy(module), copy.deepcopy(module)
        trainer(steps=2).fit(untouched, loader())
        extra = [] if error is None else [Fails(error)]
        t = trainer(callbacks=[build(), *extra], steps=2)
        if error is None:
            t.fit(fresh, loader())
        else:
            expected = SystemExit if isinstance(error, KeyboardInterrupt) else type(error)
            with keeping_ctrl_c(), pytest.raises((expected, type(error))):
                t.fit(fresh, loader())
        assert state_of(fresh) == state_of(untouched), f"the module must be as it was after {error!r}"
        assert torch.isfinite(weights(fresh)).all()
