"""Small pictures of a cache's images, for a page that is one file: JPEG in data URIs. No torch.

Nothing but pixels gets into them: photographs carry where they were taken and by whom.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from PIL import Image, ImageOps

from pipeline.cached_images import CachedImages
from pipeline.decode import UndecodableImageError, decode_image, what_pillow_raises
from storage.errors import CacheMismatchError

__all__ = ["collect_pictures", "thumbnail"]

_QUALITY = 72
_WHITE = (255, 255, 255)
_THREADS = 4
_AT_ONCE = 16
_TRIES = 8  # images in a row of a store that does not answer, each after some seconds, before the others are given up


def thumbnail(data: bytes, side: int) -> bytes:
    """A JPEG of an image, its longest side at most ``side`` pixels: upright by its EXIF, transparency on white.

    Raises:
        UndecodableImageError: as ``pipeline.decode.decode_image``.
    """
    image = decode_image(data, shrink_to=2 * side)
    with suppress(UndecodableImageError), what_pillow_raises():
        image = ImageOps.exif_transpose(image)  # a broken EXIF turns nothing
    with what_pillow_raises():
        # a new image: Pillow saves a JPEG's comment, and more, of one that it opened
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
    """Data URIs by row, and a sentence about those that could not be read.

    Args:
        sides: longest side in pixels, by row.
        lost: rows among them that the teacher could not be given: where they cannot be decoded nothing is said.
        progress: called with (images, of how many).
    """
    found: dict[int, str] = {}
    failed: list[Exception] = []
    unanswered = 0

    def picture(row: int) -> str | Exception | None:
        try:
            data = thumbnail(images.read(row), sides[row])
        except UndecodableImageError as error:
            return None if row in lost else UndecodableImageError(f"{images.named(row)}: {error}")
        except (OSError, CacheMismatchError) as error:
            return error
        return "data:image/jpeg;base64," + base64.b64encode(data).decode()

    rows = list(sides)
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(rows), _AT_ONCE):
            part = rows[start : start + _AT_ONCE]
            if unanswered >= _TRIES:
                failed += [ConnectionError("not tried")] * len(part)
                part = []
            for row, result in zip(part, pool.map(picture, part), strict=True):
                unanswered = unanswered + 1 if isinstance(result, ConnectionError) else 0
                if isinstance(result, str):
                    found[row] = result
                elif result is not None:
                    failed.append(result)
            if progress is not None:
                progress(min(start + _AT_ONCE, len(rows)), len(rows))
    return found, _said(failed, len(rows))


def _said(failed: list[Exception], wanted: int) -> str | None:
    if not failed:
        return None
    first = str(failed[0])
    way_out = "" if "--image-root" in first else " Name the folder that has them with --image-root."
    return f"{len(failed):,} of {wanted:,} pictures are missing. The first one: {first}{way_out}"
