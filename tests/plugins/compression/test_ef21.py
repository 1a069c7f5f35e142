"""EF21 and its relatives against NumPy, on problems with known answers; and what every kind of error feedback owes."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from groundwire.plugins.compression import (
    DGC,
    EF21,
    EF21SGDM,
    EF21W,
    Compressor,
    EControl,
    ErrorFeedback,
    ErrorMemory,
    Feedback,
    Identity,
    Payload,
    RandK,
    SignSGD,
    TopK,
)
from groundwire.plugins.edge import Digital, EdgeStrategy
from groundwire.plugins.random import Key, stream
from helpers.compressors import rows
from helpers.edge import check_strategy_part, fit

M, D = 3, 30
EVERYONE = (0, 1, 2)
SMOOTHNESS = (0.3, 2.0, 5.0)
GROUPS = [EVERYONE, (2, 0), (1,), EVERYONE, (2, 1, 0), (0,), EVERYONE, (1, 2), EVERYONE, (0, 2), EVERYONE, EVERYONE]


def key(devices: Sequence[int] = EVERYONE, round: int = 0, seed: int = 4) -> Key:
    return Key(seed=seed, round=round, devices=tuple(devices))


def wide_rows(count: int, seed: int, numel: int = D) -> Tensor:
    return rows(count, numel, seed=seed, dtype=torch.float64)


# ---------------------------------------------------------------- against NumPy, device by device


def top_k(row: np.ndarray, k: int) -> np.ndarray:
    out = np.zeros_like(row)
    kept = np.argsort(-np.abs(row), kind="stable")[:k]
    out[kept] = row[kept]
    return out


def rand_k(row: np.ndarray, k: int, round: int) -> np.ndarray:
    out = np.zeros_like(row)
    kept = torch.randperm(len(row), generator=stream(4, purpose="randk", round=round))[:k].numpy()
    out[kept] = row[kept]
    return out


def scaled_signs(row: np.ndarray) -> np.ndarray:
    return np.where(row >= 0, 1.0, -1.0) * float(np.float32(np.abs(row).mean()))


COMPRESSORS: dict[str, tuple[Callable[[], Compressor], Callable[[np.ndarray, int], np.ndarray]]] = {
    "top_1": (lambda: TopK(k=1), lambda r, _: top_k(r, 1)),
    "top_7": (lambda: TopK(k=7), lambda r, _: top_k(r, 7)),
    "rand_5": (lambda: RandK(k=5, unbiased=False), lambda r, t: rand_k(r, 5, t)),
    "scaled_sign": (lambda: SignSGD(scaled=True), lambda r, _: scaled_signs(r)),
}
Compress = Callable[[np.ndarray], np.ndarray]


def ef21(memory: dict[str, Any], x: np.ndarray, compress: Compress, device: int) -> np.ndarray:
    h = memory.get("h", np.zeros_like(x))
    memory["h"] = h + compress(x - h)
    return memory["h"]


def ef21_w(memory: dict[str, Any], x: np.ndarray, compress: Compress, device: int) -> np.ndarray:
    factor = len(SMOOTHNESS) * SMOOTHNESS[device] / sum(SMOOTHNESS)
    return factor * ef21(memory, x / factor, compress, device)


def ef21_sgdm(memory: dict[str, Any], x: np.ndarray, compress: Compress, device: int) -> np.ndarray:
    memory["v"] = 0.7 * memory["v"] + 0.3 * x if "v" in memory else x
    return ef21(memory, memory["v"], compress, device)


METHODS: dict[str, tuple[Callable[[Compressor], Feedback], Callable[..., np.ndarray]]] = {
    "ef21": (lambda c: EF21(c, num_devices=M), ef21),
    "ef21_w": (lambda c: EF21W(c, smoothness=SMOOTHNESS, num_devices=M), ef21_w),
    "ef21_sgdm": (lambda c: EF21SGDM(c, eta=0.3, num_devices=M), ef21_sgdm),
}


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("method", METHODS)
def test_equals_numpy_over_rounds_in_which_some_take_part(method: str, compressor: str) -> None:
    build, define = COMPRESSORS[compressor]
    wrap, step = METHODS[method]
    feedback = wrap(build())
    memories: list[dict[str, Any]] = [{} for _ in EVERYONE]
    for t, devices in enumerate(GROUPS):
        x = wide_rows(len(devices), seed=t)
        values = feedback(x, key(devices, t)).values.numpy()
        expected = [
            step(memories[m], row, lambda r, t=t: define(r, t), m) for m, row in zip(devices, x.numpy(), strict=True)
        ]
        np.testing.assert_allclose(values, expected, rtol=1e-12, atol=1e-12)
        held = feedback.memory.residual().numpy()
        np.testing.assert_allclose(held, [m.get("h", np.zeros(D)) for m in memories], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_the_message_is_that_of_the_compressor(method: str) -> None:
    feedback, x = METHODS[method][0](TopK(k=4)), rows(M, D)
    for t in range(3):
        message, bare = feedback(x, key(round=t)), TopK(k=4).roundtrip(x, key(round=t))
        assert (message.bits_wire, message.bits_ideal) == (bare.bits_wire, bare.bits_ideal)


# ---------------------------------------------------------------- EF21-W


class Grid(Compressor):
    """Rounds to integers: ``C(a x)`` is not ``a C(x)``."""

    def encode(self, x: Tensor, key: Key) -> Payload:
        return Payload(parts={"values": x.round()}, numel=x.shape[1], dtype=x.dtype, bits_ideal=0.0)

    def decode(self, payload: Payload) -> Tensor:
        return payload.parts["values"]


def test_ef21_w_makes_the_iterates_of_ef21_where_the_compressor_is_homogeneous() -> None:
    for compressor in (TopK(k=3), RandK(k=9, unbiased=False)):
        first, second = EF21(compressor, M), EF21W(compressor, SMOOTHNESS, M)
        for t, devices in enumerate(GROUPS):
            x = wide_rows(len(devices), seed=t)
            plain, weighted = first(x, key(devices, t)).values, second(x, key(devices, t)).values
            torch.testing.assert_close(weighted, plain, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(first.memory.residual(), second.memory.residual()), "it remembers x / (M w)"


def test_ef21_w_with_equal_smoothness_is_ef21_bit_for_bit() -> None:
    for compressor in (TopK(k=3), Grid(), SignSGD(scaled=True)):
        first, second = EF21(compressor, M), EF21W(compressor, [0.7, 0.7, 0.7], M)
        for t in range(10):
            x = rows(M, D, seed=t)
            assert torch.equal(first(x, key(round=t)).values, second(x, key(round=t)).values)
        assert torch.equal(first.memory.residual(), second.memory.residual())


def test_a_fixed_grid_tells_ef21_w_from_ef21_and_numpy_says_by_how_much() -> None:
    first, second = EF21(Grid(), M), EF21W(Grid(), SMOOTHNESS, M)
    memories: list[dict[str, Any]] = [{} for _ in EVERYONE]
    x = wide_rows(M, seed=0)
    for t in range(3):
        plain, weighted = first(x, key(round=t)).values, second(x, key(round=t)).values
        expected = [ef21_w(memories[m], x[m].numpy(), np.round, m) for m in EVERYONE]
        np.testing.assert_allclose(weighted, expected, rtol=1e-12)
    factors = M * torch.tensor(SMOOTHNESS, dtype=torch.float64).unsqueeze(1) / sum(SMOOTHNESS)
    assert bool(((weighted - x).abs() <= factors / 2 + 1e-12).all()), "the grid of device i is M w_i wide"
    assert float((weighted - plain).abs().max()) > 0.1
    only_ratios = EF21W(Grid(), [1e6 * c for c in SMOOTHNESS], M)
    torch.testing.assert_close(only_ratios(x, key()).values, EF21W(Grid(), SMOOTHNESS, M)(x, key()).values)


class Curved:
    """``f_i(x) = sum_j h_ij (x_j - b_ij)^2 / 2`` with smoothness ``L_i = max_j h_ij``; all constants are known."""

    def __init__(self, devices: int, numel: int, smoothness: Tensor, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        curvature = 0.1 + 0.9 * torch.rand(devices, numel, generator=g, dtype=torch.float64)
        self.curvature = smoothness.unsqueeze(1) * curvature / curvature.amax(1, keepdim=True)
        self.centre = torch.randn(devices, numel, generator=g, dtype=torch.float64)
        self.key = key(range(devices))
        mean = self.curvature.mean(0)
        self.smoothness = float(mean.max())
        self.best = (self.curvature * self.centre).mean(0) / mean

    def gradients(self, x: Tensor) -> Tensor:
        return self.curvature * (x - self.centre)

    def excess(self, x: Tensor) -> float:
        """``f(x) - inf f``."""
        return float((self.curvature.mean(0) * (x - self.best).square()).sum() / 2)


def test_the_step_of_the_arithmetic_mean_descends_as_the_proof_says() -> None:
    """``f - inf f + s G / (2 theta)`` falls by ``s |grad f|^2 / 2`` at least, with ``s = 1 / (L + mean(L_i) xi)``."""
    devices = numel = 20
    constants = torch.logspace(-2, 2, devices, dtype=torch.float64)
    problem = Curved(devices, numel, constants, seed=3)
    alpha = 1 / numel
    xi, theta = (1 + math.sqrt(1 - alpha)) / alpha - 1, 1 - math.sqrt(1 - alpha)
    arithmetic = 1 / (problem.smoothness + float(constants.mean()) * xi)
    quadratic = 1 / (problem.smoothness + float(constants.square().mean().sqrt()) * xi)
    assert arithmetic > 2 * quadratic
    final = {}
    cases = {
        "ef21_w": (EF21W(TopK(k=1), constants.tolist(), devices), arithmetic, constants / constants.sum()),
        "ef21": (EF21(TopK(k=1), devices), quadratic, torch.full((devices,), 1 / devices, dtype=torch.float64)),
    }
    for name, (feedback, step, weights) in cases.items():
        x, before = torch.zeros(numel, dtype=torch.float64), math.inf
        for _ in range(1000):
            gradients = problem.gradients(x)
            estimate = feedback(gradients, problem.key).values.mean(0)
            wanted = gradients / (devices * weights.unsqueeze(1))
            distortion = float(weights @ (feedback.memory.residual() - wanted).square().sum(1))
            potential = problem.excess(x) + step / (2 * theta) * distortion
            assert potential <= before + 1e-12
            before = potential - step / 2 * float(gradients.mean(0).square().sum())
            x = x - step * estimate
        final[name] = float(problem.gradients(x).mean(0).norm())
    assert final["ef21_w"] < final["ef21"] / 100, "the larger step pays"


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize(
    "build",
    [
        lambda: ErrorFeedback(Identity(), M),
        lambda: EF21(Identity(), M),
        lambda: EF21W(Identity(), [1.0, 2.0, 1.0], M),
        lambda: EF21W(Identity(), [1.0, 1.0, 2.0], M),
        lambda: EF21SGDM(Identity(), eta=1.0, num_devices=M),
        lambda: EControl(Identity(), eta=0.5, num_devices=M),
        lambda: EF21(TopK(density=1.0), M),
    ],
)
def test_without_compression_every_kind_is_the_sender_of_the_rows_themselves(build: Callable[[], Feedback]) -> None:
    feedback = build()
    exact = not isinstance(feedback, EF21W)
    for t, devices in enumerate(GROUPS):
        x = rows(len(devices), D, seed=t).round()  # sums of integers have no rounding errors
        values = feedback(x, key(devices, t)).values
        assert torch.equal(values, x) if exact else torch.allclose(values, x, rtol=1e-6, atol=1e-4)


def test_a_running_mean_of_one_gradient_is_ef21_bit_for_bit() -> None:
    first, second = EF21(TopK(k=3), M), EF21SGDM(TopK(k=3), eta=1.0, num_devices=M)
    for t, devices in enumerate(GROUPS):
        x = rows(len(devices), D, seed=t)
        assert torch.equal(first(x, key(devices, t)).values, second(x, key(devices, t)).values)


@pytest.mark.parametrize("k", [1, 4])
def test_the_estimate_of_a_row_that_stays_closes_in_at_the_rate_of_the_compressor(k: int) -> None:
    x, alpha = wide_rows(M, seed=0), k / D
    size = x.square().sum(1)
    feedback = EF21(TopK(k=k), M)
    for t in range(1, 60):
        missing = (feedback(x, key()).values - x).square().sum(1)
        assert bool((missing <= (1 - alpha) ** t * size * (1 + 1e-12) + 1e-24).all())
    flat = torch.ones(1, D, dtype=torch.float64)  # where nothing stands out, each round brings k entries and no more
    feedback = EF21(TopK(k=k), 1)
    for t in range(1, D // k + 1):
        assert float((feedback(flat, key((0,))).values - flat).square().sum()) == D - t * k


def test_with_a_random_support_the_rate_is_met_exactly_on_average() -> None:
    x, k, draws = wide_rows(1, seed=0), 6, 600
    missing = np.zeros((draws, 4))
    for draw in range(draws):
        feedback = EF21(RandK(k=k, unbiased=False), 1)
        for t in range(4):
            error = feedback(x, key((0,), t, seed=draw)).values - x
            missing[draw, t] = float(error.square().sum() / x.square().sum())
    expected, found = (1 - k / D) ** np.arange(1, 5), missing.mean(0)
    spread = missing.std(0) / math.sqrt(draws)
    assert (np.abs(found - expected) < 5 * spread).all()
    assert (np.abs(found[:-1] - expected[1:]) > 5 * spread[:-1]).all(), "another rate would be noticed"


# ---------------------------------------------------------------- problems with known answers


VECTORS = torch.tensor([[-3.0, 2, 2], [2, -3, 2], [2, 2, -3]], dtype=torch.float64)


def test_ef21_converges_where_plain_top_1_diverges() -> None:
    """``f_i(x) = <a_i, x>^2 + |x|^2 / 4``: the mean of the three top-1 gradients points uphill, as ``-(11/6) x``."""

    def gradients(x: Tensor) -> Tensor:
        return 2 * (VECTORS @ x)[:, None] * VECTORS + x / 2

    start = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(TopK(k=1).roundtrip(gradients(start), key()).values.mean(0), -11 / 6 * start)
    hessians = 2 * VECTORS[:, :, None] * VECTORS[:, None] + torch.eye(3, dtype=torch.float64) / 2
    smoothness = float(torch.linalg.matrix_norm(hessians.mean(0), 2))
    of_devices = float(torch.linalg.matrix_norm(hessians, 2).square().mean().sqrt())
    xi = (1 + math.sqrt(2 / 3)) * 3 - 1
    step = 1 / (smoothness + of_devices * xi)
    assert step == pytest.approx(0.00586, abs=5e-6)
    feedback, x = EF21(TopK(k=1), M), start
    for _ in range(1200):
        x = x - step * feedback(gradients(x), key()).values.mean(0)
    slowest = float(torch.linalg.eigvalsh(hessians.mean(0)).min())
    assert float(x.norm()) < 2 * (1 - step * slowest) ** 1200 * float(start.norm()), "as fast as uncompressed descent"


DIFFERENT = Curved(5, 20, torch.ones(5, dtype=torch.float64), seed=0)


def floor(feedback: Feedback | None, step: float, rounds: int, *, inside: bool = False, noise: float = 0.0) -> float:
    """Mean ``|grad f|^2`` over the last third; ``inside`` compresses steps, not gradients, as EF is stated."""
    x, g, total = torch.zeros(20, dtype=torch.float64), torch.Generator().manual_seed(1), []
    for t in range(rounds):
        gradients = DIFFERENT.gradients(x)
        if t >= 2 * rounds // 3:
            total.append(float(gradients.mean(0).square().sum()))
        if noise:
            gradients = gradients + noise * torch.randn(5, 20, generator=g, dtype=torch.float64)
        if inside:
            gradients = step * gradients
        sent = gradients if feedback is None else feedback(gradients, DIFFERENT.key).values
        x = x - (1 if inside else step) * sent.mean(0)
    return float(np.mean(total))


def test_differences_among_devices_leave_a_floor_under_ef_and_none_under_ef21() -> None:
    large = floor(ErrorFeedback(TopK(k=2), 5), 0.1, 900, inside=True)
    small = floor(ErrorFeedback(TopK(k=2), 5), 0.025, 1500, inside=True)
    assert 0.5 < large / small / 16 < 2, "it goes with the square of the step"
    assert floor(EF21(TopK(k=2), 5), 0.1, 900) < 1e-15 * small


def test_noise_hurts_ef21_most_and_a_running_mean_cures_it() -> None:
    none = floor(None, 0.01, 900, noise=5.0)
    ef = floor(ErrorFeedback(TopK(k=1), 5), 0.01, 900, inside=True, noise=5.0)
    worst = floor(EF21(TopK(k=1), 5), 0.01, 900, noise=5.0)
    cured = floor(EF21SGDM(TopK(k=1), eta=0.1, num_devices=5), 0.01, 900, noise=5.0)
    assert worst > 5 * max(none, ef, cured)
    assert cured < 2 * none


# ---------------------------------------------------------------- what every kind owes


KINDS: dict[str, Callable[..., Feedback]] = {
    "ef": lambda n=None: ErrorFeedback(TopK(k=3), n),
    "ef_randk": lambda n=None: ErrorFeedback(RandK(k=9, unbiased=False), n),
    "ef21": lambda n=None: EF21(TopK(k=3), n),
    "ef21_randk": lambda n=None: EF21(RandK(k=9, unbiased=False), n),
    "ef21_sign": lambda n=None: EF21(SignSGD(scaled=True), n),
    "ef21_w": lambda n=None: EF21W(TopK(k=3), SMOOTHNESS, n),
    "ef21_w_randk": lambda n=None: EF21W(RandK(k=9, unbiased=False), SMOOTHNESS, n),
    "ef21_sgdm": lambda n=None: EF21SGDM(TopK(k=3), eta=0.3, num_devices=n),
    "econtrol": lambda n=None: EControl(TopK(k=3), eta=0.07, num_devices=n),
    "dgc": lambda n=None: DGC(0.1, 0.7, clip_norm=9.0, warmup_densities=[0.5, 0.2], warmup_rounds=2, num_devices=n),
    "dgc_nesterov": lambda n=None: DGC(0.1, 0.7, nesterov=True, num_devices=n),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def memories(feedback: Feedback, name: str = "update") -> list[Tensor]:
    found = [memory.residual(name).clone() for memory in feedback.memories]
    assert found
    return found


def everything(feedback: Feedback) -> list[dict[str, Tensor]]:
    """All that is remembered, by name, the receiver's side with it."""
    memories = [module for module in feedback.modules() if isinstance(module, ErrorMemory)]
    return [memory.state_dict()["_extra_state"]["residuals"] for memory in memories]


