"""Writers that stop and go on at any step: all orders of the steps of two or three are tried, on the real code.

The code of a writer runs with files that replay recorded answers; the first one that is not recorded is its next step.
So its state is the list of answers so far, and nothing has to be stopped in the middle. A step is one operation on one
object. A writer may stand still for any time between two steps, may be killed there, and is given up by the others
whenever that can happen: its claim is ``stale`` by a free choice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

from teacher_cache.pipeline.precompute import encode
from teacher_cache.storage.errors import CacheMismatchError
from teacher_cache.storage.files.local import LocalFiles
from teacher_cache.storage.format.commits import ChunkCommit, ChunkRef, all_chunks
from teacher_cache.storage.format.manifest import MANIFEST_KEY, CacheManifest
from teacher_cache.storage.format.tables import CAPTIONS, PROBLEMS, SAMPLES, read_table, table_files
from teacher_cache.storage.write import claims, plan, writer
from teacher_cache.storage.write.plan import plan_cache
from teacher_cache.storage.write.writer import EmbeddingWriter
from tests.conftest import known_arrays, plan_known_cache

REF = ChunkRef("text", 0, 0)
_MOST_STATES = 1_000_000  # some GB
Store = frozenset[tuple[str, bytes]]
TABLES = (SAMPLES, CAPTIONS, PROBLEMS)
FREE = ("claims/", "journal/")  # no part of what the seal stands for


class Step(NamedTuple):
    """An operation on one object, or a question that time decides."""

    verb: str
    key: str = ""
    data: bytes = b""


class _Asked(BaseException):
    """The writer has asked for a step whose answer is not known yet."""


class Replay(LocalFiles):
    """Files of one writer, which answer from a record. All tables but the samples are in place, in a real folder."""

    def __init__(self, folder: Path, answers: tuple[Any, ...]) -> None:
        super().__init__(str(folder))
        self._answers = iter(answers)
        self.asked: Step | None = None

    def step(self, *step: Any) -> Any:
        if self.asked is None:
            for answer in self._answers:
                return answer
            self.asked = Step(*step)
        raise _Asked

    def read(self, key: str) -> bytes:
        if key.startswith(TABLES):
            return super().read(key)
        data: bytes | None = self.step("read", key)
        if data is None:
            raise FileNotFoundError(key)
        return data

    def write(self, key: str, data: bytes) -> None:
        self.step("write", key, data)

    def create(self, key: str, data: bytes) -> bool:
        return key.startswith(TABLES[1:]) or bool(self.step("create", key, data))

    def settle(self, keys: Any) -> None:
        """Nothing to sync."""

    def exists(self, key: str) -> bool:
        return bool(self.step("exists", key))

    def all_keys(self, prefix: str = "") -> list[str]:
        return list(self.step("list", prefix))

    def delete(self, key: str) -> None:
        if "alive" not in key:
            self.step("delete", key)

    def remove_partials(self) -> int:
        return 0


def answer(store: dict[str, bytes], step: Step, fenced: bool) -> Any:
    """Do a step on the objects, as a folder or a store does, and return what the writer gets."""
    verb, key, data = step
    if verb == "read":
        return store.get(key)
    if verb == "exists":
        return key in store
    if verb == "list":
        return tuple(sorted(each for each in store if each.startswith(f"{key}/")))
    if verb == "delete":
        store.pop(key, None)
    elif verb == "create" and key in store and (fenced or key.startswith(FREE)):
        return False
    elif verb in ("create", "write"):
        store[key] = data
    return True


Program = Callable[[int, Replay], None]


class Explorer:
    """All reachable states of some writers that run one program on the same objects.

    Args:
        program: what a writer does, by its number.
        may_end: errors that may end a writer.
        fenced: whether :meth:`CacheFiles.create` keeps an existing object; if not, it replaces it, as once was done.
    """

    def __init__(
        self,
        folder: Path,
        program: Program,
        patch: pytest.MonkeyPatch,
        may_end: tuple[type[Exception], ...] = (),
        fenced: bool = True,
    ) -> None:
        self._folder, self._program, self._patch, self._fenced = folder, program, patch, fenced
        self._may_end = may_end
        self._next = cache(self._run)
        self._proven = cache(_fault_of)
        self.states = 0

    def _run(self, number: int, answers: tuple[Any, ...]) -> Step | Exception | None:
        """Return the next step of a writer; None or an error if it has ended."""
        files = Replay(self._folder, answers)
        self._patch.setattr(claims.secrets, "token_hex", lambda _: f"writer{number}")
        self._patch.setattr(claims.Claims, "_stale", lambda self, key: self._files.step("stale", key))
        for module in (plan.time, encode.time):
            self._patch.setattr(module, "sleep", lambda _: files.step("wait"))
        try:
            self._program(number, files)
        except _Asked:
            return files.asked
        except Exception as error:
            return error
        return None

    def fault(self, objects: dict[str, bytes], writers: int, kills: int, promise: str = "") -> str | None:
        """Return the first broken promise with the steps that lead to it, or None if there is none.

        Args:
            kills: number of writers that may be killed.
            promise: words of the promise in question. Default: any.
        """
        first = (frozenset(objects.items()), ((),) * writers, frozenset[int](), kills)
        seen, stack = {first}, [(first, None)]
        while stack:
            state, path = stack.pop()
            self.states += 1
            for told, after, fault in self._after(*state):
                if fault is not None and promise in fault:
                    return f"{fault}: {_steps((told, path))}"
                if after is not None and after not in seen:
                    assert len(seen) < _MOST_STATES, "too many states to try them all"
                    seen.add(after)
                    stack.append((after, (told, path)))
        return None

    def _after(
        self, objects: Store, answers: tuple[tuple[Any, ...], ...], killed: frozenset[int], kills: int
    ) -> Iterator[tuple[str, Any, str | None]]:
        """Yield each state that may follow, with what happened and the promise that it breaks."""
        steps = {number: self._next(number, each) for number, each in enumerate(answers) if number not in killed}
        for number, ended in steps.items():
            if isinstance(ended, Exception) and not isinstance(ended, self._may_end):
                yield f"{number} ends", None, repr(ended)
        going = {number: step for number, step in steps.items() if isinstance(step, Step)}
        if not going and None in steps.values() and not _sealed(dict(objects).get(MANIFEST_KEY, b"")):
            yield "all end", None, "nobody has sealed"
        active = {number for number, step in going.items() if step.verb != "wait"}
        for number, step in going.items():
            if step.verb == "wait" and active:  # who waits goes on when nobody else does
                continue
            if kills:
                yield f"{number} is killed", (objects, answers, killed | {number}, kills - 1), None
            choices = [True, False] if step.verb == "stale" and active - {number} else [True]
            for choice in choices:
                store = dict(objects)
                given = choice if step.verb == "stale" else answer(store, step, self._fenced)
                told = f"{number} {step.verb} {step.key} -> {given if isinstance(given, bool) else '...'}"
                after = (frozenset(store.items()), _with(answers, number, given), killed, kills)
                fault = None if after[0] == objects else self._proven(objects, after[0])
                yield told, after, fault


def _with(answers: tuple[tuple[Any, ...], ...], number: int, given: Any) -> tuple[tuple[Any, ...], ...]:
    assert len(answers[number]) < 120, "a writer never ends"
    return (*answers[:number], (*answers[number], given), *answers[number + 1 :])


def _steps(path: Any) -> str:
    steps = []
    while path is not None:
        told, path = path
        steps.append(told)
    return "; ".join(reversed(steps))


@cache
def _sealed(data: bytes) -> CacheManifest | None:
    manifest = CacheManifest.from_bytes(data, "here", MANIFEST_KEY) if data else None
    return manifest if manifest is not None and manifest.sealed else None


def _fault_of(before: Store, after: Store) -> str | None:
    """Return the promise that a change of the objects breaks."""
    old, new = dict(before), dict(after)
    manifest = _sealed(new.get(MANIFEST_KEY, b""))
    if _sealed(old.get(MANIFEST_KEY, b"")):
        changed = sorted({key for key, _ in before ^ after if not key.startswith(FREE)})
        if changed:
            return f"a sealed cache changed: {changed}"
    for key, data in old.items():
        if key.startswith("commits/") and new.get(key) != data:
            return f"{key} was committed, and is lost or changed"
    for key, data in new.items():
        if key.startswith("commits/"):
            commit = ChunkCommit.from_bytes(data, key)
            for name, place in commit.ref.object_keys().items():
                if hashlib.sha256(new.get(place, b"")).hexdigest() != commit.objects[name].sha256:
                    return f"{place} is not what {key} says"
    if manifest is not None:
        missing = [ref.name for ref in all_chunks(manifest.layout) if ref.commit_key not in new]
        wrong = [
            key for key, of in manifest.files.items() if hashlib.sha256(new.get(key, b"")).hexdigest() != of.sha256
        ]
        if missing or wrong:
            return f"sealed without {missing + wrong}"
    return None


class Home(NamedTuple):
    """A planned cache of four images and four captions, with the images committed."""

    folder: Path
    manifest: CacheManifest
    objects: dict[str, bytes]


def rows_by(number: int, of: EmbeddingWriter, ref: ChunkRef) -> dict[str, np.ndarray[Any, Any]]:
    """The rows of a chunk as one of several machines rounds them."""
    arrays = known_arrays(of, ref)
    return arrays | {"embedding": np.roll(arrays["embedding"], number, axis=1), "norm": arrays["norm"] + number}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    folder = tmp_path / "c"
    manifest = plan_known_cache(folder, images=4, captions=4)
    first = EmbeddingWriter(str(folder))
    first.write(ChunkRef("image", 0, 0), known_arrays(first, ChunkRef("image", 0, 0)))
    rows = {ref: first.rows_sha256(ref) for ref in all_chunks(manifest.layout)}
    monkeypatch.setattr(EmbeddingWriter, "rows_sha256", lambda self, ref: rows[ref])
    monkeypatch.setattr(claims.Claims, "_write_beat", lambda self, number: None)
    beating = SimpleNamespace(ident=None, start=lambda: None)
    monkeypatch.setattr(claims.threading, "Thread", lambda **what: beating)
    monkeypatch.setattr(encode, "hint", lambda line: None)
    return Home(folder, manifest, {key: first.files.read(key) for key in first.files.list()})


@pytest.fixture
def encoding(home: Home, monkeypatch: pytest.MonkeyPatch) -> Program:
    """A writer that finds a planned cache, encodes the captions together with others, and seals."""

    class Encoder:
        def __init__(self, config: Any, teacher: Any, of: EmbeddingWriter, *rest: Any) -> None:
            self._number, self._writer = config.number, of

        def encode(self, stretches: Any) -> None:
            for stretch in stretches:
                for ref in stretch:
                    self._writer.write(ref, rows_by(self._number, self._writer, ref))

    monkeypatch.setattr(encode, "_Encoder", Encoder)

    def run(number: int, files: Replay) -> None:
        monkeypatch.setattr(writer, "open_files", lambda _: files)
        config: Any = SimpleNamespace(cache="c", reuse=None, number=number)
        teacher: Any = SimpleNamespace(require=lambda *what: None)
        encode.encode_claimed(config, teacher, [REF], writer=EmbeddingWriter("c", home.manifest))
        EmbeddingWriter("c").seal()

    return run


@pytest.fixture(params=[0, 1], ids=["alike", "apart"])
def planning(home: Home, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Program:
    """A writer that plans a cache and seals it. The manifests of two writers differ, and if apart, their metadata."""
    files = LocalFiles(str(home.folder))
    tables = {name: read_table(files, home.manifest, name) for name in TABLES}
    made = {name: table_files(name, table) for name, table in tables.items()}
    monkeypatch.setattr(plan, "table_files", lambda name, table: made[name])
    monkeypatch.setattr(plan, "read_table", lambda files, manifest, name: tables[name])
    monkeypatch.setattr(plan, "require_place", lambda files: None)
    monkeypatch.setattr(writer, "clear_claims", lambda files: None)  # fewer steps: the other test has them
    monkeypatch.setattr(plan, "zarr_metadata", lambda layout: {"targets.zarr/zarr.json": b"%d" % layout.batch_rows})

    def run(number: int, files: Replay) -> None:
        for module in (plan, writer):
            monkeypatch.setattr(module, "open_files", lambda _: files)
        layout = home.manifest.layout.model_copy(update={"batch_rows": 1 + number * request.param})
        plan_cache("c", home.manifest.identity, layout, home.manifest.source, tables, {"torch": str(number)})
        EmbeddingWriter("c").seal()

    return run


def chunk_by(number: int, home: Home) -> dict[str, bytes]:
    """The objects and the commit record of the captions as one writer makes them."""
    folder = home.folder.parent / f"by-{number}"
    plan_known_cache(folder, images=4, captions=4)
    by = EmbeddingWriter(str(folder))
    by.write(REF, rows_by(number, by, REF))
    return {key: by.files.read(key) for key in (*REF.object_keys().values(), REF.commit_key)}


@pytest.mark.parametrize("left", [False, True], ids=["nothing", "half a chunk"])
def test_in_every_order_of_steps_it_is_sealed_and_never_changes(
    home: Home, encoding: Program, monkeypatch: pytest.MonkeyPatch, left: bool
) -> None:
    """Also where an ended process, which rounded in its own way, has left one of the two objects of a chunk."""
    norm = REF.object_keys()["norm"]
    objects = home.objects | ({norm: chunk_by(5, home)[norm]} if left else {})
    explorer = Explorer(home.folder, encoding, monkeypatch)
    assert explorer.fault(objects, 2, kills=1) is None
    assert explorer.states > 1000


@pytest.mark.slow
def test_three_writers_need_no_claims_to_keep_it(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if each had been given up by the others: all of them write the chunk."""
    monkeypatch.setattr(writer, "clear_claims", lambda files: None)

    def run(number: int, files: Replay) -> None:
        monkeypatch.setattr(writer, "open_files", lambda _: files)
        of = EmbeddingWriter("c", home.manifest)
        of.write(REF, rows_by(number, of, REF))
        of.seal()

    explorer = Explorer(home.folder, run, monkeypatch)
    assert explorer.fault(home.objects, 3, kills=1) is None
    assert explorer.states > 1000


