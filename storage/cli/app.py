"""The ``teacher-cache`` command group. No torch.

The group knows the name, module and summary of every command. A module is imported when one of its commands runs or
shows its help, so that ``info`` and ``--help`` import only what they use.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from string import digits
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from teacher_cache.storage.cli.tables import Part, output_width
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.files.places import CACHE, MANIFEST_KEY, REGISTRY, kind_of, misplaced, typed_as
from teacher_cache.storage.observe.logs import say
from teacher_cache.storage.observe.safe_text import escaped_json, shown

if TYPE_CHECKING:
    from click.types import OptionHelpExtra
    from pydantic import BaseModel

PANELS = ("Cache", "Look inside", "Student", "Ship", "Operate")
HELP_WIDTH = 100  # columns

_Callback = Callable[..., Any]
_F = TypeVar("_F", bound=_Callback)
_M = TypeVar("_M", bound="BaseModel")


class Argument(click.Argument):
    """An argument that ``--help`` describes."""

    def __init__(self, names: list[str], described: str = "", **settings: Any) -> None:
        super().__init__(names, **settings)
        self.described = described

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        """Return the name and the description, for the help and the documentation site."""
        return self.make_metavar(ctx), self.described


class Command(click.Command):
    """A command whose help lists arguments and options apart, followed by an example."""

    def __init__(self, *args: Any, example: str = "", **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.example = example

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words after the command. A path in the place of an option is answered with its option."""
        ctx.allow_extra_args = True
        typed = list(args)  # parsing takes words away
        try:
            order = self.make_parser(ctx).parse_args([*args])[2]
            extra = super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            name = error.option_name.lstrip("-").replace("-", "_")
            if any(isinstance(param, click.Argument) and param.name == name for param in self.params):
                placed = f"{ctx.command_path} {name.upper()}"
                message = f"No such option {error.option_name!r}. It stands without a flag: {placed}"
                raise click.UsageError(message, ctx) from error
            raise
        for param, times in Counter(order).items():
            if times > 1 and isinstance(param, click.Option) and not (param.multiple or param.is_flag):
                raise click.UsageError(f"{param.opts[0]} is given twice; it takes one value", ctx)
        if extra:
            pattern = _before_expansion([word for word in typed if Path(word).suffix == Path(extra[0]).suffix != ""])
            if not pattern and (advice := typed_as(extra[0], [str(param.name) for param in self.params])):
                raise UsageError(advice)
            advice = f"; did the shell expand a pattern? Quote it: '{pattern}'" if pattern else ""
            raise click.UsageError(f"Unexpected words: {' '.join(extra)}{advice}", ctx)
        return extra

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the parameters, arguments first."""
        for title, kind in (("Arguments", click.Argument), ("Options", click.Option)):
            records = (param.get_help_record(ctx) for param in self.get_params(ctx) if isinstance(param, kind))
            if rows := [record for record in records if record is not None]:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the example in one line, as it is typed."""
        if self.example:
            formatter.write(f"\nExample: teacher-cache {self.example}\n")


def _before_expansion(words: list[str]) -> str:
    """Return the pattern that a shell expanded to these words. Empty: fewer than two words."""
    if len(words) < 2:
        return ""
    before, ending = os.path.commonprefix(words).rstrip(digits), Path(words[0]).suffix  # noqa: RUF071 - of texts
    names = [word[len(before) : -len(ending)] for word in words]
    counted = ending != ".cache" and all(map(str.isdecimal, names)) and int(names[-1]) - int(names[0]) == len(names) - 1
    return before + (f"{{{names[0]}..{names[-1]}}}" if counted else "*") + ending


class _Entry(NamedTuple):
    panel: str
    module: str
    summary: str


class Option(click.Option):
    """An option whose help does not show click's notation of ranges and defaults."""

    def get_help_extra(self, ctx: click.Context) -> OptionHelpExtra:
        """Return what click adds to the description: only that the option is required."""
        extra = super().get_help_extra(ctx)
        return {"required": extra["required"]} if "required" in extra else {}


def _in_another_group(ctx: click.Context, name: str) -> str:
    """Return ``It is teacher-cache student mean.`` for a command of a group beside this one, or an empty text."""
    root = ctx.find_root()
    assert isinstance(root.command, click.Group)
    for group in root.command.list_commands(root):
        command = root.command.get_command(root, group)
        if isinstance(command, click.Group) and name in command.list_commands(root):
            return f"It is teacher-cache {group} {name}."
    return ""


