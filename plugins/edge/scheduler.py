"""Who takes part in a round."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from groundwire.plugins.edge.part import Part
from groundwire.plugins.random import stream


class Scheduler(Part, ABC):
    """Chooses, before any local work, which of the devices that have data this round take part."""

    sample_rate: float | None = None
    """Probability with which each device takes part, if that is decided for each by itself; None otherwise."""

    @abstractmethod
    def forward(self, device_ids: Tensor, *, round_index: int, seed: int) -> Tensor:
        """Rows of ``device_ids``, shape ``(M,)``, that take part: int64, on the CPU, ascending; there may be none."""


class AllDevices(Scheduler):
    """Every device takes part in every round."""

    sample_rate = 1.0

    def forward(self, device_ids: Tensor, *, round_index: int, seed: int) -> Tensor:
        """All rows."""
        return torch.arange(len(device_ids))


class UniformSample(Scheduler):
    """A uniform sample of the devices without replacement, drawn anew every round.

    Args:
        num_scheduled: Devices that take part, ``K``.

    Raises:
        ValueError: If ``num_scheduled`` is below 1.

    Reference:
        McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017.
        arXiv:1602.05629
    """

    def __init__(self, num_scheduled: int) -> None:
        super().__init__()
        if num_scheduled < 1:
            raise ValueError(f"`num_scheduled` must be at least 1, got {num_scheduled}.")
        self.num_scheduled = num_scheduled

    def forward(self, device_ids: Tensor, *, round_index: int, seed: int) -> Tensor:
        """``num_scheduled`` distinct rows.

        Args:
            device_ids: Ids of the devices that have data this round, shape ``(M,)``.
            round_index: Round number.
            seed: Root seed.

        Returns:
            Rows that take part, shape ``(num_scheduled,)``, ascending.

        Raises:
            ValueError: If fewer devices have data.
        """
        if self.num_scheduled > len(device_ids):
            raise ValueError(
                f"`num_scheduled` is {self.num_scheduled}, but only {len(device_ids)} devices have data in round "
                f"{round_index}. Lower it, or let more devices take part in the data."
            )
        generator = stream(seed, purpose="schedule", round=round_index)
        return torch.randperm(len(device_ids), generator=generator)[: self.num_scheduled].sort().values


class PoissonSample(Scheduler):
    """Each device takes part by a coin of its own, so that the number of participants varies and may be zero.

    This is what accountants of device-level privacy assume. In a round without participants the server's estimate is
    what the uplink makes of zero updates (noise, if it is private), and ``round/empty`` is logged as 1.

    Args:
        sample_rate: Probability with which a device takes part, in (0, 1].

    Raises:
        ValueError: If it is out of range.

    Reference:
        McMahan, Ramage, Talwar, Zhang, "Learning Differentially Private Recurrent Language Models", ICLR 2018.
        arXiv:1710.06963

    Example:
        >>> PoissonSample(0.3)(torch.arange(10), round_index=0, seed=0)
        tensor([6, 9])
    """

    def __init__(self, sample_rate: float) -> None:
        super().__init__()
        if not 0 < sample_rate <= 1:
            raise ValueError(f"`sample_rate` is a probability in (0, 1], got {sample_rate}.")
        self.sample_rate = sample_rate

    def forward(self, device_ids: Tensor, *, round_index: int, seed: int) -> Tensor:
        """Rows that take part, ascending.

        Args:
            device_ids: Ids of the devices that have data this round, shape ``(M,)``.
            round_index: Round number.
            seed: Root seed.

        Returns:
            Rows, possibly none.
        """
        assert self.sample_rate is not None
        generator = stream(seed, purpose="schedule", round=round_index)
        coins = torch.rand(len(device_ids), generator=generator, dtype=torch.float64)
        return (coins < self.sample_rate).nonzero().flatten()
