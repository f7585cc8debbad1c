"""What guards the way in: the same images from any form, downloads, and where they are looked for."""

import gzip
import hashlib
import shutil
import socket
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import platformdirs
import pytest
from pictures import (
    DATA,
    files,
    needs_cifar10,
    needs_mnist,
    needs_tree,
    small_cifar10,
    write_archive,
    write_batches,
    write_npz,
    write_tree,
)

from era_s10.datasets.cifar10 import CIFAR10
from era_s10.datasets.digits import Digits
from era_s10.datasets.generic import MyDataSet
from era_s10.datasets.mnist import MNIST
from era_s10.downloads import Download
from era_s10.sources import read_mnist

CIFAR10_PRINTS = {
    "train": "46d2e037760aee523352b949009434e0",
    "test": "375c6c5eae463b3985995e70dc323f55",
}
pytestmark = pytest.mark.usefixtures("any_images")
MNIST_PRINTS = {
    "train": "64e90d8b058c0453ef83e625b4fcd869",
    "test": "6ba1953e3aa0097223e5131a7336c04f",
}
DIGITS_PRINTS = {
    "train": "3bb516c8ca24503e62a3120111bcfa53",
    "test": "4492198d805d66e897502f0c2079876f",
}


@pytest.fixture
def nowhere(monkeypatch, tmp_path) -> Path:  # The cache folder, not made yet
    "Point the cache of the user to a place of this test, and unset the variable."
    monkeypatch.delenv("ERA_S10_DATA", raising=False)
    cache = tmp_path / "cache" / "era_s10"
    monkeypatch.setattr(
        platformdirs, "user_cache_dir", lambda *args, **options: str(cache)
    )
    return cache


def labelled(
    dataset: MyDataSet,
) -> list[list[bytes]]:  # Training and test images, each sorted
    "List each image's bytes behind its label."
    parts = (dataset.x_train, dataset.y_train), (dataset.x_test, dataset.y_test)
    return [
        sorted(
            bytes([label]) + image.tobytes() for image, label in zip(*p, strict=True)
        )
        for p in parts
    ]


# ---------------------------------------------------------------- CIFAR-10 in its three forms


def test_the_same_images_come_from_every_form(tmp_path):
    arrays = small_cifar10()
    write_batches(tmp_path / "a", *arrays)
    write_npz(tmp_path / "b" / "cifar10.npz", *arrays)
    write_tree(tmp_path / "c" / "cifar10", *arrays)
    x_train, y_train, x_test, y_test = arrays
    places = ("a", "a/cifar-10-batches-py", "b", "b/cifar10.npz", "c", "c/cifar10")
    found = [CIFAR10(tmp_path / place, batch_size=16) for place in places]
    for dataset in found:
        assert dataset.fingerprints == found[0].fingerprints
        assert labelled(dataset) == labelled(found[0])
        assert dataset.x_train.dtype == np.uint8
        assert dataset.y_train.dtype == np.int64
        assert dataset.classes == CIFAR10.names
    for dataset in found[:4]:  # These keep the order
        assert np.array_equal(dataset.x_train, x_train)
        assert np.array_equal(dataset.y_train, y_train)
        assert np.array_equal(dataset.x_test, x_test)
        assert np.array_equal(dataset.y_test, y_test)


def test_a_fingerprint_tells_images_labels_and_parts_apart(tmp_path):
    x_train, y_train, x_test, y_test = small_cifar10()
    base = CIFAR10(
        write_npz(tmp_path / "0.npz", x_train, y_train, x_test, y_test)
    ).fingerprints
    order = np.random.default_rng(1).permutation(60)
    shuffled = write_npz(
        tmp_path / "1.npz", x_train[order], y_train[order], x_test, y_test
    )
    assert CIFAR10(shuffled).fingerprints == base
    pixel, labels = x_train.copy(), y_train.copy()
    pixel[7, 3, 2, 1] ^= 1
    labels[:2] = labels[:2][::-1]
    assert labels.tolist() != y_train.tolist()
    for i, (x, y) in enumerate(
        [(pixel, y_train), (x_train, labels), (x_train[1:], y_train[1:])]
    ):
        other = CIFAR10(
            write_npz(tmp_path / f"{i + 2}.npz", x, y, x_test, y_test)
        ).fingerprints
        assert other["train"] != base["train"]
        assert other["test"] == base["test"]


