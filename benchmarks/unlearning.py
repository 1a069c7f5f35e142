"""What forgetting costs, beside retraining and beside its lower bounds. One torch thread; Linux.

    python benchmarks/unlearning.py [--rounds 3] [--quick] [--digits] [--output docs/benchmark_unlearning.csv]

1. Each method as its recipe has it (Fashion-MNIST, TanhCNN, 5 % forgotten at random). ``method.seconds`` is read on the CPU
   clock; "by hand" is retraining in a plain loop. Records are those that the method read. A cost of a record is the
   method's time a record over retraining's. Peak memory is that of a forked process above what it held before the fit.
2. What recording the curvature costs at the end of the training. Its bound is that of the matrix products alone, without
   the Jacobians that go into them: 10 N p (rank + 10), 2 N p^2, or the rotations of ekfac, for N = 10 n columns.
3. How the cost of WIN-U's step grows with parameters p and forget set m, on MLPs as they are initialised (its cost does
   not depend on the values): columns of the forget set (s = 10 m rows), what they take out of the record's representation,
   Newton step, downdate of the record. The bound of the last three is the flops below over the rate of a matrix product
   measured in the same run, that of the columns one copy of the rows:

   full     p^3/3 + p^2 s + 2 p s q + 6 q^3, q = min(p, s); downdate 2 p^2 s            float64
   lowrank  2 s p k; 2 p k^2 + k^2 s; downdate 2 p k^2 + 6 k^3                         float64
   ekfac    2 s p_l (rows + columns) of each layer l                                  float32

Without the files of Fashion-MNIST, and with --digits, the data is scikit-learn's digits.
"""

from __future__ import annotations

import argparse
import copy
import csv
import ctypes
import logging
import math
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from groundwire import recipes
from groundwire.callbacks import unlearning
from groundwire.callbacks.reporting import ResumableCheckpoint
from groundwire.callbacks.unlearning import CurvatureRecorder, Records, record_curvature
from groundwire.callbacks.unlearning.curvature import EXTRA_COLUMNS, EKFACCurvature
from groundwire.datamodules import DatasetMissingError, Digits, FashionMNIST, ForgetRetain, TensorClassification
from groundwire.recipes import TanhCNN
from groundwire.recipes.models import Classifier

Split = tuple[Tensor, Tensor]
Row = dict[str, Any]

METHODS = ("finetune", "gradient_ascent", "grad_diff", "npo", "random_labels", "ofmu", "scrub", "ssd", "win_u")
CLASSES, RANK = 10, 100
MOST_SECONDS = 5.0  # a measurement that has taken so long is not repeated


# ---------------------------------------------------------------- data, recipes, fits


class InMemory(TensorClassification):
    """Images that are in memory already: loading them is not what is measured."""

    num_classes = CLASSES

    def __init__(self, train: Split, test: Split, batch_size: int = 128) -> None:
        super().__init__(batch_size, seed=0, drop_last=False)
        self.splits = train, test

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.splits[0][0].shape[1:])

    def load(self, seed: int) -> tuple[Split, Split, Split]:
        train, test = self.splits
        return train, test, test


def images(digits: bool, number: int) -> tuple[str, Split, Split]:
    """Name, training and a few test samples."""
    if not digits:
        try:
            data: Any = FashionMNIST(num_train=number, seed=0)
            data.setup("fit")
            return "Fashion-MNIST", some_of(data.train_data, number), some_of(data.test_data, 100)
        except DatasetMissingError:
            print("Fashion-MNIST is not there: digits instead.")
    data = Digits(seed=0)
    data.setup("fit")
    return "digits", some_of(data.train_data, number), some_of(data.test_data, 100)


def some_of(split: Split, number: int) -> Split:
    return split[0][:number].clone(), split[1][:number].clone()


