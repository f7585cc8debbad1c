"""What guards a run's work: each fault as a real fault, and afterwards nothing is lost.

Children are forked by `nursery.py`, so that imports are paid once. What a user sees and what is left
on the disk is collected in `nbs/results/faults.json`, from which the page is made; `ERA_S10_FAULTS=1`
writes it anew."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from era_s10.backprop import History
from era_s10.checkpoint import Checkpoints, load_checkpoint, save_checkpoint

HERE = Path(__file__).parent
TABLE = HERE.parent / "nbs" / "results" / "faults.json"
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
FOUND: dict[str, dict[str, str]] = {}  # fault: what is seen, what is left
COUNTS = {"kills": 0, "flips": 0}
SETUPS = [
    {"executor": executor, "workers": workers}
    for executor in ("batched", "albumentations")
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
            env={**os.environ, "TQDM_DISABLE": "1", "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"},
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
def whole(nursery, tmp_path_factory) -> Callable[..., Path]:
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
    for name in ("identity", "began"):
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
    text = re.sub(r"pid(\(s\))? [\d, ]+\d", "pid N", text)
    return re.sub(r"\.\d+\.part", ".part", text)


def record(fault: str, seen: str, left: str) -> None:
    "Put a line into the table."
    assert fault not in FOUND
    FOUND[fault] = {"a user sees": plain(seen), "on the disk": left}


def resumed(nursery: Nursery, folder: Path, expected: Path, setup: dict | None = None) -> dict:
    "Go on with a run to its end, which must be that of the run that nothing befell."
    ended = nursery(folder, "resume", setup=setup or {})
    assert ended["status"] == 0, ended
    assert same(trace(folder), trace(expected))
    assert not list(folder.rglob("*.part"))
    return ended


# ---------------------------------------------------------------- killed at any moment


@pytest.mark.parametrize("setup", SETUPS, ids=lambda s: f"{s['executor']}-{s['workers']}")
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(
    setup, nursery, whole, tmp_path
):
    draw = random.Random(repr(setup))
    folder, call, kills = tmp_path / "run", "run", dict.fromkeys(
        ("after", "step", "test", "writing", "moving"), 0
    )  # fmt: skip
    faults = ["step", "test", "writing", "moving"] * 3
    draw.shuffle(faults)
    for where in ["after", *faults, "after"]:
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
    if setup == SETUPS[-1]:
        assert COUNTS["kills"] >= 50 or os.environ.get("PYTEST_XDIST_WORKER")
        record(
            "SIGKILL in a step, in a test pass, in the middle of a save, before its file is moved",
            "Killed",
            "the checkpoint before; resumed, the run ends with the same bits",
        )


# ---------------------------------------------------------------- stopped, and gone on with


@pytest.mark.parametrize("workers", [0, 2])
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
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    ended = nursery(folder, "resume", setup={"epochs": 2})
    assert ended["status"] == 0
    assert "nothing to do: this run has ended: epoch 2 of 2 is done" in ended["out"]
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert after == before


def test_more_epochs_are_another_schedule_and_have_to_be_asked_for(nursery, whole, tmp_path):
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


# ---------------------------------------------------------------- a save that fails


@pytest.mark.parametrize(
    "where, name, left",
    [
        ("raises", "an exception inside a save", "the checkpoint before, whole"),
        ("full", "no room on the disk", "the checkpoint before, whole"),
    ],
)
def test_a_save_that_fails_is_an_error_at_once(where, name, left, nursery, whole, tmp_path):
    setup, folder = {"epochs": 2}, tmp_path / "run"
    ended = nursery(folder, setup=setup, fault={"where": where, "n": 3})
    assert ended["status"] == 1
    kept = Checkpoints(folder / "checkpoints").paths()
    assert [load_checkpoint(path)["steps"] for path in kept] == [4, 0]
    if where == "full":
        assert "No space left on device" in ended["errors"] and kept[0].name in ended["errors"]
    record(name, ended["errors"], left)
    resumed(nursery, folder, whole(**setup), setup)


# ---------------------------------------------------------------- damaged checkpoints


def damaged(whole: Callable[..., Path], tmp_path: Path, newest: bytes | None, others: bytes | None):
    "Copy a run that has been cut off, and put other bytes into its checkpoints."
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    paths = Checkpoints(folder / "checkpoints").paths()
    for path, content in zip(paths, (newest, *[others] * len(paths)), strict=False):
        if content is not None:
            path.write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def cut_off(nursery, tmp_path_factory) -> Path:
    "Keep the folder of a run that was killed."
    folder = tmp_path_factory.mktemp("cut") / "run"
    ended = nursery(folder, setup={"epochs": 2}, fault={"where": "step", "n": 11})
    assert ended["status"] == -signal.SIGKILL
    return folder


@pytest.mark.parametrize("length", ["nothing", "10 bytes", "half", "all but one byte"])
def test_a_checkpoint_that_was_cut_is_not_used(length, cut_off, nursery, whole, tmp_path):
    content = Checkpoints(cut_off / "checkpoints").paths()[0].read_bytes()
    n = {"nothing": 0, "10 bytes": 10, "half": len(content) // 2}.get(length, len(content) - 1)
    folder = damaged(cut_off, tmp_path, content[:n], None)
    ended = resumed(nursery, folder, whole(epochs=2), {"epochs": 2})
    assert "cut off, or changed since: an older one is taken" in ended["errors"]
    shutil.rmtree(folder)
    folder = damaged(cut_off, tmp_path, content[:n], content[:n])
    before = sorted(path.read_bytes() for path in folder.rglob("*.ckpt"))
    refused = nursery(folder, "resume", setup={"epochs": 2})
    assert refused["status"] == 1
    assert "none of its 2 checkpoints is whole" in refused["errors"]
    assert sorted(path.read_bytes() for path in folder.rglob("*.ckpt")) == before
    if length == "half":
        warned = next(line for line in ended["errors"].splitlines() if "older" in line)
        record(
            "the newest checkpoint cut to 0, 10, half or all but one of its bytes",
            re.sub(r".*UserWarning: ", "", warned),
            "the one before serves; resumed, the same bits",
        )
        record("all checkpoints cut", refused["errors"], "all as it was: nothing is touched")


def test_a_flipped_bit_anywhere_is_seen(cut_off, tmp_path):
    path = Checkpoints(cut_off / "checkpoints").paths()[0]
    content, draw, damaged = path.read_bytes(), random.Random(0), tmp_path / "damaged.ckpt"
    places = {*range(60), *(draw.randrange(len(content)) for _ in range(200))}
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << draw.randrange(8)
        damaged.write_bytes(flipped)
        with pytest.raises(ValueError, match="cut off, or changed"):
            load_checkpoint(damaged)
    COUNTS["flips"] += len(places)
    record(
        "a flipped bit in any of 200 random bytes, or of the first 60",
        f"ValueError: {tmp_path}/run/step-1.ckpt: not a whole checkpoint: cut off, or changed since",
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
    content = (tmp_path / "code.ckpt").read_bytes()
    folder = damaged(cut_off, tmp_path, content, content)
    refused = nursery(folder, "resume", setup={"epochs": 2})
    assert refused["status"] == 1 and not mark.exists()
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
        ({"executor": "albumentations"}, "dataset.executor was 'batched'"),
        ({"max_lr": 0.02}, "recipe.max_lr was 0.01 and is 0.02"),
        ({"turned": True}, "dataset.order was"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_run_s_checkpoint_is_refused_by_name(change, words, cut_off, nursery, tmp_path):
    folder = damaged(cut_off, tmp_path, None, None)
    refused = nursery(folder, "resume", setup={"epochs": 2, **change})
    assert refused["status"] == 1
    assert words in refused["errors"]
    names = {"width": "a checkpoint of another net", "turned": "the same images in another order"}
    name = names.get(next(iter(change)), f"a checkpoint of another {next(iter(change))}")
    record(name, re.sub(r"'[0-9a-f]{32}'", "'…'", refused["errors"]), "all as it was")
    if next(iter(change)) == "max_lr":
        setup = {"epochs": 2, **change}
        ended = nursery(folder, "resume", setup=setup, options={"strict": False})
        assert ended["status"] == 0 and words in ended["errors"]


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
    seen = re.sub(rf"'{re.escape(torch.__version__)}'", "'…'", refused["errors"])
    record("another version of torch, another number of threads", seen, "all as it was")


def test_two_runs_into_one_folder(nursery, tmp_path):
    from era_s10.checkpoint import only_writer

    folder = tmp_path / "run"
    with only_writer(folder):
        refused = nursery(folder, setup={"epochs": 1})
    assert refused["status"] == 1
    assert [path.name for path in folder.iterdir()] == [".lock"]
    record("two runs into one folder at once", refused["errors"], "the first one's run")
    assert nursery(folder, setup={"epochs": 1})["status"] == 0
    before = sorted(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    refused = nursery(folder, setup={"epochs": 1})
    assert refused["status"] == 1
    assert sorted(path.read_bytes() for path in folder.rglob("*") if path.is_file()) == before
    record("a new run into the folder of another", refused["errors"], "the first one's run")


# ---------------------------------------------------------------- not a number


@pytest.mark.parametrize("where", ["input", "loss", "gradient"])
def test_what_is_not_finite_reaches_neither_weights_nor_checkpoint(where, nursery, tmp_path):
    folder = tmp_path / "run"
    ended = nursery(folder, setup={"epochs": 2}, fault={"where": where, "n": 7})
    assert ended["status"] == 1
    assert "epoch 1, batch 7 of 10" in ended["errors"]
    assert "the last good checkpoint is" in ended["errors"]
    for path in Checkpoints(folder / "checkpoints").paths():
        state = load_checkpoint(path)
        assert state["steps"] <= 6
        assert all(value.isfinite().all() for value in state["model"].values())
    record(f"NaN or infinity in the {where}", ended["errors"], "the last checkpoint before it")


# ---------------------------------------------------------------- workers


@pytest.mark.parametrize("where, name", [("worker", "is killed"), ("asleep", "hangs")])
def test_a_worker_that_dies_or_hangs_is_one_error(where, name, nursery, whole, tmp_path):
    setup, folder = {"epochs": 2, "workers": 2}, tmp_path / "run"
    ended = nursery(folder, setup=setup, fault={"where": where, "n": 4})
    assert ended["status"] == 1, ended
    assert "a loader worker died or hung in epoch 1, batch" in ended["errors"]
    assert "Traceback" not in ended["errors"]
    assert ended["seconds"] < 20
    seen = re.sub(r"batch \d+", "batch N", plain(ended["errors"]))
    record(f"a loader worker {name}", seen, "the last checkpoint; resumed, the same bits")
    resumed(nursery, folder, whole(**setup), setup)
