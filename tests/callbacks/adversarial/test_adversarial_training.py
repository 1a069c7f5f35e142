from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from groundwire.callbacks.adversarial import (
    FGSM,
    MART,
    PGD,
    TRADES,
    AdaptiveKnowledgeAmalgamation,
    AdversarialTraining,
    Attack,
    ConfinedPolytopes,
    RandomFGSM,
    ThreatModel,
    adversarial_training,
)
from groundwire.callbacks.logits import LogitsSource
from groundwire.plugins.edge import Aggregator, EdgeStrategy, LocalSGD, Received, Round
from groundwire.plugins.random import stream
from helpers.callbacks import check_step_callback
from helpers.edge import (
    CLASSES,
    FEATURES,
    Classifier,
    Killed,
    Losses,
    Rounds,
    Stateful,
    fit,
    loader,
    mlp,
    trainer,
    weights,
)

EPS, BOX = 0.3, 6.0  # the data of `loader()` are normal numbers
THREAT = ThreatModel(eps=EPS, lo=-BOX, hi=BOX)
EXACT: dict[str, Any] = {"precision": "64-true"}


class Sees(Classifier):
    """Remembers the batches that its own step sees, and what its network sees."""

    def __init__(self, network: nn.Module | None = None, **options: Any) -> None:
        super().__init__(network if network is not None else mlp(), **options)
        self.batches: list[Any] = []
        self.inputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:  # the attack asks it in evaluation mode
            self.inputs.append(x.detach().clone())
        return super().forward(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.batches.append(batch)
        return super().training_step(batch, batch_idx)


def within(u: Tensor, x: Tensor, eps: float = EPS) -> Tensor:
    return torch.maximum(torch.minimum(u, x + eps), x - eps).clamp(-BOX, BOX)


def ascend(network: nn.Module, x: Tensor, y: Tensor, start: Tensor, size: float, steps: int) -> Tensor:
    """Sign ascent on the cross entropy, with nothing but autograd."""
    u = within(start, x)
    for _ in range(steps):
        u = u.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(network(u), y), u)
        u = within(u + size * gradient.sign(), x)
    return u.detach()


def uniform_start(x: Tensor, step: int, name: str = "adversarial_training") -> Tensor:
    """From the documented stream of a step."""
    g = stream(0, purpose=f"adversarial/{name}", round=step, device_id=0)
    return x + EPS * (2 * torch.rand(x.shape, generator=g, dtype=x.dtype) - 1)


def train_by_hand(attack: Callable[[nn.Module, Tensor, Tensor, int], Tensor], steps: int = 4, every: int = 1) -> Tensor:
    """Plain SGD on adversarial inputs, float64; the mean gradient of ``every`` batches a step."""
    network = mlp().double()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for i, (x, y) in enumerate(loader()):
        if i == steps:
            break
        found = attack(network, x.double(), y, i)
        (F.cross_entropy(network(found), y) / every).backward()
        if (i + 1) % every == 0:
            optimizer.step()
            optimizer.zero_grad()
    return weights(network)


@pytest.mark.parametrize(
    "build",
    [
        lambda: AdversarialTraining(THREAT, PGD(num_steps=2, track="last")),
        lambda: AdversarialTraining(THREAT, PGD(num_steps=2, loss="margin")),
        lambda: AdversarialTraining(THREAT, RandomFGSM(), overfit_guard=0.9),
        lambda: AdversarialTraining(ThreatModel(0.8, norm="l2", lo=-BOX, hi=BOX), FGSM(), warmup_epochs=1),
    ],
    ids=["pgd", "best", "fast", "l2"],
)
def test_it_is_a_step_callback(build: Callable[[], AdversarialTraining]) -> None:
    check_step_callback(build)


