"""The contract of every compressor: rows in, a payload that could go on a wire out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from groundwire.plugins.random import Key

if TYPE_CHECKING:  # at run time it would bring Opacus along for compressors that promise nothing
    from groundwire.plugins.privacy.statement import PrivacyStatement


_DECODED = 2**21
"""Entries that are decoded at once where only their sum is wanted."""


@dataclass(frozen=True, kw_only=True)
class Payload:
    """One encoded message per row, as tensors that could go on a wire as they are.

    Args:
        parts: What travels, by name; each tensor has the rows as its first dimension.
        numel: Entries ``d`` of each decoded row.
        dtype: Dtype of the rows before encoding, and so of the decoded ones; their device is that of the parts.
        bits_ideal: Bits of the same messages, all rows together, under an ideal code; for reports only.
        meta: What sender and receiver know beforehand (settings, shared seeds); it does not travel and costs nothing.
        padding_bytes: Bytes of ``parts`` that only make messages of different lengths a tensor. A device that sends its
            row alone does not send them.
    """

    parts: dict[str, Tensor]
    numel: int
    dtype: torch.dtype
    bits_ideal: float
    meta: dict[str, object] = field(default_factory=dict)
    padding_bytes: int = 0

    @property
    def bits_wire(self) -> int:
        """Bits that travel, all rows together, the padding of bytes included: counted from the tensors themselves."""
        return 8 * (sum(part.numel() * part.element_size() for part in self.parts.values()) - self.padding_bytes)

    @property
    def num_rows(self) -> int:
        """How many messages there are."""
        return len(next(iter(self.parts.values())))

    def rows(self, which: slice) -> Payload:
        """Some of the messages, without what they cost."""
        parts = {name: part[which] for name, part in self.parts.items()}
        return replace(self, parts=parts, bits_ideal=0.0, padding_bytes=0)


@dataclass(frozen=True, kw_only=True)
class Message:
    """What the receiver holds after a compressed transmission, and what it cost.

    Args:
        values: Decoded rows, shape ``(rows, d)``, dtype and device of the input.
        bits_wire: Bits that travelled, all rows together, padding included.
        bits_ideal: The same under an ideal code.
    """

    values: Tensor
    bits_wire: int
    bits_ideal: float


class Compressor(nn.Module, ABC):
    """Maps rows ``(rows, d)`` to payloads and back; encoding a matrix equals encoding its rows one by one.

    Subclasses set the class attributes and write :meth:`encode` and :meth:`decode`. One that can send the decoded
    rows without building the payload also overrides :meth:`roundtrip`; a test holds the two equal.
    """

    unbiased: bool = False
    """Whether the expectation of the decoded row is the row."""
    linear: bool = False
    """Whether payloads add: the decoded sum of payloads is the sum of the decoded rows (so all-reduce serves)."""
    carries_nan: bool = True
    """Whether a row that is not finite arrives as one that is not finite."""
    negotiates: bool = False
    """Whether devices have to add something up before they can encode: see :meth:`propose`."""
    ragged: bool = False
    """Whether the size of a message depends on what it says, and not on ``d`` alone."""
    num_shares: int = 1
    """Honest devices that a guarantee counts on in every sum; above 1, secure aggregation shows nothing but sums."""

    @property
    def promises_privacy(self) -> bool:
        """Whether :meth:`privacy` states a guarantee."""
        return type(self).privacy is not Compressor.privacy

    def setup(self, shapes: Mapping[str, torch.Size]) -> None:  # a hook: most need nothing
        """Learn what will be compressed: the shape of each named tensor whose flattened rows will come.

        Args:
            shapes: By name, as ``key.name`` will say it.

        Raises:
            ValueError: If the settings do not fit them.
        """

    def is_worthwhile(self, shape: torch.Size) -> bool:
        """Whether a tensor of that shape costs less compressed than as it is."""
        return True

    def reset_state(self) -> None:  # a hook: most remember nothing
        """Forget what was learnt from earlier rounds."""

    @abstractmethod
    def encode(self, x: Tensor, key: Key) -> Payload:
        """Encode rows ``(rows, d)``; ``key`` names the devices and the round of random draws, and what ``x`` is."""

    @abstractmethod
    def decode(self, payload: Payload) -> Tensor:
        """Decode to rows ``(rows, d)`` of the dtype and device that were encoded."""

    def decode_sum(self, payload: Payload) -> Tensor:
        """The sum of all rows, shape ``(1, d)``, float32 at least, as secure aggregation gives it."""
        wide = torch.promote_types(payload.dtype, torch.float32)
        count = max(1, _DECODED // max(payload.numel, 1))  # large rows one by one: their matrix would not fit a cache
        total = self.decode(payload.rows(slice(count))).sum(0, keepdim=True, dtype=wide)
        for start in range(count, payload.num_rows, count):
            rows = self.decode(payload.rows(slice(start, start + count)))
            total += rows if len(rows) == 1 else rows.sum(0, keepdim=True, dtype=wide)
        return total

    def subtract_(self, rows: Tensor, payload: Payload) -> Tensor:
        """Take what was encoded off ``rows``, in place: ``rows -= decode(payload)``; returns them."""
        return rows.sub_(self.decode(payload))

    def propose(self, x: Tensor, key: Key) -> Tensor | None:
        """What all devices have to add up before they can encode, shape ``(rows, n)``; None unless it ``negotiates``.

        On a wire, :meth:`encode_agreed` then gets the sum over all devices. :meth:`encode` alone, as in a simulation,
        takes the rows that it is given for all devices.
        """
        return None

    def encode_agreed(self, x: Tensor, key: Key, agreed: Tensor) -> Payload:
        """Encode rows ``(rows, d)`` with what all devices have added up, the sum of their :meth:`propose`."""
        raise NotImplementedError(f"{type(self).__name__} proposes nothing.")

    def settle(self, total: Payload, key: Key, num_devices: int) -> None:  # a hook: most remember nothing
        """Learn from the sum of all devices' payloads, a payload of one row, at the end of a round."""

    def decides(self, round: int) -> bool:
        """Whether device 0 chooses settings for all devices before ``round``."""
        return False

    def decide(self) -> Tensor:
        """What device 0 chooses, small integers of a fixed shape, from what it has seen in :meth:`encode`."""
        raise NotImplementedError(f"{type(self).__name__} has nothing to decide.")

    def adopt(self, decision: Tensor) -> None:
        """Go on with what device 0 chose."""
        raise NotImplementedError(f"{type(self).__name__} has nothing to decide.")

    def roundtrip(self, x: Tensor, key: Key) -> Message:
        """Encode and decode rows ``(rows, d)``, and say what the transmission cost."""
        payload = self.encode(x, key)
        return Message(values=self.decode(payload), bits_wire=payload.bits_wire, bits_ideal=payload.bits_ideal)

    def price(self, x: Tensor, key: Key) -> tuple[float, int]:
        """What it would lose of a row and what that would cost; changes nothing.

        Args:
            x: One row, shape ``(1, d)``.
            key: Of the row.

        Returns:
            ``|C(x) - x|_2`` and the bits of the message.
        """
        message = self.roundtrip(x, key)
        return float(torch.linalg.vector_norm(message.values - x, dtype=torch.float64)), message.bits_wire

    def omega(self, numel: int) -> float | None:
        """``w`` of the unbiased class, ``E|C(x) - x|^2 <= w |x|^2`` for rows of ``numel`` entries; None if unknown."""
        return None

    def alpha(self, numel: int) -> float | None:
        """``a`` of the contractive class, ``E|C(x) - x|^2 <= (1 - a) |x|^2``; None if unknown or not contractive."""
        return None

    def privacy(
        self, *, numel: int, rounds: int = 1, delta: float = 1e-5, sample_rate: float = 1.0
    ) -> PrivacyStatement | None:
        """What the messages of one device guarantee to it, with all that this depends on.

        Sending less is not privacy: a compressor promises nothing unless it was made to.

        Args:
            numel: Entries ``d`` of each row.
            rounds: Rounds in which the device sends a row.
            delta: Of the whole run.
            sample_rate: Probability with which a device takes part in a round (Poisson sampling), in (0, 1]. Where a
                mechanism gains nothing from it, it counts as 1, and the statement says so.

        Returns:
            The guarantee, or None where nothing is promised, as here.
        """
        return None


