"""Prompts of a captioner: parsed, and checked against its model before the first image."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from ....errors import BadInput
from ....manifests.artifact import Artifact
from ....manifests.import_path import is_import_path
from ....models.context_check import BYTES_PER_TOKEN, FRAME, context_of, counter_of
from ....models.engines.base import Engine, ImageInput, Prompt, RequestError
from ....models.engines.captioner_registry import check_prompt, kind_of
from ....models.engines.context import image_tokens, too_long
from ....models.engines.loading import EngineConfig
from ....models.engines.model_folder import image_grid, resolve_model
from ....stages.annotate.captioner import CAPTIONS, AnnotateConfig
from ....stages.annotate.prompts import (
    FALLBACK,
    NAMED,
    NamedPrompt,
    asking_order,
    parse_fallback,
    parse_prompt,
    with_fallbacks,
)
from ....stages.annotate.templates import caption_names, fields, resembling, without_fields
from ..artifacts import captions_artifact

FIELD_BYTES = "--field-bytes"


@dataclass(frozen=True)
class ChosenPrompts:
    """Prompts, and the fallbacks of those with fields of the row."""

    prompts: tuple[NamedPrompt, ...]
    fallbacks: tuple[NamedPrompt, ...]

    @property
    def templates(self) -> list[NamedPrompt]:
        """The prompts with fields of the row."""
        return [prompt for prompt in self.prompts if has_fields(prompt)]

    def settings(self, field_bytes: int = AnnotateConfig.model_fields["field_bytes"].default) -> dict[str, Any]:
        """Values for AnnotateConfig. Raises BadInput for a limit that no prompt would use."""
        if field_bytes != AnnotateConfig.model_fields["field_bytes"].default and not self.templates:
            raise BadInput(f"{FIELD_BYTES} {field_bytes}: no prompt has fields of the row; leave it out")
        return {"prompts": self.prompts, "fallbacks": self.fallbacks, "field_bytes": field_bytes}

    def lines(self) -> list[str]:
        """What a user should know of prompts with fields: their fallbacks, and braces that are no field."""
        texts = {prompt.name: prompt.text for prompt in self.fallbacks}
        lines = []
        for prompt in self.templates:
            if (text := texts.get(prompt.name)) is not None:
                asked = f"are asked {text!r}" if text else "are captioned from the image alone"
                lines.append(f"--prompt {prompt.name}: rows that lack a field of it {asked} ({FALLBACK} changes that)")
        for prompt in self.prompts:
            if alike := resembling(prompt.text):
                known = "fields are {text}, {meta.KEY} and {captions.NAME}"
                lines.append(f"warning: --prompt {prompt.name}: {', '.join(alike)} stays as it is; {known}")
        return lines


@dataclass(frozen=True)
class Given:
    """Captions that exist already and that prompts may take. ``tokens``: the longest, in tokens of their model."""

    artifact: Artifact | None = None
    names: frozenset[str] = frozenset()
    tokens: int = 0

    @classmethod
    def of(cls, url: str | None) -> Given:
        """Those of an artifact, if one is named. Raises BadInput if it is of another stage."""
        if url is None:
            return cls()
        artifact = captions_artifact(url)
        tokens = artifact.setting("semantic", "annotate", "max_tokens", kind=int)
        return cls(artifact, frozenset(name for name, _ in artifact.prompts()), tokens)

    @property
    def beside(self) -> dict[str, Artifact]:
        return {} if self.artifact is None else {CAPTIONS: self.artifact}


def has_fields(prompt: NamedPrompt) -> bool:
    return any(True for _ in fields(prompt.text))


def chosen_prompts(
    options: Sequence[str] | None,
    fallbacks: Sequence[str] | None,
    model: str | None,
    engine: str,
    system: str | None = None,
    beside: Collection[str] | None = (),
) -> ChosenPrompts:
    """Prompts of ``--prompt``; by default the plain one, or none for captioners that are not chat models.

    The same is the default of ``fallbacks``, those of ``--fallback-prompt``. ``beside``: names of captions that exist
    already, None if they are not known yet. Raises BadInput for a prompt that the model does not support; prompts for a
    server's model are not checked here.
    """
    if model is None or "://" in engine or is_import_path(engine):
        return parse_prompts(options, fallbacks, beside)
    path = resolve_model(model)
    chosen = parse_prompts(options, fallbacks, beside, "plain" if kind_of(path) is None else "none")
    for prompt in (*chosen.prompts, *chosen.fallbacks):
        check_prompt(model, path, prompt.text, system)
    return chosen


def parse_prompts(
    options: Sequence[str] | None,
    fallbacks: Sequence[str] | None = None,
    beside: Collection[str] | None = (),
    default: str = "plain",
) -> ChosenPrompts:
    """Prompts for any model, as :func:`chosen_prompts`. Raises BadInput."""
    prompts = tuple(parse_prompt(option) for option in options or [default])
    asking_order(prompts, beside)
    given = [parse_fallback(option) for option in fallbacks or ()]
    return ChosenPrompts(prompts, with_fallbacks(prompts, given, NAMED[default]))


def taken_from(prompts: Sequence[NamedPrompt]) -> set[str]:
    """Names of captions that prompts take and none of them writes."""
    return {name for prompt in prompts for name in caption_names(prompt.text)} - {prompt.name for prompt in prompts}


def check_longest(config: AnnotateConfig, engine: EngineConfig) -> None:
    """Raise BadInput if a prompt with the longest values of a row, beside the largest image, leaves no room to answer.

    From the model's folder, before an engine starts; nothing is known of a server that does not report its context.
    """
    templates = [prompt for prompt in config.prompts if has_fields(prompt)]
    context = context_of(engine) if templates else None
    if context is None:
        return
    local = not engine.is_http and not engine.is_own
    grid = image_grid(resolve_model(engine.model), engine.min_pixels, engine.max_pixels) if local else None
    count = counter_of(engine)
    for prompt in templates:
        own = count((config.system or "") + without_fields(prompt.text)) + FRAME + image_tokens(grid)
        tokens = own + config.value_tokens(prompt.text, BYTES_PER_TOKEN)
        if tokens >= context:
            limits = [FIELD_BYTES] if any(field.kind != "captions" for field in fields(prompt.text)) else []
            limits += ["--max-tokens"] if caption_names(prompt.text) else []
            name = engine.model or engine.kind
            raise BadInput(
                f"--prompt {prompt.name}: up to {tokens} tokens with the largest image and the longest values of a "
                f"row, and the context of {name} is {context}; shorten the prompt, or lower {' or '.join(limits)}"
            )


async def check_prompts(engine: Engine, config: AnnotateConfig) -> None:
    """Raise BadInput for a prompt that can work with no image: once, before the first image.

    A server refuses such a prompt request by request; the run then ends after a number of them
    (:mod:`...runners.circuit_breaker`).
    """
    for prompt in (*config.prompts, *config.fallbacks):
        try:
            text = without_fields(prompt.text)
            tokens = await engine.count_tokens(Prompt(text, ImageInput("probe"), config.system))
        except RequestError as error:
            raise BadInput(f"--prompt {prompt.name}: {error}") from error
        if tokens is not None and engine.context is not None and tokens >= engine.context:
            raise BadInput(f"--prompt {prompt.name}: {too_long(tokens, engine.context)}, or a shorter prompt")
