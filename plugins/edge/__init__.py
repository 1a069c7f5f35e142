"""Federated training of an unmodified LightningModule on simulated devices."""

from groundwire.plugins.edge.aggregator import Aggregator, MajorityVote, WeightedMean
from groundwire.plugins.edge.batch import DeviceBatch
from groundwire.plugins.edge.downlink import Downlink, PerfectDownlink
from groundwire.plugins.edge.downlinks import LFL, LGM, LTGM, AnalogDownlink, DigitalDownlink, DownlinkSelection
from groundwire.plugins.edge.fair import QFFL, AdaFed
from groundwire.plugins.edge.local import LocalGradient, LocalSGD, LocalWork
from groundwire.plugins.edge.round import Round
from groundwire.plugins.edge.scheduler import AllDevices, PoissonSample, Scheduler, UniformSample
from groundwire.plugins.edge.strategy import EdgeStrategy
from groundwire.plugins.edge.uplinks import (
    ADSGD,
    CADSGD,
    ESADSGD,
    OTAFFL,
    BlindTransmitters,
    CapacityLimited,
    Digital,
    DPFedAvg,
    DPOverTheAir,
    ErrorFree,
    MassiveMIMO,
    OpportunisticDigital,
    Received,
    UpdateAware,
    Uplink,
)
from groundwire.plugins.errors import CheckpointMismatchError, NonFiniteUpdateError
from groundwire.plugins.layout import ParameterLayout
from groundwire.plugins.ledger import Cost, Ledger

__all__ = [
    "ADSGD",
    "CADSGD",
    "ESADSGD",
    "LFL",
    "LGM",
    "LTGM",
    "OTAFFL",
    "QFFL",
    "AdaFed",
    "Aggregator",
    "AllDevices",
    "AnalogDownlink",
    "BlindTransmitters",
    "CapacityLimited",
    "CheckpointMismatchError",
    "Cost",
    "DPFedAvg",
    "DPOverTheAir",
    "DeviceBatch",
    "Digital",
    "DigitalDownlink",
    "Downlink",
    "DownlinkSelection",
    "EdgeStrategy",
    "ErrorFree",
    "Ledger",
    "LocalGradient",
    "LocalSGD",
    "LocalWork",
    "MajorityVote",
    "MassiveMIMO",
    "NonFiniteUpdateError",
    "OpportunisticDigital",
    "ParameterLayout",
    "PerfectDownlink",
    "PoissonSample",
    "Received",
    "Round",
    "Scheduler",
    "UniformSample",
    "UpdateAware",
    "Uplink",
    "WeightedMean",
]
