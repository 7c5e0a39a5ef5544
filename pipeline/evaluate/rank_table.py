"""The rank of every query as a parquet file, to compare a student with its teacher query by query.

    direction       ``i2t`` (the query is an image) or ``t2i`` (it is a caption); all of i2t first
    query           position of the image, or of the caption, in the split
    sample_id       sample_id of the image
    caption         text of the caption for t2i; null for i2t
    teacher_rank    rank of the first positive, from 1; null if there is none down to ``depth``
    student_rank    the same for the student; no such column without a student

The file's metadata has ``depth``, ``split``, ``cache``, ``cache_manifest_digest``, ``run`` and ``checkpoint``. The
queries that a student loses at R@1: ``teacher_rank = 1 AND (student_rank IS NULL OR student_rank > 1)``.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from teacher_cache.pipeline.evaluate.recall import RetrievalRanks
from teacher_cache.pipeline.evaluate.split import EvaluationSplit
from teacher_cache.storage.files.location import LocalFiles

__all__ = ["RANK_DEPTH", "write_rank_table"]

RANK_DEPTH = 100
"""Depth of the ranks in a rank table."""


def write_rank_table(
    path: Path,
    split: EvaluationSplit,
    teacher: RetrievalRanks,
    student: RetrievalRanks | None,
    run: str | None = None,
    checkpoint: str | None = None,
) -> None:
    """Write the table atomically; an existing file is replaced.

    Args:
        teacher, student: ranks on this split, with the same depth.
        run, checkpoint: origin of the student, for the metadata.
    """
    images, captions = len(teacher.i2t), len(teacher.t2i)
    ids = pa.array(split.sample_ids, pa.string())
    columns = {
        "direction": pa.array(["i2t"] * images + ["t2i"] * captions),
        "query": pa.array(np.concatenate([np.arange(images), np.arange(captions)]), pa.int64()),
        "sample_id": pa.concat_arrays([ids, ids.take(pa.array(split.text_image))]),
        "caption": pa.concat_arrays([pa.nulls(images, pa.string()), pa.array(split.captions, pa.string())]),
        "teacher_rank": _ranks(teacher.i2t, teacher.t2i),
    }
    if student is not None:
        columns["student_rank"] = _ranks(student.i2t, student.t2i)
    about = {
        "depth": str(teacher.depth),
        "split": split.name,
        "cache": split.cache,
        "cache_manifest_digest": split.reader.manifest.digest,
        "run": run,
        "checkpoint": checkpoint,
    }
    known = {key: value for key, value in about.items() if value is not None}
    sink = io.BytesIO()
    pq.write_table(pa.table(columns).replace_schema_metadata(known), sink, compression="zstd")
    LocalFiles(str(path.parent)).write(path.name, sink.getvalue())


def _ranks(i2t: NDArray[np.int32], t2i: NDArray[np.int32]) -> pa.Array:
    ranks = np.concatenate([i2t, t2i])
    return pa.array(ranks, pa.int32(), mask=ranks == 0)
