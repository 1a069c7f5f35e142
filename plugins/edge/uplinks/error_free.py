"""A shared link without noise and without limit: what every other uplink is measured against."""

from __future__ import annotations

from torch import Tensor

from groundwire.plugins.edge.round import Round
from groundwire.plugins.edge.uplinks.base import Received, Uplink
from groundwire.plugins.ledger import Cost


class ErrorFree(Uplink):
    """Every update arrives as it was sent, at 32 bits an entry (64 for float64)."""

    def forward(self, updates: Tensor, round: Round) -> Received:
        """The updates themselves."""
        bits = 8 * updates.element_size() * updates.numel()
        return Received(rows=updates, weights=round.weights, cost=Cost(bits=bits, bits_ideal=bits))
