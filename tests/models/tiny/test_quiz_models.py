"""A quiz model goes on from another's weights: what both have is taken over, what is new is made of what is known."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from capipe.models.tiny.train import build, quiz_models
from capipe.models.tiny.train.architectures import build_reader_config, export_folder
from capipe.models.tiny.train.quiz_models import Graduate, enrol, inherit, tokenizer_of
from capipe.models.tiny.train.schedule import Schedule
from capipe.models.tiny.train.texts.quiz_curriculum import QuizText, reading
from capipe.models.tiny.train.texts.tokenizer import QUIZ, build_tokenizer, with_phrases
from capipe.models.tiny.train.train_quiz import Curricula, curriculum_text

CURRICULUM = Curricula(lambda rng, level: short(rng), 2, levels=3)


def short(rng: Random) -> QuizText:
    return reading(rng, most=2, questions=2)


def small(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(build_reader_config(tokenizer, width=32, layers=1, inner=64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights, exported (bfloat16)."""
    torch.manual_seed(1)
    tokenizer = build_tokenizer(0, partial(curriculum_text, CURRICULUM, count=20), QUIZ)
    at = tmp_path_factory.mktemp("models") / "small"
    export_folder(small(tokenizer), tokenizer, at)  # type: ignore[arg-type]
    return at


def test_weights_and_known_embeddings_are_taken_over_and_a_phrase_is_made_of_its_words(folder: Path) -> None:
    before = tokenizer_of(str(folder))
    old = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    phrase = "Question: is the star red or blue?"
    tokenizer = with_phrases(tokenizer_of(str(folder)), (phrase,))
    assert len(tokenizer) == len(before) + 1 and tokenizer(phrase).input_ids == [len(before)]
    torch.manual_seed(2)
    model = small(tokenizer)
    inherit(model, tokenizer, str(folder))
    rows, known = model.get_input_embeddings().weight, old.get_input_embeddings().weight
    assert torch.equal(rows[: len(before)], known)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, old.model.layers[0].mlp.up_proj.weight)
    parts = before(phrase, add_special_tokens=False).input_ids
    like = torch.nn.functional.cosine_similarity(rows[len(before)], known[parts].mean(0), dim=0)
    assert like > 0.5 and torch.equal(model.lm_head.weight, rows)
    with torch.inference_mode():
        ids = torch.tensor([before("Where is the star?").input_ids])
        assert torch.allclose(model(ids).logits[..., : len(before)], old(ids).logits, atol=1e-5)


def test_a_trainer_goes_on_from_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phrases = ("Answer in words.",)
    graduate = Graduate(CURRICULUM, small, 1e-3, 1e-3, None, phrases)
    monkeypatch.setitem(quiz_models.GRADUATES, "reader", graduate)
    trainer = enrol("reader", Schedule(steps=1), str(folder))
    assert (trainer.progress.step, trainer.progress.level) == (0, 1)
    assert len(trainer.tokenizer) == len(tokenizer_of(str(folder))) + 1
    old = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).model.norm.weight
    assert torch.equal(trainer.model.model.norm.weight, old)
    list(trainer.run(lambda line: None))
    assert trainer.progress.step == 1
    monkeypatch.setattr(quiz_models, "curriculum_text", partial(curriculum_text, count=20))
    anew = enrol("reader", Schedule(steps=1))
    assert len(anew.tokenizer(phrases[0]).input_ids) == 1


def test_only_quiz_models_go_on_from_others_weights(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build.main(["captioner", "--steps", "1", "--from", "tiny/captioner"])
    assert "captioner is trained from scratch only" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no bundled model is called 'tiny/other'"):
        build.main(["teacher", "--steps", "1", "--from", "tiny/other"])
