"""Callbacks that change the loss of a classifier's training step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from groundwire.callbacks.checks import values_are_hidden
from groundwire.callbacks.logits import LogitsSource, check_values
from groundwire.callbacks.step import Call, Step, StepCallback, loss_of, with_loss
from groundwire.plugins.edge import EdgeStrategy


class ClassifierCallback(StepCallback):
    """A callback that replaces the loss of a classifier's training step by one that also knows logits and labels.

    Subclasses write :meth:`total_loss`.

    Args:
        source: Where logits and labels are found; by default the module's ``forward`` and the usual places.
        name: Under which it logs, and keeps its state in checkpoints: of several of a class, each needs its own.

    Attributes:
        changes_loss: Whether the step returns another loss than the module's own, which needs automatic optimization.
        accepts_soft_labels: Whether labels may be distributions.
        own_loss_weight: By which the module's own loss enters the total; None where it enters as it is.

    Raises:
        MisconfigurationException: At setup, for manual optimization, or if a callback further inside would be weighed
            or replaced together with the module's own loss.
    """

    changes_loss = True
    accepts_soft_labels = False
    own_loss_weight: float | None = None

    def __init__(self, source: LogitsSource | None, name: str) -> None:
        self.source = source or LogitsSource()
        self.name = name
        self._trainer: pl.Trainer | None = None
        self._pl_module: pl.LightningModule | None = None

    def total_loss(self, own_loss: Tensor, logits: Tensor, target: Tensor, inputs: Any) -> Tensor:
        """The loss to train with.

        Args:
            own_loss: What the module's step returned.
            logits: Shape ``(B, C)``, with their graph.
            target: Labels ``(B,)``.
            inputs: What the network saw.

        Returns:
            A scalar.
        """
        raise NotImplementedError

    def network_inputs(self, calls: list[Call], batch_inputs: Any) -> Any:
        """What :meth:`total_loss` gets as ``inputs``, from the step's calls and the batch."""
        return self.source.inputs(calls, batch_inputs)

    @property
    def epochs_needed_for(self) -> str | None:
        """The setting that counts epochs, if there is one: it needs a loader with an end."""
        return None

    @property
    def state_key(self) -> str:
        """Under which checkpoints hold the state."""
        return f"{type(self).__qualname__}[{self.name}]"

    @property
    def trainer(self) -> pl.Trainer:
        """The Trainer that runs."""
        assert self._trainer is not None
        return self._trainer

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and self.changes_loss and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"{type(self).__name__} changes the loss that `training_step` returns, but {type(pl_module).__name__} "
                "sets `automatic_optimization = False`. Return the loss and let Lightning step the optimizer."
            )
        if stage == "fit" and self.own_loss_weight is not None:
            self._refuse_terms_inside(trainer)
        self._trainer, self._pl_module = trainer, pl_module
        super().setup(trainer, pl_module, stage)

    def _refuse_terms_inside(self, trainer: pl.Trainer) -> None:
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        inside = [c for c in callbacks[callbacks.index(self) + 1 :] if isinstance(c, ClassifierCallback)]
        if self.own_loss_weight != 0:  # what replaces the module's own loss is welcome inside
            inside = [c for c in inside if c.own_loss_weight != 0]
        if inside:
            names = ", ".join(type(c).__name__ for c in inside)
            what = "replaces" if self.own_loss_weight == 0 else f"weighs by {self.own_loss_weight}"
            raise MisconfigurationException(
                f"{type(self).__name__} {what} the loss of the step inside of it, and so the terms of {names}, which "
                f"come after it in the Trainer's callbacks. Put {type(self).__name__} after them, or let it leave that "
                "loss as it is (ce_weight=1 of a distillation method)."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.epochs_needed_for is not None and has_no_end(trainer):
            raise MisconfigurationException(
                f"{type(self).__name__}({self.epochs_needed_for}) counts epochs, but the train loader does not say how "
                "long it is and the Trainer has no max_epochs: it might never take hold. Set it to 0, or set "
                "limit_train_batches or max_epochs."
            )

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._trainer = self._pl_module = None

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._trainer = self._pl_module = None

    @override
    def around_step(self, step: Step, batch: Any) -> Any:
        assert self._pl_module is not None
        with self.source.open(self._pl_module) as calls:
            output = step(batch)
        if output is None:
            return None
        own_loss = loss_of(output)
        batch_inputs, labels = self.source.inputs_and_labels(batch)
        with torch.autocast(own_loss.device.type, enabled=False):  # also: no half-precision product in our terms
            logits, target = self._prepared(self.source.logits(calls), labels)
            inputs = self.network_inputs(calls, batch_inputs)
            loss = self.total_loss(own_loss, logits, target, inputs)
            self._refuse_nonfinite(loss, logits, target)
        return with_loss(output, loss)

    def _prepared(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return self.source.prepare(
                logits, labels, soft=self.accepts_soft_labels, check=not self._strategy_checks_updates
            )
        except RuntimeError as error:
            raise RuntimeError(f"{type(self).__name__}, step {self.trainer.global_step}: {error}") from error

    @property
    def _strategy_checks_updates(self) -> bool:
        """EdgeStrategy looks at every device's update, and may drop one that is not finite."""
        return isinstance(self.trainer.strategy, EdgeStrategy)

    def log_terms(self, values: Mapping[str, Any], reduce_fx: str = "mean") -> None:
        """Log values of this step under the callback's name, on the Trainer's logging steps.

        Args:
            values: Numbers or scalar tensors by name.
            reduce_fx: How devices and processes combine.
        """
        assert self._pl_module is not None
        for name, value in values.items():
            self._pl_module.log(f"{self.name}/{name}", value, on_step=True, on_epoch=False, reduce_fx=reduce_fx)

    def _refuse_nonfinite(self, loss: Tensor, logits: Tensor | None = None, target: Tensor | None = None) -> None:
        if values_are_hidden(loss) or self._strategy_checks_updates or bool(torch.isfinite(loss)):
            return
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            return  # loss scaling skips such a step
        where = f"{type(self).__name__}, step {self.trainer.global_step}"
        if logits is None or target is None:
            raise RuntimeError(
                f"{where}: the loss is not finite. The weights were not changed. Lower the learning rate."
            )
        try:
            check_values(logits, target, warn=False)
        except RuntimeError as error:
            raise RuntimeError(f"{where}: {error} The weights were not changed.") from error
        raise RuntimeError(
            f"{where}: the loss is not finite, although the logits are: they are beyond what the term can handle, or the "
            "module's own loss is not finite. The weights were not changed. Lower the term's weight or the learning rate."
        )


def has_no_end(trainer: pl.Trainer) -> bool:
    """Whether an epoch may never end: a loader of unknown length, and a Trainer that counts steps alone."""
    return trainer.num_training_batches == float("inf") and trainer.max_epochs in (None, -1)


def epochs_done(trainer: pl.Trainer) -> float:
    """Epochs done, with the share of the running one.

    Not the Trainer's ``current_epoch``, which after a resume counts an epoch twice if the checkpoint was written in its
    last step.

    Args:
        trainer: A Trainer that fits.

    Returns:
        At least 0; whole where the number of batches in an epoch is unknown.
    """
    batches = trainer.num_training_batches
    if not 0 < batches < float("inf"):
        return float(trainer.current_epoch)
    return trainer.fit_loop.total_batch_idx / batches
