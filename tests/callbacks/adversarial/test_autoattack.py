from __future__ import annotations

import copy
import itertools
import logging
import sys
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from groundwire.callbacks.adversarial import FGSM, PGD, ThreatModel, evaluate_robustness
from groundwire.callbacks.adversarial.evaluation import autoattack
from groundwire.callbacks.adversarial.evaluation.autoattack import autoattack_package, in_parts
from groundwire.callbacks.adversarial.functional import linear_worst_case_margin
from helpers.adversarial import EPS, THREAT, held_out

pyautoattack = pytest.importorskip("pyautoattack")
WIDE = 0.2  # of which few images survive, so that Square has little to do


def linear(classes: int, width: int = 6) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(width, classes)


def vectors(model: nn.Module, n: int = 20) -> tuple[Tensor, Tensor]:
    x = torch.rand(n, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return x, model(x).argmax(dim=1)


@pytest.fixture(scope="module")
def found(robust_net: nn.Module) -> dict[str, Tensor]:
    return autoattack(robust_net, *held_out(16), ThreatModel(WIDE), seed=5)


def test_each_attack_runs_on_what_survived(found: dict[str, Tensor], robust_net: nn.Module) -> None:
    assert list(found) == ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
    x, y = held_out(16)
    with torch.no_grad():
        assert torch.equal(found["clean"], robust_net(x).argmax(dim=1) == y)
    stages = list(found.values())
    for before, after in itertools.pairwise(stages):
        assert not (after & ~before).any()
    assert all(alive.dtype == torch.bool and alive.shape == (16,) for alive in stages)
    assert 0 < int(found["apgd-ce"].sum()) < int(found["clean"].sum())


def test_it_is_the_standard_evaluation_of_the_package(found: dict[str, Tensor], robust_net: nn.Module) -> None:
    x, y = held_out(16)
    with torch.random.fork_rng():
        trace = sys.gettrace()
        by_hand = pyautoattack.AutoAttack(robust_net, norm="Linf", eps=WIDE, seed=5, device="cpu", version="standard")
        adversarial, _ = by_hand.run_standard_evaluation(x, y, batch_size=250)
        sys.settrace(trace)
    with torch.no_grad():
        assert torch.equal(found["square"], robust_net(adversarial).argmax(dim=1) == y)


def test_another_box_is_the_same_problem(robust_net: nn.Module) -> None:
    x, y = held_out(6)

    class Halved(nn.Module):
        def forward(self, u: Tensor) -> Tensor:
            logits: Tensor = robust_net((u + 1) / 2)
            return logits

    unit = autoattack(robust_net, x, y, ThreatModel(0.25))
    for model, inputs, threat in (
        (Halved(), 2 * x - 1, ThreatModel(0.5, lo=-1, hi=1)),
        (Halved(), 2 * x - 1, ThreatModel(0.25, mean=0.5, std=0.5)),
    ):
        scaled = autoattack(model, inputs, y, threat)
        assert [alive.tolist() for alive in scaled.values()] == [alive.tolist() for alive in unit.values()]


@pytest.mark.parametrize(
    ("classes", "attacks"),
    [(2, ["apgd-ce", "fab"]), (3, ["apgd-ce", "fab"]), (4, ["apgd-ce", "apgd-t", "fab-t"])],
)
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 0.2)])
def test_vectors_of_few_classes(norm: Any, eps: float, classes: int, attacks: list[str]) -> None:
    model = linear(classes)
    x, y = vectors(model)
    threat = ThreatModel(eps, norm)
    found = autoattack(model, x, y, threat)
    assert list(found) == ["clean", *attacks], "no Square on vectors"
    robust = linear_worst_case_margin(model.weight, model.bias, x, y, threat) > 0  # the box only helps
    last = list(found.values())[-1]
    assert not (robust & ~last).any(), "it does nothing impossible"
    inside = ((x > eps) & (x < 1 - eps)).all(dim=1)
    free = ThreatModel(eps, norm, lo=-1, hi=2)
    assert torch.equal(list(autoattack(model, x, y, free).values())[-1], robust), "and everything possible"
    assert torch.equal(last[inside], robust[inside])


def test_images_of_three_classes_see_square(robust_net: nn.Module) -> None:
    x, y = held_out(30)
    few = y < 3
    model = nn.Sequential(robust_net, First(3))
    found = autoattack(model, x[few][:4], y[few][:4], ThreatModel(0.3))
    assert list(found) == ["clean", "apgd-ce", "fab", "square"]


class First(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : self.number]


def test_apgd_leaves_no_more_than_pgd(robust_net: nn.Module, plain_net: nn.Module) -> None:
    x, y = held_out(60)
    for model in (robust_net, plain_net):
        calls: list[str] = []

        class Enough(Exception):
            pass

        alive: dict[str, Tensor] = {}

        def stop(name: str, _: int, calls: list[str] = calls) -> None:
            calls.append(name)
            raise Enough

        with pytest.raises(Enough):
            autoattack(model, x, y, THREAT, on_batch=stop)
        assert calls == ["apgd-ce"]
        trace = sys.gettrace()
        with torch.random.fork_rng():
            package = pyautoattack.AutoAttack(
                model, norm="Linf", eps=EPS, seed=0, version="custom", attacks=["apgd-ce"]
            )
            package.apgd.n_restarts = 1
            moved, _ = package.run_standard_evaluation(x, y, batch_size=250)
        sys.settrace(trace)
        with torch.no_grad():
            alive["apgd"] = model(moved).argmax(dim=1) == y
        pgd = evaluate_robustness(
            model, x, y, THREAT, attacks={"pgd": PGD(50, num_restarts=5, early_stop=True)}, sweep=(), probes=0
        )
        apgd, ours = float(alive["apgd"].double().mean()), pgd.accuracies()["pgd"][0]
        assert abs(apgd - ours) <= 0.02


