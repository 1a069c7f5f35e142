from __future__ import annotations

import copy
import json
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from groundwire.callbacks.adversarial import FGSM, PGD, RobustnessReport, ThreatModel, evaluate_robustness
from groundwire.callbacks.logits import LogitsSource
from groundwire.plugins.edge import EdgeStrategy
from helpers.adversarial import THREAT, DigitsClassifier, Wrapped, digits, held_out
from helpers.callbacks import check_step_callback, state_of
from helpers.ddp import ddp_trainer, over_ranks, run_ddp
from helpers.edge import Classifier, loader, mlp, trainer, weights

WIDE = ThreatModel(0.3, lo=-6.0, hi=6.0)  # for the data of `loader()`, which are normal numbers
QUICK: dict[str, Any] = {"attacks": {"fgsm": FGSM()}, "sweep": (0.0, 1.0), "probes": 0}


class Evaluated(Classifier):
    """Small, with data of its own in batches of unequal size."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def val_dataloader(self) -> Any:
        return loader(batch_size=40)

    def test_dataloader(self) -> Any:
        return loader(batch_size=40, samples=100)


def small(**options: Any) -> RobustnessReport:
    return RobustnessReport(WIDE, **QUICK | {"pictures": False} | options)


def rows(data: Any, n: int | None = None) -> tuple[Tensor, Tensor]:
    x, y = (torch.cat(parts)[:n] for parts in zip(*data, strict=True))
    return x, y


def expected_val(module: Evaluated, n: int = 500, seed: int = 0) -> float:
    x, y = rows(module.val_dataloader(), n)
    attack = PGD(10, loss="margin", early_stop=True)
    found = evaluate_robustness(module, x, y, WIDE, attacks={"val": attack}, sweep=(), probes=0, seed=seed)
    return found.accuracies()["val"][0]


def metrics(t: Any, start: str = "test/robust") -> dict[str, float]:
    return {name: float(value) for name, value in t.callback_metrics.items() if name.startswith(start)}


# ---------------------------------------------------------------- test


def test_a_test_logs_and_writes_what_evaluate_robustness_finds(
    robust_net: nn.Module, plain_net: nn.Module, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"probes": 10, "seed": 4, "batch_size": 40}
    report = RobustnessReport(THREAT, num_samples=24, surrogate=plain_net, dirpath=tmp_path / "out", **options)
    t = trainer(callbacks=[report], default_root_dir=tmp_path)
    t.test(DigitsClassifier(robust_net), digits(), verbose=False)
    by_hand = evaluate_robustness(robust_net, *held_out(24), THREAT, surrogate=plain_net, **options)
    accuracies = by_hand.accuracies()
    expected = {f"test/robust/{name}_acc": found[0] for name, found in accuracies.items() if name != "worst_case"}
    expected |= {
        "test/robust_acc": accuracies["worst_case"][0],
        "test/robust_acc_low": accuracies["worst_case"][1],
        "test/robust_acc_high": accuracies["worst_case"][2],
        "test/robust/failed_checks": float(sum(not check.passed for check in by_hand.checks())),
    }
    assert metrics(t) == pytest.approx(expected, abs=1e-12)
    assert report.result is not None
    assert report.result.as_dict() == by_hand.as_dict()
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "robustness.json",
        "robustness.md",
        "robustness_accuracy_against_eps.png",
        "robustness_adversarial_examples.png",
    }
    assert json.loads((tmp_path / "out" / "robustness.json").read_text()) == by_hand.as_dict()
    assert (tmp_path / "out" / "robustness.md").read_text() == by_hand.as_markdown()
    for file in (tmp_path / "out").glob("*.png"):
        assert file.read_bytes().startswith(b"\x89PNG")
    assert all(not p.requires_grad or p.grad is None for p in plain_net.parameters())
    assert not (tmp_path / "robustness").exists()


def test_samples_are_the_first_of_the_test_data() -> None:
    module = Evaluated(mlp()).eval()
    for n in (1, 40, 50, 1000):
        report = small(num_samples=n)
        t = trainer(callbacks=[report])
        report._write = lambda *_: None  # type: ignore[method-assign]
        t.test(module, verbose=False)
        by_hand = evaluate_robustness(module, *rows(module.test_dataloader(), n), WIDE, **QUICK)
        assert report.result is not None
        assert report.result.num_samples == min(n, 100)
        assert metrics(t)["test/robust_acc"] == pytest.approx(by_hand.robust_acc, abs=1e-12)
        assert "test/robust/failed_checks" not in t.callback_metrics, "there were no probes"


def test_the_report_goes_to_the_run_of_the_tested_checkpoint_or_of_the_logger(tmp_path: Path) -> None:
    module = Evaluated(mlp())
    trainer(callbacks=[small(num_samples=8)], default_root_dir=tmp_path / "a").test(module, verbose=False)
    assert {file.name for file in (tmp_path / "a" / "robustness").iterdir()} == {"robustness.json", "robustness.md"}
    logger = CSVLogger(tmp_path / "logs", name="net", version=3)
    t = trainer(callbacks=[small(num_samples=8)], default_root_dir=tmp_path / "c", logger=logger)
    t.test(module, verbose=False)
    assert (tmp_path / "logs" / "net" / "version_3" / "robustness" / "robustness.md").is_file()
    assert not (tmp_path / "c" / "robustness").exists()
    saver = ModelCheckpoint(dirpath=tmp_path / "run" / "checkpoints", filename="last")
    t = trainer(callbacks=[small(num_samples=8, num_val_samples=0), saver], enable_checkpointing=True, steps=2)
    t.fit(module, loader())
    file = tmp_path / "run" / "checkpoints" / "last.ckpt"
    trainer(callbacks=[small(num_samples=8)], default_root_dir=tmp_path / "b").test(
        Evaluated(mlp()), ckpt_path=file, verbose=False
    )
    assert (tmp_path / "run" / "robustness" / "robustness.md").is_file()
    assert not (tmp_path / "b").exists()
    flat = tmp_path / "flat" / "net.ckpt"
    flat.parent.mkdir()
    flat.write_bytes(file.read_bytes())
    for folder, options in (("flat", {}), ("given", {"dirpath": tmp_path / "given" / "robustness"})):
        trainer(callbacks=[small(num_samples=8, **options)], default_root_dir=tmp_path / "b").test(
            Evaluated(mlp()), ckpt_path=flat, verbose=False
        )
        assert (tmp_path / folder / "robustness" / "robustness.md").is_file()
        shutil.rmtree(tmp_path / folder / "robustness")
    assert not (tmp_path / "robustness").exists()
    assert not (tmp_path / "b").exists()


class Images(CSVLogger):
    """Takes images, as W&B's logger does."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.images: dict[str, list[str]] = {}

    def log_image(self, key: str, images: list[Any], step: int | None = None, **_: Any) -> None:
        self.images[key] = images


