"""What unlearning will need of the training data, recorded while it is there."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from groundwire.callbacks.logits import LogitsSource
from groundwire.callbacks.reporting import ResumableCheckpoint
from groundwire.callbacks.reporting.progress import ShowProgress, work_progress
from groundwire.callbacks.training_data import TrainingSamples, training_samples
from groundwire.callbacks.unlearning.base import OneShotMethod
from groundwire.callbacks.unlearning.curvature import (
    AUTO_FULL,
    KINDS,
    Curvature,
    CurvatureKind,
    check_kind,
    make_curvature,
)
from groundwire.callbacks.unlearning.data import tells_what_to_forget
from groundwire.callbacks.unlearning.records import OutputLoss, Records, warn_of_batchnorm
from groundwire.callbacks.weights import fingerprint
from groundwire.plugins.edge import EdgeStrategy
from groundwire.plugins.layout import ParameterLayout
from groundwire.plugins.random import root_seed, stream

KEY = "curvature"
"""Where a Lightning checkpoint has the record."""


@dataclass
class CurvatureRecord:
    """Second-order information about a trained model and the records it was trained on.

    Args:
        curvature: Sum over the records of their Gauss-Newton matrices.
        gradient: Sum over the records of their gradients, and of ``num_records * weight_decay * weights``: shape
            ``(p,)``, zero at an exact optimum.
        squared_gradients: Mean over the records of their squared gradients, shape ``(p,)``; None once some are forgotten.
        num_records: ``n``.
        weight_decay: ``lb``, by parameter: the objective is the mean loss ``+ lb / 2 |theta|^2``.
        weights: Fingerprint of the weights to which it belongs.
        recorded_at: The trained parameters when it was recorded, shape ``(p,)``: where the columns of records have to be
            taken to be those that are in the sum.
        data_sha256: Hash of the training data.
        row_digests: Of each row of the training data, shape ``(N, 16)``, uint8; zeros for those that are not in the record.
        draws: Labels drawn a record, None for an exact output Hessian.
        seed: Of these draws.
        seconds: How long the recording took.
    """

    curvature: Curvature
    gradient: Tensor
    squared_gradients: Tensor | None
    num_records: int
    weight_decay: dict[str, float]
    weights: str
    recorded_at: Tensor
    data_sha256: str | None = None
    row_digests: Tensor | None = None
    draws: int | None = None
    seed: int = 0
    seconds: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Tensors and plain values, for a checkpoint."""
        return {
            "kind": self.curvature.kind,
            "curvature": self.curvature.state_dict(),
            **{name: value for name, value in vars(self).items() if name != "curvature"},
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any], layout: ParameterLayout) -> CurvatureRecord:
        """The record that :meth:`as_dict` wrote.

        Args:
            found: What the checkpoint has.
            layout: Of the module's parameters.

        Returns:
            The record.

        Raises:
            ValueError: If it belongs to other parameters.
        """
        if len(found["gradient"]) != layout.numel or list(found["weight_decay"]) != list(layout.names):
            raise ValueError(
                f"The recorded curvature is of {len(found['gradient']):,} parameters, and the module trains "
                f"{layout.numel:,} (or others): build the model as it was trained, with the same parameters frozen."
            )
        kind = KINDS[found["kind"]]
        curvature = kind.__new__(kind)
        curvature.load_state_dict(found["curvature"])
        rest = {name: value for name, value in found.items() if name not in ("kind", "curvature")}
        return cls(curvature=curvature, **rest)


