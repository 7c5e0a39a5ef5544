"""Small pictures of a cache's images as JPEG in data URIs. No torch.

They hold pixels only: the metadata of photographs may have their place and author.
"""

from __future__ import annotations

import base64
import io
import logging
import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from PIL import Image, ImageOps

from teacher_cache.pipeline.data.batches.stored_images import CachedImages
from teacher_cache.pipeline.data.images.decode import UndecodableImageError, decode_image, what_pillow_raises
from teacher_cache.storage.errors import CacheMismatchError

_LOG = logging.getLogger(__name__)
_QUALITY = 72
_WHITE = (255, 255, 255)
_THREADS = 4
_AT_ONCE = 16
_TRIES = 8  # consecutive connection errors before the other images are skipped


def thumbnail(data: bytes, side: int) -> bytes:
    """Return a JPEG whose longest side has at most ``side`` pixels, turned upright by EXIF, with a white background.

    Raises:
        UndecodableImageError: as ``teacher_cache.pipeline.data.images.decode.decode_image``.
    """
    image = decode_image(data, shrink_to=2 * side)
    with suppress(UndecodableImageError), what_pillow_raises():
        image = ImageOps.exif_transpose(image)  # a broken EXIF turns nothing
    with what_pillow_raises():
        # a new image: Pillow would save metadata of the opened one
        plain = Image.new("RGB", image.size, _WHITE)
        if image.has_transparency_data:
            layer = image.convert("RGBA")
            plain.paste(layer, mask=layer.getchannel("A"))
        else:
            plain.paste(image.convert("RGB"))
        plain.thumbnail((side, side), Image.Resampling.LANCZOS)
        out = io.BytesIO()
        plain.save(out, "JPEG", quality=_QUALITY, optimize=True)
    return out.getvalue()


def collect_pictures(
    images: CachedImages,
    sides: Mapping[int, int],
    lost: Collection[int] = (),
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[int, str], str | None]:
    """Return data URIs by row, and a note on images that could not be read, if any.

    The note names no folder, since pages are shared; the log has the path of the first image.

    Args:
        sides: longest side in pixels, by row.
        lost: quarantined rows; no note if they cannot be decoded.
        progress: called with (done, total).
    """
    pictures: dict[int, str] = {}
    failed: list[tuple[int, Exception]] = []
    unanswered = 0

    def picture(row: int) -> str | Exception | None:
        try:
            data = thumbnail(images.read(row), sides[row])
        except UndecodableImageError as error:
            return None if row in lost else error
        except (OSError, CacheMismatchError) as error:
            return error
        return "data:image/jpeg;base64," + base64.b64encode(data).decode()

    rows = list(sides)
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(rows), _AT_ONCE):
            part = rows[start : start + _AT_ONCE]
            if unanswered >= _TRIES:
                failed += [(row, ConnectionError("not tried")) for row in part]
                part = []
            for row, result in zip(part, pool.map(picture, part), strict=True):
                unanswered = unanswered + 1 if isinstance(result, ConnectionError) else 0
                if isinstance(result, str):
                    pictures[row] = result
                elif result is not None:
                    failed.append((row, result))
            if progress is not None:
                progress(min(start + _AT_ONCE, len(rows)), len(rows))
    return pictures, _note(images, failed, len(rows))


def _note(images: CachedImages, failed: list[tuple[int, Exception]], total: int) -> str | None:
    if not failed:
        return None
    row, first = failed[0]
    count = f"{len(failed):,} of {total:,} pictures are missing. The first one: "
    # other errors name the image themselves
    named = f"{images.named(row)}: " if isinstance(first, UndecodableImageError) else ""
    _LOG.warning("%s%s%s", count, named, first)
    way_out = "Were the images moved? Name the folder that has them with --image-root."
    return f"{count}{images.named_within(row)} {_why(first)}. {way_out}"


def _why(error: Exception) -> str:
    """Return the reason without the paths and URLs of the error's text."""
    if isinstance(error, CacheMismatchError):
        return "is not the image that the cache was made of"
    if isinstance(error, UndecodableImageError):
        return f"cannot be decoded: {error}"
    cause = error.__cause__ or error
    number = cause.errno if isinstance(cause, OSError) else None
    return f"cannot be read: {type(cause).__name__ if number is None else os.strerror(number)}"
