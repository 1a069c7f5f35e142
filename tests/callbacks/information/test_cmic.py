from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from scipy.stats import entropy
from torch import Tensor, nn

from groundwire.callbacks.information import CMIConstraint
from groundwire.datamodules import Digits
from groundwire.plugins.edge import EdgeStrategy
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

BATCHES = 4  # an epoch of `loader()`


class ByHand(Classifier):
    """CMIC-DL written into the training step: pairs one by one, moving averages as explicit sums over the past."""

    def __init__(
        self,
        lam: float = 1.0,
        beta: float = 0.0,
        mu: float = 0.99,
        q_update: str = "batch",
        ramp_steps: float = 0.0,
        gamma_norm: str = "unbiased",
        gamma_grad: str = "both",
        gamma_cap: float = math.inf,
    ) -> None:
        super().__init__(mlp())
        self.lam, self.beta, self.mu, self.q_update, self.ramp_steps = lam, beta, mu, q_update, ramp_steps
        self.gamma_norm, self.gamma_grad, self.gamma_cap = gamma_norm, gamma_grad, gamma_cap
        self.past: list[list[Tensor]] = [[] for _ in range(CLASSES)]  # mean outputs of a class, batch after batch
        self.of_epoch: list[list[Tensor]] = [[] for _ in range(CLASSES)]  # its outputs, sample after sample
        self.exact: Tensor | None = None
        self.last: tuple[Tensor, Tensor] | None = None

    def q(self) -> Tensor:
        if self.exact is not None:
            return self.exact
        rows = []
        for means in self.past:
            shares = [self.mu ** (len(means) - 1 - t) for t in range(len(means))]
            uniform = torch.full((CLASSES,), 1 / CLASSES)
            rows.append(sum(s * m for s, m in zip(shares, means, strict=True)) / sum(shares) if means else uniform)
        return torch.stack(rows)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        z = self(x)
        p, lp = z.softmax(dim=1), z.log_softmax(dim=1)
        own = F.cross_entropy(z, y)
        done = self.trainer.current_epoch * BATCHES + batch_idx
        ramp = min(1.0, done / self.ramp_steps) if self.ramp_steps else 1.0
        q = self.q()
        cmi = sum(F.kl_div(q[y[i]].log().to(lp), lp[i], log_target=True, reduction="sum") for i in range(len(y))) / len(
            y
        )
        partner = lp.detach() if self.gamma_grad == "first" else lp
        pairs = [-(p[j] @ partner[k]) for j in range(len(y)) for k in range(len(y)) if y[j] != y[k]]
        gamma = sum(pairs) / (len(y) ** 2 if self.gamma_norm == "b2" else len(y) * (len(y) - 1))
        if float(gamma.detach()) > self.gamma_cap:
            gamma = torch.tensor(self.gamma_cap)
        lam = 0.0 if self.q_update == "epoch" and self.exact is None else self.lam
        self.last = p.detach(), y
        return own + ramp * lam * cmi - ramp * self.beta * gamma

    def on_train_batch_end(self, *args: Any) -> None:
        assert self.last is not None
        for c in range(CLASSES):
            of_class = self.last[0][self.last[1] == c]
            self.of_epoch[c].extend(of_class)
            if len(of_class) and self.q_update == "batch":
                self.past[c].append(of_class.mean(dim=0))

    def on_train_epoch_end(self) -> None:
        if self.q_update == "epoch":
            self.exact = torch.stack([torch.stack(rows).mean(dim=0) for rows in self.of_epoch])
        self.of_epoch = [[] for _ in range(CLASSES)]


def cmi_of(module: nn.Module, x: Tensor, y: Tensor) -> float:
    """Conditional mutual information by SciPy."""
    with torch.no_grad():
        p = module(x).double().softmax(dim=1).numpy()
    return float(
        sum(
            entropy(p[y == c], np.broadcast_to(p[y == c].mean(0), p[y == c].shape), axis=1).sum()
            for c in set(y.tolist())
        )
        / len(y)
    )


