"""What the training callbacks of this family share."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from typing_extensions import override

from groundwire.callbacks.adversarial.attacks import PGD, Attack
from groundwire.callbacks.adversarial.threat import ThreatModel, rounding_of
from groundwire.callbacks.adversarial.victim import Victim
from groundwire.callbacks.checks import transform_is_active
from groundwire.callbacks.classifier import ClassifierCallback, epochs_done
from groundwire.callbacks.logits import LogitsSource
from groundwire.callbacks.step import Call, Notes, Step, unseen_by_taps
from groundwire.plugins.random import root_seed, stream


class AdversarialCallback(ClassifierCallback):
    """A callback that attacks the network that it trains.

    Random starts depend on the seed, the batch's number and the process alone: the search does not move the module's own
    random stream, and a resumed run draws what an uninterrupted one does. (A further forward in training mode, as a term
    on adversarial outputs needs it, draws its dropout from the module's stream.) The devices of ``EdgeStrategy`` draw from
    that stream in turn: with several local steps, in another order in the loop than vectorised.

    Args:
        threat: What the attacker may do.
        warmup_epochs: Epochs in which the radius grows linearly from 0; may be a fraction.
        source: Where logits and labels are found.
        seed: Of random starts; by default that of ``seed_everything``, else 0.
        name: Under which it logs and keeps its state.

    Raises:
        ValueError: If ``warmup_epochs`` is negative.
        MisconfigurationException: At setup, under a strategy that shards the module.
    """

    replaces_inputs = False
    """Whether the module's own step sees adversarial inputs instead of the batch's."""

    def __init__(
        self, threat: ThreatModel, warmup_epochs: float, source: LogitsSource | None, seed: int | None, name: str
    ) -> None:
        super().__init__(source, name)
        self.victim = Victim(self.source)
        if not warmup_epochs >= 0:
            raise ValueError(f"`warmup_epochs` must be at least 0, got {warmup_epochs}.")
        self.threat = threat
        self.warmup_epochs = warmup_epochs
        self.seed = seed
        self._generator: torch.Generator | None = None
        self._was_vectorized = False
        self._seen: list[Any] = []
        self._rounding = 0.0

    @property
    @override
    def epochs_needed_for(self) -> str | None:
        return f"warmup_epochs={self.warmup_epochs}" if self.warmup_epochs else None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
                raise MisconfigurationException(
                    f"{type(self).__name__} runs the module's forward many times a step, but "
                    f"{type(trainer.strategy).__name__} shards its parameters between the calls that it knows. Use 'ddp'."
                )
            self.victim.check(pl_module)
            self._refuse_others(trainer)
        super().setup(trainer, pl_module, stage)

    def _refuse_others(self, trainer: pl.Trainer) -> None:
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        others = [c for c in callbacks if isinstance(c, AdversarialCallback) and c is not self]
        if any(type(other) is type(self) and other.name == self.name for other in others):
            raise MisconfigurationException(
                f"Two callbacks {type(self).__name__} are named {self.name!r}: what they log would be mixed. Give each a name."
            )
        replacing = next((c for c in (self, *others) if c.replaces_inputs), None)
        if replacing is not None and others:
            other = next(c for c in (self, *others) if c is not replacing)
            what = "also replaces it" if other.replaces_inputs else "attacks what the step sees"
            raise MisconfigurationException(
                f"{type(replacing).__name__} replaces the module's input, and {type(other).__name__} ({other.name!r}) "
                f"{what}: one would attack what the other made, outside the ball around the data. Keep one of them."
            )

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._generator, self._was_vectorized = None, False

    @override
    def around_step(self, step: Step, batch: Any) -> Any:
        batch_inputs, _ = self.source.inputs_and_labels(batch)
        try:
            with self.victim.watch(self._module, batch_inputs) as self._seen:
                return super().around_step(step, batch)
        finally:
            self._seen = []

    @override
    def network_inputs(self, calls: list[Call], batch_inputs: Any) -> Any:
        return self.victim.chosen(self._seen) if self._seen else batch_inputs

    @override
    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, notes: Notes) -> None:
        if "low" in notes:  # values were hidden inside of the step
            self.threat.check_range(float(notes["low"].min()), float(notes["high"].max()), self._rounding)

    def ramp(self) -> float:
        """Share of the radius that this step has reached, in (0, 1]."""
        if not self.warmup_epochs:
            return 1.0
        steps = self.trainer.num_training_batches
        here = epochs_done(self.trainer) + (1 / steps if 0 < steps < float("inf") else 1)
        return min(1.0, here / self.warmup_epochs)

    def current_threat(self) -> ThreatModel:
        """What the attacker may do in this step."""
        ramp = self.ramp()
        return self.threat if ramp == 1 else self.threat.scaled(ramp)

    def run_attack(self, attack: Attack, inputs: Any, target: Tensor) -> Tensor:
        """Adversarial inputs for the network as it is.

        Args:
            attack: How they are found.
            inputs: Network inputs ``(B, ...)``.
            target: Labels ``(B,)``.

        Returns:
            Like ``inputs``, without a graph.
        """
        return attack(self._module, self._checked(inputs), target, self.current_threat(), **self._options())

    def run_search(self, attack: PGD, inputs: Any, target: Tensor) -> Tensor:
        """All particles of a search, shape ``(N, B, ...)``; the rest as for :meth:`run_attack`."""
        return attack.particles(self._module, self._checked(inputs), target, self.current_threat(), **self._options())

    def _options(self) -> dict[str, Any]:
        return {"logits_of": self.logits_of, "generator": self._random_stream()}

    def _checked(self, inputs: Any) -> Tensor:
        if not isinstance(inputs, Tensor):
            raise MisconfigurationException(
                f"{type(self).__name__} attacks one tensor of inputs, but the network is given a "
                f"{type(inputs).__name__}. Name a submodule that takes a tensor: LogitsSource('model.net')."
            )
        self.threat.check_dtype(inputs)
        if transform_is_active():  # elsewhere the attack itself looks at the values
            pixels, self._rounding = self.threat.pixels(inputs, clamp=False), rounding_of(inputs)
            self.note(low=pixels.amin(), high=pixels.amax())
        return inputs

    def particle_logits(self, particles: Tensor) -> Tensor:
        """:meth:`logits_at` of particles ``(N, B, ...)``, in one batch: shape ``(N, B, C)``."""
        logits = self.logits_at(particles.flatten(0, 1))
        return logits.reshape(*particles.shape[:2], logits.shape[-1])

    def logits_at(self, inputs: Tensor) -> Tensor:
        """The network's logits at other inputs, as in the step: same mode and precision, with their graph.

        Args:
            inputs: Network inputs ``(n, ...)``.

        Returns:
            Shape ``(n, C)``, float32 or wider.
        """
        with unseen_by_taps(), self.trainer.precision_plugin.forward_context():
            logits = self.logits_of(inputs)
        return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()

    def logits_of(self, inputs: Tensor) -> Tensor:
        """From network inputs to logits: the module's forward, or the submodule that ``source`` names."""
        return self.victim.logits(self._module, inputs)

    def _random_stream(self) -> torch.Generator:
        """That of this batch; EdgeStrategy runs a batch anew, in a loop, where it cannot run vectorised."""
        is_vectorized = transform_is_active()
        if self._generator is None or (self._was_vectorized and not is_vectorized):
            self._generator = stream(
                root_seed(self.seed),
                purpose=f"adversarial/{self.name}",
                round=self.trainer.fit_loop.total_batch_idx,
                device_id=self.trainer.global_rank,
                on=self._module.device,
            )
        self._was_vectorized = is_vectorized
        return self._generator

    @property
    def _module(self) -> pl.LightningModule:
        assert self._pl_module is not None
        return self._pl_module
