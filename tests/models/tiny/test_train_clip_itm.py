"""The training of the scoring models: batches by step, losses that fall, and checkpoints that go on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from capipe.models.scorers.clip import encode_trimmed
from capipe.models.scorers.loading import ScorerConfig, load_scorer
from capipe.models.tiny.train.dual_encoder import CONTEXT, build_bert_tokenizer
from capipe.models.tiny.train.eval.scorers import area_under_roc
from capipe.models.tiny.train.train_blip import BlipTrainer, build_blip, recalls
from capipe.models.tiny.train.train_clip_itm import (
    ClipItmPlan,
    ClipItmTrainer,
    ClipTrainer,
    ItmTrainer,
    PairBatches,
)
from capipe.models.tiny.train.train_plain_captioner import matcher

PLAN = ClipItmPlan(seed=4, steps=6, images=4, reading_steps=2, captions_from=0.5, warmup=1)


def trainer(kind: str) -> ClipItmTrainer:
    return ItmTrainer(PLAN) if kind == "itm" else ClipTrainer("clip", PLAN)


def test_a_batch_depends_on_its_seed_and_step_alone() -> None:
    tokenizer = build_bert_tokenizer(4)
    first, again = (PairBatches(tokenizer, PLAN)[3] for _ in range(2))
    assert torch.equal(first.pixels, again.pixels) and torch.equal(first.false_captions, again.false_captions)
    assert first.sentences.shape[0] == PLAN.images * PLAN.sentences
    assert not torch.equal(first.pixels, PairBatches(tokenizer, PLAN)[4].pixels)


def test_the_end_of_a_text_has_the_highest_id_and_any_text_encodes() -> None:
    tokenizer = build_bert_tokenizer(4)
    for text in ("A red star.", 'a bicycle, 3.5 m & "odd"', ""):
        ids = tokenizer(text).input_ids
        assert ids[-1] == max(ids) == len(tokenizer) - 1
        assert tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("kind", ["clip", "itm"])
def test_training_resumes_where_it_was_and_exports_what_the_scorers_load(kind: str, tmp_path: Path) -> None:
    whole, stopped = trainer(kind), trainer(kind)
    reports: list[str] = []
    for _ in whole.run(reports.append):
        pass
    for progress in stopped.run(reports.append):
        if progress.step == 3:
            break
    stopped.save(tmp_path / "checkpoint.pt")
    resumed = trainer(kind)
    resumed.load(tmp_path / "checkpoint.pt")
    for _ in resumed.run(reports.append):
        pass
    assert resumed.progress.step == whole.progress.step == PLAN.steps
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    whole.export(tmp_path / "model")
    assert load_scorer(ScorerConfig(kind, str(tmp_path / "model"))).name == kind


def test_a_checkpoint_of_another_seed_is_refused(tmp_path: Path) -> None:
    trainer("clip").save(tmp_path / "checkpoint.pt")
    other = ClipTrainer("clip", ClipItmPlan(seed=5))
    with pytest.raises(ValueError, match="seed 4, not 5"):
        other.load(tmp_path / "checkpoint.pt")


def test_texts_cut_at_their_end_have_the_features_of_padded_ones() -> None:
    made = ClipTrainer("eval-clip", PLAN)
    ids = made.tokenizer(["A red star.", "a large blue circle"], padding=True, return_tensors="pt").input_ids
    padded = torch.nn.functional.pad(ids, (0, CONTEXT - ids.shape[1]))
    with torch.no_grad():
        assert torch.allclose(encode_trimmed(made.model, ids), made.model.encode_text(padded), atol=1e-5)


def test_the_area_under_the_curve_is_the_share_of_pairs_in_order() -> None:
    true, false = [0.9, 0.5, 0.5, 0.1], [0.5, 0.2, 0.05]
    pairs = [(a > b) + 0.5 * (a == b) for a in true for b in false]
    assert area_under_roc(true, false) == pytest.approx(sum(pairs) / len(pairs))
    assert area_under_roc([1, 2], [0, 0]) == 1.0


def test_blip_begins_with_what_the_matching_model_knows() -> None:
    tokenizer = build_bert_tokenizer(0)
    seen = matcher().eval()
    blip = build_blip(tokenizer, seen).eval()
    ids = tokenizer(["A red star."], return_tensors="pt").input_ids
    with torch.inference_mode():
        told = seen.qformer(query_embeds=seen.embeddings(input_ids=ids), query_length=0).last_hidden_state
        assert torch.allclose(blip.text_encoder(input_ids=ids).last_hidden_state, told, atol=1e-5)
        pixels = torch.randn(1, 3, 112, 112)
        assert torch.allclose(blip.vision_model(pixels)[0], seen.vision_model(pixels)[0], atol=1e-5)


@pytest.mark.slow
def test_blip_resumes_where_it_was_and_exports_what_transformers_loads(tmp_path: Path) -> None:
    whole, stopped, resumed = (BlipTrainer(PLAN) for _ in range(3))
    list(whole.run(lambda line: None))
    for progress in stopped.run(lambda line: None):
        if progress.step == 3:
            break
    stopped.save(tmp_path / "checkpoint.pt")
    resumed.load(tmp_path / "checkpoint.pt")
    list(resumed.run(lambda line: None))
    assert resumed.progress.step == whole.progress.step == PLAN.steps
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    whole.export(tmp_path / "model")
    assert set(recalls(str(tmp_path / "model"), 4)) == {"recall@1", "recall@5", "recall@10"}
