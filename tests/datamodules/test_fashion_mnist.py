"""Fashion-MNIST: the reader on files made here, the real ones where they are, and a download from this machine."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from groundwire.datamodules import DatasetMissingError, FashionMNIST, Federated
from groundwire.datamodules import fashion_mnist as room
from groundwire.datamodules.fashion_mnist import CONTENT, DEBIAN_FOLDER, read_idx
from helpers.datamodules import check_datamodule

real_files = pytest.mark.skipif(
    not (DEBIAN_FOLDER / "train-images-idx3-ubyte.gz").is_file(),
    reason="Debian's package dataset-fashion-mnist is not installed",
)


def idx(array: np.ndarray) -> bytes:
    return b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_small(folder: Path, *, compressed: bool = True) -> None:
    """Four files of the real layout with 60 and 20 samples."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 60), ("t10k", 20)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = np.arange(n, dtype=np.uint8) % 10
        for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            if compressed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                (folder / name).write_bytes(idx(array))


@pytest.mark.parametrize("compressed", [True, False])
def test_reads_gzipped_and_plain_files(tmp_path: Path, compressed: bool) -> None:
    write_small(tmp_path, compressed=compressed)
    data = FashionMNIST(root=tmp_path, num_val=10, seed=0)
    data.prepare_data()
    data.setup()
    assert (len(data.train_data[0]), len(data.val_data[0]), len(data.test_data[0])) == (50, 10, 20)
    images = read_idx(next(tmp_path.glob("t10k-images*")))
    np.testing.assert_array_equal(data.test_data[0][:, 0].numpy() * 255, images)


def test_shared_checks(tmp_path: Path) -> None:
    write_small(tmp_path)
    check_datamodule(
        functools.partial(FashionMNIST, root=tmp_path, num_val=10),
        {"num_val": 5000, "num_train": 100, "flatten": True, "drop_last": True},
    )


def test_few_and_zero_shot(tmp_path: Path) -> None:
    write_small(tmp_path)
    build = functools.partial(FashionMNIST, root=tmp_path, num_val=10, seed=0)
    whole, few = build(num_train=40), build(num_train=40, train_fraction=0.5, omit_classes=[1, 2])
    whole.setup()
    few.setup()
    there, kept = (torch.bincount(data.train_data[1], minlength=10).tolist() for data in (whole, few))
    assert kept == [0 if label in (1, 2) else max(1, round(0.5 * n)) for label, n in enumerate(there)]
    assert torch.equal(few.val_data[0], whole.val_data[0])
    assert torch.equal(few.test_data[1], whole.test_data[1])
    one = build(num_train=1)
    one.setup()
    (label,) = one.train_data[1].tolist()
    with pytest.raises(ValueError, match=rf"No training sample remains without the classes \[{label}\]: omit fewer"):
        build(num_train=1, omit_classes=[label]).setup()
    with pytest.raises(ValueError, match=r"`omit_classes` must be in \[0, 10\), got \[10\]"):
        build(omit_classes=[10])


def test_damaged_files_are_named(tmp_path: Path) -> None:
    good = idx(np.zeros((3, 2), dtype=np.uint8))
    for content, message in [
        (b"", "is not an IDX file of unsigned bytes: it begins with nothing"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x00", "begins with 00000d01"),
        (good[:6], "cut short: its header takes 12 bytes, the file has 6"),
        (good[:-1], r"should have 18 bytes for shape \(3, 2\), but has 17"),
        (good + b"x", r"should have 18 bytes for shape \(3, 2\), but has 19"),
        (gzip.compress(good)[:-9], "is a damaged gzip file"),
        (gzip.compress(good)[:10] + b"\xff" * 20, "is a damaged gzip file"),
        (gzip.compress(good)[:-5] + b"\xff" + gzip.compress(good)[-4:], "is a damaged gzip file"),
    ]:
        file = tmp_path / "file"
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_idx(file)


def test_wrong_shapes_are_named(tmp_path: Path) -> None:
    write_small(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros(59, dtype=np.uint8))))
    with pytest.raises(ValueError, match=r"shapes \(60, 28, 28\) and \(59,\)"):
        FashionMNIST(root=tmp_path, num_val=10).setup()


