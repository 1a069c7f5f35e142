"""Compressors with exact wire formats, and error feedback."""

from groundwire.plugins.compression.base import Compressor, Message, Payload, RateAdaptive
from groundwire.plugins.compression.d_dsgd import DDSGDQuantizer
from groundwire.plugins.compression.discrete_gaussian import DistributedDiscreteGaussian
from groundwire.plugins.compression.error_feedback import ErrorFeedback, ErrorMemory
from groundwire.plugins.compression.identity import Identity
from groundwire.plugins.compression.private_sketch import PrivateSketch
from groundwire.plugins.compression.qsgd import QSGD
from groundwire.plugins.compression.randk import RandK
from groundwire.plugins.compression.rqm import RQM
from groundwire.plugins.compression.signsgd import SignSGD
from groundwire.plugins.compression.topk import TopK

__all__ = [
    "QSGD",
    "RQM",
    "Compressor",
    "DDSGDQuantizer",
    "DistributedDiscreteGaussian",
    "ErrorFeedback",
    "ErrorMemory",
    "Identity",
    "Message",
    "Payload",
    "PrivateSketch",
    "RandK",
    "RateAdaptive",
    "SignSGD",
    "TopK",
]
