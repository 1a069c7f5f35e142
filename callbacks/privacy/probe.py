"""Is a record's gradient a function of that record alone? Asked of the module's own step, on random records."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric

from groundwire.callbacks.privacy.engine import PerSampleGradients
from groundwire.callbacks.step import loss_of

_NUM_RECORDS = 4
_SEEDS = 3
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2}
_DROPOUTS = (nn.modules.dropout._DropoutNd,)


def probe_independence(
    trainer: pl.Trainer, pl_module: pl.LightningModule, gradients: PerSampleGradients, read: Callable[[], Any]
) -> None:
    """Run the training step on batches of random records, and compare what the first record's gradient is.

    In two batches that share the first record and differ in all others, its gradient must be the same; in a batch of
    half the size, too, which tells a mean over records from a sum. Callbacks that surround the step take part. Nothing
    is logged; weights, buffers and metrics are as before. Random records have the shapes, dtypes and ranges of two of
    the data; nothing else of these is used.

    Args:
        trainer: The Trainer, in training.
        pl_module: The module.
        gradients: Attached to it.
        read: Reads a collated batch of two records of the training data, on the CPU.

    Raises:
        MisconfigurationException: If gradients depend on other records, or cannot be seen; the message says why, and
            what to change.
    """
    with ExitStack() as stack:
        isolated = isolate_rng()
        isolated.__enter__()
        stack.callback(isolated.__exit__, None, None, None)  # it would not put back what it finds after an error
        stack.enter_context(_nothing_kept(pl_module))
        torch.manual_seed(0)
        records = read()
        torch.manual_seed(0)
        batch = _random_records(records)
        changed = _with_first_of(batch, _random_records(records))
        buffers = {name: buffer.clone() for name, buffer in pl_module.named_buffers()}
        probe = _Probe(trainer, pl_module, gradients)
        try:
            # several seeds: what a step draws may happen to leave the first record alone
            firsts = [probe.first_gradient(batch, _NUM_RECORDS, seed) for seed in range(_SEEDS)]
            others = [probe.first_gradient(changed, _NUM_RECORDS, seed) for seed in range(_SEEDS)]
            half = probe.first_gradient(_half(batch), _NUM_RECORDS // 2, seed=0)
            mean, plain = probe.mean_gradient(batch, seed=0), probe.plain_gradient(batch, seed=0)
            repeated = probe.mean_gradient(batch, seed=0)
            moved = [name for name, b in pl_module.named_buffers() if not torch.equal(b, buffers[name])]
        finally:
            with torch.no_grad():
                for name, buffer in pl_module.named_buffers():
                    buffer.copy_(buffers[name])
            for p in pl_module.parameters():
                p.grad = None
            gradients.end()
    name = type(pl_module).__name__
    tolerance = _tolerance(trainer)
    if moved:
        raise MisconfigurationException(
            f"The training step writes statistics of the batch into {', '.join(moved)}, which would be published with "
            "the weights. Put that layer into evaluation mode, or replace it (BatchNorm by GroupNorm: DPSGD(fix=True))."
        )
    if _difference(mean, repeated) > tolerance:
        rank_zero_warn(
            f"DPSGD cannot check that records are independent: {name}.training_step draws random numbers from a stream of "
            "its own (an attack's random start, say), so it cannot be run twice alike."
        )
        return
    coupled = max(_difference(a, b) for a, b in zip(firsts, others, strict=True))
    if coupled > tolerance:
        raise MisconfigurationException(
            f"A record's gradient in {name}.training_step depends on the other records of the batch (relative difference "
            f"{coupled:.2g} on random records), so clipping it does not bound what a record does. Look for BatchNorm in "
            "training mode (also frozen), mixup, contrastive or in-batch losses, or statistics over the batch. "
            "DPSGD(probe=False) skips this check, at your own risk."
        )
    draws = max(_difference(firsts[0], again) for again in firsts[1:]) > tolerance  # a step with draws has no answer
    if not draws and _difference(firsts[0], half) > tolerance:
        raise MisconfigurationException(
            f"A record's gradient in {name}.training_step depends on the number of records in the batch (relative "
            f"difference {_difference(firsts[0], half):.2g} between {_NUM_RECORDS} and {_NUM_RECORDS // 2}): DPSGD needs "
            "a loss that is the mean over the records. Use reduction='mean'."
        )
    if _difference(mean, plain) > tolerance:
        raise MisconfigurationException(
            f"The records' gradients in {name}.training_step do not add up to the gradient of the loss (relative "
            f"difference {_difference(mean, plain):.2g} on random records): a term reaches the weights in another way than "
            "through the forward of their layers, such as a penalty on gradients. Remove it."
        )


def stray_gradient(names: list[str]) -> str:
    """What to say when a gradient reached parameters in another way than through their layers.

    Args:
        names: The parameters.

    Returns:
        A message.
    """
    return (
        f"A gradient reached {', '.join(names)} in another way than through the forward of its layer, where no record can "
        "be told apart: a penalty on the weights in `training_step` (use the optimizer's weight_decay), or a call such as "
        "`F.linear(x, self.layer.weight)` (call the layer)."
    )


class _Probe:
    """Runs the module's step on a batch.

    Args:
        trainer: The Trainer.
        module: The module.
        gradients: Attached to it.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, gradients: PerSampleGradients) -> None:
        self.trainer = trainer
        self.module = module
        self.gradients = gradients

    def loss(self, batch: Any, seed: int) -> Tensor:
        """The loss of the step, with its graph."""
        trainer, module = self.trainer, self.module
        torch.manual_seed(seed)
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        arguments = [batch, 0] if _takes_index(module) else [batch]
        with torch.enable_grad(), trainer.precision_plugin.train_step_context():
            output = trainer.strategy.training_step(*arguments)
        if output is None:
            raise MisconfigurationException(
                f"{type(module).__name__}.training_step returned None for random records. Whether a step is skipped "
                "depends on the data, which DP-SGD does not account for: return a loss for every batch."
            )
        return loss_of(output)

    def first_gradient(self, batch: Any, batch_size: int, seed: int) -> Tensor:
        """The first record's gradient, flat."""
        weights = torch.zeros(batch_size)
        weights[0] = 1
        return self._weighted(batch, weights, seed)

    def mean_gradient(self, batch: Any, seed: int) -> Tensor:
        """The mean of the records' gradients, flat."""
        return self._weighted(batch, torch.full((_NUM_RECORDS,), 1 / _NUM_RECORDS), seed)

    def plain_gradient(self, batch: Any, seed: int) -> Tensor:
        """The gradient of the loss as autograd alone finds it, flat."""
        with self.gradients.paused():
            loss = self.loss(batch, seed)
            found = torch.autograd.grad(loss, list(self.gradients.parameters.values()), allow_unused=True)
        return torch.cat([g.flatten().double().cpu() for g in found if g is not None])

    def _weighted(self, batch: Any, weights: Tensor, seed: int) -> Tensor:
        gradients, n = self.gradients, len(weights)
        loss = self.loss(batch, seed)
        weights = weights.to(loss.device)
        gradients.begin()
        if gradients.engine == "ghost":
            gradients.first_pass(loss)
            self._refuse_unseen()
            gradients.squared_norms(n)
            gradients.second_pass_with(weights, n)
        loss.backward()  # type: ignore[no-untyped-call]
        if gradients.engine == "ghost":
            sums = {p: p.grad for p in gradients.parameters.values() if p.grad is not None}
        else:
            self._refuse_unseen()
            with torch.no_grad():
                gradients.squared_norms(n)
                of = gradients.weighted_sum(dict.fromkeys(gradients.parameters.values(), weights), n)
            sums = {p: of[p] for p in gradients.parameters.values()}
        gradients.end()
        return torch.cat([g.flatten().double().cpu() for g in sums.values()])

    def _refuse_unseen(self) -> None:
        gradients = self.gradients
        if gradients.stray():
            raise MisconfigurationException(stray_gradient(gradients.stray()))
        if gradients.unreached():
            raise MisconfigurationException(
                f"No gradient reaches {', '.join(gradients.unreached())} in the training step: its layer is not called, or "
                "its parameters are used elsewhere than in its forward. Freeze what is not used "
                "(`requires_grad_(False)`)."
            )


