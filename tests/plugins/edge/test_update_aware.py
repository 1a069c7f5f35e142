"""Update-aware scheduling against the formulas of its policies, its limits, and the shared tester."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
from torch import Tensor

from groundwire.plugins.channels import FadingMAC, NoFading, PathLoss, Rayleigh
from groundwire.plugins.compression import DDSGDQuantizer, LargestEntries
from groundwire.plugins.compression.packing import support_bytes
from groundwire.plugins.edge import EdgeStrategy, Received, Uplink
from groundwire.plugins.edge.uplinks.update_aware import UpdateAware, allocate, largest
from helpers.channels import build_from_yaml
from helpers.compressors import check_compressor
from helpers.edge import check_strategy_part, fit
from helpers.uplinks import check_uplink, plan, ready, updates

POLICIES: dict[str, dict[str, Any]] = {
    "bc": {"num_scheduled": 3},
    "bn2": {"num_scheduled": 3},
    "bc_bn2": {"num_scheduled": 3, "num_candidates": 6},
    "bn2_c": {"num_scheduled": 3},
    "random": {"num_scheduled": 3},
    "round_robin": {"num_scheduled": 3},
    "all": {},
}
M, D = 12, 400


def build(policy: str, **options: Any) -> Callable[[], UpdateAware]:
    return lambda: UpdateAware(policy, **({"bandwidth": 8.0} | POLICIES[policy] | options))


def spread(devices: int = M, numel: int = D, seed: int = 0) -> Tensor:
    """Updates whose norms differ by up to a factor of 20."""
    scale = torch.logspace(-1, 0.3, devices)[torch.randperm(devices, generator=torch.Generator().manual_seed(seed))]
    return updates(devices, numel, seed) * scale.unsqueeze(1)


def gains(devices: int, index: int = 0, seed: int = 0) -> np.ndarray:
    """``|h|^2`` as the channel draws them."""
    key = plan(devices, index=index, seed=seed).key
    return Rayleigh(block=True).gains(key, 1).flatten().abs().square().double().numpy()


def sent_by(received: Received, x: Tensor) -> dict[int, int]:
    """Which device a row came from, by its entries, and how many of them arrived."""
    found = {}
    for row in received.rows:
        entries = row.nonzero().flatten()
        (device,) = [m for m in range(len(x)) if torch.equal(x[m, entries], row[entries])]
        found[device] = len(entries)
    return found


def largest_q(numel: int, bits: float) -> int:
    """By trying all, with SciPy's binomials."""
    q = np.arange(1, numel + 1)
    log2_binomial = -np.log(numel + 1) - scipy.special.betaln(numel - q + 1, q + 1)
    fits = log2_binomial / np.log(2) + 33 * q <= bits
    return int(q[fits].max(initial=0))


# ---------------------------------------------------------------- shared checks


@pytest.mark.parametrize("policy", ["bc", "bn2", "bc_bn2", "bn2_c", "random", "round_robin"])
def test_shared_checks(policy: str) -> None:
    options = {"num_candidates": 1} if policy == "bc_bn2" else {}
    check_uplink(build(policy, num_scheduled=1, **options), noisy=True)


def test_shared_checks_of_all_with_memory() -> None:
    check_uplink(build("all", error_feedback=True, bandwidth=20.0), noisy=True, stateful=True)


@pytest.mark.parametrize("policy", ["bn2_c", "bc_bn2", "random"])
def test_a_run_schedules_two_of_four_devices_and_resumes(policy: str) -> None:
    options = {"num_candidates": 3} if policy == "bc_bn2" else {}
    uplink = build(policy, num_scheduled=2, error_feedback=True, integer_uses=True, bandwidth=10.0, **options)
    check_strategy_part(lambda: EdgeStrategy(num_devices=4, uplink=uplink()))


def test_the_compressor_is_top_k_that_a_budget_sizes() -> None:
    def definition(row: np.ndarray) -> np.ndarray:
        kept = np.argsort(-np.abs(row), kind="stable")[:3]
        return np.where(np.isin(np.arange(len(row)), kept), row, 0.0)

    check_compressor(
        lambda: LargestEntries(num_entries=3),
        definition=definition,
        wire_bits=lambda d, size: 8 * (min(3, d) * size + support_bytes(d, min(3, d))),
    )
    for numel in (1, 5, 400):
        for bits in (0.0, 33.0, 34.0, 100.0, 1234.5, 1e9):
            fitted = LargestEntries().for_budget(numel, bits)
            assert (0 if fitted is None else fitted.num_entries) == largest_q(numel, bits)
    costs = [LargestEntries(num_entries=q).message_bits(400) for q in range(1, 401)]
    assert all(a < b for a, b in itertools.pairwise(costs))


