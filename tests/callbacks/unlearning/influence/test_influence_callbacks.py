from __future__ import annotations

import contextlib
import copy
import csv
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import matplotlib.figure
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset

from groundwire.callbacks.reporting import MetricsCSV, ResumableCheckpoint, read_metrics
from groundwire.callbacks.unlearning.gradient_ascent import GradientAscent
from groundwire.callbacks.unlearning.influence import (
    Dropout,
    DropoutInfluence,
    DropoutKron,
    GaussianProjection,
    GradientCompressor,
    InfluenceScorer,
    TracIn,
    plot_influential_samples,
)
from groundwire.callbacks.unlearning.influence.scorer import num_coordinates
from groundwire.callbacks.unlearning.retrain import FineTune
from groundwire.datamodules import Digits, Federated, ForgetRetain
from groundwire.plugins.edge import EdgeStrategy
from groundwire.plugins.layout import ParameterLayout
from groundwire.recipes import ConvClassifier, SoftmaxRegression
from helpers.callbacks import Evaluated, state_of
from helpers.ddp import fit_ddp
from helpers.edge import CLASSES, FEATURES, Classifier, Killed, Stateful, generator, loader, mlp, trainer, weights

sgd = partial(torch.optim.SGD, lr=0.2)
SAMPLES: tuple[Tensor, Tensor] = loader().dataset.tensors
TEST = (SAMPLES[0][:4] + 0.1, SAMPLES[1][:4])


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def by_hand(module: nn.Module, train: Any, test: Any, compressor: Any = None) -> tuple[Tensor, Tensor]:
    scorer = InfluenceScorer(module, compressor)
    scorer.fit([train])
    return scorer.score(test), scorer.self_influence()


def near(found: Tensor, expected: Tensor) -> bool:
    """Up to what float32 rounds, which depends on how samples are put into batches."""
    return bool((found - expected).abs().max() < 1e-4 * expected.abs().max())


