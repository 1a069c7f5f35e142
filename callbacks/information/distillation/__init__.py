"""A student that learns from a teacher's outputs."""

from groundwire.callbacks.information.distillation.callback import Distillation
from groundwire.callbacks.information.distillation.methods import DIST, DKD, KD, TTM, DistillationMethod

__all__ = ["DIST", "DKD", "KD", "TTM", "Distillation", "DistillationMethod"]
