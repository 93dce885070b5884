"""Thoughts: told apart from answers, and letters scored where the answer begins."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from capipe.models.engines.base import (
    ChoiceRequest,
    Completion,
    Engine,
    GenerationRequest,
    Prompt,
    RequestError,
    Sampling,
    Thought,
)
from capipe.models.engines.chat_templates import open_encoder
from capipe.models.engines.hf.engine import TransformersEngine
from capipe.models.engines.loading import EngineConfig, load_engine
from capipe.models.engines.model_folder import resolve_model
from capipe.models.engines.thinking import Tags, split_thought, thinks
from capipe.models.quiz import Question
from capipe.models.reader import QuizReader, ReaderConfig

from ...scripted import Scripted, knows, pick
from ..folders import BEGUN, THINKING, own_template, thinking_reader

COLOR = Question("What color is the star?", ("red", "blue", "green"), 1, "color")
LETTERS = ("A", "B", "C", "D")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return thinking_reader(tmp_path_factory.mktemp("thinking") / "reader")


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


async def engine_of(folder: Path, **arguments: Any) -> TransformersEngine:
    engine = await load_engine(EngineConfig("transformers", str(folder), device="cpu", template_args=arguments))
    assert isinstance(engine, TransformersEngine)
    return engine


# --- told apart ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "begun", "text", "thought"),
    [
        ("A star.", False, "A star.", None),
        (" A <think> star.", False, " A <think> star.", None),
        ("<think>\nHm.\n</think>\n\nA star.", False, "A star.", Thought("Hm.", True)),
        ("\n<think></think> A star.", False, "A star.", Thought("", True)),
        ("<think>\nHm, a star", False, "", Thought("Hm, a star", False)),
        ("Hm.\n</think>\n\nA star.", True, "A star.", Thought("Hm.", True)),
        ("Hm, a star", True, "", Thought("Hm, a star", False)),
        ("Hm.\n</think>\n\nA star.", False, "A star.", Thought("Hm.", True)),  # nobody knew that it was begun
        ("<think>\n\n</think>\n\n<think>Hm.</think>A star.", False, "A star.", Thought("Hm.", True)),
        ("<thinking>Hm.</thinking>A star.", False, "A star.", Thought("Hm.", True)),
        ("◁think▷Hm.◁/think▷A star.", False, "A star.", Thought("Hm.", True)),
        ("It has <think> and </think> on it.", False, "It has <think> and </think> on it.", None),
    ],
)
def test_a_thought_is_no_part_of_the_answer(written: str, begun: bool, text: str, thought: Thought | None) -> None:
    assert split_thought(written, begun) == (text, thought)


@pytest.mark.parametrize("special", [False, True])
def test_tags_count_whether_or_not_they_are_special_tokens(special: bool, tmp_path: Path) -> None:
    folder = thinking_reader(tmp_path / "reader", special=special)
    tokenizer = tokenizer_of(folder)
    encoder = open_encoder(folder, tokenizer, None)
    ids = tokenizer.encode("<think>\na blue star\n</think>\n\na star<|im_end|>", add_special_tokens=False)
    assert encoder.answer(ids) == ("a star", Thought("a blue star", True))
    closing = ids.index(tokenizer.convert_tokens_to_ids("</think>"))
    assert encoder.answer(ids[:closing]) == ("", Thought("a blue star", False))
    assert encoder.answer(tokenizer.encode("a star<|im_end|>", add_special_tokens=False)) == ("a star", None)


def test_whether_a_model_thinks_shows_in_its_template(folder: Path) -> None:
    tokenizer = tokenizer_of(folder)

    def tags(template: str, **arguments: Any) -> Tags | None:
        (folder / "chat_template.jinja").write_text(template)
        return open_encoder(folder, tokenizer, None, arguments).thinking

    try:
        assert tags(THINKING) == tags(THINKING, enable_thinking=True) == Tags(begun=False, gap="\n\n")
        assert tags(THINKING.replace("</think>\n\n", "</think>\n")) == Tags(begun=False, gap="\n")
        assert tags(THINKING, enable_thinking=False) is None
        assert tags(BEGUN) == Tags(begun=True, gap="\n\n")
        assert tags(own_template("reader")) is None  # the tags are in the vocabulary, and nobody uses them
    finally:
        (folder / "chat_template.jinja").write_text(THINKING)
    assert open_encoder(resolve_model("tiny/reader"), tokenizer_of(resolve_model("tiny/reader")), None).thinking is None


# --- where letters are scored ----------------------------------------------------------------------------------------


def expected(engine: TransformersEngine, folder: Path, text: str) -> list[float]:
    """Log-probabilities of the letters after ``text``, by the model itself."""
    tokenizer = tokenizer_of(folder)
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    with torch.no_grad():
        logits = engine.lm._model(ids).logits[0, -1].float()
    scores: list[float] = logits.log_softmax(-1)[[tokenizer.convert_tokens_to_ids(each) for each in LETTERS]].tolist()
    return scores


CHAT = "<|im_start|>user\nWhich?<|im_end|>\n<|im_start|>assistant\n"
PLACES: list[tuple[str, dict[str, Any], str | None, str]] = [
    (THINKING, {}, None, CHAT),
    (THINKING, {}, "a star\n", f"{CHAT}<think>\na star\n</think>\n\n"),
    (THINKING, {"enable_thinking": False}, None, f"{CHAT}<think>\n\n</think>\n\n"),
    (BEGUN, {}, None, f"{CHAT}<think>\n"),
    (BEGUN, {}, "a star", f"{CHAT}<think>\na star\n</think>\n\n"),
]


@pytest.mark.parametrize(("template", "arguments", "thought", "place"), PLACES)
async def test_letters_are_scored_where_the_template_puts_them(
    template: str, arguments: dict[str, Any], thought: str | None, place: str, folder: Path
) -> None:
    (folder / "chat_template.jinja").write_text(template)
    engine = await engine_of(folder, **arguments)
    scores = await engine.choose(ChoiceRequest(Prompt("Which?", thought=thought), LETTERS))
    assert scores.logprobs == pytest.approx(expected(engine, folder, place), abs=1e-4)
    assert await thinks(engine) == (not arguments)
    await engine.aclose()
    (folder / "chat_template.jinja").write_text(THINKING)


async def test_a_thought_for_a_model_that_has_none_is_refused() -> None:
    engine = await engine_of(resolve_model("tiny/reader"))
    with pytest.raises(RequestError, match="does not let it think"):
        await engine.choose(ChoiceRequest(Prompt("Which?", thought="Hm"), LETTERS))
    await engine.aclose()


async def test_a_model_that_may_think_and_does_not_reads_as_ever(folder: Path) -> None:
    """The bundled reader never learned to think: with a template that lets it, its answers stay what they are."""
    plain, free = await engine_of(resolve_model("tiny/reader")), await engine_of(folder)
    config = ReaderConfig(thought_tokens=8)
    wanted, found = [await QuizReader(each, config).read("A blue star.", [COLOR]) for each in (plain, free)]
    assert found == wanted and wanted[0].scored == 4
    for each in (plain, free):
        await each.aclose()


async def cut_thoughts(engine: Engine) -> list[Any]:
    """What a reader makes of a model whose template has it think: the tiny one never comes to an end."""
    reader = QuizReader(engine, ReaderConfig(thought_tokens=6, least_mass=0.0))
    (reading,) = await reader.read("A blue star.", [COLOR])
    assert (reading.scored, reading.cut, reader.thoughts, reader.cut) == (4, 4, 4, 4)
    sampled = QuizReader(engine, ReaderConfig(mode="sampled", thought_tokens=6, temperature=0.0))
    (drawn,) = await sampled.read("A blue star.", [COLOR])
    assert drawn.cut == 4 and not drawn.errors
    return [reading.chosen, drawn.chosen]


async def test_a_thought_without_an_end_is_closed_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = await engine_of(thinking_reader(tmp_path / "reader", BEGUN))
    completion = await engine.generate(GenerationRequest(Prompt("Say."), Sampling(max_tokens=5)))
    assert completion.text == "" and completion.thought is not None and not completion.thought.closed
    assert len(completion.token_ids) == completion.n_tokens > 0
    await cut_thoughts(engine)
    assert "thinks before each answer, for up to 6 tokens" in caplog.text
    assert "1 of 1 thoughts of the reader were cut at their limit" in caplog.text
    await engine.aclose()


@pytest.mark.slow
async def test_vllm_places_letters_and_thoughts_alike(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    folder = str(thinking_reader(tmp_path / "reader", BEGUN))
    theirs = await load_engine(EngineConfig("vllm", folder, max_model_len=512, concurrency=16))
    ours = await load_engine(EngineConfig("transformers", folder, device="cpu"))
    try:
        for prompt in (Prompt("Which?"), Prompt("Which?", thought="a star"), Prompt("Which?", system="Be brief.")):
            one, other = [await each.choose(ChoiceRequest(prompt, LETTERS)) for each in (ours, theirs)]
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert await thinks(theirs)
        assert await cut_thoughts(theirs) == await cut_thoughts(ours)
    finally:
        await theirs.aclose()
        await ours.aclose()


# --- the reader ------------------------------------------------------------------------------------------------------


class Thoughtful(Scripted):
    """Thinks before it answers; ``generate`` has what it writes."""

    async def thinks(self) -> bool:
        return True


def writes(text: str, finish: Any = "stop") -> Callable[[GenerationRequest], Completion]:
    answer, thought = split_thought(text)
    return lambda request: Completion(answer, (), finish, 9, thought=thought)


async def test_the_answer_is_taken_after_the_thought() -> None:
    engine = Thoughtful(lambda request: knows(request, "blue"), writes("<think>\nBlue.\n</think>\n\nB"))
    (reading,) = await QuizReader(engine, ReaderConfig(thought_tokens=77)).read("A blue star.", [COLOR])
    assert (reading.chosen, reading.cut) == ((1,) * 4, 0)
    assert {each.prompt.thought for each in engine.choices} == {"Blue."}
    asked = [each.prompt for each in engine.generations]
    assert [replace(each.prompt, thought=None) for each in engine.choices] == asked
    assert {each.sampling.max_tokens for each in engine.generations} == {77}
    assert len({each.sampling.seed for each in engine.generations}) == 4  # each presentation has its own thought
    again = Thoughtful(lambda request: knows(request, "blue"), writes("<think>Blue.</think>B"))
    await QuizReader(again, ReaderConfig(thought_tokens=77)).read("A blue star.", [COLOR])
    assert [each.sampling for each in again.generations] == [each.sampling for each in engine.generations]


async def test_sampled_answers_have_room_for_a_thought() -> None:
    config = ReaderConfig(mode="sampled", thought_tokens=50, max_tokens=4, presentations=1)
    done = Thoughtful(generate=writes("<think>Blue.</think>B"))
    (reading,) = await QuizReader(done, config).read("A blue star.", [COLOR])
    assert (reading.chosen, reading.cut) == ((1,), 0)
    assert [each.sampling.max_tokens for each in done.generations] == [54]
    cut = Thoughtful(
        generate=lambda request: writes("B" if request.prompt.thought else "<think>Blue", "length")(request)
    )
    (reading,) = await QuizReader(cut, config).read("A blue star.", [COLOR])
    assert (reading.chosen, reading.cut) == ((1,), 1)
    assert [(each.prompt.thought, each.sampling.max_tokens) for each in cut.generations] == [(None, 54), ("Blue", 4)]


async def test_a_thought_that_fails_is_an_error_and_no_answer() -> None:
    engine = Thoughtful(lambda request: pick(request, "A"), lambda request: RequestError("too long"))
    (reading,) = await QuizReader(engine, ReaderConfig()).read("A star.", [COLOR])
    assert (reading.scored, set(reading.errors)) == (0, {"too long"})


def test_what_came_later_is_not_written_while_it_says_nothing() -> None:
    """Or every folder of before would be one of another configuration."""
    assert not {"thought_tokens", "thought_temperature"} & ReaderConfig().model_dump().keys()
    assert ReaderConfig(thought_tokens=9).model_dump()["thought_tokens"] == 9
    assert ReaderConfig.model_validate(ReaderConfig().model_dump()) == ReaderConfig()


async def test_engines_that_cannot_tell_do_not_think() -> None:
    assert not await thinks(Scripted())
    assert await asyncio.gather(thinks(Thoughtful()), thinks(Scripted())) == [True, False]
