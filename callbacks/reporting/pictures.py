"""Pictures for loggers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def log_picture(logger: Any, key: str, file: Path, figure: Figure, step: int) -> None:
    """Give a picture to a logger that takes some.

    Args:
        logger: Any Lightning logger; W&B and TensorBoard take pictures, others are left alone.
        key: Under which it is logged.
        file: The picture.
        figure: The same, as a figure.
        step: Of the training.
    """
    if hasattr(logger, "log_image"):  # W&B
        logger.log_image(key, [str(file)])
    elif hasattr(getattr(logger, "experiment", None), "add_figure"):  # TensorBoard
        logger.experiment.add_figure(key, figure, global_step=step)
