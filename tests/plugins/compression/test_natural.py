"""Natural compression against its definition, and exactly: all 2^23 draws of one entry can be made."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser

from groundwire.plugins.compression import Compressor
from groundwire.plugins.compression.natural import NaturalCompression, round_to_power_of_two
from groundwire.plugins.random import Key, stream
from helpers.compressors import check_compressor, key, mean_of_draws, rows, squared_errors


def natural(row: np.ndarray, key: Key, _: torch.dtype) -> np.ndarray:
    """The power below, or twice that with the probability of the remainder."""
    (device,) = key.devices
    g = stream(key.seed, purpose="natural", round=key.round, device_id=device)
    noise = torch.randint(2**23, (len(row),), generator=g, dtype=torch.int32).tolist()
    out = np.zeros_like(row)
    for j, u in enumerate(noise):
        if row[j]:
            power = 2.0 ** math.floor(math.log2(abs(np.float32(row[j]))))
            remainder = abs(np.float32(row[j])) / power - 1
            out[j] = math.copysign(2 * power if remainder * 2**23 + u >= 2**23 else power, row[j])
    return out


def test_shared_checks() -> None:
    check_compressor(
        NaturalCompression,
        random=True,
        definition=natural,
        wire_bits=lambda d, _: 8 * d + 8 * math.ceil(d / 8),
    )


EVERY_NOISE = torch.arange(2**23, dtype=torch.int32)
FINITE = [
    *((value, torch.float32) for value in (1.0, -4 / 3, 0.0, 2.0**-126, 1.9 * 2.0**126, 1e-30)),
    *((value, torch.float32) for value in (1e-40, 2.0**-149)),  # beneath the least power
    *((value, torch.float16) for value in (32736.0, 6e-8, 1.8e-7)),  # the last two are float16's subnormals
    *((value, torch.bfloat16) for value in (1.6e38, 1e-40)),
    (0.1, torch.float64),
]


@pytest.mark.parametrize(("value", "dtype"), FINITE)
def test_mean_over_every_draw_is_exactly_the_entry(value: float, dtype: torch.dtype) -> None:
    x = torch.tensor(value, dtype=dtype)
    exact = float(x.float())  # what float64 loses against float32 comes before the draw
    rounded = round_to_power_of_two(x.expand(2**23), EVERY_NOISE)
    low, high = rounded.aminmax()
    of_high = int((rounded == high).sum())
    assert of_high == 2**23 or of_high + int((rounded == low).sum()) == 2**23, "two values, or one"
    share, ends = of_high / 2**23, (low.item(), high.item())
    assert share * ends[1] + (1 - share) * ends[0] == exact
    for end in ends:
        assert math.frexp(abs(end))[0] in (0.0, 0.5), "a power of two, or zero"
        assert torch.tensor(end).to(dtype).item() == end, "which the dtype of the rows can hold"
    if abs(exact) >= 2.0**-126:
        variance = share * (ends[1] / exact - 1) ** 2 + (1 - share) * (ends[0] / exact - 1) ** 2
        assert variance <= 1 / 8
        assert abs(value) != 4 / 3 or variance == pytest.approx(1 / 8), "and there it is reached"


def test_edges_of_the_range() -> None:
    def values(entries: list[float], dtype: torch.dtype) -> list[float]:
        out = NaturalCompression().roundtrip(torch.tensor([entries], dtype=dtype), key(1)).values
        assert torch.equal(
            NaturalCompression().decode(NaturalCompression().encode(torch.tensor([entries], dtype=dtype), key(1))), out
        ) or math.isnan(out.sum())
        return out[0].tolist()

    top = torch.finfo(torch.float32).max
    assert values([top, -top], torch.float32) == [2.0**127, -(2.0**127)], "rounded down, as there is no power above"
    assert values([65504.0, -40000.0], torch.float16) == [32768.0, -32768.0]
    assert values([torch.finfo(torch.bfloat16).max], torch.bfloat16) == [2.0**127]
    assert values([2.0**127, 1e-50, -1e-50], torch.float64) == [2.0**127, 0, 0]
    for beyond in (1e39, -1e300, math.inf, -math.inf, math.nan):
        first, broken, last = values([1.0, beyond, -2.0], torch.float64)
        assert (first, last) == (1.0, -2.0), "only the entry itself is not finite"
        assert math.isnan(broken)


def test_powers_of_two_pass_unchanged() -> None:
    powers = torch.tensor([[2.0**e for e in range(-126, 128)] + [0.0]])
    x = torch.cat([powers, -powers], dim=1)
    values = NaturalCompression().roundtrip(x, key(1)).values
    assert torch.equal(values, x)


def test_one_byte_of_exponent_and_one_bit_of_sign() -> None:
    parts = NaturalCompression().encode(torch.tensor([[1.0, -2.0, 0.0, -0.5, math.nan]]), key(1)).parts
    assert parts["exponents"].tolist() == [[127, 128, 0, 126, 255]]
    assert parts["signs"].tolist() == [[0b01010]]


KINDS = {
    "gauss": lambda d: torch.randn(1, d, generator=torch.Generator().manual_seed(d)),
    "heavy": lambda d: rows(1, d, seed=d),
    "one-hot": lambda d: torch.nn.functional.one_hot(torch.tensor([d // 2]), d) * 1.3,
    "constant": lambda d: torch.full((1, d), -0.7),
    "zero": lambda d: torch.zeros(1, d),
    "huge": lambda d: 1e30 * rows(1, d, seed=d),
    "tiny": lambda d: 1e-30 * rows(1, d, seed=d),
}


@pytest.mark.parametrize("d", [1, 2, 7, 1024, 4099])
@pytest.mark.parametrize("kind", KINDS)
def test_unbiased_and_omega_on_many_rows(kind: str, d: int) -> None:
    draws, x = 300, KINDS[kind](d)
    values = (
        NaturalCompression().roundtrip(x.expand(draws, d), Key(seed=7, devices=tuple(range(draws)))).values.double()
    )
    x = x.double()
    energy = x.square().sum()
    if energy == 0:
        assert not values.any()
        return
    along = values @ x[0] / energy  # one number a draw: a bias of all entries alike is seen best here
    assert abs(along.mean() - 1) <= 5 * along.std() / math.sqrt(draws) + 1e-6
    relative = (values - x).square().sum(1) / energy
    assert relative.mean() <= NaturalCompression().omega(d) + 5 * relative.std() / math.sqrt(draws)


def test_unbiased_entry_by_entry() -> None:
    x = torch.linspace(-2, 3, 20)[None]
    mean, error = mean_of_draws(NaturalCompression(), x, 1500)
    assert NaturalCompression().unbiased
    assert ((mean - x[0].double()).abs() <= 5 * error + 1e-7).all()
    assert ((mean - 1.1 * x[0].double()).abs() > 5 * error).any(), "a wrong scale would be seen"


def test_omega_is_reached_at_four_thirds() -> None:
    compressor = NaturalCompression()
    relative = squared_errors(compressor, torch.full((1, 50), 4 / 3), 2000)
    assert abs(relative.mean() - compressor.omega(50)) < 5 * relative.std() / math.sqrt(2000)
    assert compressor.omega(50) == 1 - compressor.alpha(50) == 1 / 8


def test_built_from_yaml() -> None:
    parser = ArgumentParser()
    parser.add_argument("--compressor", type=Compressor)
    config = parser.parse_string("compressor: groundwire.plugins.compression.natural.NaturalCompression")
    assert repr(parser.instantiate(config).compressor) == "NaturalCompression()"


def test_bad_input_by_message() -> None:
    for encode in (NaturalCompression().encode, NaturalCompression().roundtrip):
        with pytest.raises(ValueError, match=r"Expected rows of shape \(rows, d\), got \(3,\)"):
            encode(torch.zeros(3), key(3))
        with pytest.raises(ValueError, match="Got 3 rows, but the key names 2 devices"):
            encode(torch.zeros(3, 2), key(2))
        with pytest.raises(TypeError, match=r"real floating dtype, got torch\.int64"):
            encode(torch.zeros(1, 2, dtype=torch.int64), key(1))
    payload = NaturalCompression().encode(rows(1, 20), key(1))
    payload.parts["signs"] = payload.parts["signs"][:, 1:]
    with pytest.raises(ValueError, match="2 bytes a row do not match 20 integers of 1 bits"):
        NaturalCompression().decode(payload)
