"""Any classification data, split over devices and served in rounds."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from typing_extensions import override

from groundwire.callbacks.training_data import refuse_hooks, training_tensors
from groundwire.datamodules.base import ResumableDataModule, ResumableLoader, Split
from groundwire.datamodules.buffers import Buffers
from groundwire.datamodules.partition import Partition, by_label, dirichlet, iid, shards
from groundwire.datamodules.plots import plot_partition
from groundwire.plugins.edge import DeviceBatch
from groundwire.plugins.random import root_seed, stream


class RoundLoader(ResumableLoader[DeviceBatch]):
    """Rounds of :class:`DeviceBatch`; the batch of a round depends on the seed, the round and the device alone.

    Without ``batch_size`` every device brings all its samples to every round. With it, a device walks through its own
    samples in an order that is drawn anew for each pass; a pass has ``count // batch_size`` rounds, and what is left
    over is not used in it. A device with fewer samples than ``batch_size`` repeats them within the batch.

    Args:
        split: Inputs and labels, device after device.
        counts: Samples of each device, shape ``(N,)``.
        num_rounds: Rounds an epoch.
        batch_size: Samples a device and round; None for all.
        devices_per_round: Devices that have data in a round, drawn uniformly; None for all.
        seed: Root seed.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        split: Split,
        counts: Tensor,
        *,
        num_rounds: int,
        batch_size: int | None = None,
        devices_per_round: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if bool((counts < 1).any()) or int(counts.sum()) != len(split[0]):
            raise ValueError(f"`counts` must be at least 1 and sum to {len(split[0])} samples, got {counts.tolist()}.")
        _check_rounds(len(counts), num_rounds=num_rounds, batch_size=batch_size, devices_per_round=devices_per_round)
        self.split = split
        self.counts = counts
        self.num_rounds = num_rounds
        self.batch_size = batch_size
        self.devices_per_round = devices_per_round
        self.seed = seed
        self._memory = Buffers()
        self._offsets = counts.cumsum(0) - counts
        self._pass = torch.full_like(counts, -1)  # whose order is in memory
        self._order = torch.zeros(len(counts), int(counts.max()) if batch_size else 0, dtype=torch.int64)

    @override
    def __len__(self) -> int:
        return self.num_rounds

    @override
    def batch(self, epoch: int, index: int) -> DeviceBatch:
        round_index = epoch * self.num_rounds + index
        devices = self._devices(round_index)
        if self.batch_size is None:
            return self._everything(devices)
        rows = self._rows(devices, round_index, self.batch_size)
        return self._gather(devices, rows, None)

    def _devices(self, round_index: int) -> Tensor:
        everyone = torch.arange(len(self.counts))
        if self.devices_per_round is None or self.devices_per_round == len(everyone):
            return everyone
        generator = stream(self.seed, purpose="data/availability", round=round_index)
        return torch.randperm(len(everyone), generator=generator)[: self.devices_per_round].sort().values

    def _everything(self, devices: Tensor) -> DeviceBatch:
        counts = self.counts[devices]
        longest = int(counts.max())
        if len(devices) == len(self.counts) and bool((counts == longest).all()):  # all of the data, as it lies there
            data = tuple(part.view(len(devices), longest, *part.shape[1:]) for part in self.split)
            return DeviceBatch(data=data, device_ids=devices, num_samples=counts)
        rows = self._offsets[devices, None] + torch.arange(longest).minimum(counts[:, None] - 1)
        return self._gather(devices, rows, None if bool((counts == longest).all()) else counts)

    def _rows(self, devices: Tensor, round_index: int, batch_size: int) -> Tensor:
        counts = self.counts[devices]
        rounds_a_pass = (counts // batch_size).clamp_min(1)
        passes = round_index // rounds_a_pass
        for row in (self._pass[devices] != passes).nonzero().flatten().tolist():  # devices that begin a pass
            m, number = int(devices[row]), int(passes[row])
            generator = stream(self.seed, purpose="data/order", device_id=m, round=number)
            self._order[m, : int(counts[row])] = torch.randperm(int(counts[row]), generator=generator)
            self._pass[m] = number
        position = (round_index % rounds_a_pass * batch_size)[:, None] + torch.arange(batch_size)
        local = self._order[devices].gather(1, position % counts[:, None])
        return self._offsets[devices, None] + local

    def _gather(self, devices: Tensor, rows: Tensor, lengths: Tensor | None) -> DeviceBatch:
        data = tuple(self._memory.gather(part, rows) for part in self.split)
        return DeviceBatch(data=data, device_ids=devices, num_samples=self.counts[devices], lengths=lengths)


class Federated(ResumableDataModule):
    """Splits the training data of any classification datamodule over devices, for ``EdgeStrategy``.

    Validation, test and prediction data pass through. The training data is copied once, device after device, so that a
    round is one indexing operation, or none if every device brings all of equally many samples.

    Of an ordinary datamodule, each sample is read once, when training is set up: a random transform in its dataset is
    drawn once and not anew every epoch. Put such a transform into the LightningModule.

    Args:
        datamodule: Where the data comes from: one of this package, or any whose training set gives ``(x, y)`` pairs.
        num_devices: Devices ``N``; the same as ``EdgeStrategy``'s.
        partition: ``"iid"``, ``"dirichlet"``, ``"shards"`` or ``"by_label"``: see the functions of these names.
        samples_per_device: Samples of each device (not with ``"dirichlet"``); by default all samples are used.
        alpha: Concentration of ``"dirichlet"``.
        min_samples: The fewest samples of a device with ``"dirichlet"``.
        shards_per_device: For ``"shards"``.
        classes_per_device: For ``"by_label"``.
        quantity_skew: Spread of the devices' sizes, for ``"iid"``.
        batch_size: Samples a device and round; None for all that it has.
        devices_per_round: Devices that have data in a round; None for all.
        rounds_per_epoch: Rounds that Lightning counts as an epoch; by default as many as one pass over a device of
            mean size takes.
        seed: Root seed of the partition and the order; by default that of ``seed_everything``, else 0.

    Raises:
        ValueError: If an argument is out of range.
        PartitionError: At setup, if the samples cannot be split that way.

    Example:
        >>> from groundwire.datamodules import Digits
        >>> data = Federated(Digits(), num_devices=10, partition="by_label", samples_per_device=100, seed=0)
        >>> data.setup("fit")
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch.data[0].shape, len(batch.data[1].unique(dim=None)) <= 10
        (torch.Size([10, 100, 1, 8, 8]), True)
    """

    def __init__(
        self,
        datamodule: pl.LightningDataModule,
        num_devices: int,
        partition: Literal["iid", "dirichlet", "shards", "by_label"] = "iid",
        samples_per_device: int | None = None,
        alpha: float = 0.5,
        min_samples: int = 1,
        shards_per_device: int = 2,
        classes_per_device: int = 2,
        quantity_skew: float | None = None,
        batch_size: int | None = None,
        devices_per_round: int | None = None,
        rounds_per_epoch: int | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        _check_rounds(
            num_devices, batch_size=batch_size, devices_per_round=devices_per_round, rounds_per_epoch=rounds_per_epoch
        )
        if partition not in ("iid", "dirichlet", "shards", "by_label"):
            raise ValueError(f"`partition` must be 'iid', 'dirichlet', 'shards' or 'by_label', got {partition!r}.")
        if samples_per_device is not None and partition == "dirichlet":
            raise ValueError("`samples_per_device` cannot go with partition='dirichlet', which decides the sizes.")
        if quantity_skew is not None and partition != "iid":
            raise ValueError(f"`quantity_skew` is for partition='iid', got partition={partition!r}.")
        self.datamodule = datamodule
        self.num_devices = num_devices
        self.kind = partition
        self.samples_per_device = samples_per_device
        self.alpha = alpha
        self.min_samples = min_samples
        self.shards_per_device = shards_per_device
        self.classes_per_device = classes_per_device
        self.quantity_skew = quantity_skew
        self.batch_size = batch_size
        self.devices_per_round = devices_per_round
        self.rounds_per_epoch = rounds_per_epoch
        self.seed = seed
        self._root_seed = 0
        self._partition: Partition | None = None
        self._split: Split

    # ---------------------------------------------------------------- set-up

    @override
    def prepare_data(self) -> None:
        self.datamodule.trainer = self.trainer
        self.datamodule.prepare_data()

    @override
    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        self.datamodule.trainer = self.trainer
        self.datamodule.setup(stage or "fit")
        if stage in (None, "fit") and self._partition is None:
            refuse_hooks(self.datamodule, type(self).__name__)
            self._root_seed = root_seed(self.seed)
            self._deal()

    def _deal(self) -> None:
        x, y = training_tensors(self.datamodule, "Federated")
        if y.is_floating_point() or y.ndim != 1:
            raise MisconfigurationException("Federated needs integer labels of shape (n,) to split the data by.")
        y = y.long()
        self._partition = self._make_partition(y)
        self._split = (x[self._partition.indices], y[self._partition.indices])

    def _make_partition(self, labels: Tensor) -> Partition:
        n, seed, size = self.num_devices, self._root_seed, self.samples_per_device
        if self.kind == "iid":
            return iid(labels, n, samples_per_device=size, quantity_skew=self.quantity_skew, seed=seed)
        if self.kind == "dirichlet":
            return dirichlet(labels, n, alpha=self.alpha, min_samples=self.min_samples, seed=seed)
        if self.kind == "shards":
            return shards(labels, n, shards_per_device=self.shards_per_device, samples_per_device=size, seed=seed)
        return by_label(labels, n, classes_per_device=self.classes_per_device, samples_per_device=size, seed=seed)

    # ---------------------------------------------------------------- loaders

    @override
    def make_train_loader(self) -> RoundLoader:
        counts = self.partition.counts
        rounds = self.rounds_per_epoch
        if rounds is None:
            rounds = 1 if self.batch_size is None else max(1, int(counts.double().mean()) // self.batch_size)
        return RoundLoader(
            self._split,
            counts,
            num_rounds=rounds,
            batch_size=self.batch_size,
            devices_per_round=self.devices_per_round,
            seed=self._root_seed,
        )

    @override
    def val_dataloader(self) -> Any:
        return self.datamodule.val_dataloader() if is_overridden("val_dataloader", self.datamodule) else []

    @override
    def test_dataloader(self) -> Any:
        return self.datamodule.test_dataloader()

    @override
    def predict_dataloader(self) -> Any:
        return self.datamodule.predict_dataloader()

    @override
    def teardown(self, stage: str | None = None) -> None:
        self.datamodule.teardown(stage or "fit")

    # ---------------------------------------------------------------- resume

    def _settings(self) -> dict[str, Any]:
        names = (
            "num_devices kind samples_per_device alpha min_samples shards_per_device classes_per_device quantity_skew"
        )
        names += " batch_size devices_per_round rounds_per_epoch"
        return {name: getattr(self, name) for name in names.split()}

    @override
    def state_dict(self) -> dict[str, Any]:
        own = {"seed": self._root_seed, "settings": self._settings(), "datamodule": self.datamodule.state_dict()}
        return super().state_dict() | own

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        here, there = self._settings(), state_dict["settings"]
        if self.seed is not None:
            here, there = here | {"seed": self.seed}, there | {"seed": state_dict["seed"]}
        differing = [name for name in here if here[name] != there.get(name)]
        if differing:
            raise MisconfigurationException(
                "The checkpoint was written with other federated data: "
                + "; ".join(f"{n} was {there.get(n)!r} and is now {here[n]!r}" for n in differing)
                + ". Resume with the same settings, or start a new run from the weights alone."
            )
        self.datamodule.load_state_dict(state_dict["datamodule"])
        self._root_seed = state_dict["seed"]
        if self._partition is not None:  # made by `setup`, perhaps from another seed
            self._deal()

    # ---------------------------------------------------------------- report

    @property
    def partition(self) -> Partition:
        """Which device holds which training samples.

        Raises:
            RuntimeError: Before :meth:`setup`.
        """
        if self._partition is None:
            raise RuntimeError("The partition is made by setup('fit').")
        return self._partition

    def class_histogram(self) -> Tensor:
        """Training samples of each class on each device, shape ``(N, C)``."""
        labels = self._split[1]
        lying = Partition(indices=torch.arange(len(labels)), counts=self.partition.counts)
        return lying.class_histogram(labels, int(labels.max()) + 1)

    def partition_report(self) -> list[dict[str, float]]:
        """One row a device: samples, classes present, total variation distance to the mean, effective classes.

        The total variation distance is between the device's distribution of labels and that of all devices together;
        effective classes are ``exp`` of the entropy of the device's labels.
        """
        histogram = self.class_histogram().double()
        share = histogram / histogram.sum(1, keepdim=True)
        overall = histogram.sum(0) / histogram.sum()
        distance = 0.5 * (share - overall).abs().sum(1)
        effective = torch.special.entr(share).sum(1).exp()
        return [
            {
                "device": m,
                "samples": int(histogram[m].sum()),
                "classes": int((histogram[m] > 0).sum()),
                "tv_distance": float(distance[m]),
                "effective_classes": float(effective[m]),
            }
            for m in range(len(histogram))
        ]

    def plot_partition(self) -> tuple[Figure, Axes]:
        """Stacked bars of samples by class, one bar a device."""
        return plot_partition(self.class_histogram())


def _check_rounds(num_devices: int, *, devices_per_round: int | None, **others: int | None) -> None:
    for name, value in {"num_devices": num_devices, "devices_per_round": devices_per_round, **others}.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if devices_per_round is not None and devices_per_round > num_devices:
        raise ValueError(f"`devices_per_round` is {devices_per_round}, but there are {num_devices} devices.")
