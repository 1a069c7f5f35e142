"""Compressive sensing over massive MIMO: what is sent, what is found, limit cases, and the shared tester."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser

from groundwire.plugins.channels import PathLoss, Rayleigh, StepPower
from groundwire.plugins.compression import TopK
from groundwire.plugins.edge import EdgeStrategy, LocalSGD, MajorityVote, Uplink
from groundwire.plugins.edge.uplinks.massive_mimo import RECEIVERS, MassiveMIMO
from helpers.edge import check_strategy_part
from helpers.uplinks import check_uplink, plan, ready, updates

VARIANTS: dict[str, Callable[[], Uplink]] = {
    **{name: (lambda name=name: MassiveMIMO(16, receiver=name)) for name in RECEIVERS},
    "few_slots": lambda: MassiveMIMO(16, bandwidth=0.4, sparsity=0.2, power=StepPower([50.0, 90.0])),
    "dense": lambda: MassiveMIMO(3, sparsity=1.0, noise_var=0.0),
    "path_loss": lambda: MassiveMIMO(16, fading=Rayleigh(path_loss=PathLoss()), max_support=2),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_shared_checks(name: str) -> None:
    check_uplink(VARIANTS[name], noisy=True, stateful=name != "dense")  # where everything is sent, nothing remains


def exact(**settings: object) -> MassiveMIMO:
    """Without noise and with antennas enough for all devices."""
    return MassiveMIMO(**({"num_antennas": 24, "noise_var": 0.0, "sparsity": 0.1} | settings))


@pytest.mark.parametrize("receiver", ["greedy_lmmse", "lmmse", "zero_forcing"])
def test_without_noise_the_server_has_each_devices_largest_entries(receiver: str) -> None:
    x = updates(5, 101)
    received = ready(lambda: exact(receiver=receiver), 101, 5)(x, plan(5))
    expected = TopK(k=10).roundtrip(x, plan(5).key).values
    torch.testing.assert_close(received.rows, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(received.weights, plan(5).weights)
    assert float(received.metrics["uplink/nmse"]) < 1e-6


def test_more_devices_than_antennas_are_found_where_few_are_active() -> None:
    """50 devices at 24 antennas, about 3 active in a slot: what no linear receiver can do."""
    x = updates(50, 400)
    expected = TopK(k=12).roundtrip(x, plan(50).key).values
    errors = {}
    for receiver in ("greedy_lmmse", "lmmse", "maximum_ratio"):
        build = lambda r=receiver: exact(receiver=r, num_entries=12, sparsity=None, noise_var=1e-4)
        received = ready(build, 400, 50)(x, plan(50))
        errors[receiver] = float((received.rows - expected).square().sum() / expected.square().sum())
    assert errors["greedy_lmmse"] < 1e-3
    assert errors["lmmse"] > 0.3
    assert errors["maximum_ratio"] > 1.0


def test_sent_and_remembered_make_the_update() -> None:
    uplink = ready(lambda: exact(bandwidth=0.5), 101, 4)
    total, sent = torch.zeros(4, 101), torch.zeros(4, 101)
    for t in range(6):
        x = updates(4, 101, seed=t)
        total += x
        sent += uplink(x, plan(4, index=t)).rows
        torch.testing.assert_close(sent + uplink.memory.residual("update"), total, rtol=1e-3, atol=1e-3)
    assert float(uplink.memory.residual("update").norm()) > 0.1 * float(total.norm())


def test_every_device_spends_exactly_its_power() -> None:
    x = torch.cat([updates(3, 101), 1e4 * updates(1, 101), torch.zeros(1, 101)])
    for bandwidth, uses in ((1.0, 102), (0.5, 50)):
        cost = ready(lambda b=bandwidth: MassiveMIMO(8, power=7.0, bandwidth=b), 101, 5)(x, plan(5)).cost
        assert cost.energy is not None
        np.testing.assert_allclose(cost.energy, [7.0, 7.0, 7.0, 7.0, 0.0], rtol=1e-5)
        assert cost.channel_uses == uses
        assert cost.bits == 0


def test_orders_are_permutations_of_the_devices_own() -> None:
    uplink, x = ready(lambda: MassiveMIMO(4), 200, 6), updates(6, 200)
    orders = uplink._order(x, plan(6).key)
    assert torch.equal(orders.sort(dim=1).values, torch.arange(200).expand(6, -1))
    same = (orders.unsqueeze(0) == orders.unsqueeze(1)).double().mean(2)
    assert bool((same - torch.eye(6) < 0.06).all()), "two orders agree in one place on average"
    assert torch.equal(orders, uplink._order(x, plan(6, index=9).key)), "the same in all rounds"
    assert torch.equal(orders[[4, 1]], uplink._order(x[:2], plan((4, 1)).key)), "of the device, not of its row"
    assert not torch.equal(orders, uplink._order(x, plan(6, seed=1).key))


def test_few_slots_take_another_part_each_round() -> None:
    uplink = ready(lambda: exact(bandwidth=0.25, sparsity=1.0), 200, 3)
    seen = torch.zeros(3, 200)
    for t in range(40):
        rows = uplink(torch.ones(3, 200), plan(3, index=t)).rows
        assert bool(((rows != 0).sum(1) == 50).all())
        seen += rows != 0
    assert bool((seen > 0).all()), "in 40 rounds each entry has its turn: it is left out with 0.75^40"


@pytest.mark.parametrize(("numel", "k"), [(200, 20), (101, 30), (7, 7), (5, 1), (1, 1)])
def test_large_entries_side_by_side_make_no_slot_crowded(numel: int, k: int) -> None:
    """All devices' large entries lie at the same places; permuted, symbols are active as often as chance says."""
    x = torch.zeros(1, numel)
    x[:, :k] = 1.0
    uplink = ready(lambda: MassiveMIMO(4, num_entries=k), numel, 300)
    received = uplink(x.expand(300, -1).clone(), plan(300))
    measured, expected = float(received.metrics["uplink/activity"]), uplink._activity
    assert abs(measured - expected) < 5 * math.sqrt(max(expected * (1 - expected), 1e-9) / 300)
    if numel == 200:
        assert expected == pytest.approx(1 - 0.9**2, abs=0.001)


