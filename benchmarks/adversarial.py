"""What adversarial training costs: a Trainer's step with each method over the plain step. One torch thread, one process.

    python benchmarks/adversarial.py [--rounds 40] [--csv docs/benchmark_adversarial.csv]

SmallCNN on 28x28 images, B = 128. The steps of one fit take turns: plain, PGD-AT (10), a PGD-AT written by hand into the
step as users do, fast AT, TRADES (10), MART (10), CAP (2 particles, 5 steps), AT-AKA (2 teachers, 4 steps). Beside each
ratio stands the number of forward and backward passes that the method needs for a sample, an upper bound of what the ratio
should be: passes for inputs need no gradients of weights.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import logging
import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F

from groundwire.callbacks import StepCallback
from groundwire.callbacks.adversarial import (
    MART,
    PGD,
    SVGD,
    TRADES,
    AdaptiveKnowledgeAmalgamation,
    AdversarialTraining,
    ConfinedPolytopes,
    CornerSearch,
    RandomFGSM,
    ThreatModel,
)
from groundwire.recipes import SmallCNN

BATCH, WARM_UP, EPS, STEPS = 128, 2, 0.1, 10
THREAT = ThreatModel(eps=EPS)


class ByHand(StepCallback):
    """The loop as found in many training scripts: parameters' gradients on, the network left in training mode."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.module = pl_module

    def around_step(self, step: Any, batch: Any) -> Any:
        x, y = batch
        moved = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
        for _ in range(STEPS):
            moved.requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(self.module(moved), y), moved)
            moved = torch.min(torch.max(moved.detach() + EPS / 4 * gradient.sign(), x - EPS), x + EPS).clamp(0, 1)
        return step((moved, y))


def methods() -> dict[str, tuple[StepCallback | None, int]]:
    """By name the callback, and its forward and backward passes for a sample."""
    near = {"num_steps": STEPS, "start": "gaussian", "track": "last"}
    return {
        "plain": (None, 1),
        "PGD-AT 10": (AdversarialTraining(THREAT, PGD(STEPS, track="last")), STEPS + 1),
        "PGD-AT 10 by hand": (ByHand(), STEPS + 1),
        "fast AT": (AdversarialTraining(THREAT, RandomFGSM()), 2),
        "TRADES 10": (TRADES(THREAT, attack=PGD(loss="kl", **near)), STEPS + 2),  # type: ignore[arg-type]
        "MART 10": (MART(THREAT, attack=PGD(**near)), STEPS + 2),  # type: ignore[arg-type]
        "CAP 2 x 5": (ConfinedPolytopes(THREAT, search=CornerSearch(2, 5)), 2 * 5 + 2 + 1),
        "AT-AKA 2 x 4": (
            AdaptiveKnowledgeAmalgamation(THREAT, [SmallCNN(), SmallCNN()], attack=SVGD(2, num_steps=4)),
            2 * 4 + 2 + 1,
        ),
    }


class Turns(StepCallback):
    """Hands each step to the next of several callbacks."""

    def __init__(self, callbacks: list[StepCallback | None]) -> None:
        self.callbacks = callbacks
        self.trainer: pl.Trainer | None = None
        self.marks: list[float] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for callback in self.callbacks:
            if isinstance(callback, ByHand):
                callback.module = pl_module
            elif callback is not None:
                trainer.callbacks.append(callback)  # type: ignore[attr-defined]
                pl.Callback.setup(callback, trainer, pl_module, stage)
                callback._trainer, callback._pl_module = trainer, pl_module  # type: ignore[attr-defined]
                for teacher in getattr(callback, "teachers", []):
                    teacher.prepare(pl_module, torch.device("cpu"))
                trainer.callbacks.remove(callback)  # type: ignore[attr-defined]
        super().setup(trainer, pl_module, stage)
        self.trainer = trainer

    def around_step(self, step: Any, batch: Any) -> Any:
        assert self.trainer is not None
        callback = self.callbacks[self.trainer.global_step % len(self.callbacks)]
        return step(batch) if callback is None else callback.around_step(step, batch)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        callback = self.callbacks[trainer.global_step % len(self.callbacks)]
        self.marks.append(time.process_time())
        if callback is not None:
            callback.on_train_batch_start(trainer, pl_module, batch, batch_idx)


class Repeat:
    """The same batch over and over."""

    def __init__(self, batch: Any, times: int) -> None:
        self.batch, self.times = batch, times

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Iterator[Any]:
        return itertools.repeat(self.batch, self.times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    generator = torch.Generator().manual_seed(0)
    batch = torch.rand(BATCH, 1, 28, 28, generator=generator), torch.randint(0, 10, (BATCH,), generator=generator)
    kinds = methods()
    turns = Turns([callback for callback, _ in kinds.values()])
    steps = len(kinds) * (args.rounds + WARM_UP) + 1
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=10**9, callbacks=[turns],
    )  # fmt: skip
    trainer.fit(SmallCNN(), Repeat(batch, steps))
    times = [b - a for a, b in itertools.pairwise(turns.marks)][len(kinds) * WARM_UP :]
    plain = statistics.median(times[:: len(kinds)])
    rows = []
    for turn, (name, (_, passes)) in enumerate(kinds.items()):
        seconds = statistics.median(times[turn :: len(kinds)])
        rows.append({"method": name, "cpu_ms": 1e3 * seconds, "passes": passes, "ratio": seconds / plain})
        print(
            f"{name:18} {1e3 * seconds:8.2f} ms CPU   ratio to plain {seconds / plain:6.2f}   passes {passes:3}   "
            f"ratio / passes {seconds / plain / passes:.2f}"
        )
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
