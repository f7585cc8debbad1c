"""Options that need no images to be checked are checked before an image is read, and named as the user wrote them."""

import shlex
from collections.abc import Callable
from pathlib import Path

import albumentations as A
import pytest
from pictures import photographs, save_image, sort_by_class
from PIL import Image

from era_s10 import cli
from era_s10.datasets.generic import MyDataSet

COMMANDS = {
    "train": cli.train.main,
    "lr_find": cli.lr_find.main,
    "study": cli.study.main,
    "evaluate": cli.evaluate.main,
    "predict": cli.predict.main,
}
TRAP = "not an image"  # what a command says if it reads one of the files


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:  # working directory of the commands
    "Write a finished run, whose images are then replaced by text, and tables of them."
    folder = tmp_path_factory.mktemp("place")
    paths = [folder / f"photos/{n}/{i}.png" for n in ("cat", "dog") for i in range(6)]
    for path, pixels in zip(paths, photographs(), strict=False):
        save_image(path, pixels)
    run = {"epochs": 1, "width": 2, "max_lr": 0.02, "folder": str(folder / "run")}
    cli.train(str(folder / "photos"), **run)
    for path in paths:
        path.write_text("a trap")
    for table, names in {"photos": ("cat", "dog"), "others": ("x", "y")}.items():
        rows = [f"{path},{names[path.parent.name == 'dog']}" for path in paths]
        (folder / f"{table}.csv").write_text("\n".join(["path,label", *rows]))
    sort_by_class(folder / "others", [(p, p.parent.name[::-1]) for p in paths])
    (folder / "file").write_text("in the way")
    return folder


@pytest.fixture
def say(place, monkeypatch, capsys) -> Callable[[str, str], str]:
    "Return a function that runs a command which fails, and returns its message."
    monkeypatch.chdir(place)

    def run(command: str, options: str) -> str:
        with pytest.raises(SystemExit) as ended:
            COMMANDS[command](shlex.split(options))
        assert ended.value.code in (1, 2)
        return capsys.readouterr().err

    return run


STARTS = {
    "train": "--dataset photos",
    "train, table": "--dataset photos.csv",
    "train, resume": "--resume run",
    "lr_find": "--dataset photos",
    "study": "--dataset photos --runs 1",
    "evaluate": "run",
    "evaluate, other images": "run --dataset photos.csv",
    "predict": "photos",
}


@pytest.mark.parametrize("start", STARTS)
def test_the_trap_works(start, say):
    assert TRAP in say(start.partition(",")[0], STARTS[start])


