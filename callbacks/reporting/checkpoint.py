"""One checkpoint per run, taken between two steps, from which a run goes on as if it had never stopped."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

_SUMS = ("value", "cumulated_batch_size")  # of a metric that is reduced over the epoch
_ASK_EVERY = 8  # steps, whether Ctrl-C reached another process


class ResumableCheckpoint(Checkpoint):
    """Keeps ``last.ckpt`` up to date: every ``every_n_steps`` steps, at the end, and on Ctrl-C.

    Lightning's ModelCheckpoint saves inside a step, before the step's metrics are logged and before the validation that
    follows it; a run killed there and resumed lacks those rows. This callback saves between two steps: all that belongs
    to the steps before has happened, nothing of the next one has, not even the fetch of its batch. The states of the
    global random generators (torch, NumPy, Python) travel along, and the running means of what ``training_step`` logs
    per epoch. The train loader has to be resumable (``state_dict``, ``load_state_dict``) for checkpoints within an
    epoch; those of ``groundwire.datamodules`` are. Files are replaced in one move.

    The first Ctrl-C waits for the end of the running step, saves, and then stops the fit; a second one stops at once
    and leaves the last regular checkpoint. Several processes agree every eighth step on whether it reached any. After an exception nothing is saved: the step may be half done.

    Args:
        dirpath: Folder of the checkpoint; ``<default_root_dir>/checkpoints`` where None.
        every_n_steps: Optimizer steps between two checkpoints.

    Attributes:
        interrupted: Whether Ctrl-C stopped the fit.

    Raises:
        ValueError: If ``every_n_steps`` is less than 1.
    """

    def __init__(self, dirpath: str | Path | None = None, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"`every_n_steps` must be at least 1, got {every_n_steps}.")
        self.dirpath = dirpath
        self.every_n_steps = every_n_steps
        self.interrupted = False
        self._saved_step = -1
        self._restored: dict[str, Any] | None = None
        self._running: dict[str, dict[str, Tensor]] = {}
        self._old_handler: Any = None

    @property
    def state_key(self) -> str:
        """The same for subclasses and all arguments, which may change at a resume."""
        return ResumableCheckpoint.__qualname__

    def path(self, trainer: Trainer) -> Path:
        """Where the checkpoint of this run is."""
        folder = Path(self.dirpath) if self.dirpath is not None else Path(trainer.default_root_dir) / "checkpoints"
        return folder / "last.ckpt"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over Ctrl-C for the time of the fit."""
        if threading.current_thread() is threading.main_thread():
            self._old_handler = signal.signal(signal.SIGINT, self._on_sigint)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the one moment that lies between two steps: before a batch is fetched."""
        self._saved_step = trainer.global_step
        loop = trainer.fit_loop.epoch_loop
        before_fetch: Callable[[], None] = type(loop)._on_before_fetch.__get__(loop)

        def between_steps() -> None:
            self._between_steps(trainer)
            before_fetch()

        loop._on_before_fetch = between_steps  # type: ignore[method-assign]

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Put what the epoch had summed up before the checkpoint in front of what it sums up now."""
        results = trainer.fit_loop.epoch_loop._results
        for name in self._running.keys() & results.keys():
            result, before = results[name], self._running.pop(name)
            extreme = result.meta.is_max_reduction or result.meta.is_min_reduction
            for key, value in before.items():
                now = getattr(result, key)
                setattr(result, key, result.meta.reduce_fx(value, now) if extreme else value.to(now.device) + now)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What was not logged again by now belongs to an epoch that is over."""
        self._running.clear()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the final state."""
        if trainer.global_step != self._saved_step:
            self._save(trainer)
        if self.interrupted:
            raise KeyboardInterrupt

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give back what was taken over."""
        self.interrupted |= isinstance(exception, KeyboardInterrupt)
        self._detach(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give back what was taken over."""
        self._detach(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The random generators' states; `on_save_checkpoint` adds the rest."""
        numpy = np.random.get_state(legacy=False)  # noqa: NPY002  the global generator is what is to be saved
        state: dict[str, Any] = {
            "torch": torch.get_rng_state(),
            "numpy": numpy | {"state": numpy["state"] | {"key": numpy["state"]["key"].tolist()}},
            "python": random.getstate(),
        }
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state_all()
        return state

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning counts and does not save: logged steps, and sums of this epoch's metrics."""
        loop = trainer.fit_loop.epoch_loop
        checkpoint["callbacks"][self.state_key] |= {
            "logged_steps": loop._batches_that_stepped,
            "running": {
                name: {key: getattr(result, key) for key in _SUMS if hasattr(result, key)}
                for name, result in loop._results.items()
                if result.is_tensor and result.meta.on_epoch
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what is to be restored before the first step."""
        self._restored = state_dict

    def _between_steps(self, trainer: Trainer) -> None:
        if self._restored is not None:
            state, self._restored = self._restored, None
            # Lightning counts one step too many when it resumes from a checkpoint taken here.
            trainer.fit_loop.epoch_loop._batches_that_stepped = state["logged_steps"]
            self._running = dict(state["running"])
            torch.set_rng_state(state["torch"].cpu())
            np.random.set_state(state["numpy"])  # noqa: NPY002
            version, internal, gauss = state["python"]
            random.setstate((version, tuple(internal), gauss))
            if "cuda" in state and torch.cuda.is_available():
                torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])
        step = trainer.global_step
        stops = self._stops(trainer, step)
        if step != self._saved_step and (stops or step % self.every_n_steps == 0):
            self._save(trainer)
        if stops:
            raise KeyboardInterrupt

    def _stops(self, trainer: Trainer, step: int) -> bool:
        """Whether Ctrl-C reached any process. Several ask each other now and then only, as on a GPU that takes its time."""
        if getattr(trainer.strategy, "num_ranks", trainer.world_size) > 1 and step % _ASK_EVERY:
            return False
        return bool(trainer.strategy.reduce_boolean_decision(self.interrupted, all=False))

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.path(trainer))
        self._saved_step = trainer.global_step

    def _on_sigint(self, signum: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        rank_zero_info("Ctrl-C: stopping after this step. Once more stops at once.")

    def _detach(self, trainer: Trainer) -> None:
        trainer.fit_loop.epoch_loop.__dict__.pop("_on_before_fetch", None)
        if self._old_handler is not None:
            signal.signal(signal.SIGINT, self._old_handler)
            self._old_handler = None
