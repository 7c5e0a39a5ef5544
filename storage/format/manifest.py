"""The manifest: identity, layout and tables of a cache. No file access.

The manifest is the root of the cache's digests. It carries its own, those of the tables and, once the cache is sealed,
one over all commit records. Each commit record carries the digests of its chunk.

Manifests of format versions 1 (float16 rows) and 2 (int8 rows) differ in one thing: they keep the seal in a list of
generations. Versions that wrote them could add views to a cache as a second generation; only caches of one are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any, Final, Literal, Self

from pydantic import Field, ValidationError, model_validator

from teacher_cache.storage.errors import CacheCorruptError, CacheFormatError, UsageError
from teacher_cache.storage.files.places import BACKUP_KEY as BACKUP_KEY
from teacher_cache.storage.files.places import MANIFEST_KEY as MANIFEST_KEY
from teacher_cache.storage.format.identity import CacheIdentity, Record, digest_of, with_digest, without_digest
from teacher_cache.storage.format.layout import Layout

FORMAT_VERSION: Final = 3
"""Version that new caches are written in. Versions 1 (float16) and 2 (int8) are read, finished and repaired."""
IMPORTED = "imported"
"""Key of ``made_with``: which rows were imported, for people. Caches that copy such rows have it too."""
IMPORTED_ROWS = "imported_rows_sha256"
_KEY = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", re.ASCII)
_RESTORE = "Run teacher-cache repair: it restores the manifest from its backup."


class Source(Record):
    """The place that the images were read from. It is not part of the identity, since a dataset may move."""

    dataset: str = Field(description="Dataset as named for precompute, KIND:PATH.")
    image_root: str = Field(description="Folder or URL that relative uris in the samples table start from.")


class StaticFile(Record):
    """A file written once, when the cache is planned: a parquet table or Zarr's metadata."""

    sha256: str
    rows: int | None = Field(None, description="Rows of a parquet table.")


class Seal(Record):
    """The end of a cache: every chunk is committed, and from then on no byte changes."""

    commits_sha256: str = Field(description="sha256 over key and bytes of all commit records, in key order.")
    images_encoded: int = Field(description="Images with an embedding in every view.")
    images_quarantined: int = Field(description="Images without an embedding in some view, each counted once.")
    captions_encoded: int
    stored_bytes: int | None = Field(None, description="Bytes of all chunk objects, of a compressed cache.")


