"""CLIP's tokenizer without torch: a ``tokenizer.json`` of Hugging Face's tokenizers, written once and read anywhere.

:class:`ClipTokens` reads it and gives the ids that open_clip gives, to the last one; :func:`tokenization_of` writes it,
and proves that on probe texts first. Three things in open_clip's tokenizer have no plain counterpart in that format:

- **Cleaning** by ftfy and ``html.unescape`` comes before; the record names which of open_clip's three it is.
- **What is a letter** depends on the version of Unicode, which is another one in each library. So the letters, digits
  and other characters that open_clip's regular expression knows are spelled out.
- **A start or end token in a text** is that token to open_clip, if its pattern gets to it: not in ``!<end_of_text>``.
  Added tokens of the format would match there too. So the pattern splits them off, and merges behind all others put
  them together from their pieces.
"""

from __future__ import annotations

import html
import json
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from teacher_cache.pipeline.deploy.record import Artefact, Tokenization
from teacher_cache.storage.errors import UsageError

__all__ = ["TOKENIZER_FILE", "ClipTokens", "runtime_package", "tokenization_of"]

TOKENIZER_FILE = "tokenizer.json"

_Clean = Literal["lower", "whitespace", "canonicalize"]
_END_OF_WORD = "</w>"
_SPECIALS = ("<start_of_text>", "<end_of_text>")  # open_clip's
_PROBE_TEXTS = (
    "",
    "a photo of a cat",
    "  The CAT's 2 dogs,  they'll've 1234 toys!!! ",
    "caf\u00e9 \u2014 na\u00efve \u6f22\u5b57 \U0001f600\u200d\U0001f525 \u0130\u017f \u1e9e",
    "&lt;b&gt;fish &amp;amp; chips&lt;/b&gt; \u00c3\u00a9",
    "<end_of_text> !<start_of_text> <START_OF_TEXT>",
    "word " * 200,
    "\x00\ufffd\t\n_under_score_",
)


def runtime_package(name: str) -> Any:
    """A package that only the use of a deployed student needs.

    Raises:
        UsageError: it is not installed; says what to install.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise UsageError(
            f"a deployed student needs a package that is not installed: {name} ({error}). "
            "Install it: pip install teacher-cache[runtime]"
        ) from error


class ClipTokens:
    """Texts to token ids, as open_clip makes them.

    Args:
        tokenization: of the deployment's record.
        data: the bytes of its ``tokenizer.json``.

    Raises:
        UsageError: a package is not installed, or the bytes are no tokenizer.
    """

    def __init__(self, tokenization: Tokenization, data: bytes) -> None:
        self.tokenization = tokenization
        self._clean = _cleaner(tokenization.clean)
        tokenizers = runtime_package("tokenizers")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except (
            Exception
        ) as error:  # what this library raises for a file of another kind or version is a plain Exception
            raise UsageError(f"{tokenization.artefact.file}: not a tokenizer of Hugging Face's: {error}") from error
        # some files bring their own cutting and padding; here both are the record's
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # steps on the way to a start or end token, which only files of _from_simple have
        steps = (special[:length] for special in _SPECIALS for length in range(2, len(special)))
        found = {self._tokenizer.token_to_id(step) for step in steps}
        self._unfinished = {token for token in found if token is not None and token > tokenization.end_token}

    def __call__(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """int64 (texts, context_length): start token, the text cut to what fits, end token, zeros.

        Raises:
            ValueError: a text has a start or end token written half in capitals, which this file cannot express.
        """
        settings = self.tokenization
        tokens = np.zeros((len(texts), settings.context_length), np.int64)
        for row, text in enumerate(texts):
            # one by one: a batch would start threads, and warnings after each fork
            ids = self._tokenizer.encode(self._clean(text), add_special_tokens=False).ids[: settings.context_length - 2]
            if not self._unfinished.isdisjoint(ids):
                raise ValueError(f"text {row} ({text[:100]!r}) has a start or end token half in capitals; take it out")
            tokens[row, : len(ids) + 2] = [settings.start_token, *ids, settings.end_token]
        return tokens

    def shortened(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Without the padding behind the longest text, where the text tower allows it: (texts, length)."""
        if not self.tokenization.shortens or len(tokens) == 0:
            return tokens
        # the end token has the highest id, and the first one is where the features are read
        return tokens[:, : int(tokens.argmax(axis=1).max()) + 1]


