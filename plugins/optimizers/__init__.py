"""Optimizers whose state is a small part of Adam's."""

from groundwire.plugins.optimizers.base import CompressedStateOptimizer
from groundwire.plugins.optimizers.frugal import FRUGAL
from groundwire.plugins.optimizers.functional import optimizer_state_bytes, orthogonal_matching_pursuit
from groundwire.plugins.optimizers.sgc import CESGC, MESGC

__all__ = [
    "CESGC",
    "FRUGAL",
    "MESGC",
    "CompressedStateOptimizer",
    "optimizer_state_bytes",
    "orthogonal_matching_pursuit",
]
