"""What an evaluation of robustness found, sample by sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from groundwire.callbacks.adversarial.evaluation.checks import Check, huge_radius, masking_checks
from groundwire.callbacks.adversarial.functional import wilson_interval
from groundwire.callbacks.adversarial.threat import ThreatModel

AUTOATTACK = "autoattack"


@dataclass(frozen=True)
class Examples:
    """Some inputs, and what an attack made of them.

    Args:
        clean: Pixels ``(n, ...)``.
        adversarial: The same after the attack.
        target: Labels ``(n,)``.
        clean_label: What the network says of the first.
        adversarial_label: What it says of the second.
        lo: Smallest valid pixel, drawn black.
        hi: Largest valid pixel, drawn white.
    """

    clean: Tensor
    adversarial: Tensor
    target: Tensor
    clean_label: Tensor
    adversarial_label: Tensor
    lo: float = 0.0
    hi: float = 1.0


@dataclass(frozen=True, kw_only=True)
class RobustnessResult:
    """Which samples withstood which attack.

    Args:
        threat: What the attacker might do.
        num_classes: Classes.
        input_size: Numbers in an input.
        seed: Of the attacks.
        worst_case: Which samples withstood every attack in the ball, whatever it was run for: also AutoAttack, the sweep up
            to eps and the probes for the checks, each on the samples that it saw. ``(n,)`` bool.
        survived: By attack, first ``"clean"``, whether each sample is still classified right, ``(n,)`` bool on the CPU.
        autoattack: The same for the parts of AutoAttack, on the first samples; empty if it did not run.
        sweep: By radius in pixel units, whether each sample survived.
        probes: What the checks for masked gradients need, on the first samples; empty if they did not run.
        examples: For the picture.
    """

    threat: ThreatModel
    num_classes: int
    input_size: int
    seed: int
    worst_case: Tensor
    survived: dict[str, Tensor]
    autoattack: dict[str, Tensor] = field(default_factory=dict)
    sweep: dict[float, Tensor] = field(default_factory=dict)
    probes: dict[str, Tensor] = field(default_factory=dict)
    examples: Examples | None = None

    @property
    def num_samples(self) -> int:
        """Samples that were attacked."""
        return len(self.survived["clean"])

    @property
    def robust_acc(self) -> float:
        """The headline: the share of samples that withstood every attack."""
        return float(self.worst_case.double().mean())

    def checks(self) -> list[Check]:
        """The checks for masked gradients; empty if their probes did not run."""
        if not self.probes:
            return []
        huge = huge_radius(self.threat, self.input_size)
        return masking_checks(self.survived, self.autoattack, self.probes, self.num_classes, huge)

    def accuracies(self) -> dict[str, tuple[float, float, float, int]]:
        """Accuracy, both ends of its 95 % interval, and samples, by attack; at the end the worst case."""
        found = {name: _accuracy(alive) for name, alive in self.survived.items()}
        if self.autoattack:
            found[AUTOATTACK] = _accuracy(list(self.autoattack.values())[-1])
        return found | {"worst_case": _accuracy(self.worst_case)}

    def as_dict(self) -> dict[str, Any]:
        """Everything but the samples themselves, as plain numbers."""
        threat: dict[str, Any] = {
            "norm": self.threat.norm,
            "eps": self.threat.eps,
            "lo": self.threat.lo,
            "hi": self.threat.hi,
        }
        threat |= {"mean": self.threat.mean, "std": self.threat.std}
        accuracies = {
            name: {"acc": acc, "low": low, "high": high, "n": n}
            for name, (acc, low, high, n) in self.accuracies().items()
        }
        return {
            "threat": threat,
            "seed": self.seed,
            "num_samples": self.num_samples,
            "robust_acc": self.robust_acc,
            "accuracies": accuracies,
            "autoattack": {name: _accuracy(alive)[0] for name, alive in self.autoattack.items()},
            "sweep": [{"eps": eps, "acc": _accuracy(alive)[0]} for eps, alive in self.sweep.items()],
            "checks": [
                {"check": c.name, "passed": c.passed, "threshold": c.threshold, "found": c.found} for c in self.checks()
            ],
        }

    def as_markdown(self) -> str:
        """The tables for people."""
        ball = f"{self.threat.norm}, eps = {self.threat.eps:g}"
        lines = [
            f"Robust accuracy {100 * self.robust_acc:.1f} %: {self.num_samples} samples against the worst of all attacks",
            f"({ball}, seed {self.seed})",
            "",
            "| attack | accuracy % | 95 % interval | samples |",
            "|---|---|---|---|",
        ]
        for name, (acc, low, high, n) in self.accuracies().items():
            lines.append(f"| {name} | {100 * acc:.1f} | {100 * low:.1f} to {100 * high:.1f} | {n} |")
        if self.sweep:
            lines += ["", "| eps | " + " | ".join(f"{eps:g}" for eps in self.sweep) + " |"]
            lines.append("|---" * (len(self.sweep) + 1) + "|")
            lines.append(
                "| accuracy % | " + " | ".join(f"{100 * _accuracy(a)[0]:.1f}" for a in self.sweep.values()) + " |"
            )
        checks = self.checks()
        if checks:
            lines += ["", "| check for masked gradients | | found | fails if |", "|---|---|---|---|"]
            lines += [f"| {c.name} | {c.verdict} | {c.found} | {c.threshold} |" for c in checks]
        return "\n".join(lines) + "\n"

    @staticmethod
    def merged(parts: Sequence[RobustnessResult]) -> RobustnessResult:
        """The results of several processes as one."""
        first = parts[0]
        return RobustnessResult(
            threat=first.threat,
            num_classes=first.num_classes,
            input_size=first.input_size,
            seed=first.seed,
            worst_case=torch.cat([part.worst_case for part in parts]),
            survived=_joined([part.survived for part in parts]),
            autoattack=_joined([part.autoattack for part in parts]),
            sweep=_joined([part.sweep for part in parts]),
            probes=_joined([part.probes for part in parts]),
            examples=first.examples,
        )


def _accuracy(alive: Tensor) -> tuple[float, float, float, int]:
    right, n = int(alive.sum()), len(alive)
    return (right / n if n else float("nan"), *wilson_interval(right, n), n)


def _joined(parts: list[dict[Any, Tensor]]) -> dict[Any, Tensor]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: torch.cat([part[name] for part in parts if name in part]) for name in names}
