"""The pretrained weights of the package, predictions on real test images, and photos in many file formats."""

import io
import json
import os
import re
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
from pictures import DATA, STORED_AS, needs_cifar10, write_tree
from PIL import Image
from project import command
from sklearn.datasets import load_sample_image

from era_s10.backprop import Test
from era_s10.cli import train
from era_s10.cli_inference import evaluate, match_training
from era_s10.cli_inference import predict as predict_command
from era_s10.datasets.cifar10 import CIFAR10
from era_s10.datasets.digits import Digits
from era_s10.datasets.generic import MyDataSet
from era_s10.datasets.mnist import MNIST
from era_s10.images import read_image
from era_s10.model import Model
from era_s10.predict import predict, show_predictions
from era_s10.run_folder import load_run, read_config
from era_s10.speed import FastModel
from era_s10.weights import PRETRAINED, pretrained_names, read_model_card

WEIGHTS = Path(str(files("era_s10"))) / "weights"
PREDICT = command("era_s10_predict", "--weights", "cifar10-width16")


@pytest.fixture(scope="module")
def model() -> Model:
    "Return the narrow pretrained model, which is fast."
    return Model.pretrained("cifar10-width16")


# ---------------------------------------------------------------- pretrained weights


def test_pretrained_models_load():
    widths = {n: Model.pretrained(n).arguments["width"] for n in pretrained_names()}
    assert widths == {"cifar10": 64, "cifar10-fast": 128, "cifar10-width16": 16}
    assert isinstance(Model.pretrained("cifar10-fast"), FastModel)
    assert PRETRAINED == "cifar10"
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
from era_s10.speed import FastModel
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
def test_read_image_supports_all_image_modes(kind, tmp_path):
    mode, form = KINDS[kind]
    image = PHOTO.convert("L") if mode in ("1", "L", "LA", "I;16", "F") else PHOTO
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    path = tmp_path / "photo"
    path.write_bytes(encode(image.convert(mode) if mode != "I;16" else image, form))
    found = np.asarray(read_image(path, size=32)).astype(int)
    (tmp_path / "plain.png").write_bytes(
        encode(PHOTO.convert("L") if image.mode != "RGB" else PHOTO, "PNG")
    )
    plain = read_image(tmp_path / "plain.png", size=32).astype(int)
    assert found.shape == (32, 32, 3)
    assert np.abs(found - plain).mean() < 12, np.abs(found - plain).mean()


def test_white_level_of_a_float_image_is_that_of_the_uncropped_image(tmp_path):
    values = np.full((32, 96), 255, np.float32)
    values[:, 32:64] = 1  # the center crop could be an image with values in [0, 1]
    Image.fromarray(values).save(tmp_path / "dark.tif")
    assert read_image(tmp_path / "dark.tif", size=32).max() == 1


def test_transparent_pixels_become_white(tmp_path):
    half = PHOTO.convert("RGBA")
    half.putalpha(Image.new("L", PHOTO.size, 128))
    half.save(tmp_path / "half.png")
    PHOTO.save(tmp_path / "plain.png")
    plain = read_image(tmp_path / "plain.png", size=32).astype(float)
    assert (
        np.abs(read_image(tmp_path / "half.png", size=32) - (plain + 255) / 2).max()
        <= 2
    )
    clear = PHOTO.convert("LA")
    clear.putalpha(Image.new("L", PHOTO.size, 0))
    clear.save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png", size=32) == 255).all()


def test_large_rotated_photo(tmp_path):
    large = PHOTO.resize((3000, 2000)).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    large.save(tmp_path / "rotated.jpg", exif=exif, quality=95)
    PHOTO.save(tmp_path / "plain.png")
    found = read_image(tmp_path / "rotated.jpg", size=32).astype(int)
    plain = read_image(tmp_path / "plain.png", size=32).astype(int)
    assert np.abs(found - plain).mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, tmp_path):
    image = PHOTO.transpose(STORED_AS[orientation]) if orientation > 1 else PHOTO
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "plain.png").write_bytes(encode(PHOTO, "PNG"))
    plain = read_image(tmp_path / "plain.png", size=32)
    for form in ("PNG", "TIFF"):  # Pillow itself rotates a TIFF
        (tmp_path / "rotated").write_bytes(encode(image, form, exif=exif))
        assert np.array_equal(read_image(tmp_path / "rotated", size=32), plain)


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
    plain = read_image(tmp_path / "plain.png", size=32).astype(int)
    for name in ("invalid.jpg", "junk.jpg"):
        assert np.abs(read_image(tmp_path / name, size=32) - plain).mean() < 3, name


