"""Precompute against its own teacher's bare forward pass, and against clip-retrieval's whole job.

Ours goes from JPEG files to committed chunks; the bare pass is the same model on a batch that lies ready on its device,
in the same process, by the same batch size, precision, threads and kept memory. On a CPU decoding and the model share
the cores, so that no encoder gets beyond forward / (forward + decoding), both in seconds of a core; a row gives that
limit, and one what is left when no photograph has to be decoded. With ``--device cuda`` ViT-B/32 and ViT-L/14 run in
pure_bf16, as open_clip's precision of that name, and in bf16, over pictures that are made; that part has never run, for
want of a GPU.

clip-retrieval has an environment of its own (:mod:`benchmarks.bench.peers`). Both start as a process, read the same
tars of photographs with one caption each, run the same weights and batch size, and write float16 to the disk; ours
digests, checks and commits besides.
"""

from __future__ import annotations

import contextlib
import io
import os
import resource
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image

from benchmarks.bench.harness import Row, Settings, interleave, speed
from benchmarks.bench.material import made_photographs, photographs, random_weights
from benchmarks.bench.peers import ROOT, python_of
from teacher_cache.pipeline.data.images.decode import decode_image
from teacher_cache.pipeline.data.tokens import order_by_length
from teacher_cache.pipeline.models.device import keep_freed_memory
from teacher_cache.pipeline.models.teacher import LiveTeacher, load_teacher
from teacher_cache.pipeline.models.text_length import encode_text, shorten
from teacher_cache.pipeline.precompute.encode import encode_chunks
from teacher_cache.pipeline.precompute.plan import plan_precompute
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.storage.format.commits import ChunkRef
from teacher_cache.storage.write.writer import EmbeddingWriter

_SHARED_TEACHER = "teacher-flickr8k"
# as the images of Flickr8k get, and those of a data set for a GPU; so few as are here would get 64 and less each
_CHUNK_ROWS = {"cpu": 256, "cuda": 4096}


def measure(settings: Settings) -> list[Row]:
    """See the module; on a CPU a ViT-B/32 with random weights and, where it is, the Flickr8k teacher."""
    rows: list[Row] = []
    if settings.device == "cuda":
        for name, images in (("ViT-B-32", 24_576), ("ViT-L-14", 12_288)):
            weights = random_weights(name, settings.scratch)
            for precision in ("pure_bf16", "bf16"):
                rows += _against_forward(settings, name, str(weights), precision, 2048 if settings.quick else images)
        return rows
    keep_freed_memory(torch.device("cpu"))
    small = "ViT-S-32-alt" if settings.quick else "ViT-B-32"
    weights = random_weights(small, settings.scratch)
    rows += _against_forward(settings, small, str(weights), "fp32", 16 if settings.quick else 96)
    trained = settings.shared / _SHARED_TEACHER
    if trained.exists():
        rows += _against_forward(settings, f"local-dir:{trained}", None, "fp32", 16 if settings.quick else 128)
    rows.append(_against_clip_retrieval(settings, small, weights))
    return rows


