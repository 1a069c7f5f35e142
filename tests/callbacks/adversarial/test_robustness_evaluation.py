from __future__ import annotations

import copy
import itertools
import json
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from groundwire.callbacks.adversarial import FGSM, PGD, Attack, RobustnessResult, ThreatModel, evaluate_robustness
from groundwire.callbacks.adversarial.evaluation import robustness, standard_attacks
from groundwire.callbacks.adversarial.functional import linear_worst_case_margin
from groundwire.callbacks.adversarial.threat import norm_of
from helpers.adversarial import EPS, THREAT, Wrapped, held_out

CLASSES, WIDTH = 4, 6
CHEAP: dict[str, Any] = {"attacks": {"fgsm": FGSM()}, "sweep": (), "probes": 0}
FREE = 10.0  # a box that confines nothing


def linear(seed: int = 0, classes: int = CLASSES) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(WIDTH, classes).double()


def points(model: nn.Module, n: int = 120, mislabelled: int = 10) -> tuple[Tensor, Tensor]:
    """Normal numbers, labelled by the model itself but for some."""
    x = torch.randn(n, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).clamp(-4, 4)
    with torch.no_grad():
        y = model(x).argmax(dim=1)
        classes = model(x).shape[1]
    y[:mislabelled] = (y[:mislabelled] + 1) % classes
    return x, y


def free(eps: float, norm: Any = "linf") -> ThreatModel:
    return ThreatModel(eps, norm, lo=-FREE, hi=FREE)


# ---------------------------------------------------------------- closed forms


@pytest.mark.parametrize("classes", [2, CLASSES])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.2), ("l2", 0.4)])
def test_a_linear_model_survives_where_the_closed_form_says(norm: Any, eps: float, classes: int) -> None:
    model = linear(classes=classes)
    x, y = points(model)
    threat = free(eps, norm)
    result = evaluate_robustness(model, x, y, threat, probes=0)

    def possible(radius: float) -> Tensor:
        if radius == 0:
            return model(x).argmax(dim=1) == y
        worst = linear_worst_case_margin(model.weight, model.bias, x, y, threat.scaled(radius / eps))
        assert worst.abs().min() > 1e-6, "no sample is on the edge"
        return worst > 0

    assert 0.2 < float(possible(eps).double().mean()) < 0.8
    assert not result.survived["clean"][:10].any()
    for alive in result.survived.values():
        assert not (alive & ~result.survived["clean"]).any(), "what is misclassified counts as broken"
        assert not (~alive & possible(eps)).any(), "no attack does the impossible"
    # of two classes only one is wrong, and ascent finds the best point; of several it may climb towards another one
    missed = {"pgd50x5_margin": int((result.survived["pgd50x5_margin"] != possible(eps)).sum())}
    missed |= {str(radius): int((alive != possible(radius)).sum()) for radius, alive in result.sweep.items()}
    assert max(missed.values()) <= (0 if classes == 2 else 0.04 * len(x)), missed
    assert torch.equal(result.sweep[0.0], result.survived["clean"])


def test_the_worst_case_is_the_and_of_everything_and_the_headline(robust_net: nn.Module, plain_net: nn.Module) -> None:
    x, y = held_out(60)
    result = evaluate_robustness(
        robust_net, x, y, THREAT, attacks={"a": FGSM(), "b": PGD(3)}, sweep=(), probes=0, surrogate=plain_net
    )
    assert list(result.survived) == ["clean", "a", "b", "noise", "transfer"]
    by_hand = [all(bool(alive[i]) for alive in result.survived.values()) for i in range(60)]
    assert result.worst_case.tolist() == by_hand
    assert result.robust_acc == sum(by_hand) / 60
    assert result.accuracies()["worst_case"][0] == result.robust_acc
    with torch.no_grad():
        assert torch.equal(result.survived["clean"], robust_net(x).argmax(dim=1) == y)
    assert result.robust_acc <= min(acc for acc, *_ in result.accuracies().values())
    for name, (acc, low, high, n) in result.accuracies().items():
        right = round(acc * n)
        interval = binomtest(right, n).proportion_ci(confidence_level=0.95, method="wilson")
        assert (low, high) == pytest.approx((interval.low, interval.high), abs=1e-9), name
        assert n == result.num_samples == 60


