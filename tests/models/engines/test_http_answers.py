"""Answers in the many forms that servers give them: each over a real socket."""

from __future__ import annotations

import gzip
import math
import pickle
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Any

import pytest

from capipe.models.engines.base import ChoiceRequest, GenerationRequest, Prompt, Refused, Rejected, RequestError
from capipe.models.engines.http.answers import Unavailable
from capipe.models.engines.http.engine import connect_http_engine
from capipe.models.engines.http.fields import UntakenField
from capipe.models.engines.thinking import split_thought

from ..chat_server import ASK, Answer, Double, ask, completion, options, serving

ASK_LETTER = ChoiceRequest(Prompt("Which?"), ("A", "B", "C"))


def message(finish_reason: str | None = "stop", **fields: Any) -> Answer:
    """An answer whose message has just these fields."""
    choice = {"message": {"role": "assistant", **fields}, "finish_reason": finish_reason}
    return 200, {}, {"choices": [choice], "usage": {"completion_tokens": 4}}


def refusing(status: int, said: Any, headers: dict[str, str] | None = None) -> Answer:
    return status, headers or {}, said


async def answered(answer: Answer, request: Any = ASK, **changes: Any) -> Any:
    return await ask(Double(lambda n, body: answer, owner=changes.pop("owner", "vllm")), request, **changes)


# --- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "text", "reason"),
    [
        (message(content=[{"type": "text", "text": "A "}, {"type": "text", "text": "dog."}]), "A dog.", "stop"),
        (message(content=["A ", {"type": "thinking", "thinking": [1]}, {"text": "dog."}]), "A dog.", "stop"),
        (message("length", content=None, reasoning_content="Well, I"), "", "length"),
        (message("length", content="<think>Well, I"), "", "length"),
        (message(content="<think>\nIt barks.\n</think>\n\nA dog."), "A dog.", "stop"),
        (message(content="It barks.\n</think>\n\nA dog."), "A dog.", "stop"),  # the template had opened it
        (message(content="A dog.", reasoning_content="It barks."), "A dog.", "stop"),
        (message("eos_token", content="A dog."), "A dog.", "stop"),
        (message("MAX_TOKENS", content="A dog."), "A dog.", "length"),
        (message(None, content="A dog."), "A dog.", "stop"),
        (message("tool_calls", content="A dog."), "A dog.", "stop"),
        (message("what_is_this", content="A dog."), "A dog.", "stop"),
        (message("length", content=None), "", "length"),  # reasoning that the server does not show
        (message(content=None, reasoning="Well, I"), "", "stop"),
    ],
)
async def test_text_is_found_in_every_form(answer: Answer, text: str, reason: str) -> None:
    found = await answered(answer)
    assert (found.text, found.finish_reason) == (text, reason)


def test_a_text_about_thoughts_is_none() -> None:
    assert split_thought("I see <think> written on a wall.") == ("I see <think> written on a wall.", None)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((200, {}, b"<!doctype html><title>Sign in</title>"), "HTML: .*Sign in.*is the URL that of an OpenAI API"),
        ((200, {}, b"\x00\x01"), "not JSON"),
        (message(content=None), "null content: it wrote nothing$"),
        (message("tool_calls", content=None), "null content: it wrote nothing$"),
        (message("abort", content="A do"), "broke the answer off .'abort'"),
        (message("error", content="A do"), "broke the answer off"),
        (message(content={"text": "x"}), "dict content"),
        ((200, {}, {"error": {"message": "upstream is gone", "code": 502}}), "upstream is gone"),
    ],
)
async def test_an_answer_without_text_says_why(answer: Answer, says: str) -> None:
    error = await answered(answer)
    assert type(error) is RequestError and not error.final
    with pytest.raises(RequestError, match=says):
        raise error


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (message("content_filter", content="A man who"), "A man who"),
        (message("content_filter", content=None), ""),
        (message("SAFETY", content=""), ""),
        (message("sensitive", content=""), ""),
        (message(content=None, refusal="I cannot help with that."), "I cannot help with that."),
        (message(content=[{"type": "refusal", "refusal": "I cannot."}]), "I cannot."),
        (refusing(400, {"error": {"message": "It was filtered", "code": "content_filter"}}), "It was filtered"),
        (refusing(403, {"error": {"message": "flagged by moderation"}}), "flagged by moderation"),
        ((200, {}, {"error": {"message": "It was filtered", "code": "content_filter"}}), "It was filtered"),
    ],
)
async def test_a_refusal_is_told_apart_from_a_failure(answer: Answer, words: str) -> None:
    error = await answered(answer)
    assert isinstance(error, Refused) and str(error).startswith("refused") and not error.final
    assert error.words == words


