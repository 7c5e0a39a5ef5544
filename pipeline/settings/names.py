"""Names of teachers, students and devices, checked without importing torch or open_clip."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

from teacher_cache.storage.errors import MissingPackageError, UsageError
from teacher_cache.storage.files.places import described, similar_names
from teacher_cache.storage.observe.safe_text import printable

_PIPELINE = Path(__file__).parents[1]
BUNDLED = {"bundled:scenes": _PIPELINE / "models" / "scenes_teacher"}
CHECKPOINT_CONFIG = "open_clip_config.json"
# one of them exists on a machine with a GPU: NVIDIA's driver, in WSL, on Jetson; AMD's driver
_GPU_FILES = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg", "/dev/nvmap", "/dev/kfd")


def presets() -> dict[str, Path]:
    """Return the shipped student configs by name."""
    # in an installed wheel they are in the package, in a clone at the top
    packaged = _PIPELINE / "configs" / "students"
    folder = packaged if packaged.is_dir() else Path(__file__).resolve().parents[2] / "configs" / "students"
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def open_clip_models() -> list[str]:
    """Return the names of open_clip's own model configs.

    Raises:
        MissingPackageError: open_clip is not installed.
    """
    package = find_spec("open_clip")
    if package is None or package.origin is None:
        raise MissingPackageError("open_clip", "a teacher or student")
    return sorted(path.stem for path in (Path(package.origin).parent / "model_configs").glob("*.json"))


def check_teacher(name: str, pretrained: str | None, models: Callable[[], list[str]] = open_clip_models) -> None:
    """Check the form of a teacher's name, and that open_clip knows it. Tags are checked when it is loaded.

    Args:
        models: returns the names that open_clip knows.

    Raises:
        UsageError: the name is unknown, has no folder, or ``pretrained`` is set for a teacher with its own weights.
    """
    what = f"teacher {printable(name)!r}"
    schema, _, rest = name.partition(":") if ":" in name else ("", "", name)
    if schema not in ("", "hf-hub", "local-dir") and name not in BUNDLED:
        forms = f"an open_clip name, hf-hub:ORG/REPO, local-dir:PATH or {', '.join(BUNDLED)}"
        raise UsageError(f"{what} is not known.{nearest(name, [*BUNDLED])} Write {forms}")
    if schema and pretrained:
        raise UsageError(f"{what} brings its own weights; leave pretrained ({printable(pretrained)!r}) out")
    if schema == "local-dir" and not (Path(rest) / CHECKPOINT_CONFIG).is_file():
        place = described(rest) or f"no {CHECKPOINT_CONFIG} in {printable(rest)}"
        raise UsageError(f"{what}: {place}.{similar_names(rest)} Name the folder of an open_clip model")
    if not schema and rest.replace("/", "-") not in (known := models()):
        hint = nearest(rest, known) or f" There are {', '.join(known[:8])} and others."
        raise UsageError(f"{what}: no open_clip model has this name.{hint}")


def check_student(name: str) -> None:
    """Check that a student is a preset, a model of open_clip or a file.

    Raises:
        UsageError: it is none of these. The message names the most similar ones.
    """
    if name in presets() or (name.endswith(".json") and Path(name).is_file()):
        return
    if name.endswith(".json") or name not in open_clip_models():
        raise unknown_student(name)


def unknown_student(name: str) -> UsageError:
    """Return the error about a student that is no preset, no model of open_clip and no file."""
    shipped = presets()
    what = f"student {printable(name)!r}"
    if name.endswith(".json"):
        return UsageError(f"{what}: no such file.{similar_names(name)} Presets are {', '.join(shipped)}")
    if (Path(name) / CHECKPOINT_CONFIG).is_file():
        return UsageError(f"{what} is a checkpoint: write {Path(name) / CHECKPOINT_CONFIG}")
    hint = nearest(name, [*shipped, *open_clip_models()])
    near = ", ".join(get_close_matches(name, shipped, n=len(shipped), cutoff=0))
    return UsageError(
        f"{what} is not known.{hint} Presets are {near}; or give an open_clip model name, or the path of a model "
        "config ending in .json"
    )


def check_device(name: str) -> None:
    """Check that a machine may have this device, as far as its files tell.

    Raises:
        UsageError: a CUDA device is named on a machine without any.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if name.startswith("cuda") and (hidden or not any(Path(file).exists() for file in _GPU_FILES)):
        raise no_such_device(name, 0)


def no_such_device(name: str, count: int) -> UsageError:
    """Return the error about a CUDA device that this machine does not have."""
    return UsageError(f"device {name!r} asked for, but this machine has {count} CUDA devices; use --device cpu")


def nearest(name: str, known: Sequence[str]) -> str:
    """Return `` Did you mean A, B or C?``, or an empty text if none is similar."""
    lowered = {each.lower(): each for each in reversed(known)}  # of equal names the first
    close = [lowered[each] for each in get_close_matches(name.lower(), lowered, n=3)]
    return f" Did you mean {' or '.join(filter(None, (', '.join(close[:-1]), close[-1])))}?" if close else ""
