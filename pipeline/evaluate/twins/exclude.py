"""Lists of images to leave out of training, as ``teacher-cache twins --out`` writes them. No torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from teacher_cache.pipeline.models.run_record import Excluded
from teacher_cache.storage.errors import CacheMismatchError, UsageError
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.read.rows import RowSet


class _Entry(BaseModel):
    sample_id: str


class _ExcludeList(BaseModel):
    """The fields of a list that training reads; ``teacher_cache.pipeline.evaluate.twins.find.Twins`` has more."""

    cache: str
    split: str
    samples_sha256: str
    twins: tuple[_Entry, ...]


def listed_rows(path: str, reader: EmbeddingReader, split: str | None = None) -> tuple[NDArray[np.int64], str]:
    """Return the rows of the images of a list, and the sha256 of its file.

    Args:
        split: split that the list must be of. Default: any.

    Raises:
        UsageError, CacheMismatchError: as :func:`exclude_listed`.
    """
    try:
        data = Path(path).expanduser().read_bytes()
        listed = _ExcludeList.model_validate_json(data)
    except OSError as error:
        raise UsageError(f"exclude {path}: cannot be read: {error.strerror or error}") from error
    except (ValidationError, RecursionError) as error:
        raise UsageError(
            f"exclude {path}: no list of twins: teacher-cache twins {reader.location} --out {path} writes one"
        ) from error
    own = reader.identity.dataset.samples_sha256
    if listed.samples_sha256 != own:
        raise CacheMismatchError(
            f"exclude {path}: a list of {listed.cache}, images {listed.samples_sha256[:12]}, and {reader.location} has "
            f"the images {own[:12]}. Write a list of this cache: teacher-cache twins {reader.location} --out {path}"
        )
    if split not in (None, listed.split):
        raise UsageError(
            f"exclude {path}: a list of split {listed.split!r}, and the run learns from {split!r}. Write one of this "
            f"split: teacher-cache twins {reader.location} --split {split} --out {path}"
        )
    names = dict.fromkeys(entry.sample_id for entry in listed.twins)
    return reader.rows_of(names), hashlib.sha256(data).hexdigest()


def exclude_listed(path: str, reader: EmbeddingReader, split: str, rows: RowSet) -> Excluded:
    """Remove the images of a list from the rows to learn from, and return the entry of the run's record.

    Args:
        reader: cache to learn from.
        split: split to learn from.
        rows: images of the split that have an embedding; changed.

    Raises:
        UsageError: the file cannot be read, is no such list or of another split, or names an image that the cache does
            not have.
        CacheMismatchError: the list is of a cache of other images.
    """
    listed, sha256 = listed_rows(path, reader, split)
    before = len(rows)
    for row in listed.tolist():
        rows.remove(row)
    return Excluded(path=str(Path(path).expanduser().absolute()), sha256=sha256, images=before - len(rows))
