"""Object stores as they are: two real servers, and a network in front of one that fails in every way."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import socket
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from teacher_cache.storage.errors import CacheAccessError, CacheError, CacheUnreachableError, UsageError
from teacher_cache.storage.files import remote as remote_files
from teacher_cache.storage.files.location import open_files
from teacher_cache.storage.files.protocol import CacheFiles
from teacher_cache.storage.files.remote import RemoteFiles, RetryPolicy
from teacher_cache.storage.files.transient import is_transient
from tests.fault_proxy import Fault, FaultProxy, Request, refusal
from tests.object_store import ObjectStore, free_ports, start_seaweedfs
from tests.storage.files.test_files import FilesContract, check_race, race_processes

pytestmark = pytest.mark.service

QUICK = RetryPolicy(tries=3, first_pause_seconds=0.01, longest_pause_seconds=0.05, answer_seconds=0.5)


class TestS3(FilesContract):
    """The contract of every location, and what several processes need on top; on moto and on SeaweedFS."""

    races = 3  # SeaweedFS takes two seconds for eight puts of one key

    @pytest.fixture
    def files(self, s3_location: str) -> CacheFiles:
        return open_files(s3_location)

    @pytest.fixture(autouse=True)
    def remember_store(self, object_store: ObjectStore) -> None:
        self._store = object_store

    def raw(self, files: CacheFiles, key: str) -> bytes:
        return get(self._store, files, key)

    def test_of_racing_processes_exactly_one_creates(self, files: CacheFiles) -> None:
        check_race(files, race_processes(files.location))

    def test_more_objects_than_one_page_of_a_listing(self, files: CacheFiles) -> None:
        """Servers answer with at most 1,000 keys at a time."""
        bucket, _, root = files.location.removeprefix("s3://").partition("/")
        client = self._store.client()
        keys = [f"many/{number:04d}" for number in range(1005)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: client.put_object(Bucket=bucket, Key=f"{root}/{key}", Body=b"x"), keys))
        assert files.list("many") == keys

    def test_a_listing_shows_what_others_did_just_now(self, files: CacheFiles) -> None:
        other = open_files(files.location)
        files.write("a/1", b"x")
        assert other.list() == ["a/1"]
        files.write("a/2", b"x")
        assert other.list() == ["a/1", "a/2"]
        assert other.exists("a/2")
        files.delete("a/1")
        assert other.list("a") == ["a/2"]
        assert not other.exists("a/1")

    def test_folders_that_consoles_make_are_no_objects(self, files: CacheFiles) -> None:
        bucket, _, root = files.location.removeprefix("s3://").partition("/")
        self._store.client().put_object(Bucket=bucket, Key=f"{root}/a/", Body=b"")
        assert files.list() == []
        files.write("a/1", b"x")
        assert files.list("a") == ["a/1"]
        assert not files.exists("a")

    def test_other_processes_use_files_that_were_opened_before(self, files: CacheFiles) -> None:
        files.write("a", b"from the parent")
        context = multiprocessing.get_context("spawn")
        with context.Pool(2) as pool:
            assert pool.map(files.read, ["a", "a", "a"]) == [b"from the parent"] * 3
            assert sorted(pool.map(files.exists, ["a", "b"])) == [False, True]
            pool.starmap(files.write, [("b", b"from a child")])
        gc.collect()
        assert files.read("b") == b"from a child"

    def test_a_missing_bucket_is_said_to_be_missing(self, object_store: ObjectStore) -> None:
        """Not the object: a reader would take the cache for one that was never started."""
        files = open_files("s3://no-such-bucket/x.cache")
        for call in (
            lambda: files.read("a"),
            lambda: files.write("a", b"x"),
            lambda: files.create("a", b"x"),
            lambda: files.exists("a"),
            files.list,
        ):
            with pytest.raises(CacheAccessError, match=r"s3://no-such-bucket/x\.cache: .*bucket does not exist"):
                call()


def get(store: ObjectStore, files: CacheFiles, key: str) -> bytes:
    """The object's bytes, past the code under test."""
    bucket, _, root = files.location.removeprefix("s3://").partition("/")
    data: bytes = store.client().get_object(Bucket=bucket, Key=f"{root}/{key}")["Body"].read()
    return data


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_is_told_to_be_spawned(shaky: RemoteFiles) -> None:
    """The threads that do obstore's work are not in it: it would wait for ever."""
    shaky.write("a", b"x")
    with multiprocessing.get_context("fork").Pool(1) as pool, pytest.raises(UsageError, match="forkserver or spawn"):
        pool.apply(shaky.read, ("a",))
    assert shaky.read("a") == b"x"


