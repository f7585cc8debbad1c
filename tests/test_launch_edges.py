"""Runs in several processes at their edges: before training, after its end, and what they leave behind."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from era_s10 import Digits, Experiment, Model, cli, files, launch, resumable, starts
from era_s10.files import run_lock
from era_s10.processes import Group, ProcessLost
from era_s10.recipe import Config
from era_s10.resume import _MACHINE


@pytest.fixture
def current_gpu(monkeypatch) -> list:
    "Let torch report four GPUs; return the list of devices that became the current one."
    chosen: list = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def test_only_a_process_that_trains_makes_its_gpu_the_current_one(current_gpu):
    gpus = [torch.device("cuda", i) for i in range(4)]
    for name in (None, "cuda"):
        Group(0, 2, 0, 2).check_device(name, gpus[0])
    with pytest.raises(ValueError, match="can't share cuda:3"):
        Group(0, 8, 0, 8).check_device(None, gpus[3])
    assert Group(3, 4, 3, 4).device("cpu") == torch.device("cpu")
    assert Group().device("cuda") == torch.device("cuda")
    assert not current_gpu
    assert Group(3, 4, 3, 4).device(None) == gpus[3]
    assert current_gpu == [gpus[3]]


def help_of(command: str, option: str, capsys) -> str:
    "Return the help of an option of a command in one line."
    with pytest.raises(SystemExit):
        getattr(cli, command).main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    return re.search(rf" --{option} ([a-z, ]+)", text)[1]


def test_the_help_names_all_that_may_be_accepted(capsys):
    named = help_of("train", "allow_mismatch", capsys)
    kinds = {name.strip(" .").removeprefix("recipe.") for name in _MACHINE}
    assert not [kind for kind in kinds - {"compile"} if kind not in named], named
    named = help_of("study", "allow_mismatch", capsys)
    for kind in ("versions", "device", "threads", "compil"):
        assert kind in named, named


def small(folder: Path) -> Experiment:
    "Return an experiment of one epoch."
    config = Config(parts=2, max_lr=0.01, epochs=1, device="cpu")
    return Experiment(Model(1), Digits(limit=64, batch_size=32), config, folder)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Callable[[bool], Experiment]:
    "A function that runs or resumes an experiment; its processes do nothing."
    (tmp_path / "done").mkdir()
    small(tmp_path / "done" / "run").run()
    monkeypatch.setattr(files, "_LOCK_TIMEOUT", 0.2)
    monkeypatch.setattr(launch, "_wait", lambda *_: 0)

    def go(again: bool) -> Experiment:
        experiment = small(tmp_path / ("done/run" if again else "run"))
        method = experiment.resume if again else experiment.run
        method(processes=2)
        return experiment

    return go


@pytest.mark.parametrize("again", [False, True])
def test_the_results_of_processes_are_written_with_the_folder_locked(
    again, elsewhere, monkeypatch
):
    locked, real = [], resumable.write_results

    def write(folder: Path, *rest: object) -> None:
        with pytest.raises(BlockingIOError), run_lock(folder):
            pass
        locked.append(folder)
        real(folder, *rest)

    monkeypatch.setattr(resumable, "write_results", write)
    experiment = elsewhere(again)
    assert locked == [experiment.folder] and experiment.ended
    with run_lock(experiment.folder):  # free again
        pass


def test_results_are_not_written_into_a_run_that_another_process_continues(
    elsewhere, tmp_path, monkeypatch
):
    monkeypatch.setattr(resumable, "write_results", lambda *_: pytest.fail("written"))
    folder = tmp_path / "done" / "run"
    with run_lock(folder):
        with pytest.raises(BlockingIOError, match="in use by another process"):
            elsewhere(True)
        monkeypatch.setattr(launch, "_wait", lambda *_: -9)
        with pytest.raises(ProcessLost, match="the launcher was killed by SIGKILL"):
            elsewhere(True)


DIGITS = ["--dataset", "digits", "--width", "1", "--epochs", "1", "--threads", "1"]


@pytest.mark.slow
def test_a_finished_study_says_that_nothing_is_left_to_do(tmp_path, capsys):
    options = [*DIGITS, "--runs", "1", "--folder", str(tmp_path / "study")]
    cli.study.main(options)
    assert "\nseed    0\n" in capsys.readouterr().out
    cli.study.main(options)
    out = capsys.readouterr().out
    assert f"runs    1, all done; nothing to train\nfolder  {tmp_path}/study\n" in out
    assert "seed    " not in out


@pytest.mark.slow
def test_a_finished_run_that_is_repeated_gives_no_advice_to_resume(tmp_path, capsys):
    folder = str(tmp_path / "run")
    options = [*DIGITS, "--max_lr", "0.01", "--limit", "64", "--folder", folder]
    cli.train.main(options)
    capsys.readouterr()
    cli.train.main([*options, "--auto_resume"])
    out = capsys.readouterr().out
    assert f"folder  {folder}\nnothing to do: this run has ended" in out


class Launch:
    "The variables of a process that `torchrun` starts several times, on one machine or more."

    def __init__(self, monkeypatch, machines: int) -> None:
        self.set, self.clear = monkeypatch.setenv, starts._COUNTED.clear
        self.store = dist.TCPStore("localhost", 0, is_master=True)
        self.set("MASTER_ADDR", "localhost")
        self.set("MASTER_PORT", str(self.store.port))
        self.set("TORCHELASTIC_USE_AGENT_STORE", "True")
        self.set("TORCHELASTIC_RUN_ID", "none")
        self.set("TORCHELASTIC_MAX_RESTARTS", "1")
        self.set("GROUP_WORLD_SIZE", str(machines))
        self.set("RANK", "0")

    def start(self, count: int) -> None:
        "Start the process again; `count` is what its agent says."
        self.clear()
        self.set("TORCHELASTIC_RESTART_COUNT", str(count))


@pytest.fixture
def torchrun(monkeypatch):
    "A function that returns a launch on some machines."
    yield lambda machines=1: Launch(monkeypatch, machines)
    starts._COUNTED.clear()


def test_a_restart_without_a_folder_uses_that_of_the_first_start(
    torchrun, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    job = torchrun()
    made = []
    for count in range(3):
        job.start(count)
        monkeypatch.setattr(cli, "_FOLDERS", iter(range(9)))  # of a new process
        with ExitStack() as stack:
            made += [cli._make_folder(stack, "digits") for _ in range(2)]
    assert made == made[:2] * 3 and made[0] != made[1]
    assert [*Path("runs").iterdir()] != []


@pytest.mark.parametrize(
    ("machines", "kept", "options", "message"),
    [
        (2, "True", [], "--folder is needed with --max-restarts"),
        (1, "False", [], "--folder is needed with --max-restarts"),
        (
            1,
            "False",
            ["--folder", "run"],
            "--auto_resume is needed with --max-restarts",
        ),
    ],
)
def test_a_restart_that_could_not_find_its_run_is_refused_at_the_start(
    machines, kept, options, message, torchrun, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    job = torchrun(machines)
    job.start(0)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", kept)
    with pytest.raises(SystemExit) as ended:
        cli.train.main(["--dataset", "digits", *options])
    errors = capsys.readouterr().err
    assert ended.value.code == 2 and errors.count("\n") == 1
    assert errors.startswith(f"era_s10_train: error: {message}")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("count", [0, 1])  # an agent may not have counted
def test_only_a_restart_of_the_launch_that_began_a_run_resumes_it(
    count, torchrun, tmp_path
):
    small(tmp_path / "earlier").run()
    job = torchrun(machines=2 - count)
    for again in range(2):  # a start that is refused begins nothing
        job.start(again * count)
        with pytest.raises(FileExistsError, match="already contains a run"):
            cli._may_continue(Group(), tmp_path / "earlier", False)
        assert cli._may_continue(Group(), tmp_path / "earlier", True)
    job.start(0)
    assert not cli._may_continue(Group(), tmp_path / "new", False)
    small(tmp_path / "new").run()
    job.start(count)
    assert cli._may_continue(Group(), tmp_path / "new", False)


def test_a_restart_that_an_agent_does_not_count_is_announced(
    torchrun, tmp_path, capsys
):
    run = SimpleNamespace(group=Group(), place=tmp_path)
    lines = ["", "restart 1 of 1: a process", "restart 2: a process"]
    job = torchrun(machines=2)
    for line in lines:
        job.start(0)
        cli._report_restart(run)
        assert capsys.readouterr().err.startswith(line)
    job = torchrun(machines=1)
    job.start(1)
    cli._report_restart(run)
    assert capsys.readouterr().err.startswith(lines[1])


HOLD = """
import os, sys, tempfile
from era_s10.starts import launcher_folder

