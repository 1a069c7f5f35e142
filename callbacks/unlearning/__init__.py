"""Forgetting on request: methods of unlearning, and what they are measured by."""

from groundwire.callbacks.unlearning.base import IterativeMethod, OneShotMethod, UnlearningMethod
from groundwire.callbacks.unlearning.curvature import SingularCurvatureError
from groundwire.callbacks.unlearning.evaluation import (
    RelearningCurve,
    UnlearningReport,
    UnlearningResult,
    compare_unlearning,
    evaluate_unlearning,
    plot_unlearning,
    relearning_curve,
)
from groundwire.callbacks.unlearning.gradient_ascent import GradDiff, GradientAscent
from groundwire.callbacks.unlearning.npo import NPO
from groundwire.callbacks.unlearning.ofmu import OFMU
from groundwire.callbacks.unlearning.random_labels import RandomLabels
from groundwire.callbacks.unlearning.recorder import CurvatureRecord, CurvatureRecorder, record_curvature
from groundwire.callbacks.unlearning.records import Records
from groundwire.callbacks.unlearning.retrain import FineTune, Retrain
from groundwire.callbacks.unlearning.scrub import SCRUB
from groundwire.callbacks.unlearning.ssd import SSD
from groundwire.callbacks.unlearning.win_u import WINU

__all__ = [
    "NPO",
    "OFMU",
    "SCRUB",
    "SSD",
    "WINU",
    "CurvatureRecord",
    "CurvatureRecorder",
    "FineTune",
    "GradDiff",
    "GradientAscent",
    "IterativeMethod",
    "OneShotMethod",
    "RandomLabels",
    "Records",
    "RelearningCurve",
    "Retrain",
    "SingularCurvatureError",
    "UnlearningMethod",
    "UnlearningReport",
    "UnlearningResult",
    "compare_unlearning",
    "evaluate_unlearning",
    "plot_unlearning",
    "record_curvature",
    "relearning_curve",
]
