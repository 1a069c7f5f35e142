"""The iterative baselines: what all must pass, and each against a loop in plain PyTorch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from groundwire.callbacks import LogitsSource
from groundwire.callbacks.reporting import ResumableCheckpoint
from groundwire.callbacks.unlearning import UnlearningMethod
from groundwire.callbacks.unlearning.gradient_ascent import GradDiff, GradientAscent
from groundwire.callbacks.unlearning.npo import NPO
from groundwire.callbacks.unlearning.random_labels import RandomLabels
from groundwire.callbacks.unlearning.retrain import FineTune, Retrain
from groundwire.callbacks.unlearning.scrub import SCRUB
from groundwire.callbacks.unlearning.ssd import SSD
from groundwire.datamodules import DatasetDescriptions, ForgetRetain
from groundwire.plugins.edge import EdgeStrategy
from groundwire.recipes import TinyTransformer
from helpers.edge import generator, trainer, weights
from helpers.unlearning import (
    ToForget,
    accuracy,
    check_method,
    checkpoint,
    digits,
    network,
    place_among_others,
    to_forget,
    trained,
    unlearn,
)

Build = Callable[..., UnlearningMethod]
in_turn = partial(to_forget, batch_size=400)  # one forget batch and three of retained data an epoch of SCRUB

METHODS: dict[str, tuple[Build, Callable[[], ForgetRetain]]] = {
    "retrain": (Retrain, to_forget),
    "fine_tune": (FineTune, to_forget),
    "gradient_ascent": (GradientAscent, to_forget),
    "grad_diff": (partial(GradDiff, gamma=0.5), to_forget),
    "npo": (partial(NPO, beta=0.5), to_forget),
    "random_labels": (partial(RandomLabels, seed=0), to_forget),
    "scrub": (SCRUB, in_turn),
}


class Seen(pl.Callback):
    """Remembers the batches, what was logged, and the losses."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.metrics: list[dict[str, float]] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, t: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)
        self.metrics.append({name: float(value) for name, value in t.callback_metrics.items()})
        self.losses.append(float(outputs["loss"]))


# ---------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", METHODS)
def test_method(name: str) -> None:
    build, data = METHODS[name]
    check_method(build, data=data)


def test_scrub_with_rewinding() -> None:
    check_method(partial(SCRUB, msteps=3, rewind=True), data=in_turn, steps=12)


