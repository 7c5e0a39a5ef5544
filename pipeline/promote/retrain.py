"""Retraining: look for new data, encode only that, train, measure beside the champion, ship and promote what passes.

    home/
      caches/0002.cache     one for each state of the dataset; rows that an earlier one has are copied from it
      runs/0002             the student trained from it
      deployed/0002         if it passed
      students/             the registry: champion, challengers, why each passed or not

Every step looks at what is there already, so that a retraining which was killed goes on when it is called again. One
retraining at a time works in a home. The teacher is known by its name and precision: changed weights need another name.
"""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, Field

from teacher_cache.pipeline.data.datasets.samples import DatasetSpec, load_samples
from teacher_cache.pipeline.data.images.preprocess import handed_on
from teacher_cache.pipeline.data.images.scaled_jpeg import PILLOW
from teacher_cache.pipeline.deploy.record import RECORD, Deployment, require_packages
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.run_record import CHECKPOINT_CONFIG, other_settings, weights_file_sha256
from teacher_cache.pipeline.models.student import build_student, student_config
from teacher_cache.pipeline.models.teacher import recorded_name
from teacher_cache.pipeline.precompute.plan import CROP_SETTINGS, dataset_identity, dataset_tables
from teacher_cache.pipeline.precompute.reuse import NotReusableError
from teacher_cache.pipeline.precompute.run import PrecomputeResult, precompute
from teacher_cache.pipeline.promote.gate import NOT_SHIPPED, PromoteResult, checkpoint_of, promote
from teacher_cache.pipeline.promote.registry import Candidate, StudentRegistry
from teacher_cache.pipeline.settings.base import Decoder, StoredDtype
from teacher_cache.pipeline.settings.deploy import DeployConfig
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.pipeline.settings.promote import PromoteConfig, RetrainConfig
from teacher_cache.pipeline.settings.run_file import check_config
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.errors import CacheCorruptError, CacheFormatError, CacheNotFoundError, UsageError
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.format.identity import DatasetIdentity
from teacher_cache.storage.format.manifest import CacheManifest
from teacher_cache.storage.format.manifest_file import read_manifest
from teacher_cache.storage.format.tables import CAPTIONS, SAMPLES, long_texts, read_table

__all__ = ["Changes", "Look", "RetrainResult", "Retraining", "retrain"]

_CACHE = re.compile(r"^(\d{4,})\.cache$")
_RUN = re.compile(r"^(\d{4,})(-\d+)?$")
_DEFAULTS = {"views": 1, "dtype": "float16", "decoder": PILLOW}
_SET_HERE = {
    "precompute": {
        *("dataset", "teacher", "pretrained", "precision", "dtype", "decoder", "views", "cache", "reuse", "device")
    },
    "train": {"cache", "student", "out", "init", "device"},
    "deploy": {"run", "out", "checkpoint", "cache", "split", "teacher", "pretrained"},
}

Progress = Callable[[str, int, int], None]


class Changes(BaseModel, frozen=True):
    """The dataset against the newest finished cache."""

    new_images: int = Field(description="Whose bytes that cache has no row of.")
    removed_images: int = Field(description="Of that cache, which are gone or have other bytes.")
    new_captions: int = Field(description="Texts that it has not; edited ones count here.")
    removed_captions: int = Field(description="Texts that are gone.")


class Look(BaseModel, frozen=True):
    """What is there, and what a retraining has to do."""

    images: int
    captions: int
    changes: Changes | None = Field(description="None where no cache is finished yet.")
    cache: str = Field(description="Of the dataset as it is now; to be made where it is not finished.")
    cache_finished: bool
    dtype: StoredDtype = Field(description="Of that cache, as its decoder and views.")
    decoder: Decoder
    views: int
    crops: dict[str, Any] = Field(
        description="How its random crops are drawn, by the names of precompute, as the cache before has it."
    )
    reuse: str | None = Field(description="Cache that rows are copied from: the newest of this dtype and decoder.")
    not_reused: str | None = Field(description="Why no rows of the newest finished cache of this teacher are copied.")
    unread: str | None = Field(
        None, description="Why the newest cache cannot say how it stores its rows, and which one says it instead."
    )
    run: str
    judged: Candidate | None = Field(description="Of this cache and these settings: then nothing is to be done.")
    unshipped: str | None = Field(
        None, description="Why a student that was judged before is not shipped, if it is to be."
    )


