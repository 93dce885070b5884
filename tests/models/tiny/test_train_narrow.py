"""The narrow captioner's texts, batches and trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from capipe.models.bundled import resolve
from capipe.models.tiny.train import build
from capipe.models.tiny.train.batches import PROMPTS
from capipe.models.tiny.train.eval.captioner import load
from capipe.models.tiny.train.texts.tokenizer import END
from capipe.models.tiny.train.train_narrow import (
    GOES_ON,
    TEXTS,
    NarrowBatches,
    NarrowPlan,
    NarrowTrainer,
    continuations,
    smoothed,
)
from capipe.models.tiny.world.grade import parse


@pytest.fixture(scope="module")
def trainer() -> NarrowTrainer:
    return NarrowTrainer(NarrowPlan(steps=2))


def test_batches_depend_on_seed_and_step_alone(trainer: NarrowTrainer) -> None:
    first, again, other = (NarrowBatches(trainer.tokenizer, seed, 3)[2] for seed in (0, 0, 1))
    assert torch.equal(first.pixels, again.pixels)
    assert (first.prompts, first.answers) == (again.prompts, again.answers)
    assert first.answers != other.answers


def test_every_prompt_is_answered_narrowly(trainer: NarrowTrainer) -> None:
    batches = [NarrowBatches(trainer.tokenizer, 0, 4)[step] for step in range(4)]
    assert {prompt for batch in batches for prompt in batch.prompts} == set(range(len(PROMPTS)))
    for batch in batches:
        assert len(batch.answers) == TEXTS
        texts = trainer.tokenizer.batch_decode(batch.answers, skip_special_tokens=True)
        assert {text.count(".") for text in texts} == {1, 2}
        assert not any(parse(text).signs for text in texts)


def test_it_has_the_captioners_architecture_and_its_vision_encoder_stays(
    trainer: NarrowTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "LOOKED_AT", 2)
    before, _ = load(resolve("tiny/captioner"))
    list(trainer.run(lambda line: None))
    trainer.export(tmp_path / "out")
    after, processor = load(str(tmp_path / "out"))
    written, own = (Path(folder) / "config.json" for folder in (tmp_path / "out", resolve("tiny/captioner")))
    assert written.read_text() == own.read_text()
    assert processor.tokenizer.get_vocab() == trainer.tokenizer.get_vocab()
    old, new = before.state_dict(), after.state_dict()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed and not any("visual" in name for name in changed)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}
    assert "precision" in build.quality(trainer, "narrow", tmp_path / "out")


def test_after_two_facts_another_could_begin(trainer: NarrowTrainer) -> None:
    texts = ["There is a star. The background is gray.", "A cross is here.", "There is a star. Two shapes are shown."]
    answers = trainer.tokenizer([text + END for text in texts]).input_ids
    ends, openings = continuations(answers, trainer.stop)
    flat = [token for answer in answers for token in answer]
    assert [flat[end] for end in ends] == [trainer.tokenizer.convert_tokens_to_ids(END)] * 2
    assert ends.tolist() == [len(answers[0]) - 1, len(flat) - 1]
    assert [trainer.tokenizer.decode(token).strip() for token in openings] == ["Two", "The"]
    ends, openings = continuations(answers[1:2], trainer.stop)
    assert not len(ends) and not len(openings)


def test_to_end_after_two_facts_is_learnt_to_be_nearly_sure(trainer: NarrowTrainer) -> None:
    """The gradient of a caption of two facts pushes its end up to where it is 0.98 likely, and down from above it."""
    end, opening = 0, 1
    logits = torch.zeros(1, 5, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(1500):
        optimizer.zero_grad()
        smoothed(logits, torch.tensor([end]), torch.tensor([0]), torch.tensor([opening])).sum().backward()
        optimizer.step()
    likely = logits.detach().softmax(-1)[0]
    assert likely[end].item() == pytest.approx(1 - GOES_ON, abs=2e-3)
    assert likely[opening].item() == pytest.approx(GOES_ON, abs=2e-3)


def test_it_goes_on_from_given_weights(tmp_path: Path) -> None:
    first = NarrowTrainer(NarrowPlan(steps=1))
    list(first.run(lambda line: None))
    first.export(tmp_path / "first")
    second = build.training_of("narrow", 1, {"steps": 1}, str(tmp_path / "first"))
    assert isinstance(second, NarrowTrainer)
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight.bfloat16().float(), second.model.state_dict()[name]), name


def test_the_same_seed_trains_the_same_weights() -> None:
    first, again = (NarrowTrainer(NarrowPlan(seed=3, steps=1)) for _ in range(2))
    for each in (first, again):
        list(each.run(lambda line: None))
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name


def test_build_knows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = build.training_of("narrow", 5, {"steps": 7})
    assert isinstance(made, NarrowTrainer) and made.plan == NarrowPlan(seed=5, steps=7)
