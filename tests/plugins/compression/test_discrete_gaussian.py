"""The distributed discrete Gaussian on the wire, against its steps written with an explicit matrix."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard

from groundwire.plugins.compression import DistributedDiscreteGaussian
from groundwire.plugins.compression.discrete_gaussian import round_within
from groundwire.plugins.compression.functional import hadamard_transform, next_power_of_two
from groundwire.plugins.privacy import discrete_gaussian_epsilon, sample_discrete_gaussian
from groundwire.plugins.random import Key, stream
from helpers.compressors import check_compressor, key, rows


def power(d: int) -> int:
    return 2 ** math.ceil(math.log2(d))


def steps(row: np.ndarray, key: Key, c: float, z: float, gamma: float, bits: int, n: int, rotate: bool) -> np.ndarray:
    """Clip, rotate, round until short enough, add noise, wrap, and back."""
    (device,), d = key.devices, len(row)
    row = row * min(1.0, c / max(np.linalg.norm(row), 1e-300))
    if rotate:
        shared = stream(key.seed, purpose="ddg/rotation", round=key.round)
        signs = 2 * torch.randint(2, (power(d),), generator=shared).numpy() - 1
        rotation = hadamard(power(d)) * signs
        row = rotation @ np.pad(row, (0, power(d) - d)) / math.sqrt(power(d))
    wide = len(row)
    bound = c**2 / gamma**2 + wide / 4 + math.sqrt(1.0) * (c / gamma + math.sqrt(wide) / 2)
    bound = min(bound, (c / gamma + math.sqrt(wide)) ** 2)
    g = stream(key.seed, purpose="ddg/rounding", round=key.round, device_id=device)
    while True:
        rounded = np.floor(row / gamma + torch.rand(wide, generator=g, dtype=torch.float64).numpy())
        if (rounded**2).sum() <= bound:
            break
    g = stream(key.seed, purpose="ddg/noise", round=key.round, device_id=device)
    noisy = rounded + sample_discrete_gaussian(wide, z * c / gamma / math.sqrt(n), g).numpy()
    half = 2 ** (bits - 1)
    wrapped = (noisy + half) % (2 * half) - half
    return (rotation.T @ wrapped)[:d] / math.sqrt(power(d)) * gamma if rotate else wrapped * gamma


@pytest.mark.parametrize(
    "settings",
    [
        {"clip_norm": 5.0, "noise_multiplier": 0.7, "granularity": 0.01, "num_shares": 10},
        {"clip_norm": 5.0, "noise_multiplier": 0.7, "granularity": 0.01, "bits": 9, "rotate": False},  # wraps around
        {"clip_norm": 2.0, "noise_multiplier": 3.0, "granularity": 1.0, "bits": 5},  # rounds again and again
    ],
)
def test_shared_checks(settings: dict[str, Any]) -> None:
    bits, rotate = settings.get("bits", 16), settings.get("rotate", True)
    check_compressor(
        lambda: DistributedDiscreteGaussian(**settings),
        definition=lambda row, key, _: steps(
            row, key, settings["clip_norm"], settings["noise_multiplier"], settings["granularity"],
            bits, settings.get("num_shares", 1), rotate,
        ),
        wire_bits=lambda d, _: 8 * math.ceil((power(d) if rotate else d) * bits / 8),
        random=True,
        carries_nan=False,
    )  # fmt: skip


# ---------------------------------------------------------------- the transform


@pytest.mark.parametrize("d", [1, 2, 8, 64, 512])
def test_hadamard_transform_is_the_matrix_and_its_own_inverse(d: int) -> None:
    x = rows(3, d, dtype=torch.float64)
    before = x.clone()
    expected = x.numpy() @ hadamard(d) / math.sqrt(d)
    np.testing.assert_allclose(hadamard_transform(x).numpy(), expected, atol=1e-12 * float(x.abs().max()))
    torch.testing.assert_close(hadamard_transform(hadamard_transform(x)), x)
    assert torch.equal(x, before)
    strided = torch.stack([x, x], dim=-1)[..., 0]
    assert torch.equal(hadamard_transform(strided), hadamard_transform(x))


def test_hadamard_transform_edges() -> None:
    assert hadamard_transform(torch.zeros(2, 0)).shape == (2, 0)
    assert hadamard_transform(torch.zeros(0, 4)).shape == (0, 4)
    assert hadamard_transform(torch.ones(1, 4, dtype=torch.float16)).dtype == torch.float16
    with pytest.raises(ValueError, match="a power of two entries a row, got 6"):
        hadamard_transform(torch.zeros(1, 6))
    assert [next_power_of_two(d) for d in (0, 1, 2, 3, 4, 5, 1024, 1025)] == [0, 1, 2, 4, 4, 8, 1024, 2048]


# ---------------------------------------------------------------- sensitivity


def test_no_row_is_longer_than_the_sensitivity_and_a_tight_beta_repeats() -> None:
    g = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 100.0):
        x = rows(1, 200, dtype=torch.float64)[0]
        x *= scale / x.norm()
        for beta in (0.999, 0.5, 0.0):
            compressor = DistributedDiscreteGaussian(scale, 0.0, 1.0, beta=beta, rotate=False)
            limit = compressor.sensitivity(200)
            assert max(int(round_within(x, limit, g).square().sum()) for _ in range(300)) <= limit**2
    assert DistributedDiscreteGaussian(1.0, 0.0, 1.0).sensitivity(200) < 1 + math.sqrt(256), "the worst is much longer"
    half = torch.full((100,), 0.5, dtype=torch.float64)
    assert (round_within(half, 2.0, g) == 0).all(), "too short a limit rounds towards zero, and ends"


def test_clipping_bounds_huge_rows_and_leaves_short_ones() -> None:
    compressor = DistributedDiscreteGaussian(1.0, 0.0, 1e-4, bits=32)
    huge = torch.full((1, 50), 1e300, dtype=torch.float64)
    assert compressor.roundtrip(huge, key(1)).values.norm() == 0, "beyond the range of squares nothing is left"
    long, short = torch.full((1, 64), 9.0), torch.full((1, 64), 0.1)
    assert compressor.roundtrip(long, key(1)).values.norm() == pytest.approx(1.0, abs=1e-2)
    torch.testing.assert_close(compressor.roundtrip(short, key(1)).values, short, atol=1e-3, rtol=0)


def test_repeated_rounding_hardly_biases() -> None:
    """With the bound that no rounding exceeds there is no bias at all, with the usual one less than rounding noise."""
    x = torch.linspace(-0.6, 0.6, 32, dtype=torch.float64)
    for beta, factor in ((0.0, 0.0), (math.exp(-0.5), 0.05)):
        limit = DistributedDiscreteGaussian(float(x.norm()), 0.0, 1.0, rotate=False, beta=beta).sensitivity(32)
        g = torch.Generator().manual_seed(0)
        sample = torch.stack([round_within(x, limit, g) for _ in range(10_000)]).double()
        error = sample.std(0) / math.sqrt(len(sample))
        assert ((sample.mean(0) - x).abs() <= 5 * error + factor).all()


# ---------------------------------------------------------------- sums


def test_sum_modulo_is_the_sum_of_rows_where_nothing_wraps() -> None:
    compressor = DistributedDiscreteGaussian(3.0, 0.5, 0.01, bits=16, num_shares=20)
    x = rows(20, 100, dtype=torch.float64)
    payload = compressor.encode(x, key(20))
    torch.testing.assert_close(compressor.decode_sum(payload)[0], compressor.decode(payload).sum(0))
    assert not compressor.linear, "packed payloads do not add byte by byte"


def test_sum_survives_rows_that_wrap_as_long_as_it_fits_itself() -> None:
    compressor = DistributedDiscreteGaussian(100.0, 0.0, 1.0, bits=5, rotate=False)  # holds -16 to 15
    x = torch.tensor([[30.0, 2.0], [-20.0, 3.0]])
    payload = compressor.encode(x, key(2))
    assert compressor.decode_sum(payload).tolist() == [[10.0, 5.0]]
    assert compressor.decode(payload).tolist() == [[-2.0, 2.0], [12.0, 3.0]]


def test_noise_of_the_sum_has_the_stated_size() -> None:
    n, d, clip, multiplier = 10, 4096, 2.0, 1.5
    compressor = DistributedDiscreteGaussian(clip, multiplier, 0.01, bits=24, num_shares=n)
    noise = compressor.decode_sum(compressor.encode(torch.zeros(n, d, dtype=torch.float64), key(n)))
    variance = (multiplier * clip) ** 2
    assert abs(noise.square().mean() - variance) < 5 * variance * math.sqrt(2 / d)
    assert abs(noise.square().mean() - variance * n) > 5 * variance * math.sqrt(2 / d)
    again = compressor.encode(torch.zeros(n, d, dtype=torch.float64), key(n, round=1))
    assert not torch.equal(compressor.decode_sum(again), noise)


def test_devices_share_the_rotation_and_nothing_else() -> None:
    compressor = DistributedDiscreteGaussian(1.0, 0.5, 0.01)
    one = rows(1, 40).expand(2, 40)
    first, second = compressor.roundtrip(one, key(2)).values
    assert not torch.equal(first, second)
    apart = [compressor.encode(one[:1], key(2).row(i)).meta["signs"] for i in range(2)]
    assert torch.equal(*apart)  # type: ignore[arg-type]


# ---------------------------------------------------------------- privacy and configuration


def test_privacy_accounts_for_padding_rounding_and_shares() -> None:
    compressor = DistributedDiscreteGaussian(1.0, 2.0, 0.02, num_shares=25)
    statement = compressor.privacy(numel=1000, rounds=10, delta=1e-6, sample_rate=0.5)
    assert statement is not None
    longest = math.sqrt(50**2 + 1024 / 4 + 50 + math.sqrt(1024) / 2)  # beta = exp(-1/2): the root of 2 log is 1
    expected = discrete_gaussian_epsilon(
        delta=1e-6, sensitivity=longest, sigma=2.0 * 50 / 5, numel=1024, num_shares=25, rounds=10
    )
    assert statement.epsilon == pytest.approx(expected)
    assert compressor.sensitivity(1000) == pytest.approx(longest)
    text = str(statement)
    assert statement.adjacency == "zero-out"
    assert "at least 25 honest shares of noise" in text
    assert "counted as 1" in text
    assert f"norm {longest:.6g} steps" in text
    fine = DistributedDiscreteGaussian(1.0, 2.0, 1e-5, num_shares=25).privacy(numel=1000, rounds=10, delta=1e-6)
    assert fine is not None
    assert fine.epsilon < statement.epsilon, "a finer grid wastes less on rounding"
    assert DistributedDiscreteGaussian(1.0, 0.0, 0.02).privacy(numel=10) is None
    alone = DistributedDiscreteGaussian(1.0, 2.0, 0.02).privacy(numel=1000)
    assert alone is not None
    assert "Nobody else is trusted" in str(alone)
    assert "Secure aggregation" not in str(alone)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_norm": 0.0}, "`clip_norm` must be positive and finite, got 0.0"),
        ({"clip_norm": math.inf}, "`clip_norm` must be positive and finite"),
        ({"noise_multiplier": -1.0}, "`noise_multiplier` must be at least 0 and finite, got -1.0"),
        ({"granularity": 0.0}, "`granularity` must be positive and finite, got 0.0"),
        ({"bits": 1}, r"`bits` must be in \[2, 32\], got 1"),
        ({"bits": 33}, r"`bits` must be in"),
        ({"num_shares": 0}, "`num_shares` must be at least 1, got 0"),
        ({"beta": 1.0}, r"`beta` must be in \[0, 1\), got 1.0"),
        ({"granularity": 1.0, "num_shares": 5}, "A share of noise is 0.447 steps of the grid.*smaller `granularity`"),
    ],
)
def test_bad_input_says_what_is_wrong(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistributedDiscreteGaussian(**{"clip_norm": 1.0, "noise_multiplier": 1.0, "granularity": 0.01, **settings})


def test_bad_questions_about_privacy() -> None:
    compressor = DistributedDiscreteGaussian(1.0, 1.0, 0.01)
    with pytest.raises(ValueError, match="`rounds` must be at least 1, got 0"):
        compressor.privacy(numel=10, rounds=0)
    with pytest.raises(ValueError, match=r"`delta` must be in \(0, 1\), got 0"):
        compressor.privacy(numel=10, delta=0.0)
