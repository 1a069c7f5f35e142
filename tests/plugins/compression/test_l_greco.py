"""L-GreCo: the knapsack against brute force, and the choices of the compressor."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from groundwire.plugins.compression import QSGD, ErrorFeedback, LGreCo, PowerSGD, RandK, Sender, TopK
from groundwire.plugins.compression.l_greco import allocate
from groundwire.plugins.layout import ParameterLayout
from groundwire.plugins.random import Key
from helpers.compressors import rows

DENSITIES = (0.01, 0.05, 0.2, 0.5)


def brute_force(errors: list[list[float]], sizes: list[list[float]], budget: float) -> float:
    """The least total size within the budget."""
    return min(
        (
            sum(row[i] for row, i in zip(sizes, chosen, strict=True))
            for chosen in itertools.product(*(range(len(row)) for row in errors))
            if sum(row[i] for row, i in zip(errors, chosen, strict=True)) <= budget
        ),
        default=math.inf,
    )


def total(table: list[list[float]], chosen: list[int]) -> float:
    return sum(row[i] for row, i in zip(table, chosen, strict=True))


layers = st.lists(
    st.lists(st.tuples(st.floats(0, 10, width=32), st.integers(1, 100)), min_size=1, max_size=4), min_size=1, max_size=4
)


@given(layers, st.floats(0.01, 20))
@settings(max_examples=150, deadline=None)
def test_allocation_is_as_small_as_brute_force_and_hardly_over_budget(
    table: list[list[tuple[float, int]]], budget: float
) -> None:
    errors = [[error for error, _ in row] for row in table]
    sizes = [[float(size) for _, size in row] for row in table]
    chosen, best = allocate(errors, sizes, budget, num_buckets=1000), brute_force(errors, sizes, budget)
    if chosen is None:
        assert math.isinf(best), "what fits exactly must be found"
        return
    assert total(sizes, chosen) <= best
    assert total(errors, chosen) <= budget * (1 + len(errors) / 1000) + 1e-9


def test_the_reference_is_always_feasible() -> None:
    """Rounding up alone would make it infeasible in about a fifth of random instances."""
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        errors = torch.rand(7, 3, generator=g).sort(dim=1, descending=True).values.tolist()
        sizes = torch.rand(7, 3, generator=g).sort(dim=1).values.tolist()
        chosen = allocate(errors, sizes, sum(row[1] for row in errors), num_buckets=1000)
        assert chosen is not None
        assert total(sizes, chosen) <= total(sizes, [1] * 7) + 1e-12


def test_more_slack_is_never_larger() -> None:
    g = torch.Generator().manual_seed(1)
    errors = torch.rand(6, 4, generator=g).sort(dim=1, descending=True).values.tolist()
    sizes = torch.rand(6, 4, generator=g).sort(dim=1).values.tolist()
    found = [total(sizes, allocate(errors, sizes, budget) or [3] * 6) for budget in (0.5, 1.0, 2.0, 4.0)]
    assert found == sorted(found, reverse=True)


def test_no_options_are_refused() -> None:
    for errors in ([], [[]]):
        with pytest.raises(ValueError, match="at least one option"):
            allocate(errors, errors, 1.0)
    assert allocate([[math.inf]], [[1.0]], 1.0) is None
    assert allocate([[0.0, 0.0]], [[3.0, 2.0]], 0.0) == [1]


SHAPES = {
    "huge.weight": torch.Size((40, 100)),
    "small.weight": torch.Size((10, 20)),
    "tiny.weight": torch.Size((5, 20)),
}


def layered(compressor: Any, **options: Any) -> Sender:
    layout = ParameterLayout(names=tuple(SHAPES), shapes=tuple(SHAPES.values()), dtypes=(torch.float32,) * len(SHAPES))
    sender = Sender(compressor, granularity="layer", min_numel=0, **options)
    sender.setup(layout, num_devices=2)
    return sender


def updates(round: int) -> Tensor:
    """A huge layer whose energy lies in 20 entries, and small dense ones."""
    huge = torch.zeros(2, 4000)
    huge[:, :20] = 5 * rows(2, 20, seed=round)
    return torch.cat([huge, rows(2, 300, seed=100 + round)], dim=1)


def build(**options: Any) -> LGreCo:
    options = {"reference": 2, "period": 4, "num_observed": 2} | options
    return LGreCo([TopK(density=density) for density in DENSITIES], **options)


def test_an_insensitive_layer_pays_for_the_others_within_the_error_of_the_uniform_setting() -> None:
    adaptive, seen = build(), []
    sender = layered(adaptive)
    for t in range(5):
        x = updates(t)
        seen.append(x[0])
        message = sender(x, Key(seed=0, round=t, devices=(0, 1)))
    assert adaptive.choice["huge.weight"] == 0
    assert adaptive.choice["small.weight"] >= 2
    mean = (seen[2] + seen[3]) / 2  # device 0, the last two rounds before the choice

    def error(density_of: dict[str, float]) -> float:
        start, found = 0, 0.0
        for name, shape in SHAPES.items():
            x = mean[start : start + shape.numel()].abs().sort(descending=True).values
            found += float(x[max(1, round(density_of[name] * len(x))) :].square().sum().sqrt())
            start += shape.numel()
        return found

    chosen = error({name: DENSITIES[i] for name, i in adaptive.choice.items()})
    uniform = error(dict.fromkeys(SHAPES, DENSITIES[2]))
    assert chosen <= uniform * (1 + 3 / 10_000)
    before = layered(TopK(density=DENSITIES[2]))(updates(4), Key(seed=0, round=4, devices=(0, 1)))
    assert message.bits_wire < 0.7 * before.bits_wire


def test_identical_layers_keep_the_reference() -> None:
    adaptive = build(slack=1.0)
    shapes = {name: torch.Size((10, 20)) for name in "abc"}
    adaptive.setup(shapes)
    for t in (2, 3):
        for name in shapes:
            adaptive.roundtrip(rows(1, 200, seed=t), Key(seed=0, round=t, name=name))
    adaptive.adopt(adaptive.decide())
    sizes = [adaptive.options[i].roundtrip(rows(1, 200), Key(seed=0)).bits_wire for i in adaptive.choice.values()]
    assert sum(sizes) <= 3 * TopK(density=DENSITIES[2]).roundtrip(rows(1, 200), Key(seed=0)).bits_wire


def test_before_the_first_choice_and_without_device_0_it_is_the_reference() -> None:
    adaptive, plain = layered(build()), layered(TopK(density=DENSITIES[2]))
    for t in range(4):
        key = Key(seed=0, round=t, devices=(0, 1))
        assert torch.equal(adaptive(updates(t), key).values, plain(updates(t), key).values)
    lonely = layered(build())
    for t in range(6):
        key = Key(seed=0, round=t, devices=(1,))
        message = lonely(updates(t)[1:], key)
        assert torch.equal(message.values, plain(updates(t)[1:], key).values)


def test_what_is_broken_is_not_observed() -> None:
    adaptive = build()
    sender = layered(adaptive)
    for t in range(5):
        x = updates(t)
        if t == 3:
            x[0, 0] = math.nan
        sender(x, Key(seed=0, round=t, devices=(0, 1)))
    assert adaptive.choice["huge.weight"] == 0, "the other observed round decides"


def test_saved_in_the_middle_of_a_period_it_goes_on() -> None:
    first, second = layered(ErrorFeedback(build())), layered(ErrorFeedback(build()))
    for t in range(3):
        first(updates(t), Key(seed=0, round=t, devices=(0, 1)))
    second.load_state_dict(first.state_dict())
    for t in range(3, 7):
        key = Key(seed=0, round=t, devices=(0, 1))
        assert torch.equal(first(updates(t), key).values, second(updates(t), key).values)
    assert first.compressor.choice == second.compressor.choice != dict.fromkeys(SHAPES, 2)


def test_other_families() -> None:
    for options in ([QSGD(num_levels=n) for n in (1, 3, 15)], [RandK(density=d) for d in (0.1, 0.5, 1.0)]):
        adaptive = LGreCo(options, reference=1, period=1, num_observed=1)
        sender = layered(adaptive)
        bits = [sender(updates(t), Key(seed=0, round=t, devices=(0, 1))).bits_wire for t in range(4)]
        assert bits[-1] <= bits[0] + 8 * len(SHAPES), "a byte a layer says what was chosen"
        assert adaptive.linear == options[0].linear
        assert adaptive.unbiased


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"options": []}, "1 to 256 compressors, got 0"),
        ({"reference": 4}, "index of one of 4 options, got 4"),
        ({"period": 0}, "`period` must be at least 1, got 0"),
        ({"num_observed": 5}, r"in \[1, period=4\], got 5"),
        ({"slack": 0.0}, "`slack` must be > 0, got 0.0"),
        ({"options": [PowerSGD(rank=1)] * 3 + [TopK(k=1)]}, "options of one family, got PowerSGD, TopK"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"options": [TopK(k=1)] * 4, "reference": 2, "period": 4, "num_observed": 1} | options
    with pytest.raises(ValueError, match=message):
        LGreCo(**given)


def test_one_vector_is_refused() -> None:
    with pytest.raises(ValueError, match="set granularity='layer'"):
        Sender(build()).setup(ParameterLayout.of_vector(10), num_devices=1)
