"""Dataset ``scenes:PATH``: small rendered scenes, for demos and tests without a download.

A scene has two or three shapes on a textured background, and four captions: the relation of two shapes, all shapes with
their colours, the place of one shape, and colours or forms with the background. Every fifth scene is a twin of the one
before it with two colours, places or sizes exchanged, so that a bag of words cannot tell them apart. Jitter, rotation,
lighting and noise differ in every scene.

Scenes are drawn from a counter-based generator keyed by (seed, split, index), so each can be made again on its own.
Descriptions and captions are the same on every machine. A pixel may differ by one step if another processor or Pillow
rounds differently. The first use renders the scenes to PATH:

    PATH/captions.json        settings, and per image its file, split, captions
    PATH/images/*.png         64 x 64 RGB
"""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from teacher_cache.pipeline.data.datasets.files import read_json, uri_below
from teacher_cache.pipeline.data.datasets.records import Problem, Record, sample_or_problem
from teacher_cache.storage.errors import UsageError
from teacher_cache.storage.observe.safe_text import printable

VERSION = 1  # raise it when drawing or wording changes
IMAGE_SIZE = 64
SPLITS = ("train", "dev", "test")

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")
COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 138, 24),
    "yellow": (247, 221, 50),
    "green": (44, 160, 60),
    "cyan": (70, 215, 225),
    "blue": (38, 84, 226),
    "purple": (130, 48, 170),
    "pink": (246, 134, 184),
    "white": (248, 248, 248),
    "black": (16, 16, 16),
}
BACKGROUNDS = {
    "grey": (128, 128, 128),
    "beige": (212, 196, 160),
    "brown": (112, 74, 46),
    "navy": (40, 52, 98),
    "olive": (112, 120, 58),
}
TEXTURES = ("plain", "striped", "dotted", "checkered")

_SUPERSAMPLE = 4
_CELL_CENTRES = (11.0, 32.0, 53.0)  # pixels; 21 apart leaves two large neighbours side by side at full jitter
_JITTER = 1.2
_RADIUS = {"small": 5.8, "large": 9.2}
_SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big")}
_PREFIXES = ("", "", "", "", "a picture of ", "a photo of ")
_PLACES = {
    (0, 0): "in the top left corner",
    (0, 1): "at the top",
    (0, 2): "in the top right corner",
    (1, 0): "on the left",
    (1, 1): "in the middle",
    (1, 2): "on the right",
    (2, 0): "in the bottom left corner",
    (2, 1): "at the bottom",
    (2, 2): "in the bottom right corner",
}
_RELATIONS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}

_T = TypeVar("_T")
_Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class SceneObject:
    """Shape with its properties and its cell in the 3 x 3 grid (row 0 is the top, column 0 the left)."""

    shape: str
    colour: str
    size: str
    row: int
    column: int


@dataclass(frozen=True)
class Scene:
    """Contents of a scene, before jitter and noise. No two objects share a shape, a colour or a cell."""

    objects: tuple[SceneObject, ...]
    background: str
    texture: str


def read(
    root: str, *, seed: str = "2024", train: str = "1800", dev: str = "200", test: str = "400"
) -> Iterator[Record]:
    """Read the samples of ``scenes:PATH`` in the order train, dev, test; render them on first use.

    The images are rendered into a hidden folder beside PATH, which one rename turns into PATH. A killed render leaves
    PATH unchanged, and the next call starts again. Several processes may call at once: each renders, and all use the
    folder of the first to finish.

    Args:
        root: local folder, absent or empty on first use.
        seed: seed of all scenes.
        train, dev, test: number of images of each split.

    Raises:
        UsageError: an option is no whole number, there are no images, PATH was rendered with other settings, or it
            holds something else.
    """
    if "://" in root:
        raise UsageError(f"scenes:{root}: scenes are rendered to a local folder; give a path without '://'")
    options = {"seed": seed, "train": train, "dev": dev, "test": test}
    for name, text in options.items():
        if not (text.isascii() and text.isdigit()) or int(text) >= 2**63:
            raise UsageError(f"scenes: {name}={text!r} is not a whole number from 0 to 2**63 - 1")
    settings = {**{name: int(text) for name, text in options.items()}, "version": VERSION}
    if not any(settings[split] for split in SPLITS):
        raise UsageError("scenes: train, dev and test are all 0; give one of them at least one image")
    path = Path(root).absolute()
    if not (path / "captions.json").exists():
        _render_folder(path, settings)
    return _samples(_load_index(path, settings))


