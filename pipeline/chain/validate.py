"""Validation of a chain's values by the commands' own checks, before any stage starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import BadInput, Missing
from ...manifests.import_path import is_import_path
from ...manifests.withdrawal.uid_set import list_file
from ...models.bundled import PREFIX
from ...models.engines.model_folder import resolve_model
from ...models.hub import HUB_ID, hub_name, is_cached
from ...stages.stage_spec import CHECKPOINT
from ..commands.stage_check import check_of
from .identity import is_there
from .recipe import Chain, ChainStage, Source
from .registry import WITHDRAWING


@dataclass
class Problems:
    """Errors, and requirements that do not exist yet, one line each. The latter do not prevent planning."""

    problems: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)


def check_chain(chain: Chain) -> Problems:
    """Check every stage's values, models and external data. Loads no model and uses no network."""
    result = Problems()
    for stage in chain.stages:
        for key, check in _checks(chain, stage):
            try:
                check()
            except Missing as error:
                result.absent.append(f"{chain.file}: stages.{stage.name}.{key}: {error}")
            except BadInput as error:
                result.problems.append(f"{chain.file}: stages.{stage.name}.{key}: {error}")
    return result


def _checks(chain: Chain, stage: ChainStage) -> Iterator[tuple[str, Callable[[], None]]]:
    """All checks of a stage, with the key that each belongs to."""
    yield "config", lambda: _options(chain, stage)
    for key, name, look in _models(stage):
        yield f"config.{key}", lambda name=name, look=look: look(name)  # type: ignore[misc]
    if (given := stage.config.get(WITHDRAWING)) is not None:
        yield f"config.{WITHDRAWING}", lambda: _file(list_file(given))
    yield "inputs.embeddings", lambda: _same_clip(chain, stage)
    for role, sources in stage.inputs.items():
        for source in sources:
            if source.path is not None:
                yield f"inputs.{role}", lambda source=source: _data(source)  # type: ignore[misc]


def _data(source: Source) -> None:
    assert source.path is not None
    _file(source.path)


def _file(path: str) -> None:
    if not is_there(path):
        raise Missing(f"{path}: nothing is there; put the data there, or name where it is")


# --- options ----------------------------------------------------------------------------------------------------------


def _options(chain: Chain, stage: ChainStage) -> None:
    """The command's own check, and whether its model, if it is local, accepts the prompts."""
    check = check_of(stage.command.spec)
    if check is None:
        return
    values = _values(chain, stage)
    checked = check(values)
    if "prompt" in stage.command.options:
        _prompts(values, _base_model(chain, stage, "model"), checked)


def _prompts(values: Mapping[str, Any], model: str | None, checked: object) -> None:
    """Check prompts against their model, if it is local. ``checked``: what the command's own check returned."""
    from ...models.engines.loading import EngineConfig
    from ...stages.annotate.captioner import AnnotateConfig
    from ..jobs.rows.prompts import check_longest, chosen_prompts

    here = None if model is None or _is_hub_id(model) else model
    engine: str = values.get("engine", "auto")
    beside = None if values.get("captions") else ()  # they may not be written yet
    prompts, fallbacks = values.get("prompt"), values.get("fallback_prompt")
    chosen = chosen_prompts(prompts, fallbacks, here, engine, values.get("system"), beside)
    config = getattr(checked, "annotate", checked)  # eval has it beside another one
    if here is None or "://" in engine or is_import_path(engine) or not isinstance(config, AnnotateConfig):
        return
    config = config.model_copy(update=chosen.settings(config.field_bytes))
    limits: dict[str, Any] = {name: values.get(name) for name in ("max_model_len", "min_pixels", "max_pixels")}
    check_longest(config, EngineConfig(kind=engine, model=here, **limits))


def _values(chain: Chain, stage: ChainStage) -> dict[str, Any]:
    """A stage's options by the names of its command's parameters.

    Output that another stage has yet to make is represented by that stage's name; a model, by the one its training
    starts from.
    """
    options = stage.command.options
    values = {options[key].parameter: value for key, value in stage.config.items() if value is not None}
    for role in stage.inputs.keys() & options.keys():
        names = [source.path or source.stage for source in stage.inputs[role]]
        model = _base_model(chain, stage, role) if CHECKPOINT in stage.command.spec.inputs[role] else None
        values[options[role].parameter] = names if options[role].many else model or names[0]
    return {"out": stage.out, **values}


