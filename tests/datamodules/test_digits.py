"""Digits, and what all in-memory data share."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from sklearn.datasets import load_digits

from groundwire.datamodules import Digits, Federated, TensorLoader
from helpers.datamodules import Recorder, check_built_from_yaml, check_datamodule, check_resume
from helpers.edge import trainer


def test_shared_checks() -> None:
    check_datamodule(Digits, {"batch_size": 32, "flatten": True, "seed": 5})


def test_splits_are_disjoint_and_complete() -> None:
    data = Digits(seed=5)
    data.setup()
    images, labels = load_digits(return_X_y=True)
    found = torch.cat([s[0].flatten(1) for s in (data.train_data, data.val_data, data.test_data)])
    order = torch.cat([s[1] for s in (data.train_data, data.val_data, data.test_data)])
    assert (len(data.train_data[0]), len(data.val_data[0]), len(data.test_data[0])) == (1258, 180, 359)
    # the multiset of (image, label) rows is the dataset's: nothing twice, nothing lost
    ours = torch.cat([found * 16, order[:, None].float()], dim=1)
    theirs = torch.cat([torch.from_numpy(images).float(), torch.from_numpy(labels)[:, None].float()], dim=1)
    assert sorted(map(tuple, ours.tolist())) == sorted(map(tuple, theirs.tolist()))


def test_flat_and_image_shapes_hold_the_same_pixels() -> None:
    flat, image = Digits(flatten=True, seed=0), Digits(seed=0)
    flat.setup()
    image.setup()
    assert flat.train_data[0].shape[1:] == (64,)
    assert torch.equal(flat.train_data[0], image.train_data[0].flatten(1))


def test_seed_defaults_to_that_of_seed_everything(seeded) -> None:  # type: ignore[no-untyped-def]
    seeded(4)
    by_default, given = Digits(), Digits(seed=4)
    by_default.setup()
    given.setup()
    assert torch.equal(by_default.train_data[1], given.train_data[1])


def test_a_checkpoint_of_another_seed(seeded) -> None:  # type: ignore[no-untyped-def]
    first = Digits(seed=1)
    first.setup()
    seeded(2)
    follows, differs = Digits(), Digits(seed=2)
    follows.setup()
    follows.load_state_dict(first.state_dict())
    assert torch.equal(follows.train_data[1], first.train_data[1])
    differs.setup()
    with pytest.raises(MisconfigurationException, match=r"Digits\(seed=1\), and this one has seed=2"):
        differs.load_state_dict(first.state_dict())


def test_validating_or_testing_does_not_lose_the_place_in_training(tmp_path: Path) -> None:
    whole, first, resumed = Recorder(), Recorder(), Recorder()
    trainer(steps=7).fit(whole, Digits(batch_size=400, seed=3))
    t, data = trainer(steps=3), Digits(batch_size=400, seed=3)
    t.fit(first, data)
    t.validate(first, data, verbose=False)
    t.test(first, data, verbose=False)
    t.save_checkpoint(tmp_path / "last.ckpt")
    trainer(steps=7).fit(resumed, Digits(batch_size=400, seed=3), ckpt_path=str(tmp_path / "last.ckpt"))
    for ours, theirs in zip(resumed.seen, whole.seen[3:], strict=True):
        assert torch.equal(ours[1], theirs[1])


def test_a_second_fit_begins_anew() -> None:
    data, first, second = Digits(batch_size=400, seed=3), Recorder(), Recorder()
    trainer(steps=3).fit(first, data)
    trainer(steps=3).fit(second, data)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(first.seen, second.seen, strict=True))


def test_without_validation_data() -> None:
    data, recorder = Digits(val_fraction=0, test_fraction=0, batch_size=400), Recorder()
    trainer(steps=2).fit(recorder, data)
    assert len(data.train_data[0]) == 1797
    assert not recorder.evaluated["val"]


@pytest.mark.parametrize("fraction", [1e-9, 0.1, 0.5, 0.999])
def test_few_shot_keeps_that_share_of_every_class(fraction: float) -> None:
    whole, few = Digits(seed=3), Digits(seed=3, train_fraction=fraction)
    whole.setup()
    few.setup()
    there, kept = (torch.bincount(data.train_data[1], minlength=10).tolist() for data in (whole, few))
    assert kept == [max(1, round(fraction * n)) for n in there]
    for name in ("val_data", "test_data"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(few, name), getattr(whole, name), strict=True)), name
    rows = [tuple(row) for row in whole.train_data[0].flatten(1).tolist()]
    positions = [rows.index(tuple(row)) for row in few.train_data[0].flatten(1).tolist()]
    assert positions == sorted(set(positions)), "a subset, in the order of the whole"
    assert torch.equal(few.train_data[1], whole.train_data[1][positions])


def test_few_shot_subsets_are_the_seeds_and_grow_with_the_fraction() -> None:
    def subset(seed: int, fraction: float) -> set[tuple[float, ...]]:
        data = Digits(seed=0, train_fraction=fraction)
        x, _ = data._reduced(split, seed)
        return {tuple(row) for row in x.flatten(1).tolist()}

    (split, _, _) = Digits().load(0)
    assert subset(1, 0.1) == subset(1, 0.1)
    assert subset(1, 0.1) < subset(1, 0.3)
    common = len(subset(1, 0.1) & subset(2, 0.1))
    assert common < 0.3 * len(subset(1, 0.1)), "chance would have a tenth in common"


def test_all_of_the_data_is_left_as_it_is() -> None:
    plain, data = Digits(seed=2), Digits(seed=2, train_fraction=1.0, omit_classes=[])
    plain.setup()
    data.setup()
    assert all(torch.equal(a, b) for a, b in zip(plain.train_data, data.train_data, strict=True))
    assert data.state_dict() == plain.state_dict()
    (split, _, _) = data.load(2)
    assert data._reduced(split, 2) is split


def test_zero_shot_leaves_classes_out_of_the_training_alone() -> None:
    whole, data = Digits(seed=1), Digits(seed=1, omit_classes=[7, 0, 7])
    whole.setup()
    data.setup()
    keep = [label not in (0, 7) for label in whole.train_data[1].tolist()]
    assert all(torch.equal(a, b[keep]) for a, b in zip(data.train_data, whole.train_data, strict=True))
    for name in ("val_data", "test_data"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(data, name), getattr(whole, name), strict=True)), name
    few, both = Digits(seed=1, train_fraction=0.2), Digits(seed=1, train_fraction=0.2, omit_classes=[0, 7])
    few.setup()
    both.setup()
    keep = [label not in (0, 7) for label in few.train_data[1].tolist()]
    assert torch.equal(both.train_data[0], few.train_data[0][keep]), "what is omitted does not move the others"


def test_reduced_data_trains_resumes_and_follows_a_checkpoints_seed(seeded) -> None:  # type: ignore[no-untyped-def]
    def build(seed: int | None = 3) -> Digits:  # 4 batches an epoch
        return Digits(batch_size=55, seed=seed, train_fraction=0.2, omit_classes=[4])

    check_resume(build)
    check_built_from_yaml(Digits, {"train_fraction": 0.2, "omit_classes": [4, 5]})
    first = build(1)
    first.setup()
    seeded(2)
    follows = build(None)
    follows.setup()
    assert not torch.equal(follows.train_data[1], first.train_data[1])
    follows.load_state_dict(first.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(follows.train_data, first.train_data, strict=True))


@pytest.mark.parametrize("partition", ["iid", "by_label", "shards", "dirichlet"])
def test_federated_deals_out_the_reduced_data(partition: Literal["iid", "by_label", "shards", "dirichlet"]) -> None:
    few = Digits(seed=0, train_fraction=0.25, omit_classes=[0, 9])
    data = Federated(few, num_devices=4, partition=partition, seed=0)
    data.setup("fit")
    held = data.class_histogram().sum(0).tolist()
    assert held == torch.bincount(few.train_data[1]).tolist()
    assert held[0] == 0
    assert len(held) == 9, "labels keep their numbers, and the last is absent"
    assert set(torch.cat([y for _, y in data.val_dataloader()]).tolist()) == set(range(10))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_fraction": 0.0}, r"`train_fraction` must be in \(0, 1\], got 0\.0: give the share .* 1\.0 keeps all"),
        ({"train_fraction": 1.1}, r"must be in \(0, 1\], got 1\.1"),
        ({"train_fraction": float("nan")}, r"must be in \(0, 1\], got nan"),
        ({"omit_classes": [3, 10]}, r"`omit_classes` must be in \[0, 10\), got \[3, 10\]: leave out 10"),
        ({"omit_classes": [-1]}, r"must be in \[0, 10\), got \[-1\]: leave out -1"),
        ({"omit_classes": list(range(10))}, "names all 10 classes, got .* leave at least one to train on"),
    ],
)
def test_bad_shots_by_message(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Digits(**options)


def test_bad_input_by_message() -> None:
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        Digits(batch_size=0)
    with pytest.raises(ValueError, match=r"leave something to train on, got 0\.5 and 0\.5"):
        Digits(val_fraction=0.5, test_fraction=0.5)
    with pytest.raises(ValueError, match=">= 0"):
        Digits(val_fraction=-0.1)
    split = (torch.zeros(5, 1), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="`batch_size` is 6, but there are only 5 samples"):
        TensorLoader(split, 6, drop_last=True)
    assert [len(x) for x, _ in TensorLoader(split, 2)] == [2, 2, 1]
    assert [len(x) for x, _ in TensorLoader(split, 2, drop_last=True)] == [2, 2]


def test_processes_share_an_epoch() -> None:
    split = (torch.arange(10.0)[:, None], torch.arange(10))
    evaluated = [torch.cat([y for _, y in TensorLoader(split, 2, rank=r, num_ranks=3)]) for r in range(3)]
    assert sorted(torch.cat(evaluated).tolist()) == list(range(10))
    trained = [[y for _, y in TensorLoader(split, 2, shuffle=True, rank=r, num_ranks=3)] for r in range(3)]
    assert {len(batches) for batches in trained} == {2}, "all ranks take equally many steps"
    assert len({int(label) for batches in trained for y in batches for label in y}) == 9


def test_overfitting_a_few_batches_sees_the_same_ones() -> None:
    recorder = Recorder()
    trainer(steps=6, overfit_batches=2).fit(recorder, Digits(batch_size=50, seed=0))
    for a, b in zip(recorder.seen[:2] * 2, recorder.seen[2:], strict=True):
        assert torch.equal(a[1], b[1])
