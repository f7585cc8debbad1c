"""Tests of the benchmarks: the command at its smallest size, with the libraries that are installed."""

import ast
import contextlib
import json
import os
import re
import shutil
import subprocess
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from matplotlib import pyplot
from project import ROOT, cells, command
from torch.overrides import TorchFunctionMode

from era_s10 import bench as bench_module
from era_s10 import growth
from era_s10.bench import SIZES, bench_accuracy, bench_run, load_peers, run_benchmarks
from era_s10.bench_report import BenchReport, study_accuracy, study_difference
from era_s10.growth import bench_scaling, fit_exponent, plot_scaling
from era_s10.memory_timing import bench_malloc_memory
from era_s10.process_timing import bench_processes
from era_s10.roofline import CountBytes, bench_roofline
from era_s10.workloads import bench_precision, bench_step, bench_threads, photo_crops

MEASURED = [name for name in SIZES["tiny"] if name != "accuracy"]  # needs a study
OURS, KEPT = "era_s10, Train", ("returned", "kept")
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
    for number, name in enumerate(MEASURED, 1):
        label = f"[{number}/{len(MEASURED)}] {name}"
        begins, ends = (process.stdout.index(label + end) for end in (" ...", ": "))
        assert begins < ends
    drawn = {path.stem for path in folder.glob("*.png")}
    assert drawn == {
        "input", "roofline", "step-full-model", "step-width-8", "step-one-layer", "precision", "threads",
        "hardware", "malloc-memory", "processes", "scaling"
    }  # fmt: skip
    assert all(
        path.read_bytes().startswith(b"\x89PNG") for path in folder.glob("*.png")
    )


@pytest.mark.slow
def test_the_report_contains_all_benchmarks(finished):
    report = json.loads((finished[1] / "bench.json").read_text())
    assert list(report["benchmarks"]) == list(report["seconds"]) == MEASURED
    assert report["machine"]["versions"]["torch"][0].isdigit()
    for name, rows in report["benchmarks"].items():
        assert rows, name
        for row in rows:
            numbers = {
                k: v
                for k, v in row.items()
                if isinstance(v, float) and "over" not in k and "share" not in k
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
        assert (package in report["left_out"]) == absent
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


@pytest.fixture
def quick(monkeypatch) -> list[str]:
    "Replace the benchmarks by functions that take no time; return the names as they are measured."
    measured = []

    def measure(name, *_rest):
        if name == "hardware":
            raise KeyboardInterrupt
        measured.append(name)
        return [{"name": name, "seconds": 1.0}]

    monkeypatch.setattr(bench_module, "_measure", measure)
    return measured


def test_a_run_resumes_after_the_last_finished_benchmark(tmp_path, quick, capsys):
    with pytest.raises(KeyboardInterrupt):
        run_benchmarks("tiny", None, "cpu", tmp_path)
    before = quick[:]
    assert before == MEASURED[: MEASURED.index("hardware")]
    stored = BenchReport.from_json(tmp_path / "bench.json")
    assert list(stored.benchmarks) == list(stored.seconds) == before
    assert {"threads", "features", "precision", "versions"} <= stored.machine.keys()
    capsys.readouterr()
    rest = [name for name in MEASURED if name != "hardware"]
    report = run_benchmarks("tiny", rest, "cpu", tmp_path)
    assert quick == list(report.benchmarks) == rest  # each once
    printed = capsys.readouterr().out
    assert all(f"{name}: already measured" in printed for name in before)
    assert f"[{len(rest)}/{len(rest)}] scaling ..." in printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"machine": {"cpu": "Abacus"}}, "cpu Abacus, now "),
        ({"machine": {"threads": 99}}, "threads 99, now "),
        ({"machine": {"features": ["beads"]}}, "features (without|with) "),
        ({"machine": {"versions": {"python": "1.0"}}}, "python 1.0, now "),
        ({"size": "full"}, "size full, now tiny"),
        ({"sources": "0"}, "sources 0, now "),
    ],
)
def test_a_folder_of_a_different_machine_is_refused(tmp_path, quick, change, message):
    run_benchmarks("tiny", ["input"], "cpu", tmp_path)
    path = tmp_path / "bench.json"
    report = json.loads(path.read_text("utf-8"))
    machine = report["machine"] | change.pop("machine", {})
    path.write_text(json.dumps(report | change | {"machine": machine}), "utf-8")
    content = path.read_bytes()
    with pytest.raises(ValueError, match=f"^folder: .*{message}") as raised:
        run_benchmarks("tiny", ["roofline"], "cpu", tmp_path)
    assert "\n" not in str(raised.value)
    assert quick == ["input"] and path.read_bytes() == content


