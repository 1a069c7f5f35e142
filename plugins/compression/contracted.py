"""An unbiased compressor, shrunk until it is contractive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.compression.base import Compressor, Message, Payload
from groundwire.plugins.random import Key


class Contracted(Compressor):
    """``C(x) / (1 + omega)``: what error feedback needs of an unbiased ``C`` with ``E|C(x) - x|^2 <= omega |x|^2``.

    It has ``E|C(x) / (1 + omega) - x|^2 <= (1 - a) |x|^2`` with ``a = 1 / (1 + omega)``. The message is that of ``C``.

    Args:
        compressor: An unbiased compressor whose ``omega`` is known.

    Raises:
        ValueError: If it is not unbiased, or its ``omega`` is not known.

    Reference:
        Richtárik, Sokolov, Fatkhullin, "EF21: A New, Simpler, Theoretically Better, and Practically Faster Error
        Feedback", NeurIPS 2021. arXiv:2106.05203

    Example:
        >>> from groundwire.plugins.compression import RandK
        >>> Contracted(RandK(density=0.5)).roundtrip(torch.ones(1, 2), Key(seed=0)).values.sum()
        tensor(1.)
    """

    def __init__(self, compressor: Compressor) -> None:
        super().__init__()
        if not compressor.unbiased or compressor.omega(1) is None:
            raise ValueError(
                f"Contracted needs an unbiased compressor with a known omega, got {compressor}. A contractive one (TopK, "
                "RandK(unbiased=False), scaled SignSGD) goes into error feedback as it is."
            )
        self.compressor = compressor
        self.linear = compressor.linear
        self.carries_nan = compressor.carries_nan
        self.ragged = compressor.ragged
        self.negotiates = compressor.negotiates

    @override
    def is_worthwhile(self, shape: torch.Size) -> bool:
        return self.compressor.is_worthwhile(shape)

    @override
    def reset_state(self) -> None:
        self.compressor.reset_state()

    @override
    def propose(self, x: Tensor, key: Key) -> Tensor | None:
        return self.compressor.propose(x, key)

    @override
    def encode_agreed(self, x: Tensor, key: Key, agreed: Tensor) -> Payload:
        return self.compressor.encode_agreed(x, key, agreed)

    @override
    def settle(self, total: Payload, key: Key, num_devices: int) -> None:
        self.compressor.settle(total, key, num_devices)

    @override
    def decides(self, round: int) -> bool:
        return self.compressor.decides(round)

    @override
    def decide(self) -> Tensor:
        return self.compressor.decide()

    @override
    def adopt(self, decision: Tensor) -> None:
        self.compressor.adopt(decision)

    @override
    def setup(self, shapes: Mapping[str, torch.Size]) -> None:
        self.compressor.setup(shapes)

    @override
    def encode(self, x: Tensor, key: Key) -> Payload:
        return self.compressor.encode(x, key)

    @override
    def decode(self, payload: Payload) -> Tensor:
        return self.compressor.decode(payload) * self.alpha(payload.numel)

    @override
    def roundtrip(self, x: Tensor, key: Key) -> Message:
        message = self.compressor.roundtrip(x, key)
        return replace(message, values=message.values * self.alpha(x.shape[1]))

    @override
    def alpha(self, numel: int) -> float:
        omega = self.compressor.omega(max(numel, 1))
        assert omega is not None
        return 1 / (1 + omega)


def contractive(compressor: Compressor, needed_by: str) -> Compressor:
    """The compressor itself, or :class:`Contracted` with a warning where it is unbiased and loses something.

    Args:
        compressor: Any compressor.
        needed_by: Who wants it, for the messages.

    Returns:
        One that error feedback can use.

    Raises:
        ValueError: If it is unbiased and its ``omega`` is not known.
    """
    if not compressor.unbiased or compressor.omega(2**40) == 0:  # so many, since RandK(k=1000) loses nothing of 1,000
        return compressor
    scaled = Contracted(compressor)
    rank_zero_warn(
        f"{needed_by} expects a contractive compressor: the messages of {type(compressor).__name__} are divided by "
        f"1 + omega (of a million entries: {1 / scaled.alpha(1_000_000):.3g})."
    )
    return scaled
