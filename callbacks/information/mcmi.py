"""MCMI: a teacher with more conditional mutual information, from which students learn better."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from groundwire.callbacks.classifier import has_no_end
from groundwire.callbacks.information.centroids import CentroidTable, summed_over_processes
from groundwire.callbacks.information.cmic import CentroidCallback, QUpdate
from groundwire.callbacks.information.functional import log_probs
from groundwire.callbacks.logits import LogitsSource
from groundwire.callbacks.step import Notes, is_logging_step
from groundwire.callbacks.weights import load_weights
from groundwire.plugins.edge import DeviceBatch

_ACCURACY_BATCHES = 50  # from which the accuracy before the first step is estimated


class MaximumCMI(CentroidCallback):
    """MCMI: fine-tunes a trained teacher with ``loss - lam * CMI``, so that its outputs tell samples of a class apart.

    Before the first step, one pass over the training data gives the centroids of the classes, in evaluation mode; they
    stay as they are, as in the authors' code. Neither the module's random stream nor the loader's order is touched: with
    ``lam=0`` the run equals plain fine-tuning bit for bit. Training stops with an error if the accuracy on the training
    data falls by more than ``max_accuracy_drop``. Logs ``mcmi/cmi_nats``, ``mcmi/lam``, and ``mcmi/train_acc`` per
    epoch.

    Args:
        lam: Weight, at least 0 and at most 1; the authors use 0.1 to 0.25.
        checkpoint: Trained weights to start from: a Lightning checkpoint, or the folder of a run; by default the
            module's own.
        q_update: ``"none"``; or ``"batch"`` or ``"epoch"`` to update the centroids.
        q_pass_mode: ``"eval"``, or ``"train"`` as the authors do, which also moves BatchNorm's running statistics.
        mu: Weight of the past in the update after a batch.
        q_min: Centroid entries are clamped at this: it bounds what moving mass onto a rare output can gain.
        max_accuracy_drop: Largest fall of the training accuracy over an epoch's mean, a fraction.
        allow_large_lambda: Allow ``lam > 1``.
        source: Where logits and labels are found. For the pass, the module is called with the batch's inputs.
        name: Under which it logs and keeps its state.

    Raises:
        ValueError: If an argument is out of range.
        FileNotFoundError: At setup, if there is no checkpoint.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[MaximumCMI(lam=0.15)], logger=False, enable_checkpointing=False)

    Reference:
        Ye, Mohajer Hamidi, Tan, Yang, "Bayes Conditional Distribution Estimation for Knowledge Distillation Based on
        Conditional Mutual Information", ICLR 2024. arXiv:2401.08732
    """

    def __init__(
        self,
        lam: float = 0.15,
        checkpoint: str | Path | None = None,
        q_update: QUpdate = "none",
        q_pass_mode: Literal["eval", "train"] = "eval",
        mu: float = 0.9999,
        q_min: float = 1e-4,
        max_accuracy_drop: float = 0.05,
        allow_large_lambda: bool = False,
        source: LogitsSource | None = None,
        name: str = "mcmi",
    ) -> None:
        super().__init__(source, name, q_update, mu, q_min)
        if not 0 <= lam < math.inf:
            raise ValueError(
                f"`lam` must be finite and at least 0, got {lam}: MaximumCMI makes CMI large. To make it small, use "
                "CMIConstraint."
            )
        if lam > 1 and not allow_large_lambda:
            raise ValueError(
                f"lam={lam} pulls outputs apart whatever the label says: use at most 1 (0.1 to 0.25 is usual), or "
                "pass allow_large_lambda=True."
            )
        if q_pass_mode not in ("eval", "train"):
            raise ValueError(f"`q_pass_mode` must be 'eval' or 'train', got {q_pass_mode!r}.")
        if not 0 <= max_accuracy_drop <= 1:
            raise ValueError(f"`max_accuracy_drop` must be in [0, 1], got {max_accuracy_drop}.")
        self.lam = lam
        self.checkpoint = checkpoint
        self.q_pass_mode = q_pass_mode
        self.max_accuracy_drop = max_accuracy_drop
        self._initial_accuracy: float | None = None
        self._correct: Tensor | None = None  # of this epoch: right predictions, samples

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.global_step == 0:  # a new run, and not one that goes on
            self._initial_accuracy = self._correct = None
            if self.checkpoint is not None and trainer.ckpt_path is None:
                load_weights(pl_module, self.checkpoint)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if has_no_end(trainer):
            raise MisconfigurationException(
                "MaximumCMI makes one pass over the training data, but the train loader does not say how long it is and "
                "the Trainer has no max_epochs: it might never end. Set limit_train_batches or max_epochs."
            )
        if self._initial_accuracy is not None:  # resumed
            return
        sums, counts = torch.zeros(()), torch.zeros(())
        with _mode(pl_module, training=self.q_pass_mode == "train"):
            for logits, target in training_outputs(trainer, pl_module, self.source):
                these, of_class = summed_over_processes(
                    log_probs(logits).exp(), target, logits.shape[1], trainer.strategy
                )
                sums, counts = sums.to(these) + these, counts.to(these) + of_class
        if not sums.ndim:
            raise ValueError("MaximumCMI needs the outputs on the training data, but the train loader is empty.")
        self.table = CentroidTable(sums.shape[0], self.mu, pl_module.device)
        self.table.assign(sums, counts)
        correct = torch.zeros(2, dtype=torch.float64)
        with _mode(pl_module, training=True), _buffers_kept(pl_module):  # as it will be measured while training
            for logits, target in training_outputs(trainer, pl_module, self.source, limit=_ACCURACY_BATCHES):
                correct = correct.to(target.device) + _right_and_all(logits.argmax(dim=1) == target)
        right, samples = trainer.strategy.reduce(correct, reduce_op="sum")
        self._initial_accuracy = float(right / samples)
        rank_zero_info(f"MaximumCMI starts from a training accuracy of {self._initial_accuracy:.4f}.")

    @override
    def total_loss(self, own_loss: Tensor, logits: Tensor, target: Tensor, inputs: Any) -> Tensor:
        log_p = log_probs(logits)
        p = log_p.exp()
        cmi = self.divergence(log_p, target, p)
        self.keep_for_update(p, target)
        self.note(correct=log_p.argmax(dim=1) == target)
        if is_logging_step(self.trainer):
            self.log_terms({"cmi_nats": cmi, "lam": self.lam})
        return own_loss - self.lam * cmi

    @override
    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, notes: Notes) -> None:
        super().after_step(trainer, pl_module, notes)
        now = _right_and_all(notes["correct"])
        self._correct = now if self._correct is None else self._correct.to(now.device) + now

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if batch_idx == 0:
            self._correct = None

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if self._correct is None or self._initial_accuracy is None:
            return
        correct, samples = trainer.strategy.reduce(self._correct, reduce_op="sum")
        self._correct = None
        accuracy = float(correct / samples)
        pl_module.log(f"{self.name}/train_acc", accuracy)
        if accuracy < self._initial_accuracy - self.max_accuracy_drop:
            raise RuntimeError(
                f"MaximumCMI(lam={self.lam}) has brought the training accuracy from {self._initial_accuracy:.4f} down to "
                f"{accuracy:.4f}. Lower `lam` or the learning rate, or raise `max_accuracy_drop`."
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "initial_accuracy": self._initial_accuracy,
            "correct": None if self._correct is None else self._correct.cpu(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._initial_accuracy, self._correct = state_dict["initial_accuracy"], state_dict["correct"]


@torch.no_grad()
def training_outputs(
    trainer: pl.Trainer, pl_module: pl.LightningModule, source: LogitsSource, limit: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over the training data, which leaves the loader and the random streams as they were.

    Args:
        trainer: A Trainer whose training has started.
        pl_module: The module; it is called with each batch's inputs, in the mode it is in.
        source: Where logits and labels are found.
        limit: Batches to take; by default those of an epoch.

    Yields:
        Logits ``(n, C)`` and labels ``(n,)`` of each batch, or of each device's share of it.

    Raises:
        MisconfigurationException: If there are several train loaders.
    """
    loader: Any = trainer.train_dataloader
    if isinstance(loader, dict | list | tuple):
        raise MisconfigurationException(
            "MaximumCMI passes over the training data once, and needs a single train loader."
        )
    holders = [loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    generators = {id(g): g for h in holders if isinstance(g := getattr(h, "generator", None), torch.Generator)}
    states = {key: generator.get_state() for key, generator in generators.items()}
    place = loader.state_dict() if hasattr(loader, "state_dict") else None
    with isolate_rng():
        for number, batch in enumerate(loader):
            if number >= (trainer.num_training_batches if limit is None else limit):
                break
            batch = trainer.precision_plugin.convert_input(batch)  # this and the next lines: as the loop does
            batch = pl_module._on_before_batch_transfer(batch)
            batch = trainer.strategy.batch_to_device(batch)
            rows = [batch.row(i) for i in range(len(batch))] if isinstance(batch, DeviceBatch) else [batch]
            for row in rows:
                inputs, labels = source.inputs_and_labels(row)
                with trainer.precision_plugin.forward_context(), source.open(pl_module) as calls:
                    pl_module(inputs)
                yield source.prepare(source.logits(calls), labels)
    if place is not None:
        loader.load_state_dict(place)
    for key, generator in generators.items():
        generator.set_state(states[key])


def _right_and_all(correct: Tensor) -> Tensor:
    return torch.stack([correct.sum(), torch.tensor(len(correct), device=correct.device)]).double()


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Undo what a forward in training mode does to running statistics."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Put all submodules into one mode, and each back into its own."""
    before = [(sub, sub.training) for sub in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for sub, was_training in before:
            sub.training = was_training
