"""Entropy coding of symbol rows under a model that both sides know: asymmetric numeral systems, and Huffman codes."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bytes = NDArray[np.uint8]
Symbols = NDArray[np.uint8]
Weights = tuple[int, ...]

LONGEST = 16
"""Most bits of a Huffman code: one look into a table then decodes all symbols that lie in so many bits."""
PRECISION = 24
"""A model's weights are multiples of two to the minus this."""

_START = np.array(
    [2**PRECISION], dtype=np.uint32
)  # in the coder before a row: it has to come out again, and is not met by chance


def model_weights(pmf: Sequence[float] | NDArray[np.float64]) -> Weights:
    """Round probabilities to positive integers, in units of ``2**-24``.

    Two machines whose logarithms differ in the last bit then still hold the same model. No symbol becomes impossible.

    Args:
        pmf: Probabilities of the symbols ``0 .. N - 1``, at most 256 of them.

    Returns:
        One weight a symbol, at least 1.

    Raises:
        ValueError: If there is no symbol or more than 256, or these are no probabilities.

    Example:
        >>> model_weights([0.25, 0.75, 0.0])
        (4194304, 12582912, 1)
    """
    given = np.asarray(pmf, dtype=np.float64)
    if not 1 <= given.size <= 256:
        raise ValueError(f"A model has 1 to 256 symbols, as each is a byte, got {given.size}.")
    if not (given >= 0).all() or abs(given.sum() - 1) > 1e-6:
        raise ValueError(f"Expected probabilities that sum to 1, got {given.tolist()}.")
    return tuple(np.maximum(np.rint(given * 2**PRECISION), 1).astype(int).tolist())


def symbol_bits(weights: Weights) -> NDArray[np.float64]:
    """What an ideal coder spends on each symbol, ``-log2`` of its share of the weights."""
    share = np.asarray(weights, dtype=np.float64)
    return np.asarray(-np.log2(share / share.sum()))


# ---------------------------------------------------------------- asymmetric numeral systems


def require_constriction() -> Any:
    """The library ``constriction``, imported when first needed.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    try:
        return importlib.import_module("constriction")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "entropy='ans' needs the library constriction: `pip install groundwire[entropy]`. "
            "entropy='huffman' and entropy='fixed' need nothing."
        ) from error


@lru_cache(64)
def _categorical(weights: Weights) -> Any:
    share = np.asarray(weights, dtype=np.float64)
    return require_constriction().stream.model.Categorical(share / share.sum(), perfect=False)


def ans_encode(symbols: Symbols, weights: Weights) -> Bytes:
    """Encode one row by asymmetric numeral systems, about four bytes above the cross-entropy.

    Args:
        symbols: Integers in ``[0, N)``, uint8, shape ``(n,)``.
        weights: The model, one weight a symbol; see :func:`model_weights`.

    Returns:
        The stream, without the zeros at its end; empty for a model of one symbol. The receiver has to know ``n``.

    Raises:
        ModuleNotFoundError: If ``constriction`` is not installed.

    Reference:
        Duda, "Asymmetric numeral systems", 2013, arXiv:1311.2540. Bamler, "Understanding Entropy Coding With
        Asymmetric Numeral Systems (ANS)", 2022, arXiv:2201.01741

    Example:
        >>> weights = model_weights([0.9, 0.1])
        >>> stream = ans_encode(np.array([0, 1] + 98 * [0], dtype=np.uint8), weights)
        >>> ans_decode(stream, 100, weights).nonzero()
        (array([1]),)
    """
    if len(weights) == 1 or symbols.size == 0:
        return np.empty(0, dtype=np.uint8)
    coder = require_constriction().stream.stack.AnsCoder(_START)
    coder.encode_reverse(symbols.astype(np.int32), _categorical(weights))
    stream = coder.get_compressed().astype("<u4", copy=False).view(np.uint8)
    while stream.size and stream[-1] == 0:  # at most three: the last word is never zero
        stream = stream[:-1]
    return np.asarray(stream)


def ans_decode(stream: Bytes, count: int, weights: Weights) -> Symbols:
    """Undo :func:`ans_encode`.

    Args:
        stream: What it made.
        count: Symbols in it.
        weights: The model.

    Returns:
        Symbols, uint8, shape ``(count,)``.

    Raises:
        ValueError: If the stream does not end where its last symbol does: it was cut, or is of another model.
    """
    if len(weights) == 1 or count == 0:
        _refuse(stream.size > 0, stream, "this code", count)
        return np.zeros(count, dtype=np.uint8)
    _refuse(stream.size > 0 and stream[-1] == 0, stream, "this code", count)
    words = np.pad(stream, (0, -stream.size % 4)).view("<u4").astype(np.uint32, copy=False)
    coder = require_constriction().stream.stack.AnsCoder(words)
    symbols = coder.decode(_categorical(weights), count)
    _refuse(not np.array_equal(coder.get_compressed(), _START), stream, "this code", count)
    return np.asarray(symbols.astype(np.uint8))


def _refuse(wrong: bool | np.bool, stream: Bytes, code: str, count: int) -> None:
    if wrong:
        raise ValueError(f"A payload of {stream.size} bytes does not match {count} symbols of {code}.")


# ---------------------------------------------------------------- Huffman codes


def huffman_lengths(weights: Sequence[int], longest: int = LONGEST) -> NDArray[np.int64]:
    """Code lengths of least mean among prefix codes of at most ``longest`` bits, by the package-merge algorithm.

    Where no code of Huffman's would be longer, these are Huffman's.

    Args:
        weights: Positive integers, one a symbol.
        longest: Most bits of a code.

    Returns:
        Bits of each symbol's code, int64; 0 for an only symbol.

    Raises:
        ValueError: If there are more than ``2**longest`` symbols, or a weight is not positive.

    Reference:
        Larmore, Hirschberg, "A Fast Algorithm for Optimal Length-Limited Huffman Codes", J. ACM 37, 1990.

    Example:
        >>> huffman_lengths([5, 1, 1, 2]).tolist()
        [1, 3, 3, 2]
    """
    leaves, n = np.asarray(weights, dtype=np.int64), len(weights)
    if not 1 <= n <= 2**longest:
        raise ValueError(f"Codes of at most {longest} bits serve 1 to {2**longest} symbols, got {n}.")
    if (leaves < 1).any():
        raise ValueError(f"`weights` must be positive integers, got {leaves.min()}.")
    order = np.argsort(leaves, kind="stable")
    leaves = leaves[order]
    packages, are_leaves = leaves[:0], []
    for _ in range(longest):
        items = np.concatenate([leaves, packages])
        merged = np.argsort(items, kind="stable")
        are_leaves.append(merged < n)
        items = items[merged]
        packages = items[: items.size // 2 * 2].reshape(-1, 2).sum(axis=1)
    lengths, taken = np.zeros(n, dtype=np.int64), 2 * (n - 1)
    for flags in reversed(are_leaves):  # from the coins of half a unit down to the smallest
        chosen = int(flags[:taken].sum())
        lengths[order[:chosen]] += 1
        taken = 2 * (taken - chosen)
    return lengths


class HuffmanCode(NamedTuple):
    """A canonical Huffman code, and that of pairs of symbols, as half as many codes are placed in half the time."""

    lengths: NDArray[np.int64]
    """Bits of each symbol's code, shape ``(N,)``."""
    codes: NDArray[np.uint64]
    """The codes, first bit lowest, shape ``(N,)``."""
    pair_lengths: NDArray[np.int64]
    """Bits of the codes of symbols ``a`` and ``b``, at ``a * N + b``."""
    pair_codes: NDArray[np.uint64]
    """Those codes."""