def _base_model(chain: Chain, stage: ChainStage, key: str) -> str | None:
    """The model of a stage under ``key``; for one yet to be trained, the model that training starts from."""
    if key not in stage.inputs:
        name = stage.config.get(key) if stage.recipe is None else stage.recipe.model
        return name if isinstance(name, str) else None
    source = stage.inputs[key][0]
    return source.path if source.stage is None else _base_model(chain, chain.stage(source.stage), "model")


def _same_clip(chain: Chain, stage: ChainStage) -> None:
    """Raise BadInput if a stage that scores takes embeddings that another stage makes with another CLIP.

    Compared by name, before either has run; the command itself compares the models' identities.
    """
    for source in stage.inputs.get("embeddings", ()):
        if source.stage is None or "clip" not in stage.command.options:
            continue
        maker = chain.stage(source.stage)
        for key in ("clip", "dtype"):
            ours, theirs = stage.config.get(key), maker.config.get(key)
            if ours != theirs:
                text = f"stage {maker.name} embeds with {key}: {theirs}, and this scores with {key}: {ours}"
                raise BadInput(f"{text}; write the same in both, or leave out the embeddings")


# --- models -----------------------------------------------------------------------------------------------------------


def _models(stage: ChainStage) -> Iterator[tuple[str, str, Callable[[str], None]]]:
    """Models that a stage names, by key, with the check for each kind."""
    if stage.recipe is not None:
        if "model" not in stage.inputs:
            yield "recipe", stage.recipe.model, _model
        for reward in stage.recipe.rewards:
            for key, name in reward.model_dump().items():
                if key in ("reader", "model", "features") and isinstance(name, str):
                    yield "recipe", name, _clip if reward.kind == "clip" else _anything
        if stage.recipe.validation is not None:
            yield "recipe", stage.recipe.validation.reader, _model
        return
    config = stage.config
    asked_of = {"model": "engine", "screen-model": "screen-engine", "reader": "reader-engine", "vlm": "vlm-engine"}
    for key, engine in asked_of.items():
        kind = config.get(engine) or config.get("engine") or ""
        if config.get(key) is not None and "://" not in kind and not is_import_path(kind):  # no local model to check
            yield key, config[key], _model
    for key, look in (("itm", _model), ("clip", _clip)):
        if config.get(key) is not None:
            yield key, config[key], look
    for key in ("cosine", "language-model"):
        if isinstance(config.get(key), str):  # dedup's cosine is a number
            yield key, config[key], _anything


def _model(name: str) -> None:
    """Check a bundled model, a folder or a hub id, as engines accept them; nothing is downloaded."""
    if _is_hub_id(name):
        _hub(name)
    else:
        resolve_model(name)


def _clip(name: str) -> None:
    from ...models.scorers.clip_source import clip_place

    clip_place(name)
    if _is_hub_id(name):
        _hub(name)


def _anything(name: str) -> None:
    """Check a model of any library: bundled, a folder, or a hub id."""
    if name.startswith(PREFIX):
        _known(name)
    elif HUB_ID.fullmatch(name):
        _model(name)
    elif not Path(name).expanduser().is_dir() and ":" not in name:
        raise BadInput(f"{name}: no such model folder; give a folder, a Hugging Face id or a bundled tiny/ model")


def _known(name: str) -> None:
    from ...models.bundled import resolve

    try:
        resolve(name)
    except ValueError as error:
        raise BadInput(str(error)) from None


def _is_hub_id(name: str) -> bool:
    return not name.startswith(PREFIX) and not Path(name).expanduser().exists() and bool(HUB_ID.fullmatch(name))


def _hub(name: str) -> None:
    """Check that a hub model is cached if the hub is offline; otherwise it is fetched when the stage runs."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0"):
        return
    named = hub_name(name)
    if named is None or not is_cached(named):
        reason = "neither a folder nor in the hub's cache, and HF_HUB_OFFLINE keeps it from being fetched"
        raise Missing(f"{name}: {reason}; download it, or unset that")
