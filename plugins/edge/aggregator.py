"""From what the server received to one update."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from groundwire.plugins.edge.part import Part


class Aggregator(Part, ABC):
    """Combines received rows into one vector; pure in its inputs."""

    @abstractmethod
    def forward(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Rows ``(R, d)`` with weights ``(R,)``, summing to one, to one vector ``(d,)``."""


class WeightedMean(Aggregator):
    """``sum_r weights[r] * rows[r]``: FedSGD's and FedAvg's rule.

    Reference:
        McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017.
        arXiv:1602.05629
    """

    def forward(self, rows: Tensor, weights: Tensor) -> Tensor:
        """The weighted mean; a single row comes back as it is."""
        return rows[0] if rows.shape[0] == 1 else weights.to(rows.dtype) @ rows


class MajorityVote(Aggregator):
    """The sign that the heavier part of the devices sent, entry by entry; 0 on a tie.

    Rows are meant to be signs (:class:`groundwire.plugins.compression.SignSGD`); any row counts by its sign.

    Reference:
        Bernstein et al., "signSGD: Compressed Optimisation for Non-Convex Problems", ICML 2018. arXiv:1802.04434
    """

    def forward(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Entries in {-1, 0, 1}, shape ``(d,)``."""
        return (weights.to(rows.dtype) @ rows.sign()).sign()
