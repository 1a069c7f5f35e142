"""The mathematics of fair federated learning: weights and directions from the devices' losses and inner products."""

from __future__ import annotations

import numpy as np
import scipy.optimize
import torch
from torch import Tensor


def box_weights(losses: Tensor, epsilon: float, centre: Tensor | None = None) -> Tensor:
    """Weights for the worst devices, held to a box: the ``w`` that maximises ``sum_m w_m f_m`` near ``centre``.

    ``max_w sum_m w_m f_m`` over the whole simplex is Chebyshev's problem, in which the worst device has all the weight.
    Here ``|w_m - centre_m| <= epsilon`` as well. Devices of equal loss share what is left for them, in the proportion of
    their room.

    Args:
        losses: ``f``, shape ``(M,)``.
        epsilon: Half the side of the box; 0 gives ``centre``, 1 or more Chebyshev's weights.
        centre: Weights that sum to one, shape ``(M,)``; by default ``1 / M`` each.

    Returns:
        Weights in [0, 1] that sum to one, float64, shape ``(M,)``. With a uniform centre, no device has less weight than
        one of lower loss.

    Raises:
        ValueError: If a loss is not finite, or an argument is out of range.

    Example:
        >>> box_weights(torch.tensor([1.0, 3.0, 2.0, 0.5]), epsilon=0.25).tolist()
        [0.0, 0.5, 0.5, 0.0]
    """
    if not 0 <= epsilon < float("inf"):
        raise ValueError(
            f"`epsilon`, the distance of a weight from its centre, must be finite and >= 0, got {epsilon}."
        )
    losses, centre = _losses_and_centre(losses, centre)
    low, high = (centre - epsilon).clamp_min(0), (centre + epsilon).clamp_max(1)
    values, group = torch.unique(losses, return_inverse=True)  # ascending
    room = torch.zeros_like(values).index_add_(0, group, high - low)
    above = room.sum() - room.cumsum(0)  # room of devices of larger loss
    left = (1 - low.sum() - above).clamp_min(0)
    share = (left / room.clamp_min(torch.finfo(room.dtype).tiny)).clamp_max(1)
    weights = low + (high - low) * share[group]
    return weights / weights.sum()


