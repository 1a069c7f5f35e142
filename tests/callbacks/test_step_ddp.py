"""StepCallback and Tap in two processes; and the helper that runs them."""

from __future__ import annotations

import os
import time
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from groundwire.callbacks import StepCallback
from helpers.callbacks import Evaluated, Notes, Outputs, Penalty, PenaltyWrittenIn, state_of
from helpers.ddp import RankError, ddp_trainer, fit_ddp, over_ranks, run_ddp
from helpers.edge import CLASSES, Classifier, fit, generator, loader, mlp

cross_entropy = nn.functional.cross_entropy


class ReturnsDict(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "extra": batch[0].sum(1)}


# ---------------------------------------------------------------- the penalty, against one process on joined batches


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=["each", "accumulated"])
def test_penalty_on_two_ranks_equals_one_process_on_the_joined_batches(options: dict[str, Any]) -> None:
    options = options | {"precision": "64-true"}
    one, _, losses = fit("auto", Classifier(mlp()), callbacks=[Penalty()], **options)
    written, _, _ = fit("auto", PenaltyWrittenIn(mlp()), **options)
    plain, _, _ = fit("auto", Classifier(mlp()), **options)
    ranks = fit_ddp(build=Penalty, read=_shapes, **options)
    for rank in ranks:
        torch.testing.assert_close(rank.weights, one, rtol=0, atol=1e-10)
        torch.testing.assert_close(rank.weights, written, rtol=0, atol=1e-10)
        assert (rank.weights - plain).abs().max() > 1e-4, "the penalty must have taken hold"
        assert rank.read == [(12, CLASSES)] * 6 * options.get("accumulate_grad_batches", 1), "one rank's share"
    assert torch.equal(ranks[0].weights, ranks[1].weights)
    joined = [(a + b) / 2 for a, b in zip(ranks[0].losses, ranks[1].losses, strict=True)]
    assert joined == pytest.approx(losses, abs=1e-10), "with the penalty, as the other callbacks see it"
    assert ranks[0].losses != ranks[1].losses


def _shapes(trainer: Any, module: Any, callbacks: Any) -> Any:
    return callbacks[0].seen


def test_tap_on_a_submodule_under_ddp() -> None:
    one, _, _ = fit("auto", Classifier(mlp()), callbacks=[Penalty()], precision="64-true")
    ranks = fit_ddp(ReturnsDict(mlp()), build=partial(Penalty, 0.1, "network.2"), precision="64-true")
    for rank in ranks:
        torch.testing.assert_close(rank.weights, one, rtol=0, atol=1e-10)


# ---------------------------------------------------------------- notes


def notes_and_outputs() -> list[Any]:
    return [Outputs(), Notes(runs=2), Outputs()]


def _notes(trainer: Any, module: Any, callbacks: Any) -> Any:
    before, notes, after = callbacks
    return notes.back, [sorted(o) for o in before.seen + after.seen]


@pytest.mark.parametrize("unused", [False, True], ids=["all_used", "find_unused"])
@pytest.mark.parametrize("of_dicts", [False, True], ids=["loss", "dict"])
def test_notes_are_each_ranks_own(unused: bool, of_dicts: bool) -> None:
    module = ReturnsDict(mlp()) if of_dicts else Classifier(mlp())
    strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=unused)
    ranks = fit_ddp(module, build=notes_and_outputs, read=_notes, steps=3, strategy=strategy)
    batches = [x for x, _ in loader()]
    for rank in ranks:
        back, outputs = rank.read
        assert len(back) == 3
        for notes, x in zip(back, batches, strict=False):
            share = x[rank.rank :: 2]
            assert torch.equal(notes["x"], torch.cat([share, -share]))
            torch.testing.assert_close(notes["total"], notes["x"].sum(1))
            assert notes["loss"].shape == (2,)
            assert not any(tensor.requires_grad for tensor in notes.values())
        assert outputs == [["extra", "loss"] if of_dicts else ["loss"]] * 6


# ---------------------------------------------------------------- evaluation, and what is left


class Surrounds(StepCallback):
    """Counts steps, and the samples of evaluation steps."""

    def __init__(self) -> None:
        self.steps, self.samples = 0, 0

    def around_step(self, step: Any, batch: Any) -> Any:
        self.steps += 1
        return step(batch)

    def around_evaluation(self, step: Any, batch: Any) -> Any:
        self.samples += len(batch[0])
        return step(batch)


