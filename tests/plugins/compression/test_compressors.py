"""Compressors against definitions written with loops and NumPy."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jsonargparse import ArgumentParser

from groundwire.plugins.channels import GaussianMAC
from groundwire.plugins.compression import (
    QSGD,
    Compressor,
    DDSGDQuantizer,
    Identity,
    RandK,
    RateAdaptive,
    SignSGD,
    TopK,
)
from groundwire.plugins.compression.base import log2_binomial
from groundwire.plugins.compression.functional import d_dsgd_quantize, topk_indices, topk_mask
from groundwire.plugins.edge import Cost, MajorityVote, Received, Round
from groundwire.plugins.random import Key, stream
from helpers.compressors import check_compressor, key, mean_of_draws, rows, squared_errors


def largest(row: np.ndarray, k: int) -> list[int]:
    """Positions of the k largest magnitudes, ties to the lowest: a stable sort."""
    return sorted(np.argsort(-np.abs(row), kind="stable")[:k].tolist())


def top_k(row: np.ndarray, k: int) -> np.ndarray:
    out = np.zeros_like(row)
    kept = largest(row, k)
    out[kept] = row[kept]
    return out


def signs(row: np.ndarray, k: int, scaled: bool) -> np.ndarray:
    out, kept = np.zeros_like(row), largest(row, min(k, len(row)))
    scale = np.float32(np.mean(np.abs(row[kept]))) if scaled else 1.0
    for j in kept:
        out[j] = scale if row[j] >= 0 else -scale
    return out


def d_dsgd(row: np.ndarray, q: int) -> np.ndarray:
    """The paper's three steps, entry by entry."""
    order = sorted(range(len(row)), key=lambda j: -row[j])
    positive = [j for j in order[:q] if row[j] > 0]
    negative = [j for j in sorted(range(len(row)), key=lambda j: row[j])[:q] if row[j] < 0]
    plus = sum(row[j] for j in positive) / len(positive) if positive else 0.0
    minus = sum(row[j] for j in negative) / len(negative) if negative else 0.0
    out = np.zeros_like(row)
    if plus > -minus:
        out[positive] = np.float32(plus)
    else:
        out[negative] = np.float32(minus)
    return out


def rand_k(row: np.ndarray, k: int, key: Key, scaled: bool) -> np.ndarray:
    """The support is everybody's: drawn from the shared stream, whichever device it is."""
    k, out = min(k, len(row)), np.zeros_like(row)
    order = torch.randperm(len(row), generator=stream(key.seed, purpose="randk", round=key.round)).tolist()
    for j in order[:k]:
        out[j] = row[j] * len(row) / k if scaled else row[j]
    return out


def qsgd(row: np.ndarray, key: Key, dtype: torch.dtype, levels: int, bucket: int, entries: int) -> np.ndarray:
    """Entry by entry: up to the next level with the probability of the remainder."""
    (device,), out = key.devices, np.zeros_like(row)
    kept = largest(row, min(entries, len(row)))
    g = stream(key.seed, purpose="qsgd", round=key.round, device_id=device)
    uniform = torch.rand(len(kept), generator=g, dtype=dtype).tolist()
    for start in range(0, len(kept), bucket):
        norm = float(np.float32(math.sqrt(sum(row[j] ** 2 for j in kept[start : start + bucket]))))
        for j, u in zip(kept[start : start + bucket], uniform[start : start + bucket], strict=True):
            down, remainder = divmod(levels * abs(row[j]) / norm, 1) if norm else (0, 0)
            level = min(down + (remainder + u >= 1), levels)
            out[j] = math.copysign(level / levels * norm, row[j])
    return out


def support_bits(d: int, k: int) -> int:
    """The cheapest exact code of k of d positions, in whole bytes; all of them need none."""
    if k == d:
        return 0
    if k <= 64:
        return 8 * math.ceil(math.ceil(math.log2(math.comb(d, k))) / 8)
    return 8 * min(math.ceil(k * math.ceil(math.log2(d)) / 8), math.ceil(d / 8))


