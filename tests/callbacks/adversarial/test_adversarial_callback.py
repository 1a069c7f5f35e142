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
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from groundwire.callbacks.adversarial import (
    FGSM,
    MART,
    PGD,
    SVGD,
    TRADES,
    AdaptiveKnowledgeAmalgamation,
    AdversarialCallback,
    AdversarialTraining,
    ConfinedPolytopes,
    CornerSearch,
    RandomFGSM,
    ThreatModel,
)
from groundwire.callbacks.information import CMIConstraint
from groundwire.callbacks.logits import LogitsSource
from groundwire.plugins.edge import DeviceBatch, EdgeStrategy
from groundwire.plugins.random import stream
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

EPS, BOX = 0.3, 6.0
THREAT = ThreatModel(eps=EPS, lo=-BOX, hi=BOX)


def teachers() -> list[nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(8)
        return [nn.Linear(FEATURES, CLASSES) for _ in range(2)]


Build = Callable[..., AdversarialCallback]
BUILD: dict[str, Build] = {
    "at": lambda threat=THREAT, **o: AdversarialTraining(threat, PGD(2, track="last"), **o),
    "fast": lambda threat=THREAT, **o: AdversarialTraining(threat, RandomFGSM(), overfit_guard=0.9, **o),
    "trades": lambda threat=THREAT, **o: TRADES(threat, attack=PGD(2, loss="kl", start="gaussian", track="last"), **o),
    "mart": lambda threat=THREAT, **o: MART(threat, attack=PGD(2, start="gaussian", track="last"), **o),
    "cap": lambda threat=THREAT, **o: ConfinedPolytopes(threat, search=CornerSearch(2, 2), **o),
    "at_aka": lambda threat=THREAT, **o: AdaptiveKnowledgeAmalgamation(
        threat, teachers(), attack=SVGD(2, num_steps=2), **o
    ),
}
every_callback = pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)


# ---------------------------------------------------------------- resume


@every_callback
def test_a_resumed_run_equals_an_uninterrupted_one(build: Build, tmp_path: Path) -> None:
    """Within an epoch and at its end, while the radius still grows; with BatchNorm in the network."""
    module = Classifier(mlp(nn.BatchNorm1d(16)))
    final, _, losses = fit("auto", module, callbacks=[build(warmup_epochs=2)], steps=7)
    for step in (2, 4):
        saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=step, save_top_k=-1, filename=f"{step}-{{step}}")
        killed = trainer(
            steps=7, enable_checkpointing=True, callbacks=[build(warmup_epochs=2), saver, Killed(step + 1)]
        )
        with contextlib.suppress(Killed.Error):
            killed.fit(copy.deepcopy(module), Stateful(loader()))
        assert killed.global_step == step + 1
        fresh, recorded = copy.deepcopy(module), Losses()
        resumed = trainer(steps=7, callbacks=[recorded, build(warmup_epochs=2)])
        resumed.fit(fresh, Stateful(loader()), ckpt_path=str(tmp_path / f"{step}-step={step}.ckpt"))
        assert recorded.values == losses[step:]
        assert torch.equal(weights(fresh), final)


def test_a_second_run_with_the_same_callback_starts_anew() -> None:
    for build in BUILD.values():
        callback = build(warmup_epochs=1)
        first, _, _ = fit("auto", callbacks=[callback])
        second, _, _ = fit("auto", callbacks=[callback])
        assert torch.equal(first, second)


# ---------------------------------------------------------------- the radius grows


class Radii(FGSM):
    """Remembers the radius of each attack."""

    def __init__(self) -> None:
        super().__init__()
        self.radii: list[float] = []

    def __call__(self, model: Any, x: Any, target: Any, threat: ThreatModel, **kwargs: Any) -> Tensor:
        self.radii.append(threat.eps)
        return super().__call__(model, x, target, threat, **kwargs)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 0), (1, 4), (1.5, 6), (2, 8), (0.25, 1), (0.1, 0.4)])