def test_the_official_batches_come_first(tmp_path):
    x_train, y_train, x_test, y_test = small_cifar10()
    write_batches(tmp_path, x_train, y_train, x_test, y_test)
    write_npz(tmp_path / "cifar10.npz", x_test, y_test, x_train, y_train)
    assert len(CIFAR10(tmp_path).y_train) == 60


def test_any_folder_and_any_npz_make_a_data_set(tmp_path):
    arrays = small_cifar10()
    tree = MyDataSet(write_tree(tmp_path / "tree", *arrays))
    npz = MyDataSet(write_npz(tmp_path / "any.npz", *arrays))
    assert tree.fingerprints == npz.fingerprints
    assert tree.classes == tuple(sorted(CIFAR10.names))
    assert npz.classes == tuple("0123456789")


@needs_cifar10
def test_the_real_cifar10_is_the_real_one():
    dataset = CIFAR10(DATA / "cifar10.npz")
    assert dataset.fingerprints == CIFAR10_PRINTS
    assert np.bincount(dataset.y_train).tolist() == [5000] * 10
    assert np.bincount(dataset.y_test).tolist() == [1000] * 10


@needs_tree
def test_the_real_cifar10_is_the_same_as_a_tree():
    assert CIFAR10(DATA / "cifar10").fingerprints == CIFAR10_PRINTS


# ---------------------------------------------------------------- MNIST and the digits


def write_mnist(folder: Path, zipped: bool = False) -> Path:
    "Write the four files in IDX format, with 40 + 20 real digits of 28x28 pixels."
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = np.pad(
        (images[:60] * 15).astype(np.uint8).reshape(-1, 8, 8).repeat(3, 1).repeat(3, 2),
        2,
    )
    images = images[2:-2]
    folder.mkdir(parents=True)
    for part, chosen in (("train", slice(40)), ("t10k", slice(40, 60))):
        for kind, held in (
            ("images-idx3", images[chosen]),
            ("labels-idx1", labels[chosen]),
        ):
            head = bytes([0, 0, 8, held.ndim]) + np.array(held.shape, ">u4").tobytes()
            name, raw = f"{part}-{kind}-ubyte", head + held.astype(np.uint8).tobytes()
            if zipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(raw))
            else:
                (folder / name).write_bytes(raw)
    return folder


def test_mnist_is_the_same_plain_gzipped_and_where_torchvision_puts_it(tmp_path):
    write_mnist(tmp_path / "plain")
    write_mnist(tmp_path / "zipped", zipped=True)
    write_mnist(tmp_path / "torchvision" / "MNIST" / "raw")
    found = [MNIST(tmp_path / place) for place in ("plain", "zipped", "torchvision")]
    raw = read_mnist(tmp_path / "plain")
    assert raw.x_train.shape == (40, 28, 28, 1)
    for dataset in found:
        assert dataset.fingerprints == found[0].fingerprints
        assert dataset.x_train.shape == (40, 32, 32, 1)
        assert np.array_equal(dataset.x_train[:, 2:-2, 2:-2], raw.x_train)
        assert dataset.x_train.sum() == raw.x_train.sum()
        x, _ = next(iter(dataset.test_loader))
        assert x.shape == (20, 1, 32, 32)
    arrays = {n: getattr(raw, n) for n in ("x_train", "y_train", "x_test", "y_test")}
    np.savez(tmp_path / "mnist.npz", **arrays)
    assert MNIST(tmp_path).fingerprints == found[0].fingerprints


@needs_mnist
def test_the_real_mnist_is_the_real_one():
    assert MNIST(DATA).fingerprints == MNIST_PRINTS


def test_the_digits_are_split_once_and_for_all():
    dataset = Digits(seed=5)
    assert dataset.fingerprints == DIGITS_PRINTS
    assert dataset.x_train.shape == (1437, 32, 32, 3)
    assert dataset.x_test.shape == (360, 32, 32, 3)
    shares = np.bincount(dataset.y_test) / np.bincount(
        np.append(dataset.y_train, dataset.y_test)
    )
    assert np.abs(shares - 360 / 1797).max() < 0.005


