"""Payloads as bytes: the very bytes of their parts, and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from groundwire.plugins.compression import QSGD, Compressor, Identity, Payload, RandK, SignSGD, TopK
from groundwire.plugins.compression.wire import from_bytes, lengths_of, padded, to_bytes
from groundwire.plugins.random import Key
from helpers.compressors import rows

DTYPES = (
    torch.uint8,
    torch.int8,
    torch.bool,
    torch.int16,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.float32,
    torch.int64,
    torch.float64,
)


def payload(padding_bytes: int = 0, **parts: Tensor) -> Payload:
    return Payload(
        parts=parts, numel=7, dtype=torch.float32, bits_ideal=1.0, meta={"seed": 3}, padding_bytes=padding_bytes
    )


def noise(count: int, numel: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Any bits, so NaN, infinities and subnormal numbers among them."""
    g = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(count, numel, generator=g) < 0.5
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.randint(0, 256, (count * numel * size,), generator=g, dtype=torch.uint8).view(dtype).view(count, numel)


def raw(part: Tensor, row: int) -> bytes:
    """The memory of one row."""
    own = part[row : row + 1]
    return bytes(
        (own.clone() if own.dtype == torch.bool else own.clone().view(torch.uint8)).flatten().numpy().tobytes()
    )


shapes = st.lists(st.tuples(st.integers(0, 9), st.sampled_from(DTYPES)), min_size=1, max_size=5)


@given(shapes=shapes, count=st.integers(1, 4), others=st.integers(1, 4), cut=st.integers(0, 4))
def test_a_row_is_the_bytes_of_its_parts_and_comes_back(
    shapes: list[tuple[int, torch.dtype]], count: int, others: int, cut: int
) -> None:
    def build(count: int, seed: int) -> list[Payload]:
        parts = {f"part_{i}": noise(count, n, dtype, seed + i) for i, (n, dtype) in enumerate(shapes)}
        first = {name: part for i, (name, part) in enumerate(parts.items()) if i < cut}
        rest = {name: part for i, (name, part) in enumerate(parts.items()) if i >= cut}
        return [payload(**own) for own in (first, rest) if own]

    sent, like = build(others, 10), build(count, 50)
    data = to_bytes(sent)
    assert data.dtype == torch.uint8
    for row in range(others):
        expected = b"".join(raw(part, row) for each in sent for part in each.parts.values())
        assert bytes(data[row].numpy().tobytes()) == expected
    assert 8 * data.numel() == sum(each.bits_wire for each in sent)
    for received, original in zip(from_bytes(data, like), sent, strict=True):
        assert received.parts.keys() == original.parts.keys()
        for name, part in received.parts.items():
            assert part.dtype == original.parts[name].dtype
            assert part.shape == original.parts[name].shape
            assert all(raw(part, row) == raw(original.parts[name], row) for row in range(others))
        assert (received.numel, received.dtype, received.meta) == (7, torch.float32, {"seed": 3})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "compressor",
    [Identity(), TopK(density=0.1), TopK(k=3), RandK(k=5), QSGD(3), QSGD(2, num_entries=4), SignSGD(scaled=True)],
    ids=str,
)
def test_what_others_sent_is_decoded_from_bytes_as_it_is_from_payloads(
    compressor: Compressor, dtype: torch.dtype
) -> None:
    """Each device encodes two segments for itself; one of them reads what all have sent."""
    segments = [rows(4, 33, dtype=dtype), rows(4, 12, seed=1, dtype=dtype)]
    key = Key(seed=2, round=5, devices=(0, 1, 2, 3))
    each = [[compressor.encode(x[m : m + 1], key.row(m)) for x in segments] for m in range(4)]
    gathered = torch.stack([to_bytes(own) for own in each]).flatten(0, 1)
    assert all(8 * to_bytes(own).numel() == sum(one.bits_wire for one in own) for own in each)
    for received, x in zip(from_bytes(gathered, each[2]), segments, strict=True):
        assert torch.equal(compressor.decode(received), compressor.roundtrip(x, key).values)


def test_what_lies_elsewhere_in_memory_travels_as_it_is() -> None:
    wide = noise(6, 8, torch.float32, 0)
    for part in (wide[::2, 1::3], wide.T[:4], wide[:2, :5], wide[:1].expand(3, 8)):
        (received,) = from_bytes(to_bytes([payload(values=part)]), [payload(values=part[:1].clone())])
        assert all(raw(received.parts["values"], row) == raw(part.contiguous(), row) for row in range(len(part)))
    received.parts["values"].zero_()
    assert wide.view(torch.int32).any(), "what was received is nobody else's"


