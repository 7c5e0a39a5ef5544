"""Targets as WebDataset tars: one beside each tar of the dataset, with its name and its keys.

A member ``KEY.npz`` holds the arrays ``image`` (dim,) and ``text`` (captions, dim), float16 of unit norm; ``box`` (5,)
float32, the region that the teacher saw: top, left, height, width in source pixels, and 1.0 if it was mirrored; and
``row`` () int64, the row in the cache.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.files.new_files import new_folder
from teacher_cache.storage.format.tables import SAMPLES
from teacher_cache.storage.look.export import EXPORT_KEY, MEMORY_BYTES, require_local_folder
from teacher_cache.storage.look.sampling import Progress, require_view, stage
from teacher_cache.storage.read.reader import EmbeddingReader

_ROWS_AT_ONCE = 4096


class SidecarResult(BaseModel, frozen=True):
    """The record of an export of tars; ``export.json`` in the folder holds the same."""

    out: str
    cache: str
    manifest_digest: str
    split: str | None
    view: int
    tars: int
    images: int
    captions: int
    embed_dim: int
    quarantined: int = Field(description="Images of the cache left out: they have no embedding in some view.")


def export_sidecar(
    location: str, out: str, split: str | None = None, view: int = 0, progress: Progress | None = None
) -> SidecarResult:
    """Write a tar of targets for each tar of a sealed cache's dataset, below ``out`` as theirs lie below their folder.

    Args:
        out: new local folder, which appears when the export is complete.
        split: split of the images. Default: all.
        view: view of the images; all captions of an image are written.
        progress: called with (``export``, images done, images in all).

    Raises:
        UsageError: the folder exists or is a URL, the dataset is not made of tars, or there is no such split or view.
        CacheError: as ``EmbeddingReader`` raises it.
    """
    require_local_folder(out)
    reader = EmbeddingReader(location, memory_bytes=MEMORY_BYTES)
    require_view(reader, view)
    rows = reader.image_rows(split)
    tars = _rows_by_tar(reader, rows)
    report, images, captions = stage(progress, "export"), 0, 0
    with new_folder(Path(out)) as folder:
        for uri, own in tars.items():
            path = folder / uri
            path.parent.mkdir(parents=True, exist_ok=True)
            with tarfile.open(path, "w") as tar:
                for start in range(0, len(own), _ROWS_AT_ONCE):
                    part = own[start : start + _ROWS_AT_ONCE]
                    captions += _write_rows(tar, reader, uri, part, view)
                    images += len(part)
                    report(images, len(rows))
        result = SidecarResult(
            out=out,
            cache=location,
            manifest_digest=reader.manifest.digest,
            split=split,
            view=view,
            tars=len(tars),
            images=images,
            captions=captions,
            embed_dim=reader.embed_dim,
            quarantined=len(reader.quarantined),
        )
        (folder / EXPORT_KEY).write_text(json.dumps(result.model_dump(mode="json"), indent=2) + "\n")
    return result


def _rows_by_tar(reader: EmbeddingReader, rows: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Return the rows of each tar by its uri, in order.

    Raises:
        UsageError: an image does not lie in a tar below the dataset's folder.
    """
    parts: dict[str, list[NDArray[np.int64]]] = {}
    first, is_chosen = 0, np.zeros(reader.manifest.layout.image_rows, bool)
    is_chosen[rows] = True
    for uris, offsets in zip(reader.column(SAMPLES, "uri"), reader.column(SAMPLES, "offset"), strict=True):
        coded = uris.combine_chunks().dictionary_encode()
        codes, inside = coded.indices.to_numpy(), offsets.to_numpy() >= 0
        chosen = np.flatnonzero(is_chosen[first : first + len(uris)])
        chosen = chosen[np.argsort(codes[chosen], kind="stable")]
        for group in np.split(chosen, np.flatnonzero(np.diff(codes[chosen])) + 1):
            uri = coded.dictionary[codes[group[0]]].as_py() if len(group) else ""
            if len(group) and not (inside[group].all() and _is_tar_below(uri)):
                raise UsageError(
                    f"{reader.location}: the image {uri} does not lie in a tar of this dataset "
                    f"({reader.manifest.source.dataset}), and --sidecar writes one tar beside each. Leave --sidecar "
                    "out, or read the rows by teacher_cache.TargetDataset"
                )
            parts.setdefault(uri, []).append(group + first)
        first += len(uris)
    return {uri: np.concatenate(own) for uri, own in parts.items() if uri}


def _is_tar_below(uri: str) -> bool:
    path = PurePosixPath(uri)
    return path.suffix == ".tar" and "://" not in uri and not path.is_absolute() and ".." not in path.parts


def _write_rows(tar: tarfile.TarFile, reader: EmbeddingReader, uri: str, rows: NDArray[np.int64], view: int) -> int:
    """Append the members of some images, and return their number of captions."""
    captions, owners = reader.caption_rows(rows)
    texts = np.split(_half(reader.take("text", captions)), np.searchsorted(owners, np.arange(1, len(rows))))
    images, boxes = _half(reader.take("image", rows, view)), reader.take("image", rows, view, "view")
    keys = reader.table_rows(SAMPLES, rows)["sample_id"].to_pylist()
    for key, row, image, text, box in zip(keys, rows, images, texts, boxes, strict=True):
        content = io.BytesIO()
        np.savez(content, image=image, text=text, box=box, row=row)
        # ids=tar puts the tar before the key; no time in it, so that an export repeats byte by byte
        member = tarfile.TarInfo(f"{key.removeprefix(f'{uri}/')}.npz")
        member.size = content.tell()
        content.seek(0)
        tar.addfile(member, content)
    return len(captions)


def _half(values: NDArray[Any]) -> NDArray[np.float16]:
    return values.astype(np.float16, copy=False)