def test_standard_attacks_are_what_they_are_called() -> None:
    found = {
        name: (a.num_steps, a.num_restarts, a.loss, a.start)
        for name, a in standard_attacks().items()  # type: ignore[attr-defined]
    }
    assert found == {
        "fgsm": (1, 1, "ce", "clean"),
        "pgd20_ce": (20, 1, "ce", "uniform"),
        "pgd20_margin": (20, 1, "margin", "uniform"),
        "pgd50x5_ce": (50, 5, "ce", "uniform"),
        "pgd50x5_margin": (50, 5, "margin", "uniform"),
    }


def test_survivors_are_those_of_the_attack_called_by_hand(robust_net: nn.Module) -> None:
    x, y = held_out(40)
    result = evaluate_robustness(
        robust_net, x, y, THREAT, attacks={"a": FGSM(), "b": FGSM("margin")}, sweep=(), probes=0
    )
    for name, loss in (("a", "ce"), ("b", "margin")):
        found = FGSM(loss)(robust_net, x, y, THREAT)  # type: ignore[arg-type]
        expected = result.survived["clean"] & (robust_net(found).argmax(dim=1) == y)
        assert torch.equal(result.survived[name], expected)


# ---------------------------------------------------------------- sweep, noise, transfer


def test_the_sweep_never_rises_and_its_examples_are_those_of_eps(robust_net: nn.Module) -> None:
    x, y = held_out(60)
    result = evaluate_robustness(robust_net, x, y, THREAT, **CHEAP | {"sweep": (2, 0, 0.5, 1, 1.0, 8)})
    assert list(result.sweep) == [0.0, 0.5 * EPS, EPS, 2 * EPS, 8 * EPS]
    assert torch.equal(result.sweep[0.0], result.survived["clean"])
    radii = list(result.sweep.values())
    for smaller, larger in itertools.pairwise(radii):
        assert not (larger & ~smaller).any()
    assert float(radii[-1].double().mean()) < 0.2 < float(radii[2].double().mean())
    examples = result.examples
    assert examples is not None
    shown = result.survived["clean"].nonzero()[:8, 0]
    assert torch.equal(examples.clean, x[shown])
    assert torch.equal(examples.target, y[shown])
    assert torch.equal(examples.clean_label, y[shown])
    change = (examples.adversarial - examples.clean).abs().flatten(1).amax(dim=1)
    assert change.max() <= EPS + 1e-6
    assert change.max() > EPS / 2 + 1e-3, "they come from factor 1, not from the radius before"
    assert torch.equal(examples.adversarial_label, robust_net(examples.adversarial).argmax(dim=1))
    assert torch.equal(examples.adversarial_label == examples.target, result.sweep[EPS][shown])
    assert (examples.lo, examples.hi) == (0.0, 1.0)


def test_without_factor_one_examples_are_those_of_the_smallest_radius(robust_net: nn.Module) -> None:
    x, y = held_out(20)
    result = evaluate_robustness(robust_net, x, y, THREAT, **CHEAP | {"sweep": (0.5, 4.0)})
    assert result.examples is not None
    assert (result.examples.adversarial - result.examples.clean).abs().max() <= EPS / 2 + 1e-6
    assert evaluate_robustness(robust_net, x, y, THREAT, **CHEAP | {"sweep": (0.0,)}).examples is None


def test_numbers_of_numpy_are_numbers(robust_net: nn.Module) -> None:
    x, y = held_out(6)
    for threat, factors in ((THREAT, [np.float64(0.5), np.float32(2)]), (ThreatModel(np.float64(EPS)), [0.5, 2])):
        result = evaluate_robustness(robust_net, x, y, threat, **CHEAP | {"sweep": factors})
        assert list(result.sweep) == pytest.approx([EPS / 2, 2 * EPS])
        json.dumps(result.as_dict())