class Group(click.Group):
    """Commands in panels, imported on demand."""

    command_class = Command

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.entries: dict[str, _Entry] = {}

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words after the group. ``help`` and ``version`` stand for the options of these names."""
        if args and args[0] in ("help", "version"):
            args = [*args[1:], f"--{args[0]}"]
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if ctx.parent is None:
                raise
            message = f"No such option {error.option_name!r}. {self._first_a_command(ctx)}"
            raise click.UsageError(message, ctx) from error

    def _first_a_command(self, ctx: click.Context) -> str:
        return f"A command stands first: {ctx.command_path} {' or '.join(self.list_commands(ctx))}"

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the command to begin with."""
        if "demo" in self.entries:
            formatter.write("\nBegin with: teacher-cache demo\n")

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands, panel by panel."""
        return [*sorted(self.entries, key=lambda name: PANELS.index(self.entries[name].panel)), *self.commands]

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Ctrl-C prints one line if the command does not handle it."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            say("stopped")
            ctx.exit(1)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of a command and return the command."""
        entry = self.entries.get(cmd_name)
        if entry is None:
            return super().get_command(ctx, cmd_name)
        members = vars(import_module(entry.module)).values()
        command = next(member for member in members if isinstance(member, click.Command) and member.name == cmd_name)
        if not (command.help or "").startswith(entry.summary):
            command.help = f"{entry.summary}\n\n{command.help or ''}".strip()
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or suggest a similar name."""
        name = args[0]
        if not name.startswith("-") and not ctx.resilient_parsing and self.get_command(ctx, name) is None:
            similar = get_close_matches(name, self.list_commands(ctx), n=1)
            hint = _in_another_group(ctx, name) or (f"Did you mean {similar[0]!r}?" if similar else "")
            for place in (name, f"{name}/students"):
                if kind_of(place) == REGISTRY:
                    hint = f"Write teacher-cache students list {place}"
            all_commands = "teacher-cache --help lists all." if ctx.parent is None else self._first_a_command(ctx)
            raise click.UsageError(f"No such command {name!r}. {hint or all_commands}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands by panel, from the summaries alone."""
        for panel in dict.fromkeys(self._panel(name) for name in self.list_commands(ctx)):
            with formatter.section(panel):
                names = [name for name in self.list_commands(ctx) if self._panel(name) == panel]
                formatter.write_dl([(name, self._summary(name)) for name in names])

    def _panel(self, name: str) -> str:
        return self.entries[name].panel if name in self.entries else "Commands"

    def _summary(self, name: str) -> str:
        return (
            self.entries[name].summary if name in self.entries else self.commands[name].get_short_help_str(HELP_WIDTH)
        )


def _show_version(ctx: click.Context, param: click.Parameter, show: bool) -> None:
    if show:
        from importlib.metadata import version  # takes 20 ms

        click.echo(f"teacher-cache {version('teacher-cache')}")
        ctx.exit()


app = Group(
    "teacher-cache",
    help="Run a CLIP teacher once, keep its embeddings, distill every student from the cache.",
    no_args_is_help=True,
    context_settings={"max_content_width": HELP_WIDTH, "help_option_names": ["-h", "--help"]},
    params=[
        click.Option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_show_version,
            help="Show the version and exit.",
        )
    ],
)


def register(package: str, *commands: tuple[str, str, str, str]) -> None:
    """Register commands as (panel, name, module, summary), before earlier ones of the panel.

    Args:
        package: the package of the modules.
    """
    entries = {name: _Entry(panel, f"{package}.{module}", summary) for panel, name, module, summary in commands}
    app.entries = entries | app.entries


register(
    "teacher_cache.storage.cli",
    (
        "Cache",
        "export",
        "caches",
        "Write embeddings as npy and parquet (clip-retrieval, autofaiss), or as WebDataset tars.",
    ),
    (
        "Look inside",
        "info",
        "info",
        "Show what a cache holds and how much of it is done, or list the caches in a folder.",
    ),
    ("Look inside", "stats", "rows", "Summarize the embeddings: norms, cosines, duplicates, rank."),
    ("Look inside", "look", "rows", "Show random images, or the neighbours of one image or caption."),
    ("Look inside", "diff", "caches", "Show how two caches differ."),
)


