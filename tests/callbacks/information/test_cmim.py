from __future__ import annotations

import contextlib
import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from scipy.stats import entropy
from torch import Tensor, nn

from groundwire.callbacks.information import CMIConstraint, UndistillableCMI
from groundwire.datamodules import Digits
from helpers.callbacks import check_step_callback
from helpers.edge import CLASSES, FEATURES, Classifier, Killed, Losses, Stateful, fit, loader, mlp, trainer, weights


class ByHand(Classifier):
    """CMIM written into the training step, one temperature and one sample after the other."""

    def __init__(
        self,
        lam: float,
        alphas: list[float],
        how: str = "mean",
        kappa: float = 10.0,
        squared: bool = False,
        mu: float | None = None,
    ) -> None:
        super().__init__(mlp())
        self.lam, self.grid, self.how, self.kappa, self.squared, self.mu = lam, alphas, how, kappa, squared, mu
        self.past: dict[float, list[list[Tensor]]] = {a: [[] for _ in range(CLASSES)] for a in alphas}
        self.last: tuple[Tensor, Tensor] | None = None

    def centroid(self, alpha: float, c: int, p: Tensor) -> Tensor:
        means = self.past[alpha][c]
        if self.mu is None or not any(self.past[alpha]):
            return p.mean(dim=0)
        if not means:
            return torch.full((CLASSES,), 1 / CLASSES)
        shares = [self.mu ** (len(means) - 1 - t) for t in range(len(means))]
        return sum((s * m for s, m in zip(shares, means, strict=True)), torch.zeros(CLASSES)) / sum(shares)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        z = self(x)
        values = []
        for alpha in self.grid:
            lp, total = (alpha * z).log_softmax(dim=1), torch.zeros(())
            for c in range(CLASSES):
                own = lp[y == c]
                if len(own):
                    q = self.centroid(alpha, c, own.exp())
                    total = total + F.kl_div(q.log().expand_as(own), own, log_target=True, reduction="sum")
            values.append(total / len(y) / (alpha**2 if self.squared else 1))
        at = torch.stack(values)
        if self.how == "max":
            cmi = max(values, key=float)
        elif self.how == "smoothmax":
            cmi = (self.kappa * at).exp().mean().log() / self.kappa
        else:
            cmi = sum(values) / len(values)
        self.last = z.detach(), y
        return F.cross_entropy(z, y) + self.lam * cmi

    def on_train_batch_end(self, *args: Any) -> None:
        assert self.last is not None
        z, y = self.last
        for alpha in self.grid:
            for c in range(CLASSES):
                if bool((y == c).any()):
                    self.past[alpha][c].append((alpha * z[y == c]).softmax(dim=1).mean(dim=0))


GRID = [0.05 * 40 ** (k / 5) for k in range(6)]


def cmi_of(module: nn.Module, x: Tensor, y: Tensor, alpha: float) -> float:
    with torch.no_grad():
        p = (alpha * module(x).double()).softmax(dim=1).numpy()
    of_class = [p[y.numpy() == c] for c in range(10)]
    return float(
        sum(entropy(rows, rows.mean(0, keepdims=True).repeat(len(rows), 0), axis=1).sum() for rows in of_class)
    ) / len(y)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"centroids": "ema"},
        {"aggregate": "max"},
        {"aggregate": "smoothmax", "weight": "inv_alpha2"},
        {"temperatures": "random", "centroids": "batch", "num_temperatures": 2},
    ],
)
def test_it_is_a_step_callback(options: dict[str, Any]) -> None:
    check_step_callback(lambda: UndistillableCMI(lam=2.0, **options), off=lambda: UndistillableCMI(lam=0.0, **options))


