"""Tests of runs: the range test has no side effects, Ctrl-C, history, resuming, plain PyTorch."""

import copy
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import digest, files, small_cifar10, write_npz, write_tree
from project import ROOT
from torch import Tensor, nn

from era_s10.announce import announce
from era_s10.backprop import Experiment, Test
from era_s10.checkpoint import Checkpoints
from era_s10.cli import train
from era_s10.datasets.digits import Digits
from era_s10.datasets.generic import MyDataSet
from era_s10.lr_finder import explain_doubt, suggest_lr
from era_s10.model import Model
from era_s10.options import Options, make_experiment
from era_s10.recipe import Config, Numerics, make_config
from era_s10.run_folder import History, RunSettings, read_config
from era_s10.samples import BatchedKeyedDataset, KeyedDataset
from era_s10.steps import FiniteGuard
from era_s10.utils import set_seed
from era_s10.weights import load_weights


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    "Use one thread; with more, such small models train more slowly."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_model(classes: int = 10) -> nn.Module:
    "Make a model that is not a `Model` of this package."
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=4),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(256, classes),
    )


def small_data(**options) -> Digits:
    "Return 60 training images of Digits, in three batches."
    return Digits(**{"limit": 60, "batch_size": 20, **options})


def recipe(**options) -> Config:
    "Return a recipe for a short run."
    return Config(
        **{"max_lr": 0.01, "epochs": 2, "lr_find_steps": 60, "device": "cpu", **options}
    )


# ---------------------------------------------------------------- the range test has no side effects


def full_state(experiment: Experiment) -> list:
    "Return everything that a range test could change, as plain values."
    model = experiment.model
    optimizer = copy.deepcopy(experiment.optimizer.state_dict())
    state = {
        k: {n: v.tolist() for n, v in s.items()}
        for k, s in optimizer.pop("state").items()
    }
    python, numpy = random.getstate(), np.random.get_state()
    return [
        [(name, digest([value])) for name, value in model.state_dict().items()],
        [None if p.grad is None else digest([p.grad]) for p in model.parameters()],
        [p.requires_grad for p in model.parameters()],
        [module.training for module in model.modules()],
        [len(module._forward_hooks) for module in model.modules()],
        optimizer,
        state,
        python,
        [numpy[0], numpy[1].tolist(), *numpy[2:]],
        digest([torch.get_rng_state()]),
        experiment.dataset.train_loader.sampler.epoch,
        [
            experiment.train.steps,
            experiment.train.losses,
            experiment.test.losses,
            list(experiment.history),
        ],
        torch.is_grad_enabled(),
        signal.getsignal(signal.SIGINT),
    ]


def used_experiment(model: nn.Module | None = None, **options) -> Experiment:
    "Make an experiment with gradients, optimizer state, mixed modes and epoch 4 as the next."
    set_seed(0)
    dataset = small_data(**options)
    experiment = Experiment(model or small_model(), dataset, recipe(lr_find_steps=60))
    x, y = next(iter(dataset.train_loader))
    experiment.train.step(x, y)
    experiment.train.steps = 0
    experiment.model[1].eval()
    dataset.set_epoch(4)
    return experiment


class Exploding(nn.Module):
    "Return the input, and after a number of passes in training mode NaN."

    def __init__(self, passes: int) -> None:
        super().__init__()
        self.left = passes

    def forward(self, x: Tensor) -> Tensor:
        self.left -= self.training
        return x if self.left >= 0 else x * float("nan")


def check_next_epoch(experiment: Experiment) -> None:
    "Check that the loader still returns the batches of epoch 4."
    fresh = small_data(backend=experiment.dataset.backend)
    fresh.set_epoch(4)
    for (x, y), (expected_x, expected_y) in zip(
        experiment.dataset.train_loader, fresh.train_loader, strict=True
    ):
        assert torch.equal(x, expected_x)
        assert torch.equal(y, expected_y)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_range_test_has_no_side_effects(workers):
    experiment = used_experiment(workers=workers)
    before = full_state(experiment)
    suggestion = experiment.find_lr()
    assert full_state(experiment) == before
    assert 0 < suggestion.lr <= 0.1
    assert suggestion.figure.axes[0].lines
    assert experiment.lr_suggestion is suggestion
    check_next_epoch(experiment)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_range_test_has_no_side_effects(workers):
    experiment = used_experiment(workers=workers)
    before = full_state(experiment)
    passes = []

    def interrupt(*args) -> None:
        passes.append(1)
        if len(passes) == 5:
            raise KeyboardInterrupt

    hook = nn.modules.module.register_module_forward_hook(
        lambda module, x, y: interrupt() if isinstance(module, nn.Flatten) else None
    )
    with hook, pytest.raises(KeyboardInterrupt):
        experiment.find_lr()
    assert len(passes) == 5
    assert full_state(experiment) == before
    assert experiment.lr_suggestion is None
    check_next_epoch(experiment)


@pytest.mark.parametrize("kind", [KeyedDataset, BatchedKeyedDataset])
def test_an_interrupt_in_the_loader_has_no_side_effects(kind, monkeypatch):
    backend = {KeyedDataset: "albumentations", BatchedKeyedDataset: "batched"}[kind]
    experiment = used_experiment(backend=backend)
    before = full_state(experiment)
    real, calls = kind.__getitem__, []

    def interrupt(self, key):
        calls.append(key)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(self, key)

    with monkeypatch.context() as patched:
        patched.setattr(kind, "__getitem__", interrupt)
        with pytest.raises(KeyboardInterrupt):
            experiment.find_lr()
    assert full_state(experiment) == before
    check_next_epoch(experiment)


@pytest.mark.parametrize(("passes", "suggests"), [(3, False), (55, True)])
def test_nan_in_the_range_test_has_no_side_effects(passes, suggests):
    experiment = used_experiment(nn.Sequential(*small_model(), Exploding(passes + 1)))
    before = full_state(experiment)
    if suggests:
        assert 0 < experiment.find_lr().lr < 0.1
    else:
        with pytest.raises(FloatingPointError, match="not finite"):
            experiment.find_lr()
    assert full_state(experiment) == before
    assert experiment.model[-1].left == passes
    check_next_epoch(experiment)


def test_estimating_an_epoch_has_no_side_effects():
    experiment = used_experiment()
    before = full_state(experiment)
    assert experiment.estimate_epoch(budget=0.2) > 0
    assert full_state(experiment) == before


def test_a_range_test_does_not_change_the_run_after_it():
    found = []
    for range_tests in (0, 1):
        set_seed(2)
        experiment = Experiment(small_model(), small_data(), recipe())
        torch.manual_seed(range_tests)
        for _ in range(range_tests):
            experiment.find_lr()
        experiment.run()
        found.append(digest(experiment.model.state_dict().values()))
    assert found[0] == found[1]