def test_a_damaged_report_is_refused(tmp_path, quick):
    (tmp_path / "bench.json").write_text('{"size": "tiny", "mach', "utf-8")
    with pytest.raises(ValueError, match=r"bench\.json"):
        run_benchmarks("tiny", ["input"], "cpu", tmp_path)
    assert not quick


def write_study(folder: Path, machine: dict) -> Path:
    "Write two runs of two epochs; return the folder."
    folder.mkdir()
    history = [
        {"seconds": 10.0, "test_accuracy": 90.0},
        {"seconds": 20.0, "test_accuracy": 92.0},
    ]
    run = {"recipe": "era", "width": 8, "epochs": 2, "test_accuracy": 92.0}
    run |= {"machine": machine}
    run |= {"threads": machine.get("threads", 2)}
    run |= {"numerics": {"precision": machine.get("precision", "fp32")}}
    lines = [json.dumps(run | {"history": history}) + "\n"] * 2
    (folder / "runs.jsonl").write_text("".join(lines), "utf-8")
    return folder


def test_time_to_accuracy_comes_from_a_study_on_the_same_machine(tmp_path):
    machine = run_benchmarks("tiny", [], "cpu").machine
    study = write_study(tmp_path / "same", machine)
    report = run_benchmarks("tiny", ["accuracy"], "cpu", studies=[study])
    rows = report.benchmarks["accuracy"]
    assert rows == study_accuracy(study)
    assert [(row["name"], row["seconds"], row["runs"]) for row in rows] == [
        ("era, width 8, 2 epochs, first at 91.3%", 30.0, 2),
        ("era, width 8, 2 epochs", 30.0, 2),
    ]
    assert "accuracy" not in report.left_out
    other = write_study(tmp_path / "other", machine | {"cores": 999})
    assert study_difference(other, machine).startswith("cores 999, here ")
    for name, value in (("threads", 99), ("precision", "fp16")):
        assert study_difference(study, machine | {name: value}).endswith(
            f"here {value}"
        )
    report = run_benchmarks("tiny", ["accuracy"], "cpu", studies=[other])
    assert "different machine (cores 999" in report.left_out["accuracy"]
    assert "accuracy" not in report.benchmarks
    with pytest.raises(ValueError, match="study: no finished runs"):
        run_benchmarks("tiny", ["accuracy"], "cpu", studies=[tmp_path / "none"])


def test_bytes_are_counted_from_the_tensors_of_each_operation():
    x, at, values = torch.zeros(100), torch.arange(10), torch.ones(10)
    for work, expected in (
        (lambda: x.mul_(2), 800),  # reads and writes 100 numbers
        (lambda: x + x, 1200),
        (lambda: x.view(10, 10).t(), 0),  # views
        (lambda: x.index_select(0, at), 40 + 80 + 40),
        (lambda: x[:1].expand(50) + x[:50], 4 + 200 + 200),
        (lambda: x.scatter_(0, at, values), 80 + 40 + 40),
        (lambda: x.to(torch.bfloat16), 600),
    ):
        with CountBytes() as counter:
            work()
        assert counter.total == expected


def test_the_bytes_of_an_image_do_not_depend_on_the_size_of_the_dataset():
    found = []
    for n in (64, 640):
        samples = photo_crops(n).train_loader.dataset
        with CountBytes() as counter:
            samples[0, torch.arange(64)]
        found.append(counter.total)
    assert found[0] == found[1]


