"""Images that cameras, tools, servers and people with bad intentions leave, and what has to become of each."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

GREY_16 = (np.arange(48 * 64, dtype=np.uint32).reshape(48, 64) * 21).astype(np.uint16)


@dataclass(frozen=True)
class OddImage:
    """One file. ``lost`` is a part of the reason, or None: then its pixels are open_clip's, or those of ``like``."""

    name: str
    data: bytes
    lost: str | None = None
    like: Image.Image | None = None


def _photo() -> Image.Image:
    coarse = np.random.default_rng(7).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((64, 48), Image.Resampling.BICUBIC)


def _save(image: Image.Image, format: str, **how: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, format, **how)
    return sink.getvalue()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, depth: int, colour: int, lines: bytes, *more: bytes) -> bytes:
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = _chunk(b"IDAT", zlib.compress(lines)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + body


def _changed(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def _odd_images() -> Iterator[OddImage]:
    photo = _photo()
    jpeg, png = _save(photo, "JPEG", quality=90), _save(photo, "PNG")
    nothing = "not an image, damaged at its start, or none of JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM"

    # cut, damaged, or something else
    for name, cut in (("header", 2), ("tables", 100), ("middle", len(jpeg) // 2), ("end-mark", len(jpeg) - 2)):
        yield OddImage(f"cut-{name}.jpg", jpeg[:cut], nothing if cut == 2 else "runcated")
    yield OddImage("damaged.jpg", _changed(jpeg, len(jpeg) - 300, bytes(range(1, 21))))
    yield OddImage("empty.jpg", b"", nothing)
    yield OddImage("text.jpg", b"This is not an image, though it says so.\n", nothing)
    yield OddImage("html.jpg", b"<!DOCTYPE html><html><body><h1>404 Not Found</h1></body></html>", nothing)
    yield OddImage("vector.jpg", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "SVG, which is not")
    yield OddImage("phone.jpg", b"\0\0\0\x18ftypheic" + bytes(600), "HEIC, which is not read here; convert it to JPEG")
    # Pillow would start Ghostscript for this one
    yield OddImage("print.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", nothing)
    yield OddImage("icon.jpg", _save(photo, "ICO"), nothing)
    yield OddImage("layers.jpg", b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(600), nothing)
    yield OddImage("cut.webp", _save(photo, "WEBP")[:-40], "could not create decoder object")
    yield OddImage("cut.gif", _save(photo.convert("P"), "GIF")[:-200], "truncated")
    yield OddImage("cut.png", png[: len(png) // 2], "truncated")
    yield OddImage("checksum.png", _changed(png, 29, bytes([png[29] ^ 1])), nothing)
    yield OddImage("pixels.png", _changed(png, png.index(b"IDAT") + 60, b"\xff\0\xff\0"), "data stream")
    yield OddImage("short.png", _png(64, 48, 8, 2, bytes(100)), "truncated")
    yield OddImage("no-pixels.png", _png(0, 0, 8, 2, b""), nothing)

    # bombs
    yield OddImage("60000.png", _png(60000, 60000, 8, 2, bytes(100)), "3600000000 pixels) exceeds limit of 178956970")
    yield OddImage("20000.png", _png(20000, 9000, 8, 2, bytes(100)), "180000000 pixels) exceeds limit of 178956970")
    text = _chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2_000_000)))
    yield OddImage("text-bomb.png", _png(2, 2, 8, 2, bytes(14), text), "Decompressed data too large")
    yield OddImage("strip.png", _save(Image.new("L", (1, 6_000_000)), "PNG"), "more than 178,956,970")

    # what open_clip sees, pixel for pixel
    frames = {"save_all": True, "append_images": [Image.new("RGB", (64, 48), "red")], "duration": 9}
    yield OddImage("animated.gif", _save(photo, "GIF", **frames))
    yield OddImage("animated.png", _save(photo, "PNG", **frames))
    yield OddImage("animated.webp", _save(photo, "WEBP", **frames))
    yield OddImage("several.jpg", _save(photo, "MPO", save_all=True, append_images=[Image.new("RGB", (64, 48))]))
    cmyk = _save(photo.convert("CMYK"), "JPEG")
    yield OddImage("cmyk.jpg", cmyk)
    # Pillow writes Adobe's mark with 0 for CMYK; 2 says YCCK; without the mark CMYK is not inverted
    mark = cmyk.index(b"Adobe")
    yield OddImage("ycck.jpg", _changed(cmyk, mark + 11, b"\2"))
    yield OddImage("cmyk-plain.jpg", _changed(cmyk, mark, b"Adobx"))
    yield OddImage("16-bit-rgb.png", _png(2, 2, 16, 2, (b"\0" + bytes(range(0, 240, 20))) * 2))
    yield OddImage("16-bit-alpha.png", _png(2, 2, 16, 4, (b"\0" + bytes(range(0, 240, 30))) * 2))
    yield OddImage("1-bit.png", _save(photo.convert("1"), "PNG"))
    yield OddImage("palette.png", _save(photo.convert("P"), "PNG", transparency=3))
    yield OddImage("palette-bytes.png", _save(photo.convert("P"), "PNG", transparency=bytes(range(0, 256, 2))))
    yield OddImage("grey.png", _save(photo.convert("L"), "PNG"))
    yield OddImage("grey-alpha.png", _save(photo.convert("LA"), "PNG"))
    alpha = photo.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    yield OddImage("alpha.png", _save(alpha, "PNG"))
    yield OddImage("alpha.webp", _save(alpha, "WEBP", lossless=True))
    yield OddImage("key-colour.png", _save(photo, "PNG", transparency=(1, 2, 3)))
    lab = ImageCms.profileToProfile(
        photo, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert lab is not None
    yield OddImage("lab.tiff", _save(lab, "TIFF"))
    turned = Image.Exif()
    turned[0x0112] = 6
    yield OddImage("turned.jpg", _save(photo, "JPEG", exif=turned))
    exif = _save(photo, "JPEG", exif=turned)
    yield OddImage("broken-exif.jpg", _changed(exif, exif.index(b"Exif\0\0") + 10, b"\xff" * 12))
    profile = PngImagePlugin.PngInfo()
    profile.add_text("Comment", "\ud83d".encode("utf-8", "replace").decode() * 99)
    yield OddImage("profile.png", _save(photo, "PNG", icc_profile=b"not a profile", pnginfo=profile))
    yield OddImage("photo.bmp", _save(photo, "BMP"))
    yield OddImage("photo.ppm", _save(photo, "PPM"))
    yield OddImage("photo.tiff", _save(photo, "TIFF", compression="tiff_lzw"))
    yield OddImage("progressive.jpg", _save(photo, "JPEG", progressive=True))
    yield OddImage("one.png", _save(photo.resize((1, 1)), "PNG"))
    yield OddImage("tall.png", _save(photo.resize((1, 5000)), "PNG"))
    yield OddImage("wide.png", _save(photo.resize((5000, 1)), "PNG"))

    # open_clip makes white or black of these
    upper = Image.fromarray((GREY_16 >> 8).astype(np.uint8))
    yield OddImage("16-bit.png", _save(Image.fromarray(GREY_16), "PNG"), like=upper)
    yield OddImage("16-bit.tiff", _save(Image.fromarray(GREY_16), "TIFF"), like=upper)
    yield OddImage("16-bit.pgm", b"P5 64 48 65535\n" + GREY_16.astype(">u2").tobytes(), like=upper)
    yield OddImage("32-bit.tiff", _save(Image.fromarray(GREY_16.astype(np.int32)), "TIFF"), "32-bit whole numbers")
    yield OddImage("float.tiff", _save(Image.fromarray(GREY_16.astype(np.float32)), "TIFF"), "32-bit floats")


ODD_IMAGES = list(_odd_images())
