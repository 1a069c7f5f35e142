"""CA-DSGD and ESA-DSGD: gradients that add up in the air of a fading channel, which every device inverts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.channels import (
    AMP,
    Decoder,
    FadingMAC,
    PowerSchedule,
    Projection,
    Rayleigh,
    Recovery,
    make_projection,
    pack_complex,
    unpack_complex,
)
from groundwire.plugins.channels.base import energy_of
from groundwire.plugins.compression import ErrorMemory, TopK
from groundwire.plugins.edge.round import Round
from groundwire.plugins.edge.uplinks.base import Received, Uplink
from groundwire.plugins.edge.uplinks.resources import PowerBudget, entries_to_recover, resolve_channel_uses
from groundwire.plugins.layout import ParameterLayout
from groundwire.plugins.ledger import Cost


@dataclass(frozen=True, eq=False, kw_only=True)
class Superposed:
    """What the server makes of a round of truncated channel inversion.

    Args:
        mean: The weighted mean over the devices that were not silent, by channel use; 0 where all were; shape ``(n,)``.
        heard: Channel uses in which somebody sent, shape ``(n,)``.
        active: Who sent in which, shape ``(M, n)`` or ``(M, 1)``.
        energy: Of each device.
        channel_uses: Real channel uses.
    """

    mean: Tensor
    heard: Tensor
    active: Tensor
    energy: Tensor
    channel_uses: int


class ChannelInversion:
    """Truncated channel inversion: every device sends ``gamma c / h`` where ``|h|^2 >= threshold``, and nothing elsewhere.

    One factor ``gamma`` for all makes the superposition a plain sum. It is as large as the average energy allows to the
    device that needs most: energies are averages over fading, and single rounds may exceed them. The server knows who
    sends when, and nothing else of the gains.

    Args:
        channel: The channel; its ``csi_error_var`` is what the devices know.
        threshold: On the square of the known gain.
        debias: Whether the server divides by what imperfect CSI takes from the mean (Rayleigh fading only).
        who: The method, for errors.

    Raises:
        ValueError: If the devices know nothing, inversion has no finite average energy, or nobody would ever send.
    """

    def __init__(self, channel: FadingMAC, threshold: float, debias: bool, who: str) -> None:
        channel.check_csi(who)
        if not 0 <= threshold < math.inf:
            raise ValueError(f"`threshold`, on |h|^2, must be finite and >= 0, got {threshold}.")
        if debias and not isinstance(channel.fading, Rayleigh):
            raise ValueError(
                f"`csi_debias` knows what imperfect CSI takes from the mean under Rayleigh fading only, got "
                f"{type(channel.fading).__name__}."
            )
        self.channel = channel
        self.threshold = threshold
        self.debias = debias
        self._costs: dict[float, float] = {}
        usual = self.cost(channel.fading.variance)
        if not math.isfinite(usual):
            raise ValueError(
                f"`threshold` must be > 0 under {type(channel.fading).__name__} fading with csi_error_var="
                f"{channel.csi_error_var}: channel inversion has infinite average power. 0.1 to 0.5 times the mean of |h|^2 "
                "is usual."
            )
        if not usual and channel.fading.path_loss is None:
            raise ValueError(
                f"`threshold`={threshold} is so far above the mean of |h|^2, {channel.fading.variance}, that no device ever "
                "sends. 0.1 to 0.5 times that mean is usual."
            )

    def cost(self, variance: float) -> float:
        """Mean energy that a device spends on a symbol of energy 1 by inverting its gain, silence included.

        Args:
            variance: Mean of ``|h|^2`` of the device.

        Returns:
            ``E[1{|g|^2 >= threshold} / |g|^2]`` for what the device knows, ``g``.
        """
        if variance not in self._costs:  # path loss gives each device its own, which may take a sum of many terms
            known = self.channel.fading.law(variance, self.channel.csi_error_var or 0.0)
            self._costs[variance] = known.inverse_moment(self.threshold)
        return self._costs[variance]

    def __call__(self, symbols: Tensor, round: Round, power: float) -> Superposed:
        """Send complex symbols.

        Args:
            symbols: Shape ``(M, n)``; the server wants their weighted mean.
            round: The round.
            power: Average energy ``P_t`` of the device that needs most.

        Returns:
            What arrived.
        """
        channel, key = self.channel, round.key
        n, device = symbols.shape[1], symbols.device
        gains = channel.gains(key, n, on=device)
        known = channel.csi(gains, key, who="channel inversion")
        squares = known.abs().square()
        active = squares >= self.threshold
        share = round.weights.to(squares.dtype) * len(round.weights)  # 1 for all where they are alike
        means = channel.fading.mean_squares(key)
        costs = torch.tensor([self.cost(mean) for mean in means.tolist()], dtype=torch.float64, device=device)
        needs = share.double().square() * energy_of(symbols) * costs
        gamma = torch.sqrt(power / needs.max()).float().nan_to_num(posinf=0.0)  # nothing to send: nothing is spent
        inverse = torch.where(active, known.conj() / squares.clamp_min(torch.finfo(squares.dtype).tiny), 0)
        heard = channel(symbols * inverse * (gamma * share).unsqueeze(1), key, gains=gains)
        if self.debias and channel.csi_error_var:
            share = share * (means / (means + channel.csi_error_var)).to(share)
        total = (gamma * (active * share.unsqueeze(1)).sum(0)).expand(n)
        somebody = total > 0
        mean = torch.where(somebody, heard.symbols / total.clamp_min(torch.finfo(total.dtype).tiny), 0)
        return Superposed(
            mean=mean, heard=somebody, active=active, energy=heard.energy, channel_uses=heard.channel_uses
        )

    def __repr__(self) -> str:
        return f"ChannelInversion(threshold={self.threshold}, debias={self.debias})"


class CADSGD(Uplink):
    """Compressed analog distributed SGD over a fading multiple-access channel, with truncated channel inversion.

    Each device adds its error memory to its update, keeps the ``k`` entries of largest magnitude, projects them to ``s``
    real numbers with a pseudo-random matrix that all know, and sends two of them in each complex symbol, divided by its
    own gain, where that is not too small. The server divides each symbol by the weights of those who sent it, leaves out
    symbols that nobody sent, and decodes.

    What a symbol holds is the mean over the devices that sent it, which differ from symbol to symbol. Energies hold on
    average over fading, not in every round. A device that is silent in all symbols of a round (as under block fading)
    remembers its whole update.

    Args:
        power: Average energy of one device in one round (not per symbol), or a schedule of it; the device that needs most
            spends it, the others less.
        channel: The fading channel, and what devices know of it.
        threshold: Least ``|h|^2`` at which a device sends.
        bandwidth: Real channel uses per parameter, ``s / d``; ``s / 2`` complex ones, rounded up.
        channel_uses: ``s`` itself, instead of ``bandwidth``.
        sparsity: Entries kept per real channel use, ``k / s``, in (0, 1).
        num_entries: ``k`` itself, instead of ``sparsity``.
        projection: ``"gaussian"`` (dense), ``"dct"`` (subsampled cosine transform, O(d log d)), or ``"auto"``.
        decoder: Sparse recovery at the server; by default :class:`AMP`.
        csi_debias: Whether the server divides by the share that imperfect CSI leaves of the mean (Rayleigh fading).
        average_power: If given, the schedule's average over the run may not exceed it.

    Raises:
        ValueError: If an argument is out of range; at set-up if ``s`` or ``k`` does not fit the model.

    Example:
        >>> uplink = CADSGD(power=500.0, threshold=0.1, bandwidth=0.5, channel=FadingMAC(csi_error_var=0.1))

    Reference:
        Mohammadi Amiri, Gündüz, "Federated Learning over Wireless Fading Channels", IEEE Trans. Wireless Commun. 19(5),
        2020. arXiv:1907.09769
    """

    superposes = True

    def __init__(
        self,
        power: float | PowerSchedule = 500.0,
        channel: FadingMAC | None = None,
        threshold: float = 0.1,
        bandwidth: float | None = None,
        channel_uses: int | None = None,
        sparsity: float | None = None,
        num_entries: int | None = None,
        projection: Literal["auto", "gaussian", "dct"] = "dct",
        decoder: Decoder | None = None,
        csi_debias: bool = False,
        average_power: float | None = None,
    ) -> None:
        super().__init__()
        if sparsity is not None and num_entries is not None:
            raise ValueError(f"Give either `sparsity` (k / s) or `num_entries` (k), got {sparsity=}, {num_entries=}.")
        if sparsity is not None and not 0 < sparsity < 1:
            raise ValueError(
                f"`sparsity` is entries kept per channel use, k / s, and must be in (0, 1), got {sparsity}."
            )
        self.power = PowerBudget(power, average_power)
        self.channel = channel or FadingMAC()
        self.inversion = ChannelInversion(self.channel, threshold, csi_debias, type(self).__name__)
        self.bandwidth = 0.5 if bandwidth is None and channel_uses is None else bandwidth
        self.channel_uses = channel_uses
        self.sparsity = 0.5 if sparsity is None and num_entries is None else sparsity
        self.num_entries = num_entries
        self.projection = projection
        self.decoder = decoder or AMP()
        self.memory = ErrorMemory()
        self._sparsify: TopK
        self._matrix: Projection

    @override
    def setup(self, *, layout: ParameterLayout, num_devices: int, seed: int) -> None:
        uses = resolve_channel_uses(layout.numel, bandwidth=self.bandwidth, channel_uses=self.channel_uses, least=2)
        k = entries_to_recover(uses, sparsity=self.sparsity, num_entries=self.num_entries)
        self.memory.reset_state()
        self.memory.setup(num_devices)
        self._sparsify = TopK(k=k)
        self._matrix = make_projection(self.projection, uses, layout.numel, seed)

    @override
    def forward(self, updates: Tensor, round: Round) -> Received:
        corrected = self.memory.correct(updates, round.devices)
        sparse = self._sparsify.roundtrip(corrected, round.key).values
        projected = self._matrix.mv(sparse.to(self._matrix.dtype))
        arrived = self.inversion(pack_complex(projected), round, self.power.of(round))
        has_sent = (arrived.energy > 0).unsqueeze(1)
        rest = corrected.addcmul_(sparse, has_sent.to(sparse.dtype), value=-1)
        self.memory.keep(rest, round.devices, adopt=True)

        recovery = self._decode(arrived)
        estimate = recovery.x.to(updates.dtype)
        target = round.weights.to(sparse.dtype) @ sparse
        energy = target.square().sum()
        metrics = _metrics(arrived) | {
            "uplink/nmse": torch.where(energy > 0, (estimate - target).square().sum() / energy, 0),
            "uplink/decoder_iterations": recovery.iterations,
            "uplink/decoder_diverged": recovery.diverged,
        }
        return _single(estimate, round, arrived, metrics)

    def _decode(self, arrived: Superposed) -> Recovery:
        """The sparse vector behind the symbols that somebody sent; zeros where nobody sent any."""
        s = self._matrix.num_rows
        measured = unpack_complex(arrived.mean, s)
        rows = arrived.heard.repeat(2)[:s].nonzero().flatten()
        if not len(rows):
            zero = measured.new_zeros(())
            nothing = measured.new_zeros(self._matrix.numel)
            return Recovery(x=nothing, iterations=zero.long(), residual=zero, diverged=zero.bool())
        matrix = self._matrix
        if len(rows) < s:
            matrix, measured = matrix.select(rows), measured[rows] * math.sqrt(s / len(rows))
        recovery: Recovery = self.decoder(measured, matrix)
        return recovery


class ESADSGD(Uplink):
    """Entry-wise scheduled analog distributed SGD: uncompressed entries in turn, each on a sub-channel of its own.

    A baseline of :class:`CADSGD`: in every round the next ``s`` entries of the update, cyclically, are sent as they are,
    two in each complex symbol, by the devices whose gain there is not too small. The others' estimate is 0.

    Args:
        power: As in :class:`CADSGD`.
        channel: As there.
        threshold: As there.
        bandwidth: Real channel uses per parameter, ``s / d``; ``s / 2`` complex ones, rounded up.
        channel_uses: ``s`` itself, instead of ``bandwidth``.
        error_feedback: Whether devices keep the entries that they did not send (ECESA-DSGD).
        csi_debias: As in :class:`CADSGD`.
        average_power: As there.

    Raises:
        ValueError: If an argument is out of range; at set-up if ``s`` does not fit the model.

    Example:
        >>> uplink = ESADSGD(power=500.0, bandwidth=0.5, error_feedback=True)

    Reference:
        Mohammadi Amiri, Gündüz, "Federated Learning over Wireless Fading Channels", IEEE Trans. Wireless Commun. 19(5),
        2020. arXiv:1907.09769 (the window in which entries take turns is ours)
    """

    superposes = True

    def __init__(
        self,
        power: float | PowerSchedule = 500.0,
        channel: FadingMAC | None = None,
        threshold: float = 0.1,
        bandwidth: float | None = None,
        channel_uses: int | None = None,
        error_feedback: bool = False,
        csi_debias: bool = False,
        average_power: float | None = None,
    ) -> None:
        super().__init__()
        self.power = PowerBudget(power, average_power)
        self.channel = channel or FadingMAC()
        self.inversion = ChannelInversion(self.channel, threshold, csi_debias, type(self).__name__)
        self.bandwidth = 0.5 if bandwidth is None and channel_uses is None else bandwidth
        self.channel_uses = channel_uses
        self.memory = ErrorMemory() if error_feedback else None
        self._uses = 0

    @override
    def setup(self, *, layout: ParameterLayout, num_devices: int, seed: int) -> None:
        self._uses = resolve_channel_uses(
            layout.numel, bandwidth=self.bandwidth, channel_uses=self.channel_uses, least=1
        )
        if self.memory is not None:
            self.memory.reset_state()
            self.memory.setup(num_devices)

    @override
    def forward(self, updates: Tensor, round: Round) -> Received:
        d, s = updates.shape[1], self._uses
        entries = (round.index * s + torch.arange(s, device=updates.device)) % d
        corrected = updates if self.memory is None else self.memory.correct(updates, round.devices)
        arrived = self.inversion(pack_complex(corrected[:, entries].float()), round, self.power.of(round))
        if self.memory is not None:
            sent = arrived.active.expand(-1, len(arrived.heard)).repeat(1, 2)[:, :s]
            rest = corrected.clone()
            rest[:, entries] = corrected[:, entries].masked_fill(sent, 0)
            self.memory.keep(rest, round.devices)
        estimate = torch.zeros_like(updates[0])
        estimate[entries] = unpack_complex(arrived.mean, s).to(updates.dtype)
        return _single(estimate, round, arrived, _metrics(arrived))


def _metrics(arrived: Superposed) -> dict[str, Tensor | float]:
    return {
        "uplink/activity": arrived.active.float().mean(),
        "uplink/erased": (~arrived.heard).float().mean(),
    }


def _single(estimate: Tensor, round: Round, arrived: Superposed, metrics: Mapping[str, Tensor | float]) -> Received:
    one = torch.ones(1, dtype=round.weights.dtype, device=estimate.device)
    cost = Cost(channel_uses=arrived.channel_uses, energy=arrived.energy)
    return Received(rows=estimate.unsqueeze(0), weights=one, cost=cost, metrics=metrics)
