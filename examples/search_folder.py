"""Search a folder of pictures by text, with a deployed student and FAISS. No torch.

    pip install 'teacher-cache[runtime]' faiss-cpu
    python examples/search_folder.py ~/pictures "a dog in the snow" --student deployed/a

The first search embeds all pictures and keeps their features in the folder, in ``.search.npz``; later ones embed only
what is new or was changed since. Another student, or the same one with --variant int8, starts anew. A picture that
cannot be decoded is named on stderr and left out; it is tried again once it has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

import faiss
import numpy as np

from teacher_cache.pipeline.data.datasets.files import IMAGE_ENDINGS
from teacher_cache.pipeline.data.images.decode import UndecodableImageError
from teacher_cache.pipeline.deploy.record import RECORD
from teacher_cache.pipeline.deploy.runtime import StudentRuntime
from teacher_cache.storage.errors import CacheError, UsageError

KEPT, BATCH = ".search.npz", 64


def kept_features(path: Path, student_key: str) -> dict[tuple[str, int, int], np.ndarray]:
    """Features of an earlier search by (name, bytes, mtime in ns); NaN for a picture that could not be decoded."""
    try:
        with np.load(path) as file:  # pickles are refused by default
            if str(file["student"]) != student_key:
                return {}
            stamps = zip(file["names"].tolist(), file["sizes"].tolist(), file["mtimes"].tolist(), strict=True)
            return dict(zip(stamps, file["features"], strict=True))
    except FileNotFoundError:
        return {}


def index_folder(folder: Path, student: StudentRuntime) -> tuple[faiss.IndexFlatIP, list[str]]:
    """Index all pictures below a folder; return the index and the names by row."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder of pictures")
    record = (student.folder / RECORD).read_bytes() + student.variant.encode()
    student_key = hashlib.sha256(record).hexdigest()
    known = kept_features(folder / KEPT, student_key)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS and path.is_file())
    stamps = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    new = [stamp for stamp in stamps if stamp not in known]
    for start in range(0, len(new), BATCH):
        pixels, decoded = [], []
        for stamp in new[start : start + BATCH]:
            try:
                pixels.append(student.pixels(folder / stamp[0]))
                decoded.append(stamp)
            except UndecodableImageError as error:
                print(f"left out: {error}", file=sys.stderr)
                known[stamp] = np.full(student.deployment.embed_dim, np.nan, np.float32)
        if decoded:
            known.update(zip(decoded, student.embed_pixels(np.stack(pixels)), strict=True))
        print(f"embedded {min(start + BATCH, len(new))} of {len(new)} new pictures", file=sys.stderr)
    dim = student.deployment.embed_dim
    features = np.array([known[stamp] for stamp in stamps], np.float32).reshape(len(stamps), dim)
    if new or len(known) != len(stamps):
        names, sizes, mtimes = zip(*stamps, strict=True) if stamps else ((), (), ())
        partial = folder / f"{KEPT}.partial.npz"
        np.savez(partial, student=student_key, names=names, sizes=sizes, mtimes=mtimes, features=features)
        partial.replace(folder / KEPT)  # whole or not at all
    seen = [row for row in range(len(stamps)) if np.isfinite(features[row]).all()]
    index = faiss.IndexFlatIP(dim)  # inner product of unit vectors is their cosine
    if seen:
        index.add(features[seen])
    return index, [stamps[row][0] for row in seen]


def main() -> int:
    """Exit 0: fine; 1: something is wrong with a file; 2: a setting cannot be used."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("text")
    parser.add_argument("--student", type=Path, required=True, help="folder of a deployed student")
    parser.add_argument("--variant", default="fp32", choices=["fp32", "int8"])
    parser.add_argument("-k", type=int, default=5, help="how many pictures to show")
    given = parser.parse_args()
    try:
        student = StudentRuntime(given.student, given.variant)
        index, names = index_folder(given.folder, student)
        for row, cosine in student.search(index, given.text, given.k):
            print(f"{cosine:.3f}  {given.folder / names[row]}")
    except (CacheError, UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
