"""A student's input from ready pixels against decoding it with Pillow, and with torchvision's own decoder.

A DataLoader with one worker that nobody waits for gives pixels and tokens, one torch thread each. ``pillow`` is what
users of open_clip have: Pillow, open_clip's transform and tokenizer. ``torchvision`` is the fastest that torchvision
has on a CPU: ``decode_jpeg``, the antialiased resize of bytes, floats normalised; it makes other pixels. FFCV and DALI,
which read pixels that were made ready as well, do not install here: both want CUDA.

Two sets: photographs of 224 x 224, which no crop or resize costs anything, and some of them enlarged to 1600 x 1200, as
cameras make them. All files were just written or read and come from memory, not from the disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode
from torchvision.transforms import v2

from benchmarks.bench.harness import Row, Settings, interleave, speed
from benchmarks.bench.material import photographs
from teacher_cache.pipeline.data.batches.inputs import InputLoader
from teacher_cache.pipeline.data.batches.pairs import PairOrder, Pairs
from teacher_cache.pipeline.data.batches.student_images import StudentImages
from teacher_cache.pipeline.data.datasets.samples import ImageSource
from teacher_cache.pipeline.data.images.preprocess import Preprocess, handed_on
from teacher_cache.pipeline.data.images.ready_pixels import ReadyPixels
from teacher_cache.pipeline.models.device import keep_freed_memory
from teacher_cache.pipeline.models.student import build_student, student_config, student_tokenizer
from teacher_cache.pipeline.precompute.run import precompute
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.pipeline.settings.train import PixelsConfig
from teacher_cache.pipeline.train.make_pixels import make_pixels, plan_pixels
from teacher_cache.storage.read.reader import EmbeddingReader

_STUDENT, _BATCH, _WORKERS = "vit-ti-32", 50, 1
_SETS: dict[str, tuple[int, tuple[int, int] | None]] = {"224 x 224": (1500, None), "1600 x 1200": (200, (1600, 1200))}


def measure(settings: Settings) -> list[Row]:
    """See the module."""
    keep_freed_memory(torch.device("cpu"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a worker has it
    rows: list[Row] = []
    try:
        for number, (name, (count, size)) in enumerate(_SETS.items()):
            home = settings.scratch / f"set-{number}"
            photographs(settings.shared / "flickr8k", home / "photos", 50 if settings.quick else count, size)
            rows += _of_set(settings, home, name)
    finally:
        torch.set_num_threads(threads)
    return rows


def _of_set(settings: Settings, home: Path, name: str) -> list[Row]:
    dataset, cache = f"flickr:{home / 'photos'}", str(home / "cache")
    precompute(PrecomputeConfig(dataset=dataset, teacher="bundled:scenes", cache=cache, device="cpu"))
    make_pixels(plan_pixels(PixelsConfig(cache=cache, student=_STUDENT, out=str(home / "ready"))))
    reader = EmbeddingReader(cache)
    rows, architecture = reader.image_rows("train"), student_config(_STUDENT)
    preprocess = build_student(architecture, handed_on(reader.identity.preprocess), reader.embed_dim).preprocess
    pairs = list(PairOrder(reader, rows, _BATCH, 16, seed=0).epoch(0))
    tokenizer = student_tokenizer(architecture)
    pixels = ReadyPixels(str(home / "ready"), reader, rows, 1, preprocess)
    images = StudentImages(reader, ImageSource(str(home / "photos")), preprocess)

    def ready() -> None:
        _drain(InputLoader(reader, tokenizer, pixels, workers=_WORKERS).epoch(pairs))

    def decoded() -> None:
        _drain(InputLoader(reader, tokenizer, images, workers=_WORKERS).epoch(pairs))

    seconds = interleave(
        {
            "ready": ready,
            "decoded": decoded,
            "pillow": lambda: _drain(_peer(_PillowImages(reader, home, tokenizer, preprocess), pairs)),
            "torchvision": lambda: _drain(_peer(_TorchvisionImages(reader, home, tokenizer, preprocess), pairs)),
        },
        1 if settings.quick else settings.rounds,
        not settings.quick,
    )
    samples = len(pairs) * _BATCH
    what = f"ready pixels, {name}"
    return [
        speed(what, "our own decoding", seconds["ready"], seconds["decoded"], samples, "samples/s"),
        speed(what, "Pillow and open_clip's transform", seconds["ready"], seconds["pillow"], samples, "samples/s", 0.9),
        speed(
            what, "torchvision decode_jpeg and v2", seconds["ready"], seconds["torchvision"], samples, "samples/s", 0.9
        ),
    ]


def _drain(inputs: Iterator[Any]) -> None:
    for _ in inputs:
        pass


class _Images(Dataset[tuple[Tensor, Tensor]]):
    """(image row, caption row) to pixels and tokens, by a peer's decoder."""

    def __init__(self, reader: EmbeddingReader, home: Path, tokenizer: Any, preprocess: Preprocess) -> None:
        self._paths = [str(home / "photos" / "images" / name) for name in reader.samples["sample_id"].to_pylist()]
        self._texts = reader.captions["text"].to_pylist()
        self._tokenizer, self._preprocess = tokenizer, preprocess
        self._transform = self._made()

    def _made(self) -> Any:
        raise NotImplementedError

    def _pixels(self, path: str) -> Tensor:
        raise NotImplementedError

    def __getitem__(self, pair: tuple[int, int]) -> tuple[Tensor, Tensor]:
        image, caption = pair
        return self._pixels(self._paths[image]), self._tokenizer([self._texts[caption]])[0]


class _PillowImages(_Images):
    def _made(self) -> Any:
        return open_clip.image_transform(
            self._preprocess.size, is_train=False, mean=self._preprocess.mean, std=self._preprocess.std
        )

    def _pixels(self, path: str) -> Tensor:
        with Image.open(path) as image:
            pixels: Tensor = self._transform(image)
        return pixels


class _TorchvisionImages(_Images):
    def _made(self) -> Any:
        return v2.Compose(
            [
                v2.Resize(min(self._preprocess.size), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
                v2.CenterCrop(list(self._preprocess.size)),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(list(self._preprocess.mean), list(self._preprocess.std)),
            ]
        )

    def _pixels(self, path: str) -> Tensor:
        image = torchvision.io.decode_jpeg(torchvision.io.read_file(path), mode=ImageReadMode.RGB)
        pixels: Tensor = self._transform(image)
        return pixels


def _peer(images: _Images, pairs: list[Pairs]) -> Iterator[Any]:
    """A plain DataLoader over the same pairs in the same order."""
    order = [list(zip(pair.image_rows.tolist(), pair.caption_rows.ravel().tolist(), strict=True)) for pair in pairs]
    loader: Iterator[Any] = iter(
        DataLoader(images, num_workers=_WORKERS, batch_sampler=order, worker_init_fn=lambda _: torch.set_num_threads(1))
    )
    return loader
