"""What no private training can go along with."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException


def refuse_tuners(trainer: pl.Trainer, method: str) -> None:
    """Refuse searches for a learning rate or a batch size on private data.

    Args:
        trainer: The Trainer.
        method: What makes its training private.

    Raises:
        MisconfigurationException: If it has such a callback, as its Tuner gives it for the time of a search.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, pl.callbacks.LearningRateFinder | pl.callbacks.BatchSizeFinder):
            raise MisconfigurationException(
                f"{type(callback).__name__} trains on the private data in steps that {method} does not account for. Choose "
                "the value on public data, or by trial within the budget."
            )
