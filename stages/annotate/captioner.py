"""Captioning stage: named captions for every image, each checked by the quality gate; one output row per row."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

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
from ...models.engines.context import text_room
from .prompts import NamedPrompt
from .quality_gate import GateResult, QualityGateConfig, check_caption
from .wrapping import find_wrapper

_SEVERITY = [Status.ENGINE_ERROR, Status.REFUSED, Status.DEGENERATE, Status.EMPTY, Status.TRUNCATED, Status.OK]


class AnnotateConfig(Growing):
    """Options of captioning. All of them affect the captions, so all of them are in the fingerprint."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    later = ("beams", "no_repeat_ngram", "min_tokens")

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
        return text_room([(self.system or "") + prompt.text for prompt in self.prompts], self.max_tokens)


@dataclass(frozen=True)
class Annotator:
    """Captions rows with one engine. ``model``: its name in the captions."""

    engine: Engine
    model: str
    config: AnnotateConfig

    async def annotate(self, row: Row, image: ImageInput) -> dict[str, Any]:
        """Output row for a readable image. Raises only EngineDead; a failed request is a status."""
        captions = []
        reasons: list[str] = []
        for prompt in self.config.prompts:  # sequentially: later prompts reuse the image from the prefix cache
            for k in range(self.config.samples):
                caption, reason = await self._caption(image, prompt, k)
                captions.append(caption)
                if reason is not None:
                    reasons.append(f"{caption['name']}: {reason}")
        status = min((Status(c["status"]) for c in captions), key=_SEVERITY.index)
        error = "; ".join(reasons) or row.error
        return {**passed_on(row), "status": str(status), "error": error, "captions": captions}

    async def _caption(self, image: ImageInput, prompt: NamedPrompt, k: int) -> tuple[dict[str, Any], str | None]:
        """One caption, resampled until it passes the gate or attempts run out (the last is kept, with its fault)."""
        completion: Completion | None = None
        words = ""  # text of a refusal
        verdict = GateResult(Status.ENGINE_ERROR, "not tried")
        attempt = 0
        while attempt < self.config.max_attempts:
            attempt += 1
            sampling = self._sampling(image.uid, prompt, k, attempt)
            request = GenerationRequest(Prompt(prompt.text, image, self.config.system), sampling)
            try:
                completion = await self.engine.generate(request)
            except Refused as error:  # final: not resampled
                completion, words, verdict = None, error.words, GateResult(Status.REFUSED, str(error))
                break
            except RequestError as error:  # the engine has retried already; `--retry` is for a later run
                completion, verdict = None, GateResult(Status.ENGINE_ERROR, str(error))
                break
            verdict = self._judged(completion, prompt)
            if verdict.status is Status.OK:
                break
        name = prompt.name if self.config.samples == 1 else f"{prompt.name}#{k}"
        caption = {
            "name": name,
            "text": completion.text.strip() if completion else words.strip() or None,
            "model": self.model,
            "prompt_id": prompt.prompt_id,
            "finish_reason": completion.finish_reason if completion else None,
            "n_tokens": completion.n_tokens if completion else None,
            "attempts": attempt,
            "status": str(verdict.status),
        }
        return caption, verdict.reason

    def _judged(self, completion: Completion, prompt: NamedPrompt) -> GateResult:
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