class Figures(CSVLogger):
    """Takes figures, as TensorBoard's does."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.figures: dict[str, Any] = {}
        self.experiment.add_figure = lambda key, figure, global_step: self.figures.update({key: figure})  # type: ignore[attr-defined]


def test_pictures_go_to_loggers(robust_net: nn.Module, tmp_path: Path) -> None:
    images, figures = Images(tmp_path / "1"), Figures(tmp_path / "2")
    report = RobustnessReport(THREAT, num_samples=10, dirpath=tmp_path, **QUICK)
    t = trainer(callbacks=[report], logger=[images, figures, CSVLogger(tmp_path / "3")])
    t.test(DigitsClassifier(robust_net), digits(), verbose=False)
    keys = {"robustness/accuracy_against_eps", "robustness/adversarial_examples"}
    assert set(images.images) == set(figures.figures) == keys
    assert all(isinstance(figure, Figure) for figure in figures.figures.values())
    for (file,) in images.images.values():
        assert Path(file).is_file()


def test_pictures_are_left_out_where_there_is_nothing_to_draw(tmp_path: Path) -> None:
    module = Evaluated(mlp())
    cases: list[tuple[dict[str, Any], set[str]]] = [
        ({"pictures": True}, {"robustness_accuracy_against_eps.png"}),  # vectors are no images
        ({"pictures": True, "sweep": ()}, set()),
        ({"pictures": False}, set()),
    ]
    for number, (options, names) in enumerate(cases):
        folder = tmp_path / str(number)
        trainer(callbacks=[small(num_samples=8, dirpath=folder, **options)]).test(module, verbose=False)
        assert {file.name for file in folder.glob("*.png")} == names


def test_several_reports_have_names(tmp_path: Path) -> None:
    module = Evaluated(mlp())
    l2 = RobustnessReport(
        ThreatModel(0.5, "l2", lo=-6, hi=6), 30, name="robust_l2", dirpath=tmp_path, pictures=False, **QUICK
    )
    first = small(num_samples=20, dirpath=tmp_path)
    t = trainer(callbacks=[first, l2], steps=4)
    t.test(module, verbose=False)
    assert first.result is not None
    assert l2.result is not None
    assert float(t.callback_metrics["test/robust_acc"]) == pytest.approx(first.result.robust_acc)
    assert float(t.callback_metrics["test/robust_l2_acc"]) == pytest.approx(l2.result.robust_acc)
    assert "test/robust_l2/fgsm_acc" in t.callback_metrics
    assert {f.name for f in tmp_path.iterdir()} == {
        "robustness.json",
        "robustness.md",
        "robust_l2.json",
        "robust_l2.md",
    }
    t.fit(module, loader())
    assert {"val/robust_acc", "val/robust_l2_acc"} <= set(t.callback_metrics)
    with pytest.raises(MisconfigurationException, match="Two RobustnessReports are named 'robust'"):
        trainer(callbacks=[small(), small()]).test(module, verbose=False)


class OfSeveral(Classifier):
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch[0])

    validation_step = test_step


def test_only_the_first_of_several_loaders_is_attacked(tmp_path: Path) -> None:
    module, report = OfSeveral(mlp()).eval(), small(dirpath=tmp_path)
    first, second = loader(batch_size=30), loader(batch_size=50, samples=200)
    t = trainer(callbacks=[report])
    t.test(module, [first, second], verbose=False)
    by_hand = evaluate_robustness(module, *rows(first), WIDE, **QUICK)
    assert report.result is not None
    assert report.result.as_dict() == by_hand.as_dict()
    t.validate(module, [first, second], verbose=False)
    assert float(t.callback_metrics["val/robust_acc"]) == pytest.approx(expected_val(Evaluated(module.network)))


def test_the_surrogate_may_be_a_checkpoint_of_the_module(tmp_path: Path) -> None:
    other = DigitsClassifier()
    t = trainer(steps=20, limit_val_batches=0)
    t.fit(other, digits())
    t.save_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    module = DigitsClassifier()
    trainer(steps=10, limit_val_batches=0).fit(module, digits())
    before = weights(module)
    found = {}
    given = copy.deepcopy(other.network)
    for name, options in {
        "folder": {"surrogate_checkpoint": tmp_path / "run"},
        "file": {"surrogate_checkpoint": tmp_path / "run" / "checkpoints" / "last.ckpt"},
        "network": {"surrogate": given},
        "both": {"surrogate": DigitsClassifier(), "surrogate_checkpoint": tmp_path / "run"},
    }.items():
        report = RobustnessReport(THREAT, 60, dirpath=tmp_path / name, pictures=False, **QUICK | options)
        trainer(callbacks=[report]).test(module, digits(), verbose=False)
        assert report.result is not None
        found[name] = report.result.survived["transfer"].tolist()
    x, y = held_out(60)
    by_hand = evaluate_robustness(module.network, x, y, THREAT, **QUICK, surrogate=other.network)
    assert by_hand.survived["transfer"].sum() < by_hand.survived["clean"].sum(), "transfer does something"
    assert set(map(tuple, found.values())) == {tuple(by_hand.survived["transfer"].tolist())}
    assert torch.equal(weights(module), before)
    assert all(p.requires_grad for p in given.parameters())
    assert given.training


def test_a_copy_of_the_module_gives_its_logits_where_the_source_says(tmp_path: Path) -> None:
    class Features(Evaluated):
        """Its own output is of no use."""

        def forward(self, x: Tensor) -> Any:
            return {"answers": self.network(x).softmax(dim=1)}

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

        test_step = validation_step

    other = Features(mlp())
    t = trainer(steps=1)
    t.strategy.connect(other)
    t.save_checkpoint(tmp_path / "other.ckpt")
    report = small(source=LogitsSource("network"), surrogate_checkpoint=tmp_path / "other.ckpt", dirpath=tmp_path)
    trainer(callbacks=[report]).test(Features(mlp()), verbose=False)
    by_hand = evaluate_robustness(mlp(), *rows(loader(batch_size=40, samples=100)), WIDE, **QUICK, surrogate=mlp())
    assert report.result is not None
    assert report.result.as_dict() == by_hand.as_dict()


def test_what_the_step_makes_of_the_batch_is_attacked(tmp_path: Path) -> None:
    class Normalises(Evaluated):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self((batch[0] - 0.5) / 2)

    threat = ThreatModel(0.3, lo=-6, hi=6, mean=0.5, std=2)
    module = Normalises(mlp()).eval()
    report = RobustnessReport(threat, 50, dirpath=tmp_path, pictures=False, **QUICK)
    trainer(callbacks=[report]).test(module, verbose=False)
    x, y = rows(module.test_dataloader(), 50)
    by_hand = evaluate_robustness(module, (x - 0.5) / 2, y, threat, **QUICK)
    assert report.result is not None
    assert report.result.as_dict() == by_hand.as_dict()


@pytest.mark.parametrize("kind", [torch.int64, torch.float32])
def test_one_hot_labels_give_the_report_of_class_indices(kind: torch.dtype, tmp_path: Path) -> None:
    class OneHot(Evaluated):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

        validation_step = test_step

    data = [(x, F.one_hot(y, 3).to(kind)) for x, y in loader(batch_size=40, samples=100)]
    found = []
    for batches in (data, loader(batch_size=40, samples=100)):
        report = small(num_samples=90, dirpath=tmp_path, probes=5)
        t = trainer(callbacks=[report])
        t.test(OneHot(mlp()), DataLoader(batches, batch_size=None) if batches is data else batches, verbose=False)
        assert report.result is not None
        found.append(report.result.as_dict())
        t.validate(OneHot(mlp()), DataLoader(batches, batch_size=None) if batches is data else batches, verbose=False)
        found.append(float(t.callback_metrics["val/robust_acc"]))
    assert found[:2] == found[2:]


def test_a_module_without_forward_is_attacked_at_what_its_network_is_given(tmp_path: Path) -> None:
    class NoForward(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.net((batch[0] - 0.5) / 2)

    threat = ThreatModel(0.3, lo=-6, hi=6, mean=0.5, std=2)
    data = loader(batch_size=40, samples=100)
    report = RobustnessReport(threat, 50, dirpath=tmp_path, pictures=False, source=LogitsSource("net"), **QUICK)
    trainer(callbacks=[report]).test(NoForward(), data, verbose=False)
    x, y = rows(data, 50)
    assert report.result is not None
    assert report.result.as_dict() == evaluate_robustness(mlp(), (x - 0.5) / 2, y, threat, **QUICK).as_dict()
    with pytest.raises(MisconfigurationException, match=r"NoForward has no `forward`.*LogitsSource\('net'\)"):
        trainer(callbacks=[small()]).test(NoForward(), data, verbose=False)
    with pytest.raises(MisconfigurationException, match="NoForward has no submodule 'head'; it has net, "):
        trainer(callbacks=[small(source=LogitsSource("head"))]).test(NoForward(), data, verbose=False)


@pytest.mark.parametrize(("wanted", "said"), [(100, False), (101, True)])
def test_too_few_samples_are_warned_of(wanted: int, said: bool, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(callbacks=[small(num_samples=wanted, dirpath=tmp_path)]).test(Evaluated(mlp()), verbose=False)
    message = f"The test data have 100 samples: fewer than num_samples={wanted}."
    assert any(message in str(warning.message) for warning in caught) == said


def test_it_works_without_inference_mode_and_in_double_precision(tmp_path: Path) -> None:
    module = Evaluated(mlp())
    found = []
    for options in ({}, {"inference_mode": False}, {"precision": "64-true"}, {"precision": "bf16-mixed"}):
        report = small(num_samples=30, dirpath=tmp_path, surrogate=mlp() if "precision" not in options else None)
        trainer(callbacks=[report], **options).test(copy.deepcopy(module), verbose=False)
        assert report.result is not None
        found.append(report.result.survived["fgsm"].tolist())
    assert all(one == found[0] for one in found)


class Endless(IterableDataset[Any]):
    """Of unknown length, and empty."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


