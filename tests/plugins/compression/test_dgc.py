"""Deep Gradient Compression against NumPy and torch's SGD."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from groundwire.plugins.compression import DGC, ErrorFeedback, Sender, TopK
from groundwire.plugins.edge import Digital, EdgeStrategy
from groundwire.plugins.layout import ParameterLayout
from groundwire.plugins.random import Key
from helpers.compressors import rows
from helpers.edge import check_strategy_part

M, D = 3, 30
EVERYONE = (0, 1, 2)
GROUPS = [EVERYONE, (2, 0), (1,), EVERYONE, (2, 1, 0), (0,), EVERYONE, (1, 2), EVERYONE, (0, 2), EVERYONE, EVERYONE]


def key(devices: Sequence[int] = EVERYONE, round: int = 0) -> Key:
    return Key(seed=4, round=round, devices=tuple(devices))


def clipped(x: np.ndarray, clip_norm: float | None) -> np.ndarray:
    if clip_norm is None:
        return x
    norm = math.sqrt(sum(float(entry) ** 2 for entry in x))
    return x * min(1.0, clip_norm / math.sqrt(M) / norm) if norm else x


def dgc(
    memory: dict[str, Any], x: np.ndarray, k: int, momentum: float, nesterov: bool, clip_norm: float | None
) -> np.ndarray:
    """The paper's Algorithm 1 with momentum correction and masking, and its code's Nesterov."""
    u, v = memory.get("u", np.zeros_like(x)), memory.get("v", np.zeros_like(x))
    x = clipped(x, clip_norm)
    if nesterov:
        u = momentum * (u + x)
        v = v + u + x
    else:
        u = momentum * u + x
        v = v + u
    mask = np.zeros(len(x), dtype=bool)
    mask[np.argsort(-np.abs(v), kind="stable")[:k]] = True
    memory.update(u=np.where(mask, 0, u), v=np.where(mask, 0, v))
    return np.where(mask, v, 0)


@pytest.mark.parametrize("clip_norm", [None, 5.0])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_equals_numpy_over_rounds_in_which_some_take_part(
    momentum: float, nesterov: bool, clip_norm: float | None
) -> None:
    feedback = DGC(0.1, momentum, nesterov, clip_norm, num_devices=M)
    memories: list[dict[str, Any]] = [{} for _ in EVERYONE]
    for t, devices in enumerate(GROUPS):
        x = rows(len(devices), D, seed=t, dtype=torch.float64)
        values = feedback(x, key(devices, t)).values
        expected = [
            dgc(memories[m], row, 3, momentum, nesterov, clip_norm) for m, row in zip(devices, x.numpy(), strict=True)
        ]
        np.testing.assert_allclose(values, expected, rtol=1e-12, atol=1e-12)
        for found, name in ((feedback.velocities, "u"), (feedback.memory, "v")):
            np.testing.assert_allclose(
                found.residual(), [m.get(name, np.zeros(D)) for m in memories], rtol=1e-12, atol=1e-12
            )


def test_momentum_and_what_is_left_are_zero_where_something_was_sent_and_only_there() -> None:
    feedback = DGC(0.2, 0.9, num_devices=M)
    for t in range(5):
        sent = feedback(rows(M, D, seed=t), key(round=t)).values != 0
        assert bool((sent.sum(1) == 6).all())
        assert torch.equal(feedback.velocities.residual() == 0, sent)
        assert torch.equal(feedback.memory.residual() == 0, sent)


def test_without_momentum_it_is_classic_error_feedback_bit_for_bit() -> None:
    first, second = ErrorFeedback(TopK(density=0.1), M), DGC(0.1, momentum=0.0, num_devices=M)
    for t, devices in enumerate(GROUPS):
        x = rows(len(devices), D, seed=t)
        assert torch.equal(first(x, key(devices, t)).values, second(x, key(devices, t)).values)
    assert torch.equal(first.memory.residual(), second.memory.residual())


@pytest.mark.parametrize("nesterov", [False, True])
def test_where_all_is_sent_masking_leaves_no_momentum(nesterov: bool) -> None:
    """``u`` is zero at the start of each round: plain SGD, or ``1 + m`` times its step with Nesterov's rule."""
    feedback = DGC(1.0, momentum=0.5, nesterov=nesterov, num_devices=M)
    for t, devices in enumerate(GROUPS):
        x = rows(len(devices), D, seed=t)
        assert torch.equal(feedback(x, key(devices, t)).values, 1.5 * x if nesterov else x)
    assert not feedback.velocities.residual().any()
    assert not feedback.memory.residual().any()


