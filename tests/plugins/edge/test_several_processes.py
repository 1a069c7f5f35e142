"""EdgeStrategy on several processes equals one process; under gloo, torchrun and Lightning's launcher."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchmetrics
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from groundwire.callbacks.reporting import ResumableCheckpoint
from groundwire.plugins.compression import ErrorFeedback, LFLQuantizer, TopK
from groundwire.plugins.edge import (
    ADSGD,
    LFL,
    DeviceBatch,
    Digital,
    EdgeStrategy,
    ErrorFree,
    LocalSGD,
    UniformSample,
)
from helpers.ddp import run_ddp
from helpers.edge import (
    CLASSES,
    FEATURES,
    Classifier,
    Killed,
    Losses,
    Rounds,
    Stateful,
    fit,
    generator,
    loader,
    mlp,
    weights,
)

UPLINKS = {
    "error-free": ErrorFree,
    "digital with error feedback": lambda: Digital(ErrorFeedback(TopK(k=5))),
    "over the air": lambda: ADSGD(power=100.0, bandwidth=0.5),
}


class Busy(Classifier):
    """Draws numbers, keeps statistics and torchmetrics, returns more than a loss, and validates."""

    def __init__(self) -> None:
        super().__init__(mlp(nn.BatchNorm1d(16), nn.Dropout(0.2)))
        self.seen = torchmetrics.SumMetric()
        self.train_metrics = torchmetrics.MetricCollection(
            [
                torchmetrics.Accuracy("multiclass", num_classes=CLASSES),
                torchmetrics.F1Score("multiclass", num_classes=CLASSES),
            ]
        )
        self.val_seen = torchmetrics.SumMetric()
        self.returned: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        scores = self(x)
        loss = F.cross_entropy(scores, y)
        self.seen(len(x))
        self.train_metrics(scores.detach(), y)
        self.log("train/seen", self.seen, on_step=True, on_epoch=True)
        self.log_dict(self.train_metrics, on_step=True, on_epoch=True)  # type: ignore[arg-type]
        self.log("train/loss", loss)
        self.log("train/largest", x.max(), reduce_fx="max")
        return {"loss": loss, "scores": scores}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.returned.append(outputs["scores"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.val_seen(len(x))
        self.log("val/seen", self.val_seen)
        self.log("val/loss", F.cross_entropy(self(x), y), sync_dist=True)
        self.log("val/samples", float(len(x)), reduce_fx="sum", sync_dist=True)


def build(uplink: str, scheduled: int = 3, **options: Any) -> EdgeStrategy:
    options = {"vectorize": False, "scheduler": UniformSample(scheduled), "seed": 5} | options
    return EdgeStrategy(num_devices=4, uplink=UPLINKS[uplink](), **options)


def trained(strategy: EdgeStrategy, module: pl.LightningModule, ranks: int, **options: Any) -> dict[str, Any]:
    """Six rounds on this process, which is one of so many."""
    losses, resume_from, data = Losses(), options.pop("ckpt_path", None), options.pop("data", None)
    options = {"logger": False, "enable_checkpointing": False, "max_steps": 6} | options
    t = pl.Trainer(
        strategy=strategy, accelerator="cpu", devices=ranks, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[losses, *options.pop("callbacks", [])], **options,
    )  # fmt: skip
    t.fit(module, data or Stateful(loader()), loader(), ckpt_path=resume_from)
    return {
        "weights": weights(module),
        "losses": losses.values,
        "metrics": {name: float(value) for name, value in t.callback_metrics.items()},
        "totals": strategy.ledger.totals,
        "first": t.is_global_zero,
        "seen as": (t.world_size, t.global_rank),
        "returned": getattr(module, "returned", []),
        "joined": dist.is_initialized() and dist.get_world_size(),
    }


def rank_of_busy(uplink: str, scheduled: int, ranks: int) -> dict[str, Any]:
    return trained(build(uplink, scheduled), Busy(), ranks)


@pytest.mark.parametrize("uplink", UPLINKS)
@pytest.mark.parametrize(("scheduled", "ranks"), [(3, 2), (1, 2), (2, 3)])
def test_equals_one_process_bit_for_bit_in_the_loop(uplink: str, scheduled: int, ranks: int) -> None:
    """Also with blocks of different lengths, and ranks without a device."""
    one = trained(build(uplink, scheduled), Busy(), 1)
    several = run_ddp(rank_of_busy, uplink, scheduled, ranks, world_size=ranks)
    assert [rank["first"] for rank in several] == [True] + [False] * (ranks - 1)
    for rank in several:
        assert rank["joined"] == ranks
        assert rank["seen as"] == (1, 0)
        assert torch.equal(rank["weights"], one["weights"])
        assert rank["losses"] == one["losses"]
        assert rank["totals"] == one["totals"]
        assert rank["metrics"] == one["metrics"]
        assert all(torch.equal(a, b) for a, b in zip(rank["returned"], one["returned"], strict=True))
    assert one["metrics"]["train/seen_epoch"] == scheduled * 6 * 2  # samples of the last, half epoch: two rounds
    assert one["metrics"]["val/seen"] == one["metrics"]["val/samples"] == 96


class Decays(Classifier):
    """Has a parameter that no loss depends on, which AdamW shrinks if its gradient is zero, and not if it has none."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.unused = nn.Parameter(torch.ones(3))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.5)