class Records(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        found: Tensor = self.network(x)
        return found


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_whatever_the_network_sees_is_in_the_ball_and_the_box(norm: Any, robust_net: nn.Module) -> None:
    x, y = held_out(8)
    mean, std = 0.3, 0.5
    eps = EPS if norm == "linf" else 0.5
    threat = ThreatModel(eps, norm, mean=mean, std=std)
    normalised = nn.Sequential(Unnormalise(mean, std), robust_net)
    spy = Records(normalised)
    evaluate_robustness(spy, (x - mean) / std, y, threat, attacks={}, sweep=(), probes=0)
    noisy = spy.seen[-1] * std + mean
    delta = noisy - x
    size = delta.abs().flatten(1).amax(dim=1) if norm == "linf" else norm_of(delta, 3).flatten()
    assert size.max() <= eps * (1 + 1e-5)
    assert size.min() > 0.05 * eps
    assert noisy.min() >= -1e-6
    assert noisy.max() <= 1 + 1e-6
    spy.seen.clear()
    evaluate_robustness(spy, (x - mean) / std, y, threat, probes=4)
    everything = torch.cat(spy.seen) * std + mean
    assert everything.min() >= -1e-5
    assert everything.max() <= 1 + 1e-5


class Unnormalise(nn.Module):
    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, x: Tensor) -> Tensor:
        return x * self.std + self.mean


def test_normalised_inputs_give_the_result_of_pixels(robust_net: nn.Module) -> None:
    x, y = (part[:30] for part in held_out(30))
    pixels = evaluate_robustness(robust_net.double(), x.double(), y, THREAT, **CHEAP | {"sweep": (1.0,)})
    network = nn.Sequential(Unnormalise(0.3, 0.5), robust_net)
    threat = ThreatModel(EPS, mean=0.3, std=0.5)
    normalised = evaluate_robustness(network, (x.double() - 0.3) / 0.5, y, threat, **CHEAP | {"sweep": (1.0,)})
    robust_net.float()
    for name in pixels.survived:
        assert torch.equal(pixels.survived[name], normalised.survived[name]), name
    assert torch.equal(pixels.sweep[EPS], normalised.sweep[EPS])


def test_transfer_from_the_model_itself_is_nearly_as_strong_as_pgd(plain_net: nn.Module) -> None:
    x, y = held_out(100)
    attacks = {"pgd20_ce": PGD(20)}
    itself = evaluate_robustness(plain_net, x, y, THREAT, **CHEAP | {"attacks": attacks, "surrogate": plain_net})
    white, transferred = itself.survived["pgd20_ce"], itself.survived["transfer"]
    assert abs(float(white.double().mean() - transferred.double().mean())) <= 0.03
    assert "transfer" not in evaluate_robustness(plain_net, x, y, THREAT, **CHEAP).survived


def test_transfer_is_crafted_on_the_surrogate_and_tried_on_the_model(
    robust_net: nn.Module, plain_net: nn.Module
) -> None:
    x, y = held_out(100)
    found = evaluate_robustness(robust_net, x, y, THREAT, **CHEAP | {"surrogate": plain_net})
    crafted = PGD(20, track="last")(plain_net, x, y, THREAT)
    expected = (robust_net(crafted).argmax(dim=1) == y) & found.survived["clean"]
    assert abs(float(expected.double().mean()) - found.accuracies()["transfer"][0]) <= 0.04
    white = evaluate_robustness(robust_net, x, y, THREAT, **CHEAP | {"attacks": {"pgd": PGD(20)}})
    assert found.accuracies()["transfer"][0] >= white.accuracies()["pgd"][0] - 0.005


def test_logits_may_be_elsewhere(robust_net: nn.Module) -> None:
    x, y = held_out(12)

    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    few: dict[str, Any] = {"attacks": {"pgd": PGD(3)}, "sweep": (1,), "probes": 3}
    direct = evaluate_robustness(robust_net, x, y, THREAT, **few)
    for logits_of in (lambda u: {"logits": robust_net(u)}, lambda u: Output(robust_net(u))):
        found = evaluate_robustness(robust_net, x, y, THREAT, **few, logits_of=logits_of)
        assert found.as_dict() == direct.as_dict()


# ---------------------------------------------------------------- traces, determinism


def test_model_and_surrogate_are_left_as_they_were(robust_net: nn.Module, plain_net: nn.Module) -> None:
    x, y = held_out(24)
    nets = [copy.deepcopy(robust_net), copy.deepcopy(plain_net)]
    for net in nets:
        net.train()
        net[1].eval()  # type: ignore[index]
        net[0].weight.requires_grad_(False)  # type: ignore[index,union-attr]
        net[6].bias.grad = torch.ones(10)  # type: ignore[index,union-attr]

    def look() -> list[Any]:
        return [
            [
                [sub.training for sub in net.modules()],
                [(p.requires_grad, None if p.grad is None else p.grad.tolist()) for p in net.parameters()],
                {name: value.tolist() for name, value in net.state_dict().items()},
                [len(sub._forward_hooks) for sub in net.modules()],
            ]
            for net in nets
        ]

    before, given, state = look(), (x.clone(), y.clone()), torch.get_rng_state()
    evaluate_robustness(nets[0], x, y, THREAT, probes=10, surrogate=nets[1])
    assert look() == before
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, given[0])
    assert torch.equal(y, given[1])


