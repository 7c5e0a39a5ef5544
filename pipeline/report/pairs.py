"""The queries that the teacher ranks worst and best."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from teacher_cache.pipeline.evaluate.sampled import RankedRows
from teacher_cache.pipeline.report.data import RetrievedPair
from teacher_cache.storage.format.tables import CAPTIONS
from teacher_cache.storage.look.nearest import exact_scores, nearest
from teacher_cache.storage.read.reader import EmbeddingReader

_Rows = NDArray[np.int64]


def retrieved_pairs(
    reader: EmbeddingReader, ranked: RankedRows, count: int
) -> tuple[tuple[RetrievedPair, ...], tuple[RetrievedPair, ...], int]:
    """Return the hardest queries, the best ones, and the number of all queries.

    Hardest: by descending rank, then ascending cosine. Best: queries of rank 1 by descending cosine, one per image.
    Ties are ordered by row. Image to text comes before text to image.

    Args:
        reader: reader of the ranked cache.
        count: maximum number of queries per direction.
    """
    hardest: list[RetrievedPair] = []
    best: list[RetrievedPair] = []
    of = 0
    for direction in ("i2t", "t2i"):
        queries, own, cosine, rank = _own(ranked, direction)
        of += len(queries)
        worst = np.lexsort((queries, cosine, -rank))[:count]
        right = np.flatnonzero(rank == 1)
        right = right[np.lexsort((queries[right], -cosine[right]))]
        image = queries if direction == "i2t" else own
        once = np.sort(np.unique(image[right], return_index=True)[1])
        for at, into in ((worst, hardest), (right[once[:count]], best)):
            into.extend(_described(reader, ranked, direction, queries[at], own[at], cosine[at], rank[at]))
    return tuple(hardest), tuple(best), of


def _own(ranked: RankedRows, direction: str) -> tuple[_Rows, _Rows, NDArray[np.float64], _Rows]:
    """Return the positions of queries that have a match and of their best match, its cosine and its rank."""
    rows = ranked.rows
    captions = np.arange(len(rows.texts))
    cosines = exact_scores(rows.texts, rows.images, captions, rows.text_image)
    if direction == "t2i":
        return captions, rows.text_image, cosines, ranked.ranks.t2i.astype(np.int64)
    # an image's rank is that of its caption with the greatest cosine, the first of equal ones
    order = np.lexsort((captions, -cosines, rows.text_image))
    queries, first = np.unique(rows.text_image[order], return_index=True)
    own = order[first]
    rank = ranked.ranks.i2t[queries].astype(np.int64)
    return queries, own, cosines[own], rank


def _described(
    reader: EmbeddingReader,
    ranked: RankedRows,
    direction: Literal["i2t", "t2i"],
    queries: _Rows,
    own: _Rows,
    cosine: NDArray[np.float64],
    rank: _Rows,
) -> list[RetrievedPair]:
    rows = ranked.rows
    chosen, gallery = (rows.images, rows.texts) if direction == "i2t" else (rows.texts, rows.images)
    rows_found, scores = nearest(chosen[queries], [(np.arange(len(gallery)), gallery)], 1)
    image, caption = (queries, own) if direction == "i2t" else (own, queries)
    caption_rows = rows.caption_rows[caption]
    texts = reader.table_rows(CAPTIONS, caption_rows)["text"].to_pylist()
    others: list[str | None] = [None] * len(queries)
    if direction == "i2t":
        firsts = rows.caption_rows[rows_found[:, 0]]
        others = reader.table_rows(CAPTIONS, firsts)["text"].to_pylist()
    return [
        RetrievedPair(
            direction=direction,
            image_row=int(rows.image_rows[image[at]]),
            caption_row=int(caption_rows[at]),
            caption=texts[at],
            rank=int(rank[at]),
            cosine=float(cosine[at]),
            first_image_row=int(rows.image_rows[rows_found[at, 0]]) if direction == "t2i" and rank[at] > 1 else None,
            first_caption=others[at] if rank[at] > 1 else None,
            first_cosine=float(scores[at, 0]),
        )
        for at in range(len(queries))
    ]
