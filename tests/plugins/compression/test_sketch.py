"""Linear sketches, against explicit matrices and against all operators there are."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from scipy.linalg import hadamard
from torch import Tensor

from groundwire.plugins.compression import Compressor, ErrorFeedback
from groundwire.plugins.compression.sketch import (
    SRHT,
    CountSketch,
    count_sketch,
    count_sketch_transpose,
    srht,
    srht_transpose,
)
from groundwire.plugins.random import Key, stream
from helpers.compressors import check_compressor, key, rows

Kind = type[CountSketch] | type[SRHT]
KINDS = pytest.mark.parametrize("kind", [CountSketch, SRHT])


def length(d: int) -> int:
    return 2 ** math.ceil(math.log2(d))


def count_matrix(slots: Any, k: int) -> np.ndarray:
    """Shape (k, d), one 1 or -1 in every column."""
    matrix = np.zeros((k, len(slots)))
    for j, slot in enumerate(slots):
        matrix[slot // 2, j] = 1.0 if slot % 2 else -1.0
    return matrix


def srht_matrix(signs: Any, places: Any) -> np.ndarray:
    d, n = len(signs), length(len(signs))
    return (hadamard(n) / math.sqrt(len(places)))[np.asarray(places)][:, :d] * np.asarray(signs)


def matrix(kind: Kind, d: int, k: int, key: Key) -> np.ndarray:
    """What a round draws: from the stream that all devices share."""
    if kind is CountSketch:
        g = stream(key.seed, purpose="count_sketch", round=key.round)
        return count_matrix(torch.randint(2 * k, (d,), generator=g).tolist(), k)
    g = stream(key.seed, purpose="srht", round=key.round)
    signs = 2 * torch.randint(2, (d,), generator=g).numpy() - 1
    return srht_matrix(signs, torch.randperm(length(d), generator=g)[:k].numpy())


def expected_omega(kind: Kind, d: int, k: int) -> float:
    """By the moments of the off-diagonal entries of ``R^T R``, all alike: ``(d - 1)`` of them hit each entry."""
    if d == 1:
        return 0.0
    n = length(d)
    return (d - 1) * (1 / k if kind is CountSketch else (n / k - 1) / (n - 1))


def send(kind: Kind, row: np.ndarray, key: Key, dtype: torch.dtype, k: int, unbiased: bool) -> np.ndarray:
    k = min(k, len(row))
    r = matrix(kind, len(row), k, key)
    travelled = torch.from_numpy(r @ row).to(dtype).double().numpy()
    return r.T @ travelled / (1 if unbiased else 1 + expected_omega(kind, len(row), k))


@KINDS
@pytest.mark.parametrize("unbiased", [True, False])
def test_shared_checks(kind: Kind, unbiased: bool) -> None:
    check_compressor(
        lambda: kind(k=13, unbiased=unbiased),
        definition=lambda row, key, dtype: send(kind, row, key, dtype, 13, unbiased),
        wire_bits=lambda d, size: 8 * max(size, 4) * min(13, d),
        random=True,
    )


@KINDS
def test_density_sets_the_length(kind: Kind) -> None:
    payload = kind(density=0.25).encode(rows(3, 100), key(3))
    assert payload.parts["values"].shape == (3, 25)
    assert payload.bits_wire == payload.bits_ideal == 3 * 25 * 32


# ---------------------------------------------------------------- the operators


@settings(max_examples=60, deadline=None)
@given(d=st.integers(1, 64), k=st.integers(1, 64), seed=st.integers(0, 1000))
def test_functions_are_their_matrices_and_each_others_adjoints(d: int, k: int, seed: int) -> None:
    k, g = min(k, d), torch.Generator().manual_seed(seed)
    x = torch.randn(2, d, generator=g, dtype=torch.float64)
    y = torch.randn(2, k, generator=g, dtype=torch.float64)
    slots = torch.randint(2 * k, (d,), generator=g)
    signs = (2 * torch.randint(2, (d,), generator=g) - 1).double()
    places = torch.randperm(length(d), generator=g)[:k]
    for there, back, explicit in (
        (count_sketch(x, slots, k), count_sketch_transpose(y, slots), count_matrix(slots.tolist(), k)),
        (srht(x, signs, places), srht_transpose(y, signs, places), srht_matrix(signs.numpy(), places.numpy())),
    ):
        np.testing.assert_allclose(there.numpy(), x.numpy() @ explicit.T, atol=1e-12)
        np.testing.assert_allclose(back.numpy(), y.numpy() @ explicit, atol=1e-12)
        torch.testing.assert_close((there * y).sum(1), (x * back).sum(1), rtol=1e-10, atol=1e-10)


def test_count_sketch_of_long_rows_is_bincount() -> None:
    x, slots = rows(3, 50_000, dtype=torch.float64), torch.randint(2000, (50_000,), generator=stream(0, purpose="t"))
    signed = x.numpy() * np.where(slots.numpy() % 2, 1.0, -1.0)
    expected = [np.bincount(slots.numpy() // 2, weights=row, minlength=1000) for row in signed]
    np.testing.assert_allclose(count_sketch(x, slots, 1000).numpy(), expected, rtol=1e-9, atol=1e-9)


def _every_count_sketch(d: int, k: int) -> list[np.ndarray]:
    return [count_matrix(slots, k) for slots in itertools.product(range(2 * k), repeat=d)]


def _every_srht(d: int, k: int) -> list[np.ndarray]:
    choices = itertools.product(itertools.product((-1, 1), repeat=d), itertools.combinations(range(length(d)), k))
    return [srht_matrix(signs, places) for signs, places in choices]


@pytest.mark.parametrize(("d", "k"), [(1, 1), (2, 1), (3, 1), (3, 2), (3, 3), (4, 2), (4, 4), (5, 2), (5, 5)])
@KINDS
def test_omega_and_alpha_are_exact_over_all_operators(kind: Kind, d: int, k: int) -> None:
    if kind is CountSketch and (2 * k) ** d > 10_000:
        k = 2
    every = _every_count_sketch(d, k) if kind is CountSketch else _every_srht(d, k)
    grams = np.stack([r.T @ r for r in every])
    np.testing.assert_allclose(grams.mean(0), np.eye(d), atol=1e-12)
    omega, alpha = kind(k=k).omega(d), kind(k=k, unbiased=False).alpha(d)
    assert omega is not None
    assert alpha is not None
    for scale, factor in ((1.0, omega), (1 / (1 + omega), 1 - alpha)):
        errors = scale * grams - np.eye(d)
        second_moment = np.einsum("tji,tjl->il", errors, errors) / len(every)
        np.testing.assert_allclose(second_moment, factor * np.eye(d), atol=1e-12)  # for every x, so an equality


@KINDS
@pytest.mark.parametrize(("d", "k"), [(256, 32), (300, 40)])
def test_unbiased_over_rounds_with_its_omega(kind: Kind, d: int, k: int) -> None:
    x, draws, found = rows(1, d, dtype=torch.float64), 1500, {}
    for unbiased in (True, False):
        values = [kind(k=k, unbiased=unbiased).roundtrip(x, Key(seed=5, round=t)).values for t in range(draws)]
        sample = torch.cat(values)
        found[unbiased] = ((sample - x).square().sum(1).mean() / x.square().sum()).item()
        noise = (sample.var(0).sum() / draws).sqrt()  # of the mean, in norm
        if unbiased:
            assert (sample.mean(0) - x).norm() <= 1.5 * noise
            assert (sample.mean(0) - 1.3 * x).norm() > 2 * noise, "a wrong scale would be seen"
    omega, alpha = kind(k=k).omega(d), kind(k=k, unbiased=False).alpha(d)
    assert omega == pytest.approx(expected_omega(kind, d, k))
    assert alpha == pytest.approx(1 / (1 + expected_omega(kind, d, k)))
    assert found[True] == pytest.approx(omega, rel=0.05)
    assert 1 - found[False] == pytest.approx(alpha, rel=0.05)
    if kind is SRHT and d == 300:
        assert found[True] != pytest.approx(512 / 40 - 1, rel=0.3), "which is that of 512 entries without padding"


def test_claims_are_one_or_the_other() -> None:
    for kind in (CountSketch, SRHT):
        assert kind(k=4).unbiased
        assert kind(k=4).alpha(16) is None
        assert not kind(k=4, unbiased=False).unbiased
        assert kind(k=4, unbiased=False).omega(16) is None
        assert kind(k=4).omega(0) == kind(k=4).omega(1) == 0
    assert SRHT(k=4, unbiased=False).alpha(16) == 0.25
    assert CountSketch(k=4, unbiased=False).alpha(16) == pytest.approx(4 / 19)


@pytest.mark.parametrize("unbiased", [True, False])
def test_whole_srht_is_exact_for_powers_of_two(unbiased: bool) -> None:
    for d in (1, 2, 64, 1024):
        x = rows(2, d, dtype=torch.float64)
        torch.testing.assert_close(
            SRHT(density=1.0, unbiased=unbiased).roundtrip(x, key(2)).values, x, rtol=1e-12, atol=1e-12
        )
    x = rows(1, 300)
    assert not torch.allclose(SRHT(density=1.0).roundtrip(x, key(1)).values, x), "300 of 512 transformed entries"


# ---------------------------------------------------------------- devices and rounds


@KINDS
def test_payloads_of_ranks_add(kind: Kind) -> None:
    sketch = kind(density=0.2)
    assert sketch.linear
    x = rows(3, 50, dtype=torch.float64)
    alone = [kind(density=0.2).encode(x[i : i + 1], key(3).row(i)) for i in range(3)]  # as three processes would
    total = replace(alone[1], parts={"values": sum((p.parts["values"] for p in alone), torch.zeros(1, 10))})
    expected = sketch.decode(sketch.encode(x, key(3))).sum(0, keepdim=True)
    torch.testing.assert_close(sketch.decode(total), expected)
    assert torch.equal(sketch.decode_sum(sketch.encode(x, key(3))), expected)


@KINDS
def test_sketch_is_linear_in_the_row(kind: Kind) -> None:
    sketch, x, y = kind(k=9), rows(1, 40, dtype=torch.float64), rows(1, 40, seed=1, dtype=torch.float64)

    def sent(row: Tensor) -> Tensor:
        return sketch.encode(row, key(1)).parts["values"]

    torch.testing.assert_close(sent(2 * x - 3 * y), 2 * sent(x) - 3 * sent(y))


@KINDS
def test_rounds_and_names_draw_anew(kind: Kind) -> None:
    x, k, d = torch.eye(24, dtype=torch.float64), 6, 24
    devices = tuple(range(24))

    def operator(round: int, name: str = "") -> Tensor:
        return kind(k=k).roundtrip(x, Key(seed=0, round=round, devices=devices, name=name)).values

    assert torch.linalg.matrix_rank(operator(0)) == k, "with one operator, only k directions ever move"
    assert torch.linalg.matrix_rank(torch.cat([operator(t) for t in range(12)])) == d
    assert not torch.equal(operator(0, "weight"), operator(0, "bias"))


@KINDS
def test_error_feedback_needs_the_contractive_one(kind: Kind) -> None:
    gradient, sent = rows(1, 64, dtype=torch.float64), torch.zeros(1, 64, dtype=torch.float64)
    contractive = ErrorFeedback(kind(k=8, unbiased=False), num_devices=1)
    unbiased = ErrorFeedback(kind(k=8), num_devices=1)
    for t in range(400):
        sent += contractive(gradient, Key(seed=0, round=t)).values
        if t < 200:
            unbiased(gradient, Key(seed=0, round=t))
    torch.testing.assert_close(sent + contractive.memory.residual(), 400 * gradient)
    assert contractive.memory.residual().norm() < 2 * (1 + 63 / 8) * gradient.norm(), "bounded, so all of it arrives"
    assert not unbiased.memory.residual().norm() < 1e6 * gradient.norm(), "what was not sent grows in every round"


# ---------------------------------------------------------------- edges


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@KINDS
def test_extreme_scales(kind: Kind, scale: float) -> None:
    x = torch.randn(1, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = kind(k=10).roundtrip(x, key(1)).values
    scaled = kind(k=10).roundtrip((scale * x).float(), key(1)).values.double() / scale
    torch.testing.assert_close(scaled, plain, rtol=1e-4, atol=1e-6)


@KINDS
def test_sums_are_rounded_once(kind: Kind) -> None:
    x = torch.cat([torch.full((1, 1), 1e8), torch.ones(1, 4095)], dim=1)  # float32 would lose the ones one by one
    exact = kind(k=1).encode(x.double(), key(1)).parts["values"]
    assert torch.equal(kind(k=1).encode(x, key(1)).parts["values"], exact.float())


def test_bad_input_by_message() -> None:
    for kind in (CountSketch, SRHT):
        with pytest.raises(ValueError, match="Give either `density`"):
            kind()
        with pytest.raises(ValueError, match=r"`density` must be in \(0, 1\], got 2.0"):
            kind(density=2.0)
        with pytest.raises(ValueError, match="`k` must be at least 1, got 0"):
            kind(k=0)
        with pytest.raises(ValueError, match="Got 3 rows, but the key names 2 devices"):
            kind(k=1).encode(torch.zeros(3, 2), key(2))
        with pytest.raises(TypeError, match="real floating dtype"):
            kind(k=1).encode(torch.zeros(1, 2, dtype=torch.int64), key(1))


def test_built_from_yaml() -> None:
    parser = ArgumentParser()
    parser.add_argument("--compressor", type=Compressor)
    for name in ("CountSketch", "SRHT"):
        text = f"{{class_path: groundwire.plugins.compression.sketch.{name}, init_args: {{density: 0.1, unbiased: false}}}}"
        built = parser.instantiate(parser.parse_string(f"compressor: {text}")).compressor
        assert repr(built) == f"{name}(density=0.1, k=None, unbiased=False)"
