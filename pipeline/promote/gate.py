"""The gate between a trained student and the champion: both on the same images, promoted only if not worse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from teacher_cache.pipeline.deploy.record import Deployment, DeploymentError
from teacher_cache.pipeline.evaluate.intervals import LEVEL, bootstrap_share
from teacher_cache.pipeline.evaluate.recall import RetrievalRanks, mean_recall, recall_of_ranks, retention
from teacher_cache.pipeline.evaluate.retrieval import EvaluateResult, measure, student_ranks
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
from teacher_cache.storage.errors import UsageError

__all__ = [
    "NOT_SHIPPED",
    "PromoteResult",
    "checkpoint_of",
    "compare",
    "decide",
    "promote",
    "roll_back",
]

Progress = Callable[[str, int, int], None]

NOT_SHIPPED = "could not be shipped"
"""How the reason of a student begins that passed the comparison and failed a gate of shipping."""


class PromoteResult(BaseModel, frozen=True):
    """What was measured and decided."""

    registry: str
    candidate: Candidate
    promotion: Promotion | None = Field(description="None where it was rejected.")

    @property
    def outcome(self) -> Literal["promoted", "rejected"]:
        """In a word."""
        return "promoted" if self.promotion else "rejected"


def promote(
    config: PromoteConfig,
    progress: Progress | None = None,
    ship: Callable[[], str] | None = None,
    keep_unchanged: bool = False,
) -> PromoteResult:
    """Measure a student, beside the champion if there is one; keep it in the registry; promote it if it passes.

    The champion is measured anew, on the images and captions of this cache: its old numbers may be of other ones.

    Args:
        ship: called once it has passed, before it is promoted; deploys it and returns the folder. A gate that it fails
            (``DeploymentError``) rejects the student; anything else that it raises leaves the registry as it is.
        keep_unchanged: keep a student with the champion's own weights as rejected, rather than refuse it.

    Raises:
        UsageError: the run is not finished, has no such checkpoint, is the champion already, was chosen on this split,
            or the champion's checkpoint is gone or changed.
        CacheError: as ``evaluate`` raises it.
    """
    registry = StudentRegistry(config.registry)
    folder = RunFolder(config.run)
    record = folder.read()
    folder.require_finished(record)  # or training would remove the champion's weights with its next checkpoint
    path = folder.checkpoint_path(config.checkpoint)
    weights = weights_file_sha256(path)
    champion = registry.champion()
    unchanged = champion is not None and champion.weights_sha256 == weights and _same_size(champion, path)
    if champion is not None and unchanged and not keep_unchanged:
        raise UsageError(f"{config.run}: {path.name} is the champion already, student {champion.number}")
    if record.chosen_on(config.checkpoint) == config.split:
        way_out = "" if record.resized else ", or take --checkpoint last"
        raise UsageError(
            f"{config.run}: its checkpoint {path.name} was chosen on split {config.split!r}, which flatters it there. "
            f"Measure on another --split{way_out}"
        )
    if config.deployed is not None:
        _require_deployed(config.deployed, path, weights)
    champion_path = checkpoint_of(champion) if champion else None

    wanted = EvaluateConfig(
        cache=config.cache,
        run=config.run,
        checkpoint=config.checkpoint,
        split=config.split,
        accept_mismatch=config.accept_mismatch,
        image_root=config.image_root,
        batch_size=config.batch_size,
        device=config.device,
        workers=config.workers,
    )
    measured = measure(wanted, progress)
    assert measured.student_ranks is not None  # a run was named
    comparison = None
    if champion is not None and champion_path is not None:
        ranks = student_ranks(wanted, measured.split, champion_path, measured.depth, progress)
        comparison = compare(measured.student_ranks, ranks, measured.split.text_image, champion.number, config.margin)
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
            # of the whole way: a registry is read from any folder
            "run": str(Path(config.run).absolute()),
            "deployed": deployed,
            "comparison": comparison,
            "passed": passed,
            "reason": reason,
        }
    )
    promotion = registry.promote(candidate, champion, "gate") if passed else None
    return PromoteResult(registry=config.registry, candidate=candidate, promotion=promotion)


def compare(
    challenger: RetrievalRanks, champion: RetrievalRanks, text_image: NDArray[np.int64], number: int, margin: float
) -> Comparison:
    """Both on the same queries and the same resamples of the images
    (``teacher_cache.pipeline.evaluate.intervals.bootstrap_share``).

    Args:
        text_image: (captions,) position of each caption's image.
        number: of the champion.
        margin: percent that the interval may reach below 100.
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
    found: EvaluateResult, comparison: Comparison | None, min_retention: float | None = None
) -> tuple[bool, str]:
    """Whether a challenger passes, and why.

    A test of non-inferiority: it passes if the lower end of the interval of its share of the champion's mean recall
    is at least 100 - margin percent (Piaggio et al. 2012, CONSORT's extension to non-inferiority trials).
    """
    kept = found.retention["mean"] if found.retention else None
    if min_retention is not None and (kept is None or kept < min_retention):
        return False, f"keeps {_percent(kept)} of the teacher's mean recall, at least {min_retention:g} % wanted"
    if comparison is None:
        return True, "the first: there was no champion to compare it with"
    least = 100 - comparison.margin
    if comparison.interval is None or comparison.share is None:
        return False, (
            f"champion {comparison.champion} finds nothing in some resamples of {found.images} images, so that no "
            "interval can be given; measure on more"
        )
    reason = (
        f"{comparison.share:.1f} % of the mean recall of champion {comparison.champion}, "
        f"{comparison.level:.0%} interval {comparison.interval.low:.1f} to {comparison.interval.high:.1f}; "
        f"at least {least:g} wanted"
    )
    return comparison.interval.low >= least, reason


