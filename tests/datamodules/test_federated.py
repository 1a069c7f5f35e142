"""Federated data: who gets which samples in which round, and that nothing else decides it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

from groundwire.datamodules import Digits, Federated, RoundLoader, plot_partition
from groundwire.datamodules.buffers import Buffers
from groundwire.plugins.edge import EdgeStrategy
from helpers.datamodules import Recorder, check_built_from_yaml, check_resume, check_resume_after_an_error, check_stages
from helpers.edge import Classifier, Killed, Losses, fit, trainer, weights


def loader(counts: list[int], **options: Any) -> RoundLoader:
    """Sample i of device m is the number 1000 m + i."""
    numbers = torch.cat([1000 * m + torch.arange(c) for m, c in enumerate(counts)])
    split = (numbers.float().unsqueeze(1), numbers)
    return RoundLoader(split, torch.tensor(counts), **({"num_rounds": 4} | options))


def test_a_round_depends_only_on_seed_round_and_device() -> None:
    everyone = loader([7, 12, 9], batch_size=3)
    some = loader([7, 12, 9], batch_size=3, devices_per_round=2)
    for t in (5, 0, 3, 17, 2):  # in any order
        full, part = everyone.batch(0, t), some.batch(0, t)
        for row, m in enumerate(part.device_ids.tolist()):
            assert torch.equal(part.data[1][row], full.data[1][m])
    long, short = loader([7, 12], batch_size=3, num_rounds=10), loader([7, 12], batch_size=3, num_rounds=5)
    for t in range(10):
        assert torch.equal(long.batch(0, t).data[1], short.batch(t // 5, t % 5).data[1])
    other = loader([7, 12, 9], batch_size=3, seed=1)
    assert not torch.equal(other.batch(0, 0).data[1], everyone.batch(0, 0).data[1])


def test_devices_walk_through_their_own_samples() -> None:
    rounds = loader([6, 8, 12], batch_size=2)
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for t in range(12):
        batch = rounds.batch(0, t)
        assert batch.data[0].shape == (3, 2, 1)
        assert batch.num_samples.tolist() == [6, 8, 12]
        for m in range(3):
            seen[m] += batch.data[1][m].tolist()
    for m, count in enumerate([6, 8, 12]):
        assert all(1000 * m <= s < 1000 * m + count for s in seen[m])
        for start in range(0, 24, count):  # each pass visits each sample once
            assert len(set(seen[m][start : start + count])) == count
    assert seen[0][:6] != seen[0][6:12], "each pass has an order of its own"


def test_what_does_not_fill_a_batch_waits_for_the_next_pass_and_few_samples_repeat() -> None:
    rounds = loader([7, 2], batch_size=3)
    first = torch.cat([rounds.batch(0, t).data[1][0] for t in range(2)])
    assert len(first.unique()) == 6
    assert sorted(rounds.batch(0, 0).data[1][1].unique().tolist()) == [1000, 1001]
    assert len({tuple(rounds.batch(0, t).data[1][1].tolist()) for t in range(8)}) == 2


@settings(max_examples=50, deadline=None)
@given(
    counts=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    batch_size=st.integers(1, 8),
    seed=st.integers(0, 99),
    order=st.randoms(use_true_random=False),
)
def test_a_pass_visits_each_sample_at_most_once(counts: list[int], batch_size: int, seed: int, order: Any) -> None:
    rounds = loader(counts, batch_size=batch_size, seed=seed, num_rounds=7)
    visits = list(range(40))
    order.shuffle(visits)
    batches = {t: rounds.batch(t // 7, t % 7) for t in visits}  # in any order of access
    for m, count in enumerate(counts):
        rounds_a_pass = max(1, count // batch_size)
        for start in range(0, 40 - rounds_a_pass + 1, rounds_a_pass):
            seen = [s for t in range(start, start + rounds_a_pass) for s in batches[t].data[1][m].tolist()]
            assert all(1000 * m <= s < 1000 * m + count for s in seen)
            if batch_size > count:  # all of them, as evenly as can be
                times = torch.bincount(torch.tensor(seen) - 1000 * m, minlength=count)
                assert int(times.min()) >= 1
                assert int(times.max() - times.min()) <= 1
            else:
                assert len(set(seen)) == len(seen)
                assert count % batch_size or len(seen) == count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_rounds": 0}, "`num_rounds` must be at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"devices_per_round": 0}, "`devices_per_round` must be at least 1, got 0"),
        ({"devices_per_round": 3}, "`devices_per_round` is 3, but there are 2 devices"),
    ],
)
def test_bad_rounds_by_message(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loader([2, 2], **options)
    split = (torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64))
    for counts in ([2, 1], [4, 0]):
        with pytest.raises(ValueError, match="`counts` must be at least 1 and sum to 4 samples"):
            RoundLoader(split, torch.tensor(counts), num_rounds=1)


def test_the_full_local_set_is_served_without_a_copy() -> None:
    rounds = loader([5, 5])
    first, second = rounds.batch(0, 0), rounds.batch(0, 1)
    assert first.data[0].data_ptr() == rounds.split[0].data_ptr() == second.data[0].data_ptr()
    assert first.data[1].tolist() == [[0, 1, 2, 3, 4], [1000, 1001, 1002, 1003, 1004]]
    assert first.lengths is None


def test_unequal_local_sets_are_padded_with_their_lengths() -> None:
    batch = loader([2, 4]).batch(0, 0)
    assert batch.lengths is not None
    assert batch.lengths.tolist() == [2, 4]
    assert batch.row(0)[1].tolist() == [0, 1]
    assert batch.row(1)[1].tolist() == [1000, 1001, 1002, 1003]


def test_devices_of_a_round_are_a_uniform_sample() -> None:
    rounds = loader([1] * 10, devices_per_round=3, num_rounds=3000)
    drawn = torch.stack([rounds._devices(t) for t in range(3000)])
    assert all(len(set(row)) == 3 and row == sorted(row) for row in drawn.tolist())
    frequency = torch.bincount(drawn.flatten(), minlength=10) / 3000
    assert ((frequency - 0.3).abs() < 5 * (0.3 * 0.7 / 3000) ** 0.5).all()


@pytest.mark.parametrize("options", [{"batch_size": 16, "devices_per_round": 3}, {"partition": "dirichlet"}, {}])
def test_resume(options: dict[str, Any]) -> None:
    check_resume(lambda: Federated(Digits(), num_devices=5, rounds_per_epoch=4, seed=2, **options))
    check_resume(lambda: Federated(Digits(), num_devices=5, rounds_per_epoch=9, **options), limit_train_batches=4)
    check_resume_after_an_error(lambda: Federated(Digits(), num_devices=5, rounds_per_epoch=4, seed=2, **options))
    check_resume_after_an_error(lambda: Federated(Digits(), num_devices=5, rounds_per_epoch=1, **options), epoch=1)


def test_a_checkpoints_seed_goes_on_and_other_settings_are_refused(tmp_path: Any, seeded: Any) -> None:
    def build(**options: Any) -> Federated:
        return Federated(Digits(flatten=True), **({"num_devices": 5, "batch_size": 8} | options))

    module = Classifier(nn.Linear(64, 10))
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, filename="two")
    seeded(3)
    whole, _, _ = fit(EdgeStrategy(num_devices=5), module, build(), steps=4)
    fit(EdgeStrategy(num_devices=5), module, build(), steps=2, enable_checkpointing=True, callbacks=[saver])
    seeded(4)  # resumed under another seed_everything, the run keeps its own
    resumed, _, _ = fit_from(tmp_path / "two.ckpt", module, build())
    assert torch.equal(whole, resumed)
    for other, both in [
        (build(batch_size=9), "batch_size was 8 and is now 9"),
        (build(partition="shards"), "kind was 'iid' and is now 'shards'"),
        (build(seed=7), "seed was 3 and is now 7"),
    ]:
        with pytest.raises(MisconfigurationException, match=both):
            fit_from(tmp_path / "two.ckpt", module, other)


@pytest.mark.parametrize(
    ("name", "there", "here"),
    [
        ("num_devices", 5, 6),
        ("samples_per_device", None, 10),
        ("alpha", 0.5, 0.6),
        ("min_samples", 1, 2),
        ("shards_per_device", 2, 3),
        ("classes_per_device", 2, 3),
        ("quantity_skew", None, 1.0),
        ("batch_size", None, 4),
        ("devices_per_round", None, 3),
        ("rounds_per_epoch", None, 9),
        ("seed", 1, 2),
    ],
)
def test_every_setting_of_a_checkpoint_is_compared(name: str, there: Any, here: Any) -> None:
    first = Federated(Digits(), **({"num_devices": 5, "seed": 1} | {name: there}))
    other = Federated(Digits(), **({"num_devices": 5, "seed": 1} | {name: here}))
    first.setup("fit")
    other.setup("fit")
    with pytest.raises(MisconfigurationException, match=f": {name} was {there} and is now {here}. Resume with"):
        other.load_state_dict(first.state_dict())


@pytest.mark.parametrize("options", [{"partition": "dirichlet"}, {"batch_size": 16, "devices_per_round": 5}])
@pytest.mark.parametrize("stop", [3, 4])  # within an epoch of four rounds, and at its end
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, options: dict[str, Any], stop: int) -> None:
    def build() -> Federated:
        return Federated(Digits(flatten=True), num_devices=5, rounds_per_epoch=4, seed=2, **options)

    module = Classifier(nn.Linear(64, 10))
    whole, _, losses = fit(EdgeStrategy(num_devices=5), module, build(), steps=7)
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    with contextlib.suppress(Killed.Error):
        callbacks = [saver, Killed(stop + 1)]
        fit(EdgeStrategy(num_devices=5), module, build(), steps=7, enable_checkpointing=True, callbacks=callbacks)
    fresh, recorded = Classifier(nn.Linear(64, 10)), Losses()
    t = trainer(EdgeStrategy(num_devices=5), steps=7, callbacks=[recorded])
    t.fit(fresh, build(), ckpt_path=str(tmp_path / f"step={stop}.ckpt"))
    assert recorded.values == losses[stop:]
    assert torch.equal(weights(fresh), whole)


def fit_from(checkpoint: Any, module: Classifier, data: Federated) -> tuple[Tensor, Any, Any]:
    t = trainer(EdgeStrategy(num_devices=5), steps=4)
    t.fit(module, data, ckpt_path=str(checkpoint))
    return torch.cat([v.flatten().double() for v in module.state_dict().values()]), t, None


class Pairs(Dataset[Any]):
    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((4,), float(index)), index % 3


class Ordinary(LightningDataModule):
    """What a user already has."""

    def __init__(self, dataset: Any, **options: Any) -> None:
        super().__init__()
        self.dataset, self.options = dataset, {"batch_size": 10} | options

    def train_dataloader(self) -> Any:
        return DataLoader(self.dataset, **self.options)

    def val_dataloader(self) -> Any:
        return DataLoader(self.dataset, batch_size=7)


def test_any_classification_datamodule_will_do() -> None:
    stacked = TensorDataset(torch.arange(60.0)[:, None].repeat(1, 4), torch.arange(60) % 3)
    batches = []
    for dataset in (Pairs(), stacked):
        data = Federated(Ordinary(dataset), num_devices=3, partition="by_label", classes_per_device=1, seed=0)
        data.setup("fit")
        batch = next(iter(data.train_dataloader()))
        assert all(len(set(row)) == 1 for row in batch.data[1].tolist())
        assert torch.equal(batch.data[0][..., 0].long() % 3, batch.data[1])
        assert len(next(iter(data.val_dataloader()))[0]) == 7
        batches.append(batch)
    assert torch.equal(batches[0].data[0], batches[1].data[0])


def pairs(samples: int = 60) -> TensorDataset:
    return TensorDataset(torch.arange(float(samples))[:, None].repeat(1, 4), torch.arange(samples) % 3)


class OnlyTraining(LightningDataModule):
    """Keeps a dataset, not tensors, under a usual name; has no validation data; asks for its Trainer."""

    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        self.train_data = Subset(pairs(), range(0, 60 // self.trainer.world_size, 2))

    def prepare_data(self) -> None:
        assert self.trainer is not None

    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        return DataLoader(self.train_data, batch_size=10, shuffle=True)


def test_a_datamodule_without_validation_that_needs_its_trainer() -> None:
    recorder = Recorder()
    data = Federated(OnlyTraining(), num_devices=3, seed=0)
    trainer(steps=2).fit(recorder, data)
    x, y = recorder.seen[0][:2]
    assert sorted(x[..., 0].flatten().tolist()) == list(range(0, 60, 2)), "the subset, and each sample once"
    assert torch.equal(x[..., 0].long() % 3, y)
    assert not recorder.evaluated["val"]


def test_the_collate_function_of_the_loader_is_used() -> None:
    def double(samples: list[Any]) -> Any:
        x, y = default_collate(samples)
        return 2 * x, y

    for options, factor in [({"collate_fn": double}, 2), ({"batch_size": None}, 1), ({"shuffle": True}, 1)]:
        data = Federated(Ordinary(pairs(), **options), num_devices=3, seed=0)
        data.setup("fit")
        x, _ = next(iter(data.train_dataloader())).data
        assert x[..., 0].flatten().sort().values.tolist() == [factor * i for i in range(60)]


def test_a_sampler_that_may_hold_out_samples_is_refused() -> None:
    """Else the devices would train on what the user holds out for validation."""
    for options, kind in [
        ({"sampler": SubsetRandomSampler(range(40))}, "sampler is a SubsetRandomSampler"),
        (
            {"batch_size": 1, "batch_sampler": Strange(SequentialSampler(pairs()), 5, False)},
            "batch_sampler is a Strange",
        ),
    ]:
        with pytest.raises(MisconfigurationException, match=f"{kind}.*torch.utils.data.Subset"):
            Federated(Ordinary(pairs(), **options), num_devices=3).setup("fit")


class Strange(BatchSampler):
    pass


def test_hooks_that_would_never_run_are_refused() -> None:
    class Augments(Ordinary):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch

    with pytest.raises(MisconfigurationException, match=r"does not call Augments\.on_after_batch_transfer"):
        Federated(Augments(pairs()), num_devices=3).setup("fit")


def test_what_cannot_be_split_is_refused() -> None:
    class Streams(LightningDataModule):
        def train_dataloader(self) -> Any:
            return iter([])

    regression = TensorDataset(torch.zeros(5, 2), torch.zeros(5))
    for datamodule, message in [
        (Streams(), "needs Streams.train_dataloader"),
        (Ordinary(regression), "integer labels"),
        (Ordinary(TensorDataset(torch.zeros(5, 2), torch.zeros(5), torch.zeros(5))), "pairs of tensors from Ordinary"),
        (Ordinary([{"x": torch.zeros(2), "y": 0}] * 5), "pairs of tensors from Ordinary"),
    ]:
        with pytest.raises(MisconfigurationException, match=message):
            Federated(datamodule, num_devices=2).setup("fit")


def test_report_and_plot() -> None:
    data = Federated(Digits(), num_devices=4, partition="by_label", samples_per_device=100, seed=0)
    with pytest.raises(RuntimeError, match="made by setup"):
        _ = data.partition
    data.setup("fit")
    report = data.partition_report()
    assert [row["samples"] for row in report] == [100] * 4
    assert [row["classes"] for row in report] == [2] * 4
    assert all(row["effective_classes"] == pytest.approx(2.0) for row in report)
    histogram = data.class_histogram().double()
    overall = histogram.sum(0) / 400
    expected = [float(0.5 * (row / 100 - overall).abs().sum()) for row in histogram]
    assert [row["tv_distance"] for row in report] == pytest.approx(expected)
    figure, axes = data.plot_partition()
    heights = torch.zeros(4)
    for bars in axes.containers:
        heights += torch.tensor([bar.get_height() for bar in bars])
    assert heights.tolist() == [100] * 4
    assert axes.get_xlabel() == "device"
    assert axes.get_ylabel() == "training samples"
    assert figure.axes == [axes]
    assert plot_partition(torch.ones(100, 10))[0].get_size_inches()[0] <= 24, "many devices still make a picture"


def test_trains_under_the_strategy_and_passes_other_loaders_through() -> None:
    module = Classifier(nn.Linear(64, 10), lr=0.05)
    data = Federated(Digits(flatten=True), num_devices=6, partition="dirichlet", alpha=1.0, seed=1)
    _, _, losses = fit(EdgeStrategy(num_devices=6, vectorize=False), module, data, steps=30)
    assert losses[-1] < 0.5 * losses[0]
    check_stages(lambda: Federated(Digits(flatten=True), num_devices=6, rounds_per_epoch=2, seed=1))
    for name in ("val_dataloader", "test_dataloader", "predict_dataloader"):
        ours, theirs = getattr(data, name)(), getattr(data.datamodule, name)()
        assert torch.equal(next(iter(ours))[0], next(iter(theirs))[0])


def test_built_from_yaml() -> None:
    inner = {"class_path": "groundwire.datamodules.Digits", "init_args": {"batch_size": 7}}
    options = {"num_devices": 7, "partition": "shards", "batch_size": 3, "rounds_per_epoch": 2, "quantity_skew": None}
    data = check_built_from_yaml(Federated, {"datamodule": inner} | options)
    assert isinstance(data, Federated)
    assert isinstance(data.datamodule, Digits)
    assert (data.datamodule.batch_size, data.kind) == (7, "shards")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_devices": 0}, "`num_devices` must be at least 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"rounds_per_epoch": 0}, "`rounds_per_epoch` must be at least 1"),
        ({"devices_per_round": 3}, "`devices_per_round` is 3, but there are 2 devices"),
        ({"partition": "random"}, "`partition` must be 'iid', 'dirichlet', 'shards' or 'by_label', got 'random'"),
        ({"partition": "dirichlet", "samples_per_device": 5}, "cannot go with partition='dirichlet'"),
        ({"partition": "shards", "quantity_skew": 1.0}, "`quantity_skew` is for partition='iid'"),
    ],
)
def test_bad_input_by_message(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Federated(Digits(), **({"num_devices": 2} | options))


def test_more_devices_than_samples() -> None:
    data = Federated(Digits(), num_devices=2000)
    with pytest.raises(ValueError, match=r"`num_devices` must be in \[1, 1258\] for 1258 samples, got 2000"):
        data.setup("fit")


def test_large_rounds_reuse_memory_that_nobody_holds() -> None:
    memory, source = Buffers(), torch.arange(1 << 20, dtype=torch.float32).view(-1, 64)
    index = torch.randint(0, len(source), (70, 1000), generator=torch.Generator().manual_seed(0))
    held = memory.gather(source, index)
    view = memory.gather(source, index + 0)[3]
    array = memory.gather(source, index.flip(0)).numpy()
    copies = held.clone(), view.clone(), array.copy()
    for shift in range(4):
        rolled = index.roll(shift, 0)
        assert torch.equal(memory.gather(source, rolled), source[rolled])
    assert torch.equal(held, copies[0])
    assert torch.equal(view, copies[1])
    assert (array == copies[2]).all()
    del held, view, array
    places = {memory.gather(source, index).data_ptr() for _ in range(10)}
    assert len(places) <= 2, "two buffers in turn"