def test_progress_counts_samples_and_batches() -> None:
    model = linear(4)
    x, y = vectors(model)
    told: list[tuple[str, int]] = []
    found = autoattack(model, x, y, ThreatModel(0.1), batch_size=7, on_batch=lambda name, n: told.append((name, n)))
    assert max(n for _, n in told) == 7
    before = {"apgd-ce": "clean", "apgd-t": "apgd-ce", "fab-t": "apgd-t"}
    for name, earlier in before.items():
        assert sum(n for what, n in told if what == name) == int(found[earlier].sum())


def test_nothing_is_left_behind() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
    model.train()
    model[0].requires_grad_(False)
    x = torch.rand(8, 6, generator=torch.Generator().manual_seed(0))
    y = copy.deepcopy(model).eval()(x).argmax(dim=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    log = logging.getLogger("auto-attack")
    level, state, outer = log.level, torch.get_rng_state(), sys.gettrace()

    def trace(*_: Any) -> None:
        return None

    log.setLevel(17)
    sys.settrace(trace)
    try:
        autoattack(model, x, y, ThreatModel(0.05))
        assert sys.gettrace() is trace
        assert log.level == 17
        with pytest.raises(ZeroDivisionError):
            autoattack(model, x, y, ThreatModel(0.05), on_batch=lambda *_: 1 // 0)
        assert sys.gettrace() is trace
        assert log.level == 17
    finally:
        sys.settrace(outer)
        log.setLevel(level)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(sub.training for sub in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_runs_in_inference_mode_and_in_double_precision() -> None:
    model = linear(4)
    x, y = vectors(model)
    expected = [alive.tolist() for alive in autoattack(model, x, y, ThreatModel(0.1)).values()]
    with torch.inference_mode():
        inside = autoattack(model, x.clone(), y.clone(), ThreatModel(0.1))
    assert [alive.tolist() for alive in inside.values()] == expected
    found = autoattack(copy.deepcopy(model).double(), x.double(), y, ThreatModel(0.1))
    assert [alive.tolist() for alive in found.values()] == expected


def test_an_evaluation_has_it_as_one_of_its_attacks() -> None:
    model = linear(4)
    x, y = vectors(model)
    told: list[tuple[str, float]] = []
    result = evaluate_robustness(
        model,
        x,
        y,
        ThreatModel(0.1),
        attacks={"fgsm": FGSM()},
        sweep=(),
        probes=5,
        autoattack=12,
        seed=3,
        progress=lambda what, share: told.append((what, share)),
    )
    alone = autoattack(model, x[:12], y[:12], ThreatModel(0.1), seed=3)
    assert {name: alive.tolist() for name, alive in result.autoattack.items()} == {
        name: alive.tolist() for name, alive in alone.items()
    }
    acc, _, _, n = result.accuracies()["autoattack"]
    assert (acc, n) == (float(alone["fab-t"].double().mean()), 12)
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert told[-1] == ("done", 1.0)
    assert "autoattack apgd-ce" in dict(told)
    assert result.as_dict()["autoattack"]["fab-t"] == acc
    everything = evaluate_robustness(
        model, x, y, ThreatModel(0.1), attacks={"fgsm": FGSM()}, sweep=(), probes=0, autoattack=99
    )
    assert torch.equal(everything.worst_case, everything.worst_case & everything.autoattack["fab-t"])
    assert everything.robust_acc <= everything.accuracies()["autoattack"][0]
    without = evaluate_robustness(model, x, y, ThreatModel(0.1), attacks={}, sweep=(), probes=0)
    some = evaluate_robustness(model, x, y, ThreatModel(0.1), attacks={}, sweep=(), probes=0, autoattack=12)
    expected = without.worst_case.clone()
    expected[:12] &= some.autoattack["fab-t"]
    assert torch.equal(some.worst_case, expected), "what it broke of the first samples counts"
    assert some.robust_acc < without.robust_acc


def test_a_model_without_a_right_answer_needs_no_attack() -> None:
    model = linear(4)
    x, y = vectors(model, 3)
    found = autoattack(model, x, (y + 1) % 4, ThreatModel(0.1))
    assert not any(alive.any() for alive in found.values())


def test_without_the_package_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert autoattack_package() is pyautoattack
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    model = linear(4)
    x, y = vectors(model)
    message = r"needs the package pyautoattack: `pip install pyautoattack` \(or groundwire\[attacks\]\).*autoattack=0"
    with pytest.raises(MisconfigurationException, match=message):
        autoattack_package()
    with pytest.raises(MisconfigurationException, match=message):
        autoattack(model, x, y, THREAT)
    told: list[str] = []
    with pytest.raises(MisconfigurationException, match=message):
        evaluate_robustness(model, x, y, THREAT, autoattack=5, progress=lambda what, _: told.append(what))
    assert told == [], "it is said before hours of other attacks"


def test_parts_are_cut_in_order() -> None:
    assert [part.tolist() for part in in_parts(torch.arange(5), 2)] == [[0, 1], [2, 3], [4]]
    assert in_parts(torch.arange(0), 2) == []
