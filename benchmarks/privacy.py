"""What DP-SGD costs: a private step over the plain step, by Opacus alone and in a Trainer. One torch thread.

    python benchmarks/privacy.py [--rounds 5] [--steps 15] [--csv docs/benchmark_privacy.csv]

Three networks on 28x28 images, Poisson batches of 256 on average from a DataLoader. "Opacus" is a training loop by hand
around PrivacyEngine, "DPSGD" the callback in a Trainer without logger. All variants of a network run in one process and
take turns; the figure is the median CPU time of a step. Peak memory is that of a fresh process above what it holds before
the first step. Beside each time stands the ratio to the plain loop by hand; the floor for book-keeping is the plain step
and one look at every input and output of a layer.
"""

from __future__ import annotations

import argparse
import csv
import logging
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from groundwire.callbacks.privacy import DPSGD
from groundwire.recipes import TanhCNN

BATCH, RECORDS, WARM_UP = 256, 8192, 3
ENGINES = ("bookkeeping", "ghost", "hooks", "functorch")
OPACUS = ("hooks", "ghost", "functorch")


def networks() -> dict[str, Callable[[], nn.Sequential]]:
    """By name, how to build each."""

    def mlp() -> nn.Sequential:
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))

    def cnn() -> nn.Sequential:
        return nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(3136, 128), nn.ReLU(), nn.Linear(128, 10)),
        )

    return {"MLP 0.2 M": mlp, "TanhCNN 26 k": lambda: TanhCNN().net, "CNN 0.42 M": cnn}


class Module(pl.LightningModule):
    """A network and cross entropy."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Clock(pl.Callback):
    """CPU time at the start of every batch's fetch."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.marks.append(time.process_time())


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(RECORDS, 1, 28, 28, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(0, 10, (RECORDS,), generator=generator)), batch_size=BATCH)


def in_a_trainer(net: nn.Module, steps: int, engine: str | None) -> list[float]:
    """CPU seconds of each step after the warm-up."""
    clock = Clock()
    callbacks: list[pl.Callback] = [clock]
    if engine is not None:
        private = DPSGD(noise_multiplier=1.0, engine=engine, ghost_output="net", probe=False, accountant="rdp")  # type: ignore[arg-type]
        callbacks.insert(0, private)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=steps + WARM_UP, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=10**9, callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(Module(net), data())
    return [b - a for a, b in zip(clock.marks[WARM_UP - 1 :], clock.marks[WARM_UP:], strict=False)]


def by_hand(net: nn.Module, steps: int, mode: str | None) -> list[float]:
    """The same by a loop, plain or with Opacus."""
    optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1)
    loader: Any = data()
    criterion: Any = nn.CrossEntropyLoss()
    if mode is not None:
        engine = PrivacyEngine(accountant="rdp")
        private = engine.make_private(
            module=net, optimizer=optimizer, data_loader=loader, criterion=criterion,
            noise_multiplier=1.0, max_grad_norm=1.0, grad_sample_mode=mode,
        )  # fmt: skip
        if mode == "ghost":
            net, optimizer, criterion, loader = private
        else:
            net, optimizer, loader = private
    marks: list[float] = []
    while len(marks) < steps + WARM_UP:
        for x, y in loader:
            optimizer.zero_grad()
            criterion(net(x), y).backward()
            optimizer.step()
            marks.append(time.process_time())
    return [b - a for a, b in zip(marks[WARM_UP - 1 :], marks[WARM_UP : steps + WARM_UP], strict=False)]


def variants() -> dict[str, Callable[[nn.Module, int], list[float]]]:
    kinds: dict[str, Callable[[nn.Module, int], list[float]]] = {
        "plain, by hand": lambda net, steps: by_hand(net, steps, None),
        "plain, Trainer": lambda net, steps: in_a_trainer(net, steps, None),
    }
    for mode in OPACUS:
        kinds[f"Opacus {mode}"] = lambda net, steps, mode=mode: by_hand(net, steps, mode)  # type: ignore[misc]
    for engine in ENGINES:
        kinds[f"DPSGD {engine}"] = lambda net, steps, engine=engine: in_a_trainer(net, steps, engine)  # type: ignore[misc]
    return kinds


def resident(field: str) -> float:
    """MB of this process, from Linux's own account."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def peak_memory(network: str, variant: str) -> float:
    """MB above what the process holds before the first step, in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", network, variant]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--memory-of", nargs=2, metavar=("NETWORK", "VARIANT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    kinds = variants()
    if args.memory_of:
        network, variant = args.memory_of
        kinds["plain, by hand"](nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), 2)  # libraries that load on first use
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from what is held now
        before = resident("VmHWM")
        kinds[variant](networks()[network](), 4)
        print(resident("VmHWM") - before)
        return
    rows: list[dict[str, Any]] = []
    for network, build in networks().items():
        times: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(args.rounds):
            for name, run in kinds.items():
                torch.manual_seed(0)
                times[name] += run(build(), args.steps)
        plain = statistics.median(times["plain, by hand"])
        for name, seconds in times.items():
            step = statistics.median(seconds)
            row = {
                "network": network,
                "variant": name,
                "cpu_ms": round(1e3 * step, 2),
                "samples_per_s": round(BATCH / step),
                "ratio_to_plain": round(step / plain, 2),
                "peak_mb": round(peak_memory(network, name)),
            }
            rows.append(row)
            print(
                f"{network:13} {name:18} {row['cpu_ms']:8.2f} ms CPU {row['samples_per_s']:8} samples/s   ratio to plain "
                f"{row['ratio_to_plain']:6.2f}   peak {row['peak_mb']:5} MB",
                flush=True,
            )
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
