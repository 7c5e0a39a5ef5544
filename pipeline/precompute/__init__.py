"""Dataset and teacher to cache: plan, encode, reuse, import, forecast, repair, sampled proof."""

from __future__ import annotations

from typing import TYPE_CHECKING

from teacher_cache.lazy_names import lazy_names

if TYPE_CHECKING:
    from teacher_cache.pipeline.precompute.encode import encode_chunks as encode_chunks
    from teacher_cache.pipeline.precompute.encode import encode_shared as encode_shared
    from teacher_cache.pipeline.precompute.executors import open_executor as open_executor
    from teacher_cache.pipeline.precompute.forecast import Forecast as Forecast
    from teacher_cache.pipeline.precompute.import_folder import ImportResult as ImportResult
    from teacher_cache.pipeline.precompute.import_folder import import_rows as import_rows
    from teacher_cache.pipeline.precompute.plan import plan_precompute as plan_precompute
    from teacher_cache.pipeline.precompute.repair import RepairResult as RepairResult
    from teacher_cache.pipeline.precompute.run import PrecomputeResult as PrecomputeResult
    from teacher_cache.pipeline.precompute.run import precompute as precompute
    from teacher_cache.pipeline.precompute.sample_proof import ProofResult as ProofResult
    from teacher_cache.pipeline.precompute.sample_proof import prove_sample as prove_sample

_HOMES = {
    "Forecast": "forecast",
    "ImportResult": "import_folder",
    "PrecomputeResult": "run",
    "ProofResult": "sample_proof",
    "RepairResult": "repair",
    "encode_chunks": "encode",
    "encode_shared": "encode",
    "import_rows": "import_folder",
    "open_executor": "executors",
    "plan_precompute": "plan",
    "precompute": "run",
    "prove_sample": "sample_proof",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605

__getattr__ = lazy_names(__name__, _HOMES)
