"""Replaces the train loader on its way to the Trainer's loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn


def replace_train_loader(trainer: pl.Trainer, replace: Callable[[Any], Any]) -> Callable[[], None]:
    """Let the fit train on ``replace(loader)`` instead of on the user's train loader.

    All loaders pass the strategy's ``process_dataloader``, after Lightning has given them a sampler for several
    processes. Call it in ``setup``: a module's ``configure_optimizers`` may have the loader built. What was replaced
    by a callback further up in the Trainer's list is replaced first.

    Args:
        trainer: The Trainer, in ``fit``.
        replace: From the loader that would be used to the one to use. Lightning may call it more than once.

    Returns:
        A function that puts back what was there; calling it again does nothing.
    """
    attributes = trainer.strategy.__dict__
    before = attributes.get("process_dataloader")  # another callback's, or None for the class's own
    inner = trainer.strategy.process_dataloader

    def process_dataloader(loader: Any) -> Any:
        is_training = trainer.state.fn == TrainerFn.FITTING and trainer.training
        loader = inner(loader)
        return replace(loader) if is_training else loader

    attributes["process_dataloader"] = process_dataloader

    def undo() -> None:
        if attributes.get("process_dataloader") is not process_dataloader:
            return
        if before is None:
            del attributes["process_dataloader"]
        else:
            attributes["process_dataloader"] = before

    return undo