# ---------------------------------------------------------------- scheduling


def test_the_papers_numbers_of_bits_and_entries() -> None:
    """Power and noise 1, gains 1, n = 5000, M = 40, d = 7850: worked out by hand."""
    for k, bits, q in ((1, 26788, 707), (10, 1161, 27), (40, 125, 2)):
        uplink = ready(
            lambda k=k: UpdateAware(
                "bc", num_scheduled=k, channel=FadingMAC(NoFading(block=True)), channel_uses=10_000
            ),
            7850,
            40,
        )
        x = updates(40, 7850)
        received = uplink(x, plan(40))
        assert received.metrics["uplink/bit_budget_per_device"] == pytest.approx(bits, abs=0.5)
        assert set(sent_by(received, x).values()) == {q}
        assert received.cost.channel_uses == 10_000


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("policy", ["bc", "bn2", "bc_bn2", "bn2_c"])
def test_policies_choose_and_allocate_as_the_paper_says(policy: str, seed: int) -> None:
    """Against the table of policies, written out in NumPy, down to the entries that arrive."""
    x, h2 = spread(seed=seed), gains(M, seed=seed)
    n = 8 * D // 2
    capacity = np.log2(1 + M / 3 * h2)
    norm = np.linalg.norm(x.double().numpy(), axis=1)
    if policy == "bn2_c":
        whole = [largest_q(D, n * c) for c in capacity]
        norm = np.array(
            [np.linalg.norm(np.sort(np.abs(row))[::-1][:q]) for row, q in zip(x.numpy(), whole, strict=True)]
        )
    by_gain, by_norm = np.argsort(-h2), np.argsort(-norm)
    best = set(by_gain[:6])
    chosen = {
        "bc": by_gain[:3],
        "bn2": by_norm[:3],
        "bc_bn2": np.array([m for m in by_norm if m in best][:3]),
        "bn2_c": by_norm[:3],
    }[policy]
    shares = np.ones(3) if policy == "bc" else norm[chosen]
    uses = n * (shares / capacity[chosen]) / (shares / capacity[chosen]).sum()
    expected = {int(m): largest_q(D, u * capacity[m]) for m, u in zip(chosen, uses, strict=True)}

    received = ready(build(policy), D, M)(x, plan(M, seed=seed))
    assert sent_by(received, x) == expected
    energy = np.zeros(M)
    energy[chosen] = uses * M / 3
    np.testing.assert_allclose(received.cost.energy, energy, rtol=1e-6)


def test_bc_gives_equal_bits_and_bn2_bits_in_proportion_to_the_norm() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        capacity = torch.rand(7, generator=g, dtype=torch.float64) * 5 + 1e-3
        norms = torch.rand(7, generator=g, dtype=torch.float64)
        for shares in (torch.ones(7), norms):
            uses = allocate(shares, capacity, 5000)
            assert float(uses.sum()) == pytest.approx(5000, rel=1e-12)
            bits = uses * capacity / shares
            torch.testing.assert_close(bits, bits.mean().expand(7), rtol=1e-9, atol=0)
            whole = allocate(shares, capacity, 5000, integer=True)
            assert float(whole.sum()) == 5000
            assert torch.equal(whole, whole.round())
            assert float((whole - uses).abs().max()) < 1
            up = whole > uses  # those with the largest remainders
            if bool(up.any()):
                remainder = uses - uses.floor()
                assert float(remainder[up].min()) >= float(remainder[~up].max())
    assert allocate(torch.zeros(2), torch.tensor([1.0, 3.0]), 100).tolist() == pytest.approx([75.0, 25.0])


def test_candidates_between_best_channel_and_best_norm() -> None:
    for seed in range(5):
        x, round = spread(seed=seed), plan(M, seed=seed)
        best_channel = sent_by(ready(build("bc"), D, M)(x, round), x)
        few = sent_by(ready(build("bc_bn2", num_candidates=3), D, M)(x, round), x)
        assert set(few) == set(best_channel)
        best_norm = ready(build("bn2"), D, M)(x, round)
        many = ready(build("bc_bn2", num_candidates=M), D, M)(x, round)
        assert torch.equal(many.rows, best_norm.rows)
        assert many.metrics == best_norm.metrics


