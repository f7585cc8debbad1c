"Tests of studies that several processes share: claims, workers, signals, and what no lock can do."

import errno
import json
import os
import queue
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fault_table import STUDIES, check_row
from forks import Fork, new_interpreter, start_fork
from project import ROOT, command, hide_gpus
from test_study import without_times

from era_s10 import cli, cli_study
from era_s10 import files as files_module
from era_s10.backprop import Experiment
from era_s10.checkpoint import Checkpoints
from era_s10.datasets.digits import Digits
from era_s10.files import lock_problem
from era_s10.interrupts import exit_on_signals
from era_s10.model import Model
from era_s10.options import Options, make_experiment
from era_s10.parallel_runs import Worker, run_workers, worker_variables
from era_s10.study import read_records, run_seeds
from era_s10.study_folder import StudySettings, claim_seed
from era_s10.timing import num_threads
from era_s10.weights import load_weights

OPTIONS = "--width 2 --epochs 8 --batch_size 20 --threads 1 --folder study"
linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    "Return a file with a few digits."
    digits, path = Digits(), tmp_path_factory.mktemp("few") / "few.npz"
    images = {"x_train": digits.x_train[:200], "x_test": digits.x_test[:40]}
    np.savez(path, **images, y_train=digits.y_train[:200], y_test=digits.y_test[:40])
    return path


def maker(few: Path) -> Callable[[int, Path], Experiment]:
    "Return a function that makes the experiments of `OPTIONS`."
    sizes = {"width": 2, "epochs": 8, "batch_size": 20, "threads": 1}

    def make(seed: int, folder: Path) -> Experiment:
        options = Options(dataset=str(few), recipe="modern", seed=seed, **sizes)
        return make_experiment(options, folder)

    return make


@pytest.fixture(scope="module")
def alone(few, tmp_path_factory) -> Path:
    "Return the folder of five runs that one process has made."
    folder = tmp_path_factory.mktemp("alone")
    with num_threads(1), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experiment, "_figures", lambda self: {})  # to save time
        run_seeds(maker(few), range(5), folder)
    return folder


@pytest.fixture
def start(few, tmp_path) -> Iterator[Callable[..., Fork | subprocess.Popen]]:
    "Return a function that starts the command; nothing of it is left after the test."

    def begin(*options: str, fresh: bool = False) -> Fork | subprocess.Popen:
        options = (*OPTIONS.split(), f"--dataset={few}", *options)
        start_it = new_interpreter if fresh else start_fork
        return start_it(command("era_s10_study", *options), os.environ, tmp_path)

    yield begin
    for path in Path("/proc").glob("[0-9]*/cwd"):
        pid = int(path.parent.name)
        with suppress(OSError):  # ended, or of another user
            if path.readlink() == tmp_path and pid != os.getpid():
                os.kill(pid, signal.SIGKILL)


def children(parent: int) -> list[int]:
    "Return the processes that a process has started."
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has ended
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_until(found: Callable[[], object], process: Fork | subprocess.Popen) -> None:
    "Wait while a process runs, for 60 seconds at most."
    end = time.monotonic() + 60
    while not found():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def epochs(study: Path, seed: int) -> int:
    "Return the number of epochs in the history of a run."
    path = study / f"seed-{seed}" / "history.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def in_second_epoch(study: Path) -> str | None:
    "Return a seed whose run has a checkpoint of its second epoch or a later one."
    for path in study.glob("seed-*/checkpoints/step-*.ckpt"):
        if int(re.findall(r"\d+", path.name)[0]) > 10:
            return path.parts[-3].removeprefix("seed-")
    return None


def has_claim(pid: int, seed: str) -> bool:
    "Return whether a process has the lock of a seed."
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # closed in the meantime
            if os.readlink(link).endswith(f".seed-{seed}.lock"):
                return True
    return False


