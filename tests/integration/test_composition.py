"""Constraints of different kinds in one Trainer."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from groundwire.callbacks.adversarial import (
    PGD,
    TRADES,
    AdversarialTraining,
    ConfinedPolytopes,
    CornerSearch,
    ThreatModel,
)
from groundwire.callbacks.information import (
    DKD,
    KD,
    CMIConstraint,
    CMIMonitor,
    Distillation,
    LabelSmoothing,
    MaximumCMI,
    SquaredErrorTeacher,
    UndistillableCMI,
)
from groundwire.plugins.compression import ErrorFeedback, TopK
from groundwire.plugins.edge import ADSGD, Digital, DPOverTheAir, EdgeStrategy, PoissonSample
from helpers.edge import Classifier, Rounds, check_resume, fit, loader, mlp


def constraints() -> list[Any]:
    return [
        CMIMonitor(pictures=False),
        CMIConstraint(lam=0.5, warmup_epochs=0),
        UndistillableCMI(lam=0.5),
        Distillation(mlp(), method=DKD(warmup_epochs=0), check_teacher=False),
        LabelSmoothing(0.1),
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


BALL = ThreatModel(0.1, lo=-10.0, hi=10.0)


@pytest.mark.parametrize(
    "hardened",
    [
        lambda: AdversarialTraining(BALL, PGD(3, track="last")),
        lambda: TRADES(BALL, attack=PGD(3, loss="kl", start="gaussian", track="last")),
        lambda: ConfinedPolytopes(BALL, search=CornerSearch(2, 2, distance="kl")),
    ],
    ids=["PGD-AT", "TRADES", "CAP"],
)
def test_hardened_and_constrained_models_go_over_the_air(hardened: Any) -> None:
    """Devices attack their own model; what they learn is constrained, and meets in the air."""
    strategy = lambda vectorize: EdgeStrategy(4, uplink=ADSGD(power=500.0, bandwidth=0.5), vectorize=vectorize)
    callbacks = lambda: [CMIConstraint(lam=0.5, warmup_epochs=0), UndistillableCMI(lam=0.5), hardened()]
    everything, t, _ = fit(strategy(True), callbacks=callbacks(), steps=4)
    in_a_loop, _, _ = fit(strategy(False), callbacks=callbacks(), steps=4)
    torch.testing.assert_close(everything, in_a_loop, rtol=1e-4, atol=1e-5)
    without, _, _ = fit(strategy(True), callbacks=callbacks()[:-1], steps=4)
    assert not torch.equal(everything, without)
    assert 0 < t.strategy.ledger.totals["uplink/energy"] <= 500.0 * 4 * 4 * (1 + 1e-6)


def test_the_terms_add_up_in_any_order() -> None:
    """Each adds to the loss of the step inside of it."""
    first = [CMIConstraint(lam=0.5, warmup_epochs=0), UndistillableCMI(lam=0.5)]
    second = [UndistillableCMI(lam=0.5), CMIConstraint(lam=0.5, warmup_epochs=0)]
    results = [fit("auto", Classifier(mlp()), callbacks=callbacks)[0] for callbacks in (first, second)]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        (LabelSmoothing(), CMIConstraint()),
        (SquaredErrorTeacher(), Distillation(mlp())),
        (Distillation(mlp()), CMIConstraint()),
        (LabelSmoothing(), SquaredErrorTeacher()),
        (Distillation(mlp(), name="a"), Distillation(mlp(), name="b")),
    ],
)
def test_terms_are_not_silently_weighed_or_replaced_with_the_own_loss(outer: Any, inner: Any) -> None:
    with pytest.raises(
        MisconfigurationException, match=rf"{type(outer).__name__} .*{type(inner).__name__}.* after them"
    ):
        fit("auto", callbacks=[outer, inner], steps=1)


def test_two_of_a_class_go_by_their_names() -> None:
    teachers = [
        Distillation(mlp(), None, method, name=name, check_teacher=False)
        for name, method in (("first", DKD()), ("second", KD()))
    ]
    monitors = [CMIMonitor(temperature, pictures=False, name=f"T{temperature}") for temperature in (1, 4)]
    weights, t, _ = fit("auto", callbacks=[*monitors, *teachers])
    assert torch.isfinite(weights).all()
    assert {"first/tckd", "second/kd"} <= set(t.callback_metrics)
    assert len({callback.state_key for callback in [*teachers, *monitors]}) == 4


class Endless:
    def __iter__(self) -> Any:
        return itertools.cycle(loader())


@pytest.mark.parametrize(
    ("callback", "setting"),
    [
        (lambda: CMIConstraint(), "warmup_epochs=1.0"),
        (lambda: CMIConstraint(warmup_epochs=0, q_update="epoch"), "q_update='epoch'"),
        (lambda: SquaredErrorTeacher(ce_epochs=1), "ce_epochs=1"),
        (lambda: Distillation(mlp(), method=DKD(warmup_epochs=20)), "warmup_epochs=20"),
        (lambda: MaximumCMI(), "one pass"),
    ],
)
def test_what_counts_epochs_refuses_a_loader_without_an_end(callback: Any, setting: str) -> None:
    with pytest.raises(MisconfigurationException, match=setting):
        fit("auto", callbacks=[callback()], data=Endless(), steps=1)
    fit("auto", callbacks=[CMIConstraint(warmup_epochs=0)], data=Endless(), steps=1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_any_integer_type_will_do(dtype: torch.dtype) -> None:
    class Casts(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return torch.nn.functional.cross_entropy(self(batch[0]), batch[1].long())

    batches = [(x, y) for x, y in loader()]
    results = [
        fit(
            "auto", Casts(mlp()), data=Rounds(*[(x, y.to(kind)) for x, y in batches]), callbacks=constraints(), steps=3
        )[0]
        for kind in (dtype, torch.int64)
    ]
    assert torch.equal(*results)


def test_a_float32_teacher_serves_a_student_in_double_precision() -> None:
    teacher = mlp()
    callback = Distillation(teacher, check_teacher=False)
    weights, _, _ = fit("auto", callbacks=[callback], precision="64-true")
    assert torch.isfinite(weights).all()
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}


def test_a_hardened_model_goes_over_the_air_in_private_and_resumes() -> None:
    """Devices attack their own model, the receiver's noise hides them, and a killed run goes on as if it had not been."""
    build = lambda: EdgeStrategy(
        4, scheduler=PoissonSample(0.75), uplink=DPOverTheAir(1.0, noise_multiplier=4.0, target_delta=1e-3, power=10.0)
    )
    hardened = lambda: [AdversarialTraining(BALL, PGD(2, track="last"))]
    final, t, losses = fit(build(), callbacks=hardened(), log_every_n_steps=1)
    assert torch.isfinite(final).all()
    spent = t.strategy.privacy_spent()
    assert float(t.callback_metrics["privacy/epsilon"]) == spent.epsilon
    assert 0 < spent.epsilon < 10
    only_private, _, _ = fit(build())
    only_hardened, _, _ = fit(EdgeStrategy(4, scheduler=PoissonSample(0.75)), callbacks=hardened())
    assert not torch.equal(final, only_private)
    assert not torch.equal(final, only_hardened)
    check_resume(build, Classifier(mlp()), losses, final, t.strategy, hardened, log_every_n_steps=1)
