"""Is a record's gradient a function of that record alone? Asked of the module's own step, on random records."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torchmetrics import Metric

from groundwire.callbacks.privacy.engine import PerSampleGradients
from groundwire.callbacks.step import loss_of

_NUM_RECORDS = 4
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2}
_DROPOUTS = (nn.modules.dropout._DropoutNd,)


def probe_independence(
    trainer: pl.Trainer, pl_module: pl.LightningModule, gradients: PerSampleGradients, records: Any
) -> None:
    """Run the training step on batches of random records, and compare what the first record's gradient is.

    In two batches that share the first record and differ in all others, its gradient must be the same; in a batch of
    half the size, too, which tells a mean over records from a sum. Callbacks that surround the step take part. Nothing
    is logged, weights do not change, metrics are reset. Random records have the shapes, dtypes and ranges of two of
    the data; nothing else of these is used.

    Args:
        trainer: The Trainer, in training.
        pl_module: The module.
        gradients: Attached to it.
        records: A collated batch of two records of the training data, on the CPU.

    Raises:
        MisconfigurationException: If gradients depend on other records, or cannot be seen; the message says why, and
            what to change.
    """
    with ExitStack() as stack:
        stack.enter_context(isolate_rng())
        stack.enter_context(_nothing_kept(pl_module))
        torch.manual_seed(0)
        batch = _random_records(records)
        changed = _with_first_of(batch, _random_records(records))
        buffers = {name: buffer.clone() for name, buffer in pl_module.named_buffers()}
        try:
            first = _first_gradient(trainer, pl_module, gradients, batch, _NUM_RECORDS)
            again = _first_gradient(trainer, pl_module, gradients, batch, _NUM_RECORDS, seed=1)
            other = _first_gradient(trainer, pl_module, gradients, changed, _NUM_RECORDS)
            half = _first_gradient(trainer, pl_module, gradients, _half(batch), _NUM_RECORDS // 2)
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
    if _difference(first, other) > tolerance:
        raise MisconfigurationException(
            f"A record's gradient in {name}.training_step depends on the other records of the batch (relative difference "
            f"{_difference(first, other):.2g} on random records), so clipping it does not bound what a record does. Look "
            "for BatchNorm in training mode (also frozen), mixup, contrastive or in-batch losses, or statistics over the "
            "batch. DPSGD(probe=False) skips this check, at your own risk."
        )
    if moved:
        raise MisconfigurationException(
            f"The training step writes statistics of the batch into {', '.join(moved)}, which would be published with "
            "the weights. Put that layer into evaluation mode, or replace it (BatchNorm by GroupNorm: DPSGD(fix=True))."
        )
    if _difference(first, again) <= tolerance < _difference(first, half):  # a step with draws of its own has no answer
        raise MisconfigurationException(
            f"A record's gradient in {name}.training_step depends on the number of records in the batch (relative "
            f"difference {_difference(first, half):.2g} between {_NUM_RECORDS} and {_NUM_RECORDS // 2}): DPSGD needs a "
            "loss that is the mean over the records. Use reduction='mean'."
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


def _first_gradient(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    gradients: PerSampleGradients,
    batch: Any,
    batch_size: int,
    seed: int = 0,
) -> Tensor:
    """The first record's gradient, flat."""
    torch.manual_seed(seed)
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    arguments = [batch, 0] if _takes_index(module) else [batch]
    with torch.enable_grad():
        with trainer.precision_plugin.train_step_context():
            output = trainer.strategy.training_step(*arguments)
        if output is None:
            raise MisconfigurationException(
                f"{type(module).__name__}.training_step returned None for random records. Whether a step is skipped "
                "depends on the data, which DP-SGD does not account for: return a loss for every batch."
            )
        loss = loss_of(output)
        gradients.begin()
        if gradients.engine == "ghost":
            gradients.first_pass(loss)
        else:
            loss.backward()  # type: ignore[no-untyped-call]
    if gradients.stray():
        raise MisconfigurationException(stray_gradient(gradients.stray()))
    if gradients.unreached():
        raise MisconfigurationException(
            f"No gradient reaches {', '.join(gradients.unreached())} in the training step: its layer is not called, or "
            "its parameters are used elsewhere than in its forward. Freeze what is not used (`requires_grad_(False)`)."
        )
    with torch.no_grad():
        gradients.squared_norms(batch_size)
        chosen = torch.zeros(batch_size, device=loss.device)
        chosen[0] = 1
        sums = gradients.weighted_sum(dict.fromkeys(gradients.parameters.values(), chosen), batch_size)
    gradients.end()
    return torch.cat([g.flatten().double().cpu() for g in sums.values()])


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
    """Silence logging, switch dropout off, and reset metrics afterwards."""
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
        for metric in module.modules():
            if isinstance(metric, Metric):
                metric.reset()
