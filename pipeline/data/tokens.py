"""CLIP's tokenizer, with open_clip's ids but without torch. Teachers, students and deployed students use it."""

from __future__ import annotations

import html
import string
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa

    from teacher_cache.storage.format.identity import TokenizerIdentity

Clean = Literal["lower", "whitespace", "canonicalize"]

_PROBE_TEXTS = ("a photo of a cat.", "Zwei Hunde, 3 cats & l'été!", "word " * 100, "\U0001f600", "")
_WORDS = 65_536  # cached words: nearly all that captions use
SPECIALS = ("<start_of_text>", "<end_of_text>")
_END_OF_WORD = "</w>"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
PATTERN = "|".join([*SPECIALS, WORDS])
"""open_clip's regular expression of a word, without regard to case."""


class ClipTokenizer:
    """Byte-pair encoder with exactly the ids of open_clip's ``SimpleTokenizer``. Thread-safe.

    It caches the ids of each word, which open_clip computes again each time.

    Args:
        merges: pairs of pieces to join, by priority. They determine the vocabulary.
        clean: name of open_clip's text cleaning.
        context_length: maximum number of tokens, with start and end tokens. Longer text is cut.

    Attributes:
        name: name of open_clip's class, for a cache's identity.
        vocabulary: ids by piece. The start and end tokens have the two highest.

    Raises:
        ImportError: ftfy or regex is not installed.
    """

    name = "SimpleTokenizer"

    def __init__(self, merges: Sequence[tuple[str, str]], clean: Clean = "lower", context_length: int = 77) -> None:
        self.merges, self.clean, self.context_length = merges, clean, context_length
        self._byte_pieces = _byte_pieces()
        pieces = list(self._byte_pieces.values())
        pieces += [piece + _END_OF_WORD for piece in pieces] + [first + second for first, second in merges]
        self.vocabulary = {piece: number for number, piece in enumerate([*pieces, *SPECIALS])}
        self.start_token, self.end_token = (self.vocabulary[special] for special in SPECIALS)
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        regex = import_module("regex")
        self._words: Any = regex.compile(PATTERN, regex.IGNORECASE)
        self._cleaned = cleaner(clean)
        self._ids = lru_cache(_WORDS)(self._ids_of)

    def __reduce__(self) -> tuple[Any, ...]:
        return ClipTokenizer, (self.merges, self.clean, self.context_length)

    def __call__(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Return int64 (texts, context_length): start token, text cut to fit, end token, zeros."""
        tokens = np.zeros((len(texts), self.context_length), np.int64)
        for row, text in enumerate(texts):
            ids = [self.start_token]
            for word in self._words.findall(self._cleaned(text)):
                ids += self._ids(word)
            del ids[self.context_length - 1 :]
            ids.append(self.end_token)
            tokens[row, : len(ids)] = ids
        return tokens

    def _ids_of(self, word: str) -> tuple[int, ...]:
        pieces = [self._byte_pieces[byte] for byte in word.encode()]
        if word in SPECIALS:
            return (self.vocabulary[word],)
        pieces[-1] += _END_OF_WORD
        while len(pieces) > 1:
            best = min(pairwise(pieces), key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if best not in self._ranks:
                break
            pieces = _joined(pieces, best)
        return tuple(self.vocabulary[piece] for piece in pieces)


def _joined(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """Join each occurrence of a pair, from the left."""
    joined: list[str] = []
    at = 0
    while at < len(pieces):
        both = (pieces[at], pieces[at + 1]) == pair if at + 1 < len(pieces) else False
        joined.append("".join(pair) if both else pieces[at])
        at += 2 if both else 1
    return joined


def _byte_pieces() -> dict[int, str]:
    """Return a printable character for each byte: itself if printable, else a character from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(ord("\u00ae"), 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}


def cleaner(clean: Clean) -> Callable[[str], str]:
    """Return open_clip's text cleaning of this name."""
    fix_text = import_module("ftfy").fix_text

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


def tokenizer_identity(tokenizer: Any, context_length: int) -> TokenizerIdentity:
    """Return what a cache records of a tokenizer: its class, and a digest of the ids of fixed texts."""
    from teacher_cache.storage.format.identity import TokenizerIdentity, digest_of

    return TokenizerIdentity(
        name=getattr(tokenizer, "name", type(tokenizer).__name__),
        context_length=context_length,
        probe_sha256=digest_of(tokenizer(list(_PROBE_TEXTS)).tolist()),
    )


def order_by_length(texts: pa.ChunkedArray) -> NDArray[np.int64]:
    """Return the order of texts by their number of characters (Unicode code points), shortest first. Stable.

    A cache's layout calls it ``characters`` in ``text_order``. The number of characters needs no tokenizing and
    approximates the number of tokens.
    """
    import pyarrow.compute as pc  # not a dependency of a deployed student

    return np.argsort(pc.utf8_length(texts).to_numpy(), kind="stable")
