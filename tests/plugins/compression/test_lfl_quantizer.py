"""LFL's quantiser against its definition, its moments and a brute-force fit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundwire.plugins.compression import ErrorFeedback
from groundwire.plugins.compression.lfl_quantizer import LFLQuantizer, best_resolution
from groundwire.plugins.random import Key, stream
from helpers.compressors import check_compressor, key, mean_of_draws, rows, squared_errors


def defined(row: np.ndarray, key: Key, dtype: torch.dtype, q: int, entries: int) -> np.ndarray:
    """Entry by entry, as the paper writes it."""
    (device,), out = key.devices, np.zeros_like(row)
    kept = sorted(np.argsort(-np.abs(row), kind="stable")[: min(entries, len(row))].tolist())
    g = stream(key.seed, purpose="lfl", round=key.round, device_id=device)
    coins = torch.rand(len(kept), generator=g, dtype=dtype).tolist()
    least, largest = (float(np.float32(f(np.abs(row[kept])))) for f in (np.min, np.max))
    for j, coin in zip(kept, coins, strict=True):
        down, remainder = divmod(q * max(abs(row[j]) - least, 0) / (largest - least), 1) if largest > least else (0, 0)
        level = min(down + (remainder + coin >= 1), q)
        out[j] = math.copysign(least + (largest - least) * level / q, row[j])
    return out


def support_bits(d: int, k: int) -> int:
    """The cheapest exact code of k of d positions, in whole bytes."""
    if k == d:
        return 0
    if k <= 64:
        return 8 * math.ceil(math.ceil(math.log2(math.comb(d, k))) / 8)
    return 8 * min(math.ceil(k * math.ceil(math.log2(d)) / 8), math.ceil(d / 8))


@pytest.mark.parametrize(
    ("quantizer", "q", "width", "entries"),
    [
        (LFLQuantizer(num_levels=1), 1, 2, 10**6),
        (LFLQuantizer(num_levels=2), 2, 3, 10**6),
        (LFLQuantizer(bits=4), 7, 4, 10**6),
        (LFLQuantizer(num_levels=4, num_entries=9), 4, 4, 9),
        (LFLQuantizer(num_levels=3, num_entries=100), 3, 3, 100),
    ],
)
def test_shared_checks(quantizer: LFLQuantizer, q: int, width: int, entries: int) -> None:
    def wire_bits(d: int, _: int) -> int:
        k = min(entries, d)
        return 64 + 8 * math.ceil(k * width / 8) + support_bits(d, k)

    check_compressor(
        lambda: quantizer,
        definition=lambda row, key, dtype: defined(row, key, dtype, q, entries),
        wire_bits=wire_bits,
        random=True,
    )


def test_bits_are_those_of_the_paper() -> None:
    for d, q in [(1, 1), (7850, 2), (1000, 7)]:
        assert LFLQuantizer(q).message_bits(d) == pytest.approx(64 + d * (1 + math.log2(q + 1)), abs=1e-6)
    expected = 64 + math.log2(math.comb(50, 9)) + 9 * 3
    assert LFLQuantizer(3, num_entries=9).message_bits(50) == pytest.approx(expected, rel=1e-9)
    assert [LFLQuantizer(bits=b).num_levels for b in (2, 3, 8, 17)] == [1, 3, 127, 65535]


@pytest.mark.parametrize("q", [1, 2, 16])
def test_unbiased_with_exactly_the_variance_of_its_remainders(q: int) -> None:
    quantizer, x = LFLQuantizer(q), torch.linspace(-2, 3, 20)[None]
    assert quantizer.unbiased
    assert not LFLQuantizer(q, num_entries=3).unbiased
    mean, error = mean_of_draws(quantizer, x, 2000)
    assert ((mean - x[0].double()).abs() <= 5 * error + 1e-6).all()
    assert ((mean - 1.1 * x[0].double()).abs() > 5 * error).any(), "a wrong scale would be seen"
    size = x[0].double().abs()
    step = (size.max() - size.min()) / q
    remainder = ((size - size.min()) / step) % 1
    expected = float((step**2 * remainder * (1 - remainder)).sum() / size.square().sum())
    relative = squared_errors(quantizer, x, 1000)
    assert abs(float(relative.mean()) - expected) < 5 * float(relative.std()) / math.sqrt(1000) + 1e-4 * expected
    omega = quantizer.omega(20)
    assert omega is not None
    assert expected <= omega
    assert LFLQuantizer(q, num_entries=3).omega(20) is None


def test_error_of_gaussian_rows_and_of_the_mean_of_draws() -> None:
    """Of 2,000 entries: above the row itself at one level, and falling with the square of their number."""
    x = torch.randn(1, 2000, generator=torch.Generator().manual_seed(0))
    errors = {q: float(squared_errors(LFLQuantizer(q), x, 20).mean()) for q in (1, 2, 4, 16)}
    for q, expected in {1: 2.16, 2: 0.66, 4: 0.167, 16: 0.0104}.items():  # other draws of such rows gave these
        assert errors[q] == pytest.approx(expected, rel=0.08)
    for q in (1, 16):
        mean, _ = mean_of_draws(LFLQuantizer(q), x, 400)
        off = float((mean - x[0].double()).norm() / x[0].double().norm())
        assert off == pytest.approx(math.sqrt(errors[q] / 400), rel=0.1)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), numel=st.integers(1, 40), q=st.integers(1, 9), power=st.integers(-20, 20))
def test_scale_sign_levels_and_extremes(seed: int, numel: int, q: int, power: int) -> None:
    x = rows(1, numel, seed=seed)
    quantizer, one = LFLQuantizer(q), key(1)
    values = quantizer.roundtrip(x, one).values
    assert torch.equal(quantizer.roundtrip(-x, one).values, -values)
    assert torch.equal(quantizer.roundtrip(x * 2.0**power, one).values, values * 2.0**power)
    torch.testing.assert_close(quantizer.roundtrip(3 * x, one).values, 3 * values, rtol=1e-5, atol=0)
    assert len(values.abs().unique()) <= q + 1
    size = x.abs()[0]
    for extreme in (size.argmin(), size.argmax()):
        assert values[0, extreme] == x[0, extreme]
    assert values.abs().max() <= size.max()
    assert values.abs().min() >= size.min()
    assert torch.equal(values.sign(), x.sign())


def test_rows_of_one_magnitude_and_zeros_arrive_as_they_are() -> None:
    for row in ([0.3, -0.3, 0.3], [0.0, 0.0], [5.0]):
        x = torch.tensor([row])
        assert torch.equal(LFLQuantizer(1).roundtrip(x, key(1)).values, x)
    values = LFLQuantizer(1).roundtrip(torch.tensor([[0.0, 1.0, 0.0]]), key(1)).values
    assert values.tolist() == [[0.0, 1.0, 0.0]]


def test_many_levels_lose_nothing_to_speak_of() -> None:
    x = rows(3, 500, seed=2)
    off = [float((LFLQuantizer(2**n - 1).roundtrip(x, key(3)).values - x).norm() / x.norm()) for n in (1, 4, 8, 12, 16)]
    assert off == sorted(off, reverse=True)
    assert off[-1] < 1e-3


def test_error_feedback_sends_everything_in_the_end() -> None:
    x = torch.randn(1, 200, generator=torch.Generator().manual_seed(3))
    feedback, total = ErrorFeedback(LFLQuantizer(4), num_devices=1), torch.zeros(1, 200)
    for t in range(200):
        total += feedback(x, Key(seed=0, round=t)).values
    assert (total / 200 - x).norm() < 0.02 * x.norm()
    torch.testing.assert_close(total + feedback.memory.residual(), 200 * x, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------- budgets


def brute_force(row: np.ndarray, bits: float) -> set[tuple[int, int]]:
    """Every number of entries for every candidate of levels: those whose foreseen loss is least."""
    d, size, best, who = len(row), np.sort(np.abs(row))[::-1], math.inf, set()
    for q in (1, 2, *(2**n - 1 for n in range(2, 17))):
        fit = [
            k for k in range(1, d + 1) if 64 + math.log2(math.comb(d, k)) + k * (1 + math.log2(q + 1)) <= bits + 1e-9
        ]
        if fit:
            k = max(fit)
            loss = float((size[k:] ** 2).sum() + k * ((size[0] - size[k - 1]) / q) ** 2 / 6)
            if loss < best - 1e-12:
                best, who = loss, {(q, k)}
            elif loss <= best + 1e-12:
                who.add((q, k))
    return who


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), numel=st.integers(1, 30), bits=st.floats(60, 700))
def test_fit_is_that_of_brute_force_and_keeps_its_budget(seed: int, numel: int, bits: float) -> None:
    row = rows(1, numel, seed=seed, dtype=torch.float64)[0]
    who = brute_force(row.numpy(), bits)
    fitted = LFLQuantizer(1).fitted(row, bits)
    if not who:
        assert fitted is None
        return
    assert fitted is not None
    assert best_resolution(row, bits) in who
    assert (fitted.num_levels, fitted.num_entries or numel) in who
    assert fitted.message_bits(numel) <= bits


def test_more_bits_lose_less() -> None:
    row, lost = rows(1, 400, seed=4)[0], []
    for bits in (80, 200, 500, 1000, 2000, 4000):
        fitted = LFLQuantizer(1).fitted(row, bits)
        assert fitted is not None
        lost.append(float(squared_errors(fitted, row[None], 30).mean()))
    assert lost == sorted(lost, reverse=True)
    assert lost[0] > 0.5
    assert lost[-1] < 1e-4


def test_a_budget_fills_up_the_entries_at_given_levels() -> None:
    for bits in (90.0, 150.0, 300.0):
        fitted = LFLQuantizer(3).for_budget(100, bits)
        assert fitted is not None
        k = fitted.num_entries or 100
        assert fitted.num_levels == 3
        assert fitted.message_bits(100) <= bits < 64 + math.log2(math.comb(100, k + 1)) + 3 * (k + 1)
    everything = LFLQuantizer(3).for_budget(100, 364.0)
    assert everything is not None
    assert everything.num_entries is None
    assert LFLQuantizer(3).for_budget(100, 70.0) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "Give either `num_levels`"),
        ({"num_levels": 2, "bits": 3}, "Give either `num_levels`"),
        ({"num_levels": 0}, r"`num_levels` must be an integer in \[1, 65535\], got 0"),
        ({"num_levels": 2**16}, r"`num_levels` must be an integer in \[1, 65535\], got 65536"),
        ({"num_levels": 2.5}, "`num_levels` must be an integer"),
        ({"bits": 1}, r"`bits` of an entry.*\[2, 17\], got 1"),
        ({"num_levels": 2, "num_entries": 0}, "`num_entries` must be at least 1"),
    ],
)
def test_refuses_impossible_settings(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LFLQuantizer(**settings)
