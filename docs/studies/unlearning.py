"""Draw the figures of docs/unlearning.md, write its CSVs, and print its tables, from what `make study-unlearning` ran.

python docs/studies/unlearning.py [FOLDER of the comparisons, runs/compare by default]
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from finished import DOCS, Runs
from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS = DOCS / "studies" / "results"
TASKS = {
    "logistic": "logistic regression on digits, random 5 %",
    "random": "Fashion-MNIST, random 5 %",
    "class": "Fashion-MNIST, one class (dresses)",
    "text": "language model, one document",
}
FIGURES = (
    "forget_acc",
    "retain_acc",
    "test_acc",
    "forget_loss",
    "test_loss",
    "mia_efficacy",
    "mia_auc",
    "average_gap",
    "kl_forget",
    "kl_test",
    "weight_distance",
    "relearn_steps",
    "relearn_acc_steps",
    "seconds",
    "recording_seconds",
    "forget_records_read",
    "retain_records_read",
)
Models = dict[str, list[dict[str, Any]]]  # by label, one dict a seed


def models_of(runs: Runs) -> Models:
    """What was measured of each method, and of the original and the retrained model."""
    found: Models = {"original": []}
    for label, jobs in runs.jobs.items():
        if label.startswith("original"):
            continue
        reports = [json.loads((job.folder / "unlearning" / "unlearning.json").read_text()) for job in jobs.values()]
        found[label] = [report["unlearned"] for report in reports]
        if label != "retrained" and not found["original"]:
            found["original"] = [report["original"] for report in reports]
    for rows in found.values():
        for row in rows:
            read = row.get("records_read") or {}
            row["forget_records_read"], row["retain_records_read"] = read.get("forget"), read.get("retain")
    return found


def value(row: dict[str, Any], name: str) -> float:
    """A figure, NaN where there is none; one beyond the cap of relearning is infinite."""
    return float("nan") if row.get(name) is None else float(row[name])


def save(task: str, models: Models) -> None:
    with (RESULTS / f"unlearning_{task}.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["method", "seed", *FIGURES])
        for label, rows in models.items():
            for seed, row in enumerate(rows):
                writer.writerow([label, seed, *(row.get(name) for name in FIGURES)])


def cell(rows: list[dict[str, Any]], name: str, form: str = ".3f", scale: float = 1.0) -> str:
    values = scale * np.array([value(row, name) for row in rows])
    if np.isnan(values).all():
        return ""
    if np.isinf(values).any():
        return ", ".join("never" if np.isinf(v) else f"{v:.0f}" for v in values)
    return f"{values.mean():{form}} ± {values.std(ddof=1):{form}}"


def table(models: Models) -> str:
    columns: dict[str, Callable[[list[dict[str, Any]]], str]] = {
        "forget acc %": lambda rows: cell(rows, "forget_acc", ".1f", 100),
        "retain acc %": lambda rows: cell(rows, "retain_acc", ".1f", 100),
        "test acc %": lambda rows: cell(rows, "test_acc", ".1f", 100),
        "KL forget": lambda rows: cell(rows, "kl_forget", ".2g"),
        "KL test": lambda rows: cell(rows, "kl_test", ".2g"),
        "MIA %": lambda rows: cell(rows, "mia_efficacy", ".1f", 100),
        "average gap": lambda rows: cell(rows, "average_gap", ".2f"),
        "relearning (loss)": lambda rows: cell(rows, "relearn_steps", ".0f"),
        "relearning (acc)": lambda rows: cell(rows, "relearn_acc_steps", ".0f"),
    }
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {label} | " + " | ".join(make(rows) for make in columns.values()) + " |" for label, rows in models.items()
    ]
    return "\n".join(lines)


def scatter(ax: Axes, title: str, models: Models) -> None:
    """Distance to retraining on what is forgotten against that on test data."""
    for number, (label, rows) in enumerate(models.items()):
        if label == "retrained":
            continue
        x, y = (np.array([value(row, name) for row in rows]) for name in ("kl_test", "kl_forget"))
        marker = "*" if label.startswith("WIN-U") else "s" if label.startswith("OFMU") else "o"
        ax.errorbar(
            x.mean(),
            y.mean(),
            xerr=x.std(ddof=1),
            yerr=y.std(ddof=1),
            fmt=marker,
            color=f"C{number % 10}",
            markersize=11 if marker == "*" else 7,
            markerfacecolor="none" if number >= 10 else None,
            capsize=2,
            label=label,
        )
    ax.set(xscale="log", yscale="log", xlabel="KL(retrained || model) on test data (nats)", title=title)
    ax.set_ylabel("KL(retrained || model) on the forget set (nats)")
    ax.grid(alpha=0.3)
    ax.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.0, 1.0))


def relearning(ax: Axes, title: str, models: Models) -> None:
    """Forget accuracy while the forget set is learnt again, mean over seeds."""
    for number, (label, rows) in enumerate(models.items()):
        curves = [row["relearning"]["accs"] for row in rows if row.get("relearning")]
        if not curves or label == "original":
            continue
        longest = max(map(len, curves))  # a curve ends where the knowledge is back
        filled = np.array([curve + [curve[-1]] * (longest - len(curve)) for curve in curves])
        style = {"color": "k", "linewidth": 2.5} if label == "retrained" else {"color": f"C{number % 10}"}
        ax.plot(filled.mean(axis=0), linestyle="--" if number >= 10 else "-", label=label, **style)
    ax.set(xlabel="Steps of relearning (Adam on the forget set)", ylabel="Accuracy on the forget set", title=title)
    ax.grid(alpha=0.3)
    ax.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.0, 1.0))


def frontiers() -> Figure:
    """Forget against retain accuracy at each learning rate: what a method buys, and what it pays."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    for ax, task in zip(figure.subplots(1, 2), ("random", "class"), strict=True):
        with (RESULTS / f"unlearning_lr_{task}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        for number, label in enumerate(dict.fromkeys(row["label"] for row in rows)):
            points = [row for row in rows if row["label"] == label]
            x, y = ([float(row[f"unlearn/{part}_acc mean"]) for row in points] for part in ("forget", "retain"))
            ax.plot(x, y, "o-", markersize=5, linewidth=0.8, color=f"C{number}", label=label)
        with (RESULTS / f"unlearning_{task}.csv").open(newline="") as file:
            target = list(csv.DictReader(file))
        for label, marker in (("retrained", "kX"), ("WIN-U", "r*")):
            seed0 = next(row for row in target if row["method"] == label and row["seed"] == "0")
            ax.plot(float(seed0["forget_acc"]), float(seed0["retain_acc"]), marker, markersize=12, label=label)
        ax.set(xlabel="Accuracy on the forget set", ylabel="Accuracy on the retained data", title=TASKS[task])
        ax.set_ylim(0.7, 0.97)
        ax.grid(alpha=0.3)
        ax.legend(fontsize="x-small")
    return figure


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/compare")
    figure = Figure(figsize=(26, 9.5), layout="constrained")
    axes = figure.subplots(2, len(TASKS))
    for column, (task, title) in enumerate(TASKS.items()):
        models = models_of(Runs(folder, f"unlearning_{task}"))
        save(task, models)
        scatter(axes[0, column], title, models)
        relearning(axes[1, column], title, models)
        print(f"\n{title}\n\n{table(models)}")
    figure.savefig(DOCS / "unlearning.png", dpi=75)
    frontiers().savefig(DOCS / "unlearning_frontiers.png", dpi=110)


if __name__ == "__main__":
    main()