def play(feedback: Feedback, rounds: Iterator[int] | range, **options: Any) -> list[Tensor]:
    """What the receiver held in each round, and at last what is remembered."""
    out = []
    for t in rounds:
        devices = GROUPS[t % len(GROUPS)]
        out.append(feedback(rows(len(devices), D, seed=t), key(devices, t), **options).values)
    return out + memories(feedback, **options)


def same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    assert len(first) == len(second)
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_kind
def test_only_the_named_devices_change(kind: str) -> None:
    feedback = KINDS[kind](M)
    feedback(rows(M, D), key())
    before = memories(feedback)
    feedback(rows(2, D, seed=1), key((2, 0), 1))
    after = memories(feedback)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(before, after, strict=True))
    assert not torch.equal(before[0][[0, 2]], after[0][[0, 2]])


@every_kind
def test_the_order_in_which_devices_come_does_not_matter(kind: str) -> None:
    first, second, order = KINDS[kind](M), KINDS[kind](M), [2, 0, 1]
    for t in range(4):
        x = rows(M, D, seed=t)
        assert torch.equal(first(x, key(round=t)).values[order], second(x[order], key(order, t)).values)
    assert same(memories(first), memories(second))


@every_kind
@pytest.mark.parametrize("is_set_up", [True, False])
def test_saved_and_loaded_in_the_middle_it_goes_on_bit_for_bit(kind: str, is_set_up: bool) -> None:
    uninterrupted, first = KINDS[kind](M), KINDS[kind](M)
    expected = play(uninterrupted, range(12))
    play(first, range(5))
    first.keep_estimate(rows(1, D))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    first(rows(M, D, seed=99), key(round=5))  # what was saved is not the memory itself
    file.seek(0)
    state = torch.load(file, weights_only=True)
    for second in (KINDS[kind](M if is_set_up else None), KINDS[kind](M)):  # what is loaded twice is not used up
        second.load_state_dict(state)
        assert same(play(second, range(5, 12)), expected[5:])
    without = KINDS[kind](M)
    without.keep_estimate(rows(1, D))
    x = rows(1, D, seed=1)
    assert torch.equal(second.estimate(x), without.estimate(x)), "the receiver's side is saved, too"


