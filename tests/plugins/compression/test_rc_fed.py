"""RC-FED and its baselines against definitions written entry by entry."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from groundwire.plugins.compression.entropy_coding import huffman_code, model_weights, symbol_bits
from groundwire.plugins.compression.packing import pack_integers
from groundwire.plugins.compression.rc_fed import NQFL, RCFED, CellFinder, LloydMax, ScalarQuantizer, standardize
from groundwire.plugins.random import Key
from helpers.compressors import check_compressor, key, rows

CASES: dict[str, Callable[[], ScalarQuantizer]] = {
    "ans": lambda: RCFED(lam=0.1),
    "huffman": lambda: RCFED(lam=0.05, num_levels=8, entropy="huffman"),
    "fixed": lambda: RCFED(lam=0.05, num_levels=8, entropy="fixed"),
    "fixed_of_five": lambda: LloydMax(5, entropy="fixed"),
    "uniform": lambda: RCFED(lam=0.1, design="uniform"),
    "most_levels": lambda: LloydMax(256, entropy="huffman"),
    "two_levels": lambda: LloydMax(2, entropy="huffman"),
    "nqfl": lambda: NQFL(7, mu=20.0),
    "mean_alone": lambda: RCFED(lam=2.0),
    "mean_alone_fixed": lambda: RCFED(lam=2.0, entropy="fixed"),
}


def by_definition(row: np.ndarray, compressor: ScalarQuantizer) -> np.ndarray:
    """Standardise, look for the cell, and put its level back; float32 is what travels."""
    mean, std = float(np.float32(row.mean())), float(np.float32(row.std()))
    if std == 0:
        return np.full_like(row, mean)
    cells = ((row[:, None] - mean) / std > compressor.table.boundaries).sum(axis=1)
    return mean + std * compressor.table.levels[cells]


@pytest.mark.parametrize("name", CASES)
def test_shared_checks(name: str) -> None:
    built = CASES[name]()
    width = math.ceil(math.log2(len(built.table.levels)))
    check_compressor(
        lambda: copy.deepcopy(built),
        definition=lambda row: by_definition(row, built),
        wire_bits=(lambda d, _: 64 + 8 * math.ceil(d * width / 8)) if built.entropy == "fixed" else None,
    )
    assert built.ragged == (built.entropy != "fixed")
    assert not built.unbiased
    assert not built.linear


# ---------------------------------------------------------------- what travels


def normal_row(numel: int, seed: int = 0) -> torch.Tensor:
    return 0.3 + 2.0 * torch.randn(1, numel, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "compressor", [RCFED(lam=0.1), RCFED(target_rate=0.7), RCFED(lam=0.05, design="uniform"), LloydMax(8)], ids=repr
)
def test_a_normal_row_costs_its_entropy_and_errs_by_its_distortion(compressor: ScalarQuantizer) -> None:
    x = normal_row(100_000)
    message = compressor.roundtrip(x, key(1))
    assert message.bits_wire / 100_000 == pytest.approx(compressor.rate, rel=0.01)
    assert message.bits_ideal / 100_000 == pytest.approx(compressor.rate, rel=0.01)
    assert message.bits_ideal <= message.bits_wire <= 1.001 * message.bits_ideal + 64
    assert float((message.values - x).square().mean() / x.var()) == pytest.approx(compressor.distortion, rel=0.02)


def test_a_normal_row_in_a_huffman_code_costs_that_codes_mean_length() -> None:
    compressor = RCFED(lam=0.1, entropy="huffman")
    message = compressor.roundtrip(normal_row(100_000), key(1))
    assert message.bits_wire / 100_000 == pytest.approx(compressor.huffman_rate, rel=0.01)
    assert message.bits_wire > 1.04 * message.bits_ideal
    assert message.bits_ideal / 100_000 == pytest.approx(compressor.rate, rel=0.01)


def test_a_laplace_row_costs_the_cross_entropy() -> None:
    """The model is of another source: the cells' Laplace probabilities times the normal code's lengths."""
    compressor = RCFED(lam=0.05, num_levels=9)
    x = torch.from_numpy(np.random.default_rng(0).laplace(size=(1, 100_000)))
    edges = np.concatenate([[-np.inf], compressor.table.boundaries, [np.inf]]) * math.sqrt(2)  # of variance 2
    cdf = np.where(edges < 0, 0.5 * np.exp(-np.abs(edges)), 1 - 0.5 * np.exp(-np.abs(edges)))
    cross = float(np.diff(cdf) @ -np.log2(compressor.table.pmf))
    message = compressor.roundtrip(x, key(1))
    assert message.bits_wire / 100_000 == pytest.approx(cross, rel=0.01)
    assert message.bits_ideal / 100_000 == pytest.approx(cross, rel=0.01)
    assert abs(cross - compressor.rate) > 0.05, "and is not that of a normal row"
    error = float((message.values - x).square().mean() / x.var())
    assert error == pytest.approx(0.055, abs=0.002)
    assert error > 1.3 * compressor.distortion


def test_bits_are_those_of_the_symbols() -> None:
    x = rows(3, 500)
    built = RCFED(lam=0.1, entropy="huffman")
    weights, z = (
        model_weights(built.table.pmf),
        (x.double() - x.double().mean(1, keepdim=True)) / x.double().std(1, correction=0, keepdim=True),
    )
    symbols = np.searchsorted(built.table.boundaries, z.numpy())
    lengths = huffman_code(weights).lengths[symbols].sum(axis=1)
    payload = built.encode(x, key(3))
    assert payload.parts["length"].flatten().tolist() == [math.ceil(bits / 8) for bits in lengths]
    assert payload.parts["stream"].shape == (3, payload.parts["length"].max())
    assert payload.bits_wire == 8 * (3 * 12 + sum(math.ceil(bits / 8) for bits in lengths))
    assert payload.bits_ideal == pytest.approx(3 * 64 + symbol_bits(weights)[symbols].sum())


@pytest.mark.parametrize("entropy", ["ans", "huffman"])
def test_a_row_without_variation_sends_its_scale_alone(entropy: str) -> None:
    compressor = LloydMax(4, entropy=entropy)  # type: ignore[arg-type]
    x = torch.stack([torch.zeros(50), torch.full((50,), 0.1), normal_row(50)[0], torch.full((50,), math.nan)])
    for dtype in (torch.float32, torch.float64):
        payload = compressor.encode(x.to(dtype), key(4))
        assert (payload.parts["length"].flatten() > 0).tolist() == [False, False, True, False]
        assert payload.parts["scale"][:2, 1].tolist() == [0, 0]
        assert payload.parts["scale"][3].isnan().all()
        alone = compressor.encode(x[2:3].to(dtype), key(4).row(2))
        assert payload.bits_wire == alone.bits_wire + 3 * 96
        decoded = compressor.decode(payload)
        torch.testing.assert_close(decoded[:2], x[:2].to(dtype), rtol=1e-7, atol=0)
        assert decoded[3].isnan().all()
    for numel in (3, 10, 77, 1000):  # sums of so many tenths are rounded
        tenths = torch.full((1, numel), 0.1, dtype=torch.float64)
        assert compressor.roundtrip(tenths, key(1)).bits_wire == 96
    one = compressor.roundtrip(torch.tensor([[7.5]]), key(1))
    assert (one.values.item(), one.bits_wire) == (7.5, 96)


def test_the_ideal_code_of_the_design_is_never_above_the_wire() -> None:
    """Most entries lie in a small cell: the model gives it fewer chances than all cells alike would have."""
    compressor, spikes = NQFL(64, entropy="fixed"), torch.zeros(1, 1000)
    spikes[0, :10] = 1.0
    rest = np.searchsorted(compressor.table.boundaries, -math.sqrt(10 / 990))
    assert 990 * symbol_bits(model_weights(compressor.table.pmf))[rest] > 6 * 1000
    payload = compressor.encode(spikes, key(1))
    assert payload.bits_ideal == payload.bits_wire == 6 * 1000 + 64


# ---------------------------------------------------------------- the parts


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), num_levels=st.sampled_from([2, 3, 8, 64, 256]), double=st.booleans())
def test_cells_are_those_of_a_binary_search(seed: int, num_levels: int, double: bool) -> None:
    rng = np.random.default_rng(seed)
    dtype = torch.float64 if double else torch.float32
    boundaries = np.unique(
        rng.normal(size=num_levels - 1) if seed % 2 else LloydMax(num_levels, "fixed").table.boundaries
    )
    finder = CellFinder(boundaries, dtype)
    on = finder.boundaries.numpy()
    z = np.concatenate(
        [rng.normal(size=500) * 2, on, np.nextafter(on, -9e9), np.nextafter(on, 9e9), [0, 1e30, -1e30, np.inf, -np.inf]]
    )
    z = z.astype(on.dtype)
    np.testing.assert_array_equal(finder(torch.from_numpy(z)).numpy(), np.searchsorted(on, z, side="left"))


def test_boundaries_too_close_for_a_table_are_searched() -> None:
    finder = CellFinder(np.array([-4.0, 0.0, 1e-7, 4.0]), torch.float32)
    z = torch.tensor([-5.0, -1.0, 5e-8, 1e-6, 9.0])
    assert finder(z).tolist() == [0, 1, 2, 3, 4]
    assert CellFinder(np.array([]), torch.float32)(z).tolist() == [0] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_standardize_is_numpys(dtype: torch.dtype) -> None:
    x = rows(5, 777, dtype=dtype) * 1e3 + 5
    z, scale = standardize(x)
    np.testing.assert_allclose(scale[:, 0], x.double().numpy().mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(scale[:, 1], x.double().numpy().std(axis=1), rtol=1e-6)
    np.testing.assert_allclose(z.mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(z.square().mean(1), 1, rtol=1e-5)


@pytest.mark.parametrize("factor", [1e-30, 1e-10, 1e10, 1e30])
def test_scale_does_not_matter(factor: float) -> None:
    x = rows(2, 400, dtype=torch.float64)
    for compressor in (RCFED(lam=0.1), RCFED(lam=0.1, design="uniform")):
        plain, scaled = compressor.roundtrip(x, key(2)), compressor.roundtrip(factor * x, key(2))
        torch.testing.assert_close(scaled.values / factor, plain.values, rtol=1e-6, atol=0)
        assert scaled.bits_wire == plain.bits_wire


def test_what_a_dtype_cannot_hold() -> None:
    half = torch.zeros(1, 100, dtype=torch.float16)
    half[0, :20] = 65_000.0  # at two standard deviations, in a cell whose level is 2.15: that would be 68,950
    values = LloydMax(8).roundtrip(half, key(1)).values
    assert values[0, :20].unique().tolist() == [65504]
    assert values.isfinite().all()
    beyond = torch.tensor([[1e200, -1e200, 0.0]], dtype=torch.float64)  # no float32 can say how far
    assert RCFED(lam=0.1).roundtrip(beyond, key(1)).values.isnan().all()


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10_000), numel=st.integers(1, 40), power=st.sampled_from([0, 1, 3, 9]))
def test_rows_contract_by_alpha(seed: int, numel: int, power: int) -> None:
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(1, numel)))
    x = x.sign() * x.abs() ** power
    for compressor in (
        RCFED(lam=0.05, entropy="fixed"),
        LloydMax(5, "fixed"),
        RCFED(target_rate=2.0, design="uniform", entropy="fixed"),
    ):
        alpha = compressor.alpha(numel)
        assert alpha is not None
        error = (compressor.roundtrip(x, key(1)).values - x).square().sum()
        assert error <= (1 - alpha) * x.square().sum() * (1 + 1e-5) + 1e-12 * x.square().sum()


def test_alpha_is_none_where_a_row_can_be_made_worse() -> None:
    assert LloydMax(4).alpha(10_000) is None
    spike = torch.zeros(1, 10_000)
    spike[0, 0] = 1.0
    error = (LloydMax(4).roundtrip(spike, key(1)).values - spike).square().sum()
    assert error > spike.square().sum()


# ---------------------------------------------------------------- refusals and settings


@pytest.mark.parametrize("entropy", ["ans", "huffman"])
def test_cut_and_foreign_payloads_are_refused(entropy: str) -> None:
    compressor = RCFED(lam=0.1, entropy=entropy)  # type: ignore[arg-type]
    payload = compressor.encode(rows(2, 300), key(2))

    def with_parts(**parts: torch.Tensor) -> None:
        compressor.decode(dataclasses.replace(payload, parts=payload.parts | parts))

    with pytest.raises(ValueError, match="do not fit into 2 rows"):
        with_parts(stream=payload.parts["stream"][:, :-8])
    with pytest.raises(ValueError, match="does not match 300 symbols"):
        with_parts(length=payload.parts["length"] - 4)
    with pytest.raises(ValueError, match="does not match 200 symbols"):
        compressor.decode(dataclasses.replace(payload, numel=200))
    with pytest.raises(ValueError, match="sends no stream"):
        with_parts(scale=torch.zeros(2, 2))
    with pytest.raises(ValueError, match="does not match 300 symbols"):
        with_parts(length=torch.zeros(2, 1, dtype=torch.int32))


def test_cut_and_foreign_fixed_codes_are_refused() -> None:
    compressor = LloydMax(5, entropy="fixed")
    payload = compressor.encode(rows(2, 300), key(2))
    with pytest.raises(ValueError, match="do not match 300 integers"):
        compressor.decode(
            dataclasses.replace(payload, parts=payload.parts | {"stream": payload.parts["stream"][:, 1:]})
        )
    foreign = pack_integers(torch.full((2, 300), 7), 3)
    with pytest.raises(ValueError, match="A code says 7, but the quantiser has 5 levels"):
        compressor.decode(dataclasses.replace(payload, parts=payload.parts | {"stream": foreign}))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RCFED(), "Give either `lam` or `target_rate`"),
        (lambda: RCFED(lam=0.1, target_rate=1.0), "Give either `lam` or `target_rate`"),
        (lambda: RCFED(lam=-1.0), "`lam` is a price"),
        (lambda: RCFED(lam=0.1, num_levels=1), "a quantiser needs 2 levels"),
        (lambda: RCFED(lam=0.1, num_levels=300), "a symbol is one byte"),
        (lambda: RCFED(lam=0.1, num_levels=2, design="uniform"), "needs 3 levels"),
        (lambda: RCFED(lam=0.1, design="best"), "`design` must be"),
        (lambda: RCFED(lam=0.1, entropy="zip"), "`entropy` must be"),
        (lambda: RCFED(target_rate=4.0, num_levels=4), "finest design with 4 levels"),
        (lambda: LloydMax(1), "a quantiser needs 2 levels"),
        (lambda: NQFL(4, mu=-2.0), "`mu` and `clip`"),
    ],
)
def test_settings_are_checked(build: Callable[[], ScalarQuantizer], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_without_constriction_the_other_codes_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install groundwire\[entropy\]"):
        RCFED(lam=0.1)
    for entropy in ("huffman", "fixed"):
        compressor = RCFED(lam=0.1, entropy=entropy)  # type: ignore[arg-type]
        x = rows(2, 100)
        assert torch.equal(compressor.decode(compressor.encode(x, key(2))), compressor.roundtrip(x, key(2)).values)


def test_built_from_a_configuration_copied_and_pickled() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(RCFED, "compressor")
    config = parser.parse_object(
        {
            "compressor": {
                "class_path": "groundwire.plugins.compression.rc_fed.RCFED",
                "init_args": {"target_rate": 2.5, "entropy": "huffman"},
            }
        }
    )
    compressor = parser.instantiate(config).compressor
    assert compressor.rate == pytest.approx(2.5, abs=1e-4)
    assert "2.500 bits, huffman" in repr(compressor)
    x = rows(2, 100)
    for other in (copy.deepcopy(compressor), pickle.loads(pickle.dumps(compressor))):
        assert torch.equal(other.roundtrip(x, key(2)).values, compressor.roundtrip(x, key(2)).values)
    assert not compressor.state_dict()


def test_representation_tells_designs_apart() -> None:
    """By it, ranks and checkpoints of other settings are found."""
    designs = [RCFED(lam=0.1), RCFED(lam=0.10001), RCFED(target_rate=2.0), RCFED(target_rate=1.99999)]
    designs += [LloydMax(4), LloydMax(4, entropy="huffman"), LloydMax(5)]
    assert len({repr(design) for design in designs}) == len(designs)
    plain = [ScalarQuantizer(design.table, entropy="fixed") for design in (LloydMax(4), NQFL(4))]
    assert repr(plain[0]) != repr(plain[1])
    assert repr(plain[0]) == repr(ScalarQuantizer(LloydMax(4).table, entropy="fixed"))


def test_lloyd_max_is_rc_fed_with_free_bits() -> None:
    x = rows(2, 100)
    free, published = RCFED(lam=0.0, num_levels=8), LloydMax(8)
    assert torch.equal(free.roundtrip(x, Key(seed=0, devices=(0, 1))).values, published.roundtrip(x, key(2)).values)
    assert RCFED(target_rate=2.0, num_levels=8).distortion > published.distortion
