"""The descriptions of scikit-learn's data sets: real text that needs no download."""

from __future__ import annotations

import re
from importlib.resources import files

import torch
from torch import Tensor
from typing_extensions import override

from groundwire.datamodules.base import Split, TensorDataModule, shuffled_split

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""Stands for every character that is not in the vocabulary; its token is 0."""
_LOWERCASE = " abcdefghijklmnopqrstuvwxyz0123456789.,:'\"`()[]<>=_-/*%"
_UPPERCASE = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_FOLDER = files("sklearn.datasets") / "descr"


class DatasetDescriptions(TensorDataModule):
    r"""Character-level text: how scikit-learn describes its data sets, some 37,000 characters in 14 documents.

    Every document is one group (a topic). Its text is normalised, cut into windows of ``seq_len + 1`` characters that
    do not overlap (an incomplete last one is left out), and these are dealt out at random to training, validation and
    test, document by document: the splits of one do not depend on which others are chosen. A sample is ``(x, y)``, both
    int64 of shape ``(seq_len,)``: the first ``seq_len`` characters of a window, and the next one of each.

    Normalised means: rulings (three or more ``=`` or ``-`` in a row, of headings and tables) and white space, newlines
    included, become one space; capitals become small letters, unless ``lowercase`` is off; what is not in the vocabulary
    becomes :data:`UNKNOWN`. The vocabulary is fixed: :data:`UNKNOWN`, space, letters, digits and the 18 signs of
    punctuation that are not rare, so that tokens mean the same whatever the documents. The text itself is that of the
    installed scikit-learn, whose releases differ in a few sentences.

    After ``setup()``: ``train_data``, ``val_data`` and ``test_data``, each ``(x, y)``, and ``train_groups``, int64 of
    shape ``(n,)``: the document of each training sample, a position in ``group_names``.

    Args:
        batch_size: Windows a batch.
        seq_len: Characters of an input.
        val_fraction: Share of the windows of every document held out for validation, rounded.
        test_fraction: Share of the windows of every document held out for the test, rounded.
        documents: Names of the documents to use, such as ``["iris", "digits"]``; by default all.
        lowercase: Turn capitals into small letters: 56 tokens, otherwise 82.
        seed: Root seed of splits and order; by default that of ``seed_everything``, else 0.
        drop_last: Leave out a last training batch that is smaller.

    Raises:
        ValueError: If an argument is out of range, or a document is unknown or named twice; at setup, if a document is
            too short to leave a window to train on.

    Example:
        >>> data = DatasetDescriptions(batch_size=8, documents=["digits", "iris"], seed=0)
        >>> data.setup()
        >>> x, y = next(iter(data.train_dataloader()))
        >>> x.shape, y.shape, bool((x[:, 1:] == y[:, :-1]).all())
        (torch.Size([8, 64]), torch.Size([8, 64]), True)
        >>> data.group_names, data.vocab_size, data.decode(data.encode("Iris\n====\n  50 %?"))
        (['digits', 'iris'], 56, 'iris 50 %�')

    Reference:
        Pedregosa et al., "Scikit-learn: Machine Learning in Python", JMLR 12, 2011: ``sklearn/datasets/descr``.
    """

    def __init__(
        self,
        batch_size: int = 64,
        seq_len: int = 64,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        documents: list[str] | None = None,
        lowercase: bool = True,
        seed: int | None = None,
        drop_last: bool = False,
    ) -> None:
        super().__init__(batch_size, seed, drop_last)
        if seq_len < 1:
            raise ValueError(f"`seq_len` must be at least 1 character, got {seq_len}.")
        if not (val_fraction >= 0 and test_fraction >= 0 and val_fraction + test_fraction < 1):
            raise ValueError(
                "`val_fraction` and `test_fraction` must be >= 0 and leave something to train on, got "
                f"{val_fraction} and {test_fraction}."
            )
        self.seq_len = seq_len
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.documents = documents
        self.lowercase = lowercase
        self.group_names = _chosen(documents)
        self.vocabulary = UNKNOWN + _LOWERCASE + ("" if lowercase else _UPPERCASE)
        self.vocab_size = len(self.vocabulary)
        self.train_groups: Tensor

    def encode(self, text: str) -> Tensor:
        """The tokens of a text after normalisation, int64."""
        text = " ".join(re.sub(r"={3,}|-{3,}", " ", text).split())
        if self.lowercase:
            text = text.lower()
        token = {character: i for i, character in enumerate(self.vocabulary)}
        return torch.tensor([token.get(character, 0) for character in text], dtype=torch.int64)

    def decode(self, tokens: Tensor) -> str:
        """The text of a vector of tokens."""
        return "".join(self.vocabulary[token] for token in tokens.tolist())

    @override
    def load(self, seed: int) -> tuple[Split, Split, Split]:
        parts = [self._split(name, seed) for name in self.group_names]
        sizes = torch.tensor([len(train[0]) for train, _, _ in parts])
        self.train_groups = torch.arange(len(parts)).repeat_interleave(sizes)
        train, val, test = (
            (torch.cat([p[i][0] for p in parts]), torch.cat([p[i][1] for p in parts])) for i in range(3)
        )
        return train, val, test

    def _split(self, name: str, seed: int) -> tuple[Split, Split, Split]:
        """Training, validation and test windows of one document."""
        tokens = self.encode((_FOLDER / f"{name}.rst").read_text(encoding="utf-8"))
        n = len(tokens) // (self.seq_len + 1)
        num_val, num_test = round(self.val_fraction * n), round(self.test_fraction * n)
        if num_val + num_test >= n:
            raise ValueError(
                f"The {len(tokens)} characters of {name!r} make {n} windows of seq_len + 1 = {self.seq_len + 1}, of which "
                f"{num_val} are for validation and {num_test} for the test, and none remains to train on: give a smaller "
                "`seq_len` or smaller fractions, or leave this document out of `documents`."
            )
        windows = tokens[: n * (self.seq_len + 1)].view(n, self.seq_len + 1)
        rest, test = shuffled_split(windows[:, :-1], windows[:, 1:], num_test, seed, f"data/test/{name}")
        train, val = shuffled_split(*rest, num_val, seed, f"data/val/{name}")
        return train, val, test


def _chosen(documents: list[str] | None) -> list[str]:
    """Names of the documents to use: those given if they are there, or all of them."""
    there = sorted(path.name.removesuffix(".rst") for path in _FOLDER.iterdir() if path.name.endswith(".rst"))
    if documents is None:
        return there
    unknown = [name for name in documents if name not in there]
    if unknown or not documents:
        what = f"does not know {', '.join(map(repr, unknown))}" if unknown else "is empty"
        raise ValueError(f"`documents` {what}: choose from {', '.join(there)}, or give None for all.")
    if len(set(documents)) < len(documents):
        raise ValueError(f"`documents` must name each document once, got {documents}.")
    return list(documents)
