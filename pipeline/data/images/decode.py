"""Decoder of image bytes to a Pillow image. No torch.

Rules for odd images, for teacher and students alike:

- Only the formats of ``FORMATS`` are opened. Pillow knows forty more, and one of them starts Ghostscript.
- The teacher sees the same pixels as in open_clip: the first frame of an animation; CMYK and YCCK by Pillow's plain
  conversion; the hidden colours of transparent pixels, without alpha; palettes and 1-bit images resized to the nearest
  pixel; EXIF orientation, colour profiles and text ignored; JPEG data repaired where libjpeg can.
- 16-bit grey is the one exception: open_clip clips it, which makes nearly every such image white. Here the upper 8 bits
  are taken, as Pillow does for 16-bit colour.
- 32-bit integer and float images are undecodable: they have no standard white.
- Truncated images (even if only a JPEG's end mark is missing), damaged ones (also a wrong checksum), empty files and
  files that are no image are undecodable.
- More than ``MAX_PIXELS`` in the header: undecodable, before decoding. Each decoding thread takes at most 4 bytes per
  pixel, and twice that during a conversion.
- A strip so long that the resize would make more than ``MAX_PIXELS``: untransformable.

Pillow's warnings (large images, odd palettes, broken EXIF) are covered by these rules and ignored. Its errors become
``UndecodableImageError``.
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

MAX_PIXELS = 178_956_970  # Pillow's own limit for decompression bombs
Image.init()  # load all plugins: Image.open raises KeyError for the name of an unloaded one
FORMATS = tuple(name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF") if name in Image.OPEN)
_END_BYTES = 4096  # a complete image has its end mark within these, even with data after it
_OTHERS = {b"ftypheic": "HEIC", b"ftypheix": "HEIC", b"ftypmif1": "HEIF", b"<svg": "SVG", b"%PDF-": "PDF"}
_PILLOW = re.compile(r"PIL\.")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # differs in each run, and commits store these texts


class UndecodableImageError(Exception):
    """Bytes that Pillow cannot decode to a complete image."""


@contextmanager
def what_pillow_raises() -> Iterator[None]:
    """Ignore Pillow's warnings; raise its errors, except a lack of memory, as an ``UndecodableImageError``."""
    ignore_pillows_warnings()
    try:
        yield
    except (MemoryError, UndecodableImageError):
        raise  # no memory: the machine's fault, not the image's
    except Image.DecompressionBombError as error:
        # Pillow's own check may come first; its text has size and limit too
        raise UndecodableImageError(str(error)) from error
    # Pillow's plugins raise OSError, ValueError, SyntaxError, struct.error and more on unexpected bytes
    except Exception as error:
        raise UndecodableImageError(printable(_ADDRESS.sub("", f"{type(error).__name__}: {error}"))) from error


@what_pillow_raises()
def decode_image(data: bytes, shrink_to: int | None = None) -> Image.Image:
    """Decode all pixels of the image in these bytes, in a mode that open_clip's transform accepts.

    Args:
        shrink_to: decode a large JPEG at 1/2, 1/4 or 1/8 of its size, with at least this many pixels on both sides.
            For display only, never for a model.

    Raises:
        UndecodableImageError: by the module's rules.
    """
    return _loaded(_opened(data), shrink_to)


@what_pillow_raises()
def decoded_size(data: bytes) -> tuple[int, int]:
    """Return (width, height) of :func:`decode_image`'s image, without decoding if possible.

    Header and end are enough for complete JPEG, PNG and WebP files; other images are decoded. Damage between header
    and end is not detected.

    Raises:
        UndecodableImageError: as :func:`decode_image`.
    """
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


@what_pillow_raises()
def identified_image(data: bytes) -> Image.Image:
    """Open the image in these bytes by its header; :func:`load_image` decodes its pixels.

    Raises:
        UndecodableImageError: by the header alone, as :func:`decode_image`.
    """
    image = _opened(data)
    _require_pixels(*image.size)
    return image


def _opened(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        if kind := next((kind for mark, kind in _OTHERS.items() if mark in data[:64]), ""):
            raise UndecodableImageError(f"{kind}, which is not read here; convert it to JPEG or PNG") from None
        raise UndecodableImageError(
            f"not an image, damaged at its start, or none of {', '.join(FORMATS)}; {len(data):,} bytes"
        ) from None


@what_pillow_raises()
def load_image(image: Image.Image) -> Image.Image:
    """Decode a Pillow image, opened or created by the caller, as :func:`decode_image` does.

    Raises:
        UndecodableImageError: as :func:`decode_image`.
    """
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


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return the image itself, or the upper 8 bits of 16-bit grey."""
    # Pillow reads 16-bit PGM as mode I, scaled to 0 ... 65535
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "32-bit whole numbers" if image.mode == "I" else "32-bit floats"
        raise UndecodableImageError(f"{kind}, whose white nobody knows; write it with 8 or 16 bits")
    return image


def size_in_words(width: int, height: int) -> str:
    """Describe a size for a message."""
    return f"{width:,} x {height:,} pixels"


def ignore_pillows_warnings() -> None:
    """Ignore Pillow's warnings in this process, by the module's rules."""
    # checked on every call: other code may change the filters, and warnings.catch_warnings is not thread-safe
    first = warnings.filters[0] if warnings.filters else ("", None, Warning, None, 0)
    if first[0] != "ignore" or first[3] != _PILLOW:
        warnings.filterwarnings("ignore", module=_PILLOW.pattern)