CASES: dict[str, dict[str, Any]] = {
    "identity": {"build": Identity, "definition": lambda r: r, "wire_bits": lambda d, size: 8 * size * d},
    "topk": {
        "build": lambda: TopK(k=5),
        "definition": lambda r: top_k(r, 5),
        "wire_bits": lambda d, size: 8 * size * min(5, d) + support_bits(d, min(5, d)),
    },
    "topk_density": {
        "build": lambda: TopK(density=0.3),
        "definition": lambda r: top_k(r, max(1, round(0.3 * len(r)))),
        "wire_bits": lambda d, size: 8 * size * max(1, round(0.3 * d)) + support_bits(d, max(1, round(0.3 * d))),
    },
    "topk_many": {
        "build": lambda: TopK(k=100),
        "definition": lambda r: top_k(r, 100),
        "wire_bits": lambda d, size: 8 * size * min(100, d) + support_bits(d, min(100, d)),
    },
    "topk_all": {
        "build": lambda: TopK(density=1.0),
        "definition": lambda r: r,
        "wire_bits": lambda d, size: 8 * size * d,
    },
    "randk": {
        "build": lambda: RandK(density=0.4),
        "random": True,
        "definition": lambda r, key, _: rand_k(r, max(1, round(0.4 * len(r))), key, scaled=True),
        "wire_bits": lambda d, size: 8 * size * max(1, round(0.4 * d)),
    },
    "randk_biased": {
        "build": lambda: RandK(k=7, unbiased=False),
        "random": True,
        "definition": lambda r, key, _: rand_k(r, 7, key, scaled=False),
        "wire_bits": lambda d, size: 8 * size * min(7, d),
    },
    "sign": {
        "build": SignSGD,
        "definition": lambda r: signs(r, len(r), False),
        "wire_bits": lambda d, _: 8 * math.ceil(d / 8),
        "carries_nan": False,
    },
    "sign_scaled": {
        "build": lambda: SignSGD(scaled=True),
        "definition": lambda r: signs(r, len(r), True),
        "wire_bits": lambda d, _: 8 * math.ceil(d / 8) + 32,
    },
    "sign_sparse": {
        "build": lambda: SignSGD(num_entries=9),
        "definition": lambda r: signs(r, 9, False),
        "wire_bits": lambda d, _: 8 * math.ceil(min(9, d) / 8) + support_bits(d, min(9, d)),
        "carries_nan": False,
    },
    "sign_many": {
        "build": lambda: SignSGD(num_entries=90, scaled=True),
        "definition": lambda r: signs(r, 90, True),
        "wire_bits": lambda d, _: 8 * math.ceil(min(90, d) / 8) + support_bits(d, min(90, d)) + 32,
    },
    "qsgd": {
        "build": lambda: QSGD(num_levels=4),
        "random": True,
        "definition": lambda r, key, dtype: qsgd(r, key, dtype, 4, len(r), len(r)),
        "wire_bits": lambda d, _: 8 * math.ceil(d * 4 / 8) + 32,  # a sign and a level in 0..4 take 4 bits
    },
    "qsgd_buckets": {  # the last bucket is shorter than 16
        "build": lambda: QSGD(num_levels=7, bucket_size=16),
        "random": True,
        "definition": lambda r, key, dtype: qsgd(r, key, dtype, 7, 16, len(r)),
        "wire_bits": lambda d, _: 8 * math.ceil(d * 4 / 8) + 32 * math.ceil(d / 16),
    },
    "qsgd_eight_bits": {  # codes of a whole byte
        "build": lambda: QSGD(num_levels=127),
        "random": True,
        "definition": lambda r, key, dtype: qsgd(r, key, dtype, 127, len(r), len(r)),
        "wire_bits": lambda d, _: 8 * d + 32,
    },
    "qsgd_nine_bits": {
        "build": lambda: QSGD(num_levels=128, bucket_size=32),
        "random": True,
        "definition": lambda r, key, dtype: qsgd(r, key, dtype, 128, 32, len(r)),
        "wire_bits": lambda d, _: 8 * math.ceil(9 * d / 8) + 32 * math.ceil(d / 32),
    },
    "qsgd_sparse": {
        "build": lambda: QSGD(num_levels=4, num_entries=6),
        "random": True,
        "definition": lambda r, key, dtype: qsgd(r, key, dtype, 4, 6, 6),
        "wire_bits": lambda d, _: 8 * math.ceil(min(6, d) * 4 / 8) + support_bits(d, min(6, d)) + 32,
    },
    "d_dsgd": {  # value, count, and the number of the support among those of at most 4 entries, or of half of them
        "build": lambda: DDSGDQuantizer(num_entries=4),
        "definition": lambda r: d_dsgd(r, min(4, len(r))),
        "wire_bits": lambda d, _: 32 + 8 + _mask_bits(d, min(4, d)),
    },
    "d_dsgd_many": {
        "build": lambda: DDSGDQuantizer(100),
        "definition": lambda r: d_dsgd(r, min(100, len(r))),
        "wire_bits": lambda d, _: 32 + 8 + _mask_bits(d, min(100, d)),
    },
    "d_dsgd_all": {
        "build": DDSGDQuantizer,
        "definition": lambda r: d_dsgd(r, len(r)),
        "wire_bits": lambda d, _: 32 + 8 * (1 if d < 256 else 2) + _mask_bits(d, d),
    },
}


