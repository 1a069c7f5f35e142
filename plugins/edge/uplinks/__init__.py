"""How updates reach the server."""

from groundwire.plugins.edge.uplinks.base import Received, Uplink
from groundwire.plugins.edge.uplinks.error_free import ErrorFree

__all__ = ["ErrorFree", "Received", "Uplink"]
