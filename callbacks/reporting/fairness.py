"""How evenly a federated model serves its devices."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_only
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor
from typing_extensions import override

from groundwire.callbacks.logits import LogitsSource, logits_in
from groundwire.callbacks.reporting.pictures import log_picture
from groundwire.callbacks.reporting.plots import figure_and_axes
from groundwire.callbacks.step import Step, StepCallback
from groundwire.callbacks.training_data import training_samples

_CHUNK = 1000  # samples of a device that are classified at once


def fairness_summary(accuracies: Tensor, share: float = 0.1) -> dict[str, float]:
    """How evenly a measure is spread over devices.

    Args:
        accuracies: One a device, in [0, 1], shape ``(N,)``.
        share: Of the devices that are the worst and the best, in (0, 1]; at least one device.

    Returns:
        ``acc_mean``; ``acc_std``, the standard deviation over these devices (divided by ``N``); ``acc_worst`` and
        ``acc_best``, means of the worst and the best; ``jain``, Jain's index ``(sum a)^2 / (N sum a^2)``, which is 1 where
        all are alike and ``1 / N`` where one has everything.

    Raises:
        ValueError: If there is no device, or an argument is out of range.

    Reference:
        Jain, Chiu, Hawe, "A Quantitative Measure of Fairness and Discrimination for Resource Allocation in Shared Computer
        Systems", DEC Research Report TR-301, 1984.

    Example:
        >>> {name: round(v, 3) for name, v in fairness_summary(torch.tensor([0.5, 0.5, 1.0, 0.0])).items()}
        {'acc_mean': 0.5, 'acc_std': 0.354, 'acc_worst': 0.0, 'acc_best': 1.0, 'jain': 0.667}
    """
    if accuracies.ndim != 1 or len(accuracies) == 0 or not bool(torch.isfinite(accuracies).all()):
        raise ValueError(f"Expected finite accuracies of N >= 1 devices, got {accuracies.tolist()}.")
    _check_share(share)
    a, _ = accuracies.double().sort()
    count = math.ceil(share * len(a) - 1e-9)
    squares = float(a.square().mean())
    return {
        "acc_mean": float(a.mean()),
        "acc_std": float(a.std(correction=0)),
        "acc_worst": float(a[:count].mean()),
        "acc_best": float(a[-count:].mean()),
        "jain": float(a.mean().square()) / squares if squares > 0 else 1.0,
    }


def plot_fairness(accuracies: Mapping[str, npt.ArrayLike], *, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Accuracy of every device, from the worst to the best; per label a line, its mean and spread in the legend.

    Args:
        accuracies: Per label one accuracy a device, in [0, 1].
        ax: Axes to draw into; a new figure where None.

    Returns:
        The figure and its axes.

    Raises:
        ValueError: If there is nothing to plot.
    """
    if not accuracies or not all(np.size(values) for values in accuracies.values()):
        raise ValueError(f"There is nothing to plot: {dict(accuracies)}.")
    fig, ax = figure_and_axes(ax)
    for label, values in accuracies.items():
        a = np.sort(np.asarray(values, dtype=np.float64))
        share = (np.arange(len(a)) + 0.5) / len(a)
        ax.plot(share, a, marker=".", label=f"{label}: {100 * a.mean():.1f} ± {100 * a.std():.1f}")
    ax.set_xlabel("Devices, from the worst to the best (%)")
    ax.set_ylabel("Accuracy on the device's data (%)")
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    ax.grid(alpha=0.3)
    ax.legend(title="mean ± std over devices", title_fontsize="small")
    return fig, ax


