"""Runs in several processes: commands, notebooks, signals, lost processes, restarts, resuming."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from fault_table import TOGETHER, check_row
from forks import STARTED, new_interpreter, start_fork
from project import command
from torch.distributed.elastic.multiprocessing import PContext

from era_s10.files import run_lock
from era_s10.launch import start_processes
from era_s10.processes import ProcessLost
from era_s10.resume import check_identity

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow
QUIET = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "GLOO_SOCKET_IFNAME": "lo"}
OPTIONS = [
    *("--dataset", "digits", "--width", "4", "--limit", "361", "--batch_size", "64"),
    *("--threads", "1", "--checkpoint_steps", "4"),
]
SHORT = ["--epochs", "6", "--changes", '{"lr_find_steps": 12, "lr_find_end": 10}']
SAME_BITS = "the run ends with the same bits"
LONG = ["--epochs", "400", "--max_lr", "0.02"]


def faulty(folder: Path, faults: Sequence[dict]) -> list[str]:
    "Return a program that trains with faults, one in each start of its processes."
    path = folder.with_suffix(".json")
    path.write_text(json.dumps(faults))
    return [str(HERE / "faulty_train.py"), str(path)]


class Job:
    "A command that trains in several processes, in a session of its own."

    def __init__(
        self,
        folder: Path,
        *options: str,
        processes: int = 2,
        faults: Sequence = (),  # of `faulty`
        fresh: bool = False,  # in new interpreters, not in forks
    ) -> None:
        together = ["--processes", str(processes)] if processes > 1 else []
        self.folder, self.log = folder, folder.with_suffix(".log")
        self.started = folder.with_suffix(".started")
        train = command("era_s10_train") if not faults else faulty(folder, faults)
        variables = {**os.environ, **QUIET, STARTED: str(self.started)}
        start = new_interpreter if fresh else start_fork
        self.process = start([*train, *options, *together], variables)
        self.seen: set[psutil.Process] = set()

    def ranks(self) -> dict[int, psutil.Process]:
        "Return the running processes that train, by their number."
        found, started = {}, {}
        if self.started.exists():  # by forks
            lines = self.started.read_text().splitlines()
            started = dict(map(int, reversed(line.split())) for line in lines)
        for child in psutil.Process(self.process.pid).children():
            rank = child.environ().get("RANK", started.get(child.pid))
            if rank is not None:
                found[int(rank)] = child
                self.seen |= {child, *child.children(recursive=True)}
        return found

    def wait_for_epoch(self, epoch: int) -> dict[int, psutil.Process]:
        "Wait until an epoch has ended; return the processes that train."
        for line in self.process.stdout:
            match = re.match(r"epoch +(\d+)/", line)
            if match and int(match[1]) >= epoch:
                return self.ranks()
        raise AssertionError(self.process.stderr.read())

    def end(self, timeout: float = 180.0) -> tuple[int, str]:
        "Wait for the end; return status and error output; no process may be left."
        start = time.monotonic()
        try:
            _, errors = self.process.communicate(timeout=timeout)
        finally:
            self.stop()
        self.seconds = time.monotonic() - start
        _, alive = psutil.wait_procs(self.seen, timeout=3)
        assert not alive
        return self.process.returncode, errors

    def stop(self) -> None:
        "Kill what is left."
        if self.process.poll() is None:
            for one in psutil.Process(self.process.pid).children(recursive=True):
                one.kill()
            self.process.kill()
            self.process.wait()


@pytest.fixture
def start(tmp_path) -> Iterator:
    "A function that starts a job in a folder, and stops it after the test."
    jobs = []

    def start_job(*options: str, parts: int = 4, **how) -> Job:
        folder = tmp_path / f"run-{len(jobs)}"
        more = ["--parts", str(parts), "--folder", str(folder)]
        jobs.append(Job(folder, *OPTIONS, *more, *options, **how))
        return jobs[-1]

    yield start_job
    for job in jobs:
        job.stop()


CHILD = """
import atexit, faulthandler, logging, os, signal, sys, threading, warnings
atexit.register(print, "at the exit")
threading.Timer(0.2, print, ["from a thread"]).start()
print(sys.argv, __name__, os.environ["ADDED"], os.getcwd(), "HOME" in os.environ)
print([signal.getsignal(number) for number in sorted(signal.valid_signals())])
files = [os.path.realpath(f"/dev/fd/{number}") for number in os.listdir("/dev/fd")]
print(len({*files} - {os.devnull}), sys.stdin.read(), logging.root.manager.disable)
print(os.getsid(0) == os.getpid(), signal.pthread_sigmask(signal.SIG_BLOCK, []))
print(faulthandler.is_enabled(), signal.set_wakeup_fd(-1), "added" in sys.path)
signal.raise_signal(signal.SIGPIPE)
warnings.warn("once")
"""
PARENT = """
import atexit, faulthandler, logging, os, signal, subprocess, sys, warnings
atexit.register(print, "of the parent")
kept = open(sys.executable)
signal.signal(signal.SIGTERM, print)
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
warnings.simplefilter("error")
warnings.showwarning = print
logging.disable(logging.CRITICAL)
faulthandler.enable()
reading, writing = os.pipe()
os.set_blocking(writing, False)
signal.set_wakeup_fd(writing)
sys.path.append("added")
sys.stdin = None
args = [sys.executable, "-c", sys.argv[1], "more"]
how = {"env": {"ADDED": "yes"}, "cwd": "/", "start_new_session": True}
os._exit(subprocess.run(args, input=b"text", **how).returncode % 256)
"""


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        ("", 0),
        ("sys.exit(3)", 3),
        ("sys.exit('a message')", 1),
        ("1 / 0", 1),
        ("raise KeyboardInterrupt", 256 - signal.SIGINT),
        ("os.kill(os.getpid(), signal.SIGTERM)", 256 - signal.SIGTERM),
    ],
)
def test_a_fork_is_like_a_new_interpreter(ending, status):
    found = []
    for start_it in (start_fork, new_interpreter):
        run = start_it(["-c", PARENT, CHILD + ending], {**os.environ})
        out, errors = run.communicate()
        assert run.returncode == status
        found.append((out, errors.splitlines()[:1], errors.splitlines()[-1:]))
    assert found[0] == found[1]
    assert ("from a thread" in out) == ("kill" not in ending)
    assert "of the parent" not in out
    threads = ["-c", "import torch; print(torch.get_num_threads())"]
    assert start_fork(threads, {"OMP_NUM_THREADS": "3"}).communicate() == ("3\n", "")


def resume(folder: Path, *options: str, processes: int = 2) -> tuple[int, str]:
    "Resume a run; return status and error output."
    return Job(folder, "--resume", str(folder), *options, processes=processes).end()


def weights(folder: Path) -> bytes:
    return (folder / "weights.safetensors").read_bytes()


def records(folder: Path) -> list[dict]:
    "Return the history of a run without its times."
    lines = (folder / "history.jsonl").read_text().splitlines()
    return [{**json.loads(line), "seconds": None} for line in lines]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    "A run of six epochs in one process."
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    more = ["--parts", "4", *SHORT, "--folder", str(folder)]
    assert Job(folder, *OPTIONS, *more, processes=1).end()[0] == 0
    return folder


def test_two_processes_write_the_folder_of_one(start, unbroken):
    job = start(*SHORT, fresh=True)
    assert job.end() == (0, "")
    assert weights(job.folder) == weights(unbroken)
    assert records(job.folder) == records(unbroken)
    files = [
        {p.name for p in folder.iterdir()} - {".lock"}
        for folder in (job.folder, unbroken)
    ]
    assert files[0] == files[1]


def test_a_stopped_run_resumes_in_other_numbers_of_processes(start, unbroken):
    job = start(*SHORT, processes=4)
    job.wait_for_epoch(2)
    job.process.terminate()
    status, errors = job.end()
    assert (status, errors.count("\n")) == (143, 1)
    again = Job(job.folder, "--resume", str(job.folder), processes=1)
    again.process.stdout.readline()
    for line in again.process.stdout:
        if line.startswith("epoch 4"):
            again.process.terminate()
            break
    assert again.end()[0] == 143
    assert len(records(job.folder)) < 6
    assert resume(job.folder, processes=2) == (0, "")
    assert weights(job.folder) == weights(unbroken)
    assert records(job.folder) == records(unbroken)


def seconds_between(log: Path) -> dict[str, float]:
    "Return by the name of each fault how long it took until the next start."
    lines = [line.rsplit(": ", 1) for line in log.read_text().splitlines()]
    pairs = itertools.pairwise([(name, float(moment)) for name, moment in lines])
    return {one: then - now for (one, now), (other, then) in pairs if one != "start"}


def test_killed_processes_are_started_again_and_the_bits_stay(start, unbroken):
    draw = random.Random(0)
    faults = [
        {"where": "range test", "rank": 0, "n": draw.randint(1, 12)},
        {"where": "step", "rank": 1, "n": draw.randint(1, 12)},
        {"where": "writing", "rank": 0, "n": 2, "percent": draw.randrange(100)},
        {"where": "test", "rank": 1, "n": draw.randint(1, 6)},
    ]
    job = start(*SHORT, "--max_restarts", "4", faults=faults)
    status, errors = job.end(400)
    assert status == 0, errors
    assert [*seconds_between(job.log)] == [fault["where"] for fault in faults]
    said = errors.splitlines()
    lost = "a process was lost or has failed, and all"
    assert said[0] == f"restart 1 of 4: {lost} start from the beginning"
    assert re.fullmatch(
        rf"restart 4 of 4: {lost} continue from step-\d+\.ckpt", said[3]
    )
    assert weights(job.folder) == weights(unbroken)
    assert records(job.folder) == records(unbroken)
    assert not [*job.folder.rglob("*.part")]
    check_row(
        TOGETHER,
        "SIGKILL of one process of two in a step, a test pass, a save or the range "
        "test, with `--max_restarts`",
        errors,
        f"the previous checkpoint, from which all start again; {SAME_BITS}",
    )


def test_an_error_of_input_is_not_tried_again(start):
    faults = [{"where": "image", "rank": 1, "n": 1}] * 3
    job = start(*LONG, "--max_restarts", "2", faults=faults)
    status, errors = job.end()
    assert (status, errors.count("\n")) == (2, 1)
    assert re.match("era_s10_train: error: processes . and . differ", errors)
    lines = job.log.read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == ["start", "start", "image"]
    assert not (job.folder / "config.json").exists()


def test_a_fault_of_one_process_ends_all_in_one_line(start):
    last = r"the last good checkpoint is \S+"
    messages = {
        "disk full": rf"\S+ could not be written \(No space left on device\); {last}",
        "input": rf"the loss is nan.*; {last}",
        "loader": "can't prepare this batch",
        "image": "processes (0 and 1|1 and 0) differ: dataset.fingerprint.* is .*",
    }
    faults = [
        {"where": name, "rank": int(name != "disk full"), "n": 2} for name in messages
    ]
    job = start(*LONG, "--max_restarts", "3", faults=faults)
    status, errors = job.end(400)
    assert status == 2, errors
    lines = [one for one in errors.splitlines() if not one.startswith("restart ")]
    assert len(lines) == len(messages), errors
    for line, message in zip(lines, messages.values(), strict=True):
        assert re.fullmatch(f"era_s10_train: error: {message}", line), line
    assert max(seconds_between(job.log).values()) < 15
    faults = (
        "a full disk in the first process of two",
        "NaN in the images of one process of two",
        "an error in the data loader of one process of two",
        "one process of two has a different image",
    )
    for fault, line in zip(faults, lines, strict=True):
        check_row(TOGETHER, fault, line, "the previous checkpoint")


def test_a_lost_process_ends_the_run_in_one_sentence(start):
    job = start(*LONG)
    job.wait_for_epoch(2)[1].kill()
    status, errors = job.end()
    assert status == 1 and job.seconds < 15
    assert re.fullmatch(
        r"era_s10_train: error: process 1 of 2 was killed by SIGKILL in epoch \d+, "
        r"batch \d+; the last good checkpoint is \S+; "
        rf"to resume: era_s10_train --resume {job.folder}\n",
        errors,
    )
    check_row(TOGETHER, "SIGKILL of one process of two", errors, "the last checkpoint")


HANGING = """
import json, os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(1)
if os.environ["RANK"] == "1" and sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if os.environ["RANK"] == "1":
    found = {"message": "ProcessLost: timed out", "extraInfo": {"timestamp": time.time()}}
    with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as file:
        json.dump({"message": found}, file)
    sys.exit(1)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("how", "message"),
    [("killed", "^process 1 of 2 was killed by SIGKILL$"), ("noted", "^timed out$")],
)
def test_a_process_that_hangs_is_not_blamed(how, message, monkeypatch):
    monkeypatch.setattr(PContext.close, "__defaults__", (None, 3))  # 30 takes longer
    begun = time.monotonic()
    with pytest.raises(ProcessLost, match=message):
        start_processes([sys.executable, "-c", HANGING, how], processes=2)
    assert 3 < time.monotonic() - begun < 40


