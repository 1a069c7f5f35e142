"""Error memory: what was not sent is never lost, and never another device's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from groundwire.plugins.compression import QSGD, DDSGDQuantizer, ErrorFeedback, ErrorMemory, Identity, TopK
from groundwire.plugins.random import Key
from helpers.compressors import rows

COMPRESSORS = [TopK(k=3), DDSGDQuantizer(3), QSGD(num_levels=2), Identity()]


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=lambda c: type(c).__name__)
def test_sent_plus_residual_is_the_sum_of_inputs(compressor: TopK) -> None:
    feedback = ErrorFeedback(compressor, num_devices=4)
    total, sent = torch.zeros(4, 30), torch.zeros(4, 30)
    groups = [(0, 1, 2, 3), (2, 0), (1,), (3, 1, 0), (0, 1, 2, 3)]
    for t, devices in enumerate(groups):
        x = rows(len(devices), 30, seed=t)
        message = feedback(x, Key(seed=0, round=t, devices=devices))
        total[list(devices)] += x
        sent[list(devices)] += message.values
    torch.testing.assert_close(sent + feedback.memory.residual(), total, rtol=1e-4, atol=1e-4)
    if isinstance(compressor, Identity):
        assert not feedback.memory.residual().any()


def test_what_is_beyond_half_precision_is_sent_later() -> None:
    feedback = ErrorFeedback(TopK(k=1), num_devices=1)
    total = torch.zeros(1, 4)
    for t in range(9):
        x = torch.full((1, 4), 6e4 if t < 3 else 0.0, dtype=torch.float16)  # the residual soon passes 65,504
        total += feedback(x, Key(seed=0, round=t, devices=(0,))).values
    assert (total + feedback.memory.residual()).tolist() == [[18e4] * 4]
    assert total.sum() > 5e5


def test_only_the_named_devices_change() -> None:
    feedback = ErrorFeedback(TopK(k=1), num_devices=3)
    feedback(rows(3, 5), Key(seed=0, devices=(0, 1, 2)))
    before = feedback.memory.residual().clone()
    feedback(rows(1, 5, seed=1), Key(seed=0, round=1, devices=(1,)))
    after = feedback.memory.residual()
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.equal(before[1], after[1])


def test_names_have_residuals_of_their_own() -> None:
    feedback = ErrorFeedback(TopK(k=1), num_devices=1)
    feedback(torch.tensor([[3.0, 2.0]]), Key(seed=0), name="a")
    feedback(torch.tensor([[5.0, 4.0, 1.0]]), Key(seed=0), name="b")
    assert feedback.memory.residual("a").tolist() == [[0, 2]]
    assert feedback.memory.residual("b").tolist() == [[0, 4, 1]]


def test_hold_keeps_everything_and_costs_nothing() -> None:
    feedback = ErrorFeedback(TopK(k=1), num_devices=2)
    x = rows(2, 6)
    message = feedback.hold(x, Key(seed=0, devices=(0, 1)))
    assert not message.values.any()
    assert (message.bits_wire, message.bits_ideal) == (0, 0.0)
    assert torch.equal(feedback.memory.residual(), x)


def test_another_resolution_for_one_round() -> None:
    feedback = ErrorFeedback(TopK(k=1), num_devices=1)
    message = feedback(torch.tensor([[3.0, 2.0, 1.0]]), Key(seed=0), compressor=TopK(k=2))
    assert message.values.tolist() == [[3, 2, 0]]
    assert feedback.memory.residual().tolist() == [[0, 0, 1]]


def test_a_nonfinite_row_leaves_its_residual_alone_and_is_passed_on() -> None:
    feedback = ErrorFeedback(TopK(k=1), num_devices=2)
    feedback(torch.tensor([[3.0, 2.0], [3.0, 2.0]]), Key(seed=0, devices=(0, 1)))
    message = feedback(torch.tensor([[float("nan"), 1.0], [1.0, 0.0]]), Key(seed=0, round=1, devices=(0, 1)))
    assert message.values[0].isnan().any()
    assert feedback.memory.residual().tolist() == [[0, 2], [1, 0]]


def test_low_precision_rows_are_remembered_in_float32() -> None:
    feedback = ErrorFeedback(TopK(k=1), num_devices=1)
    x = torch.full((1, 3), 1e-3, dtype=torch.bfloat16)
    total = torch.zeros(1, 3)
    for t in range(300):
        message = feedback(x, Key(seed=0, round=t))
        assert message.values.dtype == torch.bfloat16
        total += message.values.float()
    assert feedback.memory.residual().dtype == torch.float32
    assert abs(float(total.sum()) / float(300 * x.float().sum()) - 1) < 0.02


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_nothing_is_lost_to_the_dtype_and_bits_are_those_of_the_rows(dtype: torch.dtype) -> None:
    feedback = ErrorFeedback(TopK(k=2), num_devices=1)
    x = (100 * torch.randn(1, 50, generator=torch.Generator().manual_seed(0))).round().to(dtype)  # sums are exact
    sent = torch.zeros(1, 50, dtype=torch.float64)
    for t in range(100):
        message = feedback(x, Key(seed=0, round=t))
        sent += message.values.double()
        assert message.bits_wire == TopK(k=2).roundtrip(x, Key(seed=0)).bits_wire
    assert torch.equal(sent + feedback.memory.residual().double(), 100 * x.double())


def test_a_wider_memory_does_not_widen_the_wire() -> None:
    feedback, x = ErrorFeedback(TopK(k=2), num_devices=1), rows(1, 50)
    bits = feedback(x, Key(seed=0)).bits_wire
    feedback.to(torch.float64)
    message = feedback(x, Key(seed=0, round=1))
    assert (message.bits_wire, message.values.dtype) == (bits, torch.float32)


def test_state_goes_into_an_instance_that_was_not_set_up() -> None:
    first, second = ErrorFeedback(TopK(k=2), num_devices=3), ErrorFeedback(TopK(k=2))
    first(rows(3, 8), Key(seed=0, devices=(0, 1, 2)))
    second.load_state_dict(first.state_dict())
    assert second.memory.num_devices == 3
    assert torch.equal(first.memory.residual(), second.memory.residual())


def test_a_nonfinite_row_among_some_devices_leaves_its_residual_alone() -> None:
    memory = ErrorMemory(3)
    memory.keep(torch.ones(3, 2), devices=(0, 1, 2))
    memory.keep(torch.tensor([[5.0, 6.0], [float("inf"), 1.0]]), devices=(2, 0))
    assert memory.residual().tolist() == [[1, 1], [1, 1], [5, 6]]
    memory.keep(torch.tensor([[7.0, 8.0], [3.0, 4.0]]), devices=(2, 0))
    assert memory.residual().tolist() == [[3, 4], [1, 1], [7, 8]]


def test_state_goes_into_a_fresh_instance_and_on() -> None:
    first = ErrorFeedback(TopK(k=2), num_devices=3)
    first(rows(3, 8), Key(seed=0, devices=(0, 1, 2)))
    state = copy.deepcopy(first.state_dict())
    second = ErrorFeedback(TopK(k=2), num_devices=3)
    second.load_state_dict(state)
    key = Key(seed=0, round=1, devices=(2, 0))
    assert torch.equal(first(rows(2, 8, seed=1), key).values, second(rows(2, 8, seed=1), key).values)
    assert not torch.equal(state["memory._extra_state"]["residuals"]["update"], first.memory.residual())
    assert first.memory.to(torch.float64).residual().dtype == torch.float64
    second.memory.reset_state()
    with pytest.raises(KeyError):
        second.memory.residual()


def test_bad_input_by_message() -> None:
    memory = ErrorMemory()
    with pytest.raises(RuntimeError, match=r"call setup\(num_devices\)"):
        memory.correct(torch.zeros(1, 2), devices=(0,))
    with pytest.raises(ValueError, match="`num_devices` must be at least 1, got 0"):
        memory.setup(0)
    memory.setup(2)
    memory.keep(torch.zeros(1, 2), devices=(0,))
    with pytest.raises(
        RuntimeError, match=r"'update': the residual has 2 entries, but rows of 3 came; call reset_state"
    ):
        memory.correct(torch.zeros(1, 3), devices=(0,))
    with pytest.raises(RuntimeError, match="residuals of 2 devices and cannot serve 3"):
        memory.setup(3)
    with pytest.raises(RuntimeError, match="is of 2 devices, this one of 5"):
        ErrorMemory(5).load_state_dict(memory.state_dict())


def test_finite_rows_are_remembered_whatever_they_sum_to() -> None:
    memory = ErrorMemory(2)
    large = torch.full((2, 4), 3e38)
    memory.keep(large, devices=(0, 1))
    assert torch.equal(memory.residual(), large)
    half = ErrorMemory(1)
    half.keep(torch.full((1, 1000), 100.0, dtype=torch.float16), devices=(0,))
    assert float(half.residual().sum()) == 100_000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_low_precision_keeps_its_residuals_in_float32(dtype: torch.dtype) -> None:
    memory = ErrorMemory(1)
    memory.keep(torch.full((1, 2), 1 + 2**-20), devices=(0,))
    assert memory.to(dtype).residual().tolist() == [[1 + 2**-20] * 2]


def test_device_ids_that_do_not_fit_are_refused_and_nothing_changes() -> None:
    memory = ErrorMemory(3)
    memory.keep(torch.ones(3, 1), devices=(0, 1, 2))
    for devices, message in (
        ((1, 1), "may come once"),
        ((-1, 0), r"in \[0, 3\)"),
        ((0, 3), "got 0 to 3"),
        ((1,), "2 rows"),
    ):
        for work in (memory.correct, memory.keep):
            with pytest.raises(ValueError, match=message):
                work(torch.zeros(2, 1), devices)
    assert memory.residual().tolist() == [[1], [1], [1]]


# ---------------------------------------------------------------- why it is there


VECTORS = torch.tensor([[-3.0, 2, 2], [2, -3, 2], [2, 2, -3]], dtype=torch.float64)


def gradients(x: Tensor) -> Tensor:
    """Of ``<a_i, x>^2 + |x|^2 / 4`` for three devices."""
    return 2 * (VECTORS @ x)[:, None] * VECTORS + x / 2


def test_plain_top_1_diverges_on_the_counter_example_and_error_feedback_converges() -> None:
    key = Key(seed=0, devices=(0, 1, 2))
    x = torch.ones(3, dtype=torch.float64)
    norms = []
    for _ in range(1000):
        norms.append(float(gradients(x).mean(0).norm()))
        x = x - 1e-3 * TopK(k=1).roundtrip(gradients(x), key).values.mean(0)
    growth = (norms[-1] / norms[0]) ** (1 / 999)
    assert growth == pytest.approx(1 + 11e-3 / 6, rel=1e-6), "the mean of the three top-1 gradients is -(11/6) x"
    feedback, x = ErrorFeedback(TopK(k=1), num_devices=3), torch.ones(3, dtype=torch.float64)
    for _ in range(6000):
        x = x - feedback(0.00586 * gradients(x), key).values.mean(0)
    assert float(gradients(x).mean(0).norm()) < 1e-12
