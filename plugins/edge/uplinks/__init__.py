"""How updates reach the server."""

from groundwire.plugins.edge.uplinks.a_dsgd import ADSGD
from groundwire.plugins.edge.uplinks.base import Received, Uplink
from groundwire.plugins.edge.uplinks.capacity_limited import CapacityLimited
from groundwire.plugins.edge.uplinks.digital import Digital
from groundwire.plugins.edge.uplinks.error_free import ErrorFree

__all__ = ["ADSGD", "CapacityLimited", "Digital", "ErrorFree", "Received", "Uplink"]
