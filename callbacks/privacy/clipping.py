"""How far a record may move the gradient."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

Norms = dict[Tensor, Tensor]
ClippingName = Literal["flat", "per_layer", "adaptive"]

_STABILITY = 1e-6  # added to a norm before dividing by it, as Opacus does


class Clipping(ABC):
    """Bounds the L2 norm of what one record adds to the sum of gradients by :attr:`max_grad_norm`.

    Args:
        max_grad_norm: The bound ``C`` on a record's whole gradient.

    Raises:
        ValueError: If it is not positive and finite.
    """

    needs_parameters_apart: bool = False
    """Whether a record's weight differs between parameters."""
    num_parameters: int = 1
    """Trainable parameter tensors of the module."""

    def __init__(self, max_grad_norm: float) -> None:
        if not (max_grad_norm > 0 and math.isfinite(max_grad_norm)):
            raise ValueError(f"`max_grad_norm` must be a positive number, got {max_grad_norm}.")
        self.max_grad_norm = max_grad_norm

    @abstractmethod
    def weights(self, squared_norms: Norms) -> Norms:
        """What to multiply each record's gradient by, shape ``(n,)`` by parameter, from squared norms alike."""

    def gradient_noise(self, noise_multiplier: float, expected_batch: float) -> float:
        """Noise multiplier of the gradient, so that all that a step releases costs ``noise_multiplier``."""
        return noise_multiplier

    def count(self, squared_norms: Norms) -> Tensor:
        """Records whose gradient is within the bound less half of all, ``sum_i (1[norm_i <= C] - 1/2)``."""
        within = _total(squared_norms) <= self.max_grad_norm**2
        return (within.to(torch.float32) - 0.5).sum()

    def count_noise(self, expected_batch: float) -> float | None:
        """Standard deviation of the noise on that count; None where it is not released."""
        return None

    def update(self, noisy_count: float, expected_batch: float) -> None:  # noqa: B027  a fixed bound has nothing to do
        """Adapt to the released count."""


class FlatClipping(Clipping):
    """One bound on the norm over all parameters.

    Reference:
        Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, Algorithm 1. arXiv:1607.00133
    """

    @override
    def weights(self, squared_norms: Norms) -> Norms:
        factor = _factor(_total(squared_norms), self.max_grad_norm)
        return dict.fromkeys(squared_norms, factor)


class PerLayerClipping(Clipping):
    """The same bound ``C / sqrt(P)`` on each of the ``P`` parameter tensors: cheaper to compute, more is cut.

    Reference:
        McMahan et al., "A General Approach to Adding Differential Privacy to Iterative Training Procedures", 2018,
        Section 3. arXiv:1812.06210
    """

    needs_parameters_apart = True

    @override
    def weights(self, squared_norms: Norms) -> Norms:
        bound = self.max_grad_norm / math.sqrt(self.num_parameters)
        finite = torch.isfinite(_total(squared_norms))  # a record that is broken somewhere is left out everywhere
        return {p: _factor(norm, bound) * finite for p, norm in squared_norms.items()}


class AdaptiveClipping(FlatClipping):
    """A bound that follows a quantile of the records' norms, estimated privately.

    Each step also releases how many records were within the bound, with noise of standard deviation ``sigma_b``
    (a twentieth of the expected batch). The gradient's noise multiplier is raised to
    ``(sigma^-2 - (2 sigma_b)^-2)^(-1/2)``, so that both releases together cost one Gaussian of multiplier ``sigma``.

    Args:
        max_grad_norm: Where the bound starts.
        target_quantile: Share of the records whose gradient should be within the bound, in (0, 1).
        learning_rate: Of the geometric update ``C <- C exp(-learning_rate (share - target_quantile))``.

    Raises:
        ValueError: If an argument is out of range; from :meth:`gradient_noise`, if the noise asked for is larger than
            that of the count.

    Reference:
        Andrew, Thakkar, McMahan, Ramaswamy, "Differentially Private Learning with Adaptive Clipping", NeurIPS 2021.
        arXiv:1905.03871
    """

    def __init__(self, max_grad_norm: float, target_quantile: float = 0.5, learning_rate: float = 0.2) -> None:
        super().__init__(max_grad_norm)
        if not 0 < target_quantile < 1:
            raise ValueError(f"`target_quantile` must be in (0, 1), got {target_quantile}.")
        if not learning_rate > 0:
            raise ValueError(f"`learning_rate` of the clipping norm must be positive, got {learning_rate}.")
        self.target_quantile = target_quantile
        self.learning_rate = learning_rate

    @override
    def count_noise(self, expected_batch: float) -> float | None:
        return expected_batch / 20

    @override
    def gradient_noise(self, noise_multiplier: float, expected_batch: float) -> float:
        count_noise = expected_batch / 20
        if noise_multiplier == 0:
            return 0.0
        if noise_multiplier >= 2 * count_noise:
            raise ValueError(
                f"Adaptive clipping cannot hide its count behind a noise multiplier of {noise_multiplier:.3g} with only "
                f"{expected_batch:.0f} records a step (it can below {2 * count_noise:.3g}). Use larger batches, or "
                "clipping='flat'."
            )
        # the count, centred, has sensitivity 1/2
        return float((noise_multiplier**-2 - (2 * count_noise) ** -2) ** -0.5)

    @override
    def update(self, noisy_count: float, expected_batch: float) -> None:
        share = noisy_count / expected_batch + 0.5
        self.max_grad_norm *= math.exp(-self.learning_rate * (share - self.target_quantile))


def make_clipping(name: ClippingName, max_grad_norm: float, target_quantile: float = 0.5) -> Clipping:
    """The clipping of a name.

    Args:
        name: ``"flat"``, ``"per_layer"`` or ``"adaptive"``.
        max_grad_norm: The bound, or where it starts.
        target_quantile: For ``"adaptive"``.

    Returns:
        The clipping.

    Raises:
        ValueError: If there is none of that name, or an argument is out of range.
    """
    if name == "adaptive":
        return AdaptiveClipping(max_grad_norm, target_quantile)
    kinds: dict[Any, type[Clipping]] = {"flat": FlatClipping, "per_layer": PerLayerClipping}
    if name not in kinds:
        raise ValueError(f"`clipping` must be 'flat', 'per_layer' or 'adaptive', got {name!r}.")
    return kinds[name](max_grad_norm)


def _total(squared_norms: Norms) -> Tensor:
    device = next(iter(squared_norms.values())).device
    return torch.stack([norm.to(device) for norm in squared_norms.values()]).sum(0)


def _factor(squared_norm: Tensor, bound: float) -> Tensor:
    """``min(1, C / norm)``, and 0 for a record whose norm is not finite: it must not move the weights at all."""
    factor = (bound / (squared_norm.sqrt() + _STABILITY)).clamp(max=1.0)
    return torch.where(torch.isfinite(squared_norm), factor, 0)
