"""Aggregators that look after the devices of large loss: AdaFed and q-FFL."""

from __future__ import annotations

import math
from typing import Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.edge.aggregator import Aggregator
from groundwire.plugins.edge.fairness import adafed_coefficients, minimum_norm_weights, q_ffl_coefficients
from groundwire.plugins.edge.round import Round
from groundwire.plugins.edge.uplinks.base import Received

_COLUMNS = 1 << 16  # that are converted at a time


class AdaFed(Aggregator):
    """A direction along which every device's loss falls, and the larger ones fall faster.

    With ``r_k = f_k^gamma`` it is the vector ``v`` in the span of the devices' updates ``g_k`` with
    ``<g_k, v> = r_k |v|^2`` for all of them. Weights of the devices do not enter. As losses get smaller the step grows:
    updates of the same size at losses ``c`` times as large give ``c^(-gamma)`` times the step. With nearly parallel updates
    and differing losses the exact direction is short and almost orthogonal to their mean; ``ridge`` bounds that. Should
    some loss not fall along the result, the point of least norm in the convex hull of the updates is taken instead.

    Devices whose update is zero are left out. If all updates or all losses are zero, so is the result.

    Args:
        gamma: Exponent of the losses, ``>= 0``; 0 lets all losses fall alike.
        ridge: Added to the diagonal of the matrix of inner products, in units of its mean. A large one goes towards
            ``sum_k r_k g_k / sum_k r_k^2``.
        loss_scale: ``"mean"`` divides the losses by their mean over the devices, so that only their ratios count;
            ``"none"`` takes them as they are.
        rescale: ``"mean_norm"`` gives the result the norm of the updates' weighted mean; ``"none"`` leaves it.

    Raises:
        ValueError: If an argument is out of range; in a round if a loss is negative or not finite, or updates depend
            linearly on each other and ``ridge`` is 0.

    Example:
        >>> aggregator = AdaFed(gamma=1.0)

    Reference:
        Mohajer Hamidi, Yang, "AdaFed: Fair Federated Learning via Adaptive Common Descent Direction", TMLR 2024.
        arXiv:2401.04993 (closed form instead of Gram-Schmidt; ridge, fallback, ``loss_scale`` and ``rescale`` are ours)
    """

    needs = frozenset({"rows", "losses"})

    def __init__(
        self,
        gamma: float = 1.0,
        ridge: float = 1e-6,
        loss_scale: Literal["none", "mean"] = "none",
        rescale: Literal["none", "mean_norm"] = "none",
    ) -> None:
        super().__init__()
        if not 0 <= gamma < math.inf:
            raise ValueError(f"`gamma` must be finite and >= 0, got {gamma}.")
        if not 0 <= ridge < math.inf:
            raise ValueError(f"`ridge` must be finite and >= 0, got {ridge}.")
        if loss_scale not in ("none", "mean"):
            raise ValueError(f"`loss_scale` must be 'none' or 'mean', got {loss_scale!r}.")
        if rescale not in ("none", "mean_norm"):
            raise ValueError(f"`rescale` must be 'none' or 'mean_norm', got {rescale!r}.")
        self.gamma = float(gamma)
        self.ridge = float(ridge)
        self.loss_scale = loss_scale
        self.rescale = rescale
        self._metrics: dict[str, Tensor | float] = {}

    @property
    def metrics(self) -> dict[str, Tensor | float]:
        """Of the last round: whether it fell back, and the least slope over ``rate |v|^2``, 1 without a ridge."""
        return self._metrics

    @override
    def forward(self, received: Received, round: Round) -> Tensor:
        """The direction.

        Args:
            received: Rows ``(M, d)``, one a device of the round.
            round: With the devices' losses.

        Returns:
            Shape ``(d,)``.

        Raises:
            ValueError: As the class says.
        """
        rows, gram = received.rows, received.gram
        losses = losses_of(received, round, self).to(gram)
        if self.gamma > 0:
            _refuse_negative(losses, round, f"AdaFed(gamma={self.gamma})")
        if self.loss_scale == "mean":
            losses = losses / losses.mean().clamp_min(torch.finfo(losses.dtype).tiny)
        rates = losses.pow(self.gamma) if self.gamma > 0 else torch.ones_like(losses)
        kept = gram.diagonal() > 0
        self._metrics = {"adafed/fallback": 0.0, "adafed/least_slope": 0.0}
        if not bool(kept.all()) and not round.is_empty:
            rank_zero_warn("AdaFed leaves out devices whose update is zero.")
        if not bool((rates * kept > 0).any()):
            return torch.zeros_like(rows[0])
        coefficients = torch.zeros_like(rates)
        coefficients[kept] = self._coefficients(gram[kept][:, kept], rates[kept])
        if self.rescale == "mean_norm":
            weights = received.weights.to(gram)
            coefficients = coefficients * (_norm(weights, gram) / _norm(coefficients, gram).clamp_min(1e-300))
        return _combined(coefficients, rows)

    def _coefficients(self, gram: Tensor, rates: Tensor) -> Tensor:
        found = adafed_coefficients(gram, rates, self.ridge)
        moving = rates > 0  # a device whose loss is 0 has nothing to lose
        slopes = (gram @ found)[moving] / (rates[moving] * _norm(found, gram).square())
        if bool((slopes > 0).all()):
            self._metrics["adafed/least_slope"] = slopes.min()
            return found
        self._metrics["adafed/fallback"] = 1.0
        return minimum_norm_weights(gram)