def check_resumes(build: Callable[[], pl.Callback], folder: Path, **options: Any) -> None:
    """Kill runs of ten steps (four an epoch) after a checkpoint, within an epoch and at its end, and go on."""
    module = Classifier(mlp())
    final, _, losses = fit("auto", module, callbacks=[build()], steps=10, **options)
    for step in (2, 3, 4, 6, 8):
        saver = ModelCheckpoint(dirpath=folder / f"{step}", every_n_train_steps=step, save_top_k=-1, filename="{step}")
        killed = trainer(steps=10, enable_checkpointing=True, callbacks=[build(), saver, Killed(step + 1)], **options)
        with contextlib.suppress(Killed.Error):
            killed.fit(copy.deepcopy(module), Stateful(loader()))
        assert killed.global_step == step + 1
        fresh, recorded = copy.deepcopy(module), Losses()
        resumed = trainer(steps=10, callbacks=[recorded, build()], **options)
        resumed.fit(fresh, Stateful(loader()), ckpt_path=str(folder / f"{step}" / f"step={step}.ckpt"))
        assert recorded.values == losses[step:], f"after a checkpoint at step {step}"
        assert torch.equal(weights(fresh), final), f"after a checkpoint at step {step}"


@pytest.mark.parametrize("q_update", ["batch", "epoch"])
def test_it_is_a_step_callback(q_update: Any) -> None:
    check_step_callback(
        lambda: CMIConstraint(lam=1.0, beta=0.05, warmup_epochs=0.5, q_update=q_update),
        off=lambda: CMIConstraint(lam=0.0, beta=0.0, q_update=q_update),
    )


@pytest.mark.parametrize(
    ("callback", "by_hand"),
    [
        ({"beta": 0.0, "warmup_epochs": 0}, {}),
        ({"beta": 0.0, "warmup_epochs": 0, "mu": 0.5}, {"mu": 0.5}),
        ({"beta": 0.0, "warmup_epochs": 0, "mu": 0.0}, {"mu": 0.0}),
        ({"beta": 0.0, "warmup_epochs": 0, "q_update": "epoch"}, {"q_update": "epoch"}),
        ({"beta": 0.1, "warmup_epochs": 0}, {"beta": 0.1}),
        ({"beta": 0.1, "warmup_epochs": 0, "gamma_norm": "b2"}, {"beta": 0.1, "gamma_norm": "b2"}),
        ({"beta": 0.1, "warmup_epochs": 0, "gamma_grad": "first"}, {"beta": 0.1, "gamma_grad": "first"}),
        ({"beta": 0.1, "warmup_epochs": 0, "gamma_cap": 0.5}, {"beta": 0.1, "gamma_cap": 0.5}),
        ({"beta": 0.1, "warmup_epochs": 1.5}, {"beta": 0.1, "ramp_steps": 1.5 * BATCHES}),
        ({"beta": 0.1, "q_update": "epoch"}, {"beta": 0.1, "q_update": "epoch", "ramp_steps": BATCHES}),
    ],
    ids=lambda options: ",".join(f"{name}={value}" for name, value in options.items()) or "default",
)
@pytest.mark.filterwarnings("ignore:beta=")
def test_trains_as_the_objective_written_by_hand(callback: dict[str, Any], by_hand: dict[str, Any]) -> None:
    run = {"steps": 10, "precision": "64-true"}
    plugged, _, losses = fit("auto", Classifier(mlp()), callbacks=[CMIConstraint(**callback)], **run)
    own, _, own_losses = fit("auto", ByHand(**by_hand), **run)
    # the table is kept in float32
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(own_losses), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(plugged, own, rtol=1e-5, atol=1e-6)
    plain, _, _ = fit("auto", Classifier(mlp()), **run)
    assert (plugged - plain).abs().max() > 1e-3


def test_options_of_gamma_and_centroids_make_a_difference() -> None:
    run = {"steps": 10, "precision": "64-true"}
    finals = [
        fit("auto", Classifier(mlp()), callbacks=[CMIConstraint(beta=0.01, **options)], **run)[0]
        for options in (
            {},
            {"mu": 0.5},
            {"q_update": "epoch"},
            {"gamma_norm": "b2"},
            {"gamma_grad": "first"},
            {"gamma_cap": 0.5},
            {"warmup_epochs": 0},
        )
    ]
    for i, one in enumerate(finals):
        for other in finals[:i]:
            assert (one - other).abs().max() > 1e-6  # far above the tolerance in which the oracle agrees


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
@pytest.mark.filterwarnings("ignore:beta=")
def test_accumulated_gradients_hold_the_terms_at_full_weight(precision: Any) -> None:
    run = {"steps": 5, "precision": precision, "accumulate_grad_batches": 2}
    plugged, _, _ = fit("auto", Classifier(mlp()), callbacks=[CMIConstraint(beta=0.1, warmup_epochs=0)], **run)
    own, _, _ = fit("auto", ByHand(beta=0.1), **run)
    torch.testing.assert_close(plugged, own, rtol=1e-4, atol=2e-6)


