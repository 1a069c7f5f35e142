"""Entropy coders against Huffman's own construction, brute force, and a decoder that reads bit by bit."""

from __future__ import annotations

import heapq
import itertools
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundwire.plugins.compression.entropy_coding import (
    ans_decode,
    ans_encode,
    huffman_code,
    huffman_decode,
    huffman_encode,
    huffman_lengths,
    join_streams,
    model_weights,
    split_streams,
    symbol_bits,
)

CODERS = {"ans": (ans_encode, ans_decode), "huffman": (huffman_encode, huffman_decode)}


def huffman_cost(weights: list[int]) -> int:
    """Total length under Huffman's code: the sum of all merged weights."""
    heap, cost = list(weights), 0
    heapq.heapify(heap)
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        cost += merged
        heapq.heappush(heap, merged)
    return cost


def bit_by_bit(stream: np.ndarray, count: int, weights: tuple[int, ...]) -> list[int]:
    """Decode with a dictionary of code words."""
    code = huffman_code(weights)
    words = {
        "".join(str(int(bits) >> i & 1) for i in range(size)): symbol
        for symbol, (size, bits) in enumerate(zip(code.lengths, code.codes, strict=True))
    }
    out, word = [], ""
    for bit in np.unpackbits(stream, bitorder="little"):
        word += str(bit)
        if word in words:
            out.append(words[word])
            word = ""
        if len(out) == count:
            break
    return out


def a_model(rng: np.random.Generator, num_symbols: int) -> tuple[int, ...]:
    pmf = rng.dirichlet(np.full(num_symbols, 0.3))
    return model_weights(pmf / pmf.sum())


# ---------------------------------------------------------------- Huffman's code


@settings(max_examples=100, deadline=None)
@given(weights=st.lists(st.integers(1, 10**6), min_size=2, max_size=256))
def test_lengths_are_as_good_as_huffmans(weights: list[int]) -> None:
    lengths = huffman_lengths(weights, longest=60)
    assert int(lengths @ np.array(weights)) == huffman_cost(weights)
    assert sum(2.0**-length for length in lengths.tolist()) == 1
    p = np.array(weights) / sum(weights)
    entropy = -(p * np.log2(p)).sum()
    assert entropy - 1e-9 <= p @ lengths < entropy + 1


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.integers(1, 1000), min_size=2, max_size=6), longest=st.integers(3, 5))
def test_limited_lengths_are_the_best_of_all(weights: list[int], longest: int) -> None:
    best = min(
        sum(w * length for w, length in zip(sorted(weights, reverse=True), lengths, strict=True))
        for lengths in itertools.combinations_with_replacement(range(1, longest + 1), len(weights))
        if sum(2.0**-length for length in lengths) <= 1  # Kraft
    )
    lengths = huffman_lengths(weights, longest)
    assert lengths.max() <= longest
    assert int(lengths @ np.array(weights)) == best


def test_the_limit_of_16_bits_holds() -> None:
    fibonacci = [1, 1]
    while len(fibonacci) < 30:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    assert huffman_lengths(fibonacci, longest=60).max() == 29
    assert huffman_lengths(fibonacci).max() == 16
    assert sum(2.0**-length for length in huffman_lengths(fibonacci).tolist()) == 1
    symbols = np.arange(30, dtype=np.uint8).repeat(3)
    stream = huffman_encode(symbols, tuple(fibonacci))
    assert bit_by_bit(stream, 90, tuple(fibonacci)) == symbols.tolist()
    np.testing.assert_array_equal(huffman_decode(stream, 90, tuple(fibonacci)), symbols)


def test_no_code_word_begins_another() -> None:
    for seed, num_symbols in enumerate((2, 3, 17, 256)):
        code = huffman_code(a_model(np.random.default_rng(seed), num_symbols))
        words = sorted(f"{int(bits):0{size}b}"[::-1] for size, bits in zip(code.lengths, code.codes, strict=True))
        assert not any(b.startswith(a) for a, b in itertools.pairwise(words))


def test_a_stream_by_hand() -> None:
    weights = model_weights([0.5, 0.25, 0.125, 0.125])  # 0, 10, 110, 111
    stream = huffman_encode(np.array([3, 0, 1, 2, 0], dtype=np.uint8), weights)
    assert np.unpackbits(stream, bitorder="little").tolist() == [1, 1, 1, 0, 1, 0, 1, 1] + [0, 0] + 6 * [0]


@pytest.mark.parametrize("num_symbols", [2, 5, 256])
@pytest.mark.parametrize("count", [1, 2, 63, 1000])
def test_a_stream_read_bit_by_bit(num_symbols: int, count: int) -> None:
    rng = np.random.default_rng(count)
    weights = a_model(rng, num_symbols)
    symbols = rng.integers(0, num_symbols, count).astype(np.uint8)
    stream = huffman_encode(symbols, weights)
    assert bit_by_bit(stream, count, weights) == symbols.tolist()
    assert stream.size == math.ceil(sum(huffman_code(weights).lengths[symbols]) / 8)


# ---------------------------------------------------------------- both coders


@pytest.mark.parametrize("name", CODERS)
@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_symbols=st.sampled_from([1, 2, 3, 8, 255, 256]),
    count=st.integers(0, 300),
    used=st.integers(1, 256),
)
def test_decoding_undoes_encoding(name: str, seed: int, num_symbols: int, count: int, used: int) -> None:
    rng = np.random.default_rng(seed)
    encode, decode = CODERS[name]
    weights = a_model(rng, num_symbols)
    symbols = rng.integers(0, min(used, num_symbols), count).astype(np.uint8)
    stream = encode(symbols, weights)
    assert stream.dtype == np.uint8
    decoded = decode(stream, count, weights)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, symbols)
    if num_symbols == 1:
        assert stream.size == 0


