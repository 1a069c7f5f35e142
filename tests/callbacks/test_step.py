"""StepCallback and Tap."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from groundwire.callbacks import StepCallback, Tap
from groundwire.callbacks.information import LabelSmoothing
from groundwire.callbacks.step import loss_of, with_loss
from groundwire.plugins.edge import DeviceBatch, EdgeStrategy, LocalSGD
from helpers.callbacks import (
    Evaluated,
    Notes,
    Outputs,
    Penalty,
    PenaltyWrittenIn,
    check_step_callback,
    keeping_ctrl_c,
    loader_of_dicts,
    returning_dicts,
    state_of,
    taking_dicts,
)
from helpers.edge import CLASSES, FEATURES, Classifier, Rounds, fit, generator, loader, mlp, trainer, weights

cross_entropy = nn.functional.cross_entropy


class Noted(StepCallback):
    """Records when it is entered and left."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def around_step(self, step: Any, batch: Any) -> Any:
        self.calls.append(f"{self.name} in")
        output = step(batch)
        self.calls.append(f"{self.name} out")
        return output


class Evaluation(Noted):
    """The same in validation and test; leaves the training step alone."""

    around_evaluation = Noted.around_step
    around_step = StepCallback.around_step


def test_shared_checks() -> None:
    check_step_callback(Penalty, off=lambda: Penalty(0.0))
    check_step_callback(lambda: Noted("a", []), changes=False)
    check_step_callback(Notes, changes=False, dict_batch=False)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"precision": "64-true"}])
def test_penalty_equals_a_module_with_the_term_written_in(options: dict[str, Any]) -> None:
    by_hand, _, losses = fit("auto", PenaltyWrittenIn(mlp()), **options)
    added, _, added_losses = fit("auto", Classifier(mlp()), callbacks=[Penalty()], **options)
    assert torch.equal(added, by_hand)
    assert added_losses == losses
    tapped, _, _ = fit("auto", Classifier(mlp()), callbacks=[Penalty(submodule="network.2")], **options)
    assert torch.equal(tapped, by_hand), "the last layer's output is the module's"
    of_dicts, _, _ = fit("auto", returning_dicts(Classifier(mlp())), callbacks=[Penalty()], **options)
    assert torch.equal(of_dicts, by_hand)


@pytest.mark.parametrize("vectorize", [True, False])
def test_penalty_on_devices_equals_a_module_with_the_term_written_in(vectorize: bool) -> None:
    strategies = [EdgeStrategy(num_devices=4, vectorize=vectorize) for _ in range(2)]
    by_hand, _, losses = fit(strategies[0], PenaltyWrittenIn(mlp()))
    added, _, added_losses = fit(strategies[1], Classifier(mlp()), callbacks=[Penalty()])
    assert torch.equal(added, by_hand)
    assert added_losses == losses


def test_penalty_reads_batches_that_are_dicts() -> None:
    by_hand, _, _ = fit("auto", PenaltyWrittenIn(mlp()))
    assert torch.equal(
        fit("auto", taking_dicts(Classifier(mlp())), loader_of_dicts(), callbacks=[Penalty()])[0], by_hand
    )


# ---------------------------------------------------------------- how steps are surrounded


def test_callbacks_nest_in_the_trainers_order() -> None:
    calls: list[str] = []
    fit("auto", Classifier(mlp()), callbacks=[Noted("a", calls), Noted("b", calls), Noted("c", calls)], steps=1)
    assert calls == ["a in", "b in", "c in", "c out", "b out", "a out"]


def test_callbacks_nest_in_the_trainers_order_in_evaluation() -> None:
    calls: list[str] = []
    trainer(callbacks=[Evaluation("a", calls), Evaluation("b", calls)]).validate(
        Evaluated(mlp()), loader(96), verbose=False
    )
    assert calls == ["a in", "b in", "b out", "a out"]


