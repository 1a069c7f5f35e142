"""Sender: what is compressed by itself, what is sent as it is, and what that costs."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from groundwire.plugins.compression import (
    DGC,
    EF21,
    QSGD,
    Compressor,
    EControl,
    ErrorFeedback,
    Feedback,
    Identity,
    Message,
    Payload,
    RandK,
    Sender,
    SignSGD,
    TopK,
)
from groundwire.plugins.edge import Digital, EdgeStrategy
from groundwire.plugins.layout import ParameterLayout
from groundwire.plugins.random import Key
from helpers.compressors import rows
from helpers.edge import Classifier, check_strategy_part, fit, mlp

M = 3
SHAPES = {
    "first.weight": (8, 6),
    "first.bias": (8,),
    "scale": (),
    "kernel": (2, 3, 3, 3),
    "small": (2, 3),
    "head.weight": (5, 8),
    "head.bias": (5,),
}
LAYOUT = ParameterLayout(
    names=tuple(SHAPES),
    shapes=tuple(torch.Size(shape) for shape in SHAPES.values()),
    dtypes=(torch.float32,) * len(SHAPES),
)
MATRICES = ("first.weight", "kernel", "head.weight")
"""Of two dimensions or more, and ten entries or more."""
PLAIN = 8 + 1 + 6 + 5
SLICES: dict[str, slice] = {}
_start = 0
for _name, _shape in SHAPES.items():
    SLICES[_name] = slice(_start, _start + math.prod(_shape))
    _start += math.prod(_shape)

COMPRESSORS: dict[str, Callable[[], Compressor]] = {
    "topk": lambda: TopK(density=0.2),
    "topk_count": lambda: TopK(k=3),
    "randk": lambda: RandK(density=0.3),
    "qsgd": lambda: QSGD(num_levels=3),
    "qsgd_entries": lambda: QSGD(num_levels=2, num_entries=7),
    "sign": lambda: SignSGD(scaled=True),
}
FEEDBACKS: dict[str, Callable[[], Feedback]] = {
    "ef": lambda: ErrorFeedback(TopK(density=0.2)),
    "ef_randk": lambda: ErrorFeedback(RandK(density=0.3, unbiased=False)),
    "ef21": lambda: EF21(QSGD(num_levels=3, num_entries=9)),
    "econtrol": lambda: EControl(SignSGD(scaled=True)),
}
every_compressor = pytest.mark.parametrize("compressor", COMPRESSORS)
every_part = pytest.mark.parametrize("part", COMPRESSORS | FEEDBACKS)


def build(part: str) -> Any:
    return (COMPRESSORS | FEEDBACKS)[part]()


def key(round: int = 0, devices: Sequence[int] = (0, 1, 2), name: str = "") -> Key:
    return Key(seed=6, round=round, devices=tuple(devices), name=name)


def layered(part: Compressor | Feedback, **options: Any) -> Sender:
    sender = Sender(part, granularity="layer", **{"min_numel": 10} | options)
    sender.setup(LAYOUT, M)
    return sender


# ---------------------------------------------------------------- layer by layer


@every_part
def test_each_layer_is_compressed_as_if_it_were_alone_and_the_rest_is_sent_as_it_is(part: str) -> None:
    sender, alone = layered(build(part)), {name: build(part) for name in MATRICES}
    for each in alone.values():
        if isinstance(each, Feedback):
            each.setup(M)
    for t, devices in enumerate([(0, 1, 2), (2, 0), (0, 1, 2), (1,), (0, 1, 2)]):
        x = rows(len(devices), LAYOUT.numel, seed=t)
        before, message = x.clone(), sender(x, key(t, devices))
        wire, ideal = 32 * PLAIN * len(devices), 32.0 * PLAIN * len(devices)
        for name, where in SLICES.items():
            if name not in alone:
                assert torch.equal(message.values[:, where], x[:, where])
                continue
            each = alone[name]
            send = each if isinstance(each, Feedback) else each.roundtrip
            expected = send(x[:, where].clone(), key(t, devices, name))
            assert torch.equal(message.values[:, where], expected.values)
            wire, ideal = wire + expected.bits_wire, ideal + expected.bits_ideal
        assert message.bits_wire == wire
        assert message.bits_ideal == pytest.approx(ideal, rel=1e-12)
        assert torch.equal(x, before)
        assert message.values.dtype == x.dtype
    if sender.feedback is not None:
        for name, each in alone.items():
            assert torch.equal(sender.feedback.memory.residual(name), each.memory.residual())
        for name in set(SHAPES) - set(MATRICES):
            with pytest.raises(KeyError):
                sender.feedback.memory.residual(name)


def test_layers_of_one_shape_draw_their_own_random_numbers() -> None:
    layout = ParameterLayout(("a", "b"), (torch.Size((6, 6)),) * 2, (torch.float32,) * 2)
    for compressor in (RandK(density=0.5), QSGD(num_levels=2)):
        sender = Sender(compressor, granularity="layer", min_numel=0)
        sender.setup(layout, 1)
        half = rows(1, 36)
        first, second = sender(torch.cat([half, half], dim=1), key(devices=(0,))).values.chunk(2, dim=1)
        assert not torch.equal(first, second)


def test_what_is_small_or_flat_is_sent_as_it_is() -> None:
    def compressed(**options: Any) -> list[str]:
        return [segment.name for segment in layered(TopK(k=1), **options).segments if not segment.is_plain]

    assert compressed(min_numel=0) == ["first.weight", "kernel", "small", "head.weight"]
    assert compressed(min_numel=6) == ["first.weight", "kernel", "small", "head.weight"]
    assert compressed(min_numel=7) == ["first.weight", "kernel", "head.weight"]
    assert compressed(min_numel=48) == ["first.weight", "kernel"]
    assert compressed(min_numel=54) == ["kernel"]
    for segment in layered(TopK(k=1)).segments:
        assert segment.entries == SLICES[segment.name]
        assert segment.shape == SHAPES[segment.name]


def test_what_would_not_become_smaller_is_sent_as_it_is() -> None:
    class OnlyTall(TopK):
        """Worth it for tall matrices."""

        def is_worthwhile(self, shape: torch.Size) -> bool:
            return shape[0] > shape[1]

    for part in (OnlyTall(k=1), ErrorFeedback(OnlyTall(k=1))):
        sender = layered(part)
        assert [segment.name for segment in sender.segments if not segment.is_plain] == ["first.weight"]
        values = sender(torch.ones(M, LAYOUT.numel), key()).values
        assert bool((values.sum(1) == LAYOUT.numel - 48 + 1).all())


@pytest.mark.parametrize("given", ["compressor", "feedback"])
def test_the_compressor_is_told_the_shapes_that_will_come(given: str) -> None:
    class Told(TopK):
        """Remembers its set-up."""

        shapes: Any = None
        resets = 0

        def setup(self, shapes: Any) -> None:
            self.shapes = dict(shapes)

        def reset_state(self) -> None:
            self.resets += 1

    told = Told(k=1)
    part: Any = told if given == "compressor" else ErrorFeedback(told)
    layered(part)
    assert told.shapes == {name: torch.Size(SHAPES[name]) for name in MATRICES}
    Sender(part).setup(LAYOUT, M)
    assert told.shapes == {"": torch.Size((LAYOUT.numel,))}
    assert told.resets == 2


@pytest.mark.parametrize("part", [TopK(k=2), ErrorFeedback(TopK(k=2), 3)], ids=["compressor", "feedback"])
def test_where_nothing_would_be_compressed_it_refuses(part: Compressor | Feedback) -> None:
    sender = Sender(part, granularity="layer")
    with pytest.raises(MisconfigurationException, match=r"TopK.*would compress no parameter.*min_numel=1024.*Lower"):
        sender.setup(LAYOUT, M)
    Sender(part).setup(LAYOUT, M)  # as one vector it would be
    flat = ParameterLayout(("a", "b"), (torch.Size((5000,)), torch.Size(())), (torch.float32,) * 2)
    with pytest.raises(MisconfigurationException, match="fewer than two dimensions"):
        Sender(part, granularity="layer", min_numel=0).setup(flat, M)


def test_set_up_for_layers_it_wants_updates_of_that_layout() -> None:
    """Entries that nobody sends must not vanish without a word."""
    for granularity in ("layer", "model"):
        sender = Sender(TopK(k=1), granularity=granularity, min_numel=10)  # type: ignore[arg-type]
        sender.setup(LAYOUT, M)
        for numel in (LAYOUT.numel - 1, LAYOUT.numel + 1):
            with pytest.raises((ValueError, RuntimeError), match=str(numel)):
                sender(rows(M, numel), key())


def test_without_a_layout_there_are_no_layers() -> None:
    with pytest.raises((ValueError, RuntimeError), match="setup"):
        Sender(TopK(k=1), granularity="layer")(rows(M, 20), key())


# ---------------------------------------------------------------- as one vector


@every_part
@pytest.mark.parametrize("is_set_up", [True, False])
def test_as_one_vector_it_is_the_bare_part(part: str, is_set_up: bool) -> None:
    bare, inside = build(part), build(part)
    for each in (bare, inside):
        if isinstance(each, Feedback):
            each.setup(M)
    sender = Sender(inside)
    if is_set_up:
        sender.setup(LAYOUT, M)
    for t in range(4):
        x = rows(M, LAYOUT.numel, seed=t)
        expected = bare(x, key(t)) if isinstance(bare, Feedback) else bare.roundtrip(x, key(t))
        message = sender(x, key(t))
        assert torch.equal(message.values, expected.values)
        assert (message.bits_wire, message.bits_ideal) == (expected.bits_wire, expected.bits_ideal)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@every_part
def test_bits_are_those_of_the_rows_dtype(part: str, dtype: torch.dtype) -> None:
    sender, x = layered(build(part)), rows(M, LAYOUT.numel, dtype=dtype)
    message = sender(x, key())
    assert message.values.dtype == dtype
    size = 8 * x.element_size()
    compressor = build(part)
    compressor = compressor.compressor if isinstance(compressor, Feedback) else compressor
    parts = [compressor.roundtrip(x[:, SLICES[name]], key(name=name)).bits_wire for name in MATRICES]
    assert message.bits_wire == sum(parts) + M * PLAIN * size


@every_compressor
def test_nothing_is_lost_of_a_row_that_is_not_finite(compressor: str) -> None:
    sender, x = layered(build(compressor)), rows(M, LAYOUT.numel)
    clean = sender(x, key()).values
    for name, where in SLICES.items():
        poisoned = x.clone()
        poisoned[1, where.start] = math.nan
        values = sender(poisoned, key()).values
        assert not torch.isfinite(values[1, where]).all(), name
        assert torch.equal(values[[0, 2]], clean[[0, 2]])
        others = torch.ones(LAYOUT.numel, dtype=torch.bool)
        others[where] = False
        assert torch.equal(values[1, others], clean[1, others]), "one layer's NaN is its own"


# ---------------------------------------------------------------- the beginning


@every_part
@pytest.mark.parametrize("granularity", ["layer", "model"])
def test_while_it_warms_up_all_is_sent_as_it_is_and_nothing_remembered(part: str, granularity: Any) -> None:
    def sender(warmup: int) -> Sender:
        made = Sender(build(part), granularity=granularity, min_numel=10, warmup_rounds=warmup)
        made.setup(LAYOUT, M)
        return made

    warming, cold = sender(3), sender(0)
    for t in range(6):
        x = rows(M, LAYOUT.numel, seed=t)
        message = warming(x, key(t))
        assert warming.is_warming_up(t) == (t < 3)
        if t < 3:
            assert torch.equal(message.values, x)
            assert message.bits_wire == message.bits_ideal == 32 * x.numel()
            assert warming.feedback is None or not warming.feedback.memory.state_dict()["_extra_state"]["residuals"]
        else:
            expected = cold(x, key(t))
            assert torch.equal(message.values, expected.values)
            assert message.bits_wire == expected.bits_wire


def test_momentum_on_the_devices_starts_after_the_beginning_too() -> None:
    warming, cold = layered(DGC(0.2, 0.9), warmup_rounds=2), layered(DGC(0.2, 0.9))
    for t in range(5):
        x = rows(M, LAYOUT.numel, seed=t)
        message = warming(x, key(t))
        assert torch.equal(message.values, x if t < 2 else cold(x, key(t)).values)


# ---------------------------------------------------------------- state


@every_part
def test_saved_and_loaded_in_the_middle_it_goes_on_bit_for_bit(part: str) -> None:
    first, second = layered(build(part)), layered(build(part))
    for t in range(3):
        first(rows(M, LAYOUT.numel, seed=t), key(t))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    for t in range(3, 6):
        x = rows(M, LAYOUT.numel, seed=t)
        assert torch.equal(first(x, key(t)).values, second(x, key(t)).values)


@every_part
def test_set_up_again_it_starts_anew_and_for_another_model(part: str) -> None:
    sender = layered(build(part))
    first = [sender(rows(M, LAYOUT.numel, seed=t), key(t)).values for t in range(3)]
    other = ParameterLayout(("first.weight",), (torch.Size((9, 9)),), (torch.float32,))
    sender.setup(other, 2)
    assert sender(rows(2, 81), key(devices=(0, 1))).values.shape == (2, 81)
    sender.setup(LAYOUT, M)
    again = [sender(rows(M, LAYOUT.numel, seed=t), key(t)).values for t in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("granularity", ["layer", "model"])
@every_part
def test_devices_may_be_spread_over_processes(part: str, granularity: Any) -> None:
    def sender(hosted: range | None) -> Sender:
        made = Sender(build(part), granularity=granularity, min_numel=10)
        made.setup(LAYOUT, M, hosted)
        return made

    together, hosts = sender(None), {range(2): sender(range(2)), range(2, 3): sender(range(2, 3))}
    for t in range(4):
        x = rows(M, LAYOUT.numel, seed=t)
        message = together(x, key(t))
        each = [made(x[list(hosted)], key(t, hosted)) for hosted, made in hosts.items()]
        assert torch.equal(torch.cat([one.values for one in each]), message.values)
        assert sum(one.bits_wire for one in each) == message.bits_wire


# ---------------------------------------------------------------- compressors that ask and decide


class Deciding(Compressor):
    """Top-k of a ``k`` that device 0 chooses each third round: how many entries were above 1 since the last time."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.seen = 2, 0

    def encode(self, x: Tensor, key: Key) -> Payload:
        self.seen += int((x[key.devices.index(0)].abs() > 1).sum()) if 0 in key.devices else 0
        return TopK(k=self.k).encode(x, key)

    def decode(self, payload: Payload) -> Tensor:
        return TopK(k=self.k).decode(payload)

    def reset_state(self) -> None:
        self.k, self.seen = 2, 0

    def decides(self, round: int) -> bool:
        return round % 3 == 2

    def decide(self) -> Tensor:
        seen, self.seen = self.seen, 0
        return torch.tensor([1 + seen % 5, 0], dtype=torch.int16)

    def adopt(self, decision: Tensor) -> None:
        assert decision.dtype == torch.int16
        self.k = int(decision[0])


