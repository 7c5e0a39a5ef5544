"""Small real things for all tests: a cache of known rows, photographs, tiny open_clip models."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, settings

# a test process never reaches for a hub, and never fights itself over two cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# a shell ignores SIGINT in what it starts in the background, and children inherit that: tests that send it would wait
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.files.processes import ProcessName, this_process
from teacher_cache.storage.format.commits import ChunkRef, QuarantinedRow
from teacher_cache.storage.format.identity import (
    CacheIdentity,
    DatasetIdentity,
    PreprocessIdentity,
    TargetsIdentity,
    TeacherIdentity,
    TokenizerIdentity,
    ViewsIdentity,
)
from teacher_cache.storage.format.journal import ChunkCost
from teacher_cache.storage.format.layout import Layout
from teacher_cache.storage.format.manifest import CacheManifest, Source
from teacher_cache.storage.format.tables import CAPTIONS, PROBLEMS, SAMPLES, captions_sha256, samples_sha256
from teacher_cache.storage.write.plan import plan_cache
from teacher_cache.storage.write.writer import EmbeddingWriter
from tests.fault_proxy import FaultProxy, start_fault_proxy
from tests.object_store import ObjectStore, start_moto, start_seaweedfs
from tests.slow import begin_with_longest, mark_slow

# a busy machine is no finding
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.hookimpl(tryfirst=True)  # before -m "not slow" is applied
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what ``make test`` leaves to ``make test-all``, and begin with the longest files."""
    mark_slow(items)
    begin_with_longest(items)


def shared(name: str) -> Path:
    """A folder of real data beside the clone, or a skip that says which."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"real data {path} is not here")
    return path


@pytest.fixture(autouse=True)
def signal_handlers_stay() -> Iterator[None]:
    """No test leaves a handler behind: forked workers of later tests would inherit it and might not end by SIGTERM."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


