"""What cannot be trained privately, refused with the way out."""

from __future__ import annotations

import inspect

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning_utilities.core.rank_zero import rank_zero_warn
from opacus.validators import ModuleValidator
from torch import Tensor, nn

from groundwire.plugins.edge import EdgeStrategy
from groundwire.plugins.privacy.refusals import refuse_tuners


def refuse_trainer(trainer: pl.Trainer, module: pl.LightningModule, callback: pl.Callback) -> None:
    """Refuse, before anything is built, what would break the guarantee or cannot work.

    Args:
        trainer: The Trainer.
        module: The module.
        callback: The one that makes training private.

    Raises:
        MisconfigurationException: If there is anything.
    """
    name, strategy = type(module).__name__, trainer.strategy
    if isinstance(strategy, EdgeStrategy):
        raise MisconfigurationException(
            "DPSGD protects records in a central training run; in EdgeStrategy protect whole devices: "
            "EdgeStrategy(uplink=DPFedAvg(...)) of groundwire.plugins.edge."
        )
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        raise MisconfigurationException(
            f"DPSGD works with one device and with DDP, got {type(strategy).__name__}: sharded or remote parameters have "
            "no whole per-sample gradients. Use strategy='auto' or 'ddp'."
        )
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"DPSGD supports one optimizer with automatic optimization, but {name} sets `automatic_optimization = False`."
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise MisconfigurationException(
            "DPSGD cannot use precision='16-mixed': which steps its loss scaler skips depends on the data. Use "
            "'bf16-mixed' or '32-true'."
        )
    if trainer.precision in ("bf16-true", "16-true"):
        rank_zero_warn(
            f"precision={trainer.precision!r} rounds the noise to a few bits, which the guarantee does not cover. Use "
            "'bf16-mixed' or '32-true'."
        )
    if trainer.overfit_batches > 0:  # type: ignore[attr-defined]
        raise MisconfigurationException(
            "overfit_batches repeats the same batches, but DPSGD draws new ones every step. Use a "
            "torch.utils.data.Subset of the data instead."
        )
    refuse_tuners(trainer, type(callback).__name__)
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(other, pl.callbacks.GradientAccumulationScheduler):
            raise MisconfigurationException(
                "GradientAccumulationScheduler changes the batch size during the run, which DPSGD does not account for. "
                "Use a fixed Trainer(accumulate_grad_batches=...)."
            )
        if isinstance(other, type(callback)) and other is not callback:
            raise MisconfigurationException(f"The Trainer has two {type(callback).__name__} callbacks: keep one.")


def refuse_layers(module: pl.LightningModule) -> None:
    """Refuse trainable layers whose per-sample gradients do not exist, or would not be private.

    Of frozen layers, only those are refused that write into their weights all the same. A frozen norm may still be put
    into evaluation mode before the first step: in training mode, :class:`PerSampleGradients` refuses it when it runs.

    Args:
        module: The module.

    Raises:
        MisconfigurationException: If there are any; it names them and the way out.
    """
    found: list[str] = []
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.max_norm is not None:
            raise MisconfigurationException(
                f"`{name}` ({type(layer).__name__}) renormalises the rows that a batch looks up, in place and without "
                "noise: which rows these are would be published with the weights. Set max_norm=None."
            )
        if not any(p.requires_grad for p in layer.parameters()):
            continue
        validate = ModuleValidator.VALIDATORS.get(type(layer))
        if type(layer) is nn.RNN:
            found.append(f"`{name}` (RNN; use opacus.layers.DPRNN)")
        elif isinstance(layer, nn.MultiheadAttention) and layer.batch_first and layer.num_heads > 1:
            found.append(f"`{name}` (MultiheadAttention; with batch_first and several heads not even fix=True helps)")
        elif validate is not None and validate(layer):
            found.append(f"`{name}` ({type(layer).__name__})")
    if found:
        raise MisconfigurationException(
            f"DPSGD needs per-sample gradients, but {', '.join(found)} mixes the records of a batch, keeps statistics of "
            "them, or hides its parameters. DPSGD(fix=True) replaces them before training (BatchNorm by GroupNorm, "
            "recurrent and attention layers by Opacus's), where they are built in `__init__`: layers built in `setup` or "
            "`configure_model` come too late for it. Or replace them yourself."
        )


def refuse_optimizer(trainer: pl.Trainer, parameters: dict[str, Tensor]) -> None:
    """Refuse optimizers that train other parameters than those whose gradients are private, or look twice.

    Args:
        trainer: The Trainer.
        parameters: Those whose gradients are private, by name.

    Raises:
        MisconfigurationException: If there is anything.
    """
    if len(trainer.optimizers) != 1:
        raise MisconfigurationException(
            f"DPSGD supports one optimizer with automatic optimization, got {len(trainer.optimizers)}."
        )
    optimizer = trainer.optimizers[0]
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise MisconfigurationException(
            f"{type(optimizer).__name__} evaluates the loss several times a step, which DPSGD does not account for. "
            "Use an optimizer that evaluates it once, such as SGD or Adam."
        )
    stepped = {p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    known = set(parameters.values())
    left_out = [name for name, p in parameters.items() if p not in stepped]
    if left_out:
        raise MisconfigurationException(
            f"The optimizer does not train {', '.join(left_out)}, whose gradients would use up the clipping norm. "
            "Freeze them (`requires_grad_(False)`), or give them to the optimizer."
        )
    if len(stepped - known):
        raise MisconfigurationException(
            f"The optimizer trains {len(stepped - known)} tensors that are no parameters of the LightningModule, so "
            "their gradients cannot be made private. Register them on the module."
        )


def refuse_rounding(trainer: pl.Trainer, engine: str) -> None:
    """Refuse ghost clipping in a precision that rounds the records' weights.

    Args:
        trainer: The Trainer.
        engine: That of :class:`PerSampleGradients`.

    Raises:
        MisconfigurationException: If it does.
    """
    if engine == "ghost" and trainer.precision in ("bf16-mixed", "bf16-true", "16-true"):
        raise MisconfigurationException(
            f"engine='ghost' weighs the records in the precision of the backward pass: with precision="
            f"{trainer.precision!r} a record may exceed `max_grad_norm`. Use engine='bookkeeping', or '32-true'."
        )


def warn_of_raw_metrics(trainer: pl.Trainer) -> None:
    """Warn of what makes the weights depend on metrics of the raw training data.

    Args:
        trainer: The Trainer.
    """
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau and not str(config.monitor).startswith(("val", "test")):
            rank_zero_warn(
                f"ReduceLROnPlateau monitors {config.monitor!r}: if that is computed on training batches, the weights depend "
                "on the raw data, which the guarantee does not cover. Monitor a metric of other data, or use a schedule."
            )
    for callback in trainer.early_stopping_callbacks:
        if callback.monitor.startswith("train"):
            rank_zero_warn(
                f"EarlyStopping monitors {callback.monitor!r}: when the run ends depends on the raw training data, which "
                "the guarantee does not cover. Monitor a metric of other data."
            )
