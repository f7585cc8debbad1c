"""Data sets on disk: file formats, downloads, and the folders that are searched."""

import gzip
import hashlib
import shutil
import socket
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import platformdirs
import pytest
from pictures import (
    DATA,
    FASHION_MNIST,
    files,
    needs_cifar10,
    needs_fashion_mnist,
    needs_mnist,
    needs_tree,
    python2_pickle,
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
from era_s10.datasets.more import (
    CIFAR100,
    CIFAR100_NAMES,
    DATASETS,
    SVHN,
    FashionMNIST,
    read_cifar100,
    read_svhn,
)
from era_s10.downloads import Download
from era_s10.options import Options, make_dataset, make_experiment
from era_s10.sources import image_digests, read_mnist

CIFAR10_FINGERPRINTS = {
    "train": "46d2e037760aee523352b949009434e0",
    "test": "375c6c5eae463b3985995e70dc323f55",
}
MNIST_FINGERPRINTS = {
    "train": "64e90d8b058c0453ef83e625b4fcd869",
    "test": "6ba1953e3aa0097223e5131a7336c04f",
}
FASHION_MNIST_FINGERPRINTS = {
    "train": "8ccbc381200ec799d691ed3a6ccd91c0",
    "test": "c3d0a283c9249505c619e00af9757e32",
}
DIGITS_FINGERPRINTS = {
    "train": "3bb516c8ca24503e62a3120111bcfa53",
    "test": "4492198d805d66e897502f0c2079876f",
}
pytestmark = pytest.mark.usefixtures("any_images")


@pytest.fixture
def empty_cache(
    monkeypatch, tmp_path
) -> Path:  # the cache folder, which does not exist
    "Use a temporary folder as the user's cache, and unset ERA_S10_DATA."
    monkeypatch.delenv("ERA_S10_DATA", raising=False)
    cache = tmp_path / "cache" / "era_s10"
    monkeypatch.setattr(
        platformdirs, "user_cache_dir", lambda *args, **options: str(cache)
    )
    return cache


def labeled_images(
    dataset: MyDataSet,
) -> list[list[bytes]]:  # training and test images, each sorted
    "Return the label and the pixels of each image as bytes."
    parts = (dataset.x_train, dataset.y_train), (dataset.x_test, dataset.y_test)
    return [
        sorted(
            bytes([label]) + image.tobytes() for image, label in zip(*p, strict=True)
        )
        for p in parts
    ]


# ---------------------------------------------------------------- CIFAR-10 in three file formats


def test_file_formats_give_the_same_images(tmp_path):
    arrays = small_cifar10()
    write_batches(tmp_path / "a", *arrays)
    write_npz(tmp_path / "b" / "cifar10.npz", *arrays)
    write_tree(tmp_path / "c" / "cifar10", *arrays)
    x_train, y_train, x_test, y_test = arrays
    paths = ("a", "a/cifar-10-batches-py", "b", "b/cifar10.npz", "c", "c/cifar10")
    found = [CIFAR10(tmp_path / path, batch_size=16) for path in paths]
    for dataset in found:
        assert dataset.fingerprints == found[0].fingerprints
        assert labeled_images(dataset) == labeled_images(found[0])
        assert dataset.x_train.dtype == np.uint8
        assert dataset.y_train.dtype == np.int64
        assert dataset.classes == CIFAR10.names
    for dataset in found[:4]:  # the batches and the .npz keep the order
        assert np.array_equal(dataset.x_train, x_train)
        assert np.array_equal(dataset.y_train, y_train)
        assert np.array_equal(dataset.x_test, x_test)
        assert np.array_equal(dataset.y_test, y_test)


def test_fingerprint_depends_on_images_labels_and_split(tmp_path):
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


def test_official_batches_take_precedence(tmp_path):
    x_train, y_train, x_test, y_test = small_cifar10()
    write_batches(tmp_path, x_train, y_train, x_test, y_test)
    write_npz(tmp_path / "cifar10.npz", x_test, y_test, x_train, y_train)
    assert len(CIFAR10(tmp_path).y_train) == 60


def test_any_image_folder_or_npz_is_a_data_set(tmp_path):
    arrays = small_cifar10()
    tree = MyDataSet(write_tree(tmp_path / "tree", *arrays))
    npz = MyDataSet(write_npz(tmp_path / "any.npz", *arrays))
    assert tree.fingerprints == npz.fingerprints
    assert tree.classes == tuple(sorted(CIFAR10.names))
    assert npz.classes == tuple("0123456789")


@needs_cifar10
def test_fingerprints_and_labels_of_cifar10():
    dataset = CIFAR10(DATA / "cifar10.npz")
    assert dataset.fingerprints == CIFAR10_FINGERPRINTS
    assert np.bincount(dataset.y_train).tolist() == [5000] * 10
    assert np.bincount(dataset.y_test).tolist() == [1000] * 10


@needs_tree
def test_fingerprints_of_cifar10_as_an_image_folder():
    assert CIFAR10(DATA / "cifar10").fingerprints == CIFAR10_FINGERPRINTS


# ---------------------------------------------------------------- MNIST and Digits


def write_mnist(folder: Path, zipped: bool = False, invert: bool = False) -> Path:
    "Write MNIST's four files in IDX format, with 40 + 20 digits of 28x28 pixels."
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = 16 - images if invert else images  # other images with the same labels
    images = np.pad(
        (images[:60] * 15).astype(np.uint8).reshape(-1, 8, 8).repeat(3, 1).repeat(3, 2),
        2,
    )
    images = images[2:-2]
    folder.mkdir(parents=True, exist_ok=True)
    for part, chosen in (("train", slice(40)), ("t10k", slice(40, 60))):
        for kind, array in (
            ("images-idx3", images[chosen]),
            ("labels-idx1", labels[chosen]),
        ):
            header = bytes([0, 0, 8, array.ndim])
            header += np.array(array.shape, ">u4").tobytes()
            name = f"{part}-{kind}-ubyte"
            raw = header + array.astype(np.uint8).tobytes()
            if zipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(raw))
            else:
                (folder / name).write_bytes(raw)
    return folder


