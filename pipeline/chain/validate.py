"""Whether a chain's values can be meant: by the very checks that its commands would make, before any of them starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import BadInput
from ...manifests.import_path import is_import_path
from ...models.bundled import PREFIX
from ...models.engines.captioner_registry import check_prompt, kind_of
from ...models.engines.loading import EngineConfig
from ...models.engines.lora import check_adapter
from ...models.engines.model_folder import resolve_model
from ...models.engines.vllm.arguments import check_engine_args
from ...models.hub import HUB_ID, hub_name, is_cached
from ...stages.annotate.prompts import parse_prompt
from ..commands import options as o
from ..commands.key_values import second_model
from .identity import is_there
from .recipe import Chain, ChainStage, Source


@dataclass
class Problems:
    """What is wrong, and what a run needs that is not there yet: a line each. The latter does not stop a plan."""

    problems: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)


class _Absent(Exception):
    """Something that a run needs and that may come to be: data, a model's folder."""


def check_chain(chain: Chain) -> Problems:
    """Look at every stage's values, models and data from outside. Loads no model and asks no network."""
    found = Problems()
    for stage in chain.stages:
        for place, check in _checks(chain, stage):
            try:
                check()
            except _Absent as missing:
                found.absent.append(f"{chain.file}: stages.{stage.name}.{place}: {missing}")
            except BadInput as error:
                found.problems.append(f"{chain.file}: stages.{stage.name}.{place}: {error}")
    return found


def _checks(chain: Chain, stage: ChainStage) -> Iterator[tuple[str, Callable[[], None]]]:
    """Each thing to look at, with the key it stands under."""
    yield "config", lambda: _CHECKS.get(stage.command.name, _check_own)(chain, stage)
    for key, name, look in _models(stage):
        yield f"config.{key}", lambda name=name, look=look: look(name)  # type: ignore[misc]
    for role, sources in stage.inputs.items():
        for source in sources:
            if source.path is not None:
                yield f"inputs.{role}", lambda source=source: _data(source)  # type: ignore[misc]


def _data(source: Source) -> None:
    assert source.path is not None
    if not is_there(source.path):
        raise _Absent(f"{source.path}: nothing is there; put the data there, or name where it is")


# --- models -----------------------------------------------------------------------------------------------------------


def _models(stage: ChainStage) -> Iterator[tuple[str, str, Callable[[str], None]]]:
    """Models that a stage names, by key, and how each kind is looked for."""
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
    asked_of = {"model": "engine", "screen-model": "screen-engine", "reader": "reader-engine"}
    for key, engine in asked_of.items():
        kind = config.get(engine) or config.get("engine") or ""
        if config.get(key) is not None and "://" not in kind and not is_import_path(kind):  # these have their own
            yield key, config[key], _model
    for key, look in (("itm", _model), ("clip", _clip)):
        if config.get(key) is not None:
            yield key, config[key], look
    for key in ("cosine", "language-model"):
        if isinstance(config.get(key), str):  # dedup's cosine is a number
            yield key, config[key], _anything


def _model(name: str) -> None:
    """A bundled model, a folder or a hub id, as the engines take them; nothing is downloaded."""
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
    """A model of any library: bundled, a folder, or named as on the hub."""
    if name.startswith(PREFIX) or HUB_ID.fullmatch(name):
        if not name.startswith(PREFIX):
            _model(name)
        else:
            _known(name)
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
    """Where the hub may be asked, it is when the stage runs; else the model has to be here already."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0"):
        return
    named = hub_name(name)
    if named is None or not is_cached(named):
        reason = "neither a folder nor in the hub's cache, and HF_HUB_OFFLINE keeps it from being fetched"
        raise _Absent(f"{name}: {reason}; download it, or unset that")


# --- values, by command -----------------------------------------------------------------------------------------------


def _given(stage: ChainStage) -> dict[str, Any]:
    """A stage's options by the names that the command's function has for them."""
    options = stage.command.options
    return {options[key].parameter: value for key, value in stage.config.items() if value is not None}


def _config(kind: type[Any], given: Mapping[str, Any], **more: Any) -> None:
    """Have a stage's config look at those options that are its own."""
    o.validated(kind, **{key: value for key, value in given.items() if key in kind.model_fields}, **more)