def test_what_was_sent_and_what_is_left_is_the_sum_of_all_velocities() -> None:
    feedback, velocities, sent = DGC(0.1, 0.8, num_devices=M), torch.zeros(M, D), torch.zeros(M, D)
    for t in range(20):
        x = rows(M, D, seed=t)
        velocities += x + (0.8 * feedback.velocities.recall(x, EVERYONE) if t else 0)
        sent += feedback(x, key(round=t)).values
    torch.testing.assert_close(sent + feedback.memory.residual(), velocities, rtol=1e-5, atol=1e-3)


# ---------------------------------------------------------------- what is sent as it is


@pytest.mark.parametrize("nesterov", [False, True])
def test_plain_tensors_get_the_momentum_of_torchs_sgd(nesterov: bool) -> None:
    layout = ParameterLayout(("weight", "bias"), (torch.Size((4, 5)), torch.Size((6,))), (torch.float64,) * 2)
    feedback = DGC(0.1, 0.9, nesterov)
    sender = Sender(feedback, granularity="layer", min_numel=0)
    sender.setup(layout, M)
    weight = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    reference = torch.optim.SGD([weight], lr=0.1, momentum=0.9, nesterov=nesterov)
    ours = torch.zeros(6, dtype=torch.float64)
    alone = DGC(0.1, 0.9, nesterov, num_devices=M)
    for t in range(12):
        x = rows(M, 26, seed=t, dtype=torch.float64)
        weight.grad = x[:, 20:].mean(0)
        reference.step()
        message = sender(x, key(round=t))
        ours -= 0.1 * message.values[:, 20:].mean(0)
        torch.testing.assert_close(ours, weight.detach(), rtol=1e-12, atol=1e-12)
        assert torch.equal(message.values[:, :20], alone(x[:, :20].contiguous(), key(round=t), name="w").values)
        assert message.bits_wire == TopK(density=0.1).roundtrip(x[:, :20], key()).bits_wire + M * 6 * 64
    assert torch.equal(feedback.memory.residual("weight"), alone.memory.residual("w"))
    with pytest.raises(KeyError):
        feedback.memory.residual("bias")


def test_plain_tensors_are_remembered_of_those_who_sent_something_finite() -> None:
    feedback, without = DGC(0.1, 0.9, num_devices=M), DGC(0.1, 0.9, num_devices=M)
    for t, devices in enumerate(GROUPS):
        x = rows(len(devices), D, seed=t)
        for each in (feedback, without):
            each.plain(x, key(devices, t), "bias")
            each.keep_plain(x, key(devices, t), "bias")
        poisoned = torch.full((1, D), math.nan)
        assert feedback.plain(poisoned, key((1,)), "bias").isnan().all()
        feedback.keep_plain(poisoned, key((1,)), "bias")
        assert torch.equal(feedback.velocities.residual("bias"), without.velocities.residual("bias"))


def test_what_the_dtype_of_plain_rows_cannot_hold_leaves_the_velocity_as_it_is() -> None:
    """Of 60,000 a round, the second velocity is beyond float16: infinity is sent, and nothing arrives of it."""
    feedback, x = DGC(0.5, 0.9, num_devices=1), torch.tensor([[60000.0, 50000.0]], dtype=torch.float16)
    feedback.keep_plain(x, key((0,)), "update")
    before = feedback.velocities.residual().clone()
    assert feedback.plain(x, key((0,)), "update").isinf().any()
    feedback.keep_plain(x, key((0,)), "update")
    assert torch.equal(feedback.velocities.residual(), before)


# ---------------------------------------------------------------- clipping


def test_clipping_is_to_the_share_of_one_device_and_only_of_what_is_longer() -> None:
    feedback = DGC(1.0, momentum=0.0, clip_norm=6.0)
    feedback.setup(4, range(1, 3))  # a process that hosts two of four
    x = torch.tensor([[3.0, 4.0], [1.2, 1.6]])
    values = feedback(x, key((1, 2))).values
    torch.testing.assert_close(values, torch.tensor([[1.8, 2.4], [1.2, 1.6]]))
    assert torch.equal(values[1], x[1])
    assert torch.equal(feedback(torch.zeros(1, 2), key((1,), 1)).values, torch.zeros(1, 2))
    infinite = DGC(1.0, clip_norm=math.inf, num_devices=1)
    assert torch.equal(infinite(x[:1], key((0,))).values, x[:1])


def test_clipping_comes_before_momentum_and_of_each_layer_by_itself() -> None:
    layout = ParameterLayout(("a", "b"), (torch.Size((2, 2)), torch.Size((2, 2))), (torch.float32,) * 2)
    feedback = DGC(1.0, momentum=0.0, clip_norm=1.0)
    sender = Sender(feedback, granularity="layer", min_numel=0)
    sender.setup(layout, 1)
    values = sender(torch.tensor([[3.0, 0, 4, 0, 0.3, 0, 0.4, 0]]), key((0,))).values
    torch.testing.assert_close(values, torch.tensor([[0.6, 0, 0.8, 0, 0.3, 0, 0.4, 0]]))


