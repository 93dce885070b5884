"""Captioning stage: named captions for every image, each checked by the quality gate; one output row per row."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from pydantic import ConfigDict, Field, model_validator

from ...manifests.configuration import Growing
from ...manifests.shards import Row
from ...manifests.status import Status
from ...models.engines.base import (
    Completion,
    Engine,
    GenerationRequest,
    ImageInput,
    Prompt,
    Refused,
    RequestError,
    Sampling,
)
from ...models.engines.context import OTHER_VOCABULARY, text_room
from .prompts import NamedPrompt, asking_order
from .quality_gate import GateResult, QualityGateConfig, check_caption
from .row_prompt import Asked, RowValues, Unasked, kth
from .templates import fields, without_fields
from .wrapping import find_wrapper

CAPTIONS = "captions"  # name of the companion artifact whose captions prompts may take
_SEVERITY = [Status.ENGINE_ERROR, Status.REFUSED, Status.DEGENERATE, Status.EMPTY, Status.TRUNCATED, Status.OK]


class AnnotateConfig(Growing):
    """Options of captioning. All of them affect the captions, so all of them are in the fingerprint."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    later = ("beams", "no_repeat_ngram", "min_tokens", "fallbacks", "field_bytes", "given_tokens")

    prompts: tuple[NamedPrompt, ...] = Field(min_length=1, description="what to ask about every image")
    samples: int = Field(1, ge=1, description="captions per prompt and image")
    system: str | None = Field(None, description="system message, if the model was trained with one")
    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(1024, ge=1, description="longest caption in tokens of the model")
    seed: int = Field(0, description="seed of all sampling, combined with the image's uid")
    max_attempts: int = Field(3, ge=1, description="rolls of an unhealthy caption, the first included")
    reroll_temperature: float = Field(
        0.7, gt=0, description="least temperature of a re-roll: a greedy one would repeat itself"
    )
    health: QualityGateConfig = QualityGateConfig()
    beams: int = Field(1, ge=1, description="width of a beam search; re-rolls are sampled without one")
    no_repeat_ngram: int = Field(0, ge=0, description="no n-gram of so many tokens occurs twice; 0 is no rule")
    min_tokens: int = Field(0, ge=0, description="shortest caption in tokens of the model")
    fallbacks: tuple[NamedPrompt, ...] = Field(
        (), description="asked instead of the prompt of the same name where the row lacks a field of it"
    )
    field_bytes: int = Field(1024, ge=64, description="longest value of the row in a prompt, in bytes of UTF-8")
    given_tokens: int = Field(0, ge=0, description="longest caption in tokens of the model that wrote the given ones")

    @model_validator(mode="after")
    def _decodable(self) -> AnnotateConfig:
        _ = self.sampling  # raises ValueError
        return self

    @property
    def sampling(self) -> Sampling:
        """Of first attempts, without a seed."""
        return Sampling(
            self.temperature,
            self.top_p,
            self.max_tokens,
            beams=self.beams,
            no_repeat_ngram=self.no_repeat_ngram,
            min_tokens=self.min_tokens,
        )

    @property
    def room(self) -> int:
        """Context tokens for a prompt and its caption, without the image."""
        asked = [
            ((self.system or "") + without_fields(each.text), each.text) for each in (*self.prompts, *self.fallbacks)
        ]
        return max(text_room([text], self.max_tokens) + self.value_tokens(template) for text, template in asked)

    @property
    def caption_tokens(self) -> int:
        """Tokens of the longest caption that a later prompt may take."""
        return max(self.max_tokens, OTHER_VOCABULARY * self.given_tokens)

    def value_tokens(self, template: str, bytes_per_token: int = 1) -> int:
        """Upper bound on the tokens of a row's values in a template, in a text of so many bytes a token.

        A caption read as a prompt has a few tokens more than were written: spaces in what could pass for a tag.
        """
        of_row, of_caption = math.ceil(self.field_bytes / bytes_per_token), math.ceil(1.25 * self.caption_tokens)
        return sum(of_caption if field.kind == "captions" else of_row for field in fields(template))


class _Made(NamedTuple):
    """A caption, and why it is not ok."""

    caption: dict[str, Any]
    reason: str | None


class _Tried(NamedTuple):
    """The last of several attempts. ``words``: text of a refusal."""

    completion: Completion | None
    words: str
    result: GateResult
    attempts: int