class QFFL(Aggregator):
    """q-FedAvg: devices of larger loss count for more, and the step is as long as the losses' curvature allows.

    With ``q = 0`` it is the weighted mean. Use it with ``LocalSGD`` of the same ``lr``, and an SGD of rate 1 as the
    module's own optimizer; one local step (``num_steps=1``) is q-FedSGD. The losses are those of the round's batches (with
    several local steps: of the samples of the first).

    Args:
        q: How much larger losses count for more, ``>= 0``.
        lr: Learning rate of the devices' local steps; its inverse stands for the Lipschitz constant of the gradients.

    Raises:
        ValueError: If an argument is out of range; in a round if a loss is negative or not finite.

    Example:
        >>> aggregator = QFFL(q=1.0, lr=0.1)

    Reference:
        Li, Sanjabi, Beirami, Smith, "Fair Resource Allocation in Federated Learning", ICLR 2020, Algorithm 2.
        arXiv:1905.10497 (there devices are sampled by their sample counts and count alike; here all are weighted by them)
    """

    needs = frozenset({"rows", "losses"})

    def __init__(self, q: float, lr: float) -> None:
        super().__init__()
        if not 0 <= q < math.inf:
            raise ValueError(f"`q` must be finite and >= 0, got {q}.")
        if not 0 < lr < math.inf:
            raise ValueError(f"`lr`, that of the devices' local steps, must be finite and > 0, got {lr}.")
        self.q = float(q)
        self.lr = float(lr)

    @override
    def forward(self, received: Received, round: Round) -> Tensor:
        """The step.

        Args:
            received: Rows ``(M, d)``, one a device of the round: ``theta - theta_k``.
            round: With the devices' losses.

        Returns:
            Shape ``(d,)``.

        Raises:
            ValueError: As the class says.
        """
        rows = received.rows
        losses = losses_of(received, round, self)
        _refuse_negative(losses, round, f"QFFL(q={self.q})")
        squares = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()
        coefficients = q_ffl_coefficients(losses, squares, received.weights, self.q, self.lr)
        return coefficients.to(rows.dtype) @ rows


def losses_of(received: Received, round: Round, who: Aggregator) -> Tensor:
    """The devices' losses, one for each row.

    Args:
        received: Rows.
        round: The round.
        who: Who asks.

    Returns:
        Shape ``(R,)``.

    Raises:
        ValueError: If there are none, or not as many as rows.
    """
    name = type(who).__name__
    if round.losses is None:
        raise ValueError(f"{name} needs the devices' losses, but the round has none: they are known after local work.")
    losses = round.losses if received.senders is None else round.losses[received.senders]
    if len(losses) != len(received.rows):
        raise ValueError(
            f"{name} needs a loss for each row, but {len(received.rows)} rows came from {len(losses)} devices. Use an "
            "uplink that brings one row of every device."
        )
    return losses


def _refuse_negative(losses: Tensor, round: Round, who: str) -> None:
    wrong = ~((losses >= 0) & torch.isfinite(losses))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"{who} needs finite losses >= 0 of every device; device {round.devices[row]} has {float(losses[row])} in round "
            f"{round.index}. Use a loss that cannot be negative, such as cross entropy."
        )


def _norm(coefficients: Tensor, gram: Tensor) -> Tensor:
    """``|sum_k coefficient_k g_k|``."""
    return (coefficients @ gram @ coefficients).clamp_min(0).sqrt()


def _combined(coefficients: Tensor, rows: Tensor) -> Tensor:
    """The sum of rows, in double precision: those of nearly equal devices cancel."""
    columns = torch.split(rows, _COLUMNS, dim=1)
    return torch.cat([coefficients @ part.to(coefficients) for part in columns]).to(rows.dtype)
