"""Datasets as samples: parse ``KIND:PATH``, read the adapter, prove every file, and read image bytes again.

``load_samples`` is the one place that decides which images get a row: an adapter lists them, this module
checks that each can be read, digests its bytes and turns every failure into a counted problem.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, quote

import fsspec

from pipeline.datasets import Problem, Sample, SampleSet, adapter
from pipeline.datasets.base import data_folder
from storage.errors import CacheMismatchError, UsageError
from storage.transient import is_transient

__all__ = ["DatasetSpec", "ImageSource", "Problem", "Sample", "SampleSet", "load_samples", "require_content"]

_HASH_THREADS = 8  # hashing releases the GIL; beyond this a local disk gains nothing
_HASH_WINDOW = 8192  # images in flight; a future per image of a large dataset would fill the memory
_RETRY_SECONDS = (0.5, 2.0)


@dataclass(frozen=True)
class DatasetSpec:
    """A dataset by name: ``KIND:PATH`` with optional ``?key=value&...`` settings of the adapter."""

    kind: str
    root: str
    options: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> DatasetSpec:
        """Read ``flickr:/data/flickr8k`` or ``table:/data/pairs.parquet?caption=title``.

        Raises:
            UsageError: no ``KIND:`` in front, an unknown kind, an empty path, or a setting given twice.
        """
        kind, colon, rest = text.partition(":")
        if not colon:
            raise UsageError(f"dataset {text!r} has no kind; write KIND:PATH, for example flickr:{text}")
        adapter(kind)
        path, question, query = rest.rpartition("?")
        if not question or "=" not in query:
            path, query = rest, ""
        if not path:
            raise UsageError(f"dataset {text!r} has no path; write {kind}:PATH")
        options = tuple(parse_qsl(query, keep_blank_values=True))
        keys = [key for key, _ in options]
        if len(set(keys)) < len(keys):
            raise UsageError(f"dataset {text!r} gives a setting twice; it has {', '.join(keys)}")
        return cls(kind, path, options)

    def __str__(self) -> str:
        # quoted as far as parse() needs it to read the same settings again
        query = "&".join(f"{quote(key)}={quote(value, safe='/:,{}')}" for key, value in self.options)
        return f"{self.kind}:{self.root}" + (f"?{query}" if query else "")


class ImageSource:
    """Reads the bytes of one image by ``uri``; local paths directly, URLs through fsspec."""

    def __init__(self, root: str) -> None:
        self.root = root

    def resolve(self, uri: str) -> str:
        """The path or URL that ``uri`` stands for, relative ones below ``root``."""
        if "://" in uri or Path(uri).is_absolute():
            return uri
        return f"{self.root.rstrip('/')}/{uri}"

    def read(self, uri: str, offset: int = -1, length: int = -1) -> bytes:
        """The image's bytes as stored, not decoded.

        Raises:
            FileNotFoundError: nothing is there.
            OSError: it is there and cannot be read, or holds fewer bytes than ``length``.
        """
        target = self.resolve(uri)
        if "://" in target:
            data = _fetch(target, offset, length)
        else:
            with Path(target).open("rb") as file:
                if offset >= 0:
                    file.seek(offset)
                data = file.read(length if length >= 0 else -1)
        if length >= 0 and len(data) != length:
            raise OSError(f"{target}: {len(data)} bytes at offset {offset}, {length} wanted; the file is cut short")
        return data


def _fetch(url: str, offset: int, length: int) -> bytes:
    """Bytes behind a URL in one request, without the look at its size that opening a file makes.

    Raises:
        FileNotFoundError: nothing is there.
        ConnectionError: the server did not answer well, three times.
        OSError: it answered, and will not give these bytes; or the URL cannot be used.
    """
    start = offset if offset > 0 else None
    end = max(offset, 0) + length if length >= 0 else None
    for pause in (*_RETRY_SECONDS, None):
        try:
            filesystem, path = fsspec.core.url_to_fs(url)
            data: bytes = filesystem.cat_file(path, start=start, end=end)
            return data
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            raise
        except Exception as error:
            # a server's refusal, an unknown protocol, a package that is not installed: each library has its own
            status = getattr(error, "status", None)
            refused = isinstance(status, int) and status < 500 and status not in (408, 425, 429)
            if refused or isinstance(error, (ValueError, ImportError)):
                raise OSError(f"{url}: {type(error).__name__}: {error}") from error
            if pause is None:
                raise ConnectionError(f"{url}: {type(error).__name__}: {error}") from error
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def require_content(data: bytes, sha256: str, where: str) -> None:
    """Refuse an image that is not the one that the cache was planned with.

    Raises:
        CacheMismatchError: names the file.
    """
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CacheMismatchError(
            f"{where}: not the image that the cache was made of (its bytes have another sha256). Restore it, name the "
            "folder that has it, or make a new cache."
        )


def load_samples(spec: DatasetSpec, progress: Callable[[int, int], None] | None = None) -> tuple[SampleSet, list[str]]:
    """Read a dataset and prove that each of its images can be read.

    Args:
        spec: which adapter, where, with which settings.
        progress: called with (images checked, images listed).

    Returns:
        The samples that get a row, in the adapter's order, with every problem met; and the sha256 of each
        sample's stored image bytes, in the same order.

    Raises:
        UsageError: the root does not have the published form of this kind (the adapter says what it looked
            for), or not one image of it can be used.
    """
    listed = SampleSet(spec.kind, spec.root)
    seen: dict[str, Sample] = {}
    for record in adapter(spec.kind)(spec.root, **dict(spec.options)):
        if isinstance(record, Problem):
            listed.problems.append(record)
        elif record.sample_id in seen:
            detail = f"{record.uri}: this sample_id is taken by an earlier sample"
            first = seen[record.sample_id]
            lost_image = (record.uri, record.offset) != (first.uri, first.offset)
            listed.problems.append(Problem("duplicate-id", record.sample_id, detail, lost_image))
        else:
            seen[record.sample_id] = record
            listed.samples.append(record)

    source = ImageSource(data_folder(spec.root))

    def digest(sample: Sample) -> str | Problem:
        try:
            data = source.read(sample.uri, sample.offset, sample.length)
        except FileNotFoundError:
            detail = f"{source.resolve(sample.uri)} does not exist"
            return Problem("missing-file", sample.sample_id, detail, lost_image=True)
        except OSError as error:
            if is_transient(error) and "://" not in source.resolve(sample.uri):
                raise  # a share in trouble, not an image: a dataset planned without it would be another dataset
            return Problem("unreadable-file", sample.sample_id, str(error), lost_image=True)
        return hashlib.sha256(data).hexdigest()

    found = SampleSet(spec.kind, source.root, problems=listed.problems)
    digests: list[str] = []
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        results = (
            result
            for first in range(0, len(listed.samples), _HASH_WINDOW)
            for result in pool.map(digest, listed.samples[first : first + _HASH_WINDOW])
        )
        for number, (sample, result) in enumerate(zip(listed.samples, results, strict=True)):
            if isinstance(result, Problem):
                found.problems.append(result)
            else:
                found.samples.append(sample)
                digests.append(result)
            if progress is not None and (number % 256 == 255 or number + 1 == len(listed.samples)):
                progress(number + 1, len(listed.samples))
    if not found.samples:
        met = f"; the first problem: {found.problems[0].where}: {found.problems[0].detail}" if found.problems else ""
        raise UsageError(f"{spec}: no usable image among {len(listed.samples)} listed{met}")
    return found, digests
