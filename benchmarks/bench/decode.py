"""From the bytes of JPEGs to a teacher's batch on one thread: ``jpeg-scaled`` against open_clip's own, on Pillow.

Ours as ``precompute`` does it: each image's bytes to its place, and the batch normalised as a whole; theirs normalises
each image and stacks them.

Photographs here have 224 pixels, so that larger ones are made of them in two ways: enlarged, which has no detail at
its own size and is kind to a decoder that skips some; and a collage of photographs at their own size, which has more
than a camera's. How far the teacher's embeddings move is measured with the trained teacher; the worst image counts.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from simplejpeg import decode_jpeg

from benchmarks.bench.harness import Row, Settings, interleave, speed
from teacher_cache.pipeline.data.images.decoders import open_image
from teacher_cache.pipeline.data.images.preprocess import Preprocess
from teacher_cache.pipeline.models.teacher import LiveTeacher, load_teacher

_QUALITY = 90


@dataclass(frozen=True)
class _Size:
    width: int
    height: int
    images: int
    wanted: float


def measure(settings: Settings) -> list[Row]:
    """Images a second of one core, then cosines."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        photographs = sorted((settings.shared / "flickr8k" / "images").iterdir())
        teacher = load_teacher(f"local-dir:{settings.shared / 'teacher-flickr8k'}", device="cpu")
        small, large = (2, 1) if settings.quick else (48, 6)
        rows = []
        for size in (_Size(500, 375, small, 2.0), _Size(2000, 1500, large, 4.0)):
            for name, make in (("collage", _collage), ("enlarged", _enlarged)):
                images = [make(photographs, number, size.width, size.height) for number in range(size.images)]
                rows += _rows(f"{size.width} x {size.height}, {name}", images, teacher, size.wanted, settings)
        own = [path.read_bytes() for path in photographs[:: len(photographs) // small]]
        return [*rows, _cosine("224 x 224, as they are", own, teacher)]
    finally:
        torch.set_num_threads(threads)


def _rows(name: str, images: list[bytes], teacher: LiveTeacher, wanted: float, settings: Settings) -> list[Row]:
    scaled = teacher.preprocess.decoded_by("jpeg-scaled")
    shown = scaled.shown
    open_clips = image_transform_v2(PreprocessCfg(**scaled.to_config()), is_train=False)

    def ours() -> None:
        batch = torch.empty(len(images), *scaled.size, 3, dtype=torch.uint8)
        places = batch.numpy()
        for place, data in zip(places, images, strict=True):
            place[:] = shown(open_image(data, scaled.decoder))
        scaled.normalized_batch(batch)

    def theirs() -> None:
        torch.stack([open_clips(Image.open(io.BytesIO(data))) for data in images])

    seconds = interleave({"ours": ours, "theirs": theirs}, settings.rounds)
    kib = sum(map(len, images)) / len(images) / 1024
    # at 1/8 hardly anything but Huffman decoding is left, of which no scale saves any
    least = min(interleave({"least": lambda: [decode_jpeg(data, min_height=1) for data in images]}, 3)["least"])
    return [
        speed(
            name,
            "open_clip's preprocess on Pillow",
            seconds["ours"],
            seconds["theirs"],
            len(images),
            "images/s",
            wanted,
            f"a batch of {scaled.size[1]} x {scaled.size[0]} float32; JPEG of quality {_QUALITY}, {kib:,.0f} KiB each. "
            f"Decoding at 1/8 alone takes {least / min(seconds['ours']):.0%} of our time: entropy decoding, the same "
            "for any scale",
        ),
        _cosine(name, images, teacher),
    ]


def _cosine(name: str, images: list[bytes], teacher: LiveTeacher) -> Row:
    def embedded(preprocess: Preprocess) -> np.ndarray:
        transform = preprocess.transform
        pixels = [transform(open_image(data, preprocess.decoder)) for data in images]
        return np.concatenate([teacher.image_features(part).numpy() for part in torch.stack(pixels).split(8)])

    pillow, scaled = (embedded(each) for each in (teacher.preprocess, teacher.preprocess.decoded_by("jpeg-scaled")))
    apart = 1 - (pillow.astype(np.float64) * scaled).sum(axis=1)
    worst = float(apart.max())
    return Row(
        f"1 - cosine, {name}",
        "the same teacher on Pillow's pixels",
        worst,
        None,
        "",
        worst,
        worst,
        worst,
        wanted=0.001,
        at_most=True,
        note=f"the worst of {len(images)} images; their mean is {apart.mean():.1e}",
    )


def _jpeg(image: Image.Image) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=_QUALITY)
    return sink.getvalue()


def _enlarged(photographs: list[Path], number: int, width: int, height: int) -> bytes:
    with Image.open(photographs[number * 97 % len(photographs)]) as photograph:
        return _jpeg(photograph.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))


def _collage(photographs: list[Path], number: int, width: int, height: int) -> bytes:
    whole, at = Image.new("RGB", (width, height)), number * 97
    for top in range(0, height, 224):
        for left in range(0, width, 224):
            with Image.open(photographs[at % len(photographs)]) as photograph:
                whole.paste(photograph, (left, top))
            at += 1
    return _jpeg(whole)
