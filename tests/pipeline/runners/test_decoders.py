"""Decoding processes follow from the machine where a worker runs, not from the one where the command was typed."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from capipe.pipeline.commands.gpus import default_decode_workers
from capipe.pipeline.runners.decoders import AUTO, decoders_of, settled
from capipe.pipeline.runners.placement import Placement
from capipe.pipeline.runners.ray.actor import actors_on
from capipe.pipeline.runners.ray.cluster import RayCluster


@dataclass(frozen=True)
class Setup:
    decode_workers: int


@dataclass(frozen=True)
class Described:
    setup: Setup | None


@pytest.mark.parametrize(
    ("cores", "engines", "decoders"), [(128, 8, 15), (192, 8, 16), (8, 8, 1), (2, 1, 1), (1, 0, 1)]
)
def test_cores_are_divided_among_engines(cores: int, engines: int, decoders: int) -> None:
    """No more than the cores together, where each engine has one at least."""
    assert decoders_of(cores, engines) == decoders
    assert cores < 2 * engines or engines * (decoders + 1) <= max(cores, 2)


@pytest.mark.parametrize(
    ("machine_gpus", "workers", "gpus", "machines", "actors"),
    [
        (8, 16, 1, 2, 8),  # a worker for each GPU
        (8, 4, 2, 1, 4),  # tensor parallel
        (8, 3, 1, 2, 3),  # fewer workers than GPUs
        (0, 5, 0, 2, 3),  # spread over machines
        (0, 2, 0, 4, 1),
    ],
)
def test_actors_on_a_machine(machine_gpus: int, workers: int, gpus: int, machines: int, actors: int) -> None:
    assert actors_on(machine_gpus, workers, gpus, machines) == actors


def test_what_a_stage_leaves_open_is_settled_where_it_runs() -> None:
    on_cluster = default_decode_workers(Placement(ray=RayCluster("a:1")))
    assert settled(Described(Setup(on_cluster)), 7) == Described(Setup(7))
    assert settled(Described(Setup(3)), 7) == Described(Setup(3))  # as the user said
    assert settled(Described(Setup(0)), 7) == Described(Setup(0))  # a reader decodes nothing
    assert settled(Described(None), 7) == Described(None)
    assert default_decode_workers(Placement(("0",))) != AUTO
