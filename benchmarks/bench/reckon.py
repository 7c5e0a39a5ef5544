"""What a cache of N pairs takes, reckoned from costs that were measured once: nothing is measured here.

    PYTHONPATH=. python benchmarks/scale.py reckon

Costs: benchmarks/scale.md and benchmarks/compression.md, with hardware and date.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

DIM, CHUNK, PART = 512, 4096, 10_000_000
# --- measured: bytes
COMMIT_AND_NOTE = {"image": 703 + 384, "text": 589 + 380}
TABLES = 74  # of parquet a pair
PLANNING = 1.1e3  # of memory a pair
COMPRESSED = {"float16": 1 - 0.157, "int8": 1 - 0.089}  # share of the embeddings' bytes
RECORD = 200  # of memory a commit record, in a reader
# --- measured: seconds of processor time
DIGEST_TABLES, DIGEST_IMAGE = 0.010e-3, 0.08e-3  # a pair; an image's file takes 0.06 to 0.1 ms
WRITE, CHECK, SEAL_ON_S3, VERIFY = 31e-3, 11e-3, 1.2e-3, 38e-3  # a chunk
OPEN, OPEN_PARTS = 0.80e-6, 0.93e-6  # a row
EPOCH, EPOCH_PARTS = 0.76e-6, 1.21e-6  # a row of one tower, the first epoch
# --- counted: requests of a span of 8 chunks, and objects of a chunk without commit and note
SPAN = {"image": 51 + 10 + 17 + 2, "text": 43 + 10 + 17 + 3}
OBJECTS = {"image": 3, "text": 2}
# --- assumed
MEMORY, HOUR, REQUESTS = 16e9, 3600.0, 1000.0  # bytes of a machine; seconds; requests a second of one process


@dataclass(frozen=True)
class Form:
    """How embeddings are stored."""

    dtype: str = "float16"
    compress: bool = False

    def __str__(self) -> str:
        return self.dtype + ", compressed" * self.compress

    def bytes_of(self, pairs: float) -> float:
        """Return the bytes of a cache, tables included; int8 has a float32 scale for each column of a chunk."""
        embedding = CHUNK * DIM * (2 if self.dtype == "float16" else 1)
        embedding = embedding * COMPRESSED[self.dtype] if self.compress else embedding
        scale = 4 * DIM if self.dtype == "int8" else 0
        rest = {"image": 24 * CHUNK, "text": 4 * CHUNK}  # norm, and crop of an image
        chunk = sum(embedding + scale + rest[tower] + COMMIT_AND_NOTE[tower] for tower in rest)
        return pairs * (chunk / CHUNK + TABLES)

    def objects_of(self, pairs: float) -> float:
        """Return the number of objects."""
        return pairs / CHUNK * sum(number + 2 + (self.dtype == "int8") for number in OBJECTS.values())


def limits(parts: bool) -> dict[str, float]:
    """Return the pairs at which one process needs a machine's memory or an hour, by what it does.

    Args:
        parts: whether the cache is of parts: then planning, checking and sealing are of one of them.
    """
    a_part = {
        f"memory of planning reaches {MEMORY / 1e9:.0f} GB": MEMORY / PLANNING,
        "reading each image for its digest takes an hour": HOUR / DIGEST_IMAGE,
        "digesting and writing the tables takes an hour": HOUR / DIGEST_TABLES,
        "a restart's check of all chunks takes an hour": HOUR / CHECK * CHUNK / 2,
        "sealing on S3 takes an hour": HOUR / SEAL_ON_S3 * CHUNK / 2,
    }
    # a pair: bit of the row set, byte of the caption index (none where all images have as many), two records a chunk
    reader = 1 / 8 + 1 + 2 * RECORD / CHUNK
    whole = {
        f"memory of a reader reaches {MEMORY / 1e9:.0f} GB": (MEMORY - 2 * 2**30) / reader,
        "opening takes an hour of processor": HOUR / (OPEN_PARTS if parts else OPEN),
        "a store's commit records take an hour to fetch": HOUR * REQUESTS * CHUNK / 2,
    }
    return whole if parts else dict(sorted((a_part | whole).items(), key=lambda item: item[1]))


def table(pairs: float = 1e9) -> Iterator[str]:
    """Yield the lines of the reckoned tables."""
    chunks, parts = 2 * pairs / CHUNK, pairs / PART
    yield f"| reckoned, {pairs:,.0f} pairs, {DIM} wide, one view | TB | million objects |"
    yield "|---|---|---|"
    for form in (Form(dtype, compress) for dtype in ("float16", "int8") for compress in (False, True)):
        yield f"| {form} | {form.bytes_of(pairs) / 1e12:.2f} | {form.objects_of(pairs) / 1e6:.2f} |"
    yield ""
    yield f"| reckoned, of {pairs:,.0f} pairs | one cache | each of {parts:.0f} parts |"
    yield "|---|---|---|"
    requests = pairs / CHUNK * sum(SPAN.values()) / 8
    costs = {
        "chunks, thousand": chunks / 1e3,
        "requests to encode, million": requests / 1e6,
        "memory of planning, GB": pairs * PLANNING / 1e9,
        "planning: read each image for its digest, hours": pairs * DIGEST_IMAGE / HOUR,
        "restart: check all chunks, minutes": chunks * CHECK / 60,
        "seal on S3, minutes": chunks * SEAL_ON_S3 / 60,
        "verify, minutes": chunks * VERIFY / 60,
    }
    for name, cost in costs.items():
        yield f"| {name} | {cost:,.2f} | {cost / parts:,.3f} |"
    yield ""
    yield f"| reckoned, a reader of {pairs:,.0f} pairs | one cache | {parts:.0f} parts |"
    yield "|---|---|---|"
    read = pairs * (1 / 8 + 1) + chunks * RECORD + 2 * 2**30
    requests = chunks + 2e-6 * pairs  # commit records, and two tables of a million rows a file
    reading = {
        "thousand requests to open: manifests, tables, commit records": [(requests + one) / 1e3 for one in (1, parts)],
        "minutes of processor to open": [pairs * cost / 60 for cost in (OPEN, OPEN_PARTS)],
        "memory, GB: 2 GiB of chunks, caption index, rows, commit records": [read / 1e9] * 2,
        "minutes of processor an epoch, both towers": [pairs * 2 * cost / 60 for cost in (EPOCH, EPOCH_PARTS)],
    }
    for name, (one, several) in reading.items():
        yield f"| {name} | {one:,.1f} | {several:,.1f} |"
    yield ""
    yield "| reckoned: what breaks first | one cache, million pairs | parts |"
    yield "|---|---|---|"
    for name, at in limits(parts=False).items():
        with_parts = limits(parts=True).get(name)
        yield f"| {name} | {at / 1e6:,.0f} | {'that of a part' if with_parts is None else f'{with_parts / 1e6:,.0f}'} |"