def test_mnist_plain_gzipped_and_in_the_torchvision_layout(tmp_path):
    write_mnist(tmp_path / "plain")
    write_mnist(tmp_path / "zipped", zipped=True)
    write_mnist(tmp_path / "torchvision" / "MNIST" / "raw")
    found = [MNIST(tmp_path / name) for name in ("plain", "zipped", "torchvision")]
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
def test_fingerprints_of_mnist():
    assert MNIST(DATA).fingerprints == MNIST_FINGERPRINTS


def test_the_split_of_digits_is_fixed_and_stratified():
    dataset = Digits(seed=5)
    assert dataset.fingerprints == DIGITS_FINGERPRINTS
    assert dataset.x_train.shape == (1437, 32, 32, 3)
    assert dataset.x_test.shape == (360, 32, 32, 3)
    shares = np.bincount(dataset.y_test) / np.bincount(
        np.append(dataset.y_train, dataset.y_test)
    )
    assert np.abs(shares - 360 / 1797).max() < 0.005


# ---------------------------------------------------------------- downloads


@pytest.fixture
def server(
    monkeypatch, tmp_path
) -> Iterator[tuple[str, Path]]:  # URL, and the folder that it serves
    "Serve a folder over HTTP from this machine."
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        "Serve files without logging, and end cut.tar.gz in the middle."

        def log_message(self, *args) -> None:
            pass

        def do_GET(self) -> None:
            if not self.path.endswith("/cut.tar.gz"):
                super().do_GET()
                return
            content = (folder / "cifar-10-python.tar.gz").read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])

    handler = partial(Handler, directory=str(folder))
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(
        target=httpd.serve_forever, kwargs={"poll_interval": 0.05}
    )
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}", folder
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def cifar10_from(url: str, md5: str) -> type[CIFAR10]:
    "Return a CIFAR10 class that downloads from a different URL."
    name = "cifar-10-python.tar.gz"

    class LocalCIFAR10(CIFAR10):
        archives = (Download((url,), md5=md5, name=name, megabytes=1),)

    return LocalCIFAR10


