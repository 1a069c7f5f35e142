from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from scipy.stats import binomtest
from torch import Tensor

from groundwire.callbacks.adversarial import (
    RobustnessResult,
    ThreatModel,
    plot_accuracy_against_eps,
    plot_adversarial_examples,
)
from groundwire.callbacks.adversarial.evaluation import Examples
from groundwire.callbacks.reporting.pictures import log_picture

N = 40
RIGHT = {0.0: 38, 0.05: 30, 0.1: 20, 0.4: 1}


def result(right: dict[float, int] | None = None, classes: int = 4, **threat: Any) -> RobustnessResult:
    sweep = {eps: torch.arange(N) < k for eps, k in (RIGHT if right is None else right).items()}
    clean = torch.arange(N) < 38
    return RobustnessResult(
        threat=ThreatModel(**{"eps": 0.1} | threat),
        num_classes=classes,
        input_size=30,
        seed=0,
        worst_case=clean,
        survived={"clean": clean},
        sweep=sweep,
    )


def examples(n: int = 3, channels: int = 1, lo: float = 0.0, hi: float = 1.0) -> Examples:
    clean = torch.rand(n, channels, 5, 6, generator=torch.Generator().manual_seed(0))
    moved = (clean + 0.1 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1)).sign()).clamp(0, 1)
    label = torch.arange(n)
    scaled = (lo + (hi - lo) * part for part in (clean, moved))
    return Examples(*scaled, label, label, torch.where(label == 1, 9, label), lo=lo, hi=hi)


# ---------------------------------------------------------------- accuracy against the radius


def test_the_curve_is_the_sweep_with_wilson_intervals() -> None:
    fig, ax = plot_accuracy_against_eps({"net": result()})
    assert isinstance(fig, Figure)
    assert ax in fig.axes
    (line,) = (one for one in ax.lines if one.get_label() == "net")
    assert np.asarray(line.get_xdata()).tolist() == list(RIGHT)
    assert np.asarray(line.get_ydata()).tolist() == [k / N for k in RIGHT.values()]
    (band,) = ax.collections
    corners = {(round(float(x), 6), round(float(y), 6)) for x, y in band.get_paths()[0].vertices}
    for eps, k in RIGHT.items():
        interval = binomtest(k, N).proportion_ci(method="wilson")
        assert {(eps, round(interval.low, 6)), (eps, round(interval.high, 6))} <= corners
    assert to_rgba(band.get_facecolor()[0])[:3] == to_rgba(line.get_color())[:3]  # type: ignore[arg-type,index]


@pytest.mark.parametrize("classes", [2, 10])
def test_the_chance_level_and_eps_are_marked(classes: int) -> None:
    _, ax = plot_accuracy_against_eps({"net": result(classes=classes)})
    (chance,) = (one for one in ax.lines if one.get_label() == "chance")
    assert list(chance.get_ydata()) == [1 / classes] * 2
    marks = [one for one in ax.lines if list(one.get_xdata()) == [0.1, 0.1]]
    assert len(marks) == 1


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_axes_are_labelled_with_their_units(norm: Any) -> None:
    fig, ax = plot_accuracy_against_eps({"one": result(norm=norm), "two": result(norm=norm)})
    assert ax.get_xlabel() == f"Radius of the {norm} ball (pixel units)"
    assert ax.get_ylabel().endswith("(%)")
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["one", "two", "chance"]
    fig.draw_without_rendering()
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0", "0.05", "0.1", "0.4"]
    assert "50" in [text.get_text() for text in ax.get_yticklabels()] or "40" in [
        text.get_text() for text in ax.get_yticklabels()
    ], "percent"
    assert ax.get_ylim()[0] == 0


def test_it_draws_into_given_axes(tmp_path: Path) -> None:
    fig, ax = plot_accuracy_against_eps({"a": result()})
    assert plot_accuracy_against_eps({"b": result()}, ax=ax) == (fig, ax)
    fig.savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.parametrize("right", [{0.0: 38}, {0.1: 20}, {0.05: 30, 0.1: 20}])
def test_short_sweeps_are_drawn(right: dict[float, int]) -> None:
    fig, _ = plot_accuracy_against_eps({"a": result(right)})
    fig.draw_without_rendering()


