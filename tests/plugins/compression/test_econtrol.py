"""EControl against NumPy, EF21 and the size of eta that it bears."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from groundwire.plugins.compression import EF21, EControl, Identity, Message, RandK, SignSGD, TopK
from groundwire.plugins.edge import Digital, EdgeStrategy
from groundwire.plugins.random import Key
from helpers.compressors import rows
from helpers.edge import check_strategy_part

M, D = 3, 30
EVERYONE = (0, 1, 2)
GROUPS = [EVERYONE, (2, 0), (1,), EVERYONE, (2, 1, 0), (0,), EVERYONE, (1, 2), EVERYONE, (0, 2), EVERYONE, EVERYONE]


def key(devices: Sequence[int] = EVERYONE, round: int = 0) -> Key:
    return Key(seed=4, round=round, devices=tuple(devices))


def top_k(row: np.ndarray, k: int) -> np.ndarray:
    out = np.zeros_like(row)
    kept = np.argsort(-np.abs(row), kind="stable")[:k]
    out[kept] = row[kept]
    return out


def econtrol(memory: dict[str, Any], x: np.ndarray, k: int, eta: float) -> np.ndarray:
    """The paper's step; the error uses the new ``h``."""
    h, e = memory.get("h", np.zeros_like(x)), memory.get("e", np.zeros_like(x))
    h = h + top_k(eta * e + x - h, k)
    memory.update(h=h, e=e + x - h)
    return h


@pytest.mark.parametrize("k", [1, 7])
@pytest.mark.parametrize("eta", [0.0, 0.03, 0.5, 1.0])
def test_equals_numpy_over_rounds_in_which_some_take_part(eta: float, k: int) -> None:
    feedback = EControl(TopK(k=k), eta=eta, num_devices=M)
    memories: list[dict[str, Any]] = [{} for _ in EVERYONE]
    for t, devices in enumerate(GROUPS):
        x = rows(len(devices), D, seed=t, dtype=torch.float64)
        values = feedback(x, key(devices, t)).values
        expected = [econtrol(memories[m], row, k, eta) for m, row in zip(devices, x.numpy(), strict=True)]
        scale = max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(values, expected, rtol=1e-12, atol=1e-12 * scale)
        for found, name in ((feedback.memory, "h"), (feedback.errors, "e")):
            wanted = [m.get(name, np.zeros(D)) for m in memories]
            np.testing.assert_allclose(found.residual(), wanted, rtol=1e-12, atol=1e-12 * scale)


def test_without_control_it_is_ef21_bit_for_bit() -> None:
    for compressor in (TopK(k=3), RandK(k=9, unbiased=False), SignSGD(scaled=True)):
        first, second = EF21(compressor, M), EControl(compressor, eta=0.0, num_devices=M)
        for t, devices in enumerate(GROUPS):
            x = rows(len(devices), D, seed=t)
            assert torch.equal(first(x, key(devices, t)).values, second(x, key(devices, t)).values)
        assert torch.equal(first.memory.residual(), second.memory.residual())


def test_with_control_it_is_something_else() -> None:
    first, second = EF21(TopK(k=3), M), EControl(TopK(k=3), eta=0.1, num_devices=M)
    x = rows(M, D)
    assert torch.equal(first(x, key()).values, second(x, key()).values), "nothing has been missed yet"
    assert not torch.equal(first(x, key()).values, second(x, key()).values)


@pytest.mark.parametrize("eta", [0.0, 0.2, 1.0])
def test_without_compression_it_sends_the_rows_themselves_and_misses_nothing(eta: float) -> None:
    feedback = EControl(Identity(), eta=eta, num_devices=M)
    for t, devices in enumerate(GROUPS):
        x = rows(len(devices), D, seed=t).round()  # sums of integers have no rounding errors
        assert torch.equal(feedback(x, key(devices, t)).values, x)
    assert not feedback.errors.residual().any()


def test_what_the_estimates_missed_adds_up() -> None:
    feedback, missed = EControl(TopK(k=2), eta=0.05, num_devices=M), torch.zeros(M, D, dtype=torch.float64)
    for t in range(50):
        x = rows(M, D, seed=t, dtype=torch.float64)
        missed += x - feedback(x, key(round=t)).values
    torch.testing.assert_close(feedback.errors.residual(), missed, rtol=1e-12, atol=1e-10)


