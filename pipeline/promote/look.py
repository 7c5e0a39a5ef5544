"""The look at dataset and home that decides the work of a retraining. Writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
from pydantic import BaseModel, Field

from teacher_cache.pipeline.data.datasets.samples import load_samples
from teacher_cache.pipeline.data.datasets.spec import check_dataset
from teacher_cache.pipeline.data.images.decoders import PILLOW
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.teacher import recorded_name
from teacher_cache.pipeline.precompute.plan import CROP_SETTINGS, ReadDataset, dataset_identity, dataset_tables
from teacher_cache.pipeline.promote.gate import NOT_SHIPPED, checkpoint_of, missing
from teacher_cache.pipeline.promote.home import Home, NumberedCache
from teacher_cache.pipeline.promote.registry import Candidate
from teacher_cache.pipeline.promote.stage_settings import StageSettings
from teacher_cache.pipeline.settings.base import Decoder, StoredDtype, learned_split
from teacher_cache.pipeline.settings.promote import RetrainConfig
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.format.identity import DatasetIdentity
from teacher_cache.storage.format.manifest import CacheManifest, holdout_advice
from teacher_cache.storage.format.tables import CAPTIONS, SAMPLES, read_table
from teacher_cache.storage.observe.logs import command_line

_DEFAULTS = {"views": 1, "dtype": "float16", "decoder": PILLOW}


class Changes(BaseModel, frozen=True):
    """Differences between the dataset and the newest finished cache."""

    new_images: int = Field(description="Number of images whose bytes are not in the cache.")
    removed_images: int = Field(description="Number of the cache's images that were removed or changed.")
    new_captions: int = Field(description="Number of texts that are not in the cache.")
    removed_captions: int = Field(description="Number of the cache's texts that were removed or changed.")


class Look(BaseModel, frozen=True):
    """The state of dataset and home, and the work of a retraining."""

    images: int
    captions: int
    changes: Changes | None = Field(
        description="Changes since the newest finished cache. None if no cache is finished."
    )
    cache: str = Field(description="Location of the cache of the present dataset.")
    cache_finished: bool
    dtype: StoredDtype = Field(description="Storage type of that cache.")
    decoder: Decoder = Field(description="Image decoder of that cache.")
    views: int = Field(description="Number of crops per image in that cache.")
    crops: dict[str, Any] = Field(description="Settings of random crops, by the names of precompute.")
    reuse: str | None = Field(description="Cache that rows are copied from: the newest with this dtype and decoder.")
    notices: tuple[str, ...] = Field(
        description="Notices for the user: a newest cache that cannot be read, rows that cannot be copied, a judged "
        "student that is not shipped; each with its remedy."
    )
    run: str = Field(description="Folder of the training run.")
    judged: Candidate | None = Field(
        description="Verdict on the student of this cache and these settings. With one, there is nothing to do."
    )

    def storage_settings(self) -> dict[str, Any]:
        """Return the precompute settings of the cache's location and storage."""
        return {name: getattr(self, name) for name in (*_DEFAULTS, "cache", "reuse")}


def look_at(
    settings: StageSettings, home: Home, student: dict[str, Any], progress: Callable[[int, int], None] | None = None
) -> tuple[Look, ReadDataset]:
    """Read the dataset and the home, and return the dataset as it was read too. Loads no teacher, writes nothing.

    Args:
        student: config of the student to train.
        progress: called with (done, total) while the dataset is read.

    Raises:
        UsageError: the dataset cannot be used, has no such split, or has lost more images than ``max_removed``
            allows; or the champion's weights are gone.
        CacheUnreachableError, CacheAccessError: the store of the caches does not answer or refuses.
    """
    config = settings.config
    spec = check_dataset(config.dataset)
    read = load_samples(spec, progress)
    tables = dataset_tables(*read)
    identity = dataset_identity(spec, tables)
    _require_splits(settings, identity)
    caches = home.read_caches()
    by_teacher = [cache for cache in caches.readable if _is_by(config, cache.manifest)]
    # of this dataset and these settings, finished or not
    present = _newest([cache for cache in by_teacher if _matches(settings, identity, cache.manifest)])
    newest = _newest(caches.sealed)
    changes = _changes(newest, tables) if newest else None
    if newest and changes and present is None:
        _require_most(config, newest, changes)
    number = present.number if present else home.next_number(caches)
    manifest = present.manifest if present and present.manifest.sealed else None
    source = present or newest  # it may be another teacher's
    stored = _storage_settings(config, source)
    reuse, not_reused = _reusable([cache for cache in by_teacher if cache.manifest.sealed], number, stored)
    run = _run(settings, home, student, number, manifest)
    judged = home.verdict(run)
    _require_champion(home, judged)
    notices = (
        _unread(caches.unread, source) if caches.unread else None,
        None if manifest else not_reused,
        _unshipped(judged) if judged is not None and config.ship else None,
    )
    look = Look(
        images=identity.images,
        captions=identity.captions,
        changes=changes,
        cache=home.cache(number),
        cache_finished=manifest is not None,
        **stored,
        crops=_crops(source.manifest) if source and stored["views"] > 1 else {},
        reuse=reuse,
        notices=tuple(notice for notice in notices if notice is not None),
        run=run,
        judged=judged,
    )
    return look, read


def _storage_settings(config: RetrainConfig, source: NumberedCache | None) -> dict[str, Any]:
    """Return the storage settings of the next cache: as configured, else the source's, else the defaults."""
    values = _as_stored(source.manifest) if source else _DEFAULTS
    return {name: getattr(config, name) or value for name, value in values.items()}


def _require_champion(home: Home, judged: Candidate | None) -> None:
    """Check before hours of work that the champion, to be measured after them, has its weights."""
    champion = home.registry.champion()
    if judged is None and champion is not None:
        checkpoint_of(champion)


