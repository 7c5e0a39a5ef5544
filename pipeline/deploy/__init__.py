"""Student to ONNX, int8 and a model card; a runtime without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from teacher_cache.lazy_names import lazy_names

if TYPE_CHECKING:
    from teacher_cache.pipeline.deploy.record import Deployment as Deployment
    from teacher_cache.pipeline.deploy.record import DeploymentError as DeploymentError
    from teacher_cache.pipeline.deploy.run import DeployResult as DeployResult
    from teacher_cache.pipeline.deploy.run import deploy as deploy
    from teacher_cache.pipeline.deploy.runtime import StudentRuntime as StudentRuntime

__all__ = ["DeployResult", "Deployment", "DeploymentError", "StudentRuntime", "deploy"]

_HOMES = {
    "DeployResult": "run",
    "Deployment": "record",
    "DeploymentError": "record",
    "StudentRuntime": "runtime",
    "deploy": "run",
}

__getattr__ = lazy_names(__name__, _HOMES)
