"""Images, compose files and Kubernetes manifests say what they should, as far as text can; ``make lint`` checks their
schemas, and the rest is run in ``test_container_stack.py``."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest
import yaml

from tests.container_files import (
    DOCKER,
    PROJECT,
    SECRETS,
    compose,
    image_environment,
    job_of_the_pool,
    kubernetes_objects,
    script,
    services,
)

OURS = {"server", "setup", "worker"}


# --- images


def test_every_image_ends_as_user_1000_with_an_init_and_a_health_check() -> None:
    text = (DOCKER / "Dockerfile").read_text()
    stages = {
        re.search(r"AS ([\w-]+)", stage)[1]: stage  # type: ignore[index]
        for stage in re.split(r"^(?=FROM )", text, flags=re.MULTILINE)[1:]
    }
    for name in ("light", "cpu", "gpu"):
        assert re.findall(r"^USER (.*)$", stages[name], re.MULTILINE) == ["1000"]
        assert re.match(r"FROM (base|runtime) AS", stages[name])
        compiler = re.search(r"gcc|-dev\b", stages[name] + stages["base"] + stages["runtime"])
        assert bool(compiler) == (name == "gpu"), "torch.compile needs one on a GPU; no other image has a compiler"
    assert "ENV TRITON_CACHE_DIR=/tmp/triton TORCHINDUCTOR_CACHE_DIR=/tmp/inductor" in stages["gpu"]
    assert stages["runtime"].startswith("FROM base AS")
    assert 'ENTRYPOINT ["tini", "--"]' in stages["base"]
    assert 'CMD ["healthcheck"]' in stages["base"]
    # a base with its full version, and everything that pip installs under constraints or exactly pinned
    assert re.search(r"^ARG BASE=python:\d+\.\d+\.\d+-slim-\w+$", text, re.MULTILINE)
    for line in re.findall(r"^(?!#).*pip install.*(?:\\\n.*)*", text, re.MULTILINE):
        assert re.search("-c constraints.txt|--no-deps|--require-hashes", line), line


def distributions(image: str) -> set[str]:
    """The direct requirements of an image by name."""
    lines = script(DOCKER / "requirements.py").requirements(image, PROJECT / "pyproject.toml")
    return {re.split(r"[^\w-]", line)[0] for line in lines}


def test_the_light_image_holds_what_storage_and_prefect_need_and_no_torch() -> None:
    light = distributions("light")
    assert {"numpy", "zarr", "pyarrow", "pydantic", "click", "prefect", "obstore"} <= light
    assert not {"torch", "torchvision", "open_clip_torch", "pillow", "faiss-cpu", "onnx"} & light
    for image, other in (("cpu", "gpu"), ("gpu", "cpu")):
        assert distributions(image) > light | {"torch", "onnx", "altair", "simplejpeg", f"faiss-{image}"}
        assert f"faiss-{other}" not in distributions(image), "faiss-cpu and faiss-gpu own the same files"


def test_what_storage_imports_is_in_the_core_install() -> None:
    """Every third-party import at the top of a storage module, by the distribution that brings it."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    core = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in project["dependencies"]}
    modules = sorted((PROJECT / "storage").rglob("*.py"))
    assert len(modules) > 20
    for path in modules:
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"teacher_cache"}:
                # for caches at URLs, which import it when they are opened
                of_the_stores = name == "obstore" and path.name in ("remote.py", "stores.py", "opened.py")
                assert name in core or of_the_stores, f"{path.name} imports {name}"


