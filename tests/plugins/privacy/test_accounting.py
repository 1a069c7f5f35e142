"""Epsilon against a second library, numerical integration and frozen numbers; and the noise that a budget asks for."""

from __future__ import annotations

import math
import warnings
from typing import Any

import mpmath
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundwire.plugins.privacy import (
    PrivacyStatement,
    UnreachableBudgetError,
    gaussian_delta,
    gaussian_epsilon,
    noise_multiplier_for,
    spent_epsilon,
    steps_within,
)
from groundwire.plugins.privacy.accounting import warn_of_gdp

# (noise multiplier, sample rate, steps, delta): opacus 1.6.0 RDP, PRV, GDP; dp-accounting 0.6.0 RDP, PLD
GOLDEN: list[tuple[tuple[float, float, int, float], tuple[float, float, float], tuple[float, float]]] = [
    ((1.1, 256 / 60000, 14040, 1e-5), (2.5944, 2.3897, 2.3222), (2.5944, 2.3885)),
    ((0.6, 0.1, 100, 1e-5), (23.138, 20.585, 23.43), (23.354, 20.574)),
    ((2.3, 0.1, 300, 1e-4), (3.3114, 2.9927, 2.8824), (3.3114, 2.9826)),
    ((4.0, 1.0, 50, 1e-6), (10.089, 9.4926, 9.6617), (10.089, 9.4822)),
    ((0.5, 0.001, 2000, 1e-6), (5.7727, 4.6655, 1.4201), (5.7729, 4.6555)),
    ((10.0, 0.2, 200, 1e-5), (1.1758, 1.0847, 1.0637), (1.1758, 1.0749)),
]
GRID = [
    (0.8, 0.02, 500, 1e-5),
    (1.5, 0.05, 1000, 1e-6),
    (1.5, 0.3, 20, 1e-4),
    (3.0, 0.01, 5000, 1e-5),
    (2.0, 1.0, 3, 1e-5),
    (1.0, 0.001, 1, 1e-9),
]


@pytest.mark.parametrize(("run", "ours", "theirs"), GOLDEN)
def test_frozen_numbers(run: Any, ours: tuple[float, float, float], theirs: tuple[float, float]) -> None:
    rdp, prv, gdp = ours
    assert spent_epsilon(*run, "rdp") == pytest.approx(rdp, rel=1e-4)
    assert spent_epsilon(*run, "gdp") == pytest.approx(gdp, rel=2e-4)
    spent = spent_epsilon(*run)
    assert abs(spent - theirs[1]) <= 0.02  # another library's tight accountant
    assert spent == pytest.approx(theirs[1] if run[1] == 1 else prv, rel=2e-4)  # exact for full batches
    assert spent_epsilon(*run, "rdp") == pytest.approx(theirs[0], rel=1e-2)  # grids of orders differ
    assert spent <= spent_epsilon(*run, "rdp")


