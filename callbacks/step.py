"""The one way in which a callback changes a training step."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from typing_extensions import override

Step = Callable[[Any], Any]
"""Runs the rest of the step on a batch and returns what ``training_step`` returns."""

_MARK = "_groundwire_step_callbacks"


class StepCallback(pl.Callback, ABC):
    """A callback that surrounds ``training_step``.

    Subclasses write :meth:`around_step`. Callbacks nest in the order of the Trainer's list, the first outermost. The
    module's ``training_step`` is shadowed by an instance attribute while ``fit`` runs, and put back afterwards, also
    after an exception. It works in a plain Trainer, under DDP, and inside ``EdgeStrategy``, where it surrounds the
    step of each device: tensor code in it must be vmap-safe there (no ``.item()``, no branch on a tensor's value).

    Example:
        >>> class Doubled(StepCallback):
        ...     def around_step(self, step, batch):
        ...         return 2 * step(batch)
    """

    @abstractmethod
    def around_step(self, step: Step, batch: Any) -> Any:
        """Run the step zero or more times, on this or another batch, and return its output, changed or not.

        Args:
            step: The rest of the step: the next callback's ``around_step``, or the module's own ``training_step``.
            batch: What ``training_step`` was to receive.

        Returns:
            What ``training_step`` may return: a loss, or a dict with one under ``"loss"``.
        """

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit" or hasattr(pl_module.__dict__.get("training_step"), _MARK):
            return
        callbacks = [c for c in trainer.callbacks if isinstance(c, StepCallback)]  # type: ignore[attr-defined]
        pl_module.__dict__["training_step"] = _surround(pl_module, callbacks)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        _put_back(pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        _put_back(pl_module)


def _surround(pl_module: pl.LightningModule, callbacks: list[StepCallback]) -> Callable[..., Any]:
    found = pl_module.training_step

    @functools.wraps(found)  # Lightning reads the signature to see whether the step takes a batch index
    def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
        step: Step = lambda b: found(b, *args, **kwargs)
        for callback in reversed(callbacks):
            step = functools.partial(callback.around_step, step)
        return step(batch)

    setattr(training_step, _MARK, pl_module.__dict__.get("training_step"))
    return training_step


def _put_back(pl_module: pl.LightningModule) -> None:
    current = pl_module.__dict__.get("training_step")
    if not hasattr(current, _MARK):
        return
    before = getattr(current, _MARK)
    if before is None:
        del pl_module.__dict__["training_step"]
    else:
        pl_module.__dict__["training_step"] = before


@dataclass(frozen=True)
class Call:
    """One forward call that a :class:`Tap` saw.

    Args:
        inputs: Positional arguments of ``forward``.
        output: What it returned, with its graph.
    """

    inputs: tuple[Any, ...]
    output: Any


class Tap:
    """Reads what a submodule produces during a step, without touching the module's code.

    Args:
        submodule: Dotted name of the submodule, as in ``named_modules()``; empty for the LightningModule's own
            ``forward``.

    Example:
        >>> module, tap = nn.Sequential(nn.Linear(2, 3), nn.ReLU()), Tap("0")
        >>> import torch
        >>> with tap.open(module) as calls:
        ...     _ = module(torch.zeros(4, 2))
        >>> calls[0].output.shape
        torch.Size([4, 3])
    """

    def __init__(self, submodule: str = "") -> None:
        self.submodule = submodule

    @contextmanager
    def open(self, module: nn.Module) -> Iterator[list[Call]]:
        """Collect the submodule's calls while the context is open; the hook is removed afterwards, come what may.

        Args:
            module: The module in which to look.

        Yields:
            A list that grows by one :class:`Call` a forward.

        Raises:
            MisconfigurationException: If there is no such submodule, or it was not called.
        """
        named = dict(module.named_modules())
        if self.submodule not in named:
            raise MisconfigurationException(
                f"{type(module).__name__} has no submodule {self.submodule!r}; it has "
                f"{', '.join(name for name in named if name)}."
            )
        calls: list[Call] = []
        handle = named[self.submodule].register_forward_hook(
            lambda _, inputs, output: calls.append(Call(inputs, output))
        )
        try:
            yield calls
        finally:
            handle.remove()
        if not calls:
            wanted = repr(self.submodule) if self.submodule else f"{type(module).__name__}.forward"
            raise MisconfigurationException(
                f"{wanted} was not called during the step, so there is nothing to read. Name a submodule that "
                f"`training_step` calls: {', '.join(name for name in named if name)}."
            )
