from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
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

from groundwire.callbacks.information import MaximumCMI
from groundwire.datamodules import Digits, Federated
from groundwire.plugins.edge import EdgeStrategy
from helpers.callbacks import check_step_callback
from helpers.edge import CLASSES, FEATURES, Classifier, Killed, Losses, Stateful, fit, loader, mlp, trainer, weights


@contextlib.contextmanager
def seed(value: int) -> Iterator[None]:
    """Torch's global stream from a seed, put back afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(value)
        yield


def rows_of(data: Any) -> tuple[Tensor, Tensor]:
    batches = list(data)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def exact_means(module: nn.Module, x: Tensor, y: Tensor, classes: int) -> Tensor:
    with torch.no_grad():
        p = module(x).double().softmax(dim=1)
    return torch.stack([p[y == c].mean(dim=0) for c in range(classes)])


def digits_net(*extra: nn.Module) -> Classifier:
    with seed(1):
        return Classifier(nn.Sequential(nn.Linear(64, 32), *extra, nn.ReLU(), nn.Linear(32, 10)), lr=3e-3)


def cmi_of(module: nn.Module, x: Tensor, y: Tensor) -> float:
    q = exact_means(module, x, y, 10)
    with torch.no_grad():
        log_p = module(x).double().log_softmax(dim=1)
    return float(F.kl_div(q.log()[y], log_p, log_target=True, reduction="batchmean"))


class ByHand(Classifier):
    """Cross entropy minus the divergence from given centroids."""

    def __init__(self, lam: float, q: Tensor, q_min: float = 1e-4) -> None:
        super().__init__(mlp())
        self.lam, self.log_q = lam, q.clamp_min(q_min).log()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        lp = self(x).log_softmax(dim=1)
        return F.nll_loss(lp, y) - self.lam * (lp.exp() * (lp - self.log_q[y])).sum(dim=1).mean()


@pytest.mark.parametrize("q_update", ["none", "batch", "epoch"])
def test_it_is_a_step_callback(q_update: Any) -> None:
    check_step_callback(
        lambda: MaximumCMI(lam=0.5, q_update=q_update, mu=0.9, max_accuracy_drop=1.0),
        off=lambda: MaximumCMI(lam=0.0, q_update=q_update, max_accuracy_drop=1.0),
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_trains_as_the_objective_written_by_hand(accumulate: int) -> None:
    run = {"precision": "64-true", "accumulate_grad_batches": accumulate}
    q = exact_means(Classifier(mlp()), *rows_of(loader()), CLASSES)
    plugged, _, losses = fit("auto", callbacks=[MaximumCMI(lam=0.5, max_accuracy_drop=1.0)], **run)
    own, _, own_losses = fit("auto", ByHand(0.5, q), **run)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(own_losses), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(plugged, own, rtol=1e-5, atol=1e-6)
    other, _, _ = fit("auto", ByHand(0.25, q), **run)
    assert (plugged - other).abs().max() > 1e-3


def test_without_weight_it_is_plain_fine_tuning_though_the_loader_shuffles() -> None:
    module, data = Classifier(mlp(nn.Dropout(0.3))), loader()
    finals = []
    for callbacks in ([], [MaximumCMI(lam=0.0, max_accuracy_drop=1.0)]):
        with seed(5):
            shuffled = DataLoader(data.dataset, batch_size=24, shuffle=True)
            finals.append(fit("auto", module, data=shuffled, callbacks=callbacks, steps=10)[0])
    assert torch.equal(finals[0], finals[1])
    with seed(6):
        shuffled = DataLoader(data.dataset, batch_size=24, shuffle=True)
        assert not torch.equal(finals[0], fit("auto", module, data=shuffled, steps=10)[0])  # the seed does matter


def test_without_weight_it_is_plain_fine_tuning_on_digits() -> None:
    module = digits_net()
    plain, _, _ = fit("auto", module, data=Digits(flatten=True, seed=3), steps=25)
    tuned, _, _ = fit(
        "auto",
        module,
        data=Digits(flatten=True, seed=3),
        steps=25,
        callbacks=[MaximumCMI(lam=0.0, max_accuracy_drop=1.0)],
    )
    assert torch.equal(plain, tuned)


def test_the_pass_finds_the_exact_means_and_they_stay() -> None:
    module, callback = Classifier(mlp(nn.Dropout(0.5))), MaximumCMI(lam=0.5, max_accuracy_drop=1.0)
    fit("auto", module, callbacks=[callback], steps=10)
    assert callback.centroids is not None
    expected = exact_means(copy.deepcopy(module).eval(), *rows_of(loader()), CLASSES)
    torch.testing.assert_close(callback.centroids.double(), expected, rtol=1e-6, atol=1e-7)


def test_the_pass_respects_a_limit_of_batches() -> None:
    module, callback = Classifier(mlp()), MaximumCMI(max_accuracy_drop=1.0)
    fit("auto", module, callbacks=[callback], steps=2, limit_train_batches=2)
    x, y = rows_of(loader())
    assert callback.centroids is not None
    expected = exact_means(module, x[:48], y[:48], CLASSES)
    torch.testing.assert_close(callback.centroids.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_batch_norm_moves_only_in_train_mode(mode: Any) -> None:
    class Stop(Exception):
        pass

    class StopsBeforeTraining(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            assert pl_module.training
            assert all(sub.training for sub in pl_module.modules())
            raise Stop

    module = Classifier(mlp(nn.BatchNorm1d(16)))
    before = weights(module)
    t = trainer(callbacks=[MaximumCMI(q_pass_mode=mode), StopsBeforeTraining()])
    with pytest.raises(Stop):
        t.fit(module, loader())
    assert torch.equal(weights(module), before) == (mode == "eval")
    norm = module.network[1]  # type: ignore[index]
    assert int(norm.num_batches_tracked) == (0 if mode == "eval" else 4)


def test_each_submodule_returns_to_its_own_mode() -> None:
    class Frozen(Classifier):
        def on_train_start(self) -> None:
            assert not self.network[1].training
            assert self.network[0].training

        def on_fit_start(self) -> None:
            self.network[1].eval()

    fit("auto", Frozen(mlp(nn.BatchNorm1d(16))), callbacks=[MaximumCMI(max_accuracy_drop=1.0)], steps=2)


def test_cmi_on_the_training_data_grows() -> None:
    data = Digits(flatten=True, seed=0)
    data.setup("fit")
    module = digits_net()
    trainer(steps=1500).fit(module, Digits(flatten=True, seed=0))  # a converged teacher, as the method wants it
    module.lr = 1e-3
    before = cmi_of(module, *data.train_data)
    after = {}
    for lam in (0.0, 0.25):
        tuned = copy.deepcopy(module)
        t = trainer(steps=100, callbacks=[MaximumCMI(lam=lam)], log_every_n_steps=1)
        t.fit(tuned, Digits(flatten=True, seed=0))
        after[lam] = cmi_of(tuned, *data.train_data)
        accuracy = (tuned(data.train_data[0]).argmax(dim=1) == data.train_data[1]).float().mean()
        assert accuracy > 0.95
        assert float(t.callback_metrics["mcmi/train_acc"]) == pytest.approx(float(accuracy), abs=0.03)
        assert float(t.callback_metrics["mcmi/lam"]) == pytest.approx(lam)
    assert after[0.25] > 1.5 * before
    assert after[0.25] > 1.5 * after[0.0]


@pytest.mark.parametrize("strategy", ["auto", "edge"])
def test_a_fall_of_the_training_accuracy_ends_the_run(strategy: str) -> None:
    module = digits_net()
    trainer(steps=150).fit(module, Digits(flatten=True, seed=0))
    module.lr, module.optimizer_name = 30.0, "SGD"
    t = trainer(
        EdgeStrategy(num_devices=2) if strategy == "edge" else "auto", callbacks=[MaximumCMI(lam=0.5)], steps=50
    )
    with pytest.raises(RuntimeError, match=r"has brought the training accuracy from 0\.9\d+ down to .* Lower `lam`"):
        t.fit(module, Digits(batch_size=64, flatten=True, seed=0, drop_last=True))


def test_weights_come_from_a_checkpoint_or_the_folder_of_a_run(tmp_path: Path) -> None:
    trained = Classifier(mlp())
    t = trainer(steps=20)
    t.fit(trained, loader())
    t.save_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "last.ckpt"):
        callback = MaximumCMI(checkpoint=path, max_accuracy_drop=1.0)
        fit("auto", Classifier(mlp()), callbacks=[callback], steps=2)
        assert callback.centroids is not None
        expected = exact_means(trained, *rows_of(loader()), CLASSES)
        torch.testing.assert_close(callback.centroids.double(), expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        fit("auto", callbacks=[MaximumCMI(checkpoint=tmp_path / "nothing")])
    with pytest.raises(ValueError, match="does not fit Classifier"):
        fit("auto", Classifier(nn.Linear(FEATURES, CLASSES)), callbacks=[MaximumCMI(checkpoint=tmp_path / "run")])


@pytest.mark.parametrize("q_update", ["none", "batch", "epoch"])
def test_a_resumed_run_equals_an_uninterrupted_one_without_a_second_pass(q_update: Any, tmp_path: Path) -> None:
    class Counted(Classifier):
        passed = 0

        def forward(self, x: Tensor) -> Tensor:
            self.passed += not self.training
            return super().forward(x)

    def build() -> MaximumCMI:
        return MaximumCMI(lam=0.5, q_update=q_update, mu=0.9, max_accuracy_drop=1.0)

    module = Counted(mlp())
    final, _, losses = fit("auto", module, callbacks=[build()], steps=10)
    for step in (2, 3, 4, 8):
        saver = ModelCheckpoint(
            dirpath=tmp_path / f"{step}", every_n_train_steps=step, save_top_k=-1, filename="{step}"
        )
        started = copy.deepcopy(module)
        killed = trainer(steps=10, enable_checkpointing=True, callbacks=[build(), saver, Killed(step + 1)])
        with contextlib.suppress(Killed.Error):
            killed.fit(started, Stateful(loader()))
        assert started.passed == 4
        fresh, recorded, callback = copy.deepcopy(module), Losses(), build()
        t = trainer(steps=10, callbacks=[recorded, callback])
        t.fit(fresh, Stateful(loader()), ckpt_path=str(tmp_path / f"{step}" / f"step={step}.ckpt"))
        assert recorded.values == losses[step:]
        assert torch.equal(weights(fresh), final)
        assert fresh.passed == 0


def test_with_federated_data_the_pass_sees_the_samples_of_all_devices() -> None:
    def data() -> Federated:
        return Federated(Digits(flatten=True, seed=0), num_devices=4, partition="shards", batch_size=None, seed=0)

    module, callback, whole = digits_net(), MaximumCMI(lam=0.2, max_accuracy_drop=1.0), data()
    fit(EdgeStrategy(num_devices=4), module, data=data(), callbacks=[callback], steps=2)
    whole.setup("fit")
    batch = next(iter(whole.train_dataloader()))
    x, y = rows_of(batch.row(i) for i in range(4))
    assert len(y) > 1000
    assert callback.centroids is not None
    expected = exact_means(module, x, y, 10)
    torch.testing.assert_close(callback.centroids.double(), expected, rtol=1e-6, atol=1e-6)
    of_one = exact_means(module, *batch.row(0), 10)
    assert (of_one.nan_to_num() - expected).abs().max() > 1e-3


def test_double_precision_and_an_update_every_epoch_go_together() -> None:
    callback = MaximumCMI(lam=0.2, q_update="epoch", max_accuracy_drop=1.0)
    fit("auto", callbacks=[callback], precision="64-true", steps=9)
    assert callback.centroids is not None
    assert torch.isfinite(callback.centroids).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": -0.1}, "makes CMI large. To make it small, use CMIConstraint"),
        ({"lam": 1.5}, "pass allow_large_lambda=True"),
        ({"q_pass_mode": "both"}, "`q_pass_mode` must be"),
        ({"max_accuracy_drop": -1.0}, "`max_accuracy_drop` must be"),
        ({"q_update": "sometimes"}, "`q_update` must be"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaximumCMI(**options)


def test_a_large_weight_may_be_allowed() -> None:
    assert MaximumCMI(lam=1.5, allow_large_lambda=True).lam == 1.5


def test_a_class_without_a_sample_keeps_the_uniform_centroid() -> None:
    x = torch.randn(24, FEATURES, generator=torch.Generator().manual_seed(0))
    callback = MaximumCMI(max_accuracy_drop=1.0)
    data: Any = DataLoader(TensorDataset(x, torch.arange(24) % 2), batch_size=12)
    fit("auto", callbacks=[callback], data=data, steps=2)
    assert callback.centroids is not None
    assert torch.equal(callback.centroids[2], torch.full((CLASSES,), 1 / CLASSES))


def test_the_guard_measures_before_and_after_in_the_same_mode() -> None:
    """Dropout lowers the accuracy in training mode: no reason to stop."""
    network = nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Dropout(0.8), nn.Linear(64, CLASSES))
    trained = Classifier(network)
    trainer(steps=300).fit(trained, loader())
    trainer(steps=8, callbacks=[MaximumCMI(lam=0.0, max_accuracy_drop=0.15)]).fit(trained, loader())


def test_the_pass_leaves_a_loaders_own_generator_as_it_was() -> None:
    def shuffled() -> DataLoader[Any]:
        return DataLoader(loader().dataset, batch_size=24, shuffle=True, generator=torch.Generator().manual_seed(3))

    module = Classifier(mlp())
    plain, _, _ = fit("auto", module, data=shuffled())
    assert torch.equal(fit("auto", module, data=shuffled(), callbacks=[MaximumCMI(lam=0.0)])[0], plain)


def test_a_second_fit_goes_on_from_the_first_and_not_from_the_checkpoint(tmp_path: Path) -> None:
    start = Classifier(mlp())
    t = trainer(steps=4)
    t.fit(start, loader())
    t.save_checkpoint(tmp_path / "teacher.ckpt")
    module = Classifier(mlp())
    t = trainer(steps=4, callbacks=[MaximumCMI(lam=0.1, checkpoint=tmp_path / "teacher.ckpt", max_accuracy_drop=1.0)])
    t.fit(module, loader())
    after_one = weights(module)
    t.fit(module, loader())  # nothing is left to train
    assert torch.equal(weights(module), after_one)


def test_several_train_loaders_are_refused() -> None:
    class Two(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch["a"], batch_idx)

    with pytest.raises(MisconfigurationException, match="single train loader"):
        trainer(steps=1, callbacks=[MaximumCMI()]).fit(Two(mlp()), {"a": loader(), "b": loader()})