@pytest.mark.usefixtures("own_fork_server")
def test_workers_of_a_data_loader_read_files_that_were_opened_before(shaky: RemoteFiles) -> None:
    from torch.utils.data import DataLoader

    files = shaky
    for number in range(8):
        files.write(f"{number}", b"%d" % number)
    loader = DataLoader(_Objects(files), batch_size=2, num_workers=2, multiprocessing_context="forkserver")
    assert [data for batch in loader for data in batch] == [b"%d" % number for number in range(8)]
    assert files.read("3") == b"3"


class _Objects:
    def __init__(self, files: CacheFiles) -> None:
        self.files = files

    def __len__(self) -> int:
        return 8

    def __getitem__(self, number: int) -> bytes:
        return self.files.read(f"{number}")


@pytest.fixture
def shaky(proxy: FaultProxy) -> RemoteFiles:
    """Files behind the proxy, of a client that waits for half a second at most."""
    return RemoteFiles(f"s3://caches/{uuid.uuid4()}/x.cache", QUICK)


FAULTS = {
    "500": Fault("refuse", 500, "InternalError"),
    "502": refusal(502, "Bad Gateway"),
    "503": refusal(503, "ServiceUnavailable"),
    "504": refusal(504, "Gateway Timeout"),
    "slow-down": Fault("refuse", 503, "SlowDown"),
    "drop": Fault("drop"),
    "lose": Fault("lose"),
    "stall": Fault("stall", seconds=1.5),
}


def test_each_call_is_one_request(proxy: FaultProxy, shaky: RemoteFiles) -> None:
    """No HEAD before a GET; retries of other layers would show here too."""
    shaky.write("a/b", b"x" * 5000)
    assert bytes(shaky.read_buffer("a/b")) == shaky.read("a/b") == b"x" * 5000
    shaky.list()
    assert shaky.exists("a/b")
    shaky.delete("a/b")
    root = shaky.location.removeprefix("s3://caches/")
    assert [(request.method, request.key) for request in proxy.requests] == [
        ("PUT", f"{root}/a/b"),
        ("GET", f"{root}/a/b"),
        ("GET", f"{root}/a/b"),
        ("GET", ""),
        ("HEAD", f"{root}/a/b"),
        ("POST", ""),
    ]


@pytest.mark.parametrize("name", list(FAULTS))
def test_failures_that_pass_are_survived_by_every_call(proxy: FaultProxy, shaky: RemoteFiles, name: str) -> None:
    """Each call meets the failure up to twice in a row, once less than there are tries."""
    shaky.create("warm", b"")
    # answers that only come late cost the read timeout each
    faults = [FAULTS[name]] * (1 if name == "stall" else 2)
    proxy.next_requests(*faults)
    shaky.write("a/b", b"data")
    proxy.next_requests(*faults)
    assert shaky.read("a/b") == b"data"
    proxy.next_requests(*faults)
    assert shaky.exists("a/b")
    proxy.next_requests(*faults)
    assert not shaky.exists("a/c")
    proxy.next_requests(*faults)
    assert shaky.list() == ["a/b", "warm"]
    proxy.next_requests(*faults)
    assert shaky.create("once", b"mine")
    proxy.next_requests(*faults)
    assert not shaky.create("a/b", b"mine")
    assert shaky.read("a/b") == b"data"
    proxy.next_requests(*faults)
    shaky.delete("a/b")
    assert shaky.list() == ["once", "warm"]
    assert len(proxy.injected) == 8 * len(faults)


@pytest.mark.parametrize("kind", ["cut", "truncate"])
def test_half_an_object_is_never_data(proxy: FaultProxy, shaky: RemoteFiles, kind: str) -> None:
    data = bytes(range(256)) * 2000
    shaky.write("a", data)
    proxy.next_requests(*[Fault(kind)] * 2, method="GET")
    assert shaky.read("a") == data
    assert len(proxy.injected) == 2
    proxy.always(Fault(kind), method="GET")
    with pytest.raises(CacheUnreachableError, match="cannot read a: 3 tries failed"):
        shaky.read("a")
    with pytest.raises(CacheUnreachableError, match="cannot list"):
        shaky.list()