class RetrainResult(BaseModel, frozen=True):
    """What a retraining did."""

    outcome: Literal["nothing-new", "promoted", "rejected"]
    look: Look
    encoded: PrecomputeResult | None = Field(description="None where the cache was finished before.")
    run: str | None
    candidate: Candidate | None
    champion: int | None
    seconds: float


@dataclass(frozen=True)
class _Numbered:
    number: int
    location: str
    manifest: CacheManifest | None
    """None where none can be read."""
    free: bool = False
    """There is none, not even a damaged one: whoever planned it was stopped before, and it may be planned anew."""
    unread: str | None = None
    """Why there is one that cannot be read."""


class Retraining:
    """The steps of one retraining, in order; each may be called again after a crash.

    Raises:
        UsageError: a setting cannot be used.
    """

    def __init__(self, config: RetrainConfig) -> None:
        self.config = config
        if "://" in config.home:
            raise UsageError(f"home {config.home}: runs are written to a local folder; give URLs as caches alone")
        # whole: candidates and runs are found again from any folder
        self.home = str(Path(config.home).absolute())
        self.caches = (config.caches or f"{self.home}/caches").rstrip("/")
        self.registry = StudentRegistry(f"{self.home}/students")
        for stage, given in (("precompute", config.precompute), ("train", config.train), ("deploy", config.deploy)):
            if taken := sorted(set(given) & _SET_HERE[stage]):
                raise UsageError(f"{stage}: {', '.join(taken)}: set by retraining itself; leave it out")
        # a typing error or a missing package should not cost the encoding
        if config.ship:
            require_packages()
        training = self._training("cache", "out", "champion")
        self._deployment("run", "out", "last")
        self._encoding({})
        self._student = student_config(config.student)
        if training.train_image_size is not None:
            build_student(self._student, {}, 1).preprocess_to_learn(training.train_image_size)

    def look(self, progress: Progress | None = None) -> Look:
        """Read the dataset and what is there. Loads no teacher, writes nothing.

        Raises:
            UsageError: the dataset cannot be used, has no such split, or has lost more images than ``max_removed``
                allows; or the champion's weights are gone.
            CacheUnreachableError, CacheAccessError: of the store of the caches.
        """
        spec = DatasetSpec.parse(self.config.dataset)
        dataset, digests = load_samples(spec, _stage(progress, "look at the dataset"))
        tables = dataset_tables(dataset, digests)
        identity = dataset_identity(spec, tables)
        self._require_splits(identity)
        there = _numbered(self.caches)
        ready = [each for each in there if each.manifest is not None and each.manifest.sealed]
        mine = [each for each in there if each.manifest is not None and self._is_of(each.manifest, identity)]
        number, manifest = (mine[-1].number, mine[-1].manifest) if mine else (self._next(there), None)
        finished = manifest is not None and manifest.sealed
        changes = _changes(ready[-1], tables) if ready else None
        if changes is not None and not mine:
            self._require_most(ready[-1], changes)
        others = [each for each in ready if each.number != number and each.manifest and self._is_by(each.manifest)]
        # whoever's teacher made it: a teacher that changes does not change how rows are stored
        source = mine[-1] if mine else ready[-1] if ready else None
        stored = self._stored(source)
        unlike = {each.location: self._unlike(each, stored, source, begun=bool(mine)) for each in others}
        alike = [location for location, why in unlike.items() if why is None]
        run = self._run(number, manifest.digest if finished and manifest else None)
        judged = self._judged(run)
        champion = self.registry.champion()
        if judged is None and champion is not None:
            checkpoint_of(champion)  # it will be measured, after hours
        return Look(
            images=identity.images,
            captions=identity.captions,
            changes=changes,
            cache=f"{self.caches}/{number:04d}.cache",
            cache_finished=finished,
            **stored,
            crops=_crops(source.manifest) if stored["views"] > 1 and source and source.manifest else {},
            reuse=alike[-1] if alike else None,
            not_reused=list(unlike.values())[-1] if unlike and not alike and not finished else None,
            unread=_unread(there, source),
            run=run,
            judged=judged,
            unshipped=_unshipped(judged) if judged is not None and self.config.ship else None,
        )

    def encode(self, look: Look, progress: Progress | None = None) -> PrecomputeResult | None:
        """Make the cache of the dataset as it is now, unless it is there, and read all of it once.

        Where preprocessing or weights are others than those of the cache to copy from, all of it is encoded.

        Returns:
            None where it was finished before.

        Raises:
            CacheCorruptError: it does not verify.
            CacheError, UsageError, OSError, FloatingPointError: as ``precompute`` raises them.
        """
        made = None
        if not look.cache_finished:
            config = self._precompute(look)
            try:
                made = precompute(config, progress)
            except NotReusableError:
                made = precompute(config.model_copy(update={"reuse": None}), progress)
        report = verify_cache(look.cache, _stage(progress, "verify"))
        if not report.ok:
            raise CacheCorruptError(
                f"{look.cache}: {report.findings[0].message} ({len(report.findings)} findings in all). Run "
                "teacher-cache repair, then retrain again"
            )
        return made

    def train(self, look: Look, progress: Callable[[Any], None] | None = None) -> str:
        """Train the student, or go on with its training; its run.

        Raises:
            CacheError, UsageError, FloatingPointError: as ``train`` raises them.
        """
        # here, not above: who only looks needs no training loop
        from teacher_cache.pipeline.train.loop import train

        folder = RunFolder(look.run)
        begun = folder.exists() and folder.read().checkpoint is not None
        init = folder.read().config.init if begun else self._init(look.cache)
        train(self._training(look.cache, look.run, init), progress, resume=begun)
        return look.run

    def promote(self, look: Look, progress: Progress | None = None) -> PromoteResult:
        """Measure the student beside the champion; ship and promote it if it passes. One that fails a gate is rejected.

        Raises:
            CacheError, UsageError: as ``promote`` raises them.
        """
        config = self.config
        return promote(
            PromoteConfig(
                run=look.run,
                registry=self.registry.location,
                checkpoint=self._checkpoint(look.run),
                split=config.split,
                margin=config.margin,
                min_retention=config.min_retention,
                device=config.device,
            ),
            progress,
            (lambda: self._deploy(look.run, progress)) if config.ship else None,
            keep_unchanged=True,
        )

    def _precompute(self, look: Look) -> PrecomputeConfig:
        stored = {name: getattr(look, name) for name in (*_DEFAULTS, "cache", "reuse")}
        return self._encoding(stored, look.crops)

    def _encoding(self, stored: dict[str, Any], crops: dict[str, Any] | None = None) -> PrecomputeConfig:
        names = ("dataset", "teacher", "pretrained", "precision", "device")
        given = {"cache": "cache", **{name: getattr(self.config, name) for name in names}, **stored}
        return check_config(PrecomputeConfig, (crops or {}) | self.config.precompute | given, "precompute")

    def _require_splits(self, dataset: DatasetIdentity) -> None:
        training = self._training("cache", "out", None)
        for setting, split in (
            ("split", self.config.split),
            ("train.split", training.split),
            ("train.select_split", training.select_split),
        ):
            if split is not None and split not in dataset.splits:
                known = ", ".join(dataset.splits) or "none"
                raise UsageError(f"{self.config.dataset}: no split {split!r} ({setting}); there are {known}")

    def _require_most(self, before: _Numbered, changes: Changes) -> None:
        images = before.manifest.layout.image_rows if before.manifest else 0
        if 100 * changes.removed_images > self.config.max_removed * images:
            raise UsageError(
                f"{self.config.dataset}: {changes.removed_images:,} of {images:,} images of {before.location} are "
                "gone. Is a share not mounted? If they are meant to be gone, allow more by max_removed"
            )

    def _next(self, there: list[_Numbered]) -> int:
        """A number that neither a cache nor a run has; that of a cache whose planning was stopped is free."""
        runs = [int(found[1]) for path in Path(f"{self.home}/runs").glob("*") if (found := _RUN.match(path.name))]
        return max([0, *(each.number for each in there if not each.free), *runs]) + 1

    def _training(self, cache: str, out: str, init: str | None) -> TrainConfig:
        config = self.config
        given: dict[str, Any] = {"cache": cache, "student": config.student, "out": out, "device": config.device}
        if init is None:  # nothing to keep: what begins at random learns whole
            given["lock_image_unlocked_groups"] = None
        return check_config(TrainConfig, config.train | given | {"init": init}, "train")

    def _init(self, cache: str) -> str | None:
        """The champion's weights, if it is the same student and sees the same pixels as this cache's teacher."""
        champion = self.registry.champion() if self.config.start == "champion" else None
        if champion is None or RunFolder(champion.run).read().student_config != self._student:
            return None
        folder = f"{champion.run}/{champion.checkpoint}"
        wanted = handed_on(read_manifest(open_files(cache)).identity.preprocess)
        seen = json.loads((Path(folder) / CHECKPOINT_CONFIG).read_bytes())["preprocess_cfg"]
        return folder if all(tuple(seen[name]) == tuple(wanted[name]) for name in ("mean", "std")) else None

    def _run(self, number: int, digest: str | None) -> str:
        """The run with these settings from the cache of this number and digest; the next free name if there is none."""
        for again in itertools.count(1):
            name = f"{self.home}/runs/{number:04d}" + (f"-{again}" if again > 1 else "")
            folder = RunFolder(name)
            if not folder.exists():
                return name
            record = folder.read()
            # where it began from was decided when it began: the champion may be this very run by now
            asked = self._training(record.config.cache, name, record.config.init)
            same = record.student_config == self._student and not other_settings(asked, record.config)
            if same and record.cache_manifest_digest == digest:
                return name
        raise AssertionError  # count() does not end

    def _judged(self, run: str) -> Candidate | None:
        """The last verdict on a run. One that passed and was never promoted counts for none: it was killed there."""
        if not RunFolder(run).exists():
            return None
        digest = RunFolder(run).read().cache_manifest_digest
        promoted = {promotion.candidate for promotion in self.registry.promotions()}
        judged = [
            each
            for each in self.registry.candidates()
            if Path(each.run) == Path(run) and each.cache_manifest_digest == digest
        ]
        settled = [each for each in judged if not each.passed or each.number in promoted]
        return settled[-1] if settled else None

    def _is_by(self, manifest: CacheManifest) -> bool:
        teacher = manifest.identity.teacher
        wanted = (recorded_name(self.config.teacher), self.config.pretrained, self.config.precision)
        return (teacher.name, teacher.pretrained, teacher.precision) == wanted

    def _is_of(self, manifest: CacheManifest, dataset: DatasetIdentity) -> bool:
        stored = _as_stored(manifest)
        asked = all(getattr(self.config, name) in (None, value) for name, value in stored.items())
        drawn, wanted = _crops(manifest), self._encoding({}).model_dump(mode="json", include={*CROP_SETTINGS})
        alike = all(value in (None, drawn.get(name)) for name, value in wanted.items())
        return self._is_by(manifest) and asked and alike and manifest.identity.dataset == dataset

    def _stored(self, before: _Numbered | None) -> dict[str, Any]:
        """Views, dtype and decoder as asked for, as the cache before has them, or by default."""
        have = _as_stored(before.manifest) if before and before.manifest else _DEFAULTS
        return {name: getattr(self.config, name) or value for name, value in have.items()}

    def _unlike(self, other: _Numbered, wanted: dict[str, Any], source: _Numbered | None, begun: bool) -> str | None:
        """Why rows of a cache are no use to one that stores them as wanted; None where they are. Views copy one by one.

        Args:
            source: the cache that decided where the settings leave it open, which is one that is ``begun``, or the
                newest.
        """
        assert other.manifest is not None  # it is finished
        have = _as_stored(other.manifest)
        names = [name for name in ("dtype", "decoder") if have[name] != wanted[name]]
        if not names:
            return None
        found = []
        for name in names:
            by = "asked for"
            if getattr(self.config, name) is None and source is not None:
                by = f"in {source.location}, which {'was begun so' if begun else 'is the newest'}"
            found.append(f"{name}: {have[name]} in the cache, {wanted[name]} {by}")
        if source is other:
            way_out = f"Leave {' and '.join(names)} out"
        else:
            way_out = f"Ask for {' and '.join(f'{name} {have[name]}' for name in names)}"
        return f"{other.location}: no row of it can be copied. {'; '.join(found)}. {way_out} to go on with its."

    def _deploy(self, run: str, progress: Progress | None) -> str:
        from teacher_cache.pipeline.deploy.run import deploy

        wanted = weights_file_sha256(RunFolder(run).checkpoint_path(self._checkpoint(run)))
        for again in itertools.count(1):
            out = Path(self.home) / "deployed" / (Path(run).name + (f"-{again}" if again > 1 else ""))
            if not out.exists():
                deploy(self._deployment(run, str(out), self._checkpoint(run)), progress)
                return str(out)
            if (out / RECORD).exists() and Deployment.read(out).weights.sha256 == wanted:
                return str(out)  # shipped, and killed before it was promoted
        raise AssertionError  # count() does not end

    def _deployment(self, run: str, out: str, checkpoint: str) -> DeployConfig:
        config = self.config
        given = {"run": run, "out": out, "checkpoint": checkpoint, "split": config.split}
        teacher = {"teacher": config.teacher, "pretrained": config.pretrained}
        return check_config(DeployConfig, config.deploy | given | teacher, "deploy")

    def _checkpoint(self, run: str) -> Literal["last", "best"]:
        """The best one, unless it was chosen on the very split that challenger and champion are measured on."""
        return "last" if RunFolder(run).read().config.select_split in (None, self.config.split) else "best"


