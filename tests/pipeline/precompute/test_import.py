"""Rows that another tool made are proven, then written: an ordinary cache, or nothing at all."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import ImageOps

from teacher_cache.pipeline.cli.app import app
from teacher_cache.pipeline.data.images.decode import UndecodableImageError, decode_image, decoded_size
from teacher_cache.pipeline.precompute import teacher_inputs
from teacher_cache.pipeline.precompute.forecast import forecast
from teacher_cache.pipeline.precompute.foreign.import_folder import ImportResult, import_rows
from teacher_cache.pipeline.precompute.repair import repair
from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.pipeline.settings.precompute import ImportConfig, PrecomputeConfig
from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.errors import CacheIncompleteError, CacheMismatchError, UsageError
from teacher_cache.storage.files.local import LocalFiles
from teacher_cache.storage.look.export import export_rows
from teacher_cache.storage.look.info import count_committed
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.commands import run_command
from tests.conftest import cache_digest, make_model_folder, write_photos
from tests.pipeline.data.odd_images import ODD_IMAGES
from tests.pipeline.precompute.conftest import make_config, prove, run_without_torch, settings
from tests.pipeline.precompute.foreign_folder import write_folder
from tests.precompute_process import FORK_SERVER

IMAGES = 20
CHUNKS = 3 + 5


@dataclass
class Home:
    """Photographs, a teacher, the cache that it made of them, and that cache's export with all captions."""

    photos: Path
    teacher: str
    cache: Path
    export: Path

    def settings(self, folder: Path, cache: Path, **changes: Any) -> dict[str, Any]:
        return {"folder": str(folder), **settings(self.photos, self.teacher, cache, **changes)}

    def bring(self, folder: Path, cache: Path, **changes: Any) -> ImportResult:
        return import_rows(ImportConfig(**self.settings(folder, cache, **changes)))

    def precompute_config(self, cache: Path, **changes: Any) -> PrecomputeConfig:
        return make_config(self.photos, self.teacher, cache, **changes)

    def precompute(self, cache: Path, **changes: Any) -> None:
        precompute(self.precompute_config(cache, **changes))

    def rows(self, tower: Any, cache: Path | None = None, array: str = "embedding") -> np.ndarray[Any, Any]:
        """Whole, NaN where a row is quarantined."""
        reader = EmbeddingReader(str(cache or self.cache))
        count = IMAGES if tower == "image" else 2 * IMAGES
        lost = {row.row for row in reader.quarantined} if tower == "image" else set()
        first = reader.take(tower, np.array([1]), array=array)
        values = np.full((count, *first.shape[1:]), np.nan, first.dtype)
        there = np.array([row for row in range(count) if row not in lost])
        values[there] = reader.take(tower, there, array=array)
        return values

    def like_clip_retrieval(self, to: Path, **changes: Any) -> Path:
        """Write a folder with one caption per image and seven rows a file."""
        return write_folder(
            to,
            **{
                "paths": [f"images/{row:04d}.jpg" for row in range(IMAGES)],
                "image": self.rows("image"),
                "captions": [f"picture {row}, of colours\n" for row in range(IMAGES)],
                "text": self.rows("text")[::2],
                "rows_per_file": 7,
                **changes,
            },
        )