def check_message(error: BaseException, folder: Path) -> None:
    "Check that the message is one line with the folder for the file and the alternative."
    text = str(error)
    assert "\n" not in text
    assert str(folder) in text
    assert "by hand" in text
    assert "cifar-10-python.tar.gz" in text
    assert "digits" in text


def test_a_download_is_verified_and_loaded(server, empty_cache, tmp_path):
    url, folder = server
    content = write_archive(folder / "cifar-10-python.tar.gz", small_cifar10())
    md5 = hashlib.md5(content).hexdigest()
    kind = cifar10_from(f"{url}/cifar-10-python.tar.gz", md5)
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
    (folder / "cifar-10-python.tar.gz").unlink()  # not downloaded a second time
    assert kind(target, download=True).fingerprints == expected.fingerprints
    assert CIFAR10(target).fingerprints == expected.fingerprints


def test_downloads_go_to_the_cache_by_default(server, empty_cache):
    url, folder = server
    content = write_archive(folder / "cifar-10-python.tar.gz", small_cifar10())
    md5 = hashlib.md5(content).hexdigest()
    kind = cifar10_from(f"{url}/cifar-10-python.tar.gz", md5)
    assert len(kind(download=True).y_train) == 60
    assert (empty_cache / "cifar-10-batches-py" / "batches.meta").exists()


WITH_RETRIES = [
    pytest.param(fault, marks=pytest.mark.slow)
    for fault in ("closed port", "truncated")
]


@pytest.mark.parametrize("fault", ["wrong md5", "404", *WITH_RETRIES])
def test_a_failed_download_raises_and_leaves_no_data(
    server, empty_cache, tmp_path, fault
):
    url, folder = server
    content = write_archive(folder / "cifar-10-python.tar.gz", small_cifar10())
    md5, path = hashlib.md5(content).hexdigest(), "cifar-10-python.tar.gz"
    if fault == "wrong md5":
        md5 = "0" * 32
    elif fault == "404":
        path = "missing.tar.gz"
    elif fault == "truncated":
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
    partial_file = [".cifar-10-python.tar.gz.part"] * (fault == "truncated")
    assert files(target) == [*partial_file, ".lock"]
    with pytest.raises(OSError) as raised:
        kind(download=True)
    check_message(raised.value, empty_cache)
    assert files(empty_cache) == [*partial_file, ".lock"]


@pytest.mark.parametrize(("status", "requests"), [(503, 2), (404, 1)])
def test_only_a_missing_file_ends_the_attempts_at_an_address(
    status, requests, server, tmp_path, monkeypatch
):
    url, _ = server
    seen = []

    def answer(handler: SimpleHTTPRequestHandler) -> None:
        seen.append(handler.path)
        handler.send_error(status)

    monkeypatch.setattr(SimpleHTTPRequestHandler, "do_GET", answer)
    file = Download((f"{url}/404.bin",), md5="0" * 32, name="404.bin", megabytes=1)
    with pytest.raises(OSError, match="could not be downloaded"):
        file.fetch(tmp_path, attempts=2)
    assert seen == ["/404.bin"] * requests


