"""What a run of the Poisson-subsampled Gaussian mechanism costs, and what noise a budget asks for.

Opacus's accountants do the counting: ``"prv"`` composes privacy loss random variables numerically and is tight to 0.01;
``"rdp"`` composes Renyi divergences, is looser and faster; ``"gdp"`` is a central-limit approximation that can be three
times too small, so it never is the source of a claim. Where epsilon by ``"rdp"`` exceeds 50 (numerical composition then
takes minutes and gigabytes), or delta is below 1e-13 (rounding would dominate), ``"prv"`` counts by ``"rdp"``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, get_args

from lightning_utilities.core.rank_zero import rank_zero_warn
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent
from scipy.optimize import brentq
from scipy.stats import norm

Accounting = Literal["prv", "rdp", "gdp"]
"""The accountants, by Opacus's names."""

_ORDERS = RDPAccountant.DEFAULT_ALPHAS
_LARGEST_NOISE = 1e3  # a multiplier at which nothing can be learned
_SMALLEST_NOISE = 0.1  # below, epsilon is in the hundreds
_LARGEST_NUMERICAL = 50.0  # an epsilon above which the numerical accountant takes minutes and gigabytes
_SMALLEST_DELTA = 1e-13  # below, the numerical accountant's rounding errors dominate


class UnreachableBudgetError(ValueError):
    """No reasonable amount of noise meets the budget."""