def test_no_test_samples_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="saw no test sample: is the test loader empty"):
        trainer(callbacks=[small()]).test(Evaluated(mlp()), DataLoader(Endless()), verbose=False)


def test_inputs_that_are_no_tensor_are_refused(tmp_path: Path) -> None:
    class TakesDicts(Classifier):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self(batch["x"])

        def forward(self, x: Any) -> Tensor:
            return super().forward(x["pixels"])

    data = [{"x": {"pixels": x}, "y": y} for x, y in loader()]
    with pytest.raises(
        MisconfigurationException, match=r"attacks one tensor of inputs, but the network is given a dict.*LogitsSource"
    ):
        trainer(callbacks=[small(dirpath=tmp_path)]).test(
            TakesDicts(mlp()), DataLoader(data, batch_size=None), verbose=False
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "`num_samples` must be at least 1, got 0"),
        ({"autoattack": -1}, "`autoattack` must be at least 0"),
        ({"num_samples": 10, "autoattack": 11}, "`autoattack` must be at most num_samples=10, got 11"),
        ({"probes": -1}, "`probes` must be at least 0"),
        ({"num_val_samples": -1}, "`num_val_samples` must be at least 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
    ],
)
def test_bad_numbers_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RobustnessReport(THREAT, **options)


def test_a_missing_package_is_said_before_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    seen: list[int] = []

    class Counts(Evaluated):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            seen.append(batch_idx)

    with pytest.raises(MisconfigurationException, match="needs the package pyautoattack"):
        trainer(callbacks=[small(autoattack=5)]).test(Counts(mlp()), verbose=False)
    assert not seen
    trainer(callbacks=[small(autoattack=5)], steps=2).fit(Evaluated(mlp()), loader())  # it is for the test alone


