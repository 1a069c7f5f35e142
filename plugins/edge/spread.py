"""A round's devices, spread over processes: each works for a block of them, and all get what every block computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from groundwire.plugins.edge.batch import DeviceBatch
from groundwire.plugins.edge.buffers import DeviceBuffers
from groundwire.plugins.edge.round import Round
from groundwire.plugins.edge.updates import DeviceUpdates, DeviceWorker, join_extras


@dataclass(eq=False)
class _Block:
    """What a rank has to say of its devices; their rows travel beside."""

    num_rows: int
    batch: tuple[str, ...]  # sums of some of it, to compare; as text, in which NaN equals NaN
    error: str | None = None
    updates: DeviceUpdates | None = None  # without rows and buffers
    buffers: list[list[Tensor]] | None = None  # which its devices left
    fell_back: bool = False
    metrics: dict[str, Any] = field(
        default_factory=dict
    )  # torchmetrics objects that saw its devices: their last values


class DeviceSpread:
    """A :class:`DeviceWorker` on every rank of the default process group, each for a block of the round's devices.

    All ranks get what one worker would have computed: bit for bit if the devices work one after the other, else up to
    the rounding of batched products. Each rank holds the rows of all devices in the end.

    Args:
        worker: This rank's.
        rank: This process.
        num_ranks: Of all.
    """

    def __init__(self, worker: DeviceWorker, rank: int, num_ranks: int) -> None:
        self.worker = worker
        self.rank = rank
        self.num_ranks = num_ranks
        self._module = worker.pl_module
        self._rows: Tensor | None = None

    @property
    def fell_back(self) -> bool:
        """Whether devices work one after the other because they cannot at once."""
        return self.worker.fell_back

    @fell_back.setter
    def fell_back(self, fell_back: bool) -> None:
        self.worker.fell_back = fell_back

    def __call__(self, batch: DeviceBatch, args: Sequence[Any], received: Tensor | None, round: Round) -> DeviceUpdates:
        """Run the round's local work, as :class:`DeviceWorker` does.

        Args:
            batch: Data of the ``M`` devices that take part, the same on every rank.
            args: The further arguments of ``training_step``.
            received: The model that the devices hold, ``(d,)`` or ``(M, d)``; None for the module's own parameters.
            round: The round.

        Returns:
            The updates of all ``M`` devices, and what their steps returned and logged.

        Raises:
            RuntimeError: If the ranks see different batches, or another rank failed.
        """
        longest = -(-len(batch) // self.num_ranks)
        start, stop = (min(rank * longest, len(batch)) for rank in (self.rank, self.rank + 1))
        rows = list(range(start, stop))
        own = _Block(len(rows), tuple(_sum(leaf[row]) for leaf in batch.leaves() for row in (0, -1)))
        at_once = self.worker.wants_vectorized(batch)  # of the whole: its parts may look different
        counts = {path: metric.update_count for path, metric in self._metrics()}
        found: DeviceUpdates | None = None
        try:
            if rows:
                held = received[start:stop] if received is not None and received.ndim == 2 else received
                found = self.worker(batch.select(torch.tensor(rows)), args, held, round.select(rows), at_once=at_once)
        except Exception as error:
            own.error = f"{type(error).__name__}: {error}"
            self._exchange(own)
            raise
        if found is not None:
            own.updates = _on(torch.device("cpu"), replace(found, rows=torch.empty(0), buffers=None))
            own.buffers = None if found.buffers is None else apply_to_collection(found.buffers.left, Tensor, Tensor.cpu)
            own.metrics = {
                path: apply_to_collection(metric._forward_cache, Tensor, lambda value: value.cpu())
                for path, metric in self._metrics()
                if metric.update_count != counts[path]
            }
        own.fell_back = self.fell_back
        blocks = self._exchange(own)
        self.fell_back = any(block.fell_back for block in blocks)
        for block in blocks:
            self._add_up_over_ranks(block.metrics)
        joined = _joined([block for block in blocks if block.updates is not None])
        return replace(
            _on(self._module.device, joined),
            rows=self._all_rows(found, longest)[: len(batch)],
            buffers=self._all_buffers(blocks),
        )

    def _exchange(self, own: _Block) -> list[_Block]:
        blocks: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(blocks, own)
        for rank, block in enumerate(blocks):
            if block.error is not None and own.error is None:
                raise RuntimeError(f"Rank {rank} of {self.num_ranks} failed: {block.error}")
            if block.batch != own.batch:
                raise RuntimeError(
                    f"Ranks {self.rank} and {rank} see different batches, but each works for some devices of the same "
                    "batch. Call seed_everything(...) first, and do not split or shuffle the train loader by rank."
                )
        return blocks

    def _all_rows(self, found: DeviceUpdates | None, longest: int) -> Tensor:
        layout, length = self.worker.layout, self.num_ranks * longest
        if self._rows is None or len(self._rows) < length:
            self._rows = torch.zeros((length, layout.numel), dtype=layout.dtype, device=self._module.device)
        if found is not None:
            self._rows[self.rank * longest :][: len(found.rows)] = found.rows
        for rank, block in enumerate(self._rows[:length].view(torch.uint8).chunk(self.num_ranks)):  # of any dtype
            dist.broadcast(block, src=rank)  # in place; gloo's all_gather copies everything twice
        return self._rows

    def _all_buffers(self, blocks: list[_Block]) -> DeviceBuffers | None:
        if all(block.buffers is None for block in blocks):
            return None
        buffers = DeviceBuffers(self._module)
        for block in blocks:
            for m in range(block.num_rows):
                buffers.add(None if block.buffers is None else block.buffers[m])
        return buffers

    def _metrics(self) -> list[tuple[str, Metric]]:
        return [(path, sub) for path, sub in self._module.named_modules() if isinstance(sub, Metric)]

    def _add_up_over_ranks(self, metrics: dict[str, Any]) -> None:
        """Let metrics of the training step, which have seen this rank's devices only, join when they are computed.

        What they logged in the step is the value of the last device, on whatever rank that is.
        """
        for path, last in metrics.items():
            metric = self._module.get_submodule(path)
            metric._forward_cache = apply_to_collection(last, Tensor, lambda value: value.to(self._module.device))
            parent = self._module.get_submodule(path.rpartition(".")[0])
            for sub in (parent if isinstance(parent, MetricCollection) else metric).modules():
                if isinstance(sub, Metric):
                    sub.sync_on_compute = sub._to_sync = True


def _sum(block: Tensor) -> str:
    return float(block.sum(dtype=torch.float64)).hex()


def _joined(blocks: list[_Block]) -> DeviceUpdates:
    parts = [(block.num_rows, block.updates) for block in blocks if block.updates is not None]
    logged: dict[str, list[Tensor]] = {}
    logged_rows: dict[str, list[Tensor]] = {}
    start = 0
    for length, part in parts:
        for name, values in part.logged.items():
            logged.setdefault(name, []).append(values)
            logged_rows.setdefault(name, []).append(part.logged_rows[name] + start)
        start += length
    every = [part for _, part in parts]
    return DeviceUpdates(
        rows=torch.empty(0),
        losses=torch.cat([part.losses for part in every]),
        first_losses=torch.cat([part.first_losses for part in every]),
        logged={name: torch.cat(values) for name, values in logged.items()},
        logged_rows={name: torch.cat(values) for name, values in logged_rows.items()},
        log_options={name: options for part in every for name, options in part.log_options.items()},
        metrics={name: path for part in every for name, path in part.metrics.items()},
        extras=join_extras([(length, part.extras) for length, part in parts]),
        unused=frozenset.intersection(*(part.unused for part in every)),
    )


def _on(device: torch.device, updates: DeviceUpdates) -> DeviceUpdates:
    """What travels beside the rows, on one device."""
    fields = {name: getattr(updates, name) for name in ("losses", "first_losses", "logged", "extras")}
    return replace(updates, **apply_to_collection(fields, Tensor, lambda tensor: tensor.detach().to(device)))
