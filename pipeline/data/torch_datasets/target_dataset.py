"""Rows of a cache as a PyTorch dataset, for any trainer: targets, boxes and, on request, pixels and tokens."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from multiprocessing.context import get_spawning_popen
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from teacher_cache.pipeline.data.batches.cached_samples import CachedSamples
from teacher_cache.pipeline.data.batches.pairs import CaptionDraw, Pairs, stored_crops, views_used
from teacher_cache.pipeline.data.batches.student_images import StudentImages
from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.data.images.preprocess import Preprocess, handed_on
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.format.layout import Tower
from teacher_cache.storage.read.content_index import ContentRows
from teacher_cache.storage.read.reader import EmbeddingReader
from teacher_cache.storage.read.resident import ResidentRows

_ALL_CHUNKS = 1 << 30


class _Opened:
    """Files of a cache that one process has open."""

    def __init__(self, reader: EmbeddingReader, kept_chunks: int) -> None:
        self.process, self.reader, self.kept_chunks = os.getpid(), reader, kept_chunks

    @cached_property
    def samples(self) -> CachedSamples:
        """The tables."""
        return CachedSamples(self.reader, self.kept_chunks)


class TargetDataset(Dataset[dict[str, Tensor]]):
    """Map-style dataset of the images of a cache, each with the teacher's targets.

    An item is a dict of tensors, which ``torch.utils.data.default_collate`` stacks to a batch:

    ========== ======================= ==========================================================================
    key        shape and dtype         meaning
    ========== ======================= ==========================================================================
    row        () int64                row of the image in the cache
    image      (dim,) ``dtype``        teacher's image embedding, of unit norm
    box        (5,) float32            region that the teacher saw: top, left, height, width in source pixels, and
                                       1.0 if it was mirrored
    caption    (captions,) int64       rows of the captions in the cache
    text       (captions, dim) dtype   teacher's text embeddings of these captions, of unit norm
    pixels     (3, height, width)      this region, float32, normalized: after :meth:`with_images`
    tokens     (captions, length)      these captions, int64: after :meth:`with_tokens`
    ========== ======================= ==========================================================================

    Captions and views are drawn at random, by torch's generator of the process: ``torch.manual_seed`` repeats them.

    Worker processes open the cache for themselves. Resident rows are loaded when the dataset is made, each chunk once,
    and all workers share this memory, forked or spawned. A pickle for another machine holds no rows and loads them
    when they are used. Caches in object stores need ``multiprocessing_context="forkserver"`` or ``"spawn"``.

    Args:
        cache: Folder or URL of a sealed cache, or the open cache.
        split: Split of the images. Default: all.
        rows: Image rows in the order of the items, or what :meth:`lookup` returned: then item ``i`` has the very image
            and caption of entry ``i``. Default: the rows of the split that have an embedding, ascending.
        dtype: Dtype of the targets.
        captions: Captions per item; the first is drawn, the next ones follow it. 0 leaves captions out.
        caption_kinds: Weight of each kind of captions, ``{"real": 0.7, "synthetic": 0.3}``: an image draws a kind among
            those that it has, then captions of this kind. Default: all captions alike.
        views: Views to draw from, from the first. 1 is the evaluation crop: resize, then cut the centre. A random crop
            of your own shows another picture than the target: with views, use the boxes or :meth:`with_images`.
        resident: Hold all embeddings in memory (2 bytes per number), for orders at random. If false, chunks are read
            when rows are used, up to 2 GiB per worker stay in memory.

    Attributes:
        rows, caption_rows: Rows of the items, (items,) int64; the caption rows only if they are given, else None.
        kept_chunks: Number of chunks of images whose tables stay in memory, for pixels and tokens. All, for any order.

    Raises:
        CacheNotFoundError, CacheIncompleteError, CacheCorruptError: The cache cannot be used, or lacks a chunk.
        UsageError: There is no such split, view or kind of captions, or images have no caption.
    """

    def __init__(
        self,
        cache: str | EmbeddingReader,
        split: str | None = None,
        rows: ContentRows | Sequence[int] | NDArray[np.int64] | None = None,
        *,
        dtype: Literal["float16", "float32"] = "float16",
        captions: int = 1,
        caption_kinds: Mapping[str, float] | None = None,
        views: int = 1,
        resident: bool = True,
    ) -> None:
        if dtype not in ("float16", "float32"):
            raise UsageError(f"dtype is {dtype!r}, choose 'float16' or 'float32'")
        if caption_kinds and not captions:
            raise UsageError("caption_kinds draws captions, and captions is 0: leave one of them out")
        reader = EmbeddingReader(cache) if isinstance(cache, str) else cache
        self.kept_chunks = _ALL_CHUNKS
        self._opened = _Opened(reader, self.kept_chunks)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self.views, self.resident = views_used(reader, views), resident
        self.rows, self.caption_rows = _chosen(reader, split, rows)
        self.captions = captions if self.caption_rows is None else 1
        self.caption_kinds = dict(caption_kinds or {})
        if captions and self.caption_rows is None:
            way_out = "Name another kind too" if caption_kinds else "To learn from the images alone set captions=0"
            reader.require_captions(np.unique(self.rows), f"{way_out}.", [*self.caption_kinds])
        self._tokenizer: Callable[[list[str]], Any] | None = None
        self._images: StudentImages | None = None
        self._resident: dict[tuple[Tower, str], ResidentRows] = {}
        if resident:
            self._load_resident()

    def with_images(self, size: int | None = None, image_root: str | None = None) -> TargetDataset:
        """Add ``pixels`` to each item: what the teacher saw, decoded as for the teacher. Returns the dataset.

        Args:
            size: Side in pixels. Default: the teacher's own.
            image_root: Folder or URL of the images, if they were moved.

        Raises (when an item is made):
            OSError: The image cannot be read or decoded.
            CacheMismatchError: The image has changed since the teacher saw it.
        """
        seen = self.cache.identity.preprocess
        config = {**handed_on(seen), "size": size or list(seen.image_size)}
        source = ImageSource(image_root or self.cache.manifest.source.image_root)
        self._images = StudentImages(self.cache, source, Preprocess.from_config(config))
        return self

    def with_tokens(self, tokenizer: Callable[[list[str]], Any]) -> TargetDataset:
        """Add ``tokens`` to each item. Returns the dataset.

        Args:
            tokenizer: Returns int64 (texts, length) for a list of texts, as ``open_clip.get_tokenizer(...)`` does.

        Raises:
            UsageError: The items have no captions.
        """
        if not self.captions:
            raise UsageError("tokens need captions: make the dataset with captions=1 or more")
        self._tokenizer = tokenizer
        return self

    @property
    def cache(self) -> EmbeddingReader:
        """The cache, opened by this process."""
        return self._here.reader

    @property
    def logit_scale(self) -> float:
        """The teacher's factor of cosines in its softmax, about 100 for OpenAI's models."""
        return self.cache.identity.teacher.logit_scale

    def lookup(
        self, image_sha256: str | Sequence[str] | None = None, caption: str | Sequence[str] | None = None
    ) -> ContentRows:
        """Return rows of the whole cache by content, for ``rows`` and :meth:`at`: see ``Cache.lookup``."""
        return self.cache.lookup(image_sha256, caption)

    def at(self, rows: ContentRows) -> dict[str, Tensor]:
        """Return the batch of rows that :meth:`lookup` returned, in their order. Without captions, some are drawn.

        Raises:
            UsageError: Captions were looked up without their images.
            CacheError: A row cannot be read.
        """
        return self._batch(self._drawn(*_chosen(self.cache, None, rows)))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Return several items, with one gather of each array.

        Raises:
            IndexError: There is no such item.
            CacheError, OSError: A row or an image cannot be read.
        """
        at = np.asarray(indices, np.int64)
        if len(outside := at[(at < -len(self)) | (at >= len(self))]):
            raise IndexError(f"{self.cache.location}: item {outside[0]} asked for, items are 0 to {len(self) - 1}")
        captions = None if self.caption_rows is None else self.caption_rows[at]
        batch = self._batch(self._drawn(self.rows[at], captions))
        return [{name: values[item] for name, values in batch.items()} for item in range(len(at))]

    def batch(self, pairs: Pairs, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        """Return the batch of some pairs: targets as they are given, everything else read for these rows.

        Args:
            image: (batch, dim) targets of the images.
            text: (batch, captions, dim) targets of the captions.
        """
        boxes = self._take("image", pairs.image_rows, pairs.views, "view")
        batch = {
            "row": torch.from_numpy(pairs.image_rows),
            "image": image.to(self._dtype),
            "box": torch.from_numpy(boxes),
        }
        if pairs.caption_rows.shape[1]:
            batch |= {"caption": torch.from_numpy(pairs.caption_rows), "text": text.to(self._dtype)}
        return batch | self._shown(pairs)

    def _batch(self, pairs: Pairs) -> dict[str, Tensor]:
        image = self._take("image", pairs.image_rows, pairs.views)
        text = self._take("text", pairs.caption_rows.ravel())
        texts = torch.from_numpy(text).view(*pairs.caption_rows.shape, text.shape[1])
        return self.batch(pairs, torch.from_numpy(image), texts)

    def _drawn(self, rows: NDArray[np.int64], captions: NDArray[np.int64] | None) -> Pairs:
        """Return rows with random views and, unless they are given, random captions."""
        views = (torch.rand(len(rows)).numpy() * self.views).astype(np.int64)
        if captions is not None:
            return Pairs(rows, captions[:, None], views)
        draw = CaptionDraw(self.cache, self.captions, self.caption_kinds)
        return Pairs(rows, draw.rows(rows, torch.rand(len(rows)).numpy()), views)

    def _shown(self, pairs: Pairs) -> dict[str, Tensor]:
        """Return pixels and tokens of some pairs, as far as they are asked for."""
        shown: dict[str, Tensor] = {}
        if self._images is not None:
            records = self._here.samples.records(pairs.image_rows)
            crops = stored_crops(self.cache, pairs.image_rows, pairs.views)
            with self._images.ahead(records):
                seen = [self._images.see(record, crop) for record, crop in zip(records, crops, strict=True)]
            shown["pixels"] = torch.stack(seen)
        if self._tokenizer is not None:
            tokens = torch.as_tensor(self._tokenizer(self._here.samples.texts(pairs.image_rows, pairs.caption_rows)))
            shown["tokens"] = tokens.view(*pairs.caption_rows.shape, -1)
        return shown

    def _take(
        self, tower: Tower, rows: NDArray[np.int64], views: int | NDArray[np.int64] = 0, array: str = "embedding"
    ) -> NDArray[Any]:
        if self.resident and not self._resident:
            self._load_resident()
        resident = self._resident.get((tower, array))
        return self.cache.take(tower, rows, views, array) if resident is None else resident.take(rows, views)

    def _load_resident(self) -> None:
        arrays: list[tuple[Tower, str]] = [("image", "embedding"), ("image", "view")]
        if self.captions:
            arrays.append(("text", "embedding"))
        self._resident = {(tower, array): self.cache.resident(tower, array) for tower, array in arrays}

    @property
    def _here(self) -> _Opened:
        if self._opened.process != os.getpid():  # a forked worker
            self._opened = _Opened(copy.copy(self._opened.reader), self.kept_chunks)
        return self._opened

    def __getstate__(self) -> dict[str, Any]:
        # memory can be shared with a process that is being started, and with no other
        shared = self._resident if get_spawning_popen() is not None else {}
        return {**self.__dict__, "_opened": self.cache, "_resident": shared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _opened=_Opened(state["_opened"], state["kept_chunks"]))


def _chosen(
    reader: EmbeddingReader, split: str | None, rows: ContentRows | Sequence[int] | NDArray[np.int64] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
    """Return the image rows of the items, and their caption rows if they are given.

    Raises:
        IndexError: The cache does not have a row.
        UsageError: The split or the rows cannot be used.
    """
    if rows is None:
        return reader.image_rows(split), None
    if split is not None:
        raise UsageError(f"split {split!r} and rows are both given; choose one")
    images, captions = rows if isinstance(rows, ContentRows) else (rows, None)
    if images is None:
        raise UsageError("rows of captions alone are given: look them up together with image_sha256")
    return reader.chunks.places("image").check(np.asarray(images, np.int64))[0], captions
