"""Small networks trained on the digits, and nets that only hide their gradients, for tests of the evaluation."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundwire.callbacks.adversarial import PGD, AdversarialTraining, ThreatModel
from groundwire.datamodules import Digits
from helpers.edge import trainer

EPS = 0.1
THREAT = ThreatModel(EPS)


class DigitsClassifier(pl.LightningModule):
    """Any network on digits, with steps for all stages."""

    def __init__(self, network: nn.Module | None = None) -> None:
        super().__init__()
        self.network = convolutional() if network is None else network

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.network(x)
        return found

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Wrapped(nn.Module):
    """Something before and after a network; the network is that of the argument."""

    def __init__(self, network: nn.Module, scale: float = 1.0, levels: int = 0, noise: float = 0.0) -> None:
        super().__init__()
        self.network, self.scale, self.levels, self.noise = network, scale, levels, noise

    def forward(self, x: Tensor) -> Tensor:
        if self.levels:
            x = torch.round(x * self.levels) / self.levels
        if self.noise:
            x = x + self.noise * torch.randn_like(x)
        found: Tensor = self.scale * self.network(x)
        return found


def convolutional(seed: int = 0) -> nn.Module:
    """For images (1, 8, 8), with BatchNorm."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        )


def digits(**options: Any) -> Digits:
    data = Digits(batch_size=64, seed=0, **options)
    data.setup()
    return data


def held_out(n: int) -> tuple[Tensor, Tensor]:
    """The first of the digits' test data."""
    x, y = digits().test_data
    return x[:n], y[:n]


def trained(robust: bool, epochs: int, seed: int = 0) -> nn.Module:
    """In evaluation mode; with adversarial training, or without."""
    attack = PGD(5, track="last")
    callbacks = [AdversarialTraining(THREAT, attack, warmup_epochs=epochs / 4, seed=0)] if robust else []
    module = DigitsClassifier(convolutional(seed))
    data = digits()
    steps = epochs * len(data.train_dataloader())
    trainer(steps=steps, callbacks=callbacks, limit_val_batches=0).fit(module, data)
    return copy.deepcopy(module.network).eval()