@pytest.mark.slow
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


@pytest.mark.slow
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
    assert b"pipe.png: is a named pipe, not a file" in read.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes")
def test_standard_input_is_limited():
    code = (
        "import era_s10.images as images; images._MAX_BYTES = 1000; "
        "images.read_image('/dev/stdin')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=bytes(2000),
        capture_output=True,
        timeout=100,
    )
    expected = b"/dev/stdin: has more than 1,000 bytes"
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
    assert abs(read_image(tmp_path / "large.jpg", size=32).astype(int) - 200).max() <= 1
    with pytest.raises(ValueError, match="has more than 89,478,485 pixels"):
        read_image(tmp_path / "large.png", size=32)


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_predict_requires_a_model_card_and_one_or_three_channels(tmp_path):
    wrong = Model(2, in_channels=4)
    wrong.card = replace(Model.pretrained().card, mean=[0.5] * 4, std=[0.5] * 4)
    PHOTO.save(tmp_path / "photo.png")
    with pytest.raises(ValueError, match=r"one or three channels \(got 4\)"):
        predict([tmp_path / "photo.png"], wrong)
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


# ---------------------------------------------------------------- folders, grayscale, sizes


def test_predict_accepts_folders_and_skips_strays(tmp_path, model):
    for name in ("b.png", "a.jpg", "sub/c.webp", "__MACOSX/._a.jpg"):
        (tmp_path / "H1" / name).parent.mkdir(parents=True, exist_ok=True)
        PHOTO.resize((50, 40)).save(tmp_path / "H1" / name)
    for name in ("Thumbs.db", ".DS_Store", "notes.txt", "sub/desktop.ini"):
        (tmp_path / "H1" / name).write_bytes(b"junk")
    (tmp_path / "empty").mkdir()
    found, errors = predict(tmp_path / "H1", model)
    assert not errors
    names = [Path(one.file).relative_to(tmp_path).as_posix() for one in found]
    assert names == ["H1/a.jpg", "H1/b.png", "H1/sub/c.webp"]
    assert predict([tmp_path / name for name in names], model)[0] == found
    _, errors = predict([tmp_path / "empty", tmp_path / "H1"], model)
    assert errors == {
        str(tmp_path / "empty"): f"{tmp_path / 'empty'}: no images in this folder"
    }
    assert (
        len([a for a in show_predictions(tmp_path / "H1", model).axes if a.images]) == 3
    )


def test_predict_command_reads_folders_and_counts_what_it_skips(tmp_path):
    (tmp_path / "H1").mkdir()
    PHOTO.save(tmp_path / "H1" / "photo.png")
    (tmp_path / "H1" / "Thumbs.db").write_bytes(b"junk")
    (tmp_path / "H1" / "archive.png").write_bytes(b"PK\3\4junk")
    os.mkfifo(tmp_path / "H1" / "pipe.png")
    done = subprocess.run(
        [*PREDICT, "H1"], capture_output=True, text=True, cwd=tmp_path, timeout=100
    )
    assert done.returncode == 1
    assert done.stdout.startswith("H1/photo.png  ") and done.stdout.count("\n") == 1
    lines = [
        line.removeprefix("era_s10_predict: ") for line in done.stderr.splitlines()
    ]
    assert lines == [
        "skipped 1: Thumbs.db",
        "H1/pipe.png is a named pipe",
        "H1/archive.png: not an image in a format that Pillow reads "
        "(it is a ZIP archive)",
    ]


