"""The baselines on two processes: what must agree does, and what must differ differs."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from groundwire.callbacks.unlearning import UnlearningMethod
from groundwire.callbacks.unlearning.gradient_ascent import GradDiff, GradientAscent
from groundwire.callbacks.unlearning.npo import NPO
from groundwire.callbacks.unlearning.random_labels import RandomLabels
from groundwire.callbacks.unlearning.retrain import FineTune
from groundwire.callbacks.unlearning.scrub import SCRUB
from groundwire.callbacks.unlearning.ssd import SSD
from helpers.ddp import ddp_trainer, run_ddp
from helpers.edge import weights
from helpers.unlearning import ToForget, checkpoint, place_among_others, to_forget, unlearn

BUILDS: dict[str, Any] = {
    "fine_tune": FineTune,
    "gradient_ascent": partial(GradientAscent, max_forget_loss=1.0),
    "grad_diff": GradDiff,
    "npo": NPO,
    "random_labels": partial(RandomLabels, seed=0),
    "scrub": SCRUB,
    "rewind": partial(SCRUB, rewind=True, msteps=3),
    "ssd": partial(SSD, alpha=2.0),
}
STEPS = {"gradient_ascent": 100, "scrub": 8, "rewind": 12}


class Seen(pl.Callback):
    """Of each step, on this rank: the parts of the batch, labels, and the forget loss."""

    def __init__(self) -> None:
        self.parts: list[tuple[str, ...]] = []
        self.drawn: list[Tensor] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, t: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.parts.append(tuple(batch))
        self.losses.append(float(outputs["loss"]))
        if "wrong_labels" in batch:
            self.drawn.append(place_among_others(batch))


def data_of(name: str, batch_size: int) -> Any:
    if name == "ssd":
        return to_forget(forget="class", label=3)
    return to_forget(batch_size=10 * batch_size if name in ("scrub", "rewind") else batch_size)


def on_a_rank(original: Path) -> dict[str, dict[str, Any]]:
    """All methods, one after the other."""
    found = {}
    for name, build in BUILDS.items():
        method, seen, module = build(original), Seen(), ToForget(lr=0.05)
        t = ddp_trainer(steps=STEPS.get(name, 6), callbacks=[seen, method], limit_val_batches=0)
        t.fit(module, datamodule=data_of(name, 20))
        found[name] = {
            "weights": weights(module),
            "steps": t.global_step,
            "parts": seen.parts,
            "losses": seen.losses,
            "drawn": seen.drawn,
            "read": method.records_read,
            "rewound_to": getattr(method, "rewound_to", None),
        }
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, dict[str, Any]]]:
    return run_ddp(on_a_rank, checkpoint(), timeout_s=120)


def alone(name: str) -> tuple[Tensor, UnlearningMethod, int]:
    method = BUILDS[name](checkpoint())
    module, t = unlearn(method, ToForget(lr=0.05), data_of(name, 40), steps=STEPS.get(name, 6))
    return weights(module), method, t.global_step


@pytest.mark.parametrize("name", BUILDS)
def test_ranks_agree(name: str, ranks: Any) -> None:
    first, second = (rank[name] for rank in ranks)
    assert torch.isfinite(first["weights"]).all()
    assert torch.equal(first["weights"], second["weights"])
    assert first["steps"] == second["steps"]
    assert first["rewound_to"] == second["rewound_to"]


@pytest.mark.parametrize("name", [name for name in BUILDS if name != "random_labels"])
def test_two_ranks_equal_one_process_with_larger_batches(name: str, ranks: Any) -> None:
    expected, method, steps = alone(name)
    first, second = (rank[name] for rank in ranks)
    assert first["steps"] == steps
    torch.testing.assert_close(first["weights"], expected, rtol=1e-3, atol=2e-5)
    assert first["rewound_to"] == getattr(method, "rewound_to", None)
    if name != "ssd":  # which every rank computes from all data
        assert {p: first["read"][p] + second["read"][p] for p in ("forget", "retain")} == method.records_read


def test_labels_of_ranks_are_drawn_independently(ranks: Any) -> None:
    first, second = (torch.cat(rank["random_labels"]["drawn"]) for rank in ranks)
    assert len(first) == len(second) == 6 * 20
    assert first.max() <= 8 >= second.max()
    same = int((first == second).sum())  # of 120, each with probability 1/9
    assert same < 120 / 9 + 5 * math.sqrt(120 * 8 / 81)


def test_batches_in_turn_are_of_the_same_kind(ranks: Any) -> None:
    first, second = (rank["scrub"]["parts"] for rank in ranks)
    assert first == second == [("forget",), *3 * [("retain",)]] * 2


def test_ascent_stops_by_the_mean_over_ranks(ranks: Any) -> None:
    losses = -torch.tensor([rank["gradient_ascent"]["losses"] for rank in ranks])
    assert not torch.equal(losses[0], losses[1]), "each rank has seen other samples"
    mean = losses.mean(dim=0)
    assert len(mean) < 100
    assert mean[-1] >= 1.0
    assert bool((mean[:-1] < 1.0).all())
    crossed = (losses >= 1.0).int().argmax(dim=1)
    assert crossed.min() < len(mean), "and each for itself would have decided at some step of its own"
