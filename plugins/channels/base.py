"""What channels and receivers hand back, and the contract of every channel."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from groundwire.plugins.random import Key

_COLUMNS = 1 << 13  # of symbols that are converted at a time


@dataclass(frozen=True, kw_only=True)
class Reception:
    """What came out of a channel in one round, and what each device spent on it.

    Args:
        symbols: Received symbols, shape ``(s,)`` for devices that are superposed in the air.
        energy: Energy that each device spent, ``||x_m||^2``, shape ``(M,)``, float64, on the device of the symbols.
        channel_uses: Channel uses that the round took, real or complex as the channel says.
    """

    symbols: Tensor
    energy: Tensor
    channel_uses: int


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What a decoder found, and how it went; tensors, so that no accelerator has to wait.

    Args:
        x: Estimates, shape ``(..., d)``, dtype and device of the measurements.
        iterations: Iterations that each row ran, shape ``(...)``, int64.
        residual: ``||v - A x|| / ||v||`` of each row, shape ``(...)``; 0 where ``v = 0``.
        diverged: Rows whose iteration blew up, or that were not finite, shape ``(...)``, bool.
    """

    x: Tensor
    iterations: Tensor
    residual: Tensor
    diverged: Tensor


class Channel(nn.Module, ABC):
    """Maps the symbols of ``M`` devices, shape ``(M, s)``, to what the receiver hears.

    A channel knows nothing of gradients, and never scales what it is given: a device that sends more than its budget
    is seen in :attr:`Reception.energy`. All draws come from the key, so a channel has no random state to save.
    """

    @abstractmethod
    def forward(self, x: Tensor, key: Key) -> Reception:
        """Send symbols ``(M, s)``; ``key`` names the devices (one a row) and the round of the draws."""


def check_noise_var(noise_var: float) -> float:
    """Return ``noise_var`` as a float, or refuse it.

    Args:
        noise_var: Noise variance per channel use, linear; 0 is the noiseless channel.

    Raises:
        ValueError: If it is negative, infinite or not a number.
    """
    if not (noise_var >= 0 and math.isfinite(noise_var)):
        raise ValueError(
            f"`noise_var` is a variance per channel use (linear, not dB): it must be finite and >= 0, where 0 is the "
            f"noiseless channel; got {noise_var}."
        )
    return float(noise_var)


def check_symbols(x: Tensor, key: Key) -> None:
    """Refuse what no real channel takes.

    Args:
        x: Symbols to send.
        key: Names one device a row.

    Raises:
        TypeError: If ``x`` is not float32 or float64.
        ValueError: If ``x`` is not a matrix with at least one column, or has another number of rows than ``key`` has
            devices.
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"Expected real symbols of dtype float32 or float64, got {x.dtype}; cast them before sending.")
    check_one_row_a_device(x, key)


def check_one_row_a_device(x: Tensor, key: Key) -> None:
    """Refuse symbols of any dtype that are not a matrix with at least one column and a row for each device.

    Args:
        x: Symbols to send.
        key: Names one device a row.

    Raises:
        ValueError: If they are not.
    """
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"Expected symbols of shape (M, s) with s >= 1 channel uses, got {tuple(x.shape)}.")
    if x.shape[0] != len(key):
        raise ValueError(f"Got symbols of {x.shape[0]} devices, but the key names {len(key)} devices.")


def energy_of(x: Tensor) -> Tensor:
    """``|x_m|^2`` of each row of real or complex symbols, shape ``(M,)``, float64."""
    numbers = torch.view_as_real(x).flatten(1) if x.is_complex() else x
    some = torch.split(numbers, _COLUMNS, dim=1)  # a copy of all in double precision would cost more than the sums
    return torch.stack([part.double().square().sum(1) for part in some]).sum(0)