def test_a_truncated_archive_leaves_no_partial_data_set(server, empty_cache, tmp_path):
    url, folder = server
    content = write_archive(folder / "complete.tar.gz", small_cifar10())
    part = content[: len(content) * 2 // 3]
    (folder / "truncated.tar.gz").write_bytes(part)
    kind = cifar10_from(f"{url}/truncated.tar.gz", hashlib.md5(part).hexdigest())
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises((OSError, ValueError), match=r"cifar-10-python\.tar\.gz"):
        kind(target, download=True)
    assert not (target / "cifar-10-batches-py").exists()


def test_mnist_is_downloaded_file_by_file(server, empty_cache, tmp_path):
    url, folder = server
    write_mnist(folder / "mnist", zipped=True)
    sums = {
        p.name: hashlib.md5(p.read_bytes()).hexdigest()
        for p in (folder / "mnist").iterdir()
    }

    class LocalMNIST(MNIST):
        hosts, md5 = (f"{url}/mnist/",), sums

    expected = MNIST(folder / "mnist").fingerprints
    target = tmp_path / "target"
    target.mkdir()
    missing = folder / "mnist" / "t10k-labels-idx1-ubyte.gz"
    missing.rename(folder / "moved")
    with pytest.raises(OSError, match="digits"):
        LocalMNIST(target, download=True)
    found = {p.name for p in target.rglob("*") if p.is_file()} - {".lock"}
    assert found < set(sums)  # complete files only
    (folder / "moved").rename(missing)
    assert LocalMNIST(target, download=True).fingerprints == expected
    damaged = target / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(ValueError, match="gzip"):
        LocalMNIST(target)
    # the damaged file is replaced
    assert LocalMNIST(target, download=True).fingerprints == expected
    shutil.rmtree(folder / "mnist")
    assert MNIST(target).fingerprints == expected


# ---------------------------------------------------------------- MNIST and Fashion-MNIST have files of the same names

KINDS = (MNIST, FashionMNIST)


@pytest.fixture
def published(monkeypatch, tmp_path, server) -> dict[type, Path]:
    "Publish generated images of both datasets on a server; return folders of the files."
    url, folder = server
    digests, folders = {}, {}
    for kind in KINDS:
        monkeypatch.setattr(kind, "checksums", None)
        place = write_mnist(folder / kind.key, zipped=True, invert=kind is FashionMNIST)
        sums = {
            p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in place.iterdir()
        }
        monkeypatch.setattr(kind, "md5", sums)
        monkeypatch.setattr(kind, "hosts", (f"{url}/{kind.key}/",))
        found = kind(place)
        for part in ("train", "test"):
            x, y = getattr(found, f"x_{part}"), getattr(found, f"y_{part}")
            digests[f"{kind.key}_{part}"] = np.sort(image_digests(x, y))
        monkeypatch.setattr(kind, "checksums", found.fingerprints)
        folders[kind] = place
    monkeypatch.setattr("era_s10.sources._known_digests", digests.__getitem__)
    return folders


def place_files(source: Path, target: Path, zipped: bool) -> dict[Path, bytes]:
    "Copy the four files, gzipped or not; return their content."
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if zipped:
            shutil.copy(path, target)
        else:
            content = gzip.decompress(path.read_bytes())
            (target / path.name.removesuffix(".gz")).write_bytes(content)
    return {p: p.read_bytes() for p in target.iterdir() if p.is_file()}


def unchanged(before: dict[Path, bytes]) -> bool:
    "Return whether all files are as they were."
    return all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("zipped", [True, False], ids=["gzipped", "plain"])
@pytest.mark.parametrize(("kind", "other"), [KINDS, KINDS[::-1]])
def test_files_of_the_other_dataset_are_neither_read_nor_changed(
    kind, other, zipped, published, tmp_path
):
    data = tmp_path / "data"
    before = place_files(published[other], data, zipped)
    expected = other(data).fingerprints
    with pytest.raises(FileNotFoundError) as raised:
        kind(data)
    text = str(raised.value)
    assert text.startswith(f"{kind.title} is not in {data}; pass download=True")
    assert f"into {kind.folder}/raw there, where now are those of {other.title}" in text
    assert files(data) == sorted(path.name for path in before)
    found = kind(data, download=True)
    assert found.fingerprints == kind.checksums != expected
    assert {p.name for p in (data / kind.folder / "raw").iterdir()} >= set(kind.md5)
    assert unchanged(before)
    assert other(data).fingerprints == expected
    assert kind(data).fingerprints == kind.checksums
    assert other(data, download=True).fingerprints == expected
    assert unchanged(before)


@pytest.mark.parametrize(("kind", "other"), [KINDS, KINDS[::-1]])
@pytest.mark.parametrize("place", ["raw", "key"])
def test_both_datasets_in_one_folder(kind, other, place, published, tmp_path):
    data = tmp_path / "data"
    place_files(published[other], data, zipped=False)
    where = data / kind.folder / "raw" if place == "raw" else data / kind.key
    place_files(published[kind], where, zipped=True)
    for one in KINDS:
        assert one(data).fingerprints == one.checksums
    assert kind(where).fingerprints == kind.checksums
    assert kind(data / kind.folder / "raw" if place == "raw" else where)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_in_the_data_folder_are_left_as_they_are(
    kind, published, tmp_path
):
    data = tmp_path / "data"
    place_files(published[kind], data, zipped=True)
    path = data / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    before = {p: p.read_bytes() for p in data.iterdir()}
    with pytest.raises(ValueError, match="gzip"):
        kind(data)
    assert kind(data, download=True).fingerprints == kind.checksums
    assert unchanged(before)
    assert kind(data).fingerprints == kind.checksums


def test_a_complete_set_of_files_precedes_an_incomplete_one(published, tmp_path):
    place_files(published[MNIST], tmp_path / "data", zipped=False)
    raw = tmp_path / "data" / "MNIST" / "raw"
    place_files(published[MNIST], raw, zipped=True)
    (raw / "t10k-labels-idx1-ubyte.gz").unlink()  # an interrupted download
    assert MNIST(tmp_path / "data").fingerprints == MNIST.checksums


def test_a_download_into_the_folder_of_torchvision_itself(published, tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    found = FashionMNIST(raw, download=True)
    assert found.fingerprints == FashionMNIST.checksums
    assert {p.name for p in raw.iterdir()} == {".lock", *FashionMNIST.md5}


def test_fashion_mnist_has_its_own_names_and_npz(published, tmp_path):
    found = FashionMNIST(published[FashionMNIST])
    assert found.classes[0] == "T-shirt/top"
    assert (found.mean, found.std) == ((0.2860,), (0.3530,))
    names = ("x_train", "y_train", "x_test", "y_test")
    np.savez(tmp_path / "fashion-mnist.npz", **{n: getattr(found, n) for n in names})
    for path in (tmp_path, tmp_path / "fashion-mnist.npz"):
        again = FashionMNIST(path)
        assert again.fingerprints == FashionMNIST.checksums
        assert again.classes == found.classes


@needs_fashion_mnist
def test_fingerprints_and_statistics_of_fashion_mnist():
    dataset = FashionMNIST(FASHION_MNIST)
    assert dataset.fingerprints == FASHION_MNIST_FINGERPRINTS
    assert np.bincount(dataset.y_train).tolist() == [6000] * 10
    assert np.bincount(dataset.y_test).tolist() == [1000] * 10
    inner = dataset.x_train[:, 2:-2, 2:-2] / 255
    assert round(float(inner.mean()), 4) == FashionMNIST.mean[0]
    assert round(float(inner.std()), 4) == FashionMNIST.std[0]


@needs_fashion_mnist
def test_the_real_files_of_fashion_mnist_are_not_taken_for_mnist(tmp_path):
    source = FASHION_MNIST
    for place in (source / "FashionMNIST" / "raw", source / "fashion-mnist"):
        source = place if place.is_dir() else source
    for path in source.glob("*ubyte*"):
        (tmp_path / path.name).symlink_to(path.resolve())
    assert FashionMNIST(tmp_path).fingerprints == FASHION_MNIST_FINGERPRINTS
    with pytest.raises(FileNotFoundError, match="where now are those of Fashion-MNIST"):
        MNIST(tmp_path)


# ---------------------------------------------------------------- CIFAR-100 and SVHN, in generated files


def small_photos(classes: int) -> tuple[np.ndarray, np.ndarray]:
    "Return 40 photographs of 32x32 pixels with labels."
    x = small_cifar10()[0][:40]
    return x, np.arange(40) * 7 % classes


def write_cifar100(folder: Path, **changes: bytes) -> Path:  # cifar-100-python
    "Write the official format of CIFAR-100, with 30 + 10 photographs."
    place = folder / "cifar-100-python"
    place.mkdir(parents=True)
    x, y = small_photos(100)
    for part, chosen in (("train", slice(30)), ("test", slice(30, 40))):
        rows = x[chosen].transpose(0, 3, 1, 2).reshape(-1, 3072).copy()
        content = {
            b"filenames": [b"image_%d.png" % i for i in range(len(rows))],
            b"batch_label": part.encode(),
            b"fine_labels": y[chosen].tolist(),
            b"coarse_labels": (y[chosen] % 20).tolist(),
            b"data": rows,
        }
        (place / part).write_bytes(python2_pickle(content))
    names = [name.encode() for name in CIFAR100_NAMES]
    meta = {b"fine_label_names": names, b"coarse_label_names": [b"trees"] * 20}
    (place / "meta").write_bytes(python2_pickle(meta))
    for name, content in changes.items():
        (place / name).write_bytes(content)
    return place


def write_svhn(folder: Path) -> Path:  # the same folder
    "Write the two files of SVHN, with 30 + 10 photographs."
    from scipy.io import savemat

    folder.mkdir(parents=True, exist_ok=True)
    x, y = small_photos(10)
    y = np.where(y == 0, 10, y).astype(np.uint8)[:, None]
    for part, chosen in (("train", slice(30)), ("test", slice(30, 40))):
        content = {"X": np.moveaxis(x[chosen], 0, -1), "y": y[chosen]}
        savemat(folder / f"{part}_32x32.mat", content, do_compression=True)
    return folder


def sums_of(kind: type, place: Path) -> dict[str, str]:
    "Return the MD5 sum of each file."
    found = {name: (place / name).read_bytes() for name in kind.files}
    return {name: hashlib.md5(content).hexdigest() for name, content in found.items()}


def test_cifar100_has_the_fine_labels(tmp_path, monkeypatch):
    place = write_cifar100(tmp_path)
    monkeypatch.setattr(CIFAR100, "files", sums_of(CIFAR100, place))
    x, y = small_photos(100)
    for path in (tmp_path, place):
        found = CIFAR100(path, batch_size=10)
        assert np.array_equal(found.x_train, x[:30])
        assert np.array_equal(found.y_train, y[:30])
        assert np.array_equal(found.x_test, x[30:])
        assert np.array_equal(found.y_test, y[30:])
        assert len(found.classes) == 100
        assert found.classes[23] == "cloud"
    images, _ = next(iter(found.train_loader))
    assert images.shape == (10, 3, 32, 32)


def test_svhn_has_the_label_0_for_the_digit_0(tmp_path, monkeypatch):
    x, y = small_photos(10)
    for place in (tmp_path, tmp_path / "svhn", tmp_path / "SVHN"):
        write_svhn(place)
        monkeypatch.setattr(SVHN, "files", sums_of(SVHN, place))
        found = SVHN(tmp_path, batch_size=10)
        assert np.array_equal(found.x_train, x[:30])
        assert np.array_equal(found.y_train, y[:30])
        assert np.array_equal(found.x_test, x[30:])
        assert np.array_equal(found.y_test, y[30:])
        assert found.classes == tuple("0123456789")
        for name in SVHN.files:
            (place / name).unlink()


@pytest.mark.parametrize(
    ("kind", "name"), [(CIFAR100, "train"), (SVHN, "test_32x32.mat")]
)
def test_files_with_other_md5_sums_are_refused(kind, name, tmp_path):
    write_cifar100(tmp_path)
    write_svhn(tmp_path)
    before = files(tmp_path)
    with pytest.raises(ValueError, match="not the published file, or damaged"):
        kind(tmp_path)
    next(tmp_path.rglob(name)).unlink()
    with pytest.raises((FileNotFoundError, ValueError)):
        kind(tmp_path)
    assert len(files(tmp_path)) == len(before) - 1


PICKLES = {
    "cut": b"\x80\x02}q\x01(U",
    "empty": b"",
    "code": b"cos\nsystem\n(S'echo x'\ntR.",
    "no labels": python2_pickle({b"data": np.zeros((2, 3072), np.uint8)}),
    "short rows": python2_pickle(
        {b"data": np.zeros((2, 30), np.uint8), b"fine_labels": [0, 1]}
    ),
    "label 100": python2_pickle(
        {b"data": np.zeros((1, 3072), np.uint8), b"fine_labels": [100]}
    ),
}


@pytest.mark.parametrize("case", PICKLES)
def test_damaged_pickles_of_cifar100_are_named(case, tmp_path):
    place = write_cifar100(tmp_path, train=PICKLES[case])
    with pytest.raises(ValueError) as raised:
        read_cifar100(place)
    assert str(place) in str(raised.value)
    assert "CIFAR-10 " not in str(raised.value)


def test_other_class_names_are_not_cifar100(tmp_path, monkeypatch):
    names = [b"class %d" % i for i in range(100)]
    meta = python2_pickle({b"fine_label_names": names})
    write_cifar100(tmp_path, meta=meta)
    monkeypatch.setattr(CIFAR100, "files", dict.fromkeys(CIFAR100.files))
    with pytest.raises(ValueError, match="not the class names of CIFAR-100"):
        CIFAR100(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>", b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM", None],
    ids=["empty", "web page", "MATLAB 7.3", "cut"],
)
def test_damaged_files_of_svhn_are_named(content, tmp_path):
    path = write_svhn(tmp_path) / "train_32x32.mat"
    path.write_bytes(path.read_bytes()[:5000] if content is None else content)
    with pytest.raises(
        ValueError, match=r"train_32x32\.mat: not a complete file of SVHN"
    ):
        read_svhn(tmp_path)


def test_cifar100_is_downloaded_and_repaired(
    server, empty_cache, tmp_path, monkeypatch
):
    url, folder = server
    place = write_cifar100(tmp_path / "made")
    with tarfile.open(folder / "cifar-100-python.tar.gz", "w:gz") as archive:
        archive.add(place, arcname=place.name)
    content = (folder / "cifar-100-python.tar.gz").read_bytes()
    monkeypatch.setattr(CIFAR100, "files", sums_of(CIFAR100, place))
    monkeypatch.setattr(CIFAR100, "address", f"{url}/cifar-100-python.tar.gz")
    with pytest.raises(OSError, match="cifar-100-python"):  # the published checksum
        CIFAR100(download=True)
    assert not (empty_cache / "cifar-100-python").exists()
    monkeypatch.setattr(CIFAR100, "archive_md5", hashlib.md5(content).hexdigest())
    assert len(CIFAR100(download=True).y_train) == 30
    (empty_cache / "cifar-100-python" / "train").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="pass download=True"):
        CIFAR100()
    (folder / "cifar-100-python.tar.gz").unlink()  # the archive is still in the cache
    for data_dir in (None, empty_cache / "cifar-100-python"):
        assert len(CIFAR100(data_dir, download=True).y_train) == 30
    kept = empty_cache / "cifar-100-python.damaged" / "train"
    assert kept.read_bytes() == b"damaged"


