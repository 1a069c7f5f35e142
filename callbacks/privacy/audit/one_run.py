"""The audit of a privacy claim in one training run, as a callback."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from groundwire.callbacks.logits import logits_in
from groundwire.callbacks.privacy.audit.canaries import (
    Canaries,
    RecordFormat,
    add_records,
    draw_canaries,
    record_format,
)
from groundwire.callbacks.privacy.audit.plots import plot_roc
from groundwire.callbacks.privacy.audit.result import AttackResult, AuditReport
from groundwire.callbacks.privacy.train_loader import replace_train_loader
from groundwire.callbacks.reporting.pictures import log_picture

Losses = Callable[[pl.LightningModule, tuple[Tensor, Tensor]], Tensor]
FEWEST_CANARIES = 20


def cross_entropies(pl_module: pl.LightningModule, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The cross entropy of each record, in nats.

    Args:
        pl_module: Its ``forward`` gives logits ``(B, C)``, or an output that has them as ``logits``.
        batch: Inputs ``(B, ...)`` and class indices ``(B,)``.

    Returns:
        Shape ``(B,)``.

    Raises:
        MisconfigurationException: If ``forward`` gives no logits ``(B, C)``.
    """
    x, y = batch
    logits = logits_in(pl_module(x))
    if logits is None or logits.ndim != 2:
        raise MisconfigurationException(
            f"PrivacyAudit reads logits (B, C) from {type(pl_module).__name__}.forward, and there are none: give `losses`, a "
            "function of (pl_module, batch) that returns the loss of each record."
        )
    return F.cross_entropy(logits.double(), y, reduction="none")


