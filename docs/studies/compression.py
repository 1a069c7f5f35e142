"""Draw the figures of docs/compression.md, and print its tables, from what `make study-compression` ran.

python docs/studies/compression.py [FOLDER of the comparisons, runs/compare by default]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import torch
from finished import DOCS, Runs, paired
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from groundwire.callbacks.reporting import read_metrics
from groundwire.plugins.compression import QSGD
from groundwire.plugins.optimizers import optimizer_state_bytes
from groundwire.plugins.random import Key

STUDIES = ("compression_iid", "compression_dirichlet", "quantisers", "layers", "feedback", "optimizers")
STATE = "optimizer/state_bytes"
BITS = "uplink/bits_cumulative"
PARAMETERS, DEVICES, ROUNDS = 101_770, 10, 500
ENTRIES = PARAMETERS * DEVICES * ROUNDS
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
        accuracy, bits = runs.curve(label, "val/acc")[..., 0], _bits(runs, label) / (PARAMETERS * DEVICES)
        colour, marker = style[label]
        mean, spread = accuracy.mean(0), accuracy.std(0, ddof=1)
        ax.plot(bits, mean, color=colour, marker=marker, markevery=4, markersize=4, linewidth=1.2, label=label)
        ax.fill_between(bits, mean - spread, mean + spread, color=colour, alpha=0.12, linewidth=0)
    ax.set(xscale="log", xlabel="Bits sent for each parameter by a device, so far", title=title)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    ax.set_ylim(0.3, 0.9)
    ax.grid(alpha=0.3, which="both")


def draw_bits(panels: dict[str, Runs]) -> None:
    labels = [label for group in GROUPS.values() for label in group]
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    for ax, (title, runs) in zip(axes, panels.items(), strict=True):
        against_bits(ax, runs, labels, title)
    axes[0].set_ylabel("Validation accuracy (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    figure.savefig(DOCS / "compression.png", dpi=130)
    for label in labels:
        cells = [
            f"{_bits(runs, label)[-1] / ENTRIES:.3g} | {_cell(_accuracies(runs, label))}" for runs in panels.values()
        ]
        print(f"| {label} | " + " | ".join(cells) + " |")


def draw_quantisers(runs: Runs) -> None:
    """Test accuracy against bits, a line for each quantiser."""
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    ax = figure.subplots()
    for name, style in {"RC-FED": "o-", "Lloyd-Max": "s--", "NQFL": "^--", "QSGD": "D:"}.items():
        labels = [label for label in runs.jobs if label.startswith(name)]
        bits = [_bits(runs, label)[-1] / ENTRIES for label in labels]
        found = np.array([_accuracies(runs, label) for label in labels])
        ax.errorbar(bits, found.mean(1), yerr=found.std(1, ddof=1), fmt=style, capsize=4, label=name)
        for label, x, row in zip(labels, bits, found, strict=True):
            print(f"| {label} | {x:.2f} | {_cell(row)} |")
        if name == "QSGD":
            coded = [entropy_of_qsgd(int(label.split()[1])) for label in labels]
            ax.plot(coded, found.mean(1), "D:", mfc="none", color="C3", label="QSGD, if its levels were entropy coded")
            print("entropy of QSGD's levels:", ", ".join(f"{entropy:.2f}" for entropy in coded))
    ax.set(
        xlabel="Bits for each parameter and round",
        ylabel="Test accuracy (%)",
        title="After 500 rounds, IID; mean ± std",
    )
    ax.grid(alpha=0.3)
    ax.legend()
    figure.savefig(DOCS / "compression_quantisers.png", dpi=130)


def entropy_of_qsgd(num_levels: int, bucket_size: int = 512) -> float:
    """Of its symbols on normal entries, in bits an entry, with the norms of the buckets."""
    x = torch.randn(1, 400 * bucket_size, generator=torch.Generator().manual_seed(0))
    values = QSGD(num_levels=num_levels, bucket_size=bucket_size).roundtrip(x, Key(seed=0)).values
    norms = torch.linalg.vector_norm(x.view(-1, bucket_size), dim=1, keepdim=True)
    levels = (values.view(-1, bucket_size) * num_levels / norms).round()
    share = levels.unique(return_counts=True)[1].double() / x.numel()
    return -(share * share.log2()).sum().item() + 32 / bucket_size


def print_layers(runs: Runs) -> None:
    for label in runs.jobs:
        print(f"| {label} | {_bits(runs, label)[-1] / 8e6:.1f} MB | {_cell(_accuracies(runs, label))} |")
    for family, uniform in (("top-k", "top-k 1 %"), ("QSGD", "QSGD 3"), ("PowerSGD", "PowerSGD 4")):
        mean, half = paired(runs.test(f"L-GreCo, {family}", "test/acc"), runs.test(uniform, "test/acc"))
        print(f"L-GreCo, {family} minus {uniform}: {mean:.2f} ± {half:.2f} points (95 %)")


def print_optimizers(runs: Runs) -> None:
    for label in runs.jobs:
        loss = np.array(list(runs.test(label, "test/loss").values()))
        print(
            f"| {label} | {state_bytes(runs, label) / 1e6:.3g} MB | {_cell(_accuracies(runs, label))} "
            f"| {loss.mean():.3f} ± {loss.std(ddof=1):.3f} |"
        )


def state_bytes(runs: Runs, label: str) -> float:
    """As OptimizerSwap logged it, or of the tensors in the checkpoint of a run without it."""
    job = next(iter(runs.jobs[label].values()))
    logged = [row[STATE] for row in read_metrics(job.folder / "metrics.csv") if STATE in row]
    if logged:
        return logged[-1]
    (state,) = torch.load(job.folder / "checkpoints" / "last.ckpt", weights_only=False)["optimizer_states"]
    return optimizer_state_bytes(SimpleNamespace(state=state["state"]))


def _accuracies(runs: Runs, label: str) -> np.ndarray:
    """Of the test set after training, in per cent, one a seed."""
    return 100 * np.array(list(runs.test(label, "test/acc").values()))


def _cell(values: np.ndarray) -> str:
    return f"{values.mean():.1f} ± {values.std(ddof=1):.1f}"


def _bits(runs: Runs, label: str) -> np.ndarray:
    """Bits sent until the end of each epoch, the mean over seeds."""
    curve = runs.curve(label, BITS)[..., 0].mean(0)
    epochs = runs.curve(label, "val/acc").shape[1]
    found: np.ndarray = curve[len(curve) // epochs - 1 :: len(curve) // epochs]
    return found


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/compare")
    draw_bits({"IID": Runs(folder, "compression_iid"), "Dirichlet 0.1": Runs(folder, "compression_dirichlet")})
    draw_quantisers(Runs(folder, "quantisers"))
    print_layers(Runs(folder, "layers"))
    print_optimizers(Runs(folder, "optimizers"))
    (DOCS / "compression_feedback.png").write_bytes((folder / "feedback" / "plot.png").read_bytes())
    for study in STUDIES:
        for name in ("curves.csv", "table.csv", "table.md"):
            (DOCS / "studies" / "results" / f"{study}_{name}").write_bytes((folder / study / name).read_bytes())


if __name__ == "__main__":
    main()