@pytest.mark.parametrize("edge", [False, True])
def test_the_radius_of_each_step_is_exact(warmup: float, steps: float, edge: bool) -> None:
    attack = Radii()
    callback = AdversarialTraining(THREAT, attack, warmup_epochs=warmup)
    fit(EdgeStrategy(num_devices=1, vectorize=False) if edge else "auto", callbacks=[callback], steps=10)
    expected = [EPS * min(1.0, (i + 1) / steps) if steps else EPS for i in range(10)]
    assert attack.radii == pytest.approx(expected, rel=1e-12)
    assert attack.radii[-1] == EPS


@pytest.mark.parametrize("step", [2, 4])
def test_after_a_resume_the_radius_goes_on_where_it_was(step: int, tmp_path: Path) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=step, save_top_k=-1, filename="{step}")
    callbacks = [AdversarialTraining(THREAT, FGSM(), warmup_epochs=2), saver, Killed(step + 1)]
    with contextlib.suppress(Killed.Error):
        trainer(steps=9, enable_checkpointing=True, callbacks=callbacks).fit(Classifier(mlp()), Stateful(loader()))
    attack = Radii()
    resumed = trainer(steps=9, callbacks=[AdversarialTraining(THREAT, attack, warmup_epochs=2)])
    resumed.fit(Classifier(mlp()), Stateful(loader()), ckpt_path=str(tmp_path / f"step={step}.ckpt"))
    assert attack.radii == pytest.approx([EPS * min(1.0, (i + 1) / 8) for i in range(step, 9)], rel=1e-12)


def test_the_radius_grows_with_batches_where_gradients_accumulate() -> None:
    attack = Radii()
    callback = AdversarialTraining(THREAT, attack, warmup_epochs=1)
    fit("auto", callbacks=[callback], steps=3, accumulate_grad_batches=2)
    assert attack.radii == pytest.approx([EPS * min(1.0, (i + 1) / 4) for i in range(6)])


class Endless(torch.utils.data.IterableDataset[Any]):
    """Does not say how long it is."""

    def __iter__(self) -> Any:
        for x, y in loader():
            yield from zip(x, y, strict=True)


def test_a_radius_that_grows_needs_epochs_that_end() -> None:
    data = torch.utils.data.DataLoader(Endless(), batch_size=24)
    with pytest.raises(MisconfigurationException, match=r"TRADES\(warmup_epochs=1\) counts epochs"):
        fit("auto", data=data, callbacks=[TRADES(THREAT, warmup_epochs=1)], max_epochs=-1)
    attack = Radii()
    callback = AdversarialTraining(THREAT, attack, warmup_epochs=2)
    fit("auto", data=data, callbacks=[callback], steps=-1, max_epochs=3)
    assert attack.radii == [EPS / 2] * 4 + [EPS] * 8


def test_a_negative_warmup_is_refused() -> None:
    for build in BUILD.values():
        for epochs in (-0.5, float("nan")):
            with pytest.raises(ValueError, match="`warmup_epochs` must be at least 0, got"):
                build(warmup_epochs=epochs)


# ---------------------------------------------------------------- random streams


class Draws(Classifier):
    """Remembers the state of the global random stream at the begin of each step."""

    def __init__(self) -> None:
        super().__init__(mlp(nn.Dropout(0.5)))
        self.states: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.states.append(torch.get_rng_state())
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    "callback",
    [
        lambda: AdversarialTraining(THREAT, PGD(2, track="last")),
        lambda: AdversarialTraining(THREAT, RandomFGSM(), overfit_guard=0.9),  # in training mode, with dropout
        lambda: TRADES(THREAT, beta=0.0),
        lambda: ConfinedPolytopes(THREAT, lam=0.0),
    ],
    ids=["pgd", "fast", "trades off", "cap off"],
)
def test_the_search_does_not_move_the_modules_random_stream(callback: Callable[[], AdversarialCallback]) -> None:
    def states(callbacks: list[pl.Callback]) -> list[Tensor]:
        module = Draws()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            trainer(steps=9, callbacks=callbacks).fit(module, loader())
        return module.states

    assert all(torch.equal(a, b) for a, b in zip(states([]), states([callback()]), strict=True))


