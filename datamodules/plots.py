"""Pictures of partitions."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor


def plot_partition(histogram: Tensor) -> tuple[Figure, Axes]:
    """Stacked bars of samples by class, one bar a device.

    Args:
        histogram: Samples of each class on each device, shape ``(N, C)``.

    Returns:
        The figure and its axes; nothing is shown or saved.
    """
    counts = histogram.numpy()
    figure = Figure(figsize=(min(max(5.0, 0.25 * len(counts) + 2), 24.0), 3.5), layout="constrained")
    axes = figure.add_subplot()
    bottom = np.zeros(len(counts))
    colors = mpl.colormaps["tab10" if counts.shape[1] <= 10 else "tab20"]
    for label in range(counts.shape[1]):
        axes.bar(range(len(counts)), counts[:, label], bottom=bottom, color=colors(label % colors.N), label=str(label))
        bottom += counts[:, label]
    axes.set(xlabel="device", ylabel="training samples")
    axes.legend(title="class", loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    return figure, axes
