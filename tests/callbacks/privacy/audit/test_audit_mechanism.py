"""Mechanisms of known epsilon, and broken ones, under the audit by gradient canaries."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from groundwire.callbacks.privacy.audit import AuditReport, audit_mechanism


def gaussian(noise_std: float, steps: int = 1, sample_rate: float = 1.0, seed: int = 0) -> Callable[[Tensor], Tensor]:
    g = torch.Generator().manual_seed(seed)

    def release(rows: Tensor) -> Tensor:
        total = torch.zeros(rows.shape[1])
        for _ in range(steps):
            drawn = rows[torch.rand(len(rows), generator=g) < sample_rate]
            total += drawn.sum(dim=0) + noise_std * torch.randn(rows.shape[1], generator=g)
        return total

    return release


def audit(release: Callable[[Tensor], Tensor], epsilon: float, **options: object) -> AuditReport:
    return audit_mechanism(release, 1000, claimed_epsilon=epsilon, **({"delta": 1e-5, "seed": 1} | options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("noise_multiplier", "epsilon"),
    [(0.5, 9.997), (1.0, 4.377), (2.0, 1.988), (4.0, 0.929)],  # exact, delta 1e-5: Balle and Wang 2018, Theorem 8
)
def test_the_gaussian_mechanism_is_not_refuted_and_one_with_a_quarter_of_its_noise_is(
    noise_multiplier: float, epsilon: float
) -> None:
    for seed in range(5):
        honest = audit(gaussian(3 * noise_multiplier, seed=seed), epsilon, max_grad_norm=3.0, seed=seed)
        assert not honest.refuted
        assert 0 < honest.epsilon_lower < epsilon
    if epsilon < 5:  # the largest bound of 1,000 canaries is 5.8
        assert audit(gaussian(noise_multiplier / 4), epsilon).refuted


def test_noise_that_is_scaled_to_another_norm_is_refuted() -> None:
    """The usual mistakes: a variance for a standard deviation, and no noise at all."""
    assert not audit(gaussian(100.0), 0.5, max_grad_norm=10.0).refuted
    assert audit(gaussian(1.0), 0.5, max_grad_norm=10.0).refuted
    assert audit(lambda rows: rows.sum(dim=0), 4.3).refuted


def test_noise_that_is_one_number_for_all_coordinates_is_refuted() -> None:
    g = torch.Generator().manual_seed(0)
    report = audit(lambda rows: rows.sum(dim=0) + 100.0 * torch.randn(1, generator=g), 4.3)
    assert report.refuted
    assert report.attacks[0].auc == 1.0


def test_many_steps_leak_more_than_one() -> None:
    one = audit(gaussian(4.0), 0.929)
    many = audit(gaussian(4.0, steps=50), 0.929)
    assert many.refuted
    assert many.epsilon_lower > one.epsilon_lower
    sampled = audit(gaussian(4.0, steps=50, sample_rate=0.1), 0.929)
    assert sampled.epsilon_lower < many.epsilon_lower


def test_rows_are_unit_vectors_at_the_norm_in_coordinates_of_their_own() -> None:
    seen = []

    def release(rows: Tensor) -> Tensor:
        seen.append(rows)
        return rows.sum(dim=0)

    report = audit_mechanism(release, 100, max_grad_norm=2.5, seed=3)
    (rows,) = seen
    assert (rows.norm(dim=1) == 2.5).all()
    assert torch.equal(rows @ rows.T, 6.25 * torch.eye(len(rows)))
    assert len(rows) == report.attacks[0].members == 100 - report.attacks[0].nonmembers
    again = audit_mechanism(release, 100, max_grad_norm=2.5, seed=3)
    assert again == report
    assert torch.equal(seen[1], rows)
    audit_mechanism(release, 100)
    audit_mechanism(release, 100)
    assert not torch.equal(seen[2].sum(dim=0), seen[3].sum(dim=0))  # fresh coins


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="`num_canaries`"):
        audit_mechanism(gaussian(1.0), 10)
    with pytest.raises(ValueError, match="`max_grad_norm`"):
        audit_mechanism(gaussian(1.0), max_grad_norm=0.0)
    with pytest.raises(ValueError, match=r"shape \(50,\), got \(25,\)"):
        audit_mechanism(lambda rows: rows.sum(dim=0)[:25], 50)
    with pytest.raises(ValueError, match="NaN"):
        audit_mechanism(lambda rows: rows.sum(dim=0) * float("nan"), 50)
