"""What the processes of a group compute, for test_processes.py; started by torchrun."""

import json
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from era_s10 import resumable
from era_s10.backprop import Experiment, Test
from era_s10.datasets.digits import Digits
from era_s10.model import Model
from era_s10.parts import accumulate
from era_s10.processes import Group, current_group, tensor_digest
from era_s10.recipe import RECIPES, make_config
from era_s10.speed import FastModel
from era_s10.steps import TrainingStep
from era_s10.utils import set_seed


def batches(
    group: Group, backend: str, workers: int, share: bool = True
) -> list[list[str]]:
    "Return a digest of each image of two epochs, by batch, in the order of the batch."
    data = Digits(limit=150, batch_size=64, backend=backend, workers=workers)
    data = data.with_augmentation("crop")
    found = []
    for epoch in (0, 1):
        take = group.divide(1) if share else None
        data.set_epoch(epoch, 0, take)
        keys = [key[1].tolist() for key in data.train_loader.sampler]
        data.set_epoch(epoch, 0, take)
        for step, (x, y) in enumerate(data.train_loader):
            lines = [
                f"{epoch} {step} {index} {int(label)} {tensor_digest({'': image})}"
                for index, image, label in zip(keys[step], x, y, strict=True)
            ]
            found.append([line for lines in group.gather(lines) for line in lines])
    data.kill_workers()
    return found


def flat_state(state: dict, name: str = "") -> dict[str, Tensor]:
    "Return the tensors of a nested dictionary by name."
    if isinstance(state, Tensor):
        return {name: state}
    if isinstance(state, dict):
        pairs = [flat_state(value, f"{name}.{key}") for key, value in state.items()]
        return {key: value for pair in pairs for key, value in pair.items()}
    return {}


def run(
    recipe: str, limit: int = 120, parts: int = 4, fast: bool = False, **changes
) -> dict:
    "Train for two epochs; return digests of all states, and the history."
    set_seed(0)
    fixed = {"max_lr": 0.02, "epochs": 2, "device": "cpu"}
    fixed |= {} if fast else {"dropout": 0.1}
    config = make_config(recipe, **{**fixed, "parts": parts, **changes})
    model = FastModel(8) if fast else Model(8, dropout=0.1)
    data = Digits(limit=limit, batch_size=64, validation=0.1)
    data.x_test, data.y_test = data.x_test[:70], data.y_test[:70]
    experiment = Experiment(model, data, config)
    history = experiment.run()
    train = experiment.train
    ema = {} if train.ema is None else train.ema.state_dict()
    records = [{k: v for k, v in r.items() if k != "seconds"} for r in history]
    return {
        "model": tensor_digest(model.state_dict()),
        "optimizer": tensor_digest(flat_state(experiment.optimizer.state_dict())),
        "ema": tensor_digest(flat_state(ema)),
        "history": records,
    }


def gradient(group: Group, images: int, local_norm: bool = False) -> list[float]:
    "Return the gradient of a first batch; with local norm each process has its own."
    set_seed(0)
    model, data = Model(8, dropout=0.0).train(), Digits(batch_size=images)
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    step = TrainingStep(model, sgd, group=group)
    data.set_epoch(0, 0, group.divide(1))
    x, y = next(iter(data.train_loader))
    if local_norm:
        how = step.backward, images, group.tree_sum
        accumulate(model, x, y, group.share(1), *how)
    else:
        step.step(x, y, images)
    return torch.cat([p.grad.flatten() for p in model.parameters()]).tolist()


def logits(group: Group, batch_size: int) -> dict:
    "Test 361 images; return a digest of the logits, and the counts of a padded test."
    set_seed(0)
    data = Digits(batch_size=batch_size)
    data.x_test, data.y_test = data.x_train[:361], data.y_train[:361]
    test = Test(Model(8), data, group=group)
    loss, accuracy = test()
    padded = DistributedSampler(range(361), group.size, group.rank, shuffle=False)
    return {
        "logits": tensor_digest({"": torch.from_numpy(test.logits)}),
        "results": [loss, accuracy],
        "counted": len(test.logits),
        "padded": sum(group.gather(len(padded))),
    }


