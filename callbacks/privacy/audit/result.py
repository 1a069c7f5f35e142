"""What an audit of a privacy claim found."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from groundwire.callbacks.privacy.audit.functional import (
    auc,
    balanced_accuracy,
    epsilon_from_roc,
    one_run_audit,
    roc_curve,
    tpr_at_fpr,
)

Bound = Literal["one-run", "roc"]
_COLUMNS = (
    "attack",
    "members",
    "non-members",
    "AUC",
    "balanced accuracy %",
    "TPR at 1 % FPR %",
    "TPR at 0.1 % FPR %",
    "epsilon at least",
    "at delta",
    "confidence %",
    "bound",
)


@dataclass(frozen=True, kw_only=True)
class AttackResult:
    """How well one attack told members from non-members, and what that says about epsilon.

    Args:
        name: Of the attack.
        members: Records that were trained on.
        nonmembers: Records that were not.
        auc: Area under the ROC curve; 0.5 for an attack that knows nothing.
        balanced_accuracy: At the threshold where it is largest.
        tpr_at_1_percent: True positive rate at a false positive rate of 1 %; None below 100 non-members.
        tpr_at_01_percent: The same at 0.1 %; None below 1,000 non-members.
        epsilon_lower: Lower bound on epsilon, in nats.
        delta: At which epsilon is bounded.
        confidence: Probability that the bound holds.
        bound: How it was found: ``"one-run"`` or ``"roc"``.
        roc: False and true positive rates, float64, for the plot.
    """

    name: str
    members: int
    nonmembers: int
    auc: float
    balanced_accuracy: float
    tpr_at_1_percent: float | None
    tpr_at_01_percent: float | None
    epsilon_lower: float
    delta: float
    confidence: float
    bound: Bound
    roc: tuple[Tensor, Tensor] = field(repr=False, compare=False)

    @classmethod
    def from_scores(
        cls,
        name: str,
        scores: Tensor,
        member: Tensor,
        *,
        delta: float = 0.0,
        confidence: float = 0.95,
        bound: Bound = "one-run",
        guesses: list[int] | None = None,
    ) -> AttackResult:
        """Measure an attack by the scores it gave.

        Args:
            name: Of the attack.
            scores: Shape ``(n,)``; higher means more likely a member.
            member: Shape ``(n,)`` bool, with at least one member and one non-member.
            delta: At which epsilon is bounded, in [0, 1].
            confidence: Probability that the bound holds, in (0, 1).
            bound: ``"one-run"``, if every record was included by its own fair coin; ``"roc"``, if scores are independent.
            guesses: For the one-run bound; see :func:`one_run_audit`.

        Returns:
            The result.

        Raises:
            ValueError: If a number or shape is out of range, a score is NaN, or one of the groups is empty.

        Example:
            >>> import torch
            >>> member = torch.arange(200) % 2 == 0
            >>> AttackResult.from_scores("perfect", member.double(), member).auc
            1.0
        """
        if bound not in ("one-run", "roc"):
            raise ValueError(f"`bound` must be 'one-run' or 'roc', got {bound!r}.")
        scores, member = scores.detach().cpu(), member.cpu()
        inside, outside = scores[member], scores[~member]
        if bound == "one-run":
            epsilon = one_run_audit(scores, member, delta, confidence, guesses).epsilon
        else:
            epsilon = epsilon_from_roc(inside, outside, delta, confidence)
        return cls(
            name=name,
            members=len(inside),
            nonmembers=len(outside),
            auc=auc(inside, outside),
            balanced_accuracy=balanced_accuracy(inside, outside),
            tpr_at_1_percent=tpr_at_fpr(inside, outside, 0.01) if len(outside) >= 100 else None,
            tpr_at_01_percent=tpr_at_fpr(inside, outside, 0.001) if len(outside) >= 1000 else None,
            epsilon_lower=epsilon,
            delta=delta,
            confidence=confidence,
            bound=bound,
            roc=roc_curve(inside, outside)[:2],
        )

    def row(self) -> dict[str, str | float | int | None]:
        """The numbers, without the curve."""
        return {name: value for name, value in vars(self).items() if name != "roc"}


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """A claimed (epsilon, delta), and what attacks found.

    An attack can refute a claim; that none did proves nothing.

    Args:
        attacks: At least one.
        claimed_epsilon: In nats; None where nothing is claimed, infinite where no privacy is.
        claimed_delta: Of the claim; None is 0.

    Raises:
        ValueError: If there is no attack, or the claim is out of range.

    Example:
        >>> import torch
        >>> member = torch.arange(200) % 2 == 0
        >>> attack = AttackResult.from_scores("lookup", member.double(), member, delta=1e-5)
        >>> report = AuditReport(attacks=(attack,), claimed_epsilon=1.0, claimed_delta=1e-5)
        >>> report.refuted, round(report.epsilon_lower, 2)
        (True, 3.71)
    """

    attacks: tuple[AttackResult, ...]
    claimed_epsilon: float | None = None
    claimed_delta: float | None = None

    def __post_init__(self) -> None:
        if not self.attacks:
            raise ValueError("An audit needs at least one attack.")
        if self.claimed_epsilon is not None and not self.claimed_epsilon >= 0:
            raise ValueError(f"`claimed_epsilon` must be at least 0, got {self.claimed_epsilon}.")
        if self.claimed_delta is not None and not 0 <= self.claimed_delta <= 1:
            raise ValueError(f"`claimed_delta` must be in [0, 1], got {self.claimed_delta}.")

    @property
    def _strongest(self) -> AttackResult | None:
        """The attack with the largest bound, of those that can refute the claim."""
        delta = self.claimed_delta or 0.0
        able = [a for a in self.attacks if a.bound == "one-run" and a.delta >= delta]
        return max(able, key=lambda a: a.epsilon_lower, default=None)

    @property
    def epsilon_lower(self) -> float:
        """The largest lower bound, each at its own confidence; only ``"one-run"`` bounds hold whatever the records are."""
        return max(attack.epsilon_lower for attack in self.attacks)

    @property
    def refuted(self) -> bool:
        """Whether a lower bound is above the claim; False where there is no claim.

        A claim at a delta is one at every larger delta too: bounds at a smaller delta than the claim's do not count. Nor
        do ``"roc"`` bounds, which assume that members and others are alike but for the training, and independent. With
        several attacks, their confidences are the caller's to choose.
        """
        strongest = self._strongest
        return (
            self.claimed_epsilon is not None
            and strongest is not None
            and strongest.epsilon_lower > self.claimed_epsilon
        )

    @property
    def verdict(self) -> str:
        """The outcome in a sentence."""
        strongest = self._strongest
        if strongest is None:
            found = f"epsilon is estimated as at least {self.epsilon_lower:.3g}, if records are independent and alike"
        else:
            found = (
                f"epsilon is at least {strongest.epsilon_lower:.3g} at delta {strongest.delta:.3g}, with confidence "
            )
            found += f"{100 * strongest.confidence:.3g} %"
        if self.claimed_epsilon is None:
            return f"No claim was made; {found}."
        claim = f"({self.claimed_epsilon:.4g}, {self.claimed_delta or 0.0:.3g})-DP"
        return f"The claim of {claim} is {'REFUTED' if self.refuted else 'not refuted'}: {found}."

    def rows(self) -> list[dict[str, str | float | int | bool | None]]:
        """One row an attack: the claim, the attack's numbers, and whether it refutes the claim."""
        claim = {"claimed_epsilon": self.claimed_epsilon, "claimed_delta": self.claimed_delta}
        return [
            claim | attack.row() | {"refuted": AuditReport(attacks=(attack,), **claim).refuted}
            for attack in self.attacks
        ]

    def table(self) -> str:
        """The verdict and a Markdown table for people."""
        lines = [self.verdict, "", "| " + " | ".join(_COLUMNS) + " |", "|---" * len(_COLUMNS) + "|"]
        for a in self.attacks:
            cells = (
                a.name,
                str(a.members),
                str(a.nonmembers),
                f"{a.auc:.3f}",
                _percent(a.balanced_accuracy),
                _percent(a.tpr_at_1_percent),
                _percent(a.tpr_at_01_percent),
                f"{a.epsilon_lower:.3f}",
                f"{a.delta:g}",
                f"{100 * a.confidence:.4g}",
                a.bound,
            )
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"

    def to_csv(self, path: str | Path | None = None) -> str:
        """The rows as CSV.

        Args:
            path: File to write, its folder too; None for none.

        Returns:
            The text.
        """
        text = io.StringIO()
        rows = self.rows()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return _written(text.getvalue(), path)

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON; an infinite claim is the string ``"inf"``.

        Args:
            path: File to write, its folder too; None for none.

        Returns:
            The text.
        """
        epsilon = self.claimed_epsilon
        content: dict[str, Any] = {
            "claimed_epsilon": "inf" if epsilon == float("inf") else epsilon,
            "claimed_delta": self.claimed_delta,
            "epsilon_lower": self.epsilon_lower,
            "refuted": self.refuted,
            "attacks": [attack.row() for attack in self.attacks],
        }
        return _written(json.dumps(content, indent=1) + "\n", path)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text)
    return text