@every_kind
def test_state_of_another_number_of_devices_is_refused(kind: str) -> None:
    feedback = KINDS[kind](M)
    feedback(rows(M, D), key())
    with pytest.raises((RuntimeError, ValueError), match=r"is of 3 devices, this one of 2|has 3 entries"):
        KINDS[kind](2).load_state_dict(feedback.state_dict())
    with pytest.raises((RuntimeError, ValueError), match=r"residuals of 3 devices and cannot serve 2|has 3 entries"):
        feedback.setup(2)


@every_kind
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("when", [0, 2])
def test_a_row_that_is_not_finite_is_as_if_its_device_had_been_away(kind: str, poison: float, when: int) -> None:
    poisoned, without = KINDS[kind](M), KINDS[kind](M)
    for t in range(when + 3):
        x = rows(M, D, seed=t)
        if t == when:
            there = without(x[[0, 2]], key((0, 2), t)).values
            x[1, 5] = poison
            values = poisoned(x, key(round=t)).values
            assert not torch.isfinite(values[1]).all(), "it must not vanish"
            assert torch.equal(values[[0, 2]], there)
        else:
            assert torch.equal(poisoned(x, key(round=t)).values, without(x, key(round=t)).values)
        assert same(memories(poisoned), memories(without))


@pytest.mark.parametrize("kind", ["ef", "ef21", "ef21_w", "ef21_sgdm", "econtrol"])
@pytest.mark.parametrize("when", [0, 2])
def test_a_row_that_is_not_finite_is_not_remembered_where_signs_hide_it(kind: str, when: int) -> None:
    """One bit cannot say NaN: what arrives is finite, and still nothing may be remembered of the row."""
    build: dict[str, Callable[[], Feedback]] = {
        "ef": lambda: ErrorFeedback(SignSGD(), M),
        "ef21": lambda: EF21(SignSGD(), M),
        "ef21_w": lambda: EF21W(SignSGD(), SMOOTHNESS, M),
        "ef21_sgdm": lambda: EF21SGDM(SignSGD(), num_devices=M),
        "econtrol": lambda: EControl(SignSGD(), eta=0.05, num_devices=M),
    }
    poisoned, without = build[kind](), build[kind]()
    for t in range(when + 2):
        x = rows(M, D, seed=t)
        if t == when:
            without(x[[0, 2]], key((0, 2), t))
            x[1, 5] = math.nan
            poisoned(x, key(round=t))
        else:
            poisoned(x, key(round=t))
            without(x, key(round=t))
        assert same(memories(poisoned), memories(without))


