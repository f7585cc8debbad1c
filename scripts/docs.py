"""Build the website and README.md from the notebooks, with what pip installs and no Quarto.

python scripts/docs.py site            nbs/ -> _proc/ (nbdev) -> _docs/ (smalldocs)
python scripts/docs.py readme          nbs/index.ipynb -> README.md (nbconvert)
python scripts/docs.py readme --check  exit with 1, and a reason, where README.md is out of date

Both builders read the same _quarto.yml. Quarto's own command is nbdev_docs; the pages have the same
names and anchors, so a link to one site works on the other.
"""

import argparse
import ast
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE_SUFFIXES = (".ipynb", ".html")


def read_settings() -> dict[str, str]:  # settings.ini, its references filled in
    "Read what settings.ini says of the project."
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def site_address(
    settings: dict[str, str],  # settings.ini
) -> str:  # The published site's address, ending in a slash
    "Say where the published site is."
    return f"{settings['doc_host']}{settings['doc_baseurl']}".rstrip("/") + "/"


def page_name(
    name: str,  # A notebook's or a page's file name, such as `00_utils.ipynb`
) -> str:  # The page's name on the site, such as `utils.html`
    "Name a page as nbdev does: in lower case, without the number in front."
    return re.sub(r"^\d+[a-z0-9]*_", "", Path(name).stem.lower()) + ".html"


def fail(
    reason: str,  # One sentence
) -> None:
    "Stop with a reason."
    sys.exit(f"docs.py: {reason}")


# ---------------------------------------------------------------- the site


def dataclass_source(
    shown: type,  # A dataclass that a notebook defines
) -> str:  # Its exported source, or nothing
    "Find a dataclass in the package: Python cannot read the source of a class made in a notebook."
    for path in (ROOT / "era_s10").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and node.name == shown.__name__:
                return "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno])
    return ""


def preprocess() -> Path:  # The folder of the notebooks as the site shows them
    "Run nbdev's pre-processing: signatures in, hidden cells out, from nbs/ into _proc/."
    hidden = [part for part in ROOT.parts if part.startswith(".")]
    if hidden:
        fail(
            f"nbdev skips every file below a folder named {hidden[0]!r}; move the checkout elsewhere"
        )
    from fastcore import docments
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs

    docments.get_dataclass_source = (
        dataclass_source  # The comments beside the fields come along
    )
    refresh_quarto_yml()
    problems, folder = [], ROOT / "_proc"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            proc_nbs(force=True, n_workers=0)
        except Exception as error:  # Whatever a cell raises; nbdev names the cell
            problems = [f"{error}\n{error.__cause__!r}"]
    mixed = [
        str(w.message) for w in caught if "imports and other code" in str(w.message)
    ]
    if mixed or problems:
        reason = "building the site runs every cell that imports or exports, and no other, so an"
        reason += " import needs a cell of its own, and an exported cell only exported names:\n"
        fail(reason + "\n".join(mixed + problems))
    if not list(folder.glob("*.ipynb")):
        fail(f"nbdev left no notebook in {folder}")
    return folder


def page_names(
    folder: Path,  # The pre-processed notebooks
) -> dict[str, str]:  # For each page, its name from smalldocs to its name on the site
    "List the names that nbdev gives the pages as `output-file`, which smalldocs does not read."
    return {
        path.with_suffix(".html").name: page_name(path.name)
        for path in folder.glob("*.ipynb")
    }


def local_link(
    link: str,  # A link of a page
    names: dict[str, str],  # The pages' names, old to new
    address: str,  # The published site's address
    anchors: dict[
        str, set[str]
    ],  # For each page, under its new name, what can be linked to
) -> str:  # The link between two pages of this site, or the link as it was
    "Point a link to a page, or to the published site, at the page beside it."
    if link.startswith(address):
        link = link.removeprefix(address) or "./"
    path, mark, anchor = link.partition("#")
    path = names.get(path, path)
    # nbdev links a method to an anchor of its own, which it has only where it is shown by itself
    owner = anchor.rpartition(".")[0]
    if path in anchors and anchor not in anchors[path] and owner in anchors[path]:
        anchor = owner
    return path + mark + anchor


