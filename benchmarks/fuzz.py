"""Coverage-guided fuzzing of everything that reads bytes of strangers, with the targets of ``tests/fuzz_targets.py``.

Atheris is no dependency: give it a throw-away environment that sees the project's packages, then one target a run:

    python -m venv /tmp/fuzz && /tmp/fuzz/bin/pip install --no-deps atheris
    echo "$PWD/.venv/lib/python3.11/site-packages" > /tmp/fuzz/lib/python3.11/site-packages/project.pth
    PYTHONPATH=. nice -n 15 /tmp/fuzz/bin/python benchmarks/fuzz.py webdataset /tmp/fuzz-corpus -max_total_time=60

What follows the corpus folder goes to libFuzzer. A crash leaves ``crash-...`` in the working directory; give that file
in place of the corpus to see it again. ``benchmarks/fuzz.md`` says what was run and found.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

# our own code and the pure-Python readers below it; numpy, torch and pyarrow are compiled
with atheris.instrument_imports(include=["teacher_cache", "tarfile", "csv", "json", "PIL", "tomllib"]):
    from tests.fuzz_targets import TARGETS


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: fuzz.py TARGET CORPUS [libFuzzer's options]; targets: {', '.join(TARGETS)}")
    target, corpus = TARGETS[sys.argv[1]], Path(sys.argv[2])
    if not corpus.is_file():
        corpus.mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(target.seeds()):
            (corpus / f"seed-{number}").write_bytes(seed)
    with tempfile.TemporaryDirectory() as scratch:

        def one_input(data: bytes) -> None:
            target.run(data, Path(scratch))

        atheris.Setup([sys.argv[0], *sys.argv[2:]], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