SENDERS = {
    "SIGTERM to process 1": (143, lambda job, ranks: ranks[1].terminate()),
    "Ctrl-C in process 0": (
        130,
        lambda job, ranks: ranks[0].send_signal(signal.SIGINT),
    ),
    "Ctrl-C": (130, lambda job, ranks: job.process.send_signal(signal.SIGINT)),
    "SIGHUP": (129, lambda job, ranks: job.process.send_signal(signal.SIGHUP)),
    "SIGTERM to all": (
        143,
        lambda job, ranks: [
            one.terminate()
            for one in (*ranks.values(), psutil.Process(job.process.pid))
        ],
    ),
}


@pytest.mark.parametrize("name", SENDERS)
def test_a_signal_stops_all_processes_with_one_checkpoint(start, name):
    status, send = SENDERS[name]
    workers = ["--workers", "2"] if name == "SIGTERM to all" else []
    job = start(*LONG, "--checkpoint_steps", "100000", *workers)
    send(job, job.wait_for_epoch(2))
    found, errors = job.end()
    assert found == status
    assert re.fullmatch(
        r"stopped after \d+ epochs; to resume: \S+ --resume \S+\n", errors
    )
    saved = sorted(path.name for path in (job.folder / "checkpoints").glob("step-*"))
    assert len(saved) == 2 and saved[0] == "step-000000000.ckpt"
    fault = f"{name} in a run of two processes"
    check_row(TOGETHER, fault, errors, "one checkpoint, after the same step in both")


