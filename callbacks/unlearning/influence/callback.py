"""Influence of training samples as callbacks: with dropout as compression at the end of a fit, or by TracIn along it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer
from typing_extensions import override

from groundwire.callbacks.logits import LogitsSource
from groundwire.callbacks.unlearning.influence.compression import Dropout, GradientCompressor
from groundwire.callbacks.unlearning.influence.report import InfluenceReporter, InfluenceResult
from groundwire.callbacks.unlearning.influence.samples import Samples
from groundwire.callbacks.unlearning.influence.scorer import (
    InfluenceScorer,
    gradients_in_parts,
    num_coordinates,
    plain_records,
)
from groundwire.callbacks.unlearning.records import OutputLoss, Records
from groundwire.callbacks.weights import fingerprint
from groundwire.plugins.layout import ParameterLayout
from groundwire.plugins.random import root_seed

_SIGN = "positive: removing the training sample raises the test sample's loss"


class DropoutInfluence(pl.Callback):
    """At the end of a fit, ranks all training samples by their influence on some test samples.

    Influence functions on dropped-out gradients, see :class:`InfluenceScorer`. The training samples are read once, in the
    order of the data set: the datamodule's ``train_data``, where that is a pair of tensors, else the train loader's data
    set; of ``Federated``, device after device. Samples have to be the same whenever they are read: where the data set or a
    hook for batches draws an augmentation, give ``train_data``. Of ``ForgetRetain`` the retained samples are read, and named
    by their rows in its training data. Test samples are the first of the test data, or of the
    validation data where there is none.

    Writes to ``<run>/influence``: ``influence.csv`` (for each test sample all training samples, the most helpful first),
    ``self_influence.csv`` (large values: learned by heart, perhaps mislabelled), ``influence.json`` (settings) and, of
    images, ``influence.png``, which loggers get as well. Logs ``influence/helpful_same_label`` and
    ``influence/harmful_same_label``: the share of the five most helpful (harmful) training samples with the test sample's
    label.

    Only the weights at the end count, whatever strategy led to them. Under several processes the first one computes, and
    the others do not wait.

    Args:
        compressor: Of gradients; by default ``Dropout(k=1024)``. No more than 4,096 entries can be kept.
        num_test: Test samples to explain, the first.
        damping: Added to the curvature's diagonal; by default a tenth of its mean.
        curvature: ``"ggn"``, or ``"fisher"`` for the empirical Fisher matrix.
        draws: For modules of very many outputs: labels drawn that stand in for the output Hessian.
        on_disk: Keep compressed gradients in the folder of the report, as ``gradients.bin``, instead of in memory, while
            they are needed; then the file is deleted, for gradients tell of the training samples.
        train_data: Training samples to take instead: a pair of tensors, or a data set.
        test_data: Test samples to take instead.
        loss: Of one record, from its outputs and label; by default cross-entropy of class indices, else squared error.
            What ``training_step`` adds to it is not seen.
        source: Where inputs and labels of a batch are found.
        batch_size: Samples read together.
        pictures: Whether to draw.
        class_names: Names of the classes in the pictures.
        dirpath: Folder of the report.
        name: Of several reports, each needs one; the folder and what is logged begin with it.

    Attributes:
        result: What was found, after the fit, on the first process.

    Raises:
        ValueError: If an argument is out of range; before the first step, if the compressor keeps too many entries.
        MisconfigurationException: At setup, if another report has its name or the strategy shards parameters; before the
            first step, if samples cannot be read in order.

    Reference:
        Zhang, Amiri, "Toward Efficient Influence Function: Dropout as a Compression Tool", 2025. arXiv:2509.15651

    Example:
        >>> from lightning.pytorch import Trainer
        >>> influence = DropoutInfluence(Dropout(density=1 / 64), num_test=20)
        >>> trainer = Trainer(callbacks=[influence], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        compressor: GradientCompressor | None = None,
        num_test: int = 10,
        damping: float | None = None,
        curvature: Literal["ggn", "fisher"] = "ggn",
        draws: int | None = None,
        on_disk: bool = False,
        train_data: Any = None,
        test_data: Any = None,
        loss: OutputLoss | None = None,
        source: LogitsSource | None = None,
        batch_size: int = 256,
        pictures: bool = True,
        class_names: list[str] | None = None,
        dirpath: str | Path | None = None,
        name: str = "influence",
    ) -> None:
        self.compressor = compressor if compressor is not None else Dropout(k=1024)
        self.damping = damping
        self.curvature: Literal["ggn", "fisher"] = curvature
        self.draws = draws
        self.on_disk = on_disk
        self.loss = loss
        self.reporter = InfluenceReporter(
            num_test=num_test,
            train_data=train_data,
            test_data=test_data,
            source=source,
            batch_size=batch_size,
            pictures=pictures,
            class_names=class_names,
            dirpath=dirpath,
            name=name,
        )
        self.result: InfluenceResult | None = None
        self._seed: int | None = None
        self._samples: tuple[Samples, Samples] | None = None
        InfluenceScorer(torch.nn.Identity(), self.compressor, damping, curvature)  # refuses what is out of range

    @property
    def name(self) -> str:
        """Of the report."""
        return self.reporter.name

    @property
    @override
    def state_key(self) -> str:
        return f"{type(self).__name__}({self.name})"

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.reporter.check(trainer, pl_module, _names(trainer))
            self.result = None
            self._seed = root_seed(self.compressor.seed)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # not in setup: there, other callbacks may yet freeze parameters, and `configure_model` has yet to make them
        if not any(isinstance(p, UninitializedParameter) for p in pl_module.parameters()):
            num_coordinates(self._compressor(), ParameterLayout.of(pl_module))

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._samples = self.reporter.samples(trainer)  # on all processes, so that all of them refuse

    def _compressor(self) -> GradientCompressor:
        """The run's own, with its seed."""
        compressor = copy.copy(self.compressor)
        compressor.seed = self._seed
        return compressor

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        train, test = self._samples or self.reporter.samples(trainer)
        compressor = self._compressor()
        store = self.reporter.folder / "gradients.bin" if self.on_disk else None
        scorer = InfluenceScorer(
            pl_module, compressor, self.damping, self.curvature, self.loss, self.reporter.source, store, self.draws
        )
        before = pl_module.device
        pl_module.to(trainer.strategy.root_device)  # Lightning has moved it away by now
        try:
            scorer.fit(train.batches(self.reporter.batch_size), train.ids)
            scores = torch.cat([scorer.score(batch) for batch in test.batches(self.reporter.batch_size)])
            own = scorer.self_influence()
        finally:
            pl_module.to(before)
            if store is not None:
                store.unlink(missing_ok=True)
        name = type(compressor).__name__
        settings = {
            "method": f"influence functions, {name} as compression",
            "compressor": name,
            "seed": self._seed,
            "k": scorer.k,
            "num_parameters": scorer.num_parameters,
            "frozen_parameters": list(scorer.excluded),
            "curvature": self.curvature,
            "damping": scorer.damping_used,
            "num_train": scorer.num_records,
            "num_test": test.number,
            "test_data": self.reporter.split,
            "store_bytes": scorer.store_bytes,
            "weights_sha256": fingerprint(pl_module.state_dict()),
            "score": _SIGN,
        }
        self.result = InfluenceResult(scores=scores, self_influence=own, settings=settings, train_ids=train.ids)
        self.reporter.publish(trainer, self.result, train, test)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._samples = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"seed": self._seed}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.compressor.seed is None:
            self._seed = state_dict["seed"]