def _mask_bits(d: int, most: int) -> int:
    if most <= 64:
        worst = max(math.comb(d, count) for count in range(most + 1))
        return 8 * math.ceil(math.ceil(math.log2(worst)) / 8)
    return 8 * min(math.ceil(most * math.ceil(math.log2(d)) / 8), math.ceil(d / 8))


@pytest.mark.parametrize("name", CASES)
def test_shared_checks(name: str) -> None:
    check_compressor(**CASES[name])


# ---------------------------------------------------------------- supports


@settings(max_examples=200, deadline=None)
@given(
    x=hnp.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 12)), elements=st.sampled_from([-2.0, -1, -0.0, 0, 1, 2, np.inf])),
    k=st.integers(0, 14),
)  # fmt: skip
def test_topk_mask_marks_exactly_k_and_breaks_ties_to_the_lowest_index(x: np.ndarray, k: int) -> None:
    mask = topk_mask(torch.from_numpy(x), k).numpy()
    for row, marked in zip(x, mask, strict=True):
        assert np.flatnonzero(marked).tolist() == largest(row, min(k, len(row)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_topk_mask_counts_nan_as_largest_in_every_dtype(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, float("nan"), 3.0, 2.0]], dtype=dtype)
    assert topk_mask(x, 1).tolist() == [[False, True, False, False]]
    assert topk_mask(x, 2).tolist() == [[False, True, True, False]]


def test_topk_mask_is_the_same_by_partition_and_by_selection() -> None:
    x = rows(3, 1000)
    x[1] = x[1].round()  # many ties
    for k in (1, 15, 16, 200, 999):  # torch.topk up to 1000 / 64, numpy.partition above
        for row, marked in zip(x.numpy(), topk_mask(x, k).numpy(), strict=True):
            assert np.flatnonzero(marked).tolist() == largest(row, k)


def test_topk_ideal_code_is_never_above_the_wire_when_both_are_equal() -> None:
    for compressor in (TopK(k=1), TopK(k=255)):  # C(256, 1) = 2^8, whose logarithm may come out above 8
        payload, message = compressor.encode(rows(1, 256), key(1)), compressor.roundtrip(rows(1, 256), key(1))
        assert payload.bits_ideal == message.bits_ideal <= payload.bits_wire


# ---------------------------------------------------------------- moments


@pytest.mark.parametrize(
    "compressor", [RandK(k=5), QSGD(num_levels=3), QSGD(num_levels=2, bucket_size=8)], ids=["randk", "qsgd", "buckets"]
)
def test_unbiased_compressors_are_and_obey_their_omega(compressor: Compressor) -> None:
    assert compressor.unbiased
    x = torch.linspace(-2, 3, 20)[None]  # no entry so small that it is never drawn
    mean, error = mean_of_draws(compressor, x, 4000)
    assert ((mean - x[0].double()).abs() <= 5 * error + 1e-7).all()
    assert ((mean - 1.1 * x[0].double()).abs() > 5 * error).any(), "a wrong scale would be seen"
    omega = compressor.omega(20)
    assert omega is not None
    relative = squared_errors(compressor, x, 1500)
    assert relative.mean() <= omega + 5 * relative.std() / math.sqrt(1500)


def test_randk_variance_is_exactly_its_omega() -> None:
    x = rows(1, 20, seed=3)
    relative = squared_errors(RandK(k=5), x, 4000)
    assert abs(relative.mean() - (20 / 5 - 1)) < 5 * relative.std() / math.sqrt(4000)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), numel=st.integers(1, 40))
