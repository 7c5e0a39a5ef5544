"""Dataset adapters: one per published on-disk form, all to the same samples and captions.

An adapter is a function ``read(root, **options) -> Iterator[Sample | Problem]``. It reads the lists and
captions of the published form; whether each image is there and readable is checked once, for all of them,
in :func:`teacher_cache.pipeline.data.datasets.samples.load_samples`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from inspect import Parameter, signature

from teacher_cache.pipeline.data.datasets.records import Problem, Record, Sample, SampleSet
from teacher_cache.storage.errors import UsageError

__all__ = ["ADAPTERS", "Problem", "Record", "Sample", "SampleSet", "adapter"]

Adapter = Callable[..., Iterator[Record]]

# kind -> module with a function read(root, **options); imported on use, so that a missing optional
# dependency of one form does not take the others away
ADAPTERS: dict[str, str] = {
    "coco": "teacher_cache.pipeline.data.datasets.coco",
    "karpathy": "teacher_cache.pipeline.data.datasets.karpathy",
    "flickr": "teacher_cache.pipeline.data.datasets.flickr",
    "webdataset": "teacher_cache.pipeline.data.datasets.webdataset",
    "imagefolder": "teacher_cache.pipeline.data.datasets.imagefolder",
    "table": "teacher_cache.pipeline.data.datasets.table",
    "scenes": "teacher_cache.pipeline.data.datasets.scenes",
    "labelled": "teacher_cache.pipeline.data.datasets.labelled",
}


def adapter(kind: str) -> Adapter:
    """Return the ``read`` function of one kind of dataset, which refuses options that the kind does not have.

    Raises:
        UsageError: the kind is not known, or (when called) an option is not; the message lists those that are.
    """
    if kind not in ADAPTERS:
        raise UsageError(f"dataset kind {kind!r} is not known; write KIND:PATH with one of {', '.join(ADAPTERS)}")
    module = import_module(ADAPTERS[kind])
    parameters = list(signature(module.read).parameters.values())[1:]
    known = [parameter.name for parameter in parameters]
    takes_any = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters)

    def read(root: str, **options: str) -> Iterator[Record]:
        unknown = [name for name in options if name not in known]
        if unknown and not takes_any:
            raise UsageError(
                f"dataset kind {kind!r} has no option {unknown[0]!r}; it has {', '.join(known) or 'none at all'}"
            )
        records: Iterator[Record] = module.read(root, **options)
        return records

    return read
