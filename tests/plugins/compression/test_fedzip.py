"""FedZip against loops, scikit-learn's and the best k-means, a textbook Huffman code, and a bit by bit reader."""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jsonargparse import ArgumentParser
from sklearn.cluster import KMeans

from groundwire.plugins.compression import Compressor
from groundwire.plugins.compression.fedzip import (
    ENCODINGS,
    FedZip,
    decode_positions,
    encode_positions,
    encoded_bytes,
    three_means,
)
from helpers.compressors import check_compressor, key, rows

Sets = tuple[np.ndarray, np.ndarray]


def fedzip(row: np.ndarray, density: float, iterations: int = 20) -> np.ndarray:
    """The steps one by one, on the row with its zeros."""
    k = max(1, round(density * len(row)))
    kept = np.argsort(-np.abs(row), kind="stable")[:k]
    pruned = np.zeros_like(row)
    pruned[kept] = row[kept]
    low, high = pruned.min(), pruned.max()
    centroids = [low, (low + high) / 2, high]
    for _ in range(iterations):
        cluster = [int(np.argmin([abs(v - c) for c in centroids])) for v in pruned]
        members = [[v for v, j in zip(pruned, cluster, strict=True) if j == c] for c in range(3)]
        centroids = [math.fsum(m) / len(m) if m else c for m, c in zip(members, centroids, strict=True)]
    if k < len(row):
        centroids[cluster[next(j for j in range(len(row)) if j not in kept)]] = 0.0
    return np.array([np.float32(centroids[j]) for j in cluster], dtype=np.float64)


@pytest.mark.parametrize("density", [0.2, 0.7, 1.0])
def test_shared_checks(density: float) -> None:
    check_compressor(lambda: FedZip(density), definition=lambda row: fedzip(row, density), wire_bits=None)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_shared_checks_of_each_encoding(encoding: Any) -> None:
    check_compressor(lambda: FedZip(0.3, encoding), definition=lambda row: fedzip(row, 0.3), wire_bits=None)


# ---------------------------------------------------------------- k-means


def cost(values: np.ndarray, cuts: np.ndarray, centroids: np.ndarray) -> float:
    return float(np.square(values - centroids[(values[:, None] > cuts).sum(1)]).sum())


def least_cost(values: np.ndarray) -> float:
    """Of all ways to cut the sorted numbers twice: the best clusters are intervals."""
    ordered = np.sort(values)
    sums, squares = (np.concatenate([[0.0], np.cumsum(ordered**p)]) for p in (1, 2))

    def spread(start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        size = np.maximum(stop - start, 1)
        return np.where(stop >= start, squares[stop] - squares[start] - (sums[stop] - sums[start]) ** 2 / size, np.inf)

    first, second = np.meshgrid(*[np.arange(len(ordered) + 1)] * 2, indexing="ij")
    return float(
        (spread(0 * first, first) + spread(first, second) + spread(second, np.full_like(first, len(ordered)))).min()
    )


def pruned_gaussian(density: float, seed: int, n: int = 600) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=n)
    values[np.argsort(np.abs(values))[: n - round(density * n)]] = 0
    return values


@pytest.mark.parametrize("density", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_cost_is_within_5_percent_of_the_best_clusters(density: float, seed: int) -> None:
    values = pruned_gaussian(density, seed)
    kept = values[values != 0]
    best = least_cost(values)
    assert best <= cost(values, *three_means(kept, len(values) - len(kept))) * (1 + 1e-9) <= 1.05 * best
    if density == 1.0:  # where the first step alone does not do
        assert cost(values, *three_means(kept, max_iterations=1)) > 1.05 * best


@pytest.mark.parametrize("seed", range(5))
def test_clusters_are_those_of_scikit_learn(seed: int) -> None:
    values = pruned_gaussian(0.3, seed)
    low, high = values.min(), values.max()
    theirs = KMeans(
        3, init=np.array([[low], [(low + high) / 2], [high]]), n_init=1, tol=0, max_iter=1000, algorithm="lloyd"
    )
    kept = values[values != 0]
    cuts, centroids = three_means(kept, len(values) - len(kept), max_iterations=1000)
    np.testing.assert_array_equal((values[:, None] > cuts).sum(1), theirs.fit_predict(values[:, None]))
    np.testing.assert_allclose(centroids, theirs.cluster_centers_[:, 0], rtol=1e-9, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float32, st.integers(0, 12), elements=st.floats(-8, 8, width=16)), st.integers(0, 4))