def test_a_run_without_a_learning_rate_uses_the_range_test(tmp_path):
    experiment = Experiment(
        small_model(), small_data(), recipe(max_lr=None), tmp_path / "run"
    )
    experiment.run(epochs=1)
    assert experiment.lr_suggestion is not None
    run = json.loads((tmp_path / "run" / "config.json").read_text())["run"]
    assert run["max_lr"] == experiment.lr_suggestion.lr
    assert (tmp_path / "run" / "lr_finder.png").exists()


# ---------------------------------------------------------------- the range test is that of the run


class Tenth(nn.Module):
    "Cross-entropy of a tenth of the logits."

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits / 10, y)


def curve(experiment: Experiment) -> tuple[list, list]:
    "Run a range test, and return its learning rates and losses."
    line = experiment.find_lr().figure.axes[0].lines[0]
    return line.get_xdata().tolist(), line.get_ydata().tolist()


def searched(**options) -> Experiment:
    "Make an experiment for a range test whose minimum is inside the range."
    set_seed(0)
    model = Model(2, dropout=0.1)
    config = recipe(max_lr=None, lr_find_end=10.0, lr_find_steps=40, **options)
    return Experiment(model, Digits(limit=200, batch_size=40), config)


def test_the_range_test_of_fp32_is_a_plain_loop():
    experiment = searched(precision="fp32")
    model = copy.deepcopy(experiment.model).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-7, weight_decay=1e-2)
    loader = Digits(limit=200, batch_size=40).train_loader
    batches = iter(loader)
    rates, means = [], []
    torch.manual_seed(0)
    for i in range(40):
        batch = next(batches, None)
        if batch is None:  # the next epoch; a new iterator draws from the generator
            batches = iter(loader)
            batch = next(batches)
        x, y = batch
        lr = 1e-7 * (10.0 / 1e-7) ** (i / 39)
        optimizer.param_groups[0]["lr"] = lr
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.append(lr)
        means.append(0.05 * loss.item() + 0.95 * means[-1] if means else loss.item())
        if means[-1] > 5 * min(means):
            break
    found_rates, found = curve(experiment)
    assert found_rates == pytest.approx(rates)
    assert found == pytest.approx(means, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["L4: criterion of the user", "L4: label smoothing", "L4: function"])  # fmt: skip
def test_the_range_test_uses_the_loss_of_the_run(case):
    plain, other = searched(), searched()
    if case == "L4: label smoothing":
        other = searched(label_smoothing=0.3)
    else:
        tenth = Tenth()
        other.train.criterion = tenth if "user" in case else lambda x, y: tenth(x, y)
    x, y = next(iter(other.dataset.train_loader))
    other.dataset.set_epoch(0)
    first = other.train.criterion(copy.deepcopy(other.model).train()(x), y).item()
    assert curve(other)[1][0] == pytest.approx(first, rel=0.2)
    assert curve(other)[1] != curve(plain)[1]


@pytest.mark.parametrize("precision", ["bf16", "fp16"], ids=["L4: bf16", "L4: fp16"])
def test_the_range_test_uses_the_precision_of_the_run(precision):
    seen = []
    experiment = searched(precision=precision)
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, x, y: seen.append(y.dtype) if type(module) is nn.Linear else None
    )
    with hook:
        found = experiment.find_lr()
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert set(seen) == {kind}
    assert found.lr > 0


def test_a_criterion_with_state_is_not_changed_by_the_range_test():
    class Counting(Tenth):
        "A loss that counts its calls in a buffer."

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, logits: Tensor, y: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(logits, y)

    experiment = searched()
    experiment.train.criterion = Counting()
    experiment.find_lr()
    assert experiment.train.criterion.calls == 0


@pytest.mark.parametrize("end", [1e-4, 1e-3], ids=["L1: 0.0001", "L1: 0.001"])
def test_a_lowest_point_at_the_end_of_the_range_is_reported(end):
    set_seed(0)
    config = recipe(max_lr=None, lr_find_end=end, lr_find_steps=60)
    experiment = Experiment(Tiny(), Digits(limit=300, batch_size=100), config)
    with pytest.warns(UserWarning, match="lowest at the end of the range") as caught:
        found = experiment.find_lr()
    assert "only a tenth of that bound; search higher" in str(caught[0].message)
    assert found.lr == pytest.approx(end / 10, rel=0.5)
    assert "the end of the range" in found.figure.axes[0].get_title("left")
    assert found.doubt == str(caught[0].message)


def test_a_lowest_point_inside_the_range_is_not_reported():
    rates, losses = np.logspace(-7, 1, 100), np.r_[np.linspace(3, 1, 80), [2.0] * 20]
    assert explain_doubt(rates, losses, 10.0) is None
    for lowest, word in ((99, "end"), (96, "end"), (2, "start"), (0, "start")):
        losses[:] = 2
        losses[lowest] = 1
        assert f"lowest at the {word} of the range" in explain_doubt(rates, losses, 10)
    losses[:] = np.linspace(2, 1, 100)  # the sweep was ended by NaN
    assert explain_doubt(rates, losses, end_lr=100.0) is None


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([2.0, 2.1, 3.0, 11.0], "the loss diverged after 4 steps"),
        ([2.0, 2.1], "the loss is not finite after 2 steps"),
        ([], "the loss is not finite after 0 steps"),
    ],
)
def test_a_short_range_test_says_why_it_ended(losses, message):
    rates = np.logspace(-7, -6, len(losses))
    with pytest.raises(FloatingPointError, match=message):
        suggest_lr(rates, np.array(losses))


def test_a_learning_rate_is_kept_if_its_figure_cannot_be_drawn(monkeypatch, tmp_path):
    def fail(*curve) -> None:
        raise ModuleNotFoundError("No module named\n'missing_backend'")

    monkeypatch.setattr("era_s10.lr_finder.draw_range_test", fail)
    experiment = Experiment(
        small_model(), small_data(), recipe(max_lr=None), tmp_path / "run"
    )
    with pytest.warns(UserWarning, match="can't be drawn .No module named 'missing"):
        experiment.run(epochs=1)
    assert experiment.lr_suggestion.figure is None
    assert experiment.plan.max_lr == experiment.lr_suggestion.lr
    assert (tmp_path / "run" / "weights.safetensors").exists()
    assert not (tmp_path / "run" / "lr_finder.png").exists()


