"""The distributed discrete Gaussian mechanism: integers with integer noise, for secure aggregation."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.compression.base import Compressor, Message, Payload, check_releases, check_rows
from groundwire.plugins.compression.functional import hadamard_transform, next_power_of_two
from groundwire.plugins.compression.packing import pack_integers, packed_bytes, unpack_integers
from groundwire.plugins.random import Key

if TYPE_CHECKING:  # at run time in the methods: it brings Opacus along
    from groundwire.plugins.privacy.statement import PrivacyStatement

_ATTEMPTS = 100
"""Roundings tried; each is too long with probability ``beta`` at most."""


def round_within(x: Tensor, largest_norm: float, generator: torch.Generator) -> Tensor:
    """Round a vector stochastically to integers, again and again until its norm is small enough.

    Without the condition each entry would be unbiased; with it, the norm is bounded for sure. What no attempt rounds
    so is rounded towards zero.

    Args:
        x: Values in steps of the grid, float64, shape ``(n,)``.
        largest_norm: L2 norm of the result, at most; at least that of ``x`` truncated.
        generator: Where the draws come from.

    Returns:
        Integers, int64, shape ``(n,)``.

    Reference:
        Kairouz, Liu, Steinke, ICML 2021, Algorithm 1. arXiv:2102.06387

    Example:
        >>> round_within(torch.full((4,), 0.5, dtype=torch.float64), 1.0, torch.Generator().manual_seed(0)).sum() <= 1
        tensor(True)
    """
    for _ in range(_ATTEMPTS):
        uniform = torch.rand(x.shape, generator=generator, dtype=torch.float64, device=x.device)
        rounded = uniform.add_(x).floor_()
        if rounded.square().sum() <= largest_norm**2:  # integers: exact
            return rounded.to(torch.int64)
    return x.trunc().to(torch.int64)


class DistributedDiscreteGaussian(Compressor):
    """Clips, rotates and rounds rows to integers, to which each device adds its share of discrete Gaussian noise.

    A row is clipped to norm ``clip_norm``, multiplied by a random Hadamard rotation that all devices of the round
    share (padded to a power of two), divided by ``granularity``, rounded stochastically, and noised; each integer
    travels modulo ``2^bits``. Secure aggregation adds rows modulo ``2^bits``: :meth:`decode_sum` does so too. A row
    alone decodes in the same way, and equals its part of the sum as long as nothing wraps around: the sum's integers
    must stay within ``[-2^(bits-1), 2^(bits-1))``.

    The rounding is repeated until the norm is within
    :func:`~groundwire.plugins.privacy.discrete_gaussian.rounded_norm_bound`, so the sensitivity holds with certainty
    and in exact arithmetic, whatever the floating point before it did. Clipping, and the repetition slightly, bias the
    result. A row that is not finite counts as zeros, since a mark for it would not be private.

    Args:
        clip_norm: Largest L2 norm of a row, positive.
        noise_multiplier: Noise of the sum of ``num_shares`` devices, in units of ``clip_norm``; each adds
            ``noise_multiplier * clip_norm / sqrt(num_shares)``. 0 sends without noise and without a guarantee.
        granularity: Step of the grid, in units of the rows, positive.
        bits: Bits an integer on the wire, 2 to 32.
        num_shares: Honest devices whose noise is in each sum, at least 1.
        rotate: Whether to rotate, so that no entry of the sum is much larger than the others.
        beta: Probability with which a rounding may be repeated, in [0, 1); 0 accounts for the worst rounding instead.

    Raises:
        ValueError: If an argument is out of range, or a share of noise is below half a step of the grid.

    Reference:
        Kairouz, Liu, Steinke, "The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure
        Aggregation", ICML 2021. arXiv:2102.06387

    Example:
        >>> compressor = DistributedDiscreteGaussian(clip_norm=10.0, noise_multiplier=0.0, granularity=0.5, rotate=False)
        >>> compressor.roundtrip(torch.tensor([[1.5, -2.0, 0.0]]), Key(seed=0)).values
        tensor([[ 1.5000, -2.0000,  0.0000]])
    """

    carries_nan = False

    def __init__(
        self,
        clip_norm: float,
        noise_multiplier: float,
        granularity: float,
        bits: int = 16,
        num_shares: int = 1,
        rotate: bool = True,
        beta: float = math.exp(-0.5),
    ) -> None:
        super().__init__()
        if not 0 < clip_norm < math.inf:
            raise ValueError(f"`clip_norm` must be positive and finite, got {clip_norm}.")
        if not 0 <= noise_multiplier < math.inf:
            raise ValueError(f"`noise_multiplier` must be at least 0 and finite, got {noise_multiplier}.")
        if not 0 < granularity < math.inf:
            raise ValueError(f"`granularity` must be positive and finite, got {granularity}.")
        if not 2 <= bits <= 32:
            raise ValueError(f"`bits` must be in [2, 32], got {bits}.")
        if num_shares < 1:
            raise ValueError(f"`num_shares` must be at least 1, got {num_shares}.")
        if not 0 <= beta < 1:
            raise ValueError(f"`beta` must be in [0, 1), got {beta}.")
        self.clip_norm = clip_norm
        self.noise_multiplier = noise_multiplier
        self.granularity = granularity
        self.bits = bits
        self.num_shares = num_shares
        self.rotate = rotate
        self.beta = beta
        if num_shares > 1 and 0 < self.sigma < 0.5:
            raise ValueError(
                f"A share of noise is {self.sigma:.3g} steps of the grid, and sums of several are only accounted for "
                "from 0.5 on: take a smaller `granularity` or more noise."
            )

    @property
    def sigma(self) -> float:
        """Noise of one device, in steps of the grid."""
        return self.noise_multiplier * self.clip_norm / self.granularity / math.sqrt(self.num_shares)

    def _padded(self, numel: int) -> int:
        return next_power_of_two(numel) if self.rotate else numel

    def sensitivity(self, numel: int) -> float:
        """Largest L2 norm of what a device adds to the sum before noise, in steps of the grid, for rows of ``numel``."""
        from groundwire.plugins.privacy.discrete_gaussian import rounded_norm_bound

        return rounded_norm_bound(self.clip_norm / self.granularity, self._padded(numel), self.beta)

    def _signs(self, numel: int, key: Key, device: torch.device) -> Tensor | None:
        if not self.rotate:
            return None
        bits = torch.randint(2, (self._padded(numel),), generator=key.shared("ddg/rotation"))
        return (2.0 * bits.double() - 1).to(device)

    def _quantize(self, x: Tensor, key: Key) -> tuple[Tensor, Tensor | None]:
        """Noisy integers modulo ``2^bits``, shape ``(rows, d')``, and the signs of the rotation."""
        from groundwire.plugins.privacy.discrete_gaussian import sample_discrete_gaussian

        check_rows(x, key)
        row = x.detach().double()
        row = row.masked_fill(~row.isfinite().all(dim=1, keepdim=True), 0.0)
        norm = torch.linalg.vector_norm(row, dim=1, keepdim=True)
        row = row * (self.clip_norm / norm.clamp(min=self.clip_norm))
        signs = self._signs(x.shape[1], key, x.device)
        if signs is not None:
            row = hadamard_transform(torch.nn.functional.pad(row, (0, len(signs) - x.shape[1])) * signs)
        row = row / self.granularity
        limit, count = self.sensitivity(x.shape[1]), row.shape[1]
        rounded = torch.cat(
            [
                key.row(i).rows("ddg/rounding", functools.partial(round_within, row[i], limit), on=x.device)
                for i in range(len(row))
            ]
        )
        if self.sigma > 0:
            rounded = rounded + key.rows(
                "ddg/noise", lambda g: sample_discrete_gaussian(count, self.sigma, g), on=x.device
            )
        return rounded.remainder(2**self.bits), signs

    def _dequantize(self, codes: Tensor, signs: Tensor | None, numel: int, dtype: torch.dtype) -> Tensor:
        """Rows of integers modulo ``2^bits``."""
        half = 2 ** (self.bits - 1)
        centred: Tensor = (codes + half).remainder(2 * half) - half
        row = centred.double() * self.granularity
        if signs is not None:
            row = (hadamard_transform(row) * signs)[:, :numel]
        return row.to(dtype)

    def _unpack(self, payload: Payload) -> tuple[Tensor, Tensor | None]:
        signs = payload.meta["signs"]
        assert signs is None or isinstance(signs, Tensor)
        return unpack_integers(payload.parts["codes"], self.bits, self._padded(payload.numel)), signs

    @override
    def encode(self, x: Tensor, key: Key) -> Payload:
        codes, signs = self._quantize(x, key)
        return Payload(
            parts={"codes": pack_integers(codes, self.bits)},
            numel=x.shape[1],
            dtype=x.dtype,
            bits_ideal=codes.numel() * self.bits,  # masked integers are uniform: no code is shorter
            meta={"signs": signs},
        )

    @override
    def decode(self, payload: Payload) -> Tensor:
        codes, signs = self._unpack(payload)
        return self._dequantize(codes, signs, payload.numel, payload.dtype)

    @override
    def decode_sum(self, payload: Payload) -> Tensor:
        """Add the integers of all rows modulo ``2^bits``, as secure aggregation does, and decode their sum.

        Args:
            payload: Messages of the devices of one round.

        Returns:
            The sum of the rows, shape ``(1, d)``.
        """
        codes, signs = self._unpack(payload)
        return self._dequantize(codes.sum(0, keepdim=True), signs, payload.numel, payload.dtype)

    @override
    def roundtrip(self, x: Tensor, key: Key) -> Message:
        codes, signs = self._quantize(x, key)
        return Message(
            values=self._dequantize(codes, signs, x.shape[1], x.dtype),
            bits_wire=8 * len(x) * packed_bytes(codes.shape[1], self.bits),
            bits_ideal=codes.numel() * self.bits,
        )

    @override
    def privacy(
        self, *, numel: int, rounds: int = 1, delta: float = 1e-5, sample_rate: float = 1.0
    ) -> PrivacyStatement | None:
        """What the sums guarantee to one device, for its updates or zeros in their place.

        Args:
            numel: Entries of each update.
            rounds: Updates that the device sends.
            delta: Of the whole run, in (0, 1).
            sample_rate: Counted as 1, since secure aggregation shows the server who takes part.

        Returns:
            The guarantee, or None without noise.

        Raises:
            ValueError: If an argument is out of range.
        """
        from groundwire.plugins.privacy.discrete_gaussian import discrete_gaussian_epsilon
        from groundwire.plugins.privacy.statement import PrivacyStatement

        check_releases(numel, rounds, sample_rate)
        if self.noise_multiplier == 0:
            return None
        padded = self._padded(numel)
        epsilon = discrete_gaussian_epsilon(
            delta=delta,
            sensitivity=self.sensitivity(numel),
            sigma=self.sigma,
            numel=padded,
            num_shares=self.num_shares,
            rounds=rounds,
        )
        if self.num_shares == 1:
            who = ["Nobody else is trusted: the guarantee is of what the device sends."]
        else:
            secure = f"Secure aggregation shows nothing but sums with at least {self.num_shares} honest shares of noise"
            who = [f"{secure}, which stay in when the device's update is taken out; fewer void the guarantee."]
        if sample_rate < 1:
            who.append("The sampling of devices is counted as 1, since the server sees who takes part.")
        return PrivacyStatement(
            mechanism="distributed discrete Gaussian",
            unit="one device's updates",
            adjacency="zero-out",
            epsilon=epsilon,
            delta=delta,
            assumptions=(
                *who,
                f"The device sends {rounds} update(s) of {numel} entries, or zeros in their place.",
                f"Rounded updates have norm {self.sensitivity(numel):.6g} steps of the grid at most, by repeated rounding.",
                "How often a device rounds stays on the device.",
                "Its random stream is secret (in a simulation, the seed of the run).",
            ),
        )

    @override
    def extra_repr(self) -> str:
        return (
            f"clip_norm={self.clip_norm}, noise_multiplier={self.noise_multiplier}, granularity={self.granularity}, "
            f"bits={self.bits}, num_shares={self.num_shares}, rotate={self.rotate}, beta={self.beta}"
        )
