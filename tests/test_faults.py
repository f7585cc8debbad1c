"""Tests of real faults: killed processes, damaged files, broken downloads; no work is lost.

`fork_server.py` forks the child processes, so that imports happen once. The error messages and the
state of the disk are collected in `nbs/results/faults.json`, which the page on checkpoints shows as
a table. To update that file, run `ERA_S10_FAULTS=1 pytest -m '' tests/test_faults.py`. The rows for
several processes are written by their tests, see `fault_table.py`."""

import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from fault_table import TABLE, plain
from fork_server import make_experiment
from pictures import (
    DATA,
    files,
    needs_cifar10,
    small_cifar10,
    write_archive,
    write_batches,
    write_npz,
    write_tree,
)
from PIL import Image
from project import command

from era_s10.checkpoint import (
    CheckpointPolicy,
    Checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from era_s10.datasets.cifar10 import CIFAR10
from era_s10.datasets.mnist import MNIST
from era_s10.downloads import Download, unpack_tar
from era_s10.files import run_lock
from era_s10.model import Model
from era_s10.run_folder import History
from era_s10.sources import fingerprint, image_digests
from era_s10.weights import load_weights

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
SAME_BITS = "after resuming, the run ends with the same bits"
UNCHANGED = "all files are unchanged"
FOUND: dict[str, dict[str, str]] = {}  # by name of the fault
COUNTS = {"kills": 0, "flips": 0}
SETUPS = [
    {"backend": backend, "workers": workers}
    for backend in ("batched", "albumentations")
    for workers in (0, 2)
]


class ForkServer:
    "A process that forks a child for each run."

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, HERE / "fork_server.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "TQDM_DISABLE": "1",
                "MPLBACKEND": "agg",
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",  # a forked child can't use a GPU
            },
        )

    def __call__(self, folder: Path, call: str = "run", **request) -> dict:
        "Run or resume in a child process; return its exit status and output."
        request = {"setup": {}, **request, "folder": str(folder), "call": call}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def start() -> Iterator[ForkServer]:
    "Start a fork server for all tests of this module."
    server = ForkServer()
    yield server
    server.process.stdin.close()
    server.process.wait(timeout=30)


@pytest.fixture(scope="module")
def complete(start, tmp_path_factory) -> Callable[..., Path]:
    "Return a function that returns the folder of an uninterrupted run."
    folders = {}

    def run(**setup) -> Path:
        key = json.dumps(setup, sort_keys=True)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("complete") / "run"
            result = start(folders[key], setup=setup)
            assert result["status"] == 0, result
        return folders[key]

    return run


def final_state(folder: Path) -> dict:
    "Return the state at the end of a run, without times and code version."
    state = Checkpoints(folder / "checkpoints").latest()
    # best is the best of the epochs with a checkpoint
    del state["identity"], state["best"], state["plan"]["code"]
    assert state.pop("epoch_seconds") == 0
    history = History.from_jsonl(folder / "history.jsonl")
    assert history == state["history"]
    state["history"] = [{k: v for k, v in r.items() if k != "seconds"} for r in history]
    state["weights"] = (folder / "weights.safetensors").read_bytes()
    return state


def same(a, b) -> bool:
    "Compare two states to the last bit."
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def record(fault: str, message: str, on_disk: str) -> None:
    "Add a row to the table of faults."
    assert fault not in FOUND
    FOUND[fault] = {"a user sees": plain(message), "on the disk": on_disk}


def check_resumed(
    start: ForkServer, folder: Path, expected: Path, setup: dict | None = None
) -> dict:
    "Resume a run; it must end with the same state as the uninterrupted run `expected`."
    result = start(folder, "resume", setup=setup or {})
    assert result["status"] == 0, result
    assert same(final_state(folder), final_state(expected))
    assert not list(folder.rglob("*.part"))
    return result


# ---------------------------------------------------------------- killed runs


@pytest.mark.slow
@pytest.mark.parametrize(
    "setup",
    [SETUPS[0], *(pytest.param(setup, marks=pytest.mark.slow) for setup in SETUPS[1:])],
    ids=lambda s: f"{s['backend']}-{s['workers']}",
)
def test_a_run_that_is_killed_many_times_ends_like_an_uninterrupted_one(
    setup, start, complete, tmp_path
):
    draw = random.Random(repr(setup))
    folder, call, kills = tmp_path / "run", "run", dict.fromkeys(
        ("after", "step", "test", "writing", "moving"), 0
    )  # fmt: skip
    faults = ["step", "test", "writing", "moving"] * 3
    draw.shuffle(faults)
    for where in ["after", "after", *faults]:
        request = {"setup": setup, "fault": {}}
        if where == "after":
            request["after"] = draw.uniform(0, 0.15)
        else:
            n = {"step": 7, "test": 18, "writing": 2, "moving": 2}[where]
            request["fault"] = {"where": where, "n": draw.randint(1, n)}
            request["fault"]["percent"] = draw.randrange(100)
        result = start(folder, call, **request)
        assert result["status"] == -signal.SIGKILL, (where, request, result)
        kills[where] += 1
        if (folder / "config.json").exists():
            call = "resume"
        else:  # killed before the run had started
            shutil.rmtree(folder, ignore_errors=True)
    check_resumed(start, folder, complete(**setup), setup)
    assert min(kills.values()) >= 2 and sum(kills.values()) == 14
    COUNTS["kills"] += sum(kills.values())
    if COUNTS["kills"] >= 50:
        record(
            "SIGKILL in a training step, a test pass, or while a checkpoint is written or renamed",
            "Killed",
            f"the previous checkpoint; {SAME_BITS}",
        )


