"""open_clip's own trainer on a small dataset: with its live teacher, and with a cache; also as two gloo ranks."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip_train import main as trainer

from teacher_cache import Cache
from teacher_cache.pipeline.settings.train import OpenClipTrainConfig
from teacher_cache.pipeline.train.open_clip_trainer import CachedDistModel, train

# some tenth of the parameters of ../shared/teacher-flickr8k, of its preprocessing and tokenizer
SMALL_STUDENT: dict[str, Any] = {
    "preprocess": {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD, "interpolation": "bicubic"},
    "embed_dim": 64,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 64, "head_width": 16, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 48, "heads": 2, "layers": 2},
}
COLUMNS = ["--csv-img-key", "path", "--csv-caption-key", "caption", "--csv-separator", ","]


def write_pairs(cache: Path, out: Path, split: str = "train") -> list[tuple[str, str]]:
    """A CSV of every pair of a cache's split, by absolute path."""
    reader = Cache(str(cache))
    rows, owners = reader.caption_rows(reader.image_rows(split))
    uris = reader.samples["uri"].to_pylist()
    texts, images = reader.captions["text"].to_pylist(), reader.image_rows(split)
    root = Path(reader.manifest.source.image_root)
    pairs = [(str(root / uris[images[owner]]), texts[row]) for row, owner in zip(rows, owners, strict=True)]
    with out.open("w", newline="") as file:
        csv.writer(file).writerows([("path", "caption"), *pairs])
    return pairs


def first_photographs(flickr8k: Path, out: Path, images: int) -> Path:
    """The first training photographs of Flickr8k in its own form; links, not copies."""
    names = (flickr8k / "train.txt").read_text().split()[:images]
    (out / "images").mkdir(parents=True)
    for name in names:
        (out / "images" / name).symlink_to(flickr8k / "images" / name)
    (out / "train.txt").write_text("\n".join(names) + "\n")
    heading, *lines = (flickr8k / "captions.txt").read_text().splitlines()
    kept = [line for line in lines if line.partition(",")[0] in set(names)]
    (out / "captions.txt").write_text("\n".join([heading, *kept]) + "\n")
    return out


def write_tars(pairs: list[tuple[str, str]], folder: Path, tars: int = 2) -> str:
    """The same pairs as tars; returns their name as open_clip takes it."""
    folder.mkdir()
    for number in range(tars):
        with tarfile.open(folder / f"{number:04d}.tar", "w") as tar:
            for at, (path, caption) in enumerate(pairs[number::tars]):
                for name, data in ((f"{at:04d}.jpg", Path(path).read_bytes()), (f"{at:04d}.txt", caption.encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return str(folder / f"{{0000..{tars - 1:04d}}}.tar")


def words(student: Path | str, data: Path | str, logs: Path, *more: str, batch_size: int = 8) -> list[str]:
    """Arguments of a run on a CPU that logs every step."""
    name = f"local-dir:{student}" if Path(student).exists() else str(student)
    given = ["--model", name, "--train-data", str(data), "--batch-size", str(batch_size), "--logs", str(logs)]
    settings = ["--name", "run", "--precision", "fp32", "--device", "cpu", "--log-every-n-steps", "1"]
    return [*given, *settings, "--workers", "0", "--epochs", "1", "--warmup", "2", "--lr", "1e-3", *more]


@contextmanager
def own_logging() -> Iterator[None]:
    """open_clip's trainer adds the log of each run to the root logger."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        for handler in root.handlers:
            if handler not in handlers:
                handler.close()
        root.handlers[:], root.level = handlers, level


@own_logging()
def live(teacher: Path, given: list[str]) -> None:
    """open_clip's own distillation with the teacher in every step; the student is shown the evaluation crop."""

    def evaluation_crops(*args: Any, **settings: Any) -> Any:
        model, _, evaluation = trainer.create_model_and_transforms(*args, **settings)
        return model, evaluation, evaluation

    run = FunctionType(trainer.main.__code__, vars(trainer) | {"create_model_and_transforms": evaluation_crops})
    weights = teacher / "open_clip_model.safetensors"
    assert not run([*given, "--distill-model", f"local-dir:{teacher}", "--distill-pretrained", str(weights)])


@own_logging()
def cached(cache: Path, given: list[str], views: int | None = None) -> None:
    train(OpenClipTrainConfig(cache=str(cache), arguments=tuple(given), views=views))


def losses(logs: Path) -> list[float]:
    """The loss of each step, as open_clip logs it: five digits."""
    return [float(loss) for loss in re.findall(r" Loss: ([\d.]+) ", (logs / "run" / "out.log").read_text())]


def batch_seconds(logs: Path) -> list[float]:
    """The seconds of each step, as open_clip logs them."""
    return [float(seconds) for seconds in re.findall(r"Batch \(t\): ([\d.]+),", (logs / "run" / "out.log").read_text())]


def _one_rank(how: str, place: str, out: str, given: list[str]) -> None:
    """One of torchrun's processes. open_clip 3.3 names a device to torch's DDP, which refuses that on a CPU."""
    parallel = torch.nn.parallel.DistributedDataParallel
    torch.nn.parallel.DistributedDataParallel = lambda model, device_ids, **kw: parallel(model, **kw)  # type: ignore[misc,assignment]
    seen, forward = [], CachedDistModel.forward

    def recorded(self: CachedDistModel, images: torch.Tensor, texts: torch.Tensor) -> dict[str, torch.Tensor]:
        result = forward(self, images, texts)
        seen.append([images, texts, result["image_features"], result["text_features"]])
        return result

    CachedDistModel.forward = recorded  # type: ignore[method-assign]
    (live if how == "live" else cached)(Path(place), given)
    if how == "cached":
        arrays = [torch.cat(parts).numpy() for parts in zip(*seen, strict=True)]
        np.savez(Path(out) / f"{os.environ['RANK']}.npz", *arrays)


if __name__ == "__main__":
    _one_rank(*sys.argv[1:4], json.loads(sys.argv[4]))
