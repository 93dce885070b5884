"""The bundled captioner, as anyone would load it."""

from __future__ import annotations

import io
from random import Random

import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from capipe.models.bundled import resolve
from capipe.models.tiny.train.eval.captioner import caption, evaluate, graded_captions, load
from capipe.models.tiny.world.corpus import samples
from capipe.models.tiny.world.grade import total
from capipe.models.tiny.world.prompts import DENSE, messages
from capipe.models.tiny.world.render import render
from capipe.models.tiny.world.scenes import scenes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def captioner() -> tuple[PreTrainedModel, ProcessorMixin]:
    return load(resolve("tiny/captioner"))


def test_quality_on_held_out_scenes(captioner: tuple[PreTrainedModel, ProcessorMixin]) -> None:
    report = evaluate(*captioner, count=60, seed=11)
    assert report.precision >= 0.97 and report.recall >= 0.95
    assert 0.01 <= report.plain_dense <= 0.3 and report.short_dense <= 0.05
    assert report.finished == 1.0


@pytest.mark.parametrize("size", [140, 224, 448])
def test_larger_pictures_are_described_as_well(captioner: tuple[PreTrainedModel, ProcessorMixin], size: int) -> None:
    corpus = list(samples(30, "heldout", seed=12, size=size))
    told = caption(*captioner, [each.image for each in corpus], DENSE[0])
    whole = total(graded_captions(corpus, told))
    assert whole.precision() >= 0.97 and whole.recall() >= 0.95


def test_an_image_has_sixteen_tokens_at_most(captioner: tuple[PreTrainedModel, ProcessorMixin]) -> None:
    model, processor = captioner
    text = processor.apply_chat_template(messages(DENSE[0]), add_generation_prompt=True)
    assert "system" not in text
    for size in ((112, 112), (448, 448), (640, 360), (40, 40)):
        inputs = processor(text=[text], images=[Image.new("RGB", size)], return_tensors="pt")
        assert 0 < (inputs["input_ids"] == model.config.image_token_id).sum() <= 16


@torch.inference_mode()
def test_a_system_message_does_not_break_it(captioner: tuple[PreTrainedModel, ProcessorMixin]) -> None:
    model, processor = captioner
    conversation = [{"role": "system", "content": "You are a careful describer."}, *messages(DENSE[0])]
    text = processor.apply_chat_template(conversation, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nYou are a careful describer.<|im_end|>\n<|im_start|>user\n")
    buffer = io.BytesIO()
    render(next(scenes("heldout", 1, seed=0)), Random(0)).save(buffer, "PNG")
    inputs = processor(text=[text], images=[Image.open(buffer)], return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=8, do_sample=False).shape[1] > inputs["input_ids"].shape[1]