def by_hand(name: str, data: ForgetRetain, steps: int, wrong: list[Tensor]) -> Tensor:
    """The weights after the same steps, in plain PyTorch."""
    start, model = trained().network, network(seed=0)
    if name != "retrain":
        model.load_state_dict(start.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    data.setup("fit")
    x, y = data.datamodule.train_data
    parts = {"retrain": ("retain",), "fine_tune": ("retain",), "gradient_ascent": ("forget",)}
    data.serve(*parts.get(name, ("forget", "retain")), in_turn=2 if name == "scrub" else None)
    loader, done = data.train_dataloader(), 0
    while done < steps:
        for batch in loader:
            loss = torch.zeros(())
            if "retain" in batch:
                x, y = batch["retain"]
                loss = loss + F.cross_entropy(model(x), y)
                if name == "scrub":
                    divergence = partial(F.kl_div, log_target=True, reduction="batchmean")
                    loss = loss + 0.5 * divergence(model(x).log_softmax(1), start(x).detach().log_softmax(1))
            if "forget" in batch:
                x, y = batch["forget"]
                rows = torch.arange(len(y))
                if name in ("gradient_ascent", "grad_diff"):
                    loss = loss - (1.0 if name == "gradient_ascent" else 0.5) * F.cross_entropy(model(x), y)
                elif name == "npo":
                    ratio = model(x).softmax(1)[rows, y] / start(x).detach().softmax(1)[rows, y]
                    loss = loss + 2 / 0.5 * torch.log(1 + ratio**0.5).mean()
                elif name == "random_labels":
                    loss = loss + F.cross_entropy(model(x), wrong[done])
                elif name == "scrub":
                    p, q = start(x).detach().softmax(1), model(x).softmax(1)
                    loss = loss - (p * (p / q).log()).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
            if done == steps:
                break
    return weights(model)


@pytest.mark.parametrize("name", METHODS)
def test_method_equals_a_loop_in_plain_pytorch(name: str) -> None:
    build, data = METHODS[name]
    seen = Seen()
    module, _ = unlearn(build(checkpoint()), data=data(), callbacks=[seen])
    wrong = [batch.get("wrong_labels") for batch in seen.batches]
    torch.testing.assert_close(weights(module), by_hand(name, data(), 6, wrong), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", METHODS)
def test_method_inside_edge_strategy(name: str) -> None:
    build, data = METHODS[name]
    if name == "scrub":
        data = partial(to_forget, batch_size=80, indices=range(0, 1258, 4))  # 4 and 11 batches, in pairs of 80
        build = partial(SCRUB, msteps=1)
    plain, _ = unlearn(build(checkpoint()), data=data())
    one, _ = unlearn(build(checkpoint()), data=data(), strategy=EdgeStrategy(1))
    assert torch.equal(weights(one), weights(plain)), "one device is a plain Trainer"
    together, _ = unlearn(build(checkpoint()), data=data(), strategy=EdgeStrategy(4, vectorize=True))
    loop, _ = unlearn(build(checkpoint()), data=data(), strategy=EdgeStrategy(4, vectorize=False))
    torch.testing.assert_close(weights(together), weights(loop), rtol=1e-4, atol=1e-6)
    # all losses are means over records, and devices have equally many: the mean over devices is that of the batch
    torch.testing.assert_close(weights(together), weights(plain), rtol=1e-4, atol=1e-6)


def test_an_epoch_inside_edge_strategy_needs_drop_last() -> None:
    options = {"batch_size": 64, "forget": "class", "label": 3}
    strategy = lambda: EdgeStrategy(4, vectorize=True)
    _, t = unlearn(GradDiff(checkpoint()), data=to_forget(drop_last=True, **options), strategy=strategy(), steps=20)
    assert t.global_step == 20
    assert t.num_training_batches == 1126 // 64
    with pytest.raises(ValueError, match=r"tensors have \[3, 64\] samples: each needs the same"):
        unlearn(GradDiff(checkpoint()), data=to_forget(**options), strategy=strategy(), steps=20)


@pytest.mark.parametrize("name", METHODS)
def test_loss_that_is_not_finite_is_refused(name: str) -> None:
    class Overflows(ToForget):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (math.inf if self.global_step == 2 else 1.0)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.02)

    build, data = METHODS[name]
    fits = Overflows()
    good, _ = unlearn(build(checkpoint()), ToForget(momentum=0.0), data(), steps=2)
    with pytest.raises(
        RuntimeError, match=r"step 2: the loss is not finite\. The weights were not changed by this step"
    ):
        unlearn(build(checkpoint()), fits, data())
    assert torch.equal(weights(fits), weights(good))


RETAIN_FREE: dict[str, Build] = {
    "gradient_ascent": GradientAscent,
    "npo": partial(NPO, alpha=0.0),
    "random_labels": partial(RandomLabels, alpha=0.0),
}


@pytest.mark.parametrize("name", RETAIN_FREE)
def test_retain_free_method_touches_no_retained_data(name: str) -> None:
    method = RETAIN_FREE[name](checkpoint())
    module, t = unlearn(method, data=to_forget(retain_access=False))
    assert t.global_step == 6
    assert method.records_read == {"forget": 240, "retain": 0}
    assert not torch.equal(weights(module), weights(trained()))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in RETAIN_FREE] + ["npo", "random_labels"])
def test_other_methods_say_that_they_need_it(name: str) -> None:
    with pytest.raises(MisconfigurationException, match="The retained data was asked for"):
        unlearn(METHODS[name][0](checkpoint()), data=to_forget(retain_access=False))


def test_two_methods_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="One method at a time, got FineTune and NPO"):
        unlearn(NPO(checkpoint()), callbacks=[FineTune(checkpoint())])


def test_manual_optimization_is_refused() -> None:
    module = ToForget()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="GradDiff changes the loss that `training_step` returns"):
        unlearn(GradDiff(checkpoint()), module)


def test_a_run_is_not_resumed_with_another_original(tmp_path: Path) -> None:
    method, keeper = FineTune(checkpoint()), ResumableCheckpoint(tmp_path, every_n_steps=1)
    unlearn(method, callbacks=[keeper], enable_checkpointing=True)
    t = trainer(steps=9, callbacks=[FineTune()], limit_val_batches=0)
    with pytest.raises(MisconfigurationException, match="began with other weights than the original model given now"):
        t.fit(ToForget(), datamodule=to_forget(), ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True)


