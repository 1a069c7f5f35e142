import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundwire.plugins.channels import ConstantPower, LinearPower, PowerSchedule, StepPower
from helpers.channels import build_from_yaml

T = 300


def test_the_papers_schedules() -> None:
    # Mean 200 over 300 rounds: 100 (2 (t - 1) / 299 + 1), and 100, 200, 300 on thirds, t counted from 1.
    t = np.arange(1, T + 1)
    papers = {
        ConstantPower(200): np.full(T, 200.0),
        LinearPower(100, 300): 100 * (2 * (t - 1) / 299 + 1),
        StepPower([100, 200, 300]): np.select([t <= 100, t <= 200], [100.0, 200.0], 300.0),
        StepPower([300, 200, 100]): np.select([t <= 100, t <= 200], [300.0, 200.0], 100.0),
    }
    for schedule, expected in papers.items():
        np.testing.assert_allclose([schedule(round, T) for round in range(T)], expected, rtol=1e-12)
        assert schedule.average(T) == pytest.approx(200, rel=1e-12)
        schedule.check_average(200.0, T)
        with pytest.raises(ValueError, match=r"power schedule averages 200\.?\d* over 300 rounds, above the limit 199"):
            schedule.check_average(199.0, T)


@given(
    levels=st.lists(st.floats(0.1, 1e6), min_size=1, max_size=5), num_rounds=st.integers(5, 60), low=st.floats(0.1, 1e6)
)
def test_average_is_the_mean_of_what_is_spent(levels: list[float], num_rounds: int, low: float) -> None:
    for schedule in (StepPower(levels), LinearPower(low, levels[0]), ConstantPower(low)):
        spent = [schedule(round, num_rounds) for round in range(num_rounds)]
        assert min(spent) > 0
        assert schedule.average(num_rounds) == pytest.approx(np.mean(spent))
    assert LinearPower(low, levels[0]).average(num_rounds) == pytest.approx((low + levels[0]) / 2)


def test_uneven_blocks_count_as_they_are() -> None:
    schedule = StepPower([10.0, 20.0, 30.0])
    assert [schedule(round, 4) for round in range(4)] == [10, 10, 20, 30]
    assert schedule.average(4) == 17.5  # not 20: the limit is checked on what is spent


def test_one_round_spends_the_average() -> None:
    assert LinearPower(1.0, 3.0)(0, 1) == 2.0


def test_a_schedule_is_not_stretched_past_its_run() -> None:
    for schedule in (LinearPower(1, 2), StepPower([1, 2])):
        for round in (-1, 10):
            with pytest.raises(ValueError, match=rf"Round {round} is outside \[0, 10\).*ConstantPower"):
                schedule(round, 10)
    assert ConstantPower(3.0)(10, 10) == 3.0  # its average holds for ever
    with pytest.raises(ValueError, match="counts from 0, got -1"):
        ConstantPower(3.0)(-1, 10)


@pytest.mark.parametrize("power", [0.0, -1.0, math.nan, math.inf])
def test_refuses_power_that_is_not_positive(power: float) -> None:
    message = r"power_per_round must be > 0 and finite \(energy of one round, not per symbol\); got"
    for make in (
        lambda: ConstantPower(power),
        lambda: LinearPower(power, 1),
        lambda: LinearPower(1, power),
        lambda: StepPower([1, power]),
        lambda: ConstantPower(1).check_average(power, 10),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="at least one energy"):
        StepPower([])
    with pytest.raises(ValueError, match="3 energies, but the run has only 2 rounds"):
        StepPower([1, 2, 3])(0, 2)
    for schedule in (ConstantPower(1), LinearPower(1, 2)):
        with pytest.raises(ValueError, match="`num_rounds` must be at least 1, got 0"):
            schedule.average(0)


@pytest.mark.parametrize(
    ("yaml", "kind"),
    [
        ("{class_path: groundwire.plugins.channels.ConstantPower, init_args: {average: 500}}", ConstantPower),
        ("{class_path: groundwire.plugins.channels.LinearPower, init_args: {low: 100, high: 300}}", LinearPower),
        ("{class_path: groundwire.plugins.channels.StepPower, init_args: {levels: [100, 300]}}", StepPower),
    ],
)
def test_builds_from_yaml(yaml: str, kind: type) -> None:
    assert isinstance(build_from_yaml(PowerSchedule, yaml), kind)
