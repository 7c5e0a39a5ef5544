"""Retraining: encode new data, train, compare the student with the champion, ship and promote it if it passes.

Every step resumes the work of an earlier call, so retraining can be called again after a crash. One retraining at a
time works in a home (:mod:`~teacher_cache.pipeline.promote.home`). A teacher is identified by its name and precision:
new weights need a new name.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from teacher_cache.pipeline.data.images.preprocess import handed_on
from teacher_cache.pipeline.deploy.record import RECORD, Deployment, require_packages
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.run_record import weights_file_sha256
from teacher_cache.pipeline.models.student import build_student, student_config
from teacher_cache.pipeline.precompute.plan import ReadDataset
from teacher_cache.pipeline.precompute.reuse import NotReusableError
from teacher_cache.pipeline.precompute.run import PrecomputeResult, precompute
from teacher_cache.pipeline.promote.gate import PromoteResult, promote
from teacher_cache.pipeline.promote.home import Home
from teacher_cache.pipeline.promote.look import Look, look_at
from teacher_cache.pipeline.promote.registry import Candidate, StudentRegistry
from teacher_cache.pipeline.promote.stage_settings import StageSettings
from teacher_cache.pipeline.settings.names import CHECKPOINT_CONFIG
from teacher_cache.pipeline.settings.promote import RetrainConfig
from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.errors import CacheCorruptError
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.format.manifest_file import read_manifest

Progress = Callable[[str, int, int], None]


class RetrainResult(BaseModel, frozen=True):
    """The result of a retraining."""

    outcome: Literal["nothing-new", "promoted", "rejected"]
    look: Look
    encoded: PrecomputeResult | None = Field(description="Result of precompute. None if the cache was finished before.")
    run: str | None
    candidate: Candidate | None
    champion: int | None
    seconds: float


class Retraining:
    """The steps of one retraining, in the order of calls. Each may be called again after a crash.

    Raises:
        UsageError: a setting cannot be used.
    """

    def __init__(self, config: RetrainConfig) -> None:
        self.config = config
        self.home = Home(config)
        self._settings = StageSettings(config)
        self._read: ReadDataset | None = None
        training = self._settings.check()
        if config.ship:
            require_packages()
        self._student = student_config(config.student)
        if training.train_image_size is not None:
            build_student(self._student, {}, 1).preprocess_to_learn(training.train_image_size)

    @property
    def registry(self) -> StudentRegistry:
        """Registry of this home's students."""
        return self.home.registry

    def look(self, progress: Progress | None = None) -> Look:
        """Read dataset and home, see :func:`~teacher_cache.pipeline.promote.look.look_at`."""
        seen = _stage(progress, "look at the dataset")
        look, self._read = look_at(self._settings, self.home, self._student, seen)
        return look

    def encode(self, look: Look, progress: Progress | None = None) -> PrecomputeResult | None:
        """Make the cache of the present dataset, unless it is finished, and verify it.

        If its preprocessing or weights differ from those of the cache to copy from, all rows are encoded.

        Returns:
            Result of precompute, or None if the cache was finished before.

        Raises:
            CacheCorruptError: verification failed.
            CacheError, UsageError, OSError, FloatingPointError: as ``precompute`` raises them.
        """
        made, (read, self._read) = None, (self._read, None)
        if not look.cache_finished:
            config = self._settings.encoding(look.storage_settings(), look.crops)
            try:
                made = precompute(config, progress, read)
            except NotReusableError:
                made = precompute(config.model_copy(update={"reuse": None}), progress, read)
        report = verify_cache(look.cache, _stage(progress, "verify"))
        if not report.ok:
            raise CacheCorruptError(
                f"{look.cache}: {report.findings[0].message} ({len(report.findings)} findings in all). Run "
                "teacher-cache repair, then retrain again"
            )
        return made

    def train(self, look: Look, progress: Callable[[Any], None] | None = None) -> str:
        """Train the student, or resume its training. Return the run.

        Raises:
            CacheError, UsageError, FloatingPointError: as ``train`` raises them.
        """
        # imported here: look() does not need torch's training loop
        from teacher_cache.pipeline.train.loop import train

        folder = RunFolder(look.run)
        begun = folder.exists() and folder.read().checkpoint is not None
        init = folder.read().config.init if begun else self._init(look.cache)
        train(self._settings.training(look.cache, look.run, init), progress, resume=begun)
        return look.run

    def promote(self, look: Look, progress: Progress | None = None) -> PromoteResult:
        """Compare the student with the champion; ship and promote it if it passes. A failed gate rejects it.

        Raises:
            CacheError, UsageError: as ``promote`` raises them.
        """
        config = self._settings.comparison(look.run, self.registry.location)
        ship = (lambda: self._deploy(look.run, progress)) if self.config.ship else None
        return promote(config, progress, ship, keep_unchanged=True)

    def _init(self, cache: str) -> str | None:
        """Return the champion's checkpoint if it has the student's architecture and the cache's pixel normalisation."""
        champion = self.registry.champion() if self.config.start == "champion" else None
        if champion is None or RunFolder(champion.run).read().student_config != self._student:
            return None
        folder = f"{champion.run}/{champion.checkpoint}"
        cached = handed_on(read_manifest(open_files(cache)).identity.preprocess)
        learned = json.loads((Path(folder) / CHECKPOINT_CONFIG).read_bytes())["preprocess_cfg"]
        return folder if all(tuple(learned[name]) == tuple(cached[name]) for name in ("mean", "std")) else None

    def _deploy(self, run: str, progress: Progress | None) -> str:
        """Deploy the run's student, unless an earlier call did so before it was killed."""
        # imported here: without new data no ONNX is needed
        from teacher_cache.pipeline.deploy.run import deploy

        checkpoint = self._settings.checkpoint(run)
        weights = weights_file_sha256(RunFolder(run).checkpoint_path(checkpoint))
        for out in self.home.deployed_names(run):
            if not Path(out).exists():
                deploy(self._settings.deployment(run, out, checkpoint), progress)
                return out
            if (Path(out) / RECORD).exists() and Deployment.read(out).weights.sha256 == weights:
                return out
        raise AssertionError  # the names do not end


def retrain(config: RetrainConfig, progress: Progress | None = None) -> RetrainResult:
    """Update cache, student and champion to the present dataset. May be called again after a crash.

    Args:
        progress: called with (stage, done, total).

    Raises:
        UsageError: a setting cannot be used (nothing is written), or another process retrains in this home.
        CacheError, OSError, FloatingPointError: as the steps raise them.
    """
    started = time.perf_counter()
    steps = Retraining(config)
    look = steps.look(progress)
    encoded = verdict = None
    if look.judged is None:
        with RunFolder(steps.home.folder).locked():
            encoded = steps.encode(look, progress)
            steps.train(look, None if progress is None else lambda at: progress("step", at.step, at.total_steps))
            verdict = steps.promote(look, progress)
    champion = steps.registry.champion()
    return RetrainResult(
        outcome=verdict.outcome if verdict else "nothing-new",
        look=look,
        encoded=encoded,
        run=look.run if verdict else None,
        candidate=verdict.candidate if verdict else look.judged,
        champion=champion.number if champion else None,
        seconds=time.perf_counter() - started,
    )


def _stage(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(name, done, total)
