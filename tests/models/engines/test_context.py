"""The context follows from what is asked; a prompt that does not fit says which option makes room."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from capipe.errors import RunFailed
from capipe.models.engines import loading
from capipe.models.engines.base import GenerationRequest, ImageInput, Prompt, RequestError, Sampling
from capipe.models.engines.context import (
    OTHER_VOCABULARY,
    QUESTION_ROOM,
    TEMPLATE_ROOM,
    context_length,
    image_tokens,
    quiz_room,
    text_room,
)
from capipe.models.engines.loading import EngineConfig, advice, load_engine
from capipe.models.engines.model_folder import resolve_model
from capipe.models.images.grid import ImageGrid
from capipe.stages.annotate.captioner import AnnotateConfig
from capipe.stages.annotate.prompts import NamedPrompt
from capipe.stages.questions.screen import PRESETS
from capipe.stages.questions.write import QuestionsConfig

from ..conftest import MODEL

QWEN3_VL = ImageGrid(32, 65536, 16777216)  # as published: 16,384 tokens at most


def folder(at: Path, config: dict[str, object]) -> Path:
    (at / "config.json").write_text(json.dumps(config))
    return at


def test_it_is_what_image_prompt_and_answer_take(tmp_path: Path) -> None:
    published = folder(tmp_path, {"text_config": {"max_position_embeddings": 262144}, "vision_config": {}})
    assert image_tokens(QWEN3_VL) == 16384
    assert context_length(published, QWEN3_VL, text_room(["Describe the image."], 1024)) == 16384 + 512 + 19 + 1024
    small = ImageGrid(32, 65536, 1003520)
    assert context_length(published, small, text_room(["x"], 2048)) == 980 + 512 + 1 + 2048
    assert context_length(published, None, quiz_room(1024, 4)) == TEMPLATE_ROOM + QUESTION_ROOM + 2048 + 4
    assert context_length(published, QWEN3_VL, None) is None  # nothing is known of what will be asked


def test_it_is_never_more_than_the_models_own(tmp_path: Path) -> None:
    published = folder(tmp_path, {"max_position_embeddings": 2048, "vision_config": {}})
    assert context_length(published, QWEN3_VL, 600) == 2048
    assert context_length(folder(tmp_path, {}), QWEN3_VL, 600) == 16984


def test_no_text_has_more_tokens_than_bytes() -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(resolve_model(MODEL)))
    for text in ("Describe the image in detail.", "zażółć gęślą jaźń", "描述这张图片", "🦙" * 20, "x" * 999):
        assert len(tokenizer.encode(text, add_special_tokens=False)) <= text_room([text], 0) - TEMPLATE_ROOM


def test_stages_know_what_they_need() -> None:
    prompts = (NamedPrompt("short", "Say."), NamedPrompt("long", "Say all of it."))
    config = AnnotateConfig(prompts=prompts, system="Be brief.", max_tokens=100)
    assert config.room == TEMPLATE_ROOM + len("Be brief.Say all of it.") + 100
    writer = QuestionsConfig(per_image=3, max_tokens=200)
    assert writer.room == TEMPLATE_ROOM + len(writer.prompt.text.encode()) + 200
    assert PRESETS["caprl"].room == TEMPLATE_ROOM + QUESTION_ROOM + PRESETS["caprl"].reader.answer_tokens
    assert quiz_room(10, 0) - quiz_room(0, 0) == 10 * OTHER_VOCABULARY


async def test_an_engine_gets_it_unless_the_user_gave_another(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []

    def start(options: object) -> object:
        lengths.append(options.max_model_len)  # type: ignore[attr-defined]
        raise ValueError("far enough")

    monkeypatch.setattr("capipe.models.engines.vllm.engine.start_vllm_engine", start)
    path, grid = resolve_model(MODEL), loading.image_grid(resolve_model(MODEL))
    for given in ({}, {"room": 600}, {"room": 600, "max_model_len": 300}):
        with pytest.raises(RunFailed, match="far enough"):
            await load_engine(EngineConfig("vllm", MODEL, **given))
    assert lengths == [None, context_length(path, grid, 600), 300]


@pytest.mark.parametrize("kind", ["transformers", pytest.param("vllm", marks=pytest.mark.slow)])
async def test_a_prompt_that_does_not_fit_names_the_option(kind: str) -> None:
    engine = await load_engine(EngineConfig(kind, MODEL, max_model_len=96))
    assert engine.grid is not None
    side = engine.grid.factor * 6
    image = ImageInput("0" * 64, np.zeros((side, side, 3), np.uint8))
    sampling = Sampling(max_tokens=4)
    assert (await engine.generate(GenerationRequest(Prompt("Describe the image.", image), sampling))).n_tokens > 0
    for prompt in (Prompt("Describe the image. " * 40, image), Prompt("Describe the image. " * 40)):
        with pytest.raises(RequestError, match=r"tokens leave no room to answer in 96; give a larger --max-model-len"):
            await engine.generate(GenerationRequest(prompt, sampling))
    await engine.aclose()


@pytest.mark.parametrize(
    "reason",
    [
        "ValueError: To serve at least one request with the model's max seq len (262144), (36.0 GiB KV cache is needed",
        "ValueError: Free memory on device cuda:0 (10.1/79.1 GiB) on startup is less than desired GPU memory",
        "ValueError: No available memory for the cache blocks.",
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
    ],
)
def test_messages_about_memory_name_what_changes_it(reason: str) -> None:
    assert all(option in advice(reason) for option in ("--max-model-len", "--gpu-memory", "--max-pixels"))


def test_other_messages_do_not() -> None:
    assert advice("ImportError: no libcuda.so.1") == "--engine transformers does without it"
