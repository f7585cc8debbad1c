"""What guards the package: its imports, its wheel, and the agreement between notebooks, code and pages."""

import ast
import configparser
import json
import re
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from project import NOTEBOOKS, ROOT, cells, clean_copy, contents, run_python

LATE = (
    "albumentations",
    "torchvision",
    "matplotlib",
    "sklearn",
    "torch_lr_finder",
    "pooch",
)
TORCH_LATE = (
    "torch._dynamo",
    "torch._inductor",
    "torch.onnx",
    "torch.utils.tensorboard",
)
LIGHT = (
    "fastcore",
    "numpy",
    "torchinfo",
    "tqdm",
)  # They take milliseconds beside torch's seconds
NOTEBOOK_KB = 500
needs_nbdev = pytest.mark.skipif(
    find_spec("nbdev") is None, reason="nbdev is not installed"
)


def module_names() -> list[str]:  # `era_s10`, `era_s10.utils`, ...
    "Find every module of the package by walking its folder."
    paths = sorted((ROOT / "era_s10").rglob("*.py"))
    parts = (path.relative_to(ROOT).with_suffix("").parts for path in paths)
    return [".".join(p[:-1] if p[-1] == "__init__" else p) for p in parts]


MODULES = module_names()


@pytest.fixture(scope="module")
def settings() -> configparser.SectionProxy:
    "What settings.ini says."
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


# ---------------------------------------------------------------- imports

PROBE = """
import atexit, importlib, json, os, sys

events, watching_files = [], False

def watch(event, args):
    network = event.startswith("socket.") and event != "socket.gethostname"
    if network or event == "urllib.Request":
        events.append(f"{event} {args[1:]}")
        raise RuntimeError(f"the network is forbidden here: {event}")
    if not watching_files:
        return
    if event == "open":
        path, mode, flags = args
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if flags else 0
        if (writes or (mode and set(mode) & set("wax+"))) and path != os.devnull:
            events.append(f"open {path} {mode}")
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink", "os.truncate"):
        events.append(f"{event} {args}")
    elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"):
        events.append(f"{event} {args[:2]}")

sys.addaudithook(watch)

import gc, locale, logging, random, signal, socket, threading, warnings
import multiprocessing
import numpy, torch

def settings():
    "Everything that one module could change for all others."
    return {
        "torch threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "torch dtype": str(torch.get_default_dtype()),
        "torch device": str(torch.get_default_device()),
        "torch grad": (torch.is_grad_enabled(), torch.is_anomaly_enabled()),
        "torch determinism": torch.are_deterministic_algorithms_enabled(),
        "torch precision": torch.get_float32_matmul_precision(),
        "torch cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "torch sharing": torch.multiprocessing.get_sharing_strategy(),
        "torch generator": torch.get_rng_state().tolist(),
        "torch printing": str(torch._tensor_str.PRINT_OPTS),
        "numpy generator": str(numpy.random.get_state()),
        "numpy printing": str(numpy.get_printoptions()),
        "numpy errors": str(numpy.geterr()),
        "random generator": str(random.getstate()),
        "environment": dict(os.environ),
        "warnings": [str(f) for f in warnings.filters],
        "signals": {str(s): str(signal.getsignal(s)) for s in signal.valid_signals()},
        "hooks": [str(h) for h in (sys.excepthook, sys.displayhook, warnings.showwarning)],
        "logging": (logging.root.level, logging.root.disabled, len(logging.root.handlers)),
        "threads": threading.active_count(),
        "locale": locale.setlocale(locale.LC_ALL),
        "start method": multiprocessing.get_start_method(allow_none=True),
        "socket timeout": socket.getdefaulttimeout(),
        "recursion": sys.getrecursionlimit(),
        "collector": (gc.isenabled(), gc.get_threshold()),
        "path": list(sys.path),
        "folder": os.getcwd(),
        "umask": (mask := os.umask(0), os.umask(mask))[0],
    }

for MODULE in MODULES:
    if len(MODULES) > 1 and os.fork():  # a child for each, so that torch is imported once
        os.wait()
        continue
    before = settings()
    watching_files = True
    importlib.import_module(MODULE)
    watching_files = False
    after = settings()
    print(json.dumps({"module": MODULE, "found": {
        "events": events,
        "changed": [k for k in before if before[k] != after[k]],
        "cuda": torch.cuda.is_initialized(),
        "late": sorted({name.partition(".")[0] for name in sys.modules} & set(LATE)),
    }}), flush=True)
    atexit._run_exitfuncs()
    os._exit(0)  # without taking torch down, which lasts longer than the import
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> dict[str, dict]:
    "Import each module where none of the others has been, and report what that did."
    home, here = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("here")
    places = {"HOME": home, "TMPDIR": home, "XDG_CACHE_HOME": home, "PYTHONPATH": ROOT}
    found = {}
    for modules in (
        [MODULES] if sys.platform == "linux" else [[module] for module in MODULES]
    ):
        code = PROBE.replace("MODULES", repr(modules)).replace(
            "set(LATE)", f"set({LATE!r})"
        )
        done = run_python(
            code, here, **{name: str(place) for name, place in places.items()}
        )
        for line in done.stdout.splitlines():
            answer = json.loads(line)
            found[answer["module"]] = answer["found"]
        found["errors"] = found.get("errors", "") + done.stderr
    found["files"] = [path.name for path in (*home.iterdir(), *here.iterdir())]
    return found


@pytest.mark.parametrize("module", MODULES)
def test_an_import_leaves_everything_as_it_was(module, imported):
    assert module in imported, imported["errors"]
    assert imported[module] == {"events": [], "changed": [], "cuda": False, "late": []}
    assert imported["files"] == []


COST = """
import importlib, json, sys
import torch

