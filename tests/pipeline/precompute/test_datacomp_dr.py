"""Shards in the layout of DataCompDR: text rows are proven and imported, rows of images are left aside by name."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from teacher_cache.pipeline.models.teacher import load_teacher
from teacher_cache.pipeline.precompute.foreign.datacomp_dr import open_foreign
from teacher_cache.pipeline.precompute.foreign.import_folder import ImportResult, import_rows
from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.pipeline.settings.precompute import ImportConfig
from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.errors import CacheMismatchError, UsageError
from teacher_cache.storage.read.reader import EmbeddingReader
from tests.conftest import make_model_folder, write_photos
from tests.pipeline.data.dataset_files import read, told, write_tar
from tests.pipeline.precompute.conftest import make_config, prove, settings

IMAGES, SYNTHETIC, AUGMENTATIONS, DIM = 6, 2, 3, 16
Members = dict[str, bytes]


def captions(image: int) -> list[str]:
    """The image's own caption, then the synthetic ones."""
    return [f"picture {image}", *(f"a synthetic {image} of {number}" for number in range(SYNTHETIC))]


def packed(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def sample(image: int, picture: bytes, text: np.ndarray[Any, Any]) -> Members:
    """The members of one sample; RandAugment leaves the first augmentation a crop, by chance."""
    augmentations = [
        [[14, 3, 37, 42], [[0, 0.0], [0, 0.0]]],
        [[2, 1, 30, 29], [[2, -0.09], [5, -30.45]]],
        [[2, 1, 30, 29], [[13, 0.0], [11, 178.5]]],
    ]
    return {
        "jpg": picture,
        "txt": f"picture {image}\n".encode(),
        "url.txt": b"https://example.com/a.jpg",
        "syn.json": json.dumps({"syn_text": captions(image)[1:]}).encode(),
        "paug.json": json.dumps({"param_aug": json.dumps(augmentations)}).encode(),
        "npz": packed(image_emb=np.ones((AUGMENTATIONS, text.shape[1]), np.float16), text_emb=text),
        "json": json.dumps({"uid": f"{image:032x}", "sha256": "0" * 64}).encode(),
    }


@pytest.fixture(scope="module")
def samples(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Members]:
    """Rows of an ensemble of two: noise, then the tiny teacher, its caption row first."""
    root, random = write_photos(tmp_path_factory.mktemp("photos"), IMAGES), np.random.default_rng(0)
    teacher = load_teacher(f"local-dir:{tiny_teacher}", None, "cpu", "fp32", "pillow")
    made = {}
    for image, path in enumerate(sorted((root / "images").iterdir())[:IMAGES]):
        own = teacher.encode_texts(teacher.tokenizer(captions(image))).embedding
        other = random.standard_normal((1 + SYNTHETIC, DIM))
        rows = np.concatenate([other / np.linalg.norm(other, axis=1, keepdims=True), own], axis=1)
        made[f"{image:06d}"] = sample(image, path.read_bytes(), rows.astype(np.float16))
    return made


def write(folder: Path, samples: dict[str, Members]) -> Path:
    """Two tars."""
    for part in range(2):
        of_part = list(samples.items())[part * 4 : (part + 1) * 4]
        members = [(f"{key}.{ending}", data) for key, own in of_part for ending, data in own.items()]
        write_tar(folder / f"{part:05d}.tar", members)  # type: ignore[arg-type]
    return folder


def bring(shards: Path, teacher: Path, cache: Path, **changes: Any) -> ImportResult:
    named = {"dataset": f"webdataset:{shards}?syn=syn_text", "folder": str(shards), "columns": "16:32", **changes}
    return import_rows(ImportConfig(**settings(shards, teacher, cache, **named)))


def test_text_rows_are_imported_and_the_rest_encoded(
    samples: dict[str, Members],
    tiny_teacher: Path,
    tmp_path: Path,
    taught: Counter[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    shards, ours, theirs = write(tmp_path / "dr", samples), tmp_path / "a.cache", tmp_path / "b.cache"
    result = bring(shards, tiny_teacher, theirs, sample=4)
    assert taught == {"image": IMAGES, "text": 4}
    every = IMAGES * (1 + SYNTHETIC)
    assert (result.captions, result.captions_imported, result.captions_proven) == (every, every, 4)
    assert (result.images_encoded, result.images_imported, result.problems) == (IMAGES, 0, {})
    said = "from DataCompDR shards, 0 image rows and 18 caption rows, 0 and 4 proven to cosine 0.999"
    assert EmbeddingReader(str(theirs)).manifest.made_with["imported"] == said
    # ShearY by -0.09 comes before the rotation
    left = f"{shards}/00000.tar: 000000.paug.json: augmentation 1 is also ShearY (-0.09). A cache holds"
    assert left in capsys.readouterr().err
    precompute(make_config(shards, tiny_teacher, ours, dataset=f"webdataset:{shards}?syn=syn_text"))
    one, other = (EmbeddingReader(str(cache)).take("text", np.arange(every)) for cache in (ours, theirs))
    np.testing.assert_allclose(other.astype(np.float32), one.astype(np.float32), atol=2e-3)
    assert verify_cache(str(theirs)).ok
    assert prove(theirs, f"local-dir:{tiny_teacher}").ok


def test_rows_of_another_teacher_are_refused_by_name(
    samples: dict[str, Members], tiny_teacher: Path, tmp_path: Path
) -> None:
    shards, cache = write(tmp_path / "dr", samples), tmp_path / "c"
    said = r"18 of 18 caption rows that were drawn are not what .*caption row \d+ \(00000\d\)"
    with pytest.raises(CacheMismatchError, match=said):
        bring(shards, make_model_folder(tmp_path / "other", seed=1), cache)
    with pytest.raises(CacheMismatchError, match=said):
        bring(shards, tiny_teacher, cache, columns="0:16")
    with pytest.raises(CacheMismatchError, match=r"rows are 32 wide, 16 those of .*its part: --columns 0:768"):
        bring(shards, tiny_teacher, cache, columns=None)
    assert not cache.exists()


def test_shards_without_the_images_own_captions_are_matched_by_the_others(
    samples: dict[str, Members], tmp_path: Path
) -> None:
    alone = {key: {ending: own[ending] for ending in ("syn.json", "paug.json", "npz")} for key, own in samples.items()}
    steps: list[Any] = []
    source = open_foreign(str(write(tmp_path / "dr", alone)), "16:32", lambda *step: steps.append(step))
    assert (source.rows, source.dim, source.towers) == (18, DIM, ("text",))
    assert steps == [("read tars", 1, 2), ("read tars", 2, 2)]
    parts = list(source.columns("sample_id", "image_path", "caption"))
    assert [first for first, _ in parts] == [0, 12]
    assert parts[1][1]["caption"].to_pylist()[:3] == [None, *captions(4)[1:]]
    assert parts[1][1]["image_path"].null_count == 6
    wanted = np.array([17, 1, 12])
    embedding, norm, usable = source.take("text", wanted)
    for row, number in zip(embedding, wanted, strict=True):
        with np.load(io.BytesIO(samples[f"{number // 3:06d}"]["npz"])) as arrays:
            np.testing.assert_array_equal(row, arrays["text_emb"][number % 3, 16:])
    assert norm.tolist() == [1] * 3
    assert usable.all()


def drop(ending: str) -> Callable[[Members], Any]:
    return lambda members: members.pop(ending)


def put(ending: str, data: bytes) -> Callable[[Members], Any]:
    return lambda members: members.update({ending: data})


_ROWS = np.ones((3, 32), np.float16)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            drop("npz"),
            r"00000.tar: the sample '000000' has no \.npz, only txt, syn.json, paug.json, jpg, url.txt, json",
        ),
        (drop("syn.json"), r"00000.tar: the sample '000000' has no \.syn\.json, only"),
        (drop("paug.json"), r"00000.tar: the sample '000000' has no \.paug\.json, only"),
        (put("syn.json", b'{"texts": []}'), r"00000.tar/000000.syn.json: .* the keys texts; syn_text is wanted"),
        (put("paug.json", b"{}"), r"00000.tar/000000.paug.json: .* the keys none; param_aug is wanted"),
        (put("paug.json", b'{"param_aug": "[1]"}'), r"00000.tar: 000000.paug.json: param_aug is not a list of crops"),
        (put("npz", packed(image_emb=_ROWS)), r"00000.tar: 000000.npz has no text_emb"),
        (put("npz", packed(text_emb=_ROWS[:2])), r"text_emb is float16 of shape \(2, 32\); .* of 2 synthetic ones"),
        (put("npz", b"PK\3\4"), r"00000.tar: 000000.npz cannot be read"),
        (put("npz", packed(text_emb=np.array([print]))), r"00000.tar: 000000.npz cannot be read \(Object arrays"),
    ],
)
def test_what_a_sample_lacks_is_named_with_its_tar(
    samples: dict[str, Members], tmp_path: Path, change: Callable[[Members], Any], said: str
) -> None:
    changed = {key: dict(own) for key, own in samples.items()}
    change(changed["000000"])
    with pytest.raises(UsageError, match=said):
        open_foreign(str(write(tmp_path / "dr", changed)), None)


