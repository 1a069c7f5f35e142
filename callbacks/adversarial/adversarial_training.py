"""Adversarial training: the module's own step, on adversarial inputs."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from groundwire.callbacks.adversarial.attacks import PGD, Attack
from groundwire.callbacks.adversarial.attacks.base import untouched
from groundwire.callbacks.adversarial.callback import AdversarialCallback
from groundwire.callbacks.adversarial.threat import ThreatModel
from groundwire.callbacks.checks import as_target
from groundwire.callbacks.logits import LogitsSource
from groundwire.callbacks.step import Notes, Step, loss_of
from groundwire.plugins.random import root_seed, stream

_GUARD_SAMPLES = 256
_GUARD_ATTACK = PGD(num_steps=5, track="last")


class AdversarialTraining(AdversarialCallback):
    """Lets the network see adversarial inputs in the module's own ``training_step``.

    With the default attack it is PGD-AT and costs ``num_steps + 1`` forward and backward passes a step; with
    ``attack=RandomFGSM()`` it is fast adversarial training and costs two. What single-step attacks can end in, a sudden
    loss of all robustness to stronger ones (catastrophic overfitting), ``overfit_guard`` looks out for: after every epoch
    the accuracy of one fixed batch under PGD-5, logged as ``<name>/guard_acc``.

    Inputs are replaced where the network takes them (the module's ``forward``, or the submodule that ``source`` names), so
    that what a step does before, normalising and augmenting, comes before the attack.

    Args:
        threat: What the attacker may do.
        attack: How inputs are found; by default ``PGD(num_steps=10, track="last")``.
        mix: Share of the batch that is attacked, in (0, 1].
        overfit_guard: By how much the guard's accuracy may fall from one epoch to the next, in (0, 1]; None for no guard.
        on_overfit: ``"stop"`` goes back to the weights of the epoch before and ends the fit, ``"restore"`` goes back and
            goes on with the optimizer as it is, ``"warn"`` only says it. Checkpoints then hold those weights and the
            guard's batch as well.
        warmup_epochs: Epochs in which the radius grows from 0.
        source: Where labels are found, and logits for the attack.
        seed: Of random starts; by default that of ``seed_everything``.
        name: Under which it logs and keeps its state.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At setup, beside another callback of this family that attacks.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> callback = AdversarialTraining(ThreatModel(eps=8 / 255), PGD(num_steps=7, track="last"))
        >>> trainer = Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)

    Reference:
        Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018. arXiv:1706.06083
        Wong, Rice, Kolter, "Fast is better than free: Revisiting adversarial training", ICLR 2020. arXiv:2001.03994
    """

    changes_loss = False
    accepts_soft_labels = True
    replaces_inputs = True

    def __init__(
        self,
        threat: ThreatModel,
        attack: Attack | None = None,
        mix: float = 1.0,
        overfit_guard: float | None = None,
        on_overfit: Literal["stop", "restore", "warn"] = "stop",
        warmup_epochs: float = 0.0,
        source: LogitsSource | None = None,
        seed: int | None = None,
        name: str = "adversarial_training",
    ) -> None:
        super().__init__(threat, warmup_epochs, source, seed, name)
        if not 0 < mix <= 1:
            raise ValueError(f"`mix` must be in (0, 1], got {mix}: leave the callback out to attack nothing.")
        if overfit_guard is not None and not 0 < overfit_guard <= 1:
            raise ValueError(f"`overfit_guard` must be in (0, 1], or None for no guard, got {overfit_guard}.")
        if on_overfit not in ("stop", "restore", "warn"):
            raise ValueError(f"`on_overfit` must be 'stop', 'restore' or 'warn', got {on_overfit!r}.")
        self.attack = attack or PGD(num_steps=10, track="last")
        self.mix = mix
        self.overfit_guard = overfit_guard
        self.on_overfit = on_overfit
        self._guard: dict[str, Any] = {}  # the guard's inputs and target; accuracy and weights of the last epoch

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.global_step == 0:
            self._guard = {}

    @override
    def around_step(self, step: Step, batch: Any) -> Any:
        batch_inputs, labels = self.source.inputs_and_labels(batch)
        call = self.source.call
        wanted = (
            {"first": 0, "last": None}[call] if isinstance(call, str) else call
        )  # which is the last is not known yet
        calls = itertools.count()
        made: list[tuple[Any, Tensor]] = []

        def replace(inputs: Any) -> Any:
            if next(calls) != wanted and (wanted is not None or not torch.is_grad_enabled()):
                return inputs  # not the call that is trained
            for before, after in made:
                if before is inputs:  # a second call on the same inputs
                    return after
            made.append((inputs, self._adversarial(inputs, labels)))
            return made[-1][1]

        with self.victim.watch(self._module, batch_inputs, replace):
            output = step(batch)
        if not made:
            raise MisconfigurationException(
                f"{type(self).__name__} found nothing to replace: the step calls neither {type(self._module).__name__}.forward"
                " (`self.forward(x)` goes past hooks, `self(x)` does not) nor a submodule that `source` names. Say which "
                "one takes the inputs: LogitsSource('net')."
            )
        if output is not None and self._module.automatic_optimization:
            self._refuse_nonfinite(loss_of(output))
        return output

    def _adversarial(self, inputs: Any, labels: Tensor) -> Tensor:
        checked = self._checked(inputs)
        target = as_target(labels, len(checked))
        if self.overfit_guard is not None and not self._guard:
            self.note(guard_inputs=checked, guard_target=target)
        attacked = max(1, round(self.mix * len(checked)))
        found = self.run_attack(self.attack, checked[:attacked], target[:attacked])
        return found if attacked == len(checked) else torch.cat([found, checked[attacked:]])

    # ---------------------------------------------------------------- the guard

    @override
    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, notes: Notes) -> None:
        super().after_step(trainer, pl_module, notes)
        if "guard_inputs" in notes and not self._guard:
            x, target = (notes[name][:_GUARD_SAMPLES].clone() for name in ("guard_inputs", "guard_target"))
            self._guard = {"inputs": x, "target": target}

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.overfit_guard is None or not self._guard:
            return
        accuracy = self._guard_accuracy(trainer, pl_module)
        pl_module.log(f"{self.name}/guard_acc", accuracy)
        before = self._guard.get("accuracy")
        if before is not None and before - accuracy > self.overfit_guard:
            self._on_overfit(trainer, pl_module, before, accuracy)
            return
        weights = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}
        self._guard |= {"accuracy": accuracy, "weights": weights}

    def _guard_accuracy(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> float:
        x, target = self._guard["inputs"].to(pl_module.device), self._guard["target"].to(pl_module.device)
        generator = stream(  # the same starts after every epoch, and in a run that is resumed there
            root_seed(self.seed),
            purpose=f"adversarial/{self.name}/guard",
            device_id=trainer.global_rank,
            on=pl_module.device,
        )
        found = _GUARD_ATTACK(pl_module, x, target, self.threat, logits_of=self.logits_of, generator=generator)
        with untouched(pl_module, "eval", x.device), torch.no_grad():
            predicted = self.logits_of(found).argmax(dim=1)
        classes = target.argmax(dim=1) if target.is_floating_point() else target
        return float(trainer.strategy.reduce((predicted == classes).float().mean(), reduce_op="mean"))

    def _on_overfit(self, trainer: pl.Trainer, pl_module: pl.LightningModule, before: float, accuracy: float) -> None:
        what = (
            f"{type(self).__name__}: catastrophic overfitting, the accuracy under PGD-5 fell from {before:.3f} to "
            f"{accuracy:.3f} in one epoch (overfit_guard={self.overfit_guard})."
        )
        if self.on_overfit == "warn":
            rank_zero_warn(what)
            self._guard["accuracy"] = accuracy
            return
        pl_module.load_state_dict(self._guard["weights"])
        rank_zero_warn(f"{what} The weights are those of the epoch before again.")
        if self.on_overfit == "stop":
            trainer.should_stop = True

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"guard": dict(self._guard)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._guard = dict(state_dict["guard"])
