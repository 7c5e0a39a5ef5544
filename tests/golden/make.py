"""Maker of the golden caches: run ``python -m tests.golden.make VERSION`` once for each format version, never again.

They are what a user of that version has on disk, and a later version of the code has to read them as they are. Their
rows are written beside them as JSON, which depends on no library. Version 1 holds float16 rows, 2 int8, and 3 both.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Literal

import numpy as np

from teacher_cache.storage.format.commits import QuarantinedRow, all_chunks
from teacher_cache.storage.format.journal import ChunkCost
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.write.writer import EmbeddingWriter
from tests.conftest import known_arrays, known_row, plan_known_cache

HERE = Path(__file__).parent
LOST = 6
COST = {"host": "golden", "finished_at": "2026-11-24T00:00:00+00:00", "device": "cpu"}


def make(folder: Path, dtype: Literal["float16", "int8"]) -> None:
    """Write a sealed cache, and one that was stopped after five chunks, below ``folder``."""
    for name, stop in (("sealed", None), ("stopped", 5)):
        plan_known_cache(folder / name, dtype=dtype)
        writer = EmbeddingWriter(str(folder / name))
        for ref in all_chunks(writer.manifest.layout)[:stop]:
            arrays, lost = known_arrays(writer, ref), []
            if ref.tower == "image" and LOST in ref.rows(writer.manifest.layout):
                lost = [QuarantinedRow(row=LOST, sample_id=f"img-{LOST}", reason="undecodable-image", detail="cut")]
                for values in arrays.values():
                    values[LOST - ref.rows(writer.manifest.layout).start] = np.nan
            rows = len(ref.rows(writer.manifest.layout))
            writer.write(ref, arrays, lost, ChunkCost(rows=rows, seconds=1.0, teacher_seconds=0.5, **COST))
    EmbeddingWriter(str(folder / "sealed")).seal()
    reader = EmbeddingReader(str(folder / "sealed"))
    images, captions = reader.image_rows(), np.arange(reader.manifest.layout.text_rows)
    rows = {
        "dtype": dtype,
        "text_written": [known_row("text", row).tolist() for row in captions],
        "manifest_digest": reader.manifest.digest,
        "identity_digest": reader.manifest.identity_digest,
        "images": images.tolist(),
        "image_embedding": reader.take("image", images).tolist(),
        "image_norm": reader.take("image", images, array="norm").tolist(),
        "image_view": reader.take("image", images, array="view").tolist(),
        "text_embedding": reader.take("text", captions).tolist(),
        "text_norm": reader.take("text", captions, array="norm").tolist(),
        "sample_ids": reader.samples["sample_id"].to_pylist(),
        "texts": reader.captions["text"].to_pylist(),
        "image_of_caption": reader.captions["image_row"].to_pylist(),
    }
    (folder / "rows.json").write_text(json.dumps(rows) + "\n")


if __name__ == "__main__":
    target = HERE / f"v{int(sys.argv[1])}"
    if target.exists():
        sys.exit(f"{target} exists: a golden cache is made once")
    make(target, "float16")
