"""CMIC-DL: cross entropy under a constraint on the normalised conditional mutual information."""

from __future__ import annotations

import math
from typing import Any, Literal

import lightning.pytorch as pl
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from groundwire.callbacks.classifier import ClassifierCallback, epochs_done
from groundwire.callbacks.information.centroids import CentroidTable, summed_over_processes
from groundwire.callbacks.information.functional import Q_MIN, divergence_to_centroids, log_probs, separation_of
from groundwire.callbacks.logits import LogitsSource
from groundwire.callbacks.step import Notes, is_logging_step

QUpdate = Literal["batch", "epoch", "none"]


class CentroidCallback(ClassifierCallback):
    """A callback whose loss measures divergences from running class centroids; keeps, updates and saves them.

    Args:
        source: Where logits and labels are found.
        name: Under which it logs.
        q_update: ``"batch"`` after every step from the step's own outputs, ``"epoch"`` exactly from those of the
            epoch, ``"none"`` never.
        mu: Weight of the past in ``"batch"``.
        q_min: Centroid entries are clamped at this.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        source: LogitsSource | None,
        name: str,
        q_update: QUpdate = "batch",
        mu: float = 0.99,
        q_min: float = Q_MIN,
    ) -> None:
        super().__init__(source, name)
        if q_update not in ("batch", "epoch", "none"):
            raise ValueError(f"`q_update` must be 'batch', 'epoch' or 'none', got {q_update!r}.")
        if not 0 <= mu < 1:
            raise ValueError(f"`mu` must be in [0, 1), got {mu}.")
        if not 0 < q_min < 1:
            raise ValueError(f"`q_min` must be in (0, 1), got {q_min}.")
        self.q_update: QUpdate = q_update
        self.mu = mu
        self.q_min = q_min
        self.table: CentroidTable | None = None
        self._epoch_sums: tuple[Tensor, Tensor] | None = None
        self._has_exact = False  # an epoch's centroids are there

    @property
    def centroids(self) -> Tensor | None:
        """``Q``, shape ``(C, C)``; None before the first step."""
        return None if self.table is None else self.table.centroids

    def divergence(self, log_p: Tensor, target: Tensor, p: Tensor | None = None) -> Tensor:
        """Mean of ``D(p_i || Q_{y_i})``, a scalar in nats; the gradient does not flow through the centroids."""
        rows = self.table_for(log_p).centroids[target]
        return divergence_to_centroids(log_p, rows.clamp_min(self.q_min).log(), p).mean()

    def keep_for_update(self, p: Tensor, target: Tensor) -> None:
        """Note this step's outputs for the update of the centroids."""
        if self.q_update != "none":
            self.note(probs=p, target=target)

    @property
    @override
    def epochs_needed_for(self) -> str | None:
        return "q_update='epoch'" if self.q_update == "epoch" else None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.global_step == 0:  # a new run; a checkpoint, if any, is loaded after this
            self.table, self._epoch_sums, self._has_exact = None, None, False

    @override
    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, notes: Notes) -> None:
        if "probs" not in notes:
            return
        probs, table = notes["probs"], self.table_for(notes["probs"])
        if self.q_update == "batch":
            table.update(probs, notes["target"], trainer.strategy)
        else:
            sums = summed_over_processes(probs, notes["target"], table.num_classes, trainer.strategy)
            before = self._epoch_sums
            if before is not None:
                sums = (before[0].to(sums[0]) + sums[0], before[1].to(sums[1]) + sums[1])
            self._epoch_sums = sums

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:  # resumed from a checkpoint of an epoch's last step, which ended it without its hook
            self._end_epoch()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end_epoch()

    def _end_epoch(self) -> None:
        if self._epoch_sums is not None and self.table is not None:
            self.table.assign(*(one.to(self.table.centroids.device) for one in self._epoch_sums))
            self._epoch_sums, self._has_exact = None, True

    @override
    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"q_update": self.q_update, "has_exact": self._has_exact}
        if self.table is not None:
            state["table"] = self.table.state_dict()
        if self._epoch_sums is not None:
            state["epoch_sums"] = [one.cpu() for one in self._epoch_sums]
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["q_update"] != self.q_update:
            rank_zero_warn(
                f"The checkpoint was written with {type(self).__name__}(q_update={state_dict['q_update']!r}) and goes "
                f"on with {self.q_update!r}."
            )
        self._has_exact = state_dict["has_exact"]
        sums = state_dict.get("epoch_sums")
        self._epoch_sums = None if sums is None else (sums[0], sums[1])
        if "table" in state_dict:
            self.table = CentroidTable.of_state(state_dict["table"], self.mu)

    def table_for(self, logits: Tensor) -> CentroidTable:
        """The table, made at the first step, when the number of classes is known."""
        if self.table is None:
            self.table = CentroidTable(logits.shape[-1], self.mu, logits.device)
        return self.table.fitting(logits)


