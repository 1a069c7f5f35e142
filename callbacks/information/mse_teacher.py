"""A teacher trained with squared error, whose outputs estimate the Bayes posterior."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from typing_extensions import override

from groundwire.callbacks.classifier import ClassifierCallback, epochs_done
from groundwire.callbacks.information.functional import brier_score
from groundwire.callbacks.logits import LogitsSource
from groundwire.callbacks.step import is_logging_step


class SquaredErrorTeacher(ClassifierCallback):
    """Trains with the squared error of the output distribution instead of the module's own loss.

    ``E ||p - onehot||^2 = E ||p - p*||^2 + const`` with the Bayes posterior ``p*``: minimising it fits what a student
    learns best from. The module's own loss is still computed and logged by the module. Logs ``mse_teacher/brier``.

    Args:
        mix: Weight of the module's own loss, added to the squared error; 0 replaces it.
        reduction: ``"sum_classes"``, or ``"mean"`` over the classes, which is ``C`` times smaller.
        ce_epochs: Epochs at the start that train with the module's own loss alone: the gradient of the squared error
            vanishes where the network is confidently wrong.
        source: Where logits and labels are found. Labels may be distributions ``(B, C)``.
        name: Under which it logs and keeps its state.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[SquaredErrorTeacher()], logger=False, enable_checkpointing=False)

    Reference:
        Mohajer Hamidi, Deng, Tan, Ye, Salamah, "How to Train the Teacher Model for Effective Knowledge Distillation",
        ECCV 2024. arXiv:2407.18041
    """

    accepts_soft_labels = True

    def __init__(
        self,
        mix: float = 0.0,
        reduction: Literal["sum_classes", "mean"] = "sum_classes",
        ce_epochs: int = 0,
        source: LogitsSource | None = None,
        name: str = "mse_teacher",
    ) -> None:
        super().__init__(source, name)
        if mix < 0 or ce_epochs < 0:
            raise ValueError(f"`mix` and `ce_epochs` must be at least 0, got {mix} and {ce_epochs}.")
        if reduction not in ("sum_classes", "mean"):
            raise ValueError(f"`reduction` must be 'sum_classes' or 'mean', got {reduction!r}.")
        self.mix = mix
        self.own_loss_weight = mix if mix != 1 else None
        self.reduction: Literal["sum_classes", "mean"] = reduction
        self.ce_epochs = ce_epochs

    @property
    @override
    def epochs_needed_for(self) -> str | None:
        return f"ce_epochs={self.ce_epochs}" if self.ce_epochs else None

    @override
    def total_loss(self, own_loss: Tensor, logits: Tensor, target: Tensor, inputs: Any) -> Tensor:
        brier = brier_score(logits, target, self.reduction)
        if is_logging_step(self.trainer):
            self.log_terms({"brier": brier})
        if epochs_done(self.trainer) < self.ce_epochs:
            return own_loss
        return brier + self.mix * own_loss  # also at 0: parameters of the own loss alone get a zero gradient, not none
