"""What is forgotten and what is retained: the choice, the batches, the checkpoints, and what is refused."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from groundwire.callbacks.reporting import ResumableCheckpoint
from groundwire.callbacks.training_data import training_samples
from groundwire.callbacks.unlearning import GradientAscent, IterativeMethod
from groundwire.callbacks.unlearning.data import forget_retain_data, indices_digest, tells_what_to_forget
from groundwire.callbacks.weights import read_checkpoint
from groundwire.datamodules import DatasetDescriptions, Federated, ForgetRetain, ForgetSetError
from groundwire.datamodules.base import TensorLoader
from helpers.datamodules import check_built_from_yaml
from helpers.unlearning import ToForget, checkpoint, digits, unlearn


class Rows(pl.LightningDataModule):
    """Sample i is the number i, labelled i mod 3; loads what a stage needs when it begins, as most datamodules do."""

    def __init__(self, n: int = 10, test: tuple[float, ...] = (100.0,), label_shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.n, self.test, self.label_shape = n, torch.tensor(test), label_shape

    def setup(self, stage: str) -> None:
        if stage == "fit":
            y = torch.arange(self.n) % 3
            self.train_set = TensorDataset(
                torch.arange(float(self.n)), y.view(-1, *(1 for _ in self.label_shape)).expand(-1, *self.label_shape)
            )
        if stage == "test":
            self.test_set = TensorDataset(self.test, torch.zeros(len(self.test), dtype=torch.int64))

    def train_dataloader(self) -> Any:
        return DataLoader(self.train_set, batch_size=3, shuffle=True)

    def test_dataloader(self) -> Any:
        return DataLoader(self.test_set, batch_size=2)


def ready(data: ForgetRetain) -> ForgetRetain:
    data.setup("fit")
    return data


def rows(indices: Any, **options: Any) -> ForgetRetain:
    inner = options.pop("datamodule", None) or Rows()
    return ready(ForgetRetain(inner, forget="indices", indices=indices, **({"batch_size": 2, "seed": 0} | options)))


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(a, b) for part in one for a, b in zip(one[part], other[part], strict=True)
    )


# ---------------------------------------------------------------- the choice


def parts_are_right(data: ForgetRetain) -> None:
    """Disjoint, complete, ascending, and what the batches hold."""
    forget, retain = data.forget_indices, data.retain_indices
    both = torch.cat([forget, retain]).sort().values
    assert torch.equal(both, data.trained_on)
    assert all(torch.equal(part, part.sort().values) for part in (forget, retain))
    inner = data.datamodule.datamodule if isinstance(data.datamodule, Federated) else data.datamodule
    for part, indices in (("forget", forget), ("retain", retain)):
        x, y = (torch.cat(one) for one in zip(*data.batches(part, 7), strict=True))  # type: ignore[arg-type]
        assert torch.equal(x, inner.train_data[0][indices])
        assert torch.equal(y, inner.train_data[1][indices])


def test_random_samples() -> None:
    data = ready(ForgetRetain(digits(), fraction=0.1, seed=3))
    parts_are_right(data)
    assert len(data.forget_indices) == round(0.1 * 1258)
    again, other = (ready(ForgetRetain(digits(), fraction=0.1, seed=seed)) for seed in (3, 4))
    assert torch.equal(again.forget_indices, data.forget_indices)
    assert not torch.equal(other.forget_indices, data.forget_indices)
    assert len(ready(ForgetRetain(digits(), fraction=1e-6, seed=0)).forget_indices) == 1


def test_random_samples_by_the_seed_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    by_run, given = ready(ForgetRetain(digits())), ready(ForgetRetain(digits(), seed=3))
    assert torch.equal(by_run.forget_indices, given.forget_indices)


def test_a_class() -> None:
    data = ready(ForgetRetain(digits(), forget="class", label=3, seed=0))
    parts_are_right(data)
    labels = data.datamodule.train_data[1].numpy()
    assert data.forget_indices.tolist() == np.flatnonzero(labels == 3).tolist()


def test_a_group_of_text() -> None:
    texts = DatasetDescriptions(seq_len=16, documents=["iris", "digits"], seed=0)
    data = ready(ForgetRetain(texts, forget="class", label=1, seed=0))
    parts_are_right(data)
    assert data.forget_indices.tolist() == np.flatnonzero(texts.train_groups.numpy() == 1).tolist()
    assert texts.group_names[1] == "digits"


@pytest.mark.parametrize("kind", ["list", "txt", "npy", "path"])
def test_indices_in_any_form_and_order(kind: str, tmp_path: Path) -> None:
    given: Any = [40, 7, 1257, 0]
    if kind in ("txt", "path"):
        file = tmp_path / "forget.txt"
        file.write_text("40\n7\n# the last one\n1257\n0\n")
        given = str(file) if kind == "txt" else file
    elif kind == "npy":
        given = tmp_path / "forget.npy"
        np.save(given, np.array([40, 7, 1257, 0], dtype=np.int32))
    data = ready(ForgetRetain(digits(), forget="indices", indices=given, seed=0))
    parts_are_right(data)
    assert data.forget_indices.tolist() == [0, 7, 40, 1257]


def test_one_index_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("5\n")
    assert rows(tmp_path / "one.txt").forget_indices.tolist() == [5]


@pytest.mark.parametrize("partition", ["iid", "by_label"])
def test_a_device_of_federated_data(partition: Any) -> None:
    federated = lambda: Federated(digits(), num_devices=10, partition=partition, samples_per_device=100, seed=0)
    data = ready(ForgetRetain(federated(), forget="device", device=4, seed=0))
    parts_are_right(data)
    assert len(data.trained_on) == 1000, "of 1258"
    alone = federated()
    alone.setup("fit")
    batch = next(iter(alone.train_dataloader()))
    (row,) = (batch.device_ids == 4).nonzero().flatten().tolist()
    x, y = next(iter(data.batches("forget", 100)))
    whole = lambda a, b: sorted(zip(map(bytes, a.numpy()), b.tolist(), strict=True))
    assert whole(x, y) == whole(batch.data[0][row], batch.data[1][row])


def test_any_datamodule_and_its_other_loaders() -> None:
    data = rows([1, 8])
    assert data.retain_indices.tolist() == [0, 2, 3, 4, 5, 6, 7, 9]
    assert [x.tolist() for x, _ in data.batches("forget")] == [[1.0, 8.0]]
    assert data.val_dataloader() == []
    assert isinstance(data.test_dataloader(), DataLoader)
    of_digits = ready(ForgetRetain(digits(), seed=0))
    x, _ = next(iter(of_digits.val_dataloader()))
    assert torch.equal(x, of_digits.datamodule.val_data[0][:64])
    assert next(iter(of_digits.predict_dataloader()))[1].shape == (64,)


def test_from_yaml() -> None:
    inner = {"class_path": "groundwire.datamodules.Digits", "init_args": {"flatten": True}}
    built = check_built_from_yaml(
        ForgetRetain, {"datamodule": inner, "forget": "class", "label": 3, "drop_last": True, "batch_size": 32}
    )
    assert isinstance(built, ForgetRetain)
    assert len(ready(built).train_dataloader()) == 1127 // 32
    by_list = check_built_from_yaml(ForgetRetain, {"datamodule": inner, "forget": "indices", "indices": [1, 2]})
    assert ready(by_list).forget_indices.tolist() == [1, 2]  # type: ignore[arg-type, attr-defined]


# ---------------------------------------------------------------- batches


def test_an_epoch_is_a_pass_over_the_longer_part() -> None:
    loader = rows([2, 5, 7]).train_dataloader()
    assert len(loader) == 4
    epochs = [list(loader) for _ in range(3)]
    for epoch in epochs:
        assert [set(batch) for batch in epoch] == [{"forget", "retain"}] * 4
        assert [len(batch["forget"][1]) for batch in epoch] == [2, 1, 2, 1], "the forget set twice"
        assert [len(batch["retain"][1]) for batch in epoch] == [2, 2, 2, 1]
        retained = torch.cat([batch["retain"][0] for batch in epoch])
        assert sorted(retained.tolist()) == [0, 1, 3, 4, 6, 8, 9]
        for half in (epoch[:2], epoch[2:]):
            assert sorted(torch.cat([batch["forget"][0] for batch in half]).tolist()) == [2, 5, 7]
        assert all(torch.equal(x.long() % 3, y) for batch in epoch for x, y in batch.values())
    passes = [tuple(torch.cat([b["forget"][0] for b in e[i : i + 2]]).tolist()) for e in epochs for i in (0, 2)]
    assert len(set(passes)) > 1, "in a new order each time"
    longer = rows([0, 1, 3, 4, 6, 8, 9]).train_dataloader()
    assert [len(batch["retain"][1]) for batch in longer] == [2, 1, 2, 1]


# epochs of an in-turn loader with 2 forget and 4 retain batches a pass: which batch, counted over all passes
PLAN = [
    ["f0", "f1", "r0", "r1", "r2", "r3"],
    ["f2", "f3", "r4", "r5", "r6", "r7"],
    ["r8", "r9", "r10", "r11", "r12", "r13"],
    ["r14", "r15", "r16", "r17", "r18", "r19"],
]


@pytest.mark.parametrize("in_turn", [0, 1, 2, 9])
def test_parts_come_in_turn(in_turn: int) -> None:
    data = rows([2, 5, 7])
    data.serve("forget", "retain", in_turn=in_turn)
    loader = data.train_dataloader()
    if in_turn == 2:
        plan = PLAN
    elif in_turn == 9:
        plan = [[f"f{2 * e}", f"f{2 * e + 1}", *(f"r{4 * e + i}" for i in range(4))] for e in range(4)]
    elif in_turn == 1:
        plan = [PLAN[0], *([f"r{4 + 6 * e + i}" for i in range(6)] for e in range(3))]
    else:
        plan = [[f"r{6 * e + i}" for i in range(6)] for e in range(4)]
    forget, retain = (
        TensorLoader((torch.tensor(rows), torch.tensor(rows) % 3), 2, shuffle=True, seed=0)
        for rows in ([2.0, 5.0, 7.0], [0.0, 1.0, 3.0, 4.0, 6.0, 8.0, 9.0])
    )
    for expected in plan:
        epoch = list(loader)
        assert len(epoch) == len(loader) == 6
        for name, batch in zip(expected, epoch, strict=True):
            number = int(name[1:])
            part, source, batches = ("forget", forget, 2) if name[0] == "f" else ("retain", retain, 4)
            assert list(batch) == [part]
            assert torch.equal(batch[part][0], source.batch(number // batches, number % batches)[0])


def test_one_part_alone() -> None:
    for part, length in (("forget", 2), ("retain", 4)):
        data = rows([2, 5, 7])
        data.serve(part)  # type: ignore[arg-type]
        loader = data.train_dataloader()
        assert len(loader) == length
        assert all(list(batch) == [part] for batch in loader)


def test_incomplete_batches_can_be_left_out() -> None:
    loader = rows([2, 5, 7], drop_last=True).train_dataloader()
    sizes = [(len(batch["forget"][1]), len(batch["retain"][1])) for batch in loader]
    assert sizes == [(2, 2)] * 3
    with pytest.raises(ValueError, match="`batch_size` is 2, but there are only 1 samples"):
        rows([2], drop_last=True).train_dataloader()


def test_processes_share_each_part() -> None:
    data = rows([0, 1, 2, 3], batch_size=1)
    whole = {part: next(iter(data.batches(part, 10)))[0] for part in ("forget", "retain")}  # type: ignore[arg-type]
    ranks = []
    for rank in range(2):
        data.trainer = type("Ranks", (), {"global_rank": rank, "world_size": 2, "overfit_batches": 0.0})()
        ranks.append(list(data.make_train_loader()))
    assert len(ranks[0]) == len(ranks[1]) == 3
    for part, passes in (("forget", slice(2)), ("retain", slice(3))):
        seen = [float(batch[part][0]) for batches in ranks for batch in batches[passes]]
        assert sorted(seen) == whole[part].tolist(), "each sample in one of them"
    few = rows([4], batch_size=1)
    few.trainer = data.trainer
    with pytest.raises(ValueError, match="The forget set has 1 samples: too few for 2 processes"):
        few.make_train_loader()


# ---------------------------------------------------------------- going on


@pytest.mark.parametrize("in_turn", [None, 2])
def test_it_goes_on_within_an_epoch(in_turn: int | None) -> None:
    def fresh() -> ForgetRetain:
        data = rows([2, 5, 7], seed=None)
        data.serve("forget", "retain", in_turn=in_turn)
        return data

    whole_loader = fresh().train_dataloader()
    epoch = len(whole_loader)
    whole = [batch for _ in range(4) for batch in whole_loader]
    for stop in range(1, 3 * epoch):
        data = fresh()
        loader, seen = data.train_dataloader(), 0
        while seen < stop:
            for _ in loader:
                seen += 1
                if seen == stop:
                    break
        resumed = fresh()
        resumed.load_state_dict(data.state_dict())
        rest_loader = resumed.train_dataloader()
        rest = [batch for _ in range(4) for batch in rest_loader][: len(whole) - stop]
        assert len(rest) == len(whole) - stop
        assert all(same(a, b) for a, b in zip(rest, whole[stop:], strict=True)), stop


def test_a_checkpoint_brings_its_seed() -> None:
    written = ready(ForgetRetain(digits(seed=5), seed=7))
    resumed = ready(ForgetRetain(digits(seed=None)))
    resumed.load_state_dict(written.state_dict())
    assert torch.equal(resumed.forget_indices, written.forget_indices)
    assert resumed.data_digest == written.data_digest
    assert same(next(iter(resumed.train_dataloader())), next(iter(written.train_dataloader())))


def test_a_checkpoint_of_another_request_is_refused() -> None:
    state = rows([2, 5, 7]).state_dict()
    for other in (rows([2, 5]), rows([2, 5, 7], datamodule=Rows(n=11))):
        with pytest.raises(MisconfigurationException, match="The checkpoint belongs to another request"):
            other.load_state_dict(state)


def test_a_checkpoint_may_come_before_the_data() -> None:
    whole = rows([2, 5, 7], seed=None)
    loader = whole.train_dataloader()
    started = iter(loader)
    next(started)
    state = whole.state_dict()
    resumed = ForgetRetain(Rows(), forget="indices", indices=[2, 5, 7], batch_size=2)
    resumed.load_state_dict(state)
    ready(resumed)
    assert all(same(a, b) for a, b in zip(resumed.train_dataloader(), started, strict=True))
    for other in (
        ForgetRetain(Rows(), forget="indices", indices=[2, 5], batch_size=2),
        ForgetRetain(Rows(n=11), forget="indices", indices=[2, 5, 7], batch_size=2),
    ):
        other.load_state_dict(state)
        with pytest.raises(MisconfigurationException, match="The checkpoint belongs to another request"):
            ready(other)
    written = ready(ForgetRetain(digits(seed=5), seed=7))
    by_seed = ForgetRetain(digits(seed=None))
    by_seed.load_state_dict(written.state_dict())
    assert torch.equal(ready(by_seed).forget_indices, written.forget_indices)
    assert by_seed.data_digest == written.data_digest


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("access", [True, False])
def test_the_same_indices_of_other_samples_are_another_request(before: bool, access: bool) -> None:
    class Shifted(Rows):
        def setup(self, stage: str) -> None:
            super().setup(stage)
            if stage == "fit":
                self.train_set = TensorDataset(self.train_set.tensors[0] + 1, self.train_set.tensors[1])

    state = rows([2, 5, 7], retain_access=access).state_dict()
    other = ForgetRetain(Shifted(), forget="indices", indices=[2, 5, 7], batch_size=2, retain_access=access)
    calls = [lambda: other.load_state_dict(state), lambda: other.setup("fit")]
    first, second = calls if before else reversed(calls)
    first()
    with pytest.raises(MisconfigurationException, match="The checkpoint belongs to another request"):
        second()


def test_a_checkpoint_that_was_only_validated_does_not_bind_a_new_fit() -> None:
    written = ready(ForgetRetain(digits(seed=5), seed=7))
    data = ForgetRetain(digits(seed=None), forget="indices", indices=[4])
    data.setup("validate")
    data.load_state_dict(written.state_dict())
    x, _ = next(iter(data.val_dataloader()))
    assert torch.equal(x, next(iter(written.val_dataloader()))[0]), "the splits are those of the checkpoint"
    data.teardown("validate")
    assert ready(data).forget_indices.tolist() == [4]


def checkpoint_of(data: ForgetRetain) -> dict[str, Any]:
    return {"ForgetRetain": data.state_dict()}


def test_an_earlier_request_stays_forgotten() -> None:
    first = ready(ForgetRetain(digits(seed=5), forget="class", label=3, seed=0))
    second = ready(ForgetRetain(digits(seed=None), forget="class", label=4, seed=0))
    second.adopt(checkpoint_of(first))
    third = ready(ForgetRetain(digits(seed=None), fraction=0.05, seed=0))
    third.adopt(checkpoint_of(second))
    labels = third.datamodule.train_data[1]
    assert third.data_digest == first.data_digest
    assert torch.equal(second.earlier, first.forget_indices)
    assert third.earlier.tolist() == [i for i, y in enumerate(labels.tolist()) if y in (3, 4)]
    assert not set(third.forget_indices.tolist()) & set(third.earlier.tolist())
    assert set(labels[third.retain_indices].tolist()) == set(range(10)) - {3, 4}
    batches = [y for _, y in third.batches("retain")]
    assert sum(map(len, batches)) + len(third.earlier) + len(third.forget_indices) == len(labels)
    with pytest.raises(
        ValueError, match=r"The forget set is empty: no training sample has the label 3; there are \[0, 1, 2"
    ):
        ready(ForgetRetain(digits(seed=None), forget="class", label=3, seed=0)).adopt(checkpoint_of(second))
    index, other = int(first.forget_indices[0]), int(first.retain_indices[0])
    again = ready(ForgetRetain(digits(seed=None), forget="indices", indices=[index, other], seed=0))
    with pytest.raises(ValueError, match=f"1 samples of the forget set, such as {index}, were forgotten by an earlier"):
        again.adopt(checkpoint_of(first))


def test_one_datamodule_can_serve_several_checkpoints() -> None:
    earlier, data = rows([2, 5, 7]), rows([1, 3])
    data.adopt(checkpoint_of(earlier))
    assert data.retain_indices.tolist() == [0, 4, 6, 8, 9]
    data.adopt({})
    assert data.earlier.tolist() == []
    assert data.retain_indices.tolist() == [0, 2, 4, 5, 6, 7, 8, 9]


def test_the_split_of_the_training_run_is_taken_over() -> None:
    trained_on = digits(seed=5)
    trained_on.setup("fit")
    data = ready(ForgetRetain(digits(seed=None), forget="class", label=3, seed=0))
    data.adopt({"Digits": trained_on.state_dict()})
    assert torch.equal(data.datamodule.train_data[0], trained_on.train_data[0])
    assert data.forget_indices.tolist() == np.flatnonzero(trained_on.train_data[1].numpy() == 3).tolist()
    other = ready(ForgetRetain(digits(seed=6), forget="class", label=3, seed=0))
    with pytest.raises(MisconfigurationException, match=r"written with Digits\(seed=5\), and this one has seed=6"):
        other.adopt({"Digits": trained_on.state_dict()})


def test_other_data_than_that_of_the_earlier_request_is_refused() -> None:
    earlier = rows([2, 5, 7])
    with pytest.raises(ForgetSetError, match=r"other training data .*hashes of all rows differ"):
        rows([1], datamodule=Rows(n=11)).adopt(checkpoint_of(earlier))
    rows([1], datamodule=Rows(n=11)).adopt({"ForgetRetain": earlier.state_dict() | {"data_digest": None}})


def test_an_earlier_request_is_found_under_any_name() -> None:
    class Other(ForgetRetain):
        pass

    state = rows([2, 5, 7]).state_dict()
    for content in ({"Other": state}, {"epoch": 3, "callbacks": {}, "OfAnotherPackage": state}):
        data = ready(Other(Rows(), forget="indices", indices=[1], seed=0))
        data.adopt(content)
        assert data.earlier.tolist() == [2, 5, 7]
        assert data.retain_indices.tolist() == [0, 3, 4, 6, 8, 9]
        data = rows([1])
        data.adopt(content)
        assert data.earlier.tolist() == [2, 5, 7]
        assert torch.cat([x for x, _ in data.batches("earlier", 2)]).tolist() == [2.0, 5.0, 7.0]
    assert list(rows([1]).batches("earlier")) == []


def recorded(n: int = 10, known: Sequence[int] | None = None, **changes: Any) -> dict[str, Any]:
    """A checkpoint with a curvature record of Rows; unknown samples have no hash."""
    samples = training_samples(rows([0], datamodule=Rows(n)).datamodule, "Test")
    digests = torch.zeros(n, 16, dtype=torch.uint8)
    known = range(n) if known is None else known
    digests[list(known)] = samples.row_digests(torch.tensor(list(known)))
    return {"curvature": {"row_digests": digests, "data_sha256": samples.digest()} | changes}


@pytest.mark.parametrize("access", [True, False])
def test_samples_are_compared_with_those_that_were_recorded(access: bool) -> None:
    data = rows([1, 8], retain_access=access)
    data.adopt(recorded())
    assert data.data_digest == recorded()["curvature"]["data_sha256"]
    with pytest.raises(
        ForgetSetError, match=r"other training data \(11 rows were recorded, and there are 10\).*Use the"
    ):
        data.adopt(recorded(n=11))
    with pytest.raises(ForgetSetError, match="9 rows were recorded, and there are 10"):
        rows([9], retain_access=access).adopt(recorded(n=9))
    other = recorded()
    other["curvature"]["row_digests"][8] += 1
    with pytest.raises(
        ForgetSetError, match=r"other training data \(1 samples of the forget set, such as 8, differ.*without an augm"
    ):
        data.adopt(other)
    with pytest.raises(ForgetSetError, match="1 samples of the forget set, such as 8, were not among the recorded"):
        data.adopt(recorded(known=[0, 1, 2]))


def test_with_access_all_rows_are_compared_with_those_that_were_recorded() -> None:
    other = recorded(data_sha256="0")
    for content in (
        other,
        {"curvature": {"data_sha256": "0"}},
        {"curvature": {"data_sha256": "0", "row_digests": None}},
    ):
        with pytest.raises(ForgetSetError, match=r"recorded on other training data .*hashes of all rows differ"):
            rows([1]).adopt(content)
    rows([1], retain_access=False).adopt(other)  # they must not be read: the forget set is right


def test_a_recorder_and_a_request_know_the_data_by_the_same_hash() -> None:
    inner = digits()
    inner.setup("fit")
    data = ready(ForgetRetain(digits(), seed=0))
    assert data.data_digest == training_samples(inner, "CurvatureRecorder").digest()


# ---------------------------------------------------------------- no access


def test_without_access_every_way_to_retained_data_raises() -> None:
    data = rows([2, 5, 7], retain_access=False)
    assert len(list(data.batches("forget"))) == 2
    data.serve("forget")
    assert all(list(batch) == ["forget"] for batch in data.train_dataloader())
    ways: list[Callable[[], Any]] = [
        lambda: data.retain_indices,
        lambda: list(data.batches("retain")),
        lambda: (data.serve("retain"), data.train_dataloader()),
        lambda: (data.serve("forget", "retain"), data.make_train_loader()),
    ]
    for way in ways:
        with pytest.raises(
            MisconfigurationException, match=r"ForgetRetain\(retain_access=False\) says that it is gone"
        ):
            way()


class Guarded(Dataset[tuple[Tensor, Tensor]]):
    """The digits; to read one that is not to be forgotten is an error."""

    def __init__(self, allowed: Sequence[int]) -> None:
        inner = digits()
        inner.setup("fit")
        self.x, self.y = inner.train_data
        self.allowed = set(allowed)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        assert index in self.allowed, f"row {index} is retained"
        return self.x[index], self.y[index]


class GuardedData(pl.LightningDataModule):
    def __init__(self, allowed: Sequence[int], **attributes: Any) -> None:
        super().__init__()
        self.dataset = Guarded(allowed)
        vars(self).update(attributes)

    def train_dataloader(self) -> Any:
        return DataLoader(self.dataset, batch_size=8, shuffle=True)


class Reads(GradientAscent):
    """Goes through the forget set again at the end."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self.rows = torch.cat([x for x, _ in self.data.batches("forget", 3)])


