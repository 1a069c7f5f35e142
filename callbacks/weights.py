"""Trained weights from a Lightning checkpoint."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint file that a path means.

    Args:
        path: A checkpoint, or a folder: of its checkpoints and those in the folders below, the newest ``last.ckpt``,
            or the newest at all if there is none of that name.

    Returns:
        An existing file.

    Raises:
        FileNotFoundError: If there is none.
    """
    given = Path(path)
    if given.is_file():
        return given
    found = list(given.rglob("last.ckpt")) or list(given.rglob("*.ckpt"))
    if not found:
        raise FileNotFoundError(
            f"There is no checkpoint at {given}: train that model first (for a recipe: `groundwire fit --config "
            f"{given.name}`), or name the file or the folder of another run as `checkpoint`."
        )
    return max(found, key=lambda file: (file.stat().st_mtime, str(file)))


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The module's state in a Lightning checkpoint, on the CPU.

    Args:
        path: As for :func:`find_checkpoint`.

    Returns:
        The state dict.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If the file holds no module's state.
    """
    file = find_checkpoint(path)
    try:
        checkpoint: Any = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds more than tensors and plain values, which is not read for safety: {error}. Load it yourself, "
            "and pass the network with its weights."
        ) from error
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f"{file} is no Lightning checkpoint: it has no `state_dict`.")  # noqa: TRY004  the file is wrong, not a type
    return state


def load_weights(module: nn.Module, path: str | Path) -> Path:
    """Load a checkpoint's weights into a module, all of them or none.

    Args:
        module: Has the same parameters and buffers, in names and shapes.
        path: As for :func:`find_checkpoint`.

    Returns:
        The file that was read.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it belongs to another model.
    """
    file = find_checkpoint(path)
    state, own = read_weights(file), module.state_dict()
    wrong = [
        f"`{name}` {list(state[name].shape) if name in state else 'missing'} in the file, "
        f"{list(own[name].shape) if name in own else 'missing'} in the model"
        for name in sorted(state.keys() | own.keys())
        if name not in state or name not in own or state[name].shape != own[name].shape
    ]
    if wrong:
        raise ValueError(
            f"{file} does not fit {type(module).__name__}: {'; '.join(wrong[:3])}"
            f"{f'; and {len(wrong) - 3} more' if len(wrong) > 3 else ''}. Build the model that the checkpoint was "
            "written with."
        )
    module.load_state_dict(state)
    return file
