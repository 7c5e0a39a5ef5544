"""The sampled proof: some rows of a cache against what its teacher makes of the same images and captions today.

Digests prove that a cache is what was written, not that the right thing was written: rows shifted by one, mirrored
crops or another teacher's embeddings are sound by every digest. So seeded random rows are encoded again, each from
its own image or caption, and compared with the cached ones.

How many rows: where a fraction f of all rows is wrong, a sample of N misses all of them with probability (1 - f)^N.
To find such a fault with probability p takes N = ln(1 - p) / ln(1 - f): 459 rows for one wrong row in a hundred at
p = 0.99, 44 for one in ten, 7 for one in two.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from teacher_cache.pipeline.data.datasets.records import data_folder
from teacher_cache.pipeline.data.datasets.samples import DatasetSpec, ImageSource, require_content
from teacher_cache.pipeline.data.images.decode import UndecodableImageError
from teacher_cache.pipeline.data.images.scaled_jpeg import open_image
from teacher_cache.pipeline.data.images.views import Crop, draw_crop, replay
from teacher_cache.pipeline.models.device import keep_freed_memory
from teacher_cache.pipeline.models.teacher import LiveTeacher, load_teacher
from teacher_cache.pipeline.precompute.repair import teacher_of
from teacher_cache.pipeline.settings.precompute import ProofConfig
from teacher_cache.storage.check.verify import IntegrityReport
from teacher_cache.storage.errors import CacheError, CacheMismatchError
from teacher_cache.storage.format.commits import ChunkRef, QuarantinedRow
from teacher_cache.storage.format.layout import Tower
from teacher_cache.storage.format.tables import CAPTIONS
from teacher_cache.storage.observe.logs import event, logger
from teacher_cache.storage.read.reader import EmbeddingReader

__all__ = ["ProofResult", "ProvenReport", "WrongRow", "cosine", "draw_rows", "fraction_shown", "prove_sample"]

_LOG = logger("verify")
_STREAMS: dict[Tower, int] = {"image": 0, "text": 1}
_Place = tuple[int, int]  # row and view
_BOX_TOLERANCE = 1e-3  # of the stored crop, in source pixels: float32 of numbers below 2^16


class WrongRow(BaseModel, frozen=True):
    """A drawn row that is not what the teacher makes of its image or caption."""

    tower: Tower
    view: int
    row: int
    sample_id: str = Field(description="Of the image, for a caption too.")
    cosine: float | None = Field(description="Between cached and live row; None where there are not both.")
    what: str


class ProofResult(BaseModel, frozen=True):
    """What a sampled proof compared."""

    cache: str
    ok: bool
    teacher: str
    device: str
    precision: str = Field(description="Of the live teacher.")
    seed: int
    threshold: float
    images_compared: int = Field(description="Each one view of an image.")
    captions_compared: int
    quarantined_checked: int = Field(description="Drawn image rows without embedding, of which the reason was tried.")
    least_cosine: float | None = Field(description="Over all rows compared.")
    least_cosine_row: str | None
    wrong: tuple[WrongRow, ...]
    seconds: float


def fraction_shown(rows: int, probability: float = 0.99) -> float:
    """The least fraction of wrong rows that a sample of so many shows with this probability: 1 - (1 - p)^(1 / N)."""
    return 1.0 if not rows else 1 - (1 - probability) ** (1 / rows)


class ProvenReport(IntegrityReport):
    """What ``verify --sample`` prints as JSON: ``ok`` speaks for both."""

    proof: ProofResult


def prove_sample(config: ProofConfig, progress: Callable[[str, int, int], None] | None = None) -> ProofResult:
    """Encode random image rows, of random views, and as many captions with the live teacher and compare cosines.

    Quarantined rows are drawn like all others: the teacher's preprocessing must fail on them today too. Of view 0 the
    crop that is stored beside each embedding must be the one that the preprocessing takes; of other views the stored
    crop is what is replayed. Of the teacher's identity only the precision may differ.

    Args:
        progress: called with (stage, done, total).

    Raises:
        UsageError: a setting or the teacher cannot be used.
        CacheMismatchError: another teacher than the cache is of, or an image that is not the cached one.
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
    keep_freed_memory(live.device)

    proof = _Proof(reader, live, ImageSource(root), config.threshold)
    for tower in get_args(Tower):
        views = reader.views if tower == "image" else 1
        rows = draw_rows(tower, layout.rows(tower) * views, config.sample, config.seed)
        for start in range(0, len(rows), layout.batch_rows):
            part = rows[start : start + layout.batch_rows]
            if tower == "image":
                proof.images(part)
            else:
                proof.captions(part)
            if progress is not None:
                progress(f"prove {tower}s", start + len(part), len(rows))
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
    """Seeded numbers below ``count`` in order, at most ``sample`` of them; each tower has its own stream.

    Of images they are counted on from view to view.
    """
    rng = np.random.default_rng([seed, _STREAMS[tower]])
    return np.sort(rng.choice(count, min(sample, count), replace=False)).astype(np.int64)


@dataclass(frozen=True)
class _Seen:
    """One view of an image as it is taken today."""

    row: int
    view: int
    sample_id: str
    pixels: torch.Tensor | None
    crop: tuple[float, ...]
    failure: str = ""

    @property
    def place(self) -> _Place:
        return self.row, self.view


