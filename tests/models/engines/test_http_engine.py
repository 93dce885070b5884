"""The HTTP engine against a server that misbehaves on demand, over real sockets on 127.0.0.1."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from capipe.errors import BadInput
from capipe.models.engines.base import (
    ChoiceRequest,
    Engine,
    EngineDead,
    GenerationRequest,
    ImageInput,
    Prompt,
    RequestError,
    Sampling,
    unsupported,
)
from capipe.models.engines.http.engine import connect_http_engine
from capipe.models.engines.http.server import base_url, served_model
from capipe.models.engines.vllm.weight_sync import Precision

from ...conftest import photo
from ..chat_server import ASK, Answer, Double, ask, completion, options, serving


async def test_a_request_says_all_that_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPIPE_API_KEY", "secret")
    double = Double(lambda n, body: completion(" a dog.", "length"))
    encoded = photo(1)
    prompt = Prompt("Describe.", ImageInput("u", encoded=encoded), system="Be brief.", answer_prefix="I see")
    request = GenerationRequest(prompt, Sampling(0.7, 0.9, 7, 3))
    answer = await ask(double, request, max_pixels=50_000)
    assert (answer.text, answer.finish_reason, answer.n_tokens, answer.token_ids) == (" a dog.", "length", 4, ())
    body = double.bodies[0]
    sent = base64.b64decode(
        body["messages"][1]["content"][0]["image_url"]["url"].removeprefix("data:image/jpeg;base64,")
    )
    assert sent == encoded
    assert [each["role"] for each in body["messages"]] == ["system", "user", "assistant"]
    assert body["messages"][1]["content"][1] == {"type": "text", "text": "Describe."}
    assert body["messages"][2]["content"] == "I see"
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)
    assert (body["model"], body["temperature"], body["top_p"], body["max_tokens"], body["seed"]) == (
        "captioner",
        0.7,
        0.9,
        7,
        3,
    )
    assert body["mm_processor_kwargs"] == {"max_pixels": 50_000}
    assert (body["repetition_penalty"], body["top_k"]) == (1.0, -1)
    assert double.headers[0]["authorization"] == "Bearer secret"


async def test_a_plain_openai_server_gets_no_foreign_fields() -> None:
    double = Double(lambda n, body: completion("x"), owner="somebody")
    await ask(double)
    assert double.bodies[0].keys() == {
        "model", "messages", "max_tokens", "temperature", "top_p", "seed", "logprobs",
    }  # fmt: skip
    refused = await ask(double, GenerationRequest(Prompt("Describe.", answer_prefix="I")))
    assert "neither vLLM nor SGLang" in str(refused)


async def test_only_vllm_and_sglang_are_sent_a_penalty_and_a_least_length() -> None:
    sampling = Sampling(max_tokens=7, repetition_penalty=1.05, min_tokens=4)
    double = Double(lambda n, body: completion("x"))
    await ask(double, GenerationRequest(Prompt("Describe."), sampling))
    assert (double.bodies[0]["repetition_penalty"], double.bodies[0]["min_tokens"]) == (1.05, 4)
    other = Double(lambda n, body: completion("x"), owner="somebody")
    refused = await ask(other, GenerationRequest(Prompt("Describe."), sampling))
    assert "--min-tokens 4: the server is neither vLLM nor SGLang" in str(refused) and not other.bodies


async def test_no_server_searches_by_beams() -> None:
    double = Double(lambda n, body: completion("x"))
    refused = await ask(double, GenerationRequest(Prompt("Describe."), Sampling(beams=5)))
    assert "--beams 5: a server does not decode so; give --engine transformers" in str(refused) and not double.bodies
    with serving(double) as url:
        engine = await connect_http_engine(options(url))
        assert unsupported(engine, Sampling(min_tokens=4)) is None
        assert "--no-repeat-ngram 2" in str(unsupported(engine, Sampling(no_repeat_ngram=2)))
        await engine.aclose()


async def test_a_schema_goes_in_openais_form() -> None:
    double = Double(lambda n, body: completion('{"a": 1}'), owner="somebody")
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    answer = await ask(double, GenerationRequest(Prompt("Count."), json_schema=json.dumps(schema)))
    assert answer.text == '{"a": 1}'
    assert double.bodies[0]["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": schema, "strict": True},
    }
    refused = await ask(double, GenerationRequest(Prompt("Count."), json_schema="{"))
    assert isinstance(refused, RequestError)
    assert "not JSON" in str(refused)
    assert len(double.bodies) == 1


@pytest.mark.parametrize("status", [429, 500, 502, 503])
async def test_a_passing_fault_is_tried_again(status: int) -> None:
    double = Double(lambda n, body: completion("at last") if n == 2 else (status, {}, {"error": {"message": "busy"}}))
    answer = await ask(double)
    assert (answer.text, len(double.bodies)) == ("at last", 3)


async def test_attempts_are_bounded_and_the_reason_is_the_servers() -> None:
    double = Double(lambda n, body: (500, {}, {"error": {"message": "on fire"}}))
    error = await ask(double)
    assert isinstance(error, RequestError)
    assert (str(error), len(double.bodies)) == ("gave up after 3 attempts: HTTP 500: on fire", 3)


async def test_a_refusal_is_final_at_once() -> None:
    double = Double(lambda n, body: (400, {}, {"message": "prompt too long"}))
    error = await ask(double)
    assert isinstance(error, RequestError)
    assert (str(error), len(double.bodies)) == ("HTTP 400: prompt too long", 1)


async def test_retry_after_is_honoured() -> None:
    double = Double(lambda n, body: completion("x") if n else (429, {"Retry-After": "0.6"}, {}))
    await ask(double)
    assert double.times[1] - double.times[0] >= 0.6


async def test_a_server_that_never_answers_costs_timeout_times_attempts() -> None:
    started = time.monotonic()
    error = await ask(Double(lambda n, body: None), timeout_s=0.2)
    assert isinstance(error, RequestError)
    assert "ReadTimeout" in str(error)
    assert 0.6 <= time.monotonic() - started < 5


@pytest.mark.parametrize(
    "answer",
    [
        (200, {}, b"<html>"),
        (200, {}, []),
        (200, {}, {"choices": []}),
        (200, {}, {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}),
        completion("x", "content_filter"),
    ],
)
async def test_an_answer_that_is_none_is_an_error(answer: Answer) -> None:
    assert isinstance(await ask(Double(lambda n, body: answer)), RequestError)


async def test_only_files_that_servers_read_are_sent() -> None:
    double = Double(lambda n, body: completion("x"))
    for image in (ImageInput("u", encoded=b"GIF89a..."), ImageInput("u")):
        assert isinstance(await ask(double, GenerationRequest(Prompt("Describe.", image))), RequestError)
    assert double.bodies == []
    for fmt in ("JPEG", "PNG", "WEBP"):
        encoded = photo(2, fmt=fmt)
        await ask(double, GenerationRequest(Prompt("Describe.", ImageInput("u", encoded=encoded))))
        url = double.bodies[-1]["messages"][0]["content"][0]["image_url"]["url"]
        assert url.startswith(f"data:image/{fmt.lower()};base64,")


async def test_log_probabilities_and_choices() -> None:
    top = [{"token": "B", "logprob": -0.25}, {"token": "A", "logprob": -1.5}, {"token": "x", "logprob": -3.0}]
    steps = {"content": [{"token": "B", "logprob": -0.25, "top_logprobs": top}]}
    double = Double(lambda n, body: completion("B", "length", steps))
    with serving(double) as url:
        engine = await connect_http_engine(options(url))
        scores = await engine.choose(ChoiceRequest(Prompt("Which?"), ("A", "B", "C")))
        drawn = await engine.generate(GenerationRequest(Prompt("Which?"), logprobs=True))
        await engine.aclose()
    assert (scores.logprobs, scores.best) == ((-1.5, -0.25, None), 1)
    assert (double.bodies[0]["max_tokens"], double.bodies[0]["top_logprobs"]) == (1, 20)
    assert drawn.logprobs == (-0.25,)


async def test_a_server_without_log_probabilities_is_an_error() -> None:
    with serving(Double(lambda n, body: completion("B"))) as url:
        engine = await connect_http_engine(options(url))
        with pytest.raises(RequestError, match="no log-probabilities"):
            await engine.choose(ChoiceRequest(Prompt("Which?"), ("A", "B")))
        await engine.aclose()


async def test_a_server_that_is_gone_ends_the_engine() -> None:
    status, _, content = completion("x")
    with serving(Double(lambda n, body: (status, {"connection": "close"}, content))) as url:
        engine = await connect_http_engine(options(url, gone_after=4))
        assert isinstance(engine, Engine)
        await engine.generate(ASK)
    for _ in range(4):
        with pytest.raises(RequestError, match="ConnectError"):
            await engine.generate(ASK)
    with pytest.raises(EngineDead, match="4 requests in a row"):
        await engine.generate(ASK)
    await engine.aclose()


async def test_no_more_requests_are_open_than_the_concurrency() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def slow(n: int, body: dict[str, Any]) -> Answer:
        nonlocal running, most
        with lock:
            running, most = running + 1, max(most, running + 1)
        time.sleep(0.05)
        with lock:
            running -= 1
        return completion("x")

    with serving(Double(slow)) as url:
        engine = await connect_http_engine(options(url, concurrency=3, timeout_s=0.3))
        answers = await asyncio.gather(*(engine.generate(ASK) for _ in range(24)))  # longer in line than the timeout
        await engine.aclose()
    assert (len(answers), most) == (24, 3)


async def test_the_model_is_asked_for_and_checked(unused_tcp_port: int) -> None:
    with serving(Double(lambda n, body: completion("x"))) as url:
        engine = await connect_http_engine(options(f"{url}/v1/"))
        assert (engine.model, served_model(url)) == ("captioner", "captioner")
        await engine.aclose()
        with pytest.raises(BadInput, match="does not serve 'huge'; it serves captioner, other"):
            await connect_http_engine(options(url, model="huge"))
    nobody = f"http://127.0.0.1:{unused_tcp_port}"
    with pytest.raises(BadInput, match="no server answers"):
        await connect_http_engine(options(nobody))
    with pytest.raises(BadInput, match="no server answers"):
        served_model(nobody)


def test_the_base_url_is_taken_with_and_without_v1() -> None:
    assert {base_url(f"http://h:1{end}") for end in ("", "/", "/v1", "/v1/")} == {"http://h:1/v1/"}


async def reload(double: Double) -> None:
    with serving(double) as url:
        engine = await connect_http_engine(options(url))
        try:
            await engine.reload(Path("/shared/weights"))
        finally:
            await engine.aclose()


async def test_new_weights_are_read_and_all_caches_emptied() -> None:
    double = Double(lambda n, body: (200, {}, {"success": True}))
    await reload(double)
    assert double.paths == ["/collective_rpc", "/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"]
    assert double.bodies[0] == {"method": "capipe_reload", "args": ["/shared/weights", True]}


async def test_a_server_says_what_it_computes_in() -> None:
    types = {"weights": "bfloat16", "head": "float32"}
    for content in ({"results": [types]}, {"results": []}, {"results": ["no such method"]}):
        with serving(Double(lambda n, body, content=content: (200, {}, content))) as url:  # type: ignore[misc]
            engine = await connect_http_engine(options(url))
            if content == {"results": [types]}:
                assert await engine.precision() == Precision("bfloat16", "float32")
            else:
                with pytest.raises(EngineDead, match="does not say what it computes in"):
                    await engine.precision()
            await engine.aclose()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((404, {}, {"detail": "Not Found"}), "VLLM_SERVER_DEV_MODE=1 .*vllm_sync.WeightSync"),
        ((500, {}, {"error": {"message": "no such folder"}}), "HTTP 500: no such folder"),
        ((200, {}, {"success": False}), "prefix cache is in use"),
    ],
)
async def test_a_server_without_new_weights_is_no_engine_any_more(answer: Answer, says: str) -> None:
    with pytest.raises(EngineDead, match=says):
        await reload(Double(lambda n, body: answer))


async def test_training_gets_ids_and_bars_what_stands_for_pixels() -> None:
    _, _, content = completion(" a dog.")
    reported = [{"token": "token_id:7", "logprob": math.log(0.2)}, {"token": "token_id:9", "logprob": math.log(0.05)}]
    steps = [{"logprob": math.log(0.3), "top_logprobs": [{"token": "token_id:3", "logprob": -1.2}, *reported]}] * 4
    content["choices"][0] |= {"token_ids": [3, 4, 5, 6], "logprobs": {"content": steps}}
    double = Double(lambda n, body: (200, {}, content))
    request = GenerationRequest(Prompt("Describe."), Sampling(1.0), logprobs=True)
    found = await ask(double, request, token_ids=True, barred=(7, 9))
    assert found.token_ids == (3, 4, 5, 6)
    assert found.logprobs == pytest.approx([math.log(0.3 / 0.75)] * 4)  # what the barred had is the others'
    assert double.bodies[0]["logprob_token_ids"] == [7, 9] and double.bodies[0]["return_tokens_as_token_ids"] is True
    assert double.bodies[0]["return_token_ids"] is True
    assert double.bodies[0]["logit_bias"] == {"7": -100.0, "9": -100.0}
    steps[0]["top_logprobs"].pop()
    unreported = await ask(Double(lambda n, body: (200, {}, content)), request, token_ids=True, barred=(7, 9))
    assert isinstance(unreported, RequestError) and unreported.final and "of token 9" in str(unreported)
    tempered = await ask(double, replace(request, sampling=Sampling(0.7), tempered=True), token_ids=True)
    assert isinstance(tempered, RequestError) and "untempered model only" in str(tempered)
    del content["choices"][0]["token_ids"]
    refused = await ask(Double(lambda n, body: (200, {}, content)), request, token_ids=True)
    assert isinstance(refused, RequestError) and "does not return token ids" in str(refused)
