"""SCRUB: a student that disobeys its teacher on the forget set, and obeys it elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from groundwire.callbacks.logits import LogitsSource
from groundwire.callbacks.reporting import ResumableCheckpoint
from groundwire.callbacks.step import Step, loss_of, with_loss
from groundwire.callbacks.unlearning.base import IterativeMethod
from groundwire.callbacks.unlearning.functional import counted, counted_records, kl_to_teacher
from groundwire.callbacks.unlearning.reading import count_errors, original_logits, read_step

_LOGGED = ("forget_kl", "forget_loss", "retain_kl", "retain_loss")


class SCRUB(IterativeMethod):
    """Alternates between ascent on the forget set and descent on the retained data, with the original as the teacher.

    The first ``msteps`` epochs begin with one pass over the forget set that ascends ``KL(teacher || student)``; then, as
    in all later epochs, passes over the retained data descend ``alpha KL(teacher || student) + gamma L_r``, with the
    module's own loss ``L_r``. A student equal to its teacher has a divergence of 0 with gradient 0: a network without
    dropout or BatchNorm first moves on the retained data, so it takes at least two such passes.

    Rewinding (SCRUB+R) undoes too much forgetting, which can be seen as such by an attacker: after each epoch the
    error on the forget set is measured and the weights are kept in memory and in checkpoints. At the end of the fit, the
    last weights' error on the validation samples with labels that the forget set has (of token labels: on all of them)
    stands in for that of a model that never saw the forget set, and the weights of the epoch whose forget error was
    closest to it are put back (the earliest of equals). Labels of -100 count nowhere. ``ResumableCheckpoint`` saves after that; a ModelCheckpoint's
    files hold the last epoch's weights.

    Logs ``train/forget_kl`` and ``train/forget_loss``, or ``train/retain_kl`` and ``train/retain_loss``;
    rewinding, also ``train/forget_error`` per epoch.

    Args:
        checkpoint: The trained model; None if the module that is passed to ``trainer.fit`` has the trained weights.
        alpha: Weight of the divergence on retained data, at least 0.
        gamma: Weight of ``L_r``, at least 0.
        msteps: Epochs that begin with a pass over the forget set; 0 never ascends.
        temperature: Of both softmaxes, above 0; divergences are multiplied by its square.
        rewind: Put back the epoch that forgot as much as held-out data suggests.
        source: Where logits and labels are found; by default the module's ``forward`` and the usual places.

    Attributes:
        forget_errors: Error on the forget set after each epoch, if rewinding.
        rewound_to: The epoch, from 0, whose weights were put back; None before.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At setup, if there is no validation data to rewind by.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[SCRUB(msteps=2)], max_epochs=5, logger=False, enable_checkpointing=False)

    Reference:
        Kurmanji et al., "Towards Unbounded Machine Unlearning", NeurIPS 2023. arXiv:2302.09880
    """

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        alpha: float = 0.5,
        gamma: float = 1.0,
        msteps: int = 2,
        temperature: float = 1.0,
        rewind: bool = False,
        source: LogitsSource | None = None,
    ) -> None:
        super().__init__(checkpoint)
        if not 0 <= alpha < math.inf or not 0 <= gamma < math.inf:
            raise ValueError(f"`alpha` and `gamma` must be at least 0 and finite, got {alpha} and {gamma}.")
        if msteps < 0:
            raise ValueError(f"`msteps` must be at least 0, got {msteps}.")
        if not 0 < temperature < math.inf:
            raise ValueError(f"`temperature` must be above 0 and finite, got {temperature}.")
        self.alpha = alpha
        self.gamma = gamma
        self.msteps = msteps
        self.temperature = temperature
        self.rewind = rewind
        self.source = source or LogitsSource()
        self.forget_errors: list[float] = []
        self.rewound_to: int | None = None
        self._kept: list[dict[str, Tensor]] = []

    @override
    def settings(self) -> dict[str, Any]:
        names = ("alpha", "gamma", "msteps", "temperature", "rewind")
        return {name: getattr(self, name) for name in names}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.data.serve("forget", "retain", in_turn=self.msteps)
            self.forget_errors, self._kept, self.rewound_to = [], [], None
            if self.rewind and not any(bool(counted(y).any()) for _, y in self._held_out(trainer)):
                raise MisconfigurationException(
                    "SCRUB(rewind=True) needs validation samples with the labels of the forget set, and there is none: "
                    "give the datamodule validation data, or set rewind=False."
                )

    @override
    def around_step(self, step: Step, batch: Any) -> Any:
        part = "forget" if "forget" in batch else "retain"
        reading = read_step(step, batch[part], self.pl_module, self.source)
        if reading is None:
            return None
        assert self.original is not None
        teacher = original_logits(self.original, reading, self.source)
        each = kl_to_teacher(reading.logits, teacher, self.temperature, reading.labels)
        kl = each.sum() / counted_records(reading.labels).sum().clamp_min(1)
        own_loss = loss_of(reading.output)
        found = {f"{part}_kl": kl, f"{part}_loss": own_loss}
        # what is not logged anew would be logged again with its old value
        self.log_terms(**{name: found.get(name, kl.new_tensor(math.nan)) for name in _LOGGED})
        loss = -kl if part == "forget" else self.alpha * kl + self.gamma * own_loss
        return with_loss(reading.output, self.checked(loss))

    # ---------------------------------------------------------------- rewinding

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.rewind:
            return
        wrong, total = count_errors(trainer, pl_module, self.data.batches("forget"), self.source).tolist()
        self.forget_errors.append(wrong / total)
        self._kept.append({name: value.detach().cpu().clone() for name, value in pl_module.state_dict().items()})
        pl_module.log("train/forget_error", wrong / total)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.rewind and self._kept:
            self._rewind(trainer, pl_module)
        super().on_train_end(trainer, pl_module)

    def _rewind(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        counts = count_errors(trainer, pl_module, self._held_out(trainer), self.source)
        wrong, total = trainer.strategy.reduce(counts.float().to(pl_module.device), reduce_op="sum").tolist()
        gaps = [abs(error - wrong / total) for error in self.forget_errors]
        self.rewound_to = trainer.strategy.broadcast(min(range(len(gaps)), key=gaps.__getitem__))
        pl_module.load_state_dict(self._kept[self.rewound_to])
        self._kept = []
        rank_zero_info(
            f"SCRUB rewinds to epoch {self.rewound_to}: its error on the forget set, "
            f"{self.forget_errors[self.rewound_to]:.3f}, is the closest to {wrong / total:.3f} on held-out data."
        )
        if any(not isinstance(keeper, ResumableCheckpoint) for keeper in trainer.checkpoint_callbacks):
            rank_zero_warn(
                "The checkpoints of ModelCheckpoint were written before SCRUB's rewinding and hold other weights: save "
                "the result with `trainer.save_checkpoint`, or use ResumableCheckpoint."
            )

    def _held_out(self, trainer: pl.Trainer) -> Iterator[Any]:
        """Validation batches, reduced to samples with a label of the forget set."""
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        if not is_overridden("val_dataloader", datamodule):
            return
        labels = torch.cat([y[counted_records(y)] for _, y in self.data.batches("forget")])
        loaders: Any = datamodule.val_dataloader()
        for loader in loaders if isinstance(loaders, list | tuple) else [loaders]:
            yield from _with_labels(loader, labels) if labels.ndim == 1 else loader

    # ---------------------------------------------------------------- checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"forget_errors": list(self.forget_errors), "epochs": list(self._kept)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.forget_errors, self._kept = list(state_dict["forget_errors"]), list(state_dict["epochs"])


def _with_labels(loader: Iterable[Any], labels: Tensor) -> Iterator[Any]:
    for x, y in loader:
        rows = torch.isin(y, labels)
        if rows.any():
            yield x[rows], y[rows]