def test_parts_of_more_dimensions_keep_their_shape() -> None:
    part = noise(3, 8, torch.int16, 0).view(3, 2, 4)
    (received,) = from_bytes(to_bytes([payload(codes=part)]), [payload(codes=part[:1])])
    assert torch.equal(received.parts["codes"], part)


def test_nobody_and_nothing() -> None:
    like = [payload(values=torch.ones(1, 3), empty=torch.ones(1, 0))]
    nobody = from_bytes(to_bytes([payload(values=torch.ones(0, 3), empty=torch.ones(0, 0))]).reshape(0, 12), like)
    assert nobody[0].parts["values"].shape == (0, 3)
    nothing = [payload(empty=torch.ones(4, 0, dtype=torch.int16))]
    assert to_bytes(nothing).shape == (4, 0)
    assert from_bytes(torch.empty(4, 0, dtype=torch.uint8), nothing)[0].parts["empty"].shape == (4, 0)
    assert from_bytes(torch.empty(4, 0, dtype=torch.uint8), nothing)[0].parts["empty"].dtype == torch.int16


@pytest.mark.parametrize("count", [11, 13, 0, 24])
def test_bytes_that_do_not_fit_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"Messages of {count} bytes came, but these settings make messages of 12"):
        from_bytes(torch.zeros(2, count, dtype=torch.uint8), [payload(values=torch.ones(1, 3))])


# ---------------------------------------------------------------- messages of different lengths


class Positive(Compressor):
    """Sends what is above zero, so what a row says decides how long its message is."""

    ragged = True

    def encode(self, x: Tensor, key: Key) -> Payload:
        kept = [row[row > 0] for row in x]
        where = [(row > 0).nonzero().flatten().to(torch.int16) for row in x]
        longest = max((len(row) for row in kept), default=0)
        pad = torch.nn.functional.pad
        return Payload(
            parts={
                "count": torch.tensor([[len(row)] for row in kept], dtype=torch.int32),
                "values": torch.stack([pad(row, (0, longest - len(row))) for row in kept]),
                "where": torch.stack([pad(row, (0, longest - len(row))) for row in where]),
            },
            numel=x.shape[1],
            dtype=x.dtype,
            bits_ideal=0.0,
            padding_bytes=(x.element_size() + 2) * sum(longest - len(row) for row in kept),
        )

    def decode(self, payload: Payload) -> Tensor:
        out = payload.parts["values"].new_zeros(len(payload.parts["values"]), payload.numel)
        for row, count in enumerate(payload.parts["count"].flatten().tolist()):
            out[row, payload.parts["where"][row, :count].long()] = payload.parts["values"][row, :count]
        return out


def test_messages_of_different_lengths_are_padded_to_the_longest_and_mean_the_same() -> None:
    compressor, x, key = Positive(), rows(3, 20), Key(seed=0, devices=(0, 1, 2))
    x[1] = -1.0  # nothing to send
    each = [compressor.encode(x[m : m + 1], key.row(m)) for m in range(3)]
    lengths = torch.stack([lengths_of(own) for own in each])
    assert lengths.dtype == torch.int32
    assert lengths.tolist() == [[1, int((row > 0).sum()), int((row > 0).sum())] for row in x]
    longest = lengths.amax(0).tolist()
    same = [padded(own, longest) for own in each]
    assert all(lengths_of(own).tolist() == longest for own in same)
    gathered = torch.cat([to_bytes([own]) for own in same])
    for own in same:
        (received,) = from_bytes(gathered, [own])
        assert torch.equal(compressor.decode(received), compressor.roundtrip(x, key).values)
        assert received.padding_bytes == 0
    for own, long in zip(each, same, strict=True):
        assert torch.equal(compressor.decode(long), compressor.decode(own))
        assert long.bits_wire == 8 * to_bytes([long]).numel(), "padding that travels is paid for"
        assert all(not long.parts[name][:, own.parts[name].shape[1] :].any() for name in own.parts)
    together = compressor.encode(x, key)
    assert together.bits_wire == sum(own.bits_wire for own in each), "padding that does not travel is not"
    assert together.padding_bytes > 0
    (received,) = from_bytes(to_bytes([together]), [together])
    assert received.padding_bytes == 0, "the receiver cannot know it"
    assert torch.equal(compressor.decode(received), compressor.decode(together))