class LooksAtTheLoss(Classifier):
    """Cannot run vectorised, which shows only in the middle of its step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss if float(loss) > 0 else 2 * loss


@pytest.mark.filterwarnings("ignore:EdgeStrategy runs the devices in a loop")
@pytest.mark.parametrize("build", [BUILD["at"], BUILD["fast"]], ids=["at", "fast"])
def test_starts_are_the_same_after_vectorising_was_given_up(build: Build) -> None:
    """Else a resumed run, which tries it anew, would draw others than an uninterrupted one."""
    gave_up, _, _ = fit(EdgeStrategy(num_devices=4), LooksAtTheLoss(mlp()), callbacks=[build()])
    loop, _, _ = fit(EdgeStrategy(num_devices=4, vectorize=False), LooksAtTheLoss(mlp()), callbacks=[build()])
    assert torch.equal(gave_up, loop)


@every_callback
def test_seeds_decide_the_starts(build: Build, seeded: Callable[[int], None]) -> None:
    default, _, _ = fit("auto", callbacks=[build()])
    assert torch.equal(fit("auto", callbacks=[build(seed=0)])[0], default)
    other, _, _ = fit("auto", callbacks=[build(seed=5)])
    assert not torch.equal(other, default)
    seeded(5)
    assert torch.equal(fit("auto", callbacks=[build()])[0], other)


# ---------------------------------------------------------------- what is refused


class Broken(Classifier):
    """Its loss is not finite from a step on."""

    def __init__(self, at: int) -> None:
        super().__init__(mlp())
        self.at = at

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.trainer.global_step == self.at else loss


@every_callback
def test_a_loss_that_is_not_finite_is_refused_before_it_reaches_the_weights(build: Build) -> None:
    module, healthy = Broken(at=2), Broken(at=9)
    with pytest.raises(RuntimeError, match=r"step 2: the loss is not finite.* The weights were not changed"):
        trainer(steps=4, callbacks=[build()]).fit(module, loader())
    trainer(steps=2, callbacks=[build()]).fit(healthy, loader())
    assert torch.equal(weights(module), weights(healthy))


@every_callback
def test_weights_that_are_not_finite_are_refused(build: Build) -> None:
    module = Classifier(mlp())
    with torch.no_grad():
        module.network[0].bias[0] = float("nan")  # type: ignore[index]
    with pytest.raises(RuntimeError, match="non-finite"):
        fit("auto", module, callbacks=[build()])


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
@every_callback
def test_strategies_that_shard_the_module_are_refused(
    build: Build, strategy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = trainer(callbacks=[build()])
    monkeypatch.setattr(strategy, "root_device", torch.device("cpu"))
    t._accelerator_connector.strategy = strategy.__new__(strategy)
    with pytest.raises(MisconfigurationException, match=f"{strategy.__name__} shards its parameters.* Use 'ddp'"):
        t.callbacks[0].setup(t, Classifier(), "fit")  # type: ignore[attr-defined]


def strategies() -> dict[str, Callable[[], Any]]:
    return {
        "plain": lambda: "auto",
        "loop": lambda: EdgeStrategy(num_devices=2, vectorize=False),
        "vectorised": lambda: EdgeStrategy(num_devices=2, vectorize=True),
        "auto": lambda: EdgeStrategy(num_devices=2),
    }


every_strategy = pytest.mark.parametrize("strategy", strategies().values(), ids=strategies())


def of_devices(batch: Any) -> DeviceBatch:
    return DeviceBatch.split(batch, 2)


@every_strategy
@every_callback
def test_inputs_outside_of_the_box_are_refused(build: Build, strategy: Any) -> None:
    threat = ThreatModel(eps=0.1)  # pixels in [0, 1], and the data are normal numbers
    module = Classifier(mlp())
    before = weights(module)
    batch = next(iter(loader()))
    kinds: list[Any] = [tuple(batch)] if strategy() == "auto" else [tuple(batch), of_devices(tuple(batch))]
    for data in kinds:
        fresh, ends = copy.deepcopy(module), Steps()
        with pytest.raises(ValueError, match=r"inputs range \[-.*outside \[0, 1\]; pass mean= and std="):
            trainer(strategy(), callbacks=[build(threat), ends]).fit(fresh, Rounds(data))
        # vectorised, values are hidden until the step is over; even then nobody else sees it end
        if not is_vectorised(strategy):
            assert torch.equal(weights(fresh), before)
        assert ends.number == 0


class Steps(pl.Callback):
    """Counts the steps that ended."""

    number = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.number += 1


def is_vectorised(strategy: Callable[[], Any]) -> bool:
    built = strategy()
    return isinstance(built, EdgeStrategy) and built.vectorize in (True, "auto")


@every_strategy
@every_callback
def test_a_later_batch_outside_of_the_box_is_refused_too(build: Build, strategy: Any) -> None:
    threat, ends = ThreatModel(eps=0.1), Steps()
    x, y = torch.rand(24, FEATURES, generator=torch.Generator().manual_seed(1)), torch.arange(24) % CLASSES
    data = Rounds((x, y), (x, y), (x + 1, y), (x, y))
    with pytest.raises(ValueError, match=r"inputs range \[1.*outside \[0, 1\]; pass mean= and std="):
        fit(strategy(), data=data, callbacks=[build(threat), ends])
    assert ends.number == 2


class Casts(Classifier):
    """Takes bytes."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.float() / 255)


