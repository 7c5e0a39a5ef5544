"""What int8 saves and what it costs: bytes of whole caches, the teacher's recall, a student's retention.

Bytes are of random unit rows with Flickr's five captions an image. Recall and retention are of photographs: the dev
split of Flickr8k and some of its training images, encoded once by the real teacher; the int8 cache is written of the
very rows that precompute hands to the writer, so that it is what ``precompute --dtype int8`` makes. The student
inherits the teacher's weights as far as they fit and learns for two epochs from either cache, with the same seed, steps
and images. That is one draw of chance, so a perceptron learns the same images' targets from either with many seeds, and
a student that is a frozen trunk and a least-squares projection, in which there is no chance, from either once.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from benchmarks.bench.harness import Row, Settings
from benchmarks.bench.linear_student import linear_retention, trunk_features
from benchmarks.bench.perceptron import perceptron_recall, thumbnails
from teacher_cache.pipeline.evaluate.retrieval import evaluate
from teacher_cache.pipeline.models.inherit.run import inherit
from teacher_cache.pipeline.precompute.plan import default_chunk_rows
from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.pipeline.settings.evaluate import EvaluateConfig
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.pipeline.settings.student import InheritConfig
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.pipeline.train.loop import train
from teacher_cache.storage.format.commits import ChunkRef, QuarantinedRow
from teacher_cache.storage.format.identity import CacheIdentity, TargetsIdentity
from teacher_cache.storage.format.layout import Layout
from teacher_cache.storage.format.manifest import Source
from teacher_cache.storage.format.tables import CAPTIONS, PROBLEMS, SAMPLES
from teacher_cache.storage.look.stats import cache_stats
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.write.plan import plan_cache
from teacher_cache.storage.write.writer import EmbeddingWriter

Dtype = Literal["float16", "int8"]
STUDENT = "effnet-lite2-t2"
_FROZEN, _TRUNK = "effnet-lite0-t3", "package:efficientnet-lite0"  # trained on ImageNet
_SPLIT = "dev"


def measure(settings: Settings) -> list[Row]:
    """See the module."""
    photos = settings.shared / "flickr8k"
    if not photos.exists():
        raise FileNotFoundError(f"{photos}: the photographs are not here; name their folder by --shared")
    few, some = (16, 16) if settings.quick else (1000, 800)
    real = {"float16": settings.scratch / "float16.cache", "int8": settings.scratch / "int8.cache"}
    teacher = f"local-dir:{settings.shared / 'teacher-flickr8k'}"
    part = _part_of(photos, settings.scratch / "photos", few, some)
    precompute(
        PrecomputeConfig(dataset=f"flickr:{part}", teacher=teacher, cache=str(real["float16"]), device=settings.device)
    )
    whole = EmbeddingReader(str(real["float16"]))
    _again(whole, real["int8"])
    rows = _bytes(settings, whole)
    rows += _recall(real)
    rows += _retention(settings, real, teacher)
    rows.append(_by_seeds(settings, real))
    rows.append(_without_chance(settings, real, teacher))
    return rows


# bytes ---------------------------------------------------------------------------------------------------------------


def _bytes(settings: Settings, like: EmbeddingReader) -> list[Row]:
    images = 2_048 if settings.quick else 65_536
    found: list[Row] = []
    for dtype, wanted in (("float16", 1.01), ("int8", 0.51)):
        cache = settings.scratch / f"bytes-{dtype}"
        dim = _random_cache(cache, images, dtype, like)
        raw = 6 * images * dim * 2
        files = [path for name in ("targets.zarr", "commits") for path in (cache / name).rglob("*") if path.is_file()]
        stored = sum(path.stat().st_size for path in files)
        note = (
            f"{images:,} images, {5 * images:,} captions, {dim} wide; embeddings, norms, crops, scales and commits, no "
            "tables. All chunks are full: one that is not is padded, which costs a chunk of each tower at most"
        )
        ratio = stored / raw
        against = "float16 rows alone"
        found.append(
            Row(f"bytes, {dtype}", against, stored / 1e6, raw / 1e6, "MB", ratio, ratio, ratio, wanted, True, note)
        )
    return found


def _random_cache(path: Path, images: int, dtype: Dtype, like: EmbeddingReader) -> int:
    """A cache of random unit rows; its width."""
    numbers = np.arange(images)
    tables = {
        SAMPLES: pa.table(
            {
                "row": numbers,
                "sample_id": [f"{number}" for number in numbers],
                "uri": [f"{number}.jpg" for number in numbers],
                "offset": np.full(images, -1),
                "length": np.full(images, -1),
                "content_sha256": [f"{number:064x}" for number in numbers],
                "split": ["train"] * images,
            }
        ),
        CAPTIONS: pa.table(
            {
                "row": np.arange(5 * images),
                "image_row": np.repeat(numbers, 5),
                "text": [f"caption {number}" for number in range(5 * images)],
            }
        ),
        PROBLEMS: like.problems.slice(0, 0),
    }
    _plan(path, like, tables, dtype, default_chunk_rows(images), default_chunk_rows(5 * images))
    writer, random = EmbeddingWriter(str(path)), np.random.default_rng(0)

    def arrays(ref: ChunkRef, rows: range) -> dict[str, NDArray[Any]]:
        wide = random.standard_normal((len(rows), like.embed_dim), np.float32)
        norm = np.linalg.norm(wide, axis=1)
        made = {"embedding": (wide / norm[:, None]).astype(np.float16), "norm": norm}
        if ref.tower == "image":
            made["view"] = np.zeros((len(rows), 5), np.float32)
        return made

    _fill(writer, arrays)
    return like.embed_dim


# caches of the same rows ---------------------------------------------------------------------------------------------


def _again(whole: EmbeddingReader, path: Path) -> None:
    """The same rows in int8."""
    have = whole.manifest.layout
    tables = {SAMPLES: whole.samples, CAPTIONS: whole.captions, PROBLEMS: whole.problems}
    _plan(path, whole, tables, "int8", have.image_chunk_rows, have.text_chunk_rows)
    lost = {ref: commit.quarantined for ref, commit in whole.commits().items()}
    _fill(EmbeddingWriter(str(path)), lambda ref, rows: whole.stored_chunk(ref), lost)


def _plan(
    path: Path, like: EmbeddingReader, tables: dict[str, pa.Table], dtype: Dtype, image_chunk: int, text_chunk: int
) -> None:
    targets = TargetsIdentity(dtype=dtype)
    images, captions = tables[SAMPLES].num_rows, tables[CAPTIONS].num_rows
    dataset = like.manifest.identity.dataset.model_copy(update={"images": images, "captions": captions})
    identity: CacheIdentity = like.manifest.identity.model_copy(update={"targets": targets, "dataset": dataset})
    layout = Layout(
        embed_dim=like.embed_dim,
        image_rows=images,
        text_rows=captions,
        image_chunk_rows=image_chunk,
        text_chunk_rows=text_chunk,
        batch_rows=like.manifest.layout.batch_rows,
        embedding_dtype=targets.layout_dtype,
    )
    source = Source(dataset=like.manifest.source.dataset, image_root=like.manifest.source.image_root)
    plan_cache(str(path), identity, layout, source, tables, like.manifest.made_with)


def _fill(
    writer: EmbeddingWriter,
    arrays: Callable[[ChunkRef, range], dict[str, NDArray[Any]]],
    lost: dict[ChunkRef, tuple[QuarantinedRow, ...]] | None = None,
) -> None:
    for ref in writer.pending():
        writer.write(ref, arrays(ref, ref.rows(writer.manifest.layout)), (lost or {}).get(ref, ()))
    writer.seal()


# photographs ---------------------------------------------------------------------------------------------------------


def _part_of(photos: Path, folder: Path, few: int, some: int) -> Path:
    """Flickr8k's form with the first ``few`` images of dev and ``some`` of train."""
    folder.mkdir()
    (folder / "images").symlink_to(photos / "images")
    kept: set[str] = set()
    for split, count in ((_SPLIT, few), ("train", some)):
        names = (photos / f"{split}.txt").read_text().split()[:count]
        (folder / f"{split}.txt").write_text("\n".join(names) + "\n")
        kept.update(names)
    header, *lines = (photos / "captions.txt").read_text().splitlines()
    lines = [line for line in lines if line.partition(",")[0] in kept]
    (folder / "captions.txt").write_text("\n".join([header, *lines]) + "\n")
    return folder


