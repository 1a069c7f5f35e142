"""The tester through which every StepCallback goes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from groundwire.callbacks import StepCallback
from groundwire.plugins.edge import EdgeStrategy
from helpers.edge import Classifier, fit, loader, mlp, trainer, weights


def check_step_callback(
    build: Callable[[], StepCallback],
    *,
    off: Callable[[], StepCallback] | None = None,
    changes: bool = True,
    module: pl.LightningModule | None = None,
) -> None:
    """What every StepCallback must pass.

    Args:
        build: A fresh callback, switched on.
        off: The same switched off: must equal a Trainer without it, bit for bit.
        changes: Whether it is meant to change the trained weights.
        module: What to train.
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
    _check_leaves_no_trace(build, module)


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
            with pytest.raises((expected, type(error))):
                t.fit(fresh, loader())
        assert set(fresh.__dict__) == set(untouched.__dict__), f"the module must be as it was after {error!r}"
        hooks = [{name: len(m._forward_hooks) for name, m in x.named_modules()} for x in (fresh, untouched)]
        assert hooks[0] == hooks[1], f"no hook may stay after {error!r}"
        assert torch.isfinite(weights(fresh)).all()
