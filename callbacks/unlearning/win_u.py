"""WIN-U: one Newton step of retraining, from the forget set alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from groundwire.callbacks.logits import LogitsSource
from groundwire.callbacks.unlearning.base import OneShotMethod
from groundwire.callbacks.unlearning.curvature import Removal
from groundwire.callbacks.unlearning.data import ForgetRetainData, Part
from groundwire.callbacks.unlearning.recorder import KEY, CurvatureRecord, decay_vector
from groundwire.callbacks.unlearning.records import OutputLoss, Records, loss_of_step
from groundwire.callbacks.weights import fingerprint, read_checkpoint

_CONVERGED = 5e-3  # |gradient| / n below which the model counts as trained to its optimum
_TAU_SHARE = 0.001  # of n, the damping of a model that is not


class WINU(OneShotMethod):
    r"""Woodbury-informed Newton unlearning: one step towards the model retrained without the forget set.

    With the mean loss and weight decay ``lb``, retraining on the ``n_r`` retained of ``n`` records minimises their summed
    loss and ``n_r lb / 2 |theta|^2``. From the trained weights, a Newton step of that objective is

        theta + (H - H_F + n_r lb + tau)^{-1} (g_F + m lb theta - kappa g)

    where ``H`` is the Gauss-Newton matrix of all records, as :class:`CurvatureRecorder` has put it into the checkpoint, and
    ``H_F`` and ``g_F`` are matrix and gradient of the ``m`` records to forget. The Woodbury identity removes ``H_F``. No
    retained record is touched. For models that are linear in their parameters under squared loss, and trained to the optimum,
    the result is the retrained model; otherwise its approximation to second order.

    The record is downdated and goes into the new checkpoint, so that requests can follow each other. Curvature stays that of
    the weights at which it was recorded, and so is that of what is removed from it: after several requests on a network,
    record anew. Judge the result by
    its outputs: two retrained networks are far apart in their weights.

    Args:
        checkpoint: The trained model, with a curvature record: a Lightning checkpoint, or the folder of its run.
        damping: ``tau``, on the scale of summed losses; None for 0 where the model is trained to its optimum (the norm of
            the mean gradient is below 5e-3), else 0.001 n, with a warning.
        kappa: Share of the gradient ``g`` of the whole objective that the step removes as well, in [0, 1]: 0 takes away the
            forget set's pull alone and lands near a model that was retrained as long as this one was trained, 1 is a full
            Newton step towards the optimum. The same for a model that is at its optimum.
        alpha: Length of the step, in units of the full one.
        radius: The longest step in L2 norm; longer ones are shortened.
        clip_leverage: Bound the forget set's share of the curvature at 0.95 in each direction instead of refusing.
        output_loss: As in :class:`CurvatureRecorder`.
        source: As in :class:`CurvatureRecorder`.
        batch_size: Records at a time.

    Attributes:
        details: Of the last step: leverages, length, damping, the mean gradient's norm.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At setup, if the checkpoint has no curvature record.
        SingularCurvatureError: In the step, if the system is singular or indefinite.

    Example:
        >>> from groundwire.callbacks.unlearning import WINU
        >>> method = WINU("runs/original")  # Trainer(callbacks=[method]).fit(module, datamodule=ForgetRetain(...))

    Reference:
        Zhao, Amiri, Magdon-Ismail, "WIN-U: Woodbury-Informed Newton-Unlearning as a retain-free Machine Unlearning
        Framework", 2026. arXiv:2604.13438
    """

    parts: ClassVar[tuple[Part, ...]] = ("forget",)

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        damping: float | None = None,
        kappa: float = 0.0,
        alpha: float = 1.0,
        radius: float = math.inf,
        clip_leverage: bool = False,
        output_loss: OutputLoss | None = None,
        source: LogitsSource | None = None,
        batch_size: int = 100,
    ) -> None:
        super().__init__(checkpoint)
        if damping is not None and not 0 <= damping < math.inf:
            raise ValueError(f"`damping` must be at least 0 and finite, got {damping}.")
        if not 0 <= kappa <= 1:
            raise ValueError(f"`kappa` must be in [0, 1], got {kappa}.")
        for name, value in (("alpha", alpha), ("radius", radius), ("batch_size", batch_size)):
            if not value > 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        self.damping = damping
        self.kappa = kappa
        self.alpha = alpha
        self.radius = radius
        self.clip_leverage = clip_leverage
        self.output_loss = output_loss
        self.source = source
        self.batch_size = batch_size
        self.record: CurvatureRecord | None = None
        self.details: dict[str, float] = {}

    @override
    def settings(self) -> dict[str, Any]:
        names = ("damping", "kappa", "alpha", "radius", "clip_leverage")
        return {name: getattr(self, name) for name in names}

    @override
    def certificate(self) -> dict[str, Any]:
        kind = None if self.record is None else self.record.curvature.kind
        return super().certificate() | {"curvature": kind, **self.details}

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.record = self._read(pl_module)
            self.recording_seconds = self.record.seconds

    def _read(self, pl_module: pl.LightningModule) -> CurvatureRecord:
        if self._file is None:
            raise MisconfigurationException(
                "WINU takes the curvature from the trained checkpoint: give it as `checkpoint`."
            )
        checkpoint = read_checkpoint(self._file, mmap=True)
        found = checkpoint.get(KEY)
        if found is None:
            raise MisconfigurationException(
                f"{self._file} has no curvature record. Train with CurvatureRecorder among the Trainer's callbacks, or record "
                "it now, while the training data is there, by resuming the finished run with that callback: "
                "`groundwire fit --ckpt_path RUN --trainer.callbacks+=groundwire.callbacks.unlearning.CurvatureRecorder`."
            )
        record = CurvatureRecord.from_dict(found, Records(pl_module).layout)
        if record.weights != fingerprint(checkpoint["state_dict"]):
            raise MisconfigurationException(
                f"The curvature in {self._file} belongs to other weights than those of the checkpoint: they were changed after "
                "it was recorded. Record it again."
            )
        if len(self.data.forget_indices) >= record.num_records:
            raise ValueError(
                f"The forget set has {len(self.data.forget_indices)} of {record.num_records} recorded samples: nothing would "
                "be retained."
            )
        return record

    @override
    def unlearn(self, pl_module: pl.LightningModule, data: ForgetRetainData) -> None:
        assert self.record is not None
        record = self.record
        if not bool(torch.isfinite(Records(pl_module).vector()).all()):
            raise RuntimeError(
                "The trained weights are not finite: there is nothing to unlearn from. Check the checkpoint."
            )
        dtype = torch.float64 if record.curvature.kind == "full" else None
        records = Records(pl_module, self.output_loss, self.source, dtype, record.draws, record.seed)
        recorded = Records(
            pl_module, self.output_loss, self.source, dtype, record.draws, record.seed, at=record.recorded_at
        )
        rows = data.forget_indices
        for batch in data.batches("forget", self.batch_size):
            self._compare_losses(records, batch)
            break
        removal = record.curvature.removal(
            chunk for batch, ids in self._forget_batches(data) for chunk in recorded.chunks(batch, ids)
        )
        gradient = sum(records.gradient(batch).double() for batch, _ in self._forget_batches(data))
        self.records_read["forget"] += len(rows)
        delta = self._step(record, records, removal, torch.as_tensor(gradient), len(rows))
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(delta, src=0)
        records.write(records.vector().double() + delta)
        record.weights = fingerprint(pl_module.state_dict())
        if record.row_digests is not None:
            record.row_digests = record.row_digests.clone()
            record.row_digests[rows] = 0

    def _forget_batches(self, data: ForgetRetainData) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
        """The forget set, and the numbers of its records."""
        ids = torch.split(data.forget_indices, self.batch_size)
        yield from zip(data.batches("forget", self.batch_size), ids, strict=True)

    def _step(self, record: CurvatureRecord, records: Records, removal: Removal, g_f: Tensor, m: int) -> Tensor:
        n = record.num_records
        decay = decay_vector(records.layout, record.weight_decay).to(g_f)
        gradient = record.gradient.to(g_f)
        mean_gradient = float(gradient.norm()) / n
        converged = mean_gradient < _CONVERGED
        tau = self.damping
        if tau is None:
            tau = 0.0 if converged else _TAU_SHARE * n
            if not converged:
                rank_zero_warn(
                    f"The model is not at its optimum: the mean gradient has norm {mean_gradient:.2g}, so the step is damped "
                    f"by {tau:g}. Train longer, with weight decay and a learning rate that ends at 0, or set `damping`."
                )
        pull = g_f + m * decay * records.vector().double()
        found = record.curvature.newton_step(
            removal, pull - self.kappa * gradient, (n - m) * decay + tau, clip=0.95 if self.clip_leverage else None
        )
        length = float(found.delta.norm())
        if not math.isfinite(length):
            raise RuntimeError(
                f"The Newton step is not finite; the largest leverage of the forget set is {found.max_leverage:.4g}. The "
                "weights were put back. Raise `damping`."
            )
        alpha = self.alpha * min(1.0, self.radius / length) if length else self.alpha
        delta = alpha * found.delta
        record.curvature.remove(removal)
        record.num_records = n - m
        record.squared_gradients = None  # a mean over records that are not to be known any more
        moved = (
            record.curvature.apply(delta) + (n - m) * decay * delta
        )  # what the step changes of the retained gradient
        record.gradient = (gradient - pull + moved).cpu()
        self.details = {
            "max_leverage": found.max_leverage,
            "high_leverages": float(found.num_high),
            "step_length": alpha * length,
            "tau": tau,
            "mean_gradient": mean_gradient,
        }
        rank_zero_info(
            f"WIN-U: a step of length {alpha * length:.3g}; largest leverage {found.max_leverage:.3g}, "
            f"{found.num_high} of at least 0.95."
        )
        return delta

    def _compare_losses(self, records: Records, batch: tuple[Any, Tensor]) -> None:
        """Warn if ``output_loss`` is not what the module's own step computes."""
        own = loss_of_step(self.pl_module, batch)
        ours = float(records.losses(batch).mean())
        if not math.isclose(own, ours, rel_tol=1e-3, abs_tol=1e-5):
            rank_zero_warn(
                f"The module's training_step gives a loss of {own:.6g} on the forget set, and `output_loss` {ours:.6g}: WINU "
                "unlearns the latter. Give the loss of one record as `output_loss`, here and to CurvatureRecorder."
            )

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.record is not None and self.record.weights == fingerprint(pl_module.state_dict()):
            checkpoint[KEY] = self.record.as_dict()