@pytest.mark.parametrize(
    ("options", "batch_size", "warns"),
    [
        ({"epochs": 1}, 60, True),
        ({"epochs": 2}, 60, False),
        ({"epochs": 1}, 20, False),
        ({"epochs": 1, "schedule": "CosineAnnealingLR"}, 60, False),
        ({"schedule": "CyclicLR", "schedule_options": {"base_lr": 1e-6, "max_lr": 0.1}}, 20, True),
        ({"schedule": "LambdaLR", "schedule_options": {"lr_lambda": lambda step: 0.0}}, 20, True),
    ],
    ids=["L3", "two steps", "three steps", "no warmup", "L3: long cycle", "L3: zero"],
)  # fmt: skip
def test_a_schedule_that_never_reaches_a_useful_rate_is_a_warning(
    options, batch_size, warns
):
    data = small_data(batch_size=batch_size)
    experiment = Experiment(small_model(), data, recipe(**options))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        experiment.run()
    found = [str(w.message) for w in caught if "of its peak" in str(w.message)]
    assert bool(found) == warns


# ---------------------------------------------------------------- models that can be trained


def unusual_model(kind: str) -> nn.Module:
    "Return a model that looks wrong at first, and can be trained."
    if kind == "half of it frozen":
        model = Model(2).requires_grad_(False)
        model.net[-1].requires_grad_(True)
    if kind == "in evaluation mode":
        model = Model(2).eval()
    if kind == "that can't be copied":
        model = Tiny()
        model.lock = threading.Lock()
    if kind == "with a frozen layer in float16":
        model = HalfFrozen()
    if kind == "that returns float64":
        model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10), ToDouble())
    return model


class HalfFrozen(nn.Module):
    "A frozen backbone in 16 bits, and a linear layer."

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(3072, 8).half().requires_grad_(False)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x.flatten(1).half()).float())


class ToDouble(nn.Module):
    "Convert to float64."

    def forward(self, x: Tensor) -> Tensor:
        return x.double()


@pytest.mark.parametrize(
    "kind",
    [
        "half of it frozen",
        "in evaluation mode",
        "that can't be copied",
        "with a frozen layer in float16",
        "that returns float64",
    ],
)
def test_a_model_that_can_be_trained_is_not_refused(kind):
    set_seed(0)
    model = unusual_model(kind)
    before = digest(model.state_dict().values())
    state = torch.get_rng_state()
    experiment = Experiment(model, small_data(), recipe())
    assert digest(model.state_dict().values()) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert len(experiment.run(epochs=1)) == 1


def test_the_mode_of_a_model_does_not_change_its_run():
    found = []
    for training in (True, False):
        set_seed(0)
        model = Model(2).train(training)
        experiment = Experiment(model, small_data(), recipe(max_lr=None))
        experiment.run(epochs=1)
        found.append(digest(model.state_dict().values()))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("limit", "batch_size"),
    [(65, 64), (3, 2), (2, 1), (1, 512)],
    ids=["M2", "M2: three images", "M2: batches of one", "M2: one image"],
)
def test_a_last_batch_of_one_is_trained_where_the_model_copes(limit, batch_size):
    data = Digits(limit=limit, batch_size=batch_size)
    experiment = Experiment(Model(2), data, recipe())
    assert len(experiment.run(epochs=1)) == 1


def test_batches_of_at_least_two_images_are_enough_for_batch_norm():
    layers = nn.Conv2d(3, 4, 32), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 10)
    for options in ({"limit": 66}, {"limit": 64}, {"limit": 10}):
        data = Digits(batch_size=64, **options)
        Experiment(copy.deepcopy(nn.Sequential(*layers)), data, recipe()).run(epochs=1)


@pytest.mark.parametrize("size", [(33, 33), (40, 64)])
def test_a_run_on_images_of_another_size(size, tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (24, *size, 3), dtype=np.uint8)
    y = np.arange(24) % 3
    np.savez(tmp_path / "sized.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    data = MyDataSet(tmp_path / "sized.npz", batch_size=12, augmentation="cifar10")
    experiment = Experiment(Model(2, classes=3), data, recipe(), tmp_path / "run")
    assert len(experiment.run(epochs=2)) == 2
    assert experiment.test(record=False)[1] == experiment.history[-1]["test_accuracy"]


def test_training_images_of_several_sizes_are_refused():
    from era_s10.augment import import_albumentations

    scale = import_albumentations().RandomScale(0.9, p=1)
    data = small_data(augmentation=[scale], backend="albumentations")
    with pytest.raises(ValueError, match="augmentation: training images have diff"):
        Experiment(Model(2), data, recipe())


def test_training_images_of_another_size_than_the_test_images_are_a_warning():
    from era_s10.augment import import_albumentations

    larger = import_albumentations().Resize(48, 40, p=1)
    data = small_data(augmentation=[larger], backend="albumentations")
    with pytest.warns(
        UserWarning, match="images are 3x48x40, but test images are 3x32"
    ):
        experiment = Experiment(Model(2), data, recipe())
    assert len(experiment.run(epochs=1)) == 1


def test_a_model_that_cannot_be_copied_needs_a_learning_rate():
    set_seed(0)
    model = unusual_model("that can't be copied")
    experiment = Experiment(model, small_data(), recipe(max_lr=None))
    with pytest.raises(ValueError, match="can't be copied for the range test"):
        experiment.find_lr()


# ---------------------------------------------------------------- what is announced


def announced(capsys, **options) -> list[str]:
    "Return the lines on augmentation and recipe that a command prints."
    announce(make_experiment(Options(**options, width=2, batch_size=20)), None)
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if line.startswith(("images", "recipe"))]


BATCHED = "images  augmented by the batched backend: "
FLIP_CROP = BATCHED + "PadIfNeeded, RandomCrop, HorizontalFlip"


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("npz", {}, ["images  not augmented"]),
        ("npz", {"augment": "flip"}, [BATCHED + "HorizontalFlip"]),
        ("folder", {}, [FLIP_CROP]),
        ("folder", {"augment": "none"}, ["images  not augmented"]),
        ("folder", {"augment": "crop", "backend": "albumentations"},
            ["images  augmented by the albumentations backend: PadIfNeeded, RandomCrop"]),
        ("folder", {"recipe": "modern"},
            [FLIP_CROP.replace("HorizontalFlip", "AlternatingFlip"),
             "recipe  without effect here: drop_transforms: no ToGray"]),
        ("npz", {"recipe": "modern"},
            ["images  not augmented",
             "recipe  without effect here: drop_transforms: no ToGray; "
             "alternate_flip: no HorizontalFlip"]),
        ("folder", {"augment": "cifar10", "recipe": "modern-no-cutout"},
            [FLIP_CROP.replace("HorizontalFlip", "AlternatingFlip")]),
    ],
    ids=["F8: npz", "F8: flip", "F8: folder", "F8: none", "F8: crop", "F8: recipe",
         "F8: recipe and no transforms", "F8: recipe and cifar10"],
)  # fmt: skip
def test_the_augmentation_is_announced_as_it_is(
    kind, options, expected, capsys, tmp_path
):
    arrays = small_cifar10()
    path = tmp_path / ("data.npz" if kind == "npz" else "data")
    (write_npz if kind == "npz" else write_tree)(path, *arrays)
    assert announced(capsys, dataset=str(path), **options) == expected


