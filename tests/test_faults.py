"""What guards a run's work: each fault as a real fault, and afterwards nothing is lost.

Children are forked by `nursery.py`, so that imports are paid once. What a user sees and what is left
on the disk is collected in `nbs/results/faults.json`, from which the page is made; `ERA_S10_FAULTS=1`
with `pytest -m ''` writes it anew."""

import hashlib
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
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from nursery import make
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
from era_s10.run_folder import History
from era_s10.sources import fingerprint, image_digests

HERE = Path(__file__).parent
TABLE = HERE.parent / "nbs" / "results" / "faults.json"
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
FOUND: dict[str, dict[str, str]] = {}  # fault: what is seen, what is left
COUNTS = {"kills": 0, "flips": 0}
SETUPS = [
    {"backend": backend, "workers": workers}
    for backend in ("batched", "albumentations")
    for workers in (0, 2)
]


class Nursery:
    "The process that forks runs."

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, HERE / "nursery.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "TQDM_DISABLE": "1",
                "MPLBACKEND": "agg",
                "OMP_NUM_THREADS": "1",
            },
        )

    def __call__(self, folder: Path, call: str = "run", **request) -> dict:
        "Let a child run or resume in a folder, and say how it ended."
        request = {"setup": {}, **request, "folder": str(folder), "call": call}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    "Keep one for all tests."
    nursery = Nursery()
    yield nursery
    nursery.process.stdin.close()
    nursery.process.wait(timeout=30)


