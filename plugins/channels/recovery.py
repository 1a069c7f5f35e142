"""Receivers that recover a long vector from few superposed measurements."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn
from typing_extensions import override

from groundwire.plugins.channels.base import Recovery
from groundwire.plugins.channels.functional import amp, bernoulli_gauss_amp, least_squares, minimax_alpha
from groundwire.plugins.channels.projection import Projection


class Decoder(nn.Module, ABC):
    """Estimates ``x`` from ``v = A x + noise``, given the projection ``A`` that was used to send."""

    @abstractmethod
    def forward(self, v: Tensor, projection: Projection) -> Recovery:
        """Decode measurements ``(..., s)`` to estimates ``(..., d)``; rows are independent."""


class AMP(Decoder):
    """Approximate message passing with soft thresholds: see :func:`~groundwire.plugins.channels.functional.amp`.

    It recovers a vector exactly where the non-zeros are few, up to a sharp phase transition (``k / s`` about 0.385 at
    ``s / d = 0.5``), and approximately beyond, the better the fewer entries hold most of the energy.

    Args:
        alpha: Threshold in units of the estimated noise level. By default 1.0 for a dense Gaussian projection and 1.2
            for a row-orthogonal one, or :func:`~groundwire.plugins.channels.functional.minimax_alpha` where that is
            higher (below ``s/d`` of about 0.4 and 0.3): with fewer measurements a fixed threshold blows up.
        num_iterations: Most iterations.
        damping: Weight of the new iterate, in (0, 1]; 1 is plain AMP.

    Raises:
        ValueError: If a setting is outside its range.

    Reference:
        Donoho, Maleki, Montanari, "Message-passing algorithms for compressed sensing", PNAS 106(45), 2009.
        arXiv:0907.3574

    Example:
        >>> AMP(num_iterations=40)
        AMP(alpha=None, num_iterations=40, damping=1.0)
    """

    def __init__(self, alpha: float | None = None, num_iterations: int = 25, damping: float = 1.0) -> None:
        super().__init__()
        if alpha is not None and not alpha > 0:
            raise ValueError(f"`alpha` must be > 0, or None for the projection's default, got {alpha}.")
        self.alpha = alpha
        self.num_iterations, self.damping = _check_iteration(num_iterations, damping)

    @override
    def forward(self, v: Tensor, projection: Projection) -> Recovery:
        return amp(v, projection, self._alpha_for(projection), self.num_iterations, damping=self.damping)

    def _alpha_for(self, projection: Projection) -> float:
        if self.alpha is not None:
            return self.alpha
        sampling = projection.num_rows / projection.numel
        return max(1.2 if projection.row_orthogonal else 1.0, minimax_alpha(sampling))

    @override
    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, num_iterations={self.num_iterations}, damping={self.damping}"


class BernoulliGaussAMP(Decoder):
    """AMP under a fitted Bernoulli-Gauss prior, for dense Gaussian projections only.

    More robust than :class:`AMP` where many entries matter. See
    :func:`~groundwire.plugins.channels.functional.bernoulli_gauss_amp`.

    Args:
        num_iterations: Most iterations.
        damping: Weight of the new iterate, in (0, 1]; 1 is plain AMP.

    Raises:
        ValueError: If a setting is outside its range.

    Reference:
        Vila, Schniter, "Expectation-Maximization Gaussian-Mixture Approximate Message Passing", IEEE Trans. Signal
        Process. 61(19), 2013. arXiv:1207.3107

    Example:
        >>> BernoulliGaussAMP()
        BernoulliGaussAMP(num_iterations=25, damping=1.0)
    """

    def __init__(self, num_iterations: int = 25, damping: float = 1.0) -> None:
        super().__init__()
        self.num_iterations, self.damping = _check_iteration(num_iterations, damping)

    @override
    def forward(self, v: Tensor, projection: Projection) -> Recovery:
        return bernoulli_gauss_amp(v, projection, self.num_iterations, damping=self.damping)

    @override
    def extra_repr(self) -> str:
        return f"num_iterations={self.num_iterations}, damping={self.damping}"


class LeastSquares(Decoder):
    """Minimum-norm least squares: linear, its error is ``1 - s/d`` of the energy whatever the vector.

    See :func:`~groundwire.plugins.channels.functional.least_squares`. Free for a row-orthogonal projection; for a dense
    one the first call factors the Gram matrix (``s^2 d`` operations, kept for later calls).

    Example:
        >>> LeastSquares()
        LeastSquares()
    """

    @override
    def forward(self, v: Tensor, projection: Projection) -> Recovery:
        return least_squares(v, projection)


def _check_iteration(num_iterations: int, damping: float) -> tuple[int, float]:
    if num_iterations < 1:
        raise ValueError(f"`num_iterations` must be at least 1, got {num_iterations}.")
    if not 0 < damping <= 1:
        raise ValueError(f"`damping`, the weight of the new iterate, must be in (0, 1], got {damping}.")
    return num_iterations, float(damping)
