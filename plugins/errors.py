"""Errors that several plugins raise."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException


class NonFiniteUpdateError(RuntimeError):
    """An update with NaN or infinite entries was about to reach the weights."""


class CheckpointMismatchError(MisconfigurationException):
    """A checkpoint was written with other settings."""