@pytest.mark.parametrize("name", CODERS)
@pytest.mark.parametrize("symbol", [0, 1, 2])
def test_streams_of_one_symbol(name: str, symbol: int) -> None:
    encode, decode = CODERS[name]
    weights = model_weights([0.2, 0.3, 0.5])
    symbols = np.full(5000, symbol, dtype=np.uint8)
    np.testing.assert_array_equal(decode(encode(symbols, weights), 5000, weights), symbols)


def test_ans_comes_within_a_thousandth_of_the_entropy() -> None:
    rng = np.random.default_rng(0)
    for pmf in ([0.05, 0.2, 0.5, 0.2, 0.05], [0.001, 0.998, 0.001], np.full(200, 1 / 200)):
        weights, p = model_weights(np.array(pmf)), np.array(pmf)
        symbols = rng.choice(len(p), size=200_000, p=p).astype(np.uint8)
        bits = 8 * ans_encode(symbols, weights).size
        each = symbol_bits(weights)[symbols]
        assert each.sum() <= bits <= 1.001 * each.sum() + 32
        entropy = -(p * np.log2(p)).sum()
        assert abs(bits / 200_000 - entropy) < 5 * each.std() / math.sqrt(200_000) + 1e-3


def test_huffman_needs_a_bit_where_ans_does_not() -> None:
    weights = model_weights([0.02, 0.96, 0.02])
    symbols = np.random.default_rng(0).choice(3, size=50_000, p=[0.02, 0.96, 0.02]).astype(np.uint8)
    assert 8 * huffman_encode(symbols, weights).size > 50_000
    assert 8 * ans_encode(symbols, weights).size < 0.3 * 50_000


@pytest.mark.parametrize("name", CODERS)
def test_what_was_cut_or_is_foreign_is_refused(name: str) -> None:
    encode, decode = CODERS[name]
    rng = np.random.default_rng(0)
    weights = model_weights([0.1, 0.15, 0.5, 0.15, 0.1])
    symbols = rng.choice(5, size=400, p=[0.1, 0.15, 0.5, 0.15, 0.1]).astype(np.uint8)
    stream = encode(symbols, weights)
    for wrong in (
        stream[:-1],
        stream[: stream.size // 2],
        stream[:0],
        np.append(stream, np.uint8(7)),
        np.append(stream, np.uint8(0)),
    ):
        with pytest.raises(ValueError, match=f"payload of {wrong.size} bytes does not match 400 symbols"):
            decode(wrong, 400, weights)
    for count in (390, 410, 4000):
        with pytest.raises(ValueError, match="does not match"):
            decode(stream, count, weights)
    for seed in range(20):
        with pytest.raises(ValueError, match="does not match"):
            decode(np.random.default_rng(seed).integers(1, 256, 3 * stream.size).astype(np.uint8), 400, weights)
    with pytest.raises(ValueError, match="does not match"):
        decode(stream, 400, (1,))


def test_ans_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "constriction", None)
    weights, symbols = model_weights([0.5, 0.5]), np.zeros(3, dtype=np.uint8)
    with pytest.raises(ModuleNotFoundError, match=r"pip install groundwire\[entropy\]"):
        ans_encode(symbols, weights)
    np.testing.assert_array_equal(huffman_decode(huffman_encode(symbols, weights), 3, weights), symbols)


# ---------------------------------------------------------------- models and rows


def test_models() -> None:
    assert model_weights([1.0]) == (2**24,)
    assert model_weights([0.5, 0.5 - 1e-12, 1e-12]) == (2**23, 2**23, 1)
    np.testing.assert_allclose(symbol_bits(model_weights([0.25, 0.75])), [2, math.log2(4 / 3)], rtol=1e-7)
    noise = 1 + np.array([1, -1, 1]) * 1e-16
    assert model_weights(np.array([0.3, 0.3, 0.4]) * noise) == model_weights([0.3, 0.3, 0.4])
    for pmf, message in (
        ([], "1 to 256 symbols"),
        ([1 / 257] * 257, "1 to 256 symbols"),
        ([0.5, 0.6], "sum to 1"),
        ([-0.5, 1.5], "sum to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            model_weights(pmf)
    with pytest.raises(ValueError, match="serve 1 to 4 symbols"):
        huffman_lengths([1] * 5, longest=2)
    with pytest.raises(ValueError, match="positive integers"):
        huffman_lengths([1, 0])


def test_rows_of_different_lengths() -> None:
    streams = [np.array([1, 2, 3], dtype=np.uint8), np.zeros(0, dtype=np.uint8), np.array([9], dtype=np.uint8)]
    joined, lengths = join_streams(streams)
    assert joined.tolist() == [[1, 2, 3], [0, 0, 0], [9, 0, 0]]
    assert lengths.tolist() == [[3], [0], [1]]
    wider = torch.cat([joined, torch.full((3, 2), 77, dtype=torch.uint8)], dim=1)
    for tensor in (joined, wider):
        for one, other in zip(split_streams(tensor, lengths), streams, strict=True):
            np.testing.assert_array_equal(one, other)
    assert join_streams([])[0].shape == (0, 0)
    with pytest.raises(ValueError, match="do not fit into 3 rows of 2 bytes"):
        split_streams(joined[:, :2], lengths)
    with pytest.raises(ValueError, match="do not fit"):
        split_streams(joined, -lengths)
    with pytest.raises(ValueError, match="do not fit"):
        split_streams(joined[:2], lengths)
