"""vLLM's own weight transfer up to NCCL's and CUDA's calls: what each server, and the other end, is sent."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from capipe.models.engines.router import connect_servers
from capipe.models.engines.vllm.weight_sync import Precision
from capipe.trainer.distributed import ALONE, Distributed
from capipe.trainer.recipe_sections import RolloutConfig
from capipe.trainer.sampling.weight_transfer.base import PolicyModel
from capipe.trainer.sampling.weight_transfer.direct import open_direct

from ...models.chat_server import Double, options, serving
from .test_weight_transfer import Recording, language_model_learns

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow  # vLLM takes some seconds to import

HALF = Precision("bfloat16", "bfloat16")
CACHES = ["/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"]


def accepting(workers: int) -> Double:
    double = Double(lambda n, body: (200, {}, {"success": True}))
    double.workers = workers
    return double


async def test_servers_are_told_what_is_broadcast(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.weight_transfer import nccl_engine

    from capipe.models.engines.vllm import weight_transfer

    opened, sent = list[Any](), list[torch.Tensor]()
    group = SimpleNamespace(broadcast=lambda tensor, src, stream: sent.append(tensor.clone()))
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: opened.append(info) or group)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(weight_transfer, "open_nccl", partial(weight_transfer.open_nccl, packed=False))
    model = PolicyModel(language_model_learns(), HALF)
    one, two = accepting(2), accepting(1)
    with serving(one) as first, serving(two) as second:
        engine: Any = await connect_servers(options(""), [first, second], all_needed=True)
        rollout = RolloutConfig(engine=f"{first},{second}", sync="direct")
        transfer = await open_direct(model, engine, ALONE, rollout)
        for everything in (True, False):
            await transfer.send(everything)
            weights = dict(model.read(everything))
            for double, offset in ((one, 1), (two, 3)):
                paths = ["/init_weight_transfer_engine"] if everything else []
                paths += ["/start_weight_update", "/update_weights", "/finish_weight_update", *CACHES]
                assert double.paths == paths
                if everything:
                    told = double.bodies[0]["init_info"]
                    assert (told["rank_offset"], told["world_size"], told["master_address"]) == (offset, 4, "127.0.0.1")
                    assert told["master_port"] == opened[0].master_port > 0 and opened[0].world_size == 4
                update = double.bodies[paths.index("/update_weights")]["update_info"]
                assert update["names"] == list(weights) and set(update["dtype_names"]) == {"bfloat16"}
                assert update["shapes"] == [list(weight.shape) for weight in weights.values()]
                double.paths.clear()
                double.bodies.clear()
            assert len(sent) == len(weights) and all(map(torch.equal, sent, weights.values()))
            sent.clear()
        await engine.aclose()
    assert len(opened) == 1


async def test_other_processes_only_take_part_in_gathering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    calls = list[str]()
    model = PolicyModel(language_model_learns(), HALF)
    read = list[bool]()
    monkeypatch.setattr(model, "read", lambda everything: read.append(everything) or iter(()))
    rollout = RolloutConfig(engine="http://127.0.0.1:9", sync="direct")
    transfer = await open_direct(model, Recording(calls), Distributed(1, 2), rollout)
    await transfer.send(everything=False)
    assert calls == [] and read == [False]


async def test_the_buffer_on_a_shared_gpu_holds_the_largest_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.packed_tensor import DEFAULT_PACKED_BUFFER_SIZE_BYTES

    infos = list[Any]()

    def opened(info: Any, **rest: Any) -> Any:
        infos.append(info)
        return SimpleNamespace(send_weights=lambda: None)

    monkeypatch.setattr(WeightTransferTrainerFactory, "trainer_init", opened)
    model = PolicyModel(language_model_learns(), HALF)
    for shape, size in (((10, 10), DEFAULT_PACKED_BUFFER_SIZE_BYTES), ((152064, 3584), 152064 * 3584 * 2)):
        monkeypatch.setattr(model, "shapes", {"embedding": shape, "norm": (5,)})
        # Each process has an engine of its own, so each is its transfer's sender.
        await open_direct(model, Recording([]), Distributed(1, 2), RolloutConfig(engine="vllm", sync="direct"))
        info = infos.pop()
        assert (info.packed_buffer_size_bytes, info.packed, info.is_sender) == (size, True, True)
