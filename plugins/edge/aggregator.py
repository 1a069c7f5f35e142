"""From what the server received to one update."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

from torch import Tensor
from typing_extensions import override

from groundwire.plugins.edge.part import Part
from groundwire.plugins.edge.round import Round
from groundwire.plugins.edge.uplinks.base import Received

Need = Literal["rows", "losses"]


class Aggregator(Part, ABC):
    """Combines received rows into one vector; pure in its inputs."""

    needs: frozenset[Need] = frozenset()
    """What it looks at beside a weighted mean: ``"rows"`` of single devices (and :attr:`Received.gram`, their inner
    products), which no uplink has that superposes; ``"losses"`` of single devices (:attr:`Round.losses`)."""

    @property
    def metrics(self) -> Mapping[str, Tensor | float]:
        """Scalars of the last round worth logging, by name; most have nothing to say."""
        return {}

    @abstractmethod
    def forward(self, received: Received, round: Round) -> Tensor:
        """Rows ``(R, d)`` with weights ``(R,)``, summing to one, to one vector ``(d,)``."""


class WeightedMean(Aggregator):
    """``sum_r weights[r] * rows[r]``: FedSGD's and FedAvg's rule.

    Reference:
        McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017.
        arXiv:1602.05629
    """

    @override
    def forward(self, received: Received, round: Round) -> Tensor:
        """The weighted mean; a single row comes back as it is."""
        rows = received.rows
        return rows[0] if rows.shape[0] == 1 else received.weights.to(rows.dtype) @ rows


class MajorityVote(Aggregator):
    """The sign that the heavier part of the devices sent, entry by entry; 0 on a tie.

    Rows are meant to be signs (:class:`groundwire.plugins.compression.SignSGD`); any row counts by its sign.

    Reference:
        Bernstein et al., "signSGD: Compressed Optimisation for Non-Convex Problems", ICML 2018. arXiv:1802.04434
    """

    @override
    def forward(self, received: Received, round: Round) -> Tensor:
        """Entries in {-1, 0, 1}, shape ``(d,)``."""
        rows = received.rows
        return (received.weights.to(rows.dtype) @ rows.sign()).sign()