def record_curvature(
    records: Records,
    data: tuple[Tensor, Tensor],
    *,
    kind: CurvatureKind = "auto",
    ids: Tensor | None = None,
    weight_decay: Mapping[str, float] | None = None,
    rank: int = 200,
    batch_size: int = 100,
    progress: ShowProgress | None = None,
) -> CurvatureRecord:
    """Go through the training data, and keep what unlearning needs of it.

    Args:
        records: Derivatives of the trained module.
        data: Inputs and labels of all records, without augmentation.
        kind: Representation of the curvature: ``"full"`` (exact; up to 10,000 parameters), ``"ekfac"`` or ``"lowrank"``;
            ``"auto"`` is full up to 4,096 parameters, low rank while that fits into a GiB, and ekfac beyond.
        ids: Numbers of the records, shape ``(n,)``; by default their rows.
        weight_decay: Of each parameter; none by default.
        rank: Of ``"lowrank"``.
        batch_size: Records at a time.
        progress: Is told what is done, and which share of it.

    Returns:
        The record, without the data's hashes.

    Raises:
        ValueError: If there is no record, or the representation cannot hold that many parameters.

    Example:
        >>> module = nn.Linear(3, 2)
        >>> data = torch.randn(20, 3), torch.randint(0, 2, (20,))
        >>> record_curvature(Records(module, dtype=torch.float64), data).curvature.matrix.shape
        torch.Size([8, 8])
    """
    inputs, labels = data
    if not len(labels):
        raise ValueError("There is no record to take the curvature of: the training data is empty.")
    layout, module = records.layout, records.module
    decay = {name: float((weight_decay or {}).get(name, 0.0)) for name in layout.names}
    curvature = make_curvature(kind, layout, list(decay.values()), rank, records.seed)
    ids = torch.arange(len(labels)) if ids is None else ids
    order = torch.randperm(len(labels), generator=stream(records.seed, purpose="unlearning/order"))  # for sampled bases
    started = time.perf_counter()
    gradient = torch.zeros(layout.numel, dtype=torch.float64)
    squares = torch.zeros(layout.numel, dtype=torch.float64)
    done = 0
    for number in range(curvature.num_passes):
        for rows in torch.split(order, batch_size):
            batch = (inputs[rows], labels[rows])
            if number == 0:
                for found in records.gradient_chunks(batch):
                    gradient += found.double().sum(dim=0).cpu()
                    squares += found.double().square().sum(dim=0).cpu()
            if not curvature.has_enough(number):
                for columns in records.chunks(batch, ids[rows]):
                    curvature.observe(columns, number)
            if progress is not None:
                done += len(rows)
                progress("Curvature", done / (curvature.num_passes * len(labels)))
        curvature.end_pass(number)
    return CurvatureRecord(
        curvature=curvature,
        gradient=gradient + len(labels) * decay_vector(layout, decay) * records.vector().double().cpu(),
        squared_gradients=squares / len(labels),
        num_records=len(labels),
        weight_decay=decay,
        weights=fingerprint(module.state_dict()),
        recorded_at=records.vector().cpu(),
        draws=records.draws,
        seed=records.seed,
        seconds=time.perf_counter() - started,
    )


def decay_vector(layout: ParameterLayout, weight_decay: Mapping[str, float]) -> Tensor:
    """Weight decay of every entry, shape ``(p,)``, float64."""
    values = torch.tensor([weight_decay[name] for name in layout.names], dtype=torch.float64)
    return values.repeat_interleave(torch.tensor(layout.sizes))


