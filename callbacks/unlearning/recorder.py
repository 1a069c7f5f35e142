"""What unlearning will need of the training data, recorded while it is there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from groundwire.callbacks.logits import LogitsSource
from groundwire.callbacks.reporting import ResumableCheckpoint
from groundwire.callbacks.training_data import training_tensors
from groundwire.callbacks.unlearning.curvature import (
    AUTO_FULL,
    Curvature,
    CurvatureKind,
    EKFACCurvature,
    FullCurvature,
    LowRankCurvature,
    make_curvature,
)
from groundwire.callbacks.unlearning.data import data_digest, tells_what_to_forget
from groundwire.callbacks.unlearning.records import OutputLoss, Records
from groundwire.callbacks.weights import fingerprint
from groundwire.plugins.edge import EdgeStrategy
from groundwire.plugins.edge.layout import ParameterLayout
from groundwire.plugins.random import root_seed

KEY = "curvature"
"""Where a Lightning checkpoint has the record."""

Batches = Iterable[tuple[Any, Tensor]]
_KINDS: dict[str, type[Curvature]] = {c.kind: c for c in (FullCurvature, LowRankCurvature, EKFACCurvature)}


@dataclass
class CurvatureRecord:
    """Second-order information about a trained model and the records it was trained on.

    Args:
        curvature: Sum over the records of their Gauss-Newton matrices.
        gradient: Sum over the records of their gradients, and of ``num_records * weight_decay * weights``: shape
            ``(p,)``, zero at an exact optimum.
        squared_gradients: Mean over the records of their squared gradients, shape ``(p,)``.
        num_records: ``n``.
        weight_decay: ``lb``, by parameter: the objective is the mean loss ``+ lb / 2 |theta|^2``.
        weights: Fingerprint of the weights to which it belongs.
        data_sha256: Hash of the training data.
        draws: Labels drawn a record, None for an exact output Hessian.
        seed: Of these draws.
    """

    curvature: Curvature
    gradient: Tensor
    squared_gradients: Tensor
    num_records: int
    weight_decay: dict[str, float]
    weights: str
    data_sha256: str
    draws: int | None = None
    seed: int = 0

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
        kind = _KINDS[found["kind"]]
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

    Returns:
        The record.

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
    gradient = torch.zeros(layout.numel, dtype=torch.float64)
    squares = torch.zeros(layout.numel, dtype=torch.float64)
    for number in range(curvature.num_passes):
        for rows in _slices(len(labels), batch_size):
            batch = (inputs[rows], labels[rows])
            if number == 0:
                found = records.gradients(batch).double().cpu()
                gradient += found.sum(dim=0)
                squares += found.square().sum(dim=0)
            if not curvature.has_enough(number):
                for columns in records.chunks(batch, ids[rows]):
                    curvature.observe(columns, number)
        curvature.end_pass(number)
    lb = decay_vector(layout, decay)
    return CurvatureRecord(
        curvature=curvature,
        gradient=gradient + len(labels) * lb * records.vector().double().cpu(),
        squared_gradients=squares / len(labels),
        num_records=len(labels),
        weight_decay=decay,
        weights=fingerprint(module.state_dict()),
        data_sha256=data_digest((inputs, labels)),
        draws=records.draws,
        seed=records.seed,
    )


def decay_vector(layout: ParameterLayout, weight_decay: Mapping[str, float]) -> Tensor:
    """Weight decay of every entry, shape ``(p,)``, float64."""
    values = torch.tensor([weight_decay[name] for name in layout.names], dtype=torch.float64)
    return values.repeat_interleave(torch.tensor(layout.sizes))


def _slices(number: int, size: int) -> Iterator[slice]:
    for start in range(0, number, size):
        yield slice(start, start + size)


class CurvatureRecorder(pl.Callback):
    """Records at the end of training what unlearning without the retained data needs, and puts it into the checkpoint.

    The record has the curvature of all training samples, the sum of their gradients and the mean of their squares, and
    is found under ``"curvature"`` in checkpoints that are saved after the training: the last one of
    ``ResumableCheckpoint``; for others, ``curvature.ckpt`` is written beside theirs. A training that is over already is
    recorded by resuming it with this callback: nothing is trained then.

    The data is gone through without augmentation and shuffling. On several processes the first one records.

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
        if kind not in ("auto", *_KINDS):
            raise ValueError(f"`kind` must be 'auto', 'full', 'ekfac' or 'lowrank', got {kind!r}.")
        if rank < 1 or batch_size < 1:
            raise ValueError(f"`rank` and `batch_size` must be at least 1, got {rank} and {batch_size}.")
        self.kind: Literal["auto", "full", "ekfac", "lowrank"] = kind
        self.rank = rank
        self.weight_decay = weight_decay
        self.output_loss = output_loss
        self.draws = draws
        self.source = source
        self.batch_size = batch_size
        self.seed = seed
        self.record: CurvatureRecord | None = None
        self._has_recorded = False  # on all processes; the record is on the first alone

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.record, self._has_recorded = None, False
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy | EdgeStrategy):
            raise MisconfigurationException(
                f"CurvatureRecorder needs all parameters on one device, got {type(trainer.strategy).__name__}: record "
                "afterwards, by resuming the finished run on one device."
            )

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.interrupted:
            self._record(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        recorded_now = not self._has_recorded
        if recorded_now:  # the training was over before
            self._record(trainer, pl_module)
        keepers = trainer.checkpoint_callbacks
        resumable = [keeper for keeper in keepers if isinstance(keeper, ResumableCheckpoint)]
        if not keepers or (resumable and not recorded_now):
            return
        folder = getattr(keepers[0], "dirpath", None) or Path(trainer.default_root_dir) / "checkpoints"
        path = resumable[0].path(trainer) if resumable else Path(folder) / "curvature.ckpt"
        trainer.save_checkpoint(path)
        rank_zero_info(f"Checkpoint with curvature: {path}")

    def _record(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_rank == 0:
            seed = root_seed(self.seed)
            records = Records(pl_module, self.output_loss, self.source, None, self.draws, seed)
            if self.kind == "full" or (self.kind == "auto" and records.layout.numel <= AUTO_FULL):
                records.dtype = torch.float64
            data, ids = _training_data(trainer)
            self.record = record_curvature(
                records,
                data,
                kind=self.kind,
                ids=ids,
                weight_decay=self._decay(trainer, pl_module, records.layout),
                rank=self.rank,
                batch_size=self.batch_size,
            )
            warn_of_batchnorm(pl_module)
        self._has_recorded = True
        trainer.strategy.barrier()

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


def _training_data(trainer: pl.Trainer) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """All samples that the model was trained on, and their rows in the training data."""
    datamodule = getattr(trainer, "datamodule", None)
    if tells_what_to_forget(datamodule):
        parts = [part for name in ("forget", "retain") for part in datamodule.batches(name)]
        x, y = (torch.cat(one) for one in zip(*parts, strict=True))
        return (x, y), torch.cat([datamodule.forget_indices, datamodule.retain_indices])
    holder: Any = datamodule
    if holder is None:
        holder = _Loaders(trainer)
    x, y = training_tensors(holder, "CurvatureRecorder")
    return (x, y), torch.arange(len(y))


class _Loaders:
    """The train loader that was passed to ``fit``, where there is no datamodule."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self.trainer = trainer

    def train_dataloader(self) -> Any:
        loader = self.trainer.train_dataloader
        return loader if loader is not None else self.trainer.fit_loop._data_source.dataloader()


def warn_of_batchnorm(module: nn.Module) -> None:
    """Say that running statistics remember the forget set."""
    if any(isinstance(sub, nn.modules.batchnorm._NormBase) and sub.track_running_stats for sub in module.modules()):
        rank_zero_warn(
            f"{type(module).__name__} has BatchNorm: its running statistics hold traces of every training sample, and a "
            "one-shot method leaves them. Use GroupNorm (see groundwire.callbacks.privacy.DPSGD(fix=True))."
        )
