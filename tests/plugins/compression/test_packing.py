"""Wire formats: whatever goes in comes out, in the fewest whole bytes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundwire.plugins.compression.packing import (
    ENUMERATIVE_LIMIT,
    mask_bytes,
    pack_integers,
    pack_mask,
    pack_support,
    packed_bytes,
    rank_support,
    support_bytes,
    unpack_integers,
    unpack_mask,
    unpack_support,
    unrank_support,
    width_of,
)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), width=st.integers(1, 32), count=st.integers(0, 20), rows=st.integers(1, 3))
def test_integers_of_any_width_survive(data: st.DataObject, width: int, count: int, rows: int) -> None:
    values = data.draw(st.lists(st.integers(0, 2**width - 1), min_size=rows * count, max_size=rows * count))
    given_ = torch.tensor(values, dtype=torch.int64).view(rows, count)
    packed = pack_integers(given_, width)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, math.ceil(count * width / 8)) == (rows, packed_bytes(count, width))
    assert torch.equal(unpack_integers(packed, width, count), given_)
    for row, code in zip(given_.tolist(), packed.numpy(), strict=True):  # one long integer, least significant bit first
        assert int.from_bytes(code.tobytes(), "little") == sum(v << (i * width) for i, v in enumerate(row))


@pytest.mark.parametrize("width", range(1, 33))
def test_the_bits_are_those_of_one_long_stream_at_any_length(width: int) -> None:
    rng = np.random.default_rng(width)
    for rows, count in ((2, 40_003), (3, 9), (1, 8), (4, 1), (2, 0), (0, 5)):  # the first in more than one piece
        values = rng.integers(0, 2**width, (rows, count), dtype=np.int64)
        values[:, 1::5], values[:, 2::7] = 2**width - 1, 0
        bits = ((values[:, :, None] >> np.arange(width)) & 1).astype(np.uint8).reshape(rows, count * width)
        packed = pack_integers(torch.from_numpy(values), width)
        assert packed.is_contiguous()
        np.testing.assert_array_equal(packed.numpy(), np.packbits(bits, axis=1, bitorder="little"))
        np.testing.assert_array_equal(unpack_integers(packed, width, count).numpy(), values)
        for cut in (
            torch.cat([packed, packed], dim=1)[:, packed.shape[1] :],
            torch.stack([packed, packed], dim=2)[..., 1],
        ):
            np.testing.assert_array_equal(unpack_integers(cut, width, count).numpy(), values)


@pytest.mark.parametrize(
    ("values", "width", "code"),
    [
        ([0xABC, 0x123, 0x7], 12, "bc 3a 12 07 00"),
        ([0x123456, 0xABCDEF], 24, "56 34 12 ef cd ab"),
        ([0x0102, 0xF00D], 16, "02 01 0d f0"),
        ([0b101, 0b011, 0b110], 3, "9d 01"),
        ([0xDEADBEEF], 32, "ef be ad de"),
    ],
)
def test_messages_stay_readable(values: list[int], width: int, code: str) -> None:
    packed = pack_integers(torch.tensor([values]), width)
    assert packed.numpy().tobytes() == bytes.fromhex(code)
    assert unpack_integers(packed, width, len(values)).tolist() == [values]


@pytest.mark.parametrize("width", [1, 5, 7, 8, 13, 15, 16, 31, 32])
def test_integers_of_other_types(width: int) -> None:
    values = torch.randint(0, 2**width, (3, 100), generator=torch.Generator().manual_seed(width))
    packed = pack_integers(values, width)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        if torch.iinfo(dtype).max < 2**width - 1:
            with pytest.raises(ValueError, match=f"{dtype} cannot hold integers of {width} bits; take torch.int64"):
                unpack_integers(packed, width, 100, dtype)
            continue
        assert torch.equal(pack_integers(values.to(dtype), width), packed)
        got = unpack_integers(packed, width, 100, dtype)
        assert got.dtype == dtype
        assert torch.equal(got, values.to(dtype))
        before = packed.clone()
        got.fill_(0)
        assert torch.equal(packed, before), "the message is not the caller's to change"


@pytest.mark.parametrize("numel", range(1, 9))
def test_enumerative_code_is_a_bijection_onto_the_smallest_range(numel: int) -> None:
    for k in range(numel + 1):
        supports = torch.tensor(list(itertools.combinations(range(numel), k)), dtype=torch.int64).view(
            math.comb(numel, k), k
        )
        code = rank_support(supports, numel)
        numbers = sorted(int.from_bytes(row.tobytes(), "little") for row in code.numpy())
        assert numbers == list(range(math.comb(numel, k)))
        assert torch.equal(unrank_support(code, numel, k), supports)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), numel=st.integers(1, 3000), share=st.floats(0, 1), rows=st.integers(1, 3))
def test_supports_and_masks_survive(seed: int, numel: int, share: float, rows: int) -> None:
    rng = np.random.default_rng(seed)
    k = int(share * numel)
    chosen = np.stack([np.sort(rng.choice(numel, k, replace=False)) for _ in range(rows)]).astype(np.int64)
    support = torch.from_numpy(chosen)
    packed = pack_support(support, numel)
    assert packed.shape == (rows, support_bytes(numel, k))
    assert torch.equal(unpack_support(packed, numel, k), support)
    assert packed.shape[1] <= packed_bytes(numel, 1) or k <= ENUMERATIVE_LIMIT

    mask = torch.zeros(rows, numel, dtype=torch.bool).scatter_(1, support, value=True)
    mask[0] &= torch.from_numpy(rng.random(numel) < 0.5)  # a row with fewer
    most = max(k, 1)
    packed = pack_mask(mask, most)
    assert packed.shape == (rows, mask_bytes(numel, most))
    assert torch.equal(unpack_mask(packed, mask.sum(1, keepdim=True), numel, most), mask)


def test_few_entries_cost_their_entropy_to_the_byte() -> None:
    assert support_bytes(7850, 12) == math.ceil(math.log2(math.comb(7850, 12)) / 8)
    assert support_bytes(7850, 1962) == math.ceil(7850 / 8)  # a bitmap: 13 bits an index would be three times that
    assert support_bytes(400_000, 400) == 400 * 19 // 8
    assert [width_of(n) for n in (0, 1, 2, 3, 4, 255, 256)] == [1, 1, 2, 2, 3, 8, 9]


def test_bad_input_by_message() -> None:
    with pytest.raises(ValueError, match=r"`width` must be in \[1, 32\] bits, got 33"):
        pack_integers(torch.zeros(1, 1, dtype=torch.int64), 33)
    with pytest.raises(ValueError, match=r"Integers must be in \[0, 4\) to take 2 bits, got 0 to 4"):
        pack_integers(torch.tensor([[0, 4]]), 2)
    with pytest.raises(ValueError, match="3 bytes a row do not match 4 integers of 3 bits"):
        unpack_integers(torch.zeros(1, 3, dtype=torch.uint8), 3, 4)