class CurvatureRecorder(pl.Callback):
    """Records at the end of training what unlearning without the retained data needs, and puts it into the checkpoint.

    The record has the curvature of all training samples, the sum of their gradients and the mean of their squares, and
    goes under ``"curvature"`` into the last file of ``ResumableCheckpoint``; beside other checkpoints, ``curvature.ckpt``
    is written. It is made when the fit is over and its own checkpoint is safe. A training that is over already is
    recorded by resuming it with this callback: nothing is trained then.

    The data is gone through without augmentation. Of ``Federated``, all devices' samples are recorded; on
    ``ForgetRetain``, the retained ones, on which ``Retrain`` and others train. On several processes the first one records.

    Args:
        kind: Representation of the curvature: see :func:`record_curvature`.
        rank: Of ``"lowrank"``.
        weight_decay: L2 decay of the objective; by default that of the optimizer's parameter groups.
        output_loss: The loss of one record from outputs and label, as the module's step has it; by default cross-entropy
            for integer labels and the mean squared error for others.
        draws: Labels drawn a record instead of an exact output Hessian: for vocabularies, 16 and more.
        source: Where inputs and labels of a batch are found.
        batch_size: Records at a time.
        seed: Of draws and of ``"lowrank"``; by default that of ``seed_everything``, else 0.

    Attributes:
        record: What was recorded; None before.

    Raises:
        MisconfigurationException: At setup, under a strategy that spreads the parameters over processes.
        ValueError: When recording, if the model has too many parameters for the representation.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[CurvatureRecorder(kind="ekfac")], logger=False, enable_checkpointing=False)

    Reference:
        Zhao, Amiri, Magdon-Ismail, WIN-U, 2026. arXiv:2604.13438
    """

    def __init__(
        self,
        kind: CurvatureKind = "auto",
        rank: int = 200,
        weight_decay: float | None = None,
        output_loss: OutputLoss | None = None,
        draws: int | None = None,
        source: LogitsSource | None = None,
        batch_size: int = 100,
        seed: int | None = None,
    ) -> None:
        check_kind(kind, 0, rank)
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        self.kind: Literal["auto", "full", "ekfac", "lowrank"] = kind
        self.rank = rank
        self.weight_decay = weight_decay
        self.output_loss = output_loss
        self.draws = draws
        self.source = source
        self.batch_size = batch_size
        self.seed = seed
        self.record: CurvatureRecord | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.record = None
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy | EdgeStrategy):
            raise MisconfigurationException(
                f"CurvatureRecorder needs all parameters on one device, got {type(trainer.strategy).__name__}: record "
                "afterwards, by resuming the finished run on one device."
            )
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        one_shot = [type(c).__name__ for c in callbacks if isinstance(c, OneShotMethod)]
        if one_shot:
            raise MisconfigurationException(
                f"CurvatureRecorder would record what {one_shot[0]} has just removed: WINU keeps its own record up to date. "
                "Take CurvatureRecorder out."
            )
        records = self._records(pl_module)  # what is wrong shows before the training, not after it
        check_kind(self.kind, records.layout.numel, self.rank)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _samples(trainer)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            pl_module.to(trainer.strategy.root_device)  # Lightning has moved it away
            self.record = self._recorded(trainer, pl_module)
        trainer.strategy.barrier()
        warn_of_batchnorm(pl_module)
        keepers = trainer.checkpoint_callbacks
        if not keepers:
            return
        resumable = [keeper for keeper in keepers if isinstance(keeper, ResumableCheckpoint)]
        folder = getattr(keepers[0], "dirpath", None) or Path(trainer.default_root_dir) / "checkpoints"
        path = resumable[0].path(trainer) if resumable else Path(folder) / "curvature.ckpt"
        trainer.save_checkpoint(path)
        rank_zero_info(f"Checkpoint with curvature: {path}")

    def _records(self, pl_module: pl.LightningModule) -> Records:
        records = Records(pl_module, self.output_loss, self.source, None, self.draws, root_seed(self.seed))
        if self.kind == "full" or (self.kind == "auto" and records.layout.numel <= AUTO_FULL):
            records.dtype = torch.float64
        return records

    def _recorded(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> CurvatureRecord:
        records = self._records(pl_module)
        samples, rows = _samples(trainer)
        with work_progress(trainer, "Curvature") as progress:
            record = record_curvature(
                records,
                samples.fetch(rows),
                kind=self.kind,
                ids=rows,
                weight_decay=self._decay(trainer, pl_module, records.layout),
                rank=self.rank,
                batch_size=self.batch_size,
                progress=progress,
            )
        record.data_sha256 = samples.digest()
        record.row_digests = torch.zeros(len(samples), 16, dtype=torch.uint8)
        record.row_digests[rows] = samples.row_digests(rows)
        return record

    def _decay(self, trainer: pl.Trainer, module: nn.Module, layout: ParameterLayout) -> dict[str, float]:
        if self.weight_decay is not None:
            return dict.fromkeys(layout.names, self.weight_decay)
        of = {
            id(parameter): float(group.get("weight_decay", 0.0))
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        return {name: of.get(id(parameter), 0.0) for name, parameter in module.named_parameters()}

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.record is not None and self.record.weights == fingerprint(pl_module.state_dict()):
            checkpoint[KEY] = self.record.as_dict()


def _samples(trainer: pl.Trainer) -> tuple[TrainingSamples, Tensor]:
    """The training data, and the rows of it that the model was trained on."""
    datamodule = getattr(trainer, "datamodule", None)
    if tells_what_to_forget(datamodule):
        samples = training_samples(getattr(datamodule, "datamodule", datamodule), "CurvatureRecorder")
        return samples, datamodule.retain_indices
    # the train loader as it was given: under DDP, Lightning has put a sampler of its own into the one that it uses
    source = datamodule if datamodule is not None else trainer.fit_loop._data_source.instance
    samples = training_samples(source, "CurvatureRecorder")
    return samples, samples.trained_on
