"""A large cache without a teacher: unit rows of noise, put in place by the writer that precompute uses."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from teacher_cache.storage.format.commits import ChunkRef, all_chunks
from teacher_cache.storage.format.identity import (
    CacheIdentity,
    DatasetIdentity,
    PreprocessIdentity,
    TargetsIdentity,
    TeacherIdentity,
    TokenizerIdentity,
    ViewsIdentity,
)
from teacher_cache.storage.format.layout import ARRAYS, Layout
from teacher_cache.storage.format.manifest import Source
from teacher_cache.storage.format.tables import CAPTIONS, PROBLEMS, SAMPLES, SCHEMAS
from teacher_cache.storage.write.plan import plan_cache
from teacher_cache.storage.write.writer import EmbeddingWriter

_THREADS = 2


def big_cache(
    folder: Path | str,
    rows: int,
    width: int = 512,
    chunk_rows: int = 4096,
    captions: int | None = None,
    block: NDArray[np.float16] | None = None,
    rows_of: Callable[[ChunkRef, int], NDArray[np.float16]] | None = None,
    **fields: Any,
) -> str:
    """A sealed cache of ``rows`` images of one view, below ``folder``; one that is there already is taken.

    Written, committed and sealed as precompute does it; only the digest of the dataset in the identity, which takes a
    minute for ten million rows and which no reader looks at, is that of these arguments instead of the rows.

    Args:
        folder: a folder, or a URL.
        width: of the embeddings, float16.
        captions: of the text tower, spread evenly over the images; one for each image if left out.
        block: (chunk_rows, width) unit rows that each chunk has, its columns in another order; noise if left out.
        rows_of: makes the unit rows of a chunk, given their number, in place of the block.
        fields: further fields of the layout. Caches of other fields or blocks need other folders.

    Returns:
        Where the cache is.
    """
    captions = rows if captions is None else captions
    location = f"{folder}/big-{rows}x{width}-{chunk_rows}-{captions}.cache"
    identity = _identity(rows, captions, width)
    layout = Layout(
        embed_dim=width,
        image_rows=rows,
        text_rows=captions,
        image_chunk_rows=chunk_rows,
        text_chunk_rows=chunk_rows,
        batch_rows=256,
        **fields,
    )
    if layout.embedding_dtype is not None:
        identity = identity.model_copy(update={"targets": TargetsIdentity(dtype=layout.embedding_dtype)})
    source = Source(dataset="noise:/nowhere", image_root="/nowhere")
    manifest = plan_cache(location, identity, layout, source, _tables(rows, captions), {"torch": "0"})
    if not manifest.sealed:
        _write(location, rows_of or _permuted(_noise(layout) if block is None else block))
    return location


def _noise(layout: Layout) -> NDArray[np.float16]:
    size, width = max(layout.image_chunk_rows, layout.text_chunk_rows), layout.embed_dim
    values = np.random.default_rng(width).standard_normal((size, width), np.float32)
    rows: NDArray[np.float16] = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)
    return rows


def _permuted(block: NDArray[np.float16]) -> Callable[[ChunkRef, int], NDArray[np.float16]]:
    # noise is the slow part: one block of it serves all chunks, its columns in another order for each
    def rows_of(ref: ChunkRef, rows: int) -> NDArray[np.float16]:
        columns = np.random.default_rng([ref.tower == "text", ref.view, ref.chunk]).permutation(block.shape[1])
        return np.ascontiguousarray(block[:rows, columns])

    return rows_of


def _write(location: str, rows_of: Callable[[ChunkRef, int], NDArray[np.float16]]) -> None:
    writer = EmbeddingWriter(location)
    layout = writer.manifest.layout
    refs = [ref for ref in all_chunks(layout) if not writer.is_committed(ref)]

    def write(ref: ChunkRef, embedding: NDArray[np.float16]) -> None:
        arrays: dict[str, NDArray[Any]] = {"embedding": embedding, "norm": np.full(len(embedding), 10, np.float32)}
        if "view" in ARRAYS[ref.tower]:
            arrays["view"] = np.tile(np.array([0, 0, 224, 224, 0], np.float32), (len(embedding), 1))
        writer.write(ref, arrays)

    embeddings = (rows_of(ref, len(ref.rows(layout))) for ref in refs)
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(refs), 2 * _THREADS):  # so few chunks are in memory at a time
            some = refs[start : start + 2 * _THREADS]
            for _ in pool.map(write, some, [next(embeddings) for _ in some]):
                pass
    writer.seal()


def _tables(rows: int, captions: int) -> dict[str, pa.Table]:
    """Made by arrow alone: ten million Python strings would need more memory than the embeddings."""
    row, caption = pa.array(np.arange(rows)), pa.array(np.arange(captions))
    image_row = pa.array(np.arange(captions) * rows // max(captions, 1))
    name, none = row.cast(pa.string()), pa.scalar("")
    # in parts: arrow makes room for four bytes a character, of which one array holds 2 GiB
    parts = [pc.utf8_lpad(name.slice(start, 1 << 20), 64, "0") for start in range(0, rows, 1 << 20)]
    return {
        SAMPLES: pa.table(
            {
                "row": row,
                "sample_id": name,
                "uri": pc.binary_join_element_wise(name, pa.scalar(".jpg"), none),
                "offset": pa.array(np.full(rows, -1)),
                "length": pa.array(np.full(rows, -1)),
                "content_sha256": pa.chunked_array(parts, pa.string()),
                "split": pa.repeat(pa.scalar("train"), rows),
            },
            schema=SCHEMAS[SAMPLES],
        ),
        CAPTIONS: pa.table(
            {
                "row": caption,
                "image_row": image_row,
                "text": pc.binary_join_element_wise(pa.scalar("picture"), caption.cast(pa.string()), pa.scalar(" ")),
            },
            schema=SCHEMAS[CAPTIONS],
        ),
        PROBLEMS: SCHEMAS[PROBLEMS].empty_table(),
    }


def _identity(rows: int, captions: int, width: int) -> CacheIdentity:
    digest = hashlib.sha256(f"{rows} {captions}".encode()).hexdigest()
    return CacheIdentity(
        teacher=TeacherIdentity(
            name="noise",
            pretrained=None,
            weights_sha256="0" * 64,
            architecture={"embed_dim": width},
            activation="GELU",
            embed_dim=width,
            precision="fp32",
            logit_scale=100.0,
            logit_bias=None,
        ),
        preprocess=PreprocessIdentity(
            image_size=(224, 224),
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
            interpolation="bicubic",
            resize_mode="shortest",
            fill_color=0,
            antialias=True,
            probe="AAECAw==",
        ),
        tokenizer=TokenizerIdentity(name="SimpleTokenizer", context_length=77, probe_sha256="0" * 64),
        views=ViewsIdentity(policy="evaluation", count=1),
        targets=TargetsIdentity(),
        dataset=DatasetIdentity(
            kind="noise",
            images=rows,
            captions=captions,
            splits={"train": rows},
            samples_sha256=digest,
            captions_sha256=digest,
        ),
    )
