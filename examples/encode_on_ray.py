"""A flow of your own on a Ray cluster that you have: a task run on each of its workers.

``RAY_ADDRESS`` names the cluster; every node needs the dataset, the weights and this project. Without it Ray starts
one here. Usage: python examples/encode_on_ray.py DATASET TEACHER CACHE
"""

from __future__ import annotations

import os
import sys
from typing import Any

from prefect import flow, task, unmapped
from prefect_ray import RayTaskRunner

from teacher_cache.flows.retries import TRIED_AGAIN
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.storage.format.commits import ChunkRef


@task(**TRIED_AGAIN)
def plan(config: PrecomputeConfig) -> list[ChunkRef]:
    """Write the cache's manifest and tables, or check them; what is still to be encoded."""
    from teacher_cache.pipeline.models.teacher import cached_teacher
    from teacher_cache.pipeline.precompute.plan import plan_precompute

    teacher = cached_teacher(config.teacher, config.pretrained, config.device, config.precision, config.decoder)
    return plan_precompute(config, teacher)


@task(**TRIED_AGAIN)
def encode(config: PrecomputeConfig, pending: list[ChunkRef], worker: int) -> dict[str, Any]:
    """Encode chunks together with the other workers, until all are done. Which process did how many."""
    from teacher_cache.pipeline.models.teacher import cached_teacher
    from teacher_cache.pipeline.precompute.encode import encode_shared

    # a worker of Ray's does one task after another, and keeps its teacher
    teacher = cached_teacher(config.teacher, config.pretrained, config.device, config.precision, config.decoder)
    return {"process": os.getpid(), "chunks": encode_shared(config, teacher, pending)}


@flow(task_runner=RayTaskRunner(address=os.environ.get("RAY_ADDRESS")), persist_result=False)
def precompute_on_ray(config: PrecomputeConfig, workers: int = 2) -> dict[str, Any]:
    """Make or finish a cache; what it holds, and the chunks that each process encoded."""
    from teacher_cache.pipeline.precompute.run import seal_and_summarize

    pending = plan.submit(config).result()
    # where nodes have GPUs, one each: within `with remote_options(num_gpus=1):` of prefect_ray.context
    done = encode.map(unmapped(config), unmapped(pending), range(workers if pending else 0)).result()
    by_process: dict[int, int] = {}
    for each in done:
        by_process[each["process"]] = by_process.get(each["process"], 0) + each["chunks"]
    result = seal_and_summarize(config.cache, sum(by_process.values()), 0.0, config.reuse, pending)
    return {"images": result.images, "chunks": result.chunks, "by_process": by_process}


if __name__ == "__main__":
    dataset, teacher, cache = sys.argv[1:]
    print(precompute_on_ray(PrecomputeConfig(dataset=dataset, teacher=teacher, cache=cache)))