@pytest.mark.parametrize("results", [{}, {"a": result({})}, {"a": result(), "b": result({})}], ids=["no", "a", "b"])
def test_nothing_to_plot_is_refused(results: dict[str, RobustnessResult]) -> None:
    with pytest.raises(ValueError, match="nothing to plot: give at least one result, each with a sweep"):
        plot_accuracy_against_eps(results)


# ---------------------------------------------------------------- examples


def drawn(axes: Any, row: int, column: int) -> Tensor:
    (image,) = axes[row, column].images
    assert image.get_clim() == (0.0, 1.0)
    found = torch.as_tensor(np.asarray(image.get_array()))
    return found if found.ndim == 3 else found[..., None]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("lo", "hi"), [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)])
def test_images_are_drawn_from_black_to_white_whatever_their_box(channels: int, lo: float, hi: float) -> None:
    unit, shown = examples(channels=channels), examples(channels=channels, lo=lo, hi=hi)
    fig, axes = plot_adversarial_examples(shown)
    assert isinstance(fig, Figure)
    assert axes.shape == (3, 3)
    for column in range(3):
        torch.testing.assert_close(drawn(axes, 0, column), unit.clean[column].permute(1, 2, 0), rtol=0, atol=1e-5)
        torch.testing.assert_close(drawn(axes, 2, column), unit.adversarial[column].permute(1, 2, 0), rtol=0, atol=1e-5)
        change = (unit.adversarial - unit.clean)[column].permute(1, 2, 0)
        expected = 0.5 + 0.5 * change / (unit.adversarial - unit.clean).abs().max()
        torch.testing.assert_close(drawn(axes, 1, column), expected, rtol=0, atol=1e-4)
    largest = 0.1 * (hi - lo)
    assert f"+{largest:.2g}" in axes[1, 0].get_ylabel()
    assert (axes[0, 0].get_ylabel(), axes[2, 0].get_ylabel()) == ("clean", "adversarial")


def test_labels_say_what_the_network_says_and_mark_mistakes() -> None:
    _, axes = plot_adversarial_examples(examples(), class_names=[f"class {i}" for i in range(10)])
    assert [ax.get_title() for ax in axes[0]] == ["class 0", "class 1", "class 2"]
    assert [ax.get_title() for ax in axes[2]] == ["class 0", "class 9", "class 2"]
    colors = [to_rgba(ax.title.get_color()) for ax in axes[2]]
    assert colors[0] == colors[2] != colors[1]
    _, axes = plot_adversarial_examples(examples(n=1))
    assert axes.shape == (3, 1)
    assert axes[0, 0].get_title() == "0"


def test_no_change_is_grey() -> None:
    one = examples(n=1)
    _, axes = plot_adversarial_examples(Examples(one.clean, one.clean, one.target, one.target, one.target))
    assert (drawn(axes, 1, 0) == 0.5).all()


@pytest.mark.parametrize("shape", [(0, 1, 8, 8), (2, 64), (2, 2, 8, 8), (2, 8, 8)])
def test_what_is_no_image_is_refused(shape: tuple[int, ...]) -> None:
    x, label = torch.zeros(shape), torch.zeros(shape[0], dtype=torch.int64)
    with pytest.raises(ValueError, match=r"Images .* are needed, got shape"):
        plot_adversarial_examples(Examples(x, x, label, label, label))


# ---------------------------------------------------------------- for loggers


def test_pictures_go_to_loggers_that_take_them(tmp_path: Path) -> None:
    class Images:
        def __init__(self) -> None:
            self.found: dict[str, list[str]] = {}

        def log_image(self, key: str, images: list[str]) -> None:
            self.found[key] = images

    class Figures:
        def __init__(self) -> None:
            self.experiment = self
            self.found: dict[str, tuple[Figure, int]] = {}

        def add_figure(self, key: str, figure: Figure, global_step: int) -> None:
            self.found[key] = (figure, global_step)

    figure, _ = plot_accuracy_against_eps({"a": result()})
    images, figures = Images(), Figures()
    for logger in (images, figures, object()):
        log_picture(logger, "a/b", tmp_path / "x.png", figure, 7)
    assert images.found == {"a/b": [str(tmp_path / "x.png")]}
    assert figures.found == {"a/b": (figure, 7)}
