"""Several processes: the same batches, bits and tests as one; errors that reach all of them."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fault_table import TOGETHER, check_row
from forks import new_interpreter, start_fork

from era_s10 import cli, launch, voice
from era_s10.backprop import Experiment
from era_s10.bench import bench
from era_s10.datasets.digits import Digits
from era_s10.files import lock_folder
from era_s10.model import Model
from era_s10.processes import Group, ProcessLost
from era_s10.recipe import RECIPES, Config
from era_s10.run_folder import read_config

HERE = Path(__file__).parent
SEVERAL = (2, 3, 4)
RUNS = [f"{recipe} {kind}" for recipe in RECIPES for kind in ("fp32", "bf16")]


def torchrun(processes: int, *command: str, fresh: bool = False) -> None:
    "Run a Python script in several processes with one thread each."
    args = ["-m", "torch.distributed.run", "--standalone"]
    args += [f"--nproc-per-node={processes}", *command]
    quiet = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    start = new_interpreter if fresh else start_fork
    run = start(args, {**os.environ, **quiet})
    try:
        out, errors = run.communicate(timeout=300)
    finally:
        run.kill()
    assert run.returncode == 0, out[-3000:] + errors[-3000:]


@pytest.fixture(scope="session")
def found(tmp_path_factory) -> dict[int, dict]:
    "What groups of one to four processes found, by their size."
    folder, found = tmp_path_factory.mktemp("groups"), {}
    for size in (1, *SEVERAL):
        torchrun(size, str(HERE / "group_cases.py"), str(folder), fresh=size == 2)
        found[size] = json.loads((folder / f"{size}.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("size", SEVERAL)
@pytest.mark.parametrize("backend", ["batched", "albumentations"])
@pytest.mark.parametrize("workers", [0, 2])
def test_processes_share_the_batches_of_one_process(found, size, backend, workers):
    name = f"batches {backend} {workers}"
    assert found[size][name] == found[1][name]
    assert [len(batch) for batch in found[1][name]] == [64, 64, 22] * 2
    assert found[size]["undivided"] != found[1][name]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", [*RUNS, "ema", "short", "fast network"])
def test_parts_give_the_same_bits_in_any_number_of_processes(found, size, name):
    assert found[size][name] == found[1][name]
    assert found[1][name]["model"] != found[1]["one part"]["model"]


@pytest.mark.slow
def test_without_parts_the_bits_differ(found):
    digests = {found[size]["one part"]["model"] for size in found}
    assert len(digests) == len(found)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_synchronized_norm_has_the_gradient_of_one_process(found, size):
    def distance(name: str) -> float:
        one, other = (
            torch.tensor(found[n][key]) for n, key in ((1, "gradient"), (size, name))
        )
        return ((one - other).norm() / one.norm()).item()

    assert distance("gradient") < 1e-5
    assert distance("local gradient") > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("size", SEVERAL)
@pytest.mark.parametrize("batch_size", [64, 100, 361])
def test_a_test_counts_each_image_once(found, size, batch_size):
    one, several = (found[n][f"logits {batch_size}"] for n in (1, size))
    for name in ("logits", "results", "counted"):
        assert several[name] == one[name]
    assert several["counted"] == 361 < several["padded"]


@pytest.mark.slow
@pytest.mark.parametrize("size", SEVERAL)
def test_an_error_in_one_process_is_raised_in_all(found, size):
    errors = found[size]["errors"]
    expected = {
        "first": "failed in process 0",
        "collect": f"failed in process {size - 1}",
        "local": "a b",
        "equal": "processes 0 and 1 have different numbers",
        "nan": "the loss is nan",
    }
    assert {name: errors[name] for name in expected} == {
        name: [text] * size for name, text in expected.items()
    }
    assert "parts must be a power of two" in errors["parts"][0]


@pytest.mark.slow
@pytest.mark.parametrize("size", SEVERAL)
@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("augmentation", "dataset.augmentation"),
        ("image", "dataset.fingerprint"),
        ("version", "versions."),
        ("code", "source code is"),
    ],
)
def test_processes_that_differ_are_refused(found, size, what, text):
    messages = found[size]["errors"][what]
    expected = [f"processes {rank} and {size - 1} differ" for rank in range(size - 1)]
    expected.append(f"processes {size - 1} and 0 differ")
    for message, start in zip(messages, expected, strict=True):
        assert message.startswith(start) and text in message


@pytest.mark.slow
@pytest.mark.parametrize("size", SEVERAL)
def test_processes_start_from_the_weights_of_the_first(found, size):
    assert len(set(found[size]["different weights"])) == 1


@pytest.mark.parametrize(
    ("size", "parts", "message"),
    [
        (3, 8, "3 processes can't share 8 parts evenly; choose 1, 2, 4 or 8 processes"),
        (16, 8, "16 processes can't share 8 parts evenly"),
        (2, 6, r"parts must be a power of two for several processes \(got 6\)"),
    ],
)
def test_parts_that_cannot_be_shared_are_refused(size, parts, message):
    with pytest.raises(ValueError, match=message):
        Group(0, size).check_parts(parts)


def test_processes_that_would_use_a_different_device_are_refused():
    group, gpu = Group(0, 2, 0, 2), torch.device("cuda", 0)
    group.check_device(None, torch.device("cpu"))
    if torch.cuda.device_count() < 2:
        with pytest.raises(ValueError, match=r'can.t share cuda:0; .*device="cpu"'):
            group.check_device(None, gpu)
    experiment = Experiment(Model(2), Digits(limit=64), Config(device="cpu"))
    experiment.device = gpu  # as on a machine with one GPU
    with pytest.raises(ValueError, match="share"):
        experiment.run(epochs=1, processes=2)


def test_parts_that_can_be_shared_are_accepted():
    for size, parts in ((1, 6), (3, 1), (2, 2), (4, 8), (8, 8)):
        Group(0, size).check_parts(parts)
    assert [list(Group(rank, 4).share(8)) for rank in (0, 3)] == [[0, 1], [6, 7]]
    shares = [Group(rank, 4).divide(8)(torch.arange(5)).tolist() for rank in range(4)]
    assert shares == [[0, 1], [2, 3], [4], []]


def test_a_second_run_cannot_start_in_a_folder_before_its_processes_run(
    tmp_path, monkeypatch
):
    folder, locked, refused = tmp_path / "run", [], []

    def begin() -> None:
        config = Config(max_lr=0.02, epochs=1, parts=2, device="cpu")
        data = Digits(batch_size=64, limit=128)
        Experiment(Model(4), data, config, folder).run(processes=2)

    def write_job(*_: object) -> None:
        with pytest.raises(BlockingIOError), lock_folder(folder, 0):
            pass
        locked.append(True)

    def wait(arguments: list[str]) -> int:
        assert len(refused) == 0, "two runs have started"
        with lock_folder(folder, 0):  # free for the first of the new processes
            pass
        with pytest.raises(FileExistsError, match="already contains a run") as error:
            begin()
        refused.append(str(error.value))
        return 1

    monkeypatch.setattr(launch, "_write_job", write_job)
    monkeypatch.setattr(launch, "_wait", wait)
    with pytest.raises(RuntimeError, match="has ended with status 1"):
        begin()
    assert (len(locked), len(refused)) == (1, 1)
    fault = "two notebooks start a run in new processes, in one folder"
    check_row(TOGETHER, fault, refused[0], "the first run")
    settings = read_config(folder)
    assert (settings.processes, settings.run["epochs"]) == (2, 1)
    assert settings.threads == max(1, torch.get_num_threads() // 2)


COMMANDS = [cli.lr_find, cli.study, cli.evaluate, cli.predict, bench]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_a_command_that_is_not_shared_is_refused_once(
    command, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    store = dist.TCPStore("localhost", 0, is_master=True)
    variables = {"RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": store.port}
    for name, value in {"WORLD_SIZE": 2, **variables}.items():
        monkeypatch.setenv(name, str(value))
    errors = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(SystemExit) as ended:
            command.main([])
        assert ended.value.code == 2
        errors.append(capsys.readouterr().err)
    assert errors[1] == "" and errors[0].count("\n") == 1
    assert "RANK and WORLD_SIZE are set, as torchrun does, and each of 2" in errors[0]
    assert ("--parallel_runs" in errors[0]) == (command is cli.study)
    assert not any(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        cli.train.main(["--width", "none"])
    assert "torchrun" not in capsys.readouterr().err


def test_processes_within_torchrun_are_refused_once(monkeypatch, capsys):
    store = dist.TCPStore("localhost", 0, is_master=True)
    variables = {"MASTER_ADDR": "localhost", "MASTER_PORT": store.port}
    errors = []
    for rank in range(2):
        for name, value in {"WORLD_SIZE": 2, "RANK": rank, **variables}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(SystemExit) as ended:
            cli.train.main(["--processes", "2", "--dataset", "digits"])
        assert ended.value.code == 2
        errors.append(capsys.readouterr().err)
    assert errors == [
        "era_s10_train: error: RANK and WORLD_SIZE are set, as torchrun does; leave "
        "--processes out, or unset them\n",
        "",
    ]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "1", "WORLD_SIZE": "two"}, "WORLD_SIZE: must be an integer"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "MASTER_ADDR: not set"),
        (
            {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
            "RANK: must be below WORLD_SIZE=2 (got 2)",
        ),
    ],
)
@pytest.mark.parametrize("command", [cli.train, cli.evaluate])
def test_variables_that_are_left_over_are_named(
    command, variables, message, monkeypatch, capsys
):
    monkeypatch.setattr(voice, "_may_report", lambda: True)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        command.main(["--dataset", "digits"])
    found = capsys.readouterr().err
    assert ended.value.code == 2 and found.count("\n") == 1
    assert message in found and "unset RANK and WORLD_SIZE" in found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--processes", "3", "--parts", "4"], "3 processes can't share 4 parts"),
        (["--processes", "2", "--parts", "0"], "--parts must be an integer >= 1"),
        (["--processes", "0"], "--processes must be an integer >= 1"),
        (["--processes", "2", "--target", "101"], "--target must be"),
        (["--processes", "2", "--recipe", "none"], "none"),
        (["--processes", "2", "--resume", "nowhere"], "no run"),
        (["--processes", "3", "--resume", "run"], "3 processes can't share 2 parts"),
        (["--processes", "2", "--folder", "run"], "already contains a run"),
        (
            ["--processes", "2", "--folder", "run", "--max_restarts", "1"],
            "already contains a run",
        ),
    ],
)
def test_options_are_checked_before_processes_start(
    options, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "start_processes", lambda *_: pytest.fail("started"))
    if "run" in options:
        options = options + ["--dataset", "digits"] * ("--resume" not in options)
        config = Config(parts=2, max_lr=0.01, epochs=1, device="cpu")
        Experiment(Model(4), Digits(limit=361), config, "run").run()
    else:
        options = options + ["--dataset", "digits"] * ("--resume" not in options)
    before = [*tmp_path.iterdir()]
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.train.main(options)
    found = capsys.readouterr().err
    assert ended.value.code == 2 and found.count("\n") == 1 and message in found
    assert [*tmp_path.iterdir()] == before


def small(folder: Path | None, width: int = 4, **how: int) -> Experiment:
    "Return an experiment with two parts."
    config = Config(parts=2, max_lr=0.01, epochs=2, device="cpu")
    return Experiment(Model(width), Digits(limit=361, **how), config, folder)


def test_an_experiment_that_cannot_be_sent_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "_wait", lambda *_: pytest.fail("started"))
    experiment = small(tmp_path / "run")
    experiment.dataset.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"^dataset: can't be sent .*_thread.lock"):
        experiment.run(processes=2)
    assert not (tmp_path / "run").exists()
    for wrong in (0, 3):
        with pytest.raises(ValueError, match=r"^processes"):
            small(tmp_path / "run").run(processes=wrong)
    small(tmp_path / "run").run(epochs=1)
    for wrong in (0, 3):
        with pytest.raises(ValueError, match=r"^processes"):
            small(tmp_path / "run").resume(processes=wrong)
    del experiment.dataset.lock
    experiment.model.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"^model: can't be sent"):
        experiment.resume(processes=2)


def test_a_different_run_is_refused_before_processes_start(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "_wait", lambda *_: pytest.fail("started"))
    small(tmp_path).run(epochs=1)
    for strict in (True, False):
        other = small(tmp_path, width=5)
        with pytest.raises(ValueError, match="contains a run of a different model"):
            other.resume(processes=2, strict=strict)
        with pytest.raises(ValueError, match=r"dataset\.seed was 0 and is 1"):
            small(tmp_path, seed=1).resume(processes=2, strict=strict)


def end_job(error: Exception | None, status: int):
    "Return a function that ends a job before it starts."

    def wait(arguments: list[str]) -> int:
        if error is not None:
            launch._write_error(Path(arguments[1]), error)
        return status

    return wait


def test_other_processes_that_refuse_a_run_leave_the_weights(tmp_path, monkeypatch):
    small(tmp_path).run(epochs=1)
    refusal = ValueError("threads was 1 and is 2")
    monkeypatch.setattr(launch, "_wait", end_job(refusal, 1))
    experiment = small(tmp_path)
    before = [tensor.clone() for tensor in experiment.model.state_dict().values()]
    with pytest.raises(ValueError, match="threads was 1 and is 2"):
        experiment.resume(processes=2)
    after = experiment.model.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


KILLED = "process 1 of 2 was killed by SIGKILL in epoch 1, batch 2"
LEFT = "; the last good checkpoint is /run/step-0.ckpt"
AGAIN = "; `experiment.resume(processes=2)` continues the run"


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(
    ("error", "status", "message", "stopped"),
    [
        (ProcessLost(KILLED + LEFT), 1, KILLED + LEFT + AGAIN, KILLED),
        (
            *(None, -9, "the launcher was killed by SIGKILL" + AGAIN),
            "the launcher was killed by SIGKILL in epoch 1",
        ),
        (
            *(None, 143, "the run has ended with status 143" + AGAIN),
            "the run has ended with status 143 in epoch 1",
        ),
        (
            *(FloatingPointError("the loss is nan" + LEFT), 1),
            *("the loss is nan" + LEFT, "FloatingPointError in epoch 1"),
        ),
    ],
)
def test_a_lost_run_says_how_it_continues(
    error, status, message, stopped, kept, tmp_path, monkeypatch
):
    monkeypatch.setattr(launch, "_wait", end_job(error, status))
    experiment = small(tmp_path / "run" if kept else None)
    if not kept:  # nothing is left to continue
        message = message.replace(LEFT, "").replace(AGAIN, "")
    with pytest.raises((RuntimeError, FloatingPointError)) as found:
        experiment.run(processes=2)
    assert str(found.value) == message
    assert experiment.stopped == stopped


WAITING = """
import signal, sys
from datetime import timedelta
from era_s10 import processes
from era_s10.messages import errors_in_one_line
from era_s10.voice import one_voice

