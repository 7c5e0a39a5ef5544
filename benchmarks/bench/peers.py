"""Virtual environments for peers whose pins are at odds with ours.

Each has the peer and what it brings, in the releases that it is happy with, in front of the packages of the
interpreter that made it: torch and the other large ones are there once.

    python -m benchmarks.bench.peers                # make all of them
    python -m benchmarks.bench.peers clipret        # one, and print its interpreter
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER_VARIABLE = "TEACHER_CACHE_PEERS"


@dataclass(frozen=True)
class Peer:
    """What goes into a peer's environment.

    Attributes:
        requirements: installed as they are, without what they ask for: that is listed here as well, or taken
            from the interpreter that makes the environment.
        check: a statement that runs once everything is there.
    """

    requirements: tuple[str, ...]
    check: str


PEERS = {
    # asks for numpy < 2.2
    "mosaic": Peer(
        (
            "mosaicml-streaming==0.13.0",
            "numpy==2.1.3",
            "Brotli",
            "python-snappy<1",
            "cramjam",
            "xxhash<4",
            "zstd<2",
            "catalogue<3",
            "transformers<5",
            "tokenizers<0.23",
            "huggingface-hub<1",
        ),
        "import streaming, numpy; assert numpy.__version__ < '2.2'",
    ),
    # asks for numpy < 2, pyarrow < 16 and open_clip < 3, and works with ours
    "clipret": Peer(
        (
            "clip-retrieval==2.45.0",
            "all_clip==1.3.0",
            "clip-anytorch==2.6.0",
            "autofaiss",
            "embedding-reader",
            "img2dataset",
            "sentence-transformers",
            "transformers<6",
            "fire<0.6",
            "termcolor",
            "six",
            "flask<4",
            "flask_restful<1",
            "flask_cors<5",
            "aniso8601",
            "pytz",
            "h5py<4",
            "wandb",
            "prometheus-client",
            "webdataset<0.3",
            "braceexpand",
            "pandas<3",
            "xxhash<4",
            "setuptools<81",  # the last one with pkg_resources
        ),
        "from clip_retrieval.clip_inference.main import main",
    ),
}


def python_of(name: str, folder: Path | None = None) -> Path:
    """The interpreter of a peer's environment, which is made first unless it is there as it should be.

    Args:
        folder: where the environments are; ``$TEACHER_CACHE_PEERS``, or ``.venv-peers`` of the project, if left out.

    Raises:
        KeyError: no such peer.
        subprocess.CalledProcessError: pip could not install it, or it cannot be imported; pip's words are on stderr.
    """
    peer = PEERS[name]
    home = (folder or Path(os.environ.get(FOLDER_VARIABLE, ROOT / ".venv-peers"))) / name
    python, stamp = home / "bin" / "python", home / "installed.txt"
    ours = sysconfig.get_path("purelib")
    made_of = "\n".join([ours, *peer.requirements]) + "\n"
    if stamp.exists() and stamp.read_text() == made_of:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--clear", str(home)], check=True)
    install = ["install", "--quiet", "--disable-pip-version-check", "--no-deps", *peer.requirements]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True, stdout=sys.stderr)
    # behind its own: what both have comes from the peer's
    (Path(_purelib(python)) / "packages_of_the_maker.pth").write_text(f"{ours}\n")
    subprocess.run([str(python), "-c", peer.check], check=True, stdout=sys.stderr)
    stamp.write_text(made_of)
    return python


def _purelib(python: Path) -> str:
    asked = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"of {', '.join(PEERS)}; all if none is named")
    options = parser.parse_args()
    if unknown := sorted(set(options.peers) - set(PEERS)):
        parser.error(f"no peer {', '.join(unknown)}; there are {', '.join(PEERS)}")
    for name in options.peers or PEERS:
        print(python_of(name))


if __name__ == "__main__":
    main()