def _cleaner(clean: _Clean) -> Callable[[str], str]:
    """open_clip's text cleaning by its name, from open_clip's tokenizer.py."""
    fix_text = runtime_package("ftfy").fix_text

    def basic(text: str) -> str:
        return html.unescape(html.unescape(fix_text(text))).strip()

    def whitespace(text: str) -> str:
        return " ".join(basic(text).split())

    def lower(text: str) -> str:
        return whitespace(text).lower()

    def canonicalize(text: str) -> str:
        bare = basic(text).replace("_", " ").translate(str.maketrans("", "", string.punctuation))
        return " ".join(bare.lower().split())

    return {"lower": lower, "whitespace": whitespace, "canonicalize": canonicalize}[clean]


def tokenization_of(tokenizer: Any, folder: Path, shortens: bool) -> Tokenization:
    """Write a student's tokenizer as ``tokenizer.json``, proven on probe texts.

    Args:
        tokenizer: open_clip's ``SimpleTokenizer``, or its ``HFTokenizer`` around a fast tokenizer of transformers.
        folder: of the deployment; a ``tokenizer.json`` in it is replaced.
        shortens: whether the exported text tower takes fewer tokens than the context length.

    Returns:
        What :class:`ClipTokens` needs to know of it.

    Raises:
        UsageError: this tokenizer cannot be written, or what was written gives other ids; then no file is left.
    """
    what = type(tokenizer).__name__
    if getattr(tokenizer, "bpe_ranks", None) is not None:
        content, start, end = _from_simple(tokenizer)
    else:
        content, start, end = _from_transformers(tokenizer, what)
    path = folder / TOKENIZER_FILE
    path.write_text(json.dumps(content, ensure_ascii=True, separators=(",", ":")) + "\n")
    try:
        found = Tokenization(
            artefact=Artefact.of(path),
            clean=_clean_of(tokenizer, what),
            context_length=tokenizer.context_length,
            start_token=start,
            end_token=end,
            shortens=shortens,
        )
        _prove(tokenizer, ClipTokens(found, path.read_bytes()), what)
    except UsageError:
        path.unlink()
        raise
    return found


def _prove(tokenizer: Any, written: ClipTokens, what: str) -> None:
    for text in _PROBE_TEXTS:
        wanted, found = tokenizer([text])[0].tolist(), written([text])[0].tolist()
        if wanted != found:
            raise UsageError(
                f"tokenizer {what}: written as {TOKENIZER_FILE} it gives {text[:60]!r} other ids: {found[:12]}..., "
                f"wanted {wanted[:12]}... Deploy a student with open_clip's SimpleTokenizer."
            )


def _clean_of(tokenizer: Any, what: str) -> _Clean:
    name = getattr(tokenizer.clean_fn, "__name__", "").removeprefix("_clean_")
    known: dict[str, _Clean] = {clean: clean for clean in get_args(_Clean)}
    if name not in known:
        raise UsageError(f"tokenizer {what}: its cleaning {name!r} is none of {', '.join(known)}")
    return known[name]


def _from_transformers(tokenizer: Any, what: str) -> tuple[dict[str, Any], int, int]:
    """The file that a fast tokenizer of transformers is made of; its start and end token."""
    inner = getattr(tokenizer, "tokenizer", None)
    backend = getattr(inner, "backend_tokenizer", None)
    if inner is None or backend is None:
        raise UsageError(
            f"tokenizer {what} has no {TOKENIZER_FILE} and is not open_clip's SimpleTokenizer; deploy a student with "
            "one of these"
        )
    start = inner.cls_token_id if inner.cls_token_id is not None else inner.bos_token_id
    end = inner.sep_token_id if inner.sep_token_id is not None else inner.eos_token_id
    if start is None or end is None:
        raise UsageError(f"tokenizer {what} has no start or no end token; deploy one that puts both around a text")
    content: dict[str, Any] = json.loads(backend.to_str())
    return content, int(start), int(end)