@lru_cache(64)
def huffman_code(weights: Weights) -> HuffmanCode:
    """The canonical code of :func:`huffman_lengths`: codes of one length count up with the symbol, shorter ones first.

    Args:
        weights: The model; see :func:`model_weights`.

    Returns:
        The code.

    Example:
        >>> huffman_code((2, 1, 1)).codes.tolist()  # 0, 10, 11, read from the lowest bit
        [0, 1, 3]
    """
    lengths = huffman_lengths(weights)
    codes, code, before = np.zeros(len(weights), dtype=np.uint64), 0, 0
    for symbol in np.argsort(lengths, kind="stable").tolist():
        now = int(lengths[symbol])
        code <<= now - before
        codes[symbol] = int(f"{code:0{now}b}"[::-1], 2)
        code, before = code + 1, now
    pair_codes = codes[:, None] | codes << lengths[:, None].astype(np.uint64)
    return HuffmanCode(lengths, codes, (lengths[:, None] + lengths).ravel(), pair_codes.ravel())


@lru_cache(64)
def _huffman_windows(weights: Weights) -> tuple[NDArray[np.uint8], NDArray[np.uint8], Symbols]:
    """What lies wholly in each window of 16 bits: bits that its symbols take, how many they are, and which, by row."""
    code = huffman_code(weights)
    first = np.empty(2**LONGEST, dtype=np.uint8)  # the symbol that each window begins with
    for symbol, (size, bits) in enumerate(zip(code.lengths.tolist(), code.codes.tolist(), strict=True)):
        first[bits :: 1 << size] = symbol
    windows, consumed = np.arange(2**LONGEST), np.zeros(2**LONGEST, dtype=np.int64)
    held = np.zeros(2**LONGEST, dtype=np.uint8)
    symbols: list[Symbols] = []
    while True:
        following = first[windows >> consumed]
        fits = consumed + code.lengths[following] <= LONGEST
        if not fits.any():
            return consumed.astype(np.uint8), held, np.stack(symbols, axis=1)
        symbols.append(following)
        consumed += np.where(fits, code.lengths[following], 0)
        held += fits


