"""CLIP's tokenizer gives open_clip's ids to the last one, whatever was tokenized before and by which thread."""

from __future__ import annotations

import csv
import pickle
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import open_clip
import pytest
import regex
from hypothesis import given, settings
from open_clip.tokenizer import SimpleTokenizer

from teacher_cache.pipeline.data import tokens as clip_tokens
from teacher_cache.pipeline.data.tokens import ClipTokenizer
from teacher_cache.pipeline.models.safe_loading import clip_tokenizer
from tests.conftest import shared
from tests.pipeline.data.odd_texts import TEXTS

_LETTERS = "aeilnorst"


@pytest.fixture(scope="module", params=["lower", "whitespace", "canonicalize"])
def both(request: pytest.FixtureRequest) -> tuple[SimpleTokenizer, ClipTokenizer]:
    theirs = SimpleTokenizer(clean=request.param, context_length=20)
    return theirs, clip_tokenizer(theirs)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_gives_open_clips_ids_for_any_text(both: tuple[SimpleTokenizer, ClipTokenizer], text: str) -> None:
    theirs, ours = both
    texts = [text, "a cat", text * 7, f"<end_of_text>{text}<START_of_text>!<start_of_text>"]
    for _ in range(2):  # the second time its words are remembered
        ids = ours(texts)
        assert ids.dtype == np.int64
        assert np.array_equal(ids, theirs(texts).numpy())


def test_every_character_alone_and_between_others(both: tuple[SimpleTokenizer, ClipTokenizer]) -> None:
    theirs, ours = both
    # one of each 61 characters, and all around the borders of classes
    codes = [code for code in range(0x110000) if not 0xD800 <= code <= 0xDFFF]
    letters = regex.compile(r"\p{L}|\p{N}")
    kinds = np.array([letters.match(chr(code)) is not None for code in codes])
    borders = np.flatnonzero(np.diff(kinds))
    picked = sorted({*codes[::61], *(codes[at + step] for at in borders for step in (0, 1))})
    texts = [f"a{chr(code)}1{chr(code)}!{chr(code)}" for code in picked]
    assert np.array_equal(ours(texts), theirs(texts).numpy())


@pytest.mark.real_data
def test_every_caption_of_flickr8k() -> None:
    with (shared("flickr8k") / "captions.txt").open(newline="") as file:
        captions = [row["caption"] for row in csv.DictReader(file)]
    assert len(captions) > 30_000
    theirs = open_clip.get_tokenizer("ViT-B-32")
    assert np.array_equal(clip_tokenizer(theirs)(captions), theirs(captions).numpy())


def test_long_texts_are_cut_and_no_text_is_no_row() -> None:
    ours = clip_tokenizer(SimpleTokenizer(context_length=20))
    long, short, empty = ours(["cat " * 100, "cat", ""])
    assert long.tolist() == [49406, *[2368] * 18, 49407]
    assert short[:4].tolist() == [49406, 2368, 49407, 0]
    assert empty[:3].tolist() == [49406, 49407, 0]
    assert ours([]).shape == (0, 20)


def test_more_words_than_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_tokens, "_WORDS", 10)
    drawn = random.Random(0)
    texts = ["".join(drawn.choices(_LETTERS, k=6)) for _ in range(300)]
    theirs = SimpleTokenizer()
    ours = clip_tokenizer(theirs)
    ids = ours([*texts, *texts])
    assert ours._ids.cache_info().currsize == 10
    assert np.array_equal(ids, theirs([*texts, *texts]).numpy())


def test_threads_share_it_and_a_worker_gets_one_of_its_own() -> None:
    drawn = random.Random(1)
    batches = [
        [" ".join("".join(drawn.choices(_LETTERS, k=5)) for _ in range(8)) for _ in range(16)] for _ in range(64)
    ]
    theirs = SimpleTokenizer()
    ours = clip_tokenizer(theirs)
    with ThreadPoolExecutor(8) as threads:
        ids = list(threads.map(ours, batches))
    assert all(np.array_equal(one, theirs(batch).numpy()) for one, batch in zip(ids, batches, strict=True))
    again = pickle.loads(pickle.dumps(ours))
    assert again._ids.cache_info().currsize == 0
    assert np.array_equal(again(batches[0]), ids[0])


_OTHER_PATTERN = SimpleTokenizer()
_OTHER_PATTERN.pat = regex.compile(r"\S+")


@pytest.mark.parametrize(
    "tokenizer",
    [
        SimpleTokenizer(reduction_mask="simple"),
        SimpleTokenizer(additional_special_tokens=["<mask>"]),
        _OTHER_PATTERN,
        object(),
    ],
)
def test_other_tokenizers_stay_as_they_are(tokenizer: Any) -> None:
    assert clip_tokenizer(tokenizer) is tokenizer


def test_it_needs_no_torch() -> None:
    code = "import sys, teacher_cache.pipeline.data.tokens as t; t.ClipTokenizer([('a', 'b')])(['ab'])\n"
    code += "assert not {'torch', 'open_clip', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
