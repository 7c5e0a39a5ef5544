"""Answers from an index: texts and pictures embedded, the nearest rows found by FAISS and ordered by exact cosines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from teacher_cache.pipeline.search.approximate import ApproximateIndex
from teacher_cache.pipeline.search.build import IndexedRows
from teacher_cache.pipeline.search.record import MEASURED_K, IndexRecord
from teacher_cache.storage.errors import CacheMismatchError
from teacher_cache.storage.format.layout import Tower
from teacher_cache.storage.format.tables import CAPTIONS, SAMPLES
from teacher_cache.storage.look.nearest import paired_scores
from teacher_cache.storage.read.reader import EmbeddingReader

if TYPE_CHECKING:
    from teacher_cache.pipeline.deploy.runtime import StudentRuntime

_Vector = NDArray[np.float32]


class Match(BaseModel, frozen=True):
    """One answer: an image with its first caption, or a caption of an image."""

    cosine: float
    row: int = Field(description="Row of the image, or of the caption, in the cache.")
    image_row: int
    sample_id: str = Field(description="The image.")
    caption: str


class Answer(BaseModel, frozen=True):
    """Result of ``search``."""

    index: str
    cache: str
    query: str
    model: str = Field(description="Student or teacher that embedded the query.")
    answers: Tower = Field(description="Kind of the matches: images for a text, captions (text) for a picture.")
    matches: tuple[Match, ...] = Field(description="Nearest first.")


@dataclass(frozen=True)
class QueryEncoder:
    """A model that embeds queries into the space of an index.

    Attributes:
        name: for results.
        text, image: functions of a text, and of the bytes of a picture, to (dim,) float32 of unit norm; the latter
            raises UndecodableImageError.
    """

    name: str
    text: Callable[[str], _Vector]
    image: Callable[[bytes], _Vector]


class SearchIndex:
    """An index with the cache that it was built of. Threads may search it at once.

    Args:
        folder: folder of the index.
        cache: location of the cache, if it was moved.

    Attributes:
        record: the certificate.
        reader: reader of the cache.

    Raises:
        UsageError: there is no index, or FAISS is not installed.
        CacheMismatchError: the cache is not the one that the index was built of.
        CacheCorruptError: a file of the index is not the one that was written.
        CacheError: the cache is missing, unfinished or damaged.
    """

    def __init__(self, folder: str | Path, cache: str | None = None) -> None:
        self.folder, self.record = Path(folder), IndexRecord.read(folder)
        self.reader = EmbeddingReader(cache or self.record.cache)
        digest = self.reader.manifest.digest
        if digest != self.record.cache_manifest_digest:
            raise CacheMismatchError(
                f"{folder}: built of {self.record.cache}, manifest {self.record.cache_manifest_digest[:12]}, but "
                f"{self.reader.location} has manifest {digest[:12]}. Build an index of it: teacher-cache index "
                f"{self.reader.location} --out NEW"
            )
        self._rows = IndexedRows(self.reader)
        self._indexes = {tower: self._load(tower) for tower in ("image", "text")}

    def _load(self, tower: Tower) -> ApproximateIndex:
        wanted = self.record.image if tower == "image" else self.record.text
        data = self.record.proven(self.folder, tower)
        return ApproximateIndex.loaded(data, len(self._rows.rows[tower]), self.record.embed_dim, wanted.effort)

    def nearest(self, answers: Tower, query: _Vector, count: int) -> tuple[Match, ...]:
        """Return about the nearest images or captions, ordered by exact cosine and then row.

        Args:
            query: (dim,) float32, unit norm.
            count: number of matches, at most all rows.
        """
        positions = self._indexes[answers].search(query[None], max(count, MEASURED_K))[0]
        positions = positions[positions >= 0].astype(np.int64)
        vectors = self._rows.embeddings(answers, positions)
        cosines = paired_scores(np.broadcast_to(query, vectors.shape), vectors)
        best = np.lexsort((positions, -cosines))[:count]
        return self._described(answers, positions[best], cosines[best])

    @property
    def images(self) -> NDArray[np.int64]:
        """Rows of the cache whose images are in the index, ascending."""
        return self._rows.rows["image"]

    def image_vector(self, image_row: int) -> _Vector:
        """Return the cached embedding of one of :attr:`images`, (dim,) unit norm."""
        at = np.searchsorted(self.images, [image_row])
        return np.asarray(self._rows.embeddings("image", at)[0])

    def _described(
        self, answers: Tower, positions: NDArray[np.int64], cosines: NDArray[np.float64]
    ) -> tuple[Match, ...]:
        image_rows = self._rows.rows["image"][self._rows.image[answers][positions]]
        rows = self._rows.rows[answers][positions]
        captions = rows if answers == "text" else self.reader.caption_index.starts(image_rows)
        texts = self.reader.table_rows(CAPTIONS, captions)["text"].to_pylist()
        ids = self.reader.table_rows(SAMPLES, image_rows)["sample_id"].to_pylist()
        values = zip(cosines.tolist(), rows.tolist(), image_rows.tolist(), ids, texts, strict=True)
        names = ("cosine", "row", "image_row", "sample_id", "caption")
        return tuple(Match(**dict(zip(names, value, strict=True))) for value in values)


def student_queries(student: StudentRuntime, index: SearchIndex) -> QueryEncoder:
    """Return a deployed student as the encoder of queries.

    Raises:
        CacheMismatchError: it has another width than the index, or learned from another teacher.
    """
    deployed, record = student.deployment, index.record
    what = f"{student.folder}: the student {deployed.name}"
    if deployed.embed_dim != record.embed_dim:
        raise CacheMismatchError(
            f"{what} is {deployed.embed_dim} wide, the index {index.folder} {record.embed_dim}. Use a student of the "
            "teacher's width, or the teacher"
        )
    if deployed.teacher != index.reader.identity.teacher.name:
        raise CacheMismatchError(
            f"{what} learned from teacher {deployed.teacher!r}, the index {index.folder} holds rows of "
            f"{index.reader.identity.teacher.name!r}. Use a student of this teacher"
        )
    return QueryEncoder(
        f"student {deployed.name}",
        lambda text: student.embed_texts([text])[0],
        lambda data: student.embed_images([data])[0],
    )


def teacher_queries(
    index: SearchIndex, teacher: str | None = None, pretrained: str | None = None, device: str = "auto"
) -> QueryEncoder:
    """Return the cache's teacher as the encoder of queries. Needs torch.

    Args:
        teacher, pretrained: as in ``precompute``. Default: as the cache names them.

    Raises:
        UsageError: the teacher cannot be loaded.
        CacheMismatchError: it is not the cache's teacher; the message names each difference with both values.
    """
    from teacher_cache.pipeline.data.images.decode import UndecodableImageError
    from teacher_cache.pipeline.data.images.decoders import PILLOW, open_image
    from teacher_cache.pipeline.evaluate.zero_shot.measure import TeacherEncoder
    from teacher_cache.pipeline.models.teacher import load_teacher
    from teacher_cache.pipeline.precompute.repair import teacher_of

    manifest, location = index.reader.manifest, index.reader.location
    name, tag = teacher_of(manifest, location, teacher, pretrained)
    decoder = manifest.identity.preprocess.decoder or PILLOW
    live = load_teacher(name, tag, device, manifest.identity.teacher.precision, decoder)
    live.require(manifest.identity, location)
    encoder = TeacherEncoder(live)

    def image(data: bytes) -> _Vector:
        try:
            prepared = encoder.prepare(open_image(data, decoder))
        except ValueError as error:  # too long a strip
            raise UndecodableImageError(str(error)) from error
        return np.asarray(encoder.embed_images([prepared])[0])

    return QueryEncoder(f"teacher {live.name}", lambda text: encoder.embed_texts([text])[0], image)


def ask(index: SearchIndex, encoder: QueryEncoder, query: str, count: int) -> Answer:
    """Answer a text with images, or a picture's file with captions.

    Args:
        query: text, or path of a picture.

    Raises:
        UndecodableImageError: the picture cannot be decoded.
        OSError: it cannot be read.
    """
    from teacher_cache.pipeline.data.datasets.files import open_regular

    answers: Tower = "image"
    if is_picture(query):
        answers = "text"
        with open_regular(query) as file:
            vector = encoder.image(file.read())
    else:
        vector = encoder.text(query)
    matches = index.nearest(answers, vector, count)
    return Answer(
        index=str(index.folder),
        cache=index.reader.location,
        query=query,
        model=encoder.name,
        answers=answers,
        matches=matches,
    )


def is_picture(query: str) -> bool:
    """Return whether a query is the path of a file: one that exists, or a name with the ending of an image."""
    from teacher_cache.pipeline.data.datasets.files import IMAGE_ENDINGS

    return Path(query).suffix.lower() in IMAGE_ENDINGS or (len(query) < 1024 and Path(query).is_file())
