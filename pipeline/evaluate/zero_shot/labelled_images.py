"""Labelled images for zero-shot classification, with the prompts of their classes.

Names of datasets:

    imagefolder:PATH          a folder per class, optionally below a folder per split
    webdataset:PATH           tars with .cls beside each image, as clip-benchmark exports its datasets
    torchvision:NAME:PATH     a torchvision dataset at PATH; nothing is downloaded
    labelled:PATH             one of these as precompute caches it, with its settings
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from teacher_cache.pipeline.data.datasets.adapters import check_form
from teacher_cache.pipeline.data.datasets.adapters.labelled import (
    FORMS,
    ClassPrompts,
    class_prompts,
    form_of,
    list_images,
)
from teacher_cache.pipeline.data.datasets.holdout import HELD_OUT
from teacher_cache.pipeline.data.datasets.records import SampleSet
from teacher_cache.pipeline.data.datasets.samples import ImageSource, load_samples
from teacher_cache.pipeline.data.datasets.spec import DatasetSpec
from teacher_cache.pipeline.data.images.decode import decode_image
from teacher_cache.pipeline.settings.evaluate import ZeroShotConfig
from teacher_cache.storage.errors import UsageError

# settings behind a dataset's name -> those of its labelled images; classes= is also imagefolder's own
_OPTIONS = {"templates": "templates", "classes": "class_names", "split": "split", "holdout": "holdout"}


@dataclass(frozen=True)
class LabelledDataset:
    """Labelled images with the prompts of their classes. Images may be read from several threads.

    Attributes:
        name: name for messages.
        samples: images that have a file, and the problems of the others.
        labels: (images,) class of each sample, as its position in ``prompts``.
        found: classes and prompts.
        spec: spec with which the dataset can be cached.
        digests: sha256 of each sample's stored bytes.
    """

    name: str
    samples: SampleSet
    labels: NDArray[np.int64]
    found: ClassPrompts
    spec: DatasetSpec
    digests: list[str]

    @property
    def split(self) -> str:
        """Split that was asked for; empty for all images, or for torchvision's test split."""
        return dict(self.spec.options).get("split", "")

    @property
    def prompts(self) -> tuple[tuple[str, ...], ...]:
        """Prompts of each class."""
        return self.found.prompts

    @property
    def lost_images(self) -> tuple[str, ...]:
        """Reason for each image without a usable file. Undecodable images are not known yet."""
        return tuple(str(problem) for problem in self.samples.problems if problem.lost_image)

    @cached_property
    def _source(self) -> ImageSource:
        return ImageSource(self.samples.root)

    def sample_id(self, index: int) -> str:
        """Return the name of an image."""
        return self.samples.samples[index].sample_id

    def image(self, index: int) -> Image.Image:
        """Decode one image.

        Raises:
            UndecodableImageError: its bytes cannot be decoded.
            OSError: it cannot be read.
        """
        sample = self.samples.samples[index]
        return decode_image(self._source.read(sample.uri, sample.offset, sample.length))


def labelled_spec(config: ZeroShotConfig) -> DatasetSpec:
    """Return the spec with which a labelled dataset can be cached, checked without listing its images.

    Raises:
        UsageError: it has no labels, does not exist, or a setting is unknown or has an impossible value.
    """
    if config.dataset.startswith("torchvision:"):
        name, _, path = config.dataset.removeprefix("torchvision:").partition(":")
        spec = DatasetSpec("torchvision", path, (("name", name),))
    else:
        spec = DatasetSpec.parse(config.dataset)
    options, known, as_cached = dict(spec.options), _OPTIONS, spec.kind == "labelled"
    if as_cached:
        spec = DatasetSpec(options.pop("form", "") or form_of(spec.root), spec.root)
        known = known | {"prompts": "prompts", "class_names": "class_names"}
    if spec.kind not in FORMS:
        raise UsageError(
            f"{spec}: images without labels. Labelled images are imagefolder:PATH, webdataset:PATH and "
            "torchvision:NAME:PATH"
        )
    name = options.pop("name", "") if spec.kind == "torchvision" else ""
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise UsageError(f"{spec}: no option {unknown[0]!r} here; there are {', '.join(known)}")
    settings = {option: getattr(config, option) for option in ("prompts", "templates", "class_names", "split")}
    for option, value in options.items():
        settings[known[option]] = settings.get(known[option]) or value
    if settings.get("holdout") and not as_cached:
        settings["split"] = settings["split"] or HELD_OUT
    settings = {option: value for option, value in {"name": name, **settings}.items() if value}
    check_form("labelled", spec.root, {"form": spec.kind, **settings})
    return DatasetSpec("labelled", spec.root, (("form", spec.kind), *settings.items()))


def open_labelled(config: ZeroShotConfig) -> LabelledDataset:
    """Read a labelled dataset and match its classes.

    Raises:
        UsageError: the dataset or a setting cannot be used, or a class has no certain match.
    """
    spec = labelled_spec(config)
    settings = dict(spec.options)
    listing = list_images(
        spec.root, settings["form"], settings.get("split", ""), settings.get("name", ""), settings.get("holdout", "")
    )
    if not listing.images:
        met = "".join(f"; the first problem: {problem}" for problem in listing.problems[:1])
        raise UsageError(f"{config.dataset}: no image of any class{met}")
    matched = class_prompts(
        listing, settings.get("prompts", ""), settings.get("templates", ""), settings.get("class_names", "")
    )
    key: dict[str, str] = {}
    for image, own in zip(listing.images, listing.keys, strict=True):
        key.setdefault(image.sample_id, own)  # of two with one name the first counts
    samples, digests = load_samples(spec)
    labels = np.array([matched.classes.number[key[sample.sample_id]] for sample in samples.samples], np.int64)
    return LabelledDataset(config.dataset, samples, labels, matched, spec, digests)