@pytest.mark.parametrize("name", ["503", "drop", "lose", "stall"])
def test_giving_up_names_key_location_tries_and_cause(proxy: FaultProxy, shaky: RemoteFiles, name: str) -> None:
    shaky.write("a/b", b"data")
    shaky.create("warm", b"")
    proxy.requests.clear()
    proxy.always(FAULTS[name])
    calls = {
        "read": lambda: shaky.read("a/b"),
        "write": lambda: shaky.write("a/b", b"new"),
        "create": lambda: shaky.create("a/b", b"new"),
        "look at": lambda: shaky.exists("a/b"),
        "delete": lambda: shaky.delete("a/b"),
    }
    for verb, call in calls.items():
        with pytest.raises(CacheUnreachableError) as given_up:
            call()
        message = str(given_up.value)
        assert message.startswith(f"{shaky.location}: cannot {verb} a/b: 3 tries failed, the last with ")
        assert "testing" not in message  # the key and the secret
        assert "\n" not in message
        assert is_transient(given_up.value)
        assert isinstance(given_up.value, CacheError)
        assert len(proxy.requests) == 3
        proxy.requests.clear()


@pytest.mark.parametrize("name", ["lose", "stall"])
def test_create_knows_its_own_object_when_the_answer_was_lost(
    proxy: FaultProxy, shaky: RemoteFiles, moto: ObjectStore, name: str
) -> None:
    shaky.create("warm", b"")
    proxy.next_requests(FAULTS[name], method="PUT")
    assert shaky.create("a", b"mine")
    assert get(moto, shaky, "a") == b"mine"
    proxy.next_requests(FAULTS[name], method="PUT")
    assert not shaky.create("a", b"another's")
    assert get(moto, shaky, "a") == b"mine"


def test_create_after_a_lost_put_that_never_arrived_sees_who_was_quicker(
    proxy: FaultProxy, shaky: RemoteFiles, moto: ObjectStore
) -> None:
    shaky.create("warm", b"")
    other = RemoteFiles(shaky.location, QUICK)

    def plan(request: Request) -> Fault | None:
        if request.method != "PUT" or len(proxy.injected) > 0:
            return None
        bucket, _, root = shaky.location.removeprefix("s3://").partition("/")
        moto.client().put_object(Bucket=bucket, Key=f"{root}/a", Body=b"theirs")
        return Fault("drop")

    proxy.plan = plan
    assert not shaky.create("a", b"mine")
    assert other.read("a") == b"theirs"


def test_create_reads_back_what_it_lost_however_often_that_fails(proxy: FaultProxy, shaky: RemoteFiles) -> None:
    shaky.create("warm", b"")
    # the put is made, its answer comes too late; put again: 412; looking fails; put again: 412; look
    proxy.requests.clear()
    proxy.next_requests(FAULTS["stall"], Fault("none"), FAULTS["503"])
    assert shaky.create("a", b"mine")
    assert [request.method for request in proxy.requests] == ["PUT", "PUT", "HEAD", "PUT", "HEAD"]


def test_create_of_the_same_bytes_is_still_anothers(proxy: FaultProxy, shaky: RemoteFiles) -> None:
    """Equal bytes do not make an object one's own, not even after a failure."""
    assert shaky.create("a", b"equal")
    proxy.next_requests(FAULTS["503"], method="PUT")
    assert not shaky.create("a", b"equal")


def test_a_timeout_that_the_server_reports_is_tried_again(proxy: FaultProxy, shaky: RemoteFiles) -> None:
    """A 400 by its status; the code tells. (A HEAD has no code.)"""
    fault = refusal(400, "RequestTimeout", "Idle for too long.")
    proxy.next_requests(fault, fault)
    shaky.write("a", b"x")
    proxy.next_requests(fault, fault)
    assert shaky.read("a") == b"x"
    proxy.always(fault)
    with pytest.raises(CacheUnreachableError, match="the last with RequestTimeout: Idle for too long"):
        shaky.read("a")


