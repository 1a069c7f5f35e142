"""Blind federated edge learning: devices that know no channel, and a server with many antennas."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.channels import Fading, NoFading, PowerSchedule, Rayleigh, pack_complex, unpack_complex
from groundwire.plugins.channels.base import check_noise_var, energy_of
from groundwire.plugins.channels.mimo import blind_moments, check_antennas, combined_gains, receiver_noise
from groundwire.plugins.edge.round import Round
from groundwire.plugins.edge.uplinks.base import Received, Uplink
from groundwire.plugins.edge.uplinks.resources import PowerBudget
from groundwire.plugins.ledger import Cost


class BlindTransmitters(Uplink):
    """Uncoded updates over a fading channel that no device knows; the server's ``K`` antennas align them.

    Each device sends its whole update, two numbers in each complex symbol, times one factor ``alpha`` for all devices. The
    server combines its antennas with the conjugate of the sum of the devices' gains, for which one common pilot an antenna
    is enough. The estimate is the weighted mean of the updates plus an error whose energy falls as ``1 / K``: under
    Rayleigh fading, without noise, it is ``D / K`` of the mean's energy, where ``D``, logged as ``uplink/diversity``, is the devices' mean energy over
    that of their mean: about 1 for alike updates, up to ``M`` for orthogonal ones. So it takes more antennas than devices
    where devices differ.

    With path loss, devices that are nearer weigh more, as nobody tells them: by their mean ``|h|^2``. More antennas do not
    remove this bias, which ``uplink/nmse`` counts.

    A round takes O(K M d) time, nearly all of it draws of gains, and O(M d) memory; under block fading O(K M +
    M d) time; with ``gaussian_approx`` O(M d) of both. On one CPU core some 7 ns for each of the ``K M d`` real gains: 0.1 s
    a round for 100 antennas, 20 devices and 7,850 parameters.

    Args:
        num_antennas: Antennas ``K`` of the server.
        power: Energy in one round (not per symbol) of the device whose update is largest, or a schedule of it. It sets
            ``alpha``, which grows as updates shrink.
        amplitude: ``alpha`` itself, instead of ``power``: then energies are what the updates make them.
        fading: Law of the gains; by default Rayleigh fading, independent over channel uses, devices and antennas.
        noise_var: Noise variance per complex channel use at each antenna.
        csi_error_var: Variance of the error in what the server knows of each antenna's sum gain.
        subchannels: Complex sub-channels of one OFDM symbol; a round takes whole OFDM symbols. By default ``ceil(d / 2)``.
        gaussian_approx: Draw the estimate's error as a normal number of its exact mean, variance and pseudo-variance,
            instead of ``K M d / 2`` gains: for many antennas. Rayleigh fading without blocks only.
        average_power: If given, the schedule's average over the run may not exceed it.

    Raises:
        ValueError: If an argument is out of range, or gains have no mean of 0.

    Example:
        >>> uplink = BlindTransmitters(num_antennas=100, power=500.0, csi_error_var=1.0)

    Reference:
        Mohammadi Amiri, Duman, Gündüz, "Collaborative Machine Learning at the Wireless Edge with Blind Transmitters",
        GlobalSIP 2019, arXiv:1907.03909; Mohammadi Amiri, Duman, Gündüz, Kulkarni, Poor, "Blind Federated Edge Learning",
        IEEE Trans. Wireless Commun. 20(8), 2021. arXiv:2010.10030 (that the energy sets ``alpha`` is ours)
    """

    superposes = True

    def __init__(
        self,
        num_antennas: int,
        power: float | PowerSchedule | None = None,
        amplitude: float | None = None,
        fading: Fading | None = None,
        noise_var: float = 1.0,
        csi_error_var: float = 0.0,
        subchannels: int | None = None,
        gaussian_approx: bool = False,
        average_power: float | None = None,
    ) -> None:
        super().__init__()
        if power is not None and amplitude is not None:
            raise ValueError(
                f"Give either `power` (energy of a round) or `amplitude` (alpha), got {power=}, {amplitude=}."
            )
        if amplitude is not None and not 0 < amplitude < math.inf:
            raise ValueError(f"`amplitude` must be finite and > 0, got {amplitude}.")
        if amplitude is not None and average_power is not None:
            raise ValueError(
                "`average_power` limits a schedule of `power`; with `amplitude` nothing limits the energy."
            )
        if not 0 <= csi_error_var < math.inf:
            raise ValueError(
                f"`csi_error_var` must be finite and >= 0, where 0 is perfect knowledge of the sum gains; got {csi_error_var}."
            )
        if subchannels is not None and subchannels < 1:
            raise ValueError(f"`subchannels` must be at least 1, got {subchannels}.")
        self.num_antennas = check_antennas(num_antennas)
        self.power = PowerBudget(500.0 if power is None else power, average_power) if amplitude is None else None
        self.amplitude = amplitude
        self.fading = fading or Rayleigh()
        has_mean = isinstance(self.fading, NoFading)
        if has_mean:
            raise ValueError(
                "BlindTransmitters tells devices' symbols from the others' by gains whose mean is 0, which NoFading's is "
                "not. Use Rayleigh or Rician fading, or ADSGD for a channel without fading."
            )
        if gaussian_approx and (not isinstance(self.fading, Rayleigh) or self.fading.block):
            raise ValueError(
                f"`gaussian_approx` holds for Rayleigh fading with block=False, got {self.fading!r}. Switch it off."
            )
        self.noise_var = check_noise_var(noise_var)
        self.csi_error_var = float(csi_error_var)
        self.subchannels = subchannels
        self.gaussian_approx = gaussian_approx

    @override
    def forward(self, updates: Tensor, round: Round) -> Received:
        num_devices, numel = updates.shape
        share = round.weights * num_devices  # 1 for all where they are alike
        wanted = pack_complex(self._padded(updates) * share.to(updates.dtype).unsqueeze(1))
        sizes = energy_of(wanted)
        alpha = self._amplitude(sizes, round)
        sent = alpha.to(wanted.real.dtype) * wanted
        squares = self.fading.mean_squares(round.key).to(updates.device)
        norm = alpha * (squares @ share.double())
        heard = self._moments_only(sent, squares, round) if self.gaussian_approx else self._combined(sent, round)
        estimate = torch.where(alpha > 0, unpack_complex(heard, numel).to(updates.dtype) / norm.to(updates.dtype), 0)
        target = (round.weights.to(updates.dtype) @ updates).double()
        size = target.square().sum()
        metrics = {
            "uplink/nmse": torch.where(size > 0, (estimate.double() - target).square().sum() / size, 0),
            "uplink/diversity": torch.where(size > 0, sizes.mean() / size, 0),
            "uplink/amplitude": alpha,
        }
        one = torch.ones_like(round.weights[:1])
        cost = Cost(channel_uses=2 * sent.shape[1], energy=alpha.square() * sizes)
        return Received(rows=estimate.unsqueeze(0), weights=one, cost=cost, metrics=metrics)

    def _padded(self, updates: Tensor) -> Tensor:
        """Whole OFDM symbols of float32 at least."""
        x = updates.to(torch.promote_types(updates.dtype, torch.float32))
        if self.subchannels is None:
            return x
        return torch.nn.functional.pad(x, (0, -x.shape[1] % (2 * self.subchannels)))

    def _amplitude(self, sizes: Tensor, round: Round) -> Tensor:
        """``alpha``, float64; 0 if nobody has anything to send."""
        largest = sizes.max()
        if self.power is None:
            assert self.amplitude is not None  # one of the two is given
            return torch.full_like(largest, self.amplitude)
        return torch.where(largest > 0, torch.sqrt(self.power.of(round) / largest), 0)

    def _combined(self, sent: Tensor, round: Round) -> Tensor:
        """``(1/K) sum_k conj(c_k) y_k`` of a round, shape ``(n,)``."""
        uses, device = sent.shape[1], sent.device
        gains, power = combined_gains(
            self.fading,
            round.key,
            self.num_antennas,
            uses,
            csi_error_var=self.csi_error_var,
            on=device,
        )
        heard = (gains.to(sent.dtype) * sent).sum(0)
        if self.noise_var > 0:  # a sum of independent normal numbers is one
            noise = receiver_noise(round.key, 1, uses, self.noise_var / self.num_antennas, on=device)[0]
            heard = heard + (noise * power.sqrt()).to(sent.dtype)
        return heard

    def _moments_only(self, sent: Tensor, squares: Tensor, round: Round) -> Tensor:
        moments = blind_moments(
            sent,
            squares,
            num_antennas=self.num_antennas,
            norm=1.0,
            noise_var=self.noise_var,
            csi_error_var=self.csi_error_var,
        )
        return moments.draw(round.key.shared("uplink/noise", on=sent.device))
