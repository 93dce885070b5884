"""Plain captioners: their wordings, their tokenizer, and their training up to folders that transformers loads."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer, OPTForCausalLM

from capipe.models.bundled import resolve
from capipe.models.tiny.train.batches import IGNORE
from capipe.models.tiny.train.eval.plain_captioner import PlainCaptioner, plain_report
from capipe.models.tiny.train.plain_models import QUERIES
from capipe.models.tiny.train.texts.web_captions import COMPLETE_SHARE, OPENINGS, plain_caption
from capipe.models.tiny.train.texts.word_tokenizer import BOS, EOS, IMAGE, PAD, build_word_tokenizer
from capipe.models.tiny.train.train_clip_itm import normalised
from capipe.models.tiny.train.train_plain_captioner import (
    PLAIN,
    PlainBatches,
    PlainPlan,
    PlainTrainer,
    VitGpt2Trainer,
    matcher,
    padded,
)
from capipe.models.tiny.world.grade import grade, total
from capipe.models.tiny.world.render import render
from capipe.models.tiny.world.scenes import Scene, Sign, Thing, scenes

PLAN = PlainPlan(seed=4, steps=4, images=3, texts=2, warmup=1, workers=0)
SCENE = Scene("white", (Thing("top left", "star", "red", "large"),), Sign("STOP", "center"))


def trainer(name: str) -> PlainTrainer:
    made: PlainTrainer = PLAIN[name](PLAN)
    return made


def test_plain_captions_are_true_and_mostly_leave_much_out() -> None:
    shown = list(scenes("train", 3000, seed=0))
    told = [plain_caption(scene, Random(at)) for at, scene in enumerate(shown)]
    grades = [grade(scene, text) for scene, text in zip(shown, told, strict=True)]
    whole = total(grades)
    assert whole.precision() > 0.999  # the rest: a matching of claims to things that fits worse than the writer's
    assert whole.hallucinated == 0
    assert 0.45 < whole.stated["color"] / whole.stated["shape"] < 0.65
    left_out = [set(each.expected - each.recalled) - {"count"} for each in grades]
    complete = sum(not each for each in left_out) / len(shown)
    assert COMPLETE_SHARE - 0.02 < complete < COMPLETE_SHARE + 0.02
    for opening in OPENINGS[1:]:
        assert 0.15 < sum(text.startswith(opening) for text in told) / len(shown) < 0.25


def test_a_complete_plain_caption_is_read_as_it_was_meant() -> None:
    told = {plain_caption(SCENE, Random(seed)) for seed in range(200)}
    whole = 'a large red star in the top left and a sign in the center that says "STOP" on a white background'
    assert any(text.endswith(whole) for text in told) and grade(SCENE, whole).stated.total() == 7


def test_words_are_single_tokens_and_any_text_survives() -> None:
    tokenizer = build_word_tokenizer(0, begin=False)
    assert build_word_tokenizer(0, begin=True).get_vocab() == tokenizer.get_vocab()
    for text in ("a large red star", 'Schöne Grüße, "日本語" 🙂\n\t 42!', ""):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer("a picture of a large red star in the top left").input_ids) == 11
    assert [tokenizer.convert_tokens_to_ids(each) for each in (PAD, BOS, EOS, IMAGE)] == [0, 1, 2, 3]
    assert build_word_tokenizer(0, begin=True)("a star").input_ids[0] == 1


def test_a_batch_depends_on_its_seed_and_step_alone() -> None:
    tokenizer = build_word_tokenizer(0, begin=False)
    first, again, next_one = (PlainBatches(tokenizer, PLAN, sees=True)[step] for step in (3, 3, 4))
    assert first.texts == again.texts and torch.equal(first.pixels, again.pixels)
    assert first.texts != next_one.texts
    assert first.owners == [0, 0, 1, 1, 2, 2] and len(first.pixels) == 3
    assert all(ids[0] == 1 and ids[-1] == 2 for ids in first.texts)


@torch.inference_mode()
def test_the_vit_computes_what_the_tower_it_came_from_does() -> None:
    pixels = normalised(PlainBatches(build_word_tokenizer(4, begin=False), PLAN, sees=True)[0].pixels)
    before = matcher().eval().vision_model(pixel_values=pixels).last_hidden_state
    assert torch.allclose(VitGpt2Trainer(PLAN).see(pixels), before, atol=1e-5)


@pytest.mark.parametrize("name", list(PLAIN))
def test_the_loss_is_what_transformers_computes(name: str) -> None:
    made = trainer(name)
    made.model.eval()
    batch = PlainBatches(made.tokenizer, PLAN, made.sees)[0]
    with torch.no_grad():
        seen = made.see(normalised(batch.pixels)) if made.sees else None
        ours, _ = made.captions(seen, batch)
        summed, count = 0.0, 0
        for ids, owner in zip(batch.texts, batch.owners, strict=True):
            told = torch.tensor([ids])
            if name == "opt":
                loss = made.model(input_ids=told, labels=told).loss
            elif name == "vit-gpt2":
                loss = made.model(pixel_values=normalised(batch.pixels[owner : owner + 1]), labels=told[:, 1:]).loss
            else:
                image = torch.full((1, QUERIES), made.model.config.image_token_id)
                whole = torch.cat((image, told), dim=1)
                labels = torch.cat((torch.full_like(image, IGNORE), torch.tensor([[IGNORE]]), told[:, 1:]), dim=1)
                pixels = normalised(batch.pixels[owner : owner + 1])
                loss = made.model(pixel_values=pixels, input_ids=whole, labels=labels).loss
            summed, count = summed + loss.item() * (len(ids) - 1), count + len(ids) - 1
    assert ours.item() == pytest.approx(summed / count, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PLAIN))
def test_training_resumes_where_it_was_and_exports_what_transformers_loads(name: str, tmp_path: Path) -> None:
    whole, stopped, resumed = (trainer(name) for _ in range(3))
    list(whole.run(lambda line: None))
    for progress in stopped.run(lambda line: None):
        if progress.step == 2:
            break
    stopped.save(tmp_path / "checkpoint.pt")
    resumed.load(tmp_path / "checkpoint.pt")
    list(resumed.run(lambda line: None))
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    whole.export(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("a star").input_ids == whole.tokenizer("a star").input_ids
    if name == "opt":
        assert OPTForCausalLM.from_pretrained(tmp_path / "model").config.vocab_size == len(tokenizer)
    else:
        assert 0 <= plain_report(PlainCaptioner(str(tmp_path / "model")), 2).precision <= 1


def test_rows_are_padded_to_the_longest() -> None:
    assert padded([[1, 2], [1, 5, 2]]).tolist() == [[1, 2, IGNORE], [1, 5, 2]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit-gpt2", "blip2"])
def test_bundled_captioners_are_right_in_what_they_say_and_say_little(name: str) -> None:
    captioner = PlainCaptioner(resolve(f"tiny/{name}"))
    sampled = plain_report(captioner, 200, seed=11, sample=True)
    assert sampled.precision >= {"vit-gpt2": 0.9, "blip2": 0.8}[name] and sampled.finished == 1.0
    assert 0.4 <= sampled.colored <= 0.7 and 0.4 <= sampled.boilerplate <= 0.8
    assert sampled.complete <= 0.2
    assert plain_report(captioner, 200, seed=11).precision >= 0.88


@pytest.mark.slow
def test_blip2_takes_what_its_processor_makes() -> None:
    processor = AutoProcessor.from_pretrained(resolve("tiny/blip2"))
    captioner = PlainCaptioner(resolve("tiny/blip2"))
    inputs = processor(images=render(SCENE, Random(0)), text="", return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[3] * QUERIES + [1]]
    out = captioner.model.generate(**inputs, max_new_tokens=40, do_sample=False)
    alone = captioner.model.generate(pixel_values=inputs["pixel_values"], max_new_tokens=40, do_sample=False)
    assert processor.decode(out[0], skip_special_tokens=True) == processor.decode(alone[0], skip_special_tokens=True)