def test_contractive_compressors_contract(seed: int, numel: int) -> None:
    x = rows(1, numel, seed=seed)
    for compressor in (Identity(), TopK(k=3), TopK(density=0.5), SignSGD(scaled=True)):
        alpha = compressor.alpha(numel)
        assert alpha is not None
        values = compressor.roundtrip(x, key(1)).values
        assert (values - x).square().sum() <= (1 - alpha) * x.square().sum() * (1 + 1e-5)


def test_randk_support_is_shared_and_payloads_add() -> None:
    compressor = RandK(k=4)
    x = rows(3, 30)
    payload = compressor.encode(x, key(3))
    support = payload.parts["values"].shape
    assert support == (3, 4)
    total = type(payload)(
        parts={"values": payload.parts["values"].sum(0, keepdim=True)},
        numel=30, dtype=x.dtype, bits_ideal=0.0, meta=payload.meta,
    )  # fmt: skip
    torch.testing.assert_close(compressor.decode(total)[0], compressor.decode(payload).sum(0))


# ---------------------------------------------------------------- D-DSGD


@settings(max_examples=200, deadline=None)
@given(
    row=hnp.arrays(np.float64, st.integers(1, 9), elements=st.sampled_from([-3.0, -1, -0.5, 0, 0.5, 1, 3])),
    q=st.integers(1, 9),
)
def test_d_dsgd_against_the_papers_steps_with_ties_and_missing_signs(row: np.ndarray, q: int) -> None:
    q = min(q, len(row))
    mask, value = d_dsgd_quantize(torch.from_numpy(row)[None], q)
    ours = torch.where(mask, value, 0)[0].numpy()
    expected = d_dsgd(row, q)
    np.testing.assert_allclose(np.sort(ours), np.sort(expected), rtol=1e-6)  # ties may fall on other positions
    assert len(np.unique(ours[ours != 0])) <= 1
    assert np.count_nonzero(ours) <= q
    plus, minus = (np.sort(np.clip(s * row, 0, None))[::-1][:q] for s in (1, -1))
    if plus[plus > 0].sum() / max((plus > 0).sum(), 1) != minus[minus > 0].sum() / max((minus > 0).sum(), 1):
        mirrored, opposite = d_dsgd_quantize(torch.from_numpy(-row)[None], q)
        np.testing.assert_array_equal(torch.where(mirrored, opposite, 0)[0].numpy(), -ours)


def test_d_dsgd_does_not_hide_what_is_not_finite() -> None:
    nan, inf = float("nan"), float("inf")
    send = DDSGDQuantizer(2).roundtrip
    assert send(torch.tensor([[nan, 1.0, 2.0]]), key(1)).values.isnan().any()  # was all zeros
    assert DDSGDQuantizer(1).roundtrip(torch.tensor([[inf, inf, -1.0]]), key(1)).values.tolist() == [[inf, 0, 0]]


def test_d_dsgd_mean_does_not_overflow_in_half_precision() -> None:
    x = torch.tensor([[6e4, 6e4, 5e4]], dtype=torch.float16)
    values = DDSGDQuantizer(3).roundtrip(x, key(1)).values
    assert values.tolist() == x.float().mean().to(torch.float16).expand(1, 3).tolist()


# ---------------------------------------------------------------- budgets


BUDGETS = [  # devices, channel uses, power: entries of D-DSGD, SignSGD, QSGD at d = 7850 and noise variance 1
    (25, 3925, 50, (0, 2, 0)),
    (25, 3925, 200, (5, 7, 4)),
    (25, 3925, 500, (12, 14, 9)),
    (25, 3925, 1000, (19, 20, 14)),
    (25, 2355, 500, (8, 10, 6)),
    (25, 785, 500, (2, 5, 2)),
    (10, 1962, 500, (14, 16, 10)),
    (20, 1962, 500, (8, 10, 6)),
]