def odd_rounds(ragged: bool, missing: bool) -> Rounds:
    """Two devices, which hold different numbers of samples, or of which the first has a NaN."""
    x, y = torch.randn(2, 6, FEATURES, generator=generator(2)), torch.zeros(2, 6, dtype=torch.long)
    if missing:
        x[0, 0, 0] = float("nan")
    lengths = torch.tensor([6, 4]) if ragged else None
    ids = torch.arange(2)
    return Rounds(*[DeviceBatch(data=(x, y), device_ids=ids, num_samples=ids + 4, lengths=lengths)] * 3)


def rank_of_odd_rounds(ragged: bool, missing: bool, ranks: int) -> dict[str, Any]:
    strategy = EdgeStrategy(num_devices=2, on_nonfinite="drop", seed=5)
    return trained(strategy, Decays(), ranks, data=odd_rounds(ragged, missing), max_steps=3, precision="64-true")


@pytest.mark.parametrize(("ragged", "missing"), [(True, False), (False, False), (False, True)])
def test_the_whole_round_decides_how_devices_are_run(ragged: bool, missing: bool) -> None:
    """One device a block, that is; and numbers that are missing are no sign of different batches."""
    one = rank_of_odd_rounds(ragged, missing, 1)
    assert torch.isfinite(one["weights"]).all()
    for rank in run_ddp(rank_of_odd_rounds, ragged, missing, 2):
        torch.testing.assert_close(rank["weights"], one["weights"], rtol=1e-9, atol=1e-12)


def rank_at_once(ranks: int) -> dict[str, Any]:
    strategy = build("over the air", vectorize=True, local=LocalSGD(lr=0.1, num_steps=3), downlink=LFL(LFLQuantizer(4)))
    return trained(strategy, Classifier(mlp()), ranks, precision="64-true")


def test_equals_one_process_at_once() -> None:
    """Batched products of fewer devices may round differently; each device holds a model of its own, or the same."""
    one = rank_at_once(1)
    for rank in run_ddp(rank_at_once, 2):
        torch.testing.assert_close(rank["weights"], one["weights"], rtol=1e-9, atol=1e-10)
        assert rank["losses"] == pytest.approx(one["losses"], rel=1e-9)
        assert rank["totals"] == one["totals"]


def test_ranks_draw_different_numbers_at_once() -> None:
    """Two devices with the same data in two blocks do not share a dropout mask."""
    first, second = run_ddp(same_data_with_dropout)
    assert first == second
    assert len(set(first)) == 4


