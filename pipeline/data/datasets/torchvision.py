"""Labelled images of torchvision's datasets, read from disk and never downloaded.

If torchvision keeps a file per image, that file is read. In other datasets (CIFAR's batches, MNIST's arrays) an image
has the address ``torchvision://NAME/SPLIT/NUMBER/ROOT``, and its bytes are a PPM or PGM of its pixels: the same with
every library version, so that a cache can prove them.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torchvision
from fsspec.spec import AbstractFileSystem
from numpy.typing import NDArray

from teacher_cache.pipeline.data.datasets.files import contents
from teacher_cache.pipeline.data.datasets.prompts import SAME_ORDER
from teacher_cache.pipeline.data.datasets.records import Listing, Sample
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.safe_text import printable

# default split -> datasets; "" if torchvision has no splits for them
_DATASETS = {
    "test": "CIFAR10 CIFAR100 Country211 DTD FER2013 FGVCAircraft FashionMNIST Flowers102 Food101 GTSRB KMNIST MNIST "
    "OxfordIIITPet PCAM RenderedSST2 STL10 SVHN StanfordCars USPS",
    "val": "ImageNet Imagenette",
    "": "Caltech101 Caltech256 EuroSAT SUN397",
}
TORCHVISION = {name: split for split, names in _DATASETS.items() for name in names.split()}
# these take train=True or False instead of a split
_BY_FLAG = ("CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "USPS")
_CALTECH256_MARKS = re.compile(r"^\d{3}\.|-101$")


def list_torchvision(root: str, name: str, split: str = "") -> Listing:
    """List the images of one split with their classes.

    The keys of classes are torchvision's names, or numbers if it has none.

    Args:
        root: torchvision's root.
        split: torchvision's name of the split. Default: ``test``; for ImageNet and Imagenette ``val``.

    Raises:
        UsageError: the dataset is unknown or missing, or the split is unknown or has no labels.
    """
    where = f"torchvision:{name}:{root}"
    _opened.cache_clear()  # the folder may have changed
    dataset, split = _open(name, root, split)
    labels = _labels(where, dataset)
    classes = list(getattr(dataset, "classes", None) or getattr(dataset, "categories", None) or [])
    names = [item[0] if isinstance(item, tuple) else str(item) for item in classes]
    named = len(names) > int(labels.max()) and len(set(names)) == len(names)
    if named:
        own = {class_name: _words(name, class_name) for class_name in names}
    else:
        own = {str(number): str(number) for number in range(int(labels.max()) + 1)}
    keys = list(own)
    base = Path(root).resolve()
    files = _files(dataset)
    images = []
    for number in range(len(labels)):
        if files is None:
            uri = f"torchvision://{name}/{split or 'all'}/{number}/{base.as_posix().lstrip('/')}"
        else:
            path = Path(files[number]).resolve()
            uri = path.relative_to(base).as_posix() if path.is_relative_to(base) else str(path)
        images.append(Sample(f"{number:06d}" if files is None else uri, uri, split, ()))
    order = SAME_ORDER.get(name, "")
    return Listing(where, images, [keys[label] for label in labels], [], own, named, order_of=order)


def has_layout(root: str, name: str) -> bool:
    """Return whether torchvision can open its dataset of this name in a folder."""
    try:
        _open(name, root, "")
    except UsageError:
        return False
    return True


class TorchvisionFiles(AbstractFileSystem):  # type: ignore[misc]
    """fsspec file system of ``torchvision://NAME/SPLIT/NUMBER/ROOT``, with ``cat_file`` only."""

    protocol = "torchvision"

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        """Return the image as PPM, or PGM if grey; if torchvision cannot decode it, the reason as bytes.

        Raises:
            FileNotFoundError: the dataset no longer exists, or has fewer images.
        """
        name, split, number, root = self._strip_protocol(path).split("/", 3)
        try:
            dataset = _opened(name, f"/{root}", "" if split == "all" else split)
            image = dataset[int(number)][0]
        except (RuntimeError, IndexError) as error:  # missing or incomplete
            raise FileNotFoundError(f"{path}: {error}") from error
        except OSError as error:
            if error.errno is not None:
                raise
            return f"torchvision cannot decode it: {error}".encode()  # Pillow's own errors
        pixels = image if image.mode in ("L", "RGB") else image.convert("RGB")
        head = f"P{5 if pixels.mode == 'L' else 6} {pixels.width} {pixels.height} 255\n".encode()
        data: bytes = head + pixels.tobytes()
        return data[start:end]


