"""What a device remembers of earlier rounds: residuals by name, and the contract of every kind of error feedback."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from groundwire.plugins.compression.base import Compressor, Message, Payload, check_rows
from groundwire.plugins.random import Key


class ErrorMemory(nn.Module):
    """Residuals of all devices, keyed by the name of what is compressed; each of shape ``(num_devices, n)``.

    Residuals are allocated on first use, in float32 at least; they move with ``.to()`` and are part of the state dict.
    A row that is not finite leaves its residual as it is.

    Args:
        num_devices: Devices that have a residual here; may be said later by :meth:`setup`.

    Raises:
        ValueError: If ``num_devices`` is below 1.

    Example:
        >>> memory = ErrorMemory(num_devices=2)
        >>> corrected = memory.correct(torch.ones(1, 3), devices=(1,))
        >>> memory.keep(0.25 * corrected, devices=(1,))
        >>> memory.correct(torch.ones(2, 3), devices=(0, 1))
        tensor([[1.0000, 1.0000, 1.0000],
                [1.2500, 1.2500, 1.2500]])
    """

    def __init__(self, num_devices: int | None = None) -> None:
        super().__init__()
        self.num_devices: int | None = None
        self.first = 0
        self._residuals: dict[str, Tensor] = {}
        if num_devices is not None:
            self.setup(num_devices)

    def setup(self, num_devices: int, first: int = 0) -> None:
        """Say which devices are here.

        Args:
            num_devices: How many, at least 1.
            first: The id of the first of them; a process of several hosts a block of the devices.

        Raises:
            ValueError: If it is below 1.
            RuntimeError: If residuals of another number of devices exist.
        """
        if num_devices < 1:
            raise ValueError(f"`num_devices` must be at least 1, got {num_devices}.")
        if self._residuals and num_devices != self.num_devices:
            raise RuntimeError(
                f"The error memory holds residuals of {self.num_devices} devices and cannot serve {num_devices}; call "
                "reset_state() to forget them."
            )
        self.num_devices = num_devices
        self.first = first

    def recall(self, like: Tensor, devices: Sequence[int], name: str = "update") -> Tensor:
        """The residuals of ``devices``, shape ``(rows, n)``; zeros at first.

        Args:
            like: Rows of what is compressed, shape ``(rows, n)``: they say the shape and the device.
            devices: Their ids.
            name: What is compressed.

        Returns:
            Rows in float32 at least; not to be changed.

        Raises:
            ValueError: If the ids do not fit the rows or the memory.
            RuntimeError: If the memory was not set up, or rows of another length were remembered under ``name``.
        """
        residual = self._of(name, like)
        self._check(devices, like)
        return residual if self._is_everyone(devices) else residual[self._rows(devices, like.device)]

    def correct(self, x: Tensor, devices: Sequence[int], name: str = "update") -> Tensor:
        """Add the residuals of ``devices`` to the rows of ``x``, shape ``(rows, n)``: what to compress.

        Args:
            x: Rows, one a device.
            devices: Their ids.
            name: What is compressed.

        Returns:
            A new tensor, of the shape and dtype of ``x`` (float32 at least).

        Raises:
            ValueError: If the ids do not fit the rows or the memory.
            RuntimeError: If the memory was not set up, or rows of another length were remembered under ``name``.
        """
        recalled = self.recall(x, devices, name)
        if recalled is not self._residuals[name] and torch.promote_types(recalled.dtype, x.dtype) == recalled.dtype:
            return recalled.add_(x)  # it is a copy already
        return x + recalled

    def keep(self, residual: Tensor, devices: Sequence[int], name: str = "update", *, adopt: bool = False) -> None:
        """Remember rows ``(rows, n)`` as the residuals of ``devices``; rows that are not finite are not remembered.

        Args:
            residual: What was not sent.
            devices: Ids, one a row, each at most once.
            name: What is compressed.
            adopt: Whether nobody else uses the tensor any more, so that it may become the memory without a copy.

        Raises:
            ValueError: If the ids do not fit the rows or the memory.
            RuntimeError: If the memory was not set up, or rows of another length were remembered under ``name``.
        """
        memory = self._of(name, residual)
        self._check(devices, residual)
        rows, residual = self._rows(devices, residual.device), residual.detach().to(memory.dtype)
        finite = finite_rows(residual)
        if residual.device.type == "cpu" and bool(finite.all()):  # asking a GPU would wait for it
            if self._is_everyone(devices) and adopt:
                self._residuals[name] = residual
            elif self._is_everyone(devices):
                memory.copy_(residual)
            else:
                memory.index_copy_(0, rows, residual)
            return
        memory[rows] = torch.where(finite.unsqueeze(1), residual, memory[rows])

    def residual(self, name: str = "update") -> Tensor:
        """The residuals under ``name``, shape ``(num_devices, n)``.

        Args:
            name: What is compressed.

        Returns:
            The memory itself.

        Raises:
            KeyError: If nothing was remembered under that name.
        """
        return self._residuals[name]

    def reset_state(self) -> None:
        """Forget all residuals."""
        self._residuals.clear()

    def _of(self, name: str, like: Tensor) -> Tensor:
        if self.num_devices is None:
            raise RuntimeError("The error memory does not know how many devices there are: call setup(num_devices).")
        memory = self._residuals.get(name)
        if memory is None:
            dtype = torch.promote_types(like.dtype, torch.float32)
            memory = torch.zeros(self.num_devices, like.shape[1], dtype=dtype, device=like.device)
            self._residuals[name] = memory
        if memory.device != like.device:  # restored from a checkpoint, which is read on the CPU
            memory = self._residuals[name] = memory.to(like.device)
        if memory.shape[1] != like.shape[1]:
            raise RuntimeError(
                f"{name!r}: the residual has {memory.shape[1]} entries, but rows of {like.shape[1]} came; call "
                "reset_state() if the model changed."
            )
        return memory

    def _is_everyone(self, devices: Sequence[int]) -> bool:
        return len(devices) == self.num_devices and all(i == m for i, m in enumerate(devices, self.first))

    def _check(self, devices: Sequence[int], rows: Tensor) -> None:
        assert self.num_devices is not None  # _of saw to it
        if len(devices) != len(rows):
            raise ValueError(f"Got {len(rows)} rows for {len(devices)} devices; give one id a row.")
        if len(set(devices)) != len(devices):
            raise ValueError(f"Each device has one residual and may come once a round, got devices {tuple(devices)}.")
        end = self.first + self.num_devices
        if devices and not self.first <= min(devices) <= max(devices) < end:
            raise ValueError(f"Device ids must be in [{self.first}, {end}), got {min(devices)} to {max(devices)}.")

    def _rows(self, devices: Sequence[int], device: torch.device) -> Tensor:
        return torch.tensor([m - self.first for m in devices], dtype=torch.int64, device=device)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        moved = {name: (residual, fn(residual)) for name, residual in self._residuals.items()}
        self._residuals = {  # .half() and .bfloat16() move it, but leave it float32 at least
            name: old.to(new.device) if torch.finfo(new.dtype).bits < 32 else new for name, (old, new) in moved.items()
        }
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    @override
    def get_extra_state(self) -> dict[str, Any]:
        return {"num_devices": self.num_devices, "residuals": dict(self._residuals)}

    @override
    def set_extra_state(self, state: dict[str, Any]) -> None:
        if self.num_devices is not None and state["num_devices"] not in (None, self.num_devices):
            raise RuntimeError(
                f"The saved error memory is of {state['num_devices']} devices, this one of {self.num_devices}: resume "
                "with the same number of devices, or call reset_state() and start anew."
            )
        self.num_devices = state["num_devices"] if self.num_devices is None else self.num_devices
        self._residuals = {name: residual.clone() for name, residual in state["residuals"].items()}


def finite_rows(x: Tensor) -> Tensor:
    """Whether all entries of each row are finite: booleans, shape ``(rows,)``."""
    if not x.shape[1]:
        return torch.ones(len(x), dtype=torch.bool, device=x.device)
    return x.amax(dim=1).isfinite() & x.amin(dim=1).isfinite()  # not the sum: that of finite entries may be infinite


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows in another dtype; entries beyond its range become its largest, as a memory keeps the rest of them."""
    largest = torch.finfo(dtype).max
    if torch.finfo(x.dtype).max <= largest:
        return x.to(dtype)
    return torch.where(x.isfinite(), x.clamp(-largest, largest), x).to(dtype)


