"""open_clip's own trainer with a cache in place of the teacher.

``open_clip_train.main`` distils with ``--distill-model``: it builds the teacher beside the student, calls it on every
batch and gives both outputs to its distillation loss. Here it runs unchanged, with two of its functions replaced: the
one that builds models returns :class:`CachedDistModel` for the teacher, and the one that opens the training data shows
the crops that the teacher saw and tells the model the rows of each batch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import torch
import webdataset
from open_clip_train import main as trainer
from open_clip_train.data import log_and_continue, tarfile_to_samples_nothrow
from open_clip_train.params import parse_args
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from teacher_cache.pipeline.data.batches.pairs import views_used
from teacher_cache.pipeline.data.images.preprocess import Preprocess, handed_on
from teacher_cache.pipeline.data.tokens import tokenizer_identity
from teacher_cache.pipeline.data.torch_datasets.shown_pairs import ShownPair, ShowPair, rows_of
from teacher_cache.pipeline.evaluate.twins.exclude import listed_rows
from teacher_cache.pipeline.settings.train import OpenClipTrainConfig
from teacher_cache.storage.errors import CacheMismatchError, UsageError
from teacher_cache.storage.format.identity import CacheIdentity
from teacher_cache.storage.read.reader import EmbeddingReader

_TEACHER = "teacher-cache"  # in the place of the model's name
_PICTURES = "jpg;png;jpeg;webp"  # open_clip's order


class CachedDistModel(nn.Module):
    """open_clip's ``dist_model`` without a model: returns the teacher's rows of the batch that was loaded last.

    Args:
        reader: reader of the cache. All its embeddings are loaded into memory.
        views: number of views that batches may show.
        exclude: list of images that no batch may show (``teacher-cache twins --out``). Default: none.
    """

    def __init__(self, reader: EmbeddingReader, views: int, exclude: str | None = None) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))  # DistributedDataParallel refuses a module without one
        self._reader, self._exclude = reader, exclude
        self._listed = listed_rows(exclude, reader)[0] if exclude else np.empty(0, np.int64)
        self._image, self._text = reader.resident("image"), reader.resident("text")
        self._boxes = reader.resident("image", "view") if views > 1 else None
        self._logit_scale = reader.identity.teacher.logit_scale
        self._tokens: Tensor | None = None
        self._features: tuple[Tensor, Tensor] | None = None

    def load(self, batch: ShownPair) -> None:
        """Look up the rows of a batch, for the next call.

        Raises:
            OSError, CacheMismatchError: as :func:`rows_of`; or a crop is not the one that the teacher saw.
            UsageError: an image is on the list of ``exclude``.
        """
        images, captions = rows_of(self._reader, batch)
        if (listed := np.isin(images, self._listed)).any():
            raise UsageError(
                f"{batch.name[int(np.argmax(listed))]}: is on the list of images to leave out, {self._exclude}. "
                "open_clip's trainer takes every pair of --train-data: take all listed images out of it"
            )
        views = np.asarray(batch.view)
        if self._boxes is not None:
            wrong = (views > 0) & (self._boxes.take(images, views) != np.asarray(batch.box)).any(axis=1)
            if wrong.any():
                raise CacheMismatchError(
                    f"{batch.name[int(np.argmax(wrong))]}: the crop drawn here is not the one in "
                    f"{self._reader.location}. Train on the evaluation crops: --views 1"
                )
        self._tokens = batch.tokens
        self._features = torch.from_numpy(self._image.take(images, views)), torch.from_numpy(self._text.take(captions))

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        """Return the teacher's features, float32 (batch, teacher_dim), and its logit scale.

        Raises:
            CacheMismatchError: ``texts`` are not the tokens of the batch that was loaded last.
        """
        if self._features is None or self._tokens is None or not torch.equal(texts.cpu(), self._tokens):
            raise CacheMismatchError(
                f"{self._reader.location}: the captions of this batch are not those of the batch that was loaded last, "
                "so its rows are not known. The trainer must use each batch as it comes, before it loads the next."
            )
        image, text = (features.to(texts.device, torch.float32) for features in self._features)
        return {"image_features": image, "text_features": text, "logit_scale": image.new_tensor(self._logit_scale)}


class _Batches:
    """Loader that tells the teacher of each batch before it hands it to the trainer."""

    def __init__(self, loader: Any, teacher: CachedDistModel, counts: Any) -> None:
        self._loader, self._teacher = loader, teacher
        self.num_batches, self.num_samples = counts.num_batches, counts.num_samples

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for fields in self._loader:
            batch = ShownPair(*fields)
            self._teacher.load(batch)
            yield batch.pixels, batch.tokens


class _CsvPairs(Dataset[ShownPair]):
    """Pairs of open_clip's ``CsvDataset``."""

    def __init__(self, pairs: Any, show: ShowPair) -> None:
        self._images, self._captions, self._show = pairs.images, pairs.captions, show

    def __getitem__(self, index: int) -> ShownPair:
        path = str(self._images[index])
        return self._show(Path(path).read_bytes, str(self._captions[index]), path)


