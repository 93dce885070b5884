"""Chain recipes: stages by name, each a command with inputs and options; parsed, resolved and sorted.

    stages:
      photos: {stage: ingest, inputs: {sources: {path: /data/photos}}}
      captions: {stage: annotate, inputs: {shards: photos}, config: {model: tiny/captioner, prompt: [plain, dense]}}

An input is the name of another stage, ``{stage: photos, first: 3}`` for its first three shards, or ``{path: ...}`` for
external data, relative to the working directory of `capipe run`. A source of the columns of a filter's ``scores`` may
have a name: ``{stage: asked, as: big}``. Keys of ``config`` are the command's long options. A stage may also have
``out`` (its folder in the chain's; its name by default), ``expects`` (the number of input rows, or of those that its
marks leave to it, if it cannot be counted), ``rate`` (:class:`Rate`) and, for training with torchrun, ``processes``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ...errors import BadInput, Problems
from ...stages.stage_spec import ANYTHING, CHECKPOINT, SHARDS
from ...trainer.recipe_file import find_recipe, read_recipe
from ..specs import STAGES
from .options import KEY_VALUES, SET, assignments
from .registry import Command, command_named

if TYPE_CHECKING:
    from ...trainer.recipe import Recipe  # imports torch: only chains that train need it

MAX_PIXELS = "max-pixels"  # option of train, also a key of its recipe
_SELECTED = (SHARDS, *ANYTHING)  # kinds that support ``first``


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Rate(_Section):
    """Expected speed of a stage."""

    per_device: float = Field(gt=0, description="rows (for train: images sampled for) per second and device")
    devices: int = Field(1, ge=1)
    unit: Literal["GPU", "core"] = "GPU"
    source: str = Field(min_length=1, description="where the figure is from")


class Source(_Section):
    """Source of an input: another stage, or an external path.

    ``first``: use only this many shards, from the start. ``name``: what its columns are called after, where several
    sources give columns.
    """

    stage: str | None = None
    path: str | None = Field(None, min_length=1)
    first: int | None = Field(None, ge=1)
    name: str | None = Field(None, alias="as", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")

    @model_validator(mode="after")
    def _one_of_both(self) -> Source:
        if (self.stage is None) == (self.path is None):
            raise ValueError("write the name of a stage, or {path: ...} for data from outside")
        return self


class _Entry(_Section):
    stage: str
    inputs: dict[str, str | Source | list[str | Source]] = {}
    config: dict[str, Any] = {}
    out: str | None = None
    expects: int | None = Field(None, ge=1)
    rate: Rate | None = None
    processes: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _only_training_is_split(self) -> _Entry:
        if self.processes is not None and self.stage != "train":
            raise ValueError(
                "processes: torchrun starts so many of a train stage; the others have options of their own"
            )
        return self


class _File(_Section):
    stages: dict[str, _Entry | None] = Field(min_length=1)


@dataclass(frozen=True)
class ChainStage:
    """A resolved stage. ``expects``: number of input rows; ``recipe``: the training recipe of a train stage;
    ``processes``: number of torchrun processes for training; ``store``: URL that ``out`` is below, "" for the chain's
    folder."""

    name: str
    command: Command
    inputs: Mapping[str, tuple[Source, ...]]
    config: Mapping[str, Any]
    out: str
    expects: int | None = None
    rate: Rate | None = None
    recipe: Recipe | None = field(default=None, repr=False)
    processes: int | None = None
    store: str = ""

    @property
    def needs(self) -> list[str]:
        """Names of the stages that it depends on."""
        names = [source.stage for sources in self.inputs.values() for source in sources]
        return list(dict.fromkeys(name for name in names if name is not None))

    def product(self, kind: str) -> str | None:
        """Folder of its product of this kind, relative to the chain's; None if it has none."""
        spec = self.command.spec
        products, switch, contrary = spec.products, spec.optional.get(kind), spec.unless.get(kind)
        if kind not in products or (switch is not None and not self.config.get(switch)):
            return None
        if contrary is not None and self.config.get(contrary):
            return None
        if kind == CHECKPOINT:
            from ...trainer.checkpoint import folder_of

            return str(folder_of(Path(self.out), self.recipe.steps)) if self.recipe else self.out
        sub = products[kind]
        return f"{self.out}/{sub}" if sub else self.out


@dataclass(frozen=True)
class Chain:
    """A whole recipe, with the stages sorted so that each follows its inputs. ``store``: URL for artifacts, "" if they
    are in the chain's folder like everything else."""

    name: str
    file: Path
    stages: tuple[ChainStage, ...]
    store: str = ""

    def stored_at(self, url: str) -> Chain:
        """The chain with its artifacts below a URL. Models, logs of training and loose images stay in its folder."""
        stages = (replace(stage, store=url if stage.command.spec.outputs else "") for stage in self.stages)
        return replace(self, stages=tuple(stages), store=url)

    def stage(self, name: str) -> ChainStage:
        return next(stage for stage in self.stages if stage.name == name)