# ---------------------------------------------------------------- validation


def test_it_is_a_step_callback() -> None:
    check_step_callback(lambda: small(), changes=False, module=Evaluated(mlp()))


def test_the_training_is_bit_for_bit_the_same(seeded: Callable[[int], None]) -> None:
    module = Evaluated(nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 3)))
    trained = []
    for callbacks in ([], [small(num_val_samples=30)]):
        fresh = copy.deepcopy(module)
        seeded(11)  # of dropout
        trainer(steps=12, callbacks=callbacks).fit(fresh, loader())
        trained.append(weights(fresh))
    assert torch.equal(*trained)


def test_validation_in_a_fit_logs_robust_accuracy(tmp_path: Path) -> None:
    module = Evaluated(mlp())
    seen: dict[int, float] = {}

    class Reads(RobustnessReport):
        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            super().on_validation_epoch_end(trainer, pl_module)
            if not trainer.sanity_checking:
                seen[trainer.current_epoch] = expected_val(pl_module, 50)

    logged: list[float] = []

    class Watches(ModelCheckpoint):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            if not trainer.sanity_checking:
                logged.append(float(trainer.callback_metrics["val/robust_acc"]))
            super().on_validation_end(trainer, pl_module)

    report = Reads(WIDE, num_val_samples=50, pictures=False)
    saver = Watches(dirpath=tmp_path, monitor="val/robust_acc", mode="max")
    t = trainer(steps=16, callbacks=[saver, report], enable_checkpointing=True)
    t.fit(module, loader())
    assert logged == pytest.approx([seen[epoch] for epoch in range(4)], abs=1e-12)
    assert len(set(logged)) > 1
    assert saver.best_model_score == pytest.approx(max(logged), abs=1e-12)
    best = Evaluated(mlp())
    best.load_state_dict(torch.load(saver.best_model_path, weights_only=True)["state_dict"])
    assert expected_val(best, 50) == pytest.approx(max(logged), abs=1e-12)


