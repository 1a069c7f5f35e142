"""OFMU: unlearning as a bi-level problem, ascent on the forget loss within, descent on the retain loss around it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from groundwire.callbacks.logits import LogitsSource
from groundwire.callbacks.step import Step, loss_of
from groundwire.callbacks.unlearning.base import IterativeMethod, chance_level, num_records
from groundwire.callbacks.unlearning.ofmu_functional import (
    PhiGradient,
    add_,
    add_to_gradients_,
    copy_,
    grad_phi,
    hessian_vector,
)
from groundwire.callbacks.unlearning.reading import num_classes_of
from groundwire.plugins.edge import EdgeStrategy
from groundwire.plugins.edge.logged import LogRecorder


class OFMU(IterativeMethod):
    """Forgets by ascent on the forget loss, decorrelated from the retain loss, and one step of descent on the latter.

    The inner objective ``Phi = L_f - beta cos(grad L_f, grad L_r)`` is to be maximal, the outer one ``L_r`` minimal; a
    penalty ``rho |grad Phi|^2`` stands for "at a maximum". Each training step makes ``inner_steps`` ascents from the
    current weights, each by ``inner_lr`` times ``grad Phi`` clipped to norm 1, and hands the gradient of ``L_r + rho
    |grad Phi|^2`` at the weights thus reached to the module's own optimizer, which steps from there: optimizers,
    schedulers, gradient clipping, logging and checkpoints work as ever. ``rho`` is multiplied by ``gamma`` after each
    step. Both losses are those of the module's own ``training_step``. How long it goes on is said by the Trainer
    (``max_steps``; 100 is a beginning).

    What the penalty does: it vanishes at a minimum of Phi as well as at a maximum, and the trained weights, where the
    forget loss is flat, nearly are one. All forgetting comes from the inner ascent; the penalty pulls back to the trained
    weights, the more the larger ``rho`` is. Set the Trainer's ``gradient_clip_val`` with a large one: the penalty is stiff,
    and without clipping the outer step diverges where the learning rate times ``rho`` exceeds the inverse square of Phi's
    largest curvature, which looks like forgetting and is damage. So leave it small. Without penalty and similarity (``beta=0, rho=0``) the method is an alternation of
    clipped ascent and descent, which is a strong baseline and the cheapest.

    A step gives the forget batch to the module ``inner_steps`` times, and three times more where ``rho`` is not 0
    (``grad Phi`` at the weights reached, and on both sides of them for its central difference); the retain batch as
    often where ``beta`` is not 0, and once more for the outer loss. All these evaluations see the same batches and, as
    each starts from the same state of the random generators, the same dropout masks. Only the last one, of the retain
    batch, counts: what the others do to buffers (BatchNorm statistics), to metrics, to the random generators and to
    ``self.log`` is taken back; attributes that the step itself writes are not. They run without autocast, as finite
    differences would drown in its rounding.

    Under DDP the gradients are averaged over the processes before their cosine is taken, so all processes make the same
    ascents.

    Logs ``train/forget_loss``, ``train/cosine`` (where ``beta`` is not 0) and ``train/grad_phi_norm`` at the
    weights before the step, ``train/retain_loss`` after the ascent, and ``train/rho``.

    Args:
        checkpoint: The trained model; see :class:`UnlearningMethod`.
        inner_steps: Ascents a step ``T``, at least 1.
        inner_lr: How far an ascent moves the weights at most, a Euclidean length; positive.
        beta: Weight of the similarity of both gradients, at least 0; at 1 it rules, and nothing is forgotten. Other values
            than 0 need second derivatives: no fused attention kernels, no ``torch.compile``.
        rho: Weight of the penalty in the first step, at least 0.
        gamma: Growth of ``rho`` a step, at least 1; 1.02 makes a factor of 7 in 100 steps, and of 20,000 in 500.
        eps_cos: Added to both norms in the cosine, positive: without it, the similarity rules where a gradient vanishes.
        max_forget_loss: No further ascent in a step where the forget loss is at or above this. ``"chance"`` is the log of
            the number of classes, as the outputs' shape tells it, which suits a class that is to be forgotten; for samples
            of all classes give the loss of held-out data. None is no limit.
        fd_step: How far the central difference moves the weights to either side, a Euclidean length; positive.
        source: Where the module's outputs and labels are found, to count the classes.

    Attributes:
        current_rho: Weight of the penalty in the next step.
        steps: Steps taken, over all runs of the checkpoint.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At setup, for manual optimization, ``EdgeStrategy`` and sharded strategies, precision
            ``"16-mixed"`` and weights in half precision, gradient accumulation, a frozen module; before the first step,
            for an optimizer that evaluates the loss several times; in the first step, if ``"chance"`` cannot be told.
        RuntimeError: If the inner ascent gives values that are not finite, or an operation cannot be differentiated
            twice. The weights are then those before the step.

    Example:
        >>> callback = OFMU("runs/trained", inner_lr=0.1)
        >>> trainer = pl.Trainer(max_steps=100, callbacks=[callback], logger=False, enable_checkpointing=False)

    Reference:
        S. Asif, M. M. Amiri, "OFMU: Optimization-Driven Framework for Machine Unlearning", 2025. arXiv:2509.22483. The
        clipping, the smoothing and the limit on the forget loss are additions.
    """

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        inner_steps: int = 1,
        inner_lr: float = 0.1,
        beta: float = 0.1,
        rho: float = 1e-6,
        gamma: float = 1.02,
        eps_cos: float = 1e-2,
        max_forget_loss: Literal["chance"] | float | None = "chance",
        fd_step: float = 1e-2,
        source: LogitsSource | None = None,
    ) -> None:
        super().__init__(checkpoint)
        if inner_steps < 1:
            raise ValueError(
                f"`inner_steps` must be at least 1, got {inner_steps}: without ascent nothing is forgotten."
            )
        for name, value in (("inner_lr", inner_lr), ("eps_cos", eps_cos), ("fd_step", fd_step)):
            if not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        for name, value in (("beta", beta), ("rho", rho)):
            if not 0 <= value < math.inf:
                raise ValueError(f"`{name}` must be at least 0, got {value}.")
        if not 1 <= gamma < math.inf:
            raise ValueError(f"`gamma` must be at least 1, got {gamma}: 1 keeps `rho` as it is.")
        if isinstance(max_forget_loss, str) and max_forget_loss != "chance":
            raise ValueError(f"`max_forget_loss` must be 'chance', a number or None, got {max_forget_loss!r}.")
        if not isinstance(max_forget_loss, str) and max_forget_loss is not None and not max_forget_loss > 0:
            raise ValueError(f"`max_forget_loss` must be positive, got {max_forget_loss}; None is no limit.")
        self.inner_steps = inner_steps
        self.inner_lr = inner_lr
        self.beta = beta
        self.rho = rho
        self.gamma = gamma
        self.eps_cos = eps_cos
        self.max_forget_loss = max_forget_loss
        self.fd_step = fd_step
        self.source = source or LogitsSource()
        self.current_rho = rho
        self.steps = 0
        self._limit: float | None = None  # None until it is known
        self._parameters: list[Tensor] = []  # of the running step
        self._penalty: Tensor | None = None  # of the running step

    # ---------------------------------------------------------------- set-up

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._refuse(trainer, pl_module)
            self.current_rho, self.steps = self.rho, 0
            limit = math.inf if self.max_forget_loss is None else self.max_forget_loss
            self._limit = None if isinstance(limit, str) else float(limit)
        super().setup(trainer, pl_module, stage)

    def _refuse(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy, name = trainer.strategy, type(pl_module).__name__
        if isinstance(strategy, EdgeStrategy):
            raise MisconfigurationException(
                "OFMU moves the weights within a step, which the devices of an EdgeStrategy would do one after the other. "
                "Unlearn in a plain Trainer: strategy='auto'."
            )
        if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
            raise MisconfigurationException(
                f"OFMU works with one device and with DDP, got {type(strategy).__name__}: sharded parameters have no whole "
                "gradients. Use strategy='auto' or 'ddp'."
            )
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise MisconfigurationException(
                "OFMU adds its penalty to gradients that precision='16-mixed' has scaled. Use 'bf16-mixed' or '32-true'."
            )
        accumulates = any(isinstance(c, pl.callbacks.GradientAccumulationScheduler) for c in trainer.callbacks)  # type: ignore[attr-defined]
        if trainer.accumulate_grad_batches != 1 or accumulates:
            raise MisconfigurationException(
                "OFMU moves the weights with every batch, so gradients of several batches would belong to different "
                "weights. Set accumulate_grad_batches=1 and use a larger batch_size of ForgetRetain."
            )
        parameters = list(pl_module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            raise MisconfigurationException(
                f"OFMU: all parameters of {name} are frozen, so nothing can be forgotten. Set requires_grad=True for those "
                "that may change."
            )
        if trainer.precision in ("16-true", "bf16-true") or any(
            p.dtype.itemsize < 4 for p in parameters if p.requires_grad
        ):
            raise MisconfigurationException(
                "OFMU takes finite differences of gradients, which weights in half precision are too coarse for. Use "
                "precision='bf16-mixed' or '32-true'."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            closure = inspect.signature(type(optimizer).step).parameters.get("closure")
            if closure is not None and closure.default is inspect.Parameter.empty:
                raise MisconfigurationException(
                    f"{type(optimizer).__name__} evaluates the loss several times a step, and OFMU would ascend each time. "
                    "Use an optimizer that evaluates it once, such as SGD or AdamW."
                )

    # ---------------------------------------------------------------- a step

    @override
    def around_step(self, step: Step, batch: Any) -> Any:
        self._parameters = parameters = self._trainable()
        start = [p.detach().clone() for p in parameters]
        try:
            before = self._ascend(step, batch)
            output = step(batch["retain"])
            retain_loss = self.checked(loss_of(output)).detach()
        except BaseException:
            copy_(parameters, start)
            self._forget_step()
            raise
        self.log_terms(
            forget_loss=before.forget_loss,
            retain_loss=retain_loss,
            grad_phi_norm=before.norm,
            rho=self.current_rho,
            **({} if before.cosine is None else {"cosine": before.cosine}),
        )
        return output

    def _trainable(self) -> list[Tensor]:
        """What the optimizer trains, in the order of the module's parameters, which is that of all processes."""
        trained = {
            p for optimizer in self.trainer.optimizers for group in optimizer.param_groups for p in group["params"]
        }
        found: list[Tensor] = [p for p in self.pl_module.parameters() if p.requires_grad and p in trained]
        if not found:
            raise MisconfigurationException(
                "OFMU: the optimizer has no trainable parameter of the module, so nothing can be forgotten. Unfreeze some, "
                "and give them to the optimizer."
            )
        return found

    def _ascend(self, step: Step, batch: Any) -> PhiGradient:
        """Move the parameters to where the outer step starts, and find the penalty's gradient there."""
        before = here = self._phi(step, batch)
        for left in reversed(range(self.inner_steps)):
            assert self._limit is not None
            if here.forget_loss >= self._limit:
                break
            add_(self._parameters, here.vector, self.inner_lr / max(1.0, here.norm))
            if left or self.current_rho:
                here = self._phi(step, batch)
        if self.current_rho:
            product = hessian_vector(lambda: self._phi(step, batch).vector, self._parameters, here.vector, self.fd_step)
            self._penalty = 2 * self.current_rho * product
            if not bool(torch.isfinite(self._penalty).all()):
                self._refuse_nonfinite("the gradient of the penalty", "Lower `rho` or `gamma`")
        return before

    def _phi(self, step: Step, batch: Any) -> PhiGradient:
        """The gradient of Phi at the current weights, on this batch."""
        with leaving_no_trace(self.pl_module):
            found = grad_phi(
                lambda: self._forget_loss(step, batch["forget"]),
                lambda: loss_of(step(batch["retain"])),
                self._parameters,
                self.beta,
                self.eps_cos,
                self._average,
            )
        if not (math.isfinite(found.norm) and math.isfinite(found.forget_loss)):
            self._refuse_nonfinite("the forget loss or the gradient of Phi", "Lower `inner_lr` or `inner_steps`")
        self.records_read["forget"] += len(batch["forget"][1])
        self.records_read["retain"] += len(batch["retain"][1]) if self.beta else 0
        return found

    def _refuse_nonfinite(self, what: str, remedy: str) -> None:
        raise RuntimeError(
            f"OFMU, step {self.trainer.global_step}: {what} is not finite in the inner ascent. The weights were put back to "
            f"those before this step, and the original checkpoint is untouched. {remedy}, set `max_forget_loss`, or lower "
            "the optimizer's learning rate."
        )

    def _forget_loss(self, step: Step, batch: Any) -> Tensor:
        if self._limit is not None:
            return loss_of(step(batch))
        with self.source.open(self.pl_module) as calls:
            loss = loss_of(step(batch))
        _, labels = self.source.inputs_and_labels(batch)
        self._limit = chance_level(_num_classes(self.source.logits(calls), labels, self.source))
        return loss

    def _average(self, vector: Tensor) -> Tensor:
        ranks = self.trainer.world_size
        if ranks > 1:
            dist.all_reduce(vector)
            vector /= ranks
        return vector

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.records_read["forget"] -= num_records(batch["forget"])  # counted where they are evaluated

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._penalty is not None:
            add_to_gradients_(self._parameters, self._penalty)
        self._forget_step()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.steps += 1
        self.current_rho *= self.gamma

    def _forget_step(self) -> None:
        self._parameters, self._penalty = [], None

    @override
    def _undo(self, trainer: pl.Trainer) -> None:
        self._forget_step()
        super()._undo(trainer)

    # ---------------------------------------------------------------- what is left

    @override
    def settings(self) -> dict[str, Any]:
        names = ("inner_steps", "inner_lr", "beta", "rho", "gamma", "eps_cos", "max_forget_loss", "fd_step")
        return {name: getattr(self, name) for name in names}

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"current_rho": self.current_rho, "steps": self.steps}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.current_rho, self.steps = state_dict["current_rho"], state_dict["steps"]