def rename_pages(
    site: Path,  # The built site
    names: dict[str, str],  # The pages' names, old to new
    address: str,  # The published site's address
) -> None:
    "Give the pages the names that nbdev gives them, and turn every link along."
    pages = {old: (site / old).read_text(encoding="utf-8") for old in names}
    anchors = {
        names[old]: set(re.findall(r'\bid="([^"]+)"', html))
        for old, html in pages.items()
    }

    def turn(match: re.Match) -> str:
        return match[1] + local_link(match[2], names, address, anchors) + match[3]

    for old, html in pages.items():
        (site / old).unlink()
        html = re.sub(r'((?:href|src)=")([^"]*)(")', turn, html)
        (site / names[old]).write_text(html, encoding="utf-8")
    entries = json.loads((site / "search.json").read_text(encoding="utf-8"))
    for entry in entries:
        entry["objectID"] = entry["href"] = local_link(
            entry["href"], names, address, anchors
        )
    (site / "search.json").write_text(
        json.dumps(entries, ensure_ascii=False), encoding="utf-8"
    )
    if (site / "sitemap.xml").exists():
        text = (site / "sitemap.xml").read_text(encoding="utf-8")
        for old, new in names.items():
            text = text.replace(f"{address}{old}<", f"{address}{new}<")
        (site / "sitemap.xml").write_text(text, encoding="utf-8")


def build_site() -> None:
    "Build the website into the folder that settings.ini names."
    from smalldocs.site import build

    settings = read_settings()
    folder = preprocess()
    found = build(folder, quiet=True).warnings
    found = [
        warning for warning in found if "output-file is not read" not in warning
    ]  # See above
    if found:
        fail("the pages need a correction:\n" + "\n".join(found))
    built, site = folder / settings["doc_path"], ROOT / settings["doc_path"]
    rename_pages(built, page_names(folder), site_address(settings))
    (built / ".nojekyll").touch()
    shutil.rmtree(site, ignore_errors=True)
    shutil.move(built, site)
    print(f"{len(list(site.glob('*.html')))} pages in {site.relative_to(ROOT)}/")


# ---------------------------------------------------------------- README.md


def split_directives(
    source: str,  # A code cell's source
) -> tuple[
    dict[str, str], str
]:  # Its directives, such as `{"hide": ""}`, and the code below them
    "Take the `#|` lines off the top of a code cell."
    lines, directives = source.split("\n"), {}
    while lines and re.match(r"\s*#\s*\|", lines[0]):
        name, _, value = re.sub(r"^\s*#\s*\|\s*", "", lines.pop(0)).partition(" ")
        directives[name.rstrip(":")] = value.strip()
    return directives, "\n".join(lines).strip("\n")


def readme_link(
    link: str,  # A link of the home page
    address: str,  # The published site's address
) -> str:  # The same link, for a reader of the repository
    "Point a link to a picture into nbs/, and a link to a page to the published site."
    if re.match(r"[a-z][a-z0-9+.-]*:|//|#", link, re.IGNORECASE):
        return link
    path, mark, anchor = link.partition("#")
    if path.endswith(PAGE_SUFFIXES):
        notebooks = {page_name(p.name) for p in (ROOT / "nbs").glob("*.ipynb")}
        if page_name(path) not in notebooks:
            fail(f"index.ipynb links to {link!r}, and nbs/ has no such notebook")
        return address + page_name(path) + mark + anchor
    if not (ROOT / "nbs" / path).is_file():
        fail(f"index.ipynb links to {link!r}, and nbs/ has no such file")
    return f"nbs/{path}" + mark + anchor


def outside_fences(
    text: str,  # Markdown
    change: Callable[[str], str],  # What to do to the text between its code blocks
) -> str:  # The changed Markdown, its code blocks as they were
    "Change Markdown, and leave the code in it alone."
    blocks = re.split(r"(^```.*?^```[^\n]*$)", text, flags=re.DOTALL | re.MULTILINE)
    blocks[::2] = map(change, blocks[::2])
    return "".join(blocks)


def readme_markdown(
    text: str,  # A Markdown cell
    address: str,  # The published site's address
) -> str:  # The same text in GitHub's Markdown
    "Turn the links of a cell, and drop what only a website reads: div fences and attributes."

    def change(prose: str) -> str:
        prose = re.sub(r"^:::.*\n?", "", prose, flags=re.MULTILINE)
        prose = re.sub(r"(\]\([^)\s]+\))\{[^}\n]*\}", r"\1", prose)
        prose = re.sub(
            r"^(#+ .*?)\s*\{[#.][^}\n]*\}$", r"\1", prose, flags=re.MULTILINE
        )
        links = r'(\]\(|\b(?:src|href)=")([^)\s"]+)'
        return re.sub(links, lambda m: m[1] + readme_link(m[2], address), prose)

    return outside_fences(text, change).strip("\n")


