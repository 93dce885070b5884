"""Log-probabilities of texts are the model's own, whatever shares the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from capipe.errors import BadInput
from capipe.models.scorers.lm_scores import TextScorer, load_text_scorer

from ...small_models import opt, spread, words

TEXTS = ("a red star", "Two shapes. A large red star is in the center.", "x", "", "star " * 100)


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> TextScorer:
    return load_text_scorer(str(opt(tmp_path_factory.mktemp("opt"))))


@torch.inference_mode()
def test_they_are_transformers_own_for_single_texts(scorer: TextScorer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, OPTForCausalLM

    folder = opt(tmp_path)
    model, tokenizer = OPTForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = scorer.logps(TEXTS)
    assert [len(each) for each in found][3:] == [0, 39]  # an empty text, and one as long as the model reads
    for text, logps in zip(TEXTS, found, strict=True):
        if not logps:
            continue
        ids = torch.tensor([[1, *tokenizer(text, add_special_tokens=False).input_ids][:40]])
        labels = ids.clone()
        labels[0, 0] = -100  # the token of beginning is given
        assert sum(logps) / len(logps) == pytest.approx(-model(input_ids=ids, labels=labels).loss.item(), abs=1e-5)


def test_the_batch_has_no_part_in_them(scorer: TextScorer) -> None:
    together = scorer.logps(TEXTS)
    for text, logps in zip(TEXTS, together, strict=True):
        assert scorer.logps([text])[0] == pytest.approx(logps, abs=1e-5)


def test_models_that_tell_no_such_thing_are_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertLMHeadModel

    with pytest.raises(BadInput, match="nowhere: no such model folder"):
        load_text_scorer("nowhere")
    with pytest.raises(BadInput, match="tiny/itm: does not load as a causal language model"):
        load_text_scorer("tiny/itm")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = words()
    spread(BertLMHeadModel(BertConfig(vocab_size=len(tokenizer), **small, bos_token_id=2))).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="reads texts both ways"):
        load_text_scorer(str(tmp_path))
