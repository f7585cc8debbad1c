"The weights that come with the package, on real test images, and photos in files of many kinds."

import io
import json
import os
import shlex
import shutil
import struct
import subprocess
import sys
from datetime import datetime
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import DATA, needs_cifar10
from PIL import Image
from project import command
from sklearn.datasets import load_sample_image

from era_s10.backprop import Test
from era_s10.datasets.cifar10 import CIFAR10
from era_s10.images import read_photo
from era_s10.model import Model
from era_s10.predict import predict, show_predictions
from era_s10.weights import PRETRAINED, pretrained_names, read_model_card

WEIGHTS = Path(str(files("era_s10"))) / "weights"
PREDICT = command("era_s10_predict", "--weights", "cifar10-width16")


@pytest.fixture(scope="module")
def net() -> Model:
    "Return the narrow net, which is quick."
    return Model.pretrained("cifar10-width16")


# ---------------------------------------------------------------- the weights


def test_the_default_net_is_there():
    assert PRETRAINED in pretrained_names()
    for name in pretrained_names():
        width = int(name.partition("-width")[2] or 64)
        assert Model.pretrained(name).arguments["width"] == width
    assert not any(module.training for module in Model.pretrained().modules())


@pytest.mark.parametrize("name", pretrained_names())
def test_a_card_says_what_one_must_know(name):
    card = read_model_card(name)
    assert {path.name for path in WEIGHTS.glob(f"{name}.*")} == {
        f"{name}.json",
        f"{name}.safetensors",
    }
    assert card["dataset"]["class"] == "CIFAR10"
    assert card["dataset"]["fingerprints"] == CIFAR10.checksums
    assert datetime.fromisoformat(card["finished"]).tzinfo is not None
    assert card["measured"]["precision"] == "fp32"
    assert card["dataset"]["images"] == {"train": 50_000, "test": 10_000}
    assert card["classes"] == list(CIFAR10.names)
    assert card["test_images"] == 10_000
    assert card["file"]["bytes"] == (WEIGHTS / f"{name}.safetensors").stat().st_size
    for field in (
        "recipe",
        "config",
        "epochs",
        "seed",
        "finished",
        "machine",
        "code",
        "runs",
    ):
        assert card[field] not in (None, "", {}), field
    assert "/" not in json.dumps(
        card["dataset"]
    )  # no path of the machine that trained it