@pytest.mark.parametrize("build", [GradientAscent, Reads])
def test_without_access_no_retained_sample_is_read(build: type[IterativeMethod], tmp_path: Path) -> None:
    forget = [3, 700, 41, 8]
    inner = GuardedData(forget)
    data = ForgetRetain(inner, forget="indices", indices=forget, batch_size=2, retain_access=False, seed=0)
    method = build(checkpoint())
    keeper = ResumableCheckpoint(tmp_path)
    unlearn(method, ToForget(), data, steps=2, callbacks=[keeper], enable_checkpointing=True)
    if isinstance(method, Reads):
        assert torch.equal(method.rows, inner.dataset.x[sorted(forget)])
    assert data.data_digest is None
    state = read_checkpoint(tmp_path / "last.ckpt")["ForgetRetain"]
    assert state["data_digest"] is None
    assert state["forget"].tolist() == sorted(forget)
    for way in (lambda: data.retain_indices, lambda: next(data.batches("retain"))):
        with pytest.raises(MisconfigurationException, match="says that it is gone"):
            way()
    again = ForgetRetain(GuardedData([5]), forget="indices", indices=[5], retain_access=False, seed=0)
    ready(again).adopt({"ForgetRetain": state})
    assert again.earlier.tolist() == sorted(forget)


