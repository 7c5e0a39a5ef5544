"""Large objects by obstore: the same bytes in one request, and s3fs wherever that does not work."""

from __future__ import annotations

import multiprocessing
import uuid

import fsspec
import pytest

from teacher_cache.storage.errors import CacheAccessError
from teacher_cache.storage.files import obstore_reads as object_reads_module
from teacher_cache.storage.files.location import open_files, read_buffer
from teacher_cache.storage.files.obstore_reads import ObjectReads
from teacher_cache.storage.files.remote import RemoteFiles, RetryPolicy
from tests.fault_proxy import Fault, FaultProxy, refusal

pytestmark = pytest.mark.service

DATA = bytes(range(256)) * 4000


@pytest.fixture
def files(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> RemoteFiles:
    """One object, ``a``, behind the proxy; nothing was read by obstore yet."""
    monkeypatch.setattr(object_reads_module, "_made", {})
    files = RemoteFiles(f"s3://caches/{uuid.uuid4()}/x.cache", RetryPolicy(3, 0.01, 0.05))
    files.write("a", DATA)
    proxy.requests.clear()
    return files


@pytest.fixture
def by_s3fs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys that were not read by obstore."""
    keys: list[str] = []
    read = RemoteFiles.read

    def noted(self: RemoteFiles, key: str) -> bytes:
        keys.append(key)
        return read(self, key)

    monkeypatch.setattr(RemoteFiles, "read", noted)
    return keys


def test_the_same_bytes_in_one_request(proxy: FaultProxy, files: RemoteFiles, by_s3fs: list[str]) -> None:
    for _ in range(2):
        assert bytes(read_buffer(files, "a")) == DATA
    assert [request.method for request in proxy.requests] == ["GET", "GET"]
    assert not by_s3fs


@pytest.mark.parametrize("kind", ["refuse", "drop", "lose", "cut", "truncate"])
def test_what_fails_is_read_by_s3fs(proxy: FaultProxy, files: RemoteFiles, by_s3fs: list[str], kind: str) -> None:
    """Half an object among it; afterwards obstore is asked again."""
    read_buffer(files, "a")
    # the client may send a GET again that got no answer on a kept connection
    proxy.next_requests(*[Fault(kind)] * 2, method="GET")
    assert bytes(read_buffer(files, "a")) == DATA
    assert len(proxy.injected) == 2
    proxy.requests.clear()
    before = len(by_s3fs)
    assert bytes(read_buffer(files, "a")) == DATA
    assert (len(proxy.requests), len(by_s3fs)) == (1, before)


def test_where_it_never_works_it_is_left(proxy: FaultProxy, files: RemoteFiles, by_s3fs: list[str]) -> None:
    """A setting that it reads in another way would cost a request for each object."""
    proxy.next_requests(refusal(403, "AccessDenied"), method="GET")
    for _ in range(3):
        assert read_buffer(files, "a") == DATA
    assert len(proxy.requests) == 1 + 3
    assert by_s3fs == ["a"] * 3


def test_a_refusal_is_said_as_everywhere(proxy: FaultProxy, files: RemoteFiles) -> None:
    read_buffer(files, "a")
    proxy.always(refusal(403, "SignatureDoesNotMatch"))
    with pytest.raises(CacheAccessError, match=r"does not accept the credentials .SignatureDoesNotMatch"):
        read_buffer(files, "a")


def test_what_is_not_there_is_not_found(files: RemoteFiles) -> None:
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match=r"x\.cache: there is no object b"):
            read_buffer(files, "b")
        read_buffer(files, "a")


def test_what_fsspec_was_told_of_s3_leaves_it_to_s3fs(
    files: RemoteFiles, by_s3fs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 5}})
    assert read_buffer(open_files(files.location), "a") == DATA
    assert by_s3fs == ["a"]


@pytest.mark.timeout(180)
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_reads_by_s3fs(files: RemoteFiles) -> None:
    """The threads of its parent's obstore are not in it: it would wait for ever."""
    read_buffer(files, "a")
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_read_by_s3fs, (files,)) == DATA
    assert bytes(read_buffer(files, "a")) == DATA


def _read_by_s3fs(files: RemoteFiles) -> bytes:
    data = read_buffer(files, "a")
    assert isinstance(data, bytes)  # and no view of another library's
    return data


def test_an_object_that_does_not_end_well_is_none() -> None:
    class Store:
        def get(self, key: str) -> bytes:
            raise OSError("cut")

    reads = ObjectReads(Store())
    assert reads.get("a") is None