@pytest.fixture(scope="module")
def home(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Home:
    root = tmp_path_factory.mktemp("home")
    made = Home(write_photos(root / "photos", IMAGES), f"local-dir:{tiny_teacher}", root / "cache", root / "export")
    made.precompute(made.cache)
    export_rows(str(made.cache), str(made.export), captions="all", rows_per_file=16)
    return made


@pytest.fixture
def passes(taught: Counter[str], monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Rows that the teacher is given, and images that are decoded for chunks."""
    decode = teacher_inputs.open_image

    def decoding(data: bytes, decoder: str) -> Any:
        taught["decoded"] += 1
        return decode(data, decoder)

    monkeypatch.setattr(teacher_inputs, "open_image", decoding)
    return taught


def assert_proven(home: Home, cache: Path) -> None:
    assert verify_cache(str(cache)).ok
    proof = prove(cache, home.teacher)
    assert proof.ok, proof.wrong


def test_an_export_comes_back_bit_for_bit_and_runs_the_teacher_for_the_sample_only(
    home: Home, tmp_path: Path, passes: Counter[str]
) -> None:
    result = home.bring(home.export, tmp_path / "c", sample=6)
    assert (passes["image"], passes["text"], passes["decoded"]) == (6, 6, 0)
    assert (result.images_imported, result.captions_imported) == (IMAGES, 2 * IMAGES)
    assert (result.images_encoded, result.captions_encoded, result.quarantined) == (0, 0, 0)
    assert (result.images_proven, result.captions_proven, result.chunks_written) == (6, 6, CHUNKS)
    for tower in ("image", "text"):
        np.testing.assert_array_equal(home.rows(tower, tmp_path / "c"), home.rows(tower))
        assert set(home.rows(tower, tmp_path / "c", "norm").tolist()) == {1.0}
    np.testing.assert_array_equal(home.rows("image", tmp_path / "c", "view"), home.rows("image", array="view"))
    ours, theirs = EmbeddingReader(str(tmp_path / "c")), EmbeddingReader(str(home.cache))
    assert ours.manifest.identity == theirs.manifest.identity
    assert ours.manifest.files == theirs.manifest.files  # samples, captions, problems, shapes
    said = "from a clip-retrieval folder, 20 image rows and 40 caption rows, 6 and 6 proven to cosine 0.999"
    assert ours.manifest.made_with["imported"] == said
    assert str(tmp_path) not in json.dumps(ours.manifest.made_with)
    assert_proven(home, tmp_path / "c")


def test_captions_that_the_folder_lacks_are_encoded(home: Home, tmp_path: Path, passes: Counter[str]) -> None:
    folder = home.like_clip_retrieval(tmp_path / "f")
    result = home.bring(folder, tmp_path / "c")
    # what is proven and what is lacking, no more
    assert (passes["image"], passes["text"], passes["decoded"]) == (IMAGES, IMAGES + IMAGES, 0)
    assert (result.images_imported, result.images_encoded) == (IMAGES, 0)
    assert (result.captions_imported, result.captions_encoded) == (IMAGES, IMAGES)
    np.testing.assert_array_equal(home.rows("image", tmp_path / "c"), home.rows("image"))
    text = home.rows("text", tmp_path / "c")
    np.testing.assert_array_equal(text[::2], home.rows("text")[::2])
    np.testing.assert_allclose(text[1::2], home.rows("text")[1::2], atol=1e-3)
    norm = home.rows("text", tmp_path / "c", "norm")
    assert set(norm[::2].tolist()) == {1.0}
    np.testing.assert_allclose(norm[1::2], home.rows("text", array="norm")[1::2], rtol=1e-4)
    assert_proven(home, tmp_path / "c")


def test_images_without_texts_and_rows_that_are_not_normalised(
    home: Home, tmp_path: Path, passes: Counter[str]
) -> None:
    raw = home.rows("image").astype(np.float32) * home.rows("image", array="norm")[:, None]
    folder = home.like_clip_retrieval(tmp_path / "f", image=raw, captions=None, text=None)
    result = home.bring(folder, tmp_path / "c", sample=5)
    assert (result.images_proven, result.captions_proven, result.captions_imported) == (5, 0, 0)
    assert (passes["image"], passes["text"]) == (5, 2 * IMAGES)
    np.testing.assert_allclose(home.rows("image", tmp_path / "c"), home.rows("image"), atol=1e-3)
    norms = [home.rows("image", cache, "norm") for cache in (tmp_path / "c", home.cache)]
    np.testing.assert_allclose(*norms, rtol=1e-3)
    np.testing.assert_array_equal(home.rows("text", tmp_path / "c"), home.rows("text"))  # whole chunks, as ever
    assert_proven(home, tmp_path / "c")


def test_rows_that_are_no_numbers_are_encoded_anew(home: Home, tmp_path: Path, passes: Counter[str]) -> None:
    image, text = home.rows("image"), home.rows("text")[::2].copy()
    image[3, 5], image[4], text[7] = np.nan, 0, np.inf
    result = home.bring(home.like_clip_retrieval(tmp_path / "f", image=image, text=text), tmp_path / "c", sample=5)
    assert result.matched.unusable == 3
    assert (result.images_encoded, result.images_imported) == (2, IMAGES - 2)
    assert (result.captions_encoded, result.captions_imported) == (IMAGES + 1, IMAGES - 1)
    assert (passes["image"], passes["decoded"], passes["text"]) == (5 + 2, 2, 5 + IMAGES + 1)
    np.testing.assert_allclose(home.rows("image", tmp_path / "c"), home.rows("image"), atol=1e-3)
    assert_proven(home, tmp_path / "c")


Change = Callable[[np.ndarray[Any, Any], np.ndarray[Any, Any]], tuple[Any, Any]]


def permuted(image: np.ndarray[Any, Any], text: np.ndarray[Any, Any]) -> tuple[Any, Any]:
    return image, text[np.random.default_rng(0).permutation(len(text))]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda image, text: (np.roll(image, 1, axis=0), np.roll(text, 1, axis=0)),
            r"20 of 20 image rows and 20 of 20 caption rows .* or they are not in the order of their metadata",
        ),
        (
            permuted,
            r"0 of 20 image rows and 20 of 20 caption rows .*caption row \d+ \(\d+\.jpg\), the folder's row \d+: ",
        ),
        (
            lambda image, text: (image[:, ::-1], text),
            r"20 of 20 image rows and 0 of 20 .* Another teacher, activation or",
        ),
    ],
    ids=["shifted", "permuted captions", "other rows"],
)
def test_wrong_rows_are_refused_and_nothing_is_written(home: Home, tmp_path: Path, change: Change, said: str) -> None:
    image, text = change(home.rows("image"), home.rows("text")[::2])
    folder = home.like_clip_retrieval(tmp_path / "f", image=image, text=text)
    with pytest.raises(CacheMismatchError, match=said) as refused:
        home.bring(folder, tmp_path / "c")
    assert str(refused.value).endswith("Nothing was written.")
    assert not (tmp_path / "c").exists()


def test_another_teachers_rows_are_refused(home: Home, tmp_path: Path) -> None:
    other = make_model_folder(tmp_path / "other", seed=5)
    with pytest.raises(CacheMismatchError, match=r"20 of 20 image rows and 40 of 40 caption rows that were drawn are"):
        home.bring(home.export, tmp_path / "c", teacher=f"local-dir:{other}")
    wide = make_model_folder(tmp_path / "wide", embed_dim=24)
    with pytest.raises(CacheMismatchError, match=r"rows are 16 wide, 24 those of local-dir:wide. Name the teacher th"):
        home.bring(home.export, tmp_path / "c", teacher=f"local-dir:{wide}")
    assert not (tmp_path / "c").exists()


def test_rows_of_mirrored_images_are_refused(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(teacher_inputs, "open_image", lambda data, decoder: ImageOps.mirror(decode_image(data)))
        home.precompute(tmp_path / "mirrored")
    folder = home.like_clip_retrieval(tmp_path / "f", image=home.rows("image", tmp_path / "mirrored"))
    with pytest.raises(CacheMismatchError, match=r"20 of 20 image rows and 0 of 20 caption rows"):
        home.bring(folder, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_one_wrong_row_is_refused_by_name_if_it_is_drawn(home: Home, tmp_path: Path) -> None:
    image = home.rows("image")
    image[11] = -image[11]
    folder = home.like_clip_retrieval(tmp_path / "f", image=image)
    with pytest.raises(CacheMismatchError, match=r"1 of 20 image rows .*image row 11 \(0011.jpg\), .* row 11: -1.0000"):
        home.bring(folder, tmp_path / "c")
    # a sample that does not draw it finds nothing, and says what it has shown
    seeds = [seed for seed in range(8) if _passes(home, folder, tmp_path / f"c{seed}", seed)]
    assert 0 < len(seeds) < 8


def _passes(home: Home, folder: Path, cache: Path, seed: int) -> bool:
    try:
        home.bring(folder, cache, sample=10, seed=seed)
    except CacheMismatchError:
        return False
    return True


def test_images_that_cannot_be_used_are_quarantined_whatever_the_folder_says(home: Home, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", IMAGES)
    data = (photos / "images/0003.jpg").read_bytes()
    (photos / "images/0003.jpg").write_bytes(data[: len(data) // 2])
    (photos / "images/0005.jpg").write_bytes(b"not an image")
    folder = home.like_clip_retrieval(tmp_path / "f")
    result = home.bring(folder, tmp_path / "c", dataset=f"flickr:{photos}")
    assert (result.quarantined, result.images_imported, result.images_encoded) == (2, IMAGES - 2, 0)
    assert (result.images_proven, result.problems) == (IMAGES - 2, {"undecodable-image": 2})
    home.precompute(tmp_path / "p", dataset=f"flickr:{photos}")
    lost = [EmbeddingReader(str(tmp_path / name)).quarantined for name in ("c", "p")]
    assert lost[0] == lost[1]
    assert_proven(home, tmp_path / "c")
    for path in (photos / "images").iterdir():
        path.write_bytes(b"not an image")
    with pytest.raises(CacheMismatchError, match=r"not one of 20 images that were drawn can be decoded"):
        home.bring(folder, tmp_path / "n", dataset=f"flickr:{photos}")


@pytest.mark.parametrize("odd", ODD_IMAGES, ids=lambda odd: odd.name)
def test_the_size_of_an_image_without_its_pixels_is_that_of_the_decoded_one(odd: Any) -> None:
    wanted, found = (_size_or_why(look, odd.data) for look in (lambda data: decode_image(data).size, decoded_size))
    # damage between header and end, which only decoding shows
    unseen = odd.name in {"pixels.png", "short.png"}
    assert (found != wanted) if unseen else (found == wanted)


def _size_or_why(look: Callable[[bytes], tuple[int, int]], data: bytes) -> tuple[int, int] | str:
    try:
        return look(data)
    except UndecodableImageError as error:
        return str(error)


def test_a_folder_of_other_images_is_refused(home: Home, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "f", ["/x/a.png", "/x/b.png"], home.rows("image")[:2])
    with pytest.raises(
        UsageError, match=r"none of its 2 rows is of flickr:.* first is '/x/a.png', .* 'images/0000.jpg' in /"
    ):
        home.bring(folder, tmp_path / "c")
    assert not (tmp_path / "c").exists()
    with pytest.raises(ValueError, match=r"hold the evaluation crop alone; for more, precompute --views N --reuse"):
        ImportConfig(**home.settings(folder, tmp_path / "c", views=2))


def _import_and_die(settings: dict[str, Any], after: int, half: bool) -> None:
    """Import in this process, which is killed when it has written so many chunks, or the objects of one more."""
    create, written = LocalFiles.create, [0]

    def watched(self: LocalFiles, key: str, data: bytes) -> bool:
        if written[0] == after and key.startswith("commits/" if half else "targets.zarr/") and "zarr.json" not in key:
            os.kill(os.getpid(), signal.SIGKILL)
        made = create(self, key, data)
        written[0] += key.startswith("commits/")
        return made

    LocalFiles.create = watched  # type: ignore[method-assign]
    import_rows(ImportConfig(**settings))
    os._exit(0)


@pytest.mark.parametrize(("after", "half"), [(0, False), (0, True), (2, False), (5, True), (7, False)])
def test_killed_and_run_again_it_ends_in_the_same_bytes(
    home: Home, tmp_path: Path, after: int, half: bool, passes: Counter[str]
) -> None:
    image = home.rows("image")
    image[[2, 9, 10, 15]] = np.nan  # so that chunks have rows of both kinds
    folder = home.like_clip_retrieval(tmp_path / "f", image=image)
    home.bring(folder, tmp_path / "whole")
    given = home.settings(folder, tmp_path / "c")
    process = FORK_SERVER.Process(target=_import_and_die, args=(given, after, half))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert count_committed(str(tmp_path / "c")) == (after, CHUNKS)
    with pytest.raises(
        CacheMismatchError, match=r"its rows were imported .*not all there yet. Run the same teacher-cache im"
    ):
        home.precompute(tmp_path / "c")
    with pytest.raises(CacheMismatchError, match=r"its rows were imported .*not all there yet"):
        forecast(home.precompute_config(tmp_path / "c"), probe=2)
    with pytest.raises(CacheIncompleteError, match=r"chunks are there\. Run the same import command again to finish"):
        EmbeddingReader(str(tmp_path / "c"))
    shown = CliRunner().invoke(app, ["info", str(tmp_path / "c")], env={"COLUMNS": "300"}).stdout
    assert "not complete. Run the same import command again to finish it" in shown
    assert home.bring(folder, tmp_path / "c").chunks_written == CHUNKS - after
    assert cache_digest(tmp_path / "c") == cache_digest(tmp_path / "whole")
    passes.clear()
    assert home.bring(folder, tmp_path / "c", sample=2).chunks_written == 0
    assert (passes["image"], passes["text"]) == (2, 2)


def test_a_cache_of_other_rows_or_of_the_teachers_own_is_left_alone(home: Home, tmp_path: Path) -> None:
    home.bring(home.export, tmp_path / "c")
    before = cache_digest(tmp_path / "c")
    with pytest.raises(
        CacheMismatchError, match=r"begun with other rows \(from a clip-retrieval folder, 20 image rows"
    ):
        home.bring(home.like_clip_retrieval(tmp_path / "f"), tmp_path / "c")
    assert cache_digest(tmp_path / "c") == before
    with pytest.raises(CacheMismatchError, match=r"made by the teacher itself, without an import. Finish it with tea"):
        home.bring(home.export, home.cache)


def test_damaged_imported_rows_come_back_by_import_and_not_from_the_teacher(home: Home, tmp_path: Path) -> None:
    cache = tmp_path / "c"
    result = home.bring(home.like_clip_retrieval(tmp_path / "f"), cache)
    (cache / "targets.zarr/text/embedding/c/1/0").write_bytes(b"damaged")
    (cache / "captions/000000.parquet").write_bytes(b"damaged")
    mended = repair(str(cache), teacher=home.teacher, device="cpu")
    assert (mended.ok, mended.left, mended.chunks_encoded) == (False, ("text/000001",), 0)
    assert [line.partition(":")[0] for line in mended.done] == ["captions/000000.parquet"]
    again = repair(str(cache), teacher=home.teacher, device="cpu")
    assert (again.ok, again.left, again.done) == (False, ("text/000001",), ())
    with pytest.raises(
        CacheMismatchError, match=r"its rows were imported .* are damaged. Run the same teacher-cache impor"
    ):
        home.precompute(cache)
    (cache / "commits/image/v0/000000.json").unlink()
    both = repair(str(cache), teacher=home.teacher, device="cpu")
    assert both.left == ("image/v0/000000", "text/000001")
    healed = home.bring(tmp_path / "f", cache)
    assert (healed.chunks_written, healed.manifest_digest) == (2, result.manifest_digest)
    assert_proven(home, cache)


def test_more_views_of_it_are_the_teachers(home: Home, tmp_path: Path) -> None:
    cache = tmp_path / "c"
    home.bring(home.export, tmp_path / "one")
    home.precompute(cache, views=2, reuse=str(tmp_path / "one"))
    reader = EmbeddingReader(str(cache))
    assert reader.views == 2
    np.testing.assert_array_equal(home.rows("image", cache), home.rows("image"))
    assert "; copied from cache" in reader.manifest.made_with["imported"]
    assert_proven(home, cache)
    (cache / "targets.zarr/image/norm/c/0/1").write_bytes(b"damaged")  # of the view that the teacher made
    mended = repair(str(cache), teacher=home.teacher, device="cpu")
    assert (mended.ok, mended.left, mended.chunks_encoded) == (True, (), 1)


def test_int8_rows_are_the_folders_up_to_half_a_step(home: Home, tmp_path: Path) -> None:
    image = home.rows("image").copy()
    image[[2, 9]] = np.nan  # two chunks with rows of both kinds
    folder, cache = home.like_clip_retrieval(tmp_path / "f", image=image), tmp_path / "c"
    flags = [
        f"--set={name}={value}" for name, value in settings(home.photos, home.teacher, cache, dtype="int8").items()
    ]
    done = CliRunner().invoke(app, ["import", str(folder), *flags, "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert (result["images_imported"], result["images_encoded"]) == (IMAGES - 2, 2)
    assert (result["captions_imported"], result["captions_encoded"]) == (IMAGES, IMAGES)
    shown = CliRunner().invoke(app, ["info", str(cache)]).stdout
    assert "16 wide, int8" in shown
    assert "from a clip-retrieval folder, 18 image rows" in shown

    reader = EmbeddingReader(str(cache))
    for ref in reader.commits():
        stored, rows = reader.stored_chunk(ref), ref.rows(reader.manifest.layout)
        step = stored["scale"].astype(np.float64)
        wanted = home.rows(ref.tower)[rows.start : rows.stop].astype(np.float64)
        given = np.array([row not in (2, 9) if ref.tower == "image" else row % 2 == 0 for row in rows])
        off = np.abs(stored["embedding"] * step - wanted)
        assert (off[given] <= step / 2 * (1 + 1e-6)).all()
        assert off[given].max() > 0
        assert (off[~given] <= step / 2 + 2**-10).all()  # the teacher's, in another batch
        np.testing.assert_array_equal(stored["norm"][given], 1)
    assert_proven(home, cache)

    before = cache_digest(cache)
    (cache / "targets.zarr/image/scale/c/1/0/0").write_bytes(b"damaged")
    assert repair(str(cache), teacher=home.teacher, device="cpu").left == ("image/v0/000001",)
    assert home.bring(folder, cache).chunks_written == 1  # in the dtype that the cache has
    assert cache_digest(cache) == before
    with pytest.raises(CacheMismatchError, match=r'targets\.dtype: "int8" in the cache, "float16" asked for'):
        home.bring(folder, cache, dtype="float16")


def test_the_command(home: Home, tmp_path: Path) -> None:
    folder = str(home.like_clip_retrieval(tmp_path / "f"))
    named = f"--dataset=flickr:{home.photos}"
    given = (named, "--teacher", home.teacher, "--device=cpu", "--set=chunk_rows=8")
    done = run_command("import", folder, *given, "--cache", str(tmp_path / "c"), "--sample", "4")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"{tmp_path}/c: 20 images and 40 captions by local-dir:tiny"
    assert lines[1] == "images: 20 imported, 0 encoded, 0 quarantined; captions: 20 imported, 20 encoded"
    assert lines[2].startswith("proven: 4 images and 4 captions against the live teacher, least cosine 1.00000")
    assert lines[3].startswith("8 of 8 chunks written in ")
    shown = run_command("info", str(tmp_path / "c")).stdout
    assert "from a clip-retrieval folder, 20 image rows" in shown
    np.save(tmp_path / "f/img_emb/img_emb_0.npy", -home.rows("image")[:7])
    wrong = run_command("import", folder, *given, "--cache", str(tmp_path / "d"))
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr.splitlines()[-1].startswith(
        f"error: {folder}: 7 of 20 image rows and 0 of 20 caption rows that"
    )
    missing = run_command("import", folder)
    assert missing.returncode == 2
    assert "dataset is missing: give --dataset; teacher is missing: give --teacher; cache is missing" in missing.stderr
    assert "set it in a run file" not in missing.stderr


def test_asking_for_help_loads_no_torch() -> None:
    assert "--threshold" in run_without_torch("import", "--help")
