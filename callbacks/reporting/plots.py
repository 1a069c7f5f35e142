"""Plots from numbers: each function takes arrays and gives ``(fig, ax)``; nothing is shown, nothing is global."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

Array = npt.NDArray[np.float64]
Curve = tuple[npt.ArrayLike, npt.ArrayLike]
_TITLE_WIDTH = 72  # characters of a line above a plot of the usual size

LABELS = {
    "round": "Round",
    "uplink/bits_cumulative": "Uplink traffic, all devices, cumulative (bits)",
    "uplink/channel_uses_cumulative": "Channel uses, cumulative",
    "uplink/energy_cumulative": "Transmit energy, all devices, cumulative (noise variances x channel uses)",
    "downlink/bits_cumulative": "Downlink traffic, cumulative (bits)",
    "train/loss": "Training loss (nats)",
    "val/loss": "Validation loss (nats)",
    "test/loss": "Test loss (nats)",
    "val/acc": "Validation accuracy (%)",
    "test/acc": "Test accuracy (%)",
}


def axis_label(name: str) -> str:
    """The words and the unit for a metric's axis: the metric's own name where none are known."""
    return LABELS.get(name, name)


def mean_and_spread(values: npt.ArrayLike) -> tuple[Array, Array]:
    """Mean and sample standard deviation over the first axis (the seeds).

    Args:
        values: Shape ``(seeds, ...)``, at least one seed.

    Returns:
        Two arrays of shape ``(...)``; the deviation is zero for one seed.

    Example:
        >>> mean, spread = mean_and_spread([[1.0, 2.0], [3.0, 2.0]])
        >>> mean.tolist(), spread.round(3).tolist()
        ([2.0, 2.0], [1.414, 0.0])
    """
    array = np.asarray(values, dtype=np.float64)
    spread = array.std(axis=0, ddof=1) if len(array) > 1 else np.zeros(array.shape[1:])
    return array.mean(axis=0), spread


def plot_curves(
    curves: Mapping[str, Sequence[Curve]],
    *,
    x: str = "round",
    y: str = "val/acc",
    title: str | None = None,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Learning curves: per label a line, the mean over seeds, in a band of one standard deviation to each side.

    Args:
        curves: Per label one ``(x, y)`` per seed, both of shape ``(points,)``. Where seeds have differing lengths, the
            points that all of them have are drawn. Abscissas that differ between seeds are averaged as well.
        x: Name of the abscissa, for its label and scale.
        y: Name of the ordinate; names that end in ``acc`` are fractions and are drawn in percent.
        title: Title of the axes.
        ax: Axes to draw into; a new figure where None.

    Returns:
        The figure and its axes.

    Raises:
        ValueError: If there is no curve, or a label has no seed.
    """
    _need(curves)
    fig, ax = figure_and_axes(ax)
    seeds = max(len(of_label) for of_label in curves.values())
    for label, of_label in curves.items():
        points = min(np.size(ys) for _, ys in of_label)
        xs, _ = mean_and_spread([np.asarray(one, dtype=np.float64)[:points] for one, _ in of_label])
        mean, spread = mean_and_spread([np.asarray(one, dtype=np.float64)[:points] for _, one in of_label])
        (line,) = ax.plot(xs, mean, label=label, linewidth=1.5)
        if len(of_label) > 1:
            ax.fill_between(xs, mean - spread, mean + spread, color=line.get_color(), alpha=0.2, linewidth=0)
    _dress(ax, x=x, y=y, title=title, seeds=seeds)
    if x != "round":
        ax.xaxis.set_major_formatter(EngFormatter())
    return fig, ax


def plot_sweep(
    points: Mapping[str, Mapping[float, Sequence[float]]],
    *,
    x: str,
    y: str = "test/acc",
    log_x: bool = False,
    title: str | None = None,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """A final metric against a setting: per label a line through the means, with error bars of one standard deviation.

    Args:
        points: Per label and value of the setting, the metric of each seed. A label whose only value is NaN does not
            depend on the setting and is drawn as a dashed level.
        x: Name of the setting, for its label.
        y: Name of the metric; names that end in ``acc`` are fractions and are drawn in percent.
        log_x: Whether the abscissa is logarithmic.
        title: Title of the axes.
        ax: Axes to draw into; a new figure where None.

    Returns:
        The figure and its axes.

    Raises:
        ValueError: If there is no point.
    """
    _need(points)
    fig, ax = figure_and_axes(ax)
    seeds = 1
    for label, by_value in points.items():
        values = sorted(by_value)
        stats = [mean_and_spread(by_value[value]) for value in values]
        seeds = max(seeds, *(len(by_value[value]) for value in values))
        if len(values) == 1 and np.isnan(values[0]):
            ax.axhline(float(stats[0][0]), linestyle="--", color="0.4", label=label)
        else:
            ax.errorbar(
                values, [float(m) for m, _ in stats], [float(s) for _, s in stats], marker="o", capsize=3, label=label
            )
    if log_x:
        ax.set_xscale("log")
    _dress(ax, x=x, y=y, title=title, seeds=seeds)
    return fig, ax


def _need(what: Mapping[str, object]) -> None:
    if not what or not all(what.values()):
        raise ValueError(f"There is nothing to plot: {dict(what)}.")


def figure_and_axes(ax: Axes | None) -> tuple[Figure, Axes]:
    """``ax`` and the figure it is in, or axes of a new figure where None."""
    if ax is None:
        ax = Figure(figsize=(7, 4.5), layout="constrained").subplots()
    fig = ax.get_figure(root=True)
    assert isinstance(fig, Figure)
    return fig, ax


def _dress(ax: Axes, *, x: str, y: str, title: str | None, seeds: int) -> None:
    ax.set_xlabel(axis_label(x))
    ax.set_ylabel(axis_label(y))
    if y.endswith("acc"):
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    ax.grid(alpha=0.3)
    spread = f"mean ± std, {seeds} seeds" if seeds > 1 else None
    ax.legend(title=spread, title_fontsize="small")
    if title:
        ax.set_title("\n".join(textwrap.wrap(title, _TITLE_WIDTH)))
