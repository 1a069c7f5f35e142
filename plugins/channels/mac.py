"""The Gaussian multiple-access channel: the devices' symbols add up in the air."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.channels.base import Channel, Reception, check_noise_var, check_symbols, energy_of
from groundwire.plugins.channels.functional import gaussian_mac_bits_per_device
from groundwire.plugins.random import Key


class GaussianMAC(Channel):
    """Real Gaussian multiple-access channel: ``y = sum_m x_m + z`` with i.i.d. ``z ~ N(0, noise_var)``.

    The noise of a round depends on the key's seed, round and name alone, not on who sends or what: all methods at equal
    seed see the same noise, and comparing them is a paired comparison.

    Args:
        noise_var: Noise variance per real channel use, linear scale; 0 is the noiseless channel (the exact sum).

    Raises:
        ValueError: If ``noise_var`` is negative, infinite or not a number.

    Reference:
        Mohammadi Amiri, Gündüz, "Machine Learning at the Wireless Edge: Distributed Stochastic Gradient Descent
        Over-the-Air", IEEE Trans. Signal Process. 68, 2020, Section II. arXiv:1901.00844

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [3.0, -2.0]])
        >>> heard = GaussianMAC(noise_var=0.0)(x, Key(seed=0, devices=(0, 1)))
        >>> heard.symbols, heard.energy, heard.channel_uses
        (tensor([4., 0.]), tensor([ 5., 13.], dtype=torch.float64), 2)
    """

    def __init__(self, noise_var: float = 1.0) -> None:
        super().__init__()
        self.noise_var = check_noise_var(noise_var)

    @override
    def forward(self, x: Tensor, key: Key) -> Reception:
        """Superpose the devices' symbols and add the noise of the round.

        Args:
            x: Symbols, shape ``(M, s)``, float32 or float64, one row per device; a silent device sends zeros.
            key: Names the devices, one a row, and the round.

        Returns:
            Received symbols ``(s,)`` in the dtype of ``x``, the energy of each device, and ``s`` channel uses.

        Raises:
            TypeError: If ``x`` is not float32 or float64.
            ValueError: If ``x`` is not a matrix with one row per device of ``key`` and at least one column.
        """
        check_symbols(x, key)
        y = x.sum(0)
        if self.noise_var > 0:
            generator = key.shared("uplink/noise", on=x.device)
            noise = torch.randn(y.shape, generator=generator, dtype=y.dtype, device=y.device)
            y = y.add_(noise, alpha=math.sqrt(self.noise_var))
        return Reception(symbols=y, energy=energy_of(x), channel_uses=x.shape[1])

    def bits_per_device(self, channel_uses: int, num_devices: int, power: float) -> float:
        """Bits a device may send in one round, at an equal share of this channel's sum capacity.

        Args:
            channel_uses: Real channel uses ``s`` of the round.
            num_devices: Devices ``M`` that share the channel.
            power: Energy that each device spends on the whole round (not per symbol).

        Returns:
            ``s / (2 M) log2(1 + M power / (s noise_var))``; ``inf`` on the noiseless channel.

        Raises:
            ValueError: As :func:`~groundwire.plugins.channels.functional.gaussian_mac_bits_per_device`.
        """
        return gaussian_mac_bits_per_device(channel_uses, num_devices, power, self.noise_var)

    @override
    def extra_repr(self) -> str:
        return f"noise_var={self.noise_var}"
