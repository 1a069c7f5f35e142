"""Curvature of the training data, kept so that records can be removed from it again."""

from groundwire.callbacks.unlearning.curvature.base import Curvature, Removal
from groundwire.callbacks.unlearning.curvature.choice import AUTO_FULL, KINDS, CurvatureKind, check_kind, make_curvature
from groundwire.callbacks.unlearning.curvature.ekfac import EKFACCurvature
from groundwire.callbacks.unlearning.curvature.full import FullCurvature
from groundwire.callbacks.unlearning.curvature.low_rank import EXTRA_COLUMNS, LowRankCurvature
from groundwire.callbacks.unlearning.curvature.solve import NewtonStep, SingularCurvatureError, solve_without

__all__ = [
    "AUTO_FULL",
    "EXTRA_COLUMNS",
    "KINDS",
    "Curvature",
    "CurvatureKind",
    "EKFACCurvature",
    "FullCurvature",
    "LowRankCurvature",
    "NewtonStep",
    "Removal",
    "SingularCurvatureError",
    "check_kind",
    "make_curvature",
    "solve_without",
]
