"""Layers that cannot be trained privately, and what takes their place."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info
from opacus.validators import ModuleValidator
from torch import nn


def fix_layers(module: pl.LightningModule) -> None:
    """Replace, in place, layers that Opacus has a private stand-in for: BatchNorm by GroupNorm, LSTM by DPLSTM, ...

    The stand-ins start anew: weights of recurrent and attention layers are copied by Opacus, statistics are not.

    Args:
        module: The module, before its optimizers are built.
    """
    for name, layer in list(module.named_modules()):
        if type(layer) not in ModuleValidator.FIXERS or not any(p.requires_grad for p in layer.parameters()):
            continue
        if isinstance(layer, nn.MultiheadAttention) and layer.batch_first and layer.num_heads > 1:
            continue  # Opacus 1.6's stand-in computes something else then: `refuse_layers` names the layer
        parent, _, child = name.rpartition(".")
        if isinstance(layer, nn.BatchNorm1d):  # of vectors, groups of one channel would normalise everything to zero
            replacement = nn.GroupNorm(1, layer.num_features, affine=layer.affine)
        else:
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
        if type(layer) is nn.RNN:
            found.append(f"`{name}` (RNN; use opacus.layers.DPRNN)")
        elif isinstance(layer, nn.MultiheadAttention) and layer.batch_first and layer.num_heads > 1:
            found.append(f"`{name}` (MultiheadAttention; with batch_first and several heads not even fix=True helps)")
        elif validate is not None and any(p.requires_grad for p in layer.parameters()) and validate(layer):
            found.append(f"`{name}` ({type(layer).__name__})")
    if found:
        raise MisconfigurationException(
            f"DPSGD needs per-sample gradients, but {', '.join(found)} mixes the records of a batch, keeps statistics of "
            "them, or hides its parameters. DPSGD(fix=True) replaces them before training (BatchNorm by GroupNorm, "
            "recurrent and attention layers by Opacus's); or replace them yourself."
        )