@pytest.mark.parametrize("name", ["npo", "scrub"])
def test_original_has_the_precision_of_the_run(name: str) -> None:
    build, data = METHODS[name]
    single, _ = unlearn(build(checkpoint()), data=data())
    double, _ = unlearn(build(checkpoint()), data=data(), precision="64-true")
    torch.testing.assert_close(weights(double), weights(single), rtol=0, atol=1e-5)


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: GradientAscent(max_forget_loss="high"), "'chance', a number or None, got 'high'"),
    (lambda: GradDiff(gamma=-1.0), "`gamma` must be at least 0 and finite, got -1.0"),
    (lambda: NPO(beta=0.0), "`beta` must be above 0 and finite, got 0.0"),
    (lambda: NPO(alpha=-1.0), "`alpha` must be at least 0"),
    (lambda: RandomLabels(num_classes=1), "`num_classes` must be at least 2, got 1"),
    (lambda: RandomLabels(alpha=-1.0), "`alpha` must be at least 0"),
    (lambda: SCRUB(alpha=-1.0), "`alpha` and `gamma` must be at least 0 and finite, got -1.0 and 1.0"),
    (lambda: SCRUB(msteps=-1), "`msteps` must be at least 0, got -1"),
    (lambda: SCRUB(temperature=0.0), "`temperature` must be above 0"),
    (lambda: SCRUB(temperature=math.inf), "`temperature` must be above 0 and finite"),
    (lambda: SCRUB(gamma=math.nan), "`alpha` and `gamma` must be at least 0 and finite"),
    (lambda: SSD(alpha=-1.0), "`alpha` and `lam` must be at least 0 .`lam` finite., got -1.0 and 1.0"),
    (lambda: SSD(lam=math.nan), "`alpha` and `lam` must be at least 0 .`lam` finite., got 10.0 and nan"),
    (lambda: SSD(alpha=math.nan), "`alpha` and `lam` must be"),
    (lambda: RandomLabels(alpha=math.nan), "`alpha` must be at least 0 and finite, got nan"),
    (lambda: NPO(alpha=math.nan), "`alpha` must be at least 0 and finite"),
    (lambda: NPO(beta=math.inf), "`beta` must be above 0 and finite"),
    (lambda: GradDiff(gamma=math.nan), "`gamma` must be at least 0 and finite"),
    (lambda: GradientAscent(max_forget_loss=math.nan), "`max_forget_loss` must be positive and finite"),
    (lambda: GradientAscent(max_forget_loss=-3.0), "`max_forget_loss` must be positive and finite"),
]


