"""Which device holds which samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from groundwire.plugins.random import stream


class PartitionError(ValueError):
    """The samples cannot be split over the devices as asked."""


@dataclass(frozen=True, eq=False)
class Partition:
    """Disjoint sets of samples, one a device.

    Args:
        indices: Samples of device 0, then those of device 1, and so on, shape ``(n,)``, int64.
        counts: Samples of each device, shape ``(N,)``, int64, each at least 1.
    """

    indices: Tensor
    counts: Tensor

    @classmethod
    def of(cls, groups: Sequence[Tensor]) -> Partition:
        """The partition whose device ``m`` holds ``groups[m]``.

        Args:
            groups: One tensor of sample indices a device.

        Returns:
            The partition.

        Raises:
            PartitionError: If a device would hold nothing.
        """
        counts = torch.tensor([len(group) for group in groups])
        if bool((counts == 0).any()):
            empty = int((counts == 0).nonzero()[0])
            raise PartitionError(f"Device {empty} of {len(groups)} would hold no sample: use fewer devices.")
        return cls(indices=torch.cat(list(groups)).long(), counts=counts)

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def offsets(self) -> Tensor:
        """Where each device's samples begin in :attr:`indices`, shape ``(N,)``."""
        return self.counts.cumsum(0) - self.counts

    def device(self, index: int) -> Tensor:
        """Samples of one device."""
        start = int(self.offsets[index])
        return self.indices[start : start + int(self.counts[index])]

    def class_histogram(self, labels: Tensor, num_classes: int) -> Tensor:
        """Samples of each class on each device, shape ``(N, num_classes)``, int64."""
        owner = torch.repeat_interleave(torch.arange(len(self)), self.counts)
        flat = owner * num_classes + labels[self.indices]
        return torch.bincount(flat, minlength=len(self) * num_classes).view(len(self), num_classes)


def iid(
    labels: Tensor,
    num_devices: int,
    *,
    samples_per_device: int | None = None,
    quantity_skew: float | None = None,
    seed: int = 0,
) -> Partition:
    """Samples at random.

    Args:
        labels: Labels of all samples, shape ``(n,)``.
        num_devices: Devices ``N``.
        samples_per_device: Samples each device gets; by default all are used, and sizes differ by at most one.
        quantity_skew: If given, sizes are proportional to ``LogNormal(0, quantity_skew)`` draws, each at least 1.
        seed: Root seed.

    Returns:
        The partition.

    Raises:
        PartitionError: If an argument is out of range.

    Example:
        >>> iid(torch.zeros(10, dtype=torch.long), 3).counts
        tensor([4, 3, 3])
    """
    n = _check(labels, num_devices, samples_per_device)
    order = torch.randperm(n, generator=stream(seed, purpose="partition"))
    if quantity_skew is None:
        total = n if samples_per_device is None else num_devices * samples_per_device
        return Partition.of(torch.tensor_split(order[:total], num_devices))
    if samples_per_device is not None or not 0 <= quantity_skew < math.inf:
        raise PartitionError(
            "`quantity_skew` must be >= 0 and finite and decides the sizes, so it cannot go with `samples_per_device`; "
            f"got {quantity_skew} and {samples_per_device}."
        )
    normal = torch.randn(num_devices, generator=stream(seed, purpose="partition/size"), dtype=torch.float64)
    share = (quantity_skew * normal).softmax(0)
    sizes = 1 + (share * (n - num_devices)).floor().long()
    sizes[: n - int(sizes.sum())] += 1  # what rounding left over, fewer than one a device
    return Partition.of(torch.split(order, sizes.tolist()))


def dirichlet(
    labels: Tensor, num_devices: int, *, alpha: float, min_samples: int = 1, max_tries: int = 20, seed: int = 0
) -> Partition:
    """Every class is split over the devices in proportions drawn from a symmetric Dirichlet distribution.

    Args:
        labels: Labels of all samples, shape ``(n,)``.
        num_devices: Devices ``N``.
        alpha: Concentration, > 0 and finite; large is IID, small gives each class to few devices.
        min_samples: Draw again until every device holds this many.
        max_tries: Draws before giving up.
        seed: Root seed.

    Returns:
        The partition; every sample is used.

    Raises:
        PartitionError: If an argument is out of range, or a device stays under ``min_samples``.

    Reference:
        Hsu, Qi, Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
        Classification", 2019. arXiv:1909.06335
    """
    _check(labels, num_devices, min_samples)
    if not alpha > 0:
        raise PartitionError(f"dirichlet alpha must be > 0; got {alpha}")
    if alpha == math.inf:
        raise PartitionError("dirichlet alpha must be finite; got inf: the limit is an IID partition.")
    classes = [
        c[torch.randperm(len(c), generator=stream(seed, purpose="partition", round=i))] for i, c in _by_class(labels)
    ]
    counts = torch.zeros(num_devices)
    for attempt in range(max_tries):
        rng = np.random.default_rng(stream(seed, purpose="partition/dirichlet", round=attempt).initial_seed())
        shares = torch.from_numpy(rng.dirichlet(np.full(num_devices, alpha), size=len(classes)))
        groups: list[list[Tensor]] = [[] for _ in range(num_devices)]
        for samples, share in zip(classes, shares, strict=True):
            cuts = (share.cumsum(0)[:-1] * len(samples)).round().long()
            for group, part in zip(groups, torch.tensor_split(samples, cuts), strict=True):
                group.append(part)
        counts = torch.tensor([sum(len(part) for part in group) for group in groups])
        if int(counts.min()) >= min_samples:
            return Partition.of([torch.cat(group) for group in groups])
    poorest = int(counts.argmin())
    raise PartitionError(
        f"device {poorest} got {int(counts[poorest])} samples (min_samples={min_samples}) after {max_tries} tries; "
        f"raise alpha (now {alpha}) or lower num_devices (now {num_devices})"
    )


