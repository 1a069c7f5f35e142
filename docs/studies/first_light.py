"""Draw docs/first_light.png, and the tables beside it, from the comparisons that `make study` ran.

python docs/studies/first_light.py [FOLDER of the comparisons, runs/compare by default]
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from groundwire.callbacks.reporting.plots import plot_curves

DOCS = Path(__file__).resolve().parents[1]
PANELS = {
    "iid_500": "IID, power 500",
    "by_label_500": "two classes a device, power 500",
    "iid_200": "IID, power 200",
    "by_label_200": "two classes a device, power 200",
}
SINGLE = ("power", "bandwidth", "decoders", "fedavg")


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def curves(file: Path) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    points: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows(file):
        points[row["label"]][row["seed"]].append((float(row["round"]), float(row["val/acc"])))
    return {
        label: [tuple(np.array(run).T) for run in by_seed.values()]  # type: ignore[misc]
        for label, by_seed in points.items()
    }


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/compare")
    kept = DOCS / "studies" / "results"
    kept.mkdir(exist_ok=True)
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True).flatten()
    for ax, (study, title) in zip(panels, PANELS.items(), strict=True):
        plot_curves(curves(folder / study / "curves.csv"), title=title, ax=ax)
        if study != "iid_500" and (legend := ax.get_legend()) is not None:  # one is enough
            legend.remove()
    figure.savefig(DOCS / "first_light.png", dpi=130)

    for study in SINGLE:
        (DOCS / f"first_light_{study}.png").write_bytes((folder / study / "plot.png").read_bytes())
    for study in (*PANELS, *SINGLE):
        for name in ("curves.csv", "table.csv", "table.md"):
            (kept / f"{study}_{name}").write_bytes((folder / study / name).read_bytes())


if __name__ == "__main__":
    main()