@dataclass
class Recipe:
    """What a benchmark needs of a recipe's YAML."""

    name: str
    epochs: int
    callback: str
    settings: dict[str, Any]
    optimizer: dict[str, Any]
    schedule: Any
    data: dict[str, Any]

    @classmethod
    def read(cls, name: str) -> Recipe:
        path = Path(recipes.__file__).parent / "unlearning" / f"{name}.yaml"
        found = yaml.safe_load(path.read_text())
        prefix = "groundwire.callbacks.unlearning."
        callback = next(c for c in found["trainer"]["callbacks"] if c["class_path"].startswith(prefix))
        model = found["model"]["init_args"]
        return cls(
            name=name,
            epochs=found["trainer"]["max_epochs"],
            callback=callback["class_path"].removeprefix(prefix),
            settings={k: v for k, v in callback.get("init_args", {}).items() if k != "checkpoint"},
            optimizer=model["optimizer"]["init_args"],
            schedule=model.get("schedule"),
            data=found["data"]["init_args"],
        )

    def sgd(self) -> Callable[..., torch.optim.Optimizer]:
        return partial(torch.optim.SGD, **self.optimizer)

    def cnn(self, data: InMemory) -> TanhCNN:
        torch.manual_seed(0)
        return TanhCNN(data.input_shape, CLASSES, self.sgd(), schedule=self.schedule)


def fit(module: pl.LightningModule, data: pl.LightningDataModule, epochs: int, callbacks: list[pl.Callback]) -> None:
    pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, logger=False, callbacks=callbacks, limit_val_batches=0,
        enable_checkpointing=any(isinstance(c, ResumableCheckpoint) for c in callbacks), log_every_n_steps=10**9,
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, datamodule=data)  # fmt: skip


def in_a_child(work: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """The result, and the peak of memory in MB above what the process held before."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def child() -> None:
        try:
            ctypes.CDLL(None).malloc_trim(0)  # freed memory is no longer held: else it would hide a peak
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
            before = resident("VmHWM")
            result = work(*args)
            theirs.send((result, resident("VmHWM") - before))
        except BaseException as error:
            theirs.send((f"{type(error).__name__}: {error}", None))
            raise

    process = context.Process(target=child)
    process.start()
    theirs.close()
    try:
        result, peak = ours.recv()
    except EOFError:
        result, peak = "The process ended without a result: too little memory?", None
    process.join()
    if peak is None:
        raise RuntimeError(result)
    return result, peak


def resident(field: str) -> float:
    """MB of this process, from Linux's own account."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


# ---------------------------------------------------------------- 1 and 2: methods, recording


class Mark(pl.Callback):
    """CPU time at the start and the end of training, when it is this callback's turn."""

    def on_train_start(self, *_: Any) -> None:
        self.start = time.process_time()

    def on_train_end(self, *_: Any) -> None:
        self.end = time.process_time()


def train(
    module: pl.LightningModule, data: InMemory, epochs: int, recorder: CurvatureRecorder, folder: Path
) -> dict[str, float]:
    """The original training with its record; CPU seconds of both, bytes in the checkpoint."""
    mark, seconds = Mark(), 0.0

    def timed(*arguments: Any, **named: Any) -> Any:
        nonlocal seconds
        start = time.process_time()
        found = record_curvature(*arguments, **named)
        seconds = time.process_time() - start
        return found

    with mock.patch("groundwire.callbacks.unlearning.recorder.record_curvature", timed):
        fit(module, data, epochs, [mark, recorder, ResumableCheckpoint(folder, every_n_steps=10**9)])
    file = folder / "last.ckpt"
    checkpoint = torch.load(file, weights_only=False)
    del checkpoint["curvature"]
    torch.save(checkpoint, folder / "without.ckpt")
    size, size_without = file.stat().st_size, (folder / "without.ckpt").stat().st_size
    return {
        "train_s": mark.end - mark.start,
        "record_s": seconds,
        "record_bytes": size - size_without,
        "other_bytes": size_without,
    }


def forget(recipe: Recipe, data: InMemory, original: Path) -> tuple[float, dict[str, int]]:
    """CPU seconds and records read."""
    method = getattr(unlearning, recipe.callback)(original, **recipe.settings)
    split = ForgetRetain(data, fraction=recipe.data["fraction"], batch_size=recipe.data["batch_size"], seed=0)
    with mock.patch.object(time, "perf_counter", time.process_time):  # other processes' turns do not count
        fit(recipe.cnn(data), split, recipe.epochs, [method])
    return method.seconds, method.records_read


def by_hand(recipe: Recipe, data: InMemory) -> tuple[float, dict[str, int]]:
    """Retraining by a loop."""
    split = ForgetRetain(data, fraction=recipe.data["fraction"], seed=0)
    split.setup("fit")
    x, y = (t[split.retain_indices] for t in data.train_data)
    net = recipe.cnn(data).net
    optimizer: Any = recipe.sgd()(net.parameters())
    size = recipe.data["batch_size"]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs * math.ceil(len(y) / size))
    start = time.process_time()
    for _ in range(recipe.epochs):
        for rows in torch.randperm(len(y)).split(size):
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    return time.process_time() - start, {"forget": 0, "retain": recipe.epochs * len(y)}


