"""What a method asks of the data: the samples to forget, and those to retain."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol, TypeGuard, runtime_checkable

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

Part = Literal["forget", "retain"]


@runtime_checkable
class ForgetRetainData(Protocol):
    """The interface of ``groundwire.datamodules.ForgetRetain``.

    Attributes:
        earlier: Rows of the training data that earlier requests have removed, shape ``(k,)``, int64.
    """

    earlier: Tensor

    @property
    def forget_indices(self) -> Tensor:
        """Rows of the training data to forget, ascending, shape ``(m,)``, int64."""

    @property
    def retain_indices(self) -> Tensor:
        """Rows that remain; raises where retained data must not be touched."""

    @property
    def retain_access(self) -> bool:
        """Whether retained data may be touched."""

    @property
    def trained_on(self) -> Tensor:
        """Rows that the model was trained on at first."""

    @property
    def data_digest(self) -> str | None:
        """SHA-256 of the training data; None where retained data must not be read for it and no checkpoint tells it."""

    def batches(
        self, part: Part | Literal["earlier"], batch_size: int | None = None
    ) -> Iterable[tuple[Tensor, Tensor]]:
        """All samples of a part, or those that earlier requests removed, once, in the order of their indices."""

    def serve(self, *parts: Part, in_turn: int | None = None) -> None:
        """Which parts a training batch has, and for how many epochs they come in turn."""

    def adopt(self, checkpoint: Mapping[str, Any]) -> None:
        """Take over which samples a checkpoint was trained on, and which it has forgotten before."""


def tells_what_to_forget(datamodule: object) -> TypeGuard[ForgetRetainData]:
    """Whether a datamodule has the interface, by its class.

    ``isinstance`` may not be used: up to Python 3.11 it reads the object's properties, and so asks for the retained data
    (which raises where it must not be touched) and hashes all of the training data.
    """
    needed = ("forget_indices", "retain_indices", "data_digest", "batches", "serve", "adopt")
    return all(hasattr(type(datamodule), name) for name in needed)


def forget_retain_data(trainer: pl.Trainer, who: str) -> ForgetRetainData:
    """The Trainer's datamodule, which must tell what to forget.

    Args:
        trainer: The Trainer.
        who: Needs it; for the message.

    Returns:
        The datamodule.

    Raises:
        MisconfigurationException: If it is another one.
    """
    data = getattr(trainer, "datamodule", None)
    if not tells_what_to_forget(data):
        raise MisconfigurationException(
            f"{who} needs to know what to forget: pass datamodule=ForgetRetain(your_datamodule, ...) of "
            f"groundwire.datamodules to `trainer.fit`, got {type(data).__name__}."
        )
    return data


def earlier_request(checkpoint: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a checkpoint says about the request to forget that it is the result of.

    Args:
        checkpoint: A Lightning checkpoint.

    Returns:
        The state of the ``ForgetRetain`` of that run, whatever its class was called, with at least ``forget`` and
        ``earlier`` (rows of the training data) and ``data_digest``; None if there was none.
    """
    needed = {"forget", "earlier", "data_digest"}
    states = (state for state in checkpoint.values() if isinstance(state, Mapping) and needed <= state.keys())
    return next(states, None)


def indices_digest(indices: Tensor) -> str:
    """SHA-256 of the sorted indices: what certificates name the forget set by."""
    return hashlib.sha256(indices.sort().values.cpu().numpy().tobytes()).hexdigest()
