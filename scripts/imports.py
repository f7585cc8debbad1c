"""Write the diagram of imports into CONTRIBUTING.md.

python scripts/imports.py          write it
python scripts/imports.py --check  exit with status 1 if it is out of date or if there is a cycle
"""

import ast
import re
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, PAGE = ROOT / "era_s10", ROOT / "CONTRIBUTING.md"
MARK = "<!-- imports -->"


def absolute(node: ast.ImportFrom, parents: list[str]) -> str:
    """Return the module of the package that a statement imports from, or ""."""
    if node.level == 0:
        prefix = f"{PACKAGE.name}."
        return (
            node.module.removeprefix(prefix) if node.module.startswith(prefix) else ""
        )
    return ".".join([*parents[: len(parents) + 1 - node.level], node.module])


def imports() -> dict[str, set[str]]:
    """Return, for each module, the modules of the package that it imports at its top."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name in ("__init__.py", "_modidx.py"):
            continue
        name = path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
        parents = name.split(".")[:-1]
        found[name] = set()
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                found[name].add(absolute(node, parents))
        found[name] -= {"", name}
    return found


def layers(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the modules in layers: a module imports only from the layers before its own."""
    sorter, found = TopologicalSorter(graph), []
    sorter.prepare()
    while sorter.is_active():
        ready = sorted(sorter.get_ready())
        found.append(ready)
        sorter.done(*ready)
    return found


def diagram() -> str:
    """Return the layers as text, the first at the bottom."""
    found = layers(imports())
    lines = [
        f"{len(found) - i:2d}  {'  '.join(layer)}"
        for i, layer in enumerate(reversed(found))
    ]
    return "\n".join(["```", *lines, "```"])


def main() -> None:
    """Write or check the diagram."""
    try:
        text = diagram()
    except CycleError as error:
        sys.exit(f"imports.py: modules import each other: {' -> '.join(error.args[1])}")
    page = PAGE.read_text(encoding="utf-8")
    wanted = re.sub(
        rf"{MARK}\n+(?:```.*?```\n+)?", f"{MARK}\n\n{text}\n\n", page, flags=re.DOTALL
    )
    if "--check" in sys.argv and page != wanted:
        sys.exit(
            "imports.py: CONTRIBUTING.md is out of date; run `python scripts/imports.py`"
        )
    PAGE.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
