"""Packages of pip that a test needs, in a folder of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def install_beside(folder: Path, *packages: str) -> None:
    """Packages without their dependencies, which would change versions of ours: they are there, or also named."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *packages]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{packages[0]} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
