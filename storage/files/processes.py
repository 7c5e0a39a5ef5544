"""Names of writing processes, which tell whether the owner of a leftover file still runs."""

from __future__ import annotations

import hashlib
import os
import socket
from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field


class ProcessName(BaseModel):
    """A process, distinct from a later one with the same process id."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    machine: str = Field(description="Host name, and a digest of boot and process namespace.")
    pid: int = Field(gt=0, description="Process id.")
    started: int = Field(description="Start in clock ticks since boot; 0 where the system does not report it.")

    @property
    def tag(self) -> str:
        """Text for a file name; :meth:`of_tag` reads it."""
        return f"{self.machine}-{self.pid}-{self.started}"

    @property
    def shown(self) -> str:
        """The process in words: process 4711 on this machine."""
        host = "this machine" if self.machine == _machine() else self.machine.rpartition("-")[0]
        return f"process {self.pid} on {host}"

    @classmethod
    def of_tag(cls, tag: str) -> ProcessName:
        """Read a :attr:`tag`.

        Raises:
            ValueError: the text is no tag.
        """
        machine, pid, started = tag.rsplit("-", 2)
        return cls(machine=machine, pid=int(pid), started=int(started))

    def alive(self) -> bool | None:
        """Return whether the process runs; None if it belongs to another machine, container or boot."""
        if self.machine != _machine():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # it runs, as another user
        return _started(self.pid) == self.started


def this_process() -> ProcessName:
    """Return the name of the calling process."""
    return ProcessName(machine=_machine(), pid=os.getpid(), started=_started(os.getpid()))


@cache
def _machine() -> str:
    # not the host name alone: containers on the host's network share it, and it stays the same after a reboot
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    except OSError:
        pass  # not Linux
    return f"{parts[0]}-{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:8]}"


def _started(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    # the second field is the program's name in brackets and may hold anything, brackets and blanks too
    fields = stat.rpartition(")")[2].split()
    # a zombie has ended, but its parent has not collected it
    return -1 if fields[0] == "Z" else int(fields[19])