def test_trains_as_adversarial_training_written_by_hand() -> None:
    cases: list[tuple[Attack, Callable[[nn.Module, Tensor, Tensor, int], Tensor]]] = [
        (FGSM(), lambda net, x, y, i: ascend(net, x, y, x, EPS, 1)),
        (PGD(3, step_size=0.15, track="last"), lambda net, x, y, i: ascend(net, x, y, uniform_start(x, i), 0.15, 3)),
        (PGD(5, start="clean", track="last"), lambda net, x, y, i: ascend(net, x, y, x, 2.5 * EPS / 5, 5)),
        (RandomFGSM(), lambda net, x, y, i: ascend(net, x, y, uniform_start(x, i), 1.25 * EPS, 1)),
    ]
    for attack, by_hand in cases:
        found, _, _ = fit(
            "auto", Classifier(mlp(), "SGD", lr=0.1), callbacks=[AdversarialTraining(THREAT, attack)], steps=4, **EXACT
        )
        torch.testing.assert_close(found, train_by_hand(by_hand), rtol=0, atol=1e-10)


def test_l2_training_is_that_written_by_hand() -> None:
    def step(network: nn.Module, x: Tensor, y: Tensor, i: int) -> Tensor:
        u = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(network(u), y), u)
        return torch.stack([a + 0.8 * 2.5 * g / g.norm() / 2.5 for a, g in zip(x, gradient, strict=True)])

    callback = AdversarialTraining(ThreatModel(0.8, norm="l2", lo=-BOX, hi=BOX), FGSM())
    found, _, _ = fit("auto", Classifier(mlp(), "SGD", lr=0.1), callbacks=[callback], steps=4, **EXACT)
    torch.testing.assert_close(found, train_by_hand(step), rtol=0, atol=1e-6)  # lengths are divided by |g| + 1e-10


def test_accumulated_gradients_are_those_written_by_hand() -> None:
    """Each micro-batch is attacked at the same weights, from starts of its own."""
    found, _, _ = fit(
        "auto",
        Classifier(mlp(), "SGD", lr=0.1),
        callbacks=[AdversarialTraining(THREAT, PGD(2, step_size=0.15, track="last"))],
        steps=2,
        accumulate_grad_batches=2,
        **EXACT,
    )
    by_hand = train_by_hand(lambda net, x, y, i: ascend(net, x, y, uniform_start(x, i), 0.15, 2), every=2)
    torch.testing.assert_close(found, by_hand, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("mix", "rows"), [(1.0, 24), (0.5, 12), (0.26, 6), (0.01, 1)])
def test_mix_attacks_the_first_rows_and_no_others(mix: float, rows: int) -> None:
    module = Sees()
    t = trainer(steps=1, callbacks=[AdversarialTraining(THREAT, FGSM(), mix=mix)])
    t.fit(module, loader())
    x, y = next(iter(loader()))
    (batch,), (seen,) = module.batches, module.inputs
    assert torch.equal(batch[0], x), "the step's batch stays clean"
    assert torch.equal(batch[1], y)
    assert torch.equal(seen[rows:], x[rows:])
    assert bool(((seen[:rows] - x[:rows]).abs().amax(dim=1) > 0.9 * EPS).all())
    assert float((seen - x).abs().max()) <= EPS + 1e-6


def test_the_data_are_not_changed() -> None:
    data = loader()
    before = [t.clone() for t in data.dataset.tensors]  # type: ignore[attr-defined]
    batch = [before[0][:24].clone(), before[1][:24].clone()]
    fit("auto", data=data, callbacks=[AdversarialTraining(THREAT, FGSM())])
    fit("auto", data=Rounds(batch), callbacks=[AdversarialTraining(THREAT, FGSM())], steps=1)
    assert all(torch.equal(a, b) for a, b in zip(before, data.dataset.tensors, strict=True))  # type: ignore[attr-defined]
    assert all(torch.equal(a, b[:24]) for a, b in zip(batch, before, strict=True))


