"""Make README.md from the home page, nbs/index.ipynb."""

import re
import sys
from collections.abc import Callable
from configparser import ConfigParser
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
HOME = "index.ipynb"
TEXT = ("text/plain", "text/markdown")


def fail(reason: str) -> None:
    """Exit with status 1 and a reason."""
    sys.exit(f"docs.py: {HOME} {reason}")


def read_settings() -> dict[str, str]:
    """Return the settings of settings.ini, with references resolved."""
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def site_address(settings: dict[str, str]) -> str:
    """Return the address of the published site, ending in a slash."""
    return f"{settings['doc_host']}{settings['doc_baseurl']}".rstrip("/") + "/"


def page_name(name: str) -> str:
    """Return the page of a notebook as nbdev names it: 00_utils.ipynb is utils.html."""
    return re.sub(r"^\d+[a-z0-9]*_", "", Path(name).stem.lower()) + ".html"


def split_directives(source: str) -> tuple[dict[str, str], str]:
    """Split a code cell into its directives, such as {"hide": ""}, and its code."""
    lines, directives = source.split("\n"), {}
    while lines and re.match(r"\s*#\s*\|", lines[0]):
        name, _, value = re.sub(r"^\s*#\s*\|\s*", "", lines.pop(0)).partition(" ")
        directives[name.rstrip(":")] = value.strip()
    return directives, "\n".join(lines).strip("\n")


def repository_link(link: str, address: str) -> str:
    """Return a link of the home page as a reader of the repository needs it.

    Images are in nbs/; pages are on the published site."""
    if re.match(r"[a-z][a-z0-9+.-]*:|//|#", link, re.IGNORECASE):
        return link
    path, mark, anchor = link.partition("#")
    if path.endswith((".ipynb", ".html")):
        known = {page_name(p.name) for p in (ROOT / "nbs").glob("*.ipynb")}
        if page_name(path) not in known:
            fail(f"links to {link!r}, but nbs/ has no such notebook")
        return address + page_name(path) + mark + anchor
    if not (ROOT / "nbs" / path).is_file():
        fail(f"links to {link!r}, but nbs/ has no such file")
    return f"nbs/{path}" + mark + anchor


def outside_fences(text: str, change: Callable[[str], str]) -> str:
    """Apply a change to Markdown, except inside its code blocks."""
    fence = r"(^```.*?^```[^\n]*$)"
    blocks = re.split(fence, text, flags=re.DOTALL | re.MULTILINE)
    blocks[::2] = map(change, blocks[::2])
    return "".join(blocks)


def plain_markdown(text: str, address: str) -> str:
    """Return a cell in GitHub's Markdown: links adapted, Quarto's attributes removed."""

    def change(prose: str) -> str:
        prose = re.sub(r"^:::.*\n?", "", prose, flags=re.MULTILINE)
        prose = re.sub(r"(\]\([^)\s]+\))\{[^}\n]*\}", r"\1", prose)
        heading = r"^(#+ .*?)\s*\{[#.][^}\n]*\}$"
        prose = re.sub(heading, r"\1", prose, flags=re.MULTILINE)
        links = r'(\]\(|\b(?:src|href)=")([^)\s"]+)'
        return re.sub(links, lambda m: m[1] + repository_link(m[2], address), prose)

    return outside_fences(text, change).strip("\n")


def text_outputs(outputs: list[NotebookNode], number: int) -> list[NotebookNode]:
    """Return the outputs of a cell as text; figures belong in nbs/images/."""
    for output in outputs:
        data = output.get("data", {})
        if output.output_type == "error" or output.get("name") == "stderr":
            fail(f"cell {number} stores an error or a warning; run it again")
        if data and not set(TEXT) & set(data):
            fail(f"cell {number} stores an output without text: {', '.join(data)}")
        if any(kind.startswith("image/") for kind in data) and TEXT[1] not in data:
            fail(
                f"cell {number} stores a figure; save it in nbs/images/ and link to it"
            )
        if "text" in output:
            output["text"] = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", output["text"])
        output["data"] = {kind: data[kind] for kind in TEXT if kind in data}
    return outputs


def convert_code(cell: NotebookNode, number: int) -> bool:
    """Prepare a code cell for the README; return whether it belongs there."""
    directives, cell.source = split_directives(cell.source)
    if {"hide", "default_exp", "export", "exporti"} & set(directives):
        return False
    if directives.get("include") == "false" or "nbdev_export()" in cell.source:
        return False
    cell.outputs = text_outputs(cell.outputs, number)
    if directives.get("output") == "false":
        cell.outputs = []
    if directives.get("echo") == "false":
        cell.metadata["transient"] = {"remove_source": True}
        return bool(cell.outputs)
    return bool(cell.source or cell.outputs)


def convert_markdown(cell: NotebookNode, address: str) -> bool:
    """Prepare a Markdown cell for the README; return whether it belongs there."""
    if cell.source.lstrip().startswith(
        "# "
    ):  # the title, with nbdev's front matter below
        cell.source = re.sub(r"^- \S+:.*\n?", "", cell.source, flags=re.MULTILINE)
        cell.source = re.sub(r"^(# .*)\n+(?=>)", r"\1\n\n", cell.source)
    cell.source = plain_markdown(cell.source, address)
    return bool(cell.source)


def readme_text() -> str:
    """Return the text of README.md."""
    address = site_address(read_settings())
    notebook = nbformat.read(ROOT / "nbs" / HOME, as_version=4)
    kept = []
    for number, cell in enumerate(notebook.cells, start=1):
        if cell.cell_type == "markdown" and convert_markdown(cell, address):
            kept.append(cell)
        if cell.cell_type == "code" and convert_code(cell, number):
            kept.append(cell)
    notebook.cells = kept
    notebook.metadata.setdefault("language_info", {"name": "python"})
    exporter = MarkdownExporter()
    exporter.display_data_priority = ["text/markdown", "text/plain"]
    text, _resources = exporter.from_notebook_node(notebook)
    text = re.sub(r"^[ \t]+$", "", text, flags=re.MULTILINE)
    text = outside_fences(text, lambda prose: re.sub(r"\n{3,}", "\n\n", prose))
    return text.strip("\n") + "\n"
