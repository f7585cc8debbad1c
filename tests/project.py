"""Shared helpers: paths of the repository, a clean copy of it, and programs that run in a new process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(
    p for p in (ROOT / "nbs").glob("*.ipynb") if not p.name.startswith(("_", "."))
)


def clean_copy(
    folder: Path,  # destination, which must not exist
) -> Path:  # the destination
    "Copy the repository without ignored files: caches, environments, builds and runs."
    lines = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    patterns = [
        Path(line.strip("/")).name
        for line in lines
        if line and not line.startswith("#")
    ]
    ignored = shutil.ignore_patterns(".git", *patterns)

    def ignore(parent: str, names: list[str]) -> set[str]:
        environments = {n for n in names if Path(parent, n, "pyvenv.cfg").exists()}
        return ignored(parent, names) | environments

    shutil.copytree(ROOT, folder, ignore=ignore, symlinks=True)
    return folder


def contents(
    folder: Path,  # folder to search
    pattern: str = "*",  # glob pattern of the file names
) -> dict[str, bytes]:  # content of each file, by its relative path
    "Read all files below a folder."
    files = (
        p for p in folder.rglob(pattern) if p.is_file() and "__pycache__" not in p.parts
    )
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def hide_gpus() -> None:
    "Let a forked process run on the CPU; it can't use a GPU that its parent may use."
    import torch

    torch.cuda.device_count = lambda: 0
    torch.cuda.is_available = torch.cuda.is_initialized = lambda: False


def run_python(
    code: str,  # Python source
    folder: Path = ROOT,  # working directory, which is first on sys.path
    **variables: str,  # environment variables to set
) -> subprocess.CompletedProcess:  # exit code and output
    "Run Python code in a new process."
    environment = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**environment, "PYTHONDONTWRITEBYTECODE": "1", **variables},
        capture_output=True,
        text=True,
    )


def run_script(
    path: Path,  # script, which runs in its own folder
    **variables: str,  # environment variables to set
) -> subprocess.CompletedProcess:  # exit code and output
    "Run a script in a new process, with this copy of the package."
    return subprocess.run(
        [sys.executable, path.name],
        cwd=path.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
    )


def command(
    name: str,  # command of this package or of an installed tool
    *options: str,  # command-line options
) -> list[str]:  # arguments for subprocess
    "Return a command from the environment of the tests, which need not be on PATH."
    return [str(Path(sys.executable).with_name(name)), *options]


def cells(
    notebook: Path,  # notebook file
) -> list[dict]:  # cells, each with its source as one string
    "Read the cells of a notebook."
    content = json.loads(notebook.read_text(encoding="utf-8"))
    return [{**cell, "source": "".join(cell["source"])} for cell in content["cells"]]
