"""Thoughts and template arguments over HTTP, where the server has the template and may know the tags itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from capipe.models.engines.base import ChoiceRequest, GenerationRequest, Prompt, RequestError, Sampling, Thought
from capipe.models.engines.http.engine import HTTPEngine, connect_http_engine
from capipe.models.engines.loading import EngineConfig, load_engine
from capipe.models.quiz import Question
from capipe.models.reader import QuizReader, ReaderConfig

from ...readers import find_likelier
from ...serving import serving as serving_vllm
from ..folders import THINKING, thinking_reader
from .test_http_engine import Answer, Double, ask, completion, options, serving

COLOR = Question("What color is the star?", ("red", "blue"), 1, "color")


def message(content: Any, finish_reason: str = "stop", **more: Any) -> Answer:
    choice = {"message": {"role": "assistant", "content": content, **more}, "finish_reason": finish_reason}
    return 200, {}, {"choices": [choice], "usage": {"completion_tokens": 4}}


@pytest.mark.parametrize(
    ("answer", "text", "thought"),
    [
        (message("<think>\nHm.\n</think>\n\nA dog."), "A dog.", Thought("Hm.", True)),
        (message("Hm.\n</think>\n\nA dog."), "A dog.", Thought("Hm.", True)),  # the server's template had opened it
        (message("<think>\nHm", "length"), "", Thought("Hm", False)),
        (message("A dog.", reasoning_content="Hm.\n"), "A dog.", Thought("Hm.", True)),
        (message("A dog.", reasoning="Hm."), "A dog.", Thought("Hm.", True)),
        (message(None, "length", reasoning_content="Hm"), "", Thought("Hm", False)),
        (message(" A dog.", reasoning_content=None), " A dog.", None),
        (message("<think>\ud800</think>A dog.\ud800"), "A dog.?", Thought("?", True)),
    ],
)
async def test_thoughts_are_no_part_of_an_answer(answer: Answer, text: str, thought: Thought | None) -> None:
    found = await ask(Double(lambda n, body: answer))
    assert (found.text, found.thought) == (text, thought)


async def test_arguments_go_to_servers_that_heed_them() -> None:
    double = Double(lambda n, body: completion("A dog."))
    await ask(double, template_args={"enable_thinking": False})
    assert double.bodies[0]["chat_template_kwargs"] == {"enable_thinking": False}
    await ask(double)
    assert "chat_template_kwargs" not in double.bodies[1]
    plain = Double(lambda n, body: completion("A dog."), owner="somebody")
    refused = await ask(plain, template_args={"enable_thinking": False})
    assert isinstance(refused, RequestError)
    assert "neither vLLM nor SGLang and would not heed chat_template_kwargs" in str(refused)
    assert not plain.bodies


async def test_a_thought_is_where_the_server_goes_on() -> None:
    double = Double(lambda n, body: completion("B"))
    await ask(double, GenerationRequest(Prompt("Which?", thought="Hm.", answer_prefix="The ")))
    assert double.bodies[0]["messages"][-1] == {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nThe "}
    assert (double.bodies[0]["continue_final_message"], double.bodies[0]["add_generation_prompt"]) == (True, False)


def scores(letter: str) -> dict[str, Any]:
    return {"content": [{"token": letter, "logprob": -0.1, "top_logprobs": [{"token": letter, "logprob": -0.1}]}]}


def quizzed(body: dict[str, Any]) -> Answer:
    """A model that thinks: its letters have their mass after the thought alone."""
    if not body["logprobs"]:
        return completion("<think>\nIt says blue.\n</think>\n\nB")
    after = body["messages"][-1]["content"] == "<think>\nIt says blue.\n</think>\n\n"
    question = body["messages"][0]["content"]
    blue = next(letter for letter in "ABC" if f"{letter}. blue" in question)
    return completion("", logprobs=scores(blue if after else "<think>"))


async def test_a_reader_behind_a_server_is_asked_after_its_thought() -> None:
    double = Double(lambda n, body: quizzed(body))
    with serving(double) as url:
        engine = await connect_http_engine(options(url))
        for _ in range(2):
            (reading,) = await QuizReader(engine, ReaderConfig(thought_tokens=33)).read("A blue star.", [COLOR])
            assert (reading.chosen, reading.errors) == ((1, 1, 1), ())
        await engine.aclose()
    kinds = [(body["max_tokens"], body["logprobs"]) for body in double.bodies]
    assert kinds[0] == (256, False)  # whether it thinks is asked once, for all
    assert sorted(kinds[1:]) == [(1, True)] * 6 + [(33, False)] * 6


async def test_a_server_that_does_not_think_is_asked_for_letters_at_once() -> None:
    double = Double(lambda n, body: completion("yes", logprobs=scores("A") if body["logprobs"] else None))
    with serving(double) as url:
        engine = await connect_http_engine(options(url))
        (reading,) = await QuizReader(engine, ReaderConfig()).read("A star.", [COLOR])
        assert reading.scored == 3
        await engine.aclose()
    assert sorted(body["max_tokens"] for body in double.bodies) == [1, 1, 1, 256]


async def test_a_question_about_thinking_that_failed_is_asked_again() -> None:
    double = Double(lambda n, body: (400, {}, {"error": "no"}) if n == 0 else completion("yes"))
    with serving(double) as url:
        engine = await connect_http_engine(options(url))
        assert isinstance(engine, HTTPEngine)
        with pytest.raises(RequestError):
            await engine.thinks()
        assert [await engine.thinks(), await engine.thinks()] == [False, False]
        assert len(double.bodies) == 2
        request = ChoiceRequest(Prompt("Which?", thought="Hm"), ("A", "B"))
        with pytest.raises(RequestError, match="reports no log-probabilities"):
            await engine.choose(request)
        await engine.aclose()


async def test_a_server_that_cannot_go_on_from_a_thought_says_so() -> None:
    double = Double(lambda n, body: completion("<think>Hm.</think>B"), owner="somebody")
    with serving(double) as url:
        engine = await connect_http_engine(options(url))
        (reading,) = await QuizReader(engine, ReaderConfig()).read("A star.", [COLOR])
        assert reading.scored == 0 and "would not heed continue_final_message" in reading.errors[0]
        (sampled,) = await QuizReader(engine, ReaderConfig(mode="sampled", presentations=1)).read("A star.", [COLOR])
        assert sampled.chosen == (1,) and not sampled.errors
        completed = await engine.generate(GenerationRequest(Prompt("Which?"), Sampling(max_tokens=9)))
        assert completed.thought == Thought("Hm.", True)
        await engine.aclose()


#: Qwen3's way with an assistant's turn: its thought stands between the tags, and is written anew.
TURNS = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' and '</think>' in message.content %}"
    "{% set parts = message.content.split('</think>') %}"
    "{{ '<think>\n' + parts[0].split('<think>')[-1].strip('\n') + '\n</think>\n\n' + parts[-1].lstrip('\n') }}"
    "{% else %}{{ message.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
)


def finds_letters_likely(folder: Path, letters: str, text: str) -> None:
    """Servers tell the likeliest tokens alone, and letters are not among them where a reader never learned to think."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    find_likelier(model, tokenizer, letters, 25.0, [[{"role": "user", "content": text}]], enable_thinking=False)
    model.save_pretrained(folder)


