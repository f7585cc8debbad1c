"""Folders of images as people have them: layouts, strays, sizes, classes and the cache."""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from forks import default_signals
from pictures import (
    files,
    photographs,
    save_image,
    small_cifar10,
    write_npz,
    write_tree,
)
from PIL import Image
from project import ROOT, command, run_python, run_script

import era_s10.image_cache as image_cache
from era_s10.datasets.cifar10 import CIFAR10
from era_s10.datasets.digits import Digits
from era_s10.datasets.generic import MyDataSet
from era_s10.datasets.mnist import MNIST
from era_s10.folders import find_images, read_folders, split_classes
from era_s10.image_cache import cache_folder, fill_array, load_images
from era_s10.images import read_image
from era_s10.provenance import describe_dataset, order_digest
from era_s10.run_folder import read_config
from era_s10.samples import Split, stratified_choice
from era_s10.sources import Source

TILES = photographs()


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    "Keep the caches of a test in its own folder."
    place = tmp_path / "image cache"
    monkeypatch.setenv("ERA_S10_CACHE", str(place))
    return place


@pytest.fixture(autouse=True)
def _no_hang():
    "End a test that waits for a pipe."
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(100)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def write_images(
    folder: Path,
    counts: dict[str, int],  # number of images by relative folder
    size: tuple[int, int] = (32, 32),  # width and height
    suffix: str = "png",
) -> Path:  # the folder
    "Write different tiles of photographs."
    number = 0
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)  # also without images
        for i in range(count):
            image = Image.fromarray(TILES[number])
            if size != (32, 32):
                image = image.resize(size, Image.Resampling.NEAREST)
            save_image(folder / name / f"{i:03}.{suffix}", image)
            number += 1
    return folder


TWO = {"train/a": 3, "train/b": 3, "test/a": 2, "test/b": 2}


def caught(call: Callable) -> tuple[object, list[str]]:
    "Return the result of a call and its warnings."
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = call()
    return result, [str(one.message) for one in found]


# ---------------------------------------------------------------- sizes


def test_images_are_listed_in_order_without_strays_and_loops(tmp_path):
    for name in ("b/2.png", "b/1.png", "a.png", "c/d/e.png", "__MACOSX/._a.png"):
        save_image(tmp_path / name, TILES[0])
    (tmp_path / "Thumbs.db").write_bytes(b"")
    (tmp_path / "c" / "up").symlink_to(tmp_path)
    (tmp_path / "z").symlink_to(tmp_path / "b")
    listing = find_images(tmp_path)
    names = [path.relative_to(tmp_path).as_posix() for path in listing.images]
    assert names == ["a.png", "b/1.png", "b/2.png", "c/d/e.png", "z/1.png", "z/2.png"]
    assert listing.strays == {"Thumbs.db": 1, "__MACOSX": 1}
    loop = str(tmp_path / "c" / "up")
    assert listing.unusable == {loop: f"{loop} is a link to a folder that contains it"}


def test_images_of_the_wanted_size_keep_their_pixels(tmp_path, capsys):
    arrays = small_cifar10()
    tree = write_tree(tmp_path / "tree", *arrays)
    stored = read_folders(tree)  # as before there was a size
    paths = sorted((tree / "train").glob("*/*.png"))
    expected = np.stack([np.asarray(Image.open(path)) for path in paths])
    for options in ({}, {"cache": False}, {"size": None}, {"size": (32, 32)}):
        for _ in range(2):  # the second time from the cache
            dataset = MyDataSet(tree, **options)
            assert np.array_equal(dataset.x_train, expected)
            assert np.array_equal(dataset.x_train, stored.x_train)
            assert np.array_equal(dataset.y_test, stored.y_test)
            assert order_digest(dataset) == order_digest(MyDataSet(tree))
    assert "none was resized" in capsys.readouterr().out


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize(
    ("size", "shape"),
    [(32, (32, 32)), ((40, 48), (40, 48)), ("48x40", (48, 40)), ([64, 32], (64, 32))],
)
def test_a_folder_of_any_sizes_is_resized(tmp_path, size, shape, fit, capsys):
    write_images(tmp_path / "f", TWO)
    Image.fromarray(TILES[99]).resize((40, 30)).save(tmp_path / "f/train/a/x.png")
    dataset = MyDataSet(tmp_path / "f", size=size, fit=fit)
    assert dataset.x_train.shape == (7, *shape, 3)
    assert (dataset.size, dataset.fit) == (shape, fit)
    odd = read_image(tmp_path / "f/train/a/x.png", 3, shape, fit)
    assert np.array_equal(dataset.x_train[3], odd)
    said = capsys.readouterr().out
    assert "11 images of 2 sizes from 32x32 to 30x40" in said or "30x40" in said
    assert f"{shape[0]}x{shape[1]}" in said


def test_classes_may_have_the_names_of_stray_files(tmp_path):
    names = ("copying", "reading.md", "readme")
    dataset = MyDataSet(write_images(tmp_path / "f", dict.fromkeys(names, 5)))
    assert dataset.classes == names and len(dataset.x_train) == 12


def test_sizes_are_those_of_upright_images(tmp_path, capsys):
    for name in ("train/a", "train/b", "test/a", "test/b"):
        for i in range(2):
            exif = Image.Exif()
            exif[0x0112] = 6  # stored on its side
            picture = Image.fromarray(TILES[i]).resize((64, 48))
            save_image(tmp_path / "f" / name / f"{i}.jpg", picture, exif=exif)
    assert MyDataSet(tmp_path / "f", size=(64, 48)).x_train.shape == (4, 64, 48, 3)
    assert "all images have 64x48 pixels; none was resized" in capsys.readouterr().out
    MyDataSet(tmp_path / "f", size=(48, 64))
    assert "8 images of one size, 64x48, cropped to 48x64" in capsys.readouterr().out


@pytest.mark.parametrize("case", ["P4 one of 40x30", "P4 all of 64x48", "one pixel"])
def test_the_default_size_is_32(tmp_path, case):
    folder = write_images(tmp_path / "f", TWO)
    if case == "P4 one of 40x30":
        Image.fromarray(TILES[99]).resize((40, 30)).save(folder / "train/a/x.png")
    elif case == "P4 all of 64x48":
        write_images(folder, TWO, (64, 48))
    else:
        Image.new("RGB", (1, 1)).save(folder / "train/a/x.png")
    dataset = MyDataSet(folder)
    assert dataset.x_train.shape[1:] == dataset.x_test.shape[1:] == (32, 32, 3)