def methods(data: InMemory, original: Path, rounds: int) -> Iterator[Row]:
    """The rows of the first table."""
    retrain = Recipe.read("retrain")
    works: dict[str, Callable[[], Any]] = {
        "Retrain": partial(forget, retrain, data, original),
        "Retrain by hand": partial(by_hand, retrain, data),
    }
    epochs = dict.fromkeys(works, retrain.epochs)
    for recipe in map(Recipe.read, METHODS):
        works[recipe.callback] = partial(forget, recipe, data, original)
        epochs[recipe.callback] = 0 if recipe.callback in ("SSD", "WINU") else recipe.epochs
    found: dict[str, list[Any]] = {name: [] for name in works}
    for _ in range(rounds):  # the methods take turns
        for name, work in works.items():
            if sum(result[0] for result, _ in found[name]) < MOST_SECONDS:
                found[name].append(in_a_child(work))
    whole = {}
    for name, results in found.items():
        seconds = statistics.median(result[0] for result, _ in results)
        peak = statistics.median(peak for _, peak in results)
        read = results[0][0][1]
        number = sum(read.values())
        whole = whole or {"seconds": seconds, "number": number, "peak": peak}
        yield {
            "table": "methods",
            "name": name,
            "epochs": epochs[name],
            "cpu_s": seconds,
            "ratio_to_retraining": seconds / whole["seconds"],
            "forget_read": read["forget"],
            "retain_read": read["retain"],
            "record_cost": seconds / number / (whole["seconds"] / whole["number"]),
            "peak_mb": peak,
            "peak_ratio": peak / whole["peak"],
        }


def recordings(data: InMemory, folder: Path, rates: dict[str, float], quick: bool) -> Iterator[Row]:
    """The rows of the second table; leaves the original model in ``folder``."""
    recipe = Recipe.read("original")
    small = pooled(data)
    width = width_of(500 if quick else 2000, small.input_shape[0])
    n = CLASSES * len(data.splits[0][1])

    def mlp() -> pl.LightningModule:
        torch.manual_seed(0)
        return Classifier(network(small.input_shape[0], width), CLASSES, recipe.sgd(), None, recipe.schedule)

    rank = 50 if quick else recipe.settings["rank"]
    tanh = partial(recipe.cnn, data)
    cases: list[tuple[str, Callable[[], pl.LightningModule], InMemory, str, int, Path]] = [
        ("TanhCNN", tanh, data, "lowrank", recipe.epochs, folder),
        ("TanhCNN", tanh, data, "ekfac", 1, folder / "ekfac"),  # the time of its training is known by then
        ("MLP", mlp, small, "full", recipe.epochs, folder / "full"),
    ]
    trained: dict[str, float] = {}
    for name, build, images_of, kind, epochs, where in cases:
        where.mkdir(exist_ok=True)
        module = build()
        p = sum(parameter.numel() for parameter in module.parameters())
        recorder = CurvatureRecorder(kind=kind, rank=rank)  # type: ignore[arg-type]
        found, peak = in_a_child(train, module, images_of, epochs, recorder, where)
        train_s = trained.setdefault(name, found["train_s"])
        flops = {
            "lowrank": 10 * n * p * (rank + EXTRA_COLUMNS),
            "ekfac": sum(turns(module, s) for s in (min(n, 10_000), n)),
            "full": 2 * n * p**2,
        }[kind]
        bound = flops / rates["float64" if kind == "full" else "float32"]
        yield {
            "table": "recording",
            "name": name,
            "kind": f"{kind} {rank}" if kind == "lowrank" else kind,
            "parameters": p,
            "cpu_s": found["record_s"],
            "train_s": train_s,
            "ratio_to_training": found["record_s"] / train_s,
            "bound_s": bound,
            "over_bound": found["record_s"] / bound,
            "bytes": found["record_bytes"],
            "bytes_without": found["other_bytes"],
            "peak_mb": peak,
        }


