"""Draw the figures of docs/compression.md, and print its tables, from what `make study-compression` ran.

python docs/studies/compression.py [FOLDER of the comparisons, runs/compare by default]
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from finished import DOCS, Runs, paired
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

RESULTS = DOCS / "studies" / "results"
BITS = "uplink/bits_cumulative"
ENTRIES = 101_770 * 10 * 500  # of the MLP, on 10 devices, in 500 rounds
BASELINE = "uncompressed"
GROUPS = {  # what sends about as much, in one colour map
    "Greys": ["uncompressed", "natural", "float8"],
    "Blues": ["QSGD", "RC-FED", "Lloyd-Max", "NQFL", "TernGrad", "EF-SignSGD"],
    "Oranges": ["top-k, EF", "EF21 (top-k)", "EControl (top-k)", "DGC", "L-GreCo (top-k), EF", "FedZip"],
    "Greens": ["random-k, EF", "PowerSGD, EF", "count-sketch, EF", "SRHT, EF"],
}
MARKERS = "osv^D*"


def colours() -> dict[str, tuple[str, str]]:
    """Colour and marker of each label."""
    import matplotlib as mpl

    found = {}
    for name, labels in GROUPS.items():
        shades = mpl.colormaps[name](np.linspace(0.9, 0.45, len(labels)))
        found |= {label: (mpl.colors.to_hex(s), m) for label, s, m in zip(labels, shades, MARKERS, strict=False)}
    return found


def best_so_far(curve: np.ndarray) -> np.ndarray:
    """Smoothed over three epochs: single epochs of a constant learning rate jump."""
    padded = np.concatenate([curve[:, :1], curve, curve[:, -1:]], axis=1)
    return (padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]) / 3


def against_bits(ax: Axes, runs: Runs, labels: Sequence[str], title: str) -> None:
    """Validation accuracy against the bits that one device has sent for each parameter."""
    style = colours()
    for label in labels:
        curve = runs.curve(label, "val/acc", BITS)
        accuracy, bits = best_so_far(curve[..., 0]), curve[0, :, 1] / (ENTRIES / 500)
        colour, marker = style[label]
        mean, spread = accuracy.mean(0), accuracy.std(0, ddof=1)
        ax.plot(bits, mean, color=colour, marker=marker, markevery=4, markersize=4, linewidth=1.2, label=label)
        ax.fill_between(bits, mean - spread, mean + spread, color=colour, alpha=0.12, linewidth=0)
    ax.set(xscale="log", xlabel="Bits sent for each parameter by a device, so far", ylabel="Validation accuracy (%)")
    ax.set_title(title)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    ax.set_ylim(0.3, 0.9)
    ax.grid(alpha=0.3, which="both")


def draw_bits(iid: Runs, dirichlet: Runs) -> None:
    labels = [label for group in GROUPS.values() for label in group]
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    against_bits(axes[0], iid, labels, "IID")
    against_bits(axes[1], dirichlet, labels, "Dirichlet 0.1")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", fontsize="small")
    figure.savefig(DOCS / "compression.png", dpi=130)


def table(runs: dict[str, Runs]) -> None:
    """Test accuracy and bits a parameter and round of every scheme."""
    first = next(iter(runs.values()))
    print("| | bits a parameter and round | " + " | ".join(runs) + " |\n|---|---|" + "---|" * len(runs))
    for label in first.jobs:
        bits = np.mean(list(first.test_of_training(label, BITS).values())) / ENTRIES
        cells = [f"{np.mean(v):.1f} ± {np.std(v, ddof=1):.1f}" for v in _accuracies(runs.values(), label)]
        print(f"| {label} | {bits:.3g} | " + " | ".join(cells) + " |")


def _accuracies(runs: object, label: str) -> list[np.ndarray]:
    return [100 * np.array(list(one.test(label, "test/acc").values())) for one in runs]  # type: ignore[attr-defined]


def draw_quantisers(runs: Runs) -> None:
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    ax = figure.subplots()
    for name, fmt in {"RC-FED": "o-", "Lloyd-Max": "s--", "NQFL": "^--", "QSGD": "D:"}.items():
        labels = [label for label in runs.jobs if label.startswith(name)]
        bits = [np.mean(list(runs.test_of_training(label, BITS).values())) / ENTRIES for label in labels]
        values = np.array(_accuracies([runs] * 1, labels[0]) + [_accuracies([runs], label)[0] for label in labels[1:]])
        ax.errorbar(bits, values.mean(1), yerr=values.std(1, ddof=1), fmt=fmt, capsize=4, label=name)
        for label, x, row in zip(labels, bits, values, strict=True):
            print(f"| {label} | {x:.2f} | {row.mean():.1f} ± {row.std(ddof=1):.1f} |")
    ax.set(xlabel="Bits a parameter and round", ylabel="Test accuracy (%)", title="After 500 rounds, IID")
    ax.grid(alpha=0.3)
    ax.legend()
    figure.savefig(DOCS / "compression_quantisers.png", dpi=130)


def print_layers(runs: Runs) -> None:
    for label in runs.jobs:
        bits = list(runs.test_of_training(label, BITS).values())
        (accuracy,) = _accuracies([runs], label)
        print(f"| {label} | {np.mean(bits) / 8e6:.2f} MB | {accuracy.mean():.1f} ± {accuracy.std(ddof=1):.1f} |")
    for family, uniform in (("top-k", "top-k 1 %"), ("QSGD", "QSGD 3"), ("PowerSGD", "PowerSGD 4")):
        ours, theirs = runs.test(f"L-GreCo, {family}", "test/acc"), runs.test(uniform, "test/acc")
        print(
            f"L-GreCo, {family} minus {uniform}: {paired(ours, theirs)[0]:.2f} ± {paired(ours, theirs)[1]:.2f} points"
        )


def draw_feedback(path: Path) -> None:
    """Accuracy against the learning rate, from the study's table: it has a sweep."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    ax = figure.subplots()
    for label in dict.fromkeys(row["label"] for row in rows):
        mine = [row for row in rows if row["label"] == label]
        rates = sorted({float(row["value"]) for row in mine})
        values = [[100 * float(r["test/acc"]) for r in mine if float(r["value"]) == rate] for rate in rates]
        mean, spread = [np.mean(v) for v in values], [np.std(v, ddof=1) for v in values]
        ax.errorbar(rates, mean, yerr=spread, marker="o", capsize=4, label=label)
        cells = " | ".join(f"{m:.1f} ± {s:.1f}" for m, s in zip(mean, spread, strict=True))
        print(f"| {label} | {cells} |")
    ax.set(
        xscale="log", xlabel="Learning rate", ylabel="Test accuracy (%)", title="Two classes a device, k = d / 1,000"
    )
    ax.grid(alpha=0.3)
    ax.legend()
    figure.savefig(DOCS / "compression_feedback.png", dpi=130)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/compare")
    iid, dirichlet = Runs(folder, "compression_iid"), Runs(folder, "compression_dirichlet")
    draw_bits(iid, dirichlet)
    table({"IID": iid, "Dirichlet 0.1": dirichlet})
    draw_quantisers(Runs(folder, "quantisers"))
    print_layers(Runs(folder, "layers"))
    draw_feedback(RESULTS / "feedback.csv")


if __name__ == "__main__":
    main()