def _newest(caches: list[NumberedCache]) -> NumberedCache | None:
    return caches[-1] if caches else None


def _is_by(config: RetrainConfig, manifest: CacheManifest) -> bool:
    teacher = manifest.identity.teacher
    configured = (recorded_name(config.teacher), config.pretrained, config.precision)
    return (teacher.name, teacher.pretrained, teacher.precision) == configured


def _matches(settings: StageSettings, dataset: DatasetIdentity, manifest: CacheManifest) -> bool:
    """Return whether a cache is of this dataset and has all settings that are set."""
    crops = settings.encoding({}).model_dump(mode="json", include={*CROP_SETTINGS})
    drawn = _crops(manifest)
    return (
        manifest.identity.dataset == dataset
        and all(getattr(settings.config, name) in (None, value) for name, value in _as_stored(manifest).items())
        and all(value in (None, drawn.get(name)) for name, value in crops.items())
    )


def _reusable(caches: list[NumberedCache], number: int, stored: dict[str, Any]) -> tuple[str | None, str | None]:
    """Return the cache to copy rows from, or the reason why no row of the newest can be copied.

    Args:
        caches: the teacher's finished caches.
        number: number of the cache to copy rows to.
        stored: its storage settings. The number of views may differ.
    """
    reuse = reason = None
    for cache in caches:
        if cache.number == number:
            continue
        had = _as_stored(cache.manifest)
        names = [name for name in ("dtype", "decoder") if had[name] != stored[name]]
        if not names:
            reuse = cache.location
            continue
        differences = " and ".join(f"{name} {had[name]}, not {stored[name]}" for name in names)
        remedy = " and ".join(f"{name} to {had[name]}" for name in names)
        reason = f"{cache.location}: no row of it can be copied: it has {differences}. To copy its rows, set {remedy}."
    return reuse, None if reuse else reason


def _unread(reason: str, source: NumberedCache | None) -> str:
    instead = "the defaults are taken" if source is None else f"those of {source.location} are taken"
    return f"{reason} Until then, where dtype, decoder and views are left out, {instead}."


def _require_splits(settings: StageSettings, dataset: DatasetIdentity) -> None:
    if not dataset.captions:
        raise UsageError(
            f"{settings.config.dataset}: no captions, and students are compared by their recall of captions"
        )
    training = settings.training("cache", "out", None)
    for setting, split in (
        ("split", settings.config.split),
        ("train.split", learned_split(training, dataset.splits)),
        ("train.select_split", training.select_split),
    ):
        if split is not None and split not in dataset.splits:
            known = (", ".join(map(repr, filter(None, dataset.splits))) or "none") + holdout_advice(dataset.splits)
            raise UsageError(f"{settings.config.dataset}: no split {split!r} ({setting}); there are {known}")


def _require_most(config: RetrainConfig, before: NumberedCache, changes: Changes) -> None:
    images = before.manifest.layout.image_rows
    if 100 * changes.removed_images > config.max_removed * images:
        raise UsageError(
            f"{config.dataset}: {changes.removed_images:,} of {images:,} images of {before.location} are "
            "gone. Is a share not mounted? If they are meant to be gone, allow more by max_removed"
        )


def _run(
    settings: StageSettings, home: Home, student: dict[str, Any], number: int, manifest: CacheManifest | None
) -> str:
    """Return the run with these settings from a cache, or the next free name."""
    digest = manifest.digest if manifest else None
    for name in home.run_names(number):
        folder = RunFolder(name)
        if not folder.exists():
            return name
        record = folder.read()
        # init as recorded: by now the champion may be this run
        settings_now = record.fitted(settings.training(record.config.cache, name, record.config.init))
        same = record.student_config == student and not record.other_settings(settings_now)
        if same and record.cache_manifest_digest == digest:
            return name
    raise AssertionError  # the names do not end


def _as_stored(manifest: CacheManifest) -> dict[str, Any]:
    """Return the storage settings of a cache, by their names in precompute."""
    identity = manifest.identity
    decoder = identity.preprocess.decoder or PILLOW
    return {"views": manifest.layout.views, "dtype": identity.targets.dtype, "decoder": decoder}


def _crops(manifest: CacheManifest) -> dict[str, Any]:
    """Return the settings of a cache's random crops, by the names of precompute; empty without them."""
    drawn = manifest.identity.views.fields()
    return {setting: drawn[name] for setting, name in CROP_SETTINGS.items() if name in drawn}


def _unshipped(judged: Candidate) -> str | None:
    """Return how to ship a judged student: its verdict stands, even if the shipping settings have changed."""
    deploy = command_line("deploy", run=judged.run, out="FOLDER")
    if judged.passed and judged.deployed is None:
        return f"student {judged.number} was promoted without being shipped. Ship it by {deploy}"
    if not judged.passed and judged.reason.startswith(NOT_SHIPPED):
        return (
            f"student {judged.number} was rejected, since it {judged.reason}. With other settings: {deploy}, and then "
            f"{command_line('students', 'promote', run=judged.run, deployed='FOLDER')}"
        )
    return None


def _changes(before: NumberedCache, tables: dict[str, pa.Table]) -> Changes:
    files = open_files(before.location)
    counts = {}
    for name, column in ((SAMPLES, "content_sha256"), (CAPTIONS, "text")):
        old = read_table(files, before.manifest, name, [column])[column]
        new = tables[name][column]
        counts[name] = missing(new, old), missing(old, new)
    return Changes(
        new_images=counts[SAMPLES][0],
        removed_images=counts[SAMPLES][1],
        new_captions=counts[CAPTIONS][0],
        removed_captions=counts[CAPTIONS][1],
    )
