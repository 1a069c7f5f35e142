"""TernGrad against its definition, the closed form of its variance, and the worst case of that."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from groundwire.plugins.compression import Compressor
from groundwire.plugins.compression.terngrad import TernGrad, pack_trits, unpack_trits
from groundwire.plugins.random import Key, stream
from helpers.compressors import check_compressor, key, mean_of_draws, rows, squared_errors


def terngrad(row: np.ndarray, key: Key, dtype: torch.dtype, clip: float | None) -> np.ndarray:
    """Entry by entry: the sign, with the probability of the clipped magnitude."""
    (device,), out = key.devices, np.zeros_like(row)
    g = stream(key.seed, purpose="terngrad", round=key.round, device_id=device)
    uniform = torch.rand(len(row), generator=g, dtype=dtype).tolist()
    limit = math.inf if clip is None else clip * math.sqrt(sum(v * v for v in row) / len(row))
    clipped = [min(abs(v), limit) for v in row]
    scale = float(np.float32(max(clipped)))
    for j, u in enumerate(uniform):
        if u < clipped[j] / scale:
            out[j] = math.copysign(scale, row[j])
    return out


@pytest.mark.parametrize("clip", [2.5, 1.0, None])
def test_shared_checks(clip: float | None) -> None:
    check_compressor(
        lambda: TernGrad(clip),
        random=True,
        definition=lambda row, key, dtype: terngrad(row, key, dtype, clip),
        wire_bits=lambda d, _: 32 + 8 * math.ceil(d / 5),
    )


# ---------------------------------------------------------------- the wire


@settings(max_examples=100, deadline=None)
@given(trits=st.lists(st.integers(0, 2), max_size=24))
def test_trits_are_the_digits_of_base_three_numbers(trits: list[int]) -> None:
    packed = pack_trits(torch.tensor([trits, trits], dtype=torch.uint8))
    padded = trits + [0] * (-len(trits) % 5)
    expected = [int("".join(map(str, padded[i : i + 5][::-1])), base=3) for i in range(0, len(padded), 5)]
    assert packed.tolist() == [expected, expected]
    assert unpack_trits(packed, len(trits)).tolist() == [trits, trits]


def test_all_numbers_of_five_trits_are_used() -> None:
    every = torch.cartesian_prod(*[torch.arange(3, dtype=torch.uint8)] * 5)
    assert sorted(pack_trits(every).flatten().tolist()) == list(range(243))


def test_foreign_payloads_are_refused() -> None:
    payload = TernGrad().encode(rows(2, 23), key(2))
    assert {name: tuple(part.shape) for name, part in payload.parts.items()} == {"scale": (2, 1), "codes": (2, 5)}
    codes = payload.parts["codes"]
    for wrong, message in (
        (codes[:, 1:], r"4 bytes a row do not match 23 trits \(5 bytes\)"),
        (torch.full_like(codes, 243), "A byte of 243 is no 5 trits: they are below 243"),
    ):
        with pytest.raises(ValueError, match=message):
            TernGrad().decode(dataclasses.replace(payload, parts={**payload.parts, "codes": wrong}))


# ---------------------------------------------------------------- moments

KINDS = {
    "gauss": lambda d: torch.randn(1, d, generator=torch.Generator().manual_seed(d)),
    "heavy": lambda d: rows(1, d, seed=d),
    "one-hot": lambda d: torch.nn.functional.one_hot(torch.tensor([d // 2]), d) * 1.3,
    "constant": lambda d: torch.full((1, d), -0.7),
    "huge": lambda d: 1e30 * rows(1, d, seed=d),
    "tiny": lambda d: 1e-30 * rows(1, d, seed=d),
    "worst": lambda d: torch.full((1, d), 1 / (math.sqrt(d) + 1)).index_fill_(1, torch.tensor([0]), -1.0),
}


@pytest.mark.parametrize("d", [1, 2, 7, 1024, 4099])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", [None, 2.5])
def test_mean_and_variance_are_those_of_scaled_bernoullis(kind: str, d: int, clip: float | None) -> None:
    draws, x, compressor = 400, KINDS[kind](d).float(), TernGrad(clip)
    values = compressor.roundtrip(x.expand(draws, d), Key(seed=3, devices=tuple(range(draws)))).values.double()
    target = x[0].double()
    if clip is not None:
        limit = clip * target.square().mean().sqrt()
        target = target.clamp(-limit, limit)
    energy, scale = target.square().sum(), target.abs().max()
    along = values @ target / energy
    assert abs(along.mean() - 1) <= 5 * along.std() / math.sqrt(draws) + 1e-6, "unbiased for what clipping leaves"
    relative = (values - target).square().sum(1) / energy
    expected = scale * target.abs().sum() / energy - 1
    assert abs(relative.mean() - expected) <= 5 * relative.std() / math.sqrt(draws) + 1e-6
    assert compressor.unbiased == (clip is None)
    omega = compressor.omega(d)
    if clip is None:
        assert omega is not None
        assert expected <= omega + 1e-6
        assert kind != "worst" or expected == pytest.approx(omega, abs=1e-5), "no smaller bound holds"
    else:
        assert omega is None


def test_unbiased_entry_by_entry_only_without_clipping() -> None:
    x = torch.linspace(-2, 3, 20)[None]
    x[0, 3] = 40.0
    mean, error = mean_of_draws(TernGrad(None), x, 1500)
    assert ((mean - x[0].double()).abs() <= 5 * error + 1e-7).all()
    clipped, error = mean_of_draws(TernGrad(2.5), x, 1500)
    assert (clipped - x[0].double())[3] < -15, "the large entry is cut off"
    others = torch.arange(20) != 3
    assert ((clipped - x[0].double()).abs() <= 5 * error + 1e-7)[others].all()


def test_clipping_lowers_the_variance() -> None:
    x = rows(1, 1000, seed=4)
    assert squared_errors(TernGrad(2.5), x, 100).mean() < 0.5 * squared_errors(TernGrad(None), x, 100).mean()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [-3.0, 1e-4, 6e4])
def test_rows_of_one_magnitude_arrive_as_they_are(dtype: torch.dtype, value: float) -> None:
    x = torch.full((1, 50), value, dtype=dtype)
    x[0, ::3] *= -1  # a deviation about the mean would clip the constant row of all entries to nothing
    for row in (x, x.abs(), x[:, :1]):
        torch.testing.assert_close(TernGrad().roundtrip(row, key(1)).values, row, rtol=1e-6, atol=0)


def test_every_value_is_minus_s_zero_or_s_with_the_sign_of_the_entry() -> None:
    x = rows(3, 500)
    values = TernGrad().roundtrip(x, key(3)).values
    for row, sent in zip(x, values, strict=True):
        assert len(sent.abs().unique()) == 2
        assert (sent * row >= 0).all()
        limit = min(row.abs().max().item(), 2.5 * row.square().mean().sqrt().item())
        assert sent.abs().max().item() == pytest.approx(limit, rel=1e-6)


def test_scales_that_float32_cannot_hold() -> None:
    send = TernGrad().roundtrip
    assert not send(torch.full((1, 4), 1e-60, dtype=torch.float64), key(1)).values.any()
    assert not send(torch.full((1, 4), 1e60, dtype=torch.float64), key(1)).values.isfinite().any()
    least = torch.full((1, 4), 2.0**-149)
    assert torch.equal(send(least, key(1)).values, least)


# ---------------------------------------------------------------- building, bad input


def test_built_from_yaml() -> None:
    parser = ArgumentParser()
    parser.add_argument("--compressor", type=Compressor)
    for args, expected in (
        ("", "TernGrad(clip_factor=2.5)"),
        ("init_args: {clip_factor: null}", "TernGrad(clip_factor=None)"),
    ):
        text = f"compressor: {{class_path: groundwire.plugins.compression.terngrad.TernGrad, {args}}}"
        assert repr(parser.instantiate(parser.parse_string(text)).compressor) == expected


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TernGrad(0.0), "`clip_factor` must be positive, or None for no clipping, got 0.0"),
        (lambda: TernGrad(-1.0), "`clip_factor` must be positive, or None for no clipping, got -1.0"),
        (lambda: TernGrad(math.nan), "`clip_factor` must be positive, or None for no clipping, got nan"),
        (lambda: TernGrad().encode(torch.zeros(3), key(3)), r"Expected rows of shape \(rows, d\)"),
        (lambda: TernGrad().roundtrip(torch.zeros(3, 2), key(2)), "Got 3 rows, but the key names 2 devices"),
    ],
)
def test_bad_input_by_message(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
