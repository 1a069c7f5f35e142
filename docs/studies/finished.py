"""The finished runs of a study, for the scripts beside this one."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy.stats import t

from groundwire.callbacks.reporting import read_metrics
from groundwire.recipes.cli.study import Job, Study

DOCS = Path(__file__).resolve().parents[1]


class Runs:
    """The finished runs of a study."""

    def __init__(self, folder: Path, name: str) -> None:
        self.study = Study.of_file(DOCS / "studies" / f"{name}.yaml")
        self.jobs: dict[str, dict[int, Job]] = defaultdict(dict)
        for job in self.study.jobs(folder / name / "runs"):
            self.jobs[job.label][job.seed] = job

    def test(self, label: str, metric: str) -> dict[int, float]:
        """The test metric of each seed."""
        found = {}
        for seed, job in self.jobs[label].items():
            found[seed] = json.loads((job.folder / "result.json").read_text())["test"][metric]
        return found

    def curve(self, label: str, *metrics: str) -> np.ndarray:
        """Validation metrics of each seed and epoch, shape ``(seeds, epochs, metrics)``."""
        runs = []
        for job in self.jobs[label].values():
            rows = [row for row in read_metrics(job.folder / "metrics.csv") if metrics[0] in row]
            runs.append([[row[name] for name in metrics] for row in rows])
        return np.array(runs)


def paired(ours: dict[int, float], theirs: dict[int, float]) -> tuple[float, float]:
    """Mean difference over the seeds, and half of its 95 % confidence interval (Student's t), in points."""
    difference = 100 * np.array([ours[seed] - theirs[seed] for seed in ours])
    half = t.ppf(0.975, len(difference) - 1) * difference.std(ddof=1) / math.sqrt(len(difference))
    return float(difference.mean()), float(half)