@pytest.mark.parametrize(
    ("callback", "by_hand"),
    [
        ({"centroids": "batch"}, {}),
        ({"centroids": "auto"}, {}),  # 24 samples for 3 classes are enough
        ({"centroids": "batch", "aggregate": "max"}, {"how": "max"}),
        ({"centroids": "batch", "aggregate": "smoothmax", "kappa": 3.0}, {"how": "smoothmax", "kappa": 3.0}),
        ({"centroids": "batch", "weight": "inv_alpha2"}, {"squared": True}),
        ({"centroids": "ema", "mu": 0.7}, {"mu": 0.7}),
        ({"centroids": "ema"}, {"mu": 0.99}),
        ({"centroids": "batch", "alpha_min": 0.5, "alpha_max": 0.5, "num_temperatures": 1}, {"alphas": [0.5]}),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_trains_as_the_objective_written_by_hand(
    callback: dict[str, Any], by_hand: dict[str, Any], accumulate: int
) -> None:
    run = {"precision": "64-true", "accumulate_grad_batches": accumulate}
    plugged, _, losses = fit("auto", Classifier(mlp()), callbacks=[UndistillableCMI(lam=2.0, **callback)], **run)
    own, _, own_losses = fit("auto", ByHand(**({"lam": 2.0, "alphas": GRID} | by_hand)), **run)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(own_losses), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(plugged, own, rtol=1e-5, atol=2e-6)
    plain, _, _ = fit("auto", Classifier(mlp()), **run)
    assert (plugged - plain).abs().max() > 1e-4


def test_a_small_batch_takes_running_centroids_by_itself() -> None:
    data = loader(batch_size=12)  # four a class
    auto, _, _ = fit("auto", data=data, callbacks=[UndistillableCMI()], steps=8)
    ema, _, _ = fit("auto", data=data, callbacks=[UndistillableCMI(centroids="ema")], steps=8)
    batch, _, _ = fit("auto", data=data, callbacks=[UndistillableCMI(centroids="batch")], steps=8)
    assert torch.equal(auto, ema)
    assert not torch.equal(auto, batch)


def test_random_temperatures_are_new_each_step_and_uniform_in_the_logarithm() -> None:
    callback = UndistillableCMI(temperatures="random", num_temperatures=2, alpha_min=0.05, alpha_max=2.0)
    drawn = torch.stack([callback.alphas(step) for step in range(2000)])
    assert torch.equal(drawn[7], callback.alphas(7))
    at = (drawn.log().flatten().double() - math.log(0.05)) / math.log(40)
    assert at.min() >= 0
    assert at.max() <= 1
    assert len(drawn.flatten().unique()) > 3900
    assert abs(float(at.mean()) - 0.5) < 5 / math.sqrt(12 * 4000)
    assert abs(float(at.square().mean()) - 1 / 3) < 5 * math.sqrt(4 / 45 / 4000)
    assert not torch.equal(
        drawn,
        torch.stack(
            [UndistillableCMI(temperatures="random", num_temperatures=2, seed=1).alphas(step) for step in range(2000)]
        ),
    )


def test_the_grid_is_even_in_the_logarithm() -> None:
    torch.testing.assert_close(UndistillableCMI().alphas(3), torch.tensor(GRID))


def test_one_temperature_of_one_is_the_gradient_of_cmic_with_the_batchs_centroids() -> None:
    one = UndistillableCMI(lam=1.0, alpha_min=1.0, alpha_max=1.0, num_temperatures=1, centroids="batch")
    plugged, _, _ = fit("auto", callbacks=[one], precision="64-true")

    class BatchCentroids(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            lp = self(x).log_softmax(dim=1)
            rows = torch.stack([lp.exp()[y == y[i]].mean(dim=0) for i in range(len(y))])  # the gradient flows through
            return F.nll_loss(lp, y) + F.kl_div(rows.log(), lp, log_target=True, reduction="batchmean")

    own, _, _ = fit("auto", BatchCentroids(mlp()), precision="64-true")
    torch.testing.assert_close(plugged, own, rtol=1e-8, atol=1e-10)
    one_step = {"precision": "64-true", "steps": 2}
    running = UndistillableCMI(lam=1.0, alpha_min=1.0, alpha_max=1.0, num_temperatures=1, centroids="ema", mu=0.0)
    cmic = CMIConstraint(lam=1.0, beta=0.0, warmup_epochs=0, mu=0.0)
    _, _, of_cmim = fit("auto", callbacks=[running], **one_step)
    module = Classifier(mlp())
    x, y = next(iter(loader()))
    with torch.no_grad():  # CMIC's first step compares with the uniform distribution: start it where CMIM begins
        p = module(x).softmax(dim=1)
    from groundwire.callbacks.information.centroids import CentroidTable

    class Primed(CMIConstraint):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.table = CentroidTable(CLASSES, mu=0.0)
            self.table.update(p, y)

    cmic = Primed(lam=1.0, beta=0.0, warmup_epochs=0, mu=0.0)
    _, _, of_cmic = fit("auto", module, callbacks=[cmic], **one_step)
    assert of_cmim == pytest.approx(of_cmic, rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"centroids": "ema"}, {"temperatures": "random", "centroids": "batch"}, {"temperatures": "random"}],
    ids=["ema", "random", "random, auto"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(options: dict[str, Any], tmp_path: Path) -> None:
    module = Classifier(mlp())
    final, _, losses = fit("auto", module, callbacks=[UndistillableCMI(**options)], steps=10)
    for step in (2, 3, 4, 8):
        saver = ModelCheckpoint(
            dirpath=tmp_path / f"{step}", every_n_train_steps=step, save_top_k=-1, filename="{step}"
        )
        callbacks = [UndistillableCMI(**options), saver, Killed(step + 1)]
        with contextlib.suppress(Killed.Error):
            trainer(steps=10, enable_checkpointing=True, callbacks=callbacks).fit(
                copy.deepcopy(module), Stateful(loader())
            )
        fresh, recorded = copy.deepcopy(module), Losses()
        t = trainer(steps=10, callbacks=[recorded, UndistillableCMI(**options)])
        t.fit(fresh, Stateful(loader()), ckpt_path=str(tmp_path / f"{step}" / f"step={step}.ckpt"))
        assert recorded.values == losses[step:]
        assert torch.equal(weights(fresh), final)


def test_other_number_of_classes_on_resume_is_refused() -> None:
    source, target = UndistillableCMI(centroids="ema"), UndistillableCMI(centroids="ema")
    fit("auto", callbacks=[source], steps=2)

    class Restored(UndistillableCMI):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.load_state_dict(source.state_dict())

    target = Restored(centroids="ema")
    with pytest.raises(MisconfigurationException, match="centroids for 3 classes, the module outputs 10"):
        fit("auto", Classifier(nn.Linear(FEATURES, 10)), callbacks=[target])


def test_logs_the_value_at_each_temperature() -> None:
    _, t, losses = fit("auto", callbacks=[UndistillableCMI(lam=2.0)], steps=1)
    logged = {name: float(value) for name, value in t.callback_metrics.items()}
    names = [f"cmim/cmi_nats_T{1 / alpha:.3g}" for alpha in GRID]
    assert set(logged) == {"train/loss", "cmim/cmi_nats", "cmim/lam", *names}
    assert logged["cmim/cmi_nats"] == pytest.approx(np.mean([logged[name] for name in names]), rel=1e-5)
    assert losses[0] == pytest.approx(logged["train/loss"] + 2 * logged["cmim/cmi_nats"], rel=1e-5)


def test_cmi_on_digits_is_lower_than_with_cross_entropy_at_every_temperature() -> None:
    data = Digits(batch_size=128, flatten=True, seed=0)
    data.setup("fit")
    found = {}
    for name, callbacks in (("ce", []), ("cmim", [UndistillableCMI(lam=5.0)])):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = Classifier(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)))
        trainer(steps=300, callbacks=callbacks).fit(module, Digits(batch_size=128, flatten=True, seed=0))
        found[name] = {
            alpha: cmi_of(module, *data.train_data, alpha) for alpha in (0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
        }
        accuracy = (module(data.test_data[0]).argmax(dim=1) == data.test_data[1]).float().mean()
        assert accuracy > 0.9
    for alpha, value in found["cmim"].items():
        assert value < 0.8 * found["ce"][alpha], alpha


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": -1.0}, "makes CMI small. To make it large, use MaximumCMI"),
        ({"alpha_min": 0.0}, "must be positive and in order"),
        ({"alpha_min": 3.0}, "must be positive and in order"),
        ({"num_temperatures": 0}, "`num_temperatures` must be at least 1"),
        ({"aggregate": "median"}, "`aggregate` must be one of mean, max, smoothmax"),
        ({"weight": "alpha"}, "`weight` must be one of"),
        ({"centroids": "epoch"}, "`centroids` must be one of"),
        ({"temperatures": "cold"}, "`temperatures` must be one of"),
        ({"temperatures": "random", "centroids": "ema"}, "Random temperatures have no running centroids"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UndistillableCMI(**options)


def test_random_temperatures_with_small_batches_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="fewer than 8 samples for each of 3 classes"):
        fit("auto", data=loader(batch_size=12), callbacks=[UndistillableCMI(temperatures="random")])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"centroids": "batch"}, "centroids was ema and is batch"),
        ({"alpha_min": 0.1}, "alpha_min was 0.05 and is 0.1"),
        ({"num_temperatures": 3}, "num_temperatures was 6 and is 3"),
    ],
)
def test_running_centroids_do_not_go_on_at_other_settings(changed: dict[str, Any], message: str) -> None:
    callback = UndistillableCMI(centroids="ema")
    fit("auto", callbacks=[callback])
    with pytest.raises(MisconfigurationException, match=message):
        UndistillableCMI(**({"centroids": "ema"} | changed)).load_state_dict(callback.state_dict())
