"""What the start of ``info`` and ``ls`` costs, on a small cache and on one of ten million images.

The large one has manifest, commit records and journal notes, all that these commands look at, and no embedding.

    python benchmarks/inspection.py --out /tmp/inspection
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from teacher_cache.storage.format.commits import ChunkCommit, ObjectDigest, all_chunks
from teacher_cache.storage.format.identity import (
    CacheIdentity,
    DatasetIdentity,
    PreprocessIdentity,
    TargetsIdentity,
    TeacherIdentity,
    TokenizerIdentity,
    ViewsIdentity,
    canonical_json,
    with_digest,
)
from teacher_cache.storage.format.journal import ChunkNote, note_key
from teacher_cache.storage.format.layout import Layout
from teacher_cache.storage.format.manifest import CacheManifest, Seal, Source, StaticFile


def identity(images: int, captions: int) -> CacheIdentity:
    return CacheIdentity(
        teacher=TeacherIdentity(
            name="ViT-B-32",
            pretrained="openai",
            weights_sha256="a" * 64,
            architecture={"embed_dim": 512},
            activation="QuickGELU",
            embed_dim=512,
            precision="bf16",
            logit_scale=100.0,
        ),
        preprocess=PreprocessIdentity(
            image_size=(224, 224),
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
            interpolation="bicubic",
            resize_mode="shortest",
            fill_color=0,
            antialias=True,
            probe="AAECAw==",
        ),
        tokenizer=TokenizerIdentity(name="SimpleTokenizer", context_length=77, probe_sha256="b" * 64),
        views=ViewsIdentity(policy="evaluation"),
        targets=TargetsIdentity(),
        dataset=DatasetIdentity(
            kind="webdataset",
            images=images,
            captions=captions,
            splits={"train": images},
            samples_sha256="c" * 64,
            captions_sha256="d" * 64,
        ),
    )


def make(folder: Path, images: int, captions: int) -> None:
    """Manifest, commits and notes of a sealed cache."""
    made_of = identity(images, captions)
    layout = Layout(
        embed_dim=512,
        image_rows=images,
        text_rows=captions,
        image_chunk_rows=4096,
        text_chunk_rows=4096,
        batch_rows=256,
    )
    seal = Seal(commits_sha256="e" * 64, images_encoded=images, images_quarantined=0, captions_encoded=captions)
    manifest = CacheManifest(
        identity_digest=made_of.digest,
        identity=made_of,
        layout=layout,
        source=Source(dataset="webdataset:/data", image_root="/data"),
        files={f"samples/{number:06d}.parquet": StaticFile(sha256="f" * 64, rows=1) for number in range(10)},
        lost_images=0,
        problems={},
        seal=seal,
        made_with={"torch": "2"},
    )
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    for ref in all_chunks(layout):
        rows = ref.rows(layout)
        commit = ChunkCommit(
            tower=ref.tower,
            view=ref.view,
            chunk=ref.chunk,
            rows=(rows.start, rows.stop),
            encoder_digest=made_of.encoder_digest,
            rows_sha256="0" * 64,
            objects={name: ObjectDigest(nbytes=1, crc32c=0, sha256="1" * 64) for name in ref.object_keys()},
        ).to_bytes()
        note = ChunkNote(
            rows=len(rows),
            seconds=5.0,
            teacher_seconds=4.0,
            chunk=ref.name,
            commit_sha256=hashlib.sha256(commit).hexdigest(),
        ).model_dump(mode="json")
        for key, data in (
            (ref.commit_key, commit),
            (note_key(ref.name), canonical_json(with_digest(note)) + b"\n"),
        ):
            (folder / key).parent.mkdir(parents=True, exist_ok=True)
            (folder / key).write_bytes(data)


def seconds_of(*arguments: str) -> tuple[float, float]:
    """Wall clock and processor time of a command."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "teacher_cache.pipeline.cli.app", *arguments], check=True, stdout=subprocess.DEVNULL
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - began, busy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=10_000_000)
    parser.add_argument("--captions", type=int, default=50_000_000)
    parser.add_argument("--rounds", type=int, default=7)
    settings = parser.parse_args()
    for name, images, captions in (("small", 5000, 25_000), ("large", settings.images, settings.captions)):
        if not (settings.out / name).exists():
            make(settings.out / name, images, captions)
    commands = [
        ("--help",),
        *((verb, str(settings.out / name)) for verb in ("info", "ls") for name in ("small", "large")),
    ]
    taken: dict[tuple[str, ...], list[tuple[float, float]]] = {command: [] for command in commands}
    for _ in range(settings.rounds):  # in turns, so that a busy neighbour is in all of them
        for command in commands:
            taken[command].append(seconds_of(*command))
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, medians of {settings.rounds}")
    for command, times in taken.items():
        wall, busy = (statistics.median(values) for values in zip(*times, strict=True))
        least = min(wall for wall, _ in times)
        shown = f"{wall:6.2f} s wall (least {least:.2f}) {busy:6.2f} s of processor time"
        print(f"{' '.join(command):<50} {shown}")


if __name__ == "__main__":
    main()
