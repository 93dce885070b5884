"""Any server that speaks OpenAI's chat completions (vLLM, SGLang, a gateway): original image bytes out, text back.

The server draws with its own generator, so a seed makes its answers repeatable at most on that server; only greedy
answers are comparable with the in-process engines.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from time import time
from typing import Any

import httpx

from ..errors import BadInput
from .engine import (
    ChoiceRequest,
    ChoiceScores,
    Completion,
    EngineDead,
    GenerationRequest,
    ImageGrid,
    ImageInput,
    Prompt,
    RequestError,
    Sampling,
    Thought,
)
from .thinking import CLOSING, OPENING, Tags, split_thought
from .vllm_sync import EXTENSION, RELOAD

API_KEY_VARIABLE = "CAPIPE_API_KEY"
DEFAULT_CONCURRENCY = 64
CONNECT_SECONDS = 10.0
LONGEST_WAIT_SECONDS = 60.0  # between two attempts, whatever a server's Retry-After asks for
REPORTED_CHOICES = 20  # the most alternatives that OpenAI's protocol reports for a token
THOUGHT_PROBE, PROBE_TOKENS = Prompt("Is one and one two? Answer with yes or no."), 256
EXTENDED_SERVERS = ("vllm", "sglang")  # as they name themselves in /v1/models: they take more than OpenAI's fields


@dataclass(frozen=True)
class HTTPOptions:
    """``model=""``: the server's first one. ``timeout_s``: for one attempt. ``attempts``: how often to try in all.

    ``gone_after``: so many requests in a row that could not even connect mean that the server is gone. ``token_ids``:
    ask for the ids of what was written, which vLLM alone tells; ``barred``: ids that are never to be drawn.
    ``template_args``: for the server's chat template.
    """

    url: str
    model: str = ""
    min_pixels: int | None = None
    max_pixels: int | None = None
    concurrency: int = DEFAULT_CONCURRENCY
    timeout_s: float = 300.0
    attempts: int = 5
    backoff_s: float = 0.5
    gone_after: int = 20
    token_ids: bool = False
    barred: tuple[int, ...] = ()
    template_args: Mapping[str, Any] = field(default_factory=dict)


class HTTPEngine:
    """Implements :class:`~.engine.Engine`; made by :func:`connect_http_engine`."""

    guides = True  # or the server refuses the request, which is then its error

    def __init__(self, options: HTTPOptions, client: httpx.AsyncClient, model: str, extended: bool) -> None:
        self.grid: ImageGrid | None = None  # the server resizes; it gets the encoded bytes
        self.concurrency = options.concurrency
        self.model = model
        self._options = options
        self._client = client
        self._extended = extended
        self._unconnected = 0  # requests in a row that never reached the server
        self._thinks: asyncio.Task[bool] | None = None

    async def generate(self, request: GenerationRequest) -> Completion:
        sampling = request.sampling
        body = self._body(request.prompt, sampling.max_tokens, sampling.temperature)
        body |= {"top_p": sampling.top_p, "seed": sampling.seed, "logprobs": request.logprobs}
        if request.json_schema is not None:
            body["response_format"] = _response_format(request.json_schema)
        answer = await self._post(body)
        choice = _first_choice(answer)
        reason, (text, thought) = choice.get("finish_reason"), _answer(choice.get("message", {}))
        if reason not in ("stop", "length") or not isinstance(text, str):
            raise RequestError(f"the server ended the answer with {reason!r} and {type(text).__name__} content")
        logprobs = tuple(float(step["logprob"]) for step in _steps(choice)) if request.logprobs else None
        n_tokens = int((answer.get("usage") or {}).get("completion_tokens", 0))
        ids = _token_ids(choice, n_tokens) if self._options.token_ids else ()
        return Completion(text, ids, reason, n_tokens, logprobs, thought)

    async def choose(self, request: ChoiceRequest) -> ChoiceScores:
        body = self._body(request.prompt, max_tokens=1, temperature=0.0)
        body |= {"logprobs": True, "top_logprobs": REPORTED_CHOICES}
        steps = _steps(_first_choice(await self._post(body)))
        reported = steps[0].get("top_logprobs", []) if steps else []
        scores = {each["token"]: float(each["logprob"]) for each in reported}
        return ChoiceScores(tuple(scores.get(choice) for choice in request.choices))

    async def thinks(self) -> bool:
        """Whether the server's model thinks before it answers: asked once, as a server does not tell its template."""
        asked = self._thinks = self._thinks or asyncio.create_task(self._thinks_before(THOUGHT_PROBE))
        try:
            return await asyncio.shield(asked)
        except (RequestError, EngineDead):
            if self._thinks is asked:
                self._thinks = None  # the next one asks again
            raise

    async def _thinks_before(self, prompt: Prompt) -> bool:
        return (await self.generate(GenerationRequest(prompt, Sampling(max_tokens=PROBE_TOKENS)))).thought is not None

    async def reload(self, folder: Path) -> None:
        """Let the server read new weights from a folder that it sees, too, and forget what the old ones computed.

        For a vLLM server in development mode with :class:`.vllm_sync.WeightSync` in its workers, while it has nothing
        to do. Raises EngineDead.
        """
        await self._command("collective_rpc", {"method": RELOAD, "args": [str(folder)]})
        emptied = await self._command("reset_prefix_cache")
        await self._command("reset_mm_cache")
        await self._command("reset_encoder_cache")
        if b"true" not in emptied.content:
            raise EngineDead(f"{self._options.url}: its prefix cache is in use and could not be emptied")

    async def _command(self, name: str, body: dict[str, Any] | None = None) -> httpx.Response:
        """One of the server's own commands, which lie beside the protocol's root."""
        url = base_url(self._options.url).removesuffix("v1/") + name
        try:
            response = await self._client.post(url, json=body)
        except httpx.TransportError as error:
            raise EngineDead(f"{url}: {type(error).__name__}: {error}") from error
        if response.status_code == httpx.codes.NOT_FOUND:
            raise EngineDead(
                f"{url}: no such command; start the server with VLLM_SERVER_DEV_MODE=1 and --worker-extension-cls "
                f"{EXTENSION}"
            )
        if not response.is_success:
            raise EngineDead(f"{url}: HTTP {response.status_code}: {_server_message(response)}")
        return response

    async def aclose(self) -> None:
        await self._client.aclose()

    def _body(self, prompt: Prompt, max_tokens: int, temperature: float) -> dict[str, Any]:
        chat: list[dict[str, Any]] = []
        if prompt.system is not None:
            chat.append({"role": "system", "content": prompt.system})
        content: Any = prompt.text
        if prompt.image is not None:
            image = {"type": "image_url", "image_url": {"url": data_url(prompt.image)}}
            content = [image, {"type": "text", "text": prompt.text}]
        chat.append({"role": "user", "content": content})
        body = {"model": self.model, "messages": chat, "max_tokens": max_tokens, "temperature": temperature}
        return body | self._extensions(prompt, chat)

    def _extensions(self, prompt: Prompt, chat: list[dict[str, Any]]) -> dict[str, Any]:
        """The fields beyond OpenAI's. ``chat`` gets the answer's beginning where there is one."""
        options, fields = self._options, dict[str, Any]()
        limits = {"min_pixels": options.min_pixels, "max_pixels": options.max_pixels}
        limits = {name: value for name, value in limits.items() if value is not None}
        if prompt.image is not None and limits:
            fields["mm_processor_kwargs"] = limits
        beginning = ("" if prompt.thought is None else Tags().closed(prompt.thought)) + prompt.answer_prefix
        if beginning:
            chat.append({"role": "assistant", "content": beginning})
            fields |= {"continue_final_message": True, "add_generation_prompt": False}
        if options.template_args:
            fields["chat_template_kwargs"] = dict(options.template_args)
        if fields and not self._extended:
            raise RequestError(f"the server is neither vLLM nor SGLang and would not heed {', '.join(fields)}")
        if self._extended:
            # Or the server would apply what the model's generation_config.json recommends, as no other engine does.
            fields |= {"top_k": -1, "repetition_penalty": 1.0}
        if options.token_ids:
            fields["return_token_ids"] = True
        if options.barred:
            fields["logit_bias"] = {str(token): -100.0 for token in options.barred}
        return fields

    async def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        """The server's answer to one chat completion, after as many attempts as it takes and the options allow."""
        options, reason, connected = self._options, "", False
        for attempt in range(options.attempts):
            if self._unconnected >= options.gone_after:
                raise EngineDead(f"{options.url}: {self._unconnected} requests in a row could not connect")
            wait = random.uniform(0.5, 1.0) * options.backoff_s * 2**attempt
            try:
                response = await self._client.post("chat/completions", json=body)
            except httpx.TransportError as error:
                reason = f"{type(error).__name__}: {error}".rstrip(": ")
                connected |= not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            else:
                connected, self._unconnected = True, 0
                if response.is_success:
                    return _json_object(response)
                reason = f"HTTP {response.status_code}: {_server_message(response)}"
                if response.status_code not in (408, 429) and response.status_code < 500:
                    raise RequestError(reason)
                wait = max(wait, _retry_after(response))
            if attempt + 1 < options.attempts:
                await asyncio.sleep(min(wait, LONGEST_WAIT_SECONDS))
        if not connected:
            self._unconnected += 1
        raise RequestError(f"gave up after {options.attempts} attempts: {reason}")