def _against_forward(settings: Settings, name: str, pretrained: str | None, precision: Any, images: int) -> list[Row]:
    label = f"{name.rpartition('/')[2]} {precision}"
    home = settings.scratch / label
    if settings.device == "cuda":
        made_photographs(home / "photos", images, (224, 224))
    else:
        photographs(settings.shared / "flickr8k", home / "photos", images)
    config = PrecomputeConfig(
        dataset=f"flickr:{home / 'photos'}",
        teacher=name,
        pretrained=pretrained,
        cache=str(home / "cache"),
        device=settings.device,
        precision=precision,
        chunk_rows=_CHUNK_ROWS[settings.device],
    )
    teacher = load_teacher(name, pretrained, settings.device, precision)
    refs = plan_precompute(config, teacher)
    writer = EmbeddingWriter(config.cache)
    batch = writer.manifest.layout.batch_rows
    of_images = [ref for ref in refs if ref.tower == "image"]
    of_texts = [ref for ref in refs if ref.tower == "text"][: 1 if settings.quick else 8]
    texts = sum(len(ref.rows(writer.manifest.layout)) for ref in of_texts)
    pixels = torch.randn(batch, 3, *teacher.preprocess.size, device=teacher.device)
    tokens, by_row = _ready_tokens(teacher, writer, of_texts, True), _ready_tokens(teacher, writer, of_texts, False)

    def bare_images() -> None:
        for at in range(0, images, batch):
            _forward(teacher, teacher.model.encode_image, pixels[: images - at])  # type: ignore[operator]
        _wait(teacher)

    def bare_texts(batches: list[torch.Tensor]) -> None:
        for part in batches:
            _forward(teacher, lambda part: encode_text(teacher.model, part), part)
        _wait(teacher)

    shown = Image.new("RGB", (teacher.preprocess.size[1], teacher.preprocess.size[0]), "grey")

    def without_decoding() -> None:
        with patch("teacher_cache.pipeline.precompute.teacher_inputs.open_image", lambda data, decoder: shown):
            encode_chunks(config, teacher, of_images)

    seconds = interleave(
        {
            "bare images": bare_images,
            "images": lambda: encode_chunks(config, teacher, of_images),
            "not decoded": without_decoding,
            "bare texts": lambda: bare_texts(tokens),
            "bare texts by row": lambda: bare_texts(by_row),
            "texts": lambda: encode_chunks(config, teacher, of_texts),
        },
        1 if settings.quick else settings.rounds,
        not settings.quick,
    )
    encode, forward = f"precompute, {label}, images", "forward over ready tensors"
    decoding, count = _cpu_seconds(lambda: _decode_all(home / "photos", teacher)), os.cpu_count() or 1
    profile = f"decoding costs {1000 * decoding / images:.2f} ms of a core per image, the forward pass "
    if settings.device == "cpu":
        # of all cores, as the model takes them
        cores = count * statistics.median(seconds["bare images"])
        profile += f"{1000 * cores / images:.2f}; so the most on this CPU is {cores / (cores + decoding):.3f}"
        against, least, wanted = forward, seconds["bare images"], 0.95
    else:
        profile += f"{1000 * statistics.median(seconds['bare images']) / images:.3f} ms of the GPU"
        against = f"the slower of {forward} and decoding on {count} cores"
        least, wanted = [max(bare, decoding / count) for bare in seconds["bare images"]], 0.97 if "-L-" in name else 0.9
    return [
        speed(encode, against, seconds["images"], least, images, "images/s", wanted, profile),
        speed(
            f"{encode}, none decoded",
            forward,
            seconds["not decoded"],
            seconds["bare images"],
            images,
            "images/s",
            wanted,
            "each JPEG is read and proven, and a ready image taken in its place",
        ),
        speed(
            f"precompute, {label}, captions",
            "forward over ready tokens, as short",
            seconds["texts"],
            seconds["bare texts"],
            texts,
            "captions/s",
            wanted,
            "tokenizing takes 25 us of Python's lock a caption, each chunk 10 ms of files; parts left out one at a "
            "time: docs/design/019-encoding-speed.md",
        ),
        speed(
            f"precompute, {label}, captions",
            "forward over ready tokens in the order of the rows",
            seconds["texts"],
            seconds["bare texts by row"],
            texts,
            "captions/s",
            None,
            "each batch padded to its longest caption, as in caches of before there was an order",
        ),
    ]


def _ready_tokens(
    teacher: LiveTeacher, writer: EmbeddingWriter, refs: list[ChunkRef], by_length: bool
) -> list[torch.Tensor]:
    """The batches of some chunks, as the encoder makes them or by row, on the teacher's device."""
    layout, batches = writer.manifest.layout, []
    for ref in refs:
        texts = writer.captions.read(ref.rows(layout))["text"]
        listed = (texts.take(order_by_length(texts)) if by_length else texts).to_pylist()
        for at in range(0, len(listed), layout.batch_rows):
            tokens = torch.as_tensor(teacher.tokenizer(listed[at : at + layout.batch_rows]))
            batches.append(shorten(tokens).to(teacher.device))
    return batches


