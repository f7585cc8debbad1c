"""Python programs that start at once, as forks of a process that has imported everything.

Importing torch takes seconds, and a run of two processes needs three interpreters. A `ForkServer`
imports everything once. Its programs, and the Python programs that these start, are forks in which
`restore` sets what a new interpreter does not inherit: signal handlers, warnings, open files and so
on. A fork still differs from a new interpreter: modules are imported, the seed of `hash` is shared,
and /proc/PID/environ is that of the server. So some tests of each kind use new interpreters."""

import atexit
import faulthandler
import json
import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import warnings
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NoReturn

STARTED = (
    "ERA_S10_TEST_STARTED"  # file that gets the number of each process that trains
)


class Fork:
    "A running program, with the attributes of `subprocess.Popen` used here."

    def __init__(self, server: "ForkServer", request: dict) -> None:
        reading, writing = os.pipe()
        self.stdout = os.fdopen(reading)
        self.stderr = tempfile.TemporaryFile("a+")  # noqa: SIM115
        try:
            self.pid = server.start(request, writing, self.stderr.fileno())
        finally:
            os.close(writing)
        self.server, self.returncode = server, None

    def poll(self) -> int | None:
        "Return the exit status, or None if the program runs."
        if self.returncode is None:
            self.returncode = self.server.status(self.pid)
        return self.returncode

    def wait(self, timeout: float = 60.0) -> int:
        "Wait for the end, and return the exit status."
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        return self.returncode

    def communicate(self, timeout: float = 180.0) -> tuple[str, str]:
        "Wait until the output is closed and the program has ended; return its texts."
        stop = threading.Timer(timeout, self.kill)
        stop.start()
        try:
            out = self.stdout.read()
        finally:
            stop.cancel()
        self.wait()
        self.stderr.seek(0)
        return out, self.stderr.read()

    def send_signal(self, number: int) -> None:
        "Send a signal, unless the program has ended."
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        "Send SIGTERM."
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        "Send SIGKILL."
        self.send_signal(signal.SIGKILL)


class ForkServer:
    "A process that starts programs, from another process."

    def __init__(self) -> None:
        self.connection, other = socket.socketpair()
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(other.fileno())],
            pass_fds=[other.fileno()],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        other.close()
        self.replies, self.ended = self.connection.makefile(), {}

    def ask(self, request: dict, files: Sequence[int] = ()) -> dict:
        "Send a request with open files, and return the reply."
        socket.send_fds(self.connection, [json.dumps(request).encode()], files)
        return json.loads(self.replies.readline())

    def start(self, request: dict, stdout: int, stderr: int) -> int:
        "Start a program, and return the number of its process."
        pid = self.ask(request, [stdout, stderr])["pid"]
        self.ended.pop(pid, None)  # of an earlier process with this number
        return pid

    def status(self, pid: int) -> int | None:
        "Return the exit status of a program that has ended."
        ended = self.ask({})
        self.ended |= {int(key): status for key, status in ended.items()}
        return self.ended.get(pid)


@cache
def fork_server() -> ForkServer:
    "Return the server of this process, which ends with it."
    return ForkServer()


def start_fork(
    args: Sequence[str],  # of a Python interpreter: "-c", "-m" or the path of a script
    env: Mapping[str, str],  # its environment
    cwd: Path | None = None,  # its working directory
) -> Fork:
    "Start a Python program without importing anything again."
    cwd = None if cwd is None else str(cwd)
    request = {"args": [sys.executable, *args], "env": dict(env), "cwd": cwd}
    return Fork(fork_server(), request)


def default_signals() -> None:
    "Let a new process handle signals as usual, also in tests started by nohup."
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def new_interpreter(
    args: Sequence[str], env: Mapping[str, str], cwd: Path | None = None
) -> subprocess.Popen:
    "Start a Python program as `start_fork` does, but not as a fork."
    return subprocess.Popen(
        [sys.executable, *args],
        env=env,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=default_signals,
    )