class PrivacyAudit(pl.Callback):
    """Tests a claimed epsilon in one training run: made-up records are trained on or not, and then told apart.

    Each canary, a random input with a random label, joins the training data by its own fair coin. At the end of the fit
    canaries with a small loss are guessed to have been in, those with a large loss to have been out. The more guesses are
    right, the larger epsilon must be. List this callback before the one that makes training private, which then counts
    the canaries as the records they are.

    The claim is ``claimed_epsilon``, or what a callback with a method ``privacy_spent()`` says at the end. An audit that
    refutes nothing proves nothing: the bound is far below epsilon where canaries are few, and only the module at the end
    is attacked.

    Logs ``audit/epsilon_lower``, ``audit/auc`` and, where there is a claim, ``audit/refuted`` (0 or 1); writes
    ``audit.csv``, ``audit.json``, ``audit.md`` and ``audit_roc.png``. Under DDP all processes draw the same canaries.

    Args:
        num_canaries: Canaries m, at least 20, half of which are trained on, roughly. More of them give a larger bound,
            at most about log(m / 3), and cost accuracy.
        num_classes: Labels of canaries are in ``[0, num_classes)``; by default the attribute ``num_classes`` of the
            module or the datamodule.
        claimed_epsilon: The claim, in nats; by default that of another callback.
        delta: Of the claim, and at which epsilon is bounded; by default that of the other callback, or 0 where there is
            none. It cannot be below that of the other callback.
        confidence: With which a claim is refuted, in (0, 1).
        guesses: Numbers of guesses, even; by default seven shares of m, with Bonferroni's correction.
        losses: From ``(pl_module, (x, y))`` to the loss of each record, ``(B,)``; called in evaluation mode without
            gradients. By default the cross entropy of the module's logits.
        batch_size: Canaries scored together.
        seed: Of canaries and coins; by default from the operating system. A resumed run takes that of its checkpoint.
        dirpath: Folder of the report; by default ``audit`` in the Trainer's ``default_root_dir``.

    Attributes:
        report: What was found, after the fit.
        canaries: The canaries and their coins, from the start of training on.

    Raises:
        ValueError: If a number is out of range.
        MisconfigurationException: At setup, if a callback with ``privacy_spent`` comes first; in the fit, if canaries
            cannot be added to the training data, the number of classes is unknown, or a checkpoint had other canaries.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> audit = PrivacyAudit(num_canaries=200, num_classes=10, claimed_epsilon=3.0, delta=1e-5)
        >>> trainer = Trainer(callbacks=[audit], logger=False, enable_checkpointing=False)

    Reference:
        Steinke, Nasr, Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023. arXiv:2305.08846
    """

    def __init__(
        self,
        num_canaries: int = 1000,
        num_classes: int | None = None,
        claimed_epsilon: float | None = None,
        delta: float | None = None,
        confidence: float = 0.95,
        guesses: list[int] | None = None,
        losses: Losses | None = None,
        batch_size: int = 500,
        seed: int | None = None,
        dirpath: str | Path | None = None,
    ) -> None:
        if num_canaries < FEWEST_CANARIES:
            raise ValueError(
                f"`num_canaries` must be at least {FEWEST_CANARIES}, got {num_canaries}: fewer can refute hardly any claim."
            )
        if num_classes is not None and num_classes < 2:
            raise ValueError(f"`num_classes` must be at least 2, got {num_classes}.")
        if claimed_epsilon is not None and not claimed_epsilon >= 0:
            raise ValueError(f"`claimed_epsilon` must be at least 0, got {claimed_epsilon}.")
        if delta is not None and not 0 <= delta < 1:
            raise ValueError(f"`delta` must be in [0, 1), got {delta}.")
        if not 0 < confidence < 1:
            raise ValueError(f"`confidence` must be in (0, 1), got {confidence}.")
        if guesses is not None and (not guesses or any(r < 2 or r % 2 or r > num_canaries for r in guesses)):
            raise ValueError(f"`guesses` must be even numbers from 2 to num_canaries={num_canaries}, got {guesses}.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        self.num_canaries = num_canaries
        self.num_classes = num_classes
        self.claimed_epsilon = claimed_epsilon
        self.delta = delta
        self.confidence = confidence
        self.guesses = guesses
        self.losses = losses or cross_entropies
        self.batch_size = batch_size
        self.seed = seed
        self.dirpath = dirpath
        self.report: AuditReport | None = None
        self.canaries: Canaries | None = None
        self._drawn_seed = 0
        self._format: RecordFormat | None = None
        self._loaded: dict[str, Any] | None = None
        self._undo: Callable[[], None] | None = None

    # ---------------------------------------------------------------- adding canaries

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        _check_order(self, trainer.callbacks)  # type: ignore[attr-defined]
        self.report = self.canaries = self._format = self._loaded = None
        drawn = secrets.randbits(63) if self.seed is None else self.seed
        self._drawn_seed = trainer.strategy.broadcast(drawn)
        self._restore_loader()
        self._undo = replace_train_loader(trainer, lambda loader: self._with_canaries(trainer, pl_module, loader))

    def _with_canaries(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loader: Any) -> Any:
        if self.canaries is None:
            found = record_format(loader)
            self._check_loaded(found)
            self._format = self._format or trainer.strategy.broadcast(found)  # an augmentation may draw
            num_classes = self._number_of_classes(trainer, pl_module)
            self.canaries = draw_canaries(self.num_canaries, self._format, num_classes, self._drawn_seed)
        x, y, included = self.canaries
        return add_records(loader, x[included], y[included])

    def _number_of_classes(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> int:
        datamodule = getattr(trainer, "datamodule", None)
        for found in (self.num_classes, *(getattr(o, "num_classes", None) for o in (pl_module, datamodule))):
            if isinstance(found, int):
                return found
        raise MisconfigurationException(
            "PrivacyAudit does not know how many classes there are, so it cannot draw labels: give it `num_classes`."
        )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.canaries is None:
            raise MisconfigurationException(
                "PrivacyAudit could not add its canaries: the strategy does not pass the train loader through "
                "`process_dataloader`."
            )
        if isinstance(trainer.train_dataloader, list | tuple | dict):
            raise MisconfigurationException(
                "PrivacyAudit adds canaries to one train loader, but there are several: give the Trainer one."
            )

    # ---------------------------------------------------------------- the audit

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self.canaries is not None
        epsilon, delta = self._claim(trainer)
        attack = AttackResult.from_scores(
            "loss",
            -self._score(trainer, pl_module, self.canaries),
            self.canaries.included,
            delta=delta or 0.0,
            confidence=self.confidence,
            bound="one-run",
            guesses=self.guesses,
        )
        self.report = AuditReport(attacks=(attack,), claimed_epsilon=epsilon, claimed_delta=delta)
        (rank_zero_warn if self.report.refuted else rank_zero_info)(f"PrivacyAudit: {self.report.verdict}")
        metrics = {"audit/epsilon_lower": attack.epsilon_lower, "audit/auc": attack.auc}
        if epsilon is not None:
            metrics["audit/refuted"] = float(self.report.refuted)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        self._write(trainer, self.report)

    def _claim(self, trainer: pl.Trainer) -> tuple[float | None, float | None]:
        """Epsilon and delta, each as given, or else as a callback says that makes training private."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if not callable(getattr(callback, "privacy_spent", None)):
                continue
            spent = callback.privacy_spent()
            if self.claimed_epsilon is not None:
                return self.claimed_epsilon, spent.delta if self.delta is None else self.delta
            if spent.adjacency != "add-remove":
                rank_zero_warn(
                    f"PrivacyAudit adds or leaves out records, which does not test a claim for {spent.adjacency}: epsilon "
                    "is bounded without one."
                )
                break
            if self.delta is not None and self.delta < spent.delta:
                rank_zero_warn(
                    f"PrivacyAudit(delta={self.delta}) is below the delta {spent.delta} of the claim, which is used instead."
                )
            return spent.epsilon, max(spent.delta, self.delta or 0.0)  # a claim holds at every larger delta too
        return self.claimed_epsilon, self.delta

    def _score(self, trainer: pl.Trainer, pl_module: pl.LightningModule, canaries: Canaries) -> Tensor:
        """The loss of every canary, ``(m,)``, float64."""
        found = []
        with torch.no_grad(), _evaluating(pl_module):
            for x, y in zip(*(torch.split(part, self.batch_size) for part in canaries[:2]), strict=True):
                batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input((x, y)))
                with trainer.precision_plugin.forward_context():
                    losses = self.losses(pl_module, batch)
                if losses.shape != y.shape:
                    raise MisconfigurationException(
                        f"`losses` must give one number a record, shape {tuple(y.shape)}, got {tuple(losses.shape)}: is "
                        "the loss averaged over the batch?"
                    )
                found.append(losses.double().cpu())
        losses = torch.cat(found)
        # A network that diverged says nothing: every canary looks alike.
        return torch.nan_to_num(losses, nan=float("inf"), posinf=float("inf"), neginf=float("-inf"))

    @rank_zero_only
    def _write(self, trainer: pl.Trainer, report: AuditReport) -> None:
        folder = Path(trainer.default_root_dir) / "audit" if self.dirpath is None else Path(self.dirpath)
        folder.mkdir(parents=True, exist_ok=True)
        report.to_csv(folder / "audit.csv")
        report.to_json(folder / "audit.json")
        (folder / "audit.md").write_text(report.table())
        figure, _ = plot_roc(report)
        file = folder / "audit_roc.png"
        figure.savefig(file, dpi=130)
        for logger in trainer.loggers:
            log_picture(logger, "audit/roc", file, figure, trainer.global_step)

    # ---------------------------------------------------------------- state and cleaning up

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._format is None:
            return {}
        form = self._format._asdict() | {"shape": list(self._format.shape)}
        return {"seed": self._drawn_seed, "num_canaries": self.num_canaries, "format": form}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        self._loaded = state_dict
        if self.seed is None:
            self._drawn_seed = state_dict["seed"]
        form = state_dict["format"]
        self._format = RecordFormat(**(form | {"shape": tuple(form["shape"])}))

    def _check_loaded(self, found: RecordFormat) -> None:
        """Refuse to go on with other canaries than those a checkpoint was trained with."""
        if self._loaded is None or self._format is None:
            return
        for name, before, now in (
            ("seed", self._loaded["seed"], self._drawn_seed),
            ("num_canaries", self._loaded["num_canaries"], self.num_canaries),
            ("shape of inputs", self._format.shape, found.shape),
            ("dtype of inputs", self._format.dtype, found.dtype),
        ):
            if before != now:
                raise MisconfigurationException(
                    f"The checkpoint was written with canaries of {name} {before}, and now it is {now}: some canaries "
                    "would be trained on that count as left out. Resume with the same."
                )

    def _restore_loader(self) -> None:
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._restore_loader()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore_loader()


def _check_order(audit: PrivacyAudit, callbacks: list[pl.Callback]) -> None:
    for callback in callbacks:
        if callback is audit:
            break
        if callable(getattr(callback, "privacy_spent", None)):
            name = type(callback).__name__
            raise MisconfigurationException(
                f"List PrivacyAudit before {name}: otherwise {name} does not count the canaries among the records."
            )


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, and after it for every submodule the mode it was in."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
