"""A soak: the whole loop again and again under faults drawn from a seed, with everything checked after each turn.

    python -m benchmarks.soak --minutes 60 --seed 1

A turn adds pictures to a dataset and runs one of these, each command as a process of its own:

    retrain        students retrain (encode what is new, train, compare, ship, promote), then infer with the champion
    retrain on S3  the same with its caches on a store, without shipping
    parts          precompute of two parts, then of all in one cache that reuses them and the last one
    index          index of the newest cache of all parts, then search

Faults hit a command at a random moment. Then the same command runs again, as a user would give it, until it ends well.
It works in a mount and process namespace of its own (unshare, util-linux): a small disk and /dev/shm of its own, and
whatever lives there is ours. ``benchmarks/soak.md`` says what was run and found.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from PIL import Image, ImageDraw

from teacher_cache.pipeline.promote.registry import StudentRegistry
from teacher_cache.storage.check.garbage import collect_garbage
from teacher_cache.storage.check.verify import verify_cache
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.format.manifest_file import read_manifest
from tests.fault_proxy import Fault, FaultProxy, refusal, start_fault_proxy
from tests.object_store import start_moto

STUDENT = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
RUN_FILE = """[retrain]
dataset = "{dataset}"
teacher = "bundled:scenes"
home = "{home}"
student = "{student}"
margin = 99.0
device = "cpu"
{rest}
[retrain.train]
epochs = 2
batch_size = 8
workers = 1
[retrain.precompute]
batch_size = 4
chunk_rows = 8
decode_processes = 2
[retrain.deploy]
int8 = false
rounds = 1
threads = 1
"""
KILLS = ("kill the command", "kill a child", "kill all")
SIGNALS = ("SIGTERM", "Ctrl-C")
DISK = ("disk full", "file too large")
STORE = ("store away", "bad network")
COMMON = (*KILLS, *SIGNALS, *DISK)
# what a command that a fault ended has to say
SAYS = {
    "SIGTERM": "stopped",
    "Ctrl-C": "stopped",
    "disk full": "No space left|disk is full",
    "file too large": "File too large",
    "store away": "tries failed",
}
BAD_NETWORK = [Fault(kind) for kind in ("refuse", "drop", "lose", "cut")]
DISK_BYTES, GRACE_SECONDS, MOST_SECONDS = 8 << 30, 20, 300


class Pictures:
    """A growing table of tiny pictures with two captions each; now and then one goes, or gets another caption."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng, self.captions, self.count = folder, rng, dict[str, list[str]](), 0
        folder.mkdir()
        self.grow(40)

    @property
    def dataset(self) -> str:
        return f"table:{self.folder}/pairs.csv?holdout=20%"

    def grow(self, count: int) -> None:
        for _ in range(count):
            self._draw(f"{self.count:05}.png")
            self.count += 1
        if self.rng.random() < 0.3:
            self.captions.pop(self.rng.choice(list(self.captions)))
        if self.rng.random() < 0.3:
            self.captions[self.rng.choice(list(self.captions))][0] = f"changed {self.count}"
        with (self.folder / "pairs.csv").open("w", newline="") as file:
            rows = [(name, text) for name, texts in self.captions.items() for text in texts]
            csv.writer(file).writerows([("path", "caption"), *rows])

    def _draw(self, name: str) -> None:
        color, shape = self.rng.choice(["red", "green", "blue", "yellow"]), self.rng.choice(["circle", "square"])
        x, y = self.rng.randrange(18), self.rng.randrange(18)
        image = Image.new("RGB", (32, 32), "white")
        draw = ImageDraw.Draw(image)
        (draw.ellipse if shape == "circle" else draw.rectangle)((x, y, x + 12, y + 12), fill=color)
        image.save(self.folder / name)
        self.captions[name] = [f"a {color} {shape} at {x} and {y}", f"one {color} {shape}"]


