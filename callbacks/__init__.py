"""What surrounds a training step."""

from groundwire.callbacks.step import Call, StepCallback, Tap

__all__ = ["Call", "StepCallback", "Tap"]
