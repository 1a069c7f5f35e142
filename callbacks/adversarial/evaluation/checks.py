"""Signs that a model only hides its gradients: each a rule with a number, passed or failed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from groundwire.callbacks.adversarial.threat import ThreatModel

_ROUNDING = 1e-9  # a share that is exactly at a threshold passes

WEAKENED = ("logits/10", "logits/100")


@dataclass(frozen=True)
class Check:
    """One rule and what became of it.

    Args:
        name: What it looks at.
        passed: Whether the model may pass for robust, as far as this rule goes.
        found: The numbers.
        threshold: When it fails.
    """

    name: str
    passed: bool
    found: str
    threshold: str

    @property
    def verdict(self) -> str:
        """PASS or FAIL."""
        return "PASS" if self.passed else "FAIL"


def huge_radius(threat: ThreatModel, size: int) -> float:
    """A radius at which every input can be made the same grey one, so that no network can tell them apart.

    Args:
        threat: The ball's norm, and the box.
        size: Numbers in an input.

    Returns:
        Half of the box's width (linf), or half of its diagonal (l2).
    """
    half = (threat.hi - threat.lo) / 2
    return half if threat.norm == "linf" else half * math.sqrt(size)


def masking_checks(
    survived: Mapping[str, Tensor],
    autoattack: Mapping[str, Tensor],
    probes: Mapping[str, Tensor],
    num_classes: int,
    huge: float,
) -> list[Check]:
    """Look for the usual signs of obfuscated gradients.

    Args:
        survived: By attack, which samples are still right.
        autoattack: The same for the parts of AutoAttack, or empty.
        probes: The runs made for these checks, on the first samples.
        num_classes: Classes; chance is one of them.
        huge: Radius of the probe ``"huge"``, see :func:`huge_radius`.

    Returns:
        The checks, in the order of their letters.

    Reference:
        Athalye et al., "Obfuscated Gradients Give a False Sense of Security", ICML 2018. arXiv:1802.00420
        Carlini et al., "On Evaluating Adversarial Robustness", 2019. arXiv:1902.06705
    """
    probe = {name: _acc(alive) for name, alive in probes.items()}
    return [
        Check(
            "(a) many steps beat one",
            probe["pgd20_ce"] - probe["fgsm"] <= 0.01 + _ROUNDING,
            f"FGSM {_pc(probe['fgsm'])}, PGD-20 {_pc(probe['pgd20_ce'])}",
            "FGSM is stronger by more than 1 point",
        ),
        _black_box(survived, autoattack),
        Check(
            "(c) a huge ball leaves nothing",
            probe["huge"] <= 1 / num_classes + 0.05 + _ROUNDING,
            f"{_pc(probe['huge'])} at eps = {huge:g}, chance {_pc(1 / num_classes)}",
            "accuracy there is above chance + 5 points",
        ),
        Check(
            "(d) the attack has converged",
            probe["pgd20_margin"] - probe["pgd200_margin"] <= 0.02 + _ROUNDING,
            f"margin PGD-20 {_pc(probe['pgd20_margin'])}, PGD-200 {_pc(probe['pgd200_margin'])}",
            "200 steps lower accuracy by more than 2 points",
        ),
        Check(
            "(e) cross entropy does not saturate",
            probe["pgd20_ce"] - probe["pgd20_margin"] <= 0.03 + _ROUNDING,
            f"PGD-20 with CE {_pc(probe['pgd20_ce'])}, with margin {_pc(probe['pgd20_margin'])}",
            "CE is weaker by more than 3 points",
        ),
        Check(
            "(f) inputs have gradients",
            1 - probe["has_gradient"] <= 0.01 + _ROUNDING,
            f"{_pc(1 - probe['has_gradient'])} of the samples have none",
            "more than 1 % have none",
        ),
        Check(
            "(g) smaller logits do not help the attack",
            probe["pgd20_ce"] - min(probe[name] for name in WEAKENED) <= 0.02 + _ROUNDING,
            f"PGD-20 {_pc(probe['pgd20_ce'])}, logits / 10 {_pc(probe[WEAKENED[0]])}, / 100 {_pc(probe[WEAKENED[1]])}",
            "dividing the logits lowers accuracy by more than 2 points",
        ),
        Check(
            "(h) training mode does not help the attack",
            probe["pgd20_ce"] - probe["train_mode"] <= 0.05 + _ROUNDING,
            f"PGD-20 in training mode {_pc(probe['train_mode'])}, in evaluation mode {_pc(probe['pgd20_ce'])}",
            "it is stronger in training mode by more than 5 points",
        ),
    ]


def _black_box(survived: Mapping[str, Tensor], autoattack: Mapping[str, Tensor]) -> Check:
    """Noise and transfer against the best white-box attack; Square against what white-box attacks left."""
    acc = {name: _acc(alive) for name, alive in survived.items()}
    gradient_free: list[str] = [name for name in ("noise", "transfer") if name in acc]
    white = torch.stack([alive for name, alive in survived.items() if name not in gradient_free])
    white_acc = _acc(white.all(dim=0))
    gains = {name: white_acc - acc[name] for name in gradient_free}
    found = [f"white box {_pc(white_acc)}", *(f"{name} {_pc(acc[name])}" for name in gradient_free)]
    if "square" in autoattack:
        names = list(autoattack)
        before = autoattack[names[names.index("square") - 1]]
        gains["square"] = _acc(before) - _acc(autoattack["square"])
        found.append(f"Square breaks {_pc(gains['square'])} more than APGD and FAB")
    worst = max(gains.values(), default=0.0)
    return Check(
        "(b) gradients beat black boxes",
        worst <= 0.005 + _ROUNDING,
        ", ".join(found),
        "a black-box attack is stronger by more than 0.5 points",
    )


def _acc(alive: Tensor) -> float:
    return float(alive.double().mean()) if len(alive) else float("nan")


def _pc(share: float) -> str:
    return f"{100 * share:.1f} %"
