"""Running centroids of the classes' output distributions."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from groundwire.callbacks.information.functional import class_counts, class_sums

_FEW = 64  # classes


class CentroidTable:
    """Centroids ``Q`` of ``C`` classes as bias-corrected exponential moving averages of batch means.

    A class that was never seen has the uniform distribution. Several rows a class, for several temperatures, are
    several tables.

    Args:
        num_classes: Classes ``C``.
        mu: Weight of the past for each class seen in a batch, in [0, 1).
        device: Where it lies.

    Attributes:
        centroids: ``Q``, shape ``(C, C)``, float32; rows are distributions.

    Example:
        >>> table = CentroidTable(2, mu=0.9)
        >>> table.update(torch.tensor([[0.8, 0.2]]), torch.tensor([1]))
        >>> table.centroids
        tensor([[0.5000, 0.5000],
                [0.8000, 0.2000]])
    """

    def __init__(self, num_classes: int, mu: float = 0.99, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        self.mu = mu
        # float32 whatever the default is at the time, which the Trainer's precision may have changed
        self.centroids = torch.full((num_classes, num_classes), 1 / num_classes, dtype=torch.float32, device=device)
        self._mean = torch.zeros_like(
            self.centroids
        )  # starts at 0; its row sums are what the bias correction divides by

    def update(self, probs: Tensor, target: Tensor, strategy: Strategy | None = None) -> None:
        """Take in the outputs of a batch.

        A class with an output that is not finite stays as it is: loss scaling or the user will skip such a step, and it
        would spoil a running mean for good.

        Args:
            probs: Output distributions, shape ``(n, C)``.
            target: Labels, shape ``(n,)``.
            strategy: Adds up over its processes, so that all of them hold the same table.
        """
        if strategy is not None and getattr(strategy, "world_size", 1) > 1:
            sums, counts = summed_over_processes(probs, target, self.num_classes, strategy)
            self._move(sums.float(), counts.float(), slice(None))
        elif self.num_classes <= _FEW:  # all rows at once, rather than to look for those that are there
            sums = class_sums(probs.float(), target, self.num_classes)
            self._move(sums, class_counts(target, self.num_classes), slice(None))
        else:
            classes, groups = torch.unique(target, return_inverse=True)
            sums = class_sums(probs.float(), groups, len(classes))
            self._move(sums, class_counts(groups, len(classes)), classes)

    def _move(self, sums: Tensor, counts: Tensor, rows: slice | Tensor) -> None:
        """Move the given rows towards the means of those of them that were seen."""
        weight = counts[:, None]
        moved = self.mu * self._mean[rows] + (1 - self.mu) / weight * sums
        total = moved.sum(dim=1, keepdim=True)
        taken = (weight > 0) & torch.isfinite(total)
        self.centroids[rows] = torch.where(taken, moved / total, self.centroids[rows])
        self._mean[rows] = torch.where(taken, moved, self._mean[rows])

    def assign(self, sums: Tensor, counts: Tensor) -> None:
        """Replace the centroids of the classes that were seen, with finite outputs alone, by exact means.

        Args:
            sums: Sum of output distributions of each class, shape ``(C, C)``.
            counts: Samples of each class, shape ``(C,)``.
        """
        classes = ((counts > 0) & torch.isfinite(sums).all(dim=1)).nonzero().flatten()
        rows = sums[classes].double()
        self.centroids[classes] = (rows / rows.sum(dim=1, keepdim=True)).float()
        self._mean[classes] = self.centroids[classes]

    def fitting(self, logits: Tensor) -> CentroidTable:
        """The table itself, on the device of the logits.

        Args:
            logits: Shape ``(..., C)``.

        Returns:
            The table.

        Raises:
            MisconfigurationException: If it has another number of classes.
        """
        if logits.shape[-1] != self.num_classes:
            raise MisconfigurationException(
                f"The checkpoint holds centroids for {self.num_classes} classes, the module outputs "
                f"{logits.shape[-1]}. Resume with the module it was written with."
            )
        if self.centroids.device != logits.device:
            self.centroids, self._mean = self.centroids.to(logits.device), self._mean.to(logits.device)
        return self

    def state_dict(self) -> dict[str, Any]:
        """All that makes it, on the CPU."""
        return {
            "centroids": self.centroids.cpu().clone(),
            "mean": self._mean.cpu().clone(),
        }

    @classmethod
    def of_state(cls, state: dict[str, Any], mu: float) -> CentroidTable:
        """A table that goes on from where another was.

        Args:
            state: What :meth:`state_dict` gave.
            mu: Weight of the past from now on.

        Returns:
            The table, on the CPU.
        """
        table = cls(len(state["mean"]), mu)
        table.centroids, table._mean = state["centroids"].clone(), state["mean"].clone()
        return table


def summed_over_processes(probs: Tensor, target: Tensor, num_classes: int, strategy: Strategy) -> tuple[Tensor, Tensor]:
    """Class sums and counts over the samples of all processes, in one reduction.

    Args:
        probs: Output distributions of this process, shape ``(n, C)``.
        target: Labels, shape ``(n,)``.
        num_classes: Classes ``C``.
        strategy: Whose processes.

    Returns:
        Sums ``(C, C)`` and counts ``(C,)``, float64 (float32 where the device has no float64).
    """
    dtype = torch.float32 if probs.device.type == "mps" else torch.float64
    counted = torch.cat([probs.to(dtype), torch.ones_like(probs[:, :1], dtype=dtype)], dim=1)
    table = strategy.reduce(class_sums(counted, target, num_classes), reduce_op="sum")
    assert isinstance(table, Tensor)
    return table[:, :num_classes], table[:, num_classes]
