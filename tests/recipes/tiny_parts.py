"""A model and data small enough for the command to be tested, with a loader that can be resumed within an epoch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from groundwire.recipes import Classifier

Batch = tuple[Tensor, Tensor]


class Net(Classifier):
    """Draws from the global random stream in every step, so that a resumed run needs it back."""

    def __init__(self, lr: float = 0.1, seconds_per_step: float = 0.0, broken_at: int = -1) -> None:
        super().__init__(
            nn.Sequential(nn.Dropout(0.2), nn.Linear(4, 3)), 3, lambda params: torch.optim.Adam(params, lr=lr)
        )
        self.seconds_per_step, self.broken_at = seconds_per_step, broken_at

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        time.sleep(self.seconds_per_step)
        if self.global_step == self.broken_at:
            raise RuntimeError("the step is broken")
        return super().training_step(batch, batch_idx)


class Rounds:
    """Batches that depend on epoch and position only."""

    def __init__(self, length: int) -> None:
        self.length, self.epoch, self.position, self.resumes = length, -1, 0, False

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        if not self.resumes:
            self.epoch, self.position = self.epoch + 1, 0
        self.resumes = False
        return self._epoch()

    def _epoch(self) -> Iterator[Batch]:
        while self.position < self.length:
            self.position += 1
            yield _samples(1000 * self.epoch + self.position)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position, self.resumes = state["epoch"], state["position"], True


class Data(LightningDataModule):
    def __init__(self, rounds_per_epoch: int = 4, missing: bool = False) -> None:
        super().__init__()
        self.rounds_per_epoch, self.missing = rounds_per_epoch, missing

    def setup(self, stage: str) -> None:
        if self.missing:
            raise FileNotFoundError("The data are not there. Three ways to get them:\n  one,\n  two,\n  three.")

    def train_dataloader(self) -> Rounds:
        return Rounds(self.rounds_per_epoch)

    def val_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(TensorDataset(*_samples(7)), batch_size=8)

    def test_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(TensorDataset(*_samples(8)), batch_size=8)


def _samples(seed: int) -> Batch:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :3].argmax(dim=-1)
