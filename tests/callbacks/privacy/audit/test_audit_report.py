"""The report of an audit: its numbers, its verdict, its files and its picture."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from groundwire.callbacks.privacy.audit import AttackResult, AuditReport, plot_roc
from groundwire.callbacks.privacy.audit.functional import epsilon_from_roc, one_run_audit
from groundwire.callbacks.privacy.audit.plots import claimed_tpr

G = torch.Generator().manual_seed(0)
MEMBER = torch.rand(2500, generator=G) < 0.5
SCORES = MEMBER + 0.5 * torch.randn(2500, generator=G)


def attack(name: str = "loss", **options: Any) -> AttackResult:
    return AttackResult.from_scores(name, SCORES, MEMBER, **({"delta": 1e-5} | options))


def report(epsilon: float | None = 1.0, delta: float | None = 1e-5, **options: Any) -> AuditReport:
    attacks = attack(**options), attack("other", bound="roc", **options)
    return AuditReport(attacks=attacks, claimed_epsilon=epsilon, claimed_delta=delta)


def test_an_attack_is_measured_as_its_functions_say() -> None:
    found = attack(confidence=0.9)
    assert (found.members, found.nonmembers) == (int(MEMBER.sum()), int((~MEMBER).sum()))
    assert found.auc == pytest.approx(roc_auc_score(MEMBER.numpy(), SCORES.numpy()), abs=1e-9)
    assert found.auc == pytest.approx(norm.cdf(math.sqrt(2)), abs=0.02)  # two normals two deviations apart
    assert found.balanced_accuracy == pytest.approx(norm.cdf(1), abs=0.02)
    assert found.tpr_at_1_percent is not None
    assert found.tpr_at_01_percent is not None
    assert 0 < found.tpr_at_01_percent < found.tpr_at_1_percent < 0.6
    assert found.epsilon_lower == one_run_audit(SCORES, MEMBER, 1e-5, 0.9).epsilon
    roc = attack(bound="roc", confidence=0.9)
    assert roc.epsilon_lower == epsilon_from_roc(SCORES[MEMBER], SCORES[~MEMBER], 1e-5, 0.9)


@pytest.mark.parametrize(("nonmembers", "one", "tenth"), [(99, False, False), (100, True, False), (1000, True, True)])
def test_rates_at_a_false_positive_rate_need_enough_non_members(nonmembers: int, one: bool, tenth: bool) -> None:
    member = torch.arange(nonmembers + 50) >= nonmembers
    found = AttackResult.from_scores("loss", torch.arange(len(member)).double(), member)
    assert (found.tpr_at_1_percent == 1.0) == one
    assert (found.tpr_at_1_percent is None) != one
    assert (found.tpr_at_01_percent is None) != tenth


def test_a_claim_is_refuted_by_a_bound_above_it_only() -> None:
    bound = report().epsilon_lower
    assert bound > 1.0
    assert report(bound - 1e-3).refuted
    assert not report(bound).refuted
    assert not report(math.inf).refuted
    assert not report(None).refuted
    assert "REFUTED: epsilon is at least" in report(1.0).verdict
    assert report(1.0).verdict.endswith("at delta 1e-05, with confidence 95 %.")
    assert "(9, 1e-05)-DP is not refuted" in report(9.0).verdict
    assert "No claim" in report(None, None).verdict
    assert report(0.5).rows()[0]["refuted"] is True


def test_a_bound_at_a_smaller_delta_than_the_claim_s_refutes_nothing() -> None:
    assert report(1.0, None).refuted  # pure
    assert report(1.0, 1e-6).refuted
    assert not report(1.0, 1e-4).refuted


def test_table_csv_and_json_hold_the_same_numbers(tmp_path: Path) -> None:
    found = report()
    text = found.to_csv(tmp_path / "deep" / "audit.csv")
    assert (tmp_path / "deep" / "audit.csv").read_text() == text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["name"] for row in rows] == ["loss", "other"]
    assert float(rows[0]["auc"]) == found.attacks[0].auc
    assert float(rows[1]["epsilon_lower"]) == found.attacks[1].epsilon_lower
    content = json.loads(found.to_json(tmp_path / "audit.json"))
    assert json.loads((tmp_path / "audit.json").read_text()) == content
    assert content["refuted"] is True
    assert content["attacks"][0] == found.attacks[0].row()
    assert json.loads(report(math.inf).to_json())["claimed_epsilon"] == "inf"
    lines = found.table().splitlines()
    assert lines[0] == found.verdict
    assert len({line.count("|") for line in lines[2:]}) == 1
    assert f"| {found.attacks[0].epsilon_lower:.3f} |" in lines[4]
    few = AuditReport(attacks=(replace(found.attacks[0], tpr_at_1_percent=None, tpr_at_01_percent=None),))
    assert "|  |  |" in few.table()


def test_a_report_is_frozen_and_checked() -> None:
    found = report()
    with pytest.raises(FrozenInstanceError):
        found.claimed_epsilon = 2.0  # type: ignore[misc]
    with pytest.raises(ValueError, match="at least one attack"):
        AuditReport(attacks=())
    with pytest.raises(ValueError, match="`claimed_epsilon`"):
        replace(found, claimed_epsilon=-1.0)
    with pytest.raises(ValueError, match="`claimed_epsilon`"):
        replace(found, claimed_epsilon=math.nan)
    with pytest.raises(ValueError, match="`claimed_delta`"):
        replace(found, claimed_delta=2.0)
    with pytest.raises(ValueError, match="`bound`"):
        attack(bound="guess")
    with pytest.raises(ValueError, match="at least one"):
        AttackResult.from_scores("loss", torch.rand(30), torch.ones(30) > 0)


# ---------------------------------------------------------------- the picture


def test_the_picture_shows_curves_and_the_claim_s_region() -> None:
    fig, ax = plot_roc(report())
    assert isinstance(fig, Figure)
    assert ax.get_xscale() == ax.get_yscale() == "log"
    lines = {line.get_label().split(":")[0]: line for line in ax.get_lines()}
    assert set(lines) == {"claim", "loss", "other", "guessing"}
    x, y = (np.asarray(values) for values in lines["claim"].get_data())
    np.testing.assert_allclose(y[x < 0.1], np.e * x[x < 0.1] + 1e-5)
    assert (np.asarray(lines["loss"].get_ydata()) > 0).all()
    assert len(ax.collections) == 1
    assert "%" in ax.get_xlabel()
    assert not plot_roc(report(None), ax=Figure().subplots())[1].collections


@pytest.mark.parametrize("epsilon", [0.7, 3.0])
def test_the_gaussian_mechanism_touches_the_region_of_its_claim(epsilon: float) -> None:
    mu = 0.5 * epsilon  # sensitivity over noise
    delta = norm.cdf(mu / 2 - epsilon / mu) - np.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)  # Balle and Wang 2018
    fpr = np.linspace(0, 1, 20_001)
    slack = claimed_tpr(fpr, epsilon, delta) - norm.cdf(norm.ppf(fpr) + mu)
    assert 0 <= slack.min() + 1e-12 < 1e-5
    assert (claimed_tpr(fpr, epsilon, 0.5 * delta) - norm.cdf(norm.ppf(fpr) + mu)).min() < -1e-4


def test_the_region_of_extreme_claims() -> None:
    fpr = np.linspace(0, 1, 11)
    np.testing.assert_allclose(claimed_tpr(fpr, 0.0, 0.0), fpr, atol=1e-12)
    assert (claimed_tpr(fpr, math.inf, 0.0) == 1).all()
