"""Folder of a training run: its record, its step log and its checkpoints. No torch.

run.json                    replaced atomically; names the valid checkpoints
log.jsonl                   a line per step
tensorboard/, wandb/        the same and the timings, as the trackers of report_to keep them
checkpoints/epoch-0002/     the last one, at the end of an epoch; step-00000123 within an epoch
checkpoints/best-epoch-0001/    the best one on the select split, if any
checkpoints/mean/           the only one of a run that is the mean of others
evaluations/test-epoch-0002.json    what evaluate measured: the newest of each split and checkpoint
.lock                       held by the process that trains
.tracker-id                 name of the run in trackers
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote

from pydantic import ValidationError

from teacher_cache.pipeline.models.run_record import RunRecord
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.files.local import LocalFiles, make_folder, sync
from teacher_cache.storage.files.new_files import require_writable
from teacher_cache.storage.files.places import RUN, misplaced, similar_names

RESUME = "resume"
"""Folder in a checkpoint with the state that a run needs to resume."""

_RECORD, _LOG, _CHECKPOINTS, _LOCK = "run.json", "log.jsonl", "checkpoints", ".lock"
_EVALUATIONS, _TRACKER_ID = "evaluations", ".tracker-id"
_MADE_BY_TRAINING = (_CHECKPOINTS, "tensorboard", "wandb")

_Loaded = TypeVar("_Loaded")


class RunFolder:
    """Reader and writer of a run. The record is replaced atomically and names its checkpoints."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files = LocalFiles(str(path))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder's lock within the block, so that no other process trains here. A dead process releases it.

        Raises:
            UsageError: another process holds it, or the file system has no locks.
            CacheAccessError: this user may not write in the folder.
        """
        require_writable(self.path)
        make_folder(self.path.absolute())
        with (self.path / _LOCK).open("a+") as file:
            try:
                # a record lock: child processes do not inherit it, so a kill releases it
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                file.seek(0)
                writer = file.read() or "another process"
                raise UsageError(f"{self.path}: is being written by {writer}. Wait for it, or stop it.") from error
            except OSError as error:
                raise UsageError(
                    f"{self.path}: this file system has no locks ({error.strerror}), so that nobody could tell whether "
                    "another process trains here. Take a folder on another one, or mount it with locks."
                ) from error
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield

    def require_unlocked(self) -> None:
        """Check that no process trains here. Not within :meth:`locked`: closing the file again would release the lock.

        Raises:
            UsageError: a process does.
        """
        if (self.path / _LOCK).exists():
            with self.locked():
                pass

    def start(self, record: RunRecord) -> None:
        """Begin a run in a folder without a run, or with one that has no checkpoint.

        Raises:
            UsageError: the folder has a run with a checkpoint; nothing is overwritten.
        """
        self.require_free()
        for leftover in _MADE_BY_TRAINING:
            if (self.path / leftover).is_symlink():  # what lies behind it may be somebody else's
                (self.path / leftover).unlink()
            shutil.rmtree(self.path / leftover, ignore_errors=True)
        for leftover in (_LOG, _TRACKER_ID):
            (self.path / leftover).unlink(missing_ok=True)
        self.write(record)

    def tracker_id(self) -> str:
        """Return the run's random name in trackers, which a resumed run keeps. Any other text is replaced."""
        path = self.path / _TRACKER_ID
        # it becomes part of MLflow's query and of wandb's paths
        if not path.exists() or not re.fullmatch(rb"[0-9a-f]{16}", path.read_bytes()):
            self._files.write(_TRACKER_ID, secrets.token_hex(8).encode())
        return path.read_text()

    def require_free(self) -> None:
        """Check that a new run would overwrite nothing in the folder.

        Raises:
            UsageError: it has a run with a checkpoint, or other files than a run file.
        """
        if not self.exists():
            # other trainers use our names too: never remove theirs
            others = sorted(path.name for path in self.path.glob("[!.]*") if path.suffix != ".toml")
            if others:
                raise UsageError(
                    f"{self.path}: holds {', '.join(others[:3])}, but no {_RECORD}, so it is no run of ours. Choose "
                    "another --out; nothing was changed."
                )
            return
        record = self.read()
        if record.checkpoint is not None:
            way_out = "Choose" if record.finished else "Go on with it by --resume, or choose"
            raise UsageError(f"{self.path}: holds a run already. {way_out} another --out, or delete the folder.")

    def require_resumable(self, config: TrainConfig) -> RunRecord:
        """Return the record of a run that these settings, fitted to its cache, may resume or have finished.

        Raises:
            UsageError: no run here, or one with other settings, a mean of runs, one without a checkpoint to resume, or
                one whose checkpoints are behind a link.
        """
        record = self.read()
        if record.averaged:
            raise UsageError(
                f"{self.path}: is the mean of {len(record.averaged)} runs, and has no steps to go on with. To train "
                f"from it: --init {self.path / str(record.checkpoint)} and another --out."
            )
        differ = [
            f"{name} is {value!r}, the run has {recorded!r}"
            for name, (value, recorded) in record.other_settings(record.fitted(config)).items()
        ]
        if differ:
            start = f" from it: --init {self.path / str(record.checkpoint)} and" if record.finished else " with"
            raise UsageError(
                f"{self.path}: cannot go on with other settings: {'; '.join(differ)}. Leave them out, or train anew"
                f"{start} another --out."
            )
        for name in filter(None, (_CHECKPOINTS, record.checkpoint)):
            if (self.path / name).resolve() != self.path.resolve() / name:
                raise UsageError(
                    f"{self.path / name}: is a link, and a training removes old checkpoints there. Move the folder to "
                    "the place of the link, or link to the whole run."
                )
        if record.checkpoint is not None and not record.finished and not self._has_point(record):
            raise UsageError(
                f"{self.path}: its checkpoint {record.checkpoint} has no {RESUME} folder to go on from; an older "
                "version wrote none. Train anew with another --out."
            )
        return record

    def exists(self) -> bool:
        """Return whether a run was begun here."""
        return (self.path / _RECORD).exists()

    def resumable(self) -> bool:
        """Return whether the folder has an unfinished run that :meth:`require_resumable` would accept."""
        if not self.exists():
            return False
        record = self.read()
        return not record.finished and self._has_point(record)

    def _has_point(self, record: RunRecord) -> bool:
        return record.checkpoint is not None and (self.path / record.checkpoint / RESUME).is_dir()

    def write(self, record: RunRecord) -> None:
        """Replace the record."""
        self._files.write(_RECORD, (record.model_dump_json(indent=2) + "\n").encode())

    def read(self) -> RunRecord:
        """Read the record.

        Raises:
            UsageError: no run here, or it cannot be read.
        """
        try:
            return RunRecord.model_validate_json((self.path / _RECORD).read_bytes())
        except (FileNotFoundError, NotADirectoryError) as error:
            place = str(self.path)
            none = f"{place}: no run here ({_RECORD} not found).{similar_names(place, RUN)} Train one with --out."
            raise UsageError(misplaced(place, RUN) or none) from error
        except ValidationError as error:
            raise UsageError(f"{self.path / _RECORD}: {error}") from error

    def require_finished(self, record: RunRecord) -> None:
        """Check that all epochs of the run with this record are trained.

        Raises:
            UsageError: they are not.
        """
        if not record.finished:
            raise UsageError(
                f"{self.path}: {record.unfinished}. Finish it by teacher-cache train --resume --out {self.path}"
            )

    def log(self, line: dict[str, Any]) -> None:
        """Append one step to ``log.jsonl``."""
        with (self.path / _LOG).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def logged(self) -> list[dict[str, Any]]:
        """Return the steps in ``log.jsonl``, without incomplete lines."""
        try:
            lines = (self.path / _LOG).read_bytes().splitlines()
        except FileNotFoundError:
            return []
        steps = []
        for line in lines:
            with contextlib.suppress(ValueError):
                steps.append(json.loads(line))
        return steps

    def keep_evaluation(self, split: str, checkpoint: str, cache_manifest_digest: str, data: bytes) -> Path:
        """Save an evaluation in the run, replacing one of the same split, checkpoint and cache. Return its file.

        Raises:
            OSError: the folder cannot be written.
        """
        path = self.evaluation_path(split, checkpoint, cache_manifest_digest)
        self._files.write(f"{_EVALUATIONS}/{path.name}", data)
        return path

    def evaluation_path(self, split: str, checkpoint: str, cache_manifest_digest: str) -> Path:
        """Return the file that :meth:`keep_evaluation` writes: ``evaluations/SPLIT-CHECKPOINT.json``.

        The name of one on another cache than the run's has the start of that cache's digest, too.

        Args:
            checkpoint: its folder, relative to the run.
        """
        other = "" if cache_manifest_digest == self.read().cache_manifest_digest else f"-{cache_manifest_digest[:12]}"
        # a split may have any name
        return self.path / _EVALUATIONS / f"{quote(split, safe='')}-{Path(checkpoint).name}{other}.json"

    def evaluation_files(self) -> list[Path]:
        """List the files of :meth:`keep_evaluation`, by name."""
        return sorted((self.path / _EVALUATIONS).glob("*.json"))

    def sync_log(self) -> None:
        """Sync all logged steps to disk."""
        if (self.path / _LOG).exists():
            sync(self.path / _LOG)

    def cut_log(self, steps: int) -> None:
        """Cut the log after ``steps`` steps: a resumed run logs the later ones again."""
        if not (self.path / _LOG).exists():
            return
        lines = (self.path / _LOG).read_bytes().splitlines(keepends=True)
        self._files.write(_LOG, b"".join(lines[:steps]))

    @contextlib.contextmanager
    def new_checkpoint(self, name: str) -> Iterator[Path]:
        """Yield an empty folder of the run for a checkpoint, which no record names yet; sync it after the block."""
        folder = self.path / name
        shutil.rmtree(folder, ignore_errors=True)
        make_folder(folder.parent.absolute())
        folder.mkdir()
        yield folder
        # its name too, or the record could outlive the checkpoint that it names
        for path in [*folder.rglob("*"), folder, folder.parent]:
            sync(path)

    def switch(self, record: RunRecord) -> None:
        """Replace the record by one that names new checkpoints, then remove those that it does not name.

        After a crash the record names only complete checkpoints; the next call removes others.
        """
        self.write(record)
        self.remove_unnamed(record)

    def remove_unnamed(self, record: RunRecord) -> None:
        """Remove the checkpoints that the record does not name: replaced ones, and incomplete ones after a crash.

        For a finished run, also remove the optimizer's state.
        """
        named = {record.checkpoint, record.best.checkpoint if record.best else None}
        for folder in (self.path / _CHECKPOINTS).glob("*"):
            if f"{_CHECKPOINTS}/{folder.name}" not in named:
                shutil.rmtree(folder, ignore_errors=True)
        if record.finished and record.checkpoint:
            shutil.rmtree(self.path / record.checkpoint / RESUME, ignore_errors=True)

    def load_checkpoint(
        self, which: Literal["last", "best"], load: Callable[[Path], _Loaded]
    ) -> tuple[RunRecord, Path, _Loaded]:
        """Load a checkpoint, also while a training replaces it: then the next one is loaded.

        A training removes a checkpoint only after the record names another one. So whatever was loaded is whole if the
        record names the same checkpoint afterwards.

        Args:
            load: function that reads the folder of a checkpoint.

        Returns:
            The record that names the checkpoint, its folder, and the result of ``load``.

        Raises:
            UsageError: the run has no such checkpoint yet.
            Exception: as ``load`` raises it for a checkpoint that was not replaced.
        """
        while True:
            record = self.read()
            path = self.checkpoint_path(which, record)
            try:
                loaded = load(path)
            except Exception:  # of a checkpoint that is half removed, a loader may say anything
                if self.checkpoint_path(which) == path:
                    raise
            else:
                if self.checkpoint_path(which) == path:
                    return record, path, loaded

    def checkpoint_path(self, which: Literal["last", "best"] = "last", record: RunRecord | None = None) -> Path:
        """Return the folder of the newest or the best checkpoint.

        Args:
            record: record of the run, if the caller has read it.

        Raises:
            UsageError: the run has no such checkpoint yet.
        """
        record = record or self.read()
        if which == "best":
            if record.averaged or record.resized:
                what = "a mean of runs" if record.averaged else "a run at another image size"
                raise UsageError(f"{self.path}: is {what} and has one checkpoint; take --checkpoint last")
            if record.best is None:
                raise UsageError(
                    f"{self.path}: no best checkpoint; train with --select-split to have one, or use --checkpoint last"
                )
            return self.path / record.best.checkpoint
        if record.checkpoint is None:
            raise UsageError(f"{self.path}: no checkpoint yet; one is written at the end of each epoch")
        return self.path / record.checkpoint
