from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from groundwire.callbacks.reporting import MetricsCSV, read_metrics

BITS = 2**53 - 1


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_every_digit_of_a_double_comes_back(tmp_path: Path) -> None:
    values = [0.1, 1 / 3, math.pi * 1e-300, 1e300, float(BITS)]
    logger = MetricsCSV(tmp_path)
    for step, value in enumerate(values):
        logger.log_metrics({"loss": value, "bits": torch.tensor(BITS, dtype=torch.float64)}, step)
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["loss"] for row in rows] == values
    assert {row["bits"] for row in rows} == {BITS}


def test_a_row_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    for step in range(3):
        logger.log_metrics({"loss": 1.0}, step)
        assert len(lines(tmp_path / "metrics.csv")) == step + 2


def test_new_metrics_become_new_columns_and_old_rows_stay(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"a": 1.5}, 0)
    logger.log_metrics({"b": 2.5}, 1)
    logger.log_metrics({"a": 3.5, "b": 4.5}, 2)
    assert lines(tmp_path / "metrics.csv") == ["step,a,b", "0,1.5,", "1,,2.5", "2,3.5,4.5"]
    with open(tmp_path / "metrics.csv", newline="") as file:  # as any other reader sees it
        assert [row["b"] for row in csv.DictReader(file)] == ["", "2.5", "4.5"]


def test_a_resumed_run_drops_what_came_after_its_checkpoint_and_goes_on(tmp_path: Path) -> None:
    def log(folder: Path, steps: range) -> None:
        logger = MetricsCSV(folder)
        for step in steps:
            logger.log_metrics({"loss": step / 7}, step)
            if step % 4 == 3:
                logger.log_metrics({"val": step / 3}, step)

    log(tmp_path / "whole", range(10))
    log(tmp_path / "killed", range(6))
    log(tmp_path / "killed", range(3, 10))  # from the checkpoint after three steps, before `val` was ever logged
    assert lines(tmp_path / "killed" / "metrics.csv") == lines(tmp_path / "whole" / "metrics.csv")


def test_a_row_torn_by_a_kill_does_not_stop_the_resumed_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,a,b\n0,1.0,2.0\n1,1.0,2.0\n2,1")
    MetricsCSV(tmp_path).log_metrics({"a": 5.0, "b": 6.0}, 2)
    assert lines(tmp_path / "metrics.csv") == ["step,a,b", "0,1.0,2.0", "1,1.0,2.0", "2,5.0,6.0"]


def test_validate_and_test_of_one_process_add_to_the_file(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"loss": 1.0}, 0)
    logger.finalize("success")
    logger.log_metrics({"val": 2.0}, 1)
    logger.finalize("success")
    logger.log_metrics({"test": 3.0}, 1)
    assert len(read_metrics(tmp_path / "metrics.csv")) == 3


def test_a_run_from_step_zero_starts_the_file_again(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        MetricsCSV(tmp_path).log_metrics({"loss": value}, 0)
    assert read_metrics(tmp_path / "metrics.csv") == [{"step": 0, "loss": 2.0}]


def test_in_a_trainer_float64_metrics_are_not_rounded(tmp_path: Path) -> None:
    class Counts(BoringModel):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> object:
            self.log("bits", torch.tensor(BITS, dtype=torch.float64), on_step=True)
            return super().training_step(batch, batch_idx)

    Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=MetricsCSV(tmp_path),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Counts())
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["bits"] for row in rows if "bits" in row] == pytest.approx([BITS, BITS], abs=0)
