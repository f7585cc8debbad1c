"""What several tests need: the checkout, a clean copy of it, and the tools of this environment."""

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
    folder: Path,  # Where the copy goes; must not exist
) -> Path:  # The same folder
    "Copy the checkout without what git ignores: caches, environments, builds and runs."
    lines = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    named = [
        Path(line.strip("/")).name
        for line in lines
        if line and not line.startswith("#")
    ]
    ignored = shutil.ignore_patterns(".git", *named)

    def ignore(where: str, names: list[str]) -> set[str]:
        environments = {n for n in names if Path(where, n, "pyvenv.cfg").exists()}
        return ignored(where, names) | environments

    shutil.copytree(ROOT, folder, ignore=ignore, symlinks=True)
    return folder


def contents(
    folder: Path,  # A folder
    pattern: str = "*",  # Which files
) -> dict[str, bytes]:  # For each file below it, by its path from there, what it holds
    "Read every file of a folder."
    files = (
        p for p in folder.rglob(pattern) if p.is_file() and "__pycache__" not in p.parts
    )
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def run_python(
    code: str,  # A program
    folder: Path = ROOT,  # Where it runs, and the first place that it imports from
    **variables: str,  # Environment variables to set
) -> subprocess.CompletedProcess:  # Its exit code and what it wrote
    "Run a program in a fresh process of this environment."
    environment = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**environment, "PYTHONDONTWRITEBYTECODE": "1", **variables},
        capture_output=True,
        text=True,
    )


def command(
    name: str,  # a command of this package, or a tool from the same environment
    *options: str,  # its options
) -> list[str]:  # arguments for subprocess
    "Return a command of the environment that runs the tests; it need not be on PATH."
    return [str(Path(sys.executable).with_name(name)), *options]


def cells(
    notebook: Path,  # A notebook
) -> list[dict]:  # Its cells, their sources as one string
    "Read a notebook's cells."
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [{**cell, "source": "".join(cell["source"])} for cell in found]