def test_without_access_the_hash_of_the_data_is_that_of_the_checkpoint() -> None:
    request = ready(ForgetRetain(digits(), forget="indices", indices=[3, 8], seed=0))
    data = ForgetRetain(GuardedData([5]), forget="indices", indices=[5], retain_access=False, seed=0)
    ready(data).adopt(checkpoint_of(request))
    assert data.data_digest == request.data_digest
    state = data.state_dict()
    for other in (None, "0"):
        ForgetRetain.adopt(data, {} if other is None else {"curvature": {"data_sha256": other}})
        assert data.data_digest == other
    with pytest.raises(MisconfigurationException, match="belongs to another request"):
        data.load_state_dict(state)  # of other data than those adopted, "0"


def test_without_access_a_class_needs_labels_in_memory() -> None:
    data = ForgetRetain(GuardedData([]), forget="class", label=3, retain_access=False, seed=0)
    with pytest.raises(ForgetSetError, match=r"may not be read for theirs.*give GuardedData `train_groups`.*'indices'"):
        ready(data)
    labels = Guarded([]).y
    threes = (labels == 3).nonzero().flatten().tolist()
    inner = GuardedData(threes, train_groups=labels)
    grouped = ready(ForgetRetain(inner, forget="class", label=3, retain_access=False, seed=0))
    assert grouped.forget_indices.tolist() == threes
    in_memory = ready(ForgetRetain(digits(), forget="class", label=3, retain_access=False, seed=0))
    assert in_memory.forget_indices.tolist() == threes
    everything = ready(ForgetRetain(GuardedData(range(len(labels))), forget="class", label=3, seed=0))
    assert everything.forget_indices.tolist() == threes


