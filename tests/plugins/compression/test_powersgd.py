"""PowerSGD, against NumPy, the truncated SVD, and the hook that torch ships."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from groundwire.plugins.compression import Compressor, ErrorFeedback
from groundwire.plugins.compression.powersgd import PowerSGD, low_rank, matrix_shape, orthonormalize
from groundwire.plugins.random import Key, stream
from helpers.compressors import DTYPES, rows

SHAPES = {
    "weight": torch.Size([5, 9]),
    "twin": torch.Size([5, 9]),
    "tall": torch.Size([11, 4]),
    "conv": torch.Size([6, 2, 3, 3]),
    "vector": torch.Size([23]),  # 5 x 5, the last row short
    "square": torch.Size([25]),
}


def key_of(name: str = "", *, round: int = 0, devices: int = 3, seed: int = 0) -> Key:
    return Key(seed=seed, round=round, devices=tuple(range(devices)), name=name)


def ready(rank: int = 2, shapes: Mapping[str, torch.Size] = SHAPES, warm_start: bool = True) -> PowerSGD:
    compressor = PowerSGD(rank, warm_start)
    compressor.setup(shapes)
    return compressor


def as_matrix(row: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """By the definition: first dimension against the rest; a vector fills the rows of a square, zeros at its end."""
    if len(shape) > 1:
        return row.reshape(shape[0], -1)
    b = math.ceil(math.sqrt(len(row)))
    a = math.ceil(len(row) / b)
    return np.concatenate([row, np.zeros(a * b - len(row))]).reshape(a, b)


def gram_schmidt(p: np.ndarray) -> np.ndarray:
    columns: list[np.ndarray] = []
    for column in p.T:
        for _ in range(2):
            column = column - sum((c * (c @ column) for c in columns), np.zeros_like(column))
        columns.append(column / np.linalg.norm(column))
    return np.stack(columns, axis=1)


class Reference:
    """Algorithms 1 and 2 of the paper, for the devices of one tensor; ``Q`` is never orthonormalised."""

    def __init__(self, name: str, rank: int) -> None:
        self.shape = tuple(SHAPES[name])
        columns = as_matrix(np.zeros(SHAPES[name].numel()), self.shape).shape[1]
        g = stream(0, purpose=f"powersgd/{name}", round=0)
        self.q = torch.randn(rank, columns, generator=g, dtype=torch.float64).numpy().T
        self.errors: list[np.ndarray] | None = None

    def step(self, x: np.ndarray) -> np.ndarray:
        """Gradients of the devices, a row each, to what arrives of each."""
        deltas = [as_matrix(row, self.shape) for row in x]
        if self.errors is not None:
            deltas = [d + e for d, e in zip(deltas, self.errors, strict=True)]
        p = gram_schmidt(np.mean([d @ self.q for d in deltas], axis=0))
        qs = [d.T @ p for d in deltas]
        arrived = [p @ q.T for q in qs]
        # what lies beyond the end of a vector is nobody's gradient, and never fed back
        arrived = [as_matrix(a.reshape(-1)[: x.shape[1]], self.shape) for a in arrived]
        self.errors = [d - a for d, a in zip(deltas, arrived, strict=True)]
        self.q = np.mean(qs, axis=0)
        return np.stack([a.reshape(-1)[: x.shape[1]] for a in arrived])


# ---------------------------------------------------------------- the algorithm


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_ten_rounds_with_error_feedback_are_the_papers(name: str, rank: int) -> None:
    feedback, reference = ErrorFeedback(ready(rank), num_devices=3), Reference(name, rank)
    for t in range(10):
        x = rows(3, SHAPES[name].numel(), seed=t, dtype=torch.float64)
        values = feedback(x, key_of(name, round=t)).values.numpy()
        np.testing.assert_allclose(values, reference.step(x.numpy()), rtol=1e-10, atol=1e-10)


def test_without_a_warm_start_each_round_draws_anew() -> None:
    cold, x = ready(warm_start=False), rows(3, 45, dtype=torch.float64)
    first, again, other = (cold.roundtrip(x, key_of("weight", round=t)).values for t in (0, 0, 1))
    assert torch.equal(first, again), "nothing is remembered"
    assert not torch.allclose(first, other)
    warm = ready()
    np.testing.assert_allclose(warm.roundtrip(x, key_of("weight", round=0)).values, first, atol=1e-12)
    late = ready().roundtrip(x, key_of("weight", round=7)).values
    assert torch.equal(late, ready().roundtrip(x, key_of("weight", round=0)).values), "its start is of no round"
    assert not torch.allclose(ready().roundtrip(x, key_of("twin")).values, first), "names draw by themselves"


class Bucket:
    """What DDP hands to a hook, one flat buffer of several gradients."""

    def __init__(self, gradients: list[Tensor]) -> None:
        self.flat = torch.cat([g.reshape(-1) for g in gradients])
        self.shapes = [g.shape for g in gradients]

    def buffer(self) -> Tensor:
        return self.flat

    def gradients(self) -> list[Tensor]:
        parts = self.flat.split([shape.numel() for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def index(self) -> int:
        return 0

    def is_last(self) -> bool:
        return True


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_mean_over_devices_is_what_torchs_hook_makes_of_the_mean(rank: int) -> None:
    shapes = {name: SHAPES[name] for name in ("weight", "twin", "tall", "conv")}
    state = PowerSGDState(None, rank, start_powerSGD_iter=2, min_compression_rate=0)
    state.iter = 2
    feedback = ErrorFeedback(ready(rank, shapes), num_devices=3)
    with torch.random.fork_rng(devices=[]):  # as the hook does for its first Q
        torch.manual_seed(int(np.random.RandomState(0).randint(1_000_000_000)))
        drawn = [torch.randn(1, matrix_shape(s)[1], rank, dtype=torch.float64)[0].T for s in shapes.values()]
    factors = dict(zip(shapes, drawn, strict=True))
    feedback.compressor.set_extra_state({"factors": factors})
    for t in range(10):
        x = {
            name: rows(3, s.numel(), seed=10 * t + i, dtype=torch.float64) for i, (name, s) in enumerate(shapes.items())
        }
        bucket = Bucket([row.mean(0).view(shapes[name]) for name, row in x.items()])
        theirs = powerSGD_hook(state, bucket).wait()
        ours = [feedback(row, key_of(name, round=t), name=name).values.mean(0) for name, row in x.items()]
        torch.testing.assert_close(torch.cat(ours), theirs, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- approximation


@pytest.mark.parametrize(("a", "b"), [(4, 4), (4, 9), (9, 4), (1, 6), (6, 1)])
def test_full_rank_is_exact(a: int, b: int) -> None:
    rank, shape = min(a, b), torch.Size([a, b])
    x = rows(3, a * b, dtype=torch.float64)
    compressor = ready(rank, {"w": shape})
    torch.testing.assert_close(compressor.roundtrip(x[:1], key_of("w", devices=1)).values, x[:1])
    for t in range(3):
        values = compressor.roundtrip(x, key_of("w", round=t)).values
        torch.testing.assert_close(values.sum(0), x.sum(0))
    assert a > b or torch.allclose(values, x), "where P is square, each device's matrix arrives"


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_rounds_on_a_fixed_matrix_converge_to_the_truncated_svd(rank: int) -> None:
    shape, spectrum = torch.Size([30, 20]), 2.0 ** -np.arange(20)
    compressor = ready(rank, {f"w{i}": shape for i in range(3)})
    g = np.random.default_rng(0)
    for i in range(3):  # several of one shape: each has a warm start and a norm of its own
        left, right = (np.linalg.qr(g.standard_normal((n, 20)))[0] for n in (30, 20))
        matrix = 10.0**i * (left * spectrum) @ right.T
        x = torch.from_numpy(matrix.reshape(1, -1))
        sent = [compressor.roundtrip(x, key_of(f"w{i}", round=t, devices=1)).values for t in range(40)]
        errors = [(values - x).norm().item() for values in sent]
        best = 10.0**i * math.sqrt((np.linalg.svd(matrix / 10.0**i)[1][rank:] ** 2).sum())
        assert errors[0] > 1.01 * best, "one round alone is not there"
        assert errors[-1] == pytest.approx(best, rel=1e-9)
        assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(errors))


def test_devices_converge_to_the_svd_of_their_sum() -> None:
    x = rows(3, 30 * 20, dtype=torch.float64)
    compressor = ready(3, {"w": torch.Size([30, 20])})
    for t in range(300):
        values = compressor.roundtrip(x, key_of("w", round=t)).values
    total = x.sum(0).view(30, 20).numpy()
    u, s, vt = np.linalg.svd(total, full_matrices=False)
    np.testing.assert_allclose(values.sum(0).view(30, 20).numpy(), (u[:, :3] * s[:3]) @ vt[:3], rtol=1e-6, atol=1e-6)
    for row, sent in zip(x.view(3, 30, 20).numpy(), values.view(3, 30, 20).numpy(), strict=True):
        np.testing.assert_allclose(sent, u[:, :3] @ u[:, :3].T @ row, rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    a=st.integers(1, 9),
    b=st.integers(1, 9),
    rank=st.integers(1, 4),
    seed=st.integers(0, 999),
    devices=st.integers(1, 3),
)
def test_what_arrives_is_a_projection_of_rank_r(a: int, b: int, rank: int, seed: int, devices: int) -> None:
    rank, shape = min(rank, a, b), torch.Size([a, b])
    x = rows(devices, a * b, seed=seed, dtype=torch.float64).round()  # often of low rank, often zero
    compressor = ready(rank, {"w": shape})
    for t in range(2):
        values = compressor.roundtrip(x, key_of("w", round=t, devices=devices)).values
        for row, sent in zip(x.view(-1, a, b), values.view(-1, a, b), strict=True):
            assert torch.linalg.matrix_rank(sent, rtol=1e-9) <= rank
            torch.testing.assert_close((sent * (row - sent)).sum(0), torch.zeros(b).double(), rtol=0, atol=1e-8)


def test_with_error_feedback_devices_that_disagree_descend_as_without_compression() -> None:
    g = torch.Generator().manual_seed(0)
    target = torch.randn(4, 8, 6, generator=g, dtype=torch.float64)
    data = torch.randn(4, 20, 6, generator=g, dtype=torch.float64)
    hessians = data.mT @ data / 20

    def gradient(w: Tensor) -> Tensor:  # of the device's mean square error
        return (w - target) @ hessians

    best = torch.linalg.solve(hessians.sum(0), (target @ hessians).sum(0).T).T

    def distance(kind: str) -> float:
        compressor = ready(1, {"w": torch.Size([8, 6])})
        feedback, w = ErrorFeedback(compressor, num_devices=4), torch.zeros(8, 6, dtype=torch.float64)
        for t in range(200):
            update, key = gradient(w).flatten(1), key_of("w", round=t, devices=4)
            if kind != "dense":
                update = (feedback if kind == "feedback" else compressor.roundtrip)(update, key).values
            w -= 0.1 * update.mean(0).view(8, 6)
        return float((w - best).norm() / best.norm())

    dense = distance("dense")
    assert dense < 1e-4
    assert distance("feedback") < 1.1 * dense
    assert distance("rank 1 alone") > 100 * dense


# ---------------------------------------------------------------- protocol


@pytest.mark.parametrize("name", [*SHAPES, "never set up"])
def test_processes_that_agree_equal_the_simulation(name: str) -> None:
    numel = SHAPES[name].numel() if name in SHAPES else 37
    together, processes = ready(), [ready() for _ in range(3)]
    for t in range(4):
        x, key = rows(3, numel, seed=t, dtype=torch.float64), key_of(name, round=t)
        payload = together.encode(x, key)
        proposals = [c.propose(x[i : i + 1], key.row(i)) for i, c in enumerate(processes)]
        agreed = torch.stack(proposals).sum(0)
        sent = [c.encode_agreed(x[i : i + 1], key.row(i), agreed) for i, c in enumerate(processes)]
        total = replace(sent[0], parts={"q": torch.stack([s.parts["q"] for s in sent]).sum(0)})
        for c in processes:
            c.settle(total, key, 3)
        assert set(payload.parts) == {"p", "q"}
        assert set(sent[0].parts) == {"q"}, "the driver counts what it sums"
        torch.testing.assert_close(torch.cat(proposals), payload.parts["p"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.cat([s.parts["q"] for s in sent]), payload.parts["q"], rtol=1e-9, atol=1e-9)
        decoded, message = together.decode(payload), together.roundtrip(x, key)
        assert torch.equal(message.values, decoded)
        alone = torch.cat([c.decode(s) for c, s in zip(processes, sent, strict=True)])
        torch.testing.assert_close(alone, decoded, rtol=1e-9, atol=1e-9)
        states = [c.get_extra_state()["factors"][name] for c in processes]
        assert all(torch.equal(states[0], state) for state in states), "replicas stay equal to the bit"


def test_payloads_add() -> None:
    compressor = ready()
    assert compressor.linear
    assert not compressor.unbiased
    assert compressor.alpha(45) is None
    for name, shape in SHAPES.items():
        x = rows(3, shape.numel(), dtype=torch.float64)
        payload = compressor.encode(x, key_of(name))
        total = replace(payload, parts={part: v.sum(0, keepdim=True) for part, v in payload.parts.items()})
        torch.testing.assert_close(compressor.decode(total)[0], compressor.decode(payload).sum(0))
        torch.testing.assert_close(compressor.decode_sum(payload), compressor.decode(total))


@pytest.mark.parametrize("dtype", DTYPES)
def test_wire(dtype: torch.dtype) -> None:
    for name, shape in SHAPES.items():
        compressor, x, key = ready(), rows(3, shape.numel(), dtype=dtype), key_of(name)
        before, rng = x.clone(), torch.get_rng_state()
        payload = compressor.encode(x.requires_grad_(), key)
        decoded = compressor.decode(payload)
        assert torch.equal(x, before)
        assert torch.equal(torch.get_rng_state(), rng)
        assert not decoded.requires_grad
        assert decoded.dtype == dtype
        assert decoded.shape == x.shape
        size, numbers = max(x.element_size(), 4), compressor.payload_numel(shape)
        assert numbers == 2 * sum(as_matrix(np.zeros(shape.numel()), tuple(shape)).shape)
        assert payload.bits_wire == payload.bits_ideal == 3 * 8 * size * numbers
        message = compressor.roundtrip(x, key)
        assert (message.bits_wire, message.bits_ideal) == (payload.bits_wire, payload.bits_ideal)
        proposed = ready().propose(x, key)
        assert (
            proposed.shape[1] * 3 * 8 * size + ready().encode_agreed(x, key, proposed.sum(0)).bits_wire
            == payload.bits_wire
        )
        file = io.BytesIO()
        torch.save(payload.parts, file)
        file.seek(0)
        assert torch.equal(compressor.decode(replace(payload, parts=torch.load(file, weights_only=True))), decoded)
        wide = ready().roundtrip(x.detach().double(), key).values
        tolerance = 1e-12 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
        assert (decoded.double() - wide).norm() <= tolerance * wide.norm()


def test_rows_may_be_a_slice_of_the_whole_models() -> None:
    whole = rows(3, 100, dtype=torch.float64)
    part = whole[:, 10:55]
    expected = ready().roundtrip(part.contiguous(), key_of("weight")).values
    torch.testing.assert_close(ready().roundtrip(part, key_of("weight")).values, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("rank", "numel"), [(1, 20), (4, 20), (5, 20), (5, 24), (5, 25)])
def test_low_rank_is_the_product(rank: int, numel: int) -> None:
    p, q = (
        rows(rank, -(-numel // 5), dtype=torch.float64),
        rows(2 * rank, 5, seed=1, dtype=torch.float64).view(2, rank, 5),
    )
    expected = np.einsum("ra,mrb->mab", p.numpy(), q.numpy()).reshape(2, -1)[:, :numel]
    np.testing.assert_allclose(low_rank(p, q, numel).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((), (1, 1)),
        ((1,), (1, 1)),
        ((2,), (1, 2)),
        ((5,), (2, 3)),
        ((17,), (4, 5)),
        ((3, 4), (3, 4)),
        ((8, 3, 5, 5), (8, 75)),
        ((0, 4), (0, 0)),
        ((3, 0), (0, 0)),
    ],
)
def test_matrix_shape(shape: tuple[int, ...], expected: tuple[int, int]) -> None:
    assert matrix_shape(shape) == expected
    assert PowerSGD(rank=3).payload_numel(shape) == 3 * sum(expected)


@settings(deadline=None)
@given(shape=st.lists(st.integers(0, 12), max_size=4), rank=st.integers(1, 4))
def test_it_is_worth_while_where_fewer_numbers_travel_and_only_where_the_rank_fits(shape: list[int], rank: int) -> None:
    compressor, size = PowerSGD(rank), torch.Size(shape)
    a, b = as_matrix(np.zeros(size.numel()), tuple(shape)).shape if size.numel() else (0, 0)
    assert compressor.is_worthwhile(size) == (rank * (a + b) < size.numel())
    if compressor.is_worthwhile(size):
        compressor.setup({"w": size})


def test_price_is_near_the_tail_of_the_spectrum_and_changes_nothing() -> None:
    x, shape = rows(1, 40 * 30, dtype=torch.float64), torch.Size([40, 30])
    spectrum = np.linalg.svd(x.view(40, 30).numpy())[1]
    for rank in (1, 2, 4, 8):
        compressor, twin = ready(rank, {"w": shape}), ready(rank, {"w": shape})
        error, bits = compressor.price(x, key_of("w", devices=1))
        tail = math.sqrt((spectrum[rank:] ** 2).sum())
        assert tail <= error <= 1.03 * tail
        assert bits == 64 * rank * 70
        assert compressor.get_extra_state() == {"factors": {}}
        for c in (compressor, twin):
            c.roundtrip(x, key_of("w", devices=1))
        compressor.price(x + 1, key_of("w", devices=1))
        states = [c.get_extra_state()["factors"]["w"] for c in (compressor, twin)]
        assert torch.equal(*states)
        cold = ready(rank, {"w": shape}, warm_start=False)
        values = cold.roundtrip(x, key_of("w", devices=1)).values
        assert cold.price(x, key_of("w", devices=1))[0] == pytest.approx((values - x).norm().item())


@given(numel=st.integers(1, 10_000))
def test_vectors_waste_less_than_a_row(numel: int) -> None:
    a, b = matrix_shape((numel,))
    assert (a - 1) * b < numel <= a * b
    assert a in (b - 1, b)


# ---------------------------------------------------------------- orthonormal bases


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(1, 12),
    r=st.integers(1, 5),
    inner=st.integers(0, 5),
    seed=st.integers(0, 999),
    exponent=st.integers(-38, 37),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_orthonormalize_at_any_rank_and_scale(
    n: int, r: int, inner: int, seed: int, exponent: int, dtype: torch.dtype
) -> None:
    r, g = min(r, n), torch.Generator().manual_seed(seed)
    low = torch.randn(r, inner, generator=g, dtype=torch.float64) @ torch.randn(
        inner, n, generator=g, dtype=torch.float64
    )
    x = (10.0**exponent * low).to(dtype).clamp(-1e38, 1e38)
    basis = orthonormalize(x)
    accuracy = 50 * torch.finfo(dtype).eps
    torch.testing.assert_close(basis @ basis.T, torch.eye(r, dtype=dtype), rtol=0, atol=accuracy)
    wide, basis = x.double(), basis.double()
    lost = wide - wide @ basis.T @ basis
    assert (lost.norm(dim=1) <= 2 * accuracy * math.sqrt(n) * wide.norm(dim=1)).all(), "it spans them"


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_orthonormalize_hides_nothing(poison: float) -> None:
    x = rows(3, 7)
    x[1, 2] = poison
    assert orthonormalize(x).isnan().all()


# ---------------------------------------------------------------- odd rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_zeros_and_constants(name: str, dtype: torch.dtype) -> None:
    compressor, numel = ready(), SHAPES[name].numel()
    compressor.roundtrip(torch.zeros(3, numel, dtype=dtype), key_of(name))
    start = compressor.get_extra_state()["factors"][name].clone()
    for t in range(3):
        values = compressor.roundtrip(torch.zeros(3, numel, dtype=dtype), key_of(name, round=t)).values
        assert torch.equal(values, torch.zeros(3, numel, dtype=dtype))
    torch.testing.assert_close(compressor.get_extra_state()["factors"][name].abs(), start.abs())
    constant = torch.full((3, numel), 2.0, dtype=dtype)  # of rank 1, or 2 where the last row is short
    for t in range(3):
        values = compressor.roundtrip(constant, key_of(name, round=t)).values
        torch.testing.assert_close(values, constant, rtol=max(1e-5, 2 * torch.finfo(dtype).eps), atol=0)


def test_zero_gradients_do_not_leave_it_blind() -> None:
    x = torch.zeros(1, 6, 8, dtype=torch.float64)
    compressor, key = ready(2, {"w": torch.Size([6, 8])}), key_of("w", devices=1)
    for _ in range(3):
        compressor.roundtrip(x.flatten(1), key)
    x[:, 2:, 2:] = rows(4, 6, dtype=torch.float64)  # the first rows and columns stay zero
    for _ in range(60):
        values = compressor.roundtrip(x.flatten(1), key).values
    best = np.sqrt((np.linalg.svd(x[0].numpy())[1][2:] ** 2).sum())
    assert (values - x.flatten(1)).norm().item() == pytest.approx(best, rel=1e-3)


def test_opposite_devices_cancel() -> None:
    x = rows(1, 45, dtype=torch.float64)
    values = ready().roundtrip(torch.cat([x, -x]), key_of("weight", devices=2)).values
    assert values.isfinite().all()
    torch.testing.assert_close(values.sum(0), torch.zeros(45, dtype=torch.float64))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_what_is_not_finite_reaches_everyone_once(name: str, dtype: torch.dtype, poison: float) -> None:
    numel = SHAPES[name].numel()
    for first in (True, False):  # before and after there is a warm start
        compressor, clean = ready(), ready()
        assert compressor.carries_nan
        if not first:
            for c in (compressor, clean):
                c.roundtrip(rows(3, numel, dtype=dtype), key_of(name))
        for where in (0, numel // 2, numel - 1):
            x = rows(3, numel, seed=1, dtype=dtype)
            x[1, where] = poison
            assert compressor.roundtrip(x, key_of(name, round=1)).values.isnan().all()
        x = rows(3, numel, seed=2, dtype=dtype)
        after = compressor.roundtrip(x, key_of(name, round=2)).values
        assert after.isfinite().all()
        assert torch.equal(after, clean.roundtrip(x, key_of(name, round=2)).values), "the warm start is as it was"


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_scales_round_after_round(scale: float) -> None:
    plain, scaled = ready(), ready()
    for t in range(4):
        x = torch.randn(3, 45, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        expected = plain.roundtrip(x, key_of("weight", round=t)).values
        values = scaled.roundtrip((scale * x).float(), key_of("weight", round=t)).values.double() / scale
        torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-4)


def test_no_rows_and_no_entries() -> None:
    compressor = ready(2, {"empty": torch.Size([0, 4]), "weight": torch.Size([5, 9])})
    payload = compressor.encode(torch.zeros(2, 0), key_of("empty", devices=2))
    assert payload.bits_wire == payload.bits_ideal == 0
    assert compressor.decode(payload).shape == (2, 0)
    assert compressor.roundtrip(torch.zeros(2, 0), key_of("", devices=2)).values.shape == (2, 0)
    agreed = compressor.propose(torch.zeros(2, 0), key_of("empty", devices=2)).sum(0)
    assert compressor.encode_agreed(torch.zeros(2, 0), key_of("empty", devices=2), agreed).bits_wire == 0
    none = compressor.roundtrip(torch.zeros(0, 45), key_of("weight", devices=0))
    assert none.values.shape == (0, 45)
    assert none.bits_wire == 0


# ---------------------------------------------------------------- state


def test_saved_and_restored_it_goes_on_to_the_bit() -> None:
    def go(compressor: PowerSGD, rounds: range) -> list[Tensor]:
        return [
            compressor.roundtrip(rows(3, s.numel(), seed=t), key_of(name, round=t)).values
            for t in rounds
            for name, s in SHAPES.items()
        ]

    whole = ready()
    expected = go(whole, range(6))
    first, file = ready(), io.BytesIO()
    go(first, range(3))
    torch.save(first.state_dict(), file)
    go(first, range(3, 5))  # the saved state is not the live one
    file.seek(0)
    second = ready()
    second.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(go(second, range(3, 6)), expected[3 * len(SHAPES) :], strict=True))
    assert not torch.equal(go(ready(), range(3, 6))[0], expected[3 * len(SHAPES)]), "the state matters"
    second.reset_state()
    assert second.get_extra_state() == {"factors": {}}
    assert all(torch.equal(a, b) for a, b in zip(go(second, range(6)), expected, strict=True))


def test_state_moves_with_the_module_and_follows_the_rows() -> None:
    compressor, x = ready(), rows(3, 45)
    compressor.roundtrip(x, key_of("weight"))
    nested = torch.nn.ModuleList([compressor])
    nested.half()
    assert compressor.get_extra_state()["factors"]["weight"].dtype == torch.float32, "it never falls below float32"
    compressor.roundtrip(x.double(), key_of("weight"))
    assert compressor.get_extra_state()["factors"]["weight"].dtype == torch.float64
    nested.to("meta")
    assert compressor.get_extra_state()["factors"]["weight"].device.type == "meta"
    assert not list(compressor.parameters())


# ---------------------------------------------------------------- refusals


def test_ranks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="`rank` must be at least 1, got 0"):
        PowerSGD(rank=0)
    for shape, text in (
        ((3, 8), r"'w' of shape \(3, 8\) is a 3 x 8 matrix .* can be 1 to 3 there, got 4"),
        ((10, 3, 1, 1), r"'w' of shape \(10, 3, 1, 1\) is a 10 x 3 matrix .* can be 1 to 3 there, got 4"),
        ((9,), r"'w' of shape \(9,\) is a 3 x 3 matrix .* can be 1 to 3 there, got 4"),
    ):
        with pytest.raises(ValueError, match=text):
            PowerSGD(rank=4).setup({"good": torch.Size([4, 4]), "w": torch.Size(shape)})
    with pytest.raises(ValueError, match=r"A tensor without a name of shape \(9,\) .* got 4"):
        PowerSGD(rank=4).roundtrip(torch.zeros(1, 9), key_of(devices=1))
    PowerSGD(rank=4).setup({"w": torch.Size([4, 4]), "v": torch.Size([16]), "empty": torch.Size([0, 2])})


def test_other_bad_input_by_message() -> None:
    compressor = ready()
    with pytest.raises(RuntimeError, match=r"'weight' was set up with shape \(5, 9\), but rows of 44 entries came"):
        compressor.propose(torch.zeros(3, 44), key_of("weight"))
    compressor.roundtrip(torch.ones(3, 30), key_of())
    with pytest.raises(RuntimeError, match=r"the warm start is of rank 2 for 6 columns, but rank 2 for 7 is wanted"):
        compressor.roundtrip(torch.ones(3, 44), key_of())
    with pytest.raises(ValueError, match="Got 3 rows, but the key names 2 devices"):
        compressor.encode(torch.zeros(3, 45), key_of("weight", devices=2))
    with pytest.raises(TypeError, match="real floating dtype"):
        compressor.propose(torch.zeros(3, 45, dtype=torch.int64), key_of("weight"))
    other = PowerSGD(rank=1)
    other.set_extra_state(compressor.get_extra_state())
    with pytest.raises(RuntimeError, match="the warm start is of rank 2 for 6 columns, but rank 1 for 6 is wanted"):
        other.roundtrip(torch.ones(3, 30), key_of())


def test_built_from_yaml() -> None:
    parser = ArgumentParser()
    parser.add_argument("--compressor", type=Compressor)
    text: Any = (
        "{class_path: groundwire.plugins.compression.powersgd.PowerSGD, init_args: {rank: 3, warm_start: false}}"
    )
    built = parser.instantiate(parser.parse_string(f"compressor: {text}")).compressor
    assert repr(built) == "PowerSGD(rank=3, warm_start=False)"