def test_soft_labels_are_attacked_by_their_cross_entropy() -> None:
    x, y = next(iter(loader()))
    soft = F.one_hot(y, CLASSES).float() * 0.7 + 0.1
    data = Rounds((x.double(), soft.double()))
    found, _, _ = fit(
        "auto",
        Classifier(mlp(), "SGD", lr=0.1),
        data=data,
        callbacks=[AdversarialTraining(THREAT, FGSM())],
        steps=1,
        **EXACT,
    )
    network = mlp().double()
    u = x.double().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(network(u), soft.double()), u)
    F.cross_entropy(network(within(x.double() + EPS * gradient.sign(), x.double())), soft.double()).backward()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter -= 0.1 * parameter.grad  # type: ignore[operator]
    torch.testing.assert_close(found, weights(network), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", [torch.int64, torch.float32])
def test_one_hot_labels_train_as_class_indices(kind: torch.dtype) -> None:
    class OneHot(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self(batch[0]), batch[1].to(batch[0].dtype))

    run: dict[str, Any] = {"steps": 3, **EXACT}
    data = Rounds(*((x, F.one_hot(y, CLASSES).to(kind)) for x, y in loader()))
    build = lambda: AdversarialTraining(THREAT, PGD(2, track="last"), mix=0.5)
    found, _, _ = fit("auto", OneHot(mlp()), data, callbacks=[build()], **run)
    expected, _, _ = fit("auto", callbacks=[build()], **run)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("submodule", [False, True])
def test_what_a_step_makes_of_its_batch_is_attacked(submodule: bool) -> None:
    """Normalised inputs with the mean and std of the threat model equal pixels and a network that normalises."""
    mean, std = 0.5, 2.0

    class Normalises(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            network = self.network if submodule else self
            return F.cross_entropy(network((batch[0] - mean) / std), batch[1])

    class Inside(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward((x - mean) / std)

    attack = lambda: PGD(2, track="last")
    normalised = ThreatModel(EPS, lo=-BOX, hi=BOX, mean=mean, std=std)
    source = LogitsSource("network") if submodule else None
    callback = AdversarialTraining(normalised, attack(), source=source)
    found, _, _ = fit("auto", Normalises(mlp()), callbacks=[callback], **EXACT)
    expected, _, _ = fit("auto", Inside(mlp()), callbacks=[AdversarialTraining(THREAT, attack())], **EXACT)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    clean, _, _ = fit("auto", Inside(mlp()), **EXACT)
    assert (found - clean).abs().max() > 1e-3


class TwoCalls(Classifier):
    """Calls its network twice in a step, on the same inputs or on others."""

    def __init__(self, same: bool) -> None:
        super().__init__(mlp())
        self.same = same
        self.outputs: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = [self(x), self(x if self.same else -x)]
        self.outputs += [found.detach() for found in logits]
        return sum(F.cross_entropy(found, y) for found in logits) / 2


@pytest.mark.parametrize("call", ["first", 0, 1, "last"])
def test_of_several_calls_the_one_of_the_source_is_attacked(call: Any) -> None:
    """``"last"`` cannot be known before it comes: every call with a graph is attacked."""
    module = TwoCalls(same=False)
    source = LogitsSource(call=call)
    trainer(steps=1, callbacks=[AdversarialTraining(THREAT, FGSM(), source=source)]).fit(module, loader())
    x, _ = next(iter(loader()))
    moved = [not torch.allclose(a, mlp()(b)) for a, b in zip(module.outputs, (x, -x), strict=True)]
    assert moved == {"first": [True, False], 0: [True, False], 1: [False, True], "last": [True, True]}[call]


def test_a_second_call_on_the_same_inputs_gets_what_the_first_got() -> None:
    attack, module = Counted(), TwoCalls(same=True)
    trainer(steps=2, callbacks=[AdversarialTraining(THREAT, attack)]).fit(module, loader())
    assert attack.calls == 2
    assert torch.equal(*module.outputs[:2])


class Counted(FGSM):
    """Counts its calls."""

    calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return super().__call__(*args, **kwargs)


def test_calls_without_a_graph_see_clean_inputs() -> None:
    """As those of a metric or an exponential average."""
    attack = Counted()

    class Measures(TwoCalls):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            with torch.no_grad():
                self.outputs.append(self(batch[0]))
            return F.cross_entropy(self(batch[0]), batch[1])

    module = Measures(same=True)
    trainer(steps=1, callbacks=[AdversarialTraining(THREAT, attack)]).fit(module, loader())
    torch.testing.assert_close(module.outputs[0], mlp()(next(iter(loader()))[0]).detach())
    assert attack.calls == 1


def test_manual_optimization_equals_automatic() -> None:
    class Manual(Classifier):
        automatic_optimization = False

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    module, plain = Manual(mlp()), Classifier(mlp())
    build = lambda: AdversarialTraining(THREAT, PGD(2, track="last"), overfit_guard=0.9)
    # bounded by batches too: a step that never steps its optimizer would go on for ever
    trainer(steps=3, callbacks=[build()], max_epochs=1, limit_train_batches=3).fit(module, loader())
    trainer(steps=3, callbacks=[build()], max_epochs=1, limit_train_batches=3).fit(plain, loader())
    assert torch.equal(weights(module), weights(plain))


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix": 0.0}, r"`mix` must be in \(0, 1\], got 0.0"),
        ({"mix": 1.5}, "`mix` must be in"),
        ({"mix": float("nan")}, "`mix` must be in"),
        ({"overfit_guard": 0.0}, "`overfit_guard` must be in"),
        ({"overfit_guard": 1.1}, "`overfit_guard` must be in"),
        ({"on_overfit": "cry"}, "`on_overfit` must be 'stop', 'restore' or 'warn', got 'cry'"),
        ({"warmup_epochs": -1}, "`warmup_epochs` must be at least 0, got -1"),
    ],
)
def test_impossible_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdversarialTraining(THREAT, **options)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (AdversarialTraining(THREAT, name="again"), r"AdversarialTraining \('again'\) also replaces it"),
        (TRADES(THREAT), r"TRADES \('trades'\) attacks what the step sees"),
        (MART(THREAT), r"MART \('mart'\) attacks what the step sees"),
        (ConfinedPolytopes(THREAT), r"ConfinedPolytopes \('cap'\) attacks what the step sees"),
        (
            AdaptiveKnowledgeAmalgamation(THREAT, [mlp(), mlp()]),
            r"AdaptiveKnowledgeAmalgamation \('at_aka'\) attacks what the step sees",
        ),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_another_attack_beside_it_is_refused(other: pl.Callback, message: str, swapped: bool) -> None:
    callbacks = [AdversarialTraining(THREAT), other]
    both_replace = isinstance(other, AdversarialTraining)  # which then names the other
    with pytest.raises(
        MisconfigurationException, match="replaces the module's input" if swapped and both_replace else message
    ):
        fit("auto", callbacks=callbacks[::-1] if swapped else callbacks)


@pytest.mark.parametrize(
    "step",
    [
        lambda self, x: self.network(x),
        lambda self, x: self.forward(x),  # goes past hooks
    ],
    ids=["submodule", "forward"],
)
def test_a_step_in_which_nothing_can_be_replaced_is_refused(step: Callable[[Any, Tensor], Tensor]) -> None:
    class Passes(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(step(self, batch[0]), batch[1])

    module = Passes(mlp())
    before = weights(module)
    with pytest.raises(
        MisconfigurationException,
        match=r"found nothing to replace: the step calls neither Passes.forward.*LogitsSource\('net'\)",
    ):
        trainer(callbacks=[AdversarialTraining(THREAT, FGSM())]).fit(module, loader())
    assert torch.equal(weights(module), before)
    fit("auto", Passes(mlp()), callbacks=[AdversarialTraining(THREAT, FGSM(), source=LogitsSource("network"))])


# ---------------------------------------------------------------- the guard


def separable() -> DataLoader[Any]:
    x = torch.randn(96, FEATURES, generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(x, x[:, :CLASSES].argmax(dim=1)), batch_size=24)


class Collapses(pl.Callback):
    """Turns the network's output around in the last step of the fifth epoch."""

    def __init__(self) -> None:
        self.before: Tensor | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 16:
            self.before = weights(pl_module)
        if trainer.global_step == 20:
            with torch.no_grad():
                for parameter in pl_module.network[-1].parameters():
                    parameter.neg_()


class AtEpochEnd(pl.Callback):
    """Remembers the weights after every epoch, as callbacks after the guard find them."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.accuracies: list[float] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights.append(weights(pl_module))
        self.accuracies.append(float(trainer.callback_metrics["adversarial_training/guard_acc"]))


def guarded(action: Any, threshold: float = 0.2) -> AdversarialTraining:
    return AdversarialTraining(
        ThreatModel(0.05, lo=-BOX, hi=BOX), RandomFGSM(), overfit_guard=threshold, on_overfit=action
    )


def collapsing_fit(action: Any, strategy: Any = "auto") -> tuple[Tensor, pl.Trainer, Collapses, AtEpochEnd]:
    collapse, ends = Collapses(), AtEpochEnd()
    with pytest.warns(UserWarning, match="catastrophic overfitting, the accuracy under PGD-5 fell from"):
        final, t, _ = fit(
            strategy,
            Classifier(mlp(), lr=0.03),
            separable(),
            callbacks=[collapse, guarded(action), ends],
            steps=24,
        )
    assert collapse.before is not None
    assert ends.accuracies[3] - ends.accuracies[4] > 0.4, "it really collapses"
    return final, t, collapse, ends


@pytest.mark.parametrize("edge", [False, True])
def test_the_guard_stops_with_the_weights_of_the_epoch_before(edge: bool) -> None:
    final, t, collapse, _ = collapsing_fit("stop", EdgeStrategy(num_devices=2) if edge else "auto")
    assert t.global_step == 20
    assert torch.equal(final, collapse.before)  # type: ignore[arg-type]


@pytest.mark.parametrize("edge", [False, True])
def test_the_guard_restores_and_goes_on(edge: bool) -> None:
    final, t, collapse, ends = collapsing_fit("restore", EdgeStrategy(num_devices=2) if edge else "auto")
    assert t.global_step == 24
    assert torch.equal(ends.weights[4], collapse.before)  # type: ignore[arg-type]
    assert not torch.equal(final, ends.weights[4])
    assert ends.accuracies[5] > ends.accuracies[4] + 0.4


def test_the_guard_warns_and_does_nothing_else() -> None:
    final, t, _, _ = collapsing_fit("warn")
    without, _, _ = fit(
        "auto",
        Classifier(mlp(), lr=0.03),
        separable(),
        callbacks=[Collapses(), AdversarialTraining(ThreatModel(0.05, lo=-BOX, hi=BOX), RandomFGSM())],
        steps=24,
    )
    assert t.global_step == 24
    assert torch.equal(final, without)


class Scripted(AdversarialTraining):
    """Of given accuracies."""

    accuracies = (0.5, 0.4, 0.31, 0.11, 0.11)

    def _guard_accuracy(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> float:
        return self.accuracies[trainer.current_epoch]


def test_the_guard_compares_with_the_epoch_before_alone() -> None:
    callback = Scripted(THREAT, FGSM(), overfit_guard=0.19)  # 0.5 -> 0.31 in two epochs is no reason
    with pytest.warns(UserWarning, match=r"fell from 0.310 to 0.110 in one epoch \(overfit_guard=0.19\)"):
        _, t, _ = fit("auto", callbacks=[callback], steps=20)
    assert t.global_step == 16


def test_the_guard_measures_the_first_batch_under_pgd() -> None:
    """Of a linear model and two classes that accuracy has a closed form, since five steps reach the corner."""
    data = separable()
    network = nn.Linear(FEATURES, 2)
    module = Classifier(network, "SGD", lr=1e-12)
    x, y = next(iter(data))
    y2 = DataLoader(TensorDataset(data.dataset.tensors[0], data.dataset.tensors[1] % 2), batch_size=24)  # type: ignore[attr-defined]
    _, t, _ = fit("auto", module, y2, callbacks=[AdversarialTraining(THREAT, FGSM(), overfit_guard=1.0)], steps=4)
    with torch.no_grad():
        logits, w = network(x), network.weight
        y = y % 2
        margins = logits.gather(1, y[:, None]) - logits.gather(1, 1 - y[:, None])
        right = (margins[:, 0] - EPS * (w[0] - w[1]).abs().sum() > 0).float().mean()
    assert float(t.callback_metrics["adversarial_training/guard_acc"]) == pytest.approx(float(right))


def test_the_guard_leaves_training_as_it_is() -> None:
    run: dict[str, Any] = {"steps": 9}
    without, _, _ = fit("auto", callbacks=[AdversarialTraining(THREAT, RandomFGSM())], **run)
    watched, _, _ = fit("auto", callbacks=[AdversarialTraining(THREAT, RandomFGSM(), overfit_guard=1.0)], **run)
    assert torch.equal(without, watched)


class Recorded(PGD):
    """Remembers what it finds."""

    def __init__(self) -> None:
        super().__init__(num_steps=5, track="last")
        self.found: list[Tensor] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.found.append(super().__call__(*args, **kwargs))
        return self.found[-1]


@pytest.mark.parametrize("step", [2, 4, 6, 8])
def test_the_guard_survives_a_resume(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it compares with, its batch and its starts are those of the run before, within an epoch and at its end."""

    def build() -> AdversarialTraining:
        return AdversarialTraining(THREAT, RandomFGSM(), overfit_guard=1.0)

    attack = Recorded()
    monkeypatch.setattr(adversarial_training, "_GUARD_ATTACK", attack)
    module = Classifier(mlp(), lr=0.03)
    whole = build()
    ends = AtEpochEnd()
    final, t, losses = fit("auto", module, separable(), callbacks=[whole, ends], steps=12)
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=step, save_top_k=-1, filename="{step}")
    killed = trainer(steps=12, enable_checkpointing=True, callbacks=[build(), saver, Killed(step + 1)])
    with contextlib.suppress(Killed.Error):
        killed.fit(copy.deepcopy(module), Stateful(separable()))
    fresh, recorded, resumed, later = copy.deepcopy(module), Losses(), build(), AtEpochEnd()
    again = trainer(steps=12, callbacks=[recorded, resumed, later])
    again.fit(fresh, Stateful(separable()), ckpt_path=str(tmp_path / f"step={step}.ckpt"))
    assert recorded.values == losses[step:]
    assert torch.equal(weights(fresh), final)
    assert later.accuracies == ends.accuracies[-len(later.accuracies) :]
    assert torch.equal(attack.found[-1], attack.found[2]), "found after the last epoch"
    assert len(attack.found) == 3 + (step + 1 > 4) + (step + 1 > 8) + len(later.accuracies)
    assert torch.equal(attack.found[-len(later.accuracies)], attack.found[3 - len(later.accuracies)])
    assert (
        again.callback_metrics["adversarial_training/guard_acc"] == t.callback_metrics["adversarial_training/guard_acc"]
    )
    for name in ("inputs", "target"):
        assert torch.equal(resumed._guard[name], whole._guard[name])
    assert resumed._guard["accuracy"] == whole._guard["accuracy"]


def test_a_resumed_guard_still_notices_the_fall(tmp_path: Path) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=8, save_top_k=-1, filename="{step}")
    ends = AtEpochEnd()
    fit(
        "auto",
        Classifier(mlp(), lr=0.03),
        Stateful(separable()),
        callbacks=[guarded("stop"), saver, ends],
        steps=20,
        enable_checkpointing=True,
    )
    fresh = Classifier(mlp(), lr=0.03)
    resumed = trainer(steps=40, callbacks=[Collapses(), guarded("stop")])
    with pytest.warns(UserWarning, match="catastrophic overfitting"):
        resumed.fit(fresh, Stateful(separable()), ckpt_path=str(tmp_path / "step=16.ckpt"))
    assert resumed.global_step == 20
    assert torch.equal(weights(fresh), ends.weights[3])