async def test_a_choice_can_be_refused_too() -> None:
    for answer in (message("content_filter", content=None), message(content=None, refusal="No.")):
        assert isinstance(await answered(answer, ASK_LETTER), Refused)


# --- counts and log-probabilities ------------------------------------------------------------------------------------


@pytest.mark.parametrize("usage", [None, {}, {"completion_tokens": None}, {"completion_tokens": "4"}, "missing"])
async def test_a_server_that_does_not_count_is_counted_for(usage: Any) -> None:
    steps = {"content": [{"token": "A", "logprob": -0.5}, {"token": " dog", "logprob": -0.25}]}
    status, headers, content = completion("A dog", logprobs=steps)
    content["usage"] = usage
    if usage == "missing":
        del content["usage"]
    answer = status, headers, content
    assert (await answered(answer)).n_tokens is None  # nothing to count by
    found = await answered(answer, GenerationRequest(Prompt("Describe."), logprobs=True))
    assert (found.n_tokens, found.logprobs) == (2, (-0.5, -0.25))


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 300, "prompt_tokens_details": {"image_tokens": 256}}, (300, 256)),
        ({"prompt_tokens": 300, "prompt_tokens_details": {"cached_tokens": 9}}, (300, None)),
        ({"prompt_tokens": 300, "prompt_tokens_details": None}, (300, None)),
        ({"prompt_tokens": "300"}, (None, None)),
        ({"prompt_tokens": -1, "prompt_tokens_details": {"image_tokens": True}}, (None, None)),
        (None, (None, None)),
        ([300], (None, None)),
    ],
)
async def test_the_prompts_tokens_are_those_that_a_server_counts(usage: Any, expected: tuple[int | None, ...]) -> None:
    choice = {"message": {"role": "assistant", "content": "A dog."}, "finish_reason": "stop"}
    found = await answered((200, {}, {"choices": [choice], "usage": usage}))
    assert (found.prompt_tokens, found.image_tokens) == expected


@pytest.mark.parametrize("logprobs", [None, {}, {"content": None}, {"content": []}, {"content": ["B"]}, "missing"])
async def test_a_server_that_ignores_log_probabilities_is_no_reader_by_letters(logprobs: Any) -> None:
    status, headers, content = completion("B", "length", logprobs)
    if logprobs == "missing":
        del content["choices"][0]["logprobs"]
    error = await answered((status, headers, content), ASK_LETTER)
    assert isinstance(error, RequestError) and error.final and "--reader-mode sampled" in str(error)


async def test_letters_that_a_server_does_not_report_are_none() -> None:
    top = [{"token": letter, "logprob": -float(place)} for place, letter in enumerate("CxyzA")]
    steps = {"content": [{"token": "C", "logprob": 0.0, "top_logprobs": top}]}
    scores = await answered(completion("C", "length", steps), ASK_LETTER)
    assert (scores.logprobs, scores.best) == ((-4.0, None, 0.0), 2)
    steps = {"content": [{"token": "C", "logprob": -0.5}]}  # the written token alone
    assert (await answered(completion("C", "length", steps), ASK_LETTER)).logprobs == (None, None, -0.5)
    steps = {"content": [{"token": "C", "logprob": None, "top_logprobs": top}]}
    assert "None as a log-probability" in str(await answered(completion("C", "length", steps), ASK_LETTER))


@pytest.mark.parametrize("blank", [" ", "▁", "Ġ", "\n"])
async def test_a_letter_after_a_blank_is_that_letter(blank: str) -> None:
    top = [{"token": f"{blank}B", "logprob": -0.5}, {"token": "B", "logprob": -1.0}, {"token": "BA", "logprob": -0.2}]
    steps = {"content": [{"token": f"{blank}B", "logprob": -0.5, "top_logprobs": top}]}
    scores = await answered(completion("B", "length", steps), ASK_LETTER)
    assert scores.best == 1 and scores.first == "B"
    assert scores.logprobs == (None, pytest.approx(math.log(math.exp(-0.5) + math.exp(-1.0))), None)


async def test_a_first_token_that_is_no_letter_is_told() -> None:
    steps = {"content": [{"token": " The", "logprob": -0.1, "top_logprobs": [{"token": " The", "logprob": -0.1}]}]}
    scores = await answered(completion(" The", "length", steps), ASK_LETTER)
    assert (scores.logprobs, scores.first) == ((None,) * 3, "The")
    status, headers, content = completion("", "length", steps)
    content["choices"][0]["message"]["reasoning_content"] = " The"
    error = await answered((status, headers, content), ASK_LETTER)
    assert error.final and "begins with a thought" in str(error)


