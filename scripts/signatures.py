"""Show the signature of a public name on the site as its source writes it.

nbdev's own renderer rebuilds a signature from the live object. That loses comments where an
annotation spans lines, shortens generic types, writes `__main__.` before a notebook's own classes,
and shows a NamedTuple as `*args, **kwargs`. This one reads the exported module instead.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from pathlib import Path

from fastcore.docments import docments
from nbdev.showdoc import BasicMarkdownRenderer

PACKAGE = Path(__file__).resolve().parent.parent / "era_s10"
Definition = ast.FunctionDef | ast.ClassDef


@cache
def modules() -> list[tuple[str, ast.Module]]:
    """Parse every exported module, and return each source with its syntax tree."""
    paths = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "_modidx.py")
    sources = [path.read_text(encoding="utf-8") for path in paths]
    return [(source, ast.parse(source)) for source in sources]


def patched_class(node: ast.AST) -> str | None:
    """Return the class that a function is patched into, if it is."""
    decorators = [ast.unparse(d) for d in getattr(node, "decorator_list", [])]
    if not any(d.startswith("patch") for d in decorators):
        return None
    return ast.unparse(node.args.args[0].annotation)


def members(tree: ast.Module) -> list[tuple[str, Definition]]:
    """List the functions, classes and methods of a module by their qualified names."""
    found = []
    for node in tree.body:
        if not isinstance(node, Definition):
            continue
        owner = patched_class(node)
        found.append((f"{owner}.{node.name}" if owner else node.name, node))
        if isinstance(node, ast.ClassDef):
            methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
            found += [(f"{node.name}.{method.name}", method) for method in methods]
    return found


def find(name: str, docstring: str | None) -> tuple[str, Definition] | None:
    """Return the source and the node of a public name; a docstring tells namesakes apart."""
    candidates = [
        (source, node)
        for source, tree in modules()
        for qualified, node in members(tree)
        if qualified == name
    ]
    same = [c for c in candidates if ast.get_docstring(c[1]) == docstring]
    return (same or candidates or [None])[0]


def function_header(source: str, node: ast.FunctionDef) -> str:
    """Return a function from `def` to its colon, with the comments of its parameters."""
    lines = source.splitlines()[node.lineno - 1 : node.body[0].lineno - 1]
    return textwrap.dedent("\n".join(lines)).rstrip()


def field_lines(source: str, node: ast.ClassDef) -> list[str]:
    """Return the annotated fields of a dataclass or NamedTuple, with their comments."""
    lines, kept = source.splitlines(), []
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign):
            first = statement.lineno - 1
            while lines[first - 1].lstrip().startswith("#"):
                first -= 1
            kept += lines[first : statement.end_lineno]
    return [line for line in textwrap.dedent("\n".join(kept)).splitlines() if line]


def class_header(source: str, node: ast.ClassDef) -> str:
    """Return a class with its constructor, or with its fields where it has none."""
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    head = f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    constructors = [n for n in node.body if getattr(n, "name", None) == "__init__"]
    if constructors:
        body = function_header(source, constructors[0]).splitlines()
    else:
        body = field_lines(source, node)
    decorators = [f"@{ast.unparse(d)}" for d in node.decorator_list]
    return "\n".join([*decorators, head, *(f"    {line}" for line in body)])


def signature(name: str, docstring: str | None) -> str | None:
    """Return the signature of a public name as its source writes it."""
    found = find(name, docstring)
    if found is None:
        return None
    source, node = found
    if isinstance(node, ast.ClassDef):
        return class_header(source, node)
    decorators = [ast.unparse(d) for d in node.decorator_list]
    shown = [
        f"@{d}" for d in decorators if d in ("property", "contextmanager", "cache")
    ]
    shown += ["@property"] if "patch(as_prop=True)" in decorators else []
    shown += ["@classmethod"] if "patch(cls_method=True)" in decorators else []
    return "\n".join([*shown, function_header(source, node)])


def shared_header(function: Callable) -> str:
    """Return the header of a command, with the options that `share_options` adds."""
    comments, found = docments(function), inspect.signature(function)
    lines = [
        f"    {one},  # {comments[name]}" for name, one in found.parameters.items()
    ]
    return "\n".join([f"def {function.__name__}(", *lines, ") -> None:"])


class SourceRenderer(BasicMarkdownRenderer):
    """nbdev's heading and link to the source, with the signature from the source."""

    def _repr_markdown_(self) -> str:
        name = getattr(self.sym, "__qualname__", self.nm).removeprefix("__main__.")
        fget = getattr(self.sym, "fget", None)  # a property
        name = self.nm if fget is not None else name
        docstring = inspect.getdoc(fget or self.sym)
        text = signature(name, docstring) or signature(self.nm, docstring)
        if hasattr(self.sym, "__delwrap__"):
            text = shared_header(self.sym)
        usual = super()._repr_markdown_()
        if text is None:
            return usual
        head = usual.split("```python", 1)[0]
        return f"{head}```python\n{text}\n```\n\n{docstring or ''}"
