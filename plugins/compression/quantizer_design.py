"""Scalar quantisers for the standard normal distribution, designed before anything is sent."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, solve_banded
from scipy.optimize import brentq, minimize_scalar
from scipy.special import ndtr, ndtri

from groundwire.plugins.compression.entropy_coding import huffman_lengths, model_weights

Floats = NDArray[np.float64]

_MOST_LEVELS = 256  # a symbol is a byte
_EMPTY = 1e-14  # a cell of less probability is none
_REACH = -float(ndtri(_EMPTY))  # beyond this there is not even so much
_TIE = 1e-7  # a level at zero is worth such a difference
_DISTORTION_PER_LAM = 1 / (2 * math.log(2))  # D = lam / (2 ln 2) at high rate


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizerDesign:
    """A scalar quantiser and what it does to ``N(0, 1)``; symmetric about zero.

    Args:
        levels: What each of the ``N`` cells is decoded to, ascending.
        boundaries: The ``N - 1`` cell borders between them; a value on one belongs to the cell below.
        step: Distance of the boundaries, where all have the same; None otherwise.
    """

    levels: Floats
    boundaries: Floats
    step: float | None = None

    @property
    def pmf(self) -> Floats:
        """Probability of each cell."""
        return cells(self.boundaries)[0]

    @property
    def distortion(self) -> float:
        """Mean squared error."""
        pmf, moment = cells(self.boundaries)
        return float(1 - 2 * moment @ self.levels + pmf @ self.levels**2)

    @property
    def rate(self) -> float:
        """Entropy of the symbols, in bits an entry."""
        return _entropy(self.pmf)

    @property
    def huffman_rate(self) -> float:
        """Mean length of their Huffman code, in bits an entry."""
        return float(self.pmf @ huffman_lengths(model_weights(self.pmf)))


def cells(boundaries: Floats) -> tuple[Floats, Floats]:
    """Probability and first moment of every cell under ``N(0, 1)``.

    Args:
        boundaries: Cell borders, ascending, shape ``(N - 1,)``.

    Returns:
        ``P(cell)`` and ``E[z; cell]``, both of shape ``(N,)``; their quotient is the cell's centroid.
    """
    edges = np.concatenate([[-np.inf], boundaries, [np.inf]])
    low, high = edges[:-1], edges[1:]
    upper = low > 0  # differences of small numbers, not of numbers near one
    probability = np.where(upper, ndtr(-low) - ndtr(-high), ndtr(high) - ndtr(low))
    return probability, _density(low) - _density(high)


def _density(z: Floats) -> Floats:
    return np.asarray(np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi))


def _entropy(pmf: Floats) -> float:
    some = pmf[pmf > 0]
    return abs(float(some @ np.log2(some)))


def lagrangian(boundaries: Floats, lam: float) -> float:
    """``D + lam * H`` of the cells, decoded to their centroids: what the design makes small.

    Args:
        boundaries: Cell borders, ascending.
        lam: Price of a bit.

    Returns:
        The mean squared error plus ``lam`` times the entropy in bits.
    """
    pmf, moment = cells(boundaries)
    return float(1 - np.sum(moment**2 / pmf)) + lam * _entropy(pmf)


def lloyd_step(boundaries: Floats, lam: float) -> Floats:
    """One round of the alternating design: centroids and code lengths of the cells, then the best cells for these.

    A value goes where ``(z - level)^2 + lam * length`` is least; that never makes :func:`lagrangian` larger while the
    boundaries stay ascending. At the fixed point the quantiser is optimal, at least locally.

    Args:
        boundaries: Cell borders, ascending, no cell empty.
        lam: Price of a bit.

    Returns:
        New borders of the same number.

    Reference:
        Chou, Lookabaugh, Gray, "Entropy-Constrained Vector Quantization", IEEE Trans. ASSP 37, 1989.
    """
    pmf, moment = cells(boundaries)
    levels, lengths = moment / pmf, -np.log2(pmf)
    middle = (levels[:-1] + levels[1:]) / 2
    return np.asarray(middle + lam * np.diff(lengths) / (2 * np.diff(levels)))


def _newton_step(boundaries: Floats, lam: float) -> Floats:
    """Newton's step to where :func:`lloyd_step` rests; each condition knows only its neighbours."""
    pmf, moment = cells(boundaries)
    levels, price, density = moment / pmf, lam / math.log(2), _density(boundaries)
    below, above = boundaries - levels[:-1], boundaries - levels[1:]  # distances to the levels on both sides
    left, right = density / pmf[:-1], density / pmf[1:]
    residual = below**2 - above**2 + price * np.log(pmf[1:] / pmf[:-1])
    bands = np.zeros((3, boundaries.size))
    bands[1] = 2 * below * (1 - below * left) - 2 * above * (1 + above * right) - price * (left + right)
    bands[0, 1:] = (2 * above[:-1] * below[1:] + price) * left[1:]  # by the next boundary, at the level they share
    bands[2, :-1] = (2 * below[1:] * above[:-1] + price) * right[:-1]  # by the one before
    return np.asarray(boundaries - solve_banded((1, 1), bands, residual))


