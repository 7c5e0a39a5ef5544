"""The identity of a cache: how its rows were made and from what, compared field by field. No file access."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Collection
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from teacher_cache.storage.errors import CacheMismatchError, UsageError


def canonical_json(value: Any) -> bytes:
    """Return UTF-8 JSON with sorted keys and no white space: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(value: Any) -> str:
    """Return the sha256, in hex, of :func:`canonical_json`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def with_digest(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with their digest added as the last one."""
    return {**fields, "digest": digest_of(fields)}


def without_digest(fields: Any) -> dict[str, Any]:
    """Check the digest of parsed fields, and return the fields without it.

    Raises:
        ValueError: not an object, or its content does not match its digest.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"an object is expected, not {type(fields).__name__}")
    content = {name: value for name, value in fields.items() if name != "digest"}
    actual, recorded = digest_of(content), str(fields.get("digest"))
    if recorded != actual:
        raise ValueError(f"content has digest {actual[:12]}, {recorded[:12]} is recorded in it")
    return content


class Record(BaseModel):
    """Base of models that are stored on disk: frozen, and without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def fields(self) -> dict[str, Any]:
        """Return JSON values without fields that are None, so a new field changes no existing digest."""
        return self.model_dump(mode="json", exclude_none=True)


class TeacherIdentity(Record):
    """The frozen teacher."""

    name: str = Field(description="Its name, as for precompute; of a folder without its path: local-dir:NAME.")
    pretrained: str | None = Field(None, description="open_clip's pretrained tag, for a built-in name.")
    weights_sha256: str = Field(description="Over every parameter and buffer: name, dtype, shape and bytes.")
    architecture: dict[str, Any] = Field(description="Model config of open_clip, or of transformers.")
    activation: str = Field(description="Activation of the built model: GELU, QuickGELU, ...")
    embed_dim: int = Field(gt=0, description="Width of the shared embedding space.")
    precision: Literal["fp32", "bf16", "pure_bf16", "fp16"] = Field(
        description="Arithmetic of the forward pass. bf16 and fp16 are torch.autocast; pure_bf16 has bfloat16 weights."
    )
    logit_scale: float = Field(gt=0, description="The multiplier of cosines, after exp.")
    logit_bias: float | None = Field(None, description="Added to the logits (SigLIP); absent where there is none.")


class PreprocessIdentity(Record):
    """Image file to teacher input, checked by the pixels that it makes of fixed probe images."""

    image_size: tuple[int, int] = Field(description="Height and width of the teacher's input, pixels.")
    mean: tuple[float, ...] = Field(description="Subtracted from each channel, in [0, 1].")
    std: tuple[float, ...] = Field(description="Divides each channel.")
    interpolation: str = Field(description="bicubic, bilinear or random, as open_clip names them.")
    resize_mode: str = Field(description="shortest (then centre crop), longest (then pad) or squash.")
    fill_color: int = Field(description="Padding of resize_mode longest, 0-255.")
    antialias: bool = Field(description="Filter: whether images are low-passed before they shrink.")
    probe: str = Field(
        description="Block means of the probe images' pixels, base64; compared with a tolerance, so that "
        "Pillow and pillow-simd, one level apart here and there, count as the same."
    )
    decoder: str | None = Field(None, description="Decoder, if not Pillow: jpeg-scaled.")


class TokenizerIdentity(Record):
    """Caption to token ids, checked by the ids of fixed probe texts."""

    name: str = Field(description="Class of the tokenizer.")
    context_length: int = Field(gt=0, description="Tokens per caption after padding.")
    probe_sha256: str = Field(description="Over the ids of the probe texts.")


class ViewsIdentity(Record):
    """The crops of an image that the teacher saw."""

    policy: Literal["evaluation", "random-resized-crop"] = Field(
        description="evaluation: the one plain evaluation crop; else how the views after it were drawn."
    )
    count: int = Field(1, gt=0, description="Views per image; view 0 is the evaluation crop.")
    scale: tuple[float, float] | None = Field(None, description="Least and greatest share of the image's area.")
    ratio: tuple[float, float] | None = Field(None, description="Least and greatest width / height of a crop.")
    flip: float | None = Field(None, ge=0, le=1, description="Probability that a crop is mirrored.")
    seed: int | None = Field(None, ge=0, description="Seed of the draws. The boxes are stored too.")

    def holds(self, wanted: ViewsIdentity) -> bool:
        """Return whether these views include all of ``wanted``, drawn in the same way."""
        same_draws = wanted.model_copy(update={"count": self.count}) == self
        return wanted.count <= self.count and (wanted.count == 1 or same_draws)


class TargetsIdentity(Record):
    """The stored form of the teacher's output."""

    dtype: Literal["float16", "int8"] = Field(
        "float16", description="Storage type of the embeddings; int8 has a scale for each column of each chunk."
    )
    normalized: bool = Field(True, description="Rows have unit L2 norm; the norm is kept beside them.")

    @property
    def layout_dtype(self) -> Literal["int8"] | None:
        """Dtype as ``Layout.embedding_dtype`` has it: None for float16."""
        return None if self.dtype == "float16" else self.dtype


