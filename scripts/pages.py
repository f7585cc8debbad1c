"""Finish the pages that smalldocs has rendered: links, figures, formulas and page tools.

Each function takes the HTML of a page and returns it changed. What is done here is what smalldocs
does not do: page names as nbdev's, figures as files of the right size, formulas as MathML, which
browsers show without a script, and links to open, edit and download the notebook of a page.
"""

import base64
import hashlib
import html
import re
import struct
from pathlib import Path

from latex2mathml.converter import convert

COLAB = "https://colab.research.google.com/github"


# ------------------------------------------------------------------ figures


def png_size(content: bytes) -> tuple[int, int]:
    """Return the width and height of a PNG in pixels, from its header."""
    return struct.unpack(">II", content[16:24])


def place_figures(page: str, folder: Path, widths: dict[str, int]) -> str:
    """Write a page's stored figures to files, and show each at the width it was drawn for.

    `widths` gives the width of a figure by the digest of its content; a figure that is not in it
    is shown at one CSS pixel for each of its own."""

    def place(match: re.Match) -> str:
        content = base64.b64decode(match[2])
        digest = hashlib.blake2b(content, digest_size=8).hexdigest()
        (folder / f"{digest}.png").write_bytes(content)
        width, height = png_size(content)
        shown = widths.get(digest, width)
        size = f'width="{shown}" height="{round(height * shown / width)}"'
        return f'{match[1]}src="{folder.name}/{digest}.png" {size} loading="lazy"'

    return re.sub(
        r'(<img [^>]*?)src="data:image/png;base64,([A-Za-z0-9+/=\s]+)"', place, page
    )


# ------------------------------------------------------------------ formulas


def render_formulas(page: str) -> str:
    """Turn the formulas of a page into MathML, and drop the scripts that would render them."""

    def render(match: re.Match) -> str:
        source = html.unescape(match[2]).strip()
        source = re.sub(r"^\\[(\[]|\\[)\]]$", "", source).strip()
        display = "block" if "display" in match[1] else "inline"
        return f'<span class="{match[1]}">{convert(source, display=display)}</span>'

    page = re.sub(
        r'<span class="(math (?:inline|display))">(.*?)</span>',
        render,
        page,
        flags=re.DOTALL,
    )
    page = re.sub(r"<link[^>]*katex[^>]*>\s*", "", page)
    return re.sub(r"<script[^>]*katex[^>]*>\s*</script>\s*", "", page)


# ------------------------------------------------------------------ page tools


def add_tools(page: str, notebook: str, repository: str, branch: str) -> str:
    """Add links below the title to open, download and edit the notebook of a page."""
    path = (
        f"{repository.removeprefix('https://github.com/')}/blob/{branch}/nbs/{notebook}"
    )
    links = (
        ("Open in Colab", f"{COLAB}/{path}", "play-circle", ""),
        ("Download notebook", f"notebooks/{notebook}", "download", " download"),
        ("Edit this page", f"{repository}/edit/{branch}/nbs/{notebook}", "pencil", ""),
    )
    items = "".join(
        f'<a href="{href}"{more}><i class="bi bi-{icon}" aria-hidden="true"></i> {text}</a>'
        for text, href, icon, more in links
    )
    tools = f'<nav class="page-tools" aria-label="This page">{items}</nav>'
    return re.sub(
        r"(<main\b.*?</header>)", rf"\1{tools}", page, count=1, flags=re.DOTALL
    )


# ------------------------------------------------------------------ links


def local_link(
    link: str,  # link of a page
    names: dict[str, str],  # pages by the name that smalldocs gave them
    address: str,  # address of the published site
    anchors: dict[str, set[str]],  # anchors of each page, by its new name
) -> str:
    """Point a link to a page, or to the published site, at the page of this site."""
    if link.startswith(address):
        link = link.removeprefix(address) or "./"
    path, mark, anchor = link.partition("#")
    path = names.get(path, path)
    # nbdev links a method to its own anchor, which exists only where the method is shown alone
    owner = anchor.rpartition(".")[0]
    if path in anchors and anchor not in anchors[path] and owner in anchors[path]:
        anchor = owner
    if path in anchors and anchor.startswith("_") and anchor not in anchors[path]:
        return path  # nbdev links private names too, which have no signature
    return path + mark + anchor


def anchors_of(page: str) -> set[str]:
    """List the anchors of a page."""
    return set(re.findall(r'\bid="([^"]+)"', page))


def turn_links(
    page: str, names: dict[str, str], address: str, anchors: dict[str, set[str]]
) -> str:
    """Point every link of a page at this site's pages."""
    return re.sub(
        r'((?:href|src)=")([^"]*)(")',
        lambda m: m[1] + local_link(m[2], names, address, anchors) + m[3],
        page,
    )
