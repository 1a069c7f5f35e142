"""The one way in which a callback surrounds a step of the module: training, validation or test."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from typing_extensions import override

from groundwire.plugins.edge import EdgeStrategy
from groundwire.plugins.edge.updates import _stack_extras

Step = Callable[[Any], Any]
"""Runs the rest of the step on a batch and returns what the module's step returns."""

Notes = dict[str, Tensor]
"""What :meth:`StepCallback.note` kept during one training step, by name; the first dimension counts rows."""

_NOTES = "groundwire/notes"
_METHODS = {
    "fit": ("training_step", "validation_step"),
    "validate": ("validation_step",),
    "test": ("test_step",),
}
_AROUND = {
    "training_step": "around_step",
    "validation_step": "around_evaluation",
    "test_step": "around_evaluation",
}


class StepCallback(pl.Callback):
    """A callback that surrounds the module's steps.

    Subclasses write :meth:`around_step` for ``training_step``, :meth:`around_evaluation` for ``validation_step`` and
    ``test_step``, or both. Callbacks nest in the order of the Trainer's list, the first outermost. A step is shadowed
    by an instance attribute of the module while the Trainer runs, and put back afterwards, also after an exception and
    after Ctrl-C. It works in a plain Trainer, under DDP, and inside ``EdgeStrategy``, where it surrounds the training
    step of each device: tensor code in it must be vmap-safe there (no ``.item()``, no branch on a tensor's value).
    A training step that the module's validation step calls is left alone.

    What a training step is to leave for later (statistics for the next one, say) goes through :meth:`note` and comes
    back, of all devices together, in :meth:`after_step`: a tensor kept as an attribute would be dead outside of vmap.

    Raises:
        MisconfigurationException: At setup, if the module's step takes a ``dataloader_iter`` instead of a batch.

    Example:
        >>> class Doubled(StepCallback):
        ...     def around_step(self, step, batch):
        ...         return 2 * step(batch)
    """

    _noted: list[Notes] | None = None

    def around_step(self, step: Step, batch: Any) -> Any:
        """Run the training step zero or more times, on this or another batch, and return its output, changed or not.

        Args:
            step: The rest of the step: the next callback's ``around_step``, or the module's own ``training_step``.
            batch: What ``training_step`` was to receive.

        Returns:
            What ``training_step`` may return: a loss, a dict with one under ``"loss"``, or None to skip the step.
        """
        return step(batch)

    def around_evaluation(self, step: Step, batch: Any) -> Any:
        """The same for ``validation_step`` and ``test_step``.

        Args:
            step: The rest of the step.
            batch: What the module's step was to receive.

        Returns:
            What the module's step may return.
        """
        return step(batch)

    def note(self, **tensors: Tensor) -> None:
        """Keep tensors of the running training step for :meth:`after_step`; they are detached.

        Args:
            **tensors: With the rows (samples) in the first dimension, or scalars.
        """
        if self._noted is not None:
            rows = {name: t.detach() if t.ndim else t.detach().reshape(1) for name, t in tensors.items()}
            self._noted.append(rows)

    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, notes: Notes) -> None:
        """Called after the optimizer's step (or the micro-batch, while gradients accumulate), if there are notes.

        Args:
            trainer: The Trainer.
            pl_module: The module.
            notes: What was noted, rows of all calls one after the other; inside ``EdgeStrategy`` device by device,
                and of several local steps only the last one's.
        """

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        callbacks = [c for c in trainer.callbacks if isinstance(c, StepCallback)]  # type: ignore[attr-defined]
        strategy = trainer.strategy
        if isinstance(strategy, EdgeStrategy) and "training_step" not in strategy.__dict__:
            strategy.__dict__["training_step"] = _HandingOutNotes(trainer, strategy, callbacks)
        for method in _METHODS.get(stage, ()):
            is_there = getattr(pl_module.__dict__.get(method), "trainer", None) is trainer
            if is_overridden(method, pl_module) and not is_there:
                around = _AROUND[method]
                taking_part = [c for c in callbacks if getattr(type(c), around) is not getattr(StepCallback, around)]
                if taking_part:
                    pl_module.__dict__[method] = _Surrounded(trainer, pl_module, method, taking_part)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        noted, self._noted = self._noted, None
        if noted:
            self.after_step(trainer, pl_module, _joined(noted))

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._noted = None
        _put_back(trainer, pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._noted = None
        _put_back(trainer, pl_module)


def loss_of(output: Any) -> Tensor:
    """The loss in what a training step returned.

    Args:
        output: A loss, or a dict with one under ``"loss"``.

    Returns:
        The loss, a scalar.

    Raises:
        MisconfigurationException: If there is none.
    """
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        raise MisconfigurationException(
            f"`training_step` must return a loss tensor or a dict with one under 'loss', got {type(output).__name__}. "
            "A callback that changes the loss needs automatic optimization."
        )
    return loss


def with_loss(output: Any, loss: Tensor) -> Any:
    """What a training step returned, with another loss.

    Args:
        output: A loss, or a dict with one under ``"loss"``; it is not changed.
        loss: The new loss.

    Returns:
        ``loss``, or a dict like ``output`` that holds it.
    """
    return {**output, "loss": loss} if isinstance(output, dict) else loss


def is_logging_step(trainer: pl.Trainer) -> bool:
    """Whether loggers record what this training step logs (one call of ``log`` costs a tenth of a millisecond)."""
    step = trainer.global_step
    return step == 0 or (step + 1) % max(trainer.log_every_n_steps, 1) == 0  # type: ignore[attr-defined]


def _key(callback: StepCallback) -> str:
    return f"{type(callback).__name__}-{id(callback)}"


def _joined(calls: list[Notes], dim: int = 0) -> Notes:
    """The notes of several calls as one."""
    found: dict[str, list[Tensor]] = {}
    for notes in calls:
        for name, tensor in notes.items():
            found.setdefault(name, []).append(tensor)
    return {name: tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim) for name, tensors in found.items()}


