"""Fading: the complex gain that a device's symbols meet on their way, and what is known of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt
import scipy.special
import torch
from torch import Tensor, nn
from typing_extensions import override

from groundwire.plugins.random import Key, stream

_UPLINK = "uplink/fading"
_MOST_DIRECT = 1e8  # of the K factor: beyond, |h|^2 spreads by less than 0.02 per cent
_Array = npt.NDArray[np.float64]


class PathLoss(nn.Module):
    """Average gain by distance: devices that lie evenly on a ring around the server, each at one place for the whole run.

    The mean square of a device's gain is multiplied by ``(reference / distance)^exponent``.

    Args:
        exponent: 2 in free space, 3 to 4 in a city.
        inner_radius: Least distance, in any unit of length.
        outer_radius: Largest distance.
        reference: Distance at which nothing changes; by default the outer radius, so that nobody is heard worse than
            without path loss.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> place = PathLoss(exponent=2.0, inner_radius=10.0, outer_radius=100.0)
        >>> key = Key(seed=1, devices=(0, 1, 2))
        >>> place.distances(key).round().tolist(), [round(x, 2) for x in place(key).tolist()]
        ([63.0, 76.0, 14.0], [2.52, 1.75, 47.92])
    """

    def __init__(
        self,
        exponent: float = 3.0,
        inner_radius: float = 10.0,
        outer_radius: float = 100.0,
        reference: float | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= exponent < math.inf:
            raise ValueError(f"`exponent` must be finite and >= 0, got {exponent}.")
        if not 0 < inner_radius <= outer_radius < math.inf:
            raise ValueError(f"Radii must be 0 < inner_radius <= outer_radius, got {inner_radius=}, {outer_radius=}.")
        if reference is not None and not 0 < reference < math.inf:
            raise ValueError(f"`reference` is a distance and must be > 0, got {reference}.")
        self.exponent = exponent
        self.inner_radius = inner_radius
        self.outer_radius = outer_radius
        self.reference = outer_radius if reference is None else reference

    def distances(self, key: Key) -> Tensor:
        """Distance of each device, shape ``(M,)``, the same in all rounds."""
        draws = [
            torch.rand((), generator=stream(key.seed, purpose="path_loss", device_id=m), dtype=torch.float64)
            for m in key.devices
        ]
        inner, outer = self.inner_radius**2, self.outer_radius**2
        return (inner + torch.stack(draws) * (outer - inner)).sqrt()

    def forward(self, key: Key) -> Tensor:
        """What multiplies the mean square of each device's gain, shape ``(M,)``, float32."""
        return (self.reference / self.distances(key)).pow(self.exponent).float()

    @override
    def extra_repr(self) -> str:
        return (
            f"exponent={self.exponent}, inner_radius={self.inner_radius}, outer_radius={self.outer_radius}, "
            f"reference={self.reference}"
        )


