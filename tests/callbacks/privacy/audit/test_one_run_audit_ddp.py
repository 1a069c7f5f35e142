"""PrivacyAudit on two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from groundwire.callbacks.privacy.audit import Canaries, PrivacyAudit
from helpers.ddp import ddp_trainer, run_ddp
from helpers.edge import CLASSES, Classifier, loader, mlp

Record = tuple[float, ...]


class Seen(pl.Callback):
    """Remembers the records."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.records += records(*batch)


def records(x: Tensor, y: Tensor) -> list[Record]:
    return [(*row.tolist(), float(label)) for row, label in zip(x, y, strict=True)]


def audit_on_rank(folder: str) -> tuple[Canaries, list[Any], list[Record]]:
    callback, seen = PrivacyAudit(40, num_classes=CLASSES, dirpath=folder), Seen()
    t = ddp_trainer(callbacks=[callback, seen], steps=-1, max_epochs=1, default_root_dir=folder)
    t.fit(Classifier(mlp()), loader(samples=100))
    assert callback.report is not None
    assert callback.canaries is not None
    return callback.canaries, callback.report.rows(), seen.records


def test_ranks_have_the_same_canaries_and_share_them_out(tmp_path: Path) -> None:
    (canaries, rows, first), (others, other_rows, second) = run_ddp(audit_on_rank, str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(canaries, others, strict=True))
    assert rows == other_rows
    trained_on = set(first) | set(second)
    inside = [record in trained_on for record in records(canaries.x, canaries.y)]
    assert inside == canaries.included.tolist()
    assert len(trained_on) == 100 + sum(inside)
    assert len(first) == len(second) == -(-len(trained_on) // 2)
    assert (tmp_path / "audit.json").exists()
