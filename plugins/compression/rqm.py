"""RQM: quantisation whose own randomness is differentially private."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.compression.base import Compressor, Message, Payload, check_releases, check_rows
from groundwire.plugins.compression.packing import pack_integers, packed_bytes, unpack_integers, width_of
from groundwire.plugins.random import Key

if TYPE_CHECKING:  # at run time in the methods: it brings Opacus along
    from groundwire.plugins.privacy.statement import PrivacyStatement


class RQM(Compressor):
    """Randomized Quantization Mechanism: stochastic rounding to a random subset of the levels, entry by entry.

    The levels are evenly spread over ``[-clip - margin, clip + margin]``. Each entry keeps both outermost levels and
    each other one with probability ``keep_probability``, and is rounded up or down to a neighbour that is kept, so
    that its expectation stays. Entries are clipped to ``[-clip, clip]`` first: the decoded row is unbiased for what
    clipping leaves, so :attr:`unbiased` is not claimed. NaN counts as 0, since a mark for it would not be private.

    An entry travels as its level's number in ``ceil(log2 num_levels)`` bits. If the guarantee counts on secure
    aggregation (``num_shares > 1``), numbers are masked modulo a power of two that holds the sum of ``max_devices``, in
    ``ceil(log2(max_devices * (num_levels - 1) + 1))`` bits, and that is what travels.

    Args:
        clip: Range of the entries, positive, in their own unit.
        num_levels: Levels ``m``, at least 2 (with 2, ``keep_probability`` has no effect).
        margin: How far the outermost levels lie beyond ``clip``, positive; None for as far as ``clip`` itself.
        keep_probability: Of each inner level, in (0, 1).
        num_shares: Honest devices in each secure sum, for the guarantee; 1 needs no secure aggregation.
        max_devices: Devices in a secure sum, at most; ``num_shares`` by default.

    Raises:
        ValueError: If an argument is out of range.

    Reference:
        Youn, Hu, Ziani, Abernethy, "Randomized Quantization is All You Need for Differential Privacy in Federated
        Learning", 2023, Algorithm 2. arXiv:2306.11913

    Example:
        >>> message = RQM(clip=1.0, num_levels=2, margin=0.5).roundtrip(torch.zeros(1, 8), Key(seed=0))
        >>> message.values.abs().unique(), message.bits_wire
        (tensor([1.5000]), 8)
        >>> print(RQM(clip=1.0).privacy(numel=1, delta=0.0))  # doctest: +ELLIPSIS
        (5.47, 0)-DP for one coordinate of a device's updates (replace-one), by the Randomized Quantization mechanism...
    """

    carries_nan = False

    def __init__(
        self,
        clip: float,
        num_levels: int = 16,
        margin: float | None = None,
        keep_probability: float = 0.42,
        num_shares: int = 1,
        max_devices: int | None = None,
    ) -> None:
        from groundwire.plugins.privacy.rqm import check_rqm

        super().__init__()
        margin = clip if margin is None else margin
        check_rqm(clip, margin, num_levels, keep_probability)
        if num_shares < 1:
            raise ValueError(f"`num_shares` must be at least 1, got {num_shares}.")
        max_devices = num_shares if max_devices is None else max_devices
        if max_devices < num_shares:
            raise ValueError(f"`max_devices` must be at least num_shares={num_shares}, got {max_devices}.")
        if width_of(max_devices * (num_levels - 1)) > 32:
            raise ValueError(f"A sum of {max_devices} codes of {num_levels} levels takes more than 32 bits.")
        self.clip = clip
        self.num_levels = num_levels
        self.margin = margin
        self.keep_probability = keep_probability
        self.num_shares = num_shares
        self.max_devices = max_devices

    @property
    def _width(self) -> int:
        return width_of(self.max_devices * (self.num_levels - 1))

    def _quantize(self, x: Tensor, key: Key) -> Tensor:
        """Level numbers, float64, shape ``(rows, d)``."""
        check_rows(x, key)
        d, top = x.shape[1], self.num_levels - 1
        low, high, side = key.rows(  # in float64: their tails carry the guarantee
            "rqm", lambda g: torch.rand(3, d, generator=g, dtype=torch.float64, device=x.device), on=x.device
        ).unbind(1)
        clipped = x.detach().double().nan_to_num(nan=0.0).clamp_(-self.clip, self.clip)
        position = clipped.div_(self.clip + self.margin).add_(1).mul_(top / 2)
        below = position.floor().clamp_(0, top - 1)
        per_level = -1 / math.log1p(-self.keep_probability)  # levels passed over are geometric, and the ends stop them
        down = below - low.neg_().log1p_().mul_(-per_level).floor_()
        up = below + high.neg_().log1p_().mul_(-per_level).floor_() + 1
        down, up = down.clamp_(min=0), up.clamp_(max=top)
        return torch.where(side * (up - down) < position - down, up, down)

    def _dequantize(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Values of the level numbers."""
        top = self.num_levels - 1
        return ((2 * codes.double() - top) * ((self.clip + self.margin) / top)).to(dtype)

    def _bits_ideal(self, x: Tensor) -> float:
        return x.numel() * math.log2(self.max_devices * (self.num_levels - 1) + 1)

    @override
    def encode(self, x: Tensor, key: Key) -> Payload:
        codes = self._quantize(x, key).to(torch.int64)
        return Payload(
            parts={"codes": pack_integers(codes, self._width)},
            numel=x.shape[1],
            dtype=x.dtype,
            bits_ideal=self._bits_ideal(x),
        )

    @override
    def decode(self, payload: Payload) -> Tensor:
        return self._dequantize(unpack_integers(payload.parts["codes"], self._width, payload.numel), payload.dtype)

    @override
    def decode_sum(self, payload: Payload) -> Tensor:
        """The sum of all rows, shape ``(1, d)``.

        Raises:
            ValueError: If it may exceed the field that the codes are masked in.
        """
        if len(payload.parts["codes"]) > self.max_devices:
            raise ValueError(
                f"A sum of {len(payload.parts['codes'])} devices may not fit into the {self._width} bits of "
                f"max_devices={self.max_devices}: raise it."
            )
        return super().decode_sum(payload)

    @override
    def roundtrip(self, x: Tensor, key: Key) -> Message:
        return Message(
            values=self._dequantize(self._quantize(x, key), x.dtype),
            bits_wire=8 * x.shape[0] * packed_bytes(x.shape[1], self._width),
            bits_ideal=self._bits_ideal(x),
        )

    @override
    def privacy(
        self, *, numel: int, rounds: int = 1, delta: float = 1e-5, sample_rate: float = 1.0
    ) -> PrivacyStatement:
        """What the messages of one device guarantee to it, for replacing its updates by any others.

        Each entry is a release of its own, so epsilon grows with ``numel``; with ``numel=1`` it is that of a single
        coordinate, and then says nothing of the update as a whole.

        Args:
            numel: Entries of each update; 1 for the guarantee of one coordinate.
            rounds: Updates that the device sends.
            delta: Of the whole run, in [0, 1); 0 gives the pure epsilon.
            sample_rate: Counted as 1, since the mechanism does not hide whether a device takes part.

        Returns:
            The guarantee.

        Raises:
            ValueError: If an argument is out of range.
        """
        from groundwire.plugins.privacy.rqm import rqm_epsilon
        from groundwire.plugins.privacy.statement import PrivacyStatement

        check_releases(numel, rounds, sample_rate)
        epsilon = rqm_epsilon(
            delta=delta,
            releases=numel * rounds,
            clip=self.clip,
            margin=self.margin,
            num_levels=self.num_levels,
            keep_probability=self.keep_probability,
            num_shares=self.num_shares,
        )
        if self.num_shares == 1:
            who = ["Nobody else is trusted: the guarantee is of what the device sends."]
        else:
            secure = f"Secure aggregation shows nothing but sums over at least {self.num_shares} honest devices"
            who = [
                f"{secure}, this one counted.",
                "Which values of the others protect least was found numerically, not proved.",
            ]
        if sample_rate < 1:
            who.append("The sampling of devices is counted as 1, since whether a device takes part is not hidden.")
        return PrivacyStatement(
            mechanism="Randomized Quantization",
            unit="one coordinate of a device's updates" if numel == 1 else "one device's updates",
            adjacency="replace-one",
            epsilon=epsilon,
            delta=delta,
            assumptions=(
                *who,
                f"The device sends {rounds} update(s) of {numel} entries, each entry a release of its own.",
                "Its random stream is secret (in a simulation, the seed of the run).",
            ),
        )

    @override
    def extra_repr(self) -> str:
        return (
            f"clip={self.clip}, num_levels={self.num_levels}, margin={self.margin}, "
            f"keep_probability={self.keep_probability}, num_shares={self.num_shares}, max_devices={self.max_devices}"
        )
