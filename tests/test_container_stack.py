"""The services of compose.yaml, run once outside of containers: a real PostgreSQL, Prefect's server on it, a real
object store, what sets them up, and a worker that encodes into the store and trains from it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.container_files import DOCKER, PROJECT, SECRETS, Place
from tests.container_files import services as compose_services
from tests.object_store import Started, free_ports

# building the stack counts as part of its first test
pytestmark = [pytest.mark.service, pytest.mark.timeout(1800)]


def postgres_programs() -> Path:
    """The newest PostgreSQL of this machine's packages, or a skip that says how to get one."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if not found:
        pytest.skip("PostgreSQL is not here: apt-get install postgresql")
    return found[-1].parent


def unprivileged() -> dict[str, Any]:
    """PostgreSQL refuses to run as root; its packages bring a user."""
    return {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}


@dataclass
class Stack:
    """All services up; ``services`` is compose.yaml, ``place`` where they run."""

    services: dict[str, Any]
    place: Place
    started: dict[str, Started]
    programs: Path
    postgres_port: int

    def query(self, sql: str) -> list[str]:
        """Rows of a query past Prefect, in the database that its server was told to use."""
        where = ["-h", "127.0.0.1", "-p", str(self.postgres_port), "-U", "prefect"]
        command = [self.programs / "psql", *where, "-At", "-c", sql]
        environment = {**os.environ, "PGPASSWORD": SECRETS["POSTGRES_PASSWORD"]}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    def wait_for_newest_run(self, state: str) -> None:
        """Return when the newest flow run is in this state; the database may be away meanwhile."""
        seen, until = list[str](), time.monotonic() + 180
        while seen != [state]:
            assert not set(seen) & {"FAILED", "CRASHED"}, self.started["worker"].log.read_text()[-3000:]
            assert time.monotonic() < until, seen
            time.sleep(0.2)
            with contextlib.suppress(subprocess.CalledProcessError):
                seen = self.query("select state_type from flow_run order by created desc limit 1")

    def prefect(self, *words: str) -> subprocess.CompletedProcess[str]:
        """``docker compose exec worker prefect ...``."""
        return self.place.run(self.services["worker"], ["prefect", *words])

    def healthy(self, name: str) -> bool:
        """The health check of a service of ours, as compose.yaml has it."""
        test = self.services[name]["healthcheck"]["test"]
        assert test[0] == "CMD"
        return self.place.run(self.services[name], test[1:]).returncode == 0


