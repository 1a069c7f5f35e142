"""How a student learns from a teacher's logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor
from typing_extensions import override

from groundwire.callbacks.information.distillation.functional import dist_terms, dkd_terms, kd_loss, ttm_loss


class DistillationTerm(NamedTuple):
    """One term of a distillation loss.

    Args:
        weight: By which it enters.
        value: Unweighted, a scalar.
    """

    weight: float
    value: Tensor


class DistillationMethod(ABC):
    """Terms that are added to ``ce_weight`` times the module's own loss.

    Args:
        ce_weight: Weight of the module's own loss, at least 0.

    Raises:
        ValueError: If a weight is negative.
    """

    def __init__(self, ce_weight: float) -> None:
        self.ce_weight = ce_weight
        self._not_negative("ce_weight", ce_weight)

    @abstractmethod
    def terms(self, student: Tensor, teacher: Tensor, target: Tensor, epoch: int) -> dict[str, DistillationTerm]:
        """The terms of one batch, by name.

        Args:
            student: Logits, shape ``(B, C)``.
            teacher: Logits, the same shape, without a graph.
            target: Labels, shape ``(B,)``.
            epoch: The current epoch, from 0.

        Returns:
            The terms.
        """

    def _not_negative(self, name: str, value: float) -> None:
        if not 0 <= value < float("inf"):
            raise ValueError(f"`{name}` of {type(self).__name__} must be at least 0, got {value}.")

    def _positive(self, name: str, value: float) -> None:
        if not 0 < value < float("inf"):
            raise ValueError(f"`{name}` of {type(self).__name__} must be above 0, got {value}.")


class KD(DistillationMethod):
    """Hinton's distillation: divergence of the softened outputs, times ``T^2``.

    Args:
        temperature: ``T``.
        ce_weight: Weight of the module's own loss.
        kd_weight: Weight of the divergence.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> KD(temperature=2.0).kd_weight
        0.9

    Reference:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015. arXiv:1503.02531
    """

    def __init__(self, temperature: float = 4.0, ce_weight: float = 0.1, kd_weight: float = 0.9) -> None:
        super().__init__(ce_weight)
        self._positive("temperature", temperature)
        self._not_negative("kd_weight", kd_weight)
        self.temperature = temperature
        self.kd_weight = kd_weight

    @override
    def terms(self, student: Tensor, teacher: Tensor, target: Tensor, epoch: int) -> dict[str, DistillationTerm]:
        return {"kd": DistillationTerm(self.kd_weight, kd_loss(student, teacher, self.temperature))}


class DKD(DistillationMethod):
    """Decoupled distillation: target-class and non-target-class knowledge with weights of their own.

    Args:
        temperature: ``T``.
        alpha: Weight of the target-class term.
        beta: Weight of the non-target-class term.
        ce_weight: Weight of the module's own loss.
        warmup_epochs: Epochs over which both terms grow linearly: ``min(epoch / warmup_epochs, 1)``, epochs from 1.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> DKD(beta=2.0).alpha
        1.0

    Reference:
        Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022. arXiv:2203.08679
    """

    def __init__(
        self,
        temperature: float = 4.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        ce_weight: float = 1.0,
        warmup_epochs: int = 20,
    ) -> None:
        super().__init__(ce_weight)
        self._positive("temperature", temperature)
        for name, value in (("alpha", alpha), ("beta", beta), ("warmup_epochs", warmup_epochs)):
            self._not_negative(name, value)
        self.temperature = temperature
        self.alpha = alpha
        self.beta = beta
        self.warmup_epochs = warmup_epochs

    @override
    def terms(self, student: Tensor, teacher: Tensor, target: Tensor, epoch: int) -> dict[str, DistillationTerm]:
        ramp = min((epoch + 1) / self.warmup_epochs, 1.0) if self.warmup_epochs else 1.0
        tckd, nckd = dkd_terms(student, teacher, target, self.temperature)
        return {
            "tckd": DistillationTerm(ramp * self.alpha, tckd),
            "nckd": DistillationTerm(ramp * self.beta, nckd),
        }


class DIST(DistillationMethod):
    """Distillation from a stronger teacher: correlations between and within classes instead of a divergence.

    Args:
        beta: Weight of the inter-class term.
        gamma: Weight of the intra-class term.
        temperature: Of both softmaxes; the terms are multiplied by ``T^2``.
        ce_weight: Weight of the module's own loss.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> DIST(beta=2.0, gamma=2.0, temperature=4.0).ce_weight
        1.0

    Reference:
        Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022. arXiv:2205.10536
    """

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0, ce_weight: float = 1.0) -> None:
        super().__init__(ce_weight)
        self._positive("temperature", temperature)
        self._not_negative("beta", beta)
        self._not_negative("gamma", gamma)
        self.beta = beta
        self.gamma = gamma
        self.temperature = temperature

    @override
    def terms(self, student: Tensor, teacher: Tensor, target: Tensor, epoch: int) -> dict[str, DistillationTerm]:
        inter, intra = dist_terms(student, teacher, self.temperature)
        return {"inter": DistillationTerm(self.beta, inter), "intra": DistillationTerm(self.gamma, intra)}


class TTM(DistillationMethod):
    """Transformed teacher matching: the temperature on the teacher alone.

    Args:
        temperature: Of the teacher, ``T``.
        weight: Of the divergence.
        weighted: Weigh samples by the power sum of the teacher's output (WTTM).
        ce_weight: Weight of the module's own loss.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> TTM(weighted=True).weight
        1.0

    Reference:
        Zheng, Yang, "Knowledge Distillation Based on Transformed Teacher Matching", ICLR 2024. arXiv:2402.11148
    """

    def __init__(
        self, temperature: float = 4.0, weight: float = 1.0, weighted: bool = False, ce_weight: float = 1.0
    ) -> None:
        super().__init__(ce_weight)
        self._positive("temperature", temperature)
        self._not_negative("weight", weight)
        self.temperature = temperature
        self.weight = weight
        self.weighted = weighted

    @override
    def terms(self, student: Tensor, teacher: Tensor, target: Tensor, epoch: int) -> dict[str, DistillationTerm]:
        loss = ttm_loss(student, teacher, self.temperature, self.weighted)
        return {"ttm": DistillationTerm(self.weight, loss)}