def load_chain_recipe(given: Path, overrides: Sequence[str] = ()) -> Chain:
    """The chain in a YAML file, or a bundled one by name. Raises BadInput, or :class:`Problems` with all errors.

    Names, types, inputs and order are checked here; values are checked in :mod:`.validate`.
    """
    file = find_recipe(given)
    loaded = read_recipe(given, overrides, "chain")
    try:
        written = _File.model_validate(loaded)
    except ValidationError as error:
        raise Problems([_shape(file, detail) for detail in error.errors()]) from None
    entries = {name: entry for name, entry in written.stages.items() if entry is not None}
    reader = _Reader(file, entries)
    stages = [stage for name, entry in entries.items() if (stage := reader.stage(name, entry)) is not None]
    reader.kinds(stages)
    reader.folders(stages)
    ordered = reader.order(stages)
    if reader.problems:
        raise Problems(reader.problems)
    return Chain(file.stem, file, tuple(ordered))


def _shape(file: Path, error: Any) -> str:
    parts = [str(part) for part in error["loc"] if part not in ("Source", "str") and "list[" not in str(part)]
    known = "; no such key" if error["type"] == "extra_forbidden" else ""
    return f"{file}: {'.'.join(parts)}: {error['msg'].removeprefix('Value error, ')}{known}"


class _Reader:
    """Resolves entries and collects errors, one line each."""

    def __init__(self, file: Path, entries: Mapping[str, _Entry]) -> None:
        self.file, self.entries = file, entries
        self.problems: list[str] = []

    def say(self, key: str, reason: str) -> None:
        self.problems.append(f"{self.file}: stages.{key}: {reason}")

    def stage(self, name: str, entry: _Entry) -> ChainStage | None:
        try:
            command = command_named(entry.stage)
        except BadInput as error:
            self.say(f"{name}.stage", str(error))
            return None
        before = len(self.problems)
        inputs = {role: self._sources(name, role, sources) for role, sources in entry.inputs.items()}
        self._roles(name, command, inputs)
        config = self._config(name, command, entry, inputs)
        recipe = (
            self._recipe(name, config, inputs) if command.name == "train" and len(self.problems) == before else None
        )
        if recipe is not None:
            inputs = {**_own_data(recipe, inputs), **inputs}
        own = (entry.expects, entry.rate, recipe, entry.processes)
        return ChainStage(name, command, inputs, config, entry.out or name, *own)

    def _sources(self, name: str, role: str, value: Any) -> tuple[Source, ...]:
        many = value if isinstance(value, list) else [value]
        return tuple(Source(stage=item) if isinstance(item, str) else item for item in many)

    def _roles(self, name: str, command: Command, inputs: Mapping[str, tuple[Source, ...]]) -> None:
        for role, sources in inputs.items():
            where = f"{name}.inputs.{role}"
            if role not in command.spec.inputs:
                known = ", ".join(command.spec.inputs) or "none"
                self.say(where, f"{command.name} has no such input; its inputs: {known}")
                continue
            option = command.options.get(role)
            if len(sources) > 1 and (option is None or not option.many):
                self.say(where, f"takes one, not {len(sources)}")
            for source in sources:
                if source.first is not None and not set(command.spec.inputs[role]) & set(_SELECTED):
                    self.say(where, "first: is for shards alone; leave it out")
                if source.name is not None and role not in command.spec.named:
                    self.say(where, "as: is for sources of columns alone, a filter's scores; leave it out")
                if source.stage is not None and source.stage not in self.entries:
                    known = ", ".join(other for other in self.entries if other != name)
                    hint = f"there are {known}; data from outside is written {{path: {source.stage}}}"
                    self.say(where, f"no stage is called {source.stage!r}; {hint}")

    def _config(
        self, name: str, command: Command, entry: _Entry, inputs: Mapping[str, tuple[Source, ...]]
    ) -> dict[str, Any]:
        config = {}
        for key, value in entry.config.items():
            location, option = f"{name}.config.{key}", command.options.get(key)
            if option is None:
                self.say(location, f"capipe {command.name} has no such option that a recipe may give; see its --help")
            elif key in command.spec.inputs and CHECKPOINT not in command.spec.inputs[key]:
                self.say(location, f"is an input; write it under inputs, as a stage's name or {{path: {value}}}")
            elif key in inputs:
                self.say(location, "is among the inputs, too; keep one of them")
            else:
                try:
                    argument = assignments(value) if key in KEY_VALUES and isinstance(value, Mapping) else value
                    config[key] = option.checked(argument)
                except ValueError as error:
                    self.say(location, str(error))
        for key, option in command.options.items():
            if option.required and key not in entry.config and key not in inputs:
                kinds = command.spec.inputs.get(key, (CHECKPOINT,))
                where = "config" if kinds == (CHECKPOINT,) else "inputs"
                self.say(f"{name}.{where}", f"{key} is missing, which capipe {command.name} needs")
        return config

    def _recipe(self, name: str, config: Mapping[str, Any], inputs: Mapping[str, tuple[Source, ...]]) -> Recipe | None:
        """A train stage's recipe with its overrides; data that is not made yet is named by its stage."""
        from ...trainer.recipe import load_recipe

        named = {TRAINS_ON[role]: sources[0].stage or sources[0].path for role, sources in inputs.items()}
        sets = [*(config.get(SET) or []), *(f"{key}={json.dumps(source)}" for key, source in named.items())]
        if config.get(MAX_PIXELS) is not None:
            sets.append(f"max_pixels={config[MAX_PIXELS]}")
        try:
            return load_recipe(Path(config["recipe"]), sets)
        except BadInput as error:
            self.say(f"{name}.config.recipe", str(error))
            return None

    def kinds(self, stages: Sequence[ChainStage]) -> None:
        """Check that the product of one stage is of a kind that the other accepts."""
        by_name = {stage.name: stage for stage in stages}
        for stage in stages:
            for role, sources in stage.inputs.items():
                wanted = stage.command.spec.inputs.get(role)
                for source in sources:
                    maker = by_name.get(source.stage or "")
                    if wanted is not None and maker is not None and kind_between(maker, wanted) is None:
                        self.say(f"{stage.name}.inputs.{role}", _unfit(maker, wanted))

    def folders(self, stages: Sequence[ChainStage]) -> None:
        """Check that each stage has a folder of its own, inside the chain's."""
        taken: dict[Path, str] = {}
        for stage in stages:
            path = Path(stage.out)
            if path.is_absolute() or ".." in path.parts or not path.parts or path.parts[0].startswith("."):
                hint = "write a folder inside --out, without a leading dot"
                self.say(f"{stage.name}.out", f"{stage.out!r} is no place for it; {hint}")
                continue
            for other, owner in taken.items():
                if path.is_relative_to(other) or other.is_relative_to(path):
                    text = f"{stage.out!r} is where stage {owner} writes, too; give each stage a folder of its own"
                    self.say(f"{stage.name}.out", text)
            taken.setdefault(path, stage.name)

    def order(self, stages: Sequence[ChainStage]) -> list[ChainStage]:
        """Stages sorted so that each follows its inputs, else in the given order. Reports a cycle by its members."""
        left = {stage.name: stage for stage in stages}
        ordered: list[ChainStage] = []
        while left:
            ready = next((s for s in left.values() if not any(name in left for name in s.needs)), None)
            if ready is None:
                members = _cycle(left)
                loop = " -> ".join([*members, members[0]])
                self.problems.append(f"{self.file}: stages: a cycle, each waits for the next: {loop}; cut it somewhere")
                return ordered
            ordered.append(left.pop(ready.name))
        return ordered