class CacheManifest(Record):
    """The content of ``manifest.json`` without its own digest, which is added and checked as text."""

    format: Literal["teacher-cache"] = "teacher-cache"
    format_version: Literal[1, 2, 3] = FORMAT_VERSION
    identity_digest: str
    identity: CacheIdentity
    layout: Layout
    source: Source
    files: dict[str, StaticFile] = Field(description="Files that are neither chunk, commit nor journal, by key.")
    lost_images: int = Field(ge=0, description="Images of the dataset without a row (missing, unreadable, ...).")
    problems: dict[str, int] = Field(description="Problems met while the dataset was read, counted by kind.")
    seal: Seal | None = None
    made_with: dict[str, str] = Field(description="Versions of the libraries that made the pixels and the rows.")

    @model_validator(mode="after")
    def _identity_is_its_digest(self) -> Self:
        if self.identity.digest != self.identity_digest:
            raise ValueError(
                f"identity_digest is {self.identity_digest}, but the identity beside it has {self.identity.digest}"
            )
        return self

    @model_validator(mode="after")
    def _layout_stores_the_targets(self) -> Self:
        targets, stored = self.identity.targets, self.layout.embedding_dtype or "float16"
        if not targets.normalized or targets.dtype != stored:
            raise ValueError(f"the layout holds normalised {stored} rows, targets are {targets}")
        if self.format_version not in (FORMAT_VERSION, 1 if stored == "float16" else 2):
            raise ValueError(f"format version {self.format_version} holds no {stored} rows")
        return self

    @model_validator(mode="after")
    def _files_are_below_the_cache(self) -> Self:
        for key in self.files:
            if not _KEY.fullmatch(key):
                raise ValueError(f"files names {key[:80]!r}, which is not below the cache")
        return self

    @model_validator(mode="after")
    def _views_add_up(self) -> Self:
        views = self.identity.views
        if views.count != self.layout.views:
            raise ValueError(f"{views.count} views in the identity, {self.layout.views} in the layout")
        settings = [value is not None for value in (views.scale, views.ratio, views.flip, views.seed)]
        if settings != [views.policy != "evaluation"] * 4 or (views.count > 1) != all(settings):
            raise ValueError(
                f"a single view has the evaluation policy and no crop settings, several have all four; found {views}"
            )
        return self

    @property
    def imported_sha256(self) -> str | None:
        """Digest of the rows imported from another tool's files; None if the teacher made all rows."""
        return self.made_with.get(IMPORTED_ROWS)

    @property
    def sealed(self) -> bool:
        """True once the cache is complete and its bytes are fixed."""
        return self.seal is not None

    @property
    def stored_bytes(self) -> int | None:
        """Bytes of all chunk objects of a compressed cache; None of others, and until the seal."""
        return self.seal.stored_bytes if self.seal else None

    def require_split(self, split: str, location: str) -> None:
        """Check that the dataset has a split.

        Raises:
            UsageError: it has not. The message lists the splits.
        """
        splits = self.identity.dataset.splits
        if split not in splits:
            names = ", ".join(f"{name!r} ({count} images)" for name, count in splits.items())
            raise UsageError(f"{location}: no split {split!r}; this cache has {names}{holdout_advice(splits)}")

    @property
    def digest(self) -> str:
        """sha256 over the whole manifest: what a student's checkpoint records."""
        return digest_of(self.fields())

    def fields(self) -> dict[str, Any]:
        """Return the manifest as JSON values, in the form of its format version."""
        fields = super().fields()
        return fields if self.format_version == FORMAT_VERSION else _older_fields(fields)

    def to_bytes(self) -> bytes:
        """Return the bytes of ``manifest.json``: indented for people, its own digest as the last field."""
        return (json.dumps(with_digest(self.fields()), indent=2, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, location: str, key: str = MANIFEST_KEY) -> CacheManifest:
        """Parse and prove a manifest.

        Args:
            location, key: where the bytes come from, for messages.

        Raises:
            CacheFormatError: not a manifest, or of a format that this version does not read.
            CacheCorruptError: the content does not have the digest that it carries.
        """
        where = f"{location}/{key}"
        try:
            fields = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise CacheCorruptError(f"{where}: not JSON ({error}). {_RESTORE}") from error
        if not isinstance(fields, dict) or fields.get("format") != "teacher-cache":
            actual = fields.get("format") if isinstance(fields, dict) else type(fields).__name__
            raise CacheFormatError(
                f"{where}: format is {actual!r}, 'teacher-cache' wanted. Is this another tool's folder?"
            )
        version = fields.get("format_version")
        if version not in (1, 2, FORMAT_VERSION) or isinstance(version, bool):
            raise CacheFormatError(
                f"{where}: format version {version!r}, this teacher-cache reads 1 to {FORMAT_VERSION}. "
                "Install a newer teacher-cache."
            )
        try:
            fields = without_digest(fields)
        except ValueError as error:  # also NaN and half a surrogate pair, which JSON's parser lets in
            raise CacheCorruptError(f"{where}: {error}. It was edited or damaged. {_RESTORE}") from error
        try:
            return cls.model_validate(fields if version == FORMAT_VERSION else _newer_fields(fields, where))
        except ValidationError as error:
            raise CacheFormatError(f"{where}: {error}") from error


def holdout_advice(splits: Collection[str]) -> str:
    """Return the end of a message about an unknown split: how a dataset without splits gets some, or nothing."""
    return ": add ?holdout=10% behind the dataset to set a part aside" if [*splits] == [""] else ""


def _newer_fields(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """Convert the fields of an older manifest to version 3.

    Raises:
        CacheFormatError: it has several generations, or its one generation does not hold all rows.
    """
    generations: Any = fields.get("generations")
    if isinstance(generations, list) and len(generations) > 1:
        raise CacheFormatError(
            f"{where}: has {len(generations)} generations (views were added to a finished cache), and this version "
            "reads caches of one. Precompute a new cache with this version; the version that wrote this one can export "
            "its rows."
        )
    lifted: dict[str, Any] = {name: value for name, value in fields.items() if name != "generations"}
    try:
        (only,) = generations
        lifted |= {name: only[name] for name in ("lost_images", "problems", "seal") if name in only}
        same = _older_fields(lifted)["generations"] == generations
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise CacheFormatError(f"{where}: generations do not hold the rows of the layout, each once")
    return lifted


def _older_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Convert the fields of a manifest to versions 1 and 2, in their order."""
    names = ("format", "format_version", "identity_digest", "identity", "layout", "source", "files")
    generation: dict[str, Any] = {
        "number": 0,
        "image_rows": [0, fields["layout"]["image_rows"]],
        "text_rows": [0, fields["layout"]["text_rows"]],
        **{name: fields[name] for name in ("lost_images", "problems", "seal") if name in fields},
    }
    older = {name: fields[name] for name in names}
    return older | {"generations": [generation], "made_with": fields["made_with"]}