DATA = {
    "--augment flop": "--augment: unknown name 'flop'",
    "--backend x": "unknown backend 'x'",
    "--workers -1": "--workers must be an integer >= 0",
    "--batch_size 0": "--batch_size must be an integer >= 1",
    "--size 16": "--size must be at least 32",
    "--size 31": "--size must be at least 32",
    "--size 64x24": "--size must be at least 32",
    "--size 0": "--size must be an integer from 1",
    "--size big": "--size must be an integer from 1",
    "--fit squeeze": "unknown fit 'squeeze'",
    "--width 0": "--width must be an integer >= 1",
    "--device foo": "--device: 'foo' is not available",
    "--recipe foo": "unknown recipe 'foo'",
    "--no_cache --verify_cache": "--verify_cache: has no effect",
    "--data_dir here": "--data_dir: has no effect",
}
RECIPE = {
    "--optimizer Foo": "unknown optimizer 'Foo'",
    """--optimizer_options '{"bar": 1}'""": "--optimizer_options: ",
    """--optimizer SGD --optimizer_options '{"bar": 1}'""": "--optimizer_options: ",
    "--dropout 1": "--dropout must be",
}
LENGTH = {
    "--epochs 0": "--epochs must be an integer >= 1",
    "--parts 0": "--parts must be an integer >= 1",
    "--parts 8 --batch_size 7": "--parts: a batch of 7 images has at most",
    "--precision foo": "--precision must be one of",
    "--checkpoint_seconds -1": "seconds",
    "--checkpoint_steps 0": "steps",
    """--changes '{"drop_transforms": ["Foo"]}'""": "no transform 'Foo'",
    """--changes '{"label_smoothing": 2}'""": "label_smoothing must be",
    """--changes '{"foo": 2}'""": "unknown field 'foo'",
}
TRAIN = {
    "--seed -1": "--seed must be",
    "--limit 0": "--limit must be an integer >= 1",
    "--validation 1": "--validation must be",
    "--max_lr 0": "--max_lr must be positive",
    "--target 101": "--target",
    "--target 90 --target_patience 0": "--target_patience must be",
    "--target_patience 2": "--target_patience: has no effect",
    "--schedule Foo": "unknown schedule 'Foo'",
    """--schedule_options '{"foo": 1}'""": "--schedule_options: ",
    """--schedule StepLR --schedule_options '{"foo": 1}'""": "--schedule_options: ",
    "--folder file/run": "--folder: ",
    "--folder ''": "--folder: is empty",
    "--allow_mismatch": "--allow_mismatch: has no effect",
}
RESUME = {
    "--device foo": "--device: 'foo' is not available",
    "--epochs 0": "--epochs must be an integer >= 1",
    "--workers -1": "--workers must be an integer >= 0",
    "--checkpoint_steps 0": "steps",
    "--width 3": "--width: cannot be given with --resume",
    "--data_dir nowhere": "--data_dir: nowhere not found",
}
FINDER = {
    "--seed -1": "--seed must be",
    "--end 0": "--end must be above 1e-07",
    "--steps 3": "--steps must be an integer >= 10",
    "--figure a.foo": "figure",
    "--figure ''": "--figure: is empty",
    "--figure file/a.png": "file",
}
STUDY = {
    "--runs 0": "--runs must be an integer >= 1",
    "--first_seed -1": "--first_seed must be an integer",
    "--folder file/study": "--folder: ",
}
EVALUATE = {
    "--tta 3": "--tta must be 1, 2 or 6",
    "--tta 0": "--tta must be an integer >= 1",
    "--device foo": "--device: 'foo' is not available",
    "--batch_size 0": "--batch_size must be an integer >= 1",
    "--workers -1": "--workers must be an integer >= 0",
    "--classes cat": "--classes: needs 2 names",
    "--classes cat cow": "--classes: unknown class 'cow'",
    "--dataset others": "its classes differ from the model's",
    "--dataset others.csv": "its classes differ from the model's",
    "--dataset others.csv --classes cat": "--classes: needs 2 names",
    "--dataset mnist --offline": "its classes differ from the model's",
    "--dataset nowhere": "unknown dataset 'nowhere'",
    "--pretrained": "set either the folder",
}
PREDICT = {
    "--tta 3": "--tta must be 1, 2 or 6",
    "--device foo": "--device: 'foo' is not available",
    "--top 0": "--top must be an integer >= 1",
    "--top 2 --json_lines": "--top: has no effect",
    "--weights foo": "unknown model 'foo'",
    "--weights ''": "--weights: is empty",
    "''": "error: files: is empty",
}
CASES = [
    *(("train", option, words) for option, words in (DATA | RECIPE | LENGTH).items()),
    *(("train, table", option, words) for option, words in DATA.items()),
    *(("train", option, words) for option, words in TRAIN.items()),
    *(("train, resume", option, words) for option, words in RESUME.items()),
    *(("lr_find", option, words) for option, words in (DATA | RECIPE | FINDER).items()),
    *(("study", option, words) for option, words in (DATA | LENGTH | STUDY).items()),
    *(("evaluate", option, words) for option, words in EVALUATE.items()),
    *(("predict", option, words) for option, words in PREDICT.items()),
]


