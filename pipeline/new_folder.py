"""A folder that is written whole or not at all. No torch."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.errors import UsageError
from storage.local_files import sync
from storage.processes import this_process

__all__ = ["new_folder", "require_free"]


def require_free(out: Path) -> None:
    """Refuse a place where something is.

    Raises:
        UsageError: there is.
    """
    if out.exists():
        raise UsageError(f"{out}: is there already. Choose another --out, or delete it.")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, that takes the name ``out`` once the block is through, synced; on an error it goes.

    A killed process leaves ``.partial-PROCESS-NAME`` beside it, which may be deleted.

    Raises:
        UsageError: ``out`` is there already, at the start or in the end.
    """
    require_free(out)
    # a process id alone comes again in the next container
    partial = out.with_name(f".partial-{this_process().tag}-{out.name}")
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            sync(path)
        require_free(out)
        partial.rename(out)
        sync(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
