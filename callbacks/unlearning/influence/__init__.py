"""Which training samples helped a prediction, and which harmed it."""

from groundwire.callbacks.unlearning.influence.callback import DropoutInfluence, TracIn
from groundwire.callbacks.unlearning.influence.compression import (
    Dropout,
    DropoutKron,
    GaussianProjection,
    GradientCompressor,
)
from groundwire.callbacks.unlearning.influence.functional import (
    damped_factor,
    default_damping,
    influence,
    leave_one_out_factor,
    linear_datamodeling_score,
    rank_correlation,
    self_influence,
    trac_in,
)
from groundwire.callbacks.unlearning.influence.plots import plot_influential_samples
from groundwire.callbacks.unlearning.influence.report import InfluenceResult
from groundwire.callbacks.unlearning.influence.scorer import InfluenceScorer

__all__ = [
    "Dropout",
    "DropoutInfluence",
    "DropoutKron",
    "GaussianProjection",
    "GradientCompressor",
    "InfluenceResult",
    "InfluenceScorer",
    "TracIn",
    "damped_factor",
    "default_damping",
    "influence",
    "leave_one_out_factor",
    "linear_datamodeling_score",
    "plot_influential_samples",
    "rank_correlation",
    "self_influence",
    "trac_in",
]
