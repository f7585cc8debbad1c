"""Configuration of all tests."""

import os
import signal
import subprocess
import sys
from pathlib import Path

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # `pytest -n`: several processes share the cores
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from filelock import FileLock
from project import ROOT, clean_copy

# a shell that starts the tests in the background makes them ignore SIGINT
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before -m is applied
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    "Mark the tests that need ERA_S10_DATA, so that `-m data` selects them."
    for item in items:
        reasons = [
            mark.kwargs.get("reason", "") for mark in item.iter_markers("skipif")
        ]
        if any(reason.startswith("ERA_S10_DATA") for reason in reasons):
            item.add_marker("data")


@pytest.fixture(scope="session", autouse=True)
def _image_cache(tmp_path_factory) -> None:
    "Keep resized images out of the user's cache folder."
    os.environ["ERA_S10_CACHE"] = str(tmp_path_factory.mktemp("image-cache"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    "Seed torch, so that the weights of a test do not depend on the tests before it."
    torch.manual_seed(0)


@pytest.fixture
def any_images(monkeypatch) -> None:
    "Let named datasets load other images; test_faults.py tests the checksums."
    from era_s10.datasets.cifar10 import CIFAR10
    from era_s10.datasets.mnist import MNIST
    from era_s10.datasets.more import FashionMNIST

    for kind in (CIFAR10, MNIST, FashionMNIST):
        monkeypatch.setattr(kind, "checksums", None)


def build_site(
    copy: Path,  # destination of a copy of the repository, which must not exist
) -> None:
    "Copy the repository and build its website."
    clean_copy(copy)
    command = [sys.executable, "scripts/docs.py", "site"]
    environment = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    done = subprocess.run(
        command, cwd=copy, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    "The folder of the website: the one that ERA_S10_SITE names, or a new build."
    if os.environ.get("ERA_S10_SITE"):
        return (ROOT / os.environ["ERA_S10_SITE"]).resolve()
    parent = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        parent = parent.parent  # of all workers; the first one builds
    copy = parent / "site" / "era_s10"
    with FileLock(parent / "site.lock"):
        if not copy.exists():
            build_site(copy)
    return copy / "_docs"