@pytest.mark.slow
def test_a_resumed_command_uses_the_augmentation_of_the_run(tmp_path, capsys):
    write_tree(tmp_path / "data", *small_cifar10())
    options = {"dataset": str(tmp_path / "data"), "width": 2, "batch_size": 30}
    options |= {"epochs": 2, "max_lr": 0.01, "device": "cpu"}
    for name in ("none", "flip", None):
        folder = tmp_path / f"run-{name}"
        train(**options, augment=name, folder=str(folder))
        settings = read_config(folder).dataset
        assert settings["augment"] == name
        train(resume=str(folder), epochs=3)
        assert read_config(folder).dataset == settings
    del settings["augment"]  # a run of an earlier version, which had no default
    assert settings["augmentation"]
    old = RunSettings(**vars(read_config(tmp_path / "run-none")))
    del old.dataset["augment"]
    assert old.dataset_options["augmentation"] == "none"


# ---------------------------------------------------------------- Ctrl-C in a real process

CHILD = """
import json, random, sys
sys.path.insert(0, "tests")
import torch
from test_experiment import small_data, small_model, recipe, full_state
from era_s10.backprop import Experiment

class Slow(torch.nn.Module):
    passes, finished = 0, 0

    def forward(self, x):
        if self.training:
            Slow.passes += 1
            if Slow.passes == STOP:
                print("in a step", flush=True)
                sys.stdin.readline()  # written after the signal was sent
            Slow.finished += 1
        return x

def main():
    torch.set_num_threads(1)
    model = torch.nn.Sequential(*small_model(), Slow())
    config = recipe(epochs=1000, lr_find_steps=1000)
    experiment = Experiment(model, small_data(workers=WORKERS), config, FOLDER)
    before = full_state(experiment)
    Slow.passes = Slow.finished = 0  # Experiment has tried a copy of the model
    try:
        experiment.METHOD()
    except KeyboardInterrupt:
        steps = {int(state["step"]) for state in experiment.optimizer.state.values()}
        schedule = experiment.train.schedule
        print(json.dumps({
            "steps": experiment.train.steps,
            "optimizer": sorted(steps),
            "schedule": schedule and schedule.last_epoch,
            "finished": Slow.finished,
            "same": full_state(experiment) == before,
            "records": len(experiment.history),
            "stopped": experiment.stopped,
        }), flush=True)
        raise

if __name__ == "__main__":
    main()
"""


def interrupted(
    **values,  # values for the placeholders METHOD, WORKERS, STOP and FOLDER
) -> tuple[dict, int, str]:  # printed values, exit status, stderr
    "Run CHILD, and send Ctrl-C to all its processes during step STOP, like a terminal."
    code = CHILD
    for name, value in values.items():
        code = code.replace(name.upper(), str(value))
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        line = ""
        while line != "in a step\n":
            ready = select.select([child.stdout], [], [], 60)[0]
            assert ready, "the step was not reached in 60 seconds"
            line = child.stdout.readline()
            assert line, child.stderr.read()
        os.killpg(child.pid, signal.SIGINT)
        out, errors = child.communicate("\n", timeout=60)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return json.loads(out.strip().splitlines()[-1]), child.returncode, errors


def run_files(folder: Path) -> list[str]:
    "List the files of a run, without checkpoints and the lock."
    return [
        name for name in files(folder) if not name.startswith((".lock", "checkpoints"))
    ]


posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")


@posix
@pytest.mark.slow  # test_faults.py has a faster test
@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_stops_a_run_between_two_batches(workers, tmp_path):
    folder = tmp_path / "run"
    printed, code, errors = interrupted(
        method="run", workers=workers, stop=8, folder=repr(str(folder))
    )
    assert code in (-signal.SIGINT, 130)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert errors.count("Traceback") == 1  # the workers print nothing
    assert printed["steps"] == printed["finished"] == printed["schedule"] == 8
    assert printed["optimizer"] == [8]
    assert printed["records"] == 2
    assert "KeyboardInterrupt" in printed["stopped"]
    assert run_files(folder) == ["config.json", "history.jsonl"]
    assert Checkpoints(folder / "checkpoints").latest()["steps"] == 8
    assert [
        record["epoch"] for record in History.from_jsonl(folder / "history.jsonl")
    ] == [1, 2]
    assert json.loads((folder / "config.json").read_text())["run"]["epochs"] == 1000


@pytest.mark.slow
@posix
def test_ctrl_c_in_the_range_test_has_no_side_effects(tmp_path):
    folder = repr(str(tmp_path / "run"))
    printed, code, errors = interrupted(
        method="find_lr", workers=2, stop=8, folder=folder
    )
    assert code in (-signal.SIGINT, 130)
    assert errors.count("Traceback") == 1
    assert printed["same"]
    assert printed["steps"] == 0
    assert files(tmp_path) == []


# ---------------------------------------------------------------- the end of a run


def test_a_second_run_is_an_error(tmp_path):
    experiment = Experiment(small_model(), small_data(), recipe(), tmp_path / "run")
    experiment.run(epochs=1)
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in files(tmp_path)}
    weights = digest(experiment.model.state_dict().values())
    with pytest.raises(RuntimeError, match="has run already"):
        experiment.run(epochs=1)
    assert digest(experiment.model.state_dict().values()) == weights
    assert len(experiment.history) == 1
    assert {
        name: (tmp_path / name).stat().st_mtime_ns for name in files(tmp_path)
    } == before
    with pytest.raises(FileExistsError, match="choose a different folder"):
        Experiment(small_model(), small_data(), recipe(), tmp_path / "run").run()


@pytest.mark.parametrize("epochs", [1, 3, 5])
def test_the_length_of_a_run_can_be_changed(epochs):
    experiment = Experiment(small_model(), small_data(), recipe(), None)
    history = experiment.run(epochs=epochs)
    assert [record["epoch"] for record in history] == list(range(1, epochs + 1))
    assert experiment.train.steps == 3 * epochs
    assert str(epochs) in experiment.stopped


