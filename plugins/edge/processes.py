"""Several processes that run one program: what only some of them do is handed to all, and the rest is done by each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.distributed import (
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
)
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

_T = TypeVar("_T")


class ReplicatedStrategy(SingleDeviceStrategy):
    """A strategy for one process, which may run in several that hold the same model and see the same batches.

    To the module, the callbacks, the datamodule and their metrics each process looks like the only one:
    ``trainer.world_size`` is 1, ``trainer.global_rank`` 0, ``strategy.reduce`` gives back what it gets, and loaders are
    not split. What is written (logs, checkpoints) is written by the first one, ``trainer.is_global_zero``. A subclass
    spreads work over :attr:`num_ranks` processes and joins the results.

    Args:
        device: Where to run, in one process; None for what the Trainer's ``accelerator`` and ``devices`` give.
        accelerator: Filled in by the Trainer.
        checkpoint_io: Filled in by the Trainer.
        precision_plugin: Filled in by the Trainer.
    """

    def __init__(
        self,
        device: torch.device | str | None = None,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(device or "cpu", accelerator, checkpoint_io, precision_plugin)
        self.cluster_environment: ClusterEnvironment | None = None
        self.num_nodes = 1
        self._given = [self._root_device] if device is not None else []
        self._devices = list(self._given)
        self._silenced: list[tuple[Metric, bool]] = []

    # ---------------------------------------------------------------- who is there

    @property
    def parallel_devices(self) -> list[torch.device]:
        """The torch device that was given to the strategy; set by the Trainer to those of this node's processes."""
        return self._given

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device | str | int]) -> None:
        self._devices = [torch.device(device) for device in devices]
        if len(devices) == 1:
            self._root_device = self._devices[0]

    @property
    def num_processes(self) -> int:
        """Processes on this node."""
        return max(1, len(self._devices))

    @property
    def num_ranks(self) -> int:
        """Processes on all nodes."""
        return self.num_nodes * self.num_processes

    @property
    def rank(self) -> int:
        """Which of them this one is."""
        return self.cluster_environment.global_rank() if self.num_ranks > 1 and self.cluster_environment else 0

    @property
    @override
    def is_global_zero(self) -> bool:
        return self.rank == 0

    @property
    def node_rank(self) -> int:
        """Which node this process runs on."""
        return self.cluster_environment.node_rank() if self.num_ranks > 1 and self.cluster_environment else 0

    def set_world_ranks(self) -> None:
        """Tell the environment and everything that writes which process this is."""
        if self.num_ranks == 1:
            return
        assert self.cluster_environment is not None
        self.local_rank = self.cluster_environment.local_rank()
        self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
        self.cluster_environment.set_world_size(self.num_ranks)
        self._root_device = self._devices[self.local_rank]
        rank_zero_only.rank = self.rank  # type: ignore[attr-defined]

    @override
    def _configure_launcher(self) -> None:
        if self.num_ranks > 1:
            assert self.cluster_environment is not None
            self._launcher = _SubprocessScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        if self.num_ranks > 1:
            assert self.cluster_environment is not None
            self.set_world_ranks()
            backend = _get_default_process_group_backend_for_device(self.root_device)
            on = None if self.root_device.type == "cpu" else self.root_device
            _init_dist_connection(self.cluster_environment, backend, device_id=on)

    # ---------------------------------------------------------------- one program

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        super().setup(trainer)
        if self.num_ranks == 1:
            return
        assert self.lightning_module is not None
        for tensor in (*self.lightning_module.parameters(), *self.lightning_module.buffers()):
            self._share(tensor.data)
        torch.set_rng_state(self.broadcast(torch.get_rng_state()))  # of which loaders shuffle
        self._silenced = [(metric, metric.sync_on_compute) for metric in _metrics(trainer, self.lightning_module)]
        for metric, _ in self._silenced:  # every process has seen everything
            metric.sync_on_compute = metric._to_sync = False

    def _share(self, tensor: Tensor) -> None:
        """Write the first process's values into that of every other."""
        whole = tensor.contiguous()
        dist.broadcast(whole, src=0)
        if whole is not tensor:
            tensor.copy_(whole)

    @override
    def teardown(self) -> None:
        for metric, synced in self._silenced:
            metric.sync_on_compute = metric._to_sync = synced
        self._silenced = []
        if self.num_ranks > 1 and self.cluster_environment is not None:
            self.cluster_environment.teardown()
        super().teardown()

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if self._is_joined:
            on = [self.root_device.index] if self.root_device.type == "cuda" else None
            dist.barrier(device_ids=on)

    @override
    def broadcast(self, obj: _T, src: int = 0) -> _T:
        if not self._is_joined:
            return obj
        holder = [obj]
        dist.broadcast_object_list(holder, src)
        return holder[0]

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Every process knows the same, but for a clock or a signal: then all, or any, decide for each."""
        if not self._is_joined:
            return decision
        votes = torch.tensor(int(decision), device=self.root_device)
        dist.all_reduce(votes, dist.ReduceOp.MIN if all else dist.ReduceOp.MAX)
        return bool(votes)

    @property
    def _is_joined(self) -> bool:
        return self.num_ranks > 1 and dist.is_initialized()


def _metrics(trainer: pl.Trainer, module: nn.Module) -> Iterator[Metric]:
    """All torchmetrics objects of the module and the callbacks."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    held = (value for callback in callbacks for value in vars(callback).values() if isinstance(value, nn.Module))
    for owner in (module, *held):
        yield from (sub for sub in owner.modules() if isinstance(sub, Metric))
