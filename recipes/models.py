"""The small LightningModules that the recipes train: plain modules, which know nothing of devices or channels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR
from torchmetrics.classification import MulticlassAccuracy

OptimizerCallable = Callable[[Iterable[Any]], Optimizer]
LRSchedulerCallable = Callable[[Optimizer], LRScheduler]
Schedule = Literal["one_cycle", "cosine"]


def adam(params: Iterable[Any]) -> Optimizer:
    """Adam at learning rate 1e-3: the default of the models here."""
    return torch.optim.Adam(params, lr=1e-3)


class CrossEntropyModule(LightningModule):
    """Cross-entropy training of any ``forward`` that gives logits, with the classes in their last dimension.

    Logs ``train/loss`` (nats) per step, and ``loss`` and ``acc`` (a fraction in [0, 1]) per epoch under ``val/`` and
    ``test/``: means over all targets. ``training_step`` is a pure function of parameters and batch, so it can run under
    `torch.func.vmap`, unless the network has batch normalisation, which keeps running statistics.

    Args:
        num_classes: Number of labels.
        optimizer: Builds the optimizer from the parameters.
        lr_scheduler: Builds a learning-rate schedule, stepped once per optimizer step, from the optimizer.
        schedule: Instead, one that spans all steps of the fit: ``"one_cycle"`` (up to the optimizer's rate in the first
            30 % and down again) or ``"cosine"`` (from it to 0).

    Raises:
        ValueError: If both are given.
    """

    def __init__(
        self,
        num_classes: int,
        optimizer: OptimizerCallable = adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__()
        if lr_scheduler is not None and schedule is not None:
            raise ValueError(
                f"Give `lr_scheduler` or `schedule`, not both; got schedule={schedule!r} beside a scheduler."
            )
        if schedule not in (None, "one_cycle", "cosine"):
            raise ValueError(f"`schedule` must be 'one_cycle' or 'cosine', got {schedule!r}.")
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.schedule = schedule
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy of one batch of inputs and integer targets."""
        x, y = batch
        loss = _cross_entropy(self(x), y)
        self.log("train/loss", loss, on_step=True, prog_bar=True, batch_size=len(y))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add one batch to the validation loss and accuracy."""
        self._evaluate("val", self.val_acc, batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add one batch to the test loss and accuracy."""
        self._evaluate("test", self.test_acc, batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The most likely class of each target: the shape of the logits without their last dimension."""
        x = batch[0] if isinstance(batch, tuple | list) else batch
        labels: Tensor = self(x).argmax(dim=-1)
        return labels

    def configure_optimizers(self) -> Any:
        """The optimizer, and the schedule if one was given."""
        optimizer = self.optimizer(self.parameters())
        if self.lr_scheduler is not None:
            scheduler = self.lr_scheduler(optimizer)
        elif self.schedule is not None:
            scheduler = self._over_the_fit(self.schedule, optimizer)
        else:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _over_the_fit(self, schedule: Schedule, optimizer: Optimizer) -> LRScheduler:
        steps = 1 if self._trainer is None else self.trainer.estimated_stepping_batches  # without a Trainer, of no use
        if not math.isfinite(steps):
            raise MisconfigurationException(
                f"schedule={schedule!r} spans the whole fit, which has no end: set the Trainer's max_steps or max_epochs."
            )
        if schedule == "one_cycle":
            return OneCycleLR(optimizer, max_lr=optimizer.defaults["lr"], total_steps=max(int(steps), 1))
        return CosineAnnealingLR(optimizer, T_max=max(int(steps), 1))

    def _evaluate(self, stage: str, accuracy: MulticlassAccuracy, batch: tuple[Tensor, Tensor]) -> None:
        x, y = batch
        logits = self(x)
        accuracy(logits.flatten(0, -2), y.flatten())
        self.log(f"{stage}/loss", _cross_entropy(logits, y), batch_size=y.numel(), sync_dist=True)
        self.log(f"{stage}/acc", accuracy, prog_bar=True, batch_size=y.numel())


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over all targets: labels in the shape of the logits without the last dimension, or probabilities in theirs."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(0, logits.ndim - 2))


class Classifier(CrossEntropyModule):
    """Cross-entropy training of any network that maps a batch of images to logits; :class:`CrossEntropyModule` logs.

    Args:
        net: Maps images ``(B, *input_shape)`` to logits ``(B, num_classes)``.
        num_classes: Number of labels.
        optimizer: Builds the optimizer from the parameters.
        lr_scheduler: Builds a learning-rate schedule, stepped once per optimizer step, from the optimizer.
        schedule: Instead, one that spans all steps of the fit: ``"one_cycle"`` (up to the optimizer's rate in the first
            30 % and down again) or ``"cosine"`` (from it to 0).

    Raises:
        ValueError: If both are given.
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int = 10,
        optimizer: OptimizerCallable = adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__(num_classes, optimizer, lr_scheduler, schedule)
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, *input_shape)`` to logits ``(B, num_classes)``."""
        logits: Tensor = self.net(x)
        return logits


class SoftmaxRegression(Classifier):
    """Multinomial logistic regression from zero, the model of the over-the-air papers: ``d = 7,850`` for 28x28 images.

    Args:
        input_shape: Shape of one image; it is flattened.
        num_classes: Number of labels.
        optimizer: Builds the optimizer from the parameters.
        lr_scheduler: Builds a learning-rate schedule, stepped once per optimizer step, from the optimizer.
        schedule: Instead, ``"one_cycle"`` or ``"cosine"`` over all steps of the fit.

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
        schedule: Schedule | None = None,
    ) -> None:
        linear = nn.Linear(math.prod(input_shape), num_classes)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        super().__init__(nn.Sequential(nn.Flatten(), linear), num_classes, optimizer, lr_scheduler, schedule)