class Feedback(nn.Module, ABC):
    """A compressor with memory: what is compressed depends on what was sent before.

    In a simulation, calling it sends the rows of all devices. On a wire, each device calls :meth:`correct`, encodes,
    and after the exchange :meth:`keep`; who receives the mean of what was sent calls :meth:`estimate` and
    :meth:`keep_estimate`. The mean is then over all devices of the run.

    Args:
        compressor: What compresses.
        num_devices: Devices that have a memory here; may be said later by :meth:`setup`.
    """

    def __init__(self, compressor: Compressor, num_devices: int | None = None) -> None:
        super().__init__()
        self.compressor = compressor
        self.memory = ErrorMemory(num_devices)

    uses_update: bool = True
    """Whether :meth:`keep_sent` and :meth:`keep_plain` look at ``x`` again."""

    @property
    def memories(self) -> list[ErrorMemory]:
        """All that it remembers."""
        return [child for child in self.children() if isinstance(child, ErrorMemory)]

    def setup(self, num_devices: int, hosted: range | None = None) -> None:
        """Say which devices there are.

        Args:
            num_devices: In the whole run, at least 1.
            hosted: Ids of those that have their memory here, in a process of several; by default all.

        Raises:
            ValueError: If ``num_devices`` is below 1, or ``hosted`` is not a block of the devices.
        """
        here = range(num_devices) if hosted is None else hosted
        if hosted is not None and not (here.step == 1 and 0 <= here.start < here.stop <= num_devices):
            raise ValueError(f"`hosted` must be a block of the {num_devices} devices, got {hosted}.")
        for memory in self.memories:
            memory.setup(len(here), here.start)

    def reset_state(self) -> None:
        """Forget everything."""
        for memory in self.memories:
            memory.reset_state()

    def at(self, round: int) -> Compressor:
        """The compressor of a round."""
        return self.compressor

    @abstractmethod
    def correct(self, x: Tensor, key: Key, name: str = "update") -> Tensor:
        """What to compress instead of the rows ``x``, shape ``(rows, n)``, in float32 at least; changes nothing."""

    @abstractmethod
    def keep(self, x: Tensor, corrected: Tensor, sent: Tensor, key: Key, name: str = "update") -> Tensor:
        """Remember, and return what the receiver now holds of each row, shape ``(rows, n)``.

        Args:
            x: As given to :meth:`correct`.
            corrected: What it returned.
            sent: What arrived of it. Rows that are not finite leave the memory as it is.
            key: Names the devices and the round.
            name: What is compressed.

        Returns:
            Rows in the dtype of ``x``.
        """

    def keep_sent(
        self, x: Tensor, corrected: Tensor, payload: Payload, compressor: Compressor, key: Key, name: str = "update"
    ) -> None:
        """Remember, as :meth:`keep` does, where nobody needs what the receiver holds; who overrides one overrides both.

        Args:
            x: As given to :meth:`correct`; anything if not ``uses_update``.
            corrected: What it returned; may be overwritten.
            payload: What ``compressor`` made of it.
            compressor: Of the round.
            key: Names the devices and the round.
            name: What is compressed.
        """
        self.keep(x, corrected, compressor.decode(payload), key, name)

    def factors(self, devices: Sequence[int]) -> Tensor | None:
        """What the receiver multiplies each device's message with before it takes the mean; None for nothing."""
        return None

    def estimate(self, mean: Tensor, name: str = "update") -> Tensor:
        """The mean over all devices of what :meth:`keep` returns, from the mean of what they sent; changes nothing.

        Args:
            mean: Of what was sent, times :meth:`factors`, shape ``(1, n)``.
            name: What is compressed.

        Returns:
            Shape ``(1, n)``.
        """
        return mean

    def keep_estimate(self, mean: Tensor, name: str = "update") -> None:  # a hook: most remember nothing of it
        """Remember what :meth:`estimate` was given."""

    def plain(self, x: Tensor, key: Key, name: str) -> Tensor:
        """What to send of rows that are not worth compressing; changes nothing."""
        return x

    def keep_plain(self, x: Tensor, key: Key, name: str) -> None:  # a hook: most remember nothing of them
        """Remember what :meth:`plain` was given, after it was sent."""

    @override
    def forward(self, x: Tensor, key: Key, *, name: str = "update", compressor: Compressor | None = None) -> Message:
        """Send the rows of all devices that take part.

        Args:
            x: Rows, shape ``(rows, n)``; the row of device ``key.devices[i]`` is row ``i``.
            key: Names the devices and the random draws.
            name: What is compressed; each name has a memory of its own.
            compressor: Another resolution of the compressor, for this round.

        Returns:
            What the receiver holds, in the dtype of ``x``.
        """
        check_rows(x, key)
        corrected, compressor = self.correct(x, key, name), compressor or self.at(key.round)
        message = compressor.roundtrip(narrowed(corrected, x.dtype), key)
        sent = message.values
        if not compressor.carries_nan:  # the message cannot say it, and nothing may be remembered of the row
            sent = sent.masked_fill(~finite_rows(corrected).unsqueeze(1), torch.nan)
        return replace(message, values=self.keep(x, corrected, sent, key, name))


