"""EF21 and its relatives: devices send how far the receiver's picture of their gradient is from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.compression.base import Compressor
from groundwire.plugins.compression.contracted import contractive
from groundwire.plugins.compression.error_feedback import ErrorMemory, Feedback, finite_rows
from groundwire.plugins.random import Key


class EF21(Feedback):
    """EF21: send ``c = C(x - h)``, then ``h <- h + c`` on both sides; the receiver's estimate of ``x`` is ``h``.

    ``h`` starts at zero, so the first message is ``C(x)``. With full gradients ``h`` converges to them, where the
    residuals of classic error feedback stay as large as the step size times the gradients' differences among devices;
    with noisy ones it keeps their noise (:class:`EF21SGDM`). Where devices are sampled, the receiver averages over the
    participants of a round.

    Args:
        compressor: A contractive compressor; an unbiased one is divided by ``1 + omega``, with a warning.
        num_devices: Devices that have a memory; may be said later by :meth:`setup`.

    Raises:
        ValueError: If the compressor is unbiased and its ``omega`` is not known.

    Reference:
        Richtárik, Sokolov, Fatkhullin, "EF21: A New, Simpler, Theoretically Better, and Practically Faster Error
        Feedback", NeurIPS 2021. arXiv:2106.05203

    Example:
        >>> from groundwire.plugins.compression import TopK
        >>> feedback, key = EF21(TopK(k=1), num_devices=1), Key(seed=0)
        >>> feedback(torch.tensor([[3.0, 2.0]]), key).values
        tensor([[3., 0.]])
        >>> feedback(torch.tensor([[3.0, 2.0]]), key).values
        tensor([[3., 2.]])
    """

    def __init__(self, compressor: Compressor, num_devices: int | None = None) -> None:
        super().__init__(contractive(compressor, type(self).__name__), num_devices)
        self.server = ErrorMemory(1)

    @property
    @override
    def memories(self) -> list[ErrorMemory]:
        return [memory for memory in super().memories if memory is not self.server]

    @override
    def reset_state(self) -> None:
        super().reset_state()
        self.server.reset_state()

    @override
    def correct(self, x: Tensor, key: Key, name: str = "update") -> Tensor:
        return x - self.memory.recall(x, key.devices, name)

    @override
    def keep(self, x: Tensor, corrected: Tensor, sent: Tensor, key: Key, name: str = "update") -> Tensor:
        return self._hold(x, sent, key, name).to(x.dtype)

    def _hold(self, x: Tensor, sent: Tensor, key: Key, name: str) -> Tensor:
        """Add what arrived to ``h`` and return it."""
        held = self.memory.recall(x, key.devices, name) + sent
        self.memory.keep(held, key.devices, name)
        return held

    @override
    def estimate(self, mean: Tensor, name: str = "update") -> Tensor:
        return self.server.correct(mean, (0,), name).to(mean.dtype)

    @override
    def keep_estimate(self, mean: Tensor, name: str = "update") -> None:
        self.server.keep(self.server.correct(mean, (0,), name), (0,), name)


class EF21W(EF21):
    """EF21-W: EF21 with devices weighted by their smoothness, for a step size that depends on its mean.

    Device ``i`` of ``M`` sends ``c_i = C(x_i / (M w_i) - h_i)`` with ``w_i = L_i / sum_j L_j``, and the receiver's
    estimate of ``x_i`` is ``M w_i h_i``. For compressors with ``C(a x) = a C(x)``, ``a > 0`` (TopK, PowerSGD, sketches)
    these are the iterates of EF21 itself, which is how the paper comes to a better analysis of EF21; rounding to fixed
    grids tells them apart.

    Args:
        compressor: As for :class:`EF21`.
        smoothness: ``L_i`` of every device, positive; only ratios count.
        num_devices: Devices that have a memory; may be said later by :meth:`setup`.

    Raises:
        ValueError: If ``smoothness`` is empty or has an entry that is not positive and finite.

    Reference:
        Richtárik, Gasanov, Burlachenko, "Error Feedback Reloaded: From Quadratic to Arithmetic Mean of Smoothness
        Constants", ICLR 2024. arXiv:2402.10774

    Example:
        >>> from groundwire.plugins.compression import TopK
        >>> feedback = EF21W(TopK(k=1), smoothness=[1.0, 3.0], num_devices=2)
        >>> feedback(torch.tensor([[3.0, 2.0], [1.0, 6.0]]), Key(seed=0, devices=(0, 1))).values
        tensor([[3., 0.],
                [0., 6.]])
    """

    def __init__(self, compressor: Compressor, smoothness: Sequence[float], num_devices: int | None = None) -> None:
        constants = torch.as_tensor(list(smoothness), dtype=torch.float64)
        if not len(constants) or not bool((torch.isfinite(constants) & (constants > 0)).all()):
            raise ValueError(f"`smoothness` needs one positive number a device, got {list(smoothness)}.")
        self.smoothness = tuple(float(c) for c in constants)
        super().__init__(compressor, num_devices)
        self._factors = constants / constants.mean()
        if num_devices is not None:
            self._check_count(num_devices)

    @override
    def setup(self, num_devices: int, hosted: range | None = None) -> None:
        self._check_count(num_devices)
        super().setup(num_devices, hosted)

    def _check_count(self, num_devices: int) -> None:
        if len(self.smoothness) != num_devices:
            raise ValueError(
                f"`smoothness` has {len(self.smoothness)} entries, but there are {num_devices} devices; give one a device."
            )

    @override
    def factors(self, devices: Sequence[int]) -> Tensor:
        return self._factors[list(devices)]

    def _column(self, like: Tensor, devices: Sequence[int]) -> Tensor:
        return self.factors(devices).to(like.device, torch.promote_types(like.dtype, torch.float32)).unsqueeze(1)

    @override
    def correct(self, x: Tensor, key: Key, name: str = "update") -> Tensor:
        return super().correct(x / self._column(x, key.devices), key, name)

    @override
    def keep(self, x: Tensor, corrected: Tensor, sent: Tensor, key: Key, name: str = "update") -> Tensor:
        return (self._hold(x, sent, key, name) * self._column(x, key.devices)).to(x.dtype)

    @override
    def extra_repr(self) -> str:
        return f"smoothness={self.smoothness}"


class EF21SGDM(EF21):
    """EF21-SGDM: EF21 on a running mean of the gradients, ``v <- (1 - eta) v + eta x``, which tames their noise.

    The running mean starts with the first gradient.

    Args:
        compressor: As for :class:`EF21`.
        eta: Weight of the newest gradient, in (0, 1]; 1 is EF21.
        num_devices: Devices that have a memory; may be said later by :meth:`setup`.

    Raises:
        ValueError: If ``eta`` is out of range.

    Reference:
        Fatkhullin, Tyurin, Richtárik, "Momentum Provably Improves Error Feedback!", NeurIPS 2023. arXiv:2305.15155

    Example:
        >>> from groundwire.plugins.compression import TopK
        >>> feedback, key = EF21SGDM(TopK(k=1), eta=0.5, num_devices=1), Key(seed=0)
        >>> feedback(torch.tensor([[3.0, 2.0]]), key).values
        tensor([[3., 0.]])
        >>> feedback(torch.tensor([[5.0, 1.0]]), key).values
        tensor([[3.0000, 1.5000]])
    """

    def __init__(self, compressor: Compressor, eta: float = 0.1, num_devices: int | None = None) -> None:
        if not 0 < eta <= 1:
            raise ValueError(f"`eta` must be in (0, 1], got {eta}.")
        super().__init__(compressor, num_devices)
        self.eta = eta
        self.averages = ErrorMemory(num_devices)
        self.started = ErrorMemory(num_devices)

    def _average(self, x: Tensor, key: Key, name: str) -> Tensor:
        old = self.averages.recall(x, key.devices, name)
        started = self.started.recall(x[:, :1], key.devices, name)
        return torch.where(started > 0, torch.lerp(old, x.to(old.dtype), self.eta), x.to(old.dtype))

    @override
    def correct(self, x: Tensor, key: Key, name: str = "update") -> Tensor:
        return super().correct(self._average(x, key, name), key, name)

    @override
    def keep(self, x: Tensor, corrected: Tensor, sent: Tensor, key: Key, name: str = "update") -> Tensor:
        average = self._average(x, key, name)
        lost = ~finite_rows(sent).unsqueeze(1)
        self.averages.keep(average.masked_fill(lost, torch.nan), key.devices, name)
        self.started.keep(torch.ones_like(average[:, :1]).masked_fill(lost, torch.nan), key.devices, name)
        return super().keep(x, corrected, sent, key, name)

    @override
    def extra_repr(self) -> str:
        return f"eta={self.eta}"
