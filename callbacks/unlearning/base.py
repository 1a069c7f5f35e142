"""What all methods of unlearning have in common: where they start, what they read, what they leave."""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from typing_extensions import override

from groundwire.callbacks.reporting import ResumableCheckpoint
from groundwire.callbacks.step import Step, StepCallback, loss_of, with_loss
from groundwire.callbacks.unlearning.data import ForgetRetainData, Part, forget_retain_data, indices_digest
from groundwire.callbacks.unlearning.records import warn_of_batchnorm
from groundwire.callbacks.weights import copy_of, find_checkpoint, fingerprint, load_weights, read_checkpoint
from groundwire.plugins.edge import EdgeStrategy
from groundwire.plugins.random import root_seed

Batch = Any


class UnlearningMethod(StepCallback):
    """A callback that lets a trained module forget; the base of all methods.

    Put one into the Trainer's callbacks and fit on ``groundwire.datamodules.ForgetRetain``. The checkpoint that is
    given is read and never written to.

    Args:
        checkpoint: The trained model: a Lightning checkpoint, or the folder of its run. None if the module that is
            passed to ``trainer.fit`` has the trained weights.

    Attributes:
        parts: What a training batch has to hold.
        starts_trained: Whether the method starts from the checkpoint's weights; otherwise from the module's own.
        original: A frozen copy of the trained module, in evaluation mode; during and after a fit.
        seconds: Wall time of the method itself, without validation and reports.
        records_read: How many records were given to the module's step or differentiated on this process, by part.
        peak_memory_bytes: The most memory that the method had in use above what there was when the fit began, on its
            device; None where that cannot be told.
        recording_seconds: How long the training took to record what the method uses; None if it uses no record.

    Raises:
        MisconfigurationException: At setup, if the Trainer has two methods, or its datamodule does not say what to
            forget.
    """

    parts: ClassVar[tuple[Part, ...]] = ("forget", "retain")
    starts_trained: ClassVar[bool] = True

    def __init__(self, checkpoint: str | Path | None = None) -> None:
        self.checkpoint = checkpoint
        self.original: nn.Module | None = None
        self.seconds = 0.0
        self.records_read: dict[str, int] = {"forget": 0, "retain": 0}
        self.peak_memory_bytes: int | None = None
        self.recording_seconds: float | None = None
        self._memory: MemoryGauge | None = None
        self._trainer: pl.Trainer | None = None
        self._pl_module: pl.LightningModule | None = None
        self._data: ForgetRetainData | None = None
        self._file: Path | None = None
        self._origin = ""

    # ---------------------------------------------------------------- set-up

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._refuse_others(trainer)
            self._data = forget_retain_data(trainer, type(self).__name__)
            self._data.serve(*self.parts)
            self._trainer, self._pl_module = trainer, pl_module
            self.seconds, self.records_read = 0.0, {"forget": 0, "retain": 0}
            if self.checkpoint is not None:
                self._file = find_checkpoint(self.checkpoint)
                self._refuse_overwriting(trainer, self._file)
                trainer.precision_plugin.convert_module(pl_module)  # before weights in its precision are loaded
                self._start_from(pl_module, self._file)
            self.original = self._trained_copy(pl_module)
            self._origin = fingerprint(self.original.state_dict())
        super().setup(trainer, pl_module, stage)

    def _refuse_others(self, trainer: pl.Trainer) -> None:
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        names = [type(c).__name__ for c in callbacks if isinstance(c, UnlearningMethod)]
        if len(names) > 1:
            raise MisconfigurationException(f"One method at a time, got {' and '.join(names)}: take out all but one.")

    def _result_path(self, trainer: pl.Trainer) -> Path | None:
        """Where the result will be written, whatever is there; None where files are not replaced."""
        keepers = (keeper for keeper in trainer.checkpoint_callbacks if isinstance(keeper, ResumableCheckpoint))
        return next((keeper.path(trainer) for keeper in keepers), None)

    def _refuse_overwriting(self, trainer: pl.Trainer, file: Path) -> None:
        path = self._result_path(trainer)
        if path is not None and path.resolve() == file.resolve():
            raise MisconfigurationException(
                f"The result of {self.name} would be written over the original, {file}. Give the checkpoint callback "
                "another `dirpath`, or the Trainer another `default_root_dir`."
            )

    def _start_from(self, pl_module: pl.LightningModule, file: Path) -> None:
        if self.starts_trained:
            load_weights(pl_module, file)
        self.data.adopt(read_checkpoint(file, mmap=True))

    def _trained_copy(self, pl_module: pl.LightningModule) -> nn.Module:
        trained = copy_of(pl_module)
        if self._file is not None and not self.starts_trained:
            load_weights(trained, self._file)
        return trained.requires_grad_(False).eval()

    @property
    def trainer(self) -> pl.Trainer:
        """The Trainer that runs."""
        assert self._trainer is not None
        return self._trainer

    @property
    def pl_module(self) -> pl.LightningModule:
        """The module that is to forget."""
        assert self._pl_module is not None
        return self._pl_module

    @property
    def data(self) -> ForgetRetainData:
        """What is to be forgotten and what is retained."""
        assert self._data is not None
        return self._data

    @property
    def name(self) -> str:
        """The class's name, which reports and certificates show."""
        return type(self).__name__

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self.original is not None
        self.original = trainer.precision_plugin.convert_module(self.original.to(pl_module.device))
        self._memory = MemoryGauge(pl_module.device)

    # ---------------------------------------------------------------- what is left

    def settings(self) -> dict[str, Any]:
        """The method's settings, plain values by name, for the certificate."""
        return {}

    def certificate(self) -> dict[str, Any]:
        """What was done: the method, its settings, and hashes of forget set, data and weights; plain values."""
        data = self.data
        return {
            "method": self.name,
            "settings": self.settings(),
            "forget": {"number": len(data.forget_indices), "sha256": indices_digest(data.forget_indices)},
            "forgotten_earlier": {"number": len(data.earlier), "sha256": indices_digest(data.earlier)},
            "data_sha256": data.data_digest,
            "original_sha256": self._origin,
            "result_sha256": fingerprint(self.pl_module.state_dict()),
            "original_checkpoint": str(self._file) if self._file is not None else None,
            "seconds": self.seconds,
            "recording_seconds": self.recording_seconds,
            "records_read": dict(self.records_read),
            "peak_memory_bytes": self.peak_memory_bytes,
            "training": self._training(),
        }

    def _training(self) -> dict[str, Any]:
        """How the Trainer ran: what a method's figures depend on beside its own settings."""
        trainer = self.trainer
        return {
            "optimizers": [_described(optimizer) for optimizer in trainer.optimizers],
            "steps": trainer.global_step,
            "epochs": trainer.current_epoch,
            "batch_size": getattr(self.data, "batch_size", None),
            "seed": root_seed(None),
            "precision": str(trainer.precision),
            "processes": trainer.world_size,
            "model": type(self.pl_module).__name__,
        }

    def records_read_everywhere(self) -> dict[str, int]:
        """:attr:`records_read` of all processes together; to be asked for on all of them."""
        return dict(self.records_read)

    def _refuse_nonfinite_weights(self, pl_module: pl.LightningModule) -> None:
        wrong = [name for name, p in pl_module.named_parameters() if not bool(torch.isfinite(p).all())]
        if wrong:
            raise RuntimeError(
                f"{self.name} left values that are not finite in {', '.join(wrong[:3])}. They are not saved, and the original "
                "checkpoint is untouched. Lower the learning rate, or the step's length."
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "method": self.name,
            "settings": self.settings(),
            "original_sha256": self._origin,
            "original_checkpoint": str(self._file) if self._file is not None else None,
            "seconds": self.seconds,
            "records_read": dict(self.records_read),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._origin and state_dict["original_sha256"] != self._origin:
            raise MisconfigurationException(
                f"This run of {self.name} began with other weights than the original model given now. Give the same "
                f"`checkpoint` as then ({state_dict['original_checkpoint'] or 'the module that was passed to fit'})."
            )
        self.seconds, self.records_read = state_dict["seconds"], dict(state_dict["records_read"])

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._undo(trainer)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._undo(trainer)

    def _undo(self, trainer: pl.Trainer) -> None:
        """Give back what was taken over."""


class IterativeMethod(UnlearningMethod):
    """A method that takes optimizer steps: :meth:`around_step` combines the module's own losses on both parts.

    It uses the module's ``training_step`` and optimizer. ``batch`` is a dict with an entry for each of ``parts``.

    When the fit ends, the optimizer's state is emptied before the last checkpoint is saved: momentum is a sum of
    gradients of the records that are to be forgotten, and would keep them. Checkpoints from before the end have it, so
    that an interrupted run can go on; delete them afterwards.
    """

    def __init__(self, checkpoint: str | Path | None = None) -> None:
        super().__init__(checkpoint)
        self._since: float | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"{self.name} changes the loss that `training_step` returns, but {type(pl_module).__name__} sets "
                "`automatic_optimization = False`. Return the loss and let Lightning step the optimizer."
            )
        super().setup(trainer, pl_module, stage)

    def checked(self, loss: Tensor) -> Tensor:
        """The loss, if it is finite.

        Args:
            loss: A scalar.

        Returns:
            The same.

        Raises:
            RuntimeError: If it is not finite: the weights are then left as they are. Not where somebody else looks:
                ``EdgeStrategy`` at every device's update, loss scaling at the gradients.
        """
        looked_at = isinstance(self.trainer.strategy, EdgeStrategy)
        looked_at |= getattr(self.trainer.precision_plugin, "scaler", None) is not None
        if not looked_at and not bool(torch.isfinite(loss)):
            raise RuntimeError(
                f"{self.name}, step {self.trainer.global_step}: the loss is not finite. The weights were not changed by "
                "this step, and the original checkpoint is untouched. Lower the learning rate or the forget term's weight."
            )
        return loss

    def with_retained(self, step: Step, batch: Any, output: Any, loss: Tensor, weight: float) -> Any:
        """A step's output with ``loss``, and the module's own loss on the retain batch added to it.

        Args:
            step: The rest of the step.
            batch: The dict of batches.
            output: What the step gave for the forget batch.
            loss: The forget term.
            weight: Of the retain loss; 0 leaves the retain batch alone.

        Returns:
            What a training step may return; None where the step skips the retain batch.
        """
        if weight > 0:
            output = step(batch["retain"])
            if output is None:
                return None
            retain_loss = loss_of(output)
            self.log_terms(retain_loss=retain_loss)
            loss = loss + weight * retain_loss
        return with_loss(output, self.checked(loss))

    def log_terms(self, **values: Any) -> None:
        """Log values of this step under ``train/``."""
        for name, value in values.items():
            self.pl_module.log(f"train/{name}", value, on_step=True, on_epoch=False)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._since = time.perf_counter()
        for part, records in batch.items():
            if part in self.records_read:
                self.records_read[part] += num_records(records)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            started = time.perf_counter()
            torch.cuda.synchronize(pl_module.device)
            self.seconds += time.perf_counter() - started
        if self._memory is not None:
            self.peak_memory_bytes = self._memory.read()
        self._refuse_nonfinite_weights(pl_module)
        if not trainer.interrupted and not any(getattr(k, "interrupted", False) for k in trainer.checkpoint_callbacks):
            for optimizer in trainer.optimizers:
                optimizer.state.clear()

    @override
    def records_read_everywhere(self) -> dict[str, int]:
        counts = torch.tensor(
            list(self.records_read.values()), dtype=torch.float64, device=self.trainer.strategy.root_device
        )
        total = self.trainer.strategy.reduce(counts, reduce_op="sum")
        return {part: int(number) for part, number in zip(self.records_read, total.tolist(), strict=True)}


