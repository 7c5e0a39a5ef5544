"""Student to ONNX, int8 and a model card; a runtime without torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
