"""What the dataset tests build with: small image files, and the adapters called as load_samples calls them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from teacher_cache.pipeline.data.datasets import Problem, Sample, adapter


def save_image(path: Path, shade: int = 0) -> bytes:
    """A 12 x 8 image in the format of the path's ending; its bytes differ with the shade."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 8), (shade % 256, 100, 255 - shade % 256)).save(path)
    return path.read_bytes()


def read(kind: str, root: Path | str, **options: str) -> tuple[list[Sample], list[Problem]]:
    """Samples and problems of one adapter, each in order."""
    samples: list[Sample] = []
    problems: list[Problem] = []
    for record in adapter(kind)(str(root), **options):
        if isinstance(record, Sample):
            samples.append(record)
        else:
            problems.append(record)
    return samples, problems


def told(problems: list[Problem]) -> list[tuple[str, str, bool]]:
    """Kind, place and whether an image was lost."""
    return [(problem.kind, problem.where, problem.lost_image) for problem in problems]