class Sum(torch.nn.Module):
    "Model whose first logit is the mean of its input, of any shape."

    def forward(self, x):
        self.seen = x
        return torch.stack([x.mean((1, 2, 3)), x.mean((1, 2, 3)) * 0], 1)


def stub(channels: int, **dataset) -> Sum:
    "Return a model that records its input, with a card."
    model = Sum()
    card = Model.pretrained("cifar10-width16").card
    numbers = {"mean": [0.0] * channels, "std": [1.0] * channels, "classes": ["a", "b"]}
    model.card = replace(card, dataset={"class": "MyDataSet", **dataset}, **numbers)
    return model


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [[48, 64], [64, 64], None])
def test_predict_resizes_to_the_size_that_the_run_records(
    size, channels, fit, tmp_path
):
    PHOTO.save(tmp_path / "photo.png")
    recorded = {} if size is None else {"size": size, "fit": fit}
    model = stub(channels, **recorded)
    predict([tmp_path / "photo.png"], model, device="cpu")
    shape, fit = tuple(size or (32, 32)), fit if size else "crop"
    pixels = read_image(tmp_path / "photo.png", channels, shape, fit)
    assert np.array_equal(
        model.seen[0].permute(1, 2, 0).numpy(), pixels / np.float32(255)
    )


def test_predict_gives_mnist_models_gray_photos_with_their_border(tmp_path):
    PHOTO.save(tmp_path / "H2.png")
    model = stub(1, **{"class": "MNIST"})
    predict([tmp_path / "H2.png"], model, device="cpu")
    x = (model.seen[0, 0] * 255).round().numpy().astype(np.uint8)
    assert np.array_equal(x[2:-2, 2:-2], read_image(tmp_path / "H2.png", 1, 28)[..., 0])
    assert x.shape == (32, 32)
    assert not x[:2].any() and not x[-2:].any() and not x[:, [0, 1, -2, -1]].any()
    figure = show_predictions([tmp_path / "H2.png"], model)
    assert figure.axes[0].images[0].get_array().shape == (32, 32, 3)