def test_memories_of_bfloat16_rows_are_exact_to_float32() -> None:
    feedback = EControl(TopK(k=D), eta=0.25, num_devices=1)  # all is sent, but rounded to bfloat16
    h = e = torch.zeros(1, D, dtype=torch.float64)
    for t in range(10):
        x = torch.randn(1, D, generator=torch.Generator().manual_seed(t)).bfloat16()
        feedback(x, key((0,), t))
        h = h + (0.25 * e + x.double() - h).float().bfloat16().double()
        e = e + x.double() - h
    torch.testing.assert_close(feedback.memory.residual().double(), h, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(feedback.errors.residual().double(), e, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- how much control it bears


def error_on_a_row_that_stays(feedback: EControl, numel: int, rounds: int) -> float:
    x = torch.randn(1, numel, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t in range(rounds):
        values = feedback(x, key((0,), t)).values
    return float((values - x).norm() / x.norm())


@pytest.mark.parametrize(("numel", "k"), [(20, 1), (40, 4)])
def test_on_a_row_that_stays_top_k_bears_its_density_and_not_three_times_it(numel: int, k: int) -> None:
    for share, converges in ((0.5, True), (1.0, True), (1.8, True), (3.0, False), (4.0, False)):
        feedback = EControl(TopK(k=k), eta=share * k / numel, num_devices=1)
        error = error_on_a_row_that_stays(feedback, numel, 20 * numel // k)
        assert (error < 1e-5) if converges else (error > 5)


@pytest.mark.parametrize("eta", [0.05, 0.125, 0.2, 0.3])
def test_where_entries_take_turns_the_missed_part_shrinks_by_a_known_factor(eta: float) -> None:
    """An entry that waits ``T`` rounds misses as much ``T`` times: each sweep multiplies that with ``1 - eta T``."""
    numel, turn = 8, 0

    class InTurn(TopK):
        """One entry, each in its turn."""

        def roundtrip(self, x: Tensor, key: Key) -> Message:
            only = torch.zeros_like(x)
            only[:, turn] = x[:, turn]
            return Message(values=only, bits_wire=0, bits_ideal=0.0)

    feedback = EControl(InTurn(k=1), eta=eta, num_devices=1)
    x = torch.ones(1, numel, dtype=torch.float64)
    before = None
    for sweep in range(6):
        for turn in range(numel):  # noqa: B007  read by the compressor
            feedback(x, key((0,)))
        since = numel - 1 - torch.arange(numel)  # rounds since each entry was sent
        missed = feedback.errors.residual() - since * (x - feedback.memory.residual())
        if sweep > 1:
            torch.testing.assert_close(missed, (1 - eta * numel) * before)
        before = missed


def test_the_default_bears_the_density_of_one_per_cent() -> None:
    assert error_on_a_row_that_stays(EControl(TopK(density=0.01), num_devices=1), 200, 1500) < 1e-2


# ---------------------------------------------------------------- problems with known answers


def test_it_converges_where_plain_top_1_diverges() -> None:
    vectors = torch.tensor([[-3.0, 2, 2], [2, -3, 2], [2, 2, -3]], dtype=torch.float64)
    feedback, x = EControl(TopK(k=1), eta=0.05, num_devices=M), torch.ones(3, dtype=torch.float64)
    for _ in range(1200):
        gradients = 2 * (vectors @ x)[:, None] * vectors + x / 2
        x = x - 0.00586 * feedback(gradients, key()).values.mean(0)
    hessian = (2 * vectors[:, :, None] * vectors[:, None] + torch.eye(3, dtype=torch.float64) / 2).mean(0)
    slowest = float(torch.linalg.eigvalsh(hessian).min())
    assert float(x.norm()) < 2 * math.sqrt(3) * (1 - 0.00586 * slowest) ** 1200


def test_differences_among_devices_leave_no_floor_and_noise_less_than_under_ef21() -> None:
    g = torch.Generator().manual_seed(0)
    curvature = 0.5 + torch.rand(5, 20, generator=g, dtype=torch.float64)
    centre = 3 * torch.randn(5, 20, generator=g, dtype=torch.float64)

    def floor(feedback: EF21, step: float, noise: float) -> float:
        x, draws, total = torch.zeros(20, dtype=torch.float64), torch.Generator().manual_seed(1), 0.0
        for t in range(1000):
            gradients = curvature * (x - centre)
            total += float(gradients.mean(0).square().sum()) / 100 * (t >= 900)
            if noise:
                gradients = gradients + noise * torch.randn(5, 20, generator=draws, dtype=torch.float64)
            x = x - step * feedback(gradients, key(range(5), t)).values.mean(0)
        return total

    assert floor(EControl(TopK(k=2), eta=0.05, num_devices=5), 0.1, 0.0) < 1e-20
    controlled = floor(EControl(TopK(k=1), eta=0.02, num_devices=5), 0.01, 5.0)
    assert floor(EF21(TopK(k=1), 5), 0.01, 5.0) > 1.5 * controlled


@pytest.mark.parametrize("eta", [-0.01, 1.01, math.nan, math.inf])
def test_control_out_of_range_is_refused(eta: float) -> None:
    with pytest.raises(ValueError, match=rf"`eta` must be in \[0, 1\], got {eta}"):
        EControl(TopK(k=1), eta=eta)


def test_in_training_it_resumes_bit_for_bit() -> None:
    def build() -> EdgeStrategy:
        uplink = Digital(EControl(TopK(density=0.1), eta=0.05), granularity="layer", min_numel=10)
        return EdgeStrategy(num_devices=M, uplink=uplink)

    check_strategy_part(build)


def test_without_eta_the_compressor_has_to_say_how_contractive_it_is() -> None:
    feedback = EControl(SignSGD(), num_devices=1)
    with pytest.raises(ValueError, match=r"does not know how contractive SignSGD.* is: give `eta`"):
        feedback(torch.ones(1, 3), Key(seed=0))