class MLP(Classifier):
    """A network of linear layers with ReLU between them: 101,770 parameters at 28x28 with one hidden layer of 128.

    Args:
        input_shape: Shape of one image; it is flattened.
        hidden: Widths of the hidden layers.
        num_classes: Number of labels.
        optimizer: Builds the optimizer from the parameters.
        lr_scheduler: Builds a learning-rate schedule, stepped once per optimizer step, from the optimizer.
        schedule: Instead, ``"one_cycle"`` or ``"cosine"`` over all steps of the fit.

    Raises:
        ValueError: If a width is below 1.

    Example:
        >>> sum(p.numel() for p in MLP().parameters())
        101770
    """

    def __init__(
        self,
        input_shape: tuple[int, ...] = (1, 28, 28),
        hidden: Sequence[int] = (128,),
        num_classes: int = 10,
        optimizer: OptimizerCallable = adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        if any(width < 1 for width in hidden):
            raise ValueError(f"`hidden` needs widths of at least 1, got {list(hidden)}.")
        widths = [math.prod(input_shape), *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        net = nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))
        super().__init__(net, num_classes, optimizer, lr_scheduler, schedule)


class ConvClassifier(Classifier):
    """Two convolutions and two linear layers, without batch normalisation: 206,922 parameters at 28x28.

    Args:
        input_shape: Channels, height and width of one image; height and width at least 4.
        num_classes: Number of labels.
        optimizer: Builds the optimizer from the parameters.
        lr_scheduler: Builds a learning-rate schedule, stepped once per optimizer step, from the optimizer.
        schedule: Instead, ``"one_cycle"`` or ``"cosine"`` over all steps of the fit.

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
        schedule: Schedule | None = None,
    ) -> None:
        channels, height, width = _image_shape(input_shape, smallest=4)
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
        super().__init__(net, num_classes, optimizer, lr_scheduler, schedule)


class TanhCNN(Classifier):
    """The small network of the literature on DP-SGD, with tanh, which bounds gradients: 26,010 parameters at 28x28.

    Two convolutions with overlapping pooling and two linear layers. Of images smaller than 28 pixels, the first
    convolution is 3x3 of stride 1 instead of 8x8 of stride 2.

    Args:
        input_shape: Channels, height and width of one image; height and width at least 8.
        num_classes: Number of labels.
        optimizer: Builds the optimizer from the parameters.
        lr_scheduler: Builds a learning-rate schedule, stepped once per optimizer step, from the optimizer.
        schedule: Instead, ``"one_cycle"`` or ``"cosine"`` over all steps of the fit.

    Raises:
        ValueError: If the image is not channels x height x width, or too small.

    Reference:
        Papernot et al., "Tempered Sigmoid Activations for Deep Learning with Differential Privacy", AAAI 2021, Table 1.
        arXiv:2007.14191

    Example:
        >>> sum(p.numel() for p in TanhCNN().parameters())
        26010
        >>> TanhCNN(input_shape=(1, 8, 8))(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        input_shape: tuple[int, ...] = (1, 28, 28),
        num_classes: int = 10,
        optimizer: OptimizerCallable = adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        channels, *size = _image_shape(input_shape, smallest=8)
        kernel, stride, padding = (8, 2, 3) if min(size) >= 28 else (3, 1, 1)
        height, width = (_after_pooling(_after_pooling(n, kernel, stride, padding), 4, 2, 0) for n in size)
        net = nn.Sequential(
            nn.Conv2d(channels, 16, kernel, stride=stride, padding=padding),
            nn.Tanh(),
            nn.MaxPool2d(2, stride=1),
            nn.Conv2d(16, 32, kernel_size=4, stride=2),
            nn.Tanh(),
            nn.MaxPool2d(2, stride=1),
            nn.Flatten(),
            nn.Linear(32 * height * width, 32),
            nn.Tanh(),
            nn.Linear(32, num_classes),
        )
        super().__init__(net, num_classes, optimizer, lr_scheduler, schedule)


def _after_pooling(size: int, kernel: int, stride: int, padding: int) -> int:
    """Pixels along one side after a convolution and a 2x2 pooling of stride 1."""
    return (size + 2 * padding - kernel) // stride


class SmallCNN(Classifier):
    """Three 3x3 convolutions of stride 2 with batch normalisation, and one linear layer: 25,978 parameters at width 16.

    The features are averaged to 2x2, so that the number of parameters does not depend on the size of the image. At 8x8
    the last convolution leaves one pixel: a training batch of a single such image cannot be normalised.

    Args:
        input_shape: Channels, height and width of one image; height and width at least 8.
        num_classes: Number of labels.
        optimizer: Builds the optimizer from the parameters.
        lr_scheduler: Builds a learning-rate schedule, stepped once per optimizer step, from the optimizer.
        schedule: Instead, ``"one_cycle"`` or ``"cosine"`` over all steps of the fit.
        width: Channels of the first convolution; the others have twice and four times as many.

    Raises:
        ValueError: If the image is not channels x height x width, or too small, or ``width`` is below 1.

    Example:
        >>> sum(p.numel() for p in SmallCNN(width=16).parameters())
        25978
        >>> SmallCNN(input_shape=(1, 8, 8))(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        input_shape: tuple[int, ...] = (1, 28, 28),
        num_classes: int = 10,
        optimizer: OptimizerCallable = adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        schedule: Schedule | None = None,
        width: int = 16,
    ) -> None:
        channels, _, _ = _image_shape(input_shape, smallest=8)
        _check_width(width)
        net = nn.Sequential(
            *_conv_norm(channels, width, stride=2),
            nn.ReLU(),
            *_conv_norm(width, 2 * width, stride=2),
            nn.ReLU(),
            *_conv_norm(2 * width, 4 * width, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * 4 * width, num_classes),
        )
        super().__init__(net, num_classes, optimizer, lr_scheduler, schedule)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation, added to their input: ``relu(x + f(x))``.

    Where the shape changes, the input goes through a 1x1 convolution with batch normalisation (option B of the paper).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Of the first convolution and of the shortcut.

    Reference:
        He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, Figure 5 (left). arXiv:1512.03385

    Example:
        >>> BasicBlock(3, 5, stride=2)(torch.zeros(1, 3, 8, 8)).shape
        torch.Size([1, 5, 4, 4])
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            *_conv_norm(in_channels, out_channels, stride=stride),
            nn.ReLU(),
            *_conv_norm(out_channels, out_channels, stride=1),
        )
        same = stride == 1 and in_channels == out_channels
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(*_conv_norm(in_channels, out_channels, stride=stride, size=1))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Features ``(B, in_channels, H, W)`` to ``(B, out_channels, ceil(H / stride), ceil(W / stride))``."""
        return F.relu(self.shortcut(x) + self.residual(x))


class SmallResNet(Classifier):
    """A residual network of three basic blocks, cheap enough for a CPU: 77,754 parameters at width 16.

    A 3x3 stem, three stages of one block each, global average pooling, a linear layer. Stages 2 and 3 halve the image.
    Of images with height and width at least 28, the stem has stride 2 (the blocks then work on 14, 7 and 4 pixels of
    28), of smaller ones stride 1; the number of parameters is the same.

    Args:
        input_shape: Channels, height and width of one image; height and width at least 8.
        num_classes: Number of labels.
        optimizer: Builds the optimizer from the parameters.
        lr_scheduler: Builds a learning-rate schedule, stepped once per optimizer step, from the optimizer.
        schedule: Instead, ``"one_cycle"`` or ``"cosine"`` over all steps of the fit.
        width: Channels of the stem and of stage 1; stages 2 and 3 have twice and four times as many.

    Raises:
        ValueError: If the image is not channels x height x width, or too small, or ``width`` is below 1.

    Reference:
        He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, Section 4.2 (the network for CIFAR-10,
        here with one block a stage instead of n). arXiv:1512.03385

    Example:
        >>> sum(p.numel() for p in SmallResNet(width=16).parameters())
        77754
        >>> SmallResNet(input_shape=(1, 8, 8))(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        input_shape: tuple[int, ...] = (1, 28, 28),
        num_classes: int = 10,
        optimizer: OptimizerCallable = adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        schedule: Schedule | None = None,
        width: int = 16,
    ) -> None:
        channels, *size = _image_shape(input_shape, smallest=8)
        _check_width(width)
        net = nn.Sequential(
            *_conv_norm(channels, width, stride=2 if min(size) >= 28 else 1),
            nn.ReLU(),
            BasicBlock(width, width),
            BasicBlock(width, 2 * width, stride=2),
            BasicBlock(2 * width, 4 * width, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, num_classes),
        )
        super().__init__(net, num_classes, optimizer, lr_scheduler, schedule)


def _conv_norm(in_channels: int, out_channels: int, *, stride: int, size: int = 3) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """A convolution without bias, which the normalisation after it would remove."""
    conv = nn.Conv2d(in_channels, out_channels, size, stride=stride, padding=size // 2, bias=False)
    return conv, nn.BatchNorm2d(out_channels)


def _image_shape(input_shape: tuple[int, ...], *, smallest: int) -> tuple[int, int, int]:
    if len(input_shape) != 3 or input_shape[0] < 1 or min(input_shape[1:]) < smallest:
        raise ValueError(
            f"`input_shape` must be (channels, height, width) with height and width at least {smallest}, got "
            f"{input_shape}. Give images, not vectors (flatten=False of the datamodule), and enlarge smaller ones."
        )
    channels, height, width = input_shape
    return channels, height, width


def _check_width(width: int) -> None:
    if width < 1:
        raise ValueError(f"`width` must be at least 1 channel, got {width}: 8 is small, 16 the default, 64 large.")
