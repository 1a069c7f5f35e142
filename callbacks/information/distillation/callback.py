"""Distillation as a callback."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from groundwire.callbacks.classifier import ClassifierCallback, epochs_done
from groundwire.callbacks.information.distillation.methods import KD, DistillationMethod
from groundwire.callbacks.logits import LogitsSource, check_values
from groundwire.callbacks.step import is_logging_step
from groundwire.callbacks.teacher import Teacher
from groundwire.plugins.edge import DeviceBatch


class Distillation(ClassifierCallback):
    """Trains a student with ``ce_weight`` times its own loss plus what it has to learn from a teacher.

    The teacher sees what the student's ``forward`` does, augmentation inside the step and outer callbacks included (or
    the batch's inputs, if ``source`` names a submodule or says how to unpack), once a batch, in evaluation mode and
    without gradients. It belongs neither to the student's state dict nor to its optimizer;
    checkpoints hold a fingerprint of its weights, against which a resumed run checks the teacher that it is given.

    Before the first step the teacher is tried on the first batch: one with another number of classes is refused, and one
    that is right no more often than by chance. Inputs that were normalised otherwise can cost a teacher that much or less:
    watch ``distillation/teacher_acc``.

    Logs the unweighted terms as ``distillation/<term>`` and the share of the batch on which the teacher is right as
    ``distillation/teacher_acc``.

    Args:
        teacher: The trained network, or one of the right architecture whose weights are in ``checkpoint``.
        checkpoint: A Lightning checkpoint of the teacher, or the folder of its run. Alone, it must name the class that
            wrote it (``save_hyperparameters()`` under LightningCLI).
        method: How the student learns; by default :class:`KD`.
        teacher_inputs: From the student's inputs to the teacher's, where their normalisation differs.
        check_teacher: Refuse a teacher that is right no more often than by chance.
        source: Where the student's logits and the labels are found.
        name: Under which it logs and keeps its state: of several teachers, each needs its own.

    Raises:
        MisconfigurationException: If there is no teacher, or it does not fit the student.
        FileNotFoundError: At setup, if there is no checkpoint.
        ValueError: At setup, if the checkpoint does not fit the network.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> teacher = nn.Linear(4, 3)
        >>> callback = Distillation(teacher, method=KD(temperature=2.0))
        >>> trainer = Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)

    Reference:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015. arXiv:1503.02531
    """

    def __init__(
        self,
        teacher: nn.Module | None = None,
        checkpoint: str | Path | None = None,
        method: DistillationMethod | None = None,
        teacher_inputs: Callable[[Any], Any] | None = None,
        check_teacher: bool = True,
        source: LogitsSource | None = None,
        name: str = "distillation",
    ) -> None:
        super().__init__(source, name)
        self.teacher = Teacher(teacher, checkpoint, teacher_inputs)
        self.method = method or KD()
        self.own_loss_weight = self.method.ce_weight if self.method.ce_weight != 1 else None
        self.check_teacher = check_teacher
        self._tried = False
        self._fingerprint: str | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.teacher.prepare(pl_module, trainer.strategy.root_device)
            self._fingerprint = self.teacher.fingerprint()
            self._tried = False
        super().setup(trainer, pl_module, stage)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self.teacher.release()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self.teacher.release()

    @property
    @override
    def epochs_needed_for(self) -> str | None:
        warmup = getattr(self.method, "warmup_epochs", 0)
        return f"{type(self.method).__name__}(warmup_epochs={warmup})" if warmup else None

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._tried:
            return
        self._tried = True
        counts, num_classes = torch.zeros(2, device=pl_module.device), 2
        for part in [batch.row(i) for i in range(len(batch))] if isinstance(batch, DeviceBatch) else [batch]:
            inputs, labels = self.source.inputs_and_labels(part)
            with trainer.precision_plugin.forward_context():
                logits = self.teacher(inputs)
            try:
                logits, target = self.source.prepare(logits, labels, check=False)  # the check is the student's
                check_values(logits, target, warn=False)
            except ValueError as error:
                raise MisconfigurationException(f"The teacher does not fit the data: {error}") from error
            correct = logits.argmax(dim=1) == target
            counts += torch.stack([correct.sum(), torch.tensor(len(target), device=counts.device)])
            num_classes = logits.shape[1]
        right, samples = (int(count) for count in trainer.strategy.reduce(counts, reduce_op="sum"))
        if self.check_teacher and looks_like_chance(right, samples, num_classes):
            raise MisconfigurationException(
                f"The teacher is right on {right} of the first {samples} training samples, which is no better than "
                f"chance for {num_classes} classes. Has it learned the same classes, and is its input normalised like the "
                "student's? If not, pass `teacher_inputs`. Is it trained? Pass `checkpoint`. To go on all the same, "
                "check_teacher=False."
            )

    @override
    def total_loss(self, own_loss: Tensor, logits: Tensor, target: Tensor, inputs: Any) -> Tensor:
        with self.trainer.precision_plugin.forward_context():
            raw = self.teacher(inputs)
        teacher, _ = self.source.prepare(raw, target, check=False)
        if teacher.shape[-1] != logits.shape[-1]:
            raise MisconfigurationException(
                f"The teacher has {teacher.shape[-1]} classes and the student {logits.shape[-1]}: distillation compares "
                "outputs class by class. Use a teacher of the same classes."
            )
        terms = self.method.terms(logits, teacher, target, int(epochs_done(self.trainer)))
        if is_logging_step(self.trainer):
            right = (teacher.argmax(dim=1) == target).to(logits.dtype).mean()
            self.log_terms({name: term.value for name, term in terms.items()} | {"teacher_acc": right})
        loss = self.method.ce_weight * own_loss
        for weight, value in terms.values():
            loss = loss + weight * value
        return loss

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"teacher": self._fingerprint}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._fingerprint is not None and state_dict["teacher"] not in (None, self._fingerprint):
            raise MisconfigurationException(
                f"The checkpoint was written with another teacher (SHA-256 {state_dict['teacher'][:12]}, now "
                f"{self._fingerprint[:12]}). Resume with the same one."
            )


def looks_like_chance(right: int, samples: int, num_classes: int) -> bool:
    """Whether right answers are no more than a guesser has, where so few samples can tell it from a good teacher.

    Args:
        right: Right answers.
        samples: Samples ``n``.
        num_classes: Classes ``C``.

    Returns:
        True if ``right`` is at most the mean plus three standard deviations of the binomial ``(n, 1/C)``, provided that
        a teacher of 75 % accuracy would be above that by three standard deviations of its own.

    Example:
        >>> looks_like_chance(20, 128, 10), looks_like_chance(60, 128, 10), looks_like_chance(1, 4, 10)
        (True, False, False)
    """
    guesser = samples / num_classes + 3 * math.sqrt(samples * (1 - 1 / num_classes) / num_classes)
    decent = 0.75 * samples - 3 * math.sqrt(samples * 0.75 * 0.25)
    return right <= guesser < decent