def _takes_index(module: pl.LightningModule) -> bool:
    return is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)


def _random_records(records: Any) -> Any:
    """Records of the same shapes and dtypes, in the ranges of those given."""

    def random(x: Tensor) -> Tensor:
        if x.ndim == 0:
            return x
        low, high = x.min(), x.max()
        shape = (_NUM_RECORDS, *x.shape[1:])
        if x.is_floating_point():
            spread = (high - low) if high > low else torch.ones_like(low)
            return low + spread * torch.rand(shape, dtype=x.dtype)
        if x.dtype == torch.bool:
            return torch.rand(shape) < 0.5
        return torch.randint(int(low), int(high) + 1, shape, dtype=x.dtype)

    return apply_to_collection(records, Tensor, random)


def _with_first_of(batch: Any, others: Any) -> Any:
    """``others`` with the first record of ``batch``."""
    flat = iter(_tensors(batch))

    def swap(x: Tensor) -> Tensor:
        kept = next(flat)
        return x if x.ndim == 0 else torch.cat([kept[:1], x[1:]])

    return apply_to_collection(others, Tensor, swap)


def _half(batch: Any) -> Any:
    return apply_to_collection(batch, Tensor, lambda x: x if x.ndim == 0 else x[: _NUM_RECORDS // 2])


def _tensors(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []
    apply_to_collection(batch, Tensor, found.append)
    return found


def _difference(a: Tensor, b: Tensor) -> float:
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return 0.0  # random records may be beyond what the module takes; then nothing can be said
    scale = max(float(a.norm()), float(b.norm()))
    return float((a - b).norm()) / scale if scale > 0 else 0.0


def _tolerance(trainer: pl.Trainer) -> float:
    precision = str(trainer.precision)
    if precision.startswith("bf16"):
        return _TOLERANCE[torch.bfloat16]
    return _TOLERANCE[torch.float64 if precision.startswith("64") else torch.float32]


@contextmanager
def _nothing_kept(module: pl.LightningModule) -> Iterator[None]:
    """Silence logging, switch dropout off, and put metrics back as they were afterwards."""
    metrics = [m for m in module.modules() if isinstance(m, Metric)]
    before = [{name: copy.deepcopy(value) for name, value in vars(m).items() if _is_state(m, name)} for m in metrics]
    dropouts = [m for m in module.modules() if isinstance(m, _DROPOUTS) and m.training]
    for name in ("log", "log_dict"):
        module.__dict__[name] = lambda *_, **__: None
    for dropout in dropouts:
        dropout.eval()
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            del module.__dict__[name]
        for dropout in dropouts:
            dropout.train()
        for metric, state in zip(metrics, before, strict=True):
            vars(metric).update(state)


def _is_state(metric: Metric, name: str) -> bool:
    return name in metric._defaults or name in ("_update_count", "_computed", "_forward_cache", "_update_called")
