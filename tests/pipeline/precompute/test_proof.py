"""The sampled proof passes what is right, and finds what every digest calls sound: rows that are not their images'."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from teacher_cache.pipeline.data.images.decode import decode_image
from teacher_cache.pipeline.precompute import teacher_inputs
from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.pipeline.precompute.sample_proof import ProofResult, fraction_shown
from teacher_cache.storage.errors import CacheCorruptError, CacheMismatchError, UsageError
from teacher_cache.storage.format.commits import QuarantinedRow
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.commands import run_command
from tests.conftest import make_model_folder, write_photos
from tests.pipeline.precompute.conftest import Rows, forge, make_config, rows_of, run_without_torch
from tests.pipeline.precompute.conftest import prove as prove_rows

IMAGES = 20


@dataclass
class Home:
    cache: Path
    photos: Path
    teacher: str


def encode(photos: Path, teacher: str, cache: Path) -> Path:
    precompute(make_config(photos, teacher, cache))
    return cache


@pytest.fixture(scope="module")
def home(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Home:
    root = tmp_path_factory.mktemp("home")
    photos = write_photos(root / "photos", IMAGES)
    (photos / "images" / "0006.jpg").write_bytes(b"not an image")
    teacher = f"local-dir:{tiny_teacher}"
    return Home(encode(photos, teacher, root / "sound"), photos, teacher)


def prove(home: Home, cache: Path | None = None, **changes: Any) -> ProofResult:
    return prove_rows(**{"cache": cache or home.cache, "teacher": home.teacher, **changes})


def test_a_right_cache_is_proven(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(EmbeddingReader, "samples")  # a table in memory: it may have ten million rows
    proof = prove(home)
    assert proof.ok, proof.wrong
    assert (proof.images_compared, proof.captions_compared, proof.quarantined_checked) == (IMAGES - 1, 2 * IMAGES, 1)
    assert proof.least_cosine is not None
    assert proof.least_cosine > 0.99999
    few = prove(home, sample=5)
    assert few.images_compared + few.quarantined_checked == 5 == few.captions_compared


def test_another_precision_of_the_same_teacher_stays_above_the_threshold(home: Home) -> None:
    proof = prove(home, precision="bf16")
    assert proof.ok, proof.wrong
    assert proof.precision == "bf16"
    assert proof.least_cosine is not None
    assert 0.999 < proof.least_cosine < 0.999999  # it really was another arithmetic


def test_on_a_cpu_the_teacher_keeps_the_memory_that_its_layers_free(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[str] = []
    monkeypatch.setattr(
        "teacher_cache.pipeline.precompute.sample_proof.keep_freed_memory", lambda device: kept.append(device.type)
    )
    prove(home)
    assert kept == ["cpu"]


def test_rows_shifted_by_one_are_found(home: Home, tmp_path: Path) -> None:
    def shift(rows: Rows) -> None:
        for arrays in rows.values():
            for name, values in arrays.items():
                arrays[name] = np.roll(values, 1, axis=0)

    lost = QuarantinedRow(row=7, sample_id="0007.jpg", reason="undecodable-image", detail="?")
    proof = prove(home, forge(home.cache, tmp_path / "c", shift, (lost,)))
    assert not proof.ok
    wrong = {(row.tower, row.row): row for row in proof.wrong}
    # image 6 cannot be decoded, though it has a row now; 7 can be, though it has none
    assert {row for tower, row in wrong if tower == "image"} == set(range(IMAGES))
    assert wrong["image", 3].sample_id == "0003.jpg"
    assert wrong["image", 3].cosine is not None
    assert wrong["image", 3].cosine < 0.999
    assert "unusable here" in wrong["image", 6].what
    assert "quarantined as undecodable-image (?), but it can be encoded here" in wrong["image", 7].what
    assert len([key for key in wrong if key[0] == "text"]) > IMAGES


def test_another_teachers_rows_under_this_identity_are_found(home: Home, tmp_path: Path) -> None:
    other = rows_of(encode(home.photos, f"local-dir:{make_model_folder(tmp_path / 'other', seed=5)}", tmp_path / "o"))
    proof = prove(home, forge(home.cache, tmp_path / "c", lambda rows: rows.update(other)))
    assert len(proof.wrong) == IMAGES - 1 + 2 * IMAGES


def test_mirrored_crops_are_found(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(teacher_inputs, "open_image", lambda data, decoder: ImageOps.mirror(decode_image(data)))
        mirrored = rows_of(encode(home.photos, home.teacher, tmp_path / "mirrored"))["image", 0]
    proof = prove(home, forge(home.cache, tmp_path / "c", lambda rows: rows.update({("image", 0): mirrored})))
    assert {row.tower for row in proof.wrong} == {"image"}
    assert len(proof.wrong) > (IMAGES - 1) * 3 // 4  # a few of these photographs look much the same either way


def test_a_crop_that_is_stored_wrong_is_found(home: Home, tmp_path: Path) -> None:
    def flip(rows: Rows) -> None:
        rows["image", 0]["view"][3, 4] = 1.0

    (wrong,) = prove(home, forge(home.cache, tmp_path / "c", flip)).wrong
    assert (wrong.tower, wrong.row, wrong.sample_id) == ("image", 3, "0003.jpg")
    assert "is stored" in wrong.what


def test_permuted_captions_are_found(home: Home, tmp_path: Path) -> None:
    def permute(rows: Rows) -> None:
        order = np.random.default_rng(0).permutation(2 * IMAGES)
        for name, values in rows["text", 0].items():
            rows["text", 0][name] = values[order]

    proof = prove(home, forge(home.cache, tmp_path / "c", permute))
    assert {row.tower for row in proof.wrong} == {"text"}
    assert len(proof.wrong) > IMAGES


def test_a_few_bad_rows_are_found_as_often_as_the_formula_says(home: Home, tmp_path: Path) -> None:
    """One caption of ten is another's: N rows find that with at least probability p."""
    bad = [3, 13, 23, 33]

    def exchange(rows: Rows) -> None:
        for name, values in rows["text", 0].items():
            rows["text", 0][name][bad] = values[[row + 4 for row in bad]]

    cache = forge(home.cache, tmp_path / "c", exchange)
    assert [row.row for row in prove(home, cache).wrong] == bad
    assert fraction_shown(22, 0.9) < 0.1 < fraction_shown(21, 0.9)
    assert sum(not prove(home, cache, sample=22, seed=seed).ok for seed in range(20)) >= 18


