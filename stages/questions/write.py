"""Question generation: a vision-language model writes multiple-choice questions per image; one output row per row.

CapRL asks for five per image in one call and keeps regex matches (arXiv 2509.22647 §3.1); here the answer is JSON, with
guided decoding if the engine supports it, and unusable questions are kept with a status and the raw text.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ConfigDict, Field, field_validator

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
from ...models.engines.context import text_room
from ...models.quiz import KINDS, MOST_WRITTEN, absent_prompt, absent_schema, writing_prompt, writing_schema
from ..annotate.captioner import derive_seed
from ..annotate.prompts import NamedPrompt
from ..annotate.quality_gate import nothing_written
from .absent import absent_questions
from .layouts import faulty, read_question
from .validate import RawQuestion, checked

MOST_FAILURES = 100  # braces in one answer that do not start an object
_KEY = re.compile(r'"question"\s*:')


class QuestionsConfig(Growing):
    """Options of the writer. All of them affect the questions, so all of them are in the fingerprint."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    later = ("repetition_penalty", "absent")

    per_image: int = Field(5, ge=1, le=20, description="questions asked for per image, in one request")
    fewest: int = Field(1, ge=1, description="ask again while there are fewer usable ones")
    max_attempts: int = Field(3, ge=1, description="requests per image, the first included")
    kinds: tuple[str, ...] = Field(KINDS, min_length=1, description="kinds of question the writer may name")
    temperature: float = Field(0.7, ge=0, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(2048, ge=1, description="longest answer: all questions of one request")
    seed: int = Field(0, description="seed of all sampling, combined with the image's uid")
    repetition_penalty: float = Field(1.0, gt=0, allow_inf_nan=False, description="of tokens in prompt and answer")
    absent: int = Field(0, ge=0, le=20, description="questions per image about things that are not there; 0 for none")

    @field_validator("kinds")
    @classmethod
    def _known(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := sorted(set(kinds) - set(KINDS)):
            raise ValueError(f"no kind of question: {', '.join(unknown)}; there are {', '.join(KINDS)}")
        return kinds

    @property
    def prompt(self) -> NamedPrompt:
        return NamedPrompt("questions", writing_prompt(self.per_image, self.kinds))

    @property
    def absent_prompt(self) -> NamedPrompt:
        return NamedPrompt("absent", absent_prompt(self.absent))

    @property
    def sampling(self) -> Sampling:
        """Of first requests, without a seed."""
        return Sampling(self.temperature, self.top_p, self.max_tokens, repetition_penalty=self.repetition_penalty)

    @property
    def room(self) -> int:
        """Context tokens for a prompt and its answer, without the image."""
        texts = [self.prompt.text, *([self.absent_prompt.text] if self.absent else [])]
        return text_room(texts, self.max_tokens)


@dataclass(frozen=True)
class QuestionWriter:
    """Writes questions with one engine. ``model``: its name in the output rows; ``guided``: decode by JSON schema."""

    engine: Engine
    model: str
    config: QuestionsConfig
    guided: bool

    async def write(self, row: Row, image: ImageInput) -> dict[str, Any]:
        """Output row for a readable image. Raises only EngineDead; a failed request is a status."""
        out = {**passed_on(row), "writer": self.model, "prompt_id": self.config.prompt.prompt_id}
        seen: set[str] = set()
        while out["attempts"] < self.config.max_attempts:
            out["attempts"] += 1
            try:
                completion = await self.engine.generate(self._request(image, out["attempts"]))
            except Refused as error:
                raw = [*out["raw"], error.words] if error.words else out["raw"]
                fate = {"raw": raw} if seen else {"raw": raw, "status": str(Status.REFUSED), "error": str(error)}
                return {**out, **fate}
            except RequestError as error:
                return {**out, "status": str(Status.ENGINE_ERROR), "error": str(error)}
            out |= {"finish_reason": completion.finish_reason, "n_tokens": _added(out["n_tokens"], completion.n_tokens)}
            out["raw"].append(completion.text)
            out["questions"] += [checked(entry, seen, MOST_WRITTEN) for entry in written_questions(completion)]
            if len(seen) >= self.config.fewest:
                break
        if not seen:
            reason = f"no usable question in {out['attempts']} attempts"
            return {**out, "status": str(Status.EMPTY), "error": reason}
        return await self._with_absent(out, image, seen) if self.config.absent else out

    async def _with_absent(self, out: dict[str, Any], image: ImageInput, seen: set[str]) -> dict[str, Any]:
        """The row with questions about absent things, by a request of their own, which is not repeated."""
        try:
            completion = await self.engine.generate(self._absent_request(image))
        except Refused as error:
            return {**out, "raw": [*out["raw"], error.words] if error.words else out["raw"]}
        except RequestError as error:
            return {**out, "status": str(Status.ENGINE_ERROR), "error": str(error)}
        entries = [checked(entry, seen, MOST_WRITTEN) for entry in absent_questions(completion, self.config.absent)]
        return {
            **out,
            "n_tokens": _added(out["n_tokens"], completion.n_tokens),
            "raw": [*out["raw"], completion.text],
            "questions": [*out["questions"], *entries],
        }

    def _request(self, image: ImageInput, attempt: int) -> GenerationRequest:
        config = self.config
        seed = derive_seed(config.seed, image.uid, config.prompt.prompt_id, 0, attempt)
        temperature = config.temperature if attempt == 1 else max(config.temperature, 0.7)  # greedy repeats itself
        sampling = replace(config.sampling, temperature=temperature, seed=seed)
        schema = writing_schema(config.per_image, config.kinds) if self.guided else None
        return GenerationRequest(Prompt(config.prompt.text, image), sampling, json_schema=schema)

    def _absent_request(self, image: ImageInput) -> GenerationRequest:
        config = self.config
        seed = derive_seed(config.seed, image.uid, config.absent_prompt.prompt_id, 0, 1)
        schema = absent_schema(config.absent) if self.guided else None
        prompt = Prompt(config.absent_prompt.text, image)
        return GenerationRequest(prompt, replace(config.sampling, seed=seed), json_schema=schema)


def passed_on(row: Row) -> dict[str, Any]:
    """Output row for an input row without questions: its own status and error."""
    return {
        "key": row.key,
        "uid": row.uid,
        "status": str(row.status),
        "error": row.error,
        "questions": [],
        "raw": [],
        "writer": None,
        "prompt_id": None,
        "finish_reason": None,
        "n_tokens": 0,
        "attempts": 0,
    }


def _added(tokens: int | None, more: int | None) -> int | None:
    """Sum; None if either part is unknown."""
    return None if tokens is None or more is None else tokens + more


def written_questions(completion: Completion) -> list[RawQuestion]:
    """Questions in a writer's answer, including faults for unfinished and unreadable ones."""
    text = completion.text.strip()
    cut = completion.finish_reason == "length"
    listed = _listed(_decoded(text))
    if listed is not None:
        entries, unreadable, cut = [_entry(piece) for piece in listed], 0, False
    else:
        objects, between = _scattered(text)
        entries = [_entry(piece) for piece in objects]
        unreadable = sum(len(_KEY.findall(piece)) for piece in (between[:-1] if cut else between))
    if unreadable:
        entries.append(faulty(f"JSON that cannot be read, of {unreadable} question{'s' if unreadable > 1 else ''}"))
    if completion.thought is not None and not text:
        entries.append(faulty(nothing_written(completion.thought, completion.finish_reason)))
    elif cut:
        entries.append(faulty("the answer was cut at the token limit; what follows this is lost"))
    elif not entries:
        entries.append(faulty("no JSON with questions" if text else "the model wrote nothing"))
    return entries


def _listed(whole: Any) -> list[Any] | None:
    """Questions of a value in the requested format, or of a bare list."""
    questions = whole.get("questions") if isinstance(whole, dict) else whole
    return questions if isinstance(questions, list) else None


def _scattered(text: str) -> tuple[list[Any], list[str]]:
    """Question objects in truncated JSON or JSON within prose; and the text before, between and after them.

    Stops after ``MOST_FAILURES`` braces that do not start an object: each may scan the rest of the text.
    """
    decoder, objects, between = json.JSONDecoder(), list[Any](), list[str]()
    start, at, failures = 0, text.find("{"), 0
    while at >= 0 and failures < MOST_FAILURES:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            failures += 1
            at = text.find("{", at + 1)
            continue
        questions = _listed(value) or ([value] if "question" in value else [])
        if questions:
            objects += questions
            between.append(text[start:at])
            start = end
        at = text.find("{", end)
    return objects, [*between, text[start:]]


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _entry(value: Any) -> RawQuestion:
    if not isinstance(value, dict):
        return faulty(f"a {type(value).__name__} where a question was expected")
    return read_question(value)
