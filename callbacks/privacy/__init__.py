"""Differential privacy: training, audits of what is claimed, and private measurements."""

from groundwire.callbacks.privacy.dp_sgd import DPSGD, PrivacyBudgetExhausted
from groundwire.callbacks.privacy.engine import PerSampleGradients
from groundwire.callbacks.privacy.few_shot import FiLM, FiLMLayer, HeadOnly
from groundwire.callbacks.privacy.independence import (
    DistanceCorrelation,
    PrivateIndependenceTest,
    distance_correlation,
    pi_test,
)
from groundwire.callbacks.privacy.valuation import DataValuation, diversity_and_relevance

__all__ = [
    "DPSGD",
    "DataValuation",
    "DistanceCorrelation",
    "FiLM",
    "FiLMLayer",
    "HeadOnly",
    "PerSampleGradients",
    "PrivacyBudgetExhausted",
    "PrivateIndependenceTest",
    "distance_correlation",
    "diversity_and_relevance",
    "pi_test",
]
