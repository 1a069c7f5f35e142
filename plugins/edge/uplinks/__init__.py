"""How updates reach the server."""

from groundwire.plugins.edge.uplinks.a_dsgd import ADSGD
from groundwire.plugins.edge.uplinks.base import Received, Uplink
from groundwire.plugins.edge.uplinks.blind import BlindTransmitters
from groundwire.plugins.edge.uplinks.ca_dsgd import CADSGD, ESADSGD
from groundwire.plugins.edge.uplinks.capacity_limited import CapacityLimited
from groundwire.plugins.edge.uplinks.digital import Digital
from groundwire.plugins.edge.uplinks.dp_fedavg import DPFedAvg
from groundwire.plugins.edge.uplinks.dp_over_the_air import DPOverTheAir
from groundwire.plugins.edge.uplinks.error_free import ErrorFree
from groundwire.plugins.edge.uplinks.massive_mimo import MassiveMIMO
from groundwire.plugins.edge.uplinks.opportunistic_digital import OpportunisticDigital
from groundwire.plugins.edge.uplinks.ota_ffl import OTAFFL
from groundwire.plugins.edge.uplinks.update_aware import UpdateAware

__all__ = [
    "ADSGD",
    "CADSGD",
    "ESADSGD",
    "OTAFFL",
    "BlindTransmitters",
    "CapacityLimited",
    "DPFedAvg",
    "DPOverTheAir",
    "Digital",
    "ErrorFree",
    "MassiveMIMO",
    "OpportunisticDigital",
    "Received",
    "UpdateAware",
    "Uplink",
]
