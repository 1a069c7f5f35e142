"""What all methods have in common: what they leave in checkpoints and certificates, and what they refuse."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundwire.callbacks.reporting import ResumableCheckpoint
from groundwire.callbacks.unlearning import (
    NPO,
    OFMU,
    SCRUB,
    SSD,
    FineTune,
    GradDiff,
    GradientAscent,
    RandomLabels,
    Retrain,
)
from groundwire.callbacks.unlearning.base import MemoryGauge, num_records
from groundwire.callbacks.weights import read_checkpoint
from helpers.ddp import ddp_trainer, run_ddp
from helpers.unlearning import ToForget, checkpoint, to_forget, trained, unlearn


def tensors_in(content: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(content)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def likeness(content: dict[str, Any], x: Tensor) -> float:
    """The largest cosine of a record with a row of a tensor in a checkpoint, weights left out."""
    held = {key: value for key, value in content.items() if key != "state_dict"}
    rows = [t.reshape(-1, t.shape[-1]) for t in tensors_in(held) if t.ndim and t.shape[-1] == x.numel()]
    cosines = [F.cosine_similarity(row, x.flatten().expand_as(row)).abs().max() for row in rows if len(row)]
    return max(map(float, cosines), default=0.0)


@pytest.mark.parametrize("build", [GradientAscent, NPO, GradDiff, SCRUB, OFMU, RandomLabels])
def test_what_is_forgotten_is_not_in_the_final_checkpoint(tmp_path: Path, build: Any) -> None:
    """Momentum is a sum of gradients, and those of a first layer are multiples of the inputs."""
    data = to_forget(forget="indices", indices=[7])
    keeper = ResumableCheckpoint(tmp_path, every_n_steps=1)
    unlearn(build(checkpoint()), ToForget(), data, steps=2, callbacks=[keeper], enable_checkpointing=True)
    final = read_checkpoint(tmp_path / "last.ckpt")
    x = next(iter(data.batches("forget")))[0][0]
    assert likeness(final, x) < 0.9
    assert not tensors_in([state["state"] for state in final["optimizer_states"]])
    running = unlearn(build(checkpoint()), ToForget(), data, steps=2)[1].optimizers[0]
    assert not running.state


def test_before_the_end_a_checkpoint_has_what_a_resume_needs(tmp_path: Path) -> None:
    class Keep(ResumableCheckpoint):
        def _save(self, t: Any) -> None:
            super()._save(t)
            content = read_checkpoint(self.path(t))
            states.append(len(tensors_in([state["state"] for state in content["optimizer_states"]])))

    states: list[int] = []
    keeper = Keep(tmp_path, every_n_steps=1)
    unlearn(GradDiff(checkpoint()), steps=3, callbacks=[keeper], enable_checkpointing=True)
    assert states[0] > 0
    assert states[-1] == 0


def test_the_certificate_has_the_configuration() -> None:
    method = FineTune(checkpoint())
    unlearn(method, ToForget(lr=0.37), steps=3)
    training = method.certificate()["training"]
    (optimizer,) = training["optimizers"]
    assert optimizer["class"] == "SGD"
    assert optimizer["groups"][0]["lr"] == 0.37
    assert optimizer["groups"][0]["momentum"] == 0.9
    assert (training["steps"], training["batch_size"], training["processes"]) == (3, 40, 1)
    assert training["model"] == "ToForget"


def test_weights_that_overflow_in_the_last_step_are_not_saved(tmp_path: Path) -> None:
    keeper = ResumableCheckpoint(tmp_path, every_n_steps=100)
    with pytest.raises(RuntimeError, match=r"left values that are not finite in .*They are not saved"):
        unlearn(
            FineTune(checkpoint()), ToForget(lr=float("inf")), steps=1, callbacks=[keeper], enable_checkpointing=True
        )
    assert not (tmp_path / "last.ckpt").exists()


def _count() -> dict[str, int]:
    method = Retrain(checkpoint())
    t = ddp_trainer(callbacks=[method], steps=3, limit_val_batches=0)
    t.fit(ToForget(), datamodule=to_forget(batch_size=20))
    everywhere = method.records_read_everywhere()
    assert method.records_read["retain"] == 60
    return everywhere


def test_records_of_all_processes_are_counted() -> None:
    assert [found["retain"] for found in run_ddp(_count)] == [120, 120]


def test_records_are_counted_in_whatever_structure() -> None:
    x = torch.zeros(5, 2)
    assert num_records((x, torch.zeros(5))) == num_records({"x": x, "y": None}) == num_records([{"a": [x]}]) == 5


class WithBatchNorm(ToForget):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)))


def test_one_shot_methods_warn_of_running_statistics() -> None:
    with pytest.warns(UserWarning, match="running statistics hold traces"):
        unlearn(SSD(), WithBatchNorm())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*running statistics.*")
        unlearn(SSD(), trained())


def test_the_gauge_measures_what_is_used_meanwhile_and_not_before() -> None:
    before = torch.ones(30_000_000)  # 114 MiB
    gauge = MemoryGauge(torch.device("cpu"))
    if gauge.read() is None:
        pytest.skip("the system does not let the peak be set back")
    meanwhile = torch.ones(20_000_000)
    del meanwhile
    peak = gauge.read()
    assert peak is not None
    assert 70 * 2**20 < peak < 110 * 2**20
    assert len(before) == 30_000_000