def _recall(caches: dict[str, Path]) -> list[Row]:
    """How far the teacher's own R@1 among all images moves, in points."""
    found = {name: cache_stats(str(cache)).recall for name, cache in caches.items()}
    mine, theirs = found["int8"], found["float16"]
    assert mine is not None
    assert theirs is not None
    ways = {
        "i2t": (mine.i2t["R@1"], theirs.i2t["R@1"], mine.images),
        "t2i": (mine.t2i["R@1"], theirs.t2i["R@1"], mine.captions),
    }
    both = [statistics.mean(way[side] for way in ways.values()) for side in (0, 1)]
    moved = abs(both[0] - both[1])
    what = "teacher's R@1, int8"
    note = (
        f"mean of both ways, among {mine.images:,} images and {mine.captions:,} captions; the lines below are each way"
    )
    rows = [Row(what, "float16", both[0], both[1], "%", moved, moved, moved, 0.1, True, note, "points")]
    for name, (ours, other, queries) in ways.items():
        moved = abs(ours - other)
        note = (
            f"one of the {queries:,} queries is {100 / queries:.2g} points, so that this is chance as much as rounding"
        )
        row = Row(f"{what}, {name}", "float16", ours, other, "%", moved, moved, moved, note=note)
        rows.append(replace(row, value_unit="points"))
    return rows


