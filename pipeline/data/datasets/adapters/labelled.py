"""Labelled images for zero-shot classification, with the prompts of their classes as captions, to be cached.

    root/<class>/*.jpg, root/<split>/<class>/*.jpg    form=imagefolder, the default where no tars are
    root/*.tar with KEY.cls beside KEY.jpg            form=webdataset, as clip-benchmark exports its datasets, with
                                                      optional classnames.txt and
                                                      zeroshot_classification_templates.txt
    root in torchvision's layout                      form=torchvision, name=CIFAR10
    root with a published list of images              form=lists: Birdsnap, UCF101 and Hateful Memes

The first readable image has the prompts of all classes as its captions, class by class; the others have none. The other
options choose the prompts, see :func:`class_prompts`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

from teacher_cache.pipeline.data.datasets.adapters import imagefolder, webdataset
from teacher_cache.pipeline.data.datasets.adapters.published_lists import list_published, measured_list, require_list
from teacher_cache.pipeline.data.datasets.files import SPLIT_NAMES, data_folder, open_regular, open_text
from teacher_cache.pipeline.data.datasets.holdout import parse_share, with_drawn_split
from teacher_cache.pipeline.data.datasets.prompts import (
    Classes,
    filled,
    match_classes,
    prompt_set,
    read_class_names,
    read_templates,
    templates_in,
)
from teacher_cache.pipeline.data.datasets.records import Listing, Problem, Record, Sample, clean_captions
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.safe_text import printable

FORMS = ("imagefolder", "webdataset", "torchvision", "lists")
ALL_SPLITS = "all"
_FLAG = re.compile(r"--(prompts|templates|class-names) ")
_NAMES, _TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"


@dataclass(frozen=True)
class ClassPrompts:
    """Classes of a dataset with their prompts.

    Attributes:
        classes: classes and their match with the dataset's.
        prompts: prompts of each class, as in the cache's captions.
    """

    classes: Classes
    prompts: tuple[tuple[str, ...], ...]


def read(
    root: str,
    *,
    form: str = "",
    name: str = "",
    prompts: str = "",
    templates: str = "",
    class_names: str = "",
    split: str = "",
    holdout: str = "",
) -> Iterator[Record]:
    """Read the samples of a labelled dataset; see the module, :func:`list_images` and :func:`class_prompts`."""
    listing = list_images(root, form, split, name, holdout)
    try:
        classes = class_prompts(listing, prompts, templates, class_names)
    except UsageError as error:
        # what zero-shot has flags for stands behind the name here
        message = _FLAG.sub(lambda flag: f"?{flag[1].replace('-', '_')}=", str(error))
        raise UsageError(message.replace("?classes=", "?class_names=")) from error
    yield from listing.problems
    holder = next((number for number, image in enumerate(listing.images) if _is_there(root, image)), 0)
    captions = tuple(chain.from_iterable(classes.prompts))
    for number, image in enumerate(listing.images):
        yield replace(image, captions=captions if number == holder else ())


def check(root: str, *, form: str = "", **settings: str) -> None:
    """Check what :func:`read` checks before it lists the images."""
    checks: dict[str, Callable[[str], object]] = {
        "prompts": prompt_set,
        "templates": read_templates,
        "class_names": read_class_names,
        "holdout": partial(parse_share, "holdout"),
    }
    for name in checks.keys() & settings.keys():
        checks[name](settings[name])
    form = form or form_of(root)
    if form == "imagefolder":
        imagefolder.class_folders(root)
    elif form == "webdataset":
        webdataset.check(root)
    elif form == "lists":
        require_list(root, settings.get("split", ""))


def form_of(root: str) -> str:
    """Return ``webdataset`` where tars lie, also in folders of splits; ``lists``; else ``imagefolder``."""
    folders = (Path(root, split) for split in ("", *SPLIT_NAMES))
    tars = root.split("?")[0].endswith(".tar") or any(next(folder.glob("*.tar"), None) for folder in folders)
    return "webdataset" if tars else "lists" if measured_list(root) else "imagefolder"


def list_images(root: str, form: str = "", split: str = "", name: str = "", holdout: str = "") -> Listing:
    """List the images of one split with their classes.

    Args:
        form: one of ``FORMS``. Default: that of :func:`form_of`.
        name: name of the dataset in torchvision.
        split: a split, or ``all``. Default: the only one; with ``holdout`` all.
        holdout: share of the images that is held out, of a dataset without splits.

    Raises:
        UsageError: the form or split is unknown, there are no images, or one of several splits must be named.
    """
    form = form or form_of(root)
    if form not in FORMS:
        raise UsageError(f"form={printable(form)!r} is not known; labelled images are read as {' or '.join(FORMS)}")
    if form in ("torchvision", "lists"):
        if holdout:
            where = f"torchvision:{name}:{root}" if form == "torchvision" else f"{form}:{root}"
            raise UsageError(f"{where}: holdout is for datasets without splits; leave it out")
        return _list_published(root, form, split, name)
    return _list_files(root, form, split, holdout)


def _list_published(root: str, form: str, split: str, name: str) -> Listing:
    if form == "lists":
        return list_published(root, split)
    from teacher_cache.pipeline.data.datasets.torchvision import list_torchvision  # imports torch

    return list_torchvision(root, name, split)


def _list_files(root: str, form: str, split: str, holdout: str) -> Listing:
    where = f"{form}:{root}"
    listed = list(webdataset.read_labels(root) if form == "webdataset" else imagefolder.read_classes(root))
    images = [(record, key) for record, _, key in listed if isinstance(record, Sample)]
    if holdout:
        share, split = parse_share("holdout", holdout), split or ALL_SPLITS
        images = [(with_drawn_split(image, share, where), key) for image, key in images]
    images = _of_split(where, images, split)
    # leave out problems of other splits: they would look like lost images of this one
    problems = [
        record
        for record, its_split, _ in listed
        if isinstance(record, Problem) and (holdout or split in ("", ALL_SPLITS) or its_split in (split, None))
    ]
    samples, keys = [image for image, _ in images], [key for _, key in images]
    if form == "imagefolder":
        own = {folder: folder.replace("_", " ") for folder in imagefolder.class_folders(root)}
        return Listing(where, samples, keys, problems, own, True)
    own, named = _numbered_classes(where, root, sorted({int(key) for key in keys}))
    file = _beside(root, _TEMPLATES)
    templates = templates_in(file) if file else ()
    return Listing(where, samples, keys, problems, own, named, templates, order_of="any")


def _of_split(where: str, images: list[tuple[Sample, str]], split: str) -> list[tuple[Sample, str]]:
    """Return the images of one split, with their classes."""
    counts = Counter(image.split for image, _ in images)
    shown = ", ".join(f"{name or 'none'!r} ({count} images)" for name, count in sorted(counts.items()))
    if split == ALL_SPLITS or (not split and len(counts) <= 1):
        return images
    if not split:
        raise UsageError(
            f"{where}: images of several splits, {shown}; name one behind the dataset, ?split=NAME, or take "
            f"?split={ALL_SPLITS}; of zero-shot --split does the same"
        )
    of_split = [(image, key) for image, key in images if image.split == split]
    if not of_split and list(counts) == [""]:
        raise UsageError(f"{where}: has no splits: leave --split out, or set a part aside by ?holdout=10%")
    if not of_split:
        raise UsageError(f"{where}: no image of split {printable(split)!r}; there are {shown or 'no images'}")
    return of_split


def _numbered_classes(where: str, root: str, numbers: list[int]) -> tuple[dict[str, str], bool]:
    """Return the names of numbered classes, and whether a file beside the tars names them."""
    file = _beside(root, _NAMES)
    names = _lines(file) if file else []
    # a blank line would shift every class after it
    if not all(names):
        raise UsageError(f"{file}: an empty line, which would be a class without a name; remove it")
    if not names:
        return {str(number): str(number) for number in numbers}, False
    if numbers and numbers[-1] >= len(names):
        raise UsageError(f"{where}: label {numbers[-1]}, and {file} has {len(names)} names, of 0 to {len(names) - 1}")
    return {str(number): name for number, name in enumerate(names)}, True


def class_prompts(listing: Listing, prompts: str = "", templates: str = "", class_names: str = "") -> ClassPrompts:
    """Match the classes of a dataset and fill in their prompts.

    Args:
        prompts: prompt set, for its templates and, where it has some, its class names.
        templates: name or file (:func:`teacher_cache.pipeline.data.datasets.prompts.read_templates`). Default: those of
            ``prompts``, else the dataset's own, else ``photo``.
        class_names: JSON file (:func:`teacher_cache.pipeline.data.datasets.prompts.read_class_names`) or ``imagenet``.
            Default: the names of ``prompts``, else the dataset's own.

    Raises:
        UsageError: a class has no unambiguous match, names or templates cannot be used, or there are fewer than two
            classes.
    """
    known = prompt_set(prompts) if prompts else None
    names: list[str] | dict[str, str] | None = None
    if class_names:
        names = read_class_names(class_names)
    elif known is not None and known.class_names is not None:
        names = list(known.class_names)
    classes = _matched(listing, prompts, names, class_names)
    if len(classes.names) < 2:
        raise UsageError(f"{listing.where}: there is one class, {classes.names[0]!r}; two are wanted to choose from")
    if templates:
        fill = read_templates(templates)
    elif known is not None:
        fill = known.templates
    else:
        fill = listing.templates or read_templates("photo")
    by_class = []
    for name in classes.names:
        texts, problems = clean_captions(name, filled(fill, name))
        if problems:
            raise UsageError(f"{listing.where}: a prompt of class {printable(name)!r}: {problems[0].detail}")
        by_class.append(texts)
    return ClassPrompts(classes, tuple(by_class))


def _matched(listing: Listing, prompts: str, names: list[str] | dict[str, str] | None, class_names: str) -> Classes:
    """Match the classes by the first unambiguous rule."""
    same_order = bool(prompts) and listing.order_of == prompts and not class_names
    if names is None and listing.order_of != "any" and listing.own and all(key.isdigit() for key in listing.own):
        raise UsageError(
            f"{listing.where}: the classes are called by numbers ({next(iter(listing.own), '')} ...), which make no "
            "prompts; give --prompts NAME of a set with class names, or --class-names FILE.json with their names"
        )
    if listing.named or isinstance(names, dict):
        return match_classes(listing.where, listing.own, names, same_order=same_order, prompts=prompts)
    if names is None:
        raise UsageError(
            f"{listing.where}: its labels are numbers and nothing names its {len(listing.own)} classes (no {_NAMES}); "
            "give --prompts NAME of a set with class names, or --class-names FILE.json, a list in the order of the "
            "numbers"
        )
    if not (same_order or class_names or listing.order_of == "any"):
        raise UsageError(
            f"{listing.where}: its labels are numbers, which are not known to be in the order of the class names of "
            f'{prompts}; name the classes by --class-names FILE.json, {{"0": "its name", ...}}'
        )
    most = max((int(key) for key in listing.own), default=0)
    if most >= len(names):
        raise UsageError(f"{listing.where}: label {most}, and {len(names)} class names, of 0 to {len(names) - 1}")
    # numbers count from 0, so a class without images is no ambiguity
    return Classes(tuple(names), {str(number): number for number in range(len(names))}, "number")


def _beside(root: str, name: str) -> Path | None:
    """Find a text file of clip-benchmark's layout: in the root, or above it if the root is a split's folder."""
    if "://" in root:
        return None
    folder = Path(data_folder(root))
    return next((path for path in (folder / name, folder.parent / name) if path.is_file()), None)


def _lines(path: Path) -> list[str]:
    with open_text(path) as file:
        return [line.strip() for line in file.read().rstrip().splitlines()]


def _is_there(root: str, image: Sample) -> bool:
    """Return whether an image's file can be opened. A URL is assumed to exist."""
    if "://" in root or "://" in image.uri:
        return True
    path = Path(data_folder(root)) / image.uri
    try:
        open_regular(path).close()
    except OSError:
        return False
    return True
