"""What the dataset tests build with: small image files and tars, and the ways to read a dataset."""

from __future__ import annotations

import io
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
