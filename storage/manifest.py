"""The manifest: what a cache is of (identity), how it is laid out, and which rows it holds. No file access.

The manifest is the root of the cache's digests: it carries its own, those of the parquet tables, and, once a
generation is sealed, one over all commit records, which in turn carry the digest of every chunk.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Collection
from typing import Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from storage.errors import CacheCorruptError, CacheFormatError, CacheMismatchError, UsageError

__all__ = [
    "FORMAT_VERSION",
    "CacheIdentity",
    "CacheManifest",
    "DatasetIdentity",
    "Generation",
    "IdentityDifference",
    "Layout",
    "PreprocessIdentity",
    "Seal",
    "Source",
    "StaticFile",
    "TargetsIdentity",
    "TeacherIdentity",
    "TokenizerIdentity",
    "ViewsIdentity",
    "canonical_json",
    "digest_of",
]

FORMAT_VERSION = 1
_RESTORE = "Run teacher-cache repair: it restores the manifest from its backup."
MANIFEST_KEY = "manifest.json"
BACKUP_KEY = "manifest.backup.json"


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no white space: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(value: Any) -> str:
    """sha256, in hex, of :func:`canonical_json`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def fields(self) -> dict[str, Any]:
        """As JSON values, fields that are None left out: one added later does not change what is on disk today."""
        return self.model_dump(mode="json", exclude_none=True)


class TeacherIdentity(_Record):
    """The frozen teacher."""

    name: str = Field(description="As asked for: ViT-B-32, hf-hub:ORG/REPO or local-dir:NAME-OF-FOLDER.")
    pretrained: str | None = Field(None, description="open_clip's pretrained tag, for a built-in name.")
    weights_sha256: str = Field(description="Over every parameter and buffer: name, dtype, shape and bytes.")
    architecture: dict[str, Any] = Field(description="open_clip's model config.")
    activation: str = Field(description="The activation really found in the built model: GELU, QuickGELU, ...")
    embed_dim: int = Field(gt=0, description="Width of the shared embedding space.")
    precision: Literal["fp32", "bf16", "fp16"] = Field(description="Arithmetic of the forward pass.")
    logit_scale: float = Field(gt=0, description="The multiplier of cosines, after exp.")
    logit_bias: float | None = Field(None, description="Added to the logits (SigLIP); absent where there is none.")


class PreprocessIdentity(_Record):
    """Image file to teacher input, proven by the pixels that it makes of fixed probe images."""

    image_size: tuple[int, int] = Field(description="Height and width of the teacher's input, pixels.")
    mean: tuple[float, ...] = Field(description="Subtracted from each channel, in [0, 1].")
    std: tuple[float, ...] = Field(description="Divides each channel.")
    interpolation: str = Field(description="bicubic, bilinear or random, as open_clip names them.")
    resize_mode: str = Field(description="shortest (then centre crop), longest (then pad) or squash.")
    fill_color: int = Field(description="Padding of resize_mode longest, 0-255.")
    antialias: bool = Field(description="Whether shrinking low-passes first.")
    probe: str = Field(
        description="Block means of the probe images' pixels, base64; compared with a tolerance, so that "
        "Pillow and pillow-simd, one level apart here and there, count as the same."
    )


class TokenizerIdentity(_Record):
    """Caption to token ids, proven by the ids of fixed probe texts."""

    name: str = Field(description="Class of the tokenizer.")
    context_length: int = Field(gt=0, description="Tokens per caption after padding.")
    probe_sha256: str = Field(description="Over the ids of the probe texts.")


class ViewsIdentity(_Record):
    """Which crops of an image the teacher saw."""

    policy: Literal["evaluation", "random-resized-crop"] = Field(
        description="evaluation: the one plain evaluation crop; else how the views after it were drawn."
    )
    count: int = Field(1, gt=0, description="Views per image; view 0 is the evaluation crop.")
    scale: tuple[float, float] | None = Field(None, description="Least and greatest share of the image's area.")
    ratio: tuple[float, float] | None = Field(None, description="Least and greatest width / height of a crop.")
    flip: float | None = Field(None, ge=0, le=1, description="Probability that a crop is mirrored.")
    seed: int | None = Field(None, ge=0, description="Of the draws; the boxes themselves are stored too.")

    def holds(self, wanted: ViewsIdentity) -> bool:
        """Whether each view that is wanted is among these, drawn in the same way."""
        same_draws = wanted.model_copy(update={"count": self.count}) == self
        return wanted.count <= self.count and (wanted.count == 1 or same_draws)

    def first(self, count: int) -> ViewsIdentity:
        """The first so many of these; one alone is the evaluation crop, which has no settings."""
        return ViewsIdentity(policy="evaluation") if count == 1 else self.model_copy(update={"count": count})


