"""Build the website and README.md from the notebooks, with packages that pip installs.

python scripts/docs.py site            nbs/ -> _proc/ (nbdev) -> _docs/ (smalldocs, pages.py)
python scripts/docs.py readme          nbs/index.ipynb -> README.md (nbconvert)
python scripts/docs.py readme --check  exit with status 1 if README.md is out of date

The site that this script builds is the one that is tested and published. `nbdev_docs` builds a
similar one from the same _quarto.yml where Quarto is installed; pages and anchors have the same names.
"""

import argparse
import base64
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pages
from readme import page_name, read_settings, readme_text, site_address

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```.*?^```", flags=re.DOTALL | re.MULTILINE)
NESTED = re.compile(r"\[\[(`[^`\n]+`)\]\([^)\s]*\)\]\(([^)\s]*)\)")  # a link in a link
QUARTO_ONLY = (  # keys that smalldocs does not read, and does not need
    "output-file is not read by smalldocs",
    "respect-user-color-scheme is ignored",
    "grid is ignored",
)


def fail(reason: str) -> None:
    """Exit with status 1 and a reason."""
    sys.exit(f"docs.py: {reason}")


# ---------------------------------------------------------------- the site


@contextmanager
def own_signatures() -> Iterator[None]:
    """Have nbdev show signatures with `signatures.SourceRenderer` inside the block."""
    from nbdev.config import get_config

    before = os.environ.get("XDG_CONFIG_HOME")
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder, "nbdev", "settings.ini")
        settings.parent.mkdir()
        settings.write_text("[DEFAULT]\nrenderer = signatures.SourceRenderer\n")
        os.environ["XDG_CONFIG_HOME"] = folder  # nbdev reads user settings from there
        get_config.cache_clear()
        try:
            yield
        finally:
            get_config.cache_clear()
            os.environ.pop("XDG_CONFIG_HOME")
            if before is not None:
                os.environ["XDG_CONFIG_HOME"] = before


def preprocess() -> Path:
    """Run nbdev's preprocessing from nbs/ into _proc/, and return that folder.

    It adds signatures and removes hidden cells."""
    hidden = [part for part in ROOT.parts if part.startswith(".")]
    if hidden:
        fail(f"nbdev skips folders below {hidden[0]!r}; move the checkout elsewhere")
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs

    refresh_quarto_yml()
    problems, folder = [], ROOT / "_proc"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            with own_signatures():
                proc_nbs(force=True, n_workers=0)
        except Exception as error:  # nbdev names the cell
            problems = [f"{error}\n{error.__cause__!r}"]
    mixed = [
        str(w.message) for w in caught if "imports and other code" in str(w.message)
    ]
    if mixed or problems:
        reason = (
            "the site build runs only cells that import or export; put each import in a cell of "
            "its own, and use only exported names in exported cells:\n"
        )
        fail(reason + "\n".join(mixed + problems))
    if not list(folder.glob("*.ipynb")):
        fail(f"nbdev left no notebook in {folder}")
    return folder


def adapt_cells(folder: Path) -> None:
    """Fold the exported source below each signature; drop links inside code and links.

    nbdev leaves the source open, and links names in backticks wherever they are, such as in the
    comments of signatures and in the text of a link."""
    for path in folder.glob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            cell.source = cell.source.replace(
                "#| code-fold: show", "#| code-fold: true"
            )
            if cell.cell_type == "markdown":
                cell.source = NESTED.sub(r"[\1](\2)", cell.source)
            for output in cell.get("outputs", []):
                data = output.get("data", {})
                if "text/markdown" in data:
                    text = "".join(data["text/markdown"])
                    text = NESTED.sub(r"[\1](\2)", text)
                    data["text/markdown"] = FENCE.sub(unlink, text)
        nbformat.write(notebook, path)


def unlink(block: re.Match) -> str:
    """Replace the links in a block of code by their text."""
    return re.sub(r"\[(`[^`\n]+`)\]\([^)\s]+\)", r"\1", block[0])


