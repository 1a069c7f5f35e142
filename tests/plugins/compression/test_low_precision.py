"""Low precision against a search among all values of a format, NumPy's float16, and closed bounds."""

from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from groundwire.plugins.compression import Compressor
from groundwire.plugins.compression.low_precision import Format, LowPrecision, round_stochastically
from groundwire.plugins.random import Key, stream
from helpers.compressors import check_compressor, key, mean_of_draws, rows, squared_errors

FORMATS: tuple[Format, ...] = get_args(Format)
LAYOUT = {  # bits of the fraction, the least normal exponent, and the largest value
    "float16": (10, -14, 65504.0),
    "bfloat16": (7, -126, (2 - 2.0**-7) * 2.0**127),
    "float8_e4m3fn": (3, -6, 448.0),
    "float8_e5m2": (2, -14, 57344.0),
}


def every_value(name: str) -> np.ndarray:
    """All finite values that are not negative, ascending, from the layout of the bits."""
    fraction, least, largest = LAYOUT[name]
    exponents = range(least, math.frexp(largest)[1])
    values = [i * 2.0 ** (least - fraction) for i in range(2**fraction)]
    values += [(1 + i / 2**fraction) * 2.0**e for e in exponents for i in range(2**fraction)]
    return np.array([v for v in values if v <= largest])


