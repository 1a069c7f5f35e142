from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import rich
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from groundwire.callbacks.reporting import RoundProgressBar


class Spy(RoundProgressBar):
    """Keeps what the bar says at the end of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, float, float | None]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        if self.progress is not None:
            task = self.train_progress_bar
            self.seen.append((task.description.strip(), task.completed, task.total))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def fit(bar: RoundProgressBar, folder: Path, **kwargs: Any) -> None:
    Trainer(
        **kwargs,
        accelerator="cpu",
        callbacks=[bar],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=folder,
        limit_train_batches=3,
        limit_val_batches=1,
    ).fit(BoringModel())


@pytest.mark.parametrize(("kwargs", "total"), [({"max_steps": 7}, 7), ({"max_epochs": 2}, 6)])
def test_one_bar_counts_rounds_over_all_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kwargs: dict[str, int], total: int
) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal())
    bar = Spy()
    try:
        fit(bar, tmp_path, **kwargs)
    finally:
        rich.reconfigure()
    assert bar.seen == [("Round", step, total) for step in range(1, total + 1)]


def test_where_nobody_watches_it_is_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bar = Spy()
    fit(bar, tmp_path, max_steps=2)
    assert bar.seen == []
    assert capsys.readouterr().out == ""