class TargetsIdentity(_Record):
    """What is stored of the teacher's output."""

    dtype: Literal["float16", "float32"] = Field("float16", description="Of the stored embeddings.")
    normalized: bool = Field(True, description="Rows have unit L2 norm; the norm is kept beside them.")


class DatasetIdentity(_Record):
    """The rows, in order."""

    kind: str = Field(description="The adapter.")
    images: int = Field(ge=0, description="Rows of the image tower.")
    captions: int = Field(ge=0, description="Rows of the text tower.")
    splits: dict[str, int] = Field(description="Images by split.")
    samples_sha256: str = Field(description="Over sample_id, split and content digest of each image, in row order.")
    captions_sha256: str = Field(description="Over image row and text of each caption, in row order.")


# shown to people, proven by other fields: the same weights under another name are the same teacher
_NAMES_ONLY = (("teacher", "name"), ("teacher", "pretrained"), ("dataset", "kind"))

# two correct decoders and resizers differ by a level or two in single pixels, far less in a block's mean
_PROBE_TOLERANCE = 2
_PROBE = ("preprocess", "probe")


_WAY_OUT = "Encode to a new path, or ask for what the cache holds (teacher-cache info shows it)."


class CacheIdentity(_Record):
    """Everything that two caches must share before their rows may be mixed or swapped."""

    teacher: TeacherIdentity
    preprocess: PreprocessIdentity
    tokenizer: TokenizerIdentity
    views: ViewsIdentity
    targets: TargetsIdentity
    dataset: DatasetIdentity

    @property
    def digest(self) -> str:
        """sha256 over all fields but mere names and ``preprocess.probe``, which has a tolerance instead."""
        return digest_of(self._proven())

    @property
    def encoder_digest(self) -> str:
        """The same over teacher, preprocessing, tokenizer and targets alone: how a row is made, of whatever it is."""
        proven = self._proven()
        return digest_of({part: proven[part] for part in ("teacher", "preprocess", "tokenizer", "targets")})

    def _proven(self) -> dict[str, Any]:
        fields = self.fields()
        for part, name in (*_NAMES_ONLY, _PROBE):
            fields[part].pop(name, None)
        return fields

    def differences(self, wanted: CacheIdentity) -> list[IdentityDifference]:
        """Every field in which ``wanted`` differs."""
        here, there = self.fields(), wanted.fields()
        found = []
        for part in here:
            for name in sorted({*here[part], *there[part]}):
                mine, asked = here[part].get(name), there[part].get(name)
                if (part, name) in _NAMES_ONLY:
                    continue
                if (part, name) == _PROBE:
                    if not _probes_agree(str(mine), str(asked)):
                        found.append(IdentityDifference(f"{part}.{name}", "these pixels of the probe images", "others"))
                elif mine != asked:
                    found.append(IdentityDifference(f"{part}.{name}", _short(mine), _short(asked)))
        return found

    def require(
        self, wanted: CacheIdentity, location: str, way_out: str = _WAY_OUT, accept: Collection[str] = ()
    ) -> tuple[str, ...]:
        """Refuse to go on when this identity is not ``wanted``.

        Args:
            location: of the cache, for the message.
            way_out: last sentence of the message.
            accept: fields (``teacher.precision``), or parts (``dataset``) with all their fields, that may differ.

        Returns:
            A line for each difference that was accepted.

        Raises:
            CacheMismatchError: names the cache, each field that differs with both values, and the way out.
            UsageError: ``accept`` names what is no field.
        """
        parts = type(self).model_fields
        known = {f"{part}.{name}" for part in parts for name in type(getattr(self, part)).model_fields}
        unknown = sorted(set(accept) - known - set(parts))
        if unknown:
            raise UsageError(f"{', '.join(unknown)}: no field of an identity; there are {', '.join(sorted(known))}")
        found = self.differences(wanted)
        accepted = [each for each in found if {each.field, each.field.partition(".")[0]} & set(accept)]
        refused = [str(each) for each in found if each not in accepted]
        if refused:
            raise CacheMismatchError(
                f"{location}: this cache is not the one asked for. " + "; ".join(refused) + f". {way_out}"
            )
        return tuple(str(each) for each in accepted)


