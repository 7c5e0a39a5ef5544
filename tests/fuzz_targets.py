"""What reads bytes of strangers, each as one function of bytes: for ``tests/test_fuzz.py`` and ``benchmarks/fuzz.py``.

A target returns when the bytes were taken or refused as documented; it raises for everything else.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from teacher_cache.pipeline.data.datasets import samples
from teacher_cache.pipeline.data.datasets.records import SampleSet
from teacher_cache.pipeline.data.datasets.samples import load_samples
from teacher_cache.pipeline.data.datasets.spec import DatasetSpec
from teacher_cache.pipeline.data.images.decode import MAX_PIXELS, UndecodableImageError, decode_image
from teacher_cache.pipeline.data.images.preprocess import Preprocess
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.pipeline.settings.run_file import load_config
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.storage.errors import CacheError, UsageError
from teacher_cache.storage.format.commits import ChunkCommit, ChunkRef, ObjectDigest, QuarantinedRow
from teacher_cache.storage.format.identity import canonical_json
from teacher_cache.storage.format.manifest import CacheManifest
from teacher_cache.storage.observe.safe_text import redact


@dataclass(frozen=True)
class Target:
    """One reader: ``run(data, folder)`` with valid inputs to start from. ``folder`` is scratch space of its own."""

    run: Callable[[bytes, Path], None]
    seeds: Callable[[], list[bytes]]


def _image_bytes(format: str, mode: str = "RGB", **how: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 17, 4), np.uint8)
    image = Image.fromarray(pixels[:, :, :3]).convert(mode) if mode != "RGBA" else Image.fromarray(pixels)
    sink = io.BytesIO()
    image.save(sink, format, **how)
    return sink.getvalue()


def _image_seeds() -> list[bytes]:
    gif = {"save_all": True, "append_images": [Image.new("P", (17, 12), 3)]}
    return [
        _image_bytes("JPEG"),
        _image_bytes("JPEG", "CMYK"),
        _image_bytes("JPEG", progressive=True),
        _image_bytes("PNG"),
        _image_bytes("PNG", "P", transparency=1),
        _image_bytes("PNG", "1"),
        _image_bytes("GIF", "P", **gif),
        _image_bytes("WEBP"),
        _image_bytes("WEBP", "RGBA", lossless=True),
        _image_bytes("BMP"),
        _image_bytes("TIFF", compression="tiff_lzw"),
        _image_bytes("TIFF", "F"),
        _image_bytes("PPM"),
        b"P5 3 2 65535\n" + bytes(range(12)),
    ]


_TRANSFORM = Preprocess((32, 32), (0.5,) * 3, (0.25,) * 3).transform


def _decode(data: bytes, folder: Path) -> None:
    try:
        image = decode_image(data)
    except UndecodableImageError as error:
        if " at 0x" in str(error):
            raise AssertionError("another text in each run") from error
        return
    assert 0 < image.width * image.height <= MAX_PIXELS
    if image.width * image.height < 1_000_000:
        try:
            pixels = _TRANSFORM(image)
        except ValueError:  # too long a strip, or one pixel wide where the longer side decides
            return
        assert pixels.shape == (3, 32, 32)


_COCO = {
    "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
    "annotations": [{"image_id": 1, "caption": "A."}, {"image_id": 2, "caption": "B \U0001f600."}],
}
_KARPATHY = {
    "dataset": "x",
    "images": [
        {"filename": "a.png", "split": "train", "sentences": [{"raw": "A."}, {"raw": "AA."}]},
        {"filename": "b.png", "filepath": "images", "split": "val", "sentences": [{"raw": "B."}]},
    ],
}


def _json(value: object) -> list[bytes]:
    return [json.dumps(value).encode()]


def _tar(format: int = tarfile.PAX_FORMAT, **headers: str) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=format) as archive:
        for name, data in (
            ("a.png", _image_bytes("PNG")),
            ("a.txt", b"A."),
            ("long/" * 30 + "b.jpg", _image_bytes("JPEG")),
            ("long/" * 30 + "b.json", b'{"caption": "B."}'),
        ):
            entry = tarfile.TarInfo(name)
            entry.size, entry.pax_headers = len(data), headers
            archive.addfile(entry, io.BytesIO(data))
    return sink.getvalue()


def _parquet(compression: str) -> bytes:
    sink = io.BytesIO()
    captions = pa.array([["A.", "AA."], None, ["B."]], pa.list_(pa.string()))
    table = pa.table({"path": ["a.png", "b.png", "b.png"], "captions": captions, "split": ["x", None, "x"]})
    pq.write_table(table, sink, compression=compression)
    return sink.getvalue()


def _dataset(kind: str, file: str, root: str = "") -> Callable[[bytes, Path], None]:
    """Reads a dataset of two images in which one file holds the bytes."""

    def run(data: bytes, folder: Path) -> None:
        home = folder / "data"
        if not home.exists():
            for place in ("images", "val", "annotations", "wolf"):
                (home / place).mkdir(parents=True)
            for place in ("images", "val", "wolf", "."):
                for name in ("a.png", "b.png"):
                    (home / place / name).write_bytes(_image_bytes("PNG"))
        (home / file).parent.mkdir(exist_ok=True)
        (home / file).write_bytes(data)
        before = _listing(folder)
        names = {"imagefolder": "classes", "labelled": "class_names"}
        option = f"?{names[kind]}={home / file}" if kind in names else ""
        # no address in fuzzed bytes is ever asked
        real, samples._fetch = samples._fetch, _no_network
        try:
            found, digests = load_samples(DatasetSpec.parse(f"{kind}:{home / root}{option}"))
        except UsageError as error:
            _storable(str(error))
            return
        finally:
            samples._fetch = real
            assert _listing(folder) == before, "something was written beside the dataset"
        assert len(found.samples) == len(digests)
        assert len({sample.sample_id for sample in found.samples}) == len(digests)
        for sample in found.samples:
            _storable(sample.sample_id, sample.uri, sample.split, *sample.captions)
            assert sample.captions or kind in ("images", "labelled")
            assert all(caption.strip() for caption in sample.captions)
            if kind != "table":
                assert not PurePosixPath(sample.uri).is_absolute()
                assert not urlsplit(sample.uri).scheme or "://" not in sample.uri
                assert (home / sample.uri).resolve().is_relative_to(home.resolve())
        for problem in found.problems:
            _storable(problem.where, problem.detail)
            assert "\n" not in problem.where + problem.detail
            assert problem.where
            assert problem.detail
        lost = sum(problem.lost_image for problem in found.problems)
        if (images := _images_in(kind, home / file, found)) is not None:
            assert len(found.samples) + lost == images, "images in = rows + lost images"

    return run


def _images_in(kind: str, file: Path, found: SampleSet) -> int | None:
    """Count the images that a file lists in another way than its adapter does; None where that is not tried."""
    kinds = Counter(problem.kind for problem in found.problems)
    if kind in ("coco", "karpathy"):
        again = sum(problem.kind == "duplicate-id" and not problem.lost_image for problem in found.problems)
        return len(json.loads(file.read_text("utf-8-sig", "surrogateescape"))["images"]) - again
    if kinds["broken-file"]:
        return None
    if file.suffix == ".parquet":
        paths = pq.read_table(file, columns=["path"])["path"]
        return len({path.strip() for path in paths.to_pylist() if path} - {""}) if paths.type == pa.string() else None
    if kind != "webdataset":
        return None
    with tarfile.open(file, "r:", encoding="utf-8", errors="surrogateescape") as archive:
        names = [PurePosixPath(member.name).name for member in archive if not member.isdir()]
    endings = [ending.lower() for key, _, ending in (name.partition(".") for name in names) if key]
    passed_over = sum("ends at the first dot" in problem.detail for problem in found.problems)
    return sum(ending in ("jpg", "jpeg", "png", "webp") for ending in endings) + passed_over


def _no_network(url: str, offset: int, length: int) -> bytes:
    raise OSError("not asked")


def _listing(folder: Path) -> list[str]:
    return sorted(os.path.join(place, name) for place, _, names in os.walk(folder) for name in names)  # noqa: PTH118


def _storable(*texts: str) -> None:
    for text in texts:
        text.encode()
        canonical_json(text)


def _manifest(data: bytes, folder: Path) -> None:
    try:
        manifest = CacheManifest.from_bytes(data, "here")
    except CacheError as error:
        _storable(str(error).encode(errors="backslashreplace").decode())
        return
    assert CacheManifest.from_bytes(manifest.to_bytes(), "here") == manifest


def _manifest_seeds() -> list[bytes]:
    return [file.read_bytes() for file in sorted((Path(__file__).parent / "golden").rglob("manifest.json"))]


def _commit(data: bytes, folder: Path) -> None:
    try:
        commit = ChunkCommit.from_bytes(data, "here")
    except CacheError:
        return
    assert ChunkCommit.from_bytes(commit.to_bytes(), "here") == commit


def _commit_seeds() -> list[bytes]:
    ref = ChunkRef("text", 0, 1)
    fields = {
        "tower": ref.tower,
        "view": ref.view,
        "chunk": ref.chunk,
        "rows": (4, 8),
        "objects": {"norm": ObjectDigest(nbytes=20, crc32c=7, sha256="b" * 64)},
        "quarantined": (QuarantinedRow(row=5, sample_id="x", reason="undecodable-image", detail="y"),),
    }
    digests = [name for name, field in ChunkCommit.model_fields.items() if field.is_required() and name not in fields]
    fields.update(dict.fromkeys(digests, "c" * 64))
    return [ChunkCommit.model_validate(fields).to_bytes()]


def _spec(data: bytes, folder: Path) -> None:
    text = data.decode("utf-8", errors="surrogateescape")
    try:
        spec = DatasetSpec.parse(text)
    except UsageError:
        return
    assert DatasetSpec.parse(str(spec)) == spec
    assert redact(str(spec)) == str(spec)
    _storable(str(spec))


def _config(data: bytes, folder: Path) -> None:
    path = folder / "run.toml"
    path.write_bytes(data)
    for kind, section in ((PrecomputeConfig, "precompute"), (TrainConfig, "train")):
        try:
            load_config(kind, section, path, {})
        except UsageError as error:
            _storable(str(error).encode(errors="backslashreplace").decode())


_TOML = b'cache = "c"\n[precompute]\ndataset = "flickr:/x"\nteacher = "t"\nbatch_size = 4\n[train]\nstudent = "s"\n'
_SPECS = [
    b"flickr:/data/flickr8k",
    b"table:s3://b/p.csv?path=url&id=",
    b"webdataset:{a,b}/{00..03}.tar?split=my%20own",
    b"table:https://user:secret@host/p.csv",
]
_TABLE = b'path,caption,split\r\na.png,"A, ""quoted""\nover lines",train\r\nb.png,B.,\r\n/nowhere/c.png,C.,x\r\n'
_FLICKR = b'image,caption\na.png,"A, B"\na.png,C\nb.png,"D ""x"""\n'
_SCENES = {
    "scenes": {"seed": 2024, "train": 1800, "dev": 200, "test": 400, "version": 1},
    "images": [{"file": "images/a.png", "split": "train", "captions": ["A."]}],
}

