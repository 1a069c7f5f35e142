"""Ascent on the loss of the forget set, alone or against descent on that of the retained data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
from lightning_utilities.core.rank_zero import rank_zero_info
from typing_extensions import override

from groundwire.callbacks.logits import LogitsSource
from groundwire.callbacks.step import Notes, Step, loss_of, with_loss
from groundwire.callbacks.unlearning.base import IterativeMethod, chance_level
from groundwire.callbacks.unlearning.data import Part
from groundwire.callbacks.unlearning.reading import num_classes_of


class GradientAscent(IterativeMethod):
    """Trains with ``-L_f``, the negative of the module's own loss on the forget set; retained data is not touched.

    The loss has no lower bound, so the fit is ended once a batch of the forget set is predicted no better than by
    guessing; on several processes by the mean over them. The batch is looked at before its step, which is still taken.
    Logs ``train/forget_loss``.

    Args:
        checkpoint: The trained model; None if the module that is passed to ``trainer.fit`` has the trained weights.
        max_forget_loss: Ends the fit once ``L_f`` of a batch is at least this (in the unit of the module's loss).
            ``"chance"`` is the cross-entropy of uniform guessing over the classes that the module has outputs for,
            ``log C`` nats; None goes on for as long as the Trainer does.
        source: Where the module's outputs are found, to count the classes.

    Raises:
        ValueError: If ``max_forget_loss`` is another word.
        MisconfigurationException: In the first step, if ``"chance"`` finds no outputs.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> method = GradientAscent(max_forget_loss=3.0)
        >>> trainer = Trainer(callbacks=[method], max_epochs=1, logger=False, enable_checkpointing=False)

    Reference:
        Golatkar et al., "Eternal Sunshine of the Spotless Net: Selective Forgetting in Deep Networks", CVPR 2020.
        arXiv:1911.04933
    """

    parts: ClassVar[tuple[Part, ...]] = ("forget",)

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        max_forget_loss: Literal["chance"] | float | None = "chance",
        source: LogitsSource | None = None,
    ) -> None:
        super().__init__(checkpoint)
        if isinstance(max_forget_loss, str) and max_forget_loss != "chance":
            raise ValueError(f"`max_forget_loss` must be 'chance', a number or None, got {max_forget_loss!r}.")
        if isinstance(max_forget_loss, int | float) and not 0 < max_forget_loss < math.inf:
            raise ValueError(f"`max_forget_loss` must be positive and finite, got {max_forget_loss}; None never stops.")
        self.max_forget_loss = max_forget_loss
        self.source = source or LogitsSource()
        self.has_stopped = False
        self._limit: float | None = None

    @override
    def settings(self) -> dict[str, Any]:
        return {"max_forget_loss": self.max_forget_loss}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.has_stopped = False
            self._limit = None if isinstance(self.max_forget_loss, str) else self.max_forget_loss
        super().setup(trainer, pl_module, stage)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.has_stopped:  # in the run that is resumed
            trainer.should_stop = True

    @override
    def around_step(self, step: Step, batch: Any) -> Any:
        if self.max_forget_loss == "chance" and self._limit is None:
            with self.source.open(self.pl_module) as calls:
                output = step(batch["forget"])
            self._limit = chance_level(num_classes_of(self.source.logits(calls), self.source))
        else:
            output = step(batch["forget"])
        if output is None:
            return None
        loss = loss_of(output)
        self.note(forget_loss=loss)
        self.log_terms(forget_loss=loss)
        return with_loss(output, self.checked(-loss))

    @override
    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, notes: Notes) -> None:
        if self._limit is None:
            return
        loss = float(trainer.strategy.reduce(notes["forget_loss"].mean(), reduce_op="mean"))
        if loss >= self._limit and not self.has_stopped:
            rank_zero_info(f"{self.name} stops: the loss on the forget set is {loss:.3g}, at least {self._limit:.3g}.")
            self.has_stopped = True
        trainer.should_stop |= self.has_stopped

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"has_stopped": self.has_stopped}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.has_stopped = state_dict["has_stopped"]


class GradDiff(IterativeMethod):
    """Gradient difference: trains with ``L_r - gamma L_f``, both the module's own losses.

    ``-L_f`` has no lower bound: with a large ``gamma``, or for long, it wins, and the model is ruined. Logs
    ``train/forget_loss`` and ``train/retain_loss``.

    Args:
        checkpoint: The trained model; None if the module that is passed to ``trainer.fit`` has the trained weights.
        gamma: Weight of the ascent on the forget set, at least 0; at 0 it is :class:`FineTune`.

    Raises:
        ValueError: If ``gamma`` is negative.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[GradDiff(gamma=0.3)], max_epochs=5, logger=False, enable_checkpointing=False)

    Reference:
        Liu, Liu, Stone, "Continual Learning and Private Unlearning", CoLLAs 2022. arXiv:2203.12817
    """

    def __init__(self, checkpoint: str | Path | None = None, gamma: float = 1.0) -> None:
        super().__init__(checkpoint)
        if not 0 <= gamma < math.inf:
            raise ValueError(
                f"`gamma` must be at least 0 and finite, got {gamma}: the sign of the ascent is in the method."
            )
        self.gamma = gamma

    @override
    def settings(self) -> dict[str, Any]:
        return {"gamma": self.gamma}

    @override
    def around_step(self, step: Step, batch: Any) -> Any:
        forget, retain = step(batch["forget"]), step(batch["retain"])
        if forget is None or retain is None:
            return None
        forget_loss, retain_loss = loss_of(forget), loss_of(retain)
        self.log_terms(forget_loss=forget_loss, retain_loss=retain_loss)
        return with_loss(retain, self.checked(retain_loss - self.gamma * forget_loss))
