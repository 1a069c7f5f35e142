"""An analog downlink: the model itself, uncoded, which each device hears in its own way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.channels import PowerSchedule, pack_complex, unpack_complex
from groundwire.plugins.channels.broadcast import FadingBroadcast, lmmse, zero_forcing
from groundwire.plugins.edge.downlink import Downlink
from groundwire.plugins.edge.downlinks.estimates import Estimates, check_memory, relative_error
from groundwire.plugins.edge.round import Round
from groundwire.plugins.edge.uplinks.resources import PowerBudget
from groundwire.plugins.ledger import Cost
from groundwire.plugins.random import Key

_AT_ONCE = 2**22
"""Symbols that are received at once."""


class AnalogDownlink(Downlink):
    """The server sends its parameters as they are, two in a complex symbol, scaled to its power; each device estimates them.

    A device knows its gains and, from 32 bits beside the symbols, the scale. With one gain of size 1, the error of each
    entry has variance ``noise_var |model|^2 / (2 power)`` before the estimator: weights that stay small arrive better.

    Args:
        power: Energy of the server in one round (not per symbol), or a schedule of it.
        channel: The channel.
        channel_uses: Real channel uses a round; by default as many as the parameters need, ``2 ceil(d / 2)``.
        blocks: Of a model that needs more: ``"single"`` refuses it, ``"multi"`` sends it in several blocks of so many uses,
            each with fading of its own.
        estimator: ``"lmmse"``, of least mean squared error, or ``"zf"`` (zero forcing), unbiased, whose error has infinite
            variance under Rayleigh fading.
        floor: Zero forcing keeps what the device held before where ``|h|^2`` is below it.
        payload: ``"model"``, or ``"delta"``: how the model changed since the last round, which all devices add up, with
            all errors.
        memory_limit_gib: Most that the models of all devices may take, GiB; ``floor`` and ``"delta"`` need them.

    Raises:
        ValueError: If an argument is out of range; at set-up if there are too few channel uses or too little memory.

    Reference:
        Mohammadi Amiri, Gündüz, Kulkarni, Poor, "Convergence of Federated Learning over a Noisy Downlink", IEEE Trans.
        Wireless Commun. 21(3), 2022. arXiv:2008.11141; all but zero forcing of the model in one block is ours.

    Example:
        >>> downlink = AnalogDownlink(power=5000.0, channel=FadingBroadcast(noise_var=1.0))
    """

    def __init__(
        self,
        power: float | PowerSchedule = 500.0,
        channel: FadingBroadcast | None = None,
        channel_uses: int | None = None,
        blocks: Literal["single", "multi"] = "single",
        estimator: Literal["lmmse", "zf"] = "lmmse",
        floor: float = 0.0,
        payload: Literal["model", "delta"] = "model",
        memory_limit_gib: float = 2.0,
    ) -> None:
        super().__init__()
        if channel_uses is not None and channel_uses < 2:
            raise ValueError(f"`channel_uses` are real ones, two a complex symbol: at least 2, got {channel_uses}.")
        if blocks not in ("single", "multi"):
            raise ValueError(f"`blocks` must be 'single' or 'multi', got {blocks!r}.")
        if estimator not in ("lmmse", "zf"):
            raise ValueError(f"`estimator` must be 'lmmse' or 'zf', got {estimator!r}.")
        if payload not in ("model", "delta"):
            raise ValueError(f"`payload` must be 'model' or 'delta', got {payload!r}.")
        if not 0 <= floor < math.inf or (floor > 0 and (estimator == "lmmse" or payload == "delta")):
            raise ValueError(
                f"`floor`, on |h|^2, must be finite and >= 0, and is for estimator='zf' with payload='model', got "
                f"{floor=}, {estimator=}, {payload=}."
            )
        self.power = PowerBudget(power)
        self.channel = channel or FadingBroadcast()
        self.channel_uses = channel_uses
        self.blocks = blocks
        self.estimator = estimator
        self.floor = floor
        self.payload = payload
        self.memory_limit_gib = memory_limit_gib
        self.estimates = Estimates()
        self.previous = Estimates()
        self._block_uses = 0
        self._devices: tuple[int, ...] = ()
        self._cost = Cost()
        self._metrics: dict[str, Tensor | float] = {}

    @property
    def _remembers(self) -> bool:
        return self.payload == "delta" or self.floor > 0

    @override
    def setup(self, *, numel: int, num_devices: int) -> None:
        needed = -(-numel // 2)
        self._block_uses = needed if self.channel_uses is None else self.channel_uses // 2
        if self._block_uses < needed and self.blocks == "single":
            raise ValueError(
                f"An analog downlink of {numel} parameters needs {needed} complex symbols, but "
                f"channel_uses={self.channel_uses} real ones make {self._block_uses}. Raise it, or set blocks='multi' to take "
                "several blocks a round."
            )
        if self._remembers:
            check_memory(num_devices, numel, 4, self.memory_limit_gib, ", or use payload='model' without `floor`")
        self._devices = tuple(range(num_devices))
        self.estimates.reset_state()
        self.previous.reset_state()

    @override
    def forward(self, model: Tensor, round: Round) -> Tensor:
        """What each device of the round holds, shape ``(M, d)``; all devices listen if they have to remember."""
        if not self._remembers:
            models = self._receive(model, round, round.key, held=None)
        else:
            held, rows = self.estimates.of(model, len(self._devices)), torch.tensor(round.devices, device=model.device)
            everyone = Key(seed=round.key.seed, round=round.index, devices=self._devices)
            if self.payload == "delta":
                last = self.previous.of(model)
                held += self._receive(model - last, round, everyone, held=None)
                last.copy_(model)
            else:
                held.copy_(self._receive(model, round, everyone, held=held))
            models = held[rows]
        self._metrics["downlink/model_error"] = relative_error(models, model)
        return models

    def _receive(self, x: Tensor, round: Round, key: Key, held: Tensor | None) -> Tensor:
        """What the devices of ``key`` make of the vector ``x``, shape ``(M, d)``; ``held`` where the gain is too small."""
        size = float(x.double().square().sum())
        if size == 0:  # nothing to send
            self._cost, self._metrics = Cost(), {}
            return x.expand(len(key), -1).clone()
        symbols, power = pack_complex(x), self.power.of(round)
        scale, n = math.sqrt(power / size), len(symbols)
        received, erased = x.new_empty(len(key), len(x)), 0
        count = max(1, _AT_ONCE // n)
        for start in range(0, len(key), count):
            rows = slice(start, start + count)
            some = Key(seed=key.seed, round=key.round, devices=key.devices[rows], name=key.name)
            gains = self._gains(some, n, x.device)
            heard = self.channel(symbols * scale, some, gains=gains)
            if self.estimator == "lmmse":
                guess = lmmse(heard, gains, self.channel.noise_var * n / power)
            else:
                guess = zero_forcing(heard, gains)
            guess = guess / scale
            if held is not None:
                faint = (gains.abs().square() < self.floor).expand(-1, n)
                guess = torch.where(faint, pack_complex(held[rows]), guess)
                erased += int(faint.sum())
            received[rows] = unpack_complex(guess, len(x))
        energy = torch.tensor([power], dtype=torch.float64)
        self._cost = Cost(bits=32, bits_ideal=32, channel_uses=2 * n, energy=energy)
        self._metrics = {} if held is None else {"downlink/erased": erased / (n * len(key))}
        return received

    def _gains(self, key: Key, uses: int, on: torch.device) -> Tensor:
        if not self.channel.fading.block or self._block_uses >= uses:
            return self.channel.gains(key, uses, on=on)
        blocks = [self.channel.gains(key, 1, on=on, block=b) for b in range(-(-uses // self._block_uses))]
        return torch.cat(blocks, dim=1).repeat_interleave(self._block_uses, dim=1)[:, :uses]

    @override
    def cost(self, numel: int, round: Round) -> Cost:
        """The symbols, their energy, and the 32 bits of the scale."""
        return self._cost

    @override
    def metrics(self, round: Round) -> Mapping[str, Tensor | float]:
        """How far the devices' models are from the server's, relative to its norm; the share of symbols below the floor."""
        return self._metrics
