"""A tokenizer.json gives open_clip's ids, to the last one, for any text."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import regex
import tokenizers
from hypothesis import given, settings
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from teacher_cache.pipeline.deploy.record import Tokenization
from teacher_cache.pipeline.deploy.tokens import ClipTokens, tokenization_of
from teacher_cache.storage.errors import UsageError
from tests.conftest import shared
from tests.pipeline.data.odd_texts import TEXTS

Written = Callable[..., tuple[SimpleTokenizer, ClipTokens]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """open_clip's tokenizer and ours of the file that was written from it; one of each cleaning for all tests."""
    made: dict[str, tuple[SimpleTokenizer, ClipTokens]] = {}

    def make(clean: str = "lower") -> tuple[SimpleTokenizer, ClipTokens]:
        if clean not in made:
            theirs = SimpleTokenizer(clean=clean, context_length=20)
            folder = tmp_path_factory.mktemp(clean)
            record = tokenization_of(theirs, folder, shortens=True)
            made[clean] = theirs, ClipTokens(record, (folder / "tokenizer.json").read_bytes())
        return made[clean]

    return make


@settings(max_examples=400, deadline=None)
@given(TEXTS)
def test_gives_open_clips_ids_for_any_text(written: Written, text: str) -> None:
    theirs, ours = written()
    assert ours([text]).tolist() == theirs([text]).tolist()


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_so_too_with_other_cleaning(written: Written, text: str) -> None:
    for clean in ("whitespace", "canonicalize"):
        theirs, ours = written(clean)
        try:
            found = ours([text]).tolist()
        except ValueError:  # the one thing that the file cannot express, and it says so
            assert clean == "whitespace"
            assert regex.search("<(start|end)_of_text>", theirs.clean_fn(text), regex.IGNORECASE)
        else:
            assert found == theirs([text]).tolist()


def test_every_character_alone_and_between_others(written: Written) -> None:
    """Unicode has other versions in Python, in regex, and in the library that reads the file."""
    theirs, ours = written()
    # one of each 13 characters, and all around the borders of classes that move between versions
    codes = [code for code in range(0x110000) if not 0xD800 <= code <= 0xDFFF]
    letters = regex.compile(r"\p{L}|\p{N}")
    kinds = np.array([letters.match(chr(code)) is not None for code in codes])
    borders = np.flatnonzero(np.diff(kinds))
    picked = sorted({*codes[::61], *(codes[at + step] for at in borders for step in (0, 1))})
    texts = [f"a{chr(code)}1{chr(code)}!{chr(code)}" for code in picked]
    assert np.array_equal(ours(texts), theirs(texts).numpy())


@pytest.mark.real_data
def test_every_caption_of_flickr8k(tmp_path: Path) -> None:
    with (shared("flickr8k") / "captions.txt").open(newline="") as file:
        captions = [row["caption"] for row in csv.DictReader(file)]
    assert len(captions) > 30_000
    theirs = open_clip.get_tokenizer("ViT-B-32")
    record = tokenization_of(theirs, tmp_path, shortens=False)
    ours = ClipTokens(record, (tmp_path / "tokenizer.json").read_bytes())
    assert np.array_equal(ours(captions), theirs(captions).numpy())


def test_long_texts_are_cut_and_keep_their_end(written: Written) -> None:
    _, ours = written()
    tokens = ours(["cat " * 100, "cat", ""])
    assert tokens.dtype == np.int64
    assert tokens.shape == (3, 20)
    assert tokens[0].tolist() == [49406, *[2368] * 18, 49407]
    assert tokens[1, :4].tolist() == [49406, 2368, 49407, 0]
    assert tokens[2, :3].tolist() == [49406, 49407, 0]
    assert ours([]).shape == (0, 20)


def test_shortened_goes_to_the_end_of_the_longest(written: Written) -> None:
    _, ours = written()
    tokens = ours(["a cat", "a small cat", "cat"])
    assert ours.shortened(tokens).tolist() == tokens[:, :5].tolist()
    fixed = ClipTokens(ours.tokenization.model_copy(update={"shortens": False}), _file(ours))
    assert fixed.shortened(tokens).shape == (3, 20)


def _file(ours: ClipTokens) -> bytes:
    text: str = ours._tokenizer.to_str()
    return text.encode()


def test_the_record_says_what_it_is(tmp_path: Path) -> None:
    record = tokenization_of(SimpleTokenizer(context_length=33), tmp_path, shortens=True)
    assert record == Tokenization(
        artefact=record.artefact,
        clean="lower",
        context_length=33,
        start_token=49406,
        end_token=49407,
        shortens=True,
    )
    assert record.artefact.file == "tokenizer.json"
    first = (tmp_path / "tokenizer.json").read_bytes()
    tokenization_of(SimpleTokenizer(context_length=33), tmp_path, shortens=True)
    assert (tmp_path / "tokenizer.json").read_bytes() == first  # the same bytes each time


