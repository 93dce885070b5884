"""What a chain has done and has to do: each stage held against what lies in its folder and what it was begun with.

Nothing here writes. A stage is done where its configuration, its inputs and its output are those that the state file
tells of; where its own digest changed it starts over, and with it all that hang on it.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...errors import ArtifactMismatch, BadInput, CapipeError
from ...manifests.artifact import Artifact
from ...manifests.files.redaction import redacted_data
from ..inspect.chain_state import ChainState, StageState
from .identity import changed_keys, digest, identity, meaning, product
from .options import SET
from .recipe import TRAINS_ON, Chain, ChainStage, Source, kind_between

Verdict = Literal["done", "to do", "goes on", "changed", "edited"]


@dataclass(frozen=True)
class Planned:
    """A stage, what it is made of and how it stands. ``parts``: digests by part, None while an input is to be made.

    ``verdict`` ``edited``: done, but its output is not what it was when it ended. ``why``: of what changed.
    """

    stage: ChainStage
    digest: str
    parts: Mapping[str, str] | None
    verdict: Verdict
    why: str = ""
    product: str | None = field(default=None, repr=False)  # what its folder holds now, where it is done

    @property
    def settled(self) -> bool:
        """Nothing is left to do in it."""
        return self.verdict in ("done", "edited")


def outside(chain: Chain) -> dict[str, str]:
    """What the data from outside is now, by path; looked at once, since it may be millions of files."""
    sources = [source for stage in chain.stages for given in stage.inputs.values() for source in given]
    return {source.path: _outside(source.path) for source in sources if source.path is not None}


def look(chain: Chain, folder: Path, state: ChainState | None, data: Mapping[str, str]) -> dict[str, Planned]:
    """Every stage as it stands, by name, in order; ``data`` as of :func:`outside`.

    Raises CapipeError where a recorded output cannot be read.
    """
    found: dict[str, Planned] = {}
    for stage in chain.stages:
        found[stage.name] = inspect_outputs(stage, folder, state.stage(stage.name) if state else None, found, data)
    return found


def inspect_outputs(
    stage: ChainStage, folder: Path, known: StageState | None, before: Mapping[str, Planned], data: Mapping[str, str]
) -> Planned:
    """One stage; ``before`` has at least those it comes after."""
    meant = meaning(stage)
    inputs = {role: [_named(each, before, data) for each in sources] for role, sources in stage.inputs.items()}
    mark = digest({"stage": stage.command.name, "config": meant, "inputs": inputs})
    if known is not None and known.stage != stage.command.name:
        known = None
    begun = known is not None and bool(known.begun)
    waits_for = [name for name in stage.needs if not before[name].settled]
    if waits_for:
        verdict: Verdict = "changed" if begun else "to do"
        return Planned(stage, mark, None, verdict, f"its input {waits_for[0]}" if begun else "")
    made = {name: before[name].product for name in stage.needs}
    parts = _parts(stage, meant, inputs, made)
    if known is None or not begun:
        return Planned(stage, mark, parts, "to do")
    if known.begun != parts:
        return Planned(stage, mark, parts, "changed", _why(stage, known, mark))
    if known.product is None:
        return Planned(stage, mark, parts, "goes on", f"it was {known.state}")
    try:
        now = product(folder, places(stage))
    except ArtifactMismatch as error:
        text = f"{error}; in a chain: remove {folder / stage.out} to have stage {stage.name} done again"
        raise ArtifactMismatch(text) from None
    if now is None:
        return Planned(stage, mark, parts, "to do", "its output is gone")
    return Planned(stage, mark, parts, "done" if now == known.product else "edited", product=now)


def _outside(path: str) -> str:
    try:
        return identity(path)
    except BadInput:
        return "absent"


def _named(source: Source, before: Mapping[str, Planned], data: Mapping[str, str]) -> list[Any]:
    of = before[source.stage].digest if source.stage is not None else data[source.path or ""]
    return [of, source.first]


def _parts(
    stage: ChainStage, meant: Mapping[str, Any], inputs: Mapping[str, Any], made: Mapping[str, Any]
) -> dict[str, str]:
    """Of each part of a stage's folder, what decides it: options, inputs, and what these have turned out to be."""
    own = {
        role: [[*named, made.get(source.stage or "")] for named, source in zip(inputs[role], sources, strict=True)]
        for role, sources in stage.inputs.items()
    }
    return {
        part.name: digest(
            {
                "config": {key: value for key, value in meant.items() if part.depends_on(key)},
                "inputs": {role: value for role, value in own.items() if part.depends_on(role)},
            }
        )
        for part in stage.command.spec.parts
    }


