from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from groundwire.callbacks.logits import LogitsSource
from groundwire.callbacks.reporting import MetricsCSV, read_metrics
from groundwire.callbacks.reporting.fairness import FairnessReport, fairness_summary, plot_fairness
from groundwire.datamodules import Digits, Federated
from groundwire.plugins.edge import EdgeStrategy
from helpers.edge import Classifier, loader, mlp, trainer

NAMES = {f"fairness/{name}" for name in ("acc_mean", "acc_std", "acc_worst", "acc_best", "jain")}
DEVICES = 6


class Evaluated(Classifier):
    """A linear classifier of the digits, with validation and test."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(nn.Linear(64, num_classes), optimizer="SGD", lr=0.5)
        nn.init.zeros_(self.network.weight)
        nn.init.zeros_(self.network.bias)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", F.cross_entropy(self(batch[0]), batch[1]))


def federated(**options: Any) -> Federated:
    options = {"partition": "by_label", "samples_per_device": 60, "rounds_per_epoch": 4} | options
    return Federated(Digits(flatten=True, batch_size=50, seed=0), DEVICES, seed=0, **options)


def run(report: FairnessReport, folder: Path, data: Any = None, steps: int = 8, **options: Any) -> pl.Trainer:
    options = {"logger": [MetricsCSV(folder)], "default_root_dir": folder, "log_every_n_steps": 1} | options
    t = trainer(EdgeStrategy(num_devices=DEVICES), steps=steps, callbacks=[report], **options)
    t.fit(Evaluated(), datamodule=data or federated())
    return t


def logged(folder: Path) -> list[dict[str, float]]:
    return [row for row in read_metrics(folder / "metrics.csv") if "fairness/jain" in row]


def predictions(module: Any, x: Tensor) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(module(x).argmax(1))


def by_hand(module: Any, data: Federated, which: str) -> list[float]:
    """Accuracy on each device's own samples, or on samples drawn in its proportions of classes, class by class."""
    labels = data.datamodule.train_data[1].numpy()
    x, y = {"val": data.datamodule.val_data, "test": data.datamodule.test_data}.get(which, data.datamodule.train_data)
    right = predictions(module, x) == y.numpy()
    found = []
    for m in range(DEVICES):
        rows = data.partition.device(m).numpy()
        if which == "own":
            found.append(right[rows].mean())
        else:
            of_sample = [right[y.numpy() == labels[row]].mean() for row in rows]  # one term a sample of the device
            found.append(np.mean(of_sample))
    return found


# ---------------------------------------------------------------- the summary


@pytest.mark.parametrize("devices", [1, 2, 9, 10, 11, 25, 100])
def test_the_summary_against_numpy(devices: int) -> None:
    a = np.random.default_rng(devices).random(devices)
    found = fairness_summary(torch.from_numpy(a))
    count = -(-devices // 10)
    ranked = np.sort(a)
    assert found["acc_mean"] == pytest.approx(a.mean())
    assert found["acc_std"] == pytest.approx(a.std())
    assert found["acc_worst"] == pytest.approx(ranked[:count].mean())
    assert found["acc_best"] == pytest.approx(ranked[::-1][:count].mean())
    assert found["jain"] == pytest.approx(a.sum() ** 2 / (devices * (a**2).sum()))


def test_the_summary_has_its_limits() -> None:
    assert fairness_summary(torch.full((7,), 0.4))["jain"] == pytest.approx(1.0)
    one = torch.zeros(8)
    one[3] = 0.9
    assert fairness_summary(one)["jain"] == pytest.approx(1 / 8)
    assert fairness_summary(torch.zeros(3))["jain"] == 1.0
    half = fairness_summary(torch.tensor([0.1, 0.2, 0.3, 0.4]), share=0.5)
    assert (half["acc_worst"], half["acc_best"]) == pytest.approx((0.15, 0.35))


def test_the_summary_refuses_bad_input() -> None:
    for bad in (torch.zeros(0), torch.zeros(2, 2), torch.tensor([0.5, math.nan])):
        with pytest.raises(ValueError, match="Expected finite accuracies of N >= 1 devices"):
            fairness_summary(bad)
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"must be in \(0, 1\], got {share}"):
            fairness_summary(torch.ones(3), share)
        with pytest.raises(ValueError, match=rf"must be in \(0, 1\], got {share}"):
            FairnessReport(share=share)
    with pytest.raises(ValueError, match="`data` must be 'held_out' or 'own', got 'test'"):
        FairnessReport(data="test")  # type: ignore[arg-type]