# ---------------------------------------------------------------- in the server

FRESH = {}  # what `become` restores


def remember() -> None:
    "Keep what programs may change and new interpreters do not inherit."
    FRESH["filters"] = [*warnings.filters]
    FRESH["show"] = warnings.showwarning, warnings.formatwarning
    FRESH["path"] = [*sys.path]


def release_files() -> None:
    "Close open files, but keep their numbers: libuv closes its own again in each fork."
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/dev/fd")):
        if number > 2 and number != nowhere:
            os.dup2(nowhere, number, inheritable=False)


def restore(env: Mapping[str, str]) -> None:
    "Make this fork what a new interpreter is."
    import torch

    faulthandler.disable()
    atexit._clear()
    release_files()
    os.environ.clear()
    os.environ.update(env)
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.disable(logging.NOTSET)
    warnings.filters[:] = FRESH["filters"]
    warnings.showwarning, warnings.formatwarning = FRESH["show"]
    sys.path[:] = FRESH["path"]
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
    sys.stderr.reconfigure(line_buffering=True)
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", os.cpu_count())))


def run_program(args: Sequence[str]) -> None:
    "Run what the arguments of a Python interpreter name."
    first, *rest = args[1:] if args[1] != "-u" else args[2:]
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(rest[0], module.__dict__)
    elif first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")


def become(args: Sequence[str], env: Mapping[str, str]) -> NoReturn:
    "Be a new Python interpreter in this fork."
    code = 1
    try:
        restore(env)
        if STARTED in env and "RANK" in env:
            with open(env[STARTED], "a") as file:
                file.write(f"{env['RANK']} {os.getpid()}\n")
        try:
            run_program(args)
            code = 0
        finally:
            threading._shutdown()
            atexit._run_exitfuncs()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(bool(error.code))
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException as error:
        traceback.print_exc()
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if code == -signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(code)


def fork_programs() -> None:
    "Let `Popen` fork this process where it would start a Python interpreter."
    real = subprocess.Popen.__init__

    def start(self, args: Sequence[str], *rest: object, env=None, **how) -> None:
        if args[0] == sys.executable and not isinstance(args, str):
            # this runs when the files, the folder and the session are set
            given = dict(os.environ if env is None else env)
            how["preexec_fn"] = partial(become, args, given)
        real(self, args, *rest, env=env, **how)

    subprocess.Popen.__init__ = start


def import_all() -> None:
    "Import what the programs need."
    import cloudpickle  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch.distributed.elastic.rendezvous.c10d_rendezvous_backend
    import torch.distributed.launcher.api
    import torch_lr_finder  # noqa: F401
    from sklearn.datasets import load_digits
    from torch import _dynamo  # noqa: F401

    import era_s10.cli  # noqa: F401
    from era_s10.augment import import_albumentations

    import_albumentations()
    load_digits()
    torch.set_num_threads(1)


def serve(connection: socket.socket) -> None:
    "Start programs and report how they have ended, until nobody asks any more."
    running: dict[int, subprocess.Popen] = {}
    while True:
        text, files, *_ = socket.recv_fds(connection, 1 << 20, 2)
        if not text:
            return
        request, reply = json.loads(text), {}
        if request:
            out, errors = files
            how = {"stdout": out, "stderr": errors, "start_new_session": True}
            process = subprocess.Popen(**request, stdin=subprocess.DEVNULL, **how)
            for file in files:
                os.close(file)
            running[process.pid] = process
            reply["pid"] = process.pid
        else:
            for pid in [pid for pid, one in running.items() if one.poll() is not None]:
                reply[pid] = running.pop(pid).returncode
        connection.sendall(json.dumps(reply).encode() + b"\n")


def main() -> None:
    "Import everything, and serve requests."
    default_signals()
    import_all()
    remember()
    fork_programs()
    serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