def test_the_sanity_check_is_skipped_and_every_epoch_is_not() -> None:
    at: list[tuple[int, int]] = []

    class Counts(RobustnessReport):
        def _withstood(self, pl_module: Any, x: Tensor, target: Tensor) -> Tensor:
            assert not pl_module.trainer.sanity_checking
            at.append((pl_module.current_epoch, len(x)))
            return super()._withstood(pl_module, x, target)

    report = Counts(WIDE, num_val_samples=30)
    trainer(steps=12, callbacks=[report], num_sanity_val_steps=2).fit(Evaluated(mlp()), loader())
    assert at == [(0, 30), (1, 30), (2, 30)]
    at.clear()
    trainer(callbacks=[report]).validate(Evaluated(mlp()), verbose=False)
    assert at == [(0, 30)]
    at.clear()
    trainer(steps=16, callbacks=[report], check_val_every_n_epoch=2).fit(Evaluated(mlp()), loader())
    assert at == [(1, 30), (3, 30)], "how often is the Trainer's to say"


def test_without_validation_samples_nothing_is_logged() -> None:
    t = trainer(steps=4, callbacks=[small(num_val_samples=0)])
    t.fit(Evaluated(mlp()), loader())
    t.validate(Evaluated(mlp()), verbose=False)
    assert "val/robust_acc" not in t.callback_metrics


