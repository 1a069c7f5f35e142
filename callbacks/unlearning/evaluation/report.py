"""The evaluation of unlearning as a callback."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from matplotlib.figure import Figure
from torch import nn
from typing_extensions import override

from groundwire.callbacks.logits import LogitsSource
from groundwire.callbacks.reporting.pictures import log_picture
from groundwire.callbacks.reporting.progress import work_progress
from groundwire.callbacks.unlearning.base import UnlearningMethod
from groundwire.callbacks.unlearning.data import ForgetRetainData, earlier_request, forget_retain_data
from groundwire.callbacks.unlearning.evaluation.evaluation import compare_unlearning
from groundwire.callbacks.unlearning.evaluation.plots import plot_unlearning
from groundwire.callbacks.unlearning.evaluation.result import UnlearningResult, unlearning_rows, unlearning_table
from groundwire.callbacks.unlearning.records import OutputLoss
from groundwire.callbacks.weights import copy_of, find_checkpoint, fingerprint, load_weights, read_checkpoint
from groundwire.plugins.random import root_seed

_PACKAGES = ("groundwire", "torch", "lightning", "numpy", "scikit-learn")


class UnlearningReport(pl.Callback):
    """Measures what a method of unlearning has done, at the end of its fit, and certifies it.

    The original model, the one that has forgotten, and the reference are measured as :func:`compare_unlearning` says, on
    the datamodule's forget and retain sets, what earlier requests removed, and its test data (validation data where there
    are none: the report says which). The reference's costs are read from its checkpoint, if it was made by a method such as
    ``Retrain``. The report goes to
    ``<dirpath>``: ``unlearning.md`` and ``.json`` with all figures, ``unlearning.png``, ``relearning.csv``, and
    ``certificate.json`` with what was done to which weights and data. Loggers get the figures of the model that has
    forgotten as ``unlearn/forget_acc``, ``unlearn/mia_efficacy``, ``unlearn/kl_forget`` and so on; W&B also the table.

    Copies are measured: the module is left as it is. Under DDP the first process does the work; a test loader that its
    datamodule splits over processes in another way than the datamodules of Groundwire is measured in its share.

    Args:
        reference: The same model, retrained without the forget set: a Lightning checkpoint, or the folder of its run.
            None if there is none.
        relearn: Whether to try to relearn the forget set; see :func:`relearning_curve`.
        relearn_steps: Steps after which to give up.
        relearn_lr: Learning rate of Adam.
        relearn_fraction: Share of the forget set that the attacker has, in (0, 1].
        batch_size: Records given to a model at once.
        dirpath: Folder of the report; by default ``unlearning`` in the folder of the Trainer's logger, else in its
            ``default_root_dir``.
        pictures: Whether to draw.
        source: Where inputs, labels and outputs are found.
        output_loss: Of one record, from its outputs and its label; by default cross-entropy, or the squared error for
            labels that are values.
        seed: Of the attacker's choices; by default that of ``seed_everything``, else 0.
        name: Of several reports, each needs one: it logs ``<name>/forget_acc``, and its files begin with it.

    Attributes:
        results: What was found, by model: ``original``, ``unlearned``, ``reference``; after a fit.

    Raises:
        ValueError: If a number is out of range; at setup, if the reference is another model; at the end of a fit, as
            :func:`compare_unlearning` says.
        FileNotFoundError: At setup, if the reference is missing.
        MisconfigurationException: At setup, if the Trainer has no method of unlearning, another report of this name, or
            no data to forget or to test on.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> report = UnlearningReport(reference="runs/retrain", relearn_steps=30)
        >>> trainer = Trainer(callbacks=[report], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        reference: str | Path | None = None,
        relearn: bool = True,
        relearn_steps: int = 60,
        relearn_lr: float = 1e-3,
        relearn_fraction: float = 1.0,
        batch_size: int = 500,
        dirpath: str | Path | None = None,
        pictures: bool = True,
        source: LogitsSource | None = None,
        output_loss: OutputLoss | None = None,
        seed: int | None = None,
        name: str = "unlearn",
    ) -> None:
        for argument, value in (("relearn_steps", relearn_steps), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"`{argument}` must be at least 1, got {value}.")
        if not relearn_lr > 0:
            raise ValueError(f"`relearn_lr` must be above 0, got {relearn_lr}.")
        if not 0 < relearn_fraction <= 1:
            raise ValueError(f"`relearn_fraction` must be in (0, 1], got {relearn_fraction}.")
        self.reference = reference
        self.relearn = relearn
        self.relearn_steps = relearn_steps
        self.relearn_lr = relearn_lr
        self.relearn_fraction = relearn_fraction
        self.batch_size = batch_size
        self.dirpath = dirpath
        self.pictures = pictures
        self.source = source
        self.output_loss = output_loss
        self.seed = seed
        self.name = name
        self.results: dict[str, UnlearningResult] = {}

    @property
    def result(self) -> UnlearningResult | None:
        """What was found of the model that has forgotten; None before the end of a fit."""
        return self.results.get("unlearned")

    # ---------------------------------------------------------------- set-up

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self.results = {}
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if [c.name for c in callbacks if isinstance(c, UnlearningReport)].count(self.name) > 1:
            raise MisconfigurationException(
                f"Two UnlearningReports are named {self.name!r}: what they log would be mixed. Give each a name of its own."
            )
        _method_of(trainer)
        forget_retain_data(trainer, type(self).__name__)
        _test_loader(trainer)
        if self.reference is not None:
            load_weights(copy_of(pl_module), self.reference)

    # ---------------------------------------------------------------- the end of the fit

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = self._folder(trainer)
        found: tuple[dict[str, UnlearningResult], str] = {}, ""
        read = _method_of(trainer).records_read_everywhere()  # asks all processes
        if trainer.is_global_zero:
            try:
                found = self._report(trainer, pl_module, folder, read), ""
            except Exception as error:
                trainer.strategy.broadcast(({}, f"{type(error).__name__}: {error}"))  # the others wait for an answer
                raise
        self.results, failure = trainer.strategy.broadcast(found)
        if failure:
            raise RuntimeError(f"UnlearningReport failed in the first process: {failure}")

    def _report(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, folder: Path, read: Mapping[str, int]
    ) -> dict[str, UnlearningResult]:
        method = _method_of(trainer)
        certificate = method.certificate() | {"records_read": dict(read)}
        models, reference = self._models(trainer, pl_module, method)
        split, _ = _test_loader(trainer)
        results = {name: replace(result, test_split=split) for name, result in self._measured(trainer, models).items()}
        results["unlearned"] = replace(
            results["unlearned"],
            seconds=method.seconds,
            recording_seconds=method.recording_seconds,
            records_read=dict(read),
            peak_memory_bytes=method.peak_memory_bytes,
            touches_retain=read.get("retain", 0) > 0,
        )
        if reference is not None:
            results["reference"] = replace(results["reference"], **_costs_in(Path(reference["checkpoint"])))
        certificate |= {
            "test_split": split,
            "figures": {name: result.as_dict() for name, result in results.items()},
            "reference": reference,
            "versions": _versions(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self._write(trainer, results, certificate, folder)
        self._log(trainer, results)
        return results

    def _models(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, method: UnlearningMethod
    ) -> tuple[dict[str, nn.Module], dict[str, str] | None]:
        """Copies of all models, on the device of the fit, and what the reference is."""
        assert method.original is not None
        models: dict[str, nn.Module] = {"original": copy_of(method.original), "unlearned": copy_of(pl_module)}
        about = None
        if self.reference is not None:
            file = find_checkpoint(self.reference)
            models["reference"] = copy_of(pl_module)
            load_weights(models["reference"], file)
            about = {"checkpoint": str(file), "sha256": fingerprint(models["reference"].state_dict())}
            if about["sha256"] == fingerprint(method.original.state_dict()):
                rank_zero_warn(
                    f"The reference {file} is the original model itself, which was trained on what is to be forgotten: "
                    "give a model that was retrained without it."
                )
            _warn_of_other_data(forget_retain_data(trainer, type(self).__name__), file)
        trained = {name: p.requires_grad for name, p in pl_module.named_parameters()}
        for model in models.values():
            for name, p in model.named_parameters():  # the original's are frozen; all are relearned alike
                p.requires_grad_(trained[name])
            model.to(trainer.strategy.root_device)
        return models, about

    def _measured(self, trainer: pl.Trainer, models: Mapping[str, nn.Module]) -> dict[str, UnlearningResult]:
        data = forget_retain_data(trainer, type(self).__name__)
        with work_progress(trainer, "Unlearning") as progress:
            return compare_unlearning(
                models,
                data.batches("forget", self.batch_size),
                data.batches("retain", self.batch_size) if data.retain_access else None,
                _batches(_test_loader(trainer)[1]),
                earlier=data.batches("earlier", self.batch_size) if len(data.earlier) else None,
                reference="reference" if "reference" in models else None,
                original="original",
                output_loss=self.output_loss,
                source=self.source,
                relearn=self.relearn,
                relearn_steps=self.relearn_steps,
                relearn_lr=self.relearn_lr,
                relearn_fraction=self.relearn_fraction,
                batch_size=self.batch_size,
                seed=root_seed(self.seed),
                progress=progress,
            )

    # ---------------------------------------------------------------- what is left

    def _write(
        self, trainer: pl.Trainer, results: dict[str, UnlearningResult], certificate: dict[str, Any], folder: Path
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        prefix = "" if self.name == "unlearn" else f"{self.name}_"
        figures = {name: result.as_dict() for name, result in results.items()}
        texts = {
            "unlearning.md": unlearning_table(results),
            "unlearning.json": json.dumps(figures, indent=1) + "\n",
            "certificate.json": json.dumps(certificate, indent=1) + "\n",
        }
        if self.relearn:
            texts["relearning.csv"] = _curves(results)
        for name, text in texts.items():
            _replace(folder / f"{prefix}{name}", text)
        if self.pictures:
            file = folder / f"{prefix}unlearning.png"
            figure, _ = plot_unlearning(results)
            _replace(file, figure)
            for logger in trainer.loggers:
                log_picture(logger, f"{self.name}/figure", file, figure, trainer.global_step)
        rank_zero_info(f"Unlearning: {folder / f'{prefix}unlearning.md'}")

    def _log(self, trainer: pl.Trainer, results: dict[str, UnlearningResult]) -> None:
        scalars = {f"{self.name}/{name}": value for name, value in results["unlearned"].scalars().items()}
        columns, rows = unlearning_rows(results)
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step)
            if hasattr(logger, "log_table"):  # W&B
                logger.log_table(f"{self.name}/table", columns=columns, data=rows, step=trainer.global_step)

    def _folder(self, trainer: pl.Trainer) -> Path:
        run = trainer.log_dir or trainer.default_root_dir  # asks all processes
        return Path(self.dirpath) if self.dirpath is not None else Path(run) / "unlearning"


def _method_of(trainer: pl.Trainer) -> UnlearningMethod:
    """The method in the Trainer's callbacks; that it is the only one, it checks itself."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, UnlearningMethod):
            return callback
    raise MisconfigurationException(
        "UnlearningReport reports on a method of unlearning, but the Trainer has none: add one of "
        "groundwire.callbacks.unlearning to its callbacks, or use evaluate_unlearning for a model of your own."
    )


def _test_loader(trainer: pl.Trainer) -> tuple[Literal["test", "validation"], Any]:
    """The datamodule's loader (or loaders) of test data, else of validation data, and which it is."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    names: dict[Literal["test", "validation"], str] = {"test": "test_dataloader", "validation": "val_dataloader"}
    for split, name in names.items():
        try:
            loader = getattr(data, name)()
        except MisconfigurationException:  # Lightning's own says so where there is none
            continue
        if loader is not None and not (isinstance(loader, list | tuple) and not loader):
            return split, loader
    raise MisconfigurationException(
        f"UnlearningReport needs data that no model was trained on: give {type(data).__name__} test or validation data."
    )


def _batches(loader: Any) -> Iterator[Any]:
    """All batches of one loader or of several, whole even where the process has a share."""
    several = (
        loader.values() if isinstance(loader, Mapping) else loader if isinstance(loader, list | tuple) else [loader]
    )
    for one in several:
        if getattr(one, "num_ranks", 1) > 1:  # groundwire.datamodules split by this
            one = copy(one)
            one.rank, one.num_ranks = 0, 1
        yield from one


def _costs_in(file: Path) -> dict[str, Any]:
    """What the method that made a checkpoint cost, as its callback's state tells; nothing where there is none."""
    callbacks = read_checkpoint(file, mmap=True).get("callbacks")
    states = callbacks.values() if isinstance(callbacks, dict) else ()
    for state in states:
        if isinstance(state, dict) and {"method", "seconds"} <= state.keys():
            read = state.get("records_read")
            touches = None if read is None else read.get("retain", 0) > 0
            return {"seconds": state["seconds"], "records_read": read, "touches_retain": touches}
    return {}


def _warn_of_other_data(data: ForgetRetainData, file: Path) -> None:
    """Say if the reference's checkpoint tells that it was retrained without other records, or on other data."""
    state = earlier_request(read_checkpoint(file, mmap=True))
    if state is None:
        return
    asked, without = (
        torch.cat(rows).sort().values
        for rows in ((data.earlier, data.forget_indices), (state["earlier"], state["forget"]))
    )
    if state["data_digest"] != data.data_digest:
        rank_zero_warn(
            f"The reference {file} was trained on other data than the model that is to forget: the gaps to it say little."
        )
    elif not torch.equal(asked, without):
        rank_zero_warn(
            f"The reference {file} was retrained without {len(without)} records, which are not the {len(asked)} that are "
            "forgotten here: the gaps to it say little. Retrain with the same settings of ForgetRetain."
        )


def _curves(results: Mapping[str, UnlearningResult]) -> str:
    """The relearning curves as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "step", "forget_loss", "forget_acc"])
    for name, result in results.items():
        curve = result.relearning
        if curve is not None:
            accs = curve.accs or [""] * len(curve.losses)
            writer.writerows([name, *row] for row in zip(range(len(curve.losses)), curve.losses, accs, strict=True))
    return text.getvalue()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from its sources
            found[package] = "unknown"
    return found


def _replace(file: Path, content: str | Figure) -> None:
    """Write a file in one move, so that it is complete or as it was."""
    partial = file.with_name(f"{file.name}.partial")
    if isinstance(content, str):
        partial.write_text(content)
    else:
        content.savefig(partial, dpi=130, format="png")
    os.replace(partial, file)
