"""Text rows of DataCompDR's shards, Apple's reinforced DataComp, matched to the captions of a dataset. No torch.

    SHARDS/000.tar
      000000012.txt        the image's own caption, if the tars were joined with it; and the image
      000000012.syn.json   {"syn_text": [...]}: synthetic captions
      000000012.paug.json  {"param_aug": "[[[top, left, height, width], [[operation, magnitude], ...]], ...]"}
      000000012.npz        text_emb (1 + synthetic captions, width), image_emb (augmentations, width), float16

A row is as wide as all teachers of an ensemble together; :attr:`ReinforcedShards.dim` columns belong to one of them.
Captions are matched by text. The rows of images are left aside, and a line says so: each is of a random crop changed
further by RandAugment (``docs/design/022-reinforced-shards.md``).
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from teacher_cache.pipeline.data.datasets.adapters.webdataset import Reinforced, read_reinforced
from teacher_cache.pipeline.data.datasets.files import is_pattern, open_regular
from teacher_cache.pipeline.precompute.foreign.clip_retrieval_folder import ForeignFolder, ForeignSource, normalised
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.format.layout import Tower
from teacher_cache.storage.look.sampling import Progress, stage
from teacher_cache.storage.observe.safe_text import printable

# torchvision's RandAugment, in the order of the numbers in param_aug
_OPERATIONS = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast"),
    *("Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize"),
)


def open_foreign(location: str, columns: str | None, progress: Progress | None = None) -> ForeignSource:
    """Open what holds another tool's rows: tars of DataCompDR, or a folder of clip-retrieval.

    Args:
        columns: ``FIRST:STOP``, the columns of the named teacher in the rows of an ensemble. Default: all.
        progress: called with (stage, done, total) when the tars are read: ``read tars``.

    Raises:
        UsageError: it has neither form, or not these columns; the message names the file.
    """
    root = Path(location)
    if "://" not in location and (is_pattern(location) or root.suffix == ".tar" or any(root.glob("*.tar"))):
        return ReinforcedShards(location, columns, progress)
    if columns:
        raise UsageError(f"--columns {columns} takes a part of the rows of DataCompDR's tars; {location} is none")
    return ForeignFolder(location)


class ReinforcedShards:
    """Rows of captions, numbered through all tars in order and read in place: a :class:`ForeignSource`.

    Attributes:
        left_aside: why the rows of images are not used, with an augmentation as example.

    Raises:
        UsageError: the tars are not of this form, or the rows have no such columns; the message names tar and member.
    """

    form = "DataCompDR shards"
    towers: tuple[Tower, ...] = ("text",)

    def __init__(self, location: str, columns: str | None, progress: Progress | None = None) -> None:
        self.location, self._progress = location, progress
        first = next(read_reinforced(location), None)
        if first is None:
            raise UsageError(f"{location}: its tars hold no sample of DataCompDR")
        rows = _text_rows(first)
        width, self._dtype = rows.shape[1], rows.dtype
        start, stop = map(int, columns.split(":")) if columns else (0, width)
        if not start < stop <= width:
            raise UsageError(f"--columns {columns}: rows of {location} have the columns 0:{width}")
        self._columns, self.dim = slice(start, stop), stop - start
        self.left_aside = f"rows of images in {location} are not imported: {_augmented(first)}"

    @cached_property
    def _samples(self) -> list[Reinforced]:
        return [
            replace(sample, augmentations="")
            for sample in read_reinforced(self.location, stage(self._progress, "read tars"))
        ]

    @cached_property
    def _stops(self) -> NDArray[np.int64]:
        return np.cumsum([len(sample.captions) for sample in self._samples])

    @property
    def rows(self) -> int:
        """Number of rows, one of each caption."""
        return int(self._stops[-1])

    def columns(self, *names: str) -> Iterator[tuple[int, pa.Table]]:
        """See :meth:`ForeignSource.columns`; only ``caption`` has values."""
        row = 0
        for _, samples in groupby(self._samples, attrgetter("tar")):
            captions = [caption for sample in samples for caption in sample.captions]
            has = {"caption": pa.array(captions, pa.string())}
            yield row, pa.table({name: has.get(name, pa.nulls(len(captions), pa.string())) for name in names})
            row += len(captions)

    def take(
        self, tower: Tower, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.float16], NDArray[np.float32], NDArray[np.bool_]]:
        """See :meth:`ForeignSource.take`.

        Raises:
            UsageError: rows cannot be read; the message names tar and member.
        """
        values = np.empty((len(rows), self.dim), self._dtype)
        sample_of = np.searchsorted(self._stops, rows, side="right")
        for number in np.unique(sample_of):
            sample, of_sample = self._samples[number], sample_of == number
            first = self._stops[number] - len(sample.captions)
            part = _text_rows(sample)[rows[of_sample] - first, self._columns]
            if part.shape[1] != self.dim:
                raise UsageError(f"{_rows_at(sample)}: text_emb is narrower than in the first sample")
            values[of_sample] = part
        return normalised(values)


def _rows_at(sample: Reinforced) -> str:
    return f"{sample.tar}: {printable(sample.key)}.npz"


def _text_rows(sample: Reinforced) -> NDArray[Any]:
    """Read the rows of a sample's captions, (captions, dim) float16 or float32."""
    where = _rows_at(sample)
    try:
        with open_regular(sample.tar) as file:
            file.seek(sample.offset)
            with np.load(io.BytesIO(file.read(sample.length)), allow_pickle=False) as arrays:
                values: NDArray[Any] = arrays["text_emb"]
    except KeyError:
        raise UsageError(f"{where} has no text_emb. Are these tars of DataCompDR?") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"{where} cannot be read ({printable(str(error))}). Download it again") from error
    of_captions = values.ndim == 2 and len(values) == len(sample.captions)
    if not of_captions or values.dtype not in (np.float16, np.float32):
        raise UsageError(
            f"{where}: text_emb is {values.dtype} of shape {values.shape}; float16 or float32 is wanted, a row for "
            f"the image's caption and for each of {len(sample.captions) - 1} synthetic ones"
        )
    return values


def _augmented(sample: Reinforced) -> str:
    """Return why the rows of images are of no use for a cache, by an augmentation of a sample.

    Raises:
        UsageError: ``param_aug`` is of another form.
    """
    where = f"{sample.tar}: {printable(sample.key)}.paug.json"
    try:
        operations = [
            (number, _OPERATIONS[operation], magnitude)
            for number, augmentation in enumerate(json.loads(sample.augmentations))
            for changes in augmentation[1:]
            for operation, magnitude in changes or ()
        ]
    except (ValueError, TypeError, IndexError) as error:
        raise UsageError(
            f"{where}: param_aug is not a list of crops and operations ({printable(str(error))})"
        ) from None
    number, name, magnitude = next((each for each in operations if each[1] != "Identity"), (0, "", 0))
    changed = f"augmentation {number} is also {name} ({magnitude:.3g})" if name else "none is a crop that a cache draws"
    return (
        f"{where}: {changed}. A cache holds the evaluation crop and crops of its own, which training cuts out again; "
        "a target of another picture would be wrong. The teacher encodes the images"
    )
