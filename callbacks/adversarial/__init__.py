"""Attacks, adversarial training, and an evaluation of robustness."""

from groundwire.callbacks.adversarial.adversarial_training import AdversarialTraining
from groundwire.callbacks.adversarial.at_aka import AdaptiveKnowledgeAmalgamation
from groundwire.callbacks.adversarial.attacks import FGSM, PGD, SVGD, Attack, RandomFGSM, ThunderNNA
from groundwire.callbacks.adversarial.callback import AdversarialCallback
from groundwire.callbacks.adversarial.cap import ConfinedPolytopes, CornerSearch
from groundwire.callbacks.adversarial.evaluation import (
    RobustnessReport,
    RobustnessResult,
    evaluate_robustness,
    plot_accuracy_against_eps,
    plot_adversarial_examples,
)
from groundwire.callbacks.adversarial.mart import MART
from groundwire.callbacks.adversarial.threat import ThreatModel
from groundwire.callbacks.adversarial.trades import TRADES

__all__ = [
    "FGSM",
    "MART",
    "PGD",
    "SVGD",
    "TRADES",
    "AdaptiveKnowledgeAmalgamation",
    "AdversarialCallback",
    "AdversarialTraining",
    "Attack",
    "ConfinedPolytopes",
    "CornerSearch",
    "RandomFGSM",
    "RobustnessReport",
    "RobustnessResult",
    "ThreatModel",
    "ThunderNNA",
    "evaluate_robustness",
    "plot_accuracy_against_eps",
    "plot_adversarial_examples",
]
