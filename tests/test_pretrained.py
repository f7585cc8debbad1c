"""The pretrained weights of the package, predictions on real test images, and photos in many file formats."""

import io
import json
import os
import shlex
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
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
def model() -> Model:
    "Return the narrow pretrained model, which is fast."
    return Model.pretrained("cifar10-width16")


# ---------------------------------------------------------------- pretrained weights


def test_pretrained_models_load():
    assert PRETRAINED in pretrained_names()
    for name in pretrained_names():
        width = int(name.partition("-width")[2] or 64)
        assert Model.pretrained(name).arguments["width"] == width
    assert not any(module.training for module in Model.pretrained().modules())


@pytest.mark.parametrize("name", pretrained_names())
def test_model_card_is_complete(name):
    card = read_model_card(name)
    assert {path.name for path in WEIGHTS.glob(f"{name}.*")} == {
        f"{name}.json",
        f"{name}.safetensors",
    }
    assert card.dataset_class == "CIFAR10"
    assert card.fingerprints == CIFAR10.checksums
    assert datetime.fromisoformat(card.finished).tzinfo is not None
    assert card.precision == "fp32"
    assert card.dataset["images"] == {"train": 50_000, "test": 10_000}
    assert card.classes == list(CIFAR10.names)
    assert card.test_images == 10_000
    assert card.file["bytes"] == (WEIGHTS / f"{name}.safetensors").stat().st_size
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
        assert getattr(card, field) not in (None, "", {}), field
    # no paths of the machine that trained the model
    assert "/" not in json.dumps(card.dataset)


