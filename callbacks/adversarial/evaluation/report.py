"""The evaluation of robustness as a callback."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from groundwire.callbacks.adversarial.attacks import PGD, Attack
from groundwire.callbacks.adversarial.evaluation.autoattack import autoattack_package
from groundwire.callbacks.adversarial.evaluation.plots import plot_accuracy_against_eps, plot_adversarial_examples
from groundwire.callbacks.adversarial.evaluation.result import RobustnessResult
from groundwire.callbacks.adversarial.evaluation.robustness import SWEEP, Progress, evaluate_robustness
from groundwire.callbacks.adversarial.threat import ThreatModel
from groundwire.callbacks.adversarial.victim import Victim
from groundwire.callbacks.checks import as_target
from groundwire.callbacks.logits import LogitsSource
from groundwire.callbacks.reporting.pictures import log_picture
from groundwire.callbacks.reporting.progress import work_progress
from groundwire.callbacks.step import Step, StepCallback
from groundwire.callbacks.teacher import Teacher
from groundwire.callbacks.weights import copy_of
from groundwire.plugins.random import root_seed


class RobustnessReport(StepCallback):
    """Measures how robust the module is: thoroughly when tested, briefly while it is trained.

    In ``test`` the first samples of the test data are attacked as :func:`evaluate_robustness` says, and the report goes to
    ``<dirpath>`` and the loggers: ``robustness.json``, ``robustness.md``, accuracy against the radius and images as
    pictures. Logs ``test/robust_acc``, the share of samples that withstand every attack, with ``test/robust_acc_low`` and
    ``_high``, its 95 % interval, ``test/robust/<attack>_acc`` for each, and ``test/robust/failed_checks``, the number of
    signs of masked gradients. In the validations of ``fit`` (and in ``validate``) one attack runs on some samples, and
    ``val/robust_acc`` is logged: what ModelCheckpoint should monitor, since robustness overfits.

    Under DDP each process attacks its share of the samples.

    Args:
        threat: What the attacker may do.
        num_samples: Test samples; at least 1,000 for a claim.
        attacks: By name; by default FGSM, PGD-20 and PGD-50 with 5 restarts, the latter with two losses.
        autoattack: Samples on which AutoAttack runs, the first; 0 for none. It needs the package pyautoattack.
        sweep: Radii in units of eps.
        probes: Samples on which the checks for masked gradients run; 0 for none.
        surrogate: A network whose adversarial inputs are tried on the module; None for no transfer, or, with a checkpoint,
            a copy of the module with other weights.
        surrogate_checkpoint: The surrogate's weights: a Lightning checkpoint, or the folder of its run.
        val_attack: For validation; by default PGD-10 on the margin.
        num_val_samples: Validation samples; 0 for none.
        batch_size: Inputs attacked together.
        pictures: Whether to draw.
        dirpath: Folder of the report; by default ``robustness`` in the run of the tested checkpoint, else in the folder of
            the Trainer's logger, else in its ``default_root_dir``.
        class_names: Names of the classes in the pictures.
        source: Where logits, labels and inputs are found.
        seed: Of the attacks; by default that of ``seed_everything``, else 0.
        name: Of several reports, each needs one: it logs ``test/<name>_acc``.

    Raises:
        ValueError: If a number is out of range.
        MisconfigurationException: At setup, if another report has its name, or AutoAttack is wanted and not installed.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> report = RobustnessReport(ThreatModel(eps=8 / 255), num_samples=1000)
        >>> trainer = Trainer(callbacks=[report], logger=False, enable_checkpointing=False)

    Reference:
        Carlini et al., "On Evaluating Adversarial Robustness", 2019. arXiv:1902.06705
    """

    def __init__(
        self,
        threat: ThreatModel,
        num_samples: int = 1000,
        attacks: Mapping[str, Attack] | None = None,
        autoattack: int = 0,
        sweep: Sequence[float] = SWEEP,
        probes: int = 500,
        surrogate: nn.Module | None = None,
        surrogate_checkpoint: str | Path | None = None,
        val_attack: Attack | None = None,
        num_val_samples: int = 500,
        batch_size: int = 100,
        pictures: bool = True,
        dirpath: str | Path | None = None,
        class_names: list[str] | None = None,
        source: LogitsSource | None = None,
        seed: int | None = None,
        name: str = "robust",
    ) -> None:
        for argument, value, least in (
            ("num_samples", num_samples, 1),
            ("autoattack", autoattack, 0),
            ("probes", probes, 0),
            ("num_val_samples", num_val_samples, 0),
            ("batch_size", batch_size, 1),
        ):
            if value < least:
                raise ValueError(f"`{argument}` must be at least {least}, got {value}.")
        if autoattack > num_samples:
            raise ValueError(f"`autoattack` must be at most num_samples={num_samples}, got {autoattack}.")
        self.threat = threat
        self.num_samples = num_samples
        self.attacks = attacks
        self.autoattack = autoattack
        self.sweep = sweep
        self.probes = probes
        self.surrogate = surrogate
        self.surrogate_checkpoint = surrogate_checkpoint
        self.val_attack = val_attack or PGD(10, loss="margin", early_stop=True)
        self.num_val_samples = num_val_samples
        self.batch_size = batch_size
        self.pictures = pictures
        self.dirpath = dirpath
        self.class_names = class_names
        self.source = source or LogitsSource()
        self.victim = Victim(self.source)
        self.seed = seed
        self.name = name
        self.result: RobustnessResult | None = None
        self._pl_module: pl.LightningModule | None = None
        self._trainer: pl.Trainer | None = None
        self._collected: list[tuple[Tensor, Tensor]] = []
        self._loader = 0

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if [c.name for c in callbacks if isinstance(c, RobustnessReport)].count(self.name) > 1:
            raise MisconfigurationException(
                f"Two RobustnessReports are named {self.name!r}: what they log would be mixed. Give each a name of its own."
            )
        self.victim.check(pl_module)
        if stage == "test" and self.autoattack:
            autoattack_package()
        super().setup(trainer, pl_module, stage)
        self._trainer, self._pl_module = trainer, pl_module
        self._collected = []

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._trainer = self._pl_module = None

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._trainer = self._pl_module = None

    # ---------------------------------------------------------------- collecting samples

    @override
    def around_evaluation(self, step: Step, batch: Any) -> Any:
        assert self._trainer is not None
        assert self._pl_module is not None
        missing = self._wanted(self._trainer) - sum(len(y) for _, y in self._collected)
        if self._trainer.sanity_checking or self._loader != 0 or missing <= 0:
            return step(batch)
        inputs, labels = self.source.inputs_and_labels(batch)
        with self.victim.watch(self._pl_module, inputs) as seen:
            output = step(batch)
        if seen:
            inputs = self.victim.chosen(seen)
        if not isinstance(inputs, Tensor):
            raise MisconfigurationException(
                f"RobustnessReport attacks one tensor of inputs, but the network is given a {type(inputs).__name__}. Name a "
                "submodule that takes a tensor: LogitsSource('model.net')."
            )
        self._collected.append((inputs[:missing].detach(), as_target(labels, len(inputs))[:missing]))
        return output

    def _wanted(self, trainer: pl.Trainer) -> int:
        """Samples for this process."""
        number = self.num_samples if trainer.testing else self.num_val_samples
        return math.ceil(number / trainer.world_size)

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

    def _samples(self) -> tuple[Tensor, Tensor] | None:
        collected, self._collected = self._collected, []
        if not collected:
            return None
        x, target = (torch.cat(part) for part in zip(*collected, strict=True))
        return x, target

    # ---------------------------------------------------------------- validation

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        samples = self._samples()
        if trainer.sanity_checking or not self._wanted(trainer):
            return
        counts = torch.zeros(2, dtype=torch.float64, device=pl_module.device)
        if samples is not None:
            alive = self._withstood(pl_module, *samples)
            counts += torch.tensor([float(alive.sum()), float(len(alive))], device=pl_module.device)
        right, number = (float(count) for count in trainer.strategy.reduce(counts, reduce_op="sum"))
        if number:
            value = torch.tensor(right / number, dtype=torch.float64, device=counts.device)
            pl_module.log(f"val/{self.name}_acc", value, prog_bar=True, sync_dist=True)

    def _withstood(self, pl_module: pl.LightningModule, x: Tensor, target: Tensor) -> Tensor:
        result = evaluate_robustness(
            pl_module,
            x,
            target,
            self.threat,
            attacks={"val": self.val_attack},
            sweep=(),
            probes=0,
            logits_of=lambda inputs: self.victim.logits(pl_module, inputs),
            batch_size=self.batch_size,
            seed=root_seed(self.seed),
        )
        return result.survived["val"]

    # ---------------------------------------------------------------- test

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        samples = self._samples()
        found: RobustnessResult | None = None
        if samples is not None:
            with work_progress(trainer, "Attacks") as progress:
                found = self._evaluate(trainer, pl_module, *samples, progress)
        parts = _gathered(trainer, found)
        if not parts:
            raise MisconfigurationException("RobustnessReport saw no test sample: is the test loader empty?")
        self.result = RobustnessResult.merged(parts)
        if self.result.num_samples < self.num_samples:
            rank_zero_warn(
                f"The test data have {self.result.num_samples} samples: fewer than num_samples={self.num_samples}."
            )
        self._log(pl_module, self.result)
        self._write(trainer, self.result, self._folder(trainer))

    def _evaluate(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, x: Tensor, target: Tensor, progress: Progress
    ) -> RobustnessResult:
        surrogate = self._surrogate(trainer, pl_module)
        victim = None if surrogate is None else surrogate.module
        if isinstance(victim, pl.LightningModule) and self.surrogate is None:
            victim = _Logits(victim, self.victim)
        try:
            return evaluate_robustness(
                pl_module,
                x,
                target,
                self.threat,
                attacks=self.attacks,
                autoattack=math.ceil(self.autoattack / trainer.world_size),
                sweep=self.sweep,
                probes=math.ceil(self.probes / trainer.world_size),
                surrogate=victim,
                logits_of=lambda inputs: self.victim.logits(pl_module, inputs),
                batch_size=self.batch_size,
                seed=root_seed(self.seed) + trainer.global_rank,
                progress=progress,
            )
        finally:
            if surrogate is not None:
                surrogate.release()

    def _surrogate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Teacher | None:
        if self.surrogate is None and self.surrogate_checkpoint is None:
            return None
        with torch.inference_mode(False):  # its weights have to take part in gradients
            network = self.surrogate if self.surrogate is not None else copy_of(pl_module)
            surrogate = Teacher(network, self.surrogate_checkpoint)
            surrogate.prepare(pl_module, trainer.strategy.root_device)
        return surrogate

    def _log(self, pl_module: pl.LightningModule, result: RobustnessResult) -> None:
        accuracies = result.accuracies()
        headline, low, high, _ = accuracies.pop("worst_case")
        values = {
            f"test/{self.name}_acc": headline,
            f"test/{self.name}_acc_low": low,
            f"test/{self.name}_acc_high": high,
        }
        values |= {f"test/{self.name}/{name}_acc": found[0] for name, found in accuracies.items()}
        checks = result.checks()
        if checks:
            values[f"test/{self.name}/failed_checks"] = float(sum(not check.passed for check in checks))
        exact = {name: torch.tensor(v, dtype=torch.float64, device=pl_module.device) for name, v in values.items()}
        pl_module.log_dict(exact, sync_dist=True)  # every process has the same

    @rank_zero_only
    def _write(self, trainer: pl.Trainer, result: RobustnessResult, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        stem = "robustness" if self.name == "robust" else self.name
        (folder / f"{stem}.json").write_text(json.dumps(result.as_dict(), indent=1) + "\n")
        (folder / f"{stem}.md").write_text(result.as_markdown())
        rank_zero_info(f"Robustness: {folder / f'{stem}.md'}")
        if not self.pictures:
            return
        figures = {}
        if result.sweep:
            figures["accuracy_against_eps"] = plot_accuracy_against_eps({type(self._pl_module).__name__: result})[0]
        examples = result.examples
        if (
            examples is not None
            and examples.clean.ndim == 4
            and examples.clean.shape[1] in (1, 3)
            and len(examples.clean)
        ):
            figures["adversarial_examples"] = plot_adversarial_examples(examples, class_names=self.class_names)[0]
        for name, figure in figures.items():
            file = folder / f"{stem}_{name}.png"
            figure.savefig(file, dpi=130)
            for logger in trainer.loggers:
                log_picture(logger, f"{stem}/{name}", file, figure, trainer.global_step)

    def _folder(self, trainer: pl.Trainer) -> Path:
        if self.dirpath is not None:
            return Path(self.dirpath)
        checkpoint = trainer.ckpt_path
        if checkpoint is not None and Path(checkpoint).is_file():
            folder = Path(checkpoint).resolve().parent
            return (folder.parent if folder.name == "checkpoints" else folder) / "robustness"
        return Path(trainer.log_dir or trainer.default_root_dir) / "robustness"  # asks all processes


class _Logits(nn.Module):
    """Another LightningModule, read where the tested one is."""

    def __init__(self, module: pl.LightningModule, victim: Victim) -> None:
        super().__init__()
        self.module = module
        self.victim = victim

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.victim.logits(self.module, x)


def _gathered(trainer: pl.Trainer, found: RobustnessResult | None) -> list[RobustnessResult]:
    """The results of all processes, where there are any."""
    if trainer.world_size == 1:
        return [] if found is None else [found]
    everywhere: list[RobustnessResult | None] = [None] * trainer.world_size
    torch.distributed.all_gather_object(everywhere, found)
    return [part for part in everywhere if part is not None]