@pytest.mark.parametrize("epochs", [1, 3, 24])
def test_the_learning_rate_rises_and_falls_linearly(epochs):
    experiment = Experiment(
        nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), small_data(), recipe()
    )
    rates = []
    experiment.optimizer.register_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
    )
    experiment.run(epochs=epochs)
    steps = 3 * epochs
    assert len(rates) == steps
    assert rates[-1] == pytest.approx(1e-6)
    peak = max(5 / 24 * steps, 2) - 1  # at the second step or later
    expected = np.interp(range(steps), [0, peak, steps - 1], [1e-4, 1e-2, 1e-6])
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


@pytest.mark.parametrize("validation", [0.0, 0.25])
def test_early_stopping_uses_the_validation_images_if_there_are_any(
    validation, monkeypatch
):
    part = "validation" if validation else "test"
    accuracies = {part: iter([95.0, 89.9, 90.0, 99.0, 90.0, 99.0])}

    def fake_test(self, after_batch):
        return 1.0, next(accuracies.get(self.part, iter([100.0])))

    monkeypatch.setattr(Test, "__call__", fake_test)
    experiment = Experiment(small_model(), small_data(validation=validation), recipe())
    history = experiment.run(epochs=6, target=90)
    assert [record[f"{part}_accuracy"] for record in history] == [
        95.0,
        89.9,
        90.0,
        99.0,
        90.0,
    ]
    assert part in experiment.stopped
    assert "90" in experiment.stopped
    assert "3" in experiment.stopped


def test_a_target_may_be_reached_in_the_first_epoch_or_never(monkeypatch):
    for target, epochs in ((1, 1), (100, 2)):
        monkeypatch.setattr(Test, "__call__", lambda *args: (1.0, 50.0))
        experiment = Experiment(small_model(), small_data(), recipe(target_patience=1))
        assert len(experiment.run(target=target)) == epochs


def test_validation_images_are_not_trained_on():
    dataset = Digits(validation=0.2)
    experiment = Experiment(small_model(), dataset, recipe())
    history = experiment.run(epochs=1)
    train, validation = (
        set(dataset.train_indices.tolist()),
        set(dataset.validation_indices.tolist()),
    )
    assert not train & validation
    assert len(train | validation) == 1437
    assert len(validation) == round(0.2 * 1437)
    shares = np.bincount(dataset.y_train[dataset.validation_indices]) / np.bincount(
        dataset.y_train
    )
    assert np.abs(shares - 0.2).max() < 0.01
    assert 0 < history[0]["validation_accuracy"] <= 100
    used = torch.cat([torch.as_tensor(i) for _, i in dataset.train_loader.sampler])
    assert set(used.tolist()) == train


@pytest.mark.parametrize("wait", [True, False])  # False: as on a GPU
def test_a_non_finite_loss_stops_the_run_and_keeps_the_history(wait, tmp_path):
    # finite in the first epoch of three batches
    model = nn.Sequential(*small_model(), Exploding(4))
    experiment = Experiment(model, small_data(), recipe(), tmp_path / "run")
    guard = FiniteGuard(experiment.optimizer, torch.device("cpu"), wait)
    experiment.train.guard = guard
    with pytest.raises(FloatingPointError, match="in epoch 2, batch 2 of 3"):
        experiment.run(epochs=5)
    assert "FloatingPointError" in experiment.stopped
    assert len(History.from_jsonl(tmp_path / "run" / "history.jsonl")) == 1
    assert run_files(tmp_path / "run") == ["config.json", "history.jsonl"]


# ---------------------------------------------------------------- optimizers, schedules and models


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}),
        ("SGD", {}),
        ("AdamW", {"weight_decay": 0.05}),
        ("RMSprop", {"alpha": 0.9}),
        ("NAdam", {}),
    ],
)
def test_optimizers_of_torch_work(optimizer, options):
    range_test = {"lr_find_end": 0.3, "lr_find_steps": 150}
    config = recipe(optimizer=optimizer, optimizer_options=options, **range_test)
    experiment = Experiment(small_model(), small_data(), config)
    assert type(experiment.optimizer) is getattr(torch.optim, optimizer)
    assert experiment.optimizer.defaults | options == experiment.optimizer.defaults
    assert np.isfinite(experiment.run()[-1]["train_loss"])
    assert Experiment(small_model(), small_data(), config).find_lr().lr > 0


@pytest.mark.parametrize(
    ("schedule", "options", "last"),
    [
        ("CosineAnnealingLR", {}, 0.01 * (1 + np.cos(np.pi * 5 / 6)) / 2),
        ("LinearLR", {"start_factor": 1.0, "end_factor": 0.0}, 0.01 / 6),
        ("ConstantLR", {"factor": 1.0}, 0.01),
        ("StepLR", {"step_size": 3}, 0.001),
        ("ExponentialLR", {"gamma": 0.5}, 0.01 * 0.5**5),
        ("MultiStepLR", {"milestones": [2, 4]}, 0.0001),
        ("OneCycleLR", {"pct_start": 0.5, "anneal_strategy": "cos"}, 1e-6),
    ],
)
def test_schedules_of_torch_work(schedule, options, last):
    config = recipe(schedule=schedule, schedule_options=options)
    experiment = Experiment(small_model(), small_data(), config)
    experiment.run()
    assert experiment.optimizer.param_groups[0]["lr"] == pytest.approx(last)


class Tiny(nn.Module):
    "A model written by a user."

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 32 * 32, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.flatten(1))


@pytest.mark.parametrize(
    "make_model",
    [small_model, Tiny, lambda: Model(2)],
    ids=["layers", "class", "model"],
)
def test_any_model_works(make_model, tmp_path):
    experiment = Experiment(make_model(), small_data(), recipe(), tmp_path / "run")
    experiment.run()
    assert experiment.show_misclassified().axes
    assert len(experiment.train.plot().axes) == len(experiment.test.plot().axes) == 2
    other = make_model()
    load_weights(other, tmp_path / "run" / "weights.safetensors")
    assert digest(other.state_dict().values()) == digest(
        experiment.model.state_dict().values()
    )


