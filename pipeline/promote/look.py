"""The look at dataset and home that decides the work of a retraining. Writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, Field

from teacher_cache.pipeline.data.datasets.samples import DatasetSpec, load_samples
from teacher_cache.pipeline.data.images.scaled_jpeg import PILLOW
from teacher_cache.pipeline.models.run_folder import RunFolder
from teacher_cache.pipeline.models.run_record import other_settings
from teacher_cache.pipeline.models.teacher import recorded_name
from teacher_cache.pipeline.precompute.plan import CROP_SETTINGS, dataset_identity, dataset_tables
from teacher_cache.pipeline.promote.gate import NOT_SHIPPED, checkpoint_of
from teacher_cache.pipeline.promote.home import Home, NumberedCache
from teacher_cache.pipeline.promote.registry import Candidate
from teacher_cache.pipeline.promote.stage_settings import StageSettings
from teacher_cache.pipeline.settings.base import Decoder, StoredDtype
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.format.identity import DatasetIdentity
from teacher_cache.storage.format.manifest import CacheManifest
from teacher_cache.storage.format.tables import CAPTIONS, SAMPLES, long_texts, read_table

__all__ = ["Changes", "Look", "look_at"]

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
    not_reused: str | None = Field(description="Reason why no rows of the teacher's newest finished cache are copied.")
    unread: str | None = Field(
        None, description="Reason why the newest cache cannot be read, with the source of the defaults instead."
    )
    run: str = Field(description="Folder of the training run.")
    judged: Candidate | None = Field(
        description="Verdict on the student of this cache and these settings. With one, there is nothing to do."
    )
    unshipped: str | None = Field(
        None, description="Reason why the judged student is not shipped, if shipping is on, with the remedy."
    )

    def storage_settings(self) -> dict[str, Any]:
        """Return the precompute settings of the cache's location and storage."""
        return {name: getattr(self, name) for name in (*_DEFAULTS, "cache", "reuse")}


def look_at(
    settings: StageSettings, home: Home, student: dict[str, Any], progress: Callable[[int, int], None] | None = None
) -> Look:
    """Read the dataset and the home. Loads no teacher, writes nothing.

    Args:
        student: config of the student to train.
        progress: called with (done, total) while the dataset is read.

    Raises:
        UsageError: the dataset cannot be used, has no such split, or has lost more images than ``max_removed``
            allows; or the champion's weights are gone.
        CacheUnreachableError, CacheAccessError: the store of the caches does not answer or refuses.
    """
    spec = DatasetSpec.parse(settings.config.dataset)
    dataset, digests = load_samples(spec, progress)
    tables = dataset_tables(dataset, digests)
    identity = dataset_identity(spec, tables)
    _require_splits(settings, identity)
    state = _State(settings, home.numbered_caches(), identity)
    changes = _changes(state.sealed[-1], tables) if state.sealed else None
    if changes is not None and state.present is None:
        _require_most(settings, state.sealed[-1], changes)
    number = state.present.number if state.present else home.next_number(state.caches)
    manifest = state.present.manifest if state.present and state.present.sealed else None
    run = _run(settings, home, student, number, manifest)
    judged = home.verdict(run)
    champion = home.registry.champion()
    if judged is None and champion is not None:
        checkpoint_of(champion)  # checked before hours of work: it is measured after them
    reuse, not_reused = state.reusable(number)
    return Look(
        images=identity.images,
        captions=identity.captions,
        changes=changes,
        cache=home.cache(number),
        cache_finished=manifest is not None,
        **state.stored,
        crops=state.crops,
        reuse=reuse,
        not_reused=None if manifest else not_reused,
        unread=state.unread(),
        run=run,
        judged=judged,
        unshipped=_unshipped(judged) if judged is not None and settings.config.ship else None,
    )


