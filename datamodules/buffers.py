"""Memory for large batches, used again once nobody holds the last one."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Below this the C library's allocator keeps freed memory; above, each batch would be mapped and zeroed page by page
# anew, which takes longer than the gather: seen 180 ms against 35 ms for 188 MB.
_LARGE = 16 * 2**20
_use_count: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)


class Buffers:
    """Two buffers in turn for ``index_select``; a batch that something still refers to is never written over.

    "Something" is anything that keeps the memory alive: a tensor, a view, a NumPy array, a graph for backward. Where
    torch does not tell, and for small results, each call gets memory of its own.

    Example:
        >>> Buffers().gather(torch.arange(4.0), torch.tensor([[3, 0], [1, 1]]))
        tensor([[3., 0.],
                [1., 1.]])
    """

    def __init__(self) -> None:
        self._free: list[tuple[Tensor, int]] = []

    def gather(self, source: Tensor, index: Tensor) -> Tensor:
        """``source[index]``, shape ``(*index.shape, *source.shape[1:])``."""
        shape = (*index.shape, *source.shape[1:])
        size = math.prod(shape)
        if size * source.element_size() < _LARGE or _use_count is None or source.device.type != "cpu":
            return source.index_select(0, index.flatten()).view(shape)
        rows = self._take(size, source.dtype)[:size].view(index.numel(), *source.shape[1:])
        return torch.index_select(source, 0, index.flatten(), out=rows).view(shape)

    def _take(self, size: int, dtype: torch.dtype) -> Tensor:
        for buffer, idle in self._free:
            if buffer.dtype == dtype and len(buffer) >= size and _holders(buffer) == idle:
                return buffer
        buffer = torch.empty(size, dtype=dtype)
        self._free = [*self._free[-1:], (buffer, _holders(buffer))]
        return buffer


def _holders(buffer: Tensor) -> int:
    assert _use_count is not None
    return _use_count(buffer.untyped_storage()._cdata)