def _why(stage: ChainStage, known: StageState, mark: str) -> str:
    """What changed since a stage was begun, in few words."""
    keys = changed_keys(known.config, written(stage))
    if keys:
        return ", ".join(keys)
    if known.inputs != named_inputs(stage):
        return "its inputs"
    return "its input is another now" if known.digest == mark or stage.inputs else "what its configuration names"


def places(stage: ChainStage) -> list[str]:
    """What a stage leaves, as folders relative to the chain's, the main one last."""
    artifacts = artifact_folders(stage)
    if artifacts:
        return artifacts
    return [stage.product(kind) or stage.out for kind in stage.command.spec.products]


def artifact_folders(stage: ChainStage) -> list[str]:
    """The folders relative to the chain's that will hold artifacts, the main one last."""
    found = stage.command.spec.folders(stage.config, frozenset(stage.inputs))
    return [f"{stage.out}/{each}" if each else stage.out for each in found]


def written(stage: ChainStage) -> dict[str, Any]:
    """A stage's configuration as it goes into the state file."""
    return {key: redacted_data(value) for key, value in stage.config.items() if value is not None}


def named_inputs(stage: ChainStage) -> dict[str, str]:
    """Inputs by role: the stages they come from, or the paths."""
    return {
        role: ",".join(source.stage or redacted_data(source.path or "") for source in sources)
        for role, sources in stage.inputs.items()
    }


def arguments(chain: Chain, stage: ChainStage, folder: Path) -> list[str]:
    """The command line of a stage, without what resuming adds."""
    placed = {
        role: [_place(chain, stage, role, source, folder) for source in sources]
        for role, sources in stage.inputs.items()
    }
    options, given = stage.command.options, dict(stage.config)
    if stage.recipe is not None:
        own = [f"{TRAINS_ON[role]}={urls[0]}" for role, urls in placed.items()]
        given[SET] = [*(given.get(SET) or []), *own]
    else:
        given |= {role: urls if options[role].many else urls[0] for role, urls in placed.items()}
    ordered = sorted(options.values(), key=lambda option: not option.positional)
    words = [word for option in ordered for word in option.words(given.get(option.name))]
    return [stage.command.name, *words, "--out", str(folder / stage.out)]


def shown_command(stage: ChainStage, words: Sequence[str]) -> str:
    """A command line as a user would type it."""
    program = ["capipe"]
    if stage.processes is not None:
        program = ["torchrun", *_torchrun(stage.processes)]
    return shlex.join([*program, *words])


def started_command(stage: ChainStage, words: Sequence[str]) -> list[str]:
    """The same for this very Python."""
    if stage.processes is not None:
        return [sys.executable, "-m", "torch.distributed.run", *_torchrun(stage.processes), *words]
    return [sys.executable, "-m", "capipe.pipeline", *words]


def _torchrun(processes: int) -> list[str]:
    return ["--standalone", "--nproc-per-node", str(processes), "-m", "capipe.pipeline"]


def _place(chain: Chain, stage: ChainStage, role: str, source: Source, folder: Path) -> str:
    """Where an input lies, or will."""
    if source.stage is None:
        place = source.path or ""
        if place.startswith("-"):  # a path, also where it stands for itself on a command line
            place = f"./{place}"
    else:
        maker = chain.stage(source.stage)
        kind = kind_between(maker, stage.command.spec.inputs[role])
        place = str(folder / (maker.product(kind or "") or maker.out))
    if source.first is None:
        return place
    return f"{place.rstrip('/')}/{{{0:05d}..{source.first - 1:05d}}}.tar"


def trustworthy(stage: ChainStage, folder: Path) -> list[str]:
    """What is wrong with a stage's output, whose manifest or files changed after it was done: nothing, where somebody
    else finished it (`--retry` by hand); faults, where it was edited. Reads all of it."""
    from ..inspect.verify import verify

    faults = []
    for place in artifact_folders(stage):
        try:
            faults += [f"{folder / place}: {fault}" for fault in verify(str(folder / place)).faults]
        except CapipeError as error:
            faults.append(str(error))
    return faults


def committed_rows(folder: Path, place: str) -> dict[str, int] | None:
    """Rows by status of an artifact, None where there is none to be read."""
    try:
        records = Artifact.open(str(folder / place)).committed().values()
    except CapipeError:
        return None
    found: dict[str, int] = {}
    for record in records:
        for status, count in record.rows.items():
            found[status] = found.get(status, 0) + count
    return found
