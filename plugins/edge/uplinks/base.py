"""The contract of every uplink: the devices' updates in, what the server received out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from groundwire.plugins.edge.part import Part
from groundwire.plugins.edge.round import Round
from groundwire.plugins.layout import ParameterLayout
from groundwire.plugins.ledger import Cost
from groundwire.plugins.privacy import PrivacyStatement


@dataclass(frozen=True, eq=False, kw_only=True)
class Received:
    """What the server holds after the uplink.

    Args:
        rows: Shape ``(R, d)``: one row a device (digital), or a single one (superposed in the air).
        weights: Weight of each row in the aggregate, shape ``(R,)``, summing to one.
        cost: What the transmission cost.
        metrics: Scalars worth logging, by name, for example the decoder's residual.
        senders: Which of ``round.devices`` each row came from, int64, shape ``(R,)``, where not all have sent one.
    """

    rows: Tensor
    weights: Tensor
    cost: Cost
    metrics: Mapping[str, Tensor | float] = field(default_factory=dict)
    senders: Tensor | None = None

    @cached_property
    def gram(self) -> Tensor:
        """Inner products of all rows, shape ``(R, R)``, float64, computed once."""
        rows = self.rows.double()
        return rows @ rows.T


class Uplink(Part, ABC):
    """Carries updates from the devices to the server. State (error memory) is keyed by device id."""

    superposes: bool = False
    """Whether the server gets one row for all devices, as their symbols add up in the air."""
    needs_losses: bool = False
    """Whether devices tell the server their losses (:attr:`Round.losses`), a number each, beside their updates."""

    def setup(self, *, layout: ParameterLayout, num_devices: int, seed: int) -> None:  # a hook: some need nothing
        """Forget what was before, and allocate state for updates of that layout from ``num_devices`` devices."""

    @abstractmethod
    def forward(self, updates: Tensor, round: Round) -> Received:
        """Send ``updates``, shape ``(M, d)``, row ``i`` from device ``round.devices[i]``.

        They are not to be modified, nor kept beyond the round: their memory is used again.
        """

    @property
    def promises_privacy(self) -> bool:
        """Whether :meth:`privacy` states a guarantee."""
        return False

    def privacy(self, *, rounds: int) -> PrivacyStatement | None:  # most promise nothing
        """What the first ``rounds`` rounds guarantee the devices; None if nothing."""
        return None

    def is_spent(self, planned: int | None) -> bool:
        """Whether a privacy budget does not pay for a further round; ``planned`` are the rounds of the whole run."""
        return False
