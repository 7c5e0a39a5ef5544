"""Image bytes to a Pillow image, or an error that says why not. No torch.

What becomes of odd images, for the teacher and for students alike:

- Only formats of ``FORMATS`` are looked at. Pillow knows forty more, and one of them starts Ghostscript.
- The teacher sees the pixels that open_clip would show it: the first frame of an animation; CMYK and YCCK by Pillow's
  plain conversion; hidden colours of transparent pixels, alpha left out; palettes and 1-bit images resized to the
  nearest pixel; EXIF's orientation, colour profiles and text left alone; JPEG data that libjpeg can mend, mended.
- 16 bits of grey are the one thing done otherwise: open_clip clips them, which makes nearly every such image white.
  Here their upper 8 bits are taken, as Pillow does for 16 bits of colour.
- 32-bit whole numbers and floats have no white that everybody agrees on: undecodable.
- Truncated (if only by a JPEG's end mark), damaged (a wrong checksum too), empty, and not an image: undecodable.
- More than ``MAX_PIXELS``, by the header, before any is decoded: undecodable. One image takes at most 4 bytes a pixel
  and once more while it is converted, for each thread that decodes.
- A strip so long that the resize alone would make more than ``MAX_PIXELS``: untransformable.

Pillow's warnings (large images, odd palettes, broken EXIF) say nothing that is not in these rules, and are ignored.
Nothing of Pillow's own is raised: what it cannot decode becomes an ``UndecodableImageError``.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError

from teacher_cache.storage.observe.safe_text import printable

__all__ = [
    "FORMATS",
    "MAX_PIXELS",
    "UndecodableImageError",
    "decode_image",
    "decoded_size",
    "identified_image",
    "ignore_pillows_warnings",
    "load_image",
    "size_in_words",
    "what_pillow_raises",
]

MAX_PIXELS = 178_956_970  # where Pillow itself, too, takes an image for a decompression bomb
Image.init()  # all plugins; a name that none of them has would be a KeyError in Image.open
FORMATS = tuple(name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF") if name in Image.OPEN)
_END_BYTES = 4096  # in which an image that is not cut short has its end mark, whatever was put behind that
_PILLOW = re.compile(r"PIL\.")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # another one in each run, and commits hold these texts


class UndecodableImageError(Exception):
    """These bytes are not an image that Pillow can decode whole."""


def decode_image(data: bytes, shrink_to: int | None = None) -> Image.Image:
    """Decode the image in these bytes, all its pixels, in a mode that open_clip's transform takes.

    Args:
        shrink_to: for people to look at: a large JPEG is decoded at a half, a quarter or an eighth of its size, where
            both sides keep so many pixels. No model was ever shown such pixels.

    Raises:
        UndecodableImageError: the module's rules say why.
    """
    ignore_pillows_warnings()
    with what_pillow_raises():
        return _loaded(_opened(data), shrink_to)


def decoded_size(data: bytes) -> tuple[int, int]:
    """(width, height) of :func:`decode_image`'s image, without its pixels where header and end of the data are enough.

    They are for JPEG, PNG and WebP that are not cut short; whatever else is odd is decoded. Damage between header and
    end is not seen.

    Raises:
        UndecodableImageError: as :func:`decode_image`.
    """
    ignore_pillows_warnings()
    with what_pillow_raises():
        image = _opened(data)
        whole = {
            "JPEG": b"\xff\xd9" in data[-_END_BYTES:],
            "PNG": b"IEND\xaeB`\x82" in data[-_END_BYTES:],
            "WEBP": len(data) >= 8 + int.from_bytes(data[4:8], "little"),
        }
        if not whole.get(str(image.format)) or image.mode in ("I", "F"):
            return _loaded(image).size
        _require_pixels(*image.size)
        return image.size


def identified_image(data: bytes) -> Image.Image:
    """Open the image in these bytes by its header; :func:`load_image` decodes its pixels.

    Raises:
        UndecodableImageError: by the header alone, as :func:`decode_image`.
    """
    ignore_pillows_warnings()
    with what_pillow_raises():
        image = _opened(data)
        _require_pixels(*image.size)
        return image


def _opened(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise UndecodableImageError(
            f"not an image, damaged at its start, or none of {', '.join(FORMATS)}; {len(data):,} bytes"
        ) from None


def load_image(image: Image.Image) -> Image.Image:
    """Decode an image that a caller opened or made with Pillow, as :func:`decode_image` does.

    Raises:
        UndecodableImageError: as :func:`decode_image`.
    """
    ignore_pillows_warnings()
    with what_pillow_raises():
        return _loaded(image)


def _loaded(image: Image.Image, shrink_to: int | None = None) -> Image.Image:
    _require_pixels(*image.size)
    if shrink_to is not None:
        image.draft(None, (shrink_to, shrink_to))
    image.load()
    return _eight_bits(image)


def _require_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UndecodableImageError(f"{size_in_words(width, height)}, the most is {MAX_PIXELS:,}")
    if width * height == 0:
        raise UndecodableImageError(f"{size_in_words(width, height)}: nothing to see")


@contextmanager
def what_pillow_raises() -> Iterator[None]:
    """Whatever Pillow raises on an image in the block, but for a lack of memory, as an ``UndecodableImageError``."""
    try:
        yield
    except (MemoryError, UndecodableImageError):
        raise  # no memory: the machine's fault, not the image's
    except Image.DecompressionBombError as error:
        # Pillow's own check comes first where its limit is the lower one, and its text has size and limit too
        raise UndecodableImageError(str(error)) from error
    # Pillow's plugins raise OSError, ValueError, SyntaxError, struct.error and more on bytes they did not expect
    except Exception as error:
        raise UndecodableImageError(printable(_ADDRESS.sub("", f"{type(error).__name__}: {error}"))) from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return the image itself, or the upper half of its 16 bits.

    Raises:
        UndecodableImageError: it has 32 bits a pixel of grey.
    """
    # Pillow reads 16-bit PGM as mode I, scaled to 0 ... 65535
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "32-bit whole numbers" if image.mode == "I" else "32-bit floats"
        raise UndecodableImageError(f"{kind}, whose white nobody knows; write it with 8 or 16 bits")
    return image


def size_in_words(width: int, height: int) -> str:
    """Name an error for a message."""
    return f"{width:,} x {height:,} pixels"


def ignore_pillows_warnings() -> None:
    """Pillow's warnings left aside, in this process; see the module's rules."""
    # Each time, since a filter that is put before it, or taken away, would make an error or a line on the terminal
    # of a warning. warnings.catch_warnings would do the same for one thread, and images are decoded by many.
    first = warnings.filters[0] if warnings.filters else ("", None, Warning, None, 0)
    if first[0] != "ignore" or first[3] != _PILLOW:
        warnings.filterwarnings("ignore", module=_PILLOW.pattern)
