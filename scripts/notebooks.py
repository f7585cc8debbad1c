"""Run notebooks and store their outputs the way the book needs them.

python scripts/notebooks.py nbs/03_model.ipynb     run one notebook, or several
python scripts/notebooks.py                        run all of them
python scripts/notebooks.py --slow nbs/tutorial.ipynb   run the cells flagged `slow`, too

Figures are stored at double density, so that they are sharp on high-density screens, and with a
palette of at most 256 colors, which keeps notebooks small. Cells flagged `data` run if the data
folder has the datasets, cells flagged `slow` or `cuda` keep the outputs that they have. Progress
bars and stderr are not stored.
"""

import base64
import io
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SETUP = '%config InlineBackend.figure_format = "retina"'


def flags_of(cell: NotebookNode) -> set[str]:
    """Return the directives on the first lines of a cell, such as {"data", "hide"}."""
    top = re.match(r"(?:#\|.*\n?)*", cell.source)[0]
    return set(re.findall(r"^#\|\s*([\w-]+)", top, flags=re.MULTILINE))


def is_skipped(cell: NotebookNode, slow: bool) -> bool:
    """Return whether a cell keeps the outputs that it has."""
    flags = flags_of(cell)
    no_data = "data" in flags and not os.environ.get("ERA_S10_DATA")
    skipped = bool(flags & {"cuda", "eval"}) or no_data  # eval: false
    return skipped or ("slow" in flags and not slow)


def compress(png: str) -> str:
    """Return a base64 PNG with a palette of 256 colors, or the same PNG if it is smaller."""
    content = base64.b64decode(png)
    image = Image.open(io.BytesIO(content)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image).convert("RGB")
    small = io.BytesIO()
    image.quantize(256, dither=Image.Dither.NONE).save(
        small, format="png", optimize=True
    )
    best = min(content, small.getvalue(), key=len)
    return base64.b64encode(best).decode()


def clean_outputs(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Drop stderr and widgets, join printed lines, and compress the figures."""
    kept: list[NotebookNode] = []
    for output in outputs:
        stream = output.get("name")
        if stream == "stdout" and kept and kept[-1].get("name") == "stdout":
            kept[-1].text += output.text
        elif stream != "stderr":
            kept.append(output)
    for output in kept:
        data = output.get("data", {})
        data.pop("application/vnd.jupyter.widget-view+json", None)
        if "image/png" in data:
            data["image/png"] = compress(data["image/png"])
        if "execution_count" in output:
            output["execution_count"] = None
    return kept


def run(path: Path, slow: bool) -> None:
    """Run a notebook in its folder, and write its outputs into it."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(
        notebook, timeout=1800, kernel_name="python3", resources=resources
    )
    with client.setup_kernel():
        setup = nbformat.v4.new_code_cell(SETUP)
        notebook.cells.insert(0, setup)
        try:
            client.execute_cell(setup, 0)
        finally:
            notebook.cells.pop(0)
        for index, cell in enumerate(notebook.cells):
            if cell.cell_type == "code" and not is_skipped(cell, slow):
                client.execute_cell(cell, index)
                cell.outputs = clean_outputs(cell.outputs)
                cell.execution_count = None
    nbformat.write(notebook, path)


def main() -> None:
    """Run the notebooks that are named, or all of them."""
    os.environ |= {
        "TQDM_DISABLE": "1",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    slow = "--slow" in sys.argv
    named = [Path(name) for name in sys.argv[1:] if name != "--slow"]
    for path in named or sorted((ROOT / "nbs").glob("[!_.]*.ipynb")):
        start = time.monotonic()
        run(path, slow)
        size = path.stat().st_size / 1000
        print(
            f"{path.name}: {time.monotonic() - start:.0f} s, {size:.0f} KB", flush=True
        )


if __name__ == "__main__":
    main()