def _forward(teacher: LiveTeacher, encode: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor) -> None:
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(teacher.precision)
    if teacher.precision == "pure_bf16" and batch.is_floating_point():
        batch = batch.bfloat16()
    cast: contextlib.AbstractContextManager[Any] = (
        torch.autocast(teacher.device.type, half) if half else contextlib.nullcontext()
    )
    with torch.inference_mode(), cast:
        encode(batch)


def _wait(teacher: LiveTeacher) -> None:
    """Until a GPU has done what it was given: behind all batches, as one that is fed well never waits between them."""
    if teacher.device.type == "cuda":
        torch.cuda.synchronize()


def _decode_all(photos: Path, teacher: LiveTeacher) -> None:
    crop = teacher.preprocess.shown
    for path in (photos / "images").iterdir():
        crop(decode_image(path.read_bytes()))


def _cpu_seconds(work: Callable[[], None]) -> float:
    work()
    before = resource.getrusage(resource.RUSAGE_SELF)
    work()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _against_clip_retrieval(settings: Settings, model: str, weights: Path) -> Row:
    images, batch = (8, 8) if settings.quick else (192, 16)
    home = settings.scratch / "whole"
    captions = photographs(settings.shared / "flickr8k", home / "photos", images, captions=1)
    tars = _tars(home / "tars", home / "photos" / "images", captions)
    python = python_of("clipret")
    made = iter(range(10**6))

    def ours() -> None:
        command = [
            sys.executable,
            "-m",
            "teacher_cache.pipeline.cli.app",
            "precompute",
            "--dataset",
            f"webdataset:{home / 'tars'}",
        ]
        command += ["--teacher", model, "--pretrained", str(weights), "--device", "cpu", "--batch-size", str(batch)]
        _process([*command, "--cache", str(home / f"cache-{next(made)}")])

    def theirs() -> None:
        command = [str(python), "-W", "ignore", "-m", "clip_retrieval.clip_inference.main", f"--input_dataset={tars}"]
        command += ["--input_format=webdataset", f"--batch_size={batch}", f"--num_prepro_workers={os.cpu_count()}"]
        command += [f"--clip_model=open_clip:{model}/{weights}", "--output_partition_count=1", "--enable_wandb=False"]
        out = home / f"theirs-{next(made)}"
        _process([*command, f"--output_folder={out}"])
        assert list(out.glob("img_emb/*.npy")), "clip-retrieval wrote no embeddings"

    # the first round of each pays for what the disk has to bring
    seconds = interleave({"ours": ours, "theirs": theirs}, 1 if settings.quick else min(settings.rounds, 3), False)
    return speed(
        f"whole job, {model}, {images} pairs",
        "clip-retrieval inference",
        seconds["ours"],
        seconds["theirs"],
        images,
        "pairs/s",
        2.0,
        "processes from start to end: loading torch and weights, and its two batches to warm up, are in it; "
        "it encodes captions at 77 tokens, ours at their length",
    )


def _tars(folder: Path, images: Path, captions: dict[str, str]) -> str:
    """As many tars as clip-retrieval has workers, each of which reads its own; the pattern that names them."""
    folder.mkdir()
    count = os.cpu_count() or 1
    for number in range(count):
        with tarfile.open(folder / f"train-{number:03d}.tar", "w") as tar:
            for name, caption in list(captions.items())[number::count]:
                tar.add((images / name).resolve(), f"{Path(name).stem}.jpg")
                text = caption.encode()
                member = tarfile.TarInfo(f"{Path(name).stem}.txt")
                member.size = len(text)
                tar.addfile(member, io.BytesIO(text))
    return f"{folder}/train-{{000..{count - 1:03d}}}.tar"


def _process(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} ended with {done.returncode}: {done.stderr[-2000:]}")
