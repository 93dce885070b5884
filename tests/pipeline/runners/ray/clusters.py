"""Ray clusters of several machines, all of them this one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

SLOW = [sys.executable, "-c", "from tests.pipeline.runners.ray import slow_jobs; slow_jobs.main()"]
STORE = 80 * 2**20


def three_machines() -> Iterator[Any]:
    """A cluster of three machines with room for one worker each, on loopback alone."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # before it is imported
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": STORE})
    for _ in range(2):
        made.add_node(num_cpus=1, object_store_memory=STORE)
    yield made
    made.shutdown()