def test_without_access_devices_need_data_in_memory() -> None:
    federated = Federated(GuardedData([]), num_devices=3, seed=0)
    with pytest.raises(MisconfigurationException, match="Federated reads every sample of GuardedData"):
        ready(ForgetRetain(federated, forget="device", device=1, retain_access=False))
    federated = Federated(digits(), num_devices=3, seed=0)
    assert len(ready(ForgetRetain(federated, forget="device", device=1, retain_access=False)).forget_indices) > 400


def test_what_is_read_of_a_data_set_is_kept() -> None:
    class Counts(Guarded):
        reads = 0

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            self.reads += 1
            return super().__getitem__(index)

    inner = GuardedData([])
    inner.dataset = counting = Counts(range(1258))
    data = ready(ForgetRetain(inner, forget="indices", indices=[1, 4], batch_size=100, seed=0))
    for _ in range(2):
        assert torch.equal(torch.cat([x for x, _ in data.batches("retain", 77)]), counting.x[data.retain_indices])
        data.train_dataloader()
    assert counting.reads == 1258


def test_to_find_out_what_a_datamodule_is_nothing_of_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    data = ForgetRetain(Rows(), retain_access=False)  # not set up either: its properties would raise
    holder = lambda datamodule: type("Holder", (), {"datamodule": datamodule})()
    assert tells_what_to_forget(data)
    assert forget_retain_data(holder(data), "SSD") is data
    with pytest.raises(
        MisconfigurationException, match=r"SSD needs to know what to forget: pass datamodule=ForgetRetain\(.*got Rows"
    ):
        forget_retain_data(holder(Rows()), "SSD")
    with pytest.raises(MisconfigurationException, match="got NoneType"):
        forget_retain_data(holder(None), "SSD")