@pytest.mark.parametrize(("start", "option", "words"), CASES)
def test_a_wrong_option_is_named_before_an_image_is_read(start, option, words, say):
    message = say(start.partition(",")[0], f"{STARTS[start]} {option}")
    assert words in message
    assert TRAP not in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"augmentation": "flop"}, "augmentation: unknown name 'flop'"),
        ({"augmentation": ["flip"]}, "augmentation must hold"),
        ({"augmentation": [A.Normalize()]}, "must not hold Normalize"),
        ({"augmentation": 3}, "augmentation must be a list"),
        ({"backend": "x"}, "unknown backend 'x'"),
        ({"limit": 0}, "limit must be"),
        ({"limit": 2.5}, "limit must be"),
        ({"validation": "a"}, "validation must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
@pytest.mark.parametrize("name", ["photos", "photos.csv"])
def test_arguments_are_checked_before_an_image_is_read(name, options, words, place):
    with pytest.raises(ValueError, match=TRAP):
        MyDataSet(place / name)
    with pytest.raises(ValueError, match=words):
        MyDataSet(place / name, **options)


# ---------------------------------------------------------------- names of options


@pytest.mark.parametrize(
    "name", ["cifar10", "cifar100", "mnist", "fashion-mnist", "svhn"]
)
@pytest.mark.parametrize("command", ["train", "lr_find", "study"])
def test_a_command_says_how_to_download(command, name, say, tmp_path):
    message = say(command, f"--dataset {name} --offline --data_dir {tmp_path}")
    assert "leave out --offline" in message
    assert "download=True" not in message


def test_a_command_downloads_for_evaluation_unless_offline(
    place, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    run = {"limit": 30, "epochs": 1, "width": 2, "max_lr": 0.1, "folder": "run"}
    cli.train("digits", **run)
    given = []

    def load(name, place=None, **options):
        given.append((name, place, options.get("download", False)))
        raise FileNotFoundError(f"{name} is not here; pass download=True")

    monkeypatch.setattr("era_s10.cli_inference.make_dataset", load)
    for more in ({}, {"offline": True}, {"data_dir": "d"}):
        with pytest.raises(FileNotFoundError):
            cli.evaluate("run", dataset="mnist", **more)
    with pytest.raises(FileNotFoundError):
        cli.evaluate("run")
    assert given == [
        ("mnist", None, True),
        ("mnist", None, False),
        ("mnist", "d", True),
        ("digits", None, False),
    ]


def test_an_option_that_solves_a_problem_is_named(say, tmp_path):
    for i, pixels in enumerate(photographs()[:8]):
        path = tmp_path / "sizes" / "ab"[i % 2] / f"{i}.png"
        save_image(path, Image.fromarray(pixels).resize((32 + i // 4, 40)))
    message = say("train", f"--dataset {tmp_path / 'sizes'} --size stored")
    assert "; set --size to resize all images" in message


@pytest.mark.parametrize("moved", ["images", "all"])
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_data_that_moved_is_found_with_data_dir(command, moved, tmp_path, say):
    old, new, run = tmp_path / "old", tmp_path / "new", tmp_path / "run"
    for i, pixels in enumerate(photographs()[:12]):
        save_image(old / f"photos/{i}.png", pixels)
    rows = [f"photos/{i}.png,{'ab'[i % 2]}" for i in range(12)]
    (old / "t.csv").write_text("\n".join(["path,label", *rows]))
    options = {"epochs": 1, "width": 2, "max_lr": 0.1, "folder": str(run)}
    cli.train(str(old / "t.csv"), **options)
    old.rename(new)
    if moved == "images":
        old.mkdir()
        (old / "t.csv").write_text((new / "t.csv").read_text())
    start = {"train": f"--resume {run}", "evaluate": str(run)}[command]
    message = say(command, start)
    assert "set --data_dir" in message
    assert ("not found" if moved == "images" else "no longer") in message
    COMMANDS[command]([*shlex.split(start), "--data_dir", str(new / "t.csv")])


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_files_of_a_named_dataset_that_moved(
    command, place, tmp_path, say, monkeypatch
):
    def missing(*args, **options):
        raise FileNotFoundError("MNIST is not in here")

    for module in ("cli", "cli_inference"):
        monkeypatch.setattr(f"era_s10.{module}.make_dataset", missing)
    start = {"train": "--resume run", "evaluate": "run"}[command]
    message = say(command, start)
    assert "MNIST is not in here; if the data has moved, set --data_dir" in message
    message = say(command, f"{start} --data_dir photos")
    assert "MNIST is not in here\n" in message
