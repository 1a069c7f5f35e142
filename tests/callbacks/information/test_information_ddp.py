from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundwire.callbacks.information import (
    KD,
    CMIConstraint,
    CMIMonitor,
    Distillation,
    MaximumCMI,
    NormalizedCMI,
    UndistillableCMI,
)
from helpers.ddp import fit_ddp
from helpers.edge import CLASSES, FEATURES, Classifier, fit, loader, mlp


def table_of(trainer: Any, module: Any, callbacks: list[Any]) -> Tensor:
    found: Tensor = callbacks[0].centroids
    return found


def tables_of(trainer: Any, module: Any, callbacks: list[Any]) -> Tensor:
    return torch.stack([table.centroids for table in callbacks[0]._tables])


class Draws(CMIMonitor):
    """Remembers what it draws."""

    drawn: Tensor | None = None

    def _draw(self, trainer: Any, centroids: Tensor) -> None:
        self.drawn = centroids
        super()._draw(trainer, centroids)


def drawn_by(trainer: Any, module: Any, callbacks: list[Any]) -> tuple[dict[str, list[float]], Tensor]:
    return callbacks[0].history, callbacks[0].drawn


def rows_of(data: Any) -> tuple[Tensor, Tensor]:
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    return x, y


@pytest.mark.parametrize("q_update", ["batch", "epoch"])
def test_centroids_of_cmic_are_those_of_the_joined_batches(q_update: Any) -> None:
    build = partial(CMIConstraint, lam=1.0, beta=0.0, warmup_epochs=0, q_update=q_update)
    first, second = fit_ddp(build=build, read=table_of)
    assert torch.equal(first.weights, second.weights)
    assert torch.equal(first.read, second.read)
    alone = build()
    one, _, _ = fit("auto", callbacks=[alone])  # without Gamma the term is a mean over samples, as the ranks' mean is
    assert alone.centroids is not None
    torch.testing.assert_close(first.read, alone.centroids, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(first.weights, one, rtol=1e-3, atol=2e-5)


def test_running_centroids_of_cmim_are_those_of_the_joined_batches() -> None:
    # the first step takes each rank's own centroids, so weights differ from those of one process: compare after it
    first, second = fit_ddp(build=partial(UndistillableCMI, centroids="ema"), read=tables_of, steps=1)
    assert torch.equal(first.read, second.read)
    alone = UndistillableCMI(centroids="ema")
    fit("auto", callbacks=[alone], steps=1)
    joined = torch.stack([table.centroids for table in alone._tables])
    torch.testing.assert_close(first.read, joined, rtol=1e-5, atol=1e-6)


def test_the_pass_of_mcmi_sums_over_ranks() -> None:
    build = partial(MaximumCMI, lam=0.5, max_accuracy_drop=1.0)
    first, second = fit_ddp(build=build, read=table_of)
    assert torch.equal(first.weights, second.weights)
    assert torch.equal(first.read, second.read)
    x, y = rows_of(loader())
    with torch.no_grad():
        p = mlp()(x).double().softmax(dim=1)
    exact = torch.stack([p[y == c].mean(dim=0) for c in range(CLASSES)])
    torch.testing.assert_close(first.read.double(), exact, rtol=1e-5, atol=1e-6)
    one, t, _ = fit("auto", callbacks=[build()])
    torch.testing.assert_close(first.weights, one, rtol=1e-3, atol=2e-5)
    assert first.metrics["mcmi/train_acc"] == pytest.approx(float(t.callback_metrics["mcmi/train_acc"]), abs=1e-6)


def distilling() -> Distillation:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        network = nn.Sequential(nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.Linear(16, CLASSES))
    return Distillation(network, method=KD(), check_teacher=False)


def test_distillation_over_ranks_equals_that_of_one_process() -> None:
    first, second = fit_ddp(build=distilling)
    assert torch.equal(first.weights, second.weights)
    one, _, _ = fit("auto", callbacks=[distilling()])
    torch.testing.assert_close(first.weights, one, rtol=1e-3, atol=2e-5)
    assert (one - fit("auto")[0]).abs().max() > 1e-3


class Validated(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def val_dataloader(self) -> Any:
        return loader(batch_size=20)


def test_the_monitor_sees_the_validation_data_of_all_ranks(tmp_path: Path) -> None:
    first, second = fit_ddp(
        Validated(mlp()), build=partial(Draws, dirpath=tmp_path), read=drawn_by, steps=8, num_sanity_val_steps=0
    )
    assert first.read[0] == second.read[0]
    assert len(first.read[0]["epoch"]) == 2
    module = Validated(mlp())
    x, y = rows_of(module.val_dataloader())
    vector, state = first.weights, {}
    for name, value in module.state_dict().items():
        state[name], vector = vector[: value.numel()].view_as(value).float(), vector[value.numel() :]
    module.load_state_dict(state)
    metric = NormalizedCMI(CLASSES)
    metric.update(module(x), y)
    found = metric.compute()
    for rank in (first, second):
        assert rank.metrics["val/cmi_nats"] == pytest.approx(float(found["cmi"]), rel=1e-5)
        assert rank.metrics["val/gamma_nats"] == pytest.approx(float(found["gamma"]), rel=1e-5)
        assert rank.metrics["val/top1"] == pytest.approx(float((module(x).argmax(dim=1) == y).double().mean()))
        torch.testing.assert_close(rank.read[1], metric.centroids, rtol=1e-5, atol=1e-7)
    assert {file.name for file in tmp_path.iterdir()} == {"cmi_evolution.png", "simplex.png", "centroids.png"}