@contextmanager
def leaving_no_trace(pl_module: pl.LightningModule) -> Iterator[None]:
    """Run a module's step for its derivatives alone.

    Afterwards buffers (BatchNorm statistics), metrics and the global random generators are as before, and nothing was
    logged. There is no autocast meanwhile.

    Args:
        pl_module: The module, within a step of its Trainer.

    Yields:
        Nothing.
    """
    buffers = [
        (owner, name, buffer)
        for owner in pl_module.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]
    metrics = [(metric, dict(metric.__dict__)) for metric in pl_module.modules() if isinstance(metric, Metric)]
    stand_ins: dict[Tensor, Tensor] = {}  # a buffer may have two owners
    try:
        for owner, name, buffer in buffers:
            owner._buffers[name] = stand_ins.setdefault(buffer, buffer.clone())
        for metric, before in metrics:
            metric.__dict__.update({name: _copied(before[name]) for name in metric.metric_state})
        with (
            isolate_rng(),
            LogRecorder(pl_module).installed(),
            torch.autocast(pl_module.device.type, enabled=False),
        ):
            yield
    finally:
        for owner, name, buffer in buffers:
            owner._buffers[name] = buffer
        for metric, before in metrics:
            metric.__dict__.clear()
            metric.__dict__.update(before)


def _copied(state: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    return state.clone() if isinstance(state, Tensor) else list(state)


def _num_classes(outputs: Tensor, labels: Tensor, source: LogitsSource) -> int:
    """The number of classes, where outputs and labels are those of a classifier."""
    number = num_classes_of(outputs, source)
    without_classes = list(outputs.shape)
    del without_classes[1 if source.flatten else -1]
    is_classifier = not labels.is_floating_point() and list(labels.shape) == without_classes and number > 1
    if not (is_classifier or source.binary):
        raise MisconfigurationException(
            f"max_forget_loss='chance' is the log of the number of classes, but outputs {list(outputs.shape)} with "
            f"{labels.dtype} labels {list(labels.shape)} do not tell it. Say how they are to be read (`source`), or give a "
            "number, such as max_forget_loss=2.3 for ten classes, or None for no limit."
        )
    return number
