"""The batch of one round: every leaf holds one block of samples per device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor


@dataclass(eq=False, kw_only=True)  # not frozen: precision plugins convert its tensors in place of themselves
class DeviceBatch:
    """One round's data of ``M`` devices.

    Args:
        data: Any nesting of tuples, lists and dicts whose tensors all have shape ``(M, B, ...)``; row ``m`` is the
            batch that device ``device_ids[m]`` hands to ``training_step``.
        device_ids: Which device each row belongs to, shape ``(M,)``, int64, on the CPU.
        num_samples: Samples that each device holds (not: uses this round), shape ``(M,)``; the aggregation weights.
        lengths: If given, row ``m`` has only ``lengths[m] <= B`` real samples, the rest is padding, shape ``(M,)``.

    Raises:
        ValueError: If the leaves do not share their first two dimensions, or ids, counts or lengths are impossible.

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
        ids = self.device_ids.tolist()
        if min(ids) < 0 or len(set(ids)) < len(ids):
            raise ValueError(f"`device_ids` must be distinct and >= 0, got {ids}.")
        if int(self.num_samples.min()) < 1:
            raise ValueError(f"`num_samples` must be at least 1 a device, got {self.num_samples.tolist()}.")
        if self.lengths is not None and not 1 <= int(self.lengths.min()) <= int(self.lengths.max()) <= self.batch_size:
            raise ValueError(f"`lengths` must be in [1, {self.batch_size}], got {self.lengths.tolist()}.")

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
            ValueError: If a leaf has no sample dimension, the samples cannot be split evenly, or there is a list with
                one entry a sample that is not a tensor.
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
        _refuse_unsplittable(batch, samples)
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


def _refuse_unsplittable(collection: Any, samples: int) -> None:
    """A list of strings, as loaders make of them, would go whole to every device."""
    if isinstance(collection, Tensor | str | bytes):
        return
    if isinstance(collection, dict):
        collection = list(collection.values())
    elif isinstance(collection, list | tuple) and len(collection) == samples:
        kinds = {type(item).__name__ for item in collection if not isinstance(item, Tensor | list | tuple | dict)}
        if kinds:
            raise ValueError(
                f"The batch holds a {type(collection).__name__} of {samples} {' or '.join(sorted(kinds))}, one a sample, "
                "which cannot be split over devices. Leave it out of the batch, or make a tensor of it."
            )
    if isinstance(collection, list | tuple):
        for item in collection:
            _refuse_unsplittable(item, samples)