@pytest.mark.parametrize(
    "build",
    [
        lambda: ErrorFeedback(TopK(k=1), 1),
        lambda: EF21(TopK(k=1), 1),
        lambda: EF21W(TopK(k=1), [1.0], 1),
        lambda: EF21SGDM(TopK(k=1), eta=0.9, num_devices=1),
        lambda: EControl(TopK(k=1), num_devices=1),
        lambda: DGC(0.5, 0.9, num_devices=1),
    ],
)
def test_what_is_beyond_the_rows_dtype_comes_later(build: Callable[[], Feedback]) -> None:
    """The rows are finite, but what to send instead of the second is beyond float16."""
    feedback, first = build(), torch.tensor([[60000.0, 50000.0]], dtype=torch.float16)
    second = -first if isinstance(feedback, EF21) else first
    feedback(first, key((0,)))
    sent = feedback(second, key((0,), 1)).values
    assert torch.isfinite(sent).all()
    if isinstance(feedback, EF21):  # what arrives is the estimate
        for t in range(2, 40):
            sent = feedback(second, key((0,), t)).values
        torch.testing.assert_close(sent, second, rtol=2e-3, atol=0)
    elif isinstance(feedback, ErrorFeedback | DGC):
        assert sent.abs().max() == torch.finfo(torch.float16).max
        assert feedback.memory.residual()[sent != 0].item() > 1e4


