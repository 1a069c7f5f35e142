"""What a module logs while the devices work, and its value over all of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torchmetrics import Metric

_OPTIONS = tuple(inspect.signature(pl.LightningModule.log).parameters)[3:]  # after self, name and value


class LogRecorder:
    """Stands in for ``LightningModule.log`` while the devices work, and keeps the values.

    Args:
        pl_module: Whose ``log`` it stands in for.
    """

    def __init__(self, pl_module: pl.LightningModule) -> None:
        self.values: dict[str, Tensor]
        self.options: dict[str, dict[str, Any]]
        self.metrics: dict[str, Metric]
        self._pl_module = pl_module
        self.reset()

    def reset(self) -> None:
        """Forget an attempt that failed."""
        self.values, self.options, self.metrics = {}, {}, {}

    def __call__(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        """Take what ``self.log`` takes."""
        self.options[name] = dict(zip(_OPTIONS, args, strict=False)) | options
        if isinstance(value, Metric):
            self.metrics[name] = value
            return
        if not isinstance(value, Tensor):
            value = torch.tensor(float(value))
        if value.numel() != 1:
            raise ValueError(f"self.log({name!r}, ...) takes one number, got shape {tuple(value.shape)}.")
        value = value.detach().reshape(()).to(self._pl_module.device)
        self.values[name] = value if value.is_floating_point() else value.float()

    def take(self) -> dict[str, Tensor]:
        """The values since the last call."""
        values, self.values = self.values, {}
        return values

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Shadow the module's ``log`` (``log_dict`` goes through it), and put back what was there."""
        attributes = self._pl_module.__dict__
        shadowed = attributes.get("log")
        attributes["log"] = self
        try:
            yield
        finally:
            del attributes["log"]
            if shadowed is not None:
                attributes["log"] = shadowed


def over_devices(values: Tensor, weights: Tensor, reduce_fx: Any = "mean") -> Tensor:
    """One value of those that the devices logged.

    Args:
        values: Shape ``(R,)``.
        weights: Of these devices in the aggregate, shape ``(R,)``.
        reduce_fx: What the module passed to ``self.log``: sums, extremes are taken over devices too; anything else is
            the weighted mean.

    Returns:
        A scalar.
    """
    name = reduce_fx if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", "mean")
    if name in ("sum", "max", "min"):
        return getattr(values, name)()  # type: ignore[no-any-return]
    weights = weights.to(values.dtype)
    return values @ weights / weights.sum()