def test_digests_tell_forget_sets_apart() -> None:
    assert indices_digest(torch.tensor([3, 1])) == indices_digest(torch.tensor([1, 3]))
    assert indices_digest(torch.tensor([3])) != indices_digest(torch.tensor([1]))


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forget": "all"}, "`forget` must be 'random', 'class', 'indices' or 'device', got 'all'"),
        ({"forget": "class"}, "forget='class' needs `label`"),
        ({"forget": "indices"}, "forget='indices' needs `indices`"),
        ({"forget": "device"}, "forget='device' needs `device`"),
        ({"forget": "random", "label": 3}, "forget='random' does not use label: leave it out"),
        ({"forget": "class", "label": 3, "device": 0, "indices": [1]}, "does not use device, indices"),
        ({"fraction": 0.0}, r"`fraction` must be in \(0, 1\), got 0.0"),
        ({"fraction": 1.0}, r"`fraction` must be in \(0, 1\), got 1.0"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"forget": "device", "device": 0}, "needs the data of a Federated, got Rows"),
    ],
)
def test_bad_argument(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ForgetRetain(Rows(), **options)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([], "The forget set is empty: name at least one training sample"),
        ([3, 3, 4], "names a sample twice"),
        ([10, 2], "1 indices of the forget set, such as 10, are not in the training data of 10 samples"),
        ([-1], "1 indices of the forget set, such as -1, are not in the training data"),
        (range(10), "The forget set is all of the training data"),
    ],
)
def test_bad_indices(indices: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rows(indices)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([1.0, 2.0], "must be whole numbers, got float64"),
        ([1, 2.5], "must be whole numbers, got float64"),
        (["1", "2"], "must be whole numbers, got <U1"),
        (torch.tensor([1.0, 2.0]), "must be whole numbers, got float32"),
        ([True, False, True], r"got a boolean mask: give `mask\.nonzero\(\)`"),
        ([1, True], "got a boolean mask"),
        ((False, 3), "got a boolean mask"),
        ([np.True_, np.False_], "got a boolean mask"),
        (np.arange(10) < 3, "got a boolean mask"),
        (torch.arange(10) < 3, "got a boolean mask"),
    ],
)
@pytest.mark.parametrize("in_file", [False, True])
def test_only_whole_numbers_are_indices(indices: Any, message: str, in_file: bool, tmp_path: Path) -> None:
    if in_file:
        if isinstance(indices, list | tuple) and len({type(one) for one in indices}) > 1:
            return
        np.save(tmp_path / "forget.npy", np.asarray(indices))
        indices = tmp_path / "forget.npy"
    with pytest.raises(ForgetSetError, match=message):
        rows(indices)


