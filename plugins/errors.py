"""Errors that several plugins raise."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.fabric.utilities.exceptions import MisconfigurationException


class NonFiniteUpdateError(RuntimeError):
    """An update with NaN or infinite entries was about to reach the weights."""


class CheckpointMismatchError(MisconfigurationException):
    """A checkpoint was written with other settings."""


def check_same_settings(here: Mapping[str, str], there: Mapping[str, str], who: str) -> None:
    """Refuse to go on from a checkpoint that was written with other settings.

    Args:
        here: Settings by name.
        there: Those of the checkpoint.
        who: Whose they are.

    Raises:
        CheckpointMismatchError: If one differs.
    """
    differing = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    if differing:
        raise CheckpointMismatchError(
            f"The checkpoint was written by {who} with other settings: "
            + "; ".join(f"{n} was {there.get(n)!r} and is now {here.get(n)!r}" for n in differing)
            + ". Resume with the same settings, or start a new run from the weights alone "
            "(`LightningModule.load_from_checkpoint`)."
        )