@every_kind
def test_each_name_has_a_memory_of_its_own(kind: str) -> None:
    both, first, second = KINDS[kind](M), KINDS[kind](M), KINDS[kind](M)
    for t, devices in enumerate(GROUPS):
        x, y = rows(len(devices), D, seed=t), rows(len(devices), 11, seed=50 + t)
        assert torch.equal(both(x, key(devices, t), name="a").values, first(x, key(devices, t)).values)
        if t % 3:
            assert torch.equal(both(y, key(devices, t), name="b").values, second(y, key(devices, t)).values)
        mean = rows(1, D, seed=t)
        both.keep_estimate(mean, name="a")
        first.keep_estimate(mean)
        assert torch.equal(both.estimate(mean, name="a"), first.estimate(mean))
        assert torch.equal(both.estimate(mean, name="c"), mean)
    assert same(memories(both, "a"), memories(first))
    assert same(memories(both, "b"), memories(second))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_keep_their_dtype_and_memories_are_float32_at_least(kind: str, dtype: torch.dtype) -> None:
    feedback = KINDS[kind](M)
    wide = torch.promote_types(dtype, torch.float32)
    for t in range(6):
        x = rows(M, D, seed=t, dtype=dtype)
        before = x.clone()
        message = feedback(x, key(round=t))
        assert message.values.dtype == dtype
        assert torch.equal(x, before), "the rows are not the memory's to change"
        assert message.bits_wire == feedback.at(t).roundtrip(x, key(round=t)).bits_wire
        assert all(memory.dtype == wide for memory in memories(feedback))
    if isinstance(feedback, EF21):
        factors = feedback.factors(EVERYONE)
        held = feedback.memory.residual() * (1 if factors is None else factors.to(wide).unsqueeze(1))
        assert torch.equal(message.values, held.to(dtype)), "what is held is rounded once"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_memories_of_low_precision_rows_are_exact_to_float32(method: str, dtype: torch.dtype) -> None:
    """NumPy in float64, with what travels rounded to the rows' dtype."""

    def compress(row: np.ndarray) -> np.ndarray:
        return top_k(torch.from_numpy(row).float().to(dtype).double().numpy(), 9)

    wrap, step = METHODS[method]
    feedback, remembered = wrap(TopK(k=9)), [{} for _ in EVERYONE]
    x = torch.randn(M, D, generator=torch.Generator().manual_seed(0)).to(dtype)
    for t in range(12):  # the same rows: their running mean is themselves
        feedback(x, key(round=t))
        for m in EVERYONE:
            step(remembered[m], x[m].double().numpy(), compress, m)
    np.testing.assert_allclose(feedback.memory.residual(), [m["h"] for m in remembered], rtol=2e-6, atol=2e-6)
    if isinstance(feedback, EF21SGDM):
        torch.testing.assert_close(feedback.averages.residual(), x.float(), rtol=2e-6, atol=2e-6)


