"""Label smoothing, the baseline that a knock-off student has to beat."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from groundwire.callbacks.classifier import ClassifierCallback
from groundwire.callbacks.information.functional import log_probs
from groundwire.callbacks.logits import LogitsSource
from groundwire.callbacks.step import is_logging_step


class LabelSmoothing(ClassifierCallback):
    """Trains with cross entropy against ``(1 - eps) onehot + eps / C`` instead of the module's own loss.

    Logs ``label_smoothing/loss``.

    Args:
        smoothing: Share ``eps`` of the uniform distribution, in [0, 1).
        source: Where logits and labels are found.
        name: Under which it logs and keeps its state.

    Raises:
        ValueError: If ``smoothing`` is out of range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LabelSmoothing(0.1)], logger=False, enable_checkpointing=False)

    Reference:
        Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016, Section 7.
        arXiv:1512.00567
    """

    own_loss_weight = 0.0

    def __init__(
        self, smoothing: float = 0.1, source: LogitsSource | None = None, name: str = "label_smoothing"
    ) -> None:
        super().__init__(source, name)
        if not 0 <= smoothing < 1:
            raise ValueError(f"`smoothing` must be in [0, 1), got {smoothing}.")
        self.smoothing = smoothing

    @override
    def total_loss(self, own_loss: Tensor, logits: Tensor, target: Tensor, inputs: Any) -> Tensor:
        log_p = log_probs(logits)
        loss = (1 - self.smoothing) * F.nll_loss(log_p, target) - self.smoothing * log_p.mean(dim=-1).mean()
        if is_logging_step(self.trainer):
            self.log_terms({"loss": loss})
        return loss + 0.0 * own_loss