# ---------------------------------------------------------------- in a run


@pytest.mark.parametrize("data", ["held_out", "own"])
def test_accuracies_are_those_of_the_devices_data(data: Any, tmp_path: Path) -> None:
    devices, report = federated(), FairnessReport(data)
    t = run(report, tmp_path, devices)
    assert report.accuracies is not None
    expected = by_hand(t.lightning_module, devices, "own" if data == "own" else "val")
    np.testing.assert_allclose(report.accuracies, expected, atol=1e-12)
    assert report.accuracies.std() > 0.01
    rows = logged(tmp_path)
    assert len(rows) == 2  # after each of two epochs
    assert all(set(row) >= NAMES for row in rows)
    for name, value in fairness_summary(torch.tensor(expected)).items():
        assert rows[-1][f"fairness/{name}"] == pytest.approx(value, abs=1e-12)

    t.test(t.lightning_module, datamodule=devices, verbose=False)
    expected = by_hand(t.lightning_module, devices, "own" if data == "own" else "test")
    np.testing.assert_allclose(report.accuracies, expected, atol=1e-12)
    assert len(logged(tmp_path)) == 3


def test_on_iid_data_held_out_accuracy_is_nearly_that_of_everybody(tmp_path: Path) -> None:
    report = FairnessReport()
    t = run(report, tmp_path, federated(partition="iid", samples_per_device=200))
    assert report.accuracies is not None
    assert float(report.accuracies.std()) < 0.03, "all devices have about the same proportions of classes"
    spread = FairnessReport()
    run(spread, tmp_path / "b", federated())
    assert spread.accuracies is not None
    assert float(spread.accuracies.std()) > 2 * float(report.accuracies.std())
    assert t.callback_metrics["fairness/jain"] > 0.99


def test_it_changes_nothing_and_computes_nothing_twice(tmp_path: Path) -> None:
    calls = 0

    class Counting(Evaluated):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal calls
            calls += not self.training
            return super().forward(x)

    def train(callbacks: list[pl.Callback]) -> tuple[int, Tensor]:
        nonlocal calls
        calls = 0
        module = Counting()
        t = trainer(EdgeStrategy(num_devices=DEVICES), steps=4, callbacks=callbacks, default_root_dir=tmp_path)
        t.fit(module, datamodule=federated())
        return calls, module.network.weight.detach()

    bare, weight = train([])
    with_report, same = train([FairnessReport(pictures=False)])
    assert bare == with_report > 0
    assert torch.equal(weight, same)
    own, again = train([FairnessReport("own", pictures=False)])
    assert own == bare + DEVICES
    assert torch.equal(weight, again)


