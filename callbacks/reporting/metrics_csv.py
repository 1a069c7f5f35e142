"""A CSV logger that can be resumed: an interrupted run leaves the file that an uninterrupted one would have."""

from __future__ import annotations

import csv
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor

MetricRow = dict[str, float]


def read_metrics(path: str | Path) -> list[MetricRow]:
    """Read a file that `MetricsCSV` wrote.

    Args:
        path: The CSV file.

    Returns:
        One dict per row, in file order, without the cells that are empty; integers come back as ``int``.
    """
    with open(path, newline="") as file:
        return [
            {key: _number(cell) for key, cell in row.items() if key and cell not in ("", None)}
            for row in csv.DictReader(file)
        ]


class MetricsCSV(Logger):
    """Writes every logged metric to ``<save_dir>/metrics.csv``, one row per step and kind of metric.

    Floats keep every digit (``float(text)`` gives back the same double), so counters such as bits are exact up to
    2^53. Each row is handed to the operating system as it is logged: a killed process loses none. New metrics become
    new columns, in the order in which they first appear.

    A file that is already there is continued: the first row logged now, at step ``n``, drops the rows at step ``n``
    and later, which a killed run wrote after its last checkpoint. A run that starts again at step 0 starts the file
    again.

    Args:
        save_dir: Folder of the run; the current folder where None.
        filename: Name of the file inside it.
    """

    def __init__(self, save_dir: str | Path | None = None, filename: str = "metrics.csv") -> None:
        super().__init__()
        self._save_dir = os.fspath(save_dir) if save_dir is not None else "."
        self.path = Path(self._save_dir) / filename
        self._columns: list[str] | None = None

    @property
    def name(self) -> str:
        """Of no use here: the folder is the run."""
        return ""

    @property
    def version(self) -> str:
        """Of no use here: the folder is the run."""
        return ""

    @property
    def save_dir(self) -> str:
        """Folder of the run."""
        return self._save_dir

    @property
    def log_dir(self) -> str:
        """Folder of the run."""
        return self._save_dir

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's folder holds its ``config.yaml``."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float | Tensor], step: int | None = None) -> None:
        """Append one row.

        Args:
            metrics: Values by name.
            step: Optimizer steps (rounds) before the one that gave these values; 0 where None.
        """
        step = step or 0
        row = {"step": step} | {
            key: value.item() if isinstance(value, Tensor) else value for key, value in metrics.items()
        }
        if self._columns is None:
            self._columns = self._continue_from(step)
        new = [key for key in row if key not in self._columns]
        if new:
            self._columns += new
            self._rewrite(self._rows())
        with open(self.path, "a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow([_text(row.get(key)) for key in self._columns])

    def _continue_from(self, step: int) -> list[str]:
        """Drop what the file holds at ``step`` and later; the columns that are left."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = self._rows()
        kept = [row for row in rows if row.get("step") and int(row["step"]) < step]
        self._columns = [key for key in (rows[0] if rows else {}) if any(row[key] for row in kept)]
        self._rewrite(kept)
        return self._columns

    def _rows(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with open(self.path, newline="") as file:
            rows = list(csv.DictReader(file, restval=""))
        return [row for row in rows if None not in row]

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        """Replace the file in one move, so that a kill leaves the old or the new one."""
        partial = self.path.with_suffix(".partial")
        with open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, self._columns or [], restval="", extrasaction="ignore", lineterminator="\n")
            if self._columns:
                writer.writeheader()
            writer.writerows(rows)
        os.replace(partial, self.path)


def _text(value: float | None) -> str:
    return "" if value is None else repr(value)


def _number(cell: str) -> float:
    try:
        return int(cell)
    except ValueError:
        return float(cell)