def living(parents: dict[int, int] | None = None) -> dict[int, str]:
    """Command line by number of each process of this namespace that is no zombie; fills ``parents`` too."""
    lines = {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            pid, stat = int(folder.name), (folder / "stat").read_text().rpartition(")")[2].split()
            if stat[0] != "Z":
                lines[pid] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if parents is not None:
                    parents[pid] = int(stat[1])
    return lines


def descendants(pid: int) -> list[int]:
    parents = dict[int, int]()
    living(parents)
    family = {pid}
    for _ in parents:
        family |= {child for child, parent in parents.items() if parent in family}
    return sorted(family - {pid})


def memory(pid: int) -> tuple[int, int]:
    """Resident MB and open files."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() >> 20, len(list(Path(f"/proc/{pid}/fd").iterdir()))


def digest(location: str) -> str:
    """Digest of every file below a folder or URL, but for claims, which say who works."""
    files, total = open_files(location), hashlib.sha256()
    for key in sorted(files.list()):
        if not key.startswith("claims/"):
            total.update(key.encode() + b"\0" + hashlib.sha256(files.read(key)).digest())
    return total.hexdigest()


def without_numbers(line: str) -> str:
    return re.sub(r"\d[\d,.]*", "N", re.sub(r"'?(s3:/)?/[\w./~:-]+'?", "PATH", line))[:160]


@dataclass
class Result:
    """What the table at the end shows."""

    turns: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    commands: int = 0
    repeated: int = 0
    too_late: int = 0
    cleaned: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    memory: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: {"search --serve": [], "this process": []})

    def fail(self, what: str) -> None:
        self.failed.append(what)
        print(f"  FAILED: {what}", flush=True)

    def check_memory(self) -> list[str]:
        """A line a process: means of the first and the last third, without the first turn, which imports and fills."""
        lines = []
        for name, values in self.memory.items():
            third = max(1, len(values[1:]) // 3)
            first, last = values[1:][:third] or values, values[-third:]
            (mb, fds), (mb_last, fds_last) = (
                tuple(mean(each) for each in zip(*part, strict=True)) for part in (first, last)
            )
            lines.append(f"{name}: {mb:.0f} MB and {fds:.1f} files -> {mb_last:.0f} MB and {fds_last:.1f} files")
            if mb_last > 1.15 * mb + 10 or fds_last > fds + 2:
                self.fail(f"memory or files grow: {lines[-1]}")
        return lines

    def print(self) -> None:
        lines = self.check_memory()
        titles = ("turns", "faults", "left by killed processes, cleared", "said when it ended early")
        counted = (self.turns, self.faults, self.cleaned, self.refusals)
        for title, counts in zip(titles, counted, strict=True):
            print(f"\n{title}: {counts.total()}")
            for name, count in counts.most_common():
                print(f"{count:6}  {name}")
        print(f"\ncommands: {self.commands}, of which given again: {self.repeated}; faults too late: {self.too_late}")
        print("first third -> last third\n  " + "\n  ".join(lines))
        print(f"checks that failed: {len(self.failed)}", *self.failed, sep="\n  ")


class Soak:
    """The loop, its faults and its checks, below one work folder."""

    def __init__(self, work: Path, rng: random.Random, proxy: FaultProxy) -> None:
        self.work, self.rng, self.proxy, self.result = work, rng, proxy, Result()
        self.disk, self.tmp = work / "disk", work / "tmp"
        self.pictures = Pictures(work / "pictures", rng)
        (work / "student.json").write_text(json.dumps(STUDENT))
        for name, rest in (("home", ""), ("home-s3", 'ship = false\ncaches = "s3://caches/home"')):
            home, student = self.disk / name, work / "student.json"
            text = RUN_FILE.format(dataset=self.pictures.dataset, home=home, student=student, rest=rest)
            (work / f"{name}.toml").write_text(text)
        self.environment = {**os.environ, **proxy.front().environment, "TMPDIR": str(self.tmp)}
        self.environment |= {"OMP_NUM_THREADS": "1", "PREFECT_HOME": str(work / "prefect"), "COLUMNS": "300"}
        self.sealed, self.usual = dict[str, str](), dict[str, float]()
        self.whole, self.number, self.killed = "", 0, False
        self.known: set[int] = set()

    # one command

    def start(self, words: list[str], **environment: str) -> tuple[subprocess.Popen[bytes], Path]:
        log, environment = self.work / "log", self.environment | environment
        with (log.with_suffix(".out")).open("wb") as out, (log.with_suffix(".err")).open("wb") as err:
            command = [str(Path(sys.executable).with_name("teacher-cache")), *words]
            return subprocess.Popen(
                command, stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
            ), log

    def run(self, words: list[str], fault: str | None = None) -> tuple[int, str]:
        """Run it to its end, with a fault at a random moment. Exit code and stdout."""
        name = " ".join(words[:2]) if words[0] == "students" else words[0]
        began = time.monotonic()
        process, log = self.start(words)
        self.result.commands += 1
        hit = fault is not None and self._hit(process, fault, self.usual.get(name, 15.0))
        try:
            code = process.wait(MOST_SECONDS)
        except subprocess.TimeoutExpired:
            self.result.fail(f"{name} after {fault}: no end in {MOST_SECONDS} s")
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        self._end_fault()
        out, err = (log.with_suffix(suffix).read_text(errors="replace") for suffix in (".out", ".err"))
        if fault is None and code == 0:
            self.usual[name] = time.monotonic() - began
        self._judge(name, fault if hit else None, code, err)
        self._check_processes(name, fault)
        self._clear_tmp(strict=fault not in KILLS)
        return code, out

    def _hit(self, process: subprocess.Popen[bytes], fault: str, usual: float) -> bool:
        """Do it at a random moment of the command's usual time; false if the command had ended by then."""
        until = time.monotonic() + self.rng.uniform(0.2, usual)
        if fault == "bad network":
            self.proxy.seeded(self.rng.randrange(1 << 30), 0.1, BAD_NETWORK, most_in_a_row=3)
            self.result.faults[fault] += 1
            return True
        while time.monotonic() < until or (fault == "kill a child" and not descendants(process.pid)):
            if process.poll() is not None:
                self.result.too_late += 1
                return False
            time.sleep(0.02)
        self.result.faults[fault] += 1
        with contextlib.suppress(ProcessLookupError):
            self._do(process, fault)
        return True

    def _do(self, process: subprocess.Popen[bytes], fault: str) -> None:
        family = descendants(process.pid)
        self.killed |= fault in KILLS
        if fault == "kill the command":
            process.kill()
        elif fault == "kill a child" and family:
            os.kill(self.rng.choice(family), signal.SIGKILL)
        elif fault == "kill all":
            for pid in (process.pid, *family):
                os.kill(pid, signal.SIGKILL)
        elif fault == "SIGTERM":
            process.terminate()
        elif fault == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        elif fault == "disk full":
            used = shutil.disk_usage(self.disk).used
            self._resize(used + self.rng.randrange(4 << 10, 512 << 10))
        elif fault == "file too large":
            most = self.rng.randrange(1 << 10, 64 << 10)
            for pid in (process.pid, *family):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, most))
        elif fault == "store away":
            self.proxy.always(refusal(503, "ServiceUnavailable", "away"))

    def _end_fault(self) -> None:
        self.proxy.plan = lambda request: None
        self._resize(DISK_BYTES)

    def _resize(self, size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(self.disk)], check=True)

    def _judge(self, name: str, fault: str | None, code: int, err: str) -> None:
        """No traceback; a command that a fault ended says why."""
        last = (err.strip().splitlines() or [""])[-1]
        # a signal that comes after the answer, while Python ends, has its usual effect
        late = {"SIGTERM": -signal.SIGTERM, "Ctrl-C": -signal.SIGINT}.get(fault or "", 0)
        if "Traceback" in err or code not in (0, 1, late, -signal.SIGKILL):
            self.result.fail(f"{name} after {fault}: exit code {code} and\n{err[-4000:]}")
        if code == 1:
            self.result.refusals[f"{fault}: {without_numbers(last)}"] += 1
            if fault in SAYS and not re.search(SAYS[fault], err):
                self.result.fail(f"{name} after {fault}: does not say so: {err[-1500:]}")
        if code == -signal.SIGKILL and fault not in ("kill the command", "kill all"):
            self.result.fail(f"{name} after {fault}: it was killed, and not by this")

    def _check_processes(self, name: str, fault: str | None) -> None:
        until = time.monotonic() + GRACE_SECONDS
        while (orphans := living().keys() - self.known) and time.monotonic() < until:
            time.sleep(0.1)
        for pid in orphans:
            self.result.fail(f"{name} after {fault}: orphan {pid} {living().get(pid)}")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in (int(each.name) for each in Path("/proc").iterdir() if each.name.isdigit()):
            if pid not in self.known:
                with contextlib.suppress(ChildProcessError):  # a zombie of a killed parent: it is ours to bury
                    os.waitpid(pid, os.WNOHANG)

    def insist(self, *words: str, faults: tuple[str, ...] = COMMON, makes: str = "") -> str:
        """Run it under some faults, one a run, until it ends well or ``makes`` is there. Its stdout."""
        drawn = [self.rng.choice(faults) for _ in range(self.rng.randrange(3))]
        for fault in (*drawn, None):
            code, out = self.run(list(words), fault)
            print(f"  {' '.join(words[:2])}: {fault}: {code}", flush=True)
            if code == 0 or '"outcome": "rejected"' in out or (makes and Path(makes).exists()):
                return out
            self.result.repeated += 1
        self.result.fail(f"{' '.join(words)}: {code} without a fault: {self.work.joinpath('log.err').read_text()}")
        return out

    def _clear_tmp(self, strict: bool) -> None:
        """What is in TMPDIR and /dev/shm belongs to nobody now; only killed processes may have left it."""
        for path in (*self.tmp.iterdir(), *Path("/dev/shm").iterdir()):
            if path.name.startswith("torchinductor_"):  # torch's cache for all processes of a user, made on import
                continue
            name = f"{path.parent.name}/{re.sub(r'[0-9]+', 'N', path.name)[:24]}"
            if strict:
                self.result.fail(f"{path} is left by a command that nobody killed")
            self.result.cleaned[name] += 1
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    # turns

    def retrain(self) -> None:
        self.insist("students", "retrain", str(self.work / "home.toml"), "--json")
        champion = StudentRegistry(str(self.disk / "home" / "students")).champion()
        if champion is None or champion.deployed is None:
            self.result.fail("no champion after a retraining that ended well")
            return
        picture = str(next(self.pictures.folder.glob("*.png")))
        words = ("--text", "a red circle", "--text", "a blue square", "--student", champion.deployed, "--json")
        answer = self.insist("infer", picture, *words)
        if picture not in answer:
            self.result.fail(f"infer: no answer for {picture}: {answer}")

    def retrain_on_s3(self) -> None:
        words = ("students", "retrain", str(self.work / "home-s3.toml"), "--json")
        self.insist(*words, faults=(*COMMON, *STORE * 4))

    def parts(self) -> None:
        self.number += 1
        folder = self.disk / f"parts-{self.number}"
        common = f"--dataset {self.pictures.dataset} --teacher bundled:scenes --device cpu --batch-size 4".split()
        common += ["--set", "chunk_rows=8", "--set", "decode_processes=2"]
        reuse = ["--reuse", self.whole] if self.whole else []
        for part in (1, 2):
            self.insist("precompute", *common, *reuse, "--part", f"{part}/2", "--cache", f"{folder}/{part}.cache")
        whole = str(self.disk / f"whole-{self.number}.cache")
        self.insist("precompute", *common, "--reuse", f"{folder}/*.cache", "--cache", whole)
        self.whole = whole

    def index(self) -> None:
        self.number += 1
        out = str(self.disk / f"{self.number}.index")
        # a killed one may have ended its work, and the next would refuse the place
        self.insist("index", self.whole, "--within", "99pt", "--out", out, makes=out)
        if "red" not in self.insist("search", out, "a red circle", "--json"):
            self.result.fail("search finds no red circle among the pictures")

    # checks

    def check(self) -> None:
        """Nothing sealed has changed, what is new is sound, and nothing is left over."""
        for location, before in self.sealed.items():
            if digest(location) != before:
                self.result.fail(f"{location} was sealed and has changed")
        for location in self._places():
            if location in self.sealed:
                continue
            if location.endswith(".cache"):
                if not read_manifest(open_files(location)).sealed:
                    continue
                self._check_cache(location)
            self.sealed[location] = digest(location)
        for path in self.disk.rglob(".partial-*"):
            if not self.killed:
                self.result.fail(f"{path} is left, and nothing was killed")
            self.result.cleaned[without_numbers(str(path.relative_to(self.disk)))] += 1
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.killed = False

    def _places(self) -> Iterator[str]:
        """Caches, and what a retraining has promised never to change."""
        with contextlib.suppress(FileNotFoundError):
            store = {key.partition("/")[0] for key in open_files("s3://caches/home").list()}
            yield from (f"s3://caches/home/{name}" for name in sorted(store))
        for pattern in ("*.cache", "*/*.cache", "*/caches/*.cache", "*/deployed/[0-9]*", "*/students/*/*"):
            yield from (str(path) for path in sorted(self.disk.glob(pattern)) if path.is_dir())

    def _check_cache(self, location: str) -> None:
        report = verify_cache(location)
        if not report.ok:
            self.result.fail(f"{location}: {report.findings[0].message}")
        for garbage in collect_garbage(location, delete=True).found:
            if not self.killed or garbage.kind == "unknown-file":
                self.result.fail(f"{location}: {garbage} is left")
            self.result.cleaned[f"cache: {garbage.kind}"] += 1
        if rest := collect_garbage(location).found:
            self.result.fail(f"{location}: repair --leftovers --delete leaves {rest}")

    def ask(self, address: str, server: subprocess.Popen[bytes]) -> None:
        for query in ("", "?q=a+red+circle", "?image=3", "picture?image=3"):
            with urllib.request.urlopen(address + query, timeout=60) as answer:
                if not answer.read():
                    self.result.fail(f"search --serve: empty answer to {query}")
        self.result.memory["search --serve"].append(memory(server.pid))
        self.result.memory["this process"].append(memory(os.getpid()))

    @contextlib.contextmanager
    def serving(self) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
        """``search --serve`` over the first cache, for as long as the soak takes."""
        self.parts()
        index = str(self.disk / "served.index")
        self.run(["index", self.whole, "--within", "99pt", "--out", index])
        server, log = self.start(["search", index, "--serve", "--port", "0"], TMPDIR=str(self.work / "server-tmp"))
        self.known.add(server.pid)
        try:
            while not (at := re.search(r"http://\S+/", log.with_suffix(".out").read_text())):
                assert server.poll() is None, log.with_suffix(".err").read_text()
                time.sleep(0.1)
            (self.work / "log.out").rename(self.work / "server.out")
            self.known |= set(descendants(server.pid))
            yield at[0], server
        finally:
            server.send_signal(signal.SIGINT)
            if server.wait(60):
                self.result.fail(f"search --serve ended with {server.returncode}")

    def go_on(self, seconds: float) -> None:
        self.known |= living().keys()
        until, turns = time.monotonic() + seconds, dict[str, Callable[[], None]]()
        turns = {"retrain": self.retrain, "parts": self.parts, "retrain on S3": self.retrain_on_s3, "index": self.index}
        with self.serving() as (address, server):
            while time.monotonic() < until:
                name = list(turns)[self.result.turns.total() % len(turns)]
                print(f"turn {self.result.turns.total() + 1}: {name}, {self.pictures.count} pictures", flush=True)
                self.pictures.grow(self.rng.randrange(1, 12))
                turns[name]()
                self.check()
                self.ask(address, server)
                self.result.turns[name] += 1


def inside(work: Path, minutes: float, seed: int) -> int:
    """Run it in the new namespaces: this process is the first of them."""
    # a shell that starts it in the background has SIGINT ignored, which its commands would inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("disk", "tmp", "server-tmp"):
        (work / name).mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(work / "disk")], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], check=True)
    with start_moto() as store, start_fault_proxy(store) as proxy:
        os.environ.update(store.environment)
        soak = Soak(work, random.Random(seed), proxy)
        try:
            soak.go_on(minutes * 60)
        except Exception:
            soak.result.fail(f"the soak itself:\n{traceback.format_exc()}")
        soak.result.print()
        return bool(soak.result.failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        return inside(options.inside, options.minutes, options.seed)
    with tempfile.TemporaryDirectory(prefix="soak-") as work:
        own = [] if os.getuid() == 0 else ["--user", "--map-root-user"]
        namespaces = ["unshare", *own, "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        command = [*namespaces, sys.executable, "-m", "benchmarks.soak", *sys.argv[1:], "--inside", work]
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