class _Surrounded:
    """Stands in for a step of the module, as an instance attribute, while one Trainer runs.

    Another Trainer that uses the module meanwhile finds its own step underneath; a copy of the module finds its class's.
    """

    def __init__(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, method: str, callbacks: list[StepCallback]
    ) -> None:
        self.trainer = trainer
        self.pl_module = pl_module
        self.method = method
        self.callbacks = callbacks
        self.before = pl_module.__dict__.get(method)  # the instance attribute that was there, if any
        self.found = getattr(pl_module, method)
        # a tensor kept on the callback would be dead outside of vmap
        self._through_outputs = isinstance(trainer.strategy, EdgeStrategy)
        if "dataloader_iter" in inspect.signature(self.found).parameters:
            raise MisconfigurationException(
                f"{type(pl_module).__name__}.{method} takes a `dataloader_iter`: {type(callbacks[0]).__name__} needs to "
                "see the batch. Let the step take `batch`."
            )
        # Lightning reads the signature (does the step take a batch index?), and the code (is it overridden?)
        functools.update_wrapper(self, self.found, updated=())
        self.__code__ = self.found.__code__

    def __call__(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        is_training = self.method == "training_step"
        elsewhere = self.pl_module._trainer is not self.trainer  # another Trainer runs
        if elsewhere or (is_training and not self.trainer.training):  # or a validation step that calls this one
            return self.found(batch, *args, **kwargs)
        step: Step = lambda b: self.found(b, *args, **kwargs)
        for callback in reversed(self.callbacks):
            step = functools.partial(getattr(callback, _AROUND[self.method]), step)
        if not is_training:
            return step(batch)
        for callback in self.callbacks:
            callback._noted = []
        output = step(batch)
        if not self._through_outputs or output is None:
            return output
        notes = {_key(c): c._noted for c in self.callbacks if type(c).after_step is not StepCallback.after_step}
        for callback in self.callbacks:
            callback._noted = None
        return {**(output if isinstance(output, dict) else {"loss": output}), _NOTES: notes} if notes else output

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.before is not None:
            return copy.deepcopy(self.before, memo)
        return _own_step(copy.deepcopy(self.pl_module, memo), self.method)

    def __reduce__(self) -> Any:
        return _own_step, (self.pl_module, self.method)


def _own_step(pl_module: pl.LightningModule, method: str) -> Any:
    """The step that the module's class defines."""
    return getattr(type(pl_module), method).__get__(pl_module)


class _HandingOutNotes:
    """The strategy's step, whose output reaches the Trainer, and so all other callbacks, without the notes."""

    def __init__(self, trainer: pl.Trainer, strategy: EdgeStrategy, callbacks: list[StepCallback]) -> None:
        self.trainer = trainer
        self.callbacks = callbacks
        self.before = None
        self.found = strategy.training_step

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.found(*args, **kwargs)
        if not isinstance(output, dict):
            return output
        devices = output.get("devices")  # a list of what each returned, where shapes differ
        if isinstance(devices, list) and any(isinstance(device, dict) and _NOTES in device for device in devices):
            noted = [device.pop(_NOTES, {}) for device in devices]
            for callback in self.callbacks:
                callback._noted = [call for calls in noted for call in calls.get(_key(callback), [])]
            del output["devices"]
            return output | _stack_extras(devices)
        stacked = output.pop(_NOTES, {})
        for callback in self.callbacks:
            of_devices = _joined(stacked.get(_key(callback), []), dim=1)
            rows = {name: tensor.flatten(0, 1) for name, tensor in of_devices.items()}
            callback._noted = [rows] if rows else []
        return output


def _put_back(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Undo what this Trainer's callbacks have put in the place of a step."""
    for attributes in (pl_module.__dict__, trainer.strategy.__dict__):
        for method in _AROUND:
            current = attributes.get(method)
            if not isinstance(current, _Surrounded | _HandingOutNotes) or current.trainer is not trainer:
                continue
            if current.before is None:
                del attributes[method]
            else:
                attributes[method] = current.before


@dataclass(frozen=True)
class Call:
    """One forward call that a :class:`Tap` saw.

    Args:
        inputs: Positional arguments of ``forward``.
        output: What it returned, with its graph.
    """

    inputs: tuple[Any, ...]
    output: Any


_unseen: list[None] = []  # not empty while taps look away


def taps_look_away() -> bool:
    """Whether :func:`unseen_by_taps` is at work."""
    return bool(_unseen)


@contextmanager
def unseen_by_taps() -> Iterator[None]:
    """Run a module's forward for a callback's own purposes: no :class:`Tap` records it.

    So callbacks further out read what the step itself computes. Other forward hooks run.
    """
    _unseen.append(None)
    try:
        yield
    finally:
        _unseen.pop()


class Tap:
    """Reads what a submodule produces during a step, without touching the module's code.

    Args:
        submodule: Dotted name of the submodule, as in ``named_modules()``; empty for the LightningModule's own
            ``forward``.

    Example:
        >>> module, tap = nn.Sequential(nn.Linear(2, 3), nn.ReLU()), Tap("0")
        >>> with tap.open(module) as calls:
        ...     _ = module(torch.zeros(4, 2))
        >>> calls[0].output.shape
        torch.Size([4, 3])
    """

    def __init__(self, submodule: str = "") -> None:
        self.submodule = submodule
        self._has_fired = False
        self._why_silent = ""

    @contextmanager
    def open(self, module: nn.Module, required: bool = True) -> Iterator[list[Call]]:
        """Collect the submodule's calls while the context is open; the hook is removed afterwards, come what may.

        Args:
            module: The module in which to look.
            required: Whether a submodule that was not called is an error when the context closes; otherwise
                :meth:`refuse_silence` says it when asked.

        Yields:
            A list that grows by one :class:`Call` a forward. It is emptied when the context closes after an error, so
            that no graph outlives it.

        Raises:
            MisconfigurationException: If there is no such submodule, or it was not called.
        """
        calls: list[Call] = []
        candidates: dict[str, tuple[int, ...]] = {}
        named: dict[str, nn.Module] = {}
        if not self._has_fired:  # see who is called, in case this one is not
            named = dict(module.named_modules())
            if self.submodule not in named:
                raise MisconfigurationException(
                    f"{type(module).__name__} has no submodule {self.submodule!r}; it has "
                    f"{', '.join(name for name in named if name)}."
                )
        handles = [
            module.get_submodule(self.submodule).register_forward_hook(
                lambda _, inputs, output: None if _unseen else calls.append(Call(inputs, output))
            )
        ]
        handles += [
            sub.register_forward_hook(functools.partial(_note_candidate, candidates, name))
            for name, sub in named.items()
            if name and name != self.submodule
        ]
        try:
            yield calls
        except BaseException:
            calls.clear()
            raise
        finally:
            for handle in handles:
                handle.remove()
        if calls:
            self._has_fired = True
            return
        named = named or dict(module.named_modules())
        wanted = repr(self.submodule) if self.submodule else f"{type(module).__name__}.forward"
        called = ", ".join(f"{name} {list(shape)}" for name, shape in candidates.items())
        which = f"Called with an output [batch, columns] were: {called}" if called else f"It has {', '.join(named)[2:]}"
        hint = "" if self.submodule else " (`self.forward(x)` goes past hooks, `self(x)` does not)"
        self._why_silent = (
            f"{wanted} was not called during the step, so there is nothing to read{hint}. Name a submodule that the "
            f"step calls. {which}."
        )
        if required:
            self.refuse_silence()

    def refuse_silence(self) -> NoReturn:
        """Raise the error about the last step, in which the submodule was not called.

        Raises:
            MisconfigurationException: Always.
        """
        raise MisconfigurationException(self._why_silent)


def _note_candidate(
    candidates: dict[str, tuple[int, ...]], name: str, _: nn.Module, inputs: tuple[Any, ...], output: Any
) -> None:
    if isinstance(output, Tensor) and output.ndim == 2 and output.is_floating_point():
        candidates[name] = tuple(output.shape)
