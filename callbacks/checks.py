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
