"""Engine for any server with OpenAI's chat completions (vLLM, SGLang, a gateway): sends image bytes, receives text.

The server samples with its own generator, so a seed makes its answers repeatable at most on that server; only greedy
answers are comparable with the in-process engines.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

from ....errors import BadInput
from ...images.grid import ImageGrid
from ..base import (
    ChoiceRequest,
    ChoiceScores,
    Completion,
    EngineDead,
    GenerationRequest,
    Prompt,
    RequestError,
    Sampling,
)
from ..decoding import refused_by_server, server_fields
from ..plain_text import plain_for_servers, plain_prompt
from ..thinking import Tags
from .answers import (
    NO_LOGPROBS,
    SentAway,
    Unavailable,
    json_object,
    read_choice,
    read_complaint,
    read_completion,
    retry_after,
)
from .exchange import exchange
from .fields import ALTERNATIVES, REPORTED_CHOICES, Fields, UntakenField, response_format
from .images import data_url, shown
from .limits import MOST, AdaptiveLimit, Limiter, room_for_connections
from .server import (
    CONNECT_SECONDS,
    EXTENDED_SERVERS,
    Connections,
    base_url,
    chosen_model,
    listed_models,
    model_context,
    models,
    no_answer,
)
from .trained import TrainedServer

LONGEST_BACKOFF_SECONDS = 15.0
THOUGHT_PROBE, PROBE_TOKENS = Prompt("Is one and one two? Answer with yes or no."), 256


@dataclass(frozen=True)
class HTTPOptions:
    """``model=""``: the server's first one. ``timeout_s``: for one attempt, to the last byte of its answer.

    ``attempts``: the maximum number of attempts. ``concurrency``: requests in flight, None for adaptive (at most
    ``most``). ``patience_s``: how long a request waits for a server that reports it is busy (429, 502, 503, 529).
    ``gone_after``: so many requests in a row that could not even connect mean that the server is gone. ``token_ids``:
    ask for the ids of generated tokens, which only vLLM returns; ``barred``: ids that are never sampled.
    ``template_args``: for the chat template.
    """

    url: str
    model: str = ""
    min_pixels: int | None = None
    max_pixels: int | None = None
    concurrency: int | None = None
    most: int = MOST
    timeout_s: float = 300.0
    attempts: int = 5
    backoff_s: float = 0.5
    patience_s: float = 300.0
    gone_after: int = 20
    token_ids: bool = False
    barred: tuple[int, ...] = ()
    template_args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setback:
    """A failed attempt. ``wait``: seconds that the server asks for."""

    reason: str
    busy: bool = False
    connected: bool = True
    wait: float | None = None


class HTTPEngine(TrainedServer):
    """Implements :class:`~.engine.Engine`; made by :func:`connect_http_engine`."""

    guides = True  # otherwise the server refuses the request, which fails it

    def __init__(
        self,
        options: HTTPOptions,
        connections: Connections,
        model: str,
        extended: bool,
        context: int | None = None,
    ) -> None:
        self.grid: ImageGrid | None = None  # the server resizes; it gets the encoded bytes
        self.context = context
        self.model = model
        self.load = 0  # requests in flight, queued and between two attempts
        self._options: HTTPOptions = options
        self._connections = connections
        self._extended = extended
        self._fields = Fields(options.url)
        self._limiter = Limiter(options.concurrency or AdaptiveLimit(most=options.most))
        self._places = itertools.count()
        self._unconnected = 0  # consecutive requests that never reached the server
        self._answered_at = 0.0  # monotonic seconds of the last answer
        self._thinks: asyncio.Task[bool] | None = None

    @property
    def concurrency(self) -> int:
        return self._limiter.limit

    async def generate(self, request: GenerationRequest) -> Completion:
        request.refuse_tempered("a server")
        request, options = replace(request, prompt=await shown(request.prompt)), self._options
        answer = await self._post(lambda: self._generation(request))
        return read_completion(answer, request.logprobs, options.token_ids, options.barred)

    async def choose(self, request: ChoiceRequest) -> ChoiceScores:
        request = replace(request, prompt=await shown(request.prompt))
        try:
            answer = await self._post(lambda: self._choice(request))
        except UntakenField as error:
            if error.field in ("logprobs", ALTERNATIVES):
                raise RequestError(f"{NO_LOGPROBS} ({error})", final=True) from error
            raise
        return read_choice(answer, request.choices)

    async def check(self) -> None:
        """Raise BadInput (:class:`.server.NoAnswer` where it is down) unless the server has the model."""
        base = base_url(self._options.url)
        try:
            with self._connections.pool() as client:
                response = await models(client)
        except httpx.HTTPError as error:
            raise no_answer(base, error) from error
        chosen_model(listed_models(response, base), self.model, base)

    def works_since(self, moment: float, busy: bool) -> bool:
        """Whether the server has answered a request since; if ``busy``, also whether one from before is still there."""
        return self._answered_at >= moment or (busy and self._limiter.oldest < moment)

    def shut(self, reason: str) -> None:
        """Fail waiting and new requests, until ``reopen``; requests already at the server may still succeed."""
        self._limiter.shut(lambda: SentAway(reason))

    def reopen(self) -> None:
        self._unconnected = 0
        self._limiter.reopen()

    def unsupported(self, sampling: Sampling) -> str | None:
        return refused_by_server(sampling, self._extended)

    async def thinks(self) -> bool:
        """Whether the server's model thinks before it answers: probed once, as servers do not expose templates."""
        asked = self._thinks = self._thinks or asyncio.create_task(self._thinks_before(THOUGHT_PROBE))
        try:
            return await asyncio.shield(asked)
        except (RequestError, EngineDead):
            if self._thinks is asked:
                self._thinks = None  # the next call probes again
            raise

    async def _thinks_before(self, prompt: Prompt) -> bool:
        return (await self.generate(GenerationRequest(prompt, Sampling(max_tokens=PROBE_TOKENS)))).thought is not None

    async def count_tokens(self, prompt: Prompt) -> int | None:
        return None

    async def aclose(self) -> None:
        await self._connections.aclose()

    # --- requests ----------------------------------------------------------------------------------------------------

    def _generation(self, request: GenerationRequest) -> dict[str, Any]:
        sampling = request.sampling
        body = self._body(request.prompt, sampling.max_tokens, sampling.temperature)
        body |= {"top_p": sampling.top_p, "seed": sampling.seed, "logprobs": request.logprobs}
        if request.logprobs and self._options.barred:  # a server reports probabilities among all ids, these included
            body |= {"logprob_token_ids": list(self._options.barred), "return_tokens_as_token_ids": True}
        body |= server_fields(sampling, self._extended)
        if request.json_schema is not None:
            body["response_format"] = response_format(request.json_schema)
        return body

    def _choice(self, request: ChoiceRequest) -> dict[str, Any]:
        body = self._body(request.prompt, max_tokens=1, temperature=0.0)
        return body | {"logprobs": True, ALTERNATIVES: REPORTED_CHOICES}

    def _body(self, prompt: Prompt, max_tokens: int, temperature: float) -> dict[str, Any]:
        prompt = plain_prompt(prompt, plain_for_servers)
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
        """The fields beyond OpenAI's. Appends the answer's start to ``chat`` where there is one."""
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
            raise RequestError(
                f"the server is neither vLLM nor SGLang and would not heed {', '.join(fields)}", final=True
            )
        if self._extended:
            # Otherwise the server would apply the model's generation_config.json, as no other engine does.
            fields |= {"top_k": -1, "repetition_penalty": 1.0}
        if options.token_ids:
            fields["return_token_ids"] = True
        if options.barred:
            fields["logit_bias"] = {str(token): -100.0 for token in options.barred}
        return fields

    # --- attempts ----------------------------------------------------------------------------------------------------

    async def _post(self, build: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The server's answer to one chat completion, retried as the options allow.

        The body is rebuilt for each attempt: a queue of thousands would hold as many encoded images.
        """
        trial, priority = Trial(self._options), next(self._places)
        self.load += 1
        try:
            while True:
                if self._unconnected >= self._options.gone_after:
                    raise EngineDead(f"{self._options.url}: {self._unconnected} requests in a row could not connect")
                outcome = await self._attempt(build, priority)
                if not isinstance(outcome, Setback):
                    return outcome
                await self._limiter.sleep(trial.wait_after(outcome))
        except Unavailable:
            if trial.setbacks and not trial.connected:
                self._unconnected += 1
            raise
        finally:
            self.load -= 1

    async def _attempt(self, build: Callable[[], dict[str, Any]], priority: int) -> dict[str, Any] | Setback:
        """One attempt, or as many as it takes to find the fields that the server accepts."""
        limiter = self._limiter
        while True:
            async with limiter.slot(priority) as slot:
                body = build()
                sent = self._fields.spelled(body)
                try:
                    with self._connections.pool() as client:
                        response = await exchange(client, "POST", "chat/completions", self._options.timeout_s, sent)
                except httpx.DecodingError as error:
                    self._answered_at = time.monotonic()
                    return Setback(str(error))
                except httpx.HTTPError as error:
                    if isinstance(error, httpx.ReadTimeout | httpx.WriteTimeout):
                        limiter.refused(slot)
                    connected = not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
                    return Setback(f"{type(error).__name__}: {error}".rstrip(": "), connected=connected)
                self._unconnected = 0
                if response.is_success:
                    limiter.answered(slot)
                    self._answered_at = time.monotonic()
                    return json_object(response) or Setback("the answer broke on its way: its body is no whole JSON")
                complaint = read_complaint(response)
                if complaint.passing:
                    wait = retry_after(response)
                    if complaint.busy:
                        limiter.refused(slot)
                    if complaint.busy and wait:
                        limiter.pause(min(wait, self._options.patience_s))
                    return Setback(f"HTTP {complaint.status}: {complaint.message}", complaint.busy, wait=wait)
                self._answered_at = time.monotonic()
            if not self._fields.adapt(body, sent, complaint):
                raise complaint.error()


class Trial:
    """The attempts at one request: how many are left, and how long it still waits for a busy server."""

    def __init__(self, options: HTTPOptions) -> None:
        self._options = options
        self.setbacks = self._failures = 0
        self.connected = False
        self._busy_since: float | None = None

    def wait_after(self, setback: Setback) -> float:
        """Seconds until the next attempt. Raises Unavailable where none is left."""
        options, now = self._options, time.monotonic()
        wait: float = random.uniform(0.5, 1.0) * min(options.backoff_s * 2**self.setbacks, LONGEST_BACKOFF_SECONDS)
        wait = max(wait, setback.wait or 0.0)
        self.setbacks += 1
        self.connected |= setback.connected
        if setback.busy:
            self._busy_since = self._busy_since if self._busy_since is not None else now
            left = options.patience_s - (now - self._busy_since)
            if left <= 0:
                raise Unavailable(f"the server was busy for {options.patience_s:g} s: {setback.reason}", busy=True)
            return min(wait, left)
        self._failures += 1
        if self._failures >= options.attempts:
            raise Unavailable(f"gave up after {options.attempts} attempts: {setback.reason}")
        return wait


async def connect_http_engine(options: HTTPOptions) -> HTTPEngine:
    """Find a server and its model. Raises BadInput where it does not have the model, NoAnswer where it is down."""
    base = base_url(options.url)
    room = room_for_connections(options.concurrency or options.most)
    if options.concurrency and room < options.concurrency:
        reason = f"needs as many open files; `ulimit -n` leaves {room} to {base}"
        raise BadInput(f"--concurrency {options.concurrency} {reason}")
    options = replace(options, most=room)
    connect = min(CONNECT_SECONDS, 0.9 * options.timeout_s)  # to distinguish it from a server that does not answer
    connections = Connections(base, httpx.Timeout(options.timeout_s, connect=connect))
    try:
        with connections.pool() as client:
            response = await models(client)
        served = listed_models(response, base)
        model = chosen_model(served, options.model, base)
    except httpx.HTTPError as error:
        await connections.aclose()
        raise no_answer(base, error) from error
    except BadInput:
        await connections.aclose()
        raise
    return HTTPEngine(options, connections, model, served[model] in EXTENDED_SERVERS, model_context(response, model))