def errors(group: Group) -> dict:
    "Return the messages of each process when one of them fails."

    def fail() -> None:
        raise ValueError(f"failed in process {group.rank}")

    def items(rank: int):
        yield (torch.zeros(1),)
        if group.rank == rank:
            fail()

    class Local(ValueError):
        def __init__(self, first: str, second: str) -> None:  # can't be unpickled
            super().__init__(f"{first} {second}")

    def fail_locally() -> None:
        raise Local("a", "b")

    found = {}
    trials = {
        "first": lambda: group.first(fail),
        "collect": lambda: group.collect(items(group.size - 1)),
        "local": lambda: group.first(fail_locally),
        "equal": lambda: group.check_equal("numbers", lambda: min(group.rank, 1)),
        "parts": lambda: group.check_parts(6),
        "nan": lambda: nan_in_the_last(group),
    }
    for what in ("augmentation", "image", "version", "code"):
        trials[what] = partial(differ, group, what)
    for name, trial in trials.items():
        try:
            trial()
            found[name] = "nothing raised"
        except (ValueError, RuntimeError, FloatingPointError) as error:
            found[name] = str(error)
    return {name: group.gather(text) for name, text in found.items()}


def nan_in_the_last(group: Group) -> None:
    "Take a step in which one image of the last process is NaN."
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    step = TrainingStep(model, sgd, parts=group.size, group=group)
    x = torch.ones(2, 3, 2, 2)
    if group.rank == group.size - 1:
        x[1] = torch.nan
    step.step(x, torch.tensor([0, 1]), 2 * group.size)


def differ(group: Group, what: str) -> None:
    "Start a run in which the last process has different data, versions or code."
    last = group.rank == group.size - 1
    data = Digits(limit=64, batch_size=32)
    if last and what == "augmentation":
        data = data.with_augmentation("crop")
    if last and what == "image":
        data.x_train[0, 0, 0] ^= 1
    changed = {
        "version": ("package_versions", lambda *names: dict.fromkeys(names, "0.1")),
        "code": ("describe_code", lambda: {"sources": "other"}),
    }
    name, function = changed.get(what, changed["code"])
    real = getattr(resumable, name)
    if last and what in changed:
        setattr(resumable, name, function)
    try:
        config = make_config(max_lr=0.02, epochs=1, device="cpu")
        Experiment(Model(4), data, config).run()
    finally:
        setattr(resumable, name, real)


def different_weights(group: Group) -> list[str]:
    "Return the digests after a run whose processes had different initial weights."
    torch.manual_seed(group.rank)
    config = make_config(max_lr=0.02, epochs=1, device="cpu")
    experiment = Experiment(Model(4), Digits(limit=64, batch_size=32), config)
    experiment.run()
    return group.gather(tensor_digest(experiment.model.state_dict()))


def main(folder: str) -> None:
    torch.set_num_threads(1)
    group, found = current_group(), {}
    for backend in ("batched", "albumentations"):
        for workers in (0, 2):
            found[f"batches {backend} {workers}"] = batches(group, backend, workers)
    for size in (64, 100, 361):
        found[f"logits {size}"] = logits(group, size)
    found["gradient"] = gradient(group, 64)
    if group.size > 1:
        found["local gradient"] = gradient(group, 64, local_norm=True)
        found["errors"] = errors(group)
        found["different weights"] = different_weights(group)
        found["undivided"] = batches(group, "batched", 0, share=False)
    if group.size in (1, 2, 4):
        for recipe in RECIPES:
            for precision in ("fp32", "bf16"):
                found[f"{recipe} {precision}"] = run(recipe, precision=precision)
        found["ema"] = run("era", ema_span=0.5)
        found["fast network"] = run("fast", fast=True, small_images=0.5)
        found["short"] = run("era", limit=75)  # 67 train: 3 images in the last batch
    found["one part"] = run("era", parts=1)
    if group.rank == 0:
        Path(folder, f"{group.size}.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1])