def test_missing_data_says_three_ways_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for root in (None, tmp_path / "mine"):
        with pytest.raises(DatasetMissingError) as caught:
            FashionMNIST(root=root).setup()
        for way in ("apt-get install dataset-fashion-mnist", "pass it as `root`", "download=True"):
            assert way in str(caught.value)
        assert str(root or tmp_path / "cache") in str(caught.value)
    folder = tmp_path / "cache" / "groundwire" / "fashion-mnist"
    folder.mkdir(parents=True)
    write_small(folder)
    FashionMNIST(num_val=10).setup()  # the cache is found


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / "served"
    folder.mkdir()
    write_small(folder)
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}/", folder
        served.shutdown()
        thread.join()


def test_download_checks_before_it_keeps(
    server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, served = server
    data = FashionMNIST(root=tmp_path / "mine", download=True, url=url, num_val=10)
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz has checksum .* it was not kept"):
        data.prepare_data()
    assert not list((tmp_path / "mine").iterdir())
    digests = {
        name: hashlib.sha256(gzip.decompress((served / f"{name}.gz").read_bytes())).hexdigest() for name in CONTENT
    }
    monkeypatch.setattr(room, "CONTENT", digests)
    data.prepare_data()
    data.setup()
    assert len(data.test_data[0]) == 20
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == sorted(f"{name}.gz" for name in CONTENT)
    for file in served.iterdir():
        file.unlink()
    data.prepare_data()  # what is there is not fetched again


def test_downloads_that_fail_leave_nothing(server: tuple[str, Path], tmp_path: Path) -> None:
    url, served = server
    mine = tmp_path / "mine"
    (served / "train-images-idx3-ubyte.gz").write_bytes(b"<html>moved</html>")
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is no gzip file .* Use another `url`"):
        FashionMNIST(root=mine, download=True, url=url).prepare_data()
    (served / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(DatasetMissingError, match=r"cannot be fetched \(HTTP Error 404.*three ways"):
        FashionMNIST(root=mine, download=True, url=url).prepare_data()
    with pytest.raises(DatasetMissingError, match=r"cannot be fetched \(.*Is there a network"):
        FashionMNIST(root=mine, download=True, url="http://127.0.0.1:9/").prepare_data()
    assert not list(mine.iterdir())


@pytest.fixture(scope="module")
def real() -> FashionMNIST:
    data = FashionMNIST(root=DEBIAN_FOLDER, seed=0, flatten=True)
    data.setup()
    return data


@real_files
def test_the_a_dsgd_settings_on_real_labels(real: FashionMNIST) -> None:
    data = Federated(real, num_devices=25, partition="by_label", samples_per_device=1000, seed=0)
    data.setup("fit")
    assert all(sorted(row[row > 0].tolist()) == [500, 500] for row in data.class_histogram())
    first, second = (batch for _ in range(2) for batch in data.train_dataloader())
    assert first.data[0].shape == (25, 1000, 784)
    assert first.data[0].data_ptr() == second.data[0].data_ptr(), "nothing is copied"
    held = data.partition.indices
    assert len(held.unique()) == 25_000
    assert torch.equal(first.data[0].view(-1, 784), real.train_data[0][held])
    assert torch.equal(first.data[1].flatten(), real.train_data[1][held])


@real_files
def test_real_files(real: FashionMNIST) -> None:
    for name, digest in CONTENT.items():
        assert hashlib.sha256(gzip.decompress((DEBIAN_FOLDER / f"{name}.gz").read_bytes())).hexdigest() == digest
    data = real
    assert data.train_data[0].shape == (50_000, 784)
    assert torch.bincount(torch.cat([data.train_data[1], data.val_data[1]])).tolist() == [6000] * 10
    assert torch.bincount(data.test_data[1]).tolist() == [1000] * 10
    assert float(data.train_data[0].mean()) == pytest.approx(0.286, abs=0.001)  # the mean pixel that the field quotes
    few = FashionMNIST(root=DEBIAN_FOLDER, seed=0, flatten=True, num_train=100)
    few.setup()
    assert torch.equal(few.train_data[0], data.train_data[0][:100])


def test_bad_input_by_message() -> None:
    with pytest.raises(ValueError, match=r"`num_val` must be in \[0, 60000\), got 60000"):
        FashionMNIST(num_val=60_000)
    with pytest.raises(ValueError, match=r"`num_train` must be in \[1, 50000\] beside num_val=10000, got 50001"):
        FashionMNIST(num_train=50_001)
