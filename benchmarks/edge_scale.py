"""Rounds per second and peak memory of EdgeStrategy with 1,000 devices, 100 of which take part, and 400,000 parameters.

Every run has a process of its own, all in turn, several times; medians are printed. One torch thread a process; one round to
warm up, three measured. Where the machine has other work, compare CPU times: it stretches wall times more. The images are
random, 10 of 1 x 28 x 28 a device, all held in memory; the network has two convolutions and two linear layers, of which the
hidden width alone changes. Peak memory is the largest resident set of the process (``ru_maxrss``), nothing subtracted; what
it was before the run (imports and data) stands beside it; of two processes, the sum. Error memories of all 1,000 devices are
in use from the first round on: 1,000 x 4 d bytes.

    python benchmarks/edge_scale.py [--repeats 2] [--csv docs/benchmark_edge_scale.csv]

Variants:
    edge   EdgeStrategy with UniformSample in a Trainer without logger and progress bar; ``x2`` in two processes (gloo)
    loop   written by hand: for each scheduled device slices of tensors, autograd.grad, and what its uplink does to one vector
    bound  as in edge.py: one batched forward and backward with per-device gradients (torch.func), their mean, Adam; no Lightning
    batch  one forward and backward of all the round's samples for their mean gradient only, Adam; no Lightning

Uplinks: error_free; top_k (1 % of the entries, error feedback); a_dsgd and ca_dsgd (half a channel use a parameter, cosine
transform, AMP; the loop calls the same projection and decoder); blind (BlindTransmitters with K antennas).
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import edge
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from groundwire.plugins.channels import AMP, make_projection
from groundwire.plugins.compression import ErrorFeedback, ErrorMemory, TopK
from groundwire.plugins.edge import DeviceBatch, EdgeStrategy, UniformSample, Uplink
from groundwire.plugins.edge.uplinks.a_dsgd import ADSGD
from groundwire.plugins.edge.uplinks.blind import BlindTransmitters
from groundwire.plugins.edge.uplinks.ca_dsgd import CADSGD
from groundwire.plugins.edge.uplinks.digital import Digital
from groundwire.plugins.edge.uplinks.error_free import ErrorFree

DEVICES, BATCH, ROUNDS, WARM_UP = 1000, 10, 3, 1
DENSITY, BANDWIDTH, SPARSITY, POWER = 0.01, 0.5, 0.5, 500.0
HIDDEN = {38_522: 16, 130_104: 74, 400_113: 245}  # width of the hidden layer, by parameters


@dataclass(frozen=True)
class Run:
    variant: str = "edge"
    uplink: str = "error_free"
    scheduled: int = 100
    numel: int = 400_113
    antennas: int = 0
    processes: int = 1

    def __str__(self) -> str:
        tail = f" K={self.antennas}" if self.antennas else ""
        name = self.variant + (f" x{self.processes}" if self.processes > 1 else "")
        return f"{self.uplink:10} {name:7} M={self.scheduled:<3} d={self.numel:<6}{tail}"


SCALE = [
    Run(),
    Run("loop"),
    Run("bound"),
    Run("batch"),
    Run(uplink="top_k"),
    Run("loop", "top_k"),
    Run(uplink="a_dsgd"),
    Run("loop", "a_dsgd"),
    Run(uplink="ca_dsgd"),
]
SWEPT = [Run(uplink=name) for name in ("error_free", "top_k", "a_dsgd")]
SWEEPS = {
    "M": [[replace(run, scheduled=m) for m in (10, 30, 100)] for run in SWEPT],
    "d": [[replace(run, numel=d) for d in HIDDEN] for run in SWEPT],
    "K": [[Run(uplink="blind", scheduled=10, numel=38_522, antennas=k) for k in (1, 10, 100)]],
}
FACTOR = {"M": "scheduled", "d": "numel", "K": "antennas"}
TWO_PROCESSES = [Run(uplink=name, processes=2) for name in ("error_free", "top_k")]


def uplink_of(run: Run) -> Uplink:
    analog = {"power": POWER, "bandwidth": BANDWIDTH, "sparsity": SPARSITY}
    makers: dict[str, Callable[[], Uplink]] = {
        "error_free": ErrorFree,
        "top_k": lambda: Digital(ErrorFeedback(TopK(density=DENSITY))),
        "a_dsgd": lambda: ADSGD(**analog, mean_removal_rounds=0),
        "ca_dsgd": lambda: CADSGD(**analog),
        "blind": lambda: BlindTransmitters(num_antennas=run.antennas),
    }
    return makers[run.uplink]()


class Clock(pl.Callback):
    """Wall and CPU seconds at the end of each round from the last of the warm-up on; fills the error memories before."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        row = residual(trainer.strategy.layout.numel)
        for memory in trainer.strategy.uplink.modules():
            if isinstance(memory, ErrorMemory):
                for start in range(0, DEVICES, 10):
                    memory.keep(row.expand(10, -1), range(start, start + 10))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 >= WARM_UP:
            self.mark()

    def mark(self) -> None:
        self.marks.append((time.perf_counter(), time.process_time()))

    def medians(self) -> dict[str, float]:
        laps = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(self.marks, self.marks[1:], strict=False)]
        return {name: statistics.median(lap[i] for lap in laps) for i, name in enumerate(("wall_s", "cpu_s"))}


