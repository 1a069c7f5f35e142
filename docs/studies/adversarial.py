"""Draw the figures of docs/adversarial.md, and print its tables, from the comparisons that `make study` ran.

    python docs/studies/adversarial.py [FOLDER of the comparisons, runs/compare by default]

First AutoAttack (standard) runs on 200 test images for each trained model, and the inputs that PGD-20 finds on the model
trained with cross entropy are tried on the others: a minute a model. What is in results/adversarial_autoattack.csv already
is not run again.
"""

from __future__ import annotations

import csv
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from finished import DOCS, Runs, paired
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from groundwire.callbacks.adversarial import PGD, ThreatModel
from groundwire.callbacks.adversarial.evaluation import autoattack
from groundwire.callbacks.adversarial.functional import wilson_interval
from groundwire.callbacks.weights import load_weights
from groundwire.datamodules import FashionMNIST
from groundwire.recipes import SmallCNN

RESULTS = DOCS / "studies" / "results"
STUDIES = ("adversarial", "fal")
THREAT = ThreatModel(eps=0.1)
IMAGES = 200
ATTACKS = ("clean", "apgd-ce", "apgd-t", "fab-t", "square")
CONTROL = "CE"


def model_of(folder: Path) -> SmallCNN:
    model = SmallCNN(width=16)
    load_weights(model, folder)
    return model.eval().requires_grad_(False)