class OneShotMethod(UnlearningMethod):
    """A method that changes the weights once, before the first step; no step is taken.

    Subclasses write :meth:`unlearn`. If that fails, or leaves a weight that is not finite, the weights are put back and
    nothing is saved. Otherwise the checkpoint is saved at the end of the fit, where the Trainer's checkpoint callback
    would put it.
    """

    def __init__(self, checkpoint: str | Path | None = None) -> None:
        super().__init__(checkpoint)
        self.saved_to: Path | None = None
        self._limit: Any = None

    @abstractmethod
    def unlearn(self, pl_module: pl.LightningModule, data: ForgetRetainData) -> None:
        """Change the module's weights in place.

        Args:
            pl_module: The trained module, on its device.
            data: What is to be forgotten.
        """

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            warn_of_batchnorm(pl_module)
        if stage == "fit" and self._limit is None:
            self._limit = trainer.limit_train_batches
            trainer.limit_train_batches = 0

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if trainer.ckpt_path is not None:
            raise MisconfigurationException(
                f"{self.name} changes the weights once: a run of it that is over has nothing to resume, and would "
                "remove the forget set twice. For a further request, give the run's checkpoint as `checkpoint` "
                "(`groundwire unlearn --ckpt_path RUN`), and no `ckpt_path` to `trainer.fit`."
            )
        before = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}
        started = time.perf_counter()
        try:
            self.unlearn(pl_module, self.data)
            self._refuse_nonfinite_weights(pl_module)
        except BaseException:
            pl_module.load_state_dict(before)
            raise
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self.seconds = time.perf_counter() - started
        self.peak_memory_bytes = self._memory.read() if self._memory is not None else None
        trainer.strategy.barrier()

    @override
    def _result_path(self, trainer: pl.Trainer) -> Path | None:
        path = super()._result_path(trainer)
        if path is None and (keepers := trainer.checkpoint_callbacks):
            folder = getattr(keepers[0], "dirpath", None) or Path(trainer.default_root_dir) / "checkpoints"
            path = Path(folder) / "last.ckpt"
        return path

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        path = self._result_path(trainer)
        if path is None:
            return  # the user has switched checkpoints off
        trainer.save_checkpoint(path)
        self.saved_to = path
        rank_zero_info(f"Forgotten: {path}")

    @override
    def _undo(self, trainer: pl.Trainer) -> None:
        if self._limit is not None:
            trainer.limit_train_batches = self._limit
            self._limit = None


