"""The fading multiple-access channel, and what devices and server know of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.channels.base import Channel, Reception, check_noise_var, check_one_row_a_device, energy_of
from groundwire.plugins.channels.fading import Fading, Rayleigh, scattered
from groundwire.plugins.random import Key


class FadingMAC(Channel):
    """Complex fading multiple-access channel: ``y_i = sum_m h_(m,i) x_(m,i) + z_i`` with ``z ~ CN(0, noise_var)``.

    Gains and noise depend on the key's seed, round and device alone, so that all methods at equal seed meet the same
    channel. A complex channel use carries two real numbers, and counts as two in :attr:`Reception.channel_uses`, so that
    it can be compared with a real channel.

    Args:
        fading: Law of the gains; by default Rayleigh fading, independent over channel uses.
        noise_var: Noise variance per complex channel use, half of it in either part; 0 is the noiseless channel.
        csi_error_var: Variance of the error ``e ~ CN(0, csi_error_var)`` in what is known of each gain, ``h + e``; 0 is
            perfect channel state information (CSI), None none at all.

    Raises:
        ValueError: If a variance is negative, infinite or not a number.

    Reference:
        Mohammadi Amiri, Gündüz, "Federated Learning over Wireless Fading Channels", IEEE Trans. Wireless Commun. 19(5),
        2020. arXiv:1907.09769

    Example:
        >>> from groundwire.plugins.channels import NoFading
        >>> x = torch.tensor([[1 + 1j, 2 + 0j], [3 - 1j, 0 - 2j]])
        >>> heard = FadingMAC(NoFading(), noise_var=0.0)(x, Key(seed=0, devices=(0, 1)))
        >>> heard.symbols, heard.energy.tolist(), heard.channel_uses
        (tensor([4.+0.j, 2.-2.j]), [6.0, 14.0], 4)
    """

    def __init__(self, fading: Fading | None = None, noise_var: float = 1.0, csi_error_var: float | None = 0.0) -> None:
        super().__init__()
        self.fading = fading or Rayleigh()
        self.noise_var = check_noise_var(noise_var)
        if csi_error_var is not None and not 0 <= csi_error_var < math.inf:
            raise ValueError(
                f"`csi_error_var` must be finite and >= 0, where 0 is perfect knowledge of the gains, or None for no "
                f"knowledge; got {csi_error_var}."
            )
        self.csi_error_var = csi_error_var

    def gains(self, key: Key, uses: int, *, on: torch.device | str = "cpu") -> Tensor:
        """The gains of a round, shape ``(M, uses)``, or ``(M, 1)`` under block fading; complex64."""
        return self.fading.gains(key, uses, on=on)

    def csi(self, gains: Tensor, key: Key, *, who: str) -> Tensor:
        """What is known of gains.

        Args:
            gains: As :meth:`gains` gives them.
            key: That of the gains.
            who: What needs to know, for the error.

        Returns:
            ``gains`` plus errors.

        Raises:
            ValueError: If nothing is known.
        """
        self.check_csi(who)
        if not self.csi_error_var:
            return gains
        error = scattered(key, gains.shape[1], gains.device, "uplink/csi_error")
        return gains + error * math.sqrt(self.csi_error_var)

    def check_csi(self, who: str) -> None:
        """Refuse ``csi_error_var=None`` for what needs to know the gains.

        Args:
            who: What needs to know.

        Raises:
            ValueError: If nothing is known.
        """
        if self.csi_error_var is None:
            raise ValueError(
                f"{who} needs channel state information, but FadingMAC(csi_error_var=None) says that there is none. Give "
                "the variance of its error (0 for perfect CSI), or use BlindTransmitters."
            )

    def noise(self, key: Key, uses: int, *, on: torch.device | str = "cpu") -> Tensor:
        """Noise of a round, shape ``(uses,)``, complex64."""
        z = torch.randn(uses, generator=key.shared("uplink/noise", on=on), dtype=torch.complex64, device=on)
        return z * math.sqrt(self.noise_var)

    @override
    def forward(self, x: Tensor, key: Key, *, gains: Tensor | None = None) -> Reception:
        """Superpose the devices' faded symbols and add the noise of the round.

        Args:
            x: Symbols, shape ``(M, n)``, complex64 or complex128, one row per device; a silent device sends zeros.
            key: Names the devices, one a row, and the round.
            gains: As :meth:`gains` gives them, if they are at hand; else they are drawn.

        Returns:
            Received symbols ``(n,)`` in the dtype of ``x``, the energy of each device, and ``2 n`` real channel uses.

        Raises:
            TypeError: If ``x`` is not complex.
            ValueError: If ``x`` is not a matrix with one row per device of ``key`` and at least one column.
        """
        check_complex_symbols(x, key)
        if gains is None:
            gains = self.gains(key, x.shape[1], on=x.device)
        y = (gains.to(x.dtype) * x).sum(0)
        if self.noise_var > 0:
            y = y + self.noise(key, x.shape[1], on=x.device).to(x.dtype)
        return Reception(symbols=y, energy=energy_of(x), channel_uses=2 * x.shape[1])

    @override
    def extra_repr(self) -> str:
        return f"noise_var={self.noise_var}, csi_error_var={self.csi_error_var}"


def check_complex_symbols(x: Tensor, key: Key) -> None:
    """Refuse what no complex channel takes.

    Args:
        x: Symbols to send.
        key: Names one device a row.

    Raises:
        TypeError: If ``x`` is not complex64 or complex128.
        ValueError: If ``x`` is not a matrix with at least one column, or has another number of rows than ``key`` has
            devices.
    """
    if x.dtype not in (torch.complex64, torch.complex128):
        raise TypeError(f"Expected symbols of dtype complex64 or complex128, got {x.dtype}: pack real vectors first.")
    check_one_row_a_device(x, key)