def neighbours(size: np.ndarray, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the values below and above; the same where there is one."""
    below = np.searchsorted(grid, size, side="right") - 1
    return below, np.where(grid[below] == size, below, np.minimum(below + 1, len(grid) - 1))


def low_precision(row: np.ndarray, name: str, uniform: np.ndarray | None = None) -> np.ndarray:
    """The nearer of two neighbours, of even index if both are as near; or the one that the draw says."""
    row, grid, scale = row.astype(np.float32), every_value(name), np.float32(1)
    if name.startswith("float8"):
        scale = np.maximum(np.abs(row).max() / np.float32(grid[-1]), np.finfo(np.float32).tiny)
        row = row / scale
    size = np.minimum(np.abs(row).astype(np.float64), grid[-1])
    below, above = neighbours(size, grid)
    down, up = size - grid[below], grid[above] - size
    if uniform is None:
        take_above = (up < down) | ((up == down) & (above % 2 == 0))
    else:
        share = down / np.where(above > below, grid[above] - grid[below], 1)
        take_above = np.where(row > 0, uniform < share, uniform >= 1 - share)  # a small draw is up, not outwards
    return np.copysign(np.where(take_above, grid[above], grid[below]), row) * np.float64(scale)


def drawn(row: np.ndarray, key: Key) -> np.ndarray:
    g = stream(key.seed, purpose="low_precision", round=key.round, device_id=key.devices[0])
    return torch.rand(len(row), generator=g).double().numpy()


def wire_bits(name: str) -> Any:
    return lambda d, _: 8 * d + 32 if name.startswith("float8") else 16 * d


@pytest.mark.parametrize("name", FORMATS)
def test_shared_checks(name: Format) -> None:
    check_compressor(
        lambda: LowPrecision(name), definition=lambda row: low_precision(row, name), wire_bits=wire_bits(name)
    )


@pytest.mark.parametrize("name", FORMATS)
def test_shared_checks_of_stochastic_rounding(name: Format) -> None:
    check_compressor(
        lambda: LowPrecision(name, stochastic=True),
        random=True,
        definition=lambda row, key, _: low_precision(row, name, drawn(row, key)),
        wire_bits=wire_bits(name),
    )


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("name", FORMATS)
def test_layouts_of_this_test_are_the_formats(name: Format) -> None:
    dtype = getattr(torch, name)
    if name.startswith("float8"):
        bits = torch.arange(128, dtype=torch.uint8).view(dtype).float()
    else:
        bits = torch.arange(2**15, dtype=torch.int16).view(dtype).float()
    np.testing.assert_array_equal(every_value(name), bits[bits.isfinite()].double().numpy())


def special(name: Format) -> Tensor:
    """All values, the middles between them, and what lies closely beside both; the largest is the largest value."""
    grid = torch.from_numpy(every_value(name)).float()
    middles = (grid[1:] + grid[:-1]) / 2
    points = torch.cat([grid, middles])
    size = torch.cat([points, points.nextafter(torch.tensor(0.0)), points.nextafter(grid[-1])])
    return torch.cat([size, -size])[None].clamp(-grid[-1], grid[-1])


@pytest.mark.parametrize("name", FORMATS)
def test_ties_and_ends_are_rounded_as_the_grid_says(name: Format) -> None:
    x = special(name)
    values = LowPrecision(name).roundtrip(x, key(1)).values[0]
    np.testing.assert_array_equal(values.double().numpy(), low_precision(x[0].double().numpy(), name))
    if name == "float16":
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(values.numpy(), x[0].numpy().astype(np.float16).astype(np.float32))


@pytest.mark.parametrize(
    ("name", "bound"), [("float16", 2.0**-11), ("bfloat16", 2.0**-8), ("float8_e4m3fn", 2.0**-4), ("float8_e5m2", 2.0**-3)]
)  # fmt: skip
def test_relative_error_of_normals(name: Format, bound: float) -> None:
    _, least, largest = LAYOUT[name]
    x = torch.cat([torch.logspace(least, math.log2(largest), 20_000, base=2.0)[None], special(name)], dim=1)
    x = x.clamp(-largest, largest)
    x = x[:, x[0].abs() >= 2.0**least]
    error = ((LowPrecision(name).roundtrip(x, key(1)).values - x).double() / x.double()).abs()
    assert 0.98 * bound / (1 + bound) < error.max() <= bound / (1 + bound), "and no smaller bound holds"
    random = ((LowPrecision(name, stochastic=True).roundtrip(x, key(1)).values - x).double() / x.double()).abs()
    assert bound < random.max() < 2 * bound


def test_range_of_float16_and_of_sums_in_it() -> None:
    compressor = LowPrecision("float16")
    x = torch.tensor([[65504.0, 65519.0, 65520.0, -1e30, 1e-8, -6e-8]])
    assert compressor.roundtrip(x, key(1)).values.tolist() == [[65504, 65504, math.inf, -math.inf, 0, -(2.0**-24)]]
    payload = compressor.encode(torch.tensor([[40000.0], [40000.0]]), key(2))
    assert payload.parts["values"].sum(0).isinf().all(), "which is why means are sent, not sums"
    stochastic = LowPrecision("float16", stochastic=True).roundtrip(torch.tensor([[65504.0, 7e4, math.inf]]), key(1))
    assert stochastic.values.isfinite().tolist() == [[True, False, False]]
    assert LowPrecision("bfloat16").roundtrip(torch.tensor([[1e38, 1e-38]]), key(1)).values.isfinite().all()


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_payloads_of_16_bits_add(name: Format) -> None:
    compressor = LowPrecision(name)
    assert compressor.linear
    payload = compressor.encode(torch.randn(8, 200, generator=torch.Generator().manual_seed(0)), key(8))
    total = payload.parts["values"][0]
    for row in payload.parts["values"][1:]:
        total = total + row  # as all-reduce does, in the dtype that travels
    summed = type(payload)(parts={"values": total[None]}, numel=200, dtype=torch.float32, bits_ideal=0.0)
    exact = compressor.decode(payload).double().sum(0)
    bound = 7 * 8 * torch.finfo(getattr(torch, name)).eps / 2  # seven roundings of sums below 8 times the largest
    difference = (compressor.decode(summed)[0].double() - exact).abs().max()
    assert 0 < difference <= bound * compressor.decode(payload).abs().max()
    assert not LowPrecision("float8_e5m2").linear, "codes of different scales do not add"


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_travels_as_bytes_and_one_scale_a_row(name: Format) -> None:
    x = rows(3, 50) * torch.tensor([[1e30], [1.0], [1e-30]])
    payload = LowPrecision(name).encode(x, key(3))
    assert {part: (t.dtype, tuple(t.shape)) for part, t in payload.parts.items()} == {
        "codes": (torch.uint8, (3, 50)),
        "scale": (torch.float32, (3, 1)),
    }
    torch.testing.assert_close(
        payload.parts["scale"], x.abs().amax(1, keepdim=True) / LAYOUT[name][2], rtol=1e-6, atol=0
    )
    values = LowPrecision(name).decode(payload)
    largest = x.abs().argmax(1, keepdim=True)
    torch.testing.assert_close(values.gather(1, largest), x.gather(1, largest), rtol=2e-7, atol=0)
    relative = (values - x).double().square().sum(1) / x.double().square().sum(1)
    assert relative.max() < 2.0**-8 * (4 if name == "float8_e5m2" else 1), "however large or small the row"


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_at_the_ends_of_float32(name: Format) -> None:
    compressor = LowPrecision(name)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        top = torch.full((1, 3), torch.finfo(dtype).max, dtype=dtype)
        top[0, 1] *= -1
        assert torch.equal(compressor.roundtrip(top, key(1)).values, top)
    least = torch.tensor([[2.0**-126, -(2.0**-130), 2.0**-149, 0.0]])  # its scale would underflow
    values = compressor.roundtrip(least, key(1)).values
    assert values[0, 0] == 2.0**-126
    assert ((values - least).abs() <= 2.0**-126 * 2.0**-4).all()
    beyond = torch.tensor([[1e300, 1.0]], dtype=torch.float64)
    assert not compressor.roundtrip(beyond, key(1)).values.isfinite().any(), "float32 cannot hold the scale"


def test_float8_does_not_round_beyond_its_largest_value() -> None:
    x = torch.linspace(1, 2, 100)
    x = x[x / (x / 57344) > 57344][0].expand(1, 2**23)  # the quotient is rounded up, to a little above the grid's end
    values = LowPrecision("float8_e5m2", stochastic=True).roundtrip(x, key(1)).values
    assert values.isfinite().all(), "some would be rounded up to infinity"


# ---------------------------------------------------------------- moments


@pytest.mark.parametrize("name", FORMATS)
def test_stochastic_rounding_takes_the_two_neighbours_with_the_right_probabilities(name: Format) -> None:
    grid, draws = every_value(name), 4096
    g = np.random.default_rng(0)
    pick = g.choice(len(grid) - 1, 40)
    size = grid[pick] + g.random(40).astype(np.float32) * (grid[pick + 1] - grid[pick])
    x = torch.from_numpy(np.concatenate([size, -size, grid[[0, 1, -1]]])).float()
    uniform = (torch.arange(draws) / draws)[:, None].expand(draws, len(x))  # all draws there are, if they had 12 bits
    values = round_stochastically(x.expand(draws, -1), getattr(torch, name), uniform).double().numpy()
    below, above = neighbours(x.abs().double().numpy(), grid)
    ends = np.stack([grid[below], grid[above]])
    np.testing.assert_array_equal(np.sort(np.stack([np.abs(values).min(0), np.abs(values).max(0)]), axis=0), ends)
    step = np.where(above > below, grid[above] - grid[below], 1)
    probability = (np.abs(values) == grid[above]).mean(0) * (above > below)
    assert np.abs(probability - (x.abs().double().numpy() - grid[below]) / step).max() <= 1 / draws


KINDS = {
    "gauss": lambda d: torch.randn(1, d, generator=torch.Generator().manual_seed(d)),
    "heavy": lambda d: rows(1, d, seed=d),
    "one-hot": lambda d: torch.nn.functional.one_hot(torch.tensor([d // 2]), d) * 1.3,
    "constant": lambda d: torch.full((1, d), -0.7),
    "zero": lambda d: torch.zeros(1, d),
    "huge": lambda d: 1e30 * rows(1, d, seed=d),
    "tiny": lambda d: 1e-30 * rows(1, d, seed=d),
    "one large": lambda d: torch.full((1, d), 1e-6).index_fill_(1, torch.tensor([0]), 1.0),  # too small for e4m3
}


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [1, 2, 7, 1024, 4099])
def test_omega_alpha_and_mean_on_many_rows(name: Format, kind: str, d: int) -> None:
    draws, x, stochastic = 200, KINDS[kind](d).float(), LowPrecision(name, stochastic=True)
    many = Key(seed=7, devices=tuple(range(draws)))
    values = stochastic.roundtrip(x.expand(draws, d), many).values.double()
    once, energy = LowPrecision(name).roundtrip(x, key(1)).values.double(), x.double().square().sum()
    if energy == 0:
        assert not values.any()
        assert not once.any()
        return
    omega, alpha = stochastic.omega(d), LowPrecision(name).alpha(d)
    assert omega is not None
    assert alpha is not None
    assert omega == pytest.approx(1 - alpha)
    assert (once - x).square().sum() <= (1 - alpha) * energy
    relative = (values - x).square().sum(1) / energy
    assert relative.mean() <= omega + 5 * relative.std() / math.sqrt(draws)
    along = values @ x[0].double() / energy
    assert abs(along.mean() - 1) <= 5 * along.std() / math.sqrt(draws) + 1e-6
    if kind == "one large" and name == "float8_e4m3fn" and d > 1000:
        total = values[:, 1:].sum(1)
        assert total.mean() == pytest.approx(1e-6 * (d - 1), abs=5 * float(total.std()) / math.sqrt(draws))
        assert not once[:, 1:].any(), "rounding to nearest loses them all"


def test_what_is_claimed() -> None:
    assert LowPrecision("bfloat16").alpha(10**6) == 1 - 2.0**-16
    assert LowPrecision("float8_e4m3fn").alpha(1) == 1 - 2.0**-8
    lost = 10**9 * (2.0**-10 / 448) ** 2  # one large entry, and a billion that are just rounded to zero
    assert LowPrecision("float8_e4m3fn").alpha(10**9 + 1) == pytest.approx(1 - 2.0**-8 - lost, abs=1e-9)
    assert LowPrecision("float8_e4m3fn").alpha(10**12) is None
    assert LowPrecision("float8_e5m2", stochastic=True).omega(1) == 2.0**-6
    for name in FORMATS:
        assert LowPrecision(name).omega(10) is None
        assert not LowPrecision(name).unbiased
        assert LowPrecision(name, stochastic=True).unbiased
    assert LowPrecision("float16").alpha(10) is None
    assert LowPrecision("float16", stochastic=True).omega(10) is None
    tiny = torch.full((1, 4), 1e-9)
    assert not LowPrecision("float16").roundtrip(tiny, key(1)).values.any(), "all of it is lost: no alpha above 0 holds"


@pytest.mark.parametrize("name", FORMATS)
def test_unbiased_entry_by_entry(name: Format) -> None:
    x = torch.linspace(-2, 3, 20)[None] * (1 + 1 / 300)
    compressor = LowPrecision(name, stochastic=True)
    mean, error = mean_of_draws(compressor, x, 1500)
    assert ((mean - x[0].double()).abs() <= 5 * error + 1e-6).all()
    biased = LowPrecision(name).roundtrip(x, key(1)).values[0].double()
    assert ((mean - biased).abs() > 5 * error + 1e-6).any(), "rounding to nearest would be seen"
    assert squared_errors(compressor, x, 20).mean() > squared_errors(LowPrecision(name), x, 1)[0]


# ---------------------------------------------------------------- building, bad input


def test_built_from_yaml() -> None:
    parser = ArgumentParser()
    parser.add_argument("--compressor", type=Compressor)
    text = "compressor: {class_path: groundwire.plugins.compression.low_precision.LowPrecision, init_args: {dtype: float16}}"
    assert (
        repr(parser.instantiate(parser.parse_string(text)).compressor)
        == "LowPrecision(dtype='float16', stochastic=False)"
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LowPrecision("float32"), r"`dtype` must be one of \('float16', 'bfloat16', .*\), got 'float32'"),
        (lambda: LowPrecision().encode(torch.zeros(3), key(3)), r"Expected rows of shape \(rows, d\)"),
        (lambda: LowPrecision().encode(torch.zeros(3, 2), key(2)), "Got 3 rows, but the key names 2 devices"),
    ],
)  # fmt: skip
def test_bad_input_by_message(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