def test_the_guard_starts_anew_in_another_fit() -> None:
    callback = guarded("stop", threshold=1.0)
    fit("auto", data=separable(), callbacks=[callback], steps=4)
    fit("auto", callbacks=[callback], steps=4)
    assert torch.equal(callback._guard["inputs"], next(iter(loader()))[0])


def test_the_guard_keeps_what_the_network_sees_of_at_most_256_samples() -> None:
    class Normalises(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self((batch[0] - 0.5) / 2), batch[1])

    data = loader(batch_size=300, samples=600)
    callback = AdversarialTraining(
        ThreatModel(EPS, lo=-BOX, hi=BOX, mean=0.5, std=2.0), FGSM(), mix=0.5, overfit_guard=1.0
    )
    fit("auto", Normalises(mlp()), data, callbacks=[callback], steps=2)
    x, y = next(iter(data))
    assert torch.equal(callback._guard["inputs"], ((x - 0.5) / 2)[:256])
    assert torch.equal(callback._guard["target"], y[:256])


@pytest.mark.parametrize("vectorize", [True, False])
def test_the_guard_has_samples_of_all_devices(vectorize: bool) -> None:
    callback = AdversarialTraining(THREAT, FGSM(), overfit_guard=1.0)
    fit(EdgeStrategy(num_devices=4, vectorize=vectorize), callbacks=[callback], steps=3)
    x, y = next(iter(loader()))
    inputs, target = callback._guard["inputs"], callback._guard["target"]
    assert inputs.shape == x.shape
    order = [int((x == row).all(dim=1).nonzero()) for row in inputs]
    assert sorted(order) == list(range(24)), "every sample once"
    assert torch.equal(target, y[order])


