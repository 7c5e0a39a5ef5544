"""Dataset adapters: one per published on-disk form, all with the same records.

An adapter is a module with a function ``read(root, **options) -> Iterator[Sample | Problem]``. It reads the lists and
captions of the published form. :func:`teacher_cache.pipeline.data.datasets.samples.load_samples` then checks the images
of all forms. Its ``check(root, **options)``, if it has one, raises early what ``read`` would raise at its start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from importlib import import_module
from inspect import signature
from types import ModuleType

from teacher_cache.pipeline.data.datasets.files import is_pattern, require_there, text_encoding
from teacher_cache.pipeline.data.datasets.holdout import in_sample, parse_share, with_drawn_split
from teacher_cache.pipeline.data.datasets.part import Part
from teacher_cache.pipeline.data.datasets.records import Record, Sample, Uncaptioned
from teacher_cache.pipeline.settings.names import did_you_mean
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.safe_text import printable

Adapter = Callable[..., Iterator[Record]]

# modules here with a function read(root, **options); imported on use, since a form may need an optional package
ADAPTERS = ("coco", "karpathy", "flickr", "webdataset", "imagefolder", "images", "table", "scenes", "labelled")
KIND_OF = f"KIND:PATH with one of {', '.join(ADAPTERS)}"
_ALSO_CALLED = {"csv": "table", "tsv": "table", "parquet": "table", "tar": "webdataset", "wds": "webdataset"}
# settings of every kind, beside those of its own
PART = "part"
"""Setting of every kind: a part of the dataset, such as ``3/100``."""
SAMPLE = "sample"
"""Setting of every kind: a share of its images, such as ``5%``."""
_HOLDOUT, _UNCAPTIONED = "holdout", "uncaptioned"
_SHARED = (_HOLDOUT, _UNCAPTIONED, SAMPLE, PART)
_DELIMITERS = ": tabs, commas, semicolons and bars are told apart from the header"
_ADVICE = {("table", name): _DELIMITERS for name in ("delimiter", "delim", "sep", "separator")}


def require_kind(kind: str) -> None:
    """Check that a kind of dataset is known.

    Raises:
        UsageError: it is not. The message names the most similar kind and all kinds.
    """
    if kind not in ADAPTERS:
        meant = f" Did you mean {_ALSO_CALLED[kind]}?" if kind in _ALSO_CALLED else did_you_mean(kind, ADAPTERS)
        raise UsageError(f"dataset kind {printable(kind)!r} is not known.{meant} Write {KIND_OF}")


def check_form(kind: str, root: str, options: dict[str, str]) -> None:
    """Check the settings of a dataset, that its root exists, and what its ``check`` checks.

    Raises:
        UsageError: a setting is unknown or has an impossible value, the root does not exist or has another form.
    """
    # scenes are made where there are none, and webdataset says more
    if kind not in ("scenes", "webdataset") and "://" not in root and not is_pattern(root):
        require_there(root)
    module = _module(kind)  # may import pyarrow, which takes a while
    own, _, _ = _settings(module, kind, options)
    if hasattr(module, "check"):
        module.check(root, **own)


def adapter(kind: str) -> Adapter:
    """Return the ``read`` function of one kind of dataset. It has the settings of every kind, and refuses unknown ones.

    Every kind has ``holdout`` (a share such as ``10%`` of the images becomes the split ``test``, the others ``train``)
    and ``uncaptioned`` (``keep``: an image that no caption names is a sample without captions; ``drop``: a problem).
    Every kind but labelled has ``sample`` (a share of the images, drawn by their ids; the others are left out) and
    ``part`` (:mod:`teacher_cache.pipeline.data.datasets.part`), which the caller cuts out.

    Raises:
        UsageError: the kind is unknown, or (when called) a setting is. The message lists the known ones.
    """
    module = _module(kind)

    def read(root: str, **options: str) -> Iterator[Record]:
        own, share, keep = _settings(module, kind, options)
        records = _as_asked(module.read(root, **own), share, keep, f"{kind}:{root}")
        if SAMPLE not in options:
            return records
        drawn = parse_share(SAMPLE, options[SAMPLE])
        return (record for record in records if in_sample(record, drawn))

    return read


def _as_asked(records: Iterator[Record], share: Fraction | None, keep: bool, where: str) -> Iterator[Record]:
    for record in records:
        if isinstance(record, Uncaptioned):
            record = record.sample if keep else record.problem()  # noqa: PLW2901
        yield with_drawn_split(record, share, where) if share and isinstance(record, Sample) else record


def _module(kind: str) -> ModuleType:
    require_kind(kind)
    return import_module(f"{__name__}.{kind}")


def _settings(module: ModuleType, kind: str, options: dict[str, str]) -> tuple[dict[str, str], Fraction | None, bool]:
    """Return the adapter's own settings, the share to hold out, and whether images without captions are kept."""
    of_module = list(signature(module.read).parameters)[1:]
    known = [*of_module, *(name for name in _SHARED if name not in of_module)]
    unknown = [name for name in options if name not in known]
    if unknown:
        hint = _ADVICE.get((kind, unknown[0]), "")
        raise UsageError(f"dataset kind {kind!r} has no option {unknown[0]!r}{hint}; it has {', '.join(known)}")
    if "encoding" in options:
        text_encoding(options["encoding"] or "utf-8")
    uncaptioned = options.get(_UNCAPTIONED, "keep" if kind == "images" else "drop")
    if uncaptioned not in ("keep", "drop"):
        raise UsageError(f"uncaptioned={printable(uncaptioned)!r} is not known; it is one of keep, drop")
    if PART in options:
        Part.parse(options[PART])
    if SAMPLE in options:
        parse_share(SAMPLE, options[SAMPLE])
    if kind == "labelled" and (cut := next((name for name in (PART, SAMPLE) if name in options), None)):
        raise UsageError(
            f"{cut}={printable(options[cut])}: labelled images share the prompts of all classes, and are not cut "
            "into parts; leave it out"
        )
    own = {name: value for name, value in options.items() if name in of_module or name not in _SHARED}
    share = parse_share(_HOLDOUT, options[_HOLDOUT]) if _HOLDOUT in options and _HOLDOUT not in own else None
    return own, share, uncaptioned == "keep"
