"""The command era_s10_train with a fault in one of its processes at each start; for test_launch.py.

The first argument is the path of a JSON file with a list of faults: the fault of the first start of
the processes, of the second one, and so on. A fault is a dictionary with the key `rank` and the
arguments of `Fault`. When it happens, a line with its place and the time is added to a file with
the suffix `.log`; each new start of the processes adds one too."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path


def add_line(log: Path, name: str) -> None:
    "Add a name and the time to a log."
    with open(log, "a") as file:
        file.write(f"{name}: {time.time()}\n")


if __name__ == "__main__" and "RANK" in os.environ:  # before the slow imports
    add_line(Path(sys.argv[1]).with_suffix(".log"), "start")

from fork_server import Fault  # noqa: E402

import era_s10.checkpoint  # noqa: E402
from era_s10 import cli  # noqa: E402
from era_s10.backprop import Experiment  # noqa: E402
from era_s10.batched import BatchedPipeline  # noqa: E402


class GroupFault(Fault):
    "A fault in one process of a group."

    def __init__(self, log: Path, rank: int, where: str, **how: object) -> None:
        super().__init__(where.replace(" ", "_"), **how)
        self.rank, self.log, self.name = rank, log, where

    def note(self) -> None:
        "Add a line to the log."
        add_line(self.log, self.name)

    def count(self) -> None:
        "Write to the log before the fault happens."
        if self.left == 1:
            self.note()
        super().count()

    def disk_full(self, experiment: Experiment) -> None:
        "Let the disk be full from a save on."
        super().disk_full(experiment)
        save = era_s10.checkpoint.save_checkpoint

        def noted(*args: object) -> None:
            if self.left == 1:
                self.note()
            save(*args)

        era_s10.checkpoint.save_checkpoint = noted

    def image(self, experiment: Experiment) -> None:
        "Change one pixel of the training images."
        self.note()
        experiment.dataset.x_train[0, 0, 0] ^= 1

    def loader(self, experiment: Experiment) -> None:
        "Raise an error while a batch is prepared."
        real = BatchedPipeline.apply

        def apply(*args: object) -> object:
            self.count()
            return real(*args)

        BatchedPipeline.apply = apply
        self.action = lambda: self.fail(RuntimeError("can't prepare this batch"))


def inject(fault: GroupFault) -> None:
    "Install a fault in the experiment that the command makes."
    real: Callable = cli.make_experiment

    def make(*args: object) -> Experiment:
        experiment = real(*args)
        fault.inject(experiment)
        return experiment

    cli.make_experiment = make


def main() -> None:
    "Start the processes, or be one of them."
    path = Path(sys.argv.pop(1))
    log, faults = path.with_suffix(".log"), json.loads(path.read_text())
    if "RANK" not in os.environ:
        real, program = cli.start_processes, [sys.executable, __file__, str(path)]
        cli.start_processes = lambda command, *rest: real(
            [*program, *command[3:]], *rest
        )
    else:
        lines = log.read_text().splitlines() if log.exists() else []
        happened = [line for line in lines if not line.startswith("start")]
        if len(happened) < len(faults):
            fault = GroupFault(log, **faults[len(happened)])
            if fault.rank == int(os.environ["RANK"]):
                inject(fault)
    cli.train.main()


if __name__ == "__main__":
    main()
