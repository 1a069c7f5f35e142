"""Pictures of an evaluation of unlearning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from groundwire.callbacks.unlearning.evaluation.relearning import RelearningCurve
from groundwire.callbacks.unlearning.evaluation.result import UnlearningResult


def plot_unlearning(
    results: Mapping[str, UnlearningResult], *, reference: str | None = "reference"
) -> tuple[Figure, np.ndarray[Any, Any]]:
    """What models know of the forget set against what they know of the rest, and how soon they relearn it.

    Left: accuracy on test data (filled) and on retained data (hollow) against that on the forget set, losses where labels
    are values; the nearer to the reference, the better. Right: the forget loss while it is relearned.

    Args:
        results: By the model's name.
        reference: Name of the model that was retrained without the forget set, drawn as a star; it may be missing.

    Returns:
        The figure and its axes, ``(2,)``; ``(1,)`` where nothing was relearned.

    Raises:
        ValueError: If there is no result.
    """
    if not results:
        raise ValueError("There is nothing to plot: give at least one result.")
    curves = {name: result.relearning for name, result in results.items() if result.relearning is not None}
    panels = 2 if curves else 1
    fig = Figure(figsize=(5.2 * panels, 4.5), layout="constrained")
    axes = fig.subplots(1, panels, squeeze=False)[0]
    colors = {name: f"C{number}" for number, name in enumerate(results)}
    _draw_knowledge(axes[0], results, reference, colors)
    if curves:
        _draw_relearning(axes[1], curves, reference, colors)
    return fig, axes


def _draw_knowledge(
    ax: Axes, results: Mapping[str, UnlearningResult], reference: str | None, colors: Mapping[str, str]
) -> None:
    kind = "acc" if all(result.forget_acc is not None for result in results.values()) else "loss"
    for name, result in results.items():
        marker, size = ("*", 15) if name == reference else ("o", 8)
        x = getattr(result, f"forget_{kind}")
        test, retain = (getattr(result, f"{part}_{kind}") for part in ("test", "retain"))
        ax.plot([x], [test], marker=marker, markersize=size, linestyle="", color=colors[name], label=name)
        if retain is not None:
            ax.plot([x], [retain], marker=marker, markersize=size, linestyle="", color=colors[name], fillstyle="none")
            ax.plot([x, x], [test, retain], color=colors[name], linewidth=0.8, alpha=0.5)
    if kind == "acc":
        ax.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    what = "accuracy (%)" if kind == "acc" else "loss"
    hollow = any(result.retain_records is not None for result in results.values())
    ax.set_xlabel(f"Forget {what}")
    test = next(iter(results.values())).test_split.capitalize()
    ax.set_ylabel(f"{test}{' (filled) and retain (hollow)' if hollow else ''} {what}")
    ax.margins(0.12)
    ax.grid(alpha=0.3)
    ax.legend()


def _draw_relearning(
    ax: Axes, curves: Mapping[str, RelearningCurve], reference: str | None, colors: Mapping[str, str]
) -> None:
    for name, curve in curves.items():
        style = "--" if name == reference else "-"
        ax.plot(range(len(curve.losses)), curve.losses, style, marker="o", markersize=3, color=colors[name], label=name)
    first = next(iter(curves.values()))
    if first.target_loss is not None:
        ax.axhline(first.target_loss, linestyle=":", color="0.4", linewidth=1, label="known again")
    if min(loss for curve in curves.values() for loss in curve.losses) > 0:
        ax.set_yscale("log")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel(f"Relearning step (Adam, learning rate {first.lr:g})")
    ax.set_ylabel("Forget loss")
    ax.grid(alpha=0.3)
    ax.legend()
