"""The start of a run: the cache, the student and the record, all checked before the first step."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric
from pydantic import ValidationError

from teacher_cache.pipeline.data.batches.pairs import describe_views, views_used
from teacher_cache.pipeline.data.batches.student_images import StudentImages
from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.data.images.preprocess import handed_on
from teacher_cache.pipeline.data.images.ready_pixels import ReadyPixels
from teacher_cache.pipeline.evaluate.split import EvaluationSplit
from teacher_cache.pipeline.evaluate.twins.exclude import exclude_listed
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.run_record import Excluded, OtherTeacher, RunRecord
from teacher_cache.pipeline.models.student import (
    MAX_LOG_LOGIT_SCALE,
    Student,
    build_student,
    load_initial,
    student_config,
)
from teacher_cache.pipeline.models.weights import digest_tensors
from teacher_cache.pipeline.settings.recipes import RECIPES, trains_bias
from teacher_cache.pipeline.settings.run_file import check_config
from teacher_cache.pipeline.settings.train import IMAGES_ALONE, TrainConfig
from teacher_cache.storage.errors import CacheMismatchError, CacheNotFoundError, UsageError
from teacher_cache.storage.files.location import absolute_location
from teacher_cache.storage.format.identity import CacheIdentity, TeacherIdentity
from teacher_cache.storage.observe.logs import logger
from teacher_cache.storage.observe.quantities import counted
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.read.rows import RowSet
from teacher_cache.storage.read.several.joined_caches import JoinedCache, join_caches, require_same_crops
from teacher_cache.storage.read.several.parts import named_manifest

_WAY_OUT = (
    "Precompute a cache of what is asked for, leave expect out, or accept a difference by --set accept_mismatch=FIELD, "
    "which every checkpoint then records."
)

_DROP = "To train on the images that all caches have: --set unmatched=drop."
_LOG = logger("train")

_FILES = ("run.json", "origin.json")


def fit_to_cache(config: TrainConfig) -> TrainConfig:
    """Return the settings with the split and the batch size that the caches allow, see ``TrainConfig.fitted``.

    Raises:
        UsageError: the split is unknown, or has too few images.
        CacheError: the cache is missing, unfinished or damaged.
    """
    reader, *others = (EmbeddingReader(cache) for cache in config.caches)

    def count(split: str) -> int:
        rows, _ = _rows_to_learn(config, reader, split)
        if config.unmatched == "drop":  # else all of them are there, or the run is refused
            _join(config, reader, others, rows)
        return len(rows)

    return config.fitted(reader.identity.dataset.splits, count)


def fit_to_captions(config: TrainConfig) -> TrainConfig:
    """Return the settings for a cache without captions: the student learns from the images alone.

    Raises:
        UsageError: the losses that are set, or all of the recipe's, need captions.
        CacheError: the cache's manifest cannot be used.
    """
    if not config.captions_per_image or config.caption_kinds or named_manifest(config.cache).identity.dataset.captions:
        return config
    # not what is set by default: a split that nobody named is the only one of the cache
    settings = config.model_dump(exclude_unset=True) | {"captions_per_image": 0}
    if config.losses == RECIPES[config.recipe].losses:
        settings.pop("losses", None)
    fitted = check_config(TrainConfig, settings, f"{config.cache} has no captions")
    losses = ", ".join(f"{name} = {weight:g}" for name, weight in fitted.losses.items())
    images = "%s has no captions: the student learns from its images alone, with %s; its text tower keeps its weights"
    _LOG.warning(images, config.cache, losses)
    return fitted


def recorded_start(run: RunFolder) -> RunRecord | None:
    """Return the record of a run, or None if it has no checkpoint yet."""
    record = run.read()
    return record if record.checkpoint is not None else None


@dataclass(frozen=True)
class TrainingCache:
    """Opened and checked caches of a run, one for each teacher.

    Attributes:
        rows: rows of the training images.
        others: the caches of further teachers.
        dropped: number of images of the split that another teacher's cache lacks.
        excluded: images of the split that ``config.exclude`` leaves out.
        accepted: differences from the expected identity that the settings accept.
    """

    reader: EmbeddingReader
    rows: RowSet
    config: TrainConfig
    accepted: tuple[str, ...] = ()
    others: tuple[JoinedCache, ...] = ()
    dropped: int = 0
    excluded: Excluded | None = None

    @classmethod
    def open(cls, config: TrainConfig, run: RunFolder, begun: RunRecord | None) -> TrainingCache:
        """Open the caches of a new run, or the same caches that ``begun`` learned from.

        Raises:
            CacheMismatchError: the cache differs from the expected one, or from the run's; or two teachers' crops do.
            UsageError: a split or the list of ``exclude`` cannot be used, or another teacher's cache lacks images or
                captions.
        """
        reader, *others = _opened(run, config, begun)
        accepted: tuple[str, ...] = ()
        if config.expect is not None and begun is None:
            expected = expected_identity(config.expect)
            accepted = reader.identity.require(expected, config.cache, _WAY_OUT, config.accept_mismatch)
        biased = [(cache.location, cache.identity.teacher) for cache in (reader, *others)]
        for cache, teacher in biased if config.losses.get("sigmoid_relational", 0) > 0 else ():
            if teacher.logit_bias is not None:
                continue
            raise UsageError(
                f"{cache}: loss sigmoid_relational learns the teacher's probability of each pair, and "
                f"{teacher.name} has no logit bias: it did not learn by SigLIP's loss. Use relational, or the cache of "
                "a SigLIP teacher"
            )
        rows, excluded = _rows_to_learn(config, reader, config.split)
        if config.captions_per_image:
            way_out = "Give caption_kinds another kind too." if config.caption_kinds else IMAGES_ALONE
            reader.require_captions(rows, way_out, [*config.caption_kinds])
        if config.select_split is not None and not len(reader.image_rows(config.select_split)):
            raise UsageError(f"{config.cache}: no image of select_split {config.select_split!r} has an embedding")
        used = views_used(reader, config.views)
        for other in others:
            require_same_crops(reader, other, used)
        images = len(rows)
        joined = _join(config, reader, others, rows)
        return cls(reader, rows, config, accepted, joined, images - len(rows), excluded)

    @property
    def source(self) -> ImageSource:
        """Source of the images."""
        return ImageSource(self.config.image_root or self.reader.manifest.source.image_root)

    @cached_property
    def select_split(self) -> EvaluationSplit:
        """The select split."""
        return EvaluationSplit.of(self.reader, str(self.config.select_split))


def _rows_to_learn(config: TrainConfig, reader: EmbeddingReader, split: str) -> tuple[RowSet, Excluded | None]:
    rows = reader.row_set(split)
    return rows, exclude_listed(config.exclude, reader, split, rows) if config.exclude else None


def _join(
    config: TrainConfig, reader: EmbeddingReader, others: list[EmbeddingReader], rows: RowSet
) -> tuple[JoinedCache, ...]:
    captions: tuple[str | None, ...] = tuple(config.caption_kinds) or (None,) * (config.captions_per_image > 0)
    return join_caches(reader, others, rows, captions, drop=config.unmatched == "drop", way_out=_DROP)


def _opened(run: RunFolder, config: TrainConfig, begun: RunRecord | None) -> list[EmbeddingReader]:
    digests = [None] * len(config.caches) if begun is None else list(begun.manifest_digests)
    if len(digests) != len(config.caches):
        raise UsageError(
            f"{run.path}: learned from {counted(len(digests), 'cache')} so far, and {len(config.caches)} are named: "
            "name the same ones in their order, or train anew with another --out"
        )
    try:
        return [
            EmbeddingReader(cache, manifest_digest=digest) for cache, digest in zip(config.caches, digests, strict=True)
        ]
    except CacheMismatchError as error:
        raise CacheMismatchError(
            f"{error} {run.path} learned from that one so far: go on with it, or train anew with another --out."
        ) from error


def new_student(fabric: Fabric, cache: TrainingCache, begun: RunRecord | None) -> Student:
    """Build the student with its initial weights. A checkpoint is loaded later.

    Raises:
        UsageError: the student, its ``init`` or its locked layers cannot be used.
    """
    config, reader = cache.config, cache.reader
    fabric.seed_everything(config.seed, verbose=False)
    architecture = begun.student_config if begun is not None else _with_bias(config, reader.identity.teacher)
    others = [other.reader.embed_dim for other in cache.others]
    student = build_student(architecture, handed_on(reader.identity.preprocess), reader.embed_dim, others)
    if config.init is not None and begun is None:
        load_initial(student, config.init)
    if config.lock_image_unlocked_groups is not None:
        student.lock_image(config.lock_image_unlocked_groups)
    return student


def _with_bias(config: TrainConfig, teacher: TeacherIdentity) -> dict[str, Any]:
    """Return the student's model config, for the sigmoid losses with a logit bias.

    A config without one gets the teacher's scale and bias, or those of SigLIP's paper.
    """
    architecture = student_config(config.student)
    if not trains_bias(config.losses) or "init_logit_bias" in architecture:
        return architecture
    scale, bias = math.log(10), -10.0
    if teacher.logit_bias is not None:
        scale, bias = min(math.log(teacher.logit_scale), MAX_LOG_LOGIT_SCALE), teacher.logit_bias
    _LOG.info("student %s gets a logit bias for its sigmoid losses: %.4g at first", config.student, bias)
    return {**architecture, "init_logit_scale": scale, "init_logit_bias": bias}


def training_images(cache: TrainingCache, student: Student) -> StudentImages | ReadyPixels:
    """Return the training images: decoded in each epoch, or ready pixels.

    Raises:
        UsageError: the student cannot take images of ``train_image_size``.
        CacheError: the ready pixels do not match, or are damaged.
    """
    config, reader = cache.config, cache.reader
    seen = student.preprocess_to_learn(config.train_image_size)
    if config.pixels is None:
        return StudentImages(reader, cache.source, seen)
    return ReadyPixels(config.pixels, reader, cache.rows.numbers(), views_used(reader, config.views), seen)


def new_record(cache: TrainingCache, student: Student, begun: RunRecord | None) -> RunRecord:
    """Return the record of the run: a new one, or ``begun`` with the current settings."""
    config, reader = cache.config, cache.reader
    # absolute: the run may be measured from another folder
    places: dict[str, Any] = {"other_caches": tuple(map(absolute_location, config.other_caches))}
    places |= {"cache": absolute_location(config.cache), "pixels": config.pixels and absolute_location(config.pixels)}
    places |= {"exclude": cache.excluded and cache.excluded.path}
    config = config.model_copy(update=places)
    image_root = absolute_location(cache.source.root)
    if begun is not None:
        resumed = (*begun.resumed_at, begun.steps)
        return begun.model_copy(update={"config": config, "image_root": image_root, "resumed_at": resumed})
    others = [other.reader for other in cache.others]
    return RunRecord(
        config=config,
        student_config=student.config,
        student_parameters=student.num_parameters,
        teacher=" and ".join(each.identity.teacher.name for each in (reader, *others)),
        identity=reader.identity,
        accepted_mismatches=cache.accepted,
        cache_manifest_digest=reader.manifest.digest,
        others=tuple(
            OtherTeacher(
                teacher=other.identity.teacher.name,
                cache_manifest_digest=other.manifest.digest,
                identity=other.identity,
            )
            for other in others
        ),
        view=describe_views(reader, config.views),
        image_root=image_root,
        train_images=len(cache.rows),
        dropped_images=cache.dropped,
        excluded=cache.excluded,
        initial_weights_sha256=digest_tensors(student.state_dict()),
    )


def expected_identity(place: str) -> CacheIdentity:
    """Return the identity of a cache or run, or the one in a JSON file.

    Args:
        place: folder or URL of a cache; folder of a run or checkpoint; or a JSON file with an ``identity``, such as a
            manifest or the output of ``teacher-cache info --json``.

    Raises:
        UsageError: the place is none of these.
        CacheError: the cache's manifest cannot be used.
    """
    folder = Path(place)
    if folder.is_file():
        return _identity_in(folder)
    for name in _FILES:
        if (folder / name).is_file():
            return _identity_in(folder / name)
    try:
        return named_manifest(place).identity
    except CacheNotFoundError as error:
        raise UsageError(
            f"{place}: no cache, no run and no JSON file with an identity (teacher-cache info CACHE --json prints one)"
        ) from error


def _identity_in(path: Path) -> CacheIdentity:
    try:
        fields = json.loads(path.read_bytes())
        return CacheIdentity.model_validate(fields["identity"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError, ValidationError) as error:
        raise UsageError(f"{path}: no identity in it ({type(error).__name__}: {error})") from error