def test_without_validation_data_a_fit_goes_on() -> None:
    t = trainer(steps=4, callbacks=[small()])
    t.fit(Classifier(mlp()), loader())
    assert t.global_step == 4
    assert not metrics(t, "val")


def test_the_validation_attack_may_be_another() -> None:
    module = Evaluated(mlp()).eval()
    t = trainer(callbacks=[small(val_attack=FGSM())])
    t.validate(module, verbose=False)
    x, y = rows(module.val_dataloader())
    by_hand = evaluate_robustness(module, x, y, WIDE, **QUICK)
    assert float(t.callback_metrics["val/robust_acc"]) == pytest.approx(by_hand.accuracies()["fgsm"][0])


def test_the_seed_is_that_of_seed_everything(seeded: Callable[[int], None], tmp_path: Path) -> None:
    seeded(9)
    reports = [small(num_samples=5, dirpath=tmp_path), small(num_samples=5, seed=2, name="other", dirpath=tmp_path)]
    trainer(callbacks=reports).test(Evaluated(mlp()), verbose=False)
    assert [report.result.seed for report in reports if report.result is not None] == [9, 2]


@pytest.mark.parametrize("devices", [1, 3])
def test_validation_under_edge_strategy(devices: int, tmp_path: Path) -> None:
    module = Evaluated(mlp())
    t = trainer(EdgeStrategy(num_devices=devices), steps=4, callbacks=[small(dirpath=tmp_path)])
    t.fit(module, loader())
    assert float(t.callback_metrics["val/robust_acc"]) == pytest.approx(expected_val(module.eval()))
    t.test(module, verbose=False)
    by_hand = evaluate_robustness(module, *rows(module.test_dataloader()), WIDE, **QUICK)
    assert metrics(t)["test/robust_acc"] == pytest.approx(by_hand.robust_acc)