class _Proof:
    def __init__(self, reader: EmbeddingReader, teacher: LiveTeacher, source: ImageSource, threshold: float) -> None:
        self._reader, self._teacher, self._source, self._threshold = reader, teacher, source, threshold
        self._transform = teacher.preprocess.transform()
        self._lost = {
            (row, view): record for view in range(reader.views) for row, record in reader.quarantined_in(view).items()
        }
        self.compared: dict[Tower, int] = {"image": 0, "text": 0}
        self.quarantined_checked = 0
        self.cosines: list[tuple[float, str]] = []
        self.wrong: list[WrongRow] = []

    def images(self, drawn: NDArray[np.int64]) -> None:
        images = self._reader.manifest.layout.image_rows
        seen = [self._see(int(row), int(view)) for view, row in zip(*np.divmod(drawn, images), strict=True)]
        usable = [item for item in seen if item.pixels is not None]
        for item in seen:
            if item.pixels is None and item.place not in self._lost:
                self._add("image", item, None, f"has an embedding, but its image is unusable here: {item.failure}")
        live: dict[_Place, NDArray[Any]] = {}
        if usable:
            pixels = [item.pixels for item in usable if item.pixels is not None]
            encoded = self._teacher.encode_images(torch.stack(pixels)).embedding
            live = {item.place: embedding for item, embedding in zip(usable, encoded, strict=True)}
        for item in seen:
            if item.place in self._lost:
                self._check_quarantined(item, self._lost[item.place], live.get(item.place))
        self._compare("image", [item for item in usable if item.place not in self._lost], live)

    def captions(self, rows: NDArray[np.int64]) -> None:
        captions = self._reader.table_rows(CAPTIONS, rows).to_pylist()
        samples = self._reader.samples["sample_id"]
        seen = [
            _Seen(int(row), 0, samples[caption["image_row"]].as_py(), None, ())
            for row, caption in zip(rows, captions, strict=True)
        ]
        tokens = self._teacher.tokenizer([caption["text"] for caption in captions])
        encoded = self._teacher.encode_texts(tokens).embedding
        self._compare("text", seen, {item.place: row for item, row in zip(seen, encoded, strict=True)})

    def _see(self, row: int, view: int) -> _Seen:
        sample = self._reader.samples.slice(row, 1).to_pylist()[0]
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
            preprocess = self._teacher.preprocess
            image = open_image(data, preprocess.decoder)
            if view == 0:
                evaluation_crop = preprocess.evaluation_crop(*image.size)
                return _Seen(row, view, sample_id, self._transform(image), evaluation_crop)
            preprocess.require_evaluable(*image.size)
            crop = self._crop(row, view, sample["content_sha256"], image.size)
            return _Seen(row, view, sample_id, replay(image, crop, preprocess), crop.as_row())
        except (MemoryError, CacheError):
            raise
        except UndecodableImageError as error:
            return _Seen(row, view, sample_id, None, (), str(error))
        except Exception as error:  # as precompute: a transform may fail on odd images in any way
            return _Seen(row, view, sample_id, None, (), f"{type(error).__name__}: {error}")

    def _crop(self, row: int, view: int, content_sha256: str, size: tuple[int, int]) -> Crop:
        """The stored one, or the one that was drawn for a row that has none."""
        if (row, view) in self._lost:
            return draw_crop(self._reader.manifest.identity.views, content_sha256, view, *size)
        return Crop.from_row(self._reader.take("image", np.array([row]), view, array="view")[0])

    def _check_quarantined(self, item: _Seen, recorded: QuarantinedRow, live: NDArray[Any] | None) -> None:
        self.quarantined_checked += 1
        if live is None:
            fails = recorded.reason != "not-finite"
        else:
            fails = recorded.reason == "not-finite" and not np.isfinite(live).all()
        if not fails:
            today = "it can be encoded here" if live is not None else f"here it fails otherwise: {item.failure}"
            self._add("image", item, None, f"quarantined as {recorded.reason} ({recorded.detail}), but {today}")

    def _compare(self, tower: Tower, seen: Sequence[_Seen], live: dict[_Place, NDArray[Any]]) -> None:
        if not seen:
            return
        rows = np.array([item.row for item in seen])
        views = np.array([item.view for item in seen])
        cached = self._reader.take(tower, rows, views).astype(np.float32)
        crops = self._reader.take("image", rows, views, array="view") if tower == "image" else None
        for number, item in enumerate(seen):
            found = cosine(cached[number], live[item.place].astype(np.float32))
            self.compared[tower] += 1
            named = f"{tower} row {item.row}" + (f", view {item.view}" if item.view else "")
            self.cosines.append((found, f"{named} ({item.sample_id})"))
            if not found >= self._threshold:  # NaN counts as wrong
                self._add(tower, item, found, f"cosine {found:.4f} with the live teacher's row")
            elif crops is not None and not np.allclose(crops[number], item.crop, rtol=0, atol=_BOX_TOLERANCE):
                self._add(tower, item, found, f"crop {crops[number].tolist()} is stored, {list(item.crop)} is taken")

    def _add(self, tower: Tower, item: _Seen, cosine: float | None, what: str) -> None:
        wrong = WrongRow(tower=tower, view=item.view, row=item.row, sample_id=item.sample_id, cosine=cosine, what=what)
        self.wrong.append(wrong)
        chunk = ChunkRef(tower, item.view, item.row // self._reader.manifest.layout.chunk_rows(tower)).name
        event(_LOG, logging.ERROR, "row is not the teacher's", chunk=chunk, **wrong.model_dump())


def cosine(cached: NDArray[np.float32], live: NDArray[np.float32]) -> float:
    """Of two rows (dim,); NaN where one of them is zero or not finite."""
    return float(cached @ live / (np.linalg.norm(cached) * np.linalg.norm(live)))