# ---------------------------------------------------------------- 3: growth


def pooled(data: InMemory) -> InMemory:
    """Flat images of 14 x 14 pixels, or 8 x 8."""

    def small(split: Split) -> Split:
        x = F.avg_pool2d(split[0], 2) if split[0].shape[-1] == 28 else split[0]
        return x.flatten(1), split[1]

    return InMemory(*(small(split) for split in data.splits))


def network(inputs: int, width: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, CLASSES))


def width_of(parameters: int, inputs: int) -> int:
    return max(1, round((parameters - CLASSES) / (inputs + 1 + CLASSES)))


def sides(module: nn.Module) -> list[tuple[int, int]]:
    """Rows and columns of each layer's matrix."""
    return [(block.rows, block.columns) for block in EKFACCurvature(Records(module).layout).blocks]


def turns(module: nn.Module, s: int) -> float:
    """Flops of rotating ``s`` columns into the eigenbases."""
    return sum(2 * s * a * b * sum(side for side in (a, b) if 1 < side <= 2048) for a, b in sides(module))


def theory(kind: str, module: nn.Module, p: int, s: int, k: int) -> tuple[float, float]:
    """Flops of step and downdate, bytes of the record."""
    if kind == "full":
        q = min(p, s)
        return p**3 / 3 + p**2 * s + 2 * p * s * q + 6 * q**3 + 2 * p**2 * s, 8 * p**2 + 16 * p
    if kind == "lowrank":
        return 2 * s * p * k + 4 * p * k**2 + k**2 * s + 6 * k**3, 4 * p * k + 8 * k + 16 * p
    return turns(module, s), sum(4 * (a**2 * (a > 1) + b**2 * (b > 1)) + 8 * a * b for a, b in sides(module)) + 16 * p


def repeated(work: Callable[[], Any], rounds: int) -> float:
    """Median CPU seconds; less often than ``rounds`` where that takes long."""
    times: list[float] = []
    while len(times) < rounds and sum(times) < MOST_SECONDS:
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times)


def rate(dtype: torch.dtype, rounds: int, size: int = 1536) -> float:
    """Flops a second of a matrix product."""
    a = torch.randn(size, size, dtype=dtype)
    repeated(lambda: a @ a, 1)
    return 2 * size**3 / min(repeated(lambda: a @ a, 1) for _ in range(2 * rounds))


