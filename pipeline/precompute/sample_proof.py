"""Sampled proof: a seeded random sample of cached rows is encoded again and compared.

Digests prove that the bytes are those that were written, not that the right rows were written: rows shifted by one,
mirrored crops or another teacher's embeddings pass every digest.

Sample size: if a fraction f of all rows is wrong, a sample of N misses all of them with probability (1 - f)^N. To find
such a fault with probability p takes N = ln(1 - p) / ln(1 - f): 459 rows for one wrong row in a hundred at p = 0.99, 44
for one in ten, 7 for one in two.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from teacher_cache.pipeline.data.datasets.files import data_folder
from teacher_cache.pipeline.data.datasets.samples import ImageSource, require_content
from teacher_cache.pipeline.data.datasets.spec import DatasetSpec
from teacher_cache.pipeline.data.images.decode import UndecodableImageError
from teacher_cache.pipeline.data.images.decoders import open_image
from teacher_cache.pipeline.data.images.views import Crop, crop_shown, draw_crop
from teacher_cache.pipeline.models.device import keep_freed_memory
from teacher_cache.pipeline.models.teacher import LiveTeacher, load_teacher
from teacher_cache.pipeline.precompute.repair import teacher_of
from teacher_cache.pipeline.settings.precompute import ProofConfig
from teacher_cache.storage.check.verify import IntegrityReport
from teacher_cache.storage.errors import CacheError, CacheMismatchError
from teacher_cache.storage.format.commits import ChunkRef, QuarantinedRow
from teacher_cache.storage.format.layout import Tower
from teacher_cache.storage.format.tables import CAPTIONS, SAMPLES
from teacher_cache.storage.observe.logs import event, logger
from teacher_cache.storage.read.reader import EmbeddingReader

_LOG = logger("verify")
_STREAMS: dict[Tower, int] = {"image": 0, "text": 1}
Place = tuple[int, int]  # row and view
_BOX_TOLERANCE = 1e-3  # in source pixels: boxes are float32 numbers below 2^16


class WrongRow(BaseModel, frozen=True):
    """Sampled row that differs from what the teacher makes of its image or caption."""

    tower: Tower
    view: int
    row: int
    sample_id: str = Field(description="Id of the image, for a caption too.")
    cosine: float | None = Field(description="Cosine of stored and live row; None if one is missing.")
    what: str


class ProofResult(BaseModel, frozen=True):
    """Result of a sampled proof."""

    cache: str
    ok: bool
    teacher: str
    device: str
    precision: str = Field(description="Precision of the live teacher.")
    seed: int
    threshold: float
    images_compared: int = Field(description="Number of compared image views.")
    captions_compared: int
    quarantined_checked: int = Field(description="Sampled quarantined image rows whose reason was checked.")
    least_cosine: float | None = Field(description="Least cosine of all rows compared.")
    least_cosine_row: str | None
    wrong: tuple[WrongRow, ...]
    seconds: float


def fraction_shown(rows: int, probability: float = 0.99) -> float:
    """Return the smallest fraction of wrong rows that a sample finds with this probability: 1 - (1 - p)^(1 / N)."""
    return 1.0 if not rows else 1 - (1 - probability) ** (1 / rows)


class ProvenReport(IntegrityReport):
    """Output of ``verify --sample`` as JSON; ``ok`` covers integrity and proof."""

    proof: ProofResult


def prove_sample(config: ProofConfig, progress: Callable[[str, int, int], None] | None = None) -> ProofResult:
    """Encode random image rows of random views, and as many captions, with the live teacher, and compare cosines.

    Quarantined rows are sampled too: the teacher's preprocessing must still fail on them. For view 0 the stored crop
    must equal the preprocessing's own crop; for other views the stored crop is replayed. Only the precision of the
    teacher's identity may differ.

    Args:
        progress: called with (stage, done, total).

    Raises:
        UsageError: a setting or the teacher cannot be used.
        CacheMismatchError: the teacher is not the cache's, or an image has changed.
        OSError: an image cannot be read.
        CacheError: the cache is unfinished or damaged.
    """
    started = time.perf_counter()
    cache = config.cache
    reader = EmbeddingReader(cache)
    manifest = reader.manifest
    identity, layout = manifest.identity, manifest.layout
    root = config.image_root or manifest.source.image_root
    if config.dataset:
        root = data_folder(DatasetSpec.parse(config.dataset).root)
    name, tag = teacher_of(manifest, cache, config.teacher, config.pretrained)
    precision = config.precision or identity.teacher.precision
    live = load_teacher(name, tag, config.device, precision, identity.preprocess.decoder)
    same = identity.teacher.model_copy(update={"precision": live.precision})
    live.require(identity.model_copy(update={"teacher": same}), cache)

    proof = SampleProof(_CacheRows(reader), live, ImageSource(root), config.threshold)
    for tower in get_args(Tower):
        views = reader.views if tower == "image" else 1
        drawn = draw_rows(tower, layout.rows(tower) * views, config.sample, config.seed)
        proof.compare(tower, drawn % layout.rows(tower), drawn // layout.rows(tower), layout.batch_rows, progress)
    for wrong in proof.wrong:
        chunk = ChunkRef(wrong.tower, wrong.view, wrong.row // layout.chunk_rows(wrong.tower)).name
        event(_LOG, logging.ERROR, "row is not the teacher's", chunk=chunk, **wrong.model_dump())
    least = min(proof.cosines, default=None)
    return ProofResult(
        cache=cache,
        ok=not proof.wrong,
        teacher=live.name,
        device=str(live.device),
        precision=live.precision,
        seed=config.seed,
        threshold=config.threshold,
        images_compared=proof.compared["image"],
        captions_compared=proof.compared["text"],
        quarantined_checked=proof.quarantined_checked,
        least_cosine=least[0] if least else None,
        least_cosine_row=least[1] if least else None,
        wrong=tuple(proof.wrong),
        seconds=time.perf_counter() - started,
    )


def draw_rows(tower: Tower, count: int, sample: int, seed: int) -> NDArray[np.int64]:
    """Draw at most ``sample`` seeded numbers below ``count``, ascending. Each tower has its own random stream.

    Image rows are numbered through all views.
    """
    rng = np.random.default_rng([seed, _STREAMS[tower]])
    return np.sort(rng.choice(count, min(sample, count), replace=False)).astype(np.int64)


class ProvableRows:
    """Rows of view 0 to prove, with the teacher's input for each.

    Args:
        samples, captions: read rows of these tables.
        stored: reads embeddings, (rows, dim), by tower, rows and views.

    Attributes:
        quarantined: quarantined rows by row and view. None: undecodable images are skipped.
    """

    quarantined: Mapping[Place, QuarantinedRow] | None = None

    def __init__(
        self,
        samples: Callable[[NDArray[np.int64]], pa.Table],
        captions: Callable[[NDArray[np.int64]], pa.Table],
        stored: Callable[[Tower, NDArray[np.int64], NDArray[np.int64]], NDArray[Any]],
    ) -> None:
        self._samples, self._captions, self.stored = samples, captions, stored

    def sample(self, row: int) -> dict[str, Any]:
        """Return a row of the samples table."""
        sample: dict[str, Any] = self._samples(np.array([row])).to_pylist()[0]
        return sample

    def captions(self, rows: NDArray[np.int64]) -> list[tuple[str, str]]:
        """Return the sample_id and text of some captions."""
        captions = self._captions(rows).to_pylist()
        return [(self.sample(caption["image_row"])["sample_id"], caption["text"]) for caption in captions]

    def crops(self, rows: NDArray[np.int64], views: NDArray[np.int64]) -> NDArray[Any] | None:
        """Return crops in the form of ``image/view``, or None if none are stored."""
        return None


class _CacheRows(ProvableRows):
    """Rows of all views of a finished cache."""

    def __init__(self, reader: EmbeddingReader) -> None:
        samples, captions = (reader.table(name) for name in (SAMPLES, CAPTIONS))
        super().__init__(samples.take, captions.take, reader.take)
        self._reader = reader
        self.quarantined = {
            (row, view): record for view in range(reader.views) for row, record in reader.quarantined_in(view).items()
        }

    def crops(self, rows: NDArray[np.int64], views: NDArray[np.int64]) -> NDArray[Any]:
        """Return the stored crops."""
        return self._reader.take("image", rows, views, array="view")

    def crop(self, row: int, view: int, sample: dict[str, Any], size: tuple[int, int]) -> Crop:
        """Return the stored crop; draw it for a quarantined row, which has none."""
        if self.quarantined and (row, view) in self.quarantined:
            return draw_crop(self._reader.manifest.identity.views, sample["content_sha256"], view, *size)
        return Crop.from_row(self.crops(np.array([row]), np.array([view]))[0])


@dataclass(frozen=True)
class _Live:
    """Newly computed view of an image."""

    place: Place
    sample_id: str
    pixels: torch.Tensor | None
    crop: tuple[float, ...] = ()
    failure: str = ""


class SampleProof:
    """Comparison of rows with the live teacher's of the same images and captions."""

    def __init__(self, rows: ProvableRows, teacher: LiveTeacher, source: ImageSource, threshold: float) -> None:
        keep_freed_memory(teacher.device)
        self._rows, self._teacher, self._source, self._threshold = rows, teacher, source, threshold
        self._transform = teacher.preprocess.transform
        self.compared: dict[Tower, int] = {"image": 0, "text": 0}
        self.quarantined_checked = 0
        self.cosines: list[tuple[float, str]] = []
        self.wrong: list[WrongRow] = []

    def compare(
        self,
        tower: Tower,
        rows: NDArray[np.int64],
        views: NDArray[np.int64],
        batch_rows: int,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        """Compare some rows of one tower.

        Raises:
            CacheMismatchError: an image has changed.
            OSError: an image cannot be read.
        """
        for start in range(0, len(rows), batch_rows):
            part = slice(start, start + batch_rows)
            if tower == "image":
                self._images(rows[part], views[part])
            else:
                self._captions(rows[part])
            if progress is not None:
                progress(f"prove {tower}s", min(start + batch_rows, len(rows)), len(rows))

    def _images(self, rows: NDArray[np.int64], views: NDArray[np.int64]) -> None:
        live = [self._look(int(row), int(view)) for row, view in zip(rows, views, strict=True)]
        quarantined = self._rows.quarantined or {}
        usable = [item for item in live if item.pixels is not None]
        encoded: dict[Place, NDArray[Any]] = {}
        if usable:
            batch = torch.stack([item.pixels for item in usable if item.pixels is not None])
            encoded = {
                item.place: row for item, row in zip(usable, self._teacher.encode_images(batch).embedding, strict=True)
            }
        for item in live:
            if item.place in quarantined:
                self._check_quarantined(item, quarantined[item.place], encoded.get(item.place))
            elif item.pixels is None and self._rows.quarantined is not None:
                self._add("image", item, None, f"has an embedding, but its image is unusable here: {item.failure}")
        self._compare("image", [item for item in usable if item.place not in quarantined], encoded)

    def _captions(self, rows: NDArray[np.int64]) -> None:
        captions = self._rows.captions(rows)
        live = [_Live((int(row), 0), sample_id, None) for row, (sample_id, _) in zip(rows, captions, strict=True)]
        tokens = self._teacher.tokenizer([text for _, text in captions])
        encoded = self._teacher.encode_texts(tokens).embedding
        self._compare("text", live, {item.place: row for item, row in zip(live, encoded, strict=True)})

    def _look(self, row: int, view: int) -> _Live:
        sample = self._rows.sample(row)
        sample_id, where = sample["sample_id"], self._source.resolve(sample["uri"])
        named = f"image row {row} ({sample_id}): {where}"
        try:
            data = self._source.read(sample["uri"], sample["offset"], sample["length"])
        except FileNotFoundError as error:
            raise CacheMismatchError(
                f"{named}: not there. Name the folder of the images with --image-root, or the dataset with --dataset."
            ) from error
        require_content(data, sample["content_sha256"], named)
        try:
            return _Live((row, view), sample_id, *self._taken(row, view, sample, data))
        except (MemoryError, CacheError):
            raise
        except UndecodableImageError as error:
            return _Live((row, view), sample_id, None, failure=str(error))
        except Exception as error:  # as precompute: a transform may fail on odd images in any way
            return _Live((row, view), sample_id, None, failure=f"{type(error).__name__}: {error}")

    def _taken(
        self, row: int, view: int, sample: dict[str, Any], data: bytes
    ) -> tuple[torch.Tensor, tuple[float, ...]]:
        preprocess = self._teacher.preprocess
        image = open_image(data, preprocess.decoder)
        if view == 0:
            return self._transform(image), preprocess.evaluation_crop(*image.size)
        preprocess.require_evaluable(*image.size)
        assert isinstance(self._rows, _CacheRows)  # only a cache has further views
        crop = self._rows.crop(row, view, sample, image.size)
        return preprocess.normalized(crop_shown(image, crop, preprocess)), crop.as_row()

    def _check_quarantined(self, item: _Live, recorded: QuarantinedRow, encoded: NDArray[Any] | None) -> None:
        self.quarantined_checked += 1
        if encoded is None:
            fails = recorded.reason != "not-finite"
        else:
            fails = recorded.reason == "not-finite" and not np.isfinite(encoded).all()
        if not fails:
            today = "it can be encoded here" if encoded is not None else f"here it fails otherwise: {item.failure}"
            self._add("image", item, None, f"quarantined as {recorded.reason} ({recorded.detail}), but {today}")

    def _compare(self, tower: Tower, live: Sequence[_Live], encoded: dict[Place, NDArray[Any]]) -> None:
        if not live:
            return
        rows, views = np.array([item.place for item in live]).T
        stored = self._rows.stored(tower, rows, views).astype(np.float32)
        crops = self._rows.crops(rows, views) if tower == "image" else None
        for number, item in enumerate(live):
            similarity = cosine(stored[number], encoded[item.place].astype(np.float32))
            self.compared[tower] += 1
            row, view = item.place
            named = f"{tower} row {row}" + (f", view {view}" if view else "")
            self.cosines.append((similarity, f"{named} ({item.sample_id})"))
            if not similarity >= self._threshold:  # NaN counts as wrong
                self._add(tower, item, similarity, f"cosine {similarity:.4f} with the live teacher's row")
            elif crops is not None and not np.allclose(crops[number], item.crop, rtol=0, atol=_BOX_TOLERANCE):
                self._add(
                    tower, item, similarity, f"crop {crops[number].tolist()} is stored, {list(item.crop)} is taken"
                )

    def _add(self, tower: Tower, item: _Live, cosine: float | None, what: str) -> None:
        row, view = item.place
        self.wrong.append(WrongRow(tower=tower, view=view, row=row, sample_id=item.sample_id, cosine=cosine, what=what))


def cosine(cached: NDArray[np.float32], live: NDArray[np.float32]) -> float:
    """Return the cosine of two rows (dim,); NaN where one of them is zero or not finite."""
    return float(cached @ live / (np.linalg.norm(cached) * np.linalg.norm(live)))