with launcher_folder() as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_a_launcher_removes_only_the_folders_of_dead_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pipe = subprocess.PIPE
    how = {"stdin": pipe, "stdout": pipe, "text": True}
    how["env"] = {**os.environ, "TMPDIR": str(tmp_path)}
    owners = [subprocess.Popen([sys.executable, "-c", HOLD], **how) for _ in range(2)]
    try:
        live, dead = (Path(owner.stdout.readline().strip()) for owner in owners)
        owners[1].kill()
        owners[1].wait()
        assert dead.exists()
        (tmp_path / "era_s10-of-a-user").mkdir()  # has no lock
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "launcher.lock").touch()
        (tmp_path / "era_s10-link").symlink_to(elsewhere)
        other = tmp_path / "era_s10-of-another-user"
        other.mkdir()
        (other / "launcher.lock").touch()
        if os.getuid() == 0:
            os.chown(other, 12345, 12345)
        with starts.launcher_folder() as mine:
            assert live.exists() and not dead.exists() and mine.exists()
        names = {path.name for path in tmp_path.iterdir()}
        kept = {live.name, "era_s10-of-a-user", "elsewhere", "era_s10-link"}
        assert names == kept | ({other.name} if os.getuid() == 0 else set())
    finally:
        for owner in owners:
            owner.kill()
            owner.communicate()
