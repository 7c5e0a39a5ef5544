"""open_clip's own tokenizer for many captions: the same ids, each word looked up once.

``SimpleTokenizer`` takes a word apart into bytes and joins their pairs each time that it comes, and makes three tensors
of each caption; a thread that does so holds Python's lock, which the one that runs the model wants between its layers.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from open_clip.tokenizer import SimpleTokenizer

__all__ = ["WordTokens", "by_words", "order_by_length"]

_WORDS = 65_536  # that are remembered: of captions nearly all, however many captions there are


def by_words(tokenizer: Any) -> Callable[[list[str]], torch.Tensor]:
    """This tokenizer in its faster form, or as it is where there is none: of another kind, or one that draws tokens."""
    if type(tokenizer) is SimpleTokenizer and tokenizer.reduction_fn is None:
        return WordTokens(tokenizer)
    found: Callable[[list[str]], torch.Tensor] = tokenizer
    return found


class WordTokens:
    """Texts to token ids, as open_clip's ``SimpleTokenizer`` makes them. Threads may share it.

    Args:
        tokenizer: at its context length, without a reduction mask.
    """

    def __init__(self, tokenizer: SimpleTokenizer) -> None:
        self._tokenizer = tokenizer
        # with a memory of its own, since that of a tokenizer keeps every word that ever came
        self._pairs: Any = copy.copy(tokenizer)
        self._specials = {word: word for word in map(tokenizer.decoder.__getitem__, tokenizer.all_special_ids)}
        self._lock = threading.Lock()
        self._ids = lru_cache(_WORDS)(self._ids_of)

    def __reduce__(self) -> tuple[type[WordTokens], tuple[SimpleTokenizer]]:
        return WordTokens, (self._tokenizer,)

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """int64 (texts, context_length): start token, the text cut to what fits, end token, zeros."""
        length, start, end = self._tokenizer.context_length, self._tokenizer.sot_token_id, self._tokenizer.eot_token_id
        tokens = np.zeros((len(texts), length), np.int64)
        for row, text in enumerate(texts):
            ids = [start]
            for word in self._tokenizer.pat.findall(self._tokenizer.clean_fn(text)):
                ids += self._ids(word)
            del ids[length - 1 :]
            ids.append(end)
            tokens[row, : len(ids)] = ids
        return torch.from_numpy(tokens)

    def _ids_of(self, word: str) -> tuple[int, ...]:
        """The ids of what the pattern found, as ``SimpleTokenizer.encode`` makes them."""
        tokenizer = self._pairs
        of_bytes = "".join(map(tokenizer.byte_encoder.__getitem__, word.encode("utf-8")))
        with self._lock:
            tokenizer.cache = dict(self._specials)
            pieces = tokenizer.bpe(of_bytes)
        return tuple(tokenizer.encoder[piece] for piece in pieces.split(" "))


def order_by_length(texts: pa.ChunkedArray) -> NDArray[np.int64]:
    """Texts by their number of characters (Unicode code points), the shortest first, equal ones as they are.

    What ``text_order`` of a cache's layout calls ``characters``: known before a text is tokenized, and near enough to
    its number of tokens.
    """
    return np.argsort(pc.utf8_length(texts).to_numpy(), kind="stable")