def residual(numel: int) -> Tensor:
    """What a device remembers at first, of about the size of its gradient."""
    return 1e-3 * torch.randn(numel, generator=torch.Generator().manual_seed(2))


def schedules(scheduled: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(3)
    while True:
        yield torch.randperm(DEVICES, generator=generator)[:scheduled].sort().values


Step = Callable[[nn.Module, torch.optim.Optimizer], None]


def loop_of(run: Run, x: Tensor, y: Tensor) -> Step:
    """Rounds by hand; the error memory is a dict of vectors."""
    rounds = schedules(run.scheduled)
    row = residual(run.numel)
    memory = {m: row.clone() for m in range(DEVICES)} if run.uplink != "error_free" else {}
    uses = int(BANDWIDTH * run.numel)
    k = int(DENSITY * run.numel) if run.uplink == "top_k" else int(SPARSITY * uses)
    projection = make_projection("dct", uses - 1, run.numel, seed=0) if run.uplink == "a_dsgd" else None
    decoder = AMP()

    def error_free(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        rows = next(rounds)
        edge.loop_step(x[rows], y[rows])(model, optimizer)

    def compressed(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        params = list(model.parameters())
        total = torch.zeros(run.numel if projection is None else uses)
        for m in next(rounds).tolist():
            vector = torch.cat([g.flatten() for g in torch.autograd.grad(F.cross_entropy(model(x[m]), y[m]), params)])
            vector += memory[m]
            indices = vector.abs().topk(k, sorted=False).indices
            values = vector[indices]
            vector[indices] = 0
            memory[m] = vector
            if projection is None:
                total.index_add_(0, indices, values, alpha=1 / run.scheduled)
                continue
            frame = torch.cat([projection.mv(torch.zeros(run.numel).index_copy_(0, indices, values)), torch.ones(1)])
            total.add_(frame, alpha=POWER**0.5 / float(frame.norm()))
        if projection is not None:
            total += torch.randn(uses)
            total = decoder(total[:-1] / total[-1], projection).x
        for p, g in zip(params, total.split([p.numel() for p in params]), strict=True):
            p.grad = g.view_as(p)
        optimizer.step()

    return error_free if run.uplink == "error_free" else compressed


def batch_of(x: Tensor, y: Tensor) -> Step:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x.flatten(0, 1)), y.flatten()).backward()
        optimizer.step()

    return step


def measure(run: Run) -> dict[str, float]:
    edge.be_quiet_on_one_thread()
    g = torch.Generator().manual_seed(1)
    x = torch.rand(DEVICES, BATCH, 1, 28, 28, generator=g)
    y = torch.randint(0, 10, (DEVICES, BATCH), generator=g)
    module = edge.Module("cnn", HIDDEN[run.numel])
    assert sum(p.numel() for p in module.parameters()) == run.numel
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    clock = Clock()
    if run.variant == "edge":
        batch = DeviceBatch(data=(x, y), device_ids=torch.arange(DEVICES), num_samples=torch.full((DEVICES,), BATCH))
        strategy = EdgeStrategy(DEVICES, scheduler=UniformSample(run.scheduled), uplink=uplink_of(run), seed=0)
        edge.fit(module, strategy, batch, ROUNDS + WARM_UP, clock, devices=run.processes)
    else:
        rows = next(schedules(run.scheduled))
        makers: dict[str, Callable[[], Step]] = {
            "loop": lambda: loop_of(run, x, y),
            "bound": lambda: edge.bound_step("cnn", x[rows], y[rows]),
            "batch": lambda: batch_of(x[rows], y[rows]),
        }
        model, step = module.network, makers[run.variant]()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for index in range(ROUNDS + WARM_UP):
            step(model, optimizer)
            if index + 1 >= WARM_UP:
                clock.mark()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return clock.medians() | {"peak_mib": peak / 1024, "before_mib": before / 1024}


def flops(numel: int, samples: int) -> int:
    """Of a forward and a backward pass."""
    model = edge.network("cnn", HIDDEN[numel])
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(torch.rand(samples, 1, 28, 28)), torch.zeros(samples, dtype=torch.int64)).backward()
    return int(counter.get_total_flops())


