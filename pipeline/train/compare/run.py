"""Small students of several teachers over the same data, and which teacher to pay for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from teacher_cache.pipeline.data.datasets.adapters import SAMPLE
from teacher_cache.pipeline.data.datasets.holdout import parse_share
from teacher_cache.pipeline.data.datasets.spec import DatasetSpec
from teacher_cache.pipeline.evaluate.intervals import LEVEL, bootstrap_mean_recall
from teacher_cache.pipeline.evaluate.recall import RECALL_KS, chance_recall, mean_recall, recall_of_ranks
from teacher_cache.pipeline.evaluate.retrieval import student_ranks
from teacher_cache.pipeline.evaluate.split import CachedTeacher, EvaluationSplit, default_split, embed
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.settings.compare import CompareConfig
from teacher_cache.pipeline.settings.evaluate import EvaluateConfig
from teacher_cache.pipeline.train.compare.agreement import NEIGHBOURS, common_rows, shared_neighbours
from teacher_cache.pipeline.train.compare.ranking import Pair, rank_teachers, rivals
from teacher_cache.pipeline.train.compare.result import (
    RESULT,
    ComparedPair,
    ComparedTeacher,
    Comparison,
    SharedNeighbours,
)
from teacher_cache.pipeline.train.loop import train
from teacher_cache.storage.errors import CacheMismatchError, UsageError
from teacher_cache.storage.files.local import LocalFiles
from teacher_cache.storage.files.new_files import require_writable
from teacher_cache.storage.look.info import CacheInfo, describe_cache
from teacher_cache.storage.look.stats import effective_rank
from teacher_cache.storage.read.reader import EmbeddingReader

_RESAMPLES = 10_000  # a shared level looks at thin tails


class Progress(Protocol):
    """Receives a stage, what of it is done, what there is to do, a note, and the seconds that are left."""

    def __call__(  # noqa: D102
        self, stage: str, done: int, total: int, note: str = "", eta_seconds: float | None = None
    ) -> None: ...


def compare(config: CompareConfig, progress: Progress | None = None) -> Comparison:
    """Train students from each teacher's cache with the same settings and seeds, and rank the teachers by them.

    Students are measured on one split of the first cache by the mean of all recalls, each in its own space. The runs
    lie in ``config.out`` beside ``comparison.json``; finished ones are not trained again, broken-off ones go on.

    Args:
        progress: called as ``StageProgress``.

    Raises:
        CacheMismatchError: the caches are over other images or captions.
        UsageError: the caches are one and the same, a split does not exist, or a setting cannot be used; see ``train``.
        CacheError: a cache is missing, unfinished or damaged.
    """
    started = time.perf_counter()
    report: Progress = progress or (lambda stage, done, total, note="", eta_seconds=None: None)
    readers = [EmbeddingReader(cache) for cache in config.caches]
    _require_comparable(readers)
    learned = config.training(0, 0, config.out).fitted(
        readers[0].identity.dataset.splits, lambda name: len(readers[0].image_rows(name))
    )
    measured = config.measure_split or default_split(
        readers[0].location, readers[0].identity.dataset.splits, learned.split
    )
    if measured == learned.split:
        raise UsageError(
            f"split {measured!r} is learned from and cannot be measured: name another by --measure-split, or encode "
            "the sample with ?holdout=20% behind the dataset"
        )
    require_writable(Path(config.out))
    split = EvaluationSplit.of(readers[0], measured)
    own = [_own_recall(EvaluationSplit.of(reader, measured), config.device) for reader in readers]
    rows = common_rows(readers)
    recalls, draws = _students(config, readers, split, report)
    infos = [describe_cache(cache) for cache in config.caches]
    images = config.images or _whole(infos[0])
    costs = [_encode_seconds(info, images) for info in infos]
    ranking = rank_teachers(recalls, draws, LEVEL)
    teachers = [
        ComparedTeacher(
            cache=reader.location,
            cache_manifest_digest=reader.manifest.digest,
            teacher=reader.identity.teacher.name,
            embed_dim=reader.manifest.layout.embed_dim,
            recall=own[number],
            image_rank=effective_rank(rows["image"][number]) or 0.0,
            text_rank=effective_rank(rows["text"][number]) or 0.0,
            students=tuple(recalls[number].tolist()),
            student=ranking.teachers[number],
            encode_seconds=costs[number],
        )
        for number, reader in enumerate(readers)
    ]
    result = Comparison(
        teachers=tuple(teachers[number] for number in ranking.order),
        pairs=tuple(_pair(pair, config.caches) for pair in ranking.pairs),
        neighbours=_neighbours(rows, config.caches),
        neighbours_by_chance=100 * NEIGHBOURS / max(1, len(rows["image"][0]) - 1),
        choice=config.caches[ranking.order[0]],
        rivals=tuple(config.caches[number] for number in rivals(ranking)),
        student=config.student,
        epochs=config.epochs,
        seeds=config.seeds,
        split=learned.split,
        learned_images=len(readers[0].image_rows(learned.split)),
        measured_split=measured,
        images=len(split.image_rows),
        captions=len(split.caption_rows),
        chance=mean_recall(chance_recall(len(split.image_rows), len(split.caption_rows))),
        encode_images=images,
        seconds=time.perf_counter() - started,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    LocalFiles(config.out).write(RESULT, (result.model_dump_json(indent=2) + "\n").encode())
    return result


def _require_comparable(readers: Sequence[EmbeddingReader]) -> None:
    first = readers[0]
    for number, reader in enumerate(readers):
        for other in readers[:number]:
            if other.manifest.digest == reader.manifest.digest:
                raise UsageError(f"{other.location} and {reader.location} are one and the same cache: name each once")
        ours, theirs = first.identity.dataset, reader.identity.dataset
        for what, name in (("images", "samples_sha256"), ("captions", "captions_sha256")):
            digests = getattr(ours, name), getattr(theirs, name)
            if digests[0] != digests[1]:
                raise CacheMismatchError(
                    f"{first.location} and {reader.location} are over other {what}: {name} {digests[0][:12]} and "
                    f"{digests[1][:12]}, {ours.images:,} and {theirs.images:,} images. Encode the same dataset with "
                    "each teacher, with the same ?sample="
                )


def _own_recall(split: EvaluationSplit, device: str) -> float:
    return mean_recall(recall_of_ranks(split.ranks(*embed(split, CachedTeacher()), device=device)))


def _students(
    config: CompareConfig, readers: Sequence[EmbeddingReader], split: EvaluationSplit, report: Progress
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Train and measure all students. Return their recalls, (teachers, seeds), and draws, (teachers, resamples)."""
    recalls = np.empty((len(readers), config.seeds))
    draws = np.zeros((len(readers), _RESAMPLES))
    total, begun = recalls.size, time.perf_counter()
    for done, (seed, number) in enumerate(np.ndindex(config.seeds, len(readers))):
        left = (time.perf_counter() - begun) / done * (total - done) if done else None
        report("students", done, total, f"{readers[number].location}, seed {seed}", left)
        folder = _trained(config, number, readers[number], seed)
        measuring = EvaluateConfig(run=str(folder.path), device=config.device, workers=config.train.get("workers"))
        ranks = student_ranks(measuring, split, folder.checkpoint_path(), max(RECALL_KS))
        recalls[number, seed] = mean_recall(recall_of_ranks(ranks))
        draws[number] += bootstrap_mean_recall(ranks, split.text_image, _RESAMPLES) / config.seeds
    report("students", total, total)
    return recalls, draws


