"""EControl: EF21 with a controlled share of classic error feedback."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from groundwire.plugins.compression.base import Compressor
from groundwire.plugins.compression.ef21 import EF21
from groundwire.plugins.compression.error_feedback import ErrorMemory
from groundwire.plugins.random import Key


class EControl(EF21):
    """EControl: send ``c = C(eta e + x - h)``, then ``h <- h + c`` and ``e <- e + x - h``; the estimate is ``h``.

    ``e`` adds up what the receiver's estimates missed, and ``eta`` says how much of it is made good: 0 is EF21. The paper's
    theory has ``eta = a / 400`` for a compressor with ``E|C(x) - x|^2 <= (1 - a)|x|^2``. Where the entries take turns, as
    with top-k of a constant vector, an entry waits ``1 / a`` rounds, and everything beyond ``eta = 2 a`` diverges.

    Args:
        compressor: A contractive compressor; an unbiased one is divided by ``1 + omega``, with a warning.
        eta: Control strength, in [0, 1]; by default half of the compressor's ``a``.
        num_devices: Devices that have a memory; may be said later by :meth:`setup`.

    Raises:
        ValueError: If ``eta`` is out of range, or the compressor is unbiased and its ``omega`` is not known; in the first
            round, if ``eta`` is not given and the compressor's ``alpha`` is not known.

    Reference:
        Gao, Islamov, Stich, "EControl: Fast Distributed Optimization with Compression and Error Control", ICLR 2024.
        arXiv:2311.05645

    Example:
        >>> from groundwire.plugins.compression import TopK
        >>> import torch
        >>> feedback, key = EControl(TopK(k=1), eta=0.5, num_devices=1), Key(seed=0)
        >>> feedback(torch.tensor([[3.0, 2.0]]), key).values
        tensor([[3., 0.]])
        >>> feedback(torch.tensor([[3.0, 2.0]]), key).values
        tensor([[3., 3.]])
    """

    def __init__(self, compressor: Compressor, eta: float | None = None, num_devices: int | None = None) -> None:
        if eta is not None and not 0 <= eta <= 1:
            raise ValueError(f"`eta` must be in [0, 1], got {eta}.")
        super().__init__(compressor, num_devices)
        self.eta = eta
        self.errors = ErrorMemory(num_devices)

    def _eta(self, numel: int) -> float:
        if self.eta is not None:
            return self.eta
        alpha = self.compressor.alpha(max(numel, 1))
        if alpha is None:
            raise ValueError(
                f"EControl does not know how contractive {self.compressor} is: give `eta`, for example 0.01."
            )
        return alpha / 2

    @override
    def correct(self, x: Tensor, key: Key, name: str = "update") -> Tensor:
        return super().correct(x, key, name) + self._eta(x.shape[1]) * self.errors.recall(x, key.devices, name)

    @override
    def keep(self, x: Tensor, corrected: Tensor, sent: Tensor, key: Key, name: str = "update") -> Tensor:
        held = self.memory.recall(x, key.devices, name) + sent
        self.errors.keep(self.errors.recall(x, key.devices, name) + (x - held), key.devices, name)
        self.memory.keep(held, key.devices, name)
        return held.to(x.dtype)

    @override
    def extra_repr(self) -> str:
        return f"eta={self.eta}"