def _engine(given: Mapping[str, Any]) -> None:
    """The options of a stage's engine, and of its second model's."""
    names = ("dtype", "max_model_len", "min_pixels", "max_pixels", "concurrency", "gpu_memory", "timeout")
    asked = ("tensor_parallel", "adapter", "engine_arg", "template_arg")
    options = o.engine_options(**{name: given[name] for name in (*names, *asked) if name in given})
    _engine_config(given.get("engine", "auto"), options)
    for second, sees in (("screen", True), ("reader", False)):
        kind = given.get(f"{second}_engine") or given.get("engine", "auto")
        if f"{second}_engine" in given or f"{second}_arg" in given:
            same = sees and "screen_model" not in given
            own = second_model(f"--{second}-arg", options, given.get(f"{second}_arg"), same=same, sees=sees)
            _engine_config(kind, own)


def _engine_config(kind: str, options: Mapping[str, Any]) -> None:
    given = {key: value for key, value in options.items() if key != "decode_workers"}
    check_engine_args(EngineConfig(kind=kind, model="any", **given).engine_args)
    adapter = given["adapter"]
    if adapter and not Path(adapter).expanduser().is_dir():
        raise _Absent(f"{adapter}: nothing is there; put the adapter there, or name where it is")
    if adapter:
        check_adapter(adapter)


def _prompts(chain: Chain, stage: ChainStage) -> None:
    """Each prompt, and whether the model can be asked with it, where that is here to be looked at."""
    given = stage.config.get("prompt")
    prompts = [parse_prompt(each) for each in given or []]
    model = _begun_from(chain, stage)
    engine = str(stage.config.get("engine", ""))
    if model is None or "://" in engine or is_import_path(engine) or _is_hub_id(model):
        return
    path = resolve_model(model)
    if given is None and kind_of(path) is None:
        return
    for prompt in prompts:
        check_prompt(model, path, prompt.text, stage.config.get("system"))


def _begun_from(chain: Chain, stage: ChainStage) -> str | None:
    """The model it asks; of one that is yet to be trained, the one that training starts from."""
    source = stage.inputs.get("model", (None,))[0]
    if source is None:
        name = stage.config.get("model")
        return name if isinstance(name, str) else None
    if source.stage is None:
        return source.path
    maker = chain.stage(source.stage)
    return _begun_from(chain, maker) if "model" in maker.inputs else maker.recipe.model if maker.recipe else None


def _check_render(chain: Chain, stage: ChainStage) -> None:
    from ..commands.ingest import known_split

    known_split(stage.config.get("split", "train"))


def _check_ingest(chain: Chain, stage: ChainStage) -> None:
    from ...stages.ingest.shard import IngestConfig

    _config(IngestConfig, _given(stage))


def _check_embed(chain: Chain, stage: ChainStage) -> None:
    _engine(_given(stage))


def _check_dedup(chain: Chain, stage: ChainStage) -> None:
    from ...stages.dedup.cosine import require_faiss
    from ...stages.dedup.marks import DedupConfig

    if "embeddings" in stage.inputs:
        require_faiss()
    elif stage.config.get("cosine") is not None:
        raise BadInput("cosine compares embeddings; name them under inputs, or leave it out")
    _config(DedupConfig, _given(stage))


