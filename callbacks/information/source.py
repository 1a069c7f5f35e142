"""Where a callback finds logits, labels and inputs in a step of somebody else's module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from groundwire.callbacks.information.functional import check_logits, values_are_hidden
from groundwire.callbacks.step import Call, Step, StepCallback, Tap, loss_of, with_loss
from groundwire.plugins.edge import EdgeStrategy

_LABELS = ("label", "labels", "y", "target", "targets")
_INPUTS = ("x", "image", "images", "input", "inputs", "pixel_values", "img", "features")

Unpack = Callable[[Any], tuple[Any, Any]]


class LogitsSource:
    """Finds logits, labels and inputs in a step of an unmodified LightningModule.

    Args:
        submodule: Dotted name of the submodule whose output are the logits; empty for the module's own ``forward``.
        call: Which forward call of the step, if there are several: ``"first"``, ``"last"``, or its number.
        unpack: From the batch to ``(inputs, labels)``. By default the first two entries of a tuple or list, or the
            usual keys of a mapping (``x``, ``image``, ``input``; ``y``, ``label``, ``target``, and their plurals).
        from_probs: The module gives probabilities instead of logits.
        binary: The module gives one logit ``z`` for two classes; ``[-z/2, z/2]`` is used.
        flatten: Take outputs ``(B, C, ...)`` with labels ``(B, ...)``, as in segmentation, each position a sample.

    Raises:
        ValueError: If ``call`` is neither.

    Example:
        >>> LogitsSource("model.head", call="first").submodule
        'model.head'
    """

    def __init__(
        self,
        submodule: str = "",
        call: Literal["first", "last"] | int = "last",
        unpack: Unpack | None = None,
        from_probs: bool = False,
        binary: bool = False,
        flatten: bool = False,
    ) -> None:
        if not (call in ("first", "last") or (isinstance(call, int) and call >= 0)):
            raise ValueError(f"`call` must be 'first', 'last' or a number from 0, got {call!r}.")
        self.submodule = submodule
        self.call = call
        self.unpack = unpack
        self.from_probs = from_probs
        self.binary = binary
        self.flatten = flatten
        self._tap = Tap(submodule)
        self._looked_at_values = False

    @contextmanager
    def open(self, module: pl.LightningModule) -> Iterator[list[Call]]:
        """Collect the calls of a step; see :meth:`Tap.open`."""
        with self._tap.open(module, required=False) as calls:
            yield calls

    def inputs(self, calls: list[Call], batch_inputs: Any) -> Any:
        """What the network saw: with what the step made of the batch (augmentation), where that can be read.

        Args:
            calls: What :meth:`open` collected.
            batch_inputs: Those of the batch.

        Returns:
            The first argument of the module's ``forward``; the batch's inputs, where logits are read elsewhere or the
            user says what inputs are.
        """
        seen = self._chosen(calls).inputs
        return seen[0] if not self.submodule and self.unpack is None and seen else batch_inputs

    def logits(self, calls: list[Call]) -> Tensor:
        """The logits among the calls, as the module gave them.

        Args:
            calls: What :meth:`open` collected.

        Returns:
            A tensor; of a mapping or object the entry ``logits``.

        Raises:
            MisconfigurationException: If there were too few calls, or the output holds no logits.
        """
        output = self._chosen(calls).output
        found = logits_in(output)
        if found is None:
            raise MisconfigurationException(
                f"The output of {self.submodule or 'forward'!r} is a {type(output).__name__} without `logits`. Name the "
                "submodule that gives the logits, e.g. LogitsSource('model.head')."
            )
        return found

    def _chosen(self, calls: list[Call]) -> Call:
        if not calls:
            self._tap.refuse_silence()
        index = self.call if isinstance(self.call, int) else 0 if self.call == "first" else -1
        if index >= len(calls):
            raise MisconfigurationException(
                f"`call` is {self.call}, but the step called forward {len(calls)} times: use a number below that."
            )
        return calls[index]

    def inputs_and_labels(self, batch: Any) -> tuple[Any, Tensor]:
        """Inputs and labels of a batch.

        Args:
            batch: What the step receives.

        Returns:
            The pair; the labels are a tensor.

        Raises:
            MisconfigurationException: If they cannot be told.
        """
        if self.unpack is not None:
            return self.unpack(batch)
        if isinstance(batch, Mapping):
            inputs = next((batch[key] for key in _INPUTS if key in batch), None)
            labels = next((batch[key] for key in _LABELS if key in batch), None)
            what = f"a mapping with {', '.join(map(str, batch))}"
        elif isinstance(batch, tuple | list) and len(batch) >= 2:
            inputs, labels = batch[0], batch[1]
            what = f"a {type(batch).__name__} of {len(batch)}"
        else:
            inputs, labels, what = None, None, f"a {type(batch).__name__}"
        if not isinstance(labels, Tensor):
            raise MisconfigurationException(
                f"Cannot tell inputs and labels of a batch that is {what}. Say how: "
                "LogitsSource(unpack=lambda batch: (batch['image'], batch['class']))."
            )
        return inputs, labels

    def prepare(self, logits: Tensor, target: Tensor, soft: bool = False, check: bool = True) -> tuple[Tensor, Tensor]:
        """Logits ``(n, C)`` in float32 or wider, and labels ``(n,)``, from what module and batch hold.

        Args:
            logits: What the module gave.
            target: What the batch holds.
            soft: Whether distributions ``(n, C)`` are welcome as labels.
            check: Whether to look at the values of the first batch.

        Returns:
            The pair.

        Raises:
            ValueError: If they do not fit together; the message says what to change.
            RuntimeError: If a logit is NaN or infinite.
        """
        logits, target = as_rows(logits, target, from_probs=self.from_probs, binary=self.binary, flatten=self.flatten)
        if not (soft and target.shape == logits.shape):
            check_logits(logits, target)
        if check and not self._looked_at_values and not values_are_hidden(logits, target):
            check_values(logits, target, warn=not self.from_probs)
            self._looked_at_values = True
        return logits, target


class ClassifierCallback(StepCallback):
    """A callback that replaces the loss of a classifier's training step by one that also knows logits and labels.

    Subclasses write :meth:`total_loss`.

    Args:
        source: Where logits and labels are found; by default the module's ``forward`` and the usual places.
        name: Under which it logs, and keeps its state in checkpoints: of several of a class, each needs its own.

    Attributes:
        accepts_soft_labels: Whether labels may be distributions.
        own_loss_weight: By which the module's own loss enters the total; None where it enters as it is.

    Raises:
        MisconfigurationException: At setup, for manual optimization, or if a callback further inside would be weighed
            or replaced together with the module's own loss.
    """

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
        if stage == "fit" and not pl_module.automatic_optimization:
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
            inputs = self.source.inputs(calls, batch_inputs)
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

    def _refuse_nonfinite(self, loss: Tensor, logits: Tensor, target: Tensor) -> None:
        if values_are_hidden(loss) or self._strategy_checks_updates or bool(torch.isfinite(loss)):
            return
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            return  # loss scaling skips such a step
        where = f"{type(self).__name__}, step {self.trainer.global_step}"
        try:
            check_values(logits, target, warn=False)
        except RuntimeError as error:
            raise RuntimeError(f"{where}: {error} The weights were not changed.") from error
        raise RuntimeError(
            f"{where}: the loss is not finite, although the logits are: they are beyond what the term can handle, or the "
            "module's own loss is not finite. The weights were not changed. Lower the term's weight or the learning rate."
        )


def logits_in(output: Any) -> Tensor | None:
    """The logits in what a network gives: a tensor, or the entry or attribute ``logits``; None if there are none."""
    if isinstance(output, Mapping):
        output = output.get("logits")
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    return found if isinstance(found, Tensor) else None


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


def as_rows(
    logits: Tensor, target: Tensor, *, from_probs: bool = False, binary: bool = False, flatten: bool = False
) -> tuple[Tensor, Tensor]:
    """Bring outputs and labels into the form ``(n, C)`` and ``(n,)``.

    Args:
        logits: What a module gave.
        target: Its labels.
        from_probs: It gives probabilities; exact zeros are clamped at the smallest normal number.
        binary: It gives one logit, ``(n,)`` or ``(n, 1)``.
        flatten: Outputs are ``(B, C, ...)`` and labels ``(B, ...)``.

    Returns:
        Logits, at least in float32, and labels.

    Raises:
        ValueError: If the shapes call for an option that was not given.

    Example:
        >>> as_rows(torch.tensor([2.0]), torch.tensor([1]), binary=True)[0]
        tensor([[-1.,  1.]])
    """
    if not logits.is_floating_point():
        raise ValueError(f"expected logits [batch, classes], got shape {tuple(logits.shape)} dtype {logits.dtype}.")
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    if from_probs:
        logits = logits.clamp_min(torch.finfo(logits.dtype).tiny)
        logits = logits.log() if not binary else logits.log() - (1 - logits).clamp_min(1e-38).log()
    if binary:
        if target.is_floating_point() and not values_are_hidden(target) and bool((target != target.round()).any()):
            raise ValueError(
                "expected labels 0 and 1 for binary=True, got fractions; soft labels are not supported by CMI."
            )
        z = logits.reshape(-1) / 2
        return torch.stack([-z, z], dim=-1), target.reshape(-1).long()
    if not target.is_floating_point():
        target = target.long()
    if flatten and logits.ndim > 2:
        return logits.movedim(1, -1).reshape(-1, logits.shape[1]), target.reshape(-1)
    if logits.ndim > 2:
        raise ValueError(
            f"expected logits [batch, classes], got shape {tuple(logits.shape)} dtype {logits.dtype}; for segmentation "
            "pass flatten=True."
        )
    return logits, target


def check_values(logits: Tensor, target: Tensor, warn: bool = True) -> None:
    """Refuse logits that are not finite and labels that are out of range; waits for the device.

    Args:
        logits: Shape ``(n, C)``.
        target: Labels ``(n,)``, or distributions ``(n, C)``.
        warn: Whether to say that logits look like probabilities.

    Raises:
        RuntimeError: If a logit is NaN or infinite.
        ValueError: If a label is outside ``[0, C)``.
    """
    if len(logits) == 0:
        return
    low, high = (float(value) for value in logits.detach().aminmax())
    if not (low > float("-inf") and high < float("inf")):  # NaN fails both
        raise RuntimeError(
            "non-finite logits: the network has diverged, or its input is not finite. Lower the learning rate or check "
            "the data."
        )
    if warn and low >= 0 and high <= 1 and bool((logits.detach().sum(dim=1) - 1).abs().max() < 1e-3):
        rank_zero_warn("These logits look like probabilities; pass from_probs=True if they are.")
    if target.is_floating_point():
        return
    least, most = (int(value) for value in target.aminmax())
    if least < 0 or most >= logits.shape[1]:
        raise ValueError(
            f"label {least if least < 0 else most} but the logits have {logits.shape[1]} columns: give the network as "
            "many outputs as there are classes, or count the labels from 0."
        )
