"""Pictures of influential samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor


def plot_influential_samples(
    images: Tensor, titles: Sequence[Sequence[str]], num_helpful: int
) -> tuple[Figure, np.ndarray[Any, Any]]:
    """Test images, each beside the training images that helped it most and those that harmed it most.

    Args:
        images: Shape ``(T, 1 + helpful + harmful, C, H, W)`` of 1 or 3 channels: a row for each test image, itself first.
        titles: One a picture, in the same order.
        num_helpful: How many of the training images in a row are helpful; the rest are harmful.

    Returns:
        The figure and its axes, ``(T, 1 + helpful + harmful)``.

    Raises:
        ValueError: If they are no images, there are none, or titles do not fit.
    """
    if images.ndim != 5 or images.shape[2] not in (1, 3) or not images.numel():
        raise ValueError(f"Images (T, number, 1 or 3, H, W) are needed, got shape {tuple(images.shape)}.")
    height, width = images.shape[:2]
    if [len(row) for row in titles] != [width] * height:
        raise ValueError(f"`titles` must be {height} rows of {width}, one a picture.")
    low, high = (float(value) for value in images.aminmax())
    shown = ((images - low) / max(high - low, 1e-12)).permute(0, 1, 3, 4, 2).cpu().numpy()
    fig = Figure(figsize=(1.1 * width + 0.4, 1.35 * height + 0.4), layout="constrained")
    axes = fig.subplots(height, width, squeeze=False)
    for r in range(height):
        for c in range(width):
            image = shown[r, c]
            axes[r, c].imshow(image if image.shape[-1] == 3 else image[..., 0], cmap="gray", vmin=0, vmax=1)
            axes[r, c].set_xticks([])
            axes[r, c].set_yticks([])
            axes[r, c].set_title(titles[r][c], fontsize="x-small")
            colour = "black" if c == 0 else "tab:green" if c <= num_helpful else "tab:red"
            for spine in axes[r, c].spines.values():
                spine.set_color(colour)
                spine.set_linewidth(2)
    fig.suptitle("test sample | most helpful (green) | most harmful (red) training samples", fontsize="small")
    return fig, axes
