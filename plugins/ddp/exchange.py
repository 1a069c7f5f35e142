"""What happens to DDP's buckets: compress, exchange, decode, and remember once the whole step is known to be sound."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from groundwire.plugins.compression.base import Compressor, Payload
from groundwire.plugins.compression.error_feedback import Feedback, finite_rows, narrowed
from groundwire.plugins.compression.identity import Identity
from groundwire.plugins.compression.sender import Segment, Sender
from groundwire.plugins.compression.wire import from_bytes, lengths_of, padded, to_bytes
from groundwire.plugins.ddp.group import CountedGroup
from groundwire.plugins.layout import ParameterLayout
from groundwire.plugins.random import Key


def compressed_allreduce(exchange, bucket):  # type: ignore[no-untyped-def]
    """The hook. DDP takes plain functions only, and compares annotations with classes, which strings are not."""
    return exchange(bucket)


@dataclass(frozen=True, kw_only=True)
class _Outgoing:
    """One segment on its way: the rank's update, what is sent instead, and by what."""

    segment: Segment
    key: Key
    update: Tensor
    corrected: Tensor
    compressor: Compressor
    feedback: Feedback | None
    is_plain: bool

    @property
    def rows(self) -> Tensor:
        """What is encoded, shape ``(1, n)``."""
        return narrowed(self.corrected, self.update.dtype)

    def factors(self, num_devices: int) -> Tensor | None:
        """What each device's message is multiplied with, if the memory wants it."""
        return None if self.feedback is None or self.is_plain else self.feedback.factors(range(num_devices))