def _samples(images: list[Any]) -> Iterator[Record]:
    for number, image in enumerate(images):
        fields = image if isinstance(image, dict) else {}
        file, split, captions = fields.get("file"), fields.get("split"), fields.get("captions")
        texts = [text if isinstance(text, str) else "" for text in captions] if isinstance(captions, list) else []
        if not isinstance(file, str) or uri_below("", file) is None or not isinstance(split, str):
            detail = "no file below the folder, or no split, in it"
            yield Problem("bad-record", f"captions.json images[{number}]", detail, lost_image=True)
        else:
            yield from sample_or_problem(Path(file).stem, file, split, texts)


def _load_index(path: Path, settings: dict[str, int]) -> list[Any]:
    """Read the images listed in ``captions.json``, and check that its settings are the requested ones."""
    index = read_json(path / "captions.json")
    try:
        recorded, images = dict(index["scenes"]), list(index["images"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}/captions.json is not the list of a scenes dataset; use another path") from error
    differences = [
        f"{name} {printable(str(recorded.get(name)))} (asked for {value})"
        for name, value in settings.items()
        if recorded.get(name) != value
    ]
    if differences:
        raise UsageError(
            f"{path}: rendered with {', '.join(differences)}. Ask for the recorded settings, or render to another path."
        )
    return images


def _render_folder(path: Path, settings: dict[str, int]) -> None:
    """Render every scene beside ``path``, then rename. After a failure ``path`` is complete or unchanged."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{path}: neither empty nor a scenes dataset (no captions.json); use another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.parent / f".{path.name}.rendering-{uuid.uuid4().hex[:12]}"
    try:
        (unfinished / "images").mkdir(parents=True)
        images = []
        for split in SPLITS:
            for number in range(settings[split]):
                picture, captions = render_scene(settings["seed"], split, number)
                file = f"images/{split}-{number:05d}.png"
                # level 1: noise does not compress, and the default level takes three times as long
                picture.save(unfinished / file, compress_level=1)
                images.append({"file": file, "split": split, "captions": captions})
        index = {"scenes": settings, "images": images}
        (unfinished / "captions.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
        try:
            os.rename(unfinished, path)  # noqa: PTH104 - replaces an empty folder, fails on a full one
        except OSError:
            if not (path / "captions.json").exists():
                raise
            # another process finished first; _load_index compares its settings
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


# ---------------------------------------------------------------------------------------------- scenes


def describe_scene(seed: int, split: str, index: int) -> Scene:
    """Return the description of scene ``index`` of a split, a pure function of the arguments."""
    if index % 5 == 1:
        return _twin(_draw_scene(_generator(seed, split, index - 1, 0)), _generator(seed, split, index, 0))
    return _draw_scene(_generator(seed, split, index, 0))


def render_scene(seed: int, split: str, index: int) -> tuple[Image.Image, tuple[str, ...]]:
    """Render one scene as a 64 x 64 RGB image with four captions, a pure function of the arguments.

    Args:
        seed: seed of the dataset.
        split: any name. Each split has its own random stream.
        index: position in the split, without an upper limit.
    """
    scene = describe_scene(seed, split, index)
    picture = _draw_picture(scene, _generator(seed, split, index, 1))
    return picture, _write_captions(scene, _generator(seed, split, index, 2))


def _generator(seed: int, split: str, index: int, purpose: int) -> np.random.Generator:
    """Return a Philox generator at its own counter block. Use random() alone: numpy has never changed its bits."""
    stream = int.from_bytes(split.encode()[:8].ljust(8, b"\0"), "little")
    key = np.array([seed, stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, purpose, index]))


def _pick(rng: np.random.Generator, options: Sequence[_T]) -> _T:
    return options[int(rng.random() * len(options))]


def _shuffled(rng: np.random.Generator, options: Sequence[_T]) -> list[_T]:
    return [options[place] for place in np.argsort(rng.random(len(options)))]


def _draw_scene(rng: np.random.Generator) -> Scene:
    count = _pick(rng, (2, 3))
    shapes, colours = _shuffled(rng, SHAPES), _shuffled(rng, tuple(COLOURS))
    cells = _shuffled(rng, tuple(_PLACES))
    sizes = [_pick(rng, ("small", "large")) for _ in range(count)]
    objects = tuple(SceneObject(shapes[place], colours[place], sizes[place], *cells[place]) for place in range(count))
    return Scene(objects, _pick(rng, tuple(BACKGROUNDS)), _pick(rng, TEXTURES))


def _twin(scene: Scene, rng: np.random.Generator) -> Scene:
    """Exchange the colours, the places or (where they differ) the sizes of two shapes."""
    first, second, *others = _shuffled(rng, scene.objects)
    exchange = ["colour", "place"] + ["size"] * (first.size != second.size)
    names = {"colour": ("colour",), "place": ("row", "column"), "size": ("size",)}[_pick(rng, exchange)]
    of_first, of_second = ({name: getattr(thing, name) for name in names} for thing in (first, second))
    return replace(scene, objects=(replace(first, **of_second), replace(second, **of_first), *others))


# -------------------------------------------------------------------------------------------- captions


def _write_captions(scene: Scene, rng: np.random.Generator) -> tuple[str, ...]:
    """Return four captions, each from another point of view."""
    return tuple(_pick(rng, _PREFIXES) + view(scene, rng) for view in _shuffled(rng, _VIEWS)[:4])


def _article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _name(thing: SceneObject, rng: np.random.Generator, size: bool = False) -> str:
    adjective = f"{_pick(rng, _SIZE_WORDS[thing.size])} " if size else ""
    return _article(f"{adjective}{thing.colour} {thing.shape}")


def _backdrop(scene: Scene, rng: np.random.Generator) -> str:
    return f"a {scene.texture} {scene.background} {_pick(rng, ('background', 'backdrop'))}"


def _relation(first: SceneObject, second: SceneObject, rng: np.random.Generator) -> str:
    """Return the position of ``first`` relative to ``second``, in words, along the axis of the wider gap."""
    down, right = first.row - second.row, first.column - second.column
    horizontal = abs(right) > abs(down) or (abs(right) == abs(down) and rng.random() < 0.5)
    if horizontal:
        return _pick(rng, _RELATIONS["right" if right > 0 else "left"])
    return _pick(rng, _RELATIONS["below" if down > 0 else "above"])


def _in_order(scene: Scene, rng: np.random.Generator) -> tuple[SceneObject, SceneObject, tuple[SceneObject, ...]]:
    """Return two objects to describe, and the third one if it exists."""
    first, second, *others = _shuffled(rng, scene.objects)
    return first, second, tuple(others)


def _view_beside(scene: Scene, rng: np.random.Generator) -> str:
    """Name two shapes and their relation: a small red star above a blue ring, with a pink moon."""
    first, second, others = _in_order(scene, rng)
    sized = _pick(rng, ((True, True), (True, False), (False, True)))
    pair = f"{_name(first, rng, sized[0])} {_relation(first, second, rng)} {_name(second, rng, sized[1])}"
    return f"{pair}, with {_name(others[0], rng)}" if others else f"{pair} on {_backdrop(scene, rng)}"


def _view_list(scene: Scene, rng: np.random.Generator) -> str:
    """Name every shape with its colour, and the background: a star and a ring on a striped navy background."""
    names = [_name(thing, rng) for thing in _shuffled(rng, scene.objects)]
    return f"{', '.join(names[:-1])} and {names[-1]} on {_backdrop(scene, rng)}"


def _view_place(scene: Scene, rng: np.random.Generator) -> str:
    """Name one shape with its place, and another: a big red star at the top of a plain grey background, with a ring."""
    first, second, _ = _in_order(scene, rng)
    place = _PLACES[first.row, first.column]
    return f"{_name(first, rng, size=True)} {place} of {_backdrop(scene, rng)}, with {_name(second, rng)}"


def _view_colours(scene: Scene, rng: np.random.Generator) -> str:
    """Name colours without forms: a tiny red thing left of a large green thing, with something white, on ..."""
    first, second, others = _in_order(scene, rng)
    word = _pick(rng, ("shape", "thing", "object"))
    names = [_article(f"{_pick(rng, _SIZE_WORDS[thing.size])} {thing.colour} {word}") for thing in (first, second)]
    third = f", with something {others[0].colour}," if others else ""
    return f"{names[0]} {_relation(first, second, rng)} {names[1]}{third} on {_backdrop(scene, rng)}"


def _view_forms(scene: Scene, rng: np.random.Generator) -> str:
    """Name forms without colours: a tiny star left of a large ring, with a moon, on a plain beige backdrop."""
    first, second, others = _in_order(scene, rng)
    names = [_article(f"{_pick(rng, _SIZE_WORDS[thing.size])} {thing.shape}") for thing in (first, second)]
    third = f", with {_article(others[0].shape)}," if others else ""
    return f"{names[0]} {_relation(first, second, rng)} {names[1]}{third} on {_backdrop(scene, rng)}"


_VIEWS: tuple[Callable[[Scene, np.random.Generator], str], ...] = (
    _view_beside,
    _view_list,
    _view_place,
    _view_colours,
    _view_forms,
)


# -------------------------------------------------------------------------------------------- pictures


def _outline(angles: npt.NDArray[np.float64], radii: float | npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.stack([radii * np.sin(angles), -radii * np.cos(angles)], axis=1)


def _heart() -> npt.NDArray[np.float64]:
    t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -(y + 2.5)], axis=1) / 13.0


# corner points in radii, y down; square and cross extend past 1 so that all shapes have similar areas
_ROUND = _outline(np.linspace(0, 2 * math.pi, 48, endpoint=False), 1.0)
_OUTLINES: dict[str, npt.NDArray[np.float64]] = {
    "circle": _ROUND,
    "ring": _ROUND,
    "moon": _ROUND * 1.1,
    "square": np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.88,
    "triangle": _outline(np.arange(3) * 2 * math.pi / 3, 1.25) + np.array((0, 0.2)),
    "star": _outline(np.arange(10) * math.pi / 5, np.where(np.arange(10) % 2 == 0, 1.25, 0.5)),
    "heart": _heart(),
    "cross": np.array(
        [(-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1), (1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1)]
    )
    * 0.36,
}
_HOLES = {"ring": _ROUND * 0.55, "moon": _ROUND * 0.9 + np.array((0.55, -0.2))}

_AXIS = (np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5) / IMAGE_SIZE * 2 - 1
_Y, _X = np.meshgrid(_AXIS, _AXIS, indexing="ij")


def _draw_picture(scene: Scene, rng: np.random.Generator) -> Image.Image:
    pixels = _draw_background(scene, rng)
    for thing in scene.objects:
        mask = _draw_mask(thing, rng)[:, :, None]
        tint = np.array(COLOURS[thing.colour], dtype=np.float32) + _spread(rng, 14.0, 3)
        pixels += mask * (tint - pixels)
    slope_x, slope_y, exposure = _spread(rng, 0.12, 3)
    light = 1.0 + exposure + slope_x * _X + slope_y * _Y
    noise_level = 3.0 + 7.0 * rng.random()
    pixels *= light[:, :, None].astype(np.float32)
    pixels += (2 * rng.random(pixels.shape, dtype=np.float32) - 1) * np.float32(noise_level)
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))


def _spread(rng: np.random.Generator, width: float, count: int) -> _Array:
    """Return ``count`` numbers, uniform from -width to width."""
    return ((2 * rng.random(count) - 1) * width).astype(np.float32)


def _draw_background(scene: Scene, rng: np.random.Generator) -> _Array:
    """Draw colour times texture. Pattern edges are clipped sines, one pixel wide, and need no supersampling."""
    base = np.array(BACKGROUNDS[scene.background], dtype=np.float32) + _spread(rng, 10.0, 3)
    angle, phase_x, phase_y = (float(number) * 2 * math.pi for number in rng.random(3))
    waves = 4.0 + 2.0 * rng.random()  # over the width of the image
    if scene.texture in ("dotted", "checkered"):
        angle /= 18  # up to 20 degrees
    x = (math.cos(angle) * _X + math.sin(angle) * _Y) * math.pi * waves + phase_x
    y = (math.cos(angle) * _Y - math.sin(angle) * _X) * math.pi * waves + phase_y
    match scene.texture:
        case "striped":
            pattern = np.clip(3 * np.sin(x), -1, 1)
        case "dotted":
            pattern = np.clip(2.5 * (np.cos(x) + np.cos(y) - 0.9), -1, 1)
        case "checkered":
            pattern = np.clip(3 * np.sin(x) * np.sin(y), -1, 1)
        case _:
            pattern = np.zeros_like(_X)
    pixels: _Array = base + (pattern * (16.0 + 8.0 * rng.random()))[:, :, None].astype(np.float32)
    return pixels


def _draw_mask(thing: SceneObject, rng: np.random.Generator) -> _Array:
    """Return the coverage of each pixel by the shape, 0 to 1: drawn four times as large, then averaged."""
    radius = _RADIUS[thing.size] * (0.92 + 0.16 * rng.random())
    turn = (2 * rng.random() - 1) * math.radians(15)
    shift_x, shift_y = _spread(rng, _JITTER, 2)
    centre = np.array([_CELL_CENTRES[thing.column] + shift_x, _CELL_CENTRES[thing.row] + shift_y])
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])

    def corners(outline: npt.NDArray[np.float64]) -> list[tuple[float, float]]:
        return [(x, y) for x, y in ((outline * radius) @ rotation + centre) * _SUPERSAMPLE]

    mask = Image.new("L", (IMAGE_SIZE * _SUPERSAMPLE,) * 2)
    draw = ImageDraw.Draw(mask)
    draw.polygon(corners(_OUTLINES[thing.shape]), fill=255)
    if thing.shape in _HOLES:
        draw.polygon(corners(_HOLES[thing.shape]), fill=0)
    coverage: _Array = np.asarray(mask.reduce(_SUPERSAMPLE), dtype=np.float32) / np.float32(255)
    return coverage
