from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from groundwire.callbacks.weights import find_checkpoint, load_weights, read_weights
from helpers.edge import CLASSES, FEATURES, Classifier, loader, mlp, trainer, weights


def write(file: Path, age_s: float = 0.0) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    os.utime(file, (1e9 - age_s, 1e9 - age_s))
    return file


def test_a_file_is_itself(tmp_path: Path) -> None:
    file = write(tmp_path / "some.ckpt")
    assert find_checkpoint(file) == find_checkpoint(str(file)) == file


def test_of_a_folder_the_newest_last_is_taken_before_newer_others(tmp_path: Path) -> None:
    write(tmp_path / "version_0" / "last.ckpt", age_s=50)
    newest = write(tmp_path / "version_1" / "checkpoints" / "last.ckpt", age_s=20)
    write(tmp_path / "version_1" / "checkpoints" / "epoch=3.ckpt")
    write(tmp_path / "version_2" / "last.ckpt", age_s=30)
    assert find_checkpoint(tmp_path) == newest


def test_of_a_folder_without_a_last_the_newest_is_taken(tmp_path: Path) -> None:
    write(tmp_path / "a.ckpt", age_s=20)
    newest = write(tmp_path / "deep" / "er" / "b.ckpt", age_s=10)
    write(tmp_path / "notes.txt")
    assert find_checkpoint(tmp_path) == newest


def test_nothing_is_refused_by_a_message_that_says_what_to_do(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "mse_teacher"):
        with pytest.raises(FileNotFoundError, match=f"groundwire fit --config {path.name}"):
            find_checkpoint(path)


def trained(folder: Path) -> tuple[Classifier, Path]:
    module = Classifier(mlp(nn.BatchNorm1d(16)))
    t = trainer(steps=3)
    t.fit(module, loader())
    t.save_checkpoint(folder / "last.ckpt")
    return module, folder / "last.ckpt"


def test_all_parameters_and_buffers_are_loaded(tmp_path: Path) -> None:
    module, file = trained(tmp_path)
    fresh = Classifier(mlp(nn.BatchNorm1d(16)))
    assert not torch.equal(weights(fresh), weights(module))
    assert load_weights(fresh, tmp_path) == file
    assert torch.equal(weights(fresh), weights(module))
    assert set(read_weights(file)) == set(module.state_dict())


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Linear(FEATURES, CLASSES), r"`network.0.bias` \[16\] in the file, missing in the model.*and \d+ more"),
        (mlp(nn.LayerNorm(16)), r"`network.1.num_batches_tracked` \[\] in the file, missing in the model"),
        (mlp(nn.BatchNorm1d(16), nn.BatchNorm1d(16)), "missing in the file"),
    ],
)
def test_a_checkpoint_of_another_model_loads_nothing(network: nn.Module, message: str, tmp_path: Path) -> None:
    _, file = trained(tmp_path)
    other = Classifier(network)
    before = weights(other)
    with pytest.raises(ValueError, match=message):
        load_weights(other, file)
    assert torch.equal(weights(other), before)


def test_other_shapes_are_named(tmp_path: Path) -> None:
    _, file = trained(tmp_path)
    wider = Classifier(nn.Sequential(nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10)))
    with pytest.raises(ValueError, match=r"`network.3.bias` \[3\] in the file, \[10\] in the model"):
        load_weights(wider, file)


@pytest.mark.parametrize("content", [{"weights": 1}, [1, 2], {"state_dict": 3}])
def test_a_file_that_is_no_checkpoint_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="is no Lightning checkpoint: it has no `state_dict`"):
        read_weights(tmp_path)
