"""The discrete Gaussian: its sampler, and what sums of its draws guarantee."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from groundwire.plugins.privacy.rqm import RDP_ORDERS, Floats, epsilon_of_rdp


def sample_discrete_gaussian(count: int, sigma: float, generator: torch.Generator) -> Tensor:
    """Draw integers ``k`` with probability proportional to ``exp(-k^2 / (2 sigma^2))``.

    By rejection from a discrete Laplace distribution, which is exact for any ``sigma`` but for the float64 in which
    the probabilities of acceptance are evaluated and the uniform draws: within some ``2^-50`` in total variation.

    Args:
        count: Integers to draw, at least 0.
        sigma: The parameter, at least 0, in steps of the grid; from 1 on it is the standard deviation up to ``1e-6``.
        generator: Where the draws come from; its device is that of the result.

    Returns:
        Integers, int64, shape ``(count,)``; zeros for ``sigma = 0``.

    Raises:
        ValueError: If ``sigma`` is negative or not finite.

    Reference:
        Canonne, Kamath, Steinke, "The Discrete Gaussian for Differential Privacy", NeurIPS 2020, Algorithm 3.
        arXiv:2004.00010

    Example:
        >>> sample_discrete_gaussian(200_000, 3.0, torch.Generator().manual_seed(0)).double().std().round(decimals=1)
        tensor(3., dtype=torch.float64)
    """
    if not 0 <= sigma < math.inf:
        raise ValueError(f"`sigma` must be at least 0 and finite, got {sigma}.")
    if sigma == 0 or count == 0:
        return torch.zeros(count, dtype=torch.int64, device=generator.device)
    scale = math.floor(sigma) + 1.0
    kept, missing = [], count
    while missing > 0:
        tries = 2 * missing + 16
        uniform = torch.rand(3, tries, generator=generator, dtype=torch.float64, device=generator.device)
        geometric = uniform[:2].neg_().log1p_().mul_(-scale).floor_()
        laplace = geometric[0] - geometric[1]
        accept = torch.exp((laplace.abs() - sigma**2 / scale).square_().div_(-2 * sigma**2))
        chosen = laplace[uniform[2] < accept][:missing]
        kept.append(chosen.to(torch.int64))
        missing -= len(chosen)
    return torch.cat(kept)


def rounded_norm_bound(norm: float, numel: int, beta: float) -> float:
    """A norm that a vector rounded stochastically to integers keeps with probability at least ``1 - beta``.

    Conditioned on it (by drawing again), it is the sensitivity of the rounded vector.

    Args:
        norm: L2 norm of the vector before rounding, in steps of the grid.
        numel: Entries of the vector.
        beta: Probability of a larger norm, in [0, 1); 0 gives the bound that no rounding exceeds.

    Returns:
        The smaller of ``norm + sqrt(d)`` and ``sqrt(norm^2 + d/4 + sqrt(2 log(1/beta)) (norm + sqrt(d)/2))``.

    Raises:
        ValueError: If ``beta`` is out of range or another argument negative.

    Reference:
        Kairouz, Liu, Steinke, ICML 2021, Theorem 1. arXiv:2102.06387

    Example:
        >>> round(rounded_norm_bound(100.0, numel=10_000, beta=0.5), 2)
        112.59
    """
    if not 0 <= beta < 1:
        raise ValueError(f"`beta` must be in [0, 1), got {beta}.")
    if norm < 0 or numel < 0:
        raise ValueError(f"`norm` and `numel` must be at least 0, got {norm} and {numel}.")
    surely = norm + math.sqrt(numel)
    if beta == 0:
        return surely
    slack = math.sqrt(2 * math.log(1 / beta)) * (norm + math.sqrt(numel) / 2)
    return min(surely, math.sqrt(norm**2 + numel / 4 + slack))


def discrete_gaussian_rdp(
    orders: Sequence[float], *, sensitivity: float, sigma: float, numel: int, num_shares: int = 1
) -> Floats:
    """Rényi guarantee of an integer vector to which several devices each add discrete Gaussian noise.

    One share alone is a discrete Gaussian and guarantees what the Gaussian does. Sums of several are not discrete
    Gaussians; the paper bounds how far they are from one by ``tau = 10 sum_{k<n} exp(-2 pi^2 sigma^2 k / (k + 1))``,
    which is negligible from ``sigma = 2`` or so on.

    Args:
        orders: Orders, each above 1.
        sensitivity: L2 norm by which the integer vectors of neighbours differ at most.
        sigma: Parameter of each share, in steps of the grid, positive; at least 1/2 for several shares.
        numel: Entries of the vector.
        num_shares: Shares of noise in the sum, at least 1.

    Returns:
        Divergences in nats, shape of ``orders``.

    Raises:
        ValueError: If an argument is out of range.

    Reference:
        Kairouz, Liu, Steinke, "The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure
        Aggregation", ICML 2021, Proposition 14. arXiv:2102.06387; for one share Canonne, Kamath, Steinke, NeurIPS
        2020, Theorem 4. arXiv:2004.00010

    Example:
        >>> discrete_gaussian_rdp([2.0, 4.0], sensitivity=10.0, sigma=5.0, numel=100, num_shares=16).tolist()
        [0.25, 0.5]
    """
    if num_shares < 1:
        raise ValueError(f"`num_shares` must be at least 1, got {num_shares}.")
    if not sigma > 0:
        raise ValueError(f"`sigma` must be positive, got {sigma}.")
    if num_shares > 1 and sigma < 0.5:
        raise ValueError(f"The guarantee of several shares needs `sigma` of at least 1/2 grid steps each, got {sigma}.")
    if sensitivity < 0 or numel < 0:
        raise ValueError(f"`sensitivity` and `numel` must be at least 0, got {sensitivity} and {numel}.")
    order = np.asarray(orders, dtype=np.float64)
    if not (order > 1).all():
        raise ValueError(f"`orders` must be above 1, got {orders}.")
    k = np.arange(1, num_shares)
    tau = 10 * float(np.exp(-2 * (math.pi * sigma) ** 2 * k / (k + 1)).sum())
    ratio = sensitivity / (math.sqrt(num_shares) * sigma)
    l1 = min(sensitivity * math.sqrt(numel), sensitivity**2)  # an integer is at most its square
    quadratic = min(
        (ratio + tau * math.sqrt(numel)) ** 2,
        ratio**2 + 2 * tau * l1 / (math.sqrt(num_shares) * sigma) + tau**2 * numel,
    )
    bound: Floats = np.minimum(order / 2 * quadratic, order / 2 * ratio**2 + tau * numel)
    return bound


def discrete_gaussian_epsilon(
    *, delta: float, sensitivity: float, sigma: float, numel: int, num_shares: int = 1, rounds: int = 1
) -> float:
    """Epsilon at ``delta`` of rounds of :func:`discrete_gaussian_rdp`, which add up (concentrated differential privacy).

    Args:
        delta: In (0, 1).
        sensitivity: L2 norm by which the integer vectors of neighbours differ at most.
        sigma: Parameter of each share, in steps of the grid.
        numel: Entries of the vector.
        num_shares: Shares of noise in the sum.
        rounds: Vectors released, at least 1.

    Returns:
        Epsilon in nats.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> round(discrete_gaussian_epsilon(delta=1e-5, sensitivity=10.0, sigma=10.0, numel=100), 2)
        4.74
    """
    if rounds < 1:
        raise ValueError(f"`rounds` must be at least 1, got {rounds}.")
    rdp = discrete_gaussian_rdp(RDP_ORDERS, sensitivity=sensitivity, sigma=sigma, numel=numel, num_shares=num_shares)
    return epsilon_of_rdp(RDP_ORDERS, rounds * rdp, delta)
