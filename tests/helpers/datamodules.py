"""The tester through which every datamodule goes."""

from __future__ import annotations

import contextlib
import inspect
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor, nn

from groundwire.datamodules import TensorClassification
from groundwire.plugins.edge import DeviceBatch
from helpers.edge import Killed, trainer


class Recorder(pl.LightningModule):
    """Trains nothing worth having, and remembers every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[Tensor, ...]] = []
        self.evaluated: dict[str, list[tuple[Tensor, ...]]] = {"val": [], "test": [], "predict": []}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(tensors(batch))
        return self.weight.sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluated["val"].append(tensors(batch))
        self.log("val/mean", batch[0].float().mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluated["test"].append(tensors(batch))
        self.log("test/mean", batch[0].float().mean())

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluated["predict"].append(tensors(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def tensors(batch: Any) -> tuple[Tensor, ...]:
    if isinstance(batch, DeviceBatch):
        return (*batch.leaves(), batch.device_ids, batch.num_samples)
    return tuple(batch)


def check_datamodule(
    build: Callable[..., TensorClassification], init_args: dict[str, Any] | None = None, *, epoch: int = 4
) -> None:
    """What every datamodule of one pair of tensors a split must pass.

    Args:
        build: Takes ``seed`` and ``batch_size``.
        init_args: Of the class, for YAML; other than the defaults.
        epoch: Batches an epoch in which to stop and resume.
    """
    data = build(seed=3, batch_size=5)
    data.setup("fit")
    size = -(-len(data.train_data[0]) // epoch)
    check_split_data(lambda seed: build(seed=seed, batch_size=size))
    check_stages(lambda: build(seed=3, batch_size=size))
    check_resume(lambda: build(seed=3, batch_size=size), epoch=epoch)
    check_resume(lambda: build(seed=3, batch_size=size), epoch=epoch, reload_dataloaders_every_n_epochs=1)
    check_resume(lambda: build(seed=3, batch_size=size // 2), epoch=epoch, limit_train_batches=epoch)
    check_resume_after_an_error(lambda: build(seed=3, batch_size=size), epoch=epoch)
    check_built_from_yaml(type(data), init_args or {})


def check_stages(build: Callable[[], pl.LightningDataModule]) -> None:
    """Every stage of the Trainer runs on the loaders as they are, in order, and Lightning finds nothing to warn of."""
    data, recorder, t = build(), Recorder(), trainer(steps=2, num_sanity_val_steps=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        t.fit(recorder, data)
        assert not recorder.evaluated["val"] or len(recorder.seen) == 2
        recorder.evaluated["val"].clear()
        t.validate(recorder, data, verbose=False)
        t.test(recorder, data, verbose=False)
        t.predict(recorder, data)
    found = [str(w.message) for w in caught if re.search("loader|sampler|batch_size", str(w.message))]
    assert not found, found
    for stage, seen in recorder.evaluated.items():
        expected = [tensors(batch) for batch in getattr(data, f"{stage}_dataloader")()]
        assert expected, stage
        for ours, theirs in zip(seen, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), stage


def check_built_from_yaml(kind: type[pl.LightningDataModule], init_args: dict[str, Any]) -> pl.LightningDataModule:
    """Build it as LightningCLI does: what is given arrives, the rest has its default, and a typo is an error."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=pl.LightningDataModule)

    def config(**more: Any) -> str:
        path = f"groundwire.datamodules.{kind.__name__}"
        return yaml.safe_dump({"data": {"class_path": path, "init_args": init_args | more}})

    data = parser.instantiate(parser.parse_string(config())).data
    assert type(data) is kind
    for name, parameter in inspect.signature(kind).parameters.items():
        value = init_args.get(name, parameter.default)
        if name in vars(data) and isinstance(value, bool | int | float | None):
            assert getattr(data, name) == value, name
    with pytest.raises(Exception, match="no_such_option"):
        parser.parse_string(config(no_such_option=1))
    return data