def test_svhn_is_downloaded_file_by_file(server, empty_cache, tmp_path, monkeypatch):
    url, folder = server
    write_svhn(folder / "svhn")
    monkeypatch.setattr(SVHN, "files", sums_of(SVHN, folder / "svhn"))
    monkeypatch.setattr(SVHN, "address", f"{url}/svhn/")
    data = tmp_path / "data"
    (data / "SVHN").mkdir(parents=True)
    shutil.copy(folder / "svhn" / "test_32x32.mat", data / "SVHN")
    (data / "SVHN" / "train_32x32.mat").write_bytes(b"damaged")
    expected = SVHN(folder / "svhn").fingerprints
    assert SVHN(data, download=True).fingerprints == expected
    names = {p.name for p in (data / "SVHN").iterdir()}
    assert names == {*SVHN.files, "train_32x32.mat.damaged"}
    assert SVHN(download=True).fingerprints == expected
    shutil.rmtree(folder / "svhn")
    assert SVHN().fingerprints == SVHN(data).fingerprints == expected


# ---------------------------------------------------------------- datasets by name


def test_every_name_is_a_dataset_with_defaults(empty_cache, monkeypatch, tmp_path):
    for name, known in DATASETS.items():
        made = []
        kind = type(
            known.kind.__name__,
            (Digits,),
            {
                "load": lambda self, m=made: (
                    m.append(self.download),
                    Digits.load(self),
                )[1]
            },
        )
        monkeypatch.setitem(DATASETS, name, replace(known, kind=kind))
        experiment = make_experiment(Options(dataset=name, limit=100))
        assert type(experiment.dataset).__name__ == known.kind.__name__
        assert experiment.model.arguments["width"] == known.width
        assert experiment.dataset.batch_size == known.batch_size
        assert experiment.config.epochs == known.epochs
        make_experiment(Options(dataset=name, limit=100, offline=True))
        assert made == [known.downloadable, False]


