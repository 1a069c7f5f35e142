"""Draw the figures of docs/information.md, and print its tables, from the comparisons that `make study` ran.

python docs/studies/information.py [FOLDER of the comparisons, runs/compare by default]
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import torch
from finished import DOCS, Runs, paired
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor

from groundwire.callbacks.adversarial import FGSM, PGD, ThreatModel
from groundwire.callbacks.information import NormalizedCMI, plot_cmi_evolution
from groundwire.callbacks.weights import load_weights
from groundwire.datamodules import FashionMNIST
from groundwire.recipes import SmallCNN

STUDIES = ("cmic", "ncmi_and_error", "students", "knockoffs")
CE, CMIC = "CNN, CE", "CNN, CMIC lam=1 beta=0.01"


def draw_cmic(runs: Runs, models: Runs) -> None:
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    paths, accuracy = {}, {}
    for label in list(runs.jobs)[:5]:
        found = runs.curve(label, "val/gamma_nats", "val/cmi_nats", "val/acc").mean(axis=0)
        paths[label.removeprefix("CNN, ")] = (found[:, 0], found[:, 1])
        accuracy[label.removeprefix("CNN, ")] = found[:, 2]
    plot_cmi_evolution(paths, accuracy=accuracy, title="Small CNN, validation, mean of 5 seeds", ax=left)
    every = []
    for label, seeds in models.jobs.items():
        ncmi, acc = models.test(label, "test/ncmi"), models.test(label, "test/acc")
        points = np.array([[ncmi[seed], 100 * (1 - acc[seed])] for seed in seeds])
        every.append(points)
        marker = "o" if label.startswith("CNN") else "s"
        right.plot(points[:, 0], points[:, 1], marker, label=label, markersize=6)
    joined = np.concatenate(every)
    rank, p = spearmanr(joined[:, 0], joined[:, 1])
    right.set(xlabel="NCMI, test", ylabel="test error (%)", title=f"Cross entropy, {len(every)} networks, 3 seeds each")
    right.grid(alpha=0.3)
    right.legend(fontsize="small", title=f"Spearman {rank:.2f} (p = {p:.1e})")
    figure.savefig(DOCS / "information_cmic.png", dpi=130)
    means = np.array([points.mean(axis=0) for points in every])
    print(f"NCMI and error over {len(joined)} runs: Spearman {rank:.3f}, p {p:.1e}; over the means of the networks: "
          f"{spearmanr(means[:, 0], means[:, 1])[0]:.3f}")  # fmt: skip
    for label in list(runs.jobs)[:1]:
        found = runs.curve(label, "val/ncmi", "val/acc")
        within = [spearmanr(one[:, 0], 1 - one[:, 1])[0] for one in found]
        print(f"within runs of {label}, over epochs: {np.mean(within):.2f} ± {np.std(within, ddof=1):.2f}")
    finals = {
        label: np.array([[runs.test(label, "test/ncmi")[s], 1 - runs.test(label, "test/acc")[s]] for s in seeds])
        for label, seeds in list(runs.jobs.items())[:5]
    }
    joined = np.concatenate(list(finals.values()))
    print(f"over the objectives of the CNN: {spearmanr(joined[:, 0], joined[:, 1])[0]:.2f}")
    for label in list(runs.jobs)[1:5]:
        print(f"{label} - CE: {paired(runs.test(label, 'test/acc'), runs.test(CE, 'test/acc'))}")
    resnet = [label for label in runs.jobs if label.startswith("ResNet")]
    print(f"{resnet[1]} - CE: {paired(runs.test(resnet[1], 'test/acc'), runs.test(resnet[0], 'test/acc'))}")


def draw_students(runs: Runs) -> None:
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    axes = figure.subplots(1, 4)
    teachers = ["CE, fine-tuned", "MCMI", "MSE"]
    cases = {
        "all data": "test/acc", "5 %": "test/acc", "without class 3": "test/recall_3", "without class 7": "test/recall_7",
    }  # fmt: skip
    for ax, (case, metric) in zip(axes, cases.items(), strict=True):
        base = runs.test(f"{case}: of CE", metric)
        found = [paired(runs.test(f"{case}: of {teacher}", metric), base) for teacher in teachers]
        ax.errorbar(range(3), [mean for mean, _ in found], [half for _, half in found], fmt="o", capsize=4)
        ax.axhline(0, color="0.5", linewidth=1)
        what = "accuracy" if metric == "test/acc" else f"recall of class {metric[-1]}"
        ax.set(title=f"{case}\n(CE teacher: {100 * np.mean(list(base.values())):.1f} %)", xlim=(-0.5, 2.5))
        ax.set_xticks(range(3), ["CE,\nfine-tuned", "MCMI", "MSE"])
        ax.set_ylabel(f"{what} less that of the CE teacher's student (points)", fontsize="small")
        ax.grid(alpha=0.3)
        for teacher, (mean, half) in zip(teachers, found, strict=True):
            print(f"{case} ({what}), of {teacher} - of CE: {mean:+.2f} ± {half:.2f}")
        control = runs.test(f"{case}: of CE, fine-tuned", metric)
        print(f"{case} ({what}), of MCMI - of its control: {paired(runs.test(f'{case}: of MCMI', metric), control)}")
    figure.suptitle(
        "Students of a quarter of the width, KD at T = 2; mean and 95 % interval of paired differences, 5 seeds"
    )
    figure.savefig(DOCS / "information_students.png", dpi=130)


def draw_knockoffs(runs: Runs) -> None:
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    methods = ["KD, T=1", "KD, T=4", "KD, T=10", "DKD", "DIST"]
    smooth = runs.test("student, label smoothing", "test/acc")
    for offset, teacher in ((-0.12, "CE"), (0.12, "CMIM")):
        found = [paired(runs.test(f"{method}, of {teacher}", "test/acc"), smooth) for method in methods]
        x = np.arange(len(methods)) + offset
        left.errorbar(x, [m for m, _ in found], [h for _, h in found], fmt="o", capsize=4, label=f"of {teacher}")
        for method, (mean, half) in zip(methods, found, strict=True):
            print(f"knock-off {method} of {teacher} - label smoothing: {mean:+.2f} ± {half:.2f}")
    left.axhline(0, color="0.5", linewidth=1)
    left.set_xticks(range(len(methods)), methods)
    level = 100 * np.mean(list(smooth.values()))
    left.set(
        ylabel="accuracy less that of label smoothing (points)", title=f"Knock-offs; label smoothing: {level:.1f} %"
    )
    left.legend(title="mean and 95 % interval, 5 seeds", title_fontsize="small")
    left.grid(alpha=0.3)
    for a, b in itertools.combinations(("teacher CE", "teacher CMIM"), 2):
        print(f"{b} - {a}: {paired(runs.test(b, 'test/acc'), runs.test(a, 'test/acc'))}")

    data = FashionMNIST(seed=0)
    data.setup()
    temperatures = np.geomspace(0.25, 40, 12)
    for label in ("teacher CE", "teacher CMIM"):
        values = []
        for job in runs.jobs[label].values():
            logits = outputs(job.folder, data.test_data[0])
            values.append([cmi_at(logits, data.test_data[1], temperature) for temperature in temperatures])
        mean, spread = np.mean(values, axis=0), np.std(values, axis=0, ddof=1)
        (line,) = right.plot(temperatures, mean, label=label)
        right.fill_between(temperatures, mean - spread, mean + spread, alpha=0.2, color=line.get_color())
    right.set(xscale="log", yscale="log", xlabel="temperature T", ylabel="CMI (nats)", title="Teachers, test data")
    right.legend()
    right.grid(alpha=0.3)
    figure.savefig(DOCS / "information_knockoffs.png", dpi=130)


def model_of(folder: Path) -> SmallCNN:
    model = SmallCNN()
    load_weights(model, folder)
    return model.eval().requires_grad_(False)


def outputs(folder: Path, x: Tensor) -> Tensor:
    model = model_of(folder)
    return torch.cat([model(part) for part in x.split(1000)])


def cmi_at(logits: Tensor, target: Tensor, temperature: float) -> float:
    metric = NormalizedCMI(10, temperature=temperature)
    metric.update(logits, target)
    return float(metric.compute()["cmi"])


def accuracy_under(attack: PGD, model: SmallCNN, x: Tensor, y: Tensor, eps: float) -> float:
    moved = attack(model, x, y, ThreatModel(eps=eps))
    return float((model(moved).argmax(dim=1) == y).float().mean())


def robustness(runs: Runs) -> None:
    data = FashionMNIST(seed=0)
    data.setup()
    x, y = data.test_data[0][:500], data.test_data[1][:500]
    kinds: dict[str, tuple[float, PGD]] = {
        "FGSM 0.05": (0.05, FGSM()),
        "PGD-20 0.03, CE": (0.03, PGD(20, start="clean", track="last")),
        "PGD-20 0.03, margin": (0.03, PGD(20, loss="margin", start="clean", track="last")),
    }
    for name, (eps, attack) in kinds.items():
        found = {
            label: {
                seed: accuracy_under(attack, model_of(job.folder), x, y, eps) for seed, job in runs.jobs[label].items()
            }
            for label in list(runs.jobs)[:5]
        }
        for label, by_seed in found.items():
            values = 100 * np.array(list(by_seed.values()))
            against = "" if label == CE else f"; less CE: {paired(by_seed, found[CE])}"
            print(f"{name}: {label}: {values.mean():.1f} ± {values.std(ddof=1):.1f}{against}")


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/compare")
    kept = DOCS / "studies" / "results"
    for study in STUDIES:
        for name in ("table.csv", "table.md", "curves.csv"):
            (kept / f"{study}_{name}").write_bytes((folder / study / name).read_bytes())
    runs = {study: Runs(folder, study) for study in STUDIES}
    draw_cmic(runs["cmic"], runs["ncmi_and_error"])
    draw_students(runs["students"])
    draw_knockoffs(runs["knockoffs"])
    robustness(runs["cmic"])


if __name__ == "__main__":
    main()