def test_the_builder_gets_what_the_dockerfile_copies_and_no_more() -> None:
    lines = [line for line in (PROJECT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copied = set()
    for line in re.findall(r"^COPY (?!--from)(.*)$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE):
        copied |= set(line.split()[:-1])
    assert copied == allowed - {"docker/Dockerfile"}
    assert all((PROJECT / name).exists() for name in allowed)


@pytest.mark.parametrize("name", ["README.md", "try.sh"])
def test_what_is_run_by_hand_names_deployments_with_parameters_that_they_have(name: str) -> None:
    """``try.sh`` itself is run by ``make containers``, where there is Docker."""
    text = (DOCKER / name).read_text()
    if name.endswith(".sh"):
        subprocess.run(["bash", "-n", DOCKER / name], check=True)
    deployments = yaml.safe_load((PROJECT / "prefect.yaml").read_text())["deployments"]
    entrypoints = {each["entrypoint"].rpartition(":")[2].replace("_", "-"): each["entrypoint"] for each in deployments}
    lines = re.findall(r"(?:prefect deployment run |^deployment )([a-z-]+)(?:/default)? (.*)$", text, re.MULTILINE)
    assert lines
    for deployment, rest in lines:
        path, _, function = entrypoints[deployment].partition(":")
        parameters = inspect.signature(getattr(script(PROJECT / path), function).fn).parameters
        assert set(re.findall(r"-p '?(\w+)=", rest)) <= set(parameters), deployment


# --- health check


class Answers(BaseHTTPRequestHandler):
    """Prefect's worker, well and not: 200 on /health, 503 on everything else."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 503)
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


def test_the_health_check_tells_well_from_ill(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    healthcheck = script(DOCKER / "healthcheck.py")
    server = HTTPServer(("127.0.0.1", 0), Answers)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
        monkeypatch.setenv("PREFECT_WORKER_WEBSERVER_PORT", str(server.server_port))
        monkeypatch.setenv("PREFECT_SERVER_API_PORT", str(server.server_port))
        assert healthcheck.main(["worker"]) == 0
        assert healthcheck.main(["server"]) == 1
        assert f":{server.server_port}/api/ready: HTTP Error 503" in capsys.readouterr().err
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert healthcheck.main(["worker"]) == 1
    assert "Connection refused" in capsys.readouterr().err
    assert healthcheck.main(["database"]) == 2


def test_the_health_check_knows_what_a_container_runs() -> None:
    role_of = script(DOCKER / "healthcheck.py").role_of
    assert role_of(["tini", "--", *services()["server"]["command"]]) == "server"
    assert role_of(["tini", "--", *services()["worker"]["command"]]) == "worker"
    assert role_of(["tini", "--", "teacher-cache", "train", "--out", "worker"]) is None


# --- compose


def test_every_secret_must_be_set_and_none_is_in_the_file() -> None:
    for name in SECRETS:
        with pytest.raises(ValueError, match=f"{name}: set it in docker/.env"):
            compose("compose.yaml", {key: value for key, value in SECRETS.items() if key != name})
    example = dict(
        line.split("=", 1)
        for line in (DOCKER / ".env.example").read_text().splitlines()
        if "=" in line and line[0] != "#"
    )
    assert {name for name, value in example.items() if not value} == set(SECRETS)
    # what the example sets is what holds without it
    assert compose("compose.yaml", SECRETS) == compose("compose.yaml", {**example, **SECRETS})
    ignored = subprocess.run(["git", "check-ignore", "docker/.env"], cwd=PROJECT, capture_output=True)
    assert ignored.returncode in (0, 128)  # 128: not a clone


@pytest.mark.parametrize("name", sorted(services()))
def test_a_service_is_pinned_watched_and_confined(name: str) -> None:
    service = services()[name]
    tag = service["image"].partition(":")[2]
    assert tag
    assert "latest" not in tag
    assert "build" in service or re.match(r"v?\d+\.\d+", tag), "an image of others without its version"
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    # the one that ends is waited for by its exit code
    assert ("healthcheck" in service) != (name == "setup")
    assert service["restart"] == ("on-failure:5" if name == "setup" else "unless-stopped")
    if name in OURS:
        assert (service["user"], service["read_only"], service["cap_drop"]) == ("1000:1000", True, ["ALL"])
        assert service["build"]["target"] == tag
        # what Prefect writes is there, in a root that cannot be written to; its UI by default beside its own code
        assert service["tmpfs"] == ["/tmp:mode=1777,exec"]
        for variable in ("PREFECT_HOME", "PREFECT_UI_STATIC_DIRECTORY"):
            assert image_environment()[variable].startswith("/tmp/")
        assert image_environment()["TZ"] == "UTC"


def test_every_volume_is_declared_and_lands_in_a_folder_that_the_user_owns() -> None:
    whole = compose("compose.yaml", SECRETS)
    used = {each.split(":")[0] for service in whole["services"].values() for each in service.get("volumes", [])}
    assert {each for each in used if not each.startswith(".")} == set(whole["volumes"])
    owned = re.search(r"install -d -o teacher -g teacher (.*?)$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    assert owned is not None
    targets = {each.split(":")[1] for name in ("server", "worker") for each in services()[name]["volumes"]}
    assert targets <= set(owned[1].split())


def test_the_gpu_file_changes_the_worker_alone() -> None:
    changed = compose("compose.gpu.yaml", SECRETS)["services"]
    assert set(changed) == {"worker"}
    assert changed["worker"]["image"] == "teacher-cache:gpu"
    assert changed["worker"]["build"]["target"] == "gpu"
    (device,) = changed["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])


def test_the_pool_is_the_one_that_prefect_yaml_deploys_to() -> None:
    pools = {
        each["work_pool"]["name"] for each in yaml.safe_load((PROJECT / "prefect.yaml").read_text())["deployments"]
    }
    worker = services()["worker"]["command"]
    assert pools == {worker[worker.index("--pool") + 1]}
    assert pools == {helm_values()["worker"]["config"]["workPool"]}


# --- Kubernetes


def helm_values() -> dict[str, Any]:
    return yaml.safe_load((DOCKER / "kubernetes" / "prefect-worker-values.yaml").read_text())


def deployment() -> dict[str, Any]:
    (found,) = [each for each in kubernetes_objects("worker.yaml") if each["kind"] == "Deployment"]
    return found


def pod_of_a_job(**variables: Any) -> dict[str, Any]:
    """The pod that the kubernetes pool makes for a flow run."""
    return job_of_the_pool(**variables)["spec"]["template"]["spec"]


def test_the_deployment_runs_what_compose_runs() -> None:
    pod = deployment()["spec"]["template"]["spec"]
    (setup,), (worker,) = pod["initContainers"], pod["containers"]
    assert worker["args"] == services()["worker"]["command"]
    # compose's has the bucket before; the stores of a cluster have theirs
    assert services()["setup"]["command"][-1].endswith(setup["args"][-1])
    assert deployment()["spec"]["selector"]["matchLabels"] == deployment()["spec"]["template"]["metadata"]["labels"]


@pytest.mark.parametrize("pod", [deployment()["spec"]["template"]["spec"], pod_of_a_job()], ids=["worker", "job"])
def test_a_pod_is_confined_and_has_its_gpu_and_its_volumes(pod: dict[str, Any]) -> None:
    assert pod["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 1000,
        "runAsGroup": 1000,
        "fsGroup": 1000,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert pod["automountServiceAccountToken"] is False
    volumes = {each["name"]: each for each in pod["volumes"]}
    claims = {
        each["metadata"]["name"]
        for each in kubernetes_objects("worker.yaml")
        if each["kind"] == "PersistentVolumeClaim"
    }
    assert {
        each["persistentVolumeClaim"]["claimName"] for each in pod["volumes"] if "persistentVolumeClaim" in each
    } == claims
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
        assert set(mounts.values()) <= set(volumes)
        assert "/tmp" in mounts
        assert "memory" in container["resources"]["limits"]
    (main,) = pod["containers"]
    assert main["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert main["envFrom"] == [{"secretRef": {"name": "teacher-cache-store"}}]
    assert {"/work/caches", "/work/runs", "/work/data", "/models", "/dev/shm"} <= set(mounts)
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "4Gi"}


def test_what_a_run_of_the_kubernetes_pool_sets_arrives_in_its_pod() -> None:
    pod = pod_of_a_job(gpus=2, image="mine:1", memory_limit="64Gi", node_selector={"gpu": "h100"})
    (container,) = pod["containers"]
    assert container["args"] == ["prefect", "flow-run", "execute"]
    assert (container["image"], container["resources"]["limits"]) == ("mine:1", {"memory": "64Gi", "nvidia.com/gpu": 2})
    assert pod["nodeSelector"] == {"gpu": "h100"}
    assert "nodeSelector" not in pod_of_a_job()


@pytest.mark.parametrize("name", ["docker", "kubernetes"])
def test_a_pool_uses_each_of_its_variables_and_describes_it(name: str) -> None:
    text = (DOCKER / "pools" / f"{name}.json").read_text()
    template = json.loads(text)
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))
    properties = template["variables"]["properties"]
    assert used == set(properties)
    assert all(each["title"] and each["description"] and each["type"] for each in properties.values())


def test_the_docker_pool_uses_the_network_volumes_and_limits_of_compose() -> None:
    template = json.loads((DOCKER / "pools" / "docker.json").read_text())
    properties = template["variables"]["properties"]
    whole = compose("compose.yaml", SECRETS)
    worker, run = whole["services"]["worker"], template["job_configuration"]["container_create_kwargs"]
    for name in ("user", "read_only", "cap_drop", "security_opt"):
        assert run[name] == worker[name]
    assert [":".join(each) for each in run["tmpfs"].items()] == worker["tmpfs"]
    mounted = {each.split(":")[0]: each.split(":")[1] for each in whole["services"]["worker"]["volumes"]}
    named = {f"{whole['name']}_{volume}:{mounted[volume]}" for volume in whole["volumes"] if volume in mounted}
    assert set(properties["volumes"]["default"]) == named
    assert properties["networks"]["default"] == [f"{whole['name']}_default"]
    # docker-py's own parser takes the GPU request as it stands in the file
    from docker.types import HostConfig

    requests = properties["device_requests"]["default"]
    (made,) = HostConfig("1.43", device_requests=requests)["DeviceRequests"]
    assert (made["Driver"], made["Count"], made["Capabilities"]) == ("nvidia", -1, [["gpu"]])


def test_the_helm_values_name_the_prefect_that_is_locked() -> None:
    locked = re.search(r"^prefect==(\S+)", (PROJECT / "constraints.txt").read_text(), re.MULTILINE)
    assert locked is not None
    worker = helm_values()["worker"]
    assert worker["image"]["prefectTag"] == f"{locked[1]}-python3.11-kubernetes"
    assert (worker["config"]["type"], worker["apiConfig"]) == ("kubernetes", "selfHostedServer")
    text = (DOCKER / "kubernetes" / "prefect-worker-values.yaml").read_text()
    made = re.search(r"create configmap (\S+)", text)
    assert made is not None
    assert worker["config"]["baseJobTemplate"]["existingConfigMapName"] == made[1]
