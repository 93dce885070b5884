"""New weights in a running vLLM: it answers with them and with nothing older, and a probe sees where it does not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch

from capipe.errors import RunFailed
from capipe.models.engines.base import Completion, Engine, EngineDead, GenerationRequest, ImageInput, Prompt, Sampling
from capipe.models.engines.hf.captioner_adapter import barred_ids
from capipe.models.engines.hf.engine import TransformersEngine, batched_lm, load_model
from capipe.models.engines.model_folder import image_grid, resolve_model
from capipe.models.engines.sampling import vision_ids
from capipe.models.engines.vllm.weight_sync import Precision
from capipe.trainer.build import freeze
from capipe.trainer.distributed import ALONE
from capipe.trainer.policy.decoder import DecoderPolicy
from capipe.trainer.recipe_sections import RolloutConfig, TrainedConfig
from capipe.trainer.sampling.weight_sync_check import WeightSyncCheck, tolerance
from capipe.trainer.sampling.weight_transfer.base import PolicyModel
from capipe.trainer.sampling.weight_transfer.direct import open_direct
from capipe.trainer.sampling.weight_transfer.folder import FolderTransfer

from ..conftest import MODEL, PLAIN, ROOM

pytest.importorskip("vllm")
pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def engine() -> AsyncIterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "0")  # restored afterwards
        made = started()
        yield made
        await made.aclose()
    with pytest.raises(EngineDead):
        await made.reload(resolve_model(MODEL))


def started(**options: Any) -> Any:
    """A trained engine, with vLLM's own transfer, through main memory."""
    from capipe.models.engines.vllm.config import VLLMOptions
    from capipe.models.engines.vllm.engine import start_vllm_engine
    from capipe.models.engines.vllm.environment import allow_handles

    from .host_transfer import BACKEND, EXTENSION

    path = resolve_model(MODEL)
    options = {"max_model_len": ROOM, "concurrency": 32, "trained": True, "transfer": BACKEND, **options}
    options["engine_args"] = {"worker_extension_cls": EXTENSION}
    allow_handles()
    return start_vllm_engine(VLLMOptions(str(path), image_grid(path), **options))


def changed(seed: int, learns: TrainedConfig | None = None) -> Any:
    """The captioner with weights a little off: the tower's and the tied head's among them, or those that learn."""
    model: Any = load_model(str(resolve_model(MODEL)), sees=True, dtype="float32", device="cpu")
    if learns is not None:
        freeze(model, learns)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.05 * weight.std())
    return model


async def send_weights(engine: Any, model: Any, folder: Path, everything: bool = True) -> None:
    """As a step of training does."""
    transfer = FolderTransfer(PolicyModel(model, await engine.precision()), engine, ALONE, folder, shared=False)
    await transfer.prepare(everything)
    await transfer.send(everything)


def reader_of(model: Any) -> TransformersEngine:
    path = resolve_model(MODEL)
    grid = image_grid(path)
    return TransformersEngine(batched_lm(model, str(path), grid, ROOM), grid, 64)


async def draw(engine: Engine, pictures: list[ImageInput]) -> list[Completion]:
    requests = [
        GenerationRequest(Prompt(PLAIN, image), Sampling(1.0, 1.0, 30, seed), logprobs=True)
        for image in pictures
        for seed in range(6)
    ]
    return await asyncio.gather(*map(engine.generate, requests))


def agree(ours: list[Completion], theirs: list[Completion]) -> None:
    same = [(one, other) for one, other in zip(ours, theirs, strict=True) if one.token_ids == other.token_ids]
    assert len(same) >= len(ours) - 1  # a draw may lie on the edge between two tokens
    for one, other in same:
        assert one.logprobs == pytest.approx(other.logprobs, abs=2e-3)


def probe_of(model: Any, image: ImageInput, bound: float = 1e-3) -> WeightSyncCheck:
    prompt = Prompt(" ".join([PLAIN] * 8), image)  # longer than a block of the cache, which holds whole ones alone
    return WeightSyncCheck(prompt, reader_of(model).lm.prepare(prompt), DecoderPolicy(model, barred_ids(model)), bound)