@pytest.mark.parametrize("with_feedback", [False, True])
@pytest.mark.parametrize("granularity", ["layer", "model"])
def test_device_0_decides_before_the_round_and_telling_the_others_costs_bits(
    granularity: Any, with_feedback: bool
) -> None:
    part: Any = ErrorFeedback(Deciding()) if with_feedback else Deciding()
    sender = Sender(part, granularity=granularity, min_numel=10, warmup_rounds=3)
    sender.setup(LAYOUT, M)
    names = MATRICES if granularity == "layer" else ("",)
    memory = ErrorFeedback(TopK(k=1), M)
    k, seen = 2, 0
    for t in range(12):
        x = rows(M, LAYOUT.numel, seed=t)
        message = sender(x, key(t))
        if t < 3:
            assert torch.equal(message.values, x), "while it warms up nobody decides"
            assert message.bits_wire == 32 * x.numel()
            continue
        if t % 3 == 2:
            k, seen = 1 + seen % 5, 0
        bits = 32 * (2 * 16 // 32) * (t % 3 == 2) + (32 * M * PLAIN if granularity == "layer" else 0)
        for name in names:
            where = SLICES[name] if name else slice(None)
            own = x[:, where].contiguous()
            corrected = memory.correct(own, key(t), name) if with_feedback else own
            seen += int((corrected[0].abs() > 1).sum())
            expected = memory(own, key(t), name=name, compressor=TopK(k=k))
            expected = expected if with_feedback else TopK(k=k).roundtrip(own, key(t))
            assert torch.equal(message.values[:, where], expected.values)
            bits += expected.bits_wire
        assert message.bits_wire == bits
        assert sender.compressor.k == k


class SharedScale(Compressor):
    """Int8 on a grid that all devices have to agree on: the sum of their largest entries."""

    negotiates = True

    def propose(self, x: Tensor, key: Key) -> Tensor:
        return x.abs().amax(1, keepdim=True)

    def encode(self, x: Tensor, key: Key) -> Payload:
        return self.encode_agreed(x, key, self.propose(x, key).sum(0))

    def encode_agreed(self, x: Tensor, key: Key, agreed: Tensor) -> Payload:
        codes = (x * (127 / agreed)).round().to(torch.int8)
        return Payload(
            parts={"codes": codes}, numel=x.shape[1], dtype=x.dtype, bits_ideal=8.0 * x.numel(), meta={"scale": agreed}
        )

    def decode(self, payload: Payload) -> Tensor:
        return payload.parts["codes"].to(payload.dtype) * payload.meta["scale"] / 127


@pytest.mark.parametrize("with_feedback", [False, True])
def test_what_devices_agree_on_is_agreed_on_layer_by_layer(with_feedback: bool) -> None:
    """Against devices that each propose, hear the sum, and encode for themselves."""
    sender = layered(ErrorFeedback(SharedScale()) if with_feedback else SharedScale())
    memory, compressor = ErrorFeedback(SharedScale(), M), SharedScale()
    for t in range(4):
        x = rows(M, LAYOUT.numel, seed=t)
        message = sender(x, key(t))
        for name in MATRICES:
            own = [x[m : m + 1, SLICES[name]] for m in range(M)]
            wanted = [memory.correct(own[m], key(t, (m,)), name) if with_feedback else own[m] for m in range(M)]
            agreed = torch.cat([compressor.propose(wanted[m], key(t, (m,), name)) for m in range(M)]).sum(0)
            for m in range(M):
                sent = compressor.decode(compressor.encode_agreed(wanted[m], key(t, (m,), name), agreed))
                torch.testing.assert_close(message.values[m : m + 1, SLICES[name]], sent)
                memory.keep(own[m], wanted[m], message.values[m : m + 1, SLICES[name]], key(t, (m,)), name)
        assert message.bits_wire == M * (8 * (48 + 54 + 40) + 32 * PLAIN)


# ---------------------------------------------------------------- arguments


def test_it_says_what_it_was_given() -> None:
    compressor = TopK(k=1)
    feedback = ErrorFeedback(compressor)
    assert (Sender(compressor).compressor, Sender(compressor).feedback) == (compressor, None)
    assert (Sender(feedback).compressor, Sender(feedback).feedback) == (compressor, feedback)
    warm = DGC(0.01, warmup_densities=[0.5], warmup_rounds=2)
    densities = [Sender(warm).at(t).density for t in range(4)]  # type: ignore[union-attr]
    assert densities == [0.5, 0.5, 0.01, 0.01]
    assert Sender(compressor).at(3) is compressor


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "bucket"}, "`granularity` must be 'model' or 'layer', got 'bucket'"),
        ({"min_numel": -1}, "`min_numel` must be at least 0, got -1"),
        ({"warmup_rounds": -1}, "`warmup_rounds` must be at least 0, got -1"),
    ],
)
def test_bad_input_by_message(options: dict[str, Any], message: str) -> None:
    for make in (Sender, Digital):
        with pytest.raises(ValueError, match=message):
            make(TopK(k=1), **options)


