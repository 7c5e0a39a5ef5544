"""Labelled images for zero-shot classification, with the prompts of their classes.

Names of datasets:

    imagefolder:PATH          a folder per class, optionally below a folder per split
    webdataset:PATH           tars with .cls beside each image, as clip-benchmark exports its datasets
    torchvision:NAME:PATH     a torchvision dataset at PATH; nothing is downloaded
    KIND:PATH                 any other adapter: images with the same captions form a class, with these as its prompts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from teacher_cache.pipeline.data.datasets.labelled import FORMS, ClassPrompts, class_prompts, list_images
from teacher_cache.pipeline.data.datasets.prompts import Classes
from teacher_cache.pipeline.data.datasets.records import Sample, SampleSet
from teacher_cache.pipeline.data.datasets.samples import DatasetSpec, ImageSource, load_samples
from teacher_cache.pipeline.data.images.decode import UndecodableImageError, decode_image
from teacher_cache.pipeline.settings.evaluate import ZeroShotConfig
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.safe_text import printable

__all__ = ["FileImages", "LabelledDataset", "LabelledImages", "UnusableImageError", "open_labelled"]

UnusableImageError = UndecodableImageError


class LabelledImages(Protocol):
    """Images, each of one class. Thread-safe."""

    @property
    def name(self) -> str:
        """Name for messages."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """Number of each image's class, (images,)."""

    def sample_id(self, index: int) -> str:
        """Return the name of an image, for messages."""

    def image(self, index: int) -> Image.Image:
        """Decode one image.

        Raises:
            UnusableImageError: its bytes cannot be decoded; callers skip and report it.
            OSError: it cannot be read.
        """


class FileImages:
    """Images in files, or in members of tars."""

    def __init__(self, name: str, samples: Sequence[Sample], root: str, labels: NDArray[np.int64]) -> None:
        self.name = name
        self.labels = labels
        self._samples = samples
        self._source = ImageSource(root)

    def sample_id(self, index: int) -> str:
        """Return the ``sample_id`` of the image's sample."""
        return self._samples[index].sample_id

    def image(self, index: int) -> Image.Image:
        """Decode one image by the rules of ``teacher_cache.pipeline.data.images.preprocess``."""
        sample = self._samples[index]
        return decode_image(self._source.read(sample.uri, sample.offset, sample.length))


@dataclass(frozen=True)
class LabelledDataset:
    """Labelled images with the prompts of their classes.

    Attributes:
        images: images with labels, which are positions in ``found.prompts``.
        found: classes and prompts.
        lost_images: reasons for images that were skipped while listing; undecodable ones are not known yet.
        spec: spec with which the dataset can be cached, or None.
        samples, digests: results of ``load_samples`` for ``spec``; None and empty without one.
    """

    images: LabelledImages
    found: ClassPrompts
    lost_images: tuple[str, ...] = ()
    spec: DatasetSpec | None = None
    samples: SampleSet | None = None
    digests: tuple[str, ...] = ()

    @property
    def prompts(self) -> tuple[tuple[str, ...], ...]:
        """Prompts of each class."""
        return self.found.prompts


def open_labelled(config: ZeroShotConfig) -> LabelledDataset:
    """Read a labelled dataset and match its classes.

    Raises:
        UsageError: the dataset or a setting cannot be used, or a class has no certain match.
    """
    if config.dataset.startswith("torchvision:"):
        name, _, path = config.dataset.removeprefix("torchvision:").partition(":")
        return _files(config, DatasetSpec("torchvision", path, (("name", name),)))
    spec = DatasetSpec.parse(config.dataset)
    if spec.kind in FORMS:
        return _files(config, spec)
    unusable = [name for name in ("prompts", "templates", "class_names", "split") if getattr(config, name)]
    if unusable:
        raise UsageError(
            f"{spec}: the captions of this kind are its prompts, so {', '.join(unusable)} cannot be set; labelled "
            f"images are imagefolder:PATH, webdataset:PATH and torchvision:NAME:PATH"
        )
    return _by_captions(spec)


def _files(config: ZeroShotConfig, spec: DatasetSpec) -> LabelledDataset:
    options = dict(spec.options)
    # names of the options in an imagefolder of captions
    aliases = {"templates": "templates", "classes": "class_names", "split": "split"}
    name = options.pop("name", "") if spec.kind == "torchvision" else ""
    unknown = sorted(set(options) - set(aliases))
    if unknown:
        raise UsageError(f"{spec}: no option {unknown[0]!r} here; there are {', '.join(aliases)}")
    settings = {option: getattr(config, option) for option in ("prompts", "templates", "class_names", "split")}
    for option, value in options.items():
        settings[aliases[option]] = settings[aliases[option]] or value
    settings = {option: value for option, value in {"name": name, **settings}.items() if value}
    listing = list_images(spec.root, spec.kind, settings.get("split", ""), name)
    cached = DatasetSpec("labelled", spec.root, (("form", spec.kind), *settings.items()))
    if not listing.images:
        met = "".join(f"; the first problem: {problem.where}: {problem.detail}" for problem in listing.problems[:1])
        raise UsageError(f"{spec}: no image of any class{met}")
    matched = class_prompts(
        listing, settings.get("prompts", ""), settings.get("templates", ""), settings.get("class_names", "")
    )
    key: dict[str, str] = {}
    for image, own in zip(listing.images, listing.keys, strict=True):
        key.setdefault(image.sample_id, own)  # of two with one name the first counts
    samples, digests = load_samples(cached)
    labels = np.array([matched.classes.number[key[sample.sample_id]] for sample in samples.samples], np.int64)
    return LabelledDataset(
        FileImages(config.dataset, samples.samples, samples.root, labels),
        matched,
        tuple(f"{problem.where}: {problem.detail}" for problem in samples.problems if problem.lost_image),
        cached,
        samples,
        tuple(digests),
    )


def _by_captions(spec: DatasetSpec) -> LabelledDataset:
    """Read images whose captions are the prompts of their class.

    Raises:
        UsageError: an image has no captions, or all images have the same ones.
    """
    samples, _ = load_samples(spec)
    bare = next((sample.sample_id for sample in samples.samples if not sample.captions), None)
    if bare is not None:
        raise UsageError(
            f"{spec}: the image {printable(bare)!r} has no caption, and captions are the prompts of its class; use "
            "imagefolder:PATH, webdataset:PATH or torchvision:NAME:PATH, with --prompts and the like as flags"
        )
    prompts = tuple(dict.fromkeys(sample.captions for sample in samples.samples))
    if len(prompts) < 2:
        raise UsageError(f"{spec}: all images have the same captions, so there is one class; use imagefolder:PATH")
    number = {captions: index for index, captions in enumerate(prompts)}
    labels = np.array([number[sample.captions] for sample in samples.samples], np.int64)
    classes = Classes(tuple(captions[0] for captions in prompts), {}, "captions")
    return LabelledDataset(
        FileImages(str(spec), samples.samples, samples.root, labels),
        ClassPrompts(classes, prompts, ()),
        tuple(f"{problem.where}: {problem.detail}" for problem in samples.problems if problem.lost_image),
    )