def _check_qa(chain: Chain, stage: ChainStage) -> None:
    from ...stages.questions.write import QuestionsConfig
    from ..commands.qa import screen_config

    given = _given(stage)
    writer = "model" in given or "model" in stage.inputs
    if writer == ("import" in stage.inputs):
        raise BadInput("give either model, who is to write the questions, or the input import, a set to take them from")
    screened = screen_config(
        given.get("screen", "strict"),
        given.get("with_image"),
        given.get("without_image"),
        given.get("presentations"),
    )
    if screened is not None and not writer and "screen_model" not in given and "screen-model" not in stage.inputs:
        raise BadInput("imported questions are screened by a model that sees; add screen-model, or screen: none")
    _config(QuestionsConfig, given)
    _engine(given)


def _check_train(chain: Chain, stage: ChainStage) -> None:
    """The recipe was read with the chain; what is left are names that only a run looks up."""


def _check_annotate(chain: Chain, stage: ChainStage) -> None:
    from ...stages.annotate.captioner import AnnotateConfig
    from ...stages.annotate.quality_gate import QualityGateConfig

    given = _given(stage)
    if "model" not in given and "model" not in stage.inputs and "://" not in str(given.get("engine", "")):
        raise BadInput("model is missing: a name under config, or a train stage under inputs")
    _engine(given)
    _prompts(chain, stage)
    _config(QualityGateConfig, given)
    _config(AnnotateConfig, given, prompts=tuple(parse_prompt(each) for each in given.get("prompt") or ["plain"]))


def _check_filter(chain: Chain, stage: ChainStage) -> None:
    from ...stages.filter.select import SelectConfig

    given = _given(stage)
    if "by" in given and "top" not in given:
        raise BadInput("by ranks nothing without top; give a fraction, e.g. top: 0.3")
    _config(SelectConfig, given)
    scorers = [key for key in ("clip", "itm", "safety") if given.get(key)]
    if "scores" in stage.inputs and (scorers or "captions" in stage.inputs):
        raise BadInput("the input scores are scored already; leave out captions, clip, itm and safety")
    if "scores" not in stage.inputs and not {"clip", "itm"} & set(scorers):
        raise BadInput("name what is to score: clip and itm (tiny/clip, tiny/itm), or the input scores")


def _check_export(chain: Chain, stage: ChainStage) -> None:
    from ...stages.export.formats import writer_class
    from ..commands.export import checked_languages, checked_license
    from ..jobs.export import EXTENSIONS

    given = _given(stage)
    writer_class(given.get("format", "webdataset"))
    extension = given.get("image_extension", "auto")
    if extension not in ("auto", "keep", *EXTENSIONS):
        raise BadInput(f"image-extension {extension}: use auto, keep, or one of {', '.join(EXTENSIONS)}")
    checked_license(given.get("license", "other"))
    checked_languages(given.get("language", []))


def _check_eval(chain: Chain, stage: ChainStage) -> None:
    from ...stages.annotate.captioner import AnnotateConfig
    from ...stages.questions.grade import GradeConfig
    from ..jobs.artifacts import refuse_controls

    given = _given(stage)
    if ("model" in given or "model" in stage.inputs) == ("captions" in stage.inputs):
        raise BadInput("give either model, a captioner to evaluate, or the input captions, what one has written")
    _engine(given)
    _prompts(chain, stage)
    prompts = tuple(parse_prompt(each) for each in given.get("prompt") or ["plain"])
    refuse_controls([each.name for each in prompts])
    _config(AnnotateConfig, given, prompts=prompts)
    _config(GradeConfig, given)


def _check_own(chain: Chain, stage: ChainStage) -> None:
    """Of a stage that is not this package's."""
    given, check = _given(stage), stage.command.spec.check
    if "engine" in stage.command.options:
        _engine(given)
    if check is not None:
        check(given)


_CHECKS: Mapping[str, Callable[[Chain, ChainStage], None]] = {
    "render": _check_render,
    "ingest": _check_ingest,
    "embed": _check_embed,
    "dedup": _check_dedup,
    "qa": _check_qa,
    "train": _check_train,
    "annotate": _check_annotate,
    "filter": _check_filter,
    "export": _check_export,
    "eval": _check_eval,
}