@pytest.fixture(scope="module")
def is_complete(nursery, tmp_path_factory) -> Callable[..., Path]:
    "Return the folder of a run that nothing befell."
    made = {}

    def run(**setup) -> Path:
        key = json.dumps(setup, sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole") / "run"
            ended = nursery(made[key], setup=setup)
            assert ended["status"] == 0, ended
        return made[key]

    return run


def trace(folder: Path) -> dict:  # Of a finished run
    "Return all that a run ends with, but for its timings."
    state = Checkpoints(folder / "checkpoints").latest()
    for name in (
        "identity",
        "began",
        "modern",
    ):  # the best of the epochs that were saved
        del state[name]
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


def plain(text: str) -> str:
    "Take away what differs from run to run: places, process numbers, steps."
    text = text.strip().splitlines()[-1] if text.strip() else "nothing"
    text = re.sub(r"(/[\w.+-]+)+/run\b", "FOLDER", text)
    text = re.sub(r"step-\d+", "step-N", text)
    for package in ("torch", "albumentations", "numpy"):
        text = text.replace(f"is '{version(package)}'", "is '…'")
    text = re.sub(r"pid(\(s\))? [\d, ]+\d", "pid N", text)
    return re.sub(r"\.\d+\.part", ".part", text)


def record(fault: str, seen: str, left: str) -> None:
    "Put a line into the table."
    assert fault not in FOUND
    FOUND[fault] = {"a user sees": plain(seen), "on the disk": left}


def resumed(
    nursery: Nursery, folder: Path, expected: Path, setup: dict | None = None
) -> dict:
    "Go on with a run to its end, which must be that of the run that nothing befell."
    ended = nursery(folder, "resume", setup=setup or {})
    assert ended["status"] == 0, ended
    assert same(trace(folder), trace(expected))
    assert not list(folder.rglob("*.part"))
    return ended


# ---------------------------------------------------------------- killed at any moment


@pytest.mark.parametrize(
    "setup",
    [SETUPS[0], *(pytest.param(setup, marks=pytest.mark.slow) for setup in SETUPS[1:])],
    ids=lambda s: f"{s['backend']}-{s['workers']}",
)
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(
    setup, nursery, whole, tmp_path
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
        ended = nursery(folder, call, **request)
        assert ended["status"] == -signal.SIGKILL, (where, request, ended)
        kills[where] += 1
        if (folder / "config.json").exists():
            call = "resume"
        else:  # so early that nothing was begun
            shutil.rmtree(folder, ignore_errors=True)
    resumed(nursery, folder, whole(**setup), setup)
    assert min(kills.values()) >= 2 and sum(kills.values()) == 14
    COUNTS["kills"] += sum(kills.values())
    if COUNTS["kills"] >= 50:
        record(
            "SIGKILL in a step, in a test pass, in the middle of a save, before its file is moved",
            "Killed",
            "the checkpoint before; resumed, the run ends with the same bits",
        )


# ---------------------------------------------------------------- stopped, and gone on with


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("where", ["step", "test", "saving"])
@pytest.mark.parametrize("end", ["interrupt", "terminate"])
def test_a_run_that_is_stopped_writes_where_it_stands(
    end, where, workers, nursery, whole, tmp_path
):
    setup, folder = {"workers": workers, "epochs": 3, "steps": 11}, tmp_path / "run"
    n = {"step": 18, "test": 9, "saving": 2}[where]
    ended = nursery(folder, setup=setup, fault={"where": where, "n": n, "end": end})
    assert ended["status"] == {"interrupt": 130, "terminate": 143}[end], ended
    assert ended["errors"] == ""
    state = Checkpoints(folder / "checkpoints").latest()
    assert state["steps"] == {"step": 18, "test": 10, "saving": 11}[where]
    resumed(nursery, folder, whole(**setup), setup)
    if workers:
        seen = {"interrupt": "KeyboardInterrupt", "terminate": "exit status 143"}[end]
        name = {"interrupt": "Ctrl-C", "terminate": "SIGTERM"}[end]
        place = {"step": "a batch", "test": "a test pass", "saving": "a save"}[where]
        left = "a checkpoint of the batch that was finished; resumed, the same bits"
        record(f"{name} in {place}, with loader workers", seen, left)


def test_an_interrupted_search_leaves_nothing_and_the_run_can_be_begun_again(
    nursery, whole, tmp_path
):
    setup, folder = {"max_lr": None, "epochs": 2}, tmp_path / "run"
    fault = {"where": "search", "n": 5, "end": "interrupt"}
    ended = nursery(folder, setup=setup, fault=fault)
    assert ended["status"] == 130
    assert [path.name for path in folder.iterdir()] == [".lock"]
    assert nursery(folder, setup=setup)["status"] == 0
    assert same(trace(folder), trace(whole(**setup)))
    record("Ctrl-C in the search for the learning rate", "KeyboardInterrupt", "nothing")


def test_a_run_that_has_ended_does_nothing_more(nursery, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole(epochs=2), folder)
    before = {
        path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()
    }
    ended = nursery(folder, "resume", setup={"epochs": 2})
    assert ended["status"] == 0
    assert "nothing to do: this run has ended: epoch 2 of 2 is done" in ended["out"]
    after = {
        path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()
    }
    assert after == before


def test_what_is_in_a_folder_is_not_written_over(nursery, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole(epochs=2), folder)
    (folder / "config.json").unlink()
    before = content(folder)
    refused = nursery(folder, setup={"epochs": 2})
    assert refused["status"] == 1 and "holds a run already" in refused["errors"]
    assert content(folder) == before
    assert nursery(folder, "resume", setup={"epochs": 2})["status"] == 0
    assert (folder / "config.json").exists()
    foreign = tmp_path / "foreign" / "run"
    (foreign / "checkpoints").mkdir(parents=True)
    (foreign / "checkpoints" / "mine.ckpt").write_text("mine")
    assert nursery(foreign, setup={"epochs": 2})["status"] == 1
    assert files(foreign) == ["checkpoints", "checkpoints/mine.ckpt"]


def test_more_epochs_are_another_schedule_and_have_to_be_asked_for(
    nursery, whole, tmp_path
):
    folder = tmp_path / "run"
    shutil.copytree(whole(epochs=2), folder)
    ended = nursery(folder, "resume", setup={"epochs": 2}, options={"epochs": 3})
    assert ended["status"] == 0, ended
    assert len(History.from_jsonl(folder / "history.jsonl")) == 3
    assert json.loads((folder / "config.json").read_text())["run"]["epochs"] == 3
    state = Checkpoints(folder / "checkpoints").latest()
    assert state["schedule"]["last_epoch"] == 29  # of 30 steps, the first being 0
    ended = nursery(folder, "resume", setup={"epochs": 2}, options={"epochs": 2})
    assert "of at least 3" in ended["errors"]


@pytest.mark.slow
def test_a_killed_command_is_resumed_by_another(tmp_path):
    options = "--dataset digits --limit 400 --batch_size 20 --epochs 3 --width 4 --max_lr 0.02"

    def train(*more: str) -> subprocess.Popen:
        return subprocess.Popen(
            command("era_s10_train", *more),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    whole = train(*options.split(), "--folder", "whole")
    assert whole.wait(timeout=120) == 0, whole.communicate()
    killed = train(*options.split(), "--folder", "run", "--checkpoint_steps", "7")
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    deadline = time.monotonic() + 60
    while len(checkpoints.paths()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert not (tmp_path / "run" / "weights.safetensors").exists()
    refused = train("--resume", "run", "--width", "4").communicate(timeout=60)[1]
    assert (
        refused
        == "era_s10_train: error: --resume takes the run's own options, not --width\n"
    )
    resumed = train("--resume", "run")
    assert resumed.wait(timeout=120) == 0, resumed.communicate()
    assert same(trace(tmp_path / "run"), trace(tmp_path / "whole"))


# ---------------------------------------------------------------- a save that fails


@pytest.mark.parametrize(
    "where, name, left",
    [
        ("raises", "an exception inside a save", "the checkpoint before, whole"),
        ("full", "no room on the disk", "the checkpoint before, whole"),
    ],
)
def test_a_save_that_fails_is_an_error_at_once(
    where, name, left, nursery, whole, tmp_path
):
    setup, folder = {"epochs": 2}, tmp_path / "run"
    ended = nursery(folder, setup=setup, fault={"where": where, "n": 3})
    assert ended["status"] == 1
    kept = Checkpoints(folder / "checkpoints").paths()
    assert [load_checkpoint(path)["steps"] for path in kept] == [4, 0]
    if where == "full":
        assert (
            "No space left on device" in ended["errors"]
            and kept[0].name in ended["errors"]
        )
    record(name, ended["errors"], left)
    resumed(nursery, folder, whole(**setup), setup)


# ---------------------------------------------------------------- damaged checkpoints


def damaged(
    whole: Callable[..., Path],
    tmp_path: Path,
    newest: bytes | None,
    others: bytes | None,
):
    "Copy a run that has been cut off, and put other bytes into its checkpoints."
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    paths = Checkpoints(folder / "checkpoints").paths()
    best = folder / "checkpoints" / "best.ckpt"
    for path, content in zip((*paths, best), (newest, others, others), strict=True):
        if content is not None:
            path.unlink()  # the best may be the same file
            path.write_bytes(content)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    "Read all files of a folder."
    return {
        name: (folder / name).read_bytes() for name in files(folder) if "." in name[1:]
    }


@pytest.fixture(scope="module")
def cut_off(nursery, tmp_path_factory) -> Path:
    "Keep the folder of a run that was killed."
    folder = tmp_path_factory.mktemp("cut") / "run"
    ended = nursery(folder, setup={"epochs": 2}, fault={"where": "step", "n": 11})
    assert ended["status"] == -signal.SIGKILL
    return folder


@pytest.mark.parametrize("length", ["nothing", "10 bytes", "half", "all but one byte"])
def test_a_checkpoint_that_was_cut_is_not_used(
    length, cut_off, nursery, whole, tmp_path
):
    atomic_write = Checkpoints(cut_off / "checkpoints").paths()[0].read_bytes()
    size = len(atomic_write)
    cut = atomic_write[
        : {"nothing": 0, "10 bytes": 10, "half": size // 2}.get(length, size - 1)
    ]
    folder = damaged(cut_off, tmp_path, cut, None)
    ended = resumed(nursery, folder, whole(epochs=2), {"epochs": 2})
    assert "cut off, or changed since: an older one is taken" in ended["errors"]
    shutil.rmtree(folder)
    folder = damaged(cut_off, tmp_path, cut, cut)
    before = content(folder)
    refused = nursery(folder, "resume", setup={"epochs": 2})
    assert refused["status"] == 1
    assert "none of its 3 checkpoints is whole" in refused["errors"]
    assert content(folder) == before
    if length == "half":
        warned = next(line for line in ended["errors"].splitlines() if "older" in line)
        record(
            "the newest checkpoint cut to 0, 10, half or all but one of its bytes",
            re.sub(r".*UserWarning: ", "", warned),
            "the one before serves; resumed, the same bits",
        )
        record(
            "all checkpoints cut",
            refused["errors"],
            "all as it was: nothing is touched",
        )


def test_a_flipped_bit_anywhere_is_seen(cut_off, tmp_path):
    atomic_write = Checkpoints(cut_off / "checkpoints").paths()[0].read_bytes()
    draw, damaged = random.Random(0), tmp_path / "run" / "step-1.ckpt"
    damaged.parent.mkdir()
    places = {*range(60), *(draw.randrange(len(atomic_write)) for _ in range(200))}
    for place in places:
        flipped = bytearray(atomic_write)
        flipped[place] ^= 1 << draw.randrange(8)
        damaged.write_bytes(flipped)
        with pytest.raises(ValueError, match="cut off, or changed") as raised:
            load_checkpoint(damaged)
        assert damaged.read_bytes() == flipped
    COUNTS["flips"] += len(places)
    record(
        "a flipped bit in any of 200 random bytes, or of the first 60",
        f"ValueError: {raised.value}",
        "all as it was: nothing is touched",
    )


class Code:
    "Something that runs a command when it is unpickled."

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_checkpoint_that_carries_code_is_not_run(cut_off, nursery, tmp_path):
    mark = tmp_path / "mark"
    save_checkpoint({"model": Code(mark)}, tmp_path / "code.ckpt")
    code = (tmp_path / "code.ckpt").read_bytes()
    folder = damaged(cut_off, tmp_path, code, code)
    before = content(folder)
    refused = nursery(folder, "resume", setup={"epochs": 2})
    assert refused["status"] == 1 and not mark.exists()
    assert content(folder) == before
    with pytest.raises(ValueError, match="holds other things than tensors") as raised:
        load_checkpoint(tmp_path / "code.ckpt")
    seen = f"ValueError: {raised.value}".replace(str(tmp_path), f"{folder}/checkpoints")
    record("a checkpoint that carries code", seen, "all as it was; the code is not run")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"width": 4}, "another net's run"),
        ({"seed": 1}, "dataset.seed was 0 and is 1"),
        ({"limit": 300}, "dataset.limit was 200 and is 300"),
        ({"backend": "albumentations"}, "dataset.backend was 'batched'"),
        ({"max_lr": 0.02}, "recipe.max_lr was 0.01 and is 0.02"),
        ({"turned": True}, "dataset.order was"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_run_s_checkpoint_is_refused_by_name(
    change, words, cut_off, nursery, tmp_path
):
    folder = damaged(cut_off, tmp_path, None, None)
    before = content(folder)
    refused = nursery(folder, "resume", setup={"epochs": 2, **change})
    assert refused["status"] == 1
    assert words in refused["errors"]
    assert content(folder) == before
    names = {
        "width": "a checkpoint of another net",
        "turned": "the same images in another order",
    }
    name = names.get(
        next(iter(change)), f"a checkpoint of another {next(iter(change))}"
    )
    record(name, re.sub(r"'[0-9a-f]{32}'", "'…'", refused["errors"]), "all as it was")
    ended = nursery(
        folder, "resume", setup={"epochs": 2, **change}, options={"strict": False}
    )
    if next(iter(change)) in ("seed", "backend", "turned"):  # these fit what was saved
        assert ended["status"] == 0 and words in ended["errors"]
    else:
        assert ended["status"] == 1 and content(folder) == before


def test_a_run_killed_after_an_epoch_s_end_is_not_taken_for_ended(
    cut_off, nursery, whole, tmp_path
):
    assert (
        Checkpoints(cut_off / "checkpoints").latest()["steps"] == 10
    )  # an epoch's end
    folder = damaged(cut_off, tmp_path, None, None)
    resumed(nursery, folder, whole(epochs=2), {"epochs": 2})


def test_another_version_is_refused_by_name(cut_off, nursery, tmp_path):
    state = Checkpoints(cut_off / "checkpoints").latest()
    state["identity"]["versions"]["torch"] = "1.13"
    state["identity"]["threads"] = 64
    save_checkpoint(state, tmp_path / "old.ckpt")
    folder = damaged(cut_off, tmp_path, (tmp_path / "old.ckpt").read_bytes(), None)
    refused = nursery(folder, "resume", setup={"epochs": 2})
    assert refused["status"] == 1
    assert "versions.torch was '1.13'" in refused["errors"]
    assert "threads was 64 and is 1" in refused["errors"]
    name = "another version of torch, another number of threads"
    record(name, refused["errors"], "all as it was")


def test_two_runs_into_one_folder(nursery, tmp_path):
    folder = tmp_path / "run"
    with run_lock(folder):
        refused = nursery(folder, setup={"epochs": 1})
    assert refused["status"] == 1
    assert [path.name for path in folder.iterdir()] == [".lock"]
    record("two runs into one folder at once", refused["errors"], "the first one's run")
    assert nursery(folder, setup={"epochs": 1})["status"] == 0
    before = sorted(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    refused = nursery(folder, setup={"epochs": 1})
    assert refused["status"] == 1
    assert (
        sorted(path.read_bytes() for path in folder.rglob("*") if path.is_file())
        == before
    )
    record(
        "a new run into the folder of another", refused["errors"], "the first one's run"
    )


# ---------------------------------------------------------------- not a number


@pytest.mark.parametrize("where", ["input", "loss", "gradient"])
def test_what_is_not_finite_reaches_neither_weights_nor_checkpoint(
    where, nursery, tmp_path
):
    folder = tmp_path / "run"
    ended = nursery(folder, setup={"epochs": 2}, fault={"where": where, "n": 7})
    assert ended["status"] == 1
    assert "epoch 1, batch 7 of 10" in ended["errors"]
    assert "the last good checkpoint is" in ended["errors"]
    for path in Checkpoints(folder / "checkpoints").paths():
        state = load_checkpoint(path)
        assert state["steps"] <= 6
        assert all(value.isfinite().all() for value in state["model"].values())
    record(
        f"NaN or infinity in the {where}",
        ended["errors"],
        "the last checkpoint before it",
    )


# ---------------------------------------------------------------- workers


@pytest.mark.parametrize("where, name", [("worker", "is killed"), ("asleep", "hangs")])
def test_a_worker_that_dies_or_hangs_is_one_error(
    where, name, nursery, whole, tmp_path
):
    setup, folder = {"epochs": 2, "workers": 2}, tmp_path / "run"
    ended = nursery(folder, setup=setup, fault={"where": where, "n": 4})
    assert ended["status"] == 1, ended
    assert "a loader worker died or hung in epoch 1, batch" in ended["errors"]
    assert "Traceback" not in ended["errors"]
    seen = re.sub(r"batch \d+", "batch N", plain(ended["errors"]))
    record(
        f"a loader worker {name}", seen, "the last checkpoint; resumed, the same bits"
    )
    resumed(nursery, folder, whole(**setup), setup)


# ---------------------------------------------------------------- data on the disk


@pytest.fixture
def known(monkeypatch) -> None:
    "Let 72 photographs be what was published as CIFAR-10 and MNIST."
    x_train, y_train, x_test, y_test = small_cifar10()
    gray = tuple(a[..., :1] for a in (x_train, x_test))
    parts = {
        "cifar10": ((x_train, y_train), (x_test, y_test)),
        "mnist": ((gray[0], y_train), (gray[1], y_test)),
    }
    digests = {}
    for (name, both), kind in zip(parts.items(), (CIFAR10, MNIST), strict=True):
        prints = {}
        for part, (x, y) in zip(("train", "test"), both, strict=True):
            digests[f"{name}_{part}"] = np.sort(image_digests(x, y))
            prints[part] = fingerprint(x, y)
        monkeypatch.setattr(kind, "checksums", prints)
    monkeypatch.setattr("era_s10.sources._known_digests", digests.__getitem__)


def idx(array: np.ndarray) -> bytes:
    "Return an IDX file of bytes."
    return (
        bytes([0, 0, 8, array.ndim])
        + np.array(array.shape, ">u4").tobytes()
        + array.tobytes()
    )


def write_sources(folder: Path) -> dict[str, tuple[type, Path]]:
    "Write the same images in every form; return who reads them, and where they are."
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
    "Change one bit of one image, and keep the file whole."
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
        place = bytes(content).index(planes.tobytes())
        content[place + 100] ^= 1
        path.write_bytes(content)


ROOTS = {
    "official batches": "cifar-10-batches-py/data_batch_3",
    "an .npz file": "cifar10.npz",
    "a folder of images": "cifar10/train/cat/10.png",
    "MNIST's files": "train-images-idx3-ubyte",
}


@pytest.mark.parametrize("source", list(ROOTS))
@pytest.mark.parametrize("fault", ["missing", "cut in half", "one bit changed"])
def test_damaged_data_are_refused_and_the_file_is_named(source, fault, known, tmp_path):
    kind, folder = write_sources(tmp_path / "run")[source]
    path = folder / ROOTS[source]
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
            rf"of 60, 1 differ, the first in {path} \(image \d+\); 1 of 60 are", text
        )
    elif (source, fault) == ("a folder of images", "missing"):
        assert "of 59, 0 differ; 1 of 60 are missing" in text
    elif (source, fault) in (("an .npz file", "missing"), ("MNIST's files", "missing")):
        assert f"{'MNIST' if kind is MNIST else 'CIFAR-10'} is not in" in text
    else:
        assert path.name.removesuffix("-ubyte") in text
    seen = f"{type(raised.value).__name__}: {text}"
    record(f"{source}: {ROOTS[source]} {fault}", seen, "all as it was")


def test_the_same_images_in_any_order_are_the_published_ones(known, tmp_path):
    x_train, y_train, x_test, y_test = small_cifar10()
    turned = write_npz(tmp_path / "x.npz", x_train[::-1], y_train[::-1], x_test, y_test)
    assert len(CIFAR10(turned).y_train) == 60
    with pytest.raises(
        ValueError, match="of 60, 2 differ"
    ):  # two labels changed places
        y_train[[0, 1]] = y_train[[1, 0]]
        CIFAR10(write_npz(tmp_path / "y.npz", x_train, y_train, x_test, y_test))


@needs_cifar10
def test_the_real_images_are_held_to_the_real_digests(tmp_path):
    with np.load(DATA / "cifar10.npz") as file:
        arrays = dict(file)
    arrays["x_train"][123, 5, 6, 0] ^= 1
    np.savez(tmp_path / "cifar10.npz", **arrays)
    with pytest.raises(
        ValueError, match=r"of 50,000, 1 differ.* 1 of 50,000 are missing"
    ):
        CIFAR10(tmp_path)


# ---------------------------------------------------------------- data from the network


@pytest.fixture
def served(monkeypatch, tmp_path) -> Iterator[tuple[str, bytes, list]]:
    "Serve CIFAR-10's archive on this machine, well and badly; return address, archive and requests."
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    held = write_archive(tmp_path / "cifar-10-python.tar.gz", small_cifar10())
    asked: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        "Answers by the first part of the path."

        def log_message(self, *args) -> None:
            pass

        def do_GET(self) -> None:
            how, wanted = self.path.split("/")[1], self.headers.get("Range")
            asked.append((how, wanted))
            start = int(wanted.split("=")[1].rstrip("-")) if wanted else 0
            body = bytes(len(held)) if how == "wrong" else held[start:]
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(body)))
            if wanted:
                self.send_header(
                    "Content-Range", f"bytes {start}-{len(held) - 1}/{len(held)}"
                )
            self.end_headers()
            try:
                if how == "breaks" and not wanted:
                    self.wfile.write(body[: len(body) // 2])
                elif how == "stalls":
                    self.wfile.write(body[: len(body) // 2])
                    time.sleep(3)
                elif how == "crawls":
                    for i in range(0, 4000, 100):
                        self.wfile.write(body[i : i + 100])
                        time.sleep(0.05)
                elif how == "slow":
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
    yield f"http://127.0.0.1:{server.server_port}", held, asked
    server.shutdown()
    thread.join()
    server.server_close()


def archive(url: str, held: bytes, *ways: str) -> tuple[Download, ...]:
    "Describe one archive for each way in which it is served."
    name, md5 = "cifar-10-python.tar.gz", hashlib.md5(held).hexdigest()
    return tuple(Download((f"{url}/{way}/x",), md5, name, 1, len(held)) for way in ways)


def test_a_download_that_breaks_off_goes_on_where_it_stopped(
    served, known, monkeypatch, tmp_path
):
    url, held, asked = served
    monkeypatch.setattr(CIFAR10, "archives", archive(url, held, "breaks"))
    folder = tmp_path / "run"
    folder.mkdir()
    assert len(CIFAR10(folder, download=True).y_train) == 60
    assert [how for how, _ in asked] == ["breaks", "breaks"]
    assert 0 < int(asked[1][1].strip("bytes=-")) <= len(held) // 2
    record(
        "a download that breaks off half-way",
        "nothing",
        "the archive and its images, whole",
    )


@pytest.mark.parametrize("way", ["stalls", "crawls", "wrong"])
def test_a_bad_source_is_given_up_for_the_second(
    way, served, known, monkeypatch, tmp_path
):
    url, held, asked = served
    monkeypatch.setattr(CIFAR10, "archives", archive(url, held, way, "whole"))
    monkeypatch.setattr(
        Download.fetch, "__defaults__", (0.5, 1)
    )  # seconds and attempts
    folder = tmp_path / "run"
    folder.mkdir()
    assert len(CIFAR10(folder, download=True).y_train) == 60
    assert [how for how, _ in asked] == [way, "whole"]
    names = {"stalls": "stalls", "crawls": "crawls", "wrong": "sends the wrong bytes"}
    record(
        f"a download that {names[way]}", "nothing", "the second source's images, whole"
    )


def test_no_source_at_all_is_one_error(served, known, monkeypatch, tmp_path):
    url, held, _ = served
    monkeypatch.setattr(CIFAR10, "archives", archive(url, held, "wrong"))
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(OSError, match=r"other bytes.*by hand") as raised:
        CIFAR10(folder, download=True)
    assert files(folder) == [".lock"]
    seen = re.sub(r"127\.0\.0\.1:\d+", "HOST", f"OSError: {raised.value}")
    record("wrong bytes, and no second source", seen, "nothing")


def test_two_that_start_at_once_download_once(served, known, monkeypatch, tmp_path):
    url, held, asked = served
    folder = tmp_path / "run"
    folder.mkdir()
    code = f"""
import hashlib, sys
from era_s10.datasets.cifar10 import CIFAR10
from era_s10.downloads import Download

class Elsewhere(CIFAR10):
    published = None
    archives = (Download(("{url}/slow/x",), "{hashlib.md5(held).hexdigest()}", "x.tar.gz", 1),)

print("ready", flush=True)
sys.stdin.readline()
print(len(Elsewhere("{folder}", download=True).y_train))
"""
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(2)
    ]
    for child in both:
        assert child.stdout.readline() == "ready\n"
    for child in both:
        child.stdin.write("go\n")
        child.stdin.flush()
    assert [child.communicate(timeout=60)[0] for child in both] == ["60\n", "60\n"]
    assert len(asked) == 1
    record(
        "two starters at once",
        "nothing: the second waits",
        "one download's images, whole",
    )


@pytest.mark.parametrize("with_archive", [True, False])
def test_a_damaged_cache_is_repaired_where_it_can_be(
    with_archive, served, known, monkeypatch, tmp_path
):
    url, held, asked = served
    monkeypatch.setattr(CIFAR10, "archives", archive(url, held, "whole"))
    folder = tmp_path / "run"
    write_batches(folder, *small_cifar10())
    (folder / "cifar-10-batches-py" / "batches.meta").unlink()
    with pytest.raises(FileNotFoundError, match=r"batches\.meta") as raised:
        CIFAR10(folder)
    if with_archive:  # then no network is needed, nor allowed
        (folder / "cifar-10-python.tar.gz").write_bytes(held)
        assert len(CIFAR10(folder).y_train) == 60
        assert asked == []
        name, seen = "batches.meta missing, the archive still there", "nothing"
    else:
        seen = f"FileNotFoundError: {raised.value}; with download=True nothing"
        assert len(CIFAR10(folder, download=True).y_train) == 60
        assert len(asked) == 1
        name = "batches.meta missing"
    aside = folder / "cifar-10-batches-py.damaged"
    assert len(list(aside.iterdir())) == 6  # nothing is thrown away
    record(name, seen, "the images, whole; what was there as …damaged")


@pytest.mark.parametrize("guarded", [True, False])
def test_an_archive_cannot_write_outside_its_folder(guarded, monkeypatch, tmp_path):
    if not guarded:  # as in Python before 3.11.4
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
    seen = re.sub(r"'\S*escaped", "'…escaped", f"ValueError: {raised.value}")
    if guarded:
        record(
            "an archive with ../ members",
            re.sub(r"\.unpacking-\w+", "…", seen),
            "all as it was",
        )
    with tarfile.open(folder / "linked.tar", "w") as file:
        link = tarfile.TarInfo("way")
        link.type, link.linkname = tarfile.SYMTYPE, ".."
        file.addfile(link)
        file.add(tmp_path / "evil.txt", arcname="way/escaped.txt")
    with pytest.raises(ValueError, match=r"outside|neither a file nor a folder"):
        unpack_tar(folder / "linked.tar", folder)
    assert sorted(path.name for path in folder.iterdir()) == ["evil.tar", "linked.tar"]


# ---------------------------------------------------------------- what it costs, and the page


def before_first_step(call: str, folder: Path) -> dict[str, int]:
    "Make an experiment, run or resume it, and count the work that it does before its first step."
    experiment = make({"limit": None, "epochs": 2}, str(folder))
    done, seen = {"batches": 0, "forward passes": 0}, []
    samples = experiment.dataset.train_loader.dataset
    apply, step = samples.pipeline.apply, experiment.train.step

    def counted(*args):
        done["batches"] += 1
        return apply(*args)

    def forward(*_):
        done["forward passes"] += 1

    def stepped(x, y):
        seen.append(dict(done))
        if len(seen) == 9:
            signal.raise_signal(signal.SIGINT)
        return step(x, y)

    samples.pipeline.apply, experiment.train.step = counted, stepped
    experiment.model.register_forward_pre_hook(forward)
    with pytest.raises(KeyboardInterrupt):
        getattr(experiment, call)()
    assert seen[-1] == {"batches": 9, "forward passes": 8}
    return seen[0]


def test_a_resumed_run_does_no_more_before_its_first_step_than_a_fresh_one(tmp_path):
    for call in ("run", "resume"):  # the batches that were seen are not made again
        assert before_first_step(call, tmp_path / "run") == {
            "batches": 1,
            "forward passes": 0,
        }
        assert Checkpoints(tmp_path / "run" / "checkpoints").latest()["steps"] in (
            9,
            18,
        )


def test_saving_may_cost_half_a_percent_and_no_more(monkeypatch, tmp_path):
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


def test_the_page_shows_what_was_found(request):
    found = {"kills": COUNTS["kills"], "flips": COUNTS["flips"], "faults": FOUND}
    all_tried = not request.config.getoption("-m") and len(FOUND) >= 45
    if os.environ.get("ERA_S10_FAULTS") and all_tried:
        TABLE.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    shown = json.loads(TABLE.read_text())
    assert {name: shown["faults"].get(name) for name in FOUND} == FOUND
    if not all_tried:
        pytest.skip(
            "only some of the faults were tried; the page shows those. -m '' tries all"
        )
    assert shown == found
