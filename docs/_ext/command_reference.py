"""``.. commands::`` writes the reference of every ``teacher-cache`` command, grouped as in ``--help``."""

from __future__ import annotations

import re
from itertools import groupby
from typing import Any

import click
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from teacher_cache.pipeline.cli.app import app as teacher_cache
from teacher_cache.storage.cli.app import every_command

# click's words for values, in words that need no manual
_VALUES = {"TEXT": "VALUE", "INTEGER": "N"}


class Commands(SphinxDirective):
    """A section for each command: summary, example, arguments and options with their defaults."""

    def run(self) -> list[nodes.Node]:
        """Return a section for each group of commands. Docutils calls it."""
        panels = groupby(every_command(), lambda named: teacher_cache.entries[named[0].split()[0]].panel)
        return [self._section(panel, *(self._command(*named) for named in commands)) for panel, commands in panels]

    def _section(self, title: str, *content: nodes.Node) -> nodes.section:
        section = nodes.section("", nodes.title(text=title), *content, ids=[nodes.make_id(title)], names=[title])
        self.state.document.note_implicit_target(section, section)
        return section

    def _command(self, name: str, command: click.Command) -> nodes.section:
        example = f"{teacher_cache.name} {getattr(command, 'example', name)}"
        context = click.Context(command, info_name=name)
        options = nodes.definition_list(classes=["flags"])
        options += [_option(name, parameter, context) for parameter in command.get_params(context)]
        return self._section(
            name,
            *(nodes.paragraph(text=" ".join(part.split())) for part in (command.help or "").split("\n\n")),
            nodes.literal_block(example, example, language="sh"),
            options,
        )


def _option(command: str, parameter: click.Parameter, context: click.Context) -> nodes.definition_list_item:
    typed, described = parameter.get_help_record(context) or ("", "")
    flags, value = typed, ""
    if isinstance(parameter, click.Argument):
        flags, value = typed.strip("[]").replace("|", " or "), "" if parameter.required else "(optional)"
    elif " / " in typed:
        flags = typed.replace(" / ", ", ")
    elif " " in typed:
        flags, _, value = typed.rpartition(" ")
        value = re.sub(r", (?=[^,]*$)", " or ", _VALUES.get(value, value).strip("[]").replace("|", ", "))
    term = nodes.term("", "", nodes.literal(text=flags), ids=[nodes.make_id(f"{command} {parameter.name}")])
    term += nodes.Text(f" {value}" if value else "")
    text = re.sub(r"\s+\[required\]$", " Required.", described)
    if parameter.envvar:
        text += f" Environment variable: {parameter.envvar}."
    return nodes.definition_list_item("", term, nodes.definition("", nodes.paragraph(text=text)))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive. Sphinx calls it."""
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
