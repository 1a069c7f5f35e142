"""Conditional mutual information of a classifier's outputs: measured, constrained, and what it does to students."""

from groundwire.callbacks.classifier import ClassifierCallback
from groundwire.callbacks.information.cmic import CMIConstraint
from groundwire.callbacks.information.cmim import UndistillableCMI
from groundwire.callbacks.information.distillation import (
    DIST,
    DKD,
    KD,
    TTM,
    Distillation,
    DistillationMethod,
)
from groundwire.callbacks.information.label_smoothing import LabelSmoothing
from groundwire.callbacks.information.mcmi import MaximumCMI
from groundwire.callbacks.information.metrics import NormalizedCMI
from groundwire.callbacks.information.monitor import CMIMonitor
from groundwire.callbacks.information.mse_teacher import SquaredErrorTeacher
from groundwire.callbacks.information.plots import plot_centroids, plot_cmi_evolution, plot_simplex
from groundwire.callbacks.logits import LogitsSource

__all__ = [
    "DIST",
    "DKD",
    "KD",
    "TTM",
    "CMIConstraint",
    "CMIMonitor",
    "ClassifierCallback",
    "Distillation",
    "DistillationMethod",
    "LabelSmoothing",
    "LogitsSource",
    "MaximumCMI",
    "NormalizedCMI",
    "SquaredErrorTeacher",
    "UndistillableCMI",
    "plot_centroids",
    "plot_cmi_evolution",
    "plot_simplex",
]