class CMIConstraint(CentroidCallback):
    """CMIC-DL: trains with ``loss + lam * CMI - beta * Gamma``, the centroids of CMI updated alternately.

    ``CMI`` is the divergence of each output from the running centroid of its class (concentration), ``Gamma`` the mean
    cross entropy between outputs of different classes (separation). The network's own loss, normally cross entropy,
    stays as it is; so do optimizer and schedule. Alone, ``-beta * Gamma`` is unbounded below: logits grow without
    limit, hence the rules on ``beta``. In ``EdgeStrategy`` all devices share the server's centroids.

    Logs ``cmic/cmi_nats`` and ``cmic/gamma_nats`` (unweighted), ``cmic/lam``, ``cmic/beta`` and ``cmic/max_logit``.

    Args:
        lam: Weight of CMI, at least 0.
        beta: Weight of Gamma; by default ``0.01 * lam``. In the paper's terms it is ``lam`` times the wanted NCMI; from
            about ``0.02 * lam`` on, a small network trained for long runs into ``gamma_cap``.
        gamma_grad: ``"both"``, or ``"first"`` to take the partner's ``log p`` as a constant: stable at any ``beta`` and
            almost inactive.
        gamma_norm: ``"unbiased"`` divides by ``B (B - 1)``, ``"b2"`` by ``B^2`` as the paper does.
        gamma_cap: Nats above which Gamma has no gradient; by default ``10 log C``.
        warmup_epochs: Epochs over which both weights grow linearly from 0.
        q_update: When centroids are updated: after every ``"batch"``, or exactly after every ``"epoch"`` (the first
            one without CMI).
        mu: Weight of the past in the update after a batch.
        q_min: Centroid entries are clamped at this.
        allow_unbounded: Allow ``beta > 0`` with ``lam = 0``.
        source: Where logits and labels are found.
        name: Under which it logs and keeps its state.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: When training starts, if ``warmup_epochs`` or ``q_update="epoch"`` meet a loader
            without an end.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[CMIConstraint(lam=1.0, beta=0.01)], logger=False, enable_checkpointing=False)

    Reference:
        Yang, Mohajer Hamidi, Ye, Tan, Yang, "Conditional Mutual Information Constrained Deep Learning for
        Classification", 2023. arXiv:2309.09123
    """

    def __init__(
        self,
        lam: float = 1.0,
        beta: float | None = None,
        gamma_grad: Literal["both", "first"] = "both",
        gamma_norm: Literal["unbiased", "b2"] = "unbiased",
        gamma_cap: float | None = None,
        warmup_epochs: float = 1.0,
        q_update: Literal["batch", "epoch"] = "batch",
        mu: float = 0.99,
        q_min: float = Q_MIN,
        allow_unbounded: bool = False,
        source: LogitsSource | None = None,
        name: str = "cmic",
    ) -> None:
        super().__init__(source, name, q_update, mu, q_min)
        if q_update not in ("batch", "epoch"):
            raise ValueError(
                f"CMIConstraint has to update its centroids: `q_update` must be 'batch' or 'epoch', got {q_update!r}."
            )
        if not 0 <= lam < math.inf:
            raise ValueError(
                f"`lam` must be finite and at least 0, got {lam}: CMIConstraint makes CMI small. To make it large, use "
                "MaximumCMI."
            )
        beta = 0.01 * lam if beta is None else beta
        if not 0 <= beta < math.inf:
            raise ValueError(f"`beta` must be finite and at least 0, got {beta}: CMIConstraint makes Gamma large.")
        if beta > 0 and lam == 0 and not allow_unbounded:
            raise ValueError(
                f"beta={beta} without lam: -beta * Gamma is unbounded below, logits grow without limit. Give lam > 0, or "
                "pass allow_unbounded=True."
            )
        if gamma_grad not in ("both", "first") or gamma_norm not in ("unbiased", "b2"):
            raise ValueError(
                "`gamma_grad` must be 'both' or 'first' and `gamma_norm` 'unbiased' or 'b2', got "
                f"{gamma_grad!r} and {gamma_norm!r}."
            )
        if warmup_epochs < 0 or (gamma_cap is not None and gamma_cap <= 0):
            raise ValueError(
                f"`warmup_epochs` must be at least 0 and `gamma_cap` above 0, got {warmup_epochs} and {gamma_cap}."
            )
        if lam > 0 and beta > 0.02 * lam + 1e-12:
            rank_zero_warn(
                f"beta={beta} is more than 0.02 * lam for lam={lam}: logits may grow without limit. Watch cmic/max_logit."
            )
        self.lam = lam
        self.beta = beta
        self.gamma_grad: Literal["both", "first"] = gamma_grad
        self.gamma_norm = gamma_norm
        self.gamma_cap = gamma_cap
        self.warmup_epochs = warmup_epochs
        self._inflated_since: int | None = None  # the step from which on Gamma has outweighed the loss
        self._has_warned = False

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._inflated_since, self._has_warned = None, False

    @property
    @override
    def epochs_needed_for(self) -> str | None:
        return f"warmup_epochs={self.warmup_epochs}" if self.warmup_epochs else super().epochs_needed_for

    @override
    def total_loss(self, own_loss: Tensor, logits: Tensor, target: Tensor, inputs: Any) -> Tensor:
        ramp = warmup(self.trainer, self.warmup_epochs)
        lam, beta = ramp * self.lam, ramp * self.beta
        if self.q_update == "epoch" and not self._has_exact:
            lam = 0.0
        values: dict[str, Any] = {"lam": lam, "beta": beta}
        log_p = log_probs(logits)
        p = log_p.exp()
        cmi = self.divergence(log_p, target, p)
        loss = own_loss + lam * cmi
        if self.beta > 0:
            num_classes = logits.shape[-1]
            gamma = separation_of(
                log_p,
                target,
                num_classes,
                unbiased=self.gamma_norm == "unbiased" and len(target) > 1,
                grad=self.gamma_grad,
                p=p,
            )
            loss = loss - beta * gamma.clamp_max(self.gamma_cap or 10 * math.log(num_classes))
            values["gamma_nats"] = gamma
            if is_logging_step(self.trainer):
                self.note(inflated=beta * gamma > own_loss + 1)
        values["cmi_nats"] = cmi
        self.keep_for_update(p, target)
        if is_logging_step(self.trainer):
            self.log_terms(values)
            self.log_terms({"max_logit": logits.detach().abs().amax()}, reduce_fx="max")
        return loss

    @override
    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, notes: Notes) -> None:
        super().after_step(trainer, pl_module, notes)
        if "inflated" in notes and not self._has_warned:
            if not bool(notes["inflated"].all()):
                self._inflated_since = None
            elif self._inflated_since is None:
                self._inflated_since = trainer.global_step
            elif trainer.global_step - self._inflated_since >= 100:
                self._has_warned = True
                rank_zero_warn(
                    "beta * Gamma has been larger than the module's loss + 1 for 100 steps: the logits are being "
                    "inflated, and NCMI looks better than it is. Lower `beta`."
                )


def warmup(trainer: pl.Trainer, epochs: float) -> float:
    """Weight of a term that grows linearly over the first ``epochs`` epochs, in [0, 1]."""
    return 1.0 if epochs == 0 else min(1.0, epochs_done(trainer) / epochs)
