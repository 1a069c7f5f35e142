"""Layers that cannot be trained privately, and what takes their place."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info
from opacus.validators import ModuleValidator


def fix_layers(module: pl.LightningModule) -> None:
    """Replace, in place, layers that Opacus has a private stand-in for: BatchNorm by GroupNorm, LSTM by DPLSTM, ...

    The stand-ins start anew: weights of recurrent and attention layers are copied by Opacus, statistics are not.

    Args:
        module: The module, before its optimizers are built.
    """
    for name, layer in list(module.named_modules()):
        if type(layer) not in ModuleValidator.FIXERS or not any(p.requires_grad for p in layer.parameters()):
            continue
        parent, _, child = name.rpartition(".")
        replacement = ModuleValidator.FIXERS[type(layer)](layer)
        replacement.to(next(layer.parameters()).device)
        replacement.train(layer.training)
        setattr(module.get_submodule(parent), child, replacement)
        rank_zero_info(f"DPSGD replaced `{name}`, {layer}, by {replacement}.")


def refuse_layers(module: pl.LightningModule) -> None:
    """Refuse trainable layers whose per-sample gradients do not exist, or would not be private.

    Args:
        module: The module.

    Raises:
        MisconfigurationException: If there are any; it names them and the way out.
    """
    found: list[str] = []
    for name, layer in module.named_modules():
        validate = ModuleValidator.VALIDATORS.get(type(layer))
        if validate is not None and any(p.requires_grad for p in layer.parameters()) and validate(layer):
            found.append(f"`{name}` ({type(layer).__name__})")
    if found:
        raise MisconfigurationException(
            f"DPSGD needs per-sample gradients, but {', '.join(found)} mixes the records of a batch, keeps statistics of "
            "them, or hides its parameters. DPSGD(fix=True) replaces them before training (BatchNorm by GroupNorm, "
            "recurrent and attention layers by Opacus's); or replace them yourself."
        )
