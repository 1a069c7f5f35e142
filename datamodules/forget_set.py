"""Forget sets as users give them, and whether they overlap with test data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import CombinedLoader
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from groundwire.callbacks.logits import LogitsSource


class ForgetSetError(MisconfigurationException, ValueError):
    """The samples cannot be forgotten as asked."""


def given_rows(given: Any) -> Tensor:
    """The rows that a user names.

    Args:
        given: Whole numbers in a sequence, array or tensor, or a file of them: text, or ``.npy``.

    Returns:
        Shape ``(k,)``, int64, in the order given.

    Raises:
        FileNotFoundError: If there is no such file.
        ForgetSetError: If it holds anything but whole numbers.

    Example:
        >>> given_rows([7, 3])
        tensor([7, 3])
    """
    if not isinstance(given, str | Path):
        return _whole_numbers(given, "`indices`")
    path = Path(given)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of indices at {path}: write one index a line, or an .npy.")
    try:
        if path.suffix == ".npy":
            values: Any = np.load(path)
        else:
            lines = path.read_text().splitlines()
            values = [int(word) for line in lines for word in line.partition("#")[0].split()]
    except ValueError as error:
        raise ForgetSetError(f"{path} is no list of indices: {error}. Write one index a line, or an .npy.") from error
    return _whole_numbers(values, str(path))


def _whole_numbers(given: Any, what: str) -> Tensor:
    if isinstance(given, Tensor):
        given = given.cpu().numpy()
    elif isinstance(given, list | tuple) and any(isinstance(one, bool) for one in given):
        given = np.ones(len(given), dtype=bool)  # NumPy would take [1, True] for two ones
    array = np.asarray(given)
    if array.dtype.kind == "b":
        raise ForgetSetError(f"{what} must be whole numbers, got a boolean mask: give `mask.nonzero()`.")
    if array.size and array.dtype.kind not in "iu":
        raise ForgetSetError(f"{what} must be whole numbers, got {array.dtype}: give rows of the training data.")
    return torch.from_numpy(array.astype(np.int64).reshape(-1))


def refuse_overlap(forget: Tensor, loaders: Any) -> None:
    """Refuse a forget set with samples of the test data; warn where those cannot be read.

    Inputs are compared bit by bit, in the dtype of the forget set.

    Args:
        forget: Inputs of the forget set, shape ``(m, ...)``.
        loaders: Of the test data: one, or a list or dict of them.

    Raises:
        ForgetSetError: If there is one.
    """
    forgotten = {_bytes_of(x) for x in forget}
    unread: dict[str, None] = {}
    found = 0
    for batch in _batches(loaders):
        inputs = _inputs_of(batch)
        if inputs is None:
            unread[type(batch).__name__] = None
            continue
        if forget.is_floating_point() or not inputs.is_floating_point():  # fractions never become whole numbers
            inputs = inputs.to(forget.dtype)
        found += sum(_bytes_of(x) in forgotten for x in inputs)
    if found:
        raise ForgetSetError(
            f"{found} samples of the test data are in the forget set: forgetting could not be told from "
            "generalisation. Take them out of the test data."
        )
    if unread:
        rank_zero_warn(
            "Whether samples of the test data are in the forget set was not checked: the inputs cannot be found in a batch "
            f"that is a {' or a '.join(unread)}. Give pairs (inputs, labels), or mappings with keys such as `x` and `y`."
        )


def _batches(loaders: Any) -> Iterator[Any]:
    combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader([] if loaders is None else loaders)
    for loader in combined.flattened:
        yield from loader


def _inputs_of(batch: Any) -> Tensor | None:
    """The inputs of a batch, one a row; None if they cannot be told, or are no tensor."""
    if isinstance(batch, tuple | list) and len(batch) == 1:
        batch = batch[0]
    if isinstance(batch, Tensor):
        return batch if batch.ndim else None
    try:
        inputs, labels = LogitsSource().inputs_and_labels(batch)
    except MisconfigurationException:
        return None
    if not isinstance(inputs, Tensor) or (labels.ndim and not inputs.ndim):
        return None
    return inputs if labels.ndim else inputs.unsqueeze(0)  # of a loader that does not batch


def _bytes_of(sample: Tensor) -> bytes:
    return sample.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
