"""``.. commands::`` writes the reference of every ``teacher-cache`` command from what its ``--help`` says."""

from __future__ import annotations

from typing import Any

import typer
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from teacher_cache.pipeline.cli.app import app as teacher_cache


class Commands(SphinxDirective):
    """A section for each command: what it does, how it is called, arguments and flags with their defaults."""

    def run(self) -> list[nodes.Node]:
        """Called by docutils where the directive stands."""
        group: Any = typer.main.get_command(teacher_cache)
        return [self._command(name, group.commands[name]) for name in group.commands]

    def _command(self, name: str, command: Any) -> nodes.section:
        section = nodes.section(ids=[nodes.make_id(name)], names=[name])
        section += nodes.title(text=name)
        for paragraph in (command.help or "").split("\n\n"):
            section += nodes.paragraph(text=" ".join(paragraph.split()))
        context = command.make_context(f"teacher-cache {name}", [], resilient_parsing=True)
        usage = command.get_usage(context).removeprefix("Usage: ")
        section += nodes.literal_block(usage, usage, language="text")
        flags = nodes.definition_list(classes=["flags"])
        for parameter in command.get_params(context):
            record = parameter.get_help_record(context)
            if record is not None:
                anchor = nodes.make_id(f"{name} {parameter.name}")
                flags += _flag(anchor, *record, getattr(parameter, "envvar", None))
        section += flags
        self.state.document.note_implicit_target(section, section)
        return section


def _flag(anchor: str, typed: str, said: str, environment: str | None) -> nodes.definition_list_item:
    term = nodes.term(ids=[anchor])
    term += nodes.literal(text=typed)
    if environment and environment not in said:
        said += f" [env: {environment}]"
    return nodes.definition_list_item("", term, nodes.definition("", nodes.paragraph(text=said)))


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
