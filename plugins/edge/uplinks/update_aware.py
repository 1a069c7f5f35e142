"""Update-aware scheduling: who sends is decided after local work, from channels and updates."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.channels import FadingMAC, Rayleigh
from groundwire.plugins.compression import ErrorMemory, LargestEntries, Message, RateAdaptive
from groundwire.plugins.edge.round import Round
from groundwire.plugins.edge.uplinks.base import Received, Uplink
from groundwire.plugins.layout import ParameterLayout
from groundwire.plugins.ledger import Cost

Policy = Literal["bc", "bn2", "bc_bn2", "bn2_c", "random", "round_robin", "all"]


class UpdateAware(Uplink):
    """Digital transmission over orthogonal shares of a fading channel by ``K`` devices, chosen after local work.

    All devices compute an update. The server, which knows their gains and is told the norms of their updates, chooses who
    sends and how many of the ``n`` complex channel uses each one gets: ``n_m``. It sends with ``M / K`` times the average
    power, and may send ``n_m C_m`` bits with ``C_m = log2(1 + (M / K) power |h_m|^2 / noise_var)``. A round takes
    ``n power M / K`` of energy, so that fewer devices spend more together. The limit on the power holds for the mean over
    devices: a policy that prefers some (by norms, under path loss, without fading) lets these exceed it. In the recipes
    ``update_aware`` and ``best_norm`` one device spends three and four times the mean; see ``ledger.energy_per_device``. The compressor takes the largest resolution that fits. What the
    others computed is lost.

    The policies, of which the last three are baselines:

    - ``"bc"`` (best channel): the ``K`` largest gains; equal bits.
    - ``"bn2"`` (best norm): the ``K`` largest norms; bits in proportion to the norm.
    - ``"bc_bn2"``: of the ``num_candidates`` largest gains the ``K`` largest norms; bits in proportion to the norm.
    - ``"bn2_c"``: the ``K`` largest norms of what would be left of the update if the device had the whole channel; bits in
      proportion to that norm.
    - ``"random"`` and ``"round_robin"``: ``K`` devices whatever they are; equal bits.
    - ``"all"``: every device; equal bits.

    Devices with ``C_m`` below ``min_capacity`` cannot be chosen. One whose share does not carry the smallest message is
    silent and counts as an update of zero (``uplink/unserved_devices``). If that is so for all, or nobody can be chosen, the
    estimate is zero, nothing is spent, and ``uplink/silent`` is 1.

    The server gets the rows of the chosen devices, weighted by their numbers of samples. Capacity is an idealisation:
    messages arrive without error. Norms, gains and the schedule travel on a control link that is taken as free.

    Args:
        policy: Who is chosen.
        num_scheduled: ``K``; not with ``"all"``.
        num_candidates: ``K_c`` of ``"bc_bn2"``, at least ``K``.
        power_per_symbol: Average energy of a device in a complex channel use that it is given.
        channel: The channel, with block fading (a device has one gain in a round), perfect CSI and noise.
        bandwidth: Real channel uses per parameter, ``2 n / d``; may be above 1.
        channel_uses: Real channel uses ``2 n`` themselves, instead of ``bandwidth``.
        compressor: A compressor that adapts to a budget of bits; by default :class:`~groundwire.plugins.compression.LargestEntries`.
        error_feedback: Whether devices keep what is left of their updates when they send; what they keep then counts for
            their norms.
        integer_uses: Whether channel uses are whole numbers.
        min_capacity: In bits per complex channel use, > 0.

    Raises:
        ValueError: If an argument is out of range; at set-up if ``K <= K_c <= M`` does not hold, or there is no channel use.

    Example:
        >>> uplink = UpdateAware("bn2_c", num_scheduled=10, bandwidth=1.25)

    Reference:
        Mohammadi Amiri, Gündüz, Kulkarni, Poor, "Convergence of Update Aware Device Scheduling for Federated Learning at
        the Wireless Edge", IEEE Trans. Wireless Commun. 20(6), 2021. arXiv:2001.10402
    """

    def __init__(
        self,
        policy: Policy = "bn2_c",
        num_scheduled: int | None = None,
        num_candidates: int | None = None,
        power_per_symbol: float = 1.0,
        channel: FadingMAC | None = None,
        bandwidth: float | None = None,
        channel_uses: int | None = None,
        compressor: RateAdaptive | None = None,
        error_feedback: bool = False,
        integer_uses: bool = False,
        min_capacity: float = 1e-3,
    ) -> None:
        super().__init__()
        _check_policy(policy, num_scheduled, num_candidates)
        if not 0 < power_per_symbol < math.inf:
            raise ValueError(
                f"`power_per_symbol`, energy of a complex channel use, must be finite and > 0, got {power_per_symbol}."
            )
        if not 0 < min_capacity < math.inf:
            raise ValueError(f"`min_capacity`, in bits per channel use, must be finite and > 0, got {min_capacity}.")
        if bandwidth is not None and channel_uses is not None:
            raise ValueError(
                f"Give either `bandwidth` (channel uses per parameter) or `channel_uses`, got {bandwidth=}, {channel_uses=}."
            )
        if bandwidth is not None and not 0 < bandwidth < math.inf:
            raise ValueError(f"`bandwidth` is channel uses per parameter and must be > 0, got {bandwidth}.")
        self.policy = policy
        self.num_scheduled = num_scheduled
        self.num_candidates = num_candidates
        self.power_per_symbol = power_per_symbol
        self.channel = channel or FadingMAC(Rayleigh(block=True))
        if self.channel.csi_error_var != 0 or self.channel.noise_var == 0 or not self.channel.fading.block:
            raise ValueError(
                "A digital link at the capacity of a flat channel needs perfect CSI (csi_error_var=0), noise (noise_var > 0) "
                f"and block fading, such as FadingMAC(Rayleigh(block=True)); got {self.channel!r}."
            )
        self.bandwidth = 1.0 if bandwidth is None and channel_uses is None else bandwidth
        self.channel_uses = channel_uses
        self.compressor = compressor or LargestEntries()
        self.memory = ErrorMemory() if error_feedback else None
        self.integer_uses = integer_uses
        self.min_capacity = min_capacity
        self._uses = 0

    @override
    def setup(self, *, layout: ParameterLayout, num_devices: int, seed: int) -> None:
        k, kc, m = self.num_scheduled, self.num_candidates, num_devices
        if k is not None and k > m:
            raise ValueError(f"`num_scheduled` (K) = {k} must be <= M = {m} devices.")
        if k is not None and kc is not None and not k <= kc <= m:
            raise ValueError(f"`num_candidates` (K_c) = {kc} must be >= K = {k} and <= M = {m}.")
        real = self.channel_uses if self.bandwidth is None else int(self.bandwidth * layout.numel)
        assert real is not None  # one of the two is given
        self._uses = real // 2
        if self._uses < 1:
            raise ValueError(
                f"{real} real channel uses a round for {layout.numel} parameters are less than one complex use: raise "
                "`bandwidth` or `channel_uses`."
            )
        if self.memory is not None:
            self.memory.reset_state()
            self.memory.setup(num_devices)

    @override
    def forward(self, updates: Tensor, round: Round) -> Received:
        wanted = updates if self.memory is None else self.memory.correct(updates, round.devices).to(updates.dtype)
        scheduled = min(self.num_scheduled or len(updates), len(updates))
        power = self.power_per_symbol * len(updates) / scheduled
        gains = self.channel.gains(round.key, 1, on=updates.device).flatten().abs().square().double()
        capacities = torch.log2(1 + power * gains / self.channel.noise_var)
        able = (capacities >= self.min_capacity).nonzero().flatten()
        able = able[torch.tensor(round.devices, device=able.device)[able].argsort()]  # ties go to the lowest device

        chosen, shares = self._choose(able, wanted, gains, capacities, scheduled, round)
        uses = allocate(shares, capacities[chosen], self._uses, integer=self.integer_uses)
        budgets = (uses * capacities[chosen]).tolist()
        sent = [self._send(wanted, m, bits, round) for m, bits in zip(chosen.tolist(), budgets, strict=True)]
        served = torch.tensor([message is not None for message in sent], dtype=torch.bool, device=updates.device)
        if not bool(served.any()):
            rank_zero_warn(
                "There are rounds in which nobody can send (`uplink/silent`): of the chosen devices none may send as much as "
                f"the smallest message of {type(self.compressor).__name__} takes. Schedule fewer devices, or raise the power "
                "or the bandwidth."
            )
        rows = updates.new_zeros(max(len(chosen), 1), updates.shape[1])
        for row, message in enumerate(sent):
            if message is not None:
                rows[row] = message.values[0]
        if self.memory is not None and len(chosen):
            self.memory.keep(wanted[chosen] - rows, tuple(round.devices[m] for m in chosen.tolist()))

        energy = torch.zeros(len(updates), dtype=torch.float64, device=updates.device)
        energy[chosen] = torch.where(served, uses * power, 0)
        cost = Cost(
            bits=sum(message.bits_wire for message in sent if message is not None),
            bits_ideal=sum(message.bits_ideal for message in sent if message is not None),
            channel_uses=2 * self._uses if bool(served.any()) else 0,
            energy=energy,
        )
        metrics = {
            "uplink/silent": float(not served.any()),
            "uplink/scheduled_devices": float(len(chosen)),
            "uplink/unserved_devices": float((~served).sum()),
            "uplink/unreachable_devices": float(len(updates) - len(able)),
            "uplink/bit_budget_per_device": sum(budgets) / max(len(budgets), 1),
        }
        weights = round.weights[chosen] if len(chosen) else torch.ones_like(round.weights[:1])
        senders = chosen if len(chosen) else None
        return Received(rows=rows, weights=weights / weights.sum(), cost=cost, metrics=metrics, senders=senders)

    def _choose(
        self, able: Tensor, wanted: Tensor, gains: Tensor, capacities: Tensor, count: int, round: Round
    ) -> tuple[Tensor, Tensor]:
        """Who sends, of those who can, and the proportions of their bits."""
        norms = torch.linalg.vector_norm(wanted, dim=1, dtype=torch.float64)
        if self.policy == "bn2_c":
            norms = self._norms_if_alone(able, wanted, capacities, round)
        equal = torch.ones_like(norms)
        if self.policy == "bc":
            return (chosen := largest(gains, able, count)), equal[chosen]
        if self.policy in ("bn2", "bn2_c"):
            return (chosen := largest(norms, able, count)), norms[chosen]
        if self.policy == "bc_bn2":
            best = largest(gains, able, self.num_candidates or count)
            return (chosen := largest(norms, best, count)), norms[chosen]
        if self.policy == "random":
            draws = round.key.rows("schedule/uplink", lambda g: torch.rand((), generator=g, dtype=torch.float64))
            return (chosen := largest(draws.to(able.device), able, count)), equal[chosen]
        if self.policy == "round_robin":
            turn = (round.index * count + torch.arange(min(count, len(able)), device=able.device)) % max(len(able), 1)
            return (chosen := able[turn]), equal[chosen]
        return able, equal[able]

    def _norms_if_alone(self, able: Tensor, wanted: Tensor, capacities: Tensor, round: Round) -> Tensor:
        """Norm of what would arrive of each update if its device had the whole channel, shape ``(M,)``, float64."""
        norms = torch.zeros_like(capacities)
        for m, capacity in zip(able.tolist(), capacities[able].tolist(), strict=True):
            message = self._send(wanted, m, self._uses * capacity, round)
            if message is not None:
                norms[m] = torch.linalg.vector_norm(message.values, dtype=torch.float64)
        return norms

    def _send(self, wanted: Tensor, row: int, bits: float, round: Round) -> Message | None:
        """One device's message within a budget; None if not even the smallest fits."""
        fitted = self.compressor.for_budget(wanted.shape[1], bits)
        return None if fitted is None else fitted.roundtrip(wanted[row : row + 1], round.key.row(row))


