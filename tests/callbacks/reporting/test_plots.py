from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import PolyCollection

from groundwire.callbacks.reporting import plot_curves, plot_sweep
from groundwire.callbacks.reporting.plots import mean_and_spread


def test_the_line_is_the_mean_over_seeds_and_the_band_one_standard_deviation_wide() -> None:
    seeds = [([10, 20], [0.2, 0.6]), ([10, 20], [0.4, 0.8]), ([10, 20], [0.6, 0.4])]
    _, ax = plot_curves({"a": seeds}, x="round", y="val/acc")
    (line,) = ax.lines
    assert np.allclose(line.get_ydata(), [0.4, 0.6])
    (band,) = (one for one in ax.collections if isinstance(one, PolyCollection))
    ys = band.get_paths()[0].vertices[:, 1]
    assert ys.min() == pytest.approx(0.2)  # 0.4 - std([0.2, 0.4, 0.6]), and 0.6 - 0.2 at the other point
    assert ys.max() == pytest.approx(0.8)


def test_axes_have_words_and_units() -> None:
    _, ax = plot_curves({"a": [([1e3, 2e6], [0.1, 0.2])]}, x="uplink/bits_cumulative", y="val/acc", title="t")
    assert ax.get_xlabel().endswith("(bits)")
    assert ax.get_ylabel() == "Validation accuracy (%)"
    assert ax.get_title() == "t"


def test_one_seed_has_no_band_and_seeds_of_differing_length_are_cut() -> None:
    _, ax = plot_curves({"one": [([1, 2], [0, 1])], "two": [([1, 2, 3], [0, 1, 2]), ([1, 2], [0, 3])]}, y="val/loss")
    assert len(ax.collections) == 1
    assert ax.lines[1].get_ydata().tolist() == [0, 2]


def test_plots_draw_into_given_axes_and_into_files(tmp_path: Path) -> None:
    fig, ax = plot_curves({"a": [([1, 2], [0, 1])]})
    again, _ = plot_curves({"b": [([1, 2], [1, 0])]}, ax=ax)
    assert again is fig
    fig.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_sweep_has_error_bars_and_levels() -> None:
    points = {"a": {1.0: [0.1, 0.3], 10.0: [0.5, 0.5]}, "level": {math.nan: [0.9, 0.7]}}
    _, ax = plot_sweep(points, x="Power", log_x=True)
    assert ax.get_xscale() == "log"
    assert ax.containers[0].lines[0].get_ydata().tolist() == pytest.approx([0.2, 0.5])
    assert ax.lines[-1].get_ydata() == pytest.approx([0.8, 0.8])


@pytest.mark.parametrize("nothing", [{}, {"a": []}])
def test_nothing_to_plot_is_an_error(nothing: dict[str, list[object]]) -> None:
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_curves(nothing)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_sweep(nothing, x="x")  # type: ignore[arg-type]


def test_the_spread_is_the_sample_standard_deviation() -> None:
    values = np.random.default_rng(0).normal(size=(5, 3))
    mean, spread = mean_and_spread(values)
    assert np.allclose(mean, sum(values) / 5)
    assert np.allclose(spread, np.sqrt(((values - mean) ** 2).sum(0) / 4))
