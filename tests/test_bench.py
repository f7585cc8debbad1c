"""Tests of the benchmarks: the command at its smallest size, with the libraries that are installed."""

import json
import os
import subprocess
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from project import command
from torch.overrides import TorchFunctionMode

from era_s10.bench import SIZES, bench_accuracy, bench_run, load_peers, run_benchmarks
from era_s10.process_timing import bench_processes
from era_s10.workloads import bench_step, photo_crops

PEERS = {"fastai, Learner": "fastai", "Lightning, Trainer": "lightning"}


def bench(*options: str, folder: Path) -> subprocess.CompletedProcess:
    "Run era_s10_bench in a folder."
    return subprocess.run(
        command("era_s10_bench", *options),
        cwd=folder,
        env={**os.environ, "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    "Run all benchmarks of size tiny; return the process and the folder that it wrote."
    folder = tmp_path_factory.mktemp("bench")
    return bench("--size", "tiny", "--device", "cpu", folder=folder), folder / "bench"


@pytest.mark.slow
def test_the_command_writes_a_figure_for_each_benchmark(finished):
    process, folder = finished
    assert process.returncode == 0, process.stderr
    assert "warning" not in process.stderr
    assert process.stdout.rstrip().endswith("written to bench")
    drawn = {path.stem for path in folder.glob("*.png")}
    assert drawn == {
        "input", "step-full-model", "step-width-8", "step-one-layer", "hardware", "malloc-memory",
        "processes", "scaling"
    }  # fmt: skip
    assert all(
        path.read_bytes().startswith(b"\x89PNG") for path in folder.glob("*.png")
    )


@pytest.mark.slow
def test_the_report_contains_all_benchmarks(finished):
    report = json.loads((finished[1] / "bench.json").read_text())
    assert list(report["benchmarks"]) == list(report["seconds"]) == list(SIZES["tiny"])
    assert report["machine"]["versions"]["torch"][0].isdigit()
    for name, rows in report["benchmarks"].items():
        assert rows, name
        for row in rows:
            numbers = {
                k: v for k, v in row.items() if isinstance(v, float) and "over" not in k
            }
            assert all(value > 0 for value in numbers.values()), row
            if "median" in row:
                assert row["low"] <= row["median"] <= row["high"]


@pytest.mark.slow
def test_other_libraries_are_measured_or_reported_as_left_out(finished):
    process, folder = finished
    report = json.loads((folder / "bench.json").read_text())
    for name in ("step, full model", "step, width 8"):
        found = {row["name"] for row in report["benchmarks"][name]}
        assert {"bare loop", "era_s10, Train"} <= found
        for peer, package in PEERS.items():
            assert (peer in found) == (find_spec(package) is not None)
    for package in (*PEERS.values(), "airbench"):
        # airbench needs CUDA
        absent = find_spec(package) is None or package == "airbench"
        assert (package in report["left out"]) == absent
        assert (f"left out: {package}" in process.stdout) == absent


def test_the_number_of_torch_calls_does_not_depend_on_the_number_of_images():
    samples, calls = photo_crops(400).train_loader.dataset, []

    class Counted(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            calls[-1] += 1
            return function(*args, **(kwargs or {}))

    for images in (10, 400):
        calls.append(0)
        with Counted():
            x, _ = samples[0, torch.arange(images)]
        assert len(x) == images
    assert calls[0] == calls[1] > 0


@pytest.mark.slow
def test_wrong_options_give_a_one_line_error(tmp_path):
    for options in (("--size", "huge"), ("--only", "speed"), ("--device", "abacus")):
        process = bench(*options, folder=tmp_path)
        assert process.returncode == 2
        assert process.stderr.count("\n") == 1
        assert options[1] in process.stderr
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    process = bench("--folder", "file/in", folder=tmp_path)
    assert process.returncode == 2 and "is a file" in process.stderr


def test_a_library_that_fails_is_left_out_with_a_warning():
    def broken(*_args):
        raise LookupError("no such wheel")

    def working(*_args):
        return lambda: 1.0  # seconds per step

    loops = {
        "fastai, Learner": ("torch", broken),  # a package that is installed
        "Lightning, Trainer": ("torch", working),
        "another library": ("a_package_that_is_not_installed", broken),
    }
    with pytest.warns(UserWarning, match="fastai.*no such wheel") as warned:
        rows = bench_step(width=0, batch_size=2, steps=1, rounds=1, loops=loops)
    names = [row["name"] for row in rows]
    assert names == ["bare loop", "era_s10, Train", "Lightning, Trainer"]
    assert not [w for w in warned if "another library" in str(w.message)]


def test_adapters_of_other_libraries_exist_only_in_a_clone(tmp_path):
    peers = load_peers()
    assert {name: package for name, (package, _) in peers.LOOPS.items()} == PEERS
    assert callable(peers.train_airbench)
    assert load_peers(tmp_path / "peers.py") is None


def test_a_single_benchmark_can_be_selected():
    report = run_benchmarks("tiny", ["scaling"], "cpu")
    assert list(report["benchmarks"]) == ["scaling"]


def test_runs_are_timed_on_the_data_and_on_a_fixed_batch():
    rows = bench_run(
        photo_crops(60, batch_size=30), epochs=1, width=2, device="cpu", rounds=2
    )
    assert [row["name"] for row in rows] == ["one fixed batch", "the data"]
    assert all(row["seconds"] > 0 for row in rows)


def test_the_time_to_reach_an_accuracy_is_measured():
    data = photo_crops(60, batch_size=30)
    rows = bench_accuracy(data, targets=(0.0, 101.0), epochs=2, width=2, device="cpu")
    assert [row["name"] for row in rows] == [
        "era_s10, first at 0%",
        "era_s10, 2 epochs",
    ]
    assert 0 < rows[0]["seconds"] < rows[1]["seconds"]


@pytest.mark.parametrize("count", [2, 3, 8, 9, 10, 25])
def test_a_few_crops_have_images_of_every_class(count):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = photo_crops(count)
    assert len(data.classes) == min(10, count)
    assert data.y_train.tolist() == [i % len(data.classes) for i in range(count)]
    assert len(data.y_test) == max(1, count // 5)


@pytest.mark.slow
def test_processes_are_measured_and_their_failure_is_an_error():
    small = {"width": 2, "batch_size": 16, "sizes": (10, 100), "rounds": 2}
    found = bench_processes((2,), **small)
    assert [row["processes"] for row in found] == [2] * 8
    names = [row["name"].removesuffix(", 2 processes") for row in found]
    assert names[:4] == ["one process", "parts", "synchronized", "DDP"]
    assert names[4:6] == ["one process, 4 images", "one process, 8 images"]
    assert names[6:] == ["exchange of 10 numbers", "exchange of 100 numbers"]
    assert all(row["seconds"] > 0 for row in found)
    with pytest.raises(RuntimeError, match="the measured processes failed"):
        bench_processes((2,), **{**small, "width": -1})