@pytest.mark.parametrize(
    "indices", [np.array([8, 1]), torch.tensor([8, 1]), (8, 1), [np.int64(8), np.int32(1)], np.array([1, 8], np.uint64)]
)
def test_whole_numbers_of_any_kind(indices: Any) -> None:
    assert rows(indices).forget_indices.tolist() == [1, 8]
    mask = torch.zeros(10, dtype=torch.bool)
    mask[[1, 8]] = True
    assert rows(mask.nonzero()).forget_indices.tolist() == [1, 8]
    assert rows(mask.numpy().nonzero()).forget_indices.tolist() == [1, 8]


@pytest.mark.parametrize("line", ["1.0", "2.5", "True", "nan"])
def test_a_file_of_other_than_whole_numbers(line: str, tmp_path: Path) -> None:
    (tmp_path / "forget.txt").write_text(f"3\n{line}\n")
    with pytest.raises(ForgetSetError, match=r"forget\.txt is no list of indices"):
        rows(tmp_path / "forget.txt")


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no file of indices at .*none\.txt"):
        rows(tmp_path / "none.txt")
    words = tmp_path / "words.txt"
    words.write_text("one\ntwo\n")
    with pytest.raises(ValueError, match=r"words\.txt is no list of indices"):
        rows(words)


def test_unknown_labels() -> None:
    with pytest.raises(ValueError, match=re.escape("no training sample has the label 7; there are [0, 1, 2]")):
        ready(ForgetRetain(Rows(), forget="class", label=7))
    with pytest.raises(ValueError, match=r"needs integer labels of shape \(n,\), or `train_groups`"):
        ready(ForgetRetain(Rows(label_shape=(2,)), forget="class", label=1))