async def connect_http_engine(options: HTTPOptions) -> HTTPEngine:
    """Find the server and its model. Raises BadInput where it does not answer or does not have the model."""
    base = base_url(options.url)
    client = httpx.AsyncClient(
        base_url=base,
        headers=_authorization(),
        limits=httpx.Limits(max_connections=options.concurrency, max_keepalive_connections=options.concurrency),
        timeout=httpx.Timeout(options.timeout_s, connect=CONNECT_SECONDS, pool=None),  # waiting for a turn is no fault
    )
    try:
        served = _models((await client.get("models")), base)
    except httpx.TransportError as error:
        await client.aclose()
        raise _no_answer(base, error) from error
    except BadInput:
        await client.aclose()
        raise
    model = options.model or next(iter(served))
    if model not in served:
        await client.aclose()
        raise BadInput(f"{base} does not serve {model!r}; it serves {', '.join(served)}")
    return HTTPEngine(options, client, model, served[model] in EXTENDED_SERVERS)


def served_model(url: str) -> str:
    """The name of the server's first model. Raises BadInput as :func:`connect_http_engine` does."""
    base = base_url(url)
    try:
        response = httpx.get(base + "models", headers=_authorization(), timeout=CONNECT_SECONDS)
    except httpx.TransportError as error:
        raise _no_answer(base, error) from error
    return next(iter(_models(response, base)))


