"""What rate-adaptive sparsifying compressors share."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Self

from torch import Tensor
from typing_extensions import override

from groundwire.plugins.compression.base import RateAdaptive
from groundwire.plugins.compression.budget import largest_within
from groundwire.plugins.compression.functional import topk_indices


class EntryLimited(RateAdaptive):
    """A compressor whose resolution is the number of entries it sends, at most half of them.

    Args:
        num_entries: Entries sent; None means all, or that a budget will say.

    Raises:
        ValueError: If it is below 1.
    """

    def __init__(self, num_entries: int | None = None) -> None:
        super().__init__()
        if num_entries is not None and num_entries < 1:
            raise ValueError(f"`num_entries` must be at least 1, got {num_entries}.")
        self.num_entries = num_entries

    @abstractmethod
    def entry_bits(self, numel: int, num_entries: int) -> float:
        """Bits of a row of ``numel`` entries of which ``num_entries`` are sent, as the paper counts them."""

    @override
    def message_bits(self, numel: int) -> float:
        return self.entry_bits(numel, self._entries(numel))

    @override
    def for_budget(self, numel: int, bits: float) -> Self | None:
        q = largest_within(lambda n: self.entry_bits(numel, n), bits, max(numel // 2, 1))
        if q == 0:
            return None
        fitted = copy.copy(self)
        fitted.num_entries = q
        return fitted

    def _entries(self, numel: int) -> int:
        return min(numel if self.num_entries is None else self.num_entries, numel)

    def _choose(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The entries of largest magnitude, ``(rows, q)``, and their positions, ascending; None if all are sent."""
        q = self._entries(x.shape[1])
        if q == x.shape[1]:
            return x, None
        indices = topk_indices(x, q)
        return x.gather(1, indices), indices

    @staticmethod
    def _place(values: Tensor, indices: Tensor | None, numel: int) -> Tensor:
        """Rows of ``numel`` entries with ``values`` where :meth:`_choose` took them, else zero."""
        if indices is None:
            return values
        return values.new_zeros(values.shape[0], numel).scatter_(1, indices, values)

    @override
    def extra_repr(self) -> str:
        return f"num_entries={self.num_entries}"
