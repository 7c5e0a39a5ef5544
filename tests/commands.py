"""``teacher-cache`` in processes of its own: real ones, forked from a server that has imported torch and open_clip.

``tests/pipeline/cli/test_cli.py`` starts Python anew, as a shell does.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.precompute_process import FORK_SERVER


def run_command(
    *words: object, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, in a wide terminal.

    Args:
        env: added to this process's variables.
    """
    arguments = [str(word) for word in words]
    environment = {**os.environ, "COLUMNS": "300", **(env or {})}
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        process = FORK_SERVER.Process(target=_main, args=(arguments, environment, cwd or Path.cwd(), outputs))
        process.start()
        process.join()
        assert process.exitcode is not None
        return subprocess.CompletedProcess(arguments, process.exitcode, *(path.read_text() for path in outputs))


def _main(arguments: Sequence[str], environment: dict[str, str], cwd: Path, outputs: Sequence[Path]) -> None:
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["teacher-cache", *arguments]
    logging.root.handlers.clear()  # open_clip, which a command imports later, has added one
    from teacher_cache.pipeline.cli.app import main

    main()