#: Keys of a training recipe for the inputs of a train stage.
TRAINS_ON = {
    "shards": "data.shards",
    "questions": "data.questions",
    "captions": "data.captions",
    "validation-shards": "validation.shards",
    "validation-questions": "validation.questions",
    "model": "model",
}


def _own_data(recipe: Recipe, inputs: Mapping[str, Any]) -> dict[str, tuple[Source, ...]]:
    """Data named by the training recipe itself: it is external."""
    named = {
        "shards": recipe.data.shards,
        "questions": recipe.data.questions,
        "captions": recipe.data.captions,
    }
    if recipe.validation is not None:
        named |= {"validation-shards": recipe.validation.shards, "validation-questions": recipe.validation.questions}
    return {role: (Source(path=path),) for role, path in named.items() if path is not None and role not in inputs}


def kind_between(maker: ChainStage, wanted: Sequence[str]) -> str | None:
    """The kind of product that one stage makes and another accepts."""
    return next((kind for kind in wanted if maker.product(kind) is not None), None)


def _unfit(maker: ChainStage, wanted: Sequence[str]) -> str:
    if not wanted:
        return f"no stage makes this; write {{path: ...}} instead of {maker.name!r}"
    products = maker.command.spec.products
    contrary = next((switch for kind, switch in maker.command.spec.unless.items() if kind in wanted), None)
    if contrary is not None:
        return f"stage {maker.name} writes no tars with {contrary}: true; leave that out, or name the shards it reads"
    switch = next((switch for kind, switch in maker.command.spec.optional.items() if kind in wanted), None)
    if switch is not None:
        what = next(iter(products))
        return f"stage {maker.name} writes {what} without tars; set its {switch}: true, or name the shards it reads"
    makers = [name for name, spec in STAGES.items() if set(wanted) & set(spec.products)]
    makes = ", ".join(products)
    return f"stage {maker.name} ({maker.command.name}) makes {makes}; this takes what {' or '.join(makers)} makes"


def _cycle(left: Mapping[str, ChainStage]) -> list[str]:
    """The members of one cycle among stages that all have unmet dependencies, in dependency order."""
    path = [next(iter(left))]
    while True:
        following = next(name for name in left[path[-1]].needs if name in left)
        if following in path:
            return path[path.index(following) :]
        path.append(following)
