"""``.. commands::`` writes the reference of every ``teacher-cache`` command from its ``--help``."""

from __future__ import annotations

from typing import Any

import click
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from teacher_cache.pipeline.cli.app import app as teacher_cache
from teacher_cache.storage.cli.app import every_command


class Commands(SphinxDirective):
    """A section for each command: summary, usage, arguments and options with their defaults."""

    def run(self) -> list[nodes.Node]:
        """Return the sections. Docutils calls it."""
        return [self._command(name, command) for name, command in every_command()]

    def _command(self, name: str, command: click.Command) -> nodes.section:
        section = nodes.section(ids=[nodes.make_id(name)], names=[name])
        section += nodes.title(text=name)
        for paragraph in (command.help or "").split("\n\n"):
            section += nodes.paragraph(text=" ".join(paragraph.split()))
        context = click.Context(command, info_name=f"teacher-cache {name}", parent=None)
        usage = command.get_usage(context).removeprefix("Usage: ")
        section += nodes.literal_block(usage, usage, language="text")
        options = nodes.definition_list(classes=["flags"])
        for parameter in command.get_params(context):
            record = parameter.get_help_record(context)
            if record is not None:
                options += _option(nodes.make_id(f"{name} {parameter.name}"), *record, parameter.envvar)
        section += options
        if example := getattr(command, "example", ""):
            section += nodes.literal_block(example, f"{teacher_cache.name} {example}", language="sh")
        self.state.document.note_implicit_target(section, section)
        return section


def _option(anchor: str, typed: str, described: str, environment: Any) -> nodes.definition_list_item:
    term = nodes.term(ids=[anchor])
    term += nodes.literal(text=typed)
    if environment:
        described += f" [env: {environment}]"
    return nodes.definition_list_item("", term, nodes.definition("", nodes.paragraph(text=described)))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive. Sphinx calls it."""
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
