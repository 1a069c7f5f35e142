"""What an attacker may do to an input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

Norm = Literal["linf", "l2"]

_ROUNDING = 1e-4  # by which a normalised image may leave the box, in units of its width; more in half precision


@dataclass(frozen=True)
class ThreatModel:
    """The ball around an input, in pixel units, and the box of valid inputs, in which an attacker may move.

    Networks normally see normalised inputs ``(pixels - mean) / std``. With ``mean`` and ``std`` the ball, the step and
    the box are those of the pixels, exactly, channel by channel; without them the network's inputs are the pixels.

    Args:
        eps: Radius of the ball, in pixel units; for pixels in [0, 1] usually 0.3 (MNIST), 0.1 (Fashion-MNIST), 8/255
            (CIFAR, 0.0314 in YAML) or 4/255 (ImageNet) with ``"linf"``.
        norm: ``"linf"`` (largest change of a pixel) or ``"l2"`` (Euclidean length of the change).
        lo: Smallest valid pixel.
        hi: Largest valid pixel.
        mean: Of the transform that normalises, one number or one a channel (dimension 1 of a batch).
        std: The same; both or neither.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> threat = ThreatModel(eps=0.1, mean=[0.5], std=[0.25])
        >>> x = torch.zeros(1, 1, 1, 2)  # normalised, so pixels of 0.5
        >>> threat.network_input(threat.project(torch.ones(1, 1, 1, 2), threat.pixels(x)))
        tensor([[[[0.4000, 0.4000]]]])

    Reference:
        Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018. arXiv:1706.06083
    """

    eps: float
    norm: Norm = "linf"
    lo: float = 0.0
    hi: float = 1.0
    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None
    step_scale: float = field(default=1.0, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.eps < float("inf"):
            raise ValueError(f"`eps` must be positive, got {self.eps}: it is the radius in pixel units, such as 8/255.")
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"`norm` must be 'linf' or 'l2', got {self.norm!r}.")
        if not -math.inf < self.lo < self.hi < math.inf:
            raise ValueError(
                f"`lo` must be below `hi`, both finite, got {self.lo} and {self.hi}: give what the data can reach."
            )
        if (self.mean is None) != (self.std is None):
            raise ValueError("Give both `mean` and `std` of the transform that normalises, or neither.")
        if self.std is not None and not all(s > 0 for s in _listed(self.std)):
            raise ValueError(f"`std` must be positive, got {self.std}.")

    def scaled(self, factor: float) -> ThreatModel:
        """The same with ``factor`` times the radius; attacks scale a step size that they were given along."""
        found = replace(self, eps=self.eps * factor)
        object.__setattr__(found, "step_scale", self.step_scale * factor)
        return found

    def check(self, x: Tensor) -> None:
        """Refuse inputs that cannot be attacked; waits for the device.

        Args:
            x: Network inputs ``(B, ...)``.

        Raises:
            TypeError: If they are not floating-point numbers.
            ValueError: If their pixels are outside the box or not finite.
        """
        self.check_dtype(x)
        if x.numel() == 0:
            return
        low, high = (float(value) for value in self.pixels(x.detach(), clamp=False).aminmax())
        self.check_range(low, high, rounding_of(x))

    def check_range(self, low: float, high: float, rounding: float = _ROUNDING) -> None:
        """Refuse pixels outside of the box.

        Args:
            low: The smallest pixel.
            high: The largest pixel.
            rounding: By how much of the box's width they may leave it.

        Raises:
            ValueError: If they are outside, or not finite.
        """
        slack = rounding * (self.hi - self.lo)
        if not (low >= self.lo - slack and high <= self.hi + slack):  # NaN fails both
            given = "" if self.mean is None else " after undoing mean and std"
            raise ValueError(
                f"inputs range [{low:.4g}, {high:.4g}]{given}, outside [{self.lo:g}, {self.hi:g}]; pass mean= and std= "
                "used by your transforms, or lo=/hi= of ThreatModel."
            )

    @staticmethod
    def check_dtype(x: Tensor) -> None:
        """Refuse inputs that have no gradient.

        Args:
            x: Network inputs.

        Raises:
            TypeError: If they are no floating-point tensor.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"inputs are a {type(x).__name__}; an attack needs one tensor of inputs.")
        if not x.is_floating_point():
            kind = str(x.dtype).removeprefix("torch.")
            raise TypeError(f"inputs are {kind}; attack needs floating inputs: scale them to [0, 1] in the transforms.")

    def pixels(self, x: Tensor, clamp: bool = True) -> Tensor:
        """From network inputs ``(B, C, ...)`` to pixels, at least in float32, rounding errors at the box cut off or not."""
        pixels = x if x.dtype == torch.float64 else x.float()
        if self.mean is not None and self.std is not None:
            pixels = pixels * _per_channel(self.std, pixels) + _per_channel(self.mean, pixels)
        return pixels.clamp(self.lo, self.hi) if clamp else pixels

    def network_input(self, pixels: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """From pixels to what the network sees, in ``dtype`` (that of the pixels by default)."""
        if self.mean is not None and self.std is not None:
            pixels = (pixels - _per_channel(self.mean, pixels)) / _per_channel(self.std, pixels)
        return pixels if dtype is None else pixels.to(dtype)

    def project(self, moved: Tensor, x: Tensor) -> Tensor:
        """The nearest point of the ball around ``x`` (then of the box) for each sample.

        Args:
            moved: Pixels ``(..., B, *input)``: also several points for each input.
            x: Pixels ``(B, *input)``, in the box.

        Returns:
            Like ``moved``.
        """
        if self.norm == "linf":
            moved = torch.maximum(torch.minimum(moved, x + self.eps), x - self.eps)
        else:
            delta = moved - x
            length = norm_of(delta, x.ndim - 1)
            moved = x + delta * (self.eps / length.clamp_min(self.eps))
        return moved.clamp(self.lo, self.hi)

    def steepest(self, gradient: Tensor, input_ndim: int) -> Tensor:
        """The direction of unit norm in which a function with this gradient rises fastest; 0 where the gradient is 0.

        Args:
            gradient: Shape ``(..., *input)``.
            input_ndim: Dimensions of one input.

        Returns:
            Like ``gradient``: its sign (linf), or itself over its length (l2).
        """
        if self.norm == "linf":
            return gradient.sign()
        return unit(gradient, input_ndim)

    def uniform(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Points drawn uniformly from the ball around each input, then cut to the box.

        Args:
            x: Pixels ``(B, *input)``.
            generator: Source of randomness, on the device of ``x``.

        Returns:
            Like ``x``.
        """
        if self.norm == "linf":
            start = x + self.eps * (2 * _rand(x, generator) - 1)
        else:
            size = math.prod(x.shape[1:])
            drawn = _rand(x.new_empty(len(x), size + 1), generator)  # at once: the same under vmap
            direction, radius = unit(_normal(drawn[:, :size]), 1), self.eps * drawn[:, size:] ** (1 / size)
            start = x + (direction * radius).reshape(x.shape)
        within: Tensor = start.clamp(self.lo, self.hi)
        return within


def rounding_of(x: Tensor) -> float:
    """By how much of the box's width inputs of this precision may leave it."""
    return max(_ROUNDING, torch.finfo(x.dtype).eps)


def norm_of(x: Tensor, input_ndim: int) -> Tensor:
    """Euclidean length of each input, its dimensions kept: shape ``(..., 1, ..., 1)``."""
    dims = tuple(range(x.ndim - input_ndim, x.ndim))
    length: Tensor = x.square().sum(dim=dims, keepdim=True).sqrt() if dims else x.abs()
    return length


def unit(x: Tensor, input_ndim: int) -> Tensor:
    """Each input over its length, also where squares would underflow (a saturated network); 0 stays 0."""
    dims = tuple(range(x.ndim - input_ndim, x.ndim))
    largest = x.abs().amax(dim=dims, keepdim=True) if dims else x.abs()
    scaled = x / largest.clamp_min(torch.finfo(x.dtype).tiny)
    return scaled / norm_of(scaled, input_ndim).clamp_min(1e-10)


def gaussian(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal numbers like ``x``; made of uniform ones, which are the same drawn together or in parts."""
    return _normal(_rand(x, generator))


def _normal(uniform: Tensor) -> Tensor:
    drawn: Tensor = torch.special.ndtri(uniform.clamp_min(1e-7))
    return drawn


def _rand(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def _listed(value: float | Sequence[float]) -> list[float]:
    return [float(value)] if isinstance(value, int | float) else [float(v) for v in value]


def _per_channel(value: float | Sequence[float], x: Tensor) -> Tensor:
    numbers = torch.tensor(_listed(value), dtype=x.dtype, device=x.device)
    if len(numbers) == 1:
        return numbers[0]
    if x.ndim < 2 or x.shape[1] != len(numbers):
        raise ValueError(
            f"mean and std have {len(numbers)} channels, but the inputs have shape {tuple(x.shape)}: channels are expected "
            "in dimension 1."
        )
    return numbers.view(-1, *[1] * (x.ndim - 2))
