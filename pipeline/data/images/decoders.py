"""Decoders by name: Pillow, or ``jpeg-scaled``. No torch, until ``jpeg-scaled`` is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from teacher_cache.pipeline.data.images.decode import decode_image, identified_image, load_image
from teacher_cache.storage.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

    from teacher_cache.pipeline.data.images.scaled_jpeg import ScaledJpeg

PILLOW, JPEG_SCALED = "pillow", "jpeg-scaled"
DECODERS = (PILLOW, JPEG_SCALED)


def modules_of(decoder: str) -> tuple[str, ...]:
    """Return the modules that a decoder imports when it is first used, and that are slow to import."""
    return ("torch", "open_clip.transform") if decoder == JPEG_SCALED else ()


def require_decoder(name: str) -> None:
    """Check that a decoder can be used here.

    Raises:
        UsageError: it is unknown, or needs a package that is not installed.
    """
    if name not in DECODERS:
        raise UsageError(f"decoder {name!r} is not known; there are {', '.join(DECODERS)}")
    if name == JPEG_SCALED:
        from teacher_cache.pipeline.data.images.scaled_jpeg import require_simplejpeg

        require_simplejpeg()


def open_image(data: bytes, decoder: str = PILLOW) -> Image.Image | ScaledJpeg:
    """Open the image in these bytes: decoded by Pillow, or a JPEG that is decoded when it is resized.

    Raises:
        UndecodableImageError: by the rules of :mod:`teacher_cache.pipeline.data.images.decode`. Damage in a JPEG's
            data raises only when its pixels are decoded.
        UsageError: as :func:`require_decoder`.
    """
    if decoder == PILLOW:
        return decode_image(data)
    require_decoder(decoder)
    from teacher_cache.pipeline.data.images.scaled_jpeg import ScaledJpeg

    image = identified_image(data)
    if image.format == "JPEG" and image.mode == "RGB":
        return ScaledJpeg(data, image.size)
    return load_image(image)
