"""The manifest: what a cache is of (``teacher_cache.storage.format.identity``), how it is laid out, which rows it
holds. No file access.

The manifest is the root of the cache's digests: it carries its own, those of the parquet tables, and, once a
generation is sealed, one over all commit records, which in turn carry the digest of every chunk.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from teacher_cache.storage.errors import CacheCorruptError, CacheFormatError
from teacher_cache.storage.format.identity import CacheIdentity, Record, ViewsIdentity, digest_of
from teacher_cache.storage.format.layout import Layout

__all__ = [
    "FORMAT_VERSION",
    "CacheManifest",
    "Generation",
    "Seal",
    "Source",
    "StaticFile",
    "finished_by",
    "incomplete_message",
]

FORMAT_VERSION = 2
"""The newest that is known here. A cache is written in the oldest one that can hold it: float16 in 1, int8 in 2."""
_OLDEST_VERSION = {"float16": 1, "int8": 2}
_RESTORE = "Run teacher-cache repair: it restores the manifest from its backup."
MANIFEST_KEY = "manifest.json"
BACKUP_KEY = "manifest.backup.json"
IMPORTED = "imported"
"""Key of ``made_with``: what rows were imported, for people; also where they were copied from such a cache."""
IMPORTED_ROWS = "imported_rows_sha256"


def finished_by(made_with: Mapping[str, str], sealed: int) -> Literal["import", "precompute"]:
    """The command that goes on with an unfinished cache: views are added to an imported one by precompute.

    Args:
        made_with: as the manifest has it.
        sealed: generations, or views, that are finished.
    """
    return "import" if IMPORTED_ROWS in made_with and not sealed else "precompute"


class Source(Record):
    """Where the images were read from; not part of the identity, since a dataset may be moved."""

    dataset: str = Field(description="The dataset as asked for, KIND:PATH.")
    image_root: str = Field(description="Folder or URL that relative uris in the samples table start from.")


class StaticFile(Record):
    """A file written once, when the cache is planned: a parquet table or Zarr's metadata."""

    sha256: str
    rows: int | None = Field(None, description="Of a parquet table.")


class Seal(Record):
    """Written when every chunk of a generation is committed: from then on its bytes are fixed.

    Counts are of the cache as this generation leaves it, those before it included.
    """

    commits_sha256: str = Field(description="Over key and bytes of the generation's commit records, in key order.")
    images_encoded: int = Field(description="Images with an embedding in each view.")
    images_quarantined: int = Field(description="Images without one in some view; counted once.")
    captions_encoded: int


class Generation(Record):
    """What was added together: rows, or views of rows that are there. A cache starts with generation 0.

    Generation 0 has all rows, with the views that were asked for then. One that adds views names them, and has
    neither captions nor problems of its own.
    """

    number: int = Field(ge=0)
    image_rows: tuple[int, int] = Field(description="First row and one past the last.")
    text_rows: tuple[int, int]
    lost_images: int = Field(ge=0, description="Images of the dataset that got no row (missing, unreadable, ...).")
    problems: dict[str, int] = Field(description="Problems met while reading the dataset, counted by kind.")
    views: tuple[int, int] | None = Field(None, description="First view that it added and one past the last.")
    made_with: dict[str, str] | None = Field(None, description="Versions of libraries, if others than the cache's.")
    seal: Seal | None = None


