"""What the dataset tests build with: small image files and tars, and the ways to read a dataset."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

from teacher_cache.pipeline.data.datasets.adapters import adapter
from teacher_cache.pipeline.data.datasets.records import Problem, Sample, SampleSet
from teacher_cache.pipeline.data.datasets.samples import load_samples
from teacher_cache.pipeline.data.datasets.spec import DatasetSpec


def save_image(path: Path, shade: int = 0) -> bytes:
    """A 12 x 8 image in the format of the path's ending; its bytes differ with the shade."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 8), (shade % 256, 100, 255 - shade % 256)).save(path)
    return path.read_bytes()


def write_tar(path: Path, members: list[tuple[str, bytes | str]]) -> Path:
    """A tar of these members, in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            data = content.encode() if isinstance(content, str) else content
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def read(kind: str, root: Path | str, /, **options: str) -> tuple[list[Sample], list[Problem]]:
    """Samples and problems of one adapter, each in order."""
    samples: list[Sample] = []
    problems: list[Problem] = []
    for record in adapter(kind)(str(root), **options):
        if isinstance(record, Sample):
            samples.append(record)
        else:
            problems.append(record)
    return samples, problems


@contextmanager
def served(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[str]:
    """Address of a loopback server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def load(spec: str) -> SampleSet:
    """Samples of ``KIND:PATH`` whose images can be read, and all problems."""
    return load_samples(DatasetSpec.parse(spec))[0]


def told(problems: list[Problem]) -> list[tuple[str, str, bool]]:
    """Kind, place and whether an image was lost."""
    return [(problem.kind, problem.where, problem.lost_image) for problem in problems]


# published forms of datasets, with generated pictures


def birdsnap(root: Path) -> None:
    """Of the three listed images one was no longer to be had, as of most copies of the dataset."""
    for name in ("Acadian_Flycatcher/1.jpg", "Allens_Hummingbird/2.jpg", "Allens_Hummingbird/of_training.jpg"):
        save_image(root / "images" / name, len(name))
    (root / "test_images.txt").write_text("path\nAcadian_Flycatcher/1.jpg\nAllens_Hummingbird/2.jpg\nOsprey/3.jpg\n")


def ucf101(root: Path) -> None:
    """Middle frames as CoOp publishes them; the list names the clips, in other spellings."""
    save_image(root / "UCF-101-midframes" / "Handstand_Pushups" / "v_HandStandPushups_g01_c01.jpg", 20)
    save_image(root / "UCF-101-midframes" / "Yo_Yo" / "v_YoYo_g01_c01.jpg", 90)
    lists = root / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "testlist01.txt").write_text(
        "HandstandPushups/v_HandStandPushups_g01_c01.avi\r\nYoYo/v_YoYo_g01_c01.avi\r\n"
    )
    (lists / "trainlist01.txt").write_text("YoYo/v_YoYo_g01_c01.avi 101\n")


def hateful_memes(root: Path) -> None:
    lines = []
    for number, label in ((8291, 1), (46971, 0)):
        save_image(root / "img" / f"{number}.png", number)
        lines.append(json.dumps({"id": number, "img": f"img/{number}.png", "label": label, "text": "look"}))
    (root / "dev.jsonl").write_text("\n".join(lines) + "\n")
    (root / "test.jsonl").write_text('{"id": 1, "img": "img/8291.png", "text": "no label"}\n')


def kinetics700(root: Path) -> None:
    """Middle frames in the folders of the clips."""
    save_image(root / "val" / "punching person (boxing)" / "a_000001_000011.jpg", 20)
    save_image(root / "val" / "massaging person_s head" / "b_000001_000011.jpg", 90)
