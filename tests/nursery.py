"""A process that has imported everything, and forks a run for each line that it reads.

A line is a JSON object: `setup` (of the run), `folder`, `call` ("run" or "resume"), `fault` (what
befalls it). The answer is a line with how the child ended and what it wrote."""

import functools
import json
import os
import random
import signal
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import MethodType

import numpy as np
import torch

import era_s10.checkpoint
import era_s10.recipe
from era_s10.augment import import_albumentations
from era_s10.backprop import Experiment
from era_s10.batched import BatchedPipeline
from era_s10.checkpoint import CheckpointPolicy
from era_s10.datasets.digits import Digits
from era_s10.files import atomic_write
from era_s10.model import Model
from era_s10.recipe import Config
from era_s10.utils import set_seed


def die() -> None:
    "End this process as a power cut does."
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    "Send what Ctrl-C in a terminal sends: to all processes of the group."
    os.killpg(0, signal.SIGINT)


def terminate() -> None:
    "Send what a scheduler sends: to all processes of the group."
    os.killpg(0, signal.SIGTERM)


ENDS = {"kill": die, "interrupt": interrupt, "terminate": terminate}


class Fault:
    "Something that befalls a run once it is made."

    def __init__(
        self, where: str = "nowhere", n: int = 1, end: str = "kill", **more
    ) -> None:
        self.where, self.left, self.end, self.more = where, n, ENDS[end], more

    def count(self) -> None:
        "Let it happen the n-th time."
        self.left -= 1
        if self.left == 0:
            self.end()

    def befall(self, experiment: Experiment) -> None:
        "Lie in wait."
        if self.where != "nowhere":
            getattr(self, self.where)(experiment)

    def step(self, experiment: Experiment) -> None:
        "In the middle of a step, before the optimizer moves or behind it."
        real, behind = experiment.optimizer.step, self.left % 2

        def step(optimizer, *args, **options):
            if behind:
                real(*args, **options)
            self.count()
            return None if behind else real(*args, **options)

        experiment.optimizer.step = MethodType(step, experiment.optimizer)

    def test(self, experiment: Experiment) -> None:
        "In a batch of a test pass."
        experiment.model.register_forward_pre_hook(
            lambda module, _: None if module.training else self.count()
        )

    def writing(self, experiment: Experiment) -> None:
        "When part of a checkpoint's bytes have been written."

        @contextmanager
        def half(path, mode="wb"):
            with atomic_write(path, mode) as file:
                real = file.write

                def write(data):
                    data = bytes(data)
                    if self.left == 1:
                        real(data[: len(data) * self.more["percent"] // 100])
                        file.flush()
                    else:
                        real(data)

                yield type("File", (), {"write": staticmethod(write)})
                self.count()

        era_s10.checkpoint.atomic_write = half

    def moving(self, experiment: Experiment) -> None:
        "When a checkpoint is written and not yet moved to its place."
        real = os.replace

        def replace(source, target):
            if Path(target).suffix == ".ckpt":
                self.count()
            real(source, target)

        os.replace = replace

    def saving(self, experiment: Experiment) -> None:
        "When the state is turned into bytes."
        real = torch.save

        def save(*args, **options):
            self.count()
            real(*args, **options)

        torch.save = save

    def search(self, experiment: Experiment) -> None:
        "In the search for the learning rate."
        real = era_s10.recipe._only_finite

        def watched(criterion):
            loss = real(criterion)

            def counted(*args):
                self.count()
                return loss(*args)

            return counted

        era_s10.recipe._only_finite = watched

    def raises(self, experiment: Experiment) -> None:
        "An error while a checkpoint is made."
        real, self.end = (
            torch.save,
            functools.partial(self.fail, MemoryError("no room to write in")),
        )

        def save(state, file):
            if self.left == 1:
                file.write(b"half of a checkpoint")
            self.count()
            real(state, file)

        torch.save = save

    def fail(self, error: Exception) -> None:
        "Raise it."
        raise error

    def full(self, experiment: Experiment) -> None:
        "No room on the device, as the system itself says."
        save = era_s10.checkpoint.save_checkpoint

        def onto_a_full_device(state, path):
            self.left -= 1
            if self.left == 0:
                os.symlink(
                    "/dev/full", path.with_name(f".{path.name}.{os.getpid()}.part")
                )
            save(state, path)

        era_s10.checkpoint.save_checkpoint = onto_a_full_device

    def loss(self, experiment: Experiment) -> None:
        "A loss that is no number."
        real = experiment.train.criterion
        self.end = lambda: None

        def criterion(logits, y):
            self.count()
            return real(logits, y) * (float("nan") if self.left == 0 else 1)

        experiment.train.criterion = criterion

    def gradient(self, experiment: Experiment) -> None:
        "A gradient that is infinite, of a loss that is not."
        weight, self.end = next(experiment.model.parameters()), lambda: None

        def hook(gradient):
            self.count()
            return gradient * (float("inf") if self.left == 0 else 1)

        weight.register_hook(hook)

    def input(self, experiment: Experiment) -> None:
        "An image with a value that is no number."
        self.end = lambda: None

        def hook(module, inputs):
            if module.training:
                self.count()
                return (inputs[0] * (float("nan") if self.left == 0 else 1),)
            return None

        experiment.model.register_forward_pre_hook(hook)

    def worker(self, experiment: Experiment) -> None:
        "A loader worker is killed from outside."

        def kill() -> None:
            iterator = experiment.dataset.train_loader._iterator
            os.kill(iterator._workers[0].pid, signal.SIGKILL)
            time.sleep(0.3)

        self.end = kill
        self.step(experiment)

    def asleep(self, experiment: Experiment) -> None:
        "A loader worker falls asleep over a batch."
        real, self.end = BatchedPipeline.draw, functools.partial(time.sleep, 600)

        def draw(*args):
            if torch.utils.data.get_worker_info() is not None:
                self.count()
            return real(*args)

        BatchedPipeline.draw = draw


def make(setup: dict, folder: str) -> Experiment:
    "Make the experiment of a setup."
    set_seed(setup.get("seed", 0))
    dataset = Digits(
        limit=setup.get("limit", 200),
        batch_size=20,
        seed=setup.get("seed", 0),
        backend=setup.get("backend", "batched"),
        workers=setup.get("workers", 0),
    )
    dataset.worker_timeout = 3.0
    if setup.get("turned"):  # the same images in another order
        dataset.x_train, dataset.y_train = (
            dataset.x_train[::-1].copy(),
            dataset.y_train[::-1].copy(),
        )
    config = Config(
        epochs=setup.get("epochs", 5),
        max_lr=setup.get("max_lr", 0.01),
        ema_span=0.3,
        lr_find_steps=60,
    )
    model = Model(setup.get("width", 2), dropout=0.1)
    return Experiment(
        model, dataset, config, folder, CheckpointPolicy(steps=setup.get("steps", 4))
    )


def child(request: dict) -> None:
    "Run or resume, and end as a script would."
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(
            number, signal.default_int_handler if number == 2 else signal.SIG_DFL
        )
    experiment = make(request["setup"], request["folder"])
    Fault(**request.get("fault", {})).befall(experiment)
    print("begun", flush=True)
    getattr(experiment, request["call"])(**request.get("options", {}))


def answer(request: dict) -> dict:
    "Fork a child, wait for its end, and tell it."
    place = Path(request["folder"]).parent
    out, errors = place / "out.txt", place / "errors.txt"
    for path in (out, errors):
        path.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        for path, number in ((out, 1), (errors, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        try:
            child(request)
            code = 0
        except KeyboardInterrupt:
            code = 130
        except SystemExit as error:
            code = error.code
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    timer = threading.Timer(60, os.killpg, (pid, signal.SIGKILL))
    timer.start()
    after = request.get("after")
    if after is not None:  # a moment after it has begun, or ended
        while not (out.exists() and "begun" in out.read_text()) and not os.waitid(
            os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT
        ):
            time.sleep(0.005)
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    timer.cancel()
    return {
        "status": os.waitstatus_to_exitcode(status),
        "out": out.read_text(),
        "errors": errors.read_text(),
    }


def main() -> None:
    "Answer until there is no more to read."
    torch.set_num_threads(1)
    warnings.simplefilter("default")
    import_albumentations()
    import matplotlib.pyplot  # noqa: F401
    import torch_lr_finder  # noqa: F401
    from filelock import FileLock  # noqa: F401
    from safetensors.torch import save  # noqa: F401
    from sklearn.datasets import load_digits
    from torch import _dynamo  # noqa: F401

    load_digits()
    assert np.__version__ and random.random() < 1
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