async def test_a_reader_that_thinks_first_is_told_how_not_to() -> None:
    steps = {"content": [{"token": "<think>", "logprob": 0.0, "top_logprobs": []}]}
    error = await answered(completion("<think>", "length", steps), ASK_LETTER)
    assert error.final and "--template-arg enable_thinking=false" in str(error)


# --- fields ----------------------------------------------------------------------------------------------------------


def knows(*unknown: str, status: int = 400) -> Double:
    """A server that refuses fields by their names, one at a time."""

    def answers(n: int, body: dict[str, Any]) -> Answer:
        for name in unknown:
            if name in body:
                return refusing(status, {"error": {"message": f"Unsupported parameter: '{name}'", "param": name}})
        return completion("x")

    return Double(answers)


async def test_a_server_gets_what_it_knows_and_that_is_remembered() -> None:
    double = knows("max_tokens", "seed", "top_k", "repetition_penalty", "logprobs")
    for asked in range(2):
        sent = len(double.bodies)
        assert (await ask(double)).text == "x"
        assert len(double.bodies) - sent == 6, asked  # a new engine each time
    assert double.bodies[-1].keys() == {"model", "messages", "max_completion_tokens", "temperature", "top_p"}
    assert double.bodies[-1]["max_completion_tokens"] == 7


async def test_the_second_request_is_spelled_right_at_once() -> None:
    double = knows("max_tokens", "seed")
    with serving(double) as url:
        engine = await connect_http_engine(options(url))
        await engine.generate(ASK)
        assert len(double.bodies) == 3
        await engine.generate(ASK)
        assert len(double.bodies) == 4
        await engine.aclose()


async def test_validators_of_other_kinds_are_understood() -> None:
    def answers(n: int, body: dict[str, Any]) -> Answer:
        unknown = [name for name in ("seed", "logprobs", "top_k", "repetition_penalty") if name in body]
        detail = [
            {"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs are not permitted"}
            for name in unknown
        ]
        return refusing(422, {"detail": detail}) if unknown else completion("x")

    double = Double(answers)
    assert (await ask(double)).text == "x" and len(double.bodies) == 2


async def test_a_field_that_must_be_sent_is_a_final_refusal() -> None:
    error = await ask(knows("temperature"))  # greedy is asked for, and the server's default is not
    assert isinstance(error, RequestError) and error.final and "does not take temperature" in str(error)
    assert "give --temperature 1" in str(error)
    error = await ask(knows("top_logprobs"), ASK_LETTER)
    assert error.final and "--reader-mode sampled" in str(error)
    error = await ask(knows("chat_template_kwargs"), template_args={"enable_thinking": False})
    assert error.final and "does not take chat_template_kwargs" in str(error)


@pytest.mark.parametrize(
    "said",
    [
        "'max_tokens' or 'max_completion_tokens' is too large: 7. This model's maximum context length is 5 tokens.",
        "The model's maximum context length is 2048 tokens",
        "The model does not support images",
    ],
)
async def test_what_is_wrong_with_one_request_is_not_a_field(said: str) -> None:
    double = Double(lambda n, body: refusing(400, {"message": said, "param": None}))
    error = await ask(double)
    assert type(error) is Rejected and not error.final and len(double.bodies) == 1


@pytest.mark.parametrize(
    ("said", "most", "requests"),
    [
        ("Invalid value for 'top_logprobs': must be less than or equal to 5.", 5, 2),
        ("Requested sample logprobs of {asked}, which is greater than max allowed: 3", 3, 2),
        ("top_logprobs is out of range", 5, 3),  # by steps
    ],
)
async def test_a_server_with_fewer_alternatives_is_asked_for_those(said: str, most: int, requests: int) -> None:
    steps = {"content": [{"token": "B", "logprob": -0.25, "top_logprobs": [{"token": "B", "logprob": -0.25}]}]}

    def answers(n: int, body: dict[str, Any]) -> Answer:
        asked = body["top_logprobs"]
        if asked > most:
            return refusing(400, {"error": {"message": said.format(asked=asked)}})
        return completion("B", "length", steps)

    double = Double(answers)
    assert (await ask(double, ASK_LETTER)).best == 1
    assert len(double.bodies) == requests and double.bodies[-1]["top_logprobs"] == most


