"""Who takes part in a round."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from groundwire.plugins.edge.part import Part
from groundwire.plugins.random import stream


class Scheduler(Part, ABC):
    """Chooses, before any local work, which of the devices that have data this round take part."""

    @abstractmethod
    def forward(self, device_ids: Tensor, *, round_index: int, seed: int) -> Tensor:
        """Rows of ``device_ids``, shape ``(M,)``, that take part: int64, on the CPU, ascending, at least one."""


class AllDevices(Scheduler):
    """Every device takes part in every round."""

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
