"""Folders of bundled models with other chat templates than their own: as hubs publish them, or broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from capipe.models.bundled import folder_of

#: A template that knows text alone, as text models have it.
TEXT_ONLY = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
#: One of a model that may think, and can be told not to.
THINKING = TEXT_ONLY + (
    "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)
#: One that opens the thought itself.
BEGUN = TEXT_ONLY + "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}{# up to </think> #}"


def copied(name: str, at: Path, template: str | None = None) -> Path:
    """A bundled model's folder with another chat template, or with none."""
    shutil.copytree(folder_of(name), at)
    (at / "chat_template.jinja").unlink()
    if template is not None:
        (at / "chat_template.jinja").write_text(template)
    return at


def own_template(name: str) -> str:
    return (folder_of(name) / "chat_template.jinja").read_text()


def with_template(config: Path, template: object) -> None:
    """Put a template into a JSON file of a folder."""
    written = json.loads(config.read_text()) if config.is_file() else {}
    config.write_text(json.dumps({**written, "chat_template": template}))


def two_templates(at: Path) -> Path:
    """The captioner laid out as Qwen2.5-VL is: the processor's template beside another one for text alone."""
    copied("captioner", at)
    with_template(at / "tokenizer_config.json", TEXT_ONLY)
    with_template(at / "chat_template.json", own_template("captioner"))
    return at


def thinking_reader(at: Path, template: str = THINKING, special: bool = False) -> Path:
    """The bundled reader with the tags of a thought in its vocabulary, which it never learned to write."""
    from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder_of("reader"))
    tokenizer.add_tokens([AddedToken(tag, special=special) for tag in ("<think>", "</think>")], special_tokens=special)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(at)
    model = AutoModelForCausalLM.from_pretrained(folder_of("reader"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(at)
    return at