def base_url(url: str) -> str:
    """``http://host:8000`` and ``http://host:8000/v1/`` both as ``http://host:8000/v1/``."""
    trimmed = url.rstrip("/")
    return f"{trimmed}/" if trimmed.endswith("/v1") else f"{trimmed}/v1/"


def _response_format(json_schema: str) -> dict[str, Any]:
    """OpenAI's form of a schema to keep to. Raises RequestError for text that is not JSON.

    What white space is allowed is the server's own setting (vLLM: ``--structured-outputs-config``); the protocol has
    no word for it, and a weak model may fill its answer with it.
    """
    try:
        schema = json.loads(json_schema)
    except ValueError as error:
        raise RequestError(f"the JSON schema is not JSON: {error}") from error
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def data_url(image: ImageInput) -> str:
    """The file's own bytes, never encoded again. Raises RequestError for what servers do not read."""
    data = image.encoded
    if data is None:
        raise RequestError(f"image {image.uid} has no encoded bytes; an HTTP engine sends the file as it is")
    media_type = sniff(data)
    if media_type is None:
        raise RequestError(f"image {image.uid} is none of JPEG, PNG, WebP, which are what servers read")
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def sniff(data: bytes) -> str | None:
    """The media type by the first bytes, None for anything but JPEG, PNG and WebP."""
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    return "image/webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def _authorization() -> dict[str, str]:
    key = os.environ.get(API_KEY_VARIABLE)
    return {"Authorization": f"Bearer {key}"} if key else {}


def _no_answer(base: str, error: httpx.TransportError) -> BadInput:
    return BadInput(f"{base}: no server answers ({type(error).__name__}: {error}); start it or mend --engine")


def _models(response: httpx.Response, base: str) -> dict[str, str]:
    """Model names and who serves them, at least one."""
    if response.status_code in (401, 403):
        raise BadInput(f"{base} refuses the key (HTTP {response.status_code}); set {API_KEY_VARIABLE}")
    try:
        listed = {each["id"]: str(each.get("owned_by", "")) for each in response.raise_for_status().json()["data"]}
    except (httpx.HTTPStatusError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{base}models lists no models ({type(error).__name__}); is the URL an OpenAI API?") from error
    if not listed:
        raise BadInput(f"{base} serves no model")
    return listed


def _json_object(response: httpx.Response) -> dict[str, Any]:
    try:
        answer = response.json()
    except ValueError as error:
        raise RequestError(f"the server's answer is not JSON: {response.text[:200]!r}") from error
    if not isinstance(answer, dict):
        raise RequestError(f"the server's answer is no JSON object: {response.text[:200]!r}")
    return answer


def _written(text: str) -> str:
    """What a server says the model wrote, without half surrogate pairs: JSON may bring them and UTF-8 has none."""
    return text.encode("utf-8", "replace").decode()


def _answer(message: dict[str, Any]) -> tuple[Any, Thought | None]:
    """A message's text and the thought before it, which servers that know the tags tell apart by themselves.

    A closing tag alone ends a thought, too, that the server's chat template had opened.
    """
    text, apart = message.get("content"), message.get("reasoning_content") or message.get("reasoning")
    if isinstance(apart, str):
        return text or "", Thought(_written(apart).strip(), closed=bool(text))
    if not isinstance(text, str):
        return text, None
    return split_thought(_written(text), begun=CLOSING in text and OPENING not in text)


def _first_choice(answer: dict[str, Any]) -> dict[str, Any]:
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise RequestError(f"the server's answer has no choices: {str(answer)[:200]}")
    return choices[0]


def _steps(choice: dict[str, Any]) -> list[dict[str, Any]]:
    """The reported tokens with their log-probabilities, in order."""
    steps = (choice.get("logprobs") or {}).get("content")
    if not isinstance(steps, list):
        raise RequestError("the server reports no log-probabilities")
    return steps


def _token_ids(choice: dict[str, Any], count: int) -> tuple[int, ...]:
    ids = choice.get("token_ids")
    if not isinstance(ids, list) or len(ids) != count:
        raise RequestError("the server does not tell the ids of its tokens; training draws from a vLLM server")
    return tuple(ids)


def _server_message(response: httpx.Response) -> str:
    try:
        answer = response.json()
    except ValueError:
        return response.text[:500]
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    return str(error.get("message", error) if isinstance(error, dict) else error)[:500]


def _retry_after(response: httpx.Response) -> float:
    """Seconds the server asks to wait, 0 where it says nothing intelligible; the header is a number or a date."""
    value = response.headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time())
    except ValueError:
        return 0.0