@pytest.mark.parametrize("make_model", [lambda: Model(4, dropout=0.0), lambda: nn.Sequential(*small_model()[:4], nn.Linear(256, 10))], ids=["model", "layers"])  # fmt: skip
def test_a_run_equals_a_plain_training_loop(make_model):
    options = {"limit": 190, "batch_size": 32, "validation": 0.1}
    set_seed(1)
    model = make_model()
    plain = copy.deepcopy(model).to(memory_format=torch.channels_last)
    history = Experiment(
        model, Digits(**options), recipe(max_lr=0.02, epochs=3, precision="fp32")
    ).run()

    dataset = Digits(**options)
    train, test = dataset.train_loader, list(dataset.test_loader)
    optimizer = torch.optim.Adam(plain.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.02, total_steps=18, pct_start=5 / 24, anneal_strategy="linear",
        div_factor=100, final_div_factor=100,
    )  # fmt: skip
    for record in history:
        assert record["lr"] == pytest.approx(schedule.get_last_lr()[0])
        plain.train()
        loss_sum, right, count = 0.0, 0, 0
        for x, y in train:
            logits = plain(x)
            loss = nn.functional.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if schedule.last_epoch < 17:
                schedule.step()
            loss_sum += loss.item() * len(y)
            right += (logits.argmax(1) == y).sum().item()
            count += len(y)
        assert count == 171
        assert record["train_loss"] == pytest.approx(loss_sum / count, rel=1e-4)
        assert record["train_accuracy"] == pytest.approx(100 * right / count, abs=0.6)
        plain.eval()
        with torch.no_grad():
            logits = torch.cat([plain(x) for x, _ in test])
        labels = torch.cat([y for _, y in test])
        loss = nn.functional.cross_entropy(logits, labels).item()
        assert record["test_loss"] == pytest.approx(loss, rel=1e-3)
        accuracy = 100 * (logits.argmax(1) == labels).float().mean().item()
        assert record["test_accuracy"] == pytest.approx(accuracy, abs=0.3)


# ---------------------------------------------------------------- history and run folder


def test_the_history_contains_loss_and_accuracy_of_each_part(tmp_path):
    folder = tmp_path / "run"
    experiment = Experiment(
        small_model(), small_data(validation=0.25), recipe(), folder
    )
    started = time.perf_counter()
    history = experiment.run()
    elapsed = time.perf_counter() - started
    parts = {"train": 45, "test": 360, "validation": 15}
    expected = {f"{part}_{what}" for part in parts for what in ("loss", "accuracy")}
    for record in history:
        assert set(record) == expected | {"epoch", "lr", "seconds"}
        for part, images in parts.items():
            right = record[f"{part}_accuracy"] * images / 100
            assert right == pytest.approx(round(right), abs=1e-6)
            assert 0 <= right <= images
    assert 0 < sum(record["seconds"] for record in history) < elapsed
    wrong = len(experiment.misclassified)
    assert history[-1]["test_accuracy"] == pytest.approx(100 * (360 - wrong) / 360)

    assert History.from_jsonl(folder / "history.jsonl") == history
    assert run_files(folder) == [
        "config.json", "history.jsonl", "misclassified.png", "test.png", "train.png",
        "weights.safetensors",
    ]  # fmt: skip
    written = json.loads((folder / "config.json").read_text())
    assert written["recipe"]["recipe"] == "era with max_lr=0.01, lr_find_steps=60"
    assert written["recipe"]["optimizer"] == "Adam"
    assert written["dataset"]["fingerprints"] == experiment.dataset.fingerprints


def test_the_history_has_no_validation_without_validation_images():
    history = Experiment(small_model(), small_data(), recipe()).run(epochs=1)
    parts = {
        f"{part}_{what}" for part in ("train", "test") for what in ("loss", "accuracy")
    }
    assert set(history[0]) == parts | {"epoch", "lr", "seconds"}


def test_a_run_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    set_seed(0)
    Experiment(small_model(), small_data(), recipe(max_lr=None, lr_find_steps=60)).run(
        epochs=1
    )
    assert files(tmp_path) == []


def test_the_default_recipe_is_era():
    config = Config()
    assert (config.epochs, config.optimizer, config.schedule) == (
        24,
        "Adam",
        "OneCycleLR",
    )
    assert dict(config.optimizer_options) == {"weight_decay": 1e-2}
    assert (config.lr_find_end, config.lr_find_steps, config.target_patience) == (
        0.1,
        100,
        3,
    )
    assert config.max_lr is None
    assert Digits().batch_size == 512


# ---------------------------------------------------------------- precision, layout, compilation


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_and_keeps_fp32_weights(precision, tmp_path):
    set_seed(0)
    model, data = Model(4, dropout=0.0), Digits(limit=300, batch_size=30)
    experiment = Experiment(
        model, data, recipe(precision=precision, epochs=3), tmp_path / "run"
    )
    history = experiment.run()
    assert history[-1]["train_loss"] < 0.7 * history[0]["train_loss"]
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert experiment.train.scaler.is_enabled() == (precision == "fp16")
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["numerics"] == {"precision": precision, "channels_last": True}


def test_an_fp16_step_that_overflows_is_skipped():
    set_seed(0)
    experiment = Experiment(small_model(), small_data(), recipe(precision="fp16"))
    train = experiment.train
    x, y = next(iter(experiment.dataset.train_loader))
    before = digest(experiment.model.parameters())
    scale = 2.0**40  # the gradients overflow
    train.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    train.step(x, y)
    assert digest(experiment.model.parameters()) == before
    assert train.scaler.get_scale() < 2.0**40
    with pytest.raises(FloatingPointError, match="loss is nan"):
        train.step(x * float("inf"), y)
    assert digest(experiment.model.parameters()) == before
    train.scaler.update(2.0**8)
    train.step(x, y)
    assert digest(experiment.model.parameters()) != before


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_memory_layout_can_be_chosen(channels_last):
    model = Model(4)
    Experiment(model, small_data(), recipe(channels_last=channels_last))
    weight = model.net[1].layer.layers[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last


@pytest.mark.slow
def test_a_compiled_model_has_the_same_results_and_parameter_names(
    monkeypatch, tmp_path
):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: real(model, backend="eager"))
    found = {}
    for compiled in (True, False):
        set_seed(0)
        model = Model(2, dropout=0.0)
        folder = tmp_path / str(compiled)
        history = Experiment(model, small_data(), recipe(compile=compiled), folder).run(
            epochs=2
        )
        load_weights(Model(2), folder / "weights.safetensors")
        found[compiled] = digest(model.state_dict().values()), history[-1]["test_loss"]
    assert found[True] == found[False]


def test_the_backend_is_in_the_config(tmp_path):
    for backend in ("batched", "albumentations"):
        Experiment(
            small_model(), small_data(backend=backend), recipe(), tmp_path / backend
        ).run(1)
        written = json.loads((tmp_path / backend / "config.json").read_text())
        assert written["dataset"]["backend"] == backend


def test_the_dataset_moves_to_the_device_of_the_model():
    data = small_data()
    data.device = torch.device("meta")  # as if used with a model on a different device
    Experiment(small_model(), data, recipe())
    assert data.device == torch.device("cpu")
    assert next(iter(data.train_loader))[0].device == torch.device("cpu")


class Flattening(nn.Module):
    "A model that uses view, which needs the channels first."

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.last = nn.Conv2d(3, 4, 3, stride=4), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolution(x).relu()
        return self.last(x.view(len(x), -1))


