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
import time
import warnings
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