def start_postgres(service: dict[str, Any], programs: Path, folder: Path, port: int) -> Started:
    """Debian's server with what the official image makes of its environment: a user, a password, a database."""
    user, database = service["environment"]["POSTGRES_USER"], service["environment"]["POSTGRES_DB"]
    password = folder / "password"
    password.write_text(service["environment"]["POSTGRES_PASSWORD"])
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres", "postgres")
        shutil.chown(password, "postgres", "postgres")
    data = folder / "data"
    options: dict[str, Any] = {"cwd": folder, **unprivileged()}
    initdb = [programs / "initdb", "-D", data, "-U", user, "--auth=scram-sha-256", f"--pwfile={password}", "--no-sync"]
    subprocess.run([*initdb, "--encoding=UTF8", "--locale=C"], check=True, capture_output=True, **options)
    command = [str(programs / "postgres"), "-D", str(data), "-p", str(port), "-k", str(folder), "-h", "127.0.0.1"]
    started = Started.start("postgres", command, folder.parent / "postgres.log", **options)
    test = service["healthcheck"]["test"]
    # before the database is made, the check asks for one that is not there, which pg_isready calls ready
    ready = [programs / test[1], *test[2:], f"--port={port}"]
    started.wait_until(lambda: subprocess.run(ready, capture_output=True).returncode == 0)
    environment = {**os.environ, "PGPASSWORD": service["environment"]["POSTGRES_PASSWORD"]}
    made = [programs / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", user, database]
    subprocess.run(made, env=environment, check=True, capture_output=True)
    return started


def start_store(service: dict[str, Any], place: Place, folder: Path, port: int) -> Started:
    """The store's command; what listens inside its container alone gets ports that are free here."""
    folder.mkdir()
    weed = str(Path(sys.executable).with_name(service["entrypoint"][0]))
    names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
    names += ("s3.port.grpc",)
    inside = [f"-{name}={number}" for name, number in zip(names, free_ports(len(names)), strict=True)]
    command = [weed, *(place.here(word) for word in service["command"]), *inside]
    started = Started.start("s3", command, folder.parent / "s3.log", cwd=folder, env=place.environment_of(service))
    url = place.here(service["healthcheck"]["test"][-1])

    def answers() -> bool:
        with contextlib.suppress(OSError):
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5).close()
            return True
        return False

    started.wait_until(answers)
    return started


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """Everything is started in the order of ``depends_on`` and stopped in the other one."""
    programs = postgres_programs()
    services = compose_services()
    # not below pytest's folder, which the user of PostgreSQL may not enter
    root = Path(tempfile.mkdtemp(prefix="stack-"))
    root.chmod(0o755)
    postgres_port, server_port, s3_port, health_port, metrics_port = free_ports(5)
    work = root / "work"
    for name in ("caches", "runs", "home", "programs"):  # the first two as the Dockerfile makes them
        (work / name if name in ("caches", "runs") else root / name).mkdir(parents=True)
    shutil.copy(PROJECT / "prefect.yaml", work)
    shutil.copytree(PROJECT / "flows", work / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "programs" / "healthcheck").symlink_to(DOCKER / "healthcheck.py")
    place = Place(
        work=work,
        programs=root / "programs",
        substitutes=[
            (r"\bserver:4200\b", f"127.0.0.1:{server_port}"),
            (r"\bs3:8333\b", f"127.0.0.1:{s3_port}"),
            (r"^postgres$", "127.0.0.1"),
            (r"^5432$", str(postgres_port)),
            (r"^9464$", str(metrics_port)),
            (r"0\.0\.0\.0", "127.0.0.1"),
            (r"\b4200\b", str(server_port)),
            (r"\b8333\b", str(s3_port)),
            (r"=/data$", f"={root / 's3'}"),
            (r"^/var/lib/prefect$", str(root / "home" / "server")),
        ],
        environment={
            "HOME": str(root / "home"),
            "PREFECT_HOME": str(root / "home" / "prefect"),
            "PREFECT_UI_STATIC_DIRECTORY": str(root / "home" / "ui"),
            "PREFECT_SERVER_API_PORT": str(server_port),
            "PREFECT_WORKER_WEBSERVER_PORT": str(health_port),
            "PREFECT_WORKER_WEBSERVER_HOST": "127.0.0.1",
            "PREFECT_CLI_COLORS": "false",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(PROJECT),
        },
    )
    stack = Stack(services, place, {}, programs, postgres_port)
    try:
        (root / "postgres").mkdir()
        stack.started["postgres"] = start_postgres(services["postgres"], programs, root / "postgres", postgres_port)
        stack.started["s3"] = start_store(services["s3"], place, root / "s3", s3_port)
        for name in ("server", "setup", "worker"):
            service = services[name]
            command = [place.here(word) for word in service["command"]]
            if name == "setup":
                for _ in range(2):  # each `docker compose up` runs it again
                    done = place.run(service, command)
                    assert done.returncode == 0, done.stdout + done.stderr
                continue
            program = str(Path(sys.executable).with_name(command[0]))
            log = root / f"{name}.log"
            environment = place.environment_of(service)
            stack.started[name] = Started.start(name, [program, *command[1:]], log, cwd=work, env=environment)
            stack.started[name].wait_until(lambda name=name: stack.healthy(name))
        yield stack
    finally:
        codes = {}
        for name, started in reversed(stack.started.items()):
            # as Docker does, but for PostgreSQL, whose image asks for SIGINT, and weed, whose own way takes 20 s
            number = {"postgres": signal.SIGINT, "s3": signal.SIGKILL}.get(name, signal.SIGTERM)
            codes[name] = started.stop(number)
        shutil.rmtree(root, ignore_errors=True)
    # Prefect's server ends in order and then by the signal that it was sent
    assert codes == {"worker": 0, "server": -signal.SIGTERM, "s3": -signal.SIGKILL, "postgres": 0}


@pytest.fixture(scope="module")
def precomputed(stack: Stack) -> str:
    """A cache in the store, made by a run of the deployment on the worker."""
    bucket = stack.services["setup"]["environment"]["CACHE_BUCKET"]
    cache = f"s3://{bucket}/scenes.cache"
    done = stack.prefect(
        *("deployment", "run", "precompute-teacher/default", "--watch", "-p", f"cache={cache}"),
        *("-p", "dataset=scenes:caches/scenes?train=96&dev=8&test=24", "-p", 'advanced={"chunk_rows": 64}'),
    )
    assert done.returncode == 0, done.stdout + done.stderr + stack.started["worker"].log.read_text()[-3000:]
    return cache


def test_a_deployment_encodes_into_the_store_and_verify_proves_it(stack: Stack, precomputed: str) -> None:
    done = stack.place.run(stack.services["worker"], ["teacher-cache", "verify", precomputed])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "128 images" in done.stdout
    # in another container: of the same store, with no way to it but the environment
    listed = stack.place.run(
        stack.services["setup"], ["teacher-cache", "info", precomputed.rpartition("/")[0], "--json"]
    )
    assert precomputed in listed.stdout, listed.stderr