# ---------------------------------------------------------------- downloads


@pytest.fixture
def served(
    monkeypatch, tmp_path
) -> Iterator[tuple[str, Path]]:  # Address; the folder behind it
    "Serve a folder on this machine."
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        "Tells nobody, and breaks off in the middle of a file named so."

        def log_message(self, *args) -> None:
            pass

        def do_GET(self) -> None:
            if not self.path.endswith("/cut.tar.gz"):
                super().do_GET()
                return
            held = (folder / "cifar-10-python.tar.gz").read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(held)))
            self.end_headers()
            self.wfile.write(held[: len(held) // 2])

    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Quiet, directory=str(folder))
    )
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.05}
    )
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    thread.join()
    server.server_close()


def cifar10_from(url: str, md5: str) -> type[CIFAR10]:
    "Make a CIFAR10 that downloads from elsewhere."
    name = "cifar-10-python.tar.gz"

    class Elsewhere(CIFAR10):
        archives = (Download((url,), md5=md5, name=name, megabytes=1),)

    return Elsewhere


def check_message(error: BaseException, folder: Path) -> None:
    "The message is one line that says where to put the file, and names the digits."
    text = str(error)
    assert "\n" not in text
    assert str(folder) in text
    assert "by hand" in text
    assert "cifar-10-python.tar.gz" in text
    assert "digits" in text


def test_a_download_is_checked_and_loads(served, nowhere, tmp_path):
    url, folder = served
    held = write_archive(folder / "cifar-10-python.tar.gz", small_cifar10())
    kind = cifar10_from(f"{url}/cifar-10-python.tar.gz", hashlib.md5(held).hexdigest())
    target = tmp_path / "target"
    target.mkdir()
    dataset = kind(target, download=True)
    expected = CIFAR10(write_npz(tmp_path / "x.npz", *small_cifar10()))
    assert dataset.fingerprints == expected.fingerprints
    assert {path.name for path in target.iterdir()} <= {
        ".lock",
        "cifar-10-python.tar.gz",
        "cifar-10-batches-py",
    }
    (folder / "cifar-10-python.tar.gz").unlink()  # It is not asked for again
    assert kind(target, download=True).fingerprints == expected.fingerprints
    assert CIFAR10(target).fingerprints == expected.fingerprints


def test_a_download_goes_to_the_cache_folder_if_no_other_is_named(served, nowhere):
    url, folder = served
    held = write_archive(folder / "cifar-10-python.tar.gz", small_cifar10())
    kind = cifar10_from(f"{url}/cifar-10-python.tar.gz", hashlib.md5(held).hexdigest())
    assert len(kind(download=True).y_train) == 60
    assert (nowhere / "cifar-10-batches-py" / "batches.meta").exists()


WAITED_FOR = [
    pytest.param(fault, marks=pytest.mark.slow) for fault in ("closed port", "cut off")
]


@pytest.mark.parametrize("fault", ["wrong md5", "404", *WAITED_FOR])
def test_a_failed_download_says_what_to_do_and_leaves_no_file(
    served, nowhere, tmp_path, fault
):
    url, folder = served
    held = write_archive(folder / "cifar-10-python.tar.gz", small_cifar10())
    md5, path = hashlib.md5(held).hexdigest(), "cifar-10-python.tar.gz"
    if fault == "wrong md5":
        md5 = "0" * 32
    elif fault == "404":
        path = "not-there.tar.gz"
    elif fault == "cut off":
        path = "cut.tar.gz"
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{free.getsockname()[1]}"
    target = tmp_path / "target"
    target.mkdir()
    kind = cifar10_from(f"{url}/{path}", md5)
    with pytest.raises(OSError) as raised:
        kind(target, download=True)
    check_message(raised.value, target)
    left = [".cifar-10-python.tar.gz.part"] * (fault == "cut off")  # to go on from
    assert files(target) == [*left, ".lock"]
    with pytest.raises(OSError) as raised:
        kind(download=True)
    check_message(raised.value, nowhere)
    assert files(nowhere) == [*left, ".lock"]


