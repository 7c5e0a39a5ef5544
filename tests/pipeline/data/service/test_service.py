"""The decode service: what is prepared does not depend on who prepares it, or on who dies meanwhile."""

from __future__ import annotations

import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from multiprocessing.connection import Connection
from multiprocessing.spawn import get_preparation_data
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from teacher_cache.pipeline.data.service.service import DecodeProcesses, DecodeService, DecodeThreads
from teacher_cache.pipeline.data.service.slots import Slot, Slots
from teacher_cache.pipeline.data.service.worker import _hidden_main
from tests.container_files import PROJECT
from tests.pipeline.data.service.service_work import ROW, CannotStart, Item, Write

ROWS = 64
NONE = Slot(0, 0)


@pytest.fixture
def slots() -> Iterator[Slots]:
    with closing(Slots()) as made:
        yield made


def prepare_all(service: DecodeService, slots: Slots, tickets: int, does: str = "") -> None:
    """Prepare tickets of a slot each, and check every byte and result."""
    jobs = []
    for ticket in range(tickets):
        slot = slots.take(ROWS * ROW)
        numbers = range(ticket * ROWS, (ticket + 1) * ROWS)
        jobs.append(
            (slot, numbers, service.submit([Item(number, slot, at, does) for at, number in enumerate(numbers)]))
        )
    for slot, numbers, job in jobs:
        assert job.result(60) == [number**2 for number in numbers]
        rows = slots.array(slot, (ROWS, ROW))
        np.testing.assert_array_equal(rows, np.repeat(np.array(numbers)[:, None] % 251, ROW, axis=1))
        slots.give_back(slot)


@pytest.mark.parametrize("processes", [0, 1, 3])
def test_every_item_is_prepared_in_its_place(tmp_path: Path, slots: Slots, processes: int) -> None:
    write = Write(tmp_path / "log")
    service: DecodeService = DecodeProcesses(write, slots, processes) if processes else DecodeThreads(write, slots, 2)
    with service:
        prepare_all(service, slots, tickets=20)
        prepare_all(service, slots, tickets=20)  # in slots that were given back
        assert slots.take(ROWS * ROW).start == 0


@pytest.mark.usefixtures("own_fork_server")
def test_a_worker_imports_no_torch_and_keeps_the_memory_of_images(tmp_path: Path, slots: Slots) -> None:
    """Pillow maps and unmaps each image's memory else: a third of the time of small ones."""
    with DecodeProcesses(Write(tmp_path / "log"), slots, 1) as service:
        assert service.submit([Item(0, NONE, 0, "modules")]).result(60) == [[]]
        assert service.submit([Item(0, NONE, 0, "blocks")]).result(60) == [8]


def test_a_ticket_takes_two_messages(tmp_path: Path, slots: Slots, monkeypatch: pytest.MonkeyPatch) -> None:
    """One there and one back: a sixteenth of a message an image at most."""
    with DecodeProcesses(Write(tmp_path / "log"), slots, 2) as service:
        messages: Counter[str] = Counter()

        def counted(name: str) -> None:
            move = getattr(Connection, name)

            def moving(self: Connection, *what: Any) -> Any:
                messages[name] += 1
                return move(self, *what)

            monkeypatch.setattr(Connection, name, moving)

        counted("send_bytes")
        counted("recv_bytes")
        prepare_all(service, slots, tickets=4)
        assert messages == {"send_bytes": 4, "recv_bytes": 4}
        assert messages.total() <= 4 * ROWS / 16


@pytest.mark.parametrize("seed", range(3))
def test_killed_workers_are_replaced_and_nothing_is_lost(tmp_path: Path, slots: Slots, seed: int) -> None:
    """SIGKILL at random moments."""
    pick = random.Random(seed)
    with DecodeProcesses(Write(tmp_path / "log"), slots, 2) as service:
        first, over = set(service.pids), threading.Event()

        def kill() -> None:
            for _ in range(3):
                if over.wait(0.05 + pick.random() * 0.2):
                    return
                with suppress(ProcessLookupError):  # it is being replaced
                    os.kill(pick.choice([pid for pid in service.pids if pid]), signal.SIGKILL)

        with ExitStack() as ended:
            killer = threading.Thread(target=kill)
            ended.callback(killer.join)
            ended.callback(over.set)
            killer.start()
            prepare_all(service, slots, tickets=16, does="sleep")
        assert set(service.pids) != first


def test_workers_that_died_idle_are_replaced_and_nothing_is_blamed(tmp_path: Path, slots: Slots) -> None:
    """As when a signal reaches the whole group: the first ticket then meets one dead worker after another."""
    with DecodeProcesses(Write(tmp_path / "log"), slots, 3) as service:
        for pid in service.pids:
            os.kill(pid or 0, signal.SIGTERM)
        while any(is_alive(pid or 0) for pid in service.pids):
            time.sleep(0.01)
        slot = slots.take(ROW)
        assert service.submit([Item(7, slot, 0)]).result(60) == [49]
        prepare_all(service, slots, tickets=6)


