"""How the server's model reaches the devices."""

from groundwire.plugins.edge.downlinks.analog import AnalogDownlink
from groundwire.plugins.edge.downlinks.digital import DigitalDownlink
from groundwire.plugins.edge.downlinks.quantized import LFL, LGM, LTGM
from groundwire.plugins.edge.downlinks.selection import DownlinkSelection

__all__ = ["LFL", "LGM", "LTGM", "AnalogDownlink", "DigitalDownlink", "DownlinkSelection"]
