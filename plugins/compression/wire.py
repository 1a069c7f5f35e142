"""Payloads as the bytes of one message, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from groundwire.plugins.compression.base import Payload


def to_bytes(payloads: Sequence[Payload]) -> Tensor:
    """Lay the parts of payloads of the same rows one behind the other.

    Args:
        payloads: At least one; all on one device.

    Returns:
        uint8, shape ``(rows, bytes)``.
    """
    return torch.cat([_bytes_of(part) for payload in payloads for part in payload.parts.values()], dim=1)


def from_bytes(data: Tensor, like: Sequence[Payload]) -> list[Payload]:
    """Undo :func:`to_bytes` for the rows of other senders with the same settings.

    Args:
        data: uint8, shape ``(rows, bytes)``.
        like: Payloads of the receiver's own, whose parts say dtypes and shapes.

    Returns:
        Payloads of as many rows as ``data`` has, with the knowledge (``meta``) of those in ``like``.

    Raises:
        ValueError: If the bytes do not fit.
    """
    expected = sum(_row_bytes(part) for payload in like for part in payload.parts.values())
    if data.shape[1] != expected:
        raise ValueError(f"Messages of {data.shape[1]} bytes came, but these settings make messages of {expected}.")
    start, received = 0, []
    for payload in like:
        parts = {}
        for name, part in payload.parts.items():
            end = start + _row_bytes(part)
            raw = data[:, start:end].clone(memory_format=torch.contiguous_format).flatten()  # aligned for any dtype
            parts[name] = raw.view(part.dtype).view(len(data), *part.shape[1:])
            start = end
        received.append(replace(payload, parts=parts, padding_bytes=0))
    return received


def lengths_of(payload: Payload) -> Tensor:
    """The second dimension of each part, int32, shape ``(parts,)``: what receivers of ragged messages have to know."""
    return torch.tensor([part.shape[1] for part in payload.parts.values()], dtype=torch.int32)


def padded(payload: Payload, lengths: Sequence[int]) -> Payload:
    """The payload with zeros behind every part, up to the given second dimensions."""
    parts = {
        name: torch.nn.functional.pad(part, (0, length - part.shape[1]))
        for (name, part), length in zip(payload.parts.items(), lengths, strict=True)
    }
    return replace(payload, parts=parts)


def _bytes_of(part: Tensor) -> Tensor:
    if not part.numel():
        return torch.empty(len(part), 0, dtype=torch.uint8, device=part.device)
    return part.contiguous().flatten(1).view(torch.uint8)


def _row_bytes(part: Tensor) -> int:
    return part[0].numel() * part.element_size()
