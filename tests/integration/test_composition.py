"""Constraints of different kinds in one Trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from groundwire.callbacks.information import DKD, CMIConstraint, CMIMonitor, Distillation, UndistillableCMI
from groundwire.plugins.compression import ErrorFeedback, TopK
from groundwire.plugins.edge import ADSGD, Digital, EdgeStrategy
from helpers.edge import Classifier, fit, mlp


def constraints() -> list[Any]:
    return [
        CMIMonitor(pictures=False),
        CMIConstraint(lam=0.5, warmup_epochs=0),
        Distillation(mlp(), method=DKD(warmup_epochs=0), check_teacher=False),
        UndistillableCMI(lam=0.5),
    ]


def test_information_constraints_go_over_the_air() -> None:
    strategy = lambda: EdgeStrategy(4, uplink=ADSGD(power=500.0, bandwidth=0.5), vectorize=True)
    both, t, _ = fit(strategy(), callbacks=constraints())
    air_only, _, _ = fit(strategy())
    terms_only, _, _ = fit(EdgeStrategy(4, vectorize=True), callbacks=constraints())
    assert torch.isfinite(both).all()
    assert not torch.equal(both, air_only)
    assert not torch.equal(both, terms_only)
    energy = t.strategy.ledger.totals["uplink/energy"]
    assert 0 < energy <= 500.0 * 6 * 4 * (1 + 1e-6), "the power constraint holds whatever the loss is"


def test_vectorised_devices_and_a_loop_agree_with_all_constraints_at_once() -> None:
    uplink = lambda: Digital(ErrorFeedback(TopK(density=0.5)))
    weights: list[Tensor] = [
        fit(EdgeStrategy(4, uplink=uplink(), vectorize=vectorize), callbacks=constraints(), steps=4)[0]
        for vectorize in (True, False)
    ]
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_the_terms_add_up_in_any_order() -> None:
    """Each adds to the loss of the step inside of it; only Distillation, which weighs it, depends on its place."""
    first = [CMIConstraint(lam=0.5, warmup_epochs=0), UndistillableCMI(lam=0.5)]
    second = [UndistillableCMI(lam=0.5), CMIConstraint(lam=0.5, warmup_epochs=0)]
    results = [fit("auto", Classifier(mlp()), callbacks=callbacks)[0] for callbacks in (first, second)]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