def test_a_ticket_whose_worker_died_ends_when_all_its_items_have_ended(tmp_path: Path, slots: Slots) -> None:
    """Not at the first error: who gets it may use the slot for something else."""
    with DecodeProcesses(Write(tmp_path / "log"), slots, 1) as service:
        slot = slots.take(ROWS * ROW)
        slots.array(slot, (ROWS, ROW))[:] = 255
        does = {0: "poison once", 1: "raise"}
        items = [Item(number, slot, number, does.get(number, "sleep")) for number in range(ROWS)]
        with pytest.raises(FileNotFoundError):
            service.submit(items).result(60)
        assert slots.array(slot, (ROWS, ROW))[2:].max() < 251


def test_an_image_that_kills_twice_ends_by_name_and_its_neighbours_do_not(tmp_path: Path, slots: Slots) -> None:
    log = tmp_path / "log"
    with DecodeProcesses(Write(log), slots, 2) as service:
        slot = slots.take(ROWS * ROW)
        items = [Item(number, slot, number, "poison" if number == 5 else "") for number in range(ROWS)]
        with pytest.raises(OSError, match=r"^number 5: two processes ended .* killed by SIGSEGV"):
            service.submit(items).result(60)
        prepare_all(service, slots, tickets=4)
    assert log.read_text() == "5\n" * 3  # once among others, twice alone


def test_an_image_that_hangs_ends_by_name(tmp_path: Path, slots: Slots, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teacher_cache.pipeline.data.service.worker._MOST_SECONDS", 0.5)
    with DecodeProcesses(Write(tmp_path / "log"), slots, 2) as service:
        slot = slots.take(ROWS * ROW)
        items = [Item(number, slot, number, "hang" if number == 5 else "") for number in range(8)]
        with pytest.raises(OSError, match=r"^number 5: two processes ended .* killed after 0.5 s without a result"):
            service.submit(items).result(60)


def test_a_worker_that_starts_hides_no_name_of_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "of_the_script", object(), raising=False)
    with _hidden_main():
        hidden = sys.modules["__main__"]
        assert hidden.of_the_script is main.of_the_script  # type: ignore[attr-defined]
        assert not {"init_main_from_name", "init_main_from_path"} & get_preparation_data("decode").keys()
    assert sys.modules["__main__"] is main


def test_an_image_that_kills_once_is_prepared_by_the_next_worker(tmp_path: Path, slots: Slots) -> None:
    with DecodeProcesses(Write(tmp_path / "log"), slots, 1) as service:
        slot = slots.take(ROWS * ROW)
        items = [Item(number, slot, number, "poison once" * (number == 5)) for number in range(ROWS)]
        assert service.submit(items).result(60) == [number**2 for number in range(ROWS)]


@pytest.mark.parametrize("processes", [0, 1])
def test_an_error_keeps_its_class_and_ends_its_ticket_alone(tmp_path: Path, slots: Slots, processes: int) -> None:
    write = Write(tmp_path / "log")
    service: DecodeService = DecodeProcesses(write, slots, processes) if processes else DecodeThreads(write, slots, 2)
    with service:
        failed = service.submit([Item(7, NONE, 0, "raise")])
        with pytest.raises(FileNotFoundError, match=r"no such picture: '7'"):
            failed.result(60)
        prepare_all(service, slots, tickets=2)


def test_items_that_cannot_be_sent_end_their_ticket_alone(tmp_path: Path, slots: Slots) -> None:
    with DecodeProcesses(Write(tmp_path / "log"), slots, 1) as service:
        with pytest.raises(TypeError, match="pickle"):
            service.submit([threading.Lock()]).result(60)
        prepare_all(service, slots, tickets=2)


def test_a_worker_that_cannot_start_is_told_at_once(tmp_path: Path, slots: Slots) -> None:
    with pytest.raises(OSError, match="a decoding process ended at its start, exit code 1"):
        DecodeProcesses(CannotStart(tmp_path / "log"), slots, 2)


@pytest.mark.parametrize("sent", [b"", pickle.dumps(list(range(1000)))[:100]], ids=["nothing", "half"])
def test_a_worker_whose_parent_stopped_at_its_start_shows_no_traceback(sent: bytes) -> None:
    script = f"""
import os
from multiprocessing import connection, forkserver
from teacher_cache.pipeline.data.service.fork_server import start_fork_server
start_fork_server()
ended, start = forkserver.connect_to_new_process([])
os.write(start, {sent!r})
os.close(start)
connection.wait([ended])
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stderr == ""


def test_closing_ends_workers_and_waiting_tickets(tmp_path: Path, slots: Slots) -> None:
    service = DecodeProcesses(Write(tmp_path / "log"), slots, 2)
    pids = [pid for pid in service.pids if pid]
    slot = slots.take(ROW)
    jobs = [service.submit([Item(number, slot, 0, "sleep") for number in range(500)]) for _ in range(10)]
    service.close()
    assert all(job.done() for job in jobs)
    assert not [pid for pid in pids if is_alive(pid)]
    with pytest.raises(ValueError, match="is closed"):
        service.submit([])


def test_workers_and_memory_go_with_a_killed_parent() -> None:
    command = [sys.executable, "-c", "from tests.pipeline.data.service.service_work import main; main()"]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len([pid for pid in pids if is_alive(pid)]) == 2
        parent.kill()
    until = time.monotonic() + 30
    while (left := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < until:
        time.sleep(0.05)
    assert not left  # the slots have no name: they went with the last process


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
