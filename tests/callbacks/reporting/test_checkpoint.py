from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from groundwire.callbacks.reporting import MetricsCSV, ResumableCheckpoint

STEPS = 10


class Noisy(LightningModule):
    """Uses the global random stream, momentum and a schedule: all of it must come back."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.net(batch).square().mean()
        self.log("loss", loss)
        self.log("epoch_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", self.net(batch).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]


class Rounds:
    """Batches by epoch and position, resumable."""

    def __init__(self) -> None:
        self.epoch, self.position, self.resumes = -1, 0, False

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[Tensor]:
        if not self.resumes:
            self.epoch, self.position = self.epoch + 1, 0
        self.resumes = False
        return self._epoch()

    def _epoch(self) -> Iterator[Tensor]:
        while self.position < len(self):
            self.position += 1
            yield torch.randn(8, 4, generator=torch.Generator().manual_seed(1000 * self.epoch + self.position))

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position, self.resumes = state["epoch"], state["position"], True


class KeepAll(ResumableCheckpoint):
    """Copies each checkpoint, with the metrics as a run killed two steps later would leave them."""

    def _save(self, trainer: Trainer) -> None:
        super()._save(trainer)
        shutil.copy(self.path(trainer), self.path(trainer).with_name(f"step{trainer.global_step}.ckpt"))


class Interrupt(ResumableCheckpoint):
    """Ctrl-C in the middle of a step."""

    def __init__(self, at: int, times: int = 1) -> None:
        super().__init__(every_n_steps=4)
        self.at, self.times = at, times

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if trainer.global_step == self.at:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)


def trainer(folder: Path, callback: ResumableCheckpoint, **kwargs: Any) -> Trainer:
    return Trainer(
        **{"max_steps": STEPS} | kwargs,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[callback],
        logger=MetricsCSV(folder),
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def fit(one: Trainer, **kwargs: Any) -> dict[str, Tensor]:
    module = Noisy()
    validation = [torch.ones(8, 4)]
    one.fit(module, Rounds(), torch.utils.data.DataLoader(validation[0], batch_size=8), weights_only=True, **kwargs)
    return module.state_dict()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "validation", [{}, {"val_check_interval": 2}, {"val_check_interval": 3, "check_val_every_n_epoch": None}]
)
def test_resumed_from_any_step_the_run_is_as_if_never_stopped(
    tmp_path: Path, seeded: Callable[[int], None], validation: dict[str, Any]
) -> None:
    seeded(1)
    weights = fit(trainer(tmp_path, KeepAll(every_n_steps=1), **validation))
    metrics = (tmp_path / "metrics.csv").read_text()
    for step in range(1, STEPS):
        seeded(100 + step)  # another stream: the right one has to come from the checkpoint
        folder = tmp_path / f"from{step}"
        folder.mkdir()
        lines = metrics.splitlines(keepends=True)
        killed = [line for line in lines if line.startswith("step") or int(line.split(",")[0]) < step + 2]
        (folder / "metrics.csv").write_text("".join(killed))
        checkpoint = tmp_path / "checkpoints" / f"step{step}.ckpt"
        resumed = fit(trainer(folder, ResumableCheckpoint(), **validation), ckpt_path=checkpoint)
        assert same(resumed, weights), step
        assert (folder / "metrics.csv").read_text() == metrics, step


def test_ctrl_c_saves_between_two_steps_and_the_run_goes_on_from_there(
    tmp_path: Path, seeded: Callable[[int], None]
) -> None:
    seeded(1)
    weights = fit(trainer(tmp_path / "whole", ResumableCheckpoint()))
    seeded(1)
    before = signal.getsignal(signal.SIGINT)
    callback = Interrupt(at=5)
    with pytest.raises(SystemExit):
        fit(trainer(tmp_path / "stopped", callback))
    assert callback.interrupted
    signal.signal(signal.SIGINT, before)  # Lightning ignores it for good once it has seen one
    checkpoint = tmp_path / "stopped" / "checkpoints" / "last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 6  # the running step was finished
    assert same(fit(trainer(tmp_path / "stopped", ResumableCheckpoint()), ckpt_path=checkpoint), weights)
    whole, stopped = ((tmp_path / name / "metrics.csv").read_text() for name in ("whole", "stopped"))
    assert whole == stopped


def test_a_second_ctrl_c_stops_at_once_and_leaves_the_regular_checkpoint(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        fit(trainer(tmp_path, Interrupt(at=6, times=2)))
    signal.signal(signal.SIGINT, before)
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4


def test_ctrl_c_is_given_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    fit(trainer(tmp_path, ResumableCheckpoint(), max_steps=2))
    assert signal.getsignal(signal.SIGINT) is before


def test_it_replaces_lightnings_default_checkpoint_and_saves_the_end(tmp_path: Path) -> None:
    fit(trainer(tmp_path, ResumableCheckpoint(every_n_steps=100), max_steps=3))
    assert [path.name for path in tmp_path.rglob("*.ckpt")] == ["last.ckpt"]
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3


def test_lightning_still_fetches_batches_where_this_callback_attaches(tmp_path: Path) -> None:
    """The private name that is replaced: if Lightning no longer calls it, nothing would ever be saved between steps."""
    callback = KeepAll(every_n_steps=2)
    fit(trainer(tmp_path, callback, max_steps=5))
    assert {path.stem for path in (tmp_path / "checkpoints").iterdir()} == {"last", "step2", "step4", "step5"}


def test_every_n_steps_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ResumableCheckpoint(every_n_steps=0)