def test_predict_reads_in_batches_that_fit_the_memory(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    small, large = stub(3), stub(1, size=[256, 256])
    predict([tmp_path / "a.png"] * 257, small, device="cpu")
    assert len(small.seen) == 1  # after a batch of 256
    predict([tmp_path / "a.png"] * 6, large, device="cpu")
    assert len(large.seen) == 2


# ---------------------------------------------------------------- evaluate on other images


def digits(channels: int) -> tuple:  # x_train, y_train, x_test, y_test
    "Return 400 + 360 digits with one or three channels."
    data = Digits()
    train, test = (x[..., :channels] for x in (data.x_train[:400], data.x_test))
    return train, data.y_train[:400], test, data.y_test


def save(path: Path, arrays: tuple) -> Path:
    "Write an `.npz` file."
    np.savez(path, **dict(zip(KEYS, arrays, strict=True)))
    return path


WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
KEYS = ("x_train", "y_train", "x_test", "y_test")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    "Train on the same digits as a grayscale .npz, and as folders with names."
    place = tmp_path_factory.mktemp("runs")
    gray = digits(1)
    save(place / "gray.npz", gray)
    save(place / "color.npz", digits(3))
    write_tree(place / "words", *gray, WORDS)
    write_tree(place / "numbers", *gray, list("0123456789"))
    quick = {"epochs": 3, "width": 4, "batch_size": 32, "max_lr": 0.05, "device": "cpu"}
    for name in ("gray.npz", "words"):
        run = place / f"run-{Path(name).stem}"
        train(str(place / name), folder=str(run), **quick)
    return place


def evaluated(capsys, *options: str) -> tuple[float, str]:
    "Run era_s10_evaluate; return the accuracy and all that it printed."
    capsys.readouterr()
    evaluate.main([*map(str, options), "--device", "cpu"])
    out = capsys.readouterr().out
    return float(re.search(r"accuracy (\d+\.\d\d)%", out)[1]), out


def evaluation_error(capsys, *options: str) -> str:
    "Run era_s10_evaluate, which fails; return its message of one line."
    capsys.readouterr()
    with pytest.raises(SystemExit) as status:
        evaluate.main([*map(str, options), "--device", "cpu"])
    message = capsys.readouterr().err
    assert status.value.code == 2 and message.count("\n") == 1, message
    return message


@pytest.mark.slow
def test_a_model_for_gray_images_is_evaluated_on_color_images_in_gray(runs, capsys):
    own, out = evaluated(capsys, runs / "run-gray")
    assert "converted" not in out
    for data in ("color.npz", "numbers"):
        found, out = evaluated(capsys, runs / "run-gray", "--dataset", runs / data)
        assert found == own and "images  converted to grayscale for the model" in out


@pytest.mark.slow
def test_only_the_red_channel_is_not_enough(runs, tmp_path, capsys):
    x_train, y_train, x_test, y_test = digits(3)
    red = np.random.default_rng(0).integers(0, 256, x_test.shape, np.uint8)
    for k in (1, 2):  # gray is known from all channels, red is noise
        red[..., k] = x_test[..., 0]
    save(tmp_path / "C2.npz", (x_train, y_train, red, y_test))
    found, _ = evaluated(capsys, runs / "run-gray", "--dataset", tmp_path / "C2.npz")
    gray = np.stack([np.asarray(Image.fromarray(one).convert("L")) for one in red])
    save(tmp_path / "L.npz", (x_train[..., :1], y_train, gray[..., None], y_test))
    assert (
        found
        == evaluated(capsys, runs / "run-gray", "--dataset", tmp_path / "L.npz")[0]
    )


def test_a_color_model_is_evaluated_on_gray_images(runs, capsys):
    own, _ = evaluated(capsys, runs / "run-words")
    folders = MyDataSet(runs / "words")
    matched = match_training(folders, read_config(runs / "run-words"), "words")
    assert matched.x_test.shape[-1] == 3
    found, out = evaluated(
        *(capsys, runs / "run-words", "--dataset", runs / "gray.npz"),
        *("--classes", *WORDS),
    )
    assert found == own and "three equal channels" in out
    assert "here -> in the model: 0 -> zero, 1 -> one" in out


def test_numbers_and_names_are_matched_only_by_a_given_mapping(runs, capsys):
    own, _ = evaluated(capsys, runs / "run-gray")
    before = sorted((runs / "run-gray").iterdir())
    message = evaluation_error(capsys, runs / "run-gray", "--dataset", runs / "words")
    assert "its classes differ from the model's (got eight, five, four" in message  # C3
    assert "expected 0, 1, 2" in message and "--classes" in message
    message = evaluation_error(
        capsys, runs / "run-words", "--dataset", runs / "gray.npz"
    )
    assert "its classes differ from the model's (got 0, 1, 2" in message
    mapping = [str(WORDS.index(name)) for name in sorted(WORDS)]
    to_words = (runs / "run-gray", "--dataset", runs / "words", "--classes")
    found, out = evaluated(capsys, *to_words, *mapping)
    assert found == own
    assert (
        "classes matched by --classes, here -> in the model: eight -> 8, five -> 5"
        in out
    )
    for wrong, expected in (
        (mapping[:3], "--classes: needs 10 names, for eight, five"),
        ([*mapping[:9], "ten"], "--classes: unknown class 'ten'; the model has 0, 1"),
    ):
        assert expected in evaluation_error(capsys, *to_words, *wrong)
    assert "--classes: has no effect" in evaluation_error(
        capsys, "--pretrained", "--classes", "a"
    )
    assert {p.name for p in before} <= {p.name for p in (runs / "run-gray").iterdir()}


def test_classes_in_another_order_are_matched_by_name(runs, tmp_path, capsys):
    own, _ = evaluated(capsys, runs / "run-gray")
    order = np.array([3, 1, 2, 0, 4, 5, 6, 7, 9, 8])
    data = Digits().with_classes([str(i) for i in order])
    data.y_test = np.argsort(order)[data.y_test]
    settings = read_config(runs / "run-gray")
    capsys.readouterr()
    matched = match_training(data, settings, "digits")
    assert list(matched.classes) == list("0123456789")
    assert (matched.y_test == Digits().y_test).all() and matched.x_test.shape[-1] == 1
    out = capsys.readouterr().out
    assert "by name, label here -> in the model: 3 0 -> 3, 0 3 -> 0, 9 8 -> 9" in out
    assert own > 30


def test_a_subset_of_the_classes_needs_a_mapping(runs, tmp_path, capsys):
    x_train, y_train, x_test, y_test = digits(1)
    few = [(x[y < 2], y[y < 2]) for x, y in ((x_train, y_train), (x_test, y_test))]
    save(tmp_path / "few.npz", (*few[0], *few[1]))
    options = runs / "run-gray", "--dataset", tmp_path / "few.npz"
    assert "its classes differ" in evaluation_error(capsys, *options)
    _, out = evaluated(capsys, *options, "--classes", "0", "1")
    assert f"{len(few[1][0])} images" in out


@pytest.mark.slow
def test_data_that_moved_is_found_where_the_option_says(runs, tmp_path, capsys):
    for name in ("gray.npz", "words"):
        run = tmp_path / f"run-{Path(name).stem}"
        shutil.copytree(runs / run.name, run)
        own, _ = evaluated(capsys, run)
        moved = tmp_path / "R1" / name
        moved.parent.mkdir(exist_ok=True)
        (runs / name).rename(moved)
        try:
            message = evaluation_error(capsys, run)
            assert "its data is no longer at" in message and "--data_dir" in message
            assert evaluated(capsys, run, "--data_dir", moved)[0] == own
            message = evaluation_error(capsys, run, "--data_dir", tmp_path / "no")
            assert f"--data_dir: {tmp_path / 'no'} not found" in message
        finally:
            moved.rename(runs / name)


def test_predict_command_classifies_photos_with_a_grayscale_run(runs, tmp_path, capsys):
    images = MyDataSet(runs / "gray.npz")
    files = [tmp_path / f"{i}.png" for i in range(50)]
    for path, image in zip(files, images.x_test, strict=False):
        Image.fromarray(np.repeat(image, 3, -1)).save(path)
    predict_command.main(
        [
            str(tmp_path),
            "--weights",
            str(runs / "run-gray"),
            "--device",
            "cpu",
            "--top",
            "1",
        ]
    )
    lines = sorted(
        capsys.readouterr().out.splitlines(), key=lambda x: int(Path(x.split()[0]).stem)
    )
    network, _, _ = load_run(runs / "run-gray")
    test = Test(network, images)
    test()
    assert [line.split()[1] for line in lines] == [str(i) for i in test.predicted[:50]]


@pytest.mark.slow
def test_predict_command_classifies_photos_with_a_run_on_mnist(
    any_images, tmp_path, capsys
):
    x_train, y_train, x_test, y_test = digits(1)
    small = (x_train[:, 2:-2, 2:-2, 0], y_train, x_test[:, 2:-2, 2:-2, 0], y_test)
    save(tmp_path / "mnist.npz", small)
    where = {"data_dir": str(tmp_path), "folder": str(tmp_path / "H2"), "device": "cpu"}
    train("mnist", epochs=1, width=4, offline=True, **where)
    Image.fromarray(small[2][0]).save(tmp_path / "digit.png")
    capsys.readouterr()
    options = ["--weights", str(tmp_path / "H2"), "--device", "cpu", "--json_lines"]
    predict_command.main([str(tmp_path / "digit.png"), *options])
    found = json.loads(capsys.readouterr().out)["probabilities"]
    network, _, settings = load_run(tmp_path / "H2")
    data = MNIST(tmp_path)
    with torch.inference_mode():
        x = (
            torch.from_numpy(data.x_test[:1]).permute(0, 3, 1, 2) / 255 - 0.1307
        ) / 0.3081
        expected = network.eval()(x).softmax(1)[0]
    assert found == pytest.approx(
        {str(i): float(p) for i, p in enumerate(expected)}, abs=1e-4
    )
