"""The process in which `groundwire compare` runs: imports once, then forks for each run.

A run gets a fresh process with nothing left from the one before, and none of the seconds that importing takes. Jobs
come as JSON lines on the standard input; answers go as JSON lines to the standard output: ``{"step", "total"}`` as a
run proceeds, ``{"error"}`` when it fails, ``{"exit"}`` when it is over.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.model_helpers import is_overridden

from groundwire.callbacks.reporting import RoundProgressBar
from groundwire.recipes.cli.errors import CommandError, innermost_cause
from groundwire.recipes.cli.lightning_cli import INTERRUPTED, GroundwireCLI, quiet_process
from groundwire.recipes.cli.runs import IDENTITY, LAST

RESULT = "result.json"
LOG = "log.txt"

Send = Callable[[dict[str, Any]], None]


class _Report(Callback):
    """Says how far the run is, a few times a second."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._rounds = RoundProgressBar()
        self._last = 0.0

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if (now := time.monotonic()) - self._last > 0.25:
            self._last = now
            self._rounds._trainer = trainer
            total = self._rounds.total_train_batches
            self._send({"step": trainer.global_step, "total": total if total != float("inf") else None})


class CompareCLI(GroundwireCLI):
    """``fit``, then ``test``, then the results in the run's folder.

    Args:
        args: What ``fit`` gets.
        send: Receives the progress.
    """

    def __init__(self, args: list[str], send: Send) -> None:
        self._send = send
        super().__init__("fit", args)

    def after_instantiate_classes(self) -> None:
        """Report instead of drawing."""
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        callbacks[:] = [_Report(self._send), *(one for one in callbacks if not isinstance(one, ProgressBar))]

    def fit(self, model: LightningModule, datamodule: LightningDataModule | None = None, **kwargs: Any) -> None:
        """Train, test, and keep the numbers."""
        started = time.monotonic()
        super().fit(model, datamodule, **kwargs)
        seconds = time.monotonic() - started
        tests = is_overridden("test_step", model) and datamodule is not None
        tested = self.trainer.test(model, datamodule=datamodule, verbose=False) if tests else []
        assert self.run is not None
        result = {
            "rounds": self.trainer.global_step,
            "seconds": seconds,  # of the fit, or of its last part where it was resumed
            "resumed": self.run.resumed,
            "test": {name: value for metrics in tested for name, value in metrics.items()},
        }
        partial = self.run.folder / f"{RESULT}.partial"
        partial.write_text(json.dumps(result, indent=2) + "\n")
        os.replace(partial, self.run.folder / RESULT)


def run_job(args: list[str], folder: Path, send: Send) -> int:
    """Run one job to its end, from its last checkpoint if there is one.

    Args:
        args: What ``fit`` gets.
        folder: The run's folder.
        send: Receives the progress, and the reason of a failure.

    Returns:
        The exit status.
    """
    if (folder / IDENTITY).is_file() and (folder / LAST).is_file():
        args = [*args, f"--ckpt_path={folder}"]
    else:
        shutil.rmtree(folder, ignore_errors=True)  # begun, but before its first checkpoint
        args = [*args, f"--trainer.default_root_dir={folder}"]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOG, "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        CompareCLI(args, send)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001  one failed run leaves the others alone
        traceback.print_exc()
        send({"error": str(error) if isinstance(error, CommandError) else innermost_cause(error)})
        return 1
    return 0


def _child(job: dict[str, Any], send: Send) -> None:
    """The forked process; does not return."""
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = run_job(job["args"], Path(job["folder"]), send)
        if (wandb := sys.modules.get("wandb")) is not None:
            wandb.finish(exit_code=status)
            wandb.teardown()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def main() -> None:
    """Serve jobs until the standard input ends."""
    quiet_process()
    answers = os.dup(1)
    running: list[int] = []

    def send(message: dict[str, Any]) -> None:
        os.write(answers, (json.dumps(message) + "\n").encode())

    def forward(signum: int, frame: FrameType | None) -> None:
        for pid in running:
            os.kill(pid, signum)

    signal.signal(signal.SIGINT, forward)
    signal.signal(signal.SIGTERM, forward)
    send({"ready": True})
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _child(job, send)
        running.append(pid)
        _, status = os.waitpid(pid, 0)
        running.clear()
        send({"exit": os.waitstatus_to_exitcode(status)})


if __name__ == "__main__":
    main()