@pytest.mark.parametrize("name", pretrained_names())
def test_weights_are_half_precision_and_load_offline(name):
    code = f"""
import socket
def fail(*args, **options): raise OSError("no network")
socket.socket.connect = socket.create_connection = fail
from era_s10.model import Model
model = Model.pretrained({name!r})
print(sum(p.numel() for p in model.parameters()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    size = (WEIGHTS / f"{name}.safetensors").stat().st_size
    assert size < 2.1 * int(done.stdout) + 20_000


def test_damaged_weights_are_rejected(tmp_path, monkeypatch):
    shutil.copytree(WEIGHTS, tmp_path / "weights")
    path = tmp_path / "weights" / "cifar10-width16.safetensors"
    monkeypatch.setattr("era_s10.weights.package_folder", lambda: tmp_path)
    Model.pretrained("cifar10-width16")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="checksum does not match"):
        Model.pretrained("cifar10-width16")


@needs_cifar10
@pytest.mark.parametrize("name", pretrained_names())
def test_pretrained_accuracy_on_1000_test_images(name):
    data = CIFAR10(DATA / "cifar10.npz", batch_size=250)
    data.x_test, data.y_test = data.x_test[:1000], data.y_test[:1000]
    test = Test(Model.pretrained(name), data)
    accuracy = test()[1]
    expected = read_model_card(name).test_accuracy / 100
    standard_error = 100 * (expected * (1 - expected) / 1000) ** 0.5
    assert abs(accuracy - 100 * expected) < 3 * standard_error
    assert len(test.predicted) == 1000


@needs_cifar10
@pytest.mark.parametrize("name", pretrained_names())
def test_evaluate_command_matches_the_model_card(name):
    evaluate = command(
        "era_s10_evaluate", "--pretrained", name, "--data_dir", str(DATA)
    )
    done = subprocess.run(evaluate, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    found = float(done.stdout.split("accuracy ")[1].split("%")[0])
    assert abs(found - read_model_card(name).test_accuracy) <= 0.05


@needs_cifar10
def test_predictions_for_files_match_those_for_arrays(model, tmp_path):
    data = CIFAR10(DATA / "cifar10.npz")
    data.x_test, data.y_test = data.x_test[:200], data.y_test[:200]
    test = Test(model, data)
    test()
    paths = [tmp_path / f"{i}.png" for i in range(200)]
    for path, image in zip(paths, data.x_test, strict=True):
        Image.fromarray(image).save(path)
    predictions, errors = predict(paths, model)
    assert not errors
    assert [p.label for p in predictions] == [data.classes[i] for i in test.predicted]


# ---------------------------------------------------------------- photos in many file formats

PHOTO = Image.fromarray(load_sample_image("flower.jpg"))


def encode(image: Image.Image, form: str, **options) -> bytes:
    "Return the content of an image file."
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


KINDS = {
    "grayscale": ("L", "PNG"),
    "palette": ("P", "PNG"),
    "black and white": ("1", "PNG"),
    "alpha": ("RGBA", "PNG"),
    "grayscale and alpha": ("LA", "PNG"),
    "16-bit grayscale": ("I;16", "PNG"),
    "CMYK": ("CMYK", "JPEG"),
    "BMP": ("RGB", "BMP"),
    "GIF": ("P", "GIF"),
    "TIFF": ("RGB", "TIFF"),
    "WebP": ("RGB", "WEBP"),
    "float TIFF": ("F", "TIFF"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_read_photo_supports_all_image_modes(kind, tmp_path):
    mode, form = KINDS[kind]
    image = PHOTO.convert("L") if mode in ("1", "L", "LA", "I;16", "F") else PHOTO
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    path = tmp_path / "photo"
    path.write_bytes(encode(image.convert(mode) if mode != "I;16" else image, form))
    found = np.asarray(read_photo(path)).astype(int)
    (tmp_path / "plain.png").write_bytes(
        encode(PHOTO.convert("L") if image.mode != "RGB" else PHOTO, "PNG")
    )
    plain = read_photo(tmp_path / "plain.png").astype(int)
    assert found.shape == (32, 32, 3)
    assert np.abs(found - plain).mean() < 12, np.abs(found - plain).mean()


def test_white_level_of_a_float_image_is_that_of_the_uncropped_image(tmp_path):
    values = np.full((32, 96), 255, np.float32)
    values[:, 32:64] = 1  # the center crop could be an image with values in [0, 1]
    Image.fromarray(values).save(tmp_path / "dark.tif")
    assert read_photo(tmp_path / "dark.tif").max() == 1


def test_transparent_pixels_become_white(tmp_path):
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


def test_large_rotated_photo(tmp_path):
    large = PHOTO.resize((3000, 2000)).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    large.save(tmp_path / "rotated.jpg", exif=exif, quality=95)
    PHOTO.save(tmp_path / "plain.png")
    found = read_photo(tmp_path / "rotated.jpg").astype(int)
    plain = read_photo(tmp_path / "plain.png").astype(int)
    assert np.abs(found - plain).mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, tmp_path):
    Transpose = Image.Transpose
    inverse = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_90,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_270,
    }
    image = PHOTO.transpose(inverse[orientation]) if orientation > 1 else PHOTO
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "plain.png").write_bytes(encode(PHOTO, "PNG"))
    plain = read_photo(tmp_path / "plain.png")
    for form in ("PNG", "TIFF"):  # Pillow itself rotates a TIFF
        (tmp_path / "rotated").write_bytes(encode(image, form, exif=exif))
        assert np.array_equal(read_photo(tmp_path / "rotated"), plain)


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 500), (31, 33), (32, 32), (4000, 3000), (9000, 40)]
)
def test_predict_accepts_any_image_size(size, tmp_path, model):
    path = tmp_path / "photo.jpg"
    PHOTO.resize(size).save(path)
    predictions, errors = predict([path], model)
    assert not errors
    assert abs(sum(predictions[0].probabilities.values()) - 1) < 1e-5


def test_predict_command_reports_bad_files_and_classifies_the_others(tmp_path):
    good = tmp_path / "good.jpg"
    PHOTO.save(good)
    bad = {
        "half.jpg": good.read_bytes()[:3000],
        "text.png": b"not a picture",
        "empty.jpg": b"",
        "half.png": encode(PHOTO, "PNG")[:2000],
        "noise.gif": b"GIF89a" + bytes(range(256)),
        "huge.png": encode(Image.new("1", (20_000, 20_000)), "PNG"),
        # no pixel format
        "header.dds": b"DDS " + struct.pack("<I", 124) + bytes(120),
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    names = [*bad, "good.jpg", "missing.jpg"]
    done = subprocess.run(
        [*PREDICT, *names], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stdout.startswith("good.jpg ") and done.stdout.count("\n") == 1
    lines = done.stderr.splitlines()
    assert len(lines) == len(names) - 1
    for name, line in zip([*bad, "missing.jpg"], lines, strict=True):
        assert name in line


def test_photos_with_damaged_exif_data_are_read(tmp_path):
    entries = struct.pack("<HHII", 0x010F, 5, 1, 38)  # camera maker, as a fraction
    entries += struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)  # rotated by 90 degrees
    exif = (
        b"Exif\0\0II*\0"
        + struct.pack("<IH", 8, 2)
        + entries
        + bytes(4)
        + struct.pack("<II", 1, 2)
    )
    rotated = PHOTO.transpose(Image.Transpose.ROTATE_90)
    (tmp_path / "invalid.jpg").write_bytes(
        encode(rotated, "JPEG", exif=exif, quality=95)
    )
    (tmp_path / "junk.jpg").write_bytes(
        encode(PHOTO, "JPEG", exif=b"Exif\0\0MM\0*" + b"\xff" * 50)
    )
    PHOTO.save(tmp_path / "plain.png")
    plain = read_photo(tmp_path / "plain.png").astype(int)
    for name in ("invalid.jpg", "junk.jpg"):
        assert np.abs(read_photo(tmp_path / name) - plain).mean() < 3, name


@pytest.mark.skipif(sys.platform != "linux", reason="file names are valid text there")
def test_predict_command_prints_undecodable_file_names(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    PHOTO.save(tmp_path / name)
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(
        [*PREDICT, name], capture_output=True, text=True, cwd=tmp_path, env=strict
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(r"caf\udce9.png ")
    (tmp_path / "café.png").write_bytes((tmp_path / name).read_bytes())
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*PREDICT, "café.png"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=ascii_only,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(r"caf\xe9.png ")


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes")
def test_predict_command_reads_standard_input_and_rejects_named_pipes(tmp_path):
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


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes")
def test_standard_input_is_limited():
    code = (
        "import era_s10.images as images; images._MAX_BYTES = 1000; "
        "images.read_photo('/dev/stdin')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=bytes(2000),
        capture_output=True,
        timeout=100,
    )
    expected = b"/dev/stdin: can't be read (it has more than 1,000 bytes)"
    assert expected in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes")
def test_predict_command_ends_quietly_when_its_output_is_closed(tmp_path):
    PHOTO.save(tmp_path / "photo.png")
    predict_many = shlex.join([*PREDICT, *["photo.png"] * 2000])
    done = subprocess.run(
        f"{predict_many} | head -1",
        shell=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.stdout.startswith("photo.png ")
    assert done.stderr == ""


def test_size_limit_applies_to_png_but_not_to_jpeg(tmp_path):
    large = Image.new("L", (12_000, 9_000), 200)
    large.save(tmp_path / "large.jpg")
    large.save(tmp_path / "large.png", compress_level=1)
    assert abs(read_photo(tmp_path / "large.jpg").astype(int) - 200).max() <= 1
    with pytest.raises(ValueError, match="has more than 89,478,485 pixels"):
        read_photo(tmp_path / "large.png")


def test_predict_command_escapes_control_characters_in_file_names(tmp_path):
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


def test_package_files_are_found_next_to_a_folder_of_the_same_name(tmp_path):
    (tmp_path / "era_s10" / "nbs").mkdir(parents=True)
    code = "from era_s10.model import Model; print(Model.pretrained('cifar10-width16').card.epochs)\n"
    code += "from era_s10.provenance import describe_code; print(describe_code())"
    outputs = []
    for folder in (tmp_path, Path("/")):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]


def test_show_predictions_draws_one_image_per_file(tmp_path, model):
    path = tmp_path / "photo.png"
    PHOTO.save(path)
    figure = show_predictions([path] * 3, model)
    assert len([ax for ax in figure.axes if ax.images]) == 3


def test_predict_requires_three_channels_and_a_model_card(tmp_path):
    gray = Model(2, in_channels=1)
    gray.card = replace(Model.pretrained().card, mean=[0.5], std=[0.5])
    PHOTO.save(tmp_path / "photo.png")
    with pytest.raises(ValueError, match="three input channels"):
        predict([tmp_path / "photo.png"], gray)
    with pytest.raises(ValueError, match="model card"):
        predict([tmp_path / "photo.png"], Model(2))


def test_predict_runs_in_inference_mode(model, tmp_path):
    PHOTO.save(tmp_path / "photo.png")
    inference_modes = []
    hook = model.register_forward_hook(
        lambda *_: inference_modes.append(torch.is_inference_mode_enabled())
    )
    try:
        predict([tmp_path / "photo.png"], model)
    finally:
        hook.remove()
    assert inference_modes == [True]
    assert torch.is_grad_enabled()
