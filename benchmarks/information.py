"""What CMIC-DL and the NCMI metric cost, against what they are added to. One torch thread.

    python benchmarks/information.py [--repeats 5] [--csv docs/benchmark_information.csv]

Parts, each variant in a process of its own, in turn, several times; medians and ratios of paired runs are printed:
    step     a Trainer's step of SmallCNN (B = 128, 10 classes) with CMIConstraint / without; the ratio is of one process
             in which every other step is constrained, since processes differ by more than the constraint costs
    step1000 the same of a linear layer from 512 features to 1,000 classes
    terms    CMI and Gamma with their gradient, B = 128, 10 or 1,000 classes / cross entropy with its gradient; and the
             bytes that the terms must move at least, at the machine's copying speed, over their time
    metric   one update of NormalizedCMI / of torchmetrics' MulticlassConfusionMatrix, B = 1,000
"""

from __future__ import annotations

import argparse
import csv
import itertools
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
from torchmetrics.classification import MulticlassConfusionMatrix

from groundwire.callbacks.information import CMIConstraint, NormalizedCMI
from groundwire.callbacks.information.functional import divergence_to_centroids, log_probs, separation_of
from groundwire.recipes import Classifier, SmallCNN

WARM_UP, STEPS, BATCH = 10, 100, 128
CASES = {
    "step": ["with", "without", "every other"],
    "step1000": ["with", "without", "every other"],
    "terms10": ["cmic", "ce", "copy"],
    "terms1000": ["cmic", "ce", "copy"],
    "metric10": ["ncmi", "confusion"],
    "metric1000": ["ncmi", "confusion"],
}


class Repeat:
    """The same batch over and over."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return WARM_UP + STEPS

    def __iter__(self) -> Iterator[Any]:
        for _ in range(len(self)):
            yield self.batch


class Clock(pl.Callback):
    """When each step ended, in CPU seconds."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.marks.append(time.process_time())

    def median(self, start: int = 0, every: int = 1) -> float:
        """CPU seconds of a step, without the warm-up: the median, since other processes slow some steps down."""
        times = [b - a for a, b in itertools.pairwise(self.marks)]
        return statistics.median(times[WARM_UP + start :: every])


class EveryOther(CMIConstraint):
    """Constrains the steps of odd number, and leaves the others alone."""

    def around_step(self, step: Any, batch: Any) -> Any:
        odd = self.trainer.global_step % 2
        return super().around_step(step, batch) if odd else step(batch)


CONSTRAINTS: dict[str, list[pl.Callback]] = {
    "with": [CMIConstraint(warmup_epochs=0)],
    "without": [],
    "every other": [EveryOther(warmup_epochs=0)],
}


def train(case: str, variant: str) -> Clock:
    generator = torch.Generator().manual_seed(0)
    if case == "step":
        module: Classifier = SmallCNN()
        x, classes = torch.rand(BATCH, 1, 28, 28, generator=generator), 10
    else:
        module = Classifier(nn.Linear(512, 1000), num_classes=1000)
        x, classes = torch.rand(BATCH, 512, generator=generator), 1000
    batch = x, torch.randint(0, classes, (BATCH,), generator=generator)
    clock = Clock()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=WARM_UP + STEPS, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[*CONSTRAINTS[variant], clock],
    )  # fmt: skip
    trainer.fit(module, Repeat(batch))
    return clock


def timed(call: Callable[[], Any], repeats: int = 200) -> float:
    for _ in range(WARM_UP):
        call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def terms(classes: int, variant: str) -> float:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(BATCH, classes, generator=generator).requires_grad_()
    y = torch.randint(0, classes, (BATCH,), generator=generator)
    q = torch.full((classes, classes), 1 / classes)
    if variant == "copy":  # read z, p, log p, Q's rows and write z's gradient: five passes over [B, C]
        buffers = [torch.rand(BATCH, classes) for _ in range(5)]
        target = torch.empty(BATCH, classes)
        return timed(lambda: [target.copy_(buffer) for buffer in buffers])

    def cmic() -> Tensor:
        log_p = log_probs(z)
        p = log_p.exp()
        cmi = divergence_to_centroids(log_p, q[y].clamp_min(1e-12).log(), p).mean()
        return cmi - 0.01 * separation_of(log_p, y, classes, unbiased=True, p=p)

    loss = cmic if variant == "cmic" else lambda: F.cross_entropy(z, y)
    return timed(lambda: torch.autograd.grad(loss(), z))


def metric(classes: int, variant: str) -> float:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1000, classes, generator=generator)
    y = torch.randint(0, classes, (1000,), generator=generator)
    found: Any = NormalizedCMI(classes) if variant == "ncmi" else MulticlassConfusionMatrix(classes)
    return timed(lambda: found.update(z, y), repeats=50)


def measure(case: str, variant: str) -> dict[str, float]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if case.startswith("step"):
        clock = train(case, variant)
        if variant == "every other":  # mark i ends step i, so that the first time is that of step 1, a constrained one
            return {"ratio": clock.median(0, 2) / clock.median(1, 2)}
        seconds = clock.median()
    elif case.startswith("terms"):
        seconds = terms(int(case.removeprefix("terms")), variant)
    else:
        seconds = metric(int(case.removeprefix("metric")), variant)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"cpu_ms": 1e3 * seconds, "peak_mib": peak / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("CASE", "VARIANT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one)))
        return
    rows = []
    for case, variants in CASES.items():
        runs: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
        for _ in range(args.repeats):
            for variant in variants:
                command = [sys.executable, __file__, "--one", case, variant]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                runs[variant].append(json.loads(done.stdout.splitlines()[-1]))
        ours = runs[variants[0]]
        within = [run["ratio"] for run in runs.pop("every other", [])]
        for variant, theirs in runs.items():
            median = {key: statistics.median(run[key] for run in theirs) for key in ours[0]}
            ratio = statistics.median(a["cpu_ms"] / b["cpu_ms"] for a, b in zip(ours, theirs, strict=True))
            if within and variant == "without":
                ratio = statistics.median(within)
            rows.append({"case": case, "variant": variant} | median | {f"{variants[0]}_over_this": ratio})
            print(
                f"{case:10} {variant:10} {median['cpu_ms']:8.3f} ms CPU {median['peak_mib']:7.1f} MiB peak   "
                f"{variants[0]} / {variant}: {ratio:.3f}"
            )
    if args.csv:
        names = ["case", "variant", "cpu_ms", "peak_mib", "ratio_of_first"]
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=names)
            writer.writeheader()
            for row in rows:
                *plain, (_, ratio) = row.items()
                writer.writerow(dict(plain) | {"ratio_of_first": ratio})


if __name__ == "__main__":
    main()
