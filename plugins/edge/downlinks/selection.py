"""Downlink device selection: messages of their own for the devices that hear best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.channels import NoFading, PowerSchedule
from groundwire.plugins.channels.broadcast import FadingBroadcast, Split, superposition_bits
from groundwire.plugins.edge.downlink import Downlink
from groundwire.plugins.edge.downlinks.digital import digital_cost, metrics_of, needs_noise
from groundwire.plugins.edge.downlinks.estimates import Estimates, check_memory, relative_error, send_within
from groundwire.plugins.edge.round import Round
from groundwire.plugins.edge.uplinks.resources import PowerBudget, resolve_channel_uses
from groundwire.plugins.ledger import Cost
from groundwire.plugins.random import Key


class DownlinkSelection(Downlink):
    """The devices with the best downlinks take part, and each is sent a message of its own, at a rate of its own.

    What is quantised for a device is the difference between the server's model and what that device holds, which is as
    old as the last round in which it took part. Levels and entries are those, within its rate, that are expected to lose
    least. The fewer devices, the better their models, and the less data they have. All begin with the model of the first
    round, which a shared seed gives them. Bits are booked as by :class:`DigitalDownlink`.

    It chooses among the devices that the scheduler lets in, by default all; where there are fewer, all take part.

    Args:
        num_selected: Devices that take part in a round, ``K``.
        power: Energy of the server in one round (not per symbol), or a schedule of it.
        channel: The channel; its noise must not be 0.
        bandwidth: Real channel uses per parameter, ``s / d``; ``s / 2`` complex ones. By default 1.
        channel_uses: ``s`` itself, instead of ``bandwidth``.
        split: ``"tdm"`` gives each device an equal share of the time, at full power; ``"superposition"`` sends to all at
            once, at equal rates, and needs block fading.
        tie_break: Who is chosen among devices that hear equally well: those of ``"lowest"`` id, or ``"random"`` ones.
        half_precision: Whether server and devices keep the devices' models as float16 numbers.
        memory_limit_gib: Most that the models of all devices may take, GiB.

    Raises:
        ValueError: If an argument is out of range; at set-up if there are fewer than ``K`` devices, ``s`` does not fit
            the model, or the devices' models do not fit the memory.

    Reference:
        Mohammadi Amiri, Kulkarni, Poor, "Federated Learning with Downlink Device Selection", SPAWC 2021.
        arXiv:2107.03510; how the channel is split, and levels and entries are chosen, is ours.

    Example:
        >>> downlink = DownlinkSelection(num_selected=10, power=5000.0)
    """

    def __init__(
        self,
        num_selected: int,
        power: float | PowerSchedule = 500.0,
        channel: FadingBroadcast | None = None,
        bandwidth: float | None = None,
        channel_uses: int | None = None,
        split: Split = "tdm",
        tie_break: Literal["lowest", "random"] = "lowest",
        half_precision: bool = False,
        memory_limit_gib: float = 2.0,
    ) -> None:
        super().__init__()
        if num_selected < 1:
            raise ValueError(f"`num_selected` must be at least 1, got {num_selected}.")
        if split not in ("tdm", "superposition"):
            raise ValueError(f"`split` must be 'tdm' or 'superposition', got {split!r}.")
        if tie_break not in ("lowest", "random"):
            raise ValueError(f"`tie_break` must be 'lowest' or 'random', got {tie_break!r}.")
        self.num_selected = num_selected
        self.power = PowerBudget(power)
        self.channel = needs_noise(channel or FadingBroadcast())
        fading = self.channel.fading
        if split == "superposition" and not (fading.block or isinstance(fading, NoFading)):
            raise ValueError(
                f"`split='superposition'` orders devices by one gain each, but this fading differs between channel uses: "
                f"{fading!r}. Give it block=True, or use split='tdm'."
            )
        self.bandwidth = 1.0 if bandwidth is None and channel_uses is None else bandwidth
        self.channel_uses = channel_uses
        self.split: Split = split
        self.tie_break = tie_break
        self.half_precision = half_precision
        self.memory_limit_gib = memory_limit_gib
        self.estimates = Estimates(half_precision)
        self.register_buffer("times_selected", torch.zeros(0, dtype=torch.int64))
        self.times_selected: Tensor
        self._uses = 0
        self._cost = Cost()
        self._metrics: dict[str, Tensor | float] = {}

    @override
    def setup(self, *, numel: int, num_devices: int) -> None:
        if self.num_selected > num_devices:
            raise ValueError(
                f"`num_selected` must be in 1..{num_devices}, the number of devices; got {self.num_selected}."
            )
        remedy = "" if self.half_precision else ", or set half_precision=True"
        check_memory(num_devices, numel, 2 if self.half_precision else 4, self.memory_limit_gib, remedy)
        self._uses = resolve_channel_uses(numel, bandwidth=self.bandwidth, channel_uses=self.channel_uses, least=2) // 2
        self.estimates.reset_state()
        self.times_selected = torch.zeros(num_devices, dtype=torch.int64)

    @override
    def choose(self, round: Round) -> Tensor:
        """The rows of the devices that could be sent most.

        Args:
            round: The round, of the devices to choose from.

        Returns:
            ``num_selected`` rows, ascending; all if there are fewer.
        """
        bits = self.channel.bits(round.key, self._uses, self.power.of(round))
        first = torch.tensor(round.devices)
        if self.tie_break == "random":
            first = round.key.rows("downlink/tie", lambda g: torch.rand((), generator=g, dtype=torch.float64))
        order = first.argsort()
        best = order[bits[order].argsort(descending=True, stable=True)[: self.num_selected]]
        return best.sort().values

    @override
    def forward(self, model: Tensor, round: Round) -> Tensor:
        """What each device of the round holds, shape ``(K, d)``."""
        held = self.estimates.of(model, len(self.times_selected))
        rows = torch.tensor(round.devices, device=model.device)
        self._cost, self._metrics = Cost(), {}
        if not round.is_empty:
            self._send(model, held, round)
            self.times_selected[rows.to(self.times_selected.device)] += 1
            share = self.times_selected.double() / self.times_selected.sum() * len(self.times_selected)
            self._metrics |= {"downlink/least_selected": share.min(), "downlink/most_selected": share.max()}
        models = held[rows].to(model.dtype)
        self._metrics["downlink/model_error"] = relative_error(models, model)
        return models

    def _send(self, model: Tensor, held: Tensor, round: Round) -> None:
        power, devices = self.power.of(round), round.devices
        budgets, shares = self._rates(round.key, power)
        key = Key(seed=round.key.seed, round=round.index, devices=devices, name="downlink")
        steps = []
        for i, (device, budget) in enumerate(zip(devices, budgets.tolist(), strict=True)):
            step = send_within(budget, model, held[device], key.row(i))
            held[device] = step.held
            steps.append(step)
        if any(step.is_silent for step in steps):
            rank_zero_warn(
                "Devices are chosen that can be sent fewer bits than the smallest message takes, and are sent nothing "
                "(`downlink/silent`). Raise the power or the bandwidth, or lower `num_selected`."
            )
        self._cost = digital_cost(steps, self._uses, power, shares)
        self._metrics = {"downlink/bit_budget": budgets.mean(), **metrics_of(steps)}

    def _rates(self, key: Key, power: float) -> tuple[Tensor, Tensor]:
        """Bits of each device, and its share of the energy."""
        count = len(key)
        if self.split == "tdm":
            bits = self.channel.bits(key, self._uses, power) / count
            return bits, torch.full_like(bits, 1 / count)
        shares, bits = superposition_bits(self.channel.snr(key, self._uses, power)[:, 0], self._uses)
        return bits.expand(count), shares

    @override
    def cost(self, numel: int, round: Round) -> Cost:
        """All messages, and the energy of the server that was not a silent device's share."""
        return self._cost

    @override
    def metrics(self, round: Round) -> Mapping[str, Tensor | float]:
        """As :class:`DigitalDownlink`, averaged over the devices; and how often single devices were chosen, 1 being even."""
        return self._metrics