class RateAdaptive(Compressor):
    """A compressor that can choose its own resolution for a budget of bits."""

    @abstractmethod
    def message_bits(self, numel: int) -> float:
        """Ideal bits of one row of ``numel`` entries at the present resolution."""

    @abstractmethod
    def for_budget(self, numel: int, bits: float) -> Self | None:
        """This compressor at the largest resolution whose message fits into ``bits`` a row; None if none fits."""


def check_rows(x: Tensor, key: Key) -> None:
    """Refuse what no compressor takes.

    Args:
        x: Rows to encode.
        key: Names one device a row.

    Raises:
        TypeError: If ``x`` is not a real floating tensor.
        ValueError: If ``x`` is not a matrix, or has another number of rows than ``key`` has devices.
    """
    if not x.is_floating_point():
        raise TypeError(f"Expected rows of a real floating dtype, got {x.dtype}.")
    if x.ndim != 2:
        raise ValueError(f"Expected rows of shape (rows, d), got {tuple(x.shape)}.")
    if x.shape[0] != len(key):
        raise ValueError(f"Got {x.shape[0]} rows, but the key names {len(key)} devices.")


def check_releases(numel: int, rounds: int, sample_rate: float) -> None:
    """Refuse what no :meth:`Compressor.privacy` can account for.

    Args:
        numel: Entries of each row.
        rounds: Rounds in which a device sends one.
        sample_rate: Probability with which it takes part.

    Raises:
        ValueError: If one is out of range.
    """
    if numel < 1:
        raise ValueError(f"`numel` must be at least 1, got {numel}.")
    if rounds < 1:
        raise ValueError(f"`rounds` must be at least 1, got {rounds}.")
    if not 0 < sample_rate <= 1:
        raise ValueError(f"`sample_rate` is a probability in (0, 1], got {sample_rate}.")


def log2_binomial(n: int, k: int) -> float:
    """``log2 C(n, k)``, the bits that name ``k`` of ``n`` positions under an ideal code."""
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)