def figure_widths(folder: Path) -> dict[str, int]:
    """Return the width in CSS pixels of each stored figure, by the digest of its content."""
    widths = {}
    for path in folder.glob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for output in cell.get("outputs", []):
                png = output.get("data", {}).get("image/png")
                size = output.get("metadata", {}).get("image/png", {})
                if png and "width" in size:
                    content = base64.b64decode("".join(png))
                    widths[hashlib.blake2b(content, digest_size=8).hexdigest()] = size[
                        "width"
                    ]
    return widths


def finish_pages(site: Path, folder: Path, settings: dict[str, str]) -> None:
    """Give the pages nbdev's names, and finish them with what `pages` adds."""
    address, repository = site_address(settings), settings["git_url"]
    notebooks = {p.with_suffix(".html").name: p.name for p in folder.glob("*.ipynb")}
    names = {page: page_name(page) for page in notebooks}
    found = {p.name: p.read_text(encoding="utf-8") for p in site.glob("*.html")}
    anchors = {
        names.get(old, old): pages.anchors_of(page) for old, page in found.items()
    }
    widths = figure_widths(folder)
    (site / "figures").mkdir()
    (site / "notebooks").mkdir()
    for old, page in found.items():
        page = pages.turn_links(page, names, address, anchors)
        page = pages.place_figures(page, site / "figures", widths)
        page = pages.render_formulas(page)
        if old in notebooks:
            page = pages.add_tools(page, notebooks[old], repository, settings["branch"])
            shutil.copy(ROOT / "nbs" / notebooks[old], site / "notebooks")
        (site / old).unlink()
        (site / names.get(old, old)).write_text(page, encoding="utf-8")
    entries = json.loads((site / "search.json").read_text(encoding="utf-8"))
    for entry in entries:
        link = pages.local_link(entry["href"], names, address, anchors)
        entry["objectID"] = entry["href"] = link
    (site / "search.json").write_text(
        json.dumps(entries, ensure_ascii=False), encoding="utf-8"
    )
    if (site / "sitemap.xml").exists():
        text = (site / "sitemap.xml").read_text(encoding="utf-8")
        for old, new in names.items():
            text = text.replace(f"{address}{old}<", f"{address}{new}<")
        (site / "sitemap.xml").write_text(text, encoding="utf-8")


def build_site() -> None:
    """Build the website into the folder that settings.ini names."""
    from smalldocs.site import build

    settings = read_settings()
    folder = preprocess()
    adapt_cells(folder)
    found = build(folder, quiet=True).warnings
    found = [text for text in found if not text.endswith(QUARTO_ONLY)]
    if found:
        fail("smalldocs reports problems:\n" + "\n".join(found))
    built, site = folder / settings["doc_path"], ROOT / settings["doc_path"]
    finish_pages(built, folder, settings)
    (built / ".nojekyll").touch()
    shutil.rmtree(site, ignore_errors=True)
    shutil.move(built, site)
    print(f"{len(list(site.glob('*.html')))} pages in {site.relative_to(ROOT)}/")


# ---------------------------------------------------------------- README.md


def build_readme(check: bool) -> None:
    """Write README.md, or exit with status 1 if it is out of date."""
    path, text = ROOT / "README.md", readme_text()
    current = path.read_text(encoding="utf-8") if path.exists() else None
    if check and current != text:
        fail("README.md is out of date; run `python scripts/docs.py readme`")
    if current != text:
        path.write_text(text, encoding="utf-8", newline="\n")
    print("README.md is up to date")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("site", help="build the website into _docs/")
    readme = commands.add_parser("readme", help="write README.md from nbs/index.ipynb")
    readme.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))  # the site shows this checkout, not an installed one
    if arguments.command == "site":
        build_site()
    else:
        build_readme(arguments.check)


if __name__ == "__main__":
    main()
