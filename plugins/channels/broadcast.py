"""The fading broadcast channel, from the server to its devices, and the rates at which they can be reached."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from groundwire.plugins.channels.base import check_noise_var
from groundwire.plugins.channels.fading import Fading, Rayleigh, scattered
from groundwire.plugins.random import Key

_AT_ONCE = 2**22
"""Gains that are drawn at once where only a number a device is wanted of them."""

Allocation = Literal["uniform", "maxmin"]
Split = Literal["tdm", "superposition"]


class FadingBroadcast(nn.Module):
    """Complex fading broadcast channel: device ``m`` hears ``y_(m,i) = h_(m,i) x_i + z_(m,i)`` with ``z ~ CN(0, noise_var)``.

    Gains and noise depend on the key's seed, round and device alone, and are drawn apart from those of the uplink. The
    server knows the gains of all devices, each device its own. A complex channel use counts as two real ones in costs.

    Args:
        fading: Law of the gains; by default Rayleigh fading, independent over channel uses.
        noise_var: Noise variance per complex channel use, half of it in either part; 0 is the noiseless channel.

    Raises:
        ValueError: If the variance is negative, infinite or not a number.

    Reference:
        Mohammadi Amiri, Gündüz, Kulkarni, Poor, "Convergence of Federated Learning over a Noisy Downlink", IEEE Trans.
        Wireless Commun. 21(3), 2022. arXiv:2008.11141

    Example:
        >>> from groundwire.plugins.channels import NoFading
        >>> channel = FadingBroadcast(NoFading(), noise_var=0.0)
        >>> channel(torch.tensor([1 + 1j, 2 + 0j]), Key(seed=0, devices=(0, 1)))
        tensor([[1.+1.j, 2.+0.j],
                [1.+1.j, 2.+0.j]])
    """

    def __init__(self, fading: Fading | None = None, noise_var: float = 1.0) -> None:
        super().__init__()
        self.fading = fading or Rayleigh()
        self.noise_var = check_noise_var(noise_var)

    def gains(self, key: Key, uses: int, *, on: torch.device | str = "cpu", block: int = 0) -> Tensor:
        """The gains of a round, shape ``(M, uses)``, or ``(M, 1)`` under block fading; complex64.

        Args:
            key: Names the devices, one a row, and the round.
            uses: Complex channel uses.
            on: Where to draw.
            block: Which block of a round of several.

        Returns:
            The gains; the same for the same arguments.
        """
        purpose = "downlink/fading" if block == 0 else f"downlink/fading/{block}"
        return self.fading.gains(key, uses, on=on, purpose=purpose)

    @override
    def forward(self, x: Tensor, key: Key, *, gains: Tensor | None = None) -> Tensor:
        """Send symbols to all devices.

        Args:
            x: Symbols, shape ``(n,)``, complex64 or complex128.
            key: Names the devices, one a row, and the round.
            gains: As :meth:`gains` gives them, if they are at hand; else they are drawn.

        Returns:
            What each device hears, shape ``(M, n)``, dtype of ``x``.

        Raises:
            TypeError: If ``x`` is not complex.
            ValueError: If ``x`` is not a vector of at least one symbol.
        """
        if x.dtype not in (torch.complex64, torch.complex128):
            raise TypeError(
                f"Expected symbols of dtype complex64 or complex128, got {x.dtype}: pack real vectors first."
            )
        if x.ndim != 1 or x.shape[0] == 0:
            raise ValueError(f"Expected symbols of shape (n,) with n >= 1 channel uses, got {tuple(x.shape)}.")
        if gains is None:
            gains = self.gains(key, len(x), on=x.device)
        y = gains.to(x.dtype) * x
        if self.noise_var > 0:
            y = y + scattered(key, len(x), x.device, "downlink/noise").to(x.dtype) * math.sqrt(self.noise_var)
        return y

    def snr(self, key: Key, uses: int, power: float, *, on: torch.device | str = "cpu") -> Tensor:
        """``|h|^2 P / (n noise_var)``, shape ``(M, uses)`` or ``(M, 1)``, float64: of power spread evenly."""
        if self.noise_var == 0:
            raise ValueError("A noiseless channel has no finite rate: give noise_var > 0, or use PerfectDownlink.")
        gains = self.gains(key, uses, on=on)
        return gains.abs().double().square() * (power / (uses * self.noise_var))

    def bits(self, key: Key, uses: int, power: float, *, on: torch.device | str = "cpu") -> Tensor:
        """What each device could be sent if it were alone, with power spread evenly over the channel uses.

        Args:
            key: Names the devices, one a row, and the round.
            uses: Complex channel uses ``n``.
            power: Energy of the round, ``P``.
            on: Where to draw.

        Returns:
            ``sum_i log2(1 + P |h_(m,i)|^2 / (n noise_var))``, shape ``(M,)``, float64.

        Raises:
            ValueError: If the channel is noiseless.
        """
        count = len(key) if self.fading.block else max(1, _AT_ONCE // uses)
        sums = []
        for start in range(0, len(key), count):
            devices = key.devices[start : start + count]
            some = Key(seed=key.seed, round=key.round, devices=devices, name=key.name)
            snr = self.snr(some, uses, power, on=on)
            sums.append(torch.log2(1 + snr).sum(1) * (uses / snr.shape[1]))
        return torch.cat(sums)

    @override
    def extra_repr(self) -> str:
        return f"noise_var={self.noise_var}"


def common_rate(snr: Tensor, steps: int = 100) -> tuple[Tensor, Tensor]:
    """Powers over parallel channels that raise what the weakest of several receivers gets: max-min, by sub-gradients.

    Args:
        snr: Of each receiver and channel at power 1, that is at an even spread of power, shape ``(M, n)``.
        steps: Of projected sub-gradient ascent; the best powers met are returned.

    Returns:
        ``(powers, bits)``: powers of mean 1, shape ``(n,)``, float64, and ``min_m sum_i log2(1 + p_i snr_(m,i))``, which
        is never below that of even powers.

    Raises:
        ValueError: If ``snr`` is no matrix.

    Example:
        >>> powers, bits = common_rate(torch.tensor([[1.0, 9.0], [9.0, 1.0]]))
        >>> powers, bits
        (tensor([1., 1.], dtype=torch.float64), tensor(4.3219, dtype=torch.float64))
    """
    if snr.ndim != 2:
        raise ValueError(f"Expected SNRs of shape (M, n), got {tuple(snr.shape)}.")
    snr = snr.double()
    n = snr.shape[1]
    powers = torch.ones(n, dtype=torch.float64, device=snr.device)
    best, most = powers, torch.full((), -math.inf, dtype=torch.float64, device=snr.device)
    for step in range(steps + 1):
        bits = torch.log2(1 + powers * snr).sum(1)
        least, weakest = bits.min(0)
        better = least > most
        best, most = torch.where(better, powers, best), torch.where(better, least, most)
        slope = snr[weakest] / (1 + powers * snr[weakest])
        slope = slope - slope.mean()  # along the simplex
        length = slope.norm().clamp_min(torch.finfo(torch.float64).tiny)
        powers = _onto_simplex(powers + slope * (math.sqrt(n) / (2 * math.sqrt(step + 1)) / length))
    return best, most


def _onto_simplex(x: Tensor) -> Tensor:
    """The nearest vector of mean 1 without negative entries."""
    ordered = x.sort(descending=True).values
    count = torch.arange(1, len(x) + 1, dtype=x.dtype, device=x.device)
    shift = (ordered.cumsum(0) - len(x)) / count
    last = (ordered > shift).sum() - 1
    return (x - shift[last]).clamp_min(0)


def superposition_bits(snr: Tensor, uses: int) -> tuple[Tensor, Tensor]:
    """The equal rate at which superposed codewords reach all receivers of a degraded broadcast channel.

    Each receiver decodes, and takes away, the codewords of those that hear less than itself; those of the others are
    noise to it. Shares of the power are such that all get the same.

    Args:
        snr: Of each receiver if all power were its own, shape ``(K,)``.
        uses: Complex channel uses.

    Returns:
        ``(shares, bits)``: shares of the power, shape ``(K,)``, float64, adding up to 1, and the bits of each receiver,
        ``()``.

    Raises:
        ValueError: If ``snr`` is no vector of at least one positive entry.

    Reference:
        Cover, Thomas, "Elements of Information Theory", 2nd ed., 2006, Section 15.6.3.

    Example:
        >>> superposition_bits(torch.tensor([3.0]), uses=10)
        (tensor([1.], dtype=torch.float64), tensor(20., dtype=torch.float64))
    """
    if snr.ndim != 1 or not len(snr):
        raise ValueError(f"Expected SNRs of shape (K,) with K >= 1, got {tuple(snr.shape)}.")
    ordered, order = snr.double().clamp_min(torch.finfo(torch.float64).tiny).sort(descending=True)
    weaker = torch.arange(len(snr) - 1, -1, -1, dtype=torch.float64, device=snr.device)

    def spent(rate: Tensor) -> Tensor:
        """Of each receiver, times what the weaker ones spend on being heard above it."""
        return torch.expm1(rate * math.log(2)) * torch.exp2(rate * weaker) / ordered

    low, high = ordered.new_zeros(()), torch.log2(1 + ordered[-1])  # the weakest alone
    for _ in range(100):
        middle = (low + high) / 2
        fits = spent(middle).sum() <= 1
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    growth = torch.expm1(low * math.log(2))
    shares, stronger = torch.empty_like(ordered), ordered.new_zeros(())
    for j, one in enumerate(ordered):
        shares[order[j]] = growth * (1 / one + stronger)
        stronger = stronger + shares[order[j]]
    return shares, low * uses


def zero_forcing(y: Tensor, gains: Tensor) -> Tensor:
    """The symbols that were sent, from ``y = h x + z`` and the gains: unbiased, and of infinite variance under Rayleigh fading.

    Args:
        y: Received symbols, shape ``(M, n)``, complex.
        gains: ``h``, shape ``(M, n)`` or ``(M, 1)``.

    Returns:
        ``y / h``, shape ``(M, n)``.

    Example:
        >>> zero_forcing(torch.tensor([[2j, 4j]]), torch.tensor([[2j, 2j]])).real
        tensor([[1., 2.]])
    """
    return y * _inverse(gains, y.dtype, 0.0)


def lmmse(y: Tensor, gains: Tensor, noise_to_signal: float) -> Tensor:
    """The linear estimate of least mean squared error of the symbols that were sent, from ``y = h x + z`` and the gains.

    Args:
        y: Received symbols, shape ``(M, n)``, complex.
        gains: ``h``, shape ``(M, n)`` or ``(M, 1)``.
        noise_to_signal: Variance of ``z`` over the mean square of ``x``; without noise it is :func:`zero_forcing`.

    Returns:
        ``h* y / (|h|^2 + noise_to_signal)``, shape ``(M, n)``.

    Example:
        >>> lmmse(torch.tensor([[2j, 4j]]), torch.tensor([[2j, 2j]]), noise_to_signal=4.0).real
        tensor([[0.5000, 1.0000]])
    """
    return y * _inverse(gains, y.dtype, noise_to_signal)


def _inverse(gains: Tensor, dtype: torch.dtype, noise_to_signal: float) -> Tensor:
    squares = gains.abs().square() + noise_to_signal
    return (gains.conj() / squares.clamp_min(torch.finfo(squares.dtype).tiny)).to(dtype)