def test_zeros_that_are_counted_are_zeros_that_are_there(values: np.ndarray, zeros: int) -> None:
    if len(values) + zeros == 0:
        return
    cuts, centroids = three_means(values, zeros)
    assert (np.diff(cuts) >= 0).all()
    assert (np.diff(centroids) >= 0).all()
    explicit = three_means(np.concatenate([values, np.zeros(zeros)]))
    np.testing.assert_allclose(cuts, explicit[0], atol=1e-12)
    np.testing.assert_allclose(centroids, explicit[1], atol=1e-12)


@pytest.mark.parametrize("pair", [(0.1, -0.7), (0.3, 0.1), (-1e30, 1e-30), (1e-40, -1e-40), (0.0, 5.0)])
@pytest.mark.parametrize("d", [1, 2, 7, 1024, 4099])
def test_up_to_two_values_arrive_exactly(pair: tuple[float, float], d: int) -> None:
    x = torch.tensor(pair, dtype=torch.float32)[torch.arange(d) * 7 % 13 % 2][None]
    assert torch.equal(FedZip(density=1.0).roundtrip(x, key(1)).values, x)


def test_never_farther_from_the_row_than_zero() -> None:
    x = torch.cat([torch.tensor([4.1]), torch.full((499,), 1.0), torch.full((500,), -0.999)])[None]
    values = FedZip(density=0.5).roundtrip(x, key(1)).values
    assert (values - x).square().sum() <= x.square().sum()
    cuts, centroids = three_means(x[0, :500].double().numpy(), zeros=500)  # its mean would be added to what was pruned
    whole_means = torch.from_numpy(centroids[(x[0].clamp(min=0).numpy()[:, None] > cuts).sum(1)])
    assert (whole_means - x[0]).square().sum() > 1.2 * x.square().sum()
    for seed in range(50):
        for density in (0.05, 0.5, 1.0):
            x = rows(1, 40, seed=seed)
            values = FedZip(density).roundtrip(x, key(1)).values
            assert (values - x).square().sum() <= x.square().sum() * (1 + 1e-6)
            assert density == 1.0 or not values[0][x[0].abs().argsort()[: 40 - round(40 * density)]].any(), (
                "stays sparse"
            )


# ---------------------------------------------------------------- codes


def read(code: bytes, numel: int) -> Sets:
    """Bit by bit, as the format is written down."""
    encoding, body = ENCODINGS[code[0]], code[1:]

    def bits(stream: bytes) -> Iterator[int]:
        return (byte >> i & 1 for byte in stream for i in range(8))

    def integer(stream: Iterator[int], width: int) -> int:
        return sum(next(stream) << i for i in range(width))

    sets: tuple[list[int], list[int]] = ([], [])
    if encoding == "huffman":
        stream = bits(body)
        marked = [j for j in range(numel) if next(stream)]
        for j in marked:
            sets[next(stream)].append(j)
    else:
        sizes = [int.from_bytes(body[i : i + 4], "little") for i in (0, 4)]
        stream = bits(body[8:] if encoding == "positions" else body[10:])
        for chosen, size, width in zip(sets, sizes, body[8:10], strict=True) if encoding == "gaps" else ():
            remainders = [integer(stream, width) for _ in range(size)]
            position = -1
            for remainder in remainders:
                quotient = 0
                while not next(stream):
                    quotient += 1
                position += 1 + (quotient << width) + remainder
                chosen.append(position)
        for chosen, size in zip(sets, sizes, strict=True) if encoding == "positions" else ():
            chosen += [integer(stream, max(1, math.ceil(math.log2(numel)))) for _ in range(size)]
    rest = list(stream)
    assert len(rest) < 8, "no byte too many"
    assert not any(rest)
    return np.array(sets[0], dtype=int), np.array(sets[1], dtype=int)


