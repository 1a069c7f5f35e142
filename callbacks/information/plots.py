"""Pictures of output distributions: how concentrated each class is, and how far the classes are apart.

Each function takes numbers and gives ``(fig, ax)``; nothing is shown, nothing is global.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Polygon
from matplotlib.ticker import MaxNLocator

from groundwire.callbacks.reporting.plots import Array, figure_and_axes

TOLERANCE = 1e-3  # of a distribution's sum
FLOOR = 1e-4  # probabilities below have the colour of this one
_GREY = "0.45"
_OUTSIDE = 1.1  # radius of the corners' names


def plot_cmi_evolution(
    runs: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    accuracy: Mapping[str, Sequence[float]] | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """The path of each training run through the plane of Γ and CMI: down is concentrated, right is separated.

    A hollow circle marks the first epoch, a filled one the last. Dashed lines join points of equal NCMI = CMI / Γ;
    they span the axes as they are when this is called. Epochs in which either number is not finite are left out.

    Args:
        runs: Per label ``(gamma, cmi)``, both in nats and of shape ``(epochs,)``.
        accuracy: Per label the accuracy of each epoch, a fraction in [0, 1]; the last one is written into the legend.
            Labels may be missing.
        title: Title of the axes.
        ax: Axes to draw into; a new figure where None.

    Returns:
        The figure and its axes.

    Raises:
        ValueError: If there is no run, a run has no finite point or unequally many values of the two, or ``accuracy``
            names an unknown run, is empty for one, or is no fraction.

    Reference:
        Yang et al., "Conditional Mutual Information Constrained Deep Learning for Classification", 2023, the figures
        of the evolution of CMI and Γ during training. arXiv:2309.09123

    Example:
        >>> fig, ax = plot_cmi_evolution({"CE": ([0.5, 2.0, 4.0], [0.3, 0.2, 0.1])}, accuracy={"CE": [0.5, 0.7, 0.865]})
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['CE (86.5 %)']
    """
    paths = {label: _path(label, gamma, cmi) for label, (gamma, cmi) in runs.items()}
    if not paths:
        raise ValueError("There is nothing to plot: `runs` is empty. Give (gamma, cmi) of at least one run.")
    final = _final_accuracy(accuracy or {}, paths)
    fig, ax = figure_and_axes(ax)
    for label, (gamma, cmi) in paths.items():
        name = f"{label} ({100 * final[label]:.1f} %)" if label in final else label
        (line,) = ax.plot(gamma, cmi, label=name, linewidth=1.2, marker=".", markersize=4)
        color = line.get_color()
        ax.plot(gamma[:1], cmi[:1], linestyle="", marker="o", markersize=8, color=color, markerfacecolor="none")
        ax.plot(gamma[-1:], cmi[-1:], linestyle="", marker="o", markersize=8, color=color)
    _draw_iso_lines(ax, list(paths.values()))
    ax.set_xlabel("Γ, separation of the classes (nats)")
    ax.set_ylabel("CMI, spread within the classes (nats)")
    ax.legend(title="○ first epoch   ● last epoch", title_fontsize="small")
    if title:
        ax.set_title(title)
    return fig, ax


def plot_centroids(
    centroids: npt.ArrayLike,
    *,
    class_names: Sequence[str] | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Heat map of the class centroids: what the network says of each class on average, on a logarithmic scale.

    The scale goes from 1e-4 to 1; smaller probabilities, zero among them, have the colour of 1e-4. Up to 12 classes,
    the numbers are in the cells.

    Args:
        centroids: Shape ``(C, C)``: row ``c`` is the mean output distribution of the samples of class ``c``.
        class_names: Names of the classes; by default their numbers.
        title: Title of the axes.
        ax: Axes to draw into; a new figure where None.

    Returns:
        The figure and its axes, to which a colour bar is attached.

    Raises:
        ValueError: If ``centroids`` is not square, a row is not a distribution (to 1e-3), or there are not ``C`` names.

    Reference:
        Yang et al., 2023: the centroids ``Q`` of its definition of CMI. arXiv:2309.09123

    Example:
        >>> fig, ax = plot_centroids([[0.9, 0.1], [0.2, 0.8]])
        >>> [text.get_text() for text in ax.texts]
        ['0.90', '0.10', '0.20', '0.80']
    """
    q = _distributions(centroids, "centroids")
    num_classes = q.shape[1]
    if len(q) != num_classes:
        raise ValueError(f"`centroids` must have one row a class, shape (C, C), got {q.shape}.")
    names = _names(class_names, num_classes)
    fig, ax = figure_and_axes(ax)
    cmap = mpl.colormaps["viridis"]
    cmap = cmap.with_extremes(bad=cmap(0.0), under=cmap(0.0))  # zero has no logarithm
    norm = LogNorm(FLOOR, 1.0)
    image = ax.imshow(q, cmap=cmap, norm=norm)
    fig.colorbar(image, ax=ax, label="mean output probability", extend="min")
    if num_classes <= 12:
        for (row, column), value in np.ndenumerate(q):
            bright = value > 0.03  # the upper third of the scale
            color = "black" if bright else "white"
            ax.text(column, row, _short(value), ha="center", va="center", color=color, fontsize=7)
    ticks = range(num_classes) if class_names is not None or num_classes <= 20 else range(0, num_classes, 10)
    ax.set_xticks(ticks, [names[c] for c in ticks], rotation=90 if class_names is not None else 0)
    ax.set_yticks(ticks, [names[c] for c in ticks])
    ax.set_xlabel("output")
    ax.set_ylabel("class")
    if title:
        ax.set_title(title)
    return fig, ax