def test_the_models_mode_does_not_matter(robust_net: nn.Module) -> None:
    x, y = held_out(24)
    training = copy.deepcopy(robust_net).train()
    few: dict[str, Any] = {"attacks": {"pgd": PGD(3)}, "sweep": (1,), "probes": 5}
    found = [evaluate_robustness(net, x, y, THREAT, **few).as_dict() for net in (robust_net, training)]
    assert found[0] == found[1]


def test_two_calls_agree_and_another_seed_differs_in_its_starts(plain_net: nn.Module) -> None:
    x, y = held_out(60)
    spies = [Records(plain_net) for _ in range(3)]
    attacks = {"fgsm": FGSM(), "pgd": PGD(2)}
    first, again, other = (
        evaluate_robustness(spy, x, y, THREAT, attacks=attacks, sweep=(1.0,), probes=0, seed=seed)
        for spy, seed in zip(spies, (3, 3, 4), strict=True)
    )
    assert first.as_dict() == again.as_dict()
    assert all(torch.equal(a, b) for a, b in zip(spies[0].seen, spies[1].seen, strict=True))
    assert torch.equal(first.survived["fgsm"], other.survived["fgsm"])
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(spies[0].seen, spies[2].seen, strict=False))
    assert (first.seed, other.seed) == (3, 4)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_batches_do_not_change_a_deterministic_attack(batch_size: int, robust_net: nn.Module) -> None:
    x, y = held_out(40)
    whole = evaluate_robustness(robust_net, x, y, THREAT, **CHEAP)
    parts = evaluate_robustness(robust_net, x, y, THREAT, **CHEAP | {"batch_size": batch_size})
    for name in whole.survived:
        assert torch.equal(whole.survived[name], parts.survived[name])


def test_batches_are_no_larger_than_asked(robust_net: nn.Module) -> None:
    x, y = held_out(30)
    spy = Records(robust_net)
    evaluate_robustness(
        spy, x, y, THREAT, attacks={"restarts": PGD(2, num_restarts=4)}, sweep=(1,), probes=9, batch_size=9
    )
    assert max(len(seen) for seen in spy.seen) <= 9 + 1  # in training mode a last sample joins those before


def test_progress_goes_from_nothing_to_all(robust_net: nn.Module, plain_net: nn.Module) -> None:
    x, y = held_out(10)
    told: list[tuple[str, float]] = []
    evaluate_robustness(
        robust_net, x, y, THREAT, probes=4, surrogate=plain_net, progress=lambda what, share: told.append((what, share))
    )
    shares = [share for _, share in told]
    assert shares[0] == 0.0
    assert shares[-1] == 1.0
    assert shares == sorted(shares)
    assert {"attack pgd50x5_ce", "attack noise", "attack transfer", f"sweep {EPS}", "probe huge"} <= {
        w for w, _ in told
    }
    at = dict(told)  # 5 * 50 steps take longer than 20
    names = [what for what, _ in told]
    length = {name: at[after] - at[name] for name, after in itertools.pairwise(names)}
    assert length["attack pgd50x5_ce"] == pytest.approx(12.5 * length["attack pgd20_ce"])


def test_it_runs_in_inference_mode(robust_net: nn.Module, plain_net: nn.Module) -> None:
    x, y = held_out(12)
    few: dict[str, Any] = {
        "attacks": {"fgsm": FGSM(), "pgd": PGD(3, num_restarts=2)},
        "sweep": (1,),
        "probes": 3,
        "surrogate": plain_net,
    }
    expected = evaluate_robustness(robust_net, x, y, THREAT, **few).as_dict()
    with torch.inference_mode():
        inside_x, inside_y = x.clone(), y.clone()
        inside = evaluate_robustness(robust_net, inside_x, inside_y, THREAT, **few)
    assert inside_x.is_inference()
    assert inside.as_dict() == expected
    outside = evaluate_robustness(robust_net, inside_x, inside_y, THREAT, **few)
    assert outside.as_dict() == expected
    with torch.no_grad():
        assert evaluate_robustness(robust_net, x, y, THREAT, **few).as_dict() == expected


