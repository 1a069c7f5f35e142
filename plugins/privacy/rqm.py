"""Accounting of the Randomized Quantization Mechanism: exact output distributions, Rényi divergences, composition."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from opacus.accountants.analysis.rdp import get_privacy_spent
from scipy.special import logsumexp

Floats = NDArray[np.float64]

RDP_ORDERS: tuple[float, ...] = tuple(1 + 2.0 ** (k / 4) for k in range(-40, 49))
"""Orders of Rényi divergence, from 1.001 to 4097, over which a guarantee is converted to epsilon and delta."""


def renyi_divergence(log_p: Floats, log_q: Floats, order: float) -> float:
    """Rényi divergence of two distributions on the same finite set, from the logarithms of their probabilities.

    Args:
        log_p: Log-probabilities, shape ``(n,)``; ``-inf`` for what cannot happen.
        log_q: The same of the other distribution.
        order: Order, above 1; ``inf`` gives the largest log-ratio (pure epsilon).

    Returns:
        The divergence of ``p`` from ``q`` in nats; ``inf`` where ``p`` allows what ``q`` does not.

    Raises:
        ValueError: If the order is not above 1 or the shapes differ.

    Reference:
        Mironov, "Rényi Differential Privacy", CSF 2017. arXiv:1702.07476

    Example:
        >>> p, q = np.log([0.75, 0.25]), np.log([0.25, 0.75])
        >>> round(renyi_divergence(p, q, 2), 4), round(renyi_divergence(p, q, math.inf), 4)
        (0.8473, 1.0986)
    """
    if not order > 1:
        raise ValueError(f"`order` must be above 1, got {order}.")
    if log_p.shape != log_q.shape or log_p.ndim != 1:
        raise ValueError(f"Expected two vectors of one length, got shapes {log_p.shape} and {log_q.shape}.")
    possible = log_p > -math.inf
    p, q = log_p[possible], log_q[possible]
    if math.isinf(order):
        return max(0.0, float(np.max(p - q)))
    return max(0.0, float(logsumexp(p + (order - 1) * (p - q))) / (order - 1))


def epsilon_of_rdp(orders: Sequence[float], rdp: Sequence[float] | Floats, delta: float) -> float:
    """Smallest epsilon at ``delta`` that Rényi guarantees of several orders give.

    Args:
        orders: Orders, each above 1.
        rdp: The guarantee of each order, in nats; ``inf`` for none.
        delta: In (0, 1).

    Returns:
        Epsilon in nats, at least 0; ``inf`` if no order has a guarantee.

    Raises:
        ValueError: If ``delta`` is out of range.

    Reference:
        Balle et al., "Hypothesis Testing Interpretations and Rényi Differential Privacy", AISTATS 2020, Theorem 21.
        arXiv:1905.09982

    Example:
        >>> round(epsilon_of_rdp([2.0, 8.0, 32.0], [0.1, 0.4, 1.6], delta=1e-5), 3)
        1.614
    """
    if not 0 < delta < 1:
        raise ValueError(f"`delta` must be in (0, 1), got {delta}.")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal order is the")  # the grid's ends still give a valid bound
        epsilon, _ = get_privacy_spent(orders=list(orders), rdp=list(rdp), delta=delta)
    return max(0.0, float(epsilon))


def check_rqm(clip: float, margin: float, num_levels: int, keep_probability: float) -> None:
    """Refuse parameters with which the mechanism is not defined.

    Args:
        clip: Coordinates lie in ``[-clip, clip]``.
        margin: How far the outermost levels lie beyond.
        num_levels: Levels, both outermost ones counted.
        keep_probability: Of each level between.

    Raises:
        ValueError: If one is out of range.
    """
    if not 0 < clip < math.inf:
        raise ValueError(f"`clip` must be positive and finite, got {clip}.")
    if not 0 < margin < math.inf:
        raise ValueError(f"`margin` must be positive and finite, got {margin}: at 0 the extremes would be certain.")
    if num_levels < 2:
        raise ValueError(f"`num_levels` must be at least 2, got {num_levels}.")
    if not 0 < keep_probability < 1:
        raise ValueError(f"`keep_probability` must be in (0, 1), got {keep_probability}.")


def rqm_log_pmf(
    x: float | Sequence[float] | Floats, *, clip: float, margin: float, num_levels: int, keep_probability: float
) -> Floats:
    """Exact distribution of the level that RQM sends for a scalar, in logarithms.

    The levels are evenly spread over ``[-clip - margin, clip + margin]``. Both outermost ones are kept, each other one
    with probability ``keep_probability``; ``x`` is rounded stochastically to one of its two neighbours that are kept.

    Args:
        x: Scalars in ``[-clip, clip]``, any shape ``(...)``.
        clip: Range of the scalars, positive.
        margin: How far the outermost levels lie beyond it, positive.
        num_levels: Levels ``m``, at least 2.
        keep_probability: Of each inner level, in (0, 1); without effect for two levels.

    Returns:
        Log-probabilities of the levels, float64, shape ``(..., m)``; each takes ``O(m^2)``.

    Raises:
        ValueError: If a parameter or a scalar is out of range.

    Reference:
        Youn, Hu, Ziani, Abernethy, "Randomized Quantization is All You Need for Differential Privacy in Federated
        Learning", 2023, Algorithm 2. arXiv:2306.11913

    Example:
        >>> np.exp(rqm_log_pmf(0.5, clip=1.0, margin=1.0, num_levels=2, keep_probability=0.5)).round(3).tolist()
        [0.375, 0.625]
    """
    check_rqm(clip, margin, num_levels, keep_probability)
    points = np.asarray(x, dtype=np.float64)
    if not (np.abs(points) <= clip).all():
        raise ValueError(f"Scalars must be in [{-clip}, {clip}], got {points}.")
    positions = (points.ravel() / (clip + margin) + 1) * (num_levels - 1) / 2
    rows = [_log_pmf_at(position, num_levels, keep_probability) for position in positions.tolist()]
    return np.array(rows, dtype=np.float64).reshape(*points.shape, num_levels)


def _log_pmf_at(position: float, m: int, keep: float) -> Floats:
    """The distribution for a scalar at ``position`` levels above the lowest one."""
    below = min(max(math.floor(position), 0), m - 2)
    low, high = np.arange(below + 1), np.arange(below + 1, m)
    skip, take = math.log1p(-keep), math.log(keep)
    log_low = (below - low) * skip + np.where(low > 0, take, 0.0)  # the nearest kept level below: a cut geometric
    log_high = (high - below - 1) * skip + np.where(high < m - 1, take, 0.0)
    pair = log_low[:, None] + log_high[None, :] - np.log(high[None, :] - low[:, None])
    with np.errstate(divide="ignore"):  # a scalar on a level never leaves it where it is kept
        to_low, to_high = np.log(high - position), np.log(position - low)
    return np.concatenate([logsumexp(pair + to_low[None, :], axis=1), logsumexp(pair + to_high[:, None], axis=0)])


def rqm_rdp(
    orders: Sequence[float],
    *,
    clip: float,
    margin: float,
    num_levels: int,
    keep_probability: float,
    num_shares: int = 1,
) -> Floats:
    """Rényi guarantee of one scalar that RQM sends, when one device's value is replaced by another.

    For one device (``num_shares = 1``, local privacy) it is exact: between two neighbouring levels the distribution is
    affine in the scalar and the divergence jointly convex, so the worst pair lies among the levels and the two ends of
    the range, all of which are tried. The two ends alone need not be the worst pair.

    Under secure aggregation only the sum of the codes is seen, and the other devices' randomness helps. Which values
    of theirs help least is found numerically: all equal, at one of the levels or ends. By the same convexity the worst
    values lie there, but that they are all equal is what enumeration for few devices shows, not a proof. The local
    guarantee always holds, and so does that of fewer devices (post-processing).

    Args:
        orders: Orders of divergence, each above 1; ``inf`` gives the pure epsilon.
        clip: Range of the scalars, positive.
        margin: How far the outermost levels lie beyond it, positive.
        num_levels: Levels ``m``, at least 2; the time grows as ``m^3`` for each order.
        keep_probability: Of each inner level, in (0, 1).
        num_shares: Honest devices in the sum, the protected one counted, at least 1; the time grows as its square (half
            a minute for 1,000 devices and 16 levels).

    Returns:
        Divergences in nats, shape of ``orders``.

    Raises:
        ValueError: If a parameter or an order is out of range.

    Reference:
        Youn et al., 2023, Section 4. arXiv:2306.11913

    Example:
        >>> rqm_rdp([2.0, math.inf], clip=1.0, margin=1.0, num_levels=16, keep_probability=0.42).round(3).tolist()
        [5.064, 5.47]
    """
    check_rqm(clip, margin, num_levels, keep_probability)
    if num_shares < 1:
        raise ValueError(f"`num_shares` must be at least 1, got {num_shares}.")
    for order in orders:
        if not order > 1:
            raise ValueError(f"`orders` must be above 1, got {order}.")
    levels = (clip + margin) * (2 * np.arange(num_levels) / (num_levels - 1) - 1)
    corners = np.concatenate([[-clip], levels[np.abs(levels) < clip], [clip]])
    one = rqm_log_pmf(corners, clip=clip, margin=margin, num_levels=num_levels, keep_probability=keep_probability)
    if num_shares == 1:
        return _worst_of_pairs(one, orders)
    # mirroring all values mirrors the sum: others at or above zero suffice, since both orders of each pair are tried
    others = [_log_power(row, num_shares - 1) for row in one[corners >= -1e-12 * clip]]
    worst: Floats = np.max([_worst_of_pairs(_log_convolve(one, other), orders) for other in others], axis=0)
    return worst


def _worst_of_pairs(log_pmf: Floats, orders: Sequence[float]) -> Floats:
    """The largest divergence between two rows of ``(v, n)``, for each order."""
    worst = np.zeros(len(orders))
    for row in log_pmf:
        ratio = row - log_pmf
        for i, order in enumerate(orders):
            if math.isinf(order):
                worst[i] = max(worst[i], ratio.max())
            else:
                worst[i] = max(worst[i], logsumexp(row + (order - 1) * ratio, axis=1).max() / (order - 1))
    return worst


def _log_convolve(a: Floats, b: Floats) -> Floats:
    """Distribution of a sum from log-probabilities ``(..., n)`` and ``(k,)``: tails keep their relative precision."""
    if a.ndim == 1 and a.shape[0] < b.shape[0]:
        a, b = b, a
    out = np.full((*a.shape[:-1], a.shape[-1] + b.shape[0] - 1), -math.inf)
    for shift, log_b in enumerate(b):
        window = out[..., shift : shift + a.shape[-1]]
        np.logaddexp(window, a + log_b, out=window)
    return out


def _log_power(log_pmf: Floats, count: int) -> Floats:
    """Distribution of the sum of ``count >= 1`` independent draws, by squaring."""
    half = log_pmf if count < 2 else _log_power(log_pmf, count // 2)
    if count < 2:
        return half
    even = _log_convolve(half, half)
    return _log_convolve(even, log_pmf) if count % 2 else even


def rqm_epsilon(
    *,
    delta: float,
    releases: int = 1,
    clip: float,
    margin: float,
    num_levels: int,
    keep_probability: float,
    num_shares: int = 1,
) -> float:
    """Epsilon at ``delta`` of several scalars of one device that RQM sends.

    Each coordinate of each round is a release: ``releases = numel * rounds`` for whole updates, ``rounds`` for one
    coordinate. Rényi divergences add up, and so do pure epsilons; the smaller result is taken.

    Args:
        delta: In [0, 1); 0 gives the pure epsilon.
        releases: Scalars sent by the same device, at least 1.
        clip: Range of the scalars, positive.
        margin: How far the outermost levels lie beyond it, positive.
        num_levels: Levels ``m``, at least 2.
        keep_probability: Of each inner level, in (0, 1).
        num_shares: Honest devices in each sum, as for :func:`rqm_rdp`.

    Returns:
        Epsilon in nats, for replacing one device's scalars by any others.

    Raises:
        ValueError: If a parameter is out of range.

    Example:
        >>> settings = {"clip": 1.0, "margin": 1.0, "num_levels": 16, "keep_probability": 0.42}
        >>> round(rqm_epsilon(delta=0, **settings), 3), round(rqm_epsilon(delta=0, releases=3, **settings), 2)
        (5.47, 16.41)
    """
    if not 0 <= delta < 1:
        raise ValueError(f"`delta` must be in [0, 1), got {delta}.")
    if releases < 1:
        raise ValueError(f"`releases` must be at least 1, got {releases}.")
    orders = (*RDP_ORDERS, math.inf) if delta else (math.inf,)
    rdp = releases * rqm_rdp(
        orders,
        clip=clip,
        margin=margin,
        num_levels=num_levels,
        keep_probability=keep_probability,
        num_shares=num_shares,
    )
    pure = float(rdp[-1])
    return min(pure, epsilon_of_rdp(orders[:-1], rdp[:-1], delta)) if delta else pure