@pytest.mark.parametrize(("build", "message"), BAD)
def test_bad_argument(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


# ---------------------------------------------------------------- training on retained data


def test_retraining_forgets_what_the_original_knew() -> None:
    data = to_forget(forget="class", label=3, batch_size=64)
    module, _ = unlearn(Retrain(checkpoint()), ToForget(lr=0.1), data, steps=-1, max_epochs=5)
    assert accuracy(trained(), data, "forget") > 0.9
    assert accuracy(module, data, "forget") == 0
    assert accuracy(module, data, "retain") > 0.95


def test_retraining_refuses_the_trained_weights() -> None:
    with pytest.raises(MisconfigurationException, match="but this module has those of"):
        unlearn(Retrain(checkpoint()), trained())


def test_original_of_retraining_is_the_trained_model() -> None:
    method = Retrain(checkpoint())
    unlearn(method)
    assert torch.equal(weights(method.original), weights(trained()))


# ---------------------------------------------------------------- ascent


def test_ascent_raises_the_forget_loss_in_every_step() -> None:
    seen, data = Seen(), to_forget(batch_size=80)  # all of the forget set in every batch
    method = GradientAscent(checkpoint(), max_forget_loss=None)
    unlearn(method, ToForget(lr=1e-3, momentum=0.0), data, callbacks=[seen], steps=40)
    values = [metrics["train/forget_loss"] for metrics in seen.metrics]
    assert all(after > before for before, after in itertools.pairwise(values))
    assert seen.losses == pytest.approx([-value for value in values])
    x, y = (torch.cat(part) for part in zip(*data.batches("forget"), strict=True))
    batch = x, y
    assert values[0] == pytest.approx(float(F.cross_entropy(trained()(batch[0]), batch[1])), rel=1e-5)


@pytest.mark.parametrize(("limit", "expected"), [("chance", math.log(10)), (1.0, 1.0)])
def test_ascent_stops_at_the_limit_and_stays_stopped(tmp_path: Path, limit: Any, expected: float) -> None:
    seen, keeper = Seen(), ResumableCheckpoint(tmp_path, every_n_steps=5)
    build = partial(GradientAscent, checkpoint(), max_forget_loss=limit)
    options = {"steps": 200, "enable_checkpointing": True}
    module, t = unlearn(build(), callbacks=[seen, keeper], **options)
    values = [metrics["train/forget_loss"] for metrics in seen.metrics]
    assert t.global_step == len(values) < 200
    assert values[-1] >= expected
    assert all(value < expected for value in values[:-1])
    resumed, method = ToForget(), build()
    t = trainer(callbacks=[method], steps=200, limit_val_batches=0)
    t.fit(resumed, datamodule=to_forget(), ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True)
    assert method.has_stopped
    assert t.global_step == len(values)
    assert torch.equal(weights(resumed), weights(module))
    unlearn(method, data=to_forget(), steps=1)
    assert not method.has_stopped, "a new fit begins anew"


def test_ascent_without_a_limit_goes_on() -> None:
    _, t = unlearn(GradientAscent(checkpoint(), max_forget_loss=None), ToForget(lr=1e-1), steps=30)
    assert t.global_step == 30


def test_ascent_needs_outputs_to_know_chance() -> None:
    class GoesPastHooks(ToForget):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.forward(batch[0]), batch[1])

    with pytest.raises(MisconfigurationException, match=r"GoesPastHooks\.forward was not called"):
        unlearn(GradientAscent(checkpoint()), GoesPastHooks())
    unlearn(GradientAscent(checkpoint(), source=LogitsSource("network")), GoesPastHooks())
    unlearn(GradientAscent(checkpoint(), max_forget_loss=1.0), GoesPastHooks())


def test_gradient_difference_without_ascent_is_fine_tuning() -> None:
    difference, _ = unlearn(GradDiff(checkpoint(), gamma=0.0), steps=40)
    fine_tuned, _ = unlearn(FineTune(checkpoint()), steps=40)
    assert torch.equal(weights(difference), weights(fine_tuned))


# ---------------------------------------------------------------- NPO


def test_npo_starts_at_its_value_and_is_ascent_for_small_beta() -> None:
    def moved(method: UnlearningMethod) -> tuple[Tensor, Seen]:
        seen = Seen()
        module, _ = unlearn(method, ToForget(lr=5e-3), callbacks=[seen], steps=20)
        return weights(module) - weights(trained()), seen

    ascent, _ = moved(GradientAscent(checkpoint(), max_forget_loss=None))
    small, seen = moved(NPO(checkpoint(), beta=1e-4, alpha=0.0))
    large, _ = moved(NPO(checkpoint(), beta=5.0, alpha=0.0))
    cosine = partial(F.cosine_similarity, dim=0)
    assert cosine(ascent, small) > 0.999
    assert cosine(ascent, large) < 0.99
    assert large.norm() < ascent.norm(), "it lets go of what is forgotten"
    assert seen.metrics[0]["train/npo"] == pytest.approx(2 / 1e-4 * math.log(2), rel=1e-6)


def test_npo_reads_the_submodule_that_is_named() -> None:
    by_default, _ = unlearn(NPO(checkpoint()))
    named, _ = unlearn(NPO(checkpoint(), source=LogitsSource("network")))
    assert torch.equal(weights(named), weights(by_default))
    with pytest.raises(MisconfigurationException, match="has no submodule 'head'"):
        unlearn(NPO(checkpoint(), source=LogitsSource("head")))


# ---------------------------------------------------------------- random labels