def lines_of(outputs: list[str], seed: int) -> list[str]:
    "Return what the processes printed in the runs of a seed."
    found, current = [], None
    for line in "\n".join(outputs).splitlines():
        prefix = re.match(r"seed (\d+): ", line)
        if alone := re.fullmatch(r"seed +(\d+)", line):
            current = int(alone[1])
        elif prefix and int(prefix[1]) == seed:
            found.append(line[prefix.end() :])
        elif not prefix and current == seed and line.startswith(("epoch ", "stopped:")):
            found.append(line)
    return found


def same_weights(one: Path, other: Path, seed: int, other_seed: int) -> bool:
    "Return whether the runs of two seeds ended with the same weights."
    runs = (one / f"seed-{seed}", other / f"seed-{other_seed}")
    states = []
    for run in runs:
        model = Model(2, 3, 10)
        load_weights(model, run / "weights.safetensors")
        states.append(model.state_dict())
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# ---------------------------------------------------------------- several workers


@pytest.mark.slow
@linux
def test_a_killed_and_a_late_worker_leave_the_lines_of_one(start, alone, tmp_path):
    study, options = tmp_path / "study", ["--runs", "5", "--checkpoint_steps", "5"]
    first = start(*options, "--parallel_runs", "2")
    wait_until(lambda: in_second_epoch(study), first)
    seed, workers = in_second_epoch(study), children(first.pid)
    (killed,) = (pid for pid in workers if has_claim(pid, seed))
    os.kill(killed, signal.SIGKILL)
    (other,) = (pid for pid in workers if pid != killed)
    os.kill(other, signal.SIGSTOP)
    late = start(*options)
    head = [late.stdout.readline()]
    while not head[-1].startswith("epoch"):  # it has taken a run
        head.append(late.stdout.readline())
    os.kill(other, signal.SIGCONT)
    outputs = [process.communicate(timeout=120) for process in (late, first)]
    assert (first.returncode, late.returncode) == (0, 0), outputs
    texts = ["".join(head) + outputs[0][0], outputs[1][0]]
    message = f"(process {killed}) was ended by SIGKILL in the run of seed {seed}"
    assert message in outputs[1][1]
    assert "Traceback" not in outputs[0][1] + outputs[1][1]
    assert without_times(study) == without_times(alone)
    for number in range(5):
        assert same_weights(alone, study, number, number)
        printed = lines_of(texts, number)
        assert len([line for line in printed if line.startswith("stopped:")]) == 1
        heads = [line.split()[1].split("/")[0] for line in printed]
        counts = [heads.count(str(epoch)) for epoch in range(1, 9)]
        if str(number) != seed:
            assert counts == [1] * 8, printed
        else:  # from its checkpoint: the lines of one epoch may be lost or repeated
            assert counts[0] == 1 and sorted(counts)[1:-1] == [1] * 6, printed
    assert all("(n = 5)" in text for text in texts)
    names = {path.name for path in study.iterdir() if path.is_file()}
    assert not [name for name in names if name.startswith(".seed")]
    assert {"weights.safetensors", "card.json", "confusion.png", "study.json"} <= names
    fault = "SIGKILL of a worker of two; another process joins late"
    warned = next(line for line in outputs[1][1].splitlines() if message in line)
    check_row(STUDIES, fault, warned, "the lines and weights that one worker leaves")
    # the comparisons can fail
    assert read_records(study / "runs.jsonl") != read_records(alone / "runs.jsonl")
    assert not same_weights(alone, study, 0, 1)


def fork(call: Callable[[], object], out: Path) -> int:
    "Call a function in a forked process, whose output goes to a file; return its ID."
    pid = os.fork()
    if pid:
        return pid
    status = 99
    hide_gpus()
    try:
        file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(file, number)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        call()
        status = 0
    except SystemExit as error:
        status = error.code or 0
    finally:
        sys.stdout.flush()
        os._exit(status)


@contextmanager
def never_refused(folder: Path, seed: int):
    "Claim a seed that another process may have."
    yield True


