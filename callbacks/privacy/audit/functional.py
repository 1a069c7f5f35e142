"""From scores and memberships to ROC curves and lower bounds on epsilon."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import beta as beta_distribution
from scipy.stats import binom
from torch import Tensor

from groundwire.plugins.random import stream

_GUESSED_SHARES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)  # of the canaries; fixed before any score is seen
_FEWEST_GUESSES = 10  # fewer cannot reject any epsilon at the levels that remain after Bonferroni
_TOLERANCE = 1e-6  # of a bound on epsilon


class OneRunBound(NamedTuple):
    """A lower bound on epsilon from one training run, and the guesses it rests on.

    Args:
        epsilon: The bound, at least 0.
        guesses: Canaries that were guessed; the auditor abstained on the others.
        correct: How many of them were guessed right.
    """

    epsilon: float
    guesses: int
    correct: int


# ---------------------------------------------------------------- one training run


def one_run_p_value(correct: int, guesses: int, canaries: int, epsilon: float, delta: float = 0.0) -> float:
    """How likely so many right guesses are, at most, if training is (epsilon, delta)-private.

    Each canary was included by its own fair coin, and the guesses were made from what training gave out.

    Args:
        correct: Right guesses, in ``[0, guesses]``.
        guesses: Guesses, in ``[1, canaries]``; on the other canaries the auditor abstained.
        canaries: Canaries, whether included or not.
        epsilon: Of the claim, at least 0, for adding or removing one record.
        delta: Of the claim, in [0, 1].

    Returns:
        A p-value in [0, 1]; it grows with epsilon and with delta.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> round(one_run_p_value(correct=90, guesses=100, canaries=100, epsilon=1.0), 5)
        3e-05

    Reference:
        Steinke, Nasr, Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023, Theorem 5.2.
        arXiv:2305.08846
    """
    _check_counts(correct, guesses, canaries)
    _check_delta(delta)
    if not epsilon >= 0:
        raise ValueError(f"`epsilon` must be at least 0, got {epsilon}.")
    accuracy = 1 / (1 + math.exp(-epsilon))  # of randomized response, the most revealing of all epsilon-private runs
    at_least = float(binom.sf(correct - 1, guesses, accuracy))
    if delta == 0 or correct == 0:
        return min(1.0, at_least)
    fewer = np.arange(1, correct + 1)
    nearly = binom.sf(correct - fewer - 1, guesses, accuracy) - at_least  # P[correct - fewer <= Bin < correct]
    return min(1.0, at_least + 2 * canaries * delta * float((nearly / fewer).max()))


def one_run_epsilon_lower_bound(
    correct: int, guesses: int, canaries: int, delta: float = 0.0, confidence: float = 0.95
) -> float:
    """The largest epsilon that the guesses rule out: with ``confidence``, the true one is not below it.

    The number of guesses must not depend on which of them were right; see :func:`one_run_audit`.

    Args:
        correct: Right guesses, in ``[0, guesses]``.
        guesses: Guesses, in ``[1, canaries]``; on the other canaries the auditor abstained.
        canaries: Canaries, whether included or not.
        delta: At which epsilon is bounded, in [0, 1].
        confidence: Probability that the bound holds, in (0, 1).

    Returns:
        The bound, at least 0. The largest possible one grows with the logarithm of the guesses: 3.5 for 100.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> round(one_run_epsilon_lower_bound(correct=100, guesses=100, canaries=100, delta=1e-5), 2)
        3.49

    Reference:
        Steinke, Nasr, Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023. arXiv:2305.08846
    """
    _check_counts(correct, guesses, canaries)
    _check_delta(delta)
    _check_confidence(confidence)

    def is_ruled_out(epsilon: float) -> bool:
        return one_run_p_value(correct, guesses, canaries, epsilon, delta) <= 1 - confidence

    if not is_ruled_out(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while is_ruled_out(high):
        low, high = high, 2 * high
    while high - low > _TOLERANCE:
        middle = (low + high) / 2
        low, high = (middle, high) if is_ruled_out(middle) else (low, middle)
    return low


def one_run_audit(
    scores: Tensor,
    member: Tensor,
    delta: float = 0.0,
    confidence: float = 0.95,
    guesses: Sequence[int] | None = None,
) -> OneRunBound:
    """Guess who was included from the scores, and bound epsilon from how many guesses are right.

    The highest ``r / 2`` scores are guessed to be in, the lowest ``r / 2`` to be out. Where several ``r`` are given, the
    best bound is taken, each at the level that Bonferroni's correction leaves. Equal scores are put into a random order
    that knows nothing of membership.

    The bound holds only if each canary was included by its own fair coin: not for a fixed number of members, and not
    for records that were in the data anyway.

    Args:
        scores: Shape ``(m,)``; higher means more likely included. May be infinite.
        member: Which canaries were included, ``(m,)`` bool.
        delta: At which epsilon is bounded, in [0, 1].
        confidence: Probability that the bound holds, in (0, 1).
        guesses: Numbers of guesses ``r``, even, chosen before the scores were seen; by default up to seven shares of m,
            from 2 % to all.

    Returns:
        The best bound. Where none is above 0, that of the largest number of guesses.

    Raises:
        ValueError: If shapes or numbers are out of range, or a score is NaN.

    Example:
        >>> member = torch.arange(100) % 3 == 0
        >>> bound = one_run_audit(member.float(), member, guesses=[60])
        >>> round(bound.epsilon, 2), bound.guesses, bound.correct
        (2.97, 60, 60)

    Reference:
        Steinke, Nasr, Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023, Algorithm 1.
        arXiv:2305.08846
    """
    _check_scores(scores)
    _check_delta(delta)
    _check_confidence(confidence)
    if member.dtype != torch.bool or member.shape != scores.shape:
        raise ValueError(f"`member` must be bool of shape {tuple(scores.shape)}, got {_of(member)}.")
    canaries = len(scores)
    numbers = default_guesses(canaries) if guesses is None else list(guesses)
    if not numbers or any(r < 2 or r % 2 or r > canaries for r in numbers):
        raise ValueError(f"`guesses` must be even numbers from 2 to {canaries}, the canaries; got {numbers}.")
    shuffled = torch.randperm(canaries, generator=stream(0, purpose="audit/ties"))
    scores, member = scores.detach().cpu()[shuffled], member.cpu()[shuffled]
    member = member[scores.double().argsort(stable=True)]
    level = (1 - confidence) / len(numbers)
    bounds = []
    for r in sorted(numbers, reverse=True):
        correct = int((~member[: r // 2]).sum() + member[canaries - r // 2 :].sum())
        bounds.append(
            OneRunBound(one_run_epsilon_lower_bound(correct, r, canaries, delta, 1 - level), guesses=r, correct=correct)
        )
    return max(bounds, key=lambda bound: bound.epsilon)


def default_guesses(canaries: int) -> list[int]:
    """The numbers of guesses that are tried for so many canaries: even, ascending, from 2 % of them to all.

    Args:
        canaries: At least 2.

    Returns:
        Up to seven numbers, none below 10 where there are that many canaries.

    Raises:
        ValueError: If there are fewer than 2 canaries.

    Example:
        >>> default_guesses(101)
        [10, 20, 40, 70, 100]
    """
    if canaries < 2:
        raise ValueError(f"`canaries` must be at least 2, got {canaries}.")
    wanted = {2 * round(share * canaries / 2) for share in _GUESSED_SHARES[:-1]}
    every = canaries - canaries % 2
    return sorted({r for r in wanted if _FEWEST_GUESSES <= r <= every} | {every})


# ---------------------------------------------------------------- ROC curves


def roc_curve(members: Tensor, nonmembers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The ROC curve of the attack "score at least the threshold means member".

    Args:
        members: Scores of members, ``(n1,)``, at least one; higher means more likely a member. May be infinite.
        nonmembers: Scores of non-members, ``(n0,)``, at least one.

    Returns:
        False positive rates, true positive rates, both float64 and ascending from 0 to 1, and the thresholds,
        descending; the first threshold is above every score.

    Raises:
        ValueError: If a group is empty or no vector, or a score is NaN.

    Example:
        >>> fpr, tpr, thresholds = roc_curve(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))
        >>> fpr.tolist(), tpr.tolist()
        ([0.0, 0.0, 0.5, 1.0], [0.0, 0.5, 1.0, 1.0])
    """
    members, nonmembers = _pair(members, nonmembers)
    distinct = torch.unique(torch.cat([members, nonmembers]))  # ascending
    false_positives = len(nonmembers) - torch.searchsorted(nonmembers.sort().values, distinct)
    true_positives = len(members) - torch.searchsorted(members.sort().values, distinct)
    none = torch.zeros(1, dtype=torch.float64)
    fpr = torch.cat([none, false_positives.flip(0).double() / len(nonmembers)])
    tpr = torch.cat([none, true_positives.flip(0).double() / len(members)])
    return fpr, tpr, torch.cat([none + math.inf, distinct.flip(0)])


