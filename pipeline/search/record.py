"""The record of a search index on disk. No torch, no FAISS.

search.json     this module's record
image.faiss     index of the images, which texts search; FAISS's own format
text.faiss      index of the captions, which images search
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from teacher_cache.storage.errors import CacheCorruptError, UsageError
from teacher_cache.storage.files.places import INDEX, misplaced
from teacher_cache.storage.format.layout import Tower

RECORD = "search.json"
MEASURED_K = 10
LEVEL = 0.95

_SHA256 = r"^[0-9a-f]{64}$"


class IndexedTower(BaseModel):
    """One index file, and what it loses to exact search in the direction that it answers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: int = Field(ge=1, le=10**10, description="Number of rows in the index.")
    bytes: int = Field(ge=1, le=1 << 44, description="Size of the file.")
    sha256: str = Field(pattern=_SHA256, description="Digest of the file.")
    effort: int | None = Field(
        ge=1, le=1 << 20, description="FAISS's efSearch or nprobe. None: the index has neither, as Flat."
    )
    queries: int = Field(ge=1, description="Number of measured queries.")
    sampled: bool = Field(description="True if the queries are a random sample, False if they are all.")
    exact: float = Field(ge=0, le=100, description="R@10 of exact search, in percent.")
    found: float = Field(ge=0, le=100, description="R@10 of the index, in percent.")
    lost_at_most: float = Field(
        ge=-100, le=100, description="Points of R@10 lost: exact if all queries were measured, else an upper bound."
    )
    products: float = Field(gt=0, description="Mean number of inner products computed for a query.")

    @property
    def times_fewer(self) -> float:
        """Return how many times as many inner products exact search computes."""
        return self.rows / self.products


class IndexRecord(BaseModel):
    """``search.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["teacher-cache-search"] = "teacher-cache-search"
    format_version: Literal[1] = 1
    cache: str = Field(description="Location of the cache when the index was built.")
    cache_manifest_digest: str = Field(pattern=_SHA256)
    teacher: str = Field(description="Name of the cache's teacher.")
    embed_dim: int = Field(ge=1, le=65_536)
    factory: str = Field(max_length=200, description="FAISS's factory string.")
    within: float = Field(ge=0, lt=100, description="Points of R@10 that each direction may lose.")
    level: float = Field(LEVEL, description="Confidence of each bound.")
    image: IndexedTower = Field(description="Images, which answer texts: text to image.")
    text: IndexedTower = Field(description="Captions, which answer images: image to text.")
    made_with: str = Field(description="FAISS's build and version.")
    date: str = Field(description="Date and time of the build, UTC.")
    seconds: float

    @classmethod
    def read(cls, folder: str | Path) -> IndexRecord:
        """Return the record of a folder without reading its index files.

        Raises:
            UsageError: there is no index.
            CacheCorruptError: its record cannot be used.
        """
        path = Path(folder) / RECORD
        try:
            return cls.model_validate_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError) as error:
            none = f"{folder}: no search index here ({RECORD} not found). Make one by teacher-cache index CACHE --out."
            raise UsageError(misplaced(str(folder), INDEX) or none) from error
        except ValidationError as error:
            raise CacheCorruptError(f"{path}: {error}. Build the index anew by teacher-cache index.") from error

    def proven(self, folder: str | Path, tower: Tower) -> bytes:
        """Return the bytes of an index file after checking size and digest.

        Raises:
            CacheCorruptError: the file is missing or not the one that was written.
        """
        path, wanted = Path(folder) / f"{tower}.faiss", self.image if tower == "image" else self.text
        try:
            size = path.stat().st_size
            data = path.read_bytes() if size == wanted.bytes else b""
        except FileNotFoundError as error:
            raise CacheCorruptError(f"{path}: missing. Build the index anew by teacher-cache index.") from error
        digest = hashlib.sha256(data).hexdigest()
        if digest != wanted.sha256:
            actual = f"sha256 {digest[:12]}" if data else f"{size:,} bytes"
            raise CacheCorruptError(
                f"{path}: {actual}, the record says sha256 {wanted.sha256[:12]}, {wanted.bytes:,} bytes. Build the "
                "index anew by teacher-cache index."
            )
        return data
