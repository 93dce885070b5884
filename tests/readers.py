"""Copies of the bundled reader that read badly: one hears nothing of its caption, one likes A, one is short of room."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from capipe.models.engines.base import Prompt
from capipe.models.engines.model_folder import resolve_model
from capipe.models.engines.prompting import messages
from capipe.models.quiz import Question, caption_prompt, put


def copied(folder: Path, **config: Any) -> Path:
    """The same weights, with changes to the configuration."""
    shutil.copytree(resolve_model("tiny/reader"), folder)
    if config:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return folder


def deaf(folder: Path) -> Path:
    """A reader whose tokens see nothing of each other: it always gives the same answer, by place."""
    return _saved(folder, _without_attention)


def prefers_a(folder: Path, nats: float) -> Path:
    """A reader that finds A so much likelier than it should."""

    def change(model: Any, tokenizer: Any) -> None:
        question = Question("What color is the star?", ("red", "blue", "green"), 0)
        asked = [put(question, order) for order in ((0, 1, 2, 3), (3, 0, 1, 2), (1, 2, 3, 0))]
        prompts = [messages(Prompt(caption_prompt("A blue star.") + text)) for text in asked]
        find_likelier(model, tokenizer, "A", nats, prompts)

    return _saved(folder, change)


@torch.no_grad()
def find_likelier(
    model: Any, tokenizer: Any, letters: str, nats: float, prompts: Sequence[Any], **template: Any
) -> None:
    """Add some ``nats`` to the logits of ``letters`` where an answer to one of ``prompts`` (messages) begins."""
    found = []
    for prompt in prompts:
        chat = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **template)
        ids = tokenizer(chat, add_special_tokens=False)["input_ids"]
        found.append(model.model(torch.tensor([ids])).last_hidden_state[0, -1])
    usual = torch.stack(found).mean(dim=0)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    for letter in letters:
        model.lm_head.weight[tokenizer.encode(letter, add_special_tokens=False)[0]] += nats * usual / (usual @ usual)


def _without_attention(model: Any, tokenizer: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()


@torch.no_grad()
def _saved(folder: Path, change: Any) -> Path:
    path = str(resolve_model("tiny/reader"))
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        AutoTokenizer.from_pretrained(path),
    )
    change(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
