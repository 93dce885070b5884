"""Command and spec for an engine stage defined by one function per row, for custom stages."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter
from typing import Annotated, Any

import pyarrow as pa
import typer
from pydantic import BaseModel

from ...errors import BadInput
from ...manifests.artifact_spec import ArtifactSpec
from ...manifests.schema import BASE, USAGE
from ...stages.stage_spec import CHECKPOINT, MARKED, SHARDS, Output, StageSpec
from ..jobs.artifacts import marks_beside
from ..jobs.rows.engine import EngineSetup, plan
from ..jobs.rows.row_stage import RowFunction, RowStage
from ..specs import ARTIFACTS, STAGES
from .options import shared as o
from .options.engine_choice import EngineChoice
from .options.groups import call, single_options
from .run_job import run_job

_NAME = re.compile(r"[a-z][a-z0-9_-]*")


def row_stage(
    name: str, function: RowFunction, options: type[BaseModel], columns: Sequence[pa.Field], label: str | None = None
) -> StageSpec:
    """The spec of a stage that queries an engine about every image.

    ``function``: returns the ``columns`` of one row, beside key, uid, status and error; its docstring is the command's
    help. ``options``: the command's own options, covered by the fingerprint. ``label``: description of the rows, for
    reports.
    Raises BadInput if the name is that of another stage, or a column one that every such stage has.
    """
    if not _NAME.fullmatch(name) or name in STAGES or name in ARTIFACTS:
        raise BadInput(f"stage {name!r}: taken, or no name; use small letters, digits, - and _")
    if taken := {column.name for column in columns} & {column.name for column in (*BASE, *USAGE)}:
        raise BadInput(f"stage {name!r}: every engine stage has a column {min(taken)!r}; give yours another name")
    schema = pa.schema([*BASE, *columns, *USAGE])

    def command(**kwargs: Any) -> None:
        own = o.validated(options, **{key: kwargs.pop(key) for key in options.model_fields})
        call(_run, {**kwargs, "stage": lambda setup: RowStage(name, function, own, schema, setup)})

    def check(values: Mapping[str, Any]) -> None:
        o.validated(options, **{key: value for key, value in values.items() if key in options.model_fields})
        call(_check, values)

    _sign(command, function, options)
    output = Output(ArtifactSpec(name, label or name, schema))
    inputs = {"shards": (SHARDS,), "model": (CHECKPOINT,), "marks": MARKED}
    return StageSpec(name, command, inputs, {name: ""}, (output,), skips="marks", check=check)


def _sign(command: Callable[..., None], function: RowFunction, options: type[BaseModel]) -> None:
    """Set the signature of ``command``: the common options of such stages and its own, as read by Typer and recipes."""
    common = single_options(_check)
    taken = {parameter.name for parameter in common} & options.model_fields.keys()
    if taken:
        raise BadInput(f"option {min(taken)} of {options.__name__}: every engine stage has it; give it another name")
    own = []
    for name, field in options.model_fields.items():
        default = Parameter.empty if field.is_required() else field.get_default(call_default_factory=True)
        annotation = Annotated[field.annotation, typer.Option(help=field.description)]  # type: ignore[name-defined]
        own.append(Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation))
    signature = inspect.Signature([*common[:4], *own, *common[4:]])
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {name: option.annotation for name, option in signature.parameters.items()}
    command.__doc__ = function.__doc__


@dataclass(frozen=True, kw_only=True)
class RowStageOptions:
    """Common options of engine stages with one function per row."""

    shards: o.Shards
    out: o.Out
    model: Annotated[str, typer.Option(help="A bundled model, a folder, or a Hugging Face id.")]
    engine: o.EngineName = "auto"
    engine_options: o.EngineOptions
    marks: o.Marks = None
    retry: o.Retry = False
    trace: o.Trace = None
    run: o.RunOptions

    @property
    def choice(self) -> EngineChoice:
        return EngineChoice.of(self.model, self.engine, self.engine_options, self.run)


def _check(options: RowStageOptions) -> None:
    options.choice.check()


def _run(options: RowStageOptions, stage: Callable[[EngineSetup], RowStage]) -> None:
    _check(options)
    placement = options.choice.placement()
    setup = options.choice.setup(placement, None, options.trace)
    beside = marks_beside(options.marks)
    job = plan(stage(setup), options.shards, options.out, beside=beside, **options.run.plan_options(options.retry))
    raise typer.Exit(run_job(job, placement))
