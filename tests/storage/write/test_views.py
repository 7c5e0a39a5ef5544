"""The manifest accounts for every view, and whoever writes it holds the claim on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from teacher_cache.storage.errors import CacheFormatError
from teacher_cache.storage.files.location import LocalFiles
from teacher_cache.storage.format.commits import generation_chunks
from teacher_cache.storage.format.identity import ViewsIdentity, digest_of
from teacher_cache.storage.format.manifest import CacheManifest, StaticFile
from teacher_cache.storage.format.manifest_file import read_manifest
from teacher_cache.storage.write.claims import PLAN, Claims, clear_claims
from teacher_cache.storage.write.writer import EmbeddingWriter

DRAWN = ViewsIdentity(policy="random-resized-crop", count=3, scale=(0.3, 1.0), ratio=(0.75, 1.25), flip=0.5, seed=0)


def more(views: ViewsIdentity, count: int) -> ViewsIdentity:
    return views.model_copy(update={"count": count})


def test_a_manifest_with_more_views_reads_back(known_cache: Path) -> None:
    manifest = read_manifest(LocalFiles(str(known_cache)))
    three = manifest.with_views(DRAWN, {}, manifest.made_with)
    five = three.with_views(more(DRAWN, 5), {"targets.zarr/zarr.json": StaticFile(sha256="0" * 64)}, {"torch": "1"})
    assert CacheManifest.from_bytes(five.to_bytes(), "here") == five
    assert [five.views_of(generation) for generation in five.generations] == [(0, 1), (1, 3), (3, 5)]
    assert (five.sealed, five.sealed_views, five.layout.num_chunks) == (False, 1, 5 * 3 + 7)
    assert [generation.made_with for generation in five.generations] == [None, None, {"torch": "1"}]
    assert [len(generation_chunks(five, generation)) for generation in five.generations] == [3 + 7, 6, 6]
    assert five.adds_views_to(three)
    assert three.adds_views_to(manifest)
    assert not manifest.adds_views_to(three)
    # what had been written before views were known has none of the new fields
    fields = json.loads(manifest.to_bytes())
    assert set(fields["identity"]["views"]) == {"policy", "count"}
    assert "views" not in fields["generations"][0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layout": 4}, "3 views in the identity, 4 in the layout"),
        ({"spans": [[1, 2]]}, r"generations added views \[\(1, 2\)\], which do not lead to the 3 there are"),
        ({"spans": [[2, 3], [1, 2]]}, "do not lead to the 3"),
        ({"spans": [[0, 3]]}, "do not lead to the 3"),
        ({"spans": [[1, 3], [3, 3]]}, "do not lead to the 3"),
        ({"scale": None}, "one view is the evaluation crop, more are drawn and say how"),
        ({"policy": "evaluation"}, "one view is the evaluation crop, more are drawn and say how"),
    ],
)
def test_views_that_do_not_add_up_are_refused(known_cache: Path, change: dict[str, Any], said: str) -> None:
    manifest = read_manifest(LocalFiles(str(known_cache))).with_views(DRAWN, {}, {})
    fields = json.loads(manifest.to_bytes())
    fields.pop("digest")
    views = fields["identity"]["views"]
    if "layout" in change:
        fields["layout"]["views"] = change["layout"]
    if "spans" in change:
        first, added = fields["generations"]
        fields["generations"] = [first, *({**added, "views": span} for span in change["spans"])]
    if "scale" in change:
        del views["scale"]
    views.update({name: value for name, value in change.items() if name == "policy"})
    identity = {part: dict(value) for part, value in fields["identity"].items()}
    for part, name in (("teacher", "name"), ("teacher", "pretrained"), ("dataset", "kind"), ("preprocess", "probe")):
        identity[part].pop(name, None)
    fields["identity_digest"] = digest_of(identity)
    fields["digest"] = digest_of(fields)
    with pytest.raises(CacheFormatError, match=said):
        CacheManifest.from_bytes(json.dumps(fields).encode(), "here")


def test_what_holds_what() -> None:
    one = ViewsIdentity(policy="evaluation")
    assert DRAWN.holds(one)
    assert DRAWN.holds(more(DRAWN, 2))
    assert not DRAWN.holds(more(DRAWN, 4))
    assert not DRAWN.holds(DRAWN.model_copy(update={"seed": 1}))
    assert not one.holds(DRAWN)


def test_clearing_leaves_the_claim_on_the_manifest_while_its_process_lives(known_cache: Path) -> None:
    files = LocalFiles(str(known_cache))
    with Claims(files) as claims:
        assert claims.take(PLAN)
        assert claims.take("image/v1/000000")
        EmbeddingWriter(str(known_cache)).seal()  # changes nothing, and so waits for nobody
        assert [key for key in files.list("claims") if not key.startswith("claims/alive")] == ["claims/plan.0.json"]
    clear_claims(files)
    assert files.list("claims") == []


def test_a_read_of_one_view_is_what_it_was(known_cache: Path) -> None:
    """Views left out, given as a number or for each row: the same rows."""
    from teacher_cache.storage.read.reader import EmbeddingReader

    reader, rows = EmbeddingReader(str(known_cache)), np.array([9, 0, 4, 4])
    assert reader.views == 1
    for view in (0, np.zeros(4, np.int64)):
        np.testing.assert_array_equal(reader.take("image", rows, view), reader.take("image", rows))