@every_strategy
@every_callback
def test_bytes_are_refused(build: Build, strategy: Any) -> None:
    x = torch.randint(0, 256, (24, FEATURES), dtype=torch.uint8)
    data = Rounds((x, torch.arange(24) % CLASSES))
    # asked to run vectorised, the strategy says why it cannot; else it runs the loop
    forced = getattr(strategy(), "vectorize", None) is True
    error = MisconfigurationException if forced else TypeError
    with pytest.raises(error, match="inputs are uint8; attack needs floating inputs"):
        fit(strategy(), Casts(mlp()), data, callbacks=[build()])


class TwoInputs(Classifier):
    """Takes a pair of inputs."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])

    def forward(self, x: Any) -> Tensor:
        return self.network(x[0] + x[1])


@every_strategy
@every_callback
def test_inputs_that_are_no_tensor_are_refused(build: Build, strategy: Any) -> None:
    x, y = next(iter(loader()))
    with pytest.raises(
        MisconfigurationException, match=r"attacks one tensor of inputs, but the network is given a (tuple|list)"
    ):
        fit(strategy(), TwoInputs(mlp()), Rounds(((x, x), y)), callbacks=[build()])


@pytest.mark.parametrize("build", [b for name, b in BUILD.items() if name not in ("at", "fast")])
def test_manual_optimization_is_refused_by_what_changes_the_loss(build: Build) -> None:
    module = Classifier(mlp())
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="automatic_optimization"):
        fit("auto", module, callbacks=[build()], max_epochs=1)


@pytest.mark.parametrize("build", [BUILD[name] for name in ("trades", "mart", "cap")], ids=["trades", "mart", "cap"])
def test_two_of_one_name_are_refused(build: Build) -> None:
    """Where Lightning does not: of those that keep a state it refuses two itself."""
    with pytest.raises(MisconfigurationException, match=r"Two callbacks \w+ are named .*Give each a name"):
        fit("auto", callbacks=[build(), build()])


# ---------------------------------------------------------------- where inputs and logits are


class Nested(Classifier):
    """Takes a nested dict."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch["views"]["one"]), batch["meta"][0])


@every_strategy
@every_callback
def test_unpack_picks_inputs_and_labels_from_a_nested_batch(build: Build, strategy: Any) -> None:
    def nested(x: Tensor, y: Tensor) -> Any:
        return {"views": {"one": x, "other": torch.zeros_like(x)}, "meta": [y, y + 1]}

    data = Rounds(*(nested(x, y) for x, y in loader()))
    source = LogitsSource(unpack=lambda batch: (batch["views"]["one"], batch["meta"][0]))
    found, _, _ = fit(strategy(), Nested(mlp()), data, callbacks=[build(source=source)], steps=4)
    expected, _, _ = fit(strategy(), Classifier(mlp()), callbacks=[build()], steps=4)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_inputs_need_not_be_a_tensor_of_the_batch_itself() -> None:
    source = LogitsSource(unpack=lambda batch: (batch[0] * 1, batch[1]))
    attack = lambda: PGD(2, track="last")
    found, _, _ = fit("auto", callbacks=[AdversarialTraining(THREAT, attack(), source=source)])
    assert torch.equal(found, fit("auto", callbacks=[AdversarialTraining(THREAT, attack())])[0])


