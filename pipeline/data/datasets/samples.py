"""Samples of datasets: run the adapter, check every file, and read image bytes.

``load_samples`` alone decides which images get a row: the adapter lists them, this module checks that each can be read,
digests its bytes and turns every failure into a counted problem.

Datasets are untrusted. Only regular files are opened, never a pipe or a device. A file may hold at most
``MAX_IMAGE_BYTES``. Credentials in a dataset's name or in a uri are refused, since a cache would keep them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec

from teacher_cache.pipeline.data.datasets.adapters import adapter
from teacher_cache.pipeline.data.datasets.files import data_folder, found_instead, open_regular
from teacher_cache.pipeline.data.datasets.parquet_cells import in_cell, read_cell
from teacher_cache.pipeline.data.datasets.records import Problem, Record, Sample, SampleSet
from teacher_cache.pipeline.data.datasets.spec import DatasetSpec, refuse_credentials
from teacher_cache.storage.errors import CacheAccessError, CacheMismatchError, UsageError
from teacher_cache.storage.files.protocol import REQUESTS_AT_ONCE
from teacher_cache.storage.files.transient import is_transient
from teacher_cache.storage.observe.safe_text import printable, redact

_HASH_THREADS = 8  # hashing releases the GIL; more threads gain nothing on a local disk
_FETCHES = REQUESTS_AT_ONCE  # parallel requests of a process for remote images, which mostly wait
_HASH_WINDOW = 8192  # images in flight: bounds the memory for futures
_RETRY_SECONDS = (0.5, 2.0)
_LOCAL_FILES = ("file", "local")
_ON_THIS_MACHINE = (*_LOCAL_FILES, "torchvision", "memory")
# images in torchvision's arrays; imported on first use
fsspec.register_implementation("torchvision", "teacher_cache.pipeline.data.datasets.torchvision.TorchvisionFiles")
# tables and tars in object stores; imported on first use
_STORES = {"s3": "S3Files", "gs": "GoogleFiles", "az": "AzureFiles"}
for _scheme, _name in _STORES.items():
    fsspec.register_implementation(_scheme, f"teacher_cache.storage.files.opened.{_name}", clobber=True)
Place = tuple[str, str, int, int]
"""An image as a dataset lists it: sample_id, uri, offset and length."""
MAX_IMAGE_BYTES = 512 * 1024 * 1024  # more than the largest decodable image takes uncompressed


class ImageSource:
    """Reader of image bytes by ``uri``: local files directly, URLs through fsspec.

    Raises:
        UsageError: ``root`` contains credentials.
    """

    def __init__(self, root: str) -> None:
        refuse_credentials("", root)
        self.root = root

    def resolve(self, uri: str) -> str:
        """Return the path or URL of ``uri``. A relative one is below ``root``."""
        if "://" in uri or Path(uri).is_absolute():
            return uri
        return f"{self.root.rstrip('/')}/{uri}"

    def fetches(self, uri: str) -> int:
        """Return the number of threads to prefetch images like this one; 0 for local files."""
        scheme, mark, _ = self.resolve(uri).partition("://")
        return _FETCHES if mark and scheme not in _ON_THIS_MACHINE else 0

    def threads(self, uri: str) -> contextlib.AbstractContextManager[ThreadPoolExecutor | None]:
        """Return a pool of threads to prefetch images like this one. None: a local file."""
        fetches = self.fetches(uri)
        return ThreadPoolExecutor(fetches, thread_name_prefix="images") if fetches else contextlib.nullcontext()

    def read(self, uri: str, offset: int = -1, length: int = -1) -> bytes:
        """Read the image's bytes as stored, not decoded.

        Raises:
            FileNotFoundError: it does not exist.
            OSError: it cannot be read, is no regular file, or holds fewer bytes than ``length`` or more than
                ``MAX_IMAGE_BYTES``.
        """
        target = self.resolve(uri)
        if in_cell(target):
            return read_cell(target)
        if length > MAX_IMAGE_BYTES:
            raise _too_large(target, length)
        if "::" in target and "://" in target:
            # simplecache:: and similar ones write copies to other folders
            raise OSError(f"{target}: a chain of file systems is not followed; write the plain path or URL")
        scheme, mark, path = target.partition("://")
        if mark and scheme not in _LOCAL_FILES:
            data = _fetch(target, offset, length)
        else:
            data = _read_file(path if mark else target, offset, length)
        if length >= 0 and len(data) != length:
            raise OSError(f"{target}: {len(data)} bytes at offset {offset}, {length} wanted; the file is cut short")
        return data


def _read_file(path: str, offset: int, length: int) -> bytes:
    with open_regular(path) as file:
        # not file.read(length) alone: it would allocate the length that the dataset claims
        available = max(os.fstat(file.fileno()).st_size - max(offset, 0), 0)
        size = available if length < 0 else min(available, length)
        if size > MAX_IMAGE_BYTES:
            raise _too_large(path, size)
        file.seek(max(offset, 0))
        return file.read(size)


def _too_large(target: str, size: int) -> OSError:
    return OSError(f"{target}: {size:,} bytes; an image may have {MAX_IMAGE_BYTES:,}")


def _fetch(url: str, offset: int, length: int) -> bytes:
    """Read bytes behind a URL in one request, without the request for its size that opening a file makes.

    Raises:
        FileNotFoundError: the object does not exist.
        ConnectionError: the server failed three times; a store as often as for caches.
        OSError: the server refuses, or the URL cannot be used.
    """
    if url.partition("://")[0] in _STORES:
        return _fetch_from_store(url, offset, length)
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
            # each library has its own errors for a refusal, an unknown protocol or a missing package
            status = getattr(error, "status", None)
            refused = isinstance(status, int) and status < 500 and status not in (408, 425, 429)
            if refused or isinstance(error, (ValueError, ImportError)):
                raise OSError(f"{url}: {type(error).__name__}: {redact(str(error))}") from error
            if pause is None:
                raise ConnectionError(f"{url}: {type(error).__name__}: {redact(str(error))}") from error
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _fetch_from_store(url: str, offset: int, length: int) -> bytes:
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    try:
        from teacher_cache.storage.files.remote import RemoteFiles  # needs obstore, which is optional

        files = RemoteFiles(f"{scheme}://{bucket}")
        return files.read(key) if length < 0 else files.read_range(key, max(offset, 0), length)
    except (CacheAccessError, ImportError, ValueError) as error:
        raise OSError(f"{url}: {error}") from error


def require_content(data: bytes, sha256: str, where: str) -> None:
    """Check that an image is unchanged since the cache was planned.

    Raises:
        CacheMismatchError: it has changed. The message names the file.
    """
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CacheMismatchError(
            f"{where}: not the image that the cache was made of (its bytes have another sha256). Restore it, name the "
            "folder that has it, or make a new cache."
        )


def load_samples(
    spec: DatasetSpec, progress: Callable[[int, int], None] | None = None, known: Mapping[Place, str] | None = None
) -> tuple[SampleSet, list[str]]:
    """Read a dataset and check that each of its images can be read.

    Args:
        spec: adapter, place and settings.
        progress: called with (images checked, images listed).
        known: sha256 of images that are not read, by sample_id, uri, offset and length.

    Returns:
        The samples that get a row, in the adapter's order, with all problems; and the sha256 of each sample's stored
        image bytes, in the same order.

    Raises:
        UsageError: the root does not have the published form of this kind (the message says what is missing), its
            files cannot be read, or no image can be used.
        ConnectionError: a server or a share fails; a retry may succeed.
    """
    listed = list_samples(spec)
    source = ImageSource(data_folder(spec.root))

    usable = SampleSet(spec.kind, source.root, problems=listed.problems, whole=listed.whole)
    digests: list[str] = []
    for number, (sample, result) in enumerate(_digested(source, listed.samples, known or {}), 1):
        if isinstance(result, Problem):
            usable.problems.append(result)
        else:
            usable.samples.append(sample)
            digests.append(result)
        if progress is not None and (number % 256 == 0 or number == len(listed.samples)):
            progress(number, len(listed.samples))
    if not usable.samples:
        raise UsageError(f"{spec}: {_why_no_file(source, listed, usable.problems)}")
    return usable, digests


def _digested(
    source: ImageSource, samples: list[Sample], known: Mapping[Place, str]
) -> Iterator[tuple[Sample, str | Problem]]:
    """Yield each sample with the sha256 of its image, or why that cannot be read. Threads read those not known."""
    with ThreadPoolExecutor(digest_threads(source, samples)) as pool:
        for first in range(0, len(samples), _HASH_WINDOW):
            window = samples[first : first + _HASH_WINDOW]
            # no job for a known one: the pool takes 20 times as long as the look-up
            have = [_known_digest(sample, known) for sample in window]
            unknown = (sample for sample, digest in zip(window, have, strict=True) if digest is None)
            read = pool.map(lambda sample: _digest(source, sample), unknown)
            yield from ((sample, digest or next(read)) for sample, digest in zip(window, have, strict=True))


def _known_digest(sample: Sample, known: Mapping[Place, str]) -> str | None:
    if sample.sha256 and sample.length <= MAX_IMAGE_BYTES:
        return sample.sha256
    return known.get((sample.sample_id, sample.uri, sample.offset, sample.length))


def _digest(source: ImageSource, sample: Sample) -> str | Problem:
    try:
        data = source.read(sample.uri, sample.offset, sample.length)
    except FileNotFoundError:
        detail = f"{source.resolve(sample.uri)} does not exist"
        return Problem("missing-file", sample.sample_id, detail, lost_image=True)
    except OSError as error:
        if is_transient(error) and "://" not in source.resolve(sample.uri):
            raise  # the share fails, not the image: without its rows this would be another dataset
        return Problem("unreadable-file", sample.sample_id, str(error), lost_image=True)
    return hashlib.sha256(data).hexdigest()


def _why_no_file(source: ImageSource, listed: SampleSet, problems: list[Problem]) -> str:
    """Return :func:`why_none`; where the first file is missing also what there is instead."""
    missing = [problem.kind for problem in problems[:1]] == ["missing-file"]
    instead = found_instead(source.root, listed.samples[0].uri) if missing else ""
    slashes = "; write / for each backslash in the paths" * bool(instead and "\\" in listed.samples[0].uri)
    return why_none(problems) + (f"; there is {instead}{slashes}" if instead else "")


def why_none(problems: list[Problem]) -> str:
    """Return why a dataset without a usable image has none, and what to do."""
    if not problems:
        return "lists no image. Check the path, and the kind before it"
    lost = [problem for problem in problems if problem.lost_image]
    captioned = {problem.kind for problem in lost} != {"no-caption"}
    # where captions are missing, a text that cannot be read may be why
    unread = [problem for problem in problems if problem.kind in ("bad-record", "broken-file")]
    first = [*(() if captioned else unread), *lost, *problems][0]
    bare = not captioned and first.kind == "no-caption"
    way_out = ". To cache images without captions, add ?uncaptioned=keep" if bare else ""
    listed = f" among {len(lost)} listed" if lost else ""
    return f"no usable image{listed}; the first problem: {first}{way_out}"


def digest_threads(source: ImageSource, samples: Sequence[Sample]) -> int:
    """Return the number of threads that read images for their digests."""
    return max((source.fetches(sample.uri) for sample in samples[:1]), default=0) or _HASH_THREADS


def list_samples(spec: DatasetSpec) -> SampleSet:
    """List a dataset without opening its images: missing and unreadable ones are listed too.

    Raises:
        UsageError, ConnectionError: see :func:`load_samples`.
    """
    listed = SampleSet(spec.kind, spec.root)
    seen: dict[str, Sample] = {}
    hinted = False
    for record in _records(spec):
        if isinstance(record, Problem):
            listed.problems.append(record)
        elif record.sample_id in seen:
            first = seen[record.sample_id]
            other_tar = spec.kind == "webdataset" and record.uri != first.uri
            hint = "; where each tar counts its keys anew, add ?ids=tar" * (other_tar and not hinted)
            hinted = hinted or other_tar
            detail = f"{record.uri}: this sample_id is taken by an earlier sample{hint}"
            lost_image = (record.uri, record.offset) != (first.uri, first.offset)
            listed.problems.append(Problem("duplicate-id", record.sample_id, detail, lost_image))
        else:
            seen[record.sample_id] = record
            listed.samples.append(record)
    return listed if spec.part is None else spec.part.of(listed)


def _records(spec: DatasetSpec) -> Iterator[Record]:
    """Yield the records of the adapter."""
    try:
        yield from adapter(spec.kind)(spec.root, **dict(spec.options))
    except RecursionError as error:
        raise UsageError(f"{spec}: nested too deeply to be read") from error
    except Exception as error:
        if is_transient(error):
            # half a dataset now and a whole one on a retry would be two datasets
            reason = f"{type(error).__name__}: {printable(str(error))}"
            raise ConnectionError(f"{spec}: {reason}. Run the same command again.") from error
        if isinstance(error, OSError | UnicodeError):
            raise UsageError(f"{spec}: cannot be read: {printable(str(error))}") from error
        raise