@dataclass(frozen=True)
class _State:
    """The caches of a home, to match with a dataset.

    Attributes:
        caches: all caches, ordered by number.
        identity: identity of the present dataset.
    """

    settings: StageSettings
    caches: list[NumberedCache]
    identity: DatasetIdentity

    @cached_property
    def sealed(self) -> list[NumberedCache]:
        """The finished caches."""
        return [cache for cache in self.caches if cache.sealed]

    @cached_property
    def present(self) -> NumberedCache | None:
        """The newest cache of this dataset and these settings, finished or not."""
        matching = [cache for cache in self.caches if cache.manifest is not None and self._matches(cache.manifest)]
        return matching[-1] if matching else None

    @cached_property
    def source(self) -> NumberedCache | None:
        """The cache that decides unset settings: the present one, else the newest of any teacher."""
        return self.present or (self.sealed[-1] if self.sealed else None)

    @cached_property
    def stored(self) -> dict[str, Any]:
        """Views, dtype and decoder: from the settings, else from the source, else the defaults."""
        previous = _as_stored(self.source.manifest) if self.source and self.source.manifest else _DEFAULTS
        return {name: getattr(self.settings.config, name) or value for name, value in previous.items()}

    @property
    def crops(self) -> dict[str, Any]:
        """Settings of the source's random crops, by the names of precompute. Empty for one view."""
        manifest = self.source.manifest if self.source else None
        return _crops(manifest) if manifest and self.stored["views"] > 1 else {}

    def reusable(self, number: int) -> tuple[str | None, str | None]:
        """Return the cache to copy rows from, or the reason why none of the teacher's other caches can be used.

        Args:
            number: number of the cache to copy rows to.
        """
        others = [cache for cache in self.sealed if cache.number != number and self._is_by_teacher(cache)]
        reasons = [(cache, self._unlike(cache)) for cache in others]
        alike = [cache.location for cache, reason in reasons if reason is None]
        if alike or not reasons:
            return (alike[-1] if alike else None), None
        return None, reasons[-1][1]

    def unread(self) -> str | None:
        """Return a notice if the newest cache has no readable manifest."""
        newest = next((cache for cache in reversed(self.caches) if not cache.free), None)
        if newest is None or newest.unread is None:
            return None
        instead = "the defaults are taken" if self.source is None else f"those of {self.source.location} are taken"
        return f"{newest.unread} Until then, where dtype, decoder and views are left out, {instead}."

    def _matches(self, manifest: CacheManifest) -> bool:
        if not self._is_by(manifest) or manifest.identity.dataset != self.identity:
            return False
        config, drawn = self.settings.config, _crops(manifest)
        if any(getattr(config, name) not in (None, value) for name, value in _as_stored(manifest).items()):
            return False
        crops = self.settings.encoding({}).model_dump(mode="json", include={*CROP_SETTINGS})
        return all(value in (None, drawn.get(name)) for name, value in crops.items())

    def _is_by(self, manifest: CacheManifest) -> bool:
        config, teacher = self.settings.config, manifest.identity.teacher
        configured = (recorded_name(config.teacher), config.pretrained, config.precision)
        return (teacher.name, teacher.pretrained, teacher.precision) == configured

    def _is_by_teacher(self, cache: NumberedCache) -> bool:
        return cache.manifest is not None and self._is_by(cache.manifest)

    def _unlike(self, other: NumberedCache) -> str | None:
        """Return why no row of another cache can be copied, or None. The number of views may differ."""
        assert other.manifest is not None  # it is finished
        stored = _as_stored(other.manifest)
        names = [name for name in ("dtype", "decoder") if stored[name] != self.stored[name]]
        if not names:
            return None
        differences = "; ".join(
            f"{name}: {stored[name]} in the cache, {self.stored[name]} {self._decided_by(name)}" for name in names
        )
        if self.source is other:
            remedy = f"Leave {' and '.join(names)} out"
        else:
            remedy = f"Ask for {' and '.join(f'{name} {stored[name]}' for name in names)}"
        return f"{other.location}: no row of it can be copied. {differences}. {remedy} to go on with its."

    def _decided_by(self, name: str) -> str:
        if getattr(self.settings.config, name) is not None or self.source is None:
            return "asked for"
        return f"in {self.source.location}, which {'was begun so' if self.present else 'is the newest'}"


def _require_splits(settings: StageSettings, dataset: DatasetIdentity) -> None:
    training = settings.training("cache", "out", None)
    for setting, split in (
        ("split", settings.config.split),
        ("train.split", training.split),
        ("train.select_split", training.select_split),
    ):
        if split is not None and split not in dataset.splits:
            known = ", ".join(dataset.splits) or "none"
            raise UsageError(f"{settings.config.dataset}: no split {split!r} ({setting}); there are {known}")


def _require_most(settings: StageSettings, before: NumberedCache, changes: Changes) -> None:
    images = before.manifest.layout.image_rows if before.manifest else 0
    if 100 * changes.removed_images > settings.config.max_removed * images:
        raise UsageError(
            f"{settings.config.dataset}: {changes.removed_images:,} of {images:,} images of {before.location} are "
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
        settings_now = settings.training(record.config.cache, name, record.config.init)
        same = record.student_config == student and not other_settings(settings_now, record.config)
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
    deploy = f"teacher-cache deploy --run {judged.run} --out FOLDER"
    if judged.passed and judged.deployed is None:
        return f"student {judged.number} was promoted without being shipped. Ship it by {deploy}"
    if not judged.passed and judged.reason.startswith(NOT_SHIPPED):
        return (
            f"student {judged.number} was rejected, since it {judged.reason}. With other settings: {deploy}, and then "
            f"teacher-cache promote --run {judged.run} --deployed FOLDER"
        )
    return None


def _changes(before: NumberedCache, tables: dict[str, pa.Table]) -> Changes:
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
    """Count the values that are not in ``among``."""
    present = pc.is_in(long_texts(values), value_set=long_texts(among).combine_chunks())
    return len(values) - int(pc.sum(present).as_py() or 0)
