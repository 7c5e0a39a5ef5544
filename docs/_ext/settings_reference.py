"""Additions to autodoc: fields of pydantic models with their descriptions, trees in module docstrings, and colons."""

from __future__ import annotations

import inspect
from typing import Any

from pydantic import BaseModel
from sphinx.application import Sphinx
from sphinx.util.typing import stringify_annotation


def describe_fields(app: Sphinx, what: str, name: str, member: Any, options: Any, lines: list[str]) -> None:
    """Append the described fields of a model to its docstring."""
    if not (inspect.isclass(member) and issubclass(member, BaseModel)):
        return
    described = {key: field for key, field in member.model_fields.items() if field.description}
    if described:
        lines += ["", ".. rubric:: Fields", ""]
    for key, field in described.items():
        kind = stringify_annotation(field.annotation, "smart").replace("~", "").replace("typing.", "")
        default = "required"
        if not field.is_required():
            default = f"default ``{field.get_default(call_default_factory=True)!r}``"
        text = " ".join(str(field.description).split()).replace("*", r"\*").replace("|", r"\|").replace("`", r"\`")
        lines += [f"``{key}`` (``{kind}``, {default})", f"    {text}", ""]


def leave_signature_out(app: Sphinx, what: str, name: str, member: Any, *rest: Any) -> tuple[str, None] | None:
    """Return an empty signature for a model whose fields are listed below it."""
    if inspect.isclass(member) and issubclass(member, BaseModel):
        return ("", None) if any(field.description for field in member.model_fields.values()) else None
    return None


def keep_trees(app: Sphinx, what: str, name: str, member: Any, options: Any, lines: list[str]) -> None:
    """Show the indented blocks of a module's docstring, such as trees of files, as they are typed."""
    if what != "module":
        return
    inside, out = False, []
    for number, line in enumerate(lines):
        indented = line.startswith("    ")
        if indented and not inside and number and not lines[number - 1].strip():
            out += ["::", ""]
        inside = indented or (inside and not line.strip())
        out.append(line)
    lines[:] = out


def keep_colons(app: Sphinx, what: str, name: str, member: Any, options: Any, lines: list[str]) -> None:
    """Keep napoleon from taking the words before the first colon of a property or constant for its type."""
    if what in ("attribute", "data", "property"):
        lines.insert(0, "\\")  # it looks for a type in the first line only; this one is empty for docutils


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect to Sphinx, which calls it."""
    for keep in (keep_trees, keep_colons):
        app.connect("autodoc-process-docstring", keep, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", describe_fields)
    app.connect("autodoc-process-signature", leave_signature_out)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
