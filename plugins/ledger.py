"""What communication costs: counted by the parts that send, added up by the strategy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Cost:
    """Cost of one transmission of all devices together.

    Args:
        bits: Bits that travelled, padding included (digital links).
        bits_ideal: The same messages under an ideal code.
        channel_uses: Real channel uses that the transmission occupied.
        energy: Transmit energy of each device, shape ``(M,)``, in units where the channel's noise variance is given
            (energy of the whole round, not per symbol); of the server on the downlink, shape ``(1,)``; None if the link
            has no notion of energy.
    """

    bits: int = 0
    bits_ideal: float = 0.0
    channel_uses: int = 0
    energy: Tensor | None = None


class Ledger:
    """Cumulative cost of a run: exact integers for bits and channel uses, float64 for energy.

    Args:
        num_devices: Devices of the run; energy is also kept for each of them.

    Example:
        >>> ledger = Ledger(num_devices=2)
        >>> ledger.add(uplink=Cost(bits=64, channel_uses=10), downlink=Cost(bits=32), devices=(0, 1))["uplink/bits"]
        64
        >>> ledger.totals["uplink/bits"], ledger.rounds
        (64, 1)
    """

    def __init__(self, num_devices: int) -> None:
        self.rounds = 0
        self.totals: dict[str, Any] = {}
        self.energy_per_device = torch.zeros(num_devices, dtype=torch.float64)

    def add(self, *, uplink: Cost, downlink: Cost, devices: tuple[int, ...]) -> dict[str, Any]:
        """Book one round.

        Args:
            uplink: What the devices spent.
            downlink: What the server spent.
            devices: Ids of the devices that took part, in the order of ``uplink.energy``.

        Returns:
            This round's entries by the names under which they are logged.
        """
        entries: dict[str, Any] = {"uplink/bits": uplink.bits, "downlink/bits": downlink.bits}
        if uplink.bits_ideal != uplink.bits:
            entries["uplink/bits_ideal"] = uplink.bits_ideal
        if uplink.channel_uses:
            entries["uplink/channel_uses"] = uplink.channel_uses
        if downlink.bits_ideal != downlink.bits:
            entries["downlink/bits_ideal"] = downlink.bits_ideal
        if downlink.channel_uses:
            entries["downlink/channel_uses"] = downlink.channel_uses
        if downlink.energy is not None:
            entries["downlink/energy"] = downlink.energy.to(torch.float64).sum()
        if uplink.energy is not None:
            energy = uplink.energy.to(torch.float64)
            entries["uplink/energy"] = energy.sum()
            self.energy_per_device = self.energy_per_device.to(energy.device)
            self.energy_per_device[torch.tensor(devices, device=energy.device)] += energy
        for name, value in entries.items():
            self.totals[name] = self.totals.get(name, 0) + value
        self.rounds += 1
        return entries

    @property
    def average_power(self) -> Tensor:
        """Energy a round that each device has spent on average, shape ``(num_devices,)``."""
        return self.energy_per_device / max(self.rounds, 1)

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on counting."""
        return {
            "rounds": self.rounds,
            "totals": {k: v.clone() if isinstance(v, Tensor) else v for k, v in self.totals.items()},
            "energy_per_device": self.energy_per_device.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where another ledger stopped."""
        self.rounds = state["rounds"]
        self.totals = dict(state["totals"])
        self.energy_per_device = state["energy_per_device"].clone()


def is_logging_step(trainer: pl.Trainer, index: int, planned: int | None) -> bool:
    """The steps on which loggers record, the first and the last; one call of ``log`` costs more than a round may.

    Args:
        trainer: Of the run.
        index: Of the round, from 0.
        planned: Rounds of the whole run, if it has an end.

    Returns:
        Whether to log the round.
    """
    every = max(trainer.log_every_n_steps, 1)  # type: ignore[attr-defined]
    return (trainer.global_step + 1) % every == 0 or index == 0 or index + 1 == planned


def log_costs(
    module: pl.LightningModule, entries: dict[str, Any], ledger: Ledger, others: dict[str, Any] | None = None
) -> None:
    """Log what a round cost and what the run has cost so far, in float64: bits are integers beyond float32's 2^24.

    Args:
        module: Whose ``log`` it goes through.
        entries: What :meth:`Ledger.add` returned for the round.
        ledger: Of the run.
        others: Further values of the round.
    """
    logged = entries | {f"{name}_cumulative": ledger.totals[name] for name in entries} | (others or {})
    exact = {name: torch.as_tensor(value, dtype=torch.float64, device=module.device) for name, value in logged.items()}
    module.log_dict(exact, on_step=True, on_epoch=False, batch_size=1)