def test_the_roofline_reports_rates_and_their_ratios():
    copy, ours = bench_roofline(images=100, megabytes=4, rounds=2)
    assert copy["median"] == 1 and copy["GB/s"] > 0
    assert ours["low"] <= ours["median"] <= ours["high"]
    assert ours["low over plain"] <= ours["median over plain"]
    assert ours["bytes per image"] > ours["least bytes per image"] == 4 * 4 * 32 * 32
    moved = 1e-9 * ours["images/s"] * ours["bytes per image"]
    assert ours["GB/s"] == pytest.approx(moved)


def test_precisions_and_threads_are_compared(monkeypatch):
    monkeypatch.setattr("era_s10.workloads.bf16_instructions", lambda: "AMX")
    rows = bench_precision(width=2, batch_size=4, rounds=2)
    names = [f"{n}, {p}" for p in ("fp32", "bf16") for n in ("bare loop", OURS)]
    assert [row["name"] for row in rows] == names
    assert rows[1]["median"] == 1
    monkeypatch.setattr("era_s10.workloads.bf16_instructions", lambda: None)
    rows = bench_precision(width=2, batch_size=4, rounds=3, software_rounds=1)
    assert [row["name"] for row in rows] == [f"{OURS}, fp32", f"{OURS}, bf16"]
    found = {(row["rounds"], row["bf16 units"]) for row in rows}
    assert found == {(1, "none: in software")}
    before = torch.get_num_threads()
    rows = bench_threads(width=2, batch_size=4, rounds=2, threads=2)
    assert [row["threads"] for row in rows] == [1, 2] and rows[0]["median"] == 1
    assert torch.get_num_threads() == before
    assert len(bench_threads(width=2, batch_size=4, rounds=1, threads=1)) == 1


def test_loops_of_other_libraries_get_the_precision_and_their_warnings_are_not_shown():
    got = []

    def make(model, optimizer, loader, device, precision):
        warnings.warn("an import is deprecated", DeprecationWarning, stacklevel=1)
        got.append(precision)

        def run():
            warnings.warn("a call is deprecated", FutureWarning, stacklevel=1)
            return 1.0

        return run

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        bench_step(
            width=0,
            batch_size=2,
            steps=1,
            rounds=1,
            loops={"peer": ("torch", make)},
            precision="bf16",
        )
    assert got == ["bf16"] and not shown


@pytest.mark.slow
def test_kept_memory_is_compared_with_its_share_of_system_time():
    rows = bench_malloc_memory(width=2, batch_size=4, steps=1, rounds=2)
    works = [f"{w}, {k}" for w in ("step", "test", "input") for k in KEPT]
    assert [row["name"] for row in rows] in (works, [])  # none without glibc
    assert all(0 <= row["system share"] <= 1 for row in rows)


PAGE = ROOT / "nbs" / "52_benchmarks.ipynb"


def page_texts(folder: Path) -> str:
    "Run the cells of the page that show the CPU's report in a folder; return their texts."
    shown, names = [], {"display": lambda value: shown.append(value)}
    with contextlib.chdir(folder):
        for cell in cells(PAGE):
            code = cell["source"]
            if "{#accuracy}" in code:
                break
            if cell["cell_type"] != "code" or code.startswith("#| hide"):
                continue
            *body, last = ast.parse(code).body or [ast.Pass()]
            exec(compile(ast.Module(body, []), PAGE.name, "exec"), names)
            if isinstance(last, ast.Expr):
                shown.append(eval(ast.unparse(last), names))
            else:
                exec(ast.unparse(last), names)
    pyplot.close("all")
    return "\n".join(str(getattr(value, "data", value)) for value in shown)


@pytest.fixture
def stored(tmp_path) -> Path:
    "Copy the published report; return its path."
    folder = tmp_path / "results" / "bench"
    shutil.copytree(ROOT / "nbs" / "results" / "bench", folder)
    return folder / "bench.json"


