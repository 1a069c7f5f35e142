from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from groundwire.callbacks.adversarial import FGSM, PGD, Attack, RobustnessResult, ThreatModel, evaluate_robustness
from groundwire.callbacks.adversarial.evaluation.checks import Check, huge_radius, masking_checks
from helpers.adversarial import EPS, THREAT, Wrapped, held_out

# ---------------------------------------------------------------- each rule at its threshold


def alive(right: int, n: int = 200) -> Tensor:
    """The first ``right`` of ``n`` samples."""
    return torch.arange(n) < right


def checks(
    survived: dict[str, int] | None = None, square: tuple[int, int] | None = None, classes: int = 10, **probes: int
) -> dict[str, Check]:
    """Of counts out of 200; what is not given passes."""
    usual = dict.fromkeys(
        ["fgsm", "pgd20_ce", "pgd20_margin", "pgd200_margin", "train_mode", "logits/10", "logits/100"], 100
    )
    usual |= {"huge": 0, "has_gradient": 200} | {name.replace("__", "/"): right for name, right in probes.items()}
    found = masking_checks(
        {name: alive(right) for name, right in ({"clean": 190, "white": 100} | (survived or {})).items()},
        {} if square is None else {"clean": alive(190), "fab-t": alive(square[0]), "square": alive(square[1])},
        {name: alive(right) for name, right in usual.items()},
        classes,
        huge_radius(THREAT, 64),
    )
    letters = {check.name[1]: check for check in found}
    assert "".join(letters) == "abcdefgh"
    return letters


def failed(found: dict[str, Check]) -> str:
    return "".join(letter for letter, check in found.items() if not check.passed)


def test_an_honest_network_passes_everything() -> None:
    found = checks({"noise": 180, "transfer": 150}, square=(100, 100))
    assert failed(found) == ""
    assert {check.verdict for check in found.values()} == {"PASS"}


@pytest.mark.parametrize(
    ("letter", "name", "edge", "worse"),
    [
        ("a", "fgsm", 98, -1),  # a point of 200 samples are two
        ("c", "huge", 30, 1),
        ("d", "pgd200_margin", 96, -1),
        ("e", "pgd20_margin", 94, -1),
        ("f", "has_gradient", 198, -1),
        ("g", "logits__10", 96, -1),
        ("g", "logits__100", 96, -1),
        ("h", "train_mode", 90, -1),
    ],
)
def test_a_rule_holds_up_to_its_threshold_and_no_further(letter: str, name: str, edge: int, worse: int) -> None:
    more = {"pgd200_margin": 94} if letter == "e" else {}
    assert failed(checks(**{name: edge} | more)) == ""
    assert failed(checks(**{name: edge + worse} | more)) == letter


@pytest.mark.parametrize("name", ["noise", "transfer"])
def test_black_boxes_may_be_half_a_point_stronger(name: str) -> None:
    assert failed(checks({name: 99})) == ""
    assert failed(checks({name: 98})) == "b"
    assert failed(checks({name: 98, "another": 98})) == "", "the white box is the worst of all white-box attacks"


def test_square_is_compared_with_what_the_attack_before_it_left() -> None:
    assert failed(checks(square=(80, 79))) == ""
    found = checks(square=(80, 78))
    assert failed(found) == "b"
    assert "Square breaks 1.0 % more" in found["b"].found


@pytest.mark.parametrize("base", range(5, 197, 7))
def test_thresholds_do_not_depend_on_rounding(base: int) -> None:
    """0.54 - 0.52 is 0.020000000000000018."""
    same = dict.fromkeys(["pgd20_ce", "pgd20_margin", "pgd200_margin", "fgsm", "train_mode"], base)
    weaker = {"logits__10": base, "logits__100": base}
    for name, points in (("fgsm", 2), ("pgd200_margin", 4), ("logits__10", 4)):
        here: dict[str, int] = same | weaker
        assert failed(checks({"white": base}, **here | {name: base - points})) == "", name
        assert failed(checks({"white": base}, **here | {name: base - points - 1})) != "", name


def test_checks_g_and_h_are_one_sided() -> None:
    assert failed(checks(logits__10=150, logits__100=190, train_mode=190)) == ""


def test_without_noise_and_transfer_nothing_can_be_stronger() -> None:
    assert failed(checks()) == ""
    assert checks()["b"].found == "white box 50.0 %"


@pytest.mark.parametrize(("classes", "edge"), [(2, 110), (4, 60), (100, 12)])
def test_the_huge_ball_is_compared_with_chance(classes: int, edge: int) -> None:
    assert failed(checks(classes=classes, huge=edge)) == ""
    assert failed(checks(classes=classes, huge=edge + 1)) == "c"


