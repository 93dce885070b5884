"""The command that trains a bundled reader, from lessons to a folder that anyone can load."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from capipe.models.tiny.train import build, quiz_models
from capipe.models.tiny.train.train_quiz import curriculum_text

pytestmark = pytest.mark.slow


@pytest.fixture
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer of fifty lessons' text instead of thousands'."""
    monkeypatch.setattr(quiz_models, "curriculum_text", partial(curriculum_text, count=50))


def test_a_reader_is_trained_exported_and_gone_on_with(
    tmp_path: Path, little_text: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["reader", "--seed", "1", "--out", str(out), "--checkpoints", str(tmp_path / "kept")]
    assert build.main([*arguments, "--steps", "1"]) == 0
    assert "done: 1 steps" in capsys.readouterr().out
    assert build.main([*arguments, "--steps", "2", "--resume"]) == 0
    said = capsys.readouterr().out
    assert "resumed at step 1" in said and "done: 2 steps" in said

    names = {file.name for file in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert "processor_config.json" not in names  # it sees nothing
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".export")] == []
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    trained = torch.load(tmp_path / "kept/tiny-reader-1.pt", weights_only=True)
    assert trained["progress"]["step"] == 2
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, trained["model"][name].bfloat16().float()), name
    tokenizer = AutoTokenizer.from_pretrained(out)
    chat = [{"role": "user", "content": "Where is the red star?"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\nWhere is the red star?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_there_must_be_something_to_go_on_from(tmp_path: Path, little_text: None) -> None:
    arguments = ["reader", "--seed", "1", "--steps", "1", "--out", str(tmp_path / "out"), "--resume"]
    with pytest.raises(FileNotFoundError, match=r"tiny-reader-1\.pt"):
        build.main([*arguments, "--checkpoints", str(tmp_path)])