@pytest.mark.parametrize("policy", POLICIES)
def test_all_devices_are_scheduled_where_k_is_m(policy: str) -> None:
    options = {} if policy == "all" else {"num_scheduled": M}
    options |= {"num_candidates": M} if policy == "bc_bn2" else {}
    x = spread()
    received = ready(build(policy, bandwidth=30.0, **options), D, M)(x, plan(M))
    assert received.rows.shape == x.shape
    if policy not in ("bn2", "bc_bn2", "bn2_c"):  # where the smallest update may get no entry
        assert set(sent_by(received, x)) == set(range(M))


@pytest.mark.parametrize("policy", POLICIES)
def test_with_ample_bandwidth_the_mean_over_the_scheduled_is_exact(policy: str) -> None:
    x = updates(M, D)
    weights = torch.arange(1.0, M + 1)
    received = ready(build(policy, bandwidth=1e4), D, M)(x, plan(M, weights=weights))
    chosen = list(sent_by(received, x))
    assert len(chosen) == (M if policy == "all" else 3)
    expected = (weights[chosen, None].double() * x[chosen].double()).sum(0) / weights[chosen].sum()
    torch.testing.assert_close((received.weights @ received.rows).double(), expected, rtol=1e-5, atol=1e-7)


def test_round_robin_and_random_serve_everybody_alike() -> None:
    x = updates(M, D)
    turns = ready(build("round_robin", bandwidth=100.0), D, M)
    seen = [sorted(sent_by(turns(x, plan(M, index=t)), x)) for t in range(5)]
    assert seen == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11], [0, 1, 2]]
    random = ready(build("random", bandwidth=1000.0), D, M)
    counts = np.zeros(M)
    for t in range(200):
        counts[list(sent_by(random(x, plan(M, index=t)), x))] += 1
    assert counts.sum() == 600
    chi2 = float(((counts - 50) ** 2 / 37.5).sum() * (M - 1) / M)  # counts have variance 200 * 1/4 * 3/4
    assert chi2 < 31.3  # 0.1 % of a chi-square of 11 degrees of freedom


def test_average_energy_is_the_average_power() -> None:
    """Each device is one of K of M: n_m M / K times the power in such a round is n power / K a round on average."""
    x = updates(M, D)
    uplink = ready(build("random", power_per_symbol=0.5, bandwidth=1000.0), D, M)
    energies = torch.stack([uplink(x, plan(M, index=t)).cost.energy for t in range(300)])
    n = 1000 * D // 2
    assert float(energies.sum(1).mean()) == pytest.approx(n * 0.5 * M / 3)  # exactly, in every round
    mean = energies.mean(0)
    error = energies.std(0) / 300**0.5
    assert bool(((mean - n * 0.5 / 3).abs() < 4.5 * error).all())


def test_more_scheduled_devices_have_less_capacity_each() -> None:
    budgets = []
    for k in range(1, M + 1):
        uplink = ready(build("bc", num_scheduled=k, channel=FadingMAC(NoFading(block=True))), D, M)
        budgets.append(uplink(updates(M, D), plan(M)).metrics["uplink/bit_budget_per_device"])
    assert all(a > b for a, b in itertools.pairwise(budgets))


# ---------------------------------------------------------------- hazards


def test_nobody_can_be_scheduled() -> None:
    x = updates(M, D)
    weak = FadingMAC(Rayleigh(block=True), noise_var=1e9)
    for policy in POLICIES:
        uplink = ready(build(policy, channel=weak), D, M)
        with pytest.warns(UserWarning, match="rounds in which nobody can send"):
            received = uplink(x, plan(M))
        assert received.rows.shape == (1, D)
        assert not received.rows.any()
        assert received.weights.tolist() == [1.0]
        assert received.metrics["uplink/silent"] == 1.0
        assert received.metrics["uplink/unreachable_devices"] == M
        assert (received.cost.bits, received.cost.channel_uses, float(received.cost.energy.sum())) == (0, 0, 0.0)