def auc(members: Tensor, nonmembers: Tensor) -> float:
    """The probability that a member scores higher than a non-member, where a tie counts one half.

    Args:
        members: Scores ``(n1,)``.
        nonmembers: Scores ``(n0,)``.

    Returns:
        The area under the ROC curve, in [0, 1].

    Raises:
        ValueError: If a group is empty or no vector, or a score is NaN.

    Example:
        >>> auc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))
        0.875
    """
    members, nonmembers = _pair(members, nonmembers)
    ordered = nonmembers.sort().values
    below = torch.searchsorted(ordered, members)
    not_above = torch.searchsorted(ordered, members, right=True)
    return float((below + not_above).double().mean() / (2 * len(nonmembers)))


def tpr_at_fpr(members: Tensor, nonmembers: Tensor, fpr: float) -> float:
    """The largest true positive rate of a threshold whose false positive rate is at most ``fpr``.

    Args:
        members: Scores ``(n1,)``.
        nonmembers: Scores ``(n0,)``; below ``1 / fpr`` of them, no false positive is allowed at all.
        fpr: False positive rate, in [0, 1].

    Returns:
        A rate in [0, 1].

    Raises:
        ValueError: If a group is empty or no vector, a score is NaN, or ``fpr`` is outside [0, 1].

    Example:
        >>> tpr_at_fpr(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]), fpr=0.01)
        0.5

    Reference:
        Carlini et al., "Membership Inference Attacks From First Principles", IEEE S&P 2022. arXiv:2112.03570
    """
    if not 0 <= fpr <= 1:
        raise ValueError(f"`fpr` must be in [0, 1], got {fpr}.")
    false_rates, true_rates, _ = roc_curve(members, nonmembers)
    return float(true_rates[false_rates <= fpr].max())


