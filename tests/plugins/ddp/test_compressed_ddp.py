"""CompressedDDPStrategy: the same model as the simulation, exact bytes, resume, and refusals on all ranks at once."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from groundwire.plugins.compression import (
    DGC,
    EF21,
    EF21SGDM,
    EF21W,
    QSGD,
    RQM,
    EControl,
    ErrorFeedback,
    Identity,
    RandK,
    SignSGD,
    TopK,
)
from groundwire.plugins.ddp import CompressedDDPStrategy, group
from groundwire.plugins.edge import Digital, EdgeStrategy
from groundwire.plugins.errors import CheckpointMismatchError, NonFiniteUpdateError
from helpers.ddp import ddp_trainer, fit_ddp, over_ranks, run_ddp
from helpers.edge import Classifier, Killed, Stateful, fit, loader, mlp, weights

STEPS = 6


def ef(compressor: Any) -> ErrorFeedback:
    return ErrorFeedback(compressor)


PARTS: dict[str, Callable[[], Any]] = {
    "identity": Identity,
    "topk": lambda: TopK(density=0.2),
    "randk": lambda: RandK(density=0.3),
    "qsgd": lambda: QSGD(num_levels=4),
    "sign": lambda: SignSGD(scaled=True),
    "mute_sign": SignSGD,
    "ef_topk": lambda: ef(TopK(density=0.1)),
    "ef_randk": lambda: ef(RandK(density=0.2, unbiased=False)),
    "ef21": lambda: EF21(TopK(density=0.1)),
    "ef21_w": lambda: EF21W(TopK(density=0.1), smoothness=[1.0, 3.0]),
    "ef21_w_linear": lambda: EF21W(RandK(density=0.2, unbiased=False), smoothness=[1.0, 3.0]),
    "ef21_sgdm": lambda: EF21SGDM(TopK(density=0.1), eta=0.3),
    "econtrol": lambda: EControl(TopK(density=0.1), eta=0.1),
    "dgc": lambda: DGC(density=0.1, momentum=0.5, clip_norm=1.0, warmup_rounds=1, warmup_densities=[0.5]),
    "dgc_nesterov": lambda: DGC(density=0.1, momentum=0.5, nesterov=True),
}
every_part = pytest.mark.parametrize("name", PARTS)
every_granularity = pytest.mark.parametrize("granularity", ["model", "layer"])


def as_the_ranks_see_it(world_size: int = 2, batch_size: int = 24) -> DataLoader[Any]:
    """Batches whose equal parts are those of the ranks: rank ``r`` has samples ``r::world_size``."""
    data = loader(batch_size=batch_size)
    order = [
        start + offset
        for start in range(0, len(data.dataset), batch_size)
        for rank in range(world_size)
        for offset in range(rank, batch_size, world_size)
    ]
    return DataLoader(data.dataset, batch_size, sampler=order)


def simulated(
    name: str, granularity: Any, *, world_size: int = 2, warmup: int = 0, **options: Any
) -> tuple[Tensor, Any]:
    uplink = Digital(PARTS[name](), granularity=granularity, min_numel=10, warmup_rounds=warmup)
    strategy = EdgeStrategy(num_devices=world_size, uplink=uplink, seed=3)
    found, t, _ = fit(strategy, data=as_the_ranks_see_it(world_size), steps=STEPS, **options)
    return found, t.strategy


class Sent(NamedTuple):
    weights: Tensor
    bits: int
    bits_counted: int
    calls: int
    rounds: int


def over_the_wire(name: str, granularity: Any, world_size: int, warmup: int, options: dict[str, Any]) -> Any:
    strategy = CompressedDDPStrategy(
        PARTS[name](), granularity=granularity, min_numel=10, warmup_steps=warmup, seed=3, **options.pop("ddp", {})
    )
    module = options.pop("module", None) or Classifier(mlp())
    counter = _count_bytes()
    t = ddp_trainer(world_size=world_size, strategy=strategy, steps=STEPS, **options)
    t.fit(module, over_ranks(loader(batch_size=24 // world_size), world_size))
    counted = torch.tensor([counter["bytes"]])
    dist.all_reduce(counted)
    return Sent(
        weights(module), strategy.ledger.totals["uplink/bits"], 8 * int(counted), counter["calls"], strategy.round_index
    )


def _count_bytes() -> dict[str, int]:
    """Counts, from outside, what the strategy's group hands to torch.distributed."""
    counter = {"bytes": 0, "calls": 0}

    def counted(where: Any, name: str, which: int, only_source: bool = False) -> None:
        inner = getattr(where, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if not (only_source and dist.get_rank() != kwargs.get("src")):
                counter["bytes"] += args[which].numel() * args[which].element_size()
                counter["calls"] += 1
            return inner(*args, **kwargs)

        setattr(where, name, call)

    counted(group, "_all_gather", 1)
    group.dist = SimpleNamespace(**vars(dist))  # only the group's own view of the module
    counted(group.dist, "all_reduce", 0)
    counted(group.dist, "broadcast", 0, only_source=True)
    return counter


@every_granularity
@every_part
def test_two_processes_equal_two_simulated_devices(name: str, granularity: str) -> None:
    options = {"precision": "64-true"}
    expected, strategy = simulated(name, granularity, warmup=1, **options)
    first, second = run_ddp(over_the_wire, name, granularity, 2, 1, options)
    assert torch.equal(first.weights, second.weights), "replicas must not drift apart"
    torch.testing.assert_close(first.weights, expected, rtol=1e-9, atol=1e-12)
    assert first.bits == second.bits == first.bits_counted
    one_byte_a_rank = 8 * 2 * (STEPS - 1) if name == "mute_sign" else 0  # whether its gradient is finite
    assert first.bits == strategy.ledger.totals["uplink/bits"] + one_byte_a_rank
    assert first.rounds == STEPS == first.calls
