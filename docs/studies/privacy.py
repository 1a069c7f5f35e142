"""Draw the figures of docs/privacy.md, and print its tables, from what `make study-privacy` ran.

python docs/studies/privacy.py [FOLDER of the comparisons, runs/compare by default]
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from finished import DOCS, Runs, paired
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

RESULTS = DOCS / "studies" / "results"
BUDGETS = (1.0, 3.0, 8.0)
PUBLISHED = (2.7, 0.861)  # Papernot et al., AAAI 2021: the same network, 60,000 images
Rows = list[dict[str, str]]


def rows_of(name: str) -> Rows:
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def by_budget(ax: Axes, epsilons: tuple[float, ...], found: list[dict[int, float]], label: str, fmt: str) -> None:
    """Mean and spread over the seeds at each budget."""
    values = np.array([list(one.values()) for one in found])
    ax.errorbar(epsilons, values.mean(axis=1), yerr=values.std(axis=1, ddof=1), fmt=fmt, capsize=4, label=label)


def level(ax: Axes, found: dict[int, float], label: str) -> None:
    """A line at the mean over the seeds."""
    ax.axhline(float(np.mean(list(found.values()))), color="0.4", linestyle=":", label=label)


def finish(ax: Axes, xlabel: str, title: str) -> None:
    ax.set(xlabel=xlabel, ylabel="Test accuracy (%)", title=title)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")


def by_hand(epsilon: float) -> dict[int, float]:
    return {int(r["seed"]): float(r["accuracy"]) for r in rows_of("opacus_by_hand") if float(r["epsilon"]) == epsilon}


def draw_budgets(records: Runs, devices: Runs) -> None:
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    level(left, records.test("no privacy", "test/acc"), "without privacy")
    ours = [records.test(f"epsilon {epsilon:g}", "test/acc") for epsilon in BUDGETS]
    by_budget(left, BUDGETS, ours, "DPSGD, unmodified LightningModule", "o-")
    by_budget(left, BUDGETS, [by_hand(epsilon) for epsilon in BUDGETS], "Opacus by hand, no Lightning", "s--")
    left.plot(*PUBLISHED, "k*", markersize=10, label="Papernot et al. 2021 (60,000 images)")
    finish(left, r"$\epsilon$ of one image ($\delta = 10^{-5}$)", "DP-SGD, 50,000 images, 15 epochs")
    level(right, devices.test("no privacy", "test/acc"), "without privacy")
    fed = [devices.test(f"DP-FedAvg, epsilon {epsilon:g}", "test/acc") for epsilon in BUDGETS]
    by_budget(right, BUDGETS, fed, "DP-FedAvg, noise of the server", "o-")
    shared = devices.test("noise of the devices, epsilon 8", "test/acc")
    by_budget(right, BUDGETS[2:], [shared], "noise of the devices", "s")
    labels = ("over the air, power 0.1", "over the air, epsilon 3", "over the air, epsilon 8")
    spent = tuple(float(devices.curve(label, "privacy/epsilon")[0, -1, 0]) for label in labels)  # no matter the seed
    by_budget(
        right, spent, [devices.test(label, "test/acc") for label in labels], "over the air: noise of the channel", "^-"
    )
    finish(
        right,
        r"$\epsilon$ of all data of a device ($\delta = 10^{-4}$)",
        "1,000 devices, softmax regression, 200 rounds",
    )
    figure.savefig(DOCS / "privacy.png", dpi=130)


def print_budgets(records: Runs, devices: Runs) -> None:
    for epsilon in BUDGETS:
        difference, half = paired(records.test(f"epsilon {epsilon:g}", "test/acc"), by_hand(epsilon))
        hand = np.array(list(by_hand(epsilon).values()))
        print(f"epsilon {epsilon:g}: Opacus by hand {hand.mean():.4f} ± {hand.std(ddof=1):.4f}; DPSGD minus it "
              f"{difference:+.2f} ± {half:.2f} points")  # fmt: skip
    for label in devices.jobs:
        if label != "no privacy":
            difference, half = paired(devices.test(label, "test/acc"), devices.test("no privacy", "test/acc"))
            print(f"{label}: {difference:+.2f} ± {half:.2f} points against no privacy")


def few_shot() -> dict[tuple[str, str, int], dict[int, float]]:
    """Test accuracy by method, budget and shots, of each seed."""
    found: dict[tuple[str, str, int], dict[int, float]] = defaultdict(dict)
    for row in rows_of("few_shot"):
        found[row["method"], row["epsilon"], int(row["shots"])][int(row["seed"])] = float(row["test"])
    return found


def draw_few_shot(found: dict[tuple[str, str, int], dict[int, float]]) -> None:
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    shots = tuple(sorted({float(key[2]) for key in found}))
    budgets = dict.fromkeys(key[1] for key in found)
    for budget in budgets:
        name = f"$\\epsilon$ = {float(budget):g}" if budget else "without privacy"
        by_budget(left, shots, [found["FiLM", budget, int(s)] for s in shots], name, "o-")
    finish(left, "Images a class", "FiLM layers and head")
    for method in dict.fromkeys(key[0] for key in found):
        for budget, style in (("", "o-"), ("1.0", "s--")):
            name = f"{method}, " + (f"$\\epsilon$ = {float(budget):g}" if budget else "without privacy")
            by_budget(right, shots, [found[method, budget, int(s)] for s in shots], name, style)
    finish(right, "Images a class", "What is trained")
    for ax in (left, right):
        ax.set_xscale("log")
        ax.set_xticks(shots, [f"{s:g}" for s in shots])
    figure.savefig(DOCS / "privacy_few_shot.png", dpi=130)


def print_few_shot(found: dict[tuple[str, str, int], dict[int, float]]) -> None:
    shots = sorted({key[2] for key in found})
    print("| method | epsilon | " + " | ".join(f"{s} shots" for s in shots) + " |")
    print("|---" * (len(shots) + 2) + "|")
    for method, budget in dict.fromkeys(key[:2] for key in found):
        values = [np.array(list(found[method, budget, s].values())) for s in shots]
        cells = [f"{v.mean():.3f} ± {v.std(ddof=1):.3f}" for v in values]
        print(f"| {method} | {float(budget) if budget else 'none'} | " + " | ".join(cells) + " |")
    for budget in dict.fromkeys(key[1] for key in found):
        for other in ("head", "all"):
            differences = [paired(found["FiLM", budget, s], found[other, budget, s]) for s in shots]
            print(f"epsilon {budget or 'none'}, FiLM minus {other}: "
                  + ", ".join(f"{s} shots {d:+.1f} ± {h:.1f}" for s, (d, h) in zip(shots, differences, strict=True)))  # fmt: skip


def print_audits() -> None:
    found: dict[str, Rows] = defaultdict(list)
    for row in rows_of("audits"):
        found[row["case"]].append(row)
    print("| case | claimed | bound, seeds | AUC | refuted | test accuracy |\n|---|---|---|---|---|---|")
    for case, rows in found.items():
        bounds = ", ".join(f"{float(r['epsilon_lower']):.2f}" for r in rows)
        auc, acc = (np.array([float(r[key]) for r in rows]) for key in ("auc", "test_acc"))
        refuted = sum(r["refuted"] == "True" for r in rows)
        print(f"| {case} | {float(rows[0]['claimed']):.3g} | {bounds} | {auc.mean():.3f} ± {auc.std(ddof=1):.3f} | "
              f"{refuted} of {len(rows)} | {acc.mean():.3f} ± {acc.std(ddof=1):.3f} |")  # fmt: skip


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/compare")
    records, devices = Runs(folder, "dp_sgd"), Runs(folder, "device_privacy")
    draw_budgets(records, devices)
    print_budgets(records, devices)
    found = few_shot()
    draw_few_shot(found)
    print_few_shot(found)
    print_audits()


if __name__ == "__main__":
    main()