def gaussian_delta(epsilon: float, mu: float) -> float:
    """Delta of one Gaussian release, exactly.

    Args:
        epsilon: Privacy loss, at least 0.
        mu: Sensitivity over standard deviation of the noise; ``sqrt(T) / noise_multiplier`` for ``T`` releases.

    Returns:
        ``Phi(mu / 2 - epsilon / mu) - exp(epsilon) Phi(-mu / 2 - epsilon / mu)``.

    Reference:
        Balle, Wang, "Improving the Gaussian Mechanism for Differential Privacy", ICML 2018, Theorem 8.
        arXiv:1805.06530

    Example:
        >>> round(gaussian_delta(0.0, 1.0), 4)  # the total variation distance
        0.3829
    """
    if mu == 0:
        return 0.0
    tail = norm.logcdf(-mu / 2 - epsilon / mu)
    return float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(min(epsilon + tail, 0.0)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of one Gaussian release, exactly: the inverse of :func:`gaussian_delta`.

    Args:
        mu: Sensitivity over standard deviation of the noise, at least 0; ``inf`` where there is no noise.
        delta: In (0, 1).

    Returns:
        Epsilon, at least 0.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> round(gaussian_epsilon(50**0.5 / 4.0, 1e-6), 3)  # 50 releases at noise multiplier 4
        9.482
    """
    check_delta(delta)
    if not mu >= 0:
        raise ValueError(f"`mu` must be at least 0, got {mu}.")
    if mu > 1e100:
        return math.inf
    if mu == 0 or gaussian_delta(0.0, mu) <= delta:
        return 0.0
    largest = 1.001 * mu * (mu / 2 - float(norm.ppf(delta)))  # where the first term alone is below delta
    return float(brentq(lambda epsilon: gaussian_delta(epsilon, mu) - delta, 0.0, largest, xtol=1e-10))


def spent_epsilon(
    noise_multiplier: float, sample_rate: float, steps: int, delta: float, accounting: Accounting = "prv"
) -> float:
    """Epsilon of so many steps of the Poisson-subsampled Gaussian mechanism.

    Args:
        noise_multiplier: Standard deviation of the noise over the sensitivity, at least 0.
        sample_rate: Probability with which a unit takes part in a step, in (0, 1].
        steps: Steps (noisy releases), at least 0.
        delta: In (0, 1).
        accounting: How to count. ``"prv"`` counts by ``"rdp"``, which is looser and as valid, where that gives more
            than 50, and where ``delta`` is below 1e-13.

    Returns:
        Epsilon for neighbours that differ by one unit more or less; 0 for no step, ``inf`` without noise.

    Raises:
        ValueError: If an argument is out of range.

    Reference:
        Gopi, Lee, Wutschitz, "Numerical Composition of Differential Privacy", NeurIPS 2021. arXiv:2106.02848
        Mironov, Talwar, Zhang, "Renyi Differential Privacy of the Sampled Gaussian Mechanism", 2019. arXiv:1908.10530
        Dong, Roth, Su, "Gaussian Differential Privacy", 2019. arXiv:1905.02383

    Example:
        >>> round(spent_epsilon(1.1, 256 / 60000, 14040, 1e-5, "rdp"), 3)
        2.594
    """
    check_accounting(accounting)
    check_delta(delta)
    if not 0 < sample_rate <= 1:
        raise ValueError(f"`sample_rate` is a probability in (0, 1], got {sample_rate}.")
    if not noise_multiplier >= 0:
        raise ValueError(f"`noise_multiplier` must be at least 0, got {noise_multiplier}.")
    if steps < 0:
        raise ValueError(f"`steps` must be at least 0, got {steps}.")
    if steps == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    if sample_rate == 1.0 and accounting == "prv":
        return gaussian_epsilon(
            math.sqrt(steps) / noise_multiplier, delta
        )  # exact, where the numerical one has an error
    if accounting == "gdp":
        exponent = noise_multiplier**-2
        return gaussian_epsilon(
            sample_rate * math.sqrt(steps * math.expm1(exponent)) if exponent < 600 else math.inf, delta
        )
    divergences = _renyi_divergences(noise_multiplier, sample_rate) * steps
    with warnings.catch_warnings():  # of orders at the edge of the grid, which give a valid, looser bound
        warnings.simplefilter("ignore")
        loose, _ = get_privacy_spent(orders=_ORDERS, rdp=divergences, delta=delta)
    if accounting == "rdp" or delta < _SMALLEST_DELTA or not loose <= _LARGEST_NUMERICAL:
        return max(float(loose), 0.0)
    return _numerical_epsilon(noise_multiplier, sample_rate, steps, delta)


@lru_cache(maxsize=64)
def _renyi_divergences(noise_multiplier: float, sample_rate: float) -> Any:
    """Of one step, by order."""
    return compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=_ORDERS)


@lru_cache(maxsize=64)  # calibration and the budget of a run ask the same again
def _numerical_epsilon(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    accountant = PRVAccountant()
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    return max(float(accountant.get_epsilon(delta=delta)), 0.0)


def noise_multiplier_for(
    target_epsilon: float, sample_rate: float, steps: int, delta: float, accounting: Accounting = "prv"
) -> float:
    """The least noise, to 0.1 %, that keeps so many steps within a budget.

    Args:
        target_epsilon: Budget, above 0.
        sample_rate: Probability with which a unit takes part in a step, in (0, 1].
        steps: Steps, at least 1.
        delta: In (0, 1).
        accounting: How to count.

    Returns:
        A noise multiplier whose epsilon is at most ``target_epsilon``.

    Raises:
        ValueError: If an argument is out of range.
        UnreachableBudgetError: If a noise multiplier of 1,000 does not suffice.

    Example:
        >>> sigma = noise_multiplier_for(3.0, 0.1, 300, 1e-4)
        >>> round(sigma, 1), spent_epsilon(sigma, 0.1, 300, 1e-4) <= 3.0
        (2.3, True)
    """
    check_epsilon(target_epsilon)
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, got {steps}.")

    def excess(log_sigma: float, how: Accounting) -> float:
        spent = spent_epsilon(math.exp(log_sigma), sample_rate, steps, delta, how)
        return math.log(spent / target_epsilon) if spent > 0 else -_LARGEST_NOISE

    # the fast accountant, which is the looser one, says how much noise is enough; the tight one needs a little less
    high, low = math.log(_LARGEST_NOISE), math.log(_SMALLEST_NOISE)
    if excess(low, "rdp") <= 0:
        return _SMALLEST_NOISE
    if excess(high, "rdp") < 0:
        tolerance = 2e-4 if accounting == "rdp" else 2e-2
        enough = brentq(excess, low, high, args=("rdp",), xtol=tolerance) + tolerance
    elif excess(high, accounting) <= 0:
        enough = high
    else:
        least = spent_epsilon(_LARGEST_NOISE, sample_rate, steps, delta, accounting)
        raise UnreachableBudgetError(
            f"`target_epsilon` {target_epsilon} cannot be reached: with noise multiplier {_LARGEST_NOISE:.0f}, {steps} "
            f"steps at sample rate {sample_rate:.4g} cost epsilon {least:.4g} at delta {delta:.3g}. Train fewer steps, "
            "with smaller batches, or raise the budget."
        )
    if accounting == "rdp":
        return math.exp(enough)
    return math.exp(_least_within(lambda x: excess(x, accounting), enough, low, high))


def _least_within(excess: Callable[[float], float], start: float, low: float, high: float) -> float:
    """Where a falling function is at most 0, and not 1e-3 further left; it costs much, and is nearly straight."""
    x, value, slope = start, excess(start), -1.5  # of log epsilon over log noise: between -1 and -2 as a rule
    for _ in range(8):
        if value <= 0 and (value >= 8e-4 * slope or x <= low):  # at most so far above the root
            return x
        following = min(max(x - value / slope + 4e-4, low), high)
        if following == x:
            break
        found = excess(following)
        local = (found - value) / (following - x)
        x, value, slope = following, found, local if local < 0 else slope
    left, right = x, x  # it is not: halve
    while value > 0 and right < high:
        left, right = right, min(right + 0.15, high)
        value = excess(right)
    while left > low and excess(left) <= 0:
        left, right = max(left - 0.15, low), left
    while right - left > 5e-4:
        middle = (left + right) / 2
        left, right = (middle, right) if excess(middle) > 0 else (left, middle)
    return right


def steps_within(
    target_epsilon: float,
    noise_multiplier: float,
    sample_rate: float,
    delta: float,
    at_most: int,
    accounting: Accounting = "prv",
) -> int:
    """How many steps a budget pays for.

    Args:
        target_epsilon: Budget, above 0.
        noise_multiplier: Standard deviation of the noise over the sensitivity.
        sample_rate: Probability with which a unit takes part in a step, in (0, 1].
        delta: In (0, 1).
        at_most: Where to stop looking.
        accounting: How to count.

    Returns:
        The largest ``T <= at_most`` whose epsilon is at most ``target_epsilon``; it may be 0.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> steps_within(3.0, 2.3, 0.1, 1e-4, at_most=10_000, accounting="rdp")
        250
    """
    check_epsilon(target_epsilon)

    def affordable(steps: int) -> bool:
        return spent_epsilon(noise_multiplier, sample_rate, steps, delta, accounting) <= target_epsilon

    def loosely(steps: int) -> bool:
        return spent_epsilon(noise_multiplier, sample_rate, steps, delta, "rdp") <= target_epsilon

    if at_most < 1:
        return 0
    if accounting == "rdp":
        return _last(affordable, at_most)
    return _last(affordable, at_most, start=max(_last(loosely, at_most), 1), growth=1.25)


def _last(holds: Callable[[int], bool], at_most: int, start: int = 1, growth: float = 2.0) -> int:
    """The largest number up to ``at_most`` that holds, as all below do; never asks far beyond it, which costs more."""
    low, high = 0, min(start, at_most)
    while holds(high):
        low = high
        if low == at_most:
            return low
        high = min(max(int(growth * low), low + 1), at_most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def check_budget(target_epsilon: float | None, noise_multiplier: float | None, target_delta: float | None) -> None:
    """Refuse a budget and a noise that cannot be kept together.

    Args:
        target_epsilon: Budget, or None.
        noise_multiplier: Noise, or None; 0 promises nothing.
        target_delta: Of the guarantee, or None.

    Raises:
        ValueError: If budget and noise are both missing or contradict each other, or one is out of range.
    """
    if target_epsilon is None and noise_multiplier is None:
        raise ValueError("Give `target_epsilon` (a budget) or `noise_multiplier`, or both; got neither.")
    if target_epsilon is not None:
        check_epsilon(target_epsilon)
    if noise_multiplier is not None and not 0 <= noise_multiplier < math.inf:
        raise ValueError(f"`noise_multiplier` must be at least 0 and finite, got {noise_multiplier}.")
    if target_epsilon is not None and noise_multiplier == 0:
        raise ValueError(f"Without noise no `target_epsilon` can be kept, got {target_epsilon=}, noise_multiplier=0.")
    if target_delta is not None:
        check_delta(target_delta)


def check_epsilon(target_epsilon: float) -> None:
    """Refuse a budget that is not a positive number.

    Args:
        target_epsilon: Budget.

    Raises:
        ValueError: If it is not above 0 and finite.
    """
    if not (target_epsilon > 0 and math.isfinite(target_epsilon)):
        raise ValueError(
            f"`target_epsilon` must be a positive number, got {target_epsilon}: 1 to 10 is usual, smaller is stricter."
        )


def check_delta(delta: float) -> None:
    """Refuse what is not a probability strictly between 0 and 1.

    Args:
        delta: The probability with which the guarantee may fail.

    Raises:
        ValueError: If it is out of range.
    """
    if not 0 < delta < 1:
        raise ValueError(f"`delta` must be in (0, 1), got {delta}: well below one over the number of records is usual.")


def check_accounting(accounting: str) -> None:
    """Refuse an unknown accountant.

    Args:
        accounting: Its name.

    Raises:
        ValueError: If there is none of that name.
    """
    if accounting not in get_args(Accounting):
        raise ValueError(f"The accountant must be one of {', '.join(get_args(Accounting))}, got {accounting!r}.")


def warn_of_delta(delta: float, units: int, name: str) -> None:
    """Say so where a guarantee may fail as often as a single unit is published.

    Args:
        delta: Of the guarantee.
        units: How many there are whose data it protects.
        name: What they are.
    """
    if delta >= 1 / units:
        rank_zero_warn(
            f"`target_delta` is {delta:.3g}, not below one over the number of {name} ({1 / units:.3g}): publishing all about "
            "a random one of them would count as private. Use at most a tenth of that."
        )


def warn_of_gdp(accounting: str) -> None:
    """Say once that the Gaussian approximation is no guarantee.

    Args:
        accounting: The accountant's name; others pass in silence.
    """
    if accounting == "gdp":
        rank_zero_warn(
            "The GDP accountant is a central-limit approximation: its epsilon can be three times too small. Use 'prv' "
            "or 'rdp' for what you claim."
        )
