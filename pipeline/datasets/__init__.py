"""Dataset adapters: one per published on-disk form, all to the same samples and captions.

An adapter is a function ``read(root, **options) -> Iterator[Sample | Problem]``. It reads the lists and
captions of the published form; whether each image is there and readable is checked once, for all of them,
in :func:`pipeline.samples.load_samples`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import cast

from pipeline.datasets.base import Problem, Record, Sample, SampleSet

__all__ = ["ADAPTERS", "Problem", "Record", "Sample", "SampleSet", "adapter"]

Adapter = Callable[..., Iterator[Record]]

# kind -> module with a function read(root, **options); imported on use, so that a missing optional
# dependency of one form does not take the others away
ADAPTERS: dict[str, str] = {
    "coco": "pipeline.datasets.coco",
    "karpathy": "pipeline.datasets.karpathy",
    "flickr": "pipeline.datasets.flickr",
    "webdataset": "pipeline.datasets.webdataset",
    "imagefolder": "pipeline.datasets.imagefolder",
    "table": "pipeline.datasets.table",
    "scenes": "pipeline.datasets.scenes",
}


def adapter(kind: str) -> Adapter:
    """The ``read`` function of one kind of dataset.

    Raises:
        ValueError: the kind is not known; the message lists those that are.
    """
    if kind not in ADAPTERS:
        raise ValueError(f"dataset kind {kind!r} is not known; write KIND:PATH with one of {', '.join(ADAPTERS)}")
    return cast(Adapter, import_module(ADAPTERS[kind]).read)
