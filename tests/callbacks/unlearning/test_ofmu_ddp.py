from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from groundwire.callbacks.unlearning.ofmu import OFMU
from groundwire.datamodules import Digits
from groundwire.datamodules.forget_retain import ForgetRetain
from helpers.ddp import ddp_trainer, run_ddp
from helpers.edge import Classifier, trainer, weights

SETTINGS: dict[str, Any] = {"inner_steps": 3, "inner_lr": 0.5, "beta": 0.3, "rho": 1e-2, "eps_cos": 0.1}
OPTIONS: dict[str, Any] = {"precision": "64-true", "limit_val_batches": 0}
LIMITS = (None, 2.45)


def module() -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return Classifier(nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10)), "SGD", 0.1)


def data(batch_size: int) -> ForgetRetain:
    return ForgetRetain(
        Digits(seed=0, flatten=True), forget="indices", indices=list(range(40)), batch_size=batch_size, seed=0
    )


def run(t: pl.Trainer, batch_size: int, limit: float | None) -> tuple[Tensor, dict[str, int], dict[str, float]]:
    """The weights, what was read, and what was logged."""
    of, callback = module(), OFMU(max_forget_loss=limit, **SETTINGS)
    t.callbacks.append(callback)  # type: ignore[attr-defined]
    t.fit(of, datamodule=data(batch_size))
    logged = {name: float(value) for name, value in t.callback_metrics.items()}
    return weights(of), callback.records_read, logged


def on_a_rank() -> list[Any]:
    return [run(ddp_trainer(steps=4, **OPTIONS), 10, limit) for limit in LIMITS]


def test_two_processes_are_one_with_the_joined_batch() -> None:
    """Also where the loss of a single process is not at the limit at which both stop."""
    for limit, first, second in zip(LIMITS, *run_ddp(on_a_rank), strict=True):
        joined, read, logged = run(trainer(steps=4, **OPTIONS), 20, limit)
        assert torch.equal(first[0], second[0]), "parameters must stay in sync"
        torch.testing.assert_close(first[0], joined, rtol=1e-9, atol=1e-11)
        assert first[1] == second[1]
        assert {name: 2 * count for name, count in first[1].items()} == read
        full = 4 * 6 * 20  # three ascents, at the weights reached, and on both sides of them
        assert (read["forget"] == full) == (limit is None)
        for name in ("train/forget_loss", "train/cosine", "train/grad_phi_norm"):
            assert first[2][name] == pytest.approx(logged[name], rel=1e-6)