@dataclass(frozen=True)
class Annotator:
    """Captions rows with one engine. ``model``: its name in the captions."""

    engine: Engine
    model: str
    config: AnnotateConfig

    async def annotate(self, row: Row, image: ImageInput) -> dict[str, Any]:
        """Output row for a readable image. Raises only EngineDead; a failed request is a status."""
        earlier = given_captions(row)
        made: dict[int, list[_Made]] = {}
        for index in self._order:  # sequentially: later prompts reuse the image from the prefix cache
            prompt = self.config.prompts[index]
            made[index] = []
            for k in range(self.config.samples):
                values = RowValues(row, kth(earlier, k), self.config.field_bytes, self.config.caption_tokens)
                made[index].append(await self._caption(image, values.asked(prompt, self._fallback(prompt)), prompt, k))
            earlier[prompt.name] = [each.caption for each in made[index]]
        all_made = [each for index in sorted(made) for each in made[index]]
        captions = [each.caption for each in all_made]
        reasons = [f"{each.caption['name']}: {each.reason}" for each in all_made if each.reason is not None]
        status = min((Status(c["status"]) for c in captions), key=_SEVERITY.index)
        error = "; ".join(reasons) or row.error
        return {**passed_on(row), "status": str(status), "error": error, "captions": captions}

    @cached_property
    def _order(self) -> list[int]:
        """Indices of the prompts in the order in which they are asked. Names of no prompt are given captions'."""
        return asking_order(self.config.prompts, None)

    def _fallback(self, prompt: NamedPrompt) -> NamedPrompt | None:
        return next((each for each in self.config.fallbacks if each.name == prompt.name), None)

    async def _caption(self, image: ImageInput, asked: Asked | Unasked, prompt: NamedPrompt, k: int) -> _Made:
        """The ``k``-th caption of a prompt; without a text if there is nothing to ask."""
        if isinstance(asked, Unasked):
            tried = _Tried(None, "", GateResult(asked.status, asked.reason), 0)
        else:
            prompt = asked.prompt
            tried = await self._tried(image, asked, k)
        completion = tried.completion
        caption = {
            "name": prompt.name if self.config.samples == 1 else f"{prompt.name}#{k}",
            "text": completion.text.strip() if completion else tried.words.strip() or None,
            "model": self.model,
            "prompt_id": prompt.prompt_id,
            "finish_reason": completion.finish_reason if completion else None,
            "n_tokens": completion.n_tokens if completion else None,
            "attempts": tried.attempts,
            "status": str(tried.result.status),
        }
        return _Made(caption, tried.result.reason)

    async def _tried(self, image: ImageInput, asked: Asked, k: int) -> _Tried:
        """A caption, resampled until it passes the gate or attempts run out (the last is kept, with its fault)."""
        completion: Completion | None = None
        result = GateResult(Status.ENGINE_ERROR, "not tried")
        attempt = 0
        while attempt < self.config.max_attempts:
            attempt += 1
            sampling = self._sampling(image.uid, asked.prompt, k, attempt)
            request = GenerationRequest(Prompt(asked.text, image, self.config.system), sampling)
            try:
                completion = await self.engine.generate(request)
            except Refused as error:  # final: not resampled
                return _Tried(None, error.words, GateResult(Status.REFUSED, str(error)), attempt)
            except RequestError as error:  # the engine has retried already; `--retry` is for a later run
                return _Tried(None, "", GateResult(Status.ENGINE_ERROR, str(error)), attempt)
            result = self._judged(completion, asked.prompt)
            if result.status is Status.OK:
                break
        return _Tried(completion, "", result, attempt)

    def _judged(self, completion: Completion, prompt: NamedPrompt) -> GateResult:
        """``prompt``: as written, since a row's values ask for no JSON."""
        wrapper = find_wrapper(completion.text, json_wanted="json" in prompt.text.lower())
        if wrapper is not None:
            return GateResult(Status.DEGENERATE, wrapper)
        return check_caption(completion.text, completion.finish_reason, self.config.health, completion.thought)

    def _sampling(self, uid: str, prompt: NamedPrompt, k: int, attempt: int) -> Sampling:
        first = self.config.sampling
        seed = derive_seed(self.config.seed, uid, prompt.prompt_id, k, attempt)
        if attempt == 1:
            return replace(first, seed=seed)
        temperature = max(first.temperature, self.config.reroll_temperature)
        return replace(first, temperature=temperature, seed=seed, beams=1)


def derive_seed(seed: int, uid: str, prompt_id: str, sample: int, attempt: int) -> int:
    """63-bit seed of a sample, from its identity alone: results do not depend on row order, batch or run."""
    text = f"{seed}/{uid}/{prompt_id}/{sample}/{attempt}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def passed_on(row: Row) -> dict[str, Any]:
    """Output row for an input row without captions: its own status and error, and the original text."""
    return {
        "key": row.key,
        "uid": row.uid,
        "status": str(row.status),
        "error": row.error,
        "text": row.text,
        "captions": [],
    }


def chosen_caption(row: Mapping[str, Any]) -> str:
    """The caption written as ``txt`` to training tars: the first ok one, else the empty string."""
    return next((c["text"] for c in row["captions"] or [] if c["status"] == Status.OK), "")


def given_captions(row: Row) -> dict[str, list[dict[str, Any]]]:
    """Captions of a companion artifact, those of one prompt under its name, in the order of its samples."""
    given: dict[str, list[dict[str, Any]]] = {}
    for caption in row.beside.get(CAPTIONS, {}).get("captions") or []:
        if caption["status"] in _SEVERITY:
            given.setdefault(caption["name"].partition("#")[0], []).append(caption)
    return given
