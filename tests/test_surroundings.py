"""Tests of what surrounds a run: names, figures, outputs, paths, threads, other devices; no result is lost.

Commands run in forked children of the test process, with files of their own as stdout and stderr."""

import functools
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forks import new_interpreter
from pictures import files, save_image
from PIL import Image
from project import hide_gpus, run_python, run_script

from era_s10 import cli, cli_inference, run_folder
from era_s10 import files as files_module
from era_s10.backprop import Experiment
from era_s10.bench import bench
from era_s10.checkpoint import Checkpoints, load_checkpoint, save_checkpoint
from era_s10.cpu import bf16_instructions
from era_s10.datasets.digits import Digits
from era_s10.files import new_folder, quote_path, user_path
from era_s10.model import Model
from era_s10.plots import image_grid, plain_text, plot_style
from era_s10.preflight import preserve_epoch
from era_s10.recipe import Config
from era_s10.results import show_confident_mistakes, show_confusion, show_per_class
from era_s10.run_folder import (
    check_figure,
    check_new,
    check_writable,
    draw_misclassified,
    load_run,
    save_figures,
)
from era_s10.sources import data_folder
from era_s10.study import ablation, plot_ablation, plot_runs, read_records
from era_s10.utils import one_thread_at_a_time, preserve_random_state, set_seed
from era_s10.weights import load_weights, save_weights

STUDIES = Path(__file__).parent.parent / "nbs" / "results"
TINY = "--dataset digits --limit 60 --batch_size 20 --epochs 1 --width 2 --max_lr 0.02"
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    "Use one thread; forked processes can't use more."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def in_child(
    call: Callable[[], object],  # what the child does
    out: int | None = None,  # file for stdout; None for a file that is returned
    err: int | None = None,  # file for stderr
    closed: tuple[int, ...] = (),  # standard files that are closed
    encoding: str = "utf-8",  # of stdout and stderr
    folder: Path | None = None,  # working directory
) -> SimpleNamespace:  # status, out, err
    "Call a function in a forked process with its own stdout and stderr, like a command."
    kept = [open(os.memfd_create(name), "rb") for name in ("out", "err")]  # noqa: SIM115
    pid = os.fork()
    if pid == 0:
        hide_gpus()
        try:
            os.setsid()
            os.chdir(folder or ".")
            for number, given, file in ((1, out, kept[0]), (2, err, kept[1])):
                os.dup2(file.fileno() if given is None else given, number)
            for number in closed:
                os.close(number)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            streams = [
                None
                if number in closed
                else io.TextIOWrapper(
                    io.BufferedWriter(io.FileIO(number, "wb", closefd=False)),
                    encoding,
                    line_buffering=number == 2,
                )
                for number in (1, 2)
            ]
            sys.stdout, sys.stderr = streams
            sys.__stdout__, sys.__stderr__ = streams
            status = 0
            try:
                call()
            except SystemExit as error:
                status = error.code
            except BaseException:
                text = traceback.format_exc()
                if sys.stderr is not None:
                    sys.stderr.write(text)
                status = 99
            for stream in streams:
                if stream is not None:
                    stream.flush()  # as the interpreter does at its end
            os._exit(status or 0)
        finally:
            os._exit(120)
    _, status = os.waitpid(pid, 0)
    texts = []
    for file in kept:
        file.seek(0)
        texts.append(file.read().decode(encoding))
        file.close()
    return SimpleNamespace(
        status=os.waitstatus_to_exitcode(status), out=texts[0], err=texts[1]
    )


def closed_pipe() -> int:
    "Return the writing end of a pipe that nobody reads, as after `| head`."
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def is_complete(run: Path) -> bool:
    "Return whether a run has its weights and figures."
    return {"weights.safetensors", "history.jsonl", "test.png"} <= set(files(run))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    "Return the folder of a finished run on a few digits."
    folder = tmp_path_factory.mktemp("finished") / "run"
    cli.train("digits", limit=60, batch_size=20, epochs=1, width=2, max_lr=0.02, folder=str(folder))  # fmt: skip
    return folder


# ---------------------------------------------------------------- names in figures

NAMES = {
    "dollars": "save $5 #1",
    "two dollars": "$5 or $9",
    "formula": r"$\frac$",
    "good formula": "$x^2$",
    "escaped dollar": r"a\$b",
    "markup": r"a_b^c {x} \alpha # 50% & ~",
    "newline": "two\nlines\r\n",
    "control characters": "a\x1b[2J\x00\u202eb",
    "very long": "w" * 300,
    "long words": "a photo of " * 30,
    "hebrew": "שלום",
    "arabic": "سلام می‌شود",
    "chinese": "猫の写真",
    "emoji": "👍🏽 👨‍👩‍👧",
    "undecodable": "caf\udce9",
    "empty": "",
    "space": " ",
    "hidden label": "_nolegend",
    "placeholder": "{} %s %(x)s",
}