def test_the_table_and_the_picture_are_written_and_given_to_a_logger(tmp_path: Path) -> None:
    class Images(MetricsCSV):
        def __init__(self, folder: Path) -> None:
            super().__init__(folder)
            self.images: dict[str, list[str]] = {}

        def log_image(self, key: str, images: list[str]) -> None:
            self.images[key] = images

    images = Images(tmp_path)
    report, devices = (
        FairnessReport(dirpath=tmp_path / "here"),
        federated(partition="dirichlet", samples_per_device=None),
    )
    run(report, tmp_path, devices, logger=[images, MetricsCSV(tmp_path / "other")])
    with (tmp_path / "here" / "fairness.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert report.accuracies is not None
    assert [float(row["acc"]) for row in rows] == report.accuracies.tolist()
    assert [int(row["samples"]) for row in rows] == devices.partition.counts.tolist()
    (file_of_picture,) = images.images["fairness/devices"]
    assert Path(file_of_picture).read_bytes().startswith(b"\x89PNG")
    assert plt.get_fignums() == []
    run(FairnessReport(pictures=False), tmp_path / "c", steps=4)
    assert {file.name for file in (tmp_path / "c" / "fairness").iterdir()} == {"fairness.csv"}


def test_the_sanity_check_and_a_dry_run_leave_nothing(tmp_path: Path) -> None:
    t = run(FairnessReport(), tmp_path, steps=4, num_sanity_val_steps=2)
    assert len(logged(tmp_path)) == 1
    assert set(t.callback_metrics) >= NAMES
    run(FairnessReport(), tmp_path / "b", fast_dev_run=True)
    assert not (tmp_path / "b" / "fairness").exists()


def test_a_test_without_a_fit_deals_the_data_out_again(tmp_path: Path) -> None:
    first = FairnessReport()
    t = run(first, tmp_path / "a")
    t.test(t.lightning_module, datamodule=federated(), verbose=False)
    alone = FairnessReport()
    t2 = trainer(EdgeStrategy(num_devices=DEVICES), callbacks=[alone], default_root_dir=tmp_path / "b")
    t2.test(t.lightning_module, datamodule=federated(), verbose=False)
    assert first.accuracies is not None
    assert alone.accuracies is not None
    assert torch.equal(first.accuracies, alone.accuracies)


def test_classes_that_nobody_holds_out_do_not_count(tmp_path: Path) -> None:
    """A device with two classes of which one is never validated has the accuracy of the other; with none, it is left out."""

    class Few(Federated):
        def val_dataloader(self) -> Any:
            x, y = self.datamodule.val_data
            kept = y == 3
            return DataLoader(TensorDataset(x[kept], y[kept]), batch_size=10)

    data = Few(
        Digits(flatten=True, seed=0), DEVICES, partition="by_label", samples_per_device=60, rounds_per_epoch=4, seed=0
    )
    report = FairnessReport()
    t = run(report, tmp_path, data)
    x, y = data.datamodule.val_data
    expected = (predictions(t.lightning_module, x[y == 3]) == 3).mean()
    has = (data.class_histogram()[:, 3] > 0).tolist()
    assert True in has
    assert False in has
    assert report.accuracies is not None
    for m in range(DEVICES):
        assert float(report.accuracies[m]) == pytest.approx(expected, nan_ok=True) or not has[m]
        assert has[m] or math.isnan(report.accuracies[m])
    assert logged(tmp_path)[-1]["fairness/acc_std"] == pytest.approx(0.0, abs=1e-9)


def test_logits_may_come_from_a_submodule_and_have_more_columns(tmp_path: Path) -> None:
    class Wide(Evaluated):
        def __init__(self) -> None:
            super().__init__(num_classes=12)

        def forward(self, x: Tensor) -> Any:
            return {"scores": self.network(x)}

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0])["scores"], batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

    for data in ("held_out", "own"):
        report = FairnessReport(data, source=LogitsSource("network"))  # type: ignore[arg-type]
        t = trainer(EdgeStrategy(num_devices=DEVICES), steps=4, callbacks=[report], default_root_dir=tmp_path)
        t.fit(Wide(), datamodule=federated())
        assert report.accuracies is not None
        assert 0 < float(report.accuracies.mean()) <= 1
    blind = trainer(
        EdgeStrategy(num_devices=DEVICES), steps=4, callbacks=[FairnessReport("own")], default_root_dir=tmp_path
    )
    with pytest.raises(MisconfigurationException, match=r"Wide.forward gives no tensor and nothing with `logits`"):
        blind.fit(Wide(), datamodule=federated())


def test_data_that_is_not_split_over_devices_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="needs training data that is split over devices, got Digits"):
        run(FairnessReport(), tmp_path, Digits(flatten=True, batch_size=60))
    with pytest.raises(MisconfigurationException, match="split over devices, got NoneType"):
        trainer(callbacks=[FairnessReport()]).fit(Classifier(mlp()), loader())


# ---------------------------------------------------------------- the plot


def test_the_plot_ranks_the_devices_of_each_label() -> None:
    _, ax = plot_fairness({"a": [0.9, 0.1, 0.5], "b": [0.5, 0.5]})
    first, second = ax.lines
    assert first.get_ydata().tolist() == [0.1, 0.5, 0.9]
    assert first.get_xdata().tolist() == pytest.approx([1 / 6, 1 / 2, 5 / 6])
    assert second.get_ydata().tolist() == [0.5, 0.5]
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["a: 50.0 ± 32.7", "b: 50.0 ± 0.0"]
    assert ax.get_ylabel().endswith("(%)")
    again, _ = plot_fairness({"c": [1.0]}, ax=ax)
    assert again is ax.get_figure()
    for nothing in ({}, {"a": []}):
        with pytest.raises(ValueError, match="nothing to plot"):
            plot_fairness(nothing)