@every_kind
def test_rows_may_belong_to_a_graph_and_memories_do_not(kind: str) -> None:
    feedback, plain = KINDS[kind](M), KINDS[kind](M)
    for t in range(2):
        x = rows(M, D, seed=t)
        values = feedback(x.clone().requires_grad_(), key(round=t)).values
        assert torch.equal(values.detach(), plain(x, key(round=t)).values)
    assert not any(memory.residual().requires_grad for memory in feedback.memories), "graphs would grow round by round"


@every_kind
def test_asking_what_to_send_changes_nothing(kind: str) -> None:
    feedback = KINDS[kind](M)
    feedback(rows(M, D), key())
    feedback.keep_estimate(rows(1, D))
    before, x = copy.deepcopy(everything(feedback)), rows(M, D, seed=1)
    first = feedback.correct(x, key(round=1))
    assert torch.equal(first, feedback.correct(x, key(round=1)))
    assert torch.equal(feedback.plain(x, key(round=1), "update"), feedback.plain(x, key(round=1), "update"))
    assert torch.equal(feedback.estimate(x[:1]), feedback.estimate(x[:1]))
    for old, new in zip(before, everything(feedback), strict=True):
        assert old.keys() == new.keys()
        assert same(list(old.values()), list(new.values()))


@every_kind
def test_spread_over_processes_it_is_the_same_and_the_server_knows_the_mean(kind: str) -> None:
    """Each device encodes for itself, in two processes; a third instance has but the mean of what was sent."""
    together, server = KINDS[kind](M), KINDS[kind](M)
    hosts = {range(1): KINDS[kind](), range(1, 3): KINDS[kind]()}
    for hosted, feedback in hosts.items():
        feedback.setup(M, hosted)
    for t in range(10):
        x = wide_rows(M, seed=t)
        expected = together(x, key(round=t)).values
        factors = server.factors(range(M))
        mean, held = torch.zeros(1, D, dtype=torch.float64), []
        for hosted, feedback in hosts.items():
            for m in hosted:
                row, own = x[m : m + 1], key((m,), t)
                corrected, compressor = feedback.correct(row, own), feedback.at(t)
                sent = compressor.decode(compressor.encode(corrected, own))
                mean += sent * (1 if factors is None else factors[m]) / M
                held.append(feedback.keep(row, corrected, sent, own))
        assert torch.equal(torch.cat(held), expected)
        torch.testing.assert_close(server.estimate(mean), expected.mean(0, keepdim=True), rtol=1e-12, atol=1e-12)
        server.keep_estimate(mean)
    for i, whole in enumerate(memories(together)):
        assert torch.equal(torch.cat([memories(feedback)[i] for feedback in hosts.values()]), whole)


