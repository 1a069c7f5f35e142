"""What a run of the Poisson-subsampled Gaussian mechanism costs, and what noise a budget asks for.

Opacus's accountants do the counting: ``"prv"`` composes privacy loss random variables numerically and is tight to 0.01;
``"rdp"`` composes Renyi divergences, is looser and faster; ``"gdp"`` is a central-limit approximation that can be three
times too small, so it never is the source of a claim.
"""

from __future__ import annotations

import math
import warnings
from typing import Literal, get_args

from lightning_utilities.core.rank_zero import rank_zero_warn
from opacus.accountants import create_accountant
from scipy.optimize import brentq
from scipy.stats import norm

Accounting = Literal["prv", "rdp", "gdp"]
"""The accountants, by Opacus's names."""

_LARGEST_NOISE = 1e3  # a multiplier at which nothing can be learned
_SMALLEST_NOISE = 0.1  # below, epsilon is in the hundreds
_SMALLEST_NUMERICAL = 0.4  # below, the numerical accountant takes minutes and gigabytes


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
        accounting: How to count.

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
    if noise_multiplier < _SMALLEST_NUMERICAL and accounting == "prv":
        accounting = "rdp"  # looser, and as valid
    accountant = create_accountant(accounting)
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    with (
        warnings.catch_warnings()
    ):  # of orders at the edge of the grid (a valid, looser bound), and of the GDP's nature
        warnings.simplefilter("ignore")
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
        return spent_epsilon(math.exp(log_sigma), sample_rate, steps, delta, how) - target_epsilon

    # the fast accountant, which is the looser one, says how much noise is enough; the tight one needs a little less
    high, low = math.log(_LARGEST_NOISE), math.log(_SMALLEST_NOISE)
    if excess(high, accounting) > 0:
        least = spent_epsilon(_LARGEST_NOISE, sample_rate, steps, delta, accounting)
        raise UnreachableBudgetError(
            f"`target_epsilon` {target_epsilon} cannot be reached: with noise multiplier {_LARGEST_NOISE:.0f}, {steps} "
            f"steps at sample rate {sample_rate:.4g} cost epsilon {least:.4g} at delta {delta:.3g}. Train fewer steps, "
            "with smaller batches, or raise the budget."
        )
    if excess(low, "rdp") <= 0:
        return _SMALLEST_NOISE
    enough = brentq(excess, low, high, args=("rdp",), xtol=2e-4) + 2e-4 if excess(high, "rdp") < 0 else high
    if accounting == "rdp":
        return math.exp(enough)
    start = enough
    while start > low and excess(start, accounting) <= 0:  # the tight accountant's root lies a little below
        enough, start = start, max(start - 0.15, low)
    while excess(enough, accounting) > 0:  # or, for an approximation, above
        enough = min(enough + 0.15, high)
    if start < enough and excess(start, accounting) > 0:
        enough = brentq(excess, start, enough, args=(accounting,), xtol=5e-4)
    while excess(enough, accounting) > 0:
        enough += 2.5e-4
    return math.exp(enough)


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

    if at_most < 1 or affordable(at_most):
        return max(at_most, 0)
    low, high = 0, 1  # doubling first: the cost of a query grows with the steps
    while high < at_most and affordable(high):
        low, high = high, min(2 * high, at_most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if affordable(middle) else (low, middle)
    return low


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
