"""``train`` in processes of its own, killed at a chosen event; started in milliseconds by the fork server."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.precompute_process import FORK_SERVER, KillSwitch


def start(config: dict[str, Any], *, out: Path, resume: bool = False, kill_at: int | None = None) -> Any:
    """Begin ``train`` in another process.

    Args:
        config: of TrainConfig.
        out: a file that gets {"error", "events"} as JSON when it ends by itself.
        kill_at: number of the event, from 0, at which it sends itself SIGKILL.
    """
    process = FORK_SERVER.Process(target=_run, args=(config, out, resume, kill_at))
    process.start()
    return process


def _run(config: dict[str, Any], out: Path, resume: bool, kill_at: int | None) -> None:
    happens = KillSwitch(kill_at)
    _watch(Path(config["out"]).resolve(), happens)
    from teacher_cache.pipeline.settings.train import TrainConfig
    from teacher_cache.pipeline.train.loop import train

    error = None
    try:
        train(TrainConfig(**config), lambda at: happens("step", str(at.step)), resume=resume)
    except BaseException as raised:
        error = f"{type(raised).__name__}: {raised}"
    out.write_text(json.dumps({"error": error, "events": happens.events}))
    os._exit(0)  # no clean-up of what the fork server's process owns


def _watch(root: Path, happens: Callable[..., None]) -> None:
    import teacher_cache.pipeline.models.weights

    sync, rmtree, save_file = os.fsync, shutil.rmtree, teacher_cache.pipeline.models.weights.save_file

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.is_relative_to(root):
            key = path.relative_to(root).as_posix()
            if path.name.startswith(".partial-"):  # the record, before it is renamed into place
                happens("half record", key, lambda: os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2))
            happens("sync", key)
        sync(descriptor)

    def remove(path: Any, *args: Any, **how: Any) -> None:
        if Path(path).exists():
            happens("remove", Path(path).name, lambda: rmtree(Path(path) / "resume", ignore_errors=True))
        rmtree(path, *args, **how)

    def save(tensors: Any, path: Any, *args: Any, **how: Any) -> None:
        save_file(tensors, path, *args, **how)
        happens("half tensors", Path(path).name, lambda: os.truncate(path, Path(path).stat().st_size // 2))

    os.fsync, shutil.rmtree = fsync, remove  # type: ignore[assignment]
    teacher_cache.pipeline.models.weights.save_file = save
