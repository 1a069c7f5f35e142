"""The audit of a mechanism that turns rows into a noisy sum, with gradients of one's own making."""

from __future__ import annotations

import secrets
from collections.abc import Callable

import torch
from torch import Tensor

from groundwire.callbacks.privacy.audit.result import AttackResult, AuditReport
from groundwire.plugins.random import stream


def audit_mechanism(
    release: Callable[[Tensor], Tensor],
    num_canaries: int = 1000,
    *,
    max_grad_norm: float = 1.0,
    claimed_epsilon: float | None = None,
    delta: float = 0.0,
    confidence: float = 0.95,
    seed: int | None = None,
) -> AuditReport:
    """Test what a mechanism claims about one row, in one run, by rows that are as easy to see as any can be.

    Canary j is ``max_grad_norm`` times the j-th unit vector, a gradient at the clipping norm in a coordinate of its own;
    each is among the rows by its own fair coin. The mechanism gets the rows and gives their noisy sum, and the j-th
    coordinate of that says whether canary j was in. It audits anything of that kind: clipping with noise, a compressor
    with dither, a whole run of steps with subsampling, whose releases the mechanism adds up.

    Canaries do not disturb each other, so more of them only tighten the bound. They cost ``m^2`` numbers.

    Args:
        release: From rows ``(k, m)``, float32, k of the m canaries in an order that says nothing, to the noisy sum,
            ``(m,)``. It must not look at the coins, nor reseed torch's global stream for them.
        num_canaries: Canaries m, at least 20.
        max_grad_norm: L2 norm of each row, above 0.
        claimed_epsilon: For adding or removing a row, in nats; None where nothing is claimed.
        delta: Of the claim and of the bound, in [0, 1].
        confidence: Probability that the bound holds, in (0, 1).
        seed: Of the coins; by default from the operating system.

    Returns:
        The report, with one attack.

    Raises:
        ValueError: If a number is out of range, or the release has another shape.

    Example:
        >>> audit_mechanism(lambda rows: rows.sum(dim=0), 200, claimed_epsilon=3.0, seed=0).refuted
        True

    Reference:
        Steinke, Nasr, Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023, Section 6: gradient
        canaries. arXiv:2305.08846
    """
    if num_canaries < 20:
        raise ValueError(f"`num_canaries` must be at least 20, got {num_canaries}.")
    if not max_grad_norm > 0:
        raise ValueError(f"`max_grad_norm` must be above 0, got {max_grad_norm}.")
    coins = stream(secrets.randbits(63) if seed is None else seed, purpose="audit/coins")
    included = torch.rand(num_canaries, generator=coins) < 0.5
    chosen = included.nonzero()[:, 0]
    rows = torch.zeros(len(chosen), num_canaries)
    rows[torch.arange(len(chosen)), chosen] = max_grad_norm
    released = release(rows)
    if released.shape != (num_canaries,):
        raise ValueError(
            f"The mechanism must give the noisy sum of the rows, shape ({num_canaries},), got {tuple(released.shape)}."
        )
    attack = AttackResult.from_scores(
        "gradient canaries", released, included, delta=delta, confidence=confidence, bound="one-run"
    )
    return AuditReport(attacks=(attack,), claimed_epsilon=claimed_epsilon, claimed_delta=delta)