class Fading(nn.Module, ABC):
    """The law of the devices' complex gains ``h``, independent over devices and rounds.

    Args:
        variance: Mean of ``|h|^2``, before path loss.
        block: Whether a device has one gain for all channel uses of a round; else each use has its own (OFDM
            sub-channels).
        path_loss: Of the devices' places; by default all are alike.

    Raises:
        ValueError: If ``variance`` is not positive.
    """

    def __init__(self, variance: float = 1.0, block: bool = False, path_loss: PathLoss | None = None) -> None:
        super().__init__()
        if not 0 < variance < math.inf:
            raise ValueError(f"`variance`, the mean of |h|^2, must be finite and > 0, got {variance}.")
        self.variance = float(variance)
        self.block = block
        self.path_loss = path_loss

    def gains(self, key: Key, uses: int, *, on: torch.device | str = "cpu", purpose: str = _UPLINK) -> Tensor:
        """Gains of a round, shape ``(M, uses)``, or ``(M, 1)`` under block fading; complex64.

        Args:
            key: Names the devices, one a row, and the round.
            uses: Complex channel uses.
            on: Where to draw.
            purpose: Of the draws: each direction, and each antenna, has its own.

        Returns:
            The gains; the same for the same arguments.
        """
        gains = self._draw(key, 1 if self.block else uses, on, purpose) * math.sqrt(self.variance)
        if self.path_loss is not None:
            gains = gains * self.path_loss(key).to(gains.device).sqrt().unsqueeze(1)
        return gains

    def mean_squares(self, key: Key) -> Tensor:
        """The mean of ``|h|^2`` of each device, shape ``(M,)``, float64."""
        factors = torch.ones(len(key)) if self.path_loss is None else self.path_loss(key)
        return self.variance * factors.double()

    @abstractmethod
    def _draw(self, key: Key, uses: int, on: torch.device | str, purpose: str) -> Tensor:
        """Gains of mean square 1."""

    @abstractmethod
    def inverse_moment(self, threshold: float) -> float:
        """``E[1{|h|^2 >= threshold} / |h|^2]``: what inverting the channel costs on average, in energy a symbol.

        Path loss is not in it: see :meth:`law`.

        Args:
            threshold: On ``|h|^2``; a device is silent below.

        Returns:
            The moment; infinite where inversion has no finite average energy.
        """

    @abstractmethod
    def activity(self, threshold: float) -> float:
        """``P(|h|^2 >= threshold)``: the share of channel uses in which a device is not silent; without path loss.

        Args:
            threshold: On ``|h|^2``.

        Returns:
            A probability.
        """

    @abstractmethod
    def law(self, variance: float, error_var: float = 0.0) -> Fading:
        """The law of what is known of one device's gain, ``h + CN(0, error_var)``.

        Args:
            variance: Mean of ``|h|^2`` of this device: see :meth:`mean_squares`.
            error_var: Variance of the error.

        Returns:
            A law of its own.
        """

    @override
    def extra_repr(self) -> str:
        return f"variance={self.variance}, block={self.block}"


class NoFading(Fading):
    """Every gain is ``sqrt(variance)``, times path loss.

    Example:
        >>> NoFading().gains(Key(seed=0, devices=(0, 1)), 3)
        tensor([[1.+0.j, 1.+0.j, 1.+0.j],
                [1.+0.j, 1.+0.j, 1.+0.j]])
    """

    def _draw(self, key: Key, uses: int, on: torch.device | str, purpose: str) -> Tensor:
        return torch.ones(len(key), uses, dtype=torch.complex64, device=on)

    @override
    def inverse_moment(self, threshold: float) -> float:
        return 1 / self.variance if self.variance >= threshold else 0.0

    @override
    def activity(self, threshold: float) -> float:
        return float(self.variance >= threshold)

    @override
    def law(self, variance: float, error_var: float = 0.0) -> Fading:
        is_known = error_var * _MOST_DIRECT < variance
        return NoFading(variance) if is_known else Rician(variance / error_var, variance + error_var)


class Rayleigh(Fading):
    """No line of sight: ``h ~ CN(0, variance)``.

    Example:
        >>> h = Rayleigh().gains(Key(seed=0, devices=(0, 1)), 10_000)
        >>> h.shape, round(h.abs().square().mean().item(), 1)
        (torch.Size([2, 10000]), 1.0)
        >>> round(Rayleigh().inverse_moment(0.1), 3), round(Rayleigh().activity(0.1), 3)
        (1.823, 0.905)
    """

    def _draw(self, key: Key, uses: int, on: torch.device | str, purpose: str) -> Tensor:
        return scattered(key, uses, on, purpose)

    @override
    def inverse_moment(self, threshold: float) -> float:
        return float(scipy.special.exp1(threshold / self.variance)) / self.variance

    @override
    def activity(self, threshold: float) -> float:
        return math.exp(-threshold / self.variance)

    @override
    def law(self, variance: float, error_var: float = 0.0) -> Fading:
        return Rayleigh(variance + error_var)


