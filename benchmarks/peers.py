"""The libraries that `era_s10_bench` compares its training loop with: fastai, Lightning, airbench.

`era_s10_bench` loads this file where it runs from a clone of the repository. Each entry of `LOOPS` takes
(model, optimizer, loader, device, precision), and returns a function that trains one epoch and returns seconds per
step. The precision is fp32 or bf16. Progress bars, loggers and warnings are off. Install the libraries with
`pip install -e '.[dev,bench]'`, in an environment of their own if their requirements conflict with others.
"""

import functools
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from era_s10.datasets.generic import MyDataSet
from era_s10.steps import autocast
from era_s10.timing import synchronize

Loop = Callable[[], float]


def check_device(model: nn.Module, device: torch.device) -> None:
    """Raise `RuntimeError` if a library has moved the model to a different device."""
    found = next(model.parameters()).device
    if found.type != device.type:
        raise RuntimeError(f"the model is on {found}, and should be on {device}")


def quiet(make: Callable[..., Loop]) -> Callable[..., Loop]:
    """Let a function import a library without the library's own warnings."""

    @functools.wraps(make)
    def without_warnings(*args: Any) -> Loop:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make(*args)

    return without_warnings


@quiet
def fastai_loop(
    model: nn.Module,
    optimizer: Optimizer,
    loader: DataLoader,
    device: torch.device,
    precision: str,
) -> Loop:
    """Return an epoch of fastai's Learner."""
    from fastai.callback.core import Callback
    from fastai.callback.progress import ProgressCallback
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper

    class Clock(Callback):
        def before_train(self) -> None:
            synchronize(device)
            self.start = time.perf_counter()

        def after_train(self) -> None:
            synchronize(device)
            check_device(model, device)
            self.seconds = time.perf_counter() - self.start

    class Autocast(Callback):
        """fastai's MixedPrecision in bf16, which is limited to CUDA, for any device."""

        order = 10

        def before_batch(self) -> None:
            self.context = autocast(device, precision)
            self.context.__enter__()

        def after_pred(self) -> None:
            self.learn.pred = self.pred.float()

        def after_loss(self) -> None:
            self.context.__exit__(None, None, None)

    clock = Clock()
    loaders = DataLoaders(loader, DataLoader([], batch_size=None))
    loaders._device = device  # fastai sets this for its own loaders only
    learner = Learner(
        loaders,
        model,
        nn.CrossEntropyLoss(),
        opt_func=lambda params, **_: OptimWrapper(opt=optimizer),
        cbs=[clock] if precision == "fp32" else [clock, Autocast()],
    )
    bars = [
        callback for callback in learner.cbs if isinstance(callback, ProgressCallback)
    ]

    def run() -> float:
        with learner.removed_cbs(bars), learner.no_logging(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            learner.fit(1, lr=1e-3)
        return clock.seconds / len(loader)

    return run


@quiet
def lightning_loop(
    model: nn.Module,
    optimizer: Optimizer,
    loader: DataLoader,
    device: torch.device,
    precision: str,
) -> Loop:
    """Return an epoch of Lightning's Trainer."""
    import lightning

    class Clock(lightning.Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            synchronize(device)
            self.start = time.perf_counter()

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            synchronize(device)
            check_device(model, device)
            self.seconds = time.perf_counter() - self.start

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, _index: int) -> Tensor:
            x, y = batch
            return nn.functional.cross_entropy(self.model(x), y)

        def configure_optimizers(self) -> Optimizer:
            return optimizer

    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    clock, module = Clock(), Module()
    devices = [device.index or 0] if device.type == "cuda" else 1

    def run() -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = lightning.Trainer(
                max_epochs=1,
                accelerator=device.type,
                devices=devices,
                precision={"fp32": "32-true", "bf16": "bf16-mixed"}[precision],
                logger=False,
                callbacks=[clock],
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(module, loader)
        return clock.seconds / len(loader)

    return run


def train_airbench(dataset: MyDataSet) -> dict[str, Any]:
    """Train airbench94 (K. Jordan, 2024) on the same images, after its own warmup; CUDA only."""
    import airbench
    from airbench.lib_airbench94 import hyp

    with tempfile.TemporaryDirectory() as place:
        folder, here = Path(place, "cifar10"), Path.cwd()
        folder.mkdir()
        parts = {
            "train": (dataset.x_train, dataset.y_train),
            "test": (dataset.x_test, dataset.y_test),
        }
        for part, (x, y) in parts.items():
            data = {"images": torch.from_numpy(x), "labels": torch.from_numpy(y)}
            torch.save(
                {**data, "classes": list(dataset.classes)}, folder / f"{part}.pt"
            )
        os.chdir(place)  # airbench reads from the current folder
        try:
            options = {
                "batch_size": hyp["opt"]["batch_size"],
                "aug": hyp["aug"],
                "altflip": True,
            }
            train = [
                airbench.CifarLoader("cifar10", train=True, **options) for _ in range(2)
            ]
            airbench.warmup94(train_loader=train[0], verbose=False)
            start = time.perf_counter()  # includes reading the test images
            model = airbench.train94(train_loader=train[1], verbose=False)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            test = airbench.CifarLoader("cifar10", train=False, batch_size=2000)
            accuracy = airbench.evaluate(model, test, tta_level=2)
        finally:
            os.chdir(here)
    name = "airbench94, TTA with 6 views"
    return {"name": name, "seconds": seconds, "accuracy": 100 * float(accuracy)}


LOOPS: dict[str, tuple[str, Callable[..., Loop]]] = {
    "fastai, Learner": ("fastai", fastai_loop),
    "Lightning, Trainer": ("lightning", lightning_loop),
}
