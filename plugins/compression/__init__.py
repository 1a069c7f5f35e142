"""Compressors with exact wire formats, and error feedback."""

from groundwire.plugins.compression.base import Compressor, Message, Payload, RateAdaptive
from groundwire.plugins.compression.contracted import Contracted
from groundwire.plugins.compression.d_dsgd import DDSGDQuantizer
from groundwire.plugins.compression.dgc import DGC
from groundwire.plugins.compression.discrete_gaussian import DistributedDiscreteGaussian
from groundwire.plugins.compression.econtrol import EControl
from groundwire.plugins.compression.ef21 import EF21, EF21SGDM, EF21W
from groundwire.plugins.compression.error_feedback import ErrorFeedback, ErrorMemory, Feedback
from groundwire.plugins.compression.fedzip import FedZip
from groundwire.plugins.compression.identity import Identity
from groundwire.plugins.compression.l_greco import LGreCo
from groundwire.plugins.compression.largest_entries import LargestEntries
from groundwire.plugins.compression.lfl_quantizer import LFLQuantizer
from groundwire.plugins.compression.low_precision import LowPrecision
from groundwire.plugins.compression.natural import NaturalCompression
from groundwire.plugins.compression.powersgd import PowerSGD
from groundwire.plugins.compression.private_sketch import PrivateSketch
from groundwire.plugins.compression.qsgd import QSGD
from groundwire.plugins.compression.randk import RandK
from groundwire.plugins.compression.rc_fed import NQFL, RCFED, LloydMax, ScalarQuantizer
from groundwire.plugins.compression.rqm import RQM
from groundwire.plugins.compression.sender import Granularity, Segment, Sender
from groundwire.plugins.compression.signsgd import SignSGD
from groundwire.plugins.compression.sketch import SRHT, CountSketch
from groundwire.plugins.compression.terngrad import TernGrad
from groundwire.plugins.compression.topk import TopK

__all__ = [
    "DGC",
    "EF21",
    "EF21SGDM",
    "EF21W",
    "NQFL",
    "QSGD",
    "RCFED",
    "RQM",
    "SRHT",
    "Compressor",
    "Contracted",
    "CountSketch",
    "DDSGDQuantizer",
    "DistributedDiscreteGaussian",
    "EControl",
    "ErrorFeedback",
    "ErrorMemory",
    "FedZip",
    "Feedback",
    "Granularity",
    "Identity",
    "LFLQuantizer",
    "LGreCo",
    "LargestEntries",
    "LloydMax",
    "LowPrecision",
    "Message",
    "NaturalCompression",
    "Payload",
    "PowerSGD",
    "PrivateSketch",
    "RandK",
    "RateAdaptive",
    "ScalarQuantizer",
    "Segment",
    "Sender",
    "SignSGD",
    "TernGrad",
    "TopK",
]