@pytest.mark.parametrize(("value", "clip_norm"), [(1e30, 1.0), (1e30, 1e-3), (1e-30, 1e-32)])
def test_the_norm_of_huge_and_tiny_rows_is_right(value: float, clip_norm: float) -> None:
    feedback = DGC(1.0, momentum=0.0, clip_norm=clip_norm, num_devices=1)
    values = feedback(torch.full((1, 4), value), key((0,))).values
    torch.testing.assert_close(values, torch.full((1, 4), clip_norm / 2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_clipping_of_low_precision_rows_is_exact_to_float32(dtype: torch.dtype) -> None:
    feedback, x = DGC(0.1, momentum=0.0, clip_norm=1e-3, num_devices=1), rows(1, D, dtype=dtype)
    expected = x.double() * 1e-3 / x.double().norm()
    torch.testing.assert_close(feedback.correct(x, key((0,))).double(), expected, rtol=2e-6, atol=0)


def test_a_loaded_instance_clips_as_the_saved_one() -> None:
    first, second = DGC(1.0, 0.0, clip_norm=1.0, num_devices=4), DGC(1.0, 0.0, clip_norm=1.0)
    x, everyone = torch.ones(4, 9), key(range(4))
    first(x, everyone)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second(x, everyone).values.norm(dim=1).tolist() == pytest.approx([0.5] * 4)


# ---------------------------------------------------------------- warm-up


def test_warm_up_lasts_as_many_rounds_a_density_as_it_says() -> None:
    feedback = DGC(0.01, warmup_densities=(0.5, 0.2, 0.05), warmup_rounds=3, num_devices=1)
    counts, bits = [], []
    for t in range(12):
        message = feedback(rows(1, 200, seed=t), key((0,), t))
        counts.append(int((message.values != 0).sum()))
        bits.append(message.bits_wire)
    assert counts == [100] * 3 + [40] * 3 + [10] * 3 + [2] * 3
    expected = [TopK(k=k).roundtrip(rows(1, 200), key((0,))).bits_wire for k in counts]
    assert bits == expected


def test_without_rounds_there_is_no_warm_up_and_by_default_it_is_the_papers() -> None:
    x = rows(1, 4000)
    assert int((DGC(0.001, num_devices=1)(x, key((0,))).values != 0).sum()) == 4
    feedback = DGC(0.001, warmup_rounds=1, num_devices=1)
    counts = [int((feedback(x, key((0,), t)).values != 0).sum()) for t in range(6)]
    assert counts == [1000, 250, 62, 16, 4, 4], "25, 6.25, 1.5625 and 0.4 per cent, then 0.1"
    none = DGC(0.001, warmup_densities=(), warmup_rounds=5, num_devices=1)
    assert int((none(x, key((0,))).values != 0).sum()) == 4


def test_warm_up_follows_the_round_and_not_the_calls() -> None:
    feedback = DGC(0.01, warmup_densities=(0.5,), warmup_rounds=2, num_devices=1)
    x = rows(1, 200)
    counts = [int((feedback(x, key((0,), t)).values != 0).sum()) for t in (1, 2, 1)]
    assert counts == [100, 2, 100]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"momentum": 1.0}, r"`momentum` must be in \[0, 1\), got 1.0"),
        ({"momentum": -0.1}, r"`momentum` must be in \[0, 1\), got -0.1"),
        ({"momentum": math.nan}, r"`momentum` must be in \[0, 1\), got nan"),
        ({"clip_norm": 0.0}, "`clip_norm` must be > 0, got 0.0"),
        ({"clip_norm": math.nan}, "`clip_norm` must be > 0, got nan"),
        ({"warmup_rounds": -1}, "`warmup_rounds` must be at least 0, got -1"),
        ({"density": 0.0}, r"`density` must be in \(0, 1\], got 0.0"),
        ({"warmup_densities": [0.5, 1.5]}, r"must be in \(0, 1\], got 1.5"),
        ({"num_devices": 0}, "`num_devices` must be at least 1, got 0"),
    ],
)
def test_bad_input_by_message(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DGC(**arguments)


def test_in_training_it_resumes_bit_for_bit_and_at_full_density_it_is_plain() -> None:
    def build(devices: int = M, **options: Any) -> EdgeStrategy:
        uplink = Digital(DGC(momentum=0.9, **options), granularity="layer", min_numel=10)
        return EdgeStrategy(num_devices=devices, uplink=uplink)

    check_strategy_part(lambda: build(density=0.1, clip_norm=1.0, warmup_densities=[0.5], warmup_rounds=2))
    check_strategy_part(
        lambda: EdgeStrategy(num_devices=M, uplink=Digital(DGC(density=0.1, nesterov=True))),
        off=lambda: EdgeStrategy(num_devices=1, uplink=Digital(DGC(density=1.0, momentum=0.9))),
    )
