"""Tests of the package: imports, wheel, and the agreement of notebooks, modules and settings.ini."""

import ast
import configparser
import json
import pkgutil
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
)  # imported at once: they take milliseconds, torch takes seconds
NOTEBOOK_KB = 500
needs_nbdev = pytest.mark.skipif(
    find_spec("nbdev") is None, reason="nbdev is not installed"
)


def module_names() -> list[str]:  # era_s10, era_s10.utils, …
    "Return the names of all modules of the package."
    paths = sorted((ROOT / "era_s10").rglob("*.py"))
    parts = (path.relative_to(ROOT).with_suffix("").parts for path in paths)
    return [".".join(p[:-1] if p[-1] == "__init__" else p) for p in parts]


MODULES = module_names()


@pytest.fixture(scope="module")
def settings() -> configparser.SectionProxy:
    "Return the settings of settings.ini."
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
    "Return the global settings that an import could change."
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
    if len(MODULES) > 1 and os.fork():  # one child each, so that torch is imported once
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
    os._exit(0)  # skip torch's cleanup, which takes longer than the import
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> dict[str, dict]:
    "Import each module in a process without the others, and return what the import did."
    home, here = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("here")
    folders = {"HOME": home, "TMPDIR": home, "XDG_CACHE_HOME": home, "PYTHONPATH": ROOT}
    found = {}
    for modules in (
        [MODULES] if sys.platform == "linux" else [[module] for module in MODULES]
    ):
        code = PROBE.replace("MODULES", repr(modules)).replace(
            "set(LATE)", f"set({LATE!r})"
        )
        done = run_python(
            code, here, **{name: str(folder) for name, folder in folders.items()}
        )
        for line in done.stdout.splitlines():
            answer = json.loads(line)
            found[answer["module"]] = answer["found"]
        found["errors"] = found.get("errors", "") + done.stderr
    found["files"] = [path.name for path in (*home.iterdir(), *here.iterdir())]
    return found


@pytest.mark.parametrize("module", MODULES)
def test_importing_a_module_has_no_side_effects(module, imported):
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


def test_all_modules_import_little_besides_torch():
    code = COST.replace("MODULES", repr(MODULES)).replace("PARTS", repr(TORCH_LATE))
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "era_s10" in found["packages"]
    assert set(found["packages"]) <= {"era_s10", *LIGHT}
    assert found["torch"] == []
    assert found["files"] == []  # reads no weights, checksums or settings


USER_NAMES = """
import sys
import era_s10
assert not {"torch", "numpy"} & set(sys.modules), "import era_s10 is slow"
from era_s10 import Experiment, Model, CIFAR10, Digits, MNIST, MyDataSet, make_config, set_seed
from era_s10 import CIFAR100, SVHN, FashionMNIST, FastModel
found = {n: v.__module__ for n, v in globals().items() if getattr(v, "__module__", "").startswith("era_s10.")}
assert found.keys() == set(era_s10.__all__) and found.keys() <= set(dir(era_s10)), found
try:
    era_s10.Modle
except AttributeError as error:
    assert str(error) == "module 'era_s10' has no attribute 'Modle'"
else:
    raise AssertionError("a misspelled name must raise AttributeError")
"""


def test_the_package_exports_its_main_names_lazily():
    done = run_python(USER_NAMES)
    assert done.returncode == 0, done.stderr


def test_imports_run_one_way_and_the_diagram_is_up_to_date():
    code = "import runpy, sys; sys.argv[1:] = ['--check']; runpy.run_path('scripts/imports.py', run_name='__main__')"
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_the_package_does_not_use_mocks():
    for path in (ROOT / "era_s10").rglob("*.py"):
        assert "unittest" not in path.read_text(encoding="utf-8"), path.name


# ---------------------------------------------------------------- size of modules and cells

MODULE_LINES, CELL_LINES = 450, 60


@pytest.mark.parametrize("module", [m for m in MODULES if m != "era_s10._modidx"])
def test_modules_are_short(module):
    path = ROOT / f"{module.replace('.', '/')}.py"
    path = path if path.exists() else path.with_suffix("") / "__init__.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MODULE_LINES


def public_functions(path: Path) -> list[ast.FunctionDef]:
    "Return the public functions, patched methods and constructors of a module."
    found = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        name = getattr(node, "name", "_")
        if isinstance(node, ast.ClassDef) and not name.startswith("_"):
            found += [n for n in node.body if getattr(n, "name", "") == "__init__"]
        elif isinstance(node, ast.FunctionDef) and not name.startswith("_"):
            found.append(node)
    return found


@pytest.mark.parametrize(
    "module", sorted((ROOT / "era_s10").rglob("[!_]*.py")), ids=lambda path: path.stem
)
def test_signatures_are_documented_and_fit_a_page(module):
    lines = module.read_text(encoding="utf-8").splitlines()
    for function in public_functions(module):
        where = f"{module.name}: {function.name}"
        arguments = function.args
        named = arguments.posonlyargs + arguments.args + arguments.kwonlyargs
        for argument in named:
            if argument.arg not in ("self", "cls"):
                assert "  # " in lines[argument.lineno - 1], f"{where}, {argument.arg}"
        decorators = [ast.unparse(one) for one in function.decorator_list]
        if any(one.startswith("patch") for one in decorators):
            assert len(decorators) == 1, f"{where}: nbdev does not document it"
        result = ast.unparse(function.returns) if function.returns else "None"
        is_property = any("prop" in one for one in decorators)
        if not is_property and result not in ("None", "Self", "Iterator[None]"):
            line = lines[function.returns.end_lineno - 1]
            assert "  # " in line, f"{where}: the result has no comment"
        if docstring := ast.get_docstring(function, clean=False):
            assert max(map(len, docstring.splitlines())) <= 88, where