def largest(values: Tensor, among: Tensor, count: int) -> Tensor:
    """The ``count`` rows of largest value; ties go to the one that comes first in ``among``.

    Args:
        values: Of all rows, shape ``(M,)``.
        among: Rows that may be chosen, shape ``(n,)``, int64.
        count: How many; all if there are fewer.

    Returns:
        Rows, in the order of ``among``.

    Example:
        >>> largest(torch.tensor([3.0, 5.0, 4.0, 5.0]), torch.tensor([0, 1, 2, 3]), 2).tolist()
        [1, 3]
    """
    ranked = values[among].sort(descending=True, stable=True).indices
    return among[ranked[:count].sort().values]


def allocate(shares: Tensor, capacities: Tensor, uses: int, *, integer: bool = False) -> Tensor:
    """Channel uses of each device, so that bits are in proportion to shares: ``n_m C_m`` to ``shares_m``.

    Args:
        shares: ``>= 0``, shape ``(K,)``; if all are 0, they count as equal.
        capacities: ``C_m > 0`` in bits per channel use, shape ``(K,)``.
        uses: ``n``, all channel uses.
        integer: Round down, and give what is left to the largest remainders.

    Returns:
        ``n_m``, which sum to ``n``, float64, shape ``(K,)``.

    Example:
        >>> allocate(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 3.0]), 100).round(decimals=6).tolist()
        [75.0, 25.0]
    """
    shares = shares.double()
    if not bool((shares > 0).any()):
        shares = torch.ones_like(shares)
    times = shares / shares.max() / capacities.double() if len(shares) else shares
    exact = uses * times / times.sum()
    if not integer or not len(shares):
        return exact
    whole = exact.floor()
    left = uses - int(whole.sum())
    whole[(exact - whole).sort(descending=True, stable=True).indices[:left]] += 1
    return whole


def _check_policy(policy: str, num_scheduled: int | None, num_candidates: int | None) -> None:
    if policy not in get_args(Policy):
        raise ValueError(f"`policy` must be one of {', '.join(map(repr, get_args(Policy)))}, got {policy!r}.")
    if (num_scheduled is None) != (policy == "all"):
        raise ValueError(
            f"`num_scheduled` (K) says how many devices send, and goes with every policy but 'all'; got {num_scheduled} with "
            f"{policy!r}."
        )
    if num_scheduled is not None and num_scheduled < 1:
        raise ValueError(f"`num_scheduled` (K) must be at least 1, got {num_scheduled}.")
    if (num_candidates is None) == (policy == "bc_bn2"):
        raise ValueError(
            f"`num_candidates` (K_c) goes with policy='bc_bn2', and only with it; got {num_candidates} with {policy!r}."
        )
