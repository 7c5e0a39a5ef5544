"""A small precompute run to be killed, and what must hold of the cache afterwards; locally and on an object store."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.errors import CacheNotFoundError
from teacher_cache.storage.files.location import open_files
from tests.conftest import cache_digest
from tests.kill_switch import Event
from tests.precompute_process import finish, passes_of, start

CHUNKS = 6 + 12  # 24 images and 48 captions by 4
PASSES = 2  # forward passes of a chunk
PASSES_OF = {"image": 12, "text": 24}
IN_FLIGHT = 3  # chunks at a time: two that are written or wait for it, and one with the teacher or behind these
_CUT_OFF_IN_PLANNING = {("missing", "manifest.json"), ("incomplete", "manifest.json")}


class Work:
    """A small dataset and what an unbroken run over it does and leaves.

    Args:
        root: folder or URL below which the caches lie.
        folder: for results, on this machine.
        environment: of the processes.
    """

    def __init__(
        self, photos: Path, teacher: Path, root: str, folder: Path, environment: dict[str, str] | None = None
    ) -> None:
        self.root, self.folder, self.environment = root, folder, environment or {}
        self.config: dict[str, Any] = {
            "dataset": f"flickr:{photos}",
            "teacher": f"local-dir:{teacher}",
            "device": "cpu",
            "batch_size": 2,
            "chunk_rows": 4,
            "decode_threads": 2,
        }
        self.events: list[Event] = [(kind, key) for kind, key in self.run("whole")["events"]]
        self.digest = cache_digest(self.location("whole"))

    def location(self, name: str) -> str:
        return f"{self.root}/{name}"

    def start(self, name: str, out: Path | None = None, **options: Any) -> Any:
        config = self.config | {"cache": self.location(name)}
        return start(config, out=out or self.folder / f"{name}.json", environment=self.environment, **options)

    def run(self, name: str) -> dict[str, Any]:
        found = finish(self.start(name), self.folder / f"{name}.json")
        assert "error" not in found, found
        return found

    def killed(self, name: str, at: int) -> None:
        """Kill a run at an event. Of the teacher's work, only that on the chunks in flight is lost."""
        out = self.folder / f"{name}.killed"
        process = self.start(name, out=out, kill_at=at)
        process.join(120)
        assert process.exitcode == -9, f"event {at} of {len(self.events)} never came"
        made = passes_of(out).stat().st_size if passes_of(out).exists() else 0
        committed = len(self.commits(name))
        assert PASSES * committed <= made <= PASSES * (committed + IN_FLIGHT), f"{made} passes, {committed} commits"

    def check_killed(self, moment: str, count: int, chosen: Callable[[str, str], bool]) -> None:
        """Kill a run of its own at each of so many seeded events of this kind, and let it go on."""
        places = [number for number, event in enumerate(self.events) if chosen(*event)]
        for number, at in enumerate(random.Random(f"2026 {moment}").sample(places, count)):
            name = f"{moment}-{number}".replace(" ", "-")
            self.killed(name, at)
            self.check_resumed(name)

    def commits(self, name: str) -> dict[str, bytes]:
        files = open_files(self.location(name))
        return {key: files.read(key) for key in files.list("commits")}

    def check_resumed(self, name: str) -> None:
        """What is there after a kill is sound; going on encodes exactly what was not committed."""
        before = self.commits(name)
        try:
            report = verify_cache(self.location(name))
        except CacheNotFoundError:
            assert not before
        else:
            found = {(finding.kind, finding.key) for finding in report.findings}
            # killed between the backup and the first manifest: verify says so, the next run takes the backup
            assert found <= {("incomplete", "manifest.json")} or (not before and found <= _CUT_OFF_IN_PLANNING), found
            assert report.chunks_sound == len(before)
        assert self.run(name)["result"]["chunks_encoded"] == CHUNKS - len(before)
        after = self.commits(name)
        assert {key: after[key] for key in before} == before
        assert cache_digest(self.location(name)) == self.digest