# ---------------------------------------------------------------- in training


def strategy(part: Any, devices: int = M, **options: Any) -> EdgeStrategy:
    return EdgeStrategy(num_devices=devices, uplink=Digital(part, **options), seed=3)


def test_in_training_it_resumes_bit_for_bit_and_with_all_entries_it_is_plain() -> None:
    check_strategy_part(
        lambda: strategy(ErrorFeedback(QSGD(num_levels=2, num_entries=20)), granularity="layer", min_numel=10),
        off=lambda: strategy(TopK(density=1.0), devices=1, granularity="layer", min_numel=0),
    )


@pytest.mark.parametrize("granularity", ["layer", "model"])
def test_a_run_that_warms_up_to_its_end_is_uncompressed(granularity: Any) -> None:
    plain, t, _ = fit(strategy(Identity()))
    warm, other, _ = fit(strategy(EF21(TopK(k=1)), granularity=granularity, min_numel=10, warmup_rounds=6))
    assert torch.equal(plain, warm)
    assert t.strategy.ledger.totals["uplink/bits"] == other.strategy.ledger.totals["uplink/bits"]


def test_a_model_without_matrices_is_refused_before_the_first_batch() -> None:
    with pytest.raises(MisconfigurationException, match="would compress no parameter"):
        fit(strategy(TopK(k=1), granularity="layer"), Classifier(mlp()))


def test_a_message_of_several_segments_is_a_message() -> None:
    message = layered(TopK(k=1))(rows(M, LAYOUT.numel), key())
    assert isinstance(message, Message)
    assert message.values.shape == (M, LAYOUT.numel)
    assert message.bits_ideal <= message.bits_wire