def check_split_data(build: Callable[[int], TensorClassification]) -> None:
    """What every datamodule of one pair of tensors a split must pass; ``build`` takes the seed."""
    data = build(0)
    data.setup("fit")
    splits = {"train": data.train_data, "val": data.val_data, "test": data.test_data}
    for name, (x, y) in splits.items():
        assert x.dtype == torch.float32, name
        assert y.dtype == torch.int64, name
        assert x.shape == (len(y), *data.input_shape), name
        assert 0 <= float(x.min()) < float(x.max()) <= 1, name
        assert set(y.unique().tolist()) <= set(range(data.num_classes)), name
    assert set(data.train_data[1].unique().tolist()) == set(range(data.num_classes))

    def multiset(module: TensorClassification) -> Tensor:
        whole = [module.train_data, module.val_data, module.test_data]
        x = torch.cat([part[0].flatten(1).double() for part in whole])
        key = torch.randn(x.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return (x @ key + 100 * torch.cat([part[1] for part in whole])).sort().values

    again, other = build(0), build(1)
    again.setup()
    other.setup()
    assert all(torch.equal(a, b) for a, b in zip(data.train_data, again.train_data, strict=True))
    assert not torch.equal(data.train_data[1], other.train_data[1])
    # splits are disjoint: were a sample in two of them, another would be in none, and other seeds choose others
    assert torch.allclose(multiset(data), multiset(other), rtol=0, atol=1e-9)

    loader = data.train_dataloader()
    epochs = [torch.cat([x.flatten(1) for x, _ in loader]) for _ in range(2)]
    whole = data.train_data[0].flatten(1)
    for order in epochs:
        assert torch.equal(order.sum(1).sort().values, whole.sum(1).sort().values), "each sample once an epoch"
    assert not torch.equal(epochs[0], epochs[1])
    for loader, (x, y) in ((data.val_dataloader(), splits["val"]), (data.test_dataloader(), splits["test"])):
        assert torch.equal(torch.cat([b[0] for b in loader]), x)
        assert torch.equal(torch.cat([b[1] for b in loader]), y)
    assert torch.equal(next(iter(data.predict_dataloader()))[0], next(iter(data.test_dataloader()))[0])


class Fails(pl.Callback):
    """An error inside a step, after its batch was fetched."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise Killed.Error


def check_resume_after_an_error(build: Callable[[], pl.LightningDataModule], *, steps: int = 9, epoch: int = 4) -> None:
    """Fail within each step, save what is there, resume, and see the batch of that step again."""
    whole = Recorder()
    trainer(steps=steps).fit(whole, build())
    assert len(whole.seen) == steps > 2 * epoch
    for step in range(1, steps):
        with tempfile.TemporaryDirectory() as folder:
            saver = OnExceptionCheckpoint(folder)
            failed = trainer(steps=steps, enable_checkpointing=True, callbacks=[Fails(step), saver])
            with contextlib.suppress(Killed.Error):
                failed.fit(Recorder(), build())
            resumed = Recorder()
            trainer(steps=steps).fit(resumed, build(), ckpt_path=saver.ckpt_path)
        for ours, theirs in zip(resumed.seen, whole.seen[step:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), f"failed in step {step}"


def check_resume(
    build: Callable[[], pl.LightningDataModule], *, steps: int = 7, epoch: int = 4, **options: Any
) -> None:
    """Kill training after each step, resume from a checkpoint, and see the very batches of an uninterrupted run.

    Args:
        build: A datamodule with epochs of ``epoch`` batches.
        steps: Steps of the run; more than an epoch.
        epoch: Batches an epoch.
        **options: Of the Trainer.
    """
    whole = Recorder()
    trainer(steps=steps, **options).fit(whole, build())
    assert len(whole.seen) == steps
    assert steps > epoch
    for stop in (epoch - 2, epoch, epoch + 1):
        with tempfile.TemporaryDirectory() as folder:
            saver = ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
            killed = trainer(steps=steps, enable_checkpointing=True, callbacks=[saver, Killed(stop + 1)], **options)
            with contextlib.suppress(Killed.Error):
                killed.fit(Recorder(), build())
            resumed = Recorder()
            trainer(steps=steps, **options).fit(resumed, build(), ckpt_path=str(Path(folder) / f"step={stop}.ckpt"))
        for ours, theirs in zip(resumed.seen, whole.seen[stop:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), f"resumed after {stop}"