MISSING = "The stored report has no rows for this"


def test_the_page_shows_the_published_report(stored):
    report = BenchReport.from_json(stored)
    texts = page_texts(stored.parents[2])
    ours = next(row for row in report.benchmarks["input"] if "batched" in row["name"])
    assert f"{1 / ours['median']:.1f} (" in texts
    assert MISSING not in texts
    assert report.benchmarks.keys() >= SIZES["default"].keys() - {"accuracy"}


def test_the_page_shows_a_complete_report_and_follows_its_figures(stored):
    report = BenchReport.from_json(stored)
    rows, only = report.benchmarks, ["roofline", "threads", "precision", "scaling"]
    rows |= run_benchmarks("tiny", only, "cpu").benchmarks
    rows["malloc memory"] = [r | {"system share": 0.25} for r in rows["malloc memory"]]
    study = write_study(stored.parents[2] / "study", report.machine)
    rows["accuracy"] = study_accuracy(study)
    for row in rows["input"]:
        if row["name"] == "era_s10, batched":
            row |= {"median": 1 / 44, "low": 1 / 45, "high": 1 / 43}
    report.to_json(stored)
    texts = page_texts(stored.parents[2])
    assert MISSING not in texts
    assert "44.0 (43.0 to 45.0) times" in texts and "≥ 12" in texts
    assert "the share of system time is 25% instead of 25%" in texts
    assert "first at 91.3%: 0.5 minutes" in texts
    assert "classes from 10 to 20" in texts


def test_headings_of_the_cpu_have_no_typed_figures():
    texts = [c["source"] for c in cells(PAGE) if c["cell_type"] == "markdown"]
    end = next(i for i, text in enumerate(texts) if "{#accuracy}" in text)
    headings = re.findall(r"^#+ .*", "\n".join(texts[:end]), flags=re.MULTILINE)
    assert len(headings) > 10
    assert not [h for h in headings if re.search(r"\d", re.sub("bf16|fp32", "", h))]


def test_cost_is_fitted_and_drawn():
    assert fit_exponent([1, 10, 100], [2, 200, 20_000]) == pytest.approx((2, 2))
    old = [{"of": "images", "n": n, "seconds": 2.0 * n} for n in (100, 1000)]
    old += [{"of": "workers", "n": n, "seconds": 1.0} for n in (0, 1)]
    figure = plot_scaling(old)  # a report may lack the other quantities
    assert [ax.get_xlabel() for ax in figure.axes] == ["images", "workers"]
    assert figure.axes[0].get_xscale() == figure.axes[0].get_yscale() == "log"
    labels = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert labels == ["100", "1k"]
    assert "exponent 1.00" in [text.get_text() for text in figure.axes[0].texts]


def test_sizes_that_do_not_fit_in_memory_are_left_out(monkeypatch):
    monkeypatch.setattr(growth, "available_memory", lambda: 2 * 8e6)
    small = {"widths": (), "batch_sizes": (), "classes": (), "workers": ()}
    with pytest.warns(UserWarning, match="10,000 images are left out"):
        rows = bench_scaling((20, 10_000), **small, rounds=1)
    assert [(row["of"], row["n"]) for row in rows] == [("images", 20)]


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
    assert list(report.benchmarks) == ["scaling"]
    assert report.left_out.keys() <= {"fastai", "lightning", "airbench"}


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


def test_the_readme_follows_the_published_report():
    readme = (ROOT / "README.md").read_text("utf-8")
    rows = BenchReport.from_json(ROOT / "nbs/results/bench/bench.json").benchmarks
    step = next(r for r in rows["step, full model"] if r["name"] == "era_s10, Train")
    low, median, high = (f"{step[k]:.2f}" for k in ("low", "median", "high"))
    assert f"{median} times on a CPU (95% interval {low} to {high})" in readme
    fast = next(r for r in rows["input"] if r["name"] == "era_s10, batched")
    assert f"to {1 / fast['median']:.0f} times as many images" in readme
