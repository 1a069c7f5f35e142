"""What devices hold of the server's model, and how it is brought closer to it within a budget of bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from groundwire.plugins.compression import Identity, Message
from groundwire.plugins.compression.lfl_quantizer import LFLQuantizer
from groundwire.plugins.edge.round import Round
from groundwire.plugins.random import Key

_GIB = 2**30
_FINE = LFLQuantizer(num_levels=1)  # its levels are chosen anew for every message


class Estimates(nn.Module):
    """The model that all devices hold, ``(d,)``, or that each of them holds, ``(num_devices, d)``.

    All begin with the model of the first round, which a shared seed gives them. Saved with the state dict, and moved.

    Args:
        half_precision: Whether to keep float16 numbers.

    Example:
        >>> estimates = Estimates()
        >>> estimates.of(torch.tensor([1.0, 2.0])).add_(1.0)
        tensor([2., 3.])
        >>> estimates.of(torch.tensor([5.0, 5.0]))
        tensor([2., 3.])
    """

    def __init__(self, half_precision: bool = False) -> None:
        super().__init__()
        self._half_precision = half_precision
        self._held: Tensor | None = None

    def of(self, model: Tensor, num_devices: int | None = None) -> Tensor:
        """The estimates themselves, to be read and changed.

        Args:
            model: The server's model, shape ``(d,)``.
            num_devices: How many devices hold one of their own; by default they share it.

        Returns:
            Shape ``(d,)`` or ``(num_devices, d)``, on the device of ``model``.
        """
        if self._held is None:
            shape = model.shape if num_devices is None else (num_devices, *model.shape)
            dtype = torch.float16 if self._half_precision else model.dtype
            self._held = model.detach().to(dtype).expand(shape).clone()
        if self._held.device != model.device:  # restored from a checkpoint, which is read on the CPU
            self._held = self._held.to(model.device)
        return self._held

    def reset_state(self) -> None:
        """Forget them."""
        self._held = None

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self._held is not None:
            self._held = self._held.to(fn(self._held).device)
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    @override
    def get_extra_state(self) -> dict[str, Any]:
        return {"held": self._held}

    @override
    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._held = None if state["held"] is None else state["held"].clone()


def check_memory(num_devices: int, numel: int, bytes_each: int, limit_gib: float, remedy: str) -> None:
    """Refuse a model of its own for every device where that takes too much memory.

    Args:
        num_devices: Devices ``M``.
        numel: Model size ``d``.
        bytes_each: Of a number.
        limit_gib: What may be taken, GiB.
        remedy: What else to do.

    Raises:
        ValueError: If it takes more.
    """
    needed = num_devices * numel * bytes_each / _GIB
    if needed > limit_gib:
        raise ValueError(
            f"A model for each of {num_devices} devices with {numel:,} parameters takes {needed:.3g} GiB, more than "
            f"`memory_limit_gib`={limit_gib}. Raise it{remedy}."
        )


def server_key(round: Round) -> Key:
    """Of the draws for a message to all devices."""
    return Key(seed=round.key.seed, round=round.index, devices=(0,), name="downlink")


def relative_error(held: Tensor, model: Tensor) -> Tensor:
    """``|held - model| / |model|``, averaged over rows; 0 for a model of zeros that arrived as such."""
    off = torch.linalg.vector_norm(held - model, dim=-1)
    size = torch.linalg.vector_norm(model)
    return torch.where(off > 0, off / size, 0).mean()


@dataclass(frozen=True, eq=False, kw_only=True)
class Step:
    """What a device holds after a message of limited length.

    Args:
        held: Shape ``(d,)``.
        message: What travelled; None if nothing did.
        num_levels: Of its quantiser; 0 if numbers were sent as they are, or nothing.
        num_entries: Entries that were sent.
        is_silent: Whether something was to be said, and the budget was too small for any of it.
    """

    held: Tensor
    message: Message | None = None
    num_levels: int = 0
    num_entries: int = 0
    is_silent: bool = False


def send_within(bits: float, model: Tensor, held: Tensor, key: Key) -> Step:
    """Bring what a device holds as close to the model as a message of so many bits can be expected to.

    A budget for the whole model sends it as it is. Else the difference is quantised, at the resolution that
    :meth:`LFLQuantizer.fitted` finds; what is left of it is part of the next difference.

    Args:
        bits: The budget, which the ideal length of the message keeps.
        model: The server's model, shape ``(d,)``.
        held: What the device holds, shape ``(d,)``; not changed.
        key: Of the quantiser's coins, with one device.

    Returns:
        What it holds then, in the dtype of ``held``.
    """
    if not torch.equal(held.to(model.dtype), model):
        if bits >= 8 * model.element_size() * model.numel():
            message = Identity().roundtrip(model.unsqueeze(0), key)
            return Step(held=message.values[0].to(held.dtype), message=message, num_entries=model.numel())
        gap = model - held.to(model.dtype)
        quantizer = _FINE.fitted(gap, bits)
        if quantizer is None:
            return Step(held=held, is_silent=True)
        message = quantizer.roundtrip(gap.unsqueeze(0), key)
        return Step(
            held=(held.to(model.dtype) + message.values[0]).to(held.dtype),
            message=message,
            num_levels=quantizer.num_levels,
            num_entries=quantizer.num_entries or model.numel(),
        )
    return Step(held=held)
