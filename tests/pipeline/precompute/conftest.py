"""Small runs of precompute: their settings, what the teacher is given in them, and commands as processes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from teacher_cache.pipeline.models.teacher import LiveTeacher
from teacher_cache.pipeline.precompute.sample_proof import ProofResult, prove_sample
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig, ProofConfig
from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.format.commits import QuarantinedRow, all_chunks
from teacher_cache.storage.format.journal import JOURNAL
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.write.writer import EmbeddingWriter


def settings(photos: Path, teacher: Path | str, cache: Path | str, /, **changes: Any) -> dict[str, Any]:
    """Settings of a run over ``write_photos`` on the CPU, in batches of 4 rows and chunks of 8."""
    return {
        "dataset": f"flickr:{photos}",
        "teacher": f"local-dir:{str(teacher).removeprefix('local-dir:')}",
        "cache": str(cache),
        "device": "cpu",
        "batch_size": 4,
        "chunk_rows": 8,
        **changes,
    }


def make_config(photos: Path, teacher: Path | str, cache: Path | str, /, **changes: Any) -> PrecomputeConfig:
    return PrecomputeConfig(**settings(photos, teacher, cache, **changes))


def as_command(verb: str, settings: dict[str, Any]) -> list[str]:
    """The command of a stage with these settings, for a process."""
    command = [sys.executable, "-m", "teacher_cache.pipeline.cli.app", verb]
    return [*command, *(f"--set={name}={value}" for name, value in settings.items())]


def run_without_torch(*arguments: str) -> str:
    """Run ``teacher-cache`` in a process that must not load torch; what it says."""
    code = (
        f"import sys; sys.argv = {['teacher-cache', *arguments]!r}; import teacher_cache.pipeline.cli.app as c\n"
        "try: c.main()\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "bad = {'torch', 'open_clip', 'zarr', 'faiss', 'prefect'} & set(sys.modules); assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def contents(cache: Path) -> dict[str, bytes]:
    """All that is in a cache but its journal."""
    found = {path.relative_to(cache).as_posix(): path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    return {key: data for key, data in found.items() if not key.startswith(f"{JOURNAL}/")}


def prove(cache: Path | str, teacher: str | None, **changes: Any) -> ProofResult:
    """Compare 100 rows of each tower with the live teacher's, if there are so many."""
    asked = {"cache": str(cache), "sample": 100, "teacher": teacher, "device": "cpu", **changes}
    return prove_sample(ProofConfig(**asked))


Rows = dict[tuple[str, int], dict[str, np.ndarray[Any, Any]]]
"""Arrays by tower and view, then by name."""


def rows_of(cache: Path) -> Rows:
    """All rows of a cache; NaN where a row was quarantined."""
    reader = EmbeddingReader(str(cache))
    found: Rows = {}
    for ref in all_chunks(reader.manifest.layout):
        held = found.setdefault((ref.tower, ref.view), {})
        for name in ref.object_keys():
            part = reader.chunks.chunk(ref, name)[: len(ref.rows(reader.manifest.layout))]
            held[name] = np.concatenate([held[name], part]) if name in held else part.copy()
    return found


def forge(cache: Path, to: Path, change: Callable[[Rows], Any], quarantined: Sequence[QuarantinedRow] = ()) -> Path:
    """A cache of the same manifest with other rows: written, committed and sealed as it should be."""
    rows = rows_of(cache)
    change(rows)
    writer = EmbeddingWriter(str(shutil.copytree(cache, to)))
    writer.replaces.update(all_chunks(writer.manifest.layout))
    lost = quarantined or EmbeddingReader(str(cache)).quarantined
    for ref in all_chunks(writer.manifest.layout):
        at = ref.rows(writer.manifest.layout)
        here = [row for row in lost if ref.tower == "image" and row.row in at]
        arrays = {name: values[at.start : at.stop] for name, values in rows[ref.tower, ref.view].items()}
        writer.write(ref, arrays, here)
    writer.seal()
    assert verify_cache(str(to)).ok  # every digest agrees
    return to


@pytest.fixture
def taught(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Rows that any teacher is given, by tower."""
    rows: Counter[str] = Counter()
    for tower, name in (("image", "encode_images"), ("text", "encode_texts")):
        encode = getattr(LiveTeacher, name)

        def counted(self: LiveTeacher, batch: Any, tower: str = tower, encode: Any = encode) -> Any:
            rows[tower] += len(batch)
            return encode(self, batch)

        monkeypatch.setattr(LiveTeacher, name, counted)
    return rows
