"""CMIM: models whose outputs resist distillation at every temperature."""

from __future__ import annotations

import math
import random
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from groundwire.callbacks.classifier import ClassifierCallback
from groundwire.callbacks.information.centroids import CentroidTable
from groundwire.callbacks.information.functional import (
    Q_MIN,
    batch_groups,
    class_centroids,
    divergence_to_centroids,
    log_probs,
)
from groundwire.callbacks.logits import LogitsSource
from groundwire.callbacks.step import Notes, is_logging_step

Aggregate = Literal["mean", "max", "smoothmax"]

_ENOUGH = 8  # samples a class and batch from which the batch's own centroids serve


def cmi_over_temperatures(
    logits: Tensor,
    target: Tensor,
    alphas: Tensor,
    centroids: Tensor | None = None,
    q_min: float = Q_MIN,
) -> Tensor:
    """``CMI(alpha)``: concentration of the power-transformed outputs around *their* centroids.

    Args:
        logits: Shape ``(B, C)``.
        target: Labels, shape ``(B,)``.
        alphas: Inverse temperatures, shape ``(K,)``.
        centroids: Shape ``(K, C, C)``; by default those of these samples, taken as constants (which does not change
            the gradient, since they minimise the value).
        q_min: Centroid entries are clamped at this.

    Returns:
        Shape ``(K,)``, nats. It is 0 at ``alpha = 0`` and tends to the entropy of the arg-max within the classes for
        large ones.

    Example:
        >>> cmi_over_temperatures(torch.eye(2), torch.tensor([0, 0]), torch.tensor([0.0, 1.0]))
        tensor([0.0000, 0.1109])
    """
    log_p = log_probs(logits, alphas[:, None, None])  # [K, B, C]
    if centroids is not None:
        rows = centroids[:, target]
    else:
        groups, size = batch_groups(target, logits.shape[-1])
        num_temperatures, batch, num_classes = log_p.shape
        # one pass for all temperatures: their columns stand beside each other
        side_by_side = log_p.detach().exp().permute(1, 0, 2).reshape(batch, num_temperatures * num_classes)
        rows = class_centroids(side_by_side, groups, size)[groups]
        rows = rows.reshape(batch, num_temperatures, num_classes).permute(1, 0, 2)
    return divergence_to_centroids(log_p, rows.clamp_min(q_min).log()).mean(dim=1)


def aggregate_cmi(values: Tensor, how: Aggregate, kappa: float = 10.0) -> Tensor:
    """One value of those at ``K`` temperatures.

    Args:
        values: Shape ``(K,)``.
        how: ``"mean"``, ``"max"``, or ``"smoothmax"``: ``log(mean(exp(kappa v))) / kappa``, between the two.
        kappa: Sharpness of ``"smoothmax"``; 0 is the mean.

    Returns:
        A scalar.

    Example:
        >>> aggregate_cmi(torch.tensor([0.0, 1.0]), "smoothmax", kappa=10.0)
        tensor(0.9307)
    """
    if how == "max":
        return values.amax()
    if how == "mean" or kappa == 0:
        return values.mean()
    return (torch.logsumexp(kappa * values, dim=0) - math.log(len(values))) / kappa


