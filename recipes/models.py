"""The small LightningModules that the recipes train: plain modules, which know nothing of devices or channels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics.classification import MulticlassAccuracy

OptimizerCallable = Callable[[Iterable[Any]], Optimizer]
LRSchedulerCallable = Callable[[Optimizer], LRScheduler]


def adam(params: Iterable[Any]) -> Optimizer:
    """Adam at learning rate 1e-3: the default of the models here."""
    return torch.optim.Adam(params, lr=1e-3)


class Classifier(LightningModule):
    """Cross-entropy training of any network that maps a batch of images to logits.

    Logs ``train/loss`` (nats) per step, and ``loss`` and ``acc`` (a fraction in [0, 1]) per epoch under ``val/`` and
    ``test/``. ``training_step`` is a pure function of parameters and batch, so it can run under `torch.func.vmap`.

    Args:
        net: Maps images ``(B, *input_shape)`` to logits ``(B, num_classes)``.
        num_classes: Number of labels.
        optimizer: Builds the optimizer from the parameters.
        lr_scheduler: Builds a learning-rate schedule, stepped once per optimizer step, from the optimizer.
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int = 10,
        optimizer: OptimizerCallable = adam,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, *input_shape)`` to logits ``(B, num_classes)``."""
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy of one batch of images and integer labels."""
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train/loss", loss, on_step=True, prog_bar=True, batch_size=len(y))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add one batch to the validation loss and accuracy."""
        self._evaluate("val", self.val_acc, batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add one batch to the test loss and accuracy."""
        self._evaluate("test", self.test_acc, batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The most likely label of each image, shape ``(B,)``."""
        x = batch[0] if isinstance(batch, tuple | list) else batch
        labels: Tensor = self(x).argmax(dim=-1)
        return labels

    def configure_optimizers(self) -> Any:
        """The optimizer, and the schedule if one was given."""
        optimizer = self.optimizer(self.parameters())
        if self.lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"},
        }

    def _evaluate(self, stage: str, accuracy: MulticlassAccuracy, batch: tuple[Tensor, Tensor]) -> None:
        x, y = batch
        logits = self(x)
        accuracy(logits, y)
        self.log(f"{stage}/loss", F.cross_entropy(logits, y), batch_size=len(y), sync_dist=True)
        self.log(f"{stage}/acc", accuracy, prog_bar=True, batch_size=len(y))


class SoftmaxRegression(Classifier):
    """Multinomial logistic regression from zero, the model of the over-the-air papers: ``d = 7,850`` for 28x28 images.

    Args:
        input_shape: Shape of one image; it is flattened.
        num_classes: Number of labels.
        optimizer: Builds the optimizer from the parameters.
        lr_scheduler: Builds a learning-rate schedule, stepped once per optimizer step, from the optimizer.

    Example:
        >>> sum(p.numel() for p in SoftmaxRegression().parameters())
        7850
    """

    def __init__(
        self,
        input_shape: tuple[int, ...] = (1, 28, 28),
        num_classes: int = 10,
        optimizer: OptimizerCallable = adam,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        linear = nn.Linear(math.prod(input_shape), num_classes)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        super().__init__(nn.Sequential(nn.Flatten(), linear), num_classes, optimizer, lr_scheduler)


class ConvClassifier(Classifier):
    """Two convolutions and two linear layers, without batch normalisation: 206,922 parameters at 28x28.

    Args:
        input_shape: Channels, height and width of one image; height and width at least 4.
        num_classes: Number of labels.
        optimizer: Builds the optimizer from the parameters.
        lr_scheduler: Builds a learning-rate schedule, stepped once per optimizer step, from the optimizer.

    Raises:
        ValueError: If the image is not channels x height x width, or too small for two poolings.

    Example:
        >>> sum(p.numel() for p in ConvClassifier().parameters())
        206922
        >>> ConvClassifier(input_shape=(1, 8, 8))(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        input_shape: tuple[int, ...] = (1, 28, 28),
        num_classes: int = 10,
        optimizer: OptimizerCallable = adam,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        if len(input_shape) != 3 or min(input_shape[1:]) < 4:
            raise ValueError(
                f"`input_shape` must be (channels, height, width) with height and width at least 4, got {input_shape}."
            )
        channels, height, width = input_shape
        net = nn.Sequential(
            nn.Conv2d(channels, 16, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * (height // 4) * (width // 4), 128),
            nn.ReLU(),
            nn.Linear(128, num_classes),
        )
        super().__init__(net, num_classes, optimizer, lr_scheduler)
