"""A-DSGD: the devices' sparsified gradients meet in the air, uncoded."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.channels import (
    AMP,
    Decoder,
    GaussianMAC,
    PowerSchedule,
    Projection,
    make_projection,
)
from groundwire.plugins.compression import ErrorMemory, TopK
from groundwire.plugins.edge.round import Round
from groundwire.plugins.edge.uplinks.base import Received, Uplink
from groundwire.plugins.edge.uplinks.resources import PowerBudget, entries_to_recover, resolve_channel_uses
from groundwire.plugins.layout import ParameterLayout
from groundwire.plugins.ledger import Cost

_PILOT_SIGMAS = 3.0  # below this many noise standard deviations the scaling symbol says nothing


class ADSGD(Uplink):
    """Analog distributed SGD over a Gaussian multiple-access channel, with error accumulation.

    Each device adds its error memory to its update, keeps the ``k`` entries of largest magnitude, projects them to
    the channel's ``s`` uses with a pseudo-random matrix that all know, scales them to spend exactly ``P_t``, and sends
    them at the same time as all others. One symbol carries the scale, and in the first rounds one more the mean of
    the projected vector, which is removed from it. The server divides by the received scale and decodes.

    What the server estimates is the mean of the sparsified updates weighted by ``sqrt(alpha_m)``, the devices'
    amplitudes: a device with a larger update counts for less. Sample counts enter through the amplitudes, too: the
    device with the most samples spends ``P_t``, one with a share ``r`` of its samples ``r^2 P_t``.

    In a round in which the scaling symbol is received below three standard deviations of the noise, nothing can be
    decoded: the estimate is zero, what was sent goes back into the error memories, and ``uplink/silent`` is 1.

    Args:
        power: Energy of one device in one round (not per symbol), or a schedule of it.
        channel: The channel; its ``noise_var`` is per real channel use.
        bandwidth: Channel uses per parameter, ``s / d``.
        channel_uses: ``s`` itself, instead of ``bandwidth``.
        sparsity: Entries kept per channel use, ``k / s``, in (0, 1).
        num_entries: ``k`` itself, instead of ``sparsity``.
        projection: ``"gaussian"`` (dense), ``"dct"`` (subsampled cosine transform, O(d log d)), or ``"auto"``.
        decoder: Sparse recovery at the server; by default :class:`AMP`.
        mean_removal_rounds: First rounds in which the mean is removed.
        pilot_gain: Amplitude ``c`` of the scaling symbol relative to the projected entries. 1 is the paper's; a
            smaller one leaves more energy to updates whose norm is far below 1.
        average_power: If given, the schedule's average over the run may not exceed it.

    Raises:
        ValueError: If an argument is out of range; at set-up if ``s`` or ``k`` does not fit the model.

    Example:
        >>> uplink = ADSGD(power=500.0, bandwidth=0.5, sparsity=0.5)

    Reference:
        Mohammadi Amiri, Gündüz, "Machine Learning at the Wireless Edge: Distributed Stochastic Gradient Descent
        Over-the-Air", IEEE Trans. Signal Process. 68, 2020, Section IV. arXiv:1901.00844
    """

    superposes = True

    def __init__(
        self,
        power: float | PowerSchedule = 500.0,
        channel: GaussianMAC | None = None,
        bandwidth: float | None = None,
        channel_uses: int | None = None,
        sparsity: float | None = None,
        num_entries: int | None = None,
        projection: Literal["auto", "gaussian", "dct"] = "dct",
        decoder: Decoder | None = None,
        mean_removal_rounds: int = 20,
        pilot_gain: float = 1.0,
        average_power: float | None = None,
    ) -> None:
        super().__init__()
        if sparsity is not None and num_entries is not None:
            raise ValueError(f"Give either `sparsity` (k / s) or `num_entries` (k), got {sparsity=}, {num_entries=}.")
        if sparsity is not None and not 0 < sparsity < 1:
            raise ValueError(
                f"`sparsity` is entries kept per channel use, k / s, and must be in (0, 1), got {sparsity}."
            )
        if mean_removal_rounds < 0:
            raise ValueError(f"`mean_removal_rounds` must be >= 0, got {mean_removal_rounds}.")
        if not pilot_gain > 0:
            raise ValueError(f"`pilot_gain` must be > 0, got {pilot_gain}.")
        self.power = PowerBudget(power, average_power)
        self.channel = channel or GaussianMAC()
        self.bandwidth = 0.5 if bandwidth is None and channel_uses is None else bandwidth
        self.channel_uses = channel_uses
        self.sparsity = 0.5 if sparsity is None and num_entries is None else sparsity
        self.num_entries = num_entries
        self.projection = projection
        self.decoder = decoder or AMP()
        self.mean_removal_rounds = mean_removal_rounds
        self.pilot_gain = pilot_gain
        self.memory = ErrorMemory()
        self._sparsify: TopK
        self._plain: Projection
        self._mean_removed: Projection

    @override
    def setup(self, *, layout: ParameterLayout, num_devices: int, seed: int) -> None:
        uses = resolve_channel_uses(
            layout.numel,
            bandwidth=self.bandwidth,
            channel_uses=self.channel_uses,
            least=3 if self.mean_removal_rounds else 2,
        )
        k = entries_to_recover(uses, sparsity=self.sparsity, num_entries=self.num_entries)
        self.memory.reset_state()
        self.memory.setup(num_devices)
        self._sparsify = TopK(k=k)
        self._plain = make_projection(self.projection, uses - 1, layout.numel, seed)
        self._mean_removed = self._plain.truncated(uses - 2) if self.mean_removal_rounds else self._plain

    @override
    def forward(self, updates: Tensor, round: Round) -> Received:
        power = self.power.of(round)
        removes_mean = round.index < self.mean_removal_rounds
        projection = self._mean_removed if removes_mean else self._plain

        corrected = self.memory.correct(updates, round.devices)
        sparse = self._sparsify.roundtrip(corrected, round.key).values
        projected = projection.mv(sparse.to(projection.dtype))
        symbols, amplitude = modulate(
            projected, power, share=round.weights, pilot_gain=self.pilot_gain, removes_mean=removes_mean
        )
        heard = self.channel(symbols, round.key)
        measured, pilot = demodulate(heard.symbols, pilot_gain=self.pilot_gain, removes_mean=removes_mean)

        heard_well = pilot * self.pilot_gain > _PILOT_SIGMAS * self.channel.noise_var**0.5
        recovery = self.decoder(torch.where(heard_well, measured, torch.zeros_like(measured)), projection)
        rest = corrected.addcmul_(sparse, heard_well.to(sparse.dtype), value=-1)
        self.memory.keep(rest, round.devices, adopt=True)

        estimate = recovery.x.to(updates.dtype)
        target = (amplitude.to(updates.dtype) @ sparse) / amplitude.sum()
        energy = target.square().sum()
        metrics = {
            "uplink/silent": (~heard_well).to(torch.float32),
            "uplink/nmse": torch.where(energy > 0, (estimate - target).square().sum() / energy, 0),
            "uplink/decoder_iterations": recovery.iterations,
            "uplink/decoder_diverged": recovery.diverged,
        }
        cost = Cost(channel_uses=heard.channel_uses, energy=heard.energy)
        one = torch.ones(1, dtype=round.weights.dtype, device=updates.device)
        return Received(rows=estimate.unsqueeze(0), weights=one, cost=cost, metrics=metrics)


def modulate(
    projected: Tensor,
    power: float,
    *,
    share: Tensor | None = None,
    pilot_gain: float = 1.0,
    removes_mean: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scale projected updates to the power of the round and append what the server needs to undo it.

    Args:
        projected: Projected updates, shape ``(M, n)``.
        power: Energy ``P_t`` that a device spends.
        share: How much each device is to count for, shape ``(M,)``, up to a common factor: its amplitude is lowered in
            proportion to the largest. None for all alike.
        pilot_gain: Amplitude ``c`` of the scaling symbol before scaling.
        removes_mean: Subtract each row's mean, and send it as a symbol of its own.

    Returns:
        ``(symbols, amplitude)``: symbols ``(M, n + 1)``, or ``(M, n + 2)`` with the mean, of energy ``power`` in the
        rows of largest share; and the amplitude ``sqrt(alpha_m)`` of each device, shape ``(M,)``.
    """
    pilot = projected.new_full((projected.shape[0], 1), pilot_gain)
    parts = [projected, pilot]
    if removes_mean:
        mean = projected.mean(dim=1, keepdim=True)
        parts = [projected - mean, mean, pilot]
    frame = torch.cat(parts, dim=1)
    amplitude = power**0.5 / torch.linalg.vector_norm(frame, dim=1, dtype=torch.float64)  # squares beyond float32
    if share is not None:
        amplitude = amplitude * (share / share.max())
    amplitude = amplitude.to(frame.dtype)
    return frame * amplitude.unsqueeze(1), amplitude


def demodulate(received: Tensor, *, pilot_gain: float = 1.0, removes_mean: bool = False) -> tuple[Tensor, Tensor]:
    """Undo the common scale of superposed symbols.

    Args:
        received: Channel output, shape ``(s,)``, of rows made by :func:`modulate` with the same options.
        pilot_gain: As there.
        removes_mean: As there.

    Returns:
        ``(measured, scale)``: the amplitude-weighted mean of the projected updates plus noise, shape ``(n,)``, and the
        received sum of amplitudes, a scalar.
    """
    scale = received[-1] / pilot_gain
    body = received[:-2] + received[-2] if removes_mean else received[:-1]
    return body / scale, scale
