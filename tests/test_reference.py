"""The API reference of the site against the code.

Every public function, class and patched method has a signature on the page of its notebook. It shows each
parameter with its own comment and the result with its own, as the code has them. The pages are those of the
session-wide `site` fixture.
"""

import ast
import html
import importlib
import inspect
import re
from pathlib import Path

import pytest
from project import NOTEBOOKS, ROOT, cells
from test_site import page_name

pytestmark = pytest.mark.slow  # the site is built first

PACKAGE = ROOT / "era_s10"
Function = ast.FunctionDef


def module_path(notebook: Path) -> Path | None:
    "Return the module that a notebook exports, if it exports one."
    for cell in cells(notebook):
        found = re.match(r"#\|\s*default_exp\s+([\w.]+)", cell["source"])
        if found:
            return PACKAGE / f"{found[1].replace('.', '/')}.py"
    return None


def public_definitions(path: Path) -> dict[str, ast.AST]:
    "Return the public functions, classes and patched methods of a module by qualified name."
    found = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            patched = any("patch" in ast.unparse(d) for d in node.decorator_list)
            owner = f"{ast.unparse(node.args.args[0].annotation)}." if patched else ""
            found[owner + node.name] = node
    return found


REFERENCE = {
    f"{notebook.stem}:{name}": (page_name(notebook), name, node)
    for notebook in NOTEBOOKS
    if (path := module_path(notebook)) is not None and path.exists()
    for name, node in public_definitions(path).items()
}


def find(name: str) -> object:
    "Return the object that a key of REFERENCE names."
    notebook, _, qualified = name.partition(":")
    path = next(module_path(n) for n in NOTEBOOKS if n.stem == notebook)
    module = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    return getattr(importlib.import_module(module), qualified)


def signature(page: str, name: str) -> str:
    "Return the text of the first code block below the heading of a name."
    start = re.search(rf'<h\d id="{re.escape(name.lower())}"', page)
    assert start, f"{name} has no heading"
    block = re.search(r"<pre\b.*?</pre>", page[start.start() :], flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", "", block[0])).strip()


def parameters(node: Function) -> list[ast.arg]:
    "Return the parameters of a function, without self and cls."
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    named += [a for a in (arguments.vararg, arguments.kwarg) if a]
    return [a for a in named if a.arg not in ("self", "cls")]


def fields(node: ast.ClassDef) -> list[str]:
    "Return the annotated fields of a class."
    return [n.target.id for n in node.body if isinstance(n, ast.AnnAssign)]


def constructor(node: ast.AST) -> Function | None:
    "Return the function whose parameters the signature shows."
    if isinstance(node, Function):
        return node
    return next((n for n in node.body if getattr(n, "name", "") == "__init__"), None)


def has_comment(text: str, name: str) -> bool:
    "Return whether the line of a parameter or field carries a comment."
    return bool(
        re.search(rf"^\s*\*{{0,2}}{name}\b[^#\n]*#\s*\S", text, flags=re.MULTILINE)
    )


@pytest.fixture(scope="session")
def pages(site) -> dict[str, str]:
    "The HTML of every page."
    return {path.name: path.read_text(encoding="utf-8") for path in site.glob("*.html")}


@pytest.mark.parametrize("name", REFERENCE)
def test_a_signature_shows_each_parameter_with_its_comment(name, pages):
    page, qualified, node = REFERENCE[name]
    text = signature(pages[page], qualified)
    function = constructor(node)
    if function is None:
        if not any(
            ast.unparse(base) in ("dict", "list", "IntEnum") for base in node.bases
        ):
            shown = [field for field in fields(node) if not field.startswith("_")]
            assert not [field for field in shown if not has_comment(text, field)]
        return
    wanted = parameters(function)
    names = [a.arg for a in wanted]
    if any("command(" in ast.unparse(d) for d in getattr(node, "decorator_list", ())):
        wanted = [a for a in wanted if a is not function.args.kwarg]
        names = list(inspect.signature(find(name)).parameters)  # **options written out
    missing = [one for one in names if not has_comment(text, one)]
    assert not missing, f"no comment for {missing} in\n{text}"
    for argument in wanted:  # annotations are complete
        if argument.annotation is not None:
            annotation = re.sub(r"\s", "", ast.unparse(argument.annotation)).replace(
                "'", '"'
            )
            assert annotation in re.sub(r"\s", "", text), argument.arg
    result = ast.unparse(function.returns) if function.returns else "None"
    shown = isinstance(node, Function) and "@property" not in text
    if shown and result not in ("None", "Self", "Iterator[None]"):
        commented = re.search(r"\) *->[^#]*:\s*#\s*\S", text)
        assert commented, f"no comment for the result in\n{text}"


def test_no_signature_shows_names_of_the_notebook_or_empty_arguments(pages):
    for name, page in pages.items():
        assert "__main__." not in page, name
        assert "*args, **kwargs" not in html.unescape(re.sub(r"<[^>]+>", "", page)), (
            name
        )