@pytest.mark.parametrize("eps", [0.01, 0.3, 0.7])
def test_the_huge_radius_is_half_of_the_box_or_of_its_diagonal(eps: float) -> None:
    assert huge_radius(ThreatModel(eps), 64) == 0.5
    assert huge_radius(ThreatModel(eps, lo=-1, hi=1), 64) == 1.0
    assert huge_radius(ThreatModel(eps, "l2"), 64) == 4.0
    assert huge_radius(ThreatModel(eps, "l2", lo=-1, hi=2), 9) == 4.5


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_huge_ball_has_a_grey_image_for_every_input_and_no_smaller_one_has(norm: Any) -> None:
    x = torch.cat([torch.rand(20, 64, generator=torch.Generator().manual_seed(0)).round(), torch.zeros(1, 64)])
    grey = torch.full_like(x, 0.5)
    huge = ThreatModel(huge_radius(ThreatModel(0.1, norm), 64), norm)
    torch.testing.assert_close(huge.project(grey, x), grey, rtol=0, atol=1e-6)
    assert (huge.scaled(0.99).project(grey, x) - grey).abs().max() > 1e-3


# ---------------------------------------------------------------- the checker's self-test


def evaluated(network: nn.Module, surrogate: nn.Module | None = None, n: int = 100, **options: Any) -> dict[str, Check]:
    x, y = held_out(n)
    attacks: dict[str, Attack] = {"fgsm": FGSM(), "pgd": PGD(20, num_restarts=2, early_stop=True)}
    result: RobustnessResult = evaluate_robustness(
        network, x, y, THREAT, attacks=attacks, sweep=(), probes=n, surrogate=surrogate, **options
    )
    return {check.name[1]: check for check in result.checks()}


def test_an_adversarially_trained_network_passes(robust_net: nn.Module, plain_net: nn.Module) -> None:
    found = evaluated(robust_net, plain_net, n=200)
    assert failed(found) == "", [check for check in found.values() if not check.passed]


def test_a_plainly_trained_network_is_weak_but_hides_nothing_in_its_logits(plain_net: nn.Module) -> None:
    assert not set("abcefg") & set(failed(evaluated(plain_net)))


def test_saturated_logits_are_found(plain_net: nn.Module) -> None:
    found = failed(evaluated(Wrapped(plain_net, scale=100)))
    assert set("eg") <= set(found)


@pytest.mark.parametrize("levels", [4, 8])
def test_quantised_inputs_are_found(levels: int, plain_net: nn.Module) -> None:
    found = evaluated(Wrapped(plain_net, levels=levels), plain_net)
    assert set("bf") <= set(failed(found))
    assert found["f"].found == "100.0 % of the samples have none"


def test_random_outputs_are_found(robust_net: nn.Module) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert failed(evaluated(Wrapped(robust_net, noise=0.15))) != ""


class EvaluationOnly(nn.Module):
    """Hides its gradients in evaluation mode alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.frozen = network, copy.deepcopy(network).eval()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.network(x) if self.training else self.frozen(torch.round(16 * x) / 16)
        return found


def test_a_network_that_hides_in_evaluation_mode_is_found(plain_net: nn.Module) -> None:
    net = EvaluationOnly(plain_net)
    # BatchNorm's running statistics, so that the modes differ in nothing else
    net.network = nn.Sequential(*(AlwaysEval(part) for part in plain_net))  # type: ignore[arg-type]
    assert "h" in failed(evaluated(net))


class AlwaysEval(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        self.part.eval()
        found: Tensor = self.part(x)
        return found


class Shattered(nn.Module):
    """A staircase over the input whose gradient points anywhere."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.network(x + 0.02 * torch.sin(3000 * x))
        return found


def test_shattered_gradients_are_found(plain_net: nn.Module) -> None:
    assert set("abd") & set(failed(evaluated(Shattered(plain_net), plain_net)))


def test_a_network_that_ignores_small_changes_fails_at_the_huge_ball(plain_net: nn.Module) -> None:
    """Quantised coarsely: nothing moves it, not even a ball that holds grey."""
    assert "c" in failed(evaluated(Wrapped(plain_net, levels=4)))


def test_probes_at_the_huge_radius_use_it(robust_net: nn.Module) -> None:
    x, y = held_out(20)
    sweep = (huge_radius(THREAT, 64) / EPS,)
    result = evaluate_robustness(robust_net, x, y, THREAT, attacks={}, sweep=sweep, probes=20)
    assert not result.probes["huge"].any()
    found = next(check for check in result.checks() if check.name.startswith("(c)"))
    assert "0.0 % at eps = 0.5, chance 10.0 %" in found.found
