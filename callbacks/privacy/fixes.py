"""What takes the place of layers that cannot be trained privately."""

from __future__ import annotations

from itertools import chain

import lightning.pytorch as pl
from lightning_utilities.core.rank_zero import rank_zero_info
from opacus.validators import ModuleValidator
from torch import nn


def fix_layers(module: pl.LightningModule) -> None:
    """Replace, in place, layers that Opacus has a private stand-in for: BatchNorm by GroupNorm, LSTM by DPLSTM, ...

    The stand-ins start anew: weights of recurrent and attention layers are copied by Opacus, statistics are not. Frozen
    layers are left alone, but for BatchNorm that uses the statistics of the batch; its stand-in is frozen, too. Layers
    that the module builds in ``setup`` or ``configure_model`` do not exist yet, and are not replaced.

    Args:
        module: The module, before its optimizers are built.
    """
    for name, layer in list(module.named_modules()):
        is_trainable = any(p.requires_grad for p in layer.parameters())
        if type(layer) not in ModuleValidator.FIXERS or not (is_trainable or _mixes_records(layer)):
            continue
        if isinstance(layer, nn.MultiheadAttention) and layer.batch_first and layer.num_heads > 1:
            continue  # Opacus 1.6's stand-in computes something else then: `refuse_layers` names the layer
        parent, _, child = name.rpartition(".")
        if isinstance(layer, nn.BatchNorm1d):  # of vectors, groups of one channel would normalise everything to zero
            replacement = nn.GroupNorm(1, layer.num_features, affine=layer.affine)
        else:
            replacement = ModuleValidator.FIXERS[type(layer)](layer)
        like = next(chain(layer.parameters(), layer.buffers()), None)
        replacement.to(module.device if like is None else like.device)
        replacement.train(layer.training)
        replacement.requires_grad_(is_trainable)
        setattr(module.get_submodule(parent), child, replacement)
        rank_zero_info(f"DPSGD replaced `{name}`, {layer}, by {replacement}.")


def _mixes_records(layer: nn.Module) -> bool:
    """Whether it is a BatchNorm that takes the statistics of the batch."""
    return isinstance(layer, nn.modules.batchnorm._BatchNorm) and (layer.training or layer.running_mean is None)