def test_centroids_are_corrected_means_and_never_seen_classes_stay_uniform() -> None:
    callback, hand = CMIConstraint(beta=0.0, warmup_epochs=0), ByHand()
    fit("auto", Classifier(mlp()), callbacks=[callback], steps=3)
    trainer(steps=3).fit(hand, loader())
    assert callback.centroids is not None
    torch.testing.assert_close(callback.centroids, hand.q().float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(callback.centroids.sum(dim=1), torch.ones(CLASSES))
    x = torch.randn(24, FEATURES, generator=torch.Generator().manual_seed(0))
    two_classes = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.arange(24) % 2), batch_size=12)
    one_unseen = CMIConstraint(beta=0.0)
    fit("auto", Classifier(mlp()), data=two_classes, callbacks=[one_unseen], steps=2)
    assert one_unseen.centroids is not None
    assert torch.equal(one_unseen.centroids[2], torch.full((CLASSES,), 1 / CLASSES))
    assert (one_unseen.centroids[:2] - 1 / CLASSES).abs().max() > 1e-3


def test_logs_unweighted_terms_and_leaves_the_modules_own_loss_as_it_is() -> None:
    callback = CMIConstraint(lam=0.5, beta=0.01, warmup_epochs=0.5)
    _, t, losses = fit("auto", Classifier(mlp()), callbacks=[callback], steps=3, log_every_n_steps=1)
    logged = {name: float(value) for name, value in t.callback_metrics.items()}
    assert set(logged) == {"train/loss", *(f"cmic/{n}" for n in ("cmi_nats", "gamma_nats", "lam", "beta", "max_logit"))}
    assert logged["cmic/lam"] == 0.5  # two batches are half an epoch: the ramp is over
    assert logged["cmic/beta"] == pytest.approx(0.01)
    total = logged["train/loss"] + 0.5 * logged["cmic/cmi_nats"] - 0.01 * logged["cmic/gamma_nats"]
    assert losses[-1] == pytest.approx(total, rel=1e-5)


def test_a_second_run_with_the_same_callback_starts_anew() -> None:
    callback = CMIConstraint(beta=0.0, warmup_epochs=0)
    first, _, _ = fit("auto", callbacks=[callback])
    second, _, _ = fit("auto", callbacks=[callback])
    assert torch.equal(first, second)


@pytest.mark.parametrize("q_update", ["batch", "epoch"])
def test_a_resumed_run_equals_an_uninterrupted_one(q_update: Any, tmp_path: Path) -> None:
    check_resumes(lambda: CMIConstraint(lam=1.0, beta=0.01, warmup_epochs=2, q_update=q_update), tmp_path)


def test_a_resumed_run_with_accumulated_gradients_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    module = Classifier(mlp())
    options: dict[str, Any] = {"accumulate_grad_batches": 2}
    final, _, losses = fit("auto", module, callbacks=[CMIConstraint(beta=0.0)], **options)
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    killed = trainer(enable_checkpointing=True, callbacks=[CMIConstraint(beta=0.0), saver, Killed(4)], **options)
    with contextlib.suppress(Killed.Error):
        killed.fit(copy.deepcopy(module), Stateful(loader()))
    fresh, recorded = copy.deepcopy(module), Losses()
    t = trainer(callbacks=[recorded, CMIConstraint(beta=0.0)], **options)
    t.fit(fresh, Stateful(loader()), ckpt_path=str(tmp_path / "step=3.ckpt"))
    assert recorded.values == losses[6:]
    assert torch.equal(weights(fresh), final)


def test_other_number_of_classes_on_resume_is_refused() -> None:
    source = CMIConstraint()
    fit("auto", callbacks=[source], steps=2)

    class Restored(CMIConstraint):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.load_state_dict(source.state_dict())

    with pytest.raises(MisconfigurationException, match="centroids for 3 classes, the module outputs 10"):
        fit("auto", Classifier(nn.Linear(FEATURES, 10)), callbacks=[Restored()])