@pytest.mark.slow
@posix
@pytest.mark.parametrize("claims", [True, False])
def test_two_commands_in_one_folder_share_its_seeds(
    claims, few, alone, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    real = cli_study._write_study

    def write(place: Path, *others: object) -> None:
        real(place, *others)
        with open(tmp_path / "written", "a") as file:
            file.write("x")

    monkeypatch.setattr(cli_study, "_write_study", write)
    if not claims:  # the control: without claims, both run the first seed
        monkeypatch.setattr("era_s10.study.claim_seed", never_refused)
        monkeypatch.setattr("era_s10.files._LOCK_TIMEOUT", 0.2)
    arguments = [*OPTIONS.split(), f"--dataset={few}", "--runs", "3"]
    outputs = [tmp_path / "one.txt", tmp_path / "two.txt"]
    with num_threads(1):
        pids = [fork(lambda: cli.study.main(arguments), path) for path in outputs]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    texts = [path.read_text() for path in outputs]
    if not claims:
        assert codes != [0, 0], texts
        return
    assert codes == [0, 0], texts
    assert (tmp_path / "written").read_text() == "x"
    assert without_times(tmp_path / "study") == without_times(alone)[:3]
    for seed in range(3):
        heads = [line.split()[1].split("/")[0] for line in lines_of(texts, seed)]
        assert heads == [*map(str, range(1, 9)), "epoch"]  # stopped: epoch 8 of 8
    assert all("(n = 3)" in text for text in texts)
    assert all(re.search("seed    [012]", text) for text in texts)  # both have worked


@pytest.mark.slow
@linux
@pytest.mark.parametrize(
    ("number", "to", "status"),
    [
        (signal.SIGINT, "the command", 130),
        (signal.SIGTERM, "all processes", 143),
        (signal.SIGHUP, "the command", 129),
        (signal.SIGKILL, "the command", -9),
    ],
)
def test_a_signal_stops_all_workers_with_a_checkpoint_each(
    number, to, status, start, tmp_path
):
    study = tmp_path / "study"
    options = ["--runs=2", "--parallel_runs=2", "--epochs=2000"]
    process = start(*options, fresh=number == signal.SIGTERM)
    wait_until(lambda: epochs(study, 0) and epochs(study, 1), process)
    workers = children(process.pid)
    assert len(workers) == 2
    for pid in [process.pid, *(workers if to == "all processes" else [])]:
        os.kill(pid, number)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    stopped = (
        "" if number == signal.SIGKILL else "stopped; the same command continues\n"
    )
    assert errors == stopped
    end = time.monotonic() + 20  # after SIGKILL, the workers notice it by themselves
    while [pid for pid in workers if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < end
        time.sleep(0.05)
    for seed in (0, 1):
        # the only other checkpoint, of the start, has no steps
        assert (
            Checkpoints(study / f"seed-{seed}" / "checkpoints").latest()["steps"] >= 10
        )
        with claim_seed(study, seed) as free:
            assert free
    assert not (study / "runs.jsonl").exists()
    fault = f"{signal.Signals(number).name} to {to}, with two runs at once"
    check_row(STUDIES, fault, errors or "Killed", "a checkpoint of each run")


# ---------------------------------------------------------------- workers that fail

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from era_s10.parallel_runs import worker_number

number, how = worker_number(), sys.argv[1]


class Run:
    def main():
        Path(f"{number}.pid").write_text(str(os.getpid()))
        print("seed", 7 + number, flush=True)
        print("works", flush=True)
        print("test: warning: twice", file=sys.stderr, flush=True)
        if how == "killed" or (how == "one killed" and number == 0):
            os.kill(os.getpid(), signal.SIGKILL)
        if how in ("1", "2", "3") and number == 0:
            print(f"test: error: wrong {how}", file=sys.stderr)
            sys.exit(int(how))
        if how in ("1", "2", "3"):
            time.sleep(60)
        if how == "sleeps":
            time.sleep(60)
        if how == "signals":
            received = []
            signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
            Path("ready").touch()
            end = time.monotonic() + 2
            while time.monotonic() < end:
                time.sleep(0.01)
            print("received", len(received))
"""


def run_program(how: str, folder: Path, monkeypatch) -> None:
    "Run two workers that end as `how` says."
    name = f"program_{re.sub(r'[^a-z0-9]', '_', folder.name.lower())}"
    (folder / f"{name}.py").write_text(PROGRAM)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    begun = time.monotonic()
    try:
        run_workers(f"{name}.Run", [how], [{}, {}])
    finally:
        assert time.monotonic() - begun < 40  # the other worker would sleep for 60
        for path in folder.glob("*.pid"):
            with pytest.raises(ProcessLookupError):
                os.kill(int(path.read_text()), 0)


@posix
@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("2", ValueError, "^wrong 2$"),
        ("1", RuntimeError, "^wrong 1$"),
        ("3", RuntimeError, "^wrong 3$"),
        (
            "killed",
            RuntimeError,
            "^all workers were killed; the same command continues$",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:worker . .process")
def test_the_error_of_a_worker_ends_the_command(
    how, error, message, tmp_path, monkeypatch, capfd
):
    with pytest.raises(error, match=message):
        run_program(how, tmp_path, monkeypatch)
    out, errors = capfd.readouterr()
    assert "error" not in errors  # it is in the exception
    assert "seed 7: works\n" in out


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_worker_that_was_just_started_is_stopped_too(number, tmp_path, monkeypatch):
    started, real = [], Worker.__init__

    def start(worker: Worker, *arguments: object) -> None:
        real(worker, *arguments)
        started.append(worker.process)
        signal.raise_signal(number)  # before the worker is in a list

    monkeypatch.setattr(Worker, "__init__", start)
    error = KeyboardInterrupt if number == signal.SIGINT else SystemExit
    with exit_on_signals(), pytest.raises(error):
        run_program("sleeps", tmp_path, monkeypatch)
    assert [process.returncode is None for process in started] == [False]


@posix
def test_a_killed_worker_is_a_warning_if_another_one_ends_well(
    tmp_path, monkeypatch, capfd
):
    message = r"^worker 1 \(process \d+\) was ended by SIGKILL in the run of seed 7$"
    with pytest.warns(UserWarning, match=message):
        run_program("one killed", tmp_path, monkeypatch)
    out, errors = capfd.readouterr()
    assert sorted(out.splitlines()) == ["seed 7: works", "seed 8: works"]
    assert errors == "test: warning: twice\n"  # of both workers


@posix
@pytest.mark.parametrize("also", [True, False])
def test_a_worker_gets_one_signal_when_a_scheduler_signals_all(
    also, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "signalled.py").write_text(PROGRAM)
    lines = queue.Queue()
    worker = Worker(0, "signalled.Run", ["signals"], {}, lines)
    wait_until((tmp_path / "ready").exists, worker.process)
    if also:
        worker.process.terminate()
    worker.stop()
    worker.process.wait()
    assert worker.ended()
    texts = [lines.get().text for _ in range(lines.qsize())]
    assert "received 1" in texts


@pytest.mark.slow
def test_a_wrong_setting_is_one_line_of_the_command(start, alone, tmp_path):
    (tmp_path / "study").mkdir()
    content = (alone / "study.json").read_text()
    (tmp_path / "study" / "study.json").write_text(
        content.replace('"MyDataSet"', '"MNIST"')
    )
    process = start("--runs", "1", "--parallel_runs", "2")
    _, errors = process.communicate()
    assert (process.returncode, errors.count("\n")) == (2, 1), errors
    line = "era_s10_study: error: dataset.class was 'MNIST' and is 'MyDataSet'"
    assert errors.startswith(line)


# ---------------------------------------------------------------- settings of a study


def test_runs_without_records_have_the_settings_of_the_first_one(few, tmp_path):
    make = maker(few)
    experiment = make(0, tmp_path / "seed-0")
    now = StudySettings.of(experiment, "batched")
    machine = now.machine | {"threads": now.machine["threads"] + 1}
    replace(now, machine=machine).to_json(tmp_path / "study.json")
    with pytest.raises(ValueError, match=r"^threads was .*--allow_mismatch"):
        run_seeds(make, [0], tmp_path)
    numerics = now.numerics | {"precision": "fp16"}  # of no CPU by default
    replace(now, numerics=numerics).to_json(tmp_path / "study.json")
    for strict in (True, False):
        with pytest.raises(ValueError, match=r"^numerics\.precision was 'fp16'"):
            run_seeds(make, [0], tmp_path, strict=strict)
    assert not (tmp_path / "seed-0" / "checkpoints").exists()


@pytest.mark.slow
def test_a_study_of_an_earlier_version_continues(few, alone, tmp_path):
    lines = (alone / "runs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "runs.jsonl").write_text("".join(lines[:1]))
    with num_threads(1):
        run_seeds(maker(few), range(2), tmp_path)
    assert without_times(tmp_path) == without_times(alone)[:2]
    assert not (tmp_path / "study.json").exists()
    assert cli_study._recorded_threads(tmp_path) == 1


def published(folder: Path, threads: int, device: str) -> Path:
    "Write the record of a published run, with other threads and device."
    path = ROOT / "nbs" / "results" / "width16-6-modern" / "runs.jsonl"
    record = json.loads(path.read_text().splitlines()[0])
    record["threads"], record["machine"]["device"] = threads, device
    folder.mkdir()
    (folder / "runs.jsonl").write_text(json.dumps(record) + "\n")
    return folder


def test_the_threads_of_a_study_are_those_of_its_first_run(tmp_path):
    assert cli_study._recorded_threads(tmp_path) is None
    assert cli_study._recorded_threads(published(tmp_path / "cpu", 3, "cpu")) == 3
    assert cli_study._recorded_threads(published(tmp_path / "gpu", 3, "H100")) is None
    for machine, threads in (({"threads": 2}, 2), ({}, None)):
        settings = StudySettings({}, {}, {}, {}, machine)
        settings.to_json(tmp_path / "cpu" / "study.json")
        assert cli_study._recorded_threads(tmp_path / "cpu") == threads


def test_workers_get_the_rest_of_the_runs_and_a_part_of_the_threads(
    tmp_path, monkeypatch
):
    started = []

    def start_workers(name: str, arguments: list[str], variables: list[dict]) -> None:
        threads = [one for one in arguments if one.startswith("--threads=")]
        started.append((len(variables), *threads))
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_study, "run_workers", start_workers)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 12)
    options = {"dataset": "digits", "width": 2, "epochs": 3}
    published(tmp_path / "begun", 1, "cpu")
    for name, more in (
        ("new", {"runs": 5, "parallel_runs": 3}),
        ("new", {"runs": 2, "parallel_runs": 8}),
        ("new", {"runs": 2, "parallel_runs": 2, "threads": 5}),
        ("new", {"runs": 20, "parallel_runs": 20}),
        ("begun", {"runs": 3, "parallel_runs": 3}),  # its records have one thread
    ):
        with pytest.raises(KeyboardInterrupt):
            cli.study(folder=str(tmp_path / name), **options, **more)
    expected = [(3, 4), (2, 6), (2, 5), (20, 1), (2, 1)]
    assert started == [(n, f"--threads={threads}") for n, threads in expected]


@pytest.mark.parametrize(
    ("count", "visible", "expected"),
    [
        (0, None, [None, None]),
        (2, None, ["0", "1", "0"]),
        (2, "5, 7", ["5", "7", "5"]),
        (1, "GPU-8a", ["GPU-8a", "GPU-8a"]),
        (0, "", [None]),
    ],
)
def test_each_worker_gets_one_of_the_visible_gpus(
    count, visible, expected, monkeypatch
):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    found = [one.get("CUDA_VISIBLE_DEVICES") for one in worker_variables(len(expected))]
    assert found == expected


def test_the_option_threads_is_used_and_recorded(tmp_path, capsys):
    with num_threads(2):
        cli.train("digits", width=2, epochs=1, max_lr=0.01, threads=1, folder=str(tmp_path / "run"), device="cpu")  # fmt: skip
        assert torch.get_num_threads() == 1
        torch.set_num_threads(2)
        cli.train(resume=str(tmp_path / "run"))
        assert torch.get_num_threads() == 1
    assert json.loads((tmp_path / "run" / "config.json").read_text())["threads"] == 1
    capsys.readouterr()
    for options, message in (
        (["--threads", "0"], "threads must be an integer >= 1 (got 0)"),
        (
            ["--resume", str(tmp_path / "run"), "--threads", "1"],
            "--threads: cannot be given",
        ),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.train.main(
                [*options, *([] if "--resume" in options else ["--dataset=digits"])]
            )
        error = capsys.readouterr().err
        assert (ended.value.code, error.count("\n")) == (2, 1)
        assert message in error


@pytest.mark.parametrize(
    "options", [{"parallel_runs": 0}, {"parallel_runs": 2, "threads": 0}]
)
def test_wrong_numbers_are_refused_before_anything_is_started(
    options, tmp_path, capsys
):
    arguments = [f"--{name}={value}" for name, value in options.items()]
    with pytest.raises(SystemExit) as ended:
        cli.study.main(["--dataset=digits", f"--folder={tmp_path / 'x'}", *arguments])
    error = capsys.readouterr().err
    assert (ended.value.code, error.count("\n")) == (2, 1)
    assert "must be an integer >= 1 (got 0)" in error
    assert not (tmp_path / "x").exists()


# ---------------------------------------------------------------- locks that do not work


@contextmanager
def granted(*_: object):
    "Grant every lock, as some network drives do."
    yield


def no_locks(*_: object) -> None:
    "Raise what a file system without locks reports."
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


@pytest.mark.parametrize(
    ("lock", "problem"), [(granted, "granted twice"), (no_locks, "No locks available")]
)
def test_a_file_system_without_locks_is_found_at_the_start(
    lock, problem, tmp_path, monkeypatch, capsys
):
    assert lock_problem(tmp_path) is None
    monkeypatch.setattr(files_module, "lock_folder", lock)
    assert problem in lock_problem(tmp_path)
    arguments = ["--dataset=digits", "--epochs=1", f"--folder={tmp_path / 'study'}"]
    with pytest.raises(SystemExit) as ended:
        cli.study.main([*arguments, "--parallel_runs=2"])
    error = capsys.readouterr().err
    assert (ended.value.code, error.count("\n")) == (2, 1)
    assert f"locks don't work on this file system ({problem if lock is no_locks else 'the same'}" in error  # fmt: skip
    assert "run one process at a time, or choose a folder on a different" in error
    monkeypatch.setattr(cli_study, "_run_study", lambda *_: None)
    cli.study.main(arguments)
    error = capsys.readouterr().err
    assert error.startswith("era_s10_study: warning: ") and problem in error
    assert not any(tmp_path.iterdir())


def test_a_lock_that_is_replaced_by_a_file_is_no_lock(tmp_path, monkeypatch):
    import warnings

    from filelock import FileLock

    def fall_back(self, *args: object, **options: object) -> None:
        warnings.warn("flock not supported on this filesystem", stacklevel=2)

    monkeypatch.setattr(FileLock, "acquire", fall_back)
    assert "(flock not supported on this filesystem)" in lock_problem(tmp_path)


def test_a_claim_is_free_again_when_its_process_is_killed(tmp_path):
    code = """
import sys, time
from pathlib import Path
from era_s10.study_folder import claim_seed
with claim_seed(Path(sys.argv[1]), 0) as free:
    print(free, flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout.readline() == "True\n"
    with claim_seed(tmp_path, 0) as free, claim_seed(tmp_path, 1) as other:
        assert (free, other) == (False, True)
    process.kill()
    process.communicate()
    with claim_seed(tmp_path, 0) as free:
        assert free
