"""How a whole update is compressed: as one vector, or layer by layer with small tensors as they are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from groundwire.plugins.compression.base import Compressor, Message
from groundwire.plugins.compression.error_feedback import Feedback
from groundwire.plugins.compression.identity import Identity
from groundwire.plugins.layout import ParameterLayout
from groundwire.plugins.random import Key

WHOLE = "update"
"""Name of the update as one vector."""

Granularity = Literal["model", "layer"]
"""What is compressed by itself: the whole update, or every parameter."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A part of the update that is compressed by itself.

    Args:
        name: Of the parameter; :data:`WHOLE` for the whole update.
        start: Its first entry in the update.
        shape: Its shape.
        is_plain: Whether it is sent as it is.
    """

    name: str
    start: int
    shape: torch.Size
    is_plain: bool

    @property
    def numel(self) -> int:
        """Entries."""
        return self.shape.numel()

    @property
    def entries(self) -> slice:
        """Where it lies in the update."""
        return slice(self.start, self.start + self.numel)


def _key_name(segment: Segment) -> str:
    return "" if segment.name == WHOLE else segment.name


class Sender(nn.Module):
    """Cuts updates into segments and sends each with a compressor, with or without memory.

    Args:
        compressor: A compressor, or error feedback around one.
        granularity: ``"model"`` compresses the update as one vector; ``"layer"`` every parameter by itself, and sends
            those of fewer than two dimensions or fewer than ``min_numel`` entries, and those that would not become
            smaller, as they are.
        min_numel: Fewest entries of a parameter that is compressed.
        warmup_rounds: Rounds at the beginning in which everything is sent as it is, and nothing remembered.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        compressor: Compressor | Feedback,
        granularity: Granularity = "model",
        min_numel: int = 1024,
        warmup_rounds: int = 0,
    ) -> None:
        super().__init__()
        if granularity not in ("model", "layer"):
            raise ValueError(f"`granularity` must be 'model' or 'layer', got {granularity!r}.")
        if min_numel < 0:
            raise ValueError(f"`min_numel` must be at least 0, got {min_numel}.")
        if warmup_rounds < 0:
            raise ValueError(f"`warmup_rounds` must be at least 0, got {warmup_rounds}.")
        self.given = compressor
        self.granularity: Granularity = granularity
        self.min_numel = min_numel
        self.warmup_rounds = warmup_rounds
        self.segments: tuple[Segment, ...] = ()

    @property
    def feedback(self) -> Feedback | None:
        """The memory, if there is one."""
        return self.given if isinstance(self.given, Feedback) else None

    @property
    def compressor(self) -> Compressor:
        """What compresses, without its memory."""
        return self.given.compressor if isinstance(self.given, Feedback) else self.given

    def at(self, round: int) -> Compressor:
        """What compresses in a round, without its memory."""
        return self.given.at(round) if isinstance(self.given, Feedback) else self.given

    def is_warming_up(self, round: int) -> bool:
        """Whether everything is still sent as it is."""
        return round < self.warmup_rounds

    def setup(self, layout: ParameterLayout, num_devices: int, hosted: range | None = None) -> None:
        """Forget what was before, and learn the update's layout.

        Args:
            layout: Of the update.
            num_devices: In the whole run.
            hosted: Ids of those that are here, in a process of several; by default all.

        Raises:
            MisconfigurationException: If no parameter would be compressed.
            ValueError: If the compressor does not fit the shapes.
        """
        self.compressor.reset_state()
        if self.feedback is not None:
            self.feedback.reset_state()
            self.feedback.setup(num_devices, hosted)
        if self.granularity == "model":
            self.segments = (self._whole(layout.numel),)
        else:
            self.segments = self._layers(layout)
        shapes = {_key_name(segment): segment.shape for segment in self.segments if not segment.is_plain}
        self.compressor.setup(shapes)

    def _layers(self, layout: ParameterLayout) -> tuple[Segment, ...]:
        segments, start = [], 0
        for name, shape in zip(layout.names, layout.shapes, strict=True):
            is_small = len(shape) < 2 or shape.numel() < self.min_numel
            plain = is_small or not self.compressor.is_worthwhile(shape)
            segments.append(Segment(name=name, start=start, shape=shape, is_plain=plain))
            start += shape.numel()
        if all(segment.is_plain for segment in segments):
            raise MisconfigurationException(
                f"{self.compressor} with granularity='layer' would compress no parameter: each has fewer than two "
                f"dimensions, fewer than min_numel={self.min_numel} entries, or would not become smaller. Of {layout}. "
                "Lower `min_numel` or the compressor's rank, or use granularity='model'."
            )
        return tuple(segments)

    @staticmethod
    def key(key: Key, segment: Segment) -> Key:
        """The key of a segment's random draws."""
        return replace(key, name=_key_name(segment))

    @staticmethod
    def _whole(numel: int) -> Segment:
        return Segment(name=WHOLE, start=0, shape=torch.Size((numel,)), is_plain=False)

    def _send_plain(self, x: Tensor, key: Key, segment: Segment) -> Message:
        """Send a segment as it is, through what the memory makes of it."""
        feedback = None if self.is_warming_up(key.round) else self.feedback
        rows = x if feedback is None else feedback.plain(x, key, segment.name)
        message = Identity().roundtrip(rows, key)
        if feedback is not None:
            feedback.keep_plain(x, key, segment.name)
        return message

    @override
    def forward(self, rows: Tensor, key: Key) -> Message:
        """Send the updates of all devices that take part.

        Args:
            rows: Shape ``(M, d)``, row ``i`` of device ``key.devices[i]``; ``d`` is that of the layout, or anything if
                there was no :meth:`setup` and the whole update is compressed.
            key: Names the devices and the round.

        Returns:
            What the receiver holds of each row.
        """
        if not self.segments and self.granularity == "layer":
            raise RuntimeError("Layers are not known: call setup(layout, num_devices), or use granularity='model'.")
        expected = sum(segment.numel for segment in self.segments)
        if self.segments and rows.shape[1] != expected:
            raise ValueError(f"Updates of {rows.shape[1]} entries came, but the layout has {expected}; call setup().")
        warming_up, bits_of_decision = self.is_warming_up(key.round), self._decide(key.round)
        messages = []
        for segment in self.segments or (self._whole(rows.shape[1]),):
            x, named = rows[:, segment.entries], self.key(key, segment)
            if segment.is_plain or warming_up:
                messages.append(self._send_plain(x, named, segment))
            elif self.feedback is not None:
                messages.append(self.feedback(x.contiguous(), named, name=segment.name))
            else:
                messages.append(self.compressor.roundtrip(x.contiguous(), named))
        if len(messages) == 1 and not bits_of_decision:
            return messages[0]
        return Message(
            values=torch.cat([message.values for message in messages], dim=1),
            bits_wire=sum(message.bits_wire for message in messages) + bits_of_decision,
            bits_ideal=sum(message.bits_ideal for message in messages) + bits_of_decision,
        )

    def _decide(self, round: int) -> int:
        """Let device 0 choose settings where it is time to; returns the bits of telling the others."""
        compressor = self.compressor
        if self.is_warming_up(round) or not compressor.decides(round):
            return 0
        decision = compressor.decide()
        compressor.adopt(decision)
        return 8 * decision.numel() * decision.element_size()

    @override
    def extra_repr(self) -> str:
        return f"granularity={self.granularity!r}, min_numel={self.min_numel}, warmup_rounds={self.warmup_rounds}"