def plot_simplex(
    probs: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    class_names: Sequence[str] | None = None,
    max_points: int = 2000,
    title: str | None = None,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Output distributions in the plane, coloured by label, with the centroid of each class as a larger diamond.

    The ``C`` corners of the simplex lie on a regular polygon of radius 1, the first at the top, counter-clockwise; a
    distribution lies at the mean of the corners that it weights. For ``C = 3`` this is the simplex itself. For
    ``C > 3`` it is a projection, in which distinct distributions may coincide: with four classes, a distribution split
    evenly over two opposite corners lies where the uniform one does. Points that lie apart do differ.

    Args:
        probs: Output distributions, shape ``(n, C)``, ``C >= 2``.
        labels: Classes of the samples, integers in ``[0, C)``, shape ``(n,)``.
        class_names: Names of the classes; by default their numbers.
        max_points: Points to draw at most, taken evenly from the samples sorted by class, without randomness. The
            centroids are those of all samples.
        title: Title of the axes.
        ax: Axes to draw into; a new figure where None.

    Returns:
        The figure and its axes, which have neither ticks nor frame.

    Raises:
        ValueError: If there is no sample or fewer than two classes, a row is not a distribution (to 1e-3), ``labels``
            do not fit, there are not ``C`` names, or ``max_points`` is below 1.

    Reference:
        Yang et al., 2023, which shows the outputs of three classes on their simplex. arXiv:2309.09123

    Example:
        >>> fig, ax = plot_simplex([[1.0, 0.0, 0.0], [0.2, 0.2, 0.6]], [0, 2])
        >>> ax.collections[0].get_offsets()[0].round(6).tolist()  # the first corner
        [0.0, 1.0]
    """
    p = _distributions(probs, "probs")
    num_classes = p.shape[1]
    if num_classes < 2:
        raise ValueError(f"`probs` must be over at least 2 classes, shape (n, C), got {p.shape}.")
    if max_points < 1:
        raise ValueError(f"`max_points` must be at least 1, got {max_points}.")
    y = _labels(labels, len(p), num_classes)
    names = _names(class_names, num_classes)
    corners = _corners(num_classes)
    colors = _colors(num_classes)
    by_class = np.argsort(y, kind="stable")
    drawn = np.sort(by_class[np.linspace(0, len(p) - 1, min(max_points, len(p))).round().astype(np.int64)])
    present = np.unique(y)
    centroids = np.stack([p[y == label].mean(axis=0) for label in present])

    fig, ax = figure_and_axes(ax)
    ax.add_patch(Polygon(corners, fill=False, edgecolor=_GREY, linewidth=0.8, zorder=1))
    points, means = p[drawn] @ corners, centroids @ corners
    ax.scatter(points[:, 0], points[:, 1], c=colors[y[drawn]], s=8, alpha=0.5, linewidths=0, zorder=2)
    ax.scatter(
        means[:, 0],
        means[:, 1],
        c=colors[present],
        s=80,
        marker="D",
        edgecolors="black",
        linewidths=1.0,
        zorder=3,
    )
    for name, color, (x, height) in zip(names, colors, corners, strict=True):
        ax.plot(x, height, marker="o", markersize=5, color=color, zorder=4)
        side: Literal["left", "right", "center"] = "left" if x > 0.1 else "right" if x < -0.1 else "center"
        ax.text(_OUTSIDE * x, _OUTSIDE * height, name, color=color, ha=side, va="center", weight="bold")
    ax.set_xlim(-1.7, 1.7)
    ax.set_ylim(-1.25, 1.25)
    ax.set_aspect("equal")
    ax.set_axis_off()
    diamond = Line2D([], [], linestyle="", marker="D", markersize=8, color="white", markeredgecolor="black")
    ax.legend([diamond], ["centroid of a class"], loc="lower right", fontsize="small", frameon=False)
    if title:
        ax.set_title(title)
    return fig, ax


# ---------------------------------------------------------------- of the evolution


def _path(label: str, gamma: Sequence[float], cmi: Sequence[float]) -> tuple[Array, Array]:
    xs, ys = np.asarray(gamma, dtype=np.float64), np.asarray(cmi, dtype=np.float64)
    if xs.shape != ys.shape or xs.ndim != 1:
        raise ValueError(
            f"Run {label!r} must have one Γ and one CMI an epoch, two sequences of equal length, got shapes {xs.shape} "
            f"and {ys.shape}."
        )
    finite = np.isfinite(xs) & np.isfinite(ys)
    if not finite.any():
        raise ValueError(
            f"There is nothing to plot of run {label!r}: none of its {len(xs)} points is finite. Leave the run out."
        )
    return xs[finite], ys[finite]


def _final_accuracy(accuracy: Mapping[str, Sequence[float]], runs: Mapping[str, object]) -> dict[str, float]:
    unknown = sorted(accuracy.keys() - runs.keys())
    if unknown:
        raise ValueError(f"`accuracy` has {unknown}, but the runs are {list(runs)}: use the same labels.")
    final = {}
    for label, values in accuracy.items():
        if len(values) == 0 or not 0 <= values[-1] <= 1:
            last = values[-1] if len(values) else "nothing"
            raise ValueError(
                f"`accuracy` of run {label!r} must end in a fraction in [0, 1], got {last}: divide percent by 100, "
                "and leave out runs without one."
            )
        final[label] = float(values[-1])
    return final


def _draw_iso_lines(ax: Axes, paths: Sequence[tuple[Array, Array]]) -> None:
    """Dashed rays of equal NCMI from the origin, each labelled where it leaves the axes."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    for ncmi in _levels(paths, diagonal=top / right if top > 0 and right > 0 else 1.0):
        start, end = max(left, bottom / ncmi, 0.0), min(right, top / ncmi)
        if start >= end:
            continue  # the ray does not meet the axes
        ax.plot([start, end], [ncmi * start, ncmi * end], linestyle="--", linewidth=0.7, color="0.75", zorder=0)
        across: Literal["right", "left"] = "right" if end == right else "left"
        up: Literal["bottom", "top"] = "bottom" if end == right else "top"
        ax.annotate(
            f"NCMI {ncmi:.3g}",
            (end, ncmi * end),
            xytext=(-3 if across == "right" else 3, 1 if up == "bottom" else -3),
            textcoords="offset points",
            fontsize="x-small",
            color=_GREY,
            ha=across,
            va=up,
        )
    ax.set_xlim(left, right)
    ax.set_ylim(bottom, top)


def _levels(paths: Sequence[tuple[Array, Array]], *, diagonal: float) -> list[float]:
    """A few values of NCMI among those that occur: round ones, not far from the diagonal's, or the only one there is."""
    gamma, cmi = (np.concatenate(part) for part in zip(*paths, strict=True))
    inside = (gamma > 0) & (cmi > 0)
    if not inside.any():
        return []
    ratios = cmi[inside] / gamma[inside]
    low, high = float(ratios.min()), float(ratios.max())
    if high <= 1.01 * low:
        return [low]
    if high < 10 * low:
        return [float(level) for level in MaxNLocator(nbins=4).tick_values(low, high) if level > 0]
    start, stop = max(low / 2, diagonal / 20), min(2 * high, 20 * diagonal)  # flatter or steeper, it hugs an axis
    exponents = range(int(np.floor(np.log10(start))), int(np.ceil(np.log10(stop))) + 1)
    series = [float(f"{digit}e{exponent}") for exponent in exponents for digit in (1, 2, 5)]
    levels = [level for level in series if start <= level <= stop]
    return levels[:: -(-len(levels) // 5)]


# ---------------------------------------------------------------- of distributions


def _distributions(values: npt.ArrayLike, name: str) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"`{name}` must be a matrix with one distribution a row, got shape {array.shape}.")
    sums = array.sum(axis=1)
    good = np.isfinite(array).all(axis=1) & (array >= -TOLERANCE).all(axis=1) & (np.abs(sums - 1) <= TOLERANCE)
    if not good.all():
        row = int(np.argmin(good))
        raise ValueError(
            f"Row {row} of `{name}` is not a distribution: its sum is {sums[row]:.4g} and its smallest entry "
            f"{array[row].min():.4g}. Give probabilities, not logits: apply softmax over the classes first."
        )
    return array


def _labels(labels: npt.ArrayLike, samples: int, num_classes: int) -> npt.NDArray[np.int64]:
    y = np.asarray(labels)
    if y.shape != (samples,) or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"`labels` must be {samples} integers, one a row of `probs`, got {y.dtype} {y.shape}.")
    if y.min() < 0 or y.max() >= num_classes:
        raise ValueError(f"`labels` must be in [0, {num_classes}), got {y.min()} to {y.max()}.")
    return y.astype(np.int64)


def _names(class_names: Sequence[str] | None, num_classes: int) -> list[str]:
    if class_names is None:
        return [str(c) for c in range(num_classes)]
    if len(class_names) != num_classes:
        raise ValueError(f"`class_names` must have one name for each of {num_classes} classes, got {len(class_names)}.")
    return list(class_names)


def _corners(num_classes: int) -> Array:
    """A regular polygon of radius 1, the first corner at the top, counter-clockwise: shape ``(C, 2)``."""
    angles = np.pi / 2 + 2 * np.pi * np.arange(num_classes) / num_classes
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _colors(num_classes: int) -> Array:
    """One colour a class, shape ``(C, 4)``."""
    if num_classes <= 20:
        return np.asarray(mpl.colormaps["tab10" if num_classes <= 10 else "tab20"](np.arange(num_classes)))
    return np.asarray(mpl.colormaps["turbo"](np.linspace(0, 1, num_classes)))


def _short(probability: float) -> str:
    """Two decimals, or the order of magnitude of what these would hide."""
    if probability == 0 or probability >= 0.005:
        return f"{probability:.2f}" if probability else "0"
    return f"{probability:.0e}".replace("e-0", "e-")