@pytest.mark.parametrize(("fraction", "probability", "rows"), [(0.01, 0.99, 459), (0.1, 0.99, 44), (0.5, 0.99, 7)])
def test_how_many_rows(fraction: float, probability: float, rows: int) -> None:
    assert rows == math.ceil(math.log(1 - probability) / math.log(1 - fraction))
    assert fraction_shown(rows, probability) <= fraction < fraction_shown(rows - 1, probability)


def test_the_draw_is_seeded(home: Home) -> None:
    first, again, other = (prove(home, sample=4, seed=seed, threshold=1.0) for seed in (1, 1, 2))
    assert first.model_dump(exclude={"seconds"}) == again.model_dump(exclude={"seconds"})
    assert first.least_cosine_row != other.least_cosine_row or first.wrong != other.wrong


def test_a_quarantined_row_that_is_fine_is_found(home: Home, tmp_path: Path) -> None:
    lost = (
        QuarantinedRow(row=6, sample_id="0006.jpg", reason="not-finite", detail="NaN"),
        QuarantinedRow(row=9, sample_id="0009.jpg", reason="not-finite", detail="NaN"),
    )

    def lose(rows: Rows) -> None:
        for values in rows["image", 0].values():
            values[9] = np.nan

    proof = prove(home, forge(home.cache, tmp_path / "c", lose, lost))
    assert [(row.row, row.cosine) for row in proof.wrong] == [(6, None), (9, None)]
    assert "quarantined as not-finite (NaN), but here it fails otherwise" in proof.wrong[0].what
    assert "but it can be encoded here" in proof.wrong[1].what


def test_images_that_are_not_the_cached_ones_are_named(home: Home, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", IMAGES)
    (photos / "images" / "0006.jpg").write_bytes(b"not an image")
    assert prove(home, image_root=str(photos)).ok
    assert prove(home, dataset=f"flickr:{photos}").ok
    Image.new("RGB", (50, 50)).save(photos / "images" / "0011.jpg")
    with pytest.raises(CacheMismatchError, match=r"image row 11 \(0011.jpg\): .*0011.jpg: not the image that"):
        prove(home, image_root=str(photos))
    (photos / "images" / "0011.jpg").unlink()
    with pytest.raises(
        CacheMismatchError, match=r"image row 11 \(0011.jpg\): .*not there. Name the folder .*--image-r"
    ):
        prove(home, image_root=str(photos))


def test_another_teacher_is_refused(home: Home, tmp_path: Path) -> None:
    other = make_model_folder(tmp_path / "other", seed=5)
    with pytest.raises(CacheMismatchError, match=r"teacher.weights_sha256"):
        prove(home, teacher=f"local-dir:{other}")
    with pytest.raises(UsageError, match=r"Give --teacher local-dir:PATH"):
        prove(home, teacher=None)


def test_a_damaged_cache_is_not_proven(home: Home, tmp_path: Path) -> None:
    cache = encode(home.photos, home.teacher, tmp_path / "c")
    (cache / "targets.zarr/text/embedding/c/1/0").write_bytes(b"damaged")
    with pytest.raises(CacheCorruptError, match=r"text/embedding/c/1/0: 7 bytes"):
        prove(home, cache)


def test_the_command(home: Home, tmp_path: Path) -> None:
    """verify alone says sound and loads no torch; with --sample it names rows and exits 1."""

    def shift(rows: Rows) -> None:
        rows["text", 0] = {name: np.roll(values, 1, axis=0) for name, values in rows["text", 0].items()}

    forged = str(forge(home.cache, tmp_path / "c", shift))

    assert run_command("verify", forged).returncode == 0
    sampled = ("--sample", "8", "--teacher", home.teacher, "--device", "cpu")
    good, bad = run_command("verify", str(home.cache), *sampled), run_command("verify", forged, *sampled, "--json")
    assert good.returncode == 0, good.stderr
    assert "as the teacher makes them: 8 images and 8 captions against local-dir:tiny on cpu in fp32" in good.stdout
    assert "threshold 0.999, least cosine 1.0" in good.stdout
    assert "a fault in 43.77% of all images, or captions, would have shown with 99 % probability" in good.stdout
    # a number may be left out: as many as find a fault in 1 % of the rows, or all there are
    alone = run_command("verify", str(home.cache), *sampled[2:], "--sample")
    assert "a fault in 20.57% of all images, or captions, would have shown" in alone.stdout  # 20 images
    assert bad.returncode == 1
    found = json.loads(bad.stdout)
    assert (found["ok"], found["findings"], found["chunks_sound"]) == (False, [], 3 + 5)
    assert {"tower", "row", "sample_id", "cosine"} <= set(found["proof"]["wrong"][0])
    wrong = run_command("verify", str(home.cache), "--teacher", home.teacher)
    assert (wrong.returncode, wrong.stderr) == (2, "error: --teacher needs --sample: plain verify loads no teacher\n")


def test_verify_without_a_sample_loads_no_torch(home: Home) -> None:
    run_without_torch("verify", str(home.cache))
