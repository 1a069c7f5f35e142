from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from groundwire.callbacks.information import CMIMonitor, LogitsSource, NormalizedCMI
from helpers.callbacks import check_step_callback
from helpers.edge import Classifier, Killed, Rounds, Stateful, loader, mlp, trainer

PICTURES = {"cmi_evolution.png", "simplex.png", "centroids.png"}


class Validated(Classifier):
    """Has validation and test data of its own, in batches of unequal size."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", F.cross_entropy(self(batch[0]), batch[1]))

    def val_dataloader(self) -> Any:
        return loader(batch_size=40)

    def test_dataloader(self) -> Any:
        return loader(batch_size=40, samples=100)


@pytest.fixture(autouse=True)
def close_figures() -> Any:
    yield
    plt.close("all")


def expected(module: nn.Module, data: Any, temperature: float = 1.0) -> dict[str, float]:
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    with torch.no_grad():
        z = module(x)
    metric = NormalizedCMI(z.shape[1], temperature=temperature)
    metric.update(z, y)
    found = metric.compute()
    accuracy = float((z.argmax(dim=1) == y).double().mean())
    return {
        "cmi_nats": float(found["cmi"]),
        "gamma_nats": float(found["gamma"]),
        "ncmi": float(found["ncmi"]),
        "top1": accuracy,
    }


def logged(t: Any, stage: str) -> dict[str, float]:
    names = ("cmi_nats", "gamma_nats", "ncmi", "top1")
    return {name: float(t.callback_metrics[f"{stage}/{name}"]) for name in names}


def test_it_is_a_step_callback(tmp_path: Path) -> None:
    check_step_callback(lambda: CMIMonitor(dirpath=tmp_path, pictures=False), changes=False, module=Validated(mlp()))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_values_are_those_of_the_whole_validation_and_test_set(temperature: float, tmp_path: Path) -> None:
    module, monitor = Validated(mlp()), CMIMonitor(temperature, dirpath=tmp_path)
    t = trainer(steps=8, callbacks=[monitor])
    t.fit(module, loader())
    assert logged(t, "val") == pytest.approx(expected(module, module.val_dataloader(), temperature), rel=1e-6)
    assert [len(v) for v in monitor.history.values()] == [2] * 5  # two epochs; the sanity check is none
    assert monitor.history["epoch"] == [0, 1]
    assert monitor.history["cmi_nats"][-1] == pytest.approx(logged(t, "val")["cmi_nats"])
    for stage in ("validate", "test"):
        t = trainer(callbacks=[CMIMonitor(temperature, dirpath=tmp_path)])
        getattr(t, stage)(module, verbose=False)
        key = "val" if stage == "validate" else "test"
        data = module.val_dataloader() if stage == "validate" else module.test_dataloader()
        assert logged(t, key) == pytest.approx(expected(module, data, temperature), rel=1e-6)


def test_validation_alone_leaves_the_history_as_it_is(tmp_path: Path) -> None:
    module, monitor = Validated(mlp()), CMIMonitor(dirpath=tmp_path)
    t = trainer(steps=8, callbacks=[monitor])
    t.fit(module, loader())
    before = copy.deepcopy(monitor.history)
    t.validate(module, verbose=False)
    assert monitor.history == before


def test_the_sanity_check_is_ignored(tmp_path: Path) -> None:
    class Looks(CMIMonitor):
        seen = 0

        def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
            assert not self._metrics
            Looks.seen += 1

    module, monitor = Validated(mlp()), Looks(dirpath=tmp_path)
    trainer(steps=4, callbacks=[monitor], num_sanity_val_steps=2).fit(module, loader())
    assert Looks.seen == 1
    assert len(monitor.history["epoch"]) == 1


class Images(CSVLogger):
    """Takes images, as W&B's logger does."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.images: dict[str, list[str]] = {}

    def log_image(self, key: str, images: list[Any], step: int | None = None, **_: Any) -> None:
        self.images[key] = images


def test_pictures_are_written_and_given_to_a_logger(tmp_path: Path) -> None:
    images = Images(tmp_path / "log")
    monitor = CMIMonitor(dirpath=tmp_path / "pictures", class_names=["one", "two", "three"])
    trainer(steps=8, callbacks=[monitor], logger=[images, CSVLogger(tmp_path / "other")]).fit(
        Validated(mlp()), loader()
    )
    assert {file.name for file in (tmp_path / "pictures").iterdir()} == PICTURES
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in (tmp_path / "pictures").iterdir())
    assert set(images.images) == {f"pictures/{name.removesuffix('.png')}" for name in PICTURES}
    for (file,) in images.images.values():
        assert Path(file).is_file()
    assert plt.get_fignums() == [], "figures must not stay open"