# ---------------------------------------------------------------- results


def test_empty_parts_are_empty(robust_net: nn.Module) -> None:
    x, y = held_out(10)
    result = evaluate_robustness(robust_net, x, y, THREAT, **CHEAP)
    assert result.sweep == {}
    assert result.probes == {}
    assert result.autoattack == {}
    assert result.checks() == []
    assert result.examples is None
    assert "masked" not in result.as_markdown()
    assert "| eps |" not in result.as_markdown()
    alone = evaluate_robustness(robust_net, x, y, THREAT, **CHEAP | {"attacks": {}, "probes": 5})
    assert list(alone.survived) == ["clean", "noise"]
    assert len(alone.checks()) == 8


def test_probes_are_the_first_samples(robust_net: nn.Module) -> None:
    x, y = held_out(20)
    few = evaluate_robustness(robust_net, x, y, THREAT, **CHEAP | {"probes": 6})
    assert {len(alive) for alive in few.probes.values()} == {6}
    assert torch.equal(few.probes["fgsm"], few.survived["fgsm"][:6])
    alone = evaluate_robustness(robust_net, x[:6], y[:6], THREAT, **CHEAP | {"probes": 100})
    for name in few.probes:
        assert torch.equal(few.probes[name], alone.probes[name]), name


def test_reports_hold_all_numbers(robust_net: nn.Module, plain_net: nn.Module) -> None:
    x, y = held_out(30)
    result = evaluate_robustness(robust_net, x, y, THREAT, probes=10, surrogate=plain_net, seed=7)
    found = json.loads(json.dumps(result.as_dict()))
    assert found["threat"] == {"norm": "linf", "eps": EPS, "lo": 0.0, "hi": 1.0, "mean": None, "std": None}
    assert (found["seed"], found["num_samples"], found["robust_acc"]) == (7, 30, result.robust_acc)
    assert set(found["accuracies"]) == {*standard_attacks(), "clean", "noise", "transfer", "worst_case"}
    for name, alive in result.survived.items():
        assert found["accuracies"][name]["acc"] == float(alive.double().mean())
        assert found["accuracies"][name]["n"] == 30
    assert [row["eps"] for row in found["sweep"]] == list(result.sweep)
    assert [row["acc"] for row in found["sweep"]] == [float(a.double().mean()) for a in result.sweep.values()]
    assert [check["check"][:3] for check in found["checks"]] == [f"({letter})" for letter in "abcdefgh"]
    assert [check["passed"] for check in found["checks"]] == [check.passed for check in result.checks()]
    text = result.as_markdown()
    assert f"Robust accuracy {100 * result.robust_acc:.1f} %: 30 samples" in text
    assert "linf, eps = 0.1, seed 7" in text
    for name, (acc, low, high, n) in result.accuracies().items():
        assert f"| {name} | {100 * acc:.1f} | {100 * low:.1f} to {100 * high:.1f} | {n} |" in text
    for check in result.checks():
        assert f"| {check.name} | {check.verdict} | {check.found} | {check.threshold} |" in text
    sweep = " | ".join(f"{100 * float(a.double().mean()):.1f}" for a in result.sweep.values())
    assert f"| accuracy % | {sweep} |" in text
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        assert len({row.count("|") for row in table.strip().splitlines()}) == 1, "every row has as many cells"


def test_parts_merge_to_the_whole(robust_net: nn.Module, plain_net: nn.Module) -> None:
    x, y = held_out(30)
    cheap = CHEAP | {"sweep": (0, 1), "probes": 5, "surrogate": plain_net}
    parts = [evaluate_robustness(robust_net, x[s], y[s], THREAT, **cheap) for s in (slice(0, 12), slice(12, 30))]
    whole = RobustnessResult.merged(parts)
    assert whole.num_samples == 30
    assert torch.equal(whole.worst_case, torch.cat([part.worst_case for part in parts]))
    for name in whole.survived:
        assert torch.equal(whole.survived[name], torch.cat([part.survived[name] for part in parts]))
    assert {len(alive) for alive in whole.probes.values()} == {10}
    assert {len(alive) for alive in whole.sweep.values()} == {30}
    together = evaluate_robustness(robust_net, x, y, THREAT, **cheap)
    for name in ("clean", "fgsm"):
        assert torch.equal(whole.survived[name], together.survived[name])
    assert whole.robust_acc == pytest.approx(sum(p.robust_acc * p.num_samples for p in parts) / 30)
    assert RobustnessResult.merged(parts[:1]).as_dict() == parts[0].as_dict()


