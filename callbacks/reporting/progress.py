"""One progress bar over all rounds of a run, and one for work that is no training."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from tqdm.auto import tqdm

ShowProgress = Callable[[str, float], None]
"""Takes what is being done, and the share of the work that is done, in [0, 1]."""


class RoundProgressBar(RichProgressBar):
    """Lightning's rich progress bar, counting rounds (optimizer steps) over the whole fit instead of batches per epoch.

    Where the output is not a terminal it is silent.

    Args:
        refresh_rate: Refreshes per second; 0 disables the display.
        leave: Whether the finished bar stays on the screen.
    """

    def __init__(self, refresh_rate: int = 10, leave: bool = True) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=leave)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Go silent where nobody watches."""
        super().setup(trainer, pl_module, stage)
        if not sys.stdout.isatty():
            self.disable()

    @property
    def total_train_batches(self) -> int | float:
        """Rounds of the whole fit; infinite where the Trainer has no limit."""
        limits = [math.inf]
        if self.trainer.max_steps >= 0:
            limits.append(self.trainer.max_steps)
        if self.trainer.max_epochs is not None and self.trainer.max_epochs >= 0:
            batches = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
            limits.append(self.trainer.max_epochs * math.ceil(batches) if math.isfinite(batches) else math.inf)
        return min(limits)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar at the first epoch; later epochs go on with it."""
        if self.is_disabled or self.progress is None:
            return
        if self.train_progress_bar_id is None:
            self._initialize_train_progress_bar_id()
        self._update(self.train_progress_bar_id, trainer.global_step)

    def _update(self, progress_bar_id: Any, current: int, visible: bool = True, hard: bool = False) -> None:
        if progress_bar_id is not None and progress_bar_id == self.train_progress_bar_id:
            current = self.trainer.global_step
        super()._update(progress_bar_id, current, visible, hard)

    def _get_train_description(self, current_epoch: int) -> str:
        return f"{'Round':{len(self.validation_description)}}"


@contextmanager
def work_progress(trainer: Trainer, title: str) -> Iterator[ShowProgress]:
    """Show how far a callback's own work is, such as an evaluation.

    It is a bar in the Trainer's own display where that is rich and on the screen, else one of its own; none where the
    Trainer has none, and none but in the first process.

    Args:
        trainer: The Trainer.
        title: What is shown at first.

    Yields:
        To be called with what is being done, and the share of the work that is done.
    """
    bar = trainer.progress_bar_callback
    if not trainer.is_global_zero or not getattr(bar, "is_enabled", False):
        yield lambda _, __: None
        return
    if isinstance(bar, RichProgressBar) and bar.progress is not None and bar.progress.live.is_started:
        task = bar.progress.add_task(f"[white]{title}", total=1.0)

        def show(what: str, share: float) -> None:
            assert bar.progress is not None
            bar.progress.update(task, description=f"[white]{what}", completed=share)
            bar.refresh()

        yield show
        return
    with tqdm(total=100, unit="%", desc=title) as own:

        def show_own(what: str, share: float) -> None:
            own.set_description(what)
            own.update(round(100 * share) - own.n)

        yield show_own