def test_callbacks_of_the_module_take_part() -> None:
    calls: list[str] = []

    class Own(StepCallback):  # of one class, Lightning would keep the module's only
        def around_step(self, step: Any, batch: Any) -> Any:
            return Noted("own", calls).around_step(step, batch)

    class Brings(Classifier):
        def configure_callbacks(self) -> Any:
            return [Own()]

    t = trainer(callbacks=[Noted("a", calls)], steps=1)
    t.fit(Brings(mlp()), loader())
    assert calls == ["a in", "own in", "own out", "a out"]


class Mixed(StepCallback):
    def around_step(self, step: Any, batch: Any) -> Any:
        x, y = batch
        return 0.5 * (step((x, y)) + step((-x, y)))


def test_a_step_may_run_several_times_on_other_batches() -> None:
    class Doubled(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            return 0.5 * (cross_entropy(self(x), y) + cross_entropy(self(-x), y))

    assert torch.equal(fit("auto", Classifier(mlp()), callbacks=[Mixed()])[0], fit("auto", Doubled(mlp()))[0])


def test_several_runs_within_an_outer_callback_pass_all_inner_ones() -> None:
    class Doubled(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            terms = [cross_entropy(z, y) + 0.1 * z.square().mean() for z in (self(x), self(-x))]
            return 0.5 * (terms[0] + terms[1])

    inner = Penalty()
    found, _, _ = fit("auto", Classifier(mlp()), callbacks=[Mixed(), inner])
    assert torch.equal(found, fit("auto", Doubled(mlp()))[0])
    assert len(inner.seen) == 12, "two runs in each of six steps"


def test_a_step_may_be_left_out() -> None:
    class Absent(StepCallback):
        def around_step(self, step: Any, batch: Any) -> Any:
            return None

    module = Classifier(mlp())
    before = module.network[0].weight.detach().clone()
    trainer(callbacks=[Absent(), Penalty()], steps=2).fit(module, loader())
    assert torch.equal(module.network[0].weight, before)


def test_a_step_that_skips_a_batch_skips_it() -> None:
    class Skips(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else loss

    class SkipsWrittenIn(Skips, PenaltyWrittenIn):
        pass

    def run(module: Any, *callbacks: Any) -> Any:
        t = trainer(callbacks=[*callbacks], steps=-1, max_epochs=2)
        t.fit(module, loader())
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    class NotesAll(Notes):
        def around_step(self, step: Any, batch: Any) -> Any:
            self.note(x=batch[0])
            return step(batch)

    notes = NotesAll()
    assert torch.equal(run(Skips(mlp()), Penalty(), notes), run(SkipsWrittenIn(mlp())))
    assert len(notes.back) == 8, "what was noted in a step that was skipped was noted, too"


def test_a_step_may_take_the_batch_alone() -> None:
    class Alone(Classifier):
        def training_step(self, batch: Any) -> Any:
            return super().training_step(batch, 0)

    assert torch.equal(
        fit("auto", Alone(mlp()), callbacks=[Penalty()])[0], fit("auto", Classifier(mlp()), callbacks=[Penalty()])[0]
    )


def test_a_validation_step_may_take_the_loaders_number() -> None:
    seen: list[int] = []

    class Two(Classifier):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            seen.append(dataloader_idx)

    calls: list[str] = []
    trainer(callbacks=[Evaluation("a", calls)]).validate(Two(mlp()), [loader(96), loader(48)], verbose=False)
    assert seen == [0, 1, 1]
    assert len(calls) == 6


@pytest.mark.parametrize("strategy", ["auto", "edge"])
def test_a_validation_step_that_calls_the_training_step_gets_what_that_returns(strategy: str) -> None:
    got: list[Any] = []

    class Shares(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            got.append(self.training_step(batch, batch_idx))

    penalty, notes = Penalty(), Notes()
    chosen = "auto" if strategy == "auto" else EdgeStrategy(num_devices=4)
    t = trainer(chosen, callbacks=[penalty, notes], steps=4)
    t.fit(Shares(mlp()), loader(), loader())
    assert len(got) == 2 + 4
    assert all(isinstance(loss, Tensor) for loss in got)
    assert len(notes.back) == 4
    assert strategy == "edge" or len(penalty.seen) == 4, "a validation step is no training step"


def test_steps_that_take_an_iterator_are_refused() -> None:
    class Iterates(Classifier):
        def training_step(self, dataloader_iter: Any) -> Any:
            (x, y), _, _ = next(dataloader_iter)
            return cross_entropy(self(x), y)

    class ValidatesOverAnIterator(Classifier):
        def validation_step(self, dataloader_iter: Any) -> None:
            next(dataloader_iter)

    message = r"Iterates\.training_step takes a `dataloader_iter`: Penalty needs to see the batch"
    module = Iterates(mlp())
    with pytest.raises(MisconfigurationException, match=message):
        trainer(callbacks=[Penalty()], steps=1).fit(module, loader())
    assert "training_step" not in module.__dict__
    with pytest.raises(MisconfigurationException, match=r"ValidatesOverAnIterator\.validation_step takes"):
        trainer(callbacks=[Evaluation("a", [])], steps=1).validate(ValidatesOverAnIterator(mlp()), loader())
    trainer(callbacks=[Evaluation("a", [])], steps=1).fit(Iterates(mlp()), loader())  # nobody surrounds that step


class Manual(Classifier):
    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


def test_manual_optimization_passes_through() -> None:
    class NotesInputs(Notes):
        def around_step(self, step: Any, batch: Any) -> Any:
            self.note(x=batch[0])
            return step(batch)

    calls: list[str] = []
    notes = NotesInputs()
    t = trainer(callbacks=[Noted("a", calls), notes])
    surrounded = Manual(mlp())
    t.fit(surrounded, loader())
    alone = Manual(mlp())
    trainer().fit(alone, loader())
    assert all(torch.equal(a, b) for a, b in zip(surrounded.parameters(), alone.parameters(), strict=True))
    assert len(calls) == 12
    assert len(notes.back) == 6, "such a step returns nothing, and still something was noted"


def test_a_loss_that_is_not_there_is_asked_for() -> None:
    class Wants(StepCallback):
        def around_step(self, step: Any, batch: Any) -> Any:
            return loss_of(step(batch))

    with pytest.raises(MisconfigurationException, match=r"got NoneType\. A callback that changes the loss needs auto"):
        trainer(callbacks=[Wants()], steps=1).fit(Manual(mlp()), loader())
    with pytest.raises(MisconfigurationException, match="got dict"):
        loss_of({"other": torch.zeros(())})


def test_with_loss_leaves_what_it_was_given() -> None:
    output = {"loss": torch.ones(()), "extra": 3}
    changed = with_loss(output, torch.zeros(()))
    assert changed["loss"] == 0
    assert changed["extra"] == 3
    assert output["loss"] == 1


# ---------------------------------------------------------------- evaluation


def test_evaluation_is_surrounded_within_fit() -> None:
    calls: list[str] = []
    t = trainer(callbacks=[Evaluation("a", calls)], steps=4, num_sanity_val_steps=2)
    t.fit(Evaluated(mlp()), loader(), loader())
    assert calls.count("a in") == calls.count("a out") == 2 + 4


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_evaluation_is_surrounded_on_its_own(verb: str) -> None:
    calls: list[str] = []
    module = Evaluated(mlp())
    plain = getattr(trainer(), verb)(module, loader(), verbose=False)
    before = state_of(module)
    t = trainer(callbacks=[Noted("training", calls), Evaluation("a", calls)])
    found = getattr(t, verb)(module, loader(), verbose=False)
    assert calls == ["a in", "a out"] * 4
    assert found == plain, "what the module logs is logged"
    assert state_of(module) == before


def test_evaluation_is_surrounded_in_an_edge_strategy() -> None:
    calls: list[str] = []
    t = trainer(EdgeStrategy(num_devices=4), callbacks=[Evaluation("a", calls)], steps=4, num_sanity_val_steps=0)
    t.fit(Evaluated(mlp()), loader(), loader())
    t.test(Evaluated(mlp()), loader(), verbose=False)
    assert len(calls) == 2 * (4 + 4)


def test_what_evaluation_returns_is_what_other_callbacks_see() -> None:
    class Replaces(StepCallback):
        def around_evaluation(self, step: Any, batch: Any) -> Any:
            return step(batch) * 0 + 7

    seen: list[float] = []

    class Sees(pl.Callback):
        def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any, **__: Any) -> None:
            seen.append(float(outputs))

    trainer(callbacks=[Replaces(), Sees()]).test(Evaluated(mlp()), loader(), verbose=False)
    assert seen == [7.0] * 4


def test_a_module_without_a_validation_step_is_not_given_one() -> None:
    class Looks(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.found = {name for name in pl_module.__dict__ if name.endswith("_step")}

    looks, module, calls = Looks(), Classifier(mlp()), []
    t = trainer(callbacks=[Evaluation("a", calls), Noted("b", []), looks], steps=1)
    t.fit(module, loader(), loader())  # Lightning skips validation without a step
    assert looks.found == {"training_step"}
    assert not calls


def test_a_callback_that_leaves_a_step_alone_does_not_surround_it() -> None:
    class Looks(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.found = {name for name in pl_module.__dict__ if name.endswith("_step")}

    for callback, expected in ((Evaluation("a", []), {"validation_step"}), (Noted("a", []), {"training_step"})):
        looks = Looks()
        trainer(callbacks=[callback, looks], steps=1).fit(Evaluated(mlp()), loader(), loader())
        assert looks.found == expected


# ---------------------------------------------------------------- nothing is left behind


class Breaks(pl.Callback):
    """Raises an error in a hook."""

    def __init__(self, hook: str, error: BaseException) -> None:
        setattr(self, hook, self.fail)
        self.error = error

    def fail(self, *args: Any, **kwargs: Any) -> None:
        raise self.error


class BreaksInside(Evaluated):
    def __init__(self, network: nn.Module, where: str, error: BaseException | None) -> None:
        super().__init__(network)
        self.where, self.error = where, error

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.where == "step" and batch_idx == 1 and self.error:
            raise self.error
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        if self.where == "validation" and self.error:
            raise self.error
        return super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("strategy", ["auto", "loop", "vectorized"])
@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("nowhere", None),
        *[
            (where, error)
            for where in ("setup", "step", "validation", "on_fit_start", "on_train_batch_end")
            for error in (ValueError("stop here"), KeyboardInterrupt())
        ],
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value,
)
def test_module_and_strategy_are_left_as_they_were(strategy: str, where: str, error: BaseException | None) -> None:
    chosen = "auto" if strategy == "auto" else EdgeStrategy(num_devices=4, vectorize=strategy == "vectorized")
    module = BreaksInside(mlp(), where, error)
    breaks = [] if error is None or where in ("step", "validation") else [Breaks(where, error)]
    ours = [Penalty(), Notes(), Evaluation("a", [])]
    t = trainer(chosen, callbacks=[*ours, *breaks], steps=3, num_sanity_val_steps=0, val_check_interval=2)
    before, before_strategy = state_of(module), set(t.strategy.__dict__)
    if error is None:
        t.fit(module, loader(), loader())
    else:
        with keeping_ctrl_c(), pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else type(error)):
            t.fit(module, loader(), loader())
    after = state_of(module)
    assert after["steps"] == before["steps"] == {}
    assert after["hooks"] == before["hooks"]
    assert "training_step" not in set(t.strategy.__dict__) - before_strategy
    assert all(callback._noted is None for callback in ours), "no tensor of a run outlives it"


@pytest.mark.parametrize("error", [None, ValueError("stop here"), KeyboardInterrupt()], ids=["none", "error", "ctrl_c"])
def test_a_training_step_that_was_an_instance_attribute_is_put_back(error: BaseException | None) -> None:
    module = Classifier(mlp())
    own = module.training_step
    runs: list[int] = []

    def replaced(batch: Any, batch_idx: int) -> Any:
        runs.append(batch_idx)
        return own(batch, batch_idx)

    module.training_step = replaced  # type: ignore[method-assign]
    calls: list[str] = []
    breaks = [] if error is None else [Breaks("on_train_batch_end", error)]
    t = trainer(callbacks=[Noted("a", calls), *breaks], steps=3)
    if error is None:
        t.fit(module, loader())
    else:
        with keeping_ctrl_c(), pytest.raises((SystemExit, ValueError)):
            t.fit(module, loader())
    assert module.__dict__["training_step"] is replaced
    assert calls == ["a in", "a out"] * len(runs)
    assert runs == ([0, 1, 2] if error is None else [0])


def test_fit_and_test_with_one_trainer_and_two_fits() -> None:
    train, evaluation = [], []
    module = Evaluated(mlp())
    before = state_of(module)["hooks"]
    t = trainer(callbacks=[Noted("a", train), Evaluation("b", evaluation), Penalty()], steps=2)
    for times in (1, 2):
        t.fit(module, loader())
        t.test(module, loader(), verbose=False)
        assert len(train) == 4 * times
        assert len(evaluation) == 8 * times
        assert state_of(module)["steps"] == {}
        assert state_of(module)["hooks"] == before
        t.fit_loop.epoch_loop.max_steps += 2
    other = Classifier(mlp())
    t.fit_loop.epoch_loop.max_steps += 2
    t.fit(other, loader())
    assert state_of(other)["steps"] == {}


def test_a_run_after_one_that_failed_works() -> None:
    class FailsOnce(Classifier):
        failed = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if not self.failed:
                self.failed = True
                raise ValueError("once")
            return loss

    module, penalty = FailsOnce(mlp()), Penalty()
    with pytest.raises(ValueError, match="once"):
        trainer(callbacks=[penalty], steps=6).fit(module, loader())
    trainer(callbacks=[penalty], steps=6).fit(module, loader())
    by_hand, _, _ = fit("auto", PenaltyWrittenIn(mlp()))
    assert torch.equal(torch.cat([p.detach().flatten().double() for p in module.parameters()]), by_hand)


# ---------------------------------------------------------------- notes


def rows_of(data: Any, steps: int) -> list[Tensor]:
    batches = list(data)
    return [batches[i % len(batches)][0] for i in range(steps)]


def test_what_is_noted_comes_back_after_each_step() -> None:
    notes = Notes()
    _, _, losses = fit("auto", Classifier(mlp()), callbacks=[notes], steps=6)
    assert notes.at == [1, 2, 3, 4, 5, 6], "after the optimizer's step"
    for back, x, loss in zip(notes.back, rows_of(loader(), 6), losses, strict=True):
        assert torch.equal(back["x"], x)
        assert torch.equal(back["total"], x.sum(1))
        assert back["loss"].tolist() == [loss], "a scalar is one row"
        assert not any(tensor.requires_grad for tensor in back.values())


@pytest.mark.parametrize("strategy", ["auto", "loop", "vectorized"])
def test_notes_are_let_go_once_they_came_back(strategy: str) -> None:
    class LetGo(Notes):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            assert len(self.back) == 4
            assert self._noted is None

    chosen = "auto" if strategy == "auto" else EdgeStrategy(num_devices=4, vectorize=strategy == "vectorized")
    fit(chosen, Classifier(mlp()), callbacks=[LetGo()], steps=4)


def test_notes_come_back_after_each_micro_batch() -> None:
    notes = Notes()
    fit("auto", Classifier(mlp()), callbacks=[notes], steps=2, accumulate_grad_batches=2)
    assert notes.at == [0, 1, 1, 2]
    assert torch.equal(torch.cat([n["x"] for n in notes.back]), torch.cat(rows_of(loader(), 4)))


def test_notes_of_several_callbacks_and_runs_do_not_mix() -> None:
    first, second = Notes(runs=2), Notes()
    fit("auto", Classifier(mlp()), callbacks=[first, second], steps=2)
    for one, other, x in zip(first.back, second.back, rows_of(loader(), 2), strict=True):
        assert torch.equal(one["x"], torch.cat([x, -x]))
        assert torch.equal(other["x"], torch.cat([x, -x])), "the inner one ran twice, too"
        assert len(one["loss"]) == len(other["loss"]) == 2


@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize("of_dicts", [False, True], ids=["loss", "dict"])
def test_notes_of_all_devices_come_back_together(runs: int, of_dicts: bool) -> None:
    module = returning_dicts(Classifier(mlp())) if of_dicts else Classifier(mlp())
    back = {}
    for vectorize in (True, False):
        notes = Notes(runs)
        fit(EdgeStrategy(num_devices=4, vectorize=vectorize), module, callbacks=[notes], steps=3)
        assert len(notes.back) == 3
        back[vectorize] = notes.back
    for together, loop, x in zip(back[True], back[False], rows_of(loader(), 3), strict=True):
        signs = [1, -1][:runs]
        expected = torch.cat([sign * device for device in x.chunk(4) for sign in signs])
        for found in (together, loop):
            assert torch.equal(found["x"], expected), "device by device"
            torch.testing.assert_close(found["total"], expected.sum(1))
            assert found["loss"].shape == (4 * runs,)
        torch.testing.assert_close(together["loss"], loop["loss"])


def ragged(*lengths: int) -> tuple[Rounds, list[Tensor]]:
    """Rounds of devices that hold different numbers of samples, and each device's inputs."""
    g = generator(5)
    counts = torch.tensor(lengths)
    x = torch.randn(len(lengths), max(lengths), FEATURES, generator=g)
    y = torch.randint(0, CLASSES, (len(lengths), max(lengths)), generator=g)
    batch = DeviceBatch(data=(x, y), device_ids=torch.arange(len(lengths)), num_samples=counts, lengths=counts)
    return Rounds(batch, batch), [x[m, :n] for m, n in enumerate(lengths)]


@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize("of_dicts", [False, True], ids=["loss", "dict"])
def test_notes_of_devices_with_different_numbers_of_samples(runs: int, of_dicts: bool) -> None:
    module = returning_dicts(Classifier(mlp())) if of_dicts else Classifier(mlp())
    data, inputs = ragged(3, 5, 1)
    notes, before, after, without = Notes(runs), Outputs(), Outputs(), Outputs()
    fit(EdgeStrategy(num_devices=3), module, data, callbacks=[without], steps=2)
    fit(EdgeStrategy(num_devices=3), module, data, callbacks=[before, notes, after], steps=2)
    signs = [1, -1][:runs]
    for back in notes.back:
        assert torch.equal(back["x"], torch.cat([sign * x for x in inputs for sign in signs]))
        assert back["loss"].shape == (3 * runs,)
    for seen in (before.seen, after.seen):
        assert [set(outputs) for outputs in seen] == [set(outputs) for outputs in without.seen]
        for outputs, expected in zip(seen, without.seen, strict=True):
            for device, other in zip(outputs.get("devices", []), expected.get("devices", []), strict=True):
                assert set(device) == set(other) == {"extra"}
                assert torch.equal(device["extra"].abs(), other["extra"].abs())


@pytest.mark.parametrize("vectorize", [True, False])
def test_notes_of_several_local_steps_are_those_of_the_last(vectorize: bool) -> None:
    notes = Notes()
    strategy = EdgeStrategy(num_devices=2, local=LocalSGD(lr=0.1, num_steps=3), vectorize=vectorize)
    fit(strategy, Classifier(mlp()), callbacks=[notes], steps=1)
    x = rows_of(loader(), 1)[0]
    assert torch.equal(notes.back[0]["x"], torch.cat([x[8:12], x[20:24]])), "as the extras that a step returns"


def test_extras_of_one_shape_stay_stacked_where_notes_are_not() -> None:
    class Means(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": super().training_step(batch, batch_idx), "mean": batch[0].mean()}

    data, inputs = ragged(3, 5, 1)
    outputs = Outputs()
    fit(EdgeStrategy(num_devices=3), Means(mlp()), data, callbacks=[outputs, Notes()], steps=2)
    for seen in outputs.seen:
        assert set(seen) == {"loss", "mean"}, "as without the notes"
        torch.testing.assert_close(seen["mean"], torch.stack([x.mean() for x in inputs]))


def test_notes_of_some_devices_only() -> None:
    class Positive(Notes):
        def around_step(self, step: Any, batch: Any) -> Any:
            if float(batch[0].sum()) > 0:  # in a loop over the devices that is allowed
                self.note(x=batch[0])
            return step(batch)

    x = torch.ones(3, 2, FEATURES) * torch.tensor([-1.0, 1.0, 2.0])[:, None, None]
    y = torch.zeros(3, 2, dtype=torch.long)
    batch = DeviceBatch(data=(x, y), device_ids=torch.arange(3), num_samples=torch.full((3,), 2))
    notes = Positive()
    fit(EdgeStrategy(num_devices=3, vectorize=False), Classifier(mlp()), Rounds(batch), callbacks=[notes], steps=1)
    assert torch.equal(notes.back[0]["x"], x[1:].flatten(0, 1))


@pytest.mark.parametrize("strategy", ["auto", "loop", "vectorized"])
def test_no_note_is_seen_by_other_callbacks(strategy: str) -> None:
    for module in (Classifier(mlp()), returning_dicts(Classifier(mlp()))):
        chosen = "auto" if strategy == "auto" else EdgeStrategy(num_devices=4, vectorize=strategy == "vectorized")
        first, between, last = Outputs(), Outputs(), Outputs()
        fit(chosen, module, callbacks=[first, Notes(), between, Notes(), last], steps=2)
        expected = {"loss"} if type(module) is Classifier else {"loss", "extra"}
        for outputs in (first, between, last):
            assert [set(seen) for seen in outputs.seen] == [expected] * 2


def test_the_modules_own_hook_sees_no_note() -> None:
    class Looks(Classifier):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert set(outputs) == {"loss"}

    fit("auto", Looks(mlp()), callbacks=[Notes()], steps=2)
    fit(EdgeStrategy(num_devices=4), Looks(mlp()), callbacks=[Notes()], steps=2)


def test_nothing_noted_is_no_call() -> None:
    class Silent(Notes):
        def around_step(self, step: Any, batch: Any) -> Any:
            return step(batch)

    for strategy in ("auto", EdgeStrategy(num_devices=4, vectorize=True), EdgeStrategy(num_devices=4, vectorize=False)):
        silent = Silent()
        silent.note(x=torch.zeros(2))  # outside of a step: nobody waits for it
        fit(strategy, Classifier(mlp()), callbacks=[silent], steps=2)
        assert silent.back == []


# ---------------------------------------------------------------- Tap


def test_tap_inside_devices_sees_one_devices_outputs() -> None:
    penalty = Penalty()
    fit(EdgeStrategy(num_devices=4, vectorize=True), Classifier(mlp()), callbacks=[penalty], steps=1)
    assert penalty.seen == [(6, CLASSES)]


def test_tap_collects_several_forwards_in_order() -> None:
    module, tap = Classifier(mlp()), Tap()
    x = torch.randn(4, FEATURES, generator=generator())
    with tap.open(module) as calls:
        outputs = [module(x), module(-x), module(2 * x)]
    assert [call.inputs[0][0, 0] for call in calls] == [x[0, 0], -x[0, 0], 2 * x[0, 0]]
    assert all(call.output is output for call, output in zip(calls, outputs, strict=True))
    assert calls[2].output.requires_grad


def test_tap_that_cannot_read_says_what_it_could() -> None:
    with pytest.raises(MisconfigurationException, match=r"no submodule 'head'; it has network, network\.0"):
        fit("auto", Classifier(mlp()), callbacks=[Penalty(submodule="head")], steps=1)

    class Bypasses(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return cross_entropy(self.network(batch[0]), batch[1])

    with pytest.raises(
        MisconfigurationException,
        match=r"Bypasses.forward was not called .*`self\(x\)` does not.* "
        r"network\.0 \[24, 16\], network\.1 \[24, 16\], network\.2 \[24, 3\], network \[24, 3\]\.",
    ):
        fit("auto", Bypasses(mlp()), callbacks=[Penalty()], steps=1)
    fit("auto", Bypasses(mlp()), callbacks=[Penalty(submodule="network")], data=loader(), steps=1)


def test_tap_names_only_outputs_that_have_rows_and_columns() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.images, self.flat, self.rows, self.never = nn.Identity(), nn.Flatten(), nn.Linear(4, 2), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.rows(self.flat(self.images(x)))

    net = Net()
    with (
        pytest.raises(
            MisconfigurationException,
            match=r"'never' was not called .* Called with .* were: flat \[3, 4\], rows \[3, 2\]\.$",
        ),
        Tap("never").open(net),
    ):
        net(torch.zeros(3, 1, 2, 2))
    assert not any(sub._forward_hooks for sub in net.modules())
    with (
        pytest.raises(MisconfigurationException, match=r"It has images, flat, rows, never\.$"),
        Tap("never").open(net),
    ):
        pass


def test_tap_that_falls_silent_says_so() -> None:
    module, tap = Classifier(mlp()), Tap()
    with tap.open(module):
        module(torch.zeros(2, FEATURES))
    with pytest.raises(MisconfigurationException, match=r"forward was not called .* It has network"), tap.open(module):
        pass
    assert not module._forward_hooks


@pytest.mark.parametrize("error", [ValueError("stop here"), KeyboardInterrupt()])
def test_tap_lets_go_after_an_error(error: BaseException) -> None:
    module, tap = Classifier(mlp()), Tap("network.0")
    with pytest.raises(type(error)), tap.open(module) as calls:  # noqa: PT012  the error comes after a call
        module(torch.zeros(2, FEATURES))
        assert len(calls) == 1
        raise error
    assert calls == [], "no graph outlives it"
    assert not any(sub._forward_hooks for sub in module.modules())


def test_another_trainer_that_uses_the_module_meanwhile_neither_loses_nor_takes_its_callbacks() -> None:
    class Counts(StepCallback):
        def __init__(self) -> None:
            self.steps = self.evaluations = 0

        def around_step(self, step: Any, batch: Any) -> Any:
            self.steps += 1
            return step(batch)

        def around_evaluation(self, step: Any, batch: Any) -> Any:
            self.evaluations += 1
            return step(batch)

    inner = Counts()

    class Validates(pl.Callback):
        def on_train_batch_end(self, outer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            another = trainer(callbacks=[inner])
            another.validate(pl_module, loader(), verbose=False)
            pl_module.trainer = outer

    class Validated(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

    module, counts = Validated(mlp()), Counts()
    trainer(callbacks=[counts, Validates()], steps=3).fit(module, loader())
    assert (counts.steps, counts.evaluations) == (3, 0)
    assert (inner.steps, inner.evaluations) == (0, 3 * len(loader()))
    assert not {"training_step", "validation_step"} & set(module.__dict__)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_made_during_fit_has_steps_of_its_own(duplicate: Any) -> None:
    class Copies(pl.Callback):
        def on_train_batch_end(self, t: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            attached, pl_module._trainer = pl_module._trainer, None  # a Trainer is not what is to be copied
            self.copy = duplicate(pl_module)
            pl_module._trainer = attached

    copies = Copies()
    fit("auto", Classifier(mlp()), callbacks=[Penalty(), copies], steps=1)
    with torch.no_grad():
        for parameter in copies.copy.parameters():
            parameter.zero_()
    copies.copy.log = lambda *args, **kwargs: None
    loss = copies.copy.training_step(next(iter(loader())), 0)
    assert float(loss) == pytest.approx(math.log(CLASSES)), "its own weights, without the penalty"


def test_a_step_that_skips_before_any_forward_is_no_error() -> None:
    class Skips(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    both = [Skips(mlp()), Skips(mlp())]
    for module, callbacks in zip(both, ([], [LabelSmoothing(0.0)]), strict=True):
        trainer(callbacks=callbacks, steps=3).fit(module, loader())
    torch.testing.assert_close(weights(both[0]), weights(both[1]), rtol=1e-5, atol=1e-6)