class FairnessReport(StepCallback):
    """Measures the accuracy of the global model on the data of each device, and how evenly it is spread.

    After every validation, and in ``test``, it logs ``fairness/acc_mean``, ``fairness/acc_std`` (over devices),
    ``fairness/acc_worst`` and ``fairness/acc_best`` (means of the worst and the best tenth of the devices) and
    ``fairness/jain``. At the end of the fit and of the test, ``fairness.csv`` (one row a device) and a picture go to
    ``<dirpath>``, and the picture to every logger that takes images.

    The devices are those of the Trainer's datamodule, :class:`groundwire.datamodules.Federated` or one with a ``partition``
    like its.

    Args:
        data: ``"held_out"``: what validation or test bring, in the device's own proportions of classes, so that its accuracy
            is the mean of those of its classes; nothing is computed twice. ``"own"``: the device's training samples.
        share: Share of the devices that are the worst and the best.
        pictures: Whether to draw.
        dirpath: Folder of the table and the picture; ``<default_root_dir>/fairness`` where None.
        source: Where logits and labels are found.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At setup, if the data is not split over devices.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[FairnessReport()], logger=False, enable_checkpointing=False)

    Reference:
        Li, Sanjabi, Beirami, Smith, "Fair Resource Allocation in Federated Learning", ICLR 2020. arXiv:1905.10497
    """

    def __init__(
        self,
        data: Literal["held_out", "own"] = "held_out",
        share: float = 0.1,
        pictures: bool = True,
        dirpath: str | Path | None = None,
        source: LogitsSource | None = None,
    ) -> None:
        if data not in ("held_out", "own"):
            raise ValueError(f"`data` must be 'held_out' or 'own', got {data!r}.")
        _check_share(share)
        self.data = data
        self.share = share
        self.pictures = pictures
        self.dirpath = dirpath
        self.source = source or LogitsSource()
        self.accuracies: Tensor | None = None
        self._partition: Any = None
        self._samples: Any = None
        self._histogram = torch.zeros(0)
        self._counts = torch.zeros(2, 0)
        self._trainer: pl.Trainer | None = None
        self._pl_module: pl.LightningModule | None = None

    # ---------------------------------------------------------------- set-up

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._trainer, self._pl_module = trainer, pl_module
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(type(datamodule), "partition"):
            raise MisconfigurationException(
                f"FairnessReport needs training data that is split over devices, got {type(datamodule).__name__}: put it into "
                "`groundwire.datamodules.Federated`."
            )
        try:
            self._partition = datamodule.partition
        except RuntimeError:  # a test without a fit before it: the data has not been dealt out
            datamodule.setup("fit")
            self._partition = datamodule.partition
        self._samples = training_samples(datamodule, type(self).__name__)
        labels = self._samples.labels
        if labels is None:
            labels = self._samples.fetch_all()[1]
        labels = labels[self._partition.indices].long()
        devices = torch.arange(len(self._partition.counts)).repeat_interleave(self._partition.counts)
        self._histogram = torch.zeros(len(self._partition.counts), int(labels.max()) + 1, dtype=torch.float64)
        self._histogram.index_put_((devices, labels), torch.ones(()).double(), accumulate=True)
        self._start()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._forget()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._forget()

    def _forget(self) -> None:
        self._trainer = self._pl_module = self._partition = self._samples = None

    # ---------------------------------------------------------------- held-out data, by class

    @override
    def around_evaluation(self, step: Step, batch: Any) -> Any:
        assert self._trainer is not None
        assert self._pl_module is not None
        if self._trainer.sanity_checking or self.data == "own":
            return step(batch)
        with self.source.open(self._pl_module) as calls:
            output = step(batch)
        if output is None and not calls:
            return output
        _, labels = self.source.inputs_and_labels(batch)
        logits, target = self.source.prepare(self.source.logits(calls).detach(), labels)
        self._count(logits, target)
        return output

    def _count(self, logits: Tensor, target: Tensor) -> None:
        """Add to the number of samples of each class, and of those that are classified as they should be."""
        right = (logits.argmax(1) == target).double().cpu()
        both = torch.stack([torch.ones_like(right), right])
        missing = max(logits.shape[1], self._histogram.shape[1]) - self._counts.shape[1]
        self._counts = torch.nn.functional.pad(self._counts, (0, max(missing, 0)))
        self._counts.index_add_(1, target.cpu(), both)

    def _by_class(self, trainer: pl.Trainer) -> Tensor:
        """Accuracy of each device's proportions of classes; NaN where none of its classes came."""
        assert self._pl_module is not None
        counts = self._counts.to(self._pl_module.device)
        reduced = trainer.strategy.reduce(counts, reduce_op="sum")
        total, right = (reduced if isinstance(reduced, Tensor) else counts).cpu()
        classes = self._histogram.shape[1]
        seen = (total > 0)[:classes]
        share = self._histogram * seen
        by_class = (right / total.clamp_min(1))[:classes]
        found: Tensor = torch.mv(share, by_class) / share.sum(1)
        return found

    # ---------------------------------------------------------------- the devices' own data

    def _on_own(self, pl_module: pl.LightningModule) -> Tensor:
        found = []
        for rows in self._partition.indices.split(self._partition.counts.tolist()):
            right = sum(self._right(pl_module, some) for some in rows.split(_CHUNK))
            found.append(right / len(rows))
        return torch.tensor(found, dtype=torch.float64)

    def _right(self, pl_module: pl.LightningModule, rows: Tensor) -> int:
        x, y = (part.to(pl_module.device) for part in self._samples.fetch(rows))
        with self.source.open(pl_module) as calls:
            output = pl_module(x)
        logits = self.source.logits(calls) if self.source.submodule else logits_in(output)
        if logits is None:
            raise MisconfigurationException(
                f"{type(pl_module).__name__}.forward gives no tensor and nothing with `logits`. Name the submodule that gives "
                "the logits, e.g. LogitsSource('model.head')."
            )
        logits, target = self.source.prepare(logits.detach(), y)
        return int((logits.argmax(1) == target).sum())

    # ---------------------------------------------------------------- what comes of it

    def _start(self) -> None:
        self._counts = torch.zeros(2, self._histogram.shape[1], dtype=torch.float64)

    @override
    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start()

    @override
    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start()

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._measure(trainer, pl_module)

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._measure(trainer, pl_module)
        self._write(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer)

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        accuracies = self._on_own(pl_module) if self.data == "own" else self._by_class(trainer)
        self.accuracies = accuracies
        known = accuracies[torch.isfinite(accuracies)]
        if not len(known):
            raise MisconfigurationException(
                "FairnessReport saw no held-out sample of any device's classes: is the loader empty? With data='own' it needs "
                "none."
            )
        summary = fairness_summary(known, self.share)
        exact = {f"fairness/{name}": torch.tensor(value, dtype=torch.float64) for name, value in summary.items()}
        pl_module.log_dict({name: value.to(pl_module.device) for name, value in exact.items()}, sync_dist=True)

    @rank_zero_only
    def _write(self, trainer: pl.Trainer) -> None:
        if self.accuracies is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = Path(self.dirpath) if self.dirpath is not None else Path(trainer.default_root_dir) / "fairness"
        folder.mkdir(parents=True, exist_ok=True)
        accuracies, counts = self.accuracies.tolist(), self._partition.counts.tolist()
        with (folder / "fairness.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["device", "samples", "acc"])
            writer.writerows((m, n, repr(a)) for m, (n, a) in enumerate(zip(counts, accuracies, strict=True)))
        if not self.pictures:
            return
        figure, _ = plot_fairness({"run": [a for a in accuracies if math.isfinite(a)]})
        file_of_picture = folder / "fairness.png"
        figure.savefig(file_of_picture, dpi=130)
        for logger in trainer.loggers:
            log_picture(logger, "fairness/devices", file_of_picture, figure, trainer.global_step)


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"`share` of the devices that are the worst and the best must be in (0, 1], got {share}.")
