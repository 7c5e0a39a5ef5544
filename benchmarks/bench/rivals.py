"""Shuffled targets from our cache against the stores and loaders that people use for it, each in a process of its own.

A million rows of 512 float16, batches of 1,024 in windows of 16 chunks or the peer's own shuffle, the files in the page
cache, one process each without workers: what a worker reads, more workers read more of. Peers that read samples one by
one get 65,536 rows. Before it is timed, each proves that it delivers all rows, by a weighed sum of them; zarr-python's
selection, which would take minutes for that, proves it with ``--quick`` only.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.bench.big_cache import big_cache
from benchmarks.bench.harness import Row, Settings, interleave, speed
from benchmarks.bench.peers import python_of
from benchmarks.bench.rival_loaders import CHUNK, FEW, WIDTH, source, weighed
from teacher_cache.storage.format.commits import all_chunks
from teacher_cache.storage.read.reader import EmbeddingReader

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 8.0  # of a turn, at most
# name: what the table says, whose environment, of the rows that everyone has or of few, what a reader has to know
RIVALS: dict[str, tuple[str, str | None, bool, str]] = {
    "npy_memmap": ("np.memmap of one npy file, unchecked", None, False, "No checksum, nothing to tell what it is of."),
    "embedding_reader": (
        "npy + parquet by embedding-reader, windows shuffled by hand",
        "clipret",
        False,
        "It has no shuffle and reads in order: windows of neighbouring rows, less mixed than ours.",
    ),
    "zarr_rows": ("zarr-python, rows of each batch", None, False, "Our own arrays; each batch decodes its window."),
    "tensorstore": (
        "tensorstore, chunks ahead, windows shuffled by hand",
        None,
        False,
        "Our own arrays; whole chunks, the next window read ahead, checksums proven at every read.",
    ),
    "lance_scan": ("Lance, fragments scanned, windows shuffled by hand", None, False, ""),
    "lance_take": ("Lance, take of each batch", None, False, ""),
    "mosaic": ("MosaicML Streaming, its own shuffle", "mosaic", True, "An environment of its own, numpy 2.1."),
    "webdataset": ("WebDataset, its own shuffle", None, True, "A buffer of 5,000 samples."),
    "hf_datasets": ("Hugging Face datasets, its own shuffle", None, True, "A buffer of 5,000 samples."),
}


PROVING = ("zarr_rows", "tensorstore")  # they too prove a chunk whenever they read it


class _Loader:
    """A process that streams an epoch, or some seconds of it, when told so."""

    def __init__(self, name: str, folder: Path, seconds: float, python: Path | str = sys.executable) -> None:
        # one thread of BLAS: nothing here multiplies; the peers' own threads are theirs to choose
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.name = name
        self.process = subprocess.Popen(
            [str(python), "-W", "ignore", "-m", "benchmarks.bench.rival_loaders", name, str(folder), str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        self.seconds_per_row: list[float] = []

    def wait(self) -> None:
        """Until its files are written and its modules imported."""
        if (said := self._line()) != "ready":
            raise ChildProcessError(f"{self.name}: its process said {said!r} instead of ready")

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise ChildProcessError(f"{self.name}: its process ended with {self.process.wait()}; its words are above")
        return line.strip()

    def ask(self, what: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        said: dict[str, Any] = json.loads(self._line())
        return said

    def turn(self) -> None:
        said = self.ask("go")
        self.seconds_per_row.append(said["seconds"] / said["rows"])

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def write_source(folder: Path, rows: int) -> None:
    """The cache, and its rows as one npy file with a table beside it: what all other formats are made of."""
    reader = EmbeddingReader(big_cache(folder, rows, WIDTH, CHUNK, captions=CHUNK), memory_bytes=1)
    for name in ("img_emb", "metadata"):
        (folder / "npy" / name).mkdir(parents=True, exist_ok=True)
    at = folder / "npy" / "img_emb" / "img_emb_0.npy"
    out = np.lib.format.open_memmap(at, "w+", np.float16, (rows, WIDTH))
    for ref in all_chunks(reader.manifest.layout):
        if ref.tower == "image":
            span = ref.rows(reader.manifest.layout)
            out[span.start : span.stop] = reader.chunk(ref).reshape(len(span), WIDTH)
    out.flush()
    names = pa.table({"image_path": [f"{row}.jpg" for row in range(rows)]})
    pq.write_table(names, folder / "npy" / "metadata" / "metadata_0.parquet")


def _prove(loader: _Loader, folder: Path, few: bool) -> None:
    """Refuse a loader that does not deliver every row once; each row's values add up to their own sum."""
    rows = source(folder)[:FEW] if few else source(folder)
    wanted = sum(weighed(rows[at : at + CHUNK]) for at in range(0, len(rows), CHUNK))
    said = loader.ask("prove")
    if said["rows"] != len(rows) or not math.isclose(said["total"], wanted, rel_tol=1e-9, abs_tol=1e-3):
        raise ValueError(f"{loader.name}: {said['rows']} rows that add up to {said['total']}, {wanted} wanted")


def measure(settings: Settings) -> list[Row]:
    rows = FEW // 4 if settings.quick else 1 << 20
    write_source(settings.scratch, rows)
    limit = 0.2 if settings.quick else SECONDS
    loaders: dict[str, _Loader] = {}
    try:
        for name in ("ours", "ours_proving"):
            loaders[name] = _Loader(name, settings.scratch, math.inf)
        for name, (_, peer, _, _) in RIVALS.items():
            python = python_of(peer) if peer else Path(sys.executable)
            loaders[name] = _Loader(name, settings.scratch, limit, python)
        for name, loader in loaders.items():
            loader.wait()
            if name != "zarr_rows" or settings.quick:  # minutes for a million rows
                _prove(loader, settings.scratch, name in RIVALS and RIVALS[name][2])
        interleave({name: loader.turn for name, loader in loaders.items()}, settings.rounds)
    finally:
        for loader in loaders.values():
            loader.close()
    # the first turn of each warmed up
    seconds_of = {name: [rows * each for each in loader.seconds_per_row[1:]] for name, loader in loaders.items()}
    made = []
    for name, (what, _, _, note) in RIVALS.items():
        for own, title in (("ours", "shuffled targets"), ("ours_proving", "shuffled targets, proven in every epoch")):
            if own == "ours" or name in PROVING:
                made.append(speed(title, what, seconds_of[own], seconds_of[name], rows, "rows/s", 1.0, note))
    return made
