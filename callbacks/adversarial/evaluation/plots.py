"""Pictures of an evaluation of robustness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from groundwire.callbacks.adversarial.evaluation.result import Examples, RobustnessResult
from groundwire.callbacks.adversarial.functional import wilson_interval
from groundwire.callbacks.reporting.plots import figure_and_axes


def plot_accuracy_against_eps(
    results: Mapping[str, RobustnessResult], *, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """Accuracy under PGD-20 on the margin against the radius, with 95 % intervals, and the chance level.

    Args:
        results: By label; each with a sweep.
        ax: Axes to draw into; a new figure where None.

    Returns:
        The figure and its axes.

    Raises:
        ValueError: If there is no result, or one has no sweep.
    """
    if not results or not all(result.sweep for result in results.values()):
        raise ValueError("There is nothing to plot: give at least one result, each with a sweep.")
    fig, ax = figure_and_axes(ax)
    for label, result in results.items():
        radii = list(result.sweep)
        n = [len(alive) for alive in result.sweep.values()]
        right = [int(alive.sum()) for alive in result.sweep.values()]
        ends = [wilson_interval(r, m) for r, m in zip(right, n, strict=True)]
        (line,) = ax.plot(radii, [r / m for r, m in zip(right, n, strict=True)], marker="o", label=label)
        ax.fill_between(radii, [e[0] for e in ends], [e[1] for e in ends], color=line.get_color(), alpha=0.2)
    first = next(iter(results.values()))
    ax.axhline(1 / first.num_classes, linestyle="--", color="0.4", linewidth=1, label="chance")
    ax.axvline(first.threat.eps, linestyle=":", color="0.4", linewidth=1)
    ax.set_xscale("symlog", linthresh=min((r for r in first.sweep if r > 0), default=first.threat.eps))
    ticks = list(first.sweep)
    ax.set_xticks(ticks, [f"{radius:g}" for radius in ticks])
    ax.minorticks_off()
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    ax.set_xlabel(f"Radius of the {first.threat.norm} ball (pixel units)")
    ax.set_ylabel("Accuracy under PGD-20 on the margin (%)")
    ax.grid(alpha=0.3)
    ax.legend(title="95 % intervals", title_fontsize="small")
    return fig, ax


def plot_adversarial_examples(
    examples: Examples, *, class_names: Sequence[str] | None = None
) -> tuple[Figure, np.ndarray[Any, Any]]:
    """Clean images, what an attack added to them, and the adversarial images, with what the network says of them.

    Args:
        examples: Images ``(n, C, H, W)`` of 1 or 3 channels.
        class_names: Names of the classes; their numbers where None.

    Returns:
        The figure and its axes, ``(3, n)``.

    Raises:
        ValueError: If they are no images, or there are none.
    """
    if examples.clean.ndim != 4 or examples.clean.shape[1] not in (1, 3) or not len(examples.clean):
        raise ValueError(f"Images (n, 1 or 3, H, W) are needed, got shape {tuple(examples.clean.shape)}.")
    number = len(examples.clean)
    fig = Figure(figsize=(1.3 * number + 0.6, 4.6), layout="constrained")
    axes = fig.subplots(3, number, squeeze=False)
    change = examples.adversarial - examples.clean
    scale = max(float(change.abs().max()), 1e-12)
    name = (lambda label: str(label)) if class_names is None else (lambda label: class_names[label])
    for column in range(number):
        clean, adversarial = (
            (images[column] - examples.lo) / (examples.hi - examples.lo)
            for images in (examples.clean, examples.adversarial)
        )
        rows = (clean, (change[column] / scale + 1) / 2, adversarial)
        for row, image in enumerate(rows):
            shown = image.permute(1, 2, 0).clamp(0, 1).numpy()
            axes[row, column].imshow(shown if shown.shape[-1] == 3 else shown[..., 0], cmap="gray", vmin=0, vmax=1)
            axes[row, column].set_xticks([])
            axes[row, column].set_yticks([])
        wrong = int(examples.adversarial_label[column]) != int(examples.target[column])
        axes[0, column].set_title(name(int(examples.clean_label[column])), fontsize="small")
        axes[2, column].set_title(
            name(int(examples.adversarial_label[column])), fontsize="small", color="tab:red" if wrong else "black"
        )
    for row, label in enumerate(("clean", f"change\n(grey 0, white +{scale:.2g})", "adversarial")):
        axes[row, 0].set_ylabel(label, fontsize="small")
    return fig, axes