def test_a_student_is_trained_from_the_store_into_the_volume_of_runs(stack: Stack, precomputed: str) -> None:
    done = stack.prefect(
        *("deployment", "run", "train-student/default", "--watch", "-p", f"cache={precomputed}", "-p", "epochs=1"),
        *("-p", "out=runs/tiny"),
    )
    assert done.returncode == 0, done.stdout + done.stderr + stack.started["worker"].log.read_text()[-3000:]
    assert (stack.place.work / "runs" / "tiny" / "checkpoints" / "epoch-0001").is_dir()


def test_what_happened_is_in_postgresql(stack: Stack, precomputed: str) -> None:
    assert "COMPLETED" in stack.query("select distinct state_type from flow_run")
    deployed = stack.query("select f.name || '/' || d.name from deployment d join flow f on f.id = d.flow_id")
    named = re.findall(r"entrypoint: flows/(\w+)\.py", (PROJECT / "prefect.yaml").read_text())
    assert {name.partition("/")[0] for name in deployed} == {name.replace("_", "-") for name in named}
    assert not list((stack.place.work.parent / "home").rglob("prefect.db")), "SQLite was used"


def test_nothing_is_written_to_work_beside_its_volumes(stack: Stack, precomputed: str) -> None:
    """The root of the containers is read-only, and here it is not: setup, server, worker and runs leave it alone."""
    below = {path.relative_to(stack.place.work) for path in stack.place.work.rglob("*") if path.is_file()}
    flows = {path.relative_to(PROJECT) for path in (PROJECT / "flows").glob("*.py")}
    assert {path for path in below if path.parts[0] not in ("caches", "runs")} == {Path("prefect.yaml"), *flows}


@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
def test_the_server_takes_the_template_of_a_pool(stack: Stack, kind: str) -> None:
    template = str(DOCKER / "pools" / f"{kind}.json")
    words = ("--no-prompt", "work-pool", "create", f"try-{kind}", "--type", kind, "--base-job-template", template)
    done = stack.prefect(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    kinds = stack.query(f"select type from work_pool where name = 'try-{kind}'")
    assert kinds == [kind]


def test_a_database_that_restarts_under_a_run_costs_it_nothing(stack: Stack, precomputed: str) -> None:
    cache = precomputed.replace("scenes.", "again.")
    done = stack.prefect(
        *("deployment", "run", "precompute-teacher/default", "-p", f"cache={cache}"),
        *("-p", "dataset=scenes:caches/scenes?train=96&dev=8&test=24", "-p", 'advanced={"chunk_rows": 64}'),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    stack.wait_for_newest_run("RUNNING")
    before = stack.started["postgres"]
    assert before.stop(signal.SIGINT) == 0
    options = {"cwd": before.log.parent / "postgres", **unprivileged()}
    stack.started["postgres"] = Started.start("postgres", before.process.args, before.log, **options)
    stack.wait_for_newest_run("COMPLETED")


def test_the_workers_health_check_tells_when_it_is_gone(stack: Stack, precomputed: str) -> None:
    assert stack.healthy("worker")
    assert stack.started["worker"].stop() == 0
    assert not stack.healthy("worker")


def test_the_pool_is_made_anew_as_the_readme_says(stack: Stack) -> None:
    """Its lines as written, but for the port; the worker must be stopped, or it would make its own pool again."""
    stack.started["worker"].stop()
    block = re.findall(r"^  ```\n(.*?)^  ```$", (DOCKER / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (lines,) = (text.splitlines() for text in block if "work-pool create" in text)
    setup = stack.services["setup"]
    script = stack.place.here("\n".join(["set -e", *lines[:3]]))
    done = subprocess.run(
        ["bash", "-c", script], cwd=PROJECT, env=stack.place.environment_of({}), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # the last two want Docker: setup is run as the fixture runs it, and prefect-docker's worker was tried by hand
    assert [line.partition("   #")[0].strip() for line in lines[3:]] == [
        "docker compose -f docker/compose.yaml run --rm setup",
        "pip install prefect-docker && prefect worker start --pool local --type docker --limit 1",
    ]
    done = stack.place.run(setup, [stack.place.here(word) for word in setup["command"]])
    assert done.returncode == 0, done.stdout + done.stderr
    pools = "select w.name, w.type, count(d.id) from work_pool w join work_queue q on q.work_pool_id = w.id"
    pools += " join deployment d on d.work_queue_id = q.id group by w.name, w.type"
    deployments = len(re.findall(r"entrypoint: flows/", (PROJECT / "prefect.yaml").read_text()))
    assert stack.query(pools) == [f"local|docker|{deployments}"]


def test_the_servers_health_check_tells_when_its_database_is_gone(stack: Stack) -> None:
    """Last, since it ends the database."""
    assert stack.healthy("server")
    assert stack.started["postgres"].stop(signal.SIGINT) == 0
    assert not stack.healthy("server")
