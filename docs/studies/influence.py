"""Influence of training images with compressed gradients: how near to exact influence, and what it is good for.

Digits with 5 % of the labels flipped; softmax regression and a network of 24 hidden units; 60 test images. Each compressor
is compared with exact influence (GGN, damping a tenth of its mean diagonal) by Spearman's correlation over the training
images, and by how well self-influence finds the flipped labels (AUC). For softmax regression, sums of influences are
compared with what models do that were retrained on 40 random halves of the data (linear datamodelling score). Times are CPU
times of one thread, in seconds for all of a method and in milliseconds for the compression of all training gradients.

Run (a minute and a half on one core):
      python docs/studies/influence.py --output docs/studies/results/influence.csv --picture docs/unlearning_influence.png
"""

from __future__ import annotations

import argparse
import csv
import logging
import math
import tempfile
import time
import warnings
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from groundwire.callbacks.unlearning.influence import (
    Dropout,
    DropoutKron,
    GaussianProjection,
    GradientCompressor,
    InfluenceScorer,
    TracIn,
    linear_datamodeling_score,
    rank_correlation,
)
from groundwire.callbacks.unlearning.records import Records
from groundwire.datamodules import Digits
from groundwire.plugins.random import stream
from groundwire.recipes import SoftmaxRegression
from groundwire.recipes.models import Classifier

DENSITIES = (1 / 2, 1 / 8, 1 / 16, 1 / 32)
COMPRESSORS: dict[str, type[GradientCompressor]] = {
    "dropout": Dropout,
    "dropout_kron": DropoutKron,
    "gaussian": GaussianProjection,
}
NUM_TEST, NUM_SUBSETS, FLIPPED, WEIGHT_DECAY = 60, 40, 0.05, 1e-3
Row = dict[str, Any]
Pair = tuple[Tensor, Tensor]


def flipped_digits(seed: int) -> tuple[Digits, Tensor]:
    """The digits with some wrong training labels, and which."""
    data = Digits(batch_size=64, seed=seed)
    data.setup()
    x, y = data.train_data
    generator = stream(seed, purpose="study/flips")
    wrong = torch.randperm(len(y), generator=generator)[: round(FLIPPED * len(y))]
    y = y.clone()
    y[wrong] = (y[wrong] + torch.randint(1, 10, (len(wrong),), generator=generator)) % 10
    data.train_data = (x, y)
    flips = torch.zeros(len(y), dtype=torch.bool)
    flips[wrong] = True
    return data, flips


def network(name: str) -> Classifier:
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=WEIGHT_DECAY)
    if name == "softmax":
        return SoftmaxRegression((1, 8, 8), optimizer=optimizer, schedule="cosine")
    return Classifier(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10)),
        optimizer=optimizer,
        schedule="cosine",
    )


class TimedTracIn(TracIn):
    """Counts its own seconds of CPU time."""

    seconds = 0.0

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        started = time.process_time()
        super().on_train_batch_end(*args, **kwargs)
        self.seconds += time.process_time() - started


def train(name: str, data: Digits, seed: int) -> tuple[Classifier, TimedTracIn]:
    """A trained network, and TracIn along its training."""
    pl.seed_everything(seed, verbose=False)
    module = network(name)
    with tempfile.TemporaryDirectory() as folder:
        tracin = TimedTracIn(every_n_epochs=6, num_test=NUM_TEST, pictures=False, dirpath=folder)
        pl.Trainer(
            max_epochs=60,
            callbacks=[tracin],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            accelerator="cpu",
        ).fit(module, data)
    return module, tracin