class IdentityDifference(NamedTuple):
    """One field in which two identities differ."""

    field: str
    found: str
    wanted: str

    def __str__(self) -> str:
        return f"{self.field}: {self.found} in the cache, {self.wanted} asked for"


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 120 else f"{text[:100]}... (sha256 {digest_of(value)[:8]})"


def _probes_agree(a: str, b: str) -> bool:
    left, right = base64.b64decode(a), base64.b64decode(b)
    return len(left) == len(right) and all(abs(x - y) <= _PROBE_TOLERANCE for x, y in zip(left, right, strict=True))


class Layout(_Record):
    """Shapes of the Zarr arrays and of their chunks."""

    embed_dim: int = Field(gt=0)
    views: int = Field(1, gt=0)
    image_rows: int = Field(ge=0)
    text_rows: int = Field(ge=0)
    image_chunk_rows: int = Field(gt=0, description="Images per chunk: unit of work, write, commit, retry, read.")
    text_chunk_rows: int = Field(gt=0, description="Captions per chunk.")
    batch_rows: int = Field(gt=0, description="Rows per forward pass: another number rounds otherwise.")

    def rows(self, tower: Literal["image", "text"]) -> int:
        """All rows of a tower."""
        return self.image_rows if tower == "image" else self.text_rows

    def chunk_rows(self, tower: Literal["image", "text"]) -> int:
        """Rows of a whole chunk of a tower."""
        return self.image_chunk_rows if tower == "image" else self.text_chunk_rows

    @property
    def image_chunks(self) -> int:
        """Chunks of the image tower, per view."""
        return -(-self.image_rows // self.image_chunk_rows)

    @property
    def text_chunks(self) -> int:
        """Chunks of the text tower."""
        return -(-self.text_rows // self.text_chunk_rows)

    @property
    def num_chunks(self) -> int:
        """All chunks of the cache."""
        return self.image_chunks * self.views + self.text_chunks


class Source(_Record):
    """Where the images were read from; not part of the identity, since a dataset may be moved."""

    dataset: str = Field(description="The dataset as asked for, KIND:PATH.")
    image_root: str = Field(description="Folder or URL that relative uris in the samples table start from.")


class StaticFile(_Record):
    """A file written once, when the cache is planned: a parquet table or Zarr's metadata."""

    sha256: str
    rows: int | None = Field(None, description="Of a parquet table.")


class Seal(_Record):
    """Written when every chunk of a generation is committed: from then on its bytes are fixed.

    Counts are of the cache as this generation leaves it, those before it included.
    """

    commits_sha256: str = Field(description="Over key and bytes of the generation's commit records, in key order.")
    images_encoded: int = Field(description="Images with an embedding in each view.")
    images_quarantined: int = Field(description="Images without one in some view; counted once.")
    captions_encoded: int


class Generation(_Record):
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


class CacheManifest(_Record):
    """The whole of ``manifest.json`` but its own digest, which is added and checked as text."""

    format: Literal["teacher-cache"] = "teacher-cache"
    format_version: int = FORMAT_VERSION
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

    @model_validator(mode="after")
    def _targets_are_of_this_format(self) -> Self:
        if self.identity.targets != TargetsIdentity():
            raise ValueError(
                f"format {FORMAT_VERSION} holds normalised float16 rows, targets are {self.identity.targets}"
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
        identity = self.identity.model_copy(update={"views": views})
        added = Generation(
            number=len(self.generations),
            image_rows=(0, self.layout.image_rows),
            text_rows=(0, 0),
            lost_images=0,
            problems={},
            views=(self.layout.views, views.count),
            made_with=made_with if made_with != self.made_with else None,
        )
        fields = dict(self) | {
            "identity": identity,
            "identity_digest": identity.digest,
            "layout": self.layout.model_copy(update={"views": views.count}),
            "files": self.files | files,
            "generations": (*self.generations, added),
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
        if version != FORMAT_VERSION:
            raise CacheFormatError(
                f"{where}: format version {version!r}, this teacher-cache reads {FORMAT_VERSION}. "
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
