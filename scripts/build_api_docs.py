"""Write docs/api.md, the reference of the packages, from their docstrings.

    python scripts/build_api_docs.py            write it
    python scripts/build_api_docs.py --check    exit code 1 if it is out of date

The sources are read, not imported, so that no optional dependency is needed and the result depends on
nothing else.
"""

import argparse
import ast
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs/api.md"
PACKAGES = ("guided_diffusion", "ldm", "evaluations")
INTRODUCTION = """# API reference

Made from the docstrings by `python scripts/build_api_docs.py`; edit those. Public modules, classes, methods
and functions that have one are listed; names with an underscore are the project's own affair.
"""


def build(root: Path = ROOT) -> str:
    """The whole page, in Markdown."""
    modules = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    pages = {}
    for path in modules:
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        page = "\n".join(describe_module(name, ast.parse(path.read_text())))
        if page:
            pages[name] = page
    contents = [f"- [{name}](#{name.replace('.', '').lower()})" for name in pages]
    return "\n".join([INTRODUCTION, *contents, "", *pages.values()])


def describe_module(name: str, tree: ast.Module) -> list[str]:
    """Lines on one module; none if it has nothing to say."""
    lines = list(paragraphs(tree))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and is_public(node):
            lines += describe_class(node)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and is_public(node):
            lines += describe_function(node, "###")
    return [f"## {name}", "", *lines] if lines else []


def describe_class(node: ast.ClassDef) -> list[str]:
    """Lines on a class, its constructor's signature, and its documented methods."""
    constructor = next((n for n in node.body if getattr(n, "name", "") == "__init__"), None)
    if constructor is not None:
        signature = arguments(constructor, skip=1)
    else:
        fields = [ast.unparse(n) for n in node.body if isinstance(n, ast.AnnAssign) and n.simple]
        signature = ", ".join(fields) if is_dataclass(node) else ""
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    lines = [
        f"### class {node.name}",
        "",
        "```python",
        f"class {node.name}({bases})" if bases else f"class {node.name}",
    ]
    if signature:
        lines.append(f"{node.name}({signature})")
    lines += ["```", "", *paragraphs(node)]
    for member in node.body:
        if isinstance(member, (ast.FunctionDef, ast.AsyncFunctionDef)) and is_public(member):
            lines += describe_function(member, "####", owner=node.name)
    return lines


def describe_function(node, level: str, owner: str = "") -> list[str]:
    """Lines on a function or method that has a docstring."""
    if not ast.get_docstring(node):
        return []
    decorators = {ast.unparse(d).split("(")[0] for d in node.decorator_list}
    skip = int(bool(owner) and "staticmethod" not in decorators)
    name = f"{owner}.{node.name}" if owner else node.name
    lines = [f"{level} {name}", ""]
    if "property" not in decorators:
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        lines += ["```python", f"{name}({arguments(node, skip)}){returns}", "```", ""]
    return [*lines, *paragraphs(node)]


def arguments(node, skip: int = 0) -> str:
    """The parameters as they are written, without the first `skip`."""
    given = node.args
    for names in (given.posonlyargs, given.args):
        dropped = min(skip, len(names))
        del names[:dropped]
        skip -= dropped
    del given.defaults[: max(0, len(given.defaults) - len(given.posonlyargs) - len(given.args))]
    return ast.unparse(given)


def is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(d) for d in node.decorator_list) or any(
        ast.unparse(base) == "NamedTuple" for base in node.bases
    )


def is_public(node) -> bool:
    return not node.name.startswith("_")


def paragraphs(node) -> Iterator[str]:
    """The docstring as text of its own; indented parts as code."""
    text = ast.get_docstring(node)
    if text:
        for line in inspect.cleandoc(text).splitlines():
            parts = line.split("`")  # outside of code, an angle bracket would begin a tag
            yield "`".join(part if k % 2 else part.replace("<", "&lt;") for k, part in enumerate(parts))
        yield ""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 if it is out of date"
    )
    text = build()
    if parser.parse_args().check:
        fresh = TARGET.exists() and TARGET.read_text() == text
        print(f"{TARGET.relative_to(ROOT)} is {'fresh' if fresh else 'out of date'}")
        return 0 if fresh else 1
    TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