class Rician(Fading):
    """A line of sight beside scattered paths: ``h = sqrt(K / (K + 1)) e^(j phi) + CN(0, 1 / (K + 1))``, times the scale.

    The phase ``phi`` of the line of sight is uniform, drawn for each device and round.

    Args:
        k_factor: Energy of the line of sight over that of the scattered paths, ``K``, at most 1e8; 0 is Rayleigh fading.
        variance: Mean of ``|h|^2``, before path loss.
        block: As in :class:`Fading`.
        path_loss: As there.

    Raises:
        ValueError: If ``k_factor`` is out of range, or ``variance`` not positive.

    Example:
        >>> round(Rician(k_factor=10.0).activity(0.1), 4)
        0.9993
    """

    def __init__(
        self, k_factor: float, variance: float = 1.0, block: bool = False, path_loss: PathLoss | None = None
    ) -> None:
        super().__init__(variance, block, path_loss)
        if not 0 <= k_factor <= _MOST_DIRECT:
            raise ValueError(
                f"`k_factor` must be in [0, {_MOST_DIRECT:g}], where 0 is Rayleigh fading, got {k_factor}. Beyond, use "
                "NoFading."
            )
        self.k_factor = float(k_factor)

    def _draw(self, key: Key, uses: int, on: torch.device | str, purpose: str) -> Tensor:
        phase = key.rows(f"{purpose}/phase", lambda g: torch.rand(1, generator=g, device=on), on=on) * (2 * math.pi)
        direct = torch.polar(torch.full_like(phase, math.sqrt(self.k_factor / (self.k_factor + 1))), phase)
        return scattered(key, uses, on, purpose) / math.sqrt(self.k_factor + 1) + direct

    @override
    def inverse_moment(self, threshold: float) -> float:
        if threshold <= 0:
            return math.inf
        counts, weights = self._mixture()
        floor = threshold * (self.k_factor + 1) / self.variance
        means = np.where(counts > 0, scipy.special.gammaincc(counts.clip(1), floor) / counts.clip(1), 0)
        means[counts == 0] = scipy.special.exp1(floor)
        return float(weights @ means) * (self.k_factor + 1) / self.variance

    @override
    def activity(self, threshold: float) -> float:
        counts, weights = self._mixture()
        floor = max(threshold, 0) * (self.k_factor + 1) / self.variance
        return min(float(weights @ scipy.special.gammaincc(counts + 1, floor)), 1.0)

    @override
    def law(self, variance: float, error_var: float = 0.0) -> Fading:
        more_scattered = 1 + error_var * (self.k_factor + 1) / variance
        return Rician(self.k_factor / more_scattered, variance + error_var)

    def _mixture(self) -> tuple[_Array, _Array]:
        """``|h|^2 (K + 1) / variance`` follows a Gamma law of shape ``J + 1``, with ``J`` from a Poisson law of mean ``K``.

        The values of ``J`` that matter and their probabilities.
        """
        k, reach = self.k_factor, 12 * math.sqrt(self.k_factor) + 40
        counts = np.arange(max(math.floor(k - reach), 0), math.ceil(k + reach), dtype=np.float64)
        weights = np.exp(scipy.special.xlogy(counts, k) - k - scipy.special.gammaln(counts + 1))
        return counts, weights / weights.sum()  # of large K, rounding shows in the exponent

    @override
    def extra_repr(self) -> str:
        return f"k_factor={self.k_factor}, {super().extra_repr()}"


def scattered(key: Key, uses: int, on: torch.device | str, purpose: str) -> Tensor:
    """``CN(0, 1)`` for each device and use, shape ``(M, uses)``, complex64."""
    return key.rows(purpose, lambda g: torch.randn(uses, generator=g, dtype=torch.complex64, device=on), on=on)