@pytest.mark.parametrize("run", GRID)
def test_a_second_library_agrees(run: tuple[float, float, int, float]) -> None:
    pytest.importorskip("dp_accounting", reason="optional: a second accountant")
    import dp_accounting
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    sigma, rate, steps, delta = run
    gaussian: Any = dp_accounting.GaussianDpEvent(sigma)
    one = gaussian if rate == 1 else dp_accounting.PoissonSampledDpEvent(rate, gaussian)
    event = dp_accounting.SelfComposedDpEvent(one, steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pld = PLDAccountant().compose(event).get_epsilon(delta)
        rdp = RdpAccountant().compose(event).get_epsilon(delta)
    assert spent_epsilon(*run) == pytest.approx(pld, rel=0.01, abs=0.012)  # PRV adds its error of 0.01 on top
    assert spent_epsilon(*run) >= pld - 1e-3
    assert spent_epsilon(*run, "rdp") == pytest.approx(rdp, rel=0.01)


# ---------------------------------------------------------------- one Gaussian, exactly


def hockey_stick(epsilon: float, mu: float) -> float:
    """Its definition, by integration in 30 digits: the mass by which N(mu, 1) exceeds e^epsilon N(0, 1)."""
    with mpmath.workdps(30):
        start = mpmath.mpf(epsilon) / mu + mpmath.mpf(mu) / 2  # where the densities' ratio is e^epsilon
        factor = mpmath.exp(epsilon)

        def excess(x: Any) -> Any:
            return mpmath.npdf(x, mu, 1) - factor * mpmath.npdf(x, 0, 1)

        return float(mpmath.quad(excess, [start, start + 2, start + 6, start + 40]))


@pytest.mark.parametrize(
    ("epsilon", "mu"),
    [(0.0, 1.0), (0.5, 0.3), (1.0, 1.0), (3.0, 1.0), (10.0, 2.0), (9.48, 50**0.5 / 4), (8.0, 1.0), (1e-4, 1e-3)],
)
def test_delta_of_a_gaussian_is_the_integral(epsilon: float, mu: float) -> None:
    assert gaussian_delta(epsilon, mu) == pytest.approx(hockey_stick(epsilon, mu), rel=1e-6, abs=1e-17)


@pytest.mark.parametrize("mu", [1e-3, 0.05, 0.5, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("delta", [0.1, 1e-3, 1e-6, 1e-12])
def test_epsilon_of_a_gaussian_inverts_the_integral(mu: float, delta: float) -> None:
    epsilon = gaussian_epsilon(mu, delta)
    if epsilon == 0:
        assert hockey_stick(0.0, mu) <= delta * (1 + 1e-9)
    else:
        assert hockey_stick(epsilon, mu) == pytest.approx(delta, rel=1e-5)


@settings(max_examples=150, deadline=None)
@given(mu=st.floats(1e-6, 1e5), log_delta=st.floats(-300, -0.001))
def test_epsilon_of_a_gaussian_exists_everywhere(mu: float, log_delta: float) -> None:
    epsilon = gaussian_epsilon(mu, 10**log_delta)
    assert epsilon >= 0
    assert math.isfinite(epsilon)


@pytest.mark.parametrize("mu", [1e7, 1e9, 1e12])
def test_epsilon_of_nearly_no_noise_is_a_large_number(mu: float) -> None:
    assert gaussian_epsilon(mu, 1e-5) == pytest.approx(mu**2 / 2, rel=1e-5)


def test_gaussian_at_the_edges() -> None:
    assert gaussian_delta(1.0, 0.0) == 0.0
    assert gaussian_epsilon(0.0, 1e-5) == 0.0
    assert gaussian_epsilon(math.inf, 1e-5) == math.inf
    with pytest.raises(ValueError, match="`mu` must be at least 0, got -1"):
        gaussian_epsilon(-1.0, 1e-5)
    with pytest.raises(ValueError, match="`mu` must be at least 0, got nan"):
        gaussian_epsilon(math.nan, 1e-5)


def test_full_batches_are_one_gaussian() -> None:
    for sigma, steps in ((1.0, 1), (4.0, 50), (20.0, 1000)):
        assert spent_epsilon(sigma, 1.0, steps, 1e-6) == gaussian_epsilon(math.sqrt(steps) / sigma, 1e-6)


# ---------------------------------------------------------------- monotone


@settings(max_examples=12, deadline=None)
@given(
    sigma=st.floats(1.0, 20),
    rate=st.floats(1e-4, 0.2),
    steps=st.integers(1, 2000),
    log_delta=st.floats(-10, -2),
    more=st.floats(1.05, 2.0),
)
def test_more_noise_fewer_records_fewer_steps_and_more_delta_cost_less(
    sigma: float, rate: float, steps: int, log_delta: float, more: float
) -> None:
    delta = 10**log_delta
    spent = spent_epsilon(sigma, rate, steps, delta, "rdp")
    assert spent_epsilon(sigma * more, rate, steps, delta, "rdp") <= spent
    assert spent_epsilon(sigma, rate / more, steps, delta, "rdp") <= spent + 1e-9
    assert spent_epsilon(sigma, rate, 2 * steps, delta, "rdp") >= spent
    assert spent_epsilon(sigma, rate, steps, min(delta * more, 0.5), "rdp") <= spent


def test_the_tight_accountant_is_monotone_too() -> None:
    by_noise = [spent_epsilon(s, 0.05, 200, 1e-5) for s in (1.0, 1.4, 4.0)]
    by_rate = [spent_epsilon(1.0, q, 200, 1e-5) for q in (0.01, 0.05, 0.2, 1.0)]
    by_steps = [spent_epsilon(1.0, 0.05, t, 1e-5) for t in (1, 100, 1000)]
    assert by_noise == sorted(by_noise, reverse=True)
    assert by_rate == sorted(by_rate)
    assert by_steps == sorted(by_steps)


def test_the_edges_of_a_run() -> None:
    for how in ("prv", "rdp", "gdp"):
        accounting: Any = how
        assert spent_epsilon(1.0, 0.1, 0, 1e-5, accounting) == 0.0
        assert spent_epsilon(0.0, 0.1, 5, 1e-5, accounting) == math.inf
    little_noise = spent_epsilon(0.05, 0.1, 5, 1e-5)  # where the numerical accountant fails
    assert little_noise == spent_epsilon(0.05, 0.1, 5, 1e-5, "rdp") > 100


# ---------------------------------------------------------------- what a budget asks for


@pytest.mark.parametrize("accounting", ["rdp", "prv", "gdp"])
@pytest.mark.parametrize(
    ("target", "rate", "steps", "delta"),
    [(1.0, 0.01, 1000, 1e-5), (3.0, 0.1, 300, 1e-4), (0.5, 1.0, 10, 1e-6), (2.0, 1.0, 1, 1e-5)],
)
def test_the_noise_meets_the_budget_and_not_much_less_would(
    target: float, rate: float, steps: int, delta: float, accounting: Any
) -> None:
    sigma = noise_multiplier_for(target, rate, steps, delta, accounting)
    assert spent_epsilon(sigma, rate, steps, delta, accounting) <= target
    assert spent_epsilon(0.995 * sigma, rate, steps, delta, accounting) > target


def test_a_small_budget_and_a_large_one() -> None:
    sigma = noise_multiplier_for(0.05, 0.001, 50, 1e-5)
    assert spent_epsilon(sigma, 0.001, 50, 1e-5) <= 0.05
    sigma = noise_multiplier_for(1e4, 0.1, 10, 1e-5, "rdp")
    assert spent_epsilon(sigma, 0.1, 10, 1e-5, "rdp") <= 1e4


def test_a_budget_out_of_reach_says_what_the_most_noise_costs() -> None:
    with pytest.raises(
        UnreachableBudgetError, match=r"`target_epsilon` 0.001 cannot be reached: .* 1000, 100 steps at"
    ):
        noise_multiplier_for(0.001, 1.0, 100, 1e-9)
    with pytest.raises(UnreachableBudgetError, match="Train fewer steps, with smaller batches, or raise the budget"):
        noise_multiplier_for(0.001, 0.5, 100, 1e-5, "rdp")


@pytest.mark.parametrize("accounting", ["rdp", "prv"])
@pytest.mark.parametrize(("target", "sigma", "rate", "delta"), [(3.0, 2.3, 0.1, 1e-4)])
def test_a_budget_pays_for_so_many_steps_and_not_one_more(
    target: float, sigma: float, rate: float, delta: float, accounting: Any
) -> None:
    steps = steps_within(target, sigma, rate, delta, at_most=4000, accounting=accounting)
    assert 0 < steps < 4000
    assert spent_epsilon(sigma, rate, steps, delta, accounting) <= target
    assert spent_epsilon(sigma, rate, steps + 1, delta, accounting) > target


def test_steps_of_full_batches_in_closed_form() -> None:
    steps = steps_within(2.0, 10.0, 1.0, 1e-6, at_most=10**6)
    assert gaussian_epsilon(math.sqrt(steps) / 10, 1e-6) <= 2.0 < gaussian_epsilon(math.sqrt(steps + 1) / 10, 1e-6)


def test_steps_at_the_edges() -> None:
    assert steps_within(1.0, 0.3, 1.0, 1e-6, at_most=100) == 0  # not even one
    assert steps_within(1.0, 0.0, 0.1, 1e-6, at_most=100) == 0
    assert steps_within(50.0, 5.0, 0.01, 1e-6, at_most=17, accounting="rdp") == 17
    assert steps_within(1.0, 5.0, 0.01, 1e-6, at_most=0) == 0
    assert steps_within(1.0, 5.0, 0.01, 1e-6, at_most=-3) == 0


class Asked:
    """Notes what the numerical accountant is asked, and answers a little below the fast one, as it does."""

    def __init__(self) -> None:
        self.runs: list[tuple[float, float, int, float]] = []

    def __call__(self, noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
        self.runs.append((noise_multiplier, sample_rate, steps, delta))
        return 0.9 * spent_epsilon(noise_multiplier, sample_rate, steps, delta, "rdp")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    asked = Asked()
    monkeypatch.setattr("groundwire.plugins.privacy.accounting._numerical_epsilon", asked)
    return asked


@pytest.mark.parametrize("at_most", [10**7, 4000])
def test_steps_of_an_endless_run_are_found_without_asking_far_beyond(asked: Asked, at_most: int) -> None:
    steps = steps_within(3.0, 2.3, 0.1, 1e-4, at_most)
    assert (
        0.9 * spent_epsilon(2.3, 0.1, steps, 1e-4, "rdp") <= 3.0 < 0.9 * spent_epsilon(2.3, 0.1, steps + 1, 1e-4, "rdp")
    )
    assert max(run[2] for run in asked.runs) <= 1.3 * steps
    assert len(asked.runs) <= 12


def test_steps_of_an_endless_run_by_the_tight_accountant() -> None:
    steps = steps_within(3.0, 1.0, 0.01, 1e-5, at_most=10**7)
    assert spent_epsilon(1.0, 0.01, steps, 1e-5) <= 3.0 < spent_epsilon(1.0, 0.01, steps + 1, 1e-5)


@pytest.mark.parametrize(("target", "rate", "steps"), [(3.0, 0.25, 40), (1.0, 0.01, 1000), (8.0, 0.1, 5000)])
def test_calibration_asks_the_slow_accountant_a_few_times(asked: Asked, target: float, rate: float, steps: int) -> None:
    sigma = noise_multiplier_for(target, rate, steps, 1e-5)
    assert asked(sigma, rate, steps, 1e-5) <= target < asked(0.999 * sigma, rate, steps, 1e-5)
    assert len(asked.runs) - 2 <= 6


@pytest.mark.parametrize("target", [46.0, 51.0])
def test_calibration_where_the_tight_accountant_gives_way(asked: Asked, target: float) -> None:
    """Epsilon jumps there, from below 50 to above."""
    sigma = noise_multiplier_for(target, 0.1, 500, 1e-5)
    assert spent_epsilon(sigma, 0.1, 500, 1e-5) <= target < spent_epsilon(0.998 * sigma, 0.1, 500, 1e-5)


@pytest.mark.parametrize(
    ("sigma", "rate", "steps"), [(0.41, 0.9, 200), (0.41, 0.9, 2000), (0.05, 0.1, 5), (1.0, 0.5, 300)]
)
def test_an_epsilon_above_50_is_counted_by_renyi_divergences(
    asked: Asked, sigma: float, rate: float, steps: int
) -> None:
    assert spent_epsilon(sigma, rate, steps, 1e-5) == spent_epsilon(sigma, rate, steps, 1e-5, "rdp") > 50
    assert not asked.runs
    assert spent_epsilon(4.0, rate, 20, 1e-5) < spent_epsilon(4.0, rate, 20, 1e-5, "rdp") < 50
    assert len(asked.runs) == 1


@pytest.mark.parametrize("delta", [1e-14, 1e-30, 1e-300])
def test_a_delta_below_rounding_is_counted_by_renyi_divergences(delta: float) -> None:
    spent = spent_epsilon(2.0, 0.1, 10, delta)
    assert spent == spent_epsilon(2.0, 0.1, 10, delta, "rdp")
    assert spent_epsilon(2.0, 0.1, 10, 1e-13) < spent < math.inf


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_multiplier": -1.0}, "`noise_multiplier` must be at least 0, got -1"),
        ({"noise_multiplier": math.nan}, "`noise_multiplier` must be at least 0, got nan"),
        ({"sample_rate": 0.0}, r"`sample_rate` is a probability in \(0, 1\], got 0"),
        ({"sample_rate": 1.5}, r"`sample_rate` is a probability in \(0, 1\], got 1.5"),
        ({"sample_rate": math.nan}, "got nan"),
        ({"steps": -1}, "`steps` must be at least 0, got -1"),
        ({"delta": 0.0}, r"`delta` must be in \(0, 1\), got 0"),
        ({"delta": 1.0}, r"`delta` must be in \(0, 1\), got 1"),
        ({"delta": math.nan}, "got nan"),
        ({"accounting": "pld"}, "must be one of prv, rdp, gdp, got 'pld'"),
    ],
)
def test_bad_runs_are_refused(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 3, "delta": 1e-5} | changes
    with pytest.raises(ValueError, match=message):
        spent_epsilon(**arguments)


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf])
def test_bad_budgets_are_refused(target: float) -> None:
    with pytest.raises(ValueError, match="`target_epsilon` must be a positive number, got"):
        noise_multiplier_for(target, 0.1, 10, 1e-5)
    with pytest.raises(ValueError, match="`target_epsilon` must be a positive number, got"):
        steps_within(target, 1.0, 0.1, 1e-5, at_most=10)


