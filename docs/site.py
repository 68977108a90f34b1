"""What MkDocs adds to the pages in docs/: the README, the patches and CONTRIBUTING as pages, and one page per module.

Links are written for a reader of the repository. On the site, those to a page lead to that page, [`name`](file.py) leads
to the name's entry in the reference, and what lies outside the site (configurations, patches) is shown as text.
"""

import os.path
import re
from pathlib import Path

from griffe import Extension
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
COPIES = {"README.md": "index.md", "patches/README.md": "patches.md", "CONTRIBUTING.md": "contributing.md"}
PACKAGES = ("guided_diffusion", "guided_diffusion/mt", "ldm", "evaluations")
LINK = re.compile(r"(?<!!)\[(?P<label>[^\]\[]*)\]\((?P<target>(?!\w+:|#)[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
CODE = re.compile(r"(`[^`]*`|^ {4}.*$)", re.MULTILINE)
IMAGE = re.compile(r"(!\[[^\]]*\]\()docs/")


def modules():
    """{package: [dotted module]}; a module belongs to the longest package that holds it."""
    found = {package.replace("/", "."): [] for package in PACKAGES}
    for file in sorted(
        path for top in ("guided_diffusion", "ldm", "evaluations") for path in (ROOT / top).rglob("*.py")
    ):
        parts = file.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        if file.stat().st_size:  # not the empty __init__.py
            found[max((p for p in found if f"{name}.".startswith(f"{p}.")), key=len)].append(name)
    return found


def on_config(config):
    """Append the reference to the navigation."""
    pages = [
        {package: [{name.removeprefix(f"{package}."): f"reference/{name}.md"} for name in names]}
        for package, names in modules().items()
    ]
    config.nav.append({"API reference": pages})


def on_files(files, config):
    """Add the pages that are not in docs/."""
    for source, target in COPIES.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text()))
    for name in (name for names in modules().values() for name in names):
        files.append(File.generated(config, f"reference/{name}.md", content=f"::: {name}\n"))
    return files


def on_page_markdown(markdown, page, config, files):
    """Lead the links of the repository to the pages of the site."""
    here = next(
        (source for source, target in COPIES.items() if target == page.file.src_uri),
        f"docs/{page.file.src_uri}",
    )

    def lead(match):
        path = os.path.normpath(os.path.join(os.path.dirname(here), match["target"]))
        target = COPIES.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(target):
            relative = os.path.relpath(target, os.path.dirname(page.file.src_uri) or ".")
            return f"[{match['label']}]({relative}{match['anchor'] or ''})"
        module = path.removesuffix(".py").replace("/", ".")
        if path.endswith(".py") and files.get_file_from_path(f"reference/{module}.md"):
            name = re.fullmatch(r"`([\w.]+)`", match["label"])
            entry = f"{module}.{name[1]}".removesuffix(".__init__") if name else module
            return f"[{match['label']}][{entry}]"
        return match["label"]

    return LINK.sub(lead, IMAGE.sub(r"\1", markdown))


class PlainBrackets(Extension):
    """Brackets in docstrings are shapes and ranges, never links."""

    def on_object(self, *, obj, **_):
        if obj.docstring:
            parts = CODE.split(obj.docstring.value)  # every second one is code
            parts[::2] = [re.sub(r"[\[\]]", r"\\\g<0>", text) for text in parts[::2]]
            obj.docstring.value = "".join(parts)