def test_it_leaves_the_trainers_of_others_alone(tmp_path: Path) -> None:
    """The module's steps are its own again, and a second test with a fresh Trainer gives the same."""
    module, report = Evaluated(mlp()), small(num_samples=20, dirpath=tmp_path)
    untouched = Evaluated(mlp())
    trainer().test(untouched, verbose=False)
    found = []
    for _ in range(2):
        t = trainer(callbacks=[report])
        t.test(module, verbose=False)
        found.append(metrics(t))
    assert found[0] == found[1]
    assert state_of(module) == state_of(untouched)


# ---------------------------------------------------------------- several processes


def evaluate_on_ranks(folder: str, samples: int) -> tuple[dict[str, float], Any, list[str], float]:
    module = Evaluated(mlp())
    report = small(num_samples=samples, dirpath=folder, probes=6, num_val_samples=50)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        t = ddp_trainer(callbacks=[report])
        data = over_ranks(DataLoader(TensorDataset(*rows(loader(samples=100))), batch_size=10))
        t.test(module, data, verbose=False)
        found = metrics(t)
        t.validate(module, over_ranks(loader(batch_size=12)), verbose=False)
    said = [str(w.message) for w in caught if "sync_dist" in str(w.message)]
    assert report.result is not None
    return found, report.result.as_dict(), said, float(t.callback_metrics["val/robust_acc"])


def test_ranks_share_the_work_and_log_the_same(tmp_path: Path) -> None:
    first, second = run_ddp(evaluate_on_ranks, str(tmp_path), 60)
    assert first == second
    found, result, said, val = first
    assert not said, "Lightning asks for sync_dist"
    module = Evaluated(mlp()).eval()
    x, y = rows(loader(samples=100))
    by_hand = evaluate_robustness(module, x[:60], y[:60], WIDE, **QUICK)  # rank r has the samples r::2
    assert result["num_samples"] == 60
    for name in ("clean", "fgsm"):
        assert found[f"test/robust/{name}_acc"] == pytest.approx(by_hand.accuracies()[name][0], abs=1e-12)
    assert found["test/robust_acc"] == pytest.approx(result["robust_acc"], abs=1e-12)
    assert result["accuracies"]["fgsm"]["n"] == 60
    ranks = [evaluate_robustness(module, x[r:60:2], y[r:60:2], WIDE, **QUICK, seed=r) for r in (0, 1)]
    both = sum(rank.robust_acc for rank in ranks) / 2
    assert found["test/robust_acc"] == pytest.approx(both, abs=1e-12)
    assert "test/robust/failed_checks" in found
    assert json.loads((tmp_path / "robustness.json").read_text()) == result
    x, y = rows(loader())
    attack = {"val": PGD(10, loss="margin", early_stop=True)}
    shares = [
        evaluate_robustness(module, x[r:50:2], y[r:50:2], WIDE, attacks=attack, sweep=(), probes=0) for r in (0, 1)
    ]
    assert val == pytest.approx(sum(float(share.survived["val"].sum()) for share in shares) / 50, abs=1e-12)


def test_the_logits_of_a_wrapper_are_those_that_count(plain_net: nn.Module, tmp_path: Path) -> None:
    """Scaled logits fail checks, which the number of failed checks says."""
    report = RobustnessReport(THREAT, 40, dirpath=tmp_path, pictures=False, **QUICK | {"probes": 40})
    t = trainer(callbacks=[report])
    t.test(DigitsClassifier(Wrapped(plain_net, scale=100.0)), digits(), verbose=False)
    assert float(t.callback_metrics["test/robust/failed_checks"]) >= 2
    assert "| (e) cross entropy does not saturate | FAIL |" in (tmp_path / "robustness.md").read_text()
