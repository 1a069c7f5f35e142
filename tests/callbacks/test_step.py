"""StepCallback and Tap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from groundwire.callbacks import StepCallback, Tap
from groundwire.plugins.edge import EdgeStrategy
from helpers.callbacks import check_step_callback
from helpers.edge import CLASSES, Classifier, fit, loader, mlp


class Penalty(StepCallback):
    """Adds the mean square of the logits, read through a tap, to the loss."""

    def __init__(self, weight: float = 0.1, submodule: str = "") -> None:
        self.weight, self.tap = weight, Tap(submodule)
        self.seen: list[tuple[int, ...]] = []

    def around_step(self, step: Any, batch: Any) -> Any:
        with self.tap.open(self.module) as calls:
            loss = step(batch)
        self.seen.append(tuple(calls[0].output.shape))
        return loss + self.weight * calls[0].output.square().mean()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.module = pl_module


class Noted(StepCallback):
    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def around_step(self, step: Any, batch: Any) -> Any:
        self.calls.append(f"{self.name} in")
        output = step(batch)
        self.calls.append(f"{self.name} out")
        return output


def test_shared_checks() -> None:
    check_step_callback(Penalty, off=lambda: Penalty(0.0))
    check_step_callback(lambda: Noted("a", []), changes=False)


def test_penalty_equals_a_module_with_the_term_written_in() -> None:
    class Written(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            logits = self(batch[0])
            return nn.functional.cross_entropy(logits, batch[1]) + 0.1 * logits.square().mean()

    by_hand, _, _ = fit("auto", Written(mlp()))
    for options in ({}, {"accumulate_grad_batches": 1, "precision": "64-true"}):
        reference = by_hand if not options else fit("auto", Written(mlp()), **options)[0]
        added, _, _ = fit("auto", Classifier(mlp()), callbacks=[Penalty()], **options)
        assert torch.equal(added, reference)
    tapped, _, _ = fit("auto", Classifier(mlp()), callbacks=[Penalty(submodule="network.2")])
    assert torch.equal(tapped, by_hand), "the last layer's output is the module's"


def test_callbacks_nest_in_the_trainers_order() -> None:
    calls: list[str] = []
    fit("auto", Classifier(mlp()), callbacks=[Noted("a", calls), Noted("b", calls)], steps=1)
    assert calls == ["a in", "b in", "b out", "a out"]


def test_a_step_may_run_several_times_on_other_batches() -> None:
    class Mixed(StepCallback):
        def around_step(self, step: Any, batch: Any) -> Any:
            x, y = batch
            return 0.5 * (step((x, y)) + step((-x, y)))

    class Doubled(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            loss = nn.functional.cross_entropy
            return 0.5 * (loss(self(x), y) + loss(self(-x), y))

    assert torch.equal(fit("auto", Classifier(mlp()), callbacks=[Mixed()])[0], fit("auto", Doubled(mlp()))[0])


def test_tap_inside_devices_sees_one_devices_outputs() -> None:
    penalty = Penalty()
    fit(EdgeStrategy(num_devices=4, vectorize=True), Classifier(mlp()), callbacks=[penalty], steps=1)
    assert penalty.seen == [(6, CLASSES)]


def test_tap_that_cannot_read_says_what_it_could() -> None:
    with pytest.raises(MisconfigurationException, match=r"no submodule 'head'; it has network, network\.0"):
        fit("auto", Classifier(mlp()), callbacks=[Penalty(submodule="head")], steps=1)

    class Bypasses(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    with pytest.raises(MisconfigurationException, match=r"Bypasses.forward was not called .* network\.2 \[24, 3\]"):
        fit("auto", Bypasses(mlp()), callbacks=[Penalty()], steps=1)
    fit("auto", Bypasses(mlp()), callbacks=[Penalty(submodule="network")], data=loader(), steps=1)