processes._STEP_TIMEOUT = timedelta(seconds=float(sys.argv[1]))
signal.signal(signal.SIGTERM, lambda *_: None)
with errors_in_one_line("command"), one_voice():
    pass
"""


def waiting(seconds: int, **variables: str) -> tuple[subprocess.Popen, str]:
    "Start a process with variables of another job; return it and what it waits for."
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    left = {"RANK": "1", "WORLD_SIZE": "2", **place, **variables}
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, str(seconds)],
        env={**os.environ, **left},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    names = ("RANK", "WORLD_SIZE", *place, "TORCHELASTIC_RUN_ID")
    found = ", ".join(f"{name}={left[name]}" for name in names if name in left)
    return process, (
        f"waiting for the other processes at localhost:{port} (the environment has "
        f"{found}); to train in one process: unset RANK WORLD_SIZE\n"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_waits_for_others_says_so_and_can_be_stopped(number):
    process, expected = waiting(60, RANK="0")
    try:
        assert select.select([process.stderr], [], [], 60)[0]
        said = process.stderr.readline()
        process.send_signal(number)
        assert process.wait(timeout=20) == -number
    finally:
        process.kill()
        process.communicate()
    assert said == expected


@pytest.mark.parametrize("launcher", [False, True])  # whose variables are left over
def test_a_process_that_waits_in_vain_says_so_and_ends_with_an_error(launcher):
    more = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    process, expected = waiting(8, **(more if launcher else {}))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors == expected + f"command: error: timed out while {expected}"
