"""A trained model of the digits that is to forget, and the tester through which every method of unlearning goes."""

from __future__ import annotations

import copy
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from groundwire.callbacks.reporting import ResumableCheckpoint
from groundwire.callbacks.unlearning import IterativeMethod, UnlearningMethod
from groundwire.callbacks.weights import copy_of, read_weights
from groundwire.datamodules import Digits, ForgetRetain
from helpers.adversarial import DigitsClassifier
from helpers.callbacks import state_of
from helpers.edge import trainer, weights

STEPS = 6
"""Of a short run of unlearning."""


def network(seed: int = 0) -> nn.Module:
    """For vectors of 64 pixels: 2,410 parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


class ToForget(DigitsClassifier):
    """Logs its loss, and can be given another learning rate."""

    def __init__(self, net: nn.Module | None = None, lr: float = 0.02, momentum: float = 0.9) -> None:
        super().__init__(network() if net is None else net)
        self.lr, self.momentum = lr, momentum

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Lives as long as the process."""
    folder = tempfile.TemporaryDirectory()
    t = trainer(steps=-1, max_epochs=12, limit_val_batches=0)
    t.fit(ToForget(network(seed=1), lr=0.1), digits())
    t.save_checkpoint(Path(folder.name) / "trained.ckpt")
    return folder


def checkpoint() -> Path:
    """The trained model: 97 % of the test digits are right. Trained once a session; do not write to it."""
    return Path(_folder().name) / "trained.ckpt"


def digits(**options: Any) -> Digits:
    return Digits(**({"batch_size": 64, "flatten": True, "seed": 0} | options))


def trained(**options: Any) -> ToForget:
    """A fresh module with the trained weights."""
    module = ToForget(**options)
    module.load_state_dict(read_weights(checkpoint()))
    return module


def to_forget(**options: Any) -> ForgetRetain:
    """80 random digits against the others, in batches of 40; an epoch has 30 of them."""
    if "forget" not in options:
        options |= {"forget": "indices", "indices": range(3, 800, 10)}
    return ForgetRetain(digits(), **({"batch_size": 40, "seed": 0} | options))


def unlearn(
    method: UnlearningMethod, module: pl.LightningModule | None = None, data: Any = None, **options: Any
) -> tuple[pl.LightningModule, pl.Trainer]:
    """Fit a fresh module (not a trained one: the method has to load the checkpoint) with the method."""
    module = ToForget() if module is None else module
    strategy = options.pop("strategy", "auto")
    options = {"steps": STEPS, "limit_val_batches": 0} | options
    t = trainer(strategy, callbacks=[*options.pop("callbacks", []), method], **options)
    t.fit(module, datamodule=to_forget() if data is None else data)
    return module, t


def accuracy(module: pl.LightningModule, data: ForgetRetain, part: str) -> float:
    """Share of right predictions on a part, ``"forget"``, ``"retain"`` or ``"test"``."""
    batches = data.test_dataloader() if part == "test" else data.batches(part)
    module.eval()
    with torch.no_grad():
        right = torch.cat([module(x).argmax(dim=-1) == y for x, y in batches])
    return float(right.float().mean())


def place_among_others(batch: Any) -> Tensor:
    """Which of the other classes each wrong label is, counted from 0: what was drawn, whatever the true label."""
    true, wrong = batch["forget"][1], batch["wrong_labels"]
    return wrong - (wrong > true).long()


def check_method(
    build: Callable[[Path | None], UnlearningMethod],
    *,
    data: Callable[[], ForgetRetain] = to_forget,
    module: Callable[[], pl.LightningModule] = ToForget,
    original: Path | None = None,
    changes: bool = True,
    steps: int = STEPS,
    frozen: str = "network.0",
) -> None:
    """What every method of unlearning must pass.

    Args:
        build: A fresh method, from a checkpoint (or None).
        data: What to forget; its epochs are longer than ``steps``.
        module: A module with other weights than the checkpoint's.
        original: The checkpoint; by default the digits'.
        changes: Whether the method is meant to change the weights.
        steps: Optimizer steps of an iterative method.
        frozen: A submodule that is frozen in one of the checks.
    """
    original = checkpoint() if original is None else original
    content = original.read_bytes()
    run = functools.partial(unlearn, steps=steps)
    result, t = run(build(original), module(), data())
    again, _ = run(build(original), module(), data())
    assert torch.equal(weights(result), weights(again)), "the same settings and seed must give the same weights"
    _check_start(build, module, data, original, result, changes)
    _check_certificate(t)
    if isinstance(build(original), IterativeMethod):
        check_resume(build, module, data, original, weights(result), steps)
    _check_frozen(build, module, data, original, frozen, steps)
    _check_leaves_no_trace(build, module, data, original)
    with pytest.raises(MisconfigurationException, match="needs to know what to forget"):
        run(build(original), module(), data().datamodule)
    keeper = ResumableCheckpoint()
    keeper.path = lambda _: original  # type: ignore[method-assign]
    with pytest.raises(MisconfigurationException, match="written over the original"):
        run(build(original), module(), data(), callbacks=[keeper], enable_checkpointing=True)
    assert original.read_bytes() == content, "the original checkpoint must not be written to"