def run_autoattack(runs: Runs) -> list[dict[str, Any]]:
    """One row a model: what is left after each part of AutoAttack, and of transfer from the control."""
    file = RESULTS / "adversarial_autoattack.csv"
    rows: list[dict[str, Any]] = []
    if file.is_file():
        with file.open(newline="") as lines:
            rows = list(csv.DictReader(lines))
    done = {(row["method"], int(row["seed"])) for row in rows}
    data = FashionMNIST(seed=0)
    data.setup()
    x, y = data.test_data
    for seed in runs.jobs[CONTROL]:
        for label, by_seed in runs.jobs.items():
            job = by_seed[seed]
            if (label, seed) in done:
                continue
            model = model_of(job.folder)
            found = autoattack(model, x[:IMAGES], y[:IMAGES], THREAT)
            row: dict[str, Any] = {"method": label, "seed": seed, "images": IMAGES}
            row |= {name: int(alive.sum()) for name, alive in found.items()}
            moved = PGD(20)(model_of(runs.jobs[CONTROL][seed].folder), x[:1000], y[:1000], THREAT)
            row["transfer_of_1000"] = int((model(moved).argmax(dim=1) == y[:1000]).sum())
            rows.append(row)
            print(row, flush=True)
            with file.open("w", newline="") as lines:
                writer = csv.DictWriter(lines, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
    return rows


def reports(runs: Runs, label: str) -> dict[int, dict[str, Any]]:
    """The report of each seed."""
    return {
        seed: json.loads((job.folder / "robustness" / "robustness.json").read_text())
        for seed, job in runs.jobs[label].items()
    }


def draw_methods(runs: Runs, attacked: list[dict[str, Any]]) -> None:
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for label in runs.jobs:
        found = list(reports(runs, label).values())
        radii = [point["eps"] for point in found[0]["sweep"]]
        curves = np.array([[point["acc"] for point in report["sweep"]] for report in found])
        (line,) = left.plot(radii, curves.mean(axis=0), marker="o", label=label)
        spread = curves.std(axis=0, ddof=1)
        left.fill_between(radii, curves.mean(axis=0) - spread, curves.mean(axis=0) + spread, alpha=0.2)
        if label == CONTROL:  # far off
            continue
        clean = np.array(list(runs.test(label, "test/acc").values()))
        robust = np.array(list(runs.test(label, "test/robust_acc").values()))
        right.errorbar(
            clean.mean(), robust.mean(), xerr=clean.std(ddof=1), yerr=robust.std(ddof=1), fmt="o", capsize=4,
            color=line.get_color(), label=label,
        )  # fmt: skip
    left.set_xscale("symlog", linthresh=0.025)
    left.set_xticks(radii, [f"{radius:g}" for radius in radii])
    left.minorticks_off()
    left.axvline(THREAT.eps, color="0.4", linestyle=":", linewidth=1)
    left.set(xlabel="Radius of the linf ball (pixel units)", ylabel="Accuracy under PGD-20 on the margin (%)")
    right.set(xlabel="Test accuracy (%)", ylabel="Worst case of all attacks, 1,000 test images (%)")
    control = [100 * np.mean(list(runs.test(CONTROL, f"test/{name}").values())) for name in ("acc", "robust_acc")]
    right.set_title(f"eps 0.1; mean ± std, 3 seeds; outside: {CONTROL} at {control[0]:.1f} and {control[1]:.1f}")
    left.set_title("1,000 test images; mean ± std, 3 seeds")
    for ax in (left, right):
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small")
    right.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    figure.savefig(DOCS / "adversarial.png", dpi=130)


def print_methods(runs: Runs, attacked: list[dict[str, Any]]) -> None:
    names = ("clean", "fgsm", "pgd20_ce", "pgd20_margin", "pgd50x5_ce", "pgd50x5_margin", "worst_case")
    print("| method | " + " | ".join(names) + " | AutoAttack | its 95 % interval | transfer | failed checks |")
    print("|---" * (len(names) + 5) + "|")
    for label in runs.jobs:
        found = list(reports(runs, label).values())
        cells = [spread_of([report["accuracies"][name]["acc"] for report in found]) for name in names]
        rows = [row for row in attacked if row["method"] == label]
        # the seeds attack the same images, so that they are no further samples
        low, high = wilson_interval(round(np.mean([int(row["square"]) for row in rows])), IMAGES)
        cells += [
            spread_of([int(row["square"]) / int(row["images"]) for row in rows]),
            f"{100 * low:.1f} to {100 * high:.1f}",
        ]
        cells.append(spread_of([int(row["transfer_of_1000"]) / 1000 for row in rows]))
        failed = sorted({check["check"][:3] for report in found for check in report["checks"] if not check["passed"]})
        print(f"| {label} | " + " | ".join(cells) + f" | {' '.join(failed) or 'none'} |")
    by_method: dict[str, dict[int, float]] = defaultdict(dict)
    for row in attacked:
        by_method[row["method"]][int(row["seed"])] = int(row["square"]) / int(row["images"])
    for label in runs.jobs:
        if label not in ("CAP", CONTROL):
            worst = paired(runs.test("CAP", "test/robust_acc"), runs.test(label, "test/robust_acc"))
            under = paired(by_method["CAP"], by_method[label])
            clean = paired(runs.test("CAP", "test/acc"), runs.test(label, "test/acc"))
            print(f"CAP - {label}: worst case {worst}, AutoAttack {under}, clean {clean}")
            if label != "PGD-AT":
                base = paired(runs.test(label, "test/robust_acc"), runs.test("PGD-AT", "test/robust_acc"))
                clean = paired(runs.test(label, "test/acc"), runs.test("PGD-AT", "test/acc"))
                print(f"{label} - PGD-AT: worst case {base}, clean {clean}")


def spread_of(values: list[float]) -> str:
    array = 100 * np.array(values)
    return f"{array.mean():.1f} ± {array.std(ddof=1):.1f}"


def draw_search() -> None:
    """All variants of CAP that were tried: clean against robust accuracy on validation images."""
    rows: list[dict[str, str]] = []
    with (RESULTS / "cap_search.csv").open(newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row["epochs"] == "6"]
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    ax = figure.subplots()
    groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        settings = dict(word.split("=") for word in row["variant"].split() if "=" in word)
        if row["stage"] == "references":
            key = row["variant"]
        else:
            outputs = (
                "" if settings["outputs"] == "logits" or settings["distance"] == "kl" else f" of {settings['outputs']}"
            )
            key = f"{settings['distance']}{outputs}, {settings['center']} centre"
        groups[key].append((float(row["val_acc"]), float(row["val_robust_acc"])))
    for key, points in groups.items():
        xs, ys = zip(*points, strict=True)
        is_reference = key in ("PGD-AT", "TRADES", "MART")
        ax.plot(xs, ys, "*" if is_reference else "o", markersize=13 if is_reference else 6, label=key, linestyle="")
    ax.set(xlabel="Validation accuracy (%)", ylabel="Under the worse of two PGD-20 (%)")
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    ax.set_title("Variants of CAP after 6 epochs, one seed, 1,000 validation images")
    ax.grid(alpha=0.3)
    ax.legend(fontsize="x-small", ncols=2)
    figure.savefig(DOCS / "adversarial_cap_search.png", dpi=130)


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/compare")
    for study in STUDIES:
        for name in ("table.csv", "table.md", "curves.csv"):
            (RESULTS / f"{study}_{name}").write_bytes((folder / study / name).read_bytes())
    runs = Runs(folder, "adversarial")
    attacked = run_autoattack(runs)
    draw_methods(runs, attacked)
    print_methods(runs, attacked)
    examples = runs.jobs["PGD-AT"][0].folder / "robustness" / "robustness_adversarial_examples.png"
    (DOCS / "adversarial_examples.png").write_bytes(examples.read_bytes())
    draw_search()
    federated = Runs(folder, "fal")
    for label in federated.jobs:
        print(label, spread_of(list(federated.test(label, "test/acc").values())), spread_of(list(federated.test(label, "test/robust_acc").values())))  # fmt: skip


if __name__ == "__main__":
    main()