def test_a_capacity_too_small_for_one_entry_is_a_silent_round() -> None:
    x = updates(M, D)
    uplink = ready(build("bc", bandwidth=None, channel_uses=2, error_feedback=True), D, M)  # one complex use for three
    with pytest.warns(UserWarning, match="nobody can send.*none may send as much as"):
        received = uplink(x, plan(M))
    assert not received.rows.any()
    assert received.metrics["uplink/unserved_devices"] == 3
    assert received.cost.channel_uses == 0
    assert uplink.memory is not None
    kept = uplink.memory.residual().any(1)
    assert int(kept.sum()) == 3, "what the scheduled could not send stays with them; the others' is lost"
    torch.testing.assert_close(uplink.memory.residual()[kept], x[kept])
    with pytest.raises(
        ValueError, match="1 real channel uses a round for 400 parameters are less than one complex use"
    ):
        ready(build("bc", bandwidth=None, channel_uses=1), D, M)


def test_a_run_goes_on_where_nobody_can_send() -> None:
    weak = FadingMAC(Rayleigh(block=True), noise_var=1e9)
    with pytest.warns(UserWarning, match="nobody can send"):
        _, t, losses = fit(EdgeStrategy(num_devices=4, uplink=UpdateAware("all", channel=weak)), steps=3)
    assert t.strategy.ledger.totals["uplink/bits"] == 0
    assert all(math.isfinite(loss) for loss in losses)


def test_devices_in_a_deep_fade_are_passed_over() -> None:
    """Sixty dB of path loss between the nearest and the farthest: the far ones cannot be chosen, even for their norm."""
    place = PathLoss(exponent=6.0, inner_radius=1.0, outer_radius=100.0, reference=10.0)
    channel = FadingMAC(NoFading(block=True, path_loss=place))
    x = spread()
    key = plan(M).key
    able = np.log2(1 + M / 3 * place(key).double().numpy()) >= 0.1
    assert 0 < able.sum() < M
    received = ready(build("bn2", channel=channel, min_capacity=0.1, bandwidth=1000.0), D, M)(x, plan(M))
    assert received.metrics["uplink/unreachable_devices"] == M - able.sum()
    assert set(sent_by(received, x)) <= set(np.flatnonzero(able))
    assert len(received.rows) == min(3, able.sum())


def test_zero_updates_get_equal_bits_and_a_zero_one_none() -> None:
    zero = torch.zeros(M, D)
    received = ready(build("bn2"), D, M)(zero, plan(M))
    h2 = gains(M)[:3]  # ties go to the lowest devices
    uses = 8 * D // 2 / np.log2(1 + M / 3 * h2) / (1 / np.log2(1 + M / 3 * h2)).sum()
    np.testing.assert_allclose(received.cost.energy[:3], uses * M / 3, rtol=1e-6)
    x = updates(3, D)
    x[1] = 0
    received = ready(build("bn2", num_scheduled=3), D, 3)(x, plan(3))
    assert received.metrics["uplink/unserved_devices"] == 1
    assert not received.rows[1].any()
    assert received.cost.energy[1] == 0


def test_ties_go_to_the_lowest_device_in_whatever_row_it_is() -> None:
    x = torch.ones(4, 60) * torch.arange(1.0, 61)
    for order in ((0, 1, 2, 3), (2, 0, 3, 1)):
        uplink = ready(build("bn2", num_scheduled=1, channel=FadingMAC(NoFading(block=True))), 60, 4)
        energy = uplink(x, plan(order)).cost.energy
        assert order[int(energy.argmax())] == 0
    assert largest(torch.tensor([1.0, 2.0, 2.0]), torch.tensor([2, 1, 0]), 1).tolist() == [2]


def test_with_memory_the_sum_of_sent_and_kept_is_all_that_was_to_send() -> None:
    uplink = ready(build("bc", error_feedback=True), D, M)
    assert uplink.memory is not None
    total = torch.zeros(M, D)
    arrived = torch.zeros(M, D)
    for t in range(6):
        x = updates(M, D, seed=t)
        before = uplink.memory.recall(x, tuple(range(M))).clone()
        received = uplink(x, plan(M, index=t))
        chosen = received.cost.energy > 0
        total[chosen] += x[chosen]
        arrived[chosen] += received.rows
        after = uplink.memory.residual()
        assert torch.equal(after[~chosen], before[~chosen]), "the others' memories stay as they are"
    torch.testing.assert_close(arrived + uplink.memory.residual(), total, rtol=1e-5, atol=1e-6)