def test_writing_leaves_open_clips_tokenizer_as_it_was(tmp_path: Path) -> None:
    theirs = SimpleTokenizer(context_length=20)
    before = theirs(["<start_of_text> a cat <end_of_text>"]).tolist()
    tokenization_of(theirs, tmp_path, shortens=True)
    assert theirs(["<start_of_text> a cat <end_of_text>"]).tolist() == before


class _Wrapped(HFTokenizer):
    """open_clip's wrapper around a tokenizer of transformers, without the download."""

    def __init__(self, tokenizer: Any, clean: Any, context_length: int = 12) -> None:
        self.tokenizer, self.clean_fn, self.context_length = tokenizer, clean, context_length
        self.tokenizer_mode, self.strip_sep_token = "", False


def _words(names: str = "<pad> a photo of cat <unk> <s> </s>", pad: str = "<pad>") -> Any:
    """A fast tokenizer of transformers: words, with a start and an end token around them."""
    transformers = pytest.importorskip("transformers")
    places = {name: place for place, name in enumerate(names.split())}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(places, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", places["<s>"]), ("</s>", places["</s>"])]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token=pad
    )


# as in CLIP's vocabulary and as in BERT's, whose end token has a low id
@pytest.mark.parametrize("names", ["<pad> a photo of cat <unk> <s> </s>", "<pad> <s> </s> <unk> a photo of cat"])
def test_a_tokenizer_of_transformers_keeps_its_own_file(tmp_path: Path, names: str) -> None:
    theirs = _Wrapped(_words(names), open_clip.tokenizer._clean_whitespace)
    record = tokenization_of(theirs, tmp_path, shortens=False)
    places = names.split()
    assert record.clean == "whitespace"
    assert (record.start_token, record.end_token) == (places.index("<s>"), places.index("</s>"))
    texts = ["a photo of a cat", "", "photo " * 30, "an unknown cat"]
    ours = ClipTokens(record, (tmp_path / "tokenizer.json").read_bytes())
    assert ours(texts).tolist() == theirs(texts).tolist()


def test_one_that_would_give_other_ids_is_refused_and_not_left(tmp_path: Path) -> None:
    theirs = _Wrapped(
        _words(pad="<unk>"), open_clip.tokenizer._clean_whitespace
    )  # it pads with 5, the models are fed 0
    with pytest.raises(UsageError, match=r"written as tokenizer\.json it gives '' other ids: \[6, 7, 0.*\[6, 7, 5"):
        tokenization_of(theirs, tmp_path, shortens=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (SimpleTokenizer(reduction_mask="simple"), "draws tokens at random"),
        (
            SimpleTokenizer(additional_special_tokens=["<mask>"]),
            "has the special tokens .*<mask>; those of CLIP",
        ),
        (object(), "tokenizer object has no tokenizer.json"),
    ],
)
def test_what_cannot_be_written_is_refused(tokenizer: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        tokenization_of(tokenizer, tmp_path, shortens=True)


def test_another_pattern_of_open_clip_is_refused(tmp_path: Path) -> None:
    theirs = SimpleTokenizer()
    theirs.pat = regex.compile(r"\S+")
    with pytest.raises(UsageError, match=r"by another pattern than is known here: '\\\\S\+'"):
        tokenization_of(theirs, tmp_path, shortens=True)


def test_bytes_that_are_no_tokenizer_are_refused(written: Written) -> None:
    _, ours = written()
    for data in (b"", b"{}", json.dumps({"version": "9"}).encode()):
        with pytest.raises(UsageError, match=r"^tokenizer\.json: not a tokenizer of Hugging Face's"):
            ClipTokens(ours.tokenization, data)


def test_a_start_token_half_in_capitals_is_refused(written: Written) -> None:
    """Only where cleaning keeps capitals; in lower case it is the token itself."""
    _, ours = written("whitespace")
    with pytest.raises(ValueError, match=r"^text 1 \('a <start_of_TEXT>'\) has a start or end token half in capitals"):
        ours(["a", "a <start_of_TEXT>"])
    assert written()[1](["a <start_of_TEXT>"])[0, :4].tolist() == [49406, 320, 49406, 49407]


def test_reading_needs_no_torch(written: Written, tmp_path: Path) -> None:
    _, ours = written()
    (tmp_path / "tokenizer.json").write_bytes(_file(ours))
    (tmp_path / "record.json").write_text(ours.tokenization.model_dump_json())
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('torch', 'open_clip', 'regex', 'transformers')))\n"  # importing them raises
        "from teacher_cache.pipeline.deploy.tokens import ClipTokens\n"
        "from teacher_cache.pipeline.deploy.record import Tokenization\n"
        "record = Tokenization.model_validate_json(open('record.json').read())\n"
        "print(ClipTokens(record, open('tokenizer.json', 'rb').read())(['a cat'])[0, :4].tolist())\n"
    )
    environment = {"PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[49406, 320, 2368, 49407]\n"
