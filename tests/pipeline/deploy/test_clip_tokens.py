"""A tokenizer.json gives the ids that the student was trained with."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import tokenizers
from hypothesis import given, settings
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from teacher_cache.pipeline.data.tokens import ClipTokenizer
from teacher_cache.pipeline.deploy.record import Tokenization
from teacher_cache.pipeline.deploy.tokens import StudentTokens, tokenization_of
from teacher_cache.pipeline.models.safe_loading import clip_tokenizer
from teacher_cache.storage.errors import UsageError
from tests.conftest import shared
from tests.pipeline.data.odd_texts import TEXTS

Written = tuple[ClipTokenizer, StudentTokens, bytes]


@pytest.fixture(scope="module", params=["lower", "whitespace", "canonicalize"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The student's tokenizer, and the file that was written of it, read and as bytes."""
    student = clip_tokenizer(SimpleTokenizer(clean=request.param, context_length=20))
    folder = tmp_path_factory.mktemp(request.param)
    record = tokenization_of(student, folder, shortens=True)
    data = (folder / "tokenizer.json").read_bytes()
    return student, StudentTokens(record, data), data


@settings(max_examples=100, deadline=None)
@given(TEXTS)
def test_gives_the_students_ids_for_any_text(written: Written, text: str) -> None:
    student, deployed, _ = written
    assert np.array_equal(deployed([text]), student([text]))


@pytest.mark.real_data
def test_hugging_faces_library_reads_the_same_ids_of_every_caption_of_flickr8k(tmp_path: Path) -> None:
    with (shared("flickr8k") / "captions.txt").open(newline="") as file:
        captions = [row["caption"] for row in csv.DictReader(file)]
    tokenization_of(clip_tokenizer(SimpleTokenizer()), tmp_path, shortens=False)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = SimpleTokenizer()(captions).numpy()
    for row, encoded in zip(ids, theirs.encode_batch([text.strip().lower() for text in captions]), strict=True):
        assert row[1 : 1 + len(encoded.ids)].tolist() == encoded.ids


def test_shortened_goes_to_the_end_of_the_longest(written: Written) -> None:
    _, ours, data = written
    tokens = ours(["a cat", "a small cat", "cat"])
    assert ours.shortened(tokens).tolist() == tokens[:, :5].tolist()
    fixed = StudentTokens(ours.tokenization.model_copy(update={"shortens": False}), data)
    assert fixed.shortened(tokens).shape == (3, 20)


def test_the_record_says_what_it_is(tmp_path: Path) -> None:
    record = tokenization_of(clip_tokenizer(SimpleTokenizer(context_length=33)), tmp_path, shortens=True)
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
    tokenization_of(clip_tokenizer(SimpleTokenizer(context_length=33)), tmp_path, shortens=True)
    assert (tmp_path / "tokenizer.json").read_bytes() == first  # the same bytes each time


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
    ours = StudentTokens(record, (tmp_path / "tokenizer.json").read_bytes())
    assert ours(texts).tolist() == theirs(texts).tolist()


def test_one_that_would_give_other_ids_is_refused_and_not_left(tmp_path: Path) -> None:
    theirs = _Wrapped(
        _words(pad="<unk>"), open_clip.tokenizer._clean_whitespace
    )  # it pads with 5, the models are fed 0
    with pytest.raises(UsageError, match=r"written as tokenizer\.json it gives '' other ids: \[6, 7, 0.*\[6, 7, 5"):
        tokenization_of(theirs, tmp_path, shortens=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tokenizer", [SimpleTokenizer(reduction_mask="simple"), object()])
def test_what_cannot_be_written_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"has no tokenizer\.json and is not open_clip's SimpleTokenizer as CLIP has it"
    ):
        tokenization_of(tokenizer, tmp_path, shortens=True)


def test_bytes_that_are_no_tokenizer_are_refused(written: Written) -> None:
    _, ours, data = written
    torn = json.loads(data)
    del torn["model"]["merges"]
    for wrong in (b"", b"{}", json.dumps({"version": "9", "pre_tokenizer": None}).encode(), json.dumps(torn).encode()):
        with pytest.raises(UsageError, match=r"^tokenizer\.json: not a tokenizer of Hugging Face's"):
            StudentTokens(ours.tokenization, wrong)


def test_reading_needs_no_torch(written: Written, tmp_path: Path) -> None:
    _, ours, data = written
    (tmp_path / "tokenizer.json").write_bytes(data)
    (tmp_path / "record.json").write_text(ours.tokenization.model_dump_json())
    code = (
        "import sys\n"
        # importing them raises
        "sys.modules.update(dict.fromkeys(('torch', 'open_clip', 'transformers', 'tokenizers', 'pyarrow')))\n"
        "from teacher_cache.pipeline.deploy.tokens import StudentTokens\n"
        "from teacher_cache.pipeline.deploy.record import Tokenization\n"
        "record = Tokenization.model_validate_json(open('record.json').read())\n"
        "print(StudentTokens(record, open('tokenizer.json', 'rb').read())(['a cat'])[0, :4].tolist())\n"
    )
    environment = {"PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[49406, 320, 2368, 49407]\n"