# ---------------------------------------------------------------- interrupted and resumed runs


FAST = [
    ("interrupt", "step", 0),
    ("terminate", "test", 0),
    ("interrupt", "saving", 0),
    ("hang up", "step", 2),
]
STOPS = itertools.product(
    ("interrupt", "terminate", "hang up"), ("step", "test", "saving"), (0, 2)
)
STOPS = [s if s in FAST else pytest.param(*s, marks=pytest.mark.slow) for s in STOPS]


@pytest.mark.parametrize(("action", "where", "workers"), STOPS)
def test_an_interrupted_run_writes_a_checkpoint(
    action, where, workers, start, complete, tmp_path
):
    setup, folder = {"workers": workers, "epochs": 3, "steps": 11}, tmp_path / "run"
    n = {"step": 18, "test": 9, "saving": 2}[where]
    result = start(
        folder, setup=setup, fault={"where": where, "n": n, "action": action}
    )
    statuses = {"interrupt": 130, "terminate": 143, "hang up": 129}
    assert result["status"] == statuses[action], result
    assert result["errors"] == ""
    state = Checkpoints(folder / "checkpoints").latest()
    assert state["steps"] == {"step": 18, "test": 10, "saving": 11}[where]
    check_resumed(start, folder, complete(**setup), setup)
    if workers:
        message, name = {
            "interrupt": ("KeyboardInterrupt", "Ctrl-C"),
            "terminate": ("exit status 143", "SIGTERM"),
            "hang up": ("exit status 129", "SIGHUP (the terminal is closed)"),
        }[action]
        moment = {
            "step": "in a training step",
            "test": "in a test pass",
            "saving": "while a checkpoint is written",
        }[where]
        on_disk = f"a checkpoint after the last finished batch; {SAME_BITS}"
        record(f"{name} {moment}, with loader workers", message, on_disk)


@pytest.mark.slow
def test_a_run_that_is_interrupted_in_the_range_test_can_be_started_again(
    start, complete, tmp_path
):
    setup, folder = {"max_lr": None, "epochs": 2}, tmp_path / "run"
    fault = {"where": "range_test", "n": 5, "action": "interrupt"}
    result = start(folder, setup=setup, fault=fault)
    assert result["status"] == 130
    assert [path.name for path in folder.iterdir()] == [".lock"]
    assert start(folder, setup=setup)["status"] == 0
    assert same(final_state(folder), final_state(complete(**setup)))
    record("Ctrl-C in the learning rate finder", "KeyboardInterrupt", "nothing")