@pytest.mark.slow
async def test_a_real_server_scores_letters_after_a_thought_as_we_do(
    tmp_path: Path, unused_tcp_port_factory: Callable[[], int]
) -> None:
    pytest.importorskip("vllm")
    folder = thinking_reader(tmp_path / "reader", TURNS + THINKING.partition("{% endfor %}")[2])
    letters, text = ("A", "B", "C", "D"), "Which? A, B, C or D"
    finds_letters_likely(folder, "".join(letters), text)
    with serving_vllm(str(folder), unused_tcp_port_factory(), "--max-model-len", "512", "--max-num-seqs", "8") as url:
        for arguments, thoughts in [({}, [None, "a star"]), ({"enable_thinking": False}, [None])]:
            there = await load_engine(EngineConfig(url, template_args=arguments))
            here = await load_engine(EngineConfig("transformers", str(folder), device="cpu", template_args=arguments))
            for thought in thoughts:
                asked = ChoiceRequest(Prompt(text, thought=thought), letters)
                ours, theirs = await here.choose(asked), await there.choose(asked)
                known = [pair for pair in zip(ours.logprobs, theirs.logprobs, strict=True) if pair[1] is not None]
                assert known and all(one == pytest.approx(other, abs=1e-3) for one, other in known)
            assert isinstance(there, HTTPEngine) and not await there.thinks()  # the tiny one never learned to
            await here.aclose()
            await there.aclose()