DIGITS = Digits(limit=60)
RECORDS = read_records(STUDIES / "width16-6-modern" / "runs.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_any_class_name_can_be_drawn(name, tmp_path):
    digits = DIGITS
    dataset = digits.with_classes([f"{name}{i}" if i else name for i in range(10)])
    predicted = (digits.y_test + 1) % 10
    logits = np.eye(10, dtype=np.float32)[predicted]
    groups = {name: RECORDS[:2], f"{name}2": RECORDS[:2]}
    figures = {
        "misclassified": draw_misclassified(dataset, predicted, n=2),
        "confusion": show_confusion(predicted, dataset),
        "per_class": show_per_class(predicted, dataset),
        "mistakes": show_confident_mistakes(logits, dataset, n=2),
        "grid": image_grid(digits.x_test[:2], [name] * 2, row_labels=[name], title=name),
        "runs": plot_runs(groups, seconds=False),
        "ablation": plot_ablation(ablation(groups, name)),
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(save_figures(tmp_path, figures)) == len(figures)
        if name == NAMES["dollars"]:
            save_figures(tmp_path, figures, ".svg")
            save_figures(tmp_path, {"one": figures["confusion"]}, ".pdf")
    if name.isascii() and name.isprintable() and len(name) < 12:
        shown = [label.get_text() for label in figures["confusion"].axes[0].get_yticklabels()]  # fmt: skip
        assert shown[:2] == [name, f"{name}1"]
        assert any(
            name in text.get_text() for text in figures["runs"].axes[0].texts
        ) or (not name)
    for figure in figures.values():
        assert max(figure.get_size_inches()) < 15


def test_a_run_with_dollars_in_class_names_is_complete(tmp_path, capsys):
    "Case F7: training, resuming, evaluating and predicting."
    draw = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("save $5 #1", "save $9 #2"):
            for i in range(4):
                image = draw.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                save_image(tmp_path / "photos" / part / name / f"{i}.png", image)
    run = tmp_path / "run"
    options = f"--dataset {tmp_path / 'photos'} --width 2 --batch_size 4 --epochs 1 --max_lr 0.01"
    cli.train.main([*options.split(), "--folder", str(run)])
    assert is_complete(run)
    model, history, settings = load_run(run)
    assert settings.classes == ["save $5 #1", "save $9 #2"]
    cli.train.main(["--resume", str(run), "--epochs", "2"])
    cli_inference.evaluate.main([str(run)])
    photo = tmp_path / "photos" / "test" / "save $5 #1" / "0.png"
    cli_inference.predict.main(["--weights", str(run), str(photo)])
    printed = capsys.readouterr()
    assert "save $5 #1 " in printed.out
    assert "written to" in printed.out
    assert printed.err == ""


def test_a_confusion_matrix_of_many_classes_is_legible():
    for classes in (20, 21, 100, 400):
        y = np.arange(3 * classes) % classes
        names = [f"a class called {i}" for i in range(classes)]
        data = SimpleNamespace(classes=names, y_test=y)
        figure = show_confusion(np.roll(y, 1), data)
        figure.canvas.draw()
        (ax,) = figure.axes
        assert len(ax.texts) == (classes**2 if classes <= 20 else 0)
        for axis, side in ((ax.xaxis, "x"), (ax.yaxis, "y")):
            boxes = [
                t.get_window_extent() for t in axis.get_ticklabels() if t.get_text()
            ]
            assert len(boxes) >= min(classes, 20)
            if side == "y" or classes > 30:
                spans = sorted(
                    (getattr(b, f"{side}0"), getattr(b, f"{side}1")) for b in boxes
                )
                assert all(low[1] <= high[0] + 1.5 for low, high in pairwise(spans)), (
                    classes
                )
        assert figure.bbox.width >= ax.get_tightbbox().x1
        assert ax.get_window_extent().height > 0.55 * figure.bbox.height
    wide = show_per_class(np.roll(y, 1), data)
    assert wide.get_size_inches()[1] < 20


def test_numbers_of_logarithmic_axes_stay_powers_of_ten():
    with plot_style() as plt:
        figure, ax = plt.subplots()
        ax.loglog([1e-7, 1e3], [1, 1e6])
        ax.set_title("$5")
    figure.canvas.draw()
    assert all(label.get_parse_math() for label in ax.get_xticklabels())
    assert not ax.title.get_parse_math()


# ---------------------------------------------------------------- figures that fail


def failing(*args, **options) -> None:
    "Raise an error, as a drawing function might."
    raise RuntimeError("no $\nfigure")


FULL = "[Errno 28] No space left on device"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["drawing", "writing"])
def test_a_figure_that_fails_is_a_warning_in_every_command(
    how, finished, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    if how == "drawing":
        for name in (
            "era_s10.run_folder.image_grid",
            "era_s10.results.plot_style",
            "era_s10.lr_finder.plot_style",
        ):
            if name != "era_s10.lr_finder.plot_style":
                monkeypatch.setattr(name, failing)
        monkeypatch.setattr("era_s10.bench.plot_style", failing)
    else:
        real = files_module.atomic_write

        def full(path, mode="wb"):
            if Path(path).suffix == ".png":
                raise OSError(28, "No space left on device")
            return real(path, mode)

        monkeypatch.setattr("era_s10.run_folder.atomic_write", full)
    study = (
        "--recipe page --dataset digits --width 2 --epochs 1 --runs 1 --folder study"
    )
    calls = {
        "train": (cli.train, [*TINY.split(), "--folder", "run"], "test       final"),
        "study": (cli.study, study.split(), "median run: seed 0"),
        "evaluate": (cli_inference.evaluate, [str(finished)], "recorded, without TTA"),
        "bench": (bench, ["--size", "tiny", "--only", "step, one layer"], "written to"),
    }  # fmt: skip
    if how == "writing":
        find = (
            TINY.replace("--epochs 1", "")
            .replace("--max_lr 0.02", "")
            .replace("--limit 60", "")
        )
        calls["lr_find"] = (cli.lr_find, [*find.split(), "--steps", "12"], "0.0")
    for name, (command, arguments, expected) in calls.items():
        command.main(arguments)
        printed = capsys.readouterr()
        assert expected in printed.out, name
        lines = [text for text in printed.err.splitlines() if "figure" in text]
        assert lines, name
        for line in lines:
            assert re.match(rf"era_s10_{name}: warning: .*\.png: figure not written \(", line), line  # fmt: skip
    assert (tmp_path / "run" / "weights.safetensors").exists()
    assert {"card.json", "weights.safetensors", "runs.jsonl"} <= set(files(tmp_path / "study"))  # fmt: skip


def test_weights_that_cannot_be_written_are_written_when_the_run_is_resumed(
    tmp_path, monkeypatch
):
    def experiment() -> Experiment:
        set_seed(0)
        data = Digits(limit=60, batch_size=20)
        return Experiment(Model(2), data, Config(max_lr=0.01), tmp_path / "run")

    def full(path, mode="wb"):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("era_s10.weights.atomic_write", full)
        with pytest.raises(OSError, match=r"No space left.*resume it to write"):
            experiment().run(epochs=1)
    assert not (tmp_path / "run" / "weights.safetensors").exists()
    experiment().resume()
    assert is_complete(tmp_path / "run")


BACKENDS = {
    "S1 a module that is not installed": "module://not_installed",
    "not the name of a backend": "foo",
    "a module that is no backend": "module://json",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend",
    [
        name if i == 0 else pytest.param(name, marks=pytest.mark.slow)
        for i, name in enumerate(BACKENDS)
    ],
)
def test_a_backend_that_cannot_be_used_is_a_warning(backend, tmp_path):
    code = f"""
from era_s10 import cli, Experiment, Model, Digits
cli.train.main({TINY.split()} + ["--folder", "run"])
print(Experiment(Model(2), Digits(limit=60)).find_lr().figure)
"""
    done = run_python(code, tmp_path, MPLBACKEND=BACKENDS[backend], PYTHONPATH=str(Path(cli.__file__).parent.parent), TQDM_DISABLE="1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [text for text in done.stderr.splitlines() if "backend" in text]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("era_s10_train: warning: matplotlib's backend can't be used")  # fmt: skip
    assert is_complete(tmp_path / "run")
    assert done.stdout.rstrip().endswith("Axes>") or "Figure(" in done.stdout


# ---------------------------------------------------------------- outputs


def train_tiny() -> None:
    "Train in a run folder that is called run."
    cli.train.main([*TINY.split(), "--folder", "run"])


@posix
@pytest.mark.parametrize(
    ("given", "status"),
    [
        ({"out": "pipe"}, 0),
        pytest.param({"out": "pipe", "err": "pipe"}, 0, marks=pytest.mark.slow),
        pytest.param({"closed": (1,)}, 0, marks=pytest.mark.slow),
        pytest.param({"closed": (2,)}, 0, marks=pytest.mark.slow),
        ({"closed": (1, 2)}, 0),
        ({"out": "full"}, 2),
        pytest.param({"err": "full"}, 0, marks=pytest.mark.slow),
    ],
    ids=["S3", "both", "closed", "stderr closed", "both closed", "full", "stderr full"],
)
def test_a_run_does_not_depend_on_its_output(given, status, tmp_path):
    opened = {"pipe": closed_pipe(), "full": os.open("/dev/full", os.O_WRONLY)}
    given = {k: opened.get(v, v) if isinstance(v, str) else v for k, v in given.items()}
    done = in_child(train_tiny, folder=tmp_path, **given)
    for number in opened.values():
        os.close(number)
    assert done.status == status, done
    assert is_complete(tmp_path / "run")
    assert "Traceback" not in done.err
    if status == 2:
        assert done.err == "era_s10_train: error: output not written completely (No space left on device)\n"  # fmt: skip
    else:
        assert done.err == ""


@pytest.mark.slow
@posix
def test_the_other_commands_do_not_depend_on_their_output(finished, tmp_path):
    photo = tmp_path / "photo.png"
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(photo)
    study = (
        "--recipe page --dataset digits --width 2 --epochs 1 --runs 1 --folder study"
    )
    calls = {
        "evaluate": (cli_inference.evaluate, [str(finished)]),
        "predict": (cli_inference.predict, ["--weights", str(finished), *[str(photo)] * 400]),
        "study": (cli.study, study.split()),
        "lr_find": (cli.lr_find, ["--dataset", "digits", "--width", "2", "--steps", "60", "--end", "10"]),
        "help": (cli.train, ["--help"]),
        "errors": (cli.train, ["--dataset", "nowhere"]),
    }  # fmt: skip
    for name, (command, arguments) in calls.items():
        for given in ({"out": closed_pipe()}, {"closed": (1,)}):
            done = in_child(lambda: command.main(arguments), folder=tmp_path, **given)  # noqa: B023
            assert done.status == (2 if name == "errors" else 0), (name, done)
            assert done.err.count("\n") == (name == "errors"), (name, done)
    assert {"study/card.json", "study/confusion.png", "lr_finder.png"} <= set(files(tmp_path))  # fmt: skip
    predict = functools.partial(
        cli_inference.predict.main, ["--weights", str(finished), str(photo)]
    )
    with open("/dev/full", "wb") as full:
        done = in_child(predict, out=full.fileno())
    assert (done.status, done.err.count("\n")) == (2, 1)  # results were lost


@pytest.mark.slow
@posix
def test_a_script_in_a_pipe_trains_to_its_end(tmp_path):
    "A run from Python, without a command, does not end because of its output either."

    def script() -> None:
        data = Digits(limit=60, batch_size=20)
        run = Experiment(Model(2), data, Config(max_lr=0.01), tmp_path / "run")
        run.run(epochs=2)

    pipe = closed_pipe()
    for given in ({"out": pipe}, {"closed": (1, 2)}):
        done = in_child(script, **given)
        assert (done.status, done.err) == (0, ""), done
        assert is_complete(tmp_path / "run")
        (tmp_path / "run").rename(tmp_path / f"run-{len(given)}-{next(iter(given))}")
    os.close(pipe)


@posix
def test_no_file_of_a_run_becomes_a_standard_file(tmp_path):
    "Text for a closed stdout must not end up in a file that got its number."

    def check() -> None:
        from era_s10.interrupts import keep_output

        with keep_output(), open(tmp_path / "data", "w") as file:
            assert file.fileno() > 2
            os.write(1, b"from a library")
            file.write("data")

    assert in_child(check, closed=(0, 1, 2)).status == 0
    assert (tmp_path / "data").read_text() == "data"


@pytest.mark.slow
@posix
@pytest.mark.parametrize(
    "encoding", ["cp1252", pytest.param("ascii", marks=pytest.mark.slow)]
)
def test_text_that_the_output_cannot_encode_is_escaped(encoding, tmp_path):
    "Case S2: in every command, on stdout and stderr."
    folder = tmp_path / "数据"
    for part in ("train", "test"):
        for i, name in enumerate(("猫", "犬")):
            for j in range(4):
                shade = 40 * i + 9 * j + (part == "test")
                image = np.full((32, 32, 3), shade, np.uint8)
                save_image(folder / part / name / f"{j}.png", image)
    data = ["--dataset", str(folder), "--width", "2", "--batch_size", "4"]
    run, study = str(folder / "运行"), str(folder / "研究")
    photo = str(folder / "test" / "猫" / "0.png")
    (tmp_path / "坏.png").write_text("no image")
    short = ["--epochs", "1", "--runs", "1", "--recipe", "page", "--folder", study]
    calls = {
        "train": (cli.train, [*data, "--epochs", "1", "--max_lr", "0.01", "--folder", run], r"\u6570"),
        "resume": (cli.train, ["--resume", run], r"\u8fd0"),
        "evaluate": (cli_inference.evaluate, [run], r"\u732b"),
        "predict": (cli_inference.predict, ["--weights", run, photo], r"\u732b"),
        "study": (cli.study, [*data, *short], r"\u7814"),
        "lr_find": (cli.lr_find, [*data, "--steps", "12", "--figure", f"{folder}/率.png"], r"\u7387"),
    }  # fmt: skip
    for name, (command, arguments, expected) in calls.items():
        done = in_child(lambda: command.main(arguments), encoding=encoding)  # noqa: B023
        if name == "lr_find" and done.status == 1:  # nothing to learn here
            continue
        assert done.status == 0, (name, done)
        assert expected in done.out, (name, done.out)
        assert done.err == "", name
    assert json.loads((Path(run) / "config.json").read_text("utf-8"))["dataset"]["classes"] == ["犬", "猫"]  # fmt: skip
    wrong = functools.partial(cli.train.main, ["--dataset", "不存在"])
    done = in_child(wrong, encoding=encoding)
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert r"\u4e0d" in done.err
    unreadable = ["--weights", run, str(tmp_path / "坏.png")]
    bad = functools.partial(cli_inference.predict.main, unreadable)
    done = in_child(bad, encoding=encoding)
    assert (done.status, done.err.count("\n")) == (1, 1), done
    assert r"\u574f" in done.err


def test_messages_are_one_line_without_control_characters(capsys):
    for folder in ("a\nb", "a\x1b[2Jb"):
        with pytest.raises(SystemExit):
            cli.train.main(["--dataset", folder])
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "\x1b" not in error


# ---------------------------------------------------------------- folders and paths


@pytest.mark.slow
@posix
def test_two_runs_in_the_same_second_have_two_folders(tmp_path, monkeypatch):
    "Case R3."

    class Frozen(run_folder.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 11, 26, 10, 15)

    monkeypatch.setattr(run_folder, "datetime", Frozen)
    names = []
    for _ in range(2):
        done = in_child(lambda: cli.train.main(TINY.split()), folder=tmp_path)
        assert done.status == 0, done
        names.append(re.search(r"folder  (\S+);", done.out)[1])
    assert names == ["runs/20261126-101500-digits", "runs/20261126-101500-digits-2"]
    assert all(is_complete(tmp_path / name) for name in names)


def test_folders_with_free_names_are_created_by_one_thread_only(tmp_path):
    found, threads = [], []
    for _ in range(8):
        threads.append(threading.Thread(target=lambda: found.append(new_folder(tmp_path / "runs" / "a"))))  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == len(found) == 8


@pytest.mark.parametrize("dataset", [".", "..", "x" * 300, "a b $(c)"])
def test_a_run_folder_is_named_after_any_dataset(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = cli.dataset_stem(dataset)
    assert name not in ("", ".", "..")
    assert len(name) <= 50 and "/" not in name


def test_wrong_options_leave_no_folder_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for options in (["--dataset", "digits", "--width", "0"], ["--dataset", "nowhere"]):
        with pytest.raises(SystemExit):
            cli.train.main(options)
        assert files(tmp_path) == []


PLACES = ["my runs/a $5", "a'b", "-run", "~run", "a;b", "a\tb", "ü"]


@pytest.mark.slow
@posix
@pytest.mark.parametrize(
    "place", [PLACES[0], *(pytest.param(p, marks=pytest.mark.slow) for p in PLACES[1:])]
)
def test_a_printed_command_can_be_pasted(place, tmp_path, monkeypatch):
    "Case R5."
    monkeypatch.chdir(tmp_path)
    train = functools.partial(cli.train.main, [*TINY.split(), f"--folder=./{place}"])
    done = in_child(train)
    assert done.status == 0, done
    printed = re.search(r"to resume: (era_s10_train --resume .*)", done.out)[1]
    _, *arguments = subprocess.run(
        ["sh", "-c", f'set -- {printed}; printf "%s\\0" "$@"'],
        capture_output=True,
        text=True,
    ).stdout.split("\0")[:-1]
    again = in_child(functools.partial(cli.train.main, arguments))
    assert again.status == 0, again
    assert "nothing to do" in again.out
    assert is_complete(tmp_path / place)


def test_quoted_paths_are_one_word_for_a_shell():
    for name in PLACES:
        (word,) = shlex.split(quote_path(name))
        assert Path(word) == Path(name)
        assert word[0] not in "-~"


@pytest.mark.slow
def test_the_home_folder_is_expanded_in_every_path(tmp_path, monkeypatch, capsys):
    "Case R6."
    monkeypatch.setenv("HOME", str(tmp_path))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    digits = Digits()
    few = {name: getattr(digits, name)[:40] for name in ("x_train", "x_test")}
    labels = {name: getattr(digits, name)[:40] for name in ("y_train", "y_test")}
    np.savez(tmp_path / "photos.npz", **few, **labels)
    Image.fromarray(digits.x_test[0]).save(tmp_path / "photo.png")
    small = ["--width", "2", "--batch_size", "20"]
    cli.train.main(["--dataset=~/photos.npz", "--epochs=1", "--max_lr=0.01", "--folder=~/run", *small])  # fmt: skip
    cli.train.main(["--resume=~/run", "--data_dir=~/photos.npz"])
    cli_inference.evaluate.main(["~/run", "--data_dir=~/photos.npz"])
    cli_inference.evaluate.main(["~/run", "--dataset=~/photos.npz"])
    cli_inference.predict.main(["--weights=~/run", "~/photo.png"])
    cli.lr_find.main(["--dataset=digits", "--figure=~/lr.png", "--steps=12", *small])
    cli.study.main(["--recipe=page", "--runs=1", "--dataset=~/photos.npz", "--epochs=1", "--folder=~/study", *small])  # fmt: skip
    capsys.readouterr()
    names = {"run", "study", "lr.png", "run/confusion-photos.png", "study/card.json"}
    assert names <= set(files(tmp_path))
    assert files(here) == []
    assert load_run("~/run")[2].data_path == str(tmp_path / "photos.npz")
    settings = Config(max_lr=0.01, epochs=1)
    run = Experiment(Model(2), Digits(limit=60), settings, "~/python")
    assert run.folder == tmp_path / "python"
    monkeypatch.setenv("ERA_S10_DATA", "~/photos.npz")
    assert data_folder() == data_folder("~/photos.npz") == tmp_path / "photos.npz"
    assert user_path(user_path("./~")) == here / "~"


@pytest.mark.parametrize("name", ["ERA_S10_DATA", "XDG_CACHE_HOME", "MPLBACKEND", "TQDM_DISABLE"])  # fmt: skip
def test_an_empty_environment_variable_counts_as_unset(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ERA_S10_DATA", raising=False)
    monkeypatch.delenv(name, raising=False)
    unset = data_folder()
    monkeypatch.setenv(name, "")
    assert data_folder() == unset
    assert unset.is_absolute() and unset.name == "era_s10"
    cli.lr_find.main(
        ["--dataset", "digits", "--width", "2", "--batch_size", "20", "--steps", "12"]
    )
    assert files(tmp_path) == ["lr_finder.png"]


@pytest.mark.parametrize(
    ("command", "arguments", "option"),
    [
        (cli.train, ["--dataset", ""], "--dataset"),
        (cli.train, ["--dataset", "digits", "--folder", ""], "--folder"),
        (cli.train, ["--resume", ""], "--resume"),
        (cli.study, ["--dataset", "mnist", "--data_dir", ""], "--data_dir"),
        (cli.lr_find, ["--dataset", "digits", "--figure", ""], "--figure"),
        (cli_inference.evaluate, [""], "error: folder"),
        (cli_inference.predict, ["--weights", "", "x"], "--weights"),
        (cli_inference.predict, ["x", ""], "error: files"),
    ],
)
def test_an_empty_path_is_refused(
    command, arguments, option, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    error = capsys.readouterr().err
    assert (ended.value.code, error.count("\n")) == (2, 1)
    assert f"{option}: is empty; set a path, or leave it out" in error
    assert files(tmp_path) == []


RUN_FILES = ["train.png", "test.png", "misclassified.png", "lr_finder.png", "config.json", "history.jsonl", "weights.safetensors"]  # fmt: skip


@pytest.mark.parametrize("name", RUN_FILES)
@pytest.mark.parametrize("kind", ["file", "broken link"])
def test_files_that_a_run_would_overwrite_are_kept(name, kind, tmp_path, capsys):
    "Case R7."
    folder = tmp_path / "mine"
    folder.mkdir()
    if kind == "file":
        (folder / name).write_text("mine")
    else:
        (folder / name).symlink_to("nowhere")
    with pytest.raises(SystemExit) as ended:
        cli.train.main([*TINY.split(), "--folder", str(folder)])
    error = capsys.readouterr().err
    assert (ended.value.code, error.count("\n")) == (2, 1)
    assert "would overwrite" in error or "already contains a run" in error
    assert files(folder) == [name]
    with pytest.raises(FileExistsError):
        Experiment(Model(2), Digits(limit=60), Config(max_lr=0.1), folder).run(epochs=1)


def test_a_folder_with_other_files_can_be_used(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "photo.png").write_text("mine")
    cli.train.main([*TINY.split(), "--folder", str(tmp_path)])
    assert is_complete(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["confusion.png", "accuracy.png", "weights.safetensors", "card.json"])  # fmt: skip
def test_files_that_a_study_would_overwrite_are_kept(name, tmp_path, capsys):
    (tmp_path / name).write_text("mine")
    study = ["--dataset=digits", "--runs=1", "--epochs=1", f"--folder={tmp_path}"]
    with pytest.raises(SystemExit) as ended:
        cli.study.main(study)
    error = capsys.readouterr().err
    assert (ended.value.code, error.count("\n")) == (2, 1)
    assert f"the study would overwrite {tmp_path / name}" in error
    assert files(tmp_path) == [name]


def unwritable(tmp_path: Path) -> dict[str, Path]:
    "Return folders that can't be written to, also by root."
    (tmp_path / "file").write_text("a file")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    places = {"a file": tmp_path / "file" / "x", "a broken link": tmp_path / "link"}
    if Path("/proc/self").exists():
        places["a system folder"] = Path("/proc/self/x")
    return places


def test_a_folder_that_cannot_be_written_to_is_refused_at_the_start(
    tmp_path, monkeypatch, capsys
):
    "Case L2 and its siblings: nothing is trained, searched or measured."
    for name in ("era_s10.cli.make_experiment", "era_s10.bench.run_benchmarks"):
        monkeypatch.setattr(name, lambda *_: pytest.fail("started"))
    places = unwritable(tmp_path)
    before = files(tmp_path)
    for kind, place in places.items():
        with pytest.raises(OSError, match="folder"):
            check_writable(place)
        with pytest.raises(OSError, match="folder"):
            Experiment(Model(2), Digits(limit=60), None, place)
        calls = [
            (cli.lr_find, ["--dataset=digits", f"--figure={place / 'lr.png'}"]),
            (bench, [f"--folder={place}", "--size=tiny"]),
        ]
        for command, arguments in calls:
            with pytest.raises(SystemExit) as ended:
                command.main(arguments)
            error = capsys.readouterr().err
            assert (ended.value.code, error.count("\n")) == (2, 1), (kind, error)
    for figure in (tmp_path, tmp_path / "none" / "lr.png", tmp_path / "lr.gfi"):
        with pytest.raises((OSError, ValueError)):
            check_figure(figure)
    assert files(tmp_path) == before


def test_a_full_disk_is_found_at_the_start(tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("era_s10.run_folder.tempfile.TemporaryFile", full)
    with pytest.raises(OSError, match=r"can't be written to \(No space left on device"):
        check_writable(tmp_path / "run")


def test_the_rate_is_printed_before_the_plot_is_written(tmp_path, monkeypatch, capsys):
    "Case L2: a rate that was found is never lost."
    printed = []

    def stop(*_):
        printed.append(capsys.readouterr().out)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "save_figures", stop)
    with pytest.raises(KeyboardInterrupt):
        cli.lr_find("digits", steps=12, width=2, figure=str(tmp_path / "lr.png"))
    assert 0 < float(printed[0]) <= 0.1


def test_a_new_run_may_start_where_one_has_not_begun(tmp_path):
    check_new(tmp_path)
    check_new(tmp_path / "absent")
    check_new(None)


# ---------------------------------------------------------------- weights


@pytest.mark.slow
def test_a_flipped_bit_in_weights_is_refused_or_harmless(finished, tmp_path):
    path, copy = finished / "weights.safetensors", tmp_path / "weights.safetensors"
    content, draw, model = path.read_bytes(), random.Random(0), load_run(finished)[0]
    header = 8 + int.from_bytes(content[:8], "little")
    positions = [*(draw.randrange(len(content)) for _ in range(300)), *(draw.randrange(header) for _ in range(300))]  # fmt: skip
    harmless = 0
    for position in positions:
        flipped = bytearray(content)
        flipped[position] ^= 1 << draw.randrange(8)
        copy.write_bytes(flipped)
        other = Model(2)
        try:
            load_weights(other, copy)
        except ValueError as error:
            assert str(copy) in str(error)
            continue
        assert position < header  # a space, or a letter of the metadata
        harmless += 1
        state = other.state_dict()
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert harmless < 100


def test_every_reader_verifies_the_weights(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    path = run / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged: its tensors do not match"):
        load_run(run)
    for command, arguments in (
        (cli_inference.evaluate, [str(run)]),
        (cli_inference.predict, ["--weights", str(run), "x.png"]),
    ):
        with pytest.raises(SystemExit) as ended:
            command.main(arguments)
        error = capsys.readouterr().err
        assert (ended.value.code, error.count("\n")) == (2, 1)
        assert "delete weights.safetensors and resume the run" in error
    path.unlink()
    cli.train.main(["--resume", str(run)])
    assert path.read_bytes() == (finished / "weights.safetensors").read_bytes()


def test_weights_of_other_programs_are_read_without_a_checksum(finished, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(finished / "weights.safetensors")
    for metadata in (None, {"format": "pt"}):
        save_file(tensors, tmp_path / "foreign.safetensors", metadata)
        load_weights(Model(2), tmp_path / "foreign.safetensors")


def test_equal_weights_give_equal_files(tmp_path):
    model = torch.nn.ModuleDict({"ä": torch.nn.Linear(2, 3), "n": torch.nn.BatchNorm2d(2)}).bfloat16()  # fmt: skip
    metadata = dict.fromkeys(["recipe", "study", "zebra", "ä", "notes"], "x")
    for i in range(3):
        save_weights(model, tmp_path / f"{i}", **metadata)
        load_weights(model, tmp_path / f"{i}")
    contents = {(tmp_path / f"{i}").read_bytes() for i in range(3)}
    assert len(contents) == 1


# ---------------------------------------------------------------- moved data, other devices


def as_if_on_a_gpu(folder: Path, recipe_device: str | None) -> None:
    "Change a run to what it would be if a GPU had trained it."
    checkpoints = Checkpoints(folder / "checkpoints").paths()
    for path in (*checkpoints, folder / "checkpoints" / "best.ckpt"):
        if path.exists():
            state = load_checkpoint(path)
            identity = state["identity"]
            identity["device"] = "NVIDIA H100"
            identity["recipe"]["device"] = recipe_device
            identity["numerics"]["precision"] = "fp16"
            del identity["threads"]
            path.unlink()
            save_checkpoint(state, path)
    config = json.loads((folder / "config.json").read_text())
    config["device"], config["recipe"]["device"] = "cuda:0", recipe_device
    config["numerics"]["precision"] = "fp16"
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("recipe_device", ["cuda", None])
def test_a_run_moves_to_another_device_when_told(
    recipe_device, finished, tmp_path, capsys
):
    "Case R2."
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    as_if_on_a_gpu(run, recipe_device)
    told = ["--resume", str(run), "--epochs", "2"]
    before = {name: (run / name).stat().st_mtime_ns for name in files(run)}
    for options, message in (
        ([], "--device and --allow_mismatch" if recipe_device else "--allow_mismatch"),
        (["--device", "cpu"], "device was 'NVIDIA H100' and is 'cpu'"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.train.main([*told, *options])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    assert {name: (run / name).stat().st_mtime_ns for name in files(run)} == before
    cli.train.main([*told, "--device", "cpu", "--allow_mismatch"])
    printed = capsys.readouterr()
    default = "bf16" if bf16_instructions() else "fp32"
    assert f"device  cpu, {default}" in printed.out
    assert printed.err.count("resuming anyway") == printed.err.count("\n") > 0
    settings = load_run(run)[2]
    assert (settings.device, settings.precision) == ("cpu", default)
    assert any(line.startswith("device was") for line in settings.run["accepted"])
    assert len(load_run(run)[1]) == 2
    cli_inference.evaluate.main([str(run), "--device", "cpu"])


def test_a_run_finds_data_that_moved_when_told(tmp_path, capsys):
    digits = Digits()
    few = {name: getattr(digits, name)[:40] for name in ("x_train", "x_test")}
    labels = {name: getattr(digits, name)[:40] for name in ("y_train", "y_test")}
    np.savez(tmp_path / "old.npz", **few, **labels)
    run, small = str(tmp_path / "run"), ["--width=2", "--batch_size=20", "--epochs=1"]
    cli.train.main([f"--dataset={tmp_path}/old.npz", "--max_lr=0.01", f"--folder={run}", *small])  # fmt: skip
    (tmp_path / "old.npz").rename(tmp_path / "new.npz")
    for arguments in (["--resume", run], ["--resume", run, "--data_dir", "nowhere"]):
        with pytest.raises(SystemExit):
            cli.train.main(arguments)
        assert "data_dir" in capsys.readouterr().err
    cli.train.main(["--resume", run, "--epochs=2", f"--data_dir={tmp_path}/new.npz"])
    cli_inference.evaluate.main([run, f"--data_dir={tmp_path}/new.npz"])
    assert len(load_run(run)[1]) == 2


# ---------------------------------------------------------------- signals, workers, threads


LONG = "--dataset digits --width 4 --epochs 50 --max_lr 0.02"
COMMANDS = {
    "train": f"{LONG} --folder run",
    "train together": f"{LONG} --folder run --processes 2 --parts 2",
    "study": f"{LONG.partition(' --max_lr')[0]} --folder study",
    "study at once": f"{LONG.partition(' --max_lr')[0]} --folder study --parallel_runs 2",
    "lr_find": "--dataset digits --steps 5000",
    "evaluate": "FINISHED",
    "predict": "--weights FINISHED photo.png",
    "bench": "",
}


def wait_for_handlers(pid: int) -> None:
    "Wait until a process handles SIGTERM."
    status = Path(f"/proc/{pid}/status")
    while True:
        handled = re.search(r"^SigCgt:\s*(\w+)$", status.read_text(), re.MULTILINE)
        if int(handled[1], 16) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_signal_at_any_moment_ends_a_command_in_one_line(name, finished, tmp_path):
    "While it imports PyTorch, and while it does the first part of its work."
    save_image(tmp_path / "photo.png", np.zeros((32, 32, 3), np.uint8))
    options = COMMANDS[name].replace("FINISHED", str(finished)).split()
    code = "import sys; from era_s10 import entry; getattr(entry, sys.argv.pop(1))()"
    program = ["-c", code, name.split()[0], *options]
    draw, variables = random.Random(name), {**os.environ, "TQDM_DISABLE": "1"}
    variables |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    early, late = draw.uniform(0, 1), draw.uniform(1, 5)
    moments = {signal.SIGINT: early, signal.SIGTERM: draw.choice([early / 2, late])}
    for number, moment in moments.items():
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.rmtree(tmp_path / "study", ignore_errors=True)
        run = new_interpreter(program, variables, tmp_path)
        try:
            wait_for_handlers(run.pid)
            time.sleep(moment)
            early_end = run.poll()  # of a command that has little to do
            run.send_signal(number)
            _, errors = run.communicate(timeout=60)
        finally:
            run.kill()
        assert errors.count("\n") <= 1 and "Traceback" not in errors, errors
        if early_end is None:
            assert run.returncode == 128 + number, (number, moment, errors)


@pytest.mark.slow
@posix
@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_is_like_sigterm_unless_it_is_ignored(ignored, tmp_path):
    "Case R4: a checkpoint, or the complete run if SIGHUP was ignored, as by nohup."

    def train() -> None:
        if ignored:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        real = Experiment._run_epoch

        def hang_up(self, *args):
            os.kill(os.getpid(), signal.SIGHUP)
            return real(self, *args)

        Experiment._run_epoch = hang_up
        train_tiny()

    done = in_child(train, folder=tmp_path)
    assert "Traceback" not in done.err
    run = tmp_path / "run"
    if ignored:
        assert done.status == 0 and is_complete(run)
    else:
        assert done.status == 129
        assert (
            "stopped after 0 epochs; to resume: era_s10_train --resume run" in done.err
        )
        assert Checkpoints(run / "checkpoints").latest()["steps"] == 1
        cli.train.main(["--resume", str(run)])
        assert is_complete(run)


@posix
def test_a_terminal_that_is_closed_takes_its_outputs_with_it(tmp_path):
    "The terminal hangs up all processes, and its files give errors from then on."

    def train() -> None:
        real = Experiment._run_epoch

        def hang_up(self, *args):
            for number in (1, 2):
                os.dup2(os.open("/dev/full", os.O_WRONLY), number)
            os.killpg(0, signal.SIGHUP)
            return real(self, *args)

        Experiment._run_epoch = hang_up
        cli.train.main([*TINY.split(), "--folder", "run", "--workers", "2"])

    assert in_child(train, folder=tmp_path).status == 129
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest()["steps"] == 1


SCRIPT = """
import multiprocessing
from era_s10 import Digits, Experiment, Model
from era_s10.recipe import Config
multiprocessing.set_start_method("spawn", force=True)
data = Digits(limit=60, batch_size=20, workers=2)
Experiment(Model(2), data, Config(max_lr=0.01), "run").run(epochs=1)
"""


@pytest.mark.slow
def test_a_script_without_a_main_guard_is_refused_with_a_hint(tmp_path):
    "Case S4."
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run_script(tmp_path / "script.py")
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ValueError: workers: each of 2 processes would run ")
    assert "`if __name__ == '__main__':`" in last
    assert files(tmp_path) == ["script.py"]


@pytest.mark.slow
def test_a_script_with_a_main_guard_uses_spawned_workers(tmp_path):
    body = SCRIPT.strip().splitlines()
    text = "\n".join([*body[:4], "if __name__ == '__main__':", *(f"    {line}" for line in body[4:])])  # fmt: skip
    (tmp_path / "script.py").write_text(text)
    done = run_script(tmp_path / "script.py")
    assert done.returncode == 0, done.stderr
    assert is_complete(tmp_path / "run")


@pytest.mark.slow
def test_two_threads_cannot_train_at_once(tmp_path):
    "Case S5: the second one is refused, and the first one has its usual numbers."

    def experiment(folder: Path) -> Experiment:
        set_seed(0)
        data = Digits(limit=60, batch_size=20)
        return Experiment(Model(2, dropout=0.3), data, Config(max_lr=0.01), folder)

    expected = experiment(tmp_path / "alone").run(epochs=2)
    first, second = experiment(tmp_path / "first"), experiment(tmp_path / "second")
    errors = []

    def others() -> None:
        tries = (
            lambda: second.run(epochs=2),
            lambda: second.find_lr(),
            lambda: second.estimate_epoch(),
            lambda: second.train(0),
            lambda: set_seed(3),
            lambda: preserve_random_state().__enter__(),
            lambda: preserve_epoch(second.dataset).__enter__(),
            lambda: experiment(tmp_path / "third"),
            lambda: Experiment(second.model, second.dataset, second.config),
        )
        for call in tries:
            try:
                call()
            except RuntimeError as error:
                errors.append(str(error))

    real = first.train.step

    def step(x, y):
        if first.train.steps == 1:
            thread = threading.Thread(target=others)
            thread.start()
            thread.join()
        return real(x, y)

    first.train.step = step
    found = first.run(epochs=2)
    assert len(errors) == 9
    assert set(errors) == {errors[0]}
    assert "another thread of this process is training" in errors[0]
    names = ("train_loss", "test_loss", "train_accuracy")
    assert [[r[n] for n in names] for r in found] == [[r[n] for n in names] for r in expected]  # fmt: skip
    assert not (tmp_path / "second").exists()
    second.run(epochs=2)  # afterwards it can
    assert load_run(tmp_path / "first")[1][-1]["test_loss"] == found[-1]["test_loss"]


def test_the_lock_of_the_threads_is_released_after_an_error():
    with pytest.raises(ZeroDivisionError), one_thread_at_a_time():
        _ = 1 / 0
    thread = threading.Thread(target=lambda: set_seed(0))
    thread.start()
    thread.join()
    with one_thread_at_a_time(), one_thread_at_a_time():
        set_seed(1)


def test_figures_can_be_drawn_in_several_threads(tmp_path):
    import matplotlib

    before, failed = dict(matplotlib.rcParams), []

    def draw(i: int) -> None:
        try:
            for j in range(3):
                figure = image_grid(np.zeros((2, 8, 8, 3), np.uint8), ["$5", "$"])
                save_figures(tmp_path, {f"{i}-{j}": figure})
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=draw, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert dict(matplotlib.rcParams) == before
    assert len(files(tmp_path)) == 9


def test_memory_that_is_exhausted_is_one_line(monkeypatch, capsys):
    def exhausted(*_):
        raise MemoryError("Unable to allocate 3 TiB")

    monkeypatch.setattr(cli, "make_experiment", exhausted)
    with pytest.raises(SystemExit) as ended:
        cli.lr_find.main(["--dataset", "digits"])
    assert ended.value.code == 1
    assert capsys.readouterr().err == "era_s10_lr_find: error: not enough memory (Unable to allocate 3 TiB)\n"  # fmt: skip


def test_errors_of_the_program_are_not_hidden(monkeypatch):
    monkeypatch.setattr(cli, "make_experiment", lambda *_: {}["missing"])
    with pytest.raises(KeyError):
        cli.lr_find.main(["--dataset", "digits"])


def test_text_for_figures_is_escaped_and_cut():
    assert plain_text("猫", 3) == r"\u…"
    assert plain_text("a\tb") == r"a\tb"
    assert plain_text("e\u0301 é") == "e\u0301 é"
