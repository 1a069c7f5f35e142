"""Deep Gradient Compression: top-k with momentum on the device's side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.compression.base import Compressor
from groundwire.plugins.compression.error_feedback import ErrorMemory, Feedback, finite_rows
from groundwire.plugins.compression.topk import TopK
from groundwire.plugins.random import Key


class DGC(Feedback):
    """Deep Gradient Compression: momentum correction and momentum factor masking around top-k.

    Each device does ``u <- m u + x``, ``v <- v + u``, sends the entries of ``v`` of largest magnitude, and sets ``u``
    and ``v`` to zero where it sent. The momentum lives on the devices: use an optimizer without any. Tensors that are
    sent as they are get ordinary momentum. In the first rounds more is sent.

    Args:
        density: Share of the entries sent, in (0, 1].
        momentum: ``m``, in [0, 1).
        nesterov: ``u <- m (u + x)``, ``v <- v + u + x`` instead.
        clip_norm: Each device clips ``x`` to the norm ``clip_norm / sqrt(num_devices)`` first; None for not. Where
            layers are compressed one by one, each is clipped by itself.
        warmup_densities: Densities of the first rounds; the paper has one for each of four epochs.
        warmup_rounds: For how many rounds each of them holds.
        num_devices: Devices that have a memory here; may be said later by :meth:`setup`.

    Raises:
        ValueError: If an argument is out of range.

    Reference:
        Lin, Han, Mao, Wang, Dally, "Deep Gradient Compression: Reducing the Communication Bandwidth for Distributed
        Training", ICLR 2018. arXiv:1712.01887

    Example:
        >>> feedback, key = DGC(density=0.5, momentum=0.5, num_devices=1), Key(seed=0)
        >>> feedback(torch.tensor([[4.0, 2.0]]), key).values
        tensor([[4., 0.]])
        >>> feedback(torch.tensor([[1.0, 2.0]]), key).values
        tensor([[0., 5.]])
    """

    def __init__(
        self,
        density: float = 0.001,
        momentum: float = 0.9,
        nesterov: bool = False,
        clip_norm: float | None = None,
        warmup_densities: Sequence[float] = (0.25, 0.0625, 0.015625, 0.004),
        warmup_rounds: int = 0,
        num_devices: int | None = None,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"`momentum` must be in [0, 1), got {momentum}.")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"`clip_norm` must be > 0, got {clip_norm}.")
        if warmup_rounds < 0:
            raise ValueError(f"`warmup_rounds` must be at least 0, got {warmup_rounds}.")
        super().__init__(TopK(density=density), num_devices)
        self.momentum = momentum
        self.nesterov = nesterov
        self.clip_norm = clip_norm
        self.warmup_densities = tuple(warmup_densities)
        self.warmup_rounds = warmup_rounds
        self.velocities = ErrorMemory(num_devices)
        self._warmup = [TopK(density=warm) for warm in self.warmup_densities]
        self._population = num_devices or 1

    @override
    def setup(self, num_devices: int, hosted: range | None = None) -> None:
        super().setup(num_devices, hosted)
        self._population = num_devices

    @override
    def at(self, round: int) -> Compressor:
        stage = round // self.warmup_rounds if self.warmup_rounds else len(self._warmup)
        return self._warmup[stage] if stage < len(self._warmup) else self.compressor

    def _step(self, x: Tensor, key: Key, name: str) -> tuple[Tensor, Tensor]:
        """The new velocities ``u``, and what they add to ``v``."""
        if self.clip_norm is not None:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64)
            most = self.clip_norm / self._population**0.5
            x = x * (most / norm).clamp_(max=1.0).to(x.dtype)
        old = self.velocities.recall(x, key.devices, name)
        if self.nesterov:
            u = self.momentum * (old + x)
            return u, u + x
        u = self.momentum * old + x
        return u, u

    @override
    def correct(self, x: Tensor, key: Key, name: str = "update") -> Tensor:
        return self.memory.correct(self._step(x, key, name)[1], key.devices, name)

    @override
    def keep(self, x: Tensor, corrected: Tensor, sent: Tensor, key: Key, name: str = "update") -> Tensor:
        velocity, _ = self._step(x, key, name)
        was_sent = sent != 0
        lost = ~finite_rows(sent).unsqueeze(1)
        self.velocities.keep(velocity.masked_fill(was_sent, 0).masked_fill(lost, torch.nan), key.devices, name)
        self.memory.keep(corrected - sent, key.devices, name)
        return sent

    @override
    def plain(self, x: Tensor, key: Key, name: str) -> Tensor:
        return self._step(x, key, name)[1].to(x.dtype)

    @override
    def keep_plain(self, x: Tensor, key: Key, name: str) -> None:
        velocity, update = self._step(x, key, name)
        lost = ~finite_rows(update.to(x.dtype)).unsqueeze(1)
        self.velocities.keep(velocity.masked_fill(lost, torch.nan), key.devices, name)

    @override
    def get_extra_state(self) -> dict[str, Any]:
        return {"population": self._population}

    @override
    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._population = state["population"]

    @override
    def extra_repr(self) -> str:
        return (
            f"momentum={self.momentum}, nesterov={self.nesterov}, clip_norm={self.clip_norm}, "
            f"warmup_densities={self.warmup_densities}, warmup_rounds={self.warmup_rounds}"
        )