class ErrorFeedback(Feedback):
    """Error feedback (EF): ``e = x + residual``, send ``C(e)``, keep ``e - C(e)``.

    Args:
        compressor: What compresses; usually a contractive one.
        num_devices: Devices that have a residual; may be said later by :meth:`setup`.

    Reference:
        Seide et al., "1-Bit Stochastic Gradient Descent", Interspeech 2014; Karimireddy et al., "Error Feedback Fixes
        SignSGD and other Gradient Compression Schemes", ICML 2019. arXiv:1901.09847

    Example:
        >>> from groundwire.plugins.compression import TopK
        >>> feedback, key = ErrorFeedback(TopK(k=1), num_devices=1), Key(seed=0)
        >>> feedback(torch.tensor([[3.0, 2.0]]), key).values
        tensor([[3., 0.]])
        >>> feedback(torch.tensor([[0.0, 0.0]]), key).values
        tensor([[0., 2.]])
    """

    uses_update = False

    @override
    def correct(self, x: Tensor, key: Key, name: str = "update") -> Tensor:
        return self.memory.correct(x, key.devices, name)

    @override
    def keep_sent(
        self, x: Tensor, corrected: Tensor, payload: Payload, compressor: Compressor, key: Key, name: str = "update"
    ) -> None:
        self.memory.keep(compressor.subtract_(corrected, payload), key.devices, name, adopt=True)

    @override
    def keep(self, x: Tensor, corrected: Tensor, sent: Tensor, key: Key, name: str = "update") -> Tensor:
        is_ours = corrected.untyped_storage().data_ptr() != sent.untyped_storage().data_ptr()
        rest = corrected.sub_(sent) if is_ours else corrected - sent  # with what was lost to the dtype of x
        self.memory.keep(rest, key.devices, name, adopt=True)
        return sent

    def hold(self, x: Tensor, key: Key, *, name: str = "update") -> Message:
        """A round in which nothing can be sent: all of ``x`` goes into the memory, and the receiver holds zeros.

        Args:
            x: Rows, shape ``(rows, n)``.
            key: Names the devices.
            name: What is compressed.

        Returns:
            Zeros, at no cost.
        """
        self.memory.keep(self.memory.correct(x, key.devices, name), key.devices, name)
        return Message(values=torch.zeros_like(x), bits_wire=0, bits_ideal=0.0)