def test_two_conditional_puts_at_one_moment_are_tried_again(proxy: FaultProxy, shaky: RemoteFiles) -> None:
    """AWS answers 409 where two puts of one key are under way."""
    shaky.create("warm", b"")
    proxy.next_requests(refusal(409, "ConditionalRequestConflict"))
    assert shaky.create("a", b"mine")


def test_a_server_that_ignores_the_condition_is_found_out(proxy: FaultProxy, shaky: RemoteFiles) -> None:
    """It would let every writer win."""
    proxy.strip_conditions = True
    with pytest.raises(UsageError, match="ignores If-None-Match"):
        shaky.create("a", b"x")
    assert not shaky.exists("a")


def test_racing_creators_behind_a_bad_network(proxy: FaultProxy, shaky: RemoteFiles) -> None:
    """Answers are lost at random; still exactly one of eight wins, and knows it."""
    # A try is a put and often a HEAD: two in three fail. The eight share the row of faults that the proxy bounds, so
    # that a call meets far more than six in a row; 12 tries were too few once in five runs, 50 are once in 10^8.
    patient = RemoteFiles(shaky.location, RetryPolicy(tries=50, first_pause_seconds=0.01, longest_pause_seconds=0.02))
    patient.create("warm", b"")
    proxy.seeded(7, 0.4, [FAULTS["503"], Fault("drop"), Fault("lose"), Fault("lose")], most_in_a_row=6)
    for number in range(8):
        key = f"race/{number}"
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda who, key=key: patient.create(key, b"%d" % who), range(8)))
        assert won.count(True) == 1
        assert patient.read(key) == b"%d" % won.index(True)
    assert sum(fault.kind == "lose" for _, fault in proxy.injected) > 8


REFUSALS = {
    "wrong key id": (refusal(403, "InvalidAccessKeyId"), "does not accept the credentials .InvalidAccessKeyId.*AWS_"),
    "wrong secret": (refusal(403, "SignatureDoesNotMatch"), "does not accept the credentials .SignatureDoesNotMatch"),
    "expired": (refusal(400, "ExpiredToken"), "does not accept the credentials .ExpiredToken"),
    "no right": (refusal(403, "AccessDenied", "Access Denied"), "denies it .*AccessDenied.* rights to list"),
    "region": (refusal(301, "PermanentRedirect"), "another region.*AWS_DEFAULT_REGION"),
    "region 400": (refusal(400, "AuthorizationHeaderMalformed"), "another region.*AWS_DEFAULT_REGION"),
    "redirect": (refusal(308, "Moved"), "the endpoint redirects .*check AWS_ENDPOINT_URL"),
    "odd": (refusal(400, "InvalidRequest", "odd"), "odd.*Check the location"),
}


@pytest.mark.parametrize("name", list(REFUSALS))
def test_refusals_are_one_line_with_the_remedy_and_not_tried_again(
    proxy: FaultProxy, shaky: RemoteFiles, name: str
) -> None:
    fault, wanted = REFUSALS[name]
    proxy.always(fault)
    calls = (lambda: shaky.read("a"), lambda: shaky.write("a", b"x"), lambda: shaky.create("a", b"x"), shaky.list)
    for call in calls:
        before = len(proxy.requests)
        with pytest.raises(CacheAccessError, match=wanted) as refused:
            call()
        assert str(refused.value).startswith(f"{shaky.location}: cannot ")
        assert "\n" not in str(refused.value)
        assert not is_transient(refused.value)
        assert len(proxy.requests) == before + 1


def test_a_wrong_secret_is_refused_by_a_server_that_checks_it(
    seaweedfs: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**seaweedfs.environment, "AWS_SECRET_ACCESS_KEY": "wr0ng-secret"}.items():
        monkeypatch.setenv(name, value)
    files = open_files(seaweedfs.location("x.cache"))
    with pytest.raises(CacheAccessError, match="does not accept the credentials") as refused:
        files.write("a", b"x")
    assert "wr0ng" not in str(refused.value)


