"""Twins with their pictures as one HTML page that loads nothing and has no script. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from teacher_cache.pipeline.data.batches.stored_images import CachedImages
from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.evaluate.twins.find import Twins
from teacher_cache.pipeline.report.data import as_utf8
from teacher_cache.pipeline.report.page import environment, name_of, style
from teacher_cache.pipeline.report.thumbnails import collect_pictures
from teacher_cache.storage.read.reader import EmbeddingReader

_SHOWN = 500
_SIDE = 224  # pixels


def render_twins(twins: Twins, image_root: str | None = None, against_root: str | None = None) -> str:
    """Return the page, to be written as UTF-8: the first 500 pairs, with the pictures that can be read.

    Args:
        image_root, against_root: folder of the images of each cache. Default: the recorded place.
    """
    shown = twins.twins[:_SHOWN]
    notes = [f"The first {_SHOWN:,} of {len(twins.twins):,} pairs are shown."] if len(shown) < len(twins.twins) else []
    against_root = image_root if twins.against == twins.cache else against_root
    learned, missing = _pictures(twins.cache, [twin.row for twin in shown], image_root)
    others, others_missing = _pictures(twins.against, [twin.twin_row for twin in shown], against_root)
    pairs = [
        {
            "twin": twin,
            "sides": (
                (twin.sample_id, learned.get(twin.row), twins.split),
                (twin.twin, others.get(twin.twin_row), twin.twin_split),
            ),
        }
        for twin in shown
    ]
    page = environment().get_template("twins.html")
    notes += [note for note in (missing, others_missing) if note]
    title = name_of(twins.cache)
    return as_utf8(page.render(title=title, style=style(), summary=twins.summary, notes=notes, pairs=pairs))


def _pictures(location: str, rows: Sequence[int], root: str | None) -> tuple[dict[int, str], str | None]:
    """Return data URIs by row, and a note on pictures that cannot be read."""
    reader = EmbeddingReader(location)
    images = CachedImages(reader, ImageSource(root or reader.manifest.source.image_root), rows)
    return collect_pictures(images, dict.fromkeys(rows, _SIDE))