def make_identity(images: int = 10, captions: int = 25, **teacher: Any) -> CacheIdentity:
    """An identity with every field set; keyword arguments change the teacher's."""
    fields: dict[str, Any] = {
        "name": "tiny",
        "pretrained": None,
        "weights_sha256": "a" * 64,
        "architecture": {"embed_dim": 8},
        "activation": "GELU",
        "embed_dim": 8,
        "precision": "fp32",
        "logit_scale": 20.0,
        "logit_bias": None,
    }
    return CacheIdentity(
        teacher=TeacherIdentity(**{**fields, **teacher}),
        preprocess=PreprocessIdentity(
            image_size=(32, 32),
            mean=(0.5, 0.5, 0.5),
            std=(0.2, 0.2, 0.2),
            interpolation="bicubic",
            resize_mode="shortest",
            fill_color=0,
            antialias=True,
            probe="AAECAw==",
        ),
        tokenizer=TokenizerIdentity(name="SimpleTokenizer", context_length=16, probe_sha256="b" * 64),
        views=ViewsIdentity(policy="evaluation", count=1),
        targets=TargetsIdentity(),
        dataset=DatasetIdentity(
            kind="flickr",
            images=images,
            captions=captions,
            splits={"train": images - images // 5, "test": images // 5},
            samples_sha256="c" * 64,
            captions_sha256="d" * 64,
        ),
    )


DRAWN = ViewsIdentity(policy="random-resized-crop", count=3, scale=(0.3, 1.0), ratio=(0.75, 1.25), flip=0.5, seed=0)


def known_row(tower: str, row: int, dim: int = 8) -> np.ndarray[Any, Any]:
    """The unit vector that the test cache holds for a row: float16 (dim,)."""
    values = np.random.default_rng([row, 0 if tower == "image" else 1]).standard_normal(dim)
    return (values / np.linalg.norm(values)).astype(np.float16)


def plan_known_cache(
    path: Path | str,
    images: int = 10,
    captions: int = 25,
    chunk_rows: int = 4,
    name: str = "img",
    dtype: Literal["float16", "int8"] = "float16",
    views: int = 1,
    sample_ids: Sequence[str] | None = None,
    **fields: Any,
) -> CacheManifest:
    """A planned cache: image ``i`` is ``img-i`` unless ids are given, its captions lie side by side, none encoded.

    Args:
        fields: further fields of the layout.
    """
    image_row = np.sort(np.arange(captions) % images)
    tables = {
        SAMPLES: pa.table(
            {
                "row": np.arange(images),
                "sample_id": sample_ids or [f"{name}-{i}" for i in range(images)],
                "uri": [f"{name}-{i}.jpg" for i in range(images)],
                "offset": [-1] * images,
                "length": [-1] * images,
                "content_sha256": ["e" * 64] * images,
                "split": ["test" if i >= images - images // 5 else "train" for i in range(images)],
            }
        ),
        CAPTIONS: pa.table(
            {"row": np.arange(captions), "image_row": image_row, "text": [f"{name} {i}" for i in range(captions)]}
        ),
        PROBLEMS: pa.table(
            {
                "kind": pa.array([], pa.string()),
                "where": pa.array([], pa.string()),
                "detail": pa.array([], pa.string()),
                "lost_image": pa.array([], pa.bool_()),
            }
        ),
    }
    identity = make_identity(images, captions)
    dataset = identity.dataset.model_copy(
        update={
            "samples_sha256": samples_sha256(tables[SAMPLES]),
            "captions_sha256": captions_sha256(tables[CAPTIONS]),
        }
    )
    targets = TargetsIdentity(dtype=dtype)
    drawn = identity.views if views == 1 else DRAWN.model_copy(update={"count": views})
    identity = identity.model_copy(update={"dataset": dataset, "targets": targets, "views": drawn})
    layout = Layout(
        embed_dim=8,
        views=views,
        image_rows=images,
        text_rows=captions,
        image_chunk_rows=chunk_rows,
        text_chunk_rows=chunk_rows,
        batch_rows=2,
        embedding_dtype=targets.layout_dtype,
        **fields,
    )
    source = Source(dataset="flickr:/nowhere", image_root="/nowhere")
    return plan_cache(str(path), identity, layout, source, tables, {"torch": "0"})


def known_arrays(writer: EmbeddingWriter, ref: Any) -> dict[str, np.ndarray[Any, Any]]:
    """What the test cache holds for a chunk."""
    rows = ref.rows(writer.manifest.layout)
    arrays = {
        "embedding": np.stack([known_row(ref.tower, row) for row in rows]),
        "norm": np.arange(rows.start, rows.stop, dtype=np.float32) + 1,
    }
    if ref.tower == "image":
        arrays["view"] = np.tile(np.array([0, 0, 32, 32, 0], np.float32), (len(rows), 1))
    return arrays


def quarantined_row(row: int) -> QuarantinedRow:
    """An image of the test cache that could not be decoded."""
    return QuarantinedRow(row=row, sample_id=f"img-{row}", reason="undecodable", detail="cut short")


def finish_known_cache(
    location: Path | str,
    lost: Sequence[int] = (),
    chunks: int | None = None,
    change: Callable[[ChunkRef, dict[str, np.ndarray[Any, Any]]], None] | None = None,
    **cost: Any,
) -> EmbeddingWriter:
    """Write what is left of a planned cache and seal it.

    Args:
        lost: images without an embedding in any view.
        chunks: write this many chunks only, and do not seal.
        change: changes the arrays of a chunk before they are written.
        cost: fields of the chunks' journal notes. Default: no notes.
    """
    writer = EmbeddingWriter(str(location))
    for ref in writer.pending()[:chunks]:
        rows, arrays = ref.rows(writer.manifest.layout), known_arrays(writer, ref)
        if change is not None:
            change(ref, arrays)
        gone = [row for row in lost if ref.tower == "image" and row in rows]
        for values in arrays.values():
            values[[row - rows.start for row in gone]] = np.nan
        note = ChunkCost(rows=len(rows), **cost) if cost else None
        writer.write(ref, arrays, [quarantined_row(row) for row in gone], note)
    if chunks is None:
        writer.seal()
    return writer


def make_known_cache(location: Path | str, lost: Sequence[int] = (), **plan: Any) -> None:
    """A sealed cache of the known rows.

    Args:
        lost: images without an embedding.
        plan: settings of :func:`plan_known_cache`.
    """
    plan_known_cache(location, **plan)
    finish_known_cache(location, lost)


def ended_process() -> ProcessName:
    """The name of a process that has just ended."""
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    return this_process().model_copy(update={"pid": process.pid})


@pytest.fixture
def own_fork_server() -> None:
    """The fork server that an earlier test started ends: it has that test's environment and modules."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


@pytest.fixture
def known_cache(tmp_path: Path) -> Path:
    """A sealed cache of 10 images and 25 captions in chunks of 4 rows; ``known_row`` says what each row is."""
    path = tmp_path / "known.cache"
    make_known_cache(path)
    return path


def cache_digest(location: Path | str) -> str:
    """sha256 over name and bytes of every file of a cache but its journal: what two equal caches share."""
    total = hashlib.sha256()
    if "://" in str(location):
        files = open_files(location)
        contents = {key: partial(files.read, key) for key in files.list()}
    else:  # past the code under test: files that it hides count too
        root = Path(location)
        contents = {path.relative_to(root).as_posix(): path.read_bytes for path in root.rglob("*") if path.is_file()}
    for key in sorted(contents):
        if not key.startswith("journal/"):
            total.update(key.encode() + b"\0" + contents[key]())
    return total.hexdigest()


TINY_MODEL: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def make_model_folder(path: Path, seed: int = 0, preprocess: dict[str, Any] | None = None, **changes: Any) -> Path:
    """An open_clip ``local-dir:`` model with seeded random weights: a teacher that is quick and never trained."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    config = {**TINY_MODEL, **changes}
    preprocess = preprocess or {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "interpolation": "bicubic"}
    path.mkdir(parents=True)
    text = json.dumps({"model_cfg": config, "preprocess_cfg": {**preprocess, "resize_mode": "shortest"}})
    (path / "open_clip_config.json").write_text(text)
    torch.manual_seed(seed)
    model = open_clip.create_model(f"local-dir:{path}", load_weights=False, pretrained_text=False)
    save_file(model.state_dict(), path / "open_clip_model.safetensors")
    return path


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny open_clip teacher, embed_dim 16, 32 x 32 pixels."""
    return make_model_folder(tmp_path_factory.mktemp("teacher") / "tiny")


@pytest.fixture(scope="session")
def photo_cache(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 40 photographs by the tiny teacher, 32 to train on and 8 to test on; to be left as it is."""
    from tests.pipeline.train.train_work import make_cache

    return make_cache(tmp_path_factory.mktemp("photos"), tiny_teacher)


@pytest.fixture(scope="session")
def tiny_deployment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny deployed student; its model folder is ``student`` beside it."""
    from tests.pipeline.deploy.deployed import deploy_tiny

    return deploy_tiny(tmp_path_factory.mktemp("tiny"))


def write_photos(root: Path, images: int = 20, first: int = 0) -> Path:
    """A dataset in Flickr's form: JPEGs of many sizes, two captions each, the last fifth for testing.

    Args:
        first: number of the first photograph; other numbers are other photographs.
    """
    from PIL import Image

    (root / "images").mkdir(parents=True)
    lines, names = ["image,caption"], []
    for number in range(first, first + images):
        rng = np.random.default_rng(number)
        height, width = (int(value) for value in rng.integers(40, 90, 2))
        coarse = rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)
        file = f"{number:04d}.jpg"
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(root / "images" / file)
        names.append(file)
        lines += [f'{file},"picture {number}, of colours"', f"{file},number {number} again"]
    (root / "captions.txt").write_text("\n".join(lines) + "\n")
    cut = images - images // 5
    (root / "train.txt").write_text("\n".join(names[:cut]) + "\n")
    (root / "test.txt").write_text("\n".join(names[cut:]) + "\n")
    return root


@pytest.fixture
def make_photos(tmp_path: Path) -> Callable[..., Path]:
    """Makes a dataset of photographs (``write_photos``) in a folder of this test."""

    def make(images: int = 20, name: str = "photos") -> Path:
        return write_photos(tmp_path / name, images)

    return make


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium; nothing is downloaded, and playwright's event loop ends with the module."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'teacher-cache[dev]'")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on the PATH: apt-get install chromium")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def moto() -> Iterator[ObjectStore]:
    """A moto server for all tests of a session."""
    with start_moto() as store:
        yield store


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A SeaweedFS server for all tests of a session."""
    with start_seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as store:
        yield store


@pytest.fixture(params=["moto", "seaweedfs"])
def object_store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """Each server in turn; the environment of this process and its children names it."""
    store: ObjectStore = request.getfixturevalue(request.param)
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    return store


@pytest.fixture
def proxy(moto: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A network in front of moto that fails on demand; the environment leads to it."""
    with start_fault_proxy(moto) as proxy:
        for name, value in proxy.front().environment.items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.fixture
def s3_location(object_store: ObjectStore) -> str:
    """An ``s3://`` location on each server in turn where nothing is yet."""
    return object_store.location(f"{uuid.uuid4()}/known.cache")


@pytest.fixture
def far(seaweedfs: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """SeaweedFS a tenth of a second away; the environment leads there."""
    with start_fault_proxy(seaweedfs, delay=0.1) as proxy:
        for name, value in proxy.front().environment.items():
            monkeypatch.setenv(name, value)
        yield proxy