def huffman_encode(symbols: Symbols, weights: Weights) -> Bytes:
    """Encode one row with a canonical Huffman code, first bit lowest.

    Args:
        symbols: Integers in ``[0, N)``, uint8, shape ``(n,)``.
        weights: The model, one weight a symbol; see :func:`model_weights`.

    Returns:
        The stream, the last byte filled up with zeros; empty for a model of one symbol.

    Reference:
        Huffman, "A Method for the Construction of Minimum-Redundancy Codes", Proc. IRE 40, 1952.

    Example:
        >>> weights = model_weights([0.5, 0.25, 0.25])
        >>> huffman_encode(np.array([0, 1, 2, 0], dtype=np.uint8), weights)  # 0, 10, 11, 0
        array([26], dtype=uint8)
    """
    if len(weights) == 1 or symbols.size == 0:
        return np.empty(0, dtype=np.uint8)
    table = huffman_code(weights)
    pairs = symbols[:-1:2].astype(np.uint16) * np.uint16(len(weights)) + symbols[1::2]  # half as many codes to place
    size, code = table.pair_lengths[pairs], table.pair_codes[pairs]
    if symbols.size % 2:
        size, code = np.append(size, table.lengths[symbols[-1]]), np.append(code, table.codes[symbols[-1]])
    end = np.cumsum(size)
    start = end - size
    word, shift = start >> 6, (start & 63).astype(np.uint64)
    first = np.flatnonzero(
        np.diff(word, prepend=-1)
    )  # the first code of every word, and the last, which may spill over
    last = np.append(first[1:], word.size) - 1
    words = np.zeros(int(end[-1]) // 64 + 2, dtype="<u8")
    words[word[first]] = np.add.reduceat(code << shift, first)
    words[word[last] + 1] |= code[last] >> (63 - shift[last]) >> np.uint64(1)
    return np.asarray(words.view(np.uint8)[: -(-int(end[-1]) // 8)])


def huffman_decode(stream: Bytes, count: int, weights: Weights) -> Symbols:
    """Undo :func:`huffman_encode`.

    What the next 16 bits hold is looked up at all bits of the stream at once; a short loop then only jumps from one
    look to the next.

    Args:
        stream: What it made.
        count: Symbols in it.
        weights: The model.

    Returns:
        Symbols, uint8, shape ``(count,)``.

    Raises:
        ValueError: If the stream does not end where its last symbol does: it was cut, or is of another model.
    """
    code = "this Huffman code"
    if len(weights) == 1 or count == 0:
        _refuse(stream.size > 0, stream, code, count)
        return np.zeros(count, dtype=np.uint8)
    consumed, held, which = _huffman_windows(weights)
    padded = np.concatenate([stream, np.zeros(2, dtype=np.uint8)]).astype(np.uint32)
    three = padded[:-2] | padded[1:-1] << np.uint32(8) | padded[2:] << np.uint32(16)
    windows = (three[:, None] >> np.arange(8, dtype=np.uint32)).astype(np.uint16).ravel()
    following = memoryview(np.arange(windows.size, dtype=np.int32) + consumed[windows])
    looks, position = [], 0
    while position < windows.size:
        looks.append(position)
        position = following[position]
    seen = windows[looks]
    symbols = which[seen][np.arange(which.shape[1], dtype=np.uint8) < held[seen, None]][:count]
    used = int(np.bincount(symbols, minlength=len(weights)) @ huffman_code(weights).lengths)
    _refuse(symbols.size < count or -(-used // 8) != stream.size, stream, code, count)
    _refuse(used % 8 > 0 and stream[-1] >> used % 8 > 0, stream, code, count)
    return np.asarray(symbols)


# ---------------------------------------------------------------- rows


def join_streams(streams: Sequence[Bytes]) -> tuple[Tensor, Tensor]:
    """Stack streams of different lengths as a tensor.

    Args:
        streams: One a row.

    Returns:
        Bytes, uint8, shape ``(rows, longest)``, filled up with zeros; and the lengths, int32, shape ``(rows, 1)``.
    """
    sizes = [stream.size for stream in streams]
    joined = np.zeros((len(streams), max(sizes, default=0)), dtype=np.uint8)
    for row, stream in zip(joined, streams, strict=True):
        row[: stream.size] = stream
    return torch.from_numpy(joined), torch.tensor(sizes, dtype=torch.int32).view(-1, 1)


def split_streams(joined: Tensor, lengths: Tensor) -> list[Bytes]:
    """Undo :func:`join_streams`, whatever fills up the rows.

    Args:
        joined: Bytes, shape ``(rows, n)``.
        lengths: Those of the streams, shape ``(rows, 1)``.

    Returns:
        One stream a row.

    Raises:
        ValueError: If a row is shorter than its stream.
    """
    host, sizes = joined.cpu().numpy(), lengths.flatten().tolist()
    if len(sizes) != len(host) or any(not 0 <= size <= host.shape[1] for size in sizes):
        raise ValueError(f"Streams of {sizes} bytes do not fit into {host.shape[0]} rows of {host.shape[1]} bytes.")
    return [row[:size] for row, size in zip(host, sizes, strict=True)]