class NoForward(pl.LightningModule):
    """Its network is called in the step."""

    def __init__(self) -> None:
        super().__init__()
        self.network = mlp()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class InsideForward(Classifier):
    """Gives no logits itself, but its head does."""

    def forward(self, x: Tensor) -> Any:
        return {"scores": self.network(x).softmax(dim=1), "rest": None}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.nll_loss(self(batch[0])["scores"].log(), batch[1])


@every_callback
def test_logits_of_a_submodule(build: Build) -> None:
    run: dict[str, Any] = {"precision": "64-true"}
    expected, _, _ = fit("auto", Classifier(mlp()), callbacks=[build()], **run)
    found, _, _ = fit("auto", NoForward(), callbacks=[build(source=LogitsSource("network"))], **run)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    for submodule in ("network", "network.2"):  # the last layer's inputs are features, and pixels are attacked
        source = LogitsSource(submodule)
        inside, _, _ = fit("auto", InsideForward(mlp()), callbacks=[build(source=source)], **run)
        torch.testing.assert_close(inside, expected, rtol=0, atol=1e-10)


def test_where_no_logits_are_it_says_so() -> None:
    with pytest.raises(MisconfigurationException, match=r"is a dict without `logits`.*LogitsSource\('model.head'\)"):
        fit("auto", InsideForward(mlp()), callbacks=[AdversarialTraining(THREAT)])

    class Elsewhere(Classifier):
        def __init__(self) -> None:
            super().__init__(mlp())
            self.head = mlp()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self.head(batch[0]), batch[1])

    class Both(Elsewhere):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self(batch[0]), batch[1]) + super().training_step(batch, batch_idx)

    head = AdversarialTraining(THREAT, source=LogitsSource("head"))
    fit("auto", Elsewhere(), callbacks=[head], steps=1)  # the head alone is the network then
    with pytest.raises(MisconfigurationException, match=r"'head' is not called by the forward of Both"):
        fit("auto", Both(), callbacks=[head], steps=1)


@every_callback
def test_modules_without_what_is_attacked_are_refused_before_the_first_step(build: Build) -> None:
    with pytest.raises(MisconfigurationException, match=r"Classifier has no submodule 'nowhere'; it has network, net"):
        fit("auto", callbacks=[build(source=LogitsSource("nowhere"))])
    with pytest.raises(MisconfigurationException, match=r"NoForward has no `forward`.*LogitsSource\('net'\)"):
        fit("auto", NoForward(), callbacks=[build()])


