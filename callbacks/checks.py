"""What shapes and dtypes tell of logits and labels: plain functions on tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def values_are_hidden(*tensors: Tensor) -> bool:
    """Whether a function transform (``vmap``, ``grad``) is at work, so that no branch may look at the values."""
    return any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors)


def transform_is_active() -> bool:
    """Whether this code runs inside of a function transform (``vmap``, ``grad``), whatever its tensors are."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def as_target(labels: Tensor, number: int) -> Tensor:
    """Labels in the form that losses take.

    Args:
        labels: Class indices ``(B,)`` or ``(B, 1)``, or distributions ``(B, C)``, one-hot integers among them.
        number: Samples ``B``.

    Returns:
        Class indices ``(B,)`` int64, or distributions ``(B, C)`` in floating point.

    Raises:
        ValueError: If there are not as many labels as samples, or they are neither.
    """
    if labels.ndim == 2 and labels.shape[1] > 1:
        found = labels if labels.is_floating_point() else labels.float()
    else:
        found = labels.reshape(-1).long()
    if not values_are_hidden(labels):
        _check_labels(labels, found)
    if len(found) != number:
        raise ValueError(
            f"there are {number} inputs and labels of shape {tuple(labels.shape)}: expected class indices [{number}] or "
            f"distributions [{number}, classes]. LogitsSource(unpack=...) picks others."
        )
    return found


def _check_labels(labels: Tensor, found: Tensor) -> None:
    if found.is_floating_point():
        if bool((found < 0).any()) or bool(((found.sum(dim=1) - 1).abs() > 1e-3).any()):
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} are no distributions over classes (rows of at least 0 that sum to 1): "
                "a regression or several labels a sample cannot be attacked as a classifier."
            )
    elif labels.is_floating_point() and bool((labels != labels.round()).any()):
        raise ValueError("labels are fractions, not class indices: a regression cannot be attacked as a classifier.")


def check_logits(logits: Tensor, target: Tensor) -> int:
    """Refuse what cannot be logits with hard labels, as far as shapes and dtypes tell; the number of classes."""
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"expected logits [batch, classes], got shape {tuple(logits.shape)} dtype {logits.dtype}.")
    if logits.shape[1] < 2:
        raise ValueError(
            "logits need at least 2 classes; for one-logit binary heads pass binary=True (then [-z/2, z/2] is used)."
        )
    if target.is_floating_point() or target.shape != logits.shape[:1]:
        raise ValueError(
            f"expected class indices [{len(logits)}], got shape {tuple(target.shape)} dtype {target.dtype}; mixup or "
            "soft labels are not supported here."
        )
    return logits.shape[1]