def test_the_worst_case_is_that_of_the_evaluation_whatever_the_parts_are() -> None:
    alive = torch.ones(4, dtype=torch.bool)
    seen = {"clean": alive[:2], "square": torch.tensor([False, True])}
    options: dict[str, Any] = {"threat": THREAT, "num_classes": 3, "input_size": 6, "seed": 0, "autoattack": seen}
    worst = torch.tensor([False, True, True, True])
    some = RobustnessResult(**options, worst_case=worst, survived={"clean": alive})
    assert some.robust_acc == 0.75
    assert some.accuracies()["worst_case"][0] == 0.75
    assert some.accuracies()["autoattack"][0] == 0.5
    assert some.accuracies()["autoattack"][3] == 2
    part = RobustnessResult(**options, worst_case=worst[:2], survived={"clean": alive[:2]})
    everything = RobustnessResult.merged([part] * 2)
    assert everything.worst_case.tolist() == [False, True] * 2
    assert (everything.robust_acc, everything.input_size) == (0.5, 6)
    assert everything.as_dict()["autoattack"] == {"clean": 1.0, "square": 0.5}
    with pytest.raises(TypeError):
        RobustnessResult(THREAT, 3, 6, 0, worst, {"clean": alive})  # type: ignore[misc]


class Breaks(Attack):
    """Breaks given samples of a linear model, which it knows by their inputs, and no others."""

    def __init__(self, x: Tensor, indices: tuple[int, ...]) -> None:
        super().__init__()
        self.targets = x[list(indices)]

    def perturb(self, logits_of: Any, x: Tensor, target: Tensor, threat: Any, generator: Any) -> Tensor:
        chosen = (x[:, None] == self.targets).all(dim=-1).any(dim=1)
        moved = PGD(20, loss="margin").perturb(logits_of, x, target, threat, generator)
        return torch.where(chosen[:, None], moved, x)