def _from_simple(tokenizer: Any) -> tuple[dict[str, Any], int, int]:
    """open_clip's SimpleTokenizer in the format of Hugging Face's tokenizers; its start and end token."""
    if tokenizer.reduction_fn is not None:
        raise UsageError("tokenizer SimpleTokenizer with a reduction mask draws tokens at random; deploy one without")
    specials = [tokenizer.decoder[token] for token in tokenizer.all_special_ids]
    if tuple(specials) != _SPECIALS:
        raise UsageError(
            f"tokenizer SimpleTokenizer has the special tokens {', '.join(specials)}; those of CLIP, "
            f"{' and '.join(_SPECIALS)}, and no others can be written"
        )
    vocabulary = dict(tokenizer.encoder)
    merges = [list(pair) for pair, _ in sorted(tokenizer.bpe_ranks.items(), key=lambda item: item[1])]
    unused = len(vocabulary)
    for special in specials:
        # What byte-pair encoding leaves of it, put together piece by piece. No other word has "<" beside a letter, so
        # the steps between, whose ids the model does not have, stay of nothing but a special token half in capitals.
        vocabulary.pop(special)
        first, *others = _pieces(tokenizer, special)
        for piece in others:
            merges.append([first, piece])
            first += piece
            vocabulary[first] = unused
            unused += 1
        vocabulary[first] = tokenizer.encoder[special]
    start, end = tokenizer.all_special_ids
    return _content(vocabulary, merges, _pattern(tokenizer, specials)), start, end


def _pieces(tokenizer: Any, word: str) -> list[str]:
    kept = tokenizer.cache.pop(word)  # it stands there for itself
    try:
        pieces: list[str] = tokenizer.bpe(word).split(" ")
    finally:
        tokenizer.cache[word] = kept
    return pieces


def _content(vocabulary: dict[str, int], merges: list[list[str]], pattern: str) -> dict[str, Any]:
    words = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, byte_level]},
        "post_processor": None,
        "decoder": {"type": "BPEDecoder", "suffix": _END_OF_WORD},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": _END_OF_WORD,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _pattern(tokenizer: Any, specials: Sequence[str]) -> str:
    """open_clip's regular expression for any library: no flag, no property of Unicode, all characters spelled out."""
    regex = import_module("regex")  # open_clip brings it
    parts = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
    known = "|".join([*specials, *parts, r"[\p{L}]+", r"[\p{N}]", r"[^\s\p{L}\p{N}]+"])
    if tokenizer.pat.pattern != known:
        raise UsageError(
            f"tokenizer SimpleTokenizer splits text by another pattern than is known here: {tokenizer.pat.pattern!r}, "
            f"wanted {known!r}. Use the version of open_clip in constraints.txt."
        )

    every_character = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code <= 0xDFFF)

    def class_of(one_character: str) -> str:
        found = regex.findall(one_character, every_character, regex.IGNORECASE)
        return "[" + "".join(_ranges(ord(character) for character in found)) + "]"

    def any_case(text: str) -> str:
        return "".join(class_of(character) for character in text)

    letter, digit, other = (class_of(part) for part in (r"[\p{L}]", r"[\p{N}]", r"[^\s\p{L}\p{N}]"))
    return "|".join([*map(any_case, (*specials, *parts)), f"{letter}+", digit, f"{other}+"])


def _ranges(codes: Iterable[int]) -> Iterator[str]:
    """Ascending code points as ranges of a character class."""
    first = last = None
    for code in (*codes, -1):
        if last is not None and code == last + 1:
            last = code
            continue
        if first is not None:
            yield f"\\x{{{first:X}}}" + (f"-\\x{{{last:X}}}" if last != first else "")
        first = last = code
