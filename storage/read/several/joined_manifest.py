"""One manifest for several caches that are read as one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from teacher_cache.storage.errors import CacheMismatchError
from teacher_cache.storage.format.identity import DatasetIdentity, digest_of
from teacher_cache.storage.format.layout import Layout
from teacher_cache.storage.format.manifest import MANIFEST_KEY, CacheManifest, Seal, Source, StaticFile


def joined_manifest(parts: Mapping[str, CacheManifest]) -> CacheManifest:
    """Return the manifest that stands for several sealed caches. It names the digest of each.

    Args:
        parts: Manifests by location, in the order of their rows.

    Raises:
        CacheMismatchError: They are not of one identity and layout, or two are of the same pictures. The message names
            two of them, with both values.
    """
    (first_name, *names), manifests = parts, [*parts.values()]
    for name in names:
        _require_alike(first_name, name, parts)
    _require_each_once(parts)
    first, datasets = manifests[0], [manifest.identity.dataset for manifest in manifests]
    dataset = DatasetIdentity(
        kind=datasets[0].kind,
        images=sum(dataset.images for dataset in datasets),
        captions=sum(dataset.captions for dataset in datasets),
        splits=_sums(dataset.splits for dataset in datasets),
        samples_sha256=digest_of([dataset.samples_sha256 for dataset in datasets]),
        captions_sha256=digest_of([dataset.captions_sha256 for dataset in datasets]),
        caption_kinds=None if datasets[0].caption_kinds is None else _sums(one.caption_kinds or {} for one in datasets),
    )
    identity = first.identity.model_copy(update={"dataset": dataset})
    rows = {"image_rows": dataset.images, "text_rows": dataset.captions}
    roots = {manifest.source.image_root for manifest in manifests}
    return CacheManifest(
        identity=identity,
        identity_digest=identity.digest,
        layout=first.layout.model_copy(update=rows),
        # not the pattern: the digest does not depend on how it is written
        source=Source(dataset=_datasets(manifests), image_root=roots.pop() if len(roots) == 1 else ""),
        files={
            f"{number:06d}/{MANIFEST_KEY}": StaticFile(sha256=manifest.digest)
            for number, manifest in enumerate(manifests)
        },
        lost_images=sum(manifest.lost_images for manifest in manifests),
        problems=_sums(manifest.problems for manifest in manifests),
        seal=_joined_seal([manifest.seal for manifest in manifests if manifest.seal is not None]),
        made_with={name: value for manifest in reversed(manifests) for name, value in manifest.made_with.items()},
    )


def missing_parts(manifests: Sequence[CacheManifest]) -> list[int]:
    """Return the numbers of the parts that are not there, where all are parts of one cut: ``part=3/100``."""
    cuts = [re.search(r"[?&]part=(\d+)/(\d+)", manifest.source.dataset) for manifest in manifests]
    numbers = [(int(cut[1]), int(cut[2])) for cut in cuts if cut]
    if len(numbers) < len(manifests) or len({parts for _, parts in numbers}) > 1:
        return []
    return sorted({*range(1, numbers[0][1] + 1)} - {number for number, _ in numbers})


def _datasets(manifests: Sequence[CacheManifest]) -> str:
    """Return the datasets of parts, without their part, each once."""
    names = dict.fromkeys(re.sub(r"([?&])part=\d+/\d+&?", r"\1", one.source.dataset).rstrip("?&") for one in manifests)
    first, *others = names
    return f"{first} and {len(others)} others" if others else first


def _joined_seal(seals: Sequence[Seal]) -> Seal:
    stored = [seal.stored_bytes for seal in seals if seal.stored_bytes is not None]
    return Seal(
        commits_sha256=digest_of([seal.commits_sha256 for seal in seals]),
        images_encoded=sum(seal.images_encoded for seal in seals),
        images_quarantined=sum(seal.images_quarantined for seal in seals),
        captions_encoded=sum(seal.captions_encoded for seal in seals),
        stored_bytes=sum(stored) if stored else None,
    )


def _sums(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for part in counts:
        total.update(part)
    return dict(total)


def _require_alike(first: str, other: str, parts: Mapping[str, CacheManifest]) -> None:
    if "labelled" in (parts[name].identity.dataset.kind for name in (first, other)):
        raise CacheMismatchError(
            f"{first} and {other}: caches of labelled images each hold the prompts of all classes, and are not read as "
            "one. Precompute one cache of all folders"
        )
    parts[other].identity.require(
        parts[first].identity,
        other,
        f"It was compared with {first}: caches are read as one only if one teacher made them in one way. Name each "
        "alone, or encode one again",
        ("dataset",),
    )
    with_kinds = [name for name in (first, other) if parts[name].identity.dataset.caption_kinds is not None]
    if len(with_kinds) == 1:
        raise CacheMismatchError(
            f"{first} and {other}: only the captions of {with_kinds[0]} have kinds. To read them as one, name the "
            "kinds in both datasets: precompute --reuse OLD --cache NEW copies the rows"
        )
    form, other_form = (_form(parts[name].layout) for name in (first, other))
    for name, value in form.items():
        if value != other_form[name]:
            raise CacheMismatchError(
                f"{first} and {other}: {name} is {value} and {other_form[name]}. To read them as one, copy {other}: "
                f"precompute --reuse {other} --cache NEW, with --chunk-rows or --compress as {first} has them. Rows of "
                "float16 are copied without the teacher"
            )


def _form(layout: Layout) -> dict[str, Any]:
    """Return what the layouts of parts must have in common."""
    names = ("image_chunk_rows", "text_chunk_rows", "embedding_dtype", "compressor")
    return {name: getattr(layout, name) for name in names}


def _require_each_once(parts: Mapping[str, CacheManifest]) -> None:
    names: dict[str, str] = {}
    for name, manifest in parts.items():
        samples = manifest.identity.dataset.samples_sha256
        if samples in names and manifest.layout.image_rows:
            raise CacheMismatchError(f"{names[samples]} and {name}: both are of the same pictures. Leave one out")
        names[samples] = name
