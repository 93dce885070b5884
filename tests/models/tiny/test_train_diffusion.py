"""The diffusion model: the text encoder it begins with, its training, and what it draws."""

from __future__ import annotations

from pathlib import Path
from random import Random

import open_clip
import pytest
import torch
from transformers import BertTokenizer

pytest.importorskip("diffusers")

from capipe.models.bundled import is_bundled, resolve
from capipe.models.pixel_diffusion import PixelDiffusionPipeline
from capipe.models.scorers.clip import encode_trimmed
from capipe.models.tiny.train.train_diffusion import (
    CELLS,
    DiffusionBatches,
    DiffusionPlan,
    DiffusionTrainer,
    build_text_encoder,
    build_text_tokenizer,
    diffusion_report,
    generated_right,
)
from capipe.models.tiny.train.train_vgg import levels, pictures
from capipe.models.tiny.world.render import render
from capipe.models.tiny.world.scenes import scenes

PLAN = DiffusionPlan(seed=4, steps=4, images=2, reading_steps=2, warmup=1, workers=0)


@torch.inference_mode()
def test_the_text_encoder_computes_what_the_clip_it_came_from_does() -> None:
    tokenizer = build_text_tokenizer()
    model = build_text_encoder(tokenizer)
    clip = open_clip.create_model(f"local-dir:{resolve('tiny/clip')}").eval().float()
    texts = ["A red star.", "There is a large blue circle in the top left on a white background."]
    ids = BertTokenizer.from_pretrained(resolve("tiny/clip"))(texts, padding=True, return_tensors="pt").input_ids
    last = (ids != tokenizer.pad_token_id).sum(1) - 1
    ours = tokenizer(texts).input_ids
    assert [row[: -len(CELLS)] for row in ours] == [row[: at + 1] for row, at in zip(ids.tolist(), last, strict=True)]
    assert all(tokenizer.convert_ids_to_tokens(row[-len(CELLS) :]) == list(CELLS) for row in ours)
    states = model.eval()(input_ids=ids).last_hidden_state[torch.arange(2), last]
    assert torch.allclose(states @ clip.text_projection, encode_trimmed(clip, ids), atol=1e-3)


def test_rendered_scenes_have_the_right_colours_and_others_do_not() -> None:
    shown = list(scenes("heldout", 100, seed=0))
    true = levels(pictures([render(scene, Random(at), 32) for at, scene in enumerate(shown)])) / 2 + 0.5
    assert min(generated_right(true, shown).values()) > 0.97
    assert max(generated_right(true.flip(0), shown).values()) < 0.5


def test_a_batch_depends_on_its_seed_and_step_alone() -> None:
    first, again = (DiffusionBatches(PLAN)[3] for _ in range(2))
    assert torch.equal(first.pixels, again.pixels) and first.texts == again.texts
    told = [text for step in range(60) for text in DiffusionBatches(PLAN)[step].texts]
    assert 0 < told.count("") < len(told) / 4


@pytest.mark.slow
def test_training_resumes_where_it_was_and_exports_a_pipeline(tmp_path: Path) -> None:
    whole, stopped, resumed = (DiffusionTrainer(PLAN) for _ in range(3))
    list(whole.run(lambda line: None))
    for progress in stopped.run(lambda line: None):
        if progress.step == 3:
            break
    stopped.save(tmp_path / "checkpoint.pt")
    resumed.load(tmp_path / "checkpoint.pt")
    list(resumed.run(lambda line: None))
    for part in ("model", "mean"):
        for ours, theirs in zip(getattr(resumed, part).parameters(), getattr(whole, part).parameters(), strict=True):
            assert torch.equal(ours, theirs)
    for _ in range(2):  # the second time over the first
        whole.export(tmp_path / "drawer")
    pipeline = PixelDiffusionPipeline.from_pretrained(tmp_path / "drawer", torch_dtype=torch.float32)
    drawn = pipeline("a red star", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt")
    assert drawn.images.shape == (1, 3, 32, 32)


@pytest.mark.slow
@pytest.mark.skipif(not is_bundled("diffusion"), reason="the weights of tiny/diffusion are not here")
def test_the_bundled_model_draws_colours_where_they_belong() -> None:
    found = diffusion_report(resolve("tiny/diffusion"), 60, seed=11)
    assert found["things"] >= 0.5 and found["empty"] >= 0.8
