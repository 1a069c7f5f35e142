"""The tester through which every compressor goes."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from groundwire.plugins.compression import Compressor, Message
from groundwire.plugins.random import Key

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Definition = Callable[[np.ndarray, Key], np.ndarray]


def rows(count: int, numel: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Heavy-tailed rows, as gradients are."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(count, numel, generator=g, dtype=torch.float64) ** 3).to(dtype)


def key(count: int, *, seed: int = 0, round: int = 0) -> Key:
    return Key(seed=seed, round=round, devices=tuple(range(2, 2 + count)))


def check_compressor(
    build: Callable[[], Compressor],
    *,
    definition: Callable[[np.ndarray], np.ndarray] | None = None,
    wire_bits: Callable[[int, int], int] | None = None,
    random: bool = False,
) -> None:
    """What every compressor must pass.

    Args:
        build: A fresh compressor.
        definition: One float64 row to its decoded row, written apart from the code; for deterministic ones.
        wire_bits: Bits of a row of ``d`` entries of so many bytes each, ``(d, itemsize)``.
        random: Whether it draws random numbers.
    """
    for numel in (1, 2, 37, 300):
        for dtype in DTYPES:
            _check_wire(build(), rows(3, numel, dtype=dtype), wire_bits)
    x = rows(4, 150)
    _check_rows_are_independent(build(), x)
    _check_draws(build(), x, random)
    if definition is not None:
        for numel in (1, 2, 37, 300):
            given = rows(3, numel, seed=numel, dtype=torch.float64)
            expected = np.stack([definition(row) for row in given.numpy()])
            np.testing.assert_allclose(build().roundtrip(given, key(3)).values.numpy(), expected, rtol=1e-6, atol=0)
    zeros = build().roundtrip(torch.zeros(2, 20), key(2)).values
    assert torch.isfinite(zeros).all()
    poisoned = rows(2, 30)
    poisoned[0, 7] = float("nan")
    values = build().roundtrip(poisoned, key(2)).values
    if not (random and math.isfinite(float(values[0].sum())) and build().linear):  # a random support may miss it
        assert not torch.isfinite(values[0]).all() or _is_pure_sign(values[0]), "NaN must never turn into a number"
    assert torch.isfinite(values[1]).all(), "one device's NaN is its own"


def _is_pure_sign(row: Tensor) -> bool:
    return bool(torch.isin(row, torch.tensor([-1.0, 0.0, 1.0])).all())


def _check_wire(compressor: Compressor, x: Tensor, wire_bits: Callable[[int, int], int] | None) -> None:
    before = x.clone()
    payload = compressor.encode(x, key(3))
    decoded, message = compressor.decode(payload), compressor.roundtrip(x, key(3))
    assert torch.equal(x, before), "the rows are not the compressor's to change"
    assert decoded.shape == x.shape
    assert decoded.dtype == message.values.dtype == x.dtype
    assert torch.equal(decoded, message.values), "the short cut must equal the wire"
    assert payload.bits_wire == message.bits_wire
    assert math.isclose(payload.bits_ideal, message.bits_ideal, rel_tol=1e-12)
    assert payload.bits_ideal <= payload.bits_wire + 1e-6, "no code is better than the ideal one"
    assert payload.bits_wire == sum(8 * part.numpy().nbytes for part in _on_numpy(payload.parts))
    assert all(len(part) == len(x) for part in payload.parts.values()), "rows travel by themselves"
    if wire_bits is not None:
        assert payload.bits_wire == len(x) * wire_bits(x.shape[1], x.element_size())
    file = io.BytesIO()
    torch.save({"parts": payload.parts}, file)
    file.seek(0)
    received = torch.load(file, weights_only=True)["parts"]
    again = type(payload)(
        parts=received, numel=payload.numel, dtype_like=payload.dtype_like, bits_ideal=0.0, meta=payload.meta
    )
    assert torch.equal(compressor.decode(again), decoded), "what travelled and what is known suffices"


def _on_numpy(parts: dict[str, Tensor]) -> list[Tensor]:
    return [part.view(torch.int16) if part.dtype == torch.bfloat16 else part for part in parts.values()]


def _check_rows_are_independent(compressor: Compressor, x: Tensor) -> None:
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