def test_renewed_credentials_are_used_by_whoever_opens_the_location_again(
    seaweedfs: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keys = tmp_path / "credentials"
    text = "[default]\naws_access_key_id = testing\naws_secret_access_key = {}\n"
    keys.write_text(text.format("expired"))
    for name, value in {**seaweedfs.environment, "AWS_SHARED_CREDENTIALS_FILE": str(keys)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    location = seaweedfs.location(f"{uuid.uuid4()}/x.cache")
    with pytest.raises(CacheAccessError, match="does not accept the credentials"):
        open_files(location).write("a", b"x")
    keys.write_text(text.format("testing-secret"))
    open_files(location).write("a", b"x")


def test_no_credentials_at_all(moto: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in moto.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(CacheAccessError, match=r"no usable credentials.*AWS_ACCESS_KEY_ID"):
        open_files(moto.location("x.cache")).read("a")


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "http://me:s3cr3t@127.0.0.1:9"])
def test_a_server_that_is_not_there(
    moto: ObjectStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, address: str
) -> None:
    """Each further try is a line in the log; neither it nor the message shows a password of the address."""
    caplog.set_level(logging.INFO, "teacher_cache")
    for name, value in {**moto.environment, "AWS_ENDPOINT_URL": address}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CacheUnreachableError, match="cannot read a: 3 tries failed") as given_up:
        RemoteFiles(moto.location("x.cache"), QUICK).read("a")
    assert "s3cr3t" not in str(given_up.value)
    lines = [record.getMessage() for record in caplog.records if record.name == "teacher_cache.storage.files.remote"]
    assert [line.rpartition("; ")[2][:10] for line in lines] == ["try 2 of 3", "try 3 of 3"]
    assert "s3cr3t" not in caplog.text


def test_a_server_that_never_answered_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes the connection and says nothing, and one that is not there: a wrong address, by one sentence."""
    quick = RetryPolicy(first_answer_seconds=0.3)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        for port, why in ((deaf.getsockname()[1], "no answer in time"), (9, "Connection refused")):
            location, began = f"http://127.0.0.1:{port}/x.cache", time.monotonic()
            wanted = (
                rf"x\.cache: cannot read a: no answer in \d s \({why}\)\. Check the location and the network, and run"
            )
            with pytest.raises(CacheUnreachableError, match=wanted):
                RemoteFiles(location, quick).read("a")
            assert time.monotonic() - began < 10


def test_a_server_that_has_answered_is_waited_for(proxy: FaultProxy, shaky: RemoteFiles) -> None:
    """Also by another reader of the process: a run does not end because of a store that restarts."""
    shaky.write("a", b"x")
    proxy.always(FAULTS["drop"])
    patient = RetryPolicy(tries=3, first_pause_seconds=0.01, longest_pause_seconds=0.02, first_answer_seconds=0)
    with pytest.raises(CacheUnreachableError, match="cannot read a: 3 tries failed"):
        RemoteFiles(shaky.location, patient).read("a")


def test_the_command_line_says_it_in_one_line(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from teacher_cache.pipeline.cli.app import main

    monkeypatch.setattr(remote_files, "RETRY", QUICK)

    def run(location: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["teacher-cache", "info", location])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().err

    code, said = run("s3://no-such-bucket/x.cache")
    assert code == 1
    assert said == (
        "error: s3://no-such-bucket/x.cache: cannot read manifest.json: the bucket does not exist. Make it, or correct "
        "the location\n"
    )
    code, said = run("s3://AKIAKEY:s3cr3t/x@caches/x.cache")
    assert code == 2
    assert said.startswith("error: s3://***@caches/x.cache: a location must not hold credentials")
    proxy.always(FAULTS["503"])
    code, said = run("s3://caches/x.cache")
    assert code == 1
    assert (
        "error: s3://caches/x.cache: cannot read manifest.json: 3 tries failed, the last with ServiceUnavailable"
        in said
    )
    assert Path(__file__).name not in said
    assert "Traceback" not in said


def test_a_server_whose_port_was_taken_meanwhile_is_started_on_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by another process that runs tests."""
    tries = 0

    def ports(count: int) -> list[int]:
        nonlocal tries
        tries += 1
        return [taken.getsockname()[1]] * count if tries == 1 else free_ports(count)

    monkeypatch.setattr("tests.object_store.free_ports", ports)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with start_seaweedfs(tmp_path / "weed") as store:
            assert store.client().list_buckets()["Buckets"][0]["Name"] == store.bucket
    assert tries == 2