def test_the_help_and_the_error_list_every_name(capsys):
    from era_s10.cli import evaluate, lr_find, study, train

    for command in (train, lr_find, study, evaluate):
        with pytest.raises(SystemExit):
            command.main(["--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert f"(names: {', '.join(DATASETS)})" in text
    with pytest.raises(ValueError, match="unknown dataset 'imagenet'") as raised:
        make_dataset("imagenet")
    assert ", ".join(DATASETS) in str(raised.value)


# ---------------------------------------------------------------- where data sets are searched for


def test_data_dir_precedes_the_variable_which_precedes_the_cache(
    empty_cache, monkeypatch, tmp_path
):
    x_train, y_train, x_test, y_test = small_cifar10()
    for n, where in (
        (30, empty_cache),
        (40, tmp_path / "variable"),
        (50, tmp_path / "argument"),
    ):
        write_npz(where / "cifar10.npz", x_train[:n], y_train[:n], x_test, y_test)
    assert len(CIFAR10().y_train) == 30
    monkeypatch.setenv("ERA_S10_DATA", str(tmp_path / "variable"))
    assert len(CIFAR10().y_train) == 40
    assert len(CIFAR10(tmp_path / "argument").y_train) == 50
    assert len(CIFAR10(str(tmp_path / "argument")).y_train) == 50


@pytest.mark.parametrize("kind", [CIFAR10, MNIST, FashionMNIST, CIFAR100, SVHN])
def test_missing_data_raises_and_creates_no_files(
    empty_cache, monkeypatch, tmp_path, kind
):
    empty = tmp_path / "empty"
    empty.mkdir()
    before = files(tmp_path)
    for data_dir, variable, searched in (
        (None, None, empty_cache),
        (empty, None, empty),
        (None, str(empty), empty),
        (tmp_path / "missing", str(empty), tmp_path / "missing"),
        (None, str(tmp_path / "missing"), tmp_path / "missing"),
    ):
        if variable:
            monkeypatch.setenv("ERA_S10_DATA", variable)
        with pytest.raises(FileNotFoundError) as raised:
            kind(data_dir)
        assert str(searched) in str(raised.value)
        assert "\n" not in str(raised.value)
        if searched != tmp_path / "missing":
            assert "Digits" in str(raised.value)
            assert "download=True" in str(raised.value)
        assert files(tmp_path) == before


def test_digits_need_no_folder(empty_cache, monkeypatch, tmp_path):
    monkeypatch.setenv("ERA_S10_DATA", str(tmp_path / "missing"))
    assert len(Digits().y_train) == 1437
    assert files(tmp_path) == []
