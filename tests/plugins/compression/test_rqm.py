"""RQM on the wire: against the mechanism told entry by entry, and against its exact distribution."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from groundwire.plugins.compression import QSGD, RQM, Compressor
from groundwire.plugins.privacy import rqm_epsilon, rqm_log_pmf
from groundwire.plugins.random import Key, stream
from helpers.channels import build_from_yaml
from helpers.compressors import check_compressor, key, mean_of_draws


def rqm(row: np.ndarray, key: Key, clip: float, margin: float, m: int, keep: float) -> np.ndarray:
    """Walk from each entry down and up, level by level, until one is kept."""
    (device,), out = key.devices, np.zeros_like(row)
    g = stream(key.seed, purpose="rqm", round=key.round, device_id=device)
    walks = torch.rand(3, len(row), generator=g, dtype=torch.float64).tolist()
    levels = [-(clip + margin) + 2 * i * (clip + margin) / (m - 1) for i in range(m)]
    for i, (x, u, v, w) in enumerate(zip(row.clip(-clip, clip), *walks, strict=True)):
        a = max(j for j in range(m - 1) if levels[j] <= x)
        b = a + 1
        while a > 0 and 1 - u <= 1 - keep:  # passed over with probability 1 - keep: what is left of u is uniform again
            a, u = a - 1, 1 - (1 - u) / (1 - keep)
        while b < m - 1 and 1 - v <= 1 - keep:
            b, v = b + 1, 1 - (1 - v) / (1 - keep)
        out[i] = levels[b] if w < (x - levels[a]) / (levels[b] - levels[a]) else levels[a]
    return out


@pytest.mark.parametrize(
    ("settings", "width"),
    [
        ({"clip": 1.0}, 4),
        ({"clip": 3.0, "num_levels": 2, "margin": 0.5}, 1),
        ({"clip": 0.5, "num_levels": 10, "margin": 0.2, "keep_probability": 0.8}, 4),
        ({"clip": 0.5, "num_levels": 16, "num_shares": 40}, 10),  # sums up to 600
    ],
)
def test_shared_checks(settings: dict[str, Any], width: int) -> None:
    clip, margin = settings["clip"], settings.get("margin", settings["clip"])
    m, keep = settings.get("num_levels", 16), settings.get("keep_probability", 0.42)
    check_compressor(
        lambda: RQM(**settings),
        definition=lambda row, key, _: rqm(row, key, clip, margin, m, keep),
        wire_bits=lambda d, _: 8 * math.ceil(d * width / 8),
        random=True,
        carries_nan=False,
    )


@pytest.mark.parametrize("x", [-1.0, -0.2, 0.31, 1.0])
def test_frequencies_are_the_exact_probabilities(x: float) -> None:
    compressor, n = RQM(clip=1.0, num_levels=8, margin=0.4, keep_probability=0.6), 100_000
    values = compressor.roundtrip(torch.full((1, n), x, dtype=torch.float64), key(1)).values[0]
    levels = torch.linspace(-1.4, 1.4, 8, dtype=torch.float64)
    counts = (values[:, None] - levels).abs().argmin(1).bincount(minlength=8).numpy()
    assert (values[:, None] - levels).abs().amin(1).max() < 1e-12, "only levels come out"
    p = np.exp(rqm_log_pmf(x, clip=1.0, margin=0.4, num_levels=8, keep_probability=0.6))
    assert (np.abs(counts - n * p) <= 5 * np.sqrt(n * p * (1 - p))).all()
    wrong = np.exp(rqm_log_pmf(x, clip=1.0, margin=0.4, num_levels=8, keep_probability=0.55))
    assert (np.abs(counts - n * wrong) > 5 * np.sqrt(n * wrong * (1 - wrong))).any()


def test_entries_within_the_clip_are_unbiased_and_others_are_clipped() -> None:
    x = torch.tensor([[-0.9, 0.0, 0.4, 1.0, 7.0, -math.inf, math.nan]])
    mean, error = mean_of_draws(RQM(clip=1.0), x, 4000)
    assert ((mean - torch.tensor([-0.9, 0.0, 0.4, 1.0, 1.0, -1.0, 0.0])).abs() <= 5 * error).all()
    assert not RQM(clip=1.0).unbiased, "clipping is not"
    assert RQM(clip=1.0).omega(7) is None


def test_summed_codes_decode_to_the_mean_of_rows() -> None:
    """What an aggregator does that sees nothing but the sum of the codes."""
    compressor = RQM(clip=1.0, num_levels=16, margin=0.5, num_shares=50)
    x = torch.rand(50, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    values = compressor.roundtrip(x, key(50)).values
    codes = ((values + 1.5) * 15 / 3).round().sum(0)
    assert codes.max() <= 50 * 15 < 2**10
    torch.testing.assert_close(-1.5 + 3 * codes / (50 * 15), values.mean(0))


def test_privacy_says_what_it_is_of_and_on_what_it_rests() -> None:
    compressor = RQM(clip=2.0, margin=2.0)
    one, whole = compressor.privacy(numel=1, delta=1e-6), compressor.privacy(numel=100, rounds=3, delta=1e-6)
    settings: dict[str, Any] = {"clip": 2.0, "margin": 2.0, "num_levels": 16, "keep_probability": 0.42}
    assert one.epsilon == rqm_epsilon(delta=1e-6, **settings)
    assert whole.epsilon == rqm_epsilon(delta=1e-6, releases=300, **settings) > 100
    assert (one.unit, whole.unit) == ("one coordinate of a device's updates", "one device's updates")
    assert one.adjacency == whole.adjacency == "replace-one"
    assert "3 update(s) of 100 entries, each entry a release of its own" in str(whole)
    assert "Nobody else is trusted" in str(one)
    assert "Secure aggregation" not in str(one)

    summed = RQM(clip=2.0, margin=2.0, num_shares=10).privacy(numel=1, delta=1e-6, sample_rate=0.1)
    assert summed.epsilon == rqm_epsilon(delta=1e-6, num_shares=10, **settings) < one.epsilon
    assert "sums over at least 10 honest devices" in str(summed)
    assert "found numerically, not proved" in str(summed)
    assert "counted as 1" in str(summed)


def test_other_compressors_promise_nothing() -> None:
    assert QSGD(num_levels=2).privacy(numel=10) is None
    base: Compressor = RQM(clip=1.0)
    assert base.privacy(numel=1) is not None


def test_built_from_a_configuration() -> None:
    built = build_from_yaml(
        Compressor, "class_path: groundwire.plugins.compression.RQM\ninit_args: {clip: 0.1, keep_probability: 0.57}"
    )
    assert isinstance(built, RQM)
    assert (built.margin, built.keep_probability) == (0.1, 0.57)
    assert repr(built) == "RQM(clip=0.1, num_levels=16, margin=0.1, keep_probability=0.57, num_shares=1, max_devices=1)"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_levels": 1}, "`num_levels` must be at least 2, got 1"),
        ({"margin": 0.0}, "`margin` must be positive and finite, got 0.0"),
        ({"keep_probability": 1.0}, r"`keep_probability` must be in \(0, 1\), got 1.0"),
        ({"clip": 0.0}, "`clip` must be positive and finite, got 0.0"),
        ({"num_shares": 0}, "`num_shares` must be at least 1, got 0"),
        ({"num_shares": 2**30}, "takes more than 32 bits"),
    ],
)
def test_bad_input_says_what_is_wrong(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RQM(**{"clip": 1.0, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"numel": 0}, "`numel` must be at least 1, got 0"),
        ({"rounds": 0}, "`rounds` must be at least 1, got 0"),
        ({"sample_rate": 0.0}, r"`sample_rate` is a probability in \(0, 1\], got 0.0"),
        ({"delta": 1.0}, r"`delta` must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_questions_about_privacy(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RQM(clip=1.0).privacy(**{"numel": 1, **settings})