TARGETS: dict[str, Target] = {
    "decode_image": Target(_decode, _image_seeds),
    "coco": Target(_dataset("coco", "annotations/captions_val.json"), lambda: _json(_COCO)),
    "karpathy": Target(_dataset("karpathy", "dataset.json"), lambda: _json(_KARPATHY)),
    "flickr": Target(
        _dataset("flickr", "captions.txt"),
        lambda: [_FLICKR, b"a.png#0\tA.\nb.png#0\tB.\n", b"image_name| comment_number| comment\na.png| 0| A.\n"],
    ),
    "flickr-list": Target(_dataset("flickr", "train.txt"), lambda: [b"a.png\nb.png\n"]),
    "webdataset": Target(
        _dataset("webdataset", "x.tar", "x.tar"),
        lambda: [_tar(), _tar(tarfile.GNU_FORMAT), _tar(mtime="1.5", comment="c"), zlib.compress(_tar())],
    ),
    "table": Target(
        _dataset("table", "t.csv", "t.csv"), lambda: [_TABLE, b"url\ttext\na.png\tA.\nhttps://u:p@h/b.png\tB.\n"]
    ),
    "parquet": Target(_dataset("table", "t.parquet", "t.parquet"), lambda: [_parquet("none"), _parquet("snappy")]),
    "imagefolder": Target(
        _dataset("imagefolder", "classes.json"),
        lambda: _json({"images": "an image", "val": "a valley", "wolf": "a wolf", "annotations": "a note"}),
    ),
    "labelled": Target(
        _dataset("labelled", "classes.json"),
        lambda: _json({"images": "an image", "val": "a valley", "wolf": "a wolf", "annotations": "a note"}),
    ),
    "images": Target(_dataset("images", "wolf/a.txt"), lambda: [b"A wolf.", b"\xff"]),
    "scenes": Target(_dataset("scenes", "captions.json"), lambda: _json(_SCENES)),
    "manifest": Target(_manifest, _manifest_seeds),
    "commit": Target(_commit, _commit_seeds),
    "spec": Target(_spec, lambda: _SPECS),
    "config": Target(_config, lambda: [_TOML]),
}
