"""Captions by words: open_clip's ids to the last one, whatever was tokenized before and by whom."""

from __future__ import annotations

import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import open_clip
import pytest
import torch
from hypothesis import given, settings
from open_clip.tokenizer import SimpleTokenizer

from teacher_cache.pipeline.data.batches import tokens as word_tokens
from teacher_cache.pipeline.data.batches.tokens import WordTokens, by_words
from tests.conftest import shared
from tests.pipeline.data.odd_texts import TEXTS

_LETTERS = "aeilnorst"


@pytest.fixture(scope="module", params=["lower", "whitespace", "canonicalize"])
def both(request: pytest.FixtureRequest) -> tuple[SimpleTokenizer, WordTokens]:
    theirs = SimpleTokenizer(clean=request.param, context_length=20)
    return theirs, WordTokens(theirs)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_gives_open_clips_ids_for_any_text(both: tuple[SimpleTokenizer, WordTokens], text: str) -> None:
    theirs, ours = both
    for _ in range(2):  # the second time its words are remembered
        found = ours([text, "a cat", text * 7])
        assert found.dtype == torch.int64
        assert torch.equal(found, theirs([text, "a cat", text * 7]))


def test_gives_open_clips_ids_for_flickr8k() -> None:
    lines = (shared("flickr8k") / "captions.txt").read_text().splitlines()[1:]
    texts = [line.partition(",")[2] for line in lines]
    theirs = open_clip.get_tokenizer("ViT-B-32")
    assert torch.equal(by_words(theirs)(texts), theirs(texts))


def test_no_text_is_no_row() -> None:
    assert by_words(SimpleTokenizer())([]).shape == (0, 77)


def test_more_words_than_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither it nor the tokenizer that it was made of grows with the words that come."""
    monkeypatch.setattr(word_tokens, "_WORDS", 10)
    drawn = random.Random(0)
    texts = ["".join(drawn.choices(_LETTERS, k=6)) for _ in range(300)]
    theirs = SimpleTokenizer()
    ours = WordTokens(theirs)
    found = ours([*texts, *texts])
    assert (ours._ids.cache_info().currsize, len(theirs.cache), len(ours._pairs.cache)) == (10, 2, 3)
    assert torch.equal(found, theirs([*texts, *texts]))


def test_threads_share_it() -> None:
    drawn = random.Random(1)
    batches = [
        [" ".join("".join(drawn.choices(_LETTERS, k=5)) for _ in range(8)) for _ in range(16)] for _ in range(64)
    ]
    theirs = SimpleTokenizer()
    ours = WordTokens(theirs)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(ours, batches))
    assert all(torch.equal(one, theirs(batch)) for one, batch in zip(found, batches, strict=True))


def test_a_spawned_worker_gets_one_of_its_own() -> None:
    ours = WordTokens(SimpleTokenizer(context_length=9))
    ours(["a cat"])
    again = pickle.loads(pickle.dumps(ours))
    assert again._ids.cache_info().currsize == 0
    assert torch.equal(again(["a cat on a mat"]), ours(["a cat on a mat"]))


@pytest.mark.parametrize("tokenizer", [SimpleTokenizer(reduction_mask="simple"), object(), lambda texts: texts])
def test_other_tokenizers_stay_as_they_are(tokenizer: Any) -> None:
    assert by_words(tokenizer) is tokenizer
