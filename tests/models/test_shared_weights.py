"""Weights in shared memory: the same objects, seen by every process that maps them, gone with the last."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from capipe.models.shared_weights import attach, share


def network(width: int = 5) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, width), nn.LayerNorm(width), nn.Linear(width, 3, bias=False))
    model[2].weight = nn.Parameter(torch.randn(3, width, dtype=torch.bfloat16))
    return model


def test_sharing_keeps_the_parameters_and_their_values() -> None:
    model, plain = network(), network()
    before = list(model.parameters())
    share(model)
    assert all(one is other for one, other in zip(before, model.parameters(), strict=True))
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), plain.parameters(), strict=True))


def test_what_one_learns_another_reads() -> None:
    model, reader = network(), network()
    attach(reader, share(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[1](model[0](torch.ones(2, 3))).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, network()[0].weight)
    assert torch.equal(reader[0].weight, model[0].weight) and torch.equal(reader[2].weight, model[2].weight)


def test_tied_weights_stay_tied() -> None:
    model = network(3)
    model[2].weight = model[0].weight
    shared = share(model)
    assert model[2].weight is model[0].weight and len(shared.places) == 4


def test_another_process_maps_them() -> None:
    model = network()
    shared = share(model)
    place = shared.places["0.weight"]
    code = (
        "import sys, torch; path, size, start = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]); "
        "storage = torch.UntypedStorage.from_file(path, shared=True, nbytes=size); "
        "torch.empty(0).set_(storage)[start // 4] = 7.0"
    )
    subprocess.run([sys.executable, "-c", code, shared.path, str(shared.size), str(place.start)], check=True)
    assert float(model[0].weight.flatten()[0].detach()) == 7.0


def test_another_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="other weights"):
        attach(network(4), share(network()))


def test_nothing_is_left_on_a_disk() -> None:
    shared = share(network())
    assert "memfd:capipe-weights" in str(Path(shared.path).readlink())