def test_resuming_a_finished_run_changes_nothing(start, complete, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(complete(epochs=2), folder)
    before = {
        path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()
    }
    result = start(folder, "resume", setup={"epochs": 2})
    assert result["status"] == 0
    assert "nothing to do: this run has ended: epoch 2 of 2 is done" in result["out"]
    after = {
        path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()
    }
    assert after == before


def test_files_in_a_folder_are_not_overwritten(start, complete, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(complete(epochs=2), folder)
    (folder / "config.json").unlink()
    before = content(folder)
    failed = start(folder, setup={"epochs": 2})
    assert failed["status"] == 1 and "already contains a run" in failed["errors"]
    assert content(folder) == before
    assert start(folder, "resume", setup={"epochs": 2})["status"] == 0
    assert (folder / "config.json").exists()
    other = tmp_path / "other" / "run"
    (other / "checkpoints").mkdir(parents=True)
    (other / "checkpoints" / "mine.ckpt").write_text("mine")
    assert start(other, setup={"epochs": 2})["status"] == 1
    assert files(other) == ["checkpoints", "checkpoints/mine.ckpt"]


def test_a_finished_run_can_be_resumed_with_more_epochs(start, complete, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(complete(epochs=2), folder)
    result = start(folder, "resume", setup={"epochs": 2}, options={"epochs": 3})
    assert result["status"] == 0, result
    assert len(History.from_jsonl(folder / "history.jsonl")) == 3
    assert json.loads((folder / "config.json").read_text())["run"]["epochs"] == 3
    state = Checkpoints(folder / "checkpoints").latest()
    assert state["schedule"]["last_epoch"] == 29  # 30 steps, counted from 0
    result = start(folder, "resume", setup={"epochs": 2}, options={"epochs": 2})
    assert "epochs must be an integer >= 3" in result["errors"]


@pytest.mark.slow
def test_a_killed_train_command_can_be_resumed(tmp_path):
    options = "--dataset digits --limit 400 --batch_size 20 --epochs 3 --width 4 --max_lr 0.02"

    def train(*more: str) -> subprocess.Popen:
        return subprocess.Popen(
            command("era_s10_train", *more),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    complete = train(*options.split(), "--folder", "complete")
    assert complete.wait(timeout=120) == 0, complete.communicate()
    killed = train(*options.split(), "--folder", "run", "--checkpoint_steps", "7")
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    deadline = time.monotonic() + 60
    while len(checkpoints.paths()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert not (tmp_path / "run" / "weights.safetensors").exists()
    failed = train("--resume", "run", "--width", "4").communicate(timeout=60)[1]
    assert (
        failed
        == "era_s10_train: error: --width: cannot be given with --resume; leave it out\n"
    )
    resumed = train("--resume", "run")
    assert resumed.wait(timeout=120) == 0, resumed.communicate()
    assert same(final_state(tmp_path / "run"), final_state(tmp_path / "complete"))


def test_a_run_continues_when_its_output_is_closed(start, complete, tmp_path):
    folder = tmp_path / "run"
    result = start(folder, setup={"epochs": 2}, fault={"where": "output_closed"})
    assert result["status"] == 0, result
    assert same(final_state(folder), final_state(complete(epochs=2)))
    record(
        "an output that is closed, as by `| head`", result["errors"], "the complete run"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("figures_full", "a full disk when the figures are written"),
        ("figure_fails", "an exception while a figure is drawn"),
    ],
)
def test_a_figure_that_fails_is_a_warning(where, name, start, complete, tmp_path):
    folder, setup = tmp_path / "run", {"epochs": 2}
    result = start(folder, setup=setup, fault={"where": where})
    assert result["status"] == 0, result
    assert same(final_state(folder), final_state(complete(**setup)))
    assert not (folder / "misclassified.png").exists()
    warned = [line for line in result["errors"].splitlines() if "UserWarning" in line]
    message = re.sub(r".*UserWarning: ", "", warned[-1])
    assert "misclassified.png: figure not written" in message
    record(name, message, "history and weights; resuming draws the figures")
    check_resumed(start, folder, complete(**setup), setup)
    assert (folder / "misclassified.png").exists()


# ---------------------------------------------------------------- checkpoints that cannot be written


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("error_in_save", "an exception while a checkpoint is written"),
        ("disk_full", "a full disk"),
    ],
)
def test_a_checkpoint_that_cannot_be_written_is_an_error(
    where, name, start, complete, tmp_path
):
    setup, folder = {"epochs": 2}, tmp_path / "run"
    result = start(folder, setup=setup, fault={"where": where, "n": 3})
    assert result["status"] == 1
    kept = Checkpoints(folder / "checkpoints").paths()
    assert [load_checkpoint(path)["steps"] for path in kept] == [4, 0]
    if where == "disk_full":
        assert (
            "No space left on device" in result["errors"]
            and kept[0].name in result["errors"]
        )
    record(name, result["errors"], f"the previous checkpoint; {SAME_BITS}")
    check_resumed(start, folder, complete(**setup), setup)


# ---------------------------------------------------------------- damaged checkpoints


def damaged_copy(
    run: Path,  # folder of a killed run
    tmp_path: Path,  # parent of the copy
    newest: bytes | None,  # new content of the newest checkpoint; None to keep it
    others: bytes | None,  # new content of the other checkpoints; None to keep it
) -> Path:  # folder of the copy
    "Copy a run, and replace the content of its checkpoints."
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    paths = Checkpoints(folder / "checkpoints").paths()
    best = folder / "checkpoints" / "best.ckpt"
    for path, content in zip((*paths, best), (newest, others, others), strict=True):
        if content is not None:
            path.unlink()  # best.ckpt may be a hard link to the same file
            path.write_bytes(content)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    "Read all files of a folder except hidden ones."
    return {
        name: (folder / name).read_bytes() for name in files(folder) if "." in name[1:]
    }


@pytest.fixture(scope="module")
def killed(start, tmp_path_factory) -> Path:
    "Return the folder of a run that was killed in step 11, in its second epoch."
    folder = tmp_path_factory.mktemp("killed") / "run"
    result = start(folder, setup={"epochs": 2}, fault={"where": "step", "n": 11})
    assert result["status"] == -signal.SIGKILL
    return folder


RARER = [
    pytest.param(n, marks=pytest.mark.slow) for n in ("10 bytes", "all but one byte")
]


@pytest.mark.parametrize("length", ["nothing", "half", *RARER])
def test_a_truncated_checkpoint_is_not_used(length, killed, start, complete, tmp_path):
    full = Checkpoints(killed / "checkpoints").paths()[0].read_bytes()
    sizes = {"nothing": 0, "10 bytes": 10, "half": len(full) // 2}
    cut = full[: sizes.get(length, len(full) - 1)]
    folder = damaged_copy(killed, tmp_path, cut, None)
    result = check_resumed(start, folder, complete(epochs=2), {"epochs": 2})
    assert (
        "damaged checkpoint, truncated or modified; using an older checkpoint"
        in result["errors"]
    )
    shutil.rmtree(folder)
    folder = damaged_copy(killed, tmp_path, cut, cut)
    before = content(folder)
    failed = start(folder, "resume", setup={"epochs": 2})
    assert failed["status"] == 1
    assert "all 3 checkpoints are damaged" in failed["errors"]
    assert content(folder) == before
    if length == "half":
        warned = next(line for line in result["errors"].splitlines() if "older" in line)
        record(
            "the newest checkpoint truncated to 0, 10, half or all but one of its bytes",
            re.sub(r".*UserWarning: ", "", warned),
            f"the previous checkpoint is used; {SAME_BITS}",
        )
        record(
            "all checkpoints truncated",
            failed["errors"],
            UNCHANGED,
        )


def test_every_flipped_bit_is_detected(killed, tmp_path):
    full = Checkpoints(killed / "checkpoints").paths()[0].read_bytes()
    draw, damaged = random.Random(0), tmp_path / "run" / "step-1.ckpt"
    damaged.parent.mkdir()
    positions = {*range(60), *(draw.randrange(len(full)) for _ in range(200))}
    for position in positions:
        flipped = bytearray(full)
        flipped[position] ^= 1 << draw.randrange(8)
        damaged.write_bytes(flipped)
        with pytest.raises(ValueError, match="damaged checkpoint") as raised:
            load_checkpoint(damaged)
        assert damaged.read_bytes() == flipped
    COUNTS["flips"] += len(positions)
    record(
        "a flipped bit in one of the first 60 bytes or of 200 random bytes",
        f"ValueError: {raised.value}",
        UNCHANGED,
    )


def test_a_flipped_bit_in_the_weights_is_detected(complete, tmp_path):
    setup = {"epochs": 2}
    full = (complete(**setup) / "weights.safetensors").read_bytes()
    damaged, draw = tmp_path / "run" / "weights.safetensors", random.Random(0)
    damaged.parent.mkdir()
    start_of_tensors = 8 + int.from_bytes(full[:8], "little")
    places = random.Random(1).sample(range(start_of_tensors, len(full)), 300)
    for place in places:
        flipped = bytearray(full)
        flipped[place] ^= 1 << draw.randrange(8)
        damaged.write_bytes(flipped)
        with pytest.raises(ValueError, match="do not match their checksum") as raised:
            load_weights(Model(2, dropout=0.1), damaged)
    COUNTS["flips"] += len(places)
    record(
        "a flipped bit in one of 300 random bytes of weights.safetensors",
        f"ValueError: {raised.value}",
        UNCHANGED,
    )


class Code:
    "An object that creates a folder when it is unpickled."

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_code_in_a_checkpoint_is_not_executed(killed, start, tmp_path):
    mark = tmp_path / "mark"
    save_checkpoint({"model": Code(mark)}, tmp_path / "code.ckpt")
    code = (tmp_path / "code.ckpt").read_bytes()
    folder = damaged_copy(killed, tmp_path, code, code)
    before = content(folder)
    failed = start(folder, "resume", setup={"epochs": 2})
    assert failed["status"] == 1 and not mark.exists()
    assert content(folder) == before
    with pytest.raises(
        ValueError, match="contains objects other than tensors"
    ) as raised:
        load_checkpoint(tmp_path / "code.ckpt")
    message = f"ValueError: {raised.value}".replace(
        str(tmp_path), f"{folder}/checkpoints"
    )
    record("a checkpoint that contains code", message, "unchanged; no code is executed")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 4}, "a run of a different model"),
        ({"seed": 1}, "dataset.seed was 0 and is 1"),
        ({"limit": 300}, "dataset.limit was 200 and is 300"),
        ({"backend": "albumentations"}, "dataset.backend was 'batched'"),
        ({"max_lr": 0.02}, "recipe.max_lr was 0.01 and is 0.02"),
        ({"reversed": True}, "dataset.order was"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_a_different_run_gives_an_error(
    change, message, killed, start, tmp_path
):
    folder = damaged_copy(killed, tmp_path, None, None)
    before = content(folder)
    failed = start(folder, "resume", setup={"epochs": 2, **change})
    assert failed["status"] == 1
    assert message in failed["errors"]
    assert content(folder) == before
    (key,) = change
    names = {
        "width": "a checkpoint of a different model",
        "reversed": "the same images in a different order",
    }
    name = names.get(key, f"a checkpoint of a run with a different {key}")
    record(name, re.sub(r"'[0-9a-f]{32}'", "'…'", failed["errors"]), UNCHANGED)
    result = start(
        folder, "resume", setup={"epochs": 2, **change}, options={"strict": False}
    )
    if key == "reversed":  # other image files, which may be accepted
        assert result["status"] == 0 and message in result["errors"]
    else:
        assert result["status"] == 1 and content(folder) == before


def test_a_run_killed_after_the_end_of_an_epoch_is_resumed(
    killed, start, complete, tmp_path
):
    state = Checkpoints(killed / "checkpoints").latest()
    assert state["steps"] == 10  # the end of the first epoch
    folder = damaged_copy(killed, tmp_path, None, None)
    check_resumed(start, folder, complete(epochs=2), {"epochs": 2})


def test_different_versions_and_threads_give_an_error(killed, start, tmp_path):
    state = Checkpoints(killed / "checkpoints").latest()
    state["identity"]["versions"]["torch"] = "1.13"
    state["identity"]["threads"] = 64
    save_checkpoint(state, tmp_path / "old.ckpt")
    folder = damaged_copy(killed, tmp_path, (tmp_path / "old.ckpt").read_bytes(), None)
    failed = start(folder, "resume", setup={"epochs": 2})
    assert failed["status"] == 1
    assert "versions.torch was '1.13'" in failed["errors"]
    assert "threads was 64 and is 1" in failed["errors"]
    name = "a different version of torch and number of threads"
    record(name, failed["errors"], UNCHANGED)


@pytest.mark.slow
def test_two_runs_cannot_use_the_same_folder(start, tmp_path):
    folder = tmp_path / "run"
    with run_lock(folder):
        failed = start(folder, setup={"epochs": 1})
    assert failed["status"] == 1
    assert [path.name for path in folder.iterdir()] == [".lock"]
    record("two runs in one folder at once", failed["errors"], "the first run")
    assert start(folder, setup={"epochs": 1})["status"] == 0
    before = sorted(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    failed = start(folder, setup={"epochs": 1})
    assert failed["status"] == 1
    assert (
        sorted(path.read_bytes() for path in folder.rglob("*") if path.is_file())
        == before
    )
    record(
        "a new run in a folder that contains a run",
        failed["errors"],
        "the first run",
    )


def test_a_folder_with_files_of_the_user_is_refused(start, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "train.png").write_text("a photo of a train")
    failed = start(folder, setup={"epochs": 1})
    assert failed["status"] == 1
    assert files(folder) == ["train.png"]
    record("a new run in a folder with a train.png", failed["errors"], UNCHANGED)


def test_two_runs_in_two_threads_at_once_are_refused(tmp_path):
    experiments = [make_experiment({"epochs": 1}, str(tmp_path / n)) for n in "ab"]
    real, errors = experiments[0].train.step, []

    def second() -> None:
        with pytest.raises(RuntimeError) as raised:
            experiments[1].run()
        errors.append(f"RuntimeError: {raised.value}")

    def step(x, y):
        if not errors:
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()
        return real(x, y)

    experiments[0].train.step = step
    experiments[0].run()
    assert files(tmp_path)[0] == "a" and not (tmp_path / "b").exists()
    record("two runs in two threads of a process", errors[0], "the first run")


# ---------------------------------------------------------------- NaN and infinity


@pytest.mark.parametrize("where", ["input", "loss", "gradient"])
def test_nan_and_infinity_do_not_reach_weights_or_checkpoints(where, start, tmp_path):
    folder = tmp_path / "run"
    result = start(folder, setup={"epochs": 2}, fault={"where": where, "n": 7})
    assert result["status"] == 1
    assert "epoch 1, batch 7 of 10" in result["errors"]
    assert "the last good checkpoint is" in result["errors"]
    for path in Checkpoints(folder / "checkpoints").paths():
        state = load_checkpoint(path)
        assert state["steps"] <= 6
        assert all(value.isfinite().all() for value in state["model"].values())
    record(
        f"NaN or infinity in the {where}",
        result["errors"],
        "the last checkpoint before the fault",
    )


# ---------------------------------------------------------------- loader workers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "what"), [("worker_killed", "is killed"), ("worker_hangs", "hangs")]
)
def test_a_loader_worker_that_dies_or_hangs_is_an_error(
    where, what, start, complete, tmp_path
):
    setup, folder = {"epochs": 2, "workers": 2}, tmp_path / "run"
    result = start(folder, setup=setup, fault={"where": where, "n": 4})
    assert result["status"] == 1, result
    assert "a loader worker died or hung in epoch 1, batch" in result["errors"]
    assert "Traceback" not in result["errors"]
    message = re.sub(r"batch \d+", "batch N", plain(result["errors"]))
    record(f"a loader worker {what}", message, f"the last checkpoint; {SAME_BITS}")
    check_resumed(start, folder, complete(**setup), setup)


def test_workers_that_would_run_a_script_again_are_refused(monkeypatch, tmp_path):
    script = tmp_path / "train.py"
    script.write_text("from era_s10 import Experiment\n")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script), raising=False)
    monkeypatch.setattr("era_s10.workers.runs_main_again", lambda: True)
    with pytest.raises(ValueError, match="workers: each of 2 processes") as raised:
        make_experiment({"workers": 2}, str(tmp_path / "run"))
    assert files(tmp_path) == ["train.py"]
    message = f"ValueError: {raised.value}".replace(str(script), "train.py")
    name = "loader workers by spawn in a script without a __main__ guard"
    record(name, message, "nothing")


