"""Output of commands: a folder written whole or not at all, and checks of output paths."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from teacher_cache.storage.errors import CacheAccessError, UsageError, name_file
from teacher_cache.storage.files.local import make_folder, sync
from teacher_cache.storage.files.processes import this_process


def require_free(out: Path) -> None:
    """Check that nothing exists at a path, and that a folder can be made there.

    Raises:
        UsageError: something does.
        CacheAccessError: this user may not write there.
    """
    if out.exists():
        raise UsageError(f"{out}: is there already. Choose another --out, or delete it.")
    require_writable(out)


def require_writable(folder: Path) -> None:
    """Check that a folder can be written, or made: an empty folder is made in it, or in the nearest one above it.

    Raises:
        CacheAccessError: it cannot.
    """
    absolute = folder.absolute()
    # os.path: below a folder that may not be searched nothing exists
    nearest = next(path for path in (absolute, *absolute.parents) if os.path.exists(path))  # noqa: PTH110
    probe = nearest / f".partial-{this_process().tag}-{secrets.token_hex(4)}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise CacheAccessError(
            f"{folder}: this user may not write in {nearest} ({error.strerror}). Grant the right, or choose another "
            "folder."
        ) from error


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to write into; sync it and rename it to ``out`` after the block, or remove it after an error.

    An OSError without a file name, such as that of a full disk, gets ``out`` as its name. A killed process leaves
    ``.partial-PROCESS-NAME`` beside it, which may be deleted.

    Raises:
        UsageError: ``out`` exists, before or after the block.
    """
    require_free(out)
    # the whole process name: another container may have the same process id
    partial = out.with_name(f".partial-{this_process().tag}-{out.name}")
    make_folder(partial.parent)
    partial.mkdir()
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            sync(path)
        require_free(out)
        partial.rename(out)
        sync(out.parent)
    except OSError as error:
        name_file(error, out)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def out_file(flag: str, path: str, example: str) -> Path:
    """Check the path of an output file and return it.

    Args:
        flag: option that named the path, for messages.
        example: name of a file, for messages.

    Raises:
        UsageError: the path is a URL or a folder, lies below something that is no folder, or is not writable.
    """
    if "://" in path:
        raise UsageError(f"{flag} {path}: a local file is wanted, not a URL")
    target = Path(path)
    if not target.name or target.is_dir():
        raise UsageError(f"{flag} {path}: this is a folder; name a file in it, for example {target / example}")
    above = next(folder for folder in target.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UsageError(f"{flag} {path}: {above} is no folder")
    if not os.access(target if target.exists() else above, os.W_OK):
        raise UsageError(f"{flag} {path}: this user may not write {'it' if target.exists() else f'in {above}'}")
    return target