class GradientExchange:
    """Compresses what every rank's buckets hold, and leaves the mean of what arrived in them.

    Segments of a bucket travel together, in one collective. Where layers are compressed one by one, a bucket leaves as
    soon as it is full, while the backward pass goes on; where the update is compressed as one vector, or ranks have to
    agree on something first (PowerSGD), everything waits for the last bucket. Nothing is remembered before
    :meth:`end_round`.

    Args:
        sender: What compresses; set up.
        layout: Of the update.
        names: Of the parameters, by their ``id``.
        seed: Root seed of all draws, the same on all ranks.
        group: The ranks.
    """

    def __init__(
        self, sender: Sender, layout: ParameterLayout, names: Mapping[int, str], seed: int, group: CountedGroup
    ) -> None:
        self.sender = sender
        self.layout = layout
        self.group = group
        self.round = 0
        self.loss_scale = 1.0
        self._names = names
        self._seed = seed
        self._segments = {segment.name: segment for segment in sender.segments}
        self._position = {name: i for i, name in enumerate(layout.names)}  # DDP's own order changes after a step
        self._waiting: list[tuple[Tensor, dict[str, Tensor], torch.futures.Future[Tensor]]] = []
        self._to_keep: list[Callable[[], None]] = []
        self._sound: list[Tensor] = []
        self._is_over = False

    @property
    def is_over(self) -> bool:
        """Whether all buckets of a round have been dealt with, and :meth:`end_round` is due."""
        return self._is_over

    def __call__(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """Deal with one bucket.

        Args:
            bucket: As DDP gives it, in the same order on all ranks.

        Returns:
            A future of its buffer, with the mean gradients in it.
        """
        if bucket.index() == 0:
            self._begin_round(bucket.buffer().device)
        named = {self._names[id(p)]: g for p, g in zip(bucket.parameters(), bucket.gradients(), strict=True)}
        buffer = bucket.buffer()
        if self._leaves_at_once:
            items = [(self._segments[name], named[name]) for name in sorted(named, key=self._position.__getitem__)]
            future = self._send(items).then(lambda done: _write(done, [grad for _, grad in items], buffer))
        else:
            future = torch.futures.Future[Tensor](devices=[buffer.device] if buffer.is_cuda else [])
            self._waiting.append((buffer, named, future))
            if bucket.is_last():
                self._send_waiting()
        self._is_over = bucket.is_last()
        return future

    def end_round(self, *, keep: bool | None = None) -> bool:
        """Remember what was sent, if all of it was finite.

        Args:
            keep: Whether to remember; by default whether it was finite.

        Returns:
            Whether all gradients that arrived were finite; the same on all ranks.
        """
        sound = all(bool(flag) for flag in self._sound)
        if sound if keep is None else keep:
            for remember in self._to_keep:
                remember()
        self._to_keep, self._sound, self._is_over = [], [], False
        self.round += 1
        return sound

    # ---------------------------------------------------------------- one round

    def _begin_round(self, device: torch.device) -> None:
        self._waiting, self._to_keep, self._sound = [], [], []  # a backward pass that failed may have left some
        compressor = self.sender.compressor
        if not self.sender.is_warming_up(self.round) and compressor.decides(self.round):
            compressor.adopt(self.group.broadcast(compressor.decide().to(device)))

    @property
    def _leaves_at_once(self) -> bool:
        if self.sender.granularity == "model":
            return False
        return self.sender.is_warming_up(self.round) or not self.sender.at(self.round).negotiates

    def _send_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        grads = {name: grad for _, named, _ in waiting for name, grad in named.items()}
        if self.sender.granularity == "model":
            flat = torch.cat([grads[name].flatten() for name in self.layout.names])
            (segment,) = self.sender.segments
            (mean,) = self._send([(segment, flat)]).wait()
            means = dict(zip(self.layout.names, torch.split(mean.flatten(), self.layout.sizes), strict=True))
        else:
            items = [(self._segments[name], grads[name]) for name in self.layout.names]
            means = dict(zip(self.layout.names, self._send(items).wait(), strict=True))
        for buffer, named, future in waiting:
            for name, grad in named.items():
                grad.copy_(means[name].view_as(grad))
            future.set_result(buffer)

    def _send(self, items: Sequence[tuple[Segment, Tensor]]) -> torch.futures.Future[list[Tensor]]:
        """Send segments together; a future of their means, each of shape ``(1, n)``."""
        key = Key(seed=self._seed, round=self.round, devices=(self.group.rank,))
        outgoing = [self._prepare(segment, grad, key) for segment, grad in items]
        payloads = self._encode(outgoing)
        exchange = self._add_up if all(item.compressor.linear for item in outgoing) else self._gather
        return exchange(outgoing, payloads)

    def _prepare(self, segment: Segment, grad: Tensor, key: Key) -> _Outgoing:
        warming_up = self.sender.is_warming_up(self.round)
        is_plain = segment.is_plain or warming_up
        feedback = None if warming_up else self.sender.feedback
        named = self.sender.key(key, segment)
        update = grad.detach().reshape(1, -1)
        if self.loss_scale != 1.0:
            update = update / self.loss_scale
        elif feedback is not None and feedback.uses_update and self.sender.granularity == "layer":
            update = update.clone()  # the bucket is written before it is remembered
        corrected = update
        if feedback is not None:
            corrected = (feedback.plain if is_plain else feedback.correct)(update, named, segment.name)
        return _Outgoing(
            segment=segment,
            key=named,
            update=update,
            corrected=corrected,
            compressor=Identity() if is_plain else self.sender.at(self.round),
            feedback=feedback,
            is_plain=is_plain,
        )

    def _encode(self, outgoing: Sequence[_Outgoing]) -> list[Payload]:
        proposals = [item.compressor.propose(item.rows, item.key) for item in outgoing]
        wanted = [proposal for proposal in proposals if proposal is not None]
        agreed: Iterator[Tensor] = iter(())
        if wanted:
            flat = self.group.all_reduce(torch.cat([proposal.flatten() for proposal in wanted])).wait()
            agreed = iter(torch.split(flat, [proposal.numel() for proposal in wanted]))
        return [
            item.compressor.encode(item.rows, item.key)
            if proposal is None
            else item.compressor.encode_agreed(item.rows, item.key, next(agreed).view(proposal.shape[1:]))
            for item, proposal in zip(outgoing, proposals, strict=True)
        ]

    def _add_up(self, outgoing: Sequence[_Outgoing], payloads: list[Payload]) -> torch.futures.Future[list[Tensor]]:
        """All-reduce, for payloads that add: one collective for each dtype among their parts."""
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for item, payload in zip(outgoing, payloads, strict=True):
            factors = item.factors(self.group.size)
            for part in payload.parts.values():
                scaled = part if factors is None else part * factors[self.group.rank].to(part)
                by_dtype.setdefault(part.dtype, []).append(scaled.flatten())
        futures = [self.group.all_reduce(torch.cat(parts)) for parts in by_dtype.values()]

        def finish(_: Any) -> list[Tensor]:
            rest = {dtype: future.value() for dtype, future in zip(by_dtype, futures, strict=True)}
            means = []
            for item, payload in zip(outgoing, payloads, strict=True):
                parts = {}
                for name, part in payload.parts.items():
                    flat = rest[part.dtype]
                    taken, rest[part.dtype] = flat[: part.numel()], flat[part.numel() :]
                    parts[name] = taken.view(part.shape)
                total = replace(payload, parts=parts)
                mean = _wide(item.compressor.decode(total)).div_(self.group.size)
                means.append(self._received(item, payload, mean, total))
            return means

        return torch.futures.collect_all(futures).then(finish)

    def _gather(self, outgoing: Sequence[_Outgoing], payloads: list[Payload]) -> torch.futures.Future[list[Tensor]]:
        """All-gather, for payloads that do not add: every rank decodes what all have sent."""
        padded_payloads = self._of_one_length(outgoing, payloads)
        data = to_bytes(padded_payloads)
        mute = [item for item in outgoing if not item.compressor.carries_nan]
        if mute:  # a byte says what the messages cannot
            sound = torch.stack([finite_rows(item.update) for item in mute]).all(dim=0)
            data = torch.cat([data, sound.to(torch.uint8).unsqueeze(1)], dim=1)

        def finish(future: torch.futures.Future[Tensor]) -> list[Tensor]:
            received = future.value()
            if mute:
                self._sound.append(received[:, -1].all())
                received = received[:, :-1]
            means = []
            for item, own, payload in zip(outgoing, payloads, from_bytes(received, padded_payloads), strict=True):
                factors = item.factors(self.group.size)
                if factors is not None:
                    rows = _wide(item.compressor.decode(payload))
                    total = factors.to(rows).unsqueeze(0) @ rows
                else:
                    total = item.compressor.decode_sum(payload)
                means.append(self._received(item, own, total.div_(self.group.size), None))
            return means

        return self.group.all_gather(data.flatten()).then(finish)

    def _of_one_length(self, outgoing: Sequence[_Outgoing], payloads: list[Payload]) -> list[Payload]:
        """Messages of every rank padded to those of the longest."""
        ragged = [i for i, item in enumerate(outgoing) if item.compressor.ragged]
        if not ragged:
            return payloads
        own = [lengths_of(payloads[i]) for i in ragged]
        everyone = self.group.all_gather(torch.cat(own).to(outgoing[0].update.device)).wait()
        longest = torch.split(everyone.amax(dim=0), [len(lengths) for lengths in own])
        sent = list(payloads)
        for i, lengths in zip(ragged, longest, strict=True):
            sent[i] = padded(payloads[i], lengths.tolist())
        return sent

    def _received(self, item: _Outgoing, own: Payload, mean: Tensor, total: Payload | None) -> Tensor:
        """The estimate of a segment, from the mean of what was sent; the rest waits for the end of the round."""
        feedback, name = item.feedback, item.segment.name
        estimate = mean if feedback is None or item.is_plain else feedback.estimate(mean, name)
        self._sound.append(_is_finite(estimate))

        def remember() -> None:
            if total is not None:
                item.compressor.settle(total, item.key, self.group.size)
            if feedback is None:
                return
            if item.is_plain:
                feedback.keep_plain(item.update, item.key, name)
                return
            feedback.keep_sent(item.update, item.corrected, own, item.compressor, item.key, name)
            feedback.keep_estimate(mean, name)

        self._to_keep.append(remember)
        return estimate if self.loss_scale == 1.0 else estimate * self.loss_scale


def _write(done: torch.futures.Future[list[Tensor]], grads: Sequence[Tensor], buffer: Tensor) -> Tensor:
    for grad, mean in zip(grads, done.value(), strict=True):
        grad.copy_(mean.view_as(grad))
    return buffer


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _is_finite(x: Tensor) -> Tensor:
    """Whether all entries are finite; on the CPU by their sum, where that suffices."""
    total = torch.isfinite(x.sum())
    return total if x.device.type == "cpu" and bool(total) else torch.isfinite(x).all()