def test_whatever_broke_a_sample_in_the_ball_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be it an attack, the sweep up to eps, a probe, or AutoAttack on its first samples; larger balls do not count."""
    model = linear()
    x, y = points(model, n=40, mislabelled=0)
    threat = free(0.6)
    noise = evaluate_robustness(model, x, y, threat, attacks={}, sweep=(), probes=0).survived["noise"]
    breakable = ~evaluate_robustness(model, x, y, threat, **CHEAP | {"attacks": {"a": PGD(20)}}).survived["a"]
    a, s, p, u, large = (breakable & noise).nonzero()[:5, 0].tolist()
    assert large < 30, "among the first samples"

    class Sweeps(Breaks):
        """In the place of every PGD of the evaluation itself: what it breaks depends on the ball and the purpose."""

        num_restarts = 1

        def __init__(self, num_steps: int = 20, **options: Any) -> None:
            super().__init__(x, ())
            self.num_steps, self.options = num_steps, options

        def __call__(self, model: Any, given: Any, target: Any, ball: ThreatModel, **options: Any) -> Tensor:
            if ball.eps > threat.eps:
                self.targets = x[[large]]
            elif options.pop("start", None) is not None or ball.eps < threat.eps:
                self.targets = x[[s]]
            else:
                self.targets = x[[p]] if self.num_steps == 200 else x[:0]
            options.pop("start", None)
            return super().__call__(model, given, target, ball, **options)

    def part(model: Any, first: Tensor, *_: Any, **__: Any) -> dict[str, Tensor]:
        found = torch.ones(len(first), dtype=torch.bool)
        return {"clean": found, "square": torch.arange(len(first)) != u}

    monkeypatch.setattr(robustness, "PGD", Sweeps)
    monkeypatch.setattr(robustness, "run_autoattack", part)
    monkeypatch.setattr(robustness, "autoattack_package", lambda: None)
    run: dict[str, Any] = {"attacks": {"a": Breaks(x, (a,))}, "probes": 30}
    cases: list[tuple[dict[str, Any], set[int]]] = [
        ({"sweep": (), "probes": 0}, {a}),
        ({"sweep": (0.9,), "probes": 0}, {a, s}),
        ({"sweep": (4.0,), "probes": 0}, {a}),
        ({"sweep": ()}, {a, p}),
        ({"sweep": (), "probes": 0, "autoattack": 30}, {a, u}),
        ({"sweep": (0.9, 4.0), "autoattack": 30}, {a, s, p, u}),
    ]
    fgsm = ~evaluate_robustness(model, x[:30], y[:30], threat, **CHEAP).survived["fgsm"]
    for options, broken in cases:
        result = evaluate_robustness(model, x, y, threat, **run | options)
        expected = set(broken) | set((~noise).nonzero()[:, 0].tolist())
        if (run | options)["probes"]:
            expected |= set(fgsm.nonzero()[:, 0].tolist())
        assert set((~result.worst_case).nonzero()[:, 0].tolist()) == expected, options
        assert result.robust_acc == 1 - len(expected) / 40
        assert not result.survived["a"][a]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("normalised", [False, True])
def test_an_attack_that_leaves_the_ball_is_refused(norm: Any, normalised: bool) -> None:
    model, eps = linear().float(), 0.2
    threat = ThreatModel(eps, norm, mean=0.5, std=2.0) if normalised else ThreatModel(eps, norm)
    x = torch.rand(20, WIDTH, generator=torch.Generator().manual_seed(1)) * 0.4 + 0.3
    x[:, 0] = 0.95  # near the edge of the box
    given = threat.network_input(x)
    y = model(given).argmax(dim=1)

    class Moves(Attack):
        def __init__(self, by: Any) -> None:
            super().__init__()
            self.by = by

        def perturb(self, logits_of: Any, x: Tensor, *_: Any) -> Tensor:
            return x + torch.as_tensor(self.by)

    def evaluate(by: Any) -> Any:
        return evaluate_robustness(model, given, y, threat, **CHEAP | {"attacks": {"mine": Moves(by)}})

    inside = [0.0, *[eps / (1 if norm == "linf" else WIDTH**0.5)] * (WIDTH - 1)]
    evaluate(inside)
    outside = [0.0, *[1.05 * value for value in inside[1:]]] if norm == "linf" else [0.0, 0.21, *[0.0] * (WIDTH - 2)]
    for by in (outside, [0.1, *[0.0] * (WIDTH - 1)], float("nan")):  # out of the ball, of the box, of all numbers
        with pytest.raises(ValueError, match=r"Moves gives inputs that are .* outside of the ball of eps=0.2"):
            evaluate(by)


def test_targeted_attacks_are_refused() -> None:
    for attack in (PGD(2, targeted=True), FGSM(targeted=True)):
        with pytest.raises(ValueError, match=r"Attacks \['aimed'\] are targeted: .* break nothing"):
            evaluate_robustness(linear(), *points(linear()), free(0.1), **CHEAP | {"attacks": {"aimed": attack}})


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_labels_out_of_range_are_refused(label: int) -> None:
    x, y = points(linear())
    y[3] = label
    with pytest.raises(ValueError, match=rf"labels .*{label}.*the module gives {CLASSES} logits: count them from 0"):
        evaluate_robustness(linear(), x, y, free(0.1), **CHEAP)


@pytest.mark.parametrize("sweep", [(1.0, -0.5), (float("nan"),), (float("inf"),)])
def test_radii_that_are_none_are_refused(sweep: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"`sweep` must hold radii of at least 0, in units of eps, got \["):
        evaluate_robustness(linear(), *points(linear()), free(0.1), **CHEAP | {"sweep": sweep})


def test_one_hot_labels_are_classes() -> None:
    model = linear()
    x, y = points(model, n=30)
    few: dict[str, Any] = {"attacks": {"pgd": PGD(3)}, "sweep": (1,), "probes": 8}
    expected = evaluate_robustness(model, x, y, free(0.3), **few).as_dict()
    one_hot = torch.nn.functional.one_hot(y, CLASSES)
    for labels in (one_hot, one_hot.double(), y[:, None], y.int(), 0.7 * one_hot + 0.3 / CLASSES):
        assert evaluate_robustness(model, x, labels, free(0.3), **few).as_dict() == expected


def test_a_random_network_is_warned_of(robust_net: nn.Module) -> None:
    x, y = held_out(6)
    with pytest.warns(UserWarning, match="other outputs for the same inputs a second time"):
        evaluate_robustness(Seeded(robust_net), x, y, THREAT, **CHEAP)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate_robustness(robust_net, x, y, THREAT, **CHEAP | {"batch_size": 4})


class Seeded(nn.Module):
    """Random, from a stream of its own."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.generator = network, torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.network(x + 0.01 * torch.randn(x.shape, generator=self.generator))
        return found


