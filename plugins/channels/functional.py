"""The mathematics of channels and receivers: plain functions on numbers and tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import scipy.fft
import torch
from torch import Tensor

from groundwire.plugins.channels.base import Recovery

if TYPE_CHECKING:
    from groundwire.plugins.channels.projection import Projection


def db_to_linear(db: float) -> float:
    """Power ratio of a level in decibels, ``10^(db / 10)``.

    Example:
        >>> db_to_linear(20.0)
        100.0
    """
    return float(10.0 ** (db / 10))


def linear_to_db(ratio: float) -> float:
    """Decibels of a power ratio, ``10 log10(ratio)``; ``-inf`` for 0.

    Raises:
        ValueError: If ``ratio`` is negative or not a number.

    Example:
        >>> linear_to_db(100.0)
        20.0
    """
    if not ratio >= 0:
        raise ValueError(f"A power ratio must be >= 0 to have decibels, got {ratio}.")
    return 10 * math.log10(ratio) if ratio > 0 else -math.inf


def power_per_round(power_per_symbol: float, channel_uses: int) -> float:
    """Energy of a whole round that spends ``power_per_symbol`` in each of its real channel uses.

    Example:
        >>> power_per_round(0.5, channel_uses=1000)
        500.0
    """
    return power_per_symbol * channel_uses


def power_per_symbol(power_per_round: float, channel_uses: int) -> float:
    """Power per real channel use of a round that spends ``power_per_round`` in all.

    Raises:
        ValueError: If ``channel_uses`` is below 1.

    Example:
        >>> round(linear_to_db(power_per_symbol(500.0, channel_uses=3925)), 1)  # SNR per symbol at noise variance 1
        -8.9
    """
    if channel_uses < 1:
        raise ValueError(f"`channel_uses` must be at least 1, got {channel_uses}.")
    return power_per_round / channel_uses


def mac_sum_rate_bits(channel_uses: int, num_devices: int, power: float, noise_var: float) -> float:
    """Bits that ``M`` devices together may send over a real Gaussian multiple-access channel in one round.

    Args:
        channel_uses: Real channel uses ``s`` of the round, >= 1.
        num_devices: Devices ``M``, >= 1.
        power: Energy that each device spends on the whole round (not per symbol), >= 0.
        noise_var: Noise variance per real channel use, >= 0; 0 gives infinitely many bits for positive power.

    Returns:
        ``s / 2 log2(1 + M power / (s noise_var))``.

    Raises:
        ValueError: If an argument is outside its range.

    Reference:
        Cover, Thomas, "Elements of Information Theory", 2nd ed., Section 15.1.2 (Gaussian multiple-access channel).

    Example:
        >>> mac_sum_rate_bits(2, 1, power=6.0, noise_var=1.0)  # SNR 3 per symbol: one bit per real channel use
        2.0
    """
    if channel_uses < 1 or num_devices < 1:
        raise ValueError(
            f"`channel_uses` and `num_devices` must be at least 1, got {channel_uses} channel uses and {num_devices} "
            "devices."
        )
    if not (power >= 0 and noise_var >= 0 and math.isfinite(power) and math.isfinite(noise_var)):
        raise ValueError(
            f"`power` (energy of a round) and `noise_var` (per real channel use) must be finite and >= 0, got "
            f"power={power} and noise_var={noise_var}."
        )
    if power == 0:
        return 0.0
    if noise_var == 0:
        return math.inf
    return channel_uses / 2 * math.log1p(num_devices * power / (channel_uses * noise_var)) / math.log(2)


def gaussian_mac_bits_per_device(channel_uses: int, num_devices: int, power: float, noise_var: float) -> float:
    """Bits each of ``M`` devices may send in one round, at equal shares of the sum capacity.

    Args:
        channel_uses: Real channel uses ``s`` of the round, >= 1.
        num_devices: Devices ``M``, >= 1.
        power: Energy that each device spends on the whole round (not per symbol), >= 0.
        noise_var: Noise variance per real channel use, >= 0.

    Returns:
        ``R_t = s / (2 M) log2(1 + M power / (s noise_var))``.

    Raises:
        ValueError: If an argument is outside its range.

    Reference:
        Mohammadi Amiri, Gündüz, arXiv:1901.00844, Section III (D-DSGD).

    Example:
        >>> round(gaussian_mac_bits_per_device(3925, 25, power=500.0, noise_var=1.0), 2)
        162.11
    """
    return mac_sum_rate_bits(channel_uses, num_devices, power, noise_var) / num_devices


def dct(x: Tensor) -> Tensor:
    """Orthonormal DCT-II of the last dimension.

    SciPy computes it for plain CPU tensors, without a copy and on one thread (about twice as fast as what torch's FFT
    gives there); torch's FFT computes it on accelerators, and where autograd needs it.

    Args:
        x: Shape ``(..., d)``, float32 or float64.

    Returns:
        Coefficients of the same shape, dtype and device.

    Reference:
        Makhoul, "A fast cosine transform in one and two dimensions", IEEE Trans. ASSP 28(1), 1980.

    Example:
        >>> dct(torch.ones(4)).round(decimals=6)
        tensor([2., 0., 0., 0.])
    """
    if _on_numpy(x):
        return torch.from_numpy(scipy.fft.dct(x.numpy(), type=2, norm="ortho", workers=1))
    d = x.shape[-1]
    spectrum = torch.fft.rfft(torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], dim=-1)) * _twiddle(d, x.dtype, x.device)
    return torch.cat([spectrum.real, -spectrum.imag[..., 1 : (d + 1) // 2].flip(-1)], dim=-1)


def idct(y: Tensor) -> Tensor:
    """Inverse, and transpose, of :func:`dct`: the orthonormal DCT-III of the last dimension.

    Args:
        y: Shape ``(..., d)``, float32 or float64.

    Returns:
        Values of the same shape, dtype and device.

    Example:
        >>> idct(torch.tensor([2.0, 0.0, 0.0, 0.0])).round(decimals=6)
        tensor([1., 1., 1., 1.])
    """
    if _on_numpy(y):
        return torch.from_numpy(scipy.fft.idct(y.numpy(), type=2, norm="ortho", workers=1))
    d = y.shape[-1]
    mirrored = torch.cat([torch.zeros_like(y[..., :1]), y[..., (d + 1) // 2 :].flip(-1)], dim=-1)
    spectrum = torch.complex(y[..., : d // 2 + 1], -mirrored) / _twiddle(d, y.dtype, y.device)
    halves = torch.fft.irfft(spectrum, n=d)
    x = torch.empty_like(y)
    x[..., ::2] = halves[..., : (d + 1) // 2]
    x[..., 1::2] = halves[..., (d + 1) // 2 :].flip(-1)
    return x


def _on_numpy(x: Tensor) -> bool:
    return x.device.type == "cpu" and not x.requires_grad


@lru_cache(maxsize=8)
def _twiddle(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rotation and scale that turn the FFT of the reordered signal into the orthonormal DCT, shape (d // 2 + 1,)."""
    angle = torch.arange(d // 2 + 1, dtype=torch.float64) * (-math.pi / (2 * d))
    scale = torch.full_like(angle, math.sqrt(2 / d))
    scale[0] = math.sqrt(1 / d)
    return torch.polar(scale, angle).to(torch.complex64 if dtype == torch.float32 else torch.complex128).to(device)


def soft_threshold(u: Tensor, threshold: Tensor) -> Tensor:
    """``sign(u) max(|u| - threshold, 0)``, the shrinkage of l1 recovery.

    Args:
        u: Any shape.
        threshold: Non-negative, broadcast against ``u``.

    Returns:
        Shape and dtype of ``u``.

    Example:
        >>> soft_threshold(torch.tensor([3.0, -0.5, -2.0]), torch.tensor(1.0))
        tensor([ 2.,  0., -1.])
    """
    return u - torch.clamp(u, -threshold, threshold)


def minimax_alpha(sampling: float) -> float:
    """The threshold of AMP, in noise levels, that reaches furthest at ``sampling = s / d``.

    It rises as the measurements become fewer: 0.88 at 0.5, 1.74 at 0.1. A threshold well below it makes AMP blow up.

    Args:
        sampling: Measurements per entry ``s / d``, in (0, 1].

    Returns:
        The root ``tau`` of ``s/d = 2 phi(tau) / (tau + 2 (phi(tau) - tau Phi(-tau)))``; 0 at ``s = d``.

    Raises:
        ValueError: If ``sampling`` is outside (0, 1].

    Reference:
        Donoho, Maleki, Montanari, PNAS 106(45), 2009, the parametric form of the phase transition. arXiv:0907.3574

    Example:
        >>> round(minimax_alpha(0.5), 3)
        0.877
    """
    if not 0 < sampling <= 1:
        raise ValueError(f"`sampling`, measurements per entry s/d, must be in (0, 1], got {sampling}.")
    low, high = 0.0, 40.0
    for _ in range(60):  # bisection: the right side falls from 1 at tau = 0 to 0
        tau = (low + high) / 2
        density = math.exp(-tau * tau / 2) / math.sqrt(2 * math.pi)
        tail = math.erfc(tau / math.sqrt(2)) / 2
        above = 2 * density > sampling * (tau + 2 * (density - tau * tail))
        low, high = (tau, high) if above else (low, tau)
    return (low + high) / 2


def amp(
    v: Tensor,
    projection: Projection,
    alpha: float = 1.0,
    num_iterations: int = 25,
    tol: float = 1e-6,
    damping: float = 1.0,
) -> Recovery:
    """Recover sparse vectors from ``v = A x + noise`` by approximate message passing with soft thresholds.

    From ``x = 0``, ``r = v``, repeat: ``u = x + A^T r``; ``x_new = soft_threshold(u, alpha ||r|| / sqrt(s))``;
    ``r = v - A x_new + (nonzeros(x_new) / s) r``. The rows of a batch are independent: each stops by itself.

    Args:
        v: Measurements, shape ``(..., s)``, in the dtype of the projection; scaled to unit norm inside, so the result
            scales with ``v``.
        projection: The matrix ``A`` of shape ``(s, d)``, with columns of unit norm on average.
        alpha: Threshold in units of the estimated noise level. 0.8 to 1.5 is the useful range at ``s/d = 0.5``; with
            fewer measurements it must rise, see :func:`minimax_alpha`.
        num_iterations: Most iterations, >= 1; each costs one ``mv`` and one ``mtv``.
        tol: Stop when ``||x_new - x|| <= tol ||x_new||``.
        damping: Weight of the new iterate, in (0, 1]; 1 is plain AMP, about 0.7 tames an unstable run.

    Returns:
        The estimate and how it went. ``v = 0`` gives zeros. A row that diverges (``||r|| > 100 ||v||`` or not finite, or
        ``||r|| > ||v||`` in the end: by state evolution a larger error than that of zero) is flagged and gives its
        iterate of smallest ``||v - A x||``; a row that was not finite gives zeros, flagged.

    Raises:
        ValueError: If a setting is outside its range, or ``v`` does not fit the projection.

    Reference:
        Donoho, Maleki, Montanari, "Message-passing algorithms for compressed sensing", PNAS 106(45), 2009.
        arXiv:0907.3574

    Example:
        >>> from groundwire.plugins.channels import GaussianProjection
        >>> projection = GaussianProjection(num_rows=100, numel=200, seed=0)
        >>> x = torch.zeros(200); x[:5] = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0])
        >>> amp(projection.mv(x), projection, num_iterations=40).x[:6].round(decimals=2)
        tensor([ 1., -2.,  3., -4.,  5.,  0.])
    """
    if not alpha > 0:
        raise ValueError(f"`alpha`, the threshold in units of the noise level, must be > 0, got {alpha}.")

    def denoise(u: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        x = soft_threshold(u, alpha * sigma)
        return x, torch.count_nonzero(x, dim=-1).unsqueeze(-1).to(u.dtype) / projection.num_rows

    return _message_passing(v, projection, denoise, num_iterations, tol, damping)


def bernoulli_gauss_amp(
    v: Tensor,
    projection: Projection,
    num_iterations: int = 25,
    tol: float = 1e-6,
    damping: float = 1.0,
    density: float = 0.2,
) -> Recovery:
    """Recover vectors by message passing under a Bernoulli-Gauss prior that is fitted on the way.

    The prior of an entry is ``(1 - eps) delta_0 + eps N(0, var)``; the denoiser is its posterior mean, and ``eps`` and
    ``var`` follow by expectation maximisation after each iteration. With a dense Gaussian matrix it is never clearly
    worse than the better of :func:`amp` and least squares; with row-orthogonal matrices it is unstable, so those are
    refused.

    Args:
        v: Measurements, shape ``(..., s)``, in the dtype of the projection.
        projection: The dense Gaussian matrix ``A`` of shape ``(s, d)``.
        num_iterations: Most iterations, >= 1.
        tol: Stop when ``||x_new - x|| <= tol ||x_new||``.
        damping: Weight of the new iterate, in (0, 1].
        density: First guess of ``eps``, in (0, 1).

    Returns:
        The estimate and how it went, as of :func:`amp`.

    Raises:
        ValueError: If a setting is outside its range, ``v`` does not fit, or the projection is row-orthogonal.

    Reference:
        Vila, Schniter, "Expectation-Maximization Gaussian-Mixture Approximate Message Passing", IEEE Trans. Signal
        Process. 61(19), 2013, with one Gaussian. arXiv:1207.3107
    """
    if projection.row_orthogonal:
        raise ValueError(
            "Bernoulli-Gauss AMP is unstable with a row-orthogonal projection (dct); use projection='gaussian', or the "
            "decoder AMP."
        )
    if not 0 < density < 1:
        raise ValueError(f"`density`, the first guess of the share of non-zeros, must be in (0, 1), got {density}.")
    d = projection.numel
    eps = torch.full((*v.shape[:-1], 1), density, dtype=v.dtype, device=v.device)
    var = 1 / (d * eps)  # the measurements have unit norm inside the loop
    tiny = torch.finfo(v.dtype).tiny

    def denoise(u: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal eps, var
        noise = sigma.square().clamp_min(tiny)
        total = var + noise
        log_odds = 0.5 * (u.square() * (var / (noise * total)) - torch.log(total / noise)) + torch.logit(eps)
        active = torch.sigmoid(log_odds)
        mean = u * (var / total)
        second = mean.square() + var * noise / total
        x = active * mean
        onsager = (active * second - x.square()).mean(-1, keepdim=True) * (d / projection.num_rows) / noise
        eps = active.mean(-1, keepdim=True).clamp(1e-4, 1 - 1e-4)
        var = ((active * second).sum(-1, keepdim=True) / active.sum(-1, keepdim=True).clamp_min(tiny)).clamp_min(tiny)
        return x, onsager

    return _message_passing(v, projection, denoise, num_iterations, tol, damping)


def least_squares(v: Tensor, projection: Projection) -> Recovery:
    """Minimum-norm least squares, ``x = A^T (A A^T)^-1 v``: linear, and blind to sparsity.

    Args:
        v: Measurements, shape ``(..., s)``, in the dtype of the projection.
        projection: The matrix ``A`` of shape ``(s, d)``.

    Returns:
        The estimate. For any fixed ``x`` and a random ``A`` the error ``E||x_hat - x||^2`` is ``(1 - s/d) ||x||^2``.

    Raises:
        ValueError: If ``v`` does not fit the projection.

    Example:
        >>> from groundwire.plugins.channels import DCTProjection
        >>> projection = DCTProjection(num_rows=8, numel=8, seed=0)  # as many rows as columns: exact
        >>> least_squares(projection.mv(torch.arange(8.0)), projection).x.round(decimals=4)
        tensor([0., 1., 2., 3., 4., 5., 6., 7.])
    """
    norm, v = _unit(v)
    x = projection.least_squares(v)
    residual = torch.linalg.vector_norm(v - projection.mv(x), dim=-1)
    return Recovery(
        x=x * norm.nan_to_num(0, 0, 0),
        iterations=torch.ones_like(residual, dtype=torch.int64),
        residual=torch.where(norm.isfinite().squeeze(-1), residual, 1),
        diverged=~norm.isfinite().squeeze(-1),
    )


def _unit(v: Tensor) -> tuple[Tensor, Tensor]:
    """Norms ``(..., 1)`` and rows scaled to unit norm; a row that is zero or not finite becomes zero."""
    norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True, dtype=torch.float64)
    usable = norm.isfinite() & (norm > 0)
    scaled = torch.where(usable, v / torch.where(usable, norm, 1), 0)  # float64 / float32 rows: no overflow on the way
    return norm.to(v.dtype), scaled.to(v.dtype)


def _message_passing(
    v: Tensor,
    projection: Projection,
    denoise: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    num_iterations: int,
    tol: float,
    damping: float,
) -> Recovery:
    """The iteration of AMP: ``denoise(u, sigma)`` gives the new estimate and its Onsager coefficient ``(..., 1)``."""
    if num_iterations < 1:
        raise ValueError(f"`num_iterations` must be at least 1, got {num_iterations}.")
    if not tol >= 0:
        raise ValueError(f"`tol`, the relative change at which to stop, must be >= 0, got {tol}.")
    if not 0 < damping <= 1:
        raise ValueError(f"`damping`, the weight of the new iterate, must be in (0, 1], got {damping}.")
    scale, v = _unit(v)
    on_host = _can_ask(v)

    r, r_norm = v, _norm(v)
    x = v.new_zeros(*v.shape[:-1], projection.numel)
    residual = r_norm  # of x, without the Onsager term
    best_x, best = x, residual
    active = r_norm > 0
    diverged = ~scale.isfinite()
    iterations = torch.zeros_like(active, dtype=torch.int64)
    for _ in range(num_iterations):
        moving = None if on_host and bool(active.all()) else active  # the rest has settled and is left alone
        new, onsager = denoise(x + projection.mtv(r), r_norm / math.sqrt(projection.num_rows))
        if damping != 1:
            new = torch.lerp(x, new, damping)
        error = v - projection.mv(new)
        r = _advance(r, torch.addcmul(error, onsager, r), moving)
        r_norm, residual = _norm(r), _advance(residual, _norm(error), moving)
        settled = _norm(new - x) <= tol * _norm(new)
        x = _advance(x, new, moving)
        iterations = iterations + active
        blown = active & ~(r_norm <= 100)  # catches what is not a number, too
        diverged = diverged | blown
        better = active & (residual < best)
        best_x = x if on_host and bool(better.all()) else torch.where(better, x, best_x)
        best = torch.where(better, residual, best)
        active = active & ~blown & ~settled
        if on_host and not bool(active.any()):
            break
    # ||r|| estimates the noise on u, so a final ||r|| above ||v|| is an error above that of the zero vector.
    diverged = diverged | (r_norm > 1 + 1e-3)
    return Recovery(
        x=torch.where(diverged, best_x, x) * scale.nan_to_num(0, 0, 0),
        iterations=iterations.squeeze(-1),
        residual=torch.where(scale.isfinite(), torch.where(diverged, best, residual), 1).squeeze(-1),
        diverged=diverged.squeeze(-1),
    )


def _advance(old: Tensor, new: Tensor, moving: Tensor | None) -> Tensor:
    """The new value in the rows that move; None: all of them."""
    return new if moving is None else torch.where(moving, new, old)


def _norm(x: Tensor) -> Tensor:
    """Norm of each row, shape (..., 1)."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm


def _can_ask(x: Tensor) -> bool:
    """Whether a test of values is free: on the CPU it is, an accelerator would have to be waited for."""
    return x.device.type == "cpu"


def pack_complex(x: Tensor) -> Tensor:
    """Two real numbers in a complex one: the first half of a vector in the real parts, the second in the imaginary.

    Args:
        x: Real vectors, shape ``(..., d)``, float32 or float64.

    Returns:
        Shape ``(..., ceil(d / 2))``; of an odd length, the last imaginary part is 0.

    Example:
        >>> pack_complex(torch.tensor([1.0, 2.0, 3.0]))
        tensor([1.+3.j, 2.+0.j])
    """
    half = -(-x.shape[-1] // 2)
    imaginary = torch.nn.functional.pad(x[..., half:], (0, 2 * half - x.shape[-1]))
    return torch.complex(x[..., :half].contiguous(), imaginary.contiguous())


def unpack_complex(c: Tensor, numel: int) -> Tensor:
    """The real vectors that :func:`pack_complex` has packed.

    Args:
        c: Shape ``(..., n)``.
        numel: Length ``d`` of each, ``2 n`` or ``2 n - 1``.

    Returns:
        Shape ``(..., d)``.

    Example:
        >>> unpack_complex(torch.tensor([1 + 3j, 2 + 0j]), 3)
        tensor([1., 2., 3.])
    """
    return torch.cat([c.real, c.imag], dim=-1)[..., :numel]


def water_filling(gain: Tensor, power: float, noise_var: float) -> tuple[Tensor, Tensor]:
    """The powers over parallel channels that carry the most bits.

    Args:
        gain: ``|h_i|^2`` of each channel, shape ``(..., n)``; channels of gain 0 get nothing.
        power: Total power ``P``.
        noise_var: Noise variance of a channel.

    Returns:
        ``(powers, bits)``: ``p_i = max(0, level - noise_var / |h_i|^2)``, which add up to ``P`` unless all gains are 0,
        shape ``(..., n)``, float64; and ``sum_i log2(1 + p_i |h_i|^2 / noise_var)``, shape ``(...)``, the bits of that
        many complex channel uses.

    Raises:
        ValueError: If ``power`` or ``noise_var`` is not positive.

    Reference:
        Cover, Thomas, "Elements of Information Theory", 2nd ed., 2006, Section 9.4.

    Example:
        >>> powers, bits = water_filling(torch.tensor([1.0, 0.5, 0.01]), power=3.0, noise_var=1.0)
        >>> powers, bits
        (tensor([2., 1., 0.], dtype=torch.float64), tensor(2.1699, dtype=torch.float64))
    """
    if not power > 0 or not noise_var > 0:
        raise ValueError(f"Water-filling needs power > 0 and noise_var > 0, got {power=} and {noise_var=}.")
    floor = noise_var / gain.double()
    ordered, _ = floor.sort(dim=-1)
    count = torch.arange(1, floor.shape[-1] + 1, dtype=torch.float64, device=floor.device)
    levels = (power + ordered.cumsum(-1)) / count  # if the lowest so many were filled
    filled = (levels > ordered).sum(-1, keepdim=True).clamp_min(1)
    powers = torch.where(floor.isfinite(), levels.gather(-1, filled - 1) - floor, 0).clamp_min(0)
    return powers, torch.log2(1 + powers / floor).sum(-1)