# ---------------------------------------------------------------- data files


@pytest.fixture
def known(monkeypatch) -> None:
    "Replace the published images of CIFAR-10 and MNIST by 80 photographs."
    x_train, y_train, x_test, y_test = small_cifar10()
    gray = tuple(a[..., :1] for a in (x_train, x_test))
    parts = {
        "cifar10": ((x_train, y_train), (x_test, y_test)),
        "mnist": ((gray[0], y_train), (gray[1], y_test)),
    }
    digests = {}
    for (name, arrays), kind in zip(parts.items(), (CIFAR10, MNIST), strict=True):
        prints = {}
        for part, (x, y) in zip(("train", "test"), arrays, strict=True):
            digests[f"{name}_{part}"] = np.sort(image_digests(x, y))
            prints[part] = fingerprint(x, y)
        monkeypatch.setattr(kind, "checksums", prints)
    digests["fashion-mnist_train"] = np.array([], np.uint64)
    monkeypatch.setattr("era_s10.sources._known_digests", digests.__getitem__)


def idx(array: np.ndarray) -> bytes:
    "Return the content of an IDX file."
    return (
        bytes([0, 0, 8, array.ndim])
        + np.array(array.shape, ">u4").tobytes()
        + array.tobytes()
    )


def write_sources(folder: Path) -> dict[str, tuple[type, Path]]:
    "Write the same images in every format; return dataset class and path of each."
    arrays = small_cifar10()
    write_batches(folder / "batches", *arrays)
    write_npz(folder / "npz" / "cifar10.npz", *arrays)
    write_tree(folder / "tree" / "cifar10", *arrays)
    (folder / "mnist").mkdir()
    for part, x, y in (("train", *arrays[:2]), ("t10k", *arrays[2:])):
        (folder / "mnist" / f"{part}-images-idx3-ubyte").write_bytes(idx(x[..., 0]))
        (folder / "mnist" / f"{part}-labels-idx1-ubyte").write_bytes(
            idx(y.astype(np.uint8))
        )
    return {
        "official batches": (CIFAR10, folder / "batches"),
        "an .npz file": (CIFAR10, folder / "npz"),
        "a folder of images": (CIFAR10, folder / "tree"),
        "MNIST's files": (MNIST, folder / "mnist"),
    }


