"""The training samples of any datamodule by row: which are read, how they are hashed, and what is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset, WeightedRandomSampler

from groundwire.callbacks.training_data import TrainingSamples, training_samples, training_tensors
from groundwire.datamodules import Digits, Federated
from helpers.edge import trainer
from helpers.unlearning import ToForget, digits

X = torch.arange(12.0).view(6, 2)
Y = torch.tensor([0, 1, 2, 0, 1, 2])


class Items(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """The rows of X and Y, which remembers what was read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(Y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.read.append(index)
        return X[index], Y[index]


class Loads(pl.LightningDataModule):
    def __init__(self, loader: Any) -> None:
        super().__init__()
        self.loader = loader

    def train_dataloader(self) -> Any:
        return self.loader


class Module(pl.LightningModule):
    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True)


def by_hand(x: Tensor, y: Tensor) -> bytes:
    """Of one sample, written out."""
    head = f"{x.dtype}{tuple(x.shape)}{y.dtype}{tuple(y.shape)}".encode()
    return hashlib.blake2b(head + x.numpy().tobytes() + y.numpy().tobytes(), digest_size=16).digest()


@pytest.mark.parametrize("batch_size", [None, 2])
def test_only_the_rows_asked_for_are_read(batch_size: int | None) -> None:
    items = Items()
    samples = training_samples(Loads(DataLoader(items, batch_size=batch_size, shuffle=True)), "Test")
    assert len(samples) == 6
    assert samples.trained_on.tolist() == [0, 1, 2, 3, 4, 5]
    assert samples.labels is None
    assert items.read == []
    x, y = samples.fetch(torch.tensor([4, 1]))
    assert torch.equal(x, X[[4, 1]])
    assert torch.equal(y, Y[[4, 1]])
    samples.row_digests(torch.tensor([3]))
    assert items.read == [4, 1, 3]
    x, y = samples.fetch_all()
    assert torch.equal(x, X)
    assert torch.equal(y, Y)
    with pytest.raises(ValueError, match="at least one sample of a data set"):
        samples.fetch(torch.arange(0))
    assert samples.row_digests(torch.arange(0)).shape == (0, 16)


def test_digests_are_those_of_each_sample_wherever_it_is_kept() -> None:
    expected = [by_hand(x, y) for x, y in zip(X, Y, strict=True)]
    sources = [
        TrainingSamples((X, Y)),
        training_samples(Loads(DataLoader(Items())), "T"),
        training_samples(Module(), "T"),
    ]
    for samples in sources:
        found = samples.row_digests(torch.tensor([5, 0]))
        assert found.dtype == torch.uint8
        assert [bytes(row.tolist()) for row in found] == [expected[5], expected[0]]
        assert samples.digest() == hashlib.sha256(b"".join(expected)).hexdigest()


@pytest.mark.parametrize("shape", [(), (3,), (2, 2), (0,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
def test_digests_of_any_shape_and_dtype(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.arange(2).view(2, *(1 for _ in shape)).expand(2, *shape).to(dtype)
    first, second = TrainingSamples((x, torch.zeros(2))).row_digests(torch.arange(2))
    assert torch.equal(first, second) == (0 in shape)


def test_digests_tell_samples_apart() -> None:
    kinds = [(X, Y), (X.view(6, 2, 1), Y), (X.double(), Y), (X + 1, Y), (X, Y.flip(0)), (X, Y.float()), (X.flip(0), Y)]
    assert len({TrainingSamples(kind).digest() for kind in kinds}) == len(kinds)
    assert TrainingSamples((X.T.contiguous().T, Y)).digest() == TrainingSamples((X, Y)).digest()


def test_padding_to_other_samples_does_not_change_a_digest() -> None:
    texts = [(torch.ones(length), torch.tensor(length)) for length in (1, 3, 2)]

    def padded(items: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        x, y = zip(*items, strict=True)
        return nn.utils.rnn.pad_sequence(x, batch_first=True), torch.stack(y)

    samples = training_samples(Loads(DataLoader(texts, collate_fn=padded)), "T")  # type: ignore[arg-type]
    assert samples.fetch_all()[0].shape == (3, 3)
    assert torch.equal(samples.row_digests(torch.tensor([0, 2])), samples.row_digests(torch.arange(3))[[0, 2]])


def test_a_data_set_of_tensors_that_changes_its_items_is_asked_for_them() -> None:
    class Doubled(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            x, y = super().__getitem__(index)
            return 2 * x, y

    assert torch.equal(training_tensors(Loads(DataLoader(Doubled(X, Y))), "T")[0], 2 * X)


def test_data_in_memory_is_given_without_a_copy() -> None:
    inner = digits()
    inner.setup("fit")
    samples = training_samples(inner, "T")
    assert samples.fetch_all()[0] is inner.train_data[0]
    assert samples.labels is inner.train_data[1]


def test_of_data_on_devices_it_is_the_data_within() -> None:
    federated = Federated(Digits(seed=0), num_devices=5, partition="by_label", samples_per_device=100, seed=0)
    federated.setup("fit")
    samples = training_samples(federated, "T")
    assert len(samples) == len(federated.datamodule.train_data[1])
    assert samples.trained_on.tolist() == sorted(federated.partition.indices.tolist())
    assert len(samples.trained_on) == 500
    assert torch.equal(samples.fetch(samples.trained_on)[0], federated.datamodule.train_data[0][samples.trained_on])


@pytest.mark.parametrize("given", ["module", "loader", "datamodule"])
def test_whatever_a_trainer_was_given(given: str) -> None:
    class Own(ToForget):
        def train_dataloader(self) -> Any:
            return loader

    x, y = torch.randn(6, 64), torch.zeros(6, dtype=torch.int64)
    loader = DataLoader(TensorDataset(x, y), batch_size=2, shuffle=True)
    t = trainer(steps=1, limit_val_batches=0)
    if given == "module":
        t.fit(Own())
    elif given == "loader":
        t.fit(ToForget(), loader)
    else:
        t.fit(ToForget(), datamodule=Loads(loader))
    assert torch.equal(training_tensors(t.fit_loop._data_source.instance, "T")[0], x)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(())


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (DataLoader(Endless()), r"Test needs Loads\.train_dataloader\(\) to have a `dataset` with a length"),
        ([DataLoader(Items())], "to have a `dataset` with a length"),
        (DataLoader(Items(), sampler=WeightedRandomSampler([1.0] * 6, 6)), "its sampler is a WeightedRandomSampler"),
        (DataLoader(TensorDataset(X, X, Y)), r"Test needs \(input, label\) pairs of tensors from Loads"),
        (DataLoader(TensorDataset(X)), r"Test needs \(input, label\) pairs of tensors from Loads"),
        (DataLoader([(X, "a"), (X, "b")]), r"Test needs \(input, label\) pairs of tensors from Loads"),  # type: ignore[arg-type]
        (
            DataLoader(Items(), collate_fn=lambda items: (X, Y)),
            r"Test needs \(input, label\) pairs of tensors from Loads",
        ),
    ],
)
def test_what_cannot_be_had_by_row_is_refused(loader: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        training_samples(Loads(loader), "Test").fetch(torch.tensor([0, 1]))


def test_a_subset_is_a_data_set_of_its_own() -> None:
    samples = training_samples(Loads(DataLoader(Subset(Items(), [1, 4]))), "T")
    assert len(samples) == 2
    assert samples.fetch_all()[0].tolist() == X[[1, 4]].tolist()


def test_inputs_and_labels_of_different_number_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="There are 6 inputs and 5 labels"):
        TrainingSamples((X, Y[:5]))
