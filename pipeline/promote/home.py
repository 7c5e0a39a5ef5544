"""The home folder of retrainings: numbered caches, runs and deployed students.

home/
  caches/0002.cache     the cache of one state of the dataset; reuses rows of earlier caches
  runs/0002             the student trained from it
  deployed/0002         the files of a student that passed
  students/             the registry of students
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.promote.registry import Candidate, StudentRegistry
from teacher_cache.pipeline.settings.promote import RetrainConfig
from teacher_cache.storage.errors import CacheCorruptError, CacheFormatError, CacheNotFoundError, UsageError
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.format.manifest import CacheManifest
from teacher_cache.storage.format.manifest_file import read_manifest

_CACHE = re.compile(r"^(\d{4,})\.cache$")
_RUN = re.compile(r"^(\d{4,})(-\d+)?$")


@dataclass(frozen=True)
class NumberedCache:
    """A cache below a home, finished or not."""

    number: int
    location: str
    manifest: CacheManifest


@dataclass(frozen=True)
class HomeCaches:
    """The caches below a home.

    Attributes:
        readable: caches with a manifest, ordered by number.
        unread: reason why the newest cache's manifest cannot be read, if that is so.
        last: greatest number of a cache. A cache whose planning was interrupted leaves its number free.
    """

    readable: list[NumberedCache]
    unread: str | None
    last: int

    @property
    def sealed(self) -> list[NumberedCache]:
        """The finished caches."""
        return [cache for cache in self.readable if cache.manifest.sealed]


class Home:
    """The folders of a home. Paths are absolute, so that they are valid from any working directory.

    Raises:
        UsageError: the home is a URL.
    """

    def __init__(self, config: RetrainConfig) -> None:
        if "://" in config.home:
            raise UsageError(f"home {config.home}: runs are written to a local folder; give URLs as caches alone")
        self.folder = str(Path(config.home).absolute())
        self.caches = (config.caches or f"{self.folder}/caches").rstrip("/")
        self.registry = StudentRegistry(f"{self.folder}/students")

    def cache(self, number: int) -> str:
        """Return the location of a cache."""
        return f"{self.caches}/{number:04d}.cache"

    def read_caches(self) -> HomeCaches:
        """Read the manifests of all caches."""
        matches = [match for name in open_files(self.caches).folders() if (match := _CACHE.match(name))]
        readable: list[NumberedCache] = []
        unread, last = None, 0
        for number, name in sorted((int(match[1]), match[0]) for match in matches):
            location = f"{self.caches}/{name}"
            try:
                readable.append(NumberedCache(number, location, read_manifest(open_files(location))))
                unread = None
            except CacheNotFoundError:
                continue
            except (CacheCorruptError, CacheFormatError) as error:
                unread = str(error)
            last = number
        return HomeCaches(readable, unread, last)

    def next_number(self, caches: HomeCaches) -> int:
        """Return a number that neither a cache nor a run has."""
        runs = [int(match[1]) for path in Path(f"{self.folder}/runs").glob("*") if (match := _RUN.match(path.name))]
        return max([caches.last, *runs]) + 1

    def run_names(self, number: int) -> Iterator[str]:
        """Yield the folders of runs from a cache: 0002, 0002-2, 0002-3 and so on."""
        return _numbered(f"{self.folder}/runs/{number:04d}")

    def deployed_names(self, run: str) -> Iterator[str]:
        """Yield the folders for deployments of a run: NAME, NAME-2, NAME-3 and so on."""
        return _numbered(f"{self.folder}/deployed/{Path(run).name}")

    def verdict(self, run: str) -> Candidate | None:
        """Return the latest verdict for the run. A pass that was never promoted is ignored: it was killed first."""
        if not RunFolder(run).exists():
            return None
        digest = RunFolder(run).read().cache_manifest_digest
        promoted = {promotion.candidate for promotion in self.registry.promotions()}
        settled = [
            student
            for student in self.registry.candidates()
            if Path(student.run) == Path(run)
            and student.cache_manifest_digest == digest
            and (not student.passed or student.number in promoted)
        ]
        return settled[-1] if settled else None


def _numbered(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}-{again}" for again in itertools.count(2))