def one_step(
    kind: str, module: nn.Module, split: Split, n: int, m: int, rates: dict[str, float], rounds: int
) -> tuple[Row, float]:
    """What WIN-U does for ``m`` of ``n`` recorded samples, and the flops."""
    dtype = torch.float64 if kind == "full" else None
    records = Records(module, dtype=dtype)
    p = records.layout.numel
    record = record_curvature(records, some_of(split, n), kind=kind, rank=RANK)  # type: ignore[arg-type]
    ids, forgotten = torch.arange(m), some_of(split, m)

    def columns() -> tuple[Tensor, Tensor]:
        rows = []
        gradient = torch.zeros(p, dtype=torch.float64)
        for some in ids.split(100):
            batch = forgotten[0][some], forgotten[1][some]
            rows += list(records.chunks(batch, some))
            gradient += records.gradient(batch).double()
        return torch.cat(rows), gradient

    rows, rhs = columns()
    ridge = torch.ones(p, dtype=torch.float64)
    curvature = record.curvature
    removal = curvature.removal([rows])
    delta = curvature.newton_step(removal, rhs, ridge, clip=0.95).delta
    copies = [copy.deepcopy(curvature)]

    def downdate() -> None:
        changed = copies.pop() if copies else copy.deepcopy(curvature)
        changed.remove(removal)
        changed.apply(delta)

    at = {
        "columns": repeated(columns, rounds),
        "reduce": repeated(lambda: curvature.removal([rows]), rounds),
        "step": repeated(lambda: curvature.newton_step(removal, rhs, ridge, clip=0.95), rounds),
        "downdate": repeated(downdate, 1),
        "copy": repeated(rows.clone, rounds),
    }
    s = len(rows)
    flops, size = theory(kind, module, p, s, min(RANK, p))
    bound = flops / rates["float32" if kind == "ekfac" else "float64"]
    worked = at["reduce"] + at["step"] + at["downdate"]
    row = {
        "table": "growth",
        "kind": f"{kind} {RANK}" if kind == "lowrank" else kind,
        "parameters": p,
        "forget": m,
        "columns_ms": 1e3 * at["columns"],
        "columns_over_copy": at["columns"] / at["copy"],
        "reduce_ms": 1e3 * at["reduce"],
        "step_ms": 1e3 * at["step"],
        "downdate_ms": 1e3 * at["downdate"],
        "cpu_s": at["columns"] + worked,
        "bound_s": bound,
        "over_bound": worked / bound,
        "bytes": bytes_in(record.as_dict()),
        "bytes_theory": size,
    }
    return row, flops


def bytes_in(found: Any) -> int:
    """Of all tensors in nested dicts and lists."""
    if isinstance(found, Tensor):
        return found.numel() * found.element_size()
    if isinstance(found, dict | list):
        return sum(map(bytes_in, found.values() if isinstance(found, dict) else found))
    return 0


def growth(data: InMemory, rates: dict[str, float], rounds: int, quick: bool) -> Iterator[Row]:
    """The rows of the third table."""
    small = pooled(data)
    split, inputs = small.splits[0], small.input_shape[0]
    exact, large = (
        ([500, 1000, 2000], [1000, 4000, 16000]) if quick else ([1000, 2000, 4000, 8000], [2000, 8000, 32000])
    )
    large += [] if quick else [200_000]
    forgets = [10, 50, 200] if quick else [10, 50, 125, 250, 500]
    for kind in ("full", "lowrank", "ekfac"):
        fixed = {"full": 2000, "lowrank": 8000, "ekfac": 8000}[kind] // (4 if quick else 1)
        by_size = [(p, 25, 100) for p in (exact if kind == "full" else large)]
        by_forget = [(fixed, m, 2 * max(forgets)) for m in forgets]
        for axis, cases in (("p", by_size), ("m", by_forget)):
            before: tuple[float, float] | None = None
            for p, m, n in cases:
                module = network(inputs, width_of(p, inputs))
                row, flops = one_step(kind, module, split, n, m, rates, rounds)
                worked = row["reduce_ms"] + row["step_ms"] + row["downdate_ms"]
                row["grows_with"] = axis
                if before is not None:
                    row["grew"], row["grew_theory"] = worked / before[0], flops / before[1]
                before = worked, flops
                yield row


# ---------------------------------------------------------------- what is printed


def show_method(row: Row) -> None:
    print(
        f"{row['name']:16} {row['epochs']:3} epochs {row['cpu_s']:8.3f} s CPU   ratio to retraining "
        f"{row['ratio_to_retraining']:6.3f}   records {row['forget_read']:6} + {row['retain_read']:7}   cost of a record "
        f"{row['record_cost']:6.2f}   peak {row['peak_mb']:6.1f} MB, ratio {row['peak_ratio']:5.2f}",
        flush=True,
    )