def test_stored_sizes_must_be_equal(tmp_path):
    folder = write_images(tmp_path / "f", TWO, (40, 24))
    assert MyDataSet(folder, size=None).x_train.shape == (6, 24, 40, 3)
    Image.new("RGB", (32, 32)).save(folder / "test/b/odd.png")
    with pytest.raises(ValueError, match=r"odd\.png.*24x40.*32x32.*set size") as raised:
        MyDataSet(folder, size=None)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "size", [0, -3, 1.5, "big", "32x", (32,), (1, 2, 3), 5000, True]
)
def test_a_wrong_size_is_refused_by_name(tmp_path, size):
    with pytest.raises(ValueError, match=r"^size must be"):
        MyDataSet(write_images(tmp_path / "f", TWO), size=size)


def test_size_and_fit_have_no_effect_on_arrays(tmp_path):
    path = write_npz(tmp_path / "a.npz", *small_cifar10())
    assert MyDataSet(path).x_train.shape[1:] == (32, 32, 3)
    for options in ({"size": 64}, {"fit": "pad"}):
        for make in (lambda o: MyDataSet(path, **o), lambda o: Digits(**o)):
            with pytest.raises(ValueError, match="only image files are resized"):
                make(options)
    with pytest.raises(ValueError, match="unknown fit"):
        MyDataSet(path, fit="squash")


def ramp16(path: Path) -> None:
    "Write a 16-bit ramp."
    values = np.linspace(0, 65535, 32).astype(np.uint16)
    Image.fromarray(np.tile(values, (32, 1))).save(path)


def icon(path: Path) -> None:
    "Write a black stroke on a transparent ground, whose color is black as well."
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[14:18, :, 3] = 255
    Image.fromarray(pixels, "RGBA").save(path)


def rotated(path: Path) -> None:
    "Write a photo that was taken with the camera on its side."
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, :16] = 255  # white on the left as stored, on top as seen
    Image.fromarray(pixels).save(path, exif=exif, quality=95)


@pytest.mark.parametrize(
    ("write", "name", "points"),
    [
        (ramp16, "x.png", {(16, 0): 0, (16, 8): 66, (16, 16): 131, (16, 24): 197}),
        (icon, "x.png", {(16, 16): 0, (2, 2): 255, (30, 30): 255}),
        (rotated, "x.jpg", {(4, 4): 255, (4, 28): 255, (28, 4): 0, (28, 28): 0}),
    ],
    ids=["P1 16-bit gray", "P2 transparent ground", "P3 EXIF orientation"],
)
@pytest.mark.parametrize("how", [{}, {"cache": False}, {"size": None}])
def test_files_in_folders_are_read_as_predict_reads_them(
    tmp_path, write, name, points, how
):
    folder = write_images(tmp_path / "f", TWO)
    write(folder / "train" / "a" / f"0{name}")
    dataset = MyDataSet(folder, **how)
    image = dataset.x_train[3]
    assert np.array_equal(image, read_image(folder / "train/a" / f"0{name}", 3, 32))
    for point, value in points.items():
        assert np.abs(image[point].astype(int) - value).max() <= 2, point


PHOTOS = """
import resource, sys
from era_s10 import MyDataSet
import torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
dataset = MyDataSet(sys.argv[1] if len(sys.argv) > 1 else FOLDER, cache=CACHE)
status = open("/proc/self/status").read()  # ru_maxrss would include the tests' own process
own = int(status.partition("VmHWM:")[2].split()[0]) / 1000
peak = [own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000]
print(dataset.x_train.shape, *peak, before / 1000)
"""


