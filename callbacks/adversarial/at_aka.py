"""AT-AKA: adaptive knowledge amalgamation of robust teachers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from groundwire.callbacks.adversarial.attacks import SVGD
from groundwire.callbacks.adversarial.callback import AdversarialCallback
from groundwire.callbacks.adversarial.functional import (
    TeacherWeights,
    amalgamate,
    cross_entropy,
    kl_divergence,
    teacher_weights,
)
from groundwire.callbacks.adversarial.threat import ThreatModel
from groundwire.callbacks.logits import LogitsSource
from groundwire.callbacks.step import is_logging_step
from groundwire.callbacks.teacher import Teacher


class AdaptiveKnowledgeAmalgamation(AdversarialCallback):
    """Trains a robust student on particles of adversarial inputs, with the logits of several robust teachers made one.

    SVGD finds one particle for each of ``M`` teachers; teacher ``m`` sees particle ``m``; their logits are averaged with
    weights that each sample sets anew (a teacher that is wrong on it counts little), and the student learns
    ``L = (1 - kappa) mean_m CE(S(x_m), y) + kappa T^2 mean_m D(softmax(t / T) || softmax(S(x_m) / T)) + eta own loss``.
    Costs ``M num_steps + M + 1`` forward and backward passes a step, and the teachers' ``M`` forward passes.

    The teachers belong neither to the student's state dict nor to its optimizer; checkpoints hold fingerprints of their
    weights, against which a resumed run checks those that it is given.

    Logs ``at_aka/ce``, ``at_aka/kl`` (nats, unweighted), ``at_aka/robust_acc`` (of the student on its particles),
    ``at_aka/teacher_acc`` (of the amalgam) and ``at_aka/weight_<m>``, each teacher's mean weight.

    Args:
        threat: What the attacker may do.
        teachers: The trained networks, or ones of the right architectures whose weights are in ``checkpoints``.
        checkpoints: Lightning checkpoints of the teachers, or folders of their runs, one for each. Without ``teachers``
            each must name the class that wrote it.
        kappa: Share of the teachers in the loss, in [0, 1].
        temperature: ``T`` of both outputs in the divergence, positive.
        eta: Weight of the module's own loss on the clean batch, at least 0.
        weights: How teachers are weighed; see :func:`teacher_weights`.
        weight_temperature: Of the softmax over teachers, positive.
        standardize: Bring the teachers' logits to one scale before they are averaged.
        attack: How particles are found; by default ``SVGD(num_particles=M)``.
        teacher_inputs: From the student's inputs to each teacher's, where normalisation differs; one for all or one each.
        warmup_epochs: Epochs in which the radius grows from 0.
        source: Where the student's logits and the labels are found.
        seed: Of random starts; by default that of ``seed_everything``.
        name: Under which it logs and keeps its state.

    Raises:
        ValueError: If an argument is out of range, or numbers of teachers, checkpoints and particles differ.
        MisconfigurationException: If there is no teacher, or one does not fit the student.
        FileNotFoundError: At setup, if a checkpoint is not there.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> teachers = [nn.Linear(4, 3), nn.Linear(4, 3)]
        >>> callback = AdaptiveKnowledgeAmalgamation(ThreatModel(eps=0.1), teachers)
        >>> trainer = Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)

    Reference:
        Mohajer Hamidi, Ye, "Adversarial Training via Adaptive Knowledge Amalgamation of an Ensemble of Teachers", 2024.
        arXiv:2405.13324
    """

    def __init__(
        self,
        threat: ThreatModel,
        teachers: Sequence[nn.Module] | None = None,
        checkpoints: Sequence[str | Path] | None = None,
        kappa: float = 0.7,
        temperature: float = 4.0,
        eta: float = 0.2,
        weights: TeacherWeights = "loss",
        weight_temperature: float = 1.0,
        standardize: bool = False,
        attack: SVGD | None = None,
        teacher_inputs: Callable[[Any], Any] | Sequence[Callable[[Any], Any]] | None = None,
        warmup_epochs: float = 0.0,
        source: LogitsSource | None = None,
        seed: int | None = None,
        name: str = "at_aka",
    ) -> None:
        super().__init__(threat, warmup_epochs, source, seed, name)
        if not 0 <= kappa <= 1:
            raise ValueError(f"`kappa` must be in [0, 1], got {kappa}.")
        if not temperature > 0:
            raise ValueError(f"`temperature` must be positive, got {temperature}.")
        if not eta >= 0:
            raise ValueError(f"`eta` must be at least 0, got {eta}.")
        if weights not in ("loss", "margin", "entropy", "uniform"):
            raise ValueError(f"`weights` must be 'loss', 'margin', 'entropy' or 'uniform', got {weights!r}.")
        if not weight_temperature > 0:
            raise ValueError(f"`weight_temperature` must be positive, got {weight_temperature}.")
        self.teachers = _build_teachers(teachers, checkpoints, teacher_inputs)
        number = len(self.teachers)
        self.attack = attack or SVGD(num_particles=number)
        if self.attack.num_restarts != number:
            raise ValueError(
                f"Each teacher sees a particle of its own, but there are {number} teachers and "
                f"{self.attack.num_restarts} particles: SVGD(num_particles={number})."
            )
        if number == 1:
            rank_zero_warn("AdaptiveKnowledgeAmalgamation has one teacher: this is plain robust distillation.")
        self.kappa = kappa
        self.temperature = temperature
        self.eta = eta
        self.own_loss_weight = eta if eta != 1 else None
        self.weights: TeacherWeights = weights
        self.weight_temperature = weight_temperature
        self.standardize = standardize
        self._fingerprints: list[str] | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            for teacher in self.teachers:
                teacher.prepare(pl_module, trainer.strategy.root_device)
            self._fingerprints = [teacher.fingerprint() for teacher in self.teachers]
        super().setup(trainer, pl_module, stage)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._release()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._release()

    def _release(self) -> None:
        for teacher in reversed(self.teachers):  # one network may be several teachers: its flags of before come last
            teacher.release()

    @override
    def total_loss(self, own_loss: Tensor, logits: Tensor, target: Tensor, inputs: Any) -> Tensor:
        points = self.run_search(self.attack, inputs, target)
        student = self.particle_logits(points)
        taught = self._teacher_logits(points, student.shape[-1])
        weights = teacher_weights(taught, target, self.weights, self.weight_temperature)
        amalgam = amalgamate(taught, weights, self.standardize)
        ce = cross_entropy(student, target).mean()
        kl = kl_divergence(amalgam / self.temperature, student / self.temperature).mean()
        if is_logging_step(self.trainer):
            right = (student.argmax(dim=-1) == target).to(ce.dtype).mean()
            teacher_right = (amalgam.argmax(dim=-1) == target).to(ce.dtype).mean()
            shares = {f"weight_{m}": weights[m].mean() for m in range(len(self.teachers))}
            self.log_terms({"ce": ce, "kl": kl, "robust_acc": right, "teacher_acc": teacher_right} | shares)
        return (1 - self.kappa) * ce + self.kappa * self.temperature**2 * kl + self.eta * own_loss

    def _teacher_logits(self, points: Tensor, num_classes: int) -> Tensor:
        found = []
        for m, teacher in enumerate(self.teachers):
            with self.trainer.precision_plugin.forward_context():
                logits = self.source.as_logits(teacher(points[m]))
            if logits.shape != (points.shape[1], num_classes):
                raise MisconfigurationException(
                    f"Teacher {m} gives {tuple(logits.shape)} for {points.shape[1]} inputs and the student has "
                    f"{num_classes} classes: logits are averaged class by class. Use teachers of the same classes."
                )
            found.append(logits if logits.dtype == torch.float64 else logits.float())
        return torch.stack(found)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"teachers": self._fingerprints}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._fingerprints is not None and state_dict["teachers"] not in (None, self._fingerprints):
            raise MisconfigurationException(
                "The checkpoint was written with other teachers (their weights differ, or their order). Resume with the "
                "same ones."
            )


def _build_teachers(
    teachers: Sequence[nn.Module] | None,
    checkpoints: Sequence[str | Path] | None,
    inputs: Callable[[Any], Any] | Sequence[Callable[[Any], Any]] | None,
) -> list[Teacher]:
    number = len(teachers or checkpoints or [])
    if not number:
        raise MisconfigurationException(
            "Teachers are needed: give trained networks as `teachers`, networks and their `checkpoints`, or `checkpoints` "
            "alone whose modules called `save_hyperparameters()` under LightningCLI."
        )
    if teachers and checkpoints and len(checkpoints) != number:
        raise ValueError(f"There are {number} teachers and {len(checkpoints)} checkpoints: one for each.")
    maps = [inputs] * number if callable(inputs) or inputs is None else list(inputs)
    if len(maps) != number:
        raise ValueError(f"There are {number} teachers and {len(maps)} `teacher_inputs`: one for all, or one for each.")
    return [
        Teacher(teachers[m] if teachers else None, checkpoints[m] if checkpoints else None, maps[m])
        for m in range(number)
    ]