def _without_empty_cells(boundaries: Floats) -> Floats:
    """The boundaries without those of empty cells, taken away in symmetric pairs, the emptiest first."""
    while boundaries.size:
        pmf = cells(boundaries)[0]
        emptiest, n = int(pmf.argmin()), boundaries.size + 1
        if pmf[emptiest] > _EMPTY:
            break
        outer = max(min(emptiest, n - 1 - emptiest) - 1, 0)
        kept = np.delete(boundaries, [outer, n - 2 - outer])
        if n % 2 and emptiest == n // 2:  # the middle one: its two boundaries become one
            kept = np.insert(kept, kept.size // 2, 0.0)
        boundaries = np.sort(kept)
    return boundaries


def _settle(boundaries: Floats, lam: float) -> Floats:
    """The fixed point of :func:`lloyd_step` that is reached from here: by Newton's steps once they descend."""
    boundaries = _without_empty_cells(boundaries)
    for rounds in range(3000):
        if not boundaries.size:
            break
        following = _newton_descent(boundaries, lam) if rounds >= 20 else None
        if following is None:
            boundaries = _without_empty_cells(_symmetric(lloyd_step(boundaries, lam)))
        elif following.size == boundaries.size and np.abs(following - boundaries).max() < 1e-12:
            return following
        else:
            boundaries = following
    return boundaries


def _newton_descent(boundaries: Floats, lam: float) -> Floats | None:
    """Where Newton's step leads; None if that is not down (up to rounding), or nowhere."""
    try:
        following = _symmetric(_newton_step(boundaries, lam))
    except (LinAlgError, ValueError):  # singular, or not finite
        return None
    if not (np.diff(following) > 0).all():
        return None
    following = _without_empty_cells(following)
    return following if lagrangian(following, lam) <= lagrangian(boundaries, lam) + 1e-13 else None


def _symmetric(boundaries: Floats) -> Floats:
    return np.asarray((boundaries - boundaries[::-1]) / 2)


def _with_centroids(boundaries: Floats, step: float | None = None) -> QuantizerDesign:
    pmf, moment = cells(boundaries)
    return QuantizerDesign(levels=moment / pmf, boundaries=boundaries, step=step)


def check_levels(num_levels: int | None, fewest: int = 2) -> None:
    """Refuse a number of levels that no quantiser here can have; None stands for as many as serve.

    Args:
        num_levels: Number of levels.
        fewest: The least that makes sense.

    Raises:
        ValueError: If it is out of range.
    """
    if num_levels is not None and not fewest <= num_levels <= _MOST_LEVELS:
        raise ValueError(
            f"`num_levels` must be in [{fewest}, {_MOST_LEVELS}]: a quantiser needs {fewest} levels to say anything, and "
            f"a symbol is one byte; got {num_levels}."
        )


def _check_price(lam: float, num_levels: int | None) -> None:
    if not 0 <= lam < math.inf:
        raise ValueError(f"`lam` is a price of bits, finite and >= 0, got {lam}.")
    if lam == 0 and num_levels is None:
        raise ValueError("`lam=0` leaves bits free, so `num_levels` has to be given.")


@lru_cache(256)
def entropy_constrained(lam: float, num_levels: int | None = None) -> QuantizerDesign:
    """The quantiser of ``N(0, 1)`` with least ``D + lam * H``, ideal code lengths and at most ``num_levels`` levels.

    Several numbers of levels are tried, and the best is kept: local optima are few, and differ by an odd or even
    number; an odd one, with a level at zero, is taken where it makes no difference. For ``lam`` above ``2 ln 2 = 1.386`` the best has one level, and says nothing.

    Args:
        lam: Price of a bit, in mean squared error; 0 gives the Lloyd-Max quantiser of just ``num_levels`` levels.
        num_levels: Most levels; None for as many as serve, up to 256.

    Returns:
        The design, symmetric, its levels the centroids of its cells.

    Raises:
        ValueError: If an argument is out of range, or ``lam`` is 0 and ``num_levels`` None.

    Reference:
        Chou, Lookabaugh, Gray, "Entropy-Constrained Vector Quantization", IEEE Trans. ASSP 37, 1989.

    Example:
        >>> design = entropy_constrained(0.1)
        >>> round(design.distortion, 4), round(design.rate, 4)
        (0.0722, 2.1507)
    """
    check_levels(num_levels)
    _check_price(lam, num_levels)
    if lam == 0:
        assert num_levels is not None
        start = math.sqrt(3) * ndtri(np.arange(1, num_levels) / num_levels)  # the density of levels for many of them
        return _with_centroids(_settle(start, 0.0))
    step = math.sqrt(12 * _DISTORTION_PER_LAM * lam)  # at high rate the cells are of one width
    most = min(num_levels or _MOST_LEVELS, math.ceil(2 * _REACH / step) + 1)
    tried = {1, max(most - 1, 1), most, *range(2, min(most, 9))}
    reach = [max(4.0, step * (n / 2 - 1)) for n in sorted(tried)]
    found = [_settle(np.linspace(-r, r, n + 1)[1:-1], lam) for n, r in zip(sorted(tried), reach, strict=True)]
    least = min(lagrangian(boundaries, lam) for boundaries in found)
    good = [boundaries for boundaries in found if lagrangian(boundaries, lam) < least + _TIE]
    return _with_centroids(max(good, key=lambda b: (b.size % 2 == 0, b.size)))


def lloyd_max(num_levels: int) -> QuantizerDesign:
    """The quantiser of ``N(0, 1)`` with ``num_levels`` levels and the least mean squared error.

    Args:
        num_levels: Levels, 2 to 256.

    Returns:
        The design.

    Raises:
        ValueError: If ``num_levels`` is out of range.

    Reference:
        Max, "Quantizing for Minimum Distortion", IRE Trans. Inf. Theory 6, 1960. Lloyd, "Least Squares Quantization in
        PCM", IEEE Trans. Inf. Theory 28, 1982.

    Example:
        >>> lloyd_max(4).levels.round(4)
        array([-1.5104, -0.4528,  0.4528,  1.5104])
    """
    return entropy_constrained(0.0, num_levels)


def uniform_midtread(step: float, num_levels: int | None = None) -> QuantizerDesign:
    """Cells of one width, one of them about zero, decoded to their centroids; the outermost are open.

    Args:
        step: Width of a cell.
        num_levels: Most levels, of which an odd number is used; None for as many as have any probability.

    Returns:
        The design.

    Raises:
        ValueError: If ``step`` is not positive or ``num_levels`` is out of range.

    Example:
        >>> design = uniform_midtread(1.0)
        >>> round(design.distortion, 4), round(design.rate, 4)
        (0.0769, 2.1048)
    """
    check_levels(num_levels, fewest=3)
    if not 0 < step < math.inf:
        raise ValueError(f"`step` must be a positive number, got {step}.")
    most = ((num_levels or _MOST_LEVELS) - 1) // 2
    side = min(most, math.ceil(_REACH / step - 0.5))  # the last boundary has to lie within reach
    return _with_centroids(step * (np.arange(2 * side, dtype=np.float64) - side + 0.5), step=step)


@lru_cache(256)
def uniform_entropy_constrained(lam: float, num_levels: int | None = None) -> QuantizerDesign:
    """The uniform mid-tread quantiser of ``N(0, 1)`` with least ``D + lam * H``.

    Args:
        lam: Price of a bit, in mean squared error.
        num_levels: Most levels, of which an odd number is used; None for as many as serve.

    Returns:
        The design; one level if that is best.

    Raises:
        ValueError: If an argument is out of range, or ``lam`` is 0 and ``num_levels`` None.

    Example:
        >>> design = uniform_entropy_constrained(0.1)
        >>> round(design.distortion, 4), round(design.rate, 4)
        (0.0722, 2.1509)
    """
    check_levels(num_levels, fewest=3)
    _check_price(lam, num_levels)

    def cost(log_step: float) -> float:
        return lagrangian(uniform_midtread(math.exp(log_step), num_levels).boundaries, lam)

    grid = np.linspace(math.log(2 / (num_levels or _MOST_LEVELS)), math.log(2 * _REACH), 65)
    best = int(np.argmin([cost(point) for point in grid]))
    bounds = (grid[max(best - 1, 0)], grid[min(best + 1, 64)])
    step = math.exp(minimize_scalar(cost, bounds=bounds, method="bounded", options={"xatol": 1e-9}).x)
    design = uniform_midtread(step, num_levels)
    return design if lagrangian(design.boundaries, lam) < 1 else uniform_midtread(2 * _REACH, num_levels)


def companding(num_levels: int, mu: float = 255.0, clip: float = 4.0) -> QuantizerDesign:
    """Cells and levels that are evenly spaced after the mu-law ``y = sign(z) ln(1 + mu |z| / clip) / ln(1 + mu)``.

    Args:
        num_levels: Levels, 2 to 256, evenly spaced over ``|y| <= 1``.
        mu: Curvature, above 0; small ``mu`` makes it uniform.
        clip: ``|z|`` at ``|y| = 1``; beyond, all belongs to the outermost cells.

    Returns:
        The design.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> companding(2, mu=3.0, clip=3.0).levels
        array([-1.,  1.])
    """
    check_levels(num_levels)
    if not 0 < mu < math.inf or not 0 < clip < math.inf:
        raise ValueError(f"`mu` and `clip` must be positive numbers, got {mu=}, {clip=}.")

    def expand(y: Floats) -> Floats:
        return np.asarray(np.sign(y) * np.expm1(np.abs(y) * math.log1p(mu)) * clip / mu)

    middles = (2 * np.arange(num_levels) + 1 - num_levels) / num_levels
    return QuantizerDesign(levels=expand(middles), boundaries=expand(middles[1:] - 1 / num_levels))


def design_for_rate(
    family: Callable[[float, int | None], QuantizerDesign], target_rate: float, num_levels: int | None = None
) -> tuple[QuantizerDesign, float]:
    """The member of a family whose rate comes closest to a target from below.

    Args:
        family: Price of a bit and most levels to a design, as :func:`entropy_constrained`.
        target_rate: Entropy of the symbols, in bits an entry.
        num_levels: Most levels; None for as many as serve.

    Returns:
        The design and its price ``lam``.

    Raises:
        ValueError: If the rate is not positive, more than such a quantiser can use, or between what it can (two levels
            take one bit or none).

    Example:
        >>> design, lam = design_for_rate(entropy_constrained, 2.0)
        >>> round(design.rate, 4), round(design.distortion, 4), round(lam, 4)
        (2.0, 0.0889, 0.1232)
    """
    if not 0 < target_rate < math.inf:
        raise ValueError(f"`target_rate` must be a positive number of bits an entry, got {target_rate}.")
    finest = family(0.0, num_levels or _MOST_LEVELS)
    if target_rate > finest.rate:
        raise ValueError(
            f"`target_rate` is {target_rate} bits an entry, but the finest design with {num_levels or _MOST_LEVELS} "
            f"levels takes {finest.rate:.4f}. Ask for less, or for more levels."
        )

    def excess(log_lam: float) -> float:
        return family(math.exp(log_lam), num_levels).rate - target_rate

    low, high = math.log(1e-7), math.log(2 * math.log(2))
    if excess(low) <= 0:  # between the finest design and that at a price of almost nothing
        return family(math.exp(low), num_levels), math.exp(low)
    root = float(brentq(excess, low, high, xtol=1e-10))
    while excess(root) > 0:  # the rate may jump where the number of levels does
        root += 1e-9
    design = family(math.exp(root), num_levels)
    if design.rate < target_rate - 0.05:
        raise ValueError(
            f"No design with at most {num_levels} levels takes `target_rate={target_rate}` bits an entry: the next below "
            f"takes {design.rate:.4f}. Allow more levels."
        )
    return design, math.exp(root)


def contraction(design: QuantizerDesign, numel: int) -> float | None:
    """``a`` with ``|Q(z) - z|^2 <= (1 - a) |z|^2`` for every row of ``numel`` entries of mean 0 and mean square 1.

    Within a cell the error is convex in ``z^2``, so no row does worse than one whose entries lie on boundaries, at zero,
    or as far out as one of so many entries can: a linear programme with two points in its solution.

    Args:
        design: A symmetric quantiser.
        numel: Entries of a row.

    Returns:
        The largest such ``a`` that this shows, in (0, 1]; None if there is none.

    Example:
        >>> round(contraction(lloyd_max(5), 100), 3)
        0.271
        >>> contraction(lloyd_max(4), 10_000) is None  # no level at zero: one large entry, and the others are made worse
        True
    """
    if numel < 2:
        return 1.0  # such a row is constant
    furthest = math.sqrt(numel - 1)
    edges = design.boundaries[(design.boundaries > 0) & (design.boundaries < furthest)]
    where = np.concatenate([[0.0], edges, edges, [furthest]])
    right = np.searchsorted(design.boundaries, np.concatenate([edges, [furthest]]), side="left")
    at = np.concatenate([[np.searchsorted(design.boundaries, 0.0)], right[:-1], right[:-1] + 1, right[-1:]])
    square, error = where**2, (where - design.levels[at]) ** 2
    low, high = square <= 1, square >= 1
    (a, f), (b, g) = (square[low, None], error[low, None]), (square[high], error[high])
    share = np.where(b > a, (1 - a) / np.where(b > a, b - a, 1), 0)  # of the entries at b, so that the mean square is 1
    worst = float((f + share * (g - f)).max())
    return 1 - worst if worst < 1 - 1e-12 else None
