"""Folders as clip-retrieval's writer leaves them, made of rows that a test chooses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def write_folder(
    root: Path,
    paths: Sequence[str],
    image: np.ndarray[Any, Any] | None = None,
    captions: Sequence[str] | None = None,
    text: np.ndarray[Any, Any] | None = None,
    rows_per_file: int = 1_000_000,
    pad: int | None = None,
) -> Path:
    """``np.save`` of each part's rows, and a parquet of ``image_path``, ``caption`` beside it, as its OutputSink does.

    Args:
        pad: digits of the parts' numbers; by default as many as the last one has.
    """
    columns = {"image_path": list(paths)} | ({"caption": list(captions)} if captions is not None else {})
    parts = -(-len(paths) // rows_per_file)
    for name in ("img_emb", "text_emb", "metadata"):
        if (name, image is None) != ("img_emb", True) and (name, text is None) != ("text_emb", True):
            (root / name).mkdir(parents=True)
    for part in range(parts):
        here = slice(part * rows_per_file, (part + 1) * rows_per_file)
        number = str(part).zfill(len(str(parts)) if pad is None else pad)
        if image is not None:
            np.save(root / "img_emb" / f"img_emb_{number}", image[here])
        if text is not None:
            np.save(root / "text_emb" / f"text_emb_{number}", text[here])
        table = pa.table({name: values[here] for name, values in columns.items()})
        pq.write_table(table, root / "metadata" / f"metadata_{number}.parquet")
    return root