# ---------------------------------------------------------------- federated adversarial learning


def attack_from(start: Any) -> AdversarialTraining:
    return AdversarialTraining(THREAT, PGD(num_steps=2, start=start, track="last"))


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("start", ["clean", "uniform"])
def test_one_local_step_on_all_data_is_centralised_adversarial_training(start: Any, vectorize: bool) -> None:
    central, _, _ = fit("auto", Classifier(mlp(), "SGD", lr=0.1), callbacks=[attack_from(start)], **EXACT)
    strategy = EdgeStrategy(num_devices=4, local=LocalSGD(lr=0.1, num_steps=1), vectorize=vectorize)
    federated, _, _ = fit(strategy, Classifier(mlp(), "SGD", lr=1.0), callbacks=[attack_from(start)], **EXACT)
    torch.testing.assert_close(federated, central, rtol=0, atol=1e-10)


@pytest.mark.parametrize("vectorize", [True, False])
def test_several_local_steps_attack_the_local_weights(vectorize: bool) -> None:
    """The federated round written by hand; and it is not the centralised step."""
    strategy = EdgeStrategy(num_devices=4, local=LocalSGD(lr=0.1, num_steps=5, batch_size=6), vectorize=vectorize)
    found, _, _ = fit(strategy, Classifier(mlp(), "SGD", lr=1.0), callbacks=[attack_from("clean")], steps=1, **EXACT)
    x, y = next(iter(loader()))
    after = []
    for rows in range(0, 24, 6):
        network = mlp().double()
        own_x, own_y = x[rows : rows + 6].double(), y[rows : rows + 6]
        for _ in range(5):
            network.zero_grad()
            F.cross_entropy(network(ascend(network, own_x, own_y, own_x, 2.5 * EPS / 2, 2)), own_y).backward()
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter -= 0.1 * parameter.grad  # type: ignore[operator]
        after.append(weights(network))
    torch.testing.assert_close(found, torch.stack(after).mean(dim=0), rtol=0, atol=1e-10)
    central, _, _ = fit("auto", Classifier(mlp(), "SGD", lr=0.5), callbacks=[attack_from("clean")], steps=1, **EXACT)
    assert (found - central).abs().max() > 1e-3


