"""Twins: planted ones found among Flickr8k's photographs, and the time and memory of a million rows.

python -m benchmarks.twins plant ../shared/flickr8k /tmp/planted --count 500 --seed 1
python -m benchmarks.twins judge f8k.cache planted.cache
python -m benchmarks.twins scale f8k.cache /tmp/big --rows 900000 --others 100000
"""

from __future__ import annotations

import argparse
import resource
import time
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from benchmarks.bench.big_cache import big_cache
from teacher_cache import Cache
from teacher_cache.pipeline.evaluate.twins.find import find_twins
from teacher_cache.storage.format.commits import ChunkRef
from teacher_cache.storage.look.nearest import unit_rows

KINDS = ("recompressed", "cropped", "mirrored")


def plant(dataset: Path, out: Path, count: int, seed: int) -> None:
    """Write ``count`` twins of each kind, each of another photograph of train."""
    draw = np.random.default_rng(seed)
    names = draw.permutation(sorted((dataset / "train.txt").read_text().split()))[: len(KINDS) * count]
    out.mkdir(parents=True)
    for number, name in enumerate(names):
        kind, image = KINDS[number // count], Image.open(dataset / "images" / name).convert("RGB")
        if kind == "cropped":  # 95 % of each side, anywhere
            sides = [round(0.95 * side) for side in image.size]
            left, top = (int(draw.integers(0, side - cut + 1)) for side, cut in zip(image.size, sides, strict=True))
            image = image.crop((left, top, left + sides[0], top + sides[1]))
        if kind == "mirrored":
            image = ImageOps.mirror(image)
        image.save(out / f"{kind}-{name}", quality=60 if kind == "recompressed" else 90)


def judge(cache: str, planted: str) -> None:
    """Print precision and recall of each kind: by pairs, a pair of two other photographs counts as wrong."""
    twins = find_twins(cache, planted, split="train")
    wanted = Counter(name.partition("-")[0] for name in Cache(planted).samples["sample_id"].to_pylist())
    pairs = {(twin.sample_id, twin.twin, twin.cosine, twin.likeness) for twin in twins.twins}
    for kind in KINDS:
        of_kind = [pair for pair in pairs if pair[1].startswith(f"{kind}-")]
        right = [pair for pair in of_kind if pair[1] == f"{kind}-{pair[0]}"]
        print(f"{kind}: recall {len(right) / wanted[kind]:.4f}, precision {len(right) / max(len(of_kind), 1):.4f}")
        for pair in sorted(set(of_kind) - set(right)):
            print(f"  another photograph: {pair}")
    print(f"{twins.near:,} candidates of cosine {twins.least_cosine:.3f}, unread {twins.unread}, {twins.seconds:.1f} s")
    _by_cosine_alone(Cache(cache), Cache(planted))


def _by_cosine_alone(cache: Cache, planted: Cache) -> None:
    """Print what the rule reaches that needs no pictures: every pair of a minimum cosine."""
    rows = cache.image_rows("train")
    own = dict(zip(cache.table_rows("samples", rows)["sample_id"].to_pylist(), range(len(rows)), strict=True))
    names = planted.samples["sample_id"].to_pylist()
    at = [own[name.partition("-")[2]] for name in names]
    of_train, of_planted = (unit_rows(one.take("image", one.image_rows())) for one in (cache, planted))
    cosines = of_train[np.searchsorted(cache.image_rows(), rows)] @ of_planted.T
    right = cosines[at, np.arange(len(names))].copy()
    cosines[at, np.arange(len(names))] = -1
    for least in (0.75, 0.8, 0.85, 0.9, 0.95):
        hits, wrong = int((right >= least).sum()), int((cosines >= least).sum())
        print(f"by a cosine of {least} alone: recall {hits / len(names):.4f}, precision {hits / (hits + wrong):.4f}")


def scale(cache: str, folder: str, rows: int, others: int) -> None:
    """Time the comparison of rows that are mixed of the rows of a cache, so that they spread as real ones do."""
    reader = Cache(cache)
    real = reader.take("image", reader.image_rows()).astype(np.float32)

    def mixed(seed: int, ref: ChunkRef, count: int) -> NDArray[np.float16]:
        draw = np.random.default_rng([seed, ref.tower == "text", ref.chunk])
        rows = real[draw.integers(0, len(real), (count, 2))] * draw.dirichlet((1, 1), count)[..., None]
        made = rows.sum(axis=1) + draw.standard_normal((count, real.shape[1]), np.float32) * 0.2 / real.shape[1] ** 0.5
        return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float16)

    learned = big_cache(folder, rows, captions=1, rows_of=lambda ref, count: mixed(0, ref, count))
    measured = big_cache(folder, others, captions=1, rows_of=lambda ref, count: mixed(1, ref, count))
    began, cpu = time.perf_counter(), time.process_time()
    twins = find_twins(learned, measured, least=0.95)  # no picture is there to be compared
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{rows:,} x {others:,} rows: {seconds:.0f} s ({cpu:.0f} s of CPU), peak {peak:.2f} GiB, {twins.near:,} near")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True, dest="verb")
    planting, judging, scaling = (verbs.add_parser(name) for name in ("plant", "judge", "scale"))
    planting.add_argument("dataset", type=Path)
    planting.add_argument("out", type=Path)
    planting.add_argument("--count", type=int, default=500)
    planting.add_argument("--seed", type=int, default=1)
    judging.add_argument("cache")
    judging.add_argument("planted")
    scaling.add_argument("cache")
    scaling.add_argument("folder")
    scaling.add_argument("--rows", type=int, default=900_000)
    scaling.add_argument("--others", type=int, default=100_000)
    given = vars(parser.parse_args())
    {"plant": plant, "judge": judge, "scale": scale}[given.pop("verb")](**given)


if __name__ == "__main__":
    main()