def balanced_accuracy(members: Tensor, nonmembers: Tensor) -> float:
    """The mean of true positive and true negative rate at the threshold where it is largest.

    The threshold is chosen on the same scores, so this is a little above 1/2 for an attack that knows nothing.

    Args:
        members: Scores ``(n1,)``.
        nonmembers: Scores ``(n0,)``.

    Returns:
        The accuracy, in [0.5, 1].

    Raises:
        ValueError: If a group is empty or no vector, or a score is NaN.

    Example:
        >>> balanced_accuracy(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))
        0.75
    """
    fpr, tpr, _ = roc_curve(members, nonmembers)
    return float((1 + tpr - fpr).max() / 2)


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """One-sided bounds on a probability: each holds with ``confidence`` by itself.

    Args:
        successes: In ``[0, trials]``.
        trials: Independent trials, at least 1.
        confidence: In (0, 1).

    Returns:
        The lower bound (0 without a success) and the upper bound (1 without a failure).

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> [round(bound, 4) for bound in clopper_pearson(5, 10)]
        [0.2224, 0.7776]

    Reference:
        Clopper, Pearson, "The Use of Confidence or Fiducial Limits", Biometrika 1934.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"`successes` must be in [0, trials], got {successes} of {trials}.")
    _check_confidence(confidence)
    failures, level = trials - successes, 1 - confidence
    low = 0.0 if successes == 0 else float(beta_distribution.ppf(level, successes, failures + 1))
    high = 1.0 if failures == 0 else float(beta_distribution.isf(level, successes + 1, failures))
    return low, high


def epsilon_from_roc(
    members: Tensor,
    nonmembers: Tensor,
    delta: float = 0.0,
    confidence: float = 0.95,
    false_positives: Sequence[int] | None = None,
) -> float:
    """The largest epsilon that the ROC curve of independent scores rules out.

    A test between "in" and "out" satisfies TPR <= e^eps FPR + delta, and so does its opposite, TNR <= e^eps FNR + delta.
    Each rate is replaced by the end of its Clopper-Pearson interval that makes epsilon small. A threshold is the score
    of a non-member with a number of others above it that was fixed beforehand (for the opposite test, of a member with
    a number below), so that the interval of a rate holds although data chose the threshold; over thresholds, directions
    and both rates of each, Bonferroni's correction is made.

    The scores have to be independent, for example one canary from each of many runs. Scores of many records of one
    model are not, quite: for them the bound is an estimate, and :func:`one_run_audit` is the bound.

    Args:
        members: Scores ``(n1,)``; higher means more likely a member. May be infinite.
        nonmembers: Scores ``(n0,)``.
        delta: At which epsilon is bounded, in [0, 1].
        confidence: Probability that the bound holds, in (0, 1).
        false_positives: Numbers of errors (false positives; for the opposite test, false negatives) that fix the
            thresholds; by default 0, 1, 2, 5, 10, 20, 50, ... up to half of the group.

    Returns:
        The bound, at least 0.

    Raises:
        ValueError: If a group is empty or no vector, a score is NaN, or a number is out of range.

    Example:
        >>> apart = epsilon_from_roc(torch.ones(1000), torch.zeros(1000), false_positives=[0])
        >>> round(apart, 2)
        5.43

    Reference:
        Kairouz, Oh, Viswanath, "The Composition Theorem for Differential Privacy", ICML 2015, for the region;
        Nasr et al., "Adversary Instantiation", IEEE S&P 2021, for Clopper-Pearson. arXiv:1311.0776, arXiv:2101.04535
    """
    members, nonmembers = _pair(members, nonmembers)
    _check_delta(delta)
    _check_confidence(confidence)
    if false_positives is not None and (not false_positives or min(false_positives) < 0):
        raise ValueError(f"`false_positives` must be numbers of at least 0, got {list(false_positives)}.")
    tests = []  # (right guesses, their trials, errors that were allowed, their trials)
    for positives, negatives in ((members, nonmembers), (-nonmembers, -members)):
        descending = negatives.sort(descending=True).values
        allowed = _error_counts(len(negatives)) if false_positives is None else list(false_positives)
        for errors in allowed:
            if errors >= len(negatives):
                raise ValueError(f"`false_positives` must be below the group's size {len(negatives)}, got {errors}.")
            right = int((positives > descending[errors]).sum())
            tests.append((right, len(positives), errors, len(negatives)))
    single = 1 - (1 - confidence) / (2 * len(tests))  # two intervals a test
    bound = 0.0
    for right, positives_number, errors, negatives_number in tests:
        rate = clopper_pearson(right, positives_number, single)[0] - delta
        if rate > 0:
            bound = max(bound, math.log(rate / clopper_pearson(errors, negatives_number, single)[1]))
    return bound


def _error_counts(number: int) -> list[int]:
    """0, 1, 2, 5, 10, 20, 50, ... up to half of ``number``."""
    steps = (digit * 10**power for power in range(len(str(number))) for digit in (1, 2, 5))
    return [0, *(count for count in steps if count <= number // 2)]


# ---------------------------------------------------------------- checks


def _check_counts(correct: int, guesses: int, canaries: int) -> None:
    if not 0 <= correct <= guesses <= canaries or guesses < 1:
        raise ValueError(
            "Expected 0 <= correct <= guesses <= canaries and at least one guess, got "
            f"{correct} correct of {guesses} guesses on {canaries} canaries."
        )


def _check_delta(delta: float) -> None:
    if not 0 <= delta <= 1:
        raise ValueError(f"`delta` must be in [0, 1], got {delta}.")


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be in (0, 1), got {confidence}.")


def _check_scores(scores: Tensor) -> None:
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"Scores must be a vector of at least one, got {_of(scores)}.")
    if bool(scores.isnan().any()):
        raise ValueError("A score is NaN: the attacked network has diverged, or a reference has no spread.")


def _pair(members: Tensor, nonmembers: Tensor) -> tuple[Tensor, Tensor]:
    _check_scores(members)
    _check_scores(nonmembers)
    return members.detach().cpu().double(), nonmembers.detach().cpu().double()


def _of(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"