def retrain(config: RetrainConfig, progress: Progress | None = None) -> RetrainResult:
    """Bring cache, student and champion up to the dataset as it is now. Call it again after a crash.

    Args:
        progress: called with (stage, done, total).

    Raises:
        UsageError: a setting cannot be used, and nothing is written then; or another process retrains here.
        CacheError, OSError, FloatingPointError: as the steps raise them.
    """
    started = time.perf_counter()
    steps = Retraining(config)
    look = steps.look(progress)
    encoded = verdict = None
    if look.judged is None:
        with RunFolder(steps.home).locked():
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


def _numbered(caches: str) -> list[_Numbered]:
    """All caches below a folder or URL, by number."""
    found = []
    for name in open_files(caches).folders():
        if matched := _CACHE.match(name):
            location = f"{caches}/{name}"
            manifest, free, unread = None, False, None
            try:
                manifest = read_manifest(open_files(location))
            except CacheNotFoundError:
                free = True
            except (CacheCorruptError, CacheFormatError) as error:
                unread = str(error)  # of an earlier state: repair is for who needs it
            found.append(_Numbered(int(matched[1]), location, manifest, free, unread))
    return sorted(found, key=lambda each: each.number)


def _as_stored(manifest: CacheManifest) -> dict[str, Any]:
    """By the names that the settings have."""
    identity = manifest.identity
    decoder = identity.preprocess.decoder or PILLOW
    return {"views": manifest.layout.views, "dtype": identity.targets.dtype, "decoder": decoder}


