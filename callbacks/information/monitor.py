"""Watches concentration and separation of a network's outputs during training, and draws them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor
from typing_extensions import override

from groundwire.callbacks.classifier import epochs_done
from groundwire.callbacks.information.functional import log_probs
from groundwire.callbacks.information.metrics import NormalizedCMI
from groundwire.callbacks.information.plots import plot_centroids, plot_cmi_evolution, plot_simplex
from groundwire.callbacks.logits import LogitsSource
from groundwire.callbacks.reporting.pictures import log_picture
from groundwire.callbacks.step import Step, StepCallback

_LISTED = 100  # classes up to which each is logged
_SHOWN = 2000  # outputs in the picture of the simplex


class CMIMonitor(StepCallback):
    """Logs CMI, Gamma, NCMI and accuracy on the validation and test data, and draws how they evolve.

    Logs ``val/cmi_nats``, ``val/gamma_nats``, ``val/ncmi`` and ``val/top1``, the same under ``test/``, and there also
    ``test/recall_<c>`` and ``test/cmi_nats_<c>`` of each class ``c`` (up to 100 classes). At the end of the fit, pictures
    go to ``<dirpath>`` and to every logger that takes images (W&B, TensorBoard): the path of CMI against
    Gamma over the epochs, the class centroids as a heat map, and the outputs on the simplex. The path is part of the
    checkpoint: a resumed run draws the whole of it. Of several loaders each is logged, under Lightning's
    ``/dataloader_idx_<k>``, and the first is drawn. A callback outside of it that runs the step several times is counted
    several times: put the monitor before such callbacks.

    Args:
        temperature: Outputs are ``softmax(logits / temperature)``.
        pictures: Whether to draw.
        dirpath: Folder of the pictures; ``<default_root_dir>/pictures`` where None.
        class_names: Names of the classes in the pictures.
        source: Where logits and labels are found.
        name: Of several monitors, each needs one: it logs ``val/<name>/cmi_nats`` and so on.

    Raises:
        ValueError: If the temperature is not positive.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[CMIMonitor()], logger=False, enable_checkpointing=False)

    Reference:
        Yang, Mohajer Hamidi, Ye, Tan, Yang, "Conditional Mutual Information Constrained Deep Learning for
        Classification", 2023. arXiv:2309.09123
    """

    def __init__(
        self,
        temperature: float = 1.0,
        pictures: bool = True,
        dirpath: str | Path | None = None,
        class_names: list[str] | None = None,
        source: LogitsSource | None = None,
        name: str | None = None,
    ) -> None:
        if not 0 < temperature < float("inf"):
            raise ValueError(f"`temperature` must be positive, got {temperature}.")
        self.temperature = temperature
        self.pictures = pictures
        self.dirpath = dirpath
        self.class_names = class_names
        self.source = source or LogitsSource()
        self.name = name
        self.history: dict[str, list[float]] = {"epoch": [], "cmi_nats": [], "gamma_nats": [], "ncmi": [], "top1": []}
        self._trainer: pl.Trainer | None = None
        self._pl_module: pl.LightningModule | None = None
        self._metrics: dict[int, NormalizedCMI] = {}  # by loader
        self._loader = 0  # whose batch it is
        self._shown: list[tuple[Tensor, Tensor]] = []

    @property
    def state_key(self) -> str:
        """Under which checkpoints hold the state."""
        return f"{type(self).__qualname__}[{self.name or ''}]"

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._trainer, self._pl_module = trainer, pl_module
        if stage == "fit" and trainer.global_step == 0:
            for values in self.history.values():
                values.clear()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._forget()

    @override
    def around_evaluation(self, step: Step, batch: Any) -> Any:
        assert self._trainer is not None
        assert self._pl_module is not None
        if self._trainer.sanity_checking:
            return step(batch)
        with self.source.open(self._pl_module) as calls:
            output = step(batch)
        if output is None and not calls:
            return output
        _, labels = self.source.inputs_and_labels(batch)
        with torch.autocast(self._pl_module.device.type, enabled=False):
            logits, target = self.source.prepare(self.source.logits(calls), labels)
            self._metric_of(self._loader, logits.shape[1]).update(logits, target)
            if self.pictures and self._loader == 0 and sum(len(y) for _, y in self._shown) < _SHOWN:
                self._shown.append((log_probs(logits.detach(), 1 / self.temperature).exp().cpu(), target.cpu()))
        return output

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._forget()

    @override
    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start()

    @override
    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start()

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._loader = dataloader_idx

    @override
    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._loader = dataloader_idx

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        values = self._log("val", trainer, pl_module)
        if trainer.state.fn == "fit" and values:
            for name, value in ({"epoch": int(epochs_done(trainer))} | values).items():
                self.history[name].append(float(value))

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log("test", trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.pictures and 0 in self._metrics and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            with self._metrics[0].sync_context():  # of all processes
                centroids = self._metrics[0].centroids.cpu()
            self._draw(trainer, centroids)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"history": {name: list(values) for name, values in self.history.items()}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = {name: list(values) for name, values in state_dict["history"].items()}

    def _start(self) -> None:
        self._shown = []
        for metric in self._metrics.values():
            metric.reset()

    def _forget(self) -> None:
        self._trainer = self._pl_module = None
        self._metrics, self._shown = {}, []

    def _metric_of(self, loader: int, num_classes: int) -> NormalizedCMI:
        assert self._pl_module is not None
        if loader not in self._metrics:
            device = self._pl_module.device
            dtype = torch.float32 if device.type == "mps" else torch.float64
            metric = NormalizedCMI(num_classes, temperature=self.temperature, validate_args=False, accumulate=dtype)
            self._metrics[loader] = metric.to(device)
        return self._metrics[loader]

    def _log(self, stage: str, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """Log the results of each loader; returns those of the first."""
        loaders = trainer.val_dataloaders if stage == "val" else trainer.test_dataloaders
        number = len(loaders) if isinstance(loaders, list | tuple | dict) else 1
        results: list[dict[str, float]] = []
        for loader in range(number):
            here = self._metrics[loader].num_classes if loader in self._metrics else 0
            # a process without a batch does not know the classes, and has to take part all the same
            classes = trainer.strategy.reduce(torch.tensor(here, device=pl_module.device), reduce_op="max")
            if not int(classes):
                results.append({})
                continue
            found = self._metric_of(loader, int(classes)).compute()
            values = {
                "cmi_nats": float(found["cmi"]),
                "gamma_nats": float(found["gamma"]),
                "ncmi": float(found["ncmi"]),
                "top1": float(found["accuracy"]),
            }
            results.append(values)
            if stage == "test" and len(found["recall_per_class"]) <= _LISTED:
                for name, key in (("recall", "recall_per_class"), ("cmi_nats", "cmi_per_class")):
                    values = values | {f"{name}_{c}": float(value) for c, value in enumerate(found[key])}
            prefix = stage if self.name is None else f"{stage}/{self.name}"
            suffix = f"/dataloader_idx_{loader}" if number > 1 else ""
            exact = {
                f"{prefix}/{name}{suffix}": torch.tensor(value, dtype=torch.float64) for name, value in values.items()
            }
            pl_module.log_dict(exact, sync_dist=True, add_dataloader_idx=False)
        return results[0]

    @rank_zero_only
    def _draw(self, trainer: pl.Trainer, centroids: Tensor) -> None:
        folder = Path(self.dirpath) if self.dirpath is not None else Path(trainer.default_root_dir) / "pictures"
        folder = folder / (self.name or "")
        folder.mkdir(parents=True, exist_ok=True)
        path = {"run": (self.history["gamma_nats"], self.history["cmi_nats"])}
        probs, labels = (torch.cat(part) for part in zip(*self._shown, strict=True))
        seen = ~centroids.isnan().any(dim=1)
        figures = {
            "cmi_evolution": plot_cmi_evolution(path, accuracy={"run": self.history["top1"]})[0],
            "simplex": plot_simplex(probs, labels, class_names=self.class_names)[0],
        }
        if bool(seen.all()):
            figures["centroids"] = plot_centroids(centroids, class_names=self.class_names)[0]
        for name, figure in figures.items():
            file = folder / f"{name}.png"
            figure.savefig(file, dpi=130)
            for logger in trainer.loggers:
                log_picture(logger, f"pictures/{name}", file, figure, trainer.global_step)