def test_a_model_that_uses_view_is_trained_with_channels_first():
    experiment = Experiment(Flattening(), small_data(), recipe())
    assert not experiment.numerics.channels_last
    assert len(experiment.run(epochs=1)) == 1
    with pytest.raises(ValueError, match="view"):
        Experiment(Flattening(), small_data(), recipe(channels_last=True))


def test_a_change_of_the_augmentation_takes_effect_at_once():
    data = small_data()
    augmented, _ = data.sample(int(data.train_indices[0]), 0)
    data.augmentation = []
    plain, _ = data.sample(int(data.train_indices[0]), 0)
    assert not torch.equal(plain, augmented)
    assert torch.equal(data.denormalize(plain), data.denormalize(plain).clamp(0, 1))


class Folding(nn.Module):
    "A model whose view works with channels last for a single image only."

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.last = nn.Conv2d(3, 4, 3, stride=4), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolution(x)
        n, channels, height, width = x.shape
        x = x.view(n * channels, 1, height, width)
        return self.last(x.reshape(n, -1))


class Deep(nn.Module):
    "A model with a parameter of five dimensions."

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.last = (
            nn.Conv3d(1, 2, (3, 8, 8), stride=8),
            nn.Linear(32, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.convolution(x[:, None]).flatten(1))


@pytest.mark.parametrize("make_model", [Folding, Deep])
def test_models_that_cannot_use_channels_last_are_trained_without_it(make_model):
    experiment = Experiment(make_model(), small_data(), recipe())
    assert len(experiment.run(epochs=1)) == 1


def test_backend_and_batch_size_are_checked_when_they_are_used():
    from era_s10.augment import import_albumentations

    data = small_data()
    next(iter(data.train_loader))
    data.requested_backend = "nonsense"
    with pytest.raises(ValueError, match="unknown backend 'nonsense'"):
        data.train_loader  # noqa: B018
    data.requested_backend = "auto"
    assert data.backend == "batched"
    data.augmentation = [import_albumentations().Rotate(10)]
    with pytest.warns(UserWarning, match="Rotate"):
        next(iter(data.train_loader))
    assert data.backend == "albumentations"
    data.augmentation = []
    assert len(data.train_loader) == 3
    assert data.backend == "batched"
    data.batch_size = 0
    with pytest.raises(ValueError, match="batch_size"):
        data.train_loader  # noqa: B018


class Counting(nn.Module):
    "A model that writes features into an fp32 buffer, which fails in bf16."

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(3072, 8), nn.Linear(8, 10)
        self.register_buffer("features", torch.zeros(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x.flatten(1))
        if self.training:
            torch.mm(x.detach().T, x.detach(), out=self.features)
        return self.last(x)


def test_a_model_that_cannot_use_bf16_is_trained_in_fp32(monkeypatch):
    model = Counting()
    before = digest(model.state_dict().values())
    with pytest.raises(
        ValueError, match="precision: the model can't learn with 'bf16'"
    ):
        Experiment(model, small_data(), recipe(precision="bf16"))
    assert digest(model.state_dict().values()) == before
    chosen = Numerics("bf16", True)  # the default of a GPU
    monkeypatch.setattr(
        "era_s10.preflight.choose_numerics", lambda config, device: chosen
    )
    experiment = Experiment(model, small_data(), recipe())
    assert experiment.numerics == Numerics("fp32", True)
    assert len(experiment.run(epochs=1)) == 1


def test_a_model_with_lazy_layers_is_trained():
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
    assert len(Experiment(model, small_data(), recipe()).run(epochs=1)) == 1


def test_examples_can_have_a_different_size_than_the_images():
    from era_s10.augment import import_albumentations

    data = small_data(augmentation=[import_albumentations().RandomCrop(24, 24)])
    axes = data.show_examples(2).axes
    assert [ax.images[0].get_array().shape[:2] for ax in axes] == [(32, 32)] * 2 + [
        (24, 24)
    ] * 2


# ---------------------------------------------------------------- interrupted and resumed

RECIPES = {
    "Nesterov, cosine": {
        "optimizer": "SGD",
        "optimizer_options": {"momentum": 0.9, "nesterov": True},
        "schedule": "CosineAnnealingLR",
    },
    "AdamW, steps": {
        "optimizer": "AdamW",
        "schedule": "StepLR",
        "schedule_options": {"step_size": 4},
    },
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "range test": {"max_lr": None, "lr_find_steps": 60, "lr_find_end": 1.0},
    "modern": {**vars(make_config("modern", ema_span=0.9)), "epochs": 3},
    "parts": {"parts": 4, "dropout": 0.1, "ema_span": 0.5},
}
needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no CUDA device"
)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("fp16", "range test", "modern", "parts")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in RECIPES
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(name, device, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(device == "cuda")
    try:
        check_resumed(RECIPES[name], device, tmp_path)
    finally:
        torch.use_deterministic_algorithms(False)


def check_resumed(options: dict, device: str, folder: Path) -> None:
    "Interrupt a run in its second epoch, resume it, and compare it with another run."

    def make(name: str) -> Experiment:
        set_seed(0)
        data = Digits(limit=150, batch_size=30, validation=0.2)
        config = recipe(**{"epochs": 3, **options, "device": device})
        return Experiment(Model(2), data, config, folder / name)

    complete, cut, again = make("complete"), make("cut"), make("again")
    complete.run()
    step = cut.train.step

    def interrupted(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if cut.train.steps == 5:
            signal.raise_signal(signal.SIGINT)
        return step(x, y)

    cut.train.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    shutil.copytree(folder / "cut", folder / "again")
    again.resume()
    cut.train.step = step
    cut.resume()  # the same object, as in a notebook
    weights = [run.model.state_dict().values() for run in (complete, again, cut)]
    assert len({digest(v.cpu() for v in values) for values in weights}) == 1
    states = [run.optimizer.state_dict() for run in (complete, again)]
    assert repr(states[0]) == repr(states[1])
    assert complete.train.scaler.state_dict() == again.train.scaler.state_dict()
    for a, b in zip(complete.history, again.history, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    assert complete.train.losses == again.train.losses
    assert complete.validation.accuracies == again.validation.accuracies


def test_resuming_a_run_that_reached_its_target_does_nothing(tmp_path):
    def make() -> Experiment:
        return Experiment(
            small_model(), small_data(), recipe(target_patience=1), tmp_path / "run"
        )

    first = make()
    first.run(epochs=3, target=1)
    assert len(first.history) == 1
    second = make()
    assert second.resume() == first.history
    assert second.stopped == first.stopped


def test_resuming_without_strict_still_needs_the_same_optimizer(tmp_path):
    Experiment(small_model(), small_data(), recipe(), tmp_path / "run").run(epochs=1)
    other = recipe(optimizer="SGD", optimizer_options={"momentum": 0.9})
    model = small_model()
    before = digest(model.state_dict().values())
    experiment = Experiment(model, small_data(), other, tmp_path / "run")
    with pytest.raises(ValueError, match=r"recipe\.optimizer was 'Adam' and is 'SGD'"):
        experiment.resume(strict=False)
    assert digest(model.state_dict().values()) == before


def test_numpy_numbers_are_saved_as_python_numbers(tmp_path):
    options = {"lr": 1e-3, "betas": (np.float64(0.9), np.float32(0.99))}

    def make() -> Experiment:
        config = recipe(
            max_lr=np.float64(0.01), optimizer_options={"weight_decay": np.float64(0.1)}
        )
        assert type(config.optimizer_options["weight_decay"]) is float
        return Experiment(small_model(), small_data(), config, tmp_path / "run")

    first = make()
    first.run(epochs=np.int64(2), target=np.float64(99.9))
    assert make().resume() == first.history
    assert (
        type(Config(optimizer_options=options).optimizer_options["betas"][1]) is float
    )


class Extra(nn.Sequential):
    "A model with a NumPy value in its state."

    def get_extra_state(self) -> np.float64:
        return np.float64(1)

    def set_extra_state(self, state: np.float64) -> None:
        pass


def test_a_state_that_cannot_be_loaded_is_an_error_before_training(tmp_path):
    experiment = Experiment(
        Extra(*small_model()), small_data(), recipe(), tmp_path / "run"
    )
    with pytest.raises(ValueError, match="objects other than tensors and plain values"):
        experiment.run(epochs=1)
    assert experiment.train.steps == 0


def test_weights_survive_a_figure_that_cannot_be_drawn(tmp_path, monkeypatch):
    def experiment() -> Experiment:
        set_seed(0)
        return Experiment(small_model(), small_data(), recipe(), tmp_path / "run")

    message = r"misclassified\.png: figure not written \(ZeroDivisionError"
    with monkeypatch.context() as patched, pytest.warns(UserWarning, match=message):
        patched.setattr(Experiment, "show_misclassified", lambda self: 1 / 0)
        experiment().run(epochs=1)
    weights = tmp_path / "run" / "weights.safetensors"
    before = weights.read_bytes()
    assert not (tmp_path / "run" / "misclassified.png").exists()
    experiment().resume()  # the run has ended; only the figures are missing
    assert (tmp_path / "run" / "misclassified.png").exists()
    assert weights.read_bytes() == before


# ---------------------------------------------------------------- EMA, augmentation and loss of a recipe


def updates(experiment: Experiment) -> int:
    "Return how often the average of the weights has been updated."
    return int(experiment.train.ema.state_dict()["n_averaged"])


def test_the_model_gets_the_averaged_weights_at_the_end(tmp_path):
    set_seed(0)
    config = recipe(epochs=2, ema_span=0.9)
    experiment = Experiment(small_model(), small_data(), config, tmp_path / "run")
    raw = []
    step = experiment.train.step

    def watched(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        output = step(x, y)
        raw[:] = [p.detach().clone() for p in experiment.model.parameters()]
        return output

    experiment.train.step = watched
    history = experiment.run()
    assert updates(experiment) == 2  # at steps 5 and 6 of 6
    assert digest(raw) != digest(p.detach() for p in experiment.model.parameters())
    accuracy = experiment.test()[1]
    assert accuracy == history[-1]["test_accuracy"]
    other = small_model()
    load_weights(other, tmp_path / "run" / "weights.safetensors")
    precision = experiment.numerics.precision
    assert Test(other, small_data(), precision=precision)()[1] == accuracy
    # the checkpoint was written before the model got the averaged weights
    state = experiment.checkpoints.latest()
    average = [v for k, v in state["ema"].items() if k.startswith("module.")]
    assert len(average) == len(state["model"])
    assert digest(state["model"].values()) != digest(average)
    longer = Experiment(small_model(), small_data(), config, tmp_path / "run")
    longer.load_state_dict(state)
    assert digest(longer.model.state_dict().values()) == digest(state["model"].values())
    assert len(longer.resume(epochs=3)) == 3
    assert updates(longer) == 3  # the new one is at step 9 of 9
    with torch.no_grad():
        for parameter in longer.model.parameters():
            parameter.zero_()
    # after the run, the model itself is tested
    assert longer.test()[1] != history[-1]["test_accuracy"]


def test_a_recipe_does_not_change_the_dataset():
    from era_s10.augment import import_albumentations

    A = import_albumentations()
    data = small_data(augmentation=[A.ToGray(p=0.2), A.HorizontalFlip(p=0.5)])
    config = recipe(drop_transforms=["ToGray"], alternate_flip=True)
    experiment = Experiment(small_model(), data, config)
    assert [type(t).__name__ for t in data.augmentation] == ["ToGray", "HorizontalFlip"]
    assert [type(t).__name__ for t in experiment.dataset.augmentation] == [
        "AlternatingFlip"
    ]
    assert experiment.dataset.x_train is data.x_train
    i = int(data.train_indices[0])
    first, second = (experiment.dataset.sample(i, epoch)[0] for epoch in (0, 1))
    assert torch.equal(first, second.flip(2))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_alternating_flip_is_the_same_in_both_backends(workers):
    from era_s10.augment import alternating_flip

    kinds = ("batched", "albumentations")
    data = [
        small_data(augmentation=[alternating_flip()], backend=kind, workers=workers)
        for kind in kinds
    ]
    for dataset in data:
        dataset.set_epoch(3)
    for (x, _), (other, _) in zip(
        *(dataset.train_loader for dataset in data), strict=True
    ):
        assert torch.allclose(x, other, atol=1e-5)


def test_a_recipe_that_does_not_fit_does_not_change_the_model():
    model = nn.Sequential(*small_model(), nn.Dropout(0.3))
    before = digest(model.state_dict().values())
    with pytest.raises(ValueError, match="logit_scale=None"):
        Experiment(model, small_data(), make_config("modern"))
    assert (digest(model.state_dict().values()), model[-1].p) == (before, 0.3)
    trained = Model(2)
    Experiment(trained, small_data(), recipe(epochs=1)).run()
    before = digest(trained.state_dict().values()), dict(trained.arguments)
    with pytest.raises(ValueError, match="has been trained"):
        Experiment(trained, small_data(), make_config("modern"))
    assert (digest(trained.state_dict().values()), trained.arguments) == before
    Experiment(trained, small_data(), make_config("modern", init=None))


def test_the_test_loss_has_no_label_smoothing():
    model = small_model()
    plain = Experiment(model, small_data(), recipe()).test()
    assert Experiment(model, small_data(), recipe(label_smoothing=0.3)).test() == plain