@settings(max_examples=150, deadline=None)
@given(
    numel=st.integers(1, 400),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 1000),
    encoding=st.sampled_from([*ENCODINGS, "auto"]),
)
def test_every_code_can_be_read(numel: int, shares: tuple[float, float], seed: int, encoding: Any) -> None:
    draw = np.random.default_rng(seed).random(numel)
    first, second = (
        np.flatnonzero(draw < shares[0] ** 3),
        np.flatnonzero(draw > 1 - (1 - shares[0] ** 3) * shares[1] ** 3),
    )
    code = encode_positions(first, second, numel, encoding)
    assert len(code) == encoded_bytes(first, second, numel, encoding)
    for one, again in zip((first, second), decode_positions(code, numel), strict=True):
        np.testing.assert_array_equal(one, again)
    if len(first) + len(second) == 0:
        assert code == b""
        return
    for one, again in zip((first, second), read(code, numel), strict=True):
        np.testing.assert_array_equal(one, again)
    if encoding == "auto":
        assert len(code) == min(len(encode_positions(first, second, numel, each)) for each in ENCODINGS)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=3, max_size=3))
def test_huffman_takes_as_many_bits_as_a_huffman_tree(counts: list[int]) -> None:
    most, *fewer = sorted(counts, reverse=True)
    heap, bits = sorted(counts), 0
    while len(heap) > 1:  # merging the two rarest adds a bit to each of their members
        bits += (merged := heapq.heappop(heap) + heapq.heappop(heap))
        heapq.heappush(heap, merged)
    first, second = np.arange(fewer[0]), np.arange(fewer[0], sum(fewer))
    assert len(encode_positions(first, second, sum(counts), "huffman")) == 1 + math.ceil(bits / 8)
    assert bits == most + 2 * sum(fewer)  # the lengths 1, 2, 2: 1/2 + 1/4 + 1/4 = 1; (2, 1, 1) would be no code


def test_each_code_is_the_shortest_somewhere() -> None:
    some = np.random.default_rng(0).permutation(100_000)
    found = {}
    for size in (1, 2000, 33_000):
        first, second = np.sort(some[:size]), np.sort(some[size : 2 * size])
        found[size] = ENCODINGS[encode_positions(first, second, 100_000)[0]]
    assert found == {1: "positions", 2000: "gaps", 33_000: "huffman"}


@pytest.mark.parametrize("density", [0.001, 0.01, 0.05])
def test_gaps_are_close_to_the_entropy(density: float) -> None:
    n = 200_000
    draw = np.random.default_rng(1).random(n)
    first, second = np.flatnonzero(draw < density), np.flatnonzero(draw > 1 - density)
    sizes = [len(first), len(second), n - len(first) - len(second)]
    entropy = -sum(size * math.log2(size / n) for size in sizes)
    assert (
        entropy < 8 * encoded_bytes(first, second, n, "gaps") < 88 + 1.06 * entropy
    )  # 11 bytes name and size the code


# ---------------------------------------------------------------- payloads


def test_parts_and_padding_of_rows_of_different_lengths() -> None:
    x = rows(4, 3000)
    x[1] = 0
    x[2] = 1.5
    x[3, 7] = math.nan
    payload = FedZip(density=0.1).encode(x, key(4))
    lengths = payload.parts["length"].flatten().tolist()
    assert payload.parts["length"].dtype == torch.int32
    assert payload.parts["stream"].shape == (4, max(lengths))
    assert lengths[1] == lengths[3] == 0, "one cluster, or none: the header is all"
    assert lengths[0] != lengths[2]
    assert payload.padding_bytes == 4 * max(lengths) - sum(lengths)
    assert payload.bits_wire == 8 * (4 * 16 + sum(lengths))
    assert payload.parts["means"][3].isnan().all()
    values = FedZip().decode(payload)
    assert values[3].isnan().all()
    assert values[1].eq(0).all()
    assert values[2].unique().tolist() == [0.0, 1.5]