def _check_start(build: Any, module: Any, data: Any, original: Path, result: pl.LightningModule, changes: bool) -> None:
    """It starts from the checkpoint's weights, which the module may also have already."""
    state = read_weights(original)
    before = torch.cat([value.flatten().double() for value in state.values()])
    assert torch.equal(weights(result), before) != changes
    if not build(original).starts_trained:
        return
    ready = module()
    ready.load_state_dict(state)
    alone, _ = unlearn(build(None), ready, data())
    method = build(original)
    from_file, _ = unlearn(method, module(), data())
    assert torch.equal(weights(alone), weights(from_file))
    assert torch.equal(weights(method.original), before), "the original is kept as it was"
    assert not method.original.training
    assert not any(p.requires_grad for p in method.original.parameters())


def _check_certificate(t: pl.Trainer) -> None:
    (method,) = (c for c in t.callbacks if isinstance(c, UnlearningMethod))  # type: ignore[attr-defined]
    found = method.certificate()
    assert found["method"] == type(method).__name__
    plain = (bool, int, float, str, type(None))
    assert all(isinstance(value, plain) for value in method.settings().values())
    assert found["seconds"] > 0
    assert (found["records_read"]["forget"] > 0) == ("forget" in method.parts)


class _KeepAll(ResumableCheckpoint):
    """Copies each checkpoint, as runs that were killed after it would leave them."""

    def _save(self, t: pl.Trainer) -> None:
        super()._save(t)
        shutil.copy(self.path(t), self.path(t).with_name(f"step{t.global_step}.ckpt"))


def check_resume(
    build: Callable[[Path | None], UnlearningMethod],
    module: Callable[[], pl.LightningModule],
    data: Callable[[], ForgetRetain],
    original: Path,
    final: Tensor,
    steps: int,
    **options: Any,
) -> None:
    """Stop after a third and after two thirds of the steps, and go on in a new Trainer: nothing may differ."""
    options = {"limit_val_batches": 0, "enable_checkpointing": True} | options
    with tempfile.TemporaryDirectory() as folder:
        keeper = _KeepAll(folder, every_n_steps=1)
        whole = module()
        t = trainer(steps=steps, callbacks=[build(original), keeper], **options)
        t.fit(whole, datamodule=data(), weights_only=True)
        assert torch.equal(weights(whole), final), "saving must change nothing"
        for stop in {max(1, steps // 3), 2 * steps // 3}:
            fresh = module()
            t = trainer(
                steps=steps, callbacks=[build(original), ResumableCheckpoint(Path(folder) / "resumed")], **options
            )
            path = str(Path(folder) / f"step{stop}.ckpt")
            t.fit(fresh, datamodule=data(), ckpt_path=path, weights_only=True)
            assert t.global_step == steps
            assert torch.equal(weights(fresh), final), f"resumed after {stop} steps"


def _check_frozen(build: Any, module: Any, data: Any, original: Path, frozen: str, steps: int) -> None:
    partly = module()
    partly.get_submodule(frozen).requires_grad_(False)
    before = copy.deepcopy(partly.get_submodule(frozen).state_dict())
    method = build(original)
    if method.starts_trained:
        state = read_weights(original)
        before = {name: state[f"{frozen}.{name}"] for name in before}
    unlearn(method, partly, data(), steps=steps)
    after = partly.get_submodule(frozen).state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(not p.requires_grad for p in partly.get_submodule(frozen).parameters())


class _Fails(pl.Callback):
    """In the first step; where there is none, after the validation before it."""

    def __init__(self, in_step: bool) -> None:
        self.in_step = in_step

    def on_sanity_check_end(self, *_: Any) -> None:
        if not self.in_step:
            raise ValueError("stop here")

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        raise ValueError("stop here")


def _check_leaves_no_trace(build: Any, module: Any, data: Any, original: Path) -> None:
    for fails in (False, True):
        fresh, untouched = module(), module()
        plain = trainer(steps=2, limit_val_batches=1)
        plain.fit(untouched, datamodule=data().datamodule)
        method = build(original)
        failing = [_Fails(isinstance(method, IterativeMethod))] if fails else []
        t = trainer(steps=2, limit_val_batches=1, callbacks=[method, *failing])
        limit = t.limit_train_batches
        if fails:
            with pytest.raises(ValueError, match="stop here"):
                t.fit(fresh, datamodule=data())
        else:
            t.fit(fresh, datamodule=data())
        assert state_of(fresh) == state_of(untouched), "the module must be as it was"
        assert set(t.__dict__) == set(plain.__dict__)
        assert set(t.strategy.__dict__) == set(plain.strategy.__dict__)
        assert t.limit_train_batches == limit
        copied = copy_of(fresh)
        assert copied.training_step.__func__ is type(fresh).training_step  # type: ignore[union-attr]