def show_recording(row: Row) -> None:
    print(
        f"{row['name']:8} {row['kind']:12} p = {row['parameters']:6} {row['cpu_s']:7.2f} s CPU   ratio to training "
        f"{row['ratio_to_training']:5.2f} of {row['train_s']:.2f} s   over bound {row['over_bound']:5.2f}   "
        f"{row['bytes'] / 1e6:8.2f} MB in the checkpoint beside {row['bytes_without'] / 1e6:.2f}   "
        f"peak {row['peak_mb']:6.1f} MB",
        flush=True,
    )


def show_growth(row: Row) -> None:
    grew = f"grew {row['grew']:5.2f}, flops {row['grew_theory']:5.2f}" if "grew" in row else ""
    print(
        f"{row['kind']:11} p = {row['parameters']:6} m = {row['forget']:3}   columns {row['columns_ms']:8.1f} ms (copy x "
        f"{row['columns_over_copy']:5.1f})   removal {row['reduce_ms']:7.1f}   step {row['step_ms']:8.1f}   downdate {row['downdate_ms']:8.1f} ms   over bound "
        f"{row['over_bound']:6.2f}   {row['bytes'] / 1e6:7.2f} MB, theory {row['bytes_theory'] / 1e6:7.2f}   {grew}",
        flush=True,
    )


def warm_up(folder: Path) -> None:
    """Libraries that load on first use."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(40, 1, 8, 8, generator=generator)
    y = torch.arange(40) % CLASSES
    data = InMemory((x[:30], y[:30]), (x[30:], y[30:]))
    recipe = Recipe.read("original")
    recipe.optimizer = recipe.optimizer | {"lr": 1e-4}
    train(recipe.cnn(data), data, 1, CurvatureRecorder(kind="lowrank", rank=5), folder)
    for name in ("retrain", *METHODS):
        recipe = Recipe.read(name)
        recipe.epochs, recipe.optimizer = 1, recipe.optimizer | {"lr": 1e-4}
        forget(recipe, data, folder / "last.ckpt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="fewer samples, smaller models, one round: a minute")
    parser.add_argument("--digits", action="store_true", help="scikit-learn's digits instead of Fashion-MNIST")
    parser.add_argument("--output", type=Path, metavar="CSV")
    args = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # autograd's threads for a GPU would not survive a fork
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning_utilities.core.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rounds = 1 if args.quick else args.rounds
    name, training, test = images(args.digits, 600 if args.quick else Recipe.read("original").data["num_train"])
    data = InMemory(training, test)
    rates = {str(dtype).removeprefix("torch."): rate(dtype, rounds) for dtype in (torch.float64, torch.float32)}
    print(f"{name}, {len(training[1])} training images; matrix products at", end=" ")
    print(", ".join(f"{1e-9 * flops:.1f} GFLOP/s in {dtype}" for dtype, flops in rates.items()))
    rows: list[Row] = [{"table": "rate", "name": t, "gflops": 1e-9 * flops} for t, flops in rates.items()]

    def table(title: str, found: Iterator[Row], show: Callable[[Row], None]) -> None:
        print(f"\n{title}", flush=True)
        for row in found:
            rows.append({"data": name} | row)
            show(row)

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "warm").mkdir()
        warm_up(Path(folder) / "warm")
        table("Recording", recordings(data, Path(folder), rates, args.quick), show_recording)
        table("Methods", methods(data, Path(folder) / "last.ckpt", rounds), show_method)
    table("Growth of WIN-U's step", growth(data, rates, rounds, args.quick), show_growth)
    if args.output:
        fields = list(dict.fromkeys(field for row in rows for field in ("table", *row)))
        with args.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, fields)
            writer.writeheader()
            writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


if __name__ == "__main__":
    main()
