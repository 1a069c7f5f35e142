from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, to_rgba
from matplotlib.lines import Line2D
from matplotlib.text import Annotation

from groundwire.callbacks.information.plots import plot_centroids, plot_cmi_evolution, plot_simplex

NAN, INF = math.nan, math.inf


def by_label(ax: Axes, label: str) -> Line2D:
    (line,) = (one for one in ax.lines if one.get_label() == label)
    return line


def points(line: Line2D) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in line.get_xydata()]  # type: ignore[union-attr]


def iso_lines(ax: Axes) -> list[Line2D]:
    return [line for line in ax.lines if line.get_linestyle() == "--"]


def distributions(n: int, classes: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.random.default_rng(seed).dirichlet(np.ones(classes), n)


# ---------------------------------------------------------------- evolution


def test_a_path_is_its_points_with_a_hollow_start_and_a_filled_end() -> None:
    runs = {"CE": ([0.5, 2.0, 4.0], [0.3, 0.2, 0.1]), "CMIC": ([0.6, 3.0], [0.2, 0.05])}
    _, ax = plot_cmi_evolution(runs, title="t")
    for label, (gamma, cmi) in runs.items():
        path = by_label(ax, label)
        assert points(path) == list(zip(gamma, cmi, strict=True))
        ends = [
            one for one in ax.lines if one.get_marker() == "o" and to_rgba(one.get_color()) == to_rgba(path.get_color())
        ]
        start, end = ends
        assert points(start) == [(gamma[0], cmi[0])]
        assert start.get_markerfacecolor() == "none"
        assert points(end) == [(gamma[-1], cmi[-1])]
        assert to_rgba(end.get_markerfacecolor()) == to_rgba(path.get_color())
    assert by_label(ax, "CE").get_color() != by_label(ax, "CMIC").get_color()
    assert "Γ" in ax.get_xlabel()
    assert "CMI" in ax.get_ylabel()
    assert ax.get_xlabel().endswith("(nats)")
    assert ax.get_ylabel().endswith("(nats)")
    assert ax.get_title() == "t"


@pytest.mark.parametrize(
    ("gamma", "cmi"),
    [
        ([0.5, 2.0, 4.0], [0.3, 0.2, 0.1]),  # a factor of 24 in NCMI
        ([3.0, 3.5, 4.0], [0.2, 0.18, 0.16]),  # less than two
        ([2.0], [0.06]),
        ([1e-4, 5.0], [1.0, 1e-3]),  # eight powers of ten
    ],
)
def test_iso_lines_have_the_slope_they_name_and_stay_within_the_axes(gamma: list[float], cmi: list[float]) -> None:
    fig, ax = plot_cmi_evolution({"a": (gamma, cmi)})
    fig.draw_without_rendering()
    lines = iso_lines(ax)
    assert 1 <= len(lines) <= 6
    named = [float(text.get_text().removeprefix("NCMI ")) for text in ax.texts]
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    for line, ncmi, text in zip(lines, named, ax.texts, strict=True):
        (x0, y0), (x1, y1) = points(line)
        assert (y1 - y0) / (x1 - x0) == pytest.approx(ncmi, rel=5e-3)
        assert y1 / x1 == pytest.approx(ncmi, rel=5e-3), "through the origin: constant CMI / Γ"
        assert left - 1e-9 <= min(x0, x1) < max(x0, x1) <= right + 1e-9
        assert bottom - 1e-9 <= min(y0, y1) < max(y0, y1) <= top + 1e-9
        assert isinstance(text, Annotation)
        assert text.xy == pytest.approx((x1, y1))
    ratios = np.divide(cmi, gamma)
    assert min(named) < 10 * ratios.max()
    assert max(named) > ratios.min() / 10


def test_without_positive_numbers_there_are_no_iso_lines() -> None:
    _, ax = plot_cmi_evolution({"a": ([0.0, 1.0], [0.5, 0.0])})
    assert not iso_lines(ax)
    assert not ax.texts


def test_points_that_are_not_finite_are_left_out() -> None:
    _, ax = plot_cmi_evolution({"a": ([NAN, 1.0, 2.0, 3.0, 4.0], [0.1, 0.2, INF, 0.3, NAN])})
    assert points(by_label(ax, "a")) == [(1.0, 0.2), (3.0, 0.3)]
    assert [points(line) for line in ax.lines if line.get_marker() == "o"] == [[(1.0, 0.2)], [(3.0, 0.3)]]


def test_the_final_accuracy_is_in_the_legend() -> None:
    runs = {"CE": ([1.0, 2.0], [0.2, 0.1]), "other": ([1.0, 2.0], [0.3, 0.1])}
    _, ax = plot_cmi_evolution(runs, accuracy={"CE": [0.1, 0.8651]})
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["CE (86.5 %)", "other"]


@pytest.mark.parametrize(
    ("runs", "accuracy", "message"),
    [
        ({}, None, "nothing to plot: `runs` is empty"),
        ({"a": ([], [])}, None, "nothing to plot of run 'a': none of its 0 points"),
        ({"b": ([1.0], [0.1]), "a": ([NAN, 1.0], [1.0, INF])}, None, "run 'a': none of its 2 points is finite"),
        ({"a": ([1.0, 2.0], [0.1])}, None, r"two sequences of equal length, got shapes \(2,\) and \(1,\)"),
        ({"a": ([1.0], [0.1])}, {"b": [0.5]}, r"`accuracy` has \['b'\], but the runs are \['a'\]"),
        ({"a": ([1.0], [0.1])}, {"a": [86.5]}, r"fraction in \[0, 1\], got 86.5: divide percent by 100"),
        ({"a": ([1.0], [0.1])}, {"a": []}, "got nothing"),
        ({"a": ([1.0], [0.1])}, {"a": [NAN]}, "got nan"),
    ],
)
def test_bad_runs_by_message(runs: Any, accuracy: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_cmi_evolution(runs, accuracy=accuracy)


# ---------------------------------------------------------------- centroids


@pytest.mark.parametrize("classes", [2, 10, 12, 13])
def test_the_heat_map_is_the_matrix_on_a_logarithmic_scale(classes: int) -> None:
    q = distributions(classes, classes)
    q[0] = np.eye(classes)[0]  # zeros have a colour as well
    fig, ax = plot_centroids(q, title="t")
    (image,) = ax.images
    assert np.array_equal(np.asarray(image.get_array()), q)
    assert isinstance(image.norm, LogNorm)
    assert image.get_clim() == (1e-4, 1.0)
    assert image.norm(1e-2) == pytest.approx(0.5)  # halfway from 1e-4 to 1
    zero, floor = image.to_rgba(np.array([[0.0, 1e-4]]))[0]
    assert np.allclose(zero, floor)
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("output", "class", "t")
    bars = [one for one in fig.axes if one is not ax]
    assert [bar.get_ylabel() for bar in bars] == ["mean output probability"]
    assert len(ax.texts) == (classes**2 if classes <= 12 else 0)
    for text in ax.texts:
        column, row = (int(part) for part in text.get_position())
        assert float(text.get_text()) == pytest.approx(q[row, column], abs=0.005)


def test_small_numbers_are_not_hidden_by_rounding() -> None:
    _, ax = plot_centroids([[0.997, 0.003], [0.0, 1.0]])
    assert [text.get_text() for text in ax.texts] == ["1.00", "3e-3", "0", "1.00"]


def test_classes_are_named() -> None:
    _, ax = plot_centroids(np.eye(3), class_names=["cat", "dog", "owl"])
    for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["cat", "dog", "owl"]


@pytest.mark.parametrize(
    ("centroids", "names", "message"),
    [
        ([[0.5, 0.5]], None, r"one row a class, shape \(C, C\), got \(1, 2\)"),
        ([1.0], None, r"one distribution a row, got shape \(1,\)"),
        ([[1.0, 0.0], [0.5, 0.502]], None, r"Row 1 of `centroids` is not a distribution: its sum is 1\.002.*softmax"),
        ([[1.5, -0.5], [0.0, 1.0]], None, r"Row 0 .* smallest entry -0\.5"),
        ([[1.0, 0.0], [NAN, 1.0]], None, "Row 1 .* its sum is nan"),
        (np.eye(2), ["a"], "one name for each of 2 classes, got 1"),
    ],
)
def test_bad_centroids_by_message(centroids: Any, names: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_centroids(centroids, class_names=names)


def test_rows_may_be_off_by_rounding() -> None:
    plot_centroids([[1.0, 0.0009], [0.0, 0.9991]])


# ---------------------------------------------------------------- simplex


def offsets(ax: Axes, index: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.asarray(ax.collections[index].get_offsets())


@pytest.mark.parametrize("classes", [2, 3, 4, 10, 25])
def test_corners_are_a_regular_polygon_and_certain_outputs_lie_on_them(classes: int) -> None:
    _, ax = plot_simplex(np.eye(classes), np.arange(classes))
    drawn = offsets(ax, 0)
    markers = np.array([points(line)[0] for line in ax.lines])
    assert np.allclose(drawn, markers), "a one-hot output lies on its corner"
    assert np.allclose(np.hypot(*drawn.T), 1)
    assert drawn[0] == pytest.approx([0, 1])
    sides = np.hypot(*(drawn - np.roll(drawn, 1, axis=0)).T)
    assert np.allclose(sides, 2 * math.sin(math.pi / classes))  # of the regular polygon in the unit circle
    for text, corner in zip(ax.texts, drawn, strict=True):
        assert np.allclose(np.asarray(text.get_position()) / 1.1, corner)
    assert [text.get_text() for text in ax.texts] == [str(c) for c in range(classes)]


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_the_uniform_distribution_is_the_centre(classes: int) -> None:
    _, ax = plot_simplex(np.full((1, classes), 1 / classes), [0])
    assert offsets(ax, 0) == pytest.approx(np.zeros((1, 2)), abs=1e-12)


def test_three_classes_are_the_simplex_itself() -> None:
    p = distributions(50, 3)
    _, ax = plot_simplex(p, np.zeros(50, dtype=np.int64))
    flat = offsets(ax, 0)
    in_space = np.linalg.norm(p[:, None] - p[None], axis=-1)
    in_plane = np.linalg.norm(flat[:, None] - flat[None], axis=-1)
    assert np.allclose(in_plane, in_space * math.sqrt(1.5))  # the side is sqrt(3) instead of sqrt(2)


def test_four_classes_may_coincide_as_the_docstring_says() -> None:
    _, ax = plot_simplex([[0.5, 0.0, 0.5, 0.0], [0.25] * 4], [0, 1])
    assert np.allclose(*offsets(ax, 0))


def test_points_have_the_colour_of_their_class_and_centroids_are_of_all_samples() -> None:
    p, labels = distributions(90, 5), np.arange(90) % 4  # no sample of class 4
    _, ax = plot_simplex(p, labels, max_points=20)
    colors = [to_rgba(text.get_color()) for text in ax.texts]
    corners = np.array([points(line)[0] for line in ax.lines])
    assert [to_rgba(line.get_color()) for line in ax.lines] == colors
    everything = {tuple(np.round(row, 9)): label for row, label in zip(p @ corners, labels, strict=True)}
    drawn = [everything[tuple(np.round(row, 9))] for row in offsets(ax, 0)]
    assert len(drawn) == 20
    assert np.bincount(drawn).tolist() == [5, 5, 5, 5], "evenly, although the labels repeat with a period"
    for label, color in zip(drawn, ax.collections[0].get_facecolor(), strict=True):  # type: ignore[arg-type]
        assert tuple(color[:3]) == pytest.approx(colors[label][:3])
    means = [sum(p[i] @ corners for i in range(90) if labels[i] == c) / np.sum(labels == c) for c in range(4)]
    assert np.allclose(offsets(ax, 1), means)
    assert ax.collections[1].get_sizes().min() > 4 * ax.collections[0].get_sizes().max()  # type: ignore[attr-defined]


def test_points_are_the_same_each_time_and_all_of_few() -> None:
    p, labels = distributions(500, 3), np.arange(500) % 3
    first, again = (offsets(plot_simplex(p, labels, max_points=7)[1], 0) for _ in range(2))
    assert np.array_equal(first, again)
    _, ax = plot_simplex(p, labels)
    assert len(offsets(ax, 0)) == 500


@pytest.mark.parametrize(
    ("probs", "labels", "options", "message"),
    [
        ([[1.0]], [0], {}, r"at least 2 classes, shape \(n, C\), got \(1, 1\)"),
        (np.zeros((0, 3)), [], {}, r"one distribution a row, got shape \(0, 3\)"),
        ([[2.0, -3.0]], [0], {}, "Row 0 of `probs` is not a distribution: its sum is -1 .*apply softmax"),
        ([[0.5, 0.5]], [0, 1], {}, r"`labels` must be 1 integers, one a row of `probs`, got int64 \(2,\)"),
        ([[0.5, 0.5]], [0.0], {}, "got float64"),
        ([[0.5, 0.5]], [2], {}, r"`labels` must be in \[0, 2\), got 2 to 2"),
        ([[0.5, 0.5]], [-1], {}, "got -1 to -1"),
        ([[0.5, 0.5]], [0], {"max_points": 0}, "`max_points` must be at least 1, got 0"),
        ([[0.5, 0.5]], [0], {"class_names": ["a", "b", "c"]}, "one name for each of 2 classes, got 3"),
    ],
)
def test_bad_outputs_by_message(probs: Any, labels: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_simplex(probs, labels, **options)


# ---------------------------------------------------------------- all


def test_plots_draw_into_given_axes_and_into_files(tmp_path: Path) -> None:
    fig, ax = plot_cmi_evolution({"a": ([1.0, 2.0], [0.2, 0.1])})
    assert plot_cmi_evolution({"b": ([1.0, 3.0], [0.2, 0.1])}, ax=ax) == (fig, ax)
    p, labels = distributions(30, 3), np.arange(30) % 3
    for number, (figure, axes) in enumerate(
        [(fig, ax), plot_centroids(np.eye(3)), plot_simplex(p, labels, title="t", class_names=["x", "y", "z"])]
    ):
        assert axes in figure.axes
        figure.savefig(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 1000


def test_tensors_are_taken_as_they_are() -> None:
    torch = pytest.importorskip("torch")
    _, ax = plot_simplex(torch.eye(3), torch.arange(3))
    assert len(offsets(ax, 0)) == 3
    plot_centroids(torch.eye(3, dtype=torch.float32))