class MemoryGauge:
    """The most memory in use since it was made, above what there was then.

    On a GPU as torch counts it. On the CPU the resident memory of the process, where the system (Linux) lets its peak be
    set back.

    Args:
        device: Where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._level: int | None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._level = torch.cuda.memory_allocated(device)
        else:
            self._level = self._resident("VmRSS") if self._set_back() else None

    def read(self) -> int | None:
        """Bytes, at least 0; None where they cannot be told."""
        if self._level is None:
            return None
        cuda = self._device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self._device) if cuda else self._resident("VmHWM")
        return None if peak is None else max(0, peak - self._level)

    @staticmethod
    def _set_back() -> bool:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # another system, or not allowed
            return False
        return True

    @staticmethod
    def _resident(name: str) -> int | None:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return 1024 * int(line.split()[1])
        return None


def num_records(batch: Any) -> int:
    """Records in a batch of whatever structure: rows of its first tensor."""
    return next((len(leaf) for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), 0)


def _described(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Class and settings of an optimizer; plain values."""
    plain = (bool, int, float, str)
    groups = [{k: v for k, v in group.items() if isinstance(v, plain)} for group in optimizer.param_groups]
    return {"class": type(optimizer).__name__, "groups": groups}


def chance_level(num_classes: int) -> float:
    """Cross-entropy of uniform guessing, in nats."""
    return math.log(num_classes)
