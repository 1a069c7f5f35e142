"""Rounds per second of EdgeStrategy against what a user would write, and against the least that must be computed.

Every variant runs in a process of its own, in turn, several times; medians are printed. One torch thread.

    python benchmarks/edge.py [--repeats 3] [--csv docs/benchmark_edge.csv]

Variants:
    edge   EdgeStrategy (error-free uplink) in a Trainer without logger and progress bar
    loop   a hand-tuned loop over devices: slices of tensors, autograd.grad, running mean, Adam
    bound  one batched forward and backward with the same per-device gradients, their mean, Adam; no Lightning
    plain  (one device) a plain Trainer
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from groundwire.plugins.edge import DeviceBatch, EdgeStrategy

CASES: dict[str, dict[str, Any]] = {
    "softmax M=25 B=1000": {"model": "softmax", "devices": 25, "batch": 1000, "rounds": 30},
    "softmax M=1000 B=60": {"model": "softmax", "devices": 1000, "batch": 60, "rounds": 12},
    "cnn M=10 B=32": {"model": "cnn", "devices": 10, "batch": 32, "rounds": 30},
    "cnn M=1 B=32": {"model": "cnn", "devices": 1, "batch": 32, "rounds": 150},
}
WARM_UP = 3


def network(kind: str, hidden: int = 64) -> nn.Module:
    torch.manual_seed(0)
    if kind == "softmax":
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(1568, hidden), nn.ReLU(), nn.Linear(hidden, 10),
    )  # fmt: skip


class Module(pl.LightningModule):
    def __init__(self, kind: str, hidden: int = 64) -> None:
        super().__init__()
        self.network = network(kind, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Repeat:
    """The same batch over and over."""

    def __init__(self, batch: Any, count: int) -> None:
        self.batch, self.count = batch, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.count):
            yield self.batch


class Clock(pl.Callback):
    """Wall and CPU seconds between the end of the warm-up and the last step."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 == WARM_UP or batch_idx + 1 == trainer.max_steps:
            self.marks.append((time.perf_counter(), time.process_time()))


def fit(module: pl.LightningModule, strategy: Any, batch: Any, steps: int, *callbacks: Any, devices: int = 1) -> None:
    trainer = pl.Trainer(
        strategy=strategy, accelerator="cpu", devices=devices, max_steps=steps, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(module, Repeat(batch, steps))


def with_trainer(case: dict[str, Any], strategy: Any, batch: Any) -> tuple[float, float]:
    clock = Clock()
    fit(Module(case["model"]), strategy, batch, case["rounds"] + WARM_UP, clock)
    (wall0, cpu0), (wall1, cpu1) = clock.marks
    return wall1 - wall0, cpu1 - cpu0


def by_hand(case: dict[str, Any], step: Callable[[nn.Module, torch.optim.Optimizer], None]) -> tuple[float, float]:
    model = network(case["model"])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(WARM_UP):
        step(model, optimizer)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(case["rounds"]):
        step(model, optimizer)
    return time.perf_counter() - wall, time.process_time() - cpu


def loop_step(x: Tensor, y: Tensor) -> Callable[[nn.Module, torch.optim.Optimizer], None]:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        params = list(model.parameters())
        total = [torch.zeros_like(p) for p in params]
        for m in range(len(x)):
            for acc, g in zip(total, torch.autograd.grad(F.cross_entropy(model(x[m]), y[m]), params), strict=True):
                acc.add_(g, alpha=1 / len(x))
        for p, g in zip(params, total, strict=True):
            p.grad = g
        optimizer.step()

    return step


def bound_step(kind: str, x: Tensor, y: Tensor) -> Callable[[nn.Module, torch.optim.Optimizer], None]:
    hot = F.one_hot(y, 10).float()

    def softmax(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        weight, bias = model[1].weight, model[1].bias  # type: ignore[index]
        flat = x.flatten(2)
        with torch.no_grad():
            error = (torch.softmax(flat @ weight.T + bias, dim=-1) - hot) / x.shape[1]
            per_device = error.transpose(1, 2) @ flat
            weight.grad, bias.grad = per_device.mean(0), error.sum(1).mean(0)
        optimizer.step()

    def general(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        params = {name: p.detach() for name, p in model.named_parameters()}
        per_device = vmap(grad(lambda p, a, b: F.cross_entropy(functional_call(model, p, (a,)), b)), (None, 0, 0))(
            params, x, y
        )
        for name, p in model.named_parameters():
            p.grad = per_device[name].mean(0)
        optimizer.step()

    return softmax if kind == "softmax" else general


def be_quiet_on_one_thread() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def measure(name: str, variant: str) -> dict[str, float]:
    be_quiet_on_one_thread()
    case = CASES[name]
    g = torch.Generator().manual_seed(1)
    x = torch.rand(case["devices"], case["batch"], 1, 28, 28, generator=g)
    y = torch.randint(0, 10, (case["devices"], case["batch"]), generator=g)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if variant == "edge":
        counts = torch.full((case["devices"],), case["batch"])
        batch = DeviceBatch(data=(x, y), device_ids=torch.arange(case["devices"]), num_samples=counts)
        wall, cpu = with_trainer(case, EdgeStrategy(num_devices=case["devices"]), batch)
    elif variant == "plain":
        wall, cpu = with_trainer(case, "auto", (x[0], y[0]))
    elif variant == "loop":
        wall, cpu = by_hand(case, loop_step(x, y))
    else:
        wall, cpu = by_hand(case, bound_step(case["model"], x, y))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"wall_ms": 1e3 * wall / case["rounds"], "cpu_ms": 1e3 * cpu / case["rounds"], "peak_mib": peak / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("CASE", "VARIANT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one)))
        return
    rows = []
    for name, case in CASES.items():
        variants = ["edge", "plain", "loop"] if case["devices"] == 1 else ["edge", "loop", "bound"]
        runs: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
        for _ in range(args.repeats):
            for variant in variants:
                command = [sys.executable, __file__, "--one", name, variant]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                runs[variant].append(json.loads(done.stdout.splitlines()[-1]))
        for variant in variants:
            median = {key: statistics.median(run[key] for run in runs[variant]) for key in runs[variant][0]}
            # the ratio of paired runs, so that a drift of the machine's speed cancels
            ratio = statistics.median(
                e["cpu_ms"] / o["cpu_ms"] for e, o in zip(runs["edge"], runs[variant], strict=True)
            )
            rows.append({"case": name, "variant": variant} | median | {"edge_cpu_over_this": ratio})
            row = rows[-1]
            print(
                f"{name:22} {variant:6} {row['wall_ms']:8.2f} ms wall {row['cpu_ms']:8.2f} ms CPU a round "
                f"{row['peak_mib']:7.0f} MiB peak   edge / {variant}: {ratio:.2f}"
            )
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
