"""Privacy accounting, and what mechanisms promise."""

from groundwire.plugins.privacy.accounting import (
    Accounting,
    UnreachableBudgetError,
    gaussian_delta,
    gaussian_epsilon,
    noise_multiplier_for,
    spent_epsilon,
    steps_within,
)
from groundwire.plugins.privacy.discrete_gaussian import (
    discrete_gaussian_epsilon,
    discrete_gaussian_rdp,
    rounded_norm_bound,
    sample_discrete_gaussian,
)
from groundwire.plugins.privacy.rqm import epsilon_of_rdp, renyi_divergence, rqm_epsilon, rqm_log_pmf, rqm_rdp
from groundwire.plugins.privacy.statement import PrivacyStatement

__all__ = [
    "Accounting",
    "PrivacyStatement",
    "UnreachableBudgetError",
    "discrete_gaussian_epsilon",
    "discrete_gaussian_rdp",
    "epsilon_of_rdp",
    "gaussian_delta",
    "gaussian_epsilon",
    "noise_multiplier_for",
    "renyi_divergence",
    "rounded_norm_bound",
    "rqm_epsilon",
    "rqm_log_pmf",
    "rqm_rdp",
    "sample_discrete_gaussian",
    "spent_epsilon",
    "steps_within",
]
