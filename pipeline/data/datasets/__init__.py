"""Dataset adapters: one per published on-disk form, all with the same records.

An adapter is a function ``read(root, **options) -> Iterator[Sample | Problem]``. It reads the lists and captions of the
published form. :func:`teacher_cache.pipeline.data.datasets.samples.load_samples` then checks the images of all forms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from inspect import signature

from teacher_cache.pipeline.data.datasets.records import Record
from teacher_cache.storage.errors import UsageError

__all__ = ["ADAPTERS", "adapter"]

Adapter = Callable[..., Iterator[Record]]

# modules here with a function read(root, **options); imported on use, since a form may need an optional package
ADAPTERS = ("coco", "karpathy", "flickr", "webdataset", "imagefolder", "table", "scenes", "labelled")


def adapter(kind: str) -> Adapter:
    """Return the ``read`` function of one kind of dataset, which refuses unknown options.

    Raises:
        UsageError: the kind is unknown, or (when called) an option is. The message lists the known ones.
    """
    if kind not in ADAPTERS:
        raise UsageError(f"dataset kind {kind!r} is not known; write KIND:PATH with one of {', '.join(ADAPTERS)}")
    module = import_module(f"{__name__}.{kind}")
    known = list(signature(module.read).parameters)[1:]

    def read(root: str, **options: str) -> Iterator[Record]:
        unknown = [name for name in options if name not in known]
        if unknown:
            raise UsageError(f"dataset kind {kind!r} has no option {unknown[0]!r}; it has {', '.join(known)}")
        records: Iterator[Record] = module.read(root, **options)
        return records

    return read