def _retention(settings: Settings, caches: dict[str, Path], teacher: str) -> list[Row]:
    """How far the mean retention of a student moves, in points; both are held to the float16 teacher."""
    start = settings.scratch / "start"
    inherit(InheritConfig(teacher=teacher, student=STUDENT, out=str(start)))
    kept: dict[str, float] = {}
    for name, cache in caches.items():
        run = settings.scratch / f"run-{name}"
        train(
            TrainConfig(
                cache=str(cache),
                student=STUDENT,
                init=str(start),
                out=str(run),
                epochs=1 if settings.quick else 2,
                batch_size=8 if settings.quick else 50,
                device=settings.device,
            )
        )
        measured = evaluate(
            EvaluateConfig(
                cache=str(caches["float16"]),
                run=str(run),
                split=_SPLIT,
                accept_mismatch=("targets.dtype",),
                device=settings.device,
            )
        )
        assert measured.retention is not None
        kept[name] = measured.retention["mean"]
    moved = abs(kept["int8"] - kept["float16"])
    note = (
        f"a short training, not a finished student: {STUDENT} with its teacher's weights as far as they fit, 2 epochs "
        "of 800 images from either cache, one seed, measured on 1,000 images; of mean recall (R@1, 5, 10, both ways). "
        "One draw of chance: see the next line"
    )
    what, against = "retention, learned from int8", "from float16"
    return [Row(what, against, kept["int8"], kept["float16"], "%", moved, moved, moved, 0.3, True, note, "points")]


def _files_of(reader: EmbeddingReader, rows: NDArray[np.int64]) -> list[Path]:
    """Where the images of some rows lie."""
    uris = reader.samples["uri"].take(pa.array(rows)).to_pylist()
    return [Path(reader.manifest.source.image_root) / uri for uri in uris]


def _without_chance(settings: Settings, caches: dict[str, Path], teacher: str) -> Row:
    """How far int8 moves the retention of a frozen trunk with the projection that fits best, in points."""
    start = settings.scratch / "frozen"
    inherit(InheritConfig(teacher=teacher, student=_FROZEN, trunk_weights=_TRUNK, out=str(start)))
    readers = {name: EmbeddingReader(str(cache)) for name, cache in caches.items()}
    exact = readers["float16"]
    learned, held_out = exact.image_rows("train"), exact.image_rows(_SPLIT)
    features = trunk_features(start, _files_of(exact, np.concatenate([learned, held_out])), settings.device)
    kept = {
        name: linear_retention(features, reader.take("image", learned), exact, held_out)
        for name, reader in readers.items()
    }
    moved = abs(kept["int8"] - kept["float16"])
    note = (
        f"least squares on the features of EfficientNet-Lite0 as trained on ImageNet, {len(learned)} images learned, "
        f"{len(held_out)} held out, the teacher's captions; of mean recall (R@1, 5, 10, both ways). No seed, no order"
    )
    what, against = "retention of a linear student, learned from int8", "from float16"
    return Row(what, against, kept["int8"], kept["float16"], "%", moved, moved, moved, 0.3, True, note, "points")


def _by_seeds(settings: Settings, caches: dict[str, Path]) -> Row:
    """How far int8 moves a perceptron's R@10, in points: the mean over seeds, each trained from either cache."""
    exact, rounded = (EmbeddingReader(str(caches[name])) for name in ("float16", "int8"))
    learned, held_out = exact.image_rows("train"), exact.image_rows(_SPLIT)
    rows = np.concatenate([learned, held_out])
    pixels = thumbnails(_files_of(exact, rows))
    targets = {"float16": exact.take("image", rows).astype(np.float32)}
    targets["int8"] = targets["float16"].copy()
    targets["int8"][: len(learned)] = rounded.take("image", learned)  # what is held out stays as the teacher gave it
    seeds, epochs = (range(3), 1) if settings.quick else (range(40), 12)
    window = -(-len(learned) // 64)
    found = {
        name: 100 * np.array([perceptron_recall(pixels, of, len(held_out), window, seed, epochs) for seed in seeds])
        for name, of in targets.items()
    }
    moved = found["int8"] - found["float16"]
    half = 1.96 * moved.std(ddof=1) / len(seeds) ** 0.5
    mean = float(moved.mean())
    note = (
        f"{len(seeds)} seeds, each from both; {len(learned)} images learned, {len(held_out)} held out. int8 less "
        f"float16 is {mean:.2f} points with a 95 % interval of {mean - half:.2f} to {mean + half:.2f}, whose farther "
        "end counts; over seeds, with the same images. It is another quantity than the line above; "
        f"one seed from another differs by {found['float16'].std(ddof=1):.2f} (standard deviation)"
    )
    what, ours, theirs = "R@10 of a perceptron", float(found["int8"].mean()), float(found["float16"].mean())
    low, high = max(0.0, abs(mean) - half), abs(mean) + half
    row = Row(f"{what}, learned from int8", "from float16", ours, theirs, "%", high, low, high, 0.3, True, note)
    return replace(row, value_unit="points")