@every_kind
def test_a_process_refuses_devices_that_are_not_its_own(kind: str) -> None:
    feedback = KINDS[kind]()
    feedback.setup(M, range(1, 3))
    with pytest.raises(ValueError, match=r"Device ids must be in \[1, 3\), got 0 to 0"):
        feedback(rows(1, D), key((0,)))
    with pytest.raises(ValueError, match="Got 2 rows for 1 devices"):
        feedback.correct(rows(2, D), key((1,)))


@every_kind
def test_forgotten_it_starts_anew_and_for_other_rows(kind: str) -> None:
    feedback = KINDS[kind](M)
    first = play(feedback, range(4))
    feedback.keep_estimate(rows(1, D))
    with pytest.raises(RuntimeError, match="the residual has 30 entries, but rows of 31 came; call reset_state"):
        feedback(rows(M, D + 1), key())
    feedback.reset_state()
    assert torch.equal(feedback.estimate(rows(1, D + 1)), rows(1, D + 1))
    feedback.reset_state()
    assert same(play(feedback, range(4)), first)
    with pytest.raises(RuntimeError, match=r"call setup\(num_devices\)"):
        KINDS[kind]()(rows(M, D), key())


@every_kind
def test_nobody_may_come_and_rows_may_be_empty(kind: str) -> None:
    feedback = KINDS[kind](M)
    assert feedback(rows(0, D), key(())).values.shape == (0, D)
    assert feedback(rows(M, 0), key(), name="empty").values.shape == (M, 0)


