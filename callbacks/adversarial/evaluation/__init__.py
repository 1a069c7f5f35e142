"""An evaluation of robustness that nobody has to doubt."""

from groundwire.callbacks.adversarial.evaluation.autoattack import autoattack
from groundwire.callbacks.adversarial.evaluation.checks import Check
from groundwire.callbacks.adversarial.evaluation.plots import plot_accuracy_against_eps, plot_adversarial_examples
from groundwire.callbacks.adversarial.evaluation.report import RobustnessReport
from groundwire.callbacks.adversarial.evaluation.result import Examples, RobustnessResult
from groundwire.callbacks.adversarial.evaluation.robustness import evaluate_robustness, standard_attacks

__all__ = [
    "Check",
    "Examples",
    "RobustnessReport",
    "RobustnessResult",
    "autoattack",
    "evaluate_robustness",
    "plot_accuracy_against_eps",
    "plot_adversarial_examples",
    "standard_attacks",
]