def test_pictures_go_to_the_default_folder_or_nowhere(tmp_path: Path) -> None:
    trainer(steps=4, callbacks=[CMIMonitor()], default_root_dir=tmp_path / "a").fit(Validated(mlp()), loader())
    assert {file.name for file in (tmp_path / "a" / "pictures").iterdir()} == PICTURES
    trainer(steps=4, callbacks=[CMIMonitor(pictures=False)], default_root_dir=tmp_path / "b").fit(
        Validated(mlp()), loader()
    )
    assert not (tmp_path / "b" / "pictures").exists()


def test_without_validation_data_it_does_nothing(tmp_path: Path) -> None:
    monitor = CMIMonitor(dirpath=tmp_path / "none")
    trainer(steps=4, callbacks=[monitor]).fit(Classifier(mlp()), loader())
    assert monitor.history["epoch"] == []
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("step", [2, 4, 6, 8])
def test_the_history_of_a_resumed_run_equals_that_of_an_uninterrupted_one(step: int, tmp_path: Path) -> None:
    module, whole = Validated(mlp()), CMIMonitor(pictures=False)
    trainer(steps=12, callbacks=[whole]).fit(copy.deepcopy(module), loader())
    assert whole.history["epoch"] == [0, 1, 2]
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=step, save_top_k=-1, filename="{step}")
    callbacks = [CMIMonitor(pictures=False), saver, Killed(step + 1)]
    with contextlib.suppress(Killed.Error):
        trainer(steps=12, enable_checkpointing=True, callbacks=callbacks).fit(copy.deepcopy(module), Stateful(loader()))
    resumed = CMIMonitor(pictures=False)
    trainer(steps=12, callbacks=[resumed]).fit(
        copy.deepcopy(module), Stateful(loader()), ckpt_path=str(tmp_path / f"step={step}.ckpt")
    )
    # written in an epoch's last step, before its validation, which Lightning 2.6 does not make up for
    lost = {step // 4 - 1} if step % 4 == 0 else set()
    kept = [i for i in range(3) if i not in lost]
    assert resumed.history == {name: [values[i] for i in kept] for name, values in whole.history.items()}


def test_the_history_goes_on_after_the_checkpoint_of_an_epoch(tmp_path: Path) -> None:
    module, whole = Validated(mlp()), CMIMonitor(pictures=False)
    trainer(steps=12, callbacks=[whole]).fit(copy.deepcopy(module), loader())
    saver = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{epoch}")  # after the validation
    callbacks = [CMIMonitor(pictures=False), saver, Killed(9)]
    with contextlib.suppress(Killed.Error):
        trainer(steps=12, enable_checkpointing=True, callbacks=callbacks).fit(copy.deepcopy(module), Stateful(loader()))
    for epoch in (0, 1):
        resumed = CMIMonitor(pictures=False)
        trainer(steps=12, callbacks=[resumed]).fit(
            copy.deepcopy(module), Stateful(loader()), ckpt_path=str(tmp_path / f"epoch={epoch}.ckpt")
        )
        assert resumed.history == whole.history


def test_a_submodule_may_give_the_logits(tmp_path: Path) -> None:
    class PastForward(Validated):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/loss", F.cross_entropy(self.network(batch[0]), batch[1]))

    module = PastForward(mlp())
    t = trainer(steps=4, callbacks=[CMIMonitor(dirpath=tmp_path, source=LogitsSource("network"))])
    t.fit(module, loader())
    assert logged(t, "val") == pytest.approx(expected(module, module.val_dataloader()), rel=1e-6)


def test_bad_values_in_the_validation_are_refused(tmp_path: Path) -> None:
    class Breaks(Validated):
        def forward(self, x: Tensor) -> Any:
            return self.network(x) * (1.0 if self.training else float("nan"))

    with pytest.raises(RuntimeError, match="non-finite logits"):
        trainer(steps=4, callbacks=[CMIMonitor(dirpath=tmp_path)]).fit(Breaks(mlp()), loader())


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_bad_settings_are_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="`temperature` must be positive"):
        CMIMonitor(temperature)


class OfSeveral(Classifier):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch[0])


def test_each_of_several_loaders_has_numbers_of_its_own() -> None:
    first, second = loader(), Rounds(*[(3 * x, y) for x, y in loader()])
    both, alone = CMIMonitor(pictures=False), CMIMonitor(pictures=False)
    t = trainer(callbacks=[both])
    t.validate(OfSeveral(mlp()), [first, second], verbose=False)
    for index, data in enumerate((first, second)):
        single = trainer(callbacks=[alone])
        single.validate(Validated(mlp()), data, verbose=False)
        for name in ("cmi_nats", "gamma_nats", "ncmi", "top1"):
            assert t.callback_metrics[f"val/{name}/dataloader_idx_{index}"] == single.callback_metrics[f"val/{name}"]