def _trained(config: CompareConfig, number: int, reader: EmbeddingReader, seed: int) -> RunFolder:
    """Train one student, or the rest of it."""
    name = f"{Path(reader.location.rstrip('/')).stem}-{reader.manifest.digest[:8]}-{seed}"
    folder = RunFolder(Path(config.out) / name)
    training = config.training(number, seed, str(folder.path))
    train(training, resume=folder.exists() and folder.read().checkpoint is not None)
    return folder


def _whole(info: CacheInfo) -> int:
    """Return the number of images that the cache's dataset was drawn from, about."""
    share = dict(DatasetSpec.parse(info.dataset).options).get(SAMPLE)
    return info.layout.image_rows if share is None else round(info.layout.image_rows / parse_share(SAMPLE, share))


def _encode_seconds(info: CacheInfo, images: int) -> float | None:
    captions = images * info.layout.text_rows / info.layout.image_rows
    if info.images_per_second is None or info.captions_per_second is None:
        return None
    return images / info.images_per_second + captions / info.captions_per_second


def _pair(pair: Pair, caches: Sequence[str]) -> ComparedPair:
    better, worse = caches[pair.better], caches[pair.worse]
    return ComparedPair(better=better, worse=worse, points=pair.points, certain=pair.certain)


def _neighbours(rows: dict[Any, list[NDArray[np.float32]]], caches: Sequence[str]) -> tuple[SharedNeighbours, ...]:
    shares = {tower: 100 * shared_neighbours(own) for tower, own in rows.items()}

    def share(tower: str, first: int, second: int) -> float | None:
        value = float(shares[tower][first, second])
        return None if np.isnan(value) else value

    return tuple(
        SharedNeighbours(
            first=caches[first],
            second=caches[second],
            image=share("image", first, second),
            text=share("text", first, second),
        )
        for first, second in combinations(range(len(caches)), 2)
    )
