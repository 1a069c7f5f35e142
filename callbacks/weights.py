"""Trained weights: from a Lightning checkpoint, told apart, copied."""

from __future__ import annotations

import copy
import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


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


def read_checkpoint(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """What a checkpoint holds, on the CPU.

    Args:
        path: As for :func:`find_checkpoint`.
        mmap: Leave tensors in the file until they are used.

    Returns:
        Its content.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it holds more than tensors and plain values.
    """
    file = find_checkpoint(path)
    try:
        content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds more than tensors and plain values, which is not read for safety: {error}. Load it yourself, "
            "and pass the network with its weights."
        ) from error
    return content


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
    checkpoint = read_checkpoint(file)
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


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of a module's state, by which weights are told apart.

    Args:
        state: Tensors by name, as ``module.state_dict()``.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def copy_of(module: Module) -> Module:
    """A copy of a module, without the Trainer of a LightningModule, which would be copied with it.

    Args:
        module: Any module.

    Returns:
        The copy.
    """
    if not isinstance(module, pl.LightningModule):
        return copy.deepcopy(module)
    trainer, module._trainer = module._trainer, None
    try:
        return copy.deepcopy(module)
    finally:
        module._trainer = trainer