def test_columns_that_are_not_there_are_refused(samples: dict[str, Members], tmp_path: Path) -> None:
    shards = write(tmp_path / "dr", samples)
    with pytest.raises(UsageError, match=r"--columns 16:48: rows of .* have the columns 0:32"):
        open_foreign(str(shards), "16:48")
    with pytest.raises(UsageError, match=r"--columns 0:8 takes a part of the rows of DataCompDR's tars; .* is none"):
        open_foreign(str(tmp_path), "0:8")


def test_synthetic_captions_follow_the_images_own(samples: dict[str, Members], tmp_path: Path) -> None:
    own, none, wrong = (dict(samples[key]) for key in ("000000", "000001", "000002"))
    del none["txt"], wrong["syn.json"]
    shards = write(tmp_path / "dr", {"0": own, "1": none, "2": wrong})
    found, problems = read("webdataset", shards, syn="syn_text")
    assert [list(each.captions) for each in found] == [captions(0), captions(1)[1:], captions(2)[:1]]
    assert not problems
    found, problems = read("webdataset", shards, syn="other")
    assert [list(each.captions) for each in found] == [captions(0)[:1], captions(2)[:1]]
    assert told(problems)[0] == ("bad-record", "00000.tar/0.syn.json", False)
    # without the setting, as ever
    assert [list(each.captions) for each in read("webdataset", shards)[0]] == [captions(0)[:1], captions(2)[:1]]