class OnFeatures(NoForward):
    """Its step calls the body and the head one after the other."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.network[2](self.network[:2](batch[0])), batch[1])  # type: ignore[index,operator]


@every_callback
def test_a_submodule_that_is_given_features_is_refused(build: Build) -> None:
    with pytest.raises(
        MisconfigurationException, match=r"'network.2' is given \(24, 16\) and the batch holds \(24, 12\)"
    ):
        fit("auto", OnFeatures(), callbacks=[build(source=LogitsSource("network.2"))])


class Scales(Classifier):
    """Gives its network inputs by name or first, and a number."""

    def __init__(self, by_name: bool, scale: Any = 2.0) -> None:
        super().__init__(mlp())
        self.by_name, self.scale = by_name, scale

    def forward(self, inputs: Tensor, scale: Any = 1.0) -> Tensor:
        found: Tensor = scale * self.network(inputs)
        return found

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return F.cross_entropy(self(inputs=x, scale=self.scale) if self.by_name else self(x, self.scale), y)


@every_callback
def test_other_arguments_of_the_network_stay_those_of_the_step(build: Build) -> None:
    class Fixed(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return 2.0 * super().forward(x)

    expected, _, _ = fit("auto", Fixed(mlp()), callbacks=[build()])
    for by_name in (True, False):
        assert torch.equal(fit("auto", Scales(by_name), callbacks=[build()])[0], expected)
    with pytest.raises(MisconfigurationException, match="takes a second tensor beside its inputs"):
        fit("auto", Scales(True, torch.tensor(2.0)), callbacks=[build()])


@pytest.mark.parametrize("name", ["trades", "mart", "cap", "at_aka"])
def test_a_module_without_forward_is_attacked_at_what_its_network_is_given(name: str) -> None:
    """The step normalises: the ball is around that, in which a tiny one changes nothing."""

    class Normalises(NoForward):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.given = (batch[0] - 0.5) / 2
            return F.cross_entropy(self.network(self.given), batch[1])

    seen: list[Tensor] = []

    class Notes(SVGD if name == "at_aka" else CornerSearch if name == "cap" else PGD):  # type: ignore[misc]
        def particles(self, model: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            seen.append(x.detach().clone())
            return super().particles(model, x, *args, **kwargs)

        def __call__(self, model: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            seen.append(x.detach().clone())
            return super().__call__(model, x, *args, **kwargs)

    threat = ThreatModel(1e-6, lo=-BOX, hi=BOX, mean=0.5, std=2.0)
    callback = BUILD[name](threat, source=LogitsSource("network"))
    attack = Notes(2, num_steps=2) if name in ("cap", "at_aka") else Notes(2, start="gaussian", track="last")
    setattr(callback, "search" if name == "cap" else "attack", attack)
    _, t, _ = fit("auto", Normalises(), callbacks=[callback], steps=1, precision="64-true")
    x, y = next(iter(loader()))
    given = (x.double() - 0.5) / 2
    assert torch.equal(seen[0], given)
    logged = {key: float(value) for key, value in t.callback_metrics.items()}
    right = float((mlp().double()(given).argmax(dim=1) == y).float().mean())
    assert logged[f"{name}/robust_acc"] == pytest.approx(right)
    if name in ("trades", "cap"):
        assert 0 < logged["trades/kl" if name == "trades" else "cap/distance"] < 1e-9


def test_callbacks_can_be_copied_during_and_after_a_fit() -> None:
    """What they remember of a step holds no graph."""

    class Copies(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            for callback in trainer.callbacks:
                if isinstance(callback, AdversarialCallback):
                    copy.deepcopy(callback.victim)

    class Embeds(Classifier):
        def __init__(self) -> None:
            super().__init__(mlp())
            self.first = nn.Linear(FEATURES, FEATURES)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self(self.first(batch[0]).tanh()), batch[1])

    for strategy in strategies().values():
        for build in BUILD.values():
            fit(strategy(), Embeds(), callbacks=[build(), Copies()], steps=1)


def test_what_the_step_makes_of_the_batch_is_attacked() -> None:
    """By TRADES and by adversarial training alike."""

    class Flips(Classifier):
        def __init__(self) -> None:
            super().__init__(mlp())
            self.seen: list[Tensor] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen.append(batch[0])
            return F.cross_entropy(self(-batch[0]), batch[1])

    class Notes(FGSM):
        given: Tensor

        def __call__(self, model: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self.given = x.clone()
            return super().__call__(model, x, *args, **kwargs)

    x, _ = next(iter(loader()))
    attack = Notes()
    fit("auto", Flips(), callbacks=[TRADES(THREAT, attack=attack)], steps=1)
    assert torch.equal(attack.given, -x)
    attack = Notes()
    fit("auto", Flips(), callbacks=[AdversarialTraining(THREAT, attack)], steps=1)
    assert torch.equal(attack.given, -x)


# ---------------------------------------------------------------- beside other callbacks


class Logits(CMIConstraint):
    """Remembers the logits and inputs that it sees."""

    seen: list[tuple[Tensor, Tensor]]

    def total_loss(self, own_loss: Tensor, logits: Tensor, target: Tensor, inputs: Any) -> Tensor:
        self.seen.append((logits.detach().clone(), inputs.detach().clone()))
        return super().total_loss(own_loss, logits, target, inputs)


@pytest.mark.parametrize("outside", [True, False])
@every_callback
def test_a_term_on_logits_sees_those_of_the_step(build: Build, outside: bool) -> None:
    """Adversarial ones around adversarial training, clean ones (and those alone) around what adds a second forward."""
    term = Logits(beta=0.0)
    term.seen = []
    other = build()
    if not outside and other.own_loss_weight is not None:
        return  # it would weigh the term: refused, tested with those callbacks
    fit("auto", callbacks=[term, other] if outside else [other, term], steps=1)
    x, _ = next(iter(loader()))
    assert len(term.seen) == 1
    logits, inputs = term.seen[0]
    torch.testing.assert_close(logits, mlp()(inputs).detach())
    assert torch.equal(inputs, x) == (not other.replaces_inputs)


def test_adversarial_training_with_cmic_is_the_same_in_any_order() -> None:
    pair = lambda: (CMIConstraint(lam=1.0, beta=0.0, warmup_epochs=0), AdversarialTraining(THREAT, FGSM()))
    a, b = pair(), pair()
    assert torch.equal(fit("auto", callbacks=[a[0], a[1]])[0], fit("auto", callbacks=[b[1], b[0]])[0])


def test_two_terms_add_up() -> None:
    run: dict[str, Any] = {"precision": "64-true", "steps": 1}
    own = fit("auto", **run)[2][0]
    trades = fit("auto", callbacks=[TRADES(THREAT, 2.0, FGSM())], **run)[2][0]
    cap = fit("auto", callbacks=[ConfinedPolytopes(THREAT)], **run)[2][0]
    both = fit("auto", callbacks=[TRADES(THREAT, 2.0, FGSM()), ConfinedPolytopes(THREAT)], **run)[2][0]
    assert both == pytest.approx(trades + cap - own, abs=1e-12)


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
@every_callback
def test_other_precisions_train(build: Build, precision: Any) -> None:
    found, _, losses = fit("auto", callbacks=[build()], precision=precision)
    single, _, single_losses = fit("auto", callbacks=[build()])
    assert torch.isfinite(found).all()
    assert not torch.equal(found, single)
    assert losses[0] == pytest.approx(single_losses[0], rel=1e-1 if precision == "bf16-mixed" else 1e-2)


# ---------------------------------------------------------------- the module is left as it was


@every_callback
def test_flags_buffers_and_gradients_of_the_module_are_left_alone(build: Build) -> None:
    """A frozen layer, a BatchNorm kept in evaluation mode, and no gradient from the search."""
    module = Classifier(mlp(nn.BatchNorm1d(16)), "SGD", lr=0.1)
    module.network[0].requires_grad_(False)  # type: ignore[index]

    class Freezes(pl.Callback):
        flags: list[list[bool]] = []  # noqa: RUF012

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.network[1].eval()

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            self.flags.append([sub.training for sub in pl_module.modules()])

    fresh, freezes = copy.deepcopy(module), Freezes()
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    trainer(steps=3, callbacks=[freezes, build()]).fit(fresh, loader())
    after = fresh.state_dict()
    assert not fresh.network[0].weight.requires_grad  # type: ignore[index, union-attr]
    assert fresh.network[3].weight.requires_grad  # type: ignore[index, union-attr]
    for name, value in before.items():
        changed = not torch.equal(value, after[name])
        assert changed == (name in {"network.1.weight", "network.1.bias", "network.3.weight", "network.3.bias"})
    assert all(flags == [True, True, True, False, True, True] for flags in freezes.flags)


def test_streams_are_those_documented() -> None:
    """Of the seed, the batch's number and the process alone."""

    class Seeds(FGSM):
        seeds: list[int]

        def __call__(self, *args: Any, generator: Any = None, **kwargs: Any) -> Tensor:
            self.seeds.append(generator.initial_seed())
            return super().__call__(*args, generator=generator, **kwargs)

    attack = Seeds()
    attack.seeds = []
    fit("auto", callbacks=[AdversarialTraining(THREAT, attack, seed=3, name="mine")], steps=6)
    assert attack.seeds == [
        stream(3, purpose="adversarial/mine", round=i, device_id=0).initial_seed() for i in range(6)
    ]