def test_another_compressor_may_count_the_bits() -> None:
    """The quantiser of D-DSGD: one value for all entries, log2 C(d, q) + 33 bits in all."""
    x = updates(M, D)
    received = ready(build("bc", compressor=DDSGDQuantizer(), bandwidth=0.5), D, M)(x, plan(M))
    assert all(len(row[row != 0].unique()) == 1 for row in received.rows)


def test_fewer_devices_than_scheduled_are_all_taken() -> None:
    x = updates(2, D)
    received = ready(build("bn2_c", num_scheduled=5), D, M)(x, plan((3, 8)))
    assert received.rows.shape == (2, D)


def test_builds_from_yaml_and_tells_its_settings() -> None:
    yaml = """
class_path: groundwire.plugins.edge.uplinks.update_aware.UpdateAware
init_args:
  policy: bc_bn2
  num_scheduled: 2
  num_candidates: 4
  channel:
    class_path: groundwire.plugins.channels.FadingMAC
    init_args: {fading: {class_path: groundwire.plugins.channels.Rayleigh, init_args: {block: true}}}
"""
    uplink = build_from_yaml(Uplink, yaml)
    assert isinstance(uplink, UpdateAware)
    for words in ("policy='bc_bn2'", "num_scheduled=2", "num_candidates=4", "min_capacity=0.001", "noise_var=1.0"):
        assert words in repr(uplink)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"policy": "best", "num_scheduled": 1}, r"`policy` must be one of 'bc', .*'all', got 'best'"),
        ({"policy": "bc"}, r"`num_scheduled` \(K\) says how many devices send.*got None with 'bc'"),
        ({"policy": "all", "num_scheduled": 3}, "goes with every policy but 'all'; got 3 with 'all'"),
        ({"policy": "bc", "num_scheduled": 0}, r"`num_scheduled` \(K\) must be at least 1, got 0"),
        ({"policy": "bc", "num_scheduled": 1, "num_candidates": 2}, "only with it; got 2 with 'bc'"),
        ({"policy": "bc_bn2", "num_scheduled": 1}, "only with it; got None with 'bc_bn2'"),
        ({"policy": "all", "power_per_symbol": 0.0}, "`power_per_symbol`.*must be finite and > 0, got 0.0"),
        ({"policy": "all", "min_capacity": 0.0}, "`min_capacity`.*must be finite and > 0, got 0.0"),
        ({"policy": "all", "bandwidth": -1.0}, "`bandwidth` is channel uses per parameter and must be > 0, got -1.0"),
        ({"policy": "all", "bandwidth": 1.0, "channel_uses": 8}, "Give either `bandwidth`"),
        ({"policy": "all", "channel": FadingMAC()}, "perfect CSI.*and block fading"),
        ({"policy": "all", "channel": FadingMAC(Rayleigh(block=True), csi_error_var=None)}, "needs perfect CSI"),
        ({"policy": "all", "channel": FadingMAC(Rayleigh(block=True), noise_var=0.0)}, r"noise \(noise_var > 0\)"),
    ],
)
def test_refuses_bad_settings(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        UpdateAware(**options)


def test_refuses_more_devices_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"`num_candidates` \(K_c\) = 5 must be >= K = 10 and <= M = 40"):
        ready(build("bc_bn2", num_scheduled=10, num_candidates=5), D, 40)
    with pytest.raises(ValueError, match=r"`num_candidates` \(K_c\) = 41 must be >= K = 10 and <= M = 40"):
        ready(build("bc_bn2", num_scheduled=10, num_candidates=41), D, 40)
    with pytest.raises(ValueError, match=r"`num_scheduled` \(K\) = 50 must be <= M = 40"):
        ready(build("bc", num_scheduled=50), D, 40)
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        LargestEntries(num_entries=0)


def test_a_round_is_told_by_its_key_alone() -> None:
    """Gains do not depend on who else takes part: three devices meet the same channel alone as among twelve."""
    x = updates(M, D)
    channel = {"channel": FadingMAC(Rayleigh(block=True)), "num_scheduled": 1}
    among = ready(build("bc", **channel), D, M)(x, plan(M, index=4))
    best = int(np.argmax(gains(M, index=4)))
    assert list(sent_by(among, x)) == [best]
    rows = sorted({best, 0, 5})
    alone = ready(build("bc", **channel), D, M)(x[rows], replace(plan(tuple(rows), index=4)))
    assert list(sent_by(alone, x)) == [best]