def roll_back(location: str, to: int | None = None) -> tuple[Candidate, Promotion]:
    """Make an earlier champion the champion again, if its weights are still what they were.

    Args:
        location: of the registry.
        to: number of the student; the champion before the present one if left out.

    Raises:
        UsageError: no such earlier champion, its checkpoint is gone or changed, or another became champion meanwhile.
    """
    registry = StudentRegistry(location)
    now, earlier = registry.champion(), registry.earlier_champion(to)
    checkpoint_of(earlier)
    return earlier, registry.promote(earlier, now, "rollback")


def _lineage(record: RunRecord, found: EvaluateResult, weights_sha256: str) -> dict[str, Any]:
    assert found.student is not None  # a run was measured
    return {
        "checkpoint": found.checkpoint,
        "weights_sha256": weights_sha256,
        "student": record.config.student,
        "student_parameters": record.student_parameters,
        "teacher": record.teacher,
        "cache": record.config.cache,
        "cache_manifest_digest": record.cache_manifest_digest,
        "settings": record.config.model_dump(mode="json"),
        "averaged": tuple(each.run for each in record.averaged),
        "split": found.split,
        "measured_on": found.cache_manifest_digest,
        "images": found.images,
        "captions": found.captions,
        "recalls": found.student,
        "mean_recall": mean_recall(found.student),
        "retention": found.retention["mean"] if found.retention else None,
        "retention_interval": found.retention_intervals.mean if found.retention_intervals else None,
    }


def checkpoint_of(student: Candidate) -> Path:
    """Folder of a student's checkpoint, proven to hold its weights.

    Raises:
        UsageError: it is gone, or holds others.
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
    """That a folder was made of a checkpoint: its weights are a copy of the checkpoint's file."""
    made = Deployment.read(deployed)
    if made.weights.sha256 != weights_sha256:
        raise UsageError(
            f"{deployed}: was made of {made.run}/{made.checkpoint} with weights {made.weights.sha256[:12]}, not of "
            f"{checkpoint} with {weights_sha256[:12]}. Deploy this one first"
        )
    there, here = tuple(made.preprocess["size"]), checkpoint_image_size(checkpoint)
    if there != here:
        raise UsageError(
            f"{deployed}: was made of {made.run}/{made.checkpoint}, which sees {there[0]} x {there[1]} pixels, and "
            f"{checkpoint} sees {here[0]} x {here[1]}. Deploy this one first"
        )


def _same_size(champion: Candidate, checkpoint: Path) -> bool:
    """Whether a champion sees images of the size that a checkpoint's student does; resize changes that alone."""
    try:
        return checkpoint_image_size(Path(champion.run) / champion.checkpoint) == checkpoint_image_size(checkpoint)
    except FileNotFoundError:  # it is gone, which is said by name when it is measured
        return True


def _percent(value: float | None) -> str:
    return "an unknown share" if value is None else f"{value:.1f} %"