def readme_outputs(
    outputs: list,  # A code cell's outputs
    where: str,  # Which cell, for the message
) -> list:  # The ones that Markdown can show, as text
    "Keep a cell's outputs as text; a picture belongs into nbs/images/, with a link to it."
    kept = []
    for output in outputs:
        data = output.get("data", {})
        if output.output_type == "error" or output.get("name") == "stderr":
            fail(f"{where} stores an error or a warning")
        if (
            any(kind.startswith("image/") for kind in data)
            and "text/markdown" not in data
        ):
            fail(f"{where} stores a picture; save it under nbs/images/ and link to it")
        if data and not {"text/plain", "text/markdown"} & set(data):
            fail(f"{where} stores an output that has no text: {', '.join(data)}")
        if "text" in output:
            output["text"] = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", output["text"])
        output["data"] = {
            k: v for k, v in data.items() if k in ("text/plain", "text/markdown")
        }
        kept.append(output)
    return kept


def readme_text() -> str:  # README.md
    "Make README.md from the home page."
    import nbformat
    from nbconvert import MarkdownExporter

    settings = read_settings()
    address = site_address(settings)
    notebook = nbformat.read(ROOT / "nbs" / settings["readme_nb"], as_version=4)
    cells, titled = [], False
    for number, cell in enumerate(notebook.cells, 1):
        if cell.cell_type == "raw":  # Front matter
            continue
        if cell.cell_type == "markdown":
            if not titled and cell.source.lstrip().startswith("# "):
                titled = True  # nbdev reads `- key: value` lines below the title as front matter
                cell.source = re.sub(
                    r"^- \S+:.*\n?", "", cell.source, flags=re.MULTILINE
                )
                cell.source = re.sub(r"^(# .*)\n+(?=>)", r"\1\n\n", cell.source)
            cell.source = readme_markdown(cell.source, address)
        else:
            directives, cell.source = split_directives(cell.source)
            if {"hide", "default_exp", "export", "exporti"} & set(directives):
                continue
            if directives.get("include") == "false" or "nbdev_export()" in cell.source:
                continue
            cell.outputs = readme_outputs(
                cell.outputs, f"cell {number} of {settings['readme_nb']}"
            )
            if directives.get("output") == "false":
                cell.outputs = []
            if directives.get("echo") == "false":
                cell.metadata["transient"] = {"remove_source": True}
                if not cell.outputs:
                    continue
            elif not cell.source and not cell.outputs:
                continue
        if cell.cell_type == "markdown" and not cell.source:
            continue
        cells.append(cell)
    notebook.cells = cells
    notebook.metadata.setdefault("language_info", {"name": "python"})
    exporter = MarkdownExporter()
    exporter.display_data_priority = ["text/markdown", "text/plain"]
    text, _ = exporter.from_notebook_node(notebook)
    text = re.sub(r"^[ \t]+$", "", text, flags=re.MULTILINE)
    return (
        outside_fences(text, lambda s: re.sub(r"\n{3,}", "\n\n", s)).strip("\n") + "\n"
    )


def build_readme(
    check: bool,  # Compare, and write nothing
) -> None:
    "Write README.md, or say that it is out of date."
    path, text = ROOT / "README.md", readme_text()
    current = path.read_text(encoding="utf-8") if path.exists() else None
    if check and current is None:
        fail("there is no README.md; run `python scripts/docs.py readme`")
    if check and current != text:
        fail(
            "README.md differs from nbs/index.ipynb; run `python scripts/docs.py readme`"
        )
    if not check and current != text:
        path.write_text(text, encoding="utf-8", newline="\n")
    print("README.md is up to date")


def main() -> None:
    "Run the command."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("site", help="build the website into _docs/")
    readme = commands.add_parser("readme", help="write README.md from nbs/index.ipynb")
    readme.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if it differs"
    )
    arguments = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(
        0, str(ROOT)
    )  # The pages show this checkout, wherever the package is installed
    if arguments.command == "site":
        build_site()
    else:
        build_readme(arguments.check)


if __name__ == "__main__":
    main()