def retrained(data: Pair, test: Pair, seed: int) -> tuple[Tensor, Tensor]:
    """Random halves, and the negative losses of softmax regressions that are trained on them to the minimum."""
    (x, y), (xt, yt) = ((x.flatten(1).double(), y) for x, y in (data, test))
    generator = stream(seed, purpose="study/subsets")
    subsets, outputs = torch.zeros(NUM_SUBSETS, len(y), dtype=torch.bool), []
    for subset in subsets:
        subset[torch.randperm(len(y), generator=generator)[: len(y) // 2]] = True
        linear = nn.Linear(64, 10, dtype=torch.float64)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        optimizer = torch.optim.LBFGS(
            linear.parameters(), max_iter=300, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
        )

        def closure(rows: Tensor = subset, linear: nn.Linear = linear, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(linear(x[rows]), y[rows])
            loss = loss + WEIGHT_DECAY / 2 * sum(p.square().sum() for p in linear.parameters())
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            outputs.append(-F.cross_entropy(linear(xt), yt, reduction="none"))
    return subsets, torch.stack(outputs)


def compression_ms(compressor: GradientCompressor, gradients: Tensor) -> float:
    """Of all training gradients, the fastest of five."""
    times = []
    for _ in range(5):
        started = time.process_time()
        compressor(gradients)
        times.append(time.process_time() - started)
    return 1000 * min(times)


def map_bytes(compressor: GradientCompressor, p: int) -> int:
    """What has to be known of the map: indices, or a matrix in float32."""
    return 8 * compressor.k if not isinstance(compressor, GaussianProjection) else 4 * compressor.k * p


def measure(seed: int) -> list[Row]:
    """All methods for one seed."""
    data, flips = flipped_digits(seed)
    train_data, test = data.train_data, tuple(part[:NUM_TEST] for part in data.test_data)
    subsets, outputs = retrained(train_data, test, seed)
    rows: list[Row] = []
    for model in ("softmax", "mlp"):
        module, tracin = train(model, data, seed)
        records = Records(module)
        gradients, of_test = records.gradients(train_data), records.gradients(test)
        p = records.layout.numel

        def add(method: str, scores: Tensor, own: Tensor, density: float = 1.0, **costs: Any) -> None:
            lds = linear_datamodeling_score(scores, subsets, outputs).mean() if model == "softmax" else math.nan  # noqa: B023
            rows.append(
                {"seed": seed, "model": model, "method": method, "density": density}  # noqa: B023
                | {"spearman": float(rank_correlation(scores, exact).mean())}  # noqa: B023
                | {"auc": roc_auc_score(flips.numpy(), own.numpy()), "lds": float(lds)}
                | {"k": "", "seconds": "", "compress_ms": "", "store_bytes": "", "map_bytes": ""}
                | costs
            )

        def run(method: str, compressor: GradientCompressor | None, density: float = 1.0, **options: Any) -> Tensor:
            started = time.process_time()
            scorer = InfluenceScorer(module, compressor, **options)  # noqa: B023
            scorer.fit([train_data])
            scores = scorer.score(test)
            own = scorer.self_influence()
            costs = {"k": scorer.k, "seconds": time.process_time() - started, "store_bytes": scorer.store_bytes}
            if compressor is not None:
                costs |= {"compress_ms": compression_ms(compressor, gradients), "map_bytes": map_bytes(compressor, p)}  # noqa: B023
            nonlocal exact
            exact = scores if method == "exact" else exact
            add(method, scores, own, density, **costs)
            return scores

        InfluenceScorer(module).fit([test])  # warms up
        exact = torch.zeros(0)
        run("exact", None)
        run("exact, damping = weight decay", None, damping=WEIGHT_DECAY)
        run("full empirical Fisher", None, curvature="fisher")
        for density in DENSITIES:
            for method, kind in COMPRESSORS.items():
                run(method, kind(density=density, seed=seed), density)
        result = tracin.result
        assert result is not None
        add("tracin", result.scores, result.self_influence, seconds=tracin.seconds)
        add("gradient dot product", (of_test @ gradients.T).double(), gradients.square().sum(1))
    return rows


def summary(rows: list[Row]) -> dict[tuple[str, str, float], dict[str, tuple[float, float]]]:
    """Mean and sample deviation over the seeds, by model, method and density."""
    groups: dict[tuple[str, str, float], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["model"], row["method"], float(row["density"])].append(row)
    found = {}
    for key, group in groups.items():
        found[key] = {}
        for name in ("spearman", "auc", "lds", "k", "seconds", "compress_ms", "store_bytes", "map_bytes"):
            values = np.array([float(row[name]) if row[name] != "" else math.nan for row in group])
            found[key][name] = values.mean(), values.std(ddof=1) if len(values) > 1 else 0.0
    return found


def print_table(rows: list[Row]) -> None:
    print("| model | method | k/p | Spearman | AUC of flips | LDS | CPU seconds | compression (ms) | store | map |")
    print("|---" * 10 + "|")
    for (model, method, density), v in summary(rows).items():
        share = f"1/{round(1 / density)}"
        kib = lambda name, v=v: "" if math.isnan(v[name][0]) else f"{v[name][0] / 1024:.0f} KiB"
        number = lambda name, form, v=v: "" if math.isnan(v[name][0]) else format(v[name][0], form)
        lds = "" if math.isnan(v["lds"][0]) else f"{v['lds'][0]:.3f} ± {v['lds'][1]:.3f}"
        print(
            f"| {model} | {method} | {share} | {v['spearman'][0]:.2f} ± {v['spearman'][1]:.2f} | {v['auc'][0]:.3f} ± "
            f"{v['auc'][1]:.3f} | {lds} | {number('seconds', '.2f')} | {number('compress_ms', '.2f')} | "
            f"{kib('store_bytes')} | {kib('map_bytes')} |"
        )


def draw(rows: list[Row], path: Path) -> None:
    found = summary(rows)
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    panels: list[tuple[Axes, str, str]] = [
        (left, "spearman", "mlp"),
        (middle, "auc", "softmax"),
        (right, "lds", "softmax"),
    ]
    for ax, metric, model in panels:
        for method in COMPRESSORS:
            stats = [found[model, method, density][metric] for density in DENSITIES]
            means, spread = zip(*stats, strict=True)
            ax.errorbar(DENSITIES, means, yerr=spread, fmt="o-", capsize=4, label=method.replace("_", ", "))
        levels = {"exact": ":", "exact, damping = weight decay": "-.", "tracin": "--"}
        for method, style in levels.items():
            if metric == "spearman" and method.startswith("exact"):
                continue
            ax.axhline(found[model, method, 1.0][metric][0], color="0.4", linestyle=style, label=method)
        ax.set_xscale("log", base=2)
        ax.set_xticks(DENSITIES, [f"1/{round(1 / density)}" for density in DENSITIES])
        ax.set_xlabel("share of the gradient's entries that is kept, k / p")
        ax.grid(alpha=0.3)
    left.set(ylabel="Spearman against exact influence", title="MLP, 1,810 parameters")
    middle.set(ylabel="AUC of self-influence for flipped labels", title="Softmax regression, 650 parameters")
    right.set(ylabel="Linear datamodelling score", title="Softmax regression, 40 retrained halves")
    handles, labels = right.get_legend_handles_labels()
    title = f"mean ± std, {len({row['seed'] for row in rows})} seeds"
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), title=title, fontsize="small")
    figure.savefig(path, dpi=130)


def main() -> None:
    """All seeds, one row for each model, method and density."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/influence.csv"))
    parser.add_argument("--picture", type=Path, help="by default beside the output")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning_utilities.core.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    picture = options.picture or options.output.with_suffix(".png")
    for file in (options.output, picture):
        file.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for seed in range(options.seeds):
        rows += measure(seed)
        with options.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    print_table(rows)
    draw(rows, picture)


if __name__ == "__main__":
    main()
