"""Digits, and what all in-memory data share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from sklearn.datasets import load_digits

from groundwire.datamodules import Digits, TensorLoader
from helpers.datamodules import Recorder, check_datamodule
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