def _open(name: str, root: str, split: str) -> tuple[Any, str]:
    """Return the dataset and its split."""
    where = f"torchvision:{name}:{root}"
    if name not in TORCHVISION:
        raise UsageError(
            f"{printable(where)}: write torchvision:NAME:PATH with one of {', '.join(sorted(TORCHVISION))}; other "
            "datasets as imagefolder:PATH or webdataset:PATH"
        )
    if not Path(root).is_dir():
        raise UsageError(f"{where}: no folder {root}; name the one that was given to torchvision as its root")
    its_split = (split or TORCHVISION[name]) if TORCHVISION[name] else ""
    if name in _BY_FLAG and its_split not in ("train", "test"):
        raise UsageError(f"{where}: no split {printable(its_split)!r}; there are 'train' and 'test'")
    if not TORCHVISION[name] and split not in ("", "all"):
        raise UsageError(f"{where}: torchvision has no splits of it; leave split ({printable(split)!r}) out")
    try:
        return _opened(name, str(Path(root).resolve()), its_split), its_split
    except (RuntimeError, OSError, ValueError, ImportError, KeyError) as error:
        raise UsageError(
            f"{where}: torchvision cannot open it ({printable(str(error))}); {root} holds {contents(Path(root))}. "
            "Nothing is downloaded here."
        ) from error


@lru_cache(maxsize=2)
def _opened(name: str, root: str, split: str) -> Any:
    settings: dict[str, Any] = {"split": split} if split else {}
    if name in _BY_FLAG:
        settings = {"train": split == "train"}
    # no download=: not all accept it, and False is the default
    return getattr(torchvision.datasets, name)(root, **settings)


def _words(name: str, category: str) -> str:
    """Return the name of a category for a prompt."""
    if name == "Caltech256":  # 002.american-flag; -101 marks categories of Caltech101
        return _CALTECH256_MARKS.sub("", category).replace("-", " ")
    slash = " " if name == "SUN397" else "/"  # apartment_building/outdoor; but F-16A/B
    return category.replace("_", " ").replace("/", slash)


def _files(dataset: Any) -> list[str | Path] | None:
    """Return the file of each image, if torchvision keeps a list of files."""
    for attribute in ("_image_files", "_images", "_samples", "samples"):
        listed = getattr(dataset, attribute, None)
        if isinstance(listed, list) and listed and len(listed) == len(dataset):
            paths = [item[0] if isinstance(item, tuple) else item for item in listed]
            if all(isinstance(path, (str, Path)) for path in paths):
                return paths
    return None


def _labels(where: str, dataset: Any) -> NDArray[np.int64]:
    """Return the label of each image, without decoding if the dataset keeps a list of labels."""
    targets: Any = None
    for attribute in ("targets", "labels", "_labels", "y"):
        targets = getattr(dataset, attribute, None)
        if targets is not None and len(targets) == len(dataset):
            break
    else:
        pairs = getattr(dataset, "_samples", None)
        targets = [pair[1] for pair in pairs] if pairs else [dataset[index][1] for index in range(len(dataset))]
    try:
        labels = np.array([int(label) for label in targets], np.int64)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where}: images without a label ({error}); name another split") from error
    if not len(labels) or labels.min() < 0:
        seen = f"a label {labels.min()}" if len(labels) else "no images"
        raise UsageError(f"{where}: {seen}; labels from 0 on are wanted, name another split")
    return labels
