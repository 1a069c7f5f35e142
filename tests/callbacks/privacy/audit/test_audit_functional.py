"""Bounds, ROC curves and attack scores against scipy, scikit-learn, exact sums, and mechanisms of known epsilon."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import binomtest, norm
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.metrics import roc_curve as sklearn_roc_curve
from torch import Tensor

from groundwire.callbacks.privacy.audit.functional import (
    auc,
    balanced_accuracy,
    clopper_pearson,
    default_guesses,
    epsilon_from_roc,
    one_run_audit,
    one_run_epsilon_lower_bound,
    one_run_p_value,
    roc_curve,
    tpr_at_fpr,
)
from groundwire.callbacks.privacy.audit.scores import (
    lira_offline,
    lira_online,
    loss_scores,
    losses_of,
    rmia_offline,
    true_class_logit,
)

bound_of = cache(one_run_epsilon_lower_bound)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    """Of one release of the Gaussian mechanism, exactly: Balle and Wang, ICML 2018, Theorem 8."""
    s = noise_multiplier

    def delta_of(epsilon: float) -> float:
        return norm.cdf(1 / (2 * s) - epsilon * s) - math.exp(epsilon) * norm.cdf(-1 / (2 * s) - epsilon * s)

    return float(brentq(lambda epsilon: delta_of(epsilon) - delta, 0, 100))


def most_violations(trials: int, level: float = 0.05) -> float:
    """Violations of a bound at this level, and three standard errors."""
    return trials * (level + 3 * math.sqrt(level * (1 - level) / trials))


# ---------------------------------------------------------------- one run


@pytest.mark.parametrize(
    ("canaries", "correct", "delta", "epsilon"),
    [
        (100, 100, 0.0, math.log(0.05**0.01 / (1 - 0.05**0.01))),  # all right: accuracy^r = 0.05
        (1000, 1000, 0.0, math.log(0.05**0.001 / (1 - 0.05**0.001))),
        (100, 100, 1e-5, 3.49),  # measured with another implementation
        (1000, 1000, 1e-5, 5.78),
        (1000, 600, 1e-5, 0.297),
        (1000, 510, 1e-5, 0.0),
    ],
)
def test_one_run_bound_where_all_are_guessed(canaries: int, correct: int, delta: float, epsilon: float) -> None:
    assert one_run_epsilon_lower_bound(correct, canaries, canaries, delta) == pytest.approx(epsilon, abs=5e-3)


@pytest.mark.parametrize(("canaries", "guesses", "correct"), [(20, 20, 17), (50, 30, 22), (40, 10, 10), (30, 30, 0)])
@pytest.mark.parametrize("delta", [0.0, 1e-3, 0.05])
def test_one_run_p_value_matches_exact_sums(canaries: int, guesses: int, correct: int, delta: float) -> None:
    accuracy = Fraction(3, 4)  # e^eps = 3

    def at_least(least: int) -> Fraction:
        return sum(
            (
                math.comb(guesses, k) * accuracy**k * (1 - accuracy) ** (guesses - k)
                for k in range(max(least, 0), guesses + 1)
            ),
            Fraction(0),
        )

    alpha = max(((at_least(correct - i) - at_least(correct)) / i for i in range(1, correct + 1)), default=Fraction(0))
    expected = min(1.0, float(at_least(correct)) + 2 * canaries * delta * float(alpha))
    assert one_run_p_value(correct, guesses, canaries, math.log(3), delta) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("canaries", "guesses", "correct"), [(1000, 500, 400), (100, 100, 90), (2000, 1000, 700)])
@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-3])
def test_one_run_p_value_grows_with_epsilon(canaries: int, guesses: int, correct: int, delta: float) -> None:
    values = [one_run_p_value(correct, guesses, canaries, epsilon, delta) for epsilon in np.linspace(0, 8, 60)]
    assert (np.diff(values) >= -1e-15).all()
    low = one_run_epsilon_lower_bound(correct, guesses, canaries, delta)
    assert one_run_p_value(correct, guesses, canaries, low, delta) <= 0.05
    assert one_run_p_value(correct, guesses, canaries, low + 1e-3, delta) > 0.05


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 2.0])
def test_one_run_bound_is_valid_and_near_for_randomized_response(epsilon: float) -> None:
    trials, m = 300, 1000
    truth = torch.rand(trials, m, generator=generator(1)) < 1 / (1 + math.exp(-epsilon))
    bounds = [bound_of(int(correct), m, m) for correct in truth.sum(dim=1)]
    assert sum(bound > epsilon for bound in bounds) <= most_violations(trials)
    assert np.mean(bounds) > 0.7 * epsilon


@pytest.mark.parametrize("noise_multiplier", [0.5, 1.0, 2.0])
def test_one_run_audit_is_valid_for_the_gaussian_mechanism(noise_multiplier: float) -> None:
    epsilon, trials, m = gaussian_epsilon(noise_multiplier, 1e-5), 40, 1000
    g = generator(2)
    bounds = []
    for _ in range(trials):
        member = torch.rand(m, generator=g) < 0.5
        scores = member + noise_multiplier * torch.randn(m, generator=g)
        bounds.append(one_run_audit(scores, member, delta=1e-5).epsilon)
    assert max(bounds) < epsilon
    assert np.mean(bounds) > 0.1 * epsilon


def test_one_run_audit_without_information_seldom_finds_any() -> None:
    trials, m, g = 300, 200, generator(3)
    found = 0
    for _ in range(trials):
        member = torch.rand(m, generator=g) < 0.5
        found += one_run_audit(torch.randn(m, generator=g), member).epsilon > 0
    assert found <= most_violations(trials)


def test_one_run_audit_breaks_ties_without_a_look_at_membership() -> None:
    for member in (torch.arange(1000) < 500, torch.arange(1000) >= 500):  # sorted by membership
        bound = one_run_audit(torch.zeros(1000), member, guesses=[1000])
        assert bound.epsilon == 0.0
        assert 400 < bound.correct < 600


def test_one_run_audit_takes_the_best_number_of_guesses_at_bonferroni_s_level() -> None:
    member = torch.rand(1000, generator=generator(4)) < 0.5
    scores = torch.randn(1000, generator=generator(5))
    scores[:100] = 100 * (2 * member[:100].float() - 1)  # a tenth is given away
    several = one_run_audit(scores, member, guesses=[50, 1000])
    one = one_run_audit(scores, member, confidence=0.975, guesses=[50])
    assert several == one
    assert several.correct == several.guesses == 50
    assert several.epsilon > one_run_audit(scores, member, guesses=[1000]).epsilon
    assert several.epsilon < one_run_audit(scores, member, guesses=[50]).epsilon


def test_default_guesses_are_even_and_within_the_canaries() -> None:
    for canaries in [2, 3, 11, 20, 21, 101, 1000, 2001]:
        numbers = default_guesses(canaries)
        assert numbers == sorted(set(numbers))
        assert all(r % 2 == 0 and 2 <= r <= canaries for r in numbers)
        assert numbers[-1] == canaries - canaries % 2
    assert default_guesses(1000) == [20, 50, 100, 200, 400, 700, 1000]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: one_run_p_value(3, 2, 5, 1.0), "correct <= guesses"),
        (lambda: one_run_p_value(0, 0, 5, 1.0), "at least one guess"),
        (lambda: one_run_p_value(1, 2, 5, -1.0), "`epsilon`"),
        (lambda: one_run_p_value(1, 2, 5, 1.0, 1.5), "`delta`"),
        (lambda: one_run_epsilon_lower_bound(1, 2, 5, 0.0, 1.0), "`confidence`"),
        (lambda: one_run_audit(torch.zeros(4), torch.zeros(4)), "must be bool"),
        (lambda: one_run_audit(torch.zeros(4), torch.zeros(4) > 0, guesses=[3]), "even numbers from 2 to 4"),
        (lambda: one_run_audit(torch.full((4,), math.nan), torch.zeros(4) > 0), "NaN"),
        (lambda: default_guesses(1), "`canaries`"),
        (lambda: auc(torch.zeros(0), torch.zeros(1)), "at least one"),
        (lambda: tpr_at_fpr(torch.zeros(1), torch.zeros(1), -0.1), "`fpr`"),
        (lambda: clopper_pearson(3, 2), "`successes`"),
        (lambda: epsilon_from_roc(torch.zeros(3), torch.zeros(3), false_positives=[3]), "below the group's size 3"),
        (lambda: epsilon_from_roc(torch.zeros(3), torch.zeros(3), false_positives=[]), "at least 0"),
        (lambda: true_class_logit(torch.zeros(3, 1), torch.zeros(3)), "C >= 2"),
        (lambda: loss_scores(torch.zeros(3), torch.zeros(3)), r"\(K, 3\)"),
        (lambda: lira_offline(torch.zeros(3), torch.zeros(1, 3), torch.zeros(1, 3) > 0), "at least 2 shadow networks"),
        (lambda: lira_offline(torch.zeros(3), torch.zeros(2, 4), torch.zeros(2, 4) > 0), r"\(n,\) and \(K, n\)"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------- ROC


@pytest.fixture(params=["continuous", "with ties"])
def groups(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    members = 0.7 + torch.randn(300, generator=generator(1), dtype=torch.float64)
    nonmembers = torch.randn(200, generator=generator(2), dtype=torch.float64)
    return (members, nonmembers) if request.param == "continuous" else (members.round(), nonmembers.round())


def test_roc_matches_sklearn(groups: tuple[Tensor, Tensor]) -> None:
    labels, scores = np.repeat([1, 0], [300, 200]), torch.cat(groups).numpy()
    fpr, tpr, thresholds = roc_curve(*groups)
    expected = sklearn_roc_curve(labels, scores, drop_intermediate=False)
    for ours, theirs in zip((fpr, tpr, thresholds), expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs)
    assert auc(*groups) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    best = max(balanced_accuracy_score(labels, scores >= t) for t in thresholds.numpy())
    assert balanced_accuracy(*groups) == pytest.approx(best, abs=1e-12)
    for rate in (0.0, 0.01, 0.1, 1.0):
        assert tpr_at_fpr(*groups, fpr=rate) == max(t for f, t in zip(*expected[:2], strict=True) if f <= rate)


def test_clopper_pearson_matches_scipy() -> None:
    for successes, trials in [(0, 10), (3, 10), (10, 10), (1, 1000)]:
        exact = binomtest(successes, trials).proportion_ci(confidence_level=0.9, method="exact")  # two-sided
        low, high = clopper_pearson(successes, trials, confidence=0.95)
        if successes:
            assert low == pytest.approx(exact.low, rel=1e-9)
        if successes < trials:
            assert high == pytest.approx(exact.high, rel=1e-9)
    assert clopper_pearson(0, 10)[0] == 0.0
    assert clopper_pearson(10, 10)[1] == 1.0


def test_scores_may_be_infinite() -> None:
    member, nonmember = torch.tensor([math.inf, 1.0]), torch.tensor([-math.inf, 0.0])
    assert auc(member, nonmember) == 1.0
    assert epsilon_from_roc(member, nonmember) == 0.0  # two of each are no evidence


@pytest.mark.parametrize("direction", ["members", "non-members"])
def test_epsilon_from_roc_sees_both_directions(direction: str) -> None:
    """A tenth of one group is given away: only one of the two tests tells."""
    n = 4000
    members = torch.randn(n, generator=generator(1))
    nonmembers = torch.randn(n, generator=generator(2))
    if direction == "members":
        members[: n // 10] = 10.0
    else:
        nonmembers[: n // 10] = -10.0
    assert epsilon_from_roc(members, nonmembers) > 2.5
    assert epsilon_from_roc(members, nonmembers, delta=0.2) < 1.0


def test_epsilon_from_roc_by_hand() -> None:
    members, nonmembers = torch.ones(500), torch.zeros(800)
    level = 0.05 / 4  # two directions, two rates
    right = level ** (1 / 500), 1 - level ** (1 / 800)  # all members above, none of the others
    opposite = level ** (1 / 800), 1 - level ** (1 / 500)
    expected = max(math.log((tpr - 0.01) / fpr) for tpr, fpr in (right, opposite))
    assert epsilon_from_roc(members, nonmembers, 0.01, false_positives=[0]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("noise_multiplier", [0.5, 1.0, 3.0])
def test_epsilon_from_roc_is_valid_for_the_gaussian_mechanism(noise_multiplier: float) -> None:
    epsilon, trials, n, g = gaussian_epsilon(noise_multiplier, 1e-3), 100, 2000, generator(6)
    bounds = [
        epsilon_from_roc(
            1 + noise_multiplier * torch.randn(n, generator=g), noise_multiplier * torch.randn(n, generator=g), 1e-3
        )
        for _ in range(trials)
    ]
    assert sum(bound > epsilon for bound in bounds) <= most_violations(trials)
    assert np.mean(bounds) > 0.2 * epsilon


def test_epsilon_from_roc_is_valid_for_randomized_response() -> None:
    trials, n, g = 200, 2000, generator(7)
    keep = 1 / (1 + math.exp(-1.0))
    bounds = [
        epsilon_from_roc((torch.rand(n, generator=g) < keep).float(), (torch.rand(n, generator=g) > keep).float())
        for _ in range(trials)
    ]
    assert sum(bound > 1.0 for bound in bounds) <= most_violations(trials)


def test_epsilon_from_roc_holds_where_data_choose_the_threshold() -> None:
    """No information and one threshold: each interval is used at its full level."""
    trials, g = 1000, generator(8)
    found = sum(
        epsilon_from_roc(torch.randn(100, generator=g), torch.randn(100, generator=g), false_positives=[5]) > 0
        for _ in range(trials)
    )
    assert found <= most_violations(trials)


# ---------------------------------------------------------------- scores


def test_true_class_logit_is_the_logit_of_the_softmax() -> None:
    logits = torch.randn(50, 7, generator=generator(1), dtype=torch.float64)
    target = torch.randint(7, (50,), generator=generator(2))
    p = logits.softmax(dim=1)[torch.arange(50), target]
    phi = true_class_logit(logits, target)
    torch.testing.assert_close(phi, (p / (1 - p)).log())
    torch.testing.assert_close(losses_of(phi), torch.nn.functional.cross_entropy(logits, target, reduction="none"))
    sure = true_class_logit(torch.tensor([[1000.0, 0.0]]), torch.tensor([0]))  # p rounds to 1, phi does not
    assert sure.item() == 1000.0


def test_loss_scores_are_high_for_small_losses() -> None:
    losses, references = torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 5.0], [2.0, 4.0]])
    assert loss_scores(losses).tolist() == [-1.0, -2.0]
    assert loss_scores(losses, references).tolist() == [0.5, 2.5]


@pytest.mark.parametrize("own_spread", [True, False])
def test_lira_matches_normal_densities(own_spread: bool) -> None:
    g = generator(3)
    shadow_phi = torch.randn(10, 6, generator=g, dtype=torch.float64)
    member = torch.rand(6, 10, generator=g).argsort(dim=1).argsort(dim=1).T < 4  # 4 networks with each record
    phi = torch.randn(6, generator=g, dtype=torch.float64)
    inside = [shadow_phi[member[:, i], i].numpy() for i in range(6)]
    outside = [shadow_phi[~member[:, i], i].numpy() for i in range(6)]
    stds = {}
    for name, groups in (("in", inside), ("out", outside)):
        variances = [values.var(ddof=1) for values in groups]
        stds[name] = np.sqrt(variances if own_spread else [np.mean(variances)] * 6)  # equally many: a plain mean
    for i in range(6):
        log_in = norm.logpdf(phi[i], inside[i].mean(), stds["in"][i])
        log_out = norm.logpdf(phi[i], outside[i].mean(), stds["out"][i])
        assert lira_online(phi, shadow_phi, member, own_spread)[i].item() == pytest.approx(log_in - log_out)
        cdf = norm.cdf(phi[i], outside[i].mean(), stds["out"][i])
        assert norm.cdf(lira_offline(phi, shadow_phi, member, own_spread)[i].item()) == pytest.approx(cdf)


def test_lira_without_spread_is_finite() -> None:
    member = torch.tensor([[True], [True], [False], [False]])
    score = lira_online(torch.tensor([1.0]), member.double(), member)
    assert score.isfinite().all()
    assert score > 0


@pytest.mark.parametrize("gamma", [1.0, 1.5])
def test_rmia_matches_a_loop(gamma: float) -> None:
    g = generator(4)
    p, reference, p_z, reference_z = (torch.rand(*shape, generator=g) for shape in ((20,), (4, 20), (30,), (4, 30)))
    member = torch.rand(4, 20, generator=g) < 0.5
    member[0] = False
    expected = []
    for i in range(20):
        mean_out = np.mean([reference[k, i].item() for k in range(4) if not member[k, i]])
        ratio_x = p[i].item() / (0.5 * (1.3 * mean_out + 0.7))
        wins = 0
        for j in range(30):
            ratio_z = p_z[j].item() / (0.5 * (1.3 * reference_z[:, j].double().mean().item() + 0.7))
            wins += ratio_x / ratio_z > gamma
        expected.append(wins / 30)
    assert rmia_offline(p, reference, member, p_z, reference_z, gamma).tolist() == pytest.approx(expected)


def test_rmia_refuses_what_it_cannot_use() -> None:
    p, reference, none = torch.rand(3), torch.rand(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="one without it"):
        rmia_offline(p, reference, ~none, p, reference)
    with pytest.raises(ValueError, match="population_reference_probability"):
        rmia_offline(p, reference, none, p, torch.rand(2, 4))
    with pytest.raises(ValueError, match="`gamma`"):
        rmia_offline(p, reference, none, p, reference, gamma=0.0)
    with pytest.raises(ValueError, match="population must be a vector"):
        rmia_offline(p, reference, none, torch.rand(0), torch.rand(2, 0))
