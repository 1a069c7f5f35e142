"""The batch of one round: every leaf holds one block of samples per device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class DeviceBatch:
    """One round's data of ``M`` devices.

    Args:
        data: Any nesting of tuples, lists and dicts whose tensors all have shape ``(M, B, ...)``; row ``m`` is the
            batch that device ``device_ids[m]`` hands to ``training_step``.
        device_ids: Which device each row belongs to, shape ``(M,)``, int64, on the CPU.
        num_samples: Samples that each device holds (not: uses this round), shape ``(M,)``; the aggregation weights.
        lengths: If given, row ``m`` has only ``lengths[m] <= B`` real samples, the rest is padding, shape ``(M,)``.

    Raises:
        ValueError: If the leaves do not share their first two dimensions or disagree with the ids.

    Example:
        >>> batch = DeviceBatch(data=(torch.zeros(2, 8, 3), torch.zeros(2, 8)), device_ids=torch.tensor([0, 5]),
        ...                     num_samples=torch.tensor([80, 20]))
        >>> len(batch), batch.batch_size, batch.select(torch.tensor([1])).device_ids
        (2, 8, tensor([5]))
    """

    data: Any
    device_ids: Tensor
    num_samples: Tensor
    lengths: Tensor | None = None

    def __post_init__(self) -> None:
        leaves = self.leaves()
        if not leaves or any(leaf.ndim < 2 for leaf in leaves):
            raise ValueError(f"Every leaf must have shape (M, B, ...), got {[tuple(leaf.shape) for leaf in leaves]}.")
        shapes = {tuple(leaf.shape[:2]) for leaf in leaves}
        if len(shapes) != 1:
            raise ValueError(f"All leaves must share (M, B), got {sorted(shapes)}.")
        for name in ("device_ids", "num_samples", "lengths"):
            value = getattr(self, name)
            if value is not None and value.shape != (leaves[0].shape[0],):
                raise ValueError(f"`{name}` must have shape ({leaves[0].shape[0]},), got {tuple(value.shape)}.")

    def leaves(self) -> list[Tensor]:
        """All tensors of ``data``."""
        found: list[Tensor] = []
        apply_to_collection(self.data, Tensor, found.append)
        return found

    def __len__(self) -> int:
        return self.leaves()[0].shape[0]

    @property
    def batch_size(self) -> int:
        """Samples a device, ``B``, padding included."""
        return self.leaves()[0].shape[1]

    def map(self, function: Callable[[Tensor], Tensor]) -> Any:
        """``data`` with ``function`` applied to every tensor."""
        return apply_to_collection(self.data, Tensor, function)

    def row(self, index: int) -> Any:
        """The batch of one device, padding removed: what ``training_step`` gets."""
        stop = None if self.lengths is None else int(self.lengths[index])
        return self.map(lambda leaf: leaf[index, :stop])

    def select(self, rows: Tensor) -> Self:
        """The batch of some devices only; ``rows`` indexes this batch's rows."""
        return type(self)(
            data=self.map(lambda leaf: leaf[rows.to(leaf.device)]),
            device_ids=self.device_ids[rows],
            num_samples=self.num_samples[rows],
            lengths=None if self.lengths is None else self.lengths[rows],
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Move ``data`` to ``device``; ids and counts stay on the CPU, where rounds are planned."""
        return type(self)(
            data=self.map(lambda leaf: leaf.to(device, non_blocking=non_blocking)),
            device_ids=self.device_ids,
            num_samples=self.num_samples,
            lengths=self.lengths,
        )

    @classmethod
    def split(cls, batch: Any, num_devices: int) -> Self:
        """Split an ordinary batch evenly over ``num_devices`` devices, in order.

        Args:
            batch: Any nesting of tensors with the samples as first dimension.
            num_devices: Devices ``M``; must divide the number of samples.

        Returns:
            A batch whose tensors are views of the given ones.

        Raises:
            ValueError: If a leaf has no sample dimension, or the samples cannot be split evenly.
        """
        leaves: list[Tensor] = []
        apply_to_collection(batch, Tensor, leaves.append)
        sizes = {leaf.shape[0] if leaf.ndim else 0 for leaf in leaves}
        if len(sizes) != 1 or 0 in sizes:
            raise ValueError(
                f"Cannot split a batch over devices whose tensors have {sorted(sizes)} samples: each needs the same "
                "number of samples in its first dimension."
            )
        samples = sizes.pop()
        if samples % num_devices:
            raise ValueError(
                f"A batch of {samples} samples cannot be split evenly over {num_devices} devices. Use a batch size "
                f"that {num_devices} divides, and `drop_last=True` in the train loader."
            )
        per_device = samples // num_devices
        return cls(
            data=apply_to_collection(batch, Tensor, lambda leaf: leaf.unflatten(0, (num_devices, per_device))),
            device_ids=torch.arange(num_devices),
            num_samples=torch.full((num_devices,), per_device),
        )
