"""A process that imports everything once, and forks a child process for each run it is asked for.

Each line of its input is a JSON object with the keys `folder`, `call` ("run" or "resume"), `setup`
(arguments of `make_experiment`), `fault` (arguments of `Fault`), `options` (arguments of the call)
and `after` (seconds until the child is killed). The last three are optional. Each line of its
output is a JSON object with the exit status of the child and the text that it printed."""

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
import era_s10.lr_finder
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
    "Kill this process at once, like a power failure."
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    "Send SIGINT to all processes of the group, like Ctrl-C in a terminal."
    os.killpg(0, signal.SIGINT)


def terminate() -> None:
    "Send SIGTERM to all processes of the group, like a job scheduler."
    os.killpg(0, signal.SIGTERM)


def hang_up() -> None:
    "Send SIGHUP to all processes of the group, like a terminal that is closed."
    os.killpg(0, signal.SIGHUP)


ACTIONS = {
    "kill": die,
    "interrupt": interrupt,
    "terminate": terminate,
    "hang up": hang_up,
}


class Fault:
    "A fault that is injected into a run when a place in the code is reached the n-th time."

    def __init__(
        self,
        where: str = "nowhere",  # name of a method below
        n: int = 1,  # how often the place is reached before the fault happens
        action: str = "kill",  # a key of ACTIONS; some places have their own action
        percent: int = 0,  # share of the bytes that `writing` writes before the fault
    ) -> None:
        self.where, self.left, self.percent = where, n, percent
        self.action = ACTIONS[action]

    def count(self) -> None:
        "Count down, and act when 0 is reached."
        self.left -= 1
        if self.left == 0:
            self.action()

    def inject(self, experiment: Experiment) -> None:
        "Install the fault in an experiment."
        if self.where != "nowhere":
            getattr(self, self.where)(experiment)

    def step(self, experiment: Experiment) -> None:
        "Act in a training step, before the optimizer updates the weights or after it."
        real, after = experiment.optimizer.step, self.left % 2

        def step(optimizer, *args, **options):
            if after:
                real(*args, **options)
            self.count()
            return None if after else real(*args, **options)

        experiment.optimizer.step = MethodType(step, experiment.optimizer)

    def test(self, experiment: Experiment) -> None:
        "Act in a batch of a test pass."
        experiment.model.register_forward_pre_hook(
            lambda module, _: None if module.training else self.count()
        )

    def writing(self, experiment: Experiment) -> None:
        "Act when a part of a checkpoint's bytes has been written."

        @contextmanager
        def write_part(path, mode="wb"):
            with atomic_write(path, mode) as file:
                real = file.write

                def write(data):
                    data = bytes(data)
                    if self.left == 1:
                        real(data[: len(data) * self.percent // 100])
                        file.flush()
                    else:
                        real(data)

                yield type("File", (), {"write": staticmethod(write)})
                self.count()

        era_s10.checkpoint.atomic_write = write_part

    def moving(self, experiment: Experiment) -> None:
        "Act when a checkpoint is written but not yet renamed."
        real = os.replace

        def replace(source, target):
            if Path(target).suffix == ".ckpt":
                self.count()
            real(source, target)

        os.replace = replace

    def saving(self, experiment: Experiment) -> None:
        "Act when the state is serialized."
        real = torch.save

        def save(*args, **options):
            self.count()
            real(*args, **options)

        torch.save = save

    def range_test(self, experiment: Experiment) -> None:
        "Act in the range test of the learning rate finder."
        count = self.count

        class Counted(era_s10.lr_finder.TrainingStep):
            def step(self, x, y):
                count()
                return super().step(x, y)

        era_s10.lr_finder.TrainingStep = Counted

    def error_in_save(self, experiment: Experiment) -> None:
        "Raise an error while a checkpoint is serialized."
        error = MemoryError("out of memory")
        real, self.action = torch.save, functools.partial(self.fail, error)

        def save(state, file):
            if self.left == 1:
                file.write(b"half of a checkpoint")
            self.count()
            real(state, file)

        torch.save = save

    def fail(self, error: Exception) -> None:
        "Raise an error."
        raise error

    def disk_full(self, experiment: Experiment) -> None:
        "Let the system report that the disk is full, by writing to /dev/full."
        save = era_s10.checkpoint.save_checkpoint

        def save_to_full_disk(state, path):
            self.left -= 1
            if self.left == 0:
                os.symlink(
                    "/dev/full", path.with_name(f".{path.name}.{os.getpid()}.part")
                )
            save(state, path)

        era_s10.checkpoint.save_checkpoint = save_to_full_disk

    def figures_full(self, experiment: Experiment) -> None:
        "Let the system report that the disk is full when a figure is written."
        for name in ("train", "test", "misclassified"):
            path = experiment.folder / f".{name}.png.{os.getpid()}.part"
            path.parent.mkdir(parents=True, exist_ok=True)
            os.symlink("/dev/full", path)

    def figure_fails(self, experiment: Experiment) -> None:
        "Raise an error when a figure is drawn."
        error = RuntimeError("can't draw")
        experiment.show_misclassified = functools.partial(self.fail, error)

    def output_closed(self, experiment: Experiment) -> None:
        "Let nobody read the output any more, as after `| head`."
        reading, writing = os.pipe()
        os.close(reading)
        os.dup2(writing, 1)

    def loss(self, experiment: Experiment) -> None:
        "Make a loss NaN."
        real = experiment.train.criterion
        self.action = lambda: None

        def criterion(logits, y):
            self.count()
            return real(logits, y) * (float("nan") if self.left == 0 else 1)

        experiment.train.criterion = criterion

    def gradient(self, experiment: Experiment) -> None:
        "Make a gradient infinite, while the loss is finite."
        weight, self.action = next(experiment.model.parameters()), lambda: None

        def hook(gradient):
            self.count()
            return gradient * (float("inf") if self.left == 0 else 1)

        weight.register_hook(hook)

    def input(self, experiment: Experiment) -> None:
        "Make the images of a batch NaN."
        self.action = lambda: None

        def hook(module, inputs):
            if module.training:
                self.count()
                return (inputs[0] * (float("nan") if self.left == 0 else 1),)
            return None

        experiment.model.register_forward_pre_hook(hook)

    def worker_killed(self, experiment: Experiment) -> None:
        "Kill a loader worker from outside."

        def kill() -> None:
            iterator = experiment.dataset.train_loader._iterator
            os.kill(iterator._workers[0].pid, signal.SIGKILL)
            time.sleep(0.3)

        self.action = kill
        self.step(experiment)

    def worker_hangs(self, experiment: Experiment) -> None:
        "Let a loader worker hang in a batch."
        real, self.action = BatchedPipeline.draw, functools.partial(time.sleep, 600)

        def draw(*args):
            if torch.utils.data.get_worker_info() is not None:
                self.count()
            return real(*args)

        BatchedPipeline.draw = draw


def make_experiment(setup: dict, folder: str) -> Experiment:
    "Make an experiment on 200 digits, with the settings of `setup`."
    set_seed(setup.get("seed", 0))
    dataset = Digits(
        limit=setup.get("limit", 200),
        batch_size=20,
        seed=setup.get("seed", 0),
        backend=setup.get("backend", "batched"),
        workers=setup.get("workers", 0),
    )
    dataset.worker_timeout = 3.0
    if setup.get("reversed"):  # the same images in reversed order
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


def run_child(request: dict) -> None:
    "Run or resume an experiment with the signal handlers of a script."
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(
            number, signal.default_int_handler if number == 2 else signal.SIG_DFL
        )
    experiment = make_experiment(request["setup"], request["folder"])
    print("started", flush=True)
    Fault(**request.get("fault", {})).inject(experiment)
    getattr(experiment, request["call"])(**request.get("options", {}))


def fork_child(request: dict) -> dict:
    "Fork a child, wait for it to end, and return its status and output."
    parent = Path(request["folder"]).parent
    out, errors = parent / "out.txt", parent / "errors.txt"
    for path in (out, errors):
        path.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        for path, number in ((out, 1), (errors, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        try:
            run_child(request)
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
    if after is not None:  # wait until the run has started or ended
        while not (out.exists() and "started" in out.read_text()) and not os.waitid(
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
    "Import everything, and handle requests until the input ends."
    torch.set_num_threads(1)
    warnings.simplefilter("default")
    warnings.filterwarnings("ignore", "This DataLoader will create")  # few cores
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
        print(json.dumps(fork_child(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
