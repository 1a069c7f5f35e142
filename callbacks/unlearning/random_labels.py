"""Training on wrong labels: amnesiac unlearning."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from groundwire.callbacks.logits import LogitsSource
from groundwire.callbacks.step import Step, loss_of
from groundwire.callbacks.unlearning.base import IterativeMethod
from groundwire.callbacks.unlearning.functional import wrong_labels
from groundwire.callbacks.unlearning.reading import num_classes_of, raw_logits
from groundwire.plugins.random import root_seed, stream

_DRAWN = "wrong_labels"  # entry of the batch: it is split over devices with the rest


class RandomLabels(IterativeMethod):
    """Trains with the module's own loss on the forget inputs under random wrong labels, plus ``alpha L_r``.

    The labels are uniform over the other classes (tokens), and drawn anew in every step. They depend on the seed, the step
    and the process alone. Logs ``train/wrong_label_loss`` and ``train/retain_loss``.

    Args:
        checkpoint: The trained model; None if the module that is passed to ``trainer.fit`` has the trained weights.
        num_classes: Classes to draw from; by default as many as the module has outputs.
        alpha: Weight of ``L_r``, at least 0; at 0 retained data is not touched.
        source: Where the module's outputs are found, to count the classes.
        seed: Root seed of the labels; by default that of ``seed_everything``, else 0.

    Raises:
        ValueError: If ``num_classes`` is below 2 or ``alpha`` negative.
        MisconfigurationException: In the first step, if the batch is no tuple or list of inputs and class labels.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> method = RandomLabels(seed=0)
        >>> trainer = Trainer(callbacks=[method], max_epochs=5, logger=False, enable_checkpointing=False)

    Reference:
        Graves, Nagisetty, Ganesh, "Amnesiac Machine Learning", AAAI 2021. arXiv:2010.10981
    """

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        num_classes: int | None = None,
        alpha: float = 1.0,
        source: LogitsSource | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(checkpoint)
        if num_classes is not None and num_classes < 2:
            raise ValueError(f"`num_classes` must be at least 2, got {num_classes}.")
        if not 0 <= alpha < math.inf:
            raise ValueError(f"`alpha` must be at least 0 and finite, got {alpha}.")
        self.num_classes = num_classes
        self.alpha = alpha
        self.source = source or LogitsSource()
        self.seed = seed
        self._root_seed = 0
        self._classes: int | None = None

    @override
    def settings(self) -> dict[str, Any]:
        return {"num_classes": self.num_classes, "alpha": self.alpha, "seed": self._root_seed}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._root_seed, self._classes = root_seed(self.seed), None
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.alpha == 0:
            self.data.serve("forget")

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        forget = batch["forget"]
        if not isinstance(forget, tuple | list) or len(forget) < 2 or not isinstance(forget[1], Tensor):
            raise MisconfigurationException(
                f"RandomLabels puts other labels into a batch, which has to be a tuple or list (inputs, labels), got a "
                f"{type(forget).__name__}. Let the datamodule give such pairs."
            )
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        inputs, labels = forget[:2]
        if self._classes is None:
            self._classes = self._count_classes(inputs, labels)
        accumulated: int = trainer.accumulate_grad_batches
        generator = stream(
            self._root_seed,
            purpose="unlearning/wrong_labels",
            round=trainer.global_step * accumulated + batch_idx % accumulated,
            device_id=trainer.global_rank,
        )
        uniforms = torch.rand(labels.shape, generator=generator, dtype=torch.float64)
        batch[_DRAWN] = wrong_labels(labels, self._classes, uniforms.to(labels.device))

    def _count_classes(self, inputs: Any, labels: Tensor) -> int:
        if labels.is_floating_point() and not self.source.binary:
            raise MisconfigurationException(
                f"RandomLabels needs class labels, got {labels.dtype} of shape {list(labels.shape)}. For one logit and "
                "two classes: LogitsSource(binary=True)."
            )
        classes = self.num_classes
        if classes is None:
            assert self.original is not None
            with torch.no_grad(), self.trainer.precision_plugin.forward_context():
                classes = num_classes_of(raw_logits(self.original, inputs, self.source), self.source)
        if int(labels.max()) >= classes:
            raise MisconfigurationException(
                f"RandomLabels draws from {classes} classes, but there is a label {int(labels.max())}: give "
                "`num_classes`, or say by `source` where the module's outputs are."
            )
        return classes

    @override
    def around_step(self, step: Step, batch: Any) -> Any:
        forget = batch["forget"]
        relabelled = (forget[0], batch[_DRAWN], *forget[2:])
        output = step(list(relabelled) if isinstance(forget, list) else relabelled)
        if output is None:
            return None
        loss = loss_of(output)
        self.log_terms(wrong_label_loss=loss)
        return self.with_retained(step, batch, output, loss, self.alpha)

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"seed": self._root_seed}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if self.seed is None:
            self._root_seed = state_dict["seed"]
