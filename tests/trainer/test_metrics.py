"""Named sums and counts."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from capipe.trainer.distributed import ALONE, Distributed
from capipe.trainer.metrics import Metrics


class Twice:
    """Two processes with equal metrics; counts how often they talk."""

    calls = 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return values * 2


def test_means_are_sums_over_counts() -> None:
    metrics = Metrics(["loss", "kl"])
    metrics.extend("loss", [1.0, 0.5])
    metrics.add("loss", 3.0, 2.0)
    assert (metrics.total("loss"), metrics.count("loss"), metrics.mean("loss")) == (4.5, 4, 1.125)
    assert metrics.mean("kl") is None
    with pytest.raises(KeyError):
        metrics.add("typo", 1.0)
    metrics.include(metrics)
    assert (metrics.total("loss"), metrics.count("loss"), metrics.mean("kl")) == (9.0, 8, None)


def test_processes_add_up_all_metrics_at_once() -> None:
    metrics, processes = Metrics(["reward", "captions"]), Twice()
    metrics.extend("reward", [0.25, 0.5])
    metrics.add("captions", 7)
    both = metrics.over(cast(Distributed, processes))
    assert processes.calls == 1 and both.total("captions") == 14
    assert (both.total("reward"), both.count("reward"), both.mean("reward")) == (1.5, 4, 0.375)
    assert metrics.over(ALONE).total("reward") == 0.75 and metrics.total("reward") == 0.75
