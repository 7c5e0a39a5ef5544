"""Measured images that a student learned from, by the sha256 of their stored bytes, and their twins. No torch."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from teacher_cache.pipeline.evaluate.split import EvaluationSplit
from teacher_cache.pipeline.evaluate.twins.exclude import exclude_listed
from teacher_cache.pipeline.evaluate.twins.find import Images, Twins, require_comparable, twins_among
from teacher_cache.pipeline.models.run_record import Excluded, RunRecord
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.storage.errors import CacheError, CacheMismatchError, UsageError
from teacher_cache.storage.format.tables import SAMPLES, long_texts
from teacher_cache.storage.look.sampling import Progress
from teacher_cache.storage.read.reader import EmbeddingReader

_MEMORY_BYTES = 64 << 20
_MOST_PAIRS = 2 * 10**9


def count_learned(record: RunRecord, digests: pa.ChunkedArray, measured: EmbeddingReader | None = None) -> int | None:
    """Count the images that a student, or a run averaged into it, learned from. None: its cache cannot be read.

    It takes some 0.04 s per 100,000 images of the student's cache.

    Args:
        digests: sha256 of the stored bytes of each measured image.
        measured: the measured cache, read in place of the student's if it is of the same dataset.
    """
    try:
        reader = _own_cache(record, measured)
        if reader is None:
            return None
        of_run = np.zeros(len(reader), bool)
        of_run[learned_rows(record, reader)] = True
        texts, done = long_texts(digests).combine_chunks(), 0
        learned = np.zeros(len(texts), bool)
        for part in reader.column(SAMPLES, "content_sha256"):
            seen = long_texts(part).filter(pa.array(of_run[done : done + len(part)]))
            learned |= np.asarray(pc.is_in(texts, value_set=seen.combine_chunks()))
            done += len(part)
    except (CacheError, UsageError):  # moved, or damaged
        return None
    return int(learned.sum())


def _own_cache(record: RunRecord, measured: EmbeddingReader | None) -> EmbeddingReader | None:
    """Return the measured cache if a student learned from its dataset, else the student's own. None: another is there.

    Raises:
        CacheError: the student's own cache cannot be read.
    """
    dataset = record.identity.dataset
    if measured is not None and measured.identity.dataset == dataset:
        return measured
    own = EmbeddingReader(record.config.cache, memory_bytes=_MEMORY_BYTES)
    return own if own.identity.dataset == dataset else None


def learned_rows(record: RunRecord, reader: EmbeddingReader) -> NDArray[np.int64]:
    """Return the rows of its own cache that a student, or a run averaged into it, learned from, ascending.

    A list of images that were left out counts only while it is there and unchanged: rather too many rows than too few.

    Raises:
        UsageError, CacheError: the cache cannot be read.
    """
    runs = ((record.config, record.excluded), *((run.config, None) for run in record.averaged))  # of one cache
    return np.unique(np.concatenate([_rows_of_run(config, excluded, reader) for config, excluded in runs]))


def _rows_of_run(config: TrainConfig, excluded: Excluded | None, reader: EmbeddingReader) -> NDArray[np.int64]:
    rows = reader.row_set(config.split)
    every = rows.numbers()
    if not config.exclude:
        return every
    try:
        listed = exclude_listed(config.exclude, reader, config.split, rows)
    except (CacheMismatchError, UsageError):  # moved, or of other images
        return every
    return rows.numbers() if excluded is None or listed.sha256 == excluded.sha256 else every


def find_learned_twins(record: RunRecord, split: EvaluationSplit, progress: Progress | None = None) -> Twins | None:
    """Find the measured images that show the same picture as an image that a student learned from.

    Embeddings of the student's own cache and of the measured one are compared, and the pictures of near ones. None: the
    student's own cache cannot be read or is of another teacher, the measured split is the one that it learned from, or
    there are more than two billion pairs of images (some 10 s on two cores).

    Args:
        progress: called with (stage, done, total).
    """
    try:
        reader = _own_cache(record, split.reader)
        if reader is None:
            return None
        require_comparable(reader, split.reader)
        rows = learned_rows(record, reader)
        same_images = reader.identity.dataset.samples_sha256 == split.reader.identity.dataset.samples_sha256
        too_many = len(rows) * len(split.image_rows) > _MOST_PAIRS
        if too_many or (same_images and len(np.intersect1d(rows, split.image_rows))):
            return None
        learned = Images(reader, rows, split.image_root if reader is split.reader else record.image_root)
        return twins_among(learned, Images(split.reader, split.image_rows, split.image_root), progress=progress)
    except (CacheError, UsageError):  # moved, damaged, or of another teacher
        return None


def learned_words(learned: int | None, of: str, who: str = "the student") -> str:
    """Return ``the student learned from 12 of these 18 images``; empty if it learned from none.

    Args:
        learned: result of :func:`count_learned`.
        of: the measured images: ``them``, ``these 18 images``.
        who: the student.
    """
    if learned is None:
        return f"whether {who} learned from {of} is not known, since its own cache cannot be read"
    return f"{who} learned from {learned:,} of {of}" if learned else ""