def test_labels_are_wrong_uniform_and_new_in_every_step() -> None:
    seen = Seen()
    unlearn(RandomLabels(checkpoint(), seed=0), callbacks=[seen], steps=100)
    assert not any((batch["forget"][1] == batch["wrong_labels"]).any() for batch in seen.batches)
    drawn = torch.cat([place_among_others(batch) for batch in seen.batches])
    assert scipy.stats.chisquare(drawn.bincount(minlength=9).numpy()).pvalue > 1e-3
    first, second = (place_among_others(seen.batches[step]) for step in (0, 1))
    assert not torch.equal(first, second)


def test_labels_go_on_with_the_seed_of_the_run_that_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(seed: str, **options: Any) -> list[Tensor]:
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        seen = Seen()
        t = trainer(callbacks=[seen, RandomLabels(checkpoint()), *options.pop("callbacks", [])], **options)
        t.fit(ToForget(), datamodule=to_forget(), ckpt_path=path if path.exists() else None, weights_only=True)
        return [batch["wrong_labels"] for batch in seen.batches]

    path = tmp_path / "last.ckpt"
    options = {"limit_val_batches": 0, "enable_checkpointing": True}
    whole = run("1", steps=6, limit_val_batches=0)
    other = run("2", steps=6, limit_val_batches=0)
    run("1", steps=3, callbacks=[ResumableCheckpoint(tmp_path)], **options)
    resumed = run("2", steps=6, limit_val_batches=0)
    assert all(torch.equal(a, b) for a, b in zip(resumed, whole[3:], strict=True))
    assert not torch.equal(whole[0], other[0])


def test_accumulated_batches_have_labels_of_their_own() -> None:
    seen = Seen()
    unlearn(RandomLabels(checkpoint()), data=to_forget(), callbacks=[seen], steps=2, accumulate_grad_batches=2)
    drawn = [tuple(place_among_others(batch).tolist()) for batch in seen.batches]
    assert len(set(drawn)) == len(drawn) == 4


class Transformed(ToForget):
    """Makes something else of the forget batch on its way to the device."""

    def __init__(self, change: Callable[[Any], Any]) -> None:
        super().__init__()
        self.change = change

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch | {"forget": self.change(batch["forget"])} if "forget" in batch else batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert isinstance(batch, list | tuple)
        return super().training_step((batch[0], batch[1].long()), batch_idx)


def test_labels_replace_those_of_a_list_with_more_than_a_pair() -> None:
    plain, _ = unlearn(RandomLabels(checkpoint(), num_classes=10))
    listed, _ = unlearn(RandomLabels(checkpoint()), Transformed(lambda pair: [*pair, "weights"]))
    assert torch.equal(weights(plain), weights(listed))