async def test_answers_are_those_of_the_new_weights(engine: Any, pictures: list[ImageInput], tmp_path: Path) -> None:
    before = await draw(engine, pictures[:4])  # so that its caches are full of these prompts
    for seed in (1, 2):
        model = changed(seed)
        await send_weights(engine, model, tmp_path)
        after, reference = await draw(engine, pictures[:4]), reader_of(model)
        agree(after, await draw(reference, pictures[:4]))
        await reference.aclose()
        assert [each.token_ids for each in after] != [each.token_ids for each in before]
        assert await probe_of(model, pictures[0]).check(engine, seed) < 1e-4
        before = after


async def test_the_probe_catches_what_a_reload_leaves_behind(
    engine: Any, pictures: list[ImageInput], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = pictures[5]
    old, new = changed(3), changed(4)
    await send_weights(engine, old, tmp_path)
    assert await probe_of(old, image).check(engine, 0) < 1e-4
    probe = probe_of(new, image)
    with pytest.raises(RunFailed, match=r"other weights than the policy.*rollout\.probe"):
        await probe.check(engine, 0)  # nothing was reloaded at all

    async def forged(*arguments: Any, **rest: Any) -> bool:
        return True  # as if it had been emptied

    with monkeypatch.context() as patch:  # the prefix cache alone: without the others' reset vLLM itself fails aloud
        patch.setattr(engine._llm, "reset_prefix_cache", forged)
        await send_weights(engine, new, tmp_path)
    with pytest.raises(RunFailed, match="kept caches of older ones"):
        await probe.check(engine, 0)
    await engine.reload(tmp_path)
    assert await probe.check(engine, 0) < 1e-4

    third = changed(5)
    third.save_pretrained(tmp_path / "third")
    path = str(tmp_path / "third")
    await engine._llm.collective_rpc("reload_weights", kwargs={"weights_path": path})  # the head stays old
    await engine._llm.reset_prefix_cache()
    await engine._llm.reset_mm_cache()
    await engine._llm.reset_encoder_cache()
    with pytest.raises(RunFailed, match="differ by"):
        await probe_of(third, image).check(engine, 0)


LLM_ONLY, VISION_TOO = TrainedConfig(), TrainedConfig(vision=True)


async def test_only_what_learns_is_written_and_read(engine: Any, pictures: list[ImageInput], tmp_path: Path) -> None:
    await send_weights(engine, changed(1, LLM_ONLY), tmp_path / "start")
    model = changed(2, LLM_ONLY)
    await send_weights(engine, model, tmp_path, everything=False)
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["learning-00000.safetensors"]
    assert await probe_of(model, pictures[0]).check(engine, 0) < 1e-4
    tower = changed(3, VISION_TOO)
    for weight in tower.model.visual.parameters():
        weight.requires_grad_(False)
    await send_weights(engine, tower, tmp_path / "without", everything=False)
    with pytest.raises(RunFailed, match="differ by"):  # its tower was not sent
        await probe_of(tower, pictures[0]).check(engine, 0)


async def test_a_fused_matrix_is_given_whole(engine: Any, pictures: list[ImageInput], tmp_path: Path) -> None:
    """vLLM has queries, keys and values in one matrix, of which it keeps nothing that it is not given."""
    start = changed(1, LLM_ONLY)
    await send_weights(engine, start, tmp_path / "start")
    start.requires_grad_(False)
    layer = start.model.language_model.layers[0].self_attn
    layer.q_proj.weight.requires_grad_(True)
    layer.q_proj.weight.data.mul_(1.2)
    alone = PolicyModel(start, await engine.precision())
    assert {name.split(".")[-2] for name in alone.learning} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    await send_weights(engine, start, tmp_path / "with", everything=False)
    assert await probe_of(start, pictures[0]).check(engine, 0) < 1e-4
    layer.k_proj.weight.data.mul_(1.2)  # what vLLM has in the place of what it is not given may be the old matrix
    alone.learning = frozenset(name for name in alone.learning if name.endswith("q_proj.weight"))
    transfer = FolderTransfer(alone, engine, ALONE, tmp_path / "alone", shared=False)
    await transfer.prepare(everything=False)
    await transfer.send(everything=False)
    with pytest.raises(RunFailed, match="differ by"):
        await probe_of(start, pictures[0]).check(engine, 0)
    await send_weights(engine, start, tmp_path / "start")


async def test_after_all_weights_were_dropped_all_are_read(
    engine: Any, pictures: list[ImageInput], tmp_path: Path
) -> None:
    model = changed(1, LLM_ONLY)
    await send_weights(engine, model, tmp_path)
    await engine._llm.collective_rpc("reset_weights")  # zeros: what a sleep of level 2 leaves behind, or worse
    await send_weights(engine, model, tmp_path, everything=False)
    with pytest.raises(RunFailed, match="differ by"):
        await probe_of(model, pictures[0]).check(engine, 0)
    await send_weights(engine, model, tmp_path)
    assert await probe_of(model, pictures[0]).check(engine, 0) < 1e-4


async def test_vllms_own_transfer_ends_in_the_same_weights(
    engine: Any, pictures: list[ImageInput], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With main memory in the place of CUDA's handles; see `host_transfer.py`."""
    from capipe.models.engines.vllm import weight_transfer

    from .host_transfer import no_cuda

    no_cuda(monkeypatch)
    monkeypatch.setattr(weight_transfer, "open_ipc", partial(weight_transfer.open_ipc, packed=False))
    for seed, everything in ((6, True), (7, False)):
        model = changed(seed, LLM_ONLY)
        policy = PolicyModel(model, await engine.precision())
        transfer = await open_direct(policy, engine, ALONE, RolloutConfig(engine="vllm", sync="direct"))
        await transfer.send(everything)
        assert await probe_of(model, pictures[0]).check(engine, seed) < 1e-4


async def test_a_float32_engine_says_so(engine: Any) -> None:
    assert await engine.precision() == Precision("float32", "float32")
    assert tolerance(await engine.precision(), None) == 1e-3


async def test_a_group_is_rendered_once(
    engine: Any, pictures: list[ImageInput], monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered = 0
    render = engine._vllm_prompt

    def counted(prompt: Prompt) -> Any:
        nonlocal rendered
        rendered += 1
        return render(prompt)

    monkeypatch.setattr(engine, "_vllm_prompt", counted)
    drawn = await draw(engine, pictures[7:9])
    assert rendered == 2 and len({each.token_ids for each in drawn}) > 2


async def test_what_stands_for_pixels_is_never_drawn(engine: Any, pictures: list[ImageInput]) -> None:
    """A thousand tokens at a heat where all are equally likely."""
    requests = [GenerationRequest(Prompt(PLAIN, pictures[0]), Sampling(1e4, 1.0, 60, seed)) for seed in range(120)]
    drawn = await asyncio.gather(*map(engine.generate, requests))
    tokens = [token for each in drawn for token in each.token_ids]
    barred = vision_ids(load_model(str(resolve_model(MODEL)), sees=True, device="cpu").config)
    assert len(tokens) > 1000 and len(set(tokens)) > 400 and not set(tokens) & set(barred)


async def test_vllm_reads_the_ids_that_we_prepare(engine: Any, pictures: list[ImageInput]) -> None:
    from vllm import SamplingParams

    lm = reader_of(changed(0)).lm
    for number, image in enumerate((pictures[0], None)):
        prompt = Prompt(PLAIN, image)
        rendered = await engine._rendered(engine._llm, prompt)
        stream = engine._llm.generate(rendered, SamplingParams(max_tokens=1), f"ids-{number}")
        outputs = [output async for output in stream]
        assert outputs[-1].prompt_token_ids == lm.prepare(prompt).ids.tolist()


async def test_weights_that_are_not_there_end_the_engine(engine: Any, tmp_path: Path) -> None:
    with pytest.raises(EngineDead, match="took no new weights"):
        await engine.reload(tmp_path / "nothing")