# ---------------------------------------------------------------- corners


def test_a_model_that_is_always_wrong_has_no_robustness(plain_net: nn.Module) -> None:
    x, _ = held_out(10)
    y = (plain_net(x).argmax(dim=1) + 1) % 10
    result = evaluate_robustness(plain_net, x, y, THREAT, probes=5)
    assert result.robust_acc == 0.0
    assert all(not alive.any() for alive in result.survived.values())
    assert result.examples is not None
    assert len(result.examples.clean) == 0
    json.dumps(result.as_dict())


@pytest.mark.parametrize("n", [1, 3, 5])  # the last of batches of 2 is one sample
def test_batchnorm_over_features_can_be_probed_in_training_mode(n: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10)).eval()
    x, _ = held_out(n)
    y = net(x).argmax(dim=1)
    for batch_size in (2, 1):
        result = evaluate_robustness(net, x, y, THREAT, **CHEAP | {"probes": n, "batch_size": batch_size})
        assert len(result.probes["train_mode"]) == n


def test_a_single_sample_is_enough(robust_net: nn.Module) -> None:
    x, y = held_out(1)
    assert evaluate_robustness(robust_net, x, y, THREAT).num_samples == 1


def test_half_precision_inputs_are_taken(plain_net: nn.Module) -> None:
    x, y = held_out(8)
    net = copy.deepcopy(plain_net).bfloat16()
    result = evaluate_robustness(net, x.bfloat16(), y, THREAT, **CHEAP | {"sweep": (1,), "probes": 4})
    assert result.robust_acc <= 1.0


@pytest.mark.parametrize("name", ["clean", "noise", "transfer", "autoattack", "worst_case"])
def test_names_that_mean_something_else_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"cannot be named .*{name}"):
        evaluate_robustness(linear(), *points(linear()), free(0.1), attacks={name: FGSM()}, sweep=(), probes=0)


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (
            torch.zeros(0, WIDTH),
            torch.zeros(0, dtype=torch.int64),
            ValueError,
            "at least one sample are needed, got none",
        ),
        (
            torch.zeros(3, WIDTH),
            torch.zeros(2, dtype=torch.int64),
            ValueError,
            r"there are 3 inputs and labels of shape \(2,\)",
        ),
        (torch.full((2, WIDTH), 3.0), torch.zeros(2, dtype=torch.int64), ValueError, r"outside \[0, 1\]"),
        (torch.zeros(2, WIDTH, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), TypeError, "floating"),
    ],
)
def test_bad_inputs_are_refused(x: Tensor, y: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        evaluate_robustness(nn.Linear(WIDTH, CLASSES), x, y, ThreatModel(0.1))


def test_what_gives_no_logits_is_refused() -> None:
    x, y = torch.zeros(2, WIDTH), torch.zeros(2, dtype=torch.int64)
    for output, message in (
        (lambda u: (u,), "gives a tuple"),
        (lambda u: u.sum(dim=1), r"logits \[2, classes\].*shape \(2,\)"),
        (lambda u: u[:1], r"shape \(1, 6\)"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_robustness(nn.Identity(), x, y, THREAT, logits_of=output)


def test_the_defaults_are_the_documented_ones() -> None:
    assert robustness.SWEEP == (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


def test_scaling_the_logits_does_not_fool_the_headline(plain_net: nn.Module) -> None:
    x, y = held_out(60)
    attacks = {"ce": PGD(20, early_stop=True), "margin": PGD(20, loss="margin", early_stop=True)}
    options = CHEAP | {"attacks": attacks}
    honest, scaled = (evaluate_robustness(Wrapped(plain_net, s), x, y, THREAT, **options) for s in (1.0, 128.0))
    assert scaled.accuracies()["ce"][0] > honest.accuracies()["ce"][0] + 0.2
    assert torch.equal(scaled.survived["margin"], honest.survived["margin"])  # a power of two rounds nothing
