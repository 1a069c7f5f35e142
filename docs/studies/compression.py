"""Draw the figure of docs/compression.md, and print its table, from what `make study-compression` ran.

python docs/studies/compression.py [FOLDER of the comparisons, runs/compare by default]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from finished import DOCS, Runs
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

BITS = "uplink/bits_cumulative"
PARAMETERS, DEVICES, ROUNDS = 101_770, 10, 500
GROUPS = {  # what sends about as much, in one colour map
    "Greys": ["uncompressed", "natural", "float8"],
    "Blues": ["QSGD", "RC-FED", "Lloyd-Max", "NQFL", "TernGrad", "EF-SignSGD"],
    "Oranges": ["top-k, EF", "EF21 (top-k)", "EControl (top-k)", "DGC", "L-GreCo (top-k), EF", "FedZip"],
    "Greens": ["random-k, EF", "PowerSGD, EF", "count-sketch, EF", "SRHT, EF"],
}
MARKERS = "osv^D*"


def colours() -> dict[str, tuple[str, str]]:
    """Colour and marker of each label."""
    found = {}
    for name, labels in GROUPS.items():
        shades = mpl.colormaps[name](np.linspace(0.9, 0.45, len(labels)))
        found |= {label: (mpl.colors.to_hex(s), m) for label, s, m in zip(labels, shades, MARKERS, strict=False)}
    return found


def against_bits(ax: Axes, runs: Runs, labels: Sequence[str], title: str) -> None:
    """Validation accuracy against the bits that one device has sent for each parameter."""
    style = colours()
    for label in labels:
        curve = runs.curve(label, "val/acc")
        accuracy, bits = curve[..., 0], _bits(runs, label) / (PARAMETERS * DEVICES)
        colour, marker = style[label]
        mean, spread = accuracy.mean(0), accuracy.std(0, ddof=1)
        ax.plot(bits, mean, color=colour, marker=marker, markevery=4, markersize=4, linewidth=1.2, label=label)
        ax.fill_between(bits, mean - spread, mean + spread, color=colour, alpha=0.12, linewidth=0)
    ax.set(xscale="log", xlabel="Bits sent for each parameter by a device, so far", ylabel="Validation accuracy (%)")
    ax.set_title(title)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    ax.set_ylim(0.3, 0.9)
    ax.grid(alpha=0.3, which="both")


def _bits(runs: Runs, label: str) -> np.ndarray:
    """Bits sent until the end of each epoch, the mean over seeds."""
    curve = runs.curve(label, BITS)[..., 0].mean(0)
    epochs = runs.curve(label, "val/acc").shape[1]
    found: np.ndarray = curve[len(curve) // epochs - 1 :: len(curve) // epochs]
    return found


def main() -> None:
    runs = Runs(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/compare"), "compression_iid")
    figure = Figure(figsize=(9.5, 5.6), layout="constrained")
    ax = figure.subplots()
    against_bits(
        ax, runs, [label for group in GROUPS.values() for label in group], "Fashion-MNIST, IID over 10 devices"
    )
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right center", fontsize="small")
    figure.savefig(DOCS / "compression.png", dpi=130)
    for label in runs.jobs:
        accuracy = 100 * np.array(list(runs.test(label, "test/acc").values()))
        bits = _bits(runs, label)[-1] / (PARAMETERS * DEVICES * ROUNDS)
        print(f"| {label} | {bits:.3g} | {accuracy.mean():.1f} ± {accuracy.std(ddof=1):.1f} |")


if __name__ == "__main__":
    main()
