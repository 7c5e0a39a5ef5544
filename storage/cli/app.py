"""The ``teacher-cache`` app: commands that are imported when they are asked for, and what all of them share. No torch.

Reading one manifest takes milliseconds; importing every command, with the libraries behind it, takes longer than
that. So the app knows the names of commands and their modules, and imports a module once one of its commands is run,
shown or completed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, MutableMapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command_from_info

if TYPE_CHECKING:
    from pydantic import BaseModel

__all__ = [
    "CacheArgument",
    "JsonFlag",
    "app",
    "byte_size",
    "commands_in",
    "complete_location",
    "counted",
    "print_json",
    "rates",
]

_modules: dict[str, str] = {}
_CACHE_MARK = (
    "manifest.json"  # teacher_cache.storage.format.manifest.MANIFEST_KEY, which takes pydantic's time to import
)


def commands_in(module: str, *names: str) -> None:
    """Say which commands a module registers; it is imported when one of them is asked for."""
    _modules.update(dict.fromkeys(names, module))


class _Commands(MutableMapping[str, Any]):
    """Commands by name, in the order of :func:`commands_in`; then those that were registered by an import."""

    def __init__(self, made: dict[str, Any]) -> None:
        self._made = made

    def __getitem__(self, name: str) -> Any:
        if name not in self._made and name in _modules:
            import_module(_modules[name])
            for info in app.registered_commands:
                made = get_command_from_info(info, pretty_exceptions_short=False, rich_markup_mode=None)
                self._made.setdefault(str(made.name), made)
        return self._made[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._made[name] = command

    def __delitem__(self, name: str) -> None:
        del self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*_modules, *self._made]))

    def __len__(self) -> int:
        return len({*_modules, *self._made})


class _Group(TyperGroup):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _Commands(dict(self.commands))

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)


app = typer.Typer(
    name="teacher-cache",
    cls=_Group,
    help="Run a CLIP teacher once, keep its embeddings, distil every student from the cache.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
commands_in("teacher_cache.storage.cli.look", "ls", "info")
commands_in("teacher_cache.storage.cli.rows", "stats", "sample", "neighbours")
commands_in("teacher_cache.storage.cli.compare", "diff", "gc", "export")


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version  # 20 ms that no other command has to wait for

        sys.stdout.write(f"teacher-cache {version('teacher-cache')}\n")
        raise typer.Exit


# with a callback, typer makes a group of an app that has no command yet
@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def complete_location(incomplete: str) -> list[str]:
    """Folders that begin like this, for a shell: caches as they are, others with a slash to go on behind."""
    if "://" in incomplete:
        return []  # a store would be asked at each key
    base, _, start = incomplete.rpartition("/")
    folder = Path(f"{base}/" if "/" in incomplete else ".")
    try:
        found = sorted(path for path in folder.iterdir() if path.name.startswith(start) and path.is_dir())
    except OSError:
        return []
    before = incomplete.removesuffix(start) if start else incomplete
    return [
        f"{before}{path.name}{'' if (path / _CACHE_MARK).is_file() else '/'}"
        for path in found
        if start.startswith(".") or not path.name.startswith(".")
    ]


CacheArgument = Annotated[
    str, typer.Argument(metavar="CACHE", help="Folder or URL of the cache.", autocompletion=complete_location)
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def counted(number: int, what: str) -> str:
    """The number and the word, in the plural but for one."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def rates(images: float | None, captions: float | None) -> str:
    """Of the teacher, a second; what is not known is left out."""
    each = ((images, "images/s"), (captions, "captions/s"))
    return ", ".join(f"{rate:,.0f} {what}" for rate, what in each if rate is not None) or "none by the teacher noted"


def byte_size(nbytes: float) -> str:
    """Bytes for people: 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:,.0f} B" if unit == "B" else f"{nbytes:,.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:,.1f} TB"


def print_json(result: BaseModel) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(result.model_dump_json(indent=2) + "\n")