def shards(
    labels: Tensor,
    num_devices: int,
    *,
    shards_per_device: int = 2,
    samples_per_device: int | None = None,
    seed: int = 0,
) -> Partition:
    """Sort by label, cut into equal shards, deal ``shards_per_device`` to each device at random.

    Args:
        labels: Labels of all samples, shape ``(n,)``.
        num_devices: Devices ``N``.
        shards_per_device: Shards a device, at least 1.
        samples_per_device: Samples each device gets, of a random subset; by default all are used.
        seed: Root seed.

    Returns:
        The partition.

    Raises:
        PartitionError: If an argument is out of range.

    Reference:
        McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017.
        arXiv:1602.05629
    """
    n = _check(labels, num_devices, samples_per_device)
    count = num_devices * shards_per_device
    if not shards_per_device >= 1 or count > n:
        raise PartitionError(f"{num_devices} devices with {shards_per_device} shards each cannot share {n} samples.")
    order = torch.randperm(n, generator=stream(seed, purpose="partition"))
    if samples_per_device is not None:
        order = order[: num_devices * samples_per_device]
    pieces = torch.tensor_split(order[labels[order].argsort(stable=True)], count)
    dealt = torch.randperm(count, generator=stream(seed, purpose="partition/deal")).view(num_devices, -1)
    return Partition.of([torch.cat([pieces[i] for i in hand]) for hand in dealt.tolist()])


def by_label(
    labels: Tensor,
    num_devices: int,
    *,
    classes_per_device: int = 2,
    samples_per_device: int | None = None,
    seed: int = 0,
) -> Partition:
    """Each device holds exactly ``classes_per_device`` classes: the non-IID setting of A-DSGD with two.

    With ``samples_per_device``, each device draws its classes uniformly among those that still have enough samples and
    takes equally many of each, without replacement over devices. Without, classes are dealt as evenly as possible, and
    each is split over its holders; every sample of a class that someone holds is used.

    Args:
        labels: Labels of all samples, shape ``(n,)``.
        num_devices: Devices ``N``.
        classes_per_device: Classes a device, at least 1.
        samples_per_device: Samples a device; ``classes_per_device`` must divide it.
        seed: Root seed.

    Returns:
        The partition.

    Raises:
        PartitionError: If an argument is out of range, or too few samples are left.

    Reference:
        Mohammadi Amiri, Gündüz, arXiv:1901.00844, Section VI.
    """
    _check(labels, num_devices, samples_per_device)
    pools = [
        c[torch.randperm(len(c), generator=stream(seed, purpose="partition", round=i))] for i, c in _by_class(labels)
    ]
    if not 1 <= classes_per_device <= len(pools):
        raise PartitionError(f"`classes_per_device` must be in [1, {len(pools)}], got {classes_per_device}.")
    draws = torch.rand(num_devices, len(pools), generator=stream(seed, purpose="partition/classes"))
    if samples_per_device is None:
        held: list[list[int]] = [[] for _ in pools]
        for device, draw in enumerate(draws.tolist()):
            fewest = sorted(range(len(pools)), key=lambda c: (len(held[c]), draw[c]))
            for c in fewest[:classes_per_device]:
                held[c].append(device)
        groups: list[list[Tensor]] = [[] for _ in range(num_devices)]
        for pool, holders in zip(pools, held, strict=True):
            for device, part in zip(holders, torch.tensor_split(pool, max(len(holders), 1)), strict=False):
                groups[device].append(part)
        return Partition.of([torch.cat(group) for group in groups])
    if samples_per_device % classes_per_device:
        raise PartitionError(
            f"samples_per_device={samples_per_device} cannot be taken evenly from {classes_per_device} classes."
        )
    each = samples_per_device // classes_per_device
    used = torch.zeros(len(pools), dtype=torch.int64)
    sizes = torch.tensor([len(pool) for pool in pools])
    chosen = []
    for device in range(num_devices):
        free = ((sizes - used) >= each).nonzero().flatten()
        if len(free) < classes_per_device:
            raise PartitionError(
                f"device {device} finds only {len(free)} classes with {each} samples left, but needs "
                f"{classes_per_device}: lower samples_per_device (now {samples_per_device}) or num_devices."
            )
        mine = free[draws[device, free].argsort()[:classes_per_device]].tolist()
        chosen.append(torch.cat([pools[c][int(used[c]) : int(used[c]) + each] for c in mine]))
        used[mine] += each
    return Partition.of(chosen)


def _check(labels: Tensor, num_devices: int, samples_per_device: int | None) -> int:
    n = len(labels)
    if labels.ndim != 1 or labels.dtype != torch.int64 or (n and int(labels.min()) < 0):
        raise PartitionError(f"Labels must be int64, >= 0 and of shape (n,), got {labels.dtype} {tuple(labels.shape)}.")
    if not 1 <= num_devices <= n:
        raise PartitionError(f"`num_devices` must be in [1, {n}] for {n} samples, got {num_devices}.")
    if samples_per_device is not None and not 1 <= samples_per_device <= n // num_devices:
        raise PartitionError(
            f"{num_devices} devices of {samples_per_device} samples each need {num_devices * samples_per_device}, but "
            f"there are {n}: a device can hold 1 to {n // num_devices}."
        )
    return n


def _by_class(labels: Tensor) -> list[tuple[int, Tensor]]:
    """The samples of each class that occurs, ascending."""
    counts = torch.bincount(labels)
    groups = torch.split(labels.argsort(stable=True), counts.tolist())
    return [(c, group) for c, group in enumerate(groups) if len(group)]