def test_means_come_by_falling_size_of_their_clusters() -> None:
    x = torch.tensor([[-5.0] + 3 * [0.0] + 2 * [5.0] + [0.0], [-5.0] * 4 + [5.0] * 2 + [0.0]])
    payload = FedZip(density=6 / 7, encoding="huffman").encode(x, key(2))
    assert payload.parts["means"].tolist() == [[0, 5, -5], [-5, 5, 0]]
    assert payload.parts["stream"].tolist() == [[0, 0b1_0110001, 0b00], [0, 0b0_1110000, 0b10]]


def test_ideal_bits_are_the_means_and_the_number_among_all_clusterings() -> None:
    payload = FedZip(density=3 / 7).encode(torch.tensor([[-5.0, 0, 0, 0, 5.0, 5.0, 0]]), key(1))
    clusterings = math.factorial(7) // (math.factorial(4) * math.factorial(2))
    assert payload.bits_ideal == pytest.approx(96 + math.log2(clusterings), abs=1e-9)


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_huge_and_tiny_rows_are_scaled_rows(scale: float) -> None:
    x = rows(2, 1024, dtype=torch.float64)
    expected = FedZip(0.1).roundtrip(x, key(2)).values
    for dtype in (torch.float64, torch.float32):
        values = FedZip(0.1).roundtrip((x * scale).to(dtype), key(2)).values
        torch.testing.assert_close(values.double() / scale, expected, rtol=1e-5, atol=0)


def test_what_float32_cannot_hold_arrives_as_nan() -> None:
    x = torch.full((1, 9), 1e300, dtype=torch.float64)
    assert FedZip().roundtrip(x, key(1)).values.isnan().all()
    assert not FedZip().roundtrip(x * 0 + 1e-300, key(1)).values.any()


def test_foreign_payloads_are_refused() -> None:
    x = rows(1, 500)
    for encoding in ENCODINGS:
        compressor = FedZip(0.3, encoding)
        payload = compressor.encode(x, key(1))
        good, length = payload.parts["stream"], payload.parts["length"]
        for cut in (1, 5, 10, int(length) - 1):
            parts = {**payload.parts, "length": torch.full_like(length, cut)}
            with pytest.raises(ValueError, match=f"{cut} bytes are not a code of clusters of 500 entries"):
                compressor.decode(dataclasses.replace(payload, parts=parts))
        unknown = good.index_fill(1, torch.tensor([0]), 3)
        with pytest.raises(ValueError, match="bytes are not a code of clusters of 500 entries"):
            compressor.decode(dataclasses.replace(payload, parts={**payload.parts, "stream": unknown}))
        with pytest.raises(ValueError, match="bytes are not a code of clusters of 90 entries"):
            compressor.decode(dataclasses.replace(payload, numel=90))


# ---------------------------------------------------------------- building, bad input


def test_built_from_yaml() -> None:
    parser = ArgumentParser()
    parser.add_argument("--compressor", type=Compressor)
    text = "compressor: {class_path: groundwire.plugins.compression.fedzip.FedZip, init_args: {density: 0.1, encoding: gaps}}"
    expected = "FedZip(density=0.1, encoding='gaps', max_iterations=20)"
    assert repr(parser.instantiate(parser.parse_string(text)).compressor) == expected


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FedZip(0.0), r"`density` must be in \(0, 1\], got 0.0"),
        (lambda: FedZip(1.5), r"`density` must be in \(0, 1\], got 1.5"),
        (lambda: FedZip(encoding="zip"), r"`encoding` must be 'auto' or one of \('huffman', 'positions', 'gaps'\), got 'zip'"),
        (lambda: FedZip(max_iterations=0), "`max_iterations` must be at least 1, got 0"),
        (lambda: FedZip().encode(torch.zeros(3), key(3)), r"Expected rows of shape \(rows, d\)"),
        (lambda: FedZip().roundtrip(torch.zeros(3, 2), key(2)), "Got 3 rows, but the key names 2 devices"),
    ],
)  # fmt: skip
def test_bad_input_by_message(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
