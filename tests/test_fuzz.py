"""Whatever bytes a stranger's file holds: taken, refused as documented, or a counted problem. ``benchmarks/fuzz.py``
runs the same targets for hours where somebody wants that."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from teacher_cache.pipeline.data.datasets import records
from teacher_cache.pipeline.data.datasets.adapters import coco
from teacher_cache.storage.format.identity import digest_of
from tests.fuzz_targets import TARGETS
from tests.hostile_files import HOSTILE

# the same examples each time: a red run is red for everybody
CI = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
WITH_JSON = ("coco", "karpathy", "imagefolder", "labelled", "scenes", "manifest", "commit")

_NASTY = st.sampled_from(
    [
        None,
        True,
        -1,
        0.5,
        float("nan"),
        float("inf"),
        2**63,
        10**400,
        "",
        "\0",
        "\ud83d",
        "\udcff",
        "../x",
        "/etc/passwd",
        "https://u:p@h/x.png",
        "a\nb",
        "a.png",
        "\x1b[31m",
        "x" * 20_000,
        [],
        {},
        [[]],
        {"a": 1},
    ]
)
_EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "delete", "repeat", "zero"]),
        st.floats(0, 1, allow_nan=False),
        st.binary(min_size=1, max_size=12),
    ),
    min_size=1,
    max_size=6,
)


def edited(data: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    for what, place, other in edits:
        at = int(place * len(data))
        if what == "flip":
            data = (
                data[:at]
                + bytes(one ^ two for one, two in zip(data[at:], other, strict=False))
                + data[at + len(other) :]
            )
        elif what == "cut":
            data = data[:at]
        elif what == "insert":
            data = data[:at] + other + data[at:]
        elif what == "delete":
            data = data[:at] + data[at + len(other) :]
        elif what == "repeat":
            data = data[:at] + data[at : at + 64] * 3 + data[at:]
        else:
            data = data[:at] + bytes(len(other)) + data[at + len(other) :]
    return data


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = put(value[path[0]], path[1:], new)
    return copy


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", TARGETS)
@CI
@given(data=st.data())
def test_damaged_bytes(name: str, tmp_path: Path, data: st.DataObject) -> None:
    target = TARGETS[name]
    seed = data.draw(st.sampled_from(target.seeds()))
    target.run(edited(seed, data.draw(_EDITS)), tmp_path)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", WITH_JSON)
@CI
@given(data=st.data())
def test_json_of_another_shape(name: str, tmp_path: Path, data: st.DataObject) -> None:
    """Still JSON, and a value somewhere in it is another; with the digest that it should have, where it carries one."""
    target = TARGETS[name]
    value = json.loads(target.seeds()[0])
    signed = value.pop("digest", None) is not None
    for _ in range(data.draw(st.integers(1, 3))):
        value = put(value, data.draw(st.sampled_from(places(value))), data.draw(_NASTY))
    if signed and isinstance(value, dict):
        try:
            value["digest"] = digest_of(value)
        except ValueError:
            value["digest"] = "0" * 64
    target.run(json.dumps(value).encode(), tmp_path)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "name", ["coco", "karpathy", "flickr", "webdataset", "table", "imagefolder", "labelled", "scenes", "config"]
)
@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"images":' * 50_000, b"9" * 10_000, b"\xef\xbb\xbf", b"\xff\xfe"])
def test_deep_long_and_empty(name: str, data: bytes, tmp_path: Path) -> None:
    TARGETS[name].run(data, tmp_path)


@pytest.mark.parametrize("name", HOSTILE)
def test_files_made_to_harm(name: str, tmp_path: Path) -> None:
    """Names that climb, links, devices, doubles, nonsense of every type."""
    for seed in range(40):
        TARGETS[name].run(HOSTILE[name](random.Random(seed)), tmp_path)


def test_an_image_that_vanishes_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the count is for."""
    sound = records.sample_or_problem
    monkeypatch.setattr(coco, "sample_or_problem", lambda name, *more: () if "b.png" in name else sound(name, *more))
    with pytest.raises(AssertionError, match="images in = rows"):
        TARGETS["coco"].run(TARGETS["coco"].seeds()[0], tmp_path)


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_fuzzed_is_valid_to_begin_with(name: str, tmp_path: Path) -> None:
    for seed in TARGETS[name].seeds():
        TARGETS[name].run(seed, tmp_path)


def test_found_by_fuzzing(tmp_path: Path) -> None:
    """Inputs that once raised something else than they should."""
    # the name of a setting that is not UTF-8
    TARGETS["spec"].run(b"table:3//:/spb.b?-svaBpt\x98\xc2\x8a=", tmp_path)
    # a password only together with the kind before it
    TARGETS["spec"].run(b"table://:e@^", tmp_path)
