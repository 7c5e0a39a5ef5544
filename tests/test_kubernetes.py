"""What docker/ gives to Kubernetes fits Kubernetes' own schemas, of the oldest and the newest release that is known."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import yaml

from tests.container_files import DOCKER, job_of_the_pool, kubernetes_objects

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")

VERSIONS = ["1.29", kubernetes_validate.latest_version()]
JOBS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "all": {
        "gpus": 2,
        "labels": {"team": "a"},
        "env": [{"name": "PREFECT_API_URL", "value": "http://prefect-server:4200/api"}],
        "node_selector": {"gpu": "h100"},
        "tolerations": [],
        "memory_limit": "64Gi",
        "namespace": "ml",
    },
    "without a GPU": {"gpus": 0, "image": "registry.example.com/teacher-cache:cpu"},
}


def deployment_of_the_chart() -> dict[str, Any]:
    """A Deployment with what the Helm values say in Kubernetes' own words, where the chart puts it."""
    worker = yaml.safe_load((DOCKER / "kubernetes" / "prefect-worker-values.yaml").read_text())["worker"]
    probe = worker["livenessProbe"]["config"]
    container = {
        "name": "prefect-worker",
        "image": f"{worker['image']['repository']}:{worker['image']['prefectTag']}",
        "resources": worker["resources"],
        "securityContext": worker["containerSecurityContext"],
        "livenessProbe": {"httpGet": {"path": "/health", "port": 8080}, **probe},
    }
    labels = {"app.kubernetes.io/name": "prefect-worker"}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "prefect-worker"},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {"securityContext": worker["podSecurityContext"], "containers": [container]},
            },
        },
    }


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("made", kubernetes_objects("worker.yaml"), ids=lambda made: made["metadata"]["name"])
def test_the_manifests_fit_their_schema(made: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(made, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("variables", JOBS.values(), ids=JOBS)
def test_a_job_of_the_pool_fits_its_schema(variables: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(job_of_the_pool(**variables), version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_what_the_helm_values_hand_on_fits_its_schema(version: str) -> None:
    kubernetes_validate.validate(deployment_of_the_chart(), version, strict=True)


def test_a_misspelt_field_is_refused() -> None:
    """So that the tests above could fail."""
    job = deepcopy(job_of_the_pool())
    job["spec"]["template"]["spec"]["containers"][0]["imagePullPolice"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, VERSIONS[-1], strict=True)