async def test_template_arguments_go_where_they_are_heeded() -> None:
    double = Double(lambda n, body: completion("x"))
    await ask(double, template_args={"enable_thinking": False})
    assert double.bodies[0]["chat_template_kwargs"] == {"enable_thinking": False}
    plain = Double(lambda n, body: completion("x"), owner="somebody")
    refused = await ask(plain, template_args={"enable_thinking": False})
    assert refused.final and "would not heed chat_template_kwargs" in str(refused) and plain.bodies == []


async def test_a_server_that_takes_another_field_for_the_limit_is_asked_twice() -> None:
    said = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    double = Double(
        lambda n, body: refusing(400, {"error": {"message": said}}) if "max_tokens" in body else completion("x"),
        owner="somebody",
    )
    assert (await ask(double)).text == "x"
    assert [sorted(body.keys() & {"max_tokens", "max_completion_tokens"}) for body in double.bodies] == [
        ["max_tokens"],
        ["max_completion_tokens"],
    ]


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (refusing(401, {"error": {"message": "no such key"}}), "HTTP 401: no such key"),
        (refusing(403, {"error": {"message": "not for you"}}), "HTTP 403: not for you"),
        (refusing(404, {"error": {"message": "the model `captioner` does not exist"}}), "does not exist"),
        (refusing(402, {"error": {"message": "Insufficient credits"}}), "HTTP 402"),
        (refusing(429, {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}), "HTTP 429"),
        (
            refusing(307, {}, {"location": "https://elsewhere/v1/chat/completions"}),
            "the server is at https://elsewhere",
        ),
    ],
)
async def test_what_all_requests_share_is_final_and_asked_once(answer: Answer, says: str) -> None:
    double = Double(lambda n, body: answer)
    error = await ask(double)
    assert isinstance(error, RequestError) and error.final and says in str(error) and len(double.bodies) == 1


async def test_a_minutes_limit_is_no_quota() -> None:
    said = {"message": "Rate limit reached; add a payment method at .../billing", "code": "rate_limit_exceeded"}
    double = Double(lambda n, body: completion("x") if n == 9 else refusing(429, {"error": said}))
    assert (await ask(double, attempts=1)).text == "x"  # waiting is no attempt lost


async def test_a_body_that_is_broken_on_its_way_is_asked_for_again() -> None:
    whole = gzip.compress(b'{"choices": []}')
    double = Double(lambda n, body: (200, {"content-encoding": "gzip"}, whole[:12] + b"broken"))
    error = await ask(double, attempts=5)
    assert "gave up after 5 attempts: the answer broke on its way" in str(error) and len(double.bodies) == 5
    error = await answered((200, {"content-encoding": "gzip"}, b"no gzip"))
    assert "gave up after 3 attempts: the answer broke on its way" in str(error)
    mended = Double(lambda n, body: completion("x") if n else (200, {"content-encoding": "gzip"}, b"no gzip"))
    assert (await ask(mended, attempts=5)).text == "x"


# --- waiting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["seconds", "date", "past", "nonsense"])
async def test_retry_after_is_waited_for_in_each_form(form: str) -> None:
    forms: dict[str, Callable[[], str]] = {
        "seconds": lambda: "1.2",
        "date": lambda: formatdate(time.time() + 2.1, usegmt=True),
        "past": lambda: formatdate(0),
        "nonsense": lambda: "soon",
    }
    double = Double(lambda n, body: completion("x") if n else refusing(429, {}, {"Retry-After": forms[form]()}))
    assert (await ask(double, attempts=1)).text == "x"
    waited = double.times[1] - double.times[0]
    assert waited >= {"seconds": 1.2, "date": 1.0}.get(form, 0.0)  # a date has whole seconds


@pytest.mark.parametrize("status", [429, 502, 503, 529])
async def test_a_busy_server_is_waited_for_by_the_clock(status: int) -> None:
    began = time.monotonic()
    double = Double(lambda n, body: completion("x") if time.monotonic() - began > 1.5 else refusing(status, {}))
    assert (await ask(double, attempts=2, patience_s=60.0)).text == "x"
    assert len(double.bodies) > 3


async def test_patience_ends() -> None:
    error = await answered(refusing(503, {"message": "loading"}), patience_s=0.3)
    assert isinstance(error, RequestError) and not error.final
    assert str(error) == "the server was busy for 0.3 s: HTTP 503: loading"
    error = await answered(refusing(429, {}, {"Retry-After": "86400"}), patience_s=0.3)
    assert "busy for 0.3 s" in str(error)


def test_errors_keep_what_they_say_between_processes() -> None:
    for error in (
        RequestError("a", final=True),
        Refused("b", "no"),
        Rejected("e"),
        Unavailable("c", final=True, busy=True),
        UntakenField("d", "seed"),
    ):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error) and str(again) == str(error) and vars(again) == vars(error)