def code_cells(notebook: Path) -> list[str]:
    "Return the sources of a notebook's code cells."
    return [c["source"] for c in cells(notebook) if c["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_exported_cells_are_short(notebook):
    for code in code_cells(notebook):
        if re.search(r"^#\|\s*exports?\b", code, flags=re.MULTILINE):
            lines = [line for line in code.splitlines() if not line.startswith("#|")]
            assert len(lines) <= CELL_LINES, lines[:5]


# matplotlib resolves these when it draws, after plot_style has ended; 22_plots.ipynb
# shows that with to_hex
COLOR_CYCLE = re.compile(r"""(?<!to_hex\()["']C\d["']""")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_no_colors_of_the_color_cycle_in_notebooks(notebook):
    found = [code for code in code_cells(notebook) if COLOR_CYCLE.search(code)]
    assert not found


def test_no_colors_of_the_color_cycle_in_tests():
    for path in (ROOT / "tests").glob("*.py"):
        assert not COLOR_CYCLE.search(path.read_text(encoding="utf-8")), path.name


# ---------------------------------------------------------------- the wheel


def test_the_wheel_contains_only_the_package(tmp_path, settings):
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
    metadata_files = {
        f"{info}/{n}" for n in ("METADATA", "WHEEL", "RECORD", "entry_points.txt")
    }
    license = {n for n in (f"{info}/LICENSE", f"{info}/licenses/LICENSE") if n in names}
    assert license
    assert names - {f"{info}/top_level.txt"} == package | metadata_files | license
    assert not [name for name in names if name.endswith("peers.py")]  # in benchmarks/
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


def test_development_requirements_do_not_restrict_the_package(settings):
    runtime, development = (
        {re.split("[<>=]", r)[0] for r in settings[f"{kind}requirements"].split()}
        for kind in ("", "dev_")
    )
    # a version bound for developers only would hide what breaks for users
    assert not runtime & development


def test_commands_exist_and_version_numbers_agree(settings):
    for line in settings["console_scripts"].split():
        assert callable(pkgutil.resolve_name(line.partition("=")[2])), line
        assert "=era_s10.entry:" in line, line  # handles signals before slow imports
    version = settings["version"]
    init = (ROOT / "era_s10" / "__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{version}"' in init
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------- the notebooks


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_the_title_cell_holds_only_title_and_summary(path):
    first = next(c for c in cells(path) if c["cell_type"] == "markdown")["source"]
    assert re.fullmatch(r"# [^\n]+\n\n(>[^\n]*\n?)+", first), (
        "the site build drops the rest of this cell"
    )


@needs_nbdev
def test_notebooks_are_clean_and_exported(tmp_path):
    copy = clean_copy(tmp_path / "era_s10")
    before = contents(copy)
    # without this, modules of deleted notebooks would remain
    for path in (copy / "era_s10").rglob("*.py"):
        if path.name != "__init__.py":
            path.unlink()
    for tool in ("from nbdev.clean import nbdev_clean as f", "from nbdev.doclinks import nbdev_export as f"):  # fmt: skip
        done = run_python(f"{tool}; f()", copy)
        assert done.returncode == 0, done.stderr
    after = contents(copy)
    names = set(before) | set(after)
    assert not sorted(name for name in names if before.get(name) != after.get(name))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_stored_outputs_are_small_and_have_no_errors_or_widgets(notebook):
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


def test_directives_are_the_first_lines_of_their_cells():
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
def test_nbdev_test_fails_if_a_notebook_fails(tmp_path):
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


# ---------------------------------------------------------------- text of all files

# split, so that this file does not match itself
FOLDERS = "|".join(("root", "work", "home", "Users"))
MACHINE = re.compile(
    rf"(?<![\w.~\])}}-])/(?:{FOLDERS})/|/{'tmp'}/ipykernel|[A-Z]:\\\\Users"
)
HOSTS = re.compile("|".join(("pypi" r"\.org", "pythonhosted" r"\.org", "npmjs" r"\.org", "anaconda" r"\.org")))  # fmt: skip


def test_no_file_contains_local_paths_or_registry_addresses(tmp_path):
    found = []
    for name, content in contents(clean_copy(tmp_path / "era_s10")).items():
        if b"\0" in content:
            continue
        for number, line in enumerate(content.decode(errors="replace").splitlines(), 1):
            short = re.sub(r"[A-Za-z0-9+/=]{200,}", "", line)  # stored figures
            if MACHINE.search(short) or HOSTS.search(short):
                found.append(f"{name}:{number}: {short.strip()[:100]}")
    assert not found


def test_quarto_and_the_site_share_one_configuration():
    link = ROOT / "nbs" / "_quarto.yml"
    assert link.is_symlink() or sys.platform == "win32"
    assert (
        link.resolve() == Path(ROOT, "_quarto.yml").resolve() or sys.platform == "win32"
    )
