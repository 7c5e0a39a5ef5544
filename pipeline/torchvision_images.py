"""Labelled images of torchvision's datasets, as they lie on disk; nothing is ever downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.datasets.base import contents, printable
from pipeline.datasets.labelled import Listing
from pipeline.decode import UndecodableImageError
from storage.errors import UsageError

__all__ = ["TORCHVISION", "TorchvisionImages", "open_torchvision"]

# dataset -> the split that is measured if none is named; "" where torchvision knows none
TORCHVISION = {
    "CIFAR10": "test",
    "CIFAR100": "test",
    "Caltech101": "",
    "Caltech256": "",
    "Country211": "test",
    "DTD": "test",
    "EuroSAT": "",
    "FER2013": "test",
    "FGVCAircraft": "test",
    "FashionMNIST": "test",
    "Flowers102": "test",
    "Food101": "test",
    "GTSRB": "test",
    "ImageNet": "val",
    "Imagenette": "val",
    "KMNIST": "test",
    "MNIST": "test",
    "OxfordIIITPet": "test",
    "PCAM": "test",
    "RenderedSST2": "test",
    "STL10": "test",
    "SUN397": "",
    "SVHN": "test",
    "StanfordCars": "test",
    "USPS": "test",
}
# these take train=True or False in place of a split
_BY_FLAG = ("CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "USPS")


class TorchvisionImages:
    """One split of a torchvision dataset.

    Attributes:
        labels: positions in the list of classes that they were matched with.
    """

    def __init__(self, name: str, dataset: Any, numbers: NDArray[np.int64], labels: NDArray[np.int64]) -> None:
        self.name = name
        self.labels = labels
        self._dataset = dataset
        self._numbers = numbers  # torchvision's own

    def sample_id(self, index: int) -> str:
        """The number of the image in its split."""
        return f"{self.name} image {index}"

    def image(self, index: int) -> Image.Image:
        """One image, as torchvision decodes it.

        Raises:
            UndecodableImageError: its bytes are no image.
            OSError: its file cannot be read.
        """
        try:
            image, number = self._dataset[index]
        except OSError as error:
            if error.errno is None:  # Pillow's own: unidentified, truncated
                raise UndecodableImageError(printable(str(error))) from error
            raise
        except (SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UndecodableImageError(printable(f"{type(error).__name__}: {error}")) from error
        assert int(number) == self._numbers[index], f"{self.sample_id(index)}: labels and images are out of step"
        return image


def open_torchvision(rest: str, split: str = "") -> tuple[Any, NDArray[np.int64], Listing]:
    """Open ``NAME:PATH``.

    Args:
        split: as torchvision calls it; ``test``, or ``val`` of ImageNet and Imagenette, if left out.

    Returns:
        The dataset; (images,) its labels; its classes, whose keys are torchvision's names for them, or numbers where it
        has none, and in ``keys`` the key of each label from 0 on.

    Raises:
        UsageError: not a dataset that is known here, not there, or no such split.
    """
    import torchvision

    name, colon, path = rest.partition(":")
    if name not in TORCHVISION or not colon or not path:
        raise UsageError(
            f"torchvision:{printable(rest)}: write torchvision:NAME:PATH with one of {', '.join(TORCHVISION)}; other "
            "datasets as imagefolder:PATH or webdataset:PATH"
        )
    where = f"torchvision:{name}:{path}"
    if not Path(path).is_dir():
        raise UsageError(f"{where}: no folder {path}; name the one that was given to torchvision as its root")
    wanted = split or TORCHVISION[name]
    settings: dict[str, Any] = {"split": wanted} if TORCHVISION[name] else {}
    if name in _BY_FLAG:
        if wanted not in ("train", "test"):
            raise UsageError(f"{where}: no split {printable(wanted)!r}; there are 'train' and 'test'")
        settings = {"train": wanted == "train"}
    elif not TORCHVISION[name] and split not in ("", "all"):
        raise UsageError(f"{where}: torchvision has no splits of it; leave split ({printable(split)!r}) out")
    try:
        # no download=: some do not take it, and False is the default of all that are listed here
        dataset = getattr(torchvision.datasets, name)(path, **settings)
    except (RuntimeError, OSError, ValueError, ImportError, KeyError) as error:
        raise UsageError(
            f"{where}: torchvision cannot open it ({printable(str(error))}); {path} holds {contents(Path(path))}. "
            "Nothing is downloaded here."
        ) from error
    labels = _labels(where, dataset)
    classes = list(getattr(dataset, "classes", None) or getattr(dataset, "categories", None) or [])
    names = [each[0] if isinstance(each, tuple) else str(each) for each in classes]
    named = len(names) > int(labels.max()) and len(set(names)) == len(names)
    if named:
        slash = " " if name == "SUN397" else "/"  # apartment_building/outdoor; but F-16A/B
        own = {each: each.replace("_", " ").replace("/", slash) for each in names}
    else:
        own = {str(number): str(number) for number in range(int(labels.max()) + 1)}
    return dataset, labels, Listing(where, [], list(own), [], own, named)


def _labels(where: str, dataset: Any) -> NDArray[np.int64]:
    """The label of each image, without decoding one where the dataset keeps a list of them."""
    found: Any = None
    for attribute in ("targets", "labels", "_labels", "y"):
        found = getattr(dataset, attribute, None)
        if found is not None and len(found) == len(dataset):
            break
    else:
        pairs = getattr(dataset, "_samples", None)
        found = [pair[1] for pair in pairs] if pairs else [dataset[index][1] for index in range(len(dataset))]
    try:
        labels = np.array([int(label) for label in found], np.int64)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where}: images without a label ({error}); name another split") from error
    if not len(labels) or labels.min() < 0:
        raise UsageError(
            f"{where}: {len(labels)} images, labels from {labels.min() if len(labels) else '-'}; none fits"
        )
    return labels
