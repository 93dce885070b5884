"""Registry of stages: the built-in ones by name, custom ones by import path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import BadInput
from ..manifests.artifact_spec import ArtifactSpec
from ..manifests.import_path import import_object, is_import_path
from ..stages.annotate.spec import ANNOTATE
from ..stages.ask.spec import ASK
from ..stages.dedup.spec import DEDUP, EMBED
from ..stages.export.spec import EXPORT
from ..stages.filter.spec import FILTER
from ..stages.ingest.spec import INGEST, RENDER
from ..stages.questions.spec import EVAL, QA
from ..stages.stage_spec import StageSpec
from ..trainer.spec import TRAIN

#: Stages by name, in the order of `capipe --help`.
STAGES: Mapping[str, StageSpec] = {
    spec.name: spec for spec in (RENDER, INGEST, EMBED, DEDUP, QA, TRAIN, ANNOTATE, ASK, FILTER, EXPORT, EVAL)
}
#: Artifact specs by the stage named in ``config.json``.
ARTIFACTS: Mapping[str, ArtifactSpec] = {
    output.artifact.stage: output.artifact for spec in STAGES.values() for output in spec.outputs
}


def artifact_spec(stage: str) -> ArtifactSpec:
    """The spec of a stage's artifacts; for an unknown stage, one with the name alone."""
    return ARTIFACTS.get(stage) or ArtifactSpec(stage, stage)


def stage_spec(name: str) -> StageSpec:
    """A stage by its name or import path. Raises BadInput."""
    if name in STAGES:
        return STAGES[name]
    if not is_import_path(name):
        raise BadInput(f"{name!r} is no stage; there are {', '.join(STAGES)}")
    spec = import_object(name)
    if not isinstance(spec, StageSpec):
        raise BadInput(f"{name}: a {type(spec).__name__}, not a StageSpec")
    return spec


def command_of(spec: StageSpec) -> Callable[..., Any]:
    """The function of a stage's command."""
    if callable(spec.command):
        return spec.command
    command: Callable[..., Any] = import_object(spec.command)
    return command