def softmax_weights(losses: Tensor, temperature: float, mix: float = 1.0, centre: Tensor | None = None) -> Tensor:
    """Smooth weights for the worst devices: ``(1 - mix) centre + mix centre exp(f / temperature) / normaliser``.

    With ``mix = 1`` they maximise ``sum_m w_m f_m - temperature KL(w, centre)``.

    Args:
        losses: ``f``, shape ``(M,)``.
        temperature: Large gives ``centre``, small all weight to the worst device.
        mix: In [0, 1].
        centre: Weights that sum to one, shape ``(M,)``; by default ``1 / M`` each.

    Returns:
        Weights that sum to one, float64, shape ``(M,)``.

    Raises:
        ValueError: If a loss is not finite, or an argument is out of range.

    Example:
        >>> softmax_weights(torch.tensor([0.0, 1.0]), temperature=1.0)
        tensor([0.2689, 0.7311], dtype=torch.float64)
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"`temperature` must be finite and > 0, got {temperature}.")
    if not 0 <= mix <= 1:
        raise ValueError(f"`mix` must be in [0, 1], got {mix}.")
    losses, centre = _losses_and_centre(losses, centre)
    return (1 - mix) * centre + mix * torch.softmax(losses / temperature + centre.log(), dim=0)


def adafed_coefficients(gram: Tensor, rates: Tensor, ridge: float = 0.0) -> Tensor:
    """Coefficients of AdaFed's direction ``v = sum_k coefficient_k g_k``: the slope of each loss follows its rate.

    Without ``ridge``, ``<g_k, v> = rate_k |v|^2`` for all ``k``: it is what the paper's loss-scaled Gram-Schmidt process
    and the least-norm point of the hull of its vectors give, in closed form, ``a / <rate, a>`` with ``gram a = rate``.
    Coefficients may be negative. ``ridge`` adds ``ridge * mean(diag(gram))`` to the diagonal: the direction then goes
    towards ``sum_k rate_k g_k / sum_k rate_k^2``, which for equal rates of 1 is the mean.

    Args:
        gram: Inner products of the rows, ``(M, M)``, float64.
        rates: ``>= 0``, not all 0, shape ``(M,)``.
        ridge: ``>= 0``.

    Returns:
        Coefficients, float64, shape ``(M,)``.

    Raises:
        ValueError: If the rows depend linearly on each other and there is no ridge.

    Reference:
        Mohajer Hamidi, Yang, "AdaFed: Fair Federated Learning via Adaptive Common Descent Direction", TMLR 2024.
        arXiv:2401.04993 (the closed form and the ridge are ours)

    Example:
        >>> gradients = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        >>> coefficients = adafed_coefficients(gradients @ gradients.T, torch.tensor([1.0, 1.0]))
        >>> v = coefficients @ gradients
        >>> [round(slope, 6) for slope in (gradients @ v).tolist()], round((v @ v).item(), 6)
        ([0.8, 0.8], 0.8)
    """
    gram, rates = gram.double(), rates.double()
    unit = gram.diagonal().mean()
    scaled = gram / unit  # so that the ridge, and what counts as singular, do not depend on the unit of the rows
    scaled = scaled + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor, info = torch.linalg.cholesky_ex(scaled)
    pivots = factor.diagonal().square()
    if int(info) or not bool((pivots > 100 * len(gram) * torch.finfo(gram.dtype).eps * scaled.diagonal()).all()):
        raise ValueError(
            f"The {len(gram)} updates depend linearly on each other, so that no direction has the wanted slope along each: "
            f"give a `ridge` above 0, such as 1e-6; got {ridge}."
        )
    a = torch.cholesky_solve(rates.unsqueeze(1), factor).squeeze(1)
    return a / (rates @ a)


def minimum_norm_weights(gram: Tensor) -> Tensor:
    """Weights of the point of least norm in the convex hull of some rows: MGDA's common descent direction.

    The point ``v`` has ``<g_k, v> >= |v|^2`` for every row ``g_k``.

    Args:
        gram: Inner products of the rows, ``(M, M)``.

    Returns:
        Weights ``>= 0`` that sum to one, float64, shape ``(M,)``.

    Reference:
        Désidéri, "Multiple-Gradient Descent Algorithm (MGDA) for Multiobjective Optimization", Comptes Rendus
        Mathematique 350, 2012.

    Example:
        >>> minimum_norm_weights(torch.tensor([[1.0, 0.0], [0.0, 4.0]])).round(decimals=6).tolist()
        [0.8, 0.2]
    """
    # for x of sum s, |root x|^2 + (s - 1)^2 is least at s times the weights, so that non-negative least squares finds them
    matrix = gram.double().cpu().numpy()
    values, vectors = np.linalg.eigh(matrix / max(float(np.trace(matrix)) / len(matrix), np.finfo(np.float64).tiny))
    root = np.sqrt(values.clip(0))[:, None] * vectors.T
    ones = np.ones((1, len(matrix)))
    x, _ = scipy.optimize.nnls(np.concatenate([root, ones]), np.append(np.zeros(len(matrix)), 1.0))
    return torch.from_numpy(x / x.sum()).to(gram.device)


def q_ffl_coefficients(losses: Tensor, squared_norms: Tensor, weights: Tensor, q: float, lr: float) -> Tensor:
    """Coefficients of q-FedAvg's step ``sum_k coefficient_k (theta - theta_k)``.

    With ``L = 1 / lr`` and ``D_k = L (theta - theta_k)``, the step is ``sum_k w_k f_k^q D_k / sum_k w_k h_k``, where
    ``h_k = q f_k^(q - 1) |D_k|^2 + L f_k^q``. Losses below 1e-10 count as 1e-10.

    Args:
        losses: ``f >= 0``, shape ``(M,)``.
        squared_norms: ``|theta - theta_k|^2``, shape ``(M,)``.
        weights: ``w``, of the devices in the aggregate, shape ``(M,)``, summing to one.
        q: ``>= 0``; 0 gives ``weights``.
        lr: Learning rate on the devices.

    Returns:
        Coefficients, float64, shape ``(M,)``.

    Reference:
        Li, Sanjabi, Beirami, Smith, "Fair Resource Allocation in Federated Learning", ICLR 2020, Algorithm 2.
        arXiv:1905.10497

    Example:
        >>> half = torch.tensor([0.5, 0.5])
        >>> q_ffl_coefficients(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0]), half, q=1.0, lr=0.1).tolist()
        [0.3333333333333333, 0.6666666666666666]
    """
    f, w = losses.double().clamp_min(1e-10), weights.double()
    powers = (q * (f / f.max()).log()).exp()  # a common factor of f^q cancels, and large q would overflow
    steepness = w * powers * (q / f * squared_norms.double() / lr + 1)  # w_k h_k / L
    return w * powers / steepness.sum()


def _losses_and_centre(losses: Tensor, centre: Tensor | None) -> tuple[Tensor, Tensor]:
    if losses.ndim != 1 or len(losses) == 0 or not bool(torch.isfinite(losses).all()):
        raise ValueError(f"Expected finite losses of M >= 1 devices, got {losses.tolist()}.")
    losses = losses.double()
    if centre is None:
        return losses, torch.full_like(losses, 1 / len(losses))
    centre = centre.to(losses)
    if centre.shape != losses.shape or not bool((centre >= 0).all()) or abs(float(centre.sum()) - 1) > 1e-5:
        raise ValueError(f"`centre` must be {len(losses)} weights >= 0 that sum to one, got {centre.tolist()}.")
    return losses, centre / centre.sum()
