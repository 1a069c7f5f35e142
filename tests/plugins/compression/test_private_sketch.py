"""Private sketches, against explicit sketching matrices."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard
from scipy.stats import norm

from groundwire.plugins.compression import PrivateSketch
from groundwire.plugins.random import Key, stream
from helpers.compressors import check_compressor, key, mean_of_draws, rows, squared_errors

Kind = Literal["srht", "count"]


def matrix(d: int, k: int, kind: Kind, key: Key) -> np.ndarray:
    """The sketch as a matrix, shape (k, d)."""
    g = stream(key.seed, purpose=f"private_sketch/{kind}", round=key.round)
    length = 2 ** math.ceil(math.log2(d)) if kind == "srht" else d
    signs = 2 * torch.randint(2, (length,), generator=g).numpy() - 1
    if kind == "srht":
        chosen = torch.randperm(length, generator=g)[:k].numpy()
        return (hadamard(length) / math.sqrt(k) * signs)[chosen][:, :d]
    sketch = np.zeros((k, d))
    for j, bucket in enumerate(torch.randint(k, (d,), generator=g).tolist()):
        sketch[bucket, j] = signs[j]
    return sketch


def send(row: np.ndarray, key: Key, dtype: torch.dtype, k: int, kind: Kind, c: float, std: float) -> np.ndarray:
    (device,), k = key.devices, min(k, len(row))
    sketch = matrix(len(row), k, kind, key)
    short = sketch @ row
    short = short * min(1.0, c / max(np.linalg.norm(short), 1e-300))
    g = stream(key.seed, purpose="private_sketch/noise", round=key.round, device_id=device)
    noisy = short + std * torch.randn(k, generator=g, dtype=torch.float64).numpy()
    return sketch.T @ torch.from_numpy(noisy).to(dtype).double().numpy()


@pytest.mark.parametrize("kind", ["srht", "count"])
def test_shared_checks(kind: Kind) -> None:
    check_compressor(
        lambda: PrivateSketch(clip_norm=4.0, noise_multiplier=0.5, k=13, kind=kind, num_shares=4),
        definition=lambda row, key, dtype: send(row, key, dtype, 13, kind, 4.0, 0.5 * 4.0 / 2),
        wire_bits=lambda d, size: 8 * max(size, 4) * min(13, d),
        random=True,
        carries_nan=False,
    )


@pytest.mark.parametrize("kind", ["srht", "count"])
def test_without_clip_and_noise_it_is_unbiased_with_exactly_its_omega(kind: Kind) -> None:
    sketch = PrivateSketch(clip_norm=math.inf, noise_multiplier=0.0, k=8, kind=kind)
    assert sketch.unbiased
    x = torch.linspace(-2, 3, 32)[None]
    mean, error = mean_of_draws(sketch, x, 4000)
    assert ((mean - x[0].double()).abs() <= 5 * error).all()
    assert ((mean - 1.1 * x[0].double()).abs() > 5 * error).any(), "a wrong scale would be seen"
    omega = sketch.omega(32)
    assert omega == (3.0 if kind == "srht" else 31 / 8)
    relative = squared_errors(sketch, x, 3000)
    assert abs(relative.mean() - omega) <= 5 * relative.std() / math.sqrt(3000)
    assert abs(relative.mean() - omega - 1) > 5 * relative.std() / math.sqrt(3000)


def test_clipped_or_noisy_sketches_claim_less() -> None:
    clipped = PrivateSketch(clip_norm=1.0, noise_multiplier=0.0, k=4)
    assert not clipped.unbiased
    assert clipped.omega(16) is None
    assert PrivateSketch(clip_norm=math.inf, noise_multiplier=0.0, density=0.25).omega(64) == 3.0


@pytest.mark.parametrize("kind", ["srht", "count"])
def test_what_travels_is_clipped_where_it_is_short(kind: Kind) -> None:
    sketch = PrivateSketch(clip_norm=2.0, noise_multiplier=0.0, k=8, kind=kind)
    for scale in (1e-3, 1.0, 1e30):
        values = sketch.encode(scale * rows(5, 100), key(5)).parts["values"]
        assert (values.norm(dim=1) <= 2.0 * (1 + 1e-6)).all()
    short = 1e-3 * rows(1, 100)
    free = PrivateSketch(clip_norm=math.inf, noise_multiplier=0.0, k=8, kind=kind)
    assert torch.equal(sketch.encode(short, key(1)).parts["values"], free.encode(short, key(1)).parts["values"])


def test_srht_expands_by_exactly_the_ratio_of_lengths() -> None:
    for k in (1, 8, 32):
        singular = np.linalg.svd(matrix(32, k, "srht", key(1)), compute_uv=False)
        np.testing.assert_allclose(singular, math.sqrt(32 / k))


@pytest.mark.parametrize("kind", ["srht", "count"])
def test_sketches_are_shared_and_payloads_add(kind: Kind) -> None:
    sketch = PrivateSketch(clip_norm=5.0, noise_multiplier=0.3, density=0.2, kind=kind)
    assert sketch.linear
    x = rows(3, 50, dtype=torch.float64)
    payload = sketch.encode(x, key(3))
    assert payload.parts["values"].shape == (3, 10)
    total = type(payload)(
        parts={"values": payload.parts["values"].sum(0, keepdim=True)},
        numel=50, dtype=x.dtype, bits_ideal=0.0, meta=payload.meta,
    )  # fmt: skip
    torch.testing.assert_close(sketch.decode(total)[0], sketch.decode(payload).sum(0))


def test_noise_of_the_sum_has_the_stated_size_and_is_each_devices_own() -> None:
    n, k = 16, 4096
    sketch = PrivateSketch(clip_norm=3.0, noise_multiplier=1.2, k=k, num_shares=n)
    values = sketch.encode(torch.zeros(n, 5000), key(n)).parts["values"].double()
    variance = (1.2 * 3.0) ** 2
    total = values.sum(0).square().mean()
    assert abs(total - variance) < 5 * variance * math.sqrt(2 / k)
    assert abs(total - n * variance) > 5 * variance * math.sqrt(2 / k)
    assert abs(values[0].square().mean() - variance / n) < 5 * variance / n * math.sqrt(2 / k)


def gaussian_delta(epsilon: float, mu: float) -> float:
    return float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu))


def test_privacy_is_that_of_the_gaussian_mechanism() -> None:
    sketch = PrivateSketch(clip_norm=3.0, noise_multiplier=4.0, density=0.1, num_shares=10)
    statement = sketch.privacy(numel=1000, rounds=50, delta=1e-6)
    assert statement is not None
    assert gaussian_delta(statement.epsilon, math.sqrt(50) / 4) == pytest.approx(1e-6, rel=1e-4)
    assert statement.mechanism == "Gaussian"
    assert statement.adjacency == "zero-out"
    assert "at least 10 honest shares of noise in every round" in str(statement)
    assert "the sketch is public" in str(statement)

    sampled = sketch.privacy(numel=1000, rounds=50, delta=1e-6, sample_rate=0.1)
    assert sampled is not None
    assert sampled.epsilon == statement.epsilon, "the variance of the noise tells how many shares are in it"
    assert "counted as 1, since it is seen who sends, or how many shares of noise" in str(sampled)

    alone = PrivateSketch(clip_norm=3.0, noise_multiplier=4.0, density=0.1)
    local = alone.privacy(numel=1000, rounds=50, delta=1e-6, sample_rate=0.1)
    assert local is not None
    assert local.epsilon == statement.epsilon, "who sends is seen"
    assert "counted as 1" in str(local)
    assert "Secure aggregation" not in str(local)
    assert PrivateSketch(clip_norm=3.0, noise_multiplier=0.0, k=3).privacy(numel=10) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_norm": 0.0}, "`clip_norm` must be positive, got 0.0"),
        ({"clip_norm": math.nan}, "`clip_norm` must be positive, got nan"),
        ({"clip_norm": math.inf}, "Noise is in units of `clip_norm`, which is inf"),
        ({"noise_multiplier": -0.1}, "`noise_multiplier` must be at least 0 and finite, got -0.1"),
        ({"num_shares": 0}, "`num_shares` must be at least 1, got 0"),
        ({"kind": "gauss"}, "`kind` must be 'srht' or 'count', got 'gauss'"),
        ({"k": None}, "either `density`"),
        ({"k": None, "density": 1.5}, r"`density` must be in \(0, 1\], got 1.5"),
        ({"k": 0}, "`k` must be at least 1, got 0"),
    ],
)
def test_bad_input_says_what_is_wrong(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrivateSketch(**{"clip_norm": 1.0, "noise_multiplier": 1.0, "k": 4, **settings})


def test_bad_questions_about_privacy() -> None:
    with pytest.raises(ValueError, match=r"`sample_rate` is a probability in \(0, 1\], got 1.5"):
        PrivateSketch(clip_norm=1.0, noise_multiplier=1.0, k=4).privacy(numel=10, sample_rate=1.5)
