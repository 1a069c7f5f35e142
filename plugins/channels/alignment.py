"""How devices scale their symbols so that they meet in the air with given weights: zero-forcing and minimum MSE.

Device ``m`` sends ``b_m s_m``, the receiver hears ``y = sum_m h_m b_m s_m + z`` and takes ``Re(c y)`` for
``sum_m target_m s_m``. The symbols ``s_m`` are real, uncorrelated over the devices, and of variance 1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def zero_forcing(target: Tensor, gains: Tensor, power: float | Tensor) -> tuple[Tensor, Tensor]:
    """The unbiased alignment of least noise: ``c h_m b_m = target_m``, and one device at least spends all its power.

    Args:
        target: What each device's symbols are to be multiplied with, ``>= 0``, shape ``(M,)``.
        gains: Complex gains ``h``, shape ``(M,)``.
        power: What ``|b_m|^2`` may be at most: energy of a symbol of variance 1; a number, or shape ``(M,)``.

    Returns:
        ``(scale, transmit)``: the receiver's ``c = max_m target_m / (sqrt(power_m) |h_m|)``, a float64 scalar, and the
        devices' ``b``, complex128, shape ``(M,)``. All zeros if every target is 0.

    Raises:
        ValueError: If an argument is out of range, or a device with a target above 0 has gain 0.

    Reference:
        Mohajer Hamidi, Bereyhi, Asaad, Poor, "Over-the-Air Fair Federated Learning via Multi-Objective Optimization",
        IEEE Commun. Lett., 2025. arXiv:2501.03392

    Example:
        >>> scale, transmit = zero_forcing(torch.tensor([0.5, 0.5]), torch.tensor([2.0 + 0j, 0.0 + 1j]), power=1.0)
        >>> scale.item(), transmit.tolist()
        (0.5, [(0.5+0j), -1j])
    """
    target, gains, reach = _checked(target, gains, power)
    deaf = (reach == 0) & (target > 0)
    if bool(deaf.any()):
        row = int(deaf.nonzero()[0])
        raise ValueError(
            f"The device of row {row} has gain 0 and cannot be aligned to its target {float(target[row])}: leave it out, or "
            "use minimum_mse."
        )
    scale = torch.where(target > 0, target / reach, 0).max()
    return scale, _transmit(target, gains, reach, scale)


def minimum_mse(target: Tensor, gains: Tensor, power: float | Tensor, noise_var: float) -> tuple[Tensor, Tensor]:
    """The alignment of least mean square error: devices whose channel is too weak send at full power and count for less.

    For a given ``c`` the best ``b_m`` has the phase of ``h_m*`` and the amplitude
    ``min(target_m / (c |h_m|), sqrt(power_m))``. The error is then convex in ``c`` and piecewise quadratic; the pieces
    differ in the devices that send at full power, which are those with the largest ``target_m / (sqrt(power_m) |h_m|)``.

    Args:
        target: As in :func:`zero_forcing`.
        gains: As there.
        power: As there.
        noise_var: Variance of the noise in a received real number: half of that in a complex symbol.

    Returns:
        ``(scale, transmit)`` as there. It is biased; without noise it is zero-forcing.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> target, gains = torch.tensor([0.5, 0.5]), torch.tensor([2.0 + 0j, 0.1 + 0j])
        >>> scale, transmit = minimum_mse(target, gains, power=1.0, noise_var=0.1)
        >>> round(scale.item(), 3), [round(abs(b), 3) for b in transmit.tolist()]
        (0.455, [0.55, 1.0])
        >>> round(zero_forcing(target, gains, power=1.0)[0].item(), 3)
        5.0
    """
    target, gains, reach = _checked(target, gains, power)
    if not 0 <= noise_var < float("inf"):
        raise ValueError(f"`noise_var` must be finite and >= 0, got {noise_var}.")
    ratio = torch.where(target > 0, target / reach, 0)
    order = ratio.argsort(descending=True)
    numerator = (target * reach)[order].cumsum(0)
    denominator = reach[order].square().cumsum(0) + noise_var
    candidates = torch.cat([numerator / denominator, ratio.max().reshape(1)])
    candidates = candidates[torch.isfinite(candidates)]
    received = torch.minimum(candidates.unsqueeze(1) * reach, target)  # c |h_m b_m|
    errors = (received - target).square().sum(1) + candidates.square() * noise_var
    scale = candidates[errors.argmin()] if len(candidates) else target.new_zeros(())
    return scale, _transmit(target, gains, reach, scale)


def alignment_mse(target: Tensor, gains: Tensor, scale: Tensor, transmit: Tensor, noise_var: float) -> Tensor:
    """Mean square error of one entry of ``Re(c y)``.

    Args:
        target: As in :func:`zero_forcing`.
        gains: As there.
        scale: What it returned.
        transmit: What it returned.
        noise_var: Variance of the noise in a received real number.

    Returns:
        ``sum_m (c Re(h_m b_m) - target_m)^2 + c^2 noise_var``, a float64 scalar.

    Example:
        >>> target, gains = torch.tensor([0.5, 0.5]), torch.tensor([2.0 + 0j, 0.0 + 1j])
        >>> alignment_mse(target, gains, *zero_forcing(target, gains, power=1.0), noise_var=0.2).item()
        0.05
    """
    heard = scale * (gains.to(torch.complex128) * transmit).real
    return (heard - target.double()).square().sum() + scale.square() * noise_var


def _checked(target: Tensor, gains: Tensor, power: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Targets, gains, and ``sqrt(power) |h|``, in double precision."""
    if target.ndim != 1 or target.shape != gains.shape or len(target) == 0:
        raise ValueError(
            f"Expected a target and a gain for each of M >= 1 devices, got shapes {tuple(target.shape)} and "
            f"{tuple(gains.shape)}."
        )
    target, gains = target.double(), gains.to(torch.complex128)
    if not bool((target >= 0).all()) or not bool(torch.isfinite(target).all()):
        raise ValueError(f"Targets must be finite and >= 0, got {target.tolist()}.")
    limit = torch.as_tensor(power, dtype=torch.float64, device=target.device)
    if not bool(((limit > 0) & torch.isfinite(limit)).all()):
        raise ValueError(f"`power`, the energy of one symbol, must be finite and > 0, got {power}.")
    return target, gains, limit.sqrt() * gains.abs()


def _transmit(target: Tensor, gains: Tensor, reach: Tensor, scale: Tensor) -> Tensor:
    """``b``: with the phase of ``h*``, at full power where ``scale`` asks for more."""
    if not bool(scale > 0):
        return torch.zeros_like(gains)
    received = torch.minimum(target / scale, reach)  # |h_m b_m|
    squares = gains.abs().square()
    return torch.where(squares > 0, received * gains.conj() / squares, 0)