def evaluate_on_rank() -> dict[str, Any]:
    module, callback = Evaluated(mlp()), Surrounds()
    pristine = state_of(module)
    found: dict[str, Any] = {"samples": [], "same": []}
    t = ddp_trainer(callbacks=[callback, Penalty(), Notes()], steps=4, num_sanity_val_steps=0)
    t.fit(module, over_ranks(loader(batch_size=12)), loader(batch_size=12))
    found["steps"] = callback.steps
    for run in (None, t.validate, t.test):
        if run is not None:
            found["loss"] = run(module, loader(batch_size=12), verbose=False)[0]["val/loss"]
        found["samples"].append(callback.samples)
        after = state_of(module)
        found["same"].append((after["hooks"] == pristine["hooks"], after["steps"] == pristine["steps"]))
    return found


def test_evaluation_is_surrounded_on_each_rank_and_the_module_left_as_it_was() -> None:
    for rank in run_ddp(evaluate_on_rank):
        assert rank["steps"] == 4
        assert rank["samples"] == [48, 96, 144], "half of the samples each"
        assert rank["same"] == [(True, True)] * 3
        assert rank["loss"] > 0


class FailsOnRankOne(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 1 and self.global_rank == 1:
            raise ValueError("rank one has had enough")
        return loss


def fail_on_rank() -> Any:
    """Rank 1 fails by itself, rank 0 because gloo has lost its partner."""
    module = FailsOnRankOne(mlp())
    pristine = state_of(module)
    with pytest.raises((ValueError, RuntimeError), match=r"had enough|gloo|[Cc]losed|[Rr]eset"):
        ddp_trainer(callbacks=[Penalty(), Notes()], steps=4).fit(module, over_ranks(loader(batch_size=12)))
    after = state_of(module)
    return after["steps"] == pristine["steps"], after["hooks"] == pristine["hooks"]


def test_module_is_left_as_it_was_on_each_rank_where_one_fails() -> None:
    assert run_ddp(fail_on_rank) == [(True, True), (True, True)]


# ---------------------------------------------------------------- the helper itself


def whoami(base: int, x: torch.Tensor) -> Any:
    dist.init_process_group("gloo")
    total = x * (dist.get_rank() + 1)
    dist.all_reduce(total)
    return base + dist.get_rank(), total


def test_run_ddp_returns_what_each_rank_returned() -> None:
    x = torch.randn(3, generator=generator())
    for world_size in (1, 2, 3):
        ranks = run_ddp(whoami, 10, x, world_size=world_size)
        assert [number for number, _ in ranks] == [10 + rank for rank in range(world_size)]
        for _, total in ranks:
            torch.testing.assert_close(total, x * sum(range(1, world_size + 1)))


def raise_on_rank_one(error: BaseException) -> None:
    if os.environ["RANK"] == "1":
        raise error
    time.sleep(60)


class Odd(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__("cannot be pickled")


def raise_odd() -> None:
    raise Odd(1, 2)


def die(code: int) -> None:
    os._exit(code)


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def test_run_ddp_raises_what_a_rank_raised() -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match="unhappy") as caught:
        run_ddp(raise_on_rank_one, ValueError("unhappy"))
    assert time.monotonic() - started < 15, "the other rank, which waits, is not waited for"
    assert isinstance(caught.value.__cause__, RankError)
    assert "On rank 1:\nTraceback" in str(caught.value.__cause__)
    assert "raise_on_rank_one" in str(caught.value.__cause__)
    with pytest.raises(RankError, match="KeyboardInterrupt"):
        run_ddp(raise_on_rank_one, KeyboardInterrupt())
    with pytest.raises(RankError, match="cannot be pickled"):
        run_ddp(raise_odd)


def test_run_ddp_does_not_wait_for_ranks_that_die_or_hang() -> None:
    with pytest.raises(RankError, match="Rank 0 died with exit code 3"):
        run_ddp(die, 3, world_size=1)
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] of 2 did not finish within 1 s"):
        run_ddp(sleep, 60.0, timeout_s=1)