@pytest.mark.parametrize(("devices", "uses", "power", "entries"), BUDGETS)
def test_budget_table(devices: int, uses: int, power: float, entries: tuple[int, int, int]) -> None:
    budget = GaussianMAC().bits_per_device(uses, devices, power)
    for compressor, expected in zip((DDSGDQuantizer(), SignSGD(), QSGD(num_levels=4)), entries, strict=True):
        fitted = compressor.for_budget(7850, budget)
        assert (fitted.num_entries if fitted is not None else 0) == expected
        assert compressor.num_entries is None, "the one given stays as it is"
        if fitted is not None:
            exact = math.log2(math.comb(7850, expected))
            own = {"DDSGDQuantizer": 33, "SignSGD": expected, "QSGD": 32 + 3 * expected}[type(compressor).__name__]
            assert fitted.message_bits(7850) == pytest.approx(exact + own, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(numel=st.integers(1, 2000), bits=st.floats(0, 5000))
def test_for_budget_is_the_largest_that_fits(numel: int, bits: float) -> None:
    compressors: list[RateAdaptive] = [DDSGDQuantizer(), SignSGD(), QSGD(num_levels=4)]
    for compressor in compressors:
        fitted = compressor.for_budget(numel, bits)
        q = fitted.num_entries if fitted is not None else 0
        assert q <= max(numel // 2, 1)
        cost = compressor.entry_bits
        assert q == 0 or cost(numel, q) <= bits
        assert q == max(numel // 2, 1) or cost(numel, q + 1) > bits


def test_qsgd_of_buckets_takes_no_budget() -> None:
    with pytest.raises(ValueError, match="chooses `num_entries`, which does not go with `bucket_size`, got 2"):
        QSGD(num_levels=4, bucket_size=2).for_budget(7850, 300.0)  # it sent twice as much


def test_log2_binomial_is_exact() -> None:
    for n in (1, 10, 333, 2000):
        for k in {0, 1, n // 3, n // 2, n}:
            assert log2_binomial(n, k) == pytest.approx(math.log2(math.comb(n, k)), abs=1e-6)


# ---------------------------------------------------------------- votes, building, bad input


def test_majority_vote_counts_weighted_signs() -> None:
    rows_ = torch.tensor([[1.0, -1, 1, 1], [1, -1, -1, -1], [-1, -1, -1, 5]])
    for count, weights, expected in (
        (3, [1 / 3] * 3, [1, -1, -1, 1]),
        (3, [0.6, 0.2, 0.2], [1, -1, 1, 1]),
        (2, [0.5, 0.5], [1, -1, 0, 0]),
    ):
        received = Received(rows=rows_[:count], weights=torch.tensor(weights), cost=Cost())
        round = Round(index=0, num_rounds=None, key=key(count), weights=received.weights)
        assert MajorityVote()(received, round).tolist() == expected


def test_built_from_yaml() -> None:
    parser = ArgumentParser()
    parser.add_argument("--compressor", type=Compressor)
    for text, expected in [
        ("TopK, init_args: {density: 0.1}", "TopK(density=0.1)"),
        ("RandK, init_args: {k: 3, unbiased: false}", "RandK(density=None, k=3, unbiased=False)"),
        ("QSGD, init_args: {num_levels: 4}", "QSGD(num_levels=4, bucket_size=None, num_entries=None)"),
        ("SignSGD", "SignSGD(num_entries=None, scaled=False)"),
        ("DDSGDQuantizer", "DDSGDQuantizer(num_entries=None)"),
    ]:
        config = parser.parse_string(f"compressor: {{class_path: groundwire.plugins.compression.{text}}}")
        assert repr(parser.instantiate(config).compressor) == expected


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TopK(), "Give either `density`"),
        (lambda: TopK(density=0.1, k=2), "Give either `density`"),
        (lambda: TopK(density=0.0), r"`density` must be in \(0, 1\], got 0.0"),
        (lambda: TopK(density=1.5), r"`density` must be in \(0, 1\], got 1.5"),
        (lambda: RandK(k=0), "`k` must be at least 1, got 0"),
        (lambda: QSGD(num_levels=0), "`num_levels` must be at least 1, got 0"),
        (lambda: QSGD(num_levels=1, bucket_size=0), "`bucket_size` must be at least 1"),
        (lambda: QSGD(num_levels=1, bucket_size=2, num_entries=2), "Give either `bucket_size`"),
        (lambda: SignSGD(num_entries=0), "`num_entries` must be at least 1, got 0"),
        (lambda: DDSGDQuantizer(num_entries=-1), "`num_entries` must be at least 1, got -1"),
        (lambda: topk_mask(torch.zeros(1, 2), -1), "`k` must be >= 0, got -1"),
        (lambda: d_dsgd_quantize(torch.zeros(1, 2), 3), r"`q` must be in \[1, 2\], got 3"),
        (lambda: TopK(k=1).encode(torch.zeros(3), key(3)), r"Expected rows of shape \(rows, d\)"),
        (lambda: TopK(k=1).encode(torch.zeros(3, 2), key(2)), "Got 3 rows, but the key names 2 devices"),
    ],
)
def test_bad_input_by_message(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_only_real_floating_rows_are_compressed() -> None:
    for x in (torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.complex64)):
        with pytest.raises(TypeError, match="real floating dtype"):
            Identity().encode(x, Key(seed=0))


# ---------------------------------------------------------------- long rows


def test_norms_of_many_buckets_are_those_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows(3, 1000)
    expected = QSGD(num_levels=3, bucket_size=8).encode(x, key(3)).parts
    monkeypatch.setattr("groundwire.plugins.compression.qsgd._AT_ONCE", 50)
    found = QSGD(num_levels=3, bucket_size=8).encode(x, key(3)).parts
    assert all(torch.equal(found[name], part) for name, part in expected.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_half_precision_are_wide(dtype: torch.dtype) -> None:
    ones = torch.ones(3000, 2, dtype=dtype)  # beyond 2,048, adding one changes no float16, and beyond 256 no bfloat16
    for compressor in (Identity(), TopK(k=2)):
        total = compressor.decode_sum(compressor.encode(ones, key(3000)))
        assert total.tolist() == [[3000.0, 3000.0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["normal", "heavy", "few values", "zeros", "sorted", "periodic", "nan"])
def test_long_rows_keep_what_a_stable_sort_keeps(dtype: torch.dtype, kind: str) -> None:
    d = 40_009
    x = rows(2, d) if kind != "normal" else torch.randn(2, d, generator=torch.Generator().manual_seed(0))
    if kind == "few values":
        x = (2 * x).round().clamp(-3, 3)
    elif kind == "zeros":
        x[0] = 0
    elif kind == "sorted":
        x = x.sort(dim=1).values
    elif kind == "periodic":  # a strided sample sees only the small entries, or only the large ones
        x = torch.where(torch.arange(d) % 9 == 0, 1e-3 * x, x)
    x = x.to(dtype)
    if kind == "nan":
        x[0, 7::100] = math.nan
    order = [np.where(np.isnan(row), np.inf, np.abs(row)) for row in x.double().numpy()]
    for k in (1, 3, 200, d // 4, d // 2, d - 1):
        expected = [largest(row, k) for row in order]
        assert topk_indices(x, k).tolist() == expected
        mask = topk_mask(x, k)
        assert [row.nonzero().flatten().tolist() for row in mask] == expected


def test_long_rows_together_equal_rows_alone_on_several_threads() -> None:
    x, before = rows(6, 70_001), torch.get_num_threads()
    compressors = [
        SignSGD(scaled=True),
        DDSGDQuantizer(40_000),
        QSGD(4),
        QSGD(4, bucket_size=40_000),
        TopK(density=0.1),
    ]
    try:
        torch.set_num_threads(2)
        for compressor in compressors:
            whole = compressor.roundtrip(x, key(6)).values
            for i in range(6):
                assert torch.equal(whole[i], compressor.roundtrip(x[i : i + 1], key(6).row(i)).values[0])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", [1e-25, 1e20])
def test_qsgd_norm_of_rows_whose_squares_leave_float32(size: float) -> None:
    values = QSGD(num_levels=2).roundtrip(torch.full((1, 4), size), key(1)).values
    assert torch.equal(values, torch.full((1, 4), size)), "each entry is half the norm: a level of its own"


def test_foreign_payloads_are_refused() -> None:
    payload = TopK(k=3).encode(rows(1, 100), key(1))
    short = {**payload.parts, "support": payload.parts["support"][:, 1:]}
    wrong = {**payload.parts, "support": torch.full_like(payload.parts["support"], 255)}
    for parts, message in ((short, "bytes a row do not match a support of 3 of 100"), (wrong, "not the number of")):
        with pytest.raises(ValueError, match=message):
            TopK(k=3).decode(dataclasses.replace(payload, parts=parts))