class CacheManifest(Record):
    """The whole of ``manifest.json`` but its own digest, which is added and checked as text."""

    format: Literal["teacher-cache"] = "teacher-cache"
    format_version: int = 1
    identity_digest: str
    identity: CacheIdentity
    layout: Layout
    source: Source
    files: dict[str, StaticFile] = Field(description="By key, all that is neither chunk, commit nor journal.")
    generations: tuple[Generation, ...]
    made_with: dict[str, str] = Field(description="Versions of the libraries that made the pixels and the rows.")

    @model_validator(mode="after")
    def _identity_is_its_digest(self) -> Self:
        if self.identity.digest != self.identity_digest:
            raise ValueError(
                f"identity_digest is {self.identity_digest}, but the identity beside it has {self.identity.digest}"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _oldest_format_that_can(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and "format_version" not in fields and "layout" in fields:
            layout = Layout.model_validate(fields["layout"])
            return {**fields, "format_version": _OLDEST_VERSION[layout.embedding_dtype or "float16"]}
        return fields

    @model_validator(mode="after")
    def _targets_are_of_this_format(self) -> Self:
        targets, stored = self.identity.targets, self.layout.embedding_dtype or "float16"
        if not targets.normalized or targets.dtype != stored:
            raise ValueError(f"the layout holds normalised {stored} rows, targets are {targets}")
        if self.format_version != _OLDEST_VERSION[targets.dtype]:
            raise ValueError(
                f"{targets.dtype} rows are of format {_OLDEST_VERSION[targets.dtype]}, this is {self.format_version}"
            )
        return self

    @model_validator(mode="after")
    def _files_are_below_the_cache(self) -> Self:
        for key in self.files:
            if key.startswith("/") or "://" in key or ".." in key.split("/"):
                raise ValueError(f"files names {key!r}, which is not below the cache")
        return self

    @model_validator(mode="after")
    def _views_are_accounted_for(self) -> Self:
        views = self.identity.views
        if views.count != self.layout.views:
            raise ValueError(f"{views.count} views in the identity, {self.layout.views} in the layout")
        settings = [value is not None for value in (views.scale, views.ratio, views.flip, views.seed)]
        if settings != [views.policy != "evaluation"] * 4 or (views.count > 1) != all(settings):
            raise ValueError(f"one view is the evaluation crop, more are drawn and say how; the identity says {views}")
        spans = [generation.views for generation in self.generations if generation.views is not None]
        edges = [stop for _, stop in spans]
        starts = [*(start for start, _ in spans), self.layout.views]
        if starts[0] < 1 or edges != starts[1:] or any(start >= stop for start, stop in spans):
            raise ValueError(f"generations added views {spans}, which do not lead to the {self.layout.views} there are")
        return self

    @property
    def imported_sha256(self) -> str | None:
        """Of the rows that view 0 and the captions have from another tool's files; None if the teacher made all."""
        return self.made_with.get(IMPORTED_ROWS)

    @property
    def sealed(self) -> bool:
        """Whether every generation is complete."""
        return all(generation.seal is not None for generation in self.generations)

    @property
    def sealed_generations(self) -> tuple[Generation, ...]:
        """The complete generations before the first that is not: what can be read."""
        return tuple(itertools.takewhile(lambda generation: generation.seal is not None, self.generations))

    @property
    def sealed_views(self) -> int:
        """Views that can be read; 0 while the first rows are not complete."""
        return max((self.views_of(generation)[1] for generation in self.sealed_generations), default=0)

    @property
    def adds_views(self) -> bool:
        """Whether views are planned that are not complete, so that a kill may have left Zarr's metadata behind."""
        return any(generation.views is not None and generation.seal is None for generation in self.generations)

    def views_of(self, generation: Generation) -> tuple[int, int]:
        """First view of a generation and one past the last."""
        if generation.views is not None:
            return generation.views
        added = [other.views[0] for other in self.generations if other.views is not None]
        return 0, min(added, default=self.layout.views)

    @property
    def lost_images(self) -> int:
        """Images of the dataset that got no row."""
        return sum(generation.lost_images for generation in self.generations)

    @property
    def problems(self) -> dict[str, int]:
        """Problems of the dataset by kind, over all generations."""
        total: Counter[str] = Counter()
        for generation in self.generations:
            total.update(generation.problems)
        return dict(sorted(total.items()))

    def with_views(
        self, views: ViewsIdentity, files: dict[str, StaticFile], made_with: dict[str, str]
    ) -> CacheManifest:
        """The same cache once more views were planned, which are a generation of their own.

        Args:
            views: more of them than there are.
            files: of Zarr's metadata, for the shapes that there will be.
            made_with: versions of the libraries that make the new views.
        """
        added = Generation(
            number=len(self.generations),
            image_rows=(0, self.layout.image_rows),
            text_rows=(0, 0),
            lost_images=0,
            problems={},
            views=(self.layout.views, views.count),
            made_with=made_with if made_with != self.made_with else None,
        )
        return self._of_views(views, files, (*self.generations, added))

    def before_views(self, views: int, files: dict[str, StaticFile]) -> CacheManifest:
        """The same cache before its last generation was planned, which added views to the first ``views`` ones.

        Args:
            files: of Zarr's metadata, for the shapes that there were.
        """
        return self._of_views(self.identity.views.first(views), files, self.generations[:-1])

    def _of_views(
        self, views: ViewsIdentity, files: dict[str, StaticFile], generations: tuple[Generation, ...]
    ) -> CacheManifest:
        identity = self.identity.model_copy(update={"views": views})
        fields = dict(self) | {
            "identity": identity,
            "identity_digest": identity.digest,
            "layout": self.layout.model_copy(update={"views": views.count}),
            "files": self.files | files,
            "generations": generations,
        }
        return CacheManifest(**fields)

    def seals(self, earlier: CacheManifest) -> bool:
        """Whether this is ``earlier`` with the last of its seals."""
        if earlier.sealed or not self.sealed or len(earlier.generations) != len(self.generations):
            return False
        reopened = tuple(
            mine.model_copy(update={"seal": None}) if theirs.seal is None else mine
            for mine, theirs in zip(self.generations, earlier.generations, strict=True)
        )
        return self.model_copy(update={"generations": reopened}) == earlier

    def replaces_seals_of(self, earlier: CacheManifest) -> bool:
        """Whether what was sealed in ``earlier`` has other bytes now."""
        pairs = zip(earlier.generations, self.generations, strict=False)
        return any(before.seal is not None and before.seal != now.seal for before, now in pairs)

    def adds_views_to(self, earlier: CacheManifest) -> bool:
        """Whether this is ``earlier`` with more views planned."""
        return self.layout.views > earlier.layout.views and self.generations[:-1] == earlier.generations

    def unsealed(self) -> CacheManifest:
        """As it was before its last generation was sealed."""
        last = self.generations[-1].model_copy(update={"seal": None})
        return self.model_copy(update={"generations": (*self.generations[:-1], last)})

    @property
    def digest(self) -> str:
        """sha256 over the whole manifest: what a student's checkpoint records."""
        return digest_of(self.fields())

    def to_bytes(self) -> bytes:
        """``manifest.json``: indented for people, with its own digest as last field."""
        fields = self.fields()
        return (json.dumps({**fields, "digest": self.digest}, indent=2, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, location: str, key: str = MANIFEST_KEY) -> CacheManifest:
        """Parse and prove a manifest.

        Args:
            location, key: where the bytes are from, for messages.

        Raises:
            CacheFormatError: not a manifest, or of a format that this version does not know.
            CacheCorruptError: the content does not have the digest that it carries.
        """
        where = f"{location}/{key}"
        try:
            fields = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise CacheCorruptError(f"{where}: not JSON ({error}). {_RESTORE}") from error
        if not isinstance(fields, dict) or fields.get("format") != "teacher-cache":
            found = fields.get("format") if isinstance(fields, dict) else type(fields).__name__
            raise CacheFormatError(
                f"{where}: format is {found!r}, 'teacher-cache' wanted. Is this another tool's folder?"
            )
        version = fields.get("format_version")
        if version not in _OLDEST_VERSION.values() or isinstance(version, bool):
            raise CacheFormatError(
                f"{where}: format version {version!r}, this teacher-cache reads 1 to {FORMAT_VERSION}. "
                "Install a newer teacher-cache."
            )
        recorded = fields.pop("digest", None)
        try:
            found_digest = digest_of(fields)
        except ValueError as error:  # NaN, half a surrogate pair: JSON's parser lets them in
            raise CacheCorruptError(f"{where}: {error}. {_RESTORE}") from error
        if recorded != found_digest:
            raise CacheCorruptError(
                f"{where}: content has digest {found_digest[:12]}, {str(recorded)[:12]} is recorded in it. "
                f"It was edited or damaged. {_RESTORE}"
            )
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise CacheFormatError(f"{where}: {error}") from error


def incomplete_message(location: str, manifest: CacheManifest, done: int, wanted: int) -> str:
    """How an unfinished cache is reported, wherever it is met."""
    command = finished_by(manifest.made_with, len(manifest.sealed_generations))
    return f"{location}: {done} of {wanted} chunks are there. Run the same {command} command again to finish it."