before, opened = set(sys.modules), []
sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" else None)
for module in MODULES:
    importlib.import_module(module)
new = set(sys.modules) - before
print(json.dumps({
    "packages": sorted({name.partition(".")[0] for name in new} - sys.stdlib_module_names),
    "torch": sorted(set(PARTS) & new),
    "files": [str(f) for f in opened if not str(f).endswith((".py", ".pyc", ".so", ".pyd"))],
}))
"""


def test_all_modules_import_little_more_than_torch():
    code = COST.replace("MODULES", repr(MODULES)).replace("PARTS", repr(TORCH_LATE))
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "era_s10" in found["packages"]
    assert set(found["packages"]) <= {"era_s10", *LIGHT}
    assert found["torch"] == []
    assert found["files"] == []  # no weights, digests or settings are read


# ---------------------------------------------------------------- the wheel


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path, settings):
    copy = clean_copy(tmp_path / "era_s10")
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        "wheels",
    ]
    done = subprocess.run([*command, "."], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (copy / "wheels").glob("*.whl")
    info = f"{settings['lib_name']}-{settings['version']}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        scripts = archive.read(f"{info}/entry_points.txt").decode()
        metadata = archive.read(f"{info}/METADATA").decode()
    package = {f"era_s10/{name}" for name in contents(ROOT / "era_s10", "*.py")}
    package |= {"era_s10/py.typed", "era_s10/digests.npz"}
    package |= {
        f"era_s10/weights/{path.name}"
        for path in (ROOT / "era_s10" / "weights").iterdir()
    }
    notes = {f"{info}/{n}" for n in ("METADATA", "WHEEL", "RECORD", "entry_points.txt")}
    licence = {n for n in (f"{info}/LICENSE", f"{info}/licenses/LICENSE") if n in names}
    assert licence
    assert names - {f"{info}/top_level.txt"} == package | notes | licence
    for line in settings["console_scripts"].split():
        assert line.replace("=", " = ") in scripts
    assert f"Requires-Python: >={settings['min_python']}" in metadata
    supported = re.findall(
        r"^Classifier: Programming Language :: Python :: 3\.(\d+)$", metadata, re.M
    )
    assert settings["min_python"] == f"3.{min(map(int, supported))}"
    for requirement in settings["requirements"].split():
        assert re.search(
            rf"^Requires-Dist: {re.split('[<>=]', requirement)[0]}\b", metadata, re.M
        )


def test_what_is_tested_is_what_users_get(settings):
    own, others = (
        {re.split("[<>=]", r)[0] for r in settings[f"{kind}requirements"].split()}
        for kind in ("", "dev_")
    )
    assert (
        not own & others
    )  # a bound for developers alone would hide what breaks without it


def test_every_command_and_every_version_is_where_settings_ini_says(settings):
    for line in settings["console_scripts"].split():
        module, name = line.partition("=")[2].split(":")
        tree = ast.parse(
            (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
        )
        assert name in [n.name for n in tree.body if isinstance(n, ast.FunctionDef)], (
            line
        )
    version = settings["version"]
    init = (ROOT / "era_s10" / "__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{version}"' in init
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------- the notebooks


@needs_nbdev
def test_the_notebooks_are_clean_and_exported(tmp_path):
    copy = clean_copy(tmp_path / "era_s10")
    before = contents(copy)
    for path in (copy / "era_s10").rglob(
        "*.py"
    ):  # Every module comes from a notebook of today
        if path.name != "__init__.py":
            path.unlink()
    for tool in ("from nbdev.clean import nbdev_clean as f", "from nbdev.doclinks import nbdev_export as f"):  # fmt: skip
        done = run_python(f"{tool}; f()", copy)
        assert done.returncode == 0, done.stderr
    after = contents(copy)
    names = set(before) | set(after)
    assert not sorted(name for name in names if before.get(name) != after.get(name))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_stores_what_a_reader_wants(notebook):
    assert notebook.stat().st_size <= NOTEBOOK_KB * 1024
    assert "widgets" not in json.loads(notebook.read_text(encoding="utf-8"))["metadata"]
    for number, cell in enumerate(cells(notebook), 1):
        for output in cell.get("outputs", []):
            where = f"cell {number}"
            assert output["output_type"] != "error", where
            assert output.get("name") != "stderr", where
            assert not [k for k in output.get("data", {}) if "widget" in k], where
            assert "\r" not in "".join(output.get("text", "")), (
                f"{where}: a progress bar"
            )


def test_a_directive_stands_on_the_first_lines_of_its_cell():
    late = []
    for notebook in NOTEBOOKS:
        for cell in cells(notebook):
            code = re.sub(r"\A(?:\s*#\|.*\n?)+", "", cell["source"])
            if cell["cell_type"] == "code" and re.search(
                r"^\s*#\|", code, flags=re.MULTILINE
            ):
                late.append((notebook.name, code[:60]))
    assert not late


@needs_nbdev
def test_a_failing_notebook_fails_the_notebook_tests(tmp_path):
    copy = clean_copy(tmp_path / "era_s10")
    for path in (copy / "nbs").glob("*.ipynb"):
        path.unlink()
    cell = {
        "cell_type": "code",
        "execution_count": None,
        "id": "a",
        "metadata": {},
        "outputs": [],
    }
    for name, code in {"98_right": "assert True", "99_wrong": "assert False"}.items():
        kernel = {"name": "python3", "display_name": "python3", "language": "python"}
        book = {
            "cells": [{**cell, "source": code}],
            "metadata": {"kernelspec": kernel},
            "nbformat": 4,
            "nbformat_minor": 5,
        }
        (copy / "nbs" / f"{name}.ipynb").write_text(json.dumps(book), encoding="utf-8")
    done = run_python(
        "from nbdev.test import nbdev_test; nbdev_test(n_workers=1)", copy
    )
    assert done.returncode != 0
    assert "99_wrong.ipynb" in done.stderr.rpartition("Failed On")[2]
    assert "98_right.ipynb" not in done.stderr.rpartition("Failed On")[2]


# ---------------------------------------------------------------- the repository's words

# Written apart, so that this file does not match itself
FOLDERS = "|".join(("root", "work", "home", "Users"))
MACHINE = re.compile(
    rf"(?<![\w.~\])}}-])/(?:{FOLDERS})/|/{'tmp'}/ipykernel|[A-Z]:\\\\Users"
)
HOSTS = re.compile("|".join(("pypi" r"\.org", "pythonhosted" r"\.org", "npmjs" r"\.org", "anaconda" r"\.org")))  # fmt: skip


def test_no_file_speaks_of_one_machine_or_of_a_package_registry(tmp_path):
    found = []
    for name, held in contents(clean_copy(tmp_path / "era_s10")).items():
        if b"\0" in held:
            continue
        for number, line in enumerate(held.decode(errors="replace").splitlines(), 1):
            short = re.sub(r"[A-Za-z0-9+/=]{200,}", "", line)  # A stored picture
            if MACHINE.search(short) or HOSTS.search(short):
                found.append(f"{name}:{number}: {short.strip()[:100]}")
    assert not found


def test_the_site_is_configured_in_one_file():
    link = ROOT / "nbs" / "_quarto.yml"
    assert link.is_symlink() or sys.platform == "win32"
    assert (
        link.resolve() == Path(ROOT, "_quarto.yml").resolve() or sys.platform == "win32"
    )
