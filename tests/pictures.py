"""Real images for the tests, and functions that write them in the supported file formats."""

import hashlib
import io
import os
import pickle
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from era_s10.datasets.cifar10 import CIFAR10, cifar10_augmentation
from era_s10.datasets.digits import Digits
from era_s10.datasets.generic import MyDataSet
from era_s10.sources import Source

DATA = Path(os.environ.get("ERA_S10_DATA") or "missing-folder").expanduser()
needs_cifar10 = pytest.mark.skipif(
    not (DATA / "cifar10.npz").exists(),
    reason="ERA_S10_DATA is not a folder with cifar10.npz",
)
needs_tree = pytest.mark.skipif(
    not (DATA / "cifar10" / "train").is_dir(),
    reason="ERA_S10_DATA is not a folder with cifar10/train",
)
needs_mnist = pytest.mark.skipif(
    not (DATA / "MNIST" / "raw").is_dir(),
    reason="ERA_S10_DATA is not a folder with MNIST/raw",
)
DEBIAN = Path("/usr/share/datasets")  # where the package dataset-fashion-mnist puts it
FASHION_MNIST = DATA if (DATA / "FashionMNIST" / "raw").is_dir() else DEBIAN
needs_fashion_mnist = pytest.mark.skipif(
    FASHION_MNIST == DEBIAN and not (DEBIAN / "fashion-mnist").is_dir(),
    reason="ERA_S10_DATA is not a folder with FashionMNIST/raw",
)


def photographs() -> np.ndarray:  # (520, 32, 32, 3) uint8
    "Return scikit-learn's two photographs, cut into tiles."
    from sklearn.datasets import load_sample_images

    tiles = []
    for image in load_sample_images().images:
        cut = image[: 13 * 32, : 20 * 32].reshape(13, 32, 20, 32, 3)
        tiles.append(cut.swapaxes(1, 2).reshape(-1, 32, 32, 3))
    return np.concatenate(tiles)


class Photographs(MyDataSet):
    "420 + 100 tiles of photographs, with CIFAR-10's normalization and augmentation."

    mean, std = CIFAR10.mean, CIFAR10.std

    def load(self) -> Source:
        "Assign the tiles to ten classes in turn."
        x, y = photographs(), np.arange(520) % 10
        return Source(x[:420], y[:420], x[420:], y[420:], classes=CIFAR10.names)

    def default_augmentation(self) -> list:
        "Return CIFAR-10's augmentation."
        return cifar10_augmentation()


def make_data(
    kind: str,  # "digits", "photographs" or "cifar10"
    **options,  # keyword arguments of the data set
) -> MyDataSet:
    "Make a data set of real images with CIFAR-10's augmentation."
    if kind == "photographs":
        return Photographs(**options)
    if kind == "cifar10":
        return CIFAR10(DATA / "cifar10.npz", **{"limit": 400, **options})
    return Digits(**{"limit": 400, "augmentation": cifar10_augmentation(), **options})


def digest(
    tensors: Iterable[Tensor],  # tensors on any device
) -> str:  # 32 hexadecimal digits
    "Return a digest of the bytes of several tensors, in order."
    result = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        result.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return result.hexdigest()


def files(
    folder: Path,  # folder to search
) -> list[str]:  # sorted relative paths
    "List all files and folders below a folder."
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def save_image(
    path: Path,  # image file; its folder is created
    pixels: np.ndarray | Image.Image,  # image, or its pixels (H, W) or (H, W, C)
    **options,  # of Pillow's `save`
) -> Path:  # the same path
    "Write an image file."
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def sort_by_class(
    folder: Path,  # folder with a folder for each class
    images: Iterable[tuple[Path, str]],  # image files with their classes
) -> Path:  # the same folder
    "Copy image files into folders of their classes."
    for path, name in images:
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / path.name).write_bytes(path.read_bytes())
    return folder


STORED_AS = {  # EXIF orientation: how an upright image is stored with it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


# ---------------------------------------------------------------- CIFAR-10 in three file formats


class Python2Pickler(pickle._Pickler):
    "Pickle byte strings in the format of Python 2, which wrote the official batches."

    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, data: bytes) -> None:
        self.write(pickle.BINSTRING + len(data).to_bytes(4, "little") + data)
        self.memoize(data)

    dispatch[bytes] = save_bytes


def python2_pickle(content: dict) -> bytes:
    "Pickle in the format of Python 2, with the module names of old NumPy versions."
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def small_cifar10() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    "Return 60 + 20 photographs of 32x32 pixels, with labels, as x_train, y_train, x_test, y_test."
    x = photographs()[::5][:80]
    y = np.random.default_rng(0).permutation(80) % 10
    return x[:60], y[:60], x[60:], y[60:]


def write_batches(folder: Path, x_train, y_train, x_test, y_test) -> Path:
    "Write the official format of CIFAR-10: `cifar-10-batches-py/` with six batches."
    batch_folder = folder / "cifar-10-batches-py"
    batch_folder.mkdir(parents=True)
    names = [name.encode() for name in CIFAR10.names]
    meta = {b"num_cases_per_batch": 12, b"label_names": names, b"num_vis": 3072}
    (batch_folder / "batches.meta").write_bytes(python2_pickle(meta))
    parts = zip(np.split(x_train, 5), np.split(y_train, 5), strict=True)
    batches = {f"data_batch_{i}": part for i, part in enumerate(parts, 1)}
    for name, (x, y) in {**batches, "test_batch": (x_test, y_test)}.items():
        content = {
            b"batch_label": name.encode(),
            b"labels": y.tolist(),
            b"data": x.transpose(0, 3, 1, 2).reshape(len(x), 3072).copy(),
            b"filenames": [b"image_%d.png" % i for i in range(len(x))],
        }
        (batch_folder / name).write_bytes(python2_pickle(content))
    return batch_folder


def write_npz(path: Path, x_train, y_train, x_test, y_test) -> Path:
    "Write an `.npz` in the format of Keras: the labels are one column of uint8."
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = {
        "y_train": y_train.astype(np.uint8)[:, None],
        "y_test": y_test.astype(np.uint8)[:, None],
    }
    np.savez(path, x_train=x_train, x_test=x_test, **labels)
    return path


def write_tree(
    folder: Path, x_train, y_train, x_test, y_test, names=CIFAR10.names
) -> Path:  # the same folder
    "Write `train/<class>/*.png` and `test/<class>/*.png`."
    for part, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        for name in names:
            (folder / part / name).mkdir(parents=True)
        for i, (image, label) in enumerate(zip(x, y, strict=True)):
            save_image(folder / part / names[label] / f"{i}.png", image.squeeze())
    return folder


def write_archive(path: Path, arrays: tuple) -> bytes:  # content of the archive
    "Write CIFAR-10 as the official `.tar.gz` archive."
    batch_folder = write_batches(path.parent / "unpacked", *arrays)
    with tarfile.open(path, "w:gz") as archive:
        archive.add(batch_folder, arcname=batch_folder.name)
    return path.read_bytes()
