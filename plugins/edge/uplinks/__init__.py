"""How updates reach the server."""

from groundwire.plugins.edge.uplinks.a_dsgd import ADSGD
from groundwire.plugins.edge.uplinks.base import Received, Uplink
from groundwire.plugins.edge.uplinks.capacity_limited import CapacityLimited
from groundwire.plugins.edge.uplinks.digital import Digital
from groundwire.plugins.edge.uplinks.dp_fedavg import DPFedAvg
from groundwire.plugins.edge.uplinks.dp_over_the_air import DPOverTheAir
from groundwire.plugins.edge.uplinks.error_free import ErrorFree

__all__ = ["ADSGD", "CapacityLimited", "DPFedAvg", "DPOverTheAir", "Digital", "ErrorFree", "Received", "Uplink"]