def _crops(manifest: CacheManifest) -> dict[str, Any]:
    """How random crops are drawn, by the names that the settings of precompute have; empty where there are none."""
    drawn = manifest.identity.views.fields()
    return {setting: drawn[name] for setting, name in CROP_SETTINGS.items() if name in drawn}


def _unread(there: list[_Numbered], source: _Numbered | None) -> str | None:
    """A notice where the newest of the caches has no readable manifest."""
    newest = next((each for each in reversed(there) if not each.free), None)
    if newest is None or newest.unread is None:
        return None
    instead = "the defaults are taken" if source is None else f"those of {source.location} are taken"
    return f"{newest.unread} Until then, where dtype, decoder and views are left out, {instead}."


def _unshipped(judged: Candidate) -> str | None:
    """A verdict stands whatever the settings of shipping are since: what to do where they have changed."""
    deploy = f"teacher-cache deploy --run {judged.run} --out FOLDER"
    if judged.passed and judged.deployed is None:
        return f"student {judged.number} was promoted without being shipped. Ship it by {deploy}"
    if not judged.passed and judged.reason.startswith(NOT_SHIPPED):
        return (
            f"student {judged.number} was rejected, since it {judged.reason}. With other settings: {deploy}, and then "
            f"teacher-cache promote --run {judged.run} --deployed FOLDER"
        )
    return None


def _changes(before: _Numbered, tables: dict[str, pa.Table]) -> Changes:
    assert before.manifest is not None  # it is finished
    files = open_files(before.location)
    counts = {}
    for name, column in ((SAMPLES, "content_sha256"), (CAPTIONS, "text")):
        old = read_table(files, before.manifest, name, [column])[column]
        new = tables[name][column]
        counts[name] = _missing(new, old), _missing(old, new)
    return Changes(
        new_images=counts[SAMPLES][0],
        removed_images=counts[SAMPLES][1],
        new_captions=counts[CAPTIONS][0],
        removed_captions=counts[CAPTIONS][1],
    )


def _missing(values: pa.ChunkedArray, among: pa.ChunkedArray) -> int:
    """How many of ``values`` are not among others; an empty column may have no type."""
    there = pc.is_in(long_texts(values), value_set=long_texts(among).combine_chunks())
    return len(values) - int(pc.sum(there).as_py() or 0)


def _stage(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(name, done, total)
