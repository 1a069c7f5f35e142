"""Compressed gradients between the processes of a real DDP run."""

from groundwire.plugins.ddp.group import CountedGroup
from groundwire.plugins.ddp.strategy import CompressedDDPStrategy

__all__ = ["CompressedDDPStrategy", "CountedGroup"]
