"""Influences of training samples on test samples: the result, and what is written and logged of it."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from groundwire.callbacks.logits import LogitsSource
from groundwire.callbacks.reporting.pictures import log_picture
from groundwire.callbacks.unlearning.influence.plots import plot_influential_samples
from groundwire.callbacks.unlearning.influence.samples import Samples, samples_to_explain, training_samples

_SHOWN_TESTS, _SHOWN = 4, 5  # test samples in the picture, and training samples of each kind beside one


@dataclass(frozen=True, kw_only=True, eq=False)
class InfluenceResult:
    """Influences of all training samples on some test samples.

    Args:
        scores: Shape ``(T, n)``; positive where the training sample helps.
        self_influence: Of each training sample on itself, shape ``(n,)``.
        settings: How they were computed: plain values by name.
        train_ids: Rows of the training samples in the data that they were taken from, shape ``(n,)``, int64; None for
            ``0, 1, 2, ...``.
    """

    scores: Tensor
    self_influence: Tensor
    settings: dict[str, Any]
    train_ids: Tensor | None = None

    def ranking(self) -> Tensor:
        """Columns of ``scores`` for each test sample, the most helpful first and the most harmful last, ``(T, n)``."""
        return self.scores.sort(dim=1, descending=True, stable=True).indices

    def write(self, folder: Path) -> None:
        """Write ``influence.csv``, ``self_influence.csv`` and ``influence.json``; training samples go by their rows.

        Args:
            folder: Where to; it is made.
        """
        folder.mkdir(parents=True, exist_ok=True)
        ids = torch.arange(self.scores.shape[1]) if self.train_ids is None else self.train_ids
        with (folder / "influence.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["test_index", "rank", "train_index", "score"])
            for test, order in enumerate(self.ranking()):
                of_test = zip(ids[order].tolist(), self.scores[test, order].tolist(), strict=True)
                writer.writerows((test, rank, index, f"{score:.9g}") for rank, (index, score) in enumerate(of_test))
        with (folder / "self_influence.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["rank", "train_index", "self_influence"])
            values, order = self.self_influence.sort(descending=True, stable=True)
            of_all = zip(ids[order].tolist(), values.tolist(), strict=True)
            writer.writerows((rank, index, f"{value:.9g}") for rank, (index, value) in enumerate(of_all))
        (folder / "influence.json").write_text(json.dumps(self.settings, indent=1) + "\n")


class InfluenceReporter:
    """What callbacks of influence share: which samples they look at, and what becomes of the result.

    Args:
        num_test: Test samples to explain, the first.
        train_data: Training samples to take instead of the Trainer's.
        test_data: Test samples to take instead of the Trainer's.
        source: Where inputs and labels of a batch are found.
        batch_size: Samples read together.
        pictures: Whether to draw.
        class_names: Names of the classes in the pictures.
        dirpath: Folder of the report.
        name: Of the report, and of its folder where ``dirpath`` is None.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        *,
        num_test: int,
        train_data: Any,
        test_data: Any,
        source: LogitsSource | None,
        batch_size: int,
        pictures: bool,
        class_names: list[str] | None,
        dirpath: str | Path | None,
        name: str,
    ) -> None:
        for argument, value in (("num_test", num_test), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"`{argument}` must be at least 1, got {value}.")
        self.num_test = num_test
        self.train_data = train_data
        self.test_data = test_data
        self.source = source or LogitsSource()
        self.batch_size = batch_size
        self.pictures = pictures
        self.class_names = class_names
        self.dirpath = dirpath
        self.name = name
        self.folder = Path()
        self.split = ""

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule, names: list[str]) -> None:
        """Refuse what does not fit, before training.

        Args:
            trainer: The Trainer.
            pl_module: The module.
            names: Of all reports of the Trainer.

        Raises:
            MisconfigurationException: If two reports have one name, or parameters are spread over processes.
        """
        if names.count(self.name) > 1:
            raise MisconfigurationException(
                f"Two reports of influence are named {self.name!r}, and one would overwrite the other: give each a `name`."
            )
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
            raise MisconfigurationException(
                f"The first process computes influences alone, but {type(trainer.strategy).__name__} gives it a part of "
                "the parameters: save a checkpoint, and use InfluenceScorer on the loaded module in one process."
            )
        self.folder = self._folder(trainer)

    def _folder(self, trainer: pl.Trainer) -> Path:
        if self.dirpath is not None:
            return Path(self.dirpath)
        return Path(trainer.log_dir or trainer.default_root_dir) / self.name  # asks all processes

    def samples(self, trainer: pl.Trainer) -> tuple[Samples, Samples]:
        """Training samples, and the test samples to explain.

        Args:
            trainer: Has set up its data.

        Returns:
            The pair.

        Raises:
            MisconfigurationException: If they cannot be had in order, or there are none.
        """
        train = training_samples(trainer, self.train_data)
        test, self.split = samples_to_explain(trainer, self.test_data)
        if not train.number or not test.number:
            raise MisconfigurationException(
                f"There are {train.number} training and {test.number} test samples: influence needs some of both."
            )
        if test.number < self.num_test:
            rank_zero_warn(f"There are {test.number} test samples, fewer than num_test={self.num_test}: all are taken.")
        return train, Samples(number=min(test.number, self.num_test), read=test.read)

    def publish(self, trainer: pl.Trainer, result: InfluenceResult, train: Samples, test: Samples) -> None:
        """Write the result, draw it, and hand it to the loggers.

        Args:
            trainer: The Trainer.
            result: Influences.
            train: The training samples that they are about.
            test: The test samples.
        """
        result.write(self.folder)
        rank_zero_info(f"Influence: {self.folder / 'influence.csv'}")
        order = result.ranking()
        shown = min(_SHOWN, train.number // 2)
        helpful, harmful = order[:, :shown], order[:, order.shape[1] - shown :].flip(1)
        metrics = {f"{self.name}/{what}_same_label": share for what, share in self._same(helpful, harmful, train, test)}
        for logger in trainer.loggers:
            if metrics:
                logger.log_metrics(metrics, step=trainer.global_step)
        if self.pictures and shown:
            self._draw(trainer, result, torch.cat([helpful, harmful], dim=1), train, test)

    def _same(self, helpful: Tensor, harmful: Tensor, train: Samples, test: Samples) -> list[tuple[str, float]]:
        """Share of the shown training samples that have the test sample's label, where labels are classes."""
        of_test = self.source.inputs_and_labels(test.read(range(test.number)))[1].cpu()
        if of_test.is_floating_point() or of_test.ndim != 1 or not helpful.numel():
            return []
        found = []
        for what, rows in (("helpful", helpful), ("harmful", harmful)):
            labels = self.source.inputs_and_labels(train.read(rows.flatten().tolist()))[1].cpu().view(rows.shape)
            found.append((what, float((labels == of_test[:, None]).double().mean())))
        return found

    def _draw(
        self, trainer: pl.Trainer, result: InfluenceResult, chosen: Tensor, train: Samples, test: Samples
    ) -> None:
        number = min(_SHOWN_TESTS, test.number)
        x, y = self.source.inputs_and_labels(test.read(range(number)))
        chosen = chosen[:number]
        near_x, near_y = self.source.inputs_and_labels(train.read(chosen.flatten().tolist()))
        if not (isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] in (1, 3) and x.is_floating_point()):
            return
        ids = chosen if train.ids is None else train.ids[chosen]
        images = torch.cat([x[:, None], near_x.view(*chosen.shape, *x.shape[1:])], dim=1)
        near_y = near_y.view(*chosen.shape, *y.shape[1:])
        titles = [
            [f"test {t}: {self._label(y[t])}"]
            + [f"{int(i)}: {self._label(label)}" for i, label in zip(ids[t], near_y[t], strict=True)]
            for t in range(number)
        ]
        figure, _ = plot_influential_samples(images, titles, num_helpful=chosen.shape[1] // 2)
        file = self.folder / "influence.png"
        figure.savefig(file, dpi=130)
        for logger in trainer.loggers:
            log_picture(logger, f"{self.name}/samples", file, figure, trainer.global_step)

    def _label(self, label: Tensor) -> str:
        if label.numel() != 1:
            return ""
        if label.is_floating_point():
            return f"{float(label):.3g}"
        return str(int(label)) if self.class_names is None else self.class_names[int(label)]