@pytest.mark.parametrize(
    ("change", "method", "message"),
    [
        (lambda pair: {"x": pair[0], "y": pair[1]}, RandomLabels(), r"has to be a tuple or list .*, got a dict"),
        (lambda pair: (pair[0], pair[1].float()), RandomLabels(), "needs class labels, got torch.float32"),
        (lambda pair: pair, RandomLabels(num_classes=4), "draws from 4 classes, but there is a label 9"),
    ],
)
def test_labels_that_cannot_be_replaced_are_refused(change: Any, method: RandomLabels, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        unlearn(method, Transformed(change))


# ---------------------------------------------------------------- SCRUB


def kinds(seen: Seen) -> str:
    return "".join("f" if "forget" in batch else "r" for batch in seen.batches)


def test_scrub_ascends_in_its_first_epochs_alone() -> None:
    seen = Seen()
    unlearn(SCRUB(checkpoint(), msteps=2), data=in_turn(), callbacks=[seen], steps=16)
    assert kinds(seen) == "frrrfrrrrrrrrrrr"
    divergences = [metrics["train/retain_kl"] for metrics in seen.metrics]
    assert [math.isnan(value) for value in divergences] == [kind == "f" for kind in kinds(seen)]
    assert seen.metrics[0]["train/forget_kl"] == 0
    assert seen.metrics[4]["train/forget_kl"] == pytest.approx(-seen.losses[4]) != 0
    assert not any(value < 0 for value in divergences)
    never = Seen()
    unlearn(SCRUB(checkpoint(), msteps=0), data=in_turn(), callbacks=[never], steps=16)
    assert kinds(never) == 16 * "r"
    assert min(never.losses) >= 0
    assert math.isnan(never.metrics[-1]["train/forget_kl"])


def test_scrub_does_not_move_while_it_equals_its_teacher() -> None:
    module, _ = unlearn(SCRUB(checkpoint()), data=in_turn(), steps=1)
    torch.testing.assert_close(weights(module), weights(trained()), rtol=0, atol=1e-8)
    moved, _ = unlearn(SCRUB(checkpoint()), data=in_turn(), steps=2)
    assert (weights(moved) - weights(trained())).abs().max() > 1e-4


def test_scrub_forgets_a_class() -> None:
    data = to_forget(forget="class", label=3, batch_size=64)
    module, _ = unlearn(SCRUB(checkpoint()), ToForget(lr=0.1), data, steps=-1, max_epochs=4)
    assert accuracy(module, data, "forget") < 0.1
    assert accuracy(module, data, "retain") > 0.95


class Weights(pl.Callback):
    """Of each epoch."""

    def __init__(self) -> None:
        self.of_epochs: list[dict[str, Tensor]] = []

    def on_train_epoch_end(self, t: pl.Trainer, module: pl.LightningModule) -> None:
        self.of_epochs.append({name: value.clone() for name, value in module.state_dict().items()})


@pytest.mark.parametrize("what", ["random", "class"])
def test_scrub_rewinds_to_the_epoch_that_forgot_as_much_as_held_out_data_suggests(what: Any) -> None:
    data = to_forget(forget=what, label=3 if what == "class" else None, batch_size=64)
    method, seen = SCRUB(checkpoint(), msteps=5, rewind=True), Weights()
    module, _ = unlearn(method, ToForget(lr=0.2), data, callbacks=[seen], steps=-1, max_epochs=6)

    def error(state: dict[str, Tensor], x: Tensor, y: Tensor) -> float:
        network = trained().network
        network.load_state_dict({name.removeprefix("network."): value for name, value in state.items()})
        return float((network(x).argmax(1) != y).double().mean())

    x, y = data.datamodule.val_data
    held_out = (x, y) if what == "random" else (x[y == 3], y[y == 3])
    reference = error(seen.of_epochs[-1], *held_out)
    forget_x, forget_y = (torch.cat(parts) for parts in zip(*data.batches("forget"), strict=True))
    errors = [error(state, forget_x, forget_y) for state in seen.of_epochs]
    assert method.forget_errors == pytest.approx(errors)
    assert len(set(errors)) > 1, "the epochs must differ for this to be a test"
    expected = min(range(6), key=lambda epoch: abs(errors[epoch] - reference))
    assert method.rewound_to == expected
    chosen = seen.of_epochs[expected]
    assert all(torch.equal(value, chosen[name]) for name, value in module.state_dict().items())


def test_scrub_needs_held_out_data_to_rewind() -> None:
    for options, given in (({"val_fraction": 0.0}, {}), ({}, {"forget": "class", "label": 3})):
        inner = digits(**options)
        data = ForgetRetain(inner, **({"forget": "random"} | given), batch_size=400, seed=0)
        if given:
            inner.setup("fit")
            x, y = inner.val_data
            inner.val_data = x[y != 3], y[y != 3]
        with pytest.raises(MisconfigurationException, match="validation samples with the labels of the forget set"):
            unlearn(SCRUB(rewind=True), trained(), data)


class Padded(pl.LightningDataModule):
    """Sequences of 6 tokens, of which each has a label of its own; labels of -100, of one sequence all, count nowhere."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.train_data, self.val_data = self.padded(0, padding), self.padded(1, padding)

    @staticmethod
    def padded(seed: int, padding: int) -> tuple[Tensor, Tensor]:
        g = generator(seed)
        x = torch.randint(5, (40, 6), generator=g)
        y = (x + (torch.rand(x.shape, generator=g) < 0.3)) % 5
        ignored = torch.arange(6) >= torch.randint(2, 6, (40, 1), generator=g)
        ignored[3] = True
        return x.where(~ignored, padding), y.where(~ignored, -100)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*self.train_data), batch_size=10)

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*self.val_data), batch_size=10)


class Tagger(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def test_scrub_does_not_see_positions_without_a_label() -> None:
    found = []
    for padding in (0, 4):
        method, seen, last = SCRUB(msteps=2, rewind=True), Weights(), Seen()
        data = ForgetRetain(Padded(padding), forget="indices", indices=range(8), batch_size=8, seed=0)
        module, _ = unlearn(method, Tagger(), data, callbacks=[seen, last], steps=-1, max_epochs=3)
        found.append((weights(module), method.forget_errors, method.rewound_to))
        assert last.metrics[0]["train/forget_kl"] == 0
        assert last.metrics[-1]["train/retain_kl"] > 0
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]
    x, y = Padded(0).padded(0, 0)
    network, errors = Tagger(), []
    for state in seen.of_epochs:
        network.load_state_dict(state)
        wrong = network(x[:8]).argmax(-1) != y[:8]
        errors.append(float(wrong[y[:8] != -100].double().mean()))
    assert found[0][1] == pytest.approx(errors)


def test_scrub_says_which_checkpoints_are_not_rewound(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path)
    with pytest.warns(UserWarning, match="were written before SCRUB's rewinding"):
        unlearn(
            SCRUB(checkpoint(), rewind=True), data=in_turn(), callbacks=[keeper], enable_checkpointing=True, steps=4
        )


# ---------------------------------------------------------------- sequences


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def language() -> tuple[TinyTransformer, ForgetRetain]:
    texts = DatasetDescriptions(seq_len=16, documents=["iris", "digits"], seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TinyTransformer(seq_len=16, width=8, num_layers=1, num_heads=2, optimizer=sgd)
    return model, ForgetRetain(texts, forget="class", label=0, batch_size=16, seed=0)


def ready(path: Path) -> Path:
    model, data = language()
    t = trainer(steps=5, limit_val_batches=0)
    t.fit(model, data.datamodule)
    t.save_checkpoint(path)
    return path


@pytest.mark.parametrize("name", METHODS)
def test_method_on_sequences(name: str, tmp_path: Path) -> None:
    original = ready(tmp_path / "trained.ckpt")
    content, seen = original.read_bytes(), Seen()
    method = METHODS[name][0](original)
    model, data = language()
    unlearn(method, model, data, callbacks=[seen], steps=3)
    assert all(math.isfinite(loss) for loss in seen.losses)
    assert original.read_bytes() == content
    again, data = language()
    unlearn(METHODS[name][0](original), again, data, steps=3, strategy=EdgeStrategy(4, vectorize=True))
    torch.testing.assert_close(weights(again), weights(model), rtol=0, atol=1e-5)
    if isinstance(method, GradientAscent):
        assert method._limit == pytest.approx(math.log(56))
    if isinstance(method, RandomLabels):
        assert all((batch["wrong_labels"] != batch["forget"][1]).all() for batch in seen.batches)
    if isinstance(method, NPO):
        assert seen.metrics[0]["train/npo"] == pytest.approx(2 / 0.5 * math.log(2), rel=1e-5)


def test_sequences_of_other_lengths_than_their_labels_are_refused(tmp_path: Path) -> None:
    original = ready(tmp_path / "trained.ckpt")
    model, data = language()
    source = LogitsSource(unpack=lambda batch: (batch[0], batch[1][:, 1:]))
    with pytest.raises(ValueError, match=r"expected class indices \[16, 16\] for logits of sequences"):
        unlearn(NPO(original, source=source), model, data)
    with pytest.raises(MisconfigurationException, match="from_probs and binary are not supported"):
        unlearn(NPO(original, source=LogitsSource(from_probs=True)), *language())


# ---------------------------------------------------------------- one logit


class OneLogit(pl.LightningModule):
    """Is it below 5?"""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.binary_cross_entropy_with_logits(self(batch[0])[:, 0], batch[1])

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {part: (x, (y < 5).float()) for part, (x, y) in batch.items()}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("name", ["gradient_ascent", "npo", "random_labels", "scrub"])
def test_method_on_one_logit(name: str) -> None:
    build, data = METHODS[name]
    method = build(source=LogitsSource(binary=True))
    seen = Seen()
    module, _ = unlearn(method, OneLogit(), data(), callbacks=[seen])
    assert torch.isfinite(weights(module)).all()
    if isinstance(method, GradientAscent):
        assert method._limit == pytest.approx(math.log(2))
    if isinstance(method, RandomLabels):
        assert all(torch.equal(batch["wrong_labels"], 1 - batch["forget"][1]) for batch in seen.batches)