@pytest.mark.parametrize(
    ("when", "number", "status"),
    [
        ("measures", signal.SIGTERM, 143),  # the time per epoch
        ("measures", signal.SIGINT, 130),
        ("measures", signal.SIGKILL, 1),
        ("connects", signal.SIGTERM, 143),
        ("connects", signal.SIGKILL, 1),
        ("imports", signal.SIGTERM, 143),
        ("imports", signal.SIGKILL, 1),
    ],
)
def test_a_signal_while_the_other_process_prepares_ends_all(
    start, when, number, status
):
    job = start(*LONG, fresh=when == "imports")
    if when == "measures":
        for line in job.process.stdout:
            if line.startswith("images"):
                break
    ranks = {}
    while len(ranks) < 2:
        time.sleep(0.01)
        ranks = job.ranks()
    if when == "connects":
        ranks[1].suspend()  # the other one waits for it
        time.sleep(1)
    ranks[1].send_signal(number)
    ranks[1].send_signal(signal.SIGCONT)
    found, errors = job.end()
    assert not (job.folder / "config.json").exists()
    lost = "era_s10_train: error: process 1 of 2 was killed by SIGKILL\n"
    assert (found, errors) == (status, lost if number == signal.SIGKILL else "")


def test_processes_end_with_their_launcher(start):
    job = start(*LONG)
    ranks = job.wait_for_epoch(2)
    job.process.kill()
    _, alive = psutil.wait_procs(ranks.values(), timeout=15)
    assert not alive
    fault = "SIGKILL of the launcher of two processes"
    check_row(TOGETHER, fault, "Killed", "the last checkpoint; no process is left")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--changes", '{"device": "cuda:7"}'], "'cuda:7' is not available"),
        (["--max_restarts", "-1"], "--max_restarts must be an integer >= 0"),
    ],
)
def test_a_wrong_option_is_reported_once(start, options, message):
    status, errors = start(*options).end()
    assert status == 2 and errors.count("\n") == 1
    assert message in errors