@pytest.mark.parametrize("name", pretrained_names())
def test_weights_are_in_half_precision_and_load_without_a_network(name):
    code = f"""
import socket
def refuse(*args, **options): raise OSError("no network")
socket.socket.connect = socket.create_connection = refuse
from era_s10.model import Model
net = Model.pretrained({name!r})
print(sum(p.numel() for p in net.parameters()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    assert (WEIGHTS / f"{name}.safetensors").stat().st_size < 2.1 * int(
        done.stdout
    ) + 20_000


def test_damaged_weights_are_refused(tmp_path, monkeypatch):
    shutil.copytree(WEIGHTS, tmp_path / "weights")
    path = tmp_path / "weights" / "cifar10-width16.safetensors"
    monkeypatch.setattr("era_s10.model.package_folder", lambda: tmp_path)
    Model.pretrained("cifar10-width16")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged, or its card"):
        Model.pretrained("cifar10-width16")


@needs_cifar10
@pytest.mark.parametrize("name", pretrained_names())
def test_shipped_weights_on_a_thousand_real_test_images(name):
    data = CIFAR10(DATA / "cifar10.npz", batch_size=250)
    data.x_test, data.y_test = data.x_test[:1000], data.y_test[:1000]
    test = Test(Model.pretrained(name), data)
    accuracy = test()[1]
    expected = read_model_card(name)["test_accuracy"] / 100
    spread = 100 * (expected * (1 - expected) / 1000) ** 0.5
    assert abs(accuracy - 100 * expected) < 3 * spread
    assert len(test.predicted) == 1000


@needs_cifar10
@pytest.mark.parametrize("name", pretrained_names())
def test_the_command_gives_the_accuracy_on_the_card(name):
    evaluate = command(
        "era_s10_evaluate", "--pretrained", name, "--data_dir", str(DATA)
    )
    done = subprocess.run(evaluate, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    found = float(done.stdout.split("accuracy ")[1].split()[0])
    assert abs(found - read_model_card(name)["test_accuracy"]) <= 0.05


@needs_cifar10
def test_a_file_gets_the_class_that_its_image_gets(net, tmp_path):
    data = CIFAR10(DATA / "cifar10.npz")
    data.x_test, data.y_test = data.x_test[:200], data.y_test[:200]
    test = Test(net, data)
    test()
    names = [tmp_path / f"{i}.png" for i in range(200)]
    for name, image in zip(names, data.x_test, strict=True):
        Image.fromarray(image).save(name)
    found, refused = predict(names, net)
    assert not refused
    assert [one.label for one in found] == [data.classes[i] for i in test.predicted]


# ---------------------------------------------------------------- photos in files

PHOTO = Image.fromarray(load_sample_image("flower.jpg"))


def stored(image: Image.Image, kind: str, **options) -> bytes:
    "Return an image as a file of a kind."
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


KINDS = {
    "gray": ("L", "PNG"),
    "palette": ("P", "PNG"),
    "black and white": ("1", "PNG"),
    "alpha": ("RGBA", "PNG"),
    "gray and alpha": ("LA", "PNG"),
    "sixteen bits": ("I;16", "PNG"),
    "printer's colours": ("CMYK", "JPEG"),
    "a bitmap": ("RGB", "BMP"),
    "an animation": ("P", "GIF"),
    "tagged": ("RGB", "TIFF"),
    "web": ("RGB", "WEBP"),
    "floating point": ("F", "TIFF"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_every_mode_are_read(kind, tmp_path):
    mode, form = KINDS[kind]
    image = PHOTO.convert("L") if mode in ("1", "L", "LA", "I;16", "F") else PHOTO
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    path = tmp_path / "photo"
    path.write_bytes(stored(image.convert(mode) if mode != "I;16" else image, form))
    expected = np.asarray(read_photo(path)).astype(int)
    (tmp_path / "plain.png").write_bytes(
        stored(PHOTO.convert("L") if image.mode != "RGB" else PHOTO, "PNG")
    )
    plain = read_photo(tmp_path / "plain.png").astype(int)
    assert expected.shape == (32, 32, 3)
    assert np.abs(expected - plain).mean() < 12, np.abs(expected - plain).mean()


def test_what_is_white_is_seen_from_the_whole_image(tmp_path):
    values = np.full((32, 96), 255, np.float32)
    values[:, 32:64] = 1  # the middle alone could be an image from 0 to 1
    Image.fromarray(values).save(tmp_path / "dark.tif")
    assert read_photo(tmp_path / "dark.tif").max() == 1


def test_what_is_transparent_is_white(tmp_path):
    half = PHOTO.convert("RGBA")
    half.putalpha(Image.new("L", PHOTO.size, 128))
    half.save(tmp_path / "half.png")
    PHOTO.save(tmp_path / "plain.png")
    plain = read_photo(tmp_path / "plain.png").astype(float)
    assert np.abs(read_photo(tmp_path / "half.png") - (plain + 255) / 2).max() <= 2
    clear = PHOTO.convert("LA")
    clear.putalpha(Image.new("L", PHOTO.size, 0))
    clear.save(tmp_path / "clear.png")
    assert (read_photo(tmp_path / "clear.png") == 255).all()


def test_a_large_photo_from_a_camera_held_upright(tmp_path):
    large = PHOTO.resize((3000, 2000)).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    large.save(tmp_path / "held.jpg", exif=exif, quality=95)
    PHOTO.save(tmp_path / "plain.png")
    held, plain = (
        read_photo(tmp_path / name).astype(int) for name in ("held.jpg", "plain.png")
    )
    assert np.abs(held - plain).mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_camera_may_be_held_in_any_way(orientation, tmp_path):
    ways = Image.Transpose
    undo = {
        2: ways.FLIP_LEFT_RIGHT,
        3: ways.ROTATE_180,
        4: ways.FLIP_TOP_BOTTOM,
        5: ways.TRANSPOSE,
        6: ways.ROTATE_90,
        7: ways.TRANSVERSE,
        8: ways.ROTATE_270,
    }
    image = PHOTO.transpose(undo[orientation]) if orientation > 1 else PHOTO
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "plain.png").write_bytes(stored(PHOTO, "PNG"))
    for kind in ("PNG", "TIFF"):  # Pillow turns a TIFF by itself
        (tmp_path / "held").write_bytes(stored(image, kind, exif=exif))
        assert np.array_equal(
            read_photo(tmp_path / "held"), read_photo(tmp_path / "plain.png")
        )


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 500), (31, 33), (32, 32), (4000, 3000), (9000, 40)]
)
def test_images_of_any_size(size, tmp_path, net):
    path = tmp_path / "photo.jpg"
    PHOTO.resize(size).save(path)
    found, refused = predict([path], net)
    assert not refused
    assert abs(sum(found[0].probabilities.values()) - 1) < 1e-5


def test_bad_files_are_named_and_the_others_answered(tmp_path):
    good = tmp_path / "good.jpg"
    PHOTO.save(good)
    bad = {
        "cut.jpg": good.read_bytes()[:3000],
        "text.png": b"not a picture",
        "empty.jpg": b"",
        "cut.png": stored(PHOTO, "PNG")[:2000],
        "noise.gif": b"GIF89a" + bytes(range(256)),
        "huge.png": stored(Image.new("1", (20_000, 20_000)), "PNG"),
        "odd.dds": b"DDS "
        + struct.pack("<I", 124)
        + bytes(120),  # no kind of pixel at all
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    names = [*bad, "good.jpg", "nowhere.jpg"]
    done = subprocess.run(
        [*PREDICT, *names], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stdout.startswith("good.jpg ") and done.stdout.count("\n") == 1
    lines = done.stderr.splitlines()
    assert len(lines) == len(names) - 1
    for name, line in zip([*bad, "nowhere.jpg"], lines, strict=True):
        assert name in line


def test_metadata_that_are_damaged_do_not_refuse_a_picture(tmp_path, net):
    entries = struct.pack(
        "<HHII", 0x010F, 5, 1, 38
    )  # the camera's maker, as a fraction
    entries += struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)  # to be turned by a quarter
    exif = (
        b"Exif\0\0II*\0"
        + struct.pack("<IH", 8, 2)
        + entries
        + bytes(4)
        + struct.pack("<II", 1, 2)
    )
    turned = PHOTO.transpose(Image.Transpose.ROTATE_90)
    (tmp_path / "odd.jpg").write_bytes(stored(turned, "JPEG", exif=exif, quality=95))
    (tmp_path / "junk.jpg").write_bytes(
        stored(PHOTO, "JPEG", exif=b"Exif\0\0MM\0*" + b"\xff" * 50)
    )
    PHOTO.save(tmp_path / "plain.png")
    plain = read_photo(tmp_path / "plain.png").astype(int)
    for name in ("odd.jpg", "junk.jpg"):
        assert np.abs(read_photo(tmp_path / name) - plain).mean() < 3, name


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text there")
def test_a_name_that_is_no_text_is_told_all_the_same(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    PHOTO.save(tmp_path / name)
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(
        [*PREDICT, name], capture_output=True, text=True, cwd=tmp_path, env=strict
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(r"caf\udce9.png ")
    (tmp_path / "café.png").write_bytes((tmp_path / name).read_bytes())
    plain = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*PREDICT, "café.png"], capture_output=True, text=True, cwd=tmp_path, env=plain
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(r"caf\xe9.png ")


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such pipes")
def test_pipes(tmp_path):
    PHOTO.save(tmp_path / "photo.png")
    os.mkfifo(tmp_path / "pipe.png")
    with open(tmp_path / "photo.png", "rb") as photo:
        read = subprocess.run(
            [*PREDICT, "pipe.png", "/dev/stdin"],
            input=photo.read(),
            capture_output=True,
            cwd=tmp_path,
            timeout=100,
        )
    assert read.returncode == 1
    assert read.stdout.startswith(b"/dev/stdin ")
    assert b"pipe.png: can't be read (it is a pipe)" in read.stderr
    endless = (
        "import era_s10.predict as p; p._MOST_BYTES = 1000; p.read_photo('/dev/stdin')"
    )
    endless = [sys.executable, "-c", endless]
    endless = subprocess.run(
        endless, input=bytes(2000), capture_output=True, timeout=100
    )
    assert (
        b"/dev/stdin: can't be read (more than 1,000 bytes come out of it)"
        in endless.stderr
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there are no such pipes")
def test_a_reader_that_closes_its_pipe_is_no_error(tmp_path):
    PHOTO.save(tmp_path / "photo.png")
    many = shlex.join([*PREDICT, *["photo.png"] * 2000])
    cut = subprocess.run(
        f"{many} | head -1", shell=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert cut.stdout.startswith("photo.png ")
    assert cut.stderr == ""


def test_a_large_jpeg_is_read_and_a_large_png_is_not(tmp_path):
    large = Image.new("L", (12_000, 9_000), 200)
    large.save(tmp_path / "large.jpg")
    large.save(tmp_path / "large.png", compress_level=1)
    assert abs(read_photo(tmp_path / "large.jpg").astype(int) - 200).max() <= 1
    with pytest.raises(ValueError, match="has more than 89,478,485 pixels"):
        read_photo(tmp_path / "large.png")


def test_names_do_not_disturb_a_terminal(tmp_path):
    names = ["new\nline.png", "esc\x1b[31mred.png"]
    for name in names:
        PHOTO.save(tmp_path / name)
    done = subprocess.run(
        [*PREDICT, *names], capture_output=True, text=True, cwd=tmp_path
    )
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        r"new\nline.png",
        r"esc\x1b[31mred.png",
    ]


def test_the_package_finds_its_files_beside_a_clone(tmp_path):
    (tmp_path / "era_s10" / "nbs").mkdir(parents=True)  # a folder of the package's name
    code = "from era_s10.model import Model; print(Model.pretrained('cifar10-width16').card['epochs'])\n"
    code += "from era_s10.backprop import describe_code; print(describe_code())"
    said = {}
    for place in (tmp_path, Path("/")):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=place
        )
        assert done.returncode == 0, done.stderr
        said[place] = done.stdout
    assert said[tmp_path] == said[Path("/")]


def test_predictions_are_drawn(tmp_path, net):
    path = tmp_path / "photo.png"
    PHOTO.save(path)
    figure = show_predictions([path] * 3, net)
    assert len([ax for ax in figure.axes if ax.images]) == 3


def test_a_net_for_gray_images_takes_no_photos(tmp_path):
    gray = Model(2, in_channels=1)
    gray.card = {"classes": list("0123456789"), "mean": [0.5], "std": [0.5]}
    PHOTO.save(tmp_path / "photo.png")
    with pytest.raises(ValueError, match="three channels"):
        predict([tmp_path / "photo.png"], gray)
    with pytest.raises(ValueError, match="card"):
        predict([tmp_path / "photo.png"], Model(2))


def test_torch_is_asked_for_no_gradient(net, tmp_path):
    PHOTO.save(tmp_path / "photo.png")
    seen = []
    hook = net.register_forward_hook(
        lambda *_: seen.append(torch.is_inference_mode_enabled())
    )
    try:
        predict([tmp_path / "photo.png"], net)
    finally:
        hook.remove()
    assert seen == [True]
    assert torch.is_grad_enabled()