@pytest.mark.slow
@pytest.mark.parametrize("cached", [True, False])
def test_photos_of_12_megapixels_need_little_memory(tmp_path, cached):
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    photo = Image.fromarray(noise).resize((4000, 3000), Image.Resampling.BICUBIC)
    photo.save(tmp_path / "photo.jpg", quality=80)
    content = (tmp_path / "photo.jpg").read_bytes()
    for i in range(40):
        place = tmp_path / "f" / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.jpg").write_bytes(content + bytes([i]))
    code = f"FOLDER, CACHE = {str(tmp_path / 'f')!r}, {cached}\n{PHOTOS}"
    start = time.monotonic()
    done = run_python(code, ERA_S10_CACHE=str(tmp_path / "cache"), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    shape, own, children, before = done.stdout.splitlines()[-1].rsplit(" ", 3)
    assert shape == "(32, 32, 32, 3)"
    assert float(own) < 1000, "MB in the main process"
    assert float(own) - float(before) < 300, "MB beside the libraries"
    assert float(children) - float(before) < 300, "MB in the largest worker"
    assert time.monotonic() - start < 60


# ---------------------------------------------------------------- layouts

LAYOUTS = {
    "train test": ("train", None, "test"),
    "train valid": ("train", None, "valid"),
    "train val": ("train", None, "val"),
    "train val test": ("train", "val", "test"),
    "train valid test": ("train", "valid", "test"),
    "Training Validation Testing": ("Training", "Validation", "Testing"),
    "TRAIN TEST": ("TRAIN", None, "TEST"),
    "Train Val": ("Train", None, "Val"),
    "training testing": ("training", None, "testing"),
    "Training Validation": ("Training", None, "Validation"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    train, validation, test = LAYOUTS[layout]
    counts = {f"{train}/a": 4, f"{train}/b": 3, f"{test}/a": 2, f"{test}/b": 1}
    if validation:
        counts |= {f"{validation}/a": 1, f"{validation}/b": 2}
    dataset = MyDataSet(write_images(tmp_path / "f", counts))
    assert dataset.y_test.tolist() == [0, 0, 1]
    assert dataset.y_train[dataset.train_indices].tolist() == [0] * 4 + [1] * 3
    given = dataset.validation_indices
    assert dataset.y_train[given].tolist() == ([0, 1, 1] if validation else [])
    if validation:  # F3
        x, y = next(iter(dataset.validation_loader))
        assert y.tolist() == [0, 1, 1]
        assert np.array_equal(dataset.x_train[given[0]], TILES[10])
        assert "3 validation" in repr(dataset)


def test_given_validation_images_exclude_a_share(tmp_path):
    counts = {f"{p}/{c}": 4 for p in ("train", "val", "test") for c in "ab"}
    folder = write_images(tmp_path / "f", counts)
    with pytest.raises(
        ValueError, match="validation: the data has 8 validation images"
    ):
        MyDataSet(folder, validation=0.5)
    dataset = MyDataSet(folder, limit=4)
    assert len(dataset.train_indices) == 4
    assert int(dataset.train_indices.max()) < 8 <= int(dataset.validation_indices.min())
    with pytest.raises(ValueError, match="limit"):
        MyDataSet(folder, limit=9)


def test_class_folders_alone_are_split_the_same_way_for_every_seed(tmp_path, capsys):
    folder = write_images(tmp_path / "f", {"a": 20, "b": 10, "c": 5, "d": 2, "e": 1})
    found, messages = caught(lambda: [MyDataSet(folder, seed=s) for s in (0, 0, 7)])
    for dataset in found:
        assert np.bincount(dataset.y_train).tolist() == [16, 8, 4, 1, 1]
        assert np.bincount(dataset.y_test, minlength=5).tolist() == [4, 2, 1, 1, 0]
        assert order_digest(dataset) == order_digest(found[0])
    every = sorted(x.tobytes() for x in (*dataset.x_train, *dataset.x_test))
    assert every == sorted(x.tobytes() for x in TILES[:38])
    assert "20% of each class is the test set (seed 0)" in capsys.readouterr().out
    assert not messages


def test_validation_images_come_from_the_training_part_of_class_folders(tmp_path):
    folder = write_images(tmp_path / "f", {"a": 20, "b": 20})
    dataset = MyDataSet(folder, validation=0.25)
    sizes = len(dataset.train_indices), len(dataset.validation_indices)
    assert (*sizes, len(dataset.y_test)) == (24, 8, 8)


@pytest.mark.parametrize(
    ("counts", "error", "words"),
    [
        ({"train/a": 2, "train/b": 2}, FileNotFoundError, "no test images"),
        ({"test/a": 2, "val/b": 2}, ValueError, "no training images"),
        ({"train/a": 2, "train/b": 2, "more/c": 1}, FileNotFoundError, "no test images"),
        ({"seg_train/a": 2, "seg_train/b": 2, "seg_test/a": 2, "seg_test/b": 1}, ValueError, "rename them to train"),
        ({"train/a": 2, "train/b": 2, "test": 3}, ValueError, "no class folders"),
        ({"train": 2, "test": 2}, ValueError, "no class folders"),
        ({".": 4}, ValueError, "no class folders"),
        ({"train/a": 2, "Train/b": 2, "test/a": 1}, ValueError, "two folders"),
        ({"train/a": 2, "train/b": 2, "val/a": 1, "valid/b": 2, "test/a": 1}, ValueError, "two folders"),
        ({"train/a": 2, "train/b": 2, "test/a": 1, "test/zebra": 1}, ValueError, "zebra"),
        ({"a": 1, "b": 1}, ValueError, "one image"),
        ({"photos/a": 3, "photos/b": 3}, ValueError, "photos, if it holds them"),
        ({"train/all/a": 3, "train/all/b": 3, "test/all/a": 2}, ValueError, "one class"),
    ],
)  # fmt: skip
def test_an_unclear_layout_is_refused(tmp_path, counts, error, words):
    folder = write_images(tmp_path / "f", counts)
    with pytest.raises(error, match=words) as raised:
        MyDataSet(folder)
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_class_may_be_called_train(tmp_path):
    dataset = MyDataSet(write_images(tmp_path / "f", {"bus": 5, "train": 5}))
    assert dataset.classes == ("bus", "train")


def test_folders_beside_the_parts_are_named(tmp_path, capsys):
    MyDataSet(write_images(tmp_path / "f", {**TWO, "unlabeled/x": 2}))
    assert "not used: the folders unlabeled" in capsys.readouterr().out


def test_folders_inside_a_class_are_read(tmp_path):
    counts = {**TWO, "train/a/2023": 2, "train/a/2024/may": 1, "test/b/deep/er": 1}
    dataset = MyDataSet(write_images(tmp_path / "f", counts))
    assert np.bincount(dataset.y_train).tolist() == [6, 3]
    assert np.bincount(dataset.y_test).tolist() == [2, 3]


def test_links_to_folders_and_files_are_followed(tmp_path):
    folder = write_images(tmp_path / "f", TWO)
    write_images(tmp_path / "elsewhere", {"c": 2, ".": 1})
    for part in ("train", "test"):
        (folder / part / "c").symlink_to(tmp_path / "elsewhere" / "c")
    (folder / "train/a/link.png").symlink_to(tmp_path / "elsewhere" / "000.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = MyDataSet(folder)
    assert np.bincount(dataset.y_train).tolist() == [4, 3, 2]


# ---------------------------------------------------------------- strays, and what is no file

STRAYS = (
    *("Thumbs.db", "desktop.ini", ".DS_Store", "._000.png", "notes.txt", ".hidden.png"),
    *("@eaDir/x.png", "__MACOSX/a/000.png", ".ipynb_checkpoints/000.png"),
)


@pytest.mark.parametrize("place", ["train/a", "train", "."])
@pytest.mark.parametrize("stray", STRAYS)
def test_strays_are_skipped_and_counted(tmp_path, stray, place, capsys):
    folder = write_images(tmp_path / "f", TWO)
    expected = order_digest(MyDataSet(folder))
    capsys.readouterr()
    path = folder / place / stray
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"not an image")
    dataset = MyDataSet(folder)
    assert order_digest(dataset) == expected
    lines = [s for s in capsys.readouterr().out.splitlines() if "skipped" in s]
    assert len(lines) == 1
    assert "skipped 1: " in lines[0]


@pytest.mark.slow
def test_notes_are_escaped_where_the_output_cannot_show_them(tmp_path):
    folder = write_images(tmp_path / "f", TWO)
    (folder / "train/a/thumbs.照片.txt").write_text("stray")
    (folder / "照片").mkdir()
    os.mkdir(os.fsencode(folder) + b"/caf\xe9")
    code = f"import era_s10\nera_s10.MyDataSet({str(folder)!r})"
    done = run_python(code, PYTHONIOENCODING="cp1252", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    assert "\\u7167\\u7247" in done.stdout


def test_strays_among_class_folders_alone_are_counted_once(tmp_path, capsys):
    folder = write_images(tmp_path / "f", {"a": 5, "b": 5})
    for name in ("Thumbs.db", "a/Thumbs.db", "b/Thumbs.db", "a/x.txt", "readme.png"):
        (folder / name).write_bytes(b"no image")
    MyDataSet(folder)
    said = capsys.readouterr().out
    assert "skipped 5: Thumbs.db (3)" in said
    assert "*.png outside class folders" in said


def test_a_stray_in_a_tree_of_cifar10_is_not_damage(any_images, tmp_path):
    class Offline(CIFAR10):
        archives = ()  # a download would fail

    tree = write_tree(tmp_path / "cifar10", *small_cifar10())
    expected = order_digest(CIFAR10(tmp_path))
    for name in (
        "train/cat/Thumbs.db",
        "test/.DS_Store",
        "train/dog/notes.txt",
        "x.md",
    ):
        (tree / name).write_bytes(b"stray")
    assert order_digest(Offline(tmp_path, download=True)) == expected
    assert not files(tmp_path / "image cache")


def make_socket(path: Path) -> None:
    "Make a socket in the file system."
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


SPECIAL = {
    "named pipe": os.mkfifo,
    "socket": make_socket,
    "device": lambda path: path.symlink_to("/dev/null"),
    "broken link": lambda path: path.symlink_to("nowhere"),
    "is a broken link": lambda path: path.symlink_to(path.name),  # to itself
    "is a link to a folder that contains it": lambda path: path.symlink_to(path.parent),
    "empty": lambda path: path.touch(),
    "not an image": lambda path: path.write_bytes(b"text"),
}


@pytest.mark.parametrize("what", SPECIAL)
@pytest.mark.parametrize("layout", [TWO, {"a": 5, "b": 5}])
def test_what_is_not_an_image_is_refused_by_name(tmp_path, what, layout):
    folder = write_images(tmp_path / "f", layout)
    path = folder / next(iter(layout)) / "odd.png"
    SPECIAL[what](path)
    with pytest.raises(ValueError, match=what) as raised:
        MyDataSet(folder)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "name", ["x.zip", "x.tar", "x.tar.gz", "X.ZIP", "x.7z", "x.rar"]
)
def test_archives_are_named(tmp_path, name):
    folder = write_images(tmp_path / "f", TWO)
    (folder / "train/a" / name).write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="is an archive; unpack it"):
        MyDataSet(folder)
    (folder / "train/a" / name).rename(tmp_path / name)
    with pytest.raises(ValueError, match="is an archive; unpack it"):
        MyDataSet(tmp_path / name)
    (tmp_path / name).rename(folder / "train" / name)  # left where it was unpacked
    assert len(MyDataSet(folder).y_train) == 6


def test_several_files_are_named_at_once(tmp_path):
    folder = write_images(tmp_path / "f", TWO)
    for i in range(5):
        (folder / "train/a" / f"bad{i}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"5 files can't be used: .*bad0.*bad1"):
        MyDataSet(folder)
    for i in range(5):
        (folder / "train/a" / f"bad{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"bad0.*bad1.*and 2 more"):
        MyDataSet(folder)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("x.npz", lambda f: MyDataSet(f / "x.npz")),
        ("x", lambda f: MyDataSet(f / "x")),
        ("cifar10.npz", CIFAR10),
        ("cifar-10-batches-py/batches.meta", CIFAR10),
        ("train-images-idx3-ubyte", MNIST),
        ("mnist.npz", MNIST),
    ],
)
def test_a_pipe_in_place_of_a_file_of_data_is_named(tmp_path, name, make):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises((ValueError, FileNotFoundError), match="named pipe"):
        make(tmp_path)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads all")
def test_folders_and_files_without_permission_are_named(tmp_path):
    folder = write_images(tmp_path / "f", TWO)
    for path in (folder / "train/a/000.png", folder / "train/a"):
        path.chmod(0)
        with pytest.raises(ValueError, match=r"[Pp]ermission"):
            MyDataSet(folder)
        path.chmod(0o755)


def test_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    folder, scan = write_images(tmp_path / "f", TWO), os.scandir

    def refuse(path):
        if os.fspath(path).endswith("/b"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(
        ValueError, match=r"train/b can't be opened \(Permission denied"
    ):
        MyDataSet(folder)


# ---------------------------------------------------------------- classes


def test_one_class_is_refused_before_training(tmp_path):
    folder = write_images(tmp_path / "f", {"train/a": 3, "test/a": 2})
    with pytest.raises(ValueError, match=r"one class \(a\).*nothing to learn"):
        MyDataSet(folder)
    x, y = TILES[:8], np.zeros(8, int)
    for labels in (y, y + 2):
        np.savez(
            tmp_path / "one.npz", x_train=x, y_train=labels, x_test=x, y_test=labels
        )
        with pytest.raises(ValueError, match=r"one class.*nothing to learn"):
            MyDataSet(tmp_path / "one.npz")

    class One(MyDataSet):
        def load(self) -> Source:
            return Source(x, y, x, y, ("cat",))

    with pytest.raises(ValueError, match=r"one class \(cat\)"):
        One()


def test_an_empty_class(tmp_path):
    folder = write_images(tmp_path / "f", {**TWO, "train/c": 0, "test/c": 2})
    with pytest.raises(ValueError, match="no train images in the class folders c"):
        MyDataSet(folder)
    (folder / "train/c/Thumbs.db").write_bytes(b"only a stray")
    with pytest.raises(ValueError, match="no train images in the class folders c"):
        MyDataSet(folder)
    write_images(folder, {"train/c": 2})
    for path in (folder / "test/c").iterdir():
        path.unlink()
    for _ in range(2):  # an empty folder, no folder
        _, messages = caught(lambda: MyDataSet(folder))
        assert sum("no test images of class c" in text for text in messages) == 1
        if (folder / "test/c").exists():
            (folder / "test/c").rmdir()


def test_labels_that_count_from_1_are_warned_of(tmp_path):
    x, y = TILES[:9], np.arange(9) % 3 + 1
    np.savez(tmp_path / "x.npz", x_train=x, y_train=y, x_test=TILES[9:18], y_test=y)
    dataset, messages = caught(lambda: MyDataSet(tmp_path / "x.npz"))
    assert dataset.classes == ("0", "1", "2", "3")
    assert len(messages) == 1
    assert "no training images of class 0; labels count from 0" in messages[0]


def test_a_gap_in_the_labels_is_warned_of(tmp_path):
    x, y = TILES[:9], np.arange(9) % 3 * 2
    np.savez(tmp_path / "x.npz", x_train=x, y_train=y, x_test=TILES[9:18], y_test=y)
    _, messages = caught(lambda: MyDataSet(tmp_path / "x.npz"))
    assert [m for m in messages if "no training images of class 1, 3" in m] == messages


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("counts", [(10, 1), (1, 10), (3, 1, 1, 7), (2, 2, 2)])
def test_validation_leaves_an_image_of_every_class(counts, fraction):
    labels = np.repeat(np.arange(len(counts)), counts)
    for seed in range(5):
        split = Split.choose(labels, None, fraction, seed)
        left = np.bincount(labels[split.train], minlength=len(counts))
        assert left.min() >= 1
        assert len(split.validation) == min(
            round(len(labels) * fraction), len(labels) - len(counts)
        )


def test_validation_of_a_folder_with_a_single_image_of_a_class(tmp_path):
    folder = write_images(
        tmp_path / "f", {"train/a": 10, "train/b": 1, "test/a": 1, "test/b": 1}
    )
    dataset = MyDataSet(folder, validation=0.5)
    assert np.bincount(dataset.y_train[dataset.train_indices]).tolist() == [4, 1]


def test_a_limit_keeps_every_class_or_warns():
    for limit in (10, 11, 30):
        dataset, messages = caught(lambda limit=limit: Digits(limit=limit))
        assert len(np.unique(dataset.y_train[dataset.train_indices])) == 10
        assert not messages
    dataset, messages = caught(lambda: Digits(limit=4))
    assert len(messages) == 1
    assert "limit: no training images are left of class" in messages[0]
    assert "at least 10 images" in messages[0]


def test_splits_that_worked_keep_their_bits():
    labels = np.random.default_rng(0).integers(0, 10, 1000)
    for count in (100, 200, 500, 900):
        plain = stratified_choice(labels, count, 3)
        assert np.array_equal(
            stratified_choice(labels, count, 3, least=1, keep=1), plain
        )


def test_class_names_that_occur_twice(tmp_path):
    x, y = TILES[:4], [0, 1, 0, 1]
    with pytest.raises(ValueError, match=r"class names must differ \(got 'cat' 2x\)"):
        Source(x, y, x, y, ("cat", "cat"))
    with pytest.raises(ValueError, match="class names must differ"):
        Digits().with_classes(["1"] * 10)
    folder = write_images(
        tmp_path / "f", {"train/Cat": 2, "train/cat": 2, "test/cat": 1}
    )
    with pytest.raises(ValueError, match="'Cat' and 'cat' have the same name"):
        MyDataSet(folder)
    folder = write_images(
        tmp_path / "g", {"train/Cat": 2, "train/dog": 2, "test/cat": 1}
    )
    with pytest.raises(ValueError, match=r"not expected: cat.*Cat, dog"):
        MyDataSet(folder)
    e = "é"
    one, two = (unicodedata.normalize(form, f"caf{e}") for form in ("NFC", "NFD"))
    folder = write_images(tmp_path / "h", {f"{one}": 3, f"{two}": 3, "b": 3})
    with pytest.raises(ValueError, match="have the same name"):
        MyDataSet(folder)
    counts = {f"train/{one}": 3, f"test/{two}": 2, "train/b": 3, "test/b": 1}
    dataset = MyDataSet(write_images(tmp_path / "i", counts))  # unpacked on a Mac
    assert np.bincount(dataset.y_test).tolist() == [1, 2]


def test_images_in_two_parts_are_counted_in_one_warning(tmp_path):
    counts = {f"{p}/{c}": 4 for p in ("train", "val", "test") for c in "ab"}
    folder = write_images(tmp_path / "f", counts)
    for part in ("val", "test"):
        for i in range(2):
            content = (folder / "train" / "a" / f"00{i}.png").read_bytes()
            (folder / part / "b" / f"copy{i}.png").write_bytes(content)
    (folder / "test" / "b" / "copy1.png").unlink()
    _, messages = caught(lambda: MyDataSet(folder))
    assert len(messages) == 1
    assert "2 of 10 validation images and 1 of 9 test images are also" in messages[0]
    x, y = TILES[:8], np.arange(8) % 2
    np.savez(tmp_path / "x.npz", x_train=x, y_train=y, x_test=x[::-1], y_test=y)
    _, messages = caught(lambda: MyDataSet(tmp_path / "x.npz"))
    assert "8 of 8 test images are also training images" in messages[0]


def test_many_classes_get_a_fifth_each():
    sizes = [1, 2, 3, 7, 10, 100]
    found = {str(n): [Path(f"{n}/{i}") for i in range(n)] for n in sizes}
    parts = split_classes(found)
    assert [len(p) for p in parts["test"].values()] == [0, 1, 1, 1, 2, 20]
    for name, paths in found.items():
        assert sorted(parts["train"][name] + parts["test"][name]) == sorted(paths)


# ---------------------------------------------------------------- the cache


@pytest.fixture
def count_reads(monkeypatch) -> list:
    "Record the files that are read, in this process."
    found = []

    def read(path, *args, **options):
        found.append(path)
        return read_image(path, *args, **options)

    monkeypatch.setattr(image_cache, "read_image", read)
    monkeypatch.setattr(image_cache, "_reader_code", str)
    monkeypatch.setattr(image_cache, "_count_workers", lambda _: 1)
    return found


def one_file(cache: Path) -> Path:
    "Return the only file in the cache."
    (found,) = cache.glob("*/*.images")
    return found


def test_the_second_start_reads_no_image(tmp_path, cache, count_reads):
    folder = write_images(tmp_path / "f", TWO, (40, 40))
    first = MyDataSet(folder)
    assert len(count_reads) == 10
    again = MyDataSet(folder)
    assert len(count_reads) == 10
    assert order_digest(again) == order_digest(first)
    assert isinstance(again.x_train.base, np.memmap)
    assert again.x_train.flags.writeable
    again.x_train[:] = 0  # changes neither the file nor another dataset
    assert order_digest(MyDataSet(folder, verify_cache=True)) == order_digest(first)
    assert len(count_reads) == 10
    MyDataSet(folder, size=40)
    MyDataSet(folder, fit="pad")
    assert len(count_reads) == 30
    MyDataSet(folder)
    assert len(count_reads) == 30
    assert len(list(cache.glob("*/*.images"))) == 3


CHANGES = {
    "a new file": lambda f: Image.new("RGB", (9, 9)).save(f / "new.png"),
    "one file less": lambda f: (f / "000.png").unlink(),
    "another name": lambda f: (f / "000.png").rename(f / "zzz.png"),
    "another time": lambda f: os.utime(f / "000.png", (1, 1)),
    "another content": lambda f: Image.new("RGB", (40, 40)).save(f / "000.png"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_files_makes_a_new_cache(tmp_path, cache, count_reads, change):
    folder = write_images(tmp_path / "f", TWO, (40, 40))
    MyDataSet(folder)
    before = one_file(cache)
    count_reads.clear()
    CHANGES[change](folder / "train/a")
    now = order_digest(MyDataSet(folder))
    assert len(count_reads) >= 9
    assert now == order_digest(MyDataSet(folder, cache=False))
    assert one_file(cache) != before  # and the old one is gone


def test_the_same_size_and_time_do_not_hide_another_content(tmp_path, cache):
    folder = write_images(tmp_path / "f", TWO, suffix="bmp")
    path = folder / "train/a/000.bmp"
    first, stat = MyDataSet(folder), path.stat()
    Image.fromarray(TILES[200]).save(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    again = MyDataSet(folder)
    assert np.array_equal(again.x_train[0], TILES[200])
    assert np.array_equal(first.x_train[1:], again.x_train[1:])


def forge(change: Callable[[dict], object]) -> Callable[[bytes], bytes]:
    "Return a function that changes the header of a cache file and its checksum."

    def forged(content: bytes) -> bytes:
        header = change(json.loads(content[32:4096]))
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        text = text.ljust(4064)[:4064]
        digest = hashlib.blake2b(text, digest_size=16).digest()
        return content[:16] + digest + text + content[4096:]

    return forged


def with_sizes(**changes: object) -> Callable[[bytes], bytes]:
    "Return a function that changes the sizes in the header of a cache file."
    return forge(lambda header: header | {"sizes": header["sizes"] | changes})


HUGE = 10**30
DAMAGE = {
    "huge shape": lambda c: c.replace(b'"shape": [10', b'"shape": [%d' % HUGE),
    "forged: huge shape": forge(lambda h: h | {"shape": [HUGE, 32, 32, 3]}),
    "forged: huge file": forge(lambda h: h | {"shape": [2**40, 32, 32, 3]}),
    "forged: negative shape": forge(lambda h: h | {"shape": [-10, -32, 32, 3]}),
    "forged: zero": forge(lambda h: h | {"shape": [0, 32, 32, 3]}),
    "forged: same bytes": forge(lambda h: h | {"shape": [40, 16, 16, 3]}),
    "forged: shape of text": forge(lambda h: h | {"shape": "10, 32, 32, 3"}),
    "forged: no shape": forge(lambda h: {"key": h["key"]}),
    "forged: no sizes": forge(lambda h: {"key": h["key"], "shape": h["shape"]}),
    "forged: no key": forge(lambda h: {"shape": h["shape"]}),
    "forged: other key": forge(lambda h: h | {"key": "0" * 32}),
    "forged: list": forge(lambda h: [h]),
    "forged: not JSON": forge(lambda h: b"{"),
    "forged: not a text": forge(lambda h: b"\xff\xfe"),
    "forged: nested": forge(lambda h: b"[" * 4064),
    "forged: sizes of text": with_sizes(images="ten"),
    "forged: size of one number": with_sizes(smallest=[3]),
    "forged: size of text": with_sizes(largest=["a", "b"]),
    "forged: unknown size": with_sizes(other=3),
    "forged: sizes is a list": forge(lambda h: h | {"sizes": [1]}),
    "forged: no checksums": forge(lambda h: h | {"checksums": None}),
    "cut": lambda c: c[:-100],
    "cut in the header": lambda c: c[:50],
    "empty": lambda c: b"",
    "magic": lambda c: b"x" + c[1:],
    "shape": lambda c: c.replace(b'"shape": [10', b'"shape": [11'),
    "checksum of the header": lambda c: c[:20] + bytes([c[20] ^ 1]) + c[21:],
    "padding of the header": lambda c: c[:4000] + b"x" + c[4001:],
    "longer": lambda c: c + b"x",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_made_again(tmp_path, cache, count_reads, damage):
    folder = write_images(tmp_path / "f", TWO, (40, 40))
    expected, path = order_digest(MyDataSet(folder)), one_file(cache)
    complete = path.read_bytes()
    path.write_bytes(DAMAGE[damage](complete))
    count_reads.clear()
    dataset, messages = caught(lambda: MyDataSet(folder))
    assert order_digest(dataset) == expected
    assert len(messages) == 1
    assert "made again" in messages[0]
    assert len(count_reads) == 10
    assert path.read_bytes() == complete


def become_a_link(path: Path) -> None:
    "Replace a file by a link that points to itself."
    path.unlink()
    path.symlink_to(path)


REPLACED = {
    "pipe": lambda p: (p.unlink(), os.mkfifo(p)),
    "socket": lambda p: (p.unlink(), make_socket(p)),
    "empty folder": lambda p: (p.unlink(), p.mkdir()),
    "link to a device": lambda p: (p.unlink(), p.symlink_to("/dev/zero")),
    "link to itself": become_a_link,
    "no permission": lambda p: p.chmod(0),
}


@pytest.mark.skipif(sys.platform == "win32", reason="no such files there")
@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("fault", REPLACED)
def test_what_is_not_a_cache_file_is_replaced(
    tmp_path, cache, monkeypatch, fault, verify
):
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    monkeypatch.setenv("ERA_S10_CACHE", "c")
    folder = write_images(tmp_path / "f", TWO, (40, 40))
    expected, path = order_digest(MyDataSet(folder)), one_file(Path("c"))
    complete = path.read_bytes()
    REPLACED[fault](path)
    number = path.lstat().st_ino

    def refuse(file, *args, **options):
        if "no permission" in fault and os.stat(file).st_ino == number:
            raise PermissionError(13, "Permission denied", str(path))
        return open(file, *args, **options)

    monkeypatch.setattr(image_cache, "open", refuse, raising=False)
    dataset, messages = caught(lambda: MyDataSet(folder, verify_cache=verify))
    assert order_digest(dataset) == expected
    assert len(messages) == 1
    assert "made again" in messages[0]
    assert path.read_bytes() == complete
    assert isinstance(dataset.x_train.base, np.memmap)
    assert not list(tmp_path.rglob("*.part"))


def test_a_cache_that_can_never_be_read_is_not_used(tmp_path, cache, monkeypatch):
    def refuse(file, *args, **options):
        raise OSError(5, "Input/output error", str(file))

    monkeypatch.setattr(image_cache, "open", refuse, raising=False)
    folder = write_images(tmp_path / "f", TWO, (40, 40))
    dataset, messages = caught(lambda: MyDataSet(folder))
    assert len(messages) == 1
    assert "Input/output error" in messages[0]
    assert order_digest(dataset) == order_digest(MyDataSet(folder, cache=False))


@pytest.mark.parametrize("name", ["file", "lock", "folder"])
@pytest.mark.parametrize("make", [Path.mkdir, getattr(os, "mkfifo", None)])
def test_a_cache_whose_place_is_taken_is_one_warning(tmp_path, cache, make, name):
    if make is None:
        pytest.skip("no pipes")
    folder = write_images(tmp_path / "f", TWO, (40, 40))
    expected, path = order_digest(MyDataSet(folder)), one_file(cache)
    place = {"file": path, "lock": path.parent / ".lock", "folder": path.parent}[name]
    if name == "folder":
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    make(place)
    if name == "file" and place.is_dir():
        (place / "important").write_text("of somebody")
    dataset, messages = caught(lambda: MyDataSet(folder))
    assert order_digest(dataset) == expected
    assert len(messages) <= 2
    assert all("image" in one for one in messages)
    if name == "file" and place.is_dir():
        assert (place / "important").exists()


def test_verify_cache_finds_a_damaged_pixel(tmp_path, cache, count_reads):
    folder = write_images(tmp_path / "f", TWO, (40, 40))
    expected, path = order_digest(MyDataSet(folder)), one_file(cache)
    content = bytearray(path.read_bytes())
    content[-1000] ^= 4
    path.write_bytes(content)
    _, messages = caught(lambda: MyDataSet(folder))
    assert not messages  # only the header is verified
    dataset, messages = caught(lambda: MyDataSet(folder, verify_cache=True))
    assert "pixels are damaged; made again" in messages[0]
    assert order_digest(dataset) == expected
    assert len(count_reads) == 20


def test_no_cache_writes_nothing(tmp_path, cache):
    folder = write_images(tmp_path / "f", TWO, (40, 40))
    dataset = MyDataSet(folder, cache=False)
    assert not cache.exists()
    assert order_digest(dataset) == order_digest(MyDataSet(folder))


@pytest.mark.parametrize("fault", ["file", "no permission", "no space", "no locks"])
def test_a_cache_that_cannot_be_written_is_one_warning(
    tmp_path, cache, monkeypatch, fault
):
    folder = write_images(tmp_path / "f", TWO, (40, 40))
    if fault == "file":
        cache.write_text("a file")
    else:
        kind = {"no permission": PermissionError(13, "Permission denied")}
        kind |= {"no space": OSError(28, "No space left on device")}
        kind |= {"no locks": NotImplementedError("no flock")}
        name = "_reserve" if fault == "no space" else "lock_folder"

        def refuse(*args):
            raise kind[fault]

        monkeypatch.setattr(image_cache, name, refuse)
    dataset, messages = caught(lambda: MyDataSet(folder))
    assert len(messages) == 1
    assert "image cache: can't write to" in messages[0]
    assert "ERA_S10_CACHE" in messages[0]
    assert order_digest(dataset) == order_digest(MyDataSet(folder, cache=False))
    assert not list(tmp_path.rglob("*.part"))


GONE = {  # whether the images exist, days since the last use, whether it is kept
    "gone and unused": (False, 31, False),
    "gone lately": (False, 29, True),
    "unused": (True, 400, True),
}


@pytest.mark.parametrize("case", GONE)
def test_a_cache_without_images_is_removed_when_another_is_made(tmp_path, cache, case):
    exists, days, kept = GONE[case]
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        MyDataSet(write_images(folder, TWO, (40, 40)))
    (old,) = cache.glob("first-*")
    (other,) = cache.glob("second-*")
    then = time.time() - days * 86400
    for place in (old, other):
        os.utime(place / "origin", (then, then))
    foreign = cache / "mine" / "notes.txt"
    foreign.parent.mkdir()
    foreign.write_text("not a cache")
    if not exists:
        first.rename(tmp_path / "moved")
    MyDataSet(second)  # from its cache
    assert old.exists()
    assert time.time() - (other / "origin").stat().st_mtime < 60
    MyDataSet(second, size=48)  # makes another one
    assert old.exists() == kept
    assert foreign.exists()
    assert len(list(cache.glob("second-*/*.images"))) == 2


@pytest.mark.parametrize("fault", ["origin is a folder", "no origin", "foreign file"])
def test_what_is_not_a_cache_is_not_removed(tmp_path, cache, fault):
    MyDataSet(write_images(tmp_path / "first", TWO, (40, 40)))
    (old,) = cache.glob("first-*")
    (old / "origin").touch()
    shutil.rmtree(tmp_path / "first")
    if fault == "foreign file":
        (old / "notes.txt").write_text("of somebody")
        os.utime(old / "origin", (1, 1))
    else:
        (old / "origin").unlink()
        if fault == "origin is a folder":
            (old / "origin").mkdir()
            os.utime(old / "origin", (1, 1))
    _, messages = caught(lambda: MyDataSet(write_images(tmp_path / "b", TWO, (40, 40))))
    assert not messages
    assert old.exists()
    assert (old / "notes.txt").exists() == (fault == "foreign file")


@pytest.mark.parametrize("value", ["", None])
def test_the_cache_is_in_the_cache_folder_of_the_user(monkeypatch, tmp_path, value):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ERA_S10_CACHE")
    if value is not None:
        monkeypatch.setenv("ERA_S10_CACHE", value)
    if sys.platform == "linux":
        assert cache_folder() == tmp_path / "era_s10" / "images"
    monkeypatch.setenv("ERA_S10_CACHE", "~/x")
    assert cache_folder() == Path("~/x").expanduser()


def test_several_processes_give_the_same_array(tmp_path, monkeypatch):
    folder = write_images(tmp_path / "f", {"a": 150, "b": 150}, (40, 36), "jpg")
    paths = sorted(folder.glob("*/*.jpg"))
    expected = np.stack([read_image(path, 3, 32) for path in paths])
    monkeypatch.setattr(image_cache, "_count_workers", lambda _: 3)
    for cached in (True, True, False):
        found, sizes = load_images(paths, folder, 32, cache=cached)
        assert np.array_equal(found, expected)
        assert (sizes.images, sizes.distinct) == (300, 1)
    (folder / "b" / "bad.jpg").write_bytes(b"no image")
    target = np.zeros((301, 32, 32, 3), np.uint8)
    with pytest.raises(ValueError, match=r"bad\.jpg"):
        fill_array(target, [*map(str, paths), str(folder / "b/bad.jpg")], size=32)


BUILD = """
import sys, time
import era_s10.image_cache as c
from era_s10.images import read_image
def slow(path, *args, **options):
    with open(LOG, "a") as file:
        file.write("x")
    time.sleep(0.02)
    return read_image(path, *args, **options)
code = c._reader_code()
c._reader_code = lambda: code
c.read_image = slow
c._count_workers = lambda _: 2
from era_s10.datasets.generic import MyDataSet
from era_s10.provenance import order_digest
print(order_digest(MyDataSet(FOLDER)))
"""


def start_build(folder: Path, log: Path) -> subprocess.Popen:
    "Start a program that reads a folder slowly."
    code = f"FOLDER, LOG = {str(folder)!r}, {str(log)!r}\n{BUILD}"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )


@pytest.mark.slow
def test_of_two_programs_one_makes_the_cache(tmp_path, cache):
    folder = write_images(tmp_path / "f", {"a": 50, "b": 50}, (40, 40))
    log = tmp_path / "log"
    programs = [start_build(folder, log) for _ in range(2)]
    outputs = [program.communicate(timeout=90) for program in programs]
    assert [program.returncode for program in programs] == [0, 0], outputs
    digests = {out.splitlines()[-1] for out, _ in outputs}
    assert len(digests) == 1
    assert len(log.read_text()) == 100  # each image once
    assert one_file(cache)


@pytest.mark.slow
def test_a_killed_program_leaves_nothing_that_is_used(tmp_path, cache):
    folder = write_images(tmp_path / "f", {"a": 100, "b": 100}, (40, 40))
    log = tmp_path / "log"
    program = start_build(folder, log)
    while not log.exists() or len(log.read_text()) < 40:
        time.sleep(0.02)
        assert program.poll() is None, program.communicate()
    os.kill(program.pid, signal.SIGKILL)
    program.communicate()
    assert len(list(cache.glob("*/.*.part"))) == 1
    assert not list(cache.glob("*/*.images"))
    for _ in range(100):  # the workers end as well
        done = len(log.read_text())
        time.sleep(0.5)
        if len(log.read_text()) == done:
            break
    assert done < 200
    dataset = MyDataSet(folder)
    assert order_digest(dataset) == order_digest(MyDataSet(folder, cache=False))
    assert not list(cache.glob("*/.*.part"))
    assert one_file(cache)


@pytest.mark.slow
def test_a_script_needs_no_main_guard(tmp_path):
    folder = write_images(tmp_path / "f", {"a": 120, "b": 120}, (40, 40), "jpg")
    script = tmp_path / "script.py"
    script.write_text(
        f"import era_s10\nprint('started')\nprint(era_s10.MyDataSet({str(folder)!r}))\n"
    )
    done = run_script(script, TQDM_DISABLE="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("started") == 1
    assert "192 training, 48 test images of 3x32x32" in done.stdout
    assert not done.stderr


# ---------------------------------------------------------------- records and commands


def test_size_and_fit_are_recorded_for_image_files_only(tmp_path):
    folder = write_images(tmp_path / "f", TWO, (40, 40))
    found = describe_dataset(MyDataSet(folder, size=(40, 36), fit="pad"))
    assert (found["size"], found["fit"]) == ([40, 36], "pad")
    json.dumps(found)
    npz = write_npz(tmp_path / "a.npz", *small_cifar10())
    assert describe_dataset(MyDataSet(folder, size=None))["size"] == [40, 40]
    usual = write_images(tmp_path / "g", TWO)
    for dataset in (Digits(), MyDataSet(npz), MyDataSet(usual, size=None)):
        assert not {"size", "fit"} & describe_dataset(dataset).keys()


@pytest.mark.slow
def test_a_run_finds_its_size_and_fit_again(tmp_path, capsys):
    from era_s10.cli import evaluate, reopen, train

    folder = write_images(tmp_path / "f", {"a": 20, "b": 20}, (48, 40))
    options = {"width": 2, "batch_size": 16, "max_lr": 0.01, "device": "cpu"}
    run = tmp_path / "run"
    train(str(folder), **options, fit="pad", epochs=1, folder=str(run))
    said = capsys.readouterr().out
    assert "40 images of one size, 40x48, padded to 32x32" in said
    assert "20% of each class is the test set" in said
    again = reopen(run, {})
    assert (again.dataset.size, again.dataset.fit) == ((32, 32), "pad")
    evaluate(str(run), device="cpu")
    said = capsys.readouterr().out
    assert "padded to 32x32" in said
    recorded = re.search(r"recorded, without TTA: (.*)%", said)[1]
    assert f"accuracy {recorded}% of 8 images" in said
    train(resume=str(run), epochs=2, verify_cache=True)
    train(resume=str(run), epochs=3, no_cache=True)
    settings = json.loads((run / "config.json").read_text())
    assert settings["dataset"]["size"] == [32, 32]
    del settings["dataset"]["size"], settings["dataset"]["fit"]
    (run / "config.json").write_text(json.dumps(settings))  # of an earlier version
    assert read_config(run).dataset_options["size"] is None


@pytest.mark.parametrize(
    "options",
    [
        {"dataset": "digits", "size": "64"},
        {"dataset": "digits", "fit": "pad"},
        {"dataset": "digits", "no_cache": True},
        {"dataset": "digits", "verify_cache": True},
        {"dataset": "FOLDER", "verify_cache": True, "no_cache": True},
        {"dataset": "FOLDER", "size": "huge"},
        {"dataset": "FOLDER", "fit": "squash"},
    ],
)
def test_options_without_effect_are_refused(tmp_path, options):
    from era_s10.cli import train

    if options["dataset"] == "FOLDER":
        options = {**options, "dataset": str(write_images(tmp_path / "f", TWO))}
    with pytest.raises(ValueError, match=r"has no effect|size must be|unknown fit"):
        train(**options, folder=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_while_images_are_read_leaves_no_empty_run_folder(tmp_path, number):
    write_images(tmp_path / "f", {"a": 40, "b": 40}, size=(3000, 2000), suffix="jpg")
    environment = {**os.environ, "ERA_S10_CACHE": str(tmp_path / "cache")}
    train = [*command("era_s10_train"), "--dataset", "f", "--max_lr", "0.01"]
    process = subprocess.Popen(
        train, cwd=tmp_path, env=environment, preexec_fn=default_signals
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("cache/*/*.part")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert not (tmp_path / "runs").exists()
    assert not list(tmp_path.glob("cache/*/*.part"))
