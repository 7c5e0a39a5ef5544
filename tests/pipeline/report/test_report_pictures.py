"""Pictures of a report hold pixels, and nothing else of a photograph."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from teacher_cache.pipeline.data.images.decode import UndecodableImageError
from teacher_cache.pipeline.report.thumbnails import thumbnail


def photograph(size: tuple[int, int], **more: Any) -> bytes:
    """A JPEG that is red in its upper half and blue below."""
    image = Image.new("RGB", size, (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, size[0], size[1] // 2))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=95, **more)
    return out.getvalue()


def near(found: Any, wanted: tuple[int, int, int]) -> bool:
    return all(abs(one - other) < 40 for one, other in zip(found, wanted, strict=True))


def test_nothing_but_pixels_of_a_photograph_gets_into_its_picture() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "somebody private"
    exif[ExifTags.Base.Orientation] = 6  # to be turned clockwise: what is on top lies on the right then
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = (47.0, 22.0, 11.5)
    data = photograph((400, 200), exif=exif, comment=b"a private comment", icc_profile=b"a private profile" * 20)
    assert all(secret in data for secret in (b"somebody private", b"a private comment", b"a private profile"))
    small = thumbnail(data, 80)
    assert not any(secret in small for secret in (b"private", b"Exif", b"ICC_PROFILE", b"http://ns.adobe.com"))
    image = Image.open(io.BytesIO(small))
    assert image.size == (40, 80)
    assert dict(image.getexif()) == {}
    assert near(image.getpixel((35, 40)), (255, 0, 0))
    assert near(image.getpixel((5, 40)), (0, 0, 255))


def test_pictures_of_any_kind_become_small_and_plain() -> None:
    def saved(image: Image.Image, kind: str = "PNG") -> bytes:
        out = io.BytesIO()
        image.save(out, kind)
        return out.getvalue()

    clear = Image.new("RGBA", (100, 50), (0, 255, 0, 0))
    clear.paste((0, 0, 0, 255), (50, 0, 100, 50))
    deep = Image.fromarray(np.full((30, 30), 40_000, np.uint16))
    cases = {
        "transparent": (saved(clear), (255, 255, 255)),
        "palette": (saved(Image.new("RGB", (9, 9), (250, 10, 10)).convert("P")), (250, 10, 10)),
        "one bit": (saved(Image.new("1", (9, 9), 1)), (255, 255, 255)),
        "16 bits": (saved(deep), (156, 156, 156)),
        "cmyk": (saved(Image.new("CMYK", (9, 9), (0, 0, 0, 0)), "JPEG"), (255, 255, 255)),
        "a line": (saved(Image.new("RGB", (3000, 1), (10, 10, 250))), (10, 10, 250)),
        "large": (photograph((3000, 2000)), (255, 0, 0)),
    }
    for name, (data, colour) in cases.items():
        image = Image.open(io.BytesIO(thumbnail(data, 64)))
        assert (image.format, image.mode, max(image.size)) == (
            "JPEG",
            "RGB",
            min(64, max(Image.open(io.BytesIO(data)).size)),
        )
        assert near(image.getpixel((2, 0)), colour), name
    with pytest.raises(UndecodableImageError):
        thumbnail(photograph((50, 50))[:300], 64)


def test_large_jpegs_are_decoded_small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    load = Image.Image.load
    from PIL import JpegImagePlugin

    def noted(self: Any) -> Any:
        sizes.append(self.size)
        return load(self) if not isinstance(self, JpegImagePlugin.JpegImageFile) else original(self)

    original = JpegImagePlugin.JpegImageFile.load
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", noted)
    thumbnail(photograph((3200, 2400)), 80)
    assert sizes[0] == (400, 300)  # an eighth, the least that libjpeg has; both sides keep 160 pixels