def test_in_every_order_of_steps_one_plan_stands(
    home: Home, planning: Program, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The chunks are committed already. One whose plan differs in more than the manifest may end with an error."""
    may_end = (CacheMismatchError,) if "apart" in request.node.name else ()
    explorer = Explorer(home.folder, planning, monkeypatch, may_end)
    assert explorer.fault(unplanned(home), 2, kills=1) is None
    assert explorer.states > 1000


def unplanned(home: Home) -> dict[str, bytes]:
    """The chunks of a cache whose plan is not written, and the tables that no step creates."""
    kept = ("targets.zarr/image/", "commits/", *TABLES[1:])
    objects = {key: data for key, data in home.objects.items() if key.startswith(kept) and "zarr.json" not in key}
    return objects | chunk_by(0, home)


@pytest.mark.parametrize("planning", [0], ids=["alike"], indirect=True)
def test_if_objects_were_replaced_a_late_writer_would_change_a_sealed_cache(
    home: Home, encoding: Program, planning: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the exploration is for: it finds the fault that was there before."""
    for program, objects, changed in (
        (encoding, home.objects, "targets.zarr/text/"),
        (planning, unplanned(home), "manifest"),
    ):
        explorer = Explorer(home.folder, program, monkeypatch, fenced=False)
        assert f"a sealed cache changed: ['{changed}" in (explorer.fault(objects, 2, 0, "a sealed cache") or "")
