"""The evaluation of unlearning: what is still known, what was lost, and how soon it is back."""

from groundwire.callbacks.unlearning.evaluation.evaluation import compare_unlearning, evaluate_unlearning
from groundwire.callbacks.unlearning.evaluation.plots import plot_unlearning
from groundwire.callbacks.unlearning.evaluation.relearning import RelearningCurve, relearning_curve
from groundwire.callbacks.unlearning.evaluation.report import UnlearningReport
from groundwire.callbacks.unlearning.evaluation.result import UnlearningResult, unlearning_table

__all__ = [
    "RelearningCurve",
    "UnlearningReport",
    "UnlearningResult",
    "compare_unlearning",
    "evaluate_unlearning",
    "plot_unlearning",
    "relearning_curve",
    "unlearning_table",
]