def every_command() -> Iterator[tuple[str, click.Command]]:
    """Yield the name and object of every command, including commands of groups (``group verb``)."""
    ctx = click.Context(app)
    for name in app.list_commands(ctx):
        command = app.get_command(ctx, name)
        if isinstance(command, click.Group):
            yield from ((f"{name} {verb}", inner) for verb, inner in command.commands.items())
        elif command is not None:
            yield name, command


def complete_location(incomplete: str) -> list[str]:
    """Return the folders that complete a path: caches by name, other folders with a slash at the end."""
    if "://" in incomplete:
        return []  # each key press would send a request to the store
    base, _, start = incomplete.rpartition("/")
    folder = Path(f"{base}/" if "/" in incomplete else ".")
    try:
        paths = sorted(path for path in folder.iterdir() if path.name.startswith(start) and path.is_dir())
    except OSError:
        return []
    before = incomplete.removesuffix(start) if start else incomplete
    return [
        f"{before}{path.name}{'' if (path / MANIFEST_KEY).is_file() else '/'}"
        for path in paths
        if start.startswith(".") or not path.name.startswith(".")
    ]


def complete_cache(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer a shell the folders of :func:`complete_location`."""
    return [CompletionItem(path) for path in complete_location(incomplete)]


def command(name: str | None = None, example: str = "") -> Callable[[_Callback], click.Command]:
    """Return a decorator that turns a function into a command, with an example for its help."""
    return click.command(name, cls=Command, example=example)


def of_kind(wanted: str) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """Return a callback that refuses paths where another kind of place is, before anything is imported."""

    def check(ctx: click.Context, param: click.Parameter, typed: Any) -> Any:
        options = [str(other.name) for other in ctx.command.params if isinstance(other, click.Option)]
        for location in typed if isinstance(typed, tuple) else (typed or "",):
            if problem := misplaced(location, wanted, options):
                raise UsageError(problem)
        return typed

    return check


def cache_argument(
    name: str = "cache", described: str = "Folder or URL of the cache.", **settings: Any
) -> Callable[[_F], _F]:
    """Return a decorator that adds the argument for a cache, which shells complete."""
    settings = {"metavar": "CACHE", "callback": of_kind(CACHE), **settings}
    return click.argument(name, cls=Argument, described=described, shell_complete=complete_cache, **settings)


others_argument = cache_argument(
    "others", "Caches of other teachers to show beside it.", metavar="[OTHER]...", nargs=-1, required=False
)


def json_flag(function: _F) -> _F:
    """Add ``--json`` to a command."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")(function)


def option(
    name: str, described: str, default: Any = None, least: int | None = None, **settings: Any
) -> Callable[[_F], _F]:
    """Return a decorator that adds an option.

    Args:
        default: shown in the help unless None.
        least: minimum of an integer.
    """
    if least is not None:
        settings |= {"type": click.IntRange(least), "metavar": "N"}
        described += f" At least {least}." if least else ""
    if default is not None:
        described += f" Default: {default}."
        settings["default"] = default
    return click.option(name, cls=Option, help=described, **settings)


def refuse_unused(names: tuple[str, ...], when: str) -> None:
    """Check that no option without effect was typed.

    Args:
        when: for the message: what the options have no effect on.

    Raises:
        UsageError: one was.
    """
    ctx = click.get_current_context()
    for name in names:
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise UsageError(f"--{name.replace('_', '-')} has no effect {when}; leave it out")


seed_option = option("--seed", "Seed of the random rows.", 0, least=0)
unmatched_option = option(
    "--unmatched",
    "Images that another cache lacks, or lacks a caption of: refuse, or leave them out.",
    "refuse",
    type=click.Choice(["refuse", "drop"]),
)
view_option = option("--view", "View of the images; 0 is the evaluation crop.", 0, least=0)


def print_json(result: BaseModel) -> None:
    """Print one JSON object on stdout. Control characters are escaped, also those that JSON allows in texts."""
    sys.stdout.writelines(escaped_json(line) + "\n" for line in result.model_dump_json(indent=2).split("\n"))


def print_result(result: _M, as_json: bool, text: Callable[[_M], Iterable[Part]]) -> None:
    """Print a result on stdout: as JSON, or the lines and tables that ``text`` makes of it."""
    if as_json:
        print_json(result)
        return
    for part in text(result):
        print_lines(*([part] if isinstance(part, str) else part.lines(output_width())))


def print_lines(*lines: str) -> None:
    """Print lines on stdout. Replaces characters that are not printable, such as terminal escapes."""
    for line in lines:
        click.echo(shown(line.replace("\n", "\r")))