def test_unknown_device() -> None:
    federated = Federated(digits(), num_devices=3, seed=0)
    with pytest.raises(ValueError, match=r"`device` must be in \[0, 3\), got 3"):
        ready(ForgetRetain(federated, forget="device", device=3))


def test_samples_of_the_test_data_are_not_forgotten() -> None:
    inner = Rows(test=(100.0, 5.0, 2.0))
    with pytest.raises(ValueError, match="2 samples of the test data are in the forget set"):
        rows([2, 5, 7], datamodule=inner)
    assert rows([7], datamodule=inner).forget_indices.tolist() == [7]


class WithTestData(Rows):
    """Its test loaders are given."""

    def __init__(self, loaders: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.loaders, self.dtype = loaders, dtype

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            self.train_set = TensorDataset(self.train_set.tensors[0].to(self.dtype), self.train_set.tensors[1])

    def test_dataloader(self) -> Any:
        return self.loaders


def pairs(*numbers: float, dtype: torch.dtype = torch.float32) -> DataLoader[Any]:
    x = torch.tensor(numbers, dtype=dtype)
    return DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=2)


def mappings(*numbers: float) -> DataLoader[Any]:
    return DataLoader([{"image": torch.tensor(x), "label": 0} for x in numbers], batch_size=2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "loaders",
    [
        [pairs(100.0), pairs(99.0, 5.0)],
        {"one": pairs(100.0), "other": [pairs(98.0), pairs(98.0, 97.0, 5.0)]},
        CombinedLoader([pairs(100.0), pairs(5.0)]),
        mappings(100.0, 99.0, 5.0),
        pairs(100.0, 5.0, dtype=torch.float64),
        pairs(100.0, 5.0, dtype=torch.bfloat16),
        DataLoader(TensorDataset(torch.tensor([100.0, 5.0])), batch_size=2),
        DataLoader([torch.tensor(100.0), torch.tensor(5.0)], batch_size=2),  # type: ignore[arg-type]
        DataLoader(TensorDataset(torch.tensor([100.0, 5.0]), torch.tensor([0, 1])), batch_size=None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_samples_of_test_data_of_any_form_are_not_forgotten(loaders: Any, dtype: torch.dtype) -> None:
    with pytest.raises(ForgetSetError, match="1 samples of the test data are in the forget set"):
        rows([5], datamodule=WithTestData(loaders, dtype))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Whether samples of the test data")
        rows([7], datamodule=WithTestData(loaders, dtype))


def test_fractions_are_not_whole_numbers() -> None:
    rows([5], datamodule=WithTestData(pairs(5.5), torch.int64))
    with pytest.raises(ForgetSetError, match="1 samples of the test data"):
        rows([5], datamodule=WithTestData(pairs(5, dtype=torch.int32), torch.int64))


def test_test_data_that_cannot_be_read_is_said() -> None:
    unknown = DataLoader([{"tokens": torch.tensor(5.0)}])  # type: ignore[arg-type]
    words = DataLoader([("five", 0)])  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=r"was not checked: .* a batch that is a dict or a list\. Give pairs"):
        rows([5], datamodule=WithTestData([pairs(100.0), unknown, words]))
    with pytest.raises(ForgetSetError, match="1 samples of the test data"):
        rows([5], datamodule=WithTestData([unknown, pairs(5.0)]))


def test_before_setup_there_is_no_choice() -> None:
    with pytest.raises(RuntimeError, match=r"The forget set is chosen by setup\('fit'\)"):
        _ = ForgetRetain(Rows()).forget_indices


def test_hooks_that_would_not_run_are_refused() -> None:
    class Moves(Rows):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch

    with pytest.raises(MisconfigurationException, match=r"ForgetRetain does not call Moves\.on_after_batch_transfer"):
        ready(ForgetRetain(Moves()))


def test_trainer_validates_and_tests_with_it() -> None:
    data = ForgetRetain(digits(), seed=0)
    t = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = ToForget()
    (validated,), (tested,) = t.validate(module, data, verbose=False), t.test(module, data, verbose=False)
    plain = digits()
    (expected,) = t.test(module, plain, verbose=False)
    assert tested == expected
    assert validated.keys() == {"val/loss"}