def test_resuming_with_another_update_of_the_centroids_is_said() -> None:
    with pytest.warns(UserWarning, match=r"written with CMIConstraint\(q_update='batch'\) and goes on with 'epoch'"):
        CMIConstraint(q_update="epoch").load_state_dict(CMIConstraint().state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": -1.0}, "makes CMI small. To make it large, use MaximumCMI"),
        ({"lam": math.nan}, "`lam` must be finite"),
        ({"beta": -0.1}, "`beta` must be finite and at least 0"),
        ({"lam": 0.0, "beta": 0.1}, "unbounded below"),
        ({"gamma_grad": "second"}, "`gamma_grad`"),
        ({"gamma_norm": "b"}, "`gamma_norm`"),
        ({"gamma_cap": 0.0}, "`gamma_cap`"),
        ({"warmup_epochs": -1.0}, "`warmup_epochs`"),
        ({"q_update": "sometimes"}, "`q_update` must be"),
        ({"mu": 1.0}, "`mu` must be in"),
        ({"q_min": 0.0}, "`q_min` must be in"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CMIConstraint(**options)


def test_much_beta_warns_and_may_be_allowed_alone() -> None:
    with pytest.warns(UserWarning, match="logits may grow without limit"):
        CMIConstraint(lam=1.0, beta=0.5)
    assert CMIConstraint(lam=0.0, beta=0.1, allow_unbounded=True).beta == 0.1


def test_inflated_logits_are_said_once() -> None:
    class Easy(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return 1e-3 * super().training_step(batch, batch_idx) - 2.0  # a loss far below beta * Gamma

    callback = CMIConstraint(lam=0.0, beta=0.1, allow_unbounded=True, warmup_epochs=0)
    with pytest.warns(UserWarning, match="larger than the module's loss") as caught:
        fit("auto", Easy(mlp()), callbacks=[callback], steps=220, log_every_n_steps=10)
    assert sum("larger than the module's loss" in str(w.message) for w in caught) == 1


def test_sharp_logits_stay_finite() -> None:
    module = Classifier(mlp())
    with torch.no_grad():
        module.network[-1].weight.mul_(1e4)  # type: ignore[index]
    final, _, losses = fit("auto", module, callbacks=[CMIConstraint(lam=1.0, beta=0.01, warmup_epochs=0)])
    assert torch.isfinite(final).all()
    assert np.isfinite(losses).all()


def test_cmi_on_digits_is_lower_than_with_cross_entropy() -> None:
    data = Digits(batch_size=128, flatten=True, seed=0)
    data.setup("fit")
    found = {}
    for name, callbacks in (("ce", []), ("cmic", [CMIConstraint(lam=1.0, beta=0.0)])):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = Classifier(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)))
        trainer(steps=300, callbacks=callbacks).fit(module, Digits(batch_size=128, flatten=True, seed=0))
        found[name] = {split: cmi_of(module, *getattr(data, f"{split}_data")) for split in ("train", "test")}
        accuracy = (module(data.test_data[0]).argmax(dim=1) == data.test_data[1]).float().mean()
        assert accuracy > 0.9
    assert found["cmic"]["train"] < 0.95 * found["ce"]["train"]
    assert found["cmic"]["test"] < found["ce"]["test"]


def test_a_checkpoint_of_an_epochs_last_step_resumes_with_the_centroids_of_that_epoch(tmp_path: Path) -> None:
    build = lambda: CMIConstraint(lam=2.0, beta=0.0, warmup_epochs=0, q_update="epoch")
    module = Classifier(mlp())
    whole, _, _ = fit("auto", module, data=Stateful(loader()), steps=14, callbacks=[build()])
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    t = trainer(steps=14, callbacks=[build(), saver], enable_checkpointing=True)
    t.fit(copy.deepcopy(module), Stateful(loader()))
    for step in (4, 8, 12):
        fresh = copy.deepcopy(module)
        trainer(steps=14, callbacks=[build()]).fit(fresh, Stateful(loader()), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert torch.equal(weights(fresh), whole)


def test_centroids_are_kept_if_a_resumed_run_is_saved_before_its_first_step() -> None:
    callback, fresh = CMIConstraint(), CMIConstraint()
    fit("auto", callbacks=[callback])
    fresh.load_state_dict(callback.state_dict())
    assert torch.equal(fresh.state_dict()["table"]["centroids"], callback.state_dict()["table"]["centroids"])
    assert torch.equal(fresh.centroids, callback.centroids)


@pytest.mark.parametrize("vectorize", [True, False])
def test_a_device_that_is_dropped_leaves_no_trace_in_the_centroids(vectorize: bool) -> None:
    class Spoils(pl.Callback):
        def on_train_batch_start(self, t: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                batch[0][0] = torch.inf

    callback = CMIConstraint(warmup_epochs=0)
    strategy = EdgeStrategy(4, vectorize=vectorize, on_nonfinite="drop")
    data = Rounds(*[(x.clone(), y) for x, y in loader()])
    final, _, _ = fit(strategy, data=data, callbacks=[callback, Spoils()], steps=4)
    assert torch.isfinite(final).all()
    assert torch.isfinite(callback.centroids).all()