class _Replaced:
    """Replacements of two functions of ``open_clip_train.main``."""

    def __init__(self, reader: EmbeddingReader, views: int, exclude: str | None) -> None:
        self._reader, self._views = reader, views
        self._teacher = CachedDistModel(reader, views, exclude)
        self._preprocess: Preprocess | None = None

    def create_model_and_transforms(self, name: str, *args: Any, **settings: Any) -> tuple[Any, Any, Any]:
        """Return the teacher, or open_clip's student after a check of its preprocessing."""
        if name == _TEACHER:
            return self._teacher, None, None
        student, *transforms = trainer.create_model_and_transforms(name, *args, **settings)
        self._preprocess = Preprocess.of_model(student)
        _require_same_pixels(name, self._preprocess, self._reader.identity, self._reader.location)
        return student, *transforms

    def get_data(self, args: Any, transforms: Any, epoch: int = 0, tokenizer: Any = None) -> dict[str, Any]:
        """Return open_clip's data; the training batches are the pairs that the cache knows."""
        identity = self._reader.identity
        _require_same_tokens(args.model, tokenizer, identity, self._reader.location)
        data: dict[str, Any] = trainer.get_data(args, transforms, epoch=epoch, tokenizer=tokenizer)
        assert self._preprocess is not None  # the student is built before its data is opened
        show = ShowPair(identity, self._preprocess, tokenizer, self._views)
        theirs = data["train"].dataloader
        data["train"].dataloader = _Batches(_showing(theirs, show), self._teacher, theirs)
        return data


def train(config: OpenClipTrainConfig) -> None:
    """Run open_clip's trainer with the rows of a cache as its teacher.

    Raises:
        UsageError: an argument cannot be used with a cache, or the student's preprocessing or tokenizer differs from
            the teacher's.
        CacheError: the cache cannot be read, or a batch is not in it.
        SystemExit: open_clip's parser refuses an argument, or its trainer ends early.
    """
    _refuse(parse_args(config.arguments))
    reader = EmbeddingReader(config.cache)
    if not reader.identity.dataset.captions:
        raise UsageError(f"{config.cache} has no captions, and open_clip distils pairs. Use teacher-cache train")
    replaced = _Replaced(reader, views_used(reader, config.views), config.exclude)
    # a copy of the function with two other globals: open_clip's module stays as it is
    named = {name: getattr(replaced, name) for name in ("create_model_and_transforms", "get_data")}
    run = FunctionType(trainer.main.__code__, vars(trainer) | named)
    try:
        if run([*config.arguments, "--distill-model", _TEACHER, "--distill-pretrained", config.cache]):
            raise SystemExit(1)  # it has printed why
    finally:
        # it sets every logger to INFO, and torch's would write a dozen lines at exit, behind an error's one
        for name in list(logging.root.manager.loggerDict):
            if name.startswith("torch"):
                logging.getLogger(name).setLevel(logging.WARNING)


def _refuse(args: Any) -> None:
    for wrong, message in (
        (
            not args.train_data or args.dataset_type == "synthetic",
            "--train-data is missing: name the CSV or the tars of the pairs in the cache",
        ),
        (args.accum_freq > 1, "--accum-freq: open_clip distils without it; leave it out"),
        ("coca" in args.model.lower(), f"--model {args.model}: open_clip distils no CoCa; name another student"),
    ):
        if wrong:
            raise UsageError(message)


def _showing(loader: Any, show: ShowPair) -> Any:
    """Return a loader of the same order that yields :class:`ShownPair` batches."""
    if isinstance(loader, DataLoader):
        return DataLoader(
            _CsvPairs(loader.dataset, show),
            batch_size=loader.batch_size,
            sampler=loader.sampler,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            drop_last=loader.drop_last,
        )
    stages = loader.pipeline[0].dataset.pipeline
    # webdataset newer than 0.2.86 marks the ends of tars, and open_clip's own reader fails there
    own = webdataset.tarfile_to_samples(handler=log_and_continue)
    stages[:] = [own if stage is tarfile_to_samples_nothrow else stage for stage in stages]
    # behind the choice of samples, and before they are put into batches, open_clip decodes
    decoding = slice(1 + next(at for at, stage in enumerate(stages) if "_select" in repr(stage)), -1)
    stages[decoding] = [webdataset.map(partial(_show_sample, show))]
    return loader


def _show_sample(show: ShowPair, sample: dict[str, Any]) -> ShownPair:
    data, caption = webdataset.filters.getfirst(sample, _PICTURES), sample["txt"].decode("utf-8", "replace")
    return show(lambda: data, caption, f"{sample['__url__']}, {sample['__key__']}")


def _require_same_pixels(student: str, own: Preprocess, identity: CacheIdentity, cache: str) -> None:
    teacher, seen = handed_on(identity.preprocess), own.to_config()
    height, width = identity.preprocess.image_size
    wrong = [name for name in teacher if list(np.atleast_1d(seen[name])) != list(np.atleast_1d(teacher[name]))]
    if own.size[0] * width != own.size[1] * height:
        wrong.append("size")
    if wrong:
        mean, std = (" ".join(map(str, teacher[name])) for name in ("mean", "std"))
        size = f" --force-image-size {height} {width}" if "size" in wrong else ""
        raise UsageError(
            f"student {student} is shown other pixels than the teacher of {cache} ({', '.join(wrong)}). Add: "
            f"--image-mean {mean} --image-std {std} --image-interpolation {teacher['interpolation']} "
            f"--image-resize-mode {teacher['resize_mode']}{size}"
        )


def _require_same_tokens(student: str, tokenizer: Any, identity: CacheIdentity, cache: str) -> None:
    teacher, length = identity.tokenizer, int(tokenizer([""]).shape[1])
    if length != teacher.context_length:
        raise UsageError(
            f"student {student} reads {length} tokens, the teacher of {cache} {teacher.context_length}. Add: "
            f"--force-context-length {teacher.context_length}"
        )
    if tokenizer_identity(tokenizer, length).probe_sha256 != teacher.probe_sha256:
        raise UsageError(
            f"the tokenizer of student {student} ({type(tokenizer).__name__}) gives other tokens than that of the "
            f"teacher of {cache} ({teacher.name}). Name a --model with the teacher's tokenizer, or use teacher-cache "
            "train, whose students may have another one"
        )
