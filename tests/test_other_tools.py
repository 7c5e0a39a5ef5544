"""The programs of the page on other tools, read from its text and run over a cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from teacher_cache import Cache
from tests.conftest import make_known_cache

PAGE = Path(__file__).parents[1] / "docs/howto/other-tools.md"


def test_a_cache_is_read_without_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_known_cache(tmp_path / "f8k.cache")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        exec(block.replace("duckdb.sql", "counts = duckdb.sql"), names)
    cache = Cache("f8k.cache")
    np.testing.assert_array_equal(names["rows"], cache.take("image", np.arange(len(names["rows"]))))
    assert names["cosines"].shape == (cache.captions.num_rows, len(names["rows"]))
    assert {split: count for split, count, _ in names["counts"]} == dict(cache.identity.dataset.splits)
    lengths = [len(text) for text in names["longest"]["text"]]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == max(map(len, cache.captions["text"].to_pylist()))