def change_pixel(path: Path) -> None:
    "Change one bit of one image; the file remains valid."
    if path.suffix == ".png":
        pixels = np.asarray(Image.open(path)).copy()
        pixels[3, 4] ^= 1
        Image.fromarray(pixels).save(path)
    elif path.suffix == ".npz":
        with np.load(path) as file:
            arrays = dict(file)
        arrays["x_train"][7, 3, 4] ^= 1
        np.savez(path, **arrays)
    else:
        image, content = small_cifar10()[0][25], bytearray(path.read_bytes())
        planes = image.transpose(2, 0, 1) if "batch" in path.name else image[..., :1]
        start = bytes(content).index(planes.tobytes())
        content[start + 100] ^= 1
        path.write_bytes(content)


DAMAGED_FILES = {
    "official batches": "cifar-10-batches-py/data_batch_3",
    "an .npz file": "cifar10.npz",
    "a folder of images": "cifar10/train/cat/10.png",
    "MNIST's files": "train-images-idx3-ubyte",
}


@pytest.mark.parametrize("source", list(DAMAGED_FILES))
@pytest.mark.parametrize("fault", ["missing", "cut in half", "one bit changed"])
def test_errors_about_damaged_data_contain_the_file_name(
    source, fault, known, tmp_path
):
    kind, folder = write_sources(tmp_path / "run")[source]
    path = folder / DAMAGED_FILES[source]
    assert len(kind(folder).y_train) == 60
    if fault == "missing":
        path.unlink()
    elif fault == "cut in half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        change_pixel(path)
    before = files(folder)
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        kind(folder)
    assert files(folder) == before
    text = str(raised.value)
    if fault == "one bit changed":
        assert re.search(
            rf"1 of 60 differ, the first in {path} \(image \d+\); 1 of 60 are", text
        )
    elif (source, fault) == ("a folder of images", "missing"):
        assert "0 of 59 differ; 1 of 60 are missing" in text
    elif (source, fault) in (("an .npz file", "missing"), ("MNIST's files", "missing")):
        assert f"{'MNIST' if kind is MNIST else 'CIFAR-10'} is not in" in text
    else:
        assert path.name.removesuffix("-ubyte") in text
    message = f"{type(raised.value).__name__}: {text}"
    record(f"{source}: {DAMAGED_FILES[source]} {fault}", message, UNCHANGED)


