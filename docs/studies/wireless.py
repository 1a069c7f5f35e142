"""Draw the figures of docs/wireless.md, and print its paired differences, from what `make study-wireless` ran.

python docs/studies/wireless.py [FOLDER of the comparisons, runs/compare by default]
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
from finished import DOCS, Runs, paired
from matplotlib.figure import Figure

from groundwire.callbacks.reporting import plot_fairness
from groundwire.callbacks.reporting.plots import plot_curves

TWO = {"fading": "IID", "fading_by_label": "two classes a device"}
SINGLE = (
    "fading_power",
    "csi",
    "blind",
    "mimo",
    "lfl",
    "noisy_downlink",
    "downlink_selection",
    "update_aware",
    "scheduled_devices",
)
STUDIES = (*TWO, *SINGLE, "fairness")
PAIRS = {
    "update_aware": [
        ("BC-BN2, 20 candidates", "best channel (BC)"),
        ("BN2-C", "best channel (BC)"),
        ("BN2-C", "best norm (BN2)"),
    ],
    "fading": [("CA-DSGD", "D-DSGD"), ("CA-DSGD", "SignSGD"), ("CA-DSGD", "ESA-DSGD")],
    "fading_by_label": [("CA-DSGD", "D-DSGD"), ("CA-DSGD", "SignSGD"), ("CA-DSGD", "ESA-DSGD")],
    "lfl": [("LFL", "LGM"), ("LFL", "lossless both ways"), ("LTGM, server keeps its model", "LFL")],
    "fairness": [("OTA-FFL, softmax", "FedAvg"), ("OTA-FFL", "FedAvg"), ("AdaFed", "FedAvg")],
}


def draw_fading(folder: Path) -> None:
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for ax, (study, title) in zip(panels, TWO.items(), strict=True):
        runs = Runs(folder, study)
        plot_curves(
            {
                label: [(np.arange(1, len(run) + 1) * 10, run[:, 0]) for run in runs.curve(label, "val/acc")]
                for label in runs.jobs
            },
            title=title,
            ax=ax,
        )
    for ax in panels:
        ax.get_legend().remove()
    figure.legend(*panels[0].get_legend_handles_labels(), title="mean ± std, 3 seeds", loc="outside right center")
    figure.savefig(DOCS / "wireless_fading.png", dpi=130)


def draw_fairness(runs: Runs) -> None:
    """Accuracy of the devices in order, the mean over seeds."""
    found = {}
    for label, jobs in runs.jobs.items():
        rows = []
        for job in jobs.values():
            with next(job.folder.rglob("fairness.csv")).open(newline="") as opened:
                rows.append(sorted(float(row["acc"]) for row in csv.DictReader(opened)))
        found[label] = np.mean(rows, axis=0)
    figure = Figure(figsize=(7.6, 5.2), layout="constrained")
    plot_fairness(found, ax=figure.subplots())
    figure.savefig(DOCS / "wireless_fairness.png", dpi=130)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/compare")
    draw_fading(folder)
    draw_fairness(Runs(folder, "fairness"))
    for study, pairs in PAIRS.items():
        runs = Runs(folder, study)
        metrics = ["test/acc"] + ["fairness/acc_worst", "fairness/acc_std"] * (study == "fairness")
        for ours, theirs in pairs:
            for metric in metrics:
                mean, half = paired(runs.test(ours, metric), runs.test(theirs, metric))
                print(f"{study}: {metric} of {ours} minus {theirs}: {mean:.2f} ± {half:.2f} points (95 %)")
    for study in SINGLE:
        (DOCS / f"wireless_{study}.png").write_bytes((folder / study / "plot.png").read_bytes())
    for study in STUDIES:
        for name in ("curves.csv", "table.csv", "table.md"):
            (DOCS / "studies" / "results" / f"{study}_{name}").write_bytes((folder / study / name).read_bytes())


if __name__ == "__main__":
    main()
