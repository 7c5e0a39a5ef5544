"""The example flow on a cluster of two workers, in a process of its own: JSON on stdin, what it came to on stdout."""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main() -> None:
    """Start a cluster and a server of Prefect's, run the flow, stop both."""
    out, sys.stdout = sys.stdout, sys.stderr
    spec: dict[str, Any] = json.load(sys.stdin)
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": spec["store_bytes"], "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, object_store_memory=spec["store_bytes"])
        os.environ["RAY_ADDRESS"] = cluster.address
        from prefect.testing.utilities import prefect_test_harness

        from examples.encode_on_ray import precompute_on_ray
        from teacher_cache.pipeline.settings.precompute import PrecomputeConfig

        with prefect_test_harness(server_startup_timeout=300):
            found = precompute_on_ray(PrecomputeConfig(**spec["config"]), workers=2)
            again = precompute_on_ray(PrecomputeConfig(**spec["config"]), workers=2)
        out.write(json.dumps({"found": found, "again": again}))
        out.flush()
    finally:
        cluster.shutdown()