def test_dense_updates_fall_back_to_linear_mmse() -> None:
    x = 3 + updates(6, 60)
    rows = [
        ready(lambda r=r: MassiveMIMO(30, receiver=r, sparsity=1.0, power=1e6), 60, 6)(x, plan(6)).rows
        for r in ("greedy_lmmse", "lmmse")
    ]
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-4, atol=1e-4)


def test_overloaded_slots_are_told() -> None:
    x = 3 + updates(10, 60)
    received = ready(lambda: MassiveMIMO(2, sparsity=1.0, power=1e6), 60, 10)(x, plan(10))
    assert float(received.metrics["uplink/slot_overloaded"]) > 0.9
    assert float(received.metrics["uplink/support_size"]) <= 2
    assert bool(torch.isfinite(received.rows).all())
    fine = ready(lambda: MassiveMIMO(64, num_entries=2), 60, 10)(x, plan(10))
    assert float(fine.metrics["uplink/slot_overloaded"]) < 0.1


def test_receivers_hear_the_same_air() -> None:
    """Paired: with one receiver or another, the same is sent and remembered."""
    x = updates(5, 101)
    memories = []
    for receiver in RECEIVERS:
        uplink = ready(lambda r=receiver: MassiveMIMO(16, receiver=r), 101, 5)
        uplink(x, plan(5))
        memories.append(uplink.memory.residual("update"))
    assert all(torch.equal(memory, memories[0]) for memory in memories)


def test_noise_at_high_power_vanishes() -> None:
    x, errors = updates(8, 400), []
    for power in (1e1, 1e3, 1e5, 1e8):
        received = ready(lambda p=power: MassiveMIMO(16, power=p, sparsity=0.05), 400, 8)(x, plan(8))
        errors.append(float(received.metrics["uplink/nmse"]))
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-4


def test_aggregators_see_single_devices() -> None:
    check_strategy_part(lambda: EdgeStrategy(4, uplink=MassiveMIMO(16), aggregator=MajorityVote()))


def test_trains_with_local_updates_and_resumes() -> None:
    check_strategy_part(
        lambda: EdgeStrategy(
            4, local=LocalSGD(lr=0.05, num_steps=3), uplink=MassiveMIMO(8, sparsity=0.3, bandwidth=0.5)
        )
    )


def test_builds_from_yaml_and_tells_its_settings() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(Uplink, "uplink")
    init = {"num_antennas": 9, "receiver": "lmmse", "fading": {"class_path": "groundwire.plugins.channels.Rayleigh"}}
    path = f"{MassiveMIMO.__module__}.MassiveMIMO"
    uplink = parser.instantiate(parser.parse_object({"uplink": {"class_path": path, "init_args": init}})).uplink
    assert isinstance(uplink, MassiveMIMO)
    for part in ("num_antennas=9", "receiver='lmmse'", "ConstantPower", "sparsity=0.1"):
        assert part in repr(uplink)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_antennas": 0}, r"`num_antennas` must be at least 1, got 0"),
        ({"receiver": "zf"}, r"Unknown receiver 'zf'; allowed are 'greedy_lmmse', 'lmmse', 'zero_forcing'"),
        ({"sparsity": 0.1, "num_entries": 3}, r"Give either `sparsity` .* or `num_entries`"),
        ({"sparsity": 1.5}, r"`sparsity` .* must be in \(0, 1\], got 1.5"),
        ({"power": 0.0}, r"power_per_round must be > 0 and finite"),
        ({"noise_var": -1.0}, r"`noise_var` is a variance"),
        ({"slack": -0.5}, r"`slack` must be finite and >= 0, got -0.5"),
        ({"max_support": 0}, r"`max_support` must be at least 1, got 0"),
        ({"fading": Rayleigh(block=True)}, r"`fading` must be drawn for each antenna by itself \(block=False\)"),
    ],
)
def test_bad_input(settings: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        MassiveMIMO(**({"num_antennas": 4} | settings))


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match=r"keeps k=60 entries for s=50 real channel uses, but needs 1 <= k <= s"):
        ready(lambda: MassiveMIMO(4, bandwidth=0.5, num_entries=60), 100, 3)
    with pytest.raises(ValueError, match=r"`channel_uses` is 101 channel uses a round"):
        ready(lambda: MassiveMIMO(4, channel_uses=101), 100, 3)
    with pytest.raises(ValueError, match=r"Zero forcing needs M <= N_r, got M=5 devices at N_r=4 antennas"):
        ready(lambda: MassiveMIMO(4, receiver="zero_forcing"), 100, 5)(updates(5, 100), plan(5))
