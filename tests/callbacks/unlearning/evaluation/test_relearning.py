from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundwire.callbacks.unlearning.evaluation import RelearningCurve, relearning_curve
from helpers.callbacks import state_of


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4))


def records(number: int = 30, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(number, 6, generator=g), torch.randint(4, (number,), generator=g)


def batches(size: int = 10) -> list[Any]:
    x, y = records()
    return list(zip(x.split(size), y.split(size), strict=True))


def by_hand(module: nn.Module, steps: int, lr: float = 1e-3) -> tuple[list[float], list[float]]:
    """Plain Adam on all records."""
    (x, y), module = records(), copy.deepcopy(module).eval()
    optimizer = torch.optim.Adam(module.parameters(), lr=lr)
    losses, accs = [], []
    for _ in range(steps + 1):
        z = module(x)
        loss = F.cross_entropy(z, y)
        losses.append(float(loss.detach()))
        accs.append(float((z.argmax(1) == y).double().mean()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses, accs


@pytest.mark.parametrize("size", [10, 7, 30])
def test_the_curve_is_that_of_a_hand_written_loop(size: int) -> None:
    module = net()
    before = state_of(module)
    curve = relearning_curve(module, batches(size), num_steps=8, lr=0.02)
    losses, accs = by_hand(module, 8, lr=0.02)
    assert curve.losses == pytest.approx(losses, rel=1e-5)
    assert curve.accs == pytest.approx(accs)
    assert state_of(module) == before
    assert module.training
    assert losses[-1] < losses[0] / 1.1
    assert curve.loss_steps is curve.acc_steps is None


def test_it_does_not_depend_on_how_much_is_computed_at_once() -> None:
    whole, parts = (relearning_curve(net(), batches(), num_steps=4, batch_size=size) for size in (500, 4))
    assert whole.losses == pytest.approx(parts.losses, rel=1e-5)


def test_an_untouched_model_takes_no_step_and_another_takes_as_many_as_its_curve_says() -> None:
    module = net()
    losses, accs = by_hand(module, 40, lr=0.02)
    known = relearning_curve(module, batches(), target_loss=losses[0] + 1e-6, target_acc=0.9 * accs[0])
    assert known.loss_steps == known.acc_steps == 0
    assert len(known.losses) == 1
    curve = relearning_curve(module, batches(), target_loss=losses[9] + 1e-5, num_steps=40, lr=0.02)
    assert curve.loss_steps == 9
    assert len(curve.losses) == 10, "it stops when it has succeeded"
    both = relearning_curve(module, batches(), target_loss=losses[9] + 1e-5, target_acc=1.0, num_steps=12, lr=0.02)
    assert both.loss_steps == 9
    assert both.acc_steps == math.inf
    assert len(both.losses) == 13, "it goes on for the other target"


def test_nothing_in_it_is_random_but_what_the_seed_decides() -> None:
    options: dict[str, Any] = {"num_steps": 5, "fraction": 0.3, "step_size": 4}
    first, again, other = (relearning_curve(net(), batches(), **options, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.losses[0] == other.losses[0]
    assert first.losses[1:] != other.losses[1:]


def test_small_steps_go_through_all_records_and_the_curve_is_of_the_forget_set() -> None:
    seen: list[Tensor] = []

    class Spy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                seen.append(x)
            return super().forward(x)

    relearning_curve(Spy(6, 4), batches(), num_steps=6, step_size=10)
    assert [len(x) for x in seen] == [10] * 6
    x = records()[0]
    for epoch in (seen[:3], seen[3:]):
        assert torch.equal(torch.cat(epoch).sort(dim=0).values, x.sort(dim=0).values)
    assert not torch.equal(torch.cat(seen[:3]), torch.cat(seen[3:]))
    seen.clear()
    relearning_curve(Spy(6, 4), batches(), num_steps=3, fraction=0.2)
    assert len(seen) == 3
    assert len(seen[0]) == 6
    assert torch.equal(seen[0], seen[1])


def test_the_attacker_may_have_other_data() -> None:
    other = records(20, seed=5)
    module = net()
    curve = relearning_curve(module, batches(), data=[other], num_steps=1, lr=0.1)
    attacked = copy.deepcopy(module).eval()
    optimizer = torch.optim.Adam(attacked.parameters(), lr=0.1)
    F.cross_entropy(attacked(other[0]), other[1]).backward()
    optimizer.step()
    x, y = records()
    assert curve.losses[1] == pytest.approx(float(F.cross_entropy(attacked(x), y).detach()), rel=1e-5)


def test_frozen_parameters_stay_so_unless_all_are() -> None:
    module = net()
    free = relearning_curve(module, batches(), num_steps=2)
    assert relearning_curve(copy.deepcopy(module).requires_grad_(False), batches(), num_steps=2) == free
    module[0].requires_grad_(False)
    assert relearning_curve(module, batches(), num_steps=2).losses != free.losses


def test_values_are_relearned_too() -> None:
    x, _ = records()
    curve = relearning_curve(nn.Linear(6, 1), [(x, x.sum(1))], num_steps=20, lr=0.1, target_loss=1e9)
    assert curve.accs is curve.acc_steps is None
    assert curve.loss_steps == 0
    curve = relearning_curve(nn.Linear(6, 1), [(x, x.sum(1))], num_steps=20, lr=0.1)
    assert curve.losses[-1] < curve.losses[0]


def test_it_works_in_inference_mode() -> None:
    with torch.no_grad():
        assert len(relearning_curve(net(), batches(), num_steps=2).losses) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, r"`fraction` must be in \(0, 1\]"),
        ({"lr": 0.0}, "`lr` must be above 0"),
        ({"num_steps": -1}, "`num_steps` must be at least 0"),
        ({"step_size": 0}, "`step_size` must be at least 1"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"forget": []}, "no forget record"),
        ({"data": []}, "no relearning record"),
        (
            {"forget": [(torch.ones(2, 6), torch.zeros(2).long()), (torch.ones(2, 5), torch.zeros(2).long())]},
            "pad them",
        ),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        relearning_curve(nn.Linear(6, 4), **{"forget": batches()} | options)


def test_steps_of_a_curve() -> None:
    curve = RelearningCurve(losses=(3.0, 2.0, 1.0), accs=None, target_loss=1.5, target_acc=0.9)
    assert curve.loss_steps == 2
    assert curve.acc_steps is None
    assert curve.is_over