def test_calibration_needs_a_step() -> None:
    with pytest.raises(ValueError, match="`steps` must be at least 1, got 0"):
        noise_multiplier_for(1.0, 0.1, 0, 1e-5)


def test_the_approximation_is_announced_and_others_are_not() -> None:
    with pytest.warns(UserWarning, match="central-limit approximation: its epsilon can be three times too small"):
        warn_of_gdp("gdp")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_gdp("prv")
        warn_of_gdp("rdp")
    assert spent_epsilon(*GOLDEN[4][0], "gdp") < spent_epsilon(*GOLDEN[4][0], "rdp") / 3  # so it is


# ---------------------------------------------------------------- what is said


def statement(**changes: Any) -> PrivacyStatement:
    arguments: dict[str, Any] = {
        "mechanism": "Gaussian",
        "unit": "one record",
        "adjacency": "add-remove",
        "epsilon": 3.0,
        "delta": 1e-5,
    }
    return PrivacyStatement(**(arguments | changes))


def test_a_statement_says_all_that_it_depends_on() -> None:
    said = str(statement(assumptions=("A.", "B.")))
    assert said == "(3, 1e-05)-DP for one record (add-remove), by the Gaussian mechanism. A. B."
    assert str(statement(epsilon=math.inf)).startswith("(inf, ")


def test_a_statement_never_says_less_than_it_knows() -> None:
    """Printed numbers are claims: rounding them down claims more than is guaranteed."""
    for epsilon in (3.0004, 0.99994, 12.344):
        assert float(str(statement(epsilon=epsilon)).split(",")[0][1:]) >= epsilon
    assert float(str(statement(delta=1.2344e-5)).split(", ")[1].split(")")[0]) >= 1.2344e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": -0.1}, "`epsilon` must be at least 0, got -0.1"),
        ({"epsilon": math.nan}, "`epsilon` must be at least 0, got nan"),
        ({"delta": -1e-9}, r"`delta` must be in \[0, 1\), got"),
        ({"delta": 1.0}, r"`delta` must be in \[0, 1\), got 1"),
    ],
)
def test_statements_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        statement(**changes)
    assert statement(delta=0.0).delta == 0.0
