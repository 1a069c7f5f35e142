"""Negative preference optimization."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override

from groundwire.callbacks.logits import LogitsSource
from groundwire.callbacks.step import Step, loss_of
from groundwire.callbacks.unlearning.base import IterativeMethod
from groundwire.callbacks.unlearning.functional import npo_loss, record_nll
from groundwire.callbacks.unlearning.reading import original_logits, read_step


class NPO(IterativeMethod):
    """Trains with ``(2 / beta) mean log(1 + (pi / pi_ref)^beta) + alpha L_r``.

    ``pi`` is the probability that the model gives to the label of a forget record, ``pi_ref`` that of the original
    model for the same inputs; of a sequence, that of all its tokens. Ascent, like :class:`GradientAscent`, that lets go
    of a record once it is forgotten: the loss is bounded. ``L_r`` is the module's own loss on the retained data.

    Logs ``train/npo``, ``train/forget_loss`` and ``train/retain_loss`` (the module's own losses).

    Args:
        checkpoint: The trained model; None if the module that is passed to ``trainer.fit`` has the trained weights.
        beta: Inverse temperature, above 0; the smaller, the closer to gradient ascent.
        alpha: Weight of ``L_r``, at least 0; at 0 retained data is not touched.
        source: Where logits and labels are found; by default the module's ``forward`` and the usual places.

    Raises:
        ValueError: If ``beta`` or ``alpha`` is out of range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[NPO(beta=0.1)], max_epochs=5, logger=False, enable_checkpointing=False)

    Reference:
        Zhang et al., "Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning", 2024.
        arXiv:2404.05868
    """

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        beta: float = 0.1,
        alpha: float = 1.0,
        source: LogitsSource | None = None,
    ) -> None:
        super().__init__(checkpoint)
        if not 0 < beta < math.inf:
            raise ValueError(f"`beta` must be above 0 and finite, got {beta}; GradientAscent is its limit at 0.")
        if not 0 <= alpha < math.inf:
            raise ValueError(f"`alpha` must be at least 0 and finite, got {alpha}.")
        self.beta = beta
        self.alpha = alpha
        self.source = source or LogitsSource()

    @override
    def settings(self) -> dict[str, Any]:
        return {"beta": self.beta, "alpha": self.alpha}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.alpha == 0:
            self.data.serve("forget")

    @override
    def around_step(self, step: Step, batch: Any) -> Any:
        forget = read_step(step, batch["forget"], self.pl_module, self.source)
        if forget is None:
            return None
        assert self.original is not None
        reference = record_nll(original_logits(self.original, forget, self.source), forget.labels)
        loss = npo_loss(record_nll(forget.logits, forget.labels), reference, self.beta)
        self.log_terms(npo=loss, forget_loss=loss_of(forget.output))
        return self.with_retained(step, batch, forget.output, loss, self.alpha)
