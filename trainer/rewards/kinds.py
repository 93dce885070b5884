"""Kinds of rewards: built-in ones by name, others by import path (``package.module:Class``)."""

from __future__ import annotations

import inspect
from functools import reduce
from operator import or_
from typing import Annotated, Any

from pydantic import Field, GetCoreSchemaHandler, ValidationError, ValidatorFunctionWrapHandler
from pydantic_core import CoreSchema, core_schema

from ...manifests.import_path import load_object
from ..recipe_file import first_problem
from . import image_text, judge, naturalness, quiz, reconstruction, text, token_penalties, verified
from .base import RewardConfig, RewardSpec

BUILT_IN: dict[str, RewardSpec] = {
    "quiz": quiz.SPEC,
    "judge": judge.SPEC,
    "verified": verified.SPEC,
    "clip": image_text.CLIP,
    "blip": image_text.BLIP,
    "itm": image_text.ITM,
    "naturalness": naturalness.SPEC,
    "reconstruction": reconstruction.SPEC,
    "phrases": token_penalties.PHRASES,
    "repeats": token_penalties.REPEATS,
    "length": text.LENGTH,
    "repetition": text.REPETITION,
    "boilerplate": text.BOILERPLATE,
}


def spec_of(kind: str) -> RewardSpec:
    """Config class and builder of a kind. Raises ValueError for an import path without a reward class."""
    return _imported(kind) if ":" in kind else BUILT_IN[kind]


def _imported(path: str) -> RewardSpec:
    """Spec of a user's reward class, built from its ``Config`` if it has own options, else from the base config."""
    reward = load_object(path)
    methods = [getattr(reward, name, None) for name in ("score", "aclose")]
    if not isinstance(reward, type) or not all(map(inspect.iscoroutinefunction, methods)):
        raise ValueError(f"{path}: is no reward, a class with async methods score and aclose (trainer/rewards/base.py)")
    config = getattr(reward, "Config", RewardConfig)
    if not isinstance(config, type) or not issubclass(config, RewardConfig):
        raise ValueError(f"{path}: its Config is no subclass of capipe.trainer.rewards.base.RewardConfig")
    return RewardSpec(config, lambda options, context: reward(options), imported=True)


class _ByKind:
    """Validates and serialises an entry of a recipe's rewards with the config class of its kind."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        configs = reduce(or_, (spec.config for spec in BUILT_IN.values()))  # type: ignore[arg-type]
        return core_schema.no_info_wrap_validator_function(
            _validated,
            handler.generate_schema(Annotated[configs, Field(discriminator="kind")]),
            serialization=core_schema.simple_ser_schema("any"),
        )


def _validated(entry: Any, built_in: ValidatorFunctionWrapHandler) -> Any:
    kind = entry.get("kind") if isinstance(entry, dict) else getattr(entry, "kind", None)
    if not isinstance(kind, str) or ":" not in kind:
        return built_in(entry)
    try:
        return spec_of(kind).config.model_validate(entry)
    except ValidationError as error:
        raise ValueError(f"{kind}: {first_problem(error)}") from None


RewardEntry = Annotated[RewardConfig, _ByKind()]
