"""Errors of caches, grouped by what the reader would do next.

    CacheError
       |- CacheNotFoundError     no cache was ever started at this path
       |- CacheIncompleteError   started, chunks missing; precompute again resumes
       |- CacheMismatchError     sound, but made with another teacher, dataset, preprocessing or layout
       |- CacheFormatError       written by a newer version, or not a cache manifest at all
       |- CacheCorruptError      bytes disagree with their digest; teacher-cache repair mends it
       |- CacheUnreachableError  the store did not answer in all tries; run the same command again
       `- CacheAccessError       the store refuses: credentials, rights, bucket or region have to change

UsageError stands apart: the caller has to change a setting, name or path. MissingPackageError is a UsageError that
names the install command.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlsplit


class CacheError(Exception):
    """Base of all; the command line prints its message as one line and exits 1."""


class CacheNotFoundError(CacheError):
    """No cache was ever started at this path."""


class CacheIncompleteError(CacheError):
    """The cache was started and some chunks are missing."""


class CacheMismatchError(CacheError):
    """The cache is sound, but not the requested one."""


class CacheFormatError(CacheError):
    """The manifest has a newer format, or is not a manifest."""


class CacheCorruptError(CacheError):
    """Bytes disagree with the digest that was recorded when they were written."""


class CacheUnreachableError(CacheError, ConnectionError):
    """The store failed at every try. A later try may succeed, so this is a lost connection."""


class CacheAccessError(CacheError):
    """The store refuses this caller; a retry does not help."""


class UsageError(ValueError):
    """A setting, name or path from the caller cannot be used; the command line exits 2."""


def name_file(error: OSError, path: object) -> None:
    """Add a file's name to an error of the operating system without one, such as ENOSPC. Others say all themselves."""
    if error.errno is not None and not error.filename:
        error.filename = str(path)


# modules of each extra in pyproject.toml
_EXTRAS = {
    "train": "torch torchvision open_clip timm PIL safetensors lightning_fabric tensorboard faiss scipy",
    "flows": "prefect",
    "s3": "obstore",
    "ray": "ray",
    "deploy": "onnx onnxruntime onnxscript tokenizers ftfy matplotlib",
    "report": "altair vl_convert sklearn jinja2 markupsafe",
    "fastjpeg": "simplejpeg",
    "transformers": "transformers sentencepiece",
    "open-clip": "open_clip_train webdataset braceexpand pandas",
}


def install_line(module: str, extra: str | None = None) -> str:
    """Return the command that installs a module into this environment: by its extra, or by its own name."""
    top = module.partition(".")[0]
    extra = extra or next((extra for extra, modules in _EXTRAS.items() if top in modules.split()), None)
    pip = Path(sys.prefix, "bin", "pip")
    command = str(pip) if sys.prefix != sys.base_prefix and pip.exists() else f"{sys.executable} -m pip"
    return f"{command} install {top if extra is None else _project(extra)}"


def _project(extra: str) -> str:
    """Return this project with an extra, as pip takes it: from where it was installed, a checkout or an index."""
    try:
        origin = json.loads(distribution("teacher-cache").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        origin = {}
    path = unquote(urlsplit(origin.get("url", "")).path)
    editable = "-e " if origin.get("dir_info", {}).get("editable") else ""
    return f"{editable}'{path}[{extra}]'" if "dir_info" in origin else f"'teacher-cache[{extra}]'"


class MissingPackageError(UsageError):
    """A package that the job needs is not installed.

    Args:
        module: the package by its import name.
        job: what needs it, as the subject of the message.
    """

    def __init__(self, module: str, job: str = "this command") -> None:
        super().__init__(f"{job} needs {module}, which is not installed: {install_line(module)}")
