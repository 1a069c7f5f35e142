"""Membership inference on networks that learn by heart, and on some that never saw the records."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from groundwire.callbacks.privacy.audit import (
    AuditReport,
    ShadowStatistics,
    membership_audit,
    record_statistics,
    shadow_statistics,
)
from groundwire.callbacks.privacy.audit.scores import lira_online
from helpers.adversarial import digits
from helpers.edge import Classifier, trainer

N, POPULATION, FEATURES, CLASSES = 300, 100, 60, 3


def make_records() -> tuple[Tensor, Tensor]:
    """Some are easy and some are hard, whoever is trained on them."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N + POPULATION, FEATURES, generator=g)
    y = (x[:, :CLASSES] + torch.randn(N + POPULATION, CLASSES, generator=g)).argmax(dim=1)
    return x, y


RECORDS = make_records()
COMMON = torch.arange(N + POPULATION) >= N


def fit(indices: Tensor, seed: int) -> nn.Module:
    """Least squares: exact, fast, and as sure of what it saw as a linear network can be."""
    x, y = RECORDS[0][indices].double(), F.one_hot(RECORDS[1][indices], CLASSES).double()
    network = nn.Linear(FEATURES, CLASSES, bias=False).double()
    network.weight.data = 8 * torch.linalg.solve(x.T @ x + 1e-2 * torch.eye(FEATURES), x.T @ y).T
    return nn.Sequential(Double(), network, nn.Dropout(0.9))


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


@pytest.fixture(scope="module")
def shadows() -> ShadowStatistics:
    return shadow_statistics(fit, RECORDS, 64, population=COMMON, seed=1)


@pytest.fixture(scope="module")
def member() -> Tensor:
    return (torch.rand(N + POPULATION, generator=torch.Generator().manual_seed(5)) < 0.5) & ~COMMON


def by_name(report: AuditReport) -> dict[str, float]:
    return {attack.name: attack.auc for attack in report.attacks}


def test_what_a_network_says_of_records_is_asked_in_evaluation_mode() -> None:
    network = fit(torch.arange(N), 0).train()
    network[0].eval()
    phi = record_statistics(network, RECORDS, batch_size=64)
    p = network[1](RECORDS[0].double()).softmax(dim=1)[torch.arange(len(phi)), RECORDS[1]]
    torch.testing.assert_close(phi, (p / (1 - p)).log().detach())
    assert [part.training for part in network] == [False, True, True]
    with pytest.raises(TypeError, match="without `logits`"):
        record_statistics(Says("nothing"), (torch.zeros(2, 3), torch.zeros(2)))


class Says(nn.Module):
    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Any:
        return self.what