class UndistillableCMI(ClassifierCallback):
    """CMIM: trains with ``loss + lam * A[CMI(alpha)]`` over the whole range of temperatures ``T = 1 / alpha``.

    The outputs of a class then coincide at every temperature, so that they tell a student no more than the label does.
    Logs ``cmim/cmi_nats`` (aggregated), ``cmim/cmi_nats_T<T>`` at each temperature of the grid, and ``cmim/lam``.

    Args:
        lam: Weight, at least 0; what is needed grows with the model's capacity.
        alpha_min: Smallest inverse temperature.
        alpha_max: Largest one.
        num_temperatures: Temperatures ``K`` a step.
        temperatures: ``"grid"``, spaced evenly in ``log alpha``; or ``"random"``, drawn so anew at each step, unbiased
            for the mean.
        aggregate: ``"mean"``, ``"max"`` or ``"smoothmax"`` over the temperatures.
        kappa: Sharpness of ``"smoothmax"``.
        weight: ``"none"``, or ``"inv_alpha2"``: ``CMI(alpha)`` falls like ``alpha^2`` at high temperatures; dividing by
            it lets every temperature matter equally, as the factor ``T^2`` does in distillation.
        centroids: ``"batch"`` (of the step's samples), ``"ema"`` (running ones, one table a temperature), or
            ``"auto"``: of the batch where it has at least 8 samples a class.
        mu: Weight of the past in running centroids.
        seed: Of random temperatures, which depend on it and the step alone.
        source: Where logits and labels are found.
        name: Under which it logs and keeps its state.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: If random temperatures would need running centroids.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[UndistillableCMI(lam=5.0)], logger=False, enable_checkpointing=False)

    Reference:
        Ye, Mohajer Hamidi, Yang, "Towards Undistillable Models by Minimizing Conditional Mutual Information", 2025.
        arXiv:2507.00012
    """

    def __init__(
        self,
        lam: float = 5.0,
        alpha_min: float = 0.05,
        alpha_max: float = 2.0,
        num_temperatures: int = 6,
        temperatures: Literal["grid", "random"] = "grid",
        aggregate: Aggregate = "mean",
        kappa: float = 10.0,
        weight: Literal["none", "inv_alpha2"] = "none",
        centroids: Literal["auto", "batch", "ema"] = "auto",
        mu: float = 0.99,
        seed: int = 0,
        source: LogitsSource | None = None,
        name: str = "cmim",
    ) -> None:
        super().__init__(source, name)
        if not 0 <= lam < math.inf:
            raise ValueError(
                f"`lam` must be finite and at least 0, got {lam}: UndistillableCMI makes CMI small. To make it large, use "
                "MaximumCMI."
            )
        if not 0 < alpha_min <= alpha_max < math.inf:
            raise ValueError(
                f"`alpha_min` and `alpha_max` must be positive and in order, got {alpha_min}, {alpha_max}."
            )
        if num_temperatures < 1 or kappa < 0 or not 0 <= mu < 1:
            raise ValueError(
                f"`num_temperatures` must be at least 1, `kappa` at least 0 and `mu` in [0, 1), got {num_temperatures}, "
                f"{kappa}, {mu}."
            )
        for option, value, allowed in (
            ("temperatures", temperatures, ("grid", "random")),
            ("aggregate", aggregate, ("mean", "max", "smoothmax")),
            ("weight", weight, ("none", "inv_alpha2")),
            ("centroids", centroids, ("auto", "batch", "ema")),
        ):
            if value not in allowed:
                raise ValueError(f"`{option}` must be one of {', '.join(allowed)}, got {value!r}.")
        if temperatures == "random" and centroids == "ema":
            raise ValueError("Random temperatures have no running centroids: use centroids='batch', or a grid.")
        self.lam = lam
        self.alpha_min = alpha_min
        self.alpha_max = alpha_max
        self.num_temperatures = num_temperatures
        self.temperatures = temperatures
        self.aggregate: Aggregate = aggregate
        self.kappa = kappa
        self.weight = weight
        self.centroids = centroids
        self.mu = mu
        self.seed = seed
        self._running: bool | None = None
        self._tables: list[CentroidTable] = []

    def alphas(self, step: int) -> Tensor:
        """Inverse temperatures of a step, shape ``(K,)``."""
        low, high, number = math.log(self.alpha_min), math.log(self.alpha_max), self.num_temperatures
        if self.temperatures == "random":  # not by torch: under vmap each device would draw its own
            generator = random.Random(f"{self.seed}/cmim/temperatures/{step}")
            at = [generator.random() for _ in range(number)]
        else:  # a single one is alpha_max, so that alpha_max = 1 is plain CMI
            at = [k / (number - 1) if number > 1 else 1.0 for k in range(number)]
        return torch.tensor([math.exp(low + (high - low) * share) for share in at])

    @override
    def total_loss(self, own_loss: Tensor, logits: Tensor, target: Tensor, inputs: Any) -> Tensor:
        alphas = self.alphas(self.trainer.global_step).to(logits)
        centroids = None
        if self._uses_running(len(target), logits.shape[-1]):
            tables = self._tables_for(logits)
            if tables:  # after the first step
                centroids = torch.stack([table.centroids for table in tables])
            self.note(logits=logits, target=target)
        at_each = cmi_over_temperatures(logits, target, alphas, centroids)
        weighted = at_each / alphas.square() if self.weight == "inv_alpha2" else at_each
        cmi = aggregate_cmi(weighted, self.aggregate, self.kappa)
        if is_logging_step(self.trainer):
            self.log_terms({"cmi_nats": cmi, "lam": self.lam})
            if self.temperatures == "grid":
                named = zip(self.alphas(0).tolist(), at_each, strict=True)
                self.log_terms({f"cmi_nats_T{1 / alpha:.3g}": value for alpha, value in named})
        return own_loss + self.lam * cmi

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.global_step == 0:
            self._tables, self._running = [], None

    @override
    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, notes: Notes) -> None:
        logits, target = notes["logits"], notes["target"]
        if not self._tables_for(logits):
            self._tables = [
                CentroidTable(logits.shape[-1], self.mu, logits.device) for _ in range(self.num_temperatures)
            ]
        for table, alpha in zip(self._tables, self.alphas(0).tolist(), strict=True):
            table.update(log_probs(logits, alpha).exp(), target, trainer.strategy)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "running": self._running,
            "settings": self._settings(),
            "tables": [table.state_dict() for table in self._tables],
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        before, now = state_dict["settings"], self._settings()
        if state_dict["running"] and before != now:
            changed = ", ".join(
                f"{name} was {before[name]} and is {now[name]}" for name in now if before[name] != now[name]
            )
            raise MisconfigurationException(
                f"The checkpoint holds running centroids of UndistillableCMI at other settings: {changed}. Resume with "
                "the same ones."
            )
        self._running = state_dict["running"] if self.centroids == "auto" else None
        self._tables = [CentroidTable.of_state(state, self.mu) for state in state_dict["tables"]]

    def _settings(self) -> dict[str, Any]:
        names = ("centroids", "temperatures", "alpha_min", "alpha_max", "num_temperatures")
        return {name: getattr(self, name) for name in names}

    def _uses_running(self, batch: int, num_classes: int) -> bool:
        """Whether centroids are running ones; decided at the first step, not by a last batch that is smaller."""
        if self._running is None:
            self._running = self.centroids == "ema" or (self.centroids == "auto" and batch < _ENOUGH * num_classes)
            if self._running and self.temperatures == "random":
                raise MisconfigurationException(
                    f"A batch of {batch} has fewer than {_ENOUGH} samples for each of {num_classes} classes, and random "
                    "temperatures have no running centroids. Use a larger batch, temperatures='grid', or "
                    "centroids='batch'."
                )
        return self._running

    def _tables_for(self, logits: Tensor) -> list[CentroidTable]:
        """One table a temperature; none before the first step."""
        return [table.fitting(logits) for table in self._tables]