def peak_rates() -> dict[str, float]:
    """The most operations a second of this core: a large product, and the network's second convolution on 100 images."""
    edge.be_quiet_on_one_thread()
    a, b = torch.rand(1024, 1024), torch.rand(1024, 1024)
    conv, image = nn.Conv2d(16, 32, 5, padding=2), torch.rand(100, 16, 14, 14)
    with torch.no_grad():
        return {
            "matmul": 2 * 1024**3 / _fastest(lambda: a @ b),
            "conv": 2 * 100 * 14 * 14 * 32 * 16 * 25 / _fastest(lambda: conv(image)),
        }


def _fastest(work: Callable[[], object]) -> float:
    def once() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return min(once() for _ in range(10))


def in_a_process(run: Run) -> dict[str, float]:
    """Of several processes the slowest round, and memory and CPU time of all together."""
    launch = [sys.executable]
    if run.processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={run.processes}"]
    command = [*launch, __file__, "--one", json.dumps(asdict(run))]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"{run} failed:\n{done.stderr[-2000:]}")
    ranks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if len(ranks) != run.processes:
        raise RuntimeError(f"{run}: {len(ranks)} of {run.processes} processes answered:\n{done.stdout[-2000:]}")
    together = {name: sum(rank[name] for rank in ranks) for name in ranks[0]}
    return together | {"wall_s": max(rank["wall_s"] for rank in ranks)}


def exponent(points: list[tuple[float, float]]) -> float:
    """Slope of a least-squares line through logarithms; NaN where a value is not positive."""
    if min(value for _, value in points) <= 0:
        return math.nan
    logs = [(math.log(factor), math.log(value)) for factor, value in points]
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--one", metavar="RUN", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        sys.stdout.write(json.dumps(measure(Run(**json.loads(args.one)))) + "\n")
        return
    swept = [run for sweeps in SWEEPS.values() for sweep in sweeps for run in sweep]
    runs = list(dict.fromkeys([*SCALE, *TWO_PROCESSES, *swept]))
    found: dict[Run, list[dict[str, float]]] = {run: [] for run in runs}
    for _ in range(args.repeats):
        for run in runs:
            found[run].append(in_a_process(run))
            print(f"  {run} {found[run][-1]['wall_s']:.2f} s", file=sys.stderr, flush=True)
    rows = {}
    for run in runs:
        median = {name: statistics.median(one[name] for one in found[run]) for name in found[run][0]}
        rows[run] = asdict(run) | {"rounds_per_s": 1 / median["wall_s"]} | median
        usual = Run(uplink=run.uplink, scheduled=run.scheduled, numel=run.numel, antennas=run.antennas)
        for name in (
            "wall",
            "cpu",
        ):  # of runs that lie beside each other, so that a drift of the machine's speed cancels
            pairs = zip(found[usual], found[run], strict=True)
            rows[run][f"edge_{name}_over_this"] = statistics.median(e[f"{name}_s"] / o[f"{name}_s"] for e, o in pairs)
        row = rows[run]
        print(
            f"{run!s:40} {row['rounds_per_s']:7.3f} rounds/s {row['wall_s']:6.2f} s wall {row['cpu_s']:6.2f} s CPU a round "
            f"{row['peak_mib']:6.0f} MiB peak ({row['before_mib']:.0f} before)   edge / this: "
            f"{row['edge_wall_over_this']:.2f} wall, {row['edge_cpu_over_this']:.2f} CPU"
        )
    print("Exponents: slope of the logarithms of CPU seconds a round, and of MiB above what was there before")
    for factor, sweeps in SWEEPS.items():
        for sweep in sweeps:
            at = [float(rows[run][FACTOR[factor]]) for run in sweep]
            seconds = exponent([(a, rows[run]["cpu_s"]) for a, run in zip(at, sweep, strict=True)])
            above = [rows[run]["peak_mib"] - rows[run]["before_mib"] for run in sweep]
            memory = exponent(list(zip(at, above, strict=True)))
            print(
                f"  {factor} of {', '.join(f'{a:.0f}' for a in at)}: {sweep[0].uplink:10} time {seconds:.2f}, memory {memory:.2f}"
            )
    work, rates = flops(SCALE[0].numel, SCALE[0].scheduled * BATCH), peak_rates()
    print(f"Forward and backward passes of a round at M=100, d=400,113: {work / 1e9:.1f} GFLOP")
    for name, rate in rates.items():
        shares = ", ".join(f"{run.variant} {work / rate / rows[run]['cpu_s']:.0%}" for run in SCALE[:4])
        print(
            f"  at this core's {name} rate, {rate / 1e9:.0f} GFLOP/s, {work / rate:.2f} s: of the CPU time of {shares}"
        )
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(next(iter(rows.values()))))
            writer.writeheader()
            writer.writerows(rows.values())


if __name__ == "__main__":
    main()
