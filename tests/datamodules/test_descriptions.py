"""Text: what is in the windows, how they are split, and what all in-memory data share."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from groundwire.datamodules import DatasetDescriptions
from groundwire.datamodules.base import Split
from groundwire.datamodules.descriptions import UNKNOWN
from helpers.datamodules import check_built_from_yaml, check_resume, check_resume_after_an_error, check_stages

SHORT = ["iris", "linnerud", "digits"]


def ready(**options: Any) -> DatasetDescriptions:
    data = DatasetDescriptions(**({"seed": 0} | options))
    data.setup()
    return data


def splits(data: DatasetDescriptions) -> list[Split]:
    return [data.train_data, data.val_data, data.test_data]


def windows(data: DatasetDescriptions, split: Split) -> list[str]:
    """The characters of each window: its input, and the last target."""
    return [data.decode(torch.cat([x, y[-1:]])) for x, y in zip(*split, strict=True)]


def source(name: str, *, lowercase: bool = True) -> str:
    """A document as the docstring says it is normalised, by other means than the code: word by word."""
    text = (files("sklearn.datasets") / "descr" / f"{name}.rst").read_text(encoding="utf-8")
    words = " ".join(re.split(r"===+|---+", text)).split()
    known = re.compile(r"[ a-zA-Z0-9.,:'\"`()\[\]<>=_\-/*%]")
    text = " ".join(words)
    return "".join(c if known.match(c) else UNKNOWN for c in (text.lower() if lowercase else text))


def four_batches(seed: int | None = 3, **options: Any) -> DatasetDescriptions:  # 59 training windows
    return DatasetDescriptions(**({"batch_size": 15, "documents": SHORT, "seed": seed} | options))


def test_shared_checks() -> None:
    check_stages(four_batches)
    check_resume(four_batches)
    check_resume_after_an_error(four_batches, steps=9)
    args = {"batch_size": 7, "seq_len": 32, "documents": ["iris", "digits"], "lowercase": False, "seed": 5}
    data = check_built_from_yaml(DatasetDescriptions, args)
    assert isinstance(data, DatasetDescriptions)
    assert data.group_names == ["iris", "digits"]


def test_by_default_all_documents_and_one_fixed_vocabulary() -> None:
    data, few, capitals = ready(), ready(documents=["linnerud"]), ready(lowercase=False)
    there = {path.name for path in (files("sklearn.datasets") / "descr").iterdir() if path.name.endswith(".rst")}
    assert {f"{name}.rst" for name in data.group_names} == there
    assert data.group_names == sorted(data.group_names)
    assert len(set(data.vocabulary)) == data.vocab_size == 56
    assert few.vocabulary == data.vocabulary
    assert set(capitals.vocabulary) - set(data.vocabulary) == set("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    tokens = torch.cat([y.flatten() for _, y in splits(data)])
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < data.vocab_size
    assert 0 < (tokens == 0).float().mean() < 0.002, "what is unknown is rare"
    assert data.train_groups.unique().tolist() == list(range(len(data.group_names)))


@pytest.mark.parametrize(("seq_len", "lowercase"), [(64, True), (17, False)])
def test_windows_tile_the_source_text(seq_len: int, lowercase: bool) -> None:
    """Each window once in all splits, at multiples of its length: complete, and none overlaps another."""
    for name in SHORT:
        text, size = source(name, lowercase=lowercase), seq_len + 1
        expected = [text[i : i + size] for i in range(0, len(text) - size + 1, size)]
        data = ready(documents=[name], seq_len=seq_len, lowercase=lowercase)
        found = [window for split in splits(data) for window in windows(data, split)]
        assert sorted(found) == sorted(expected)


def test_samples_are_tokens_and_the_next_ones() -> None:
    data = ready()
    for x, y in splits(data):
        assert x.dtype == y.dtype == torch.int64
        assert x.shape == y.shape == (len(x), 64)
        assert torch.equal(x[:, 1:], y[:, :-1])
    texts = [source(name) for name in data.group_names]
    for group, window in zip(data.train_groups.tolist(), windows(data, data.train_data), strict=True):
        assert window in texts[group]


def test_every_document_is_split_by_the_fractions() -> None:
    data = ready(val_fraction=0.2, test_fraction=0.3)
    total = [len(source(name)) // 65 for name in data.group_names]
    held = [round(0.2 * n) + round(0.3 * n) for n in total]
    assert data.train_groups.bincount().tolist() == [n - out for n, out in zip(total, held, strict=True)]
    assert len(data.val_data[0]) == sum(round(0.2 * n) for n in total)
    assert len(data.test_data[0]) == sum(round(0.3 * n) for n in total)
    without = ready(val_fraction=0, test_fraction=0)
    assert without.train_groups.bincount().tolist() == total
    assert len(without.val_data[0]) == len(without.test_data[0]) == 0


def test_splits_are_the_seeds_and_do_not_depend_on_the_other_documents() -> None:
    data, again, other, alone = ready(), ready(), ready(seed=1), ready(documents=["iris"])
    for ours, theirs in zip(splits(data), splits(again), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for ours, theirs in zip(splits(data), splits(other), strict=True):
        assert ours[0].shape == theirs[0].shape
        assert not torch.equal(ours[0], theirs[0])
    iris = data.train_groups == data.group_names.index("iris")
    assert torch.equal(alone.train_data[0], data.train_data[0][iris])
    assert set(windows(alone, alone.test_data)) <= set(windows(data, data.test_data))


def test_each_epoch_has_every_sample_once_in_another_order() -> None:
    data = ready(documents=SHORT, batch_size=15)
    loader = data.train_dataloader()
    first, second = ([tuple(row) for x, _ in loader for row in x.tolist()] for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(map(tuple, data.train_data[0].tolist()))
    assert first != second


def test_a_checkpoint_of_another_seed(seeded) -> None:  # type: ignore[no-untyped-def]
    first = ready(documents=SHORT, seed=1)
    seeded(2)
    follows, differs = ready(documents=SHORT, seed=None), ready(documents=SHORT, seed=2)
    assert torch.equal(follows.train_data[0], differs.train_data[0]), "by default the seed of seed_everything"
    follows.load_state_dict(first.state_dict())
    for ours, theirs in zip(splits(follows), splits(first), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(follows.train_groups, first.train_groups)
    with pytest.raises(MisconfigurationException, match=r"DatasetDescriptions\(seed=1\), and this one has seed=2"):
        differs.load_state_dict(first.state_dict())


def test_normalisation_by_hand() -> None:
    data, capitals = DatasetDescriptions(), DatasetDescriptions(lowercase=False)
    text = "Title\n-----\n\n  a == b, x--y\t>>> 30\N{MULTIPLICATION SIGN}30m  =====  ====\n"
    assert data.decode(data.encode(text)) == f"title a == b, x--y >>> 30{UNKNOWN}30m"
    assert capitals.decode(capitals.encode(text)).startswith("Title a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"seq_len": 0}, "`seq_len` must be at least 1 character, got 0"),
        ({"val_fraction": -0.1}, ">= 0 and leave something to train on, got -0.1 and 0.1"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "leave something to train on, got 0.5 and 0.5"),
        ({"test_fraction": float("nan")}, "got 0.1 and nan"),
        ({"documents": ["iris", "irises"]}, "does not know 'irises': choose from breast_cancer, .*, wine_data, or"),
        ({"documents": []}, "`documents` is empty: choose from breast_cancer, "),
        ({"documents": ["iris", "digits", "iris"]}, "each document once, got"),
    ],
)
def test_bad_input_by_message(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DatasetDescriptions(**options)


@pytest.mark.parametrize("options", [{"seq_len": 5000}, {"seq_len": 300, "val_fraction": 0.4, "test_fraction": 0.5}])
def test_a_document_that_leaves_nothing_to_train_on(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"'linnerud' make \d windows .* smaller `seq_len` or smaller fractions, or"):
        ready(documents=["linnerud"], **options)