class TracIn(pl.Callback):
    """Adds up, at checkpoints along the training, how much a step on each training sample lowers test samples' losses.

    ``sum_c lr_c g_t(theta_c)^T g_i(theta_c)``: at each checkpoint the gradients of all training samples are computed in
    evaluation mode, and multiplied with those of the test samples and the learning rate of the last step; parameter groups
    have each their own. Nothing but the sums is kept, and they go into the Trainer's checkpoints, so a resumed run equals
    one that was not interrupted. It is derived for SGD without momentum; of other optimizers only the learning rate is
    taken.

    Samples, files and sign are those of :class:`DropoutInfluence`; the folder is ``<run>/tracin``.

    Args:
        every_n_epochs: A checkpoint is taken after the last batch of every so many epochs; by default 1.
        every_n_steps: Instead, after every so many optimizer steps.
        num_test: Test samples to explain, the first.
        train_data: Training samples to take instead of the Trainer's: a pair of tensors, or a data set.
        test_data: Test samples to take instead.
        loss: Of one record, from its outputs and label; by default cross-entropy of class indices, else squared error.
        source: Where inputs and labels of a batch are found.
        batch_size: Samples read together.
        pictures: Whether to draw.
        class_names: Names of the classes in the pictures.
        dirpath: Folder of the report.
        name: Of several reports, each needs one; the folder and what is logged begin with it.

    Attributes:
        result: What was found, after the fit, on the first process; None if no checkpoint came.
        num_checkpoints: Checkpoints so far.

    Raises:
        ValueError: If an argument is out of range, or both intervals are given.
        MisconfigurationException: At setup, if another report has its name or the strategy shards parameters; before the
            first step, if there are several optimizers, samples cannot be read in order, or a checkpoint had other ones.
        RuntimeError: If a gradient is not finite at a checkpoint.

    Reference:
        Pruthi et al., "Estimating Training Data Influence by Tracing Gradient Descent", NeurIPS 2020, Section 3.
        arXiv:2002.08484

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[TracIn(every_n_epochs=5)], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        num_test: int = 10,
        train_data: Any = None,
        test_data: Any = None,
        loss: OutputLoss | None = None,
        source: LogitsSource | None = None,
        batch_size: int = 256,
        pictures: bool = True,
        class_names: list[str] | None = None,
        dirpath: str | Path | None = None,
        name: str = "tracin",
    ) -> None:
        if every_n_epochs is not None and every_n_steps is not None:
            raise ValueError(
                f"Give `every_n_epochs` or `every_n_steps`, not both; got {every_n_epochs} and {every_n_steps}."
            )
        for argument, value in (("every_n_epochs", every_n_epochs), ("every_n_steps", every_n_steps)):
            if value is not None and value < 1:
                raise ValueError(f"`{argument}` must be at least 1, got {value}.")
        self.every_n_epochs = None if every_n_steps is not None else every_n_epochs or 1
        self.every_n_steps = every_n_steps
        self.loss = loss
        self.reporter = InfluenceReporter(
            num_test=num_test,
            train_data=train_data,
            test_data=test_data,
            source=source,
            batch_size=batch_size,
            pictures=pictures,
            class_names=class_names,
            dirpath=dirpath,
            name=name,
        )
        self.result: InfluenceResult | None = None
        self.num_checkpoints = 0
        self._scores: Tensor | None = None
        self._own: Tensor | None = None
        self._last_step = -1
        self._samples: tuple[Samples, Samples] | None = None
        self._lrs: list[float] = []

    @property
    def name(self) -> str:
        """Of the report."""
        return self.reporter.name

    @property
    @override
    def state_key(self) -> str:
        return f"{type(self).__name__}({self.name})"

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.reporter.check(trainer, pl_module, _names(trainer))
            self.result = self._scores = self._own = None
            self.num_checkpoints, self._last_step = 0, -1

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if len(trainer.optimizers) != 1:
            raise MisconfigurationException(
                f"TracIn needs the learning rate of one optimizer, but there are {len(trainer.optimizers)}: join their "
                "parameters as groups of one."
            )
        train, test = self._samples = self.reporter.samples(trainer)  # on all processes, so that all of them refuse
        if not trainer.is_global_zero:
            return
        shape = (test.number, train.number)
        if self._scores is None:
            self._scores, self._own = (
                torch.zeros(shape, dtype=torch.float64),
                torch.zeros(shape[1], dtype=torch.float64),
            )
        elif self._scores.shape != shape:
            raise MisconfigurationException(
                f"The checkpoint was written with {tuple(self._scores.shape)} test and training samples, and there are "
                f"{shape} now: resume with the same data and `num_test`."
            )

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._lrs = [group["lr"] for group in optimizer.param_groups]

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.every_n_steps is not None:
            is_due = trainer.global_step % self.every_n_steps == 0
        else:
            assert self.every_n_epochs is not None
            is_due = trainer.is_last_batch and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        is_due &= trainer.global_step not in (0, self._last_step)  # not twice while gradients accumulate
        if is_due and trainer.is_global_zero and self._lrs:
            self._last_step = trainer.global_step
            self._add(trainer, pl_module)

    def _add(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """One checkpoint."""
        assert self._samples is not None
        assert self._scores is not None
        assert self._own is not None
        records = plain_records(pl_module, self.loss, self.reporter.source)
        lrs = self._lr_of_each_entry(records, trainer.optimizers[0])
        train, test = self._samples
        directions = lrs * torch.cat(list(self._gradients(records, test)))
        start = 0
        for gradients in self._gradients(records, train):
            stop = start + len(gradients)
            self._scores[:, start:stop] += (directions @ gradients.T).cpu()
            self._own[start:stop] += (gradients.square() @ lrs).cpu()
            start = stop
        self.num_checkpoints += 1

    def _gradients(self, records: Records, samples: Samples) -> Any:
        for batch in samples.batches(self.reporter.batch_size):
            for gradients in gradients_in_parts(records, *self.reporter.source.inputs_and_labels(batch)):
                if not bool(torch.isfinite(gradients).all()):
                    raise RuntimeError(
                        "TracIn: a gradient is not finite. The network has diverged, or an input is not finite: lower the "
                        "learning rate, or clean the data."
                    )
                yield gradients

    def _lr_of_each_entry(self, records: Records, optimizer: Optimizer) -> Tensor:
        """Shape ``(p,)``; 0 for a parameter that the optimizer does not have."""
        of_parameter = {id(p): lr for g, lr in zip(optimizer.param_groups, self._lrs, strict=True) for p in g["params"]}
        named = dict(records.module.named_parameters())
        parts = [
            torch.full((named[name].numel(),), float(of_parameter.get(id(named[name]), 0.0)), dtype=records.dtype)
            for name in records.layout.names
        ]
        return torch.cat(parts).to(next(records.module.parameters()).device)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        if not self.num_checkpoints:
            rank_zero_warn(
                "TracIn: training ended before the first checkpoint, so there is no report. Lower `every_n_epochs` or "
                "`every_n_steps`."
            )
            return
        assert self._scores is not None
        assert self._own is not None
        train, test = self._samples or self.reporter.samples(trainer)
        settings = {
            "method": "TracIn",
            "num_checkpoints": self.num_checkpoints,
            "every_n_epochs": self.every_n_epochs,
            "every_n_steps": self.every_n_steps,
            "num_train": train.number,
            "num_test": test.number,
            "test_data": self.reporter.split,
            "score": _SIGN,
        }
        self.result = InfluenceResult(
            scores=self._scores.clone(), self_influence=self._own.clone(), settings=settings, train_ids=train.ids
        )
        self.reporter.publish(trainer, self.result, train, test)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._samples = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "scores": self._scores,
            "self_influence": self._own,
            "num_checkpoints": self.num_checkpoints,
            "last_step": self._last_step,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._scores, self._own = state_dict["scores"], state_dict["self_influence"]
        self.num_checkpoints, self._last_step = state_dict["num_checkpoints"], state_dict["last_step"]


def _names(trainer: pl.Trainer) -> list[str]:
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [c.name for c in callbacks if isinstance(c, DropoutInfluence | TracIn)]
