from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from capipe.models.tiny.train import build, bundle
from capipe.models.tiny.train.architectures import GRID_THW, IMAGE_TOKENS, build_processor
from capipe.models.tiny.train.batches import PROMPTS, batches, most_things, picture
from capipe.models.tiny.train.optim import orthogonal
from capipe.models.tiny.train.texts.tokenizer import END, SPECIAL, build_tokenizer
from capipe.models.tiny.train.train_captioner import LONGEST, CaptionerPlan, Trainer, caption_losses
from capipe.models.tiny.train.vision import image_tokens, patches, reading_loss
from capipe.models.tiny.world.captions import dense_caption
from capipe.models.tiny.world.prompts import messages
from capipe.models.tiny.world.scenes import scenes

PLAN = CaptionerPlan(steps=20, reading_steps=8, warmup=5, workers=0)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(0)


@pytest.fixture(scope="module")
def trainer(tokenizer: PreTrainedTokenizerFast) -> Trainer:
    return Trainer(PLAN, tokenizer)


def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in ("A large red circle.", 'Schöne Grüße, "日本語" 🙂\n\n\t 42!', "e\u0301", "\x00\x7f"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert all(len(tokenizer(token).input_ids) == 1 for token in SPECIAL)


def test_the_longest_captions_fit(tokenizer: PreTrainedTokenizerFast, trainer: Trainer) -> None:
    rng = Random(0)
    longest = max(len(tokenizer(dense_caption(scene, rng)).input_ids) for scene in scenes("train", 2000, seed=0))
    assert longest < 80
    assert max(map(len, trainer.prompts)) + longest < LONGEST


def test_batches_depend_on_seed_and_step_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    third = list(batches(tokenizer, 0, 0, 3, workers=0))[2]
    resumed = next(batches(tokenizer, 0, 2, 3, workers=0))
    assert torch.equal(third.pixels, resumed.pixels)
    assert (third.prompts, third.answers) == (resumed.prompts, resumed.answers)
    assert third.answers != next(batches(tokenizer, 1, 2, 3, workers=0)).answers
    assert [most_things(step) for step in (0, 100, 300, 5000)] == [2, 3, 5, 5]


def test_training_feeds_what_the_processor_feeds(trainer: Trainer) -> None:
    processor = build_processor(trainer.tokenizer)
    pixels = picture(next(scenes("train", 1, seed=0)), Random(0))
    for prompt, ids in zip(PROMPTS, trainer.prompts, strict=True):
        text = processor.apply_chat_template(messages(prompt), add_generation_prompt=True)
        inputs = processor(text=[text], images=[Image.fromarray(pixels)], return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == ids
        assert ids[trainer.image_at : trainer.image_at + IMAGE_TOKENS] == [trainer.model.config.image_token_id] * 16
    assert inputs["image_grid_thw"].tolist() == [list(GRID_THW)]
    assert torch.allclose(inputs["pixel_values"], patches(torch.from_numpy(pixels)[None]), atol=1e-5)


@torch.inference_mode()
def test_batched_vision_equals_transformers(trainer: Trainer) -> None:
    pixels = next(batches(trainer.tokenizer, 0, 0, 1, workers=0)).pixels[:5]
    tower = trainer.model.model.visual
    one_by_one = tower(patches(pixels), grid_thw=torch.tensor([GRID_THW] * 5)).pooler_output
    assert torch.allclose(image_tokens(tower, pixels).flatten(0, 1), one_by_one, atol=1e-5)


@torch.inference_mode()
def test_caption_loss_equals_transformers(trainer: Trainer) -> None:
    batch = next(batches(trainer.tokenizer, 0, 0, 1, workers=0))
    batch = replace(batch, owners=batch.owners[:6], prompts=batch.prompts[:6], answers=batch.answers[:6])
    fast = caption_losses(trainer, image_tokens(trainer.model.model.visual, batch.pixels), batch).loss
    losses, counts = [], []
    for owner, prompt, answer in zip(batch.owners, batch.prompts, batch.answers, strict=True):
        ids = torch.tensor([trainer.prompts[prompt] + answer])
        labels = ids.clone()
        labels[:, : -len(answer)] = -100
        assert answer[-1] == trainer.tokenizer.convert_tokens_to_ids(END)
        out = trainer.model(
            input_ids=ids,
            labels=labels,
            pixel_values=patches(batch.pixels[owner : owner + 1]),
            image_grid_thw=torch.tensor([GRID_THW]),
            mm_token_type_ids=(ids == trainer.model.config.image_token_id).int(),
        )
        losses.append(out.loss.item() * len(answer))
        counts.append(len(answer))
    assert fast.item() == pytest.approx(sum(losses) / sum(counts), rel=1e-5)


def test_muon_directions_are_nearly_orthogonal() -> None:
    torch.manual_seed(0)
    for shape in ((3, 16, 40), (3, 40, 16)):
        singular = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert singular.min() > 0.5 and singular.max() < 1.3


@pytest.mark.parametrize(("step", "minutes", "rate"), [(0, 0.0, 0.02), (100, 1.0, 1.0), (100, 7.5, 0.5), (100, 10, 0)])
def test_rates_warm_up_stay_and_fall(step: int, minutes: float, rate: float) -> None:
    assert CaptionerPlan(minutes=10).rate(step, minutes * 60) == pytest.approx(rate)


@pytest.mark.slow
def test_training_lowers_the_loss_and_resumes_to_the_same_weights(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    whole, first, second = (Trainer(PLAN, tokenizer) for _ in range(3))
    batch = next(batches(tokenizer, 0, 0, 1, workers=0))

    @torch.inference_mode()
    def losses() -> tuple[float, float]:
        tokens = image_tokens(whole.model.model.visual, batch.pixels)
        reading, _ = reading_loss(whole.reader(tokens), batch.truth)
        return reading.item(), caption_losses(whole, tokens, batch).loss.item()

    before = losses()
    list(whole.run(lambda line: None))
    assert losses()[0] < 0.9 * before[0] and losses()[1] < 0.7 * before[1]
    for progress in first.run(lambda line: None):
        if progress.step == 10:
            break
    first.save(tmp_path / "run.pt")
    second.load(tmp_path / "run.pt")
    list(second.run(lambda line: None))
    assert second.progress.step == whole.progress.step == 20
    for name, weight in second.model.state_dict().items():
        assert torch.equal(weight, whole.model.state_dict()[name]), name


@pytest.mark.slow
def test_build_exports_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    arguments = ["captioner", "--seed", "1", "--steps", "2", "--out", str(out), "--checkpoints", str(tmp_path)]
    assert build.main(arguments) == 0
    assert {"config.json", "model.safetensors", "tokenizer.json", "processor_config.json"} <= {
        file.name for file in out.iterdir()
    }
    monkeypatch.setattr(bundle, "ROOT", tmp_path)  # without --out, the end bundles it
    assert build.main([*arguments[:5], "--resume", "--checkpoints", str(tmp_path)]) == 0
    bundled, exported = (bundle.load_tensors(folder) for folder in (tmp_path / "captioner", out))
    assert (tmp_path / "captioner" / bundle.INDEX).is_file() and bundled.keys() == exported.keys()
    assert all(torch.equal(bundled[name], exported[name]) for name in exported)
    with pytest.raises(ValueError, match="seed 1"):
        Trainer(replace(PLAN, seed=2), build_tokenizer(1)).load(tmp_path / "tiny-captioner-1.pt")
