"""Collectives that count what is handed to them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13


class CountedGroup:
    """The default process group, with the bytes that all ranks together hand to its collectives.

    An all-reduce and an all-gather take a tensor of the same size from every rank, a broadcast one from its source. How
    often a byte then passes a wire is the backend's affair.
    """

    def __init__(self) -> None:
        self.size = dist.get_world_size()
        self.rank = dist.get_rank()
        self._bytes = 0

    def all_reduce(self, tensor: Tensor) -> torch.futures.Future[Tensor]:
        """Add up ``tensor`` over the ranks, in place.

        Args:
            tensor: Of one shape and dtype on all ranks.

        Returns:
            A future of it.
        """
        self._count(tensor, self.size)
        work = dist.all_reduce(tensor, async_op=True)
        assert work is not None
        return work.get_future().then(lambda _: tensor)  # type: ignore[no-any-return]

    def all_gather(self, tensor: Tensor) -> torch.futures.Future[Tensor]:
        """Bring the ranks' vectors together.

        Args:
            tensor: Of one length and dtype on all ranks.

        Returns:
            A future of the matrix, shape ``(ranks, n)``.
        """
        self._count(tensor, self.size)
        gathered = torch.empty(self.size * tensor.numel(), dtype=tensor.dtype, device=tensor.device)
        work = _all_gather(gathered, tensor.contiguous(), async_op=True)
        return work.get_future().then(lambda _: gathered.view(self.size, -1))  # type: ignore[no-any-return]

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Give rank 0's tensor to all, in place."""
        self._count(tensor, 1)
        dist.broadcast(tensor, src=0)
        return tensor

    def take_bytes(self) -> int:
        """Bytes since the last call, all ranks together."""
        taken, self._bytes = self._bytes, 0
        return taken

    def _count(self, tensor: Tensor, ranks: int) -> None:
        self._bytes += ranks * tensor.numel() * tensor.element_size()
