"""Packages of npm that a test needs, in a folder of their own."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def npm_install(folder: Path, package: str) -> Path:
    """Install a package and return ``node_modules``. The test is skipped if npm is missing or cannot get it."""
    if shutil.which("npm") is None:
        pytest.skip("no npm on the PATH: apt-get install npm")
    folder.mkdir(exist_ok=True)
    # install scripts download what the packages' own CPU parts do not need
    command = ["npm", "install", "--silent", "--ignore-scripts", package]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"npm cannot install {package} here: {done.stderr[-200:]}")
    return folder / "node_modules"