def test_every_record_is_in_half_of_the_shadows_and_the_population_in_none(shadows: ShadowStatistics) -> None:
    assert shadows.phi.shape == shadows.member.shape == (64, N + POPULATION)
    assert (shadows.member[:, ~COMMON].sum(dim=0) == 32).all()
    assert not shadows.member[:, COMMON].any()
    assert (shadows.member.sum(dim=1) == N // 2).all()
    together = (shadows.member[:, 0] == shadows.member[:, 1]).double().mean()
    assert abs(together - 0.5) < 0.3  # pairs of records do not always go together
    for k in (0, 37):
        again = record_statistics(fit(shadows.member[k].nonzero()[:, 0], 0), RECORDS)
        torch.testing.assert_close(again, shadows.phi[k])
    few = shadow_statistics(fit, RECORDS, 2, population=COMMON, seed=1)
    torch.testing.assert_close(few.phi, shadows.phi[:2])  # more networks leave the first as they were
    assert torch.equal(few.member, shadows.member[:2])


def test_fit_is_told_other_seeds() -> None:
    told = []

    def remember(indices: Tensor, seed: int) -> nn.Module:
        told.append((seed, len(indices)))
        return fit(indices, seed)

    odd = RECORDS[0][:101], RECORDS[1][:101]
    shadow_statistics(remember, odd, 4)
    assert len({seed for seed, _ in told}) == 4
    assert [count for _, count in told] == [50, 51, 50, 51]


def test_reference_networks_make_attacks_stronger(shadows: ShadowStatistics, member: Tensor) -> None:
    network = fit(member.nonzero()[:, 0], 0)
    report = membership_audit(
        network, member, RECORDS, shadows=shadows, population=COMMON, claimed_epsilon=0.1, delta=1e-5, bound="one-run"
    )
    found = by_name(report)
    assert list(found) == ["loss", "calibrated_loss", "lira_online", "lira_offline", "rmia"]
    assert found["loss"] > 0.6
    assert (
        min(found["calibrated_loss"], found["lira_online"], found["lira_offline"], found["rmia"]) > found["loss"] + 0.05
    )
    assert found["lira_online"] > 0.75
    kept = ~COMMON
    scores = lira_online(record_statistics(network, RECORDS)[kept], shadows.phi[:, kept], shadows.member[:, kept])
    assert found["lira_online"] == pytest.approx(roc_auc_score(member[kept].numpy(), scores.numpy()), abs=1e-12)
    assert report.refuted
    assert all(attack.confidence == pytest.approx(0.99) for attack in report.attacks)  # together 0.95
    assert all(attack.members + attack.nonmembers == N for attack in report.attacks)
    few = ShadowStatistics(shadows.phi[:2], shadows.member[:2])
    two = by_name(membership_audit(network, member, RECORDS, shadows=few, population=COMMON))
    assert list(two) == ["loss", "calibrated_loss", "rmia"]
    assert two["rmia"] > found["loss"]


def test_a_network_that_saw_none_of_the_records_gives_nothing_away(shadows: ShadowStatistics, member: Tensor) -> None:
    network = fit(COMMON.nonzero()[:, 0], 0)
    kept = ~COMMON
    among = ShadowStatistics(shadows.phi[:, kept], shadows.member[:, kept])
    phi = record_statistics(network, RECORDS)[kept]
    report = membership_audit(phi, member[kept], shadows=among, claimed_epsilon=0.0)
    assert list(by_name(report)) == ["loss", "calibrated_loss", "lira_online", "lira_offline"]  # rmia has no population
    members = int(member.sum())
    deviation = math.sqrt((N + 1) / (12 * members * (N - members)))  # of an AUC that knows nothing, Mann and Whitney
    assert all(abs(auc - 0.5) < 3 * deviation for auc in by_name(report).values())
    assert not report.refuted


def test_a_lookup_table_gives_all_away(member: Tensor) -> None:
    phi = torch.where(member, 30.0, -3.0)
    report = membership_audit(phi, member, claimed_epsilon=3.0, bound="one-run")
    assert report.attacks[0].auc == report.attacks[0].balanced_accuracy == 1.0
    assert report.refuted
    estimated = membership_audit(phi, member, claimed_epsilon=3.0)
    assert estimated.epsilon_lower > 3
    assert not estimated.refuted, "members and others may differ in more than the training"
    assert "estimated as at least" in estimated.verdict
    assert "if records are independent and alike" in estimated.verdict


def test_near_duplicates_refute_nothing_where_nothing_was_learnt() -> None:
    """Scores of clusters of 50 are alike, whole clusters are in or out: estimates exceed the claim, and do not count."""
    found = []
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        scores = torch.randn(20, generator=g).repeat_interleave(50) + 0.01 * torch.randn(1000, generator=g)
        member = (torch.rand(20, generator=g) < 0.5).repeat_interleave(50)
        found.append(membership_audit(scores, member, claimed_epsilon=1.0))
    assert sum(report.epsilon_lower > 1 for report in found) > 5
    assert not any(report.refuted for report in found)


def test_shadows_by_the_trainer_on_digits() -> None:
    x, y = (part[:200] for part in digits(flatten=True).train_data)

    def train(indices: Tensor, seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module = Classifier(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)))
            data = DataLoader(TensorDataset(x[indices], y[indices]), batch_size=25, shuffle=True)
            trainer(steps=120).fit(module, data)
        return module

    common = torch.arange(200) >= 160
    shadows = shadow_statistics(train, (x, y), 2, population=common)
    member = shadows.member[0]
    found = by_name(
        membership_audit(train(member.nonzero()[:, 0], 9), member, (x, y), shadows=shadows, population=common)
    )
    assert found["rmia"] > 0.6
    assert found["calibrated_loss"] > 0.6


def test_bad_input_is_refused(shadows: ShadowStatistics, member: Tensor) -> None:
    phi = torch.zeros(N + POPULATION)
    for call, message in (
        (lambda: membership_audit(nn.Identity(), member), "`records` are needed"),
        (lambda: membership_audit(phi, member.float()), "must be bool"),
        (lambda: membership_audit(phi, member[:5]), "must be bool of shape"),
        (lambda: membership_audit(phi[:5], member[:5], shadows=shadows), "same 5 records"),
        (lambda: membership_audit(phi, member, population=member), "are members"),
        (
            lambda: membership_audit(phi, member & COMMON, shadows=shadows, population=~member & ~COMMON),
            "shadow network's",
        ),
        (lambda: membership_audit(phi, member, attacks=["rmia"]), "needs `shadows`"),
        (lambda: membership_audit(phi, member, attacks=["rmia"], shadows=shadows), "needs a `population`"),
        (lambda: membership_audit(phi, member, attacks=["magic"]), "no attack 'magic'"),  # type: ignore[list-item]
        (lambda: membership_audit(phi, member, attacks=[]), "at least one attack"),
        (lambda: membership_audit(phi, torch.zeros_like(member)), "at least one"),
        (lambda: shadow_statistics(fit, RECORDS, 3), "must be even"),
        (lambda: shadow_statistics(fit, RECORDS, 2, population=torch.arange(N + POPULATION) > 0), "at least 2 records"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
