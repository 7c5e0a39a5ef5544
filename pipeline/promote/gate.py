"""The gate between a trained student and the champion: both are measured on the same images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from teacher_cache.pipeline.deploy.record import Deployment, DeploymentError
from teacher_cache.pipeline.evaluate.intervals import LEVEL, bootstrap_share
from teacher_cache.pipeline.evaluate.learned import count_learned, learned_words
from teacher_cache.pipeline.evaluate.recall import RetrievalRanks, mean_recall, recall_of_ranks, retention
from teacher_cache.pipeline.evaluate.retrieval import EvaluateResult, measure, student_ranks
from teacher_cache.pipeline.evaluate.split import EvaluationSplit, open_split
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.run_record import (
    CHECKPOINT_WEIGHTS,
    RunRecord,
    checkpoint_image_size,
    weights_file_sha256,
)
from teacher_cache.pipeline.promote.registry import Candidate, Comparison, Promotion, StudentRegistry
from teacher_cache.pipeline.settings.evaluate import EvaluateConfig
from teacher_cache.pipeline.settings.promote import PromoteConfig
from teacher_cache.storage.errors import CacheError, CacheMismatchError, UsageError
from teacher_cache.storage.files.location import absolute_location
from teacher_cache.storage.format.tables import long_texts
from teacher_cache.storage.observe.quantities import counted
from teacher_cache.storage.read.reader import EmbeddingReader

Progress = Callable[[str, int, int], None]

NOT_SHIPPED = "could not be shipped"
"""Start of the reason if a student passes the comparison but fails a gate of deploy."""


class PromoteResult(BaseModel, frozen=True):
    """The result of a comparison."""

    registry: str
    candidate: Candidate
    promotion: Promotion | None = Field(description="Promotion. None if the student was rejected.")

    @property
    def outcome(self) -> Literal["promoted", "rejected"]:
        """Verdict: promoted or rejected."""
        return "promoted" if self.promotion else "rejected"


def promote(
    config: PromoteConfig,
    progress: Progress | None = None,
    ship: Callable[[], str] | None = None,
    keep_unchanged: bool = False,
) -> PromoteResult:
    """Measure a student against the champion, store it in the registry, and promote it if it passes.

    The champion is measured again on the images and captions of this cache.

    Args:
        ship: deploys the student and returns the folder; called if it passes the comparison, before its promotion.
            A ``DeploymentError`` rejects the student; any other error leaves the registry unchanged.
        keep_unchanged: store a student with the champion's weights as rejected, instead of raising.

    Raises:
        UsageError: the run is not finished, has no such checkpoint, or is the champion already; the checkpoint was
            chosen on this split; the student learned from some of its images, and ``accept_learned`` is not set; or the
            champion's checkpoint is gone or changed.
        CacheMismatchError: the champion was measured on other images, and ``accept_mismatch`` lacks dataset.
        CacheError: as ``evaluate`` raises it.
    """
    registry = StudentRegistry(config.registry)
    folder = RunFolder(config.run)
    record = folder.read()
    folder.require_finished(record)  # a running training would remove the champion's checkpoint
    path = folder.checkpoint_path(config.checkpoint)
    weights = weights_file_sha256(path)
    champion = registry.champion()
    unchanged = champion is not None and champion.weights_sha256 == weights and _same_size(champion, path)
    if champion is not None and unchanged and not keep_unchanged:
        raise UsageError(f"{config.run}: {path.name} is the champion already, student {champion.number}")
    settings = EvaluateConfig(**config.model_dump(include=set(EvaluateConfig.model_fields)))
    split = open_split(settings)
    _require_fair_split(config, record, path.name, split)
    if config.deployed is not None:
        _require_deployed(config.deployed, path, weights)
    champion_path = checkpoint_of(champion) if champion else None
    other = _other_dataset(config, champion, split) if champion else None
    measured = measure(settings, progress)
    assert measured.student_ranks is not None  # a run was named
    comparison = None
    if champion is not None and champion_path is not None:
        ranks = student_ranks(settings, measured.split, champion_path, measured.student_ranks.depth, progress)
        comparison = compare(measured.student_ranks, ranks, measured.split.text_image, champion.number, config.margin)
        learned = count_learned(RunFolder(champion.run).read(), split.content_sha256, split.reader)
        comparison = comparison.model_copy(update={"other_images": other, "champion_learned_images": learned})
    passed, reason = decide(measured.result, comparison, config.min_retention)
    if champion is not None and unchanged:
        passed, reason = False, f"the very weights of champion {champion.number}"
    deployed = None if config.deployed is None else str(Path(config.deployed).absolute())
    if passed and ship is not None:
        try:
            deployed = ship()
        except DeploymentError as error:
            passed, reason = False, f"{NOT_SHIPPED}: {error}"
    candidate = registry.add(
        _lineage(record, measured.result, weights)
        | {
            # absolute: the registry may be read from another folder
            "run": str(Path(config.run).absolute()),
            "deployed": deployed,
            "comparison": comparison,
            "passed": passed,
            "reason": reason,
        }
    )
    promotion = registry.promote(candidate, champion, "gate") if passed else None
    return PromoteResult(registry=config.registry, candidate=candidate, promotion=promotion)


def _require_fair_split(config: PromoteConfig, record: RunRecord, checkpoint: str, split: EvaluationSplit) -> None:
    """Check that the checkpoint was not chosen on the split that it is measured on, and learned from none of it."""
    if record.chosen_on(config.checkpoint) == split.name:
        way_out = "" if record.resized else ", or take --checkpoint last"
        raise UsageError(
            f"{config.run}: its checkpoint {checkpoint} was chosen on split {split.name!r}, which flatters it there. "
            f"Measure on another --split{way_out}"
        )
    learned = count_learned(record, split.content_sha256, split.reader)
    if learned and not config.accept_learned:
        words = learned_words(learned, f"the {counted(len(split.image_rows), 'image')}")
        raise UsageError(
            f"{config.run}: {words} of {split.cache}, split {split.name!r}, which flatters it there. Measure on "
            "another --split or --cache; or, where a few pictures are in both, accept it: --accept-learned"
        )


def _other_dataset(config: PromoteConfig, champion: Candidate, split: EvaluationSplit) -> str | None:
    """Return how the images differ from those the champion was measured on. None: they are the same.

    Raises:
        CacheMismatchError: they differ, and ``accept_mismatch`` lacks dataset.
    """
    other = other_images(champion, split)
    if other is not None and "dataset" not in config.accept_mismatch:
        raise CacheMismatchError(
            f"{config.registry}: {other} Measure both there: --cache {champion.measured_cache or champion.cache} "
            f"--split {champion.split!r}; or take another --registry, or accept it: --accept-mismatch dataset"
        )
    return other


def other_images(champion: Candidate, split: EvaluationSplit) -> str | None:
    """Return how the images of a split differ from those that the champion was measured on, as a sentence.

    None if the split's images are of the champion's cache, or include all that it was measured on: a dataset may grow.
    """
    if champion.measured_on == split.reader.manifest.digest:
        return None
    # earlier records name only the cache that the student learned from
    location = champion.measured_cache or champion.cache
    where = f"champion {champion.number} was measured on {location}, split {champion.split!r}"
    try:
        reader = EmbeddingReader(location, manifest_digest=champion.measured_on)
    except CacheError as error:
        return f"{where}, which cannot be compared with {split.cache}: {error}"
    theirs = reader.samples.select(["content_sha256", "split"])
    if missing(split.content_sha256, theirs["content_sha256"]) == 0:
        return None
    theirs = theirs.filter(pc.equal(theirs["split"], champion.split))["content_sha256"]
    absent = missing(theirs, split.content_sha256)
    if absent == 0:
        return None
    return (
        f"{where}: {absent:,} of its {len(theirs):,} images are not among the {len(split.image_rows):,} of "
        f"{split.cache}, split {split.name!r}."
    )


def missing(values: pa.ChunkedArray, among: pa.ChunkedArray) -> int:
    """Count the values that are not in ``among``."""
    present = pc.is_in(long_texts(values), value_set=long_texts(among).combine_chunks())
    return len(values) - int(pc.sum(present).as_py() or 0)


def compare(
    challenger: RetrievalRanks, champion: RetrievalRanks, text_image: NDArray[np.int64], number: int, margin: float
) -> Comparison:
    """Compare challenger and champion on the same queries and the same resamples of the images.

    Args:
        text_image: (captions,) position of each caption's image.
        number: number of the champion.
        margin: percent below 100 at which the interval may start.
    """
    recalls = recall_of_ranks(champion)
    return Comparison(
        champion=number,
        champion_recalls=recalls,
        share=retention(recall_of_ranks(challenger), recalls)["mean"],
        interval=bootstrap_share(challenger, champion, text_image).mean,
        level=LEVEL,
        margin=margin,
    )


def decide(
    result: EvaluateResult, comparison: Comparison | None, min_retention: float | None = None
) -> tuple[bool, str]:
    """Return whether a challenger passes, and why.

    This is a non-inferiority test: the challenger passes if the interval of its share of the champion's mean recall
    starts at 100 - margin percent or above (Piaggio et al. 2012, CONSORT's extension to non-inferiority trials).
    """
    share = result.retention["mean"] if result.retention else None
    if min_retention is not None and (share is None or share < min_retention):
        shown_share = "an unknown share" if share is None else f"{share:.1f} %"
        return False, f"keeps {shown_share} of the teacher's mean recall, at least {min_retention:g} % wanted"
    if comparison is None:
        return True, "the first: there was no champion to compare it with"
    least = 100 - comparison.margin
    if comparison.interval is None or comparison.share is None:
        return False, (
            f"champion {comparison.champion} finds nothing in some resamples of {result.images} images, so that no "
            "interval can be given; measure on more"
        )
    reason = (
        f"{comparison.share:.1f} % of the mean recall of champion {comparison.champion}, "
        f"{100 * comparison.level:.0f} % interval {comparison.interval.low:.1f} to {comparison.interval.high:.1f}, "
        f"whose lower end must be at least {least:g}"
    )
    return comparison.interval.low >= least, reason


def roll_back(location: str, to: int | None = None) -> tuple[Candidate, Promotion]:
    """Make an earlier champion the champion again, if its weights are unchanged.

    Args:
        location: location of the registry.
        to: number of the student. Default: the previous champion.

    Raises:
        UsageError: no such champion exists, its checkpoint is gone or changed, or another student became champion
            meanwhile.
    """
    registry = StudentRegistry(location)
    now, earlier = registry.champion(), registry.earlier_champion(to)
    checkpoint_of(earlier)
    return earlier, registry.promote(earlier, now, "rollback")


def _lineage(record: RunRecord, result: EvaluateResult, weights_sha256: str) -> dict[str, Any]:
    assert result.student is not None  # a run was measured
    return {
        "checkpoint": result.checkpoint,
        "weights_sha256": weights_sha256,
        "student": record.config.student,
        "student_parameters": record.student_parameters,
        "teacher": record.teacher,
        "cache": record.config.cache,
        "cache_manifest_digest": record.cache_manifest_digest,
        "settings": record.config.model_dump(mode="json"),
        "averaged": tuple(run.run for run in record.averaged),
        "split": result.split,
        "measured_on": result.cache_manifest_digest,
        "measured_cache": absolute_location(result.cache),
        "learned_images": result.learned_images,
        "images": result.images,
        "captions": result.captions,
        "recalls": result.student,
        "mean_recall": mean_recall(result.student),
        "retention": result.retention["mean"] if result.retention else None,
        "retention_interval": result.retention_intervals.mean if result.retention_intervals else None,
    }


def checkpoint_of(student: Candidate) -> Path:
    """Return the folder of a student's checkpoint after checking its weights.

    Raises:
        UsageError: the checkpoint is gone, or has other weights.
    """
    path = Path(student.run) / student.checkpoint
    if not (path / CHECKPOINT_WEIGHTS).exists():
        raise UsageError(
            f"{path}: student {student.number} of the registry was there, and is gone. Bring the run back, name "
            "another champion by teacher-cache students rollback --to, or begin a new registry"
        )
    if weights_file_sha256(path) != student.weights_sha256:
        raise UsageError(
            f"{path}: these are not the weights of student {student.number} (sha256 {student.weights_sha256[:12]}). "
            "Was it trained anew in the same folder? Name another champion by students rollback --to, or begin a "
            "new registry"
        )
    return path


def _require_deployed(deployed: str, checkpoint: Path, weights_sha256: str) -> None:
    """Check that a folder was deployed from a checkpoint, by the digest of its weights and its image size."""
    made = Deployment.read(deployed)
    if made.weights.sha256 != weights_sha256:
        raise UsageError(
            f"{deployed}: was made of {made.run}/{made.checkpoint} with weights {made.weights.sha256[:12]}, not of "
            f"{checkpoint} with {weights_sha256[:12]}. Deploy this one first"
        )
    deployed_size, size = tuple(made.preprocess["size"]), checkpoint_image_size(checkpoint)
    if deployed_size != size:
        raise UsageError(
            f"{deployed}: was made of {made.run}/{made.checkpoint}, which sees {deployed_size[0]} x {deployed_size[1]} "
            f"pixels, and {checkpoint} sees {size[0]} x {size[1]}. Deploy this one first"
        )


def _same_size(champion: Candidate, checkpoint: Path) -> bool:
    """Return whether champion and checkpoint have the same image size; ``resize`` keeps the weights."""
    try:
        return checkpoint_image_size(Path(champion.run) / champion.checkpoint) == checkpoint_image_size(checkpoint)
    except FileNotFoundError:  # checkpoint_of reports a champion that is gone
        return True