def test_checksums_do_not_depend_on_the_order_of_the_images(known, tmp_path):
    x_train, y_train, x_test, y_test = small_cifar10()
    flipped = x_train[::-1], y_train[::-1]
    path = write_npz(tmp_path / "x.npz", *flipped, x_test, y_test)
    assert len(CIFAR10(path).y_train) == 60
    y_train[[0, 1]] = y_train[[1, 0]]  # swap two labels
    with pytest.raises(ValueError, match="2 of 60 differ"):
        CIFAR10(write_npz(tmp_path / "y.npz", x_train, y_train, x_test, y_test))


@needs_cifar10
def test_real_images_are_checked_against_the_published_checksums(tmp_path):
    with np.load(DATA / "cifar10.npz") as file:
        arrays = dict(file)
    arrays["x_train"][123, 5, 6, 0] ^= 1
    np.savez(tmp_path / "cifar10.npz", **arrays)
    with pytest.raises(
        ValueError, match=r"1 of 50,000 differ.* 1 of 50,000 are missing"
    ):
        CIFAR10(tmp_path)


# ---------------------------------------------------------------- downloads


@pytest.fixture
def served(monkeypatch, tmp_path) -> Iterator[tuple[str, bytes, list]]:
    "Serve an archive with and without faults; return address, archive and requests."
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    content = write_archive(tmp_path / "cifar-10-python.tar.gz", small_cifar10())
    requests: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        "Server whose fault is the first part of the path."

        def log_message(self, *args) -> None:
            pass

        def do_GET(self) -> None:
            fault, wanted = self.path.split("/")[1], self.headers.get("Range")
            requests.append((fault, wanted))
            start = int(wanted.split("=")[1].rstrip("-")) if wanted else 0
            body = bytes(len(content)) if fault == "wrong" else content[start:]
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(body)))
            if wanted:
                self.send_header(
                    "Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}"
                )
            self.end_headers()
            try:
                if fault == "breaks" and not wanted:
                    self.wfile.write(body[: len(body) // 2])
                elif fault == "stalls":
                    self.wfile.write(body[: len(body) // 2])
                    time.sleep(3)
                elif fault == "crawls":
                    for i in range(0, 4000, 100):
                        self.wfile.write(body[i : i + 100])
                        time.sleep(0.05)
                elif fault == "slow":
                    time.sleep(1)
                    self.wfile.write(body)
                else:
                    self.wfile.write(body)
            except OSError:
                pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.05}
    )
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", content, requests
    server.shutdown()
    thread.join()
    server.server_close()


def archives(url: str, content: bytes, *faults: str) -> tuple[Download, ...]:
    "Return one Download per fault of the server."
    name, md5 = "cifar-10-python.tar.gz", hashlib.md5(content).hexdigest()
    return tuple(
        Download((f"{url}/{fault}/x",), md5, name, 1, len(content)) for fault in faults
    )


def test_an_interrupted_download_is_resumed(served, known, monkeypatch, tmp_path):
    url, content, requests = served
    monkeypatch.setattr(CIFAR10, "archives", archives(url, content, "breaks"))
    folder = tmp_path / "run"
    folder.mkdir()
    assert len(CIFAR10(folder, download=True).y_train) == 60
    assert [fault for fault, _ in requests] == ["breaks", "breaks"]
    assert 0 < int(requests[1][1].strip("bytes=-")) <= len(content) // 2
    record(
        "a download that breaks off halfway",
        "no message",
        "the complete archive and its images",
    )


@pytest.mark.parametrize("fault", ["stalls", "crawls", "wrong"])
def test_the_second_source_is_used_if_the_first_one_fails(
    fault, served, known, monkeypatch, tmp_path
):
    url, content, requests = served
    monkeypatch.setattr(CIFAR10, "archives", archives(url, content, fault, "good"))
    monkeypatch.setattr(
        Download.fetch, "__defaults__", (0.5, 1)
    )  # seconds and attempts
    folder = tmp_path / "run"
    folder.mkdir()
    assert len(CIFAR10(folder, download=True).y_train) == 60
    assert [fault for fault, _ in requests] == [fault, "good"]
    names = {
        "stalls": "stops sending data",
        "crawls": "is too slow",
        "wrong": "sends wrong bytes",
    }
    name = f"a download that {names[fault]}, with a second source"
    record(name, "no message", "the complete images of the second source")


def test_a_download_without_a_working_source_is_an_error(
    served, known, monkeypatch, tmp_path
):
    url, content, _ = served
    monkeypatch.setattr(CIFAR10, "archives", archives(url, content, "wrong"))
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(OSError, match=r"wrong checksum.*by hand") as raised:
        CIFAR10(folder, download=True)
    assert files(folder) == [".lock"]
    message = re.sub(r"127\.0\.0\.1:\d+", "HOST", f"OSError: {raised.value}")
    record("wrong bytes, without a second source", message, "nothing")


@pytest.mark.slow
def test_two_processes_download_a_file_only_once(served, known, monkeypatch, tmp_path):
    url, content, requests = served
    folder = tmp_path / "run"
    folder.mkdir()
    code = f"""
import hashlib, sys
from era_s10.datasets.cifar10 import CIFAR10
from era_s10.downloads import Download

class Local(CIFAR10):
    checksums = None
    archives = (Download(("{url}/slow/x",), "{hashlib.md5(content).hexdigest()}", "x.tar.gz", 1),)

print("ready", flush=True)
sys.stdin.readline()
print(len(Local("{folder}", download=True).y_train))
"""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(2)
    ]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    assert [child.communicate(timeout=60)[0] for child in children] == ["60\n", "60\n"]
    assert len(requests) == 1
    record(
        "two processes that download at once",
        "no message; the second process waits",
        "the complete images of one download",
    )


@pytest.mark.parametrize("with_archive", [True, False])
def test_a_damaged_data_folder_is_repaired(
    with_archive, served, known, monkeypatch, tmp_path
):
    url, content, requests = served
    monkeypatch.setattr(CIFAR10, "archives", archives(url, content, "good"))
    folder = tmp_path / "run"
    write_batches(folder, *small_cifar10())
    (folder / "cifar-10-batches-py" / "batches.meta").unlink()
    with pytest.raises(FileNotFoundError, match=r"batches\.meta") as raised:
        CIFAR10(folder)
    if with_archive:  # needs no download
        (folder / "cifar-10-python.tar.gz").write_bytes(content)
        assert len(CIFAR10(folder).y_train) == 60
        assert requests == []
        name, message = "batches.meta missing, but the archive exists", "no message"
    else:
        message = f"FileNotFoundError: {raised.value}; no message with download=True"
        assert len(CIFAR10(folder, download=True).y_train) == 60
        assert len(requests) == 1
        name = "batches.meta missing, and no archive"
    quarantined = folder / "cifar-10-batches-py.damaged"
    assert len(list(quarantined.iterdir())) == 6  # nothing is deleted
    record(
        name, message, "the complete images, and the old folder renamed to ….damaged"
    )


@pytest.mark.parametrize("filtered", [True, False])
def test_an_archive_cannot_write_outside_its_folder(filtered, monkeypatch, tmp_path):
    if not filtered:  # Python before 3.11.4
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    (tmp_path / "evil.txt").write_text("evil")
    with tarfile.open(tmp_path / "evil.tar", "w") as file:
        file.add(tmp_path / "evil.txt", arcname="../escaped.txt")
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.move(tmp_path / "evil.tar", folder / "evil.tar")
    with pytest.raises(ValueError, match="outside") as raised:
        unpack_tar(folder / "evil.tar", folder)
    assert not (tmp_path / "escaped.txt").exists()
    message = re.sub(r"'\S*escaped", "'…escaped", f"ValueError: {raised.value}")
    if filtered:
        record(
            "an archive with members in a parent folder (../)",
            re.sub(r"\.unpacking-\w+", "…", message),
            UNCHANGED,
        )
    with tarfile.open(folder / "linked.tar", "w") as file:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, ".."
        file.addfile(link)
        file.add(tmp_path / "evil.txt", arcname="link/escaped.txt")
    with pytest.raises(ValueError, match=r"outside|neither a file nor a folder"):
        unpack_tar(folder / "linked.tar", folder)
    assert sorted(path.name for path in folder.iterdir()) == ["evil.tar", "linked.tar"]


# ---------------------------------------------------------------- costs, and the table


def work_before_first_step(call: str, folder: Path) -> dict[str, int]:
    "Run or resume an experiment, and count the work before its first step."
    experiment = make_experiment({"limit": None, "epochs": 2}, str(folder))
    counts, at_steps = {"batches": 0, "forward passes": 0}, []
    samples = experiment.dataset.train_loader.dataset
    apply, step = samples.pipeline.apply, experiment.train.step

    def counted(*args):
        counts["batches"] += 1
        return apply(*args)

    def forward(*_):
        counts["forward passes"] += 1

    def stepped(x, y):
        at_steps.append(dict(counts))
        if len(at_steps) == 9:
            signal.raise_signal(signal.SIGINT)
        return step(x, y)

    samples.pipeline.apply, experiment.train.step = counted, stepped
    experiment.model.register_forward_pre_hook(forward)
    with pytest.raises(KeyboardInterrupt):
        getattr(experiment, call)()
    assert at_steps[-1] == {"batches": 9, "forward passes": 8}
    return at_steps[0]


def test_resuming_does_not_prepare_finished_batches_again(tmp_path):
    for call in ("run", "resume"):
        assert work_before_first_step(call, tmp_path / "run") == {
            "batches": 1,
            "forward passes": 0,
        }
        assert Checkpoints(tmp_path / "run" / "checkpoints").latest()["steps"] in (
            9,
            18,
        )


def test_saving_takes_at_most_half_a_percent_of_the_time(monkeypatch, tmp_path):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    checkpoints = Checkpoints(tmp_path, CheckpointPolicy(seconds=1))
    monkeypatch.setattr(
        "era_s10.checkpoint.save_checkpoint", lambda *_: now.__setitem__(0, now[0] + 3)
    )
    monkeypatch.setattr("era_s10.checkpoint.load_checkpoint", lambda *_: None)
    checkpoints.start(0)
    while now[0] < 10_000:
        now[0] += 1.0
        if checkpoints.due(int(now[0])):
            checkpoints.save({}, int(now[0]))
    assert 0.004 < checkpoints.total / now[0] < 0.0055


def test_the_table_of_faults_is_up_to_date(request):
    found = {"kills": COUNTS["kills"], "flips": COUNTS["flips"], "faults": FOUND}
    all_ran = not request.config.getoption("-m") and len(FOUND) >= 45
    shown = json.loads(TABLE.read_text())
    if os.environ.get("ERA_S10_FAULTS") and all_ran:
        TABLE.write_text(json.dumps(shown | found, indent=1, ensure_ascii=False) + "\n")
        shown |= found
    assert {name: shown["faults"].get(name) for name in FOUND} == FOUND
    if not all_ran:
        pytest.skip(
            "only the faults of the tests that ran were compared; -m '' runs all tests"
        )
    assert {name: shown[name] for name in found} == found