class Pictures(Logger):
    """Takes metrics and pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[str, float] = {}
        self.pictures: list[tuple[str, list[str]]] = []

    name = version = property(lambda self: "")  # type: ignore[assignment]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.metrics |= metrics

    def log_image(self, key: str, images: list[str]) -> None:
        self.pictures.append((key, images))


# ---------------------------------------------------------------- dropout as compression


def test_a_fit_on_digits_ends_with_the_files_and_an_untouched_module(tmp_path: Path) -> None:
    module = SoftmaxRegression((1, 8, 8), optimizer=sgd)
    plain, data = copy.deepcopy(module), Digits(seed=0)
    trainer(steps=12, limit_val_batches=0).fit(plain, Digits(seed=0))
    callback, logger = DropoutInfluence(Dropout(density=0.25, seed=0), num_test=6), Pictures()
    options = {"limit_val_batches": 0, "default_root_dir": tmp_path, "logger": [MetricsCSV(tmp_path / "run"), logger]}
    t = trainer(steps=12, callbacks=[callback], **options)
    t.fit(module, data)
    assert torch.equal(weights(module), weights(plain))
    assert state_of(module) == state_of(plain)
    assert module.training == plain.training
    assert all(p.requires_grad for p in module.parameters())

    folder, n = tmp_path / "run" / "influence", len(data.train_data[1])
    test = (data.test_data[0][:6], data.test_data[1][:6])
    scores, own = by_hand(module, data.train_data, test, Dropout(density=0.25, seed=0))
    assert callback.result is not None
    assert near(callback.result.scores, scores)
    assert near(callback.result.self_influence, own)
    written = rows_of(folder / "influence.csv")
    assert len(written) == 6 * n
    of_second = [row for row in written if row["test_index"] == "1"]
    assert [int(row["train_index"]) for row in of_second[:5]] == scores[1].topk(5).indices.tolist()
    assert int(of_second[-1]["train_index"]) == int(scores[1].argmin())
    assert float(of_second[0]["score"]) == pytest.approx(float(scores[1].max()), rel=1e-4)
    assert int(rows_of(folder / "self_influence.csv")[0]["train_index"]) == int(own.argmax())
    settings = json.loads((folder / "influence.json").read_text())
    assert (settings["k"], settings["num_parameters"], settings["num_train"]) == (162, 650, n)
    assert settings["test_data"] == "test"
    assert (folder / "influence.png").stat().st_size > 5000
    assert logger.pictures == [("influence/samples", [str(folder / "influence.png")])]
    helpful = scores.topk(5).indices
    share = float((data.train_data[1][helpful] == test[1][:, None]).double().mean())
    assert read_metrics(tmp_path / "run" / "metrics.csv")[-1]["influence/helpful_same_label"] == share
    assert share > 0.5, "those that help most are mostly alike"
    harmful = scores.topk(5, largest=False).indices
    of_harmful = float((data.train_data[1][harmful] == test[1][:, None]).double().mean())
    assert logger.metrics["influence/harmful_same_label"] == of_harmful < share


def test_samples_of_a_shuffled_loader_are_read_in_the_order_of_the_data_set(tmp_path: Path) -> None:
    shuffled = DataLoader(TensorDataset(*SAMPLES), batch_size=24, shuffle=True, generator=generator(1))
    callback = DropoutInfluence(num_test=3, dirpath=tmp_path, batch_size=7)
    module = Evaluated(mlp(nn.Dropout(0.5)))
    trainer(callbacks=[callback]).fit(module, shuffled, DataLoader(TensorDataset(*TEST), batch_size=2))
    assert callback.result is not None
    scores, own = by_hand(module, SAMPLES, (TEST[0][:3], TEST[1][:3]))
    assert near(callback.result.scores, scores)
    assert near(callback.result.self_influence, own)
    assert callback.result.settings["test_data"] == "validation"
    assert not (tmp_path / "influence.png").exists(), "these are no images"


def test_samples_that_are_given_are_taken_and_compressed_ones_can_lie_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"train_data": TensorDataset(*SAMPLES), "test_data": TEST, "num_test": 9}
    callback = DropoutInfluence(Dropout(k=30, seed=1), dirpath=tmp_path, on_disk=True, **options)
    module = Classifier(mlp())
    sizes, plain = [], InfluenceScorer.self_influence

    def spy(scorer: InfluenceScorer) -> Tensor:
        sizes.append((tmp_path / "gradients.bin").stat().st_size)
        return plain(scorer)

    monkeypatch.setattr(InfluenceScorer, "self_influence", spy)
    with pytest.warns(UserWarning, match=r"There are 4 test samples, fewer than num_test=9"):
        trainer(callbacks=[callback]).fit(module, loader(samples=48))
    monkeypatch.undo()
    assert callback.result is not None
    assert near(callback.result.scores, by_hand(module, SAMPLES, TEST, Dropout(k=30, seed=1))[0])
    assert sizes == [96 * 30 * 4]
    assert callback.result.settings["store_bytes"] == 96 * 30 * 4
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {"influence.csv", "self_influence.csv", "influence.json"}, "and no gradient of a training sample"


def test_gradients_on_the_disk_are_deleted_where_it_fails_too(tmp_path: Path) -> None:
    bad = (TEST[0].clone(), TEST[1])
    bad[0][1] = torch.inf
    callback = DropoutInfluence(dirpath=tmp_path, on_disk=True, train_data=SAMPLES, test_data=bad)
    with pytest.raises(ValueError, match="gradient of a test record is not finite"):
        trainer(callbacks=[callback]).fit(Classifier(mlp()), loader())
    assert list(tmp_path.iterdir()) == []


def test_the_weights_of_a_federation_count_as_any_and_its_samples_device_after_device(tmp_path: Path) -> None:
    data = Federated(Digits(seed=0), num_devices=4, samples_per_device=50, seed=0)
    callback = DropoutInfluence(Dropout(k=100, seed=0), num_test=3, dirpath=tmp_path, pictures=False)
    tracin = TracIn(every_n_steps=2, num_test=3, dirpath=tmp_path / "tracin", pictures=False)
    module = SoftmaxRegression((1, 8, 8), optimizer=sgd)
    trainer(EdgeStrategy(num_devices=4), callbacks=[callback, tracin], limit_val_batches=0).fit(module, data)
    assert callback.result is not None
    x, y = data.datamodule.train_data  # type: ignore[attr-defined]
    order = data.partition.indices
    test = tuple(part[:3] for part in data.datamodule.test_data)  # type: ignore[attr-defined]
    scores, _ = by_hand(module, (x[order], y[order]), test, Dropout(k=100, seed=0))
    assert near(callback.result.scores, scores)
    assert tracin.num_checkpoints == 3
    assert tracin.result is not None
    assert tracin.result.self_influence.min() > 0


def test_a_finished_run_can_be_explained_without_a_step(tmp_path: Path) -> None:
    module, callback = Classifier(mlp()), DropoutInfluence(dirpath=tmp_path, test_data=TEST)
    t = trainer(callbacks=[callback], limit_train_batches=0)
    t.fit(module, loader())
    assert t.global_step == 0
    assert callback.result is not None
    assert near(callback.result.scores, by_hand(module, SAMPLES, TEST)[0])


def test_a_resumed_run_draws_the_mask_of_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> DropoutInfluence:
        return DropoutInfluence(Dropout(k=30), dirpath=tmp_path, train_data=SAMPLES, test_data=TEST)

    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    first, resumed, other = build(), build(), build()
    t = trainer(steps=4, callbacks=[first])
    t.fit(Classifier(mlp()), Stateful(loader()))
    t.save_checkpoint(tmp_path / "last.ckpt")
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    monkeypatch.setenv("PL_GLOBAL_SEED", "4")
    trainer(steps=4, callbacks=[resumed]).fit(Classifier(mlp()), Stateful(loader()), ckpt_path=tmp_path / "last.ckpt")
    trainer(steps=4, callbacks=[other]).fit(Classifier(mlp()), Stateful(loader()))
    results = [callback.result for callback in (first, resumed, other)]
    assert torch.equal(results[0].scores, results[1].scores)  # type: ignore[union-attr]
    assert not torch.equal(results[0].scores, results[2].scores)  # type: ignore[union-attr]


def explained(trainer: pl.Trainer, module: pl.LightningModule, callbacks: list[Any]) -> list[Any]:
    """On a rank: the scores of each callback."""
    return [None if c.result is None else c.result.scores for c in callbacks]


def two_reports(folder: Path) -> list[pl.Callback]:
    options: dict[str, Any] = {"test_data": TEST, "pictures": False}
    return [
        DropoutInfluence(dirpath=folder / "a", **options),
        TracIn(every_n_steps=3, dirpath=folder / "b", **options),
    ]


def test_of_two_processes_the_first_one_computes_on_all_samples(tmp_path: Path) -> None:
    first, second = fit_ddp(build=partial(two_reports, tmp_path), read=explained, precision="64-true")
    assert second.read == [None, None]
    assert torch.equal(first.weights, second.weights), "the others were trained on undisturbed"
    scores, along = first.read
    assert along.shape == scores.shape == (4, 96)
    module = Classifier(mlp()).double()
    nn.utils.vector_to_parameters(first.weights, module.parameters())
    exact = tuple(part.double() if part.is_floating_point() else part for part in SAMPLES)
    torch.testing.assert_close(scores, by_hand(module, exact, TEST)[0])


# ---------------------------------------------------------------- TracIn


class TwoGroups(Classifier):
    """Each layer has its own learning rate, both on a schedule."""

    def configure_optimizers(self) -> Any:
        head = list(self.network[-1].parameters())  # type: ignore[index]
        optimizer = torch.optim.SGD(
            [{"params": head, "lr": 0.3}, {"params": list(self.network[0].parameters())}], lr=0.1
        )  # type: ignore[index]
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def loss_gradients(network: nn.Module, data: tuple[Tensor, Tensor]) -> list[list[Tensor]]:
    """One backward a record."""
    found = []
    for x, y in zip(*data, strict=True):
        loss = F.cross_entropy(network(x[None]), y[None])
        found.append(list(torch.autograd.grad(loss, list(network.parameters()))))
    return found


def written_out(steps: int, every: int) -> tuple[Tensor, Tensor]:
    """Training, and the sum at every so many steps, by a plain loop."""
    network = mlp()
    scores, own = torch.zeros(len(TEST[1]), 96), torch.zeros(96)
    batches = [(x, y) for _ in range(9) for x, y in loader()]
    for step in range(steps):
        lrs = [0.8**step * lr for lr in (0.1, 0.1, 0.3, 0.3)]
        x, y = batches[step]
        gradients = torch.autograd.grad(F.cross_entropy(network(x), y), list(network.parameters()))
        with torch.no_grad():
            for p, g, lr in zip(network.parameters(), gradients, lrs, strict=True):
                p -= lr * g
        if (step + 1) % every == 0:
            of_test, of_train = (loss_gradients(network, data) for data in (TEST, SAMPLES))
            for i, g_i in enumerate(of_train):
                for t, g_t in enumerate(of_test):
                    scores[t, i] += sum(lr * (a * b).sum() for lr, a, b in zip(lrs, g_t, g_i, strict=True))
                own[i] += sum(lr * a.square().sum() for lr, a in zip(lrs, g_i, strict=True))
    return scores.double(), own.double()


@pytest.mark.parametrize(("options", "every"), [({"every_n_steps": 3}, 3), ({}, 4), ({"every_n_epochs": 2}, 8)])
def test_tracin_is_the_sum_that_a_plain_loop_gives(options: dict[str, int], every: int, tmp_path: Path) -> None:
    tracin = TracIn(**options, test_data=TEST, dirpath=tmp_path, batch_size=40)  # type: ignore[arg-type]
    module, plain = TwoGroups(mlp()), TwoGroups(mlp())
    trainer(steps=9, callbacks=[tracin]).fit(module, loader())
    trainer(steps=9).fit(plain, loader())
    assert torch.equal(weights(module), weights(plain))
    assert tracin.num_checkpoints == 9 // every
    scores, own = written_out(9, every)
    assert tracin.result is not None
    torch.testing.assert_close(tracin.result.scores, scores, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(tracin.result.self_influence, own, rtol=1e-3, atol=1e-5)
    assert int(rows_of(tmp_path / "influence.csv")[0]["train_index"]) == int(scores[0].argmax())
    assert json.loads((tmp_path / "influence.json").read_text())["num_checkpoints"] == 9 // every


def test_while_gradients_accumulate_a_step_counts_once(tmp_path: Path) -> None:
    tracin = TracIn(every_n_steps=1, test_data=TEST, dirpath=tmp_path)
    trainer(steps=3, callbacks=[tracin], accumulate_grad_batches=2).fit(Classifier(mlp()), loader())
    assert tracin.num_checkpoints == 3


@pytest.mark.parametrize("options", [{"every_n_steps": 2}, {"every_n_epochs": 1}])
def test_a_run_that_was_killed_and_resumed_gives_the_sum_of_one_that_was_not(
    options: dict[str, int], tmp_path: Path
) -> None:
    def build() -> TracIn:
        return TracIn(**options, train_data=SAMPLES, test_data=TEST, dirpath=tmp_path)  # type: ignore[arg-type]

    whole = build()
    trainer(steps=9, callbacks=[whole]).fit(Classifier(mlp()), Stateful(loader()))
    for step in (2, 4):  # within an epoch, and at its end
        saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
        with contextlib.suppress(Killed.Error):
            trainer(steps=9, enable_checkpointing=True, callbacks=[saver, Killed(step + 1), build()]).fit(
                Classifier(mlp()), Stateful(loader())
            )
        resumed, file = build(), tmp_path / f"step={step}.ckpt"
        torch.load(file, weights_only=True)
        trainer(steps=9, callbacks=[resumed]).fit(Classifier(mlp()), Stateful(loader()), ckpt_path=file)
        assert resumed.num_checkpoints == whole.num_checkpoints
        assert torch.equal(resumed.result.scores, whole.result.scores)  # type: ignore[union-attr]
        assert torch.equal(resumed.result.self_influence, whole.result.self_influence)  # type: ignore[union-attr]


def test_the_metrics_of_a_resumed_run_are_bit_for_bit_those_of_one_that_was_not(tmp_path: Path) -> None:
    def run(folder: Path, *extra: pl.Callback, ckpt_path: Path | None = None) -> None:
        callbacks = [
            *extra,
            ResumableCheckpoint(every_n_steps=3),
            DropoutInfluence(Dropout(density=0.25), num_test=5, pictures=False),
            TracIn(every_n_steps=2, num_test=5, pictures=False),
        ]
        t = trainer(
            steps=6,
            callbacks=callbacks,
            enable_checkpointing=True,
            default_root_dir=folder,
            logger=MetricsCSV(folder),
            log_every_n_steps=1,
            num_sanity_val_steps=0,
        )
        t.fit(SoftmaxRegression((1, 8, 8), optimizer=sgd), Digits(seed=0), ckpt_path=ckpt_path)

    run(tmp_path / "whole")
    with contextlib.suppress(Killed.Error):
        run(tmp_path / "part", Killed(5))
    assert not (tmp_path / "part" / "tracin").exists()
    run(tmp_path / "part", ckpt_path=tmp_path / "part" / "checkpoints" / "last.ckpt")
    for file in ("metrics.csv", "influence/influence.csv", "tracin/influence.csv", "tracin/self_influence.csv"):
        assert (tmp_path / "part" / file).read_text() == (tmp_path / "whole" / file).read_text()
    assert "influence/helpful_same_label" in read_metrics(tmp_path / "whole" / "metrics.csv")[-2]


def test_a_run_without_a_checkpoint_says_so_and_writes_nothing(tmp_path: Path) -> None:
    tracin = TracIn(every_n_epochs=5, test_data=TEST, dirpath=tmp_path / "none")
    with pytest.warns(UserWarning, match="ended before the first checkpoint.*Lower `every_n_epochs`"):
        trainer(callbacks=[tracin]).fit(Classifier(mlp()), loader())
    assert tracin.result is None
    assert not (tmp_path / "none").exists()


# ---------------------------------------------------------------- what is left after unlearning


@pytest.mark.parametrize("kind", [DropoutInfluence, TracIn])
def test_of_data_to_forget_the_retained_samples_are_ranked_by_their_rows(kind: Any, tmp_path: Path) -> None:
    data = ForgetRetain(Digits(seed=0), forget="class", label=3, batch_size=100, seed=0)
    callback = kind(num_test=5, dirpath=tmp_path, **({"every_n_steps": 2} if kind is TracIn else {}))
    module = SoftmaxRegression((1, 8, 8), optimizer=sgd)
    trainer(steps=4, callbacks=[FineTune(), callback], limit_val_batches=0).fit(module, datamodule=data)
    rows = data.retain_indices
    assert callback.result is not None
    assert torch.equal(callback.result.train_ids, rows)
    assert callback.result.scores.shape == (5, len(rows))
    x, y = data.datamodule.train_data  # type: ignore[attr-defined]
    if kind is DropoutInfluence:
        test = tuple(part[:5] for part in data.datamodule.test_data)  # type: ignore[attr-defined]
        assert near(callback.result.scores, by_hand(module, (x[rows], y[rows]), test)[0])
    written = rows_of(tmp_path / "influence.csv")
    best = [int(row["train_index"]) for row in written if row["test_index"] == "0"]
    assert best[0] == int(rows[callback.result.scores[0].argmax()])
    assert set(best) == set(rows.tolist())
    assert 3 not in y[best]
    own = [int(row["train_index"]) for row in rows_of(tmp_path / "self_influence.csv")]
    assert own[0] == int(rows[callback.result.self_influence.argmax()])


# ---------------------------------------------------------------- refusals


def wide() -> Classifier:
    """With more parameters than a dense solve takes, 3,003 of them in the head."""
    return Classifier(nn.Sequential(nn.Linear(FEATURES, 1000), nn.ReLU(), nn.Linear(1000, CLASSES)))


class Steps(pl.Callback):
    """Counts them."""

    def __init__(self) -> None:
        self.number = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.number += 1


def test_what_cannot_be_explained_is_refused_before_the_first_step(tmp_path: Path) -> None:
    for options, data, error, message in (
        ({"compressor": Dropout(density=1.0)}, loader(), ValueError, "too long for a dense solve"),
        ({}, data_of(Noisy()), MisconfigurationException, "differ when they are read again"),
        ({"test_data": (TEST[0][:0], TEST[1][:0])}, loader(), MisconfigurationException, "0 test samples"),
    ):
        steps = Steps()
        callback = DropoutInfluence(dirpath=tmp_path, **({"test_data": TEST} | options))  # type: ignore[arg-type]
        with pytest.raises(error, match=message):
            trainer(callbacks=[steps, callback]).fit(wide(), data)
        assert steps.number == 0


def test_retained_data_that_is_gone_is_refused_before_the_first_step(tmp_path: Path) -> None:
    data, steps = ForgetRetain(Digits(seed=0), retain_access=False, seed=0), Steps()
    callbacks = [GradientAscent(), steps, DropoutInfluence(dirpath=tmp_path)]
    with pytest.raises(MisconfigurationException, match="The retained data was asked for"):
        trainer(callbacks=callbacks).fit(SoftmaxRegression((1, 8, 8), optimizer=sgd), datamodule=data)
    assert steps.number == 0


def test_parameters_that_another_callback_freezes_do_not_count(tmp_path: Path) -> None:
    class Freezing(pl.Callback):
        def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
            pl_module.network[0].requires_grad_(False)  # type: ignore[index,operator]

    callback = DropoutInfluence(Dropout(density=1.0), dirpath=tmp_path, test_data=TEST)
    trainer(callbacks=[callback, Freezing()]).fit(wide(), loader())
    assert callback.result is not None
    assert callback.result.settings["k"] == callback.result.settings["num_parameters"] == 1000 * CLASSES + CLASSES


def test_the_example_of_the_documentation_fits_the_default_network_of_the_recipes() -> None:
    example = next(line for line in (DropoutInfluence.__doc__ or "").splitlines() if "Dropout(density=" in line)
    compressor: GradientCompressor = eval(example.split("DropoutInfluence(")[1].split(", num_test")[0])
    assert num_coordinates(compressor, ParameterLayout.of(ConvClassifier())) > 1000


def test_validation_data_are_found_where_the_first_epoch_does_not_need_them(tmp_path: Path) -> None:
    callback, tracin = DropoutInfluence(dirpath=tmp_path / "a"), TracIn(every_n_steps=3, dirpath=tmp_path / "b")
    t = trainer(callbacks=[callback, tracin], check_val_every_n_epoch=5, num_sanity_val_steps=0)
    t.fit(Evaluated(mlp()), loader(), DataLoader(TensorDataset(*TEST), batch_size=2))
    assert callback.result is not None
    assert callback.result.settings["test_data"] == "validation"


@pytest.mark.parametrize("kind", [Dropout, DropoutKron, GaussianProjection])
def test_the_report_names_its_compressor(kind: Any, tmp_path: Path) -> None:
    callback = DropoutInfluence(kind(k=30, seed=0), dirpath=tmp_path, test_data=TEST)
    trainer(callbacks=[callback]).fit(Classifier(mlp()), loader())
    settings = json.loads((tmp_path / "influence.json").read_text())
    assert settings["method"] == f"influence functions, {kind.__name__} as compression"


class Noisy(Dataset[Any]):
    """Draws an augmentation."""

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> Any:
        return SAMPLES[0][index] + torch.randn(FEATURES), SAMPLES[1][index]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return zip(*SAMPLES, strict=True)


class Augmenting(Classifier):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] + torch.randn(batch[0].shape), batch[1]


def data_of(dataset: Any, **options: Any) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size=24, **options)


@pytest.mark.parametrize(
    ("module", "data", "message"),
    [
        (Classifier, lambda: data_of(Noisy()), "train loader differ when they are read again.*Give `train_data`"),
        (Classifier, lambda: data_of(Stream()), "cannot be read by number.*Give `train_data`"),
        (
            Classifier,
            lambda: data_of(TensorDataset(*SAMPLES), sampler=SubsetRandomSampler(range(48))),
            "SubsetRandomSampler, which may choose.*Subset",
        ),
        (Augmenting, loader, "Augmenting.on_after_batch_transfer changes batches.*give `train_data`"),
    ],
)
@pytest.mark.parametrize("kind", [DropoutInfluence, TracIn])
def test_training_samples_that_cannot_be_told_are_refused(
    kind: Any, module: Any, data: Callable[[], Any], message: str, tmp_path: Path
) -> None:
    callback = kind(dirpath=tmp_path, test_data=TEST)
    with pytest.raises(MisconfigurationException, match=message):
        trainer(callbacks=[callback]).fit(module(mlp()), data())
    given = kind(dirpath=tmp_path, test_data=TEST, train_data=SAMPLES)
    trainer(callbacks=[given]).fit(module(mlp()), data())
    assert given.result.scores.shape == (4, 96)


def test_several_train_loaders_and_no_test_sample_are_refused(tmp_path: Path) -> None:
    class Both(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch[0], batch_idx)

    with pytest.raises(MisconfigurationException, match=r"train loader is a list.*`train_data`"):
        trainer(callbacks=[DropoutInfluence(dirpath=tmp_path, test_data=TEST)]).fit(Both(mlp()), [loader(), loader()])
    with pytest.raises(MisconfigurationException, match="no test samples to explain: give `test_data`"):
        trainer(callbacks=[DropoutInfluence(dirpath=tmp_path)]).fit(Classifier(mlp()), loader())
    nothing = DropoutInfluence(dirpath=tmp_path, test_data=(TEST[0][:0], TEST[1][:0]))
    with pytest.raises(MisconfigurationException, match="96 training and 0 test samples"):
        trainer(callbacks=[nothing]).fit(Classifier(mlp()), loader())


def test_two_reports_of_one_name_and_two_optimizers_are_refused(tmp_path: Path) -> None:
    twins = [DropoutInfluence(test_data=TEST, dirpath=tmp_path), TracIn(test_data=TEST, name="influence")]
    with pytest.raises(MisconfigurationException, match="Two reports of influence are named 'influence'"):
        trainer(callbacks=twins).fit(Classifier(mlp()), loader())

    class Two(Classifier):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [sgd(layer.parameters()) for layer in (self.network[0], self.network[-1])]  # type: ignore[index]

    with pytest.raises(MisconfigurationException, match="one optimizer, but there are 2"):
        trainer(callbacks=[TracIn(test_data=TEST)]).fit(Two(mlp()), loader())


def test_a_checkpoint_of_other_samples_is_refused(tmp_path: Path) -> None:
    t = trainer(steps=4, callbacks=[TracIn(train_data=SAMPLES, test_data=TEST, dirpath=tmp_path)])
    t.fit(Classifier(mlp()), Stateful(loader()))
    t.save_checkpoint(tmp_path / "last.ckpt")
    fewer = TracIn(train_data=SAMPLES, test_data=TEST, num_test=2, dirpath=tmp_path)
    with pytest.raises(MisconfigurationException, match=r"written with \(4, 96\).*\(2, 96\) now"):
        trainer(callbacks=[fewer]).fit(Classifier(mlp()), Stateful(loader()), ckpt_path=tmp_path / "last.ckpt")


def test_a_network_that_diverged_is_refused(tmp_path: Path) -> None:
    class Diverging(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e38)

    for callback, error in ((DropoutInfluence, ValueError), (TracIn, RuntimeError)):
        with pytest.raises(error, match=r"not finite.*[Ll]ower the learning rate"):
            trainer(callbacks=[callback(dirpath=tmp_path, test_data=TEST)]).fit(Diverging(mlp()), loader())


def test_building_the_callbacks_draws_nothing() -> None:
    """Otherwise a network that is built after them would begin with other weights."""
    before = torch.get_rng_state()
    DropoutInfluence()
    TracIn()
    assert torch.equal(torch.get_rng_state(), before)


def test_arguments_out_of_range_are_refused() -> None:
    for kind in (DropoutInfluence, TracIn):
        for name in ("num_test", "batch_size"):
            with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
                kind(**{name: 0})
    with pytest.raises(ValueError, match="`curvature` must be 'ggn' or 'fisher'"):
        DropoutInfluence(curvature="hessian")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`damping` must be at least 0"):
        DropoutInfluence(damping=-0.1)
    with pytest.raises(ValueError, match="not both; got 1 and 2"):
        TracIn(every_n_epochs=1, every_n_steps=2)
    for name in ("every_n_epochs", "every_n_steps"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1"):
            TracIn(**{name: 0})


def test_a_picture_is_refused_of_what_is_no_image() -> None:
    figure, axes = plot_influential_samples(torch.rand(2, 3, 1, 4, 4), [["a", "b", "c"]] * 2, num_helpful=1)
    assert isinstance(figure, matplotlib.figure.Figure)
    assert axes.shape == (2, 3)
    assert axes[1, 2].get_title() == "c"
    with pytest.raises(ValueError, match=r"got shape \(2, 3, 4\)"):
        plot_influential_samples(torch.rand(2, 3, 4), [["a"] * 3] * 2, num_helpful=1)
    with pytest.raises(ValueError, match="2 rows of 3"):
        plot_influential_samples(torch.rand(2, 3, 1, 4, 4), [["a"] * 3], num_helpful=1)
