"""Buffers of the module (BatchNorm statistics) while devices work one after the other."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DeviceBuffers:
    """Every device starts from the server's buffers; what the server keeps is their mean over the devices.

    Floating buffers take the weighted mean, others (counters) the largest value. Nothing reaches the module before
    :meth:`write`. A buffer that the step replaces instead of writing into it is treated alike.

    Args:
        module: Whose buffers they are.
    """

    def __init__(self, module: nn.Module) -> None:
        self._owners = [
            (owner, key) for owner in module.modules() for key, buffer in owner._buffers.items() if buffer is not None
        ]
        self._server: list[Tensor] = [self._at(place) for place in self._owners]
        self._start = [buffer.clone() for buffer in self._server]
        self.left: list[list[Tensor]] = []  # by device

    def add(self, left: list[Tensor] | None) -> None:
        """Take over what a device left in another process; None for nothing else than it started from."""
        self.left.append(
            self._start if left is None else [b.to(s.device) for b, s in zip(left, self._start, strict=True)]
        )

    def collect(self) -> None:
        """Take over what a device left, and put the server's buffers back for the next one."""
        self.left.append([self._at(place).detach().clone() for place in self._owners])
        for (owner, key), buffer, start in zip(self._owners, self._server, self._start, strict=True):
            buffer.copy_(start)
            owner._buffers[key] = buffer

    def changed(self) -> bool:
        """Whether a device left anything else than it started from."""
        return any(
            not torch.equal(buffer, start)
            for left in self.left
            for buffer, start in zip(left, self._start, strict=True)
        )

    def write(self, rows: list[int], weights: Tensor) -> None:
        """Combine what some devices left and write it into the module.

        Args:
            rows: The devices, in the order in which they were collected.
            weights: Their weights, shape ``(len(rows),)``, summing to one.
        """
        for i, buffer in enumerate(self._server):
            left = [self.left[row][i] for row in rows]
            if len(left) == 1:
                buffer.copy_(left[0])
            elif buffer.is_floating_point():
                start = self._start[i]
                buffer.copy_(start + sum(w * (b - start) for w, b in zip(weights.to(buffer.dtype), left, strict=True)))
            else:
                buffer.copy_(torch.stack(left).amax(0))

    @staticmethod
    def _at(place: tuple[nn.Module, str]) -> Tensor:
        owner, key = place
        buffer = owner._buffers[key]
        assert buffer is not None
        return buffer
