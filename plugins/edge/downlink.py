"""What each device sees of the server's model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from groundwire.plugins.edge.part import Part
from groundwire.plugins.edge.round import Round
from groundwire.plugins.ledger import Cost


class Downlink(Part, ABC):
    """Brings the server's model to the devices at the beginning of a round."""

    exact: bool = False
    """Whether every device receives exactly the server's model: then no vector is built at all."""
    moves_server: bool = False
    """Whether the server's step starts from what all devices hold, ``(d,)``, instead of its own model."""

    def setup(self, *, numel: int, num_devices: int) -> None:  # a hook: most downlinks need nothing
        """Forget what was before, and allocate state for vectors of ``numel`` entries and ``num_devices`` devices."""

    def choose(self, round: Round) -> Tensor | None:  # a hook: most downlinks reach everybody
        """Which of the devices that the scheduler chose are reached, before any local work.

        Args:
            round: The round, of those devices.

        Returns:
            Rows of ``round.devices``, int64, on the CPU, ascending, at least one; None for all of them.
        """
        return None

    @abstractmethod
    def forward(self, model: Tensor, round: Round) -> Tensor:
        """The server's model ``(d,)`` to what the devices hold: ``(d,)`` for all alike, or ``(M, d)``."""

    @abstractmethod
    def cost(self, numel: int, round: Round) -> Cost:
        """What this round's broadcast of ``numel`` parameters costs; the energy is the server's, shape ``(1,)``."""

    def metrics(self, round: Round) -> Mapping[str, Tensor | float]:  # a hook: most have nothing to say
        """Scalars of this round's broadcast worth logging, by name."""
        return {}


class PerfectDownlink(Downlink):
    """Every device receives the server's model exactly; one broadcast of 32 bits a parameter."""

    exact = True

    def forward(self, model: Tensor, round: Round) -> Tensor:
        """The model, unchanged."""
        return model

    def cost(self, numel: int, round: Round) -> Cost:
        """One float32 broadcast."""
        return Cost(bits=32 * numel, bits_ideal=32 * numel)
