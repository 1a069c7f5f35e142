"""Fashion-MNIST from local IDX files."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import struct
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from groundwire.datamodules.base import OmitIn, Split, TensorClassification, shuffled_split

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"

# SHA-256 of the files' content before compression
CONTENT = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}

WAYS = (
    "Get it in one of three ways: (1) on Debian or Ubuntu, `apt-get install dataset-fashion-mnist`; (2) put the four "
    f"files {', '.join(CONTENT)} (.gz or not) into a folder and pass it as `root`; (3) with a network, pass "
    "`download=True`."
)
_DAMAGED = (EOFError, OSError, zlib.error)  # what gzip raises, by where the damage is


class DatasetMissingError(FileNotFoundError):
    """The files of a dataset are not there."""


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzipped or not.

    Args:
        path: The file; gzip is recognised by its content.

    Returns:
        The array, dtype uint8.

    Raises:
        ValueError: If it is not such a file, or is cut short.

    Reference:
        LeCun, Cortes, Burges, "The MNIST Database", which defines the format.
    """
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except _DAMAGED as error:
            raise ValueError(f"{path} is a damaged gzip file ({error}): fetch it again.") from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes: it begins with {raw[:4].hex() or 'nothing'}.")
    ndim = raw[3]
    header = 4 + 4 * ndim
    if len(raw) < header:
        raise ValueError(f"{path} is cut short: its header takes {header} bytes, the file has {len(raw)}.")
    shape = struct.unpack(f">{ndim}I", raw[4:header])
    expected = header + int(np.prod(shape, dtype=np.int64))
    if len(raw) != expected:
        raise ValueError(f"{path} should have {expected} bytes for shape {shape}, but has {len(raw)}: fetch it again.")
    return np.frombuffer(raw, dtype=np.uint8, offset=header).reshape(shape)


class FashionMNIST(TensorClassification):
    """70,000 images of clothing, 28 x 28 pixels in 10 classes; pixels in [0, 1].

    Files are looked for in ``root`` if it is given; else in the user's cache
    (``~/.cache/groundwire/fashion-mnist``), then where Debian's package ``dataset-fashion-mnist`` puts them.

    Args:
        root: Folder with the four IDX files, gzipped or not.
        batch_size: Samples a batch.
        num_val: Training images held out for validation.
        num_train: Training images to use of the rest; by default all.
        flatten: Give vectors of 784 pixels instead of images ``(1, 28, 28)``.
        download: Fetch the files into ``root``, or else the user's cache, if they are missing.
        url: Where to fetch them from.
        seed: Root seed of splits and order; by default that of ``seed_everything``, else 0.
        drop_last: Leave out a last training batch that is smaller.
        train_fraction: Few-shot: share of the training samples of every class to keep, in (0, 1]; at least one a class.
        omit_classes: Zero-shot: classes without a training sample; validation and test data keep theirs.
        omit_in: ``"all"`` leaves these classes out of validation and test data, too.

    Raises:
        ValueError: If an argument is out of range, or a file is damaged.
        DatasetMissingError: At setup, if the files are nowhere, or when they cannot be fetched; it says the three ways
            to get them.

    Example:
        >>> data = FashionMNIST(batch_size=128, num_val=10_000, flatten=True)
        >>> data.input_shape, data.num_classes
        ((784,), 10)

    Reference:
        Xiao, Rasul, Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms",
        2017. arXiv:1708.07747
    """

    num_classes = 10

    def __init__(
        self,
        root: str | Path | None = None,
        batch_size: int = 128,
        num_val: int = 10_000,
        num_train: int | None = None,
        flatten: bool = False,
        download: bool = False,
        url: str = URL,
        seed: int | None = None,
        drop_last: bool = False,
        train_fraction: float = 1.0,
        omit_classes: list[int] | None = None,
        omit_in: OmitIn = "train",
    ) -> None:
        super().__init__(batch_size, seed, drop_last, train_fraction, omit_classes, omit_in)
        if not 0 <= num_val < 60_000:
            raise ValueError(f"`num_val` must be in [0, 60000), got {num_val}.")
        if num_train is not None and not 1 <= num_train <= 60_000 - num_val:
            raise ValueError(
                f"`num_train` must be in [1, {60_000 - num_val}] beside num_val={num_val}, got {num_train}."
            )
        self.root = Path(root).expanduser() if root is not None else None
        self.num_val = num_val
        self.num_train = num_train
        self.flatten = flatten
        self.download = download
        self.url = url
        self.input_shape = (784,) if flatten else (1, 28, 28)

    @override
    def prepare_data(self) -> None:
        if self.download and self._folder() is None:
            self._fetch(self._folders()[0])

    @override
    def load(self, seed: int) -> tuple[Split, Split, Split]:
        folder = self._folder()
        if folder is None:
            raise DatasetMissingError(f"Fashion-MNIST is not in {' or '.join(str(f) for f in self._folders())}. {WAYS}")
        x, y = self._read(folder, "train")
        rest, val = shuffled_split(x, y, self.num_val, seed, "data/val")
        train = rest if self.num_train is None else (rest[0][: self.num_train], rest[1][: self.num_train])
        return train, val, self._read(folder, "t10k")

    def _read(self, folder: Path, part: str) -> Split:
        paths = [_find(folder, f"{part}-{kind}") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
        images, labels = (read_idx(path) for path in paths if path is not None)
        if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{paths[0]} and {paths[1]} have shapes {images.shape} and {labels.shape}; expected (n, 28, 28), (n,)."
            )
        x: Tensor = torch.from_numpy(images.copy()).float().div_(255).view(-1, *self.input_shape)
        return x, torch.from_numpy(labels.copy()).long()

    def _folders(self) -> list[Path]:
        if self.root is not None:
            return [self.root]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return [cache / "groundwire" / "fashion-mnist", DEBIAN_FOLDER]

    def _folder(self) -> Path | None:
        return next((f for f in self._folders() if all(_find(f, name) for name in CONTENT)), None)

    def _fetch(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, digest in CONTENT.items():
            if _find(folder, name) is not None:
                continue
            source = f"{self.url.rstrip('/')}/{name}.gz"
            rank_zero_info(f"Fetching {source}")
            try:
                with urllib.request.urlopen(source, timeout=60) as answer:
                    content = answer.read()
            except (OSError, http.client.HTTPException) as error:
                raise DatasetMissingError(
                    f"{source} cannot be fetched ({error}). Is there a network? {WAYS}"
                ) from error
            try:
                found = hashlib.sha256(gzip.decompress(content)).hexdigest()
            except _DAMAGED as error:
                raise ValueError(f"{source} is no gzip file ({error}): it was not kept. Use another `url`.") from error
            if found != digest:
                raise ValueError(f"{source} has checksum {found}, not {digest}: it was not kept. Use another `url`.")
            part = folder / f".{name}.{os.getpid()}"
            try:
                part.write_bytes(content)
                part.replace(folder / f"{name}.gz")  # all of the file or nothing
            finally:
                part.unlink(missing_ok=True)


def _find(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
