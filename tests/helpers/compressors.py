"""The tester through which every compressor goes."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from groundwire.plugins.compression import Compressor, Message, Payload, base
from groundwire.plugins.random import Key

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Definition = Callable[..., np.ndarray]


def rows(count: int, numel: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Heavy-tailed rows, as gradients are."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(count, numel, generator=g, dtype=torch.float64) ** 3).to(dtype)


def key(count: int, *, seed: int = 0, round: int = 0) -> Key:
    return Key(seed=seed, round=round, devices=tuple(range(2, 2 + count)))


def check_compressor(
    build: Callable[[], Compressor],
    *,
    definition: Definition,
    wire_bits: Callable[[int, int], int] | None,
    random: bool = False,
    carries_nan: bool = True,
) -> None:
    """What every compressor must pass.

    Args:
        build: A fresh compressor.
        definition: One float64 row to its decoded row, written apart from the code. If ``random``, it is also given
            the key of the row and the dtype in which random numbers are drawn, float32 at least.
        wire_bits: Bits of a row of ``d`` entries of so many bytes each, ``(d, itemsize)``; None if what the row says
            decides it.
        random: Whether it draws random numbers.
        carries_nan: Whether what is not finite arrives as such; if not, it must still arrive as something.
    """
    assert build().carries_nan == carries_nan
    for numel in (1, 2, 37, 300):
        for dtype in DTYPES:
            for x in (
                rows(3, numel, dtype=dtype),
                torch.zeros(3, numel, dtype=dtype),
                torch.ones(3, numel, dtype=dtype),
            ):
                _check_wire(build(), x, wire_bits)
            _check_definition(build(), rows(3, numel, seed=numel, dtype=dtype), definition, random)
            _check_rows_are_independent(build(), rows(4, numel, dtype=dtype))
            for poison in (math.nan, math.inf, -math.inf):
                _check_poison(build(), rows(3, numel, dtype=dtype), poison, carries_nan)
    _check_draws(build(), rows(4, 150), random)
    zeros = build().roundtrip(torch.zeros(2, 20), key(2)).values
    assert torch.isfinite(zeros).all()
    empty = build().roundtrip(torch.zeros(2, 0), key(2)).values
    assert empty.shape == (2, 0)
    needs_gradient = rows(2, 20).requires_grad_()
    plain = build().roundtrip(needs_gradient.detach(), key(2)).values
    assert torch.equal(build().roundtrip(needs_gradient, key(2)).values, plain), "rows may belong to a graph"


def _check_definition(compressor: Compressor, x: Tensor, definition: Definition, random: bool) -> None:
    wide = torch.promote_types(x.dtype, torch.float32)
    expected = np.stack(
        [
            definition(row, key(3).row(i), wide) if random else definition(row)
            for i, row in enumerate(x.double().numpy())
        ]
    )
    rtol = max(2 * torch.finfo(x.dtype).eps, 1e-6)  # what travels as a scale is a float32
    atol = 0 if x.dtype != torch.float16 else 1e-7  # its subnormals
    values = compressor.roundtrip(x, key(3)).values.double().numpy()
    np.testing.assert_allclose(values, expected, rtol=rtol, atol=atol)


def _check_poison(compressor: Compressor, x: Tensor, poison: float, carries_nan: bool) -> None:
    x[1, x.shape[1] // 2] = poison
    for poisoned in (x, torch.full_like(x, poison)):
        values = compressor.roundtrip(poisoned, key(3)).values
        decoded = compressor.decode(compressor.encode(poisoned, key(3)))
        assert torch.equal(values.nan_to_num(nan=9), decoded.nan_to_num(nan=9)), "the short cut must equal the wire"
        assert values[1].any(), "what is not finite must not vanish"
        assert not carries_nan or not torch.isfinite(values[1]).all(), "NaN must never turn into a number"
    assert torch.isfinite(compressor.roundtrip(x, key(3)).values[[0, 2]]).all(), "one device's NaN is its own"


def _check_wire(compressor: Compressor, x: Tensor, wire_bits: Callable[[int, int], int] | None) -> None:
    before = x.clone()
    payload = compressor.encode(x, key(3))
    decoded, message = compressor.decode(payload), compressor.roundtrip(x, key(3))
    assert torch.equal(x, before), "the rows are not the compressor's to change"
    assert decoded.shape == x.shape
    assert decoded.dtype == message.values.dtype == x.dtype
    assert torch.equal(decoded, message.values), "the short cut must equal the wire"
    _check_sum(compressor, payload, decoded)
    assert payload.bits_wire == message.bits_wire
    assert payload.bits_ideal == message.bits_ideal
    assert payload.bits_ideal <= payload.bits_wire, "no code is better than the ideal one"
    assert payload.bits_wire == 8 * (
        sum(part.numpy().nbytes for part in _on_numpy(payload.parts)) - payload.padding_bytes
    )
    assert compressor.ragged or payload.padding_bytes == 0
    assert all(len(part) == len(x) for part in payload.parts.values()), "rows travel by themselves"
    if wire_bits is not None:
        assert payload.bits_wire == len(x) * wire_bits(x.shape[1], x.element_size())
    file = io.BytesIO()
    torch.save({"parts": payload.parts}, file)
    file.seek(0)
    received = torch.load(file, weights_only=True)["parts"]
    again = type(payload)(parts=received, numel=payload.numel, dtype=payload.dtype, bits_ideal=0.0, meta=payload.meta)
    assert torch.equal(compressor.decode(again), decoded), "what travelled and what is known suffices"


def _check_sum(compressor: Compressor, payload: Payload, decoded: Tensor) -> None:
    """At once, and row by row, as it is added where rows are long."""
    if compressor.promises_privacy:
        return  # sums in a finite field, with tests of their own
    expected = decoded.double().sum(0, keepdim=True)
    for at_once in (2**21, 1):
        with mock.patch.object(base, "_DECODED", at_once):
            total = compressor.decode_sum(payload)
        assert total.dtype == torch.promote_types(decoded.dtype, torch.float32)
        torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5 * float(decoded.double().abs().max()))


def _on_numpy(parts: dict[str, Tensor]) -> list[Tensor]:
    return [part.view(torch.int16) if part.dtype == torch.bfloat16 else part for part in parts.values()]


def _check_rows_are_independent(compressor: Compressor, x: Tensor) -> None:
    together = compressor.encode(x, key(4)).parts
    for i in range(4):
        for name, part in compressor.encode(x[i : i + 1], key(4).row(i)).parts.items():
            assert torch.equal(together[name][i : i + 1, : part.shape[1]], part)  # a longer row's padding may follow
            assert compressor.ragged or together[name].shape[1] == part.shape[1]
    whole = compressor.roundtrip(x, key(4))
    singles = [compressor.roundtrip(x[i : i + 1], key(4).row(i)) for i in range(4)]
    assert torch.equal(whole.values, torch.cat([one.values for one in singles]))
    assert whole.bits_wire == sum(one.bits_wire for one in singles)


def _check_draws(compressor: Compressor, x: Tensor, random: bool) -> None:
    first = _values(compressor.roundtrip(x, key(4)))
    state = torch.get_rng_state()
    assert torch.equal(first, _values(compressor.roundtrip(x, key(4))))
    assert torch.equal(state, torch.get_rng_state()), "the global random stream is not the compressor's to use"
    for other in (key(4, seed=1), key(4, round=1)):
        assert torch.equal(first, _values(compressor.roundtrip(x, other))) != random


def _values(message: Message) -> Tensor:
    return message.values


def mean_of_draws(compressor: Compressor, x: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """Mean and standard error of the decoded row over rounds, entry by entry; ``x`` has one row."""
    one = Key(seed=5, devices=(0,))
    sample = torch.stack(
        [compressor.roundtrip(x, Key(seed=one.seed, round=t, devices=one.devices)).values[0] for t in range(draws)]
    ).double()
    return sample.mean(0), sample.std(0) / math.sqrt(draws)


def squared_errors(compressor: Compressor, x: Tensor, draws: int) -> Tensor:
    """``|C(x) - x|^2 / |x|^2`` of each draw; ``x`` has one row."""
    errors: list[Any] = []
    for t in range(draws):
        values = compressor.roundtrip(x, Key(seed=5, round=t, devices=(0,))).values
        errors.append((values - x).double().square().sum() / x.double().square().sum())
    return torch.stack(errors)
