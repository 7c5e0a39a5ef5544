"""Which process wrote something, and whether it still lives: for what is left behind by a kill."""

from __future__ import annotations

import hashlib
import os
import socket
from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["ProcessName", "this_process"]


class ProcessName(BaseModel):
    """A process, told apart from a later one that was given the same number."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    machine: str = Field(description="Host name and a digest over boot and process namespace.")
    pid: int = Field(gt=0)
    started: int = Field(description="Clock ticks from boot to its start; 0 where the system does not tell.")

    @property
    def tag(self) -> str:
        """As part of a file's name; :meth:`of_tag` reads it."""
        return f"{self.machine}-{self.pid}-{self.started}"

    @classmethod
    def of_tag(cls, tag: str) -> ProcessName:
        """The process of a :attr:`tag`.

        Raises:
            ValueError: this is none.
        """
        machine, pid, started = tag.rsplit("-", 2)
        return cls(machine=machine, pid=int(pid), started=int(started))

    def alive(self) -> bool | None:
        """Whether it runs now; None when it is of another machine, container or boot, which cannot be asked."""
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
    """The calling process; asked for anew after a fork."""
    return ProcessName(machine=_machine(), pid=os.getpid(), started=_started(os.getpid()))


@cache
def _machine() -> str:
    # a host name alone is shared by containers on the host's network and by a machine before and after a reboot
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
    # a zombie has ended; its parent has only not asked yet
    return -1 if fields[0] == "Z" else int(fields[19])
