"""Federated training of an unmodified LightningModule on simulated devices."""

from groundwire.plugins.edge.aggregator import Aggregator, MajorityVote, WeightedMean
from groundwire.plugins.edge.batch import DeviceBatch
from groundwire.plugins.edge.downlink import Downlink, PerfectDownlink
from groundwire.plugins.edge.local import LocalGradient, LocalSGD, LocalWork
from groundwire.plugins.edge.round import Round
from groundwire.plugins.edge.scheduler import AllDevices, PoissonSample, Scheduler, UniformSample
from groundwire.plugins.edge.strategy import EdgeStrategy
from groundwire.plugins.edge.uplinks import (
    ADSGD,
    CapacityLimited,
    Digital,
    DPFedAvg,
    DPOverTheAir,
    ErrorFree,
    Received,
    Uplink,
)
from groundwire.plugins.errors import CheckpointMismatchError, NonFiniteUpdateError
from groundwire.plugins.layout import ParameterLayout
from groundwire.plugins.ledger import Cost, Ledger

__all__ = [
    "ADSGD",
    "Aggregator",
    "AllDevices",
    "CapacityLimited",
    "CheckpointMismatchError",
    "Cost",
    "DPFedAvg",
    "DPOverTheAir",
    "DeviceBatch",
    "Digital",
    "Downlink",
    "EdgeStrategy",
    "ErrorFree",
    "Ledger",
    "LocalGradient",
    "LocalSGD",
    "LocalWork",
    "MajorityVote",
    "NonFiniteUpdateError",
    "ParameterLayout",
    "PerfectDownlink",
    "PoissonSample",
    "Received",
    "Round",
    "Scheduler",
    "UniformSample",
    "Uplink",
    "WeightedMean",
]
