"""Which template a folder is asked with, that it is transformers' own choice, and what is refused about it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capipe.errors import BadInput
from capipe.models.bundled import folder_of
from capipe.models.engines.base import GenerationRequest, ImageInput, Prompt, RequestError, Sampling
from capipe.models.engines.chat_templates import check_template, find_template, open_encoder
from capipe.models.engines.hf.engine import TransformersEngine
from capipe.models.engines.loading import EngineConfig, load_engine

from ..conftest import DETAILED, PLAIN
from ..folders import TEXT_ONLY, copied, own_template, two_templates, with_template

IMAGE_TOKEN = 6  # the bundled captioner's
RAISING = "{{ raise_exception('no chats today') }}"
WITHOUT_IMAGES = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"
)
SYSTEMLESS = "{% for message in messages if message.role == 'user' %}{{ message.content }}{% endfor %}"


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def named(at: Path, **templates: str) -> Path:
    (at / "additional_chat_templates").mkdir(exist_ok=True)
    for name, template in templates.items():
        (at / "additional_chat_templates" / f"{name}.jinja").write_text(template)
    return at


def in_processor_config(at: Path) -> Path:
    two_templates(at)
    (at / "chat_template.jinja").write_text(TEXT_ONLY)
    with_template(at / "processor_config.json", own_template("captioner"))
    (at / "chat_template.json").unlink()
    return at


def legacy_beside_jinja(at: Path) -> Path:
    two_templates(at)
    (at / "chat_template.jinja").write_text(TEXT_ONLY)
    return at


def named_ones(at: Path) -> Path:
    return named(copied("captioner", at, own_template("captioner")), rag=TEXT_ONLY)


LAYOUTS = [two_templates, in_processor_config, legacy_beside_jinja, named_ones]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_the_template_of_a_model_that_sees_is_its_processors(layout: Callable[[Path], Path], tmp_path: Path) -> None:
    from transformers import AutoProcessor

    folder = layout(tmp_path / "model")
    processor: Any = AutoProcessor.from_pretrained(folder)
    encoder = open_encoder(folder, tokenizer_of(folder), IMAGE_TOKEN)
    for prompt in (Prompt(PLAIN, ImageInput("u")), Prompt(DETAILED, ImageInput("u"), system="Be brief."), Prompt("Hm")):
        content: Any = [{"type": "image"}, {"type": "text", "text": prompt.text}] if prompt.image else prompt.text
        chat = [{"role": "system", "content": prompt.system}] if prompt.system else []
        text = processor.apply_chat_template([*chat, {"role": "user", "content": content}], add_generation_prompt=True)
        assert list(encoder.encode(prompt)) == processor.tokenizer.encode(text, add_special_tokens=False)


def test_the_template_of_a_reader_is_its_tokenizers(tmp_path: Path) -> None:
    in_file = named(copied("reader", tmp_path / "file", own_template("reader")), tool_use=TEXT_ONLY)
    in_config = copied("reader", tmp_path / "config")
    with_template(in_config / "tokenizer_config.json", own_template("reader"))
    several = copied("reader", tmp_path / "several")
    listed = [{"name": "rag", "template": TEXT_ONLY}, {"name": "default", "template": own_template("reader")}]
    with_template(several / "tokenizer_config.json", listed)
    for folder in (in_file, in_config, several):
        tokenizer = tokenizer_of(folder)
        assert find_template(folder, sees=False)[0] == tokenizer.get_chat_template() == own_template("reader")
    # Its processor's is not asked, where a folder has one.
    with_template(in_config / "chat_template.json", TEXT_ONLY)
    assert find_template(in_config, sees=False)[0] == own_template("reader")


def broken(at: Path, template: str | None, file: str = "chat_template.jinja") -> Path:
    copied("captioner", at)
    if template is not None and file.endswith(".json"):
        with_template(at / file, template)
    elif template is not None:
        (at / file).write_text(template)
    return at


@pytest.mark.parametrize(
    ("template", "file", "reason"),
    [
        (None, "model", "no chat template, neither in tokenizer_config.json nor in a file of its own; if this is a"),
        (RAISING, "chat_template.jinja", r"fails on a chat with an image \(TemplateError: no chats today\); put"),
        (TEXT_ONLY, "tokenizer_config.json", r"fails on a chat with an image \(TypeError"),
        (WITHOUT_IMAGES, "chat_template.json", "puts 0 image placeholders into a chat with an image instead of 1"),
        ("{{ messages[0].content }}" * 2, "chat_template.jinja", "puts the text of a chat with an image 2 times"),
        ("{% for", "chat_template.jinja", "the chat template is not Jinja"),
        ("{{ ''.__class__.__mro__ }}", "chat_template.json", "SecurityError"),
    ],
)
async def test_a_template_that_does_not_work_is_one_clear_line(
    template: str | None, file: str, reason: str, tmp_path: Path
) -> None:
    folder = broken(tmp_path / "model", template, file)
    with pytest.raises(BadInput, match=reason) as caught:
        await load_engine(EngineConfig("transformers", str(folder), device="cpu"))
    assert "\n" not in str(caught.value) and file in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.slow  # vLLM's own configuration takes seconds
@pytest.mark.parametrize(("template", "reason"), [(None, "no chat template"), (RAISING, "no chats today")])
async def test_vllm_refuses_it_too_before_it_starts(template: str | None, reason: str, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    with pytest.raises(BadInput, match=reason):
        await load_engine(EngineConfig("vllm", str(broken(tmp_path / "model", template)), max_model_len=512))


def test_files_that_hold_no_template_are_one_clear_line(tmp_path: Path) -> None:
    folder = two_templates(tmp_path / "model")
    for written, reason in [
        ("[]", "no JSON object"),
        ("{}", "has no chat_template"),
        ('{"chat_template": 3}', "is int"),
    ]:
        (folder / "chat_template.json").write_text(written)
        with pytest.raises(BadInput, match=rf"chat_template\.json.* {reason}"):
            find_template(folder, sees=True)
    (folder / "chat_template.json").unlink()
    named(folder, rag=TEXT_ONLY)
    with pytest.raises(BadInput, match=r"\(rag\) none is named default"):
        find_template(folder, sees=True)
    with_template(folder / "chat_template.json", own_template("captioner"))
    with pytest.raises(BadInput, match="do not go together"):
        find_template(folder, sees=True)


async def test_two_templates_give_the_captions_of_one(
    tmp_path: Path, reference: TransformersEngine, pictures: list[ImageInput]
) -> None:
    engine = await load_engine(EngineConfig("transformers", str(two_templates(tmp_path / "model")), device="cpu"))
    assert isinstance(engine, TransformersEngine)
    for prompt in (Prompt(PLAIN, pictures[0]), Prompt(DETAILED, pictures[1]), Prompt("Hm", system="Be brief.")):
        assert engine.lm.prepare(prompt).ids.tolist() == reference.lm.prepare(prompt).ids.tolist()
    request = GenerationRequest(Prompt(PLAIN, pictures[0]), Sampling(max_tokens=12))
    assert (await engine.generate(request)).token_ids == (await reference.generate(request)).token_ids
    await engine.aclose()


@pytest.mark.slow
async def test_vllm_asks_two_templates_as_one(
    tmp_path: Path, reference: TransformersEngine, pictures: list[ImageInput]
) -> None:
    pytest.importorskip("vllm")
    from capipe.models.engines.vllm.engine import VLLMEngine

    folder = str(two_templates(tmp_path / "model"))
    engine = await load_engine(EngineConfig("vllm", folder, max_model_len=512, concurrency=8))
    assert isinstance(engine, VLLMEngine)
    try:
        prompt = Prompt(PLAIN, pictures[0])
        assert engine._encoder.encode(prompt) == reference.lm.encoder.encode(prompt)
        request = GenerationRequest(prompt, Sampling(max_tokens=12))
        assert (await engine.generate(request)).token_ids == (await reference.generate(request)).token_ids
    finally:
        await engine.aclose()


def test_arguments_reach_the_template_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    asked = "{% set mood = mood if mood is defined else 'calm' %}{{ mood }}: {{ messages[0].content }}"
    folder = copied("reader", tmp_path / "model", asked)
    tokenizer = tokenizer_of(folder)
    calm, wild = (open_encoder(folder, tokenizer, None, given) for given in ({}, {"mood": "wild"}))
    assert tokenizer.decode(calm.encode(Prompt("Hm"))) == "calm: Hm"
    assert tokenizer.decode(wild.encode(Prompt("Hm"))) == "wild: Hm"
    for name in ("moods", "messages", "tokenize"):
        with pytest.raises(BadInput, match=rf"{name}: no argument of the chat template in .*jinja; it reads mood") as e:
            check_template(folder, False, {name: 1})
        assert str(folder) in str(e.value)
    check_template(folder, False, {"mood": "wild"})
    check_template(folder, False, {"mood": False})
    with pytest.raises(BadInput, match=r"mood: 'False' is a text to the chat template in .*; write false, bare"):
        check_template(folder, False, {"mood": "False"})
    with pytest.raises(BadInput, match="reads no chat template"):
        check_template(folder_of("blip2"), True, {"mood": "wild"})
    generation = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    with pytest.raises(BadInput, match="it reads none"):
        check_template(copied("reader", tmp_path / "other", generation), False, {"mood": 1})


def test_a_chat_that_the_template_does_not_take_is_that_requests_error(tmp_path: Path) -> None:
    folder = copied("reader", tmp_path / "model", SYSTEMLESS)
    encoder = open_encoder(folder, tokenizer_of(folder), None)
    assert encoder.encode(Prompt("Hm"))
    with pytest.raises(RequestError, match="leaves the system message out"):
        encoder.encode(Prompt("Hm", system="Be brief."))
    refusing = "{{ raise_exception('one message only') if messages | length > 1 else messages[0].content }}"
    (folder / "chat_template.jinja").write_text(refusing)
    with pytest.raises(RequestError, match="refuses the prompt: TemplateError: one message only"):
        open_encoder(folder, tokenizer_of(folder), None).encode(Prompt("Hm", system="Be brief."))
