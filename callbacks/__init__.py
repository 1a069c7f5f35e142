"""What surrounds a training step."""

from groundwire.callbacks.classifier import ClassifierCallback
from groundwire.callbacks.logits import LogitsSource
from groundwire.callbacks.optimizer_swap import OptimizerSwap
from groundwire.callbacks.step import Call, StepCallback, Tap

__all__ = ["Call", "ClassifierCallback", "LogitsSource", "OptimizerSwap", "StepCallback", "Tap"]
