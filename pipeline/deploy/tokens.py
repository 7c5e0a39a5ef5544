"""A student's tokenizer on disk: ``tokenizer.json``, in the format of Hugging Face's tokenizers. No torch.

CLIP's tokenizer is read by the class that the student was trained with
(:class:`teacher_cache.pipeline.data.tokens.ClipTokenizer`). Hugging Face's library can read the file too; the ids are
the same unless a text contains a start or end token. Any other tokenizer is read by that library, and checked on probe
texts when it is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from teacher_cache.pipeline.data.tokens import PATTERN, Clean, ClipTokenizer, cleaner
from teacher_cache.pipeline.deploy.record import Artefact, Tokenization
from teacher_cache.storage.errors import UsageError, install_line

TOKENIZER_FILE = "tokenizer.json"

_WORDS = f"(?i){PATTERN}"
_PROBE_TEXTS = (
    "",
    "a photo of a cat",
    "  The CAT's 2 dogs,  they'll've 1234 toys!!! ",
    "caf\u00e9 \u2014 na\u00efve \u6f22\u5b57 \U0001f600\u200d\U0001f525 \u0130\u017f \u1e9e",
    "&lt;b&gt;fish &amp;amp; chips&lt;/b&gt; \u00c3\u00a9",
    "word " * 200,
    "\x00\ufffd\t\n_under_score_",
)


def runtime_package(name: str, extra: str | None = "runtime") -> Any:
    """Import a package that only the runtime of a deployed student needs, of an extra of ours or by its own name.

    Raises:
        UsageError: the package is not installed; the message says what to install.
    """
    try:
        return import_module(name)
    except ImportError as error:
        if isinstance(error.__cause__, KeyboardInterrupt):  # a C++ module that was stopped while it was imported
            raise KeyboardInterrupt from error
        raise UsageError(
            f"a deployed student needs a package that is not installed: {name} ({error}). "
            f"Install it: {install_line(name, extra)}"
        ) from error


class StudentTokens:
    """A deployed student's tokenizer: texts to token ids, as in training.

    Args:
        tokenization: tokenization of the deployment's record.
        data: bytes of ``tokenizer.json``.

    Raises:
        UsageError: a package is not installed, or the bytes are not a tokenizer.
    """

    def __init__(self, tokenization: Tokenization, data: bytes) -> None:
        self.tokenization = tokenization
        self._encode: Callable[[Sequence[str]], NDArray[np.int64]]
        try:
            content = json.loads(data)
            if is_clip(content):
                for name in ("ftfy", "regex"):
                    runtime_package(name)
                merges = [(first, second) for first, second in content["model"]["merges"]]
                self._encode = ClipTokenizer(merges, tokenization.clean, tokenization.context_length)
            else:
                self._encode = _OtherTokens(tokenization, data)
        except (ValueError, KeyError, TypeError) as error:
            file = tokenization.artefact.file
            raise UsageError(f"{file}: not a tokenizer of Hugging Face's: {type(error).__name__}: {error}") from error

    def __call__(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Return int64 (texts, context_length): start token, the text cut to fit, end token, zeros."""
        return self._encode(texts)

    def shortened(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the tokens cut after the longest text, (texts, length), if the text tower allows it."""
        if not self.tokenization.shortens or len(tokens) == 0:
            return tokens
        # the end token has the highest id; features are read at the first one
        return tokens[:, : int(tokens.argmax(axis=1).max()) + 1]


class _OtherTokens:
    """A tokenizer of Hugging Face's library, with the cleaning, cutting and padding of the record."""

    def __init__(self, tokenization: Tokenization, data: bytes) -> None:
        self._settings, self._clean = tokenization, cleaner(tokenization.clean)
        tokenizers = runtime_package("tokenizers")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises a plain Exception
            raise ValueError(str(error)) from error
        # a file may configure its own
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def __call__(self, texts: Sequence[str]) -> NDArray[np.int64]:
        settings = self._settings
        tokens = np.zeros((len(texts), settings.context_length), np.int64)
        for row, text in enumerate(texts):
            ids = self._tokenizer.encode(self._clean(text), add_special_tokens=False).ids[: settings.context_length - 2]
            tokens[row, : len(ids) + 2] = [settings.start_token, *ids, settings.end_token]
        return tokens


def tokenization_of(tokenizer: Any, folder: Path, shortens: bool) -> Tokenization:
    """Write a student's tokenizer as ``tokenizer.json``, and check it on probe texts.

    Args:
        tokenizer: a ``ClipTokenizer``, or open_clip's ``HFTokenizer`` around a fast tokenizer of transformers.
        folder: folder of the deployment; an existing ``tokenizer.json`` is replaced.
        shortens: whether the exported text tower takes fewer tokens than the context length.

    Returns:
        The settings that :class:`StudentTokens` reads.

    Raises:
        UsageError: this tokenizer cannot be written, or the file gives other ids. No file remains.
    """
    kind = type(tokenizer).__name__
    clean: Clean
    if isinstance(tokenizer, ClipTokenizer):
        content, clean, start, end = _clip_file(tokenizer), tokenizer.clean, tokenizer.start_token, tokenizer.end_token
    else:
        content, start, end = _from_transformers(tokenizer, kind)
        clean = _clean_of(tokenizer, kind)
    path = folder / TOKENIZER_FILE
    path.write_text(json.dumps(content, ensure_ascii=True, separators=(",", ":")) + "\n")
    try:
        tokenization = Tokenization(
            artefact=Artefact.of(path),
            clean=clean,
            context_length=tokenizer.context_length,
            start_token=start,
            end_token=end,
            shortens=shortens,
        )
        _prove(tokenizer, StudentTokens(tokenization, path.read_bytes()), kind)
    except UsageError:
        path.unlink()
        raise
    return tokenization


def _prove(tokenizer: Any, written: StudentTokens, kind: str) -> None:
    for text in _PROBE_TEXTS:
        expected, read = tokenizer([text])[0].tolist(), written([text])[0].tolist()
        if expected != read:
            raise UsageError(
                f"tokenizer {kind}: written as {TOKENIZER_FILE} it gives {text[:60]!r} other ids: {read[:12]}..., "
                f"wanted {expected[:12]}... Deploy a student with open_clip's SimpleTokenizer."
            )


def _clean_of(tokenizer: Any, kind: str) -> Clean:
    name = getattr(tokenizer.clean_fn, "__name__", "").removeprefix("_clean_")
    known: dict[str, Clean] = {clean: clean for clean in get_args(Clean)}
    if name not in known:
        raise UsageError(f"tokenizer {kind}: its cleaning {name!r} is none of {', '.join(known)}")
    return known[name]


def _from_transformers(tokenizer: Any, kind: str) -> tuple[dict[str, Any], int, int]:
    """Return the content of a transformers tokenizer's file, and its start and end token."""
    inner = getattr(tokenizer, "tokenizer", None)
    backend = getattr(inner, "backend_tokenizer", None)
    if inner is None or backend is None:
        raise UsageError(
            f"tokenizer {kind} has no {TOKENIZER_FILE} and is not open_clip's SimpleTokenizer as CLIP has it; deploy a "
            "student with one of these"
        )
    start = inner.cls_token_id if inner.cls_token_id is not None else inner.bos_token_id
    end = inner.sep_token_id if inner.sep_token_id is not None else inner.eos_token_id
    if start is None or end is None:
        raise UsageError(f"tokenizer {kind} has no start or no end token; deploy one that puts both around a text")
    content: dict[str, Any] = json.loads(backend.to_str())
    return content, int(start), int(end)


def is_clip(content: dict[str, Any]) -> bool:
    """Return whether the content of a ``tokenizer.json`` is CLIP's tokenizer as :func:`tokenization_of` writes it."""
    return bool(content["pre_tokenizer"] == _pre_tokenizer())


def _pre_tokenizer() -> dict[str, Any]:
    words = {"type": "Split", "pattern": {"Regex": _WORDS}, "behavior": "Removed", "invert": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [words, byte_level]}


def _clip_file(tokenizer: ClipTokenizer) -> dict[str, Any]:
    """Return CLIP's tokenizer in the format of Hugging Face's tokenizers."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": _pre_tokenizer(),
        "post_processor": None,
        "decoder": {"type": "BPEDecoder", "suffix": "</w>"},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": tokenizer.vocabulary,
            "merges": [list(pair) for pair in tokenizer.merges],
        },
    }
