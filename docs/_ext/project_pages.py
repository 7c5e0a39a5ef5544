"""Pages that are made before the site is built, in ``docs/project/`` (not in git), and one rule for links.

README.md, ARCHITECTURE.md, CHANGELOG.md and the results in ``benchmarks/`` are copied there, and each module gets a
page of its docstrings. Links in all documents are written for the project's folders, as GitHub follows them. In the
site a link to a file that is a page leads to that page; one to any other file of the project becomes its path, as code.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

PROJECT = Path(__file__).resolve().parents[2]
DOCS = PROJECT / "docs"
COPIES = DOCS / "project"
COPIED = ("README.md", "ARCHITECTURE.md", "CHANGELOG.md", "benchmarks/**/*.md", "benchmarks/*.png")

_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\[\]]*)\]\((?P<target>[^()\s#]+)(?P<anchor>#[^()\s]*)?\)")


def make_pages() -> None:
    """Write the pages that changed. The others keep their time, so that Sphinx does not build them again."""
    pages = {COPIES / path.relative_to(PROJECT): path.read_bytes() for name in COPIED for path in PROJECT.glob(name)}
    pages |= {COPIES / "api" / f"{module}.md": _module_page(module).encode() for module in modules()}
    pages[COPIES / "modules.md"] = _list_of_modules().encode()
    for page in COPIES.rglob("*"):
        if page.is_file() and page not in pages:
            page.unlink()
    for page, content in pages.items():
        if not page.exists() or page.read_bytes() != content:
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_bytes(content)


def modules() -> list[str]:
    """Return the modules of ``storage`` and ``pipeline``; the commands have a reference of their own."""
    paths = sorted(path for name in ("storage", "pipeline") for path in (PROJECT / name).rglob("*.py"))
    names = [".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return [f"teacher_cache.{name}" for name in names if "cli" not in name.split(".") and "." in name]


def _module_page(module: str) -> str:
    # no entry in the sidebar: a hundred of them would be in every page
    return f"---\norphan: true\n---\n\n# {module}\n\n```{{eval-rst}}\n.. automodule:: {module}\n```\n"


def _list_of_modules() -> str:
    lines = []
    for module in modules():
        path = PROJECT.joinpath(*module.split(".")[1:])
        code = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        summary = (ast.get_docstring(ast.parse(code.read_text())) or "").partition("\n\n")[0]
        lines.append(f"- {{py:mod}}`{module}`: {' '.join(summary.split()).replace('``', '`').rstrip('.:')}")
    return "# All modules\n\n" + "\n".join(lines) + "\n"


def lead_links(app: Sphinx, docname: str, source: list[str]) -> None:
    """Rewrite the links of one document for the site."""
    page = DOCS / f"{docname}.md"
    original = PROJECT / page.relative_to(COPIES) if page.is_relative_to(COPIES) else page

    def lead(link: re.Match[str]) -> str:
        target = link["target"]
        if "://" in target or target.startswith("mailto:"):
            return link[0]
        path = Path(os.path.normpath(original.parent / target))
        place = path if path.is_relative_to(DOCS) else COPIES / path.relative_to(PROJECT)
        if place.is_file():
            return f"{link['image']}[{link['text']}]({os.path.relpath(place, page.parent)}{link['anchor'] or ''})"
        name, text = path.relative_to(PROJECT), link["text"]
        return f"`{name}`" if text.strip("`/") in target else f"{text} (`{name}`)"

    # code is left as it is
    parts = re.split(r"(^```.*?^```)", source[0], flags=re.MULTILINE | re.DOTALL)
    source[0] = "".join(part if part.startswith("```") else _LINK.sub(lead, part) for part in parts)


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect to Sphinx, which calls it."""
    make_pages()  # before it looks for documents
    app.connect("source-read", lead_links)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
