from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from matplotlib.patches import StepPatch

from groundwire.callbacks.reporting.channel_plots import draw_gains_db, law_density_db, plot_fading
from groundwire.plugins.channels import NoFading, PathLoss, Rayleigh, Rician
from groundwire.plugins.random import Key


def test_lines_are_the_gains_that_a_run_meets() -> None:
    fading = Rician(2.0, 3.0)
    _, (ax, _) = plot_fading(fading, num_devices=3, num_rounds=7, uses=4, seed=5)
    assert len(ax.lines) == 3
    for t in range(7):
        h = fading.gains(Key(seed=5, round=t, devices=(0, 1, 2)), 4)
        for m, line in enumerate(ax.lines):
            assert line.get_ydata()[t] == pytest.approx(20 * math.log10(float(h[m, 0].abs())), abs=1e-4)
    assert [line.get_label() for line in ax.lines] == ["device 0", "device 1", "device 2"]


def test_block_fading_has_one_gain_a_round() -> None:
    assert draw_gains_db(Rayleigh(block=True), 2, 3, uses=5).shape == (3, 2, 1)
    assert draw_gains_db(Rayleigh(), 2, 3, uses=5).shape == (3, 2, 5)


@pytest.mark.parametrize("k", [0.0, 5.0])
def test_the_density_is_that_of_the_law_in_decibels(k: float) -> None:
    fading = Rician(k, 2.0)
    edges = np.linspace(-20, 10, 61)
    law = scipy.stats.ncx2(2, 2 * k, scale=2.0 / (2 * (k + 1)))
    middle = 10 ** ((edges[1:] + edges[:-1]) / 20)
    expected = law.pdf(middle) * middle * math.log(10) / 10  # dx = x ln(10) / 10 d(dB)
    found = law_density_db(fading, edges, num_devices=3)
    np.testing.assert_allclose(found, expected, atol=2e-3 * expected.max() + 2e-3)
    assert np.sum(found) * 0.5 == pytest.approx(law.cdf(10) - law.cdf(0.01), abs=1e-9)


@pytest.mark.parametrize(
    "fading", [Rayleigh(), Rician(4.0, 0.5), Rayleigh(block=True, path_loss=PathLoss(3.0, 20.0, 100.0)), NoFading(2.0)]
)
def test_the_histogram_lies_beside_the_density(fading: Any) -> None:
    _, (_, ax) = plot_fading(fading, num_devices=4, num_rounds=400, uses=5, num_bins=20)
    (patch,) = (one for one in ax.patches if isinstance(one, StepPatch))
    heights, edges, _ = patch.get_data()
    width = edges[1] - edges[0]
    assert np.sum(heights) * width == pytest.approx(1.0)
    (line,) = ax.lines
    expected = np.asarray(line.get_xdata())
    assert np.sum(expected) * width == pytest.approx(1.0, abs=0.01)
    n = 400 * 4 * (1 if fading.block else 5)
    spread = np.sqrt(np.maximum(expected * width, 1 / n) / n) / width
    assert (np.abs(heights - expected) < 5 * spread).all()


def test_axes_have_words_and_units_and_the_threshold_is_drawn(tmp_path: Path) -> None:
    fig, (rounds, histogram) = plot_fading(Rayleigh(), 12, 10, threshold=0.1, title="Rayleigh fading")
    assert rounds.get_xlabel() == "Round"
    assert rounds.get_ylabel() == "Channel gain $|h|^2$ (dB)"
    assert histogram.get_xlabel() == "Density (per dB)"
    for ax in (rounds, histogram):
        assert list(ax.lines[-1].get_ydata()) == pytest.approx([-10, -10])
    assert rounds.get_legend() is None  # of twelve devices
    assert fig.get_suptitle() == "Rayleigh fading"
    fig.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_devices": 0}, "`num_devices` must be at least 1, got 0"),
        ({"num_rounds": 0}, "`num_rounds` must be at least 1, got 0"),
        ({"uses": 0}, "`uses` must be at least 1, got 0"),
        ({"num_bins": 0}, "`num_bins` must be at least 1, got 0"),
        ({"threshold": 0.0}, "`threshold`, on .* must be > 0 to be drawn in dB, got 0.0"),
    ],
)
def test_bad_input_by_message(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_fading(Rayleigh(), **kwargs)