def same_data_with_dropout() -> list[float]:
    class Same(pl.Callback):
        losses: list[float]

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            self.losses = outputs["one"].tolist()

    class Returns(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return {"loss": loss, "one": loss.detach()}

    same, module = Same(), Returns(mlp(nn.Dropout(0.5)))
    x, y = torch.ones(1, FEATURES).repeat(24, 1), torch.zeros(24, dtype=torch.long)
    trainer = pl.Trainer(
        strategy=build("error-free", 4, vectorize=True), accelerator="cpu", devices=2, max_steps=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[same],
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=24))
    return same.losses


def rank_resumes(folder: str, step: int, ranks: int, resume: bool) -> dict[str, Any]:
    strategy = build("digital with error feedback")
    if resume:
        return trained(strategy, Classifier(mlp()), ranks, ckpt_path=f"{folder}/step={step}.ckpt")
    saver = ModelCheckpoint(dirpath=folder, every_n_train_steps=step, save_top_k=-1, filename="{step}")
    try:
        return trained(
            strategy, Classifier(mlp()), ranks, enable_checkpointing=True, callbacks=[saver, Killed(step + 1)]
        )
    except Killed.Error:
        return {}


@pytest.mark.parametrize("ranks", [1, 2])
def test_resumes_bit_for_bit_also_with_another_number_of_processes(tmp_path: Path, ranks: int) -> None:
    whole = trained(build("digital with error feedback"), Classifier(mlp()), 1)
    run_ddp(rank_resumes, str(tmp_path), 2, 2, False)
    if ranks == 1:
        resumed = [rank_resumes(str(tmp_path), 2, 1, True)]
    else:
        resumed = run_ddp(rank_resumes, str(tmp_path), 2, 2, True)
    for rank in resumed:
        assert torch.equal(rank["weights"], whole["weights"])
        assert rank["losses"] == whole["losses"][2:]
        assert rank["totals"] == whole["totals"]


class FailsOnOneRank(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1 and dist.get_rank() == 1:
            raise ValueError("no such luck")
        return super().training_step(batch, batch_idx)


def one_rank_fails() -> str:
    try:
        trained(build("error-free"), FailsOnOneRank(mlp()), 2)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_rank_that_fails_ends_the_run_on_all() -> None:
    first, second = run_ddp(one_rank_fails)
    assert first == "RuntimeError: Rank 1 of 2 failed: ValueError: no such luck"
    assert second == "ValueError: no such luck"


def different_batches() -> None:
    strategy = build("error-free")
    samples = loader(samples=48) if int(os.environ["RANK"]) else loader()
    trainer = pl.Trainer(
        strategy=strategy, accelerator="cpu", devices=2, max_steps=6, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Classifier(mlp()), samples)


def test_different_batches_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"see different batches.*seed_everything"):
        run_ddp(different_batches)


def shuffled_without_a_seed() -> Tensor:
    torch.manual_seed(100 + int(os.environ["RANK"]))  # as if nobody had called seed_everything
    module = Classifier(nn.Linear(FEATURES, CLASSES))
    data = loader()
    fit_on = DataLoader(data.dataset, batch_size=24, shuffle=True)
    trainer = pl.Trainer(
        strategy=build("error-free"), accelerator="cpu", devices=2, max_steps=6, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, fit_on)
    return weights(module)


def test_unseeded_ranks_start_from_the_first_ones_weights_and_order() -> None:
    first, second = run_ddp(shuffled_without_a_seed)
    assert torch.equal(first, second)