def test_a_fault_of_the_first_process_ends_all(tmp_path, unbroken):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    with run_lock(folder):
        status, errors = resume(folder)
    assert status == 2 and errors.count("\n") == 1 and "is in use" in errors
    for path in (folder / "checkpoints").glob("*.ckpt"):
        path.write_bytes(path.read_bytes()[:-9])
    status, errors = resume(folder)
    assert status == 2 and errors.count("error") == 1 and "are damaged" in errors


def test_with_synchronized_norm_another_number_of_processes_must_be_accepted(start):
    job = start(*LONG, parts=1)
    job.wait_for_epoch(1)
    job.process.terminate()
    assert job.end()[0] == 143
    status, errors = resume(job.folder, processes=1)
    assert status == 2 and "processes was 2 and is 1" in errors
    identity = {"processes": 2, "recipe": {"parts": 1}}
    with pytest.warns(UserWarning, match="processes was 2 and is 3; resuming anyway"):
        check_identity(identity, {**identity, "processes": 3}, strict=False)


def test_torchrun_starts_a_run_on_two_nodes_again(tmp_path, unbroken):
    "Two agents on one machine, as on two, with one folder; a process is killed."
    port, folder = str(20000 + os.getpid() % 20000), tmp_path / "run"
    launcher = [
        *("--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "1"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"),
    ]
    train = faulty(folder, [{"where": "step", "rank": 1, "n": 8}])
    train += [*OPTIONS, *SHORT, "--parts", "4", "--auto_resume", f"--folder={folder}"]
    agents = []
    for node in range(2):
        home = tmp_path / f"node-{node}"
        home.mkdir()
        torchrun = ["-m", "torch.distributed.run", *launcher, *train]
        agents.append(start_fork(torchrun, {**os.environ, **QUIET}, home))
    try:
        outputs = [agent.communicate(timeout=300) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    lines = folder.with_suffix(".log").read_text().splitlines()
    names = [line.split(":")[0] for line in lines]
    assert names == ["start", "start", "step", "start", "start"]
    assert sum(errors.count("restart 1 of 1: ") for _, errors in outputs) == 1
    assert not [
        path for node in range(2) for path in (tmp_path / f"node-{node}").iterdir()
    ]
    assert weights(folder) == weights(unbroken)
    assert records(folder) == records(unbroken)


LINK_SECONDS = 12  # two minutes outside this test
SEPARATE = f"""
from era_s10 import connect, entry

connect._LINK_SECONDS = {LINK_SECONDS}
entry.train()
"""


class Machines:
    "Two network namespaces that are joined by a pair of virtual network devices."

    def __init__(self, folder: Path) -> None:
        self.names = [f"era{os.getpid()}{side}" for side in "ab"]
        self.links = [f"v{name[3:]}" for name in self.names]
        self.script, self.agents = folder / "separate.py", []
        self.script.write_text(SEPARATE)
        a, b = self.names
        self.ip(f"netns add {a}")
        self.ip(f"netns add {b}")
        veth = f"type veth peer name {self.links[1]} netns {b}"
        self.ip(f"link add {self.links[0]} netns {a} {veth}")
        for i, (name, link) in enumerate(zip(self.names, self.links, strict=True)):
            self.ip(f"-n {name} addr add 10.77.0.{i + 1}/24 dev {link}")
            for one in ("lo", link):
                self.ip(f"-n {name} link set {one} up")
        # torchrun waits on the second one until the system gives up: 15 minutes by default
        setting = "/proc/sys/net/ipv4/tcp_retries2"
        self.ip(f"netns exec {b} sh -c", last=f"echo 4 > {setting}")

    def ip(self, text: str, check: bool = True, last: str | None = None) -> None:
        "Call the program `ip`, perhaps with a last argument that contains spaces."
        program = ["ip", *text.split(), *([last] if last else [])]
        done = subprocess.run(program, capture_output=True, text=True)
        if check and done.returncode:
            raise OSError(f"ip {text}: {done.stderr.strip()}")

    def cut(self) -> None:
        "Cut the link."
        self.ip(f"-n {self.names[0]} link set {self.links[0]} down")

    def train(self, *options: str) -> list[subprocess.Popen]:
        "Start an agent with one process on each."
        launcher = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
        launcher += ["--rdzv-endpoint", "10.77.0.1:29511"]
        self.agents = []
        for i, (name, link) in enumerate(zip(self.names, self.links, strict=True)):
            local = ["--local-addr", f"10.77.0.{i + 1}"]
            # torchrun compares the endpoint with the addresses of the host's name
            local += ["--rdzv-conf", f"is_host={1 - i},read_timeout=5"]
            python = ["ip", "netns", "exec", name, sys.executable, "-m"]
            program = ["torch.distributed.run", *launcher, *local, str(self.script)]
            agent = subprocess.Popen(
                [*python, *program, *OPTIONS, "--parts", "2", *options],
                env={**os.environ, **QUIET, "GLOO_SOCKET_IFNAME": link},
                stdout=subprocess.PIPE,
                stderr=open(self.script.with_suffix(f".{i}"), "w"),  # noqa: SIM115
                text=True,
                start_new_session=True,
            )
            self.agents.append(agent)
        return self.agents

    def errors(self) -> list[str]:
        "Return what the agents and their processes have written to stderr."
        return [self.script.with_suffix(f".{i}").read_text() for i in range(2)]

    def processes(self) -> list[psutil.Process]:
        "Return the running agents and what they have started."
        running = [psutil.Process(a.pid) for a in self.agents if a.poll() is None]
        return running + [c for one in running for c in one.children(recursive=True)]

    def stop(self) -> None:
        "Remove everything."
        for one in self.processes():
            one.kill()
        for name in self.names:
            self.ip(f"netns del {name}", check=False)


@pytest.fixture
def machines(tmp_path) -> Iterator[Machines]:
    "Two machines, if this one may have network namespaces."
    found = Machines.__new__(Machines)
    try:
        found.__init__(tmp_path)
    except OSError as error:
        if hasattr(found, "agents"):
            found.stop()
        pytest.skip(f"no network namespaces ({error})")
    yield found
    found.stop()


def test_two_machines_train_and_end_when_their_link_is_cut(machines, tmp_path):
    "Both end soon after the system has given up the connections, and the run resumes."
    options = [*SHORT, "--epochs", "12"]
    alone, together, broken = (tmp_path / name for name in ("one", "two", "broken"))
    one = [*OPTIONS, *options, "--parts", "2", "--folder", str(alone)]
    assert Job(alone, *one, processes=1).end()[0] == 0
    for agent in machines.train(*options, "--folder", str(together)):
        agent.communicate(timeout=90)
    assert weights(together) == weights(alone), machines.errors()
    assert records(together) == records(alone)
    agents = machines.train(*options, "--folder", str(broken))
    for line in agents[0].stdout:
        if line.startswith("epoch  3/"):
            break
    started = machines.processes()
    assert len(started) >= 4
    machines.cut()
    begun = time.monotonic()
    for agent in agents:
        agent.communicate(timeout=100)
    assert time.monotonic() - begun < LINK_SECONDS + 60
    _, alive = psutil.wait_procs(started, timeout=5)
    assert not alive
    assert all(agent.returncode == 1 for agent in agents)
    for text in machines.errors():
        said = [one for one in text.splitlines() if "era_s10_train: error" in one]
        assert len(said) == 1, text
        assert re.search(
            r"lost the connection .* in epoch \d+, batch \d+; the", said[0]
        )
    assert len(records(broken)) < 12
    assert resume(broken, processes=1) == (0, "")
    assert weights(broken) == weights(alone)
    assert records(broken) == records(alone)


def test_torchrun_starts_a_run_without_a_folder_again(tmp_path, unbroken):
    "All starts of one launch use the folder that the first one has made."
    torchrun = [
        *("-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--max-restarts", "1", "--standalone"),
    ]
    train = faulty(tmp_path / "faults", [{"where": "step", "rank": 1, "n": 8}])
    options = [*OPTIONS, *SHORT, "--parts", "4"]
    run = start_fork([*torchrun, *train, *options], {**os.environ, **QUIET}, tmp_path)
    out, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    restart = r"^restart 1 of 1: .*, and all continue from step-\d+.ckpt$"
    assert len(re.findall(restart, errors, re.MULTILINE)) == 1, errors
    (folder,) = (tmp_path / "runs").iterdir()
    assert weights(folder) == weights(unbroken)
    assert records(folder) == records(unbroken)


NOTEBOOK = """
import torch
from torch import nn
from era_s10 import Digits, Experiment, set_seed
from era_s10.recipe import Config

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
            nn.Linear(900, 10),
        )

    def forward(self, x):
        return self.layers(x)

torch.set_num_threads(1)

def make():
    set_seed(0)
    data = Digits(batch_size=64, limit=361)
    return Experiment(Net(), data, Config(max_lr=0.01, epochs=2, parts=2, device="cpu"))
#%%
alone, together = make(), make()
alone.run()
model = together.model
before = model.layers[0].weight.clone()
history = together.run(processes=2)
#%%
pairs = zip(alone.model.state_dict().values(), model.state_dict().values())
assert all(torch.equal(a, b) for a, b in pairs)
assert not torch.equal(before, model.layers[0].weight)
assert len(history) == 2 and together.ended and together.model is model
print("trained here:", len(together.misclassified) == len(alone.misclassified))
#%%
try:
    make().run(processes=3)
except ValueError as error:
    print(error)
"""


def test_a_notebook_gets_the_trained_weights(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    cells = [nbformat.v4.new_code_cell(text) for text in NOTEBOOK.split("#%%")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    texts = [
        "".join(out.get("text", "") for out in cell.outputs) for cell in notebook.cells
    ]
    assert "trained here: True" in texts[2]
    assert texts[1].count("epoch 2/2") == 2
    assert "3 processes can't share 2 parts" in texts[3]


def test_an_interrupted_notebook_run_leaves_a_checkpoint(tmp_path):
    code = f"""
    import _thread, threading, time
    from pathlib import Path
    import torch
    from era_s10 import Digits, Experiment, Model, set_seed
    from era_s10.recipe import Config

    if __name__ == "__main__":
        torch.set_num_threads(1)
        set_seed(0)
        config = Config(max_lr=0.02, epochs=400, parts=2, device="cpu")
        folder = Path({str(tmp_path / "run")!r})
        experiment = Experiment(Model(4), Digits(limit=361), config, folder)

        def interrupt():
            while not (folder / "history.jsonl").exists():
                time.sleep(0.1)
            _thread.interrupt_main()

        threading.Thread(target=interrupt, daemon=True).start()
        try:
            experiment.run(processes=2)
        except KeyboardInterrupt:
            print("interrupted after", len(experiment.history), "epochs")
        saved = experiment.checkpoints.paths()
        print(saved[0].name != "step-000000000.ckpt", experiment.train.steps > 0)
    """
    run = start_fork(["-c", textwrap.dedent(code)], {**os.environ, **QUIET})
    out, errors = run.communicate()
    assert re.search(r"interrupted after [1-9]\d* epochs", out), errors
    assert "True True" in out