def test_an_archive_that_ends_too_soon_leaves_no_half_a_data_set(
    served, nowhere, tmp_path
):
    url, folder = served
    held = write_archive(folder / "whole.tar.gz", small_cifar10())
    cut = held[: len(held) * 2 // 3]
    (folder / "cut-archive.tar.gz").write_bytes(cut)
    kind = cifar10_from(f"{url}/cut-archive.tar.gz", hashlib.md5(cut).hexdigest())
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises((OSError, ValueError), match=r"cifar-10-python\.tar\.gz"):
        kind(target, download=True)
    assert not (target / "cifar-10-batches-py").exists()


def test_mnist_is_downloaded_file_by_file(served, nowhere, tmp_path):
    url, folder = served
    write_mnist(folder / "mnist", zipped=True)
    sums = {
        p.name: hashlib.md5(p.read_bytes()).hexdigest()
        for p in (folder / "mnist").iterdir()
    }

    class Elsewhere(MNIST):
        hosts, md5 = (f"{url}/mnist/",), sums

    expected = MNIST(folder / "mnist").fingerprints
    target = tmp_path / "target"
    target.mkdir()
    missing = folder / "mnist" / "t10k-labels-idx1-ubyte.gz"
    missing.rename(folder / "aside")
    with pytest.raises(OSError, match="digits"):
        Elsewhere(target, download=True)
    found = {p.name for p in target.rglob("*") if p.is_file()} - {".lock"}
    assert found < set(sums)  # Whole files alone
    (folder / "aside").rename(missing)
    assert Elsewhere(target, download=True).fingerprints == expected
    damaged = target / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(ValueError, match="gzip"):
        Elsewhere(target)
    assert (
        Elsewhere(target, download=True).fingerprints == expected
    )  # that one file is replaced
    shutil.rmtree(folder / "mnist")
    assert MNIST(target).fingerprints == expected


# ---------------------------------------------------------------- where the data is looked for


def test_data_dir_goes_before_the_variable_and_that_before_the_cache(
    nowhere, monkeypatch, tmp_path
):
    x_train, y_train, x_test, y_test = small_cifar10()
    for n, place in (
        (30, nowhere),
        (40, tmp_path / "variable"),
        (50, tmp_path / "argument"),
    ):
        write_npz(place / "cifar10.npz", x_train[:n], y_train[:n], x_test, y_test)
    assert len(CIFAR10().y_train) == 30
    monkeypatch.setenv("ERA_S10_DATA", str(tmp_path / "variable"))
    assert len(CIFAR10().y_train) == 40
    assert len(CIFAR10(tmp_path / "argument").y_train) == 50
    assert len(CIFAR10(str(tmp_path / "argument")).y_train) == 50


@pytest.mark.parametrize("kind", [CIFAR10, MNIST])
def test_data_that_is_nowhere_is_said_to_be_so_and_nothing_is_made(
    nowhere, monkeypatch, tmp_path, kind
):
    empty = tmp_path / "empty"
    empty.mkdir()
    before = files(tmp_path)
    for data_dir, variable, named in (
        (None, None, nowhere),
        (empty, None, empty),
        (None, str(empty), empty),
        (tmp_path / "missing", str(empty), tmp_path / "missing"),
        (None, str(tmp_path / "missing"), tmp_path / "missing"),
    ):
        if variable:
            monkeypatch.setenv("ERA_S10_DATA", variable)
        with pytest.raises(FileNotFoundError) as raised:
            kind(data_dir)
        assert str(named) in str(raised.value)
        assert "\n" not in str(raised.value)
        if named != tmp_path / "missing":
            assert "Digits" in str(raised.value)
            assert "download=True" in str(raised.value)
        assert files(tmp_path) == before


def test_the_digits_look_nowhere(nowhere, monkeypatch, tmp_path):
    monkeypatch.setenv("ERA_S10_DATA", str(tmp_path / "missing"))
    assert len(Digits().y_train) == 1437
    assert files(tmp_path) == []