def test_one_device_is_plain_adversarial_training() -> None:
    central, _, _ = fit("auto", Classifier(mlp(), "SGD", lr=0.1), callbacks=[attack_from("uniform")], **EXACT)
    strategy = EdgeStrategy(num_devices=1, local=LocalSGD(lr=0.1, num_steps=1))
    alone, _, _ = fit(strategy, Classifier(mlp(), "SGD", lr=1.0), callbacks=[attack_from("uniform")], **EXACT)
    torch.testing.assert_close(alone, central, rtol=0, atol=1e-12)


class Records(Aggregator):
    """A mean that remembers what it averages."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Tensor] = []

    def forward(self, received: Received, round: Round) -> Tensor:
        self.rows.append(received.rows.clone())
        return received.weights.to(received.rows.dtype) @ received.rows


@pytest.mark.parametrize("start", ["clean", "uniform"])
@pytest.mark.parametrize("vectorize", [True, False])
def test_devices_of_equal_data_send_equal_updates_unless_starts_are_random(start: Any, vectorize: bool) -> None:
    x, y = next(iter(loader()))
    data = Rounds((x[:6].repeat(4, 1), y[:6].repeat(4)))
    server = Records()
    strategy = EdgeStrategy(4, local=LocalSGD(lr=0.1, num_steps=3), aggregator=server, vectorize=vectorize)
    fit(strategy, Classifier(mlp(), "SGD", lr=1.0), data, callbacks=[attack_from(start)], steps=1, **EXACT)
    spread = (server.rows[0] - server.rows[0][0]).abs().max()
    assert spread < 1e-14 if start == "clean" else spread > 1e-4
