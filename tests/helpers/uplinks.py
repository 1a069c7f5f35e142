"""The tester through which every uplink goes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from groundwire.plugins.edge import EdgeStrategy, Received, Round, Uplink
from groundwire.plugins.layout import ParameterLayout
from groundwire.plugins.random import Key
from helpers.edge import check_strategy_part

Build = Callable[[], Uplink]


def plan(
    devices: int | tuple[int, ...],
    *,
    index: int = 0,
    seed: int = 0,
    weights: Tensor | None = None,
    num_rounds: int | None = 20,
    sample_rate: float | None = 1.0,
    is_empty: bool = False,
) -> Round:
    """A round in which all or the named devices take part."""
    ids = tuple(range(devices)) if isinstance(devices, int) else devices
    w = torch.full((len(ids),), 1 / len(ids)) if weights is None else weights / weights.sum()
    key = Key(seed=seed, round=index, devices=ids)
    return Round(index=index, num_rounds=num_rounds, key=key, weights=w, sample_rate=sample_rate, is_empty=is_empty)


def updates(devices: int, numel: int, seed: int = 0) -> Tensor:
    """Heavy-tailed rows of a norm around one, as gradients are."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(devices, numel, generator=g) ** 3 / (15 * numel) ** 0.5


def ready(build: Build, numel: int, devices: int, seed: int = 0) -> Uplink:
    uplink = build()
    uplink.setup(layout=ParameterLayout.of_vector(numel), num_devices=devices, seed=seed)
    return uplink


def check_uplink(
    build: Build,
    *,
    numel: int = 101,
    devices: int = 5,
    noisy: bool = False,
    stateful: bool = False,
    changes: bool = True,
    equivariant: bool = True,
) -> None:
    """What every uplink must pass.

    Args:
        build: A fresh uplink.
        numel: Model size to test with.
        devices: Population to test with.
        noisy: Whether its output depends on the seed.
        stateful: Whether it remembers anything from round to round.
        changes: Whether what arrives differs from what was sent.
        equivariant: Whether naming the devices otherwise leaves the aggregate as it is, up to rounding.
    """
    x = updates(devices, numel)
    before = x.clone()
    received = ready(build, numel, devices)(x, plan(devices))
    assert torch.equal(x, before), "updates are not the uplink's to change"
    _check_shape(received, x)

    again = ready(build, numel, devices)(x, plan(devices))
    assert torch.equal(received.rows, again.rows), "the same key must give the same draws"
    other = ready(build, numel, devices)(x, plan(devices, seed=1))
    assert torch.equal(received.rows, other.rows) != noisy

    if equivariant:
        order = torch.randperm(devices, generator=torch.Generator().manual_seed(2))
        shuffled = ready(build, numel, devices)(x[order], plan(tuple(order.tolist())))
        torch.testing.assert_close(_aggregate(received), _aggregate(shuffled), rtol=1e-3, atol=1e-4)

    for odd in (
        torch.zeros_like(x),
        torch.ones_like(x),
        torch.cat([x[:1] * 1e6, x[1:]]),
        torch.cat([0 * x[:1], x[1:]]),
    ):
        _check_shape(ready(build, numel, devices)(odd, plan(devices)), odd)
    _check_shape(ready(build, numel, 1)(x[:1], plan(1)), x[:1])
    _check_shape(ready(build, numel, devices)(x.double(), plan(devices)), x.double())

    _check_rounds(build, numel, devices, stateful)
    check_strategy_part(lambda: EdgeStrategy(num_devices=4, uplink=build()), changes=changes)


def _check_shape(received: Received, x: Tensor) -> None:
    rows = received.rows
    assert rows.shape in {(1, x.shape[1]), tuple(x.shape)}
    assert rows.dtype == x.dtype
    assert torch.isfinite(rows).all()
    assert received.weights.shape == rows.shape[:1]
    assert abs(float(received.weights.sum()) - 1) < 1e-6
    cost = received.cost
    assert isinstance(cost.bits, int)
    assert 0 <= cost.bits_ideal <= cost.bits + 1e-6, "no code is better than the ideal one"
    if cost.energy is not None:
        assert cost.energy.shape == x.shape[:1]
        assert cost.energy.dtype == torch.float64


def _aggregate(received: Received) -> Tensor:
    return received.weights.to(received.rows.dtype) @ received.rows


def _check_rounds(build: Build, numel: int, devices: int, stateful: bool) -> None:
    """Six rounds with changing participants, against three, a saved state, and three more in a fresh uplink."""
    groups = [tuple(range(devices)), (0, 2), (1, 3, 4), (2,), tuple(range(devices)), (0, 4)]
    inputs = [updates(len(ids), numel, seed=10 + t) for t, ids in enumerate(groups)]
    whole = ready(build, numel, devices)
    rows = [whole(x, plan(ids, index=t)).rows.clone() for t, (x, ids) in enumerate(zip(inputs, groups, strict=True))]
    first = ready(build, numel, devices)
    for t in range(3):
        first(inputs[t], plan(groups[t], index=t))
    state = copy.deepcopy(first.state_dict())
    second = ready(build, numel, devices)
    second.load_state_dict(state)
    for t in range(3, 6):
        assert torch.equal(second(inputs[t], plan(groups[t], index=t)).rows, rows[t]), (
            "a resumed uplink must not differ"
        )
    forgetful = ready(build, numel, devices)
    remembers = any(not torch.equal(forgetful(inputs[t], plan(groups[t], index=t)).rows, rows[t]) for t in range(3, 6))
    assert remembers == stateful