class DatasetIdentity(Record):
    """The rows, in order."""

    kind: str = Field(description="The adapter.")
    images: int = Field(ge=0, description="Rows of the image tower.")
    captions: int = Field(ge=0, description="Rows of the text tower.")
    splits: dict[str, int] = Field(description="Images by split.")
    samples_sha256: str = Field(description="Over sample_id, split and content digest of each image, in row order.")
    captions_sha256: str = Field(description="Over image row, text and any kind of each caption, in row order.")
    caption_kinds: dict[str, int] | None = Field(
        None, description="Captions by kind; absent where the dataset names no kinds."
    )


NAMES_ONLY = (("teacher", "name"), ("teacher", "pretrained"), ("dataset", "kind"))
"""Fields for display only: the same weights under another name are the same teacher."""

# two correct decoders and resizers differ by a level or two in single pixels, far less in a block's mean
_PROBE_TOLERANCE = 2
_PROBE = ("preprocess", "probe")


_WAY_OUT = "Encode to a new path, or ask for what the cache holds (teacher-cache info shows it)."


class CacheIdentity(Record):
    """Everything that two caches must share before their rows may be mixed or swapped."""

    teacher: TeacherIdentity
    preprocess: PreprocessIdentity
    tokenizer: TokenizerIdentity
    views: ViewsIdentity
    targets: TargetsIdentity
    dataset: DatasetIdentity

    @property
    def digest(self) -> str:
        """sha256 over all fields except display names and ``preprocess.probe``, which is compared with a tolerance."""
        return digest_of(self._proven())

    @property
    def encoder_digest(self) -> str:
        """sha256 over teacher, preprocessing, tokenizer and targets: how a row is made, for any dataset."""
        proven = self._proven()
        return digest_of({part: proven[part] for part in ("teacher", "preprocess", "tokenizer", "targets")})

    def _proven(self) -> dict[str, Any]:
        fields = self.fields()
        for part, name in (*NAMES_ONLY, _PROBE):
            fields[part].pop(name, None)
        return fields

    def differences(self, wanted: CacheIdentity) -> list[IdentityDifference]:
        """Return every field in which ``wanted`` differs."""
        own, other = self.fields(), wanted.fields()
        different = []
        for part in own:
            for name in sorted({*own[part], *other[part]}):
                stored, expected = own[part].get(name), other[part].get(name)
                if (part, name) in NAMES_ONLY:
                    continue
                if (part, name) == _PROBE:
                    if not _probes_agree(str(stored), str(expected)):
                        different.append(
                            IdentityDifference(f"{part}.{name}", "these pixels of the probe images", "others")
                        )
                elif stored != expected:
                    different.append(IdentityDifference(f"{part}.{name}", _short(stored), _short(expected)))
        return different

    def require(
        self, wanted: CacheIdentity, location: str, way_out: str = _WAY_OUT, accept: Collection[str] = ()
    ) -> tuple[str, ...]:
        """Check that this identity is ``wanted``.

        Args:
            location: location of the cache, for the message.
            way_out: last sentence of the message.
            accept: fields (``teacher.precision``), or parts (``dataset``) with all their fields, that may differ.

        Returns:
            A line for each accepted difference.

        Raises:
            CacheMismatchError: names the cache, each field that differs with both values, and the way out.
            UsageError: ``accept`` names an unknown field.
        """
        parts = type(self).model_fields
        known = {f"{part}.{name}" for part in parts for name in type(getattr(self, part)).model_fields}
        unknown = sorted(set(accept) - known - set(parts))
        if unknown:
            raise UsageError(f"{', '.join(unknown)}: no field of an identity; there are {', '.join(sorted(known))}")
        differences = self.differences(wanted)
        accepted = [item for item in differences if {item.field, item.field.partition(".")[0]} & set(accept)]
        refused = [str(item) for item in differences if item not in accepted]
        if refused:
            raise CacheMismatchError(
                f"{location}: this cache is not the one asked for. " + "; ".join(refused) + f". {way_out}"
            )
        return tuple(str(item) for item in accepted)


class IdentityDifference(NamedTuple):
    """One field in which two identities differ."""

    field: str
    cached: str
    requested: str

    def __str__(self) -> str:
        return short_digests(f"{self.field}: {self.cached} in the cache, {self.requested} asked for")


def short_digests(text: str) -> str:
    """Return a text for people: of each sha256 in it the first 12 digits."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", text)


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 120 else f"{text[:100]}... (sha256 {digest_of(value)[:8]})"


def _probes_agree(a: str, b: str) -> bool:
    means_a, means_b = base64.b64decode(a), base64.b64decode(b)
    if len(means_a) != len(means_b):
        return False
    return all(abs(x - y) <= _PROBE_TOLERANCE for x, y in zip(means_a, means_b, strict=True))