@every_kind
def test_copies_and_another_dtype_of_the_module(kind: str) -> None:
    feedback = KINDS[kind](M)
    play(feedback, range(3))
    copied = copy.deepcopy(feedback)
    assert same(play(copied, range(3, 6)), play(feedback, range(3, 6)))
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert all(memory.dtype == expected for memory in memories(feedback.to(dtype)))


@every_kind
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_only_real_rows_are_taken(kind: str, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=str(dtype)):
        KINDS[kind](M)(torch.ones(M, D, dtype=dtype), key())


# ---------------------------------------------------------------- bad input


class Unknown(Grid):
    """Unbiased, it says, but not how far off."""

    unbiased = True


@pytest.mark.parametrize("build", [EF21, EF21SGDM, EControl, lambda c: EF21W(c, [1.0])])
def test_an_unbiased_compressor_of_unknown_quality_is_refused(build: Callable[[Compressor], Feedback]) -> None:
    with pytest.raises(ValueError, match="unbiased compressor with a known omega, got Unknown"):
        build(Unknown())


@pytest.mark.parametrize("eta", [0.0, -0.1, 1.5, math.nan, math.inf])
def test_a_weight_out_of_range_is_refused(eta: float) -> None:
    with pytest.raises(ValueError, match=rf"`eta` must be in \(0, 1\], got {eta}"):
        EF21SGDM(TopK(k=1), eta=eta)


@pytest.mark.parametrize("smoothness", [[], [1.0, 0.0], [1.0, -2.0], [math.nan], [math.inf, 1.0]])
def test_smoothness_that_is_none_is_refused(smoothness: list[float]) -> None:
    with pytest.raises(ValueError, match="`smoothness` needs one positive number a device, got"):
        EF21W(TopK(k=1), smoothness)


@pytest.mark.parametrize("smoothness", [[1.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
def test_smoothness_of_another_number_of_devices_is_refused(smoothness: list[float]) -> None:
    """One too many would change every weight without a word."""
    with pytest.raises(ValueError, match=rf"`smoothness` has {len(smoothness)} entries"):
        EF21W(TopK(k=1), smoothness).setup(M)
    with pytest.raises(ValueError, match=rf"`smoothness` has {len(smoothness)} entries"):
        EF21W(TopK(k=1), smoothness, num_devices=M)


def test_hosted_devices_must_be_a_block_of_those_there_are() -> None:
    for hosted in (range(3, 5), range(-1, 1), range(0, 4, 2)):
        with pytest.raises(ValueError, match="hosted"):
            EF21(TopK(k=1)).setup(4, hosted)


# ---------------------------------------------------------------- in training


def part(build: Callable[..., Feedback], **options: Any) -> Callable[[], EdgeStrategy]:
    options = {"granularity": "layer", "min_numel": 10} | options
    return lambda: EdgeStrategy(num_devices=M, uplink=Digital(build(), **options))


@pytest.mark.parametrize("kind", ["ef21", "ef21_w", "ef21_sgdm"])
def test_in_training_it_resumes_bit_for_bit(kind: str) -> None:
    check_strategy_part(part(KINDS[kind]))


def test_in_training_a_tenth_of_the_entries_does_in_thrice_the_steps() -> None:
    _, _, dense = fit(EdgeStrategy(num_devices=M), steps=20, max_epochs=-1)
    for options in ({}, {"granularity": "model"}):
        _, t, losses = fit(part(lambda: EF21(TopK(density=0.1)), **options)(), steps=60, max_epochs=-1)
        assert np.mean(losses[-4:]) < 1.1 * np.mean(dense[-4:])
        assert np.mean(dense[-4:]) < 0.95 * np.mean(dense[:4])
    assert t.strategy.ledger.totals["uplink/bits"] < 60 * M * 32 * 259 / 4


def test_every_kind_can_be_named_in_a_configuration() -> None:
    parser = ArgumentParser()
    parser.add_argument("--feedback", type=Feedback)
    module = "groundwire.plugins.compression."
    inner = {"class_path": module + "TopK", "init_args": {"density": 0.1}}
    for name, arguments in {
        "EF21": {"compressor": inner},
        "EF21W": {"compressor": inner, "smoothness": [1, 2]},
        "EF21SGDM": {"compressor": inner, "eta": 0.5},
        "EControl": {"compressor": inner, "eta": 0.5},
        "DGC": {"density": 0.1, "warmup_densities": [0.5], "warmup_rounds": 3},
    }.items():
        parsed = parser.parse_object({"feedback": {"class_path": module + name, "init_args": arguments}})
        feedback = parser.instantiate(parsed).feedback
        assert type(feedback).__name__ == name
        assert isinstance(feedback.compressor, TopK)
        assert feedback.compressor.density == 0.1
