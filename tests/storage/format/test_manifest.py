"""The manifest proves itself and says exactly what differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.storage.errors import (
    CacheCorruptError,
    CacheError,
    CacheFormatError,
    CacheMismatchError,
    CacheNotFoundError,
)
from teacher_cache.storage.files.local import LocalFiles
from teacher_cache.storage.format.identity import ViewsIdentity, digest_of
from teacher_cache.storage.format.manifest import CacheManifest
from teacher_cache.storage.format.manifest_file import read_manifest
from tests.conftest import DRAWN, make_identity, plan_known_cache


def edit(path: Path, redigest: bool = True, **changes: Any) -> bytes:
    fields = json.loads((path / "manifest.json").read_text())
    fields.update(changes)
    if redigest:
        fields.pop("digest")
        fields["digest"] = digest_of(fields)
    return json.dumps(fields).encode()


def test_round_trip(known_cache: Path) -> None:
    data = (known_cache / "manifest.json").read_bytes()
    manifest = CacheManifest.from_bytes(data, "here")
    assert manifest.to_bytes() == data
    assert manifest.sealed


@pytest.mark.parametrize(
    ("changes", "redigest", "error", "said"),
    [
        (
            {"made_with": {}},
            False,
            CacheCorruptError,
            r"here/manifest.json: content has digest \w{12}, \w{12} is recorded",
        ),
        (
            {"format_version": 4},
            True,
            CacheFormatError,
            "format version 4, this teacher-cache reads 1 to 3. Install a newer",
        ),
        ({"identity_digest": "0" * 64}, True, CacheFormatError, "identity_digest is 0000"),
        ({"files": {"samples/../../x": {"sha256": "0"}}}, True, CacheFormatError, "'samples/../../x', which is not be"),
        ({"files": {"samples/\x00": {"sha256": "0"}}}, True, CacheFormatError, r"'samples/\\x00', which is not below"),
        ({"files": {"s3://bucket/key": {"sha256": "0"}}}, True, CacheFormatError, "'s3://bucket/key', which is not be"),
    ],
)
def test_an_edited_manifest_is_refused(
    known_cache: Path, changes: dict[str, Any], redigest: bool, error: type[CacheError], said: str
) -> None:
    with pytest.raises(error, match=said):
        CacheManifest.from_bytes(edit(known_cache, redigest, **changes), "here")


@pytest.mark.parametrize(
    ("data", "error", "said"),
    [
        (b'{"zarr_format": 3}', CacheFormatError, "format is None, 'teacher-cache' wanted"),
        (b"[]", CacheFormatError, "format is 'list'"),
        (b"{", CacheCorruptError, "not JSON"),
    ],
)
def test_another_tools_file_is_refused(data: bytes, error: type[CacheError], said: str) -> None:
    with pytest.raises(error, match=said):
        CacheManifest.from_bytes(data, "here")


def test_no_cache_at_all(tmp_path: Path) -> None:
    with pytest.raises(CacheNotFoundError, match=r"nothing: no cache here .* start one with teacher-cache precompute"):
        read_manifest(LocalFiles(str(tmp_path / "nothing")))


def test_a_difference_names_the_field_and_both_values() -> None:
    here, wanted = make_identity(), make_identity(activation="QuickGELU", logit_scale=100.0)
    assert here.digest != wanted.digest
    with pytest.raises(CacheMismatchError) as caught:
        here.require(wanted, "f8k.cache")
    assert str(caught.value) == (
        "f8k.cache: this cache is not the one asked for. "
        'teacher.activation: "GELU" in the cache, "QuickGELU" asked for; '
        "teacher.logit_scale: 20.0 in the cache, 100.0 asked for. "
        "Encode to a new path, or ask for what the cache holds (teacher-cache info shows it)."
    )


def test_names_alone_are_no_difference() -> None:
    here, wanted = make_identity(), make_identity(name="the same weights, moved", pretrained="openai")
    assert here.digest == wanted.digest
    assert here.differences(wanted) == []


@pytest.mark.parametrize(("probe", "agree"), [("AgECAw==", True), ("BQECAw==", False), ("AAE=", False)])
def test_probe_pixels_may_differ_by_two_levels(probe: str, agree: bool) -> None:
    here = make_identity()  # its probe is 0, 1, 2, 3
    wanted = here.model_copy(update={"preprocess": here.preprocess.model_copy(update={"probe": probe})})
    assert here.digest == wanted.digest
    assert (here.differences(wanted) == []) is agree


@pytest.mark.parametrize(
    ("views", "layout_views", "said"),
    [
        ({}, 4, "3 views in the identity, 4 in the layout"),
        ({"scale": None}, 3, "a single view has the evaluation policy"),
        ({"policy": "evaluation"}, 3, "a single view has the evaluation policy"),
    ],
)
def test_views_that_do_not_add_up_are_refused(
    tmp_path: Path, views: dict[str, Any], layout_views: int, said: str
) -> None:
    manifest = plan_known_cache(tmp_path / "c", views=3)
    identity = manifest.identity.model_copy(update={"views": DRAWN.model_copy(update=views)})
    changed = {"identity": identity.fields(), "identity_digest": identity.digest}
    changed["layout"] = {**manifest.layout.fields(), "views": layout_views}
    with pytest.raises(CacheFormatError, match=said):
        CacheManifest.from_bytes(edit(tmp_path / "c", **changed), "here")


def test_which_views_hold_which() -> None:
    one, two = ViewsIdentity(policy="evaluation"), DRAWN.model_copy(update={"count": 2})
    assert DRAWN.holds(one)
    assert DRAWN.holds(two)
    assert not two.holds(DRAWN)
    assert not DRAWN.holds(DRAWN.model_copy(update={"seed": 1}))
    assert not one.holds(DRAWN)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_rows": 10**15}, "image_rows\n.*less than or equal to 10000000000"),
        ({"embed_dim": 2**62}, "embed_dim\n.*less than or equal to 65536"),
        ({"image_rows": 10**9, "image_chunk_rows": 1}, "1,000,000,007 chunks, at most 4,194,304 are read"),
    ],
)
def test_a_few_large_numbers_cannot_fill_the_memory(known_cache: Path, changes: dict[str, int], said: str) -> None:
    layout = json.loads((known_cache / "manifest.json").read_text())["layout"] | changes
    with pytest.raises(CacheFormatError, match=said):
        CacheManifest.from_bytes(edit(known_cache, layout=layout), "here")