def interrupted_once() -> tuple[int, bool]:
    class CtrlC(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 3 and int(os.environ["RANK"]) == 1:
                keeper.interrupted = True  # what the handler of the signal does

    with tempfile.TemporaryDirectory() as folder:
        keeper = ResumableCheckpoint(folder, every_n_steps=100)
        trainer = pl.Trainer(
            strategy=build("error-free"), accelerator="cpu", devices=2, max_steps=40, logger=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[CtrlC(), keeper],
        )  # fmt: skip
        with contextlib.suppress(KeyboardInterrupt, SystemExit):
            trainer.fit(Classifier(mlp()), Stateful(loader()))
        return trainer.global_step, (Path(folder) / "last.ckpt").exists()


def test_ctrl_c_in_one_process_stops_all_after_the_same_step() -> None:
    assert run_ddp(interrupted_once) == [(8, True), (8, False)]


def one_clock_is_ahead() -> int:
    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            decision = trainer.global_step == 5 and int(os.environ["RANK"]) == 1
            trainer.should_stop |= trainer.strategy.reduce_boolean_decision(decision, all=False)

    stop = EarlyStopping("val/loss", patience=100)
    trainer = pl.Trainer(
        strategy=build("error-free"), accelerator="cpu", devices=2, max_steps=12, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[Stops(), stop],
    )  # fmt: skip
    trainer.fit(Busy(), loader(), loader())
    return trainer.global_step


def test_one_rank_can_stop_all() -> None:
    assert run_ddp(one_clock_is_ahead) == [5, 5]


# ---------------------------------------------------------------- real launchers

SCRIPT = """
import sys
import lightning.pytorch as pl
import torch
from groundwire.plugins.compression import ErrorFeedback, TopK
from groundwire.plugins.edge import Digital, EdgeStrategy, UniformSample
from helpers.edge import Classifier, loader, mlp, weights

nodes, devices, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
strategy = EdgeStrategy(4, scheduler=UniformSample(3), uplink=Digital(ErrorFeedback(TopK(k=5))), vectorize=False, seed=5)
module = Classifier(mlp())
trainer = pl.Trainer(
    strategy=strategy, accelerator="cpu", devices=devices, num_nodes=nodes, max_steps=6, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(module, loader())
torch.save(weights(module), f"{out}/{strategy.rank}-of-{strategy.num_ranks}.pt")
"""


def launch(folder: Path, commands: list[tuple[list[str], dict[str, str]]]) -> None:
    tests = str(Path(__file__).parents[2])
    base = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK")}
    base |= {"PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            command, env=base | extra, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for command, extra in commands
    ]
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output[-3000:]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def torchrun(script: Path, nodes: int, devices: int) -> list[tuple[list[str], dict[str, str]]]:
    port = free_port()
    run, where = [sys.executable, "-m", "torch.distributed.run"], ["--master-addr", "127.0.0.1", "--master-port", port]
    script_of = [str(script), str(nodes), str(devices), str(script.parent)]
    return [
        (
            [
                *run,
                "--nnodes",
                str(nodes),
                "--node-rank",
                str(node),
                "--nproc-per-node",
                str(devices),
                *where,
                *script_of,
            ],
            {},
        )
        for node in range(nodes)
    ]


def lightning(script: Path, nodes: int, devices: int) -> list[tuple[list[str], dict[str, str]]]:
    port = free_port()
    command = [sys.executable, str(script), str(nodes), str(devices), str(script.parent)]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [(command, where | {"NODE_RANK": str(node)}) for node in range(nodes)]


@pytest.mark.parametrize(
    ("launcher", "nodes", "devices"),
    [
        (torchrun, 1, 2),
        pytest.param(torchrun, 2, 1, marks=pytest.mark.slow),
        (lightning, 1, 2),
        pytest.param(lightning, 2, 1, marks=pytest.mark.slow),
    ],
)
def test_real_launchers(tmp_path: Path, launcher: Any, nodes: int, devices: int) -> None:
    """With two nodes on this machine."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    launch(tmp_path, launcher(script, nodes, devices))
    one, _, _ = fit(build("digital with error feedback"), Classifier(mlp()))
    found = [torch.load(tmp_path / f"{rank}-of-2.pt") for rank in range(2)]
    assert all(torch.equal(w, one) for w in found)
